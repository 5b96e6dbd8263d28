# SPDX-License-Identifier: Apache-2.0
"""Warm up, cool down, hold; anneal on demand: Ibrahim et al. 2024, https://arxiv.org/abs/2403.08763, section 7.2."""

from composer.core import Time

from cpt_algorithms.schedulers import functional
from cpt_algorithms.schedulers.phase_scheduler import PhaseScheduler

__all__ = ['InfiniteScheduler']


class InfiniteScheduler(PhaseScheduler):
    """Warm-up, cooldown, constant for as long as the run lasts, anneal over its last ``t_anneal``.

    In a YAML: ``scheduler: {name: infinite, t_warmup: 3000000000tok, t_cooldown: 180000000000tok, alpha_const: 0.55,
    t_anneal: 0tok}``. A later stage, from the pre-anneal checkpoint: ``t_warmup: 0tok, t_cooldown: 0tok``.
    Extending ``max_duration`` changes nothing before the old anneal. Formulas: ``functional.infinite``.

    Args:
        t_warmup: Length of the warm-up, in the unit of ``max_duration``; not in dur, here and below.
        t_cooldown: Length of the cooldown to ``alpha_const``. The paper's: 60 % of the first stage.
        alpha_const: Multiplier of the constant phase. The paper's: 0.55.
        t_anneal: Length of the anneal, which ends with the run, at ``alpha_f``; ``0tok`` never anneals.
        cooldown: ``cosine`` or ``inv_sqrt``. Default: ``'cosine'``.
        anneal: ``exponential``, ``linear``, ``cosine`` or ``1-sqrt``. Default: ``'exponential'``.
        alpha_f: Multiplier at the end of the anneal; above 0 for ``exponential``. Default: ``0.1``.
        alpha_i: Multiplier at time 0. Default: ``0.0``.
        steepness: How early ``inv_sqrt`` falls, its alpha; not for ``cosine``. Default: ``DEFAULT_STEEPNESS``, 10.

    Raises:
        ValueError: See ``PhaseScheduler``; also for times in dur, an exponential to 0, a steepness without
            ``inv_sqrt``, or phases longer than the run.
    """

    def __init__(
        self,
        t_warmup: str | Time,
        t_cooldown: str | Time,
        alpha_const: float,
        t_anneal: str | Time,
        cooldown: str = 'cosine',
        anneal: str = 'exponential',
        alpha_f: float = 0.1,
        alpha_i: float = 0.0,
        steepness: float | None = None,
    ) -> None:
        super().__init__(
            functional.infinite,
            {'t_warmup': t_warmup, 't_cooldown': t_cooldown, 't_anneal': t_anneal},
            dur=False,
            alpha_const=alpha_const,
            cooldown=cooldown,
            anneal=anneal,
            alpha_f=alpha_f,
            alpha_i=alpha_i,
            steepness=steepness,
        )
