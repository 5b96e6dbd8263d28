# SPDX-License-Identifier: Apache-2.0
"""Shows the learning rate of any llm-foundry train YAML, without data and without a model.

``python scripts/plot_schedules.py YAML [YAML...] [--out schedule.png] [key=value ...]``

Prints one table of phases per YAML and draws one panel per YAML. The learning rate given for batch k is the one that
batch k is trained with: stock schedulers run one batch late (Composer steps them before it moves the time on), ours do
not.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use('Agg')

import matplotlib.pyplot as plt
import numpy as np
from composer.core import Time, TimeUnit
from llmfoundry.utils.builders import build_scheduler
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from yaml import YAMLError

from cpt_algorithms.files import read_yaml
from cpt_algorithms.formatting import exact, scientific
from cpt_algorithms.schedulers.functional import Span
from cpt_algorithms.schedulers.phase_scheduler import PhaseScheduler
from cpt_algorithms.schedulers.preview import count_batches, preview

UNIT_NAMES = {TimeUnit.BATCH: 'batches', TimeUnit.TOKEN: 'tokens', TimeUnit.SAMPLE: 'samples'}
MAX_POINTS = 4000  # more than a panel has pixels
CHARACTER = 0.0125  # width of a letter of a label, as a part of a panel's
COLOR, BANDS = '#1f4e79', ('#eef2f7', '#dfe7f1')


@dataclass(frozen=True)
class Curve:
    """What one YAML does: values are learning rates, ``starts`` and spans are in ``unit``."""

    title: str
    unit: TimeUnit
    per_batch: float
    num_batches: int
    starts: np.ndarray
    lrs: np.ndarray
    spans: list[Span]


def load(path: Path, overrides: list[str]) -> dict[str, Any]:
    """A YAML with its overrides and interpolations resolved.

    Raises:
        ValueError: If the YAML has no scheduler, optimizer.lr or max_duration, or cannot be resolved.
    """
    try:
        config = OmegaConf.merge(read_yaml(path), OmegaConf.from_dotlist(overrides))
        keys = ('scheduler', 'optimizer', 'max_duration', 'global_train_batch_size', 'max_seq_len')
        keys += ('train_subset_num_batches',)
        # only these: data paths and run names may come from variables that are not set here
        found: dict[str, Any] = {key: OmegaConf.select(config, key) for key in keys}
        found = {k: OmegaConf.to_container(v, resolve=True) if OmegaConf.is_config(v) else v for k, v in found.items()}
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f'{path}: {error}') from None
    for key in ('scheduler', 'optimizer', 'max_duration'):
        if not found[key]:
            raise ValueError(f'{path}: {key} is missing; it is needed to draw a learning rate')
    for section, key in (('scheduler', 'name'), ('optimizer', 'lr')):
        if not isinstance(found[section], dict) or found[section].get(key) is None:
            raise ValueError(f'{path}: {section}.{key} is missing; it is needed to draw a learning rate')
    return found


def curve(path: Path, overrides: list[str]) -> Curve:
    """Everything to show of one YAML.

    Raises:
        ValueError: If the run cannot be counted in batches (``ep`` needs ``train_subset_num_batches``), or for whatever
            the scheduler refuses.
    """
    config = load(path, overrides)
    section, lr = dict(config['scheduler']), float(config['optimizer']['lr'])
    name = section.pop('name')
    duration = Time.from_input(config['max_duration'], TimeUnit.EPOCH)
    batch, length = config['global_train_batch_size'], config['max_seq_len']
    per_epoch = config['train_subset_num_batches']
    per_epoch = per_epoch if per_epoch and per_epoch > 0 else None
    if duration.unit == TimeUnit.EPOCH and per_epoch is None:
        raise ValueError(
            f'{path}: max_duration={duration.to_timestring()!r} is in epochs, whose length only the data knows; '
            'write it in tok, ba or sp, or give train_subset_num_batches=<batches per epoch>'
        )
    tokens = batch * length if batch and length else None
    try:
        scheduler = build_scheduler(name, section)
        num_batches = count_batches(duration, tokens, batch, per_epoch)
        batches = np.unique(np.linspace(0, num_batches - 1, min(num_batches, MAX_POINTS)).round().astype(int))
        spans = []
        if isinstance(scheduler, PhaseScheduler):
            schedule, unit = scheduler.schedule(duration, per_epoch)
            end = duration.value if duration.unit == unit else num_batches
            spans = [
                Span(s.name, s.begin, s.until, s.start * lr, s.end * lr, s.shape) for s in schedule.spans(float(end))
            ]
        # batches that only just are in a phase belong to the picture too
        unit = TimeUnit.BATCH if duration.unit == TimeUnit.EPOCH else duration.unit
        per_batch = {TimeUnit.TOKEN: tokens, TimeUnit.SAMPLE: batch}.get(unit, 1) or 1
        edges = [int(s.begin // per_batch) + k for s in spans for k in (0, 1)]
        batches = np.unique([*batches, *(k for k in edges if k < num_batches)])
        alphas = preview(scheduler, duration, tokens, batch, per_epoch, batches.tolist())
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f'{path}: scheduler {name}: {error}') from error
    starts, lrs = batches * float(per_batch), lr * alphas
    title = f'{path.stem}  ({name})'
    return Curve(title, unit, per_batch, num_batches, starts, lrs, spans or find_spans(starts, lrs))


def find_spans(starts: np.ndarray, lrs: np.ndarray) -> list[Span]:
    """Pieces of a schedule that does not say its phases: where it rises, stays and falls, as finely as sampled."""
    change = np.diff(lrs)
    # rounding is no rise
    sign = np.where(np.abs(change) <= 1e-9 * np.max(np.abs(lrs)), 0, np.sign(change)).astype(int)
    names = {1: 'rises', 0: 'stays', -1: 'falls'}
    cuts = [0, *(np.flatnonzero(np.diff(sign)) + 1).tolist(), len(sign)]
    return [
        Span(names[int(sign[a])], float(starts[a]), float(starts[b]), float(lrs[a]), float(lrs[b]), '')
        for a, b in zip(cuts, cuts[1:], strict=False)
        if b > a
    ]


def print_table(curve: Curve, console: Console) -> None:
    """One row per phase, learning rates as the optimizer gets them."""
    unit = UNIT_NAMES[curve.unit]
    table = Table(title=f'{curve.title}, times in {unit}', title_justify='left', title_style='bold', box=SIMPLE_HEAD)
    table.add_column('phase')
    for column in ('from', 'to', *([] if curve.unit == TimeUnit.BATCH else ['batches'])):
        table.add_column(column, justify='right')
    table.add_column('LR from', justify='right')
    table.add_column('LR to', justify='right')
    table.add_column('shape', no_wrap=True)
    for span in curve.spans:
        times = [exact(t) if t >= 1e6 else f'{t:,.6g}' for t in (span.begin, span.until)]
        if curve.unit != TimeUnit.BATCH:
            times.append(f'{(span.until - span.begin) / curve.per_batch:,.1f}'.removesuffix('.0'))
        table.add_row(span.name, *times, scientific(span.start), scientific(span.end), span.shape)
    console.print(table)
    size = '' if curve.unit == TimeUnit.BATCH else f' of {curve.per_batch:,} {unit}'
    first, high, last = curve.lrs[0], curve.lrs.max(), curve.lrs[-1]
    console.print(f'{curve.num_batches:,} batches{size}', highlight=False)
    lrs = f'LR of the first batch {scientific(first)}, highest {scientific(high)}, last {scientific(last)}'
    console.print(f'{lrs}\n', highlight=False)


def draw(curve: Curve, axes: Axes) -> None:
    """One panel: the learning rate over the run, phases as labelled bands."""
    end = curve.num_batches * curve.per_batch
    top = float(curve.lrs.max()) * 1.2 or 1.0
    taken = 0.0  # how far the labels above the frame reach
    for k, span in enumerate(curve.spans):
        axes.axvspan(span.begin, min(span.until, end), color=BANDS[k % 2], lw=0)
        if k:
            axes.axvline(span.begin, color='#9fb3c8', lw=0.8, ls=(0, (3, 3)))
        label = {'va': 'top', 'fontsize': 9, 'color': '#52667a'}
        if (span.until - span.begin) / end > CHARACTER * len(span.name):
            axes.text((span.begin + span.until) / 2, top * 0.97, span.name, ha='center', **label)
        elif (
            span.until - span.begin > end / 500 and span.begin / end >= taken
        ):  # too narrow: above the frame, if there is room; the table has them all
            axes.text(span.begin, top * 1.08, span.name, ha='left', **label)
            taken = span.begin / end + CHARACTER * len(span.name)
    axes.plot(curve.starts, curve.lrs, color=COLOR, lw=1.8, solid_capstyle='round')
    axes.set(xlim=(0, end), ylim=(0, top), ylabel='learning rate', xlabel=UNIT_NAMES[curve.unit])
    axes.set_title(curve.title, loc='left', fontsize=11, fontweight='bold', color='#22303c', pad=18)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: exact(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: scientific(value)))
    axes.grid(axis='y', color='white', lw=1)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)


def main(argv: list[str] | None = None) -> None:
    """Parse, print, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument(
        'inputs', nargs='+', metavar='YAML | key=value', help='train YAMLs, then overrides for all of them'
    )
    parser.add_argument('--out', type=Path, default=Path('schedule.png'), help='the picture (default: schedule.png)')
    args = parser.parse_args(argv)
    paths = [Path(text) for text in args.inputs if '=' not in text]
    if not paths:
        parser.error('no YAML given')
    try:
        curves = [curve(path, [text for text in args.inputs if '=' in text]) for path in paths]
    except (ValueError, OSError) as error:
        parser.error(str(error))
    console = Console()
    for one in curves:
        print_table(one, console)
    figure, panels = plt.subplots(len(curves), 1, figsize=(9, 3.1 * len(curves)), squeeze=False, layout='constrained')
    for one, axes in zip(curves, panels[:, 0], strict=True):
        draw(one, axes)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=160)
    plt.close(figure)
    console.print(f'wrote {args.out}', highlight=False)


if __name__ == '__main__':
    main()
