# SPDX-License-Identifier: Apache-2.0
"""The Composer side of every schedule here: time strings in, the exact learning rate of every batch out."""

import abc
import logging
import math
from typing import Any

from composer.core import Callback, State, Time, TimeUnit
from composer.loggers import Logger
from composer.optim import ComposerScheduler
from composer.utils import dist

from cpt_algorithms.schedulers.functional import Schedule, multiplier

__all__ = ['PhaseScheduler', 'format_phases']

log = logging.getLogger(__name__)

_ABSOLUTE_UNITS = (TimeUnit.TOKEN, TimeUnit.BATCH, TimeUnit.SAMPLE)


class PhaseScheduler(ComposerScheduler, Callback):
    """A schedule made of phases, whose only state is the run's time.

    Composer steps its schedulers *before* it moves the time on, so a stock scheduler trains batch k with the value for
    the start of batch k - 1. This one is a callback too, and puts itself in front of the run's callbacks when Composer
    compiles it: when fitting starts (a checkpoint is loaded by then) and after each batch it sets

        ``group['lr'] = group['initial_lr'] * multiplier(schedule, time)``

    for every parameter group. Batch k is trained with exactly the value for the time at which it starts; checkpoints
    and ``LRMonitor``, which reports the learning rate of the batch to come, hold that same number.

    Final classes give their times to this constructor and build their phases in ``build``.

    Args:
        dur: Whether times may be in ``dur``, the fraction of ``max_duration``.
        times: The schedule's time strings, by key.

    Raises:
        ValueError: If a time is not a time string in tok, ba, sp or ``dur`` where allowed, if its own times disagree
            about the unit, or for whatever ``build`` refuses in every run. ``fit`` and ``schedule`` also refuse a unit
            that is not that of ``max_duration``, and phases longer than the run.
    """

    def __init__(self, *, dur: bool = True, **times: str | Time) -> None:
        self.times = {key: _parse_time(key, value, dur=dur) for key, value in times.items()}
        self._dur = dur
        self._ssr = 1.0
        self._started = False
        self._called = False
        self._built: tuple[Any, Schedule, TimeUnit] | None = None

    @abc.abstractmethod
    def build(self, t_end: float, **times: float) -> Schedule:
        """The phases.

        Args:
            t_end: End of the run.
            times: The constructor's times as plain numbers, in the same unit.
        """

    def check(self) -> None:
        """Refuse now what no run could make right. The last line of a final class's constructor."""
        units = {time.unit: key for key, time in self.times.items()}
        absolute = [unit for unit in units if unit != TimeUnit.DURATION]
        if len(absolute) > 1:
            given = ', '.join(f'{key}={_text(time)}' for key, time in self.times.items())
            raise ValueError(f'{given}: use one unit for all, that of max_duration')
        # Build for the run that forgives most: whole and fractional times all fit a very long one, unless the
        # schedule's own end is fixed; then a very short run makes the fractional ones vanish.
        t_end = 1.0 if not absolute else 1e15
        if 't_max' in self.times and self.times['t_max'].unit != TimeUnit.DURATION:
            t_end = 1e-6
        self.build(t_end, **{key: _length(time, t_end, 1.0) for key, time in self.times.items()})

    def schedule(
        self,
        max_duration: str | Time,
        dataloader_len: int | Time | None = None,
        ssr: float = 1.0,
    ) -> tuple[Schedule, TimeUnit]:
        """The phases of a run; no ``State`` is needed.

        Args:
            max_duration: Length of the run, as the trainer has it: already scaled by ``ssr``.
            dataloader_len: Batches per epoch; only read if ``max_duration`` is in epochs. Default: ``None``.
            ssr: Scale schedule ratio. Times in tok, ba and sp are multiplied by it, so that the value at t is the
                unscaled schedule's at t / ssr; nothing is rounded. Default: ``1.0``.

        Returns:
            The schedule, and the unit of its times: that of ``max_duration``, or ba if that is in epochs.

        Raises:
            ValueError: If a time has another unit, if epochs cannot be converted, or if the phases do not fit.
        """
        t_end, unit = _run_end(max_duration, dataloader_len)
        for key, time in self.times.items():
            if time.unit not in {unit, TimeUnit.DURATION}:
                units = f'{unit.value} or dur' if self._dur else unit.value
                raise ValueError(
                    f'{key}={_text(time)} is in {time.unit.value}, but max_duration={_text(max_duration)}: '
                    f'write {key} in {units}'
                )
        return self.build(t_end, **{key: _length(time, t_end, ssr) for key, time in self.times.items()}), unit

    def __call__(self, state: State, ssr: float = 1.0) -> float:
        """The multiplier at ``state.timestamp``.

        The first call of a run is Composer compiling the scheduler: from then on this object is one of the run's
        callbacks.

        Args:
            state: The run.
            ssr: Scale schedule ratio, see ``schedule``. Default: ``1.0``.
        """
        self._called = True
        if self not in state.callbacks:
            state.callbacks.insert(0, self)
            self._ssr, self._started = ssr, False
        try:
            return self._evaluate(state, ssr)
        except ValueError:
            if self._started or ssr == 1.0:
                raise
            return 0.0  # Trainer() scales max_duration only after compiling; fit_start sees whether the phases fit

    def fit_start(self, state: State, logger: Logger) -> None:
        """Set the first batch's learning rate and log the phases.

        Raises:
            ValueError: If the run has a second scheduler; both would set the same learning rates.
        """
        self._started = True
        if not self._is_used_by(state):  # fit(schedulers=...) put another one in its place
            state.callbacks.remove(self)
            return
        if len(state.schedulers) > 1:
            raise ValueError(
                f'{type(self).__name__} sets the learning rate alone, but the run has {len(state.schedulers)} '
                'schedulers: give it one'
            )
        self._set_lr(state)
        if dist.get_global_rank() == 0:
            assert self._built is not None and state.max_duration is not None
            _, schedule, unit = self._built
            t_end, _ = _run_end(state.max_duration, state.dataloader_len)
            log.info(
                '%s, multipliers of the learning rate:\n%s', type(self).__name__, format_phases(schedule, unit, t_end)
            )

    def batch_end(self, state: State, logger: Logger) -> None:
        """Set the next batch's learning rate: the time has moved on."""
        self._set_lr(state)

    def _evaluate(self, state: State, ssr: float) -> float:
        assert state.max_duration is not None, 'Composer wants max_duration whenever it calls a scheduler'
        run = (str(state.max_duration), str(state.dataloader_len), ssr)
        if self._built is None or self._built[0] != run:
            self._built = (run, *self.schedule(state.max_duration, state.dataloader_len, ssr))
        _, schedule, unit = self._built
        return multiplier(schedule, state.timestamp.get(unit).value)

    def _set_lr(self, state: State) -> None:
        alpha = self._evaluate(state, self._ssr)
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                group['lr'] = group['initial_lr'] * alpha
        for scheduler in state.schedulers:
            scheduler._last_lr = [group['lr'] for group in scheduler.optimizer.param_groups]

    def _is_used_by(self, state: State) -> bool:
        """Whether a compiled scheduler of the run is this one. Composer hides it in a function: call them all."""
        self._called = False
        for scheduler in state.schedulers:
            for function in getattr(scheduler, 'lr_lambdas', ()):
                function(scheduler.last_epoch)
        return self._called


