# SPDX-License-Identifier: Apache-2.0
"""Documents that share words with the items of benchmarks: found while they are tokenised, and dropped or listed.

lm-eval and datasets take seconds to import, and are imported where items are read.
"""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh64_intdigest

from cpt_algorithms.evaluation.suite import Suite, SuiteTask, load_suite, load_tasks
from cpt_algorithms.preparation.duplicates import words_of
from cpt_algorithms.preparation.packing import Hits
from cpt_algorithms.preparation.reading import PrepareError

__all__ = ['NGRAM', 'BenchmarkItems', 'read_items', 'texts_of']

NGRAM = 13  # words; Brown et al. 2020, appendix C
SHORTEST = 8  # words of an item that is looked for as a whole; of fewer, too many documents have them by chance
# What more items than this share, and more than a tenth of the task's, is of the form that they are asked in.
TEMPLATE = 10
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
    return np.fromiter((xxh64_intdigest(word.encode()) for word in words_of(text)), np.uint64)


@dataclass(frozen=True)
class BenchmarkItems:
    """The items of all tasks that documents must not share words with, as hashes of their n-grams.

    Args:
        sizes: Words of each n-gram: those of the items that are shorter than ``ngram``, and that.
        hashes: Of the n-grams of each of these sizes, ascending.
        items: For each of these, a row of ``task`` and its item.
        tasks: Names of the tasks.
        counts: Items of each task.
        short: Those of them that are too short to be looked for, or have nothing of their own.
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
        than 10 items and a tenth of a task share is no item's own.

        Cost: 600 bytes for each n-gram while they are collected.
        """
        found: dict[int, dict[int, set[tuple[int, int]]]] = defaultdict(lambda: defaultdict(set))
        for number, items in enumerate(tasks.values()):
            for index, texts in enumerate(items):
                for each in (hashed for text in texts if len(hashed := _hashed(text)) >= min(ngram, SHORTEST)):
                    size = min(ngram, len(each))
                    for value in ngram_hashes(each, size).tolist():
                        found[size][value].add((number, index))
        most = [max(TEMPLATE, len(items) // 10) for items in tasks.values()]
        pairs: dict[int, list[tuple[int, int, int]]] = {}
        for size, of in sorted(found.items()):
            pairs[size] = []
            for value, items in of.items():
                shared = Counter(task for task, _ in items)
                pairs[size] += [(value, *item) for item in items if shared[item[0]] <= most[item[0]]]
            pairs[size].sort()
        looked_for = Counter(task for task, _ in {(task, item) for of in pairs.values() for _, task, item in of})
        sizes = tuple(size for size, each in pairs.items() if each)
        return cls(
            sizes,
            tuple(np.array([value for value, *_ in pairs[size]], np.uint64) for size in sizes),
            tuple(np.array([item for _, *item in pairs[size]], np.int64) for size in sizes),
            tuple(tasks),
            tuple(len(items) for items in tasks.values()),
            tuple(len(items) - looked_for[number] for number, items in enumerate(tasks.values())),
        )

    @property
    def digest(self) -> str:
        """A hash of what is looked for."""
        content = hashlib.blake2b(f'{self.tasks} {self.counts} '.encode(), digest_size=8)
        for size, hashes, items in zip(self.sizes, self.hashes, self.items, strict=True):
            content.update(f'{size} '.encode() + hashes.tobytes() + items.tobytes())
        return content.hexdigest()

    def save(self, path: Path) -> None:
        """Write to a file, for :meth:`load`."""
        arrays: dict[str, Any] = {f'hashes{size}': hashes for size, hashes in zip(self.sizes, self.hashes, strict=True)}
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
    """The items of all tasks of some suites, by the tasks' names in lm-eval.

    Words with which all questions of a task begin, or end, are those of its form, and left out.

    Raises:
        PrepareError: If a suite is not right, the data of a task cannot be had (it could not be told clean), or two
            different tasks have one name.
    """
    tasks: dict[str, list[list[str]]] = {}
    entries: dict[str, SuiteTask] = {}
    for path in suites:
        try:
            suite: Suite = load_suite(path)
            for entry in suite.tasks.values():
                if entries.setdefault(entry.name, entry).task != entry.task:
                    raise ValueError(f'another task {entry.name!r} comes before it; rename one')
                tasks[entry.name] = [
                    texts
                    for task in load_tasks(entry)['tasks'].values()
                    for texts in texts_of([_asked(task, doc) for doc in task.eval_docs])
                ]
        except Exception as error:  # of lm-eval, datasets, or a task's own code
            raise PrepareError(f'--decontaminate {path}: {type(error).__name__}: {error}') from error
    return BenchmarkItems.of(tasks, ngram)


def _asked(task: Any, doc: Any) -> tuple[str, list[str], str]:
    """An item's question, its possible answers, and what comes behind them, as a model is given them."""
    question, target = task.doc_to_text(doc), task.doc_to_target(doc)
    choices = task.doc_to_choice(doc) if task.config.doc_to_choice is not None else []
    if not isinstance(question, str):  # which of the choices is the question; all go on with the target
        return '', [str(choice) for choice in choices], str(target)
    if choices and task.OUTPUT_TYPE != 'multiple_choice' and isinstance(target, int):
        choices = [choices[target]]
    answers = choices or (target if isinstance(target, list) else [target])
    return question, [str(answer) for answer in answers] or [''], ''


def texts_of(asked: Sequence[tuple[str, list[str], str]]) -> list[list[str]]:
    """Of each item its question with each of its answers, less the words that all questions begin or end with."""
    questions = [list(words_of(question)) for question, _, _ in asked]
    first = len(os.path.commonprefix(questions)) if len(asked) > 1 else 0
    last = len(os.path.commonprefix([words[first:][::-1] for words in questions])) if len(asked) > 1 else 0
    cores = [' '.join(words[first : len(words) - last]) for words in questions]
    return [
        [f'{core} {answer} {rest}' for answer in answers] for core, (_, answers, rest) in zip(cores, asked, strict=True)
    ]
