# SPDX-License-Identifier: Apache-2.0
"""Engines that work on the parts: the processes of this machine, or Spark."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import Any

from cpt_algorithms.launch.processes import num_cores
from cpt_algorithms.preparation.options import Options
from cpt_algorithms.preparation.sources import BYTES_PER_TOKEN, MADE, SMALLEST_PART, Source

__all__ = ['LocalEngine', 'make_engine']

# less text than this is done in this process: others take longer to start
WORTH_A_POOL = 16 * SMALLEST_PART


def _end_with_parent() -> None:
    """Called in each process: one whose parent is killed ends, too, instead of waiting for work for ever."""
    # one process, one thread: rayon's would share the cores with the other processes'
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class LocalEngine:
    """So many processes of this machine; 1 works in this process."""

    name = 'local'

    def __init__(self, workers: int):
        self._workers = workers
        self._pool: Any = None

    def __enter__(self) -> 'LocalEngine':
        return self

    def __exit__(self, *error: Any) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
        """The results in order, with a few jobs begun ahead; those not begun when nobody asks further never are."""
        if self._workers == 1:
            yield from map(function, jobs)
            return
        if not self._pool:
            from concurrent.futures import ProcessPoolExecutor

            # threads of this process (rayon's, Arrow's) do not survive a fork; Streaming is imported once for all
            context = get_context('forkserver')
            preloaded = ['streaming', 'pyarrow.parquet', 'tokenizers', __name__, 'cpt_algorithms.preparation.parts']
            context.set_forkserver_preload(preloaded)
            self._pool = ProcessPoolExecutor(self._workers, context, _end_with_parent)
        jobs, waiting = iter(jobs), deque()
        try:
            while True:
                ahead = islice(jobs, 2 * self._workers - len(waiting))
                waiting.extend(self._pool.submit(function, job) for job in ahead)
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def make_engine(options: Options, sources: Sequence[Source], files: dict[str, list[str]]) -> Any:
    """The engine: Spark, or as many processes as the text in these files is worth."""
    if options.engine == 'spark':
        from cpt_algorithms.preparation.spark import SparkEngine

        return SparkEngine()
    limit = (options.max_train_tokens or 0) + (options.max_val_tokens or 0)
    size = sum(os.path.getsize(file) for found in files.values() for file in found)
    if options.max_train_tokens:
        size = min(size, limit * BYTES_PER_TOKEN * len({source.dataset for source in sources}))
    small = size < WORTH_A_POOL and not any(source.kind in MADE for source in sources)
    return LocalEngine(options.workers or (1 if small else num_cores()))
