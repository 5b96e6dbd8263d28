# SPDX-License-Identifier: Apache-2.0
"""The recipe, all data on S3, under each fault: it goes on or stops with one clear error, and loses and repeats nothing.

    pytest -m slow tests/replay/test_faults.py -s

prints the table of the method card. Real runs in processes of their own, two DataLoader workers, 25 % replay, a cache
limit, an evaluator; batches are checked against those of a run that nothing disturbed.
"""

import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import recorder
import tiny
from faults import Faults, Proxy
from streaming import StreamingDataset

from cpt_algorithms.replay.streams import _stale_shared_memory

pytestmark = pytest.mark.slow

CACHE_LIMIT = 30_000  # bytes: the indexes and some 9 of the 35 shards
TABLE: list[tuple[str, ...]] = []


@pytest.fixture(scope='module', autouse=True)
def table():
    yield
    head = ('fault', 'stock Streaming, read in a loop', 'the recipe', 'seconds', 'resumed: rows and losses')
    lines = [head, tuple('---' for _ in head), *TABLE]
    print('\n\n' + '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines))


@pytest.fixture
def proxy(s3_server, bucket, data, monkeypatch):
    for name in ('new', 'old'):
        for path in data[name].rglob('*.*'):
            bucket.upload_file(str(path), 'bucket', f'{name}/{path.relative_to(data[name])}')
    proxy = Proxy(s3_server)
    monkeypatch.setenv('S3_ENDPOINT_URL', proxy.url)
    yield proxy
    proxy.go_away()


def stream(cache: Path, name: str, split: str = 'train') -> dict:
    return {'remote': f's3://bucket/{name}', 'local': str(cache / name), 'split': split}


def stage(folder: Path, data: dict[str, Path], cache: Path, name: str, **over) -> dict:
    evaluator = {**tiny.eval_loader('new', data['new']), 'num_workers': 1, 'prefetch_factor': 2}
    evaluator['dataset'] = {'max_seq_len': tiny.SEQ_LEN, **stream(cache, 'new', 'val')}
    dataset = {
        'new': stream(cache, 'new'),
        'replay': {'fraction': 0.25, 'streams': {'old': stream(cache, 'old')}},
        'shuffle_block_size': 30,
        'cache_limit': CACHE_LIMIT,
        'predownload': 16,
    }
    cfg = tiny.config(
        folder,
        data,
        name,
        max_duration='24ba',
        eval_interval='12ba',
        save_interval='4ba',
        train_loader={'num_workers': 2, 'prefetch_factor': 2, 'dataset': dataset},
        eval_loader=[evaluator],
        **over,
    )
    cfg['train_loader']['dataset']['new'] = stream(cache, 'new')  # not merged with the local one
    return cfg


def start(cfg: dict, folder: Path) -> subprocess.Popen:
    path = tiny.save(cfg, folder / f'{cfg["run_name"]}.yaml')
    return subprocess.Popen(
        [sys.executable, str(tiny.ROOT / 'recipes/continue_pretraining.py'), str(path)],
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(run: subprocess.Popen) -> str:
    """What it printed."""
    try:
        return run.communicate(timeout=400)[0]
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        raise


def here(cfg: dict, folder: Path) -> str:
    """The recipe in this process, which has imported everything already; the error that it ends with, or nothing."""
    try:
        tiny.recipe_here(cfg, folder)
    except SystemExit as stop:
        return str(stop)
    finally:
        tiny.DATASETS_LOCK.release(force=True)  # as at the end of a process
        gc.collect()
    return ''


def apart(cfg: dict, folder: Path) -> str:
    """The same in a process of its own."""
    run = start(cfg, folder)
    printed = finish(run)
    assert run.returncode in (0, 1), printed[-4000:]
    return error_of(printed) if run.returncode else ''


def wait_for_batch(cfg: dict, batch: int) -> None:
    path = Path(f'{cfg["callbacks"]["recorder"]["path"]}.rank0')
    until = time.monotonic() + 200
    while not (path.exists() and f'"batch": {batch},' in path.read_text()):
        assert time.monotonic() < until, f'batch {batch} was not reached'
        time.sleep(0.02)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory, data):
    """The batches of a run on local data: rows and losses."""
    folder = tmp_path_factory.mktemp('undisturbed')
    cfg = stage(folder, data, folder, 'undisturbed')
    dataset = cfg['train_loader']['dataset']
    dataset['new'] = {'local': str(data['new']), 'split': 'train'}
    dataset['replay']['streams'] = {'old': {'local': str(data['old']), 'split': 'train'}}
    cfg['eval_loader'][0]['dataset'] = {'max_seq_len': tiny.SEQ_LEN, 'local': str(data['new']), 'split': 'val'}
    assert not here(cfg, folder)
    lines = recorder.read(cfg['callbacks']['recorder']['path'])
    assert len(lines) == 24
    return [(line['rows'], line['loss']) for line in lines.values()]


def batches(cfg: dict) -> list:
    """Of all attempts; a batch that was trained twice was trained on the same rows, or ``read`` fails."""
    return [(line['rows'], line['loss']) for line in recorder.read(cfg['callbacks']['recorder']['path']).values()]


def error_of(printed: str) -> str:
    """The one line: the last, and no traceback before it."""
    last = printed.strip().splitlines()[-1]
    assert 'Traceback' not in printed, printed[-4000:]
    return last


def stock(cache: Path, **over) -> str:
    """What Streaming itself does: one dataset read in a loop."""
    try:
        dataset = StreamingDataset(**stream(cache, 'new'), batch_size=8, predownload=16, **over)
        rows = [row['tokens'].tolist() for row in dataset]
    except Exception as error:
        return f'dies: {type(error).__name__}'
    good = [row[1] * 100 + row[2] for row in rows] == list(range(400))
    return 'all rows' if good else f'ends after {len(rows)} of 400 rows, no error'


PASSING = {
    'latency of 0.2 s': Faults('GET .*mds', latency=0.2),
    '6 answers 503': Faults('train/.*mds', 6, status=503),
    '6 answers 500': Faults('train/.*mds', 6, status=500),
    'connection reset, 12 times': Faults('GET .*train/.*mds', 12, reset_after=700),
    'body cut short, 12 times': Faults('GET .*train/.*mds', 12, cut_after=700),
    'flipped bytes on the way, twice': Faults('GET .*train/.*mds', 2, flip=True),
}


def again(faults: Faults) -> Faults:
    return Faults(**vars(faults))


@pytest.mark.parametrize('fault', PASSING)
def test_goes_on(proxy, tmp_path, data, undisturbed, fault):
    proxy.faults = again(PASSING[fault])
    by_stock = stock(tmp_path / 'stock')
    cfg = stage(tmp_path, data, tmp_path / 'cache', 'run')
    proxy.faults = again(PASSING[fault])
    begin = time.monotonic()
    assert not here(cfg, tmp_path)
    seconds = time.monotonic() - begin
    assert proxy.spoilt > 0
    assert batches(cfg) == undisturbed
    TABLE.append((fault, by_stock, 'goes on', f'{seconds:.0f}', 'equal (never stopped)'))


def test_server_gone_for_20_s_and_back(proxy, tmp_path, data, undisturbed):
    timer = threading.Timer(20, proxy.come_back)
    dataset = StreamingDataset(**stream(tmp_path / 'stock', 'new'), batch_size=8, predownload=16)
    rows = iter(dataset)
    next(rows)
    proxy.go_away()
    timer.start()
    try:
        by_stock = f'ends after {1 + len(list(rows))} of 400 rows, no error'
    except RuntimeError as error:
        by_stock = f'dies: {error}'
    timer.join()
    cfg = stage(tmp_path, data, tmp_path / 'cache', 'run')

    def go_and_come_back():
        wait_for_batch(cfg, 2)
        proxy.go_away()
        time.sleep(20)
        proxy.come_back()

    threading.Thread(target=go_and_come_back).start()
    begin = time.monotonic()
    assert not here(cfg, tmp_path)
    assert batches(cfg) == undisturbed
    assert time.monotonic() - begin > 20
    TABLE.append(
        ('server gone for 20 s', by_stock, 'waits, goes on', f'{time.monotonic() - begin:.0f}', 'equal (never stopped)')
    )


def stops_and_resumes(fault, by_stock, cfg, tmp_path, undisturbed, mend, message, run=here):
    """A run that stops with ``message`` goes on when the fault is mended."""
    begin = time.monotonic()
    error = run(cfg, tmp_path)
    seconds = time.monotonic() - begin
    assert re.search(message, error), error
    done = batches(cfg) if Path(f'{cfg["callbacks"]["recorder"]["path"]}.rank0').exists() else []
    assert done == undisturbed[: len(done)] and len(done) < 24
    mend()
    assert not run(cfg, tmp_path)
    assert batches(cfg) == undisturbed
    print(f'\n{fault}: {error}')
    TABLE.append((fault, by_stock, f'stops after {len(done)} batches: one line', f'{seconds:.0f}', 'equal'))


def late_shard(undisturbed) -> str:
    """A shard of the new data that is first read in the second half of the run."""
    first: dict[int, int] = {}
    for batch, (rows, _) in enumerate(undisturbed):
        for which, hundreds, rest in rows:
            if which == 0:
                first.setdefault((hundreds * 100 + rest) // 20, batch)
    return f'new/train/shard.{next(shard for shard, batch in first.items() if batch >= 10):05}.mds'


def test_missing_shard(proxy, tmp_path, data, undisturbed, bucket):
    key = late_shard(undisturbed)
    bucket.delete_object(Bucket='bucket', Key=key)
    by_stock = stock(tmp_path / 'stock')
    cfg = stage(tmp_path, data, tmp_path / 'cache', 'run')
    stops_and_resumes(
        'missing shard', by_stock, cfg, tmp_path, undisturbed,
        mend=lambda: bucket.upload_file(str(data['new'].parent / key), 'bucket', key),
        message=rf'^run stopped: s3://bucket/{key} cannot be downloaded: it is not there', run=apart,
    )  # fmt: skip


def test_shard_with_a_flipped_byte(proxy, tmp_path, data, undisturbed, bucket):
    key = late_shard(undisturbed)
    content = bytearray((data['new'].parent / key).read_bytes())
    content[-1] ^= 0xFF
    bucket.put_object(Bucket='bucket', Key=key, Body=bytes(content))
    rows = [row['tokens'].tolist() for row in StreamingDataset(**stream(tmp_path / 'stock', 'new'), batch_size=8)]
    right = [row['tokens'].tolist() for row in StreamingDataset(local=str(data['new']), split='train', batch_size=8)]
    wrong = sum(one != other for one, other in zip(rows, right, strict=True))
    cfg = stage(tmp_path, data, tmp_path / 'cache', 'run')
    stops_and_resumes(
        'shard with a flipped byte', f'serves {wrong} wrong row, no error', cfg, tmp_path, undisturbed,
        mend=lambda: bucket.upload_file(str(data['new'].parent / key), 'bucket', key),
        message=rf'^run stopped: s3://bucket/{key} is corrupt: its xxh64 is \w{{16}}, and the index says \w{{16}}, after 3 downloads',
    )  # fmt: skip


def test_missing_shard_of_an_evaluator(proxy, tmp_path, data, undisturbed, bucket):
    key = 'new/val/shard.00000.mds'
    bucket.delete_object(Bucket='bucket', Key=key)
    rows = list(StreamingDataset(**stream(tmp_path / 'stock', 'new', 'val'), batch_size=8))
    cfg = stage(tmp_path, data, tmp_path / 'cache', 'run')
    stops_and_resumes(
        'missing shard of an evaluator', f'ends after {len(rows)} of 16 rows, no error', cfg, tmp_path, undisturbed,
        mend=lambda: bucket.upload_file(str(data['new'] / 'val/shard.00000.mds'), 'bucket', key),
        message=r'^run stopped: s3://bucket/new/val/shard\.00000\.mds cannot be downloaded: it is not there', run=apart,
    )  # fmt: skip


def test_server_gone_for_good(proxy, tmp_path, data, undisturbed):
    cfg = stage(tmp_path, data, tmp_path / 'cache', 'run')
    cfg['train_loader']['dataset']['download_retry'] = 3

    def go():
        wait_for_batch(cfg, 5)
        proxy.go_away()

    threading.Thread(target=go).start()
    stops_and_resumes(
        'server gone for good (download_retry 3)', '-', cfg, tmp_path, undisturbed, mend=proxy.come_back,
        message=r'^run stopped: s3://bucket/.*mds cannot be read, after 4 attempts: EndpointConnectionError',
    )  # fmt: skip


@pytest.mark.skipif(os.getuid() != 0, reason='mounts a small disk')
def test_disk_full(proxy, tmp_path, data, undisturbed):
    disk = tmp_path / 'cache'
    disk.mkdir()
    subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=56k', 'tmpfs', str(disk)], check=True)
    try:
        by_stock = stock(disk / 'stock')
        subprocess.run(['rm', '-r', str(disk / 'stock')], check=True)
        cfg = stage(tmp_path, data, disk, 'run')
        cfg['train_loader']['dataset']['cache_limit'] = '1mb'
        stops_and_resumes(
            'disk full', by_stock, cfg, tmp_path, undisturbed,
            mend=lambda: subprocess.run(['mount', '-o', 'remount,size=1m', str(disk)], check=True),
            message=rf'^run stopped: no space for s3://bucket/.*mds in the cache folder {disk}/.* has 0 left, and cache_limit is 1,048,576',
        )  # fmt: skip
    finally:
        subprocess.run(['umount', '-l', str(disk)], check=True)


def test_cache_folder_of_a_live_run_and_a_restart_after_a_kill(proxy, tmp_path, data, undisturbed):
    cfg = stage(tmp_path, data, tmp_path / 'cache', 'run')
    other = stage(tmp_path, data, tmp_path / 'cache', 'other')
    run = start(cfg, tmp_path)
    wait_for_batch(cfg, 5)
    os.killpg(run.pid, signal.SIGSTOP)  # so that it does not end before the other
    begin = time.monotonic()
    beside = start(other, tmp_path)
    printed = finish(beside)
    seconds = time.monotonic() - begin
    assert beside.returncode == 0, printed[-4000:]
    assert f'the cache folder {tmp_path}/cache/new/train is in use by process {run.pid} on' in printed
    assert (tmp_path / 'cache' / 'new-run2' / 'train').is_dir()
    assert batches(other) == undisturbed
    assert run.poll() is None, 'it must be alive for this to mean anything'
    TABLE.append(('cache folder of a live run', 'not run', 'caches elsewhere', f'{seconds:.0f}', 'equal'))
    os.killpg(run.pid, signal.SIGKILL)  # with its resource tracker: shared memory stays
    run.communicate()
    left = len(_stale_shared_memory(f'{tmp_path}/cache/new/train'))
    begin = time.monotonic()
    printed = finish(start(cfg, tmp_path))
    assert batches(cfg) == undisturbed, printed[-4000:]
    assert left and not _stale_shared_memory(f'{tmp_path}/cache/new/train')
    TABLE.append(('killed, stale shared memory', 'not run', 'goes on', f'{time.monotonic() - begin:.0f}', 'equal'))
