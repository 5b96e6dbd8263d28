# SPDX-License-Identifier: Apache-2.0
"""Documents that occur more than once, exactly or nearly, across datasets, parts, validation sets and earlier runs.

Pure functions of files: run again, they write the same bytes, whatever the number of parts and ``max_bytes``.
"""

import hashlib
import io
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, islice, pairwise, tee
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import regex
from datasketch import MinHash, MinHashLSH
from numpy.typing import NDArray
from pydantic import Field
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from xxhash import xxh32_intdigest, xxh64_intdigest

from cpt_algorithms.files import hidden_sibling, write_atomic
from cpt_algorithms.validation import Section

__all__ = [
    'NearDuplicates',
    'digests',
    'first_occurrences',
    'is_held_out',
    'is_in_subset',
    'near_duplicates',
    'signatures',
    'words_of',
]

Keys = NDArray[np.uint64]
Rows = NDArray[np.int64]

# A word; a character between which and the next lines may break without a space (Chinese, Japanese, Thai, Khmer, ...)
# is one of its own. Unlike re's, its letters have their marks, such as vowels of Hindi and Thai.
_NO_SPACES = r'\p{lb=ID}\p{lb=CJ}\p{lb=SA}'
_WORD = regex.compile(rf'[{_NO_SPACES}&&\w]|[\w--[{_NO_SPACES}]]+', regex.V1)
_SPACE = re.compile(r'(?<!\r)[ \n]')
_WINDOW = 1 << 18  # characters, at least
_INVISIBLE = regex.compile(r'\p{Default_Ignorable_Code_Point}+')
# Shingles hashed at once: datasketch holds 4 bytes for each of them and each permutation, twice, which fits in a cache.
_SHINGLES = 1 << 11
# Peak memory of a key and its row while they are sorted and joined, measured with many duplicates.
_BYTES_PER_KEY = 224


def digests(texts: Sequence[str]) -> Keys:
    """The identity of each document: 16 bytes of BLAKE2b of its UTF-8 text, without what a reader cannot see.

    Texts that differ only in line ends (CR LF, CR), in invisible characters (a byte order mark, zero-width spaces and
    joiners, soft hyphens: Unicode's ``Default_Ignorable_Code_Point``) or in how accents are spelled (NFC) are the same.

    Returns:
        ``(n, 2)``; the first column as a fraction of :math:`2^{64}` is uniform in [0, 1) and decides the split.
    """
    identities = []
    for text in texts:
        identity = hashlib.blake2b(digest_size=16)
        for window in _visible(text):
            identity.update(window.encode())
        identities.append(identity.digest())
    return np.frombuffer(b''.join(identities), '>u8').reshape(-1, 2).astype(np.uint64)


def _visible(text: str) -> Iterator[str]:
    """A text as a reader sees it (see :func:`digests`), in windows that begin with a space, whose words it ends."""
    start = 0
    while start < len(text):
        space = _SPACE.search(text, start + _WINDOW)
        end = space.start() if space else len(text)
        window, start = text[start:end], end
        if '\r' in window:
            window = window.replace('\r\n', '\n').replace('\r', '\n')
        yield window if window.isascii() else unicodedata.normalize('NFC', _INVISIBLE.sub('', window))


def is_held_out(identities: Keys, val_fraction: float) -> NDArray[np.bool_]:
    """Which documents belong to validation: those whose digest, as a fraction of the largest, is below a fraction."""
    return identities[:, 0] < np.uint64(math.ceil(val_fraction * 2**64))


def is_in_subset(identities: Keys, train_subset: float | None) -> NDArray[np.bool_]:
    """Which documents a subset of training keeps: a smaller one is a part of each larger one; all without a share."""
    if train_subset is None:
        return np.ones(len(identities), np.bool_)
    return identities[:, 1] < np.uint64(math.ceil(train_subset * 2**64))


