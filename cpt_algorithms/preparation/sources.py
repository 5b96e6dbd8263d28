# SPDX-License-Identifier: Apache-2.0
"""Where documents come from: sources, their files, and the parts they are read in.

What is wrong with any of these raises PrepareError.
"""

import glob
import hashlib
import importlib.util
import json
import lzma
import os
import re
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from cpt_algorithms.preparation.reading import (
    COMPRESSED,
    BrokenRow,
    PrepareError,
    Unit,
    has_byte_lines,
    no_column,
    rows_of,
    text_of,
    why,
)
from cpt_algorithms.preparation.sampling import Sampling
from cpt_algorithms.validation import nearest, with_home

__all__ = [
    'INSTALLED',
    'Broken',
    'Part',
    'Source',
    'check_documents',
    'find_files',
    'parse_sources',
    'read',
]

KINDS = ('installed', 'jsonl', 'parquet', 'text', 'hf', 'sampled')
MADE = ('hf', 'sampled')  # whose files come into being as they are read
INSTALLED = ('python', 'stdlib', 'cpp', 'english')
PRUNED = ('__pycache__', 'site-packages', 'dist-packages')  # folders not walked into
RESERVED = ('tokenizer', 'lm_eval', 'manifest.json', 'work')  # other things in the output folder
LARGEST_PART = 128 << 20  # bytes of text: one or two shards of 64 MiB
SMALLEST_PART = 4 << 20
PARTS = 64  # wanted of a small dataset, for as many processes
BYTES_PER_TOKEN = 8  # surely not more on average: bounds the text that a limit in tokens needs
MOST_LISTED = 100  # of what cannot be read, by part and by source


Made = Callable[[Sampling, Path], Iterator[tuple[Unit, int]]]
"""What makes the files of a model's text in a folder: each a unit and its size."""


@dataclass(frozen=True)
class Source:
    """One source as asked for: ``DATASET=KIND:TARGET`` or ``DATASET/SOURCE=KIND:TARGET``.

    Its text is of this ``encoding``, UTF-8 if none is given; with ``skip_broken``, what cannot be read is left out.
    """

    dataset: str
    name: str
    kind: str
    target: str
    encoding: str | None = None
    skip_broken: bool = False

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
            other = f', and hf:{kind}?data_files=FILES reads what datasets can, such as csv and arrow'
            raise PrepareError(f'--dataset {spec!r}: unknown source kind {kind!r}; {nearest(kind, KINDS)}{other}')
        if kind == 'installed' and target not in INSTALLED and not _package(target):
            raise PrepareError(f'--dataset {spec!r}: unknown text {target!r}; {nearest(target, INSTALLED)}')
        if kind == 'hf':
            hf_arguments(target)
        if kind == 'sampled':
            target = str(Sampling.parse(target))
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

    Its ``size`` is in bytes of text, about.
    """

    source: Source
    units: tuple[Unit, ...]
    size: int
    text_key: str


@dataclass
class Broken:
    """Rows or files that were left out because they cannot be read: their number, and the first of them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, row: object) -> None:
        """One more."""
        self.count += 1
        self.first = [*self.first, str(row)][:MOST_LISTED]


def parse_sources(specs: Sequence[str], encoding: str | None = None, skip_broken: bool = False) -> list[Source]:
    """Read the specifications of all sources."""
    if encoding is not None:
        try:
            ''.encode(encoding)
        except LookupError:
            advice = 'utf-16, cp1252, latin-1, cp1251, gb18030, shift_jis, ...'
            raise PrepareError(
                f'--encoding {encoding}: Python knows no such encoding of text; it has {advice}'
            ) from None
    sources = [replace(Source.parse(spec), encoding=encoding, skip_broken=skip_broken) for spec in specs]
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


def hash_order(root: str, names: Iterable[str]) -> list[str]:
    """Sort files by the hash of their path below a folder: fixed wherever that is; the first come from everywhere."""
    return sorted(names, key=lambda name: hashlib.blake2b(os.fsencode(os.path.relpath(name, root))).digest())


