# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from composer.core import State, Time, Timestamp
from composer.optim import CosineAnnealingWithWarmupScheduler
from llmfoundry import registry

from cpt_algorithms.schedulers.functional import infinite, rewarm_cosine, wsd
from cpt_algorithms.schedulers.phase_scheduler import PhaseScheduler
from cpt_algorithms.schedulers.phases import Phases, phases_of
from cpt_algorithms.schedulers.preview import preview
from cpt_algorithms.schedulers.schedulers import (
    InfiniteScheduler,
    RewarmConstantScheduler,
    RewarmCosineScheduler,
    WSDScheduler,
)


def stand_in(max_duration: str, dataloader_len: int | None = None, **time: int) -> State:
    length = None if dataloader_len is None else Time.from_batch(dataloader_len)
    now: Any = Timestamp(**time)  # type: ignore[arg-type]
    run: Any = {'max_duration': Time.from_input(max_duration), 'dataloader_len': length, 'timestamp': now}
    return cast(State, SimpleNamespace(**run, callbacks=[]))


def infinite_tokens(**changes: Any) -> InfiniteScheduler:
    values = {'t_warmup': '10tok', 't_cooldown': '20tok', 'alpha_const': 0.5, 't_anneal': '10tok'}
    return InfiniteScheduler(**{**values, **changes})


SECTIONS = {
    'rewarm_cosine': ({'t_warmup': '0.1dur'}, RewarmCosineScheduler),
    'rewarm_constant': ({'t_warmup': '0ba', 'alpha': 0.1}, RewarmConstantScheduler),
    'infinite': ({'t_warmup': '1ba', 't_cooldown': '2ba', 'alpha_const': 0.55, 't_anneal': '2ba'}, InfiniteScheduler),
    'wsd': ({'t_warmup': '1ba', 't_decay': '0.1dur'}, WSDScheduler),
}


@pytest.mark.parametrize('name', SECTIONS)
def test_llm_foundry_finds_it_by_name(name: str) -> None:
    section, kind = SECTIONS[name]
    assert registry.schedulers.get(name) is kind
    assert phases_of({'name': name, **section}, '10ba') == kind(**section).phases('10ba')


def test_phases_that_are_not_known() -> None:
    ours = {'name': 'rewarm_cosine', 't_warmup': '0.1dur'}
    assert phases_of({'name': 'cosine_with_warmup', 't_warmup': '1ba'}, '10ba') is None
    assert phases_of(ours, '2ep') is None
    assert phases_of(ours, '2ep', 5) == Phases(rewarm_cosine(1, 10), 'ba', 10)


