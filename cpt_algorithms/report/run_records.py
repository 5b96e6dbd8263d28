# SPDX-License-Identifier: Apache-2.0
"""The content of run folders as plain data: one reader for the report, lineage and the claims."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any

from cpt_algorithms.checkpoints.exports import exports
from cpt_algorithms.evaluation.functional import has_diverged, without_averages
from cpt_algorithms.evaluation.suite import read_result
from cpt_algorithms.files import exists, is_remote, null_as_nan, read_json
from cpt_algorithms.formatting import first_of, short
from cpt_algorithms.preparation.manifest import prepared_in
from cpt_algorithms.preparation.packing import Hits
from cpt_algorithms.stage.record import StageRecord, done_with, read_record
from cpt_algorithms.stage.stage import Merge, Stage
from cpt_algorithms.validation import differences, short_repr

__all__ = ['Arm', 'RunRecord', 'RunSet', 'find_run', 'read_run', 'read_runs', 'read_until', 'size_name']

Curve = list[list[float]]
_EXPORT = re.compile(r'ba(\d+)(?:-(.+))?')


@dataclass(frozen=True)
class RunRecord:
    """One run: the content of its folder or, before it begins, the plan of its sequence."""

    folder: str  # or URI; runs are known by it
    name: str
    arm: str  # that named it
    stage: str  # the name of the stage it trains
    seed: int
    # update (starts from a parent), union or matched (from scratch, as long as all stages: on everything, or on the
    # mixture of the last), scratch; a branch has its trunk's
    kind: str
    parent: str | None  # folder of the run it starts from, if that is there
    tokens: dict[str, int]  # of its budget by stream, the new data first
    tokens_before_branch: dict[str, int]  # what a branch's parent had read where it starts; its stage took both
    batches: int | None  # of its budget; None if only the data knows
    union_tokens: int | None  # of training on all data from scratch; None if unknown
    record: StageRecord | None  # its stage.json; None before it begins
    state: str  # finished, unfinished, failed, not started
    batch: int  # the last one that is known to be trained
    error: str  # last error line of a failed run
    losses: dict[str, Curve]  # {label: [[batch, token, loss], ...]}; a label is a dataset or <dataset>/<average>
    final: dict[str, float]  # {label: loss}, the latest ones of a run that has not finished
    learning_rate: Curve  # as applied
    training_loss: Curve  # before the batch's step
    cost: dict[str, Any]  # tokens, seconds, devices, device, parameters, batch; empty before an evaluation
    parameters: int | None  # of the model; None if nothing of that size has run
    old: list[str]  # datasets learned before this stage
    new: list[str]  # datasets of this stage
    at_start: dict[str, float]  # {dataset: loss of the untouched parent}
    bytes_per_token: dict[str, float]  # of each dataset
    # what differs between the plan of its sequence that it was trained by and today's; nothing if that is today's
    other_plan: tuple[str, ...] = ()
    # not so of a branch of an earlier stage, nor of a trunk that ends before its stage: they are compared with no other
    is_whole: bool = True
    newest: int = 0  # batch of its newest export, or its end
    alpha: float | None = None  # of a line between two models, where on it this one is
    # {suite: {average, or '' for the training weights: {batch: lm-eval result}}}, of its exports
    scored: dict[str, dict[str, dict[int, Any]]] = field(default_factory=dict)
    # the same of the pretrained model that it starts from
    base_benchmarks: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def sequence(self) -> str:
        """The folder of its sequence, or of a single run the one it lies in."""
        return os.path.dirname(self.folder)

    @property
    def plan(self) -> tuple[str, tuple[str, ...]]:
        """Its sequence and which plan of that: what union costs is a matter of one plan."""
        return self.sequence, self.other_plan

    @property
    def config(self) -> Stage | None:
        """Its train YAML; None before it begins."""
        return self.record.config if self.record else None

    @property
    def merge(self) -> Merge | None:
        """What it is made of, if it was not trained."""
        return self.config.merge if self.config else None

    @property
    def began_from(self) -> str | None:
        """The checkpoint or the pretrained model that it starts from; None from scratch, or before it begins."""
        return self.record.parent if self.record else None

    @property
    def begins(self) -> int | None:
        """The batch of its parent at which it begins; None at the parent's end, or if nothing says it."""
        return self.config.begins[1] if self.config and self.config.begins else None

    @property
    def benchmarks(self) -> dict[str, dict[str, Any]]:
        """``{suite: {average: lm-eval result}}`` of its newest export: what is older is no result of the run."""
        return self.benchmarks_at(self.newest)

    def benchmarks_at(self, batch: int) -> dict[str, dict[str, Any]]:
        """The same of the export of a batch."""
        found = {
            suite: {average: results[batch] for average, results in of.items() if batch in results}
            for suite, of in self.scored.items()
        }
        return {suite: of for suite, of in found.items() if of}

    @cached_property
    def contamination(self) -> dict[str, Hits]:
        """Items of benchmarks that its training data holds, by task, as far as preparing it has found and kept them."""
        mix = self.config.mix if self.config else None
        found: dict[str, Hits] = {}
        for stream in [*mix.new.values(), *mix.old.values()] if mix else ():
            record = prepared_in([stream.local, stream.remote], stream.split)
            for task, hits in record.contamination.items() if record else ():
                if hits.items:
                    found[task] = max(hits, found.get(task, hits), key=lambda each: each.items)
        return found

    @property
    def budget(self) -> int:
        """Tokens of its stage's budget."""
        return sum(self.tokens.values()) + sum(self.tokens_before_branch.values())

    @property
    def mixture(self) -> dict[str, float]:
        """The share of each stream in its stage."""
        names = {**self.tokens, **self.tokens_before_branch}
        counts = {name: self.tokens.get(name, 0) + self.tokens_before_branch.get(name, 0) for name in names}
        return {name: count / self.budget for name, count in counts.items() if count}

    def has_mixture_of(self, other: 'RunRecord') -> bool:
        """Whether the shares of its streams are those of another run throughout, but for a sample."""
        ours, theirs = self.mixture, other.mixture
        length = other.config.max_seq_len if other.config else None
        if any(run.config and run.config.mix and run.config.mix.moves for run in (self, other)):
            return False
        sample = (length or 0) / other.budget + (length or 0) / self.budget
        return ours.keys() == theirs.keys() and all(abs(ours[name] - theirs[name]) <= sample + 1e-9 for name in ours)

    def tokens_until(self, batch: int | None) -> dict[str, int]:
        """Those that it had read at a batch of it; None is its end."""
        return self.tokens if batch is None or self.config is None else self.config.tokens_until(batch)

    @property
    def peers(self) -> tuple[str, ...]:
        """What it is compared with: runs of one plan that are judged alike, in the tokens of one tokenizer."""
        if self.record is None:
            return self.other_plan
        return (*self.other_plan, json.dumps(self.record.config.judged_by, sort_keys=True), self.tokenizer)

    @property
    def tokenizer(self) -> str:
        """What its tokenizer makes of text, as a hash; nothing if that is not known."""
        return self.record.contents.get('tokenizer.name', '') if self.record else ''

    @property
    def read(self) -> tuple[dict[str, int], dict[str, int]]:
        """``tokens`` and ``tokens_before_branch``, but of a run that was stopped early only what it has read."""
        trained, batches = self.cost.get('batch', inf), self.batches or 0
        was_stopped = self.state == 'finished' and trained < batches
        return self.tokens_until(trained) if was_stopped else self.tokens, self.tokens_before_branch

    @property
    def spent(self) -> int:
        """Tokens that it has read, or will have."""
        return sum(sum(tokens.values()) for tokens in self.read)

    @property
    def replayed(self) -> int:
        """Those that are not new data; from scratch, all data is new."""
        new = sum(next(iter(tokens.values()), 0) for tokens in self.read)
        return self.spent - new if self.kind == 'update' else 0

    @cached_property
    def has_diverged(self) -> bool:
        """Whether its training loss ended far above its lowest."""
        return has_diverged([loss for _, _, loss in self.training_loss])

    @property
    def hours(self) -> float | None:
        """Device-hours so far."""
        seconds = self.cost.get('device_seconds')
        return None if seconds is None else seconds / 3600

    @property
    def progress(self) -> str:
        """How far it has come, in words."""
        if self.state in ('finished', 'not started'):
            return self.state
        batches = 'an unknown number' if self.batches is None else f'{self.batches:,}'
        at = f'at batch {self.batch:,} of {batches}'
        return f'failed, last evaluated {at}' if self.state == 'failed' else at


