# SPDX-License-Identifier: Apache-2.0
"""A sequence that was trained is found again, wherever it lies and in whatever order its arms stand; or is refused."""

import copy
import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch

from cpt_algorithms.checkpoints.save_folder import checkpoint_name, latest_link
from cpt_algorithms.files import write_json
from cpt_algorithms.sequence.check import check
from cpt_algorithms.sequence.run import is_done
from cpt_algorithms.stage.preflight import PreflightError
from cpt_algorithms.stage.restart_checks import write_record

LR = {'optimizer': {'lr': 2e-3}}


def as_trained(run):
    """What a finished run leaves behind, but for its weights."""
    run.folder.mkdir(parents=True)
    write_record(run.stage)
    name = checkpoint_name(run.batches, sharded=False)
    torch.save({'state': {'model': {'weight': torch.rand(9)}}}, run.folder / name)
    (run.folder / latest_link(sharded=False)).symlink_to(name)
    time = {'ba': run.batches}
    write_json(
        run.folder / 'done.json',
        {'batch': run.batches, 'time': time, 'max_duration': str(run.stage.max_duration), 'lm_eval': None},
    )


def planned(spec, path='sequence.yaml'):
    return tiny.planned(tiny.save(spec, path))[1]


def refused(runs):
    with pytest.raises(PreflightError) as caught:
        check(runs, 1)
    return caught.value.problems


@pytest.fixture
def spec(data, tmp_path, monkeypatch):
    """Two arms that change the first stage alike, finished; ``data`` is in the working folder."""
    monkeypatch.chdir(tmp_path)
    for name in ('old', 'new'):
        shutil.copytree(data[name], f'data/{name}')
    spec = tiny.sequence_spec(
        tmp_path, data, '8ba', folder='runs', data={name: {'local': f'data/{name}'} for name in ('old', 'new')},
        arms={'A': {'old': LR, 'new': {'replay': {'fraction': 0.25}}}, 'B': {'old': LR}},
        common=tiny.sequence_common(tmp_path, data, scheduler={'name': 'rewarm_cosine', 't_warmup': '0.1dur'}),
    )  # fmt: skip
    for run in planned(spec):
        as_trained(run)
    return spec


def all_done(spec, count=3):
    runs = planned(spec)
    check(runs, 1)
    assert [run.name for run in runs if not is_done(run)] == []
    assert len(runs) == count
    return runs


def test_places_may_be_spelled_otherwise_and_move(spec, tmp_path):
    for folder in ('runs/', './runs', str(tmp_path / 'runs')):
        all_done({**spec, 'folder': folder})
    os.symlink('data', 'data2')
    all_done({**spec, 'data': {name: {'local': f'data2/{name}/'} for name in ('old', 'new')}})
    Path('runs').rename('moved')
    all_done({**spec, 'folder': 'moved'})


def test_arms_may_be_sorted_removed_and_renamed(spec):
    names = {run.name for run in planned(spec)}
    for arms in (['B', 'A'], ['A'], ['B']):
        runs = all_done({**spec, 'arms': {name: spec['arms'][name] for name in arms}}, len(arms) + 1)
        assert {run.name for run in runs} <= names
    renamed = all_done({**spec, 'arms': {f'{name} again': arm for name, arm in spec['arms'].items()}})
    assert {run.name for run in renamed} == names


def test_settings_that_change_no_result_may_change(spec):
    free = {
        'device_train_microbatch_size': 1, 'python_log_level': 'debug', 'dist_timeout': 900, 'log_config': True,
        'save_num_checkpoints_to_keep': 2, 'train_loader': {'num_workers': 1, 'dataset': {'download_retry': 20}},
    }  # fmt: skip
    changed = {**spec, 'common': tiny.merge(spec['common'], free)}
    all_done(changed)
    changed['common']['precision'] = 'amp_bf16'
    problems = refused(planned(changed))
    assert 'old-A-s17' in problems[0]
    assert 'precision: fp32 -> amp_bf16' in problems[0]
    assert 'From it started: new-A-s17, new-B-s17' in problems[0]
    assert not any('delete' in problem for problem in problems)


def test_children_of_a_parent_that_was_trained_again_are_not_done(spec):
    parent, *_ = planned(spec)
    shutil.rmtree(parent.folder)
    problems = refused(planned(spec))
    assert len(problems) == 2, problems
    assert 'new-A-s17 was started from old-A-s17, which is gone and would be trained again' in problems[0]
    as_trained(parent)
    problems = refused(planned(spec))
    assert len(problems) == 2, problems
    assert all('load_path: runs/old-A-s17/latest-rank0.pt (' in problem for problem in problems)


def test_data_that_was_replaced_makes_other_runs(spec, data):
    shutil.rmtree('data/new')
    shutil.copytree(data['older'], 'data/new')
    problems = refused(planned(spec))
    assert [problem.split(':')[0] for problem in problems] == ['new-A-s17', 'new-B-s17']


def test_a_checkpoint_that_is_gone_is_said_before_anything_starts(spec):
    for path in Path('runs/old-A-s17').glob('*.pt'):
        path.unlink()
    all_done(spec)
    more = copy.deepcopy(spec)
    more['arms']['C'] = {'old': LR, 'new': {'replay': {'fraction': 0.5}}}
    (problem,) = refused(planned(more))
    assert problem.startswith('new-C-s17 starts from runs/old-A-s17/latest-rank0.pt, which is gone')


def test_a_run_that_is_extended_is_not_done(spec):
    spec['stages']['new']['scheduler'] = {'name': 'rewarm_constant', 't_warmup': '1ba'}
    spec['arms'] = {'none': {}}
    runs = planned(spec)
    for run in runs:
        as_trained(run)
    longer = copy.deepcopy(spec)
    longer['stages']['new']['max_duration'] = '12ba'
    old, new = planned(longer)
    check([old, new], 1)
    assert (is_done(old), is_done(new)) == (True, False)
    shorter = copy.deepcopy(spec)
    shorter['stages']['new']['max_duration'] = '4ba'
    assert is_done(planned(shorter)[1])


def test_a_branch_is_added_where_a_checkpoint_was_kept(spec):
    """And refused where there is none, because the trunk would have to be trained again."""
    schedule = {'name': 'infinite', 't_warmup': '2ba', 't_cooldown': '2ba', 'alpha_const': 0.5, 't_anneal': '0ba'}
    spec['common']['scheduler'] = schedule
    spec['stages']['new'] = {'max_duration': '16ba', 'branches': {'short': {'t_anneal': '4ba'}}}
    spec |= {'arms': {'only': {}}, 'folder': 'branches'}
    for run in planned(spec)[:2]:
        as_trained(run)
    spec['stages']['new']['branches']['long'] = {'t_anneal': '6ba'}
    (problem,) = refused(planned(spec))
    assert 'new-long-s17 starts from branches/new-s17/ep0-ba10-rank0.pt, which is gone' in problem
    torch.save({'state': {}}, 'branches/new-s17/ep0-ba10-rank0.pt')
    check(planned(spec), 1)
    del spec['stages']['new']['branches']['long']
    check(planned(spec), 1)
