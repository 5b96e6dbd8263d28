# SPDX-License-Identifier: Apache-2.0
"""How a run is started: on this machine, as a Slurm job, or by hand with the command that is printed."""

import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import submitit
import torch
from pydantic import Field
from submitit.core.utils import FailedJobError, FailedSubmissionError

from cpt_algorithms.files import read_json
from cpt_algorithms.launch.fork_server import fork
from cpt_algorithms.launch.processes import die_with_parent, num_cores
from cpt_algorithms.launch.slurm_node import TrainingNode, launcher_arguments, returncode_file
from cpt_algorithms.launch.wandb_runs import environment_of_children
from cpt_algorithms.validation import Section, check_keys, check_type, parse_section

__all__ = ['Handle', 'LaunchError', 'Resources', 'Start', 'command', 'gpu_shares', 'make_launcher', 'resources_of']

log = logging.getLogger(__name__)

# submitit's, of its executor and not of a job.
_OF_THE_EXECUTOR = ('slurm_max_num_timeout', 'slurm_python')
_ONE_TASK = 'cannot be chosen: each node has one task, which starts nproc ranks; leave it out'
_SET_HERE = {
    'nodes': 'belongs beside slurm: nodes: 2',
    'slurm_nodes': 'belongs beside slurm: nodes: 2',
    'tasks_per_node': _ONE_TASK,
    'slurm_ntasks_per_node': _ONE_TASK,
    'slurm_use_srun': _ONE_TASK,
    'name': "is the run's; leave it out",
    'slurm_job_name': "is the run's; leave it out",
    'slurm_time': 'is called timeout_min here, and is in minutes',
}
# How squeue calls a job that is over; whatever else it says is of one that is not: SUSPENDED, REQUEUE_HOLD, ...
_OVER = (
    'BOOT_FAIL', 'CANCELLED', 'COMPLETED', 'DEADLINE', 'FAILED', 'LAUNCH_FAILED', 'NODE_FAIL', 'OUT_OF_MEMORY',
    'PREEMPTED', 'RECONFIG_FAIL', 'REVOKED', 'TIMEOUT', 'gone',
)  # fmt: skip
# Seconds for which an answer of squeue, about all jobs of this user, holds.
_ASK = 10
# Seconds by which a file may show up on a shared file system later than the end of the job that wrote it.
_LAG = 20
# Seconds between two looks at the files of a job.
_PAUSE = 2


class Resources(Section):
    """Where the ranks of a run are: nodes, and ranks on each.

    ``slurm`` holds submitit's own parameters (``slurm_partition``, ``slurm_account``, ``gpus_per_node``, ...), of which
    ``timeout_min`` must be there; None without Slurm.
    """

    nodes: int = Field(1, ge=1)
    nproc: int = Field(1, ge=1)
    slurm: dict[str, Any] | None = None

    @property
    def ranks(self) -> int:
        """Of a run, in all."""
        return self.nodes * self.nproc


@dataclass(frozen=True)
class Handle:
    """A run that was started, such as ``process 123``; ``poll`` says None while it goes on, and then its exit code."""

    name: str
    poll: Callable[[], int | None]


class LaunchError(RuntimeError):
    """A run that could not be started."""


# (script, folder of the run) -> the run, started
Start = Callable[[Path, Path], Handle]


def resources_of(spec: Mapping[str, Any]) -> Resources:
    """Read ``nodes``, ``nproc`` and ``slurm`` of a sequence; refuse what cannot be, naming the key."""
    resources = parse_section(Resources, {key: spec[key] for key in Resources.model_fields if key in spec})
    if resources.slurm is not None:
        _check_slurm(resources.slurm, resources.nproc)
    return resources


def _check_slurm(slurm: Mapping[str, Any], nproc: int) -> None:
    for key in slurm:
        if key in _SET_HERE:
            raise ValueError(f'slurm.{key} {_SET_HERE[key]}')
    of_slurm = [f'slurm_{name}' for name in submitit.SlurmExecutor._valid_parameters()]
    allowed = {*submitit.AutoExecutor._valid_parameters(), *of_slurm, *_OF_THE_EXECUTOR} - {*_SET_HERE}
    check_keys('slurm', slurm, allowed)
    check_type('slurm.timeout_min', slurm.get('timeout_min'), Annotated[int, Field(ge=1)])
    for key in ('gpus_per_node', 'slurm_gpus_per_node'):
        if slurm.get(key) not in (None, nproc):
            raise ValueError(f'slurm.{key}={slurm[key]!r} must be nproc={nproc}: each rank has one GPU')
    try:
        # names and types are checked alike for all executors, and this one needs no cluster
        executor = submitit.AutoExecutor(folder='.', cluster='debug')
        executor.update_parameters(**{key: value for key, value in slurm.items() if key not in _OF_THE_EXECUTOR})
    except (AssertionError, NameError) as error:
        raise ValueError(f'slurm: {error}') from None


