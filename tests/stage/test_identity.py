# SPDX-License-Identifier: Apache-2.0
"""What makes two runs the same: all of the YAML less the card's list, and what lies behind its paths."""

import copy
import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from cpt_algorithms.files import write_json
from cpt_algorithms.stage import identity
from cpt_algorithms.stage.identity import MAY_DIFFER, OBSERVERS, changes, contents_of
from cpt_algorithms.stage.record import StageRecord
from cpt_algorithms.stage.restart_checks import restart_problem
from cpt_algorithms.stage.stage import Stage

CARD = tiny.ROOT / 'cpt_algorithms' / 'stage' / 'README.md'


def record_of(stage):
    return StageRecord.model_validate(
        {'run_name': stage.run_name, 'config': stage.to_train_yaml(), 'contents': contents_of(stage)}
    )


def listed():
    """The card's list: keys in each row."""
    table = CARD.read_text().partition('## What makes two runs the same')[2].partition('\n* ')[0]
    rows = re.findall(r'^\| (.+?) \| (.+) \|$', table, re.MULTILINE)[1:]
    return {name: set(re.findall(r'`([\w.]+)`', keys)) for name, keys in rows}


def test_the_card_says_the_list():
    rows = listed()
    top = {
        key
        for name in ('names and places', 'saving, logging', 'evaluation', 'machines', 'loading')
        for key in rows[name]
    }
    elsewhere = {
        'fsdp_config',
        'mixed_precision',
        'stage_start.trust_checkpoint',
        'stage_start.model_changes',
        'max_passes',
        'model',
    }
    assert top - elsewhere == MAY_DIFFER | set(identity._OF_THE_MACHINE)
    assert rows['callbacks that observe'] == OBSERVERS
    assert rows['workers of `train_loader`'] == identity._WORKERS
    assert rows['downloads'] == identity._DOWNLOADS


def leaves(section, path=()):
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)


def other(value):
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1 if value >= 1 else value / 2 + 1e-3
    if isinstance(value, list):
        return [*value[1:], *value[:1]] if len(value) > 1 else [*value, *value]
    time = re.fullmatch(r'(\d+)(ba|ep|tok|sp)', str(value))
    return f'{int(time[1]) + 1}{time[2]}' if time else f'{value}x'


def may_differ(path):
    where, key = path[0], path[-1]
    return (
        where in MAY_DIFFER
        or (where == 'callbacks' and path[1] in OBSERVERS | {'recorder'})
        or (where == 'train_loader' and len(path) == 2 and key in identity._WORKERS)
        or (where == 'train_loader' and key in identity._DOWNLOADS)
        or (where == 'fsdp_config' and key != 'mixed_precision')
        or path[-1] in identity._OF_THE_MACHINE
        or path == ('tokenizer', 'name')
        or path[1:] in {('stage_start', 'trust_checkpoint'), ('stage_start', 'model_changes')}
    )


@pytest.mark.parametrize('name', ['continue_pretraining/tiny_cpu.yaml'])
def test_every_key_of_a_stage_is_compared_or_on_the_list(name):
    """Nothing lies behind these paths, so that a path that was changed cannot be compared and counts as another."""
    base = OmegaConf.to_container(OmegaConf.load(tiny.ROOT / 'yamls' / name), resolve=True)
    base |= {
        'variables': {},
        'loggers': {'tensorboard': {'log_dir': 'x'}},
        'algorithms': {'gradient_clipping': {'clipping_threshold': 1.0}},
    }
    base['callbacks'] |= {'ema': {'half_life': ['4ba', '8ba']}, 'speed_monitor': {'window_size': 3}}
    base['fsdp_config'] = {'sharding_strategy': 'FULL_SHARD', 'mixed_precision': 'PURE'}
    record, seen = record_of(Stage.from_yaml(base)), 0
    for path in leaves(base):
        changed = copy.deepcopy(base)
        section = changed
        for key in path[:-1]:
            section = section[key]
        section[path[-1]] = other(section[path[-1]])
        try:
            stage = Stage.from_yaml(changed)
            found = changes(record, stage)
        except ValueError:  # no such value
            continue
        seen += 1
        place = path[-1] in ('local', 'remote', 'split') or path in {('load_path',), ('tokenizer', 'name')}
        if place:
            assert found, path
        elif may_differ(path):
            assert not found, (path, found)
        else:
            assert any(str(path[-1]) in line or path[-2] in line for line in found), (path, found)
    assert seen > 30


