# SPDX-License-Identifier: Apache-2.0
"""A sequence run for real: killed in the middle it ends with the same numbers, and a bad arm does not stop the others."""

import csv
import json
import os
import re
import signal
import sys
import time
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest
import sequence
import tiny
import wandb_files
from filelock import FileLock
from rich.console import Console

from cpt_algorithms.files import write_json
from cpt_algorithms.sequence import run as sequence_run


@pytest.fixture
def spec(data, tmp_path):
    over = {
        'scheduler': {'name': 'rewarm_cosine', 't_warmup': '0.1dur'},
        'callbacks': {'lawa': {'k': 3, 'interval': '3ba'}},
    }
    arms = {'none': {}, 'replay 25 %': {'new': {'replay': {'fraction': 0.25}}}}
    return tiny.sequence_spec(tmp_path, data, arms=arms, common=tiny.sequence_common(tmp_path, data, **over))


def write(spec, folder, name='sequence.yaml'):
    return tiny.save(spec, folder / name)


@pytest.fixture
def run(monkeypatch, capsys):
    """The recipe in this process, which has imported everything already; its runs have processes of their own."""
    before, preload = signal.getsignal(signal.SIGTERM), forkserver.set_forkserver_preload
    tiny.stop_fork_server()  # of another test file
    monkeypatch.setattr(BaseContext, 'set_forkserver_preload', lambda self, names: preload([*names, 'tiny']))

    def run(path, *arguments):
        monkeypatch.setattr(sys, 'argv', ['sequence.py', str(path), *arguments])
        error = ''
        try:
            sequence.main()
        except SystemExit as stopped:
            error = str(stopped)
        return error, capsys.readouterr().out

    yield run
    signal.signal(signal.SIGTERM, before)