@pytest.mark.parametrize(
    ('section', 'said'),
    [
        ({}, r'scheduler\.name'),
        ({'name': 'rewarm_cosin', 't_warmup': '1ba'}, 'rewarm_cosin'),
        ({'name': 'rewarm_cosine'}, 'rewarm_cosine.*t_warmup'),
        ({'name': 'rewarm_cosine', 't_warmup': '1ba', 'nonsense': 1}, 'rewarm_cosine.*nonsense'),
        ({'name': 'rewarm_cosine', 't_warmup': '11ba'}, r't_warmup \(11\).*t_max \(10\)'),
    ],
)
def test_a_section_that_is_not_right(section: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        phases_of(section, '10ba')


@pytest.mark.parametrize(('unit', 'time'), [('tok', 'token'), ('ba', 'batch'), ('sp', 'sample')])
def test_units(unit: str, time: str) -> None:
    scheduler = RewarmCosineScheduler(t_warmup=f'10{unit}')
    assert scheduler.phases(f'100{unit}') == Phases(rewarm_cosine(10, 100), unit, 100)
    assert scheduler(stand_in(f'100{unit}', **{time: 5})) == 0.5
    assert scheduler(stand_in(f'100{unit}', **{time: 100})) == 0.1


def test_dur_is_a_fraction_of_the_run_and_is_not_truncated() -> None:
    phases = RewarmCosineScheduler(t_warmup='0.01dur').phases('250ba')
    assert (phases.spans[0].until, phases.unit) == (2.5, 'ba')
    assert phases.multiplier_at(1) == 0.4


def test_epochs_become_batches() -> None:
    scheduler = WSDScheduler(t_warmup='4ba', t_decay='0.5dur')
    assert scheduler.phases('2ep', dataloader_len=10) == Phases(wsd(4, 10, 20), 'ba', 20)
    assert scheduler(stand_in('2ep', dataloader_len=10, batch=2)) == 0.5
    with pytest.raises(ValueError, match="max_duration='2ep'"):
        scheduler.phases('2ep')


@pytest.mark.parametrize('ssr', [0.5, 0.3, 1.0, 2.0])
@pytest.mark.parametrize(
    'scheduler',
    [
        RewarmCosineScheduler('10ba'),
        RewarmCosineScheduler('0.1dur'),
        infinite_tokens(t_warmup='10ba', t_cooldown='20ba', t_anneal='10ba'),
        WSDScheduler('10ba', '0.2dur'),
    ],
)
def test_scale_schedule_ratio_stretches_time(scheduler: PhaseScheduler, ssr: float) -> None:
    plain = scheduler.phases('100ba')
    stretched = scheduler.phases(Time.from_batch(int(100 * ssr)), ssr=ssr)
    for t in np.linspace(0, 100, 41):
        assert stretched.multiplier_at(t * ssr) == pytest.approx(plain.multiplier_at(t), rel=1e-9, abs=1e-12)


def test_a_longer_run_is_seen_at_once() -> None:
    scheduler = infinite_tokens()
    assert scheduler(stand_in('50tok', token=50)) == 0.1
    assert scheduler(stand_in('500tok', token=50)) == 0.5


def test_it_joins_the_callbacks_once_and_in_front() -> None:
    scheduler, state, other = infinite_tokens(), stand_in('50tok'), RewarmConstantScheduler('0ba')
    state.callbacks.append(other)
    assert scheduler(state) == scheduler(state) == 0.0
    assert state.callbacks == [scheduler, other]
    assert scheduler.state_dict() == {}


def test_defaults_match_the_functions() -> None:
    assert infinite_tokens().phases('50tok').schedule == infinite(10, 20, 10, 50, alpha_const=0.5)
    assert WSDScheduler('1ba', '2ba').phases('9ba').schedule == wsd(1, 2, 9)
    assert RewarmCosineScheduler('1ba').phases('9ba').schedule == rewarm_cosine(1, 9)
    assert RewarmCosineScheduler('1ba', t_max='5ba').phases('9ba').schedule == rewarm_cosine(1, 5)


def test_phase_table() -> None:
    assert str(infinite_tokens(t_warmup='0tok').phases('5000tok')).splitlines() == [
        '  phase     from [tok]  to [tok]  start  end  shape',
        '  cooldown           0        20      1  0.5  cosine',
        '  constant          20     4,990    0.5  0.5  constant',
        '  anneal         4,990     5,000    0.5  0.1  exponential',
    ]


# what is wrong without a run, refused before anything expensive is built; values and shapes: test_schedule_functional.py
CONSTRUCTOR_ERRORS = [
    *(
        (lambda time=time: RewarmCosineScheduler(time), [f't_warmup={time!r}', 'at least 0', 'tok, ba, sp or dur'])
        for time in (100, 'ten', '0.5ba', 'infba', 'nandur', '-1ba', '1ep', '60sec', '1iter')
    ),
    (lambda: RewarmCosineScheduler('1ba', t_max='9tok'), ["t_warmup='1ba'", "t_max='9tok'", 'one unit']),
    (lambda: RewarmCosineScheduler('2dur'), ['t_warmup (2)', 'longer than t_max (1)']),
    (lambda: RewarmCosineScheduler('9ba', t_max='8ba'), ['t_warmup (9)', 't_max (8)']),
    (lambda: RewarmConstantScheduler('1ba', alpha=-1), ['alpha=-1']),
    *(
        (lambda key=key, time=time: infinite_tokens(**{key: time}), [f"{key}='0.6dur'", 'tok, ba or sp'])
        for key, time in (('t_warmup', '0.6dur'), ('t_cooldown', '0.6dur'), ('t_anneal', Time(0.6, 'dur')))
    ),
    (lambda: infinite_tokens(t_anneal='10ba'), ["t_warmup='10tok'", "t_anneal='10ba'", 'one unit']),
    (lambda: infinite_tokens(alpha_f=0.0), ['alpha_f=0', 'can anneal to 0']),
    (lambda: WSDScheduler('0.6dur', '0.6dur'), ['t_warmup (0.6) + t_decay (0.6) = 1.2 is longer than t_max (1)']),
    (lambda: WSDScheduler('0.3dur', '0.3dur', num_cycles=2), ['one of 2 cycles']),
    (lambda: WSDScheduler('6ba', '6ba', t_max='10ba'), ['= 12', 't_max (10)']),
]


@pytest.mark.parametrize(
    ('scheduler', 'max_duration', 'until'),
    [
        (WSDScheduler('0.5dur', '10ba'), '20ba', [10, 20]),
        (WSDScheduler('0.5dur', '10ba', t_max='11ba'), '2ba', [1, 2]),
        (RewarmCosineScheduler('1000000000000tok'), '2000000000000tok', [1e12, 2e12]),
        (RewarmCosineScheduler('0.1dur', t_max='5ba'), '10ba', [1, 5, 10]),
    ],
)
def test_right_in_some_run_is_not_refused(scheduler: PhaseScheduler, max_duration: str, until: list[float]) -> None:
    assert [span.until for span in scheduler.phases(max_duration).spans] == until


def phases(scheduler: PhaseScheduler, max_duration: str):
    return lambda: scheduler.phases(max_duration, dataloader_len=4)


RUN_ERRORS = [
    (phases(RewarmCosineScheduler('1ba'), '9tok'), ["t_warmup='1ba'", "max_duration='9tok'", 'in tok or dur']),
    (phases(RewarmCosineScheduler('1tok'), '9ep'), ["t_warmup='1tok'", "max_duration='9ep'", 'in ba or dur']),
    (phases(infinite_tokens(), '9ba'), ["t_warmup='10tok'", "max_duration='9ba'", 'write t_warmup in ba']),
    (phases(infinite_tokens(), '39tok'), ['t_warmup (10) + t_cooldown (20) + t_anneal (10) = 40', 'the run (39)']),
    (phases(RewarmCosineScheduler('10ba'), '9ba'), ['t_warmup (10)', 't_max (9)']),
    (phases(RewarmCosineScheduler('0.1dur'), '9sec'), ["max_duration='9sec'", 'tok, ba, sp or ep']),
]


@pytest.mark.parametrize(('make', 'said'), [*CONSTRUCTOR_ERRORS, *RUN_ERRORS])
def test_errors_name_key_and_value(make, said: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        make()
    for words in said:
        assert words in str(error.value)


# ------------------------------------------------------------------------------- preview


def test_preview_is_exact_for_ours_and_one_late_for_stock() -> None:
    ours = preview(RewarmCosineScheduler('4ba'), '8ba')
    stock = preview(CosineAnnealingWithWarmupScheduler(t_warmup='4ba', alpha_f=0.1), '8ba')
    assert ours[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert stock[:6] == pytest.approx([0, 0, 0.25, 0.5, 0.75, 1])
    assert stock[1:] == pytest.approx(ours[:-1])


def test_preview_in_tokens_samples_and_epochs() -> None:
    expected = preview(RewarmCosineScheduler('0.5dur'), '8ba')
    assert preview(RewarmCosineScheduler('0.5dur'), '80tok', 5, 2) == pytest.approx(expected)
    assert preview(RewarmCosineScheduler('0.5dur'), '16sp', 2) == pytest.approx(expected)
    assert preview(RewarmCosineScheduler('0.5dur'), '2ep', dataloader_len=4) == pytest.approx(expected)
    some = preview(RewarmCosineScheduler('0.5dur'), '8ba', batches=[0, 7])
    assert some == pytest.approx(expected[[0, 7]])
    assert len(preview(RewarmCosineScheduler('0.5dur'), '81tok', 5, 2)) == 9, 'a batch that begins is trained'
    with pytest.raises(ValueError, match="max_duration='2ep'.*dataloader_len"):
        preview(RewarmCosineScheduler('0.5dur'), '2ep')