@pytest.fixture
def stage(data, tmp_path):
    """A stage with a parent, and replay."""
    for name in ('new', 'old', 'tokenizer'):
        shutil.copytree(data[name], tmp_path / name)
    torch.save({'state': {'model': {'weight': torch.ones(3)}}}, tmp_path / 'parent.pt')
    here = {name: tmp_path / name for name in ('new', 'old', 'tokenizer')}
    streams = {'old': {'local': str(here['old']), 'split': 'train'}}
    return tiny.config(
        tmp_path, here, 'run', load_path=str(tmp_path / 'parent.pt'),
        train_loader={'dataset': {'replay': {'fraction': 0.25, 'streams': streams}}},
    )  # fmt: skip


def moved(stage, old, new):
    return Stage.from_yaml(
        OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(stage)).replace(old, new)))
    )


def test_a_path_is_what_lies_behind_it(stage, tmp_path, monkeypatch):
    record = record_of(Stage.from_yaml(stage))
    assert sorted(record.contents) == [
        'load_path', 'tokenizer.name', 'train_loader.dataset.new.new', 'train_loader.dataset.replay.streams.old',
    ]  # fmt: skip
    elsewhere = tmp_path.parent / f'{tmp_path.name}-elsewhere'
    shutil.copytree(tmp_path, elsewhere)
    assert changes(record, moved(stage, str(tmp_path), str(elsewhere))) == []
    monkeypatch.chdir(tmp_path)
    assert changes(record, moved(stage, f'{tmp_path}/', './')) == []
    for name in ('parent.pt', 'old/train/index.json', 'tokenizer/tokenizer.json'):
        kept = (tmp_path / name).read_bytes()
        if name == 'parent.pt':
            torch.save({'state': {'model': {'weight': torch.ones(3) * 2}}}, tmp_path / name)
        else:
            (tmp_path / name).write_bytes(re.sub(rb'("samples": ?|"!": ?)', rb'\g<1>1', kept, count=1))
        assert len(changes(record, Stage.from_yaml(stage))) == 1, name
        whole = tmp_path / name.split('/')[0]
        whole.rename(tmp_path / 'gone')
        assert not changes(record, Stage.from_yaml(stage)), 'what is gone cannot be compared'
        assert len(changes(record, moved(stage, str(whole), 'other'))) == 1, 'and is another elsewhere'
        (tmp_path / 'gone').rename(whole)
        (tmp_path / name).write_bytes(kept)


def test_what_is_moved_with_the_run_is_the_same_though_it_is_gone(stage, tmp_path):
    """A finished run whose parent's checkpoints were deleted, moved together with it."""
    record = record_of(Stage.from_yaml(stage))
    (tmp_path / 'parent.pt').unlink()
    elsewhere = tmp_path.parent / f'{tmp_path.name}-elsewhere'
    shutil.copytree(tmp_path, elsewhere)
    assert changes(record, moved(stage, str(tmp_path), str(elsewhere))) == []
    assert changes(record, moved(stage, 'parent.pt', 'other.pt')) != []


@pytest.mark.parametrize('place', ['runs/base/ep1-ba20', 'runs/base/ep1-ba20/'])
def test_a_parent_as_the_shell_completes_its_name(place, data, tmp_path):
    assert Stage.from_yaml(tiny.config(tmp_path, data, 'run', load_path=place)).begins == ('runs/base', 20)


KEEPS_LOSSES = {
    'final_loss': {},
    'early_stopper': {'monitor': 'LanguagePerplexity', 'dataloader_label': 'eval/old'},
}


