# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import matplotlib.image
import numpy as np
import plot_schedules
import pytest
from plot_schedules import curve, find_spans, main

from cpt_algorithms.formatting import exact, scientific

OURS = """
variables: {lr: 3.0e-4}
run_name: ${oc.env:NOT_SET_ANYWHERE}
max_duration: 3000tok
max_seq_len: 10
global_train_batch_size: 10
optimizer: {name: decoupled_adamw, lr: "${variables.lr}"}
scheduler: {name: infinite, t_warmup: 500tok, t_cooldown: 500tok, alpha_const: 0.5, t_anneal: 1000tok}
"""
STOCK = """
max_duration: 30ba
optimizer: {name: decoupled_adamw, lr: 1.0e-3}
scheduler: {name: cosine_with_warmup, t_warmup: 10ba, alpha_f: 0.1}
"""


@pytest.fixture
def yamls(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / 'ours.yaml', tmp_path / 'stock.yaml'
    for path, text in zip(paths, (OURS, STOCK), strict=True):
        path.write_text(text)
    return paths


def test_table_and_picture(yamls: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / 'new' / 'a.png'
    main([*map(str, yamls), '--out', str(out)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ['warm-up', '0', '500', '5', '0', '0.0003', 'linear'] in rows
    assert ['cooldown', '500', '1,000', '5', '0.0003', '0.00015', 'cosine'] in rows
    assert ['anneal', '2,000', '3,000', '10', '0.00015', '3e-05', 'exponential'] in rows
    assert ['30', 'batches', 'of', '100', 'tokens;'] in [row[:5] for row in rows]
    # one batch late, told from the values alone
    assert ['stays', '0', '1', '0', '0'] in rows
    assert ['rises', '1', '11', '0', '0.001'] in rows
    assert ['ours', '(infinite),', 'times', 'in', 'tokens'] in rows
    height, width, _ = matplotlib.image.imread(out).shape
    assert width > 1000 and height > 800


def test_overrides(yamls: tuple[Path, Path]) -> None:
    ours = curve(yamls[0], ['optimizer.lr=1.0', 'scheduler.t_anneal=0tok', 'max_duration=1500tok'])
    assert ours.num_batches == 15
    assert ours.lrs[:6].tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ours.lrs[-1] == 0.5


def test_epochs_need_their_length(yamls: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="max_duration='2ep'.*train_subset_num_batches"):
        curve(yamls[1], ['max_duration=2ep'])
    resolved = curve(yamls[1], ['max_duration=2ep', 'train_subset_num_batches=15'])
    assert (resolved.num_batches, resolved.lrs[10]) == (30, pytest.approx(0.9e-3))


def test_a_long_run_is_sampled_with_its_corners(yamls: tuple[Path, Path]) -> None:
    long = ['max_duration=100000001tok', 'scheduler.t_warmup=50000000tok']
    ours = curve(yamls[0], long)
    assert ours.num_batches == 1_000_001
    assert len(ours.lrs) <= plot_schedules.MAX_POINTS + 8
    assert ours.lrs.max() == 3e-4


@pytest.mark.parametrize(
    ('override', 'said'),
    [
        ('scheduler=null', 'scheduler '),
        ('optimizer.lr=null', 'optimizer.lr '),
        ('max_duration=null', 'max_duration '),
        ('global_train_batch_size=null', "max_duration='3000tok' needs global_train_batch_size"),
        ('scheduler.t_warmup=1ba', "t_warmup='1ba'"),
        ('scheduler.nonsense=1', 'nonsense'),
        ('optimizer.lr=${nowhere}', 'nowhere'),
    ],
)
def test_errors_name_file_and_key(
    yamls: tuple[Path, Path], override: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([str(yamls[0]), override])
    error = ' '.join(capsys.readouterr().err.split())
    assert said in error and 'ours.yaml' in error


def test_find_spans_of_a_single_batch() -> None:
    assert find_spans(np.array([0.0]), np.array([1.0])) == []


def test_numbers_as_people_write_them() -> None:
    assert [exact(x) for x in (0, 200, 2500, 183e9, 1.2e12)] == ['0', '200', '2.5 k', '183 B', '1.2 T']
    assert [scientific(x) for x in (0, 3e-4, 1.65e-4, 1.0)] == ['0', '3e-4', '1.65e-4', '1e0']
