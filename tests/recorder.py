# SPDX-License-Identifier: Apache-2.0
"""A witness inside real runs: what each batch was trained with, a JSON line each. Loaded through ``code_paths``."""

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist, reproducibility
from llmfoundry import registry
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from cpt_algorithms.evaluation.forgetting import Forgetting
from cpt_algorithms.weight_averaging.averaged_weights import AveragedWeights


class Recorder(Callback):
    """Writes ``path.rank<r>``: learning rate, weight decay, rows and loss of every batch; can SIGKILL its process.

    Args:
        path: Where to write; lines are appended.
        kill_at: Kill this process with SIGKILL once this many batches are done.
        weights: Folder for the weights after each batch, whole, as ``<batch>.pt``.
        digests: Also write what random numbers, moments and averages are, of a run of one rank.
    """

    def __init__(
        self, path: str, kill_at: int | None = None, weights: str | None = None, digests: bool = False
    ) -> None:
        self.path = Path(f'{path}.rank{dist.get_global_rank()}')
        self.kill_at = kill_at
        self.weights = None if weights is None else Path(weights)
        self.digests = digests
        self.line: dict = {}

    def batch_start(self, state: State, logger: Logger) -> None:
        batch = int(state.timestamp.batch.value)
        token = int(state.timestamp.token.value)
        self.line = {'batch': batch, 'token': token, 'rows': state.batch['input_ids'][:, :3].tolist()}
        if self.digests:
            averages = [each.state_dict() for each in state.callbacks if isinstance(each, AveragedWeights)]
            self.line['random'] = digest(reproducibility.get_rng_state())
            self.line['moments'] = digest([optimizer.state_dict()['state'] for optimizer in state.optimizers])
            self.line['averages'] = digest(averages)

    def after_backward(self, state: State, logger: Logger) -> None:
        # the last event before the optimizer steps
        groups = [group for optimizer in state.optimizers for group in optimizer.param_groups]
        for key in ('lr', 'initial_lr', 'weight_decay'):
            self.line[key] = [group[key] for group in groups]
        self.line['base_lrs'] = [lr for scheduler in state.schedulers for lr in scheduler.base_lrs]
        steps = [values['step'] for optimizer in state.optimizers for values in optimizer.state.values()]
        self.line['adam_step'] = max((float(step) for step in steps), default=0.0)

    def batch_end(self, state: State, logger: Logger) -> None:
        self.line['loss'] = state.total_loss_dict['loss/train/total'].hex()
        with open(self.path, 'a', encoding='utf-8') as file:
            file.write(json.dumps(self.line) + '\n')
        if self.weights is not None:
            weights = {
                name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in state.model.named_parameters()
            }
            if dist.get_global_rank() == 0:
                self.weights.mkdir(parents=True, exist_ok=True)
                torch.save(
                    {plain_name(name): p.detach() for name, p in weights.items()},
                    self.weights / f'{int(state.timestamp.batch.value)}.pt',
                )
        if self.kill_at is not None and state.timestamp.batch.value >= self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def plain_name(name: str) -> str:
    """As checkpoints have it, without what DDP and activation checkpointing put there."""
    return name.removeprefix('module.').replace('_checkpoint_wrapped_module.', '')


def digest(found: Any) -> str:
    """A hash of all values in a nested structure."""
    values = [value.cpu() if isinstance(value, torch.Tensor) else value for value in tree_leaves(found)]
    return hashlib.sha256(
        b''.join(np.ascontiguousarray(v).tobytes() if hasattr(v, 'shape') else repr(v).encode() for v in values)
    ).hexdigest()


class LeaveOut(Callback):
    """Leaves a part of the state as it was before a checkpoint was loaded; comes after ``stage_start`` in a YAML."""

    PART: str | None = None  # for tests, in which the YAML must stay as it is

    def before_load(self, state: State, logger: Logger) -> None:
        self.rates = [group['lr'] for optimizer in state.optimizers for group in optimizer.param_groups]
        self.random: list | None = None
        owners = {
            'rows': [state.train_dataloader.dataset],
            'averages': [each for each in state.callbacks if isinstance(each, AveragedWeights)],
            "parent's losses": [each for each in state.callbacks if isinstance(each, Forgetting)],
        }
        for owner in owners.get(self.PART or '', []):
            owner.load_state_dict = lambda given: None

    def after_load(self, state: State, logger: Logger) -> None:
        for optimizer in state.optimizers if state.timestamp.batch.value else ():
            if self.PART == 'moments':
                optimizer.state.clear()
            if self.PART == 'learning rate':
                for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
                    group['lr'] = rate

    def fit_start(self, state: State, logger: Logger) -> None:
        if self.PART == 'random numbers' and state.timestamp.batch.value:
            self.random = reproducibility.get_rng_state()

    def batch_start(self, state: State, logger: Logger) -> None:
        if self.random is not None:
            reproducibility.load_rng_state(self.random)
            self.random = None


class Stop(Callback):
    """Dies at the end of a batch, before its checkpoint.

    Args:
        at: Number of batches done.
    """

    AT: int | None = None  # instead, for tests in which the YAML must stay as it is

    def __init__(self, at: int) -> None:
        self.at = at

    def batch_end(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value == (self.AT or self.at):
            raise RuntimeError('stopped')


class Moments(Callback):
    """Says in the one byte of ``path.rank<r>`` what ``ema`` and ``lawa`` are at: ``t``ake weights into account, ``e``valuate.

    Args:
        path: The file; ``-`` stands in it otherwise.
    """

    def __init__(self, path: str) -> None:
        self.file = os.open(f'{path}.rank{dist.get_global_rank()}', os.O_WRONLY | os.O_CREAT)

    def after_load(self, state: State, logger: Logger) -> None:
        def says(method, before: bytes, after: bytes):
            def said(*args):
                os.pwrite(self.file, before, 0)
                result = method(*args)
                os.pwrite(self.file, after, 0)
                return result

            return said

        for average in (each for each in state.callbacks if isinstance(each, AveragedWeights)):
            average.update = says(average.update, b't', b'-')
            average._copy_in = says(average._copy_in, b'e', b'e')
            average._copy_out = says(average._copy_out, b'e', b'-')


def read(path: Path | str, rank: int = 0) -> dict[int, dict]:
    """Lines by batch; a batch trained twice (after a kill) must have been trained identically."""
    lines: dict[int, dict] = {}
    for text in Path(f'{path}.rank{rank}').read_text().splitlines():
        line = json.loads(text)
        if line['batch'] in lines:
            assert line == lines[line['batch']], 'a batch was trained again, and differently'
        lines[line['batch']] = line
    return lines


if 'recorder' not in registry.callbacks:
    registry.callbacks.register('recorder', func=Recorder)
    registry.callbacks.register('stop', func=Stop)
    registry.callbacks.register('leave_out', func=LeaveOut)
    registry.callbacks.register('moments', func=Moments)
