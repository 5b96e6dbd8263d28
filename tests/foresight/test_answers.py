# SPDX-License-Identifier: Apache-2.0
"""The smallest replay fraction, of pilots by hand."""

from math import exp, isinf

import pytest

from cpt_algorithms.foresight.answers import Pilots, smallest_share

SHARES = (0.0, 0.05, 0.1, 0.25, 0.5)


def forgets(share, more=0.0):
    """0 at a quarter, if not more."""
    return exp(-8 * share) - exp(-2) + more


def pilots(seed=1, shares=SHARES, more=0.0, learned=None):
    learned = learned or [1 + 0.1 * exp(3 * share) for share in shares]
    return Pilots(seed, tuple(shares), tuple(forgets(share, more) for share in shares), {'new': tuple(learned)})


def test_the_answer_of_one_seed():
    answer = smallest_share([pilots()])
    assert answer.share.value == pytest.approx(0.25, abs=1e-4)
    assert answer.on_new['new'].value == pytest.approx(1 + 0.1 * exp(0.75), abs=1e-3)
    assert isinf(answer.on_new['new'].high)
    assert answer.error == pytest.approx(0, abs=1e-4)
    assert [line.partition(':')[0] for line in answer.warnings] == ['one seed']
    less = smallest_share([pilots()], allowed=0.2)
    assert forgets(less.share.value) == pytest.approx(0.2, abs=1e-4)


def test_the_answer_of_seeds_has_their_interval():
    answer = smallest_share([pilots(seed, more=0.02 * (seed - 2)) for seed in (1, 2, 3)])
    values = [law.share_at(0).value for law in answer.laws]
    assert answer.share.value == pytest.approx(sum(values) / 3)
    assert answer.share.low < min(values) and max(values) < answer.share.high
    assert answer.warnings == ()


def test_three_shares_answer_with_a_warning():
    answer = smallest_share([pilots(shares=(0.0, 0.1, 0.5))])
    assert answer.error is None and answer.warnings[0].startswith('only 3 shares')
    assert isinf(answer.share.low) and isinf(answer.share.high)


@pytest.mark.parametrize(
    ('allowed', 'of', 'says'),
    [
        (-0.2, {}, r'seed 1: no pilot forgets as little as -0\.200: the one with 50 % of old data forgets -0\.117;'),
        (1.0, {}, r'seed 1: every pilot forgets less than 1\.000, without old data, too'),
        (0.8, {'shares': SHARES[1:]}, r'less than 0\.800, even with 5 % of old data; train one with less'),
        (0.2, {'shares': (0.0, 0.5)}, 'three parameters, and there are 2 shares'),
    ],
)
def test_what_no_pilot_shows_is_refused(allowed, of, says):
    with pytest.raises(ValueError, match=says):
        smallest_share([pilots(**of)], allowed)


def test_pilots_that_forget_more_with_more_old_data_are_refused():
    upward = Pilots(0, SHARES, tuple(-forgets(share) for share in SHARES), {})
    with pytest.raises(ValueError, match='seed 0: pilots with more old data forgot more'):
        smallest_share([upward])
