# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of averaging against numbers worked out by hand, and against its own definition in float64."""

from math import inf, isnan, sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpt_algorithms.weight_averaging.functional import (
    ema_weight,
    square_sum,
    update_ema_,
    weighted_mean,
    window_weights,
)


def test_the_first_weights_are_taken_as_they_are():
    assert ema_weight(step=1, total=1, half_life=100) == 1
    assert ema_weight(step=4096, total=4096, half_life=7) == 1


def test_weights_one_half_life_apart():
    # halves: after two updates 1/(1 + 1/2), after three 1/(1 + 1/2 + 1/4), in the long run 1/2
    assert ema_weight(1, 2, 1) == pytest.approx(2 / 3, rel=1e-15)
    assert ema_weight(1, 3, 1) == pytest.approx(4 / 7, rel=1e-15)
    assert ema_weight(1, 10_000, 1) == pytest.approx(1 / 2, rel=1e-15)
    # and far below a half-life, the plain mean
    assert ema_weight(1, 4, 1e12) == pytest.approx(1 / 4, rel=1e-9)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.floats(0.5, 200), st.integers(0, 2**32 - 1))
def test_updates_add_up_to_the_definition(steps, half_life, seed):
    # a_n = sum_i (1 - 2^(-step_i/h)) 2^(-(time since i)/h) p_i / (1 - 2^(-total/h)), steps of any length
    values = torch.randn(len(steps), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    average = values[0].clone()
    now = steps[0]
    for step, value in zip(steps[1:], values[1:], strict=True):
        now += step
        update_ema_([average], [value], ema_weight(step, now, half_life))
    since, weights = 0, []
    for step in reversed(steps):
        weights.insert(0, (1 - 2 ** (-step / half_life)) * 2 ** (-since / half_life))
        since += step
    expected = (torch.tensor(weights, dtype=torch.float64)[:, None] * values).sum(0) / (1 - 2 ** (-now / half_life))
    assert torch.allclose(average, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_the_average_stays_float32_whatever_the_parameters_are(dtype):
    average = [torch.zeros(3), torch.ones(2)]
    parameters = [torch.full((3,), 2.0, dtype=dtype), torch.tensor([1.0, 3.0], dtype=dtype)]
    update_ema_(average, parameters, 2**-12)
    assert average[0].dtype == torch.float32
    # 2^-11 would be lost beside 1 in bfloat16
    assert average[0].tolist() == [2**-11] * 3
    assert average[1].tolist() == [1.0, 1 + 2**-11]


def test_window_weights_by_hand():
    assert window_weights('uniform', 4) == [0.25] * 4
    assert window_weights('linear', 4) == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert window_weights('ema', 3, decay=0.5) == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    assert window_weights('one_minus_sqrt', 4) == pytest.approx(
        [1 / 2, (sqrt(2) - 1) / 2, (sqrt(3) - sqrt(2)) / 2, (2 - sqrt(3)) / 2]
    )
    assert window_weights([0.5, 0.75, -0.25], 3) == [0.5, 0.75, -0.25]
    assert window_weights('ema', 3, decay=1.0) == pytest.approx([1 / 3] * 3)
    assert window_weights('ema', 2) == pytest.approx([9 / 19, 10 / 19])
    for kind in ('uniform', 'linear', 'ema', 'one_minus_sqrt'):
        assert window_weights(kind, 1) == [1.0]
        assert sum(window_weights(kind, 7)) == pytest.approx(1)


@pytest.mark.parametrize(('kind', 'decay'), [('uniform', lambda t: 1 - t), ('one_minus_sqrt', lambda t: 1 - sqrt(t))])
def test_merging_weighs_the_updates_as_the_decay_would(kind, decay):
    # WSM: the update between checkpoints i-1 and i counts sum_{j >= i} c_j
    weights = window_weights(kind, 10)
    assert [sum(weights[i:]) for i in range(1, 10)] == pytest.approx([decay(i / 10) for i in range(1, 10)])


@pytest.mark.parametrize(
    ('kind', 'count', 'decay', 'words'),
    [
        ('unifrom', 3, 0.9, "weights='unifrom' is unknown; one of uniform, linear, ema, one_minus_sqrt"),
        ('uniform', 0, 0.9, 'nothing to average'),
        ('ema', 3, 0.0, 'decay=0.0 must be above 0'),
        ('ema', 3, 1.5, 'decay=1.5 must be above 0 and at most 1'),
        ([0.5, 0.5], 3, 0.9, '2 weights for 3 checkpoints'),
        ([0.5, 0.6], 2, 0.9, 'their sum is 1.1'),
        ([float('nan'), 1.0], 2, 0.9, 'finite'),
    ],
)
def test_bad_weights_are_refused(kind, count, decay, words):
    with pytest.raises(ValueError, match='.*'.join(words.split('='))):
        window_weights(kind, count, decay)


def test_weighted_mean_accumulates_in_float32():
    tensors = [torch.tensor([1.0, 256.0], dtype=torch.bfloat16), torch.tensor([3.0, 1.0], dtype=torch.bfloat16)]
    mean = weighted_mean(tensors, [0.5, 0.5], torch.device('cpu'))
    assert mean.dtype == torch.float32
    assert mean.tolist() == [2.0, 128.5]  # 128.5 is no bfloat16
    assert tensors[0].tolist() == [1.0, 256.0], 'inputs are left alone'


def test_weighted_mean_leaves_float32_alone_too():
    tensors = [torch.tensor([4.0]), torch.tensor([8.0])]
    assert weighted_mean(tensors, [0.25, 0.75], torch.device('cpu')).tolist() == [7.0]
    assert [tensor.tolist() for tensor in tensors] == [[4.0], [8.0]]
    assert weighted_mean(tensors, [0.25, 0.75], torch.device('meta')).device.type == 'meta'
    with pytest.raises(ValueError, match='zip'):
        weighted_mean(tensors, [1.0], torch.device('cpu'))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_the_sum_of_squares_is_that_of_float64(dtype):
    assert square_sum(torch.tensor([[1, -2], [3, 0.5]], dtype=dtype).T) == 14.25
    assert square_sum(torch.empty(0, 3, dtype=dtype)) == 0
    # more than one piece; float32 would lose the small ones
    large = torch.full((2**16 + 3,), 2.0**-12, dtype=dtype)
    large[0] = 64
    assert square_sum(large) == 4096 + (2**16 + 2) * 2.0**-24


def test_the_sum_of_squares_is_no_number_if_a_value_is_none():
    assert isnan(square_sum(torch.tensor([1, float('nan')])))
    assert square_sum(torch.tensor([1, float('inf')])) == inf
