# SPDX-License-Identifier: Apache-2.0
"""``branch_points``: checkpoints from which branches start."""

from collections.abc import Sequence
from typing import Any

from composer.core import Callback, Event, State
from composer.loggers import Logger

from cpt_algorithms.stage.saving import savers

__all__ = ['BranchPoints']


class BranchPoints(Callback):
    """``branch_points: {at: [800, 900]}``: a checkpoint after each of these batches, which stays.

    Whatever ``save_interval`` says; ``save_num_checkpoints_to_keep`` does not count them.

    Args:
        at: Batches of the run.

    Raises:
        ValueError: If one is not a whole number of at least 1.

    Cost: a checkpoint each.
    """

    def __init__(self, at: Sequence[int]) -> None:
        if wrong := [batch for batch in at if not isinstance(batch, int) or batch < 1]:
            raise ValueError(f'callbacks.branch_points.at: {wrong[0]!r} must be a whole number of batches, at least 1')
        self.at = set(at)

    def after_load(self, state: State, logger: Logger) -> None:
        """Have these batches saved, too."""
        for saver in savers(state):
            saver.save_interval = _also_at(self.at, saver.save_interval)

    def batch_start(self, state: State, logger: Logger) -> None:
        """Take what was just saved from those that Composer deletes in their turn."""
        if int(state.timestamp.batch.value) in self.at:
            for saver in savers(state):
                if saver.last_checkpoint_batch == state.timestamp.batch and saver.saved_checkpoints:
                    saver.saved_checkpoints.pop()


def _also_at(batches: set[int], given: Any) -> Any:
    def due(state: State, event: Event) -> bool:
        is_asked_for = event == Event.BATCH_CHECKPOINT and int(state.timestamp.batch.value) in batches
        return is_asked_for or given(state, event)

    return due
