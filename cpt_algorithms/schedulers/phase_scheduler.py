# SPDX-License-Identifier: Apache-2.0
"""The Composer side of every schedule here: time strings in, the exact learning rate of every batch out."""

import logging
from collections.abc import Callable
from typing import Any

from composer.core import Callback, State, Time
from composer.loggers import Logger
from composer.optim import ComposerScheduler
from composer.utils import dist

from cpt_algorithms.duration import ABSOLUTE, Duration
from cpt_algorithms.schedulers.functional import Schedule
from cpt_algorithms.schedulers.phases import Phases

__all__ = ['PhaseScheduler']

log = logging.getLogger(__name__)


class PhaseScheduler(ComposerScheduler, Callback):
    """A schedule made of phases, whose only state is the run's time.

    Composer steps its schedulers *before* it moves the time on, so a stock scheduler trains batch k with the value for
    the start of batch k - 1. This one is a callback too, and puts itself in front of the run's callbacks when Composer
    compiles it: when fitting starts (a checkpoint is loaded by then) and after each batch it sets

        ``group['lr'] = group['initial_lr'] * multiplier(schedule, time)``

    for every parameter group. Batch k is trained with exactly the value for the time at which it starts; checkpoints
    and ``LRMonitor``, which reports the learning rate of the batch to come, hold that same number.

    Args:
        function: Makes the schedule, from ``times`` as numbers in the unit of the run and ``values``.
        times: The schedule's time strings, by key.
        dur: Whether times may be in ``dur``, the fraction of ``max_duration``. If not, ``function`` takes the end of
            the run as ``t_end``. Default: ``True``.
        values: What else ``function`` takes.

    Raises:
        ValueError: If a time is not a time string in tok, ba, sp or ``dur`` where allowed, if its own times disagree
            about the unit, or for whatever ``function`` refuses in every run. ``fit`` and ``phases`` also refuse a unit
            that is not that of ``max_duration``, and phases longer than the run.
    """

    def __init__(
        self, function: Callable[..., Schedule], times: dict[str, str | Time], *, dur: bool = True, **values: Any
    ) -> None:
        self._function, self._values, self._dur = function, values, dur
        self._times = {key: _parse(key, value, dur) for key, value in times.items()}
        self._ssr = 1.0
        self._started = False
        self._called = False
        self._built: tuple[Any, Phases] | None = None

        absolute = {time.unit for time in self._times.values()} - {'dur'}
        if len(absolute) > 1:
            given = ', '.join(f"{key}='{time}'" for key, time in self._times.items())
            raise ValueError(f'{given}: use one unit for all, that of max_duration')
        # Refuse now what no run could make right. Build for the run that forgives most: whole and fractional times all
        # fit a very long one, unless the schedule's own end is fixed; then a very short run makes the fractional ones
        # vanish.
        t_max = self._times.get('t_max')
        self._schedule(1e-6 if t_max and t_max.unit != 'dur' else 1e15 if absolute else 1.0, 1.0)

    @property
    def arguments(self) -> dict[str, str]:
        """Its arguments as text: a restart compares them with those in its checkpoint."""
        return {key: str(value) for key, value in {**self._times, **self._values}.items()}

    def _schedule(self, t_end: float, ssr: float) -> Schedule:
        # max_duration is scaled already, and with it every fraction of it
        lengths = {k: t.value * (t_end if t.unit == 'dur' else ssr) for k, t in self._times.items()}
        return self._function(**lengths, **self._values, **({} if self._dur else {'t_end': t_end}))

    def phases(
        self, max_duration: str | Time | Duration, dataloader_len: int | Time | None = None, ssr: float = 1.0
    ) -> Phases:
        """The phases of a run; no ``State`` is needed.

        Args:
            max_duration: Length of the run, as the trainer has it: already scaled by ``ssr``. Its unit is that of the
                phases' times, but ba if it is in epochs.
            dataloader_len: Batches per epoch; only read if ``max_duration`` is in epochs. Default: ``None``.
            ssr: Scale schedule ratio. Times in tok, ba and sp are multiplied by it, so that the value at t is the
                unscaled schedule's at t / ssr; nothing is rounded. Default: ``1.0``.

        Raises:
            ValueError: If a time has another unit, if epochs cannot be converted, or if the phases do not fit.
        """
        duration = Duration.parse('max_duration', _text(max_duration), (*ABSOLUTE, 'ep'))
        t_end, unit = duration.value, duration.unit
        if unit == 'ep':
            if dataloader_len is None:
                what = 'is in epochs and the dataloader has no length: write it in tok, ba or sp'
                raise ValueError(f"max_duration='{duration}' {what}")
            t_end, unit = int(dataloader_len) * t_end, 'ba'
        for key, time in self._times.items():
            if time.unit not in {unit, 'dur'}:
                units = f'{unit} or dur' if self._dur else unit
                raise ValueError(
                    f"{key}='{time}' is in {time.unit}, but max_duration='{duration}': write {key} in {units}"
                )
        return Phases(self._schedule(t_end, ssr), unit, t_end)

    def __call__(self, state: State, ssr: float = 1.0) -> float:
        """The multiplier at ``state.timestamp``.

        The first call of a run is Composer compiling the scheduler: from then on this object is one of the run's
        callbacks.
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
            assert self._built is not None, 'setting the learning rate does'
            log.info('%s, multipliers of the learning rate:\n%s', type(self).__name__, self._built[1])

    def batch_end(self, state: State, logger: Logger) -> None:
        """Set the next batch's learning rate: the time has moved on."""
        self._set_lr(state)

    def _evaluate(self, state: State, ssr: float) -> float:
        assert state.max_duration is not None, 'Composer wants max_duration whenever it calls a scheduler'
        run = (str(state.max_duration), str(state.dataloader_len), ssr)
        if self._built is None or self._built[0] != run:
            self._built = (run, self.phases(state.max_duration, state.dataloader_len, ssr))
        phases = self._built[1]
        return phases.multiplier_at(state.timestamp.get(phases.unit).value)

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


def _parse(key: str, value: str | Time, dur: bool) -> Duration:
    time = Duration.parse(key, _text(value), (*ABSOLUTE, 'dur'))
    if time.unit == 'dur' and not dur:
        raise ValueError(
            f"{key}='{time}': dur is a fraction of max_duration, and the end of a continual run moves; extending "
            f'it would reshape steps already taken. Write {key} in tok, ba or sp'
        )
    return time


def _text(time: Any) -> Any:
    return time.to_timestring() if isinstance(time, Time) else time
