# SPDX-License-Identifier: Apache-2.0
"""Mistakes in tokenizer, vocabulary, row length and held-out data that train without an error and spoil the result.

What data was made of is read from the ``manifest.json`` of ``scripts/prepare_data.py``, beside the dataset's folder.
Of all data, whoever made it, a row is looked at.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from llmfoundry.models.mpt import MPTConfig
from streaming import Stream as StreamingStream
from transformers.configuration_utils import PretrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from cpt_algorithms.checkpoints.exports import folder_of_pretrained, newest_export
from cpt_algorithms.compat import why_unknown
from cpt_algorithms.files import StorageError, fetch, is_remote
from cpt_algorithms.formatting import one_line
from cpt_algorithms.preparation.manifest import Manifest, read_manifest
from cpt_algorithms.preparation.tokenizer import hash_tokenizer, stop_tokens
from cpt_algorithms.replay.mix import Stream
from cpt_algorithms.replay.shard_index import ShardIndex
from cpt_algorithms.stage.on_meta import tokenizer_of
from cpt_algorithms.stage.record import read_record
from cpt_algorithms.stage.stage import Loader, Model, Stage, Tokenizer

__all__ = ['find_data_problems']

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Stream:
    """A stream of a YAML.

    Args:
        where: Its key.
        of: Key of its loader.
        loader: The loader.
        stream: The stream.
        folders: Where its shards lie.
        remote: Where they come from, if they are copied.
        cache: Where they are copied to, or read.
        split: Name of these folders.
        root: Folder or URI of its manifest.
        prepared: That manifest; none if there is none of it.
    """

    where: str
    of: str
    loader: Loader
    stream: Stream
    folders: frozenset[str]
    remote: str | None
    cache: str
    split: str
    root: str
    prepared: Manifest | None

    @property
    def trains(self) -> bool:
        return self.of == 'train_loader'


def find_data_problems(stage: Stage, parent_is_there: bool, model_is_there: bool = True) -> Iterator[str]:
    """Find what is wrong with a stage's tokenizer, vocabulary, row length and held-out data.

    Args:
        stage: The stage.
        parent_is_there: Whether to look at the parent's tokenizer.
        model_is_there: Whether to look at the model and the tokenizer. Default: ``True``.

    Yields:
        Problems, each with its key, its value and what would be right.

    Cost: reads the manifests, and the parent's tokenizer, also from object storage; half a second of CPU for a
    vocabulary of 50,000. Of data whose index does not say how long its rows are, the smallest shard is downloaded.
    """
    tokenizer = _load(stage.tokenizer) if model_is_there else None
    ours = cache(lambda: None if tokenizer is None else _hash_of(tokenizer))
    if model_is_there:
        yield from _model_problems(stage, tokenizer)
    if model_is_there and (parent_is_there or not stage.load_path):
        yield from _parent_problems(stage, ours)
    streams = _read_streams(stage)
    yield from _tokenizer_problems(stage.tokenizer, ours, streams)
    yield from _row_problems(streams, stage.model)
    yield from _end_problems(stage, tokenizer, streams)
    yield from _cache_problems(streams)
    yield from _held_out_problems(streams)


def _load(tokenizer: Tokenizer) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a YAML; none if it cannot be loaded, which preflight says."""
    try:
        return tokenizer_of(tokenizer)
    except ValueError:
        return None


