# SPDX-License-Identifier: Apache-2.0
"""Whether the parent of a stage fits its model, by names, shapes and settings."""

import logging
import re
import tempfile
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers.configuration_utils import PretrainedConfig

from cpt_algorithms.checkpoints.errors import UnsafeCheckpointError
from cpt_algorithms.checkpoints.exports import folder_of_pretrained
from cpt_algorithms.checkpoints.guard import TRUST
from cpt_algorithms.checkpoints.open import (
    INDEX,
    SINGLE,
    load_structure,
    model_config_of,
    open_checkpoint,
    read_metadata,
)
from cpt_algorithms.checkpoints.save_folder import newest_complete, resolve_latest
from cpt_algorithms.compat import SETTINGS_OF_ALL
from cpt_algorithms.files import StorageError, exists, fetch, is_remote, list_names, read_json
from cpt_algorithms.formatting import first_of, one_line
from cpt_algorithms.stage.on_meta import model_on_meta, tokenizer_of
from cpt_algorithms.stage.record import read_record
from cpt_algorithms.stage.stage import Model, Stage
from cpt_algorithms.validation import differences, misfits

__all__ = ['check_hugging_face', 'check_parent']

log = logging.getLogger(__name__)


Shapes = dict[str, tuple[int, ...]]


def _parent_shapes(path: str) -> Shapes:
    """Shape of every model tensor in a Composer checkpoint, monolithic or sharded, without reading the tensors."""
    if Path(path).is_dir():
        metadata = read_metadata(path).state_dict_metadata
        prefix = 'state.model.'
        return {
            key[len(prefix) :]: tuple(value.size)
            for key, value in metadata.items()
            if key.startswith(prefix) and isinstance(value, TensorStorageMetadata)
        }
    return {key: tuple(value.shape) for key, value in load_structure(path)['state']['model'].items()}


def _remote_parent_shapes(path: str) -> Shapes | None:
    """The same in object storage, where one file is not downloaded for it: its run's YAML tells; None without that."""
    real = resolve_latest(path).rstrip('/')
    folder, _, name = real.rpartition('/')
    if exists(f'{real}/.metadata'):
        with tempfile.TemporaryDirectory() as here:
            fetch(f'{real}/.metadata', Path(here) / '.metadata')
            return _parent_shapes(here)
    if not exists(real):
        there = sorted({found.split('/')[0] for found in list_names(folder) if re.match(r'(ep\d+-ba|latest)', found)})
        near = get_close_matches(name, there, n=1) or there[-1:]
        hint = f'; did you mean {folder}/{near[0].removesuffix(".symlink")}?' if near else ''
        raise FileNotFoundError(hint)
    try:
        record = read_record(folder)
    except ValueError as error:
        record, reason = None, str(error)
    else:
        reason = f'{folder}/stage.json is missing'
    if record is None:
        log.warning('load_path=%s: whether it fits the model is seen when it is loaded (%s)', path, reason)
        return None
    return _model_shapes(record.config)


def _model_shapes(stage: Stage) -> Shapes:
    """Shape of every tensor of the model that a YAML describes."""
    model = model_on_meta(stage.model, tokenizer_of(stage.tokenizer))
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def check_parent(stage: Stage) -> None:
    """Refuse a parent that is not there, cannot be read, or is another model.

    Args:
        stage: The stage.

    Raises:
        ValueError: With what differs.
    """
    path = stage.load_path
    try:
        if not path or newest_complete(stage.folder)[0]:  # a restart does not read its parent
            return
    except StorageError:  # check_saving reports it
        return
    trusted = stage.callbacks.stage_start is not None and stage.callbacks.stage_start.trust_checkpoint
    try:
        if is_remote(path):
            parent = _remote_parent_shapes(path)
        elif trusted and Path(path).exists():  # it may be readable in no safe way
            return
        elif Path(path).exists():
            parent = _parent_shapes(path)
        else:
            raise FileNotFoundError
    except FileNotFoundError as hint:
        raise ValueError(f'load_path={path} does not exist{hint}') from None
    except StorageError as error:
        raise type(error)(f'load_path: {error}') from None
    except UnsafeCheckpointError as error:
        raise ValueError(f'load_path={path}: {error}; {TRUST}') from None
    except Exception as error:
        raise ValueError(f'load_path={path} cannot be read as a Composer checkpoint: {error}') from None
    if parent is None:
        return
    if found := misfits(parent, _model_shapes(stage)):
        raise ValueError(f'load_path={path} does not fit the model: {first_of(found)}')
    if changed := _model_changes(path, stage):
        raise ValueError(
            f'load_path={path} was trained as another model, of the same shapes: {first_of(changed)}. Set the model as '
            'it was, or name what is meant to change in callbacks.stage_start.model_changes'
        )


