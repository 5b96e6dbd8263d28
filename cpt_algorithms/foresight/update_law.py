# SPDX-License-Identifier: Apache-2.0
"""The loss of one dataset along updates: fitted to those that were trained, asked of those that were not."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from math import log

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, nnls

from cpt_algorithms.foresight.fits import HUBER, Estimate, profile
from cpt_algorithms.foresight.laws import lr_sums

__all__ = ['Trajectory', 'UpdateLaw', 'update_law']

Array = NDArray[np.float64]

# The lowest and the highest of each that is tried; E in units of the longest update's area.
ALPHA, E, BETA = (0.05, 2.0), (0.1, 1000.0), (0.1, 4.0)
FITS = 4
# Of a parent: what comes before is steeper than any power of the area.
EARLY = 0.1


@dataclass(frozen=True)
class Trajectory:
    """Losses on one dataset along one run.

    Attributes:
        lr: Learning rate of each of its batches.
        batches: How many had been trained when it was judged, ascending; 0 is the end of its parent.
        losses: As many.
        is_update: Whether it goes on from the parent of the others, or is that parent.
    """

    lr: tuple[float, ...]
    batches: tuple[int, ...]
    losses: tuple[float, ...]
    is_update: bool = True

    @cached_property
    def sums(self) -> tuple[Array, Array]:
        """Area and annealing area before the first batch and after each; a warm-up anneals nothing."""
        first, second = lr_sums(self.lr, int(np.argmax(self.lr)))
        return np.concatenate([[0.0], first]), np.concatenate([[0.0], second])

    def until(self, batch: int) -> 'Trajectory':
        """What was known of it then."""
        known = sum(each <= batch for each in self.batches)
        return replace(self, batches=self.batches[:known], losses=self.losses[:known])


@dataclass(frozen=True)
class _Shape:
    """The parameters that the loss is not linear in."""

    alpha: float
    e: float
    beta: float


@dataclass(frozen=True)
class UpdateLaw:
    """The fitted :func:`~cpt_algorithms.foresight.laws.continual_loss` of one dataset.

    Attributes:
        shape: Its alpha, E and beta.
        linear: Its L0, A, C, C' and B, of which only B may be negative.
        trajectories: What it was fitted to: updates and, if it is known, their parent.
        weights: Of the points, below 1 for outliers (Huber).
    """

    shape: _Shape
    linear: tuple[float, ...]
    trajectories: tuple[Trajectory, ...]
    weights: tuple[float, ...] = field(repr=False)

    def along(self, lr: Sequence[float], batches: Sequence[int]) -> Array:
        """Losses of an update with these learning rates after so many batches."""
        asked = Trajectory(tuple(lr), tuple(batches), (0.0,) * len(batches))
        return _columns(asked, _parent_of(self.trajectories), self.shape) @ np.array(self.linear)

    def at(self, lr: Sequence[float], batch: int) -> Estimate:
        """The loss of an update after so many batches, with its interval by profile."""
        best = float(self.along(lr, [batch])[0])
        asked = Trajectory(tuple(lr), (batch,), (0.0,))
        losses = np.concatenate([each.losses for each in self.trajectories])
        free = len(losses) - (8 if _parent_of(self.trajectories) else 5)
        if free < 1:
            return Estimate(best, float('-inf'), float('inf'))

        def cost(quantity: float) -> float:
            # L0 follows: the loss less the one that is asked for has none
            return _fit(self.trajectories, losses - quantity, self.weights, [self.shape], asked)[1]

        return Estimate(best, *profile(cost, best, free, (best - 2.0, best + 2.0)))

    def left_out(self) -> float | None:
        """The mean error of the last loss of each update, by a law that has not seen that update.

        Of a single one, of its last loss by a law that has seen the first two thirds; None if that is too little.
        """
        updates = [each for each in self.trajectories if each.is_update]
        errors = []
        for one in updates:
            others = tuple(each for each in self.trajectories if each is not one)
            if len(updates) == 1:
                others = (*others, one.until(int(2 / 3 * one.batches[-1])))
            if sum(len(each.losses) for each in others if each.is_update) < 5:
                return None
            law = update_law(others)
            errors.append(abs(float(law.along(one.lr, [one.batches[-1]])[0]) - one.losses[-1]))
        return float(np.mean(errors))

    @property
    def area(self) -> float:
        """The largest area of an update that it was fitted to."""
        return max(float(each.sums[0][each.batches[-1]]) for each in self.trajectories if each.is_update)


def _parent_of(trajectories: Sequence[Trajectory]) -> Trajectory | None:
    return next((each for each in trajectories if not each.is_update), None)


def _fit(
    trajectories: Sequence[Trajectory],
    losses: Array,
    weights: Sequence[float],
    starts: Sequence[_Shape],
    less: Trajectory | None = None,
) -> tuple[_Shape, float]:
    """The shape of the lowest cost, from the best of some, and that cost; ``less`` has the loss that is subtracted."""
    parent = _parent_of(trajectories)

    def cost(shape: _Shape) -> float:
        table = np.vstack([_columns(each, parent, shape) for each in trajectories])
        if less is not None:
            table = (table - _columns(less, parent, shape))[:, 1:]
        return _solve(table, losses, weights)[1]

    best = min(starts, key=cost)
    longest = _longest(trajectories)
    bounds = [(log(low), log(high)) for low, high in (ALPHA, (E[0] / longest, E[1] / longest), BETA)]
    found = minimize(
        lambda logs: cost(_Shape(*np.exp(logs))), np.log([best.alpha, best.e, best.beta]), method='Nelder-Mead',
        bounds=bounds, options={'xatol': 1e-3, 'fatol': 1e-10},
    )  # fmt: skip
    return _Shape(*map(float, np.exp(found.x))), float(found.fun)


def _longest(trajectories: Sequence[Trajectory]) -> float:
    return max(float(each.sums[0][-1]) for each in trajectories if each.is_update)


def _shapes(trajectories: Sequence[Trajectory]) -> list[_Shape]:
    alphas = np.geomspace(*ALPHA, 6) if _parent_of(trajectories) else [0.5]
    rates = np.geomspace(*E, 6) / _longest(trajectories)
    return [_Shape(float(a), float(e), float(beta)) for a, e, beta in product(alphas, rates, np.geomspace(*BETA, 4))]


def _columns(each: Trajectory, parent: Trajectory | None, shape: _Shape) -> Array:
    """What L0, A, C, C' and B are multiplied with; without a parent, A and C with nothing."""
    at = np.array(each.batches, dtype=int)
    own, annealed = each.sums[0][at], each.sums[1][at]
    table = np.zeros((len(at), 5))
    table[:, 0] = 1
    if parent is not None:
        first, second = (area[-1] for area in parent.sums)
        table[:, 1] = (own + (first if each.is_update else 0)) ** -shape.alpha
        table[:, 2] = -second if each.is_update else -annealed
    if each.is_update:
        table[:, 3] = -annealed
        table[:, 4] = 1 - (1 + shape.e * own) ** -shape.beta
    return table


