# SPDX-License-Identifier: Apache-2.0
"""One table of what the benchmarks beside this file have written: ours, stock, floor, ratio, spread; also as bench.md.

    make bench                                              # runs them all, then this
    python scripts/benchmarks/summary.py runs/bench         # what is there already

A ratio is the median of rounds in which both sides ran in turns, with the least and the greatest of them.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cpt_algorithms.report.made_with import made_with
from cpt_algorithms.terminal import print_table


@dataclass(frozen=True)
class Line:
    """A row of the table.

    Args:
        part: The part of the library.
        what: What was measured, with its unit.
        ours: The median.
        stock: Of the stock part; None if there is none to compare with.
        floor: The least that anything could take; None if that was not measured.
        ratios: Ours over stock, or over the floor without one, of each round.
    """

    part: str
    what: str
    ours: float
    stock: float | None
    floor: float | None
    ratios: Sequence[float]


def training_step(found: dict[str, Any]) -> list[Line]:
    """Of training_step.py."""
    names = {
        'step': 'a training step, s', 'wait': 'of it, waiting for data, s', 'start': 'start to first batch, s',
        'save': 'saving a checkpoint, s', 'resume': 'resuming to first batch, s',
    }  # fmt: skip
    lines = []
    for key, what in names.items():
        ours, stock = (found[key][side] for side in ('ours', 'stock'))
        ratios = [a / b for a, b in zip(ours, stock, strict=True)]
        lines.append(Line('training', what, statistics.median(ours), statistics.median(stock), None, ratios))
    return lines


def replay_loader(found: dict[str, Any]) -> list[Line]:
    """Of replay_loader.py."""
    lines = []
    for workers, of in ((1, '1 worker'), (4, '4 workers')):
        stock = statistics.median(found[f'stock, one stream, {workers} workers']['samples/s'])
        for name in ('no replay', '5 %'):
            side = found[f'replay_text, {name}, {workers} workers']
            ours = statistics.median(side['samples/s'])
            replay = name if name == 'no replay' else f'{name} replay'
            lines.append(Line('reading', f'rows/s, {of}, {replay}', ours, stock, None, side['ratios']))
    for key, ours in found.items():
        if key.startswith('locality replay_text, '):
            stock = found[key.replace('replay_text', 'stock (py1e)')]['downloads per shard']
            limit = key.rpartition(' ')[2]
            what = f'downloads per shard, {"no cache limit" if limit == "None" else f"cache of {limit} shards"}'
            ratio = ours['downloads per shard'] / stock
            lines.append(Line('reading', what, ours['downloads per shard'], stock, 1.0, [ratio]))
        if key.startswith('start replay_text, '):
            both = found.get(key.replace('replay_text', 'stratified'))
            what = f'start, {int(key.split(", ")[1].split()[0]) // 10**6:,} M rows, s'
            stock = both['seconds'] if both else None
            ratios = [ours['seconds'] / stock] if stock else []
            lines.append(Line('reading', what, ours['seconds'], stock, None, ratios))
    return lines


def preparation(found: dict[str, Any]) -> list[Line]:
    """Of preparation.py; the floor is the faster of the tokenizers' own batch calls."""
    taken = {name: [clock for clock, _ in rounds] for name, rounds in found['taken'].items()}
    floor = min(statistics.median(taken[name]) for name in ('encode_batch', 'encode_batch_fast'))
    ours = taken['preparation']
    stock = statistics.median(taken['encode_batch'])
    ratios = [a / b for a, b in zip(ours, taken['encode_batch'], strict=True)]
    return [
        Line(
            'preparation',
            'text to shards, against encode_batch alone, s',
            statistics.median(ours),
            stock,
            floor,
            ratios,
        )
    ]


