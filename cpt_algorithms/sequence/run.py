# SPDX-License-Identifier: Apache-2.0
"""Train the runs of a sequence: parents first, as many at a time as it says, what is done already not again."""

import hashlib
import json
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from cpt_algorithms.checkpoints.save_folder import newest_complete
from cpt_algorithms.evaluation.suite import digest_of
from cpt_algorithms.files import holder_of, read_json, remove_partials, take, write_atomic, write_json
from cpt_algorithms.launch.launcher import Handle, Start
from cpt_algorithms.sequence.expand import Run
from cpt_algorithms.sequence.spec import SequenceSpec
from cpt_algorithms.stage.identity import decisive
from cpt_algorithms.stage.record import done_with
from cpt_algorithms.stage.restart_checks import restart_problem

__all__ = ['how_it_ended', 'is_done', 'recipe_of', 'run_all', 'write_sequence', 'write_yaml']

# Composer's console logger: [token=40960/1638400]
_PROGRESS = re.compile(r'^\[(?:token|batch|sample)=(\d+)/(\d+)\]', re.MULTILINE)
# Composer's launcher
_CRASHED = re.compile(r'Rank (\d+) crashed with exit code (-?\d+)')
_HINTS = {'SIGKILL': ': out of memory?', 'SIGBUS': ': is /dev/shm full?', 'SIGTERM': ', from outside'}
_COLUMNS = (
    TextColumn('{task.description}'),
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn('batches'),
    TimeElapsedColumn(),
)


def recipe_of(run: Run) -> str:
    """The script that trains a run, or merges."""
    return 'merge.py' if run.stage.merge else 'continue_pretraining.py'


def is_done(run: Run) -> bool:
    """Whether a run is trained, exported and evaluated."""
    done = done_with(run.stage)
    return done is not None and (run.stage.suite is None or done.get('lm_eval') == digest_of(run.stage.suite))


def _plan_of(spec: SequenceSpec) -> dict[str, Any]:
    """What all arms of a sequence have in common: only arms of one plan are compared."""
    stages = {name: decisive(stage) for name, stage in spec.merged.items()}
    return {'data': list(spec.data), 'tokens': spec.stage_tokens, 'stages': stages}


def write_sequence(spec: SequenceSpec, runs: Sequence[Run], keep: bool = False) -> None:
    """Write ``sequence.json``: which runs belong together, and which of them are compared, for the report.

    Those of trials that are there stay, with the plan that they were trained by; with ``keep``, which makes these runs
    trials, all others.
    """
    path, plan = Path(spec.folder) / 'sequence.json', _plan_of(spec)
    name = hashlib.blake2b(json.dumps(plan, sort_keys=True).encode(), digest_size=8).hexdigest()
    planned = [
        {
            'name': run.name,
            'arm': run.arm,
            'stage': run.stage_name,
            'seed': run.seed,
            'parent': run.parent,
            'also': list(run.also),
            'tokens': run.stage.tokens_by_stream(),
            'tokens_before_branch': run.tokens_before_branch,
            'batches': run.batches,
            'judged_by': run.stage.judged_by,
            'is_trial': keep,
            'plan': name,
        }
        for run in runs
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name('.sequence.lock'))
    take(lock, f'sequence {spec.name}')
    try:
        remove_partials(path.parent)
        before: dict[str, Any] = read_json(path) or {'runs': [], 'plans': {}}
        names = {run.name for run in runs}
        others = {other['name']: other for other in before['runs'] if other['name'] not in names}
        kept = [other for other in others.values() if keep or other.get('is_trial')]
        for other in kept:  # with all that they began from
            began = [others.get(name) for name in (other['parent'], *other.get('also', ()))]
            kept += [each for each in began if each and each not in kept]
        all_runs = [*planned, *(other for other in others.values() if other in kept)]
        used = {run['plan'] for run in all_runs}
        plans = {key: each for key, each in before['plans'].items() if key in used} | {name: plan}
        given = {'name': spec.name, 'data': list(spec.data), 'plan': name, 'plans': plans, 'runs': all_runs}
        write_json(path, given)
    finally:
        lock.release()


