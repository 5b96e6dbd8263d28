# SPDX-License-Identifier: Apache-2.0
"""Whose data a cache folder holds: that of its remote as it is now, in a folder that no other run uses."""

import logging
import shutil
from pathlib import Path

import pytest
import tiny
from streaming import StreamingDataset

from cpt_algorithms.replay.replay_text import ReplayTextDataset
from cpt_algorithms.replay.streams import StreamError
from cpt_algorithms.stage.preflight import PreflightError, preflight
from cpt_algorithms.stage.stage import Stage


@pytest.fixture
def remote(tmp_path, write_mds):
    """A folder stands in for a bucket: it is read through a cache alike."""
    return write_mds(tmp_path / 'bucket', 0, 60)


def training(remote, local):
    new = {'remote': str(remote), 'local': str(local), 'split': 'train'}
    return ReplayTextDataset(tokenizer=None, max_seq_len=tiny.SEQ_LEN, new=new, batch_size=8)


def evaluation(remote, local):
    return StreamingDataset(remote=str(remote), local=str(local), split='train', batch_size=8, stream_name='resilient')


def replace(remote, write_mds, how):
    content = {'other rows': (1, 60), 'more rows': (0, 80), 'fewer rows': (0, 40)}[how]
    shutil.rmtree(remote)
    write_mds(remote, *content)


@pytest.mark.parametrize('how', ['other rows', 'more rows', 'fewer rows'])
@pytest.mark.parametrize('build', [training, evaluation])
def test_a_cache_of_data_that_was_replaced_is_refused(remote, tmp_path, write_mds, build, how):
    local = tmp_path / 'cache'
    assert len(list(build(remote, local)))
    assert len(list(build(remote, local))), 'the same data is read again'
    replace(remote, write_mds, how)
    with pytest.raises(StreamError, match=f'{local}/train .* {remote}/train/index.json .* replaced') as error:
        build(remote, local)
    assert 'Empty' in str(error.value)
    assert not list((local / 'train').glob('*.tmp*'))
    shutil.rmtree(local)
    assert len(list(build(remote, local)))


def stage_on(data, tmp_path, **streams):
    """Loaders that read these streams: ``new``, ``old``, and evaluators."""
    cfg = tiny.config(tmp_path, data, 'run')
    dataset = cfg['train_loader']['dataset']
    dataset['new'] = streams.pop('new', dataset['new'])
    if 'old' in streams:
        dataset['replay'] = {'fraction': 0.25, 'streams': {'old': streams.pop('old')}}
    evaluators = []
    for label, stream in streams.items():
        loader = tiny.eval_loader(label, data['old'])
        evaluators.append({**loader, 'dataset': {'max_seq_len': tiny.SEQ_LEN, **stream}})
    return {**cfg, 'eval_loader': evaluators}


@pytest.mark.parametrize('where', ['new', 'old', 'label'])
def test_preflight_sees_it(data, tmp_path, write_mds, where):
    remote = write_mds(tmp_path / 'bucket', 0, 400)
    stream = {'remote': str(remote), 'local': str(tmp_path / 'cache'), 'split': 'train'}
    evaluation(remote, stream['local'])
    cfg = stage_on(data, tmp_path, **{where: stream})
    preflight(Stage.from_yaml(cfg))
    replace(remote, write_mds, 'more rows')
    assert f'the cache folder {tmp_path}/cache/train holds other data than {remote}/train/index.json' in tiny.said(cfg)


@pytest.mark.parametrize('where', ['new', 'old', 'label'])
@pytest.mark.parametrize(
    ('remote', 'said'),
    [
        ('s4://bucket/new', "'s3://'"),
        ('file:///new', 'nothing from file://'),
        ('s3:///new', 'no bucket'),
        ('gs://', 'no bucket'),
    ],
)
def test_a_remote_that_can_be_none_is_refused_even_if_it_is_cached(data, tmp_path, where, remote, said):
    shutil.copytree(data['new'], tmp_path / 'cache')
    stream = {'remote': remote, 'local': str(tmp_path / 'cache'), 'split': 'train'}
    printed = tiny.said(stage_on(data, tmp_path, **{where: stream}))
    assert f'.remote={remote}' in printed and said in printed


