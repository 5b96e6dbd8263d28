# SPDX-License-Identifier: Apache-2.0
"""Every check of a stage's YAML that needs no training: all problems at once, before anything expensive starts."""

import inspect
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from llmfoundry import registry
from llmfoundry.data.text_data import StreamingTextDataset
from llmfoundry.models.mpt import ComposerMPTCausalLM, MPTConfig
from llmfoundry.utils.builders import build_algorithm, build_callback
from llmfoundry.utils.config_utils import TrainConfig
from llmfoundry.utils.registry_utils import import_file
from pydantic import Field
from streaming import StreamingDataset
from torch.utils.data import DataLoader

from cpt_algorithms.checkpoints.save_folder import newest_complete
from cpt_algorithms.evaluation.suite import check_suite, load_suite
from cpt_algorithms.files import NoStoreError, StorageError, is_remote, read_json
from cpt_algorithms.formatting import first_of
from cpt_algorithms.replay.replay_text import COLLATOR_KEYS, DATASET_KEYS, ReplayTextDataset
from cpt_algorithms.schedulers.phases import phases_of
from cpt_algorithms.stage.budget_checks import check_data, check_ends, sizes_of
from cpt_algorithms.stage.data_checks import find_data_problems
from cpt_algorithms.stage.foundry_keys import (
    TAKEN_BY_BUILDERS,
    YAML_KEYS,
    check_documents,
    check_early_stopper,
    check_fsdp,
    check_labels,
    check_model_keys,
    check_optimizer,
)
from cpt_algorithms.stage.identity import judging_of
from cpt_algorithms.stage.model_folders import find_folder_problems
from cpt_algorithms.stage.on_meta import model_on_meta, tokenizer_of
from cpt_algorithms.stage.parent_checks import check_hugging_face, check_parent
from cpt_algorithms.stage.record import read_record
from cpt_algorithms.stage.rehearsal import rehearse
from cpt_algorithms.stage.restart_checks import check_format, check_restart, check_saving
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
    PathStr,
    Section,
    check_keys,
    check_type,
    differences,
    nearest,
    short_repr,
)

__all__ = ['PreflightError', 'preflight']

log = logging.getLogger(__name__)

_REQUIRED_HERE = ('run_name', 'save_folder')
# Given by llm-foundry or Composer and not by the YAML.
_IMPLICIT_ARGUMENTS = {'self', 'tokenizer', 'device_batch_size', 'params', 'train_config', 'model'}
# llm-foundry's builders by section, and where the names of each are registered.
_NAMED = {'scheduler': registry.schedulers, 'optimizer': registry.optimizers, 'model': registry.models}
_MAPPINGS = {
    'callbacks': (registry.callbacks, registry.callbacks_with_config),
    'algorithms': (registry.algorithms,),
    'loggers': (registry.loggers,),
}


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
        *(lambda where=where, loader=loader: _check_evaluated(where, loader, stage) for where, loader in stage.loaders),
        lambda: check_fsdp(stage),
        lambda: check_documents(stage),
        lambda: _check_callbacks(stage.callbacks),
        lambda: stage.batches is None or check_ends(stage, stage.batches),
        lambda: lost or tokenizer_of(stage.tokenizer),
        lambda: _check_batch_size(stage, world_size),
        lambda: _check_averages(stage, world_size),
        lambda: _check_forgetting(stage, parent_is_there),
        lambda: _check_lm_eval(stage),
        lambda: _check_loading(stage),
        lambda: check_saving(stage),
        lambda: check_restart(stage),
        lambda: check_format(stage, world_size),
        lambda: check_data(stage, parent_is_there),
        lambda: problems.extend(find_data_problems(stage, parent_is_there, not lost)),
        lambda: lost or check_hugging_face(stage),
        *([lambda: lost or check_parent(stage)] if parent_is_there else []),
        # whose own words are not as clear as those of the checks above
        *(
            lambda where=where, loader=loader: problems or _check_workers(where, loader)
            for where, loader in stage.loaders
        ),
        *(lambda name=name: problems or _check_algorithm(name, stage) for name in stage.algorithms),
        lambda: problems or check_optimizer(stage.optimizer, lambda: model_on_meta(stage.model)),
        lambda: problems or _check_model(stage),
    ]
    unreadable: list[str] = []  # mostly keys that another check has reported
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
        check_type('code_paths', path, PathStr)
        if not Path(path).is_file():
            raise PreflightError([f'code_paths: {path} does not exist, or is a folder'])
        try:
            import_file(path)  # as llm-foundry will: it may register names
        except Exception as error:  # of any kind: it is the user's
            raise PreflightError([f'code_paths: {path} cannot be imported: {error!r}']) from error


