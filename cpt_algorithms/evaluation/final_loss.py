# SPDX-License-Identifier: Apache-2.0
"""``final_loss``: the papers' way of saying how good a run ended, as part of the run."""

import json
import time
from collections.abc import Callable
from math import ceil
from typing import Any

from composer.core import Callback, Event, State, TimeUnit
from composer.loggers import Logger
from composer.utils import dist, format_name_with_dist

from cpt_algorithms.duration import Duration
from cpt_algorithms.evaluation.functional import (
    by_average,
    final_loss,
    in_final_window,
    thinned,
    training_flops,
    without_averages,
)
from cpt_algorithms.files import write_json
from cpt_algorithms.replay.labels import label_every_token_of

__all__ = ['FinalLoss', 'batches_left', 'dataset_of', 'loss_of']


def dataset_of(label: str) -> str:
    """llm-foundry calls the evaluator of ``label: python`` ``eval/python``."""
    return label.removeprefix('eval/')


def loss_of(state: State, metric: str) -> float | None:
    """Loss of the dataset that was just evaluated, at ``Event.EVAL_END``; ``None`` if it is not judged by one."""
    label = str(state.dataloader_label)
    found = state.eval_metrics.get(label, {}).get(metric)
    if found is None:
        return None
    if not state.eval_timestamp.batch.value:
        dataset = dataset_of(label)
        raise ValueError(f'eval_loader {dataset}: it is empty, or has less than a batch and drop_last=true')
    return float(found.compute())


def batches_left(state: State) -> int:
    """Batches that are still to be trained, of a run that has trained at least one."""
    assert state.max_duration is not None, 'training has begun'
    done, batches = state.timestamp.get(state.max_duration.unit).value, state.timestamp.batch.value
    if state.max_duration.unit == TimeUnit.EPOCH:
        assert state.dataloader_len is not None, 'replay_text knows its length'
        return max(int(state.max_duration.value) * int(state.dataloader_len.value) - batches, 0)
    return max(ceil((state.max_duration.value - done) / (done / batches) - 1e-9), 0)


