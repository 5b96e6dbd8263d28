# SPDX-License-Identifier: Apache-2.0
"""The laws by hand, on public curves, and on curves whose parameters are known.

``loss_curves/<millions of parameters>/`` are those of the multi-power law's authors (their licence is beside them): a warm-up of
2160 steps to 3e-4, and losses on held-out text.
"""

import csv
from math import exp, inf, log

import numpy as np
import pytest
from tiny import ROOT

from cpt_algorithms.foresight.fits import annealing_law, mixing_law, over_seeds
from cpt_algorithms.foresight.laws import (
    annealing_loss,
    continual_loss,
    lr_sums,
    mixing_loss,
    multi_power_loss,
    share_at,
)

CURVES = ROOT / 'tests' / 'foresight' / 'loss_curves'
WARMUP, PEAK = 2160, 3e-4
FITTED = ('cosine_24000', 'constant_24000', 'wsdcon_9')
# Luo et al. 2025, as published
MULTI_POWER = {
    25: (3.0405, 0.5247, 0.5079, 363.8, 2.066, 0.5828, 0.6414),
    100: (2.6514, 0.6012, 0.4530, 437.9, 2.132, 0.5979, 0.6552),
    400: (2.3747, 0.6542, 0.4288, 523.4, 2.025, 0.5935, 0.6347),
}


def curve(size, name):
    """Learning rates of all steps; indices of those that were judged; their losses."""
    with (CURVES / str(size) / f'{name}.csv').open() as file:
        rows = [[float(row[key]) for key in ('step', 'lr', 'loss')] for row in csv.DictReader(file)]
    at, lr, loss = np.array(rows).T
    steps = np.arange(1, int(at[-1]) + 1)
    rates = np.where(steps <= WARMUP, PEAK * steps / WARMUP, np.interp(steps, at, lr))
    return rates, at.astype(int) - 1, loss


def r_squared(predicted, loss):
    return 1 - ((loss - predicted) ** 2).sum() / ((loss - loss.mean()) ** 2).sum()


@pytest.mark.parametrize('size', [25, 100, 400])
def test_the_annealing_law_foretells_other_schedules(size):
    fitted = []
    for name in FITTED:
        rates, at, loss = curve(size, name)
        fitted.append([*(area[at] for area in lr_sums(rates, WARMUP)), loss])
    law = annealing_law(*map(np.concatenate, zip(*fitted, strict=True)))
    others = {path.stem for path in (CURVES / str(size)).glob('*.csv')} - set(FITTED)
    assert len(others) == 6
    for name in others:
        rates, at, loss = curve(size, name)
        predicted = annealing_loss(*(area[at] for area in lr_sums(rates, WARMUP)), **law)
        assert r_squared(predicted, loss) >= 0.99
        assert predicted[-1] == pytest.approx(loss[-1], abs=0.03)
    if size == 400:
        assert law == pytest.approx({'l0': 2.523, 'a': 0.655, 'alpha': 0.419, 'c': 0.572}, rel=5e-3)


@pytest.mark.parametrize(('size', 'published'), MULTI_POWER.items())
def test_the_multi_power_law_as_published(size, published):
    parameters = dict(zip(('l0', 'a', 'alpha', 'b', 'c', 'beta', 'gamma'), published, strict=True))
    for name in ('constant_24000', 'wsdcon_3', 'cosine_24000'):
        rates, at, loss = curve(size, name)
        predicted = multi_power_loss(rates, **parameters)[at]
        assert r_squared(predicted, loss) >= 0.99
        assert predicted[-1] == pytest.approx(loss[-1], abs=0.03)


def test_the_areas_of_a_schedule_by_hand():
    area, annealing = lr_sums([1, 2, 2, 1, 1], warmup=2, decay=0.5)
    assert area.tolist() == [1, 3, 5, 6, 7]
    # falls 0, 0 (warm-up), 0, 1, 0; momentum 0, 0, 0, 1, 0.5
    assert annealing.tolist() == [0, 0, 0, 1, 1.5]


