# SPDX-License-Identifier: Apache-2.0
"""Every check of a stage's YAML that needs no training: all problems at once, before anything expensive starts."""

import copy
import inspect
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, get_type_hints

import torch
from accelerate import init_empty_weights
from composer.models import ComposerModel
from llmfoundry import registry
from llmfoundry.data.text_data import StreamingTextDataset
from llmfoundry.models.mpt import ComposerMPTCausalLM, MPTConfig
from llmfoundry.utils.builders import (
    build_algorithm,
    build_callback,
    build_composer_model,
    build_optimizer,
    build_tokenizer,
)
from llmfoundry.utils.config_utils import TRAIN_CONFIG_KEYS
from llmfoundry.utils.registry_utils import import_file
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from streaming import StreamingDataset
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.utils.data import DataLoader
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from cpt_algorithms.checkpoints.errors import UnsafeCheckpointError
from cpt_algorithms.checkpoints.exports import pretrained_model_of
from cpt_algorithms.checkpoints.guard import TRUST
from cpt_algorithms.checkpoints.open import load_structure, open_checkpoint, read_metadata
from cpt_algorithms.checkpoints.save_folder import newest_complete, resolve_latest
from cpt_algorithms.evaluation.suite import check_suite, load_suite
from cpt_algorithms.files import (
    StorageError,
    check_writable,
    exists,
    fetch,
    is_remote,
    list_names,
    read_json,
    read_yaml,
    size_of,
)
from cpt_algorithms.replay.consumed import read_consumed
from cpt_algorithms.replay.functional import check_budget, exact_fraction
from cpt_algorithms.replay.replay_text import (
    COLLATOR_KEYS,
    DATASET_KEYS,
    STREAM_KEYS,
    ReplayTextDataset,
    check_stream,
    read_mix,
    row_length,
)
from cpt_algorithms.replay.shard_index import ShardIndex
from cpt_algorithms.replay.streams import DOWNLOAD_RETRY
from cpt_algorithms.schedulers.phases import phases_of
from cpt_algorithms.stage.data_checks import find_data_problems
from cpt_algorithms.stage.form import check_form, parse_time
from cpt_algorithms.stage.stage_start import KEEP_OPTIMIZER_IGNORE_KEYS, budget_in_samples
from cpt_algorithms.validation import check_keys, check_path, check_type, short_repr

__all__ = ['PreflightError', 'latest_batch', 'model_on_meta', 'preflight', 'resolve', 'total_batches']

log = logging.getLogger(__name__)

Config = dict[str, Any]

# Filled in by llm-foundry itself; "should not be set by the user".
_DERIVED_KEYS = {'n_gpus', 'device_train_batch_size', 'device_train_grad_accum', 'eval_loaders', 'icl_tasks_str'}
_REQUIRED_KEYS = ('model', 'tokenizer', 'optimizer', 'scheduler', 'train_loader', 'max_duration', 'max_seq_len')
_REQUIRED_HERE = ('run_name', 'save_folder', 'global_train_batch_size')
# Given by llm-foundry or Composer and not by the YAML.
_IMPLICIT_ARGUMENTS = {'self', 'tokenizer', 'device_batch_size', 'params', 'train_config', 'model'}
# A larger index of a dataset in object storage, of some 200,000 shards, is not downloaded to be looked at.
_LARGEST_INDEX = 2**26


class PreflightError(ValueError):
    """A YAML that would fail, or silently do something else.

    Args:
        problems: Each with its key, its value and what would be right.
        unseen: Those of them that only say what cannot be reached from here and may be right. Default: none.
    """

    def __init__(self, problems: list[str], unseen: Iterable[str] = ()) -> None:
        self.problems = problems
        self.unseen = list(unseen)
        super().__init__('\n'.join(f'  {number}. {problem}' for number, problem in enumerate(problems, start=1)))


