# SPDX-License-Identifier: Apache-2.0
"""Starts training processes as forks of one that has imported what they need: seconds of each small run on a CPU."""

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Mapping
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import patch

from cpt_algorithms.launch.processes import die_with_parent

__all__ = ['fork']


def fork(script: Path, yaml: Path, log: Path, environment: Mapping[str, str]) -> BaseProcess:
    """Run ``script YAML`` as a fork of multiprocessing's fork server, which the first call starts (Linux).

    The script finds the modules of LLM Foundry imported, and everything else as if it had been started by itself: its
    arguments, environment, standard streams and ``__main__``. It dies with this process, as the server does. Not for
    scripts that use a GPU: CUDA does not survive a fork.

    Args:
        script: A Python script.
        yaml: Its argument.
        log: Its output is appended to this file.
        environment: Of the server, when this call starts it, and so of every script.

    Raises:
        OSError: If the server has ended; or EOFError.
    """
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['cpt_algorithms.launch.training_imports'])
    # daemonic: at exit, this process ends it instead of waiting for it
    process = context.Process(
        target=_run, args=[str(path.absolute()) for path in (script, yaml, log)], name=yaml.parent.name, daemon=True
    )
    main = sys.modules['__main__']  # multiprocessing would import its file in the fork
    with patch.dict(os.environ, environment, clear=True), patch.object(main, '__file__', None, create=True):
        process.start()
    return process


def _run(script: str, yaml: str, log: str) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    die_with_parent()
    sequence = multiprocessing.parent_process()
    if sequence is None or not sequence.is_alive():  # and with it the server, before we could ask to die with it
        return
    # what the script starts, such as the workers of its dataloader, starts as in any other process
    multiprocessing.set_start_method(None, force=True)
    multiprocessing.current_process().daemon = False
    # a tracker of its own frees the shared memory of a script that is killed at once, not when the sequence ends
    resource_tracker._resource_tracker._fd = None  # pyright: ignore[reportAttributeAccessIssue]
    with open(log, 'ab') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv, sys.path[0] = [script, yaml], str(Path(script).parent)
    try:
        runpy.run_path(script, run_name='__main__')
    finally:
        atexit._run_exitfuncs()  # which multiprocessing does not
