# SPDX-License-Identifier: Apache-2.0
"""From a sequence to the runs it means, each with its :class:`~cpt_algorithms.stage.stage.Stage`."""

import copy
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llmfoundry import registry

from cpt_algorithms.checkpoints.save_folder import latest_link
from cpt_algorithms.duration import Duration, per_batch_of
from cpt_algorithms.sequence.branches import annealed, checkpoint_after, merged
from cpt_algorithms.sequence.spec import (
    ANNEAL_KEYS,
    FROM_SCRATCH,
    MADE,
    Arm,
    Branch,
    SequenceSpec,
    StageSettings,
    overlay,
)
from cpt_algorithms.stage.identity import with_defaults
from cpt_algorithms.stage.stage import Stage
from cpt_algorithms.validation import ConfigError, check_keys, check_type, nearest, parse_section
from cpt_algorithms.weight_averaging.functional import WINDOW_WEIGHTS

__all__ = ['Run', 'descendants', 'expand']

# What a stage of a sequence says besides LLM Foundry's keys.
_OURS = ('new', 'replay', 'optimizer_state', 'branches')


@dataclass(frozen=True)
class Run:
    """One training run of a sequence.

    Args:
        name: Its folder under the sequence's.
        arm: The arm that named it; arms whose settings agree so far share the run.
        stage_name: The stage of the sequence that it trains.
        seed: Its seed.
        parent: Name of the run it starts from; None from scratch.
        stage: The stage that it trains, or the average that it is (``stage.merge``).
        tokens_before_branch: Of a branch: the tokens that its parent had read of each stream where it starts; of a
            soup, all that it is made of. Default: none.
        also: Names of the other runs that a soup is made of. Default: none.
    """

    name: str
    arm: str
    stage_name: str
    seed: int
    parent: str | None
    stage: Stage
    tokens_before_branch: dict[str, int] = field(default_factory=dict)
    also: tuple[str, ...] = ()

    @property
    def needs(self) -> list[str]:
        """The runs that must be done before it begins."""
        return [name for name in (self.parent, *self.also) if name]

    @property
    def folder(self) -> Path:
        """Where it keeps everything."""
        return Path(self.stage.save_folder)

    @property
    def batches(self) -> int:
        """Of the whole run; 0 of an average."""
        return self.stage.batches_of('max_duration', self.stage.max_duration)


def expand(spec: SequenceSpec, names: Mapping[str, str] = MappingProxyType({})) -> list[Run]:
    """Every run of a sequence, parents before children, each once.

    Arms share a run as long as their settings are the same: a first stage that no arm changes is trained once per seed.
    Names and settings of runs do not depend on the stages that come later, so a stage can be added to a finished
    sequence.

    A stage under an ``infinite`` schedule with a ``t_anneal`` is a trunk that stays constant and a branch called
    ``anneal`` over the last ``t_anneal`` of the stage's budget; the next stage goes on from the trunk. ``names`` are
    what runs are called in place of the names that they would be given.

    Raises:
        ValueError: If an arm, a branch or a run is not right.
    """
    runs: dict[str, Run] = {}
    trunks: dict[tuple[str, str, int], Run] = {}
    soups: list[_Soup] = []
    for seed in spec.seeds or [17]:
        for name, arm in (spec.arms or {'default': None}).items():
            soups += _expand_arm(spec, name, arm or Arm(), seed, runs, names, trunks)
    for soup in soups:
        with _in_branch(soup.make.stage, soup.branch, soup.arm):
            if others := soup.others(trunks):
                places = [f'{run.folder}/{latest_link(run.stage.is_sharded)}' for run in others]
                _added(soup.make.merged(soup.trunk, soup.end, {'soup': places}, others), runs, soup.is_last)
    all_names = [run.name for run in runs.values()]
    if clash := [name for name in all_names if all_names.count(name) > 1]:
        raise ValueError(f'two arms or stages would both be kept in the folder {clash[0]}; name them differently')
    parents = {run.parent for run in runs.values() if not run.tokens_before_branch}
    firsts = {f'{run.stage_name} only' for run in runs.values() if run.name in parents and run.parent is None}
    rows = [(run.arm, run.seed) for run in runs.values() if run.name not in parents]
    if alike := [row for row in rows if row[0] in firsts or rows.count(row) > 1]:
        raise ValueError(
            f'two rows of the report would both be called {alike[0][0]!r}; name an arm or branch differently'
        )
    return list(runs.values())


