# SPDX-License-Identifier: Apache-2.0
"""What run folders hold, as plain data: curves, final losses, costs, lineage, of whatever has been trained so far."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cpt_algorithms.checkpoints.exports import pretrained_model_of
from cpt_algorithms.evaluation.functional import has_diverged
from cpt_algorithms.files import is_remote
from cpt_algorithms.sequence.expand import FROM_SCRATCH, tokens_per_stream
from cpt_algorithms.stage.preflight import total_batches

__all__ = ['Arm', 'RunRecord', 'RunSet', 'last_error', 'read_runs']

Curve = list[list[float]]


@dataclass(frozen=True)
class RunRecord:
    """One run folder.

    Args:
        folder: Where it lies; runs are known by it.
        name: Its name.
        arm: The arm that named it.
        stage: The stage it trains.
        seed: Its seed.
        parent: Folder of the run it starts from, if that is a run of the study.
        load_path: What it starts from, as its YAML says: a checkpoint, or a pretrained model; None from scratch.
        tokens: Tokens of its budget by stream, the new data first.
        trunk: Of a branch: what its parent had read of each stream where it starts; its stage took both.
        batches: Batches of its budget; None if only the data knows.
        union_tokens: Tokens of training on all data from scratch; None if unknown.
        is_asked_for: Whether it was given, and not only found as an ancestor.
        state: ``finished``, ``unfinished``, ``failed`` or ``not started``.
        error: Last error line of a failed run. Default: ``''``.
        losses: ``{label: [[batch, token, loss], ...]}``; a label is a dataset or ``<dataset>/<average>``.
        final: ``{label: loss}``: final losses, or the latest ones of a run that has not finished.
        learning_rate: ``[[batch, token, learning rate], ...]`` as applied.
        training_loss: ``[[batch, token, loss], ...]``, before the batch's step.
        cost: ``tokens``, ``seconds``, ``devices``, ``device``, ``parameters``, ``batch``; empty before an evaluation.
        parameters: Size of the model; None if nothing of that size has run.
        old: Datasets learned before this stage.
        new: Datasets of this stage.
        at_start: ``{dataset: loss of the untouched parent}``.
        bytes_per_token: ``{dataset: bytes per token}``.
        config: Its resolved llm-foundry YAML.
        versions: ``{package: version}`` it ran with.
        benchmarks: ``{suite: {average, or '' for the training weights: lm-eval result}}`` of its latest export.
        base: The pretrained model that it starts from; None from a checkpoint or from scratch.
        base_benchmarks: ``{suite: {'': lm-eval result}}`` of that.
    """

    folder: Path
    name: str
    arm: str
    stage: str
    seed: int
    parent: Path | None
    load_path: str | None
    tokens: dict[str, int]
    batches: int | None
    union_tokens: int | None
    is_asked_for: bool
    state: str
    error: str = ''
    losses: dict[str, Curve] = field(default_factory=dict)
    final: dict[str, float] = field(default_factory=dict)
    learning_rate: Curve = field(default_factory=list)
    training_loss: Curve = field(default_factory=list)
    cost: dict[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    old: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    at_start: dict[str, float] = field(default_factory=dict)
    bytes_per_token: dict[str, float] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    benchmarks: dict[str, dict[str, Any]] = field(default_factory=dict)
    base: str | None = None
    base_benchmarks: dict[str, dict[str, Any]] = field(default_factory=dict)
    trunk: dict[str, int] = field(default_factory=dict)

    @property
    def budget(self) -> int:
        """Tokens of its stage's budget."""
        return sum(self.tokens.values()) + sum(self.trunk.values())

    @property
    def replayed(self) -> int:
        """Those that are not new data."""
        new = sum(next(iter(tokens.values()), 0) for tokens in (self.tokens, self.trunk))
        is_update = (self.load_path or self.parent) and self.stage not in FROM_SCRATCH
        return self.budget - new if is_update else 0

    @property
    def has_diverged(self) -> bool:
        """Whether its training loss ended far above its lowest."""
        return has_diverged([loss for _, _, loss in self.training_loss])

    @property
    def hours(self) -> float | None:
        """Device-hours so far."""
        return self.cost['seconds'] * self.cost['devices'] / 3600 if self.cost else None


