# SPDX-License-Identifier: Apache-2.0
"""Streams that survive faults: a real S3 server behind a proxy that spoils what goes through it."""

import json
import multiprocessing
import os
import re
import subprocess
import threading
import time
from collections import Counter
from functools import partial

import boto3
import numpy as np
import pytest
import tiny
from faults import Faults, Proxy, read_a_row
from llmfoundry.data.text_data import StreamingTextDataset
from streaming import MDSWriter, StreamingDataset
from torch.utils.data import DataLoader

from cpt_algorithms.replay import streams
from cpt_algorithms.replay.mix import DOWNLOAD_RETRY
from cpt_algorithms.replay.replay_text import ReplayTextDataset
from cpt_algorithms.replay.streams import StreamError
from cpt_algorithms.stage.stage import Stage

SEQ_LEN = 16
SLOW = partial(pytest.param, marks=pytest.mark.slow)
LIMIT = 24_000  # bytes: both indexes and 6 of the 35 shards


@pytest.fixture
def short_waits(monkeypatch):
    """As by default, a hundred times faster."""
    monkeypatch.setattr(streams, 'FIRST_WAIT', 0.01)
    monkeypatch.setattr(streams, 'LONGEST_WAIT', 0.05)
    monkeypatch.setattr(streams, 'wait_exponential_jitter', no_jitter)
    monkeypatch.setattr(streams, 'CLAIM_TIMEOUT', 0.5)
    monkeypatch.setattr(streams, 'TRACKER_DELAY', 0.0)
    # botocore's own attempts, which wait up to 20 s
    monkeypatch.setenv('AWS_MAX_ATTEMPTS', '1')


def no_jitter(initial, max):
    from tenacity import wait_exponential

    return wait_exponential(multiplier=initial, max=max)


@pytest.fixture(scope='module')
def uploaded(s3_server, data):
    """A bucket of its own with ``new`` and ``old``, splits ``train`` and ``val``."""
    client = boto3.client(
        's3', endpoint_url=s3_server, aws_access_key_id='x', aws_secret_access_key='x', region_name='us-east-1'
    )
    client.create_bucket(Bucket='shards')
    for name in ('new', 'old'):
        for path in data[name].rglob('*.*'):
            client.upload_file(str(path), 'shards', f'{name}/{path.relative_to(data[name])}')
    return client


@pytest.fixture
def proxy(uploaded, s3_server, short_waits, monkeypatch):
    """In front of the server; the environment leads to it."""
    proxy = Proxy(s3_server)
    for key, value in {
        'AWS_ACCESS_KEY_ID': 'x', 'AWS_SECRET_ACCESS_KEY': 'x', 'AWS_DEFAULT_REGION': 'us-east-1',
        'S3_ENDPOINT_URL': proxy.url,
    }.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    yield proxy
    proxy.go_away()


def arguments(tmp_path, **over):
    """The train loader's dataset, all from S3."""
    return {
        'tokenizer': None,
        'max_seq_len': SEQ_LEN,
        'new': stream(tmp_path, 'new'),
        'replay': {'fraction': 0.25, 'streams': {'old': stream(tmp_path, 'old')}},
        'batch_size': 8,
        'shuffle': True,
        'shuffle_block_size': 30,
        **over,
    }


def training(tmp_path, **over):
    return ReplayTextDataset(**arguments(tmp_path, **over))


def stream(tmp_path, name, split='train'):
    return {'remote': f's3://shards/{name}', 'local': str(tmp_path / name), 'split': split}


def evaluation(tmp_path, name='new', split='train', dataset=StreamingTextDataset, **over):
    """An evaluator's dataset: llm-foundry's, with our stream; and 400 rows to see ends that come early."""
    arguments = {} if dataset is StreamingDataset else {'tokenizer': None, 'max_seq_len': SEQ_LEN}
    return dataset(
        **arguments,
        **{'stream_name': 'resilient', 'batch_size': 8, 'download_retry': 8, **stream(tmp_path, name, split), **over},
    )


def ids(rows):
    tokens = (row['tokens'] if isinstance(row, dict) else row for row in rows)
    return [(int(row[0]), int(row[1]) * 100 + int(row[2])) for row in tokens]


