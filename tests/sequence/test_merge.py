# SPDX-License-Identifier: Apache-2.0
"""A merge is what its stage.json says: what was averaged of another trunk, or otherwise, is made again or refused."""

import json
import re

import pytest
import tiny
import torch

from cpt_algorithms.files import write_json
from cpt_algorithms.sequence import merge as merges
from cpt_algorithms.stage.stage import Stage


def average(paths, weights, out, to, **how):
    """In place of the averages of real checkpoints."""
    assert not out.exists()
    out.mkdir(parents=True) if to == 'hf' else None
    text = ' '.join([*(path.name for path in paths), paths[-1].read_bytes().hex()])
    (out / 'config.json' if to == 'hf' else out).write_text(text)


class OutOfMemory(Exception):
    """As the evaluation may end."""


@pytest.fixture
def merged(data, tmp_path, monkeypatch):
    """Merges; killed in their evaluation unless they may end."""
    (tmp_path / 'trunk').mkdir()
    train(tmp_path, {})
    monkeypatch.setattr(merges, 'average_files', average)

    def merged(ends=True, run_name='merged', **over):
        of = {'of': str(tmp_path / 'trunk'), 'batch': 8, 'last': 3, 'every': '2ba', **over}
        cfg = tiny.config(
            tmp_path, data, run_name, save_folder=str(tmp_path / 'merged'), max_duration='0ba', variables={'merge': of}
        )
        monkeypatch.setattr(merges, 'evaluate_losses', lambda given: ([], None) if ends else out_of_memory())
        merges.merge_stage(Stage.from_yaml(cfg))
        return (tmp_path / 'merged' / 'merged.pt').read_text(), list((tmp_path / 'merged').glob('huggingface/*/*.json'))

    return merged


def out_of_memory():
    raise OutOfMemory


def train(tmp_path, state, batches=(2, 4, 6, 8, 10)):
    for batch in batches:
        torch.save({'state': state}, tmp_path / 'trunk' / f'ep0-ba{batch}-rank0.pt')
    latest = tmp_path / 'trunk' / 'latest-rank0.pt'
    latest.unlink(missing_ok=True)
    latest.symlink_to(f'ep0-ba{batches[-1]}-rank0.pt')


def another_trunk(tmp_path):
    train(tmp_path, {'again': 1})


def test_an_average_that_was_not_evaluated_is_kept_and_another_is_made_again(merged, tmp_path):
    with pytest.raises(OutOfMemory):
        merged(ends=False)
    path = tmp_path / 'merged' / 'merged.pt'
    first, when = path.read_text(), path.stat().st_mtime_ns
    with pytest.raises(OutOfMemory):
        merged(ends=False, run_name='renamed')
    assert path.stat().st_mtime_ns == when, 'it was made already'
    with pytest.raises(OutOfMemory):
        merged(ends=False, last=2)
    assert names(first) == ['ep0-ba4-rank0.pt', 'ep0-ba6-rank0.pt', 'ep0-ba8-rank0.pt'], 'not what came later'
    assert path.read_text() == first.replace('ep0-ba4-rank0.pt ', '') != first
    another_trunk(tmp_path)
    last, (export,) = merged(last=2, batch=6)
    assert names(last) == ['ep0-ba4-rank0.pt', 'ep0-ba6-rank0.pt']
    assert last.split()[-1] != first.split()[-1], 'of the trunk that is there'
    assert export.read_text() == f'merged.pt {last.encode().hex()}' and export.parent.name == 'ba6'
    assert json.loads((tmp_path / 'merged' / 'stage.json').read_text())['config']['variables']['merge']['last'] == 2


def names(average):
    return average.split()[:-1]


@pytest.mark.parametrize(
    'of, said',
    [
        ({'batch': 12}, r'variables.merge.batch=12: .* batch 12 is to be the newest, and that is 10'),
        ({'last': 5}, r'variables.merge.batch=8: .* batch 0 is missing'),
    ],
)
def test_a_merge_of_checkpoints_that_are_not_there_is_refused(merged, tmp_path, of, said):
    with pytest.raises(SystemExit, match=said):
        merged(**of)


@pytest.mark.parametrize('change', ['settings', 'trunk'])
def test_a_finished_merge_of_something_else_is_refused(merged, tmp_path, capsys, change):
    before, _ = merged()
    merged(run_name='renamed')
    assert 'renamed: finished already' in capsys.readouterr().out
    if change == 'trunk':
        another_trunk(tmp_path)
    words = {'settings': 'merge.last: 3 -> 2', 'trunk': 'load_path: .*trunk/latest-rank0.pt .* -> '}[change]
    with pytest.raises(SystemExit, match=rf'^merged stopped: save_folder=.* with other settings \({words}'):
        merged(**({'last': 2} if change == 'settings' else {}))
    assert (tmp_path / 'merged' / 'merged.pt').read_text() == before


def test_weights_of_which_nobody_says_what_they_are_of_are_left_alone(merged, tmp_path):
    place = tmp_path / 'merged' / 'merged.pt'
    place.parent.mkdir()
    place.write_text('of somebody')
    with pytest.raises(SystemExit, match=r'merged stopped: .* holds weights \(merged.pt\), and no stage.json'):
        merged()
    assert place.read_text() == 'of somebody'
    write_json(place.with_name('stage.json'), {'run_name': 1})
    with pytest.raises(SystemExit, match=re.escape(str(place.with_name('stage.json')))):
        merged()
