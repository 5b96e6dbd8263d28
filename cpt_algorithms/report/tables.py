# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the report: rows of the papers' tables, means over seeds, costs, findings, what is missing."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from math import inf, isfinite
from pathlib import Path
from typing import Any

import numpy as np

from cpt_algorithms.evaluation.functional import (
    Flips,
    Mean,
    bits_per_byte,
    by_average,
    changes,
    cuts_of,
    flips,
    has_same_items,
    is_accuracy,
    is_point,
    mean_over_tasks,
    paired_delta,
    training_flops,
    within_noise,
)
from cpt_algorithms.files import write_atomic
from cpt_algorithms.foresight.fits import half_width
from cpt_algorithms.formatting import first_of, percent, short, signed
from cpt_algorithms.report.run_records import Arm, RunRecord, RunSet

__all__ = [
    'COUNTS',
    'PRICES',
    'OverSeeds',
    'Row',
    'Scores',
    'contenders',
    'finding',
    'flat',
    'flat_scores',
    'missing',
    'over_seeds',
    'rows_of',
    'scores_of',
    'summary_of',
    'write_csv',
]

# columns that count tokens
COUNTS = ('tokens', 'new tokens', 'replayed tokens')
# Columns of an update: its mean loss less union's, and the two parts of that.
PRICES = ('above union', 'price of mixture', 'price of continuing')


@dataclass(frozen=True)
class OverSeeds:
    """A mean over seeds."""

    mean: float
    half: float | None  # half-width of its 95 % interval (Student's t); None for a single seed
    values: tuple[float, ...]

    def text(self, digits: int, scale: float = 1) -> str:
        """As people read it, multiplied by ``scale``: ``1.23 ± 0.04``."""
        half = '' if self.half is None else f' ± {scale * self.half:.{digits}f}'
        return f'{scale * self.mean:.{digits}f}{half}'


@dataclass(frozen=True)
class Row:
    """A row of the tables: one arm, or an average of its weights, at one model size."""

    arm: str
    average: str  # '' for the training weights
    size: int | None  # parameters of the model, if known
    kind: str  # update, union, matched or scratch
    runs: list[RunRecord]  # those that have finished, or else the one that has come furthest
    others: list[RunRecord]  # the other seeds, which have not finished
    columns: dict[str, OverSeeds]  # what it does not have is left out

    @property
    def name(self) -> str:
        """As people read it."""
        if self.average:
            return f'{self.arm}, {self.average}'
        alphas = dict.fromkeys(f'{run.alpha:g}' for run in self.runs if run.alpha is not None)
        return f'{self.arm} at {", ".join(alphas)}' if alphas else self.arm

    @property
    def is_point(self) -> bool:
        """Whether it is one of the points of a line, the best of which is the line's own row."""
        return is_point(self.average)

    @property
    def is_end_of_line(self) -> bool:
        """Whether it is the parent or the child of a line, which are arms themselves."""
        return bool(self.runs) and all(run.alpha in (0, 1) for run in self.runs)

    @property
    def is_finished(self) -> bool:
        """Whether its numbers are final losses."""
        return all(run.state == 'finished' for run in self.runs)

    @property
    def is_finite(self) -> bool:
        """Whether all its numbers are numbers; a finished run need not have any."""
        return all(isfinite(value.mean) for value in self.columns.values())

    @property
    def has_diverged(self) -> bool:
        """Whether one of its runs has."""
        return any(run.has_diverged for run in self.runs)

    @property
    def peers(self) -> tuple[str, ...]:
        """Of its runs: only rows of which it is the same are compared."""
        return self.runs[0].peers

    @property
    def note(self) -> str:
        """Remarks on a row: empty if it is finished, and has not diverged."""
        notes = [] if self.is_finished else [self.runs[0].progress]
        notes += [f'{len(self.others)} more not finished'] if self.others else []
        if diverged := sum(run.has_diverged for run in self.runs):
            notes += ['diverged' if len(self.runs) == 1 else f'{diverged} of {len(self.runs)} diverged']
        return ', '.join(notes)


@dataclass(frozen=True)
class Scores:
    """Task scores of a row."""

    row: Row
    suite: str
    tasks: dict[str, OverSeeds]  # accuracies in percent
    deltas: dict[str, Mean]  # against the parent's training weights, paired by item, where these were scored too
    mean: OverSeeds | None  # over the accuracies that all rows have
    mean_delta: Mean | None  # against the parent
    flips: dict[str, Flips]  # items that changed sides since the parent


