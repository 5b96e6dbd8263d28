# SPDX-License-Identifier: Apache-2.0
r"""Evaluates exported models on a suite of lm-eval tasks, beside the model they were trained from.

On data of ``make data``, no download::

    python scripts/evaluate.py runs/quickstart/cpp-replay_5pct-s17 --suite yamls/eval/offline.yaml

Several models against one parent, and a quick try of a suite that needs the hub::

    python scripts/evaluate.py runs/german runs/union/huggingface/ba1000 --parent runs/base \
        --suite yamls/eval/english.yaml
    python scripts/evaluate.py runs/german --suite yamls/eval/german.yaml --limit 8

A MODEL is a Hugging Face folder, or a run's save_folder: its newest export ``huggingface/ba<N>`` and the averages
beside it, ``huggingface/ba<N>-<average>``. Without --parent, the parent is the export of the checkpoint that the run's
``stage.json`` names as ``load_path``; if it is not there, one line says so and the results have no differences.

Results go to ``lm_eval/<suite>/<model>.json`` beside the model, after every task; a task that is there already is not
run again. Exits with 1 if a task of the suite could not be run (the others are), and with 2, before anything is run,
if an argument is wrong, also a --parent that is not there.
"""

import argparse
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prepare_data import OneLineParser
from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from cpt_algorithms.evaluation.functional import Mean
    from cpt_algorithms.evaluation.lm_eval import Row

# torch and lm-eval (15 s) are imported where they are used: a wrong argument answers at once.


class EvaluateError(Exception):
    """Something the user can put right; its message is printed as one line."""


# Finding models


def exports(run: Path) -> dict[int, Path]:
    """A run's exports of its own weights by batch."""
    found = {path: re.fullmatch(r'ba(\d+)', path.parent.name) for path in run.glob('huggingface/ba*/config.json')}
    return {int(match[1]): path.parent for path, match in found.items() if match}


def models_of(given: Path) -> list[Path]:
    """The models that an argument names, a run's own weights first.

    Raises:
        EvaluateError: If there is none.
    """
    if (given / 'config.json').is_file():
        return [given]
    if not (found := exports(given)):
        raise EvaluateError(f'{given}: no model found; expected config.json, or huggingface/ba<N>/config.json of a run')
    newest = found[max(found)]
    return [newest, *sorted(path.parent for path in newest.parent.glob(f'{newest.name}-*/config.json'))]


def parent_of(given: Path) -> Path | None:
    """The export of the checkpoint that a run began from; none if it began from scratch or is not known.

    Raises:
        EvaluateError: If there was a parent and it has no export.
    """
    run = given.resolve().parent.parent if (given / 'config.json').is_file() else given
    try:
        load_path = json.loads((run / 'stage.json').read_text(encoding='utf-8'))['parent']
    except (OSError, ValueError, KeyError):
        return None
    if not load_path:
        return None
    # latest-rank0.pt is a link to ep0-ba100-rank0.pt
    checkpoint = Path(os.path.realpath(load_path))
    found = exports(Path(load_path).parent)
    batch = re.search(r'-ba(\d+)', checkpoint.name)
    wanted = int(batch[1]) if batch else max(found, default=-1)
    if wanted not in found:
        name = f'huggingface/ba{wanted}' if batch else 'huggingface/ba<N>'
        raise EvaluateError(
            f'{given}: its parent {load_path} has no export {name} beside it, so no differences are shown; '
            '--parent names another'
        )
    return found[wanted]


# Printing


def cell(mean: 'Mean | None', is_accuracy: bool, sign: str = '') -> str:
    """A number with its standard error, in percent or as it is."""
    if mean is None:
        return '-'
    if is_accuracy:
        return f'{100 * mean.value:{sign}.2f} ± {100 * mean.stderr:.2f} %'
    return f'{mean.value:{sign}.4f} ± {mean.stderr:.4f}'


def verdict(row: 'Row') -> str:
    """What a difference means."""
    from cpt_algorithms.evaluation.lm_eval import within_noise

    if row.delta is None:
        return ''
    if within_noise(row.delta):
        return 'within noise'
    arrow = '↑' if row.delta.value > 0 else '↓'
    return f'{arrow} better' if (row.delta.value > 0) == row.is_accuracy else f'{arrow} worse'


