# SPDX-License-Identifier: Apache-2.0
"""Which weights to keep: exponential and latest-k averages of the trajectory, online and from any checkpoint."""

from typing import TYPE_CHECKING

from cpt_algorithms.lazy import lazy_names

if TYPE_CHECKING:
    from cpt_algorithms.weight_averaging.averaged_weights import AveragedWeights
    from cpt_algorithms.weight_averaging.ema import EMA
    from cpt_algorithms.weight_averaging.lawa import LAWA

__all__ = ['EMA', 'LAWA', 'AveragedWeights']

__getattr__ = lazy_names(__name__, {'AveragedWeights': 'averaged_weights', 'EMA': 'ema', 'LAWA': 'lawa'})
