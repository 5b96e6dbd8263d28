# SPDX-License-Identifier: Apache-2.0
"""The same preparation on Spark, for more text than one machine takes.

Every machine must see the input and the folder that is worked in under the same names: shared storage.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from pyspark.sql import SparkSession  # pyright: ignore[reportMissingImports]

__all__ = ['SparkEngine']


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

    def map(self, function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
        """The results in order; as many jobs at once as Spark has places for four times over."""
        context = self._spark.sparkContext
        jobs = iter(jobs)
        while chunk := list(islice(jobs, 4 * context.defaultParallelism)):
            yield from context.parallelize(chunk, len(chunk)).map(function).collect()