class FinalLoss(Callback):
    """Validation loss over the last ``window`` of a run, every ``interval``, as mean and standard error.

    Adds the evaluations of the final window to whatever ``eval_interval`` asks for, on every evaluation dataset; the
    YAML needs nothing else. All validation losses of the run, with their batch and token, learning rate and loss of its
    batches and what it has cost are kept in the checkpoint, so a restart neither loses nor repeats one. They are
    written to ``save_folder/losses.json`` after every evaluation. At the end, ``final_loss/<dataset>``, ``..._stderr``,
    ``final_loss/mean``, ``cost/tokens``, ``cost/flops`` and ``cost/device_hours`` are logged.

    Args:
        save_folder: Where ``losses.json`` goes, a path or URI; ``{run_name}`` is filled in. ``None`` writes no file.
            Default: ``None``.
        window: The window, in batches. Default: ``100ba``.
        interval: Batches between its evaluations. Default: ``10ba``.
        metric: Name of the loss among the evaluation metrics. Default: ``LanguageCrossEntropy``.

    Raises:
        ValueError: If a time is not in batches, or the interval is longer than the window; if a validation dataset is
            empty.

    Cost: ``window / interval`` evaluations of every dataset.

    Source: Ibrahim et al. 2024, captions of Tables 2-4 (last 100 iterations, every 10).
    """

    def __init__(
        self,
        save_folder: str | None = None,
        window: str = '100ba',
        interval: str = '10ba',
        metric: str = 'LanguageCrossEntropy',
    ) -> None:
        self.window, self.interval = (
            int(Duration.parse(f'callbacks.final_loss.{key}', value, units=('ba',)).value)
            for key, value in (('window', window), ('interval', interval))
        )
        if not 1 <= self.interval <= self.window:
            raise ValueError(f'callbacks.final_loss.interval={interval} must be at least 1ba, at most window={window}')
        self.save_folder = save_folder
        self.metric = metric
        self.losses: dict[str, list[list[float]]] = {}  # {dataset: [[batch, token, loss, in final window], ...]}
        self.learning_rate: list[list[float]] = []  # [[batch, token, learning rate], ...]
        self.training_loss: list[list[float]] = []  # [[batch, token, training loss], ...]
        self.device_seconds = 0.0
        self._since = 0.0
        self._parameters = 0

    def state_dict(self) -> dict[str, Any]:
        """All of it so far, as one JSON string: a single leaf in a sharded checkpoint."""
        kept = ('losses', 'learning_rate', 'training_loss', 'device_seconds')
        return {'losses': json.dumps({key: getattr(self, key) for key in kept})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what there was up to the checkpoint."""
        vars(self).update(json.loads(state['losses']))

    def init(self, state: State, logger: Logger) -> None:
        """Count the parameters, before FSDP leaves each rank a part of them."""
        self._parameters = sum(parameter.numel() for parameter in state.model.parameters())

    def _in_final_window(self, state: State) -> bool:
        return state.timestamp.batch.value > 0 and in_final_window(batches_left(state), self.window, self.interval)

    def eval_start(self, state: State, logger: Logger) -> None:
        """Judge by every real token, also where nothing is trained."""
        label_every_token_of(state)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Let every evaluator also run in the final window."""

        def also_in_final_window(label: str, usual: Callable[[State, Event], bool]) -> Callable[[State, Event], bool]:
            def due(state: State, event: Event) -> bool:
                is_due = usual(state, event) or (event == Event.BATCH_END and self._in_final_window(state))
                rows = self.losses.get(label)
                # Composer evaluates once more at the end of training, unless its own interval has just done so
                return is_due and not (rows and rows[-1][0] == state.timestamp.batch.value)

            return due

        for evaluator in state.evaluators:
            assert evaluator.eval_interval is not None, 'the trainer has set it'
            evaluator.eval_interval = also_in_final_window(dataset_of(evaluator.label), evaluator.eval_interval)
        self._since = time.monotonic()

    def batch_start(self, state: State, logger: Logger) -> None:
        """Note the learning rate that this batch is trained with."""
        at = state.timestamp
        point = [int(at.batch.value), int(at.token.value), float(state.optimizers[0].param_groups[0]['lr'])]
        self.learning_rate = thinned(self.learning_rate, point)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Note the loss of this batch before its step, and the time since the last one."""
        self._count_time()
        at = state.previous_timestamp
        assert at is not None, 'a batch has been trained'
        if (loss := state.total_loss_dict.get('loss/train/total')) is not None:
            self.training_loss = thinned(self.training_loss, [int(at.batch.value), int(at.token.value), loss])

    def eval_before_all(self, state: State, logger: Logger) -> None:
        """An evaluation is no training."""
        self._count_time()

    def eval_end(self, state: State, logger: Logger) -> None:
        """Note the loss of the dataset that was just evaluated."""
        loss = loss_of(state, self.metric)
        if loss is not None:
            batch, token = int(state.timestamp.batch.value), int(state.timestamp.token.value)
            row = [batch, token, loss, float(self._in_final_window(state))]
            self.losses.setdefault(dataset_of(str(state.dataloader_label)), []).append(row)

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """Write the file; log the final losses, before the last checkpoint is saved."""
        self._since = time.monotonic()
        if is_over := not batches_left(state):
            # a run may be stopped by the evaluation of one dataset, after that of others
            for rows in self.losses.values():
                rows[-1][3] = float(rows[-1][3] or rows[-1][0] == state.timestamp.batch.value)
        self._write(state)
        if is_over:
            final = self.final()
            for label, mean in final.items():
                logger.log_metrics({f'final_loss/{label}': mean['mean'], f'final_loss/{label}_stderr': mean['stderr']})
            means = {label: mean['mean'] for label, mean in final.items()}
            datasets = without_averages(dataset_of(evaluator.label) for evaluator in state.evaluators)
            for average, losses in by_average(means, datasets).items():
                key = f'final_loss/mean/{average}' if average else 'final_loss/mean'
                logger.log_metrics({key: sum(losses.values()) / len(losses)})
            cost = self._cost(state)
            flops = training_flops(cost['parameters'], cost['tokens'])
            hours = cost['device_seconds'] / 3600
            logger.log_metrics({'cost/tokens': cost['tokens'], 'cost/flops': flops, 'cost/device_hours': hours})

    def eval_standalone_end(self, state: State, logger: Logger) -> None:
        """Write the file."""
        self._write(state)

    def final(self) -> dict[str, dict[str, float]]:
        """``{dataset: {mean, stderr, count}}`` over the final window; empty before it."""
        result = {}
        for label, rows in self.losses.items():
            # a run that was extended has an earlier final window too
            if losses := [row[2] for row in rows if row[3] and rows[-1][0] - row[0] < self.window]:
                mean = final_loss(losses)
                result[label] = {'mean': mean.value, 'stderr': mean.stderr, 'count': mean.count}
        return result

    def _count_time(self) -> None:
        # Composer's own time is that of the wall clock, which may be set
        self._since, before = time.monotonic(), self._since
        # of a run that was started again on more ranks or fewer, each batch on its own
        self.device_seconds += (self._since - before) * dist.get_world_size()

    def _cost(self, state: State) -> dict[str, Any]:
        """Training so far; evaluation is left out."""
        return {
            'batch': int(state.timestamp.batch.value),
            'tokens': int(state.timestamp.token.value),
            'parameters': self._parameters,
            'device_seconds': self.device_seconds,
            'devices': dist.get_world_size(),
            'device': state.device.name,
        }

    def _write(self, state: State) -> None:
        if self.save_folder is not None and dist.get_global_rank() == 0:
            folder = format_name_with_dist(self.save_folder, state.run_name)
            written = {
                'losses': {label: [row[:3] for row in rows] for label, rows in self.losses.items()},
                'final': self.final(),
                'learning_rate': self.learning_rate,
                'training_loss': self.training_loss,
                'cost': self._cost(state),
            }
            write_json(f'{folder}/losses.json', written)