def print_table(result: dict[str, Any], parent: dict[str, Any] | None) -> None:
    """One model, beside its parent if it has one."""
    from cpt_algorithms.evaluation.lm_eval import compare

    title = f'{result["model"]}: {result["suite"]}' + (f', against {parent["model"]}' if parent else '')
    table = Table('task', title=title, title_justify='left', box=box.SIMPLE)
    for column in ('shots', 'n', 'score', *(('parent', 'delta') if parent else ())):
        table.add_column(column, justify='right', no_wrap=True)
    table.add_column('')
    for row in compare(result, parent):
        shots = ['', ''] if row.num_fewshot is None else [str(row.num_fewshot), f'{row.score.count:,}']
        cells = [row.name, *shots, cell(row.score, row.is_accuracy)]
        if parent:
            cells += [cell(row.parent, row.is_accuracy), cell(row.delta, row.is_accuracy, '+'), verdict(row)]
        table.add_row(*cells)
    for name in result['missing']:
        table.add_row(name, '', '', 'missing')
    Console(width=None if sys.stdout.isatty() else 120).print(table)


# Command line


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not re.fullmatch(r'0*[1-9]\d*', text):
        raise argparse.ArgumentTypeError(f'{text!r}: expected a whole number of at least 1')
    return int(text)


def make_parser() -> OneLineParser:
    """The command line."""
    parser = OneLineParser('evaluate', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('models', nargs='+', metavar='MODEL', help="a run's save_folder or a Hugging Face folder; key=value: overrides")
    add('--suite', type=Path, required=True, help='YAML of tasks, such as yamls/eval/offline.yaml')
    add(
        '--parent',
        type=Path,
        metavar='MODEL',
        help="compared with; of a run, its raw weights (default: each run's own)",
    )
    add('--batch-size', type=positive, default=16, help='sequences at once (default: 16)')
    add('--limit', type=positive, metavar='N', help='the first N items of each task; kept apart from whole results')
    add('--device', choices=('cpu', 'cuda'), help='default: cuda if there is one')
    return parser


def quiet() -> None:
    """Leaves lm-eval's progress bars and what goes wrong, and keeps what is offline offline."""
    if os.environ.get('HF_HUB_OFFLINE'):
        os.environ.setdefault('HF_DATASETS_OFFLINE', os.environ['HF_HUB_OFFLINE'])
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
    warnings.filterwarnings('ignore', module=r'(llmfoundry|composer|transformers|torch|lm_eval)\b')
    import transformers

    transformers.logging.set_verbosity_error()
    logging.getLogger('lm_eval').setLevel(logging.WARNING)
    logging.getLogger('lm_eval.models').setLevel(logging.ERROR)  # it warns of every model that is loaded already


def run(options: argparse.Namespace) -> bool:
    """Find, evaluate and show; whether all tasks could be run."""
    overrides = [given for given in options.models if '=' in given and not Path(given).exists()]
    given = [Path(given) for given in options.models if given not in overrides]
    if not given:
        raise EvaluateError('the following arguments are required: MODEL')
    models = [models_of(path) for path in given]
    parents: list[Path | None] = [models_of(options.parent)[0] if options.parent else None] * len(given)

    from cpt_algorithms.evaluation.lm_eval import evaluate, load_suite

    suite = load_suite(options.suite, overrides)
    for index, path in enumerate(given if not options.parent else []):
        try:
            parents[index] = parent_of(path)
        except EvaluateError as missing:
            print(missing)
    quiet()
    if not options.device:
        import torch

        options.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    results: dict[Path, dict[str, Any]] = {}
    print_once = cache(print)  # a task is missing for all models
    for found, parent in zip(models, parents, strict=True):
        for model in [*filter(None, [parent]), *found]:
            if model not in results:
                results[model] = evaluate(model, suite, options.device, options.batch_size, options.limit, print_once)
        for model in found:
            print_table(results[model], results[parent] if parent else None)
    expected = set(suite.get('missing') or {})
    return all(set(result['missing']) == expected for result in results.values())


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = make_parser()
    options = parser.parse_intermixed_args(arguments)
    try:
        complete = run(options)
    except (EvaluateError, OSError, ValueError) as error:
        parser.error(str(error))
    if not complete:
        sys.exit(1)


if __name__ == '__main__':
    main()
