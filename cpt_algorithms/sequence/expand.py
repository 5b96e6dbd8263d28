# SPDX-License-Identifier: Apache-2.0
"""From one sequence YAML to the runs it means: plain data in, plain llm-foundry train YAMLs out."""

import copy
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from cpt_algorithms.checkpoints.exports import pretrained_model_of
from cpt_algorithms.replay.functional import Interleaving, shares_of
from cpt_algorithms.replay.mix import STREAM_KEYS, Stream
from cpt_algorithms.sequence.branches import anneal_branch, in_batches
from cpt_algorithms.stage.form import check_form, parse_time
from cpt_algorithms.stage.stage_start import budget_in_samples
from cpt_algorithms.validation import check_keys, check_path, check_type, check_yaml_scalars, parse_section, short_repr
from cpt_algorithms.weight_averaging.functional import WINDOW_WEIGHTS

__all__ = [
    'BASELINES',
    'Run',
    'check_sequence',
    'checkpoint_after',
    'descendants',
    'plan',
    'stage_tokens',
    'tokens_per_stream',
]

Config = dict[str, Any]

SEQUENCE_KEYS = (
    'name', 'folder', 'seeds', 'jobs', 'nodes', 'nproc', 'slurm', 'data', 'common', 'stages', 'arms', 'variables',
    'lm_eval',
)  # fmt: skip
# What a stage says besides llm-foundry keys.
STAGE_KEYS = ('new', 'replay', 'optimizer_state', 'branches')
ANNEAL_KEYS = ('t_anneal', 'anneal', 'alpha_f')
# What a branch has from its trunk, or from the keys above.
NOT_OF_A_BRANCH = (
    'scheduler', 'max_duration', 'optimizer_state', 'branches', 'global_train_batch_size', 'max_seq_len',
)  # fmt: skip
_TYPES: dict[str, Any] = {
    'name': str,
    'folder': str,
    'seeds': list[int],
    'jobs': int,
    'data': dict[str, dict[str, Any]],
    'common': dict[str, Any],
    'stages': dict[str, dict[str, Any] | None],
    'arms': dict[str, dict[str, Any] | None],
    'variables': dict[str, Any],
    'lm_eval': str | list[str],
}
_STAGE_TYPES: dict[str, Any] = {
    'new': str | list[str],
    'replay': dict[str, Any],
    'optimizer_state': str,
}
MERGE_KEYS = ('last', 'every', 'weights')
FROM_SCRATCH = ('union', 'single')
BASELINES = {
    'union': 'from scratch on the data of all stages',
    'single': "from scratch on the last stage's data",
    'constant_eta_min': 'later stages at the learning rate that the first one ended with',
    'constant_eta_max': 'later stages re-warmed and not decayed',
    'no_replay': 'later stages without replay',
    'same_data': "later stages re-warmed on the first one's data",
}
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
        script: The recipe that runs it. Default: ``'continue_pretraining.py'``.
        trunk: Of a branch: the tokens that its parent had read of each stream where it starts. Default: none.
    """

    name: str
    arm: str
    stage: str
    seed: int
    parent: str | None
    config: Config
    script: str = 'continue_pretraining.py'
    trunk: dict[str, int] = field(default_factory=dict)


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
    new = _names(stage['new'])
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
    check_type('replay.consumed_only', consumed_only, bool)
    check_type('replay.weights', replay.get('weights', {}), dict[str, float | str])
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
            raise ValueError(
                f'replay.fraction={replay["fraction"]} for {", ".join(new)}, and none of the earlier stages has read '
                'other data: there is nothing to replay'
            )
        dataset['replay'] = replay
    config['train_loader'] = loader
    template = config.get('eval_loader') or {}
    config['eval_loader'] = [
        _merge({**template, 'label': name}, {'dataset': {**stream, 'split': 'val'}}) for name, stream in data.items()
    ]
    config['callbacks'] = config.get('callbacks') or {}
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
    """The stages of one arm, each with everything that applies to it: common, stage, the arm's common, its stage."""
    overrides = dict(overrides or {})
    baseline = overrides.pop('baseline', None)
    merged = {
        name: _merge({'new': name, **(spec.get('common') or {})}, stage or {}) for name, stage in spec['stages'].items()
    }
    if baseline is not None:
        check_type(f'arms.{arm}.baseline', baseline, str)
        if baseline not in BASELINES:
            known = ', '.join(f'{name} ({what})' for name, what in BASELINES.items())
            raise ValueError(f'arms.{arm}.baseline={baseline!r} is not possible; use {known}')
        # a first stage that is the same is shared, with its branches
        for index, stage in enumerate(merged.values()):
            if index or baseline in FROM_SCRATCH:
                stage.pop('branches', None)
        merged = _baseline(spec, arm, baseline, merged)
    check_keys(f'arms.{arm}', overrides, (*merged, 'common'))
    everywhere = overrides.get('common') or {}
    merged = {name: _merge(_merge(stage, everywhere), overrides.get(name) or {}) for name, stage in merged.items()}
    return merged if baseline in FROM_SCRATCH else _continued(merged)


