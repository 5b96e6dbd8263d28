# SPDX-License-Identifier: Apache-2.0
"""The shards of a dataset, known without an object for each: the same as Streaming's own, and constant to start."""

import json
import os
import pickle
import shutil
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tiny
from streaming import MDSWriter, StreamingDataset
from streaming.base.format import reader_from_json
from streaming.base.spanner import Spanner
from torch.utils.data import DataLoader

from cpt_algorithms.replay import shard_index
from cpt_algorithms.replay.replay_text import ReplayTextDataset
from cpt_algorithms.replay.shard_index import ShardIndex, ShardOfSample, Shards


@pytest.fixture
def index(data):
    return ShardIndex.read(data['new'] / 'train' / 'index.json')


def test_it_says_what_streaming_says(data, index):
    content = json.loads(index.path.read_text())['shards']
    assert index.samples.tolist() == [shard['samples'] for shard in content] == [20] * 20
    readers = Shards([index], [(str(data['new']), 'train')])
    assert len(readers) == 20
    for number, info in enumerate(content):
        theirs = reader_from_json(str(data['new']), 'train', info)
        ours = readers[number]
        assert ours.samples == theirs.samples and ours.raw_data.basename == theirs.raw_data.basename
        assert ours.raw_data.hashes == theirs.raw_data.hashes
        assert index.bytes[number] == theirs.get_max_size()
        assert (ours[3]['tokens'] == theirs[3]['tokens']).all()
    assert len(pickle.loads(pickle.dumps(readers))[19]) == 20
    with pytest.raises(IndexError):
        readers[20]


def test_windows_do_not_matter(index, monkeypatch):
    for window in (1, 7, 100, 1000):
        monkeypatch.setattr(shard_index, 'WINDOW', window)
        again = ShardIndex.read(index.path)
        assert (again.table == index.table).all()
        assert again.digest == index.digest


def test_order_of_keys_spaces_and_other_alphabets(index, tmp_path):
    content = json.loads(index.path.read_text())
    content = {'version': 2, 'größe': '∞ "shards": [', 'shards': content['shards']}
    content['shards'][1]['raw_data']['basename'] = 'scherbe–zwei.mds'
    path = tmp_path / 'index.json'
    path.write_text(json.dumps(content, indent=3, ensure_ascii=False), encoding='utf-8')
    again = ShardIndex.read(path)
    assert again.samples.tolist() == index.samples.tolist()
    assert again.digest == index.digest, 'the same data, whatever its files are called'
    assert again.reader(1, 'here', 'x').raw_data.basename == 'scherbe–zwei.mds'
    assert again.reader(19, 'here', 'x').samples == 20


@pytest.mark.parametrize(
    ('text', 'what'),
    [
        ('', 'no list of shards'),
        ('{}', 'no list of shards'),
        ('{"shards": [{"samples": 1', 'cut off'),
        ('{"shards": [{"samples": 1}], "version": 2}', 'raw|out of range'),
        ('{"shards": [], "version": 3}', 'version is 3'),
    ],
)
def test_what_is_no_index_is_named(text, what, tmp_path):
    (tmp_path / 'index.json').write_text(text)
    with pytest.raises(ValueError, match=f'index.json is not the index of a Streaming dataset: .*({what})'):
        ShardIndex.read(tmp_path / 'index.json')


def test_other_data_has_another_digest(data, index, tmp_path):
    assert ShardIndex.read(data['old'] / 'train' / 'index.json').digest != index.digest
    content = json.loads(index.path.read_text())
    content['shards'][7]['raw_data']['hashes']['xxh64'] = '0' * 16
    (tmp_path / 'index.json').write_text(json.dumps(content))
    assert ShardIndex.read(tmp_path / 'index.json').digest != index.digest


def test_the_table_of_a_large_index_is_kept_beside_it(index, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_index, 'LARGE', 10)
    shutil.copy(index.path, tmp_path / 'index.json')
    first = ShardIndex.read(tmp_path / 'index.json')
    assert (tmp_path / '.index.npy').exists()
    monkeypatch.setattr(shard_index, '_scan', None)  # cannot be read again
    again = ShardIndex.read(tmp_path / 'index.json')
    assert isinstance(again.table, np.memmap)
    assert (again.table == first.table).all()
    assert (again.kinds, again.digest) == (first.kinds, first.digest)
    os.utime(tmp_path / 'index.json', (1, 1))  # replaced by another
    with pytest.raises(ValueError, match='not the index'):
        ShardIndex.read(tmp_path / 'index.json')


