# SPDX-License-Identifier: Apache-2.0
"""A run's save folder: how Composer names checkpoints, and which of them is the newest complete one."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cpt_algorithms.checkpoints.errors import CheckpointError, UnsafeCheckpointError
from cpt_algorithms.files import fetch, is_remote, list_names, read_or_none

__all__ = [
    'batch_of',
    'check_links',
    'checkpoint_name',
    'fetch_checkpoint',
    'half_written',
    'is_complete',
    'latest_link',
    'newest_complete',
    'repair',
    'resolve_latest',
    'weights_in',
]

# torch is imported where checkpoints are read: names are asked for by commands that answer at once

# Composer's own names, which stages do not change.
_CHECKPOINT = re.compile(r'ep\d+-ba(\d+)(-rank0\.pt)?')
_PART = re.compile(r'__\d+_(\w+_)?\d+\.distcp|\.metadata(\.tmp)?')
_WEIGHTS = ('.pt', '.pth', '.ckpt', '.bin', '.distcp', '.metadata', '.safetensors', '.symlink')


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


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What cannot be read is an error, and says nothing of what is there."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f'{error.filename or path} cannot be read ({error.strerror}), so nobody knows which checkpoints are whole; '
            'nothing was changed: run the same command when it can be'
        ) from None


def is_complete(path: str | Path) -> bool:
    """Whether a local Composer checkpoint was written to its end, and its deletion has not begun.

    A zip's directory stands at its end. A sharded folder's ``.metadata`` is written last, and says how long its other
    files are, some of which may be deleted before it.

    Raises:
        CheckpointError: If it cannot be read, or is damaged: ``.metadata`` is there whole or not at all, and what it
            names is whole or deleted.
    """
    path = Path(path)
    if _leads_nowhere(path):  # to a disk that is away, perhaps: not the same as none
        raise CheckpointError(
            f'{path} leads to {os.readlink(path)}, which is not there; put it back, or remove the link'
        )
    with _reading(path):
        try:
            if not path.is_dir():
                return _is_zip(path)
            if not (path / '.metadata').exists():
                return False
            sizes = {file.name: file.stat().st_size for file in path.iterdir()}
        except FileNotFoundError:  # deleted since
            return False
    try:
        ends = _ends(path)
    except UnsafeCheckpointError:  # which is refused, or trusted, where it is loaded
        return True
    for name, end in ends.items():
        if sizes.get(name, end) < end:  # neither a save nor a deletion that was cut off leaves this
            raise CheckpointError(
                f'{path / name} is damaged: it has {sizes[name]:,} bytes, of which {end:,} are to be read'
            )
    return ends.keys() <= sizes.keys()


def _leads_nowhere(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def _is_zip(path: Path) -> bool:
    """``zipfile.is_zipfile``, which also says no where a file cannot be read."""
    with open(path, 'rb') as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2**16 - 22))
        tail = file.read()
    return 0 <= tail.rfind(b'PK\5\6') <= len(tail) - 22


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

    Returns:
        Its batch and its path or URI; 0 and None if there is none. Cost: in object storage one listing, and
        ``.metadata`` of the newest.

    Raises:
        StorageError: If object storage cannot be reached.
        CheckpointError: If a checkpoint cannot be read.
    """
    if is_remote(folder):
        return next(_complete_objects(str(folder).rstrip('/')), (0, None))
    return next(((batch, str(path)) for batch, path in _checkpoints(Path(folder)) if is_complete(path)), (0, None))


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """What has the name of a checkpoint, and its batch, the newest first."""
    with _reading(folder):
        paths = list(folder.iterdir()) if folder.is_dir() else []
    found = [(int(match[1]), path) for path in paths if (match := _CHECKPOINT.fullmatch(path.name))]
    return sorted(found, reverse=True)


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


