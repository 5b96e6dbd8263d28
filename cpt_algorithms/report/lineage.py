# SPDX-License-Identifier: Apache-2.0
"""Which run came from which: the tree of all runs in some folders, as plain data."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpt_algorithms.checkpoints.exports import pretrained_model_of
from cpt_algorithms.files import exists, is_remote, list_names, read_json
from cpt_algorithms.formatting import short
from cpt_algorithms.sequence.expand import tokens_per_stream
from cpt_algorithms.stage.preflight import total_batches

__all__ = ['Node', 'Stream', 'details', 'read_lineage', 'status', 'walk']

# Folders of a run in which there are no runs, and possibly thousands of files.
_NO_RUNS = re.compile(r'huggingface|slurm|ep\d+-ba\d+.*|\..*')


@dataclass(frozen=True)
class Stream:
    """What a run reads of one dataset.

    Args:
        name: Its name.
        tokens: How many; None if only the data knows.
        is_new: Whether it is what the stage learns, and not replayed.
        stand_in_for: The data in whose place it is replayed. Default: ``None``.
    """

    name: str
    tokens: int | None
    is_new: bool
    stand_in_for: str | None = None


@dataclass(frozen=True)
class Node:
    """A run, or what a run began from.

    Args:
        name: Its name.
        kind: ``run``; ``merge`` (an average of checkpoints); ``base`` (a pretrained model); or ``missing`` (a parent
            that is not there).
        place: Folder or URI; the name of a pretrained model.
        state: ``finished``, ``unfinished`` or ``failed``; of what is no run ``''``.
        batch: The latest batch that is known of.
        batches: Batches of its budget; None if only the data knows.
        begins: Batch of its parent at which it begins; None at the parent's end. Default: ``None``.
        merged: Of a merge, its checkpoints: batches of the parent, or paths. Default: none.
        streams: What it reads, the new data first. Default: none.
        schedule: Its learning rate in words. Default: ``''``.
        final: ``{label: final loss}``; of what is not finished the latest. Default: none.
        children: What began from it, by where it begins.
    """

    name: str
    kind: str
    place: str
    state: str = ''
    batch: int = 0
    batches: int | None = None
    begins: int | None = None
    merged: list[str] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)
    schedule: str = ''
    final: dict[str, float] = field(default_factory=dict)
    children: list['Node'] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Of its budget."""
        return sum(stream.tokens or 0 for stream in self.streams)


def walk(nodes: Sequence[Node], depth: int = 0) -> Iterator[tuple[int, Node]]:
    """Every node after its parent, with its depth.

    Args:
        nodes: Roots.
        depth: Theirs. Default: ``0``.
    """
    for node in nodes:
        yield depth, node
        yield from walk(node.children, depth + 1)


def read_lineage(folders: Sequence[str | Path]) -> list[Node]:
    """The trees of all runs below some folders, each with all its ancestors that are there.

    Args:
        folders: Local folders or URIs. For local runs, nothing is read from object storage.

    Returns:
        Roots: what began from scratch, from a pretrained model, or from a parent that is not there.

    Raises:
        ValueError: If there is no run below a folder, or a file of one is not JSON.
        StorageError: If object storage cannot be reached.
    """
    nodes: dict[str, Node] = {}
    parents: dict[str, str | None] = {}
    for given in folders:
        found = _runs_below(given)
        if not found:
            raise ValueError(f'{given}: there is no run below it (a folder with stage.json)')
        for place in found:
            _add(place, nodes, parents)
    roots = []
    for place, node in nodes.items():
        above = parents[place]
        (roots if above is None else nodes[above].children).append(node)
    for node in nodes.values():
        # what goes on from the end after the branches
        node.children.sort(key=lambda child: (child.begins is None, child.begins or 0, child.kind == 'run', child.name))
    return roots


