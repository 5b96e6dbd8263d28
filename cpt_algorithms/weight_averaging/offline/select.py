# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints a command names, and which of them are averaged: the latest ones, windows along a run."""

import fnmatch
import glob
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from cpt_algorithms.checkpoints.save_folder import batch_of
from cpt_algorithms.files import exists, is_remote, list_names

__all__ = ['AverageError', 'Found', 'find', 'latest', 'windows_of']

RUN = 'ep*-ba*'  # Composer's names of checkpoints
EXPORT = r'ba\d+'  # and of exports in huggingface/; those of averages have a suffix


class AverageError(ValueError):
    """Something the user can put right; its message is one line."""


@dataclass(frozen=True)
class Found:
    """A checkpoint that was found: its path or URI, and in object storage the URIs of its files."""

    path: str
    objects: Sequence[str] = field(default=(), repr=False, compare=False)

    @property
    def name(self) -> str:
        """``ep0-ba10`` for ``run/ep0-ba10-rank0.pt``."""
        path = PurePosixPath(self.path)
        if path.name.startswith('model.safetensors'):
            return path.parent.name
        return re.sub(r'(-rank\d+)?\.(pt|safetensors)$', '', path.name)

    @property
    def batch(self) -> int | None:
        """The batch in its name."""
        return batch_of(self.name)


class _Here:
    """Files on this machine."""

    def children(self, path: str) -> list[str]:
        return os.listdir(path) if os.path.isdir(path) else []

    def glob(self, pattern: str) -> list[str]:
        """Without links to others of the matches."""
        found = glob.glob(pattern)
        links = [path for path in found if _is_latest(path)]
        real = {os.path.realpath(path) for path in found if path not in links}
        return [path for path in found if path not in links or os.path.realpath(path) not in real]

    def found(self, path: str) -> Found:
        return Found(os.path.realpath(path) if _is_latest(path) else path)


class _Bucket:
    """Objects in object storage, as files in folders: those below a URI, or below the folder of its first wildcard."""

    def __init__(self, uri: str) -> None:
        fixed = re.split(r'[*?[]', uri)[0]
        folder = fixed.rstrip('/') if fixed == uri else fixed.rpartition('/')[0]
        names = [name for name in list_names(folder) if not name.endswith(('.symlink', '/'))]
        if outside := [name for name in names if '..' in name.split('/')]:
            raise AverageError(f'{uri}: the object name {outside[0]!r} leads out of its folder')
        self.uris = [f'{folder}/{name}' for name in names] or ([folder] if exists(folder) else [])

    def children(self, path: str) -> list[str]:
        return [uri[len(path) + 1 :].partition('/')[0] for uri in self.uris if uri.startswith(f'{path}/')]

    def glob(self, pattern: str) -> list[str]:
        parts = pattern.split('/')
        found = {tuple(uri.split('/')[: len(parts)]) for uri in self.uris}
        return [
            '/'.join(names)
            for names in found
            if len(names) == len(parts) and all(map(fnmatch.fnmatchcase, names, parts))
        ]

    def found(self, path: str) -> Found:
        return Found(path, [uri for uri in self.uris if uri == path or uri.startswith(f'{path}/')])


def _is_latest(path: str) -> bool:
    """Whether a path is the link that Composer keeps to its newest checkpoint."""
    return os.path.islink(path) and os.path.basename(path).startswith('latest')


def _is_checkpoint(place: _Here | _Bucket, path: str) -> bool:
    """Whether a path looks like one checkpoint: a file, or a folder that one fills."""
    names = place.children(path)
    return not names or any(n in names for n in ('.metadata', 'model.safetensors', 'model.safetensors.index.json'))


def _of_run(place: _Here | _Bucket, folder: str) -> list[str]:
    """The checkpoints in a run's folder, or its exports if it has none."""
    exports = [*place.glob(f'{folder}/huggingface/*'), *place.glob(f'{folder}/*')]
    exports = [path for path in exports if re.fullmatch(EXPORT, path.rpartition('/')[2])]
    for candidates in (place.glob(f'{folder}/{RUN}'), exports):
        if checkpoints := [path for path in candidates if _is_checkpoint(place, path)]:
            return checkpoints
    return []