def test_an_update_is_both_phases_and_a_shift():
    law = {'l0': 2.0, 'a': 1.0, 'alpha': 0.5, 'c': 0.1}
    update = {'c_update': 0.2, 'shift': 0.6, 'e': 1.0, 'beta': 1.0}
    # 2 + (1 + 3)^-1/2 - 0.1 * 2 - 0.2 * 0.5 + 0.6 (1 - 1 / 4)
    assert continual_loss(1.0, 2.0, 3.0, 0.5, **law, **update) == pytest.approx(2 + 0.5 - 0.2 - 0.1 + 0.45)
    before = continual_loss(1.0, 2.0, 0.0, 0.0, **law, **update)
    assert before == pytest.approx(float(annealing_loss(1.0, 2.0, **law))), 'it begins where the parent ended'


# Pythia-70M continued on code, at step 10,000 of the update (Ye et al. 2024, notebook): losses on the Pile.
SHARES, ON_OLD, ON_NEW = (
    (0.125, 0.25, 0.375, 0.5),
    (2.9262, 2.8805, 2.8571, 2.8388),
    (1.3679, 1.3863, 1.4084, 1.4309),
)
PARENT = 2.8734


def test_the_critical_share_of_a_public_update():
    """Its authors print 0.2862, and a run at 0.28516 measured 2.8721, 0.0013 below the parent: the truth is about 0.28."""
    law = mixing_law(SHARES, ON_OLD)
    share = law.share_at(PARENT)
    assert share.value == pytest.approx(0.283, abs=0.005)
    assert share.low < 0.2862 < share.high
    assert float(law.loss(0.28516)) == pytest.approx(2.8721, abs=0.002), 'which it was not fitted to'
    assert law.left_out() < 0.01
    new = mixing_law(SHARES, ON_NEW)
    assert new.k > 0 > law.k
    assert float(new.loss(0.3)) == pytest.approx(1.395, abs=0.002)


def test_the_mixing_law_by_hand():
    assert mixing_loss(0.5, 2.0, -4.0, log(3)) == pytest.approx(2 + 3 * exp(-2))
    assert share_at(2 + 3 * exp(-2), 2.0, -4.0, log(3)) == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r'no share of old data brings the loss to 1\.9000: the law ends at 2\.0000'):
        share_at(1.9, 2.0, -4.0, log(3))


@pytest.mark.parametrize(('k', 'b'), [(-6.0, -0.5), (-40.0, 0.3), (2.0, -3.0)])
def test_known_parameters_are_found_again(k, b):
    shares = [0, 0.01, 0.05, 0.1, 0.25, 0.5]
    law = mixing_law(shares, mixing_loss(shares, 3.0, k, b).tolist())
    assert (law.c, law.k, law.b) == pytest.approx((3.0, k, b), rel=1e-3)
    assert law.left_out() == pytest.approx(0, abs=1e-3)


def test_known_parameters_of_an_annealing_law_are_found_again():
    true = {'l0': 2.5, 'a': 0.6, 'alpha': 0.45, 'c': 0.5}
    rates = PEAK * np.where(np.arange(1, 6001) < 4000, 1, 0.1)
    areas = lr_sums(rates, 0)
    noise = np.random.default_rng(0).normal(0, 1e-3, 6000)
    found = annealing_law(*areas, annealing_loss(*areas, **true) + noise)
    assert found == pytest.approx(true, rel=0.02)


@pytest.mark.parametrize('noise', [0.002, 0.01])
def test_intervals_hold_the_truth_as_often_as_they_say(noise):
    generator, shares = np.random.default_rng(17), np.array([0, 0.05, 0.1, 0.25, 0.5])
    true = {'c': 2.0, 'k': -8.0, 'b': -0.5}
    target = float(mixing_loss(0.15, **true))
    held = 0
    for _ in range(200):
        found = mixing_law(shares, mixing_loss(shares, **true) + generator.normal(0, noise, 5)).share_at(target)
        held += found.low <= 0.15 <= found.high
    assert 180 <= held <= 196


def test_too_few_shares_are_refused_and_three_have_no_interval():
    with pytest.raises(ValueError, match='has three parameters, and there are 2 shares'):
        mixing_law([0, 0.25, 0.25], [3.0, 2.5, 2.5])
    law = mixing_law([0, 0.05, 0.25], [5.068, 4.508, 4.039])
    assert (law.share_at(4.3).low, law.share_at(4.3).high) == (-inf, inf)
    assert law.left_out() is None


def test_over_seeds():
    found = over_seeds([0.1, 0.2, 0.3])
    assert found.value == pytest.approx(0.2)
    assert found.high - found.value == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-5)