def write_yaml(run: Run) -> None:
    """Write ``run.yaml``, whole or not at all."""
    run.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(run.folder / 'run.yaml', OmegaConf.to_yaml(OmegaConf.create(run.stage.to_train_yaml())).encode())


def run_all(runs: Sequence[Run], start: Start, jobs: int, recipes: Path, console: Console) -> list[str]:
    """Train what is not done yet.

    Returns:
        The names of runs that failed, or whose parent did.
    """
    loop = _Loop(runs, start, jobs, recipes, console)
    if loop.done:
        console.print(f'{len(loop.done)} of {len(runs)} runs are done already')
    said = time.monotonic()
    with Progress(*_COLUMNS, console=console) as bars:
        total = sum(run.batches for run in runs if run.name not in loop.done)
        overall = bars.add_task('all runs', total=total)
        while loop.start_what_can_be(bars):
            time.sleep(0.3)
            loop.look(bars)
            bars.update(overall, completed=loop.finished + sum(_progress_of(each.run) for each in loop.running))
            if not console.is_terminal and time.monotonic() - said > 15:
                said = time.monotonic()
                at = (f'{each.run.name} {_progress_of(each.run)}/{each.run.batches}' for each in loop.running)
                console.print(f'  {", ".join(at)}')
    return loop.failed


@dataclass
class _Running:
    """A run that is being trained."""

    run: Run
    handle: Handle
    lock: FileLock
    bar: TaskID
    log_begin: int  # bytes of the log that are of earlier starts
    started: float = field(default_factory=time.monotonic)


class _Loop:
    """Which runs are done, failed and running."""

    def __init__(self, runs: Sequence[Run], start: Start, jobs: int, recipes: Path, console: Console) -> None:
        # of those that can start, the one with the longest way to go behind it goes first
        self.runs = sorted(runs, key=lambda run: -_batches_to_go(run, runs))
        self.start, self.jobs, self.recipes, self.console = start, jobs, recipes, console
        self.done: set[str] = set()
        for run in runs:  # parents first: what started from one that is not done is asked when that is
            if self.done.issuperset(run.needs) and is_done(run):
                self.done.add(run.name)
        self.failed: list[str] = []
        self.elsewhere: set[str] = set()
        self.running: list[_Running] = []
        self.finished = 0  # batches, since the loop began

    def start_what_can_be(self, bars: Progress) -> bool:
        """Start runs whose parents are done; whether anything is left to wait for."""
        for run in self.runs:
            if run.name in {*self.done, *self.failed, *(each.run.name for each in self.running)}:
                continue
            if failed := [name for name in run.needs if name in self.failed]:
                self.failed.append(run.name)
                self._print(f'{run.name}: skipped, its parent {failed[0]} failed')
            elif not self.done.issuperset(run.needs):
                continue
            elif is_done(run) and restart_problem(run.stage) is None:  # by another sequence
                self._finish(run)
            elif len(self.running) < self.jobs:  # what is done and from another parent says so, and fails
                self._launch(run, bars)
        return bool(self.running) or any(run.name not in {*self.done, *self.failed} for run in self.runs)

    def _launch(self, run: Run, bars: Progress) -> None:
        lock = FileLock(run.folder / '.sequence.lock')
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            take(lock, f'sequence {run.folder.parent}', timeout=0)
            (run.folder / 'failed.json').unlink(missing_ok=True)
            write_yaml(run)
            log = run.folder / 'log.txt'
            log_begin = log.stat().st_size if log.exists() else 0
            handle = self.start(self.recipes / recipe_of(run), run.folder)
        except Timeout:
            if run.name not in self.elsewhere:
                self.elsewhere.add(run.name)
                self._print(f'{run.name}: waiting for {holder_of(lock)}, which trains it')
        except OSError as error:
            self.failed.append(run.name)
            self._print(f'{run.name}: failed: {error.filename}: {error.strerror}')
        else:
            self.running.append(_Running(run, handle, lock, bars.add_task(run.name, total=run.batches), log_begin))
            self._print(f'{run.name}: started ({handle.name})')

    def look(self, bars: Progress) -> None:
        """Note which runs have ended, and how."""
        for each in list(self.running):
            bars.update(each.bar, completed=_progress_of(each.run))
            returncode = each.handle.poll()
            if returncode is None:
                continue
            self.running.remove(each)
            bars.remove_task(each.bar)
            if returncode == 0:
                self._finish(each.run)
                self._print(f'{each.run.name}: done in {time.monotonic() - each.started:.0f} s')
            else:
                self.failed.append(each.run.name)
                self._say_failed(each.run, returncode, each.log_begin)
            each.lock.release()

    def _finish(self, run: Run) -> None:
        self.done.add(run.name)
        self.finished += run.batches

    def _say_failed(self, run: Run, returncode: int, log_begin: int) -> None:
        """Note and print why: the one line that the run has ended with, or else the end of its log and who died how."""
        log = run.folder / 'log.txt'
        lines = log.read_bytes()[log_begin:].decode(errors='replace').splitlines()
        stopped = [line for line in lines[-200:] if line.startswith(f'{run.name} stopped: ')]  # W&B prints behind it
        reason = how_it_ended(returncode, lines)
        if reason and (batch := _progress_of(run)):
            latest = newest_complete(run.folder)[0]
            saved = f'that of batch {latest} is the latest checkpoint' if latest else 'there is no checkpoint'
            reason += f' The log ends at batch {batch}; {saved}.'
        tail = stopped[-1:] or [*lines[-12:], *filter(None, [reason])]
        try:
            write_json(run.folder / 'failed.json', {'returncode': returncode, 'log': tail})
        except OSError as error:
            self._print(f'{error.filename}: {error.strerror}; the report cannot say why it failed')
        self.console.print(f'[red]{run.name}: failed[/red] ({log}):')
        self._print('\n'.join(tail))

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)


