# SPDX-License-Identifier: Apache-2.0
"""Averaging five checkpoints: against reading the same files to nowhere, and against mergekit, interleaved.

    python scripts/benchmarks/average_checkpoints.py [--mergekit PATH/TO/mergekit-yaml] [--json FILE]

Five bfloat16 Llama-shaped safetensors checkpoints of about 2 GB, near each other as a run's are, in the page cache.
Each round times, one after the other, reading all of them to nowhere (``cat`` to /dev/null; and with as many threads as
the averaging, each into a buffer that stays in its cache), our average (all of it, in this process, after the imports)
and mergekit's linear merge (its command line in a process of its own, without the time its ``--help`` takes, which is
its imports). Then the whole script's peak memory and time in a process of its own, and the result against a float64
reference, in units of the last place of bfloat16.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--gigabytes', type=float, default=2, help='of each checkpoint (default: 2)')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--mergekit', type=Path, help='its mergekit-yaml, of an environment of its own')
    parser.add_argument('--folder', type=Path, help='for 7 checkpoints (default: the temporary folder)')
    parser.add_argument('--json', type=Path, help='where the numbers go as well')
    return parser.parse_intermixed_args()


if __name__ == '__main__':
    OPTIONS = parse()  # before the imports that take seconds

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from cpt_algorithms.checkpoints.open import open_checkpoint
from cpt_algorithms.terminal import print_table
from cpt_algorithms.weight_averaging.offline import average as merge
from cpt_algorithms.weight_averaging.offline import averaged_checkpoint

SCRIPT = Path(__file__).parents[1] / 'average_checkpoints.py'
COUNT = 5
READ = 1 << 20

# Run in a process of its own, which has no other child: the peak is that of the command.
MEASURE = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
print(json.dumps({'seconds': time.perf_counter() - start, 'MB': peak}))
"""


