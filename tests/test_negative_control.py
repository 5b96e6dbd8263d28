# SPDX-License-Identifier: Apache-2.0
"""Would the judge of kills notice? A run goes on with one part of its state left out, and it must name that part."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
from judge_of_kills import lines_of, objections
from recorder import LeaveOut

BATCHES, KILLED_AFTER = 8, 5  # of which the checkpoint after batch 4 is the latest

# What is left out, and all that must differ at the first batch that does.
LEFT_OUT = {
    None: [],
    'learning rate': [],  # which follows from the time
    'random numbers': ['random numbers', 'loss'],
    'moments': ['moments', "Adam's steps"],
    'rows': ['rows', 'loss'],
    'averages': ['averages'],
}


@pytest.fixture(scope='module')
def straight(data, tmp_path_factory):
    """The YAML of a stage with all that a checkpoint can hold, its finished folder aside, and its lines."""
    folder = tmp_path_factory.mktemp('control')
    parent = tiny.config(folder, data, 'parent', max_duration='2ba', scheduler={'t_warmup': '1ba'})
    tiny.recipe_here(parent, folder)
    replay = {'fraction': 0.25, 'streams': {'old': {'local': str(data['old']), 'split': 'train'}}}
    callbacks = {
        'leave_out': {}, 'recorder': {'path': str(folder / 'run.jsonl'), 'digests': True},
        'ema': {'half_life': '4ba'}, 'lawa': {'k': 3, 'interval': '1ba'},
        'forgetting': {'new': ['new'], 'old': ['old']},
    }  # fmt: skip
    cfg = tiny.config(
        folder, data, 'run', load_path=str(folder / 'parent' / 'ep0-ba2-rank0.pt'), eval_first=True,
        max_duration=f'{BATCHES}ba', save_num_checkpoints_to_keep=-1, model={'resid_pdrop': 0.1, 'emb_pdrop': 0.1},
        eval_loader=[tiny.eval_loader(label, data[label]) for label in ('old', 'new')],
        callbacks={'stage_start': {}}, train_loader={'dataset': {'replay': replay}},
    )  # fmt: skip
    cfg['callbacks'] = {'stage_start': {}, **callbacks}  # in this order
    tiny.recipe_here(cfg, folder)
    shutil.copytree(folder / 'run', folder / 'finished', symlinks=True)
    return cfg, folder, lines_of(folder / 'run.jsonl')


@pytest.fixture(scope='module')
def of_stock_schedule(straight):
    """The same under Composer's schedule, whose learning rate comes from the checkpoint."""
    cfg, folder, _ = straight
    folder = folder / 'stock'
    shutil.copytree(folder.parent, folder, ignore=shutil.ignore_patterns('run*', 'finished', 'stock'))
    cfg = tiny.merge(
        cfg, {'save_folder': str(folder / 'run'), 'scheduler': {'name': 'cosine_with_warmup', 't_warmup': '4ba'}}
    )
    cfg['callbacks'] = {**cfg['callbacks'], 'recorder': {'path': str(folder / 'run.jsonl'), 'digests': True}}
    tiny.recipe_here(cfg, folder)
    shutil.copytree(folder / 'run', folder / 'finished', symlinks=True)
    return cfg, folder, lines_of(folder / 'run.jsonl')


def killed(cfg, folder, lines):
    """Put the run back to where a kill left it."""
    shutil.rmtree(folder / 'run')
    shutil.copytree(folder / 'finished', folder / 'run', symlinks=True)
    assert tiny.killed_after(cfg, KILLED_AFTER) == KILLED_AFTER - 1
    (folder / 'run.jsonl.rank0').write_text(''.join(json.dumps(line) + '\n' for line in lines[:KILLED_AFTER]))


@pytest.mark.parametrize('part', LEFT_OUT)
def test_the_judge_names_what_was_left_out(part, straight, monkeypatch):
    cfg, folder, lines = straight
    killed(cfg, folder, lines)
    monkeypatch.setattr(LeaveOut, 'PART', part)
    tiny.recipe_here(cfg, folder)
    found = lines_of(folder / 'run.jsonl')
    assert len(found) == BATCHES + 1, 'one batch was trained again'
    assert objections(found, lines) == LEFT_OUT[part]


def test_the_judge_names_a_learning_rate_that_was_left_out(of_stock_schedule, monkeypatch):
    cfg, folder, lines = of_stock_schedule
    killed(cfg, folder, lines)
    monkeypatch.setattr(LeaveOut, 'PART', 'learning rate')
    tiny.recipe_here(cfg, folder)
    assert objections(lines_of(folder / 'run.jsonl'), lines) == ['learning rate']


def test_a_run_killed_before_its_first_checkpoint_draws_what_it_would_have_drawn(straight):
    """Its parent has been evaluated, and is not again."""
    cfg, folder, lines = straight
    killed(cfg, folder, lines)
    for path in [*(folder / 'run').glob('ep0-*'), *(folder / 'run').glob('latest*')]:
        path.unlink()
    tiny.recipe_here(cfg, folder)
    found = lines_of(folder / 'run.jsonl')
    assert len(found) == KILLED_AFTER + BATCHES
    assert not objections(found, lines)


def test_the_judge_misses_batches(straight):
    *_, lines = straight
    assert objections(lines[:-1], lines) == [f'batch {BATCHES - 1} is missing']


def test_the_parents_losses_lie_in_two_places(straight, monkeypatch):
    """Left out of the checkpoint they come from forgetting.json; without that, the run is not gone on with."""
    cfg, folder, lines = straight
    before = json.loads((folder / 'finished' / 'forgetting.json').read_text())
    killed(cfg, folder, lines)
    monkeypatch.setattr(LeaveOut, 'PART', "parent's losses")
    tiny.recipe_here(cfg, folder)
    assert json.loads((Path(cfg['save_folder']) / 'forgetting.json').read_text()) == before
    killed(cfg, folder, lines)
    (folder / 'run' / 'forgetting.json').unlink()
    with pytest.raises(ValueError, match='the parent was not evaluated'):
        tiny.recipe_here(cfg, folder)
