# SPDX-License-Identifier: Apache-2.0
"""When a stage is done, and what it has read, is what its checkpoint says, and no arithmetic on the YAML."""

import json
import random
from pathlib import Path

import pytest
import recorder
import tiny
from streaming import MDSWriter

from cpt_algorithms.stage.restart_checks import write_record
from cpt_algorithms.stage.stage import Stage


def done(cfg):
    return json.loads((Path(cfg['save_folder']) / 'done.json').read_text())


@pytest.fixture(scope='module')
def text(tmp_path_factory):
    """400 rows of text of 4 to 8 letters, as stock loaders tokenise while training."""
    folder, letters = tmp_path_factory.mktemp('text'), random.Random(1)
    with MDSWriter(out=str(folder / 'train'), columns={'text': 'str'}, hashes=['xxh64']) as writer:
        for _ in range(400):
            writer.write({'text': ''.join(letters.choice('abcdefgh') for _ in range(letters.randint(4, 8)))})
    return folder


def of_text(tmp_path, data, text, run_name, **over):
    base = {
        'scheduler': {'name': 'rewarm_cosine', 't_warmup': '0.1dur'},
        'train_loader': {'dataset': {'new': {'local': str(text)}}},
    }
    return tiny.config(tmp_path, data, run_name, **tiny.merge(base, over))


def test_rows_of_text_are_trained_to_the_last_token(data, text, tmp_path):
    cfg = of_text(tmp_path, data, text, 'run', max_duration='1024tok', save_interval='4ba')
    tiny.recipe_here(cfg, tmp_path)
    straight, lines = done(cfg), recorder.read(tmp_path / 'run.jsonl')
    assert straight['time']['tok'] >= 1024
    assert straight['batch'] > 1024 / tiny.TOKENS_PER_BATCH, 'rows are not full'
    latest = tiny.killed_after(cfg, straight['batch'] - 5)
    assert latest >= 1024 / tiny.TOKENS_PER_BATCH, 'where full rows would have been enough'
    tiny.recipe_here(cfg, tmp_path)
    assert done(cfg) == straight
    assert recorder.read(tmp_path / 'run.jsonl') == lines, 'the recorder refuses other batches'
    assert [path.name for path in (tmp_path / 'run' / 'huggingface').iterdir()] == [f'ba{straight["batch"]}']


def test_rows_of_text_are_not_read_more_often_than_they_may(data, text, tmp_path):
    cfg = of_text(tmp_path, data, text, 'run', max_duration='3000tok', save_interval='10ba')
    with pytest.raises(SystemExit, match='after batch 50, too little data: .* max_passes is 1'):
        tiny.recipe_here(cfg, tmp_path)
    assert not (tmp_path / 'run' / 'done.json').exists()


def test_a_run_of_epochs_goes_on_to_its_last(data, tmp_path):
    over = {'scheduler': {'name': 'rewarm_cosine', 't_warmup': '2ba'}, 'train_loader': {'dataset': {'max_passes': 2}}}
    large = {'global_train_batch_size': 40, 'device_train_microbatch_size': 40}
    cfg = tiny.config(tmp_path, data, 'run', max_duration='2ep', save_interval='5ba', **large, **over)
    tiny.recipe_here(cfg, tmp_path)
    assert done(cfg)['time'] == {'ep': 2, 'ba': 20, 'sp': 800, 'tok': 12800}
    lines = recorder.read(tmp_path / 'run.jsonl')
    assert tiny.killed_after(cfg, 12) == 10
    tiny.recipe_here(cfg, tmp_path)
    assert done(cfg)['time']['ep'] == 2
    assert recorder.read(tmp_path / 'run.jsonl') == lines


@pytest.mark.parametrize('scheduler', ['rewarm_cosine', 'infinite'])
def test_a_run_that_was_stopped_early_is_done(scheduler, data, tmp_path, capsys):
    times = {'rewarm_cosine': {}, 'infinite': {'t_cooldown': '2ba', 't_anneal': '0ba', 'alpha_const': 0.5}}
    stopper = {'monitor': 'LanguageCrossEntropy', 'dataloader_label': 'eval/new', 'patience': '1ba', 'comp': 'greater'}
    cfg = tiny.config(
        tmp_path, data, 'run', eval_interval='1ba', eval_loader=tiny.eval_loader('new', data['new']),
        scheduler={'name': scheduler, 't_warmup': '2ba', **times[scheduler]}, callbacks={'early_stopper': stopper},
    )  # fmt: skip
    tiny.recipe_here(cfg, tmp_path)
    batch = done(cfg)['batch']
    assert batch < 8
    capsys.readouterr()
    tiny.recipe_here(cfg, tmp_path)
    assert f'finished already, at batch {batch}' in capsys.readouterr().out
    assert len(recorder.read(tmp_path / 'run.jsonl')) == batch


