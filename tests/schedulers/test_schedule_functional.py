# SPDX-License-Identifier: Apache-2.0
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt_algorithms.schedulers import functional
from cpt_algorithms.schedulers.functional import (
    ANNEALS,
    COOLDOWNS,
    Phase,
    Schedule,
    Span,
    infinite,
    multiplier,
    rewarm_constant,
    rewarm_cosine,
    wsd,
)

COS = math.cos(math.pi / 10)

# schedule, then {t: value by hand}: phase ends and one step around them
TABLES = {
    'rewarm_cosine': (
        lambda: rewarm_cosine(10, 20, alpha_f=0.1),
        {0: 0.0, 1: 0.1, 9: 0.9, 10: 1.0, 11: 0.1 + 0.45 * (1 + COS), 15: 0.55, 19: 0.1 + 0.45 * (1 - COS), 20: 0.1}
        | {21: 0.1, 1000: 0.1},
    ),
    'rewarm_cosine from alpha_i': (
        lambda: rewarm_cosine(4, 8, 0.2, 0.0),
        {0: 0.2, 1: 0.4, 3: 0.8, 4: 1.0, 6: 0.5, 8: 0.0},
    ),
    'no warm-up': (lambda: rewarm_cosine(0, 10, alpha_f=0.5), {0: 1.0, 5: 0.75, 10: 0.5}),
    'constant eta_min': (lambda: rewarm_constant(0, alpha=0.1), {0: 0.1, 1: 0.1, 10**12: 0.1}),
    're-warm, no decay': (lambda: rewarm_constant(2), {0: 0.0, 1: 0.5, 2: 1.0, 3: 1.0}),
    'infinite, cosine': (
        lambda: infinite(10, 10, 10, 50, alpha_const=0.5, alpha_f=0.125),
        {0: 0.0, 9: 0.9, 10: 1.0, 11: 0.5 + 0.25 * (1 + COS), 15: 0.75, 20: 0.5, 21: 0.5, 39: 0.5, 40: 0.5}
        | {41: 0.5 * 0.25**0.1, 45: 0.25, 49: 0.5 * 0.25**0.9, 50: 0.125, 51: 0.125},
    ),
    'infinite, inv_sqrt': (  # steepness 8: h(1) = 1/3 - 1 = -2/3; at 3/8, 1 + 8 * 3/8 = 4 and h = -1/2
        lambda: infinite(0, 8, 0, 20, alpha_const=0.4, cooldown='inv_sqrt', steepness=8.0),
        {0: 1.0, 3: 1 - 0.6 * 0.75, 8: 0.4, 9: 0.4, 20: 0.4, 99: 0.4},
    ),
    'infinite, later stage': (
        lambda: infinite(0, 0, 4, 8, alpha_const=0.5, anneal='1-sqrt', alpha_f=0.0),
        {0: 0.5, 4: 0.5, 5: 0.25, 8: 0.0, 9: 0.0},
    ),
    'infinite, linear to 0': (
        lambda: infinite(0, 0, 4, 4, alpha_const=1.0, anneal='linear', alpha_f=0),
        {1: 0.75, 4: 0.0},
    ),
    'wsd': (
        lambda: wsd(5, 4, 20, alpha_f=0.0),
        {0: 0.0, 4: 0.8, 5: 1.0, 6: 1.0, 15: 1.0, 16: 1.0, 17: 0.5, 19: 1 - math.sqrt(0.75), 20: 0.0, 21: 0.0},
    ),
    'wsd, two cycles': (
        lambda: wsd(2, 2, 20, alpha_f=0.2, decay='linear', num_cycles=2),
        {0: 0.0, 1: 0.5, 2: 1.0, 8: 1.0, 9: 0.6, 10: 0.2, 11: 0.6, 12: 1.0, 18: 1.0, 19: 0.6, 20: 0.2, 21: 0.2},
    ),
}


@pytest.mark.parametrize('name', TABLES)
def test_table(name: str) -> None:
    make, table = TABLES[name]
    schedule = make()
    assert {t: multiplier(schedule, t) for t in table} == pytest.approx(table, rel=1e-12, abs=1e-15)


def test_phase_ends_are_exact() -> None:
    for make, _ in TABLES.values():
        schedule = make()
        for phase, after in zip(schedule.phases, [*schedule.phases[1:], None], strict=True):
            if after is None or after.until > phase.until:
                assert multiplier(schedule, phase.until) == phase.end


