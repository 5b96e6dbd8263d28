# SPDX-License-Identifier: Apache-2.0
"""``loss_spike``: makes a run's loss jump, to see what averages of its weights make of it. Loaded by ``code_paths``."""

from composer.core import Callback, State
from composer.loggers import Logger
from llmfoundry import registry


class LossSpike(Callback):
    """Multiplies the learning rate of some batches.

    Args:
        at: The first of them.
        batches: How many.
        factor: What with.
    """

    def __init__(self, at: int, batches: int, factor: float) -> None:
        self.span = range(at, at + batches)
        self.factor = factor

    def after_backward(self, state: State, logger: Logger) -> None:
        """The last event before the optimizer's step; the scheduler sets the next batch's rate after it."""
        if int(state.timestamp.batch.value) in self.span:
            for optimizer in state.optimizers:
                for group in optimizer.param_groups:
                    group['lr'] *= self.factor


if 'loss_spike' not in registry.callbacks:
    registry.callbacks.register('loss_spike', func=LossSpike)
