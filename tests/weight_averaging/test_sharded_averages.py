# SPDX-License-Identifier: Apache-2.0
"""``ema`` and ``lawa`` on FSDP2 ranks under the composer launcher: killed, resumed, resharded."""

import json
import shutil

import pytest
import recorder
import tiny
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader


def config(folder, data, name, **over):
    folder = folder / name
    callbacks = {
        'final_loss': {'window': '4ba', 'interval': '2ba'},
        'recorder': {'path': str(folder.with_suffix('.jsonl')), 'weights': str(folder.with_suffix('.weights'))},
        'ema': {'half_life': '2ba'},
        'lawa': {'k': 2, 'interval': '2ba'},
    }
    cfg = tiny.config(folder.parent, data, name, eval_loader=[tiny.eval_loader('old', data['old'])], eval_interval='3ba', save_interval='3ba',
                      callbacks=callbacks, fsdp_config={'state_dict_type': 'sharded'})  # fmt: skip
    return tiny.merge(cfg, over)


def train(*cfgs, expect=0, ranks=2):
    """One launch; the last may end in another way than the others."""
    paths = [tiny.save(cfg, tiny.Path(cfg['save_folder']).with_suffix('.yaml')) for cfg in cfgs]
    return tiny.launch(tiny.ROOT / 'tests' / 'stages_in_turn.py', *paths, expect=expect, ranks=ranks)


def weights(cfg, batch):
    return torch.load(f'{cfg["callbacks"]["recorder"]["weights"]}/{batch}.pt', weights_only=True)


def exported(cfg, name):
    tensors = load_file(f'{cfg["save_folder"]}/huggingface/ba8{name}/model.safetensors')
    return {f'model.{key}': tensor for key, tensor in tensors.items()}


def losses(cfg):
    return json.loads((tiny.Path(cfg['save_folder']) / 'losses.json').read_text())['losses']


COUNTS = [2 ** (-(8 - batch) / 2) for batch in range(1, 9)]


@pytest.fixture(scope='module')
def runs(data, tmp_path_factory):
    """A straight run, one that was killed in the middle of the window, and a copy of that."""
    folder = tmp_path_factory.mktemp('runs')
    straight = config(folder, data, 'straight')
    killed = config(folder, data, 'killed', callbacks={'recorder': {'kill_at': 5}})
    train(straight, killed, expect=tiny.KILLED)
    assert (folder / 'straight' / 'done.json').exists() and not (folder / 'killed' / 'done.json').exists()
    shutil.copytree(folder / 'killed', folder / 'elastic', symlinks=True)
    return folder, straight, killed


@pytest.mark.long
def test_killed_and_resumed(runs):
    tmp_path, straight, killed = runs
    assert set(losses(straight)) == {'old', 'old/ema_2ba', 'old/lawa'}

    # the checkpoint is sharded, averages included, and its model is the training weights
    folder = tmp_path / 'straight' / 'ep0-ba8'
    there = FileSystemReader(folder).read_metadata().state_dict_metadata
    for prefix in ('state.model', 'state.callbacks.EMA.averages.ema_2ba', 'state.callbacks.LAWA.window.8'):
        assert len(there[f'{prefix}.model.transformer.wte.weight'].chunks) == 2, 'a shard of each rank'
    for key, tensor in exported(straight, '').items():
        assert torch.equal(tensor, weights(straight, 8)[key])

    # of the window, each rank writes what is new and links to what the checkpoint before holds
    files = {path.name: path.stat() for path in folder.glob('*.distcp')}
    assert files.keys() == {f'__{rank}_{name}0.distcp' for rank in (0, 1) for name in ('', 'ba6_', 'ba8_')}
    for name, found in files.items():
        assert found.st_nlink == (2 if 'ba6' in name else 1)
        assert found.st_nlink == 1 or found.st_ino == (folder.with_name('ep0-ba6') / name).stat().st_ino

    # averages of shards are shards of the average
    for name, batches, shares in (
        ('-ema_2ba', range(1, 9), [c / sum(COUNTS) for c in COUNTS]),
        ('-lawa', (6, 8), [0.5, 0.5]),
    ):
        for key, tensor in exported(straight, name).items():
            expected = sum(s * weights(straight, b)[key].double() for s, b in zip(shares, batches, strict=True))
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-8)

    # resumed, it is the straight run
    resumed = tiny.merge(killed, {'callbacks': {'recorder': {'kill_at': None}}})
    printed = train(resumed)
    assert 'ema: restored ema_2ba at batch 3' in printed
    assert 'lawa: restored lawa at batch 3' in printed
    for rank in (0, 1):
        ours, theirs = (recorder.read(cfg['callbacks']['recorder']['path'], rank) for cfg in (resumed, straight))
        assert ours == theirs
    assert losses(resumed) == losses(straight), 'raw and averaged, bit for bit'
    for name in ('', '-ema_2ba', '-lawa'):
        ours, theirs = exported(resumed, name), exported(straight, name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.slow
def test_resumed_on_four_ranks_the_averages_go_on_from_what_they_were(runs, data):
    tmp_path, straight, _ = runs
    elastic = config(
        tmp_path,
        data,
        'elastic',
        run_name='killed',
        callbacks={'recorder': {'weights': str(tmp_path / 'elastic.weights')}},
    )
    printed = train(elastic, ranks=4)
    assert 'ema: restored ema_2ba at batch 3' in printed, printed[-4000:]
    seen = {b: weights(straight, b) for b in (1, 2, 3)} | {b: weights(elastic, b) for b in range(4, 9)}
    shares = [c / sum(COUNTS) for c in COUNTS]
    for key, tensor in exported(elastic, '-ema_2ba').items():
        expected = sum(s * seen[b][key].double() for s, b in zip(shares, range(1, 9), strict=True))
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-8)
    for key, tensor in exported(elastic, '-lawa').items():
        torch.testing.assert_close(tensor, (seen[6][key] + seen[8][key]) / 2, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_mistakes_of_sharded_averaging_cannot_happen(data, tmp_path):
    """Several runs in one launch; averages_cases.py asserts on both ranks and prints a line for each case."""
    path = tiny.save(config(tmp_path, data, 'case'), tmp_path / 'case.yaml')
    printed = tiny.launch(tiny.ROOT / 'tests' / 'weight_averaging' / 'averages_cases.py', path)
    for case in ('local shards', 'no averages saved', 'full', 'gathered parameters', "Composer's EMA", 'DDP'):
        assert f'{case}: ok' in printed, printed[-6000:]
