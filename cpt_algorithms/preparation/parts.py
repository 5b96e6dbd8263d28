# SPDX-License-Identifier: Apache-2.0
"""The two steps of a part, each a pure function of files: text to tokens, and tokens to shards."""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpt_algorithms.preparation.lm_eval_items import DOCUMENT_CHARACTERS, DOCUMENTS
from cpt_algorithms.preparation.packing import cut, pieces
from cpt_algorithms.preparation.sources import Broken, Part, in_chunks, read

__all__ = ['PackJob', 'TokenizeJob', 'Tokenized', 'columns', 'leftover', 'pack', 'tokenize']

CHUNK = 1 << 18  # text tokenised at once: tokenizers takes a hundred times its size meanwhile
SMALLEST_WINDOW = 1 << 11  # characters
AGREEING = 4  # words, at least, by which two windows are found to go on alike
_WORD_BEGINS = re.compile(r'\W\w')
MAX_SEEN = 1 << 20  # documents remembered, not to tokenise them twice: 100 MB; what is dropped is decided elsewhere
FORMAT = 4  # of the files of a tokenised part


@dataclass(frozen=True)
class TokenizeJob:
    """One part to tokenise, with a file of ``tokenizers``, into a folder below ``parts``.

    ``ends`` are the tokens put before and behind each document; ``near`` the keywords of ``NearDuplicates``; ``items``
    the file of the :class:`~cpt_algorithms.preparation.contamination.BenchmarkItems` that are looked for, named by
    their hash.
    """

    part: Part
    tokenizer: str
    tokenizer_hash: str
    ends: tuple[list[int], list[int]]
    val_fraction: float
    near: dict[str, Any] | None
    items: str | None
    parts: str

    @property
    def folder(self) -> Path:
        """Where the result goes: its name says all that it depends on, so that it is there or not, and never stale."""
        stats = [(file, start, end, os.stat(file)) for file, start, end in self.part.units]
        units = [(file, start, end, stat.st_size, stat.st_mtime_ns) for file, start, end, stat in stats]
        source = asdict(self.part.source)
        items = self.items and Path(self.items).name
        settings = [self.tokenizer_hash, self.ends, self.val_fraction, self.near, items]
        content = [FORMAT, source, units, self.part.text_key, *settings]
        return Path(self.parts, hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest())


@dataclass(frozen=True)
class Tokenized:
    """A tokenised part: a folder of arrays with one row per document that is not blank; ``skipped`` are.

    ``broken`` rows could not be read; the first of them are listed.

    ``tokens`` of all documents, each with its ends; ``lengths`` in tokens (0 for a text that came before in the part);
    ``bytes`` of its text; ``digests``; ``held_out``, true for validation; ``signatures`` if near-duplicates are
    looked for; and in ``hits`` rows of a document, a task and an item, if these are. Beside them the first texts held
    out, for ``lm_eval/``.
    """

    folder: str
    documents: int
    skipped: int
    broken: int
    first_broken: list[str]

    def file(self, name: str) -> Path:
        """The file of an array."""
        return Path(self.folder, f'{name}.npy')

    def load(self, name: str) -> NDArray[Any]:
        """An array, read when it is looked at."""
        return np.load(self.file(name), mmap_mode='r')

    def held_out_texts(self) -> list[tuple[int, str]]:
        """The first documents held out, cut to what ``lm_eval/`` takes of each, with their rows."""
        return json.loads(Path(self.folder, 'held_out.json').read_text())

    @property
    def tokens(self) -> NDArray[np.int32]:
        """The tokens of all documents, read when they are looked at."""
        file = Path(self.folder, 'tokens')
        return np.memmap(file, np.int32, 'r') if file.stat().st_size else np.zeros(0, np.int32)


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """An empty folder that becomes ``folder`` if nothing goes wrong.

    Another process may do the same, such as one whose parent was killed: the results are equal, and one of them stays.
    """
    partial = folder.with_name(f'.{folder.name}.{secrets.token_hex(4)}')
    partial.mkdir(parents=True)
    try:
        yield partial
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@lru_cache(1)
def _load(tokenizer: str, content: str) -> Any:
    """The tokenizer; a document that spells a special token does not get the token."""
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(tokenizer)
    loaded.no_truncation()
    loaded.no_padding()
    loaded.encode_special_tokens = True
    return loaded


