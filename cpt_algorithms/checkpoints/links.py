# SPDX-License-Identifier: Apache-2.0
"""A sharded checkpoint does not write again what the one before it of the same run holds, and links to it instead."""

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from composer.utils import checkpoint
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StoragePrefix
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

__all__ = ['Written', 'linking']

# Each file of what never changes: the folder that it was last seen in, and what it holds.
Written = dict[str, tuple[Path, dict[MetadataIndex, WriteResult]]]


class LinkingWriter(FileSystemWriter):
    """Torch's, which puts what never changes into files of its own, ``__<rank>_<name>_0.distcp``, and links to those.

    A hard link is the same file in two folders: each checkpoint is whole, and whichever is deleted first takes nothing
    from the other. What cannot be linked, as it is gone, or cut off, or on a file system without links, is written.

    Args:
        folder: The checkpoint's.
        name_of: The name of the file of an entry that will never change, by the entry's key; None for all others.
        written: What this rank has written, or linked, of such; becomes what this checkpoint holds.
    """

    def __init__(self, folder: str, name_of: Callable[[str], str | None], written: Written) -> None:
        super().__init__(folder)
        self.name_of, self.written = name_of, written

    def set_up_storage_writer(self, is_coordinator: bool, *arguments: Any, **options: Any) -> None:
        """What lies there is no checkpoint any more, before any of its files is another."""
        if is_coordinator:
            (Path(self.path) / '.metadata').unlink(missing_ok=True)
        super().set_up_storage_writer(is_coordinator, *arguments, **options)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write and link this rank's files."""
        files: dict[str | None, list[WriteItem]] = {None: []}
        for item in plan.items:
            files.setdefault(self.name_of(item.index.fqn), []).append(item)
        results = self._write(plan, files.pop(None), planner)
        before = dict(self.written)
        self.written.clear()
        for name, items in files.items():
            assert name is not None, 'was taken out'
            own = replace(plan, storage_data=_StoragePrefix(f'{plan.storage_data.prefix}{name}_'))
            found = self._link(before.get(name), items)
            if found is None:
                found = self._write(own, items, planner)
            self.written[name] = Path(self.path), {result.index: result for result in found}
            results += found
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write(self, plan: SavePlan, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        # what lies there may be another checkpoint's file, too, and torch would write into it
        (Path(self.path) / f'{plan.storage_data.prefix}0.distcp').unlink(missing_ok=True)
        return super().write_data(replace(plan, items=items), planner).value()

    def _link(
        self, before: tuple[Path, dict[MetadataIndex, WriteResult]] | None, items: Sequence[WriteItem]
    ) -> list[WriteResult] | None:
        """What the file of an earlier checkpoint holds, which is in this folder now, too; None if it has to write."""
        if before is None:
            return None
        folder, results = before
        if results.keys() != {item.index for item in items}:
            return None
        places = [result.storage_data for result in results.values()]
        (name,) = {place.relative_path for place in places}
        try:
            (Path(self.path) / name).unlink(missing_ok=True)
            there = os.lstat(folder / name)
            if not stat.S_ISREG(there.st_mode) or there.st_size < max(place.offset + place.length for place in places):
                return None
            os.link(folder / name, Path(self.path) / name)
        except OSError:
            return None
        return list(results.values())


@contextmanager
def linking(name_of: Callable[[str], str | None], written: Written) -> Iterator[None]:
    """Composer's sharded checkpoints are written by :class:`LinkingWriter` inside."""
    module: Any = checkpoint
    stock = module.dist_cp
    writer = partial(LinkingWriter, name_of=name_of, written=written)
    module.dist_cp = SimpleNamespace(**{**vars(stock), 'FileSystemWriter': writer})
    try:
        yield
    finally:
        module.dist_cp = stock
