# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the report: rows of the papers' tables, means over seeds, costs, findings, what is missing."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from cpt_algorithms.evaluation.functional import (
    Mean,
    bits_per_byte,
    by_average,
    changes,
    mean_over_tasks,
    paired_delta,
    training_flops,
    within_noise,
)
from cpt_algorithms.files import write_atomic
from cpt_algorithms.report.run_records import Arm, RunRecord, RunSet

__all__ = [
    'COUNTS',
    'OverSeeds',
    'Row',
    'Scores',
    'contenders',
    'finding',
    'flat',
    'flat_scores',
    'flop',
    'missing',
    'over_seeds',
    'percent',
    'progress',
    'rows_of',
    'scores_of',
    'short',
    'signed',
    'size_name',
    'write_csv',
]


# columns that count tokens
COUNTS = ('tokens', 'new tokens', 'replayed tokens')


@dataclass(frozen=True)
class OverSeeds:
    """A mean over seeds.

    Args:
        mean: The mean.
        half: Half-width of its 95 % interval (Student's t); None for a single seed.
        values: Of each seed.
    """

    mean: float
    half: float | None
    values: tuple[float, ...]

    @property
    def count(self) -> int:
        """Seeds."""
        return len(self.values)


@dataclass(frozen=True)
class Row:
    """A row of the tables: one arm, or an average of its weights, at one model size.

    Args:
        arm: Its name.
        average: Name of the average; '' for the training weights.
        size: Parameters of the model; None if unknown.
        kind: ``update``, ``union`` or ``scratch``.
        runs: The runs behind it: those that have finished, or else the one that has come furthest.
        others: The other seeds, which have not finished.
        columns: ``{column: mean over seeds}``; what it does not have is left out.
    """

    arm: str
    average: str
    size: int | None
    kind: str
    runs: list[RunRecord]
    others: list[RunRecord]
    columns: dict[str, OverSeeds]

    @property
    def name(self) -> str:
        """As people read it."""
        return f'{self.arm}, {self.average}' if self.average else self.arm

    @property
    def is_finished(self) -> bool:
        """Whether its numbers are final losses."""
        return all(run.state == 'finished' for run in self.runs)

    @property
    def note(self) -> str:
        """What is not as it should be: empty for a row that is finished, and has not diverged."""
        notes = [] if self.is_finished else [progress(self.runs[0])]
        notes += [f'{len(self.others)} more not finished'] if self.others else []
        if diverged := sum(run.has_diverged for run in self.runs):
            notes += ['diverged' if len(self.runs) == 1 else f'{diverged} of {len(self.runs)} diverged']
        return ', '.join(notes)


@dataclass(frozen=True)
class Scores:
    """Task scores of a row.

    Args:
        row: The row.
        suite: The suite of tasks.
        tasks: ``{task: score}``, accuracies in percent.
        deltas: ``{task: change against the parent's training weights, paired by item}``, where these were scored too.
        mean: Over the accuracies that all rows have.
        mean_delta: Its change against the parent.
    """

    row: Row
    suite: str
    tasks: dict[str, OverSeeds]
    deltas: dict[str, Mean]
    mean: OverSeeds | None
    mean_delta: Mean | None


def over_seeds(values: Sequence[float]) -> OverSeeds:
    r"""Mean with the 95 % interval of Student's t: :math:`\bar x \pm t_{n-1} s / \sqrt n`."""
    count = len(values)
    spread = student.ppf(0.975, count - 1) * np.std(values, ddof=1) / sqrt(count) if count > 1 else None
    return OverSeeds(float(np.mean(values)), None if spread is None else float(spread), tuple(values))


def size_name(size: int | None) -> str:
    """A number of parameters as people write it: 405 M."""
    return 'unknown size' if size is None else f'{short(size)} parameters'


def short(value: float) -> str:
    """A large number as people write it: 0.53 M, 299 B."""
    power, letter = next(((p, x) for p, x in ((12, 'T'), (9, 'B'), (5, 'M'), (3, 'k')) if value >= 10**p), (0, ''))
    value /= 10 ** (6 if power == 5 else power)
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f'{value:.{digits}f} {letter}' if letter else f'{value:.0f}'


def percent(share: float) -> str:
    """A share as people write it: 37 %."""
    return f'{100 * share:.0f} %'


def signed(value: float, digits: int) -> str:
    """A change with its sign, but no sign on a zero."""
    text = f'{value:+.{digits}f}'
    return text if float(text) else text[1:]


def flop(value: float) -> str:
    """Floating point operations as people write them: 3.86 TFLOP."""
    power, letter = next(((p, x) for p, x in ((21, 'Z'), (18, 'E'), (15, 'P'), (12, 'T')) if value >= 10**p), (9, 'G'))
    return f'{value / 10**power:.3g} {letter}FLOP'