def test_the_defaults_are_those_of_the_docstrings() -> None:
    assert multiplier(rewarm_cosine(1, 2), 2) == 0.1
    assert multiplier(rewarm_constant(1), 2) == 1.0
    half = multiplier(infinite(0, 2, 0, 9, alpha_const=0.0, cooldown='inv_sqrt'), 1)
    assert half == pytest.approx(1 - 0.847, abs=1e-3)  # "85 % of its drop in its first half"
    assert functional.DEFAULT_STEEPNESS == 10.0


def test_spans_leave_out_jumps_and_show_the_tail() -> None:
    schedule = infinite(0, 10, 0, 30, alpha_const=0.5)
    assert list(schedule.spans(40)) == [
        Span('cooldown', 0, 10, 1.0, 0.5, 'cosine'),
        Span('constant', 10, 30, 0.5, 0.5, 'constant'),
        Span('flat', 30, 40, 0.5, 0.5, 'constant'),
    ]
    assert [s.until for s in schedule.spans()] == [10, 30]
    cut = list(rewarm_cosine(0, 20, alpha_f=0.0).spans(10))
    assert [(s.until, s.end) for s in cut] == [(10, pytest.approx(0.5))]


def test_phases_are_called_what_they_do() -> None:
    assert list(rewarm_constant(4, alpha=0.5).spans(8)) == [
        Span('warm-up', 0, 4, 0.0, 0.5, 'linear'),
        Span('flat', 4, 8, 0.5, 0.5, 'constant'),
    ]
    assert list(rewarm_cosine(4, 8).spans()) == [
        Span('warm-up', 0, 4, 0.0, 1.0, 'linear'),
        Span('decay', 4, 8, 1.0, 0.1, 'cosine'),
    ]
    assert list(infinite(1, 2, 3, 8, alpha_const=0.5).spans()) == [
        Span('warm-up', 0, 1, 0.0, 1.0, 'linear'),
        Span('cooldown', 1, 3, 1.0, 0.5, 'cosine'),
        Span('constant', 3, 5, 0.5, 0.5, 'constant'),
        Span('anneal', 5, 8, 0.5, 0.1, 'exponential'),
    ]
    assert list(wsd(1, 2, 5).spans()) == [
        Span('warm-up', 0, 1, 0.0, 1.0, 'linear'),
        Span('stable', 1, 3, 1.0, 1.0, 'constant'),
        Span('decay', 3, 5, 1.0, 0.1, '1-sqrt'),
    ]
    assert [span.name for span in wsd(1, 1, 6, num_cycles=2).spans()] == [
        *('warm-up 1', 'stable 1', 'decay 1'),
        *('warm-up 2', 'stable 2', 'decay 2'),
    ]


def test_a_span_before_a_jump_ends_at_its_own_end() -> None:
    spans = list(wsd(0, 2, 4, alpha_f=0.25, decay='linear', num_cycles=2).spans())
    assert [(s.name, s.start, s.end) for s in spans] == [('decay 1', 1.0, 0.25), ('decay 2', 1.0, 0.25)]


def test_extending_the_run_leaves_the_past_alone() -> None:
    short, long = (infinite(10, 20, 10, t_end, alpha_const=0.5) for t_end in (60, 600))
    assert [multiplier(short, t) for t in range(51)] == [multiplier(long, t) for t in range(51)]


def test_the_horizon_is_not_missed_by_rounding() -> None:
    # 0.1 + 0.9 of a run, three cycles of a run of 1000 tokens: neither refused nor short of the floor
    for t_max in (7, 1000, 10**12 + 1):
        for n in (1, 3, 7):
            schedule = wsd(0.1 * t_max / n, 0.9 * t_max / n, t_max, alpha_f=0.0, num_cycles=n)
            assert multiplier(schedule, t_max) == 0.0
            assert multiplier(schedule, t_max * (1 - 1e-9)) > 0.0


# ------------------------------------------------------------------------------- properties

lengths = st.integers(0, 10**9)
floors = st.sampled_from([0.0, 0.1, 1.0])


