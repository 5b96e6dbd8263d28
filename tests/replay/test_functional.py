# SPDX-License-Identifier: Apache-2.0
"""Replay arithmetic against numbers one can check by hand, and against its guarantees."""

import pickle
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt_algorithms.replay.functional import (
    MAX_SEARCHED,
    Interleaving,
    Line,
    MixedSequence,
    Piece,
    ShuffledOrder,
    StreamOrder,
    _fairest_tree,
    _leaves,
    _Rounded,
    check_budget,
    exact_fraction,
    row_shift,
    shares_of,
    worker_slots,
)


def prefix_errors(interleaving: Interleaving, num_slots: int) -> np.ndarray:
    """|count_i(N) - N w_i| for every stream i and prefix N, from the streams alone."""
    streams, _ = interleaving.locate(np.arange(num_slots))
    upto = np.arange(1, num_slots + 1)
    (piece,) = interleaving.pieces
    return np.stack([np.abs(np.cumsum(streams == i) - upto * float(w)) for i, w in enumerate(piece.begin)])


def constant(*shares: Fraction) -> Interleaving:
    return Interleaving([Piece(None, shares, shares)])


def test_one_old_stream_by_hand():
    # f = 1/4: floor(N/4 + 1/2) old samples among the first N: the 2nd, 6th, 10th, ... slot
    streams, ordinals = Interleaving(shares_of(0.25, {'old': 1})).locate(np.arange(8))
    assert streams.tolist() == [0, 1, 0, 0, 0, 1, 0, 0]
    assert ordinals.tolist() == [0, 0, 1, 2, 3, 1, 4, 5]


def test_two_old_streams_by_hand():
    # shares 2/4, 1/4, 1/4: of N slots floor(N/2 + 1/2) are old, and of m old ones floor(m/2 + 1/2) of b
    interleaving = Interleaving(shares_of(0.5, {'a': 1, 'b': 1}))
    assert interleaving.locate(np.arange(8))[0].tolist() == [2, 0, 1, 0, 2, 0, 1, 0]
    assert interleaving.counts(4) == [2, 1, 1]
    assert interleaving.counts(10**10) == [5 * 10**9, 25 * 10**8, 25 * 10**8]


@pytest.mark.parametrize('shares', [[Fraction(1, 2), Fraction(1, 4)], [Fraction(3, 2), Fraction(-1, 2)]])
def test_shares_that_are_none_are_shown(shares):
    with pytest.raises(
        ValueError, match=rf"^shares \['{shares[0]}', '{shares[1]}'\] must be non-negative and sum to 1$"
    ):
        constant(*shares)


@pytest.mark.parametrize('fraction', [0.001, 0.0123, 0.01, 0.05, 0.25, 0.5, 0.999, '1/3', 0.333333])
def test_two_streams_are_within_one_half_at_every_prefix(fraction):
    interleaving = Interleaving(shares_of(fraction, {'old': 7}))
    assert prefix_errors(interleaving, 20_000).max() <= 0.5 + 1e-9


def errors_in(tree, weights, error=0.0):
    """The largest error of each stream below a node whose own is at most this."""
    if isinstance(tree, int):
        return [error]
    of = [sum(weights[leaf] for leaf in _leaves(side)) for side in tree]
    return [
        found for side, w in zip(tree, of, strict=True) for found in errors_in(side, weights, 0.5 + error * w / sum(of))
    ]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=3, max_size=7))
def test_many_streams_are_as_near_as_their_tree_can_be(weights):
    total = sum(weights)
    interleaving = constant(*(Fraction(w, total) for w in weights))
    # where a node has m of a's slots, its error is at most 1/2, and its share of that of the node above it
    bound = max(errors_in(interleaving._tree, weights))
    assert bound < 1.5 and (bound <= 1 or len(weights) > 3)
    assert prefix_errors(interleaving, 2 * total + 3).max() <= bound + 1e-9


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 99), st.integers(1, 64), st.integers(0, 200))
def test_every_batch_has_its_share(percent, batch_size, batch):
    interleaving = Interleaving(shares_of(percent / 100, {'old': 1}))
    streams, _ = interleaving.locate(np.arange(batch * batch_size, (batch + 1) * batch_size))
    ideal = Fraction(percent, 100) * batch_size
    assert int((streams == 1).sum()) in (int(ideal), int(ideal) + 1, int(ideal) - (ideal == int(ideal)))