def write(root: Path, gigabytes: float) -> list[Path]:
    """Checkpoints of a model whose embeddings are an eighth of it: weights of 0.02, that differ by 0.001."""
    from transformers import LlamaConfig

    hidden, inner, vocabulary = 2048, 5632, 32_000
    layer = 4 * hidden * hidden + 3 * hidden * inner
    num_layers = max(1, round((gigabytes * 1e9 / 2 - 2 * vocabulary * hidden) / layer))
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=num_layers, num_attention_heads=16,
        vocab_size=vocabulary, tie_word_embeddings=False, torch_dtype='bfloat16', architectures=['LlamaForCausalLM'],
    )  # fmt: skip
    shapes = {'model.embed_tokens.weight': (vocabulary, hidden)}
    for index in range(num_layers):
        block = f'model.layers.{index}'
        shapes |= {f'{block}.self_attn.{name}_proj.weight': (hidden, hidden) for name in 'qkvo'}
        shapes |= {f'{block}.mlp.{name}_proj.weight': (inner, hidden) for name in ('gate', 'up')}
        shapes |= {f'{block}.mlp.down_proj.weight': (hidden, inner)}
        shapes |= {f'{block}.{name}_layernorm.weight': (hidden,) for name in ('input', 'post_attention')}
    shapes |= {'model.norm.weight': (hidden,), 'lm_head.weight': (vocabulary, hidden)}
    # parts of one long noise: making 5 times 1e9 numbers would take longer than all the rest
    noise = torch.randn(80_000_000, generator=torch.Generator().manual_seed(0))

    def values(shape: tuple[int, ...], begin: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return noise[begin : begin + count].view(shape)

    folders = []
    for number in tqdm(range(COUNT), 'writing', disable=None):
        tensors = {
            name: (0.02 * values(shape, index) + 0.001 * values(shape, 1_000_000 * (number + 1))).to(torch.bfloat16)
            for index, (name, shape) in enumerate(shapes.items())
        }
        folders.append(root / f'ba{number}')
        folders[-1].mkdir()
        save_file(tensors, folders[-1] / 'model.safetensors', {'format': 'pt'})
        config.save_pretrained(folders[-1])
    return folders


def read_to_nowhere(folders: list[Path]) -> None:
    """Read all bytes once, into a buffer for each thread."""

    def read(share: tuple[Path, int, int]) -> None:
        path, begin, end = share
        buffer = memoryview(bytearray(READ))
        with open(path, 'rb', buffering=0) as file:
            while begin < end:
                begin += os.preadv(file.fileno(), [buffer[: end - begin]], begin)

    shares = []
    for folder in folders:
        path = folder / 'model.safetensors'
        size = path.stat().st_size
        step = -(-size // merge.THREADS)
        shares += [(path, begin, min(size, begin + step)) for begin in range(0, size, step)]
    with ThreadPoolExecutor(merge.THREADS) as pool:
        list(pool.map(read, shares))


def cat(folders: list[Path]) -> None:
    """Read all bytes once, as everybody does."""
    subprocess.run(
        ['cat', *(folder / 'model.safetensors' for folder in folders)], stdout=subprocess.DEVNULL, check=True
    )


def average(folders: list[Path], out: Path) -> None:
    """Our average."""
    checkpoints = [open_checkpoint(folder) for folder in folders]
    plan = averaged_checkpoint.make_plan(checkpoints, [1 / COUNT] * COUNT)
    small_files = averaged_checkpoint.find_small_files(checkpoints[-1], None)
    averaged_checkpoint.write_average(plan, out, 'hf', {}, small_files, '5GB', lambda num_bytes: None)


def errors(folders: list[Path], out: Path) -> tuple[float, int, int]:
    """Distances from the mean in float64, in units of the last place of the result.

    Returns:
        The largest; how many are more than rounding (0.5005); of how many.
    """
    worst, beyond, count = 0.0, 0, 0
    files = [safe_open(folder / 'model.safetensors', 'pt') for folder in folders]
    with safe_open(out / 'model.safetensors', 'pt') as result:
        for name in tqdm(result.keys(), 'checking', disable=None):
            mean = torch.stack([file.get_tensor(name) for file in files]).double().mean(0)
            # 8 bits of precision: the last of them is worth 2^(exponent - 8), frexp's mantissa being below 1
            unit = torch.ldexp(torch.ones_like(mean), torch.frexp(mean).exponent - 8)
            distance = (result.get_tensor(name).double() - mean).abs() / unit
            worst = max(worst, float(distance.max()))
            beyond += int((distance > 0.5005).sum())
            count += distance.numel()
    return worst, beyond, count


def timed(function, *arguments) -> float:
    """Seconds a call takes."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def measure(*command: str | Path) -> dict[str, float]:
    """Seconds and peak memory of a command."""
    arguments = [sys.executable, '-c', MEASURE, *map(str, command)]
    return json.loads(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)


def main(options: argparse.Namespace) -> None:
    """Measure, print a table, and write it as JSON."""
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        root = Path(name)
        folders = write(root, options.gigabytes)
        size = sum((folder / 'model.safetensors').stat().st_size for folder in folders)
        seconds: dict[str, list[float]] = {'cat > /dev/null': [], 'reading to nowhere': [], 'average_checkpoints': []}
        merge_config = root / 'merge.yaml'
        models = [{'model': str(folder), 'parameters': {'weight': 1.0}} for folder in folders]
        merge_config.write_text(json.dumps({'merge_method': 'linear', 'models': models, 'dtype': 'bfloat16'}))
        mergekit_peak, imports = 0.0, 0.0
        if options.mergekit:
            seconds['mergekit linear'] = []
            imports = min(measure(options.mergekit, '--help')['seconds'] for _ in range(2))
        for _ in tqdm(range(options.rounds), 'rounds', disable=None):
            shutil.rmtree(root / 'ours', ignore_errors=True)
            seconds['cat > /dev/null'].append(timed(cat, folders))
            seconds['reading to nowhere'].append(timed(read_to_nowhere, folders))
            seconds['average_checkpoints'].append(timed(average, folders, root / 'ours'))
            if options.mergekit:
                shutil.rmtree(root / 'theirs', ignore_errors=True)
                got = measure(options.mergekit, merge_config, root / 'theirs')
                seconds['mergekit linear'].append(got['seconds'] - imports)
                mergekit_peak = max(mergekit_peak, got['MB'])
        ours = measure(sys.executable, SCRIPT, *folders, '--out', root / 'script')
        same = (root / 'script' / 'model.safetensors').read_bytes() == (
            root / 'ours' / 'model.safetensors'
        ).read_bytes()
        assert same, 'the script and the function give the same bytes'
        worst, beyond, count = errors(folders, root / 'ours')
    title = (
        f'{COUNT} bfloat16 checkpoints of {size / COUNT / 1e9:.2f} GB, {options.rounds} rounds, {merge.THREADS} threads'
    )
    table = Table(title=title)
    # ratios are medians of rounds
    for column in (
        'what',
        'seconds (median)',
        'min-max',
        'GB/s read',
        'speed of cat',
        'of reading',
        'times as long as ours',
    ):
        table.add_column(column, justify='left' if column == 'what' else 'right')
    sides = ('cat > /dev/null', 'reading to nowhere', 'average_checkpoints')
    ratios = {}
    for what, each in seconds.items():
        speeds = [statistics.median(a / b for a, b in zip(seconds[side], each, strict=True)) for side in sides]
        ratios[what] = dict(zip([f'speed, as a part of {side}' for side in sides], speeds, strict=True))
        median = statistics.median(each)
        spread = f'{min(each):.2f}-{max(each):.2f}'
        table.add_row(
            what,
            f'{median:.2f}',
            spread,
            f'{size / median / 1e9:.2f}',
            *[f'{speed:.2f}' for speed in speeds[:2]],
            f'{1 / speeds[2]:.2f}',
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    print_table(table, console)
    if not options.mergekit:
        console.print('mergekit: skipped, no --mergekit given')
    else:
        console.print(f'mergekit: imports of {imports:.1f} s not counted; peak memory {mergekit_peak:,.0f} MB')
    console.print(
        f'the script in its own process: {ours["seconds"]:.1f} s with imports, peak memory {ours["MB"]:,.0f} MB'
    )
    console.print(
        f'distance from the float64 mean: at most {worst:.4f} units in the last place; more than 0.5005 (rounding) '
        f'in {beyond:,} of {count:,} elements, where values cancel'
    )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        results = {
            'seconds': seconds, 'ratios': ratios, 'bytes': size, 'threads': merge.THREADS, 'script': ours,
            'mergekit peak MB': mergekit_peak, 'largest distance': worst, 'beyond rounding': beyond, 'elements': count,
        }  # fmt: skip
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == '__main__':
    main(OPTIONS)
