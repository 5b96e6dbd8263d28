# SPDX-License-Identifier: Apache-2.0
"""Every check of a stage's YAML that needs no training: all problems at once, before anything expensive starts."""

import inspect
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, get_type_hints
from urllib.parse import urlparse

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
    build_tokenizer,
)
from llmfoundry.utils.config_utils import TRAIN_CONFIG_KEYS, TrainConfig
from llmfoundry.utils.registry_utils import import_file
from pydantic import Field
from streaming import StreamingDataset
from streaming.base.storage.download import DOWNLOADER_MAPPINGS
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.utils.data import DataLoader
from transformers.configuration_utils import PretrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from cpt_algorithms.checkpoints.errors import UnsafeCheckpointError
from cpt_algorithms.checkpoints.guard import TRUST
from cpt_algorithms.checkpoints.open import load_structure, model_config_of, open_checkpoint, read_metadata
from cpt_algorithms.checkpoints.save_folder import (
    half_written,
    latest_link,
    newest_complete,
    resolve_latest,
    weights_in,
)
from cpt_algorithms.duration import Duration
from cpt_algorithms.evaluation.suite import check_suite, load_suite
from cpt_algorithms.files import (
    NoStoreError,
    StorageError,
    check_writable,
    exists,
    fetch,
    is_remote,
    list_names,
    read_json,
    size_of,
)
from cpt_algorithms.replay.consumed import read_consumed
from cpt_algorithms.replay.functional import check_budget, exact_fraction
from cpt_algorithms.replay.mix import Stream, row_length
from cpt_algorithms.replay.replay_text import COLLATOR_KEYS, DATASET_KEYS, ReplayTextDataset
from cpt_algorithms.replay.shard_index import ShardIndex
from cpt_algorithms.replay.streams import stale_cache
from cpt_algorithms.schedulers.phases import phases_of
from cpt_algorithms.stage.data_checks import find_data_problems
from cpt_algorithms.stage.foundry_keys import (
    TAKEN_BY_BUILDERS,
    check_documents,
    check_labels,
    check_model_keys,
    check_optimizer,
)
from cpt_algorithms.stage.identity import changes
from cpt_algorithms.stage.model_folders import find_folder_problems
from cpt_algorithms.stage.record import done_with, read_record
from cpt_algorithms.stage.rehearsal import rehearse
from cpt_algorithms.stage.stage import (
    KEEP_OPTIMIZER_IGNORE_KEYS,
    Callbacks,
    Loader,
    Model,
    Optimizer,
    Scheduler,
    Stage,
    Tokenizer,
)
from cpt_algorithms.validation import (
    ConfigError,
    Section,
    check_keys,
    check_path,
    check_type,
    differences,
    nearest,
    short_repr,
)
from cpt_algorithms.weight_averaging.averaged_weights import AveragedWeights

__all__ = ['PreflightError', 'format_problem', 'model_on_meta', 'preflight', 'restart_problem', 'tokenizer_of']

log = logging.getLogger(__name__)

# Filled in by llm-foundry itself; "should not be set by the user".
_DERIVED_KEYS = {'n_gpus', 'device_train_batch_size', 'device_train_grad_accum', 'eval_loaders', 'icl_tasks_str'}
_REQUIRED_HERE = ('run_name', 'save_folder')
# Given by llm-foundry or Composer and not by the YAML.
_IMPLICIT_ARGUMENTS = {'self', 'tokenizer', 'device_batch_size', 'params', 'train_config', 'model'}
# llm-foundry's builders by section, and where the names of each are registered.
_NAMED = {'scheduler': registry.schedulers, 'optimizer': registry.optimizers, 'model': registry.models}
_MAPPINGS = {'callbacks': registry.callbacks, 'algorithms': registry.algorithms, 'loggers': registry.loggers}
# A larger index of a dataset in object storage, of some 200,000 shards, is not downloaded to be looked at.
_LARGEST_INDEX = 2**26


class PreflightError(ConfigError):
    """A YAML that would fail, or silently do something else.

    Args:
        problems: Each with its key, its value and what would be right.
        unseen: Those of them that only say what cannot be reached from here and may be right. Default: none.
    """

    def __init__(self, problems: Sequence[str], unseen: Iterable[str] = ()) -> None:
        super().__init__(problems)
        self.unseen = list(unseen)