@dataclass(frozen=True)
class Arm:
    """A row of the tables: the last runs of one arm of one sequence, one for each seed, all of one kind."""

    name: str
    kind: str
    runs: list[RunRecord]


@dataclass(frozen=True)
class RunSet:
    """Runs that are looked at together."""

    name: str  # names of the sequences or runs
    data: list[str]  # datasets in the order they arrive
    runs: dict[str, RunRecord]  # by folder, parents before children
    given: list[RunRecord]  # those that were asked for, and not only found as ancestors
    missing_parents: dict[str, str]  # {run name: parent's folder that is not there}

    def label(self, name: str, size: int | None) -> str:
        """A name with the model's size, if there are several sizes."""
        return f'{name} ({size_name(size)})' if len(self.sizes) > 1 else name

    def hours(self, run: RunRecord) -> float | None:
        """Device-hours of a run so far; of a branch, with those of its trunk until there."""
        trunk = self.runs[run.parent] if run.tokens_before_branch and run.parent else None
        if run.hours is None or trunk is None or not trunk.hours:
            return run.hours
        return run.hours + trunk.hours * sum(run.tokens_before_branch.values()) / trunk.cost['tokens']

    @property
    def sizes(self) -> list[int | None]:
        """Model sizes, the smallest first; None if nothing is known of a run's."""
        return sorted({run.parameters for run in self.given}, key=lambda size: size or 0)

    def bytes_per_token(self, run: RunRecord) -> dict[str, float]:
        """Of each dataset: a matter of text and tokenizer, so also known for runs without a parent beside others."""
        others = [
            other for other in self.runs.values() if (other.sequence, other.tokenizer) == (run.sequence, run.tokenizer)
        ]
        return {name: value for each in (*others, run) for name, value in each.bytes_per_token.items()}

    def parent_benchmarks(self, run: RunRecord) -> dict[str, dict[str, Any]]:
        """Of what a run began from, if that was scored; of a branch, of what its trunk began from, as for losses."""
        while run.tokens_before_branch and run.parent:
            run = self.runs[run.parent]
        if run.parent is None:
            return run.base_benchmarks
        parent = self.runs[run.parent]
        # of a parent whose folder cannot be written, the run itself has them
        return run.base_benchmarks | (parent.benchmarks if run.begins is None else parent.benchmarks_at(run.begins))

    def chain(self, run: RunRecord) -> list[RunRecord]:
        """The run with its ancestors, the oldest first."""
        return [*_ancestors(run.parent, self.runs), run]

    def arms(self, size: int | None) -> list[Arm]:
        """Leaves and first stages of a model size, in the order of the runs."""
        # a trunk is a parent of the next stage, and not of its branches
        parents = {run.parent for run in self.runs.values() if not run.tokens_before_branch}
        first: dict[tuple[str, str, int], str] = {}
        arms: dict[tuple[str, str], Arm] = {}
        for run in self.runs.values():
            name = run.arm
            if run.stage != run.name and run.folder in parents:
                if run.parent is not None:
                    continue
                # an arm that changes the first stage has one of its own
                is_shared = first.setdefault((run.sequence, run.stage, run.seed), run.name) == run.name
                name = f'{run.stage} only' + ('' if is_shared else f' ({run.arm})')
            if run.other_plan:
                others = list(dict.fromkeys(other.other_plan for other in self.given if other.other_plan))
                number = f' {others.index(run.other_plan) + 1}' if len(others) > 1 else ''
                name = f'{name} (other plan{number})'
            if run in self.given and run.parameters == size:
                arms.setdefault((run.sequence, name), Arm(name, run.kind, [])).runs.append(run)
        # in several sequences, one name is that of several arms
        sequences = Counter(name for _, name in arms)
        above = len(os.path.commonprefix([sequence.split('/') for sequence, _ in arms]))  # here or in object storage

        def of(sequence: str) -> str:
            return '/'.join(sequence.split('/')[above:]) or os.path.basename(sequence)

        return [
            replace(arm, name=f'{name} ({of(sequence)})') if sequences[name] > 1 else arm
            for (sequence, name), arm in arms.items()
        ]


