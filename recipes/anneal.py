# SPDX-License-Identifier: Apache-2.0
"""A branch: the learning rate of a run annealed from one of its checkpoints, to have a model to use.

    composer -n 8 recipes/anneal.py runs/trunk/latest-rank0.pt t_anneal=45000000000tok
    python recipes/anneal.py runs/trunk/ep0-ba900-rank0.pt t_anneal=100ba anneal=linear alpha_f=0 save_folder=runs/a
    python recipes/anneal.py runs/trunk/latest-rank0.pt t_anneal=100ba --dry-run

The checkpoint must be of the constant phase of a run of continue_pretraining.py, whose YAML is the branch's: the same
model, optimizer state, learning rate, and data, read on behind what the trunk has read. Any other ``key=value`` of an
llm-foundry YAML changes that, such as another mix: ``train_loader.dataset.new={...}``. The trunk stays as it is and can
be trained on. Run the same command again after a crash. ``save_folder`` is ``<trunk>-anneal-ba<batch>`` by default.
"""

import argparse
import sys

from cpt_algorithms.launch.processes import die_with_launcher, run_command
from cpt_algorithms.quiet import ignore_known_warnings

if __name__ == '__main__':
    die_with_launcher()


def main() -> None:
    """Check, anneal, export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', help="a trunk's checkpoint, local or a URI")
    parser.add_argument('overrides', nargs='*', help='key=value: t_anneal, anneal, alpha_f, and of the YAML')
    parser.add_argument('--dry-run', action='store_true', help='check everything, print phases and cost, and stop')
    arguments = parser.parse_intermixed_args()
    ignore_known_warnings()

    from cpt_algorithms.cost.tables import print_stage
    from cpt_algorithms.sequence.branches import branch_of
    from cpt_algorithms.stage.run import check_or_exit, train_stage

    try:
        branch = branch_of(arguments.checkpoint, arguments.overrides)
    except ValueError as error:
        sys.exit(f'no branch was started: {error}')
    check_or_exit(branch, arguments.checkpoint)
    print_stage(branch, with_cost=arguments.dry_run)
    if not arguments.dry_run:
        train_stage(branch)


if __name__ == '__main__':
    run_command(main)
