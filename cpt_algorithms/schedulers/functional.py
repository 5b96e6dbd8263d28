# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules as lists of phases: numbers in, a multiplier out. All times are in one unit.

Formulas: Ibrahim et al. 2024, *Simple and Scalable Strategies to Continually Pre-train Large Language Models*,
https://arxiv.org/abs/2403.08763, sections 4.1 and 7.2 (re-warming, infinite schedules); Hu et al. 2024, *MiniCPM*,
https://arxiv.org/abs/2404.06395 (warm-up, stable, decay); Hägele et al. 2024, https://arxiv.org/abs/2405.18392
(1-sqrt).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

__all__ = ['Phase', 'Schedule', 'Span', 'infinite', 'multiplier', 'rewarm_constant', 'rewarm_cosine', 'wsd']

COOLDOWNS = ('cosine', 'inv_sqrt')
ANNEALS = ('exponential', 'linear', 'cosine', '1-sqrt')

# No source was found for the steepness the paper used. With 10 the cooldown makes 85 % of its drop in its first half
# (cosine: 50 %) and starts 7 times as steep as a straight line. The classic 1/sqrt(t) decay is T_cooldown / T_warmup.
DEFAULT_STEEPNESS = 10.0

# Sums of fractions of the same run, such as 0.1 + 0.9, may miss it by rounding.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Phase:
    """One piece of a schedule: from the time and the value where the last phase ended, to ``until`` and ``end``.

    Args:
        name: What the table and the plot call it.
        until: Time at which it is over, from the schedule's start, in the schedule's unit. Times of ends, not lengths,
            so that a schedule's horizon is what it was asked to be and not a sum of rounded lengths.
        end: Multiplier at ``until`` and after it, exactly.
        shape: ``constant``, ``linear``, ``cosine``, ``inv_sqrt``, ``exponential`` or ``1-sqrt``.
        steepness: Alpha of ``inv_sqrt``, which no other shape has. Default: ``DEFAULT_STEEPNESS``.
    """

    name: str
    until: float
    end: float
    shape: str
    steepness: float | None = None


@dataclass(frozen=True)
class Span:
    """One row of a schedule's table: from ``begin`` to ``until`` the multiplier goes from ``start`` to ``end``."""

    name: str
    begin: float
    until: float
    start: float
    end: float
    shape: str


@dataclass(frozen=True)
class Schedule:
    """A start value and phases in order of time.

    Continuous by construction, as each phase starts where the last one ended. A phase without length is a jump to its
    ``end``; after the last phase the value stays. An exponential phase goes between values above 0.
    """

    start: float
    phases: tuple[Phase, ...]

    def spans(self, end: float | None = None) -> Iterator[Span]:
        """The phases that take time, each with where it starts, cut or prolonged to the end of the run if given."""
        begin, start = 0.0, self.start
        for phase in self.phases:
            until = phase.until if end is None else min(phase.until, end)
            if until > begin:
                stop = multiplier(self, until) if until < phase.until else phase.end
                yield Span(phase.name, begin, until, start, stop, phase.shape)
            begin, start = phase.until, phase.end
        if end is not None and end > begin:
            yield Span('flat', begin, end, start, start, 'constant')


def multiplier(schedule: Schedule, t: float) -> float:
    r"""Value of a schedule at time ``t``: the factor on the optimizer's learning rate.

    In a phase from time :math:`t_0` and value :math:`a` to time :math:`t_1` and value :math:`b`, with
    :math:`x = (t - t_0)/(t_1 - t_0)`:

    * constant: :math:`b`
    * linear: :math:`a + (b - a) x`
    * cosine: :math:`b + (a - b)/2 \cdot (1 + \cos \pi x)`
    * inv_sqrt: :math:`a + (b - a) \cdot h(x)/h(1)` with :math:`h(x) = 1/\sqrt{1 + \alpha x} - 1` and the steepness
      :math:`\alpha`
    * exponential: :math:`a (b/a)^x`
    * 1-sqrt: :math:`a + (b - a) \sqrt{x}`

    At and after :math:`t_1` the value is exactly :math:`b`. Source: see the module.
    """
    begin, value = 0.0, schedule.start
    for phase in schedule.phases:
        if t < phase.until:
            return _interpolate(phase, value, (t - begin) / (phase.until - begin))
        begin, value = phase.until, phase.end
    return value


