# SPDX-License-Identifier: Apache-2.0
"""What is in a save folder: this run, to be resumed; another; or something that nobody understands."""

import logging
import re
import secrets
from importlib.metadata import version
from pathlib import Path

from cpt_algorithms.checkpoints.errors import CheckpointError, UnsafeCheckpointError
from cpt_algorithms.checkpoints.open import time_of
from cpt_algorithms.checkpoints.save_folder import (
    check_links,
    half_written,
    latest_link,
    newest_complete,
    weights_in,
)
from cpt_algorithms.files import (
    StorageError,
    check_writable,
    exists,
    is_remote,
    read_json,
    write_json,
)
from cpt_algorithms.formatting import first_of
from cpt_algorithms.stage.identity import changes, contents_of, places_of
from cpt_algorithms.stage.record import StageRecord, done_with, read_record
from cpt_algorithms.stage.stage import (
    Stage,
)
from cpt_algorithms.validation import (
    short_repr,
)

__all__ = ['check_format', 'check_restart', 'check_saving', 'format_problem', 'restart_problem', 'write_record']

log = logging.getLogger(__name__)

STACK = ('cpt-algorithms', 'llm-foundry', 'mosaicml', 'mosaicml-streaming', 'torch', 'transformers')


def check_saving(stage: Stage) -> None:
    """Refuse what a restart could not go on from, and a folder that holds what is not this run's.

    Args:
        stage: The stage.

    Raises:
        ValueError: With the key, or what lies there.
    """
    if stage.save_overwrite:
        raise ValueError(
            'save_overwrite=true could destroy checkpoints; leave it out, a restart goes on from the latest'
        )
    if stage.save_weights_only:
        raise ValueError('save_weights_only=true cannot be resumed from; leave it out')
    if ignored := stage.given.get('save_ignore_keys'):
        raise ValueError(f'save_ignore_keys={short_repr(ignored)}: a restart needs all of the state; leave it out')
    named = {
        'save_filename': 'ep{epoch}-ba{batch}-rank{rank}.pt',
        'save_latest_filename': latest_link(stage.is_sharded),
    }
    for key, usual in named.items():
        if (stage.given.get(key) or usual).replace('rank{rank}', 'rank0') != usual.replace('rank{rank}', 'rank0'):
            raise ValueError(
                f'{key}={stage.given[key]!r}: a restart finds checkpoints by the names that Composer gives them; '
                'leave it out, and choose save_folder'
            )
    prefix = (stage.given.get('fsdp_config') or {}).get('sharded_ckpt_prefix_dir', 'ep{epoch}-ba{batch}')
    if prefix != 'ep{epoch}-ba{batch}':
        raise ValueError(f'fsdp_config.sharded_ckpt_prefix_dir={prefix!r}: leave it out, as save_filename')
    if not stage.save_folder:
        return
    folder = stage.folder
    check_writable('save_folder', folder, 'choose another')
    exported = str(((stage.given.get('callbacks') or {}).get('hf_checkpointer') or {}).get('save_folder') or folder)
    place = Path(exported.replace('{run_name}', str(stage.run_name)))
    is_own = str(stage.run_name) in place.parts or place.absolute().is_relative_to(Path(folder).absolute())
    if not is_own and not is_remote(exported):
        raise ValueError(
            f"callbacks.hf_checkpointer.save_folder={exported} is not this run's own, and another run's export there "
            f'would be replaced; use {exported.rstrip("/")}/{{run_name}}, or leave it out'
        )
    try:
        there = weights_in(folder)
        is_done = done_with(stage) is not None
        newest = None if is_done else newest_complete(folder)[1]
    except StorageError as error:
        raise type(error)(f'save_folder: {error}') from None
    if is_remote(folder) and stage.save_num_checkpoints_to_keep != -1:
        log.warning(
            'save_num_checkpoints_to_keep=%s: Composer deletes nothing from object storage; let a lifecycle rule of '
            'the bucket do it',
            stage.save_num_checkpoints_to_keep,
        )
    if not there:
        return
    record = read_record(folder)
    if record is None:
        raise ValueError(
            f'save_folder={folder} holds the checkpoints of a run that this recipe did not start: they would be '
            'resumed from or overwritten; choose another save_folder'
        )
    if not is_remote(folder) and not is_done:
        check_links(Path(folder))
    # of whole checkpoints, check_restart says whose they are; in object storage half of one is replaced
    if newest is not None or is_remote(folder) or is_done:
        return
    # exports are whole or not there, and of a run that ended once, all there is
    is_begun_again = not exists(f'{folder}/done.json') and not changes(record, stage)
    known = [*(path.name for path in half_written(Path(folder))), *(['huggingface'] if is_begun_again else [])]
    if unknown := [name for name in there if name.split('/')[0] not in known]:
        raise ValueError(
            f'save_folder={folder} holds weights ({first_of(unknown)}) and no whole checkpoint to go on from: the run '
            'would begin at batch 0 beside them. Put the checkpoints back, or choose another save_folder'
        )


