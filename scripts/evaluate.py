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
``stage.json`` names as ``load_path``, or the pretrained model that it began from; if that is not there, one line says
so and the results have no differences.

Results go to ``lm_eval/<suite>/<model>.json`` beside the model, after every task; a task that is there already is not
run again. Exits with 1 if a task of the suite could not be run (the others are), and with 2, before anything is run,
if an argument is wrong, also a --parent that is not there.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from prepare_data import OneLineParser

from cpt_algorithms.checkpoints.exports import models_of, parent_of

# torch and lm-eval (15 s) are imported where they are used: a wrong argument answers at once.


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


def run(options: argparse.Namespace) -> bool:
    """Find, evaluate and show; whether all tasks could be run."""
    overrides = [given for given in options.models if '=' in given and not Path(given).exists()]
    given = [Path(given) for given in options.models if given not in overrides]
    if not given:
        raise ValueError('the following arguments are required: MODEL')
    models = [models_of(path) for path in given]
    parents: list[Path | None] = [models_of(options.parent)[0] if options.parent else None] * len(given)

    from cpt_algorithms.evaluation.lm_eval import evaluate_all, load_suite, print_result

    suite = load_suite(options.suite, overrides)
    for index, path in enumerate(given if not options.parent else []):
        try:
            parents[index] = parent_of(path)
        except ValueError as missing:
            print(missing)
    results = evaluate_all(models, parents, suite, options.device, options.batch_size, options.limit)
    for found, parent in zip(models, parents, strict=True):
        for model in found:
            print_result(results[model], results[parent] if parent else None)
    expected = set(suite.get('missing') or {})
    return all(set(result['missing']) == expected for result in results.values())


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = make_parser()
    options = parser.parse_intermixed_args(arguments)
    try:
        complete = run(options)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not complete:
        sys.exit(1)


if __name__ == '__main__':
    main()
