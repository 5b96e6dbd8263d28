# SPDX-License-Identifier: Apache-2.0
"""What a shell brings along: the home folder, W&B's settings, the variables of a launcher, and the order of words."""

import itertools
import os
import re
import sys
from pathlib import Path

import pytest
import sequence
import tiny
from hypothesis import given
from hypothesis import strategies as st

from cpt_algorithms.launch import processes
from cpt_algorithms.launch.processes import OF_A_LAUNCHER, refuse_launcher
from cpt_algorithms.launch.wandb_runs import environment_of_children
from cpt_algorithms.preparation.options import Options
from cpt_algorithms.preparation.sources import parse_sources
from cpt_algorithms.sequence.spec import SequenceSpec
from cpt_algorithms.stage.stage import Stage
from cpt_algorithms.validation import ConfigError, parse_section, with_home


@given(st.sampled_from(['~', '~/', '~/x', '$HOME', '$HOME/x', '~x', '$HOMES', 'a~/', '']), st.text('ab/~$', max_size=4))
def test_home_is_that_of_a_shell(begin, rest):
    text = begin + rest
    shells = os.path.expanduser(text) if text[:2] in ('~', '~/') else text
    shells = os.path.expandvars('$HOME') + text[5:] if re.match(r'\$HOME(/|$)', text) else shells
    assert with_home({'a': [text, {'b': text}], 'c': 1, 'd': None}) == {'a': [shells, {'b': shells}], 'c': 1, 'd': None}


@pytest.mark.parametrize('home', ['~', '$HOME'])
def test_a_folder_in_the_home_is_there_wherever_it_is_named(home, data, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    cfg = tiny.config(Path(home), data, 'run', load_path=f'{home}/base/latest-rank0.pt', code_paths=[f'{home}/code.py'])
    cfg['train_loader']['dataset']['new'] = {'local': f'{home}/data', 'split': 'train'}
    stage = Stage.from_yaml({**cfg, 'callbacks': {**cfg['callbacks'], 'final_loss': {}}})
    assert not re.search(r'~|\$HOME', str(stage.to_train_yaml()))
    assert (stage.folder, stage.load_path) == (f'{tmp_path}/run', f'{tmp_path}/base/latest-rank0.pt')
    assert stage.mix is not None and stage.mix.new['new'].local == f'{tmp_path}/data'
    spec = {
        'name': 'x', 'folder': f'{home}/runs', 'data': {'old': {'local': f'{home}/old'}},
        'stages': {'old': {'max_duration': '8ba'}}, 'common': {'global_train_batch_size': 8, 'max_seq_len': 16},
    }  # fmt: skip
    assert SequenceSpec.from_yaml(spec).folder == f'{tmp_path}/runs'
    assert parse_section(Options, {'out': f'{home}/data'}).out == f'{tmp_path}/data'
    assert parse_sources([f'new=text:{home}/new/*.txt'])[0].target == f'{tmp_path}/new/*.txt'


@pytest.mark.parametrize('path', ['~me/x', '$SCRATCH/x', '${SCRATCH}/x', '$HOMES'])
@pytest.mark.parametrize('key', ['save_folder', 'load_path'])
def test_what_only_a_shell_can_read_is_refused(key, path, data, tmp_path):
    with pytest.raises(ConfigError, match=rf'{key}={re.escape(repr(path))}: .*oc\.env'):
        Stage.from_yaml({**tiny.config(tmp_path, data, 'run'), key: path})


SETTINGS = {'project': 'WANDB_PROJECT', 'group': 'WANDB_RUN_GROUP', 'job_type': 'WANDB_JOB_TYPE', 'tags': 'WANDB_TAGS'}


@pytest.mark.parametrize('in_yaml', [(), tuple(SETTINGS)], ids=['silent', 'said'])
@pytest.mark.parametrize('in_shell', [*itertools.combinations(SETTINGS, 1), (), tuple(SETTINGS)], ids=str)
def test_wandb_settings_of_the_shell_hold_where_the_yaml_is_silent(in_yaml, in_shell, data, tmp_path, monkeypatch):
    for key, variable in SETTINGS.items():
        monkeypatch.delenv(variable, raising=False)
        if key in in_shell:
            monkeypatch.setenv(variable, f'{key} of the shell')
    said = {key: f'{key} of the yaml' for key in in_yaml}
    init = {'job_type': said.pop('job_type')} if 'job_type' in said else {}
    wandb = {**said, **({'tags': [said['tags']]} if 'tags' in said else {}), **({'init_kwargs': init} if init else {})}
    common = tiny.sequence_common(tmp_path, data, loggers={'wandb': wandb})
    stages = {'old': {'max_duration': '8ba'}}
    (run,) = tiny.runs_of(tiny.sequence_spec(tmp_path, data, name='mine', stages=stages, common=common))
    given = run.stage.given['loggers']['wandb']
    found = {**given, 'job_type': given['init_kwargs']['job_type'], 'tags': ', '.join(given['tags'])}
    ours = {'project': 'mine', 'group': 'mine', 'job_type': 'old', 'tags': 'old, shared, seed 17'}
    for key in SETTINGS:
        said_by = 'yaml' if key in in_yaml else 'shell' if key in in_shell else None
        expected = f'{key} of the {said_by}' if said_by else ours[key]
        if key == 'tags' and said_by:
            assert found[key].startswith(f'{expected}, old, ')
        else:
            assert found[key] == expected or (key == 'tags' and found[key].startswith('old, '))


@pytest.mark.parametrize('variable', ['RANK', 'LOCAL_RANK', 'NODE_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE'])
def test_a_launchers_variable_is_named(variable, monkeypatch):
    for each in OF_A_LAUNCHER:
        monkeypatch.setenv(each, '1' if 'SIZE' in each else '0')
    refuse_launcher()  # of one rank
    monkeypatch.setenv(variable, '2')
    monkeypatch.setattr(sys, 'argv', ['recipes/sequence.py', 'nowhere.yaml'])
    with pytest.raises(SystemExit, match=rf'^{variable}=2 in the environment: sequence.py .*python.* `nproc`'):
        sequence.main()
    assert not environment_of_children(os.environ).keys() & set(OF_A_LAUNCHER)


def test_a_rank_of_torchrun_is_one_of_composer(monkeypatch):
    monkeypatch.setattr(processes, 'die_with_parent', lambda: None)
    for key, value in {'LOCAL_RANK': '1', 'WORLD_SIZE': '4', 'GROUP_RANK': '1'}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv('NODE_RANK', raising=False)
    processes.die_with_launcher()
    assert os.environ['NODE_RANK'] == '1'
    for key in ('GROUP_RANK', 'NODE_RANK'):
        monkeypatch.delenv(key)
    with pytest.raises(SystemExit, match='NODE_RANK is not: start the ranks with composer or torchrun'):
        processes.die_with_launcher()


COMMANDS = sorted([*tiny.ROOT.glob('recipes/*.py'), *tiny.ROOT.glob('scripts/**/*.py')])


def test_flags_and_words_come_in_any_order():
    """argparse refuses words behind a flag, unless it is asked so."""
    assert len(COMMANDS) > 10
    assert [path.name for path in COMMANDS if '.parse_args(' in path.read_text()] == []
