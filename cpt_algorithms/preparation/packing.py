# SPDX-License-Identifier: Apache-2.0
"""Which documents go into which split, and how their tokens become samples: numbers in, numbers out."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cpt_algorithms.validation import Section

__all__ = ['SPLITS', 'Counts', 'Hits', 'Selection', 'Selector', 'cut', 'pieces']

SPLITS = ('train', 'val')

Tokens = NDArray[np.int32]
Mask = NDArray[np.bool_]


class Counts(Section):
    """What went into one split of one dataset, or of one of its sources.

    Args:
        documents: Packed, the last one perhaps in part.
        duplicates: Dropped because the same text came before: here, in an earlier dataset or preparation.
        near_duplicates: Dropped because nearly the same text is kept.
        contaminated: Dropped because they share words with items of a benchmark.
        tokens: Tokens of these documents, EOS included. Of a dataset: those written, ``samples`` times
            ``max_seq_len``; its sources together have ``leftover`` more, less what is over the limit.
        samples: Samples written. Of a source: 0, since a sample may hold text of two.
        leftover: Tokens dropped at the end, too few for a sample or over the limit. Of a source: only the latter.
        bytes: UTF-8 bytes of the text written, for bits per byte. Dropped tokens are subtracted as decoded,
            which is within 3 bytes where the cut is inside a character.
    """

    documents: int = 0
    duplicates: int = 0
    near_duplicates: int = 0
    contaminated: int = 0
    tokens: int = 0
    samples: int = 0
    leftover: int = 0
    bytes: int = 0

    def __add__(self, other: 'Counts') -> 'Counts':
        """Of both together."""
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in Counts.model_fields})


class Hits(Section):
    """What a dataset has of a task: ``items`` of ``of`` were found in ``documents``; ``short`` were not looked for.

    Of documents that are kept, those for training; of dropped ones all, which would have been in the dataset.
    """

    documents: int
    items: int
    of: int
    short: int


@dataclass(frozen=True)
class Selection:
    """The share of one part in one split: its documents, of which the last is ``trim`` tokens over the limit."""

    documents: Mask
    trim: int
    counts: Counts


class Selector:
    """Selects the documents of a dataset, part by part in order, until its splits are full.

    A split is full with the document that reaches its limit. The dataset ends when training is full and validation is,
    too, or has no limit: validation then has what came until then.

    Args:
        max_tokens: The limit of each split in tokens; ``None`` for no limit.
    """

    def __init__(self, max_tokens: dict[str, int | None]):
        self.room = dict(max_tokens)

    @property
    def ended(self) -> bool:
        """Whether no further document is wanted."""
        return self.room['train'] == 0 and not self.room['val']

    def select(
        self, held_out: Mask, lengths: NDArray[np.integer], first: Mask, near: Mask, subset: Mask, tainted: Mask
    ) -> dict[str, Selection]:
        """Select the documents of the next part for each split.

        Args:
            held_out: True for validation documents.
            lengths: Tokens of each document, EOS included.
            first: False for documents whose text came before.
            near: True for near-duplicates.
            subset: False for what is not wanted for training.
            tainted: True for documents that share words with items of a benchmark.
        """
        selections = {}
        end = 0 if self.ended else len(lengths)
        for split in SPLITS:  # train first: without a limit of its own, val ends with it
            own = held_out if split == 'val' else ~held_out & subset
            room, stop, trim = self.room[split], end, 0
            wanted = own & first & ~near & ~tainted
            if room is not None:
                total = np.cumsum(np.where(wanted, lengths, 0))
                over = int(np.searchsorted(total, room)) if room else -1
                stop = min(end, over + 1)
                if room and over < len(lengths):
                    trim, self.room[split] = int(total[over]) - room, 0
                elif room:
                    self.room[split] = room - int(total[-1]) if len(total) else room
                if split == 'train' and self.room['train'] == 0 and self.room['val'] is None:
                    end = stop
            own, wanted = own.copy(), wanted.copy()
            own[stop:] = wanted[stop:] = False
            counts = Counts(
                documents=int(wanted.sum()),
                duplicates=int((own & ~first).sum()),
                near_duplicates=int((own & first & near).sum()),
                contaminated=int((own & first & ~near & tainted).sum()),
                tokens=int(lengths[wanted].sum()) - trim,
                leftover=trim,
            )
            selections[split] = Selection(wanted, trim, counts)
        return selections


def pieces(tokens: Tokens, lengths: NDArray[np.integer], documents: Mask, trim: int = 0) -> Iterator[Tokens]:
    """The tokens of the wanted documents but for the last ``trim``, in runs of documents that follow one another."""
    ends = np.cumsum(lengths, dtype=np.int64)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], documents, [False]]).astype(np.int8)))
    runs = edges.reshape(-1, 2)
    for number, (start, stop) in enumerate(runs, 1):
        end = ends[stop - 1] - (trim if number == len(runs) else 0)
        yield tokens[ends[start] - lengths[start] : end]


def cut(parts: Iterable[Tokens], max_seq_len: int, at_once: int = 1 << 20) -> Iterator[Tokens]:
    """Join tokens and cut them into samples, ``(n, max_seq_len)`` at a time; the last, too few for one, are left out.

    The samples do not depend on ``at_once``, the tokens that are collected before they are cut.
    """
    waiting, size = [np.zeros(0, np.int32)], 0
    for part in (run[at : at + at_once] for run in parts for at in range(0, len(run), at_once)):
        waiting.append(part)
        size += len(part)
        if size >= max(at_once, max_seq_len):
            joined = np.concatenate(waiting)
            end = len(joined) // max_seq_len * max_seq_len
            yield joined[:end].reshape(-1, max_seq_len)
            waiting, size = [joined[end:].copy()], len(joined) - end
    joined = np.concatenate(waiting)
    end = len(joined) // max_seq_len * max_seq_len
    if end:
        yield joined[:end].reshape(-1, max_seq_len)
