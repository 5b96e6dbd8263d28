# SPDX-License-Identifier: Apache-2.0
"""Results that appear whole or not at all, in a local folder or in object storage.

Whatever asks object storage raises StorageError if it cannot be reached or does not let us in.
"""

import json
import logging
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from math import isfinite, nan
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cpt_algorithms.formatting import one_line

__all__ = [
    'NoStoreError',
    'StorageError',
    'check_writable',
    'exists',
    'fetch',
    'hidden_sibling',
    'holder_of',
    'is_remote',
    'list_names',
    'locked_sibling',
    'nearest_existing',
    'null_as_nan',
    'read_json',
    'read_or_none',
    'read_yaml',
    'remove_partials',
    'size_of',
    'take',
    'to_json',
    'upload',
    'write_atomic',
    'write_json',
]


log = logging.getLogger(__name__)

# Seconds to wait silently for a lock.
_PATIENCE = 10.0


class StorageError(ValueError):
    """Storage that cannot be reached or does not let us in; what is merely not there is no such error."""


class NoStoreError(StorageError):
    """A URI that can lead nowhere, from here or elsewhere."""


def is_remote(place: str | Path) -> bool:
    """Whether a place lies in object storage: ``s3://bucket/run``, and whatever else Composer has a store for."""
    return bool(urlparse(str(place)).scheme)


@cache
def _store(bucket: str, endpoint: str | None) -> Any:
    """Composer's object store of a bucket at an endpoint; making one takes a tenth of a second."""
    from composer.utils import maybe_create_object_store_from_uri

    return maybe_create_object_store_from_uri(bucket)


@contextmanager
def _storage(uri: str | Path) -> Iterator[tuple[Any, str]]:
    """The object store of a URI, and the name in it."""
    from composer.utils import parse_uri  # Composer takes seconds to import
    from composer.utils.file_helpers import BACKEND_TO_OBJECT_STORE_FACTORY

    scheme, bucket, name = parse_uri(str(uri))
    known = {*BACKEND_TO_OBJECT_STORE_FACTORY, 'dbfs'}
    if scheme not in known:
        schemes = ', '.join(f'{each}://' for each in sorted(known))
        raise NoStoreError(f'{uri}: Composer has no store for {scheme}://; it has {schemes}')
    if not bucket and scheme != 'dbfs':
        raise NoStoreError(f'{uri} names no bucket: {scheme}://BUCKET/FOLDER')
    try:
        store = _store(str(uri).removesuffix(name), os.environ.get('S3_ENDPOINT_URL'))
        try:
            yield store, name
        except FileNotFoundError:
            # S3 answers "not found" also to those who may not read an object, and Composer believes it
            if name in store.list_objects(name):
                raise PermissionError('it is there, and may not be read') from None
            raise
    except FileNotFoundError:
        raise
    except Exception as error:  # each backend has its own
        raise StorageError(f'{uri} cannot be reached: {one_line(error)}') from error


def list_names(folder: str | Path) -> list[str]:
    """Names of all objects below a folder in object storage, relative to it; none if there is no such folder."""
    with _storage(str(folder).rstrip('/') + '/') as (store, prefix):
        return sorted(name.removeprefix(prefix) for name in store.list_objects(prefix) if name != prefix)


def exists(place: str | Path) -> bool:
    """Whether there is such a file or object."""
    if not is_remote(place):
        return Path(place).exists()
    with _storage(place) as (store, name):
        return name in store.list_objects(name)


def size_of(uri: str) -> int:
    """Size of an object in bytes.

    Raises:
        FileNotFoundError: If there is none.
    """
    with _storage(uri) as (store, name):
        return store.get_object_size(name)


def fetch(uri: str, path: str | Path) -> None:
    """Download one object to a path, whole or not at all; its folder is made if need be.

    Raises:
        FileNotFoundError: If there is none.
    """
    with _storage(uri) as (store, name):
        store.download_object(name, str(path), overwrite=True)


def upload(path: str | Path, uri: str) -> None:
    """Upload one file."""
    with _storage(uri) as (store, name):
        store.upload_object(name, str(path))


def read_or_none(place: str | Path) -> bytes | None:
    """The content of a file or object; None if there is none."""
    try:
        if not is_remote(place):
            return Path(place).read_bytes()
        with tempfile.TemporaryDirectory() as folder:
            fetch(str(place), Path(folder) / 'object')
            return (Path(folder) / 'object').read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_json(place: str | Path) -> Any:
    """The value of a JSON file or object; None if there is none.

    Raises:
        ValueError: If it is not JSON.
    """
    content = read_or_none(place)
    try:
        return None if content is None else json.loads(content)
    except ValueError as error:
        raise ValueError(f'{place} cannot be read: {error}') from None


