# SPDX-License-Identifier: Apache-2.0
"""Processes that do not outlive what they work for, and commands that end in one line."""

import argparse
import ctypes
import os
import platform
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from cpt_algorithms.formatting import one_line

__all__ = [
    'OF_A_LAUNCHER', 'OneLineParser', 'die_with_launcher', 'die_with_parent', 'num_cores', 'refuse_launcher',
    'run_command',
]  # fmt: skip

# The environment that a launcher gives its processes, with the values of a single process.
_ALONE = {'RANK': '0', 'LOCAL_RANK': '0', 'NODE_RANK': '0', 'WORLD_SIZE': '1', 'LOCAL_WORLD_SIZE': '1'}
OF_A_LAUNCHER = (*_ALONE, 'BASE_RANK', 'MASTER_ADDR', 'MASTER_PORT')


def die_with_parent() -> None:
    """Be killed when the process that started this one ends, however it ends (Linux only; elsewhere nothing)."""
    if platform.system() == 'Linux':
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def die_with_launcher() -> None:
    """The same for a rank of a launcher: killed, it must not train on beside the restarted run.

    Exits if the launcher does not say what Composer asks for; torchrun calls the rank of a node by another name.
    """
    if 'LOCAL_RANK' not in os.environ:
        return
    die_with_parent()
    if 'GROUP_RANK' in os.environ:
        os.environ.setdefault('NODE_RANK', os.environ['GROUP_RANK'])
    if int(os.environ.get('WORLD_SIZE', '1')) > 1 and 'NODE_RANK' not in os.environ:
        sys.exit('LOCAL_RANK is in the environment, and NODE_RANK is not: start the ranks with composer or torchrun')


def refuse_launcher(remedy: str = '') -> None:
    """Exit if this process was started as one of several ranks, each of which would do all the work.

    Args:
        remedy: What to do if several were wanted. Default: ``''``.
    """
    found = {key: os.environ[key] for key, alone in _ALONE.items() if os.environ.get(key, alone) != alone}
    if found:
        sys.exit(
            f'{", ".join(f"{key}={value}" for key, value in found.items())} in the environment: '
            f'{os.path.basename(sys.argv[0])} is one process. Start it with python, not with composer or torchrun, '
            f'or unset what the platform has set ({" ".join(found)}){remedy}'
        )


class OneLineParser(argparse.ArgumentParser):
    """Prints an error as one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Exits with status 2."""
        self.exit(2, f'{self.prog}: error: {one_line(message)}\n')


def run_command(main: Callable[[], Any]) -> None:
    """Run the main function of a command; control-C ends it as SIGTERM does, in one line, with the code 130."""
    try:
        main()
    except (KeyboardInterrupt, SystemExit) as end:  # Composer makes the latter of both signals
        code = 130 if isinstance(end, KeyboardInterrupt) else end.code
        if code not in (130, 143):
            raise
        name = os.path.basename(sys.argv[0])
        sys.stderr.write(f'{name}: interrupted; what is finished is kept, and the same command goes on\n')
        sys.exit(code)
