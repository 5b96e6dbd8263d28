# SPDX-License-Identifier: Apache-2.0
"""Finished updates of a sequence, as pilots of a bigger run."""

import json
from collections import defaultdict

from cpt_algorithms.foresight.answers import Pilots
from cpt_algorithms.report.run_records import RunRecord, RunSet
from cpt_algorithms.stage.identity import results_of

__all__ = ['pilots_of']


def pilots_of(study: RunSet) -> dict[str, list[Pilots]]:
    """The pilots of each old dataset, a group for each seed: updates that differ in the share of old data alone.

    Of several such groups (another schedule, another stage) the one with the most shares counts, then the first.

    Raises:
        ValueError: If no finished update replays old data and knows what it forgot.
    """
    groups: dict[str, list[RunRecord]] = defaultdict(list)
    for run in study.given:
        known = run.final.keys() >= {*run.old, *run.new} and run.at_start.keys() >= {*run.old}
        if run.kind == 'update' and run.state == 'finished' and run.is_whole and run.config and known and run.old:
            groups[_all_but_the_share(run)].append(run)
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


def _all_but_the_share(run: RunRecord) -> str:
    """What decides its results, less the share of old data and the seed."""
    assert run.config is not None
    kept = results_of(run.config)
    kept.pop('seed', None)
    for key in ('replay', 'shuffle_seed'):
        kept['train_loader']['dataset'].pop(key, None)
    return json.dumps([run.stage, run.peers, kept], sort_keys=True, default=str)