@dataclass(frozen=True)
class Arm:
    """A row of the tables: the last runs of one arm, one for each seed.

    Args:
        name: Its name.
        kind: ``update`` (starts from a parent), ``union`` (from scratch on everything) or ``scratch``.
        runs: One for each seed.
    """

    name: str
    kind: str
    runs: list[RunRecord]


@dataclass(frozen=True)
class RunSet:
    """Runs that are looked at together.

    Args:
        name: Names of the sequences or runs.
        data: Datasets in the order they arrive.
        runs: By folder, parents before children.
        lost: ``{run name: parent's folder that is not there}``.
    """

    name: str
    data: list[str]
    runs: dict[Path, RunRecord]
    lost: dict[str, str]

    def hours(self, run: RunRecord) -> float | None:
        """Device-hours of a run so far; of a branch, with those of its trunk until there."""
        trunk = self.runs[run.parent] if run.trunk and run.parent else None
        if run.hours is None or trunk is None or not trunk.hours:
            return run.hours
        return run.hours + trunk.hours * sum(run.trunk.values()) / trunk.budget

    @property
    def sizes(self) -> list[int | None]:
        """Model sizes, the smallest first; None if nothing is known of a run's."""
        return sorted({run.parameters for run in self.runs.values() if run.is_asked_for}, key=lambda size: size or 0)

    @property
    def bytes_per_token(self) -> dict[str, float]:
        """Of each dataset: a matter of text and tokenizer, so also known for runs without a parent."""
        return {name: value for run in self.runs.values() for name, value in run.bytes_per_token.items()}

    def chain(self, run: RunRecord) -> list[RunRecord]:
        """The run with its ancestors, the oldest first."""
        chain = [run]
        while chain[0].parent is not None:
            chain.insert(0, self.runs[chain[0].parent])
        return chain

    def arms(self, size: int | None) -> list[Arm]:
        """Leaves and first stages of a model size, in the order of the runs."""
        # a trunk is a parent of the next stage, and not of its branches
        parents = {run.parent for run in self.runs.values() if not run.trunk}
        first: dict[tuple[Path, str, int], str] = {}
        arms: dict[str, Arm] = {}
        for run in self.runs.values():
            name, is_sequence = run.arm, run.stage != run.name
            if is_sequence and run.folder in parents:
                if run.parent is not None:
                    continue
                # an arm that changes the first stage has one of its own
                shared = first.setdefault((run.folder.parent, run.stage, run.seed), run.name) == run.name
                name = f'{run.stage} only' + ('' if shared else f' ({run.arm})')
            if run.is_asked_for and run.parameters == size:
                from_scratch = 'union' if run.stage == 'union' else 'scratch'
                start = self.runs[run.parent] if run.trunk and run.parent else run
                kind = 'update' if start.load_path or start.parent else from_scratch
                if name in arms and run.seed in (other.seed for other in arms[name].runs):
                    name = f'{name} ({run.folder.parent.name})'  # not another seed, but another sequence
                arms.setdefault(name, Arm(name, kind, [])).runs.append(run)
        return list(arms.values())


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f'{path} cannot be read: {error}') from None


def last_error(lines: Sequence[str]) -> str:
    """What a log says of how its run ended: the recipe's own line, the last that names an exception, or the last."""
    lines = [line.strip() for line in lines if line.strip()]
    if stopped := [line for line in lines if re.match(r'\S+ stopped: ', line)]:
        return stopped[-1].partition(' stopped: ')[2]
    errors = [line for line in lines if re.match(r'(\[rank\d+\]:\s*)?[\w.]+(Error|Exception|Interrupt)\b', line)]
    return (errors or lines or ['it says nothing'])[-1]


