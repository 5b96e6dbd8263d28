# SPDX-License-Identifier: Apache-2.0
"""Starts training processes as forks of one that has imported what they need: seconds of each small run on a CPU."""

import json
import os
import runpy
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from cpt_algorithms.files import read_json, write_json
from cpt_algorithms.launch.processes import die_with_parent

__all__ = ['ForkServer']

# What the last process of a run has left behind, if it was not killed.
_RETURNCODE = 'returncode.json'


class ForkServer:
    """Runs Python scripts as forks of a process that it starts when the first is wanted (Linux).

    A script finds the modules of LLM Foundry imported, and everything else as if it had been started by itself: its
    arguments, environment, standard streams and ``__main__``. It dies with this process, as the server does. Not for
    scripts that use a GPU: CUDA does not outlive a fork.

    Args:
        environment: Of the server and of every script.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self._server: subprocess.Popen[str] | None = None

    def start(self, script: Path, yaml: Path, log: Path) -> tuple[int, Callable[[], int | None]]:
        """Start ``script YAML``.

        Args:
            script: A Python script.
            yaml: Its argument; the script's exit status is kept beside it.
            log: What it prints is added to this file.

        Returns:
            Its process id, and what tells None while it runs and then its exit status (-9 if it did not leave one).

        Raises:
            OSError: If there is no server to fork it.
        """
        if self._server is None or self._server.poll() is not None:
            self._server = subprocess.Popen(
                [sys.executable, '-m', 'cpt_algorithms.launch.fork_server'],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=self._environment,
                preexec_fn=die_with_parent,
            )
        left = yaml.parent / _RETURNCODE
        left.unlink(missing_ok=True)
        assert self._server.stdin is not None and self._server.stdout is not None, 'both are pipes'
        print(json.dumps([str(path.absolute()) for path in (script, yaml, log)]), file=self._server.stdin, flush=True)
        answer = self._server.stdout.readline()
        if not answer:
            raise OSError('the process that imports what training needs has ended; what it says is above')
        try:
            process = os.fdopen(os.pidfd_open(int(answer)))
        except ProcessLookupError:  # it has ended already
            process = None

        def poll() -> int | None:
            # readable once it has ended
            if process is not None and not process.closed:
                if not select.select([process], [], [], 0)[0]:
                    return None
                process.close()
            return (read_json(left) or {'returncode': -signal.SIGKILL})['returncode']

        return int(answer), poll


def _serve() -> None:
    """Fork a process for each line of standard input; returns in those."""
    import llmfoundry.command_utils  # noqa: F401
    from composer.utils.collect_env import get_cpu_model
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    import cpt_algorithms.cost.tables  # noqa: F401
    import cpt_algorithms.evaluation.lm_eval  # noqa: F401

    # what Composer would ask for in each run, of a second or two: every causal model, and the processor's name
    MODEL_FOR_CAUSAL_LM_MAPPING.values()
    get_cpu_model()

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # control-C is for those whom it interrupts
    server = os.getpid()
    while line := sys.stdin.readline():
        if process := os.fork():
            sys.stdout.write(f'{process}\n')
            sys.stdout.flush()
            continue
        die_with_parent()
        if os.getppid() == server:  # else it has died already
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _run(*json.loads(line))
        return


def _run(script: str, yaml: str, log: str) -> None:
    nothing, log_file = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for descriptor, stream in ((nothing, 0), (log_file, 1), (log_file, 2)):
        os.dup2(descriptor, stream)
    sys.argv, sys.path[0] = [script, yaml], str(Path(script).parent)
    returncode = 1
    try:
        runpy.run_path(script, run_name='__main__')
        returncode = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(f'{end.code}\n')
        else:
            returncode = end.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    write_json(Path(yaml).parent / _RETURNCODE, {'returncode': returncode})


if __name__ == '__main__':
    _serve()
