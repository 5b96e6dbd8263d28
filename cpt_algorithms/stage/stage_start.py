# SPDX-License-Identifier: Apache-2.0
"""``stage_start``: a stage obeys its own YAML from its first optimizer step; a restart inside it changes nothing."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist, format_name_with_dist
from llmfoundry.callbacks import HuggingFaceCheckpointer
from torch.distributed.fsdp import FSDPModule

from cpt_algorithms.checkpoints.exports import export_atomically
from cpt_algorithms.checkpoints.guard import guard_loading
from cpt_algorithms.checkpoints.save_folder import weights_in
from cpt_algorithms.duration import Duration
from cpt_algorithms.files import exists
from cpt_algorithms.ranks import on_rank_zero
from cpt_algorithms.replay.labels import label_every_token_of
from cpt_algorithms.replay.replay_text import ReplayTextDataset
from cpt_algorithms.schedulers.phase_scheduler import PhaseScheduler
from cpt_algorithms.stage.foundry_keys import YAML_KEYS
from cpt_algorithms.stage.model_card import write_card
from cpt_algorithms.stage.record import read_record
from cpt_algorithms.stage.rehearsal import pass_on_generation_config, rehearse_run
from cpt_algorithms.stage.restart_checks import restart_problem, write_record
from cpt_algorithms.stage.saving import StoppedError, check_loss, guard_saving, savers
from cpt_algorithms.stage.stage import KEEP_OPTIMIZER_IGNORE_KEYS, Stage

__all__ = ['StageStart']

log = logging.getLogger(__name__)

_LOAD_LINES = {
    'reset': 'load_weights_only: true',
    'keep': f'load_weights_only: false, load_ignore_keys: [{", ".join(KEEP_OPTIMIZER_IGNORE_KEYS)}]',
}


class StageStart(Callback):
    """The learning-rate-on-load contract, checked.

    A *stage* starts from the weights of a parent checkpoint at time 0. Whatever the parent's base learning rate, weight
    decay or schedule was, and whether its optimizer state is dropped or kept, the first optimizer step uses this YAML's
    values: ``lr``, ``initial_lr``, the scheduler's base and every other hyperparameter of every group are set back to
    what the YAML says after loading, and compared once more as the first batch starts, which a log line reports.

    A *restart* of the stage (``autoresume: true``) changes nothing. llm-foundry hands its YAML to this callback, which
    keeps it in ``stage.json`` of the save folder and compares it by the rule of
    :mod:`~cpt_algorithms.stage.identity`; a checkpoint of another run is refused, too.

    Checkpoints are looked at before they are loaded, and exports of ``hf_checkpointer`` appear whole or not at all,
    each with a model card and the recipe that made it.
    FSDP2 on CPU sums the gradients of the ranks; here it averages them, as it does on GPUs.

    A loss that is not finite stops the run before anything is saved, and so do weights that are not. Evaluations take
    no random numbers from training.

    It also refuses, before the first batch: a budget that needs more data than there is; training from batch 0 into a
    folder that holds checkpoints; algorithms that keep tensors in their state under FSDP (every rank would be given
    rank 0's shard on resume).

    Args:
        optimizer_state: ``reset`` drops the parent's optimizer state (the papers' setting; ``load_weights_only: true``
            in the YAML), ``keep`` goes on with it (``load_ignore_keys`` as in ``KEEP_OPTIMIZER_IGNORE_KEYS``).
            Default: ``reset``.
        trust_checkpoint: Whether checkpoints may run code of their own when they are loaded, the parent's as well as
            those that the run resumes from. Otherwise one that could is refused, and so is a damaged one. Default:
            ``False``.
        model_changes: Settings of the model, such as ``attn_config.rope_theta``, that are meant to differ from the
            parent's; preflight refuses others. Default: none.
        train_config: The YAML, which llm-foundry gives. Without it, in a trainer made by hand, a restart compares only
            the run's name, its optimizer and its rates. Default: ``None``.

    Raises:
        ValueError: On any of the above, with the YAML lines that are right.
        StoppedError: On a loss or weights that are not finite, and if a checkpoint or export cannot be written.

    Cost: a pass over the weights for each checkpoint.
    """

    def __init__(
        self,
        optimizer_state: str = 'reset',
        trust_checkpoint: bool = False,
        model_changes: Sequence[str] = (),
        train_config: Mapping[str, Any] | None = None,
    ) -> None:
        if optimizer_state not in _LOAD_LINES:
            raise ValueError(
                f"callbacks.stage_start.optimizer_state={optimizer_state!r} is not possible; use 'reset' or 'keep'"
            )
        if not isinstance(trust_checkpoint, bool):
            raise ValueError(
                f'callbacks.stage_start.trust_checkpoint={trust_checkpoint!r} is not possible; use true or false'
            )
        self.optimizer_state = optimizer_state
        self.trust_checkpoint = trust_checkpoint
        self._hyperparameters: list[list[dict[str, Any]]] = []
        self._yaml = train_config
        self._stage: Stage | None = None
        self._loaded: str | None = None
        self._state: State | None = None
        self._random: AbstractContextManager | None = None
        self._checked = False

    def state_dict(self) -> dict[str, Any]:
        """Which run this is. Called just before a checkpoint is written."""
        assert self._state is not None, 'Event.INIT comes first'
        _refuse_rank0_tensors(self._state)
        return {'run_name': self._state.run_name}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember what was saved; Event.AFTER_LOAD judges it."""
        self._loaded = state['run_name']

    def init(self, state: State, logger: Logger) -> None:
        """Keep the state, which ``state_dict`` is not given; have loading and exporting done with care."""
        self._state = state
        guard_loading(self.trust_checkpoint)
        for exporter in state.callbacks:
            if isinstance(exporter, HuggingFaceCheckpointer):
                exporter._save_checkpoint = partial(export_atomically, exporter)  # pyright: ignore[reportAttributeAccessIssue]
                name, add = Path(exporter.huggingface_folder_name_fstr).name, exporter.save_additional_contents
                vars(exporter)['save_additional_contents'] = partial(self._add_card, exporter, name, add)
        pass_on_generation_config(state)

    def _add_card(
        self,
        exporter: HuggingFaceCheckpointer,
        raw: str,
        add: Callable[..., None],
        state: State,
        logger: Logger,
        save_dir: str,
    ) -> None:
        """Put the card and the recipe into an export before anybody sees it; a trainer made by hand has none.

        ``raw`` is what the folder of raw weights is called, and ``add`` what else is put there.
        """
        add(state, logger, save_dir)
        folder = (self._yaml or {}).get('save_folder')
        record = read_record(format_name_with_dist(str(folder), state.run_name)) if folder else None
        if record is not None:
            name = Path(exporter.huggingface_folder_name_fstr).name.lstrip('.')
            write_card(Path(save_dir), record, state.timestamp.batch.value, name.removeprefix(raw).removeprefix('-'))

    def before_load(self, state: State, logger: Logger) -> None:
        """Compare this run with the one in its folder; note what the YAML says of every parameter group."""
        self._stage = self._read_yaml()
        if self._stage is not None:
            on_rank_zero(partial(_refuse_another_run, self._stage))
        label_every_token_of(state)
        self._hyperparameters = [
            [{key: value for key, value in group.items() if key != 'params'} for group in optimizer.param_groups]
            for optimizer in state.optimizers
        ]

    def after_load(self, state: State, logger: Logger) -> None:
        """Put the YAML's values back at a stage's start; insist on them at a restart."""
        _check_save_folder(state)
        if state.timestamp.batch.value or state.timestamp.epoch.value:
            self._check_restart(state)
        elif state.load_path is not None:
            self._start_from_parent(state)
        elif self.optimizer_state == 'keep':
            raise ValueError(
                'callbacks.stage_start.optimizer_state is keep, but there is no load_path to keep one from'
            )
        if self._stage is not None:
            on_rank_zero(partial(_keep_record, self._stage, state.timestamp.batch.value > 0))
        for scheduler in state.schedulers:
            # torch's LambdaLR; a sharded load with the wrong load_ignore_keys leaves this list empty
            scheduler.base_lrs = [group['initial_lr'] for group in scheduler.optimizer.param_groups]

    def _read_yaml(self) -> Stage | None:
        """The YAML as a stage; None under the recipe, which has compared it before and wrote the record."""
        if self._yaml is None or 'datasets_built' in self._yaml['callbacks']:
            return None
        given = {key: value for key, value in self._yaml.items() if key in YAML_KEYS and value is not None}
        if loaders := self._yaml.get('eval_loaders'):
            given['eval_loader'] = loaders
        stage = Stage.from_yaml(given)
        return stage if stage.save_folder and stage.run_name else None

    def _start_from_parent(self, state: State) -> None:
        for optimizer, groups in zip(state.optimizers, self._hyperparameters, strict=True):
            if self.optimizer_state == 'reset':
                # also what a sharded load leaves behind when it ignores the optimizer: step 1 and zero moments
                optimizer.state.clear()
            elif not _has_moments(optimizer):
                raise ValueError(
                    "callbacks.stage_start.optimizer_state is keep, but the parent's optimizer state was not loaded; "
                    'set ' + _LOAD_LINES['keep']
                )
            for group, values in zip(optimizer.param_groups, groups, strict=True):
                group.update(values)

    def _check_restart(self, state: State) -> None:
        if self._loaded != state.run_name and not self._is_renamed(state):
            parent = 'a run without stage_start' if self._loaded is None else f'run {self._loaded!r}'
            raise ValueError(
                f'{state.load_path} was loaded whole, at batch {state.timestamp.batch.value} of {parent}: its learning '
                f'rate, time and data position would go on in {state.run_name!r}. To start a stage from it, set '
                f'{_LOAD_LINES[self.optimizer_state]}, and a save_folder of its own'
            )
        changed = [
            f'{key}: {group.get(key)} -> {value}'
            for optimizer, groups in zip(state.optimizers, self._hyperparameters, strict=True)
            for group, values in zip(optimizer.param_groups, groups, strict=True)
            for key, value in values.items()
            if key != 'lr' and _plain(group.get(key)) != _plain(value)
        ]
        if any(isinstance(callback, PhaseScheduler) for callback in state.callbacks) and not changed:
            # stock schedulers lag one batch behind, so that only ours can be compared with the time
            for scheduler in state.schedulers:
                for group, alpha in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
                    planned = group['initial_lr'] * alpha(0)
                    if abs(group['lr'] - planned) > 1e-9 * group['initial_lr']:
                        changed.append(f'lr of batch {state.timestamp.batch.value}: {group["lr"]:g} -> {planned:g}')
        if changed:
            raise ValueError(
                f'run {state.run_name!r} was saved with other settings (' + '; '.join(dict.fromkeys(changed)) + '). '
                'A restart changes nothing: restore them, or start a new stage from the checkpoint, with a run_name '
                'and save_folder of its own'
            )

    def _is_renamed(self, state: State) -> bool:
        """Whether what was loaded lies in the run's own folder, whose ``stage.json`` was compared with the YAML."""
        if self._yaml is None:
            return False
        folder = format_name_with_dist(str(self._yaml.get('save_folder')), state.run_name)
        is_own = os.path.abspath(os.path.dirname(state.load_path or '')) == os.path.abspath(folder)
        return on_rank_zero(lambda: is_own and exists(f'{folder}/stage.json'))

    def fit_start(self, state: State, logger: Logger) -> None:
        """Refuse what would only show after hours."""
        rehearse_run(state)
        _refuse_rank0_tensors(state)
        _average_gradients(state)
        guard_saving(state)
        dataset = _train_dataset(state)
        if isinstance(dataset, ReplayTextDataset) and state.max_duration is not None:
            duration = Duration.parse('max_duration', state.max_duration.to_timestring())
            batches = duration.batches(dataset.global_batch_size, dataset.max_seq_len)
            passes = int(duration.value) * dataset.slots_per_pass
            try:
                dataset.check_budget(passes if batches is None else batches * dataset.global_batch_size)
            except ValueError as error:  # of a branch, which begins where its trunk had read to
                raise StoppedError(str(error)) from None

    def batch_start(self, state: State, logger: Logger) -> None:
        """At the first batch of a stage, compare what the optimizer is about to use with the YAML."""
        dataset = _train_dataset(state)
        if isinstance(dataset, ReplayTextDataset) and not dataset.is_packed:
            try:  # how many rows of text a budget of tokens needs is seen only now
                dataset.check_budget(state.timestamp.sample.value + dataset.global_batch_size)
            except ValueError as error:
                raise StoppedError(f'after batch {state.timestamp.batch.value}, {error}') from None
        if self._checked:
            return
        self._checked = True
        if state.timestamp.batch.value:
            return
        multiplier = [f(0) for scheduler in state.schedulers for f in scheduler.lr_lambdas]
        for optimizer, groups in zip(state.optimizers, self._hyperparameters, strict=True):
            for group, values, alpha in zip(optimizer.param_groups, groups, multiplier, strict=True):
                planned = {**values, 'lr': values['initial_lr'] * alpha}
                wrong = [
                    f'{k}={group.get(k)} instead of {v}'
                    for k, v in planned.items()
                    if _plain(group.get(k)) != _plain(v)
                ]
                if wrong:
                    raise RuntimeError(f'the first optimizer step would not obey the YAML: {"; ".join(wrong)}')
            first = optimizer.param_groups[0]
            log.info(
                f'stage start: first step at lr={first["lr"]:g} (base {first["initial_lr"]:g}), '
                f'weight_decay={first.get("weight_decay", 0):g}, optimizer state '
                + ('kept' if self.optimizer_state == 'keep' else 'fresh')
                + (f', parent {state.load_path}' if state.load_path else ', no checkpoint loaded')
            )

    def batch_end(self, state: State, logger: Logger) -> None:
        """Stop on a loss that is no number."""
        check_loss(state)

    def eval_start(self, state: State, logger: Logger) -> None:
        """Keep the random numbers, of which the iterator of a loader takes one."""
        self._random = torch.random.fork_rng(devices=[])
        self._random.__enter__()

    def eval_end(self, state: State, logger: Logger) -> None:
        """Give them back: what is evaluated, and when, changes no training."""
        if self._random is not None:
            self._random.__exit__(None, None, None)
            self._random = None


