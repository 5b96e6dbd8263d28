# SPDX-License-Identifier: Apache-2.0
"""One stage: parent checkpoint + new data + replay + schedule -> checkpoints and a Hugging Face model.

    composer -n 8 recipes/continue_pretraining.py yamls/continue_pretraining/tiny_cpu.yaml [key=value ...]
    python recipes/continue_pretraining.py STAGE.yaml --dry-run        # every check, phases and cost; trains nothing

The YAML is an ordinary llm-foundry train YAML. The recipe checks everything that can be checked without training, then
llm-foundry trains; at the end the model lies in ``save_folder/huggingface``. With ``variables.lm_eval: SUITE.yaml``, it
and its averages are then evaluated on the suite. After a crash, run the same command again: it resumes from the latest
checkpoint, and does nothing if the stage is done. ``save_folder`` may be a URI such as ``s3://bucket/run``: then
everything that a restart needs is there and not on this machine.
"""

import argparse
import sys

from cpt_algorithms.launch.processes import die_with_launcher, run_command
from cpt_algorithms.quiet import ignore_known_warnings

if __name__ == '__main__':
    die_with_launcher()


def main() -> None:
    """Check, train, export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('yaml', help='an llm-foundry train YAML')
    parser.add_argument('overrides', nargs='*', help='key=value, as for llmfoundry train')
    parser.add_argument('--dry-run', action='store_true', help='check everything, print phases and cost, and stop')
    arguments = parser.parse_intermixed_args()
    ignore_known_warnings()

    from cpt_algorithms.cost.tables import print_stage
    from cpt_algorithms.stage.run import check_or_exit, train_stage
    from cpt_algorithms.stage.stage import Stage

    try:
        stage = Stage.read(arguments.yaml, arguments.overrides)
    except ValueError as error:
        sys.exit(f'{arguments.yaml} was refused before training:\n{error}')
    check_or_exit(stage, arguments.yaml)
    print_stage(stage, with_cost=arguments.dry_run)
    if not arguments.dry_run:
        train_stage(stage)


if __name__ == '__main__':
    run_command(main)
