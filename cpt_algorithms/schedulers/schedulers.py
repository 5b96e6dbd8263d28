# SPDX-License-Identifier: Apache-2.0
"""The schedules that a YAML can name; their formulas and sources are in ``functional``."""

from composer.core import Time

from cpt_algorithms.schedulers import functional
from cpt_algorithms.schedulers.phase_scheduler import PhaseScheduler

__all__ = ['InfiniteScheduler', 'RewarmConstantScheduler', 'RewarmCosineScheduler', 'WSDScheduler']


class RewarmCosineScheduler(PhaseScheduler):
    """Linear warm-up from ``alpha_i`` to 1, cosine to ``alpha_f`` at ``t_max``, then flat.

    In a YAML: ``scheduler: {name: rewarm_cosine, t_warmup: 0.01dur}``. Formula: ``functional.rewarm_cosine``.

    Args:
        t_warmup: Length of the warm-up, in the unit of ``max_duration`` or in dur. The paper's: ``0.01dur``.
        alpha_i: Multiplier at time 0. Default: ``0.0``.
        alpha_f: Multiplier from ``t_max`` on. Default: ``0.1``.
        t_max: End of the decay, in the same units. Default: ``'1dur'``.
    """

    def __init__(
        self, t_warmup: str | Time, alpha_i: float = 0.0, alpha_f: float = 0.1, t_max: str | Time = '1dur'
    ) -> None:
        times = {'t_warmup': t_warmup, 't_max': t_max}
        super().__init__(functional.rewarm_cosine, times, alpha_i=alpha_i, alpha_f=alpha_f)


class RewarmConstantScheduler(PhaseScheduler):
    """Linear warm-up from ``alpha_i`` to ``alpha``, then constant: the papers' baselines.

    In a YAML: ``scheduler: {name: rewarm_constant, t_warmup: 0ba, alpha: 0.1}`` stays at eta_min;
    ``{t_warmup: 0.01dur}`` re-warms and does not decay. Formula: ``functional.rewarm_constant``.

    Args:
        t_warmup: Length of the warm-up, in the unit of ``max_duration`` or in dur; 0 for none.
        alpha_i: Multiplier at time 0, if there is a warm-up. Default: ``0.0``.
        alpha: Multiplier from ``t_warmup`` on. Default: ``1.0``.
    """

    def __init__(self, t_warmup: str | Time, alpha_i: float = 0.0, alpha: float = 1.0) -> None:
        super().__init__(functional.rewarm_constant, {'t_warmup': t_warmup}, alpha_i=alpha_i, alpha=alpha)


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


class WSDScheduler(PhaseScheduler):
    """Warm-up to 1, stable, decay to ``alpha_f`` at ``t_max``, then flat; in one or several equal cycles.

    In a YAML: ``scheduler: {name: wsd, t_warmup: 0.01dur, t_decay: 0.1dur}``. Formula: ``functional.wsd``.

    Args:
        t_warmup: Length of each cycle's warm-up, in the unit of ``max_duration`` or in dur.
        t_decay: Length of each cycle's decay, in the same units.
        decay: ``1-sqrt``, ``linear``, ``cosine`` or ``exponential``. Default: ``'1-sqrt'``.
        alpha_f: Multiplier at the end of each cycle; above 0 for ``exponential``. Default: ``0.1``.
        alpha_i: Multiplier at time 0; later cycles warm up from ``alpha_f``. Default: ``0.0``.
        num_cycles: Equal parts of ``t_max``. Default: ``1``.
        t_max: End of the last cycle, in the same units. Default: ``'1dur'``.
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
