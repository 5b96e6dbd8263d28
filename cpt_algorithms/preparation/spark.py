# SPDX-License-Identifier: Apache-2.0
"""The same preparation on Spark, for more text than one machine takes.

Every machine must see the input and the folder that is worked in under the same names: shared storage.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pyspark import TaskContext  # pyright: ignore[reportMissingImports]
from pyspark.sql import SparkSession  # pyright: ignore[reportMissingImports]

from cpt_algorithms.preparation.parts import PackJob, Tokenized, TokenizeJob, columns, rows, tokenize

__all__ = ['SparkEngine']


def _write(table: Any, jobs: list[PackJob], notes: str) -> Iterator[dict[str, Any]]:
    """The samples of the one job of a task; a note says which folder of Streaming's they went to."""
    context = TaskContext.get()
    assert context is not None
    for number in table['number']:
        yield from rows(jobs[number])
        Path(notes, f'{context.taskAttemptId()}.json').write_text(json.dumps(int(number)))


class SparkEngine:
    """A Spark session: the one there is, as under ``spark-submit``, or one of this machine."""

    name = 'spark'

    def __init__(self) -> None:
        builder: Any = SparkSession.builder
        self._spark = builder.appName('prepare_data').getOrCreate()

    def __enter__(self) -> 'SparkEngine':
        return self

    def __exit__(self, *error: Any) -> None:
        self._spark.stop()

    def _map(self, function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
        """The results in order; as many jobs at once as Spark has places for four times over."""
        context = self._spark.sparkContext
        jobs = iter(jobs)
        while chunk := list(islice(jobs, 4 * context.defaultParallelism)):
            yield from context.parallelize(chunk, len(chunk)).map(function).collect()

    def tokenize(self, jobs: Iterable[TokenizeJob]) -> Iterator[Tokenized]:
        """Tokenise parts, in order; see :func:`cpt_algorithms.preparation.parts.tokenize`."""
        return self._map(tokenize, jobs)

    def pack(self, jobs: Iterable[PackJob]) -> Iterator[None]:
        """Write shards by Streaming's own DataFrame converter, one task and folder for each part and split.

        The converter names folders by attempts of tasks, of which Spark may make several; a note beside them says what
        each holds, and a folder is whole if its index is there.
        """
        from streaming.base.converters import dataframe_to_mds

        jobs = list(jobs)
        if not jobs:
            return
        first = jobs[0]
        with TemporaryDirectory(dir=Path(first.folder).parent) as temporary:
            folder = Path(temporary)
            (folder / 'notes').mkdir()
            numbers = self._spark.sparkContext.parallelize([(number,) for number in range(len(jobs))], len(jobs))
            dataframe_to_mds(
                self._spark.createDataFrame(numbers, 'number int'),
                merge_index=False,
                mds_kwargs={'out': str(folder / 'shards'), 'columns': columns(first.max_seq_len), **first.writer},
                udf_iterable=_write,
                udf_kwargs={'jobs': jobs, 'notes': str(folder / 'notes')},
            )
            for note in (folder / 'notes').iterdir():
                written, wanted = folder / 'shards' / note.stem, Path(jobs[json.loads(note.read_text())].folder)
                if (written / 'index.json').exists() and not wanted.exists():
                    written.rename(wanted)
        yield from (None for _ in jobs)