@pytest.mark.parametrize('keeps', ['', *KEEPS_LOSSES])
def test_a_run_that_goes_on_is_judged_as_before(keeps, data, tmp_path):
    shutil.copytree(data['old'], tmp_path / 'old')
    cfg = tiny.config(
        tmp_path, data, 'run', eval_loader=[tiny.eval_loader('old', tmp_path / 'old')], eval_interval='2ba',
        eval_subset_num_batches=2, callbacks={keeps: KEEPS_LOSSES[keeps]} if keeps else {},
    )  # fmt: skip
    stage = Stage.from_yaml(cfg)
    record, folder = record_of(stage), Path(stage.folder)
    write_json(folder / 'stage.json', dict(record.given))
    torch.save({}, folder / 'ep0-ba4-rank0.pt')
    others = {
        'eval_subset_num_batches': ({'eval_subset_num_batches': 4}, 'eval_subset_num_batches: 2 -> 4'),
        'device_eval_batch_size': ({'device_eval_batch_size': 2}, 'device_eval_batch_size: '),
        'an evaluator more': ({'eval_loader': [*cfg['eval_loader'], tiny.eval_loader('new', data['new'])]}, 'eval_loader.new: '),
        'other data': ({'eval_loader': [tiny.eval_loader('old', data['new'])]}, 'eval_loader.old.dataset: '),
        'eval_interval': ({'eval_interval': '1ba'}, 'eval_interval: 2ba -> 1ba' if keeps == 'early_stopper' else ''),
        'the same elsewhere': ({'eval_loader': [tiny.eval_loader('old', data['old'])]}, ''),
        'a default': ({'eval_loader': [{**cfg['eval_loader'][0], 'dataset': {**cfg['eval_loader'][0]['dataset'], 'shuffle': False}}]}, ''),
        'no losses': ({'callbacks': {key: each for key, each in cfg['callbacks'].items() if key != 'final_loss'}}, ''),
        'other workers': ({'eval_loader': [{**cfg['eval_loader'][0], 'num_workers': 1}]}, ''),
    }  # fmt: skip
    for change, said in others.values():
        other = Stage.from_yaml({**cfg, **change})
        assert changes(record, other) == [], 'a run that is done'
        found = restart_problem(other) or ''
        assert (said in found) if keeps and said else not found, found
        assert restart_problem(stage) is None


SPELLED = {
    ('scheduler', 't_warmup'): ['4ba', '4BA', '04ba', '4e0ba'],
    ('max_duration',): ['8ba', ' 8ba', '8.0ba'],
    ('seed',): [17],
    ('accumulate_train_batch_on_tokens',): [True, None],
    ('algorithms',): [None, {}],
    ('spin_dataloaders',): [True, None],
    ('callbacks', 'stage_start'): [None, {}, {'optimizer_state': 'reset'}],
    ('optimizer', 'eps'): [None, 1e-8],
    ('scheduler', 't_max'): [None, '1dur', '1.0dur'],
    ('train_loader', 'drop_last'): [True],
    ('model', 'resid_pdrop'): [None, 0.0],
    ('model', 'init_config'): [None, {'name': 'kaiming_normal_'}],
    ('model', 'attn_config', 'softmax_scale'): [None],
}


@settings(max_examples=40, deadline=None)
@given(st.fixed_dictionaries({path: st.sampled_from(values) for path, values in SPELLED.items()}), st.randoms())
def test_spelling_and_order_mean_nothing(spelled, random):
    base = tiny.config(Path('runs'), {name: Path(name) for name in ('new', 'old', 'tokenizer')}, 'run')
    record = record_of(Stage.from_yaml(base))
    changed = copy.deepcopy(base)
    for path, value in spelled.items():
        section = changed[path[0]] if len(path) > 1 else changed
        if value is not None or path[-1] == 'stage_start':
            section[path[-1]] = value
    keys = list(changed)
    random.shuffle(keys)
    assert changes(record, Stage.from_yaml({key: changed[key] for key in keys})) == []


def test_the_end_may_move_where_the_schedule_lets_it(data, tmp_path):
    infinite = {'name': 'infinite', 't_warmup': '2ba', 't_cooldown': '2ba', 't_anneal': '0ba', 'alpha_const': 0.5}
    for scheduler, may in ((infinite, True), ({'name': 'rewarm_cosine', 't_warmup': '2ba'}, False)):
        cfg = tiny.config(tmp_path, data, 'run', scheduler=scheduler)
        found = changes(record_of(Stage.from_yaml(cfg)), Stage.from_yaml({**cfg, 'max_duration': '16ba'}))
        assert found == ([] if may else ['max_duration: 8ba -> 16ba']), scheduler


