# SPDX-License-Identifier: Apache-2.0
"""``resilient``: a Streaming ``Stream`` that retries and verifies downloads, or stops with one clear error."""

import errno
import fcntl
import glob
import json
import logging
import multiprocessing
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import psutil
from botocore.exceptions import ClientError, FlexibleChecksumError, NoCredentialsError
from streaming import Stream
from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, LOCALS
from streaming.base.format import FileInfo, Reader, get_index_basename
from streaming.base.hashing import get_hash, is_hash
from streaming.base.shared.prefix import _get_path, _unpack_locals
from streaming.base.util import bytes_to_int
from streaming.base.world import World
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter
from torch import distributed as dist

from cpt_algorithms.formatting import one_line

__all__ = ['ResilientStream', 'StreamError', 'stale_cache']

log = logging.getLogger(__name__)

# Between attempts: 1, 2, 4, 8, 15, 15, ... s and some jitter.
FIRST_WAIT, LONGEST_WAIT = 1.0, 15.0
# Downloads of a file whose hash is wrong, after the first.
CORRUPT_RETRY = 2
# Seconds to wait for the workers of a killed run, which look for their parent every 5 s.
CLAIM_TIMEOUT = 30.0
# Seconds in which the resource tracker of a killed run removes its shared memory, by name: ours may get that name.
TRACKER_DELAY = 1.0
# The fastest first; any other that an index offers comes after these.
HASHES = ('xxh3_64', 'xxh3_128', 'xxh64', 'xxh128', 'xxh32', 'blake2b', 'sha1', 'md5')
SHARED_MEMORY = Path('/dev/shm')
# What a killed run leaves: our partial files, boto's beside them, Streaming's own.
PARTIAL = re.compile(r'^(shard\..*|index\.json)\.(part(\.\w{8})?|tmp(\.part(\.\w{8})?)?)$')

# Open files that lock the cache folders of this process, until it ends.
_claimed_folders: dict[str, ExitStack] = {}
_exiting: list[bool] = []
# Python joins the threads that download before it exits, and they may be waiting for a server.
threading._register_atexit(lambda: _exiting.append(True))  # pyright: ignore[reportAttributeAccessIssue]


class StreamError(RuntimeError):
    """Data that cannot be read: which file, what happened, what would be right, in one line."""

    def __init__(self, message: str) -> None:
        # PyTorch puts the traceback before it if it came from a DataLoader worker
        super().__init__(message.rpartition('StreamError: ')[2].strip())


class _InUseError(StreamError):
    """A cache folder of another run."""


@cache
def _first_parent(pid: int) -> int:
    return os.getppid()


def is_shutting_down() -> bool:
    """Whether nobody needs this process's downloads any more."""
    is_worker = multiprocessing.parent_process() is not None
    return bool(_exiting) or (is_worker and os.getppid() != _first_parent(os.getpid()))


def _sleep(seconds: float) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not is_shutting_down():
        time.sleep(min(left, 0.1))


def _is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _advice(error: BaseException) -> str | None:
    """The remedy, if a retry cannot help; else None."""
    if isinstance(error, ClientError):
        status = error.response.get('ResponseMetadata', {}).get('HTTPStatusCode')
        if status == 404:
            return 'it is not there: check bucket, path and split, and that the upload was finished'
        if error.response.get('Error', {}).get('Code') == 'RequestTimeTooSkewed':
            return 'the clock of this machine is wrong: set it'
        if status in (401, 403):
            return 'access is denied: check the credentials and what the bucket allows'
    if isinstance(error, NoCredentialsError):
        return 'there are no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE'
    if isinstance(error, FileNotFoundError):
        return 'it is not there: check path and split'
    if isinstance(error, PermissionError):
        return f'access to {error.filename} is denied'
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return f'{error.filename} is on a read-only file system: set local to a folder that can be written to'
    return None


def _is_transient(error: BaseException) -> bool:
    is_final = _is_full(error) or isinstance(error, FlexibleChecksumError) or _advice(error) is not None
    return isinstance(error, Exception) and not is_final


def _in_one_line(error: BaseException) -> str:
    return f'{type(error).__name__}: {one_line(error)}'


