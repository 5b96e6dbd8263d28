# SPDX-License-Identifier: Apache-2.0
"""From checkpoints on this machine to one that is their average, or another sum of them with weights."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cpt_algorithms.checkpoints.open import Checkpoint, files_of, open_checkpoint
from cpt_algorithms.files import is_remote
from cpt_algorithms.weight_averaging.offline.averaged_checkpoint import (
    find_small_files,
    make_plan,
    with_composer_names,
    write_average,
)
from cpt_algorithms.weight_averaging.offline.select import AverageError
from cpt_algorithms.weight_averaging.offline.storage import require_disk

__all__ = ['average_files']

LIBRARIES = ('cpt-algorithms', 'mosaicml', 'safetensors', 'torch', 'transformers')


def _with_the_names_of(newest: Checkpoint, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Checkpoints that name tied tensors as the newest does: each of them, or the first one alone.

    A model that was trained on several ranks stores each name, and others one.
    """
    found = []
    for each in checkpoints:
        more = {
            name: each.tensors[of] for name, of in each.aliases.items() if name in newest.tensors and of in each.tensors
        }
        kept = {name: tensor for name, tensor in each.tensors.items() if name not in newest.aliases}
        aliases = {name: of for name, of in each.aliases.items() if name not in more}
        found.append(replace(each, tensors={**kept, **more}, aliases=aliases) if each is not newest else each)
    return found


def average_files(
    paths: Sequence[Path],
    weights: Sequence[float],
    out: Path,
    to: str,
    average: str | None = None,
    dtype: str | None = None,
    accumulate: str = 'float32',
    config: Path | None = None,
    max_shard_size: str = '5GB',
    may_differ: bool = False,
    is_one_run: bool = True,
    dry_run: bool = False,
    places: Sequence[str] | None = None,
    how: Mapping[str, Any] | None = None,
) -> None:
    r"""Make :math:`\sum_i w_i \theta_i` of checkpoints of any kind, as a checkpoint that appears whole or not at all.

    Args:
        paths: The checkpoints, the newest last: what is no weight is its.
        weights: As many, with sum 1.
        out: What to make; must not exist.
        to: ``hf``, ``pt`` or ``sharded``.
        average: Averages that callbacks kept, in place of the weights. Default: ``None``.
        dtype: Of the result. Default: ``None``, that of the newest.
        accumulate: Of the sums. Default: ``'float32'``.
        config: Folder with ``config.json`` and tokenizer. Default: ``None``, they are looked for.
        max_shard_size: Of safetensors files. Default: ``'5GB'``.
        may_differ: See ``check_agreement``. Default: ``False``.
        is_one_run: Whether all must have the same dtypes. Default: ``True``.
        dry_run: Only check. Default: ``False``.
        places: What the provenance calls them. Default: their paths.
        how: More for the provenance.

    Raises:
        CheckpointError: If they do not fit each other, or one is damaged.
        AverageError: If there is no room.
    """
    checkpoints = [open_checkpoint(path) for path in paths]
    small_files = find_small_files(checkpoints[-1], config) if to == 'hf' else {}
    kinds = {checkpoint.kind for checkpoint in checkpoints}
    if to != 'hf' and config and 'hf' not in kinds:
        raise AverageError(f'--config {config}: with --to {to}, only for Hugging Face inputs')
    if to != 'hf' or len(kinds) > 1 and 'hf' in kinds:
        checkpoints = with_composer_names(checkpoints, config)
    checkpoints = _with_the_names_of(checkpoints[-1], checkpoints)
    wide = getattr(torch, accumulate)
    plan = make_plan(
        checkpoints, weights, average, getattr(torch, dtype) if dtype else None, wide, may_differ, is_one_run
    )
    require_disk(out.parent, plan.written_bytes, f'writing {out.name}')
    if dry_run:
        return
    inputs = []
    for place, checkpoint, weight in zip(places or map(str, paths), checkpoints, weights, strict=True):
        stats = [file.stat() for file in files_of(checkpoint)]
        size, modified = sum(stat.st_size for stat in stats), max(stat.st_mtime for stat in stats)
        place = place if is_remote(place) else os.path.abspath(place)
        inputs.append({'path': place, 'weight': weight, 'bytes': size, 'modified': modified})
    provenance: dict[str, Any] = {
        'averaged': average or 'weights',
        'inputs': inputs,
        **(how or {}),
        **plan.described(),
        'to': to,
        'versions': {'python': platform.python_version(), **{name: version(name) for name in LIBRARIES}},
    }
    with tqdm(total=plan.read_bytes, desc=out.name, unit='B', unit_scale=True, disable=None) as bar:
        write_average(plan, out, to, provenance, small_files, max_shard_size, bar.update)