def resolve(cfg: Config) -> Config:
    """Fill in what follows from the rest of a stage's YAML.

    * ``model: FILE.yaml``: its content, such as ``yamls/models/gpt_neox_405m.yaml``.
    * ``autoresume: true``: llm-foundry says it turns it on, and does not.
    * ``load_weights_only`` and ``load_ignore_keys`` as ``callbacks.stage_start.optimizer`` needs them.
    * ``save_folder`` of ``callbacks.final_loss``, ``forgetting`` and ``hf_checkpointer`` (export at the end).
    * ``eval_first: true`` for ``callbacks.forgetting``, which wants the parent's losses.
    * ``model.pretrained: false`` with ``load_path``: the checkpoint's weights would replace those that were read.
    * ``model.trust_remote_code: false`` for ``hf_causal_lm``: llm-foundry runs code that a model brings along.
    * ``stream_name: resilient`` for evaluators that read one remote stream.

    Args:
        cfg: A resolved llm-foundry train YAML.

    Returns:
        A new mapping, which ``llmfoundry train`` takes as it is.

    Raises:
        PreflightError: If a value has not the type that it must have.
        ValueError: If the model's file cannot be read.
    """
    try:
        check_form(cfg)
    except ValueError as error:
        raise PreflightError([str(error)]) from None
    cfg = {'autoresume': True, **cfg, 'callbacks': {**(cfg.get('callbacks') or {})}}
    if isinstance(cfg.get('model'), str):
        try:
            model: Any = OmegaConf.to_container(read_yaml(cfg['model']), resolve=True)
        except (OSError, ValueError, OmegaConfBaseException) as error:
            raise ValueError(f'model={short_repr(cfg["model"])} cannot be read: {error}') from None
        try:
            check_form({'model': model})
        except ValueError as error:
            raise ValueError(f'{cfg["model"]}: {error}') from None
        check_type(f'model={cfg["model"]}, which', model, dict)
        cfg['model'] = model
    if cfg.get('eval_loader'):
        evals = cfg['eval_loader']
        cfg['eval_loader'] = [_resilient(each) for each in (evals if isinstance(evals, list) else [evals])]
    callbacks = cfg['callbacks']
    folder = cfg.get('save_folder')
    stage_start = callbacks.get('stage_start')
    if cfg.get('load_path') and stage_start is not None:
        keep = (stage_start or {}).get('optimizer') == 'keep'
        cfg.setdefault('load_weights_only', not keep)
        if keep:
            cfg.setdefault('load_ignore_keys', list(KEEP_OPTIMIZER_IGNORE_KEYS))
    model = cfg.get('model') or {}
    if model.get('name') == 'hf_causal_lm':
        cfg['model'] = {'trust_remote_code': False, **model, **({'pretrained': False} if cfg.get('load_path') else {})}
    for name in ('final_loss', 'forgetting'):
        if name in callbacks:
            callbacks[name] = {'save_folder': folder, **(callbacks[name] or {})}
    if 'forgetting' in callbacks:
        cfg.setdefault('eval_first', True)
    callbacks.setdefault('hf_checkpointer', {'save_folder': folder, 'save_interval': '1dur', 'precision': 'float32'})
    return cfg


def _resilient(loader: Config) -> Config:
    dataset = loader.get('dataset') or {}
    if loader.get('name') != 'text' or not dataset.get('remote'):
        return loader
    defaults = {'stream_name': 'resilient', 'download_retry': DOWNLOAD_RETRY}
    if 'cache_limit' in dataset and dataset.get('stream_name', 'resilient') == 'resilient':
        defaults['stream_config'] = {'cache_limit': dataset['cache_limit']}
    return {**loader, 'dataset': {**defaults, **dataset}}


def preflight(cfg: Config, world_size: int = 1, parent_is_there: bool = True) -> None:
    """Find everything wrong with a stage.

    Args:
        cfg: The resolved YAML, of :func:`resolve`.
        world_size: Ranks it will run on. Default: ``1``.
        parent_is_there: Whether to look at the parent's checkpoint; it may still have to be trained. Default: ``True``.

    Raises:
        PreflightError: With all problems found.

    Cost: reads shard indices and the parent's metadata, also from object storage; builds the model without memory if
    there is a parent.
    """
    for path in cfg.get('code_paths') or []:
        check_path('code_paths', path)
        if not Path(path).is_file():
            raise PreflightError([f'code_paths: {path} does not exist, or is a folder'])
        try:
            import_file(path)  # as llm-foundry will: it may register names
        except Exception as error:  # of any kind: it is the user's
            raise PreflightError([f'code_paths: {path} cannot be imported: {error!r}']) from error
    problems: list[str] = []
    checks: list[Callable[[], object]] = [
        lambda: _check_top_level(cfg),
        *(lambda section=section: _check_named(section, cfg) for section in ('scheduler', 'optimizer', 'model')),
        *(lambda section=section: _check_mapping(section, cfg) for section in ('callbacks', 'algorithms', 'loggers')),
        *(lambda where=where, loader=loader: _check_loader(where, loader) for where, loader in _loaders(cfg)),
        lambda: _check_scheduler(cfg),
        lambda: _check_callbacks(cfg),
        lambda: _tokenizer_of(cfg),
        lambda: _check_batch_size(cfg, world_size),
        lambda: _check_averages(cfg, world_size),
        lambda: _check_forgetting(cfg),
        lambda: _check_lm_eval(cfg),
        lambda: _check_loading(cfg),
        lambda: _check_saving(cfg),
        lambda: _check_data(cfg, parent_is_there),
        lambda: problems.extend(find_data_problems(cfg, _loaders(cfg), parent_is_there)),
        lambda: _check_hugging_face(cfg),
        *([lambda: _check_parent(cfg)] if parent_is_there else []),
        # whose own words are not as clear as those of the checks above
        *(
            lambda where=where, loader=loader: problems or _check_workers(where, loader)
            for where, loader in _loaders(cfg)
        ),
        *(lambda name=name: problems or _check_algorithm(name, cfg) for name in cfg.get('algorithms') or {}),
        lambda: problems or _check_optimizer(cfg),
        lambda: problems or _check_model(json.dumps(cfg['model'])),
    ]
    unreadable: list[str] = []  # what a check stumbled over is mostly what another has named
    unseen: list[str] = []
    for check in checks:
        try:
            check()
        except ValueError as error:
            problems.append(str(error))
            unseen += [str(error)] if isinstance(error, StorageError) else []
        except (KeyError, TypeError, AttributeError, IndexError, ArithmeticError) as error:
            unreadable.append(f'the YAML is not of the form llm-foundry reads: {error!r}')
    if problems or unreadable:
        raise PreflightError(list(dict.fromkeys(problems or unreadable)), dict.fromkeys(unseen))


