# SPDX-License-Identifier: Apache-2.0
"""Which run came from which: the tree of runs with their ancestors, as the terminal and the report draw it."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpt_algorithms.checkpoints.save_folder import batch_of
from cpt_algorithms.evaluation.functional import changes, without_averages
from cpt_algorithms.files import is_remote, list_names, read_json
from cpt_algorithms.formatting import short, signed
from cpt_algorithms.report.run_records import RunRecord, find_run, read_run

__all__ = ['Node', 'read_lineage', 'tree_of']

# Folders of a run in which there are no runs, and possibly thousands of files.
_NO_RUNS = re.compile(r'huggingface|slurm|(ep\d+-ba\d+|latest).*|\..*')


@dataclass(frozen=True)
class Node:
    """A run, or what a run began from."""

    name: str
    kind: str  # run, merge (an average of checkpoints), base (a pretrained model), missing (a parent that is not there)
    place: str  # folder or URI; the name of a pretrained model
    run: RunRecord | None = None  # None of what is no run
    begins: int | None = None  # batch of its parent at which it begins; None at the parent's end
    merged: list[str] = field(default_factory=list)  # checkpoints of a merge: batches of the parent, or paths
    children: list['Node'] = field(default_factory=list)  # what began from it, by where it begins

    @property
    def status(self) -> str:
        """How far it has come, in words."""
        if self.kind == 'missing':
            return f'{"in object storage" if is_remote(self.place) else "not there"}: {self.place}'
        state = self.run.progress if self.run else 'pretrained model' if self.kind == 'base' else 'finished'
        return f'merge, {state}' if self.kind == 'merge' else state

    @property
    def look(self) -> str:
        """Its state in one word, for colours: of what is no run, ``finished``, ``started`` or ``failed``."""
        others = {'merge': 'finished', 'base': 'started', 'missing': 'failed'}
        return self.run.state if self.run else others[self.kind]

    @property
    def details(self) -> list[str]:
        """Its parent, data, training and results, each in words, if there is any."""
        said = [] if self.begins is None else [f'from batch {self.begins:,}']
        if self.merged:
            are_batches = all(each.isdigit() for each in self.merged)
            said.append(f'average of {"batches " * are_batches}{", ".join(self.merged)}')
        if self.run is None:
            return said
        if self.kind == 'run':
            said += [text for text in (_mix(self.run), _schedule(self.run)) if text]
        said += [self.run.error] if self.run.error else []
        changed = changes(self.run.final, self.run.at_start, self.run.old, self.run.new)
        means = {key: changed.get(f'{key}/mean') for key in ('forgetting', 'adaptation')}
        said += [f'{key} {signed(mean, 3)}' for key, mean in means.items() if mean is not None]
        # averaged weights have labels of their own: old/lawa
        losses = [f'{label} {self.run.final[label]:.3f}' for label in without_averages(self.run.final)]
        which = 'final loss' if self.run.state == 'finished' else 'loss so far'
        return said + ([f'{which} {", ".join(losses)}'] if losses else [])

    @property
    def data(self) -> dict[str, Any]:
        """The tree from here as JSON can hold it."""
        own = {key: getattr(self, key) for key in ('name', 'kind', 'place', 'begins', 'merged')}
        known = ('state', 'batch', 'batches', 'tokens', 'final', 'parent')
        own |= {key: getattr(self.run, key, None) for key in known}
        schedule = _schedule(self.run) if self.run else ''
        return own | {'schedule': schedule, 'children': [child.data for child in self.children]}


def _mix(run: RunRecord) -> str:
    """The streams of its budget, the new data first; what is replayed with its share."""
    mix, streams = run.config.mix if run.config else None, []
    for name, tokens in run.tokens.items():
        is_new = run.kind != 'update' or not streams
        text = f'{name} {short(tokens)}' if run.batches is not None else name
        text += '' if is_new or not tokens else f' ({100 * tokens / sum(run.tokens.values()):.3g} %)'
        stand_in_for = mix.old[name].stand_in_for if mix and name in mix.old else None
        streams.append((is_new, text + (f' in place of {stand_in_for}' if stand_in_for else '')))
    replayed = ', '.join(text for is_new, text in streams if not is_new)
    return ' + '.join(text for is_new, text in streams if is_new) + (f' + replay of {replayed}' if replayed else '')


def _schedule(run: RunRecord) -> str:
    if run.config is None:
        return ''
    scheduler, lr = run.config.scheduler, run.config.optimizer.lr
    words = [scheduler.name, *([f'lr {lr:g}'] if lr is not None else [])]
    return ', '.join(filter(None, [*words, *(f'{key} {value}' for key, value in scheduler.arguments.items())]))


def read_lineage(folders: Sequence[str | Path]) -> list[Node]:
    """The trees of all runs below some folders, each with all its ancestors that are there.

    Args:
        folders: Local folders or URIs. For local runs, nothing is read from object storage.

    Returns:
        Roots: what began from scratch, from a pretrained model, or from a parent that is not there.

    Raises:
        ValueError: If there is no run below a folder, a file of one is damaged, or storage cannot be reached.
    """
    runs: dict[str, RunRecord] = {}
    for given in folders:
        found = _runs_below(given)
        if not found:
            raise ValueError(f'{given}: there is no run below it (a folder with stage.json)')
        for place in found:
            read_run(place, runs)
    return tree_of(runs)


def _runs_below(folder: str | Path) -> list[str]:
    if is_remote(folder):
        files = [f'{str(folder).rstrip("/")}/{name}' for name in list_names(folder)]
        return [place for place, _, name in (file.rpartition('/') for file in files) if name == 'stage.json']
    found, seen = [], set[str]()
    for place, below, files in os.walk(folder, followlinks=True):
        real, is_run = os.path.realpath(place), 'stage.json' in files
        is_new = real not in seen  # links may lead to what is above them
        seen.add(real)
        below[:] = sorted(name for name in below if is_new and not (is_run and _NO_RUNS.fullmatch(name)))
        found += [real] if is_run and is_new else []
    return found


def _run_of(checkpoint: str) -> str:
    """The folder of the run whose checkpoint or export it is."""
    match = re.fullmatch(r'(.+)/huggingface/ba\d+[^/]*(/[^/]+)?', checkpoint)
    return match[1] if match else checkpoint.rpartition('/')[0]


def tree_of(runs: dict[str, RunRecord]) -> list[Node]:
    """Roots, as of :func:`read_lineage`, of runs by folder, with their ancestors; averaged checkpoints' are added."""
    tree = _Tree(runs)
    for run in list(runs.values()):
        tree.add(run)
    for node in tree.nodes.values():
        # what goes on from the end after the branches
        node.children.sort(key=lambda child: (child.begins is None, child.begins or 0, child.kind == 'run', child.name))
    return tree.roots