def _interpolate(phase: Phase, start: float, x: float) -> float:
    drop = phase.end - start
    if phase.shape == 'constant':
        return phase.end
    if phase.shape == 'linear':
        return start + drop * x
    if phase.shape == 'cosine':
        return phase.end - drop / 2 * (1 + math.cos(math.pi * x))
    if phase.shape == 'inv_sqrt':
        steepness = DEFAULT_STEEPNESS if phase.steepness is None else phase.steepness
        return start + drop * _inv_sqrt(x, steepness) / _inv_sqrt(1.0, steepness)
    if phase.shape == 'exponential':
        return start * (phase.end / start) ** x
    return start + drop * math.sqrt(x)  # 1-sqrt


def _inv_sqrt(x: float, steepness: float) -> float:
    return 1 / math.sqrt(1 + steepness * x) - 1


def rewarm_cosine(t_warmup: float, t_max: float, alpha_i: float = 0.0, alpha_f: float = 0.1) -> Schedule:
    r"""Warm up to 1 again, decay again, then stay.

    :math:`\alpha_i + (1 - \alpha_i) t/T_{warmup}` up to :math:`T_{warmup}`, then
    :math:`\alpha_f + (1 - \alpha_f)/2 \cdot (1 + \cos \pi (t - T_{warmup})/(T_{max} - T_{warmup}))`.
    Source: Ibrahim et al. 2024, section 4.1, with :math:`\alpha = \eta/\eta_{max}`; theirs starts from 0, and their
    eta_min / eta_max is 0.1.
    """
    _check_time('t_max', t_max, above=True)
    _check_fits({'t_warmup': t_warmup}, 't_max', t_max)
    _check_values({'alpha_i': alpha_i, 'alpha_f': alpha_f})
    warm_up = Phase('warm-up', min(t_warmup, t_max), 1.0, 'linear')
    return Schedule(alpha_i, (warm_up, Phase('decay', t_max, alpha_f, 'cosine')))


def rewarm_constant(t_warmup: float, alpha_i: float = 0.0, alpha: float = 1.0) -> Schedule:
    r"""Warm up, then stay: the papers' constant baselines.

    :math:`\alpha_i + (\alpha - \alpha_i) t/T_{warmup}` up to :math:`T_{warmup}`, then :math:`\alpha`.
    ``t_warmup=0, alpha=0.1`` is *constant eta_min*; ``alpha=1`` is *re-warm without decay*.
    Source: Ibrahim et al. 2024, section 6.1.2.
    """
    _check_time('t_warmup', t_warmup)
    _check_values({'alpha_i': alpha_i, 'alpha': alpha})
    return Schedule(alpha_i, (Phase('warm-up', t_warmup, alpha, 'linear'),))


def infinite(
    t_warmup: float,
    t_cooldown: float,
    t_anneal: float,
    t_end: float,
    *,
    alpha_const: float,
    alpha_f: float = 0.1,
    alpha_i: float = 0.0,
    cooldown: str = 'cosine',
    anneal: str = 'exponential',
    steepness: float | None = None,
) -> Schedule:
    r"""Warm up, cool down to a constant, hold it however long the run lasts, anneal at its end.

    With :math:`t_{cd} = T_{warmup}`, :math:`t_{const} = t_{cd} + T_{cooldown}`, :math:`t_{ann} = t_{end} - T_{anneal}`:

    * up to :math:`t_{cd}`: :math:`\alpha_i + (1 - \alpha_i) t/T_{warmup}`
    * up to :math:`t_{const}`: from 1 to :math:`\alpha_{const}` by cosine or inv_sqrt, see ``multiplier``
    * up to :math:`t_{ann}`: :math:`\alpha_{const}`
    * up to :math:`t_{end}`: :math:`\alpha_{const} (\alpha_f/\alpha_{const})^{(t - t_{ann})/T_{anneal}}`, or another
      shape

    Moving ``t_end`` changes no value before the old anneal. A stage that continues an infinite schedule has neither
    warm-up nor cooldown. Source: Ibrahim et al. 2024, section 7.2; their alpha_const is 1.65e-4 / 3e-4 = 0.55.
    """
    _check_time('t_end', t_end, above=True)
    _check_fits({'t_warmup': t_warmup, 't_cooldown': t_cooldown, 't_anneal': t_anneal}, 'the run', t_end)
    _check_values({'alpha_i': alpha_i, 'alpha_const': alpha_const, 'alpha_f': alpha_f})
    _check_choice('cooldown', cooldown, COOLDOWNS)
    _check_choice('anneal', anneal, ANNEALS)
    if steepness is not None and cooldown != 'inv_sqrt':
        raise ValueError(f"steepness={steepness} belongs to cooldown 'inv_sqrt', not {cooldown!r}: leave it out")
    if steepness is not None and not (_is_number(steepness) and steepness > 0):
        raise ValueError(f'steepness={steepness!r} must be a positive number')
    if anneal == 'exponential' and t_anneal:
        _check_exponential('alpha_const', alpha_const)
        _check_exponential('alpha_f', alpha_f)
    t_const = min(t_warmup + t_cooldown, t_end)
    phases = (
        Phase('warm-up', t_warmup, 1.0, 'linear'),
        Phase('cooldown', max(t_warmup, t_const), alpha_const, cooldown, steepness),
        Phase('constant', max(t_const, t_end - t_anneal), alpha_const, 'constant'),
    )
    return Schedule(alpha_i, (*phases, Phase('anneal', t_end, alpha_f, anneal)) if t_anneal else phases)


