# SPDX-License-Identifier: Apache-2.0
"""The rows of a file, one at a time, each a text or what is wrong with it and where."""

import bz2
import codecs
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from email import message_from_string
from pathlib import Path
from typing import Any

import orjson

__all__ = [
    'COMPRESSED',
    'MAX_INSTALLED_BYTES',
    'BrokenRow',
    'PrepareError',
    'Rows',
    'Unit',
    'columns_of',
    'has_byte_lines',
    'no_column',
    'rows_of',
    'text_of',
    'what_is',
    'why',
]

MAX_INSTALLED_BYTES = 1 << 20  # larger source files are generated tables
OPENERS: dict[str, Callable[[str], Any]] = {'.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open}
COMPRESSED = (*OPENERS, '.zst')
BATCH_ROWS = 64  # of parquet held at once: each may be as long as a book
MAGIC = {b'\x1f\x8b': '.gz', b'BZh': '.bz2', b'\xfd7zXZ': '.xz', b'\x28\xb5\x2f\xfd': '.zst', b'PAR1': '.parquet'}

Unit = tuple[str, int, int]
"""A file and the range of it that is read: bytes of jsonl, row groups of parquet, otherwise the whole file (0, 0)."""


class PrepareError(Exception):
    """Something the user can put right; its message is printed as one line."""


class BrokenRow(Exception):
    """A row that cannot be read, among others that can be; raised, with all of a file."""


Rows = Iterator[str | BrokenRow]


def rows_of(kind: str, unit: Unit, text_key: str, encoding: str | None) -> Rows:
    """The rows of a unit of a kind of source in order; blank where there is no text. No encoding is UTF-8."""
    if kind == 'installed':
        return _read_installed(unit[0])
    if kind == 'text':
        return _read_text(unit[0], encoding)
    if kind == 'jsonl':
        return _read_jsonl(unit, text_key, encoding)
    return _read_spool(unit[0]) if kind in ('hf', 'sampled') else _read_parquet(unit, text_key)


def has_byte_lines(encoding: str | None) -> bool:
    """Whether lines end with a byte of their own, as they do not in UTF-16."""
    return '\n'.encode(encoding or 'utf-8') == b'\n'


def no_column(text_key: str, columns: Iterable[str]) -> BrokenRow:
    """There is no such column among these."""
    return BrokenRow(f'no column {text_key!r} (--text-key); it has: {", ".join(columns)}')


def text_of(text_key: str, row: Any) -> str | BrokenRow:
    """The text of a row; empty where it is null."""
    if not isinstance(row, dict):
        return BrokenRow(f'a line holds {type(row).__name__}, not an object with {text_key!r}')
    if text_key not in row:
        return no_column(text_key, row)
    text = row[text_key]
    if not isinstance(text, str | None):
        return BrokenRow(f'column {text_key!r} holds {type(text).__name__}, not text')
    return text or ''


def what_is(file: str | Path) -> str | None:
    """The kind of a file by its content, if its name says another: a verb and the rest."""
    try:
        with open(file, 'rb') as handle:
            head = handle.read(64)
    except OSError:
        return None
    if not head:
        return 'is empty'
    if head.startswith(b'version https://git-lfs'):
        return 'is a Git LFS pointer and not the file itself; fetch that with git lfs pull'
    if head.startswith((b'ARROW1', b'\xff\xff\xff\xff')):
        return 'is an Arrow file, as save_to_disk writes; read its folder with hf:FOLDER'
    kind = next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), None)
    return f'is a {kind} file by its content; name it so' if kind and not str(file).endswith(kind) else None


def why(file: str, error: Exception) -> str:
    """Why a file cannot be read, and the remedy if there is one."""
    if 'requires too much memory' in str(error):
        return (
            'it was compressed with a larger window than is read here (zstd --long=28 to 31); compress it again: '
            f'zstd -dc --long=31 {file} | zstd -o NEW.zst'
        )
    what = what_is(file)
    return f'it {what}' if what else str(error)


def columns_of(kind: str, file: str, encoding: str | None) -> list[str]:
    """The columns of the first row of a file that was read; none where that is not known."""
    if kind == 'parquet':
        import pyarrow.parquet as pq

        return pq.read_schema(file).names
    if kind == 'jsonl' and has_byte_lines(encoding):
        with _open(file) as handle, suppress(ValueError):  # an empty file, another encoding
            row = json.loads(next((line for line in handle if not line.isspace()), b''))
            return list(row) if isinstance(row, dict) else []
    return []


def _open(file: str) -> Any:
    """A file of bytes, decompressed as its name says."""
    if file.endswith('.zst'):
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(file, 'zstd'))  # type: ignore[arg-type]
    return OPENERS.get(Path(file).suffix, lambda name: open(name, 'rb'))(file)


