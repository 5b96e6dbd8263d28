# SPDX-License-Identifier: Apache-2.0
"""The console: one line a batch, with what people read there."""

import sys
import time
from datetime import timedelta
from typing import Any

from composer.core import State
from composer.loggers import ConsoleLogger, Logger
from composer.utils import dist

from cpt_algorithms.formatting import scientific

__all__ = ['ConsoleLine']


class ConsoleLine(ConsoleLogger):
    """Composer's console logger in one line: ``[batch=40/200] loss 3.412, lr 3e-4, 8,120 tokens/s, 0:05:40 left``.

    The recipe uses it in place of Composer's, which prints every metric in a line of its own; all of them go to the
    other loggers as before. The learning rate is that of the first parameter group in this batch. Tokens per second are
    those of all ranks since the last line, without evaluations and saving; the time left includes both. An evaluator
    has a line when it is done.

    Args:
        log_interval: As ``console_log_interval`` of the YAML, in ``ba`` or ``ep``. Default: ``1ba``.
    """

    def __init__(self, log_interval: str = '1ba') -> None:
        super().__init__(log_interval, stream=sys.stderr)
        self._lr = 0.0
        self._last = (0, 0.0)  # tokens and seconds of training at the last line
        self._began = (0.0, 0.0)  # the clock, and the fraction of the run that was done

    def fit_start(self, state: State, logger: Logger) -> None:
        """Note where the run goes on from."""
        self._began = (time.monotonic(), _fraction(state))
        self._last = _trained(state)

    def eval_start(self, state: State, logger: Logger) -> None:
        """Say nothing until the evaluator is done."""
        self.logged_metrics = {}

    def batch_start(self, state: State, logger: Logger) -> None:
        """Note the rate, which is the next batch's when this one ends."""
        self._lr = state.optimizers[0].param_groups[0]['lr']

    def log_to_console(self, data: dict[str, Any], state: State, prefix: str = '', is_train: bool = True) -> None:
        """Print one line.

        Args:
            data: The metrics since the last one.
            state: The state.
            prefix: Not used.
            is_train: Whether it is of training, rather than of an evaluator.
        """
        if dist.get_global_rank():
            return
        if not is_train:
            metrics = (f'{name.rpartition("/")[2]} {float(value):.4g}' for name, value in data.items())
            self._log_to_console(f'{self._get_eval_progress_string(state)}: {", ".join(metrics)}')
            return
        tokens, seconds = _trained(state)
        before, self._last = self._last, (tokens, seconds)
        rate = (tokens - before[0]) / max(seconds - before[1], 1e-9)
        done = _fraction(state)
        started, at = self._began
        left = (time.monotonic() - started) * (1 - done) / max(done - at, 1e-9)
        loss = data.get('loss/train/total')
        said = [
            *([] if loss is None else [f'loss {float(loss):.4g}']),
            f'lr {scientific(self._lr)}',
            f'{rate:,.0f} tokens/s',
            f'{timedelta(seconds=round(left))} left',
        ]
        self._log_to_console(f'{self._get_progress_string(state)} {", ".join(said)}')


def _trained(state: State) -> tuple[int, float]:
    return state.timestamp.token.value, state.timestamp.total_wct.total_seconds()


def _fraction(state: State) -> float:
    elapsed = state.get_elapsed_duration()
    return 0.0 if elapsed is None else elapsed.value