def wsd(
    t_warmup: float,
    t_decay: float,
    t_max: float,
    *,
    alpha_f: float = 0.1,
    alpha_i: float = 0.0,
    decay: str = '1-sqrt',
    num_cycles: int = 1,
) -> Schedule:
    r"""Warm up, stable at 1, decay; once or several times.

    Cycle :math:`k` of :math:`n` is from :math:`kC` to :math:`(k + 1)C` with :math:`C = T_{max}/n`: linear to 1 over
    :math:`T_{warmup}` (from ``alpha_i`` in the first, from ``alpha_f``, where the last cycle ended, in the others), 1
    until :math:`(k + 1)C - T_{decay}`, then to ``alpha_f``, by default along :math:`1 - (1 - \alpha_f) \sqrt{x}`.
    Sources: Hu et al. 2024 (the schedule), Hägele et al. 2024 (1-sqrt).
    """
    _check_time('t_max', t_max, above=True)
    if isinstance(num_cycles, bool) or not isinstance(num_cycles, int) or num_cycles < 1:
        raise ValueError(f'num_cycles={num_cycles!r} must be a whole number of at least 1')
    whole = 't_max' if num_cycles == 1 else f'one of {num_cycles} cycles, t_max / num_cycles'
    _check_fits({'t_warmup': t_warmup, 't_decay': t_decay}, whole, t_max / num_cycles)
    _check_values({'alpha_i': alpha_i, 'alpha_f': alpha_f})
    _check_choice('decay', decay, ANNEALS)
    if decay == 'exponential':
        _check_exponential('alpha_f', alpha_f)
    phases = []
    bounds = [*(t_max * k / num_cycles for k in range(num_cycles)), t_max]
    for k, (begin, until) in enumerate(pairwise(bounds)):
        number = '' if num_cycles == 1 else f' {k + 1}'
        warm = min(begin + t_warmup, until)
        phases += [
            Phase(f'warm-up{number}', warm, 1.0, 'linear'),
            Phase(f'stable{number}', max(warm, until - t_decay), 1.0, 'constant'),
            Phase(f'decay{number}', until, alpha_f, decay),
        ]
    return Schedule(alpha_i, tuple(phases))


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f'{key}={value!r} is not a shape it can have; use one of {", ".join(choices)}')


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_time(key: str, value: float, above: bool = False) -> None:
    if not math.isfinite(value) or value < 0 or (above and not value):
        raise ValueError(f'{key}={value:g} must be a time {"above" if above else "of at least"} 0')


def _check_values(values: Mapping[str, float]) -> None:
    for key, value in values.items():
        if not (_is_number(value) and value >= 0):
            raise ValueError(f'{key}={value!r} must be a number of at least 0: it multiplies the learning rate')


def _check_exponential(key: str, value: float) -> None:
    if not value > 0:
        raise ValueError(
            f'{key}={value:g}: an exponential goes between values above 0; linear, cosine and 1-sqrt can anneal to 0'
        )


def _check_fits(lengths: dict[str, float], whole: str, total: float) -> None:
    for key, value in lengths.items():
        _check_time(key, value)
    needed = sum(lengths.values())
    if needed > total * (1 + _ROUNDING):
        terms = ' + '.join(f'{key} ({_number(value)})' for key, value in lengths.items())
        sum_ = f' = {_number(needed)}' if len(lengths) > 1 else ''
        raise ValueError(f'{terms}{sum_} is longer than {whole} ({_number(total)})')


def _number(value: float) -> str:
    # 15 digits: no digits of rounding, and no token rounded away from a token count
    return f'{value:.15g}'