def restart_problem(stage: Stage) -> str | None:
    """What keeps a stage from going on in its folder: a run that was begun there as another; None if nothing does."""
    try:
        if not (exists(f'{stage.folder}/done.json') or newest_complete(stage.folder)[0]):
            return None
        record = read_record(stage.folder)
    except StorageError:  # check_saving reports it
        return None
    except CheckpointError as error:
        return str(error)
    if record is None:
        return None
    if changed := changes(record, stage, goes_on=done_with(stage) is None):
        if record.run_name != stage.run_name:
            return (
                f'save_folder={stage.folder} holds the checkpoints of run {record.run_name!r}, and run_name is '
                f'{stage.run_name!r}, with other settings ({first_of(changed)}): they would be resumed from or '
                'overwritten; choose another save_folder'
            )
        return (
            f'save_folder={stage.folder} holds a run with other settings ({first_of(changed)}). A restart changes '
            'nothing: put them back, or choose another save_folder'
        )
    before, now = record.config.max_duration, stage.max_duration
    if before == now:  # the last batch may end behind it
        return None
    try:
        trained = _trained(stage.folder).get(now.unit, 0)
    except CheckpointError as error:
        return str(error)
    if trained <= now.value:
        return None
    return (
        f'max_duration={now}: the run in save_folder={stage.folder} was trained beyond it, to {trained}{now.unit}; '
        f'put {before} back, or choose another save_folder'
    )


def _trained(folder: str) -> dict[str, int]:
    """How far the run in a folder was trained, in each unit; in batches where the checkpoint is not read here."""
    if done := read_json(f'{folder}/done.json'):
        return done['time']
    batch, newest = newest_complete(folder)
    try:
        return time_of(newest) if newest and not is_remote(newest) else {'ba': batch}
    except UnsafeCheckpointError:  # which is refused, or trusted, where it is loaded
        return {'ba': batch}


def check_restart(stage: Stage) -> None:
    """Raise a ValueError with :func:`restart_problem`."""
    if stage.save_folder and (problem := restart_problem(stage)):
        raise ValueError(problem)


def format_problem(stage: Stage, world_size: int) -> str | None:
    """Why the checkpoint that a stage would load cannot be: sharded ones need ranks and FSDP, others none of it."""
    newest = newest_complete(stage.folder)[1]
    key, path = ('save_folder', newest) if newest else ('load_path', stage.load_path)
    if path is None:
        return None
    is_sharded = bool(re.search(r'latest-sharded-rank0|ep\d+-ba\d+/?$', path)) or exists(f'{path}/.metadata')
    if is_sharded == (stage.is_sharded and world_size > 1):
        return None
    found = f'{key}={path} is {"" if is_sharded else "not "}sharded, and this start reads checkpoints that are'
    found += ' not: ' if is_sharded else ': '
    sharded_start = 'start on several ranks with fsdp_config: {state_dict_type: sharded}'
    if newest:
        return found + (
            sharded_start if is_sharded else 'start on one process, or with fsdp_config.state_dict_type: full'
        )
    if stage.keeps_optimizer_state:
        return f'{found}optimizer_state: keep wants a parent as this start reads it'
    kind = 'pt' if is_sharded else 'sharded'
    return f'{found}convert it with scripts/average_checkpoints.py {path} --to {kind} --out OUT, and load OUT'


def check_format(stage: Stage, world_size: int) -> None:
    """Raise a ValueError with :func:`format_problem`, as far as it can be known on one process."""
    # a plan for several ranks may be looked at on one process
    if stage.save_folder and (world_size > 1 or not stage.is_sharded):
        try:
            problem = format_problem(stage, world_size)
        except StorageError:  # check_saving reports it
            return
        if problem:
            raise ValueError(problem)


def write_record(stage: Stage, resumes: bool = False) -> StageRecord:
    """Write ``stage.json``: whose checkpoints these are, from which parent, on what data, made with what.

    It is written when the stage starts, and when a restart extends it, which reads no parent. In a local folder, the
    parent's losses of a start that was stopped before its first checkpoint are kept if nothing has changed since, and
    otherwise removed; that it has failed before is forgotten.

    Args:
        stage: The stage.
        resumes: Whether it goes on from a checkpoint of its own. Default: ``False``.
    """
    folder, losses = stage.folder, Path(stage.folder) / 'forgetting.json'
    try:
        before = read_record(folder)
    except ValueError:  # of another version, or damaged: it is written again
        before = None
    kept = before.contents if before is not None and resumes else {}
    try:
        is_same = before is not None and (resumes or not changes(before, stage, goes_on=True))
    except ValueError:  # its parts are no longer registered
        is_same = False
    record = {
        'run_name': stage.run_name,
        'parent': stage.parent,
        'pretrained_model': stage.pretrained_model,
        'config': stage.to_train_yaml(),
        'versions': {name: version(name) for name in STACK},
        'contents': {**contents_of(stage), **kept},
        'wandb_id': (is_same and before is not None and before.wandb_id) or secrets.token_hex(4),
    }
    if not is_remote(folder) and losses.exists() and not resumes:
        if before is None or dict(before.given) != record or len(record['contents']) < len(places_of(stage, True)):
            losses.unlink()
    (Path(folder) / 'failed.json').unlink(missing_ok=True)  # of an earlier start
    write_json(f'{folder}/stage.json', record)
    return StageRecord.model_validate(record)
