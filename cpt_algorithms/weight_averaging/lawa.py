# SPDX-License-Identifier: Apache-2.0
"""``lawa``: the average of the latest k weights, taken an interval nu apart (LAtest Weight Averaging)."""

from collections.abc import Callable
from typing import Any

import torch
from composer.callbacks import CheckpointSaver
from composer.core import State
from composer.loggers import Logger

from cpt_algorithms.checkpoints.links import Written, linking
from cpt_algorithms.weight_averaging.averaged_weights import AveragedWeights
from cpt_algorithms.weight_averaging.functional import weighted_mean, window_weights

__all__ = ['LAWA']


class LAWA(AveragedWeights):
    """Average of the latest ``k`` weights, ``interval`` (the paper's nu) apart: a FIFO window, on local shards.

    ``theta_bar = sum_i w_i theta_i`` over the window, ``w_i = 1/k``, or ``w_i ~ i`` with ``weights: linear`` (the
    newest counts most). Until the window is full, over what it holds.

    The average is called ``lawa``, as in ``metrics/eval/german/lawa/LanguageCrossEntropy``. See
    :class:`~cpt_algorithms.weight_averaging.averaged_weights.AveragedWeights` for evaluation, checkpoints and export.

    Args:
        interval: Time between two snapshots, such as ``1000ba``, ``500000000tok`` or ``0.01dur``.
        k: Length of the window. Default: ``5`` (the papers' released code).
        start: No snapshot is taken before. Default: ``0ba``.
        weights: ``uniform`` or ``linear``. Default: ``uniform``.
        offload: Keep the window in the CPU's memory (pinned where there is a GPU). Default: ``True``.
        resume_after: The checkpoint of a trunk with whose window a branch goes on. Default: ``None``.

    Raises:
        ValueError: If a time is not in ba, tok, sp or dur, ``k`` is below 1 or ``weights`` unknown; under FSDP1.

    Cost: ``k`` copies of the parameters in their own dtype, divided by the ranks that shard them; a snapshot is one
    copy; an evaluation reads the window once and needs two further copies (the average in float32, and the training
    weights that it stands in for) until it ends. A checkpoint holds the window; a sharded one links to the snapshots
    that the one before it holds (:mod:`~cpt_algorithms.checkpoints.links`).

    Source: Kaddour 2022; Sanyal et al. 2023, Algorithm 1.
    """

    key = 'lawa'
    state_key = 'window'
    is_final = True

    def __init__(
        self,
        interval: str,
        k: int = 5,
        start: str = '0ba',
        weights: str = 'uniform',
        offload: bool = True,
        resume_after: str | None = None,
    ) -> None:
        super().__init__(start, interval, resume_after)
        if not isinstance(k, int) or k < 1:
            raise ValueError(f'callbacks.lawa.k={k!r} must be a whole number of at least 1')
        if weights not in ('uniform', 'linear'):
            raise ValueError(f"callbacks.lawa.weights={weights!r} is not possible; use 'uniform' or 'linear'")
        self.k = k
        self.weights = weights
        self.offload = offload
        self._window: dict[int, list[torch.Tensor]] = {}  # by the batch after which it was taken, oldest first
        self._written: Written = {}
        self._mean: list[torch.Tensor] | None = None

    def names(self) -> list[str]:
        """``lawa``, once there is a snapshot."""
        return ['lawa'] if self._window else []

    def average(self, name: str) -> list[torch.Tensor]:
        """This rank's shards of the average: float32, beside the parameters; kept until :meth:`release`."""
        if self._mean is None:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # snapshots are copied to the CPU behind its back
            weights = window_weights(self.weights, len(self._window))
            self._mean = [
                weighted_mean(snapshots, weights, parameter.device)
                for *snapshots, parameter in zip(*self._window.values(), self.shards.tensors(), strict=True)
            ]
        return self._mean

    def release(self) -> None:
        """Free the average; the window stays."""
        self._mean = None

    def device(self) -> torch.device | None:
        """Where snapshots live."""
        return torch.device('cpu') if self.offload else None

    def _place(self, tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        device = self.device() or parameter.device
        pinned = device.type == 'cpu' and parameter.device.type == 'cuda'
        return torch.empty_like(tensor, device=device, pin_memory=pinned).copy_(tensor, non_blocking=pinned)

    def update(self, state: State) -> None:
        """Take a snapshot; the oldest of a full window leaves it."""
        parameters = self.shards.tensors()
        if len(self._window) == self.k:
            snapshot = self._window.pop(next(iter(self._window)))
            for kept, parameter in zip(snapshot, parameters, strict=True):
                kept.copy_(parameter, non_blocking=True)
        else:
            snapshot = [self._place(parameter, parameter) for parameter in parameters]
        batch = self.time(state.timestamp, 'ba')
        # of a trainer by hand whose time was set back
        self._window.pop(batch, None)
        self._square_sums.pop(str(batch), None)
        self._written.pop(f'ba{batch}', None)
        self._window[batch] = snapshot
        self.release()

    def saved(self) -> tuple[dict[str, list[torch.Tensor]], dict[str, Any]]:
        """The window, oldest first, and how it was taken."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        window = {str(batch): snapshot for batch, snapshot in self._window.items()}
        return window, {'interval': str(self.interval), 'weights': self.weights}

    def restore(self, saved: dict[str, list[torch.Tensor]], settings: dict[str, Any], state: State) -> list[str]:
        """Take back the window; of a longer one than now, the newest stay."""
        interval = str(self.interval)
        if settings['interval'] != interval:
            return [
                f'the window was taken every {settings["interval"]}, now every {interval}; it starts afresh from here'
            ]
        for batch in sorted(saved, key=int)[-self.k :]:
            placed = zip(saved[batch], self.shards.tensors(), strict=True)
            self._window[int(batch)] = [self._place(tensor, parameter) for tensor, parameter in placed]
        return []

    def fit_start(self, state: State, logger: Logger) -> None:
        """Have sharded checkpoints link to the snapshots that the one before holds."""
        super().fit_start(state, logger)
        # to object storage and loggers Composer uploads just the one file of each rank that it knows; that of W&B says
        # that it can, and does not unless it is told to
        uploads = [each for each in logger.destinations if each.can_upload_files()]
        if any(getattr(each, '_log_artifacts', True) for each in uploads):
            return
        for saver in state.callbacks:
            if isinstance(saver, CheckpointSaver) and saver.remote_uploader is None:
                saver._save_checkpoint = self._linked(saver._save_checkpoint)

    def _linked(self, save: Callable[..., None]) -> Callable[..., None]:
        begin = f'state.callbacks.{type(self).__qualname__}.{self.state_key}.'

        def snapshot_of(key: str) -> str | None:
            return f'ba{key.removeprefix(begin).partition(".")[0]}' if key.startswith(begin) else None

        def save_linked(*args: Any, **kwargs: Any) -> None:
            with linking(snapshot_of, self._written):
                save(*args, **kwargs)

        return save_linked
