# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of weight averaging, on plain numbers and tensors: no Composer, no ranks, no files."""

from collections.abc import Sequence
from math import expm1, fsum, isfinite, log, sqrt

import torch

__all__ = ['WINDOW_WEIGHTS', 'ema_weight', 'square_sum', 'update_ema_', 'weighted_mean', 'window_weights']

WINDOW_WEIGHTS = ('uniform', 'linear', 'ema', 'one_minus_sqrt')


def ema_weight(step: float, total: float, half_life: float) -> float:
    """Weight of the newest weights in an exponential moving average that began ``total`` ago.

    ``w = (1 - 2^(-step/half_life)) / (1 - 2^(-total/half_life))``

    The average is then ``a <- a + w (p - a)``. The denominator (as Adam's bias correction) makes it the average over
    exactly what was seen: the first update takes the weights as they are (``step == total``, so ``w == 1``), and what
    the model was before has no part in it. With equal steps, ``a_n = sum_i d^(n-i) p_i / sum_i d^(n-i)``, where
    ``d = 2^(-step/half_life)``.

    Args:
        step: Time since the last update, in the unit of the half-life.
        total: Time since averaging began, this step included.
        half_life: Time after which weights count half as much; positive.

    Returns:
        A number in (0, 1].
    """
    return expm1(-log(2) * step / half_life) / expm1(-log(2) * total / half_life)


def update_ema_(average: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor], weight: float) -> None:
    """``average <- average + weight (parameters - average)``, in place, over many tensors at once.

    Args:
        average: Float32 tensors.
        parameters: As many, of the same shapes and devices, of any floating-point dtype.
        weight: Of the newest weights, of :func:`ema_weight`.

    Cost: reads both and writes the average, once. Parameters of another dtype are cast one tensor at a time.
    """
    same = [(a, p) for a, p in zip(average, parameters, strict=True) if a.dtype == p.dtype]
    if same:
        averages, values = zip(*same, strict=True)
        torch._foreach_lerp_(averages, values, weight)  # pyright: ignore[reportPrivateImportUsage]
    for a, p in zip(average, parameters, strict=True):
        if a.dtype != p.dtype:
            a.lerp_(p.to(a.dtype), weight)


def window_weights(kind: str | Sequence[float], count: int, decay: float = 0.9) -> list[float]:
    """Weights of ``count`` checkpoints, oldest first; they sum to 1.

    | kind | weight of checkpoint i = 0 .. n-1 | source |
    |---|---|---|
    | ``uniform`` | ``1/n`` (LAWA; a linear decay of the learning rate, merged) | Sanyal et al. 2023; WSM |
    | ``linear`` | ``(i+1) / sum`` (WMA) | PMA, arXiv 2505.12082 |
    | ``ema`` | ``decay^(n-1-i) / sum`` | |
    | ``one_minus_sqrt`` | ``(sqrt(i+1) - sqrt(i)) / sqrt(n)``: gives the updates between checkpoints the weights |
    |  | ``1 - sqrt(i/n)`` of a 1-sqrt anneal, so the *oldest* counts most | WSM, arXiv 2507.17634 |

    Args:
        kind: One of the above, or the weights themselves.
        count: Number of checkpoints, at least 1.
        decay: For ``ema``, in (0, 1]. Default: ``0.9``.

    Returns:
        ``count`` weights.

    Raises:
        ValueError: If the kind is unknown, or given weights are not ``count`` finite numbers with sum 1.
    """
    if not isinstance(kind, str):
        given = [float(weight) for weight in kind]
        if len(given) != count:
            raise ValueError(f'weights={given}: {len(given)} weights for {count} checkpoints')
        if not all(map(isfinite, given)) or abs(fsum(given) - 1) > 1e-6:
            raise ValueError(f'weights={given} must be finite numbers with sum 1; their sum is {fsum(given):g}')
        return given
    if count < 1:
        raise ValueError(f'count={count}: there is nothing to average')
    if kind == 'uniform':
        raw = [1.0] * count
    elif kind == 'linear':
        raw = [float(i + 1) for i in range(count)]
    elif kind == 'ema':
        if not 0 < decay <= 1:
            raise ValueError(f'decay={decay} must be above 0 and at most 1')
        raw = [decay ** (count - 1 - i) for i in range(count)]
    elif kind == 'one_minus_sqrt':
        raw = [sqrt(i + 1) - sqrt(i) for i in range(count)]
    else:
        raise ValueError(f'weights={kind!r} is unknown; one of {", ".join(WINDOW_WEIGHTS)} is possible')
    total = fsum(raw)
    return [weight / total for weight in raw]


def weighted_mean(tensors: Sequence[torch.Tensor], weights: Sequence[float], device: torch.device) -> torch.Tensor:
    """``sum_i weights[i] tensors[i]`` on ``device``, accumulated in float32.

    Args:
        tensors: Of one shape; any floating-point dtype and device.
        weights: As many numbers.
        device: Where the result goes.

    Returns:
        A float32 tensor. Cost: one further tensor of memory.
    """
    result = tensors[0].to(device, torch.float32, copy=True).mul_(weights[0])
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        result.add_(tensor.to(device), alpha=weight)
    return result


def square_sum(tensor: torch.Tensor) -> float:
    """Sum of the squares of a floating-point tensor, in float64.

    Cost: one pass. On a CPU piece by piece, each in its cache: some six times as fast as torch's norm.
    """
    if tensor.device.type != 'cpu':
        return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
    pieces = (piece.double() for piece in tensor.reshape(-1).split(2**16))
    return fsum(float(torch.dot(piece, piece)) for piece in pieces)