def _plain(value: Any) -> Any:
    # betas come back from some checkpoints as a list
    return list(value) if isinstance(value, tuple) else value


def _train_dataset(state: State) -> Any:
    return getattr(state.train_dataloader, 'dataset', None)


def _refuse_another_run(stage: Stage) -> None:
    before = read_record(stage.folder)
    if before is not None and None in (before.config.fsdp_config, stage.fsdp_config):
        # which llm-foundry drops on one process
        stage = stage.but(fsdp_config=before.config.given.get('fsdp_config'))
    if problem := restart_problem(stage):
        raise ValueError(problem)


def _keep_record(stage: Stage, resumes: bool) -> None:
    before = read_record(stage.folder)
    if before is None or not resumes or before.config.max_duration != stage.max_duration:  # which may be extended
        write_record(stage, resumes)


def _average_gradients(state: State) -> None:
    """Divide what FSDP2 takes for a mean of gradients by the number of ranks, where the backend gives their sum.

    torch asks for a mean, which gloo (on CPU) answers with the sum in torch 2.7. Adam hides it, but not from gradient
    clipping, ``eps``, or another number of ranks.
    """
    if not state.fsdp_enabled or state.device.name != 'cpu' or dist.get_world_size() == 1:
        return
    mean = torch.empty(1)
    ones = torch.ones(dist.get_world_size())
    torch.distributed.reduce_scatter_tensor(mean, ones, op=torch.distributed.ReduceOp.AVG)
    if (factor := mean.item()) != 1:

        def divide(gradients: torch.Tensor) -> None:
            gradients.div_(factor)

        for module in state.model.modules():
            if isinstance(module, FSDPModule):
                module.set_all_reduce_hook(divide)