def test_zero_fraction_reads_only_new():
    streams, ordinals = Interleaving(shares_of(0, {'a': 1, 'b': 1})).locate(np.arange(100))
    assert not streams.any()
    assert ordinals.tolist() == list(range(100))


@pytest.mark.parametrize(
    ('fraction', 'weights', 'message'),
    [
        (
            1.0,
            {'a': 1},
            r'replay\.fraction=1\.0 is out of range; .* earlier datasets, 0 <= fraction < 1 \(0\.05 for 5 %\)$',
        ),
        (-0.1, {'a': 1}, r'replay\.fraction=-0\.1 is out of range'),
        ('much', {'a': 1}, r"replay\.fraction='much' is not a number"),
        (float('nan'), {'a': 1}, r'replay\.fraction=nan is not a number'),
        (0.1, {}, r'replay\.streams is empty'),
        (0.1, {'a': 'b'}, r"replay\.streams\.a\.weight='b' is not a number"),
        (0.1, {'a': 0}, r'replay\.streams\.a\.weight=0 must be positive'),
    ],
)
def test_bad_shares_are_named(fraction, weights, message):
    with pytest.raises(ValueError, match=message):
        shares_of(fraction, weights)


ANY_WEIGHT = st.floats(1e-3, 1e3)


@settings(max_examples=80, deadline=None)
@given(
    fraction=st.one_of(
        st.floats(1e-9, 1, exclude_max=True), st.sampled_from([1 / 3, 0.0473829, 1 - 1e-9, '1/1000003'])
    ),
    weights=st.lists(ANY_WEIGHT, min_size=1, max_size=3),
    begin=st.one_of(st.integers(0, 300), st.integers(0, 10**12)),
)
def test_any_fraction_and_weights_are_exact_at_every_prefix(fraction, weights, begin):
    if exact_fraction('fraction', fraction) >= 1:  # to 12 digits
        return
    interleaving = Interleaving(shares_of(fraction, {f'old{i}': weight for i, weight in enumerate(weights)}))
    counts, limit = interleaving.counts(begin), Fraction(1, 2) if len(weights) == 1 else 1
    streams, ordinals = interleaving.locate(np.arange(begin, begin + 60))
    for slot, (stream, ordinal) in enumerate(zip(streams.tolist(), ordinals.tolist(), strict=True), start=begin + 1):
        assert ordinal == counts[stream]
        counts[stream] += 1
        assert sum(counts) == slot
        errors = [abs(n - slot * share) for n, share in zip(counts, interleaving.pieces[0].begin, strict=True)]
        assert max(errors) <= limit and (max(errors) < 1)
    assert interleaving.counts(begin + 60) == counts
    of_new = counts[0]
    slots = interleaving.slots_in_one_pass(of_new)
    assert interleaving.counts(slots)[0] == of_new < interleaving.counts(slots + 1)[0]


@settings(max_examples=10, deadline=None)
@given(st.lists(ANY_WEIGHT, min_size=4, max_size=9), st.floats(0.01, 0.9))
def test_many_streams_of_any_weight_are_near_their_shares(weights, fraction):
    interleaving = Interleaving(shares_of(fraction, {f'old{i}': weight for i, weight in enumerate(weights)}))
    assert prefix_errors(interleaving, 3000).max() < 1.3


# What changes: numbers at slots, in straight lines and steps, and what is integrated with rational numbers alone.
KNOT = st.integers(1, 90)
SHARE = st.sampled_from(['0', '0.1', '1/3', '0.5', '0.9', '0.123456789'])
WEIGHT = st.sampled_from(['0', '1', '2.5', '1/7'])


def moving(draw, values, constant_ones) -> object:
    knots = sorted(draw(st.sets(KNOT, max_size=4)))
    if not knots:
        return draw(constant_ones)
    return [[f'{knot}sp', *draw(st.lists(values, min_size=1, max_size=2))] for knot in knots]