def progress(run: RunRecord) -> str:
    """How far a run has come."""
    if run.state in ('finished', 'not started'):
        return run.state
    batches = 'an unknown number' if run.batches is None else f'{run.batches:,}'
    at = f'at batch {run.cost.get("batch", 0):,} of {batches}'
    return f'failed, last evaluated {at}' if run.state == 'failed' else at


def _columns(run: RunRecord, average: str, study: RunSet, union_hours: float | None) -> dict[str, float]:
    """All numbers of one run, under the names they have in the table."""
    losses = by_average(run.final, study.data).get(average, {})
    columns = {f'loss {name}': losses[name] for name in study.data if name in losses}
    if losses and len(columns) == len(study.data):
        columns['loss mean'] = sum(losses.values()) / len(losses)
    changed = changes(run.final, run.at_start, run.old, run.new)
    suffix = f'/{average}' if average else ''
    for key in ('forgetting', 'adaptation'):
        if f'{key}/mean{suffix}' in changed:
            columns[key] = changed[f'{key}/mean{suffix}']
        columns |= {
            f'{key} {name}': changed[f'{key}/{name}{suffix}']
            for name in study.data
            if f'{key}/{name}{suffix}' in changed
        }
    for name, length in study.bytes_per_token.items():
        if name in losses:
            columns[f'bits per byte {name}'] = bits_per_byte(losses[name], length)
    columns |= {'tokens': run.budget, 'new tokens': run.budget - run.replayed, 'replayed tokens': run.replayed}
    if run.parameters is not None:
        columns['flops'] = training_flops(run.parameters, run.budget)
    if run.union_tokens:
        columns['compute against union'] = run.budget / run.union_tokens
    hours = study.hours(run)
    if hours is not None:
        columns['device hours'] = hours
        if run.state == 'finished' and run.load_path:
            # without a union run: what one would have taken at this run's pace
            estimate = hours / run.budget * run.union_tokens if run.union_tokens else None
            against, key = (union_hours, '') if union_hours is not None else (estimate, ' (estimated)')
            if against is not None:
                columns[f'device hours saved{key}'] = against - hours
    return columns


def _row(arm: Arm, average: str, size: int | None, study: RunSet, union_hours: float | None) -> Row:
    finished = [run for run in arm.runs if run.state == 'finished']
    # the latest losses of seeds that have come to different batches have no mean
    runs = finished or [max(arm.runs, key=lambda run: run.cost.get('batch', 0))]
    others = [run for run in arm.runs if run not in runs]
    by_run = [_columns(run, average, study, union_hours) for run in runs]
    names = [name for name in by_run[0] if all(name in columns for columns in by_run)]
    means = {name: over_seeds([columns[name] for columns in by_run]) for name in names}
    return Row(arm.name, average, size, arm.kind, runs, others, means)


def rows_of(study: RunSet) -> list[Row]:
    """One row for each arm, average of its weights and model size: means over the seeds that have finished."""
    rows = []
    for size in study.sizes:
        arms = study.arms(size)
        union = [run for arm in arms if arm.kind == 'union' for run in arm.runs if run.state == 'finished']
        most = max((run.budget for run in union), default=0)  # and not a trunk
        hours = [spent for run in union if run.budget == most and (spent := study.hours(run)) is not None]
        union_hours = float(np.mean(hours)) if hours else None
        for arm in arms:
            averages = dict.fromkeys(['', *(a for run in arm.runs for a in by_average(run.final, study.data))])
            rows += [_row(arm, average, size, study, union_hours) for average in averages]
    return rows


def _is_accuracy(result: Mapping[str, Any]) -> bool:
    return result['higher_is_better'] and set(result['weights']) == {1}


def scores_of(study: RunSet, rows: Sequence[Row]) -> list[Scores]:
    """lm-eval scores by suite and row, with their change against the parent's training weights on the same items."""
    scores = []
    for suite in dict.fromkeys(suite for row in rows for run in row.runs for suite in run.benchmarks):
        tasks_of = {
            index: [(run, run.benchmarks[suite][row.average]['tasks']) for run in row.runs if _has(run, suite, row)]
            for index, row in enumerate(rows)
        }
        every = [tasks for found in tasks_of.values() for _, tasks in found]
        names = list(dict.fromkeys(task for tasks in every for task in tasks))
        common = [name for name in names if all(name in tasks and _is_accuracy(tasks[name]) for tasks in every)]
        scores += [
            _scores(study, rows[index], suite, found, names, common) for index, found in tasks_of.items() if found
        ]
    return scores


def _has(run: RunRecord, suite: str, row: Row) -> bool:
    return row.average in run.benchmarks.get(suite, {})