@pytest.mark.parametrize('key', ['save_folder', 'load_path'])
@pytest.mark.parametrize('uri', ['s4://bucket/run', 's3:///run'])
def test_nor_can_checkpoints_be_there(data, tmp_path, key, uri):
    with pytest.raises(PreflightError) as error:
        preflight(Stage.from_yaml({**tiny.config(tmp_path, data, 'run'), key: uri}))
    (problem,) = error.value.problems
    assert key in problem and uri in problem
    assert not error.value.unseen, 'it cannot be right elsewhere'


@pytest.mark.parametrize(
    ('streams', 'keys'),
    [
        ({'new': ('new', 'a'), 'old': ('old', 'a')}, ('dataset.new.new', 'replay.streams.old')),
        ({'new': ('new', 'a'), 'label': ('old', 'a')}, ('dataset.new.new', 'eval_loader[0].dataset')),
        ({'one': ('new', 'a'), 'two': ('old', 'a')}, ('eval_loader[0].dataset', 'eval_loader[1].dataset')),
        ({'one': ('new', 'a'), 'two': ('new', 'a')}, ('eval_loader[0].dataset', 'eval_loader[1].dataset')),
        ({'old': ('old', None), 'new': ('old', None)}, ('dataset.new.new', 'replay.streams.old')),
    ],
    ids=str,
)
def test_two_streams_in_one_folder_are_refused(data, tmp_path, streams, keys):
    def stream(name, cache):
        here = {'local': str(data[name]), 'split': 'train'}
        return {**here, 'remote': here['local'], 'local': str(tmp_path / cache)} if cache else here

    cfg = stage_on(data, tmp_path, **{where: stream(*place) for where, place in streams.items()})
    said = tiny.said(cfg)
    assert all(f'{key}.local' in said for key in keys), said


def test_caches_apart_and_folders_that_many_read_are_right(data, tmp_path):
    here = {'local': str(data['old']), 'split': 'train'}
    remote = {'remote': str(data['new']), 'local': str(tmp_path / 'a'), 'split': 'train'}
    cfg = stage_on(data, tmp_path, new=remote, one=here, two=here, three={**remote, 'split': 'val'})
    preflight(Stage.from_yaml(cfg))


def test_without_a_folder_of_its_own_a_cache_is_found_again(remote, tmp_path, monkeypatch):
    monkeypatch.setattr('cpt_algorithms.replay.streams.gettempdir', lambda: str(tmp_path))
    new = {'remote': str(remote), 'split': 'train'}
    for _ in range(2):
        dataset = ReplayTextDataset(tokenizer=None, max_seq_len=tiny.SEQ_LEN, new=new, batch_size=8)
        assert len(list(dataset)) == 56
        del dataset
    (cache,) = tmp_path.glob('streaming_*')
    assert (cache / 'train' / 'index.json').exists()


def test_a_folder_that_could_not_be_claimed_is_not_kept_locked(tmp_path, monkeypatch):
    from cpt_algorithms.replay import streams

    def in_use(folder, deadline):
        raise streams._InUseError(f'{folder} is in use')

    monkeypatch.setattr(streams, '_claimed_folders', {})
    with monkeypatch.context() as patch:
        patch.setattr(streams, '_remove_stale_shared_memory', in_use)
        with pytest.raises(streams._InUseError) as kept:
            streams._claim_folder(str(tmp_path))
    streams._claim_folder(str(tmp_path))  # while the error, and with it its frames, is still held
    assert 'is in use' in str(kept.value)


def test_a_second_run_caches_elsewhere_and_says_so(remote, tmp_path, monkeypatch, caplog):
    from cpt_algorithms.replay import streams

    local = tmp_path / 'cache'
    first = list(training(remote, local))
    # another run, from the kernel's point of view: it opens the lock anew, while the first is held
    held = streams._claimed_folders
    monkeypatch.setattr(streams, '_claimed_folders', {})
    with caplog.at_level(logging.WARNING):
        second = training(remote, local)
    assert [stream.local for stream in second.streams] == [f'{local}-run2']
    assert f'{local}/train is in use by process' in caplog.text and f'{local}-run2' in caplog.text
    assert [row.tolist() for row in second] == [row.tolist() for row in first]
    assert Path(f'{local}-run2', 'train', 'index.json').exists()
    assert f'{local}/train' in held
