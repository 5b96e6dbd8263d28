# SPDX-License-Identifier: Apache-2.0
"""Data prepared before, whose documents count as seen."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt_algorithms.files import fetch, is_remote, read_json
from cpt_algorithms.preparation.manifest import FORMAT, Manifest
from cpt_algorithms.preparation.packing import SPLITS
from cpt_algorithms.preparation.sources import PrepareError
from cpt_algorithms.validation import parse_section

__all__ = ['Earlier', 'find_earlier']


@dataclass(frozen=True)
class Earlier:
    """Data prepared before.

    Args:
        location: Folder or URI.
        manifest: Its manifest.
    """

    location: str
    manifest: Manifest

    def fetch(self, name: str, cache: Path) -> Path:
        """A file of it, fetched if need be.

        Args:
            name: Relative to its folder.
            cache: Folder for what is fetched.

        Raises:
            PrepareError: If it is not there.
        """
        file = Path(self.location, name)
        try:
            if is_remote(self.location):
                file = cache / self.manifest.tokenizer.hash / self.location.replace('/', '_') / name
                if not file.exists():
                    fetch(f'{self.location.rstrip("/")}/{name}', file)
        except FileNotFoundError:
            pass
        if not file.is_file():
            raise PrepareError(f'--earlier {self.location}: {name} is missing')
        return file

    def tokenizer(self, cache: Path) -> Path:
        """The folder of its tokenizer."""
        return [self.fetch(f'tokenizer/{name}', cache) for name in self.manifest.tokenizer.files][0].parent

    def keys(self, name: str, cache: Path) -> list[Path]:
        """The files of that name of each dataset and split: ``documents.npy`` or ``signatures.npy``."""
        return [
            self.fetch(f'{dataset}/{split}/{name}', cache) for dataset in self.manifest.datasets for split in SPLITS
        ]


def find_earlier(location: str, near: dict[str, Any] | None) -> Earlier:
    """Read the manifest of data prepared before.

    Args:
        location: Folder or URI.
        near: Settings of near-duplicates, if these are looked for.

    Raises:
        PrepareError: If there is none, or it cannot be compared with.
        StorageError: If object storage cannot be reached.
    """
    try:
        manifest = parse_section(Manifest, read_json(f'{location.rstrip("/")}/manifest.json'))
    except ValueError:
        manifest = None
    if manifest is None or manifest.request.format != FORMAT:
        raise PrepareError(f'--earlier {location}: no manifest.json of this script (format {FORMAT}) found')
    if near and manifest.request.near_duplicates != near:
        raise PrepareError(
            f'--earlier {location}: near-duplicates are looked for with {near}, but it was prepared with '
            f'{manifest.request.near_duplicates}'
        )
    return Earlier(location, manifest)
