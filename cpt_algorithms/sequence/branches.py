# SPDX-License-Identifier: Apache-2.0
"""Branches: runs that start from a checkpoint of a *trunk* in its constant phase, which stays as it is."""

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cpt_algorithms.checkpoints.save_folder import batch_of, checkpoint_name, latest_link, resolve_latest
from cpt_algorithms.duration import ABSOLUTE, Duration, per_batch_of
from cpt_algorithms.files import StorageError, is_remote
from cpt_algorithms.schedulers.phases import phases_of
from cpt_algorithms.sequence.spec import ANNEAL_KEYS, OF_THE_TRUNK
from cpt_algorithms.stage.record import StageRecord, read_record
from cpt_algorithms.stage.stage import Stage
from cpt_algorithms.validation import check_keys, check_type

__all__ = ['annealed', 'branch_of', 'checkpoint_after', 'constant_alpha', 'merge_of', 'merged']

# Of the trunk's YAML, what says where it keeps things and how it started.
_PLACES = ('run_name', 'save_folder', 'load_path', 'load_weights_only', 'load_ignore_keys', 'autoresume')


def checkpoint_after(stage: Stage, batch: int) -> str:
    """The name of a run's checkpoint after a batch; of the last one, that of the link to it."""
    if batch == stage.batches:
        return latest_link(stage.is_sharded)
    return checkpoint_name(batch, stage.is_sharded)


def constant_alpha(trunk: Stage, batch: int) -> float:
    """The multiplier of the learning rate after a batch of a run, which must be in a constant phase.

    Raises:
        ValueError: If the schedule is not constant there, with the phases; or is not one of this library.
    """
    name = trunk.scheduler.name
    total = trunk.batches_of('max_duration', trunk.max_duration)
    phases = phases_of(trunk.scheduler.given, trunk.max_duration)
    if phases is None:
        raise ValueError(f'scheduler.name={name!r} has no phases that can be looked at; a trunk wants infinite')
    per_batch = per_batch_of(phases.unit, trunk.global_train_batch_size, trunk.max_seq_len)
    assert per_batch is not None, 'phases are in tok, ba or sp'
    # whole batches: where the last one ends, the run does
    spans, time = list(phases.schedule.spans(total * per_batch)), batch * per_batch
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


def annealed(
    trunk: Stage,
    given: Mapping[str, Any],
    checkpoint: str,
    batch: int,
    t_anneal: str,
    anneal: str = 'exponential',
    alpha_f: float = 0.1,
    run_name: str = '',
    save_folder: str = '',
) -> dict[str, Any]:
    """The YAML of a run that anneals a trunk's learning rate, from a checkpoint of it to the end.

    It is an ordinary stage: it keeps the optimizer's state, starts at the trunk's learning rate, reads on in the
    trunk's data behind what that has read, and goes on with the trunk's averages.

    Args:
        trunk: The trunk.
        given: The YAML that is annealed: the trunk's own, or with another mix.
        checkpoint: A checkpoint of the trunk.
        batch: Batches of the trunk at that checkpoint.
        t_anneal: Length of the branch, in tok, ba or sp.
        anneal: ``exponential``, ``linear``, ``cosine`` or ``1-sqrt``. Default: ``'exponential'``.
        alpha_f: Multiplier at the end; above 0 for ``exponential``. Default: ``0.1``.
        run_name: Of the branch. Default: ``''``, still to be named.
        save_folder: Of the branch. Default: ``''``.

    Raises:
        ValueError: If the trunk's learning rate is not constant at that batch, or is as low as ``alpha_f`` already.

    Source: Ibrahim et al. 2024, section 7.2.
    """
    alpha = constant_alpha(trunk, batch)
    check_type('alpha_f', alpha_f, float)
    if alpha <= alpha_f:
        key = next((name for name in ('alpha_const', 'alpha') if name in trunk.scheduler.given), 'name')
        raise ValueError(
            f'alpha_f={alpha_f}: nothing to anneal, the trunk is at {alpha:g} times the learning rate '
            f'(scheduler.{key}={trunk.scheduler.given[key]})'
        )
    nothing = f'0{Duration.parse("t_anneal", t_anneal, ABSOLUTE).unit}'
    constant = {'t_warmup': nothing, 't_cooldown': nothing, 'alpha_const': alpha}
    callbacks = {name: dict(each or {}) for name, each in copy.deepcopy(given.get('callbacks') or {}).items()}
    callbacks.pop('branch_points', None)
    for each in callbacks.values():
        if each.get('save_folder') == trunk.save_folder:
            each['save_folder'] = save_folder
    callbacks['stage_start'] = {**(callbacks.get('stage_start') or {}), 'optimizer_state': 'keep'}
    for name in ('ema', 'lawa'):  # of the trunk, which go on
        if name in callbacks and getattr(trunk.callbacks, name):
            callbacks[name]['resume_after'] = checkpoint
    if 'forgetting' in callbacks:
        # of the stage as a whole: against what its trunk started from, wherever that lies now
        losses = f'{checkpoint.rpartition("/")[0] or "."}/forgetting.json'
        callbacks['forgetting'] = {**callbacks['forgetting'], 'parent_losses': losses}
    branch = {key: copy.deepcopy(value) for key, value in given.items() if key not in _PLACES}
    branch['train_loader']['dataset']['resume_after'] = checkpoint
    return {
        **branch,
        'run_name': run_name,
        'save_folder': save_folder,
        'load_path': checkpoint,
        'max_duration': t_anneal,
        'scheduler': {'name': 'infinite', **constant, 't_anneal': t_anneal, 'anneal': anneal, 'alpha_f': alpha_f},
        'callbacks': callbacks,
    }