def hf_arguments(target: str) -> dict[str, str]:
    """The ``load_dataset`` arguments of ``PATH?name=CONFIG&split=SPLIT&revision=REVISION``."""
    path, _, query = target.partition('?')
    known = ('name', 'split', 'revision', 'data_files')
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
    """The files of a source, in the order they are read; none for those that are ``MADE``."""
    if source.kind in MADE:
        return []
    if source.kind == 'installed':
        roots, wanted = _installed_roots(source.target)
        files = []
        for root in roots:
            names = []
            for folder, subfolders, leaves in os.walk(root):
                subfolders[:] = [name for name in subfolders if name not in PRUNED]
                names += [name for leaf in leaves if wanted(name := os.path.join(folder, leaf))]
            files += hash_order(root, names)
    else:
        names = [name for name in glob.glob(source.target, recursive=True) if os.path.isfile(name)]
        root = os.path.dirname(re.split(r'[*?[]', source.target)[0])
        files = hash_order(root or '.', names) if source.kind == 'text' else sorted(names)
    if not files:
        raise PrepareError(f'{source.label}: no file found for {source.kind}:{source.target}')
    return files


# Parts


def part_size(size: int | None, max_tokens: int | None) -> int:
    """Bytes of text in a part: a ``1 / PARTS`` of what will be read, between ``SMALLEST_PART`` and ``LARGEST_PART``.

    A function of the input and the limits alone, so that any engine cuts alike: the bytes of a dataset, if they are
    known, and the limits of its splits together, if train has one.
    """
    needed = [number for number in (size, max_tokens and max_tokens * BYTES_PER_TOKEN) if number is not None]
    return min(max(min(needed, default=LARGEST_PART * PARTS) // PARTS, SMALLEST_PART), LARGEST_PART)


def parts_of(
    source: Source, files: list[str], text_key: str, size: int, spool: Path, sampled: Made | None = None
) -> Iterator[Part]:
    """Cut a source into parts of about ``size`` bytes of text, in order.

    Those of ``hf`` come as they arrive: what it streams is read from the folder ``spool`` from then on, and resumed
    behind it. So do those of a model, by ``sampled``.
    """
    units, total = [], 0
    if source.kind == 'sampled':
        assert sampled is not None
        found = sampled(Sampling.parse(source.target), spool)
    elif source.kind == 'hf':
        found = _streamed(source, text_key, size, spool)
    else:
        found = _units(source, files, text_key, size)
    for unit, weight in found:
        units.append(unit)
        total += weight
        if total >= size:
            yield Part(source, tuple(units), total, text_key)
            units, total = [], 0
    if units:
        yield Part(source, tuple(units), total, text_key)


def _units(source: Source, files: list[str], text_key: str, size: int) -> Iterator[tuple[Unit, int]]:
    """The smallest pieces that can be read on their own, with their bytes of text."""
    for file in files:
        total = os.path.getsize(file)
        if source.kind == 'parquet':
            import pyarrow.parquet as pq

            try:
                with _reading(source, file), pq.ParquetFile(file) as parquet:
                    schema, metadata = parquet.schema_arrow, parquet.metadata
                    if text_key not in schema.names:
                        raise no_column(text_key, schema.names)
                    weights = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
            except PrepareError:
                if not source.skip_broken:
                    raise
                yield (file, 0, 0), total  # who reads it says so
                continue
            yield from (((file, group, group + 1), weight) for group, weight in enumerate(weights))
        elif source.kind == 'jsonl' and not file.endswith(COMPRESSED) and has_byte_lines(source.encoding):
            yield from (((file, at, min(at + size, total)), min(size, total - at)) for at in range(0, total, size))
        else:
            yield (file, 0, 0), total


def _dataset(source: Source) -> Any:
    """The rows of an ``hf`` source: of the hub, a folder of data files, or one of ``save_to_disk``."""
    import datasets

    arguments: dict[str, Any] = hf_arguments(source.target)
    folder = Path(arguments['path'])
    if not any((folder / name).is_file() for name in ('state.json', 'dataset_dict.json')):
        return datasets.load_dataset(**arguments, streaming=True)
    saved: Any = datasets.load_from_disk(str(folder))
    if isinstance(saved, dict):
        if arguments['split'] not in saved:
            raise ValueError(f'no split {arguments["split"]!r}; {nearest(arguments["split"], saved)}')
        saved = saved[arguments['split']]
    return saved.to_iterable_dataset()


def _streamed(source: Source, text_key: str, size: int, spool: Path) -> Iterator[tuple[Unit, int]]:
    """The rows of a Hugging Face dataset as files of about ``size`` bytes, of which those there are not read again.

    Each file holds the state of the stream behind its last row, so that a file and its state never disagree.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema({'text': pa.large_string(), 'problem': pa.string()})
    spool.mkdir(parents=True, exist_ok=True)
    with _reading(source):
        data: Any = _dataset(source)
        number, before, metadata = 0, 0, {}
        while (file := spool / f'{number:06}.parquet').exists():
            described = pq.read_metadata(file)
            metadata = described.metadata
            yield (str(file), 0, described.num_row_groups), size
            number, before = number + 1, before + described.num_rows
        if b'last' in metadata:
            return
        if b'state' in metadata:
            data.load_state_dict(json.loads(metadata[b'state']))
        texts: list[str | None] = []
        problems: list[str | None] = []
        rest = size

        def write(last: dict[str, str]) -> tuple[Unit, int]:
            file, partial = spool / f'{number:06}.parquet', spool / '.partial'
            table = pa.table({'text': texts, 'problem': problems}, schema=schema).replace_schema_metadata(last)
            pq.write_table(table, partial, compression='zstd')
            partial.replace(file)
            return (str(file), 0, pq.read_metadata(file).num_row_groups), size

        for place, row in enumerate(data, before + 1):
            text, problem = text_of(text_key, row), None
            if isinstance(text, BrokenRow):
                text, problem = None, f'row {place}: {text}'
                if not source.skip_broken or text_key not in row:
                    raise BrokenRow(problem)
            texts.append(text)
            problems.append(problem)
            rest -= len(text or problem or '')
            if rest <= 0:
                yield write({'state': json.dumps(data.state_dict())})
                texts, problems, rest, number = [], [], size, number + 1
        yield write({'last': ''})


# Reading


@contextmanager
def _reading(source: Source, file: str = '') -> Iterator[None]:
    """Errors of reading name the source, and the file unless they do."""
    try:
        yield
    except Exception as error:
        # pyarrow's and datasets' own errors are among these or say where they come from
        library = type(error).__module__.split('.')[0] in ('datasets', 'pyarrow')
        if isinstance(error, OSError | ValueError | EOFError | lzma.LZMAError | BrokenRow) or library:
            reason = why(file, error) if file else str(error)
            place = f'{file}: ' if file and not reason.startswith(file) else ''
            raise PrepareError(f'{source.label}: cannot read {source.kind}:{source.target}: {place}{reason}') from error
        raise


def read(part: Part, broken: Broken | None = None) -> Iterator[str]:
    """The documents of a part in order, blank where there is no text; ``broken`` counts what the source leaves out."""
    source, broken = part.source, broken or Broken()
    for unit in part.units:
        try:
            with _reading(source, '' if source.kind in MADE else unit[0]):
                for row in rows_of(source.kind, unit, part.text_key, source.encoding):
                    if isinstance(row, str):
                        yield row
                    elif source.skip_broken:
                        broken.add(row)
                    else:
                        raise row
        except PrepareError as error:
            if not source.skip_broken:
                raise
            broken.add(error)


def check_documents(source: Source, files: list[str], text_key: str) -> None:
    """Read the first document of a source, so that a wrong column is found before any work; of a model, its folder."""
    if source.kind == 'sampled':
        _ = Sampling.parse(source.target).folder
        return
    with tempfile.TemporaryDirectory() as folder:
        # a stream is read only as far as its first row
        for part in parts_of(source, files, text_key, 1 if source.kind == 'hf' else 1 << 26, Path(folder)):
            if next(read(part), None) is not None:
                return
    raise PrepareError(f'{source.label}: {source.kind}:{source.target} has no rows')
