# SPDX-License-Identifier: Apache-2.0
"""From one sequence YAML to the runs it means: plain data in, plain llm-foundry train YAMLs out."""

import copy
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from composer.core import Time

from cpt_algorithms.keys import check_keys
from cpt_algorithms.replay.functional import Interleaving, shares_of
from cpt_algorithms.stage.stage_start import budget_in_samples

__all__ = ['Run', 'plan', 'stage_tokens', 'tokens_per_stream']

Config = dict[str, Any]

SEQUENCE_KEYS = ('name', 'folder', 'seeds', 'jobs', 'nproc', 'data', 'common', 'stages', 'arms', 'variables', 'lm_eval')
# What a stage says besides llm-foundry keys.
STAGE_KEYS = ('new', 'replay', 'optimizer_state')
# Filled in for every run.
_DERIVED = ('run_name', 'save_folder', 'load_path', 'load_weights_only', 'load_ignore_keys', 'autoresume', 'seed')


@dataclass(frozen=True)
class Run:
    """One training run of a sequence.

    Args:
        name: Its folder under the sequence's.
        arm: The arm that named it; arms whose settings agree so far share the run.
        stage: The stage it trains.
        seed: Its seed.
        parent: Name of the run it starts from; None from scratch.
        config: Its llm-foundry train YAML.
    """

    name: str
    arm: str
    stage: str
    seed: int
    parent: str | None
    config: Config


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Config:
    """Deep merge; a section that gives a ``name`` replaces the old one instead of mixing with its arguments."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and 'name' not in value:
            merged[key] = _merge(old, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _train_config(spec: Config, stage: Config, earlier: list[str], read_by: Mapping[str, str]) -> Config:
    """A stage's llm-foundry YAML, but for names and places; ``read_by``: the checkpoint of who learned each dataset."""
    config = {key: value for key, value in stage.items() if key not in STAGE_KEYS}
    new = stage['new'] if isinstance(stage['new'], list) else [stage['new']]
    for name in [*new, *earlier]:
        if name not in spec['data']:
            raise ValueError(f'stages: no dataset is called {name!r}; data has {", ".join(spec["data"])}')
    loader = copy.deepcopy(config.get('train_loader') or {})
    dataset = loader.setdefault('dataset', {})
    loader['name'] = 'replay_text'
    stand_ins = {name: stream['stand_in_for'] for name, stream in spec['data'].items() if stream.get('stand_in_for')}
    data = {name: {k: v for k, v in stream.items() if k != 'stand_in_for'} for name, stream in spec['data'].items()}
    dataset['new'] = {name: {**data[name], 'split': 'train'} for name in new}
    replay = dict(stage.get('replay') or {})
    check_keys('replay', replay, ('fraction', 'order', 'weights', 'consumed_only'))
    consumed_only = replay.pop('consumed_only', False)
    if replay.get('fraction'):
        weights = replay.pop('weights', {})
        check_keys('replay.weights', weights, earlier)
        replay['streams'] = {
            name: {**data[name], 'split': 'train', 'weight': weights.get(name, 1)}
            for name in earlier
            if name not in new and (not weights or name in weights)
        }
        for name, stream in replay['streams'].items():
            if name in stand_ins:
                stream['stand_in_for'] = stand_ins[name]
            elif consumed_only and name in read_by:
                stream['consumed_by'] = read_by[name]
            elif consumed_only:
                raise ValueError(
                    f'replay.consumed_only=true, and no stage of this sequence learned {name!r} by itself; leave it out'
                )
        if not replay['streams']:
            raise ValueError(f'replay.fraction={replay["fraction"]} in the first stage: there is nothing to replay yet')
        dataset['replay'] = replay
    config['train_loader'] = loader
    template = config.get('eval_loader') or {}
    config['eval_loader'] = [
        _merge({**template, 'label': name}, {'dataset': {**stream, 'split': 'val'}}) for name, stream in data.items()
    ]
    config.setdefault('callbacks', {})
    config['callbacks'] = {
        **config['callbacks'],
        'stage_start': {'optimizer': stage.get('optimizer_state', 'reset')},
        'final_loss': config['callbacks'].get('final_loss') or {},
    }
    return config


