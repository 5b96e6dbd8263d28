# SPDX-License-Identifier: Apache-2.0
"""Composer's names, and which checkpoint of a save folder is the newest complete one. In a bucket: test_object_storage."""

import builtins
import errno
import io
import os
import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from cpt_algorithms.checkpoints.errors import CheckpointError
from cpt_algorithms.checkpoints.save_folder import (
    batch_of,
    checkpoint_name,
    half_written,
    latest_link,
    newest_complete,
    repair,
    weights_in,
)
from cpt_algorithms.files import StorageError, check_writable


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
    for judge in (newest_complete, half_written, repair):
        with pytest.raises(CheckpointError, match=rf'{data[10]} is damaged: it has'):
            judge(tmp_path)  # .metadata is written last, so no kill has left this
    (checkpoints[10] / '.metadata').unlink()
    assert newest_complete(tmp_path) == (6, str(checkpoints[6]))
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(CheckpointError, match=r'ep0-ba8 is not whole.* move it away, .* goes on from 6'):
        repair(tmp_path)
    assert sorted(tmp_path.rglob('*')) == before, 'one kill leaves one checkpoint half-written'
    checkpoints[8].rename(tmp_path / 'elsewhere')
    repair(tmp_path)
    assert sorted(path.name for path in tmp_path.glob('*[!e]')) == ['ep0-ba4', 'ep0-ba6', latest_link(True)]
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


def saved(folder: Path, batch: int) -> Path:
    path = folder / checkpoint_name(batch, False)
    torch.save(
        {'state': {'timestamp': {'Timestamp': dict.fromkeys(('epoch', 'sample', 'token'), 0) | {'batch': batch}}}}, path
    )
    return path


def test_without_a_whole_checkpoint_only_the_newest_is_half_written(tmp_path):
    for batch in (2, 4, 6):
        os.truncate(saved(tmp_path, batch), 100)
    assert [path.name for path in half_written(tmp_path)] == [checkpoint_name(6, False)]


def test_a_copy_that_followed_links_is_never_written_over(tmp_path):
    """``cp -rL``, ``rsync -L`` and ``aws s3 sync`` make a file of the link; its target was deleted to save room."""
    saved(tmp_path, 4)
    latest = saved(tmp_path, 8).rename(tmp_path / latest_link(False))
    there = latest.read_bytes()
    with pytest.raises(
        CheckpointError, match=r'no link but the checkpoint of batch 8 .*rename it to ep0-ba8-rank0\.pt'
    ):
        repair(tmp_path)
    assert latest.read_bytes() == there
    latest.rename(tmp_path / checkpoint_name(8, False))
    repair(tmp_path)
    assert latest.resolve().name == checkpoint_name(8, False)


def test_a_sharded_copy_that_followed_links_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr('cpt_algorithms.checkpoints.open.time_of', lambda path: {'ep': 1, 'ba': 8})
    sharded(tmp_path, 4)
    sharded(tmp_path, 8).rename(tmp_path / latest_link(True))
    with pytest.raises(CheckpointError, match='rename it to ep1-ba8, or'):
        repair(tmp_path)


@pytest.mark.parametrize('number', [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize('ask', [repair, newest_complete, half_written, weights_in])
def test_what_cannot_be_read_for_a_moment_is_not_taken_for_half_written(ask, number, tmp_path, monkeypatch):
    paths, usual = [saved(tmp_path, batch) for batch in (4, 8)], io.open
    paths.append(paths[1].rename(tmp_path / 'ep0-ba8-rank0.pt.old')) if ask is weights_in else None
    fails = [paths[-1]]

    def fail_once(file, *args, **kwargs):
        if file in fails:
            fails.remove(file)
            raise OSError(number, os.strerror(number), str(file))
        return usual(file, *args, **kwargs)

    there = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patched:
        for module in (builtins, io):
            patched.setattr(module, 'open', fail_once)
        with pytest.raises(
            CheckpointError, match=f'{paths[-1].name} cannot be read .{os.strerror(number)}.*same command'
        ):
            ask(tmp_path)
    assert sorted(tmp_path.iterdir()) == there
    ask(tmp_path)


@pytest.mark.parametrize('name', ['ep0-ba8', 'ep0-ba8-rank0.pt'])
def test_a_link_that_leads_nowhere_is_a_checkpoint_that_is_away(name, tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / name).symlink_to(tmp_path / 'archive' / name)
    for ask in (newest_complete, repair):
        with pytest.raises(CheckpointError, match=f'{name} leads to {tmp_path}/archive/{name}, which is not there'):
            ask(tmp_path / 'run')
    newer = saved(tmp_path / 'run', 12)
    assert newest_complete(tmp_path / 'run') == (12, str(newer)), 'no start needs the older one'
    repair(tmp_path / 'run')
    assert (tmp_path / 'run' / name).is_symlink()
    (tmp_path / 'gone').symlink_to(tmp_path / 'archive')
    with pytest.raises(StorageError, match=f'save_folder: {tmp_path}/gone leads to {tmp_path}/archive, which is not'):
        check_writable('save_folder', str(tmp_path / 'gone'), 'choose another')


def test_a_folder_that_cannot_be_listed_is_not_empty(tmp_path, monkeypatch):
    saved(tmp_path, 4)

    def fail(path, *args):
        raise OSError(errno.EIO, 'Input/output error', str(path))

    for name in ('scandir', 'listdir'):
        monkeypatch.setattr(os, name, fail)
    for ask in (newest_complete, weights_in):
        with pytest.raises(CheckpointError, match='cannot be read .Input/output error'):
            ask(tmp_path)
