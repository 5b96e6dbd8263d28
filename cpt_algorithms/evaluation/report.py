# SPDX-License-Identifier: Apache-2.0
"""The table and the plots of a sequence: forgetting, adaptation and cost by arm, as in the paper's Table 2."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from cpt_algorithms.evaluation.functional import adaptation, forgetting

__all__ = ['ArmResult', 'draw', 'rich_table', 'table', 'write_csv']

Curves = dict[str, list[list[float]]]


@dataclass
class ArmResult:
    """What one arm came to under one seed.

    Args:
        arm: Its name.
        seed: Its seed.
        final: Final loss of its last stage on each dataset.
        parent: Final loss of the stage before on each dataset; None from scratch.
        old: Datasets learned before the last stage.
        new: Datasets of the last stage.
        tokens: Tokens of the last stage, new and replayed: what the update costs.
        union_tokens: Tokens of training on all data from scratch.
        flops: Floating point operations of the last stage.
        stage_start: Tokens of the arm's stages before the last. Default: ``0``.
        curves: ``{dataset: [[token, loss], ...]}`` over the whole arm, tokens counted from its first stage on.
        learning_rate: ``[[token, lr], ...]`` likewise.
    """

    arm: str
    seed: int
    final: dict[str, float]
    parent: dict[str, float] | None
    old: list[str]
    new: list[str]
    tokens: int
    union_tokens: int
    flops: float
    stage_start: int = 0
    curves: Curves = field(default_factory=dict)
    learning_rate: list[list[float]] = field(default_factory=list)


def _row(result: ArmResult) -> dict[str, float]:
    row = {f'loss {name}': loss for name, loss in result.final.items()}
    row['loss average'] = sum(result.final.values()) / len(result.final)
    if result.parent is not None:
        parent = result.parent
        row['forgetting'] = float(np.mean([forgetting(result.final[n], parent[n]) for n in result.old]))
        row['adaptation'] = float(np.mean([adaptation(result.final[n], parent[n]) for n in result.new]))
    row['tokens'] = result.tokens
    row['flops'] = result.flops
    row['compute against union'] = result.tokens / result.union_tokens
    return row


def table(results: Sequence[ArmResult]) -> list[dict[str, Any]]:
    """One row per arm: means over its seeds, and with more than one seed their standard errors as ``<column> stderr``.

    Args:
        results: Of all arms and seeds, in the order of the table.
    """
    rows = []
    for arm in dict.fromkeys(result.arm for result in results):
        seeds = [_row(result) for result in results if result.arm == arm]
        row: dict[str, Any] = {'arm': arm, 'seeds': len(seeds)}
        for column in seeds[0]:
            values = [seed[column] for seed in seeds]
            row[column] = float(np.mean(values))
            if len(values) > 1:
                row[f'{column} stderr'] = float(np.std(values, ddof=1) / sqrt(len(values)))
        rows.append(row)
    return rows


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the table with all its columns; what an arm does not have is left empty."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with open(path, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def rich_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """The table as people read it."""
    losses = [c for c in dict.fromkeys(k for row in rows for k in row) if c.startswith('loss ') and 'stderr' not in c]
    shown = Table(title=title, title_justify='left')
    shown.add_column('arm', no_wrap=True)
    columns = [*losses, 'forgetting', 'adaptation']
    for column in columns:
        shown.add_column(column.replace('loss ', 'loss\n'), justify='right')
    for column in ('update\ntokens', 'update\nTFLOP', 'compute\nvs union'):
        shown.add_column(column, justify='right')
    for row in rows:
        cells = []
        for column in columns:
            text = f'{row[column]:+.3f}' if column in ('forgetting', 'adaptation') and column in row else ''
            text = text or (f'{row[column]:.3f}' if column in row else '-')
            cells.append(text + (f' ±{row[f"{column} stderr"]:.3f}' if f'{column} stderr' in row else ''))
        cost = [f'{row["tokens"] / 1e6:.2f} M', f'{row["flops"] / 1e12:.1f}', f'{row["compute against union"]:.0%}']
        shown.add_row(str(row['arm']), *cells, *cost)
    return shown


def draw(path: Path, title: str, results: Sequence[ArmResult]) -> None:
    """Four plots in one PNG: loss on old and new data over tokens, forgetting against adaptation, learning rates.

    Args:
        path: The PNG.
        title: Its title.
        results: Of all arms and seeds; curves are those of the first seed of each arm.
    """
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    arms = list(dict.fromkeys(result.arm for result in results))
    colours = dict(zip(arms, plt.get_cmap('tab10').colors * 9, strict=False))  # pyright: ignore
    first = {arm: next(result for result in results if result.arm == arm) for arm in arms}
    updated = [result for result in first.values() if result.parent is not None] or list(first.values())
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), constrained_layout=True)
    figure.suptitle(title)
    panels = [(axes[0][0], updated[0].old, 'old data'), (axes[0][1], updated[0].new, 'new data')]
    for axis, names, what in panels:
        for arm, result in first.items():
            points = [result.curves.get(name, []) for name in names]
            if points and all(points):
                tokens = [point[0] / 1e6 for point in points[0]]
                losses = np.mean([[point[1] for point in line] for line in points], axis=0)
                style = '--' if result.parent is None else '-'
                axis.plot(tokens, losses, style, color=colours[arm], label=arm, linewidth=1.6)
        axis.set(
            title=f'validation loss on {what} ({", ".join(names)})', xlabel='tokens (M)', ylabel='loss (nats/token)'
        )
        with_all = [result.final for result in first.values() if names and set(names) <= result.final.keys()]
        finals = [float(np.mean([final[name] for name in names])) for final in with_all]
        if finals:
            # the start of training would squeeze everything else into a line
            axis.set_ylim(min(finals) - 0.15, max(finals) + 0.9)
        axis.grid(alpha=0.3)
        for boundary in {result.stage_start for result in updated if result.stage_start}:
            axis.axvline(boundary / 1e6, color='grey', linewidth=0.8, linestyle=':')
    plane = axes[1][0]
    for result in results:
        if result.parent is not None:
            row = _row(result)
            plane.scatter(row['forgetting'], row['adaptation'], color=colours[result.arm], s=70)
    plane.set(
        title='forgetting and adaptation: up and left is better',
        xlabel='forgetting (nats/token)',
        ylabel='adaptation (nats/token)',
    )
    plane.margins(0.15)
    plane.grid(alpha=0.3)
    rates = axes[1][1]
    for arm, result in first.items():
        if result.learning_rate:
            tokens, values = zip(*result.learning_rate, strict=True)
            rates.plot(
                np.array(tokens) / 1e6, values, '--' if result.parent is None else '-', color=colours[arm], label=arm
            )
    rates.set(title='learning rate of each batch', xlabel='tokens (M)', ylabel='learning rate')
    rates.grid(alpha=0.3)
    figure.legend(*rates.get_legend_handles_labels(), loc='outside lower center', ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
