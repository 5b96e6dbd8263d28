# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from composer.core import State, Time, Timestamp, TimeUnit
from composer.optim import CosineAnnealingWithWarmupScheduler
from llmfoundry import registry
from llmfoundry.utils.builders import build_scheduler

from cpt_algorithms.schedulers.functional import infinite, multiplier, rewarm_cosine, wsd
from cpt_algorithms.schedulers.infinite import InfiniteScheduler
from cpt_algorithms.schedulers.phase_scheduler import PhaseScheduler, format_phases
from cpt_algorithms.schedulers.preview import count_batches, preview
from cpt_algorithms.schedulers.rewarm import RewarmConstantScheduler, RewarmCosineScheduler
from cpt_algorithms.schedulers.wsd import WSDScheduler


def stand_in(max_duration: str, dataloader_len: int | None = None, **time: int) -> State:
    length = None if dataloader_len is None else Time.from_batch(dataloader_len)
    state = SimpleNamespace(
        max_duration=Time.from_input(max_duration),
        dataloader_len=length,
        timestamp=Timestamp(**time),  # type: ignore[arg-type]
        callbacks=[],
    )
    return cast(State, state)


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
    assert type(build_scheduler(name, section)) is kind
    assert registry.schedulers.get(name) is kind


@pytest.mark.parametrize('unit', [TimeUnit.TOKEN, TimeUnit.BATCH, TimeUnit.SAMPLE])
def test_units(unit: TimeUnit) -> None:
    u = unit.value
    scheduler = RewarmCosineScheduler(t_warmup=f'10{u}')
    assert scheduler.schedule(f'100{u}') == (rewarm_cosine(10, 100), unit)
    key = {'tok': 'token', 'ba': 'batch', 'sp': 'sample'}[u]
    assert scheduler(stand_in(f'100{u}', **{key: 5})) == 0.5
    assert scheduler(stand_in(f'100{u}', **{key: 100})) == 0.1


def test_dur_is_a_fraction_of_the_run_and_is_not_truncated() -> None:
    schedule, unit = RewarmCosineScheduler(t_warmup='0.01dur').schedule('250ba')
    assert (schedule.phases[0].until, unit) == (2.5, TimeUnit.BATCH)
    assert multiplier(schedule, 1) == 0.4


def test_epochs_become_batches() -> None:
    scheduler = WSDScheduler(t_warmup='4ba', t_decay='0.5dur')
    assert scheduler.schedule('2ep', dataloader_len=10) == (wsd(4, 10, 20), TimeUnit.BATCH)
    assert scheduler(stand_in('2ep', dataloader_len=10, batch=2)) == 0.5
    with pytest.raises(ValueError, match="max_duration='2ep' is in epochs and the dataloader has no length"):
        scheduler.schedule('2ep')


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
    plain, _ = scheduler.schedule('100ba')
    stretched, _ = scheduler.schedule(Time.from_batch(int(100 * ssr)), ssr=ssr)
    for t in np.linspace(0, 100, 41):
        assert multiplier(stretched, t * ssr) == pytest.approx(multiplier(plain, t), rel=1e-9, abs=1e-12)


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
    assert infinite_tokens().schedule('50tok')[0] == infinite(10, 20, 10, 50, alpha_const=0.5)
    assert WSDScheduler('1ba', '2ba').schedule('9ba')[0] == wsd(1, 2, 9)
    assert RewarmCosineScheduler('1ba').schedule('9ba')[0] == rewarm_cosine(1, 9)
    assert RewarmCosineScheduler('1ba', t_max='5ba').schedule('9ba')[0] == rewarm_cosine(1, 5)


def test_phase_table() -> None:
    schedule, unit = infinite_tokens(t_warmup='0tok').schedule('5000tok')
    assert format_phases(schedule, unit, 5000).splitlines() == [
        '  phase     from [tok]  to [tok]  start  end  shape',
        '  cooldown           0        20      1  0.5  cosine',
        '  constant          20     4,990    0.5  0.5  constant',
        '  anneal         4,990     5,000    0.5  0.1  exponential',
    ]


