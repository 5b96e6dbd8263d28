# SPDX-License-Identifier: Apache-2.0
"""Composer's names, and which checkpoint of a save folder is the newest complete one. In a bucket: test_object_storage."""

import os
import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from cpt_algorithms.checkpoints.save_folder import batch_of, checkpoint_name, latest_link, newest_complete, repair


@pytest.mark.parametrize(
    ('place', 'batch'),
    [
        ('ep0-ba10-rank0.pt', 10),
        (Path('run/ep1-ba20'), 20),
        ('s3://bucket/alibaba3/ep0-ba4/', 4),
        ('ba7-ema_100ba', 7),
        ('run-ba5/latest-rank0.pt', None),
        ('alibaba3', None),
    ],
)
def test_batch_of(place, batch):
    assert batch_of(place) == batch


def test_names_are_composers(tmp_path):
    """Each is what ``batch_of`` and ``newest_complete`` find again."""
    for sharded in (True, False):
        assert batch_of(checkpoint_name(12, sharded)) == 12
        assert batch_of(latest_link(sharded)) is None
    assert (checkpoint_name(12, True), checkpoint_name(12, False)) == ('ep0-ba12', 'ep0-ba12-rank0.pt')


def sharded(folder: Path, batch: int) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        save({'weight': torch.ones(3)}, checkpoint_id=folder / checkpoint_name(batch, True), no_dist=True)
    return folder / checkpoint_name(batch, True)


def test_sharded_folders_that_are_not_complete(tmp_path):
    """Their saving was killed, or their deletion was, in whatever order their files went."""
    checkpoints = {batch: sharded(tmp_path, batch) for batch in (2, 4, 6, 8, 10)}
    data = {batch: next(checkpoint.glob('*.distcp')) for batch, checkpoint in checkpoints.items()}
    data[2].unlink()
    (checkpoints[8] / '.metadata').unlink()
    os.truncate(data[10], data[10].stat().st_size // 2)
    assert newest_complete(tmp_path) == (6, str(checkpoints[6]))
    repair(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['ep0-ba4', 'ep0-ba6', latest_link(True)]
    assert (tmp_path / latest_link(True)).resolve() == checkpoints[6]


def test_files_that_are_not_complete(tmp_path):
    assert newest_complete(tmp_path) == newest_complete(tmp_path / 'nowhere') == (0, None)
    for batch in (9, 10):
        torch.save({'state': {}}, tmp_path / checkpoint_name(batch, False))
    newest = tmp_path / checkpoint_name(10, False)
    assert newest_complete(tmp_path) == (10, str(newest)), 'by number, not by name'
    os.truncate(newest, newest.stat().st_size // 2)
    (tmp_path / latest_link(False)).symlink_to(newest.name)
    repair(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoint_name(9, False), latest_link(False)]
    assert (tmp_path / latest_link(False)).resolve().name == checkpoint_name(9, False)
