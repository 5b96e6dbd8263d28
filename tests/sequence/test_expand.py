# SPDX-License-Identifier: Apache-2.0
"""A sequence YAML becomes the right runs."""

import json
from typing import get_args

import pytest
from omegaconf import OmegaConf
from tiny import ROOT, merge, runs_of

from cpt_algorithms.sequence.expand import descendants, expand
from cpt_algorithms.sequence.read import load_yaml
from cpt_algorithms.sequence.show import print_runs
from cpt_algorithms.sequence.spec import Baseline, SequenceSpec
from cpt_algorithms.terminal import make_console

QUICKSTART = ROOT / 'yamls' / 'sequence' / 'quickstart.yaml'


@pytest.fixture
def spec():
    return OmegaConf.to_container(OmegaConf.load(QUICKSTART), resolve=True)


def test_quickstart_runs(spec):
    runs = {run.name: run for run in runs_of(spec)}
    assert {name: run.parent for name, run in runs.items()} == {
        'python-s17': None,
        'cpp-s17': 'python-s17',
        'cpp-replay_5pct-s17': 'python-s17',
        'cpp-replay_25pct-s17': 'python-s17',
        'cpp-constant_eta_min-s17': 'python-s17',
        'python-infinite_LR_5pct-s17': None,
        'python-infinite_LR_5pct-anneal-s17': 'python-infinite_LR_5pct-s17',
        'cpp-infinite_LR_5pct-s17': 'python-infinite_LR_5pct-s17',
        'cpp-infinite_LR_5pct-anneal-s17': 'cpp-infinite_LR_5pct-s17',
        'matched_cpp-s17': None,
        'union_cpp-s17': None,
    }


def test_arms_are_compute_equivalent(spec):
    runs = {run.name: run.stage.tokens_by_stream() for run in runs_of(spec)}
    assert runs['cpp-s17'] == {'cpp': 2_560_000}
    assert runs['cpp-replay_25pct-s17'] == {'cpp': 1_920_000, 'python': 640_000}
    whole = {sum(tokens.values()) for name, tokens in runs.items() if name.startswith('cpp') and 'infinite' not in name}
    assert whole == {2_560_000}
    branch = next(run for run in runs_of(spec) if run.name == 'cpp-infinite_LR_5pct-anneal-s17')
    assert sum(branch.tokens_before_branch.values()) + sum(runs[branch.name].values()) == 2_560_000
    # from scratch on exactly the tokens of the stages
    assert runs['union_cpp-s17'] == {'cpp': 2_560_000, 'python': 3_072_000}


def test_a_run_is_a_plain_stage_yaml(spec):
    run = next(run for run in runs_of(spec) if run.name == 'cpp-replay_5pct-s17')
    assert run.stage.given['load_path'] == 'runs/quickstart/python-s17/latest-rank0.pt'
    assert run.stage.given['save_folder'] == 'runs/quickstart/cpp-replay_5pct-s17'
    assert run.stage.given['callbacks']['stage_start'] == {'optimizer_state': 'reset'}
    dataset = run.stage.given['train_loader']['dataset']
    assert dataset['replay']['fraction'] == 0.05
    assert list(dataset['replay']['streams']) == ['python']
    assert [loader['label'] for loader in run.stage.given['eval_loader']] == ['python', 'cpp']
    assert 'alpha_const' not in run.stage.given['scheduler']


def test_an_override_that_names_a_scheduler_replaces_it(spec):
    run = next(run for run in runs_of(spec) if run.name == 'cpp-constant_eta_min-s17')
    assert run.stage.given['scheduler'] == {'name': 'rewarm_constant', 't_warmup': '0dur', 'alpha': 0.1}


def test_seeds_multiply_and_seed_the_data(spec):
    runs = runs_of({**spec, 'seeds': [1, 2]})
    assert len(runs) == 22
    assert {run.stage.given['train_loader']['dataset']['shuffle_seed'] for run in runs if run.seed == 2} == {2}
    assert all(run.parent is None or run.parent.endswith(f's{run.seed}') for run in runs)


def test_union_of_three_stages_reads_each_budget(spec):
    spec['data']['english'] = {'local': 'data/english'}
    spec['stages']['late'] = {'new': 'english', 'max_duration': '100ba'}
    spec['arms'] = {'union': {'baseline': 'union'}}
    assert runs_of(spec)[-1].stage.tokens_by_stream() == {'english': 204_800, 'python': 3_072_000, 'cpp': 2_560_000}


