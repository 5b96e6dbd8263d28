# SPDX-License-Identifier: Apache-2.0
"""What the averages of a trajectory are by their definitions, in float64."""

from pathlib import Path

import torch

from cpt_algorithms.weight_averaging.functional import window_weights


def weights_along(folder, batches=8):
    """The weights after each batch, as ``recorder`` keeps them."""
    paths = [Path(folder) / f'{batch}.pt' for batch in range(1, batches + 1)]
    return [torch.load(path, map_location='cpu', weights_only=True) for path in paths]


def expected_ema(weights, half_life, begin=0):
    """Of all since ``begin``, an update a batch."""
    counts = [2 ** (-(len(weights) - 1 - i) / half_life) for i in range(begin, len(weights))]
    return {
        name: sum(c * w[name].double() for c, w in zip(counts, weights[begin:], strict=True)) / sum(counts)
        for name in weights[0]
    }


def expected_lawa(weights, batches, kind='uniform'):
    """Of the weights after these batches."""
    shares = window_weights(kind, len(batches))
    return {
        name: sum(s * weights[b - 1][name].double() for s, b in zip(shares, batches, strict=True))
        for name in weights[0]
    }


def assert_near(tensors, expected):
    """As near as float32 can be."""
    for key, tensor in tensors.items():
        torch.testing.assert_close(tensor.double(), expected[key].double(), rtol=1e-6, atol=1e-8)
