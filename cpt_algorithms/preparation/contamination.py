# SPDX-License-Identifier: Apache-2.0
"""Documents that share words with the items of benchmarks: found while they are tokenised, and dropped or listed.

lm-eval and datasets take seconds to import, and are imported where items are read.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh64_intdigest

from cpt_algorithms.evaluation.suite import Suite, load_suite, load_tasks
from cpt_algorithms.preparation.duplicates import words_of
from cpt_algorithms.preparation.packing import Hits
from cpt_algorithms.preparation.reading import PrepareError

__all__ = ['NGRAM', 'BenchmarkItems', 'read_items']

NGRAM = 13  # words; Brown et al. 2020, appendix C
SHORTEST = 8  # words of an item that is looked for as a whole; of fewer, too many documents have them by chance
TEMPLATE = 10  # items that share an n-gram, at most, or it is of the form they are asked in
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that a multiplication loses nothing

Hashes = NDArray[np.uint64]


def ngram_hashes(words: Hashes, size: int) -> Hashes:
    r"""A hash of every run of so many words: :math:`\sum_k w_{i+k} p^k \bmod 2^{64}`; of fewer words none."""
    count = len(words) - size + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    found = np.zeros(count, np.uint64)
    for start in reversed(range(size)):
        found = found * _FACTOR + words[start : start + count]
    return found


def _hashed(text: str) -> Hashes:
    return np.fromiter((xxh64_intdigest(word) for word in words_of(text)), np.uint64)


@dataclass(frozen=True)
class BenchmarkItems:
    """The items of all tasks that documents must not share words with, as hashes of their n-grams.

    Args:
        sizes: Words of each n-gram: those of the items that are shorter than ``ngram``, and that.
        hashes: Of the n-grams of each of these sizes, ascending.
        items: For each of these, a row of ``task`` and its item.
        tasks: Names of the tasks.
        counts: Items of each task.
        short: Those of them that are too short to be looked for.
    """

    sizes: tuple[int, ...]
    hashes: tuple[Hashes, ...]
    items: tuple[NDArray[np.int64], ...]
    tasks: tuple[str, ...]
    counts: tuple[int, ...]
    short: tuple[int, ...]

    @classmethod
    def of(cls, tasks: dict[str, list[list[str]]], ngram: int = NGRAM) -> 'BenchmarkItems':
        """Of the texts of each item of each task, in any of which the item is found.

        An item of fewer than ``ngram`` words is found as a whole, and not looked for if it has fewer than 8. What more
        than 10 items share is no item's own.
        """
        found: dict[int, dict[int, set[tuple[int, int]]]] = defaultdict(lambda: defaultdict(set))
        short = Counter[str]()
        for number, (name, items) in enumerate(tasks.items()):
            for index, texts in enumerate(items):
                words = [hashed for text in texts if len(hashed := _hashed(text)) >= min(ngram, SHORTEST)]
                short[name] += not words
                for each in words:
                    size = min(ngram, len(each))
                    for value in ngram_hashes(each, size).tolist():
                        found[size][value].add((number, index))
        pairs = {
            size: sorted((value, *item) for value, items in of.items() if len(items) <= TEMPLATE for item in items)
            for size, of in sorted(found.items())
        }
        sizes = tuple(size for size, each in pairs.items() if each)
        return cls(
            sizes,
            tuple(np.array([value for value, *_ in pairs[size]], np.uint64) for size in sizes),
            tuple(np.array([item for _, *item in pairs[size]], np.int64) for size in sizes),
            tuple(tasks),
            tuple(len(items) for items in tasks.values()),
            tuple(short[name] for name in tasks),
        )

    @property
    def digest(self) -> str:
        """A hash of what is looked for."""
        content = hashlib.blake2b(digest_size=8)
        for size, hashes, items in zip(self.sizes, self.hashes, self.items, strict=True):
            content.update(f'{size} '.encode() + hashes.tobytes() + items.tobytes())
        return content.hexdigest()

    def save(self, path: Path) -> None:
        """Write to a file, for :meth:`load`."""
        arrays = {f'hashes{size}': hashes for size, hashes in zip(self.sizes, self.hashes, strict=True)}
        arrays |= {f'items{size}': items for size, items in zip(self.sizes, self.items, strict=True)}
        np.savez(path, tasks=self.tasks, counts=self.counts, short=self.short, sizes=self.sizes, **arrays)

    @staticmethod
    @lru_cache(1)
    def load(path: str) -> 'BenchmarkItems':
        """Read what :meth:`save` wrote."""
        with np.load(path) as file:
            sizes = tuple(map(int, file['sizes']))
            hashes, items = (tuple(file[f'{kind}{size}'] for size in sizes) for kind in ('hashes', 'items'))
            names, counts, short = (tuple(file[name].tolist()) for name in ('tasks', 'counts', 'short'))
        return BenchmarkItems(sizes, hashes, items, names, counts, short)

    def find(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Items that documents hold: rows of document, task and item, each once.

        Cost: 5 MB of text a second on one core.
        """
        found: set[tuple[int, int, int]] = set()
        for number, text in enumerate(texts):
            words = _hashed(text)
            for size, hashes, items in zip(self.sizes, self.hashes, self.items, strict=True):
                mine = ngram_hashes(words, size)
                first, last = (np.searchsorted(hashes, mine, side) for side in ('left', 'right'))
                for begin, end in {*zip(first.tolist(), last.tolist(), strict=True)}:
                    found |= {(number, task, item) for task, item in items[begin:end].tolist()}
        return np.array(sorted(found), np.int64).reshape(-1, 3)

    def hits(self, found: NDArray[np.int64]) -> dict[str, Hits]:
        """What was found of each task.

        Args:
            found: Rows as of :meth:`find`, whose documents have numbers of their own.
        """
        return {
            name: Hits(
                documents=len(np.unique(found[found[:, 1] == task, 0])),
                items=len(np.unique(found[found[:, 1] == task, 2])),
                of=self.counts[task],
                short=self.short[task],
            )
            for task, name in enumerate(self.tasks)
        }


def read_items(suites: Iterable[str], ngram: int = NGRAM) -> BenchmarkItems:
    """The items of all tasks of some suites.

    Raises:
        PrepareError: If a suite is not right, or the data of a task cannot be had: it could not be told clean.
    """
    tasks: dict[str, list[list[str]]] = {}
    for path in suites:
        try:
            suite: Suite = load_suite(path)
            for name, entry in suite.tasks.items():
                tasks[name] = [
                    list(_texts(task, doc)) for task in load_tasks(entry)['tasks'].values() for doc in task.eval_docs
                ]
        except Exception as error:  # of lm-eval, datasets, or a task's own code
            raise PrepareError(f'--decontaminate {path}: {type(error).__name__}: {error}') from error
    return BenchmarkItems.of(tasks, ngram)


def _texts(task: Any, doc: Any) -> Iterator[str]:
    """An item's question with each of its answers, as a model is given them."""
    question, target = task.doc_to_text(doc), task.doc_to_target(doc)
    choices = task.doc_to_choice(doc) if task.OUTPUT_TYPE == 'multiple_choice' else []
    if not isinstance(question, str):  # the choices are what comes before the target
        yield from (f'{choice} {target}' for choice in choices)
        return
    answers = choices or (target if isinstance(target, list) else [target])
    yield from (f'{question} {answer}' for answer in answers or [''])
