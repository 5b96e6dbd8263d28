# SPDX-License-Identifier: Apache-2.0
"""Output in object storage: it is made in a folder here, and uploaded when it is complete."""

import hashlib
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cpt_algorithms.files import list_names, upload
from cpt_algorithms.preparation.reading import PrepareError

__all__ = ['check_destination', 'upload_folder', 'work_folder']

UPLOADS = 8  # at once


def work_folder(remote: str) -> Path:
    """Where a remote output is made, the same every time; it is removed when all of it is uploaded."""
    name = hashlib.blake2b(remote.encode(), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir(), f'prepare_data-{name}')


def check_destination(remote: str, work: Path) -> None:
    """Refuse, before any work, a place in object storage that holds something else.

    A record in the folder ``work`` says that an earlier call began to upload.
    """
    found = list_names(remote)
    if found and not any(work.glob('uploaded-*')):
        raise PrepareError(
            f'--out {remote}: holds {found[0]} and no manifest.json; choose another --out or delete what is there'
        )


def upload_folder(folder: Path, remote: str, work: Path) -> None:
    """Upload a folder, its ``manifest.json`` last, so that half of it is never taken for all.

    A call after one that was interrupted goes on from the record of what is uploaded in the folder ``work``.
    """
    from tqdm import tqdm

    files = sorted(str(file.relative_to(folder)) for file in folder.rglob('*') if file.is_file())
    manifest = (folder / 'manifest.json').read_bytes()
    record = work / f'uploaded-{hashlib.blake2b(manifest, digest_size=16).hexdigest()}'
    there = set(record.read_text(encoding='utf-8').splitlines()) if record.exists() else set()
    missing = [file for file in files if file not in there and file != 'manifest.json']

    def copy(file: str) -> str:
        upload(folder / file, f'{remote.rstrip("/")}/{file}')
        return file

    with open(record, 'a', encoding='utf-8') as uploaded, ThreadPoolExecutor(UPLOADS) as pool:
        uploaded.write('\n')  # after a line that a kill tore off, which names no file
        try:
            copied = pool.map(copy, missing)
            for file in tqdm(copied, f'uploading to {remote}', len(missing), unit=' files', disable=None):
                uploaded.write(f'{file}\n')
                uploaded.flush()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    copy('manifest.json')
