# SPDX-License-Identifier: Apache-2.0
"""What is asked of pilot runs before the big one: how much replay it needs, how it will end, what is cheapest."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from math import inf, isfinite
from statistics import fmean

import numpy as np

from cpt_algorithms.foresight.fits import Estimate, MixingLaw, mixing_law, over_seeds
from cpt_algorithms.foresight.update_law import Trajectory, UpdateLaw, update_law

__all__ = [
    'Answer', 'Cheapest', 'Ending', 'Pilots', 'Update', 'cheapest', 'ending_of', 'smallest_share',
]  # fmt: skip

# Learning rates of the batches of an update of so many tokens.
Rates = Callable[[int], Sequence[float]]
ONE_SEED = 'one seed: the interval says how well the law fits its points, not how much seeds differ'


@dataclass(frozen=True)
class Pilots:
    """Updates of one parent that differ in the share of old data alone, and what they forgot of one dataset.

    Attributes:
        seed: Of all of them.
        shares: Replay fractions, ascending.
        forgetting: Final loss on the old dataset less the untouched parent's, nats per token.
        on_new: Final losses on each new dataset, by name.
    """

    seed: int
    shares: tuple[float, ...]
    forgetting: tuple[float, ...]
    on_new: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Answer:
    """The smallest share, and what to think of it.

    Attributes:
        share: With its 95 % interval: over seeds (Student's t), or with one by the profile of its fit.
        on_new: Loss on each new dataset at that share; the interval is over seeds, infinite with one.
        laws: The fitted forgetting, for each seed.
        error: Mean error, in nats per token, of the forgetting of a pilot that is left out of the fit; None with three
            shares.
        warnings: What makes it doubtful.
    """

    share: Estimate
    on_new: dict[str, Estimate]
    laws: tuple[MixingLaw, ...]
    error: float | None
    warnings: tuple[str, ...]


def smallest_share(pilots: Sequence[Pilots], allowed: float = 0.0) -> Answer:
    r"""The smallest replay fraction with which an old dataset is forgotten by no more than is allowed.

    The mixing law :math:`F(r) = c + e^{k r + b}` is fitted to the forgetting of each seed's pilots and solved for
    :math:`F(r) = ` ``allowed`` (Ye et al. 2024, section 3). It holds for the pilots' model, length and schedule.

    Args:
        pilots: Those of each seed.
        allowed: Nats per token; 0 asks for the critical share.

    Raises:
        ValueError: If there are fewer than three shares, if they do not lie on both sides of the answer, or if the law
            says that more old data is forgotten more.
    """
    for each in pilots:
        who = f'seed {each.seed}: '
        low, high = min(each.forgetting), max(each.forgetting)
        if low > allowed:
            most = _percent(each.shares[each.forgetting.index(low)])
            raise ValueError(
                f'{who}no pilot forgets as little as {allowed:.3f}: the one with {most} of old data forgets {low:.3f}; '
                'train one with more'
            )
        if high < allowed:
            least = each.shares[0]
            advice = (
                f'even with {_percent(least)} of old data; train one with less' if least else 'without old data, too'
            )
            raise ValueError(f'{who}every pilot forgets less than {allowed:.3f}, {advice}')
    laws = tuple(mixing_law(each.shares, each.forgetting) for each in pilots)
    if wrong := [each.seed for each, law in zip(pilots, laws, strict=True) if law.k >= 0]:
        raise ValueError(f'seed {wrong[0]}: pilots with more old data forgot more, so that no share is the smallest')
    found = [law.share_at(allowed) for law in laws]
    share = found[0] if len(found) == 1 else over_seeds([each.value for each in found])
    on_new = {}
    for name in pilots[0].on_new:
        losses = [
            float(mixing_law(each.shares, each.on_new[name]).loss(one.value))
            for each, one in zip(pilots, found, strict=True)
        ]
        on_new[name] = over_seeds(losses) if len(losses) > 1 else Estimate(losses[0], float('-inf'), float('inf'))
    errors = [error for law in laws if (error := law.left_out()) is not None]
    error = fmean(errors) if errors else None
    return Answer(share, on_new, laws, error, tuple(_warnings(pilots, share, error)))


def _percent(share: float) -> str:
    return f'{100 * share:g} %'


def _warnings(pilots: Sequence[Pilots], share: Estimate, error: float | None) -> list[str]:
    said = []
    shares = sorted({each for one in pilots for each in one.shares})
    if error is None:
        said.append(f'only {len(shares)} shares, as many as the law has parameters: nothing tells how well it fits')
    if len(pilots) == 1:
        said.append(ONE_SEED)
    if isfinite(share.low) and isfinite(share.high) and not (shares[0] <= share.low and share.high <= shares[-1]):
        said.append(f'the interval leaves the pilots, {_percent(shares[0])} to {_percent(shares[-1])} of old data')
    return said


@dataclass(frozen=True)
class Update:
    """Updates of one parent, on one mixture and with one seed, that differ in schedule and length alone.

    Attributes:
        name: Of the longest.
        seed: Of all.
        share: Of old data.
        tokens: Of the longest.
        at_start: Losses of the untouched parent, by dataset.
        old: Datasets that the parent has learned.
        new: Those of the update.
        trajectories: By dataset, with that of the parent where it is known.
    """

    name: str
    seed: int
    share: float
    tokens: int
    at_start: Mapping[str, float]
    old: tuple[str, ...]
    new: tuple[str, ...]
    trajectories: Mapping[str, tuple[Trajectory, ...]]

    @cached_property
    def laws(self) -> dict[str, UpdateLaw]:
        """Of each dataset."""
        return {name: update_law(known) for name, known in self.trajectories.items()}


@dataclass(frozen=True)
class Ending:
    """The loss of a dataset at the end of an update.

    Attributes:
        loss: With its 95 % interval: over seeds (Student's t), or with one by the profile of its fit.
        change: Of the loss, since the parent: what is forgotten of old data, or less than 0.
        error: Mean error, in nats per token, of the last loss of an update that is left out of the fit, or of the last
            third of a single one; None if there is too little.
    """

    loss: Estimate
    change: Estimate
    error: float | None


def ending_of(updates: Sequence[Update], rates: Sequence[float]) -> tuple[dict[str, Ending], list[str]]:
    """How an update ends, by the law of the loss along it.

    Args:
        updates: One for each seed.
        rates: Learning rate of each of its batches.

    Returns:
        By dataset, old data first; and what makes it doubtful.

    Raises:
        ValueError: If there are too few losses.
    """
    found = {}
    for name in (*updates[0].old, *updates[0].new):
        laws, started = [each.laws[name] for each in updates], [each.at_start[name] for each in updates]
        if len(updates) > 1:
            changes = _ends(updates, name, rates)
            loss = over_seeds([change + start for change, start in zip(changes, started, strict=True)])
            change = over_seeds(changes)
        else:
            loss = laws[0].at(rates, len(rates))
            change = Estimate(*(end - started[0] for end in (loss.value, loss.low, loss.high)))
        errors = [error for law in laws if (error := law.left_out()) is not None]
        found[name] = Ending(loss, change, fmean(errors) if errors else None)
    said = [] if len(updates) > 1 else [ONE_SEED]
    area, most = sum(rates), max(law.area for each in updates for law in each.laws.values())
    if area > 1.001 * most:
        said.append(
            f'no pilot has gone as far: the area of its learning rates, {area:.3g} over {len(rates):,} batches, is '
            f'{area / most:.2f} times the largest'
        )
    return found, said


@dataclass(frozen=True)
class Cheapest:
    """The shortest update that keeps to two bounds.

    Attributes:
        tokens: Of it, new and old; the interval is from the length at which it would keep to them if all laws erred
            against it, to the one at which it does if they err in its favour, infinite if none does.
        share: Of old data.
        forgetting: Of the old dataset that is forgotten most, foretold.
        adaptation: Of the new dataset that is learned least, foretold.
        curve: At this length, for shares from the lowest to the highest: share, forgetting, adaptation.
        warnings: What makes it doubtful.
    """

    tokens: Estimate
    share: float
    forgetting: float
    adaptation: float
    curve: tuple[tuple[float, float, float], ...]
    warnings: tuple[str, ...]


def cheapest(updates: Sequence[Sequence[Update]], rates: Rates, forgetting: float, adaptation: float) -> Cheapest:
    """The shortest update with at most so much forgetting, and at least so much adaptation, of each dataset.

    At every length the law of the loss foretells the end of each share's updates, and the mixing law is drawn through
    these. Lengths go from a twentieth of the pilots' to theirs.

    Args:
        updates: For each share, three or more, one update for each seed.
        rates: Of an update of so many tokens.
        forgetting: Nats per token.
        adaptation: Nats per token.

    Raises:
        ValueError: If no length and share keeps to both; with what comes nearest.
    """
    most = min(each.tokens for of in updates for each in of)
    lengths = [*(int(each) for each in np.geomspace(most / 20, most, 24)[:-1]), most]
    shares = np.linspace(min(of[0].share for of in updates), max(of[0].share for of in updates), 201)
    curves = {}
    for length in lengths:
        with suppress(ValueError):  # phases of a length of their own may not fit
            curves[length] = _changes(updates, shares, rates(length))
    if most not in curves:
        _changes(updates, shares, rates(most))
    off = max(_half_width(of, name, rates(most)) for of in updates for name in of[0].trajectories)

    def shortest(favour: float) -> tuple[int, int] | None:
        for length, (forgot, learned) in curves.items():
            able = np.flatnonzero((forgot - favour <= forgetting) & (learned + favour >= adaptation))
            if able.size:
                return length, int(able[0])
        return None

    if (found := shortest(0)) is None:
        forgot, learned = curves[most]
        able = np.flatnonzero(forgot <= forgetting)
        nearest = (
            f'with forgetting of {forgetting:g}, adaptation is {learned[able].max():.3f} at most'
            if able.size
            else f'forgetting is {forgot.min():.3f} at least; train one with more old data'
        )
        raise ValueError(f'no pilot shows both within {most:,} tokens: at that length, {nearest}')
    (length, index), lucky, unlucky = found, shortest(off), shortest(-off)
    tokens = Estimate(length, lucky[0] if lucky and isfinite(off) else 0, unlucky[0] if unlucky else inf)
    said = [] if len(updates[0]) > 1 else [ONE_SEED]
    if length == min(curves):
        said.append(f'it may be shorter: nothing below {length:,} tokens was tried')
    curve = [(float(share), float(f), float(a)) for share, f, a in zip(shares, *curves[length], strict=True)]
    return Cheapest(tokens, *curve[index], tuple(curve), tuple(said))


def _ends(of: Sequence[Update], name: str, rates: Sequence[float]) -> list[float]:
    """Change of the loss on a dataset at the end of an update, for each seed."""
    return [float(each.laws[name].along(rates, [len(rates)])[0]) - each.at_start[name] for each in of]


def _changes(
    updates: Sequence[Sequence[Update]], shares: np.ndarray, rates: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Forgetting of the old dataset that is forgotten most, and adaptation of the new one that is learned least."""
    trained = [of[0].share for of in updates]
    found = {
        name: mixing_law(trained, [fmean(_ends(of, name, rates)) for of in updates]).loss(shares)
        for name in updates[0][0].trajectories
    }
    old, new = updates[0][0].old, updates[0][0].new
    return np.max([found[name] for name in old], axis=0), np.min([-found[name] for name in new], axis=0)


def _half_width(of: Sequence[Update], name: str, rates: Sequence[float]) -> float:
    """Of the interval of a change; infinite if it has none."""
    found = over_seeds(_ends(of, name, rates)) if len(of) > 1 else of[0].laws[name].at(rates, len(rates))
    return (found.high - found.low) / 2
