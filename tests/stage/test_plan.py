# SPDX-License-Identifier: Apache-2.0
"""A sequence YAML becomes the right runs."""

import pytest
from omegaconf import OmegaConf
from tiny import ROOT, merge

from cpt_algorithms.stage.plan import plan, tokens_per_stream

QUICKSTART = ROOT / 'yamls' / 'sequence' / 'quickstart.yaml'


@pytest.fixture
def spec():
    return OmegaConf.to_container(OmegaConf.load(QUICKSTART), resolve=True)


def test_quickstart_runs(spec):
    runs = {run.name: run for run in plan(spec)}
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
        'union_cpp-s17': None,
    }


def test_arms_are_compute_equivalent(spec):
    runs = {run.name: tokens_per_stream(run.config) for run in plan(spec)}
    assert runs['cpp-s17'] == {'cpp': 532_480}
    assert runs['cpp-replay_25pct-s17'] == {'cpp': 399_360, 'python': 133_120}
    whole = {sum(tokens.values()) for name, tokens in runs.items() if name.startswith('cpp') and 'infinite' not in name}
    assert whole == {532_480}
    branch = next(run for run in plan(spec) if run.name == 'cpp-infinite_LR_5pct-anneal-s17')
    assert sum(branch.trunk.values()) + sum(runs[branch.name].values()) == 532_480
    # from scratch on exactly the tokens of the stages
    assert runs['union_cpp-s17'] == {'cpp': 532_480, 'python': 901_120}


def test_a_run_is_a_plain_stage_yaml(spec):
    run = next(run for run in plan(spec) if run.name == 'cpp-replay_5pct-s17')
    assert run.config['load_path'] == 'runs/quickstart/python-s17/latest-rank0.pt'
    assert run.config['save_folder'] == 'runs/quickstart/cpp-replay_5pct-s17'
    assert run.config['callbacks']['stage_start'] == {'optimizer': 'reset'}
    dataset = run.config['train_loader']['dataset']
    assert dataset['replay']['fraction'] == 0.05
    assert list(dataset['replay']['streams']) == ['python']
    assert [loader['label'] for loader in run.config['eval_loader']] == ['python', 'cpp']
    assert 'alpha_const' not in run.config['scheduler']


def test_an_override_that_names_a_scheduler_replaces_it(spec):
    run = next(run for run in plan(spec) if run.name == 'cpp-constant_eta_min-s17')
    assert run.config['scheduler'] == {'name': 'rewarm_constant', 't_warmup': '0dur', 'alpha': 0.1}


def test_seeds_multiply_and_seed_the_data(spec):
    runs = plan({**spec, 'seeds': [1, 2]})
    assert len(runs) == 20
    assert {run.config['train_loader']['dataset']['shuffle_seed'] for run in runs if run.seed == 2} == {2}
    assert all(run.parent is None or run.parent.endswith(f's{run.seed}') for run in runs)


def test_union_of_three_stages_reads_each_budget(spec):
    spec['data']['english'] = {'local': 'data/english'}
    spec['stages']['late'] = {'new': 'english', 'max_duration': '100ba'}
    spec['arms'] = {'union': {'baseline': 'union'}}
    assert tokens_per_stream(plan(spec)[-1].config) == {'english': 409_600, 'python': 901_120, 'cpp': 532_480}


def test_three_stages_replay_everything_earlier(spec):
    spec['data']['english'] = {'local': 'data/english'}
    spec['stages']['english'] = {
        'max_duration': '409600tok',
        'replay': {'fraction': 0.1, 'weights': {'python': 3, 'cpp': 1}},
    }
    spec['arms'] = {'only': {}}
    last = plan(spec)[-1]
    streams = last.config['train_loader']['dataset']['replay']['streams']
    assert {name: stream['weight'] for name, stream in streams.items()} == {'python': 3, 'cpp': 1}
    assert tokens_per_stream(last.config) == {'english': 368_640, 'python': 30_720, 'cpp': 10_240}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'armz': {}}, "armz is not a key that anything reads; did you mean 'arms'"),
        ({'arms': {'x': {'ccp': {}}}}, r"arms\.x\.ccp is not a key that anything reads; did you mean 'cpp'"),
        (
            {'arms': {'x': {'baseline': 'onion'}}},
            r"arms\.x\.baseline='onion' is not possible; use union \(from scratch",
        ),
        ({'stages': {'cpp': {'seed': 5}}}, r'stages\.cpp\.seed is set by the sequence'),
        ({'stages': {'cpp': {'new': 'german'}}}, "no dataset is called 'german'; data has python, cpp"),
        ({'stages': {'python': {'replay': {'fraction': 0.1}}}}, 'in the first stage: there is nothing to replay'),
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
        ({'stages': {'cpp': {'max_duration': '2ep'}}}, r'stages\.cpp\.max_duration=2ep must be in tok, ba or sp'),
        ({'stages': {'english': {'new': 'cpp'}}, 'common': {'max_seq_len': None}}, r'max_seq_len is missing'),
    ],
)
def test_bad_sequences_are_named(spec, change, message):
    with pytest.raises(ValueError, match=message):
        plan(merge(spec, change))