@st.composite
def schedules(draw) -> tuple[Schedule, float, float]:
    """Any schedule of ours, its horizon and its floor."""
    a, b, c, rest = draw(lengths), draw(lengths), draw(lengths), draw(st.integers(1, 10**9))
    kind = draw(st.sampled_from(['rewarm_cosine', 'infinite', 'wsd']))
    alpha_f = draw(floors)
    shape = draw(st.sampled_from([s for s in ANNEALS if alpha_f or s != 'exponential']))
    if kind == 'rewarm_cosine':
        return rewarm_cosine(a, a + rest, draw(floors), alpha_f), a + rest, alpha_f
    if kind == 'wsd':
        n = draw(st.integers(1, 4))
        t_max = n * (a + b + rest)
        return wsd(a, b, t_max, alpha_f=alpha_f, decay=shape, num_cycles=n), t_max, alpha_f
    const = draw(st.sampled_from([0.1, 0.55, 1.0]))
    cooldown = draw(st.sampled_from(COOLDOWNS))
    end = a + b + c + rest
    schedule = infinite(a, b, c, end, alpha_const=const, alpha_f=alpha_f, cooldown=cooldown, anneal=shape)
    return schedule, end, alpha_f if c else const


@settings(deadline=None)  # the machine may be busy
@given(schedules(), st.integers(0, 10**9))
def test_horizon_is_exactly_the_floor_and_stays(case: tuple[Schedule, float, float], more: int) -> None:
    schedule, end, floor = case
    assert multiplier(schedule, end) == floor
    assert multiplier(schedule, end + more) == floor


@settings(deadline=None)  # the machine may be busy
@given(schedules(), st.data())
def test_monotone_inside_phases_and_between_their_ends(
    case: tuple[Schedule, float, float], data: st.DataObject
) -> None:
    schedule, end, _ = case
    for span in schedule.spans():
        times = sorted(data.draw(st.floats(span.begin, span.until, exclude_max=True)) for _ in range(2))
        at = [multiplier(schedule, t) for t in times]
        values = [span.start, *at, span.end]
        sign = 1 if span.end >= span.start else -1
        assert all(sign * (b - a) >= -1e-12 for a, b in zip(values, values[1:], strict=False)), values