def weight_averages(found: dict[str, Any]) -> list[Line]:
    """Of weight_averages.py; the floor is what the memory traffic takes as a plain copy."""
    times = found['times']
    ratios = [a / b for a, b in zip(times['ours'], times['composer'], strict=True)]
    ours, stock, copy = (statistics.median(times[side]) for side in ('ours', 'composer', 'copy'))
    what = f'EMA update of {found["parameters"] / 1e6:.0f} M parameters, s'
    return [Line('averaging', what, ours, stock, 1.5 * copy, ratios)]


def average_checkpoints(found: dict[str, Any]) -> list[Line]:
    """Of average_checkpoints.py; the floor is reading the files. mergekit is the other tool, if it was given."""
    seconds = found['seconds']
    ours, cat = seconds['average_checkpoints'], seconds['cat > /dev/null']
    other = seconds.get('mergekit linear')
    against = other or cat
    ratios = [a / b for a, b in zip(ours, against, strict=True)]
    what = f'averaging {found["bytes"] / 1e9:.1f} GB of checkpoints, s'
    stock = statistics.median(other) if other else None
    return [Line('averaging', what, statistics.median(ours), stock, statistics.median(cat), ratios)]


def mask_documents(found: dict[str, Any]) -> list[Line]:
    """Of mask_documents.py; stock is the same step without it."""
    lines = []
    for name, times in found['times'].items():
        ratios = [a / b for a, b in zip(times['with'], times['without'], strict=True)]
        ours, stock = (statistics.median(times[side]) for side in ('with', 'without'))
        what = f'a step of {name}, rows of {found["length"]}, masked, s'
        lines.append(Line('mask_documents', what, ours, stock, None, ratios))
    return lines


PARTS: dict[str, Callable[[dict[str, Any]], list[Line]]] = {
    each.__name__: each
    for each in (
        training_step,
        replay_loader,
        mask_documents,
        preparation,
        weight_averages,
        average_checkpoints,
    )  # fmt: skip
}


COLUMNS = ('part', 'what', 'ours', 'stock', 'floor', 'ratio', 'range')
TITLE = (
    'ratio: ours / stock (ours / floor where there is no stock), median of rounds and their range; '
    'of rows/s, more is better, of the rest, less'
)


def cells(line: Line) -> list[str]:
    """A line as people read it."""
    numbers = [
        '' if value is None else f'{value:,.4g}' if value < 10_000 else f'{value:,.0f}'
        for value in (line.ours, line.stock, line.floor)
    ]
    ratio = f'{statistics.median(line.ratios):.3f}' if line.ratios else ''
    spread = f'{min(line.ratios):.2f} to {max(line.ratios):.2f}' if len(line.ratios) > 1 else ''
    return [line.part, line.what, *numbers, ratio, spread]


def table(lines: Sequence[Line]) -> Table:
    """For the terminal."""
    shown = Table(title=TITLE)
    for column in COLUMNS:
        shown.add_column(column, justify='left' if column in ('part', 'what') else 'right')
    for line in lines:
        shown.add_row(*cells(line))
    return shown


def page(lines: Sequence[Line]) -> str:
    """For documents."""
    rows = [COLUMNS, ['---'] * 2 + ['---:'] * 5, *map(cells, lines)]
    return '\n'.join([made_with(), '', f'{TITLE}.', '', *(f'| {" | ".join(row)} |' for row in rows), ''])


def lines_of(folder: Path) -> list[Line]:
    """Of the benchmarks whose numbers lie in a folder."""
    lines = []
    for name, read in PARTS.items():
        if (folder / f'{name}.json').exists():
            lines += read(json.loads((folder / f'{name}.json').read_text()))
        else:
            sys.stderr.write(f'{name}: not run, there is no {folder / name}.json\n')
    return lines


def main() -> None:
    """Read, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, help='with NAME.json of each benchmark')
    folder = parser.parse_intermixed_args().folder
    lines = lines_of(folder)
    (folder / 'bench.md').write_text(page(lines), encoding='utf-8')
    print_table(table(lines), Console(width=None if sys.stdout.isatty() else 140))


if __name__ == '__main__':
    main()