STOPPER = {'monitor': 'LanguageCrossEntropy', 'dataloader_label': 'eval/new', 'comp': 'greater'}


def stopped_early(tmp_path, data, **over):
    """The loss falls, so the first is the best: after a patience of 3 batches the run is over at batch 5."""
    stopper = {'early_stopper': {**STOPPER, 'patience': '3ba'}}
    loaders = {'eval_interval': '1ba', 'eval_loader': tiny.eval_loader('new', data['new'])}
    return tiny.config(tmp_path, data, 'run', callbacks=stopper, **loaders, **over)


def test_patience_goes_on_where_a_kill_found_it(data, tmp_path):
    cfg = stopped_early(tmp_path, data)
    tiny.recipe_here(cfg, tmp_path)
    straight, lines = done(cfg), recorder.read(tmp_path / 'run.jsonl')
    assert straight['batch'] == 5
    assert tiny.killed_after(cfg, 4) == 4
    tiny.recipe_here(cfg, tmp_path)
    assert done(cfg) == straight
    assert recorder.read(tmp_path / 'run.jsonl') == lines
    assert [path.name for path in (tmp_path / 'run' / 'huggingface').iterdir()] == ['ba5']


def test_a_run_that_was_stopped_and_killed_before_its_export_is_exported(data, tmp_path):
    schedule = {'name': 'infinite', 't_warmup': '1ba', 't_cooldown': '2ba', 'alpha_const': 0.5, 't_anneal': '0ba'}
    cfg = stopped_early(tmp_path, data, scheduler=schedule)
    tiny.recipe_here(cfg, tmp_path)
    straight, trained = done(cfg), (tmp_path / 'run.jsonl.rank0').read_text()
    assert tiny.killed_after(cfg, 5) == 5
    tiny.recipe_here(cfg, tmp_path)
    assert (tmp_path / 'run.jsonl.rank0').read_text() == trained, 'nothing more'
    assert done(cfg) == straight
    assert [path.name for path in (tmp_path / 'run' / 'huggingface').iterdir()] == ['ba5']
    # it was over at the end that it had, and not at another; its patience is over at once
    tiny.recipe_here({**cfg, 'max_duration': '16ba'}, tmp_path)
    assert done(cfg)['batch'] == 6


def test_what_begins_anew_as_another_run_is_no_part_of_the_old_ones_curve(data, tmp_path):
    """Its folder has no checkpoint yet; under the same identity W&B would drop what it has logged before."""
    stage = Stage.from_yaml(tiny.config(tmp_path, data, 'run'))
    first = write_record(stage).wandb_id
    assert write_record(stage).wandb_id == first
    other = write_record(stage.but(optimizer={**stage.given['optimizer'], 'lr': 2e-3})).wandb_id
    assert other != first
    assert write_record(stage, resumes=True).wandb_id == other


FROZEN = {'optimizer': {'disable_grad': ['transformer.wte']}}


@pytest.mark.parametrize(
    'change', [{'optimizer': {'name': 'decoupled_lionw'}}, {'seed': 18}, {'model': {'resid_pdrop': 0.1}}, FROZEN]
)
def test_a_restart_of_another_run_is_refused_and_leaves_all_as_it_was(change, data, tmp_path):
    cfg = tiny.config(tmp_path, data, 'run', scheduler={'name': 'cosine_with_warmup', 't_warmup': '2ba'})
    tiny.recipe_here(cfg, tmp_path)
    tiny.killed_after(cfg, 5)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / 'run').rglob('*')}
    with pytest.raises(SystemExit, match='holds a run with other settings .* -> '):
        tiny.recipe_here(tiny.merge(cfg, change), tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / 'run').rglob('*')} == before
