# SPDX-License-Identifier: Apache-2.0
"""Answers as people read them: a table for the terminal, and a plot."""

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path

import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table

from cpt_algorithms.foresight.answers import Answer, Pilots
from cpt_algorithms.foresight.fits import Estimate
from cpt_algorithms.terminal import print_table

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

__all__ = ['draw', 'print_answers']


def _interval(found: Estimate, digits: int, scale: float = 1, unit: str = '') -> str:
    value = f'{scale * found.value:.{digits}f}{unit}'
    if not (isfinite(found.low) or isfinite(found.high)):
        return value
    low, high = (f'{scale * end:.{digits}f}' if isfinite(end) else '?' for end in (found.low, found.high))
    return f'{value} ({low} to {high})'


def print_answers(answers: Mapping[str, Answer], allowed: float, console: Console) -> None:
    """The smallest share for each old dataset, the loss on each new one there, and warnings."""
    said = f'forgetting of at most {allowed:g} nats/token' if allowed else 'nothing is forgotten'
    shown = Table(title=f'smallest replay fraction with which {said}, 95 % intervals', title_justify='left')
    for column in ('old data', 'new data'):
        shown.add_column(column, overflow='fold')
    for column in ('replay fraction', 'loss on new', 'error of a pilot left out'):
        shown.add_column(column, justify='right')
    for old, answer in answers.items():
        error = '-' if answer.error is None else f'{answer.error:.4f}'
        for new, loss in answer.on_new.items():
            shown.add_row(old, new, _interval(answer.share, 1, 100, ' %'), _interval(loss, 3), error)
    print_table(shown, console)
    for old, answer in answers.items():
        for warning in answer.warnings:
            console.print(f'{old}: {warning}')


def draw(found: Mapping[str, tuple[Sequence[Pilots], Answer]], allowed: float, path: Path) -> None:
    """For each old dataset the pilots' forgetting, the law of each seed, what is allowed, and the answer."""
    figure, panels = plt.subplots(1, len(found), figsize=(6.4 * len(found), 4.4), layout='constrained', squeeze=False)
    for (old, (pilots, answer)), axes in zip(found.items(), panels[0], strict=True):
        shares = np.linspace(0, max(max(each.shares) for each in pilots), 200)
        for index, (each, law) in enumerate(zip(pilots, answer.laws, strict=True)):
            axes.plot(100 * shares, law.loss(shares), color=f'C{index}', linewidth=1)
            measured = [100 * share for share in each.shares], each.forgetting
            axes.plot(*measured, 'o', color=f'C{index}', label=f'seed {each.seed}')
        axes.axhline(allowed, color='black', linewidth=0.8, linestyle=':', label=f'allowed: {allowed:g}')
        axes.axvline(100 * answer.share.value, color='black', linewidth=1)
        low, high = 100 * answer.share.low, 100 * answer.share.high
        if isfinite(low) and isfinite(high):
            axes.axvspan(low, high, color='grey', alpha=0.2, label='95 % interval')
        axes.set(
            xlabel='old data, % of the update', ylabel='forgetting, nats/token',
            title=f'{old}: {_interval(answer.share, 1, 100, " %")}',
        )  # fmt: skip
        axes.legend(fontsize='small', frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