def _continued(stages: dict[str, Config]) -> dict[str, Config]:
    """Warm up and cool down once: a stage under the same infinite schedule as the one before begins constant."""
    continued, before = {}, None
    for name, stage in stages.items():
        scheduler = stage.get('scheduler') or {}
        schedule = {key: value for key, value in scheduler.items() if key not in ANNEAL_KEYS}
        if scheduler.get('name') == 'infinite' and schedule == before:
            nothing = {
                key: _zero(scheduler[key], f'stages.{name}.scheduler.{key}')
                for key in ('t_warmup', 't_cooldown')
                if key in scheduler
            }
            stage = {**stage, 'scheduler': {**scheduler, **nothing}}
        continued[name], before = stage, schedule
    return continued


def _zero(time: str, key: str = 'max_duration') -> str:
    return f'0{parse_time(key, time).unit.value}'


def _baseline(spec: Config, arm: str, baseline: str, stages: dict[str, Config]) -> dict[str, Config]:
    first, last = next(iter(stages.values())), list(stages.values())[-1]
    if baseline == 'single':
        kept = {key: last[key] for key in ('new', 'max_duration')}
        return {'single': {**{key: value for key, value in first.items() if key != 'replay'}, **kept}}
    if baseline == 'union':
        return {'union': _union(spec, arm, stages)}
    changed = {}
    for index, (name, stage) in enumerate(stages.items()):
        changed[name] = stage = dict(stage)
        if not index:
            continue
        if baseline in ('no_replay', 'same_data'):
            stage.pop('replay', None)
        if baseline == 'same_data':
            stage['new'] = first['new']
        if baseline in ('constant_eta_min', 'constant_eta_max'):
            scheduler = stage.get('scheduler') or {}
            if 't_warmup' not in scheduler:
                raise ValueError(
                    f'arms.{arm}: baseline {baseline} follows from a schedule with a t_warmup, and that of stage '
                    f'{name} is {scheduler.get("name")}; give the arm a scheduler instead'
                )
            is_min = baseline == 'constant_eta_min'
            stage['scheduler'] = {
                'name': 'rewarm_constant',
                't_warmup': _zero(scheduler['t_warmup'], f'stages.{name}.scheduler.t_warmup')
                if is_min
                else scheduler['t_warmup'],
                'alpha': _end_of(first, stage) if is_min else 1.0,
            }
    return changed


def _end_of(first: Config, stage: Config) -> float:
    """The learning rate that a stage ended with, as a multiplier of a later one's; a trunk's is constant."""
    scheduler = first.get('scheduler') or {}
    key = 'alpha_const' if scheduler.get('name') == 'infinite' else 'alpha_f'
    end = scheduler.get(key, 0.1 if key == 'alpha_f' else None)
    check_type(f'scheduler.{key}', end, float)
    was, now = ((each.get('optimizer') or {}).get('lr', 1.0) for each in (first, stage))
    return end if was == now else end * was / now


