# SPDX-License-Identifier: Apache-2.0
"""Runs that meet what nobody plans for: what is kept is whole, what happened is said in one line, the others go on."""

import gc
import json
import math
from pathlib import Path

import pytest
import recorder
import tiny
import torch

from cpt_algorithms.checkpoints import open_checkpoint

AVERAGES = {'ema': {'half_life': '2ba'}, 'lawa': {'k': 2, 'interval': '1ba'}}


@pytest.fixture
def stage(data, tmp_path):
    """A stage, and a file while which is there it is in trouble."""

    def stage(name, **trouble):
        (tmp_path / 'trouble').touch()
        over = trouble.pop('over', {})
        callbacks = {'trouble': {'file': str(tmp_path / 'trouble'), **trouble}, **AVERAGES}
        paths = [str(tiny.ROOT / 'tests' / f'{file}.py') for file in ('recorder', 'trouble')]
        return tiny.config(tmp_path, data, name, code_paths=paths, callbacks=callbacks, **over)

    return stage


def stopped(cfg, folder):
    """The one line that it ends with."""
    line = None
    try:
        tiny.recipe_here(cfg, folder)
    except SystemExit as end:
        line = end.code
    gc.collect()  # the run's lock, which the traceback has kept
    assert isinstance(line, str) and '\n' not in line
    return line


def checkpoints(cfg):
    folder = Path(cfg['save_folder'])
    return sorted(path.name for path in folder.glob('*ba*')), (folder / 'latest-rank0.pt').resolve().name


def weights_in(path):
    found, pending = [], [torch.load(path, weights_only=False)['state']]
    while pending:
        value = pending.pop()
        if isinstance(value, torch.Tensor):
            found.append(value)
        pending += value.values() if isinstance(value, dict) else []
    return found


@pytest.mark.parametrize(('nan_at', 'what'), [(4, 'the weights after batch 4 are not finite'), (5, 'the loss of batch 6 is nan')])
def test_no_checkpoint_holds_what_is_no_number(nan_at, what, stage, tmp_path):
    cfg = stage('spoilt', nan_at=nan_at)
    last = 2 if nan_at == 4 else 4
    for _ in range(2):  # the same command goes on from there, and comes to the same end
        line = stopped(cfg, tmp_path)
        assert f'spoilt stopped: {what}. The latest checkpoint is that of batch {last}. ' in line
        names = [f'ep0-ba{batch}-rank0.pt' for batch in range(2, last + 1, 2)]
        assert checkpoints(cfg) == (names, names[-1])
        for name in names:
            tensors = weights_in(Path(cfg['save_folder']) / name)
            assert len(tensors) > 20 and all(tensor.isfinite().all() for tensor in tensors)
        assert not (Path(cfg['save_folder']) / 'huggingface').exists()
        assert not (Path(cfg['save_folder']) / 'done.json').exists()


def test_a_full_disk(stage, tmp_path):
    straight = stage('straight')
    (tmp_path / 'trouble').unlink()
    tiny.recipe_here(straight, tmp_path)
    cfg = stage('full', full_at=5, largest_file=30_000)
    line = stopped(cfg, tmp_path)
    print(line)
