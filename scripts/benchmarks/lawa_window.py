# SPDX-License-Identifier: Apache-2.0
"""Which k and nu: the loss of every window of LAWA along stages whose checkpoints were all kept.

    python recipes/continue_pretraining.py STAGE.yaml save_interval=10ba save_num_checkpoints_to_keep=-1
    python scripts/benchmarks/lawa_window.py RUN... --k 2 5 10 20 --nu 10 20 40 80

Each cell is the mean, over the runs and over eight ends spread over the second half of a run, of the raw loss minus the
loss of the uniform average of the latest k checkpoints nu batches apart.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import torch
from llmfoundry.utils.builders import build_composer_model, build_tokenizer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from streaming import StreamingDataset

from cpt_algorithms.checkpoints import safe_globals
from cpt_algorithms.weight_averaging import weighted_mean, window_weights

CPU = torch.device('cpu')


def load(path: Path) -> dict[str, torch.Tensor]:
    """The model's weights in a Composer checkpoint."""
    with torch.serialization.safe_globals(safe_globals()):
        return torch.load(path, weights_only=True, mmap=True)['state']['model']


def grid(run: Path, ks: list[int], nus: list[int], rows: int) -> dict[tuple[int, int], list[float]]:
    """Gains of one run by (k, nu)."""
    cfg = json.loads((run / 'stage.json').read_text())['config']
    tokenizer = build_tokenizer(cfg['tokenizer']['name'], dict(cfg['tokenizer']['kwargs']))
    section = {key: value for key, value in cfg['model'].items() if key != 'name'}
    model = build_composer_model(cfg['model']['name'], section, tokenizer).eval()
    place = cfg['eval_loader'][0]['dataset']
    dataset = StreamingDataset(local=place['local'], split=place['split'], batch_size=1)
    tokens = torch.stack([torch.tensor(dataset[index]['tokens']).long() for index in range(min(rows, len(dataset)))])
    found = {int(re.findall(r'-ba(\d+)', path.name)[0]): path for path in run.glob('ep*-ba*-rank0.pt')}
    weights = {batch: load(path) for batch, path in found.items()}

    def loss_of(state: dict[str, torch.Tensor]) -> float:
        model.load_state_dict(state)
        with torch.no_grad():
            logits = model({'input_ids': tokens}).logits
        return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))

    last = max(weights)
    ends = [batch for batch in np.linspace(last / 2, last, 8).round(-1).astype(int).tolist() if batch in weights]
    raw = {end: loss_of(weights[end]) for end in ends}
    gains: dict[tuple[int, int], list[float]] = {}
    for k in ks:
        for nu in nus:
            for end in ends:
                window = [end - nu * back for back in reversed(range(k))]
                if all(batch in weights for batch in window):
                    states = [weights[batch] for batch in window]
                    mean = {
                        name: weighted_mean([state[name] for state in states], window_weights('uniform', k), CPU)
                        for name in states[0]
                    }
                    gains.setdefault((k, nu), []).append(raw[end] - loss_of(mean))
    return gains


def main() -> None:
    """Average, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', type=Path, help='save_folders of recipes/continue_pretraining.py')
    parser.add_argument('--k', nargs='+', type=int, default=[2, 5, 10, 20])
    parser.add_argument('--nu', nargs='+', type=int, default=[10, 20, 40, 80], help='batches')
    parser.add_argument('--rows', type=int, default=64, help='validation rows')
    arguments = parser.parse_args()
    runs = [run for run in arguments.runs if (run / 'stage.json').exists()]
    grids = [grid(run, arguments.k, arguments.nu, arguments.rows) for run in track(runs, 'runs')]
    shown = Table('k', *(f'nu {nu}' for nu in arguments.nu), title=f'gain of LAWA, nats/token; {len(grids)} runs')
    for k in arguments.k:
        cells = []
        for nu in arguments.nu:
            means = [float(np.mean(gains[k, nu])) for gains in grids if (k, nu) in gains]
            spread = f' ± {np.std(means, ddof=1) / np.sqrt(len(means)):.3f}' if len(means) > 1 else ''
            cells.append(f'{np.mean(means):.3f}{spread}' if means else '')
        shown.add_row(str(k), *cells)
    Console().print(shown)
    Console().print('± is the standard error over runs; k x nu is the span of the window')


if __name__ == '__main__':
    main()
