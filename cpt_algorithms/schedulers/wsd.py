# SPDX-License-Identifier: Apache-2.0
"""Warm up, stable, decay, once or several times: Hu et al. 2024, https://arxiv.org/abs/2404.06395."""

from composer.core import Time

from cpt_algorithms.schedulers import functional
from cpt_algorithms.schedulers.phase_scheduler import PhaseScheduler

__all__ = ['WSDScheduler']


class WSDScheduler(PhaseScheduler):
    """Warm-up to 1, stable, decay to ``alpha_f`` at ``t_max``, then flat; in one or several equal cycles.

    In a YAML: ``scheduler: {name: wsd, t_warmup: 0.01dur, t_decay: 0.1dur}``. Formula: ``functional.wsd``.
    Sources: Hu et al. 2024; the default decay is Hägele et al. 2024, https://arxiv.org/abs/2405.18392.

    Args:
        t_warmup: Length of each cycle's warm-up, in the unit of ``max_duration`` or in dur.
        t_decay: Length of each cycle's decay, in the same units.
        decay: ``1-sqrt``, ``linear``, ``cosine`` or ``exponential``. Default: ``'1-sqrt'``.
        alpha_f: Multiplier at the end of each cycle; above 0 for ``exponential``. Default: ``0.1``.
        alpha_i: Multiplier at time 0; later cycles warm up from ``alpha_f``. Default: ``0.0``.
        num_cycles: Equal parts of ``t_max``. Default: ``1``.
        t_max: End of the last cycle, in the same units. Default: ``'1dur'``.

    Raises:
        ValueError: See ``PhaseScheduler``; also for an exponential to 0, or a warm-up and decay longer than a cycle.
    """

    def __init__(
        self,
        t_warmup: str | Time,
        t_decay: str | Time,
        decay: str = '1-sqrt',
        alpha_f: float = 0.1,
        alpha_i: float = 0.0,
        num_cycles: int = 1,
        t_max: str | Time = '1dur',
    ) -> None:
        super().__init__(
            functional.wsd,
            {'t_warmup': t_warmup, 't_decay': t_decay, 't_max': t_max},
            decay=decay,
            alpha_f=alpha_f,
            alpha_i=alpha_i,
            num_cycles=num_cycles,
        )
