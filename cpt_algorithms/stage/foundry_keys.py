# SPDX-License-Identifier: Apache-2.0
"""Keys that LLM Foundry would take and drop, patterns that match nothing, labels of two, asked of what it builds."""

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from composer.callbacks import EarlyStopper
from composer.core import Precision
from composer.distributed.mosaic_parallelism import SHARDING_MAP, get_mixed_precision
from composer.models import ComposerModel
from composer.utils.parallelism import FSDP2Config, FSDPConfig
from llmfoundry import registry
from llmfoundry.command_utils import train
from llmfoundry.layers_registry import param_init_fns
from llmfoundry.models.layers.blocks import MPTBlock
from llmfoundry.models.mpt import ComposerMPTCausalLM, MPTConfig
from llmfoundry.models.utils.config_defaults import attn_config_defaults, init_config_defaults
from llmfoundry.utils.builders import _extract_param_groups, build_eval_loaders, build_optimizer
from llmfoundry.utils.config_utils import TRAIN_CONFIG_KEYS
from transformers.configuration_utils import PretrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

from cpt_algorithms.compat import SETTINGS_OF_ALL, rope_validation
from cpt_algorithms.duration import Duration
from cpt_algorithms.evaluation.functional import check_labels as check_names
from cpt_algorithms.files import read_yaml
from cpt_algorithms.keys_read import keys_read
from cpt_algorithms.stage.stage import Model, Optimizer, Stage
from cpt_algorithms.validation import check_keys, check_type, nearest, short_repr

__all__ = [
    'TAKEN_BY_BUILDERS',
    'YAML_KEYS',
    'check_documents',
    'check_early_stopper',
    'check_fsdp',
    'check_labels',
    'check_model_keys',
    'check_optimizer',
]

# What builders take out of a section before they hand it to what is registered under its name.
TAKEN_BY_BUILDERS = {
    'model': keys_read(train, 'model_config'),
    'optimizer': keys_read(build_optimizer, 'optimizer_config'),
    'eval_loader': keys_read(build_eval_loaders, 'eval_config'),
}
# The others are filled in by llm-foundry itself; "should not be set by the user".
YAML_KEYS = {*TRAIN_CONFIG_KEYS, 'eval_loader', 'icl_tasks'} - {
    'n_gpus', 'device_train_batch_size', 'device_train_grad_accum', 'eval_loaders', 'icl_tasks_str'
}  # fmt: skip
_PATTERN = next(iter(keys_read(_extract_param_groups, 'param_group_config')))  # param_str_match


def check_model_keys(model: Model) -> None:
    """Refuse keys of the model's section that nothing reads, also nested ones.

    Args:
        model: The section.

    Raises:
        ValueError: Naming the first, and what is near.
    """
    given = model.given
    if registry.models.get(model.name) is ComposerMPTCausalLM:
        settings = {name for name in SETTINGS_OF_ALL | vars(PretrainedConfig()).keys() if not name.startswith('_')}
        read = _parameters(ComposerMPTCausalLM) | _parameters(MPTConfig) | settings
        check_keys('model', given, read | keys_read(MPTBlock.__init__, 'kwargs') | TAKEN_BY_BUILDERS['model'])
        _check_init(given.get('init_config') or {})
        for name, default in attn_config_defaults.items():
            nested = (given.get('attn_config') or {}).get(name)
            if isinstance(default, Mapping) and nested:
                _check_nested(f'model.attn_config.{name}', nested, default, is_rope=name == 'rope_hf_config')
    elif (
        model.name == 'hf_causal_lm'
        and (name_or_path := model.pretrained_model_name_or_path)
        and any(isinstance(each, Mapping) for each in model.config_overrides.given.values())
    ):
        try:
            config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=given.get('trust_remote_code', True))
        except (OSError, ValueError):  # which another check says
            return
        for name, nested in model.config_overrides.given.items():
            where, there = f'model.config_overrides.{name}', getattr(config, name, None)
            if isinstance(nested, Mapping) and (there is None or isinstance(there, Mapping)):
                if there is None and name != 'rope_scaling':
                    raise ValueError(
                        f'{where}={short_repr(nested)} is not a section that the model reads; leave it out'
                    )
                _check_nested(where, nested, there or {}, is_rope=name == 'rope_scaling')


def _check_nested(where: str, given: Any, known: Mapping[str, Any], is_rope: bool = False) -> None:
    """What stands in a section is what stands there by default; of RoPE, what transformers reads of its kind."""
    check_type(where, given, Mapping[str, Any])
    kinds = {str(key) for key in known} | ({'type', 'rope_type'} if is_rope else set())
    if is_rope and (reader := rope_validation(str(given.get('rope_type', given.get('type'))))):
        kinds |= {
            each.value
            for each in ast.walk(_source(reader))
            if isinstance(each, ast.Constant) and isinstance(each.value, str)
        }
    check_keys(where, given, kinds)
    for name, nested in given.items():
        if isinstance(nested, Mapping) and isinstance(known.get(name), Mapping):
            _check_nested(f'{where}.{name}', nested, known[name])