def _loaders(cfg: Config) -> list[tuple[str, Config]]:
    evals = cfg.get('eval_loader') or []
    evals = evals if isinstance(evals, list) else [evals]
    train = [('train_loader', cfg['train_loader'])] if cfg.get('train_loader') else []
    return [*train, *((f'eval_loader[{index}]', loader) for index, loader in enumerate(evals))]


def _check_top_level(cfg: Config) -> None:
    check_keys('', cfg, TRAIN_CONFIG_KEYS - _DERIVED_KEYS | {'eval_loader', 'icl_tasks'})
    if missing := [key for key in (*_REQUIRED_KEYS, *_REQUIRED_HERE) if cfg.get(key) is None]:
        raise ValueError(f'{missing[0]} is missing' + (f' (so are {", ".join(missing[1:])})' if missing[1:] else ''))


def _check_arguments(where: str, kind: Any, name: str, arguments: Mapping[str, Any] | None) -> None:
    """The name is registered and takes these arguments."""
    known = kind.get_all()
    if name not in known:
        near = get_close_matches(name, known, n=1)
        raise ValueError(
            f'{where}: nothing is registered as {name!r}; '
            + (f'did you mean {near[0]!r}?' if near else f'one of {", ".join(sorted(known))} is possible')
        )
    hints = _hints_of(known[name])
    parameters = inspect.signature(known[name]).parameters
    for key, value in (arguments or {}).items():
        if key in hints and value is not None:  # which annotations often forget
            check_type(f'{where}.{key}', value, hints[key])
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        check_keys(where, arguments or {}, parameters.keys() - _IMPLICIT_ARGUMENTS)
    required = {key for key, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    if missing := sorted(required - _IMPLICIT_ARGUMENTS - set(arguments or {})):
        raise ValueError(f'{where}.{missing[0]} is missing')


def _hints_of(kind: Any) -> dict[str, Any]:
    """Types of what a registered class or function takes, as far as they can be known."""
    # MPT takes them as they come
    kind = MPTConfig if kind is ComposerMPTCausalLM else kind
    try:
        return get_type_hints(kind.__init__ if inspect.isclass(kind) else kind)
    except (NameError, TypeError, AttributeError):  # written for a type checker alone
        return {}


def _check_named(section: str, cfg: Config) -> None:
    given = dict(cfg.get(section) or {})
    kinds = {'scheduler': registry.schedulers, 'optimizer': registry.optimizers, 'model': registry.models}
    if 'name' not in given:
        raise ValueError(f'{section}.name is missing')
    if section == 'optimizer' and given.get('lr') is None:
        raise ValueError('optimizer.lr is missing')
    given.pop('master_weights_dtype', None)
    _check_arguments(section, kinds[section], given.pop('name'), given)


def _check_mapping(section: str, cfg: Config) -> None:
    kinds = {'callbacks': registry.callbacks, 'algorithms': registry.algorithms, 'loggers': registry.loggers}
    for name, arguments in (cfg.get(section) or {}).items():
        kind = kinds[section]
        if section == 'callbacks' and name in registry.callbacks_with_config:
            kind = registry.callbacks_with_config
        _check_arguments(f'{section}.{name}', kind, name, arguments)


def _check_loader(where: str, loader: Config) -> None:
    given = {key: value for key, value in loader.items() if key not in ('name', 'label')}
    _check_arguments(where, registry.dataloaders, loader.get('name', ''), given)
    dataset = given.get('dataset') or {}
    hints = _hints_of(StreamingDataset) | _hints_of(StreamingTextDataset) | _hints_of(ReplayTextDataset)
    for key, value in dataset.items():
        if key in hints and key != 'streams' and value is not None:
            check_type(f'{where}.dataset.{key}', value, hints[key])
    if loader['name'] == 'replay_text':
        check_keys(f'{where}.dataset', dataset, DATASET_KEYS | COLLATOR_KEYS)
    elif loader['name'] == 'text':
        # llm-foundry drops what it does not know without a word
        allowed = {*inspect.signature(StreamingTextDataset).parameters, *inspect.signature(StreamingDataset).parameters}
        check_keys(f'{where}.dataset', dataset, allowed - {'tokenizer', 'batch_size', 'kwargs'} | COLLATOR_KEYS)
        if where == 'train_loader' and len(dataset.get('streams') or {}) > 1:
            raise ValueError(
                'train_loader.name=text mixes several streams without saving the mix and may leave data unread; '
                'use name: replay_text with the same streams under dataset.new'
            )
        streams = dataset.get('streams') or {'stream': dataset}
        for name, stream in streams.items():
            check_stream(f'{where}.{name}', {key: value for key, value in stream.items() if key in STREAM_KEYS})
        _sizes_of(where, streams)


def _check_workers(where: str, loader: Config) -> None:
    """Ask torch's DataLoader whether it can be had so, with the defaults of what makes it."""
    parameters = inspect.signature(registry.dataloaders.get(loader['name'])).parameters
    keys = parameters.keys() & {'num_workers', 'prefetch_factor', 'persistent_workers', 'timeout'}
    workers = {key: loader.get(key, parameters[key].default) for key in keys}
    if loader['name'] == 'replay_text' and not workers['num_workers']:  # and takes these away
        workers = {'num_workers': 0}
    try:
        DataLoader([], **workers)  # pyright: ignore[reportArgumentType]
    except (ValueError, TypeError) as error:
        said = ', '.join(f'{key}={short_repr(workers[key])}' for key in sorted(keys & workers.keys()))
        raise ValueError(f'{where}: {said} is refused by the DataLoader: {error}') from None


def _check_scheduler(cfg: Config) -> None:
    duration = parse_time('max_duration', cfg['max_duration']) if isinstance(cfg['max_duration'], str) else None
    if duration is None or duration.value <= 0:
        raise ValueError(
            f"max_duration={cfg['max_duration']!r} must be a positive time such as '1000000tok' or '200ba'"
        )
    # epochs are resolved when the data is known; every other unit is decided here
    phases_of(cfg['scheduler'], cfg['max_duration'], dataloader_len=1)


def _check_callbacks(cfg: Config) -> None:
    for name in ('stage_start', 'final_loss', 'forgetting', 'ema', 'lawa'):
        if name in cfg['callbacks']:
            try:
                build_callback(name, dict(cfg['callbacks'][name] or {}))
            except TypeError:
                continue  # an unknown or missing key, which has been named
            except ValueError as error:
                where = '' if f'callbacks.{name}' in str(error) else f'callbacks.{name}: '
                raise ValueError(f'{where}{error}') from None


def _tokenizer_of(cfg: Config) -> PreTrainedTokenizerBase:
    try:
        return build_tokenizer(cfg['tokenizer']['name'], dict(cfg['tokenizer'].get('kwargs') or {}))
    except Exception as error:
        first_line = ' '.join(str(error).strip().splitlines()[:1])
        kind = StorageError if "couldn't connect" in first_line else ValueError
        raise kind(f'tokenizer={cfg.get("tokenizer")} cannot be loaded: {first_line}') from None


@lru_cache  # the runs of a sequence have mostly the same
def _check_model(section: str) -> None:
    """Ask the model itself."""
    model_on_meta({'model': json.loads(section)})  # without the tokenizer: embeddings cannot grow without memory


def _check_optimizer(cfg: Config) -> None:
    """Ask the optimizer itself, with a step of a small layer."""
    given = copy.deepcopy(cfg['optimizer'])
    name = given.pop('name')
    layer = torch.nn.Linear(1, 1)
    layer.weight.grad = torch.ones_like(layer.weight)
    try:
        build_optimizer(layer, name, given).step()
    except RuntimeError:  # of a kernel that only a GPU has
        return
    except Exception as error:  # some raise no more than that
        raise ValueError(f'optimizer={short_repr(cfg["optimizer"])} is refused by {name}: {error!r}') from None


def _check_algorithm(name: str, cfg: Config) -> None:
    """Ask the algorithm itself."""
    given = dict(cfg['algorithms'][name] or {})
    if name == 'gradient_clipping':  # which looks at it after the first backward pass
        kinds = ('norm', 'value') if cfg.get('fsdp_config') else ('norm', 'value', 'adaptive')
        if given.get('clipping_type') not in kinds:
            raise ValueError(
                f'algorithms.{name}.clipping_type={short_repr(given.get("clipping_type"))} is not possible; use '
                f'{" or ".join(kinds)}'
            )
    try:
        build_algorithm(name, given)
    except Exception as error:
        raise ValueError(f'algorithms.{name}={short_repr(given)} is refused: {error!r}') from None


def _check_batch_size(cfg: Config, world_size: int) -> None:
    for key in ('global_train_batch_size', 'max_seq_len'):
        if not isinstance(cfg.get(key), int) or cfg[key] < 1:
            raise ValueError(f'{key}={cfg.get(key)!r} must be a whole number of at least 1')
    if cfg['global_train_batch_size'] % world_size:
        raise ValueError(
            f'global_train_batch_size={cfg["global_train_batch_size"]} is not divisible by the {world_size} ranks '
            '(nproc)'
        )


def _check_averages(cfg: Config, world_size: int) -> None:
    # Composer's default is 1
    version = os.environ.get('FSDP_VERSION', '1')
    averages = [f'callbacks.{name}' for name in ('ema', 'lawa') if name in cfg['callbacks']]
    if averages and cfg.get('fsdp_config') and world_size > 1 and version != '2':
        raise ValueError(
            f'{averages[0]} works on plain, DDP and FSDP2 models, and FSDP_VERSION={version} in the environment: set '
            'FSDP_VERSION=2 (the same fsdp_config works), or average checkpoints with scripts/average_checkpoints.py'
        )


def _check_forgetting(cfg: Config) -> None:
    given = cfg['callbacks'].get('forgetting')
    if given is None:
        return
    if not cfg.get('load_path') and pretrained_model_of(cfg) is None:
        raise ValueError(
            'callbacks.forgetting compares with the parent, and load_path is missing: name the checkpoint the stage '
            'starts from, or a model with pretrained: true, or leave the callback out when training from scratch'
        )
    if not cfg.get('eval_first'):
        raise ValueError(
            'eval_first=false, and callbacks.forgetting needs it true to evaluate the parent; leave it out'
        )
    labels = [str(loader.get('label')) for where, loader in _loaders(cfg) if where != 'train_loader']
    for key in ('old', 'new'):
        if unknown := [label for label in given.get(key) or [] if label not in labels]:
            near = get_close_matches(unknown[0], labels, n=1)
            raise ValueError(
                f'callbacks.forgetting.{key}: no eval_loader has the label {unknown[0]!r}; '
                + (f'did you mean {near[0]!r}?' if near else f'these are there: {", ".join(labels) or "none"}')
            )


def _check_lm_eval(cfg: Config) -> None:
    given = (cfg.get('variables') or {}).get('lm_eval')
    if given and is_remote(str(cfg.get('save_folder'))):
        raise ValueError(
            f'variables.lm_eval={given} wants the export in a local save_folder, which is {cfg["save_folder"]}; '
            'copy the export and use scripts/evaluate.py'
        )
    if not given:
        return
    try:
        problems = check_suite(load_suite(given))
    except ValueError as error:
        problems = [str(error)]
    if problems:
        raise ValueError(f'variables.lm_eval={short_repr(given)}: {"; ".join(problems)}')


def _check_loading(cfg: Config) -> None:
    if cfg.get('autoresume') is False:
        raise ValueError(
            'autoresume=false: a restart would begin at batch 0 again, over the old checkpoints if they are sharded; '
            'leave it out (the recipe sets it to true)'
        )
    if not cfg.get('load_path'):
        return
    stage_start = cfg['callbacks'].get('stage_start', 'missing')
    if stage_start == 'missing':
        raise ValueError(
            'callbacks.stage_start is missing, and load_path names a parent: add `stage_start: {optimizer: reset}` '
            "(the papers' setting) or `{optimizer: keep}` so that the learning rate of this YAML is obeyed"
        )
    keep = (stage_start or {}).get('optimizer') == 'keep'
    if bool(cfg.get('load_weights_only')) == keep:
        raise ValueError(
            f'load_weights_only={cfg.get("load_weights_only")} contradicts stage_start.optimizer='
            f'{"keep" if keep else "reset"}; leave it out (the recipe sets it)'
        )
    if keep and (missing := set(KEEP_OPTIMIZER_IGNORE_KEYS) - set(cfg.get('load_ignore_keys') or [])):
        raise ValueError(
            f'load_ignore_keys lacks {", ".join(sorted(missing))}, written exactly so (with a star, a sharded load '
            'freezes the learning rate); leave load_ignore_keys out (the recipe sets it)'
        )


def _check_saving(cfg: Config) -> None:
    if cfg.get('save_overwrite'):
        raise ValueError(
            'save_overwrite=true could destroy checkpoints; leave it out, a restart goes on from the latest'
        )
    if cfg.get('save_weights_only'):
        raise ValueError('save_weights_only=true cannot be resumed from; leave it out')
    if not cfg.get('save_folder'):
        return
    folder = _folder_of(cfg)
    check_path('save_folder', folder)
    check_writable('save_folder', folder, 'choose another')
    try:
        names = list_names(folder) if is_remote(folder) else [path.name for path in Path(folder).glob('ep*-ba*')]
    except StorageError as error:
        raise ValueError(f'save_folder: {error}') from None
    if is_remote(folder) and cfg.get('save_num_checkpoints_to_keep', -1) != -1:
        log.warning(
            'save_num_checkpoints_to_keep=%s: Composer deletes nothing from object storage; let a lifecycle rule of '
            'the bucket do it',
            cfg['save_num_checkpoints_to_keep'],
        )
    if any(re.match(r'ep.*-ba', name) for name in names):
        try:
            owner = read_json(f'{folder}/stage.json')['run_name']
        except (TypeError, ValueError, KeyError):
            owner = None
        if owner != cfg.get('run_name'):
            held_by = f'run {owner!r}' if owner else 'a run that this recipe did not start'
            raise ValueError(
                f'save_folder={folder} holds the checkpoints of {held_by}, and run_name is {cfg.get("run_name")!r}: '
                'they would be resumed from or overwritten; choose another save_folder'
            )


def _folder_of(cfg: Config) -> str:
    folder = str(cfg.get('save_folder') or '')
    try:
        return folder.format(run_name=cfg.get('run_name'))
    except (KeyError, IndexError, ValueError, AttributeError):
        raise ValueError(f'save_folder={short_repr(folder)}: only {{run_name}} can stand in braces') from None


def _index_of(stream: Config) -> tuple[int, set[str]] | None:
    """Samples and encodings; None if only training can tell: a store that is not Composer's, or a very large index."""
    split = stream.get('split') or ''
    places = [place for place in (stream.get('local'), stream.get('remote')) if place and not is_remote(place)]
    for place in places:
        index = Path(place) / split / 'index.json'
        if index.exists():
            return _summary(ShardIndex.read(index))
    looked_for = [str(Path(place) / split / 'index.json') for place in places]
    if stream.get('remote') and is_remote(stream['remote']):
        if not stream['remote'].startswith(('s3://', 'gs://', 'oci://', 'azure://')):
            return None
        index = '/'.join(part for part in (stream['remote'].rstrip('/'), split, 'index.json') if part)
        try:
            if size_of(index) > _LARGEST_INDEX:
                return None
            with tempfile.TemporaryDirectory() as here:
                fetch(index, Path(here) / 'index.json')
                return _summary(ShardIndex.read(Path(here) / 'index.json'))
        except FileNotFoundError:
            looked_for.append(index)
    raise FileNotFoundError(' or '.join(looked_for))


def _summary(index: ShardIndex) -> tuple[int, set[str]]:
    return int(index.samples.sum()), {code for kind in index.kinds for code in kind['column_encodings'] or ()}


def _sizes_of(where: str, streams: Mapping[str, Config], max_seq_len: int | None = None) -> dict[str, int | None]:
    """Samples of each stream; None if that is not known here."""
    sizes: dict[str, int | None] = {}
    for name, stream in streams.items():
        if stream.get('remote') and stream.get('local') not in (None, stream['remote']):
            check_writable(
                f'{where}.{name}.local',
                os.path.join(stream['local'], stream.get('split') or ''),
                f'what is read from remote={stream["remote"]} is kept there. Name a folder on a disk of this machine, '
                'or, if all of the data is there already, leave remote out',
            )
        try:
            sizes[name], encodings = _index_of(stream) or (None, set())
        except FileNotFoundError as error:
            raise ValueError(f'{where}.{name}: there is no dataset; looked for {error}') from None
        except StorageError as error:
            raise StorageError(f'{where}.{name}: {error}') from None
        if sizes[name] == 0:
            raise ValueError(f'{where}.{name}: the dataset is empty')
        lengths = {row_length(code) for code in encodings} - {None, max_seq_len}
        if max_seq_len is not None and lengths:
            raise ValueError(
                f'{where}.{name}: max_seq_len={max_seq_len}, but the data was packed to rows of '
                f'{lengths.pop()} tokens; set max_seq_len to that, or prepare the data again'
            )
    return sizes


def _consumed_of(where: str, checkpoint: str, index: Path) -> int:
    # not together: another node may have no index yet
    return read_consumed(where, checkpoint, ShardIndex.read(index).digest, together=False).samples


def _check_data(cfg: Config, parent_is_there: bool) -> None:
    loader = cfg['train_loader']
    if loader.get('name') != 'replay_text':
        return
    dataset = loader['dataset']
    length = dataset.get('max_seq_len')
    if length != cfg['max_seq_len']:
        raise ValueError(
            f'train_loader.dataset.max_seq_len={length} and max_seq_len={cfg["max_seq_len"]} must be equal'
        )
    mix = read_mix(dataset.get('new'), dataset.get('replay'))
    new_sizes = _sizes_of('train_loader.dataset.new', mix.new, length)
    old_sizes = _sizes_of('train_loader.dataset.replay.streams', mix.old, length)
    if None in [*new_sizes.values(), *old_sizes.values()]:
        log.warning('not all data can be looked at from here: whether there is enough is checked when training starts')
        return
    sizes = {'new': sum(size or 0 for size in new_sizes.values()), **{k: v or 0 for k, v in old_sizes.items()}}
    for name, checkpoint in mix.consumed_by.items():
        index = Path(mix.old[name].get('local') or '', mix.old[name].get('split') or '', 'index.json')
        # of what is still to be trained, or elsewhere, the loader itself finds out
        if index.exists() and Path(checkpoint).exists():
            where = f'train_loader.dataset.replay.streams.{name}.consumed_by'
            sizes[name] = min(sizes[name], _consumed_of(where, checkpoint, index))
        elif not is_remote(checkpoint) and parent_is_there and not Path(checkpoint).exists():
            raise ValueError(f'train_loader.dataset.replay.streams.{name}.consumed_by={checkpoint} does not exist')
    duration = parse_time('max_duration', cfg['max_duration'])
    samples = budget_in_samples(duration, cfg['global_train_batch_size'], cfg['max_seq_len'])
    if samples is None:
        samples = int(duration.value) * mix.interleaving.slots_in_one_pass(sizes['new'])
    max_passes = exact_fraction('train_loader.dataset.max_passes', dataset.get('max_passes', 1))
    check_budget(samples, mix.interleaving, sizes, max_passes, cfg['max_seq_len'])


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
    real = resolve_latest(path)
    folder, _, name = real.rstrip('/').rpartition('/')
    if exists(f'{real}/.metadata'):
        with tempfile.TemporaryDirectory() as here:
            fetch(f'{real}/.metadata', Path(here) / '.metadata')
            return _parent_shapes(here)
    if not exists(real):
        there = sorted({found.split('/')[0] for found in list_names(folder) if re.match(r'(ep\d+-ba|latest)', found)})
        near = get_close_matches(name, there, n=1) or there[-1:]
        hint = f'; did you mean {folder}/{near[0].removesuffix(".symlink")}?' if near else ''
        raise FileNotFoundError(hint)
    stage = read_json(f'{folder}/stage.json')
    try:
        return _model_shapes(stage['config'])
    except (TypeError, KeyError, ValueError) as error:
        reason = f'{folder}/stage.json is missing' if stage is None else f'{folder}/stage.json: {error}'
        log.warning('load_path=%s: whether it fits the model is seen when it is loaded (%s)', path, reason)
        return None


def model_on_meta(cfg: Config, tokenizer: PreTrainedTokenizerBase | None = None) -> ComposerModel:
    """The model that a YAML describes, without memory for its weights, and without reading pretrained ones.

    Args:
        cfg: A train YAML; only ``model`` is read.
        tokenizer: May enlarge the embeddings of an MPT. Default: ``None``.

    Raises:
        ValueError: If it cannot be built.
    """
    section = {**cfg['model'], 'init_device': 'meta'}
    name = section.pop('name')
    section.pop('master_weights_dtype', None)
    if name == 'hf_causal_lm':  # kernels that are not installed here would be refused
        section |= {'pretrained': False, 'use_flash_attention_2': False, 'attn_implementation': None}
    try:
        return build_composer_model(name, section, tokenizer, init_context=init_empty_weights(include_buffers=False))
    except Exception as error:
        # of a package that only a machine with a GPU has, or of the hub
        kind = StorageError if re.search("is not installed|couldn't connect", str(error)) else ValueError
        raise kind(f'model cannot be built: {" ".join(str(error).split())}') from None


def _model_shapes(cfg: Config) -> Shapes:
    """Shape of every tensor of the model that a YAML describes."""
    return {key: tuple(value.shape) for key, value in model_on_meta(cfg, _tokenizer_of(cfg)).state_dict().items()}


def _check_parent(cfg: Config) -> None:
    path = cfg.get('load_path')
    try:
        if not path or latest_batch(_folder_of(cfg)):  # a restart does not read its parent
            return
    except StorageError:  # which is said of save_folder
        return
    trusted = (cfg['callbacks'].get('stage_start') or {}).get('trust_checkpoint')
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
        raise ValueError(f'load_path: {error}') from None
    except UnsafeCheckpointError as error:
        raise ValueError(f'load_path={path}: {error}; {TRUST}') from None
    except Exception as error:
        raise ValueError(f'load_path={path} cannot be read as a Composer checkpoint: {error}') from None
    if parent is None:
        return
    if misfits := _misfits(parent, _model_shapes(cfg)):
        raise ValueError(f'load_path={path} does not fit the model: {misfits}')


def _misfits(there: Shapes, here: Shapes) -> str:
    """How two models differ, the first three tensors; empty if they do not."""
    found = [f'{k} is {there[k]} there and {here[k]} here' for k in here if k in there and there[k] != here[k]]
    found += [f'{k} is missing there' for k in here if k not in there]
    found += [f'{k} is not in this model' for k in there if k not in here]
    return _first(found)


def _first(problems: list[str]) -> str:
    return '; '.join(problems[:3]) + (f' (and {len(problems) - 3} more)' if len(problems) > 3 else '')


def _check_hugging_face(cfg: Config) -> None:
    """What would be dropped, left at random, or fail only when the model is built."""
    model = cfg['model']
    if model['name'] != 'hf_causal_lm':
        return
    for key in ('peft_config', 'pretrained_lora_id_or_path', 'load_in_8bit'):
        if model.get(key):
            raise ValueError(
                f'model.{key}: what is trained, averaged and exported here are whole models, neither adapters nor '
                'quantized weights; leave it out, and merge an adapter into its model first'
            )
    base = pretrained_model_of(cfg)
    if base is None:
        return
    if model.get('init_device') == 'meta' and cfg.get('fsdp_config'):
        raise ValueError(
            f'model.init_device=meta, and the weights of {base} are to be read: use mixed (rank 0 reads them), or cpu'
        )
    if overrides := model.get('config_overrides'):
        plain = _model_shapes({**cfg, 'model': {**model, 'config_overrides': {}}})
        if misfits := _misfits(plain, _model_shapes(cfg)):
            raise ValueError(
                f'model.config_overrides={overrides} does not fit the pretrained {base}, of which something would be '
                f'dropped or left at random: {misfits}'
            )
    if Path(base).is_dir() and not any(Path(base).glob('*.bin')):
        _check_weights(base, model_on_meta(cfg).model)


def _check_weights(base: str, model: Any) -> None:
    """Ask transformers, which only warns of it, what it would drop of the weights in a folder or leave at random."""
    stored = {name: torch.empty(one.shape, device='meta') for name, one in open_checkpoint(base).tensors.items()}
    options = {'device_map': {'': 'meta'}, 'ignore_mismatched_sizes': True, 'output_loading_info': True}
    _, found = type(model).from_pretrained(None, config=model.config, state_dict=stored, **options)
    problems = [f'{name} would be left at random' for name in found['missing_keys']]
    problems += [f'{name} would be dropped' for name in found['unexpected_keys']]
    problems += [f'{name} is {there} there and {here} here' for name, there, here in found['mismatched_keys']]
    if problems:
        raise ValueError(f'the weights in {base} do not fit its configuration: {_first(problems)}')


def total_batches(cfg: Config) -> int | None:
    """Batches of the whole stage; None if it is given in epochs."""
    samples = budget_in_samples(
        parse_time('max_duration', cfg['max_duration']), cfg['global_train_batch_size'], cfg['max_seq_len']
    )
    return None if samples is None else samples // cfg['global_train_batch_size']


def latest_batch(save_folder: str | Path) -> int:
    """Batch of the newest complete checkpoint of a run's folder, local or in object storage; 0 if there is none.

    Raises:
        StorageError: If object storage cannot be reached.
    """
    return newest_complete(save_folder)[0]
