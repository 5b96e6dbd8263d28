# SPDX-License-Identifier: Apache-2.0
"""What a kill in the middle of saving or exporting leaves behind is mended, and nothing half-written is taken for whole."""

import json
import re
import shutil
import sys

import continue_pretraining
import pytest
import recorder
import tiny
from huggingface_hub import ModelCard

from cpt_algorithms.checkpoints.exports import exports
from cpt_algorithms.stage.stage import Stage

AVERAGES = {'ema': {'half_life': '2ba'}, 'lawa': {'k': 2, 'interval': '2ba'}}


@pytest.fixture(scope='module')
def original(data, tmp_path_factory):
    """A run of 8 batches with every other checkpoint kept."""
    folder = tmp_path_factory.mktemp('original')
    printed = tiny.recipe(tiny.config(folder, data, 'run', save_num_checkpoints_to_keep=-1, callbacks=AVERAGES), folder)
    assert 'Warning' not in printed, 'of other packages, that nobody can do anything about'
    return folder


@pytest.fixture
def finished(original, data, tmp_path):
    """A copy of it: its YAML, its folder, what it recorded."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True, symlinks=True)
    cfg = tiny.config(tmp_path, data, 'run', save_num_checkpoints_to_keep=-1, callbacks=AVERAGES)
    return cfg, tmp_path / 'run', (tmp_path / 'run.jsonl.rank0').read_text()


def state_of(case, folder):
    """As if killed: what is there, byte by byte."""
    (folder / 'done.json').unlink()
    latest, newest = folder / 'latest-rank0.pt', folder / 'ep0-ba8-rank0.pt'
    whole = newest.read_bytes()
    if case == 'while writing the first checkpoint':
        for batch in (4, 6, 8):
            (folder / f'ep0-ba{batch}-rank0.pt').unlink()
        latest.unlink()
        (folder / 'ep0-ba2-rank0.pt').write_bytes(whole[: len(whole) // 2])
    elif case == 'while writing a later checkpoint':
        newest.write_bytes(whole[: len(whole) // 2])
        latest.unlink()
        latest.symlink_to('ep0-ba6-rank0.pt')
    elif case == 'between a checkpoint and its link':
        latest.unlink()
    elif case == 'before the link was replaced':
        latest.unlink()
        latest.symlink_to('ep0-ba6-rank0.pt')
    elif case == 'during the export':
        models = folder / 'huggingface'
        (models / 'ba8').rename(models / '.ba8')
        (models / '.ba8' / 'model.safetensors').unlink()
        for average in ('ema_2ba', 'lawa'):
            shutil.rmtree(models / f'ba8-{average}')
        assert not exports(folder), 'nothing takes it for a model'
    elif case == 'while an export is replaced':
        (folder / 'huggingface' / 'ba8').rename(folder / 'huggingface' / '.ba8.replaced')


@pytest.mark.long
def test_each_export_has_a_card_and_a_recipe(original):
    folder = original / 'run'
    weights = {
        'ba8': 'as they were trained',
        **{f'ba8-{name}': f'their average `{name}`' for name in ('ema_2ba', 'lawa')},
    }
    for name, said in weights.items():
        card = ModelCard.load(folder / 'huggingface' / name / 'README.md')
        assert f'| weights | {said} |' in card.text and card.data.to_dict()['library_name'] == 'transformers'
        recipe = Stage.read(str(folder / 'huggingface' / name / 'recipe.yaml'))
        assert (recipe.save_folder, recipe.batches) == (str(folder), 8)


@pytest.mark.parametrize(
    'case',
    [
        'while writing the first checkpoint',
        'while writing a later checkpoint',
        'between a checkpoint and its link',
        'before the link was replaced',
        'during the export',
        'while an export is replaced',
    ],
)
@pytest.mark.long
def test_killed_while_saving(case, finished, tmp_path):
    cfg, folder, recorded = finished
    exported = {path.parent.name: path.read_bytes() for path in folder.glob('huggingface/*/model.safetensors')}
    files = sorted(folder.glob('huggingface/**/*'))
    assert sorted(exported) == ['ba8', 'ba8-ema_2ba', 'ba8-lawa']
    state_of(case, folder)
    tiny.recipe_here(cfg, tmp_path)
    lines = recorder.read(tmp_path / 'run.jsonl')  # refuses a batch that was trained again and differently
    assert sorted(lines) == list(range(8))
    assert (tmp_path / 'run.jsonl.rank0').read_text().startswith(recorded)
    assert json.loads((folder / 'done.json').read_text())['batch'] == 8
    for name, weights in exported.items():
        assert (folder / 'huggingface' / name / 'model.safetensors').read_bytes() == weights, 'averages too'
    assert sorted(folder.glob('huggingface/**/*')) == files, 'nothing is left behind, and nothing more is made'
    assert (folder / 'latest-rank0.pt').resolve().name == 'ep0-ba8-rank0.pt'


def test_a_finished_stage_is_left_alone_and_its_lineage_stays(finished, tmp_path, capsys):
    cfg, folder, recorded = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob('*')}
    tiny.recipe_here(cfg, tmp_path)
    assert 'finished already, at batch 8' in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob('*')} == before
    assert (tmp_path / 'run.jsonl.rank0').read_text() == recorded
    lineage = json.loads((folder / 'stage.json').read_text())
    assert lineage['run_name'] == 'run'
    assert 'only_hf_checkpoint' not in lineage['config']
    assert lineage['versions']['mosaicml']


def test_an_extended_stage_says_so(data, tmp_path):
    schedule = {'name': 'infinite', 't_warmup': '1ba', 't_cooldown': '2ba', 'alpha_const': 0.5, 't_anneal': '0ba'}
    cfg = tiny.config(
        tmp_path, data, 'run', max_duration='4ba', scheduler=schedule, eval_loader=[tiny.eval_loader('new', data['new'])],
        callbacks={'final_loss': {'window': '2ba', 'interval': '1ba'}},
    )  # fmt: skip

    def written(name):
        return json.loads((tmp_path / 'run' / f'{name}.json').read_text())

    tiny.recipe_here(cfg, tmp_path)
    first = written('stage')
    assert written('done')['batch'] == 4
    assert written('losses')['final']['new']['count'] == 2
    tiny.recipe_here({**cfg, 'max_duration': '8ba'}, tmp_path)
    assert written('done')['batch'] == 8
    assert written('stage')['config']['max_duration'] == '8ba'
    assert written('stage')['wandb_id'] == first['wandb_id']
    rows = written('losses')['losses']['new']
    assert [row[0] for row in rows] == [3, 4, 7, 8]
    assert written('losses')['final']['new']['mean'] == pytest.approx((rows[2][2] + rows[3][2]) / 2)


def test_bad_files_are_named(data, tmp_path, monkeypatch):
    cfg = tiny.config(tmp_path, data, 'bad', optimizer={'name': '${variables.nothing}'})
    tiny.save(cfg, tmp_path / 'bad.yaml')
    (tmp_path / 'text.yaml').write_text("'5'")  # OmegaConf takes it for a YAML of its own
    (tmp_path / 'list.yaml').write_text('- a')
    (tmp_path / 'syntax.yaml').write_text('a: [')
    for path in ('nowhere.yaml', *(str(tmp_path / f'{name}.yaml') for name in ('bad', 'text', 'list', 'syntax'))):
        monkeypatch.setattr(sys, 'argv', ['continue_pretraining.py', path])
        with pytest.raises(SystemExit, match=re.escape(path)):
            continue_pretraining.main()
    good = tiny.save(tiny.config(tmp_path, data, 'good'), tmp_path / 'good.yaml')
    monkeypatch.setattr(sys, 'argv', ['continue_pretraining.py', str(good), 'seed=['])
    with pytest.raises(SystemExit, match=r'good\.yaml'):
        continue_pretraining.main()


def test_a_run_that_was_renamed_and_moved_goes_on(finished, tmp_path, capsys):
    """By the recipe and by stage_start alone; and as somebody else's, with other settings, it is refused."""
    cfg, folder, recorded = finished
    for case in ('before the link was replaced', 'between a checkpoint and its link'):
        state_of(case, folder)
        if case.startswith('before'):
            (folder / 'ep0-ba8-rank0.pt').unlink()
        name = f'{folder.name}-2'
        folder = folder.rename(folder.with_name(name))
        cfg |= {'run_name': name, 'save_folder': f'{tmp_path}/{{run_name}}'}
        tiny.recipe_here(cfg, tmp_path)
        assert 'finished already' not in capsys.readouterr().out
    tiny.recipe_here({**cfg, 'run_name': 'third', 'save_folder': str(folder)}, tmp_path)
    assert 'finished already, at batch 8' in capsys.readouterr().out
    assert (tmp_path / 'run.jsonl.rank0').read_text().startswith(recorded)
    assert sorted(recorder.read(tmp_path / 'run.jsonl')) == list(range(8))
    with pytest.raises(SystemExit, match="holds the checkpoints of run 'run-2-2', and run_name is 'third', with other"):
        tiny.recipe_here({**cfg, 'run_name': 'third', 'save_folder': str(folder), 'seed': 18}, tmp_path)
