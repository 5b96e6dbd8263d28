# SPDX-License-Identifier: Apache-2.0
"""What ``ema`` and ``lawa`` share: when to look, evaluation of the average, saving, restoring and exporting it.

A callback and not an algorithm: Composer keeps the state of algorithms as one object of rank 0, of which every rank
would be given rank 0's shard, and that of callbacks tensor by tensor.
"""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from math import floor, isfinite
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, Evaluator, State, Time, Timestamp, TimeUnit
from composer.loggers import Logger
from composer.utils.parallelism import FSDP2Config
from llmfoundry.callbacks import HuggingFaceCheckpointer
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load

from cpt_algorithms.checkpoints.exports import export_atomically
from cpt_algorithms.checkpoints.open import entry_of, read_metadata, safe_globals
from cpt_algorithms.duration import Duration, per_batch_of
from cpt_algorithms.files import is_remote
from cpt_algorithms.weight_averaging.local_shards import LocalShards

__all__ = ['AveragedWeights']

log = logging.getLogger(__name__)

copy_ = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]


def parse_time(key: str, value: Any, may_be_zero: bool = False) -> Duration:
    """Read a time in ba, tok, sp or dur."""
    time = Duration.parse(key, value, ('ba', 'tok', 'sp', 'dur'))
    if not time.value and not may_be_zero:
        raise ValueError(f'{key}={value!r} must be more than nothing')
    return time


def resolve_time(time: Duration, total: Duration) -> Duration:
    """A ``dur`` in the unit of the whole; at least 1. Others as they are."""
    if time.unit != 'dur':
        return time
    return Duration(max(int(time.value * total.value), 1 if time.value else 0), total.unit)


def total_of(state: State) -> Duration:
    """``max_duration``, in batches if it is in epochs."""
    total = state.max_duration
    assert total is not None, 'fit has begun'
    if total.unit == TimeUnit.EPOCH:
        assert state.dataloader_len is not None, 'replay_text knows its length'
        total = Time.from_batch(int(total.value) * int(state.dataloader_len.value))
    return Duration(int(total.value), total.unit.value)


class _EvaluatorOfAverage(Evaluator):
    """Evaluates whenever another evaluator does, on its data, under ``<its label>/<name of the average>``."""

    def __init__(self, base: Evaluator, name: str) -> None:
        vars(self).update(vars(base))
        self.label = f'{base.label}/{name}'
        self.average_name = name
        # asked afresh every time: other callbacks may change when the base evaluates
        self.eval_interval = lambda state, event: base.eval_interval(state, event)  # pyright: ignore


class _WithLoadPlanner(FSDP2Config):
    """Composer hands a config's ``load_planner`` to torch; that of FSDP2 is a constant ``None``."""

    planner: DefaultLoadPlanner

    @property
    def load_planner(self) -> DefaultLoadPlanner:
        return self.planner


class _SafeReader(FileSystemReader):
    """Torch's, which would unpickle anything for ``.metadata``."""

    def read_metadata(self) -> Metadata:
        return read_metadata(str(self.path))