@pytest.fixture
def undisturbed(data, tmp_path):
    """What the training must read."""
    new, old = ({'local': str(data[name]), 'split': 'train'} for name in ('new', 'old'))
    return ids(training(tmp_path, new=new, replay={'fraction': 0.25, 'streams': {'old': old}}))


@pytest.mark.parametrize(
    'faults',
    [
        Faults('GET .*mds', 4, status=503),
        Faults('GET .*mds', 2, flip=True),
        SLOW(Faults('GET .*mds', 8, cut_after=100)),
        SLOW(Faults('GET .*index', 2, cut_after=50)),
    ],
    ids=['503', 'flipped', 'cut', 'index'],
)
def test_what_passes_changes_nothing(proxy, tmp_path, undisturbed, faults):
    proxy.faults = faults
    dataset = training(tmp_path, cache_limit=LIMIT)
    assert ids(dataset) == undisturbed
    assert proxy.spoilt > 0 and faults.left == 0
    mds = list(tmp_path.rglob('*mds*'))
    assert {path.suffix for path in mds} == {'.mds'}
    assert sum(path.stat().st_size for path in mds) < LIMIT, 'the cache limit was kept'


def test_a_server_that_comes_back_is_waited_for(proxy, tmp_path, undisturbed, caplog):
    dataset = training(tmp_path, cache_limit=LIMIT, download_retry=200)
    rows = iter(dataset)
    read = ids(next(rows) for _ in range(20))
    proxy.go_away()
    timer = threading.Timer(1.0, proxy.come_back)
    timer.start()
    assert read + ids(rows) == undisturbed
    assert re.search(r's3://shards/\w+/train/shard\.\d+\.mds: attempt 1 of 201 failed', caplog.text)


def test_by_default_a_server_may_be_gone_for_a_minute(proxy, tmp_path, data):
    waits = [min(1.0 * 2**n, 15.0) for n in range(DOWNLOAD_RETRY)]  # and jitter, which is positive
    assert sum(waits) > 60
    assert {stream.download_retry for stream in training(tmp_path).streams} == {DOWNLOAD_RETRY}
    loader = {'name': 'text', 'dataset': stream(tmp_path, 'new'), 'label': 'new'}
    cfg = {**tiny.config(tmp_path, data, 'run'), 'eval_loader': [loader]}
    dataset = Stage.from_yaml(cfg).to_train_yaml()['eval_loader'][0]['dataset']
    assert (dataset['stream_name'], dataset['download_retry']) == ('resilient', DOWNLOAD_RETRY)


def test_a_server_that_stays_away_is_one_clear_error(proxy, tmp_path, undisturbed):
    dataset = training(tmp_path)
    proxy.go_away()
    with pytest.raises(StreamError) as error:
        list(dataset)
    assert re.fullmatch(r's3://shards/\w+/train/shard\.\d+\.mds .* 9 .*EndpointConnectionError: .*', str(error.value))


