# SPDX-License-Identifier: Apache-2.0
"""``replay_text``: new data mixed with a little old data, exactly, on MosaicML Streaming."""

import inspect
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from composer.core.data_spec import DataSpec
from llmfoundry import registry
from llmfoundry.data.text_data import StreamingTextDataset
from llmfoundry.data.utils import get_text_collator, validate_ds_replication
from llmfoundry.utils.registry_utils import construct_from_registry
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from cpt_algorithms.keys_read import keys_read
from cpt_algorithms.replay.consumed import read_consumed, read_positions
from cpt_algorithms.replay.dataset_numbers import unique_shm_prefixes
from cpt_algorithms.replay.functional import (
    DEFAULT_BLOCK_SIZE,
    MixedSequence,
    StreamOrder,
    check_budget,
    exact_fraction,
    worker_slots,
)
from cpt_algorithms.replay.labels import label_every_token
from cpt_algorithms.replay.lazy_dataset import LazyStreamingDataset
from cpt_algorithms.replay.mix import Mix, OldStream, Stream, read_mix
from cpt_algorithms.replay.streams import ResilientStream, StreamError
from cpt_algorithms.validation import check_keys, differences

__all__ = ['ReplayTextDataset', 'build_replay_text_dataloader']

# Added to the seed of old streams read in an order of their own: any constant that is not 0 will do.
FRESH_SHUFFLE = 1_000_003
# Slots a worker turns into sample ids at once.
CHUNK = 4096


class _Work:
    """This worker's sample ids in reading order, computed a chunk at a time: what Streaming takes for an array."""

    def __init__(self, sequence: MixedSequence, num_samples: int, **where: int) -> None:
        self._sequence = sequence
        self._num_samples = num_samples
        self._where = where
        # Streaming's download, ready and yield loops each read at a place of their own
        self._chunk = lru_cache(maxsize=6)(self._make_chunk)

    def _make_chunk(self, chunk: int) -> NDArray[np.int64]:
        first = chunk * CHUNK
        indices = np.arange(first, min(first + CHUNK, self._num_samples))
        return self._sequence(worker_slots(indices, **self._where))

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> np.int64:
        chunk, row = divmod(index, CHUNK)
        return self._chunk(chunk)[row]


