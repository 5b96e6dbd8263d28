# SPDX-License-Identifier: Apache-2.0
"""How runs end and wait: killed by which signal, which rank first, interrupted, and for whom."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import tiny
from filelock import FileLock, Timeout
from hypothesis import given
from hypothesis import strategies as st

from cpt_algorithms import files
from cpt_algorithms.launch.processes import run_command
from cpt_algorithms.sequence.run import how_it_ended

# Exit codes that say a signal, as a process, a shell and Python's exit(-9) have it; 256 - 1 is what exit(-1) gives, too
SIGNALS = [number for number in signal.Signals if number != signal.SIGHUP and number < 32]


@given(st.sampled_from(SIGNALS), st.sampled_from(['process', 'shell', 'negative']))
def test_a_signal_is_named_however_it_is_said(number, how):
    code = {'process': -number, 'shell': 128 + number, 'negative': 256 - number}[how]
    said = how_it_ended(code, ['warnings.warn(...)'])
    assert said is not None and re.search(rf'by {signal.Signals(number).name}\b', said)
    assert ('out of memory' in said) == ('SIGKILL' in said)


@given(st.integers(0, 7), st.sampled_from([-9, -11, -15]), st.lists(st.integers(0, 7), max_size=3))
def test_the_rank_that_died_first_is_named(rank, code, later):
    lines = [f'ERROR:composer.cli.launcher:Rank {rank} crashed with exit code {code}.']
    lines += [f'ERROR:composer.cli.launcher:Global rank {each} (PID 7) exited with code 143' for each in later]
    said = how_it_ended(143, ['[batch=1/8]:', *lines])
    assert said.startswith(f'rank {rank} was killed by {signal.Signals(-code).name}')


def test_what_the_first_rank_said_is_repeated():
    block = ['----------Begin global rank 1 STDERR----------', 'Traceback', 'ValueError: of rank 1', '']
    lines = ['Rank 1 crashed with exit code 1.', *block, '----------End global rank 1 STDERR----------', 'rank 0: 143']
    assert how_it_ended(143, lines) == 'rank 1 ended first, with exit code 1: ValueError: of rank 1.'
    assert how_it_ended(1, ['ValueError: what the log ends with']) is None


@pytest.mark.slow
def test_composers_launcher_says_it_so(tmp_path):
    script = tmp_path / 'rank.py'
    script.write_text("import os, time\nos.environ['RANK'] == '1' and os.kill(os.getpid(), 9)\ntime.sleep(99)")
    command = [sys.executable, '-m', 'composer.cli.launcher', '-n', '2', str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    said = how_it_ended(done.returncode, (done.stdout + done.stderr).splitlines())
    assert said == 'rank 1 was killed by SIGKILL: out of memory?, and the others were stopped.'


def test_control_c_ends_a_command_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['recipes/sequence.py'])
    for error, code in ((KeyboardInterrupt(), 130), (SystemExit(130), 130), (SystemExit(143), 143)):

        def interrupted(error=error):
            raise error

        with pytest.raises(SystemExit) as end:
            run_command(interrupted)
        assert end.value.code == code
        assert re.fullmatch('sequence.py: interrupted; .*\n', capsys.readouterr().err)
    with pytest.raises(SystemExit) as end:
        run_command(lambda: sys.exit('refused'))
    assert (end.value.code, capsys.readouterr().err) == ('refused', '')
    commands = [*tiny.ROOT.glob('recipes/*.py')]
    assert len(commands) == 4
    assert all(path.read_text().endswith('run_command(main)\n') for path in commands)


@pytest.mark.parametrize('error', [KeyboardInterrupt, SystemExit, OSError(28, 'No space left on device')])
def test_what_ends_a_write_leaves_nothing_hidden(error, tmp_path, monkeypatch):
    files.write_json(tmp_path / 'done.json', 1)

    def fail(_):
        raise error

    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(type(error) if isinstance(error, OSError) else error):
        files.write_json(tmp_path / 'done.json', 2)
    assert [path.name for path in tmp_path.iterdir()] == ['done.json']
    assert files.read_json(tmp_path / 'done.json') == 1


def test_what_a_kill_left_is_removed_and_nothing_else(tmp_path):
    kept = ['.lock', '.lock.json', '.ba8', '.losses.json', '.losses.json.0123456', 'losses.json.01234567']
    kept.append('.young.01234567')
    for name in ['.losses.json.01234567', '.run.yaml.89abcdef', *kept]:
        (tmp_path / name).touch()
        if 'young' not in name:
            os.utime(tmp_path / name, (1, 1))
    files.remove_partials(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_who_waits_for_a_lock_says_for_whom(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(files, '_PATIENCE', 0.2)
    first, second = (FileLock(tmp_path / '.lock', thread_local=False) for _ in range(2))
    files.take(first, 'old-s17, building')
    assert caplog.text == ''
    holder = rf'old-s17, building \(process {os.getpid()} on .*, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\)'
    with pytest.raises(Timeout):
        files.take(second, 'new-s17', timeout=1.5)  # a busy machine is late
    assert len(re.findall(f'new-s17: waiting for {holder}, which has {tmp_path}/.lock', caplog.text)) == 1
    threading.Timer(0.5, first.release).start()
    files.take(second, 'new-s17')
    assert files.holder_of(first).startswith('new-s17 (')
    second.release()
    (tmp_path / '.lock.json').write_text('half')
    assert files.holder_of(first) == 'another process'


@pytest.mark.slow
def test_a_sequence_is_interrupted_and_goes_on(data, tmp_path):
    stages = {'old': {'max_duration': '32ba'}}
    path = tiny.save(tiny.sequence_spec(tmp_path, data, stages=stages), tmp_path / 'sequence.yaml')
    command = [sys.executable, str(tiny.SEQUENCE), str(path)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    log = tmp_path / 'runs' / 'old-s17' / 'log.txt'
    while not (log.exists() and '[batch=2/32]' in log.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert 'Traceback' not in printed and printed.count('sequence.py: interrupted') == 1
    locks = {f'{lock}{end}' for lock in ('.lock', '.sequence.lock') for end in ('', '.json')}
    assert {path.name for path in log.parent.glob('.*')} <= locks
    assert subprocess.run(command, capture_output=True, check=False, timeout=300).returncode == 0
    assert json.loads((log.parent / 'done.json').read_text())['batch'] == 32
