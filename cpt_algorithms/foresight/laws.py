# SPDX-License-Identifier: Apache-2.0
"""Laws of the loss: what it is at a share of old data, and along a schedule of the learning rate."""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.signal import lfilter

__all__ = ['annealing_loss', 'continual_loss', 'lr_sums', 'mixing_loss', 'multi_power_loss', 'share_at']

Array = NDArray[np.float64]


def mixing_loss(share: ArrayLike, c: float, k: float, b: float) -> Array:
    r"""Loss on one dataset at a share of old data, with model, length and schedule fixed.

    .. math:: L(r) = c + e^{k r + b}

    Args:
        share: :math:`r`, the replay fraction, 0 to 1.
        c: What no share of data removes, nats per token.
        k: Negative for old data, positive for new.
        b: Logarithm of what is above ``c`` without replay.

    Ye et al. 2024 (arXiv:2403.16952), section 3.
    """
    return c + np.exp(k * np.asarray(share, dtype=float) + b)


def share_at(loss: float, c: float, k: float, b: float) -> float:
    r"""The share at which :func:`mixing_loss` is ``loss``: :math:`r^* = (\ln(L - c) - b) / k`.

    At the loss of the untouched parent on old data it is the critical share, the smallest with which nothing is
    forgotten.

    Raises:
        ValueError: If the loss is not above ``c``: no share reaches it.
    """
    if loss <= c:
        raise ValueError(f'no share of old data brings the loss to {loss:.4f}: the law ends at {c:.4f}')
    return (math.log(loss - c) - b) / k


def lr_sums(lr: ArrayLike, warmup: int, decay: float = 0.999) -> tuple[Array, Array]:
    r"""Area and annealing area of a schedule, after each step.

    .. math:: S_1(s) = \sum_{i \le s} \eta_i, \quad
        S_2(s) = \sum_{i \le s} m_i, \quad m_i = \lambda m_{i-1} + (\eta_{i-1} - \eta_i)

    Args:
        lr: :math:`\eta_i` of each step.
        warmup: Steps in which a rising rate anneals nothing: the differences count from the next one on.
        decay: :math:`\lambda`.

    Tissue et al. 2024 (arXiv:2408.11029), section 2.
    """
    rates = np.asarray(lr, dtype=float)
    falls = np.zeros_like(rates)
    falls[1:] = rates[:-1] - rates[1:]
    falls[: warmup + 1] = 0
    momentum = lfilter([1.0], [1.0, -decay], falls)
    return np.cumsum(rates), np.cumsum(momentum)


def annealing_loss(s1: ArrayLike, s2: ArrayLike, l0: float, a: float, alpha: float, c: float) -> Array:
    r"""Loss along any schedule, of its two areas (:func:`lr_sums`): :math:`L_0 + A S_1^{-\alpha} - C S_2`.

    Tissue et al. 2024 (arXiv:2408.11029), equation 1.
    """
    return l0 + a * np.asarray(s1, dtype=float) ** -alpha - c * np.asarray(s2, dtype=float)


def continual_loss(
    s1: ArrayLike,
    s2: ArrayLike,
    s1_update: ArrayLike,
    s2_update: ArrayLike,
    *,
    l0: float,
    a: float,
    alpha: float,
    c: float,
    c_update: float,
    shift: float,
    e: float,
    beta: float,
) -> Array:
    r"""Loss along an update: the annealing law over both phases, and what the shift of the data adds.

    .. math:: L_0 + A (S_1 + S_1')^{-\alpha} - C S_2 - C' S_2' + B (1 - (1 + E S_1')^{-\beta})

    Args:
        s1: :math:`S_1` of the parent at its end.
        s2: :math:`S_2` of the parent at its end.
        s1_update: :math:`S_1'`, of the update alone.
        s2_update: :math:`S_2'`.
        l0: See :func:`annealing_loss`, as ``a``, ``alpha`` and ``c``.
        a: See above.
        alpha: See above.
        c: See above; of the parent's annealing.
        c_update: Of the update's.
        shift: :math:`B`, positive where the data moves away from what is judged, negative where it comes closer.
        e: How soon.
        beta: How it levels off.

    Wang et al. 2025 (arXiv:2505.07796), section 4.
    """
    own = np.asarray(s1_update, dtype=float)
    both = annealing_loss(np.asarray(s1, dtype=float) + own, s2, l0, a, alpha, c)
    return both - c_update * np.asarray(s2_update, dtype=float) + shift * (1 - (1 + e * own) ** -beta)


def multi_power_loss(
    lr: ArrayLike, *, l0: float, a: float, alpha: float, b: float, c: float, beta: float, gamma: float
) -> Array:
    r"""Loss after each step of any schedule; for comparison with :func:`annealing_loss`.

    .. math:: L_0 + A S_1(s)^{-\alpha} - B \sum_{k \le s} (\eta_{k-1} - \eta_k) G(\eta_k^{-\gamma} S_k(s)), \quad
        G(x) = 1 - (C x + 1)^{-\beta}

    with :math:`S_k(s) = \sum_{i=k}^s \eta_i` and :math:`\eta_0 = 0`: a warm-up, whose rates rise, adds to the loss.

    Luo et al. 2025 (ICLR), equation 2.
    """
    rates = np.asarray(lr, dtype=float)
    total = np.cumsum(rates)
    loss = l0 + a * total**-alpha
    before = np.concatenate([[0.0], total[:-1]])
    for step in np.flatnonzero(falls := -np.diff(rates, prepend=0.0)):
        since = total[step:] - before[step]
        loss[step:] -= b * falls[step] * (1 - (c * rates[step] ** -gamma * since + 1) ** -beta)
    return loss