def half_written(folder: Path) -> list[Path]:
    """What a kill has left of checkpoints: Composer's name, the beginning of its content, and not the end.

    Composer writes the newest, and deletes the oldest once a newer one is whole: nothing else can be of a kill.

    Raises:
        CheckpointError: If a checkpoint cannot be read.
    """
    found = [path for _, path in _checkpoints(folder) if not _leads_nowhere(path)]
    whole = [path for path in found if is_complete(path)]
    ends = {*found[:1], *(found[-1:] if whole else [])}
    return [path for path in ends if path not in whole and _is_begun(path)]


def _is_begun(path: Path) -> bool:
    if path.is_symlink():
        return False
    if path.is_dir():
        return all(_PART.fullmatch(each.name) for each in path.iterdir())
    with open(path, 'rb') as file:
        return file.read(4) in (b'', b'PK\3\4')


def weights_in(folder: str | Path) -> list[str]:
    """Every file that may hold weights, by its path below the folder, whoever wrote it and whatever it is called.

    Here what ``torch.save`` wrote is known by its form; in object storage, by its ending alone.

    Raises:
        StorageError: If object storage cannot be reached.
        CheckpointError: If a file or folder cannot be read.
    """
    if is_remote(folder):
        return sorted(name for name in list_names(str(folder)) if name.endswith(_WEIGHTS))
    with _reading(Path(folder)):
        files = (Path(where, name) for where, _, names in os.walk(folder, onerror=_not_gone) for name in names)
        found = (path for path in files if path.is_file() and (path.name.endswith(_WEIGHTS) or _is_zip(path)))
        return sorted(str(path.relative_to(folder)) for path in found)


def _not_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def check_links(folder: Path) -> None:
    """Refuse a ``latest`` that is no link: a copy that follows links makes it a checkpoint, perhaps the only one left.

    Raises:
        CheckpointError: With what to do about it.
    """
    for sharded in (True, False):
        path = folder / latest_link(sharded)
        if path.exists() and not path.is_symlink():
            from cpt_algorithms.checkpoints.open import time_of

            time = time_of(path)
            name = checkpoint_name(time['ba'], sharded).replace('ep0', f'ep{time["ep"]}')
            raise CheckpointError(
                f'{path} is no link but the checkpoint of batch {time["ba"]} itself, as copies that follow links make '
                f'it: rename it to {name}, or remove it if that is there'
            )


def repair(folder: Path) -> None:
    """Delete what a kill has left of checkpoints, and link ``latest`` to the newest complete one.

    Composer writes a checkpoint under its final name, then replaces the ``latest`` link by removing it, then deletes
    the oldest checkpoint. No other process may write to the folder.

    Raises:
        CheckpointError: If a checkpoint cannot be read, or something is there that no kill can have left.
    """
    check_links(folder)
    (latest, newest), left = newest_complete(folder), half_written(folder)
    for batch, path in _checkpoints(folder) if newest is not None else ():
        if batch > latest and path not in left:
            raise CheckpointError(
                f'{path} is not whole, and no kill has left it so: move it away, and the run goes on from {latest}'
            )
    for path in left:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
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

    There are no links: ``latest-rank0.pt.symlink`` is an object that holds the name of another. What is no such name,
    with or without ``.symlink``, stays as it is.

    Raises:
        StorageError: If the bucket cannot be reached.
    """
    from composer.utils import parse_uri  # takes seconds

    target = read_or_none(uri if uri.endswith('.symlink') else f'{uri}.symlink')
    return uri if target is None else uri.removesuffix(parse_uri(uri)[2]) + target.decode()


def fetch_checkpoint(uri: str, folder: Path) -> Path:
    """Download a checkpoint from object storage, which a URI or a ``latest`` link names, into a folder.

    Raises:
        StorageError: If the bucket cannot be reached.
    """
    uri = resolve_latest(uri)
    out = folder / uri.rstrip('/').rpartition('/')[2]
    for name in list_names(uri) or ['']:  # of a sharded one
        fetch(f'{uri}/{name}' if name else uri, out / name)
    return out
