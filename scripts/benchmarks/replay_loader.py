# SPDX-License-Identifier: Apache-2.0
"""``replay_text`` against stock Streaming, both in one run: reading speed, starting, shard downloads, order.

    python scripts/benchmarks/replay_loader.py [--parts reading starting locality order] [--samples 20000] [--rounds 5]

reading: samples per second of a DataLoader over packed samples of 2048 tokens in the page cache; stock is one stream of
StreamingTextDataset, ours the same stream and with 5 % replay. Rounds alternate; medians and spread.
starting: seconds and peak memory above imports until the first sample id is known after resuming in the middle of an
epoch, in a fresh process each: the dataset's constructor with a real index.json (64 MB shards), 5 % replay of another
dataset of a quarter of the size, and the order.
locality: downloads per shard and the cache's peak over one epoch, under several cache limits.
order: the chance that two rows of one global batch come from the same shard, against Streaming's py1e.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

STOCK_SIZES = (1_000_000, 10_000_000, 50_000_000)
OUR_SIZES = (*STOCK_SIZES, 146_000_000, 10_000_000_000)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ('reading', 'starting', 'locality', 'order')
    parser.add_argument('--parts', nargs='*', choices=parts, default=parts)
    parser.add_argument('--samples', type=int, default=20_000)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--sizes', type=int, nargs='*', default=OUR_SIZES)
    parser.add_argument('--json', type=Path, help='also write the numbers there')
    return parser.parse_intermixed_args()


if __name__ == '__main__':
    OPTIONS = parse()  # before the imports that take seconds

import numpy as np
from llmfoundry.data.text_data import StreamingTextDataset
from rich.console import Console
from rich.table import Table
from streaming import MDSWriter
from streaming.base.shuffle import get_shuffle
from torch.utils.data import DataLoader
from tqdm import tqdm

from cpt_algorithms.replay.functional import ShuffledOrder
from cpt_algorithms.replay.replay_text import ReplayTextDataset

SEQ_LEN = 2048
BATCH = 16
PER_SHARD = 8178  # samples of 2048 int32 in a shard of 64 MB

# Run in a process of its own.
STARTING = """
import json, resource, sys, time
import numpy as np
from llmfoundry.data.text_data import StreamingTextDataset
from streaming import Stream
from cpt_algorithms.replay.replay_text import ReplayTextDataset
which, new, old, sample = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
common = dict(tokenizer=None, max_seq_len=2048, batch_size=1104, shuffle=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
if which == 'replay_text':
    replay = {'fraction': 0.05, 'streams': {'old': {'local': old}}}
    dataset = ReplayTextDataset(new={'new': {'local': new}}, replay=replay, **common)
else:
    streams = [Stream(local=new, proportion=0.95), Stream(local=old, proportion=0.05)]
    dataset = StreamingTextDataset(streams=streams, batching_method=which, num_canonical_nodes=1, **common)
# what Streaming does at the start of an epoch, in a run that resumes
state = {'epoch': 0, 'sample_in_epoch': sample, 'num_canonical_nodes': 1, 'shuffle_seed': 9176}
dataset.load_state_dict({**state, 'mix': dataset.mix} if which == 'replay_text' else state)
dataset._unique_worker_world = dataset._unique_rank_world.detect_workers()
dataset._parallel_worker_world = dataset._parallel_rank_world.detect_workers()
first = int(dataset._get_work(*dataset._resume_incr_epoch())[0])
dataset.spanner[first]
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps({'seconds': seconds, 'MB': peak / 1024}))
"""


def write_index(folder: Path, num_samples: int) -> None:
    """The index.json of a large dataset, as MDSWriter writes it; starting an epoch needs no shard."""
    folder.mkdir()
    with (folder / 'index.json').open('w') as file:
        file.write('{"shards": [')
        for number, first in enumerate(range(0, num_samples, PER_SHARD)):
            name, samples = f'shard.{number:05}.mds', min(PER_SHARD, num_samples - first)
            raw = {'basename': name, 'bytes': 67_092_639, 'hashes': {'xxh64': f'{hash(name) % (1 << 64):016x}'}}
            shard = {
                'column_encodings': [f'ndarray:int32:{SEQ_LEN}'], 'column_names': ['tokens'],
                'column_sizes': [4 * SEQ_LEN], 'compression': None, 'format': 'mds', 'hashes': ['xxh64'],
                'raw_data': raw, 'samples': samples, 'size_limit': 1 << 26, 'version': 2, 'zip_data': None,
            }  # fmt: skip
            file.write(', ' * (number > 0) + json.dumps(shard))
        file.write('], "version": 2}')


def write(folder: Path, num_samples: int) -> None:
    """Packed samples of random tokens."""
    rows = np.random.default_rng(0).integers(0, 50_000, (64, SEQ_LEN), dtype=np.int32)
    with MDSWriter(out=str(folder), columns={'tokens': f'ndarray:int32:{SEQ_LEN}'}) as writer:
        for index in range(num_samples):
            writer.write({'tokens': rows[index % 64]})


def speed(dataset: StreamingTextDataset, num_workers: int) -> float:
    """Samples per second over one epoch, from the first batch on."""
    batches = iter(DataLoader(dataset, batch_size=BATCH, num_workers=num_workers, drop_last=True))
    next(batches)
    start, count = time.perf_counter(), 0
    for batch in batches:
        count += len(batch)
    return count / (time.perf_counter() - start)


def table_of(title: str, *columns: str) -> Table:
    """A table whose first column is text."""
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify='right' if number else 'left')
    return table


def reading(root: Path, num_samples: int, num_rounds: int, results: dict[str, dict]) -> Table:
    """Samples per second."""
    new, old = root / 'new', root / 'old'
    write(new, num_samples)
    write(old, num_samples // 4)
    common = {'tokenizer': None, 'max_seq_len': SEQ_LEN, 'batch_size': BATCH, 'shuffle': True}
    streams = {'new': {'local': str(new)}}
    replay = {'fraction': 0.05, 'streams': {'old': {'local': str(old)}}}
    sides = {
        'stock, one stream': StreamingTextDataset(local=str(new), **common),
        'replay_text, no replay': ReplayTextDataset(new=streams, **common),
        'replay_text, 5 %': ReplayTextDataset(new=streams, replay=replay, **common),
    }
    title = f'reading {num_samples:,} samples of {SEQ_LEN} tokens, {num_rounds} rounds'
    table = table_of(title, 'loader', 'workers', 'samples/s (median)', 'min-max', 'ratio to stock', 'min-max')
    for num_workers in (1, 4):
        rounds = []
        for number in tqdm(range(num_rounds), f'{num_workers} workers', disable=None):
            order = list(sides) if number % 2 else list(sides)[::-1]  # whoever comes second finds a warmer machine
            rounds.append({name: speed(sides[name], num_workers) for name in order})
        for name in sides:
            speeds = [each[name] for each in rounds]
            ratios = [each[name] / each['stock, one stream'] for each in rounds]
            median, ratio = statistics.median(speeds), statistics.median(ratios)
            results[f'{name}, {num_workers} workers'] = {'samples/s': speeds, 'ratio': ratio, 'ratios': ratios}
            spread = f'{min(speeds):,.0f}-{max(speeds):,.0f}'
            ratio_spread = f'{min(ratios):.2f}-{max(ratios):.2f}'
            table.add_row(name, str(num_workers), f'{median:,.0f}', spread, f'{ratio:.2f}', ratio_spread)
    return table


def starting(root: Path, sizes: list[int], results: dict[str, dict]) -> Table:
    """Seconds and memory until an epoch has started."""
    table = table_of('starting in the middle of an epoch, a fresh process each', 'method', 'samples', 'seconds', 'MB')
    for size in tqdm(sizes, 'starting', disable=None):
        new, old = root / f'new-{size}', root / f'old-{size}'
        write_index(new, size)
        write_index(old, size // 4)
        methods = ['replay_text', 'stratified', 'random'] if size in STOCK_SIZES else ['replay_text']
        # an index.json over 16 MB is read once, and its table mapped from then on
        first = ['replay_text (first sight of the index)'] if size > max(STOCK_SIZES) else []
        for name in [*first, *methods]:
            which = name.split(' ')[0]
            command = [sys.executable, '-W', 'ignore', '-c', STARTING, which, new, old, size // 2 // 1104 * 1104]
            done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True, check=True)
            measured = json.loads(done.stdout.splitlines()[-1])
            results[f'start {name}, {size} samples'] = measured
            table.add_row(name, f'{size:,}', f'{measured["seconds"]:.2f}', f'{measured["MB"]:.0f}')
    return table


def locality(root: Path, results: dict[str, dict]) -> Table:
    """Downloads per shard and cache size over an epoch of 120 shards of 512 samples, shuffled 8 shards at a time."""
    shards, per_shard, tokens = 120, 512, 128
    remote = root / 'remote'
    row_bytes = 4 * tokens + 4
    columns = {'tokens': f'ndarray:int32:{tokens}'}
    with MDSWriter(out=str(remote), columns=columns, size_limit=per_shard * row_bytes + 300) as writer:
        for number in range(shards * per_shard):
            writer.write({'tokens': np.full(tokens, number, np.int32)})
    shard_bytes = (remote / 'shard.00000.mds').stat().st_size
    title = f'an epoch of {shards} shards, shuffle block of 8 shards'
    table = table_of(title, 'loader', 'cache limit (shards)', 'downloads per shard', 'peak cache (shards)')
    common = {
        'tokenizer': None, 'max_seq_len': tokens, 'batch_size': BATCH, 'shuffle': True,
        'shuffle_block_size': 8 * per_shard,
    }  # fmt: skip
    for limit in tqdm((None, 32, 24, 16), 'locality', disable=None):
        for name in ('stock (py1e)', 'replay_text'):
            local = str(root / f'{name}-{limit}')
            options = {**common, 'cache_limit': limit and limit * shard_bytes + (1 << 17)}
            if name == 'replay_text':
                dataset = ReplayTextDataset(new={'new': {'remote': str(remote), 'local': local}}, **options)
            else:
                dataset = StreamingTextDataset(remote=str(remote), local=local, num_canonical_nodes=1, **options)
            downloads, peak, seen = Counter(), 0, Counter()
            downloader = dataset.streams[0]._downloader
            download = downloader.download

            def count(source: str, *rest: object, downloads: Counter = downloads, download=download) -> None:
                downloads[source] += 1
                download(source, *rest)

            downloader.download = count
            for batch in DataLoader(dataset, batch_size=BATCH):
                peak = max(peak, dataset.cache_usage)
                seen.update(batch[:, 0].tolist())
            assert len(seen) >= 0.999 * shards * per_shard
            per = downloads.total() / shards
            results[f'locality {name}, limit {limit}'] = {'downloads per shard': per, 'peak bytes': peak}
            table.add_row(name, str(limit or 'none'), f'{per:.2f}', f'{peak / shard_bytes:.1f}')
    return table


def clumpiness(order: np.ndarray, per_shard: int, batch: int) -> float:
    """The chance that two rows of one batch come from the same shard."""
    batches = (order[: len(order) // batch * batch] // per_shard).reshape(-1, batch)
    counts = [np.unique(shards, return_counts=True)[1] for shards in batches]
    return float(np.mean([(c * (c - 1)).sum() / (batch * (batch - 1)) for c in counts]))


def order(results: dict[str, dict]) -> Table:
    """Clumpiness against Streaming's own shuffle with the same block, over 5 seeds."""
    title = 'chance that two rows of a global batch of 1104 are of one shard: mean (min-max) of 5 seeds'
    table = table_of(title, 'data', 'py1e', 'replay_text', 'ratio')
    for shards, per_shard, block in ((400, 8192, 1 << 18), (60, 8192, 1 << 18), (400, 1000, 20_000)):
        sizes = np.full(shards, per_shard)
        every = np.arange(shards * per_shard)
        stock = [clumpiness(get_shuffle('py1e', sizes, 1, s, 0, block), per_shard, 1104) for s in range(5)]
        ours = [clumpiness(ShuffledOrder(sizes, s, 0, block)(every), per_shard, 1104) for s in range(5)]
        means = [statistics.mean(side) for side in (stock, ours)]
        what = f'{shards} shards of {per_shard:,}, block {block:,}'
        results[f'order {what}'] = {'py1e': stock, 'replay_text': ours}
        cells = [f'{m:.4f} ({min(s):.4f}-{max(s):.4f})' for m, s in zip(means, (stock, ours), strict=True)]
        table.add_row(what, *cells, f'{means[1] / means[0]:.2f}')
    return table


def main(arguments: argparse.Namespace) -> None:
    """Measure, print tables, and write them as JSON."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for part in arguments.parts:
            if part == 'reading':
                console.print(reading(root, arguments.samples, arguments.rounds, results))
            elif part == 'starting':
                console.print(starting(root, list(arguments.sizes), results))
            elif part == 'locality':
                console.print(locality(root, results))
            else:
                console.print(order(results))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == '__main__':
    main(OPTIONS)
