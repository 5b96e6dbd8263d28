# SPDX-License-Identifier: Apache-2.0
"""The gain of averaging the weights: raw, EMA and LAWA validation loss along finished or half-finished runs.

    python scripts/plot_averages.py runs/weight_averaging/* --out averages.png
    python scripts/plot_averages.py runs/weight_averaging/*spike* --spike 1221      # and how much of a spike it saw

A run is a folder with the `losses.json` of the `final_loss` callback. Runs that differ in their seed alone
(`...-s17`, `...-s18`) count as one, with a 95 % interval over seeds (Student's t).
"""

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.table import Table

from cpt_algorithms.evaluation.functional import by_average, steps_saved, without_averages
from cpt_algorithms.files import null_as_nan, read_json
from cpt_algorithms.report.tables import over_seeds
from cpt_algorithms.terminal import print_table

Curve = list[list[float]]
Groups = dict[str, list[dict[str, Curve]]]  # of runs that differ in their seed: {label: [[batch, loss], ...]} of each


def read(folders: list[Path], dataset: str | None) -> Groups:
    """Curves by group; a dataset is chosen by its name, and by default the first."""
    groups: dict[str, list[dict[str, Curve]]] = defaultdict(list)
    for folder in folders:
        path = folder / 'losses.json'
        measured: dict[str, Any] | None = read_json(path)
        if measured is None:
            sys.exit(
                f'{path} does not exist: the run has no final_loss callback with a save_folder, or no evaluation yet'
            )
        losses = null_as_nan(measured['losses'])
        name = dataset or next(iter(losses))
        if name not in losses:
            sys.exit(f'{path}: there is no dataset {name!r}; there are {", ".join(without_averages(losses))}')
        curves = {average or 'raw': of[name] for average, of in by_average(losses, [name]).items()}
        if len(curves) == 1:
            sys.exit(f'{path}: nothing was averaged in this run; add callbacks.ema or callbacks.lawa')
        group = re.sub(r'-s\d+$', '', folder.name)
        groups[group].append({key: [[row[0], row[2]] for row in rows] for key, rows in curves.items()})
    return groups


def at(curve: Curve, batch: float) -> float:
    """Loss at a batch, between evaluations on a straight line."""
    batches, losses = zip(*curve, strict=True)
    return float(np.interp(batch, batches, losses))


def rows_of(group: list[dict[str, Curve]], window: int, spike: int | None) -> list[list[str]]:
    """A table row for each average: gains by third of the run, steps saved, and the rise over a spike."""
    rows = []
    for name in group[0]:
        runs = [run for run in group if name in run]
        cells = [name]
        ends = [run['raw'][-1][0] for run in runs]
        for third in range(3):
            gains = []
            for run, last in zip(runs, ends, strict=True):
                points = [row for row in run[name] if third * last / 3 < row[0] <= (third + 1) * last / 3]
                if points:
                    gains.append(float(np.mean([at(run['raw'], batch) - loss for batch, loss in points])))
            cells.append('' if name == 'raw' or not gains else over_seeds(gains).text(3))
        late = [
            [loss for batch, loss in run[name] if batch > last - window] for run, last in zip(runs, ends, strict=True)
        ]
        cells.append(over_seeds([float(np.mean(losses)) for losses in late]).text(3))
        saved = [steps_saved(run['raw'], run[name], window) for run in runs]
        reached = [value for value in saved if value is not None]
        whole = f'{over_seeds(reached).text(0, 100)} %' if len(reached) == len(saved) else 'not reached'
        cells.append('' if name == 'raw' else whole)
        if spike is not None:
            rises = []
            for run in runs:
                before = max(row[0] for row in run[name] if row[0] <= spike)
                after = [loss for batch, loss in run[name] if spike < batch <= spike + window]
                rises.append(max(after) - at(run[name], before))
            cells.append(over_seeds(rises).text(3))
        rows.append(cells)
    return rows


def draw(groups: Groups, path: Path) -> None:
    """A panel for each group: mean over seeds, with the range of the seeds behind it."""
    figure, axes = plt.subplots(1, len(groups), figsize=(5.2 * len(groups), 4.4), squeeze=False, layout='constrained')
    for axis, (title, group) in zip(axes[0], groups.items(), strict=True):
        lowest = []
        for index, name in enumerate(group[0]):
            runs = [run[name] for run in group if name in run]
            batches = [row[0] for row in runs[0]]
            losses = np.array([[at(run, batch) for batch in batches] for run in runs])
            colour = 'black' if name == 'raw' else plt.get_cmap('tab10').colors[index % 10]  # pyright: ignore
            mean = losses.mean(0)
            axis.plot(batches, mean, color=colour, label=name, linewidth=1.1 if name == 'raw' else 1.6)
            axis.fill_between(batches, losses.min(0), losses.max(0), color=colour, alpha=0.15, linewidth=0)
            known = np.isfinite(mean)  # a run may have diverged
            if known.any():
                start = np.interp(batches[-1] / 4, np.array(batches)[known], mean[known])
                lowest.append((mean[known].min(), start))
        # the start of training would squeeze everything else into a line
        if lowest:
            axis.set_ylim(min(low for low, _ in lowest) - 0.05, max(start for _, start in lowest))
        axis.set(title=f'{title} ({len(group)} seeds)', xlabel='batches', ylabel='validation loss (nats/token)')
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Read, tabulate, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', type=Path, help='folders with losses.json')
    parser.add_argument('--dataset', help='name of an evaluation dataset; default: the first')
    parser.add_argument('--window', type=int, default=100, help='last batches whose mean is the loss to reach')
    parser.add_argument('--spike', type=int, help='batch of a jump: also show the highest loss in a window after it')
    parser.add_argument('--out', type=Path, default=Path('averages.png'))
    arguments = parser.parse_intermixed_args()
    if not (folders := [run for run in arguments.runs if run.is_dir()]):
        parser.error(f'{arguments.runs[0]} is no folder with losses.json')
    groups = read(folders, arguments.dataset)
    console = Console()
    console.width = max(console.width, 110)  # also where it is not a terminal
    columns = ['weights', 'gain, 1st third', '2nd third', '3rd third', f'loss, last {arguments.window}', 'steps saved']
    columns += [] if arguments.spike is None else ['rise in the spike']
    for name, group in groups.items():
        shown = Table(columns[0], title=f'{name}: {len(group)} seeds', title_justify='left')
        for column in columns[1:]:
            shown.add_column(column, justify='right')
        for row in rows_of(group, arguments.window, arguments.spike):
            shown.add_row(*row)
        print_table(shown, console)
    console.print('gain: raw loss minus averaged loss, nats/token; ± is the 95 % interval over seeds')
    draw(groups, arguments.out)
    console.print(f'{arguments.out}')


if __name__ == '__main__':
    main()
