# SPDX-License-Identifier: Apache-2.0
"""W&B's sweep files over a sequence: one trial is one arm, whether ``wandb agent`` or this machine runs it.

A parameter is ``STAGE.KEY``, as in ``cpp.replay.fraction``; a trial is the list of ``STAGE.KEY=VALUE`` that W&B's agent
puts in place of ``${args_no_hyphens}``. Nothing here imports wandb.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
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
    """The metric that trials are compared by; W&B alone reads the rest of it."""

    name: str


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


def check_metric(metric: Any, runs: Sequence[Run]) -> None:
    """Refuse a metric that no trial logs: W&B would compare trials by nothing.

    Raises:
        ValueError: With the nearest metric that a trial logs.
    """
    if metric is None:
        return
    name = parse_section(Metric, metric, 'metric').name
    logged = {name for run in runs if not any(run.name == other.parent for other in runs) for name in _logged_by(run)}
    if name not in logged:
        raise ValueError(f'metric.name={name!r} is logged by no trial; {nearest(name, logged)}')


def _logged_by(run: Run) -> Iterator[str]:
    """The names in the summary of a trial."""
    callbacks = run.stage.callbacks
    datasets = {'final_loss': [loader.label for loader in run.stage.eval_loader]}
    if forgetting := callbacks.forgetting:
        datasets |= {'final_forgetting': forgetting.old, 'final_adaptation': forgetting.new}
    for key, names in datasets.items():
        for name in ('mean', *names):
            yield from (f'{key}/{name}{average}' for average in ('', *(f'/{each}' for each in callbacks.averages)))


def expand_trials(spec: SequenceSpec, trials: Sequence[Sequence[str]]) -> list[Run]:
    """The runs of a sequence with one arm for each trial, in place of its own arms.

    Each trial is planned by itself, so that it means the same runs, in the same folders, whatever other trials there
    are. A first stage that a trial leaves alone is shared; one that it changes is its own.

    Raises:
        ValueError: If a parameter names no stage, or would make one trial cost more than another; as ``expand`` does.
    """
    from cpt_algorithms.sequence.check import adopted, records_in  # seconds that trials_of does not need

    expand(spec.with_arms(None))  # what is wrong without any trial is said without one
    stages, look = list(spec.stages), cache(records_in)
    runs: dict[str, Run] = {}
    for trial in trials:
        overrides = _overrides(trial, stages)
        leaves = [(stage, *leaf) for stage in stages for leaf in _leaves(overrides.get(stage, {}))]
        for stage, path, _ in leaves:
            if path[0] == 'model' or set(_COMPUTE) & set(path):
                name = f'{stage}.{".".join(path)}'
                raise ValueError(f'{name} would make one trial cost more than another; set it for all in the sequence')
        of_trial = spec.with_arms({_arm(leaves, stages[-1]): overrides})
        for run in adopted(partial(expand, of_trial), look):
            if runs.setdefault(run.name, run).stage != run.stage:
                raise ValueError(f'two trials would both be kept in the folder {run.name}; make them differ more')
    return list(runs.values())


def _overrides(trial: Sequence[str], stages: Sequence[str]) -> dict[str, Any]:
    """The overrides of a trial for each stage. Stages are known: their names, and those of keys, may hold dots."""
    overrides: dict[str, Any] = {}
    # a whole section comes before its keys, in whatever order they were given
    for word in sorted(trial, key=lambda word: word.partition('=')[0]):
        name, equals, value = word.partition('=')
        if not equals:
            raise ValueError(f'{word} in a trial is not STAGE.KEY=VALUE')
        found = [stage for stage in stages if name == stage or name.startswith(f'{stage}.')]
        if not found:
            raise ValueError(f'{name} does not begin with a stage; {nearest(name.partition(".")[0], stages)}')
        stage = max(found, key=len)
        given = OmegaConf.to_container(OmegaConf.from_dotlist([f'x{name[len(stage) :]}={value}']))
        section = _with_null(given)['x']
        if not isinstance(section, dict):
            raise ValueError(f'{name} is a stage and no key of it; {name}.optimizer.lr would be one')
        overrides[stage] = OmegaConf.to_container(OmegaConf.merge(overrides.get(stage, {}), section))
    return overrides


def _with_null(value: Any) -> Any:
    """A value as W&B's agent means it, which writes Python's ``None`` for null, also inside of others."""
    if isinstance(value, dict):
        return {key: _with_null(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_null(each) for each in value]
    return None if value == 'None' else value


def _leaves(section: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in sorted(section.items()):
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _arm(leaves: Sequence[tuple[str, tuple[str, ...], Any]], last: str) -> str:
    """``replay.fraction=0.05``: keys of the last stage without it."""

    def text(value: Any) -> str:
        # W&B's server writes 1.0 as 1
        is_whole = isinstance(value, float) and value.is_integer()
        return 'null' if value is None else str(int(value) if is_whole else value)

    in_order = sorted(leaves, key=lambda leaf: '.'.join((leaf[0], *leaf[1])))
    return ', '.join(f'{".".join(path if s == last else (s, *path))}={text(value)}' for s, path, value in in_order)