def over_seeds(values: Sequence[float]) -> OverSeeds:
    """Mean with the 95 % interval of Student's t."""
    return OverSeeds(float(np.mean(values)), half_width(values) if len(values) > 1 else None, tuple(values))


@dataclass(frozen=True)
class _FromScratch:
    """The finished runs from scratch of one plan, as long as all of its stages: what its updates are set against."""

    runs: list[RunRecord]

    @classmethod
    def of(cls, arms: Sequence[Arm], study: RunSet) -> '_FromScratch':
        """Those among some arms; not the trunks of others. Of several unions, the one with the lowest mean loss."""
        found: dict[str, list[list[RunRecord]]] = {'union': [], 'matched': []}
        for arm in (arm for arm in arms if arm.kind in found):
            found[arm.kind].append([run for run in arm.runs if run.state == 'finished'])
        whole = {
            kind: [[run for run in runs if run.budget == max(run.budget for each in of for run in each)] for runs in of]
            for kind, of in found.items()
        }

        def loss(runs: list[RunRecord]) -> float:
            losses = [_losses(run, '', study).get('loss mean', inf) for run in runs]
            return float(np.mean(losses)) if losses else inf

        return cls([*min(whole['union'], key=loss, default=[]), *(run for runs in whole['matched'] for run in runs)])

    def union_hours(self, study: RunSet) -> float | None:
        """Device-hours of a union run."""
        hours = [spent for run in self.runs if run.kind == 'union' and (spent := study.hours(run)) is not None]
        return float(np.mean(hours)) if hours else None

    def loss(self, kind: str, of: RunRecord, average: str, study: RunSet) -> float | None:
        """Mean loss of the union, or of the matched run with an update's mixture, of the same seed."""
        for run in self.runs:
            if run.peers != of.peers or run.seed != of.seed:
                continue
            if run.kind == kind and (kind == 'union' or run.has_mixture_of(of)):
                return _losses(run, average, study).get('loss mean')
        return None


def _losses(run: RunRecord, average: str, study: RunSet) -> dict[str, float]:
    losses = by_average(run.final, study.data).get(average, {})
    columns = {f'loss {name}': losses[name] for name in study.data if name in losses}
    if losses and len(columns) == len(study.data):
        columns['loss mean'] = sum(losses.values()) / len(losses)
    return columns


def _prices(run: RunRecord, average: str, study: RunSet, against: _FromScratch) -> dict[str, float]:
    """``update - union = (matched - union) + (update - matched)``: the price of the mixture, and that of continuing."""
    ours = _losses(run, average, study).get('loss mean')
    if ours is None or run.kind != 'update' or run.state != 'finished' or not run.is_whole:
        return {}
    union, matched = (against.loss(kind, run, average, study) for kind in ('union', 'matched'))
    prices = {} if union is None else {'above union': ours - union}
    if union is not None and matched is not None:
        prices['price of mixture'] = matched - union
    return prices if matched is None else {**prices, 'price of continuing': ours - matched}


def _columns(run: RunRecord, average: str, study: RunSet, against: _FromScratch) -> dict[str, float]:
    """All numbers of one run, under the names they have in the table."""
    losses = by_average(run.final, study.data).get(average, {})
    columns = {**_losses(run, average, study), **_prices(run, average, study, against)}
    changed = changes(run.final, run.at_start, run.old, run.new)
    suffix = f'/{average}' if average else ''
    for key, name in product(('forgetting', 'adaptation'), ('mean', *study.data)):
        if f'{key}/{name}{suffix}' in changed:
            columns[key if name == 'mean' else f'{key} {name}'] = changed[f'{key}/{name}{suffix}']
    lengths = study.bytes_per_token(run)
    columns |= {
        f'bits per byte {name}': bits_per_byte(losses[name], lengths[name]) for name in lengths if name in losses
    }
    columns |= {'tokens': run.spent, 'new tokens': run.spent - run.replayed, 'replayed tokens': run.replayed}
    if run.parameters is not None:
        columns['flops'] = training_flops(run.parameters, run.spent)
    if run.union_tokens:
        columns['compute vs union'] = run.spent / run.union_tokens
    hours = study.hours(run)
    if hours is not None:
        columns['device hours'] = hours
        if run.state == 'finished' and run.began_from:
            # without a union run: what one would have taken at this run's pace
            estimate = hours / run.spent * run.union_tokens if run.union_tokens else None
            union_hours = against.union_hours(study)
            whole, key = (union_hours, '') if union_hours is not None else (estimate, ' (estimated)')
            if whole is not None:
                columns[f'device hours saved{key}'] = whole - hours
    return columns