def _track(config: Config, sequence: str, stage: str, arm: str, seed: int) -> None:
    """W&B runs that can be grouped by sequence, stage, arm and seed; what the YAML says itself stays."""
    if 'wandb' not in (config.get('loggers') or {}):
        return
    config['loggers'] = copy.deepcopy(config['loggers'])
    project = re.sub(r'[/\\#?%:]', '_', sequence)[:128]  # W&B takes no others
    given = config['loggers']['wandb'] = {'project': project, 'group': sequence, **(config['loggers']['wandb'] or {})}
    given['tags'] = [*(given.get('tags') or []), *(tag[:64] for tag in (stage, arm, f'seed {seed}'))]
    grouped = {'sequence': sequence, 'stage': stage, 'arm': arm, 'seed': seed}
    init = given.get('init_kwargs') or {}
    given['init_kwargs'] = {'job_type': stage, **init, 'config': {**grouped, **(init.get('config') or {})}}


def _stages_of(spec: Config, arm: str, overrides: Config) -> dict[str, Config]:
    """The stages of one arm, each with everything that applies to it."""
    overrides = dict(overrides or {})
    common, stages = spec.get('common') or {}, spec['stages']
    baseline = overrides.pop('baseline', None)
    if baseline is None:
        check_keys(f'arms.{arm}', overrides, stages)
        return {
            name: _merge(_merge({'new': name, **common}, stage or {}), overrides.get(name) or {})
            for name, stage in stages.items()
        }
    if baseline != 'union':
        raise ValueError(f'arms.{arm}.baseline={baseline!r} is not possible; use union (from scratch on all data)')
    # From scratch, on what the stages read without replay, mixed evenly, under the first stage's schedule.
    merged = {name: _merge({'new': name, **common}, stage or {}) for name, stage in stages.items()}
    if several := [name for name, stage in merged.items() if isinstance(stage['new'], list)]:
        raise ValueError(f'arms.{arm}: baseline union wants one dataset per stage, and {several[0]} has several')
    budgets = stage_tokens(spec)
    total = sum(budgets.values())
    *earlier, last = merged.items()
    union = {**next(iter(merged.values())), 'new': last[1]['new'], 'max_duration': f'{total}tok'}
    union['replay'] = {
        'fraction': str(Fraction(total - budgets[last[0]], total)),
        'weights': {stage['new']: budgets[name] for name, stage in earlier},
    }
    return {'union': _merge(union, overrides.get('union') or {})}


def stage_tokens(spec: Config) -> dict[str, int]:
    """The token budget of each stage, as ``stages`` and ``common`` say.

    Raises:
        ValueError: If a stage has none, or it is not in tok, ba or sp.
    """
    budgets = {}
    for name, stage in spec['stages'].items():
        config = _merge(spec.get('common') or {}, stage or {})
        for key in ('max_duration', 'global_train_batch_size', 'max_seq_len'):
            if key not in config:
                raise ValueError(f'stages.{name}.{key} is missing (or common.{key} for all stages)')
        batch, length = config['global_train_batch_size'], config['max_seq_len']
        samples = budget_in_samples(Time.from_timestring(config['max_duration']), batch, length)
        if samples is None:
            raise ValueError(f'stages.{name}.max_duration={config["max_duration"]} must be in tok, ba or sp')
        budgets[name] = samples * length
    return budgets