def preflight(stage: Stage, world_size: int = 1, parent_is_there: bool = True) -> None:
    """Find everything wrong with a stage that needs more than its YAML to be seen.

    Args:
        stage: The stage.
        world_size: Ranks it will run on. Default: ``1``.
        parent_is_there: Whether to look at the parent's checkpoint; it may still have to be trained. Default: ``True``.

    Raises:
        PreflightError: With all problems found.

    Cost: reads shard indices and the parent's metadata, also from object storage; builds the model without memory if
    there is a parent.
    """
    _import_code(stage.code_paths)
    # what follows from a problem is not one of its own
    lost = list(find_folder_problems(stage))
    problems = list(lost)
    checks: list[Callable[[], object]] = [
        lambda: _check_top_level(stage),
        lambda: (_check_named('model', stage), lost or check_model_keys(stage.model)),
        lambda: _check_named('optimizer', stage),
        lambda: (_check_named('scheduler', stage), _check_scheduler(stage)),
        *(lambda section=section: _check_mapping(section, stage) for section in _MAPPINGS),
        *(lambda where=where, loader=loader: _check_loader(where, loader) for where, loader in stage.loaders),
        lambda: check_labels(stage),
        lambda: check_documents(stage),
        lambda: _check_callbacks(stage.callbacks),
        lambda: stage.batches is None or _check_ends(stage, stage.batches),
        lambda: lost or tokenizer_of(stage.tokenizer),
        lambda: _check_batch_size(stage, world_size),
        lambda: _check_averages(stage, world_size),
        lambda: _check_forgetting(stage),
        lambda: _check_lm_eval(stage),
        lambda: _check_loading(stage),
        lambda: _check_saving(stage),
        lambda: _check_restart(stage),
        lambda: _check_format(stage, world_size),
        lambda: _check_data(stage, parent_is_there),
        lambda: problems.extend(find_data_problems(stage, parent_is_there, not lost)),
        lambda: lost or _check_hugging_face(stage),
        *([lambda: lost or _check_parent(stage)] if parent_is_there else []),
        # whose own words are not as clear as those of the checks above
        *(
            lambda where=where, loader=loader: problems or _check_workers(where, loader)
            for where, loader in stage.loaders
        ),
        *(lambda name=name: problems or _check_algorithm(name, stage) for name in stage.algorithms),
        lambda: problems or check_optimizer(stage.optimizer, lambda: model_on_meta(stage.model)),
        lambda: problems or _check_model(stage),
    ]
    unreadable: list[str] = []  # what a check stumbled over is mostly what another has named
    unseen: list[str] = []
    for check in checks:
        try:
            check()
        except ConfigError as error:
            problems.extend(error.problems)
        except ValueError as error:
            problems.append(str(error))
            unseen += [str(error)] if isinstance(error, StorageError) and not isinstance(error, NoStoreError) else []
        except (KeyError, TypeError, AttributeError, IndexError, ArithmeticError) as error:
            unreadable.append(f'the YAML is not of the form llm-foundry reads: {error!r}')
    if problems or unreadable:
        raise PreflightError(list(dict.fromkeys(problems or unreadable)), dict.fromkeys(unseen))


def _import_code(paths: Sequence[str]) -> None:
    for path in paths:
        check_path('code_paths', path)
        if not Path(path).is_file():
            raise PreflightError([f'code_paths: {path} does not exist, or is a folder'])
        try:
            import_file(path)  # as llm-foundry will: it may register names
        except Exception as error:  # of any kind: it is the user's
            raise PreflightError([f'code_paths: {path} cannot be imported: {error!r}']) from error


def _check_top_level(stage: Stage) -> None:
    check_keys('', stage.given, TRAIN_CONFIG_KEYS - _DERIVED_KEYS | {'eval_loader', 'icl_tasks'})
    hints = get_type_hints(TrainConfig)
    for key in stage.given.keys() & hints.keys() - Stage.model_fields.keys():
        # llm-foundry keeps what may be a file or a list under a second name
        check_type(key, stage.given[key], hints[key] | hints.get(f'{key}_str', hints[key]))
    if missing := [key for key in _REQUIRED_HERE if not getattr(stage, key)]:
        raise ValueError(' and '.join(missing) + (' is missing' if len(missing) == 1 else ' are missing'))


