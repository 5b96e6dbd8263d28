# SPDX-License-Identifier: Apache-2.0
"""``final_loss``: the papers' way of saying how good a run ended, as part of the run."""

import json
import os
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

from composer.core import Callback, Event, State, Time, TimeUnit
from composer.loggers import Logger
from composer.utils import dist, format_name_with_dist

from cpt_algorithms.evaluation.functional import final_loss, in_final_window

__all__ = ['FinalLoss', 'write_json']


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all, even if the machine stops half-way.

    Args:
        path: The file; its folder is made if need be.
        value: Anything JSON can hold.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'.{path.name}.{os.getpid()}')
    with open(partial, 'w', encoding='utf-8') as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _dataset(label: str) -> str:
    # llm-foundry calls the evaluator of `label: python` "eval/python"
    return label.removeprefix('eval/')


class FinalLoss(Callback):
    """Validation loss over the last ``window`` of a run, every ``interval``, as mean and standard error.

    Adds the evaluations of the final window to whatever ``eval_interval`` asks for, on every evaluation dataset; the
    YAML needs nothing else. All validation losses of the run, with their batch and token, are kept in the checkpoint,
    so a restart neither loses nor repeats one; they are written to ``save_folder/losses.json`` after every evaluation
    and logged as ``final_loss/<dataset>`` at the end.

    Args:
        save_folder: Where ``losses.json`` goes; ``{run_name}`` is filled in. ``None`` writes no file.
            Default: ``None``.
        window: The window, in batches. Default: ``100ba``.
        interval: Batches between its evaluations. Default: ``10ba``.
        metric: Name of the loss among the evaluation metrics. Default: ``LanguageCrossEntropy``.

    Raises:
        ValueError: If a time is not in batches, or the interval is longer than the window.

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
        times = {'window': Time.from_input(window), 'interval': Time.from_input(interval)}
        for key, time in times.items():
            if time.unit != TimeUnit.BATCH or time.value < 1:
                raise ValueError(f'callbacks.final_loss.{key}={time.to_timestring()} must be in batches, such as 100ba')
        self.window, self.interval = (int(time.value) for time in times.values())
        if self.interval > self.window:
            raise ValueError(f'callbacks.final_loss.interval={interval} is longer than window={window}')
        self.save_folder = save_folder
        self.metric = metric
        # {dataset: [[batch, token, loss, in final window], ...]}
        self.losses: dict[str, list[list[float]]] = {}

    def state_dict(self) -> dict[str, Any]:
        """All losses so far, as one JSON string: a single leaf in a sharded checkpoint."""
        return {'losses': json.dumps(self.losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the losses up to the checkpoint."""
        self.losses = json.loads(state['losses'])

    def _in_final_window(self, state: State) -> bool:
        assert state.max_duration is not None, 'training has begun'
        done = state.timestamp.get(state.max_duration.unit).value
        batches = state.timestamp.batch.value
        if not batches:
            return False
        if state.max_duration.unit == TimeUnit.EPOCH:
            assert state.dataloader_len is not None, 'replay_text knows its length'
            left = int(state.max_duration.value) * int(state.dataloader_len.value) - batches
        else:
            left = ceil((state.max_duration.value - done) / (done / batches) - 1e-9)
        return in_final_window(max(left, 0), self.window, self.interval)

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
            evaluator.eval_interval = also_in_final_window(_dataset(evaluator.label), evaluator.eval_interval)

    def eval_end(self, state: State, logger: Logger) -> None:
        """Note the loss of the dataset that was just evaluated."""
        label = str(state.dataloader_label)
        metric = state.eval_metrics.get(label, {}).get(self.metric)
        if metric is not None:
            batch, token = int(state.timestamp.batch.value), int(state.timestamp.token.value)
            row = [batch, token, float(metric.compute()), float(self._in_final_window(state))]
            self.losses.setdefault(_dataset(label), []).append(row)

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """Write the file."""
        self._write(state)

    def eval_standalone_end(self, state: State, logger: Logger) -> None:
        """Write the file."""
        self._write(state)

    def final(self) -> dict[str, dict[str, float]]:
        """``{dataset: {mean, stderr, count}}`` over the final window; empty before it."""
        result = {}
        for label, rows in self.losses.items():
            if losses := [row[2] for row in rows if row[3]]:
                mean = final_loss(losses)
                result[label] = {'mean': mean.value, 'stderr': mean.stderr, 'count': mean.count}
        return result

    def fit_end(self, state: State, logger: Logger) -> None:
        """Log the final losses."""
        for label, mean in self.final().items():
            logger.log_metrics({f'final_loss/{label}': mean['mean'], f'final_loss/{label}_stderr': mean['stderr']})

    def _write(self, state: State) -> None:
        if self.save_folder is not None and dist.get_global_rank() == 0:
            folder = Path(format_name_with_dist(self.save_folder, state.run_name))
            rows = {label: [row[:3] for row in rows] for label, rows in self.losses.items()}
            write_json(folder / 'losses.json', {'losses': rows, 'final': self.final()})
