# SPDX-License-Identifier: Apache-2.0
"""Sweeps mean the same to W&B's own code as here, and cost the same in every trial."""

import json
import queue
from pathlib import Path

import pytest
import sweeps
import wandb.wandb_agent as agent
import yaml
from omegaconf import OmegaConf
from sweeps.config import schema_violations_from_proposed_config
from tiny import ROOT, planned

from cpt_algorithms.sequence.expand import expand
from cpt_algorithms.sequence.spec import SequenceSpec
from cpt_algorithms.sequence.sweep import expand_trials, sequence_of, trials_of

FILES = sorted((ROOT / 'yamls' / 'sweeps').glob('*.yaml'))
QUICKSTART = ROOT / 'yamls' / 'sequence' / 'quickstart.yaml'
COMMAND = ['${env}', '${interpreter}', '${program}', str(QUICKSTART), '--trial', '${args_no_hyphens}']
each_file = pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)


@pytest.fixture(autouse=True)
def from_the_repositorys_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # as the paths in the files are


@pytest.fixture
def spec(tmp_path):
    """In a folder of its own: what was run in the usual one would be found."""
    return {**OmegaConf.to_container(OmegaConf.load(QUICKSTART), resolve=True), 'folder': str(tmp_path / 'runs')}


def load(path):
    return yaml.safe_load(path.read_text())


def grid(parameters, **more):
    return {'method': 'grid', 'command': COMMAND, 'parameters': parameters, **more}


def asked_of_the_agent(sweep, values, folder, monkeypatch):
    """What W&B's agent starts for one trial, from the words after the program on."""
    started = []

    def start(command, **how):  # of which later releases have more
        started.append(command)
        return type('Process', (), {})()

    monkeypatch.setattr(agent, 'AgentProcess', start)
    monkeypatch.setenv('WANDB_DIR', str(folder))
    monkeypatch.setenv('WANDB_SWEEP_ID', 'sweep')
    monkeypatch.setenv('WANDB_RUN_ID', 'given back when the test ends')
    monkeypatch.setenv('WANDB_SWEEP_PARAM_PATH', 'likewise')
    worker = agent.Agent(api=None, queue=queue.Queue())
    worker._sweep_command = sweep['command']
    (folder / 'wandb' / 'sweep-sweep').mkdir(parents=True, exist_ok=True)
    worker._command_run({'run_id': 'trial', 'program': sweep.get('program', 'recipes/sequence.py'), 'args': values})
    (command,) = started
    assert command[:3] == ['/usr/bin/env', 'python', 'recipes/sequence.py']
    return command[3:]


def through_the_server(config):
    return json.loads(json.dumps(config, default=float))


def suggested(sweep):
    """W&B's own trials of a grid."""
    runs = []
    while (run := sweeps.next_run(sweep, runs, validate=True)) is not None:
        runs.append(run)
    return [through_the_server(run.config) for run in runs]


def named(runs):
    return {run.name: run.stage.given for run in runs}


def test_there_are_sweeps_and_each_says_what_it_is():
    assert {path.stem for path in FILES} == {
        'replay_fraction', 'eta_max', 'warmup', 'infinite_cooldown', 'infinite_anneal', 'lawa',
    }  # fmt: skip
    for path in FILES:
        header = [line for line in path.read_text().split('\n') if line.startswith('#')]
        assert len(header) >= 3
        assert f'--sweep yamls/sweeps/{path.name}' in header[1]
        assert f'wandb sweep yamls/sweeps/{path.name}' in header[2]


@each_file
def test_wandb_finds_nothing_wrong(path):
    assert schema_violations_from_proposed_config(load(path)) == []
    assert schema_violations_from_proposed_config({**load(path), 'method': 'gird'})


