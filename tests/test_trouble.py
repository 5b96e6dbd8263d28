# SPDX-License-Identifier: Apache-2.0
"""Runs that meet what nobody plans for: what is kept is whole, what happened is said in one line, the others go on."""

import gc
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import recorder
import tiny
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

PATHS = [str(tiny.ROOT / 'tests' / f'{file}.py') for file in ('recorder', 'trouble')]
LARGEST = 30_000  # bytes, of which a checkpoint of these stages has more
AVERAGES = {'ema': {'half_life': '2ba'}, 'lawa': {'k': 2, 'interval': '1ba'}}


@pytest.fixture
def stage(data, tmp_path):
    """A stage, and a file while which is there it is in trouble."""

    def stage(name, **trouble):
        (tmp_path / 'trouble').touch()
        over = trouble.pop('over', {})
        callbacks = {'trouble': {'file': str(tmp_path / 'trouble'), **trouble}, **AVERAGES}
        return tiny.config(tmp_path, data, name, code_paths=PATHS, callbacks=callbacks, **over)

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


@pytest.mark.parametrize(
    ('nan_at', 'what'), [(4, 'the weights after batch 4 are not finite'), (5, 'the loss of batch 6 is nan')]
)
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
    straight = stage('straight', full_at=5)
    (tmp_path / 'trouble').unlink()
    tiny.recipe_here(straight, tmp_path)
    cfg = stage('full', full_at=5, largest_file=LARGEST)
    try:
        line = stopped(cfg, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert f'full stopped: the checkpoint of batch 6 could not be written to {cfg["save_folder"]}, where ' in line
    assert 'File too large. The latest checkpoint is that of batch 4. Make room, and run the same command' in line
    names = ['ep0-ba2-rank0.pt', 'ep0-ba4-rank0.pt']
    assert checkpoints(cfg) == (names, names[-1]), 'half a checkpoint is none'
    (tmp_path / 'trouble').unlink()
    tiny.recipe_here(cfg, tmp_path)
    assert results(cfg, tmp_path) == results(straight, tmp_path)


def results(cfg, folder, ranks=1):
    """Rows and losses of every batch, and all exported weights, to the last bit."""
    exports = sorted((Path(cfg['save_folder']) / 'huggingface').glob('*/*.safetensors'))
    assert len(exports) == 3, 'the weights, and two averages'
    weights = {path.parent.name: {k: v.tolist() for k, v in load_file(path).items()} for path in exports}
    return weights, [recorder.read(folder / f'{cfg["run_name"]}.jsonl', rank) for rank in range(ranks)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ('trouble', 'said'),
    [
        ({'nan_at': 4}, 'the weights after batch 4 are not finite. The latest checkpoint is that of batch 2. '),
        ({'nan_at': 5}, 'the loss of batch 6 is nan. The latest checkpoint is that of batch 4. '),
        ({'full_at': 5, 'largest_file': LARGEST}, 'File too large. The latest checkpoint is that of batch 4. '),
    ],
    ids=['weights', 'loss', 'disk'],
)
def test_two_ranks_stop_together(trouble, said, stage, tmp_path):
    """What only one of them has met."""
    recipe, sharded = tiny.ROOT / 'recipes' / 'continue_pretraining.py', {'fsdp_config': {'state_dict_type': 'sharded'}}
    straight, cfg = stage('straight', over=sharded), stage('spoilt', over=sharded, **trouble)
    for each in (straight, cfg):
        OmegaConf.save(OmegaConf.create(each), tmp_path / f'{each["run_name"]}.yaml')
    began = time.monotonic()
    printed = tiny.launch(recipe, tmp_path / 'spoilt.yaml', expect=1)
    assert time.monotonic() - began < 200
    lines = [line for line in printed.splitlines() if line.startswith('spoilt stopped: ') and said in line]
    assert len(lines) == 2, printed
    assert 'Traceback' not in printed
    folder, last = Path(cfg['save_folder']), 2 if trouble.get('nan_at') == 4 else 4
    assert {path.name for path in folder.glob('ep*')} == {f'ep0-ba{batch}' for batch in range(2, last + 1, 2)}
    assert (folder / 'latest-sharded-rank0').resolve().name == f'ep0-ba{last}'
    (tmp_path / 'trouble').unlink()  # it was the machine
    for each in (straight, cfg):
        tiny.launch(recipe, tmp_path / f'{each["run_name"]}.yaml')
    assert results(cfg, tmp_path, 2) == results(straight, tmp_path, 2)


def sequence(spec, folder):
    """``recipes/sequence.py`` in a process of its own: its exit status, what it printed, and its report."""
    OmegaConf.save(OmegaConf.create(spec), folder / 'sequence.yaml')
    done = subprocess.run(
        [sys.executable, str(tiny.ROOT / 'recipes' / 'sequence.py'), str(folder / 'sequence.yaml')],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    page = Path(spec['folder']) / 'report.json'
    return done.returncode, done.stdout + done.stderr, json.loads(page.read_text()) if page.exists() else None


@pytest.mark.slow
def test_a_sequence_goes_on_with_the_other_arms_and_says_so(data, tmp_path):
    def trouble(**what):
        return {'new': {'callbacks': {'trouble': {'file': str(tmp_path / 'trouble'), **what}}}}

    spec = {
        'name': 'test',
        'folder': str(tmp_path / 'runs'),
        'data': {name: {'local': str(data[name])} for name in ('old', 'new')},
        'stages': {'old': {'max_duration': '16ba'}, 'new': {'max_duration': '16ba'}},
        'arms': {
            'nan': trouble(nan_at=9),
            'full': trouble(full_at=7, largest_file=LARGEST),
            'clock': trouble(clock={'4': 7, '9': -30}),
            'wild': {'new': {'optimizer': {'name': 'decoupled_adamw', 'lr': 30.0}}},
            'good': {},
        },
        'common': tiny.sequence_common(tmp_path, data, callbacks=AVERAGES, code_paths=PATHS),
    }
    folder = tmp_path / 'runs'
    (tmp_path / 'trouble').touch()
    status, printed, report = sequence(spec, tmp_path)
    assert status == 1
    assert '2 of 6 runs failed: new-nan-s17, new-full-s17; run the same command to try them again' in printed
    reasons = {
        'new-nan-s17': 'the loss of batch 10 is nan. ',
        'new-full-s17': 'the checkpoint of batch 8 could not be ',
    }
    for run, reason in reasons.items():
        assert f'\n{run} stopped: {reason}' in printed
        assert f'\nmissing: {run}: failed, last evaluated at batch 0 of 16: {reason}' in printed
        [line] = json.loads((folder / run / 'failed.json').read_text())['log']
        assert line.startswith(f'{run} stopped: {reason}')
    assert '\nmissing: new-wild-s17: diverged: its training loss began at 6.' in printed
    assert {each['name']: each['state'] for each in report['runs']} == {
        'old-s17': 'finished', 'new-nan-s17': 'failed', 'new-full-s17': 'failed', 'new-clock-s17': 'finished',
        'new-wild-s17': 'finished', 'new-s17': 'finished',
    }  # fmt: skip
    states = {row['arm']: row['state'] for row in report['rows']}
    assert states['wild'] == states['wild, lawa'] == 'diverged'
    assert states['clock'] == states['good'] == 'finished'
    assert any(f'{arm}: forgot' in report['findings'][0] for arm in ('clock', 'good'))  # and not a diverged one

    def trained(run):
        found = json.loads((folder / run / 'losses.json').read_text())
        assert 0 < found.pop('cost')['seconds'] < 3600, 'whatever the clock said'
        return found

    assert trained('new-clock-s17') == trained('new-s17')
    (tmp_path / 'trouble').unlink()  # it was the machine, and there is room again
    status, printed, report = sequence(spec, tmp_path)
    assert status == 0, printed
    assert '4 of 6 runs are done already' in printed
    assert trained('new-nan-s17') == trained('new-full-s17') == trained('new-s17')
