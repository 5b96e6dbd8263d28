# SPDX-License-Identifier: Apache-2.0
"""The shards of a dataset at 40 bytes each, and nothing per sample.

Streaming has 2 kB and 90 us per shard and 8 bytes per sample, in every process: 1.2 GB and 5 s at 146 M samples.
"""

import codecs
import copy
import hashlib
import io
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from streaming.base.format import reader_from_json
from streaming.base.format.base.reader import Reader

from cpt_algorithms.files import write_atomic
from cpt_algorithms.replay.mix import row_length
from cpt_algorithms.validation import short_repr

__all__ = ['ShardIndex', 'ShardOfSample', 'Shards']

Ints = NDArray[np.int64]

WINDOW = 1 << 20  # bytes of index.json looked at together
# An index.json over this size (about 50,000 shards, 0.4 s to read) gets its table written beside it.
LARGE = 16 << 20
# What shards have in common, for checks that need not look at each.
KIND = ('format', 'version', 'column_names', 'column_encodings', 'column_sizes', 'compression', 'hashes', 'size_limit')
FILES = ('raw_data', 'raw_meta', 'zip_data', 'zip_meta')
_MALFORMED = (ValueError, KeyError, IndexError, AttributeError, TypeError)


def _scan(file: BinaryIO) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(start, length, content) of each shard's JSON object in an index.json, a window at a time."""
    # structure is ASCII, and one character per byte keeps offsets right in any UTF-8 text
    text, base = '', 0
    utf8 = codecs.getincrementaldecoder('utf-8')()

    def read(size: int = -1) -> str:
        more = file.read(size)
        utf8.decode(more, final=size < 0 or len(more) < size)  # or a shard could not be read later
        return more.decode('latin-1')

    while not (begin := re.search(r'"shards"\s*:\s*\[', text)):
        more = read(WINDOW)
        if not more:
            raise ValueError('it has no list of shards')
        text += more
    head, position = text[: begin.start()], begin.end()
    decode = json.JSONDecoder().raw_decode
    skip = re.compile(r'[\s,]*')
    while True:
        gap = skip.match(text, position)
        assert gap is not None
        position = gap.end()
        if text[position : position + 1] == ']':
            break
        try:
            content, end = decode(text, position)
        except ValueError:
            more = read(max(WINDOW, len(text) - position))
            if not more:
                raise ValueError('it is cut off') from None
            base += position
            text, position = text[position:] + more, 0
            continue
        yield base + position, end - position, content
        position = end
    tail = text[position + 1 :] + read()
    version = json.loads(f'{head}"shards": []{tail}').get('version')
    if version != 2:
        raise ValueError(f'its version is {version}, and Streaming reads 2')