@each_file
def test_trials_cost_the_same_and_share_what_they_do_not_change(path):
    sweep = load(path)
    trials = trials_of(sweep)
    _, runs = planned('--sweep', str(path))
    parents = {run.parent for run in runs}
    last = [run for run in runs if run.name not in parents]
    assert len({run.arm for run in last}) == len(last) == len(trials)
    stages = [(run, 2_560_000) for run in last] + [(run, 3_072_000) for run in runs if run.stage_name == 'python']
    for run, tokens in stages:
        assert sum(run.stage.tokens_by_stream().values()) + sum(run.tokens_before_branch.values()) == tokens
    changed = any(name.startswith('python.') for name in sweep['parameters'])
    first = [run.name for run in runs if run.stage_name == 'python']
    assert len(first) == len(trials) if changed else first == ['python-s17']
    total = sum(sum(run.stage.tokens_by_stream().values()) for run in runs)
    assert f'{total:,} in all' in path.read_text()
    assert f'{len(runs)} runs' in path.read_text()


@each_file
def test_the_agents_command_means_the_arm_of_the_local_sweep(path, tmp_path, monkeypatch):
    sweep = load(path)
    tracked = 'common.loggers={wandb: {}}'  # what W&B is told about a run is the same, too
    _, local = planned('--sweep', str(path), tracked)
    together = {}
    for config in suggested(sweep):
        words = asked_of_the_agent(sweep, config, tmp_path, monkeypatch)
        _, runs = planned(words[0], tracked, *words[1:])
        together |= named(runs)
        for name, given in config.items():
            stage, _, key = name.partition('.')
            if not key.startswith('replay.'):  # the stage's, and moved to its data by the plan
                config = [run.stage.given for run in runs if run.stage_name == stage][-1]
                assert OmegaConf.select(OmegaConf.create(config), key) == given['value']
    assert together == named(local)


@pytest.mark.parametrize(
    'parameters',
    [
        {'cpp.a': {'values': [0, 0.01, 1.0, 'x', True]}, 'cpp.b': {'value': 3}},
        {'python.a': {'min': 2, 'max': 5}, 'cpp.b': {'values': ['1-sqrt', '3tok']}},
        {'cpp.b': {'values': [{'name': 'wsd', 't_decay': '1ba'}, {'name': 'x'}]}, 'cpp.a': {'values': [1e-5, 2, 2]}},
    ],
)
def test_a_grid_is_wandbs(parameters):
    sweep = grid(parameters)
    theirs = [[f'{name}={given["value"]}' for name, given in config.items()] for config in suggested(sweep)]
    assert trials_of(sweep) == [sorted(trial) for trial in theirs]
    assert trials_of({**sweep, 'run_cap': 2}) == trials_of(sweep)[:2]


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('cpp.replay', None),
        ('cpp.callbacks.ema', None),
        ('cpp.eval_subset_num_batches', None),
        ('cpp.train_loader.dataset.shuffle_block_size', None),
        ('cpp.algorithms.gradient_clipping', None),
        ('cpp.algorithms', {'gradient_clipping': {'clipping_type': 'norm', 'clipping_threshold': None}}),
        ('cpp', {'callbacks': {'ema': None}}),
    ],
)
def test_null_is_null_from_the_agent_and_here(name, value, spec, tmp_path, monkeypatch):
    """In a trial it is what it is in an arm: W&B writes Python's None for it."""
    sweep = grid({name: {'values': [value]}})
    [trial] = trials_of(sweep)
    assert asked_of_the_agent(sweep, {name: {'value': value}}, tmp_path, monkeypatch)[-1:] == trial
    runs = expand_trials(SequenceSpec.from_yaml(spec), [trial])
    for key in reversed(name.split('.')[1:]):
        value = {key: value}
    stages = {'cpp': value}
    assert runs[-1].arm.endswith(('=null', '=norm')) and 'None' not in runs[-1].arm
    same = expand(SequenceSpec.from_yaml({**spec, 'arms': {runs[-1].arm: stages}}))
    assert named(runs) == named(same)