def _pids_that_map(files: Iterable[str]) -> list[int]:
    """Processes on this machine that have one of these files in their memory."""
    wanted = {name.encode() for name in files}
    found = []
    for maps in glob.glob('/proc/[0-9]*/maps'):
        try:
            names = {line.split(None, 5)[-1].strip() for line in Path(maps).read_bytes().splitlines()}
        except OSError:  # it has ended, or is another user's, whose shared memory we cannot use either
            continue
        if names & wanted:
            found.append(int(maps.split('/')[2]))
    return found


def _stale_shared_memory(folder: str) -> dict[int, list[str]]:
    """Shared memory of Streaming datasets that say they use this folder, by the dataset's number."""
    found = {}
    for path in SHARED_MEMORY.glob(f'[0-9]*_{LOCALS}'):
        try:
            locals_, number = _unpack_locals(path.read_bytes())
        except (OSError, ValueError):  # not ours to read, or just being written
            continue
        if folder in locals_ and path.name == _get_path(number, LOCALS):
            found[number] = glob.glob(str(SHARED_MEMORY / _get_path(number, '*')))
    return found


def _is_alive(holder: str) -> bool:
    """Whether a process that :func:`_lock` wrote down is seen from here, and runs."""
    found = re.fullmatch(r'process (\d+) on (.*)', holder)
    if found is None or found[2] != socket.gethostname():
        return False
    try:
        return psutil.Process(int(found[1])).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _lock(path: Path, folder: str, deadline: float) -> Any:
    """Lock a file for this process and its forked workers, and write into it who holds it."""
    # not filelock: forked workers must keep the lock of a killed parent, and an error names the holder
    file = path.open('a+')
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            file.seek(0)
            holder = file.read()
            # of one that was killed, the workers may hold it for some seconds more
            if time.monotonic() >= deadline or _is_alive(holder):
                raise _InUseError(f'the cache folder {folder} is in use by {holder or "another run"}') from None
            time.sleep(0.1)
        except OSError as error:
            raise StreamError(
                f'{path} cannot be locked ({error}): set local to a folder on a disk of this machine'
            ) from error
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}')
    file.flush()
    return file


def _remove_stale_shared_memory(folder: str, deadline: float) -> None:
    """Remove the shared memory of a killed run, because of which Streaming would refuse the folder."""
    # The folder is locked: no live run of ours uses it. One with Streaming's own streams has the memory mapped.
    # Not Streaming's clean_stale_shared_memory: that also removes the memory of live runs on this machine.
    while number_to_files := _stale_shared_memory(folder):
        pids = _pids_that_map(file for files in number_to_files.values() for file in files)
        if not pids:
            time.sleep(TRACKER_DELAY)
            for number, files in number_to_files.items():
                locks = (_get_path(number, lock) for lock in (BARRIER_FILELOCK, CACHE_FILELOCK))
                for file in (*files, *(os.path.join(gettempdir(), lock) for lock in locks)):
                    Path(file).unlink(missing_ok=True)
            log.info('removed the shared memory of a killed run that used %s', folder)
            return
        if time.monotonic() >= deadline:
            raise _InUseError(f'the cache folder {folder} is in use by process {pids[0]} on {socket.gethostname()}')
        time.sleep(0.1)


def _claim_folder(folder: str) -> None:
    """Reserve a cache folder for this process, once the workers of a killed run have ended."""
    if folder in _claimed_folders:
        return
    deadline = time.monotonic() + CLAIM_TIMEOUT
    os.makedirs(folder, exist_ok=True)
    locks = [Path(folder) / '.lock']
    if SHARED_MEMORY.is_dir():
        # containers may share it without sharing folders or seeing each other's processes
        locks.append(SHARED_MEMORY / f'cpt_algorithms_{os.getuid()}_{get_hash("xxh64", folder.encode())}')
    with ExitStack() as held:  # what is not reserved whole is not reserved
        for path in locks:
            held.enter_context(_lock(path, folder, deadline))
        _remove_stale_shared_memory(folder, deadline)
        for root, _, leaves in os.walk(folder):
            for leaf in filter(PARTIAL.search, leaves):
                os.remove(os.path.join(root, leaf))
        _claimed_folders[folder] = held.pop_all()


