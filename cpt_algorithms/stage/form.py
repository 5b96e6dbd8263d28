# SPDX-License-Identifier: Apache-2.0
"""Of what form a train YAML is, whole or in part: checked before anything looks into it."""

import math
import operator
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal, get_type_hints

from composer.core import Precision, Time, TimeUnit
from llmfoundry.command_utils.train import TrainConfig

from cpt_algorithms.validation import check_type, check_yaml_scalars, short_repr

__all__ = ['check_form', 'parse_time']

Config = dict[str, Any]

# llm-foundry's own, but for what it takes and then falls over.
_TYPES = {
    **get_type_hints(TrainConfig),
    'model': dict[str, Any] | str,  # or the path of a YAML
    'eval_loader': dict[str, Any] | list[dict[str, Any]] | None,
    'code_paths': list[str],
    # Composer cannot split a batch of text into parts of 2.5 rows
    'device_train_microbatch_size': int | Literal['auto'],
    'device_eval_batch_size': int,
}
# Of these, null is like nothing, and what is missing is said elsewhere.
_REQUIRED = ('model', 'tokenizer', 'optimizer', 'scheduler', 'train_loader', 'max_duration', 'max_seq_len')
_NAMED = ('callbacks', 'algorithms', 'loggers')
# Parts of sections that are looked into.
_INSIDE: dict[str, Any] = {
    'model.name': str,
    'model.init_device': Literal['cpu', 'meta', 'mixed'],
    'model.pretrained': bool,
    'model.pretrained_model_name_or_path': str,
    'model.config_overrides': dict[str, Any] | None,
    'tokenizer.name': str,
    'tokenizer.kwargs': dict[str, Any] | None,
    'tokenizer.kwargs.model_max_length': int,
    'optimizer.name': str,
    'optimizer.lr': float,
    'optimizer.betas': list[float],
    'scheduler.name': str,
    'fsdp_config.state_dict_type': str,
    'fsdp_config.sharding_strategy': str,
    'fsdp_config.data_parallel_shard_degree': int,
    'fsdp_config.data_parallel_replicate_degree': int | None,
    'train_loader.name': str,
    'train_loader.dataset': dict[str, Any],
    'train_loader.dataset.max_passes': float | str,
    'train_loader.dataset.max_seq_len': int,
    'eval_loader.name': str,
    'eval_loader.label': str,
    'eval_loader.dataset': dict[str, Any],
    'eval_loader.dataset.max_seq_len': int,
    'eval_loader.dataset.streams': dict[str, dict[str, Any]] | None,
    'callbacks.hf_checkpointer.precision': str,
    'callbacks.lawa.k': int,
    'variables.lm_eval': str | list[str] | None,
}
_AT_LEAST = {
    'global_train_batch_size': 1,
    'max_seq_len': 1,
    'device_eval_batch_size': 1,
    'seed': 0,
    'eval_subset_num_batches': -1,
    'train_subset_num_batches': -1,
    'save_num_checkpoints_to_keep': -1,
    'dist_timeout': 1,
    'tokenizer.kwargs.model_max_length': 1,
    # the models are made without any of these, and without a word
    'model.d_model': 1,
    'model.n_layers': 1,
    'model.vocab_size': 1,
    'model.max_seq_len': 1,
    'model.config_overrides.num_hidden_layers': 1,
    'optimizer.weight_decay': 0,
}
# An optimizer that divides by nothing, or does nothing.
_ABOVE = {
    'device_train_microbatch_size': 0,
    'model.expansion_ratio': 0,
    'optimizer.lr': 0,
    'optimizer.eps': 0,
    'algorithms.gradient_clipping.clipping_threshold': 0,
}
_BELOW = {'optimizer.weight_decay': 1}  # decoupled: a share of the weights, times the learning rate's own
_BOUNDS = ((_AT_LEAST, operator.ge, 'at least'), (_ABOVE, operator.gt, 'above'), (_BELOW, operator.lt, 'below'))
_LARGEST_SEED = 2**32 - 1  # numpy's
_INTERVALS = ('eval_interval', 'save_interval', 'console_log_interval', 'callbacks.hf_checkpointer.save_interval')
_CHOICES = {
    'precision': [each.value for each in Precision],
    'python_log_level': ['debug', 'info', 'warning', 'error', 'critical'],
}


