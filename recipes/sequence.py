# SPDX-License-Identifier: Apache-2.0
"""Stages x arms x seeds from one YAML, then the report: what was forgotten, what was learned, what it cost.

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
import json
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cpt_algorithms.cost.tables import print_costs
from cpt_algorithms.files import is_remote, write_json
from cpt_algorithms.launch.launcher import Handle, LaunchError, Resources, Start, command, make_launcher, resources_of
from cpt_algorithms.launch.wandb_runs import trial_run
from cpt_algorithms.report.page import Report, print_report, write_report
from cpt_algorithms.schedulers.phases import phases_of
from cpt_algorithms.sequence.expand import Run, checkpoint_after, descendants, plan, stage_tokens, tokens_per_stream
from cpt_algorithms.sequence.scale import load_scaled
from cpt_algorithms.sequence.sweep import plan_trials, sequence_of, trials_of
from cpt_algorithms.stage.preflight import PreflightError, preflight, resolve, total_batches

RECIPES = Path(__file__).resolve().parent
# Composer's console logger: [token=40960/1638400]
PROGRESS = re.compile(r'^\[(?:token|batch|sample)=(\d+)/(\d+)\]', re.MULTILINE)
# rich would take a log file for a narrow terminal
console = Console(width=None if sys.stdout.isatty() else 140)


def batches(run: Run) -> int:
    """Batches of a run."""
    total = total_batches(run.config)
    assert total is not None, 'tokens_per_stream has refused epochs'
    return total


def print_plan(spec: dict[str, Any], runs: list[Run]) -> None:
    """What will be trained, on what, for how long, at which learning rate."""
    shown = Table(title=escape(f'{spec["name"]}: {len(runs)} runs'), title_justify='left')
    for column in ('run', 'parent', 'tokens'):
        shown.add_column(column)
    shown.add_column('batches', justify='right')
    total = 0
    for run in runs:
        streams = tokens_per_stream(run.config)
        total += sum(streams.values())
        read = ', '.join(f'{name} {tokens:,}' for name, tokens in streams.items() if tokens)
        if merge := (run.config.get('variables') or {}).get('merge'):
            read = f'average of {merge["last"]} checkpoints, {merge["every"]} apart'
        start = f' at {sum(run.trunk.values()):,}' if run.trunk else ''
        shown.add_row(run.name, f'{run.parent or "(from scratch)"}{start}', escape(read), f'{batches(run):,}')
    console.print(shown)
    console.print(f'{total:,} tokens to train in all\n')
    for run in (run for run in runs if batches(run)):
        if phases := phases_of(run.config['scheduler'], run.config['max_duration']):
            console.print(f'{run.name}: {run.config["scheduler"]["name"]}, times lr {run.config["optimizer"]["lr"]:g}')
            console.print(str(phases), highlight=False, markup=False)


def check(spec: dict[str, Any], runs: list[Run], is_plan: bool = False) -> list[str]:
    """Refuse, before anything is trained, what preflight can see and what would change a finished run.

    Returns:
        Of a plan, which may be made elsewhere than where it is trained: what cannot be reached from here.
    """
    unseen: list[str] = []
    of_runs: dict[str, list[str]] = {}
    problems = []
    for run in runs:
        try:
            # parents do not exist yet: each run's own preflight looks at them; a merge is as right as its trunk
            if batches(run):
                preflight(run.config, resources_of(spec).ranks, parent_is_there=False)
        except PreflightError as error:
            unseen += error.unseen
            for each in error.problems:
                if not (is_plan and each in error.unseen):
                    of_runs.setdefault(each, []).append(run.name)
        saved = folder(run) / 'run.yaml'
        if not (saved.exists() and (folder(run) / 'stage.json').exists()):  # written, perhaps, and not begun
            continue
        before, now = of_training(OmegaConf.load(saved)), of_training(run.config)
        added = points_of(now) - points_of(before)
        if all((folder(run) / checkpoint_after(run.config, batch)).exists() for batch in added):
            for config in (before, now):  # a new branch begins where a checkpoint was kept
                config['callbacks'].pop('branch_points', None)
        if changed := differences(before, now):
            invalid = [
                name for name in descendants(runs, run.name) if (Path(spec['folder']) / name / 'stage.json').exists()
            ]
            problems.append(
                f'{run.name} was trained with other settings ({"; ".join(changed[:4])}). Put them back, use another '
                f'folder, or delete {folder(run)}'
                + (f' and what starts from it and would become invalid: {", ".join(invalid)}' if invalid else '')
            )
    for each, names in of_runs.items():
        others = f' and {len(names) - 1} more of {len(runs)} runs' if len(names) > 1 else ''
        problems.append(f'{names[0]}{others}: {each}')
    if problems:
        raise PreflightError(problems)
    return list(dict.fromkeys(unseen))


def points_of(config: dict[str, Any]) -> set[int]:
    """Batches of a run whose checkpoints are kept for branches."""
    return set((config['callbacks'].get('branch_points') or {}).get('at', ()))


def of_training(config: Any) -> dict[str, Any]:
    """What of a run's YAML says how it is trained, and not on what that is evaluated, or where logged and cached."""
    given: Any = OmegaConf.to_container(OmegaConf.create(config))
    kept = {key: value for key, value in given.items() if key not in ('loggers', 'variables', 'eval_loader')}
    merge = (given.get('variables') or {}).get('merge')
    return {key: with_caches(value, lambda stream: '') for key, value in {**kept, 'merge': merge}.items()}