def test_three_stages_replay_everything_earlier(spec):
    spec['data']['english'] = {'local': 'data/english'}
    spec['stages']['english'] = {
        'max_duration': '409600tok',
        'replay': {'fraction': 0.1, 'weights': {'python': 3, 'cpp': 1}},
    }
    spec['arms'] = {'only': {}}
    last = runs_of(spec)[-1]
    streams = last.stage.given['train_loader']['dataset']['replay']['streams']
    assert {name: stream['weight'] for name, stream in streams.items()} == {'python': 3, 'cpp': 1}
    assert last.stage.tokens_by_stream() == {'english': 368_640, 'python': 30_720, 'cpp': 10_240}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'armz': {}}, "armz is not a key that anything reads; did you mean 'arms'"),
        ({'arms': {'x': {'ccp': {}}}}, r"arms\.x\.ccp is not a key that anything reads; did you mean 'cpp'"),
        ({'arms': {'x': {'baseline': 'onion'}}}, r"arms\.x\.baseline='onion'.* 'union'"),
        ({'stages': {'cpp': {'seed': 5}}}, r'stages\.cpp\.seed is set by the sequence'),
        ({'stages': {'cpp': {'new': 'german'}}}, "no dataset is called 'german'; data has python, cpp"),
        (
            {'stages': {'python': {'replay': {'fraction': 0.1}}}},
            'for python: no earlier stage has read other data',
        ),
        ({'common': {'eval_loader': []}}, r'common\.eval_loader=\[\] must be a mapping'),
        ({'data': None}, 'data is missing'),
        ({'arms': {'x': {'cpp': {'seed': 3}}}}, r'arms\.x\.cpp\.seed is set by the sequence'),
        ({'arms': {'again': {'cpp': {}}}}, r'arms\.again means the same runs as arms\.replay 0 %'),
        (
            {
                'arms': {
                    'replay 5': {'cpp': {'replay': {'fraction': 0.06}}},
                    'replay_5': {'cpp': {'replay': {'fraction': 0.07}}},
                }
            },
            'would both be kept in the folder cpp-replay_5-s17',
        ),
        ({'stages': {'cpp': {'max_duration': '2ep'}}}, r"stages\.cpp\.max_duration='2ep' .* tok, ba or sp"),
        ({'stages': {'english': {'new': 'cpp'}}, 'common': {'max_seq_len': None}}, r'max_seq_len is missing'),
    ],
)
def test_bad_sequences_are_named(spec, change, message):
    with pytest.raises(ValueError, match=message):
        runs_of(merge(spec, change))


def test_stages_with_a_parent_are_judged_against_it(spec):
    runs = {run.name: run.stage.given['callbacks'] for run in runs_of(spec)}
    folder = {'save_folder': 'runs/quickstart/cpp-s17'}
    assert runs['cpp-s17']['forgetting'] == {'new': ['cpp'], 'old': ['python'], **folder}
    assert 'forgetting' not in runs['python-s17']
    assert 'forgetting' not in runs['union_cpp-s17']
    third = merge(spec, {'stages': {'again': {'new': 'python', 'max_duration': '2560000tok'}}, 'arms': {'union': None}})
    runs = {run.name: run for run in runs_of(third)}
    forgetting = runs['again-replay_5pct-s17'].stage.callbacks.forgetting
    assert (forgetting.new, forgetting.old) == (['python'], ['cpp'])
    assert runs['again-replay_5pct-s17'].parent == 'cpp-replay_5pct-s17'


def test_a_middle_stage_that_no_arm_changes_has_no_arms_name(spec):
    three = {'python': {}, 'cpp': {}, 'last': {'new': 'python', 'max_duration': '2560000tok'}}
    arms = {'low': {'last': {'optimizer': {'lr': 1e-4}}}, 'high': {'last': {'optimizer': {'lr': 1e-2}}}}
    runs = runs_of({**merge(spec, {'stages': three}), 'arms': arms})
    assert [run.name for run in runs] == ['python-s17', 'cpp-s17', 'last-low-s17', 'last-high-s17']


