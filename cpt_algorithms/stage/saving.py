# SPDX-License-Identifier: Apache-2.0
"""Nothing broken is ever saved: losses and weights that are no numbers, and disks that are full, end a run in time."""

import errno
import re
import shutil
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from composer.callbacks import CheckpointSaver
from composer.core import State
from composer.utils import dist, format_name_with_dist_and_time
from llmfoundry.callbacks import HuggingFaceCheckpointer
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from cpt_algorithms.files import nearest_existing
from cpt_algorithms.formatting import one_line

__all__ = ['StoppedError', 'check_loss', 'disk_problem', 'guard_saving', 'savers']

_OF_A_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM)

_WHAT_TO_DO = (
    'The same command goes on from there, and comes to the same end if it was not the machine: look at the data, or '
    'start a stage with a run_name and save_folder of its own, with a lower optimizer.lr, a longer t_warmup or '
    'algorithms.gradient_clipping: {clipping_type: norm, clipping_threshold: 1.0}'
)


class StoppedError(RuntimeError):
    """A run that cannot go on: what happened, what is left, what to do, in one line."""


def check_loss(state: State) -> None:
    """Stop on a loss that is no finite number: on all ranks at once, and before anything is saved.

    Costs nothing: Composer has the loss of all ranks here for its loggers.

    Args:
        state: At ``Event.BATCH_END``.

    Raises:
        StoppedError: If it is NaN or infinite.
    """
    for name, loss in state.total_loss_dict.items():
        if not isfinite(loss):
            what = 'the loss' if name == 'loss/train/total' else name
            raise StoppedError(
                f'{what} of batch {state.timestamp.batch.value} is {loss}. {_left(state)}. {_WHAT_TO_DO}'
            )


def guard_saving(state: State) -> None:
    """Have the weights looked at before every checkpoint and export; a disk that is full is said in one line.

    A batch whose loss is finite can leave weights that are not. A checkpoint that could not be written whole is
    removed; the one before stays the latest.

    Args:
        state: At ``Event.FIT_START``, when other callbacks have hooked into saving.

    Cost: one pass over this rank's weights for each checkpoint.
    """
    for callback in state.callbacks:
        if isinstance(callback, CheckpointSaver | HuggingFaceCheckpointer):
            callback._save_checkpoint = _guarded(callback, callback._save_checkpoint, state)


def _guarded(
    saver: CheckpointSaver | HuggingFaceCheckpointer, save: Callable[..., None], state: State
) -> Callable[..., None]:
    def look_and_save(*args: Any, **kwargs: Any) -> None:
        batch = state.timestamp.batch.value
        if not _are_finite(state):
            raise StoppedError(f'the weights after batch {batch} are not finite. {_left(state)}. {_WHAT_TO_DO}')
        try:
            save(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
            if (reason := disk_problem(error)) is None:
                raise
            path = _remove_half(saver, state)
            what = 'checkpoint' if isinstance(saver, CheckpointSaver) else 'export'
            free = shutil.disk_usage(nearest_existing(path.parent)).free
            raise StoppedError(
                f'the {what} of batch {batch} could not be written to {path.parent}, where {free:,} bytes are free: '
                f'{reason}. {_left(state)}. Make room, and run the same command: it goes on from there'
            ) from error

    return look_and_save


def _are_finite(state: State) -> bool:
    """Whether all weights are, on all ranks."""
    shards = [p.to_local() if isinstance(p, DTensor) else p for p in state.model.parameters()]
    # smallest and largest are NaN if any value is, and take no memory
    bounds = [bound.float() for shard in shards if shard.numel() for bound in torch.aminmax(shard.detach())]
    flag = torch.stack(bounds).isfinite().all().int() if bounds else torch.ones((), dtype=torch.int)
    flag = state.device.tensor_to_device(flag)
    dist.all_reduce(flag, 'MIN')
    return bool(flag)


def savers(state: State) -> list[CheckpointSaver]:
    """The callbacks that write a run's checkpoints."""
    return [callback for callback in state.callbacks if isinstance(callback, CheckpointSaver)]


def _left(state: State) -> str:
    """The latest checkpoint, in words."""
    each = [saver.all_saved_checkpoints_to_timestamp for saver in savers(state)]
    saved = [int(time.batch.value) for times in each for time in times.values()]
    return f'The latest checkpoint is that of batch {max(saved)}' if saved else 'There is no checkpoint of this run yet'


def _remove_half(saver: CheckpointSaver | HuggingFaceCheckpointer, state: State) -> Path:
    """Remove a checkpoint that was not written whole (exports appear whole or not at all), and say what it was."""
    if isinstance(saver, HuggingFaceCheckpointer):
        where = Path(saver.save_dir_format_str) / saver.huggingface_folder_name_fstr
        return Path(format_name_with_dist_and_time(str(where), state.run_name, state.timestamp))
    path = Path(next(reversed(saver.all_saved_checkpoints_to_timestamp)))  # noted before it is written
    del saver.all_saved_checkpoints_to_timestamp[str(path)]
    if state.fsdp_sharded_state_dict_enabled:
        path = path.parent
    if dist.get_global_rank() == 0:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return path


def disk_problem(error: BaseException) -> str | None:
    """The reason of a failed write, if it is the disk; None otherwise.

    Args:
        error: Of a file, torch, safetensors, or of all ranks together.
    """
    if isinstance(error, CheckpointException):
        found = (disk_problem(each) for each, _ in error.failures.values())
        return next(filter(None, found), None)
    if isinstance(error, OSError) and error.errno in _OF_A_DISK:
        return error.strerror
    text = one_line(error)
    return text if re.search(r'PytorchStreamWriter|file write failed|os error \d+', text) else None
