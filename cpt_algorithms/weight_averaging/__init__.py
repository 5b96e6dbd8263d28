# SPDX-License-Identifier: Apache-2.0
"""Which weights to keep: exponential and latest-k averages of the trajectory, online and from any checkpoint."""

from cpt_algorithms.weight_averaging.averaged_weights import AveragedWeights
from cpt_algorithms.weight_averaging.ema import EMA
from cpt_algorithms.weight_averaging.functional import ema_weight, update_ema_, weighted_mean, window_weights
from cpt_algorithms.weight_averaging.lawa import LAWA

__all__ = ['EMA', 'LAWA', 'AveragedWeights', 'ema_weight', 'update_ema_', 'weighted_mean', 'window_weights']
