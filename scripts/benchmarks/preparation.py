# SPDX-License-Identifier: Apache-2.0
"""Preparing text against ``tokenizers`` alone, and the memory of it for inputs of two sizes.

    python scripts/benchmarks/preparation.py [--megabytes 48] [--rounds 5] [--json FILE]

The text is the Python source of the installed packages as JSON lines, the tokenizer a byte-level BPE of 32,000 tokens
trained on it. Each round times, one after the other in one run: ``encode_batch`` and ``encode_batch_fast`` on all cores
(their own threads) over the documents in memory; and the whole preparation of the file, read, hashed, tokenised,
de-duplicated, packed and written, in processes that have been started. CPU seconds are those of all processes, and tell
more than the clock on a machine that does other things. Then the script, in a process of its own, on that file and on
one four times as large: seconds, and the most memory that it and its processes had together.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from cpt_algorithms.launch.processes import num_cores
from cpt_algorithms.preparation.engines import LocalEngine
from cpt_algorithms.preparation.options import Options, make_request
from cpt_algorithms.preparation.pipeline import prepare
from cpt_algorithms.preparation.sources import Part, Source, find_files, parse_sources, read
from cpt_algorithms.preparation.tokenizer import load_tokenizer, train_tokenizer
from cpt_algorithms.terminal import print_table

os.environ['TOKENIZERS_PARALLELISM'] = 'true'  # tokenizers looks at it when it first works
MAX_SEQ_LEN = 2048
SCRIPT = Path(__file__).parents[1] / 'prepare_data.py'


def write(root: Path, megabytes: int) -> list[str]:
    """Documents as ``1/0.jsonl`` and, four times and different each time, ``4/*.jsonl``; and a tokenizer."""
    source = Source.parse('x=installed:python')
    units = tuple((file, 0, 0) for file in find_files(source))
    texts, size = [], 0
    for text in filter(str.strip, read(Part(source, units, 0, 'text'))):
        size += len(text.encode())
        if size > megabytes * 1e6:
            break
        texts.append(text)
    for folder, copies in {'1': 1, '4': 4}.items():
        (root / folder).mkdir()
        for copy in range(copies):
            with open(root / folder / f'{copy}.jsonl', 'w', encoding='utf-8') as file:
                file.writelines(json.dumps({'text': f'# {copy}\n{text}' if copy else text}) + '\n' for text in texts)
    train_tokenizer(texts, 32_000).save_pretrained(root / 'tokenizer')
    return texts


def preparation(root: Path, engine: LocalEngine, tokenizer: Any) -> None:
    """All that the script does once its processes are there."""
    options = Options(out='out', dataset=[f'x=jsonl:{root}/1/*.jsonl'], tokenizer=str(root / 'tokenizer'))
    sources = parse_sources(options.dataset)
    files = {str(source): find_files(source) for source in sources}
    request = make_request(options, sources, files, MAX_SEQ_LEN, None, [])
    prepare(request, sources, files, root / 'partial', engine, tokenizer, [])
    shutil.rmtree(root / 'partial')


def command(root: Path, folder: str) -> list[str]:
    """The script, on the documents of a folder."""
    options = {
        'out': root / f'out{folder}',
        'dataset': f'x=jsonl:{root / folder}/*.jsonl',
        'tokenizer': root / 'tokenizer',
        'max-seq-len': MAX_SEQ_LEN,
        'workers': num_cores(),
    }
    return [sys.executable, str(SCRIPT), *(f'--{name}={value}' for name, value in options.items())]


def peak(command: list[str]) -> tuple[float, float]:
    """Seconds of a command, and the most GB that it and its processes had together, shared pages counted once."""
    start, most = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        top = psutil.Process(process.pid)
        while process.poll() is None:
            total = 0
            for one in [top, *top.children(recursive=True)]:
                try:
                    total += one.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            most = max(most, total)
            time.sleep(0.2)
    assert process.returncode == 0
    return time.perf_counter() - start, most / 1e9


def cpu_seconds() -> float:
    """Of this process and those that work for it."""
    own = psutil.Process()
    times = [one.cpu_times() for one in [own, *own.children(recursive=True)]]
    return sum(time.user + time.system for time in times)


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of a call, by the clock and of CPU."""
    start, cpu = time.perf_counter(), cpu_seconds()
    function()
    return time.perf_counter() - start, cpu_seconds() - cpu


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--megabytes', type=int, default=48, help='of text (default: 48)')
    parser.add_argument('--rounds', type=int, default=5, help='default: 5')
    parser.add_argument('--json', type=Path, help='also write the numbers there')
    options = parser.parse_intermixed_args()
    taken: dict[str, list[tuple[float, float]]] = {'encode_batch': [], 'encode_batch_fast': [], 'preparation': []}
    with tempfile.TemporaryDirectory() as folder, LocalEngine(num_cores()) as engine:
        root = Path(folder)
        texts = write(root, options.megabytes)
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        tokenizer = load_tokenizer(str(root / 'tokenizer'))
        backend = tokenizer.backend_tokenizer
        num_tokens = sum(len(one) + 1 for one in backend.encode_batch_fast(texts, add_special_tokens=False))
        preparation(root, engine, tokenizer)  # starts the processes
        for _ in tqdm(range(options.rounds), 'rounds', disable=None):
            for name in ('encode_batch', 'encode_batch_fast'):
                encode = getattr(backend, name)
                taken[name].append(timed(lambda encode=encode: encode(texts, add_special_tokens=False)))
            taken['preparation'].append(timed(lambda: preparation(root, engine, tokenizer)))
        sizes = {f'{factor}x': peak(command(root, factor)) for factor in ('1', '4')}
    best = min(('encode_batch', 'encode_batch_fast'), key=lambda name: statistics.median(taken[name]))
    title = f'{megabytes:.0f} MB, {num_tokens / 1e6:.1f} M tokens, {num_cores()} cores, {options.rounds} rounds'
    table = Table('', 'seconds', 'MB/s', 'M tokens/s', 'CPU seconds', title=title, title_justify='left')
    for name, values in taken.items():
        clock, cpu = zip(*values, strict=True)
        median = statistics.median(clock)
        spread = [f'{statistics.median(one):.2f} ({min(one):.2f} to {max(one):.2f})' for one in (clock, cpu)]
        table.add_row(name, spread[0], f'{megabytes / median:.2f}', f'{num_tokens / median / 1e6:.3f}', spread[1])
    console = Console(width=120)
    print_table(table, console)
    for number, what in enumerate(('the clock', 'CPU seconds')):
        ratios = [one[number] / ours[number] for one, ours in zip(taken[best], taken['preparation'], strict=True)]
        spread = f'{min(ratios):.2f} to {max(ratios):.2f}'
        console.print(f'preparation at {statistics.median(ratios):.2f}x of {best} by {what} ({spread}, round by round)')
    for name, (seconds, memory) in sizes.items():
        console.print(f'the script on {name} the text: {seconds:.1f} s, at most {memory:.2f} GB in all processes')
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({'taken': taken, 'sizes': sizes}, indent=2))


if __name__ == '__main__':
    main()
