# SPDX-License-Identifier: Apache-2.0
"""Stages x arms x seeds from one YAML, then the report: forgetting, adaptation and cost.

    python recipes/sequence.py yamls/sequence/quickstart.yaml [key=value ...]
    python recipes/sequence.py yamls/sequence/quickstart.yaml --dry-run      # plan and commands; trains, writes nothing
    python recipes/sequence.py yamls/sequence/quickstart.yaml --write        # the same, and the YAMLs they need
    python recipes/sequence.py yamls/sequence/pile_german.yaml scale=tiny    # a paper's experiment, in minutes, here
    python recipes/sequence.py --sweep yamls/sweeps/replay_fraction.yaml     # every trial of a W&B sweep, without W&B

Each run is one plain llm-foundry train YAML (``FOLDER/RUN/run.yaml``), launched through continue_pretraining.py: here,
as a Slurm job (``slurm: {...}`` in the sequence), or by any scheduler that starts the commands that ``--write`` prints.
Run the same command again after any interruption: finished runs are kept, the others go on from their latest
checkpoint. Ends with FOLDER/report.html.
"""

import argparse
import signal
import sys
import time
from pathlib import Path

from cpt_algorithms.launch.processes import refuse_launcher, run_command
from cpt_algorithms.quiet import ignore_known_warnings

RECIPES = Path(__file__).resolve().parent


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('words', nargs='*', metavar='YAML [key=value ...]', help='a sequence YAML; none with --sweep')
    parser.add_argument('--sweep', metavar='FILE', help='a W&B sweep of a sequence, run here, without wandb agent')
    parser.add_argument(
        '--trial', nargs='+', default=[], metavar='STAGE.KEY=VALUE', help='one trial of a sweep instead of the arms'
    )
    parser.add_argument('--dry-run', action='store_true', help='print the plan and the command of each run, and stop')
    parser.add_argument('--write', action='store_true', help='as --dry-run, and write the YAMLs that the commands need')
    return parser.parse_intermixed_args(words)


def main() -> None:
    """Read, check, print the plan, run, report."""
    arguments = parse(sys.argv[1:])
    ignore_known_warnings()
    refuse_launcher('; the ranks of each run are `nproc` in the YAML')
    is_plan = arguments.dry_run or arguments.write

    from cpt_algorithms.cost.tables import base_of, print_costs
    from cpt_algorithms.launch.launcher import LaunchError, make_launcher, resources_of
    from cpt_algorithms.launch.wandb_runs import trial_run
    from cpt_algorithms.report.page import print_report, write_report
    from cpt_algorithms.report.tables import summary_of
    from cpt_algorithms.sequence.check import check
    from cpt_algorithms.sequence.read import read_sequence
    from cpt_algorithms.sequence.run import is_done, run_all, write_sequence, write_yaml
    from cpt_algorithms.sequence.show import print_commands, print_runs
    from cpt_algorithms.terminal import make_console

    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = make_console()
    try:
        spec, runs = read_sequence(arguments.words, arguments.sweep, arguments.trial)
        resources = resources_of(spec.given)
        unseen = check(runs, resources.ranks, is_plan)
        start = None if is_plan else make_launcher(resources, spec.jobs)
    except (ValueError, OSError) as error:
        sys.exit(f'{arguments.sweep or " ".join(arguments.words[:1])} was refused before training:\n{error}')
    wanted = {name: data.passes for name, data in spec.data.items() if data.passes}
    print_runs(spec.name, runs, wanted, console)
    for each in unseen:
        console.print(f'not seen from here: {each}', soft_wrap=True, markup=False)
    if start is None:
        if arguments.write:
            write_sequence(spec, runs, keep=bool(arguments.trial or arguments.sweep))
            for run in runs:
                if not is_done(run):
                    write_yaml(run)
        print_commands(resources, runs, RECIPES, console)
        console.print('\nat a peak and utilisation that scripts/estimate_cost.py --gpu --mfu can change:')
        try:
            stages = {run.name: run.stage for run in runs}
            budgets, base = spec.stage_tokens, base_of(stages)
            print_costs(stages, console, gpus=resources.ranks, budgets=budgets, base=base)
        except ValueError as error:  # mixtures of experts: they can be trained
            console.print(f'what it will cost is not known: {error}', markup=False)
        return
    with trial_run({'sequence': spec.name, 'arm': runs[-1].arm}) as summary:
        try:
            write_sequence(spec, runs, keep=bool(arguments.trial or arguments.sweep))
            failed = run_all(runs, start, spec.jobs, RECIPES, console)
            report = write_report([Path(spec.folder)], Path(spec.folder))
        except LaunchError as error:
            sys.exit(f'{error}; jobs that were submitted go on, and the same command waits for them')
        except OSError as error:
            sys.exit(f'{error.filename}: {error.strerror}; what was trained is kept, and the same command goes on')
        print_report(report, console)
        console.print(f'({time.monotonic() - started:.0f} s)')
        if arguments.trial:
            summary |= summary_of(report.rows, report.study.data, runs[-1].arm)
        if failed:
            sys.exit(
                f'{len(failed)} of {len(runs)} runs failed: {", ".join(failed)}; run the same command to try them again'
            )


if __name__ == '__main__':
    run_command(main)
