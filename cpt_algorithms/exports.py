# SPDX-License-Identifier: Apache-2.0
"""Exported Hugging Face models of runs: where they are, and which one a run began from."""

import json
import os
import re
from pathlib import Path

from cpt_algorithms.files import is_remote

__all__ = ['exports', 'models_of', 'parent_of']


def exports(run: Path) -> dict[int, Path]:
    """A run's exports of its own weights by batch."""
    found = {path: re.fullmatch(r'ba(\d+)', path.parent.name) for path in run.glob('huggingface/ba*/config.json')}
    return {int(match[1]): path.parent for path, match in found.items() if match}


def models_of(given: Path) -> list[Path]:
    """The models that an argument names, a run's own weights first.

    Raises:
        ValueError: If there is none.
    """
    if (given / 'config.json').is_file():
        return [given]
    if not (found := exports(given)):
        raise ValueError(f'{given}: no model found; expected config.json, or huggingface/ba<N>/config.json of a run')
    newest = found[max(found)]
    return [newest, *sorted(path.parent for path in newest.parent.glob(f'{newest.name}-*/config.json'))]


def parent_of(given: Path) -> Path | None:
    """The export of the checkpoint that a run began from; none if it began from scratch or is not known.

    Raises:
        ValueError: If there was a parent and it has no export.
    """
    run = given.resolve().parent.parent if (given / 'config.json').is_file() else given
    try:
        load_path = json.loads((run / 'stage.json').read_text(encoding='utf-8'))['parent']
    except (OSError, ValueError, KeyError):
        return None
    if not load_path:
        return None
    if is_remote(load_path):
        raise ValueError(
            f'{given}: its parent {load_path} lies in object storage, so no differences are shown; --parent names a '
            'copy of its export'
        )
    # latest-rank0.pt is a link to ep0-ba100-rank0.pt
    checkpoint = Path(os.path.realpath(load_path))
    found = exports(Path(load_path).parent)
    batch = re.search(r'-ba(\d+)', checkpoint.name)
    wanted = int(batch[1]) if batch else max(found, default=-1)
    if wanted not in found:
        name = f'huggingface/ba{wanted}' if batch else 'huggingface/ba<N>'
        raise ValueError(
            f'{given}: its parent {load_path} has no export {name} beside it, so no differences are shown; '
            '--parent names another'
        )
    return found[wanted]