def _check_arguments(where: str, kind: Any, name: str, arguments: Mapping[str, Any] | None) -> None:
    """The name is registered and takes these arguments."""
    known = kind.get_all()
    if name not in known:
        raise ValueError(f'{where}: nothing is registered as {name!r}; {nearest(name, known)}')
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


def _check_named(section: str, stage: Stage) -> None:
    named: Model | Optimizer | Scheduler = getattr(stage, section)
    if not named.name:
        raise ValueError(f'{section}.name is missing')
    if isinstance(named, Optimizer) and named.lr is None:
        raise ValueError('optimizer.lr is missing')
    taken = TAKEN_BY_BUILDERS.get(section, ())
    arguments = {key: value for key, value in named.arguments.items() if key not in taken}
    _check_arguments(section, _NAMED[section], named.name, arguments)


def _check_mapping(section: str, stage: Stage) -> None:
    for name, arguments in (stage.given.get(section) or {}).items():
        with_config = section == 'callbacks' and name in registry.callbacks_with_config
        kind = registry.callbacks_with_config if with_config else _MAPPINGS[section]
        _check_arguments(f'{section}.{name}', kind, name, arguments)


def _check_loader(where: str, loader: Loader) -> None:
    given = {key: value for key, value in loader.arguments.items() if key not in TAKEN_BY_BUILDERS['eval_loader']}
    _check_arguments(where, registry.dataloaders, loader.name, given)
    dataset = loader.dataset
    hints = _hints_of(StreamingDataset) | _hints_of(StreamingTextDataset) | _hints_of(ReplayTextDataset)
    for key, value in dataset.given.items():
        if key in hints and key != 'streams' and value is not None:
            check_type(f'{where}.dataset.{key}', value, hints[key])
    if dataset.given.get('mlm_probability') is not None and loader.name in ('text', 'replay_text'):
        raise ValueError(
            f'{where}.dataset.mlm_probability={dataset.given["mlm_probability"]} masks tokens, and models here predict '
            'the next one; leave it out'
        )
    if loader.name == 'replay_text':
        check_keys(f'{where}.dataset', dataset.given, DATASET_KEYS | COLLATOR_KEYS)
    elif loader.name == 'text':
        # llm-foundry drops what it does not know without a word
        allowed = {*inspect.signature(StreamingTextDataset).parameters, *inspect.signature(StreamingDataset).parameters}
        check_keys(f'{where}.dataset', dataset.given, allowed - {'tokenizer', 'batch_size', 'kwargs'} | COLLATOR_KEYS)
        if where == 'train_loader' and len(dataset.streams) > 1:
            raise ValueError(
                'train_loader.name=text mixes several streams without saving the mix and may leave data unread; '
                'use name: replay_text with the same streams under dataset.new'
            )
        _sizes_of(loader.streams(where), where)


def _check_workers(where: str, loader: Loader) -> None:
    """Ask torch's DataLoader whether it can be had so, with the defaults of what makes it."""
    parameters = inspect.signature(registry.dataloaders.get(loader.name)).parameters
    keys = parameters.keys() & {'num_workers', 'prefetch_factor', 'persistent_workers', 'timeout'}
    workers = {key: loader.given.get(key, parameters[key].default) for key in keys}
    if loader.name == 'replay_text' and not workers['num_workers']:  # and takes these away
        workers = {'num_workers': 0}
    try:
        DataLoader([], **workers)  # pyright: ignore[reportArgumentType]
    except (ValueError, TypeError) as error:
        said = ', '.join(f'{key}={short_repr(workers[key])}' for key in sorted(keys & workers.keys()))
        raise ValueError(f'{where}: {said} is refused by the DataLoader: {error}') from None


def _check_scheduler(stage: Stage) -> None:
    if not stage.max_duration.value:
        raise ValueError(f"max_duration={stage.max_duration} must be a positive time such as '1000000tok' or '200ba'")
    phases_of(stage.scheduler.given, stage.max_duration)  # of epochs, when the data is known