def plan(spec: Config) -> list[Run]:
    """Every run of a sequence, parents before children, each once.

    Arms share a run as long as their settings are the same: a first stage that no arm changes is trained once per seed.

    Args:
        spec: The sequence YAML: ``name``, ``folder``, ``data`` (``{name: stream}``; ``stand_in_for`` says that it
            stands in for data that is not known), ``common`` (llm-foundry keys of all stages), ``stages``
            (``{name: llm-foundry keys + new, replay, optimizer_state}``, in order; ``replay.consumed_only``: only what
            earlier stages have read comes back), ``arms`` (``{arm: {stage: overrides}}``, or ``{baseline: union}``),
            ``seeds``, ``jobs``, ``nproc``, ``lm_eval`` (the suite that every run ends with).

    Raises:
        ValueError: On an unknown key or name, with the nearest right one.
    """
    check_keys('', spec, SEQUENCE_KEYS)
    for key in ('name', 'folder', 'data', 'stages'):
        if not spec.get(key):
            raise ValueError(f'{key} is missing from the sequence')
    for key in ('data', 'common', 'stages', 'arms'):
        if not isinstance(spec.get(key) or {}, dict):
            raise ValueError(f'{key} must be a mapping with a name for each entry')
    stage_tokens(spec)
    for where, section in (
        ('common', spec.get('common') or {}),
        *((f'stages.{name}', stage) for name, stage in spec['stages'].items()),
        *(
            (f'arms.{arm}.{name}', stage)
            for arm, stages in (spec.get('arms') or {}).items()
            for name, stage in (stages or {}).items()
            if isinstance(stage, dict)
        ),
    ):
        if clash := [key for key in _DERIVED if key in (section or {})]:
            raise ValueError(f'{where}.{clash[0]} is set by the sequence for each run; leave it out')
    runs: dict[str, Run] = {}
    for seed in spec.get('seeds') or [17]:
        for arm, overrides in (spec.get('arms') or {'default': {}}).items():
            parent: str | None = None
            read_by: dict[str, str] = {}
            stages = _stages_of(spec, arm, overrides)
            earlier = list(stages['union']['replay']['weights']) if (overrides or {}).get('baseline') else []
            for index, (stage, settings) in enumerate(stages.items()):
                config = _train_config(spec, settings, earlier, read_by)
                identity = json.dumps([config, parent, seed], sort_keys=True)
                key = hashlib.sha256(identity.encode()).hexdigest()
                last = index == len(stages) - 1
                if key in runs and last:
                    raise ValueError(f'arms.{arm} means the same runs as arms.{runs[key].arm}; leave one out')
                if key not in runs:
                    plain = not last and not any((overrides or {}).get(name) for name in list(stages)[: index + 1])
                    words = [stage] if plain or arm == stage else [stage, arm]
                    name = f'{"-".join(map(_slug, words))}-s{seed}'
                    config = {**config, 'run_name': name, 'save_folder': f'{spec["folder"]}/{name}', 'seed': seed}
                    config['train_loader']['dataset'].setdefault('shuffle_seed', seed)
                    if parent is not None:
                        config['load_path'] = f'{spec["folder"]}/{parent}/{_latest(config)}'
                        new = list(config['train_loader']['dataset']['new'])
                        old = [name for name in dict.fromkeys(earlier) if name not in new]
                        if old:
                            given = config['callbacks'].get('forgetting') or {}
                            config['callbacks']['forgetting'] = {'new': new, 'old': old, **given}
                    if spec.get('lm_eval'):
                        config['variables'] = {**(config.get('variables') or {}), 'lm_eval': spec['lm_eval']}
                    _track(config, spec['name'], stage, 'shared' if plain else arm, seed)
                    runs[key] = Run(name, arm, stage, seed, parent, config)
                parent = runs[key].name
                new = settings['new'] if isinstance(settings['new'], list) else [settings['new']]
                earlier += new
                if len(new) == 1:
                    read_by[new[0]] = f'{spec["folder"]}/{parent}/{_latest(config)}'
    names = [run.name for run in runs.values()]
    if clash := [name for name in names if names.count(name) > 1]:
        raise ValueError(f'two arms or stages would both be kept in the folder {clash[0]}; name them differently')
    return list(runs.values())


def _slug(words: str) -> str:
    """Fit for a folder's name: ``replay 5 %`` becomes ``replay_5pct``."""
    return re.sub(r'[^\w.]+', '_', words.replace(' %', 'pct').replace('%', 'pct')).strip('_')


def _latest(config: Config) -> str:
    sharded = (config.get('fsdp_config') or {}).get('state_dict_type') == 'sharded'
    return 'latest-sharded-rank0' if sharded else 'latest-rank0.pt'


def tokens_per_stream(config: Config) -> dict[str, int]:
    """Tokens that a run's budget takes from the new data and from each old dataset."""
    dataset = config['train_loader']['dataset']
    replay = dataset.get('replay') or {}
    weights = {name: stream.get('weight', 1) for name, stream in (replay.get('streams') or {}).items()}
    interleaving = Interleaving(shares_of(replay.get('fraction', 0), weights))
    samples = budget_in_samples(
        Time.from_timestring(config['max_duration']), config['global_train_batch_size'], config['max_seq_len']
    )
    if samples is None:
        raise ValueError(f'max_duration={config["max_duration"]} must be in tok, ba or sp in a sequence')
    new = ' + '.join(dataset['new'])
    counts = dict(zip([new, *weights], interleaving.counts(samples), strict=True))
    return {name: count * config['max_seq_len'] for name, count in counts.items()}
