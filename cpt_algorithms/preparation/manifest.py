# SPDX-License-Identifier: Apache-2.0
"""What was asked for and what was done, as ``manifest.json`` says it."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from cpt_algorithms.files import is_remote, read_json, write_atomic
from cpt_algorithms.preparation.packing import Counts
from cpt_algorithms.preparation.sources import PrepareError
from cpt_algorithms.validation import Section, parse_section

__all__ = ['FORMAT', 'DatasetRecord', 'Manifest', 'Request', 'SourceRecord', 'TokenizerRecord', 'find_prepared']

FORMAT = 3  # of the manifest and of what it describes; another one is never re-used
LIBRARIES = ('datasets', 'datasketch', 'mosaicml-streaming', 'numpy', 'pyarrow', 'tokenizers', 'transformers')


class _Record(Section):
    model_config = ConfigDict(extra='forbid')


class Request(_Record):
    """Everything that decides the result."""

    format: int
    datasets: list[str]
    files: dict[str, str]
    text_key: str
    tokenizer: str | None = None
    tokenizer_hash: str | None = None
    parent: str | None = None
    earlier: dict[str, str]
    vocab_size: int | None = None
    tokenizer_documents: int | None = None
    max_seq_len: int
    val_fraction: float
    max_train_tokens: int | None = None
    max_val_tokens: int | None = None
    near_duplicates: dict[str, Any] | None = None
    compression: str | None = None


class TokenizerRecord(_Record):
    """The tokenizer, and its files."""

    vocab_size: int
    eos_token: str
    eos_token_id: int
    hash: str
    files: list[str]


class SourceRecord(_Record):
    """What one source gave."""

    kind: str
    target: str
    files: int
    skipped: int
    splits: dict[str, Counts]


class DatasetRecord(_Record):
    """What is in one dataset; ``lm_eval`` counts the rows of each kind of task."""

    files: int
    skipped: int
    splits: dict[str, Counts]
    sources: dict[str, SourceRecord]
    parts: int
    lm_eval: dict[str, int]


class Manifest(_Record):
    """The content of ``manifest.json``; ``earlier`` are the sources of data prepared before, by its location."""

    request: Request
    tokenizer: TokenizerRecord
    earlier: dict[str, list[str]]
    datasets: dict[str, DatasetRecord]
    engine: str
    versions: dict[str, str]

    def write(self, folder: Path) -> None:
        """Write ``manifest.json``, whole or not at all."""
        write_atomic(folder / 'manifest.json', (json.dumps(self.model_dump(), indent=2) + '\n').encode())


def versions() -> dict[str, str]:
    """The versions that a result may depend on."""
    return {'python': platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two requests, one phrase per option."""
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f'{key} was {json.dumps(old.get(key))}, now {json.dumps(new.get(key))}' for key in keys]


def find_prepared(location: str, request: Request) -> Manifest | None:
    """The manifest of what is there if it answers the same request.

    Args:
        location: A folder or URI.
        request: What is asked for.

    Returns:
        The manifest; none if nothing is there.

    Raises:
        PrepareError: If something else is there.
        StorageError: If object storage cannot be reached.
    """
    advice = 'choose another --out or delete it'
    found = read_json(f'{location.rstrip("/")}/manifest.json')
    if found is None and (is_remote(location) or not os.path.exists(location) or not os.listdir(location)):
        return None
    old = found.get('request') if isinstance(found, dict) else None
    if not isinstance(old, dict):
        raise PrepareError(f'{location} exists and was not made by this script; {advice}')
    if differing := _differences(old, request.model_dump()):
        raise PrepareError(f'{location} was prepared differently ({"; ".join(differing)}); {advice}')
    return parse_section(Manifest, found)
