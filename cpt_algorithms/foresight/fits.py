# SPDX-License-Identifier: Apache-2.0
"""Fits of the laws: robust, from fixed starts, with the interval of what is asked of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, log, sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import least_squares, root_scalar
from scipy.stats import f as f_distribution
from scipy.stats import t as student

from cpt_algorithms.foresight.laws import annealing_loss, mixing_loss, share_at

__all__ = [
    'Estimate', 'MixingLaw', 'annealing_law', 'half_width', 'least_robust', 'mixing_law', 'over_seeds', 'profile',
]  # fmt: skip

Array = NDArray[np.float64]
# Residuals above this many nats per token count by their size, not its square (Huber).
HUBER = 0.01
STEEPEST = 200.0


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, whose ends are infinite where nothing bounds it."""

    value: float
    low: float
    high: float


def least_robust(
    residuals: Callable[[Array], Array],
    starts: Sequence[Sequence[float]],
    bounds: tuple[Sequence[float], Sequence[float]],
    huber: float,
) -> Array:
    """Parameters of the lowest robust cost from all starts.

    Args:
        residuals: Of the parameters, in nats per token.
        starts: Parameters to begin from; those that leave the bounds are clipped.
        bounds: The lowest and the highest of each.
        huber: From where on a residual counts by its size.
    """
    low, high = (np.asarray(end, dtype=float) for end in bounds)
    options = {'bounds': (low, high), 'loss': 'huber', 'f_scale': huber, 'x_scale': 'jac'}
    found = [least_squares(residuals, np.clip(start, low, high), **options) for start in starts]
    return min(found, key=lambda each: each.cost).x


