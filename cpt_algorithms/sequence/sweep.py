# SPDX-License-Identifier: Apache-2.0
"""W&B's sweep files over a sequence: one trial is one arm, whether ``wandb agent`` or this machine runs it.

A parameter is ``STAGE.KEY``, as in ``cpp.replay.fraction``; a trial is the list of ``STAGE.KEY=VALUE`` that W&B's agent
puts in place of ``${args_no_hyphens}``. Nothing here imports wandb.
"""

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from omegaconf import OmegaConf

from cpt_algorithms.sequence.expand import Run, expand
from cpt_algorithms.sequence.spec import SequenceSpec
from cpt_algorithms.validation import check_keys, check_type, check_yaml_scalars, short_repr

__all__ = ['expand_trials', 'sequence_of', 'trials_of']

Config = dict[str, Any]

SWEEP_KEYS = (
    'name',
    'description',
    'entity',
    'project',
    'program',
    'command',
    'method',
    'metric',
    'parameters',
    'run_cap',
)
# What decides the tokens of a stage and the operations per token.
_COMPUTE = ('max_duration', 'global_train_batch_size', 'max_seq_len')
_COMMAND = ['${env}', '${interpreter}', '${program}', 'SEQUENCE.yaml', '--trial', '${args_no_hyphens}']
_MOST_TRIALS = 10_000
_GRID = ('constant', 'categorical', 'int_uniform')
_RANDOM = (*_GRID, 'categorical_w_probabilities', 'uniform', 'q_uniform', 'log_uniform_values')


def sequence_of(sweep: Mapping[str, Any]) -> list[str]:
    """The sequence YAML that a sweep varies, and the ``key=value`` that it changes for all trials.

    Args:
        sweep: The sweep file, read by ``yaml.safe_load`` as ``wandb sweep`` does.

    Raises:
        ValueError: If ``command`` hands no trial to a sequence.
    """
    if not isinstance(sweep, Mapping):
        raise ValueError('a sweep is a mapping with the keys program, command, method, metric and parameters')
    check_yaml_scalars(sweep)
    check_type('command', sweep.get('command') or [], list[str])
    command = sweep.get('command') or []
    words = command[command.index('${program}') + 1 : -2] if '${program}' in command else []
    if command[-2:] != _COMMAND[-2:] or not words:
        raise ValueError(f'command={command} hands no trial to a sequence; use {_COMMAND}')
    return words


def trials_of(sweep: Mapping[str, Any]) -> list[list[str]]:
    """All trials, each as W&B's agent would hand it over, without duplicates.

    ``grid`` gives W&B's trials in W&B's order. ``random`` draws ``run_cap`` trials, the same at each call, of which a
    larger ``run_cap`` keeps all; numbers have four significant digits, so that names of runs stay readable.

    Args:
        sweep: The sweep file.

    Raises:
        ValueError: If only W&B's server can run it, or it cannot be read.
    """
    method, cap = sweep.get('method'), sweep.get('run_cap')
    if method not in ('grid', 'random') or 'early_terminate' in sweep:
        what = 'early_terminate' if method in ('grid', 'random') else f'method={method!r}'
        raise ValueError(f'{what} needs wandb agent; grid and random, to their end, are possible without it')
    check_keys('', sweep, SWEEP_KEYS)
    parameters = sweep.get('parameters') or {}
    if not parameters or not isinstance(parameters, Mapping):
        raise ValueError('parameters is missing from the sweep, or is not a mapping')
    if cap is not None and (not isinstance(cap, int) or isinstance(cap, bool) or not 1 <= cap <= _MOST_TRIALS):
        raise ValueError(f'run_cap={short_repr(cap)} must be a whole number from 1 to {_MOST_TRIALS}')
    for name, parameter in parameters.items():
        _check_parameter(f'parameters.{name}', parameter, _GRID if method == 'grid' else _RANDOM, method)
    if method == 'grid':
        values = [_grid(parameters[name]) for name in sorted(parameters)]
        if (count := math.prod(map(len, values))) > _MOST_TRIALS:
            raise ValueError(f'parameters: a grid of {count} trials, and at most {_MOST_TRIALS} are possible')
        drawn: Iterator[tuple[Any, ...]] = itertools.product(*values)
    else:
        if cap is None:
            raise ValueError('run_cap is missing: how many trials method=random draws')
        # Random.random is the same in all Python versions, unlike choice and randint
        generator = random.Random(0)
        drawn = (tuple(_draw(parameters[name], generator.random()) for name in sorted(parameters)) for _ in range(cap))
    trials = ([f'{name}={value}' for name, value in zip(sorted(parameters), trial, strict=True)] for trial in drawn)
    return [list(trial) for trial in dict.fromkeys(map(tuple, itertools.islice(trials, cap)))]


