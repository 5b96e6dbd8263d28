# SPDX-License-Identifier: Apache-2.0
"""Which weights to keep: exponential and latest-k averages of the trajectory, online and from any checkpoint.

The callbacks are imported when they are first asked for: averaging checkpoints needs neither Composer nor LLM Foundry.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cpt_algorithms.weight_averaging.functional import ema_weight, update_ema_, weighted_mean, window_weights

if TYPE_CHECKING:
    from cpt_algorithms.weight_averaging.averaged_weights import AveragedWeights
    from cpt_algorithms.weight_averaging.ema import EMA
    from cpt_algorithms.weight_averaging.lawa import LAWA

__all__ = ['EMA', 'LAWA', 'AveragedWeights', 'ema_weight', 'update_ema_', 'weighted_mean', 'window_weights']

_CALLBACKS = {'AveragedWeights': 'averaged_weights', 'EMA': 'ema', 'LAWA': 'lawa'}


def __getattr__(name: str) -> Any:
    if name in _CALLBACKS:
        return getattr(import_module(f'{__name__}.{_CALLBACKS[name]}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
