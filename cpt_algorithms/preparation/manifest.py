# SPDX-License-Identifier: Apache-2.0
"""``manifest.json``: the request and the result, of this preparation and of earlier ones."""

import hashlib
import json
import os
import platform
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from cpt_algorithms.files import StorageError, fetch, is_remote, read_json
from cpt_algorithms.preparation.packing import SPLITS, Counts, Hits
from cpt_algorithms.preparation.reading import PrepareError
from cpt_algorithms.validation import ConfigError, Section, parse_section

__all__ = [
    'FORMAT',
    'Choices',
    'DatasetRecord',
    'Earlier',
    'Manifest',
    'Request',
    'Sampled',
    'SourceRecord',
    'TokenizerRecord',
    'find_earlier',
    'find_prepared',
    'prepared_in',
    'read_manifest',
    'sampled_from',
    'versions',
]

FORMAT = 4  # of the manifest and of what it describes; another one is never re-used
MIN_VOCAB_SIZE = 257  # the 256 bytes and EOS
Fraction = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
LIBRARIES = ('datasets', 'datasketch', 'mosaicml-streaming', 'numpy', 'pyarrow', 'regex', 'tokenizers', 'transformers')


class _Record(Section):
    model_config = ConfigDict(extra='forbid')


class Choices(_Record):
    """Options that decide the result as they were given."""

    text_key: str = 'text'
    encoding: str | None = None
    skip_broken: bool = False
    bos_text: str | None = None
    eos_text: Annotated[str, Field(min_length=1)] | None = None
    tokenizer: str | None = None
    parent: str | None = None
    vocab_size: Annotated[int, Field(ge=MIN_VOCAB_SIZE)] | None = None
    tokenizer_documents: Count | None = None
    val_fraction: Fraction = 0.02
    train_subset: Fraction | None = None
    max_train_tokens: Count | None = None
    max_val_tokens: Count | None = None
    compression: str | None = None
    decontaminate: list[str] = []
    contamination_ngram: Annotated[int, Field(ge=2)] | None = None
    keep_contaminated: bool = False


class Request(Choices):
    """Everything that decides the result."""

    format: int
    datasets: list[str]
    files: dict[str, str]
    tokenizer_hash: str | None = None
    earlier: dict[str, str]
    max_seq_len: int
    near_duplicates: dict[str, Any] | None = None
    items_hash: str | None = None  # of the items of benchmarks that are looked for


class TokenizerRecord(_Record):
    """The tokenizer, its files, and the tokens that were put before and behind each document."""

    vocab_size: int
    eos_token: str | None
    eos_token_id: int | None
    document_start: list[str]
    document_end: list[str]
    hash: str
    files: list[str]


class _Given(_Record):
    """``rows`` were read, of which ``skipped`` have no text and ``broken`` cannot be read; the first of these."""

    files: int
    rows: int
    skipped: int
    broken: int
    first_broken: list[str]
    splits: dict[str, Counts]


class SourceRecord(_Given):
    """What one source gave."""

    kind: str
    target: str


class DatasetRecord(_Given):
    """What is in one dataset; ``lm_eval`` counts the rows of each kind of task.

    ``contamination`` is what documents had of each task of a benchmark; they are there if the request keeps them.
    """

    sources: dict[str, SourceRecord]
    parts: int
    lm_eval: dict[str, int]
    contamination: dict[str, Hits] = {}


class Manifest(_Record):
    """The content of ``manifest.json``; ``earlier`` are the sources of data prepared before, by its location."""

    request: Request
    tokenizer: TokenizerRecord
    earlier: dict[str, list[str]]
    datasets: dict[str, DatasetRecord]
    engine: str
    versions: dict[str, str]

    @property
    def digest(self) -> str:
        """A hash of what was asked for and what came of it, whoever made it."""
        content = self.model_dump_json(include={'request', 'tokenizer', 'datasets'}, exclude_defaults=True)
        return hashlib.sha256(content.encode()).hexdigest()[:32]


