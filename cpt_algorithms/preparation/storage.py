# SPDX-License-Identifier: Apache-2.0
"""Output in object storage, by Streaming's own uploaders and downloaders."""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cpt_algorithms.preparation.sources import PrepareError

__all__ = ['check_destination', 'download', 'is_remote', 'read_manifest', 'upload', 'work_folder']

ATTEMPTS = 5
TIMEOUT = 600  # seconds, of one file
UPLOADS = 8  # at once


def is_remote(location: str) -> bool:
    """Whether a location is a URI, such as ``s3://bucket/data``."""
    return '://' in location or location.startswith('dbfs:')


def work_folder(remote: str) -> Path:
    """Where a remote output is made, the same every time; it is removed when all of it is uploaded."""
    name = hashlib.blake2b(remote.encode(), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir(), f'prepare_data-{name}')


def download(remote: str, local: Path) -> bool:
    """Fetch a file.

    Args:
        remote: Its URI.
        local: Where it goes.

    Returns:
        Whether there is one.

    Raises:
        PrepareError: If the storage cannot be read.
    """
    from streaming.base.storage.download import CloudDownloader

    local.parent.mkdir(parents=True, exist_ok=True)
    try:
        CloudDownloader.direct_download(remote, str(local), TIMEOUT)
    except FileNotFoundError:
        return False
    except Exception as error:  # each storage has its own
        response = getattr(error, 'response', None)
        if isinstance(response, dict) and response.get('Error', {}).get('Code') in ('404', 'NoSuchKey'):
            return False
        raise PrepareError(f'{remote}: cannot read it: {error}') from error
    return True


@contextmanager
def _uploader(remote: str) -> Iterator[Any]:
    from streaming.base.storage.upload import CloudUploader

    with tempfile.TemporaryDirectory() as empty:
        try:
            yield CloudUploader.get((empty, remote), keep_local=True, retry=ATTEMPTS)
        except PrepareError:
            raise
        except Exception as error:  # each storage has its own
            raise PrepareError(f'--out {remote}: cannot write there: {error}') from error


def check_destination(remote: str, work: Path) -> None:
    """Refuse a storage that cannot be written to, or that holds something else, before any work.

    Args:
        remote: Where the output will go.
        work: The folder it is made in: holds a record if what is there is the beginning of it.

    Raises:
        PrepareError: If it is one. Storages that Streaming cannot list are not looked into.
    """
    with _uploader(remote) as uploader:
        try:
            found = uploader.list_objects()
        except NotImplementedError:
            found = None
        if found and not any(work.glob('uploaded-*')):
            raise PrepareError(
                f'--out {remote}: holds {found[0]} and no manifest.json; choose another --out or delete what is there'
            )


def upload(folder: Path, remote: str, work: Path) -> None:
    """Copy a folder, its ``manifest.json`` last, so that half of it is never taken for all.

    Args:
        folder: The files.
        remote: Where they go.
        work: Folder for a record of what is there: a call after one that was interrupted goes on.

    Raises:
        PrepareError: If a file cannot be written, after several attempts.
    """
    from tqdm import tqdm

    files = sorted(str(file.relative_to(folder)) for file in folder.rglob('*') if file.is_file())
    manifest = (folder / 'manifest.json').read_bytes()
    record = work / f'uploaded-{hashlib.blake2b(manifest, digest_size=16).hexdigest()}'
    there = set(record.read_text(encoding='utf-8').splitlines()) if record.exists() else set()
    missing = [file for file in files if file not in there and file != 'manifest.json']
    with _uploader(remote) as uploader, open(record, 'a', encoding='utf-8') as uploaded:
        uploader.local = str(folder)
        uploaded.write('\n')  # after a line that a kill tore off, which names no file

        def copy(file: str) -> str:
            uploader.upload_file(file)
            return file

        with ThreadPoolExecutor(UPLOADS) as pool:
            try:
                copied = pool.map(copy, missing)
                for file in tqdm(copied, f'uploading to {remote}', len(missing), unit=' files', disable=None):
                    uploaded.write(f'{file}\n')
                    uploaded.flush()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        copy('manifest.json')


def read_manifest(location: str) -> dict[str, Any] | None:
    """The manifest of a preparation, here or in object storage; none if there is none.

    Raises:
        ValueError: If it is no JSON.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, 'manifest.json')
        if not is_remote(location):
            file = Path(location, 'manifest.json')
        elif not download(f'{location.rstrip("/")}/manifest.json', file):
            return None
        return json.loads(file.read_text(encoding='utf-8')) if file.is_file() else None