# Settings of a model that say how it is trained, loaded and used; with those that every configuration has.
_NOT_OF_THE_MODEL = {
    'init_device',
    'init_config',
    'use_cache',
    'max_seq_len',
    'max_position_embeddings',
    'attn_impl',
    'auto_map',
}
_NOT_OF_THE_MODEL |= (SETTINGS_OF_ALL | PretrainedConfig().to_dict().keys()) - {'tie_word_embeddings'}


def _config_on_meta(model: Model, stage: Stage) -> PretrainedConfig:
    inside: Any = model_on_meta(model, tokenizer_of(stage.tokenizer)).model
    return inside.config


def _model_changes(path: str, stage: Stage) -> list[str]:
    """Settings of the parent's model that are others here, and show in no shape."""
    here = _config_on_meta(stage.model, stage)
    if is_remote(path):
        record = read_record(resolve_latest(path).rstrip('/').rpartition('/')[0])
        if record is None or record.config.model.name != stage.model.name:
            return []
        there = _config_on_meta(record.config.model, stage)
    elif content := model_config_of(path):
        try:
            there = type(here).from_dict(content)
        except Exception as error:
            raise ValueError(f'load_path={path}: what it says of its model cannot be read: {one_line(error)}') from None
    else:
        return []
    allowed = [*stage.callbacks.stage_start.model_changes] if stage.callbacks.stage_start else []
    if stage.callbacks.masks_documents:  # which an MPT is told by
        allowed.append('attn_config.attn_uses_sequence_id')
    found = differences(_of_the_model(there.to_dict()), _of_the_model(here.to_dict()))
    return [line for line in found if line.partition(':')[0] not in allowed]


def _of_the_model(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {
        key: value
        for key, value in config.items()
        if key not in _NOT_OF_THE_MODEL and not key.startswith('_') and not key.endswith(('dropout', 'pdrop'))
    }
    return {key: _of_the_model(value) if isinstance(value, dict) else value for key, value in kept.items()}


def check_hugging_face(stage: Stage) -> None:
    """Refuse Hugging Face weights that would be dropped or left at random, and models that cannot be built."""
    model = stage.model
    if model.name != 'hf_causal_lm':
        return
    for key in ('peft_config', 'pretrained_lora_id_or_path', 'load_in_8bit'):
        if model.given.get(key):
            raise ValueError(
                f'model.{key}: what is trained, averaged and exported here are whole models, neither adapters nor '
                'quantized weights; leave it out, and merge an adapter into its model first'
            )
    pretrained = stage.pretrained_model
    if pretrained is None:
        return
    if model.init_device == 'meta' and stage.fsdp_config:
        raise ValueError(
            f'model.init_device=meta, and the weights of {pretrained} are to be read: use mixed (rank 0 reads them), '
            'or cpu'
        )
    if overrides := dict(model.config_overrides.given):
        plain = stage.but(model={**model.given, 'config_overrides': {}})
        if found := misfits(_model_shapes(plain), _model_shapes(stage)):
            raise ValueError(
                f'model.config_overrides={overrides} does not fit the pretrained {pretrained}, of which something '
                f'would be dropped or left at random: {first_of(found)}'
            )
    try:
        folder = folder_of_pretrained(pretrained)
    except ValueError:  # of what is not here yet, or nowhere, others speak
        return
    config = read_json(folder / 'config.json') or {}
    if quantized := next((key for key in ('quantization_config', 'compression_config') if config.get(key)), None):
        raise ValueError(
            f'model.pretrained_model_name_or_path={pretrained} is quantized ({quantized} in its config.json), and what '
            'is trained, averaged and exported here are whole weights; load it dequantized with transformers, save it, '
            'and name that folder'
        )
    shards = (read_json(folder / INDEX) or {}).get('weight_map', {}).values()
    is_whole = (folder / SINGLE).exists() or (shards and all((folder / name).exists() for name in shards))
    # what is missing in a cache is downloaded; of a folder, transformers reads others where there are none of these
    if is_whole or (Path(pretrained).is_dir() and not any(folder.glob('pytorch_model*.bin'))):
        _check_weights(folder, model_on_meta(model).model)


def _check_weights(base: Path, model: Any) -> None:
    """Ask transformers, which only warns of it, what it would drop of the weights in a folder or leave at random."""
    stored = {name: torch.empty(one.shape, device='meta') for name, one in open_checkpoint(base).tensors.items()}
    options = {'device_map': {'': 'meta'}, 'ignore_mismatched_sizes': True, 'output_loading_info': True}
    _, found = type(model).from_pretrained(None, config=model.config, state_dict=stored, **options)
    problems = [f'{name} would be left at random' for name in found['missing_keys']]
    problems += [f'{name} would be dropped' for name in found['unexpected_keys']]
    # names alone, or each with both shapes, by the release
    misshapen = [each if isinstance(each, str) else each[0] for each in found['mismatched_keys']]
    problems += [f'{name} has another shape than it says' for name in misshapen]
    if problems:
        raise ValueError(f'the weights in {base} do not fit its configuration: {first_of(problems)}')
