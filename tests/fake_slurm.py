# SPDX-License-Identifier: Apache-2.0
"""A Slurm whose nodes are all this machine: sbatch, srun, squeue, scontrol and scancel, as far as they are used.

A job is a folder entry ``<id>.state``, ``<id>.sh`` and, while it runs, ``<id>.tasks``. While there is a file ``hold``,
jobs stay in the queue; while there is ``deaf``, squeue does not answer.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

FOLDER = Path(os.environ.get('FAKE_SLURM', '.'))
TOOLS = ('sbatch', 'srun', 'squeue', 'scontrol', 'scancel')


def install(folder: Path) -> dict[str, str]:
    """Make the tools; returns what leads to them, for an environment."""
    (folder / 'bin').mkdir(parents=True)
    for tool in TOOLS:
        path = folder / 'bin' / tool
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {tool} "$@"\n')
        path.chmod(0o755)
    return {'PATH': f'{folder / "bin"}:{os.environ["PATH"]}', 'FAKE_SLURM': str(folder)}


def states(folder: Path) -> dict[str, str]:
    """Every job that was submitted, and its state."""
    return {path.stem: path.read_text() for path in sorted(folder.glob('*.state'))}


def release(folder: Path) -> None:
    """Let the queue move."""
    (folder / 'hold').unlink()
    for job, value in states(folder).items():
        if value == 'PENDING':
            background('slurmd', job)


def state(job: str, value: str) -> None:
    partial = FOLDER / f'{job}.partial'
    partial.write_text(value)
    partial.replace(FOLDER / f'{job}.state')


def background(*words: str) -> None:
    nowhere = subprocess.DEVNULL
    words = (sys.executable, __file__, *words)
    subprocess.Popen(words, start_new_session=True, stdin=nowhere, stdout=nowhere, stderr=nowhere)


def sbatch(path: str) -> None:
    script = Path(path).read_text()
    if 'refuse' in script:
        sys.exit('sbatch: error: invalid partition specified: refuse')
    job = str(1000 + len(states(FOLDER)))
    (FOLDER / f'{job}.sh').write_text(script)
    state(job, 'PENDING')
    if not (FOLDER / 'hold').exists():
        background('slurmd', job)
    print(f'Submitted batch job {job}')


def slurmd(job: str) -> None:
    """Run the batch script, again if it is requeued."""
    nodes = re.search(r'#SBATCH --nodes=(\d+)', (FOLDER / f'{job}.sh').read_text())[1]
    node_list = ','.join(['localhost'] * int(nodes))
    environ = {**os.environ, 'SLURM_JOB_ID': job, 'SLURM_JOB_NUM_NODES': nodes, 'SLURM_JOB_NODELIST': node_list}
    while True:
        state(job, 'RUNNING')
        with open(FOLDER / f'{job}.out', 'a') as out:
            code = subprocess.call(['bash', FOLDER / f'{job}.sh'], env=environ, stdout=out, stderr=out)
        ended = states(FOLDER)[job]
        if ended != 'REQUEUED':
            break
    if ended == 'RUNNING':
        state(job, 'FAILED' if code else 'COMPLETED')


def srun(*words: str) -> None:
    """One task on each node; if one fails, all are killed."""
    words, options = list(words), {}
    while words[0].startswith('--'):
        option = words.pop(0)
        if option in ('--output', '--error'):
            options[option] = words.pop(0)
    assert options, words
    job, nodes = os.environ['SLURM_JOB_ID'], int(os.environ['SLURM_JOB_NUM_NODES'])
    tasks = []
    for node in range(nodes):
        out, err = (
            open(options[name].replace('%j', job).replace('%t', str(node)), 'a') for name in ('--output', '--error')
        )
        of_task = {
            'SLURM_PROCID': str(node),
            'SLURM_NODEID': str(node),
            'SLURM_LOCALID': '0',
            'SLURM_NTASKS': str(nodes),
        }
        tasks.append(subprocess.Popen(words, env={**os.environ, **of_task}, stdout=out, stderr=err))
    (FOLDER / f'{job}.tasks').write_text(' '.join(str(task.pid) for task in tasks))
    while None in (codes := [task.poll() for task in tasks]) and not any(codes):
        time.sleep(0.05)
    send(processes_of(job), signal.SIGKILL)
    sys.exit(max(abs(task.wait()) for task in tasks))


def processes_of(job: str) -> list[psutil.Process]:
    found = []
    for pid in map(int, (FOLDER / f'{job}.tasks').read_text().split()):
        try:
            task = psutil.Process(pid)
            found += [task, *task.children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
    return found


def send(processes: list[psutil.Process], number: int) -> None:
    """A signal to all processes of a job."""
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def scancel(job: str, option: str = '', name: str = '') -> None:
    if option == '--signal':
        send(processes_of(job), getattr(signal, name))
        return
    was = states(FOLDER)[job]
    state(job, 'CANCELLED by 1000')
    if was == 'RUNNING':
        background('kill', job)


def scontrol(action: str, job: str) -> None:
    assert action == 'requeue', action
    state(job, 'REQUEUED')
    background('kill', job)


def kill(job: str) -> None:
    """As Slurm ends a job: asked first."""
    processes = processes_of(job)
    send(processes, signal.SIGTERM)
    time.sleep(1)
    send(processes, signal.SIGKILL)


def squeue(*words: str) -> None:
    assert words[:3] == ('--all', '--noheader', '--states=all') and words[4] == '--format=%i|%T', words
    assert not any(key.startswith('SQUEUE_') for key in os.environ), 'which narrow what is listed'
    if (FOLDER / 'deaf').exists():
        sys.exit('slurm_load_jobs error: Unable to contact slurm controller (connect failure)')
    for job, value in states(FOLDER).items():
        print(f'{job}|{value.split()[0]}')


if __name__ == '__main__':
    globals()[sys.argv[1]](*sys.argv[2:])
