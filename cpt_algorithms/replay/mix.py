# SPDX-License-Identifier: Apache-2.0
"""The ``new`` and ``replay`` sections of a YAML, read once: which streams, in which shares. No torch in here."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from pydantic import ConfigDict, model_validator

from cpt_algorithms.replay.functional import Interleaving, lines_of, shares_of
from cpt_algorithms.validation import PathStr, Section, parse_section, short_repr

__all__ = ['DOWNLOAD_RETRY', 'STREAM_KEYS', 'Mix', 'OldStream', 'Stream', 'read_mix', 'row_length']

WHERE = 'train_loader.dataset'
# Attempts after the first: they outlive a server gone for 75 s.
DOWNLOAD_RETRY = 8


class Stream(Section):
    """A dataset in shards: where it lies, and how Streaming downloads it."""

    model_config = ConfigDict(extra='forbid')

    remote: PathStr | None = None
    local: PathStr | None = None
    split: str | None = None
    download_retry: int | None = None
    download_timeout: float | str | None = None  # such as 1m 30s
    validate_hash: str | bool | None = None
    keep_zip: bool | None = None

    @model_validator(mode='after')
    def _is_somewhere(self) -> 'Stream':
        if not (self.remote or self.local):
            raise ValueError('KEY has neither remote nor local: say where the data lies')
        return self

    @cached_property
    def keywords(self) -> dict[str, Any]:
        """The arguments of Streaming's ``Stream``."""
        return {key: getattr(self, key) for key in STREAM_KEYS if key in self.model_fields_set}


STREAM_KEYS = tuple(Stream.model_fields)


class OldStream(Stream):
    """A dataset that is replayed.

    Its ``weight`` among these; ``only_seen_by``, a checkpoint whose run has read what there is to replay; or
    ``stand_in_for``, a text that says in place of which unknown data it is replayed.
    """

    weight: float | str | list[Any] = 1
    only_seen_by: PathStr | None = None
    stand_in_for: str | None = None

    @model_validator(mode='after')
    def _is_one_thing(self) -> 'OldStream':
        if self.only_seen_by and self.stand_in_for:
            raise ValueError(
                'KEY has only_seen_by and stand_in_for: it is what that run read, or stands in for data that is not '
                'known, not both'
            )
        return self


class _Replay(Section):
    model_config = ConfigDict(extra='forbid')

    fraction: float | str | list[Any] = 0
    streams: dict[str, Any] = {}
    order: Literal['pretraining', 'shuffled'] = 'pretraining'


@dataclass(frozen=True)
class Mix:
    """The data of a stage: new and old by name, the share and order of the old, and the source of each slot.

    The fraction is in words, for people and for a restart that compares it.
    """

    new: dict[str, Stream]
    old: dict[str, OldStream]
    fraction: str
    order: str
    interleaving: Interleaving

    @property
    def name(self) -> str:
        """Of the new data."""
        return ' + '.join(self.new)

    @property
    def moves(self) -> bool:
        """Whether shares change."""
        return len(self.interleaving.pieces) > 1

    def counts(self, samples: int) -> dict[str, int]:
        """Samples of the new data and of each old stream among the first ``samples``."""
        return dict(zip([self.name, *self.old], self.interleaving.counts(samples), strict=True))


def read_mix(new: Mapping[str, Any] | None, replay: Mapping[str, Any] | None, resume_after: str | None = None) -> Mix:
    """Read what :class:`~cpt_algorithms.replay.ReplayTextDataset` calls ``new`` and ``replay``.

    Args:
        new: One stream, or a mapping of several named ones.
        replay: ``fraction``, ``streams``, ``order``.
        resume_after: Where a branch goes on. Default: ``None``, it is none.

    Raises:
        ValueError: If a key is unknown, the fraction or a weight is out of range, there is nothing to read, two
            streams share a name, or the mix of a branch changes.
    """
    given = parse_section(_Replay, replay or {}, f'{WHERE}.replay')
    new_streams = _named_streams(Stream, f'{WHERE}.new', new or {})
    old_streams = _named_streams(OldStream, f'{WHERE}.replay.streams', given.streams)
    if not new_streams:
        raise ValueError(f'{WHERE}.new is empty: name the data to learn')
    if shared := sorted(new_streams.keys() & old_streams.keys() | {'new'} & old_streams.keys()):
        raise ValueError(f'stream name {shared[0]!r} is used in both new and replay.streams; names must differ')
    shares = shares_of(given.fraction, {name: stream.weight for name, stream in old_streams.items()})
    if resume_after is not None and len(shares) > 1:
        raise ValueError(
            f'{WHERE}.replay.fraction={given.fraction}: the mix of a branch cannot change; give its replay a fraction '
            'and weights that are numbers'
        )
    fraction = ', then '.join(map(str, lines_of('replay.fraction', given.fraction)))
    return Mix(new_streams, old_streams, fraction, given.order, Interleaving(shares))


def _named_streams(kind: Any, where: str, section: Any) -> dict[str, Any]:
    """``{name: stream}`` of a section that is one stream or a mapping of several."""
    if not isinstance(section, Mapping):
        raise ValueError(f'{where}={short_repr(section)} must be a mapping')
    if 'remote' in section or 'local' in section:
        return {where.rpartition('.')[2]: parse_section(kind, section, where)}
    for name, stream in section.items():
        if not isinstance(stream, Mapping):
            raise ValueError(
                f'{where}.{name}={short_repr(stream)} is not a stream; give {where} as one stream '
                '({remote: ..., local: ..., split: ...}) or as a mapping of several named ones'
            )
    return {str(name): parse_section(kind, stream, f'{where}.{name}') for name, stream in section.items()}


def row_length(encoding: str) -> int | None:
    """Tokens per row of an MDS column encoding such as ``ndarray:int32:128``; None if rows may differ."""
    kind, *rest = encoding.split(':')
    return int(rest[1]) if kind == 'ndarray' and len(rest) == 2 and rest[1].isdigit() else None
