# SPDX-License-Identifier: Apache-2.0
"""The law of an update, on curves whose parameters are known, and what is asked of it."""

from dataclasses import replace
from math import exp, inf

import numpy as np
import pytest

from cpt_algorithms.foresight.answers import Update, cheapest, ending_of
from cpt_algorithms.foresight.laws import annealing_loss, continual_loss, lr_sums
from cpt_algorithms.foresight.update_law import Trajectory, update_law

PEAK = 1e-2
LAW = {'l0': 2.5, 'a': 1.0, 'alpha': 0.5, 'c': 0.06, 'c_update': 0.05, 'shift': 0.6, 'e': 1.0, 'beta': 0.5}


def cosine(batches, alpha_f=0.1):
    """After a warm-up of a hundredth."""
    at, warm = np.arange(batches), max(1, batches // 100)
    fall = alpha_f + (1 - alpha_f) * 0.5 * (1 + np.cos(np.pi * (at - warm) / (batches - warm)))
    return tuple(PEAK * np.where(at < warm, (at + 1) / warm, fall))


def linear(batches, decay=0.2):
    """Constant, then to nothing."""
    return tuple(PEAK * np.minimum(1, (batches - np.arange(batches)) / (decay * batches)))


PARENT = cosine(1500)


def sums(lr, at):
    return (np.append(0, area)[list(at)] for area in lr_sums(lr, int(np.argmax(lr))))


def loss(lr, at, is_update=True, **law):
    law = LAW | law
    first, second = sums(lr, at)
    if not is_update:
        return annealing_loss(first, second, *(law[key] for key in ('l0', 'a', 'alpha', 'c')))
    ended = (area[-1] for area in lr_sums(PARENT, int(np.argmax(PARENT))))
    return continual_loss(*ended, first, second, **law)


def trajectory(lr, is_update=True, rng=None, noise=0.0, points=12, **law):
    step = len(lr) // points
    at = tuple(range(0 if is_update else step, len(lr) + 1, step))
    off = rng.normal(0, noise, len(at)) if rng else 0
    return Trajectory(tuple(lr), at, tuple(map(float, loss(lr, at, is_update, **law) + off)), is_update)


def trajectories(**how):
    return [trajectory(PARENT, False, **how), trajectory(cosine(1200), **how), trajectory(cosine(600), **how)]


@pytest.mark.parametrize('lr', [linear(1200), cosine(900, 0.0), (PEAK,) * 1000])
def test_another_schedule_is_foretold(lr):
    law = update_law(trajectories())
    assert law.along(lr, [len(lr)])[0] == pytest.approx(loss(lr, [len(lr)])[0], abs=2e-3)
    assert law.left_out() < 5e-3


def test_without_the_parent_its_end_is_a_constant():
    known = trajectories()[1:]
    lr = linear(1200)
    assert update_law(known).along(lr, [1200])[0] == pytest.approx(loss(lr, [1200])[0], abs=0.02)


def test_an_outlier_counts_little():
    first, second, third = trajectories()
    off = replace(second, losses=(*second.losses[:6], second.losses[6] + 0.5, *second.losses[7:]))
    lr = linear(1200)
    assert update_law([first, off, third]).along(lr, [1200])[0] == pytest.approx(loss(lr, [1200])[0], abs=0.02)


def test_its_error_where_it_has_not_looked():
    first, second, third = trajectories()
    strange = replace(third, losses=tuple(each + 0.2 for each in third.losses))
    assert update_law([first, second, strange]).left_out() > 0.1
    assert update_law([first, second]).left_out() < 0.02, 'by its first two thirds'
    assert update_law([first, second.until(500)]).left_out() is None


def test_too_few_losses_are_refused():
    first, second, _ = trajectories()
    with pytest.raises(ValueError, match='five parameters, and there are 3 losses of updates'):
        update_law([first, second.until(200)])


@pytest.mark.long
def test_intervals_hold_what_they_promise():
    rng, lr = np.random.default_rng(1), linear(1200)
    truth, inside = float(loss(lr, [1200])[0]), 0
    for _ in range(200):
        found = update_law(trajectories(rng=rng, noise=0.003)).at(lr, 1200)
        inside += found.low <= truth <= found.high
    assert 180 <= inside <= 196


# What is asked of it


def update(seed=1, share=0.0, **how):
    """More old data, less forgetting, and less learned of the new."""
    old = {'shift': 0.6 * exp(-6 * share), **how}
    new = {'shift': -1.5 * exp(-0.5 * share), **how}
    found = {
        name: (trajectory(PARENT, False, **law), trajectory(cosine(1200), **law))
        for name, law in (('old', old), ('new', new))
    }
    start = {name: each[1].losses[0] for name, each in found.items()}
    return Update(f'replay {share:g}', seed, share, 1200 * 100, start, ('old',), ('new',), found)


def test_an_ending_says_what_is_forgotten_and_learned():
    lr = linear(1200)
    found, said = ending_of([update()], lr)
    assert list(found) == ['old', 'new']
    assert found['old'].loss.value == pytest.approx(loss(lr, [1200])[0], abs=0.02)
    assert found['old'].change.value == pytest.approx(found['old'].loss.value - loss(lr, [0])[0], abs=0.02)
    assert found['new'].change.value < 0 < found['old'].change.value
    assert found['old'].loss.low < found['old'].loss.value < found['old'].loss.high
    assert [line.partition(':')[0] for line in said] == ['one seed', 'no pilot has gone as far']
    assert [line.partition(':')[0] for line in ending_of([update()], cosine(600))[1]] == ['one seed']


def test_seeds_have_their_interval():
    updates = [update(seed, l0=2.5 + 0.01 * seed) for seed in (1, 2, 3)]
    found, said = ending_of(updates, cosine(1200))
    assert (found['old'].loss.low < found['old'].loss.value - 0.01) and not said
    assert found['old'].change.high - found['old'].change.low < 0.02, 'of which all are the same'


SHARES = (0.0, 0.1, 0.25, 0.5)


def rates(tokens):
    return cosine(tokens // 100)


def ends(length, share):
    """Forgetting and adaptation."""
    changes = [
        loss(rates(length), [length // 100], shift=shift)[0] - loss(rates(length), [0])[0]
        for shift in (0.6 * exp(-6 * share), -1.5 * exp(-0.5 * share))
    ]
    return changes[0], -changes[1]


def test_the_cheapest_update_within_two_bounds():
    updates = [[update(share=share)] for share in SHARES]
    forgetting, adaptation = ends(60_000, 0.2)
    found = cheapest(updates, rates, forgetting, adaptation)
    assert found.tokens.value == pytest.approx(60_000, rel=0.15)
    assert found.tokens.low <= found.tokens.value <= found.tokens.high
    assert found.forgetting <= forgetting and found.adaptation >= adaptation
    assert found.share == pytest.approx(0.2, abs=0.04)
    assert len(found.curve) == 201 and found.curve[0][0] == 0 and found.curve[-1][0] == 0.5
    with pytest.raises(
        ValueError, match=r'within 120,000 tokens: .* with forgetting of 0\.1, adaptation is .* at most'
    ):
        cheapest(updates, rates, 0.1, 3.0)
    with pytest.raises(ValueError, match=r'forgetting is .* at least; train one with more old data'):
        cheapest(updates, rates, -1.0, 0.1)
    assert 'it may be shorter' in ' '.join(cheapest(updates, rates, 2.0, 0.01).warnings)
    rng = np.random.default_rng(2)
    noisy = [[update(share=share, rng=rng, noise=0.01)] for share in SHARES]
    assert cheapest(noisy, rates, ends(120_000, 0.2)[0] + 0.01, ends(120_000, 0.2)[1] - 0.01).tokens.high == inf