def _union(spec: Config, arm: str, stages: dict[str, Config]) -> Config:
    """From scratch, on what the stages read without replay, mixed evenly, under the first stage's schedule."""
    if several := [name for name, stage in stages.items() if isinstance(stage['new'], list)]:
        raise ValueError(f'arms.{arm}: baseline union wants one dataset per stage, and {several[0]} has several')
    tokens: dict[str, int] = {}
    for name, budget in stage_tokens(spec).items():
        dataset = stages[name]['new']
        tokens[dataset] = tokens.get(dataset, 0) + budget
    total, last = sum(tokens.values()), list(stages.values())[-1]['new']
    first = next(iter(stages.values()))
    unit = parse_time('max_duration', first['max_duration']).unit.value  # that of the schedule's times
    per = {'ba': first['global_train_batch_size'] * first['max_seq_len'], 'sp': first['max_seq_len'], 'tok': 1}[unit]
    union = {**first, 'new': last, 'max_duration': f'{-(-total // per)}{unit}', 'replay': {}}
    if others := {name: budget for name, budget in tokens.items() if name != last}:
        union['replay'] = {'fraction': str(Fraction(total - tokens[last], total)), 'weights': others}
    return union


def stage_tokens(spec: Config) -> dict[str, int]:
    """The token budget of each stage, as ``stages`` and ``common`` say.

    Raises:
        ValueError: If a stage has none, or it is not in tok, ba or sp.
    """
    budgets = {}
    for name, stage in spec['stages'].items():
        config = _merge(spec.get('common') or {}, stage or {})
        for key in ('max_duration', 'global_train_batch_size', 'max_seq_len'):
            if config.get(key) is None:
                raise ValueError(f'stages.{name}.{key} is missing (or common.{key} for all stages)')
        batch, length = config['global_train_batch_size'], config['max_seq_len']
        samples = budget_in_samples(parse_time(f'stages.{name}.max_duration', config['max_duration']), batch, length)
        if samples is None:
            raise ValueError(f'stages.{name}.max_duration={config["max_duration"]} must be in tok, ba or sp')
        budgets[name] = samples * length
    return budgets


def plan(spec: Config) -> list[Run]:
    """Every run of a sequence, parents before children, each once.

    Arms share a run as long as their settings are the same: a first stage that no arm changes is trained once per seed.
    Names and settings of runs do not depend on the stages that come later, so a stage can be added to a finished
    sequence.

    Args:
        spec: The sequence YAML: ``name``, ``folder``, ``data`` (``{name: stream}``; ``stand_in_for`` says that it
            stands in for data that is not known), ``common`` (llm-foundry keys of all stages), ``stages``
            (``{name: llm-foundry keys + new, replay, optimizer_state, branches}``, in order;
            ``replay.consumed_only``: only what earlier stages have read comes back; ``branches``: ``{name: {t_anneal,
            anneal, alpha_f, and whatever a stage may say}}`` or ``{name: {merge: {last, every, weights}}}``), ``arms``
            (``{arm: {stage or common: overrides}}``, or ``{baseline: one of BASELINES}`` with overrides),
            ``seeds``, ``jobs``, ``nodes``, ``nproc``, ``slurm``, ``lm_eval`` (the suite that every run ends with).
            If the model is a pretrained one, the first stage updates it, and stand-ins are its data.

    A stage under an ``infinite`` schedule with a ``t_anneal`` is a trunk that stays constant and a branch called
    ``anneal`` over the last ``t_anneal`` of the stage's budget; the next stage goes on from the trunk.

    Raises:
        ValueError: On an unknown key or name, with the nearest right one.
    """
    check_sequence(spec)
    runs: dict[str, Run] = {}
    for seed in spec.get('seeds') or [17]:
        for arm, overrides in (spec.get('arms') or {'default': {}}).items():
            _plan_arm(spec, arm, dict(overrides or {}), int(seed), runs)
    names = [run.name for run in runs.values()]
    if clash := [name for name in names if names.count(name) > 1]:
        raise ValueError(f'two arms or stages would both be kept in the folder {clash[0]}; name them differently')
    return list(runs.values())


