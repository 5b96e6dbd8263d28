# SPDX-License-Identifier: Apache-2.0
"""Updates of a sequence, as pilots of a bigger run."""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np

from cpt_algorithms.duration import per_batch_of
from cpt_algorithms.foresight.answers import Pilots, Update
from cpt_algorithms.foresight.fits import Estimate
from cpt_algorithms.foresight.update_law import Trajectory, update_law
from cpt_algorithms.report.run_records import RunRecord, RunSet
from cpt_algorithms.schedulers.phases import phases_of
from cpt_algorithms.stage.identity import results_of
from cpt_algorithms.stage.stage import Stage

# In which pilots of an ending may differ.
SCHEDULE = ('scheduler', 'max_duration')

__all__ = ['UpdatePilots', 'forecast_of', 'pilots_of', 'rates_of', 'update_pilots_of']


def pilots_of(study: RunSet) -> dict[str, list[Pilots]]:
    """The pilots of each old dataset, a group for each seed: updates that differ in the share of old data alone.

    Of several such groups (another schedule, another stage) the one with the most shares counts, then the first.

    Raises:
        ValueError: If no finished update replays old data and knows what it forgot.
    """
    groups: dict[str, list[RunRecord]] = defaultdict(list)
    for run in study.given:
        known = run.final.keys() >= {*run.old, *run.new} and run.at_start.keys() >= {*run.old}
        if _is_pilot(run) and run.is_whole and known and run.old:
            groups[_all_but(study, run, 'replay')].append(run)
    if not groups:
        raise ValueError('no finished update of a parent knows what it forgot: pilots need callbacks.forgetting')
    runs = max(groups.values(), key=lambda of: len({_share(run) for run in of}))
    found: dict[str, list[Pilots]] = defaultdict(list)
    for seed in sorted({run.seed for run in runs}):
        of_seed = sorted((run for run in runs if run.seed == seed), key=_share)
        for old in of_seed[0].old:
            found[old].append(
                Pilots(
                    seed,
                    tuple(map(_share, of_seed)),
                    tuple(run.final[old] - run.at_start[old] for run in of_seed),
                    {new: tuple(run.final[new] for run in of_seed) for new in of_seed[0].new},
                )
            )
    return dict(found)


def _share(run: RunRecord) -> float:
    return run.replayed / run.spent


def _is_pilot(run: RunRecord) -> bool:
    """Whether it is a finished update whose losses are those of a model that has learned."""
    is_sound = not run.has_diverged and all(isfinite(row[2]) for rows in run.losses.values() for row in rows)
    if run.config is None or (run.config.mix and run.config.mix.moves):
        return False  # of whose share there is no law
    return run.kind == 'update' and run.state == 'finished' and run.merge is None and is_sound


def _all_but(study: RunSet, run: RunRecord, *others: str) -> str:
    """What decides its results, less the seed and other keys, of the YAML or of its dataset; of its ancestors all."""
    said = []
    for each in study.chain(run):
        if each.config is None:
            said.append(each.name)
            continue
        kept = results_of(each.config)
        left_out = others if each is run or run.tokens_before_branch and each.stage == run.stage else ()
        for key in ('seed', *left_out):
            kept.pop(key, None)
        for key in ('shuffle_seed', *left_out):
            kept['train_loader']['dataset'].pop(key, None)
        said.append([each.stage, each.peers, kept, _without_seed(each)])
    return json.dumps(said, sort_keys=True, default=str)


def _without_seed(run: RunRecord) -> str:
    """What a run began from that is no run here."""
    return '' if run.parent or not run.began_from else re.sub(rf'-s{run.seed}\b', '', run.began_from)


@dataclass(frozen=True)
class UpdatePilots:
    """Updates on one mixture that differ in schedule and length alone: one :class:`Update` for each seed.

    Attributes:
        updates: By seed.
        stage: Of the longest, whose schedule, learning rate and batches a new one has, if nothing else is said.
        alike: What is the same of pilots that differ in the share, too.
    """

    updates: list[Update]
    stage: Stage
    alike: str