def _refuse_rank0_tensors(state: State) -> None:
    """Composer saves an algorithm's state from rank 0 only, so a sharded tensor in it is lost without an error."""
    if not state.fsdp_enabled:
        return
    for algorithm in state.algorithms:
        pending = list(algorithm.state_dict().values())
        while pending:
            value = pending.pop()
            if isinstance(value, torch.Tensor):
                raise ValueError(
                    f'algorithm {type(algorithm).__name__} keeps tensors in its state, of which Composer saves rank '
                    "0's shard only: every rank would resume with it. Use a callback (this library's ema, lawa) instead"
                )
            pending += value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []


def _has_moments(optimizer: torch.optim.Optimizer) -> bool:
    return any(
        bool(value.abs().max() > 0)
        for values in optimizer.state.values()
        for key, value in values.items()
        if key != 'step' and isinstance(value, torch.Tensor) and value.numel()
    )


def _check_save_folder(state: State) -> None:
    """A run at batch 0 must not write over checkpoints; a sharded one would, without autoresume."""
    if state.timestamp.batch.value:
        return
    for saver in savers(state):
        if not saver.overwrite:
            folder = format_name_with_dist(saver.folder, state.run_name)
            if found := [name for name in weights_in(folder) if not name.startswith('huggingface/')]:
                raise ValueError(
                    f'save_folder {folder} holds checkpoints already ({found[0]}), and this '
                    'run would start at batch 0 beside them. Set autoresume: true to go on from the latest checkpoint, '
                    'or choose another save_folder'
                )
