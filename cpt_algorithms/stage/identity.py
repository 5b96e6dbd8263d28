# SPDX-License-Identifier: Apache-2.0
"""What makes two runs the same: everything that their results follow from.

That is the whole YAML less a short list of what may differ (:data:`MAY_DIFFER`, observing callbacks, workers and
downloads), and the content behind its paths: the parent, the tokenizer and the data, wherever they lie.
"""

import dataclasses
import hashlib
import inspect
import json
import os
import re
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from llmfoundry import registry
from llmfoundry.data.text_data import StreamingTextDataset
from llmfoundry.models import ComposerMPTCausalLM, MPTConfig
from llmfoundry.models.utils.config_defaults import attn_config_defaults, ffn_config_defaults, init_config_defaults
from llmfoundry.utils.config_utils import TrainConfig

from cpt_algorithms.checkpoints.exports import folder_of_pretrained
from cpt_algorithms.checkpoints.save_folder import latest_link, resolve_latest
from cpt_algorithms.duration import Duration
from cpt_algorithms.files import StorageError, fetch, is_remote, read_json
from cpt_algorithms.preparation.tokenizer import hash_tokenizer
from cpt_algorithms.replay.replay_text import ReplayTextDataset
from cpt_algorithms.replay.shard_index import ShardIndex
from cpt_algorithms.schedulers.phase_scheduler import PhaseScheduler
from cpt_algorithms.schedulers.phases import build
from cpt_algorithms.stage.record import StageRecord
from cpt_algorithms.stage.stage import Loader, Stage
from cpt_algorithms.validation import differences

__all__ = [
    'MAY_DIFFER',
    'OBSERVERS',
    'changes',
    'contents_of',
    'decisive',
    'judging_of',
    'places_of',
    'results_of',
    'with_defaults',
]

MAY_DIFFER = {
    # names and places
    'run_name', 'save_folder', 'code_paths', 'variables', 'metadata', 'flatten_metadata',
    # how it is saved, logged and watched
    'save_interval', 'save_num_checkpoints_to_keep', 'loggers', 'log_config',
    'log_to_console', 'console_log_interval', 'progress_bar', 'python_log_level', 'profiler',
    # on what it is judged
    'eval_loader', 'eval_interval', 'eval_first', 'eval_subset_num_batches', 'icl_tasks', 'icl_seq_len',
    'icl_subset_num_batches', 'eval_gauntlet',
    # how it fits on its machines
    'device_train_microbatch_size', 'device_eval_batch_size', 'dist_timeout', 'max_split_size_mb',
    'expandable_segments', 'cuda_load_lazy',
    # how it is loaded, which follows from callbacks.stage_start
    'autoresume', 'load_weights_only', 'load_ignore_keys', 'load_strict_model_weights',
}  # fmt: skip
OBSERVERS = {
    'async_eval', 'branch_points', 'env_logging', 'eval_output_logging', 'fdiff_metrics', 'final_loss', 'forgetting',
    'generate_callback', 'hf_checkpointer', 'loss_perp_v_len', 'lr_monitor', 'mbmoe_tok_per_expert', 'memory_monitor',
    'memory_snapshot', 'mono_checkpoint_saver', 'nan_monitor', 'oom_observer', 'optimizer_monitor', 'run_timeout',
    'runtime_estimator', 'scheduled_gc', 'speed_monitor', 'system_metrics_monitor',
}  # fmt: skip
_WORKERS = {'num_workers', 'prefetch_factor', 'persistent_workers', 'pin_memory', 'timeout'}
_DOWNLOADS = {
    'local', 'remote', 'download_retry', 'download_timeout', 'validate_hash', 'keep_zip', 'cache_limit', 'predownload',
    'allow_unsafe_types',
}  # fmt: skip
_OF_THE_MACHINE = ('init_device', 'attn_impl', 'attn_implementation', 'use_flash_attention_2')
_LOSSES = {'final_loss', 'forgetting', 'early_stopper'}  # keep those of evaluations
_PARENTS = ('load_path', 'only_seen_by', 'resume_after')
_CALLBACKS = (registry.callbacks, registry.callbacks_with_config)
_PACKAGES = ('composer', 'llmfoundry', 'cpt_algorithms')
_ENDS = 2**16
_SHARE = re.compile(r'[\d.e-]+\s*dur')
INDEX = 'index.json'
MODEL = 'model.pretrained_model_name_or_path'
PARENT = 'variables.merge.parent'