def test_wandb_runs_can_be_grouped(spec):
    mine = {'entity': 'us', 'tags': ['mine'], 'init_kwargs': {'config': {'budget': 'small'}, 'mode': 'offline'}}
    tracked = merge(spec, {'common': {'loggers': {'wandb': mine}}})
    runs = {run.name: run.stage.given['loggers']['wandb'] for run in runs_of(tracked)}
    assert runs['cpp-replay_5pct-s17'] == {
        'project': 'quickstart', 'group': 'quickstart', 'entity': 'us',
        'tags': ['mine', 'cpp', 'replay 5 %', 'seed 17'],
        'init_kwargs': {
            'job_type': 'cpp', 'mode': 'offline',
            'config': {'sequence': 'quickstart', 'stage': 'cpp', 'arm': 'replay 5 %', 'seed': 17, 'budget': 'small'},
        },
    }  # fmt: skip
    assert runs['python-s17']['init_kwargs']['config']['arm'] == 'shared'
    assert [run.name for run in runs_of(tracked)] == [run.name for run in runs_of(spec)], 'tracking changes no run'


def test_every_run_ends_with_the_suite(spec):
    assert {run.stage.given['variables']['lm_eval'][0] for run in runs_of(spec)} == {'yamls/eval/offline.yaml'}
    assert not any('variables' in run.stage.given for run in runs_of({**spec, 'lm_eval': None}))


def test_only_what_the_earlier_stage_read_comes_back(spec):
    spec['stages']['cpp']['replay'] = {'fraction': 0.05, 'consumed_only': True}
    runs = {run.name: run for run in runs_of({**spec, 'arms': {'default': {}}})}
    old = runs['cpp-s17'].stage.given['train_loader']['dataset']['replay']
    assert old['streams']['python']['only_seen_by'] == 'runs/quickstart/python-s17/latest-rank0.pt'
    assert 'consumed_only' not in old
    spec['stages']['python']['new'] = ['python', 'cpp']
    spec['data']['more'] = spec['data']['cpp']
    spec['stages']['cpp']['new'] = 'more'
    with pytest.raises(ValueError, match="consumed_only=true: no stage learned 'python' by itself"):
        runs_of({**spec, 'arms': {'default': {}}})


def test_a_stand_in_is_named_where_it_is_replayed_and_nowhere_else(spec):
    spec['data']['python']['stand_in_for'] = 'the data of the base model'
    spec['stages']['cpp']['replay'] = {'fraction': 0.05, 'consumed_only': True}
    configs = {run.name: run.stage.given for run in runs_of({**spec, 'arms': {'default': {}}})}
    dataset = configs['cpp-s17']['train_loader']['dataset']
    assert dataset['replay']['streams']['python']['stand_in_for'] == 'the data of the base model'
    assert 'only_seen_by' not in dataset['replay']['streams']['python']
    assert 'stand_in_for' not in str(configs['python-s17']['train_loader'])
    assert all('stand_in_for' not in str(config['eval_loader']) for config in configs.values())


# Branches


@pytest.fixture
def infinite(spec):
    """One arm on an infinite schedule: 8 batches of warm-up and cooldown; the last 26 of a stage are annealed."""
    scheduler = {'name': 'infinite', 't_warmup': '2ba', 't_cooldown': '6ba', 'alpha_const': 0.5, 't_anneal': '26ba'}
    common = {'scheduler': {**scheduler, 'anneal': 'linear', 'alpha_f': 0.0}}
    return {
        **merge(spec, {'common': common}),
        'stages': {'python': {'max_duration': '220ba'}, 'cpp': {'max_duration': '130ba', 'replay': {'fraction': 0.5}}},
        'arms': {'only': {}},
    }


def test_a_trunk_stays_constant_and_each_stage_leaves_an_annealed_model(infinite):
    python, annealed, cpp, last = (run.stage.given for run in runs_of(infinite))
    constant = {'name': 'infinite', 'alpha_const': 0.5, 't_anneal': '0ba'}
    assert python['scheduler'] == {**constant, 't_warmup': '2ba', 't_cooldown': '6ba'}
    assert cpp['scheduler'] == {**constant, 't_warmup': '0ba', 't_cooldown': '0ba'}
    branch = {**cpp['scheduler'], 't_anneal': '26ba', 'anneal': 'linear', 'alpha_f': 0.0}
    assert annealed['scheduler'] == last['scheduler'] == branch
    durations = ['194ba', '26ba', '104ba', '26ba']
    assert [config['max_duration'] for config in (python, annealed, cpp, last)] == durations
    assert annealed['load_path'] == cpp['load_path'] == f'{python["save_folder"]}/latest-rank0.pt'
    assert (
        last['train_loader']['dataset']['resume_after'] == last['load_path'] == f'{cpp["save_folder"]}/latest-rank0.pt'
    )
    assert last['callbacks']['stage_start'] == {'optimizer_state': 'keep'}
    assert cpp['callbacks']['stage_start'] == {'optimizer_state': 'reset'}
    losses = f'{cpp["save_folder"]}/forgetting.json'
    judged = {'new': ['cpp'], 'old': ['python'], 'parent_losses': losses, 'save_folder': last['save_folder']}
    assert last['callbacks']['forgetting'] == judged
    assert 'forgetting' not in annealed['callbacks']
    assert [run.tokens_before_branch for run in runs_of(infinite)][-1] == {'cpp': 52 * 2048, 'python': 52 * 2048}


