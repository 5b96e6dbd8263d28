# SPDX-License-Identifier: Apache-2.0
"""Branches: runs that start from a checkpoint of a *trunk* in its constant phase, which stays as it is."""

import copy
from collections.abc import Mapping
from typing import Any

from composer.core import TimeUnit

from cpt_algorithms.duration import per_batch_of
from cpt_algorithms.schedulers.phases import phases_of
from cpt_algorithms.stage.form import parse_time

__all__ = ['anneal_branch', 'constant_alpha', 'in_batches']

Config = dict[str, Any]

# Of the trunk's YAML, what says where it keeps things and how it started.
_OF_THE_TRUNK = ('run_name', 'save_folder', 'load_path', 'load_weights_only', 'load_ignore_keys', 'autoresume')


def in_batches(time: str, cfg: Mapping[str, Any], key: str = 'max_duration') -> int:
    """Whole batches that a time takes.

    Args:
        time: In tok, ba or sp; rounded up.
        cfg: A train YAML: its ``global_train_batch_size`` and ``max_seq_len``.
        key: What the time is called in an error. Default: ``max_duration``.

    Raises:
        ValueError: If it is in another unit.
    """
    given = parse_time(key, time)
    for needed in ('global_train_batch_size', 'max_seq_len'):
        if not isinstance(cfg.get(needed), int):
            raise ValueError(f'{needed}={cfg.get(needed)!r} must be a whole number: {key} is counted with it')
    samples = int(cfg['global_train_batch_size'])
    per_batch = {TimeUnit.BATCH: 1, TimeUnit.SAMPLE: samples, TimeUnit.TOKEN: samples * int(cfg['max_seq_len'])}
    if given.unit not in per_batch:
        raise ValueError(f'{key}={time!r} must be in tok, ba or sp')
    return -(-int(given.value) // per_batch[given.unit])


def constant_alpha(cfg: Config, batch: int) -> float:
    """The multiplier of the learning rate after a batch of a run, which must be in a constant phase.

    Args:
        cfg: The run's train YAML.
        batch: Batches that were trained.

    Raises:
        ValueError: If the schedule is not constant there, with the phases; or is not one of this library.
    """
    phases = phases_of(cfg.get('scheduler') or {}, cfg['max_duration'])
    name = cfg['scheduler']['name']
    if phases is None:
        raise ValueError(f'scheduler {name} has no phases that can be looked at; a trunk wants infinite')
    per_batch = per_batch_of(phases.unit, int(cfg['global_train_batch_size']), int(cfg['max_seq_len']))
    assert per_batch is not None, 'phases are in tok, ba or sp'
    # whole batches: where the last one ends, the run does
    time, end = batch * per_batch, in_batches(cfg['max_duration'], cfg) * per_batch
    spans = list(phases.schedule.spans(end))
    for span in spans:
        if span.shape == 'constant' and span.begin <= time <= span.until:
            return phases.multiplier_at(span.begin)
    constant = [f'batches {s.begin / per_batch:g} to {s.until / per_batch:g}' for s in spans if s.shape == 'constant']
    inside = next((span.name for span in spans if span.begin <= time < span.until), 'end')
    raise ValueError(
        f'batch {batch} is in the phase {inside!r} of scheduler.name={name}: '
        'a branch starts where the learning rate is constant, '
        + (' or '.join(constant) if constant else 'and this schedule never is')
        + '. A trunk that only warms up is {name: infinite, t_cooldown: 0tok, alpha_const: 1.0, ...}'
    )


def anneal_branch(
    trunk: Config,
    run_name: str,
    save_folder: str,
    checkpoint: str,
    batch: int,
    t_anneal: str,
    anneal: str = 'exponential',
    alpha_f: float = 0.1,
) -> Config:
    """The YAML of a run that anneals a trunk's learning rate, from a checkpoint of it to the end.

    It is an ordinary stage: it keeps the optimizer's state, starts at the trunk's learning rate, and reads on in the
    trunk's data behind what that has read.

    Args:
        trunk: The trunk's train YAML, resolved or not.
        run_name: Of the branch.
        save_folder: Of the branch.
        checkpoint: A checkpoint of it.
        batch: Batches of the trunk at that checkpoint.
        t_anneal: Length of the branch, in tok, ba or sp.
        anneal: ``exponential``, ``linear``, ``cosine`` or ``1-sqrt``. Default: ``'exponential'``.
        alpha_f: Multiplier at the end; above 0 for ``exponential``. Default: ``0.1``.

    Raises:
        ValueError: If the trunk's learning rate is not constant at that batch, or is as low as ``alpha_f`` already.

    Source: Ibrahim et al. 2024, section 7.2.
    """
    alpha = constant_alpha(trunk, batch)
    if not isinstance(alpha_f, (int, float)) or isinstance(alpha_f, bool):
        raise ValueError(f'alpha_f={alpha_f!r} must be a number')
    if alpha <= alpha_f:
        raise ValueError(
            f'alpha_f={alpha_f}, and the scheduler of the trunk is at {alpha:g} times the learning rate: nothing to '
            'anneal'
        )
    nothing = f'0{parse_time("t_anneal", t_anneal).unit.value}'
    folder = trunk.get('save_folder')
    callbacks = {name: dict(given or {}) for name, given in copy.deepcopy(trunk.get('callbacks') or {}).items()}
    callbacks.pop('branch_points', None)
    for given in callbacks.values():
        if given.get('save_folder') == folder:
            given['save_folder'] = save_folder
    callbacks['stage_start'] = {'optimizer': 'keep'}
    if 'forgetting' in callbacks:
        # of the stage as a whole: against what its trunk started from
        callbacks['forgetting'] = {'parent_losses': f'{folder}/forgetting.json', **callbacks['forgetting']}
    branch = {key: copy.deepcopy(value) for key, value in trunk.items() if key not in _OF_THE_TRUNK}
    branch['train_loader']['dataset']['continues'] = checkpoint
    return {
        **branch,
        'run_name': run_name,
        'save_folder': save_folder,
        'load_path': checkpoint,
        'max_duration': t_anneal,
        'scheduler': {
            'name': 'infinite', 't_warmup': nothing, 't_cooldown': nothing, 'alpha_const': alpha, 't_anneal': t_anneal,
            'anneal': anneal, 'alpha_f': alpha_f,
        },
        'callbacks': callbacks,
    }  # fmt: skip