def _distribution(parameter: Mapping[str, Any]) -> str:
    """As W&B infers it."""
    if 'value' in parameter:
        inferred = 'constant'
    elif 'values' in parameter:
        inferred = 'categorical_w_probabilities' if 'probabilities' in parameter else 'categorical'
    else:
        whole = all(isinstance(parameter.get(key), int) for key in ('min', 'max'))
        inferred = 'int_uniform' if whole else 'uniform'
    return parameter.get('distribution', inferred)


def _check_parameter(where: str, parameter: Any, possible: Sequence[str], method: str) -> None:
    if not isinstance(parameter, Mapping) or 'parameters' in parameter:
        raise ValueError(f'{where} must be one parameter; write nested keys with dots, as in cpp.replay.fraction')
    distribution = _distribution(parameter)
    check_type(f'{where}.distribution', distribution, str)
    if distribution not in possible:
        raise ValueError(
            f'{where}: distribution {distribution} with method={method} needs wandb agent; '
            f'possible without it: {", ".join(possible)}'
        )
    needed = {'constant': ('value',), 'categorical': ('values',), 'categorical_w_probabilities': ('values',)}
    for key in needed.get(distribution, ('min', 'max')):
        if key not in parameter:
            raise ValueError(f'{where}.{key} is missing, or the parameter has neither value, values nor min and max')
        if key in ('min', 'max') and not isinstance(parameter[key], int | float):
            raise ValueError(f"{where}.{key}={parameter[key]!r} is text in W&B's YAML; write a number as 3.0e-4")
        if key == 'values' and (not isinstance(parameter[key], list) or not parameter[key]):
            raise ValueError(f'{where}.values={parameter[key]!r} must be a list of at least one')
    for key, hint in {'probabilities': list[float], 'q': float}.items():
        if key in parameter:
            check_type(f'{where}.{key}', parameter[key], hint)
    if 'probabilities' in parameter and (
        min(parameter['probabilities'], default=0) < 0 or not sum(parameter['probabilities'])
    ):
        raise ValueError(f'{where}.probabilities={parameter["probabilities"]} must be at least 0, and not all 0')
    if parameter.get('q', 1) <= 0:
        raise ValueError(f'{where}.q={parameter["q"]} must be above 0')
    if 'min' in parameter and parameter['min'] > parameter.get('max', parameter['min']):
        raise ValueError(f'{where}: min={parameter["min"]} is above max={parameter["max"]}')
    if distribution.startswith('log') and parameter['min'] <= 0:
        raise ValueError(f'{where}.min={parameter["min"]} must be above 0 for {distribution}')
    if len(parameter.get('probabilities', [])) not in (0, len(parameter.get('values', []))):
        raise ValueError(f'{where} must have as many probabilities as values')


def _grid(parameter: Mapping[str, Any]) -> Sequence[Any]:
    if 'value' in parameter:
        return [parameter['value']]
    return parameter['values'] if 'values' in parameter else range(parameter['min'], parameter['max'] + 1)


