# SPDX-License-Identifier: Apache-2.0
"""What is asked of pilot runs before the big one: the smallest replay fraction that forgets no more than allowed."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import fmean

from cpt_algorithms.foresight.fits import Estimate, MixingLaw, mixing_law, over_seeds

__all__ = ['Answer', 'Pilots', 'smallest_share']


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
        said.append('one seed: the interval says how well the law fits its points, not how much seeds differ')
    if isfinite(share.low) and isfinite(share.high) and not (shares[0] <= share.low and share.high <= shares[-1]):
        said.append(f'the interval leaves the pilots, {_percent(shares[0])} to {_percent(shares[-1])} of old data')
    return said
