# SPDX-License-Identifier: Apache-2.0
"""Which samples an earlier run read, from the dataset state in its checkpoint."""

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cpt_algorithms.checkpoints.open import dataset_state_of
from cpt_algorithms.checkpoints.save_folder import fetch_checkpoint
from cpt_algorithms.files import is_remote
from cpt_algorithms.ranks import on_rank_zero

__all__ = ['Consumed', 'consumed_by', 'positions_behind', 'read_consumed', 'read_positions']


Found = TypeVar('Found')


@dataclass(frozen=True)
class Consumed:
    """The samples that a run read of a dataset: the first ones of a shuffle, or of the dataset if ``seed`` is None."""

    samples: int
    seed: int | None
    block_size: int


def consumed_by(state: Mapping[str, Any], digest: str) -> Consumed:
    """The samples that the run which saved a dataset state read of the dataset with this digest.

    Raises:
        ValueError: If it is the state of another loader, or the run did not read this dataset as its only new data.
    """
    mix, counts = _mix_and_counts(state)
    new = {key.removeprefix('new.'): value for key, value in mix.items() if key.startswith('new.')}
    described = ', '.join(f'{name}: {value}' for name, value in new.items())
    if len(new) > 1:
        raise ValueError(f'it read several new datasets shuffled together ({described}); one by itself has no order')
    if f'({digest})' not in next(iter(new.values())):
        raise ValueError(f'it learned another dataset ({described}; this one is {digest}): name the run that read it')
    seed = mix['shuffle_seed'] if mix['shuffle'] else None
    return Consumed(counts['new'], seed, mix['shuffle_block_size'])


def _mix_and_counts(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    if 'consumed' not in state:
        raise ValueError('its train loader was not replay_text, or an older one, so what it read is not known')
    return json.loads(state['mix']), json.loads(state['consumed'])


def _contents(mix: Mapping[str, Any], role: str) -> dict[str, str]:
    """The streams of a role by name: their sizes and digests, without weights and limits."""
    described = {key.removeprefix(f'{role}.'): value for key, value in mix.items() if key.startswith(f'{role}.')}
    return {name: re.sub(r'\).*', ')', value) for name, value in described.items()}


def _order_of(mix: Mapping[str, Any], name: str) -> str:
    """How an old stream is read: its shuffle, and in an order of replay's own, of how many samples."""
    seen = re.search(r', only the first ([\d,]+) of seed (\w+), block (\w+)', mix[f'replay.{name}'])
    own = ('all', str(mix['shuffle_seed'] if mix['shuffle'] else None), str(mix['shuffle_block_size']))
    limit, seed, block = seen.groups() if seen else own
    read = 'unshuffled' if seed == 'None' else f'seed {seed}, block {block}'
    return f'{read}, of {limit}' if mix['order'] == 'shuffled' else read


def positions_behind(state: Mapping[str, Any], mix: str) -> dict[str, int]:
    """The positions from which a run with this ``mix`` continues the data of the run that saved a dataset state.

    Returns:
        Samples read of the new data (``new``) and of each old stream, for streams that both runs read in the same
        role. The others start at 0 and are left out. Fractions and weights may be others.

    Raises:
        ValueError: If it is the state of another loader, or the order is not the same.
    """
    (before, counts), now = _mix_and_counts(state), json.loads(mix)
    positions = {'new': counts['new']} if _contents(before, 'new') == _contents(now, 'new') else {}
    old, ours = _contents(before, 'replay'), _contents(now, 'replay')
    positions |= {name: counts[name] for name in ours if ours[name] == old.get(name)}
    keys = ('shuffle', 'shuffle_seed', 'shuffle_block_size', *(['order'] if positions.keys() - {'new'} else []))
    changed = [f'{key}: {before[key]} -> {now[key]}' for key in keys if positions and before[key] != now[key]]
    orders = {name: (_order_of(before, name), _order_of(now, name)) for name in positions if name in ours}
    # of what follows from the keys, they are named alone
    if changed := changed or [f'{name}: {was} -> {is_now}' for name, (was, is_now) in orders.items() if was != is_now]:
        raise ValueError(f'it read in another order ({"; ".join(changed)}), and this run would not know what is left')
    return positions


def read_positions(where: str, checkpoint: str, mix: str) -> dict[str, int]:
    """:func:`positions_behind` of a checkpoint; see :func:`read_consumed`."""
    return on_rank_zero(lambda: _read(where, checkpoint, lambda state: positions_behind(state, mix)))


def read_consumed(where: str, checkpoint: str, digest: str, together: bool = True) -> Consumed:
    """:func:`consumed_by` of a checkpoint.

    Args:
        where: The key that named it, for the error message.
        checkpoint: A Composer checkpoint, monolithic or sharded, local or in object storage (which is downloaded).
        digest: Of the dataset.
        together: Whether all ranks call it, and one reads. Default: ``True``.

    Raises:
        ValueError: If it cannot be read, or says nothing of this dataset.
    """

    def read() -> Consumed:
        return _read(where, checkpoint, lambda state: consumed_by(state, digest))

    return on_rank_zero(read) if together else read()


def _read(where: str, checkpoint: str, judge: Callable[[dict[str, Any]], Found]) -> Found:
    try:
        with tempfile.TemporaryDirectory() as here:
            place = fetch_checkpoint(checkpoint, Path(here)) if is_remote(checkpoint) else checkpoint
            return judge(dataset_state_of(place))
    except Exception as error:  # of any kind
        said = str(error) if isinstance(error, ValueError | OSError) else f'{type(error).__name__}: {error}'
        raise ValueError(f'{where}={checkpoint}: {said}') from None