def size_name(size: int | None) -> str:
    """A number of parameters as people write it: 405 M parameters."""
    return 'unknown size' if size is None else f'{short(size)} parameters'


def find_run(folder: str, place: str, written_at: str) -> str | None:
    """The folder of a run that another run names, which may have been moved together with that.

    Args:
        folder: As the other run's YAML names it.
        place: Where that run lies now. Of a local one, nothing is looked up in object storage.
        written_at: Where it was trained.
    """
    written, was = (each if is_remote(each) else os.path.realpath(each) for each in (folder, written_at))
    moved = os.path.normpath(f'{place}/{os.path.relpath(written, was)}')
    candidates = [written] if is_remote(place) else [moved] if is_remote(written) else [moved, written]
    return next((each for each in candidates if exists(f'{each}/stage.json')), None)


def read_run(folder: str, runs: dict[str, RunRecord], plan: Mapping[str, Any] | None = None) -> None:
    """Read a run, after its ancestors, into ``runs``.

    Args:
        folder: Its folder or URI.
        runs: The runs that have been read, by folder. Without ``plan``, none of them is read again.
        plan: What a sequence knows of it, with its parent's folder. Default: ``None``, its parent is looked for.

    Raises:
        ValueError: If it has not begun and there is no plan, a file is damaged, or storage cannot be reached.
    """
    if plan is None and folder in runs:
        return
    record = read_record(folder)
    measured, forgotten, done, failed = (
        read_json(f'{folder}/{name}.json') or {} for name in ('losses', 'forgetting', 'done', 'failed')
    )
    cost, losses = measured.get('cost', {}), null_as_nan(measured.get('losses', {}))
    if plan is None:
        if record is None:
            raise ValueError(f'{folder} holds neither sequence.json nor stage.json: it is not a sequence or run folder')
        plan = _plan_of(record, folder, cost.get('tokens', 0), runs)
    trunk = runs[plan['parent']] if plan['tokens_before_branch'] and plan['parent'] else None
    is_update = plan['parent'] or (record and record.parent)
    from_scratch = plan['stage'] if plan['stage'] in ('union', 'matched') else 'scratch'
    is_finished = bool(done)
    if done and record is not None:  # of a run that is extended, or is to be, there is more to come
        is_planned = (record.config.batches or 0) >= (plan['batches'] or 0)
        is_finished = is_planned and done_with(record.config, folder) is not None
    state = 'unfinished' if record or losses else 'not started'
    state = 'finished' if is_finished else 'failed' if failed else state
    final = {label: rows[-1][2] for label, rows in losses.items() if rows}
    if is_finished:
        final |= {label: mean['mean'] for label, mean in null_as_nan(measured.get('final', {})).items()}
    scored = _scored(folder)
    exported = {} if is_remote(folder) else exports(folder)
    scored_at = [batch for of in scored.values() for results in of.values() for batch in results]
    runs[folder] = RunRecord(
        folder=folder,
        kind=trunk.kind if trunk else 'update' if is_update else from_scratch,
        record=record,
        state=state,
        batch=int(done.get('batch') or cost.get('batch', 0)),
        error=_last_error(failed.get('log', [])) if state == 'failed' else '',
        losses=losses,
        final=final,
        learning_rate=measured.get('learning_rate', []),
        training_loss=null_as_nan(measured.get('training_loss', [])),
        cost=cost,
        parameters=cost.get('parameters'),
        old=forgotten.get('old', []),
        new=forgotten.get('new', []),
        at_start=null_as_nan(forgotten.get('parent', {})),
        bytes_per_token=forgotten.get('bytes_per_token', {}),
        alpha=measured.get('alpha'),
        newest=max([*exported, *scored_at, int(done['batch']) if is_finished else 0]),
        scored=scored,
        base_benchmarks=_base_benchmarks(folder),
        **plan,
    )