def merged(
    trunk: Stage,
    given: Mapping[str, Any],
    checkpoint: str,
    batch: int,
    how: Mapping[str, Any],
    run_name: str = '',
    save_folder: str = '',
) -> dict[str, Any]:
    """The YAML of a run that is made of checkpoints, and evaluated and exported as one that was trained.

    Args:
        trunk: The run that it is a branch of.
        given: The YAML by which it is judged, the trunk's own.
        checkpoint: The last checkpoint of the trunk.
        batch: Batches of the trunk at that checkpoint.
        how: Of :class:`~cpt_algorithms.stage.stage.Merge`, less what is known of the trunk: ``last``, ``every`` and
            ``weights``, ``line`` or ``soup``.
        run_name: Default: ``''``, still to be named.
        save_folder: Default: ``''``.

    Raises:
        ValueError: If there is to be a line, and the trunk began from scratch.
    """
    if 'line' in how:
        if trunk.parent is None:
            raise ValueError('line: it was trained from scratch, so that there is no parent for a line to begin at')
        how = {**how, 'parent': trunk.parent}
    kept = ('final_loss', 'forgetting', 'mask_documents', 'stage_start')
    callbacks = {name: dict(each or {}) for name, each in (given.get('callbacks') or {}).items() if name in kept}
    callbacks.setdefault('final_loss', {})
    for each in callbacks.values():
        each |= {'save_folder': save_folder} if 'save_folder' in each else {}
    if 'forgetting' in callbacks:
        callbacks['forgetting'].setdefault('parent_losses', f'{checkpoint.rpartition("/")[0] or "."}/forgetting.json')
    of = {'of': checkpoint.rpartition('/')[0] or '.', 'batch': batch}
    return {
        **{key: copy.deepcopy(value) for key, value in given.items() if key not in _PLACES},
        'run_name': run_name,
        'save_folder': save_folder,
        'load_path': checkpoint,
        'max_duration': '0ba',
        'callbacks': callbacks,
        'variables': {**(given.get('variables') or {}), 'merge': {**of, **how}},
    }