def _draw(parameter: Mapping[str, Any], x: float) -> Any:
    """The value at quantile ``x``, from 0 to 1 exclusive."""
    distribution = _distribution(parameter)
    if distribution in ('constant', 'categorical'):
        values = _grid(parameter)
        return values[int(x * len(values))]
    if distribution == 'categorical_w_probabilities':
        upto = list(itertools.accumulate(parameter['probabilities']))
        return next(value for value, limit in zip(parameter['values'], upto, strict=True) if x * upto[-1] < limit)
    low, high = parameter['min'], parameter['max']
    if distribution == 'int_uniform':
        return low + int(x * (high - low + 1))
    if distribution == 'log_uniform_values':
        drawn = math.exp(math.log(low) + x * (math.log(high) - math.log(low)))
    else:
        drawn = low + x * (high - low)
        if distribution == 'q_uniform':
            q = parameter.get('q', 1)
            return round(round(drawn / q) * q, 12)
    return min(max(float(f'{drawn:.4g}'), low), high)


def expand_trials(spec: SequenceSpec, trials: Sequence[Sequence[str]]) -> list[Run]:
    """The runs of a sequence with one arm for each trial, in place of its own arms.

    Each trial is planned by itself, so that it means the same runs, in the same folders, whatever other trials there
    are. A first stage that a trial leaves alone is shared; one that it changes is its own.

    Args:
        spec: The sequence.
        trials: Of :func:`trials_of`, or one from a command line.

    Raises:
        ValueError: If a parameter names no stage, or would make one trial cost more than another; as ``expand`` does.
    """
    expand(spec.with_arms(None))  # what is wrong without any trial is said without one
    stages = list(spec.stages)
    runs: dict[str, Run] = {}
    for trial in trials:
        if wrong := [word for word in trial if '=' not in word]:
            raise ValueError(f'{wrong[0]} in a trial is not STAGE.KEY=VALUE')
        # a whole section comes before its keys, in whatever order they were given
        given = OmegaConf.from_dotlist(sorted(trial, key=lambda word: word.partition('=')[0]))
        overrides: Any = OmegaConf.to_container(given)
        leaves = dict(_leaves(overrides))
        for name in leaves:
            _check_name(name, stages)
        for run in expand(spec.with_arms({_arm(leaves, stages[-1]): overrides})):
            if len(run.name) > 200:
                raise ValueError(f'{run.name} is too long for the name of a folder; sweep fewer parameters at once')
            if runs.setdefault(run.name, run).stage != run.stage:
                raise ValueError(
                    f'two trials would both be kept in the folder {run.name}; make their values differ more'
                )
    return list(runs.values())


def _leaves(section: Mapping[str, Any], path: str = '') -> Iterator[tuple[str, Any]]:
    for key, value in sorted(section.items()):
        if isinstance(value, Mapping):
            yield from _leaves(value, f'{path}{key}.')
        else:
            yield f'{path}{key}', value


def _arm(leaves: Mapping[str, Any], last: str) -> str:
    """``replay.fraction=0.05``: keys of the last stage without it."""
    # W&B's server writes 1.0 as 1
    short = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in leaves.items()}
    return ', '.join(f'{name.removeprefix(f"{last}.")}={value}' for name, value in short.items())


def _check_name(name: str, stages: Sequence[str]) -> None:
    stage, _, key = name.partition('.')
    if stage not in stages:
        near = get_close_matches(stage, stages, n=1)
        right = f'{near[0]}.{key}' if near and key else f'{stages[-1]}.{name}'
        raise ValueError(f'{name} does not begin with a stage ({", ".join(stages)}); did you mean {right!r}?')
    if not key:
        raise ValueError(f'{name} is a stage and no key of it; {name}.optimizer.lr would be one')
    if key.split('.')[0] == 'model' or set(_COMPUTE) & set(key.split('.')):
        raise ValueError(f'{name} would make one trial cost more than another; set it for all trials in the sequence')