def update_pilots_of(study: RunSet) -> list[UpdatePilots]:
    """The updates of a parent, by mixture, the lowest share of old data first.

    Raises:
        ValueError: If no finished update has been evaluated on its way.
    """
    groups: dict[str, dict[int, list[RunRecord]]] = defaultdict(lambda: defaultdict(list))
    for run in study.given:
        is_trained = _is_pilot(run) and run.is_whole and not run.tokens_before_branch
        if is_trained and run.old and run.learning_rate and run.at_start.keys() >= {*run.old, *run.new}:
            groups[_all_but(study, run, *SCHEDULE)][run.seed].append(run)
    if not groups:
        raise ValueError('no finished update of a parent was evaluated on its way: pilots need callbacks.final_loss')
    found = []
    for seeds in groups.values():
        every = [run for runs in seeds.values() for run in runs]
        longest = max(every, key=lambda run: run.spent)
        assert longest.config is not None, 'it has begun'
        updates = [_update(study, seed, runs) for seed, runs in sorted(seeds.items())]
        found.append(UpdatePilots(updates, longest.config, _all_but(study, longest, 'replay', *SCHEDULE)))
    return sorted(found, key=lambda pilots: pilots.updates[0].share)


def _update(study: RunSet, seed: int, runs: Sequence[RunRecord]) -> Update:
    longest = max(runs, key=lambda run: run.spent)
    parent = study.runs[longest.parent] if longest.parent else None
    names = (*longest.old, *longest.new)
    # what began from a parent of its own has an area that is not known
    known = [parent] if parent and parent.kind != 'update' and parent.learning_rate else []
    found = {name: tuple(_trajectory(run, name) for run in (*known, *runs) if name in run.losses) for name in names}
    at_start = {name: longest.at_start[name] for name in names}
    return Update(
        longest.arm, seed, _share(longest), longest.spent, at_start, tuple(longest.old), tuple(longest.new), found
    )


def _trajectory(run: RunRecord, name: str) -> Trajectory:
    """The losses of a run on a dataset, and its learning rates, as far as it has come."""
    at, _, rates = zip(*run.learning_rate, strict=True)
    points = [(int(batch), loss) for batch, _, loss in run.losses[name]]
    batches, losses = zip(*dict(points).items(), strict=True)
    lr = np.interp(np.arange(max(int(at[-1]) + 1, batches[-1])), at, rates)
    return Trajectory(tuple(map(float, lr)), batches, losses, run.kind == 'update')


def forecast_of(study: RunSet, run: RunRecord, name: str) -> list[tuple[int, Estimate]]:
    """The rest of the curve of an update that is under way: tokens and the loss there, from now to the end.

    Fitted to its own losses so far, its parent's, and those of finished updates that differ in schedule alone; nothing
    if these are too few, or its schedule is none of this library.
    """
    if run.kind != 'update' or run.tokens_before_branch or run.state == 'finished' or run.config is None:
        return []
    try:
        alike = _all_but(study, run, *SCHEDULE)
        others = [
            other
            for other in study.given
            if other is not run and other.seed == run.seed and _is_pilot(other) and not other.tokens_before_branch
            and _all_but(study, other, *SCHEDULE) == alike
        ]  # fmt: skip
        law = update_law(_update(study, run.seed, [run, *others]).trajectories[name])
        rates = rates_of(run.config)
        batches = [int(each) for each in np.linspace(min(run.batch, len(rates)), len(rates), 3)]
        per_batch = run.config.global_train_batch_size * run.config.max_seq_len
        return [(batch * per_batch, law.at(rates, batch)) for batch in batches]
    except (ValueError, KeyError, RuntimeError):  # the last of scipy, which has found no fit
        return []


def rates_of(stage: Stage, tokens: int | None = None, scheduler: dict[str, Any] | None = None) -> list[float]:
    """The learning rates of the batches of a stage, or of one with other tokens or another schedule.

    Raises:
        ValueError: If the schedule is none of this library, or does not fit.
    """
    per_batch = stage.global_train_batch_size * stage.max_seq_len
    batches = (stage.batches or 0) if tokens is None else tokens // per_batch
    given = scheduler or dict(stage.scheduler.given)
    units = [str(time)[-2:] for time in given.values() if str(time)[:1].isdigit()]  # the end is in those of its times
    ends = {'ba': batches, 'sp': batches * stage.global_train_batch_size, 'tok': batches * per_batch}
    unit = next((each for each in ('ba', 'sp') if each in units), 'tok')
    duration = stage.max_duration if tokens is None else f'{ends[unit]}{unit}'
    phases = phases_of(given, duration)
    if phases is None or stage.optimizer.lr is None or not batches:
        raise ValueError(
            f'scheduler.name={given.get("name")}, {duration}: what is foretold is one batch or more of a schedule of '
            'this library, such as rewarm_cosine, infinite or wsd'
        )
    step = per_batch_of(phases.unit, stage.global_train_batch_size, stage.max_seq_len) or 1
    return [stage.optimizer.lr * phases.multiplier_at(batch * step) for batch in range(batches)]