def _scores(
    study: RunSet,
    row: Row,
    suite: str,
    found: Sequence[tuple[RunRecord, Mapping[str, Any]]],
    names: Sequence[str],
    common: Sequence[str],
) -> Scores:
    means: dict[str, OverSeeds] = {}
    deltas: dict[str, Mean] = {}
    for name in names:
        with_task = [(run, tasks[name]) for run, tasks in found if name in tasks]
        if with_task:
            means[name] = over_seeds([_scale(result) * result['score'] for _, result in with_task])
            delta = _against_parents(study, suite, name, with_task)
            if delta is not None:
                deltas[name] = delta
    over_tasks = [float(np.mean([tasks[name]['score'] * 100 for name in common])) for _, tasks in found if common]
    changed = [deltas[name] for name in common if name in deltas]
    mean_delta = mean_over_tasks(changed) if changed and len(changed) == len(common) else None
    return Scores(row, suite, means, deltas, over_seeds(over_tasks) if over_tasks else None, mean_delta)


def _scale(result: Mapping[str, Any]) -> float:
    return 100.0 if _is_accuracy(result) else 1.0


def _against_parents(
    study: RunSet, suite: str, task: str, found: Sequence[tuple[RunRecord, Mapping[str, Any]]]
) -> Mean | None:
    """Change against the parents, item by item: seeds answer the same items, so each is first averaged over them."""
    same = ('entry', 'items', 'weights')
    parents = []
    for run, result in found:
        scored = study.runs[run.parent].benchmarks if run.parent else run.base_benchmarks
        of_parent = scored.get(suite, {}).get('', {})
        parents.append(of_parent.get('tasks', {}).get(task, {}))
        if any(parents[-1].get(key) != result[key] or result[key] != found[0][1][key] for key in same):
            return None
    ours, theirs = (np.mean([each['values'] for each in side], axis=0) for side in ([r for _, r in found], parents))
    scale = _scale(found[0][1])
    delta = paired_delta(list(scale * ours), list(scale * theirs), found[0][1]['weights'])
    return Mean(float(delta.value), float(delta.stderr), delta.count)


def _is_told_apart(row: Row, other: Row, column: str) -> bool:
    """Whether the difference, paired by seed, has an interval without 0."""
    by_seed = [dict(zip((run.seed for run in r.runs), r.columns[column].values, strict=True)) for r in (row, other)]
    both = [seed for seed in by_seed[0] if seed in by_seed[1]]
    difference = over_seeds([by_seed[0][seed] - by_seed[1][seed] for seed in both]) if both else None
    return difference is not None and difference.half is not None and abs(difference.mean) > difference.half


def contenders(rows: Sequence[Row], size: int | None) -> list[Row]:
    """Finished rows that are compared with each other: updates of a parent, or without any, runs from scratch.

    Not those that have diverged.
    """
    of_size = [row for row in rows if row.size == size]
    kind = 'update' if any(row.kind == 'update' for row in of_size) else 'scratch'
    able = [row for row in of_size if row.kind == kind and row.is_finished]
    able = [row for row in able if not any(run.has_diverged for run in row.runs)]
    return [row for row in able if all(isfinite(value.mean) for value in row.columns.values())]


def finding(rows: Sequence[Row], size: int | None) -> str:
    """The answer in a sentence or two: the arm with the lowest mean loss, what it forgot, learned and cost."""
    rows = [row for row in rows if row.size == size]
    done = [row for row in rows if row.is_finished and 'loss mean' in row.columns]
    able = [row for row in contenders(rows, size) if 'loss mean' in row.columns]
    updates = [row for row in able if {'forgetting', 'adaptation'} <= row.columns.keys()]
    if not done:
        return 'Nothing has finished yet: every number is the latest one.'
    if not updates:
        best = min(able or done, key=lambda row: row.columns['loss mean'].mean)
        tried = [run for row in done if row.kind == 'update' for run in row.runs]
        if tried and all(run.has_diverged for run in tried):
            return 'Every update that has finished has diverged.'
        waiting = any(row.kind == 'update' for row in rows)
        text = f'{best.name}: mean final loss {best.columns["loss mean"].mean:.3f}'
        return f'{text}. No update of a parent has finished yet.' if waiting else f'{text}, the lowest of {len(done)}.'
    best = min(updates, key=lambda row: row.columns['loss mean'].mean)
    forgot, learned = best.columns['forgetting'].mean, best.columns['adaptation'].mean
    old, new = (' and '.join(names) for names in (best.runs[0].old, best.runs[0].new))
    did = f'forgot {forgot:.2f} nats/token' if forgot >= 0.005 else f'forgot nothing ({signed(forgot, 2)} nats/token)'
    if 'compute against union' in best.columns:
        cost = f'for {percent(best.columns["compute against union"].mean)} of the compute of training on everything'
    else:
        cost = f'for {short(best.columns["tokens"].mean)} tokens'
    text = f'{best.name}: {did} of {old} and learned {learned:.2f} of {new}, {cost}'
    if union := [row for row in done if row.kind == 'union' and not row.average]:
        gap = best.columns['loss mean'].mean - min(row.columns['loss mean'].mean for row in union)
        side = 'above' if gap > 0 else 'below'
        text += f'; its mean loss is {abs(gap):.2f} {side} that of union'
    if best.columns['loss mean'].half is not None:
        others = [row for row in updates if row.arm != best.arm]
        close = dict.fromkeys(row.arm for row in others if not _is_told_apart(best, row, 'loss mean'))
        text += f'. The seeds do not tell its mean loss from that of {" or ".join(close)}' if close else ''
    waiting = len({row.arm for row in rows if row.kind == 'update' and not row.is_finished})
    text += f'. Not finished yet: {waiting} of the updates' if waiting else ''
    return f'{text}.'