class NearDuplicates(Section):
    r"""The criterion for near-duplicates.

    A document is the set of its word n-grams: runs of ``ngram`` consecutive words (letters with their marks, digits and
    underscores, in lower case; all else only separates). In scripts without spaces between words (Chinese, Japanese,
    Thai, Lao, Khmer, Burmese: where Unicode lets lines break without one) each character is a word. The similarity of
    two documents is the Jaccard similarity of their sets, :math:`|A \cap B| / |A \cup B|`; one word changed in the
    middle of n words makes it :math:`(n - 9) / (n + 1)` with
    5-grams. A document of fewer than ``ngram`` words has one n-gram, all its words, and one without words has its text:
    they are near-duplicates only of documents with the same words, or text.

    MinHash and the number of bands are datasketch's. Two documents of similarity J share one of b bands of r rows with
    probability :math:`1 - (1 - J^r)^b`: with the defaults b = 9, r = 13, 0.08 at J = 0.7, 0.40 at 0.8, 0.93 at 0.9 and
    0.998 at 0.95. Then they are taken for near-duplicates without another comparison, and so are chains of them, as in
    FineWeb (`Penedo et al. 2024 <https://arxiv.org/abs/2406.17557>`_).

    Args:
        threshold: Similarity for which the number of bands is chosen. Default: ``0.8``.
        num_perm: Permutations of MinHash. Default: ``128``.
        ngram: Words of an n-gram. Default: ``5``.
    """

    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.8
    num_perm: Annotated[int, Field(ge=2)] = 128
    ngram: Annotated[int, Field(ge=1)] = 5

    @cached_property
    def bands(self) -> tuple[int, int]:
        """Bands, and rows of each: datasketch's choice, which weighs pairs missed and pairs wrongly found alike."""
        lsh = MinHashLSH(threshold=self.threshold, num_perm=self.num_perm)
        return lsh.b, lsh.r


def words_of(text: str) -> Iterator[str]:
    """The words of a document in lower case; see :class:`NearDuplicates`."""
    return (match[0] for window in _visible(text) for match in _WORD.finditer(window.lower()))


def shingles(text: str, ngram: int) -> Iterator[str]:
    """The word n-grams of a document; see :class:`NearDuplicates`."""
    words = words_of(text)
    first = list(islice(words, ngram)) or [text]
    windows = tee(chain(first, words), len(first))
    return map(' '.join, zip(*(islice(window, start, None) for start, window in enumerate(windows)), strict=False))


def signatures(texts: Sequence[str], settings: NearDuplicates) -> Keys:
    """A hash of each band of the MinHash of each document.

    Returns:
        ``(n, bands)``. Documents with an equal hash anywhere in their rows are taken for near-duplicates. Hashes of
        different settings must not be compared.

    Cost: 10 MB of text a second on one core. The same on every machine, being made of integers and named hashes.
    """
    bands, rows = settings.bands
    size = 4 * rows
    empty = MinHash(settings.num_perm, scheme='affine32', hashfunc=xxh32_intdigest)
    result = np.empty((len(texts), bands), np.uint64)
    for number, text in enumerate(texts):
        minhash = empty.copy()
        remaining = map(str.encode, shingles(text, settings.ngram))  # xxhash 4 takes no strings
        while batch := list(islice(remaining, _SHINGLES)):
            minhash.update_batch(batch)
        values = minhash.hashvalues.astype('<u4').tobytes()
        result[number] = [xxh64_intdigest(values[band * size : (band + 1) * size], band) for band in range(bands)]
    return result


