# SPDX-License-Identifier: Apache-2.0
"""Runs of one rank without a GPU are forks of a process that has made the imports."""

import os
import signal
import subprocess
import sys
import time

import pytest
import tiny

from cpt_algorithms.launch.launcher import LaunchError, Resources, make_launcher

SCRIPT = """
import os, sys, time
imported = 'llmfoundry' in sys.modules
import sibling
print(sys.argv, __name__, sys.modules['__main__'].__file__ == __file__, imported, os.environ['OMP_NUM_THREADS'])
exec(open(sys.argv[1]).read())
"""

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='elsewhere every run is a process of its own')


@pytest.fixture
def script(tmp_path):
    (tmp_path / 'sibling.py').touch()
    path = tmp_path / 'script.py'
    path.write_text(SCRIPT)
    return path


def write(folder, does):
    folder.mkdir()
    (folder / 'run.yaml').write_text(does)
    return folder


def wait(handle, seconds=60):
    deadline = time.monotonic() + seconds
    while (code := handle.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return code


def test_a_script_runs_and_ends_as_if_it_had_been_started_by_itself(script, tmp_path, monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '3')
    start = make_launcher(Resources(), jobs=1)
    ends = {
        'pass': (0, ''),
        'sys.exit()': (0, ''),
        'sys.exit(7)': (7, ''),
        'sys.exit("no such thing")': (1, 'no such thing'),
        'raise ValueError("bad")': (1, 'ValueError: bad'),
        'os.kill(os.getpid(), 9)': (-9, ''),
        'import multiprocessing as m; p = m.Process(target=print); p.start(); p.join(); sys.exit(p.exitcode)': (0, ''),
    }
    handles = []
    for index, does in enumerate(ends):
        handles.append(start(script, write(tmp_path / f'run{index}', does)))  # they run side by side
    for index, (does, (code, says)) in enumerate(ends.items()):
        run = tmp_path / f'run{index}'
        assert wait(handles[index]) == code, does
        assert handles[index].poll() == code
        log = (run / 'log.txt').read_text()
        if code != -9:  # what it had not flushed is lost, as ever
            assert f"['{script}', '{run / 'run.yaml'}'] __main__ True True 3" in log
        assert says in log
    assert wait(start(script, tmp_path / 'run0')) == 0
    assert wait(start(script, tmp_path / 'run5')) == -9, 'not the exit status of an earlier start'


PARENT = """
import sys, time
from pathlib import Path
from cpt_algorithms.launch.launcher import Layout, starter
handle = starter(Layout(), jobs=1)(Path(sys.argv[1]), Path(sys.argv[2]))
print(handle.name.split()[-1], flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_it_dies_with_the_process_that_wanted_it(script, tmp_path):
    run = write(tmp_path / 'run', 'time.sleep(600)')
    parent = subprocess.Popen(
        [sys.executable, '-c', PARENT, str(script), str(run)], stdout=subprocess.PIPE, text=True, cwd=tiny.ROOT
    )
    assert parent.stdout is not None
    process = int(parent.stdout.readline())
    os.kill(process, 0)
    parent.send_signal(signal.SIGKILL)
    parent.wait(30)
    deadline = time.monotonic() + 30
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(process, 0)
            time.sleep(0.05)


def test_a_server_that_cannot_import_is_one_line(script, tmp_path, monkeypatch):
    (tmp_path / 'torch.py').write_text('raise ImportError("broken")')
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    with pytest.raises(LaunchError, match='^run: the process that imports what training needs has ended'):
        make_launcher(Resources(), jobs=1)(script, write(tmp_path / 'run', ''))