def test_shard_of_a_sample_is_streamings(index):
    sizes = np.array([3, 0, 5, 1, 1020, 7])
    ours, theirs = ShardOfSample(np.cumsum(sizes)), Spanner(sizes.copy())
    assert [ours[i] for i in range(1036)] == [tuple(map(int, theirs[i])) for i in range(1036)]
    for outside in (-1, 1036):
        with pytest.raises(IndexError):
            ours[outside]


def test_what_is_in_the_cache_is_found(data, index, tmp_path):
    folder = tmp_path / 'train'
    folder.mkdir()
    for name in ('shard.00003.mds', 'shard.00011.mds', 'shard.00012.mds.zstd', 'index.json', 'shard.00099.mds'):
        (folder / name).touch()
    assert index.cached(map(str, folder.iterdir()), str(folder)) == [3, 11, 12]
    assert index.cached([], str(folder)) == []


def cached(data, tmp_path, **over):
    """Read through a cache, as from object storage."""
    new = {'remote': str(data['new']), 'local': str(tmp_path / 'cache'), 'split': 'train'}
    options = {'new': new, 'shuffle': True, 'shuffle_block_size': 40, 'batch_size': 8, 'predownload': 8, **over}
    return ReplayTextDataset(tokenizer=None, max_seq_len=tiny.SEQ_LEN, **options)


def replaying(folder, fraction):
    """Data that is replayed from where it lies."""
    return {'fraction': fraction, 'streams': {'old': {'local': str(folder), 'split': 'train'}}}


def limit_for(data, shards):
    """A cache limit: the index and so many shards."""
    path = data['new'] / 'train' / 'index.json'
    return path.stat().st_size + shards * int(ShardIndex.read(path).bytes.max())


def shards_in(folder):
    return sorted(path.name for path in (folder / 'train').glob('*.mds'))


def numbers(rows):
    return sorted(int(row[1]) * 100 + int(row[2]) for row in rows)


def record_downloads(dataset):
    """The names of the files that it downloads from now on."""
    found, downloader = [], dataset.streams[0]._downloader
    download = downloader.download
    downloader.download = lambda *given: (found.append(Path(given[0]).name), download(*given))
    return found


def test_each_shard_is_downloaded_once_with_a_cache_of_ten(data, tmp_path):
    dataset = cached(data, tmp_path, cache_limit=limit_for(data, 10))
    downloads = record_downloads(dataset)
    assert numbers(dataset) == list(range(400))
    assert len(downloads) == len(set(downloads)) == 20
    assert 1 <= len(shards_in(tmp_path / 'cache')) <= 10


def test_the_cache_of_an_earlier_run_is_used(data, tmp_path):
    full = cached(data, tmp_path)
    assert numbers(full) == list(range(400))
    usage = full.cache_usage
    (tmp_path / 'cache' / 'train' / 'shard.00004.mds').unlink()
    del full
    again = cached(data, tmp_path)
    downloads = record_downloads(again)
    assert again.cache_usage < usage
    assert len([*again]) == 400
    assert downloads == ['shard.00004.mds']
    assert again.cache_usage == usage


def test_a_clock_that_is_set_back_does_not_turn_the_cache_over(data, tmp_path, monkeypatch):
    """What was used before that is not newer than what is used now, and would never go."""
    dataset = cached(data, tmp_path, cache_limit=limit_for(data, 10))
    for number in range(10):
        dataset.prepare_shard(number)
    tell = time.time_ns
    monkeypatch.setattr(time, 'time_ns', lambda: tell() - 5 * 3600 * 10**9)
    for number in range(10, 14):
        dataset.prepare_shard(number)
    assert {f'shard.{number:05}.mds' for number in range(10, 14)} <= set(shards_in(tmp_path / 'cache'))


