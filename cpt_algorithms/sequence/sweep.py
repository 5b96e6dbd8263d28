# SPDX-License-Identifier: Apache-2.0
"""W&B's sweep files over a sequence: one trial is one arm, whether ``wandb agent`` or this machine runs it.

A parameter is ``STAGE.KEY``, as in ``cpp.replay.fraction``; a trial is the list of ``STAGE.KEY=VALUE`` that W&B's agent
puts in place of ``${args_no_hyphens}``. Nothing here imports wandb.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import ConfigDict, Field, field_validator, model_validator

from cpt_algorithms.sequence.expand import Run, expand
from cpt_algorithms.sequence.spec import SequenceSpec
from cpt_algorithms.validation import Section, nearest, parse_section

__all__ = ['check_metric', 'expand_trials', 'sequence_of', 'trials_of']

# What decides the tokens of a stage and the operations per token.
_COMPUTE = ('max_duration', 'global_train_batch_size', 'max_seq_len')
_COMMAND = ['${env}', '${interpreter}', '${program}', 'SEQUENCE.yaml', '--trial', '${args_no_hyphens}']
_MOST_TRIALS = 10_000


class Parameter(Section):
    """The values of one key: ``value``, ``values``, or all whole numbers from ``min`` to ``max``."""

    model_config = ConfigDict(extra='forbid')

    distribution: Literal['constant', 'categorical', 'int_uniform'] | None = None
    value: Any = None
    values: Annotated[list[Any], Field(min_length=1)] | None = None
    min: int | None = None
    max: int | None = None

    @model_validator(mode='after')
    def _has_values(self) -> 'Parameter':
        if 'value' not in self.given and self.values is None and (self.min is None or self.max is None):
            raise ValueError('KEY has neither value, values nor min and max (nested keys are written with dots)')
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f'KEY: min={self.min} is above max={self.max}')
        return self

    @property
    def all_values(self) -> Sequence[Any]:
        """In W&B's order."""
        if 'value' in self.given:
            return [self.given['value']]
        return self.values if self.values is not None else range(self.min or 0, (self.max or 0) + 1)


class Metric(Section):
    """By what trials are compared."""

    name: str | None = None


class Sweep(Section):
    """A W&B sweep that can be run to its end without W&B."""

    model_config = ConfigDict(extra='forbid')

    name: Any = None
    description: Any = None
    entity: Any = None
    project: Any = None
    program: Any = None
    metric: Metric | None = None
    command: list[str] = []
    method: Literal['grid']
    parameters: Annotated[dict[str, Parameter], Field(min_length=1)]
    run_cap: Annotated[int, Field(ge=1, le=_MOST_TRIALS)] = _MOST_TRIALS
    early_terminate: Any = None

    @field_validator('method', 'early_terminate', mode='before')
    @classmethod
    def _needs_no_server(cls, value: Any) -> Any:
        if value != 'grid':
            raise ValueError('needs wandb agent; method: grid, to its end, is possible without it')
        return value


def sequence_of(sweep: Mapping[str, Any]) -> list[str]:
    """The sequence YAML that a sweep varies, and the ``key=value`` that it changes for all trials.

    Args:
        sweep: The sweep file, read by ``yaml.safe_load`` as ``wandb sweep`` does.

    Raises:
        ValueError: If it cannot be run here, or ``command`` hands no trial to a sequence.
    """
    command = parse_section(Sweep, sweep).command
    words = command[command.index('${program}') + 1 : -2] if '${program}' in command else []
    if command[-2:] != _COMMAND[-2:] or not words:
        raise ValueError(f'command={command} hands no trial to a sequence; use {_COMMAND}')
    return words


def trials_of(sweep: Mapping[str, Any]) -> list[list[str]]:
    """All trials of a grid, each as W&B's agent would hand it over, in W&B's order and without duplicates.

    Args:
        sweep: The sweep file. Other methods than ``grid`` are left to ``wandb agent``.

    Raises:
        ValueError: If it is not right, or only W&B's server can run it.
    """
    read = parse_section(Sweep, sweep)
    names = sorted(read.parameters)
    if (count := math.prod(len(each.all_values) for each in read.parameters.values())) > _MOST_TRIALS:
        raise ValueError(f'parameters: a grid of {count} trials, and at most {_MOST_TRIALS} are possible')
    words = [[f'{name}={value}' for value in read.parameters[name].all_values] for name in names]
    return [list(trial) for trial in dict.fromkeys(itertools.islice(itertools.product(*words), read.run_cap))]


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
            if runs.setdefault(run.name, run).stage != run.stage:
                raise ValueError(
                    f'two trials would both be kept in the folder {run.name}; make their values differ more'
                )
    return list(runs.values())


def check_metric(sweep: Mapping[str, Any], run: Run) -> None:
    """Refuse a metric that no trial would have a value of.

    Args:
        sweep: The sweep file.
        run: The last run of a trial.

    Raises:
        ValueError: With the nearest metric that there is.
    """
    metric, stage = parse_section(Sweep, sweep).metric, run.stage
    if metric is None or metric.name is None:
        return
    judged = {'final_loss': [str(loader.label) for loader in stage.eval_loader]}
    if (forgetting := stage.callbacks.forgetting) is not None:
        judged |= {'final_forgetting': forgetting.old, 'final_adaptation': forgetting.new}
    names = [f'{what}/{dataset}' for what, datasets in judged.items() for dataset in (*datasets, 'mean')]
    known = [*names, *(f'{name}/{average}' for name in names for average in stage.callbacks.averages)]
    if metric.name not in known:
        raise ValueError(f'metric.name={metric.name}: no trial has a value of it; {nearest(metric.name, known)}')


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
        raise ValueError(f'{name} does not begin with a stage; {nearest(stage, stages)}')
    if not key:
        raise ValueError(f'{name} is a stage and no key of it; {name}.optimizer.lr would be one')
    if key.split('.')[0] == 'model' or set(_COMPUTE) & set(key.split('.')):
        raise ValueError(f'{name} would make one trial cost more than another; set it for all trials in the sequence')