def changes(record: StageRecord, stage: Stage, goes_on: bool = False) -> list[str]:
    """What differs between a run that was begun and a stage, a line for each; none if they are the same.

    Args:
        record: Of the run.
        stage: The stage.
        goes_on: Whether the run is to be trained further: what it is judged by is compared, too, if it keeps losses.
            Default: ``False``.

    Cost: :func:`contents_of`.
    """
    begun = record.config
    goes_on = goes_on and _keeps_losses(begun) and _keeps_losses(stage)
    then, now = places_of(begun, goes_on), places_of(stage, goes_on)
    contents = contents_of(stage)
    moved = []
    for key in sorted({*then, *now}):
        before, after = record.contents.get(key), contents.get(key)
        is_same = before == after if before and after else _is_same_place(then.get(key), begun, now.get(key), stage)
        if not is_same:
            moved.append(f'{key}: {_said(then.get(key), before)} -> {_said(now.get(key), after)}')
    found = differences(results_of(begun), results_of(stage))
    return [*found, *(differences(judging_of(begun), judging_of(stage)) if goes_on else []), *moved]


def _keeps_losses(stage: Stage) -> bool:
    return not _LOSSES.isdisjoint(stage.given.get('callbacks') or ())


def judging_of(stage: Stage) -> dict[str, Any]:
    """How a run is judged: losses that it keeps cannot be set beside those of another evaluation; empty without any."""
    if not _keeps_losses(stage):
        return {}
    loaders: dict[str, Any] = {}
    for where, loader in stage.loaders[1:]:
        whole = with_defaults(loader.name, loader.given, registry.dataloaders)
        defaults = _defaults_of(StreamingTextDataset) if loader.name == 'text' else {}
        whole['dataset'] = {**defaults, **loader.dataset.given}
        how = _without(whole, _WORKERS | _DOWNLOADS | {'stream_name', 'stream_config'})
        loaders[_name_of(where, loader)] = how
    found = {**loaders, 'eval_subset_num_batches': stage.eval_subset_num_batches}
    if stage.eval_subset_num_batches != -1:
        found['device_eval_batch_size'] = stage.given.get('device_eval_batch_size')
    if 'early_stopper' in stage.given['callbacks']:
        found['eval_interval'] = stage.given.get('eval_interval', 1)
    return _plain(found)


def _name_of(where: str, loader: Loader) -> str:
    """The key of a loader, wherever in their list it stands."""
    return where if loader.label is None else f'eval_loader.{loader.label}'


def _is_same_place(before: str | None, old: Stage, after: str | None, new: Stage) -> bool:
    """Whether two paths are one, however they are spelled, or both were moved together with their runs."""
    if before is None or after is None or is_remote(before) or is_remote(after):
        return before == after
    here, there = os.path.abspath(before), os.path.abspath(after)
    return here == there or os.path.relpath(here, old.folder) == os.path.relpath(there, new.folder)


def _said(place: str | None, content: str | None) -> str:
    return 'absent' if place is None else f'{place} ({content[:8]})' if content else place


def contents_of(stage: Stage) -> dict[str, str]:
    """What lies behind the paths of a YAML that its results follow from, by key; what cannot be read is left out.

    Of a dataset, the digest of its index. Of a tokenizer, what it makes of text. Of a Hugging Face model, its
    configuration and code, and its weights if they are read. Of other files here, their sizes, beginnings and ends (a
    checkpoint of Composer ends with the checksums of everything in it); in object storage, the run that wrote it and
    its name.

    Cost: 128 KiB of each file of a parent, a tokenizer's ``tokenizer.json``, the index of each stream.
    """
    found = {}
    for key, place in places_of(stage, True).items():
        try:
            if key == 'tokenizer.name':
                digest = _tokenizer_digest(folder_of_pretrained(place))
            elif key == PARENT and not is_remote(place) and _is_model(place):
                digest = _model_digest(folder_of_pretrained(place), True)
            elif key == MODEL:
                digest = _model_digest(folder_of_pretrained(place), stage.pretrained_model is not None)
            else:
                digest = _remote_digest(place.rstrip('/')) if is_remote(place) else _local_digest(Path(place))
        except (OSError, ValueError, StorageError, KeyError, AttributeError):
            continue
        if digest:
            found[key] = digest
    return found


def _is_model(place: str) -> bool:
    """Whether a place is a Hugging Face model, or the name of one, and no checkpoint."""
    return not Path(place).exists() or (Path(place) / 'config.json').is_file()


def _tokenizer_digest(folder: Path) -> str | None:
    try:
        pad = (read_json(folder / 'tokenizer_config.json') or {}).get('pad_token')  # is no label where rows are padded
        return f'{hash_tokenizer(folder)} {pad}'
    except ValueError:  # it has no fast form
        files = sorted(file for kind in ('*.json', '*.model', '*.txt') for file in folder.glob(kind))
        return _digest({file.name: file for file in files})


