# SPDX-License-Identifier: Apache-2.0
"""A model made of checkpoints without training, then evaluated and exported like a run that was trained.

    python recipes/merge.py runs/stage/latest-rank0.pt line=[0,0.25,0.5,0.75,1]    # back towards what it began from
    python recipes/merge.py runs/stage/latest-rank0.pt last=5 every=100ba          # its last checkpoints averaged
    python recipes/merge.py runs/a/latest-rank0.pt soup=[runs/b/latest-rank0.pt]   # runs averaged

A line makes ``(1 - a) parent + a child`` for several a, evaluates each on the run's ``eval_loader`` (and its lm-eval
suite), and keeps the one of the lowest mean loss. ``merged.pt`` in ``save_folder`` is what a stage can start from,
beside ``huggingface/``; ``save_folder`` is ``<run>-line``, ``-last`` or ``-soup`` by default. Draw it beside other runs
with scripts/report.py. A sequence makes the same of ``branches``, through a YAML: ``python recipes/merge.py RUN.yaml``.
scripts/average_checkpoints.py averages any checkpoints, and evaluates nothing.
"""

import argparse
import sys

from cpt_algorithms.launch.processes import die_with_launcher, run_command
from cpt_algorithms.quiet import ignore_known_warnings

if __name__ == '__main__':
    die_with_launcher()


def main() -> None:
    """Make, evaluate, export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', help="a run's last checkpoint, local or a URI; or a YAML with variables.merge")
    parser.add_argument('overrides', nargs='*', help='key=value: line, soup, or last, every and weights; save_folder')
    arguments = parser.parse_intermixed_args()
    ignore_known_warnings()

    from cpt_algorithms.sequence.branches import merge_of
    from cpt_algorithms.sequence.merge import merge_stage
    from cpt_algorithms.stage.stage import Stage

    given = arguments.checkpoint
    try:
        if given.endswith(('.yaml', '.yml')):
            if arguments.overrides:
                raise ValueError(f'{arguments.overrides[0]}: a YAML says everything itself')
            stage = Stage.read(given)
        else:
            stage = merge_of(given, arguments.overrides)
    except ValueError as error:
        sys.exit(f'{given} was refused:\n{error}')
    merge_stage(stage)


if __name__ == '__main__':
    run_command(main)