@pytest.mark.parametrize(('kind', 'num_workers'), [('train', 0), ('eval', 2), SLOW('train', 2), SLOW('eval', 0)])
def test_a_missing_shard_is_an_error_where_its_first_row_is_read(proxy, tmp_path, undisturbed, kind, num_workers):
    proxy.faults = Faults('/shards/new/train/shard.00007.mds', status=404)
    dataset = training(tmp_path) if kind == 'train' else evaluation(tmp_path)
    expected = undisturbed if kind == 'train' else [(0, number) for number in range(400)]
    first = next(place for place, (which, number) in enumerate(expected) if which == 0 and number // 20 == 7)
    read = []
    with pytest.raises(StreamError) as error:
        for batch in DataLoader(dataset, batch_size=8, num_workers=num_workers):
            read += ids(batch)
    assert re.fullmatch('s3://shards/new/train/shard.00007.mds cannot be downloaded: .*', str(error.value))
    assert read == expected[: len(read)]
    if num_workers == 0:
        assert len(read) == first // 8 * 8
        assert sum('new/train/shard.00007' in request for request in proxy.requests) == 1, 'it was tried again'
        dataset._iterator.non_blocking_exit()  # what is read ahead
        time.sleep(0.5)
        assert dataset._shard_states[7] != 2, 'others would wait for a shard that nobody prepares'


@pytest.mark.slow
def test_stock_streaming_ends_early_without_an_error(proxy, tmp_path):
    """Why all this: the same fault, and an evaluation over some of the rows."""
    proxy.faults = Faults('/shards/new/train/shard.00007.mds', status=404)
    dataset = StreamingDataset(**stream(tmp_path, 'new'), batch_size=8, download_retry=1)
    assert 0 < len(list(dataset)) < 400 == len(dataset)
    assert 2 in dataset._shard_states.numpy()


@pytest.fixture
def corrupt(uploaded, data):
    """A shard that is corrupt on the server."""
    content = (data['new'] / 'train/shard.00007.mds').read_bytes()
    uploaded.put_object(Bucket='shards', Key='new/train/shard.00007.mds', Body=content[:-1] + bytes([content[-1] ^ 1]))
    yield
    uploaded.put_object(Bucket='shards', Key='new/train/shard.00007.mds', Body=content)


def test_a_corrupt_shard_is_never_read_and_never_kept(proxy, tmp_path, corrupt):
    for _ in range(2):  # as after a restart
        dataset = evaluation(tmp_path)
        with pytest.raises(StreamError) as error:
            list(dataset)
        assert re.search(r'^s3://shards/new/train/shard\.00007\.mds .*xxh64.* \w{16}, .* \w{16}, ', str(error.value))
        assert not list(tmp_path.rglob('shard.00007*'))
        del dataset
    assert sum('GET /shards/new/train/shard.00007' in request for request in proxy.requests) == 6


@pytest.mark.slow
def test_stock_streaming_serves_a_corrupt_shard(proxy, tmp_path, corrupt, data):
    """Why all this: at once, as it validates nothing by default; and after a restart where it found it corrupt."""
    good = [row['tokens'].tolist() for row in StreamingDataset(local=str(data['new']), split='train', batch_size=8)]
    for place, validate_hash in (('default', None), ('validating', 'xxh64')):
        if validate_hash:
            first = StreamingDataset(
                **stream(tmp_path / place, 'new'), batch_size=8, validate_hash=validate_hash, download_retry=1
            )
            assert len(list(first)) < 400
            del first
        again = StreamingDataset(**stream(tmp_path / place, 'new'), batch_size=8, validate_hash=validate_hash)
        rows = [row['tokens'].tolist() for row in again]
        assert len(rows) == 400 and rows != good


def test_what_is_turned_over_on_the_way_is_noticed_by_s3_too(proxy, tmp_path):
    proxy.faults = Faults('GET /shards/new/train/shard.00007.mds', flip=True)
    with pytest.raises(StreamError, match='00007.mds is corrupt: Expected checksum '):
        list(evaluation(tmp_path))
    assert proxy.spoilt == 3


def test_a_failed_shard_can_be_asked_for_again(proxy, tmp_path):
    dataset = evaluation(tmp_path)
    proxy.faults = Faults('shard.00007', status=404)
    for _ in range(2):
        with pytest.raises(StreamError, match='it is not there'):
            dataset[140]
    dataset.prepare_shard(7)  # in the background, another worker's too; and while it fails ...
    proxy.faults = Faults()
    elsewhere = evaluation(tmp_path / 'elsewhere')
    elsewhere.prepare_shard(7)
    os.rename(tmp_path / 'elsewhere/new/train/shard.00007.mds', tmp_path / 'new/train/shard.00007.mds')
    assert ids([dataset[140]]) == [(0, 140)]  # ... one more lucky has got it


@pytest.mark.parametrize(('status', 'message'), [(403, 'credentials'), (404, 'bucket')])
def test_an_index_that_cannot_be_had_is_an_error_at_once(proxy, tmp_path, status, message):
    proxy.faults = Faults('index.json', status=status)
    with pytest.raises(StreamError, match=f's3://shards/new/train/index.json cannot be downloaded: .*{message}'):
        training(tmp_path)
    assert len(proxy.requests) == 1
    assert not list(tmp_path.rglob('*.json'))


def test_validation_must_be_possible_as_asked(proxy, tmp_path, write_mds, caplog):
    for build in (training, evaluation):
        with pytest.raises(ValueError, match='validate_hash=sha1.*new/train.* xxh64'):
            build(tmp_path / build.__name__, validate_hash='sha1')
    write_mds(tmp_path / 'plain', 0, 100)
    index = tmp_path / 'plain/train/index.json'
    content = json.loads(index.read_text())
    for shard in content['shards']:
        shard['hashes'] = []
        shard['raw_data']['hashes'] = {}
    index.write_text(json.dumps(content))
    remote = {'remote': str(tmp_path / 'plain'), 'local': str(tmp_path / 'copy')}  # a folder is a remote, too
    assert len(list(evaluation(tmp_path, **remote))) == 100
    assert caplog.text.count('has no hashes') == 1


def test_compressed_shards_too(proxy, tmp_path):
    with MDSWriter(
        out=str(tmp_path / 'zip/train'), columns={'tokens': 'ndarray:int32:16'}, size_limit=2000, hashes=['sha1'],
        compression='zstd',
    ) as writer:  # fmt: skip
        for number in range(200):
            writer.write({'tokens': np.full(16, number, np.int32)})
    bad = tmp_path / 'zip/train/shard.00003.mds.zstd'
    good = bad.read_bytes()
    bad.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    place = {'remote': str(tmp_path / 'zip'), 'local': str(tmp_path / 'copy'), 'split': 'train', 'batch_size': 8}
    first = StreamingDataset(**place, stream_name='resilient')
    with pytest.raises(StreamError, match=r'zip/train/shard\.00003\.mds\.zstd is corrupt: its sha1 is \w{40}, and'):
        list(first)
    # here its process goes on: its thread would prepare a shard under the eyes of the next
    first._iterator.exit()
    first._executor.shutdown(wait=True)
    bad.write_bytes(good)
    dataset = StreamingDataset(**place, stream_name='resilient')
    assert [int(row['tokens'][0]) for row in dataset] == list(range(200))
    assert dataset.cache_usage == sum(path.stat().st_size for path in (tmp_path / 'copy').rglob('*.*s*'))


def test_leftovers_of_a_killed_download_are_not_taken_for_whole(proxy, tmp_path):
    folder = tmp_path / 'new/train'
    folder.mkdir(parents=True)
    leftovers = ['index.json.part', 'shard.00001.mds.part', 'shard.00002.mds.part.1aB2c3D4', 'shard.00003.mds.tmp']
    for name in leftovers:
        (folder / name).write_bytes(b'half')
    dataset = evaluation(tmp_path)
    assert not any((folder / name).exists() for name in leftovers)
    assert ids(dataset) == [(0, number) for number in range(400)]


def in_another_process(dataset_class, **arguments):
    """Another run: build a dataset, read a row, and go on until killed."""
    # forked from a server that has imported the library, and started no threads
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['cpt_algorithms.replay.replay_text'])
    begun = context.Event()
    process = context.Process(
        target=read_a_row,
        args=(begun, dict(os.environ), tiny.DATASETS_LOCK.lock_file, dataset_class, arguments),
        daemon=True,
    )
    process.start()
    assert begun.wait(200)
    return process