def read_yaml(
    path: str | Path,
    overrides: Sequence[str] = (),
    resolve: bool = True,
    change: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """A YAML file with keys.

    Args:
        path: The file.
        overrides: ``key=value`` with dotted keys. Default: none.
        resolve: Whether to fill in what ``${...}`` stands for. Default: ``True``.
        change: Applied to what the file says before the overrides. Default: ``None``.

    Raises:
        ValueError: If it cannot be read, or holds anything but a mapping of keys.
    """
    try:
        try:
            given = OmegaConf.load(path)
        except AssertionError:  # a text, which OmegaConf takes for a YAML of its own
            given = None
        if not isinstance(given, DictConfig):
            raise ValueError(f'{path} must be a mapping of keys')
        given = OmegaConf.create(change(_container(given))) if change else given
        return _container(OmegaConf.merge(given, OmegaConf.from_dotlist(list(overrides))), resolve)
    except (OSError, UnicodeDecodeError, OmegaConfBaseException, YAMLError, TypeError) as error:
        raise ValueError(f'{path} cannot be read: {one_line(error)}') from None


def _container(config: Any, resolve: bool = False) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(config, resolve=resolve)
    return plain


def write_atomic(place: str | Path, content: bytes) -> None:
    """Write a file or object whole or not at all, even if the machine stops half-way or another process writes it too.

    A local folder is made if need be.
    """
    if is_remote(place):
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            upload(file.name, str(place))
        return
    path = Path(place)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'.{path.name}.{secrets.token_hex(4)}')
    try:
        with open(partial, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:  # also of control-C
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a full disk says neither which file nor leaves room for half of it
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def remove_partials(folder: Path) -> None:
    """Remove what :func:`write_atomic` leaves of JSON and YAML if it is killed, unless it is younger than a minute."""
    for path in folder.glob('.*'):
        ours = re.fullmatch(r'\..+\.(json|yaml)\.[0-9a-f]{8}', path.name) and path.is_file()
        if ours and abs(time.time() - path.stat().st_mtime) > 60:
            path.unlink(missing_ok=True)


def write_json(place: str | Path, value: Any) -> None:
    """Write a JSON file or object as :func:`write_atomic` does; see :func:`to_json`."""
    write_atomic(place, to_json(value).encode())


def to_json(value: Any) -> str:
    """A value as JSON, which knows no NaN and no infinity: what is no finite number becomes null."""
    return json.dumps(_finite(value), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def null_as_nan(value: Any) -> Any:
    """Numbers as they were before :func:`write_json` wrote them: null becomes NaN."""
    if isinstance(value, dict):
        return {key: null_as_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [null_as_nan(each) for each in value]
    return nan if value is None else value


def nearest_existing(path: str | Path) -> Path:
    """A path that need not exist, or the nearest folder above it that does."""
    path = Path(path).absolute()
    return next(each for each in (path, *path.parents) if os.path.exists(each))


def check_writable(key: str, folder: str, advice: str) -> None:
    """Refuse a local folder that cannot be written to, or made; object storage is not asked.

    Raises:
        StorageError: With its key, and the advice.
    """
    if is_remote(folder):
        return
    if os.path.islink(folder) and not os.path.exists(folder):
        raise StorageError(f'{key}: {folder} leads to {os.readlink(folder)}, which is not there; {advice}')
    there = nearest_existing(folder)
    if not there.is_dir():
        raise StorageError(f'{key}: {there} is no folder; {advice}')
    if not os.access(there, os.W_OK | os.X_OK):
        raise StorageError(f'{key}: {there} cannot be written to; {advice}')


def holder_of(lock: Any) -> str:
    """The holder of a lock that was taken with :func:`take`: process, run, since when."""
    try:
        return '{what} (process {pid} on {host}, since {since})'.format(**(read_json(f'{lock.lock_file}.json') or {}))
    except (OSError, ValueError, LookupError, AttributeError):
        return 'another process'


def take(lock: Any, what: str, timeout: float = -1) -> None:
    """Take a lock of ``filelock`` and leave beside it, in ``<lock>.json``, who has it. Who waits says for whom.

    Args:
        lock: The lock.
        what: The purpose, such as the name of a run.
        timeout: Seconds to wait. Default: ``-1``, for ever.

    Raises:
        filelock.Timeout: If another process has it for so long.
    """
    from filelock import Timeout

    said, end = '', time.monotonic() + timeout
    while True:
        left = end - time.monotonic() if timeout >= 0 else _PATIENCE
        try:
            lock.acquire(timeout=max(0.0, min(left, _PATIENCE)))
            break
        except Timeout:
            if timeout >= 0 and time.monotonic() >= end:
                raise
        if (holder := holder_of(lock)) != said:
            said = holder
            log.warning('%s: waiting for %s, which has %s', what, holder, lock.lock_file)
    since = time.strftime('%Y-%m-%d %H:%M:%S')
    write_json(f'{lock.lock_file}.json', {'what': what, 'pid': os.getpid(), 'host': platform.node(), 'since': since})


@contextmanager
def locked_sibling(out: Path, busy: Exception) -> Iterator[Path]:
    """A hidden folder beside ``out``, to make a result in; it stays, to go on from, until it is removed or renamed.

    One process at a time has it, through a lock that dies with the process; ``busy`` is raised in another.
    """
    from filelock import FileLock, Timeout

    partial, file = (out.with_name(f'.{out.name}.{suffix}') for suffix in ('partial', 'lock'))
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise busy from None
    try:
        partial.mkdir(exist_ok=True)
        yield partial
    finally:
        file.unlink(missing_ok=True)  # while we hold it: filelock notices in another process that it is gone
        lock.release()


@contextmanager
def hidden_sibling(out: Path, busy: Exception) -> Iterator[Path]:
    """A :func:`locked_sibling` that is empty, and removed at the end unless it was renamed."""
    with locked_sibling(out, busy) as partial:
        try:
            shutil.rmtree(partial)
            partial.mkdir()
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