def test_branches_start_where_their_length_says(infinite):
    infinite['stages']['cpp']['branches'] = {
        'long': {'t_anneal': '65ba', 'new': 'python', 'optimizer': {'weight_decay': 0.2}},
        'anneal': {'alpha_f': 0.1},
        'merge': {'merge': {'last': 3, 'every': '10ba'}},
    }
    runs = {run.name: run for run in runs_of(infinite)}
    trunk = runs['cpp-s17'].stage.given
    assert trunk['max_duration'] == '130ba', 'for the merge'
    assert trunk['callbacks']['branch_points'] == {'at': [65, 104, 110, 120]}
    anneal, long, merged = (runs[f'cpp-{name}-s17'].stage.given for name in ('anneal', 'long', 'merge'))
    assert anneal['load_path'] == f'{trunk["save_folder"]}/ep0-ba104-rank0.pt'
    assert (anneal['scheduler']['anneal'], anneal['scheduler']['alpha_f']) == ('linear', 0.1)
    assert long['load_path'] == f'{trunk["save_folder"]}/ep0-ba65-rank0.pt'
    dataset = long['train_loader']['dataset']
    assert (list(dataset['new']), list(dataset['replay']['streams'])) == (['python'], ['cpp']), 'a mix of its own'
    assert long['optimizer'] == {**trunk['optimizer'], 'weight_decay': 0.2}
    assert 'branch_points' not in long['callbacks']
    how = {'of': trunk['save_folder'], 'batch': 130, 'last': 3, 'every': '10ba', 'weights': 'uniform'}
    assert merged['variables']['merge'] == how
    assert runs['cpp-merge-s17'].stage.tokens_by_stream() == {'cpp': 0, 'python': 0}
    assert runs['cpp-merge-s17'].stage.merge.last == 3
    assert [run.arm for run in runs.values()] == [
        'python', 'python, anneal', 'only', 'only, anneal', 'only, long', 'only, merge',
    ]  # fmt: skip


@pytest.mark.parametrize(
    ('branch', 'message'),
    [
        ({}, r'stages\.cpp\.branches\.x\.t_anneal is missing'),
        ({'t_anneal': '130ba'}, r'x\.t_anneal=130ba must be longer than 0 and shorter than the stage, 130ba'),
        ({'t_anneal': '2ep'}, r"x\.t_anneal='2ep' .* tok, ba or sp"),
        (
            {'t_anneal': '2ba', 'anneal': 'linear', 'alpha_f': 0.5},
            r'branches\.x, in the arm only: alpha_f=0.5: nothing to anneal, the trunk is at 0.5',
        ),
        ({'t_anneal': '2ba', 'seed': 3}, r'stages\.cpp\.branches\.x\.seed is set by the sequence'),
        ({'t_anneal': '2ba', 'scheduler': {'alpha_f': 0}}, r"x\.scheduler of a branch is its trunk's"),
        ({'t_anneal': '2ba', 'global_train_batch_size': 64}, r"x\.global_train_batch_size of a branch is its trunk's"),
        (
            {'merge': {'last': 3, 'every': '2ba', 'weights': 'x'}},
            r"merge\.weights='x' is not possible; one of ema",
        ),
        ({'merge': {'last': 3}}, r'x\.merge\.every is missing'),
        ({'merge': {'last': 3, 'evry': '2ba'}}, "did you mean 'every'"),
        ({'merge': {'last': 1, 'every': '2ba'}}, r'x\.merge\.last=1 must be at least 2'),
        ({'merge': {'last': 14, 'every': '10ba'}}, 'must fit into the stage of 130 batches'),
        ({'merge': {'last': 3, 'every': '2ba'}, 'alpha_f': 0.1}, r'branches\.x\.alpha_f is not a key'),
        ({'t_anneal': '2ba', 'alpha_f': 'low'}, r"branches\.x\.alpha_f='low' must be a number"),
        ('2ba', r"stages\.cpp\.branches\.x='2ba' must be a mapping"),
    ],
)
def test_bad_branches_are_named(infinite, branch, message):
    infinite['stages']['cpp']['branches'] = {'x': branch}
    with pytest.raises(ValueError, match=message):
        runs_of(infinite)