def half_width(values: Sequence[float]) -> float:
    r"""Of the 95 % interval of a mean over seeds, two or more: :math:`t_{n-1} s / \sqrt n` (Student's t)."""
    return float(student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / sqrt(len(values)))


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean over two seeds or more."""
    mean, half = float(np.mean(values)), half_width(values)
    return Estimate(mean, mean - half, mean + half)


def profile(cost: Callable[[float], float], best: float, free: int, within: tuple[float, float]) -> tuple[float, float]:
    r"""The interval of a quantity by its profile: where the cost of the best fit with it fixed stays low.

    .. math:: \mathrm{cost}(q) \le \mathrm{cost}(\hat q) \, (1 + F_{0.95}(1, n - p) / (n - p))

    Args:
        cost: Sum of squares of the best fit in which the quantity is fixed.
        best: :math:`\hat q`.
        free: :math:`n - p`, points less parameters, 1 or more.
        within: Where it is looked for.

    Returns:
        Its ends; infinite where the cost stays low up to the end of ``within``.
    """
    limit = max(cost(best), 1e-12) * (1 + float(f_distribution.ppf(0.95, 1, free)) / free)

    def above(quantity: float) -> float:
        return cost(quantity) - limit

    low, high = within
    left = root_scalar(above, bracket=(low, best)).root if above(low) > 0 else -inf
    right = root_scalar(above, bracket=(best, high)).root if above(high) > 0 else inf
    return float(left), float(right)


@dataclass(frozen=True)
class MixingLaw:
    """A fitted :func:`~cpt_algorithms.foresight.laws.mixing_loss` of one dataset."""

    c: float
    k: float
    b: float
    shares: tuple[float, ...]
    losses: tuple[float, ...]

    def loss(self, share: ArrayLike) -> Array:
        """At these shares."""
        return mixing_loss(share, self.c, self.k, self.b)

    def share_at(self, loss: float) -> Estimate:
        """Where it is this loss, with the interval by profile; an interval needs four points or more."""
        share = share_at(loss, self.c, self.k, self.b)
        free = len(self.shares) - 3
        if free < 1:
            return Estimate(share, -inf, inf)
        shares, losses = np.array(self.shares), np.array(self.losses)
        slopes = _slopes(self.k)

        def cost(fixed: float) -> float:
            # c follows: L(r) = loss + a (e^(k r) - e^(k fixed)), in which only a is linear
            shapes = np.exp(np.outer(slopes, shares)) - np.exp(slopes * fixed)[:, None]
            heights = np.maximum(shapes @ (losses - loss) / (shapes**2).sum(axis=1), 0)
            return float(((losses - loss - heights[:, None] * shapes) ** 2).sum(axis=1).min())

        return Estimate(share, *profile(cost, share, free, (-1.0, 2.0)))

    def left_out(self) -> float | None:
        """The mean error when each point is predicted by a law that was fitted without it; None with three points."""
        if len(self.shares) < 4:
            return None
        errors = []
        for out in range(len(self.shares)):
            others = [index for index in range(len(self.shares)) if index != out]
            law = mixing_law([self.shares[i] for i in others], [self.losses[i] for i in others])
            errors.append(abs(float(law.loss(self.shares[out])) - self.losses[out]))
        return float(np.mean(errors))


def _slopes(k: float) -> Array:
    return np.copysign(np.geomspace(1e-2, STEEPEST, 2000), k)


def mixing_law(shares: Sequence[float], losses: Sequence[float]) -> MixingLaw:
    """Fit the mixing law to pilots that differ in the share of old data alone.

    Args:
        shares: Replay fractions, three or more different ones.
        losses: On one dataset, old or new.

    Raises:
        ValueError: If there are fewer.
    """
    if len(set(shares)) < 3:
        raise ValueError(f'the mixing law has three parameters, and there are {len(set(shares))} shares of old data')
    r, y = np.asarray(shares, dtype=float), np.asarray(losses, dtype=float)
    sign = -1.0 if np.polyfit(r, y, 1)[0] < 0 else 1.0

    def residuals(parameters: Array) -> Array:
        c, k, b = parameters
        return mixing_loss(r, c, k, b) - y

    # with k fixed, c and e^b are linear: the best of all k is where the robust fit begins
    slopes = _slopes(sign)
    shapes = np.exp(np.outer(slopes, r))
    aside = shapes - shapes.mean(axis=1, keepdims=True)
    heights = np.maximum(aside @ y / (aside**2).sum(axis=1), 1e-9)
    ends = y.mean() - heights * shapes.mean(axis=1)
    best = (((ends[:, None] + heights[:, None] * shapes - y) ** 2).sum(axis=1)).argmin()
    starts = [(float(ends[best]), float(slopes[best]), log(heights[best]))]
    low, high = ((-STEEPEST, -1e-2), (1e-2, STEEPEST))[sign > 0]
    c, k, b = least_robust(residuals, starts, ((-np.inf, low, -25.0), (float(y.min()), high, 25.0)), HUBER)
    return MixingLaw(float(c), float(k), float(b), tuple(map(float, shares)), tuple(map(float, losses)))


def annealing_law(s1: ArrayLike, s2: ArrayLike, losses: ArrayLike, huber: float = 1e-3) -> Mapping[str, float]:
    """Parameters of :func:`~cpt_algorithms.foresight.laws.annealing_loss`, of one or more curves together.

    Args:
        s1: Of each point.
        s2: Of each point.
        losses: Of each point.
        huber: See :func:`least_robust`.
    """
    first, second, y = (np.asarray(each, dtype=float) for each in (s1, s2, losses))

    def residuals(parameters: Array) -> Array:
        l0, log_a, alpha, c = parameters
        return annealing_loss(first, second, l0, np.exp(log_a), alpha, c) - y

    starts = [(y.min() - 0.3, log(0.5), alpha, c) for alpha in (0.3, 0.5, 0.8) for c in (0.1, 1.0)]
    bounds = ((0.0, -10.0, 0.01, -100.0), (float(y.min()), 10.0, 3.0, 1e4))
    l0, log_a, alpha, c = least_robust(residuals, starts, bounds, huber)
    return {'l0': float(l0), 'a': float(np.exp(log_a)), 'alpha': float(alpha), 'c': float(c)}
