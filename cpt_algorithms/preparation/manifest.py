# SPDX-License-Identifier: Apache-2.0
"""What was asked for and what was done, as ``manifest.json`` says it."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cpt_algorithms.files import write_atomic
from cpt_algorithms.preparation.sources import PrepareError
from cpt_algorithms.preparation.storage import is_remote, read_manifest

__all__ = ['FORMAT', 'differences', 'find_prepared', 'versions', 'write_manifest']

FORMAT = 3  # of the manifest and of what it describes; another one is never re-used
LIBRARIES = ('datasets', 'datasketch', 'mosaicml-streaming', 'numpy', 'pyarrow', 'tokenizers', 'transformers')


def versions() -> dict[str, str]:
    """The versions that a result may depend on."""
    return {'python': platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write ``manifest.json``, whole or not at all."""
    write_atomic(folder / 'manifest.json', (json.dumps(manifest, indent=2) + '\n').encode())


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two requests, one phrase per option."""
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f'{key} was {json.dumps(old.get(key))}, now {json.dumps(new.get(key))}' for key in keys]


def find_prepared(location: str, request: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of what is there if it answers the same request.

    Args:
        location: A folder or URI.
        request: What is asked for.

    Returns:
        The manifest; none if there is none.

    Raises:
        PrepareError: If something else is there.
    """
    advice = 'choose another --out or delete it'
    try:
        manifest = read_manifest(location)
        if manifest is None:
            if is_remote(location) or not os.path.exists(location) or not os.listdir(location):
                return None
            raise ValueError
        differing = differences(manifest['request'], request)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise PrepareError(f'{location} exists and was not made by this script; {advice}') from None
    if differing:
        raise PrepareError(f'{location} was prepared differently ({"; ".join(differing)}); {advice}')
    return manifest