@pytest.mark.parametrize(
    ('scheduler', 'message'),
    [
        (None, 'scheduler'),
        ({'name': 'wsd', 't_warmup': '1ba'}, r"scheduler.name='wsd': .*missing .*'t_decay'"),
        ({'name': 'wsd', 't_warmup': '1ba', 't_decay': '26ba'}, r'batches 1 to 78\. A trunk that only warms up is'),
        ({'name': 'cosine_with_warmup', 't_warmup': '1ba'}, r"'cosine_with_warmup' has no phases"),
        ({'name': 'infinite', 't_anneal': 'late'}, r"stages\.cpp\.scheduler\.t_anneal='late' must be a time"),
    ],
)
def test_a_schedule_that_no_branch_can_leave_is_named(infinite, scheduler, message):
    infinite['stages']['cpp'] |= {'scheduler': scheduler, 'branches': {'x': {'t_anneal': '26ba'}}}
    with pytest.raises(ValueError, match=message):
        runs_of(infinite)


def test_a_trunk_needs_no_anneal_of_its_own(infinite):
    constant = {'name': 'infinite', 't_warmup': '0ba', 't_cooldown': '0ba', 'alpha_const': 0.5}
    infinite['stages']['cpp'] |= {'scheduler': constant, 'branches': {'x': {'t_anneal': '26ba'}}}
    trunk, branch = (run.stage.given['scheduler'] for run in runs_of(infinite) if run.stage_name == 'cpp')
    assert trunk == {**constant, 't_anneal': '0ba'}
    assert branch == {**constant, 't_anneal': '26ba', 'anneal': 'exponential', 'alpha_f': 0.1}


def test_an_anneal_before_the_constant_phase_is_refused(infinite):
    infinite['stages']['python']['branches'] = {'early': {'t_anneal': '215ba'}}
    with pytest.raises(ValueError, match=r"branches\.early, in the arm only: batch 5 is in the phase 'cooldown'"):
        runs_of(infinite)


def test_a_stage_that_is_added_changes_no_other_run(infinite):
    infinite['arms'] = {
        'only': {},
        'more': {'cpp': {'replay': {'fraction': 0.1}}},
        'hot': {'common': {'precision': 'amp_bf16'}},
    }
    before = {run.name: run.stage.given for run in runs_of(infinite)}
    infinite['data']['english'] = {'local': 'data/english'}
    infinite['stages']['english'] = {'max_duration': '100ba', 'replay': {'fraction': 0.1}}
    after = {run.name: run.stage.given for run in runs_of(infinite)}
    assert len(after) == len(before) + 6
    for name, config in before.items():
        assert {**after[name], 'eval_loader': None} == {**config, 'eval_loader': None}


def test_heirs_are_all_that_start_from_a_run(infinite):
    runs = runs_of(infinite)
    assert descendants(runs, 'python-s17') == ['python-anneal-s17', 'cpp-s17', 'cpp-anneal-s17']
    assert descendants(runs, 'cpp-anneal-s17') == []


# Baselines


def test_baselines_follow_from_the_stages(spec):
    spec['stages']['cpp']['replay'] = {'fraction': 0.05}
    spec['arms'] = {name: {'baseline': name} for name in get_args(Baseline)}
    runs = {run.arm: run.stage.given for run in runs_of(spec) if run.arm in get_args(Baseline)}
    assert runs.keys() == set(get_args(Baseline))
    cosine = spec['common']['scheduler']
    assert runs['constant_eta_min']['scheduler'] == {'name': 'rewarm_constant', 't_warmup': '0dur', 'alpha': 0.1}
    assert runs['constant_eta_max']['scheduler'] == {'name': 'rewarm_constant', 't_warmup': '0.01dur', 'alpha': 1.0}
    tokens = {run.arm: run.stage.tokens_by_stream() for run in runs_of(spec)}
    assert tokens['constant_eta_min'] == tokens['constant_eta_max'] == {'cpp': 2_432_000, 'python': 128_000}
    assert tokens['no_replay'] == {'cpp': 2_560_000}
    assert tokens['same_data'] == {'python': 2_560_000}
    assert tokens['from_scratch'] == {'cpp': 2_560_000}
    for name in ('no_replay', 'same_data', 'from_scratch', 'union'):
        assert runs[name]['scheduler'] == cosine
    assert ['load_path' in runs[name] for name in ('from_scratch', 'union', 'same_data')] == [False, False, True]


