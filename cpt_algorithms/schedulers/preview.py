# SPDX-License-Identifier: Apache-2.0
"""What any Composer scheduler will do to a run, batch by batch, without running it."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import numpy as np
from composer.core import State, Time, Timestamp
from composer.optim import ComposerScheduler

from cpt_algorithms.duration import ABSOLUTE, Duration
from cpt_algorithms.schedulers.phase_scheduler import PhaseScheduler

__all__ = ['preview']


def preview(
    scheduler: ComposerScheduler,
    max_duration: str,
    global_batch_size: int = 1,
    max_seq_len: int = 1,
    dataloader_len: int | None = None,
    batches: Sequence[int] | None = None,
) -> np.ndarray:
    """The multiplier that each batch is trained with.

    That is the value for the time at which the batch starts; for schedulers that are not ours, for the start of the
    batch before: Composer steps them before it moves the time on, so batches 0 and 1 both get the value at 0.

    Args:
        scheduler: Any Composer scheduler which reads time, ``max_duration`` and the dataloader's length only.
        max_duration: Length of the run, in tok, ba, sp or ep.
        global_batch_size: Samples of a batch, if times are in sp or tok. Default: ``1``.
        max_seq_len: Tokens of a sample, if times are in tok. Default: ``1``.
        dataloader_len: Batches per epoch, if times are in ep. Default: ``None``.
        batches: Which ones. Default: all of the run.

    Raises:
        ValueError: If the run cannot be counted in batches, or if the scheduler refuses it.

    Cost: a few microseconds per batch for our schedulers; tens for stock ones, which parse their times in each call.
    """
    if batches is None:
        duration = Duration.parse('max_duration', max_duration, (*ABSOLUTE, 'ep'))
        total = duration.batches(global_batch_size, max_seq_len, dataloader_len)
        if total is None:
            raise ValueError(f"max_duration='{duration}' cannot be counted in batches without dataloader_len")
        batches = range(total)
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
            sample=done * global_batch_size,
            token=done * global_batch_size * max_seq_len,
        )
        values.append(scheduler(cast(State, state)))
    return np.array(values, dtype=np.float64)
