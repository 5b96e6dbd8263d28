# SPDX-License-Identifier: Apache-2.0
"""Answers as people read them: a table for the terminal, and a plot."""

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path

import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table

from cpt_algorithms.foresight.answers import Answer, Cheapest, Ending, Pilots, Update
from cpt_algorithms.foresight.fits import Estimate
from cpt_algorithms.formatting import first_of, short
from cpt_algorithms.terminal import print_table

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

__all__ = ['draw', 'draw_cheapest', 'draw_endings', 'print_answers', 'print_cheapest', 'print_endings']


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


def print_endings(
    found: Mapping[str, tuple[Mapping[str, Ending], Sequence[str]]], tokens: int, old: Iterable[str], console: Console
) -> None:
    """For each mixture the losses at the end of an update, what that forgets and learns, and warnings."""
    old = set(old)
    shown = Table(title=f'at the end of {short(tokens)} tokens, 95 % intervals', title_justify='left')
    for column in ('pilots', 'data'):
        shown.add_column(column, overflow='fold')
    for column in ('loss', 'change', 'error of an update left out'):
        shown.add_column(column, justify='right')
    for name, (endings, _) in found.items():
        for data, ending in endings.items():
            error = '-' if ending.error is None else f'{ending.error:.3f}'
            role = f'{data} ({"old" if data in old else "new"})'
            shown.add_row(name, role, _interval(ending.loss, 3), _interval(ending.change, 3), error)
    print_table(shown, console)
    for warning in dict.fromkeys(warning for _, warnings in found.values() for warning in warnings):
        of = [name for name, (_, warnings) in found.items() if warning in warnings]
        console.print(f'{"" if len(of) == len(found) else f"{first_of(of)}: "}{warning}', markup=False)


def draw_endings(
    found: Sequence[tuple[Sequence[Update], Mapping[str, Ending], Sequence[float]]], per_batch: int, path: Path
) -> None:
    """For each dataset the pilots' losses, the loss foretold along an update, and its end with the interval."""
    names = list(found[0][1])
    figure, panels = plt.subplots(1, len(names), figsize=(6.4 * len(names), 4.4), layout='constrained', squeeze=False)
    for name, axes in zip(names, panels[0], strict=True):
        for index, (updates, endings, rates) in enumerate(found):
            colour = f'C{index}'
            for each in (each for update in updates for each in update.trajectories[name] if each.is_update):
                axes.plot(per_batch * np.array(each.batches), each.losses, '.', color=colour, markersize=4)
            at = np.unique(np.linspace(0, len(rates), 100).astype(int))
            lines = [update.laws[name].along(rates, at.tolist()) for update in updates]
            axes.plot(per_batch * at, np.mean(lines, axis=0), color=colour, label=updates[0].name)
            loss = endings[name].loss
            if isfinite(loss.low) and isfinite(loss.high):
                beside = [[loss.value - loss.low], [loss.high - loss.value]]
                axes.errorbar(per_batch * len(rates), loss.value, beside, color=colour, capsize=4, marker='s')
        axes.xaxis.set_major_formatter(lambda value, _: short(value))
        axes.set(xlabel='tokens of the update', ylabel='loss, nats/token', title=f'{name}: line and end are foretold')
        axes.legend(fontsize='small', frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def print_cheapest(found: Cheapest, forgetting: float, adaptation: float, console: Console) -> None:
    """The shortest update within the bounds."""
    title = f'cheapest update: forgetting of at most {forgetting:g}, adaptation of at least {adaptation:g} nats/token'
    shown = Table(title=title, title_justify='left')
    for column in ('tokens', 'replay fraction', 'forgetting', 'adaptation'):
        shown.add_column(column, justify='right')
    tokens = found.tokens
    least = short(tokens.low) if tokens.low else 'nearly 0'
    span = f'{least} to {short(tokens.high) if isfinite(tokens.high) else "more than the pilots have"}'
    changes = (f'{each:.3f}' for each in (found.forgetting, found.adaptation))
    shown.add_row(f'{short(tokens.value)} ({span})', f'{100 * found.share:.1f} %', *changes)
    print_table(shown, console)
    for warning in found.warnings:
        console.print(warning, markup=False)


def draw_cheapest(found: Cheapest, forgetting: float, adaptation: float, path: Path) -> None:
    """What each share forgets and learns at the length that is enough, what is allowed, and the answer."""
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout='constrained')
    shares, forgot, learned = np.array(found.curve).T
    line = axes.scatter(forgot, learned, c=100 * shares, s=8, cmap='viridis')
    figure.colorbar(line, label='old data, % of the update')
    axes.plot(found.forgetting, found.adaptation, 'k*', markersize=14, label=f'{100 * found.share:.1f} % of old data')
    axes.axvline(forgetting, color='black', linewidth=0.8, linestyle=':', label=f'at most {forgetting:g}')
    axes.axhline(adaptation, color='black', linewidth=0.8, linestyle='--', label=f'at least {adaptation:g}')
    axes.set(
        xlabel='forgetting, nats/token', ylabel='adaptation, nats/token',
        title=f'after {short(found.tokens.value)} tokens, foretold',
    )  # fmt: skip
    axes.legend(fontsize='small', frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