def _solve(table: Array, losses: Array, weights: Sequence[float]) -> tuple[Array, float]:
    """The parameters of the lowest sum of squares, all but the last not negative, and that sum."""
    root = np.sqrt(np.array(weights))
    both = np.hstack([table, -table[:, -1:]])
    found, distance = nnls(both * root[:, None], losses * root)
    return np.append(found[:-2], found[-2] - found[-1]), distance**2


def update_law(trajectories: Sequence[Trajectory]) -> UpdateLaw:
    r"""Fit the loss of an update to trajectories of one dataset: updates on one mixture, and their parent.

    Linear parameters are solved for, with their signs (non-negative least squares), and the others searched from the
    best of a grid; points far off a fit count less (Huber) in the next. Without the parent's trajectory, A and C
    are part of L0.

    Args:
        trajectories: At most one of them no update. Of a parent, the first tenth is left out.

    Raises:
        ValueError: If there are fewer than five losses of updates.

    Cost: about 50 ms.
    """
    kept = []
    for each in trajectories:
        begin = 0 if each.is_update else max(1, int(EARLY * len(each.lr)))
        points = [point for point in zip(each.batches, each.losses, strict=True) if point[0] >= begin]
        if points:
            batches, losses = zip(*points, strict=True)
            kept.append(replace(each, batches=batches, losses=losses))
    if (count := sum(len(each.losses) for each in kept if each.is_update)) < 5:
        raise ValueError(f'the law of an update has five parameters, and there are {count} losses of updates')
    losses = np.concatenate([each.losses for each in kept])
    table, linear, weights = np.empty(0), np.empty(0), np.ones(len(losses))
    parent, starts, shape = _parent_of(kept), _shapes(kept), _Shape(1, 1, 1)
    for _ in range(FITS):
        if linear.size:
            weights = np.minimum(1, HUBER / np.maximum(np.abs(losses - table @ linear), 1e-12))
        shape, _ = _fit(kept, losses, tuple(weights), starts)
        table = np.vstack([_columns(each, parent, shape) for each in kept])
        linear, _ = _solve(table, losses, tuple(weights))
        starts = [shape]
    return UpdateLaw(shape, tuple(map(float, linear)), tuple(kept), tuple(map(float, weights)))