def _check_init(given: Mapping[str, Any]) -> None:
    """Of MPT's initialisation, which drops what its function does not take."""
    name = given.get('name', init_config_defaults['name'])
    if name not in param_init_fns:
        raise ValueError(
            f'model.init_config.name={short_repr(name)} is not possible; {nearest(name, param_init_fns.get_all())}'
        )
    function = param_init_fns.get(name)
    if function.__module__.startswith('llmfoundry.'):  # another may hand them on
        read = _parameters(function) - {'module', 'n_layers', 'd_model'} | {'name'}
        changed = [key for key in given if given[key] != init_config_defaults.get(key, ...)]
        try:
            check_keys('model.init_config', changed, read)
        except ValueError as error:
            raise ValueError(f'{error}, with name={name}') from None


def _parameters(function: Any) -> set[str]:
    """Names that can be given."""
    kinds = inspect.signature(function).parameters.items()
    return {name for name, each in kinds if each.kind is not each.VAR_KEYWORD} - {'self', 'tokenizer'}


def _source(function: Callable[..., Any]) -> ast.Module:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


def check_optimizer(optimizer: Optimizer, build_model: Callable[[], ComposerModel]) -> None:
    """Ask the optimizer itself, with a step of a small layer for each group, and the model which parameters match.

    Args:
        optimizer: The section.
        build_model: Gives the real model; its weights are not looked at. Called only if there are patterns.

    Raises:
        ValueError: If it is refused, a pattern matches no parameter, or nothing is left to train.
    """
    arguments = optimizer.arguments
    frozen, groups = arguments.pop('disable_grad', None), arguments.pop('param_groups', None) or []
    check_type('optimizer.disable_grad', frozen, str | list[str] | None)
    check_type('optimizer.param_groups', groups, list[dict[str, Any]])
    _step('optimizer', optimizer.name, arguments)
    kind = registry.optimizers.get(optimizer.name)
    patterns = []
    for number, group in enumerate(groups):
        where = f'optimizer.param_groups[{number}]'
        if _PATTERN not in group:
            raise ValueError(f'{where}.{_PATTERN} is missing: which parameters the group has')
        check_type(f'{where}.{_PATTERN}', group[_PATTERN], str)
        changed = {key: value for key, value in group.items() if key != _PATTERN}
        if not any(each.kind is each.VAR_KEYWORD for each in inspect.signature(kind).parameters.values()):
            check_keys(where, changed, _parameters(kind) - {'params'})  # torch takes any
        _step(where, optimizer.name, arguments | changed)
        patterns.append((f'{where}.{_PATTERN}', group[_PATTERN]))
    frozen = [frozen] if isinstance(frozen, str) else frozen or []
    if patterns or frozen:
        names = [name for name, _ in build_model().named_parameters()]
        trained = set(names)
        for pattern in frozen:
            trained -= set(_matching('optimizer.disable_grad', pattern, names))
        if not trained:
            raise ValueError(f'optimizer.disable_grad={short_repr(frozen)} leaves no parameter to be trained')
        for where, pattern in patterns:  # the first that matches has it
            taken = _matching(where, pattern, names)
            names = [name for name in names if name not in taken]