def _runs_below(folder: str | Path) -> list[str]:
    if is_remote(folder):
        files = [f'{str(folder).rstrip("/")}/{name}' for name in list_names(folder)]
        return [place for place, _, name in (file.rpartition('/') for file in files) if name == 'stage.json']
    found = []
    for place, below, files in os.walk(folder):
        is_run = 'stage.json' in files
        below[:] = sorted(name for name in below if not (is_run and _NO_RUNS.fullmatch(name)))
        if is_run:
            found.append(place)
    return [os.path.realpath(place) for place in found]


def _add(place: str, nodes: dict[str, Node], parents: dict[str, str | None]) -> None:
    """Read a run and its ancestors, unless they are known."""
    if place in nodes:
        return
    stage = read_json(f'{place}/stage.json')
    merge = (stage['config'].get('variables') or {}).get('merge')
    checkpoint = f'{merge["of"]}/' if merge else stage['parent']
    above, begins = None, None
    if checkpoint is not None and pretrained_model_of(stage['config']):
        above = checkpoint
        nodes.setdefault(above, Node(above, 'base', above))
        parents.setdefault(above, None)
    elif checkpoint is not None:
        above, begins = _add_parent(checkpoint, place, stage['config'].get('save_folder', place), nodes, parents)
    nodes[place] = _read(place, stage, begins, merge, above is None)
    parents[place] = above


def _add_parent(
    checkpoint: str, place: str, was: str, nodes: dict[str, Node], parents: dict[str, str | None]
) -> tuple[str, int | None]:
    """Where a run's parent lies, and the batch of it at which the run begins, if that is not the end."""
    folder, _, name = checkpoint.rpartition('/')
    candidates = _candidates(folder, place, was)
    there = next((each for each in candidates if exists(f'{each}/stage.json')), None)
    if there is not None:
        _add(there, nodes, parents)
        batch = re.search(r'-ba(\d+)', name)
        return there, int(batch[1]) if batch and int(batch[1]) != nodes[there].batches else None
    made = None if is_remote(checkpoint) and not is_remote(place) else _provenance(checkpoint)
    if made is None:
        nodes.setdefault(folder, Node(folder.rpartition('/')[2], 'missing', folder))
        parents.setdefault(folder, None)
        return folder, None
    if checkpoint not in nodes:
        sources = [each['path'] for each in made['inputs']]
        above, _ = _add_parent(sources[-1], place, was, nodes, parents)
        ended = re.search(r'-ba(\d+)', sources[-1].rpartition('/')[2])
        begins = int(ended[1]) if ended and int(ended[1]) != nodes[above].batches else None
        nodes[checkpoint] = Node(name, 'merge', checkpoint, 'finished', begins=begins, merged=sources)
        parents[checkpoint] = above
    return checkpoint, None


def _candidates(folder: str, place: str, was: str) -> list[str]:
    """Where a folder may be that a run at ``place`` names, which was trained at ``was``."""
    written, was = (each if is_remote(each) else os.path.realpath(each) for each in (folder, was))
    if is_remote(place):
        return [written]
    # a run that was moved, or is looked at from elsewhere, was perhaps moved together with the folder
    moved = os.path.normpath(f'{place}/{os.path.relpath(written, was)}')
    return [moved] if is_remote(written) else [moved, written]


def _provenance(checkpoint: str) -> dict[str, Any] | None:
    """How scripts/average_checkpoints.py made a checkpoint."""
    return read_json(f'{checkpoint}.average.json') or read_json(f'{checkpoint}/average.json')