def versions() -> dict[str, str]:
    """The versions that a result may depend on."""
    return {'python': platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def read_manifest(location: str) -> Manifest | None:
    """The manifest of prepared data in a folder or URI; none if there is none of this format.

    Raises:
        ValueError: If it is no JSON.
        StorageError: If object storage cannot be reached.
    """
    try:
        manifest = parse_section(Manifest, read_json(f'{location.rstrip("/")}/manifest.json'))
    except ConfigError:
        return None
    return manifest if manifest.request.format == FORMAT else None


def prepared_in(places: Iterable[str | None], split: str | None) -> DatasetRecord | None:
    """How a dataset was prepared; None if that is not known, as in object storage.

    Args:
        places: Where it lies; the first that says it counts.
        split: What is read of it.
    """
    for place in places:
        if place is None or is_remote(place):
            continue
        root, _, name = f'{place.rstrip("/")}/{split or ""}'.rstrip('/').rpartition('/')[0].rpartition('/')
        try:
            manifest = read_manifest(root)
        except (OSError, ValueError):
            continue
        if manifest and name in manifest.datasets:
            found = manifest.datasets[name]
            # what was not kept is gone
            return found if manifest.request.keep_contaminated else found.model_copy(update={'contamination': {}})
    return None


@dataclass(frozen=True)
class Sampled:
    """A dataset that models wrote, or a part of it, whose names these are: so many tokens."""

    models: str
    tokens: int
    is_whole: bool

    @property
    def stands_in_for(self) -> str:
        """In place of what it is replayed, in words."""
        return f'what {self.models} was trained on (sampled from it)'


def sampled_from(places: Iterable[str | None], split: str | None) -> Sampled | None:
    """How a dataset was sampled; None if it was not, or that is not known. Arguments as of :func:`prepared_in`."""
    record = prepared_in(places, split)
    sources = [source for source in record.sources.values() if source.kind == 'sampled'] if record else []
    if record is None or not sources:
        return None
    models = dict.fromkeys(source.target.partition('?')[0] for source in sources)
    tokens = sum(counts.tokens for source in sources for counts in source.splits.values())
    return Sampled(', '.join(models), tokens, len(sources) == len(record.sources))


def find_prepared(location: str, request: Request) -> Manifest | None:
    """The manifest of what is in a folder or URI if it answers the same request; none if nothing is there.

    Raises:
        PrepareError: If something else is there.
    """
    advice = 'choose another --out or delete it'
    found = read_json(f'{location.rstrip("/")}/manifest.json')
    is_free = not os.path.exists(location) or (os.path.isdir(location) and not os.listdir(location))
    if found is None and (is_remote(location) or is_free):
        return None
    old = found.get('request') if isinstance(found, dict) else None
    if not isinstance(old, dict):
        raise PrepareError(f'{location} exists and was not made by this script; {advice}')
    new = request.model_dump()
    with suppress(ConfigError):  # what was not asked for yet has its default
        old = parse_section(Request, old).model_dump()
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if differing := [f'{key} was {json.dumps(old.get(key))}, now {json.dumps(new.get(key))}' for key in keys]:
        raise PrepareError(f'{location} was prepared differently ({"; ".join(differing)}); {advice}')
    return parse_section(Manifest, found)


@dataclass(frozen=True)
class Earlier:
    """Data prepared before, in a folder or URI, whose documents count as seen."""

    location: str
    manifest: Manifest

    def fetch(self, name: str, cache: Path) -> Path:
        """A file of it, fetched into a folder if need be.

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
    """Read the manifest of data prepared before, in a folder or URI; ``near`` as in the request.

    Raises:
        PrepareError: If there is none, or it cannot be compared with.
    """
    try:
        manifest = read_manifest(location)
    except StorageError:
        raise
    except ValueError:
        manifest = None
    if manifest is None:
        raise PrepareError(f'--earlier {location}: no manifest.json of this script (format {FORMAT}) found')
    if near and manifest.request.near_duplicates != near:
        raise PrepareError(
            f'--earlier {location}: near-duplicates are looked for with {near}, but it was prepared with '
            f'{manifest.request.near_duplicates}'
        )
    return Earlier(location, manifest)