def with_caches(section: Any, place: Callable[[dict[str, Any]], str]) -> Any:
    """A part of a YAML whose streams from elsewhere are all cached where ``place`` says."""
    if isinstance(section, list):
        return [with_caches(value, place) for value in section]
    if not isinstance(section, dict):
        return section
    section = {key: with_caches(value, place) for key, value in section.items()}
    return {**section, 'local': place(section)} if section.get('remote') else section


def cached_apart(run: Run) -> Run:
    """A run with cache folders of its own: no two processes may use one at the same time."""

    def place(stream: dict[str, Any]) -> str:
        cache = stream.get('local') or 'cache/' + re.sub(r'\W+', '-', stream['remote'])
        return f'{cache}/{run.name}'

    return replace(run, config=with_caches(run.config, place))


def differences(old: Any, new: Any, path: str = '') -> list[str]:
    """``key: old -> new`` for every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = (differences(old.get(k), new.get(k), f'{path}.{k}' if path else str(k)) for k in {**old, **new})
        return [line for lines in found for line in lines]
    return [] if old == new else [f'{path}: {old} -> {new}']


def folder(run: Run) -> Path:
    """Where a run keeps everything."""
    return Path(run.config['save_folder'])


def suite_of(run: Run) -> str | list[str] | None:
    """The lm-eval suite that a run ends with."""
    return (run.config.get('variables') or {}).get('lm_eval')


def is_done(run: Run) -> bool:
    """Whether a run is trained, exported and evaluated."""
    path = folder(run) / 'done.json'
    return path.exists() and suite_of(run) in (None, json.loads(path.read_text(encoding='utf-8')).get('lm_eval'))


def write_sequence(spec: dict[str, Any], runs: list[Run], keep: bool) -> None:
    """``sequence.json``: which runs belong together, for the report; ``keep`` those of other trials."""
    path = Path(spec['folder']) / 'sequence.json'
    planned = [
        {
            'name': run.name,
            'arm': run.arm,
            'stage': run.stage,
            'seed': run.seed,
            'parent': run.parent,
            'tokens': tokens_per_stream(run.config),
            'trunk': run.trunk,
            'batches': batches(run),
        }
        for run in runs
    ]
    sequence = {'name': spec['name'], 'data': list(spec['data']), 'stages': stage_tokens(spec), 'runs': planned}
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name('.sequence.lock')):
        if keep and path.exists():
            names = {run.name for run in runs}
            others = json.loads(path.read_text(encoding='utf-8'))['runs']
            sequence['runs'] = [*(other for other in others if other['name'] not in names), *planned]
        write_json(path, sequence)


@dataclass
class Running:
    """A run that is being trained."""

    run: Run
    handle: Handle
    lock: FileLock
    task: Any = None
    started: float = field(default_factory=time.monotonic)


def write_yaml(run: Run) -> None:
    """``run.yaml``, whole or not at all."""
    folder(run).mkdir(parents=True, exist_ok=True)
    partial = folder(run) / '.run.yaml'
    OmegaConf.save(OmegaConf.create(run.config), partial)
    partial.replace(folder(run) / 'run.yaml')


def launch(run: Run, start: Start) -> Running | None:
    """Start a run; None if another sequence is at it."""
    folder(run).mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder(run) / '.sequence.lock')
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    (folder(run) / 'failed.json').unlink(missing_ok=True)
    write_yaml(run)
    return Running(run, start(RECIPES / run.script, folder(run)), lock)


def print_commands(layout: Resources, runs: list[Run]) -> None:
    """What trains each run, in the shell of each of its nodes, under whatever scheduler starts it there."""
    if layout.nodes > 1:
        console.print(f'# on each node: NODE_RANK is 0 to {layout.nodes - 1}, MASTER_ADDR the node whose rank is 0')
    for run in runs:
        after = f', when {run.parent} is done' if run.parent else ''
        console.print(f'# {run.name}{after}', soft_wrap=True, highlight=False, markup=False)
        line = command(layout, RECIPES / run.script, folder(run) / 'run.yaml')
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def progress_of(run: Run) -> int:
    """The last batch that the log speaks of."""
    path = folder(run) / 'log.txt'
    if not path.exists():
        return 0
    with open(path, 'rb') as file:
        file.seek(max(0, path.stat().st_size - 20_000))
        found = PROGRESS.findall(file.read().decode(errors='replace'))
    return batches(run) * int(found[-1][0]) // int(found[-1][1]) if found else 0


def _chain(run: Run, runs: list[Run]) -> int:
    """Batches from this run to the end of the longest chain that starts with it: the longest is started first."""
    return batches(run) + max((_chain(child, runs) for child in runs if child.parent == run.name), default=0)


def say_failed(run: Run, returncode: int) -> None:
    """Note and print why: the one line that the run has ended with, or else the end of its log."""
    log = folder(run) / 'log.txt'
    tail = log.read_text(errors='replace').splitlines()[-200:]  # W&B prints many behind it
    stopped = [line for line in tail if line.startswith(f'{run.name} stopped: ')]
    tail = stopped[-1:] or tail[-12:]
    try:
        write_json(folder(run) / 'failed.json', {'returncode': returncode, 'log': tail})
    except OSError as error:
        console.print(f'{error.filename}: {error.strerror}; the report cannot say why it failed', markup=False)
    console.print(f'[red]{run.name}: failed[/red] ({log}):')
    console.print('\n'.join(tail), markup=False, highlight=False, soft_wrap=True)


def run_all(jobs: int, runs: list[Run], start: Start) -> list[str]:
    """Train what is not done yet, as many at a time as ``jobs`` says. Returns the names of runs that failed."""
    done = {run.name for run in runs if is_done(run)}
    if done:
        console.print(f'{len(done)} of {len(runs)} runs are done already')
    failed: list[str] = []
    elsewhere: set[str] = set()
    running: list[Running] = []
    columns = (
        TextColumn('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn('batches'),
        TimeElapsedColumn(),
    )
    said = time.monotonic()
    in_order = sorted(runs, key=lambda run: -_chain(run, runs))
    with Progress(*columns, console=console) as bars:
        overall = bars.add_task('all runs', total=sum(batches(r) for r in runs if r.name not in done))
        finished = 0
        while True:
            waiting = [r for r in in_order if r.name not in {*done, *failed, *(x.run.name for x in running)}]
            for run in waiting:
                if run.parent in failed:
                    failed.append(run.name)
                    console.print(f'{run.name}: skipped, its parent {run.parent} failed')
                elif is_done(run):  # by another sequence
                    done.add(run.name)
                    finished += batches(run)
                elif len(running) < jobs and (run.parent is None or run.parent in done):
                    try:
                        launched = launch(run, start)
                    except OSError as error:
                        failed.append(run.name)
                        console.print(f'{run.name}: failed: {error.filename}: {error.strerror}', markup=False)
                        continue
                    if launched is not None:
                        launched.task = bars.add_task(run.name, total=batches(run))
                        running.append(launched)
                        console.print(f'{run.name}: started ({launched.handle.name})', highlight=False, markup=False)
                    elif run.name not in elsewhere:
                        elsewhere.add(run.name)
                        console.print(f'{run.name}: waiting for another process that trains it')
            if not running and all(run.name in {*done, *failed} for run in runs):
                break
            time.sleep(0.3)
            for each in list(running):
                bars.update(each.task, completed=progress_of(each.run))
                returncode = each.handle.poll()
                if returncode is None:
                    continue
                running.remove(each)
                bars.remove_task(each.task)
                if returncode == 0:
                    done.add(each.run.name)
                    finished += batches(each.run)
                    console.print(f'{each.run.name}: done in {time.monotonic() - each.started:.0f} s')
                else:
                    failed.append(each.run.name)
                    say_failed(each.run, returncode)
                each.lock.release()
            bars.update(overall, completed=finished + sum(progress_of(x.run) for x in running))
            if not console.is_terminal and time.monotonic() - said > 15:
                said = time.monotonic()
                where = ', '.join(f'{x.run.name} {progress_of(x.run)}/{batches(x.run)}' for x in running)
                console.print(f'  {where}')
    return failed


def summary_of(report: Report, arm: str) -> dict[str, float]:
    """What a sweep compares its trials by: final losses, forgetting and adaptation of the last stage of an arm."""
    summary = {}
    for row in report.rows:
        if row.arm == arm and row.is_finished:
            of_average = f'/{row.average}' if row.average else ''
            for column, value in row.columns.items():
                name, _, dataset = column.partition(' ')
                if name == 'loss':
                    summary[f'final_loss/{dataset}{of_average}'] = value.mean
                elif name in ('forgetting', 'adaptation'):
                    summary[f'final_{name}/{dataset or "mean"}{of_average}'] = value.mean
    return summary


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('words', nargs='*', metavar='YAML [key=value ...]', help='a sequence YAML; none with --sweep')
    parser.add_argument('--sweep', metavar='FILE', help='a W&B sweep of a sequence, run here, without wandb agent')
    parser.add_argument(
        '--trial', nargs='+', metavar='STAGE.KEY=VALUE', help='one trial of a sweep instead of the arms'
    )
    parser.add_argument('--dry-run', action='store_true', help='print the plan and the command of each run, and stop')
    parser.add_argument('--write', action='store_true', help='as --dry-run, and write the YAMLs that the commands need')
    return parser.parse_intermixed_args(words)


def read(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Run]]:
    """The sequence, and all its runs.

    Raises:
        ValueError: If it, or the sweep, is not right.
    """
    words, trials = arguments.words, [arguments.trial] if arguments.trial else []
    try:
        if arguments.sweep:
            # as wandb sweep reads it; OmegaConf would take ${env} for its own
            sweep = yaml.safe_load(Path(arguments.sweep).read_text(encoding='utf-8'))
            words, trials = [*sequence_of(sweep), *words], trials_of(sweep)
        if not words:
            raise ValueError('a sequence YAML is missing, or --sweep FILE')
        spec = load_scaled(words)
    except (OSError, UnicodeDecodeError, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(f'{arguments.sweep or words[0]} cannot be read: {error}') from error
    if is_remote(spec.get('folder') or ''):
        raise ValueError(
            f'folder={spec["folder"]}: a sequence keeps its plan, logs and runs in a local folder; only its data may '
            'lie in object storage'
        )
    runs = plan_trials(spec, trials) if trials else plan(spec)
    runs = [replace(run, config=resolve(run.config)) for run in runs]
    return spec, [cached_apart(run) for run in runs] if (spec.get('jobs') or 1) > 1 else runs


def main() -> None:
    """Plan, check, train, report."""
    arguments = parse(sys.argv[1:])
    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        spec, runs = read(arguments)
        layout, jobs = resources_of(spec), spec.get('jobs') or 1
        is_plan = arguments.dry_run or arguments.write
        unseen = check(spec, runs, is_plan)
        start = None if is_plan else make_launcher(layout, jobs)
    except (ValueError, OSError) as error:
        sys.exit(f'{arguments.sweep or " ".join(arguments.words[:1])} was refused before training:\n{error}')
    print_plan(spec, runs)
    for each in unseen:
        console.print(f'not seen from here: {each}', soft_wrap=True, highlight=False, markup=False)
    if start is None:
        if arguments.write:
            write_sequence(spec, runs, keep=bool(arguments.trial))
            for run in runs:
                if not is_done(run):
                    write_yaml(run)
        print_commands(layout, runs)
        console.print(
            '\nat a peak and utilisation that scripts/estimate_cost.py --gpu --mfu can change:', highlight=False
        )
        try:
            print_costs({run.name: run.config for run in runs}, console, gpus=layout.ranks, stages=stage_tokens(spec))
        except ValueError as error:  # mixtures of experts: they can be trained
            console.print(f'what it will cost is not known: {error}', highlight=False, markup=False)
        return
    with trial_run({'sequence': spec['name'], 'arm': runs[-1].arm}) as summary:
        try:
            write_sequence(spec, runs, keep=bool(arguments.trial))
            failed = run_all(jobs, runs, start)
            report = write_report([Path(spec['folder'])], Path(spec['folder']))
        except LaunchError as error:
            sys.exit(f'{error}; jobs that were submitted go on, and the same command waits for them')
        except OSError as error:
            sys.exit(f'{error.filename}: {error.strerror}; what was trained is kept, and the same command goes on')
        print_report(report, console)
        console.print(f'({time.monotonic() - started:.0f} s)')
        if arguments.trial:
            summary |= summary_of(report, runs[-1].arm)
        if failed:
            sys.exit(
                f'{len(failed)} of {len(runs)} runs failed: {", ".join(failed)}; run the same command to try them again'
            )


if __name__ == '__main__':
    main()
