# SPDX-License-Identifier: Apache-2.0
"""Processes that do not outlive what they work for."""

import ctypes
import platform
import signal

__all__ = ['die_with_parent']


def die_with_parent() -> None:
    """Be killed when the process that started this one ends, however it ends (Linux only; elsewhere nothing)."""
    if platform.system() == 'Linux':
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
