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
import sys
from collections.abc import Sequence
from pathlib import Path

from cpt_algorithms.launch.processes import OneLineParser, refuse_launcher, run_command


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f'{text!r}: expected a whole number of at least 1')
    return int(text)


def make_parser() -> OneLineParser:
    """The command line."""
    parser = OneLineParser('evaluate', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('models', nargs='+', metavar='MODEL', help="a run's save_folder or a Hugging Face folder; key=value: overrides")
    add('--suite', required=True, help='YAML of tasks, such as yamls/eval/offline.yaml')
    add('--parent', type=Path, metavar='MODEL', help="compared with (default: each run's own parent)")
    add('--batch-size', type=positive, default=16, help='sequences at once (default: 16)')
    add('--limit', type=positive, metavar='N', help='the first N items of each task; kept apart from whole results')
    add('--device', choices=('cpu', 'cuda'), help='default: cuda if there is one')
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = make_parser()
    options = parser.parse_intermixed_args(arguments)
    overrides = [given for given in options.models if '=' in given and not Path(given).exists()]
    models = [Path(given) for given in options.models if given not in overrides]
    if not models:
        parser.error('the following arguments are required: MODEL')

    from cpt_algorithms.evaluation.lm_eval import evaluate_runs
    from cpt_algorithms.evaluation.suite import load_suite

    try:
        suite = load_suite([options.suite, *overrides])
        results = evaluate_runs(models, suite, options.parent, options.device, options.batch_size, options.limit)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if any(set(result['missing']) != set(suite.missing) for result in results.values()):
        sys.exit(1)


if __name__ == '__main__':
    refuse_launcher()
    run_command(main)