def _benchmarks(folder: Path) -> dict[str, dict[str, Any]]:
    """lm-eval results of the latest export, by suite and average."""
    found: dict[str, dict[str, tuple[int, Any]]] = {}
    for path in sorted((folder / 'huggingface' / 'lm_eval').glob('*/ba*.json')):
        if match := re.fullmatch(r'ba(\d+)(?:-(.+))?', path.stem):
            of_suite, average, batch = found.setdefault(path.parent.name, {}), match[2] or '', int(match[1])
            if average not in of_suite or batch > of_suite[average][0]:
                of_suite[average] = (batch, _json(path))
    return {suite: {average: result for average, (_, result) in of.items()} for suite, of in found.items()}


def _read_run(folder: Path, planned: Mapping[str, Any]) -> RunRecord:
    """A run folder; ``planned`` are the fields that a sequence knows before it exists."""
    stage, measured, forgotten = (_json(folder / f'{name}.json') for name in ('stage', 'losses', 'forgetting'))
    is_finished, failed = (folder / 'done.json').exists(), _json(folder / 'failed.json')
    cost, losses = measured.get('cost', {}), measured.get('losses', {})
    state = 'unfinished' if stage or losses else 'not started'
    state = 'finished' if is_finished else 'failed' if failed else state
    latest = {label: rows[-1][2] for label, rows in losses.items() if rows}
    final = {label: mean['mean'] for label, mean in measured.get('final', {}).items()}
    return RunRecord(
        folder=folder,
        load_path=stage.get('parent'),
        state=state,
        error=last_error(failed.get('log', [])) if state == 'failed' else '',
        losses=losses,
        final={**latest, **final} if is_finished else latest,
        learning_rate=measured.get('learning_rate', []),
        training_loss=measured.get('training_loss', []),
        cost=cost,
        parameters=cost.get('parameters'),
        old=forgotten.get('old', []),
        new=forgotten.get('new', []),
        at_start=forgotten.get('parent', {}),
        bytes_per_token=forgotten.get('bytes_per_token', {}),
        config=stage.get('config', {}),
        versions=stage.get('versions', {}),
        benchmarks=_benchmarks(folder),
        base=pretrained_model_of(stage.get('config', {})),
        base_benchmarks={
            path.parent.name: {'': _json(path)}
            for path in sorted((folder / 'huggingface' / 'lm_eval').glob('*/base.json'))
        },
        **planned,
    )


def _read_sequence(folder: Path) -> tuple[dict[str, Any], list[RunRecord]]:
    sequence = _json(folder / 'sequence.json')
    union = [
        sum(run['tokens'].values()) + sum(run['trunk'].values()) for run in sequence['runs'] if run['stage'] == 'union'
    ]
    stages = sequence['stages']
    # what a union run would take; with one stage there is nothing to unite
    union_tokens = max(union) if union else sum(stages.values()) if len(stages) > 1 else None
    runs = [
        _read_run(
            folder / run['name'],
            {
                **{key: run[key] for key in ('name', 'arm', 'stage', 'seed', 'tokens', 'trunk', 'batches')},
                'parent': None if run['parent'] is None else folder / run['parent'],
                'union_tokens': union_tokens,
                'is_asked_for': True,
            },
        )
        for run in sequence['runs']
    ]
    if not union and any(run.base for run in runs):  # what a pretrained model has read is not known
        runs = [replace(run, union_tokens=None) for run in runs]
    sizes = {run.parameters for run in runs} - {None}
    # a run that has not started is as large as the others
    return sequence, [replace(run, parameters=next(iter(sizes))) for run in runs] if len(sizes) == 1 else runs


def _budget(config: Mapping[str, Any], new_labels: Sequence[str], trained: int) -> tuple[dict[str, int], int | None]:
    """Tokens by stream and batches of a run's budget; epochs have what was trained so far."""
    batches = total_batches(dict(config))
    if batches is None:
        return {'data': trained}, None
    new = config['train_loader']['dataset'].get('new')
    if new is None:
        return {'data': batches * config['global_train_batch_size'] * config['max_seq_len']}, batches
    (name, tokens), *replayed = tokens_per_stream(dict(config)).items()
    if not all(isinstance(stream, Mapping) for stream in new.values()):  # one stream, without a name
        name = ' + '.join(new_labels) or 'new data'
    return {name: tokens, **dict(replayed)}, batches


