# SPDX-License-Identifier: Apache-2.0
"""Reads back what W&B wrote offline, record by record."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32768, 7


@dataclass
class Written:
    """One W&B run: what it was started with, every step, and what its table shows."""

    id: str = ''
    group: str = ''
    job_type: str = ''
    name: str = ''
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)


def records(path: Path) -> Iterator[Any]:
    """Every record in a ``.wandb`` file up to where it is cut off: LevelDB's log format behind 7 bytes of W&B's own.

    A record lies in parts, each with its checksum (4 bytes), length (2) and kind (1: whole or last if 1 or 4), none of
    which crosses the end of a block.
    """
    content, at, record = path.read_bytes(), HEADER, b''
    assert content[:4] == b':W&B', path
    while at + HEADER <= len(content):
        if (left := BLOCK - at % BLOCK) < HEADER or not content[at + 6]:
            at += left
            continue
        begin = at + HEADER
        at = begin + int.from_bytes(content[begin - 3 : begin - 1], 'little')
        record += content[begin:at]
        if content[begin - 1] in (1, 4) and at <= len(content):
            found = wandb_internal_pb2.Record()
            found.ParseFromString(record)
            yield found
            record = b''


def _items(items: Any) -> dict[str, Any]:
    return {item.key or '/'.join(item.nested_key): json.loads(item.value_json) for item in items}


def read(folder: Path) -> list[Written]:
    """Every run that was written under ``folder/wandb``, in the order of their files; a killed one's may be empty."""
    runs = []
    for path in sorted(path for path in folder.glob('wandb/offline-run-*/*.wandb') if path.stat().st_size):
        run = Written()
        for record in records(path):
            if record.HasField('run'):
                given = record.run
                run.id, run.group, run.job_type, run.name = (
                    given.run_id,
                    given.run_group,
                    given.job_type,
                    given.display_name,
                )
                run.tags, run.config = list(given.tags), {**run.config, **_items(given.config.update)}
            elif record.HasField('config'):
                run.config |= _items(record.config.update)
            elif record.HasField('history'):
                step = _items(record.history.item)
                run.history.append(step)
                run.summary |= step  # as W&B does, unless told otherwise
            elif record.HasField('summary'):
                run.summary |= _items(record.summary.update)
        runs.append(run)
    return runs
