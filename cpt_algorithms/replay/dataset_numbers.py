# SPDX-License-Identifier: Apache-2.0
"""The numbers by which Streaming tells the datasets of a machine apart in shared memory."""

import os
from collections.abc import Iterator
from itertools import count
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from tempfile import gettempdir
from typing import Any

from composer.utils import dist
from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, LOCALS, SHM_TO_CLEAN
from streaming.base.shared import prefix

__all__ = ['unique_shm_prefixes']

LOCKS = (BARRIER_FILELOCK, CACHE_FILELOCK)


def unique_shm_prefixes() -> None:
    """Number the datasets of this process so that no other process, living or killed, has a part in them.

    * All ranks of a machine take their leader's number. Streaming lets each rank look for a free one; if another run
      ends at that moment, its number is free to the ranks that look later, and the run dies.
    * A number counts as free once nothing of it is left. Streaming looks for each kind of memory by itself. While the
      memory of a run that was killed is cleaned up, its number can be taken before its position is gone: the new
      dataset then begins there, and an evaluation is of a part of the data, without an error.
    """
    if prefix._each_prefix_int is not _numbers:
        prefix._each_prefix_int = _numbers
        find = prefix._check_and_find_retrying

        def find_the_leaders(*args: Any, shm_name: str, **kwargs: Any) -> int:
            if shm_name != LOCALS:  # a number that is free there is free for every other kind, and the largest is taken
                return 0
            found = find(*args, shm_name=shm_name, **kwargs)
            return dist.all_gather_object(found)[dist.get_global_rank() - dist.get_local_rank()]

        prefix._check_and_find_retrying = find_the_leaders


def _numbers() -> Iterator[int]:
    """Those in use, and those of which nothing is left.

    A run that is killed leaves its lock files for ever, and Streaming passes over their numbers. So do we, before
    asking for nine kinds of memory: a machine may have thousands of them.
    """
    there = set(os.listdir(gettempdir()))
    for number in count():
        if any(prefix._get_path(number, lock) in there for lock in LOCKS):
            continue
        if _exists(number, LOCALS) or not any(_exists(number, name) for name in SHM_TO_CLEAN):
            yield number


def _exists(number: int, name: str) -> bool:
    register = resource_tracker.register
    try:
        # whoever has made it removes it
        resource_tracker.register = lambda *_: None
        SharedMemory(prefix._get_path(number, name)).close()
    except FileNotFoundError:
        return False
    except PermissionError:  # another user's
        return True
    finally:
        resource_tracker.register = register
    return True
