# SPDX-License-Identifier: Apache-2.0
"""The report of runs: one page to look at, the same as PNG, CSV and JSON files, and a table for the terminal."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cpt_algorithms.evaluation.functional import Flips, Mean, shots_of, within_noise
from cpt_algorithms.files import write_atomic, write_json
from cpt_algorithms.formatting import flop, percent, short, signed
from cpt_algorithms.report.lineage import tree_of
from cpt_algorithms.report.plots import plots_of, png, svg
from cpt_algorithms.report.run_records import RunSet, read_runs, size_name
from cpt_algorithms.report.tables import (
    COUNTS,
    PRICES,
    OverSeeds,
    Row,
    Scores,
    contenders,
    finding,
    flat,
    flat_scores,
    missing,
    rows_of,
    scores_of,
    write_csv,
)
from cpt_algorithms.terminal import print_table

__all__ = ['Report', 'print_report', 'rich_table', 'write_report']

LOWER_IS_BETTER = ('loss', 'forgetting', 'bits per byte', *PRICES)
CHANGES = ('forgetting', 'adaptation')
# what the cards say: the best of a column
QUESTIONS: list[tuple[str, str, str, Any, str]] = [
    ('Forgot', 'least', 'forgetting', min, 'nats/token'),
    ('Learned', 'most', 'adaptation', max, 'nats/token'),
    ('Mean loss:', 'best', 'loss mean', min, 'nats/token'),
    ('Cost of an update:', 'lowest', 'compute vs union', min, 'of training on everything'),
]
STATES = ('finished', 'unfinished', 'failed', 'not started')


@dataclass(frozen=True)
class Report:
    """The page that was written, and its numbers."""

    study: RunSet
    findings: list[str]  # a sentence or two for each model size
    rows: list[Row]
    scores: list[Scores]  # of lm-eval, by suite and row
    missing: list[str]
    path: Path  # of the page

    @property
    def shown(self) -> list[Row]:
        """Without the points of lines, which have a table of their own."""
        return [row for row in self.rows if not row.is_point]


class _Cell(NamedTuple):
    text: str = '-'
    small: str = ''
    look: str = ''


class _Line(NamedTuple):
    name: str
    note: str
    look: str
    cells: list[_Cell]


_FLIPS = (
    'Right for the parent and wrong now / the reverse. Small: of that at least, as guessing anew '
    'gives no more than the rest, ± 95 % interval over items; grey: neither is above 0 by more than that.'
)
_ON_PAPER = 10  # columns that fit on an upright A4 or letter page, beside the names


class _Table(NamedTuple):
    title: str
    note: str
    heads: Sequence[tuple[str, list[_Cell]]]  # of its columns, in groups with a title
    lines: list[_Line]

    @property
    def parts(self) -> list['_Table']:
        """Tables that fit on paper, which cannot be scrolled: one below the other, each with the names."""
        columns, parts = [(title, head) for title, of in self.heads for head in of], []
        for begin in range(0, len(columns), _ON_PAPER):
            some = slice(begin, begin + _ON_PAPER)
            heads = [(title, [head for _, head in of]) for title, of in groupby(columns[some], itemgetter(0))]
            parts.append(
                self._replace(heads=heads, lines=[line._replace(cells=line.cells[some]) for line in self.lines])
            )
        return parts


def write_report(folders: Sequence[Path], out: Path) -> Report:
    """Write ``report.html`` (one file that needs no other), ``*.png``, ``table.csv`` and ``report.json``.

    Works at any time: on runs that are finished, half-finished, failed or not begun. Numbers follow from the files of
    the runs alone.
    """
    study = read_runs(folders)
    rows = rows_of(study)
    scores = scores_of(study, rows)
    findings = [finding(rows, size) for size in study.sizes]
    if len(findings) > 1:
        texts = zip(study.sizes, findings, strict=True)
        findings = [f'At {size_name(size)}, {text.replace("Nothing", "nothing", 1)}' for size, text in texts]
    mixes = [run.config.mix for run in study.runs.values() if run.config]
    streams = {name: stream for mix in mixes if mix for name, stream in mix.old.items()}
    stand_ins = {name: streams[name].stand_in_for for name in sorted(streams) if streams[name].stand_in_for}
    findings += [f'{name} stands in for {what}: forgetting is measured on it.' for name, what in stand_ins.items()]
    report = Report(study, findings, rows, scores, list(missing(study, rows)), out / 'report.html')
    out.mkdir(parents=True, exist_ok=True)
    plots = list(plots_of(study, rows))
    for plot in plots:
        write_atomic(out / f'{plot.name}.png', png(plot))
    write_csv(out / 'table.csv', [flat(row) for row in rows])
    write_json(out / 'report.json', _as_json(report))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    states = Counter(run.state for run in study.given)
    page = environment.get_template('page.html.jinja').render(
        report=report,
        cards=[_cards_of(report, size) for size in study.sizes],
        arms=len({row.arm for row in rows}),
        seeds=len({run.seed for run in study.given}),
        states=[(state, states[state]) for state in STATES if states[state]],
        tables=_tables(report),
        tree=tree_of(dict(study.runs)),
        versions=_versions(study),
        plots=[(plot.title, Markup(svg(plot))) for plot in plots],
    )
    write_atomic(report.path, page.encode())
    return report


def rich_table(report: Report) -> Table:
    """The main numbers, as a terminal shows them."""
    shown = Table(title=escape(f'{report.study.name}: final validation loss'), title_justify='left')
    shown.add_column('arm')
    heads = {column: column.replace('loss ', 'loss\n', 1) for column in (*_losses(report.study), *CHANGES)}
    heads |= {'tokens': 'update\ntokens', 'flops': 'update\nFLOP', 'compute vs union': 'compute\nvs union'}
    for head in heads.values():
        shown.add_column(escape(head), justify='right')
    for row in report.shown:
        cells = [_number(row, column) for column in heads]
        name = report.study.label(row.name, row.size)
        texts = [f'{cell.text} {cell.small}'.strip() for cell in cells]
        shown.add_row(escape(f'{name}\n  {row.note}' if row.note else name), *texts)
    return shown


def print_report(report: Report, console: Console) -> None:
    """The findings, the table, what is missing, and where the page is."""
    for sentence in report.findings:
        console.print(sentence, markup=False)
    print_table(rich_table(report), console)
    for line in (*(f'missing: {line}' for line in report.missing), f'report: {report.path}'):
        console.print(line, markup=False, soft_wrap=True)


def _as_json(report: Report) -> dict[str, Any]:
    study = report.study
    return {
        'name': study.name,
        'data': study.data,
        'findings': report.findings,
        'rows': [flat(row) for row in report.rows],
        'benchmarks': [flat_scores(scores) for scores in report.scores],
        'runs': [
            {key: getattr(run, key) for key in ('name', 'state', 'batch', 'batches', 'tokens', 'cost')}
            | {
                'parent': study.runs[run.parent].name if run.parent else run.began_from,
                'scheduler': dict(run.config.scheduler.given) if run.config else None,
                'versions': run.record.versions if run.record else {},
            }
            for run in study.runs.values()
        ],
        'missing': report.missing,
    }


def _losses(study: RunSet) -> dict[str, str]:
    """Columns of losses, and what they are called on the page."""
    columns = {f'loss {name}': f'D{index} {name}' for index, name in enumerate(study.data)}
    return columns | ({'loss mean': 'mean'} if len(study.data) > 1 else {})


def _number(row: Row, column: str, scale: int = 1) -> _Cell:
    """A number of the table in the form that people read; of hours, ``scale`` times as many."""
    value = row.columns.get(column)
    if value is None:
        return _Cell()
    if column in COUNTS:
        return _Cell(short(value.mean))
    if column == 'flops':
        return _Cell(flop(value.mean))
    if column == 'compute vs union':
        return _Cell(percent(value.mean))
    if column.startswith('device hours'):
        return _Cell(f'{scale * value.mean:.3g}', '' if value.half is None else f'±{scale * value.half:.2g}')
    is_change = column.startswith((*CHANGES, *PRICES))
    half = '' if value.half is None else f'±{value.half:.3f}'
    return _Cell(signed(value.mean, 3) if is_change else f'{value.mean:.3f}', half)


def _cards_of(report: Report, size: int | None) -> list[dict[str, str]]:
    cards = []
    updates = contenders(report.rows, size)
    which = f', {size_name(size)}' if len(report.study.sizes) > 1 else ''
    for title, superlative, column, choose, unit in QUESTIONS:
        able = [row for row in updates if column in row.columns]
        if not able or (column == 'compute vs union' and able[0].kind != 'update'):
            continue
        best = choose(able, key=lambda row, column=column: row.columns[column].mean)
        level = [row.name for row in able if row.columns[column].mean == best.columns[column].mean]
        is_alike = len(level) == len(able)
        title = (title.rstrip(':') if is_alike else f'{title} {superlative}') + which
        arm = 'all updates alike' if is_alike and len(level) > 1 else ', '.join(level)
        cell = _number(best, column)
        cards.append({'title': title, 'value': cell.text, 'small': cell.small, 'unit': unit, 'arm': arm})
    return cards


def _tables(report: Report) -> list[_Table]:
    study, rows = report.study, report.shown
    losses = _losses(study)
    note = 'Mean ± 95 % interval over seeds (Student’s t)' if any(len(row.runs) > 1 for row in rows) else 'One seed'
    note += '; bold: the best.' if any(len(contenders(rows, size)) > 1 for size in study.sizes) else '.'
    if any(len(row.runs) == 1 for row in rows) and any(len(row.runs) > 1 for row in rows):
        note += ' Rows with one seed have no interval.'
    able = {key: contenders(rows, *key) for key in {(row.size, row.peers) for row in rows}}
    if len(study.sizes) > 1:
        lines = []
        for arm, average in dict.fromkeys((row.arm, row.average) for row in rows):
            by_size = {row.size: row for row in rows if (row.arm, row.average) == (arm, average)}
            cells = [
                _ranked(by_size[size], column, able[size, by_size[size].peers]) if size in by_size else _Cell()
                for size in study.sizes
                for column in (*losses, *CHANGES)
            ]
            notes = dict.fromkeys(f'{size_name(size)}: {row.note}' for size, row in by_size.items() if row.note)
            first_row = next(iter(by_size.values()))
            lines.append(_Line(f'{arm}, {average}' if average else arm, '; '.join(notes), first_row.kind, cells))
        heads = [(size_name(size), _heads([*losses.values(), *CHANGES])) for size in study.sizes]
        first = _Table('Final loss by model size', note, heads, lines)
    else:
        known = [name for name in study.data if any(f'bits per byte {name}' in row.columns for row in rows)]
        groups = {
            'validation loss (nats/token)': losses,
            'against the parent': {column: column for column in CHANGES},
            'bits per byte': {f'bits per byte {name}': losses[f'loss {name}'] for name in known},
            'last stage': {column: column for column in ('tokens', 'compute vs union')},
        }
        every = [column for columns in groups.values() for column in columns]
        lines = []
        for row in rows:
            cells = [_ranked(row, column, able[row.size, row.peers]) for column in every]
            finished, every_seed = len(row.runs) * row.is_finished, len(row.runs) + len(row.others)
            seeds = str(every_seed) if finished == every_seed else f'{finished} of {every_seed}'
            lines.append(_line(study, row, [*cells, _Cell(seeds)]))
        heads = [(title, _heads(columns.values())) for title, columns in groups.items() if columns]
        first = _Table('Final loss', note, [*heads, ('', _heads(['seeds']))], lines)
    return [first, *_line_table(report), *_benchmark_tables(report), _cost_table(report)]


def _line_table(report: Report) -> Iterator[_Table]:
    """The points between models and what they began from, if there are lines."""
    points = [row for row in report.rows if row.is_point]
    if not points:
        return
    losses = _losses(report.study)
    suites = list(dict.fromkeys(scores.suite for scores in report.scores))
    of = {(id(scores.row), scores.suite): scores for scores in report.scores}
    lines = []
    for row in points:
        scores = [of.get((id(row), suite)) for suite in suites]
        means = [_score(each.mean, each.mean_delta) if each else _Cell() for each in scores]
        lines.append(_line(report.study, row, [*(_number(row, column) for column in (*losses, *CHANGES)), *means]))
    heads = [('validation loss (nats/token)', _heads(losses.values())), ('against the parent', _heads(CHANGES))]
    heads += [('mean of accuracies (%)', _heads(suites))] if suites else []
    note = '(1 - alpha) parent + alpha child; the one of the lowest mean loss is the row of the line in other tables.'
    yield _Table('Between parent and child', note, heads, lines)


def _heads(names: Iterable[str]) -> list[_Cell]:
    return [_Cell(name) for name in names]


def _line(study: RunSet, row: Row, cells: list[_Cell]) -> _Line:
    return _Line(study.label(row.name, row.size), row.note, row.kind, cells)


def _ranked(row: Row, column: str, able: Sequence[Row]) -> _Cell:
    """A number, marked if it is the best of those that it is compared with."""
    cell, rivals = _number(row, column), [other for other in able if column in other.columns]
    means = [other.columns[column].mean for other in rivals]
    if row not in rivals or len(rivals) < 2:
        return cell
    best = min(means) if column.startswith(LOWER_IS_BETTER) else max(means) if column == 'adaptation' else None
    return _Cell(cell.text, cell.small, 'best') if row.columns[column].mean == best else cell


def _benchmark_tables(report: Report) -> list[_Table]:
    if not report.scores:
        return []
    losses = _losses(report.study)
    suites = list(dict.fromkeys(scores.suite for scores in report.scores))
    of = {(id(scores.row), scores.suite): scores for scores in report.scores}
    note = 'Small: change against the parent on the same items ± its standard error; grey: within noise (1.96 of them).'
    if any(len(scores.row.runs) > 1 for scores in report.scores):
        note += ' Beside a score: 95 % interval over seeds.'
    lines = []
    for row in report.shown:
        found = [of.get((id(row), suite)) for suite in suites]
        if any(found):
            means = [_score(s.mean, s.mean_delta) if s else _Cell() for s in found]
            lines.append(_line(report.study, row, [*(_number(row, column) for column in losses), *means]))
    heads = [('validation loss (nats/token)', _heads(losses.values())), ('mean of accuracies (%)', _heads(suites))]
    tables = [_Table('Losses and benchmarks', note, heads, lines)]
    for suite in suites:
        of_suite = [scores for scores in report.scores if scores.suite == suite and not scores.row.is_point]
        tasks = list(dict.fromkeys(task for scores in of_suite for task in scores.tasks))
        lines = []
        for scores in of_suite:
            cells = [_score(scores.tasks.get(task), scores.deltas.get(task)) for task in tasks]
            lines.append(_line(report.study, scores.row, [*cells, _score(scores.mean, scores.mean_delta)]))
        heads = [('scores, accuracies in %', [*(_task_head(report, suite, task) for task in tasks), _Cell('mean')])]
        tables.append(_Table(f'Benchmarks: {suite}', note, heads, lines))
        flipped = [task for task in tasks if any(task in scores.flips for scores in of_suite)]
        lines = [
            _line(report.study, scores.row, [_flip(scores.flips.get(task)) for task in flipped])
            for scores in of_suite
            if scores.flips
        ]
        if lines:
            heads = [('% lost / gained', [_task_head(report, suite, task) for task in flipped])]
            tables.append(_Table(f'Items that changed sides: {suite}', _FLIPS, heads, lines))
    return tables


def _flip(found: Flips | None) -> _Cell:
    if found is None:
        return _Cell()
    lost, gained = (100 * each.value for each in (found.lost, found.gained))
    at_least = [
        f'{100 * each.value:.1f} ± {196 * each.stderr:.1f}' if each.value > 0 else '0'
        for each in (found.truly_lost, found.truly_gained)
    ]
    is_noise = all(within_noise(each) or each.value < 0 for each in (found.truly_lost, found.truly_gained))
    return _Cell(f'{lost:.1f} / {gained:.1f}', f'≥ {at_least[0]} / ≥ {at_least[1]}', 'noise' if is_noise else 'signal')


def _task_head(report: Report, suite: str, task: str) -> _Cell:
    """Task with its number of examples in the prompt and, if it is no accuracy, its metric."""
    found = (of['tasks'] for run in report.study.runs.values() for of in run.benchmarks.get(suite, {}).values())
    results = [tasks[task] for tasks in found if task in tasks]
    result, is_cut = results[0], any(each.get('cut') for each in results)
    metric = '' if result['higher_is_better'] else f', {result["metric"]} ↓'
    shots = shots_of(result.get('num_fewshot'), is_cut)
    if any(result['task'] in run.contamination for run in report.study.runs.values() if suite in run.benchmarks):
        metric += ', items in training data'
    return _Cell(task, f'{shots}-shot{metric}{", prompts cut" if is_cut else ""}' if shots else '')


def _score(score: OverSeeds | None, delta: Mean | None) -> _Cell:
    if score is None or delta is None:
        return _Cell(score.text(2)) if score else _Cell()
    change = f'{signed(delta.value, 2)} ± {delta.stderr:.2f}'
    return _Cell(score.text(2), change, 'noise' if within_noise(delta) else 'signal')


def _cost_table(report: Report) -> _Table:
    study = report.study
    devices = {run.cost['device'] for run in study.runs.values() if run.cost}
    longest = max((run.hours or 0 for run in study.runs.values()), default=0)
    scale, unit = (60, 'minutes') if longest < 1 else (1, 'hours')
    hours = f'{next(iter(devices)).upper() if len(devices) == 1 else "device"}-{unit}'
    prices = [column for column in PRICES if any(column in row.columns for row in report.rows)]
    lines, is_estimate = [], False
    for row in report.rows:
        if row.average:
            continue
        spent, saved = (_number(row, column, scale) for column in ('device hours', 'device hours saved'))
        if 'device hours saved (estimated)' in row.columns:
            guess = _number(row, 'device hours saved (estimated)', scale)
            saved, is_estimate = _Cell(f'≈ {guess.text}', guess.small), True
        tokens = [_number(row, column) for column in ('new tokens', 'replayed tokens')]
        config, passes = row.runs[0].config, {}
        if config and config.mix and not row.runs[0].tokens_before_branch:
            passes = {name: f'{count:.2g}x' for name, count in config.passes().items()}
            tokens[0] = tokens[0]._replace(small=passes.pop(config.mix.name, ''))
        cells = [tokens[0], tokens[1]._replace(small=', '.join(passes.values()))]
        cells += [_number(row, column) for column in ('flops', 'compute vs union')]
        lines.append(_line(study, row, [*cells, spent, saved, *(_number(row, column) for column in prices)]))
    note = 'Of the last stage of each arm: what came before is paid for already. Small: how often data was read, where '
    note += 'it is still there. Compute: 6 × parameters N × tokens T.'
    if is_estimate:
        note += ' ≈: union was not run to its end; estimated from the hours that this run took for a token.'
    heads = [('tokens', _heads(['new', 'replayed'])), ('compute', _heads(['6 N T', 'compute vs union']))]
    heads += [(f'measured {hours}', _heads(['spent', 'saved against union']))]
    return _Table('Cost', note, [*heads, *([('mean loss', _heads(prices))] if prices else [])], lines)


def _versions(study: RunSet) -> list[tuple[str, str]]:
    """``[(versions, runs that had them), ...]``."""
    groups: dict[str, list[str]] = {}
    for run in study.runs.values():
        if run.record and run.record.versions:
            groups.setdefault(', '.join(f'{k} {v}' for k, v in run.record.versions.items()), []).append(run.name)
    every = sum(len(names) for names in groups.values())
    return [(text, 'all runs' if len(names) == every else ', '.join(names)) for text, names in groups.items()]