def read_runs(folders: Sequence[str | Path]) -> RunSet:
    """Everything that lies in these folders, finished or not.

    Args:
        folders: Sequence folders (with ``sequence.json``) or run folders; the ancestors of a run folder are found.

    Raises:
        ValueError: If a folder is neither.
    """
    names: list[str] = []
    data: list[str] = []
    given: list[str] = []
    runs: dict[str, RunRecord] = {}
    singles: dict[str, RunRecord] = {}
    for each in folders:
        if is_remote(each):
            how = "aws s3 sync URI FOLDER --exclude '*' --include '*.json'"
            raise ValueError(f'{each} lies in object storage; copy its JSON files into a local folder ({how})')
        folder = os.path.realpath(each)
        sequence = read_json(f'{folder}/sequence.json')
        if sequence:
            names.append(sequence['name'])
            data += sequence['data']
            given += _read_sequence(folder, sequence, runs)
        else:
            read_run(folder, runs)
            names.append(runs[folder].name)
            given.append(folder)
            singles |= {run.folder: run for run in [*_ancestors(runs[folder].parent, runs), runs[folder]]}
    missing_parents = {
        run.name: run.began_from.rstrip('/').rpartition('/')[0]
        for run in singles.values()
        if run.config and run.began_from and not run.parent and not run.config.pretrained_model
    }
    _tell_tasks_apart(runs.values())
    data = list(dict.fromkeys([*data, *_datasets(singles.values())]))
    asked = [run for run in runs.values() if run.folder in given]
    return RunSet(', '.join(dict.fromkeys(names)), data, runs, asked, missing_parents)