def encode(tokenizer: Any, texts: list[str]) -> Iterator[Iterable[NDArray[np.int32]]]:
    """The tokens of each text, in pieces; one longer than ``CHUNK`` is done by :func:`encode_long`."""
    short = [text for text in texts if len(text) <= CHUNK]
    encodings = iter(tokenizer.encode_batch_fast(short, add_special_tokens=False))
    for text in texts:
        if len(text) <= CHUNK:
            yield [np.array(next(encodings).ids, np.int32)]
        else:
            yield encode_long(tokenizer, text, max(CHUNK, SMALLEST_WINDOW))


def encode_long(tokenizer: Any, text: str, size: int) -> Iterator[NDArray[np.int32]]:
    """The tokens of a long text, the same as all at once, in windows of ``size`` characters, at least 2,048.

    Windows overlap by a sixteenth, and are joined where the middle half of that has the same tokens at the same places
    in both, and either several words or, for BPE, part of one word. (BPE can be cut inside a word where both windows
    begin the same token: a merge across that place needs the tokens on both sides of it, which BPE builds from their
    own characters alone, so it would have been made in the first window, too.) Where no such place is, as in a word of
    another model than BPE, the first window grows to twice its size, in the end to the whole rest.

    Cost: memory of some 150 bytes for each character of a window, and twice the time.
    """
    overlap = size // 16
    bpe = type(tokenizer.model).__name__ == 'BPE'
    start, width, given = 0, size, 0  # of the window; tokens of it that the one before gave
    encoding = tokenizer.encode(text[:size], add_special_tokens=False)
    while start + width < len(text):
        following = start + width - overlap
        after = tokenizer.encode(text[following : following + size], add_special_tokens=False)
        low, high = following + overlap // 4, following + 3 * overlap // 4
        here, end, one_here = _between(encoding, low - start, high - start)
        there, begin, one_there = _between(after, low - following, high - following)
        safe = (bpe and one_here and one_there) or len(_WORD_BEGINS.findall(text, low, high)) >= AGREEING
        if safe and [(token, at + start) for token, at in here] == [(token, at + following) for token, at in there]:
            yield np.array(encoding.ids[given:end], np.int32)
            start, width, given, encoding = following, size, begin, after
        else:
            width *= 2
            encoding = tokenizer.encode(text[start : start + width], add_special_tokens=False)
    yield np.array(encoding.ids[given:], np.int32)


def _between(encoding: Any, low: int, high: int) -> tuple[list[tuple[int, int]], int, bool]:
    """The tokens that begin within these characters, with their places; the number of the first; if in one word."""
    first, last = _first_from(encoding, low), _first_from(encoding, high)
    starts = [encoding.token_to_chars(token)[0] for token in range(first, last)]  # offsets of all take as long as ids
    words = {encoding.token_to_word(token) for token in range(first - 1, last)} if 0 < first < last else ()
    return list(zip(encoding.ids[first:last], starts, strict=True)), first, len(words) == 1


def _first_from(encoding: Any, place: int) -> int:
    """The first token that begins at a character or behind it."""
    token, at = None, place
    while token is None and at < place + SMALLEST_WINDOW:  # spaces may be in no token
        token, at = encoding.char_to_token(at), at + 1
    if token is None:
        return len(encoding.ids)
    while token > 0 and encoding.token_to_chars(token - 1)[0] >= place:
        token -= 1
    while token < len(encoding.ids) and encoding.token_to_chars(token)[0] < place:
        token += 1
    return token


