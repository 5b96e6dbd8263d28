# SPDX-License-Identifier: Apache-2.0
"""Runs that meet what nobody plans for: what is kept is whole, what happened is said in one line, the others go on."""

import gc
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import recorder
import tiny
import torch
from safetensors.torch import load_file

from cpt_algorithms.stage.preflight import preflight
from cpt_algorithms.stage.stage import Stage
from cpt_algorithms.validation import ConfigError

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
    ('nan_at', 'what'),
    [
        pytest.param(4, 'weights after batch 4 are not finite', marks=pytest.mark.long),
        (5, 'loss of batch 6 is nan'),
    ],
)
def test_no_checkpoint_holds_what_is_no_number(nan_at, what, stage, tmp_path):
    cfg = stage('spoilt', nan_at=nan_at)
    last = 2 if nan_at == 4 else 4
    for _ in range(2):  # the same command goes on from there, and comes to the same end
        line = stopped(cfg, tmp_path)
        assert f'spoilt stopped: the {what}. The latest checkpoint is that of batch {last}. ' in line
        names = [f'ep0-ba{batch}-rank0.pt' for batch in range(2, last + 1, 2)]
        assert checkpoints(cfg) == (names, names[-1])
        for name in names:
            tensors = weights_in(Path(cfg['save_folder']) / name)
            assert len(tensors) > 20 and all(tensor.isfinite().all() for tensor in tensors)
        assert not (Path(cfg['save_folder']) / 'huggingface').exists()
        assert not (Path(cfg['save_folder']) / 'done.json').exists()


@pytest.mark.long
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


