# SPDX-License-Identifier: Apache-2.0
"""What decides when a run ends is in its checkpoint, so that a kill changes nothing about it."""

import json
from pathlib import Path
from typing import Any

import torch
from composer.callbacks import EarlyStopper
from composer.core import Callback, State, Timestamp
from composer.loggers import Logger

from cpt_algorithms.checkpoints.errors import UnsafeCheckpointError
from cpt_algorithms.checkpoints.open import state_of, time_of
from cpt_algorithms.checkpoints.save_folder import batch_of
from cpt_algorithms.duration import Duration
from cpt_algorithms.stage.record import has_reached

__all__ = ['Ending', 'has_ended']


class Ending(Callback):
    """Saves that a run was stopped, by whichever callback, and what Composer's ``early_stopper`` waits since.

    Composer keeps neither: a restart would begin its patience anew, or train on after the end.

    Args:
        max_duration: Of the YAML; who stops a run changes that of the state.
    """

    def __init__(self, max_duration: str) -> None:
        self.max_duration = max_duration
        self._state: State | None = None

    def init(self, state: State, logger: Logger) -> None:
        """Keep the state, which ``state_dict`` is not given."""
        self._state = state

    @property
    def _stoppers(self) -> list[EarlyStopper]:
        assert self._state is not None, 'Event.INIT comes first'
        return [callback for callback in self._state.callbacks if isinstance(callback, EarlyStopper)]

    def state_dict(self) -> dict[str, Any]:
        """One JSON string: a single leaf in a sharded checkpoint. Empty as long as there is nothing to keep."""
        stoppers, state = self._stoppers, self._state
        assert state is not None and state.max_duration is not None
        is_over = state.timestamp >= state.max_duration
        if not stoppers and not is_over:
            return {}
        best = [
            [float(each.best), int(each.best_occurred.epoch.value), int(each.best_occurred.batch.value)]
            if each.best is not None and each.best_occurred is not None
            else None
            for each in stoppers
        ]
        return {'ending': json.dumps({'ended': self.max_duration if is_over else None, 'best': best})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the patience go on from where it was."""
        if state:
            for stopper, best in zip(self._stoppers, json.loads(state['ending'])['best'], strict=True):
                if best is not None:
                    stopper.best = torch.tensor(best[0])
                    stopper.best_occurred = Timestamp(epoch=best[1], batch=best[2])


def has_ended(checkpoint: str | Path, max_duration: Duration) -> bool:
    """Whether a checkpoint is the last of its run: it has reached its end, or was stopped on the way to it."""
    try:
        kept = json.loads(state_of(checkpoint, 'callbacks', 'Ending').get('ending', '{}'))
    except UnsafeCheckpointError:  # which is refused, or trusted, where it is loaded; its name says the batch
        return has_reached({'ba': batch_of(checkpoint) or 0}, max_duration)
    return kept.get('ended') == str(max_duration) or has_reached(time_of(checkpoint), max_duration)