def test_stages_whose_names_hold_dots(spec):
    spec['data']['v1.5'] = spec['data']['cpp']
    spec['stages'] = {'v1': {**spec['stages']['python'], 'new': 'python'}, 'v1.5': spec['stages']['cpp']}
    *_, run = expand_trials(SequenceSpec.from_yaml(spec), [['v1.5.optimizer.lr=0.002', 'v1.optimizer.lr=0.004']])
    assert run.arm == 'optimizer.lr=0.002, v1.optimizer.lr=0.004' and run.stage.optimizer.lr == 0.002
    with pytest.raises(ValueError, match=r'v2\.optimizer\.lr does not begin with a stage'):
        expand_trials(SequenceSpec.from_yaml(spec), [['v2.optimizer.lr=0.002']])


def test_a_run_is_named_by_its_own_trial_alone(spec):
    trials = [
        ['python.scheduler.t_warmup=0.02dur', 'cpp.replay.fraction=0.05'],
        ['cpp.replay.fraction=0.25', 'python.scheduler.t_warmup=0.02dur'],
        ['cpp.optimizer.lr=0.001'],
        ['cpp.scheduler.alpha_f=1.0', 'cpp.optimizer.lr=3e-4'],
    ]
    together = named(expand_trials(SequenceSpec.from_yaml(spec), trials))
    assert list(together) == [
        'python-replay.fraction_0.05_python.scheduler.t_warmup_0.02dur-s17',
        'cpp-replay.fraction_0.05_python.scheduler.t_warmup_0.02dur-s17',
        'python-replay.fraction_0.25_python.scheduler.t_warmup_0.02dur-s17',
        'cpp-replay.fraction_0.25_python.scheduler.t_warmup_0.02dur-s17',
        'python-s17',
        'cpp-optimizer.lr_0.001-s17',
        'cpp-optimizer.lr_0.0003_scheduler.alpha_f_1-s17',
    ]
    for trial in trials:
        for name, config in named(expand_trials(SequenceSpec.from_yaml(spec), [trial])).items():
            assert together[name] == config
    assert together['cpp-optimizer.lr_0.0003_scheduler.alpha_f_1-s17']['optimizer']['lr'] == 3e-4


def test_a_section_may_come_before_or_after_its_keys(spec):
    section, key = (
        "cpp.scheduler={'name': 'wsd', 't_warmup': '0tok', 't_decay': '1ba'}",
        'cpp.scheduler.t_decay=4096tok',
    )
    one, other = (
        named(expand_trials(SequenceSpec.from_yaml(spec), [trial])) for trial in ([section, key], [key, section])
    )
    assert one == other
    assert one['cpp-scheduler.name_wsd_scheduler.t_decay_4096tok_scheduler.t_warmup_0tok-s17']['scheduler'] == {
        'name': 'wsd', 't_warmup': '0tok', 't_decay': '4096tok',
    }  # fmt: skip