def shared_memory_of(tmp_path):
    return streams._stale_shared_memory(str(tmp_path / 'new/train'))


@pytest.mark.long
def test_a_killed_run_can_be_started_again_and_a_live_one_is_left_alone(proxy, tmp_path, undisturbed, caplog):
    live = in_another_process(ReplayTextDataset, **arguments(tmp_path))
    (number,) = shared_memory_of(tmp_path)
    beside = training(tmp_path)
    assert f'cache folder {tmp_path}/new/train is in use by process {live.pid} on' in caplog.text
    assert [each.local for each in beside.streams] == [f'{tmp_path}/{name}-run2' for name in ('new', 'old')]
    assert ids(beside) == undisturbed
    del beside
    assert list(shared_memory_of(tmp_path)) == [number]
    live.kill()  # the resource tracker is this process's: it removes nothing
    live.join()
    assert list(shared_memory_of(tmp_path)) == [number]
    dataset = training(tmp_path)
    assert ids(dataset) == undisturbed
    assert list(shared_memory_of(tmp_path)) == [dataset._shm_prefix_int]


@pytest.mark.slow
def test_the_memory_of_a_live_stock_run_is_not_removed(proxy, tmp_path, caplog):
    live = in_another_process(StreamingDataset, **stream(tmp_path, 'new'), batch_size=8)
    there = shared_memory_of(tmp_path)
    assert training(tmp_path).streams[0].local == f'{tmp_path}/new-run2'
    assert f'is in use by process {live.pid} on' in caplog.text
    assert shared_memory_of(tmp_path) == there
    live.kill()
    live.join()
    assert len(list(training(tmp_path))) > 0