def descendants(runs: Sequence[Run], name: str) -> list[str]:
    """Names of the runs that start from a run, or from one that does."""
    children = [run.name for run in runs if name in run.needs]
    return [*children, *(each for child in children for each in descendants(runs, child))]


@contextmanager
def _in_branch(stage: str, branch: str, arm: str) -> Iterator[None]:
    """Say where in the YAML an error is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f'stages.{stage}.branches.{branch}, in the arm {arm}: {error}') from None


def _expand_arm(
    spec: SequenceSpec,
    name: str,
    arm: Arm,
    seed: int,
    runs: dict[str, Run],
    names: Mapping[str, str],
    trunks: dict[tuple[str, str, int], Run],
) -> 'list[_Soup]':
    """Add the runs of one arm and seed to ``runs``, which knows them by what they are, and to ``trunks``.

    Returns:
        Its soups, which other arms and seeds have a part in.
    """
    soups = []
    stages = _stages_of(spec, name, arm)
    is_from_scratch = arm.baseline in FROM_SCRATCH
    # of a union, replayed data is new, too; a pretrained model has read its stand-ins
    first = next(iter(stages.values()))
    base = parse_section(StageSettings, first).model.pretrained_model
    if base is not None and is_from_scratch:
        raise ValueError(
            f'arms.{name}.baseline={arm.baseline}: {base} is pretrained, so that nothing starts from scratch, and what '
            f'it has read is not known; leave the arm out, or give it common: {{model: {{pretrained: false}}}}'
        )
    earlier = [dataset for dataset, stream in spec.data.items() if base is not None and stream.stands_in_for]
    if arm.baseline in ('union', 'matched'):
        read = dict.fromkeys(each for stage in spec.merged.values() for each in _names(stage['new']))
        earlier = [dataset for dataset in read if dataset not in _names(first['new'])]
    parent: Run | None = None
    read_by: dict[str, str] = {}
    is_shared = not arm.baseline and not arm.common.given
    for index, (stage, given) in enumerate(stages.items()):
        is_shared, is_last = is_shared and not arm.given.get(stage), index == len(stages) - 1
        words = [f'{stage}_{list(spec.stages)[-1]}' if is_from_scratch else stage]
        words += [] if is_shared or name == stage else [name]
        label = name if is_last or not is_shared else stage
        tracked_as = 'shared' if is_shared and not is_last else name
        given, branches = _trunk(given, f'stages.{stage}')
        make = _RunFactory(spec, stage, label, words, seed, tracked_as, names, given, earlier, dict(read_by))
        trunk = trunks[name, stage, seed] = _added(make.trunk(parent), runs, is_new=is_last and not branches)
        new = _names(given['new'])
        for branch, (start, settings) in branches.items():
            label_of_branch = f'{label}, {branch}' + ('' if is_last or is_shared else f' after {stage}')
            make_branch = replace(make, label=label_of_branch, words=[*words, branch])
            if settings.soup:
                soups.append(_Soup(make_branch, trunk, start, settings.soup, branch, name, spec.seeds or [17], is_last))
                continue
            with _in_branch(stage, branch, name):
                if settings.made:
                    run = make_branch.merged(trunk, start, _made(trunk.stage, settings))
                else:
                    run = make_branch.anneal(trunk, start, settings.given)
            _added(run, runs, is_new=is_last)
        parent, earlier = trunk, [*earlier, *new]
        if len(new) == 1:
            read_by[new[0]] = f'{trunk.folder}/{latest_link(trunk.stage.is_sharded)}'
    return soups


def _added(run: Run, runs: dict[str, Run], is_new: bool = False) -> Run:
    """The run, or the same one of another arm."""
    # what it is, whatever it is called and wherever it is logged
    config = {key: value for key, value in run.stage.given.items() if key not in ('run_name', 'save_folder', 'loggers')}
    known = json.dumps([_placed(config, ''), run.parent, run.seed], sort_keys=True)
    if is_new and known in runs:
        raise ValueError(f'arms.{run.arm} means the same runs as arms.{runs[known].arm}; leave one out')
    return runs.setdefault(known, run)


# What the stages of an arm say: mappings, merged before they are read


def _stages_of(spec: SequenceSpec, name: str, arm: Arm) -> dict[str, dict[str, Any]]:
    """The stages of one arm, each with everything that applies to it: common, stage, the arm's common, its stage."""
    merged = spec.merged
    if arm.baseline is not None:
        # a first stage that is the same is shared, with its branches
        for index, stage in enumerate(merged.values()):
            if index or arm.baseline in FROM_SCRATCH:
                stage.pop('branches', None)
        merged = _baseline(spec, f'arms.{name}', arm.baseline, merged)
    overrides = {key: value for key, value in arm.given.items() if key != 'baseline'}
    check_keys(f'arms.{name}', overrides, (*merged, 'common'))
    merged = {
        stage: overlay(overlay(given, arm.common.given), overrides.get(stage) or {}) for stage, given in merged.items()
    }
    return merged if arm.baseline in FROM_SCRATCH else _continued(merged)


