# SPDX-License-Identifier: Apache-2.0
"""Whether the data of a stage is there, and enough."""

import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlparse

from llmfoundry.utils.builders import build_callback
from streaming.base.storage.download import DOWNLOADER_MAPPINGS

from cpt_algorithms.duration import Duration
from cpt_algorithms.files import (
    StorageError,
    check_writable,
    fetch,
    is_remote,
    size_of,
)
from cpt_algorithms.replay.consumed import read_consumed
from cpt_algorithms.replay.functional import check_budget, exact_fraction
from cpt_algorithms.replay.mix import Stream
from cpt_algorithms.replay.shard_index import ShardIndex
from cpt_algorithms.replay.streams import stale_cache
from cpt_algorithms.schedulers.phases import phases_of
from cpt_algorithms.stage.stage import (
    Stage,
)
from cpt_algorithms.validation import (
    ConfigError,
    Section,
    nearest,
)
from cpt_algorithms.weight_averaging.averaged_weights import AveragedWeights

__all__ = ['check_data', 'check_ends', 'sizes_of']

log = logging.getLogger(__name__)

# A larger index of a dataset in object storage, of some 200,000 shards, is not downloaded to be looked at.
_LARGEST_INDEX = 2**26


def _check_remote(key: str, remote: str) -> None:
    """Refuse a place that Streaming can have nothing from."""
    scheme, netloc = urlparse(remote)[:2]
    known = [f'{each}://' for each in DOWNLOADER_MAPPINGS if each]
    if scheme not in DOWNLOADER_MAPPINGS:
        raise ValueError(f'{key}={remote}: Streaming reads nothing from {scheme}://; {nearest(f"{scheme}://", known)}')
    if scheme not in ('', 'dbfs', 'alipan') and not netloc:
        raise ValueError(f'{key}={remote} names no bucket: {scheme}://BUCKET/FOLDER')


def _index_of(stream: Stream) -> ShardIndex | None:
    """The index; None if only training can tell: a store that is not Composer's, or a very large index."""
    split = stream.split or ''
    here = Path(stream.local, split, 'index.json') if stream.local else None
    if not stream.remote or stream.remote == stream.local:
        if here is None or not os.path.exists(here):  # a split may be too long a name to ask the path
            raise FileNotFoundError(here)
        return ShardIndex.read(here)
    there = '/'.join(part for part in (stream.remote.rstrip('/'), split, 'index.json') if part)
    cached = here if here is not None and os.path.exists(here) else None
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(there)
        if is_remote(there):
            if not there.startswith(('s3://', 'gs://', 'oci://', 'azure://')):
                return ShardIndex.read(cached) if cached else None
            try:
                size = size_of(there)
                if size > _LARGEST_INDEX and (cached is None or cached.stat().st_size == size):
                    return ShardIndex.read(cached) if cached else None
                copy = Path(folder, 'index.json')
                fetch(there, copy)
            except FileNotFoundError:
                raise FileNotFoundError(there) from None
        elif not os.path.exists(copy):
            raise FileNotFoundError(there)
        if cached and (problem := stale_cache(cached, copy.read_bytes(), there)):
            raise ValueError(problem)
        return ShardIndex.read(copy)


def sizes_of(streams: Mapping[str, Stream], where: str, max_seq_len: int | None = None) -> dict[str, int | None]:
    """Samples of each stream; None if that is not known here."""
    sizes: dict[str, int | None] = {}
    for name, stream in streams.items():
        if stream.remote:
            _check_remote(f'{where}.{name}.remote', stream.remote)
        if stream.remote and stream.local not in (None, stream.remote):
            check_writable(
                f'{where}.{name}.local',
                os.path.join(stream.local, stream.split or ''),
                f'what is read from remote={stream.remote} is kept there. Name a folder on a disk of this machine, '
                'or, if all of the data is there already, leave remote out',
            )
        try:
            index = _index_of(stream)
        except FileNotFoundError as error:
            raise ValueError(f'{where}.{name}: there is no dataset; looked for {error}') from None
        except StorageError as error:
            raise type(error)(f'{where}.{name}: {error}') from None
        except ValueError as error:
            raise ValueError(f'{where}.{name}: {error}') from None
        sizes[name] = None if index is None else int(index.samples.sum())
        if sizes[name] == 0:
            raise ValueError(f'{where}.{name}: the dataset is empty')
        lengths = {max_seq_len} if index is None else index.row_lengths
        if max_seq_len is not None and not any(lengths):
            log.warning('%s.%s: rows of text are not full; a budget in tokens is planned as if they were', where, name)
        if max_seq_len is not None and (lengths := lengths - {None, max_seq_len}):
            raise ValueError(
                f'{where}.{name}: max_seq_len={max_seq_len}, but the data was packed to rows of '
                f'{lengths.pop()} tokens; set max_seq_len to that, or prepare the data again'
            )
    return sizes


