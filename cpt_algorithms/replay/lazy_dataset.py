# SPDX-License-Identifier: Apache-2.0
"""A StreamingDataset that starts in the same time and memory whatever the size of its data."""

import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from streaming import StreamingDataset
from streaming.base.constant import (
    BARRIER,
    BARRIER_FILELOCK,
    CACHE_FILELOCK,
    CACHE_USAGE,
    DEFAULT_TIMEOUT,
    NEXT_EPOCH,
    SHARD_ACCESS_TIMES,
    SHARD_STATES,
    TICK,
)
from streaming.base.dataset import _ShardState
from streaming.base.distributed import maybe_init_dist
from streaming.base.format import get_index_basename
from streaming.base.format.mds.encodings import is_mds_encoding_safe
from streaming.base.shared import SharedArray, SharedBarrier, SharedScalar, _get_path, get_shm_prefix
from streaming.base.util import bytes_to_int
from streaming.base.world import World
from torch import distributed as dist

from cpt_algorithms.replay.mix import DOWNLOAD_RETRY
from cpt_algorithms.replay.shard_index import ShardIndex, ShardOfSample, Shards
from cpt_algorithms.replay.streams import ResilientStream, StreamError, is_shutting_down

__all__ = ['LazyStreamingDataset']


class LazyStreamingDataset(StreamingDataset):
    """Streaming's dataset, but for how it starts: no object per shard, no table of samples, no laid-out epoch.

    Downloading, validation, decompression and reading are Streaming's own. A subclass defines the order: ``_get_work``
    and ``__len__``.

    Cost: reading the index (see :class:`ShardIndex`) and about 60 bytes per shard.

    Args:
        streams: Where the data lies.
        batch_size: Samples per rank and batch.
        shuffle: Only said in the state dict, as are ``shuffle_seed`` and ``shuffle_block_size``.
        cache_limit: Most bytes of the cache; least recently used shards are evicted first. Data without a ``remote``
            is never evicted and does not count. Default: ``None``, nothing is evicted.
        predownload: Samples each worker downloads ahead. Default: ``None``, 8 batches.
        replication: Consecutive ranks that read the same samples. Default: ``None``.
        allow_unsafe_types: Whether columns may hold pickled objects. Default: ``False``.
        stream_defaults: ``split``, ``download_retry``, ``download_timeout``, ``validate_hash``, ``keep_zip`` of streams
            that do not say it.

    Raises:
        ValueError: If an index is none, holds no sample or an unsafe type, or the cache is too small for 4 shards.
    """

    def __init__(
        self,
        streams: Sequence[ResilientStream],
        batch_size: int,
        shuffle: bool = False,
        shuffle_seed: int = 9176,
        shuffle_block_size: int | None = None,
        cache_limit: int | str | None = None,
        predownload: int | None = None,
        replication: int | None = None,
        allow_unsafe_types: bool = False,
        **stream_defaults: Any,
    ) -> None:
        self.batch_size = batch_size
        self.shuffle = self.epoch_seed_change = shuffle
        self.shuffle_seed = shuffle_seed
        self.shuffle_block_size = shuffle_block_size
        self.cache_limit = bytes_to_int(cache_limit) if isinstance(cache_limit, str) else cache_limit
        self.predownload = 8 * batch_size if predownload is None else predownload
        self.replication = replication
        self.allow_unsafe_types = allow_unsafe_types
        self.num_canonical_nodes = 1
        self.initial_physical_nodes = None
        self._resume_state: dict[str, Any] | None = None
        self._unique_rank_world = world = World.detect()
        self._parallel_rank_world = world.copy() if replication is None else world.replicate(replication)

        destroy_dist = maybe_init_dist()
        defaults = {'split': None, 'validate_hash': None, 'keep_zip': False, 'download_timeout': DEFAULT_TIMEOUT}
        for stream in streams:
            stream.apply_default({**defaults, 'download_retry': DOWNLOAD_RETRY, **stream_defaults})
        self.streams = list(streams)
        self.num_streams = len(streams)
        self.indexes = [self._read_index(stream) for stream in streams]
        self._number_samples()
        self.check_cache_limit_for(0)
        self._open_shared_memory()
        if dist.is_available() and dist.is_initialized():
            dist.barrier()
        if destroy_dist:
            dist.destroy_process_group()

    def _read_index(self, stream: ResilientStream) -> ShardIndex:
        stream.claim(self._unique_rank_world)  # downloads the index
        path = Path(stream.folder) / get_index_basename()
        if not path.exists():
            raise ValueError(f'there is no dataset in {stream.local}: {path} does not exist, and no remote is given')
        index = ShardIndex.read(path)
        stream.check_hashes(kind['hashes'] or () for kind in index.kinds)
        if not index.samples.sum():
            raise ValueError(f'{path}: the dataset is empty')
        for kind in () if self.allow_unsafe_types else index.kinds:
            for column, encoding in zip(kind['column_names'] or (), kind['column_encodings'] or (), strict=True):
                if kind['format'] == 'mds' and not is_mds_encoding_safe(encoding):
                    raise ValueError(
                        f'{path}: column {column} is encoded as {encoding}, which can run code when it is read; '
                        'set allow_unsafe_types: true only if you trust the data'
                    )
        return index

    def _number_samples(self) -> None:
        """Number shards and samples through all streams."""
        self.shards_per_stream = np.array([len(index) for index in self.indexes], np.int64)
        self.shard_offset_per_stream = np.cumsum(self.shards_per_stream) - self.shards_per_stream
        self.samples_per_stream = np.array([index.samples.sum() for index in self.indexes], np.int64)
        self.num_samples = int(self.samples_per_stream.sum())
        self.num_shards = int(self.shards_per_stream.sum())
        self.stream_per_shard = np.repeat(np.arange(self.num_streams, dtype=np.int16), self.shards_per_stream)
        places = [(stream.local, stream.split) for stream in self.streams]
        self.shards = Shards(self.indexes, places)  # pyright: ignore[reportAttributeAccessIssue]
        ends = np.concatenate([index.samples for index in self.indexes])
        np.cumsum(ends, out=ends)
        self.spanner = ShardOfSample(ends)  # pyright: ignore[reportAttributeAccessIssue]

    def _open_shared_memory(self) -> None:
        """Open what the ranks and workers of a node share, under Streaming's names."""
        local = [stream.folder for stream in self.streams]
        remote = [os.path.join(stream.remote, stream.split) if stream.remote else None for stream in self.streams]
        self._shm_prefix_int, self._locals_shm = get_shm_prefix(local, remote, self._unique_rank_world)  # pyright: ignore

        name = partial(_get_path, self._shm_prefix_int)
        self._filelock_root = gettempdir()
        self._shared_barrier = SharedBarrier(os.path.join(self._filelock_root, name(BARRIER_FILELOCK)), name(BARRIER))
        self._next_epoch = SharedScalar(np.int64, name(NEXT_EPOCH))
        self._cache_filelock_path = os.path.join(self._filelock_root, name(CACHE_FILELOCK))
        self._cache_usage = SharedScalar(np.int64, name(CACHE_USAGE))
        self._shard_states = SharedArray(self.num_shards, np.uint8, name(SHARD_STATES))
        self._shard_access_times = SharedArray(self.num_shards, np.uint64, name(SHARD_ACCESS_TIMES))
        if self._unique_rank_world.is_local_leader:
            self.next_epoch = 0
            self._register_cached_shards(self._shard_states.numpy())
            self._shard_access_times.numpy()[:] = time.time_ns()
        del self._shared_barrier.lock  # cannot be pickled

    def _register_cached_shards(self, states: NDArray[np.uint8]) -> None:
        states[:] = _ShardState.REMOTE
        usage = 0
        for index, stream, first in zip(self.indexes, self.streams, self.shard_offset_per_stream, strict=True):
            if not stream.is_cache:
                states[first : first + len(index)] = _ShardState.LOCAL
                continue
            usage += stream.get_index_size()
            listing = {os.path.join(root, leaf) for root, _, leaves in os.walk(stream.folder) for leaf in leaves}
            for number in index.cached(listing, stream.folder):
                size = self.shards[int(first) + number].set_up_local(listing, stream.safe_keep_zip)
                if size:
                    states[first + number] = _ShardState.LOCAL
                    usage += size
        self.cache_usage = usage

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Download or decompress a shard, unless it is readable or another worker does (``blocking``: wait for it).

        Streaming takes a file lock for every prefetched row, cached or not. At some 10,000 rows per second its prefetch
        falls behind the reader, and with a cache limit it downloads evicted shards again. It also counts a shard only
        after the download, so that each of many workers may exceed the limit by one.
        """
        while (reserved := self._reserve(shard_id)) is None:
            if self._is_readable(shard_id):
                self._shard_access_times[shard_id] = time.time_ns()
                return
            if not blocking:
                return
            self._wait()
        delta = 0
        try:
            delta = self.streams[self.stream_per_shard[shard_id]].prepare_shard(self.shards[shard_id])
        finally:
            with self._cache_lock():
                self.cache_usage += (delta - reserved) if reserved else 0
                self._shard_access_times[shard_id] = time.time_ns()
                self._shard_states[shard_id] = _ShardState.LOCAL

    def _reserve(self, shard_id: int) -> int | None:
        """Take a shard to prepare, evicting others: its bytes; None if it is readable or another worker prepares it."""
        stream = self.streams[self.stream_per_shard[shard_id]]
        size = self.shards[shard_id].get_max_size() if stream.is_cache else 0
        while True:
            if self._shard_states[shard_id] == _ShardState.PREPARING or self._is_readable(shard_id):
                return None
            with self._cache_lock():
                if self._shard_states[shard_id] == _ShardState.PREPARING or self._is_readable(shard_id):
                    return None
                limit = self.cache_limit if size else None
                while limit and self.cache_usage + size > limit and len(self._evictable()):
                    self._evict_coldest_shard()
                if not limit or self.cache_usage + size <= limit:
                    self.cache_usage += size
                    self._shard_states[shard_id] = _ShardState.PREPARING
                    return size
            self._wait()  # every shard that could be evicted is being downloaded

    def _is_readable(self, shard_id: int) -> bool:
        """Whether the uncompressed file is there, and nobody deleted it."""
        if self._shard_states[shard_id] != _ShardState.LOCAL:
            return False
        stream = self.streams[self.stream_per_shard[shard_id]]
        raw, _ = self.shards[shard_id].file_pairs[0]
        return os.path.isfile(os.path.join(stream.folder, raw.basename))

    def _wait(self) -> None:
        if is_shutting_down() or (hasattr(self, '_event') and self._event.is_set()):
            raise StreamError('the run is shutting down')
        time.sleep(TICK)

    def _cache_lock(self) -> FileLock:
        # made late: it can neither be pickled nor survive a fork
        if getattr(self, '_cache_lock_owner', None) != os.getpid():
            self._cache_filelock = FileLock(self._cache_filelock_path)
            self._cache_lock_owner = os.getpid()
        return self._cache_filelock

    def _ready_thread(self, it: Any) -> None:
        """Mark rows as ready."""
        # As in Streaming, but a shard that was evicted before its first row was read is prepared again. Streaming waits
        # for it for ever, and so does the process when it should exit.
        while not it.should_exit() and it.ready_index < it.total and not self._event.is_set():
            if self.predownload is not None and self.predownload < it.ready_index - it.yield_index:
                self._wait()
                continue
            shard_id, _ = self.spanner[it.sample_ids[it.ready_index]]
            while self._shard_states[shard_id] != _ShardState.LOCAL and not it.should_exit():
                if self._shard_states[shard_id] == _ShardState.REMOTE:
                    self.prepare_shard(shard_id, False)
                else:
                    self._wait()
            it.ready_index += 1
        it.on_exit()

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Resume where a state was saved. Called on every rank, before workers start.

        Streaming keeps it in shared memory, under a name that an earlier dataset may have used: when that one is
        cleaned up, the epoch would silently restart at its first sample.
        """
        self._resume_state = obj

    def _resume(self, world: World, epoch: int) -> tuple[int, int]:
        state = self._resume_state
        if state is None:
            return super()._resume(world, epoch)
        return (state['epoch'], state['sample_in_epoch']) if state['epoch'] >= epoch else (epoch, 0)

    def _evictable(self) -> NDArray[np.int64]:
        """Cached shards. Streaming would also evict those without a ``remote``, of which there is no other copy."""
        is_cached = np.array([stream.is_cache for stream in self.streams])[self.stream_per_shard]
        return np.flatnonzero(is_cached & (self._shard_states.numpy() == _ShardState.LOCAL))

    def _evict_coldest_shard(self) -> None:
        """Evict the least recently used shard."""
        candidates = self._evictable()
        times = self._shard_access_times.numpy()[candidates]
        # an access time in the future is from before the clock was set back
        shard_id = int(candidates[np.argmin(np.where(times > time.time_ns(), 0, times))])
        self._shard_states[shard_id] = _ShardState.REMOTE
        # a failed download may have left more on disk than was counted
        self.cache_usage = max(self.cache_usage - self.shards[shard_id].evict(), 0)

    def check_cache_limit_for(self, num_workers: int) -> None:
        """Refuse a cache in which that many workers on this node would evict each other's shards.

        Raises:
            ValueError: If it cannot hold the index, a shard of each worker, and four more.
        """
        cached = [(index, stream) for index, stream in zip(self.indexes, self.streams, strict=True) if stream.is_cache]
        if not self.cache_limit or not cached:
            return
        largest = max(int(index.bytes.max()) for index, _ in cached)
        indexes = sum(stream.get_index_size() for _, stream in cached)
        needed = indexes + (4 + num_workers) * largest
        if self.cache_limit < needed:
            raise ValueError(
                f'cache_limit={self.cache_limit:,} bytes is too small: the index takes {indexes:,}, the largest shard '
                f'{largest:,}, and {4 + num_workers} must fit for {num_workers} workers on this node; set it to at '
                f'least {needed:,}, better to much more'
            )