def test_stages_with_a_parent_are_judged_against_it(spec):
    runs = {run.name: run.config['callbacks'] for run in plan(spec)}
    assert runs['cpp-s17']['forgetting'] == {'new': ['cpp'], 'old': ['python']}
    assert 'forgetting' not in runs['python-s17']
    assert 'forgetting' not in runs['union_cpp-s17']
    third = merge(spec, {'stages': {'again': {'new': 'python', 'max_duration': '532480tok'}}, 'arms': {'union': None}})
    runs = {run.name: run for run in plan(third)}
    assert runs['again-replay_5pct-s17'].config['callbacks']['forgetting'] == {'new': ['python'], 'old': ['cpp']}
    assert runs['again-replay_5pct-s17'].parent == 'cpp-replay_5pct-s17'


def test_a_middle_stage_that_no_arm_changes_has_no_arms_name(spec):
    three = {'python': {}, 'cpp': {}, 'last': {'new': 'python', 'max_duration': '532480tok'}}
    arms = {'low': {'last': {'optimizer': {'lr': 1e-4}}}, 'high': {'last': {'optimizer': {'lr': 1e-2}}}}
    runs = plan({**merge(spec, {'stages': three}), 'arms': arms})
    assert [run.name for run in runs] == ['python-s17', 'cpp-s17', 'last-low-s17', 'last-high-s17']


def test_wandb_runs_can_be_grouped(spec):
    mine = {'entity': 'us', 'tags': ['mine'], 'init_kwargs': {'config': {'budget': 'small'}, 'mode': 'offline'}}
    tracked = merge(spec, {'common': {'loggers': {'wandb': mine}}})
    runs = {run.name: run.config['loggers']['wandb'] for run in plan(tracked)}
    assert runs['cpp-replay_5pct-s17'] == {
        'project': 'quickstart', 'group': 'quickstart', 'entity': 'us',
        'tags': ['mine', 'cpp', 'replay 5 %', 'seed 17'],
        'init_kwargs': {
            'job_type': 'cpp', 'mode': 'offline',
            'config': {'sequence': 'quickstart', 'stage': 'cpp', 'arm': 'replay 5 %', 'seed': 17, 'budget': 'small'},
        },
    }  # fmt: skip
    assert runs['python-s17']['init_kwargs']['config']['arm'] == 'shared'
    assert [run.name for run in plan(tracked)] == [run.name for run in plan(spec)], 'tracking changes no run'


def test_every_run_ends_with_the_suite(spec):
    assert {run.config['variables']['lm_eval'][0] for run in plan(spec)} == {'yamls/eval/offline.yaml'}
    assert not any('variables' in run.config for run in plan({**spec, 'lm_eval': None}))


def test_only_what_the_earlier_stage_read_comes_back(spec):
    spec['stages']['cpp']['replay'] = {'fraction': 0.05, 'consumed_only': True}
    runs = {run.name: run for run in plan({**spec, 'arms': {'default': {}}})}
    old = runs['cpp-s17'].config['train_loader']['dataset']['replay']
    assert old['streams']['python']['consumed_by'] == 'runs/quickstart/python-s17/latest-rank0.pt'
    assert 'consumed_only' not in old
    spec['stages']['python']['new'] = ['python', 'cpp']
    spec['data']['more'] = spec['data']['cpp']
    spec['stages']['cpp']['new'] = 'more'
    with pytest.raises(
        ValueError, match="consumed_only=true, and no stage of this sequence learned 'python' by itself"
    ):
        plan({**spec, 'arms': {'default': {}}})


def test_a_stand_in_is_named_where_it_is_replayed_and_nowhere_else(spec):
    spec['data']['python']['stand_in_for'] = 'the data of the base model'
    spec['stages']['cpp']['replay'] = {'fraction': 0.05, 'consumed_only': True}
    configs = {run.name: run.config for run in plan({**spec, 'arms': {'default': {}}})}
    dataset = configs['cpp-s17']['train_loader']['dataset']
    assert dataset['replay']['streams']['python']['stand_in_for'] == 'the data of the base model'
    assert 'consumed_by' not in dataset['replay']['streams']['python']
    assert 'stand_in_for' not in str(configs['python-s17']['train_loader'])
    assert all('stand_in_for' not in str(config['eval_loader']) for config in configs.values())
