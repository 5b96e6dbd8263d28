# SPDX-License-Identifier: Apache-2.0
"""Before a sequence trains anything: what preflight sees in its runs, and what would change a finished one."""

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from cpt_algorithms.sequence.branches import checkpoint_after
from cpt_algorithms.sequence.expand import Run, descendants
from cpt_algorithms.sequence.read import with_caches
from cpt_algorithms.stage.preflight import PreflightError, preflight
from cpt_algorithms.validation import differences

__all__ = ['check']


def check(runs: Sequence[Run], ranks: int, is_plan: bool = False) -> list[str]:
    """Refuse, before anything is trained, what preflight can see and what would change a finished run.

    Args:
        runs: The runs of a sequence.
        ranks: That each is on.
        is_plan: Whether they may be trained elsewhere than here. Default: ``False``.

    Returns:
        Of a plan: what cannot be reached from here.

    Raises:
        PreflightError: With all problems found.
    """
    unseen: list[str] = []
    found: dict[str, list[str]] = {}
    for run in runs:
        try:
            # parents do not exist yet: each run's own preflight looks at them; a merge is as right as its trunk
            if not run.stage.merge:
                preflight(run.stage, ranks, parent_is_there=False)
        except PreflightError as error:
            unseen += error.unseen
            for each in error.problems:
                if not (is_plan and each in error.unseen):
                    found.setdefault(each, []).append(run.name)
    problems = [problem for run in runs if (problem := _changed(run, runs))]
    for each, names in found.items():
        others = f' and {len(names) - 1} more of {len(runs)} runs' if len(names) > 1 else ''
        problems.append(f'{names[0]}{others}: {each}')
    if problems:
        raise PreflightError(problems)
    return list(dict.fromkeys(unseen))


def _changed(run: Run, runs: Sequence[Run]) -> str | None:
    """What differs between a run and what it was when it was begun; None if nothing, or it was not."""
    saved = run.folder / 'run.yaml'
    if not (saved.exists() and (run.folder / 'stage.json').exists()):  # written, perhaps, and not begun
        return None
    then: Any = OmegaConf.to_container(OmegaConf.load(saved))
    before, now = _of_training(then), _of_training(run.stage.to_train_yaml())
    added = _branch_points(now) - _branch_points(before)
    if all((run.folder / checkpoint_after(run.stage, batch)).exists() for batch in added):
        for config in (before, now):  # a new branch begins where a checkpoint was kept
            config['callbacks'].pop('branch_points', None)
    if not (changed := differences(before, now)):
        return None
    begun = [name for name in descendants(runs, run.name) if (run.folder.parent / name / 'stage.json').exists()]
    return (
        f'{run.name} was trained with other settings ({"; ".join(changed[:4])}). Put them back, use another folder, or '
        f'delete {run.folder}'
        + (f' and what starts from it and would become invalid: {", ".join(begun)}' if begun else '')
    )


def _branch_points(config: Mapping[str, Any]) -> set[int]:
    return set((config['callbacks'].get('branch_points') or {}).get('at', ()))


def _of_training(given: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run's YAML says how it is trained, and not on what that is evaluated, or where logged and cached."""
    kept = {key: value for key, value in given.items() if key not in ('loggers', 'variables', 'eval_loader')}
    kept['merge'] = (given.get('variables') or {}).get('merge')
    return with_caches(kept, lambda stream: '')
