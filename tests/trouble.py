# SPDX-License-Identifier: Apache-2.0
"""What can go wrong inside a run, made to happen: loaded through ``code_paths``, lasts while a file is there."""

import datetime
import resource
import time
from pathlib import Path

import composer.trainer.trainer
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from llmfoundry import registry


class Trouble(Callback):
    """Spoils a batch, the disk or the clock.

    Args:
        file: Nothing happens unless this file is there.
        nan_at: The gradients of this batch, from 1, are no numbers; its loss is.
        largest_file: No file may become larger from batch ``full_at`` on, in bytes, as on a disk that is full.
        full_at: The batch, from 1.
        clock: ``{batch: hours}`` by which the clock is set, forwards or back, when that batch begins.
    """

    def __init__(
        self, file: str, nan_at: int = 0, largest_file: int = 0, full_at: int = 0, clock: dict[str, float] | None = None
    ) -> None:
        self.file, self.nan_at, self.largest_file, self.full_at = Path(file), nan_at, largest_file, full_at
        self.clock = {int(batch): hours for batch, hours in (clock or {}).items()}

    def batch_start(self, state: State, logger: Logger) -> None:
        batch = int(state.timestamp.batch.value) + 1
        if self.file.exists() and batch == self.full_at and dist.get_global_rank() == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.largest_file, resource.RLIM_INFINITY))
        if self.file.exists() and batch in self.clock:
            set_clock(self.clock[batch])

    def after_backward(self, state: State, logger: Logger) -> None:
        if self.file.exists() and state.timestamp.batch.value + 1 == self.nan_at and dist.get_global_rank() == 0:
            next(iter(state.model.parameters())).grad.mul_(float('nan'))


def set_clock(hours: float) -> None:
    """Every wall clock of this process shows another time from now on; monotonic ones do not."""
    for name, unit in (('time', 1), ('time_ns', 10**9)):
        tell = getattr(time, name)
        setattr(time, name, lambda tell=tell, unit=unit: tell() + type(tell())(hours * 3600 * unit))

    class Shifted(datetime.datetime):
        before = composer.trainer.trainer.datetime.datetime

        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return cls.before.now(tz) + datetime.timedelta(hours=hours)

    class Module:
        datetime, timedelta = Shifted, datetime.timedelta

    composer.trainer.trainer.datetime = Module


if 'trouble' not in registry.callbacks:
    registry.callbacks.register('trouble', func=Trouble)