def _row(arm: Arm, average: str, size: int | None, study: RunSet, against: _FromScratch) -> Row:
    finished = [run for run in arm.runs if run.state == 'finished']
    # the latest losses of seeds that have come to different batches have no mean
    runs = finished or [max(arm.runs, key=lambda run: run.batch)]
    others = [run for run in arm.runs if run not in runs]
    by_run = [_columns(run, average, study, against) for run in runs]
    names = [name for name in by_run[0] if all(name in columns for columns in by_run)]
    means = {name: over_seeds([columns[name] for columns in by_run]) for name in names}
    return Row(arm.name, average, size, arm.kind, runs, others, means)


def rows_of(study: RunSet) -> list[Row]:
    """One row for each arm, average of its weights and model size: means over the seeds that have finished."""
    rows = []
    for size in study.sizes:
        every = study.arms(size)
        for plan in dict.fromkeys(arm.runs[0].plan for arm in every):
            arms = [arm for arm in every if arm.runs[0].plan == plan]
            against = _FromScratch.of(arms, study)
            for arm in arms:
                averages = dict.fromkeys(['', *(a for run in arm.runs for a in by_average(run.final, study.data))])
                rows += [_row(arm, average, size, study, against) for average in averages]
    return rows


def summary_of(rows: Sequence[Row], data: Sequence[str], arm: str) -> dict[str, float]:
    """Metrics of a sweep: final losses, forgetting and adaptation of the last stage of an arm."""
    summary = {}
    for row in (row for row in rows if row.arm == arm and row.is_finished and not row.others):
        for key, column, mean in (
            ('final_loss', 'loss', 'loss mean'),
            ('final_forgetting', 'forgetting', 'forgetting'),
            ('final_adaptation', 'adaptation', 'adaptation'),
        ):
            columns = {'mean': mean, **{name: f'{column} {name}' for name in data}}
            found = {name: row.columns[each].mean for name, each in columns.items() if each in row.columns}
            of_average = f'/{row.average}' if row.average else ''
            summary |= {f'{key}/{name}{of_average}': value for name, value in found.items()}
    return summary


def scores_of(study: RunSet, rows: Sequence[Row]) -> list[Scores]:
    """lm-eval scores by suite and row, with their change against the parent's training weights on the same items."""
    scores = []
    for suite in dict.fromkeys(suite for row in rows for run in row.runs for suite in run.benchmarks):
        of_rows = [
            [(run, of[r.average]['tasks']) for run in r.runs if r.average in (of := run.benchmarks.get(suite, {}))]
            for r in rows
        ]
        every = [tasks for found in of_rows for _, tasks in found]
        # by task, whether its accuracy is one that all rows have
        names = dict.fromkeys(task for tasks in every for task in tasks)
        names = {name: all(name in tasks and is_accuracy(tasks[name]) for tasks in every) for name in names}
        scores += [_scores(study, row, suite, found, names) for row, found in zip(rows, of_rows, strict=True) if found]
    return scores


def _scores(study: RunSet, row: Row, suite: str, found: list[tuple[RunRecord, Any]], names: dict[str, bool]) -> Scores:
    common = [name for name, is_common in names.items() if is_common]
    of_tasks = {name: of for name in names if (of := [(run, tasks[name]) for run, tasks in found if name in tasks])}
    means = {name: over_seeds([_scale(result) * result['score'] for _, result in of]) for name, of in of_tasks.items()}
    changed_by = {name: _against_parents(study, suite, name, of) for name, of in of_tasks.items()}
    deltas = {name: delta for name, (delta, _) in changed_by.items() if delta is not None}
    flipped = {name: changed for name, (_, changed) in changed_by.items() if changed is not None}
    over_tasks = [float(np.mean([tasks[name]['score'] * 100 for name in common])) for _, tasks in found if common]
    changed = [deltas[name] for name in common if name in deltas]
    mean_delta = mean_over_tasks(changed) if changed and len(changed) == len(common) else None
    mean = over_seeds(over_tasks) if over_tasks else None
    return Scores(row, suite, means, deltas, mean, mean_delta, flipped)