def _tell_tasks_apart(runs: Iterable[RunRecord]) -> None:
    """A task that was asked otherwise than the first of its name has another name: what differs stands in it."""
    entries: dict[tuple[str, str], Mapping[str, Any]] = {}
    scored = []
    for run in runs:
        for suite, of in run.scored.items():
            # what no table shows comes last
            scored += [(suite, each, at != run.newest) for found in of.values() for at, each in found.items()]
        scored += [(suite, result, True) for suite, of in run.base_benchmarks.items() for result in of.values()]
    for suite, result, _ in sorted(scored, key=lambda each: each[2]):
        tasks, result['tasks'] = result['tasks'], {}
        for task, answers in tasks.items():
            asked = answers.get('entry') or {}
            first = entries.setdefault((suite, task), asked)
            unlike = [key for key in {**first, **asked} if asked.get(key) != first.get(key)]
            how = first_of([f'{key}: {short_repr(asked.get(key))}' for key in unlike])
            result['tasks'][f'{task} ({how})' if unlike else task] = answers


def _read_sequence(folder: str, sequence: Mapping[str, Any], runs: dict[str, RunRecord]) -> list[str]:
    plans, today = sequence['plans'], sequence['plan']
    of_plan: dict[Any, list[str]] = {}
    for run in sequence['runs']:
        known, plan = {key: value for key, value in run.items() if key != 'plan'}, run['plan']
        other: tuple[str, ...] = ()
        if plan != today:
            then, now = plans[plan], plans[today]
            other = tuple(differences(then['stages'], now['stages']) or differences(then, now) or ['its data'])
        parent, name = run['parent'] and f'{folder}/{run["parent"]}', f'{folder}/{run["name"]}'
        stages = plans[plan]['tokens']  # not those of a union
        last = next(reversed(stages), None)
        is_trunk = any(each['parent'] == run['name'] and each['tokens_before_branch'] for each in sequence['runs'])
        budget = sum(run['tokens'].values()) + sum(run['tokens_before_branch'].values())
        is_short = is_trunk and budget < stages.get(run['stage'], 0)
        is_last = run['stage'] not in stages or run['stage'] == last and not is_short
        judged, _, _ = known.pop('judged_by'), known.pop('is_trial', None), known.pop('also', None)
        known |= {'parent': parent, 'union_tokens': None, 'other_plan': other, 'is_whole': is_last}
        read_run(name, runs, known)
        if (config := runs[name].config) and (unlike := differences(config.judged_by, judged)):
            runs[name] = replace(runs[name], other_plan=(*other, *unlike))
        of_plan.setdefault(plan, []).append(name)
    for plan, names in of_plan.items():
        read, stages = [runs[name] for name in names], plans[plan]['tokens']
        union = [run.budget for run in read if run.stage == 'union']
        has_base = any(run.config and run.config.pretrained_model for run in read)  # what that has read is not known
        # what a union run would take; with one stage there is nothing to unite
        union_tokens = max(union) if union else sum(stages.values()) if len(stages) > 1 and not has_base else None
        sizes = {run.parameters for run in read} - {None}
        for run in read:
            # a run that has not started is as large as the others
            size = next(iter(sizes)) if len(sizes) == 1 else run.parameters
            runs[run.folder] = replace(run, union_tokens=union_tokens, parameters=size)
    return [f'{folder}/{run["name"]}' for run in sequence['runs']]


