# SPDX-License-Identifier: Apache-2.0
"""A sequence that was trained is found again, wherever it lies and in whatever order its arms stand; or is refused."""

import copy
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from rich.console import Console

from cpt_algorithms.checkpoints.save_folder import checkpoint_name, latest_link
from cpt_algorithms.files import read_json, write_json
from cpt_algorithms.sequence.check import check
from cpt_algorithms.sequence.run import is_done, run_all
from cpt_algorithms.sequence.spec import SequenceSpec
from cpt_algorithms.sequence.sweep import expand_trials
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


@pytest.fixture
def branched(spec):
    """A sequence whose last stage is a trunk with an anneal and a merge, planned."""
    schedule = {'name': 'infinite', 't_warmup': '2ba', 't_cooldown': '2ba', 'alpha_const': 0.5, 't_anneal': '0ba'}
    branches = {'short': {'t_anneal': '4ba'}, 'merge': {'merge': {'last': 2, 'every': '2ba'}}}
    spec['common']['scheduler'] = schedule
    spec['stages']['new'] = {'max_duration': '16ba', 'branches': branches}
    spec |= {'arms': {'only': {}}, 'folder': 'branches'}
    return spec


def trained(spec):
    """Its runs, all finished, and the trunk with the checkpoints of its branches."""
    runs = planned(spec)
    as_trained(runs[0])
    as_trained(runs[1])
    for batch in (12, 14):
        torch.save({'state': {}}, runs[1].folder / checkpoint_name(batch, sharded=False))
    for run in runs[2:]:
        as_trained(run)
    check(planned(spec), 1)
    return runs


def test_what_started_from_a_trunk_that_is_gone_is_not_done_whatever_was_cleaned_up(branched):
    _, trunk, *others = trained(branched)
    assert {run.name for run in others} == {'new-short-s17', 'new-merge-s17'}
    for run in others:  # a merge has none, and of others they may be removed
        for path in run.folder.glob('*.pt'):
            path.unlink()
    check(planned(branched), 1)
    shutil.rmtree(trunk.folder)
    problems = refused(planned(branched))
    assert len(problems) == 2, problems
    assert all(' was started from new-s17, which is gone and would be trained again' in each for each in problems)


def test_what_started_from_the_end_of_a_trunk_that_would_be_trained_on_is_not_done(branched):
    del branched['stages']['new']['branches']['merge']  # the trunk ends where the other branch begins
    for run in planned(branched):
        as_trained(run)
    longer = copy.deepcopy(branched)
    longer['stages']['new']['max_duration'] = '18ba'
    (problem,) = refused(planned(longer))
    assert problem.startswith('new-short-s17 was started from new-s17, which would be trained on, to another end')
    branched['stages']['old']['max_duration'] = '12ba'
    (problem,) = refused(planned(branched))
    assert problem.startswith('new-s17 was started from old-s17, which would be trained on, to another end')
    assert problem.endswith('From it started: new-short-s17')


@pytest.mark.parametrize('gone', ['latest-rank0.pt', 'ep0-ba14-rank0.pt'])
def test_a_checkpoint_that_a_merge_averages_and_that_is_gone_is_said(branched, gone):
    runs = trained(branched)
    (merge,) = [run for run in runs if run.stage.merge]
    (runs[1].folder / gone).unlink()
    check(planned(branched), 1)
    shutil.rmtree(merge.folder)
    (problem,) = refused(planned(branched))
    assert problem.startswith(f'new-merge-s17 starts from branches/new-s17/{gone}, which is gone')


def test_a_child_is_asked_again_when_its_parent_has_ended(spec):
    """It is done, and so is its parent but for lm-eval; then that is another."""
    spec['arms'] = {'B': {'old': LR}}
    parent, child = planned(spec)
    done = read_json(parent.folder / 'done.json')
    (parent.folder / 'done.json').unlink()
    launched = []

    def start(recipe, folder):
        launched.append(folder.name)
        (folder / 'log.txt').touch()
        if folder.name == parent.name:
            torch.save({'state': {'model': {'weight': torch.rand(9)}}}, folder / 'latest-rank0.pt')
            write_json(folder / 'done.json', done)
        return SimpleNamespace(name='here', poll=lambda: int(folder.name == child.name))

    assert run_all([parent, child], start, 1, Path(), Console()) == [child.name]
    assert launched == [parent.name, child.name], 'which refuses to go on'


def test_a_run_whose_folder_was_renamed_is_the_same_and_goes_on(spec):
    Path('runs/new-B-s17').rename('runs/put aside')
    runs = all_done(spec)
    assert [run.name for run in runs] == ['old-A-s17', 'new-A-s17', 'put aside']
    Path('runs/put aside/done.json').unlink()
    check(planned(spec), 1)


def test_a_trial_with_another_parameter_that_is_as_it_was_is_found_again(spec):
    """What a sweep has trained is not trained again under a longer name."""
    sequence = SequenceSpec.from_yaml({**spec, 'arms': None})
    trained = expand_trials(sequence, [['new.replay.fraction=0.25'], ['new.replay.fraction=0.5']])
    for run in trained:
        if not run.folder.exists():
            as_trained(run)
    lr = spec['common']['optimizer']['lr']
    trials = [[f'new.replay.fraction={share}', f'new.optimizer.lr={lr}'] for share in (0.25, 0.5)]
    again = expand_trials(sequence, [*trials, ['new.replay.fraction=0.25', f'new.optimizer.lr={2 * lr}']])
    assert [run.name for run in again if is_done(run)] == [run.name for run in trained]
    assert len(again) == len(trained) + 1