# what is wrong without a run: refused before anything expensive is built
CONSTRUCTOR_ERRORS = [
    (lambda: RewarmCosineScheduler(100), ['t_warmup=100', 'tok, ba, sp or dur']),  # type: ignore[arg-type]
    (lambda: RewarmCosineScheduler('ten'), ["t_warmup='ten'", "'1000ba'"]),
    (lambda: RewarmCosineScheduler('0.5ba'), ["t_warmup='0.5ba'"]),
    (lambda: RewarmCosineScheduler('infba'), ["t_warmup='infba'"]),
    (lambda: RewarmCosineScheduler('nandur'), ["t_warmup='nandur'", 'at least 0']),
    (lambda: RewarmCosineScheduler('-1ba'), ["t_warmup='-1ba'", 'at least 0']),
    (lambda: RewarmCosineScheduler('1ep'), ["t_warmup='1ep'", 'is in ep', 'tok, ba, sp or dur']),
    (lambda: RewarmCosineScheduler('60sec'), ["t_warmup='60sec'", 'is in sec']),
    (lambda: RewarmCosineScheduler('1iter'), ["t_warmup='1iter'", 'is in iter']),
    (lambda: RewarmCosineScheduler('1ba', t_max='9tok'), ["t_warmup='1ba'", "t_max='9tok'", 'one unit']),
    (lambda: RewarmCosineScheduler('2dur'), ['t_warmup (2)', 'longer than t_max (1)']),
    (lambda: RewarmCosineScheduler('9ba', t_max='8ba'), ['t_warmup (9)', 't_max (8)']),
    (lambda: RewarmCosineScheduler('1ba', alpha_f=-1), ['alpha_f=-1']),
    (lambda: RewarmConstantScheduler('1ba', alpha=-1), ['alpha=-1']),
    (
        lambda: infinite_tokens(t_warmup='0.01dur'),
        ["t_warmup='0.01dur'", 'end of a continual run moves', 'tok, ba or sp'],
    ),
    (lambda: infinite_tokens(t_cooldown='0.6dur'), ["t_cooldown='0.6dur'"]),
    (lambda: infinite_tokens(t_anneal='0.1dur'), ["t_anneal='0.1dur'"]),
    (lambda: infinite_tokens(t_anneal=Time(0.1, 'dur')), ["t_anneal='0.1dur'"]),
    (lambda: infinite_tokens(t_anneal='10ba'), ["t_warmup='10tok'", "t_anneal='10ba'", 'one unit']),
    (lambda: infinite_tokens(alpha_f=0.0), ['alpha_f=0', 'can anneal to 0']),
    (lambda: infinite_tokens(steepness=3.0), ['steepness=3.0', 'inv_sqrt']),
    (lambda: infinite_tokens(cooldown='exp'), ["cooldown='exp'"]),
    (lambda: infinite_tokens(anneal='exp'), ["anneal='exp'"]),
    (lambda: WSDScheduler('0.6dur', '0.6dur'), ['t_warmup (0.6) + t_decay (0.6) = 1.2 is longer than t_max (1)']),
    (lambda: WSDScheduler('0.3dur', '0.3dur', num_cycles=2), ['one of 2 cycles']),
    (lambda: WSDScheduler('6ba', '6ba', t_max='10ba'), ['= 12', 't_max (10)']),
    (lambda: WSDScheduler('1ba', '1ba', decay='exponential', alpha_f=0), ['alpha_f=0']),
    (lambda: WSDScheduler('1ba', '1ba', num_cycles=0), ['num_cycles=0']),
]


@pytest.mark.parametrize(('make', 'said'), CONSTRUCTOR_ERRORS)
def test_constructor_errors_name_key_and_value(make, said: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        make()
    for words in said:
        assert words in str(error.value)


def test_right_in_some_run_is_not_refused() -> None:
    WSDScheduler('0.5dur', '10ba')
    WSDScheduler('0.5dur', '10ba', t_max='11ba')
    RewarmCosineScheduler('1000000000000tok')
    RewarmCosineScheduler('0.1dur', t_max='5ba')


RUN_ERRORS = [
    (RewarmCosineScheduler('1ba'), '9tok', ["t_warmup='1ba' is in ba", "max_duration='9tok'", 'in tok or dur']),
    (RewarmCosineScheduler('1tok'), '9ep', ["t_warmup='1tok' is in tok", "max_duration='9ep'", 'in ba or dur']),
    (infinite_tokens(), '9ba', ["t_warmup='10tok' is in tok", "max_duration='9ba'", 'write t_warmup in ba']),
    (infinite_tokens(), '39tok', ['t_warmup (10) + t_cooldown (20) + t_anneal (10) = 40', 'the run (39)']),
    (RewarmCosineScheduler('10ba'), '9ba', ['t_warmup (10)', 't_max (9)']),
    (RewarmCosineScheduler('0.1dur'), '9sec', ["max_duration='9sec'", 'tok, ba, sp or ep']),
]


@pytest.mark.parametrize(('scheduler', 'max_duration', 'said'), RUN_ERRORS)
def test_run_errors_name_key_and_value(scheduler: PhaseScheduler, max_duration: str, said: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        scheduler.schedule(max_duration, dataloader_len=4)
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
    assert preview(RewarmCosineScheduler('0.5dur'), '80tok', tokens_per_batch=10) == pytest.approx(expected)
    assert preview(RewarmCosineScheduler('0.5dur'), '16sp', samples_per_batch=2) == pytest.approx(expected)
    assert preview(RewarmCosineScheduler('0.5dur'), '2ep', dataloader_len=4) == pytest.approx(expected)
    some = preview(RewarmCosineScheduler('0.5dur'), '8ba', batches=[0, 7])
    assert some == pytest.approx(expected[[0, 7]])


def test_count_batches() -> None:
    assert count_batches('81tok', tokens_per_batch=10) == 9
    assert count_batches('16sp', samples_per_batch=8) == 2
    assert count_batches('7ba') == 7
    for duration in ('9tok', '9sp', '9ep'):
        with pytest.raises(ValueError, match=f"max_duration='{duration}' cannot be counted in batches"):
            count_batches(duration)