def _plan_of(record: StageRecord, folder: str, trained: int, runs: dict[str, RunRecord]) -> dict[str, Any]:
    """The plan that a sequence would have of a run; its ancestors are read."""
    stage, name = record.config, record.run_name
    begun, at = stage.begins or (None, None)
    parent, before = begun and find_run(begun, folder, stage.folder or folder), {}
    if parent:
        read_run(parent, runs)
        before = runs[parent].tokens_until(at) if stage.is_branch else {}
        for member in stage.merged[:-1] if stage.merge and stage.merge.soup else ():
            other = find_run(os.path.dirname(member), folder, stage.folder or folder)
            if other:
                read_run(other, runs)
                read = runs[other].tokens
                before = {name: before.get(name, 0) + read.get(name, 0) for name in {**before, **read}}
    tokens = stage.tokens_by_stream(0 if stage.batches is None else None)
    if stage.batches is None:  # of epochs, what was trained so far
        tokens[next(iter(tokens))] = trained
    earlier = _ancestors(parent, runs)
    is_known = earlier and earlier[0].began_from is None
    return {
        'name': name,
        'arm': name.removesuffix(f'-s{stage.seed}'),
        'stage': name,
        'seed': stage.seed,
        'parent': parent,
        'tokens': tokens,
        'tokens_before_branch': before,
        'batches': stage.batches,
        # what a pretrained model, or a parent that is not there, has read is not known
        'union_tokens': sum(tokens.values()) + read_until(parent, at, runs) if is_known else None,
    }


def read_until(folder: str | None, batch: int | None, runs: Mapping[str, RunRecord]) -> int:
    """Tokens that a run and its ancestors had read at a batch of it, or at its end: not what they read later."""
    if folder is None:
        return 0
    run = runs[folder]
    return sum(run.tokens_until(batch).values()) + read_until(run.parent, run.begins, runs)


def _ancestors(parent: str | None, runs: Mapping[str, RunRecord]) -> list[RunRecord]:
    chain: list[RunRecord] = []
    while parent is not None:
        chain.insert(0, runs[parent])
        parent = chain[0].parent
    return chain


def _last_error(lines: Sequence[str]) -> str:
    """How a run ended, by its log: the recipe's own line, the last that names an exception, or the last."""
    lines = [line.strip() for line in lines if line.strip()]
    if stopped := [line for line in lines if re.match(r'\S+ stopped: ', line)]:
        return stopped[-1].partition(' stopped: ')[2]
    errors = [line for line in lines if re.match(r'(\[rank\d+\]:\s*)?[\w.]+(Error|Exception|Interrupt)\b', line)]
    return (errors or lines or ['it says nothing'])[-1]


def _scored(folder: str) -> dict[str, dict[str, dict[int, Any]]]:
    """lm-eval results of a local run's exports, by suite, average and batch."""
    found: dict[str, dict[str, dict[int, Any]]] = {}
    for path in sorted(Path(folder, 'huggingface', 'lm_eval').glob('*/ba*.json')):
        if match := _EXPORT.fullmatch(path.stem):
            results = found.setdefault(path.parent.name, {}).setdefault(match[2] or '', {})
            results[int(match[1])] = read_result(path)
    return found


def _base_benchmarks(folder: str) -> dict[str, dict[str, Any]]:
    """Those of the pretrained model that a local run starts from."""
    paths = sorted(Path(folder, 'huggingface', 'lm_eval').glob('*/base.json'))
    return {path.parent.name: {'': read_result(path)} for path in paths}


def _datasets(runs: Iterable[RunRecord]) -> list[str]:
    """Datasets of single runs, as their evaluators are labelled."""
    labels = [each.label for run in runs if run.config for each in run.config.eval_loader if each.label]
    return without_averages([*labels, *(label for run in runs for label in run.losses)])
