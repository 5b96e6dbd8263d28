# SPDX-License-Identifier: Apache-2.0
"""Verdicts and numbers, as a table in the terminal, a page for documents, data, and a figure."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from evidence import Evidence
from judge import Condition, Finding, NotRun
from papers import FREE
from rich.table import Table
from training import RECOMMENDED

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

TICKS = (25, 100, 400, 1000)

__all__ = ['GAPS', 'Point', 'as_data', 'draw', 'number_of', 'page', 'table', 'trend']


GAPS = {
    'update minus union': Evidence.gap,
    'matched minus union: the mixture': Evidence.mixture,
    'update minus matched: continuing': Evidence.continuing,
}


def number_of(condition: Condition) -> str:
    """Mean and half-width."""
    mean = condition.over_seeds
    return f'{mean.mean:+.3f}' + ('' if mean.half is None else f' ± {mean.half:.3f}')


def measured(condition: Condition) -> str:
    """The same, and what it means if not that the claim holds."""
    number = number_of(condition)
    return number if condition.verdict in ('reproduced', 'measured') else f'{number} ({condition.verdict})'


def table(findings: Sequence[Finding], title: str) -> Table:
    """A table for the terminal."""
    shown = Table(title=title, title_justify='left')
    for column in ('claim', 'verdict', 'quantity (nats/token)'):
        shown.add_column(column, overflow='fold')
    for column in ('must be', 'measured'):
        shown.add_column(column, justify='right')
    for finding in findings:
        first = [f'{finding.claim.name} {finding.claim.says}', finding.verdict]
        for condition in finding.conditions:
            shown.add_row(*first, condition.what, condition.bounds, measured(condition))
            first = ['', '']
        if finding.missing:
            shown.add_row(*first, finding.missing)
        shown.add_section()
    return shown


@dataclass(frozen=True)
class Point:
    """The gap to union and its two parts under a shift, with so many parameters and tokens of each stage."""

    label: str
    parameters: int
    tokens: int
    gaps: Mapping[str, Condition]  # as GAPS has them, as far as they were run


def trend(ran: Sequence[Evidence]) -> list[Point]:
    """The gaps under each shift, model by model, at each number of tokens where they were run."""
    points = []
    for shift in ('weak', 'strong'):
        for evidence in ran:
            gaps = {}
            for what, gap in GAPS.items():
                with suppress(NotRun):
                    gaps[what] = Condition(what, gap(evidence, shift))
            if gaps:
                size = evidence.parameters(shift), evidence.tokens(shift)
                points.append(Point(f'{shift} shift, {RECOMMENDED[shift]} % replay', *size, gaps))
    order = {point.label: index for index, point in enumerate(points)}
    return sorted(points, key=lambda point: (order[point.label], point.parameters, point.tokens))


def page(findings: Sequence[Finding], points: Sequence[Point], made: str) -> str:
    """For documents: a line for each claim, with the quantity that decides; all quantities; and the trend."""
    short = ['| claim | the paper | here, 95 % interval | verdict |', '|---|---|---|---|']
    whole = ['| claim | quantity (nats/token) | must be | measured |', '|---|---|---|---|']
    for finding in findings:
        claim, decides = finding.claim, finding.missing
        for condition in finding.conditions:
            if not decides and condition.verdict == finding.verdict:
                decides = f'{condition.what}: {measured(condition).partition(" (")[0]}'
            whole.append(f'| {claim.name} | {condition.what} | {condition.bounds} | {measured(condition)} |')
        short.append(f'| {claim.name} {claim.says} | {claim.paper} | {decides} | {finding.verdict} |')
    gaps = [f'| shift | parameters | tokens of each stage | per parameter | {" | ".join(GAPS)} |', '|---' * 7 + '|']
    for each in points:
        size = f'{each.parameters:,} | {each.tokens:,} | {each.tokens / each.parameters:.0f}'
        numbers = [number_of(each.gaps[what]) if what in each.gaps else '' for what in GAPS]
        gaps.append(f'| {each.label} | {size} | {" | ".join(numbers)} |')
    return '\n'.join([made, '', *short, '', *whole, '', *gaps, ''])


def as_data(findings: Sequence[Finding], points: Sequence[Point], made: str) -> dict[str, Any]:
    """The same, with the number of each seed."""
    found = [
        {
            'claim': each.claim.name,
            'verdict': each.verdict,
            'missing': each.missing,
            'conditions': [
                {'what': one.what, 'must be': one.bounds, 'values': [*map(float, one.values)], 'verdict': one.verdict}
                for one in each.conditions
            ],
        }
        for each in findings
    ]
    gaps = [
        {
            'shift': each.label,
            'parameters': each.parameters,
            'tokens': each.tokens,
            'gaps': {what: [*map(float, gap.values)] for what, gap in each.gaps.items()},
        }
        for each in points
    ]
    return {'made': made, 'findings': found, 'trend': gaps}


def draw(points: Sequence[Point], path: Path) -> None:
    """How the gap to union, and its two parts, change with the tokens of each parameter and the size of the model."""
    figure, panels = plt.subplots(1, len(GAPS), figsize=(11, 4.2), layout='constrained', sharex=True, sharey=True)
    labels = list(dict.fromkeys(each.label for each in points))
    sizes = sorted({each.parameters for each in points})
    series = list(dict.fromkeys((each.label, each.parameters) for each in points))
    for what, axes in zip(GAPS, panels, strict=True):
        for index, (label, parameters) in enumerate(series):
            aside = 1.05 ** (index - len(series) / 2)  # or the intervals would hide each other
            ours = [each for each in points if (each.label, each.parameters) == (label, parameters)]
            line = [each for each in ours if what in each.gaps]
            means = [each.gaps[what].over_seeds for each in line]
            axes.errorbar(
                [each.tokens / each.parameters * aside for each in line],
                [mean.mean for mean in means],
                yerr=[mean.half or 0.0 for mean in means],
                color=f'C{labels.index(label)}',
                marker='os^D'[sizes.index(parameters) % 4],
                capsize=3,
                label=f'{label}, {parameters:,} parameters',
            )
        axes.axhline(0, color='black', linewidth=0.8)
        axes.axhspan(-FREE, FREE, color='grey', alpha=0.2, label=f'within {FREE}')
        axes.set_xscale('log')
        axes.set_xticks(TICKS, map(str, TICKS))
        axes.minorticks_off()
        axes.set(xlabel='tokens per parameter, each stage', title=what)
    panels[0].set_ylabel('mean loss, nats/token')
    shown = panels[0].get_legend_handles_labels()
    figure.legend(*shown, loc='outside upper center', ncols=3, fontsize='small', frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
