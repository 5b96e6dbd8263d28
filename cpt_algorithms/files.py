# SPDX-License-Identifier: Apache-2.0
"""Results that appear whole or not at all."""

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ['hidden_sibling', 'write_json', 'write_whole']


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, even if the machine stops half-way or another process writes it too.

    Args:
        path: The file; its folder is made if need be.
        content: What it will hold.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'.{path.name}.{secrets.token_hex(4)}')
    with open(partial, 'wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all.

    Args:
        path: The file; its folder is made if need be.
        value: Anything JSON can hold.
    """
    write_whole(path, json.dumps(value, indent=1).encode())


@contextmanager
def hidden_sibling(out: Path, busy: Exception) -> Iterator[Path]:
    """An empty hidden folder beside ``out``, to make a result in and rename it.

    One process at a time has it, through a lock that dies with the process. What a killed one left is removed first,
    and what is left when something goes wrong is removed at once.

    Args:
        out: Where the result will go.
        busy: Raised if another process is making it.

    Yields:
        The folder.
    """
    partial = out.with_name(f'.{out.name}.partial')
    partial.mkdir(parents=True, exist_ok=True)
    handle = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.path.samestat(os.fstat(handle), partial.stat())  # and not what another process renamed
        except (BlockingIOError, FileNotFoundError):
            is_ours = False
        if not is_ours:
            raise busy
        try:
            for left in partial.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(handle)
