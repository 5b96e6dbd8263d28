# SPDX-License-Identifier: Apache-2.0
"""The numbers by which Streaming tells the datasets of a machine apart in shared memory."""

import os
import time
from collections.abc import Iterator
from itertools import count
from multiprocessing.shared_memory import SharedMemory
from tempfile import gettempdir
from typing import Any

from composer.utils import dist
from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, LOCALS, SHM_TO_CLEAN
from streaming.base.shared import memory, prefix

__all__ = ['unique_shm_prefixes']

# until when a rank that is creating shared memory must have given it a size
PATIENCE = 60.0
LOCKS = (BARRIER_FILELOCK, CACHE_FILELOCK)


def unique_shm_prefixes() -> None:
    """Give the datasets of this process numbers that no other process, living or killed, shares.

    * All ranks of a machine use their leader's number. Streaming lets each rank look for a free one. If another run
      ends at that moment, later ranks find its number free, and the run dies.
    * A number is free only when no memory under it exists. Streaming checks each kind of memory by itself: while the
      memory of a killed run is being removed, its number can be reused before its position is gone. The new dataset
      then starts at that position, and silently evaluates a part of the data.
    * Memory that another rank is creating has a name before it has a size. Streaming waits 7 ms for that; on a busy
      machine, "cannot mmap an empty file" ends the run. Here it is waited for.
    """
    memory.BuiltinSharedMemory = _SizedMemory  # pyright: ignore[reportPrivateImportUsage]
    if prefix._each_prefix_int is not _free_numbers:
        prefix._each_prefix_int = _free_numbers
        find = prefix._check_and_find_retrying

        def find_the_leaders(*args: Any, shm_name: str, **kwargs: Any) -> int:
            if shm_name != LOCALS:  # a number that is free there is free for every other kind, and the largest is taken
                return 0
            found = find(*args, shm_name=shm_name, **kwargs)
            return dist.all_gather_object(found)[dist.get_global_rank() - dist.get_local_rank()]

        prefix._check_and_find_retrying = find_the_leaders


class _SizedMemory(SharedMemory):
    def __init__(self, name: str | None = None, create: bool = False, size: int = 0) -> None:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                super().__init__(name, create, size)
                return
            except ValueError:
                self.close()
                if create or time.monotonic() > end:
                    raise
                time.sleep(0.01)


def _free_numbers() -> Iterator[int]:
    """Numbers in use, and numbers without any leftover memory."""
    # A killed run leaves its lock files for ever, and Streaming skips their numbers. So do we, before we look for nine
    # kinds of memory: a machine may have thousands of such numbers.
    there = set(os.listdir(gettempdir()))
    for number in count():
        if any(prefix._get_path(number, lock) in there for lock in LOCKS):
            continue
        if _exists(number, LOCALS) or not any(_exists(number, name) for name in SHM_TO_CLEAN):
            yield number


def _exists(number: int, name: str) -> bool:
    try:  # in Streaming's class, the process that created it removes it
        memory.SharedMemory(prefix._get_path(number, name), create=False, auto_cleanup=False).cleanup()
    except FileNotFoundError:
        return False
    except PermissionError:  # another user's
        pass
    return True
