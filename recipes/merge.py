# SPDX-License-Identifier: Apache-2.0
"""Merge instead of anneal: a run's last checkpoints averaged, then evaluated and exported like a run that was trained.

    python recipes/merge.py runs/merged/run.yaml          # written by sequence.py for a stage's branches

The YAML is the trunk's, with ``variables.merge: {of: save_folder of the trunk, batch: its last, last: 5, every: 100ba,
weights: uniform}``. scripts/average_checkpoints.py averages; ``merged.pt`` in ``save_folder`` is what a stage can start
from. To average by hand, use that script.
"""

import argparse
import sys
from pathlib import Path

from cpt_algorithms.launch.processes import die_with_launcher, run_command
from cpt_algorithms.quiet import ignore_known_warnings

if __name__ == '__main__':
    die_with_launcher()

AVERAGE = Path(__file__).resolve().parents[1] / 'scripts' / 'average_checkpoints.py'


def main() -> None:
    """Average, evaluate, export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('yaml', help='a train YAML with variables.merge')
    arguments = parser.parse_intermixed_args()
    ignore_known_warnings()

    from cpt_algorithms.sequence.merge import merge_stage
    from cpt_algorithms.stage.stage import Stage

    try:
        stage = Stage.read(arguments.yaml)
    except ValueError as error:
        sys.exit(f'{arguments.yaml} was refused:\n{error}')
    merge_stage(stage, AVERAGE)


if __name__ == '__main__':
    run_command(main)