def command(resources: Resources, script: Path, yaml: Path) -> str:
    """The command that trains a run, for a shell on each of its nodes.

    Of several nodes, each shell must know ``NODE_RANK`` (from 0) and ``MASTER_ADDR`` (the first).
    """
    # not quoted: the variables are the shell's
    arguments = launcher_arguments(resources.nodes, resources.nproc, '$NODE_RANK', '$MASTER_ADDR', '29500')
    here = Path.cwd()
    named = (path.relative_to(here) if path.is_relative_to(here) else path for path in (script, yaml))
    return ' '.join(['composer', *arguments, *(shlex.quote(str(path)) for path in named)])


def make_launcher(resources: Resources, jobs: int) -> Start:
    """What starts runs, once each run's ``run.yaml`` lies in its folder.

    * On this machine: a process that writes ``log.txt`` and dies with this one, on GPUs of its own; without a GPU, of
      one rank, forked from one that has made the imports.
    * With ``slurm``: a job of its own, whose files are in ``slurm/``. It lives on if this process ends; started again,
      a run whose job is queued, running or suspended is not submitted twice but waited for. While Slurm does not
      answer, no run fails and none is submitted.

    Args:
        resources: Where the ranks are.
        jobs: Runs at a time on this machine, which share its cores.

    Raises:
        ValueError: If runs cannot be started from here.
    """
    if resources.slurm is None:
        if resources.nodes > 1:
            raise ValueError(f'nodes={resources.nodes}: without slurm, runs start here; --write prints their commands')
        shares = gpu_shares(_visible_gpus(), jobs, resources.nproc)
        if resources.nproc == 1 and platform.system() == 'Linux' and not shares:
            return partial(_fork, _environment(jobs, 1))
        return partial(_start_here, resources.nproc, jobs, dict.fromkeys(shares))
    for tool in ('sbatch', 'srun', 'squeue', 'scontrol'):
        if shutil.which(tool) is None:
            raise ValueError(f'slurm: {tool} is not on this machine; start the sequence where Slurm jobs can be')
    if _QUEUE.ask() is None:
        raise ValueError(f'slurm: squeue does not answer, so jobs could not be waited for: {_QUEUE.error}')
    return partial(_submit, resources.slurm, resources.nodes, resources.nproc)