def tokenize(job: TokenizeJob) -> Tokenized:
    """Tokenise a part, or find it done.

    Cost: that of ``tokenizers``; memory does not depend on the size of the part but for its ``digests``, ``lengths``
    and ``signatures``, and, of one long document, three times its bytes (in the worst case, one character in four bytes
    of Python's, nine times).
    """
    from cpt_algorithms.preparation.contamination import BenchmarkItems
    from cpt_algorithms.preparation.duplicates import NearDuplicates, digests, is_held_out, signatures

    folder = job.folder
    if (folder / 'part.json').exists():
        return Tokenized(str(folder), **json.loads((folder / 'part.json').read_text()))
    tokenizer = _load(job.tokenizer, job.tokenizer_hash)
    near = NearDuplicates(**job.near) if job.near is not None else None
    items = BenchmarkItems.load(job.items) if job.items else None
    seen: set[bytes] = set()
    documents, skipped, broken = 0, 0, Broken()
    start, end = (np.array(ids, np.int32) for ids in job.ends)
    held_out_texts: list[tuple[int, str]] = []
    arrays: dict[str, list[NDArray[Any]]] = {
        'digests': [np.zeros((0, 2), np.uint64)],
        'lengths': [np.zeros(0, np.uint32)],
        'bytes': [np.zeros(0, np.uint32)],
        'held_out': [np.zeros(0, np.bool_)],
    }
    if items:
        arrays['hits'] = [np.zeros((0, 3), np.int64)]
    if near:
        arrays['signatures'] = [np.zeros((0, near.bands[0]), np.uint64)]
    with _appearing(folder) as partial, open(partial / 'tokens', 'wb') as file:
        for chunk in in_chunks(read(job.part, broken), CHUNK):
            texts, sizes = [], []
            for text in chunk:
                try:
                    size = sum(len(text[at : at + CHUNK].encode()) for at in range(0, len(text), CHUNK))
                except UnicodeEncodeError:  # half a character, which JSON can spell
                    continue
                if text and not text.isspace():
                    texts.append(text)
                    sizes.append(size)
            skipped += len(chunk) - len(texts)
            identities = digests(texts)
            fresh = []
            for number, row in enumerate(identities):
                if (identity := row.tobytes()) not in seen:
                    seen.add(identity)
                    fresh.append(number)
            if len(seen) > MAX_SEEN:
                seen.clear()
            held_out = is_held_out(identities, job.val_fraction)
            kept = [number for number in fresh if held_out[number]][: DOCUMENTS - len(held_out_texts)]
            held_out_texts += [(documents + number, texts[number][:DOCUMENT_CHARACTERS]) for number in kept]
            if items:
                arrays['hits'].append(items.find(texts) + np.array([documents, 0, 0]))
            documents += len(texts)
            lengths = np.zeros(len(texts), np.uint32)
            for number, windows in zip(fresh, encode(tokenizer, [texts[number] for number in fresh]), strict=True):
                for tokens in chain([start], windows, [end]):
                    file.write(tokens.tobytes())
                    lengths[number] += len(tokens)
            arrays['digests'].append(identities)
            arrays['lengths'].append(lengths)
            arrays['bytes'].append(np.array(sizes, np.uint32))
            arrays['held_out'].append(held_out)
            if near:
                arrays['signatures'].append(signatures(texts, near))
        for name, rows in arrays.items():
            np.save(partial / f'{name}.npy', np.concatenate(rows))
        (partial / 'held_out.json').write_text(json.dumps(held_out_texts))
        counts = {'documents': documents, 'skipped': skipped, 'broken': broken.count, 'first_broken': broken.first}
        (partial / 'part.json').write_text(json.dumps(counts))
    return Tokenized(str(folder), **counts)


@dataclass(frozen=True)
class PackJob:
    """The share of one part in one split, to be written as shards into a folder.

    ``<split>.npy`` of the part says which documents; of the last of them ``trim`` tokens are left out. ``writer`` are
    keywords of ``MDSWriter``.
    """

    tokenized: Tokenized
    split: str
    trim: int
    samples: int
    max_seq_len: int
    writer: dict[str, Any]
    folder: str


def columns(max_seq_len: int) -> dict[str, str]:
    """The columns of the shards."""
    return {'tokens': f'ndarray:int32:{max_seq_len}'}


def leftover(job: PackJob) -> NDArray[np.int32]:
    """The tokens of a part and split that are too few for a sample."""
    lengths, wanted = job.tokenized.load('lengths'), np.array(job.tokenized.load(job.split))
    numbers = np.flatnonzero(wanted)
    behind = np.cumsum(lengths[numbers][::-1], dtype=np.int64)[::-1] - job.trim  # tokens from each document on
    size = int(behind[0]) - job.samples * job.max_seq_len if len(numbers) else 0
    if not size:
        return np.zeros(0, np.int32)
    wanted[: numbers[np.flatnonzero(behind >= size)[-1]]] = False
    return np.concatenate([piece[-size:] for piece in pieces(job.tokenized.tokens, lengths, wanted, job.trim)])[-size:]


def pack(job: PackJob) -> None:
    """Write the shards of a part and split, as stock Streaming does."""
    from streaming import MDSWriter

    part = job.tokenized
    tokens = pieces(part.tokens, part.load('lengths'), np.asarray(part.load(job.split)), job.trim)
    with _appearing(Path(job.folder)) as partial:
        with MDSWriter(out=str(partial), columns=columns(job.max_seq_len), **job.writer) as writer:
            for row in chain.from_iterable(cut(tokens, job.max_seq_len)):
                writer.write({'tokens': row})