def missing(study: RunSet, rows: Sequence[Row]) -> list[str]:
    """What a reader might take for granted and is not there."""
    said: list[str] = []
    several = len(study.sizes) > 1
    runs = [run for run in study.runs.values() if run.is_asked_for]
    for run in runs:
        if run.state == 'not started':
            parent = study.runs[run.parent] if run.parent else None
            why = f' (its parent {parent.name}: {progress(parent)})' if parent and parent.state != 'finished' else ''
            said.append(f'{run.name}: not started{why}')
        elif run.state == 'failed':
            said.append(f'{run.name}: {progress(run)}: {run.error}')
        elif run.state == 'unfinished':
            said.append(f'{run.name}: unfinished, {progress(run)}; its numbers are the latest ones')
    said += [
        f'{name}: the folder of its parent ({folder}) is not there, so its own stage is all that is shown'
        for name, folder in study.lost.items()
    ]
    for run in runs:
        if run.has_diverged:
            first, *_, last = (loss for _, _, loss in run.training_loss)
            said.append(
                f'{run.name}: diverged: its training loss began at {first:.2f} and ended at {last:.2f}, more than '
                'ln 2 above its lowest; it is compared with no other'
            )
        if run.losses and (unseen := [name for name in study.data if name not in run.losses]):
            said.append(f'{run.name}: not evaluated on {", ".join(unseen)}')
        if lost := [label for label, loss in run.final.items() if not isfinite(loss)]:
            said.append(f'{run.name}: its loss on {", ".join(lost)} is not a number')
        from_scratch = run.trunk and run.parent and not study.runs[run.parent].load_path  # the first stage's branch
        if run.load_path and run.losses and not run.at_start and not from_scratch:
            said.append(f'{run.name}: no forgetting.json, so neither forgetting nor adaptation is known')
    if any(row.kind == 'update' for row in rows) and not any(row.kind == 'union' for row in rows):
        said.append('No union baseline: what training on everything from scratch would have reached is not known')
    single = [row for row in rows if len(row.runs) + len(row.others) == 1]
    if rows and len(single) == len(rows):
        said.append('Only one seed: no intervals, and small differences between arms may be chance')
    elif single:
        names = dict.fromkeys(f'{row.arm} ({size_name(row.size)})' if several else row.arm for row in single)
        said.append(f'Only one seed, so no interval: {", ".join(names)}')
    return said + list(_missing_benchmarks(runs))


def _missing_benchmarks(runs: Sequence[RunRecord]) -> Iterator[str]:
    suites = list(dict.fromkeys(suite for run in runs for suite in run.benchmarks))
    if not suites:
        yield 'No lm-eval results: only validation losses are compared'
    finished = [run for run in runs if run.state == 'finished']
    for suite in suites:
        if without := [run.name for run in finished if suite not in run.benchmarks]:
            yield f'lm-eval {suite}: no results of {", ".join(without)}'
        reasons: dict[tuple[str, str], list[str]] = {}
        evaluated = {run.name for run in runs if suite in run.benchmarks}
        for run in runs:
            for result in run.benchmarks.get(suite, {}).values():
                for task, reason in result.get('missing', {}).items():
                    reasons.setdefault((task, reason), []).append(run.name)
        for (task, reason), of in reasons.items():
            where = 'everywhere' if set(of) == evaluated else f'in {", ".join(dict.fromkeys(of))}'
            yield f'lm-eval {suite}: {task} is missing {where}: {reason}'


def flat(row: Row) -> dict[str, Any]:
    """A row as JSON and CSV hold it: means by column, with ``<column> interval`` where there are several seeds."""
    result: dict[str, Any] = {
        'arm': row.name,
        'parameters': row.size,
        'seeds': len(row.runs),
        'state': row.note or 'finished',
    }
    for column, value in row.columns.items():
        result[column] = value.mean
        # the same for every seed
        if value.half is not None and column not in (*COUNTS, 'flops', 'compute against union'):
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
    }


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table with all its columns; what a row does not have is left empty."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO(newline='')
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())