def _files_of(info: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Descriptions of a shard's files. A name that leads out of the dataset's folder is refused: we write there."""
    files = [info[key] for key in FILES if info.get(key) is not None]
    for file in files:
        name = file['basename']
        if not isinstance(name, str) or not name or name[0] == '/' or '\0' in name or '..' in name.split('/'):
            raise ValueError(f'basename={short_repr(name)} does not name a file in the folder of the index')
    if any(type(count) is not int or count < 0 for count in (info['samples'], *(file['bytes'] for file in files))):
        raise ValueError(f'samples and bytes of {short_repr(info)} must be whole numbers of at least 0')
    return files


def _as_utf8(text: str) -> str:
    """Text that was read with one character per byte."""
    try:
        return text.encode('latin-1').decode()
    except UnicodeError:  # it was written with escapes
        return text


def _key(basename: str) -> int:
    """64 bits of a file name."""
    return int.from_bytes(hashlib.blake2b(basename.encode(), digest_size=8).digest(), 'little', signed=True)


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """An ``index.json`` as columns, 40 bytes per shard.

    Args:
        path: The ``index.json``.
        table: ``(5, shards)``: samples, bytes on disk at most (raw and compressed), where the shard's JSON object
            starts in the file, its length, and a hash of the raw file's name.
        kinds: Each distinct set of format, columns, compression and hash algorithms.
        digest: Hash of all shards' sizes and hashes: what the data is, wherever it lies.
    """

    path: Path
    table: Ints
    kinds: list[dict[str, Any]]
    digest: str

    @property
    def row_lengths(self) -> set[int | None]:
        """Tokens per row of the dataset's packed shards; None among them for text, or if the index does not say it."""
        columns = ((kind['column_names'] or (), kind['column_encodings'] or ()) for kind in self.kinds)
        encodings: list[dict[str, str]] = [dict(zip(*each, strict=True)) for each in columns]
        return {row_length(each.get('tokens', '')) for each in encodings}

    @classmethod
    def read(cls, path: Path) -> 'ShardIndex':
        """Read an ``index.json``.

        Cost: 8 us and 40 bytes per shard. A large one (over 16 MB) is read once: its table is written beside it
        (``.index.npy``), and mapped into memory from then on.

        Raises:
            ValueError: If it is no index of a Streaming dataset, naming the file.
        """
        stat = path.stat()
        note, table = path.with_name('.index.note.json'), path.with_name('.index.npy')
        made_from = [stat.st_size, stat.st_mtime_ns]
        if stat.st_size > LARGE and note.exists() and table.exists():
            known = json.loads(note.read_text(encoding='utf-8'))
            if [known.pop('made_from'), known.pop('table_bytes')] == [made_from, table.stat().st_size]:
                return cls(path, np.load(table, mmap_mode='r'), **known)
        columns = [array('q') for _ in range(5)]
        kinds: dict[str, dict[str, Any]] = {}
        hasher = hashlib.blake2b(digest_size=8)
        try:
            with path.open('rb') as file:
                for start, length, info in _scan(file):
                    files = _files_of(info)
                    raw = [info[key] for key in ('raw_data', 'raw_meta') if info.get(key)]
                    size, name = sum(f['bytes'] for f in files), _key(_as_utf8(raw[0]['basename']))
                    row = (info['samples'], size, start, length, name)
                    for column, value in zip(columns, row, strict=True):
                        column.append(value)
                    content = [(each['bytes'], sorted(each['hashes'].items())) for each in raw]
                    hasher.update(repr((info['samples'], content)).encode())
                    kind = {key: info.get(key) for key in KIND}
                    known_as = repr((kind, [(key, info[key] is None) for key in info]))
                    if known_as not in kinds:
                        reader_from_json('', '', copy.deepcopy(info))  # or Streaming has no reader for it
                        kinds[known_as] = kind
        except (*_MALFORMED, ArithmeticError, AssertionError, RecursionError) as error:
            what = f'{type(error).__name__} {error}' if isinstance(error, KeyError) else error
            raise ValueError(f'{path} is not the index of a Streaming dataset: {what}') from None
        values = np.array([np.frombuffer(column, np.int64) for column in columns]).reshape(5, -1)
        index = cls(path, values, list(kinds.values()), hasher.hexdigest())
        if stat.st_size > LARGE:
            with suppress(OSError):  # of a disk that is full or read-only: it will be read again
                buffer = io.BytesIO()
                np.save(buffer, values)
                write_atomic(table, buffer.getvalue())
                known = {'made_from': made_from, 'table_bytes': table.stat().st_size}
                known |= {'kinds': index.kinds, 'digest': index.digest}
                write_atomic(note, json.dumps(known).encode())
        return index

    def __len__(self) -> int:
        """Number of shards."""
        return self.table.shape[1]

    @property
    def samples(self) -> Ints:
        """Samples of each shard."""
        return self.table[0]

    @property
    def bytes(self) -> Ints:
        """Bytes of each shard on disk at most, raw and compressed."""
        return self.table[1]

    def reader(self, number: int, local: str, split: str) -> Reader:
        """Streaming's reader of one shard."""
        start, length = (int(value) for value in self.table[2:4, number])
        with self.path.open('rb') as file:
            file.seek(start)
            return reader_from_json(local, split, json.loads(file.read(length)))

    def cached(self, files: Iterable[str], folder: str) -> list[int]:
        """Numbers of the shards that have one of the files in this folder."""
        names = [os.path.relpath(file, folder) for file in files]
        wanted = {_key(name) for full in names for name in (full, os.path.splitext(full)[0])}  # raw, and compressed
        keys = self.table[4]
        order = np.argsort(keys)
        places = np.searchsorted(keys, list(wanted), sorter=order)
        numbers = order[places[places < len(order)]]
        return sorted({int(number) for number in numbers if int(keys[number]) in wanted})


class Shards(Sequence[Reader]):
    """The shards of several streams, at ``(local, split)`` each, made into a Reader when it is asked for."""

    def __init__(self, indexes: Sequence[ShardIndex], places: Sequence[tuple[str, str]]) -> None:
        self._indexes = indexes
        self._places = places
        self._ends = np.cumsum([len(index) for index in indexes])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        stream = int(np.searchsorted(self._ends, number, side='right'))
        first = int(self._ends[stream]) - len(self._indexes[stream])
        return _reader(self._indexes[stream], int(number) - first, *self._places[stream])


@lru_cache(maxsize=4096)  # of this process, and not of an object that may be pickled
def _reader(index: ShardIndex, number: int, local: str, split: str) -> Reader:
    return index.reader(number, local, split)


class ShardOfSample:
    """Which shard a sample lies in, and where, from the ends of all: Streaming's ``Spanner`` without a large table."""

    def __init__(self, ends: Ints) -> None:
        self._ends = ends

    def __getitem__(self, sample: int) -> tuple[int, int]:
        """(shard, place in the shard)."""
        shard = int(self._ends.searchsorted(sample, side='right')) if sample >= 0 else len(self._ends)
        if shard == len(self._ends):
            raise IndexError(f'sample {sample} of {int(self._ends[-1])}')
        return shard, int(sample - (self._ends[shard - 1] if shard else 0))
