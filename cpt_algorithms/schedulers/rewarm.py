# SPDX-License-Identifier: Apache-2.0
"""Warm up again, and decay again or not: Ibrahim et al. 2024, https://arxiv.org/abs/2403.08763."""

from composer.core import Time

from cpt_algorithms.schedulers import functional
from cpt_algorithms.schedulers.phase_scheduler import PhaseScheduler

__all__ = ['RewarmConstantScheduler', 'RewarmCosineScheduler']


class RewarmCosineScheduler(PhaseScheduler):
    """Linear warm-up from ``alpha_i`` to 1, cosine to ``alpha_f`` at ``t_max``, then flat.

    In a YAML: ``scheduler: {name: rewarm_cosine, t_warmup: 0.01dur}``. Formula: ``functional.rewarm_cosine``.
    Source: Ibrahim et al. 2024, section 4.1.

    Args:
        t_warmup: Length of the warm-up, in the unit of ``max_duration`` or in dur. The paper's: ``0.01dur``.
        alpha_i: Multiplier at time 0. Default: ``0.0``.
        alpha_f: Multiplier from ``t_max`` on. Default: ``0.1``.
        t_max: End of the decay, in the same units. Default: ``'1dur'``.

    Raises:
        ValueError: See ``PhaseScheduler``; also if ``t_warmup`` is longer than ``t_max``.
    """

    def __init__(
        self,
        t_warmup: str | Time,
        alpha_i: float = 0.0,
        alpha_f: float = 0.1,
        t_max: str | Time = '1dur',
    ) -> None:
        times = {'t_warmup': t_warmup, 't_max': t_max}
        super().__init__(functional.rewarm_cosine, times, alpha_i=alpha_i, alpha_f=alpha_f)


class RewarmConstantScheduler(PhaseScheduler):
    """Linear warm-up from ``alpha_i`` to ``alpha``, then constant: the papers' baselines.

    In a YAML: ``scheduler: {name: rewarm_constant, t_warmup: 0ba, alpha: 0.1}`` stays at eta_min;
    ``{t_warmup: 0.01dur}`` re-warms and does not decay. Formula: ``functional.rewarm_constant``.
    Source: Ibrahim et al. 2024, section 6.1.2.

    Args:
        t_warmup: Length of the warm-up, in the unit of ``max_duration`` or in dur; 0 for none.
        alpha_i: Multiplier at time 0, if there is a warm-up. Default: ``0.0``.
        alpha: Multiplier from ``t_warmup`` on. Default: ``1.0``.

    Raises:
        ValueError: See ``PhaseScheduler``.
    """

    def __init__(self, t_warmup: str | Time, alpha_i: float = 0.0, alpha: float = 1.0) -> None:
        super().__init__(functional.rewarm_constant, {'t_warmup': t_warmup}, alpha_i=alpha_i, alpha=alpha)