def _check_callbacks(callbacks: Callbacks) -> None:
    for name in ('stage_start', 'final_loss', 'forgetting', 'ema', 'lawa', 'branch_points'):
        section: Section | None = getattr(callbacks, name)
        if section is not None:
            try:
                build_callback(name, section.arguments)
            except TypeError:
                continue  # an unknown or missing key, which has been named
            except ValueError as error:
                where = '' if f'callbacks.{name}' in str(error) else f'callbacks.{name}: '
                raise ValueError(f'{where}{error}') from None


def _check_ends(stage: Stage, batches: int) -> None:
    """Refuse what would come after the end of the stage, and so never, without a word."""
    ends, problems = f'and the stage ends after batch {batches}', []
    # in batches, if only now that is known of epochs
    total = Duration(batches, 'ba') if stage.batches is None else stage.max_duration
    for name in ('ema', 'lawa'):
        section: Section | None = getattr(stage.callbacks, name)
        if section is None or section.given.get('resume_after'):  # a branch has its trunk's
            continue
        try:
            average = build_callback(name, section.arguments)
        except (TypeError, ValueError):  # which has been named
            continue
        assert isinstance(average, AveragedWeights)
        first = average.first_update(total, stage.global_train_batch_size, stage.max_seq_len)
        if first > batches:
            problems.append(
                f'callbacks.{name}: with start={average.start}, interval={average.interval} the first average is that '
                f'after batch {first}, {ends}: choose smaller ones, or leave {name} out'
            )
    points = stage.callbacks.branch_points
    if points is not None and max(points.at, default=0) > batches:
        problems.append(f'callbacks.branch_points.at={points.at}, {ends}')
    if problems:
        raise ConfigError(problems)


