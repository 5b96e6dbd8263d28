# SPDX-License-Identifier: Apache-2.0
"""Which k and nu: the loss of every window of LAWA along stages whose checkpoints were all kept.

    python recipes/continue_pretraining.py STAGE.yaml save_interval=10ba save_num_checkpoints_to_keep=-1
    python scripts/claims/lawa_window.py RUN... --k 2 5 10 20 --nu 10 20 40 80

Each cell is the mean, over the runs and over eight ends spread over the second half of a run, of the raw loss minus the
loss of the uniform average of the latest k checkpoints nu batches apart.
"""

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cpt_algorithms.terminal import print_table


def grid(run: Path, ks: list[int], nus: list[int], rows: int) -> dict[tuple[int, int], list[float]]:
    """Gains of one run by (k, nu)."""
    from kept_checkpoints import KeptCheckpoints  # torch and Composer, which take seconds to import

    from cpt_algorithms.weight_averaging.functional import window_weights

    kept = KeptCheckpoints(run, rows)
    last = kept.batches[-1]
    ends = [batch for batch in np.linspace(last / 2, last, 8).round(-1).astype(int).tolist() if batch in kept.batches]
    raw = {end: kept.loss({end: 1.0}) for end in ends}
    gains: dict[tuple[int, int], list[float]] = {}
    for k in ks:
        for nu in nus:
            for end in ends:
                window = [end - nu * back for back in reversed(range(k))]
                if all(batch in kept.batches for batch in window):
                    weights = window_weights('uniform', k)
                    gains.setdefault((k, nu), []).append(raw[end] - kept.loss(dict(zip(window, weights, strict=True))))
    return gains


def main() -> None:
    """Average, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', type=Path, help='save_folders of recipes/continue_pretraining.py')
    parser.add_argument('--k', nargs='+', type=int, default=[2, 5, 10, 20])
    parser.add_argument('--nu', nargs='+', type=int, default=[10, 20, 40, 80], help='batches')
    parser.add_argument('--rows', type=int, default=64, help='validation rows')
    arguments = parser.parse_intermixed_args()
    runs = [run for run in arguments.runs if (run / 'stage.json').exists()]
    grids = [grid(run, arguments.k, arguments.nu, arguments.rows) for run in track(runs, 'runs')]
    shown = Table('k', title=f'gain of LAWA, nats/token; {len(grids)} runs')
    for nu in arguments.nu:
        shown.add_column(f'nu {nu}', justify='right')
    for k in arguments.k:
        cells = []
        for nu in arguments.nu:
            means = [float(np.mean(gains[k, nu])) for gains in grids if (k, nu) in gains]
            spread = f' ± {np.std(means, ddof=1) / np.sqrt(len(means)):.3f}' if len(means) > 1 else ''
            cells.append(f'{np.mean(means):.3f}{spread}' if means else '')
        shown.add_row(str(k), *cells)
    print_table(shown, Console())
    Console().print('± is the standard error over runs; k x nu is the span of the window')


if __name__ == '__main__':
    main()