class ReplayTextDataset(StreamingTextDataset, LazyStreamingDataset):
    r"""New data with a fixed share of old data in every batch (compute-equivalent replay).

    After any number of samples N, the old streams together have given :math:`fN` and old stream j :math:`f v_j N`,
    each to within one sample, for any fraction and batch size. New samples are each read once per pass, in shuffled
    order; replay follows the pre-training order, or one of its own. The sequence of global batches is a function of
    the slot number alone: it is the same for any number of nodes, ranks and workers, and after resuming anywhere.

    An epoch is one pass over the new data, in full global batches: rounded down with ``drop_last`` and up without.
    Either way nothing is lost: the next epoch goes on exactly where this one ended.

    Several ``new`` streams are read as one dataset, shuffled together.

    Cost: no epoch is laid out; starting and resuming take the time to read the shard lists and 60 bytes per shard. Each
    order that is being read keeps about 40 bytes per sample of one shuffle block, 10 MB at the default.

    Args:
        tokenizer: HF tokenizer; only used if the shards hold ``text`` and not ``tokens``.
        max_seq_len: Tokens per sample.
        new: One stream (``remote``, ``local``, ``split`` and Streaming's download options), or several named ones.
        replay: ``{fraction, streams, order}``. ``fraction``: share of every batch from earlier datasets, in [0, 1).
            ``streams``: ``{name: stream}``, each with an optional ``weight`` (Default: ``1``); ``only_seen_by``, a
            checkpoint: only what its run had read by then is replayed, in its order (``pretraining``, with that run's
            shuffle) or in another; or ``stand_in_for``, a text that says for which unknown data this stands. Fraction
            and weights may change: :func:`~cpt_algorithms.replay.functional.lines_of`. ``order``:
            ``pretraining`` (the order in which this loader read that dataset when it was ``new`` on its own, under
            the same ``shuffle``, ``shuffle_seed`` and ``shuffle_block_size``; the paper's setting) or ``shuffled``
            (a fresh one). Default: ``pretraining``. ``None``: no replay. Default: ``None``.
        batch_size: Samples per rank and batch.
        drop_last: Whether an epoch's number of batches is rounded down (else up). Default: ``True``.
        shuffle: Whether to shuffle; else datasets are read in their own order. Default: ``False``.
        shuffle_seed: Seed of the shuffle. Default: ``9176``.
        shuffle_block_size: Samples within which the shuffle mixes shards. Default: ``1 << 18``.
        max_passes: How many times the stage's budget may read a dataset, old or new. Default: ``1``.
        resume_after: A checkpoint: what its run has read of the same data, in the same role, is not read again; each
            dataset goes on behind it (a branch). The fraction and the weights may differ. Default: ``None``.
        token_encoding_type: Of tokens that were stored as bytes. Default: ``'int64'``.
        kwargs: Streaming's own: ``cache_limit``, ``predownload``, ``download_retry``, ``download_timeout``,
            ``validate_hash``, ``keep_zip``, ``allow_unsafe_types``, ``replication``.

    Raises:
        ValueError: If a key is unknown, the fraction or a weight is out of range, two streams share a name, or the
            new data does not fill one global batch, rows were packed to another length, ``only_seen_by`` is no
            checkpoint of a run that learned that dataset, or ``resume_after`` is one that read this data in another
            order.

    Source: Ibrahim et al. 2024, section 4.2 (compute-equivalent replay).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        max_seq_len: int,
        new: Mapping[str, Any],
        replay: Mapping[str, Any] | None = None,
        batch_size: int = 1,
        drop_last: bool = True,
        shuffle: bool = False,
        shuffle_seed: int = 9176,
        shuffle_block_size: int | None = None,
        max_passes: float = 1,
        resume_after: str | None = None,
        token_encoding_type: str = 'int64',
        **kwargs: Any,
    ) -> None:
        mix = read_mix(new, replay, resume_after)
        streams = [
            ResilientStream(cache_limit=kwargs.get('cache_limit'), **stream.keywords)
            for stream in (*mix.new.values(), *mix.old.values())
        ]
        LazyStreamingDataset.__init__(
            self,
            streams,
            batch_size,
            shuffle=shuffle,
            shuffle_seed=shuffle_seed,
            shuffle_block_size=int(shuffle_block_size or DEFAULT_BLOCK_SIZE),
            **kwargs,
        )
        # what StreamingTextDataset reads rows with
        self.tokenizer = tokenizer  # pyright: ignore[reportAttributeAccessIssue]
        self.max_seq_len = max_seq_len
        self.token_encoding_type = token_encoding_type
        self._check_row_length()
        self.max_passes = exact_fraction('train_loader.dataset.max_passes', max_passes)
        self.names = ['new', *mix.old]
        samples = [index.samples for index in self.indexes]
        new_sizes = samples[0] if len(mix.new) == 1 else np.concatenate(samples[: len(mix.new)])
        seed = shuffle_seed if shuffle else None
        orders = [StreamOrder(new_sizes, seed, int(self.shuffle_block_size or 0))]
        orders += [self._old_order(mix, name, stream) for stream, name in enumerate(mix.old, start=len(mix.new))]
        self.sequence = MixedSequence(mix.interleaving, orders)

        self.global_batch_size = batch_size * self._parallel_rank_world.num_ranks
        self.slots_per_pass = mix.interleaving.slots_in_one_pass(self.sequence.sizes[0])
        whole, rest = divmod(self.slots_per_pass, self.global_batch_size)
        self.num_batches = whole + (rest > 0 and not drop_last)
        if not self.num_batches:
            raise ValueError(
                f'the new data has {self.sequence.sizes[0]:,} samples of {max_seq_len} tokens, too few for one global '
                f'batch of {self.global_batch_size}: prepare more data or lower global_train_batch_size'
            )
        self.mix = json.dumps(
            {
                'fraction': mix.fraction,
                'order': mix.order,
                **({'interleaving': 'tree'} if len(mix.old) > 1 else {}),  # before, streams came in another order
                'shuffle': bool(shuffle),
                'shuffle_seed': shuffle_seed,
                'shuffle_block_size': self.shuffle_block_size,
                'max_seq_len': max_seq_len,
                'global_batch_size': self.global_batch_size,
                'drop_last': drop_last,
                **self._describe_streams('new', mix.new, 0),
                **self._describe_streams('replay', mix.old, len(mix.new)),
            }
        )
        if resume_after is not None:
            read = read_positions('train_loader.dataset.resume_after', resume_after, self.mix)
            self.sequence = MixedSequence(mix.interleaving, orders, [read.get(name, 0) for name in self.names])
            self.mix = json.dumps({**json.loads(self.mix), 'read before': json.dumps(read)})

    def _old_order(self, mix: Mix, name: str, stream: int) -> StreamOrder:
        index, block_size = self.indexes[stream], int(self.shuffle_block_size or 0)
        seed = self.shuffle_seed if self.shuffle else None
        fresh = self.shuffle_seed + FRESH_SHUFFLE if mix.order == 'shuffled' else None
        if (checkpoint := mix.old[name].only_seen_by) is None:
            return StreamOrder(index.samples, seed if fresh is None else fresh, block_size)
        where = f'train_loader.dataset.replay.streams.{name}.only_seen_by'
        consumed = read_consumed(where, checkpoint, index.digest)
        if not consumed.samples:
            raise ValueError(f'{where}={checkpoint}: that run had read nothing yet')
        return StreamOrder(index.samples, consumed.seed, consumed.block_size, consumed.samples, fresh)

    def _describe_streams(self, role: str, named: Mapping[str, Stream], first: int) -> dict[str, str]:
        """Identity of each stream by its shards' sizes and hashes: moved data is still the same data."""
        described = {}
        for stream, (name, given) in enumerate(named.items(), start=first):
            weight = f', weight {given.weight}' if isinstance(given, OldStream) else ''
            digest = self.indexes[stream].digest
            described[f'{role}.{name}'] = f'{self.samples_per_stream[stream]:,} samples ({digest}){weight}'
            order = self.sequence.orders[stream - first + 1] if role == 'replay' else None
            if order is not None and order.limit is not None:
                read = f'the first {order.limit:,} of seed {order.seed}, block {order.block_size}'
                described[f'{role}.{name}'] += f', only {read}, which an earlier run has read'
        return described

    def _check_row_length(self) -> None:
        """Packed rows of another length would be cut, or count for more tokens than they have."""
        for length in {length for index in self.indexes for length in index.row_lengths} - {None, self.max_seq_len}:
            raise ValueError(
                f'train_loader.dataset.max_seq_len={self.max_seq_len}, but the data was packed to rows of '
                f'{length} tokens: set max_seq_len to {length}, or prepare the data again'
            )

    def _read_binary_tokenized_sample(self, sample: dict[str, Any]) -> torch.Tensor:
        """A row, which llm-foundry would cut; not every converter says in the index how long its rows are."""
        tokens = sample['tokens']
        size = (
            tokens.size
            if isinstance(tokens, np.ndarray)
            else len(tokens) // np.dtype(self.token_encoding_type).itemsize
        )
        if size != self.max_seq_len:
            raise StreamError(
                f'train_loader.dataset.max_seq_len={self.max_seq_len}, but the data holds a row of {size} tokens: set '
                f'max_seq_len to {size}, or prepare the data again'
            )
        return super()._read_binary_tokenized_sample(sample)

    def __len__(self) -> int:
        """Samples per rank and epoch."""
        return self.num_batches * self.global_batch_size // self._parallel_rank_world.num_ranks

    @property
    def is_packed(self) -> bool:
        """Whether all rows have the same number of tokens, and not what becomes of a text."""
        return all(None not in index.row_lengths for index in self.indexes)

    def check_budget(self, num_samples: int) -> None:
        """Refuse a budget, new and old, that would read a dataset more than ``max_passes`` times."""
        sizes = dict(zip(self.names, self.sequence.sizes, strict=True))
        before = dict(zip(self.names, self.sequence.starts, strict=True))
        check_budget(num_samples, self.sequence.interleaving, sizes, self.max_passes, self.max_seq_len, before)

    def _get_work(self, epoch: int, sample_in_epoch: int) -> _Work:  # pyright: ignore
        world = self._parallel_worker_world
        self.check_cache_limit_for(self._unique_worker_world.workers_per_node)
        samples = self.num_batches * self.global_batch_size
        batches = (samples - sample_in_epoch) // self.global_batch_size
        mine = len(range(world.worker_of_rank, batches, world.workers_per_rank))
        return _Work(
            self.sequence,
            mine * int(self.batch_size or 1),
            first_slot=epoch * samples + sample_in_epoch,
            device_batch_size=int(self.batch_size or 1),
            rank=world.rank,
            num_ranks=world.num_ranks,
            worker=world.worker_of_rank,
            num_workers=world.workers_per_rank,
        )

    def on_exception(self, future: Future) -> None:
        """Keep what a background thread died of; Streaming only logs it."""
        # the first: the other threads then end with errors of their own
        self._background_error = getattr(self, '_background_error', None) or future.exception()
        super().on_exception(future)

    def _each_sample_id(self, it: Any) -> Iterator[int]:
        yield from super()._each_sample_id(it)
        if self._event.is_set():  # Streaming would let the epoch end here
            error = getattr(self, '_background_error', None)
            raise StreamError(f'reading ahead failed: {type(error).__name__}: {error}') from error

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Streaming's state, and as JSON, a leaf each in sharded checkpoints, the mix and the samples read of each."""
        state = super().state_dict(num_samples, from_beginning)
        slots = max(state['epoch'], 0) * self.num_batches * self.global_batch_size + state['sample_in_epoch']
        counts = self.sequence.interleaving.counts(slots)
        consumed = {name: start + n for name, start, n in zip(self.names, self.sequence.starts, counts, strict=True)}
        return {**state, 'mix': self.mix, 'consumed': json.dumps(consumed)}

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Go on where the state was saved; refuse one of another mix, naming what changed."""
        mix = obj.get('mix')
        if mix is None:
            raise ValueError(
                'the checkpoint was saved by another train loader than replay_text; a new stage must not load the '
                "parent's dataset state: set load_weights_only: true, or add 'state/dataset_state' to "
                'load_ignore_keys'
            )
        if changed := differences(json.loads(mix), json.loads(self.mix)):
            raise ValueError(
                'the data mix is not the one this run was saved with (' + '; '.join(changed) + '). '
                'Restore it to resume, or start a new stage from the checkpoint under another run_name and save_folder'
            )
        super().load_state_dict({key: value for key, value in obj.items() if key not in ('mix', 'consumed')})


DATASET_KEYS = (
    set(inspect.signature(ReplayTextDataset).parameters) - {'tokenizer', 'batch_size', 'drop_last', 'kwargs'}
    | {'cache_limit', 'predownload', 'download_retry', 'download_timeout', 'validate_hash', 'keep_zip'}
    | {'allow_unsafe_types', 'replication', 'token_encoding_type'}
)
# read by what llm-foundry makes batches with, which marks where packed documents end
COLLATOR_KEYS = (
    keys_read(validate_ds_replication, 'dataset_cfg') | keys_read(get_text_collator, 'dataset_cfg')
) - DATASET_KEYS


def build_replay_text_dataloader(
    tokenizer: PreTrainedTokenizerBase | None,
    device_batch_size: int,
    dataset: dict[str, Any],
    drop_last: bool = True,
    num_workers: int = 0,
    pin_memory: bool = True,
    prefetch_factor: int | None = 2,
    persistent_workers: bool = True,
    timeout: float = 0,
) -> DataSpec:
    """``train_loader: {name: replay_text, dataset: ...}`` for llm-foundry.

    Args:
        tokenizer: The run's tokenizer.
        device_batch_size: Samples per rank and batch.
        dataset: Keywords of :class:`ReplayTextDataset`, and what llm-foundry's collator reads (``eos_token_id``, ...).
        drop_last: See :class:`ReplayTextDataset`. Default: ``True``.
        num_workers: As in PyTorch, here and below; without workers the next two are ignored. Default: ``0``.
        prefetch_factor: Default: ``2``.
        persistent_workers: Default: ``True``.
        pin_memory: Default: ``True``.
        timeout: Default: ``0``.
    """
    unique_shm_prefixes()
    check_keys('train_loader.dataset', dataset, DATASET_KEYS | COLLATOR_KEYS)
    if tokenizer is None:
        raise ValueError('tokenizer is missing: train_loader replay_text needs one to collate batches')
    dataset = dict(dataset)
    dataset['replication'], batch_size = construct_from_registry(
        name='dataset_replication_validator',
        registry=registry.dataset_replication_validators,
        partial_function=False,
        kwargs={'dataset_cfg': dataset, 'tokenizer': tokenizer, 'device_batch_size': device_batch_size},
    )
    options = {key: value for key, value in dataset.items() if key not in COLLATOR_KEYS}
    replay_dataset = ReplayTextDataset(tokenizer=tokenizer, batch_size=batch_size, drop_last=drop_last, **options)
    collate_fn, loader_batch_size = construct_from_registry(
        name='text_collator',
        registry=registry.collators,
        partial_function=False,
        kwargs={
            'dataloader_cfg': {'name': 'replay_text', 'dataset': dataset, 'drop_last': drop_last},
            'tokenizer': tokenizer,
            'dataset_batch_size': batch_size,
        },
    )
    loader = DataLoader(
        replay_dataset,
        collate_fn=collate_fn,
        batch_size=loader_batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor if num_workers else None,
        persistent_workers=persistent_workers and num_workers > 0,
        timeout=timeout,
    )
    label_every_token(loader)
    return construct_from_registry(
        name='data_spec',
        registry=registry.data_specs,
        partial_function=False,
        kwargs={'dl': loader, 'dataset_cfg': dataset},
    )