def _model_digest(folder: Path, with_weights: bool) -> str | None:
    files = [folder / 'config.json', *folder.glob('*.py')]
    if with_weights:
        # transformers reads the others only where there are none of the first
        weights = list(folder.glob('model*.safetensors')) or list(folder.glob('pytorch_model*.bin'))
        index = next((each for file in weights[:1] for each in folder.glob(f'*{file.suffix}.index.json')), None)
        shards = json.loads(index.read_text())['weight_map'].values() if index else ()
        if not weights or not all((folder / name).exists() for name in shards):
            return None  # not downloaded yet
        files += weights
    return _digest({file.name: file for file in sorted(files)})


def _local_digest(path: Path) -> str | None:
    if path.name == INDEX:
        return ShardIndex.read(path).digest
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    return _digest({file.name if path.is_dir() else '': file for file in files})


def _remote_digest(uri: str) -> str | None:
    if uri.endswith(f'/{INDEX}'):
        with tempfile.TemporaryDirectory() as here:
            fetch(uri, Path(here) / INDEX)
            return ShardIndex.read(Path(here) / INDEX).digest
    folder, _, name = resolve_latest(uri).rpartition('/')
    wrote = (read_json(f'{folder}/stage.json') or {}).get('wandb_id')
    return f'{wrote}/{name}' if wrote else None