def _hash_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """:func:`hash_tokenizer` of a tokenizer; none if it has no fast form."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        try:
            return hash_tokenizer(Path(folder))
        except ValueError as error:
            log.warning('whether it is the tokenizer of the data and of the parent is not known: %s', error)
            return None


def _model_sizes(model: Model) -> tuple[int | None, int | None]:
    """Vocabulary and longest row of a model; none where they are not known."""
    if model.name == 'mpt_causal_lm':
        default = MPTConfig()
        return model.vocab_size or default.vocab_size, model.max_seq_len or default.max_seq_len
    name = model.pretrained_model_name_or_path
    if model.name != 'hf_causal_lm' or name is None:
        return None, None
    try:
        if reason := why_unknown(PretrainedConfig.get_config_dict(name)[0]):
            raise ValueError(reason)
        config = AutoConfig.from_pretrained(name, trust_remote_code=model.given.get('trust_remote_code', True))
    except Exception as error:  # a hub has errors of its own
        raise ValueError(
            f'model.pretrained_model_name_or_path={name}: its configuration cannot be read: {one_line(error)}'
        ) from None
    for key, value in model.config_overrides.given.items():
        if not isinstance(value, Mapping):
            setattr(config, key, value)  # which knows the names that each architecture has for these two
    text = config.get_text_config()
    vocab_size = None if model.given.get('allow_embedding_resizing') else getattr(text, 'vocab_size', None)
    return vocab_size, getattr(text, 'max_position_embeddings', None)


def _model_problems(stage: Stage, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    try:
        vocab_size, longest = _model_sizes(stage.model)
    except ValueError as error:
        yield str(error)
        return
    section = 'model' if stage.model.name == 'mpt_causal_lm' else 'model.config_overrides'
    if tokenizer is not None and vocab_size is not None and len(tokenizer) > vocab_size:
        enlarge = f'{section}.vocab_size to at least {len(tokenizer)}'
        if stage.pretrained_model:  # some are published with tokens of which the text model knows nothing
            enlarge = 'model.allow_embedding_resizing: true'
        yield (
            f'tokenizer={stage.tokenizer.name} has {len(tokenizer):,} tokens, more than the {vocab_size:,} of the '
            f'model: set {enlarge}, or name the tokenizer of the model'
        )
    lengths = {'max_seq_len': stage.max_seq_len}
    lengths |= {f'{where}.dataset.max_seq_len': each.dataset.max_seq_len or 0 for where, each in stage.loaders}
    too_long = {key: value for key, value in lengths.items() if longest is not None and value > longest}
    if too_long:
        key = section + ('.max_seq_len' if section == 'model' else '.max_position_embeddings')
        yield (
            f'{next(iter(too_long))}={next(iter(too_long.values()))} is longer than the model can read: {key} is '
            f'{longest}; set it to {max(too_long.values())}, or prepare data with rows of at most {longest} tokens'
        )


def _parent_problems(stage: Stage, ours: Callable[[], str | None]) -> Iterator[str]:
    try:
        if stage.load_path:
            parent = f'load_path={stage.load_path}'
            place = stage.load_path.rstrip('/')
            found = _tokenizer_of_run(os.path.dirname(place) or '.')
            if found is None and not is_remote(place):  # it may be a link into a run
                found = _tokenizer_of_run(os.path.dirname(os.path.realpath(place)))
        elif name := stage.pretrained_model:
            parent, theirs = f'model.pretrained_model_name_or_path={name}', _load(Tokenizer(name=name))
            if theirs is None:
                folder_of_pretrained(name)  # of one that is not there at all, another check speaks
                yield (
                    f'{parent} has no tokenizer that can be loaded, so nothing tells that it is that of the data: put '
                    'its files (tokenizer.json, tokenizer_config.json) there'
                )
            is_resized = stage.model.given.get('allow_embedding_resizing')
            found = None if theirs is None or is_resized else (_hash_of(theirs), name)
        else:
            return
    except (OSError, ValueError) as error:
        log.info('whether tokenizer is that of the parent is not known: %s', error)
        return
    if found and found[0] and ours() and found[0] != ours():
        yield (
            f'tokenizer={stage.tokenizer.name} is not the tokenizer of the parent, {parent}: the same numbers '
            f'would stand for other text; use {found[1]}, and data prepared with it'
        )


def _tokenizer_of_run(folder: str) -> tuple[str | None, str] | None:
    """Hash of the tokenizer that a run was trained with, and where that lies; none if nothing is known of it."""
    if export := newest_export(folder, 'tokenizer.json'):
        if not is_remote(folder):
            return hash_tokenizer(Path(export)), export
        with tempfile.TemporaryDirectory() as here:
            for name in ('tokenizer.json', 'tokenizer_config.json'):
                fetch(f'{export}/{name}', Path(here) / name)
            return hash_tokenizer(Path(here)), export
    record = read_record(folder)
    tokenizer = None if record is None else _load(record.config.tokenizer)
    return None if record is None or tokenizer is None else (_hash_of(tokenizer), record.config.tokenizer.name)


def _read_streams(stage: Stage) -> list[_Stream]:
    read = cache(read_manifest)
    streams = []
    for where, loader in stage.loaders:
        for name, stream in loader.streams(where).items():
            places = [place.rstrip('/') for place in (stream.remote, stream.local) if place]
            folders = [os.path.join(place, stream.split or '').rstrip('/') for place in places]
            folders = [folder if is_remote(folder) else os.path.realpath(folder) for folder in folders]
            key, split = f'{where}.{name}', os.path.basename(folders[0])
            remote = folders[0] if stream.remote and stream.remote != stream.local else None
            root, dataset = os.path.split(os.path.dirname(folders[0]))
            try:
                prepared = read(root)
            except StorageError as error:
                log.info('%s: its manifest cannot be read: %s', key, error)
                prepared = None
            if prepared is None or dataset not in prepared.datasets:
                log.info('%s: how it was prepared is not known, %s/manifest.json does not say it', key, root)
                prepared = None
            streams.append(
                _Stream(key, where, loader, stream, frozenset(folders), remote, folders[-1], split, root, prepared)
            )
    return streams


def _tokenizer_problems(tokenizer: Tokenizer, ours: Callable[[], str | None], streams: list[_Stream]) -> Iterator[str]:
    hashes = {stream.root: stream.prepared.tokenizer.hash for stream in streams if stream.prepared}
    for root, theirs in hashes.items():
        if ours() and theirs != ours():
            readers = [stream.where for stream in streams if stream.prepared and stream.root == root]
            yield (
                f'tokenizer={tokenizer.name} is not the one that the data of {", ".join(readers)} was made '
                f'with: use {root}/tokenizer, or prepare the data again with --tokenizer {tokenizer.name}'
            )


def _row_problems(streams: list[_Stream], model: Model) -> Iterator[str]:
    """Look at a row of each stream, whoever wrote it: rows that are too long are silently cut."""
    try:
        vocab_size, _ = _model_sizes(model)
    except ValueError:  # already reported
        vocab_size = None
    for stream in streams:
        try:
            packed, row = _look_at(stream.stream)
        except Exception as error:  # of any format and storage; that there is no data at all is said by another check
            log.info('%s: how long its rows are is not known: %r', stream.where, error)
            continue
        reads_rows = stream.loader.name in ('text', 'replay_text')  # others read what they are told to
        if reads_rows and row is not None and not row.keys() & {'tokens', 'text'}:
            yield f'{stream.where}: its rows hold {", ".join(row)}, and llm-foundry reads tokens, or text'
        if row is None or 'text' in row or 'tokens' not in row:  # text is cut and padded by llm-foundry
            tokens = None
        else:
            tokens, kind = row['tokens'], stream.loader.dataset.given.get('token_encoding_type', 'int64')
            if isinstance(tokens, bytes):
                if len(tokens) % np.dtype(kind).itemsize:
                    yield f'{stream.of}.dataset.token_encoding_type={kind} is not that of the data of {stream.where}'
                    continue
                tokens = np.frombuffer(tokens, kind)
        # of replay_text, preflight has said what an index tells
        rows = packed if tokens is None else np.size(tokens)
        length = stream.loader.dataset.max_seq_len
        if length and rows and (rows > length or (stream.trains and rows != length)):
            if not (packed and stream.loader.name == 'replay_text'):
                yield (
                    f'{stream.of}.dataset.max_seq_len={length}, but the data of {stream.where} was packed to rows of '
                    f'{rows} tokens, which would be {"cut" if rows > length else "counted for more than they have"}; '
                    'set it to that, or prepare the data again'
                )
        elif vocab_size and tokens is not None and not stream.prepared and (wrong := _not_in(tokens, vocab_size)):
            yield (
                f'{stream.where}: a row holds token {wrong[0]}, and the model has {vocab_size}: the data was made with '
                f'another tokenizer, or {stream.of}.dataset.token_encoding_type is not that of its bytes'
            )


def _not_in(tokens: Any, vocab_size: int) -> list[int]:
    return [int(token) for token in np.ravel(tokens) if not 0 <= token < vocab_size]


def _look_at(stream: Stream) -> tuple[int | None, dict[str, Any] | None]:
    """Tokens of each row if the index says it, and a row; none where it lies in object storage and the index says it.

    Raises:
        Exception: Of many kinds, if it cannot be read.
    """
    split = stream.split or ''
    places = [place for place in (stream.local, stream.remote) if place]
    here = [place for place in places if not is_remote(place) and (Path(place) / split / 'index.json').exists()]
    with tempfile.TemporaryDirectory() as cache:
        if not here:
            (Path(cache) / split).mkdir(parents=True, exist_ok=True)
            fetch(f'{os.path.join(places[-1], split).rstrip("/")}/index.json', Path(cache) / split / 'index.json')
        place = here[0] if here else cache
        index = ShardIndex.read(Path(place) / split / 'index.json')
        lengths = index.row_lengths
        packed = lengths.pop() if len(lengths) == 1 else None
        if packed and not here:
            return packed, None
        sizes = np.where(index.samples > 0, index.bytes, np.iinfo(np.int64).max)
        number = int(np.argmin(sizes))
        shard = index.reader(number, place, split)
        files = [Path(place) / split / raw.basename for raw, _ in shard.file_pairs]
        if not all(file.exists() for file in files):  # elsewhere, or compressed
            options = {'download_retry': 2, 'download_timeout': 60, 'validate_hash': None, 'keep_zip': False}
            source = StreamingStream(remote=place if here else places[-1], local=cache, split=split, **options)
            shard = index.reader(number, cache, split)
            source.prepare_shard(shard)
        return packed, shard[0]


def _end_problems(stage: Stage, tokenizer: PreTrainedTokenizerBase | None, streams: list[_Stream]) -> Iterator[str]:
    """Documents that begin or end otherwise in other data, or end otherwise than the parent was taught."""
    known = [
        (stream, made.request.eos_text, [made.tokenizer.document_start, made.tokenizer.document_end])
        for stream in streams
        if (made := stream.prepared)
    ]
    for stream, _, ends in known[1:]:
        first, _, wanted = known[0]
        if ends != wanted:
            said = [f'begin with {" ".join(a) or "their text"} and end with {" ".join(b)}' for a, b in (ends, wanted)]
            yield (
                f'{stream.where}: its documents {said[0]}, and those of {first.where} {said[1]}; prepare both with the '
                'same --bos-text and --eos-text'
            )
    name = stage.pretrained_model
    if name is None or tokenizer is None or stage.load_path:
        return
    overrides = stage.model.config_overrides.given
    try:
        stops = stop_tokens(name)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        log.info('where the parent %s stops is not known: %s', name, error)
        return
    if 'eos_token_id' in overrides:
        given = overrides['eos_token_id']
        stops = {'model.config_overrides': [given] if isinstance(given, int) else list(given or ())}
    names: Any = tokenizer  # its subclass has these methods
    words = {file: names.convert_ids_to_tokens(ids) for file, ids in stops.items() if ids}
    said = ' and '.join(f'{" ".join(map(str, each))} ({file})' for file, each in words.items())
    for stream, eos_text, (_, end) in known:
        if words and eos_text is None and not any(end[-1] in each for each in words.values()):
            yield (
                f'{stream.where}: its documents end with {end[-1]}, and the parent, '
                f'model.pretrained_model_name_or_path={name}, stops at {said}: it would unlearn to stop. Prepare the '
                f'data again with one of these as --eos-text, or, if it is meant to stop at {end[-1]}, set '
                f'model.config_overrides.eos_token_id to {names.convert_tokens_to_ids(end[-1])}'
            )
    if words and not known and not any(tokenizer.eos_token in each for each in words.values()):
        log.warning(
            'tokenizer=%s ends a document with %s, and the parent %s stops at %s: look at what the data has',
            stage.tokenizer.name,
            tokenizer.eos_token,
            name,
            said,
        )


def _cache_problems(streams: list[_Stream]) -> Iterator[str]:
    """Streaming wants a folder for each stream of a loader, and for each that is copied."""
    first: dict[str, _Stream] = {}
    for stream in streams:
        other = first.setdefault(stream.cache, stream)
        if other is not stream and (other.of == stream.of or other.remote or stream.remote):
            yield (
                f'{other.where}.local and {stream.where}.local are one folder, {stream.cache}, and one would be read '
                'in place of the other; give each a folder of its own'
            )


def _held_out_problems(streams: list[_Stream]) -> Iterator[str]:
    training = [stream for stream in streams if stream.trains]
    for stream in training:
        if stream.split == 'val':
            yield f'{stream.where}: split=val is held out to judge the model by and must not train it; use split: train'
    for evaluated in streams:
        for trained in training:
            if evaluated.trains:
                continue
            if same := evaluated.folders & trained.folders:
                yield (
                    f'{evaluated.where} and {trained.where} both read {min(same)}: a model must not be judged by what '
                    'it is trained on; evaluate on split: val'
                )
            elif evaluated.split == 'val' and evaluated.prepared and trained.prepared:
                yield from _fraction_problems(evaluated, evaluated.prepared, trained, trained.prepared)


def _fraction_problems(evaluated: _Stream, val: Manifest, trained: _Stream, train: Manifest) -> Iterator[str]:
    """A document is held out if its digest, as a fraction, is below the data's ``val_fraction``."""
    held_out, wanted = val.request.val_fraction, train.request.val_fraction
    apart = val.request.datasets in train.earlier.values() or train.request.datasets in val.earlier.values()
    if held_out > wanted and not apart:
        yield (
            f'{evaluated.where} holds out {held_out:g} of all documents and {trained.where} only '
            f'{wanted:g}: a document is held out for its text, so some of the former may be trained on in '
            f'the latter; prepare both with one --val-fraction, or {evaluated.root} with --earlier {trained.root}'
        )