def exact_integral(value: object, slots: int) -> Fraction:
    """Of a number that changes, over the first slots: a trapezium for each slot, or a part of one."""
    if not isinstance(value, list):
        return Fraction(str(value)) * slots
    total, began = Fraction(0), 0
    for until, *ends in [*value, [f'{10**9}sp', value[-1][-1]]]:
        end = int(until.removesuffix('sp'))
        first, last = Fraction(ends[0]), Fraction(ends[-1])
        for slot in range(began, min(end, slots)):
            total += first + (last - first) * (Fraction(2 * (slot - began) + 1, 2) / (end - began))
        began = end
    return total


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_fraction_that_changes_is_its_integral_rounded_at_every_prefix(data):
    fraction = moving(data.draw, SHARE, SHARE)
    interleaving = Interleaving(shares_of(fraction, {'old': 1}))
    for slots in range(150):
        old = (exact_integral(fraction, slots) + Fraction(1, 2)) // 1
        assert interleaving.counts(slots) == [slots - old, old]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_changing_shares_are_near_their_integrals_and_any_slot_is_found_by_itself(data):
    fraction = moving(data.draw, SHARE, SHARE)
    weights = {name: moving(data.draw, WEIGHT, st.just('1')) for name in 'abc'[: data.draw(st.integers(2, 3))]}
    try:
        interleaving = Interleaving(shares_of(fraction, weights))
    except ValueError as error:
        assert 'all weights are 0' in str(error)
        return
    streams, ordinals = interleaving.locate(np.arange(150))
    counts, integral, began = [0] * (1 + len(weights)), [Fraction(0)] * (1 + len(weights)), 0
    for slot, (stream, ordinal) in enumerate(zip(streams.tolist(), ordinals.tolist(), strict=True)):
        piece = next(p for p in interleaving.pieces if p.until is None or slot < p.until)
        began = max((p.until for p in interleaving.pieces if p.until is not None and p.until <= slot), default=0)
        across = Fraction(2 * (slot - began) + 1, 2 * ((piece.until or began + 1) - began))
        integral = [total + a + (b - a) * across for total, a, b in zip(integral, piece.begin, piece.end, strict=True)]
        assert ordinal == counts[stream]
        counts[stream] += 1
        assert interleaving.counts(slot + 1) == counts
        assert max(abs(n - ideal) for n, ideal in zip(counts, integral, strict=True)) <= 1.5
    alone = [interleaving.locate(np.array([slot])) for slot in (0, 77, 149)]
    assert [(int(s[0]), int(o[0])) for s, o in alone] == [(streams[n], ordinals[n]) for n in (0, 77, 149)]
    assert sum(integral) == 150


def trees_of(streams):
    """Every binary tree of these streams."""
    first, *rest = streams
    if not rest:
        yield first
    for count in range(len(rest)):
        for chosen in combinations(rest, count):
            for one in trees_of([first, *chosen]):
                yield from ((one, other) for other in trees_of([each for each in rest if each not in chosen]))


def farthest(tree, shares, above=0.0):
    """The largest ``sum(w / a)`` over the nodes above a leaf, but for the root."""
    if isinstance(tree, int):
        return shares[tree] * above
    below = [0 if isinstance(side, int) else 1 / sum(shares[leaf] for leaf in _leaves(side)) for side in tree]
    return max(farthest(side, shares, above + more) for side, more in zip(tree, below, strict=True))


@pytest.mark.parametrize('seed', range(4))
def test_of_few_streams_no_tree_is_fairer(seed):
    shares = np.random.default_rng(seed).dirichlet(np.full(MAX_SEARCHED, 0.7)).tolist()
    found, tree = _fairest_tree([(share, stream) for stream, share in enumerate(shares)])
    assert found == pytest.approx(farthest(tree, shares))
    assert found == pytest.approx(min(farthest(each, shares) for each in trees_of(range(MAX_SEARCHED))))


def test_of_many_streams_the_two_smallest_are_joined_first():
    shares = [0.02, 0.3, 0.01, 0.17, 0.2, 0.1, 0.15, 0.05]
    assert len(shares) == MAX_SEARCHED + 2
    found, tree = _fairest_tree([(share, stream) for stream, share in enumerate(shares)])
    # 0.01 and 0.02, and these with 0.05
    joined = [(0.3, 1), (0.2, 4), (0.17, 3), (0.15, 6), (0.1, 5), (0.08, (7, (0, 2)))]
    best, expected = _fairest_tree(joined)
    assert (found, tree) == (pytest.approx(best), expected)