def _claim_free_one(local: str, split: str) -> str:
    """Reserve ``local``, or the first of ``local-run2``, ``local-run3``, ... that no other run uses."""
    place, number = local, 1
    while True:
        try:
            _claim_folder(os.path.abspath(os.path.join(place, split)))
            return place
        except _InUseError as error:
            number += 1
            place = f'{local}-run{number}'
            log.warning("%s: two runs would delete each other's shards, so this one caches in %s", error, place)


def stale_cache(cached: Path, content: bytes, source: str) -> str | None:
    """The difference between a cache's ``index.json`` and the source's; None if they hold the same."""
    if cached.read_bytes() == content:
        return None
    return (
        f'the cache folder {cached.parent} holds other data than {source} says: the dataset was replaced since. Empty '
        'the cache folder or set local to another; to train on the old data, if all of it is there, leave remote out'
    )


def _read_or_raise(shard: Reader, error: StreamError, sample: int) -> bytes:
    """Replaces a reader's ``get_sample_data`` after a failed download."""
    try:
        data = type(shard).get_sample_data(shard, sample)  # another worker may have downloaded it
    except FileNotFoundError:
        vars(shard)['get_sample_data'] = partial(_retry_read, shard)
        raise error from None
    vars(shard).pop('get_sample_data', None)
    return data


def _retry_read(shard: Reader, sample: int) -> bytes:
    """A read after the error is a retry; prefetch threads do not get here."""
    vars(shard).pop('get_sample_data', None)
    return shard.get_sample_data(sample)