@pytest.mark.parametrize(
    ('trial', 'message'),
    [
        ('ccp.replay.fraction=0.1', r"ccp\.replay\.fraction does not begin .*'cpp'"),
        ('replay.fraction=0.1', r'replay\.fraction does not begin .*cpp, python'),
        ('baseline=union', 'baseline does not begin with a stage'),
        ('cpp=3', 'cpp is a stage and no key of it'),
        ('cpp.replay.fraction', 'is not STAGE.KEY=VALUE'),
        ('cpp.replay.fracton=0.1', r"replay\.fracton is not a key that anything reads; did you mean 'fraction'"),
        ('cpp.seed=1', r'seed is set by the sequence'),
        ('cpp.max_duration=1ba', r'cpp\.max_duration would make one trial cost more'),
        ('cpp.global_train_batch_size=64', r'cpp\.global_train_batch_size would make one trial cost more'),
        ('python.max_seq_len=64', r'python\.max_seq_len would make one trial cost more'),
        ('cpp.train_loader.dataset.max_seq_len=64', 'would make one trial cost more'),
        ('cpp.model.d_model=256', r'cpp\.model\.d_model would make one trial cost more'),
        ("cpp={'model': {'n_layers': 4}}", r'cpp\.model\.n_layers would make one trial cost more'),
    ],
)
def test_bad_trials_are_named(spec, trial, message):
    with pytest.raises(ValueError, match=message):
        expand_trials(SequenceSpec.from_yaml(spec), [[trial]])


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'method': 'bayes'}, r"method='bayes': needs wandb agent"),
        ({'method': 'random', 'run_cap': 3}, r"method='random': needs wandb agent"),
        ({'early_terminate': {'type': 'hyperband'}}, 'early_terminate=.*needs wandb agent'),
        ({'paramters': {}}, "paramters is not .* 'parameters'"),
        ({'parameters': {}}, 'parameters=.* must be'),
        ({'parameters': ['cpp.a']}, 'parameters=.* must be a mapping'),
        ({'parameters': {'cpp': {'parameters': {'a': {'value': 1}}}}}, r'parameters\.cpp\.parameters'),
        ({'parameters': {'cpp.a': 0.1}}, r'parameters\.cpp\.a=0\.1 must be a mapping'),
        ({'parameters': {'cpp.a': {'min': 0.1, 'max': 1}}}, r'cpp\.a\.min=0\.1 must be a whole number'),
        ({'parameters': {'cpp.a': {'distribution': 'normal'}}}, r"cpp\.a\.distribution='normal'"),
        ({'parameters': {'cpp.a': {'vals': [1]}}}, r"cpp\.a\.vals is not .* 'values'"),
        ({'parameters': {'cpp.a': {'values': []}}}, r'cpp\.a\.values=\[\] must be a list of at least'),
        ({'parameters': {'cpp.a': {'values': 3}}}, r'cpp\.a\.values=3 must be a list'),
        ({'parameters': {'cpp.a': {'min': 3, 'max': 1}}}, r'cpp\.a.*min=3 .*max=1'),
        ({'run_cap': 0}, 'run_cap=0 must be at least 1'),
    ],
)
def test_what_cannot_be_run_here_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        trials_of({**grid({'cpp.a': {'value': 1}}), **change})


def test_trials_that_would_share_a_folder_are_refused(spec):
    with pytest.raises(ValueError, match=r'two trials would both be kept in the folder cpp-optimizer\.name_a_b-s17'):
        expand_trials(SequenceSpec.from_yaml(spec), [['cpp.optimizer.name=a b'], ['cpp.optimizer.name=a-b']])
    long = [f'cpp.optimizer.a_parameter_with_a_long_name_{index}=1' for index in range(6)]
    with pytest.raises(ValueError, match='a name on a disk has at most 255 bytes'):
        expand_trials(SequenceSpec.from_yaml(spec), [long])


def test_the_sequence_stands_in_the_command():
    words = ['base.yaml', 'folder=x']
    assert sequence_of(grid({'cpp.a': {'value': 1}}, command=[*COMMAND[:3], *words, *COMMAND[-2:]])) == words
    for command in (None, ['${program}', '${args}'], [*COMMAND[:3], *COMMAND[-2:]], [*COMMAND[:-1], '${args}']):
        with pytest.raises(ValueError, match='hands no trial to a sequence; use'):
            sequence_of(grid({'cpp.a': {'value': 1}}, command=command))


def test_words_after_a_sweep_change_all_its_trials(tmp_path):
    path = Path('yamls/sweeps/lawa.yaml')
    spec, runs = planned('--sweep', path, f'folder={tmp_path}', 'seeds=[1,2]', 'jobs=1')
    assert (spec.name, spec.jobs, spec.folder) == (load(path)['name'], 1, str(tmp_path))
    assert len(runs) == 20