def without_times(value):
    """Everything that is said of runs, but how long they took."""
    if isinstance(value, list):
        return [without_times(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: without_times(item) for key, item in value.items() if key != 'device_seconds' and 'hours' not in key}


def results(spec):
    folder = Path(spec['folder'])
    files = [folder / 'report.json', *folder.glob('*/losses.json'), *folder.glob('*/forgetting.json')]
    return {str(path.relative_to(folder)): without_times(json.loads(path.read_text())) for path in sorted(files)}


def table(runs):
    with open(runs / 'table.csv', encoding='utf-8') as file:
        return {row['arm']: row for row in csv.DictReader(file)}


def holders(folder):
    """Processes that have files of a folder open, as a run has its log."""
    found = set()
    for link in Path('/proc').glob('[0-9]*/fd/*'):
        try:
            if os.readlink(link).startswith(f'{folder}/'):
                found.add(link.parts[2])
        except OSError:  # it has ended, or is another user's
            pass
    return found


def wait_until_gone(folder, seconds=10):
    """Its runs die with a sequence."""
    deadline = time.monotonic() + seconds
    while holders(folder):
        assert time.monotonic() < deadline, 'a killed sequence must not leave runs behind'
        time.sleep(0.1)


@pytest.mark.long
def test_a_crashing_arm_does_not_stop_the_others_and_the_next_run_trains_what_is_missing(
    spec, tmp_path, run, monkeypatch
):
    # what no preflight can foresee: a gradient that is no number
    bad = tmp_path / 'bad'
    bad.touch()
    paths = [str(tiny.ROOT / 'tests' / 'trouble.py')]
    spec['arms']['broken'] = {'new': {'code_paths': paths, 'callbacks': {'trouble': {'file': str(bad), 'nan_at': 2}}}}
    spec['common']['loggers'] = {'wandb': {'tags': ['mine']}}
    monkeypatch.setenv('WANDB_DIR', str(tmp_path))
    path, runs = write(spec, tmp_path), tmp_path / 'runs'
    error, printed = run(path)
    assert 'new-broken-s17: failed' in printed
    assert 'the weights after batch 2 are not finite' in printed
    assert '1 of 4 runs failed: new-broken-s17' in error
    page = json.loads((runs / 'report.json').read_text())
    assert {each['name']: each['state'] for each in page['runs']} == {
        'old-s17': 'finished',
        'new-s17': 'finished',
        'new-replay_25pct-s17': 'finished',
        'new-broken-s17': 'failed',
    }
    missing = [line for line in page['missing'] if 'the weights after batch 2 are not finite' in line]
    assert any('new-broken-s17' in line for line in missing)

    # the table
    rows = table(runs)
    arms = [f'{arm}{average}' for arm in ('old only', 'none', 'replay 25 %') for average in ('', ', lawa')]
    assert list(rows) == [*arms, 'broken']
    assert rows['broken']['state'] == 'failed, last evaluated at batch 0 of 16'
    for arm in ('none', 'none, lawa'):
        assert float(rows[arm]['compute vs union']) == 0.5
    final = results(spec)['new-s17/losses.json']['final']
    assert float(rows['none, lawa']['loss old']) == pytest.approx(final['old/lawa']['mean'])
    at_start = results(spec)['new-s17/forgetting.json']['parent']
    assert float(rows['none, lawa']['forgetting']) == pytest.approx(final['old/lawa']['mean'] - at_start['old']), (
        "against the parent's own weights, from which the stage started"
    )
    assert at_start == results(spec)['new-replay_25pct-s17/forgetting.json']['parent']

    # W&B can group them by sequence, stage, arm and seed
    tracked = {written.name: written for written in wandb_files.read(tmp_path)}
    grouped = {
        name: [written.config[k] for k in ('sequence', 'stage', 'arm', 'seed')] for name, written in tracked.items()
    }
    assert grouped['old-s17'] == ['test', 'old', 'shared', 17]
    assert grouped['new-s17'] == ['test', 'new', 'none', 17]
    none = tracked['new-s17']
    assert (none.group, none.job_type, none.tags) == ('test', 'new', ['mine', 'new', 'none', 'seed 17'])
    row = next(row for row in page['rows'] if row['arm'] == 'none')
    assert none.summary['final_loss/mean'] == pytest.approx(row['loss mean'])
    assert none.summary['final_forgetting/mean'] == pytest.approx(row['forgetting'])
    assert none.summary['final_adaptation/mean'] == pytest.approx(row['adaptation'])

    # the same command again
    bad.unlink()
    done_before = {p: p.stat().st_mtime_ns for p in runs.glob('*/done.json')}
    assert len(done_before) == 3
    error, printed = run(path)
    assert not error, printed
    assert 'final validation loss' in printed
    assert f'report: {runs / "report.html"}\n' in printed
    for path_done, when in done_before.items():
        assert path_done.stat().st_mtime_ns == when, 'finished work was done again'
    assert list(table(runs)) == [*arms, 'broken', 'broken, lawa']
    assert without_times(table(runs)['none']) == without_times(rows['none'])
    assert float(table(runs)['broken']['loss old']) == float(rows['none']['loss old']), 'mended, it is the same arm'

    shorter = {**spec, 'stages': {'old': {'max_duration': '12ba'}, 'new': {'max_duration': '16ba'}}}
    error, _ = run(write(shorter, tmp_path, 'changed.yaml'))
    assert 'old-s17 holds a run with other settings (max_duration: 16ba -> 12ba)' in error


def test_a_run_that_another_process_trains_is_waited_for(spec, tmp_path, monkeypatch, capsys):
    """Two agents of a sweep share the first stage."""
    spec['arms'] = {'none': {}}
    path = write(spec, tmp_path)
    first = Path(spec['folder']) / 'old-s17'
    first.mkdir(parents=True)
    lock = FileLock(first / '.sequence.lock')
    lock.acquire()
    launched = []

    def start(recipe, folder):
        launched.append(folder.name)
        raise KeyboardInterrupt

    def sleep(seconds):
        write_json(first / 'done.json', {'max_duration': '16ba', 'lm_eval': None})  # the other process is done

    monkeypatch.setattr(sequence_run.time, 'sleep', sleep)
    with pytest.raises(KeyboardInterrupt):
        sequence_run.run_all(tiny.planned(path)[1], start, 2, Path(), Console())
    assert launched == ['new-s17']
    assert 'old-s17: waiting for another process' in capsys.readouterr().out


def call(monkeypatch, path, *arguments):
    """The recipe in this process, for what trains nothing."""
    monkeypatch.setattr(sys, 'argv', ['sequence.py', str(path), *arguments])
    sequence.main()


def test_dry_run_prints_the_plan_and_trains_nothing(spec, tmp_path, monkeypatch, capsys):
    call(monkeypatch, write(spec, tmp_path), '--dry-run')
    printed = capsys.readouterr().out
    assert 'test: 3 runs' in printed
    assert re.search(r'new 1,536 \(\S+x\), old 512 \(\S+x\)', ' '.join(printed.split()))
    assert 'warm-up' in printed
    assert not (tmp_path / 'runs').exists()


def test_a_bad_arm_is_refused_before_anything_is_trained(spec, tmp_path, monkeypatch):
    spec['arms']['typo'] = {'new': {'replay': {'fracton': 0.1}}}
    with pytest.raises(SystemExit, match=r"replay\.fracton is not a key that anything reads; did you mean 'fraction'"):
        call(monkeypatch, write(spec, tmp_path))
    spec['arms']['typo'] = {'new': {'scheduler': {'name': 'rewarm_cosine', 't_warmup': '9999tok'}}}
    with pytest.raises(SystemExit, match=r"new-typo-s17: t_warmup='9999tok' is in tok"):
        call(monkeypatch, write(spec, tmp_path))
    with pytest.raises(SystemExit, match='cannot be read'):
        call(monkeypatch, tmp_path / 'nowhere.yaml')
    assert not (tmp_path / 'runs').exists()