def _read(
    place: str, stage: Mapping[str, Any], begins: int | None, merge: Mapping[str, Any] | None, is_root: bool
) -> Node:
    config, name = stage['config'], stage['run_name']
    done, measured = read_json(f'{place}/done.json') or {}, read_json(f'{place}/losses.json') or {}
    final = {label: rows[-1][2] for label, rows in measured.get('losses', {}).items() if rows}
    final |= {label: mean['mean'] for label, mean in measured.get('final', {}).items()}
    state = 'failed' if exists(f'{place}/failed.json') else 'unfinished'
    if merge:
        every, last = int(str(merge['every']).removesuffix('ba')), int(merge['last'])
        merged = [str(merge['batch'] - every * back) for back in reversed(range(last))]
        state = 'finished' if done else state
        return Node(name, 'merge', place, state, begins=None, merged=merged, final=final)
    batches = total_batches(config)
    batch = int(done.get('batch') or measured.get('cost', {}).get('batch', 0))
    # one that was extended has not begun to train on
    state = 'finished' if done.get('batch') and batch >= (batches or 0) else state
    return Node(
        name, 'run', place, state, batch, batches, begins, [], _streams(config, is_root), _schedule(config), final
    )


def _streams(config: Mapping[str, Any], is_root: bool) -> list[Stream]:
    """What a run's budget reads of each dataset; from scratch, all of it is new."""
    batches, dataset = total_batches(dict(config)), config['train_loader']['dataset']
    new = dataset.get('new')
    if new is None:  # a stock loader
        tokens = None if batches is None else batches * config['global_train_batch_size'] * config['max_seq_len']
        return [Stream('data', tokens, True)]
    is_named = all(isinstance(stream, Mapping) for stream in new.values())
    name = ' + '.join(new) if is_named else os.path.basename(str(new.get('remote') or new.get('local')).rstrip('/'))
    replayed = (dataset.get('replay') or {}).get('streams') or {}
    counts = [None] * (1 + len(replayed)) if batches is None else list(tokens_per_stream(dict(config)).values())
    old = zip(replayed.items(), counts[1:], strict=True)
    return [
        Stream(name, counts[0], True),
        *(Stream(name, tokens, is_root, stream.get('stand_in_for')) for (name, stream), tokens in old),
    ]


def _schedule(config: Mapping[str, Any]) -> str:
    section = dict(config.get('scheduler') or {})
    name = section.pop('name', '')
    rate = (config.get('optimizer') or {}).get('lr')
    words = [
        name,
        *([f'lr {rate:g}'] if rate is not None else []),
        *(f'{key} {value}' for key, value in section.items()),
    ]
    return ', '.join(filter(None, words))


def status(node: Node) -> str:
    """How far a node has come, in words."""
    if node.kind == 'missing':
        return f'{"in object storage" if is_remote(node.place) else "not there"}: {node.place}'
    if node.kind == 'base':
        return 'pretrained model'
    if node.kind == 'merge' or node.state == 'finished':
        return node.state
    batches = 'an unknown number' if node.batches is None else f'{node.batches:,}'
    return f'{"failed " * (node.state == "failed")}at batch {node.batch:,} of {batches}'


def details(node: Node) -> list[str]:
    """Where it begins, what it reads, how it is trained and what it is worth: each in words, if there is anything."""
    said = [] if node.begins is None else [f'from batch {node.begins:,}']
    if node.merged:
        are_batches = all(each.isdigit() for each in node.merged)
        said.append(f'average of {"batches " * are_batches}{", ".join(node.merged)}')
    streams = []
    for stream in node.streams:
        text = stream.name if stream.tokens is None else f'{stream.name} {short(stream.tokens)}'
        if not stream.is_new and stream.tokens is not None and node.tokens:
            text += f' ({100 * stream.tokens / node.tokens:.3g} %)'
        streams.append(text + (f' in place of {stream.stand_in_for}' if stream.stand_in_for else ''))
    if streams:
        new = sum(stream.is_new for stream in node.streams)
        replayed = streams[new:]
        said.append(' + '.join(streams[:new]) + (f' + replay of {", ".join(replayed)}' if replayed else ''))
    said += [node.schedule] if node.schedule else []
    # averaged weights have labels of their own: old/lawa
    losses = [f'{label} {loss:.3f}' for label, loss in node.final.items() if label.rpartition('/')[0] not in node.final]
    which = 'final loss' if node.state == 'finished' else 'loss so far'
    return said + ([f'{which} {", ".join(losses)}'] if losses else [])