def check_sequence(spec: Config) -> None:
    """Refuse a sequence YAML whose keys and values are not those of one.

    Args:
        spec: See :func:`plan`.

    Raises:
        ValueError: Naming the key, its value, and what would be right.
    """
    check_type('the sequence', spec, dict)
    check_yaml_scalars(spec)
    check_keys('', spec, SEQUENCE_KEYS)
    for key in ('name', 'folder', 'data', 'stages'):
        if not spec.get(key):
            raise ValueError(f'{key} is missing from the sequence')
    for key, hint in _TYPES.items():
        if spec.get(key) is not None:
            check_type(key, spec[key], hint)
    check_path('folder', spec['folder'])
    if '{' in spec['folder']:
        raise ValueError(f'folder={short_repr(spec["folder"])} must be a path without braces')
    if spec.get('jobs') is not None and spec['jobs'] < 1:
        raise ValueError(f'jobs={spec["jobs"]} must be at least 1')
    for seed in spec.get('seeds') or []:
        check_form({'seed': seed}, 'seeds')
        if spec['seeds'].count(seed) > 1:
            raise ValueError(f'seeds: {seed} is there twice')
    for name, stream in spec['data'].items():
        check_keys(f'data.{name}', stream, (*STREAM_KEYS, 'stand_in_for'))
        parse_section(Stream, {key: value for key, value in stream.items() if key in STREAM_KEYS}, f'data.{name}')
    if taken := [name for name in ('common', 'baseline') if name in spec['stages']]:
        raise ValueError(f'stages.{taken[0]}: a stage cannot have this name, which means something else in arms')
    for where, section in (
        ('common', spec.get('common') or {}),
        *((f'stages.{name}', stage) for name, stage in spec['stages'].items()),
        *(
            (f'arms.{arm}.{name}', stage)
            for arm, stages in (spec.get('arms') or {}).items()
            for name, stage in (stages or {}).items()
            if name != 'baseline'
        ),
    ):
        if section is not None:
            check_form(section, where)
        branches = (section or {}).get('branches') or {}
        if not isinstance(branches, dict) or not all(isinstance(each or {}, dict) for each in branches.values()):
            raise ValueError(
                f'{where}.branches={short_repr(branches)} must be a mapping, such as {{long: {{t_anneal: 1000ba}}}}'
            )
        for place, keys in ((where, section or {}), *((f'{where}.branches.{n}', b or {}) for n, b in branches.items())):
            if clash := [key for key in _DERIVED if key in keys]:
                raise ValueError(f'{place}.{clash[0]} is set by the sequence for each run; leave it out')
            check_form(keys, place)
            for key, hint in _STAGE_TYPES.items():
                if keys.get(key) is not None:
                    check_type(f'{place}.{key}', keys[key], hint)
            if isinstance(keys.get('eval_loader'), list):
                raise ValueError(f'{place}.eval_loader is a list; in a sequence it is one template, for every dataset')
    stage_tokens(spec)


def _plan_arm(spec: Config, arm: str, overrides: Config, seed: int, runs: dict[str, Run]) -> None:
    """Add the runs of one arm and seed to ``runs``, which knows them by what they are."""
    stages = _stages_of(spec, arm, overrides)
    baseline = overrides.get('baseline')
    # of a union, what is replayed is new, too; of a base model, stand-ins are what it has read
    is_base = pretrained_model_of(resolve({'model': next(iter(stages.values())).get('model') or {}})) is not None
    stand_ins = [name for name, stream in spec['data'].items() if is_base and stream.get('stand_in_for')]
    earlier = list(stages['union']['replay'].get('weights', ())) if baseline == 'union' else stand_ins
    parent: Run | None = None
    read_by: dict[str, str] = {}
    is_shared = not baseline and not overrides.get('common')
    for index, (stage, settings) in enumerate(stages.items()):
        is_shared, is_last = is_shared and not overrides.get(stage), index == len(stages) - 1
        words = [f'{stage}_{list(spec["stages"])[-1]}' if baseline in FROM_SCRATCH else stage]
        words += [] if is_shared or arm == stage else [arm]
        label = arm if is_last or not is_shared else stage
        make = _RunFactory(spec, stage, label, seed, 'shared' if is_shared and not is_last else arm)
        settings, branches = _trunk(settings, f'stages.{stage}')
        trunk = _added(make.trunk(settings, words, earlier, read_by, parent), runs, is_new=is_last and not branches)
        new = _names(settings['new'])
        for branch, (start, given) in branches.items():
            where = f'stages.{stage}.branches.{branch}'
            label_of_branch = f'{label}, {branch}' + ('' if is_last or is_shared else f' after {stage}')
            make_branch = replace(make, label=label_of_branch)
            try:
                if 'merge' in given:
                    run = make_branch.merge(trunk, [*words, branch], start, given['merge'])
                else:
                    run = make_branch.anneal(trunk, [*words, branch], start, settings, given, [*earlier, *new], read_by)
            except ValueError as error:
                raise ValueError(f'{where}, in the arm {arm}: {error}') from None
            _added(run, runs, is_new=is_last)
        parent, earlier = trunk, [*earlier, *new]
        if len(new) == 1:
            read_by[new[0]] = f'{trunk.config["save_folder"]}/{_latest(trunk.config)}'