def _environment(jobs: int, nproc: int) -> dict[str, str]:
    threads = max(1, num_cores() // (jobs * nproc))
    given = environment_of_children(os.environ)
    return {'OMP_NUM_THREADS': str(threads), **given, 'TOKENIZERS_PARALLELISM': 'false'}


def _visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names those that this process may use."""
    count, given = torch.cuda.device_count(), os.environ.get('CUDA_VISIBLE_DEVICES')
    return ([name.strip() for name in given.split(',')] if given else [str(number) for number in range(count)])[:count]


def gpu_shares(visible: Sequence[str], jobs: int, nproc: int) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each of the runs that go on at the same time; empty without a GPU.

    Raises:
        ValueError: If there are too few for each rank to have its own.
    """
    if visible and jobs * nproc > len(visible):
        raise ValueError(
            f'jobs={jobs} with nproc={nproc} wants {jobs * nproc} GPUs, one for each rank, and {len(visible)} can be '
            f'seen ({",".join(visible)}); choose fewer jobs'
        )
    return [','.join(visible[job * nproc :][:nproc]) for job in range(jobs)] if visible else []


def _start_here(nproc: int, jobs: int, users: dict[str, Handle | None], script: Path, folder: Path) -> Handle:
    # one rank needs no launcher, whose start costs seconds
    arguments = launcher_arguments(1, nproc, '0', '127.0.0.1', '')
    launcher = ['-m', 'composer.cli.launcher', *arguments] if nproc > 1 else []
    free = next((share for share, user in users.items() if user is None or user.poll() is not None), None)
    with open(folder / 'log.txt', 'ab') as file:
        process = subprocess.Popen(
            [sys.executable, *launcher, str(script), str(folder / 'run.yaml')],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=_environment(jobs, nproc) | ({} if free is None else {'CUDA_VISIBLE_DEVICES': free}),
            preexec_fn=die_with_parent if platform.system() == 'Linux' else None,
        )
    handle = Handle(f'process {process.pid}', process.poll)
    if free is not None:
        users[free] = handle
    return handle


def _fork(environment: Mapping[str, str], script: Path, folder: Path) -> Handle:
    try:
        process = fork(script, folder / 'run.yaml', folder / 'log.txt', environment)
    except (OSError, EOFError):
        raise LaunchError(f'{folder.name}: the process that runs are forked from has ended; see above') from None
    return Handle(f'process {process.pid}', lambda: process.exitcode)


def _submit(slurm: Mapping[str, Any], nodes: int, nproc: int, script: Path, folder: Path) -> Handle:
    folder = folder.resolve()
    jobs = folder / 'slurm'
    if (job := _living(jobs)) is not None:
        return Handle(f'Slurm job {job.job_id}, found again', _Job(job, folder).poll)
    of_executor = {key: value for key, value in slurm.items() if key in _OF_THE_EXECUTOR}
    parameters = {key: value for key, value in slurm.items() if key not in _OF_THE_EXECUTOR}
    executor = submitit.AutoExecutor(folder=jobs, cluster='slurm', **of_executor)
    srun = ['--kill-on-bad-exit=1']  # ranks would wait for those of a node that has failed
    if cpus := parameters.get('slurm_cpus_per_task', parameters.get('cpus_per_task')):
        srun.append(f'--cpus-per-task={cpus}')  # since Slurm 22.05, srun does not take it from sbatch
    srun += parameters.get('slurm_srun_args') or []
    executor.update_parameters(
        **{**parameters, 'slurm_srun_args': srun},
        name=f'{folder.parent.name}/{folder.name}',
        nodes=nodes,
        tasks_per_node=1,
    )
    node = TrainingNode(str(script.resolve()), str(folder), nodes, nproc)
    try:
        job = executor.submit(node).task(0)
    except (FailedJobError, FailedSubmissionError) as error:
        raise LaunchError(f'{folder.name}: Slurm has refused the job: {" ".join(str(error).split())}') from None
    _QUEUE.ask()  # what it said before is of a time without this job
    return Handle(f'Slurm job {job.job_id}, which goes on without this process', _Job(job, folder).poll)


class _Queue:
    """What ``squeue`` says of this user's jobs. Slurm's controller always knows; accounting (``sacct``) may be off."""

    def __init__(self) -> None:
        self.error = ''
        self._asked = -float(_ASK)
        self._states: dict[str, str] | None = None

    def ask(self) -> dict[str, str] | None:
        """The state of each job; None if there is no answer."""
        self._asked, before = time.monotonic(), self._states
        # --all: of hidden partitions, too; what a shell sets for squeue would leave out others
        command = ['squeue', '--all', '--noheader', '--states=all', f'--user={os.getuid()}', '--format=%i|%T']
        env = {key: value for key, value in os.environ.items() if not key.startswith('SQUEUE_')}
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=env).stdout
            self._states = dict(line.strip().split('|', 1) for line in said.splitlines() if '|' in line)
        except (OSError, subprocess.SubprocessError) as error:
            self._states = None
            self.error = ' '.join(f'{error} {getattr(error, "stderr", None) or ""}'.split())
            if before is not None:
                log.warning('squeue does not answer; until it does, jobs are taken to go on: %s', self.error)
        return self._states

    def state_of(self, job: submitit.Job[Any]) -> str | None:
        """Of one job, ``gone`` if Slurm has forgotten it; None if that is not known. Asks if the answer is old."""
        states = self.ask() if time.monotonic() > self._asked + _ASK else self._states
        return None if states is None else states.get(job.job_id, 'gone')


_QUEUE = _Queue()


def _living(jobs: Path) -> submitit.Job[Any] | None:
    """The job of a run that is queued, running or suspended.

    Raises:
        LaunchError: If Slurm does not say.
    """
    # submitit writes <job>_submitted.pkl after sbatch, and a job without it ends by itself: no job is lost if the
    # process that submits is killed in between
    submitted = sorted(jobs.glob('*_submitted.pkl'), key=lambda path: path.stat().st_mtime)
    if not submitted:
        return None
    job = submitit.SlurmJob(folder=jobs, job_id=submitted[-1].name.removesuffix('_submitted.pkl'))
    if (states := _QUEUE.ask()) is None:
        raise LaunchError(f'{jobs.parent.name}: whether Slurm job {job.job_id} goes on is not known: {_QUEUE.error}')
    if states.get(job.job_id, 'gone') in _OVER:
        return None
    ended = returncode_file(jobs, job.job_id)
    if (read_json(ended) or {}).get('returncode'):
        ended.unlink()  # it was requeued since
    return job


class _Job:
    """A Slurm job that trains a run."""

    def __init__(self, job: submitit.Job[Any], folder: Path) -> None:
        self.job, self.folder = job, folder
        self._over_since: float | None = None
        self._looked = -_PAUSE

    def poll(self) -> int | None:
        """See :class:`Handle`."""
        if time.monotonic() < self._looked + _PAUSE:
            return None
        self._looked = time.monotonic()
        left = read_json(returncode_file(self.folder / 'slurm', self.job.job_id))
        if left is not None:
            return left['returncode']
        state = _QUEUE.state_of(self.job)
        if state not in _OVER:  # nor if it is not known
            self._over_since = None
            return None
        self._over_since = self._over_since or time.monotonic()
        if time.monotonic() - self._over_since < _LAG:
            return None
        said = self.job.paths.stderr
        lines = said.read_text(errors='replace').splitlines()[-8:] if said.exists() else []
        with open(self.folder / 'log.txt', 'a', encoding='utf-8') as file:
            print(f'Slurm job {self.job.job_id} is over ({state}); {said}:', *lines, sep='\n', file=file)
        return 1