def _check_top_level(stage: Stage) -> None:
    check_keys('', stage.given, YAML_KEYS)
    hints = get_type_hints(TrainConfig)
    for key in stage.given.keys() & hints.keys() - Stage.model_fields.keys():
        # llm-foundry keeps what may be a file or a list under a second name
        check_type(key, stage.given[key], hints[key] | hints.get(f'{key}_str', hints[key]))
    for key in ('icl_tasks', 'eval_gauntlet'):
        if isinstance(path := stage.given.get(key), str) and not Path(path).is_file():
            raise ValueError(f'{key}={short_repr(path)} is no file')
    for key in ('only_hf_checkpoint', 'only_composer_checkpoint'):
        if stage.given.get(key):
            raise ValueError(f'{key}=true trains nothing; leave it out, a stage saves and exports at its end')
    if missing := [key for key in _REQUIRED_HERE if not getattr(stage, key)]:
        raise ValueError(' and '.join(missing) + (' is missing' if len(missing) == 1 else ' are missing'))


def _check_arguments(where: str, known: Mapping[str, Any], name: str, arguments: Mapping[str, Any] | None) -> None:
    """The name is one of those registered, and takes these arguments."""
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
    _check_arguments(section, _NAMED[section].get_all(), named.name, arguments)


def _check_mapping(section: str, stage: Stage) -> None:
    for name, arguments in (stage.given.get(section) or {}).items():
        known = {each: kind for kinds in _MAPPINGS[section] for each, kind in kinds.get_all().items()}
        _check_arguments(f'{section}.{name}', known, name, arguments)


def _check_loader(where: str, loader: Loader) -> None:
    given = {key: value for key, value in loader.arguments.items() if key not in TAKEN_BY_BUILDERS['eval_loader']}
    _check_arguments(where, registry.dataloaders.get_all(), loader.name, given)
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
        if dataset.given.get('replication') not in (None, 1):
            raise ValueError(
                f'{where}.dataset.replication={dataset.given["replication"]}: Composer counts the rows that several '
                'ranks read as several, so that a restart would leave some out; leave replication out'
            )
    elif loader.name == 'text':
        # llm-foundry silently drops what it does not know
        allowed = {*inspect.signature(StreamingTextDataset).parameters, *inspect.signature(StreamingDataset).parameters}
        check_keys(f'{where}.dataset', dataset.given, allowed - {'tokenizer', 'batch_size', 'kwargs'} | COLLATOR_KEYS)
        if where == 'train_loader' and len(dataset.streams) > 1:
            raise ValueError(
                'train_loader.name=text mixes several streams without saving the mix and may leave data unread; '
                'use name: replay_text with the same streams under dataset.new'
            )
        sizes_of(loader.streams(where), where)


def _check_evaluated(where: str, loader: Loader, stage: Stage) -> None:
    part = stage.eval_subset_num_batches
    if where.startswith('eval_loader') and loader.dataset.given.get('shuffle') and part != -1:
        raise ValueError(
            f'{where}.dataset.shuffle=true: the {part} batches of eval_subset_num_batches would be others at each '
            'evaluation, and not compared; leave shuffle out'
        )


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


# Callbacks of LLM Foundry with which a run cannot be resumed, and what to use.
_NOT_RESUMED = {
    'curriculum_learning': 'its state is none that a restart may load; use the stages of a sequence',
    'dataset_swap': 'its state is none that a restart may load; use the stages of a sequence',
    'global_lr_scaling': 'each restart would scale the learning rate once more; write optimizer.lr as it is meant',
}


def _check_callbacks(callbacks: Callbacks) -> None:
    for name in ('stage_start', 'final_loss', 'forgetting', 'ema', 'lawa', 'branch_points'):
        section: Section | None = getattr(callbacks, name)
        if section is not None:
            try:
                build_callback(name, section.arguments)
            except TypeError:
                continue  # an unknown or missing key, already reported
            except ValueError as error:
                where = '' if f'callbacks.{name}' in str(error) else f'callbacks.{name}: '
                raise ValueError(f'{where}{error}') from None
    for name in _NOT_RESUMED.keys() & callbacks.given.keys():
        raise ValueError(f'callbacks.{name}: {_NOT_RESUMED[name]}')
    if (callbacks.given.get('kill_loss_spike') or {}).get('log_only') is False:
        raise ValueError(
            'callbacks.kill_loss_spike.log_only=false: the losses that it judges by are those of each rank and in no '
            'checkpoint, so that a restart would end elsewhere; leave log_only out: losses that are not finite stop a '
            'run anyway'
        )