class _Tree:
    def __init__(self, runs: dict[str, RunRecord]) -> None:
        self.runs, self.roots = runs, []
        self.nodes: dict[str, Node] = {}

    def add(self, run: RunRecord) -> Node:
        """A run, under what it began from."""
        if run.folder in self.nodes:
            return self.nodes[run.folder]
        origin = run.began_from
        if run.config and (merge := run.config.merge):
            origin, merged = f'{merge.of}/', run.config.merged
            if merge.last:
                merged = [str(batch_of(checkpoint)) for checkpoint in merged]
            node = Node(run.name, 'merge', run.folder, run, merged=merged)
        else:
            node = Node(run.name, 'run', run.folder, run, self._begins(origin, run.parent))
        if run.parent:
            return self._hang(node, self.add(self.runs[run.parent]))
        if run.config is None or origin is None:
            return self._hang(node, None)
        if run.config.pretrained_model:
            return self._hang(node, self._root(origin, 'base', origin))
        return self._hang(node, self._checkpoint(origin, run.folder, run.config.folder or run.folder))

    def _hang(self, node: Node, above: Node | None) -> Node:
        (self.roots if above is None else above.children).append(node)
        return self.nodes.setdefault(node.place, node)

    def _root(self, name: str, kind: str, place: str) -> Node:
        return self.nodes.get(place) or self._hang(Node(name, kind, place), None)

    def _begins(self, checkpoint: str | None, parent: str | None) -> int | None:
        batch = batch_of(checkpoint) if checkpoint and parent else None
        return None if parent and batch == self.runs[parent].batches else batch

    def _checkpoint(self, checkpoint: str, place: str, written_at: str) -> Node:
        """A checkpoint in no run's folder: an average of other checkpoints, or one that is not there."""
        if checkpoint in self.nodes:
            return self.nodes[checkpoint]
        folder, name, made = _run_of(checkpoint), os.path.basename(checkpoint), None
        if is_remote(place) or not is_remote(checkpoint):
            made = read_json(f'{checkpoint}.average.json') or read_json(f'{checkpoint}/average.json')
        if made is None:
            return self._root(os.path.basename(folder), 'missing', folder)
        sources = [each['path'] for each in made['inputs']]
        parent = find_run(_run_of(sources[-1]), place, written_at)
        if parent:
            read_run(parent, self.runs)
        above = self.add(self.runs[parent]) if parent else self._checkpoint(sources[-1], place, written_at)
        node = Node(name, 'merge', checkpoint, begins=self._begins(sources[-1], parent), merged=sources)
        return self._hang(node, above)