@pytest.fixture
def only_copy(data, tmp_path):
    return shutil.copytree(data['old'], tmp_path / 'only')


def test_data_without_a_remote_is_never_evicted(data, only_copy, tmp_path):
    before = shards_in(only_copy)
    dataset = cached(data, tmp_path, replay=replaying(only_copy, 0.25), cache_limit=limit_for(data, 5))
    assert len([*dataset]) == len(dataset)
    assert shards_in(only_copy) == before
    assert 1 <= len(shards_in(tmp_path / 'cache')) <= 5


def test_stock_streaming_deletes_the_only_copy(only_copy):
    """Why the guard above is there."""
    shard = int(ShardIndex.read(only_copy / 'train' / 'index.json').bytes.max())
    stock = StreamingDataset(local=str(only_copy), split='train', batch_size=8, cache_limit=10_000 + 5 * shard)
    stock.evict_coldest_shard()
    assert len(shards_in(only_copy)) == 14


def test_a_cache_too_small_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match=r'cache_limit=.*set'):
        cached(data, tmp_path, cache_limit='5kb')


def start(folder):
    """As runs that resume at the beginning, in the middle, at the end."""
    dataset = ReplayTextDataset(
        tokenizer=None, max_seq_len=2048, new={'local': str(folder)}, batch_size=1104, shuffle=True
    )
    dataset._unique_worker_world = dataset._unique_rank_world.detect_workers()
    dataset._parallel_worker_world = dataset._parallel_rank_world.detect_workers()
    for batch in (0, 66_000, 132_244):
        dataset.spanner[int(dataset._get_work(0, 1104 * batch)[0])]
    return len(dataset)


@pytest.mark.long
def test_starting_at_146_million_samples_takes_a_second_and_100_mb(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tiny.ROOT / 'scripts' / 'benchmarks'))
    import replay_loader

    replay_loader.write_index(tmp_path / 'data', 146_000_000)
    seconds = []
    for _ in range(3):  # a busy machine takes more CPU time for the same work
        before = time.process_time()
        assert start(tmp_path / 'data') == 146_000_000 // 1104 * 1104
        seconds.append(time.process_time() - before)
    assert min(seconds) < 1.5, 'all three'
    tracemalloc.start()
    start(tmp_path / 'data')
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


def test_many_workers_share_the_smallest_cache_that_is_accepted(data, tmp_path):
    """They evict each other's shards before a row is read; Streaming then waits for ever."""
    limit = limit_for(data, 10)
    dataset = cached(data, tmp_path, cache_limit=limit, shuffle_block_size=400, batch_size=4)
    with pytest.raises(ValueError, match='cache_limit=.*11 .* 7 workers'):
        dataset.check_cache_limit_for(7)
    loader = DataLoader(dataset, batch_size=4, num_workers=6)
    assert numbers(row for batch in loader for row in batch) == list(range(400))
    assert 0 < dataset.cache_usage <= limit
    files = [path for path in (tmp_path / 'cache' / 'train').iterdir() if not path.name.startswith('.')]
    assert sum(path.stat().st_size for path in files) == dataset.cache_usage


def test_compressed_data_that_is_only_here_does_not_fill_the_account(data, tmp_path):
    with MDSWriter(
        out=str(tmp_path / 'zip' / 'train'), columns={'tokens': 'ndarray:int32:16'}, compression='zstd', hashes=['xxh64'],
        size_limit=1600,
    ) as writer:  # fmt: skip
        for number in range(200):
            writer.write({'tokens': np.full(16, number, np.int32)})
    limit, replay = limit_for(data, 5), replaying(tmp_path / 'zip', 0.5)
    dataset = cached(data, tmp_path, replay=replay, cache_limit=limit, max_passes=3)
    assert len([*dataset]) == len(dataset)
    assert dataset.cache_usage <= limit


def test_a_relative_cache_folder_is_the_same_folder(data, tmp_path, monkeypatch):
    full = cached(data, tmp_path)
    assert len([*full]) == 400
    usage = full.cache_usage
    del full
    monkeypatch.chdir(tmp_path)
    new = {'remote': str(data['new']), 'local': './cache', 'split': 'train'}
    assert cached(data, tmp_path, new=new).cache_usage == usage