def _check_model(stage: Stage) -> None:
    """Ask the model itself, also for the metrics that are looked for."""
    sections = json.dumps(dict(stage.model.given)), json.dumps(dict(stage.tokenizer.given))
    known = _metrics_of(*sections)
    check_early_stopper(stage, lambda train: _metrics_of(*sections, train))
    for name in ('final_loss', 'forgetting') if stage.eval_loader else ():
        section: Section | None = getattr(stage.callbacks, name)
        metric = section.given.get('metric') if section is not None else None
        if metric is not None and metric not in known:
            raise ValueError(
                f'callbacks.{name}.metric={short_repr(metric)} is not measured of this model; {nearest(metric, known)}'
            )


@lru_cache  # the runs of a sequence have mostly the same
def _metrics_of(section: str, tokenizer: str, train: bool = False) -> list[str]:
    """Ask the model itself, and write what a checkpoint and an export hold beside its weights."""
    model = model_on_meta(Model.model_validate(json.loads(section)))  # embeddings cannot grow without memory
    vars(model)['tokenizer'] = tokenizer_of(Tokenizer.model_validate(json.loads(tokenizer)))
    rehearse(model)
    return list(model.get_metrics(is_train=train))


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
    is_fsdp2 = stage.fsdp_config and world_size > 1 and os.environ.get('FSDP_VERSION', '1') == '2'
    if stage.device_train_microbatch_size == 'auto' and is_fsdp2:
        raise ValueError(
            'device_train_microbatch_size=auto, its default, is not possible with FSDP2 (FSDP_VERSION=2 in the '
            'environment): name a size'
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


def _check_forgetting(stage: Stage, parent_is_there: bool) -> None:
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
    # a restart has them in its checkpoint
    if given.parent_losses and parent_is_there and not newest_complete(stage.folder)[0]:
        _check_parent_losses(stage, given.parent_losses, [*given.old, *given.new])


def _check_parent_losses(stage: Stage, place: str, labels: Sequence[str]) -> None:
    where = 'callbacks.forgetting.parent_losses'
    try:
        losses = read_json(place)
    except StorageError as error:
        raise type(error)(f'{where}: {error}') from None
    except (OSError, ValueError) as error:
        raise ValueError(f'{where}: {error}') from None
    known = losses.get('parent') if isinstance(losses, dict) else None
    if not isinstance(known, dict):
        what = 'does not exist' if losses is None else 'is no forgetting.json'
        raise ValueError(f'{where}={place} {what}; name that of the run whose parent the stage is compared with')
    if lacking := [label for label in labels if label not in known]:
        hint = nearest(lacking[0], known)
        raise ValueError(f'{where}={place}: the parent was not evaluated on {lacking[0]!r}; {hint}')
    if record := read_record(place.rpartition('/')[0] or '.'):
        then, now = (judging_of(each) for each in (record.config, stage))
        others = {'eval_interval', *(key for key in {**then, **now} if key.startswith('eval_loader'))}
        others -= {f'eval_loader.{label}' for label in labels}
        then, now = ({key: value for key, value in how.items() if key not in others} for how in (then, now))
        if then and (found := differences(then, now)):
            raise ValueError(f'{where}={place}: the parent was judged otherwise ({first_of(found)}); judge as there')


def _check_lm_eval(stage: Stage) -> None:
    if not stage.suite:
        return
    if is_remote(stage.save_folder):
        raise ValueError(
            f'variables.lm_eval={stage.suite} wants the export in a local save_folder, which is {stage.save_folder}; '
            'copy the export and use scripts/evaluate.py'
        )
    exported = (stage.given.get('callbacks') or {}).get('hf_checkpointer') or {}
    own = f'{exported.get("save_folder", "")}'.replace('{run_name}', str(stage.run_name))
    for key, is_elsewhere in {
        'save_folder': own and os.path.abspath(own) != os.path.abspath(stage.folder),
        'huggingface_folder_name': exported.get('huggingface_folder_name', 'ba{batch}') != 'ba{batch}',
    }.items():
        if is_elsewhere:
            raise ValueError(
                f'callbacks.hf_checkpointer.{key}={short_repr(exported[key])}: variables.lm_eval looks for the export '
                'in huggingface/ba{batch} of save_folder; leave one of them out'
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
    if 'load_checkpoint' in (stage.given.get('callbacks') or {}):
        raise ValueError('callbacks.load_checkpoint reads weights that no other check knows of; name them in load_path')
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
