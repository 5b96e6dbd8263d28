# SPDX-License-Identifier: Apache-2.0
"""``ema``: exponential moving averages of the weights, by half-life in tokens, batches or share of the run."""

from collections.abc import Sequence
from typing import Any

import torch
from composer.core import State

from cpt_algorithms.weight_averaging.averaged_weights import AveragedWeights, parse_time
from cpt_algorithms.weight_averaging.functional import ema_weight, update_ema_

__all__ = ['EMA']


class EMA(AveragedWeights):
    """Exponential moving averages of the weights, on local shards.

    ``a <- a + w (p - a)`` with ``w = (1 - 2^(-step/half_life)) / (1 - 2^(-total/half_life))``, where ``step`` is the
    time since the last update and ``total`` that since averaging began: a proper average over what was seen since
    ``start``, in which the initial weights have no part (:func:`.functional.ema_weight`).

    An average is called ``ema_<half-life>``, as in ``metrics/eval/german/ema_100ba/LanguageCrossEntropy``. See
    :class:`~cpt_algorithms.weight_averaging.averaged_weights.AveragedWeights` for evaluation, checkpoints and export.

    Args:
        half_life: Time after which weights count half as much (``100ba``, ``50000000tok``, ``0.01dur``), or a list of
            several.
        start: Nothing is averaged before. Default: ``0ba``.
        interval: Time between updates. Longer ones cost less, and keep a very long half-life above float32's
            resolution (``w`` should be 1e-5 or more). Default: ``1ba``.
        resume_after: The checkpoint of a trunk with whose averages a branch goes on. Default: ``None``.

    Raises:
        ValueError: If a time is not in ba, tok, sp or dur, or a half-life is given twice; under FSDP1.

    Cost: 4 bytes per parameter and half-life, divided by the ranks that shard it; per update one read of the parameters
    and one read and write of each average.

    Source: the EMA of Sanyal et al. 2023 and of Ajroldi et al. 2025, debiased as in Adam.
    """

    key = 'ema'
    state_key = 'averages'

    def __init__(
        self,
        half_life: str | Sequence[str],
        start: str = '0ba',
        interval: str = '1ba',
        resume_after: str | None = None,
    ) -> None:
        super().__init__(start, interval, resume_after)
        given = [half_life] if isinstance(half_life, str) else list(half_life)
        times = [parse_time('callbacks.ema.half_life', value) for value in given]
        self.half_lives = {f'ema_{time}': time for time in times}
        if not times or len(self.half_lives) < len(times):
            raise ValueError(f'callbacks.ema.half_life={half_life!r} must be one time, or several different ones')
        self._averages: dict[str, list[torch.Tensor]] = {}
        # {name: {unit, begin, last}}: times in the unit of the half-life
        self._clocks: dict[str, dict[str, Any]] = {}

    def names(self) -> list[str]:
        """Averages that exist by now."""
        return list(self._averages)

    def average(self, name: str) -> list[torch.Tensor]:
        """This rank's shards of an average: float32, beside the parameters."""
        return self._averages[name]

    def on_start(self, state: State) -> None:
        """Start the clocks."""
        assert state.previous_timestamp is not None, 'a batch has ended'
        for name, time in self.half_lives.items():
            if name not in self._clocks:
                unit = self.resolve(time, state).unit
                self._clocks[name] = {'unit': unit, 'begin': self.time(state.previous_timestamp, unit)}

    def update(self, state: State) -> None:
        """Update every average."""
        parameters = self.shards.tensors()
        for name, time in self.half_lives.items():
            half_life, clock = self.resolve(time, state), self._clocks[name]
            now = self.time(state.timestamp, half_life.unit)
            if name in self._averages:
                weight = ema_weight(now - clock['last'], now - clock['begin'], half_life.value)
                update_ema_(self._averages[name], parameters, weight)
            else:
                self._averages[name] = [parameter.to(torch.float32, copy=True) for parameter in parameters]
            clock['last'] = now

    def should_load(self, name: str) -> bool:
        """Only half-lives that the YAML asks for."""
        return name in self.half_lives

    def saved(self) -> tuple[dict[str, list[torch.Tensor]], dict[str, Any]]:
        """The averages and their clocks."""
        return self._averages, {'clocks': self._clocks}

    def restore(self, saved: dict[str, list[torch.Tensor]], settings: dict[str, Any], state: State) -> list[str]:
        """Take back the averages that the YAML still asks for."""
        clocks = settings['clocks']
        complaints = [f'{name} of the checkpoint is not asked for any more' for name in saved.keys() - self.half_lives]
        for name, time in self.half_lives.items():
            unit = self.resolve(time, state).unit
            if name not in clocks or clocks[name]['unit'] != unit:
                complaints.append(f'the checkpoint holds no {name} in {unit}; it starts afresh from here')
                continue
            self._clocks[name] = clocks[name]
            if name in saved:
                self._averages[name] = [
                    # its own memory, not that of a file or of the loader
                    tensor.to(parameter.device, torch.float32, copy=True)
                    for tensor, parameter in zip(saved[name], self.shards.tensors(), strict=True)
                ]
        return complaints