def _digest(files: Mapping[str, Path]) -> str | None:
    whole = hashlib.sha256()
    for name, path in files.items():
        size = path.stat().st_size
        whole.update(f'{name}\0{size}\0'.encode())
        with open(path, 'rb') as file:
            whole.update(file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            whole.update(file.read(_ENDS))
    return whole.hexdigest()[:32] if files else None


def places_of(stage: Stage, goes_on: bool = False) -> dict[str, str]:
    """The paths of a YAML that its results follow from, by key; of a run that goes on, those of its evaluation, too."""
    parent = stage.load_path or (stage.merge and f'{stage.merge.of}/{latest_link(stage.is_sharded)}')
    found = {'tokenizer.name': stage.tokenizer.name, 'load_path': parent}
    found[MODEL] = stage.model.pretrained_model_name_or_path
    found['train_loader.dataset.resume_after'] = stage.train_loader.dataset.resume_after
    if stage.merge and stage.merge.parent:
        found[PARENT] = stage.merge.parent
    if stage.merge and stage.merge.soup:
        found |= {f'variables.merge.soup[{index}]': place for index, place in enumerate(stage.merge.soup)}
    loaders = stage.loaders if goes_on and _keeps_losses(stage) else stage.loaders[:1]
    streams = [
        (f'{_name_of(where, loader)}.{key}', each)
        for where, loader in loaders
        for key, each in loader.streams(where).items()
    ]
    for key, stream in streams:
        both = [
            '/'.join([place.rstrip('/'), *([stream.split] if stream.split else []), INDEX])
            for place in (stream.local, stream.remote)
            if place
        ]
        if both:
            found[key] = both[0] if Path(both[0]).exists() else both[-1]
        found[f'{key}.only_seen_by'] = getattr(stream, 'only_seen_by', None)
    return {key: place for key, place in found.items() if place}


def results_of(stage: Stage) -> dict[str, Any]:
    """What of a YAML, its paths left out, decides what comes out; with the defaults of whatever reads it."""
    defaults = {each.name: each.default for each in dataclasses.fields(TrainConfig) if each.init}
    given = {**{key: value for key, value in defaults.items() if value != '???'}, **stage.given}
    kept = {key: value for key, value in given.items() if key not in MAY_DIFFER and value is not dataclasses.MISSING}
    for section, kinds in {'callbacks': _CALLBACKS, 'algorithms': (registry.algorithms,)}.items():
        kept[section] = {
            name: with_defaults(name, arguments or {}, *kinds)
            for name, arguments in (stage.given.get(section) or {}).items()
            if section != 'callbacks' or (name not in OBSERVERS and _is_known(name))
        }
    for permission in ('trust_checkpoint', 'model_changes', 'train_config'):  # the last is the YAML itself
        kept['callbacks'].get('stage_start', {}).pop(permission, None)
    for section, kind in {'optimizer': registry.optimizers, 'scheduler': registry.schedulers}.items():
        kept[section] = with_defaults(stage.given[section].get('name', ''), stage.given[section], kind)
    loader = stage.train_loader
    kinds = {'replay_text': ReplayTextDataset, 'text': StreamingTextDataset}
    defaults = _defaults_of(kinds[loader.name]) if loader.name in kinds else {}
    whole = with_defaults(loader.name, loader.given, registry.dataloaders)
    whole['dataset'] = {**defaults, **loader.dataset.given}
    whole['dataset'].pop('max_passes', None)  # a permission
    whole = {key: value for key, value in whole.items() if key not in _WORKERS}
    kept['train_loader'] = _without(whole, _DOWNLOADS | {'stand_in_for'})  # the last is words alone
    if (merge := stage.merge) is not None:
        kept['merge'] = {**merge.given, 'of': None, 'parent': None, 'soup': merge.soup and len(merge.soup)}
    kept['fsdp_config'] = {'mixed_precision': (stage.given.get('fsdp_config') or {}).get('mixed_precision')}
    kept['tokenizer'] = {**stage.tokenizer.given, 'name': None}
    kept['model'] = _model(stage)
    if not (_takes_dur(stage) or _has_share(kept['callbacks'])):  # nothing that was trained changes if the end moves
        kept['max_duration'] = None
    return _plain({key: value for key, value in kept.items() if value not in ({}, [])})  # the same as none


def decisive(section: Mapping[str, Any]) -> dict[str, Any]:
    """What of a part of a YAML its results follow from, as it is written, by the same rule."""
    kept = {key: value for key, value in section.items() if key not in MAY_DIFFER and key != 'tokenizer'}
    inside = {'train_loader': {*_WORKERS, *_DOWNLOADS, 'max_passes'}, 'model': _OF_THE_MACHINE, 'callbacks': OBSERVERS}
    found = {
        key: _without(value, inside.get(key, ())) if isinstance(value, Mapping) else value
        for key, value in kept.items()
    }
    return {key: value for key, value in found.items() if value not in ({}, None)}


def _model(stage: Stage) -> dict[str, Any]:
    given = with_defaults(stage.model.name, stage.model.given, registry.models)
    name = stage.model.name  # preflight speaks of one that is not there
    if name in registry.models and registry.models.get(name) is ComposerMPTCausalLM:
        nested = {
            'attn_config': attn_config_defaults, 'ffn_config': ffn_config_defaults, 'init_config': init_config_defaults,
        }  # fmt: skip
        given = _over({**_defaults_of(MPTConfig), **nested}, given)
    read = {'pretrained_model_name_or_path': None, 'pretrained': stage.pretrained_model is not None}
    return _without({**given, **read}, _OF_THE_MACHINE)


def _over(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A section with the defaults of what it leaves out, nested ones, too."""
    whole = {**defaults, **given}
    for key, value in given.items():
        if isinstance(value, Mapping) and isinstance(inside := defaults.get(key), Mapping):
            whole[key] = _over(inside, value)
    return whole


def _without(section: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """A section without keys, at any depth."""
    return {
        key: _without(value, keys) if isinstance(value, Mapping) else value
        for key, value in section.items()
        if key not in keys
    }


def with_defaults(name: str, arguments: Mapping[str, Any], *kinds: Any) -> dict[str, Any]:
    """Arguments, with the defaults of what is registered under a name."""
    found = next((kind.get(name) for kind in kinds if name in kind.get_all()), None)
    return {**(_defaults_of(found) if found else {}), **arguments}


def _defaults_of(kind: Any) -> dict[str, Any]:
    parameters = inspect.signature(kind).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}


def _is_known(callback: str) -> bool:
    """Whether a callback is one of the stack's; of a user's own it is not known what they change."""
    for each in _CALLBACKS:
        if callback in each.get_all():
            return each.get(callback).__module__.split('.')[0] in _PACKAGES
    return False


def _takes_dur(stage: Stage) -> bool:
    try:
        scheduler = build(stage.scheduler.given)
    except ValueError:  # of the user's own code, perhaps, which is not imported yet
        return True
    arguments = scheduler.arguments if isinstance(scheduler, PhaseScheduler) else vars(scheduler)
    return any('dur' in str(value) for value in arguments.values())


def _has_share(value: Any) -> bool:
    """Whether a time in a section is a share of the whole."""
    if isinstance(value, Mapping):
        return any(map(_has_share, value.values()))
    return any(map(_has_share, value)) if isinstance(value, list | tuple) else bool(_SHARE.fullmatch(str(value)))


def _plain(value: Any, key: str = '') -> Any:
    """A part of a YAML, without the paths of parents; times written in one way."""
    if isinstance(value, Mapping):
        return {name: _plain(each, name) for name, each in value.items() if name not in _PARENTS}
    if isinstance(value, tuple):  # a default
        return list(value)
    if isinstance(value, str):
        try:
            return str(Duration.parse(key, value))
        except ValueError:
            return value
    return value