def _continued(stages: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Warm up and cool down once: a stage under the same infinite schedule as the one before begins constant."""
    continued, before = {}, None
    for name, stage in stages.items():
        scheduler = stage.get('scheduler') or {}
        schedule = {key: value for key, value in scheduler.items() if key not in ANNEAL_KEYS}
        if scheduler.get('name') == 'infinite' and schedule == before:
            times = {key: scheduler[key] for key in ('t_warmup', 't_cooldown') if key in scheduler}
            nothing = {key: _zero(f'stages.{name}.scheduler.{key}', time) for key, time in times.items()}
            stage = {**stage, 'scheduler': {**scheduler, **nothing}}
        continued[name], before = stage, schedule
    return continued


def _zero(key: str, time: Any) -> str:
    return f'0{Duration.parse(key, time).unit}'


def _baseline(
    spec: SequenceSpec, where: str, baseline: str, stages: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    first, last = next(iter(stages.values())), list(stages.values())[-1]
    if baseline == 'from_scratch':
        kept = {key: last[key] for key in ('new', 'max_duration')}
        return {'from_scratch': {**{key: value for key, value in first.items() if key != 'replay'}, **kept}}
    if baseline in ('union', 'matched'):
        whole = _union(spec, where, stages)
        return {baseline: whole if baseline == 'union' else _matched(whole, list(stages.values())[-1])}
    for name, stage in list(stages.items())[1:]:
        if baseline in ('no_replay', 'same_data'):
            stage.pop('replay', None)
        if baseline == 'same_data':
            stage['new'] = first['new']
        if baseline in ('constant_eta_min', 'constant_eta_max'):
            scheduler = stage.get('scheduler') or {}
            if 't_warmup' not in scheduler:
                why = f'the schedule of {name}, {scheduler.get("name")}, has no t_warmup'
                raise ValueError(f'{where}.baseline={baseline}: {why}; give the arm a scheduler instead')
            is_min, warmup = baseline == 'constant_eta_min', scheduler['t_warmup']
            stage['scheduler'] = {
                'name': 'rewarm_constant',
                't_warmup': _zero(f'stages.{name}.scheduler.t_warmup', warmup) if is_min else warmup,
                'alpha': _end_of(first, stage) if is_min else 1.0,
            }
    return stages


def _end_of(first: Mapping[str, Any], stage: Mapping[str, Any]) -> float:
    """The learning rate that a stage ended with, as a multiplier of a later one's; a trunk's is constant."""
    given = first.get('scheduler') or {}
    scheduler = with_defaults(given.get('name', ''), given, registry.schedulers)
    key = next((key for key in ('alpha_const', 'alpha_f', 'alpha') if key in scheduler), 'alpha_f')
    end: Any = scheduler.get(key)
    check_type(f'scheduler.{key}', end, float)
    was, now = ((each.get('optimizer') or {}).get('lr', 1.0) for each in (first, stage))
    return end if was == now else end * was / now


def _union(spec: SequenceSpec, where: str, stages: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """From scratch, on what the stages read without replay, mixed evenly, under the first stage's schedule."""
    if several := [name for name, stage in stages.items() if isinstance(stage['new'], list)]:
        raise ValueError(f'{where}: baseline union wants one dataset per stage, and {several[0]} has several')
    tokens: dict[str, int] = {}
    for name, budget in spec.stage_tokens.items():
        dataset = stages[name]['new']
        tokens[dataset] = tokens.get(dataset, 0) + budget
    total, last = sum(tokens.values()), list(stages.values())[-1]['new']
    first = next(iter(stages.values()))
    unit = Duration.parse('max_duration', first['max_duration']).unit  # that of the schedule's times
    tokens_per_unit = {'ba': first['global_train_batch_size'] * first['max_seq_len'], 'sp': first['max_seq_len']}
    union = {**first, 'new': last, 'max_duration': f'{-(-total // tokens_per_unit.get(unit, 1))}{unit}', 'replay': {}}
    if others := {name: budget for name, budget in tokens.items() if name != last}:
        union['replay'] = {'fraction': str(Fraction(total - tokens[last], total)), 'weights': others}
    return union


def _matched(union: Mapping[str, Any], last: Mapping[str, Any]) -> dict[str, Any]:
    """As long as the union, on the mixture of the last stage: what an update would be that had seen nothing else."""
    replay = {key: value for key, value in (last.get('replay') or {}).items() if key != 'consumed_only'}
    changing = [replay.get('fraction'), *(replay.get('weights') or {}).values()]
    pieces = [piece for value in changing if isinstance(value, list) for piece in value]
    for until in (str(piece[0]) for piece in pieces if isinstance(piece, list) and piece):
        if not until.endswith('dur'):
            raise ValueError(
                f'replay.fraction: until {until} of the last stage is another part of the baseline matched, which is '
                'longer; give it in dur, or give the baseline a replay of its own (matched: {replay: ...})'
            )
    return {**union, 'replay': replay}


# Branches


def _trunk(given: dict[str, Any], where: str) -> tuple[dict[str, Any], dict[str, tuple[int, Branch]]]:
    """A stage without its branches, as long as they need it, and the batch at which each branch starts."""
    branches = {name: dict(branch or {}) for name, branch in (given.get('branches') or {}).items()}
    scheduler = given.get('scheduler') or {}
    if scheduler.get('name') == 'infinite':
        if branches and 't_anneal' not in scheduler:  # theirs is enough
            scheduler = {**scheduler, 't_anneal': _zero('max_duration', given['max_duration'])}
        key = f'{where}.scheduler.t_anneal'
        if Duration.parse(key, scheduler.get('t_anneal', '0tok')).value:
            how = {key: scheduler[key] for key in ANNEAL_KEYS if key in scheduler}
            branches = {'anneal': {**how, **branches.pop('anneal', {})}, **branches}
            constant = {key: value for key, value in scheduler.items() if key not in ANNEAL_KEYS}
            scheduler = {**constant, 't_anneal': _zero(key, scheduler['t_anneal'])}
        given = {**given, 'scheduler': scheduler}
    if not branches:
        return given, {}
    stage = parse_section(StageSettings, {**given, 'branches': branches}, where)
    starts: dict[str, tuple[int, Branch]] = {}
    points: set[int] = set()
    for name, branch in stage.branches.items():
        assert branch is not None, 'it was null, and is a mapping since'
        place = f'{where}.branches.{name}'
        if branch.made:
            check_keys(place, branch.given, (branch.made,))
            starts[name] = (stage.batches, branch)
            points |= set(_averaged(branch, stage, f'{place}.merge') if branch.merge else ())
            continue
        if branch.t_anneal is None:
            raise ValueError(
                f'{place}.t_anneal is missing (how much of the stage is annealed), or one of {", ".join(MADE)}'
            )
        start = stage.batches - stage.batches_of(branch.t_anneal)
        if not 0 < start < stage.batches:
            stage_is = f'the stage, {stage.max_duration}, whose end it is'
            raise ValueError(f'{place}.t_anneal={branch.t_anneal} must be longer than 0 and shorter than {stage_is}')
        starts[name] = (start, branch)
        points.add(start)
    end = max(start for start, _ in starts.values())
    passes = stage.train_loader.dataset.max_passes
    if float(passes) > 1 and points - {end}:
        # after a pass, the name of the checkpoint that it needs depends on the data
        raise ValueError(f'{where}: max_passes={passes} allows for one branch alone; recipes/anneal.py trains more')
    assert stage.max_duration and stage.global_train_batch_size and stage.max_seq_len, 'SequenceSpec has looked'
    unit = stage.max_duration.unit
    per_batch = per_batch_of(unit, stage.global_train_batch_size, stage.max_seq_len) or 1
    callbacks = dict(given.get('callbacks') or {})
    if points - {end}:
        own = callbacks.get('branch_points') or {}
        callbacks['branch_points'] = {**own, 'at': sorted({*(points - {end}), *(own.get('at') or ())})}
    trunk = {**given, 'max_duration': f'{end * per_batch}{unit}', 'callbacks': callbacks}
    return {key: value for key, value in trunk.items() if key != 'branches'}, starts


def _made(trunk: Stage, branch: Branch) -> dict[str, Any]:
    """What a window or a line is made of, for :func:`~cpt_algorithms.sequence.branches.merged`."""
    if branch.merge is None:
        return {'line': branch.line}
    assert branch.merge.every is not None, '_averaged has looked'
    every = trunk.batches_of('every', branch.merge.every)
    return {'last': branch.merge.last, 'every': f'{every}ba', 'weights': branch.merge.weights}


def _averaged(branch: Branch, stage: StageSettings, where: str) -> list[int]:
    """The batches whose checkpoints are averaged."""
    assert branch.merge is not None
    last, every = branch.merge.last, branch.merge.every
    if last is None or every is None:
        missing = 'last' if last is None else 'every'
        raise ValueError(f'{where}.{missing} is missing: how many checkpoints are averaged, and how far apart')
    if branch.merge.weights not in WINDOW_WEIGHTS:
        given = branch.merge.weights
        raise ValueError(f'{where}.weights={given!r} is not possible; {nearest(given, WINDOW_WEIGHTS)}')
    step, end = stage.batches_of(every), stage.batches
    if step < 1 or (last - 1) * step >= end:
        raise ValueError(f'{where}: last={last} checkpoints, every={every}, must fit into the stage of {end} batches')
    return [end - number * step for number in range(last)]


# Runs


def _names(new: str | list[str]) -> list[str]:
    return new if isinstance(new, list) else [new]


@dataclass(frozen=True)
class _RunFactory:
    """Makes the runs of one stage of one arm and seed."""

    spec: SequenceSpec
    stage: str
    label: str
    words: list[str]  # of the run's name
    seed: int
    tracked_as: str
    names: Mapping[str, str]
    given: dict[str, Any]  # what the stage says
    earlier: list[str]  # datasets of earlier stages
    read_by: dict[str, str]  # the checkpoint of who learned each dataset

    def trunk(self, parent: Run | None) -> Run:
        """The stage itself."""
        config = _train_yaml(self.spec, self.given, self.earlier, self.read_by)
        if parent is not None:
            config['load_path'] = f'{parent.folder}/{latest_link(parent.stage.is_sharded)}'
        else:  # there is no state to keep
            config['callbacks']['stage_start']['optimizer_state'] = 'reset'
        if self.stage not in FROM_SCRATCH:
            new = list(config['train_loader']['dataset']['new'])
            if old := [name for name in dict.fromkeys(self.earlier) if name not in new]:
                forgetting = config['callbacks'].get('forgetting') or {}
                config['callbacks']['forgetting'] = {'new': new, 'old': old, **forgetting}
        return self._run(config, parent)

    def anneal(self, trunk: Run, start: int, branch: Mapping[str, Any]) -> Run:
        """A branch of it that is trained."""
        own = {key: value for key, value in branch.items() if key not in ANNEAL_KEYS}
        how = {key: value for key, value in branch.items() if key in ANNEAL_KEYS}
        checkpoint = f'{trunk.folder}/{checkpoint_after(trunk.stage, start)}'
        new = _names(self.given['new'])
        read_by = {**self.read_by, **({new[0]: checkpoint} if len(new) == 1 else {})}
        config = _train_yaml(self.spec, overlay(self.given, own), [*self.earlier, *new], read_by)
        branch = annealed(trunk.stage, self._judged_as(trunk, config), checkpoint, start, **how)
        return self._run(branch, trunk, start)

    def merged(self, trunk: Run, end: int, how: Mapping[str, Any], others: Sequence[Run] = ()) -> Run:
        """A branch that is made of checkpoints; see :func:`~cpt_algorithms.sequence.branches.merged` for ``how``."""
        config = self._judged_as(trunk, _train_yaml(self.spec, self.given, self.earlier, self.read_by))
        config['train_loader'] = trunk.stage.to_train_yaml()['train_loader']  # shares of its length are not ours
        checkpoint = f'{trunk.folder}/{checkpoint_after(trunk.stage, end)}'
        run = self._run(merged(trunk.stage, config, checkpoint, end, how), trunk, end)
        before = Counter(run.tokens_before_branch)
        for other in others:
            before.update(other.stage.tokens_by_stream())
        return replace(run, tokens_before_branch=dict(before), also=tuple(other.name for other in others))

    def _judged_as(self, trunk: Run, config: dict[str, Any]) -> dict[str, Any]:
        """The YAML of a branch, whose forgetting is that of its stage."""
        callbacks = trunk.stage.callbacks
        if callbacks.stage_start is not None:
            config['callbacks']['stage_start'] = dict(callbacks.stage_start.given)
        if callbacks.forgetting is not None:
            kept = {key: value for key, value in callbacks.forgetting.given.items() if key != 'save_folder'}
            config['callbacks']['forgetting'] = {'parent_losses': f'{trunk.folder}/forgetting.json', **kept}
        return config

    def _run(self, config: dict[str, Any], parent: Run | None, start: int | None = None) -> Run:
        name = f'{"-".join(map(_slug, self.words))}-s{self.seed}'
        name = self.names.get(name, name)
        folder = f'{self.spec.folder}/{name}'
        config = {**_placed(config, folder), 'run_name': name, 'save_folder': folder, 'seed': self.seed}
        config['train_loader']['dataset'].setdefault('shuffle_seed', self.seed)
        if self.spec.lm_eval:
            config['variables'] = {**(config.get('variables') or {}), 'lm_eval': self.spec.lm_eval}
        _track(config, self.spec.name, self.stage, self.tracked_as, self.seed)
        try:
            stage = Stage.from_yaml(config)
        except ConfigError as error:
            raise ConfigError([f'{name}: {problem}' for problem in error.problems]) from None
        before = {} if start is None or parent is None else parent.stage.tokens_by_stream(start)
        return Run(name, self.label, self.stage, self.seed, parent.name if parent else None, stage, before)


@dataclass(frozen=True)
class _Soup:
    """A branch that is made of the results of several arms or seeds, and becomes a run when these are known."""

    make: _RunFactory
    trunk: Run
    end: int
    given: str | list[str]
    branch: str
    arm: str
    seeds: list[int]
    is_last: bool  # whether its stage is

    def others(self, trunks: Mapping[tuple[str, str, int], Run]) -> list[Run]:
        """The other runs; none if this is a soup of seeds, which is that of the first one."""
        stage, seed = self.make.stage, self.make.seed
        if self.given == 'seeds':
            if len(self.seeds) < 2:
                raise ValueError(f'soup=seeds: there is one seed, {seed}')
            return [trunks[self.arm, stage, each] for each in self.seeds[1:]] if seed == self.seeds[0] else []
        known = {arm for arm, of, _ in trunks if of == stage}
        found = []
        for arm in self.given:
            if arm not in known:
                raise ValueError(f'soup: no arm with this stage is called {arm!r}; {nearest(arm, known)}')
            if (run := trunks[arm, stage, seed]) in (self.trunk, *found):
                raise ValueError(f'soup: {arm!r} is the same run as another one; leave it out')
            found.append(run)
        return found


def _train_yaml(
    spec: SequenceSpec, given: Mapping[str, Any], earlier: Sequence[str], read_by: Mapping[str, str]
) -> dict[str, Any]:
    """A stage's YAML, but for names and places; ``read_by``: the checkpoint of who learned each dataset."""
    stage = parse_section(StageSettings, given)
    _refuse_set_here(given)
    config = {key: copy.deepcopy(value) for key, value in given.items() if key not in _OURS}
    new = _names(given['new'])
    for name in [*new, *earlier]:
        if name not in spec.data:
            raise ValueError(f'stages: no dataset is called {name!r}; data has {", ".join(spec.data)}')
    loader = config.get('train_loader') or {}
    dataset = loader.setdefault('dataset', {})
    loader['name'] = 'replay_text'
    dataset['new'] = {name: {**spec.data[name].stream, 'split': 'train'} for name in new}
    if stage.replay.fraction:
        dataset['replay'] = _replay(spec, stage, new, earlier, read_by)
    config['train_loader'] = loader
    template = config.get('eval_loader') or {}
    config['eval_loader'] = [
        overlay({**template, 'label': name}, {'dataset': {**data.stream, 'split': 'val'}})
        for name, data in spec.data.items()
    ]
    callbacks = config.get('callbacks') or {}
    config['callbacks'] = {
        **callbacks,
        'stage_start': {**(callbacks.get('stage_start') or {}), 'optimizer_state': stage.optimizer_state},
        'final_loss': callbacks.get('final_loss') or {},
    }
    return config


# What a sequence sets inside the sections of a stage, each with what says it instead.
_SET_HERE = {
    'callbacks.stage_start.optimizer_state': "the stage's optimizer_state",
    'train_loader.name': 'nothing: it is replay_text',
    'train_loader.dataset.new': "the stage's new",
    'train_loader.dataset.replay': "the stage's replay",
    'train_loader.dataset.split': 'nothing: it is train',
    'eval_loader.label': 'data: a dataset is its label',
    'eval_loader.dataset.split': 'nothing: it is val',
}


def _refuse_set_here(given: Mapping[str, Any]) -> None:
    for key, instead in _SET_HERE.items():
        section: Any = given
        for word in key.split('.'):
            section = section.get(word) if isinstance(section, Mapping) else None
        if section is not None:
            raise ValueError(f'{key}={section!r} is set by the sequence for each run; leave it out ({instead} says it)')


def _replay(
    spec: SequenceSpec, stage: StageSettings, new: list[str], earlier: Sequence[str], read_by: Mapping[str, str]
) -> dict[str, Any]:
    """The section ``replay`` of the train loader."""
    weights = stage.replay.given.get('weights') or {}  # as they were written, whole or not
    check_keys('replay.weights', weights, earlier)
    streams: dict[str, Any] = {}
    for name in earlier:
        if name in new or (weights and name not in weights):
            continue
        data = spec.data[name]
        streams[name] = {**data.stream, 'split': 'train', 'weight': weights.get(name, 1)}
        if (said := data.stands_in_for) and (data.stand_in_for or name not in read_by):
            streams[name]['stand_in_for'] = said
        elif stage.replay.consumed_only:
            if name not in read_by:
                raise ValueError(f'replay.consumed_only=true: no stage learned {name!r} by itself; leave it out')
            streams[name]['only_seen_by'] = read_by[name]
    if not streams:
        fraction = stage.replay.fraction
        raise ValueError(
            f'replay.fraction={fraction} for {", ".join(new)}: no earlier stage has read other data to replay'
        )
    ours = ('weights', 'consumed_only')
    return {**{key: value for key, value in stage.replay.given.items() if key not in ours}, 'streams': streams}


def _placed(config: dict[str, Any], folder: str) -> dict[str, Any]:
    """A YAML whose callbacks write where the run does."""
    callbacks = {
        name: {**given, 'save_folder': folder} if 'save_folder' in (given or {}) else given
        for name, given in (config.get('callbacks') or {}).items()
    }
    return {**config, 'callbacks': callbacks}


def _track(config: dict[str, Any], sequence: str, stage: str, arm: str, seed: int) -> None:
    """W&B runs grouped by sequence, stage, arm and seed; settings of the YAML come first, then those of the shell."""
    if 'wandb' not in (config.get('loggers') or {}):
        return
    project = re.sub(r'[/\\#?%:]', '_', sequence)[:128]  # W&B takes no others
    shell = {key: os.environ.get(f'WANDB_{key}') for key in ('PROJECT', 'RUN_GROUP', 'TAGS', 'JOB_TYPE')}
    ours = {'project': shell['PROJECT'] or project, 'group': shell['RUN_GROUP'] or sequence}
    given = {**ours, **(config['loggers']['wandb'] or {})}
    tags = given.get('tags') or [tag.strip() for tag in (shell['TAGS'] or '').split(',') if tag.strip()]
    given['tags'] = [*tags, *(tag[:64] for tag in (stage, arm, f'seed {seed}'))]
    grouped = {'sequence': sequence, 'stage': stage, 'arm': arm, 'seed': seed}
    init = given.get('init_kwargs') or {}
    given['init_kwargs'] = {
        'job_type': shell['JOB_TYPE'] or stage,
        **init,
        'config': {**grouped, **(init.get('config') or {})},
    }
    config['loggers'] = {**config['loggers'], 'wandb': given}


def _slug(words: str) -> str:
    """Fit for a folder's name: ``replay 5 %`` becomes ``replay_5pct``."""
    return re.sub(r'[^\w.]+', '_', words.replace(' %', 'pct').replace('%', 'pct')).strip('_')