def format_phases(schedule: Schedule, unit: TimeUnit, t_end: float) -> str:
    """A schedule as a table of text: one line per phase of a run that ends at ``t_end``.

    Args:
        schedule: What to show.
        unit: Unit of its times.
        t_end: End of the run.
    """
    rows = [('phase', f'from [{unit.value}]', f'to [{unit.value}]', 'start', 'end', 'shape')]
    rows += [
        (span.name, f'{span.begin:,.10g}', f'{span.until:,.10g}', f'{span.start:.4g}', f'{span.end:.4g}', span.shape)
        for span in schedule.spans(t_end)
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *numbers, shape in rows:
        cells = [name.ljust(widths[0]), *(n.rjust(w) for n, w in zip(numbers, widths[1:], strict=False)), shape]
        lines.append('  ' + '  '.join(cells))
    return '\n'.join(lines)


def _parse_time(key: str, value: str | Time, *, dur: bool) -> Time:
    units = 'tok, ba, sp or dur' if dur else 'tok, ba or sp'
    try:
        time = Time.from_input(value)
    except (ValueError, TypeError, OverflowError, RuntimeError):
        example = '1000ba'
        raise ValueError(f'{key}={value!r} is not a time string; write a number and {units}: {example!r}') from None
    if time.unit == TimeUnit.DURATION and not dur:
        raise ValueError(
            f'{key}={_text(value)}: dur is a fraction of max_duration, and the end of a continual run moves; extending '
            f'it would reshape steps already taken. Write {key} in {units}'
        )
    if time.unit not in {*_ABSOLUTE_UNITS, TimeUnit.DURATION}:
        raise ValueError(f'{key}={_text(value)} is in {time.unit.value}; write {key} in {units}')
    if not (math.isfinite(time.value) and time.value >= 0):
        raise ValueError(f'{key}={_text(value)} must be a time of at least 0')
    return time


def _run_end(max_duration: str | Time, dataloader_len: int | Time | None) -> tuple[float, TimeUnit]:
    duration = Time.from_input(max_duration)
    if duration.unit in _ABSOLUTE_UNITS:
        return duration.value, duration.unit
    if duration.unit != TimeUnit.EPOCH:
        raise ValueError(
            f'max_duration={_text(max_duration)} is in {duration.unit.value}; write it in tok, ba, sp or ep'
        )
    if dataloader_len is None:
        raise ValueError(
            f'max_duration={_text(max_duration)} is in epochs and the dataloader has no length: '
            'write it in tok, ba or sp'
        )
    return int(dataloader_len) * duration.value, TimeUnit.BATCH


def _length(time: Time, t_end: float, ssr: float) -> float:
    # max_duration is scaled already, and with it every fraction of it
    return time.value * t_end if time.unit == TimeUnit.DURATION else time.value * ssr


def _text(time: str | Time) -> str:
    return repr(time.to_timestring() if isinstance(time, Time) else time)
