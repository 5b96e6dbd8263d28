# SPDX-License-Identifier: Apache-2.0
"""In what a run that was killed and started again differs from one that was left alone, by name."""

import json
from pathlib import Path
from typing import Any

# What a line of ``recorder.Recorder`` says; causes stand before what follows from them.
PARTS = {
    'token': 'time', 'rows': 'rows', 'lr': 'learning rate', 'weight_decay': 'weight decay', 'initial_lr': 'base rate',
    'base_lrs': "schedule's base", 'moments': 'moments', 'adam_step': "Adam's steps", 'random': 'random numbers',
    'averages': 'averages', 'loss': 'loss',
}  # fmt: skip


def lines_of(path: Path | str, rank: int = 0) -> list[dict[str, Any]]:
    """As they were written: a batch that was trained twice has two."""
    return [json.loads(line) for line in Path(f'{path}.rank{rank}').read_text().splitlines()]


def objections(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> list[str]:
    """The parts that differ at the first batch at which any does, or the batches that are missing.

    Args:
        found: Lines of the run that was killed.
        expected: Those of the run that was left alone.
    """
    right = {line['batch']: line for line in expected}
    for line in found:
        there = right.get(line['batch'], {})
        if line != there:
            return [name for key, name in PARTS.items() if line.get(key) != there.get(key)]
    missing = right.keys() - {line['batch'] for line in found}
    return [f'batch {batch} is missing' for batch in sorted(missing)]