def _scale(result: Mapping[str, Any]) -> float:
    return 100.0 if is_accuracy(result) else 1.0


def _against_parents(
    study: RunSet, suite: str, task: str, found: list[tuple[RunRecord, Any]]
) -> tuple[Mean | None, Flips | None]:
    """Change against the parents, item by item: seeds answer the same items, so each is first averaged over them."""
    parents = []
    for run, result in found:
        of_parent = study.parent_benchmarks(run).get(suite, {}).get('', {})
        parents.append(of_parent.get('tasks', {}).get(task, {}))
        if not has_same_items(result, parents[-1]) or not has_same_items(result, found[0][1]):
            return None, None
    ours, theirs = (np.mean([each['values'] for each in side], axis=0) for side in ([r for _, r in found], parents))
    scale = _scale(found[0][1])
    delta = paired_delta(list(scale * ours), list(scale * theirs), found[0][1]['weights'])
    answers = [(result['values'], parent['values']) for (_, result), parent in zip(found, parents, strict=True)]
    changed = flips(answers, found[0][1].get('choices')) if is_accuracy(found[0][1]) else None
    return Mean(float(delta.value), float(delta.stderr), delta.count), changed


def _is_told_apart(row: Row, other: Row, column: str) -> bool:
    """Whether the difference, paired by seed, has an interval without 0."""
    ours, theirs = (
        {run.seed: value for run, value in zip(r.runs, r.columns[column].values, strict=True)} for r in (row, other)
    )
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    found = over_seeds(differences) if len(differences) > 1 else None
    return found is not None and found.half is not None and abs(found.mean) > found.half


def contenders(rows: Sequence[Row], size: int | None, peers: tuple[str, ...] | None = None) -> list[Row]:
    """Finished rows that are compared with each other: updates of a parent, or without any, runs from scratch.

    Not those that have diverged, or ended with what is no number, or were trained by another plan of their sequence, or
    judged otherwise; nor branches of an earlier stage, nor trunks that are shorter than their stage.
    """
    peers = _foremost(rows, size) if peers is None else peers
    of_size = [row for row in rows if row.size == size and row.peers == peers and row.runs[0].is_whole]
    kind = 'update' if any(row.kind == 'update' for row in of_size) else 'scratch'
    able = [row for row in of_size if row.kind == kind and row.is_finished]
    able = [row for row in able if not (row.is_point or row.is_end_of_line)]
    return [row for row in able if row.is_finite and not row.has_diverged]


def _foremost(rows: Sequence[Row], size: int | None) -> tuple[str, ...]:
    """Which rows a report speaks of: by the plan of today, and judged as the first update, or without any the first."""
    of_today = [row for row in rows if row.size == size and not row.runs[0].other_plan and row.runs[0].record]
    return next((row.peers for row in sorted(of_today, key=lambda row: row.kind != 'update')), ())


