# SPDX-License-Identifier: Apache-2.0
"""Where inputs come from and results go: downloads, uploads, room on the disk, and no result overwritten."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from cpt_algorithms.checkpoints.exports import newest_export
from cpt_algorithms.files import exists, fetch, is_remote, list_names, nearest_existing, size_of, upload
from cpt_algorithms.weight_averaging.offline.select import AverageError, Found

__all__ = ['download', 'provenance_of', 'refuse_existing', 'require_disk', 'upload_result']

SMALL_FILES = ('.json', '.txt', '.model', '.py', '.jinja', '.tiktoken')


def provenance_of(result: Path, is_file: bool) -> Path:
    """The file that says how a result was made: beside a file, or in a folder."""
    return result.with_name(f'{result.name}.average.json') if is_file else result / 'average.json'


def refuse_existing(out: str, is_file: bool) -> None:
    """Refuse to overwrite a result, or the provenance beside a file.

    Raises:
        AverageError: If it exists.
        StorageError: If object storage cannot be reached.
    """
    if is_remote(out):
        there = [out] if exists(out) or list_names(out) else []
    else:
        result = Path(out)
        # killed between the two renames, a run has left the provenance of a result that is in its hidden folder
        was_killed = result.with_name(f'.{result.name}.partial').exists()
        places = [result, provenance_of(result, is_file)] if is_file and not was_killed else [result]
        there = [str(path) for path in places if path.exists() or path.is_symlink()]
    if there:
        raise AverageError(f'{there[0]} exists; choose another --out or delete it')


def require_disk(folder: Path, num_bytes: int, what: str) -> None:
    """Refuse to begin what does not fit into a folder, which need not exist yet.

    Raises:
        AverageError: If the disk is too small.
    """
    folder = nearest_existing(folder)
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise AverageError(f'{what} needs {num_bytes / 1e9:,.1f} GB in {folder}, which has {free / 1e9:,.1f} GB')


def _small_files_beside(checkpoint: str) -> list[str]:
    """Config, tokenizer and code of the newest export of a run in object storage."""
    newest = newest_export(checkpoint.rpartition('/')[0])
    names = list_names(newest) if newest else []
    return [f'{newest}/{name}' for name in names if name.endswith(SMALL_FILES)]


def download(found: Sequence[Found], folder: Path, small_files: bool) -> list[Path]:
    """Bring checkpoints here, and the ``small_files`` (configuration, tokenizer) of the last, the newest, if asked for.

    Returns:
        Their paths, in the order given; of a checkpoint that is here already, its own.

    Raises:
        AverageError: If the disk is too small.
        StorageError: If a download fails.
    """
    uris = [uri for one in found for uri in one.objects]
    if small_files and found[-1].objects:
        uris += _small_files_beside(found[-1].path)
    sizes = {uri: size_of(uri) for uri in uris}
    require_disk(folder, sum(sizes.values()), 'downloading the inputs')

    def local(uri: str) -> Path:
        return folder / uri.replace('://', '/', 1)

    with tqdm(total=sum(sizes.values()), desc='downloading', unit='B', unit_scale=True, disable=None) as bar:
        for uri, size in sizes.items():
            fetch(uri, local(uri))
            bar.update(size)
    return [local(one.path) if one.objects else Path(one.path) for one in found]


def upload_result(made: Path, uri: str) -> None:
    """Send a result, alone with its provenance in its folder, to a URI, the files that make it look finished last."""
    files = [file for file in made.parent.rglob('*') if file.is_file()]
    files.sort(key=lambda file: (file.name in ('config.json', '.metadata') or file.suffix == '.pt', file))
    for file in tqdm(files, 'uploading', unit=' files', disable=None):
        upload(file, uri + file.relative_to(made.parent).as_posix().removeprefix(made.name))