def test_containers_that_share_memory_and_not_processes_do_not_remove_each_others(proxy, tmp_path, monkeypatch, caplog):
    live = in_another_process(ReplayTextDataset, **arguments(tmp_path))
    there = shared_memory_of(tmp_path)
    # the other's folder has the same name and is another; its process cannot be seen
    (tmp_path / 'new/train/.lock').unlink()
    monkeypatch.setattr(streams, '_pids_that_map', lambda files: [])
    assert training(tmp_path).streams[0].local == f'{tmp_path}/new-run2'
    assert f'is in use by process {live.pid} on' in caplog.text
    assert shared_memory_of(tmp_path) == there
    live.kill()


def test_one_run_may_train_and_evaluate_from_one_folder(proxy, tmp_path):
    train = training(tmp_path)
    evals = [evaluation(tmp_path, name, 'val') for name in ('new', 'old')]
    assert len(list(train)) > 0
    assert [len(list(each)) for each in evals] == [16, 16]


def test_local_data_is_read_by_any_number_of_runs(data, undisturbed):
    local = {'local': str(data['new']), 'split': 'train', 'batch_size': 8, 'stream_name': 'resilient'}
    other = in_another_process(StreamingDataset, **local)
    assert len(list(StreamingDataset(**local))) == 400
    assert not (data['new'] / 'train/.lock').exists()
    other.kill()


@pytest.mark.skipif(os.getuid() != 0, reason='mounts a small disk')
def test_a_full_disk_is_named_and_leaves_nothing_half(proxy, tmp_path):
    disk = tmp_path / 'new'
    disk.mkdir()
    subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=40k', 'tmpfs', str(disk)], check=True)
    try:
        dataset = evaluation(tmp_path, cache_limit='1mb', stream_config={'cache_limit': '1mb'})
        with pytest.raises(StreamError) as error:
            list(dataset)
        place = rf's3://shards/new/train/shard\.\d+\.mds .*{disk}/train'
        assert re.search(rf'{place}: .* 40,960 .* 0 left, .*cache_limit is 1,048,576 ', str(error.value))
        assert {path.suffix for path in disk.rglob('*.*')} <= {'.mds', '.json', ''}
        tried = Counter(re.findall(r'GET \S+mds', '\n'.join(proxy.requests)))
        assert max(tried.values()) <= 2, 'it was tried again'
        subprocess.run(['mount', '-o', 'remount,size=1m', str(disk)], check=True)
        del dataset
        assert len(list(evaluation(tmp_path))) == 400
    finally:
        subprocess.run(['umount', '-l', str(disk)], check=True)


def test_an_error_in_the_background_is_not_the_end_of_the_data(proxy, tmp_path, monkeypatch):
    dataset = training(tmp_path, cache_limit=LIMIT)

    def fail():
        raise OSError('the disk is gone')

    monkeypatch.setattr(dataset, '_evict_coldest_shard', fail)
    with pytest.raises(StreamError, match='reading ahead failed: OSError: the disk is gone'):
        list(dataset)


def test_a_cache_limit_that_cannot_be_kept_is_refused_for_evaluations(proxy, tmp_path):
    with pytest.raises(ValueError, match=r'cache_limit=9,000 bytes is too small .*new/train: set 1\d,\d{3} '):
        evaluation(tmp_path, cache_limit=9_000, stream_config={'cache_limit': 9_000})
