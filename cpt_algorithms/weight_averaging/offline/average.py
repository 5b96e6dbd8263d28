# SPDX-License-Identifier: Apache-2.0
"""Averages of saved checkpoints, block by block: a few megabytes of memory, whatever the model and however many."""

import os
import resource
from collections import deque
from collections.abc import Callable, Iterable, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from pathlib import Path
from typing import Any

import torch

from cpt_algorithms.checkpoints.errors import CheckpointError
from cpt_algorithms.checkpoints.open import Checkpoint, TensorOnDisk
from cpt_algorithms.formatting import first_of
from cpt_algorithms.validation import misfits
from cpt_algorithms.weight_averaging.functional import window_weights

__all__ = ['Average', 'average_tensors', 'check_alike', 'read_tensor', 'view_average']

BLOCK = 1 << 18  # elements; the accumulator (1 MiB) and what goes into it stay in a core's cache
THREADS = min(8, os.cpu_count() or 1)
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Average:
    """One tensor to make, of parts (weights, and what they weigh) of one shape, in the dtype of the result.

    ``write`` is called with the first byte and the bytes of each block of the result, from several threads.
    """

    parts: Sequence[tuple[float, TensorOnDisk]]
    dtype: torch.dtype
    write: Callable[[int, Any], None]


def check_alike(checkpoints: Sequence[Checkpoint], and_dtypes: bool = True) -> None:
    """Refuse to average what does not belong together.

    Args:
        checkpoints: The others are compared with the first.
        and_dtypes: Whether dtypes of floating-point numbers must be the same, beside names and shapes. Default:
            ``True``.

    Raises:
        CheckpointError: If they differ (with the first three differences), or a dtype cannot be averaged.
    """
    first = checkpoints[0].tensors
    show: Callable[[TensorOnDisk], str] = describe
    if not and_dtypes:
        show = lambda one: str(one.shape) if one.dtype.is_floating_point else describe(one)  # noqa: E731
    for other in checkpoints:
        for name, one in other.tensors.items():
            if (one.dtype.is_floating_point or one.dtype.is_complex) and one.dtype not in FLOATS:
                raise CheckpointError(f'{other.path}: {name} is {short(one.dtype)}, which cannot be averaged')
        if found := misfits(*({k: show(one) for k, one in tensors.items()} for tensors in (first, other.tensors))):
            raise CheckpointError(f'{other.path} does not fit {checkpoints[0].path}: {first_of(found)}')