def test_an_end_before_what_was_trained_is_refused(data, tmp_path):
    infinite = {'name': 'infinite', 't_warmup': '2ba', 't_cooldown': '2ba', 't_anneal': '0ba', 'alpha_const': 0.5}
    cfg = tiny.config(tmp_path, data, 'run', scheduler=infinite)
    stage = Stage.from_yaml(cfg)
    folder = Path(stage.folder)
    write_json(folder / 'stage.json', {'run_name': 'run', 'config': stage.to_train_yaml(), 'contents': {}})
    write_json(
        folder / 'done.json', {'batch': 8, 'max_duration': '8ba', 'time': {'ep': 0, 'ba': 8, 'sp': 64, 'tok': 1024}}
    )
    for end, beyond in {
        '4ba': '8ba',
        '1023tok': '1024tok',
        '8ba': '',
        '1024tok': '',
        '9ba': '',
        '63sp': '64sp',
    }.items():
        found = restart_problem(Stage.from_yaml({**cfg, 'max_duration': end}))
        assert (f'max_duration={end}' in found and f'to {beyond};' in found) if beyond else found is None, end


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A cache of the hub in which a model's configuration is, and not yet its weights."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    snapshot = tmp_path / 'hub' / 'models--a--b' / 'snapshots' / ('c' * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / 'refs').mkdir()
    (snapshot.parents[1] / 'refs' / 'main').write_text('c' * 40)
    (snapshot / 'config.json').write_text('{"rope_theta": 10000}')
    return snapshot


def hugging_face(data, tmp_path, **model):
    cfg = tiny.config(tmp_path, data, 'run')
    return Stage.from_yaml({**cfg, 'model': {'name': 'hf_causal_lm', 'pretrained_model_name_or_path': 'a/b', **model}})


def test_a_model_is_what_is_read_of_it(data, tmp_path, hub):
    stage = hugging_face(data, tmp_path)
    record = record_of(stage)  # as the run began, before its weights were downloaded
    (hub / 'model.safetensors').write_bytes(b'weights')
    assert changes(record, stage) == []
    record = record_of(stage)
    (hub / 'README.md').write_text('read me')
    (hub / 'generation_config.json').write_text('{}')
    # of the format that is not read
    (hub / 'pytorch_model.bin.index.json').write_text('{"weight_map": {"a": "pytorch_model-1.bin"}}')
    shutil.copytree(hub, tmp_path / 'copy')
    assert (
        changes(record, stage)
        == []
        == changes(record, hugging_face(data, tmp_path, pretrained_model_name_or_path=str(tmp_path / 'copy')))
    )
    for file, content in {'model.safetensors': 'other', 'config.json': '{"rope_theta": 1}', 'modeling.py': ''}.items():
        kept = (hub / file).read_bytes() if (hub / file).exists() else None
        (hub / file).write_text(content)
        (line,) = changes(record, stage)
        assert line.startswith('model.pretrained_model_name_or_path: a/b ('), file
        if kept is None:
            (hub / file).unlink()
        else:
            (hub / file).write_bytes(kept)
    (hub / 'model.safetensors.index.json').write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    assert 'model.pretrained_model_name_or_path' not in contents_of(stage), 'half downloaded'


@pytest.mark.parametrize('how', [{'pretrained': False}, {'load_path': 'parent.pt'}])
def test_a_model_of_which_only_the_configuration_is_read(how, data, tmp_path, hub):
    parent = {key: how[key] for key in how if key == 'load_path'}

    def stage(name='a/b'):
        model = {key: value for key, value in how.items() if key == 'pretrained'}
        found = hugging_face(data, tmp_path, pretrained_model_name_or_path=name, **model)
        return Stage.from_yaml({**found.given, **parent})

    record = record_of(stage())
    (hub / 'model.safetensors').write_bytes(b'weights')
    assert changes(record, stage()) == []
    (other := tmp_path / 'other').mkdir()
    (other / 'config.json').write_text('{"rope_theta": 1}')
    for changed in (stage(str(other)), stage('a/unknown')):
        assert any('pretrained_model_name_or_path' in line for line in changes(record, changed))
    (hub / 'config.json').write_text('{"rope_theta": 1}')
    assert any('pretrained_model_name_or_path' in line for line in changes(record, stage()))
    assert any('pretrained' in line for line in changes(record, hugging_face(data, tmp_path)))


def test_files_beside_a_tokenizer_mean_nothing(stage, tmp_path):
    record = record_of(Stage.from_yaml(stage))
    (tmp_path / 'tokenizer' / 'README.md').write_text('read me')
    (tmp_path / 'tokenizer' / '.DS_Store').write_bytes(b'0')
    assert changes(record, Stage.from_yaml(stage)) == []
    config = tmp_path / 'tokenizer' / 'tokenizer_config.json'
    config.write_text(config.read_text().replace('"pad_token": "<|endoftext|>"', '"pad_token": "!"'))
    assert len(changes(record, Stage.from_yaml(stage))) == 1
