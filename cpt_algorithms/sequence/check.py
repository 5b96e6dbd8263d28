# SPDX-License-Identifier: Apache-2.0
"""Before a sequence trains anything: what preflight sees in its runs, and what would change a finished one."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cpt_algorithms.checkpoints.save_folder import batch_of, newest_complete
from cpt_algorithms.sequence.expand import Run, descendants
from cpt_algorithms.stage.identity import changes, results_of
from cpt_algorithms.stage.preflight import PreflightError, preflight
from cpt_algorithms.stage.record import StageRecord, done_with, read_record
from cpt_algorithms.stage.restart_checks import restart_problem

__all__ = ['adopted', 'check', 'records_in']


# Runs by name: the record of each, and what its results follow from.
Records = Mapping[str, tuple[StageRecord, Mapping[str, Any]]]


def check(runs: Sequence[Run], ranks: int, is_plan: bool = False) -> list[str]:
    """Refuse, before anything is trained, what preflight can see and what would change a finished run.

    Those of a plan may be trained elsewhere than here.

    Returns:
        Of a plan: what cannot be reached from here.

    Raises:
        PreflightError: With all problems found.
    """
    unseen: list[str] = []
    found: dict[str, list[str]] = {}
    begun = {run.name: restart_problem(run.stage) for run in runs}
    for run in runs:
        try:
            # parents do not exist yet: each run's own preflight looks at them; a merge is as right as its trunk
            if not run.stage.merge:
                preflight(run.stage, ranks, parent_is_there=False)
        except PreflightError as error:
            unseen += error.unseen
            for each in error.problems:
                if each != begun[run.name] and not (is_plan and each in error.unseen):
                    found.setdefault(each, []).append(run.name)
    problems = [problem for run in runs if (problem := _cannot_go_on(run, runs, begun[run.name]))]
    for each, names in found.items():
        others = f' and {len(names) - 1} more of {len(runs)} runs' if len(names) > 1 else ''
        problems.append(f'{names[0]}{others}: {each}')
    if problems:
        raise PreflightError(problems)
    return list(dict.fromkeys(unseen))


def _cannot_go_on(run: Run, runs: Sequence[Run], problem: str | None) -> str | None:
    """What was begun as another run, or from what would be trained again, or cannot begin as a checkpoint is gone."""
    if problem:
        problem = f'{run.name}: {problem}'
    folders = {each.folder: each for each in runs}
    for place in () if problem else _checkpoints_of(run):
        owner = folders.get(Path(place).parent)
        if owner is None:
            continue
        newest = newest_complete(owner.folder)[0]
        is_to_come = done_with(owner.stage) is None and (batch_of(place) or math.inf) > newest
        # checkpoints of a finished run may have been removed
        has_begun = newest_complete(run.folder)[0] or (run.folder / 'done.json').exists()
        if has_begun and is_to_come:
            would_be = 'would be trained on' if newest else 'is gone and would be trained again'
            problem = (
                f'{run.name} was started from {owner.name}, which {would_be}, to another end: put {owner.folder} back '
                'as it was, or train both in another folder'
            )
            break
        if not (has_begun or is_to_come or Path(place).exists()):
            return (
                f'{run.name} starts from {place}, which is gone, and {owner.name} has trained past it: put the '
                f'checkpoint back, or train both in another folder'
            )
    begun = [name for name in descendants(runs, run.name) if (run.folder.parent / name / 'stage.json').exists()]
    return problem and problem + (f'. From it started: {", ".join(begun)}' if begun else '')


def _checkpoints_of(run: Run) -> list[str]:
    """The checkpoints that a run begins with."""
    try:
        mix = run.stage.mix
    except ValueError:  # which preflight says
        mix = None
    places = [run.stage.load_path, *(each.only_seen_by for each in (mix.old if mix else {}).values())]
    return [place for place in (*places, *run.stage.merged[:-1]) if place]


def adopted(
    expand: Callable[[Mapping[str, str]], list[Run]], look: Callable[[Path], Records] | None = None
) -> list[Run]:
    """The runs of a sequence, those that are there already under the name they have there.

    A run that several arms share is called after the first of them, and arms are sorted, removed and renamed; a trial
    is called after its parameters, one of which may be new and as it was.

    Args:
        expand: The runs, some of them under other names than they would be given.
        look: The runs in a folder. Default: :func:`records_in`.
    """
    names: dict[str, str] = {}
    while True:
        runs = expand(names)
        unknown = [run for run in runs if not (run.folder / 'stage.json').exists()]
        taken, folders = {run.name for run in runs}, {run.folder.parent for run in unknown}
        there = {name: each for folder in folders for name, each in (look or records_in)(folder).items()}
        found = None
        for run in unknown:
            results = results_of(run.stage)
            same = (name for name, (_, each) in there.items() if each == results and name not in taken)
            if found := next((name for name in same if not changes(there[name][0], run.stage)), None):
                names = {old: found if new == run.name else new for old, new in names.items()} | {run.name: found}
                break
        if found is None:
            return runs


def records_in(folder: Path) -> Records:
    """The runs in a sequence's folder, by name; what cannot be read is left out."""
    found = {}
    for path in folder.glob('*/stage.json'):
        with suppress(ValueError):
            if (record := read_record(path.parent)) is not None:
                found[path.parent.name] = record, results_of(record.config)
    return found