def first_occurrences(
    files: Sequence[Path], out: Sequence[Path], earlier: Sequence[Path] = (), max_bytes: int = 1 << 29
) -> None:
    """Find which documents are the first with their text.

    Args:
        files: ``.npy`` files of :func:`digests`, one for each part, in global order.
        out: ``.npy`` files to write, ``(n,)`` bool for each of ``files``: True where the digest is in no earlier row.
        earlier: ``.npy`` files of data prepared before; they come before all of ``files``.
        max_bytes: Memory to use, at most about, beside the mask of one part. Default: 512 MiB.

    Raises:
        ValueError: If a file does not hold digests.
        RuntimeError: If another process is writing to ``out``.

    Cost: 2 us per document on one core, and meanwhile 25 bytes per document on the disk of ``out``.
    """
    if not files:
        return
    sizes, columns = _sizes([*earlier, *files], 2)
    at_once = max(1, max_bytes // _BYTES_PER_KEY)
    offsets = np.cumsum([0, *sizes])
    with hidden_sibling(out[0], RuntimeError(f'another process is writing {out[0]}')) as folder:
        # pages that are never written take no memory and no disk
        repeated = np.memmap(folder / 'repeated', np.bool_, 'w+', shape=max(1, offsets[-1]))
        keys = _numbered(_chunks([*earlier, *files], at_once))
        for _, later in _equal_pairs(keys, columns, sum(sizes), at_once, folder):
            repeated[later] = True
        for path, (start, stop) in zip(out, pairwise(offsets[len(earlier) :]), strict=True):
            _save(path, ~repeated[start:stop])


def near_duplicates(
    files: Sequence[Path],
    held_out: Sequence[Path],
    out: Sequence[Path],
    earlier: Sequence[Path] = (),
    max_bytes: int = 1 << 29,
) -> None:
    """Find which documents to drop so that no two near-duplicates are left.

    Documents that share a band, and chains of them, are one group. One document of each group stays: the first of data
    prepared before, else the first validation document, else the first training document. So no training document is
    nearly a validation document, and no validation document is nearly something a model was trained on before. Of data
    prepared before, everything stays.

    Equal documents have equal signatures: where ``held_out`` follows from the digest, what :func:`first_occurrences`
    finds repeated is dropped here too.

    Args:
        files: ``.npy`` files of :func:`signatures`, in global order.
        held_out: ``.npy`` files, ``(n,)`` bool for each of ``files``: True for validation documents.
        out: ``.npy`` files to write, ``(n,)`` bool for each of ``files``: True for documents to drop.
        earlier: ``.npy`` files of :func:`signatures` of data prepared before.
        max_bytes: As in :func:`first_occurrences`.

    Raises:
        ValueError: If a file does not hold signatures of one number of bands, or ``held_out`` does not fit.
        RuntimeError: If another process is writing to ``out``.

    Cost: 15 us per document of 9 bands on one core, and 16 bytes per document and band and 8 per document on disk.
    """
    if not files:
        return
    sizes, bands = _sizes([*earlier, *files])
    at_once = max(bands, max_bytes // _BYTES_PER_KEY)
    num_earlier, num_held_out = sum(sizes[: len(earlier)]), 0
    for path, size in zip(held_out, sizes[len(earlier) :], strict=True):
        mask = np.load(path)
        if mask.shape != (size,) or mask.dtype != np.bool_:
            raise ValueError(f'{path} holds {mask.dtype} of shape {mask.shape}; expected bool of shape ({size},)')
        num_held_out += int(np.count_nonzero(mask))

    def numbers() -> Iterator[Rows]:
        """The place of each document in the order in which they win: earlier ones, validation, training."""
        val, train = num_earlier, num_earlier + num_held_out
        for mask in _chunks(held_out, at_once // bands):
            yield np.where(mask, val + np.cumsum(mask), train + np.cumsum(~mask)) - 1
            val, train = val + np.count_nonzero(mask), train + np.count_nonzero(~mask)

    def keys() -> Iterator[tuple[Keys, Rows]]:
        mine = zip(_chunks(files, at_once // bands), numbers(), strict=True)
        for chunk, number in chain(_numbered(_chunks(earlier, at_once // bands)), mine):
            yield chunk.reshape(-1, 1), np.repeat(number, bands)

    with hidden_sibling(out[0], RuntimeError(f'another process is writing {out[0]}')) as folder:
        # how far below each document's number that of another one of its group is; 0 in the one that stays
        above = np.memmap(folder / 'above', np.int64, 'w+', shape=max(1, sum(sizes)))
        for one, other in _equal_pairs(keys(), 1, sum(sizes) * bands, at_once, folder):
            _join(above, one, other)
        chunks = numbers()
        for path, size in zip(out, sizes[len(earlier) :], strict=True):
            mine = islice(chunks, len(range(0, size, at_once // bands)))
            _save(path, np.concatenate([np.zeros(0, np.bool_), *(above[number] != 0 for number in mine)]))


def _sizes(files: Sequence[Path], columns: int | None = None) -> tuple[list[int], int]:
    """Rows of each file, and columns of all."""
    sizes = []
    for path in files:
        table = np.load(path, mmap_mode='r')
        columns = columns or table.shape[-1]
        if table.ndim != 2 or table.dtype != np.uint64 or table.shape[1] != columns:
            raise ValueError(
                f'{path} holds {table.dtype} of shape {table.shape}; expected uint64 of shape (documents, {columns}), '
                'made with the same settings as the others'
            )
        sizes.append(len(table))
    return sizes, columns or 0


def _chunks(files: Sequence[Path], size: int) -> Iterator[NDArray[Any]]:
    """At most ``size`` rows at a time, of one file after the other."""
    for path in files:
        table = np.load(path, mmap_mode='r')
        for start in range(0, len(table), size):
            yield np.array(table[start : start + size])


def _numbered(chunks: Iterable[Keys]) -> Iterator[tuple[Keys, Rows]]:
    """Each chunk with the numbers of its rows, counted over all."""
    start = 0
    for chunk in chunks:
        yield chunk, np.arange(start, start + len(chunk))
        start += len(chunk)


def _save(path: Path, values: NDArray[np.bool_]) -> None:
    content = io.BytesIO()
    np.save(content, values)
    write_atomic(path, content.getvalue())


def _equal_pairs(
    keys: Iterable[tuple[Keys, Rows]], columns: int, num_keys: int, at_once: int, folder: Path
) -> Iterator[tuple[Rows, Rows]]:
    """Pairs of rows with equal keys, which connect all rows of each key; the second comes later and is in one pair."""
    # out of core: keys are spread over files by range of their first number, which is uniform
    files = [folder / str(bucket) for bucket in range(1 + 2 * num_keys // at_once)]
    for key, row in keys:
        bucket = ((key[:, 0] >> np.uint64(32)) * np.uint64(len(files))) >> np.uint64(32)
        order = np.argsort(bucket, kind='stable')
        records = np.column_stack([key, row.astype(np.uint64)])[order]
        numbers, starts = np.unique(bucket[order], return_index=True)
        for number, (start, stop) in zip(numbers, pairwise([*starts, len(records)]), strict=True):
            with open(files[number], 'ab') as file:
                records[start:stop].tofile(file)
    for path in files:
        if not path.exists():
            continue
        seen = np.empty((0, columns + 1), np.uint64)  # the first row of each key so far
        with open(path, 'rb') as file:
            while (chunk := np.fromfile(file, np.uint64, at_once * (columns + 1))).size:
                records = np.concatenate([seen, chunk.reshape(-1, columns + 1)])
                records = records[np.lexsort(records[:, columns - 1 :: -1].T)]  # stable: rows of one key stay in order
                new = np.ones(len(records), np.bool_)
                new[1:] = (records[1:, :columns] != records[:-1, :columns]).any(axis=1)
                rows = records[:, columns].astype(np.int64)
                seen = records[new]
                if len(seen) < len(records):
                    yield rows[:-1][~new[1:]], rows[1:][~new[1:]]
        path.unlink()


def _join(above: NDArray[np.int64], one: Rows, other: Rows) -> None:
    """Make one group of the groups of each pair: its lowest number is the root."""
    one, other = _roots(above, one), _roots(above, other)
    nodes, compact = np.unique(np.concatenate([one, other]), return_inverse=True)
    edges = np.split(compact, 2)
    graph = coo_array((np.ones(len(one), np.bool_), tuple(edges)), shape=(len(nodes), len(nodes)))
    _, group = connected_components(graph, directed=False)
    _, lowest = np.unique(group, return_index=True)  # nodes are in order
    above[nodes] = nodes - nodes[lowest[group]]


def _roots(above: NDArray[np.int64], rows: Rows) -> Rows:
    """The lowest number of each row's group, which the row points to from now on."""
    roots = rows
    while (step := above[roots]).any():
        roots = roots - step
    above[rows] = rows - roots
    return roots
