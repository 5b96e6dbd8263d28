# SPDX-License-Identifier: Apache-2.0
"""Results of the sequences of yamls/claims/, as the claims ask for them: arrays with a number for each seed."""

from functools import cached_property
from pathlib import Path

import numpy as np
from judge import Runs
from kept_checkpoints import KeptCheckpoints
from training import RECOMMENDED, SEQUENCES, Model

from cpt_algorithms.weight_averaging.functional import window_weights

__all__ = ['Evidence', 'window_loss']


class Evidence:
    """All sequences of one model, at one number of tokens.

    Args:
        folder: Where their folders are, beside those of other models.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.weak, self.strong, self.infinite, self.averaging = (Runs(folder / name) for name in SEQUENCES)
        self.sampled = Runs(folder / 'sampled', self.strong.seeds)
        self.shifts = {'weak': (self.weak, 'stdlib'), 'strong': (self.strong, 'cpp')}

    def of(self, model: Model) -> 'Evidence':
        """The same of another model."""
        return Evidence(self.folder.parent / model.name)

    def forgetting(self, shift: str, percent: int = 0) -> np.ndarray:
        """On Python, of an update with this much replay."""
        runs, _ = self.shifts[shift]
        return runs.final(self.after(shift, percent), 'python') - runs.final('python', 'python')

    def after(self, shift: str, percent: int) -> str:
        """The run with this much replay."""
        return f'{self.shifts[shift][1]}-replay_{percent}pct'

    def on_new(self, shift: str, percent: int) -> np.ndarray:
        """Loss on the new data."""
        runs, new = self.shifts[shift]
        return runs.final(self.after(shift, percent), new)

    def mean_loss(self, shift: str, run: str) -> np.ndarray:
        """Mean of the losses on old and new data."""
        runs, new = self.shifts[shift]
        return runs.mean_final(run, ('python', new))

    def parameters(self, shift: str) -> int:
        """Of the model."""
        return self.shifts[shift][0].named('python')[0].parameters or 0

    def tokens(self, shift: str) -> int:
        """Of each stage."""
        return self.shifts[shift][0].named('python')[0].budget

    def gap(self, shift: str) -> np.ndarray:
        """Update minus union: mean loss with the replay fraction that the paper recommends for the shift."""
        return self._updated(shift) - self.mean_loss(shift, f'union_{self.shifts[shift][1]}')

    def mixture(self, shift: str) -> np.ndarray:
        """Matched minus union: what the update's mixture costs a model that is trained on nothing else."""
        new = self.shifts[shift][1]
        return self.mean_loss(shift, f'matched_{new}') - self.mean_loss(shift, f'union_{new}')

    def continuing(self, shift: str) -> np.ndarray:
        """Update minus matched: what it costs to have seen something else before."""
        return self._updated(shift) - self.mean_loss(shift, f'matched_{self.shifts[shift][1]}')

    def _updated(self, shift: str) -> np.ndarray:
        return self.mean_loss(shift, self.after(shift, RECOMMENDED[shift]))

    def line(self, shift: str, percent: int) -> dict[float, tuple[np.ndarray, np.ndarray]]:
        """Losses on old and new data of the points from the parent (0) to the update with this much replay (1)."""
        runs, new = self.shifts[shift]
        name = f'{self.after(shift, percent)}-line'
        labels = [label for label in runs.named(name)[0].final if label.startswith('python/')]
        averages = sorted(label.partition('/')[2] for label in labels)
        return {
            float(each.partition('_')[2]): (runs.final(name, 'python', each), runs.final(name, new, each))
            for each in averages
        }

    def best_within(self, shift: str, percent: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean losses of the best point of that line between its ends, of the parent, and of the update."""
        means = {alpha: np.mean(losses, axis=0) for alpha, losses in self.line(shift, percent).items()}
        parent, update = means.pop(0.0), means.pop(1.0)
        return np.min(list(means.values()), axis=0), parent, update

    def kept_by_samples(self, percent: int) -> np.ndarray:
        """Under the strong shift, of what true replay spares of the forgetting, the share that samples spare."""
        name = f'cpp-sampled_{percent}pct'
        without, true = self.forgetting('strong'), self.forgetting('strong', percent)
        sampled = self.sampled.final(name, 'python') - self.strong.final('python', 'python')
        return (without - sampled) / (without - true)

    def spike(self, run: str) -> np.ndarray:
        """How far the loss on Python rises in the first tenth of an update."""
        return self.strong.rise(run, 'python', self.strong.final('python', 'python'), 0.1)

    @cached_property
    def kept(self) -> list[KeptCheckpoints]:
        """The checkpoints of the constant run, of each seed."""
        return [KeptCheckpoints(Path(run.folder)) for run in self.averaging.named('python-constant')]

    def window_gain(self, k: int, nu: int) -> np.ndarray:
        """Raw loss minus that of a window of k checkpoints nu saves apart; mean over ends in the second half."""
        gains = []
        for kept in self.kept:
            last = len(kept.batches)
            ends = range(last // 2, last + 1, last // 8)
            gains.append(np.mean([window_loss(kept, end, 1, 1) - window_loss(kept, end, k, nu) for end in ends]))
        return np.array(gains)


def window_loss(kept: KeptCheckpoints, end: int, k: int, nu: int, kind: str = 'uniform') -> float:
    """Of ``k`` checkpoints, every ``nu``-th, up to the ``end``-th; fewer if there were not as many."""
    window = kept.batches[end - 1 :: -nu][:k][::-1]
    return kept.loss(dict(zip(window, window_weights(kind, len(window)), strict=True)))