def _read_installed(file: str) -> Rows:
    """A file's text; empty where it is too large or no UTF-8."""
    with open(file, 'rb') as handle:
        data = handle.read(MAX_INSTALLED_BYTES + 1)
    try:
        text = data.decode('utf-8') if len(data) <= MAX_INSTALLED_BYTES else ''
    except UnicodeDecodeError:
        text = ''
    if file.endswith('METADATA'):
        text = str(message_from_string(text).get_payload())  # the body: the package's README
    yield text


def _read_text(file: str, encoding: str | None) -> Rows:
    """A file's text, without the mark of its encoding."""
    with _open(file) as handle:
        data = handle.read()
    try:
        row = data.decode(encoding or 'utf-8').removeprefix('\ufeff')
    except UnicodeDecodeError as error:
        row = BrokenRow(f'{file}: {what_is(file) or _decoding_error(file, 0, data, error)}')
    del data  # the caller works on the text meanwhile
    yield row


def _read_jsonl(unit: Unit, text_key: str, encoding: str | None) -> Rows:
    """The text of each line that begins in the range."""
    file, start, end = unit
    first = None if start else 0  # lines before the range, counted when one is broken
    with _open(file) as handle:
        if not has_byte_lines(encoding):
            handle = io.TextIOWrapper(handle, encoding, newline='\n')
        begin = start
        if start:
            handle.seek(start - 1)
            begin += len(handle.readline()) - 1  # the rest of a line that began before
        at, number = begin, 0
        while (at < end or not end) and (line := handle.readline()):
            number, at = number + 1, at + len(line)
            if line.isspace():
                continue
            row = _parse(file, at - len(line), line, text_key, encoding)
            del line  # may be long, and the caller works on its text meanwhile
            if isinstance(row, BrokenRow):
                if what := what_is(file):  # no line of it is text
                    raise BrokenRow(what)
                first = _lines_before(file, begin) if first is None else first
                row = BrokenRow(f'{file}, line {first + number}: {row}')
            yield row


def _parse(file: str, at: int, line: bytes | str, text_key: str, encoding: str | None) -> str | BrokenRow:
    """The text of a line of JSON, which begins at a byte of the file."""
    given = line
    try:
        if encoding and isinstance(line, bytes):
            line = line.decode(encoding)
        if isinstance(line, str):
            line = line.removeprefix('\ufeff')
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            row = json.loads(line.rstrip())  # reads NaN and half a character, which others write and orjson refuses
        return text_of(text_key, row)
    except UnicodeDecodeError as error:
        assert isinstance(given, bytes)
        return _decoding_error(file, at, given, error)
    except json.JSONDecodeError as error:
        return BrokenRow(f'no JSON from its column {error.colno} on: {error.msg}')
    except RecursionError:
        return BrokenRow('its JSON is nested too deeply to be read')


def _decoding_error(file: str, start: int, data: bytes, error: UnicodeDecodeError) -> BrokenRow:
    """Which byte is not of the encoding, and which one the text seems to have; ``start`` bytes come before ``data``."""
    with closing(_open(file)) as handle:
        head = handle.read(64)
    low = max(0, error.start - 512)
    near = data[low : error.start + 512]
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        advice = 'it looks like UTF-16; give --encoding utf-16'
    elif 5 * near.count(0) > len(near):
        first = near[(start + low) % 2 :: 2].count(0)  # of each two bytes of the file
        advice = f'it looks like UTF-16; give --encoding utf-16-{"be" if 2 * first > near.count(0) else "le"}'
    elif 3 * sum(byte >= 128 for byte in near) > len(near):
        advice = 'give the --encoding of its script, such as cp1251, gb18030 or shift_jis'
    else:
        advice = 'it looks like cp1252; give --encoding cp1252'
    return BrokenRow(
        f'byte {start + error.start}, 0x{data[error.start]:02x}, is not {error.encoding.upper()}: {advice}, '
        'or leave it out with --skip-broken'
    )


def _lines_before(file: str, at: int) -> int:
    """Lines that end before a byte of a file that is not compressed."""
    with open(file, 'rb') as handle:
        sizes = [1 << 20] * (at >> 20) + [at % (1 << 20)]
        return sum(handle.read(size).count(b'\n') for size in sizes)


def _read_parquet(unit: Unit, text_key: str) -> Rows:
    """The text of each row of the row groups."""
    import pyarrow.parquet as pq

    file, start, end = unit
    with pq.ParquetFile(file) as parquet:
        if text_key not in parquet.schema_arrow.names:
            raise no_column(text_key, parquet.schema_arrow.names)
        number = sum(parquet.metadata.row_group(group).num_rows for group in range(start))
        for batch in parquet.iter_batches(BATCH_ROWS, range(start, end), columns=[text_key]):
            for text in batch.column(0).to_pylist():
                number += 1
                row = text_of(text_key, {text_key: text})
                yield BrokenRow(f'{file}, row {number}: {row}') if isinstance(row, BrokenRow) else row


def _read_spool(file: str) -> Rows:
    """The rows that were streamed to a file: each a text, or what is wrong with it."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(BATCH_ROWS):
            for row in batch.to_pylist():
                yield BrokenRow(row['problem']) if row['problem'] else row['text']