def merge_of(checkpoint: str, overrides: Sequence[str]) -> Stage:
    """What ``recipes/merge.py`` makes of a run: a window, a line or a soup.

    Args:
        checkpoint: The last checkpoint of the run.
        overrides: ``key=value``: of :class:`~cpt_algorithms.stage.stage.Merge`, and ``run_name`` and ``save_folder``.

    Raises:
        ValueError: If it is no checkpoint of a run, or a key is missing or not known.
    """
    real, batch, record, how = _run_and_settings(checkpoint, overrides)
    kinds = {'last': ('every', 'weights'), 'line': (), 'soup': ()}
    try:
        check_keys('', how, (*kinds, *kinds['last'], 'run_name', 'save_folder'))
        kind = next((name for name in kinds if name in how), None)
        if kind is None:
            raise ValueError('one of line=[0,0.5,1], soup=[CHECKPOINT, ...], and last=5 every=100ba is missing')
        if extra := [name for name in how if name not in (kind, *kinds[kind], 'run_name', 'save_folder')]:
            raise ValueError(f'{extra[0]} does not go with {kind}')
        name = how.pop('run_name', None) or f'{record.run_name}-{kind}'
        beside = '/'.join(filter(None, [real.rpartition('/')[0].rpartition('/')[0], name]))
        folder = how.pop('save_folder', None) or beside
        if is_remote(folder):
            raise ValueError(f'save_folder={folder}: what is made goes to a folder of this machine; name one')
        given, trunk = record.config.to_train_yaml(), record.config
        while trunk.is_branch and 'line' in how:  # the stage as a whole began where its trunk did
            begun = read_record(trunk.begins[0]) if trunk.begins else None
            if begun is None:
                raise ValueError(f'line: it is a branch of {trunk.load_path}, whose run is not there')
            trunk = begun.config
        return Stage.from_yaml(merged(trunk, given, real, batch, how, name, folder))
    except ValueError as error:
        raise ValueError(f'{checkpoint}: {error}') from None


def branch_of(checkpoint: str, overrides: Sequence[str]) -> Stage:
    """The branch that ``recipes/anneal.py`` trains.

    Args:
        checkpoint: A checkpoint of the trunk.
        overrides: ``key=value``: ``t_anneal``, ``anneal``, ``alpha_f``, and of the YAML.

    Raises:
        ValueError: If it is no checkpoint of a run, the trunk is not in its constant phase, or a key is missing.
    """
    real, batch, record, given = _run_and_settings(checkpoint, overrides)
    how = {key: given.pop(key) for key in ANNEAL_KEYS if key in given}
    if 't_anneal' not in how:
        raise ValueError('t_anneal is missing: the length of the branch, such as t_anneal=45000000000tok')
    if wrong := [key for key in (*OF_THE_TRUNK, 'load_path') if key in given]:
        raise ValueError(f'{wrong[0]}: a branch has this from its trunk, but for {", ".join(ANNEAL_KEYS)}')
    how['run_name'] = given.pop('run_name', None) or f'{record.run_name}-anneal-ba{batch}'
    beside = '/'.join(filter(None, [real.rpartition('/')[0].rpartition('/')[0], how['run_name']]))
    how['save_folder'] = given.pop('save_folder', None) or beside
    try:
        branch = annealed(record.config, record.config.to_train_yaml(), real, batch, **how)
    except ValueError as error:
        raise ValueError(f'{checkpoint}: {error}') from None
    # streams in place of the trunk's, and not both
    dataset, own = branch['train_loader']['dataset'], given.get('train_loader', {}).get('dataset', {})
    if 'new' in own:
        del dataset['new']
    if 'streams' in (own.get('replay') or {}):
        (dataset.get('replay') or {}).pop('streams', None)
    both: Any = OmegaConf.to_container(OmegaConf.merge(branch, given), resolve=True)
    return Stage.from_yaml(both)


def _run_and_settings(checkpoint: str, overrides: Sequence[str]) -> tuple[str, int, StageRecord, dict[str, Any]]:
    """A checkpoint under its own name, its batch, the record of its run, and ``key=value`` as a mapping."""
    try:
        if is_remote(checkpoint):
            real = resolve_latest(checkpoint)
        else:
            link = Path(checkpoint)
            real = str(link.with_name(os.readlink(link)) if link.is_symlink() else link)
        folder, _, name = real.rpartition('/')
        batch, record = batch_of(name), read_record(folder or '.')
        given: Any = OmegaConf.to_container(OmegaConf.from_cli(list(overrides)), resolve=True)
    except (OSError, StorageError, OmegaConfBaseException) as error:
        raise ValueError(f'{checkpoint}: {error}') from None
    if not batch or not record:
        raise ValueError(f'{checkpoint} is no checkpoint of continue_pretraining.py (ep...-ba..., or latest)')
    return real, batch, record, given