def short(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix('torch.')


def describe(stored: TensorOnDisk) -> str:
    """Shape and dtype in a message."""
    return f'{stored.shape} {short(stored.dtype)}'


def view_average(checkpoint: Checkpoint, average: str) -> list[tuple[float, Checkpoint]]:
    """An average (``lawa``, or the name of an EMA) that a callback kept, as parts that look like checkpoints.

    Returns:
        Weights (with sum 1) and checkpoints. What the average does not hold (buffers, frozen parameters) is the
        checkpoint's own.

    Raises:
        CheckpointError: If it holds no such average, or one that is not of this model.
    """
    averages = {name: [(1.0, each)] for name, each in checkpoint.ema.items()}
    if checkpoint.lawa:
        weights = window_weights(checkpoint.lawa_weights, len(checkpoint.lawa))
        averages['lawa'] = list(zip(weights, checkpoint.lawa, strict=True))
    if average not in averages:
        there = ', '.join(averages) or 'none'
        raise CheckpointError(f'{checkpoint.path} holds no average {average!r}; there are: {there}')
    views = []
    for weight, part in averages[average]:
        kept = {checkpoint.aliases.get(name, name): one for name, one in part.items()}
        kept |= {name: kept[other] for name, other in _tied(checkpoint, kept.keys()).items()}
        tensors, path = {**checkpoint.tensors, **kept}, Path(f'{checkpoint.path} ({average})')
        views.append((weight, replace(checkpoint, path=path, tensors=tensors)))
    check_alike([checkpoint, *(view for _, view in views)], and_dtypes=False)
    return views


def _tied(checkpoint: Checkpoint, kept: Set[str]) -> dict[str, str]:
    """The other names of tensors that an average keeps under one: those of the same values.

    Of a model trained on several ranks, a checkpoint stores a tied tensor under each of its names.
    """
    tensors, found = checkpoint.tensors, {}
    known = {name: tensors[name] for name in sorted(kept & tensors.keys())}
    for name in tensors.keys() - kept:
        one = tensors[name]
        for other, it in known.items():
            # few are alike in their beginning
            if it.shape == one.shape and all(read_tensor(it, most) == read_tensor(one, most) for most in (64, None)):
                found[name] = other
    return found


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a one-dimensional contiguous tensor."""
    return memoryview(tensor.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


def _read_run(files: dict[Path, int], path: Path, offset: int, view: memoryview) -> None:
    while view:
        count = os.preadv(files[path], [view], offset)
        if not count:
            raise CheckpointError(f'{path} ended early, at byte {offset:,}: it changed, or is damaged')
        view, offset = view[count:], offset + count


def _read(files: dict[Path, int], stored: TensorOnDisk, begin: int, into: torch.Tensor) -> None:
    """Elements from ``begin`` on into a tensor; all of them unless the chunks are flat."""
    size, view = stored.dtype.itemsize, as_bytes(into)
    if stored.is_flat:
        end, row = begin + into.numel(), prod(stored.shape[1:])
        for chunk in stored.chunks:
            start = chunk.at[0] * row if chunk.at else 0
            low, high = max(begin, start), min(end, start + prod(chunk.shape))
            if low < high:
                part = view[(low - begin) * size : (high - begin) * size]
                _read_run(files, chunk.path, chunk.offset + (low - start) * size, part)
        return
    for chunk in stored.chunks:
        span = 1 + sum((n - 1) * step for n, step in zip(chunk.shape, chunk.stride, strict=True))
        data = torch.empty(span, dtype=stored.dtype)
        _read_run(files, chunk.path, chunk.offset, as_bytes(data))
        box = into.view(stored.shape)
        for axis, (at, length) in enumerate(zip(chunk.at, chunk.shape, strict=True)):
            box = box.narrow(axis, at, length)
        box.copy_(data.as_strided(chunk.shape, chunk.stride))


def read_tensor(stored: TensorOnDisk, most: int | None = None) -> bytes:
    """The elements of a tensor in order: the first ones, where that spares reading the rest, or all."""
    files = {path: os.open(path, os.O_RDONLY) for path in {chunk.path for chunk in stored.chunks}}
    try:
        count = prod(stored.shape)
        values = torch.empty(min(most or count, count) if stored.is_flat else count, dtype=stored.dtype)
        _read(files, stored, 0, values)
        return bytes(as_bytes(values))
    finally:
        for descriptor in files.values():
            os.close(descriptor)


def average_tensors(
    averages: Iterable[Average],
    accumulate: torch.dtype = torch.float32,
    progress: Callable[[int], Any] = lambda num_bytes: None,
) -> None:
    """Compute weighted averages from files to wherever ``write`` puts them.

    ``result = c (sum_i (w_i / c) x_i)``, where ``c`` is the smallest weight, rounded once to the dtype of the result.
    With equal or linear weights the factors are small whole numbers, so that with float32 sums of bfloat16 and float16
    are exact as long as the values of an element are within a factor of about 100 of each other: the result is within
    half a unit in the last place, even where the values cancel. In general its error is that rounding plus at most
    ``k * 2^-24 * sum_i |w_i x_i|`` (float64: ``2^-53``), so float32 checkpoints lose up to a few units in their last
    place with float32, and none with float64.

    Args:
        averages: What to compute. A part of weight 0 is not read. A single part of the result's dtype is copied.
        accumulate: Dtype of the sums; tensors that are wider use their own. Default: ``float32``.
        progress: Called with the number of bytes read, after each block. Default: nothing.

    Raises:
        CheckpointError: If a file ends early or is damaged.

    Cost: reads every part once. Memory: about 20 bytes for each of the 2^17 elements of a block, for each of at most 8
    threads; tensors that are stored with gaps (transposed, or split along a later dimension) are read at once.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # k checkpoints of a file for each rank
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the threads here share the cores already
    files: dict[Path, int] = {}
    waiting: deque[Future[int]] = deque()
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            try:
                for average in averages:
                    for path in {chunk.path for _, stored in average.parts for chunk in stored.chunks} - files.keys():
                        files[path] = os.open(path, os.O_RDONLY)
                    count = prod(average.parts[0][1].shape)
                    block = BLOCK if all(stored.is_flat for _, stored in average.parts) else max(1, count)
                    for begin in range(0, count, block):
                        size = min(block, count - begin)
                        waiting.append(pool.submit(_average_block, average, begin, size, accumulate, files))
                        if len(waiting) > 4 * THREADS:
                            progress(waiting.popleft().result())
                while waiting:
                    progress(waiting.popleft().result())
            finally:
                for future in waiting:
                    future.cancel()
    finally:
        for descriptor in files.values():
            os.close(descriptor)
        torch.set_num_threads(num_threads)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _average_block(average: Average, begin: int, size: int, accumulate: torch.dtype, files: dict[Path, int]) -> int:
    parts = [(weight, stored) for weight, stored in average.parts if weight]
    result = values = torch.empty(size, dtype=parts[0][1].dtype)
    if len(parts) == 1 and parts[0][0] == 1 and values.dtype == average.dtype:
        _read(files, parts[0][1], begin, values)
    else:
        total = torch.empty(size, dtype=reduce(torch.promote_types, (each.dtype for _, each in parts), accumulate))
        scale = min(abs(weight) for weight, _ in parts)
        for index, (weight, stored) in enumerate(parts):
            if stored.dtype != values.dtype:
                values = torch.empty(size, dtype=stored.dtype)
            _read(files, stored, begin, values)
            factor = weight / scale
            if index:
                total.add_(values, alpha=factor)
            elif factor == 1:
                total.copy_(values)
            else:
                total.copy_(values).mul_(factor)
        if scale != 1:
            total.mul_(scale)
        result = total.to(average.dtype)
    average.write(begin * average.dtype.itemsize, as_bytes(result))
    return sum(size * stored.dtype.itemsize for _, stored in parts)