class ResilientStream(Stream):
    """A stream whose downloads are retried, verified, and never fail silently.

    * Transient faults (no answer, 5xx, resets, truncated bodies) are retried with exponential backoff. Others (not
      found, forbidden, no credentials, disk full) fail at once.
    * A file gets its name in the cache only after its hash matched. Corrupt files are downloaded at most twice more.
      Files that the cache already holds are not verified again.
    * A failed download raises where its first row is read, in the process that reads it; it does not end the epoch, and
      other workers and ranks do not wait for it.
    * A cache folder (``local/split``) belongs to one run on one node at a time; a second run on the same machine caches
      in ``<local>-run2``, and says so. Leftovers of a killed run, in shared memory or half downloaded, are removed.
    * A cache whose index is not the remote's, because the dataset was replaced, is refused.

    Streams without ``remote`` are read where they are, by any number of runs.

    Args:
        cache_limit: That of the dataset, to be checked and named in errors. Default: ``None``.
        download_retry: Retries after the first attempt, as in Streaming; with 8 a server may be gone for 75 s.
        validate_hash: A hash algorithm that the index offers, or ``False`` for none. Default: ``None``, the fastest
            that the index offers; none, and said in the log, if it offers none.
        stream: Streaming's own: ``remote``, ``local``, ``split``, ``download_timeout``, ``keep_zip``, ...

    Raises:
        StreamError: If the data cannot be read, or the cache holds other data than the remote.

    Cost: the index is downloaded at each start. Hashing a downloaded file, about 0.1 ms per MB, and waiting until it is
    on disk, both in the background.
    """

    def __init__(
        self, *, cache_limit: int | str | None = None, validate_hash: str | bool | None = None, **stream: Any
    ) -> None:
        if stream.get('remote') and not stream.get('local'):
            # Streaming's own choice must not be there yet, and no restart would find it
            name = f'streaming_{os.getuid()}_{get_hash("xxh64", stream["remote"].encode())}'
            stream['local'] = os.path.join(gettempdir(), name)
        super().__init__(**stream)
        self.local = os.path.abspath(self.local)  # as files in it are listed
        self.cache_limit = bytes_to_int(cache_limit) if cache_limit else None
        # Streaming's validate_hash stays unset: it would validate files again under their final names
        self._wanted_hash = validate_hash
        self._process = os.getpid()

    def apply_default(self, default: dict) -> None:
        """As Streaming, but ``validate_hash`` of the dataset."""
        super().apply_default({**default, 'validate_hash': None})
        if self._wanted_hash is None:
            self._wanted_hash = default['validate_hash']

    @property
    def is_cache(self) -> bool:
        """Whether what lies in ``local`` is a copy."""
        return bool(self.remote) and self.remote != self.local

    @property
    def folder(self) -> str:
        """Where the files lie here."""
        return os.path.abspath(os.path.join(self.local, self.split))

    def claim(self, world: World) -> None:
        """Reserve a cache folder for this run, and see that its index is the remote's. All ranks call it at once."""
        if self.is_cache and world.is_local_leader:
            self.local = _claim_free_one(self.local, self.split)
            index = Path(self.folder, get_index_basename())
            if not index.exists():
                self._download_file(index.name)
            else:
                now = Path(self._download_file(index.name, f'{index.name}.tmp'))
                problem = stale_cache(index, now.read_bytes(), os.path.join(self.remote or '', self.split, index.name))
                now.unlink()
                if problem:
                    raise StreamError(problem)
        if dist.is_available() and dist.is_initialized():  # the ranks of a node share its leader's
            of_ranks: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(of_ranks, self.local)
            self.local = of_ranks[world.rank - world.rank_of_node]

    def check_hashes(self, offered: Iterable[Sequence[str]]) -> None:
        """Refuse a ``validate_hash`` that the index does not offer for each shard."""
        if not self.is_cache or self._wanted_hash is False:
            return
        for algorithms in offered:
            if self._wanted_hash and self._wanted_hash not in algorithms:
                raise ValueError(
                    f'validate_hash={self._wanted_hash}, and the index in {self.folder} offers '
                    f'{", ".join(algorithms) or "none"}; leave it out to use what is offered'
                )
            if not algorithms:
                log.warning('%s has no hashes: what is downloaded cannot be validated', self.folder)
                return

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        """As Streaming, after the folder is claimed and hashes and cache limit are checked."""
        self.claim(world)
        shards = super().get_shards(world, allow_unsafe_types)
        self.check_hashes([shard.hashes for shard in shards])
        needed = self.get_index_size() + 4 * max((shard.get_max_size() for shard in shards), default=0)
        if self.cache_limit and self.cache_limit < needed:
            raise ValueError(
                f'cache_limit={self.cache_limit:,} bytes is too small for {self.folder}: set {needed:,} at least'
            )
        return shards

    def prepare_shard(self, shard: Reader) -> int:
        """Download, verify and decompress a shard, if need be.

        Does not raise: Streaming treats an error in its prefetch threads as the end of the data, and other workers wait
        for the shard for ever. The error is raised where a row of the shard is read.
        """
        if 'get_sample_data' in vars(shard):  # it failed; Streaming asks again for each row that it reads ahead
            return 0
        try:
            return super().prepare_shard(shard)
        except Exception as error:  # of any kind
            failure = error if isinstance(error, StreamError) else self._failure(shard.file_pairs[0][0].basename, error)
            log.debug('download failed', exc_info=error)
            vars(shard)['get_sample_data'] = partial(_read_or_raise, shard, failure)
            return 0

    def _prepare_shard_part(
        self, raw_info: FileInfo, zip_info: FileInfo | None = None, compression: str | None = None
    ) -> int:
        delta = 0
        if not any(os.path.isfile(os.path.join(self.folder, info.basename)) for info in (raw_info, zip_info) if info):
            wanted = zip_info or raw_info
            self._fetch(wanted.basename, wanted)
            delta = wanted.bytes
        try:
            return delta + super()._prepare_shard_part(raw_info, zip_info, compression)  # finds it there
        except Exception as error:
            Path(self.folder, f'{raw_info.basename}.tmp').unlink(missing_ok=True)
            if zip_info and self.is_cache and not _is_full(error):  # or it would be found again
                Path(self.folder, zip_info.basename).unlink(missing_ok=True)
            raise self._failure((zip_info or raw_info).basename, error) from error

    def _download_file(self, from_basename: str, to_basename: str | None = None) -> str:
        """Streaming's name for it; the index comes this way."""
        return self._fetch(from_basename, None, to_basename)

    def _fetch(self, basename: str, info: FileInfo | None, to_basename: str | None = None) -> str:
        """Download a file and verify it; only a complete one gets its name."""
        source = os.path.join(self.remote or self.local, self.split, basename)
        path = os.path.join(self.folder, to_basename or basename)
        part = f'{path}.part'
        problem = None
        for _ in range(1 + CORRUPT_RETRY):
            try:
                self._download(source, part)
                problem = self._find_damage(part, info)
                if problem is None:
                    with open(part, 'rb') as file:
                        os.fsync(file.fileno())
                    os.replace(part, path)
                    return path
            except FlexibleChecksumError as error:  # S3's own
                problem = str(error)
            except Exception as error:
                raise self._failure(basename, error, 1 + self.download_retry) from error
            finally:
                Path(part).unlink(missing_ok=True)
            log.warning('%s arrived corrupt (%s); downloading it again', source, problem)
        raise StreamError(
            f'{source} is corrupt: {problem}, after {1 + CORRUPT_RETRY} downloads. Upload it again; if the dataset was '
            f'replaced since this run started, empty the cache folder {self.folder}, whose index.json is older'
        )

    def _download(self, source: str, part: str) -> None:
        """Download, with retries."""

        def tried(state: RetryCallState) -> None:
            assert state.outcome is not None and state.next_action is not None
            log.warning(
                '%s: attempt %d of %d failed, the next in %.0f s: %s',
                source, state.attempt_number, 1 + self.download_retry, state.next_action.sleep,
                _in_one_line(state.outcome.exception() or AssertionError()),
            )  # fmt: skip

        def once() -> None:
            Path(part).unlink(missing_ok=True)  # or it would be taken for downloaded
            if self._process != os.getpid():  # forked workers would all talk through one inherited connection
                self._downloader.clean_up()
                self._process = os.getpid()
            try:
                self._downloader.download(source, part, self.download_timeout)
            except Exception:
                self._downloader.clean_up()  # the next attempt is made on a new connection
                raise

        Retrying(
            retry=retry_if_exception(_is_transient),
            stop=lambda state: stop_after_attempt(1 + self.download_retry)(state) or is_shutting_down(),
            wait=wait_exponential_jitter(initial=FIRST_WAIT, max=LONGEST_WAIT),
            sleep=_sleep,
            before_sleep=tried,
            reraise=True,
        )(once)

    def _find_damage(self, part: str, info: FileInfo | None) -> str | None:
        """How a downloaded file is damaged; None if it is not."""
        data = Path(part).read_bytes()
        if info is None:  # the index
            try:
                json.loads(data)
            except ValueError as error:
                return f'it is no JSON, {error}'
            return None
        if self._wanted_hash is False:
            return None
        if len(data) != info.bytes:
            return f'it has {len(data):,} bytes, and the index says {info.bytes:,}'
        offered = [*(name for name in HASHES if name in info.hashes), *filter(is_hash, info.hashes)]
        for algorithm in [str(self._wanted_hash)] if self._wanted_hash else offered[:1]:
            if (found := get_hash(algorithm, data)) != (right := info.hashes[algorithm]):
                return f'its {algorithm} is {found}, and the index says {right}'
        return None

    def _failure(self, basename: str, error: Exception, attempts: int = 1) -> StreamError:
        """The one line a user gets."""
        if isinstance(error, StreamError):
            return error
        source = os.path.join(self.remote or self.local, self.split, basename)
        if _is_full(error):
            disk = shutil.disk_usage(self.folder)
            limit = 'none' if self.cache_limit is None else f'{self.cache_limit:,} bytes'
            return StreamError(
                f'no space for {source} in the cache folder {self.folder}: its disk of {disk.total:,} bytes has '
                f'{disk.free:,} left, and cache_limit is {limit}. Make room, lower cache_limit, or set local to a '
                'folder on a larger disk'
            )
        if advice := _advice(error):
            return StreamError(f'{source} cannot be downloaded: {advice} ({_in_one_line(error)})')
        return StreamError(
            f'{source} cannot be read, after {attempts} attempts: {_in_one_line(error)}. When the server is there, run '
            'again: training goes on from the latest checkpoint. A higher download_retry waits longer'
        )