@settings(deadline=None)  # the machine may be busy
@given(schedules())
def test_continuous_at_phase_ends(case: tuple[Schedule, float, float]) -> None:
    # 1-sqrt and inv_sqrt are steep at their start: compare with the value a billionth of the phase away
    schedule, _, _ = case
    for span in schedule.spans():
        step = (span.until - span.begin) * 1e-9
        assert abs(multiplier(schedule, span.begin + step) - span.start) < 1e-4
        assert abs(multiplier(schedule, span.until - step) - span.end) < 1e-4
        assert multiplier(schedule, span.begin) == pytest.approx(span.start, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize('shape', ['linear', 'cosine', 'inv_sqrt', 'exponential', '1-sqrt'])
@pytest.mark.parametrize('end', [0.1, 1.9])
def test_every_shape_is_strict_before_its_horizon(shape: str, end: float) -> None:
    # known elsewhere: decays that are over early and leave a flat tail, or that subtract the warm-up twice
    schedule = Schedule(1.0, (Phase('warm-up', 7, 1.0, 'constant'), Phase('x', 107, end, shape)))
    values = [multiplier(schedule, t) for t in range(7, 108)]
    assert values[0] == 1.0 and values[-1] == end
    assert all((b - a) * (end - 1.0) > 0 for a, b in zip(values, values[1:], strict=False))


@pytest.mark.parametrize('shape', [s for s in ANNEALS if s != 'exponential'])
def test_anneal_to_zero(shape: str) -> None:
    schedule = infinite(0, 0, 10, 10, alpha_const=0.5, alpha_f=0.0, anneal=shape)
    assert multiplier(schedule, 9) > 0.0 == multiplier(schedule, 10)


# ------------------------------------------------------------------------------- errors

ERRORS = [
    (lambda: rewarm_cosine(-1, 10), ['t_warmup=-1', 'at least 0']),
    (lambda: rewarm_cosine(11, 10), ['t_warmup (11) is longer than t_max (10)']),
    (lambda: rewarm_cosine(0, 0), ['t_max=0', 'above 0']),
    (lambda: rewarm_cosine(1, 10, alpha_f=-0.1), ['alpha_f=-0.1', 'at least 0']),
    (lambda: rewarm_cosine(1, 10, alpha_i=math.nan), ['alpha_i=nan']),
    (lambda: rewarm_cosine(1, 10, alpha_f='1e-1'), ["alpha_f='1e-1'", 'number']),
    (lambda: rewarm_constant(math.inf), ['t_warmup=inf']),
    (lambda: rewarm_constant(1, alpha=True), ['alpha=True']),
    (lambda: rewarm_constant(1, alpha_i=-2), ['alpha_i=-2']),
    (
        lambda: infinite(3_000_000_000, 20, 5, 30, alpha_const=0.5),
        ['t_warmup (3000000000) + t_cooldown (20) + t_anneal (5) = 3000000025 is longer than the run (30)'],
    ),
    (lambda: infinite(1, 1, 1, 0, alpha_const=0.5), ['t_end=0']),
    (lambda: infinite(1, 1, 1, 9, alpha_const=-1), ['alpha_const=-1']),
    (lambda: infinite(1, 1, 1, 9, alpha_const=0.5, alpha_f=0.0), ['alpha_f=0', 'linear, cosine and 1-sqrt']),
    (lambda: infinite(1, 1, 1, 9, alpha_const=0.0), ['alpha_const=0', 'linear, cosine and 1-sqrt']),
    (lambda: infinite(1, 1, 1, 9, alpha_const=0.5, cooldown='linear'), ["cooldown='linear'", 'cosine, inv_sqrt']),
    (lambda: infinite(1, 1, 1, 9, alpha_const=0.5, anneal='step'), ["anneal='step'", 'exponential, linear']),
    (lambda: infinite(1, 1, 1, 9, alpha_const=0.5, steepness=2.0), ['steepness=2.0', "'cosine'", 'leave it out']),
    (lambda: infinite(1, 1, 1, 9, alpha_const=0.5, cooldown='inv_sqrt', steepness=0), ['steepness=0', 'positive']),
    (lambda: wsd(6, 5, 20, num_cycles=2), ['t_warmup (6) + t_decay (5) = 11', 'one of 2 cycles', '(10)']),
    (lambda: wsd(6, 5, 10), ['= 11 is longer than t_max (10)']),
    (lambda: wsd(1, 1, 10, num_cycles=0), ['num_cycles=0', 'at least 1']),
    (lambda: wsd(1, 1, 10, num_cycles=1.5), ['num_cycles=1.5']),
    (lambda: wsd(1, 1, 10, decay='exponential', alpha_f=0.0), ['alpha_f=0', 'linear, cosine and 1-sqrt']),
    (lambda: wsd(1, 1, 10, decay='sqrt'), ["decay='sqrt'", '1-sqrt']),
    (lambda: infinite(1, 1, 1, 9, alpha_const=0.5, cooldown='inv_sqrt', steepness='2'), ["steepness='2' ", 'positive']),
    (lambda: infinite(1, 1, 1, 9, alpha_const=0.5, alpha_i=-1), ['alpha_i=-1 ']),
    (lambda: infinite(1, 1, 1, 9, alpha_const=0.5, alpha_f=-1), ['alpha_f=-1 ']),
    (lambda: wsd(1, 1, 9, alpha_i=-1), ['alpha_i=-1 ']),
    (lambda: wsd(1, 1, 9, alpha_f=-1), ['alpha_f=-1 ']),
    (lambda: wsd(1, 1, 0), ['t_max=0 ', 'above 0']),
]


def test_a_gentle_steepness() -> None:
    infinite(0, 8, 0, 20, alpha_const=0.4, cooldown='inv_sqrt', steepness=0.5)
    # h(x) = 1 / sqrt(1 + x / 2) - 1
    schedule = Schedule(1.0, (Phase('p', 2, 0.0, 'inv_sqrt', 0.5),))
    assert multiplier(schedule, 1) == pytest.approx(1 - (1 / math.sqrt(1.25) - 1) / (1 / math.sqrt(1.5) - 1))


def test_a_constant_phase_is_at_its_end_throughout() -> None:
    assert multiplier(Schedule(1.0, (Phase('p', 2, 0.5, 'constant'),)), 1) == 0.5


def test_nothing_is_flat_when_phases_and_run_end_together() -> None:
    schedule = Schedule(0.0, (Phase('p', 2, 1.0, 'linear'),))
    assert list(schedule.spans(2)) == list(schedule.spans()) == [Span('p', 0, 2, 0, 1, 'linear')]


@pytest.mark.parametrize(('make', 'said'), ERRORS)
def test_errors_name_key_and_value(make, said: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        make()
    for words in said:
        assert words in str(error.value)


def test_no_anneal_needs_no_floor() -> None:
    assert multiplier(infinite(0, 0, 0, 9, alpha_const=0.5, alpha_f=0.0), 9) == 0.5
