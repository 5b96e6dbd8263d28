# SPDX-License-Identifier: Apache-2.0
"""Runs of one rank without a GPU are forks of a process that has made the imports."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny

from cpt_algorithms.launch.launcher import LaunchError, Resources, make_launcher

SCRIPT = """
import multiprocessing, os, sys, time
imported = 'llmfoundry' in sys.modules
import sibling
main = sys.modules['__main__'].__file__ == __file__
print(sys.argv, __name__, main, imported, os.environ['OMP_NUM_THREADS'], 'WANDB_RUN_ID' in os.environ)
exec(open(sys.argv[1]).read())
"""
CHILD = 'process = multiprocessing.Process(target=print); process.start(); process.join(); sys.exit(process.exitcode)'
ENDS = [
    ('pass', 0, ''),
    ('sys.exit()', 0, ''),
    ('sys.exit(7)', 7, ''),
    ('sys.exit("no such thing")', 1, 'no such thing'),
    ('raise ValueError("bad")', 1, 'ValueError: bad'),
    ('os.kill(os.getpid(), 9)', -9, ''),
    (CHILD, 0, ''),
    ('print(multiprocessing.get_start_method())', 0, multiprocessing.get_start_method()),
    ('import atexit; atexit.register(print, "at exit")', 0, 'at exit'),
    ('print("stdin", sys.stdin.read(), os.read(0, 1))', 0, "stdin  b''"),
]  # fmt: skip

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='elsewhere every run is a process of its own')


@pytest.fixture(autouse=True)
def server_of_its_own():
    """A process has one fork server, whose environment is that of its start."""
    tiny.stop_fork_server()
    yield
    tiny.stop_fork_server()


@pytest.fixture
def script(tmp_path):
    (tmp_path / 'sibling.py').touch()
    path = tmp_path / 'script.py'
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def write(tmp_path):
    """Makes the folder of a run that does something."""

    def write(name, does):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'run.yaml').write_text(does)
        return tmp_path / name

    return write


@pytest.mark.long
def test_a_script_runs_and_ends_as_if_it_had_been_started_by_itself(script, write, wait, monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '3')
    monkeypatch.setenv('WANDB_RUN_ID', 'of the trial')
    before = dict(os.environ)
    start = make_launcher(Resources(), jobs=1)
    runs = [write(f'run{index}', does) for index, (does, _, _) in enumerate(ENDS)]
    handles = [start(script, run) for run in runs]  # they run side by side
    assert os.environ == before
    for run, handle, (does, code, says) in zip(runs, handles, ENDS, strict=True):
        assert wait(handle) == handle.poll() == code, does
        log = (run / 'log.txt').read_text()
        if code != -9:  # what it had not flushed is lost, as ever
            assert f"['{script}', '{run / 'run.yaml'}'] __main__ True True 3 False" in log
        assert says in log
    assert wait(start(script, runs[0])) == 0
    assert (runs[0] / 'log.txt').read_text().count('__main__') == 2, 'a log is added to'


@pytest.mark.long
def test_a_run_that_is_stopped_as_it_begins_ends(script, write, wait):
    start, run = make_launcher(Resources(), jobs=1), write('run', 'time.sleep(600)')
    for _ in range(5):
        handle = start(script, run)
        os.kill(int(handle.name.split()[-1]), signal.SIGTERM)
        assert wait(handle) == 128 + signal.SIGTERM


PARENT = """
import sys, time
from pathlib import Path
from cpt_algorithms.launch.launcher import Resources, make_launcher
handle = make_launcher(Resources(), jobs=1)(Path(sys.argv[1]), Path(sys.argv[2]))
print(handle.name.split()[-1], flush=True)
exec(sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.parametrize('end', ['time.sleep(600)', 'sys.exit()'], ids=['killed', 'over'])
def test_it_dies_with_the_process_that_wanted_it(script, write, end):
    run = write('run', 'time.sleep(600)')
    parent = subprocess.Popen(
        [sys.executable, '-c', PARENT, str(script), str(run), end], stdout=subprocess.PIPE, text=True, cwd=tiny.ROOT
    )
    assert parent.stdout is not None
    process = int(parent.stdout.readline())
    if 'sleep' in end:
        os.kill(process, 0)
        parent.send_signal(signal.SIGKILL)
    parent.wait(120)
    deadline = time.monotonic() + 30
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(process, 0)
            time.sleep(0.05)


def test_a_server_that_cannot_import_is_one_line(script, tmp_path, write, monkeypatch):
    (tmp_path / 'torch.py').write_text('raise OSError("broken")')
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    with pytest.raises(LaunchError, match='^run: '):
        make_launcher(Resources(), jobs=1)(script, write('run', ''))