def _names(new: str | list[str]) -> list[str]:
    return new if isinstance(new, list) else [new]


def _added(run: Run, runs: dict[str, Run], is_new: bool = False) -> Run:
    """The run, or the same one of another arm."""
    known = _key(run)
    if is_new and known in runs:
        raise ValueError(f'arms.{run.arm} means the same runs as arms.{runs[known].arm}; leave one out')
    return runs.setdefault(known, run)


@dataclass(frozen=True)
class _RunFactory:
    """Makes the runs of one stage of one arm and seed."""

    spec: Config
    stage: str
    label: str
    seed: int
    tracked_as: str

    def trunk(
        self, settings: Config, words: Sequence[str], earlier: list[str], read_by: Mapping[str, str], parent: Run | None
    ) -> Run:
        """The stage itself."""
        config = _train_config(self.spec, settings, earlier, read_by)
        if parent is not None:
            config['load_path'] = f'{parent.config["save_folder"]}/{_latest(config)}'
        else:  # there is no state to keep
            config['callbacks']['stage_start'] = {'optimizer': 'reset'}
        if self.stage not in FROM_SCRATCH:
            new = list(config['train_loader']['dataset']['new'])
            if old := [name for name in dict.fromkeys(earlier) if name not in new]:
                given = config['callbacks'].get('forgetting') or {}
                config['callbacks']['forgetting'] = {'new': new, 'old': old, **given}
        return self._run(config, words, parent)

    def anneal(
        self,
        trunk: Run,
        words: Sequence[str],
        start: int,
        settings: Config,
        given: Config,
        earlier: list[str],
        read_by: Mapping[str, str],
    ) -> Run:
        """A branch of it that is trained."""
        own = {key: value for key, value in given.items() if key not in ANNEAL_KEYS}
        checkpoint = f'{trunk.config["save_folder"]}/{checkpoint_after(trunk.config, start)}'
        new = _names(settings['new'])
        read_by = {**read_by, **({new[0]: checkpoint} if len(new) == 1 else {})}
        config = _train_config(self.spec, _merge(settings, own), earlier, read_by)
        config['save_folder'] = trunk.config['save_folder']
        if 'forgetting' in trunk.config['callbacks']:
            config['callbacks']['forgetting'] = trunk.config['callbacks']['forgetting']
        how = {key: given[key] for key in ANNEAL_KEYS if key in given}
        branch = anneal_branch(config, '', '', checkpoint, start, **how)
        return self._run(branch, words, trunk, trunk=_read_until(trunk.config, start))

    def merge(self, trunk: Run, words: Sequence[str], end: int, merge: Config) -> Run:
        """A branch of it that is an average of its checkpoints."""
        config = copy.deepcopy({key: value for key, value in trunk.config.items() if key not in _DERIVED})
        kept = ('final_loss', 'forgetting', 'stage_start')
        config['callbacks'] = {name: given for name, given in config['callbacks'].items() if name in kept}
        if 'forgetting' in config['callbacks']:
            losses = f'{trunk.config["save_folder"]}/forgetting.json'
            config['callbacks']['forgetting'] = {'parent_losses': losses, **config['callbacks']['forgetting']}
        every = in_batches(merge['every'], trunk.config)
        how = {'last': merge['last'], 'every': f'{every}ba', 'weights': merge.get('weights', 'uniform')}
        variables = config.get('variables') or {}
        config['variables'] = {**variables, 'merge': {'of': trunk.config['save_folder'], 'batch': end, **how}}
        config['max_duration'] = '0ba'
        config['load_path'] = f'{trunk.config["save_folder"]}/{checkpoint_after(trunk.config, end)}'
        return self._run(config, words, trunk, script='merge.py', trunk=_read_until(trunk.config, end))

    def _run(self, config: Config, words: Sequence[str], parent: Run | None, **how: Any) -> Run:
        name = f'{"-".join(map(_slug, words))}-s{self.seed}'
        config = {
            **_placed(config, f'{self.spec["folder"]}/{name}'),
            'run_name': name,
            'save_folder': f'{self.spec["folder"]}/{name}',
            'seed': self.seed,
        }
        config['train_loader']['dataset'].setdefault('shuffle_seed', self.seed)
        if self.spec.get('lm_eval'):
            config['variables'] = {**(config.get('variables') or {}), 'lm_eval': self.spec['lm_eval']}
        _track(config, self.spec['name'], self.stage, self.tracked_as, self.seed)
        return Run(name, self.label, self.stage, self.seed, parent.name if parent else None, config, **how)