def test_counts_of_a_node_are_exact_beyond_64_bits_and_below_a_root():
    def rounded(terms, divisor, under=(0, 0), sign=0):
        made = _Rounded.__new__(_Rounded)
        made._terms, made._divisor, made._under, made._sign = terms, divisor, under, sign
        return made

    samples = np.array([5, 2**22 - 1])
    for once, linear in ((7, 3), (2**62, 2**40), (2**62 + 2**41, 2**40), (2**61, 2**41 - 1)):
        found = rounded([once, linear, 0], 3)(samples)
        assert found.dtype == np.int64 and found.tolist() == [(once + linear * int(m)) // 3 for m in samples]
    # floor(10 - sqrt(2)), floor(10 - sqrt(4)), and with a plus
    for under, sign, count in ((2, -1, 8), (4, -1, 8), (2, 1, 11), (4, 1, 12)):
        found = rounded([10, 0, 0], 1, (under, 0), sign)(samples)
        assert found.dtype == np.int64 and found.tolist() == [count] * 2


def test_lines_are_told_as_they_are_given():
    half, tenth = Fraction(1, 2), Fraction(1, 10)
    assert str(Line(None, half, half)) == '1/2'
    assert str(Line(8, half, half)) == '1/2 until 8sp' and str(Line(8, half, tenth)) == '1/2 to 1/10 until 8sp'


def test_a_line_between_weights_by_hand():
    # half of all; of a and b first all a, then in a straight line to all b: 8 slots hold 4 old ones, half of each
    pieces = shares_of(0.5, {'a': [['8sp', 1, 0]], 'b': [['8sp', 0, 1]]})
    half, none = Fraction(1, 2), Fraction(0)
    assert pieces == [Piece(8, (half, half, none), (half, none, half)), Piece(None, *[(half, none, half)] * 2)]
    assert Interleaving(pieces).counts(8) == [4, 2, 2]
    assert Interleaving(pieces).counts(16) == [8, 2, 6]


def test_floats_are_read_to_12_digits():
    assert exact_fraction('fraction', 0.1 + 0.2) == Fraction(3, 10)


def test_a_long_ramp_stays_exact():
    # the integral of 0.5 -> 0 over 10**12 slots is quadratic; half way it has 3/8 of that
    interleaving = Interleaving(shares_of([[f'{10**12}sp', 0.5, 0]], {'old': 1}))
    assert interleaving.counts(5 * 10**11)[1] == 1875 * 10**8
    assert interleaving.counts(10**12) == [75 * 10**10, 25 * 10**10]
    slots = interleaving.slots_in_one_pass(10**11)
    assert interleaving.counts(slots)[0] == 10**11 < interleaving.counts(slots + 1)[0]


@pytest.mark.parametrize(
    ('fraction', 'weights', 'message'),
    [
        ([], {}, r'replay\.fraction=\[\] is empty: give a number'),
        ([0.5], {}, r'replay\.fraction\[0\]=0\.5 must be \[until, value\]'),
        ([['9sp', 1, 2, 3]], {}, r'replay\.fraction\[0\]=.* must be \[until, value\], or \[until, from, to\]'),
        ([['9tok', 0.1]], {}, r"replay\.fraction\[0\]\[0\]='9tok' must be a time of at least 0 in sp"),
        ([['9sp', 0.1], ['9sp', 0.2]], {}, r'replay\.fraction\[1\]\[0\]=9sp must be later than the one before'),
        ([['9sp', 0, 1]], {}, r'replay\.fraction=.* is out of range'),
        (0.1, {'a': [['9sp', -1]]}, r'replay\.streams\.a\.weight=.* must be positive'),
        (0.1, {'a': [['9sp', 1, 0]]}, r'all weights are 0 at sample 9, where the fraction is 1/10'),
        ([['5sp', 0.1]], {}, r'replay\.streams is empty'),
        ([['5sp', 0, 0.1]], {}, r'replay\.streams is empty'),
        ([['5sp', 0, 0.1], ['9sp', 0.1, 0]], {}, r'replay\.streams is empty'),
        ([['5sp', 'much', 0.1]], {'a': 1}, r"^replay\.fraction\[0\]='much' is not a number"),
        ([['5sp', 0.1], ['6sp', 0, 'much']], {'a': 1}, r"^replay\.fraction\[1\]='much' is not a number"),
    ],
)
def test_what_changes_wrongly_is_named(fraction, weights, message):
    with pytest.raises(ValueError, match=message):
        shares_of(fraction, weights)


@pytest.mark.parametrize(
    ('fraction', 'weights', 'rows'),
    [
        (0, {}, 'd8072e8131f51484'), (0.05, {'a': 1}, 'ff180bf1f9bd0381'), (0.001, {'a': 7}, '4b596d44fd19eed7'),
        ([['800sp', 0.5, 0.05], ['2000sp', 0.1]], {'a': [['500sp', 1, 0]], 'b': [['1000sp', 0, 1]]}, 'f6a0e7f46ad7b45e'),
        ('1/3', {'a': 1}, '34028da656264e80'), (0.25, {'a': 1, 'b': 3}, '92c54e6a19e0ea77'),
        (0.3, {'a': 1, 'b': '2.5', 'c': 0.1}, '9065c125d5f432df'), (0.999999, {'a': 1}, '78612464e44ba8a6'),
    ],
)  # fmt: skip
def test_a_mix_serves_the_rows_that_it_always_did(fraction, weights, rows):
    orders = [StreamOrder(np.full(9, 7 + stream), 3, 40) for stream in range(len(weights) + 1)]
    mixed = MixedSequence(Interleaving(shares_of(fraction, weights)), orders, [5] + [0] * len(weights))
    slots = np.concatenate([np.arange(3000), np.arange(10**9, 10**9 + 3000)])
    assert xxhash.xxh64(mixed(slots).tobytes()).hexdigest() == rows


@pytest.mark.parametrize(
    ('fraction', 'num_new', 'slots'),
    [(0, 10, 10), (0.5, 10, 20), (0.25, 9, 12), (0.05, 95, 102)],
    # f = 0.05: slots 9, 29, 49, 69, 89 are old (0-based), so slot 100 is the 96th new one with 5 old before it
)
def test_slots_in_one_pass(fraction, num_new, slots):
    interleaving = Interleaving(shares_of(fraction, {'old': 1}))
    found = interleaving.slots_in_one_pass(num_new)
    assert interleaving.counts(found)[0] <= num_new < interleaving.counts(found + 1)[0]
    if fraction != 0.05:
        assert found in (slots, slots + 1)


@pytest.mark.parametrize(
    ('sizes', 'block'), [([100, 50, 30], 64), ([20] * 40, 100), ([7], 1000), ([1], 1), ([5] * 9, 1)]
)
def test_shuffled_order_is_a_permutation_at_random_access(sizes, block):
    order = ShuffledOrder(np.array(sizes), seed=3, pass_index=0, block_size=block)
    ids = order(np.arange(sum(sizes)))
    assert sorted(ids.tolist()) == list(range(sum(sizes)))
    for position in np.random.default_rng(0).permutation(sum(sizes))[:30]:
        fresh = ShuffledOrder(np.array(sizes), seed=3, pass_index=0, block_size=block)
        assert fresh(np.array([position]))[0] == ids[position]


def test_passes_and_seeds_differ():
    def order(seed, pass_index):
        return ShuffledOrder(np.full(10, 50), seed, pass_index)(np.arange(500)).tolist()

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_the_order_is_the_same_in_every_version():
    # a run that goes on after an update must find what it has not read yet
    order = ShuffledOrder(np.array([3, 4, 2, 4]), seed=7, pass_index=1, block_size=5)
    ids = order(np.arange(13))
    assert ids.dtype == np.int64
    assert ids.tolist() == [0, 7, 8, 1, 2, 9, 10, 11, 12, 3, 5, 4, 6]


def test_samples_stay_within_a_block_of_their_shard():
    sizes, block = np.full(200, 50), 500
    order = ShuffledOrder(sizes, 5, 0, block)
    ids = order(np.arange(10_000))
    last_seen = {}
    first_seen = {}
    for position, shard in enumerate(ids // 50):
        first_seen.setdefault(shard, position)
        last_seen[shard] = position
    assert max(last_seen[s] - first_seen[s] for s in first_seen) <= 2 * block
    # and it is a shuffle: neighbours rarely come from one shard (a shuffle within 10 shards would give 10 %)
    assert np.mean(ids[1:] // 50 == ids[:-1] // 50) < 0.2


def test_samples_move_by_half_a_block_to_both_sides():
    moved = ShuffledOrder(np.array([10_000]), 5, 0, 500)(np.arange(10_000)) - np.arange(10_000)
    assert 230 < moved.max() < 280
    assert -280 < moved.min() < -230


def test_start_does_not_depend_on_the_dataset_size():
    order = ShuffledOrder(np.full(10**10 // 8192, 8192, np.int32), 1, 0)
    assert len(set(order(np.arange(5) + 7 * 10**9).tolist())) == 5


def test_mixed_sequence_reads_new_once_and_old_in_its_own_order():
    old_alone = MixedSequence(Interleaving(shares_of(0, {})), [StreamOrder(np.full(5, 20), 9, 50)])
    orders = [StreamOrder(np.full(15, 20), 9, 50), StreamOrder(np.full(5, 20), 9, 50)]
    mixed = MixedSequence(Interleaving(shares_of(0.25, {'old': 1})), orders)
    ids = mixed(np.arange(400))
    assert sorted(ids[ids < 300].tolist()) == list(range(300))
    assert (ids[ids >= 300] - 300).tolist() == old_alone(np.arange(100)).tolist()


def test_second_pass_is_another_order_of_the_same_samples():
    sequence = MixedSequence(Interleaving(shares_of(0, {})), [StreamOrder(np.full(5, 20), 9, 50)])
    first, second = sequence(np.arange(100)), sequence(np.arange(100, 200))
    assert sorted(first) == sorted(second)
    assert first.tolist() != second.tolist()


def test_later_passes_over_a_part_shuffle_blocks_of_it():
    # 50 of 80 samples in blocks of 16 are blocks of 16, 16, 16 and 2
    sizes, blocks, places = np.array([20, 13, 20, 7, 20]), np.array([16, 16, 16, 2]), np.arange(50)
    for seed, fresh_seed, number, seed_of_blocks in ((3, None, 1, 3), (3, 8, 0, 8), (3, 0, 0, 0), (None, None, 2, 0)):
        read = np.arange(80) if seed is None else ShuffledOrder(sizes, seed, 0, 16)(np.arange(80))
        expected = read[ShuffledOrder(blocks, seed_of_blocks, number, 16)(places)]
        order = StreamOrder(sizes, seed, 16, limit=50, fresh_seed=fresh_seed)
        assert (order.size, order.total) == (50, 80)
        assert order.one_pass(number)(places).tolist() == expected.tolist()


def test_passes_over_everything_are_orders_of_their_own():
    sizes, places = np.array([20, 13, 20, 7, 20]), np.arange(80)
    first, second = (ShuffledOrder(sizes, 3, number, 16)(places).tolist() for number in (0, 1))
    for limit in (None, 500):
        assert StreamOrder(sizes, 3, 16, limit).size == 80
        assert StreamOrder(sizes, 3, 16, limit).one_pass(1)(places).tolist() == second
    assert StreamOrder(sizes, None, 16).one_pass(1)(places).tolist() == places.tolist()
    # of a part: an unshuffled run has read the first rows, a shuffled one those first in its order
    assert StreamOrder(sizes, 3, 16, 50).one_pass(0)(places[:50]).tolist() == first[:50]
    assert StreamOrder(sizes, None, 16, 50).one_pass(0)(places[:50]).tolist() == places[:50].tolist()


def test_a_sequence_goes_to_a_spawned_worker():
    sequence = MixedSequence(Interleaving(shares_of(0, {})), [StreamOrder(np.full(5, 20), 9, 50)])
    slots = np.arange(150)
    ids = sequence(slots)
    assert ids.dtype == np.int64, 'and not a float, which has no room for them all'
    assert pickle.loads(pickle.dumps(sequence))(slots).tolist() == ids.tolist()


def test_a_sequence_goes_on_behind_what_was_read():
    orders = [StreamOrder(np.full(5, 20), 9, 50)]
    whole, rest = (MixedSequence(Interleaving(shares_of(0, {})), orders, starts) for starts in (None, [30]))
    assert rest(np.arange(170)).tolist() == whole(np.arange(30, 200)).tolist()


def test_rows_are_turned_by_the_golden_ratio():
    # fractional parts of k * 0.618...: 0, 0.618, 0.236, 0.854, 0.472; and of the 32-bit integers 1/2 at 2^31
    assert row_shift(np.array([0, 1, 2, 3, 4, 2**31]), 16).tolist() == [0, 9, 3, 13, 7, 8]
    slots = worker_slots(np.arange(32), 0, 16, 0, 1, 0, 1)
    assert slots.tolist() == [*range(16), *range(25, 32), *range(16, 25)]


@pytest.mark.parametrize('num_ranks', [1, 2, 4, 8])
@pytest.mark.parametrize('num_workers', [1, 2, 3, 4])
@pytest.mark.parametrize('resume_at', [0, 1, 7])
def test_global_batches_do_not_depend_on_ranks_workers_or_resumption(num_ranks, num_workers, resume_at):
    global_batch, batches = 16, 12
    rows = global_batch // num_ranks
    seen = np.empty((batches - resume_at, global_batch), np.int64)
    for rank in range(num_ranks):
        streams = []
        for worker in range(num_workers):
            mine = len(range(worker, batches - resume_at, num_workers))
            slots = worker_slots(
                np.arange(mine * rows), resume_at * global_batch, rows, rank, num_ranks, worker, num_workers
            )
            streams.append(slots.reshape(mine, rows))
        for batch in range(batches - resume_at):  # a DataLoader takes its workers in turn
            seen[batch, rank * rows : (rank + 1) * rows] = streams[batch % num_workers][batch // num_workers]
    everything = np.arange(resume_at * global_batch, batches * global_batch).reshape(-1, global_batch)
    assert np.sort(seen, axis=1).tolist() == everything.tolist(), 'each slot once, in its batch'
    one_rank = worker_slots(np.arange(everything.size), resume_at * global_batch, global_batch, 0, 1, 0, 1)
    assert seen.ravel().tolist() == one_rank.tolist(), 'and in the same row of it'


@pytest.mark.parametrize('num_ranks', [2, 4, 8, 16])
@pytest.mark.parametrize('fraction', [0.05, 0.25, 0.5])
def test_replay_is_spread_over_ranks_and_microbatches(num_ranks, fraction):
    # 1/4 of 16 rows over 8 ranks is the hard case: evenly spaced rows fall on every other rank, batch after batch
    global_batch, batches = 16, 20_000
    interleaving = Interleaving(shares_of(fraction, {'old': 1}))
    rows = global_batch // num_ranks
    shares = []
    for rank in range(num_ranks):
        slots = worker_slots(np.arange(batches * rows), 0, rows, rank, num_ranks, 0, 1)
        old = interleaving.locate(slots)[0].reshape(batches, rows).sum(axis=1)
        assert old.max() <= np.ceil(fraction * rows) + 1, 'piled on one rank within a batch'
        shares.append(old.sum() / slots.size)
    assert np.abs(np.array(shares) - fraction).max() < 0.02 * fraction


def test_too_small_data_is_said_with_numbers():
    interleaving = Interleaving(shares_of(0.5, {'pile': 1}))
    check_budget(200, interleaving, {'new': 100, 'pile': 100}, 1, 16)
    with pytest.raises(ValueError, match=r'3,200 tokens reads 1,600 tokens .* 1,440 \(1\.11 passes'):
        check_budget(200, interleaving, {'new': 90, 'pile': 100}, 1, 16)
    with pytest.raises(ValueError, match=r"replay stream 'pile', which has 800 \(2\.00 passes; max_passes is 1\)"):
        check_budget(200, interleaving, {'new': 100, 'pile': 50}, 1, 16)
    check_budget(200, interleaving, {'new': 100, 'pile': 50}, 2, 16)
    with pytest.raises(ValueError, match=r'\(100\.00 passes; .* raise train_loader\.dataset\.max_passes$'):
        check_budget(200, interleaving, {'new': 1, 'pile': 100}, 1, 16)
    with pytest.raises(ValueError, match=r'which has 0 \(100\.00 passes'):
        check_budget(200, interleaving, {'new': 100, 'pile': 0}, 1, 16)
    with pytest.raises(ValueError, match='zip'):
        check_budget(200, interleaving, {'new': 100}, 1, 16)


def test_what_was_read_before_counts():
    interleaving, sizes = Interleaving(shares_of(0.5, {'pile': 1})), {'new': 101, 'pile': 101}
    check_budget(200, interleaving, sizes, 1, 16, {'new': 1, 'pile': 1})
    with pytest.raises(ValueError, match=r'reads 1,632 tokens of the new data \(32 of them before it begins\), which'):
        check_budget(200, interleaving, sizes, 1, 16, {'new': 2})