def _in_order(group: Sequence[Found]) -> tuple[list[Found], str]:
    """Checkpoints by the numbers in their names, and why that may not be the order of training: nothing if it is.

    It is if Composer's batches tell all apart, or if the names are alike but for numbers, none of which falls while
    another one rises.
    """
    batches = {one.batch for one in group}
    if None not in batches and len(batches) == len(group):
        return sorted(group, key=lambda one: one.batch or 0), ''
    if len({re.sub(r'\d+', '0', one.path) for one in group}) > 1:
        return sorted(group, key=lambda one: one.path), 'differ in more than numbers'
    numbers = {one.path: [int(number) for number in re.findall(r'\d+', one.path)] for one in group}
    ordered = sorted(group, key=lambda one: (numbers[one.path], one.path))
    # as whole numbers and, where there is a point between two, as fractions
    readings = [(*numbers[one.path], *map(float, re.findall(r'\d+\.\d+', one.path))) for one in ordered]
    rises = all(list(column) == sorted(column) for column in zip(*readings, strict=True))
    return ordered, '' if rises else 'have numbers that say several orders'


def find(inputs: Sequence[str], order_matters: bool = False) -> list[Found]:
    """All checkpoints that the inputs name, oldest first.

    Args:
        inputs: Checkpoints, globs and save folders, here or in object storage. A list stays in the order given.
        order_matters: Whether to refuse checkpoints whose names do not say in which order they were trained, and a list
            in the alphabet's order where the numbers say another, as a shell makes of a glob. Default: ``False``.

    Raises:
        AverageError: If an input has none, one is named twice, or the order matters and is not known.
        StorageError: If object storage cannot be reached.
    """
    found: list[Found] = []
    for given in inputs:
        place, path = _Bucket(given) if is_remote(given) else _Here(), given.rstrip('/') or given
        is_glob = glob.has_magic(path) and not os.path.lexists(path)
        matches = place.glob(path) if is_glob else [path]
        if not is_glob and not _is_checkpoint(place, path):
            # an empty answer is explained when the folder itself is opened
            matches = _of_run(place, glob.escape(path)) or matches
        group = [place.found(match) for match in matches]
        if not group or is_remote(given) and not group[0].objects:
            raise AverageError(f'{given}: no checkpoint found')
        ordered, doubt = _in_order(group)
        if doubt and order_matters:
            raise AverageError(
                f'{given}: the names {ordered[0].path} and {ordered[-1].path} {doubt}, so it is not known which is '
                'older; name the checkpoints one by one, oldest first'
            )
        found += ordered
    counts = Counter(one.path if one.objects else os.path.realpath(one.path) for one in found)
    for path, count in counts.items():
        if count > 1:
            raise AverageError(f'{path} is given {count} times')
    if order_matters and len(found) == len(inputs):
        ordered, doubt = _in_order(found)
        if not doubt and found != ordered and found == sorted(found, key=lambda one: one.path):
            raise AverageError(
                f'{found[0].path} to {found[-1].path}: the list is in the order of the alphabet, as a shell makes of a '
                'glob, and not of its numbers; quote the glob, or name the checkpoints oldest first'
            )
    return found


def latest(found: Sequence[Found], last: int, every: int | None) -> list[Found]:
    """The latest ``last`` checkpoints, oldest first, ``every`` batches apart; ``None`` for those that are there.

    Raises:
        AverageError: If there are too few, one is missing, or one has no batch in its name.
    """
    by_batch: dict[int, Found] = {}
    for one in found:
        if one.batch is None:
            raise AverageError(f'--last {last}: {one.path} has no batch in its name, such as ba1000')
        if one.batch in by_batch:
            raise AverageError(f'--last {last}: {by_batch[one.batch].path} and {one.path} are of the same batch')
        by_batch[one.batch] = one
    batches = sorted(by_batch)
    if every is None:
        if len(batches) < last:
            raise AverageError(f'--last {last}: there are only {len(batches)}: {_listed(batches)}')
        return [by_batch[batch] for batch in batches[-last:]]
    wanted = [batches[-1] - every * back for back in reversed(range(last))]
    if missing := [batch for batch in wanted if batch not in by_batch]:
        raise AverageError(
            f'--last {last} --every {every}: batch {_listed(missing)} is missing; there are {_listed(batches)}'
        )
    return [by_batch[batch] for batch in wanted]


def _listed(numbers: Sequence[int]) -> str:
    """Numbers in a message, the last twenty of them."""
    return ('... ' if len(numbers) > 20 else '') + ', '.join(map(str, numbers[-20:]))


def windows_of(found: Sequence[Found], window: int | None, stride: int) -> list[Sequence[Found]]:
    """Each ``window`` checkpoints along the run, ``stride`` apart; without ``window`` all as one.

    Raises:
        AverageError: If there are too few, or two windows would have one name.
    """
    if window is None:
        return [found]
    if len(found) < window:
        raise AverageError(f'--window {window}: there are only {len(found)} checkpoints')
    windows = [found[end - window : end] for end in range(window, len(found) + 1, stride)]
    for name, count in Counter(each[-1].name for each in windows).items():
        if count > 1:
            raise AverageError(f'--window {window}: {count} checkpoints are called {name!r}')
    return windows