def tokenizer_of(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    """The tokenizer that a YAML names.

    Args:
        tokenizer: Its section.

    Raises:
        StorageError: If the hub cannot be reached.
        ValueError: If it cannot be loaded.
    """
    try:
        return build_tokenizer(tokenizer.name, dict(tokenizer.kwargs.given))
    except Exception as error:
        first_line = ' '.join(str(error).strip().splitlines()[:1])
        kind = StorageError if "couldn't connect" in first_line else ValueError
        raise kind(f'tokenizer={dict(tokenizer.given)} cannot be loaded: {first_line}') from None


def _check_model(stage: Stage) -> None:
    """Ask the model itself, also for the metrics that are looked for."""
    known = _metrics_of(json.dumps(dict(stage.model.given)), json.dumps(dict(stage.tokenizer.given)))
    for name in ('final_loss', 'forgetting') if stage.eval_loader else ():
        section: Section | None = getattr(stage.callbacks, name)
        metric = section.given.get('metric') if section is not None else None
        if metric is not None and metric not in known:
            raise ValueError(
                f'callbacks.{name}.metric={short_repr(metric)} is not measured of this model; {nearest(metric, known)}'
            )


@lru_cache  # the runs of a sequence have mostly the same
def _metrics_of(section: str, tokenizer: str) -> list[str]:
    """Ask the model itself, and write what a checkpoint and an export hold beside its weights."""
    model = model_on_meta(Model.model_validate(json.loads(section)))  # embeddings cannot grow without memory
    vars(model)['tokenizer'] = tokenizer_of(Tokenizer.model_validate(json.loads(tokenizer)))
    rehearse(model)
    return list(model.get_metrics(is_train=False))


def _check_algorithm(name: str, stage: Stage) -> None:
    """Ask the algorithm itself."""
    given = dict(stage.algorithms[name] or {})
    if name == 'gradient_clipping':  # which looks at it after the first backward pass
        kinds = ('norm', 'value') if stage.fsdp_config else ('norm', 'value', 'adaptive')
        if given.get('clipping_type') not in kinds:
            raise ValueError(
                f'algorithms.{name}.clipping_type={short_repr(given.get("clipping_type"))} is not possible; use '
                f'{" or ".join(kinds)}'
            )
        check_type(
            f'algorithms.{name}.clipping_threshold', given.get('clipping_threshold'), Annotated[float, Field(gt=0)]
        )
    try:
        build_algorithm(name, given)
    except Exception as error:
        raise ValueError(f'algorithms.{name}={short_repr(given)} is refused: {error!r}') from None


def _check_batch_size(stage: Stage, world_size: int) -> None:
    if stage.global_train_batch_size % world_size:
        raise ValueError(
            f'global_train_batch_size={stage.global_train_batch_size} is not divisible by the {world_size} ranks '
            '(nproc)'
        )


def _check_averages(stage: Stage, world_size: int) -> None:
    # Composer's default is 1
    version = os.environ.get('FSDP_VERSION', '1')
    averages = [f'callbacks.{name}' for name in ('ema', 'lawa') if getattr(stage.callbacks, name)]
    if averages and stage.fsdp_config and world_size > 1 and version != '2':
        raise ValueError(
            f'{averages[0]} works on plain, DDP and FSDP2 models, and FSDP_VERSION={version} in the environment: set '
            'FSDP_VERSION=2 (the same fsdp_config works), or average checkpoints with scripts/average_checkpoints.py'
        )


def _check_forgetting(stage: Stage) -> None:
    given = stage.callbacks.forgetting
    if given is None:
        return
    if stage.parent is None:
        raise ValueError(
            'callbacks.forgetting compares with the parent, and load_path is missing: name the checkpoint the stage '
            'starts from, or a model with pretrained: true, or leave the callback out when training from scratch'
        )
    if not stage.eval_first:
        raise ValueError(
            'eval_first=false, and callbacks.forgetting needs it true to evaluate the parent; leave it out'
        )
    labels = [str(loader.label) for loader in stage.eval_loader]
    for key in ('old', 'new'):
        if unknown := [label for label in getattr(given, key) if label not in labels]:
            where, hint = f'callbacks.forgetting.{key}', nearest(unknown[0], labels)
            raise ValueError(f'{where}: no eval_loader has the label {unknown[0]!r}; {hint}')


def _check_lm_eval(stage: Stage) -> None:
    if not stage.suite:
        return
    if is_remote(stage.save_folder):
        raise ValueError(
            f'variables.lm_eval={stage.suite} wants the export in a local save_folder, which is {stage.save_folder}; '
            'copy the export and use scripts/evaluate.py'
        )
    try:
        problems = check_suite(load_suite(stage.suite))
    except ValueError as error:
        problems = [str(error)]
    if problems:
        raise ValueError(f'variables.lm_eval={short_repr(stage.suite)}: {"; ".join(problems)}')


def _check_loading(stage: Stage) -> None:
    if not stage.autoresume:
        raise ValueError(
            'autoresume=false: a restart would begin at batch 0 again, over the old checkpoints if they are sharded; '
            'leave it out (the recipe sets it to true)'
        )
    if not stage.load_path:
        return
    if stage.callbacks.stage_start is None:
        raise ValueError(
            'callbacks.stage_start is missing, and load_path names a parent: add '
            "`stage_start: {optimizer_state: reset}` (the papers' setting) or `{optimizer_state: keep}` so that the "
            'learning rate of this YAML is obeyed'
        )
    keep = stage.keeps_optimizer_state
    if stage.load_weights_only == keep:
        raise ValueError(
            f'load_weights_only={stage.load_weights_only} contradicts stage_start.optimizer_state='
            f'{"keep" if keep else "reset"}; leave it out (the recipe sets it)'
        )
    if keep and (missing := set(KEEP_OPTIMIZER_IGNORE_KEYS) - set(stage.load_ignore_keys)):
        raise ValueError(
            f'load_ignore_keys lacks {", ".join(sorted(missing))}, written exactly so (with a star, a sharded load '
            'freezes the learning rate); leave load_ignore_keys out (the recipe sets it)'
        )


def _check_saving(stage: Stage) -> None:
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
    try:
        there = weights_in(folder)
        newest = newest_complete(folder)[1]
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
    try:
        owner = (read_json(f'{folder}/stage.json') or {}).get('run_name')
    except (TypeError, ValueError, AttributeError):
        owner = None
    if owner != stage.run_name:
        held_by = f'run {owner!r}' if owner else 'a run that this recipe did not start'
        raise ValueError(
            f'save_folder={folder} holds the checkpoints of {held_by}, and run_name is {stage.run_name!r}: '
            'they would be resumed from or overwritten; choose another save_folder'
        )
    broken = [] if is_remote(folder) else [path.name for path in half_written(Path(folder))]
    # exports are whole or not there, and of a run that ended once, all there is
    known = [*broken, *([] if exists(f'{folder}/done.json') else ['huggingface'])]
    unknown = [name for name in there if name.split('/')[0] not in known]
    # in object storage half of a checkpoint may be there, and is replaced
    if newest is None and unknown and not is_remote(folder) and done_with(stage) is None:
        raise ValueError(
            f'save_folder={folder} holds weights ({_first(unknown)}) and no whole checkpoint to go on from: the run '
            'would begin at batch 0 beside them. Put the checkpoints back, or choose another save_folder'
        )


def restart_problem(stage: Stage) -> str | None:
    """What keeps a stage from going on in its folder: a run that was begun there as another; None if nothing does."""
    try:
        record = read_record(stage.folder)
        is_begun = record is not None and (newest_complete(stage.folder)[0] or exists(f'{stage.folder}/done.json'))
    except StorageError:  # which is said of save_folder
        return None
    # of another run's folder another check speaks
    is_ours = record is not None and record.run_name == stage.run_name
    if record is None or not is_ours or not is_begun or not (changed := changes(record, stage)):
        return None
    return (
        f'save_folder={stage.folder} holds a run with other settings ({_first(changed)}). A restart changes nothing: '
        'put them back, or choose another save_folder'
    )


def _check_restart(stage: Stage) -> None:
    if stage.save_folder and (problem := restart_problem(stage)):
        raise ValueError(problem)


def format_problem(stage: Stage, world_size: int) -> str | None:
    """Why the checkpoint that a stage would load cannot be: sharded ones need ranks and FSDP, others none of it."""
    newest = newest_complete(stage.folder)[1]
    key, path = ('save_folder', newest) if newest else ('load_path', stage.load_path)
    if path is None:
        return None
    is_sharded = Path(path, '.metadata').exists() or bool(re.search(r'latest-sharded-rank0|ep\d+-ba\d+/?$', path))
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


def _check_format(stage: Stage, world_size: int) -> None:
    # a plan for several ranks may be looked at on one process
    if stage.save_folder and (world_size > 1 or not stage.is_sharded):
        try:
            problem = format_problem(stage, world_size)
        except StorageError:  # which is said of save_folder
            return
        if problem:
            raise ValueError(problem)


def _check_remote(key: str, remote: str) -> None:
    """Refuse a place that Streaming can have nothing from."""
    scheme, netloc = urlparse(remote)[:2]
    known = [f'{each}://' for each in DOWNLOADER_MAPPINGS if each]
    if scheme not in DOWNLOADER_MAPPINGS:
        raise ValueError(f'{key}={remote}: Streaming reads nothing from {scheme}://; {nearest(f"{scheme}://", known)}')
    if scheme not in ('', 'dbfs', 'alipan') and not netloc:
        raise ValueError(f'{key}={remote} names no bucket: {scheme}://BUCKET/FOLDER')


def _index_of(stream: Stream) -> tuple[int, set[str]] | None:
    """Samples and encodings; None if only training can tell: a store that is not Composer's, or a very large index."""
    split = stream.split or ''
    here = Path(stream.local, split, 'index.json') if stream.local else None
    if not stream.remote or stream.remote == stream.local:
        if here is None or not here.exists():
            raise FileNotFoundError(here)
        return _summary(ShardIndex.read(here))
    there = '/'.join(part for part in (stream.remote.rstrip('/'), split, 'index.json') if part)
    cached = here if here is not None and here.exists() else None
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(there)
        if is_remote(there):
            if not there.startswith(('s3://', 'gs://', 'oci://', 'azure://')):
                return _summary(ShardIndex.read(cached)) if cached else None
            try:
                size = size_of(there)
                if size > _LARGEST_INDEX and (cached is None or cached.stat().st_size == size):
                    return _summary(ShardIndex.read(cached)) if cached else None
                copy = Path(folder, 'index.json')
                fetch(there, copy)
            except FileNotFoundError:
                raise FileNotFoundError(there) from None
        elif not copy.exists():
            raise FileNotFoundError(there)
        if cached and (problem := stale_cache(cached, copy.read_bytes(), there)):
            raise ValueError(problem)
        return _summary(ShardIndex.read(copy))


def _summary(index: ShardIndex) -> tuple[int, set[str]]:
    return int(index.samples.sum()), {code for kind in index.kinds for code in kind['column_encodings'] or ()}


def _sizes_of(streams: Mapping[str, Stream], where: str, max_seq_len: int | None = None) -> dict[str, int | None]:
    """Samples of each stream; None if that is not known here."""
    sizes: dict[str, int | None] = {}
    for name, stream in streams.items():
        if stream.remote:
            _check_remote(f'{where}.{name}.remote', stream.remote)
        if stream.remote and stream.local not in (None, stream.remote):
            check_writable(
                f'{where}.{name}.local',
                os.path.join(stream.local, stream.split or ''),
                f'what is read from remote={stream.remote} is kept there. Name a folder on a disk of this machine, '
                'or, if all of the data is there already, leave remote out',
            )
        try:
            sizes[name], encodings = _index_of(stream) or (None, set())
        except FileNotFoundError as error:
            raise ValueError(f'{where}.{name}: there is no dataset; looked for {error}') from None
        except StorageError as error:
            raise type(error)(f'{where}.{name}: {error}') from None
        except ValueError as error:
            raise ValueError(f'{where}.{name}: {error}') from None
        if sizes[name] == 0:
            raise ValueError(f'{where}.{name}: the dataset is empty')
        if max_seq_len is not None and encodings and not any(map(row_length, encodings)):
            log.warning('%s.%s: rows of text are not full; a budget in tokens is planned as if they were', where, name)
        lengths = {row_length(code) for code in encodings} - {None, max_seq_len}
        if max_seq_len is not None and lengths:
            raise ValueError(
                f'{where}.{name}: max_seq_len={max_seq_len}, but the data was packed to rows of '
                f'{lengths.pop()} tokens; set max_seq_len to that, or prepare the data again'
            )
    return sizes


def _check_data(stage: Stage, parent_is_there: bool) -> None:
    mix, dataset = stage.mix, stage.train_loader.dataset
    if mix is None:
        return
    if stage.train_subset_num_batches != -1:
        raise ValueError(
            f'train_subset_num_batches={stage.train_subset_num_batches}: of a pass that is cut short nobody knows what '
            'was read; leave it out, and say how much is trained in max_duration'
        )
    length = dataset.max_seq_len
    if length != stage.max_seq_len:
        raise ValueError(f'train_loader.dataset.max_seq_len={length} and max_seq_len={stage.max_seq_len} must be equal')
    new_sizes = _sizes_of(mix.new, 'train_loader.dataset.new', length)
    old_sizes = _sizes_of(mix.old, 'train_loader.dataset.replay.streams', length)
    if None in [*new_sizes.values(), *old_sizes.values()]:
        log.warning('not all data can be looked at from here: whether there is enough is checked when training starts')
        return
    sizes = {'new': sum(size or 0 for size in new_sizes.values()), **{k: v or 0 for k, v in old_sizes.items()}}
    for name, stream in mix.old.items():
        if (checkpoint := stream.only_seen_by) is None:
            continue
        where = f'train_loader.dataset.replay.streams.{name}.only_seen_by'
        index = Path(stream.local or '', stream.split or '', 'index.json')
        # of what is still to be trained, or elsewhere, the loader itself finds out
        if index.exists() and Path(checkpoint).exists():
            # not together: another node may have no index yet
            read = read_consumed(where, checkpoint, ShardIndex.read(index).digest, together=False).samples
            sizes[name] = min(sizes[name], read)
        elif not is_remote(checkpoint) and parent_is_there and not Path(checkpoint).exists():
            raise ValueError(f'{where}={checkpoint} does not exist')
    if stage.batches is None:
        slots = mix.interleaving.slots_in_one_pass(sizes['new'])
        samples = int(stage.max_duration.value) * slots
        phases_of(stage.scheduler.given, stage.max_duration, slots // stage.global_train_batch_size)
        _check_ends(stage, samples // stage.global_train_batch_size)
    else:
        samples = stage.batches * stage.global_train_batch_size
    max_passes = exact_fraction('train_loader.dataset.max_passes', dataset.max_passes)
    check_budget(samples, mix.interleaving, sizes, max_passes, stage.max_seq_len)


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


def model_on_meta(model: Model, tokenizer: PreTrainedTokenizerBase | None = None) -> ComposerModel:
    """The model that a YAML describes, without memory for its weights, and without reading pretrained ones.

    Args:
        model: The YAML's section.
        tokenizer: May enlarge the embeddings of an MPT. Default: ``None``.

    Raises:
        ValueError: If it cannot be built.
    """
    section = {**model.arguments, 'init_device': 'meta'}
    section.pop('master_weights_dtype', None)
    if model.name == 'hf_causal_lm':  # kernels that are not installed here would be refused
        section |= {'pretrained': False, 'use_flash_attention_2': False, 'attn_implementation': None}
    try:
        return build_composer_model(
            model.name, section, tokenizer, init_context=init_empty_weights(include_buffers=False)
        )
    except Exception as error:
        # of a package that only a machine with a GPU has, or of the hub
        kind = StorageError if re.search("is not installed|couldn't connect", str(error)) else ValueError
        raise kind(f'model cannot be built: {" ".join(str(error).split())}') from None


def _model_shapes(stage: Stage) -> Shapes:
    """Shape of every tensor of the model that a YAML describes."""
    model = model_on_meta(stage.model, tokenizer_of(stage.tokenizer))
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def _check_parent(stage: Stage) -> None:
    path = stage.load_path
    try:
        if not path or newest_complete(stage.folder)[0]:  # a restart does not read its parent
            return
    except StorageError:  # which is said of save_folder
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
    if misfits := _misfits(parent, _model_shapes(stage)):
        raise ValueError(f'load_path={path} does not fit the model: {misfits}')
    if changed := _model_changes(path, stage):
        raise ValueError(
            f'load_path={path} was trained as another model, of the same shapes: {_first(changed)}. Set the model as '
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
_NOT_OF_THE_MODEL |= PretrainedConfig().to_dict().keys() - {'tie_word_embeddings'}


def _config_on_meta(model: Model, stage: Stage) -> PretrainedConfig:
    inside: Any = model_on_meta(model, tokenizer_of(stage.tokenizer)).model
    return inside.config


def _model_changes(path: str, stage: Stage) -> list[str]:
    """Settings of the parent's model that are others here, and show in no shape."""
    here = _config_on_meta(stage.model, stage)
    if is_remote(path):
        record = read_record(resolve_latest(path).rpartition('/')[0])
        if record is None or record.config.model.name != stage.model.name:
            return []
        there = _config_on_meta(record.config.model, stage)
    elif content := model_config_of(path):
        there = type(here).from_dict(dict(content))
    else:
        return []
    allowed = stage.callbacks.stage_start.model_changes if stage.callbacks.stage_start else []
    found = differences(_of_the_model(there.to_dict()), _of_the_model(here.to_dict()))
    return [line for line in found if line.partition(':')[0] not in allowed]


def _of_the_model(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {
        key: value
        for key, value in config.items()
        if key not in _NOT_OF_THE_MODEL and not key.startswith('_') and not key.endswith(('dropout', 'pdrop'))
    }
    return {key: _of_the_model(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _misfits(there: Shapes, here: Shapes) -> str:
    """How two models differ, the first three tensors; empty if they do not."""
    found = [f'{k} is {there[k]} there and {here[k]} here' for k in here if k in there and there[k] != here[k]]
    found += [f'{k} is missing there' for k in here if k not in there]
    found += [f'{k} is not in this model' for k in there if k not in here]
    return _first(found)


def _first(problems: list[str]) -> str:
    return '; '.join(problems[:3]) + (f' (and {len(problems) - 3} more)' if len(problems) > 3 else '')


def _check_hugging_face(stage: Stage) -> None:
    """What would be dropped, left at random, or fail only when the model is built."""
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
        if misfits := _misfits(_model_shapes(plain), _model_shapes(stage)):
            raise ValueError(
                f'model.config_overrides={overrides} does not fit the pretrained {pretrained}, of which something '
                f'would be dropped or left at random: {misfits}'
            )
    if Path(pretrained).is_dir() and not any(Path(pretrained).glob('*.bin')):
        _check_weights(pretrained, model_on_meta(model).model)


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
