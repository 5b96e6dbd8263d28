# SPDX-License-Identifier: Apache-2.0
"""Whether what a claim says was seen: intervals over seeds against bounds that were stated beforehand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from cpt_algorithms.report.run_records import RunRecord, read_runs
from cpt_algorithms.report.tables import OverSeeds, over_seeds

__all__ = ['Claim', 'Condition', 'Finding', 'NotRun', 'Runs', 'judge']

REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE = 'reproduced', 'not reproduced', 'inconclusive at this scale'
NOT_RUN, MEASURED = 'not run', 'measured'


class NotRun(ValueError):
    """A run that a claim needs has not been trained to its end."""


@dataclass(frozen=True)
class Condition:
    """A quantity, and where its mean over seeds must lie, between ``above`` and ``below``; without both, anywhere."""

    what: str  # in words, with its unit if it is not nats per token
    values: Sequence[float] | np.ndarray  # of each seed
    above: float = -inf
    below: float = inf

    @property
    def over_seeds(self) -> OverSeeds:
        """Mean and 95 % interval (Student's t)."""
        return over_seeds([float(value) for value in self.values])

    @property
    def verdict(self) -> str:
        """``reproduced`` if the whole interval lies within the bounds, ``not reproduced`` if none of it does."""
        if self.above == -inf and self.below == inf:
            return MEASURED
        mean = self.over_seeds
        if mean.half is None:
            return INCONCLUSIVE
        low, high = mean.mean - mean.half, mean.mean + mean.half
        if self.above < low and high < self.below:
            return REPRODUCED
        return NOT_REPRODUCED if high <= self.above or self.below <= low else INCONCLUSIVE

    @property
    def bounds(self) -> str:
        """As people read it."""
        if self.above == -inf:
            if self.below == inf:
                return ''
            return f'< {self.below:g}'
        return f'> {self.above:g}' if self.below == inf else f'{self.above:g} to {self.below:g}'


@dataclass(frozen=True)
class Claim:
    """A claim of a paper."""

    name: str  # such as C1
    says: str
    paper: str  # the paper's numbers
    test: Callable[[Any], list[Condition]]  # from the runs to the conditions, all of which must hold


@dataclass(frozen=True)
class Finding:
    """The verdict on a claim."""

    claim: Claim
    conditions: list[Condition]  # none if it was not run
    missing: str = ''  # what was not run

    @property
    def verdict(self) -> str:
        """``reproduced`` if every condition is, ``not reproduced`` if one is not, and else inconclusive."""
        if self.missing:
            return NOT_RUN
        verdicts = {condition.verdict for condition in self.conditions}
        return next((each for each in (NOT_REPRODUCED, INCONCLUSIVE, MEASURED) if each in verdicts), REPRODUCED)


def judge(claims: Sequence[Claim], evidence: Any) -> list[Finding]:
    """Test every claim; one whose runs are not there is ``not run``.

    Args:
        claims: The claims.
        evidence: What their tests take.
    """
    findings = []
    for claim in claims:
        try:
            findings.append(Finding(claim, claim.test(evidence)))
        except NotRun as missing:
            findings.append(Finding(claim, [], str(missing)))
    return findings


class Runs:
    """The runs of a sequence, asked by name without the seed; answers are arrays with a number for each seed.

    Args:
        folder: The sequence's folder, or one of runs that are of none.
        seeds: That must all be there. Default: those that are.
    """

    def __init__(self, folder: Path, seeds: list[int] | None = None) -> None:
        self.folder = folder
        self._runs: dict[str, RunRecord] = {}
        given = [folder] if (folder / 'sequence.json').exists() else [p.parent for p in folder.glob('*/stage.json')]
        if given:
            self._runs = {run.name: run for run in read_runs(sorted(given)).runs.values()}
        self.seeds = sorted({run.seed for run in self._runs.values()}) if seeds is None else seeds

    def named(self, name: str) -> list[RunRecord]:
        """A run of each seed.

        Raises:
            NotRun: If one has not finished.
        """
        names = [f'{name}-s{seed}' for seed in self.seeds]
        missing = [each for each in names if each not in self._runs or self._runs[each].state != 'finished']
        if missing or not names:
            raise NotRun(f'{", ".join(missing) or name} in {self.folder.parent.name}/{self.folder.name}')
        return [self._runs[each] for each in names]

    def final(self, name: str, dataset: str, average: str = '') -> np.ndarray:
        """Final losses, by the papers' protocol."""
        label = f'{dataset}/{average}' if average else dataset
        return np.array([run.final[label] for run in self.named(name)])

    def mean_final(self, name: str, datasets: Sequence[str]) -> np.ndarray:
        """The mean of final losses over datasets."""
        return np.mean([self.final(name, dataset) for dataset in datasets], axis=0)

    def last(self, name: str, dataset: str) -> np.ndarray:
        """The loss of the last evaluation."""
        return np.array([curve[-1, 1] for curve in self.curves(name, dataset)])

    def curves(self, name: str, dataset: str, average: str = '') -> list[np.ndarray]:
        """Of each seed: rows of (share of the run's batches, loss)."""
        label = f'{dataset}/{average}' if average else dataset
        curves = []
        for run in self.named(name):
            rows = np.array(run.losses[label])
            curves.append(np.stack([rows[:, 0] / rows[-1, 0], rows[:, 2]], axis=1))
        return curves

    def gain(self, name: str, dataset: str, average: str, begin: float, end: float) -> np.ndarray:
        """Raw loss minus an average's, its mean over the evaluations from ``begin`` to ``end`` (shares of the run)."""
        gains = []
        for raw, averaged in zip(self.curves(name, dataset), self.curves(name, dataset, average), strict=True):
            of_raw = dict(raw.tolist())
            both = [of_raw[at] - loss for at, loss in averaged.tolist() if begin <= at <= end and at in of_raw]
            gains.append(np.mean(both))
        return np.array(gains)

    def changes(self, name: str, old: str, new: str) -> tuple[np.ndarray, np.ndarray]:
        """Forgetting and adaptation of an update, against its parent as the update's own evaluators judge it."""
        runs = self.named(name)
        if any(not {old, new} <= run.at_start.keys() for run in runs):
            raise NotRun(f'the losses of the parent of {name} in {self.folder.parent.name}/{self.folder.name}')
        before = {data: np.array([run.at_start[data] for run in runs]) for data in (old, new)}
        return self.final(name, old) - before[old], before[new] - self.final(name, new)

    def rise(self, name: str, dataset: str, before: np.ndarray, until: float) -> np.ndarray:
        """The highest loss in the first part of a run, ``until`` that share of it, minus what it was before."""
        highest = [curve[curve[:, 0] <= until, 1].max() for curve in self.curves(name, dataset)]
        return np.array(highest) - before