def check_data(stage: Stage, parent_is_there: bool) -> None:
    """Refuse a pass that is cut short, and a budget that ``replay_text`` could not be read for.

    Args:
        stage: The stage.
        parent_is_there: Whether checkpoints of earlier stages must be there.

    Raises:
        ValueError: If data is missing, of another form, or too little.
    """
    mix, dataset = stage.mix, stage.train_loader.dataset
    if stage.train_subset_num_batches != -1:
        raise ValueError(
            f'train_subset_num_batches={stage.train_subset_num_batches}: of a pass that is cut short nobody knows what '
            'was read; leave it out, and say how much is trained in max_duration'
        )
    if mix is None:
        return
    length = dataset.max_seq_len
    if length != stage.max_seq_len:
        raise ValueError(f'train_loader.dataset.max_seq_len={length} and max_seq_len={stage.max_seq_len} must be equal')
    new_sizes = sizes_of(mix.new, 'train_loader.dataset.new', length)
    old_sizes = sizes_of(mix.old, 'train_loader.dataset.replay.streams', length)
    if None in [*new_sizes.values(), *old_sizes.values()]:
        log.warning('not all data can be looked at from here: whether there is enough is checked when training starts')
        return
    sizes = {'new': sum(size or 0 for size in new_sizes.values()), **{k: v or 0 for k, v in old_sizes.items()}}
    for name, stream in mix.old.items():
        if (checkpoint := stream.only_seen_by) is None:
            continue
        where = f'train_loader.dataset.replay.streams.{name}.only_seen_by'
        index = Path(stream.local or stream.remote or '', stream.split or '', 'index.json')
        # of what is still to be trained, or elsewhere, the loader itself finds out
        if index.exists() and Path(checkpoint).exists():
            # not together: another node may have no index yet
            read = read_consumed(where, checkpoint, ShardIndex.read(index).digest, together=False).samples
            sizes[name] = min(sizes[name], read)
        elif not is_remote(checkpoint) and parent_is_there and not Path(checkpoint).exists():
            raise ValueError(f'{where}={checkpoint} does not exist')
    if stage.batches is None:
        slots = mix.interleaving.slots_in_one_pass(sizes['new'])
        samples = int(stage.max_duration.value) * slots
        phases_of(stage.scheduler.given, stage.max_duration, slots // stage.global_train_batch_size)
        check_ends(stage, samples // stage.global_train_batch_size)
    else:
        samples = stage.batches * stage.global_train_batch_size
    max_passes = exact_fraction('train_loader.dataset.max_passes', dataset.max_passes)
    check_budget(samples, mix.interleaving, sizes, max_passes, stage.max_seq_len)


def check_ends(stage: Stage, batches: int) -> None:
    """Refuse what would come after the end of the stage, and so never, without a word."""
    ends, problems = f'and the stage ends after batch {batches}', []
    # in batches, if only now that is known of epochs
    total = Duration(batches, 'ba') if stage.batches is None else stage.max_duration
    for name in ('ema', 'lawa'):
        section: Section | None = getattr(stage.callbacks, name)
        if section is None or section.given.get('resume_after'):  # a branch has its trunk's
            continue
        try:
            average = build_callback(name, section.arguments)
        except (TypeError, ValueError):  # which has been named
            continue
        assert isinstance(average, AveragedWeights)
        first = average.first_update(total, stage.global_train_batch_size, stage.max_seq_len)
        if first > batches:
            problems.append(
                f'callbacks.{name}: with start={average.start}, interval={average.interval} the first average is that '
                f'after batch {first}, {ends}: choose smaller ones, or leave {name} out'
            )
    points = stage.callbacks.branch_points
    if points is not None and max(points.at, default=0) > batches:
        problems.append(f'callbacks.branch_points.at={points.at}, {ends}')
    if problems:
        raise ConfigError(problems)
