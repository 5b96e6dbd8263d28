# SPDX-License-Identifier: Apache-2.0
"""Which sample stands at each slot of an endless mixed sequence: its stream, and which sample of that stream.

Global batch k of size B is slots kB .. kB + B - 1. All is random access: no epoch is ever laid out.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import product
from math import ceil, isqrt, lcm
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpt_algorithms.duration import Duration
from cpt_algorithms.validation import short_repr

__all__ = [
    'Interleaving',
    'Line',
    'MixedSequence',
    'Piece',
    'ShuffledOrder',
    'StreamOrder',
    'check_budget',
    'exact_fraction',
    'lines_of',
    'row_shift',
    'shares_of',
    'worker_slots',
]

Ints = NDArray[np.int64]

# So many streams are tried in all trees (945 of six); of more, the smallest are joined first.
MAX_SEARCHED = 6
# Samples in one shuffle block; Streaming's own smallest default.
DEFAULT_BLOCK_SIZE = 1 << 18


def exact_fraction(name: str, value: float | int | str) -> Fraction:
    """The number as it was written in decimal: ``0.05`` is exactly 1/20. Floats are read to 12 digits.

    Raises:
        ValueError: If it is not a finite number, with the name of its key.
    """
    try:
        return Fraction(f'{value:.12g}' if isinstance(value, float) else str(value))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f'{name}={value!r} is not a number; give one such as 0.05') from None


@dataclass(frozen=True)
class Piece:
    """Shares of all streams between two slots: straight lines, which at every slot sum to 1.

    Args:
        until: The slot at which it ends; of the last piece, which has no end, None.
        begin: Shares at its first slot.
        end: Shares at ``until``; of the last piece the same as ``begin``.
    """

    until: int | None
    begin: tuple[Fraction, ...]
    end: tuple[Fraction, ...]


@dataclass(frozen=True)
class Line:
    """A number that goes in a straight line until a slot, or for ever (``until=None``, and ``begin`` is ``end``)."""

    until: int | None
    begin: Fraction
    end: Fraction

    def __str__(self) -> str:
        value = str(self.begin) if self.begin == self.end else f'{self.begin} to {self.end}'
        return value if self.until is None else f'{value} until {self.until}sp'


def lines_of(name: str, value: Any) -> list[Line]:
    """A number that may change over the slots.

    Args:
        name: Its key, for errors.
        value: A number; or a list of ``[until, value]`` and ``[until, from, to]`` (a straight line), one after the
            other, in ``sp``. The last value stays.

    Raises:
        ValueError: If it is neither.
    """
    if not isinstance(value, list):
        constant = exact_fraction(name, value)
        return [Line(None, constant, constant)]
    lines: list[Line] = []
    for number, item in enumerate(value):
        where = f'{name}[{number}]'
        if not isinstance(item, list) or len(item) not in (2, 3):
            raise ValueError(f'{where}={short_repr(item)} must be [until, value], or [until, from, to] for a line')
        until = int(Duration.parse(f'{where}[0]', item[0], ('sp',)).value)
        if until <= (lines[-1].until or 0 if lines else 0):
            raise ValueError(f'{where}[0]={item[0]} must be later than the one before')
        lines.append(Line(until, exact_fraction(where, item[1]), exact_fraction(where, item[-1])))
    if not lines:
        raise ValueError(f'{name}=[] is empty: give a number, or [until, value] one after the other')
    return [*lines, Line(None, lines[-1].end, lines[-1].end)]


def _between(lines: Sequence[Line], start: int, until: int | None) -> tuple[Fraction, Fraction]:
    """The values at two slots, between which no line begins."""
    began = 0
    for line in lines:
        if line.until is None or until is None:
            return lines[-1].begin, lines[-1].end
        if line.until >= until:
            rise = (line.end - line.begin) / (line.until - began)
            return line.begin + rise * (start - began), line.begin + rise * (until - began)
        began = line.until
    raise AssertionError('the last line has no end')


def shares_of(fraction: Any, weights: Mapping[str, Any]) -> list[Piece]:
    """Each stream's share of the sequence: ``[1 - f, f * v_1, f * v_2, ...]`` with ``v`` the normalised weights.

    Of numbers that change, that holds wherever a line of any of them begins or ends; between, shares are straight
    lines. (The old streams together have the fraction at every slot.)

    Args:
        fraction: Replay fraction f, ``0 <= f < 1``; see :func:`lines_of`.
        weights: Weight of each old stream, in any unit. Only their ratios matter. See :func:`lines_of`.

    Returns:
        Shares that sum to exactly 1; the first is that of the new data.

    Raises:
        ValueError: If f is out of range, there is replay to do and nothing to replay, a weight is not positive (0 is
            one that changes), or all are 0.
    """
    shares = lines_of('replay.fraction', fraction)
    if not all(0 <= value < 1 for line in shares for value in (line.begin, line.end)):
        raise ValueError(
            f'replay.fraction={fraction} is out of range; it is the share of every batch that comes from earlier '
            'datasets, 0 <= fraction < 1 (0.05 for 5 %)'
        )
    exact = {name: lines_of(f'replay.streams.{name}.weight', weight) for name, weight in weights.items()}
    for name, lines in exact.items():
        lowest = min(value for line in lines for value in (line.begin, line.end))
        if lowest < 0 or (len(lines) == 1 and not lowest):
            raise ValueError(f'replay.streams.{name}.weight={weights[name]} must be positive; or leave {name} out')
    if any(line.begin or line.end for line in shares) and not exact:
        raise ValueError(f'replay.fraction={fraction} but replay.streams is empty: name at least one old dataset')
    ends = sorted({line.until for lines in (shares, *exact.values()) for line in lines if line.until is not None})
    pieces = []
    for start, until in zip([0, *ends], [*ends, None], strict=True):
        of_old = _between(shares, start, until)
        values = [_between(lines, start, until) for lines in exact.values()]
        sides = []
        corners = zip((start, until), of_old, zip(*values, strict=True) if values else ((), ()), strict=True)
        for slot, share, side in corners:
            if share and not sum(side):
                at = start if slot is None else slot
                raise ValueError(f'replay.streams: all weights are 0 at sample {at}, where the fraction is {share}')
            total = sum(side) or Fraction(1)
            old = [share * weight / total for weight in side]
            sides.append((1 - share, *old))
        pieces.append(Piece(until, *sides))
    return pieces


Tree = Any  # the number of a stream, or two trees


def _fairest_tree(nodes: Sequence[tuple[float, Tree]], above: float = 0) -> tuple[float, Tree]:
    """The binary tree of streams in which no count can be far from its share.

    Where a node of share a gives ``floor(m b / a + 1/2)`` of its m slots to its child of share b, the error of a leaf
    of share w is at most ``(1 + sum(w / a)) / 2`` over the nodes above it, but for the root.

    Args:
        nodes: Share and tree of what is to be joined.
        above: Sum of ``1 / a`` over the nodes above. Default: ``0``.

    Returns:
        The largest ``sum(w / a)``, and the tree.
    """
    nodes = list(nodes)
    while len(nodes) > MAX_SEARCHED:
        nodes.sort(key=lambda node: -node[0])
        (second, left), (first, right) = nodes.pop(-2), nodes.pop(-1)
        nodes.append((first + second, (left, right)))
    if len(nodes) == 1:
        return nodes[0][0] * above, nodes[0][1]
    tried = []
    for chosen in product((False, True), repeat=len(nodes) - 1):
        if not all(chosen):
            sides = [
                [node for node, it in zip(nodes, (True, *chosen), strict=True) if it == side] for side in (True, False)
            ]
            inner = [1 / sum(share for share, _ in side) if len(side) > 1 else 0 for side in sides]
            found = [_fairest_tree(side, above + more) for side, more in zip(sides, inner, strict=True)]
            tried.append((max(error for error, _ in found), tuple(tree for _, tree in found)))
    return min(tried, key=lambda each: each[0])


def _leaves(tree: Tree) -> list[int]:
    return [tree] if isinstance(tree, int) else [leaf for side in tree for leaf in _leaves(side)]


_isqrt = np.frompyfunc(isqrt, 1, 1)


class _Rounded:
    r"""How many of a node's first m samples are its second child's, while their shares run in one line each.

    With A(x) and B(x) the integrals of the node's and the child's share up to slot x, it is
    :math:`\lfloor B(A^{-1}(m)) + 1/2 \rfloor`: exact, since a share is a straight line, so that A is a quadratic and
    the result :math:`\lfloor (p + \pm\sqrt z) / d \rfloor` with p and z whole and linear in m (p quadratic where the
    node's own share is constant).

    Args:
        upto: A and B at the beginning.
        begin: The two shares there.
        slope: By how much they rise with each slot.
    """

    def __init__(self, upto: Sequence[Fraction], begin: Sequence[Fraction], slope: Sequence[Fraction]) -> None:
        (of_node, of_child), (a, b), (a_rise, b_rise) = upto, begin, slope
        half, zero = Fraction(1, 2), Fraction(0)
        if a_rise:  # slots since the beginning are (sqrt(square + twice m) - a) / a_rise
            linear = b_rise / a_rise
            root = (b - linear * a) / a_rise
            terms = [of_child + half - linear * of_node - root * a, linear, zero]
            under = [root**2 * (a**2 - 2 * a_rise * of_node), root**2 * 2 * a_rise]
        else:  # they are (m - of_node) / a; of a node without a share nobody asks
            rate, bend = (b / a, b_rise / (2 * a * a)) if a else (zero, zero)
            root, under = zero, [zero, zero]
            terms = [
                of_child + half - rate * of_node + bend * of_node**2,
                rate - 2 * bend * of_node,
                bend,
            ]
        self._divisor = lcm(*(each.denominator for each in (*terms, *under)))
        self._terms = [int(each * self._divisor) for each in terms]
        self._under = [int(each * self._divisor**2) for each in under]
        self._sign = (root > 0) - (root < 0)

    def __call__(self, samples: Ints) -> Ints:
        """Of each of these numbers of samples."""
        (once, linear, square), divisor = self._terms, self._divisor
        fits = max(abs(linear) * int(samples.max()) + abs(once), divisor) < 1 << 62
        if fits and not square and not self._sign:
            return (samples * linear + once) // divisor
        exact = samples.astype(object)  # products pass 64 bits
        whole = once + exact * (linear + exact * square)
        if self._sign:
            under = self._under[0] + exact * self._under[1]
            root = _isqrt(under)
            whole = whole + (root if self._sign > 0 else -root - (root * root < under))
        return (whole // divisor).astype(np.int64)


class Interleaving:
    r"""Which stream slot n belongs to, and how many samples each stream has given before it.

    Exact at every prefix: the count of a stream i among the first N slots is within 1 of the sum of its shares over
    them, the integral :math:`\int_0^N w_i(x) dx` (N w_i of a constant share). With two streams (new and one old) it is
    that integral rounded, ``floor(... + 1/2)``: an error of at most one half. With more, streams are halved as a tree
    does, and each half gets the rounded integral over what its node has; of more than three streams the error can pass
    1 by some tenths. The rows of a stream are evenly spaced.

    Cost: none to build; for many slots at once 0.1 microseconds for each slot and halving, of moving shares some more.

    Args:
        pieces: Shares, e.g. of :func:`shares_of`; the last piece goes on for ever.

    Raises:
        ValueError: If shares are negative, do not sum to 1, or end before they begin.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        corners = [shares for piece in pieces for shares in (piece.begin, piece.end)]
        for shares in corners:
            if sum(shares) != 1 or min(shares) < 0:
                raise ValueError(f'shares {[str(s) for s in shares]} must be non-negative and sum to 1')
        self.pieces = tuple(pieces)
        self._starts = [0, *(int(piece.until or 0) for piece in self.pieces[:-1])]
        self._num_streams = len(pieces[0].begin)
        means = [float(sum(each) / len(corners)) for each in zip(*corners, strict=True)]
        _, self._tree = _fairest_tree([(mean, stream) for stream, mean in enumerate(means) if mean])
        self._splits: dict[Tree, tuple[list[int], list[_Rounded]]] = {}
        self._prepare(self._tree)

    def _prepare(self, tree: Tree) -> None:
        """How each node of a tree is split."""
        if isinstance(tree, int):
            return
        upto, begins, splits = [Fraction(0)] * 2, [], []
        for start, piece in zip(self._starts, self.pieces, strict=True):
            begin, end = (
                tuple(sum((shares[leaf] for leaf in _leaves(node)), Fraction(0)) for node in (tree, tree[1]))
                for shares in (piece.begin, piece.end)
            )
            length = 1 if piece.until is None else piece.until - start
            slope = tuple((after - before) / length for before, after in zip(begin, end, strict=True))
            begins.append(ceil(upto[0]))
            splits.append(_Rounded(upto, begin, slope))
            upto = [total + length * (a + b) / 2 for total, a, b in zip(upto, begin, end, strict=True)]
        self._splits[tree] = (begins, splits)
        for side in tree:
            self._prepare(side)

    def counts(self, num_slots: int) -> list[int]:
        """Samples of each stream among the first ``num_slots`` slots."""
        return [int(count[0]) for count in self._spread(self._tree, np.array([num_slots]))]

    def slots_in_one_pass(self, num_samples: int) -> int:
        """The most slots that hold at most ``num_samples`` of the new data (stream 0): one pass over it."""
        least = min(share for piece in self.pieces for share in (piece.begin[0], piece.end[0]))
        most = int((num_samples + 3) / least)
        return bisect_right(range(most), num_samples, key=lambda slots: self.counts(slots)[0]) - 1

    def locate(self, slots: Ints) -> tuple[NDArray[np.uint8], Ints]:
        """(stream, how many samples that stream gave before) of each slot."""
        before, after = (np.stack(self._spread(self._tree, upto)) for upto in (slots, slots + 1))
        streams = np.argmax(after - before, axis=0).astype(np.uint8)
        return streams, before[streams, np.arange(len(slots))]

    def _spread(self, tree: Tree, slots: Ints) -> list[Ints]:
        """Samples of each stream if this tree is given so many slots; of the others none."""
        if isinstance(tree, int):
            return [slots if stream == tree else np.zeros_like(slots) for stream in range(self._num_streams)]
        begins, splits = self._splits[tree]
        which = np.searchsorted(begins, slots, side='right') - 1
        of_second = np.empty_like(slots)
        for piece in np.unique(which):
            of_second[which == piece] = splits[piece](slots[which == piece])
        sides = self._spread(tree[0], slots - of_second), self._spread(tree[1], of_second)
        return [one + other for one, other in zip(*sides, strict=True)]


def check_budget(
    num_samples: int,
    interleaving: Interleaving,
    sizes: Mapping[str, int],
    max_passes: Fraction | float,
    max_seq_len: int,
    read_before: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Say before training that a budget of so many samples, new and old, needs more data than there is.

    Args:
        num_samples: The budget.
        interleaving: The mix.
        sizes: Samples of the new data (called ``new``) and of each old stream, in the order of the mix.
        max_passes: How many times a dataset may be read.
        max_seq_len: Tokens per sample.
        read_before: Samples of each that were read before this budget begins. Default: none.

    Raises:
        ValueError: If a dataset would be read more often, with the numbers.
    """
    for (name, size), counted in zip(sizes.items(), interleaving.counts(num_samples), strict=True):
        needed = counted + read_before.get(name, 0)
        if needed > max_passes * size:
            what = 'new data' if name == 'new' else f'replay stream {name!r}'
            if read_before.get(name):
                what += f' ({read_before[name] * max_seq_len:,} of them before it begins)'
            raise ValueError(
                f'too little data: a budget of {num_samples * max_seq_len:,} tokens reads {needed * max_seq_len:,} '
                f'tokens of the {what}, which has {size * max_seq_len:,} ({needed / max(size, 1):.2f} passes; '
                f'max_passes is {float(max_passes):g}): lower max_duration or '
                'global_train_batch_size, prepare more data, or raise train_loader.dataset.max_passes'
            )


class ShuffledOrder:
    r"""A shuffle that keeps shards together, like Streaming's ``py1e``, at random access.

    Shards are put in random order; sample x of that order (x counts through the shards) draws a key within half a
    block of x, :math:`u \sim U[\max(0, x - b/2), \min(N, x + b/2))`, and samples are read by rising key. So a sample
    is read within about one block of its shard's place, shards are downloaded in order, and about
    ``b / shard size`` of them are in use at a time. ``b >= 2N`` is an unrestricted shuffle.

    Unlike ``py1e`` nothing has to be laid out: the keys in ``[ab, (a+1)b)`` belong to samples near there, and how
    many keys are smaller is counted from the same neighbourhood. Cost: O(number of shards) to build, O(b) (about
    50 ms at the default) for each block read, 40 bytes per sample of one block in memory.

    Args:
        shard_sizes: Samples in each shard, in dataset order.
        seed: Seed of the shuffle.
        pass_index: How many times the data was read before; every pass is another order.
        block_size: b, in samples. Default: ``1 << 18``.
        remember: Blocks kept in memory, 16 bytes per sample; reading onward needs two. Default: ``2``.
    """

    def __init__(
        self, shard_sizes: Ints, seed: int, pass_index: int, block_size: int = DEFAULT_BLOCK_SIZE, remember: int = 2
    ) -> None:
        self._key = (seed, pass_index)
        self._sizes = sizes = np.asarray(shard_sizes, np.int64)
        # in place: with a million shards every temporary array is 10 MB
        self._starts = np.cumsum(sizes)
        self._starts -= sizes
        self._order = np.random.default_rng([*self._key, 0]).permutation(len(sizes)).astype(np.int32)
        self._ends = sizes[self._order]  # in shuffled shard order
        np.cumsum(self._ends, out=self._ends)
        self.num_samples = int(sizes.sum())
        self.block_size = block_size
        self._num_blocks = -(-self.num_samples // block_size)
        self._keys = lru_cache(maxsize=remember + 1)(self._draw_keys)
        self._block = lru_cache(maxsize=remember)(self._sort_block)

    def _draw_keys(self, block: int) -> NDArray[np.float64]:
        x = np.arange(block * self.block_size, min((block + 1) * self.block_size, self.num_samples))
        low = np.maximum(x - self.block_size / 2, 0)
        high = np.minimum(x + self.block_size / 2, self.num_samples)
        return low + np.random.default_rng([*self._key, 1, block]).random(len(x)) * (high - low)

    def _sort_block(self, block: int) -> tuple[int, Ints]:
        """(rank of the first, x by rising key) of the samples whose key lies in this block."""
        near = range(max(block - 1, 0), min(block + 2, self._num_blocks))
        keys = np.concatenate([self._keys(b) for b in near])
        first_x = near[0] * self.block_size
        inside = np.flatnonzero((keys >= block * self.block_size) & (keys < (block + 1) * self.block_size))
        rank = first_x + int((keys < block * self.block_size).sum())
        return rank, first_x + inside[np.argsort(keys[inside], kind='stable')]

    def __call__(self, positions: Ints) -> Ints:
        """Sample ids at these positions of the order; positions in ``[0, num_samples)``."""
        x = np.empty(len(positions), np.int64)
        todo = np.ones(len(positions), bool)
        while todo.any():
            position = int(positions[np.argmax(todo)])
            block = position // self.block_size
            while (found := self._block(block))[0] > position:
                block -= 1
            while found[0] + len(found[1]) <= position:
                block += 1
                found = self._block(block)
            first, members = found
            here = todo & (positions >= first) & (positions < first + len(members))
            x[here] = members[positions[here] - first]
            todo &= ~here
        place = np.searchsorted(self._ends, x, side='right')
        shard = self._order[place]
        return self._starts[shard] + x - (self._ends[place] - self._sizes[shard])


@dataclass(frozen=True)
class StreamOrder:
    """In which order a stream is read, pass after pass.

    * ``limit=None``: every pass over the whole stream is a :class:`ShuffledOrder` of its own.
    * Otherwise only the first ``limit`` samples of pass 0 exist: what an earlier run that stopped there has read.
      Pass 0 gives them in that order (or, with ``fresh_seed``, in another one); later passes shuffle blocks of it.

    Args:
        shard_sizes: Samples in each shard.
        seed: Shuffle seed; None reads in dataset order.
        block_size: Samples in a shuffle block.
        limit: Samples that exist. Default: ``None``, all.
        fresh_seed: With a limit, the seed of an order of its own for pass 0 too. Default: ``None``.
    """

    shard_sizes: Ints
    seed: int | None
    block_size: int = DEFAULT_BLOCK_SIZE
    limit: int | None = None
    fresh_seed: int | None = None

    @property
    def total(self) -> int:
        """Samples in the stream."""
        return int(np.sum(self.shard_sizes))

    @property
    def size(self) -> int:
        """Samples in one pass."""
        return self.total if self.limit is None else min(self.limit, self.total)

    def one_pass(self, number: int) -> Callable[[Ints], Ints]:
        """From places in a pass to sample ids."""
        sizes, seed = self.shard_sizes, self.seed
        if self.size == self.total and self.fresh_seed is None:
            return _in_order if seed is None else ShuffledOrder(sizes, seed, number, self.block_size)
        read = _in_order if seed is None else ShuffledOrder(sizes, seed, 0, self.block_size, remember=8)
        if number == 0 and self.fresh_seed is None:
            return read
        # whole blocks of what was read take the part of shards: their rows lie in the same few shards
        blocks = np.diff(np.r_[np.arange(0, self.size, self.block_size), self.size])
        again = ShuffledOrder(
            blocks, (seed or 0) if self.fresh_seed is None else self.fresh_seed, number, self.block_size
        )
        return lambda places: read(again(places))


def _in_order(places: Ints) -> Ints:
    return places


class MixedSequence:
    """Sample ids of the slots of a mixed, endless sequence.

    Streams are consecutive ranges of shards, and start over at their end. Of each, the first ``starts`` samples are
    left out at first: they were read before.
    """

    def __init__(
        self, interleaving: Interleaving, orders: Sequence[StreamOrder], starts: Sequence[int] | None = None
    ) -> None:
        self.interleaving = interleaving
        self.orders = tuple(orders)
        self.starts = list(starts or [0] * len(self.orders))
        self.sizes = [order.size for order in orders]
        self._offsets = np.cumsum([0, *(order.total for order in orders)])[:-1]
        self._remember_orders()

    def _remember_orders(self) -> None:
        # two passes of each stream: a batch can straddle the end of one
        self._order = lru_cache(maxsize=2 * len(self.sizes))(
            lambda stream, number: self.orders[stream].one_pass(number)
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the cache, which cannot be pickled: DataLoader workers may be spawned."""
        return {key: value for key, value in self.__dict__.items() if key != '_order'}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._remember_orders()

    def __call__(self, slots: Ints) -> Ints:
        """Global sample id of each slot."""
        streams, ordinals = self.interleaving.locate(slots)
        ids = np.empty(len(slots), np.int64)
        for stream in np.unique(streams):
            here = streams == stream
            passes, places = np.divmod(ordinals[here] + self.starts[stream], self.sizes[stream])
            for number in np.unique(passes):
                now = passes == number
                places[now] = self._order(int(stream), int(number))(places[now])
            ids[here] = self._offsets[stream] + places
        return ids


def row_shift(batch: Ints, global_batch_size: int) -> Ints:
    """By how many rows the slots of a global batch are turned before ranks take their parts of it.

    The rows of a stream are evenly spaced, so that with ``f * B`` a divisor of the ranks every batch would give its
    replay to the same ranks. Turning batch k by the fractional part of k times the golden ratio (here in 32-bit
    integers) gives each rank and microbatch its share over time, and keeps the spacing.
    """
    return ((batch * 2654435769) % (1 << 32) * global_batch_size) >> 32


def worker_slots(
    indices: Ints,
    first_slot: int,
    device_batch_size: int,
    rank: int,
    num_ranks: int,
    worker: int,
    num_workers: int,
) -> Ints:
    """Slots of a DataLoader worker's samples number ``indices``, from ``first_slot`` on, a multiple of the batch size.

    Global batch k is slots ``kB .. kB + B - 1`` with ``B = device_batch_size * num_ranks``, turned by ``row_shift``;
    rank r takes the r-th run of ``device_batch_size`` rows; PyTorch's DataLoader takes batches from its workers in
    turn, so worker w of W reads batches w, w + W, w + 2W, ... So the global batches do not depend on ranks or workers.
    """
    global_batch_size = device_batch_size * num_ranks
    batches, rows = np.divmod(indices, device_batch_size)
    batches = first_slot // global_batch_size + worker + batches * num_workers
    rows = (rank * device_batch_size + rows + row_shift(batches, global_batch_size)) % global_batch_size
    return batches * global_batch_size + rows