class AveragedWeights(Callback, ABC):
    """Base of the averages over the trajectory.

    The average never feeds back into training. Every evaluator that the run has gets a twin for every average, which
    runs whenever it does, on the same data, with metrics named ``metrics/<label>/<average>/<metric>``. For each forward
    pass of the twin, the average is copied into the parameters and the training weights are copied back after it, so it
    does not matter what else swaps weights around whole evaluations, and nothing else ever sees the average. Random
    numbers used by the twins are given back: training is bit-identical to a run without averaging.

    The state is part of the run's own checkpoints, as this rank's shards, and is restored at any number of ranks.
    ``hf_checkpointer`` exports the averages whenever it exports the model, to ``<its folder>-<average>``.

    A branch goes on with its trunk's averages: time is counted, and a ``dur`` is a share, as in the trunk.

    Args:
        start: Nothing is averaged before.
        interval: Time between two looks at the weights.
        resume_after: The checkpoint of a trunk, in whose time a branch goes on.

    Raises:
        ValueError: If a time is not in ba, tok, sp or dur; under FSDP1.
    """

    key: str  # the YAML name
    state_key: str  # the key of the saved tensors
    is_final = False  # whether what is saved under a name never changes

    def __init__(self, start: str, interval: str, resume_after: str | None) -> None:
        self.start = parse_time(f'callbacks.{self.key}.start', start, may_be_zero=True)
        self.interval = parse_time(f'callbacks.{self.key}.interval', interval)
        self.resume_after = resume_after
        self._trunk: Duration | None = None  # how long that of a branch is
        self._passed: dict[str, int] = dict.fromkeys(('ba', 'tok', 'sp'), 0)  # in the trunk
        self._state: State | None = None
        self._shards: LocalShards | None = None
        self._loaded: dict[str, Any] | None = None
        self._square_sums: dict[str, float] = {}
        self._evaluating: str | None = None
        self._raw: list[torch.Tensor] | None = None
        self._is_in = False
        self._random: AbstractContextManager | None = None

    # what the two averages do differently

    @abstractmethod
    def names(self) -> list[str]:
        """Averages that exist by now."""

    @abstractmethod
    def average(self, name: str) -> list[torch.Tensor]:
        """This rank's shards of an average: float32, beside the parameters."""

    @abstractmethod
    def update(self, state: State) -> None:
        """Take the current weights into account."""

    @abstractmethod
    def saved(self) -> tuple[dict[str, list[torch.Tensor]], dict[str, Any]]:
        """Lists of shards by name, and whatever else JSON can hold."""

    @abstractmethod
    def restore(self, saved: dict[str, list[torch.Tensor]], settings: dict[str, Any], state: State) -> list[str]:
        """Restore the result of :meth:`saved`; returns the parts that are unused or missing, and why."""

    def should_load(self, name: str) -> bool:
        """Whether shards of this name are worth loading."""
        return True

    def device(self) -> torch.device | None:
        """Where loaded shards go; ``None`` for beside the parameters."""
        return None

    def on_start(self, state: State) -> None:
        """Start has come, whether or not it is time to look; called after every batch, before :meth:`update`."""

    def release(self) -> None:
        """Free what was kept for an evaluation."""

    # when

    @property
    def shards(self) -> LocalShards:
        """The model's parameters on this rank."""
        assert self._shards is not None, 'Event.BEFORE_LOAD comes first'
        return self._shards

    def batch_end(self, state: State, logger: Logger) -> None:
        """Look at the weights if it is time to."""
        before, now = state.previous_timestamp, state.timestamp
        start, interval = self.resolve(self.start, state), self.resolve(self.interval, state)
        if before is None or self.time(before, start.unit) < start.value:
            return
        self.on_start(state)
        first, last = (floor(self.time(time, interval.unit) / interval.value) for time in (before, now))
        if first != last:
            with torch.no_grad():
                self.update(state)
            self._add_evaluators(state)

    def first_update(self, total: Duration, global_batch_size: int, max_seq_len: int) -> int:
        """The batch after which :meth:`batch_end` looks at the weights for the first time, in a run that is no branch.

        The length of the run is not in epochs.
        """
        start, interval = (resolve_time(time, total) for time in (self.start, self.interval))
        begin = start.batches(global_batch_size, max_seq_len)
        per_batch = per_batch_of(interval.unit, global_batch_size, max_seq_len)
        assert begin is not None and per_batch is not None, 'neither is in dur or ep'
        size = int(interval.value)
        return -(-(begin * per_batch // size + 1) * size // per_batch)

    def time(self, at: Timestamp, unit: str) -> int:
        """Time since the run, or the trunk of a branch, began."""
        return int(at.get(unit).value) + self._passed[unit]

    def resolve(self, time: Duration, state: State) -> Duration:
        """A ``dur``, a share of the run or of the trunk of a branch, in a unit that can be counted."""
        return resolve_time(time, self._trunk or total_of(state)) if time.unit == 'dur' else time

    def fit_end(self, state: State, logger: Logger) -> None:
        """Say if there is no average."""
        if not self.names():
            log.warning(
                f'{self.key}: nothing was averaged: start={self.start}, interval={self.interval} did not come within '
                f'{state.max_duration}'
            )

    # evaluation

    def fit_start(self, state: State, logger: Logger) -> None:
        """Evaluate restored averages from the first evaluation on."""
        self._add_evaluators(state)

    def _add_evaluators(self, state: State) -> None:
        labels = {evaluator.label for evaluator in state.evaluators}
        for name in self.names():
            for base in list(state.evaluators):
                if not isinstance(base, _EvaluatorOfAverage) and f'{base.label}/{name}' not in labels:
                    twin = _EvaluatorOfAverage(base, name)
                    state.evaluators.append(twin)
                    state.eval_metrics[twin.label] = deepcopy(state.eval_metrics[base.label])

    def _copy_in(self, name: str) -> None:
        if self._is_in:  # a forward pass that ran out of memory is tried again
            return
        parameters = self.shards.tensors()
        self.shards.reshard()
        with torch.no_grad():
            # whatever can run out of memory comes first
            average = self.average(name)
            if self._raw is None:
                self._raw = [torch.empty_like(parameter) for parameter in parameters]
            copy_(self._raw, parameters)
            self._is_in = True
            copy_(parameters, average)

    def _copy_out(self) -> None:
        if self._is_in:
            assert self._raw is not None
            self.shards.reshard()
            with torch.no_grad():
                copy_(self.shards.tensors(), self._raw)
            self._is_in = False

    @contextmanager
    def swapped_in(self, name: str) -> Iterator[None]:
        """The model holds an average inside, and its own weights again after."""
        try:
            self._copy_in(name)
            yield
        finally:
            self._copy_out()
            self._raw = None

    eval_standalone_start = fit_start  # also if nothing is trained

    def eval_start(self, state: State, logger: Logger) -> None:
        """Find out whether one of our twins is about to run."""
        label = state.dataloader_label
        twins = [e for e in state.evaluators if isinstance(e, _EvaluatorOfAverage) and e.label == label]
        if twins and twins[0].average_name in self.names():
            self._evaluating = twins[0].average_name
            devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
            self._random = torch.random.fork_rng(devices)
            self._random.__enter__()

    def eval_before_forward(self, state: State, logger: Logger) -> None:
        """Average in."""
        if self._evaluating is not None:
            self._copy_in(self._evaluating)

    def eval_after_forward(self, state: State, logger: Logger) -> None:
        """Training weights back."""
        self._copy_out()

    def eval_end(self, state: State, logger: Logger) -> None:
        """Give back the random numbers and the memory."""
        self._evaluating = self._raw = None
        if self._random is not None:
            self._random.__exit__(None, None, None)
            self._random = None

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """Free what was kept for the evaluation."""
        self.release()

    eval_standalone_end = eval_after_all

    # checkpoints

    def init(self, state: State, logger: Logger) -> None:
        """Keep the state, which ``state_dict`` is not given."""
        self._state = state

    def before_load(self, state: State, logger: Logger) -> None:
        """The model is wrapped; a sharded checkpoint will be loaded into what it holds of ours, and not fail else."""
        self._shards = LocalShards(state.model)
        if not state.fsdp_sharded_state_dict_enabled:
            return
        config: Any = state.fsdp_config
        planner = config.load_planner or DefaultLoadPlanner()
        set_up = planner.set_up_planner

        def set_up_planner(state_dict: dict[str, Any], metadata: Any = None, is_coordinator: bool = False) -> None:
            self._fit_to(state_dict, metadata)
            set_up(state_dict, metadata, is_coordinator)

        planner.set_up_planner = set_up_planner
        config.__class__ = _WithLoadPlanner
        config.planner = planner

    def _fit_to(self, state_dict: dict[str, Any], metadata: Metadata) -> None:
        """Make the template of a sharded load ask for just those averages that the checkpoint has."""
        callbacks = state_dict.get('state', {}).get('callbacks', {})
        ours = type(self).__qualname__
        if ours not in callbacks:
            return
        there = metadata.state_dict_metadata
        prefix = f'state.callbacks.{ours}'
        if f'{prefix}.meta' not in there:
            del callbacks[ours]
            if not callbacks:
                del state_dict['state']['callbacks']
            return
        begin, end = f'{prefix}.{self.state_key}.', f'.{next(iter(self.shards.parameters))}'
        names = [key[len(begin) : -len(end)] for key in there if key.startswith(begin) and key.endswith(end)]
        groups: dict[str, Any] = {}
        for name in filter(self.should_load, sorted(names, key=lambda name: (len(name), name))):

            def dtype(parameter: str, name: str = name) -> torch.dtype:
                found = there.get(f'{begin}{name}.{parameter}')
                return getattr(getattr(found, 'properties', None), 'dtype', torch.float32)

            groups[name] = self.shards.empty(dtype, self.device())
        callbacks[ours] = {'meta': '', **({self.state_key: groups} if groups else {})}

    def state_dict(self) -> dict[str, Any]:
        """This rank's shards, and one JSON string."""
        assert self._state is not None, 'Event.INIT comes first'
        assert not self._is_in, 'the model holds an average, and would be saved with it'
        lists, settings = self.saved() if self._shards is not None else ({}, {})
        full = not self._state.fsdp_sharded_state_dict_enabled
        known = self._square_sums if self.is_final else {}
        self._square_sums = {
            name: known[name] if name in known else self.shards.square_sum(tensors) for name, tensors in lists.items()
        }
        settings['square_sum'] = self._square_sums
        settings['at'] = {unit: self.time(self._state.timestamp, unit) for unit in self._passed}
        total = self._state.max_duration
        known = total is not None and (total.unit != TimeUnit.EPOCH or self._state.dataloader_len is not None)
        settings['of'] = str(self._trunk or (total_of(self._state) if known else '0ba'))
        saved: dict[str, Any] = {'meta': json.dumps(settings)}
        if lists:
            saved[self.state_key] = {name: self.shards.to_saved(tensors, full) for name, tensors in lists.items()}
        return saved

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep it until the model is loaded too."""
        self._loaded = state

    def after_load(self, state: State, logger: Logger) -> None:
        """Restore, and say what starts afresh; hook into the export."""
        self._shards = LocalShards(state.model)
        batch = int(state.timestamp.batch.value)
        if not batch and self.resume_after:
            self._loaded = self._read(self.resume_after)
        if self._loaded is not None:
            settings = json.loads(self._loaded['meta'])
            self._passed = {unit: then - int(state.timestamp.get(unit).value) for unit, then in settings['at'].items()}
            if self._passed['ba']:
                self._trunk = Duration.parse('of', settings['of'])
            saved = {
                name: self.shards.from_saved(tensors, f'{self.key} ({name})')
                for name, tensors in self._loaded.get(self.state_key, {}).items()
            }
            if lost := [name for name in settings['square_sum'] if self.should_load(name) and name not in saved]:
                raise ValueError(
                    f"{self.key} ({lost[0]}) was saved for other trainable parameters than this model's: "
                    f'{next(iter(self.shards.parameters))} is not among them'
                )
            for name, tensors in saved.items():
                total, expected = self.shards.square_sum(tensors), settings['square_sum'][name]
                # a model that diverged has averages that are no numbers, and is as it was saved
                if isfinite(expected) and not abs(total - expected) <= 1e-9 * expected:
                    raise RuntimeError(
                        f'{self.key} ({name}) was saved with the sum of squares {expected!r} and loaded with '
                        f'{total!r}: some rank has the shard of another, or the checkpoint is damaged'
                    )
            for complaint in self.restore(saved, settings, state):
                log.warning(f'{self.key}: {complaint}')
            self._loaded = None
            if self.names():
                log.info(f'{self.key}: restored {", ".join(self.names())} at batch {batch}')
        elif batch or self.resume_after:
            where = f'at batch {batch}' if batch else str(self.resume_after)
            log.warning(f'{self.key}: the checkpoint {where} holds no average; it starts afresh from here')
        for exporter in state.callbacks:
            if isinstance(exporter, HuggingFaceCheckpointer):
                self._export_with(exporter)

    def _read(self, checkpoint: str) -> dict[str, Any] | None:
        """The :meth:`state_dict` of a branch's trunk, which its checkpoint does not load; None if there is none."""
        ours = type(self).__qualname__
        if is_remote(checkpoint):
            log.warning(f'{self.key}: {checkpoint} is in object storage, from where a branch takes no averages')
            return None
        if not Path(checkpoint).is_dir():
            with torch.serialization.safe_globals(safe_globals()):
                loaded = torch.load(checkpoint, map_location='cpu', mmap=True, weights_only=True)
            return loaded['state'].get('callbacks', {}).get(ours)
        callbacks: dict[str, Any] = {ours: {}}
        self._fit_to({'state': {'callbacks': callbacks}}, read_metadata(checkpoint))
        if ours not in callbacks:
            return None
        meta = entry_of(checkpoint, f'state.callbacks.{ours}.meta')
        if self.state_key in callbacks[ours]:
            tensors = {self.state_key: callbacks[ours][self.state_key]}
            load({'state': {'callbacks': {ours: tensors}}}, storage_reader=_SafeReader(checkpoint))
        return {**callbacks[ours], 'meta': meta}

    # export

    def _export_with(self, exporter: HuggingFaceCheckpointer) -> None:
        save: Callable[..., None] = exporter._save_checkpoint

        def save_with_averages(*args: Any, **kwargs: Any) -> None:
            save(*args, **kwargs)
            folder = exporter.huggingface_folder_name_fstr
            for name in self.names():
                exporter.huggingface_folder_name_fstr = f'{folder}-{name}'
                try:
                    with self.swapped_in(name):
                        # not `save`, which may be that of another average
                        export_atomically(exporter, *args, **{**kwargs, 'register_to_mlflow': False})
                finally:
                    exporter.huggingface_folder_name_fstr = folder
            self.release()

        exporter._save_checkpoint = save_with_averages
