# SPDX-License-Identifier: Apache-2.0
"""Where documents come from: sources, their files, and the parts they are read in.

What is wrong with any of these raises PrepareError.
"""

import bz2
import glob
import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import os
import re
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email import message_from_string
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import orjson

from cpt_algorithms.validation import nearest, with_home

__all__ = ['INSTALLED', 'Part', 'PrepareError', 'Source', 'check_documents', 'find_files', 'parse_sources', 'read']

KINDS = ('installed', 'jsonl', 'parquet', 'text', 'hf')
INSTALLED = ('python', 'stdlib', 'cpp', 'english')
MAX_INSTALLED_BYTES = 1 << 20  # larger source files are generated tables
PRUNED = ('__pycache__', 'site-packages', 'dist-packages')  # folders not walked into
RESERVED = ('tokenizer', 'lm_eval', 'manifest.json', 'work')  # other things in the output folder
LARGEST_PART = 128 << 20  # bytes of text: one or two shards of 64 MiB
SMALLEST_PART = 4 << 20
PARTS = 64  # wanted of a small dataset, for as many processes
BYTES_PER_TOKEN = 8  # surely not more on average: bounds the text that a limit in tokens needs
OPENERS: dict[str, Callable[[str], Any]] = {'.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open}
COMPRESSED = (*OPENERS, '.zst')

Unit = tuple[str, int, int]
"""A file and the range of it that is read: bytes of jsonl, row groups of parquet, otherwise the whole file (0, 0)."""


class PrepareError(Exception):
    """Something the user can put right; its message is printed as one line."""


@dataclass(frozen=True)
class Source:
    """One source as asked for: ``DATASET=KIND:TARGET`` or ``DATASET/SOURCE=KIND:TARGET``."""

    dataset: str
    name: str
    kind: str
    target: str

    @classmethod
    def parse(cls, spec: str) -> 'Source':
        """Read a specification and say what is wrong with it."""
        match = re.fullmatch(r'([^=]*)=([^:]*):(.+)', spec, re.DOTALL)
        if not match:
            raise PrepareError(f'--dataset {spec!r}: expected NAME=KIND:TARGET, such as german=jsonl:german.jsonl')
        names, kind, target = with_home(list(match.groups()))
        dataset, slash, name = names.partition('/')
        for part in (dataset, name) if slash else (dataset,):
            if not re.fullmatch(r'[A-Za-z0-9][\w.-]*', part) or part in RESERVED:
                raise PrepareError(f'--dataset {spec!r}: {names!r} cannot be the name of a dataset folder')
        if kind not in KINDS:
            raise PrepareError(f'--dataset {spec!r}: unknown source kind {kind!r}; {nearest(kind, KINDS)}')
        if kind == 'installed' and target not in INSTALLED and not _package(target):
            raise PrepareError(f'--dataset {spec!r}: unknown text {target!r}; {nearest(target, INSTALLED)}')
        if kind == 'hf':
            hf_arguments(target)
        return cls(dataset, name or dataset, kind, target)

    def __str__(self) -> str:
        own = '' if self.name == self.dataset else f'/{self.name}'
        return f'{self.dataset}{own}={self.kind}:{self.target}'

    @property
    def label(self) -> str:
        """How messages call it."""
        return f'dataset {self.dataset}' if self.name == self.dataset else f'dataset {self.dataset}/{self.name}'


@dataclass(frozen=True)
class Part:
    """A run of consecutive documents of one source, and the unit of all work: parallel, resumable, bounded.

    Its ``number`` counts over the sources of a dataset; its ``size`` is in bytes of text, about.
    """

    source: Source
    number: int
    units: tuple[Unit, ...]
    size: int
    text_key: str


def parse_sources(specs: Sequence[str]) -> list[Source]:
    """Read the specifications of all sources."""
    sources = [Source.parse(spec) for spec in specs]
    labels = [source.label for source in sources]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise PrepareError(f'--dataset: {twice[0]} is given twice')
    return sources


def in_chunks(texts: Iterable[str], num_characters: int) -> Iterator[list[str]]:
    """Group texts, in order, into lists of about ``num_characters`` characters."""
    chunk, size = [], 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= num_characters:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def hash_order(names: Iterable[str]) -> list[str]:
    """Sort file names by the hash of the name: fixed, and the first few come from everywhere."""
    return sorted(names, key=lambda name: (hashlib.blake2b(os.fsencode(name)).digest(), name))


def hf_arguments(target: str) -> dict[str, str]:
    """The ``load_dataset`` arguments of ``PATH?name=CONFIG&split=SPLIT&revision=REVISION``."""
    path, _, query = target.partition('?')
    known = ('name', 'split', 'revision')
    try:
        options = dict(parse_qsl(query, strict_parsing=True)) if query else {}
    except ValueError:
        raise PrepareError(f'hf:{target}: expected options as name=value&name=value after the ?') from None
    for option in options:
        if option not in known:
            raise PrepareError(f'hf:{target}: unknown option {option!r}; {nearest(option, known)}')
    return {'path': path, 'split': 'train', **options}


# Files


def _package(name: str) -> list[str]:
    """The folders of an installed package; none if there is no such package."""
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    return list(found.submodule_search_locations or ()) if found else []


def _installed_roots(text: str) -> tuple[list[str], Callable[[str], bool]]:
    """The folders that hold an installed text, and which of their files belong to it."""
    paths = sysconfig.get_paths()
    site = sorted({paths['purelib'], paths['platlib']})
    if text == 'python':
        return site, lambda name: name.endswith('.py')
    if text == 'stdlib':
        return [paths['stdlib']], lambda name: name.endswith('.py')
    if text == 'english':
        return site, lambda name: name.endswith(('.dist-info/METADATA', '.md', '.rst'))
    if text == 'cpp':
        roots = [os.path.join(folder, 'include') for folder in _package('torch')]
        return roots, lambda name: name.endswith(('.h', '.hpp', '.cuh'))
    return _package(text), lambda name: name.endswith('.py')


def find_files(source: Source) -> list[str]:
    """The files of a source, in the order they are read; none for ``hf``."""
    if source.kind == 'hf':
        return []
    if source.kind == 'installed':
        roots, wanted = _installed_roots(source.target)
        files = []
        for root in roots:
            names = []
            for folder, subfolders, leaves in os.walk(root):
                subfolders[:] = [name for name in subfolders if name not in PRUNED]
                prefix = os.path.relpath(folder, root)
                names += [name for leaf in leaves if wanted(name := os.path.join(prefix, leaf))]
            files += [os.path.join(root, name) for name in hash_order(names)]
    else:
        names = [name for name in glob.glob(source.target, recursive=True) if os.path.isfile(name)]
        files = hash_order(names) if source.kind == 'text' else sorted(names)
    if not files:
        raise PrepareError(f'{source.label}: no file found for {source.kind}:{source.target}')
    return files


# Parts


def part_size(size: int | None, max_tokens: int | None) -> int:
    """Bytes of text in a part: a ``1 / PARTS`` of what will be read, between ``SMALLEST_PART`` and ``LARGEST_PART``.

    A function of the input and the limits alone, so that any engine cuts alike.

    Args:
        size: Bytes of a dataset, if they are known.
        max_tokens: The limits of its splits together, if each that is needed has one.
    """
    needed = [number for number in (size, max_tokens and max_tokens * BYTES_PER_TOKEN) if number is not None]
    return min(max(min(needed, default=LARGEST_PART * PARTS) // PARTS, SMALLEST_PART), LARGEST_PART)


def parts_of(source: Source, files: list[str], text_key: str, size: int, first: int, spool: Path) -> Iterator[Part]:
    """Cut a source into parts of about ``size`` bytes of text, in order; those of ``hf`` as they arrive.

    Args:
        source: The source.
        files: Its files.
        text_key: The column of the text.
        size: Bytes.
        first: The number of the first part.
        spool: Folder for what ``hf`` streams: it is read from there from then on, and resumed behind it.
    """
    units, total, number = [], 0, first
    found = _streamed(source, text_key, size, spool) if source.kind == 'hf' else _units(source, files, text_key, size)
    for unit, weight in found:
        units.append(unit)
        total += weight
        if total >= size:
            yield Part(source, number, tuple(units), total, text_key)
            units, total, number = [], 0, number + 1
    if units:
        yield Part(source, number, tuple(units), total, text_key)


def _units(source: Source, files: list[str], text_key: str, size: int) -> Iterator[tuple[Unit, int]]:
    """The smallest pieces that can be read on their own, with their bytes of text."""
    for file in files:
        total = os.path.getsize(file)
        if source.kind == 'parquet':
            import pyarrow.parquet as pq

            with _reading(source), pq.ParquetFile(file) as parquet:
                schema, metadata = parquet.schema_arrow, parquet.metadata
                if text_key not in schema.names:
                    raise _no_column(source, text_key, schema.names)
                weights = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
            yield from (((file, group, group + 1), weight) for group, weight in enumerate(weights))
        elif source.kind == 'jsonl' and not file.endswith(COMPRESSED):
            yield from (((file, at, min(at + size, total)), min(size, total - at)) for at in range(0, total, size))
        else:
            yield (file, 0, 0), total


def _streamed(source: Source, text_key: str, size: int, spool: Path) -> Iterator[tuple[Unit, int]]:
    """The rows of a Hugging Face dataset as files of about ``size`` bytes, of which those there are not read again.

    Each file holds the state of the stream behind its last row, so that what is there and what is not never disagree.
    """
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema({text_key: pa.large_string()})
    spool.mkdir(parents=True, exist_ok=True)
    with _reading(source):
        arguments: dict[str, Any] = hf_arguments(source.target)
        data: Any = datasets.load_dataset(**arguments, streaming=True)
        number, metadata = 0, {}
        while (file := spool / f'{number:06}.parquet').exists():
            metadata = pq.read_schema(file).metadata
            yield (str(file), 0, pq.read_metadata(file).num_row_groups), size
            number += 1
        if b'last' in metadata:
            return
        if b'state' in metadata:
            data.load_state_dict(json.loads(metadata[b'state']))
        rows: list[str] = []
        rest = size

        def write(last: dict[str, str]) -> tuple[Unit, int]:
            file, partial = spool / f'{number:06}.parquet', spool / '.partial'
            table = pa.table({text_key: rows}, schema=schema).replace_schema_metadata(last)
            pq.write_table(table, partial, compression='zstd')
            partial.replace(file)
            return (str(file), 0, pq.read_metadata(file).num_row_groups), size

        for row in data:
            rows.append(_text_of(source, text_key, row))
            rest -= len(rows[-1])
            if rest <= 0:
                yield write({'state': json.dumps(data.state_dict())})
                rows, rest, number = [], size, number + 1
        yield write({'last': ''})


# Reading


@contextmanager
def _reading(source: Source) -> Iterator[None]:
    """Errors of reading name the source."""
    try:
        yield
    except Exception as error:
        # pyarrow's and datasets' own errors are among these or say where they come from
        library = type(error).__module__.split('.')[0] in ('datasets', 'pyarrow')
        if isinstance(error, OSError | ValueError | EOFError | lzma.LZMAError) or library:
            where = f'{source.kind}:{source.target}'
            raise PrepareError(f'{source.label}: cannot read {where}: {error}') from error
        raise


def _no_column(source: Source, text_key: str, columns: Iterable[str]) -> PrepareError:
    return PrepareError(f'{source.label}: no column {text_key!r} (--text-key); it has: {", ".join(columns)}')


def _text_of(source: Source, text_key: str, row: Any) -> str:
    """The text of a row; empty where it is null."""
    if not isinstance(row, dict):
        raise PrepareError(f'{source.label}: a line holds {type(row).__name__}, not an object with {text_key!r}')
    if text_key not in row:
        raise _no_column(source, text_key, row)
    text = row[text_key]
    if not isinstance(text, str | None):
        raise PrepareError(f'{source.label}: column {text_key!r} holds {type(text).__name__}, not text')
    return text or ''


def read(part: Part) -> Iterator[str]:
    """The documents of a part in order; blank where there is no usable text."""
    readers = {'installed': _read_installed, 'text': _read_text, 'jsonl': _read_jsonl}
    reader = readers.get(part.source.kind, _read_parquet)
    with _reading(part.source):
        for unit in part.units:
            yield from reader(part, unit)


def _read_installed(part: Part, unit: Unit) -> Iterator[str]:
    """A file's text; empty where it is too large or no UTF-8."""
    with open(unit[0], 'rb') as handle:
        data = handle.read(MAX_INSTALLED_BYTES + 1)
    try:
        text = data.decode('utf-8') if len(data) <= MAX_INSTALLED_BYTES else ''
    except UnicodeDecodeError:
        text = ''
    if unit[0].endswith('METADATA'):
        text = str(message_from_string(text).get_payload())  # the body: the package's README
    yield text


def _read_text(part: Part, unit: Unit) -> Iterator[str]:
    """A file's text."""
    yield Path(unit[0]).read_bytes().decode('utf-8')


def _open(file: str) -> Any:
    """A file of bytes, decompressed as its name says."""
    if file.endswith('.zst'):
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(file, 'zstd'))  # type: ignore[arg-type]
    return OPENERS.get(Path(file).suffix, lambda name: open(name, 'rb'))(file)


def _read_jsonl(part: Part, unit: Unit) -> Iterator[str]:
    """The text of each line that begins in the range."""
    file, start, end = unit
    with _open(file) as handle:
        at = start
        if start:
            handle.seek(start - 1)
            at += len(handle.readline()) - 1  # the rest of a line that began before
        while (at < end or not end) and (line := handle.readline()):
            at += len(line)
            if line.strip():
                try:
                    row = orjson.loads(line)
                except orjson.JSONDecodeError:
                    row = json.loads(line)  # reads NaN and half a character, which others write and orjson refuses
                yield _text_of(part.source, part.text_key, row)


def _read_parquet(part: Part, unit: Unit) -> Iterator[str]:
    """The text of each row of the row groups."""
    import pyarrow.parquet as pq

    file, start, end = unit
    with pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(1024, range(start, end), columns=[part.text_key]):
            for text in batch.column(0).to_pylist():
                yield _text_of(part.source, part.text_key, {part.text_key: text})


def check_documents(source: Source, files: list[str], text_key: str) -> None:
    """Read the first document of a source, so that a wrong column is found before any work."""
    with tempfile.TemporaryDirectory() as folder:
        # a stream is read only as far as its first row
        for part in parts_of(source, files, text_key, 1 if source.kind == 'hf' else 1 << 26, 0, Path(folder)):
            if next(read(part), None) is not None:
                return
    raise PrepareError(f'{source.label}: {source.kind}:{source.target} has no rows')
