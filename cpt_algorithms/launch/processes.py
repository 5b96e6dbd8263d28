# SPDX-License-Identifier: Apache-2.0
"""Processes that do not outlive what they work for."""

import ctypes
import os
import platform
import signal

__all__ = ['die_with_launcher', 'die_with_parent']


def die_with_parent() -> None:
    """Be killed when the process that started this one ends, however it ends (Linux only; elsewhere nothing)."""
    if platform.system() == 'Linux':
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG


def die_with_launcher() -> None:
    """The same for a rank of a launcher: killed, it must not train on beside the restarted run."""
    if 'LOCAL_RANK' in os.environ:
        die_with_parent()