def parse_time(key: str, value: Any) -> Time:
    """Read a time, such as ``1000ba``.

    Args:
        key: What it is called in an error.
        value: What the YAML says.

    Raises:
        ValueError: If it is none, or negative.
    """
    try:
        time = Time.from_timestring(value)
        if math.isfinite(time.value) and time.value >= 0:
            return time
    except (ValueError, TypeError, ArithmeticError):
        pass
    raise ValueError(
        f"{key}={short_repr(value)} must be a time of at least 0 with its unit, such as '1000ba' or '1000000tok'"
    )


def check_form(config: Any, where: str = '') -> None:
    """Refuse a train YAML, or a part of one, whose values have not the types and ranges that they must have.

    Keys that nobody knows are not judged here, and neither is what is missing.

    Args:
        config: The YAML, or what a sequence says of some of its keys.
        where: Its dotted path in a sequence. Default: the top.

    Raises:
        ValueError: Naming the key, its value, and what would be right.
    """
    check_type(where or 'the YAML', config, dict)
    check_yaml_scalars(config, where)
    inside = f'{where}.' if where else ''
    for key, value in config.items():
        if key in _TYPES and not (value is None and key in _REQUIRED):
            check_type(f'{inside}{key}', value, _TYPES[key])
    for section in _NAMED:
        for name, arguments in (config.get(section) or {}).items():
            check_type(f'{inside}{section}.{name}', arguments, dict[str, Any] | None)
    evals = config.get('eval_loader')
    loaders = {f'[{number}]': each for number, each in enumerate(evals)} if isinstance(evals, list) else {'': evals}
    for path, hint in _INSIDE.items():
        for index, loader in loaders.items() if path.startswith('eval_loader') else [('', None)]:
            found, value = _find({**config, 'eval_loader': loader}, path)
            if found:
                check_type(f'{inside}{path}'.replace('eval_loader', f'eval_loader{index}'), value, hint)
    _check_ranges(config, inside)


def _find(config: Config, path: str) -> tuple[bool, Any]:
    value: Any = config
    for key in path.split('.'):
        if not isinstance(value, Mapping) or key not in value:
            return False, None
        value = value[key]
    return True, value


def _check_ranges(config: Config, inside: str) -> None:
    for bounds, is_right, words in _BOUNDS:
        for path, bound in bounds.items():
            value = _find(config, path)[1]
            if isinstance(value, int | float) and not is_right(value, bound):
                raise ValueError(f'{inside}{path}={short_repr(value)} must be {words} {bound}')
    if config.get('seed', 0) > _LARGEST_SEED:
        raise ValueError(f'{inside}seed={config["seed"]} must be at most {_LARGEST_SEED}')
    for path in _INTERVALS:
        found, value = _find(config, path)
        if found and not isinstance(value, int):  # a number counts epochs, or batches
            time = parse_time(f'{inside}{path}', value)
            if time.unit == TimeUnit.SECOND:
                raise ValueError(f'{inside}{path}={value} must be in ba, sp, tok, dur or ep')
        if found and isinstance(value, int) and value < 0:
            raise ValueError(f'{inside}{path}={value} must be at least 0')
    for key, known in _CHOICES.items():
        value = config.get(key)
        if value is not None and value.lower() not in known:
            near = get_close_matches(value.lower(), known, n=1)
            right = f'did you mean {near[0]}?' if near else f'one of {", ".join(known)} is possible'
            raise ValueError(f'{inside}{key}={short_repr(value)} is not possible; {right}')