def how_it_ended(returncode: int, lines: Sequence[str]) -> str | None:
    """The signal that killed a run, or the rank that ended first, in one sentence; None if its log says the rest.

    Args:
        returncode: Of the process; of several ranks, of the launcher, which reports any one of them.
        lines: Its log, in which the launcher says what it sees first: ``Rank 1 crashed with exit code -9``.
    """
    crashed = next((found for line in lines if (found := _CRASHED.search(line))), None)
    code, who = (int(crashed[2]), f'rank {crashed[1]}') if crashed else (returncode, 'it')
    # as a process, a shell, or an exit with a negative code says it
    numbers = [-code] if code < 0 else [code - 128, 256 - code] if code > 128 else []
    known = {each.value: each.name for each in signal.Signals}
    if name := next((known[number] for number in numbers if number in known), None):
        others = ', and the others were stopped' if crashed else ''
        return f'{who} was killed by {name}{_HINTS.get(name, "")}{others}.'
    if not crashed:
        return None
    begin, end = (f'----------{edge} global rank {crashed[1]} STDERR----------' for edge in ('Begin', 'End'))
    said = lines[lines.index(begin) + 1 : lines.index(end)] if begin in lines and end in lines else []
    last = next((line for line in reversed(said) if line.strip()), '')
    return f'{who} ended first, with exit code {code}{f": {last}" if last else ""}.'


def _batches_to_go(run: Run, runs: Sequence[Run]) -> int:
    """Batches from this run to the end of the longest chain that starts with it."""
    return run.batches + max((_batches_to_go(child, runs) for child in runs if run.name in child.needs), default=0)


def _progress_of(run: Run) -> int:
    """The last batch that the log speaks of."""
    path = run.folder / 'log.txt'
    if not path.exists():
        return 0
    with open(path, 'rb') as file:
        file.seek(max(0, path.stat().st_size - 20_000))
        found = _PROGRESS.findall(file.read().decode(errors='replace'))
    return run.batches * int(found[-1][0]) // int(found[-1][1]) if found else 0
