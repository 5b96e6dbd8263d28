# SPDX-License-Identifier: Apache-2.0
"""``replay_text`` against stock Streaming, both in this process: reading speed, and the cost of starting an epoch.

    python scripts/benchmarks/replay_loader.py [--samples 20000] [--rounds 5] [--sizes 1000000 10000000]

Reading: samples per second of a DataLoader over packed samples of 2048 tokens in the page cache; stock is one stream of
StreamingTextDataset, ours the same stream and with 5 % replay. Rounds alternate; medians and spread. Starting: seconds
and peak memory until the first sample id is known, in a fresh process each.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from llmfoundry.data.text_data import StreamingTextDataset
from rich.console import Console
from rich.table import Table
from streaming import MDSWriter
from torch.utils.data import DataLoader

from cpt_algorithms.replay import ReplayTextDataset

SEQ_LEN = 2048
BATCH = 16

# Run in a process of its own. The stub is what streaming's batching methods ask a dataset for; no shards are needed.
STARTING = """
import json, resource, sys, time
import numpy as np
from types import SimpleNamespace
from streaming.base.batching import generate_work
from streaming.base.world import World
from cpt_algorithms.replay.functional import Interleaving, MixedSequence, shares_of, worker_slots
which, size = sys.argv[1], int(sys.argv[2])
shards, old_shards = np.full(size // 8192, 8192), np.full(size // 8192 // 4, 8192)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
if which == 'replay_text':
    sequence = MixedSequence(Interleaving(shares_of(0.05, {'old': 1})), [shards, old_shards], [9, 9])
    first = sequence(worker_slots(np.arange(1024), size // 2 // 1104 * 1104, 1104, 0, 1, 0, 1))
else:
    from streaming import StreamingDataset
    sizes = np.concatenate([shards, old_shards])
    counts = np.array([len(shards), len(old_shards)])
    amounts = [0.95, 0.05]
    streams = [
        SimpleNamespace(choose=int(size * 0.95 * a / 0.95), proportion=a) for a in amounts
    ]
    stub = SimpleNamespace(
        samples_per_shard=sizes, shards_per_stream=counts, shard_offset_per_stream=np.array([0, len(shards)]),
        sample_offset_per_shard=np.cumsum(sizes) - sizes, streams=streams, num_streams=2, shuffle=True,
        shuffle_algo='py1e', shuffle_seed=9, shuffle_block_size=1 << 18, num_canonical_nodes=1, batch_size=1104,
        partition_algo='relaxed', sampling_method='balanced', sampling_granularity=1, epoch_seed_change=True,
        initial_physical_nodes=None, _set_shuffle_block_size=lambda world: None, replication=None, epoch_size=size,
    )
    stub.resample_streams = lambda *a, **k: StreamingDataset.resample_streams(stub, *a, **k)
    generate_work(which, stub, World(1, 1, 1, 0), 0, 0)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps({'seconds': seconds, 'MB': peak / 1024}))
"""


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


def main() -> None:
    """Measure, print a table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--samples', type=int, default=20_000)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--sizes', type=int, nargs='*', default=[1_000_000, 10_000_000])
    parser.add_argument('--out', type=Path, default=Path('runs/bench_replay_loader.json'))
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as root:
        new, old = Path(root) / 'new', Path(root) / 'old'
        write(new, arguments.samples)
        write(old, arguments.samples // 4)
        common = {'tokenizer': None, 'max_seq_len': SEQ_LEN, 'batch_size': BATCH, 'shuffle': True}
        streams = {'new': {'local': str(new)}}
        replay = {'fraction': 0.05, 'streams': {'old': {'local': str(old)}}}
        sides = {
            'stock, one stream': StreamingTextDataset(local=str(new), **common),
            'replay_text, no replay': ReplayTextDataset(new=streams, **common),
            'replay_text, 5 %': ReplayTextDataset(new=streams, replay=replay, **common),
        }
        table = Table(title=f'reading {arguments.samples:,} samples of {SEQ_LEN} tokens, {arguments.rounds} rounds')
        for column in ('loader', 'workers', 'samples/s (median)', 'min-max', 'ratio to stock (median of rounds)'):
            table.add_column(column, justify='left' if column == 'loader' else 'right')
        for num_workers in (1, 4):
            rounds = [{name: speed(side, num_workers) for name, side in sides.items()} for _ in range(arguments.rounds)]
            for name in sides:
                speeds = [each[name] for each in rounds]
                ratio = statistics.median(each[name] / each['stock, one stream'] for each in rounds)
                median = statistics.median(speeds)
                results[f'{name}, {num_workers} workers'] = {'samples/s': speeds, 'ratio': ratio}
                spread = f'{min(speeds):,.0f}-{max(speeds):,.0f}'
                table.add_row(name, str(num_workers), f'{median:,.0f}', spread, f'{ratio:.2f}')
        console.print(table)
    table = Table(title='starting (or resuming) an epoch, one fresh process each')
    for column in ('method', 'samples', 'seconds', 'MB above imports'):
        table.add_column(column, justify='left' if column == 'method' else 'right')
    for size in arguments.sizes:
        for which in ('replay_text', 'stratified', 'random'):
            command = [sys.executable, '-c', STARTING, which, str(size)]
            measured = json.loads(
                subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
            )
            results[f'start {which}, {size} samples'] = measured
            table.add_row(which, f'{size:,}', f'{measured["seconds"]:.2f}', f'{measured["MB"]:.0f}')
    console.print(table)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1))


if __name__ == '__main__':
    main()
