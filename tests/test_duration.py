# SPDX-License-Identifier: Apache-2.0
"""Times: what is one, and how many batches it has."""

import pytest
from composer.core import Time
from hypothesis import given
from hypothesis import strategies as st

from cpt_algorithms.duration import UNITS, Duration


@pytest.mark.parametrize(
    ('time', 'batches'),
    [
        ('3ba', 3), ('12sp', 3), ('13sp', 4), ('96tok', 3), ('97tok', 4), ('65tok', 3), ('1tok', 1), ('0tok', 0),
        ('2ep', None), ('0.5dur', None),
    ],
)  # fmt: skip
def test_batches_of_4_samples_of_8_tokens(time, batches):
    """Those that begin before the time is over."""
    assert Duration.parse('key', time).batches(4, 8) == batches


@pytest.mark.parametrize(('share', 'of_100'), [('0.01dur', 1), ('0.011dur', 2), ('0dur', 1), ('1dur', 100)])
def test_shares_of_a_run(share, of_100):
    assert Duration.parse('key', share).of(100) == of_100


@given(st.integers(0, 10**15), st.sampled_from([unit for unit in UNITS if unit != 'dur']))
def test_what_is_read_is_what_composer_reads(value, unit):
    text = f'{value}{unit}'
    assert str(Duration.parse('key', text)) == Time.from_timestring(text).to_timestring() == text


@pytest.mark.parametrize(
    'value', [None, 5, True, '', 'ba', '5', '-1ba', 'nanba', '1.5ba', 'infdur', '1e400dur', '5sec', '1 000ba', [], {}]
)
def test_what_is_no_time_is_refused_by_key_and_value(value):
    with pytest.raises(ValueError) as refused:
        Duration.parse('some.key', value)
    assert 'some.key=' in str(refused.value) and repr(value) in str(refused.value)


def test_only_the_units_that_are_possible():
    assert Duration.parse('window', '5ba', ('ba',)) == Duration(5, 'ba')
    with pytest.raises(ValueError, match=r"window='5tok'.* ba"):
        Duration.parse('window', '5tok', ('ba',))
