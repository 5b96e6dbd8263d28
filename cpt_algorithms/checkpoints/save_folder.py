# SPDX-License-Identifier: Apache-2.0
"""A run's save folder: how Composer names checkpoints, and which of them is the newest complete one."""

import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from cpt_algorithms.files import fetch, is_remote, list_names, read_or_none

__all__ = [
    'batch_of',
    'checkpoint_name',
    'is_complete',
    'latest_link',
    'newest_complete',
    'repair',
    'resolve_latest',
]

# torch is imported where .metadata is read: names are asked for by commands that answer at once


def batch_of(place: str | Path) -> int | None:
    """The batch in the name of a checkpoint (``ep0-ba100-rank0.pt``) or export (``ba100-lawa``); None without one."""
    found = re.findall(r'(?<![a-zA-Z])ba(\d+)', str(place).rstrip('/').rpartition('/')[2])
    return int(found[-1]) if found else None


def checkpoint_name(batch: int, sharded: bool) -> str:
    """What Composer calls the checkpoint of a batch; stages are one epoch."""
    return f'ep0-ba{batch}' if sharded else f'ep0-ba{batch}-rank0.pt'


def latest_link(sharded: bool) -> str:
    """What Composer calls the link to the newest checkpoint."""
    return 'latest-sharded-rank0' if sharded else 'latest-rank0.pt'


def is_complete(path: str | Path) -> bool:
    """Whether a local Composer checkpoint was written to its end, and its deletion has not begun.

    A zip's directory stands at its end. A sharded folder's ``.metadata`` is written last, and says how long its other
    files are, some of which may be deleted before it.

    Raises:
        CheckpointError: If ``.metadata``, which is there whole or not at all, cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        return zipfile.is_zipfile(path)
    if not (path / '.metadata').exists():
        return False
    sizes = {file.name: file.stat().st_size for file in path.iterdir()}
    return all(sizes.get(name, -1) >= end for name, end in _ends(path).items())


def _ends(folder: str | Path) -> dict[str, int]:
    """How long the files are that a ``.metadata`` names."""
    from cpt_algorithms.checkpoints.open import read_metadata

    ends: dict[str, int] = {}
    for info in read_metadata(folder).storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    return ends


def newest_complete(folder: str | Path) -> tuple[int, str | None]:
    """The newest complete checkpoint of a run, here or in object storage.

    An object is there whole or not at all; a sharded checkpoint is complete if every file is there that its
    ``.metadata`` names, which Composer uploads first.

    Args:
        folder: The run's ``save_folder``.

    Returns:
        Its batch and its path or URI; 0 and None if there is none. Cost: in object storage one listing, and
        ``.metadata`` of the newest.

    Raises:
        StorageError: If object storage cannot be reached.
        CheckpointError: If ``.metadata`` cannot be read.
    """
    complete = _complete_objects(str(folder).rstrip('/')) if is_remote(folder) else _complete_here(Path(folder))
    return next(complete, (0, None))


def _complete_here(folder: Path) -> Iterator[tuple[int, str]]:
    found = ((batch_of(path), path) for path in folder.glob('ep*-ba*'))
    newest_first = sorted(((batch, path) for batch, path in found if batch is not None), reverse=True)
    return ((batch, str(path)) for batch, path in newest_first if is_complete(path))


def _complete_objects(folder: str) -> Iterator[tuple[int, str]]:
    names = set(list_names(folder))
    found = [re.fullmatch(r'(ep\d+-ba(\d+))(-rank0\.pt|/\.metadata)', name) for name in names]
    for match in sorted(filter(None, found), key=lambda match: int(match[2]), reverse=True):
        if match[3] != '/.metadata':
            yield int(match[2]), f'{folder}/{match[0]}'
            continue
        with tempfile.TemporaryDirectory() as here:
            fetch(f'{folder}/{match[0]}', Path(here) / '.metadata')
            needed = _ends(here)
        if all(f'{match[1]}/{name}' in names for name in needed):
            yield int(match[2]), f'{folder}/{match[1]}'


def repair(folder: Path) -> None:
    """Delete incomplete checkpoints, which a kill leaves, and link ``latest`` to the newest complete one.

    Composer writes a checkpoint under its final name, then replaces the ``latest`` link by removing it, then deletes
    the oldest checkpoint.

    Args:
        folder: A run's local ``save_folder``, which no other process writes to.
    """
    for path in folder.glob('ep*-ba*'):
        if not is_complete(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    _, newest = newest_complete(folder)
    if newest is None:
        return
    target = Path(newest)
    link = folder / latest_link(sharded=target.is_dir())
    if not (link.is_symlink() and link.resolve() == target.resolve()):
        new_link = folder / '.latest'
        new_link.unlink(missing_ok=True)
        new_link.symlink_to(target.name)
        new_link.replace(link)


def resolve_latest(uri: str) -> str:
    """Where Composer's ``latest-rank0.pt`` or ``latest-sharded-rank0`` leads in object storage.

    There are no links: ``latest-rank0.pt.symlink`` is an object that holds the name of another.

    Args:
        uri: A checkpoint, or one of these names, with or without ``.symlink``.

    Returns:
        The checkpoint's URI; the URI itself if there is no such object.

    Raises:
        StorageError: If the bucket cannot be reached.
    """
    from composer.utils import parse_uri  # takes seconds

    target = read_or_none(uri if uri.endswith('.symlink') else f'{uri}.symlink')
    return uri if target is None else uri.removesuffix(parse_uri(uri)[2]) + target.decode()
