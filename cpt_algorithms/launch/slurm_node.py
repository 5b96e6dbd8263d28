# SPDX-License-Identifier: Apache-2.0
"""What each node of a Slurm job does. Jobs import this module, so it imports nothing that takes seconds."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.helpers import Checkpointable

from cpt_algorithms.files import write_json
from cpt_algorithms.launch.processes import die_with_parent, num_cores
from cpt_algorithms.launch.wandb_runs import environment_of_children

__all__ = ['TrainingNode', 'launcher_arguments', 'returncode_file']


def launcher_arguments(nodes: int, nproc: int, node_rank: str, master_addr: str, master_port: str) -> list[str]:
    """Arguments of the composer launcher, before the script: the first node is the master, on a port that is free."""
    alone = ['-n', str(nproc)]
    if nodes == 1:
        return alone  # the launcher finds a free port itself
    among = ['--world_size', str(nodes * nproc), '--node_rank', node_rank, '--master_addr', master_addr]
    return [*alone, *among, '--master_port', master_port]


def returncode_file(jobs: Path, job_id: str) -> Path:
    """Where a job leaves in submitit's folder how training ended, for whoever waits for it."""
    return jobs / f'{job_id}_returncode.json'


@dataclass(frozen=True)
class TrainingNode(Checkpointable):
    """Starts the composer launcher on one node of a Slurm job and waits for it.

    When Slurm requeues the job, or submitit does so shortly before its time is over, the same is done again: training
    goes on from the latest checkpoint.

    Args:
        script: The recipe.
        folder: The run's folder on the shared file system: ``run.yaml`` is read there, ``log.txt`` (of the first node;
            ``log-node<N>.txt`` of others) and ``slurm/<job>_returncode.json`` are written.
        nodes: Nodes of the job, with one task each.
        nproc: Ranks on each.

    Raises:
        RuntimeError: If training failed.
    """

    script: str
    folder: str
    nodes: int
    nproc: int

    def __call__(self) -> None:
        """Train."""
        job = submitit.JobEnvironment()
        stopped: list[Any] = []
        signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
        folder, is_first = Path(self.folder), job.node == 0
        returncode = returncode_file(folder / 'slurm', job.job_id)
        if is_first:
            returncode.unlink(missing_ok=True)  # of what ran before a requeue
        # the same on all nodes, another for each job, and not one that the system gives away at random
        port = 20_000 + int(job.job_id) % 10_000
        arguments = launcher_arguments(self.nodes, self.nproc, str(job.node), job.hostnames[0], str(port))
        threads = str(max(1, num_cores() // self.nproc))
        given = environment_of_children(os.environ)
        with open(folder / ('log.txt' if is_first else f'log-node{job.node}.txt'), 'ab') as log:
            code = subprocess.Popen(
                [sys.executable, '-m', 'composer.cli.launcher', *arguments, self.script, str(folder / 'run.yaml')],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={'OMP_NUM_THREADS': threads, **given, 'TOKENIZERS_PARALLELISM': 'false'},
                preexec_fn=_on_the_node,
            ).wait()
        if code:
            time.sleep(2)  # the signal that ended it may be on its way to us
            while stopped:  # from outside; whether it comes back is Slurm's to say, and it ends this process
                time.sleep(1)
        if is_first:
            write_json(returncode, {'returncode': code})
        if code:
            raise RuntimeError(f'training ended with exit code {code}; see {log.name}')


def _on_the_node() -> None:
    """Slurm sends submitit's signal, which would end them, to all processes of a job."""
    die_with_parent()
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