def finding(rows: Sequence[Row], size: int | None) -> str:
    """The answer in a sentence or two: the arm with the lowest mean loss, what it forgot, learned and cost."""
    foremost = _foremost(rows, size)
    rows = [row for row in rows if row.size == size and row.peers in (foremost, ())]  # those that have not begun
    finished = [row for row in rows if row.is_finished]
    done = [row for row in finished if 'loss mean' in row.columns]
    able = [row for row in contenders(rows, size) if 'loss mean' in row.columns]
    updates = [row for row in able if {'forgetting', 'adaptation'} <= row.columns.keys()]
    if not finished:
        return 'Nothing has finished yet: every number is the latest one.'
    if not done:
        return 'No run that has finished was evaluated on all data.'
    if not updates:
        tried = [row for row in finished if row.kind == 'update']
        if tried and (how := _how_all_failed(tried)):
            return f'Every update that has finished {how}.'
        numbers = [row for row in done if row.is_finite]
        if not numbers:
            return f'Every run that has finished {_how_all_failed(done)}.'
        best = min(able or numbers, key=lambda row: row.columns['loss mean'].mean)
        text = f'{best.name}: mean final loss {best.columns["loss mean"].mean:.3f}'
        is_waiting = not tried and any(row.kind == 'update' for row in rows)
        return (
            f'{text}. No update of a parent has finished yet.' if is_waiting else f'{text}, the lowest of {len(done)}.'
        )
    best = min(updates, key=lambda row: row.columns['loss mean'].mean)
    mean = {column: value.mean for column, value in best.columns.items()}
    old, new = (' and '.join(names) for names in (best.runs[0].old, best.runs[0].new))
    forgot = mean['forgetting']
    did = f'forgot {forgot:.2f} nats/token' if forgot >= 0.005 else f'forgot nothing ({signed(forgot, 2)} nats/token)'
    without = [row for row in updates if not (row.average or row.runs[0].replayed or row.runs[0].merge)]
    if without and best.runs[0].replayed:
        other = min(without, key=lambda row: row.columns['loss mean'].mean)
        did += f' ({other.columns["forgetting"].mean:.2f} without replay)'
    cost = f'for {short(mean["tokens"])} tokens'
    if 'compute vs union' in mean:
        cost = f'for {percent(mean["compute vs union"])} of the compute of training on everything'
    text = f'{best.name}: {did} of {old} and learned {mean["adaptation"]:.2f} of {new}, {cost}'
    unions = [row for row in done if row.kind == 'union' and not row.average and row.is_finite]
    if unions:
        lowest = min(row.columns['loss mean'].mean for row in unions)
        gap = mean.get('above union', mean['loss mean'] - lowest)  # of the same seeds, if they are
        text += f'; its mean loss is {abs(gap):.3f} {"above" if gap > 0 else "below"} that of union'
        if {*PRICES} <= mean.keys():
            text += (
                f': {signed(mean["price of mixture"], 3)} is the price of its mixture, which training from scratch on '
                f'it pays, too, and {signed(mean["price of continuing"], 3)} that of continuing'
            )
    others = [row for row in updates if row.arm != best.arm and best.columns['loss mean'].half is not None]
    if close := dict.fromkeys(row.arm for row in others if not _is_told_apart(best, row, 'loss mean')):
        text += f'. The seeds do not tell its mean loss from that of {" or ".join(close)}'
    if waiting := len({row.arm for row in rows if row.kind == 'update' and not row.is_finished}):
        text += f'. Not finished yet: {waiting} of the updates'
    return f'{text}.'


def _how_all_failed(rows: Sequence[Row]) -> str:
    """In words, how all of some finished rows came to have nothing to compare; nothing if one has."""
    if any(row.is_finite and not row.has_diverged for row in rows):
        return ''
    diverged, no_number = any(row.has_diverged for row in rows), any(not row.is_finite for row in rows)
    words = ['has diverged'] * diverged + ['has ended with losses that are no numbers'] * no_number
    return ' or '.join(words)


def missing(study: RunSet, rows: Sequence[Row]) -> Iterator[str]:
    """Results that a reader may expect and that are missing."""
    runs = study.given
    for run in runs:
        if run.state == 'not started':
            parent = study.runs[run.parent] if run.parent else None
            why = f' (its parent {parent.name}: {parent.progress})' if parent and parent.state != 'finished' else ''
            yield f'{run.name}: not started{why}'
        elif run.state == 'failed':
            yield f'{run.name}: {run.progress}: {run.error}'
        elif run.state == 'unfinished':
            yield f'{run.name}: unfinished, {run.progress}; its numbers are the latest ones'
    for name, folder in study.missing_parents.items():
        yield f'{name}: the folder of its parent ({folder}) is not there, so its own stage is all that is shown'
    for plan in dict.fromkeys(run.other_plan for run in runs if run.other_plan):
        names = ', '.join(run.name for run in runs if run.other_plan == plan)
        how = f'Trained by another plan of their sequence ({first_of(plan)}, in the plan of today)'
        yield f'{how}, and compared only with each other: {names}'
    of_today = [row for row in rows if not row.runs[0].other_plan and row.runs[0].record and not row.average]
    for size in dict.fromkeys(row.size for row in of_today):
        unlike = [row for row in of_today if row.size == size and row.peers != _foremost(rows, size)]
        for peers in dict.fromkeys(row.peers for row in unlike):
            names = ', '.join(study.label(row.name, size) for row in unlike if row.peers == peers)
            how = 'Judged by another evaluation or final loss, or in the tokens of another tokenizer'
            yield f'{how}, and compared only with each other: {names}'
    for run in runs:
        if run.has_diverged:
            first, *_, last = (loss for _, _, loss in run.training_loss)
            how = f'its training loss began at {first:.2f} and ended at {last:.2f}, more than ln 2 above its lowest'
            yield f'{run.name}: diverged: {how}; it is compared with no other'
        if run.losses and (unseen := [name for name in study.data if name not in run.losses]):
            yield f'{run.name}: not evaluated on {", ".join(unseen)}'
        if lost := [label for label, loss in run.final.items() if not isfinite(loss)]:
            yield f'{run.name}: its loss on {", ".join(lost)} is not a number'
        if run.kind == 'update' and run.began_from and run.losses and not run.at_start:
            yield f'{run.name}: no forgetting.json, so neither forgetting nor adaptation is known'
    if any(row.kind == 'update' for row in rows) and not any(row.kind == 'union' for row in rows):
        yield 'No union baseline: what training on everything from scratch would have reached is not known'
    single = [row for row in rows if len(row.runs) + len(row.others) == 1]
    if rows and len(single) == len(rows):
        yield 'Only one seed: no intervals, and small differences between arms may be chance'
    elif single:
        names = dict.fromkeys(study.label(row.arm, row.size) for row in single)
        yield f'Only one seed, so no interval: {", ".join(names)}'
    yield from _missing_benchmarks(runs)