def test_a_baseline_may_be_changed(spec):
    spec['arms'] = {'cold': {'baseline': 'constant_eta_min', 'cpp': {'scheduler': {'alpha': 0.05}}}}
    assert runs_of(spec)[-1].stage.given['scheduler']['alpha'] == 0.05
    spec['common']['scheduler'] = {'name': 'constant_with_warmup', 't_wm': '0ba'}
    with pytest.raises(ValueError, match=r'arms\.cold\.baseline=constant_eta_min: .* no t_warmup'):
        runs_of(spec)


def test_a_mixture_that_moves_in_parts_of_the_run_is_that_of_its_branches_and_of_matched(spec):
    spec['stages']['cpp'] |= {'replay': {'fraction': [['0.5dur', 0], ['1dur', 0.5]]}}
    spec['arms'] = {'main': {'cpp': {'branches': {'line': {'line': [0, 1]}}}}, 'matched': {'baseline': 'matched'}}
    runs = {run.name: run for run in runs_of(spec)}
    (line,) = (run for name, run in runs.items() if name.endswith('-line-s17'))
    update = runs[line.parent]
    assert line.stage.to_train_yaml()['train_loader'] == update.stage.to_train_yaml()['train_loader']
    for name in (update.name, 'matched_cpp-s17'):
        stage = runs[name].stage
        first, whole = stage.tokens_by_stream(stage.batches // 2), stage.tokens_by_stream()
        assert first['python'] == 0 and abs(whole['python'] - sum(whole.values()) / 4) <= stage.max_seq_len
    spec['stages']['cpp']['replay']['fraction'] = [['4ba', 0.5], ['8ba', 0]]
    with pytest.raises(
        ValueError, match=r'replay\.fraction: until 4ba of the last stage is another part of the baseline matched'
    ):
        runs_of(spec)


def test_matched_is_the_mixture_of_the_last_stage_from_scratch(spec):
    spec['stages']['cpp']['replay'] = {'fraction': 0.25}
    half = {'replay': {'fraction': 0.5}}
    spec['arms'] = {'main': {}, 'matched': {'baseline': 'matched'}, 'half': {'baseline': 'matched', 'matched': half}}
    runs = {run.arm: run for run in runs_of(spec)}
    whole = 3_072_000 + 2_560_000
    assert runs['matched'].parent is None and runs['matched'].name == 'matched_cpp-s17'
    assert runs['matched'].stage.tokens_by_stream() == {'cpp': whole * 3 // 4, 'python': whole // 4}
    assert runs['half'].stage.tokens_by_stream() == {'cpp': whole // 2, 'python': whole // 2}
    assert runs['matched'].stage.given['scheduler'] == spec['common']['scheduler']
    assert runs['matched'].stage.callbacks.forgetting is None
    # of three stages, all earlier data, in the last one's weights
    spec['stages']['again'] = {'new': 'more', 'max_duration': '409600tok', 'replay': {'fraction': 0.5}}
    spec['data']['more'] = {'local': 'data/more'}
    spec['stages']['again']['replay']['weights'] = {'python': 3, 'cpp': 1}
    spec['arms'] = {'matched': {'baseline': 'matched'}}
    (run,) = runs_of(spec)
    whole += 409_600
    assert run.stage.tokens_by_stream() == {'more': whole // 2, 'python': whole * 3 // 8, 'cpp': whole // 8}


def test_a_union_reads_a_dataset_that_comes_twice_for_both(spec):
    spec['stages']['again'] = {'new': 'python', 'max_duration': '100ba'}
    spec['arms'] = {'union': {'baseline': 'union'}}
    assert runs_of(spec)[-1].stage.tokens_by_stream() == {'python': 3_072_000 + 204_800, 'cpp': 2_560_000}


def test_the_first_stage_may_update_a_base_model_whose_data_has_a_stand_in(spec):
    spec['data'] = {'web': {'local': 'data/web', 'stand_in_for': 'the Pile'}, **spec['data']}
    spec['common']['model'] = {'name': 'hf_causal_lm', 'pretrained_model_name_or_path': 'EleutherAI/pythia-410m'}
    spec['stages'] = {
        'python': {'max_duration': '220ba', 'replay': {'fraction': 0.05}},
        'cpp': {'max_duration': '130ba', 'replay': {'fraction': 0.1, 'weights': {'web': 2, 'python': 1}}},
    }
    first, second = (run.stage.given for run in runs_of({**spec, 'arms': {'only': {}}}))
    judged = first['callbacks']['forgetting']
    assert (judged['new'], judged['old']) == (['python'], ['web'])
    assert list(first['train_loader']['dataset']['replay']['streams']) == ['web']
    assert second['callbacks']['forgetting']['old'] == ['web', 'python']
    spec['common']['model']['pretrained'] = False
    with pytest.raises(ValueError, match='no earlier stage has read other data'):
        runs_of({**spec, 'arms': {'only': {}}})


def test_arms_that_anneal_differently_share_their_trunk(infinite):
    infinite['arms'] = {'linear': {}, 'cosine': {'cpp': {'scheduler': {'anneal': 'cosine'}}}}
    runs = {run.name: run for run in runs_of(infinite)}
    assert list(runs) == ['python-s17', 'python-anneal-s17', 'cpp-s17', 'cpp-anneal-s17', 'cpp-cosine-anneal-s17']
    assert runs['cpp-cosine-anneal-s17'].parent == 'cpp-s17'
    infinite['arms'] = {'longer': {'cpp': {'scheduler': {'t_anneal': '40ba'}}}}
    trunk = next(run for run in runs_of(infinite) if run.name == 'cpp-longer-s17')
    assert trunk.stage.given['scheduler']['t_warmup'] == trunk.stage.given['scheduler']['t_cooldown'] == '0ba'


def test_a_baseline_shares_a_first_stage_that_has_branches(infinite):
    infinite['stages']['python']['branches'] = {'long': {'t_anneal': '60ba'}}
    infinite['arms'] = {'main': {}, 'none': {'baseline': 'no_replay'}}
    names = [run.name for run in runs_of(infinite)]
    assert names[:3] == ['python-s17', 'python-anneal-s17', 'python-long-s17']
    assert not [name for name in names[3:] if name.startswith('python')]


def test_constant_eta_min_is_where_the_first_stage_ended(spec, infinite):
    arms = {'cold': {'baseline': 'constant_eta_min', 'cpp': {'precision': 'amp_bf16'}}}
    assert runs_of({**infinite, 'arms': arms})[-1].stage.given['scheduler']['alpha'] == 0.5, "a trunk's"
    for first, end in (
        ({'name': 'rewarm_constant', 't_warmup': '0.01dur', 'alpha': 0.5}, 0.5),
        ({'name': 'constant_with_warmup', 't_warmup': '0ba'}, 1.0),
        ({'name': 'cosine_with_warmup', 't_warmup': '0ba'}, 0.0),  # Composer's default, and not ours
    ):
        first_stage = {**spec['stages']['python'], 'scheduler': first}
        both = {**spec, 'arms': arms, 'stages': {**spec['stages'], 'python': first_stage}}
        assert runs_of(both)[-1].stage.given['scheduler']['alpha'] == end
    spec['stages']['cpp']['optimizer'] = {'lr': 12.0e-3}
    assert runs_of({**spec, 'arms': arms})[-1].stage.given['scheduler']['alpha'] == pytest.approx(0.05)


def test_a_union_has_the_unit_of_the_schedule(infinite):
    infinite['arms'] = {'union': {'baseline': 'union'}}
    trunk, annealed = runs_of(infinite)
    assert (trunk.stage.given['max_duration'], annealed.stage.given['max_duration']) == ('324ba', '26ba')
    infinite['stages']['cpp'] = {'new': 'python', 'max_duration': '130ba'}
    assert runs_of(infinite)[0].stage.tokens_by_stream() == {'python': 324 * 2048}


def test_a_first_stage_has_no_optimizer_to_keep(infinite):
    infinite['common']['optimizer_state'] = 'keep'
    states = [run.stage.given['callbacks']['stage_start']['optimizer_state'] for run in runs_of(infinite)]
    assert states == ['reset', 'keep', 'keep', 'keep']


def test_branches_within_several_passes_are_refused(infinite):
    passes = {'dataset': {'max_passes': 2}}
    infinite['stages']['cpp'] |= {'train_loader': passes, 'branches': {'x': {'t_anneal': '40ba'}}}
    with pytest.raises(ValueError, match=r'stages\.cpp: max_passes=2'):
        runs_of(infinite)


def test_a_branch_may_learn_other_data_and_replay_its_trunks(infinite):
    infinite['stages']['cpp']['replay'] = {'fraction': 0.5, 'consumed_only': True}
    infinite['stages']['cpp']['branches'] = {'x': {'t_anneal': '40ba', 'new': 'python'}}
    branch = runs_of(infinite)[-1].stage.given
    assert branch['train_loader']['dataset']['replay']['streams']['cpp']['only_seen_by'] == branch['load_path']


def quick(arms, **over):
    """Runs of a sequence of three stages whose data need not be there."""
    spec = {**load_yaml([str(QUICKSTART)]), 'arms': arms, 'lm_eval': None, **over}
    return expand(SequenceSpec.from_yaml({key: value for key, value in spec.items() if value is not None}))


def test_matched_has_the_mixture_of_the_update_whatever_it_replays():
    data = {name: {'local': f'data/{name}'} for name in ('python', 'cpp', 'more')}
    stages = {name: {'max_duration': '409600tok'} for name in data}
    replay = {'replay': {'fraction': 0.25, 'weights': {'python': 1}}}
    runs = quick({'x': {'more': replay}, 'm': {'baseline': 'matched', 'matched': replay}}, data=data, stages=stages)
    update, matched = (
        next(run for run in runs if run.arm == arm and run.stage_name == stage)
        for arm, stage in (('x', 'more'), ('m', 'matched'))
    )
    assert matched.stage.train_loader.dataset.replay['streams'].keys() == {'python'}
    assert matched.batches == 3 * update.batches


def test_nothing_starts_from_scratch_with_a_pretrained_model():
    model = {'name': 'hf_causal_lm', 'pretrained': True, 'pretrained_model_name_or_path': 'nobody/base'}
    common = {**load_yaml([str(QUICKSTART)])['common'], 'model': model}
    for baseline in ('union', 'matched', 'from_scratch'):
        with pytest.raises(ValueError, match=f'arms.b.baseline={baseline}: nobody/base is pretrained'):
            quick({'b': {'baseline': baseline}}, common=common)


@pytest.mark.parametrize('name', ['infinite LR, 5 %, anneal', 'python only'])
def test_two_rows_of_the_report_are_not_called_the_same(name):
    arms = load_yaml([str(QUICKSTART)])['arms']
    with pytest.raises(ValueError, match=f"would both be called '{name}'"):
        quick({**arms, name: {'cpp': {'replay': {'fraction': 0.5}}}})


def test_what_a_sequence_sets_is_not_taken_from_a_stage():
    common = load_yaml([str(QUICKSTART)])['common']
    given = {
        'callbacks.stage_start.optimizer_state': {'callbacks': {'stage_start': {'optimizer_state': 'keep'}}},
        'train_loader.name': {'train_loader': {'name': 'text'}},
        'eval_loader.dataset.split': {'eval_loader': {'dataset': {'split': 'test'}}},
    }
    for key, over in given.items():
        with pytest.raises(ValueError, match=key):
            quick({'a': {}}, common=merge(common, over))
    with pytest.raises(ValueError, match='split'):
        quick({'a': {}}, data={'python': {'local': 'x', 'split': 'train_small'}, 'cpp': {'local': 'y'}})


def test_what_a_stage_says_beside_what_a_sequence_sets_is_kept():
    common = load_yaml([str(QUICKSTART)])['common']
    runs = quick({'a': {}}, common=merge(common, {'callbacks': {'stage_start': {'trust_checkpoint': True}}}))
    assert all(run.stage.callbacks.stage_start.trust_checkpoint for run in runs)


def test_the_plan_says_how_often_data_is_read(spec, tmp_path, capsys):
    for name, samples in (('python', 24_000), ('cpp', 10_000)):
        folder = tmp_path / name / 'train'
        folder.mkdir(parents=True)
        (folder / 'index.json').write_text(json.dumps({'shards': [{'samples': samples - 1000}, {'samples': 1000}]}))
        spec['data'][name] = {'local': str(tmp_path / name)}
    runs = {run.name: run.stage.passes() for run in runs_of(spec)}
    assert runs['python-s17'] == {'python': 1.0}
    assert runs['cpp-replay_25pct-s17'] == pytest.approx({'cpp': 1.5, 'python': 5 / 24})
    assert runs['union_cpp-s17'] == {'cpp': 2.0, 'python': 1.0}
    print_runs('quickstart', runs_of(spec), {'python': 1, 'cpp': 3}, make_console())
    said = ' '.join(capsys.readouterr().out.split())
    assert 'cpp in cpp is read 2 times, and 3 times in the run that this is a pilot of: take prepare_data.py' in said
    assert '--train-subset 0.67, or' in said and 'python in python' not in said
    print_runs('quickstart', runs_of(spec), {'cpp': 1}, make_console())
    assert 'take 2 times as much data' in ' '.join(capsys.readouterr().out.split())