def read_only(folder, *command, expect=0):
    """What a command prints for which a folder lies on a file system that is mounted read-only."""
    mounted = f'mount --bind {folder} {folder} && mount -o remount,ro,bind {folder} && exec "$@"'
    done = subprocess.run(
        ['unshare', '-rm', 'sh', '-c', mounted, 'sh', sys.executable, *map(str, command)],
        capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    if 'unshare:' in done.stderr or 'mount:' in done.stderr:
        pytest.skip(f'nothing can be mounted here: {done.stderr.strip()}')
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_folder_that_cannot_be_written_to_is_refused_by_its_key(stage, data, tmp_path):
    (tmp_path / 'file').touch()
    new = {'remote': str(data['new']), 'local': str(tmp_path / 'file' / 'cache'), 'split': 'train'}
    evaluated = {'dataset': {'remote': str(data['old']), 'local': str(tmp_path / 'file')}}
    over = {
        'save_folder': str(tmp_path / 'file' / 'run'), 'train_loader': {'dataset': {'new': new}},
        'eval_loader': [tiny.merge(tiny.eval_loader('old', data['old']), evaluated)],
    }  # fmt: skip
    with pytest.raises(ConfigError) as refused:
        preflight(Stage.from_yaml(stage('run', over=over)))
    assert refused.value.problems == refused.value.unseen, 'another machine may have such folders'
    blamed = [problem.partition(f': {tmp_path}/file is no folder; ')[0] for problem in refused.value.problems]
    assert sorted(set(blamed)) == ['eval_loader[0].dataset.local', 'save_folder', 'train_loader.dataset.new.new.local']
    assert any('if all of the data is there already, leave remote out' in line for line in refused.value.problems)
    (tmp_path / 'mine').mkdir()
    code = f"from cpt_algorithms.files import check_writable; check_writable('key', '{tmp_path}/mine/run', 'advice')"
    assert read_only(tmp_path, '-c', code, expect=1).endswith(
        f'StorageError: key: {tmp_path}/mine cannot be written to; advice\n'
    )


@pytest.mark.slow
def test_data_on_a_read_only_disk(data, stage, tmp_path):
    """Is read as it is; but nothing can be cached there."""
    (tmp_path / 'runs').mkdir()
    disk = tmp_path / 'disk'
    for name in ('new', 'old'):
        shutil.copytree(data[name], disk / name)
    here, cached = (
        {'local': str(disk / 'new'), 'split': 'train', **each} for each in ({}, {'remote': str(data['new'])})
    )
    for name, new, status in (('here', here, 0), ('cached', cached, 1)):
        over = {
            'eval_loader': [tiny.eval_loader('old', disk / 'old')], 'train_loader': {'dataset': {'new': new}},
            'save_folder': str(tmp_path / 'runs' / name),
        }  # fmt: skip
        path = tiny.save(stage(name, over=over), tmp_path / f'{name}.yaml')
        printed = read_only(disk, tiny.RECIPE, path, expect=status)
        assert (tmp_path / 'runs' / name / 'done.json').exists() == (status == 0)
    assert f'1. train_loader.dataset.new.new.local: {disk}/new/train cannot be written to; ' in printed
    assert 'Traceback' not in printed


@pytest.mark.slow
def test_two_ranks_stop_together(stage, tmp_path):
    """What only one of them has met."""
    sharded = {'fsdp_config': {'state_dict_type': 'sharded'}}
    cases = {
        'straight': ({}, None, 0),
        'weights': ({'nan_at': 4}, 'the weights after batch 4 are not finite. The latest checkpoint is that of ', 2),
        'loss': ({'nan_at': 5}, 'the loss of batch 6 is nan. The latest checkpoint is that of ', 4),
        'disk': ({'full_at': 5, 'largest_file': LARGEST}, 'File too large. The latest checkpoint is that of ', 4),
    }
    cfgs = {name: stage(name, over=sharded, **trouble) for name, (trouble, *_) in cases.items()}
    paths = {name: tiny.save(cfg, tmp_path / f'{name}.yaml') for name, cfg in cfgs.items()}
    for name, (_, said, last) in cases.items():
        if said is None:
            continue
        printed = tiny.launch(tiny.RECIPE, paths[name], expect=1)
        stopped = [line for line in printed.splitlines() if line.startswith(f'{name} stopped: ')]
        assert len(stopped) == 2 and all(f'{said}batch {last}. ' in line for line in stopped), printed
        assert 'Traceback' not in printed
        folder = Path(cfgs[name]['save_folder'])
        assert {path.name for path in folder.glob('ep*')} == {f'ep0-ba{batch}' for batch in range(2, last + 1, 2)}
        assert (folder / 'latest-sharded-rank0').resolve().name == f'ep0-ba{last}'
    (tmp_path / 'trouble').unlink()  # it was the machine
    found = {}
    for name, cfg in cfgs.items():
        tiny.launch(tiny.RECIPE, paths[name])
        found[name] = results(cfg, tmp_path, 2)
        assert found[name] == found['straight'], name


def sequence(spec, folder):
    """``recipes/sequence.py`` in a process of its own: its exit status, what it printed, and its report."""
    process = tiny.start(tiny.SEQUENCE, tiny.save(spec, folder / 'sequence.yaml'))
    printed, _ = process.communicate(timeout=1200)
    page = Path(spec['folder']) / 'report.json'
    return process.returncode, printed, json.loads(page.read_text()) if page.exists() else None


@pytest.mark.slow
def test_a_sequence_goes_on_with_the_other_arms_and_says_so(data, tmp_path):
    def trouble(**what):
        return {'new': {'callbacks': {'trouble': {'file': str(tmp_path / 'trouble'), **what}}}}

    arms = {
        'nan': trouble(nan_at=9), 'full': trouble(full_at=7, largest_file=LARGEST),
        'clock': trouble(clock={'4': 7, '9': -30}),
        'wild': {'new': {'optimizer': {'name': 'decoupled_adamw', 'lr': 30.0}}}, 'good': {},
    }  # fmt: skip
    common = tiny.sequence_common(tmp_path, data, callbacks=AVERAGES, code_paths=PATHS)
    spec = tiny.sequence_spec(tmp_path, data, arms=arms, common=common)
    folder = tmp_path / 'runs'
    (tmp_path / 'trouble').touch()
    status, printed, report = sequence(spec, tmp_path)
    assert status == 1
    assert '2 of 6 runs failed: ' in printed
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
        assert 0 < found.pop('cost')['device_seconds'] < 3600, 'whatever the clock said'
        return found

    assert trained('new-clock-s17') == trained('new-s17')
    (tmp_path / 'trouble').unlink()  # it was the machine, and there is room again
    status, printed, report = sequence(spec, tmp_path)
    assert status == 0, printed
    assert '4 of 6 runs are done already' in printed
    assert trained('new-nan-s17') == trained('new-full-s17') == trained('new-s17')