def _matching(where: str, pattern: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    try:
        found = [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise ValueError(f'{where}={pattern!r} is not a regular expression: {error}') from None
    if not found:
        some = ', '.join(names[:2] + names[-1:]) or 'none is left by the groups before'
        raise ValueError(f'{where}={pattern!r} matches no parameter of the model; they are called such as {some}')
    return found


def _step(where: str, name: str, arguments: Mapping[str, Any]) -> None:
    """Some arguments are looked at in a step only."""
    layer = torch.nn.Linear(1, 1)
    layer.weight.grad = torch.ones_like(layer.weight)
    try:
        build_optimizer(layer, name, dict(arguments)).step()
    except RuntimeError:  # of a kernel that only a GPU has
        return
    except Exception as error:  # some raise no more than that
        raise ValueError(f'{where}={short_repr(dict(arguments))} is refused by {name}: {error!r}') from None


def check_labels(stage: Stage) -> None:
    """Refuse two evaluators with one label, whose losses llm-foundry would mix into one number.

    Args:
        stage: The stage.

    Raises:
        ValueError: Naming the label.
    """
    labels = [str(loader.label) for loader in stage.eval_loader]
    if len(labels) > 1 and 'None' in labels:
        raise ValueError(f'eval_loader[{labels.index("None")}].label is missing')
    for task in _icl_tasks(stage.given.get('icl_tasks')):
        if isinstance(task, Mapping) and isinstance(task.get('num_fewshot'), list):
            labels += [f'{task.get("label")}/{shots}-shot' for shots in task['num_fewshot']]
    check_names(labels)


def _icl_tasks(given: Any) -> list[Any]:
    """The tasks of a list, or of the file that a path names, as llm-foundry reads it."""
    if isinstance(given, str) and Path(given).is_file():  # of another, a check of its own speaks
        where = f'icl_tasks={given}'
        try:
            given = read_yaml(given).get('icl_tasks')
        except ValueError as error:
            raise ValueError(f'{where}: {error}') from None
        check_type(f'{where}: icl_tasks', given, list[dict[str, Any]])
    return given if isinstance(given, list) else []


def check_documents(stage: Stage) -> None:
    """Refuse a model that attends within documents without data that says where they end, and the reverse.

    Args:
        stage: The stage.

    Raises:
        ValueError: Naming the first loader.
    """
    is_masked = (stage.model.given.get('attn_config') or {}).get('attn_uses_sequence_id')
    for where, loader in stage.loaders:
        ends = [key for key in ('eos_token_id', 'bos_token_id') if loader.dataset.given.get(key) is not None]
        if ends and stage.model.name == 'hf_causal_lm':
            raise ValueError(
                f'{where}.dataset.{ends[0]}: Composer does not give a Hugging Face model the sequence_id that follows '
                'from it: it would attend across documents all the same; say callbacks.mask_documents: {} instead'
            )
        if is_masked and loader.name in ('text', 'replay_text') and not (ends or stage.callbacks.masks_documents):
            raise ValueError(
                f'{where}.dataset.eos_token_id is missing (or bos_token_id), and model.attn_config.'
                'attn_uses_sequence_id is true: without it, the model would attend across documents there, or fail at '
                'the first batch; or say callbacks.mask_documents: {}, with which positions restart, too'
            )


def check_fsdp(stage: Stage) -> None:
    """Refuse keys of ``fsdp_config`` that Composer would take and never read, and values that fail on ranks only.

    Args:
        stage: The stage.

    Raises:
        ValueError: Naming the first.
    """
    given = stage.given.get('fsdp_config') or {}
    known = {field.name for kind in (FSDPConfig, FSDP2Config) for field in dataclasses.fields(kind)}
    check_keys('fsdp_config', given, {name for name in known if not name.startswith('_')})
    strategies = [name for name in SHARDING_MAP if not name.startswith('_')]
    choices = {'sharding_strategy': strategies, 'state_dict_type': ['full', 'sharded']}
    for key, possible in choices.items():
        value = given.get(key, possible[0])
        if str(value).lower() not in map(str.lower, possible):
            raise ValueError(f'fsdp_config.{key}={short_repr(value)} is not possible; {nearest(str(value), possible)}')
    try:
        get_mixed_precision(Precision(stage.precision), given.get('mixed_precision', 'DEFAULT'))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'fsdp_config.mixed_precision={short_repr(given["mixed_precision"])} is not possible: {error}'
        ) from None


def check_early_stopper(stage: Stage, metrics: Callable[[bool], list[str]]) -> None:
    """Refuse what Composer reads at the first evaluation only, and a loss of which it would take the highest for best.

    Args:
        stage: The stage.
        metrics: Names of the model's metrics, in training or not.

    Raises:
        ValueError: Naming the key.
    """
    given = stage.given.get('callbacks', {}).get('early_stopper')
    if not given or stage.given.get('icl_tasks'):  # whose metrics are their own
        return
    where, label = 'callbacks.early_stopper', given['dataloader_label']
    labels = ['train', *('eval' if each.label is None else f'eval/{each.label}' for each in stage.eval_loader)]
    if label not in labels:
        raise ValueError(f'{where}.dataloader_label={short_repr(label)}: {nearest(str(label), labels)}')
    metric, known = given['monitor'], metrics(label == 'train')
    if metric not in known:
        raise ValueError(f'{where}.monitor={short_repr(metric)} is not measured there; {nearest(str(metric), known)}')
    comparisons = ('gt', 'greater', 'lt', 'less')
    if (comp := given.get('comp')) is not None and str(comp).lower() not in comparisons:
        raise ValueError(f'{where}.comp={short_repr(comp)}: {nearest(str(comp), comparisons)}')
    if not isinstance(patience := given.get('patience', 1), int):
        Duration.parse(f'{where}.patience', patience, units=('ba', 'ep'))
    if comp is None and 'entropy' in metric.lower() and EarlyStopper(metric, label).comp_func is torch.greater:
        raise ValueError(
            f'{where}.comp is missing, and Composer takes the highest {metric} for the best: the run would stop '
            'because it learns; use comp: less'
        )