def _read_single(folder: Path, is_asked_for: bool) -> tuple[list[RunRecord], dict[str, str]]:
    """A run folder after its ancestors, and the ancestor that is not there."""
    stage = _json(folder / 'stage.json')
    if not stage:
        raise ValueError(f'{folder} holds neither sequence.json nor stage.json: it is not a sequence or run folder')
    config, name = stage['config'], stage['run_name']
    ancestors: list[RunRecord] = []
    lost: dict[str, str] = {}
    parent: Path | None = None
    if stage['parent'] and not pretrained_model_of(config):
        there = Path(stage['parent']).parent
        candidates = [path for path in (there, folder.parent / there.name) if (path / 'stage.json').exists()]
        if candidates:
            parent = candidates[0].resolve()
            ancestors, lost = _read_single(parent, False)
        else:
            lost = {name: stage['parent'].rpartition('/')[0]}
    seed = int(config.get('seed', 0))
    measured = _json(folder / 'losses.json')
    trained = measured.get('cost', {}).get('tokens', 0)
    tokens, batches = _budget(config, _json(folder / 'forgetting.json').get('new', []), trained)
    # what a pretrained model has read is not known
    is_complete = parent is not None and not lost and not any(run.base for run in ancestors)
    trunk, before = {}, ancestors
    at = re.search(r'-ba(\d+)', str(stage['parent']))
    if parent is not None and at and config['train_loader']['dataset'].get('continues'):  # of recipes/anneal.py
        trunk = _budget({**ancestors[-1].config, 'max_duration': f'{at[1]}ba'}, ancestors[-1].new, 0)[0]
        before = ancestors[:-1]
        is_complete = is_complete and bool(before)
    planned = {
        'name': name,
        'trunk': trunk,
        'arm': name.removesuffix(f'-s{seed}'),
        'stage': name,
        'seed': seed,
        'parent': parent,
        'tokens': tokens,
        'batches': batches,
        'union_tokens': sum([*tokens.values(), *trunk.values(), *(run.budget for run in before)])
        if is_complete
        else None,
        'is_asked_for': is_asked_for,
    }
    return [*ancestors, _read_run(folder, planned)], lost


def _datasets(runs: Sequence[RunRecord]) -> list[str]:
    """Datasets of single runs, as their evaluators are labelled."""
    given = [run.config.get('eval_loader') or [] for run in runs]
    labels = [each['label'] for loaders in given if isinstance(loaders, list) for each in loaders]
    labels += [label for run in runs for label in run.losses]
    return [name for name in dict.fromkeys(labels) if not any(name.startswith(f'{other}/') for other in labels)]


def read_runs(folders: Sequence[Path]) -> RunSet:
    """Everything that lies in these folders, finished or not.

    Args:
        folders: Sequence folders (with ``sequence.json``) or run folders; the ancestors of a run folder are found.

    Raises:
        ValueError: If a folder is neither.
    """
    names: list[str] = []
    data: list[str] = []
    runs: dict[Path, RunRecord] = {}
    lost: dict[str, str] = {}
    singles: list[RunRecord] = []
    for folder in folders:
        if is_remote(folder):
            raise ValueError(
                f'{folder} lies in object storage; copy its JSON files into a local folder, and name that (aws s3 sync '
                "URI FOLDER --exclude '*' --include '*.json')"
            )
        folder = folder.resolve()
        if (folder / 'sequence.json').exists():
            sequence, records = _read_sequence(folder)
            names.append(sequence['name'])
            data += sequence['data']
        else:
            records, gone = _read_single(folder, True)
            names.append(records[-1].name)
            lost |= gone
            singles += records
        for run in records:
            # one that is given and another's ancestor stays a given one
            is_asked_for = run.is_asked_for or (run.folder in runs and runs[run.folder].is_asked_for)
            runs[run.folder] = replace(run, is_asked_for=is_asked_for)
    data += _datasets(singles)
    return RunSet(', '.join(dict.fromkeys(names)), list(dict.fromkeys(data)), runs, lost)
