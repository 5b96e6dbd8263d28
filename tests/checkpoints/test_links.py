# SPDX-License-Identifier: Apache-2.0
"""A checkpoint is whole by itself, whatever it shares with another, and whatever becomes of that. On ranks: test_sharded_averages."""

import errno
import os
import shutil

import pytest
import torch
from composer.utils import checkpoint
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from cpt_algorithms.checkpoints.links import LinkingWriter, linking
from cpt_algorithms.checkpoints.save_folder import half_written, is_complete

SNAPSHOTS = {batch: {'a': torch.full((3, 2), float(batch)), 'b': torch.arange(5.0) + batch} for batch in (2, 4, 6)}


def snapshot_of(key):
    return f'ba{key.split(".")[1]}' if key.startswith('window.') else None


class Saver:
    """A run that saves what changes and a window."""

    def __init__(self, folder):
        self.folder, self.written = folder, {}

    def save(self, batch, *window, **changed):
        kept = {str(each): {**SNAPSHOTS[each], **changed} for each in window}
        state = {'weight': torch.full((4,), float(batch)), 'note': f'of {batch}', 'window': kept}
        path = self.folder / f'ep0-ba{batch}'
        save(state, storage_writer=LinkingWriter(str(path), snapshot_of, self.written), no_dist=True)
        return path


@pytest.fixture
def run(tmp_path):
    return Saver(tmp_path)


def check(path, batch, *window, **changed):
    kept = {
        str(each): {key: torch.zeros_like(t) for key, t in {**SNAPSHOTS[each], **changed}.items()} for each in window
    }
    found = {'weight': torch.zeros(4), 'note': '', 'window': kept}
    assert is_complete(path)
    load(found, checkpoint_id=path, no_dist=True)
    assert (found['note'], found['weight'].tolist()) == (f'of {batch}', [batch] * 4)
    for each in window:
        for key, tensor in {**SNAPSHOTS[each], **changed}.items():
            assert torch.equal(found['window'][str(each)][key], tensor)


def links(path):
    return {file.name: file.stat().st_nlink for file in path.glob('*.distcp')}


def test_what_never_changes_is_written_once(run):
    first, second = run.save(4, 2, 4), run.save(6, 4, 6)
    assert links(first) == {'__0_0.distcp': 1, '__0_ba2_0.distcp': 1, '__0_ba4_0.distcp': 2}
    assert links(second) == {'__0_0.distcp': 1, '__0_ba4_0.distcp': 2, '__0_ba6_0.distcp': 1}
    check(first, 4, 2, 4)
    shutil.rmtree(first)  # as retention does
    check(second, 6, 4, 6)
    third = run.save(8, 4, 6)
    shutil.rmtree(second)
    check(third, 8, 4, 6)


def test_what_is_not_the_same_is_written(run):
    first = run.save(2, 2)
    second = run.save(4, 2, more=torch.ones(2))
    assert links(first)['__0_ba2_0.distcp'] == links(second)['__0_ba2_0.distcp'] == 1
    check(second, 4, 2, more=torch.ones(2))
    run.save(6, 4)
    assert run.written.keys() == {'ba4'}, 'what has left the window is forgotten'


@pytest.mark.parametrize('why', ['gone', 'no links', 'cut off', 'a link that leads elsewhere'])
def test_what_cannot_be_linked_is_written(why, run, monkeypatch):
    first = run.save(2, 2)
    shared = first / '__0_ba2_0.distcp'
    if why == 'gone':
        shutil.rmtree(first)
    elif why == 'cut off':
        os.truncate(shared, 100)
    elif why == 'a link that leads elsewhere':
        shared.rename(first / 'elsewhere')
        shared.symlink_to('elsewhere')
    else:

        def link(*_):
            raise OSError(errno.EPERM, 'not on this file system')

        monkeypatch.setattr(os, 'link', link)
    second = run.save(4, 2)
    check(second, 4, 2)
    assert set(links(second).values()) == {1}


def test_a_checkpoint_that_is_written_anew_leaves_what_it_shared_alone(run, tmp_path):
    """The run was resumed from an earlier one than the newest, which are all still there."""
    first, second = run.save(4, 2, 4), run.save(6, 4, 6)
    again = Saver(tmp_path)
    different = torch.zeros(3, 2)
    assert again.save(6, 4, a=different) == second
    check(second, 6, 4, a=different)
    check(first, 4, 2, 4)
    again.save(4, 4, a=different)  # links to what it has just written, over what was there
    check(first, 4, 4, a=different)


@pytest.mark.parametrize('at', [0, 1, 2])
def test_a_save_over_another_that_is_cut_off_leaves_no_mixture(at, run, tmp_path, monkeypatch):
    run.save(4, 2, 4)
    second, again, write = run.save(6, 4, 6), Saver(tmp_path), LinkingWriter._write
    written = []

    def cut_off(*arguments):
        if len(written) == at:
            raise KeyboardInterrupt
        written.append(write(*arguments))
        return written[-1]

    monkeypatch.setattr(LinkingWriter, '_write', cut_off)
    with pytest.raises((KeyboardInterrupt, CheckpointException)):
        again.save(6, 4, 6)
    assert not is_complete(second) and half_written(tmp_path) == [second]


def test_a_save_that_was_cut_off_is_known(run, tmp_path):
    run.save(4, 2, 4)
    second = run.save(6, 4, 6)
    (second / '.metadata').unlink()
    assert half_written(tmp_path) == [second]


def test_composer_writes_so_only_inside():
    stock = checkpoint.dist_cp
    with pytest.raises(KeyError), linking(snapshot_of, {}):
        made = checkpoint.dist_cp.FileSystemWriter('folder')
        assert isinstance(made, LinkingWriter)
        assert checkpoint.dist_cp.save is stock.save
        raise KeyError
    assert checkpoint.dist_cp is stock and stock.FileSystemWriter is FileSystemWriter