def _missing_benchmarks(runs: Sequence[RunRecord]) -> Iterator[str]:
    suites = list(dict.fromkeys(suite for run in runs for suite in run.scored))
    if not suites:
        yield 'No lm-eval results: only validation losses are compared'
    finished = [run for run in runs if run.state == 'finished']
    for suite in suites:
        if without := [run.name for run in finished if suite not in run.scored]:
            yield f'lm-eval {suite}: no results of {", ".join(without)}'
        for run in runs:
            for average, results in run.scored.get(suite, {}).items():
                if run.newest not in results:
                    who = f'{run.name}, {average}' if average else run.name
                    yield f'lm-eval {suite}: no results of {who} at batch {run.newest}, only at batch {max(results)}'
        said: dict[str, list[str]] = {}
        for run in runs:
            for result in run.benchmarks.get(suite, {}).values():
                for task, scored in result['tasks'].items():
                    if cut := cuts_of(scored):
                        line = f'{task}: {cut} prompts are longer than the model can read, and were cut'
                        said.setdefault(line, []).append(run.name)
                    if hits := run.contamination.get(scored['task']):
                        line = f'{task}: at least {hits.items:,} of its {hits.of:,} items are in the training data'
                        said.setdefault(line, []).append(run.name)
                for task, reason in result.get('missing', {}).items():
                    said.setdefault(f'{task} is missing: {reason}', []).append(run.name)
        evaluated = {run.name for run in runs if suite in run.benchmarks}
        for line, of in said.items():
            where = 'all runs' if set(of) == evaluated else ', '.join(dict.fromkeys(of))
            yield f'lm-eval {suite}: {where}: {line}'


def flat(row: Row) -> dict[str, Any]:
    """A row as JSON and CSV hold it: means by column, with ``<column> interval`` where there are several seeds."""
    state = row.note or 'finished'
    result: dict[str, Any] = {'arm': row.name, 'parameters': row.size, 'seeds': len(row.runs), 'state': state}
    for column, value in row.columns.items():
        result[column] = value.mean
        # the same for every seed
        if value.half is not None and column not in (*COUNTS, 'flops', 'compute vs union'):
            result[f'{column} interval'] = value.half
    return result


def flat_scores(scores: Scores) -> dict[str, Any]:
    """Scores as JSON holds them."""
    return {
        'arm': scores.row.name,
        'parameters': scores.row.size,
        'suite': scores.suite,
        'tasks': {task: asdict(score) for task, score in scores.tasks.items()},
        'against parent': {task: {**asdict(d), 'noise': within_noise(d)} for task, d in scores.deltas.items()},
        'mean': None if scores.mean is None else asdict(scores.mean),
        'mean against parent': None if scores.mean_delta is None else asdict(scores.mean_delta),
        'items that changed sides': {task: asdict(each) for task, each in scores.flips.items()},
    }


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table with all its columns; what a row does not have is left empty."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO(newline='')
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())