def _key(run: Run) -> str:
    """What a run is, whatever it is called and wherever it is logged."""
    config = {key: value for key, value in run.config.items() if key not in ('run_name', 'save_folder', 'loggers')}
    identity = json.dumps([_placed(config, ''), run.parent, run.seed, run.script], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()


def _placed(config: Config, folder: str) -> Config:
    """A YAML whose callbacks write where the run does."""
    callbacks = {
        name: {**given, 'save_folder': folder} if 'save_folder' in (given or {}) else given
        for name, given in (config.get('callbacks') or {}).items()
    }
    return {**config, 'callbacks': callbacks}


def _trunk(settings: Config, where: str) -> tuple[Config, dict[str, tuple[int, Config]]]:
    """A stage without its branches, as long as they need it, and the batch at which each branch starts."""
    branches = {name: dict(given or {}) for name, given in (settings.get('branches') or {}).items()}
    scheduler = settings.get('scheduler') or {}
    if branches and scheduler.get('name') == 'infinite' and 't_anneal' not in scheduler:  # theirs is enough
        scheduler = {**scheduler, 't_anneal': _zero(settings['max_duration'])}
        settings = {**settings, 'scheduler': scheduler}
    if (
        scheduler.get('name') == 'infinite'
        and parse_time(f'{where}.scheduler.t_anneal', scheduler.get('t_anneal', '0tok')).value
    ):
        how = {key: scheduler[key] for key in ANNEAL_KEYS if key in scheduler}
        branches = {'anneal': {**how, **branches.pop('anneal', {})}, **branches}
        constant = {key: value for key, value in scheduler.items() if key not in ANNEAL_KEYS}
        settings = {
            **settings,
            'scheduler': {**constant, 't_anneal': _zero(scheduler['t_anneal'], f'{where}.scheduler.t_anneal')},
        }
    if not branches:
        return settings, {}
    total = in_batches(settings['max_duration'], settings)
    starts: dict[str, tuple[int, Config]] = {}
    points: set[int] = set()
    for name, given in branches.items():
        place = f'{where}.branches.{name}'
        if 'merge' in given:
            check_keys(place, given, ('merge',))
            starts[name] = (total, given)
            points |= set(_merged(given['merge'], total, settings, f'{place}.merge'))
            continue
        if wrong := [key for key in NOT_OF_A_BRANCH if key in given]:
            raise ValueError(
                f'{place}.{wrong[0]}: a branch has this from its trunk; t_anneal, anneal and alpha_f say the rest'
            )
        if 't_anneal' not in given:
            raise ValueError(f'{place}.t_anneal is missing (how much of the stage is annealed), or merge: {{...}}')
        length = in_batches(given['t_anneal'], settings, f'{place}.t_anneal')
        if not 0 < length < total:
            raise ValueError(
                f'{place}.t_anneal={given["t_anneal"]} must be longer than 0 and shorter than the stage, '
                f'{settings["max_duration"]}: it is its end'
            )
        starts[name] = (total - length, given)
        points.add(total - length)
    end = max(start for start, _ in starts.values())
    passes = ((settings.get('train_loader') or {}).get('dataset') or {}).get('max_passes', 1)
    if float(passes) > 1 and points - {end}:
        raise ValueError(
            f'{where}: max_passes={passes}, and after a pass the checkpoint that a branch needs has a name that '
            'depends on the data; use one branch, or recipes/anneal.py'
        )
    unit = parse_time(f'{where}.max_duration', settings['max_duration']).unit.value
    samples = settings['global_train_batch_size']
    per_batch = {'ba': 1, 'sp': samples, 'tok': samples * settings['max_seq_len']}[unit]
    callbacks = dict(settings.get('callbacks') or {})
    if points - {end}:
        callbacks['branch_points'] = {'at': sorted(points - {end})}
    trunk = {**settings, 'max_duration': f'{end * per_batch}{unit}', 'callbacks': callbacks}
    return {key: value for key, value in trunk.items() if key != 'branches'}, starts


def _merged(merge: Config, end: int, settings: Config, where: str) -> list[int]:
    """The batches whose checkpoints are averaged."""
    check_type(where, merge, dict | None)
    check_keys(where, merge or {}, MERGE_KEYS)
    if missing := [key for key in ('last', 'every') if key not in (merge or {})]:
        raise ValueError(f'{where}.{missing[0]} is missing: how many checkpoints are averaged, and how far apart')
    if merge.get('weights', 'uniform') not in WINDOW_WEIGHTS:
        raise ValueError(
            f'{where}.weights={merge["weights"]!r} is not possible; use one of {", ".join(WINDOW_WEIGHTS)}'
        )
    every, last = in_batches(merge['every'], settings, f'{where}.every'), merge['last']
    if not isinstance(last, int) or last < 2 or every < 1 or (last - 1) * every >= end:
        raise ValueError(
            f'{where}: last={last!r} checkpoints (at least 2), every={merge["every"]}, must fit into the stage of '
            f'{end} batches'
        )
    return [end - number * every for number in range(last)]


def _read_until(config: Config, batch: int) -> dict[str, int]:
    return tokens_per_stream({**config, 'max_duration': f'{batch}ba'})


def descendants(runs: Sequence[Run], name: str) -> list[str]:
    """Names of the runs that start from a run, or from one that does."""
    children = [run.name for run in runs if run.parent == name]
    return [*children, *(heir for child in children for heir in descendants(runs, child))]


def _slug(words: str) -> str:
    """Fit for a folder's name: ``replay 5 %`` becomes ``replay_5pct``."""
    return re.sub(r'[^\w.]+', '_', words.replace(' %', 'pct').replace('%', 'pct')).strip('_')


def _is_sharded(config: Config) -> bool:
    return (config.get('fsdp_config') or {}).get('state_dict_type') == 'sharded'


def _latest(config: Config) -> str:
    return 'latest-sharded-rank0' if _is_sharded(config) else 'latest-rank0.pt'


def checkpoint_after(config: Config, batch: int) -> str:
    """Name of a run's checkpoint after a batch; of the last one, that of the link to it."""
    if batch == in_batches(config['max_duration'], config):
        return _latest(config)
    return f'ep0-ba{batch}' if _is_sharded(config) else f'ep0-ba{batch}-rank0.pt'


def tokens_per_stream(config: Config) -> dict[str, int]:
    """Tokens that a run's budget takes from the new data and from each old dataset."""
    dataset = config['train_loader']['dataset']
    replay = dataset.get('replay') or {}
    weights = {name: stream.get('weight', 1) for name, stream in (replay.get('streams') or {}).items()}
    interleaving = Interleaving(shares_of(replay.get('fraction', 0), weights))
    samples = budget_in_samples(
        parse_time('max_duration', config['max_duration']), config['global_train_batch_size'], config['max_seq_len']
    )
    if samples is None:
        raise ValueError(f'max_duration={config["max_duration"]} must be in tok, ba or sp in a sequence')
    new = ' + '.join(dataset['new'])
    counts = dict(zip([new, *weights], interleaving.counts(samples), strict=True))
    return {name: count * config['max_seq_len'] for name, count in counts.items()}
