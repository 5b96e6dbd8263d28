# SPDX-License-Identifier: Apache-2.0
"""What any Composer scheduler will do to a run, batch by batch, without running it."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import numpy as np
from composer.core import State, Time, Timestamp, TimeUnit
from composer.optim import ComposerScheduler

from cpt_algorithms.schedulers.phase_scheduler import PhaseScheduler

__all__ = ['count_batches', 'preview']


def count_batches(
    max_duration: str | Time,
    tokens_per_batch: int | None = None,
    samples_per_batch: int | None = None,
    dataloader_len: int | None = None,
) -> int:
    """Batches that a run trains on: those that start before its end.

    Args:
        max_duration: Length of the run, in ba, tok, sp or ep.
        tokens_per_batch: Tokens of a global batch; needed for tok. Default: ``None``.
        samples_per_batch: Samples of a global batch; needed for sp. Default: ``None``.
        dataloader_len: Batches per epoch; needed for ep. Default: ``None``.

    Raises:
        ValueError: If the number that the unit needs is missing.
    """
    duration = Time.from_input(max_duration)
    length = int(duration.value)
    if duration.unit == TimeUnit.BATCH:
        return length
    if duration.unit == TimeUnit.EPOCH and dataloader_len is not None:
        return length * dataloader_len
    per_batch = {TimeUnit.TOKEN: tokens_per_batch, TimeUnit.SAMPLE: samples_per_batch}.get(duration.unit)
    if per_batch is None:
        raise ValueError(
            f'max_duration={duration.to_timestring()!r} cannot be counted in batches: ba always can, tok needs '
            'tokens_per_batch, sp needs samples_per_batch, ep needs dataloader_len'
        )
    return -(-length // per_batch)


def preview(
    scheduler: ComposerScheduler,
    max_duration: str | Time,
    tokens_per_batch: int | None = None,
    samples_per_batch: int | None = None,
    dataloader_len: int | None = None,
    batches: Sequence[int] | None = None,
) -> np.ndarray:
    """The multiplier that each batch is trained with.

    That is the value for the time at which the batch starts; for schedulers that are not ours, for the start of the
    batch before: Composer steps them before it moves the time on, so batches 0 and 1 both get the value at 0.

    Args:
        scheduler: Any Composer scheduler which reads time, ``max_duration`` and the dataloader's length only.
        max_duration: Length of the run.
        tokens_per_batch: Tokens of a global batch, if times are in tok. Default: ``None``.
        samples_per_batch: Samples of a global batch, if times are in sp. Default: ``None``.
        dataloader_len: Batches per epoch, if times are in ep. Default: ``None``.
        batches: Which ones. Default: all of the run.

    Returns:
        One float64 per batch.

    Raises:
        ValueError: If the run cannot be counted in batches, or if the scheduler refuses it.

    Cost: a few microseconds per batch for our schedulers; tens for stock ones, which parse their times in each call.
    """
    if batches is None:
        batches = range(count_batches(max_duration, tokens_per_batch, samples_per_batch, dataloader_len))
    lag = 0 if isinstance(scheduler, PhaseScheduler) else 1
    state = SimpleNamespace(
        max_duration=Time.from_input(max_duration),
        dataloader_len=None if dataloader_len is None else Time.from_batch(dataloader_len),
        callbacks=[],
    )
    values = []
    for batch in batches:
        done = max(int(batch) - lag, 0)
        state.timestamp = Timestamp(
            epoch=done // dataloader_len if dataloader_len else 0,
            batch=done,
            batch_in_epoch=done % dataloader_len if dataloader_len else done,
            sample=done * (samples_per_batch or 0),
            token=done * (tokens_per_batch or 0),
        )
        values.append(scheduler(cast(State, state)))
    return np.array(values, dtype=np.float64)
