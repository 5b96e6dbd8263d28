# SPDX-License-Identifier: Apache-2.0
"""The learning rate of every optimizer step of real runs, straight and resumed."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.callbacks import LRMonitor
from composer.core import Callback, DataSpec, State, Time
from composer.loggers import InMemoryLogger, Logger
from composer.models import ComposerModel
from composer.optim import ConstantScheduler, CosineAnnealingScheduler, DecoupledAdamW
from torch.utils.data import DataLoader

from cpt_algorithms.schedulers.phase_scheduler import PhaseScheduler
from cpt_algorithms.schedulers.preview import preview
from cpt_algorithms.schedulers.schedulers import (
    InfiniteScheduler,
    RewarmConstantScheduler,
    RewarmCosineScheduler,
    WSDScheduler,
)

LR = 3e-4
BATCHES = 12
# tokens of each batch: they vary, as with padded data
TOKENS = [7, 3, 11, 5, 2, 9, 4, 8, 6, 1, 10, 13]
STARTS = [sum(TOKENS[:k]) for k in range(BATCHES)]  # 79 in all


class Line(ComposerModel):
    """One weight, so that Trainer is all there is to a test."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.layer(batch)

    def loss(self, outputs: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return outputs.square().mean()


class Steps(Callback):
    """What the optimizer holds as each batch starts to train, and after the run."""

    def __init__(self) -> None:
        self.lrs: dict[int, list[float]] = {}

    def before_train_batch(self, state: State, logger: Logger) -> None:
        self.lrs[state.timestamp.batch.value] = [group['lr'] for group in state.optimizers[0].param_groups]


def data() -> DataSpec:
    # a sample holds its batch's token count in its value
    values = [torch.tensor([float(n)]) for n in TOKENS for _ in range(2)]
    return DataSpec(
        DataLoader(values, batch_size=2),  # type: ignore[arg-type]
        get_num_tokens_in_batch=lambda batch: int(batch[0].item()),
        get_num_samples_in_batch=len,
    )


def trainer(scheduler: Any, max_duration: str, **kwargs: Any) -> tuple[Trainer, Steps, InMemoryLogger]:
    torch.manual_seed(0)
    model, steps, memory = Line(), Steps(), InMemoryLogger()
    groups = [{'params': [model.layer.weight]}, {'params': [model.layer.bias], 'lr': 10 * LR}]
    made = Trainer(
        model=model,
        train_dataloader=data(),
        optimizers=DecoupledAdamW(groups, lr=LR, weight_decay=1e-5),
        schedulers=scheduler,
        max_duration=max_duration,
        callbacks=[LRMonitor(), steps],
        loggers=[memory],
        device='cpu',
        progress_bar=False,
        **kwargs,
    )
    return made, steps, memory


SCHEDULERS = {
    'rewarm_cosine': lambda u, k: RewarmCosineScheduler(f'{3 * k}{u}'),
    'rewarm_cosine in dur': lambda u, k: RewarmCosineScheduler('0.21dur', alpha_f=0.0, t_max='0.9dur'),
    'rewarm_constant': lambda u, k: RewarmConstantScheduler(f'{3 * k}{u}'),
    'eta_min': lambda u, k: RewarmConstantScheduler(f'0{u}', alpha=0.1),
    'infinite': lambda u, k: InfiniteScheduler(f'{2 * k}{u}', f'{3 * k}{u}', 0.55, f'{3 * k}{u}'),
    'infinite, inv_sqrt, 1-sqrt': lambda u, k: InfiniteScheduler(
        f'{k}{u}', f'{4 * k}{u}', 0.55, f'{3 * k}{u}', cooldown='inv_sqrt', anneal='1-sqrt', alpha_f=0.0
    ),
    'infinite, later stage': lambda u, k: InfiniteScheduler(f'0{u}', f'0{u}', 0.55, f'0{u}'),
    'wsd': lambda u, k: WSDScheduler(f'{2 * k}{u}', f'{2 * k}{u}', num_cycles=2),
}
RUNS = {'ba': ('12ba', 1), 'tok': ('79tok', 6)}


@pytest.fixture(params=SCHEDULERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def planned(scheduler: PhaseScheduler, max_duration: str) -> dict[int, list[float]]:
    phases = scheduler.phases(max_duration)
    starts = STARTS if phases.unit == 'tok' else range(BATCHES)
    alphas = [phases.multiplier_at(t) for t in starts]
    return {k: [LR * alpha, 10 * LR * alpha] for k, alpha in enumerate(alphas)}


@pytest.mark.parametrize('unit', RUNS)
def test_every_step_straight_and_resumed(name: str, unit: str, tmp_path: Path) -> None:
    max_duration, k = RUNS[unit]

    def make() -> PhaseScheduler:
        return SCHEDULERS[name](unit, k)

    expected = planned(make(), max_duration)
    assert len({lr for lrs in expected.values() for lr in lrs}) > 2 or name in {'eta_min', 'infinite, later stage'}

    saving = {'save_folder': str(tmp_path), 'save_interval': '5ba', 'run_name': 'run', 'autoresume': True}
    straight, steps, memory = trainer(make(), max_duration, **saving)
    straight.fit()
    assert steps.lrs == expected
    # after k batches LRMonitor logs what batch k will use; the last entry is the value at the horizon
    logged = memory.get_timeseries('lr-DecoupledAdamW/group0')['lr-DecoupledAdamW/group0']
    assert list(logged[:-1]) == [lrs[0] for lrs in expected.values()][1:]
    straight.close()

    # stop in the middle: take the later checkpoints away
    for later in (10, 12):
        (tmp_path / f'ep{later // BATCHES}-ba{later}-rank0.pt').unlink(missing_ok=True)
    latest = tmp_path / 'latest-rank0.pt'
    latest.unlink()
    latest.symlink_to('ep0-ba5-rank0.pt')
    saved = torch.load(latest, weights_only=False)['state']
    groups = saved['optimizers']['DecoupledAdamW']['param_groups']
    assert [group['lr'] for group in groups] == expected[5]
    assert next(iter(saved['schedulers'].values()))['_last_lr'] == expected[5]
    assert saved['callbacks'][type(make()).__name__] == {}

    resumed, steps, _ = trainer(make(), max_duration, **{**saving, 'save_overwrite': True})
    assert resumed.state.timestamp.batch == 5
    resumed.fit()
    assert steps.lrs == {batch: expected[batch] for batch in range(5, BATCHES)}
    resumed.close()


def test_preview_of_a_stock_scheduler_is_what_a_run_uses() -> None:
    run, steps, _ = trainer(CosineAnnealingScheduler(), '12ba')
    run.fit()
    assert [lrs[0] for lrs in steps.lrs.values()] == (LR * preview(CosineAnnealingScheduler(), '12ba')).tolist()


def test_epochs() -> None:
    scheduler = RewarmCosineScheduler('0.25dur')
    run, steps, _ = trainer(scheduler, '2ep')
    run.fit()
    phases = scheduler.phases('24ba')
    assert [lrs[0] for lrs in steps.lrs.values()] == [LR * phases.multiplier_at(t) for t in range(24)]


@pytest.mark.parametrize('ssr', [0.5, 1.5])
def test_scale_schedule_ratio(ssr: float) -> None:
    # 1.5: until Trainer has scaled max_duration the phases do not fit, which is nobody's fault
    scheduler = InfiniteScheduler('4ba', '4ba', 0.5, '3ba')
    run, steps, _ = trainer(scheduler, '12ba', scale_schedule_ratio=ssr)
    run.fit()
    phases = scheduler.phases('12ba')
    wanted = [LR * phases.multiplier_at(t / ssr) for t in range(int(12 * ssr))]
    assert [lrs[0] for lrs in steps.lrs.values()] == pytest.approx(wanted, rel=1e-9)


def test_a_second_fit_extends_the_run() -> None:
    scheduler = InfiniteScheduler('2ba', '2ba', 0.5, '2ba')
    run, steps, _ = trainer(scheduler, '6ba')
    run.fit()
    run.fit(duration='4ba')
    phases = scheduler.phases('10ba')
    assert [lrs[0] for lrs in steps.lrs.values()][6:] == [LR * phases.multiplier_at(t) for t in range(6, 10)]


@pytest.mark.parametrize('other', [ConstantScheduler(0.25), RewarmConstantScheduler('0ba', alpha=0.25)])
def test_a_replaced_scheduler_lets_go(other: Any) -> None:
    first = RewarmCosineScheduler('2ba')
    run, steps, _ = trainer(first, '4ba')
    run.fit(schedulers=other)
    assert {lrs[0] for lrs in steps.lrs.values()} == {0.25 * LR}
    assert first not in run.state.callbacks


def test_one_scheduler_per_run() -> None:
    run, _, _ = trainer([RewarmConstantScheduler('0ba'), RewarmCosineScheduler('2ba')], '4ba')
    with pytest.raises(ValueError, match='sets the learning rate alone, but the run has 2 schedulers'):
        run.fit()


def test_wrong_unit_is_refused_before_fit() -> None:
    with pytest.raises(ValueError, match="t_warmup='2tok' is in tok, but max_duration='4ba'"):
        trainer(RewarmCosineScheduler('2tok'), '4ba')


def test_callback_order_survives_llm_foundry(caplog: pytest.LogCaptureFixture) -> None:
    from llmfoundry.command_utils.train import _sort_callbacks

    scheduler = RewarmCosineScheduler('2ba')
    run, steps, _ = trainer(scheduler, '4ba')
    _sort_callbacks(run)
    others: Iterator[Callback] = (c for c in run.state.callbacks if isinstance(c, (LRMonitor, Steps)))
    assert all(run.state.callbacks.index(scheduler) < run.state.callbacks.index(c) for c in others)
    with caplog.at_level(logging.INFO, logger='cpt_algorithms.schedulers'):
        run.fit()
    assert len(steps.lrs) == 4
    assert 'RewarmCosineScheduler, multipliers of the learning rate:' in caplog.text
    assert '  warm-up          0        2      0    1  linear' in caplog.text
    assert Time.from_input('4ba') == run.state.max_duration
