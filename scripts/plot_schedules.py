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
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cpt_algorithms.duration import ABSOLUTE, Duration, per_batch_of
from cpt_algorithms.files import read_yaml
from cpt_algorithms.formatting import exact, scientific
from cpt_algorithms.schedulers.functional import Span
from cpt_algorithms.schedulers.phases import build, format_spans, phases_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNIT_NAMES = {'ba': 'batches', 'tok': 'tokens', 'sp': 'samples'}
MAX_POINTS = 4000  # more than a panel has pixels
CHARACTER = 0.0125  # width of a letter of a label, as a part of a panel's
COLOR, BANDS = '#1f4e79', ('#eef2f7', '#dfe7f1')


@dataclass(frozen=True)
class Curve:
    """The schedule of one YAML: spans hold multipliers of ``lr``, times are in ``unit``."""

    title: str
    unit: str
    per_batch: int
    num_batches: int
    starts: np.ndarray
    lrs: np.ndarray
    lr: float
    spans: list[Span]


def load(path: Path, overrides: list[str]) -> dict[str, Any]:
    """A YAML with its overrides and interpolations resolved.

    Raises:
        ValueError: If the YAML has no scheduler, optimizer.lr or max_duration, or cannot be resolved.
    """
    try:
        config = OmegaConf.create(read_yaml(path, overrides, resolve=False))
        keys = ('scheduler', 'optimizer', 'max_duration', 'global_train_batch_size', 'max_seq_len')
        keys += ('train_subset_num_batches',)
        # only these: data paths and run names may come from variables that are not set here
        found: dict[str, Any] = {key: OmegaConf.select(config, key) for key in keys}
        found = {k: OmegaConf.to_container(v, resolve=True) if OmegaConf.is_config(v) else v for k, v in found.items()}
    except OmegaConfBaseException as error:
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
    from cpt_algorithms.schedulers.preview import preview  # imports Composer, which --help does not wait for

    config = load(path, overrides)
    section, lr = config['scheduler'], float(config['optimizer']['lr'])
    batch, length = config['global_train_batch_size'] or 0, config['max_seq_len'] or 0
    per_epoch = max(config['train_subset_num_batches'] or 0, 0) or None
    try:
        duration = Duration.parse('max_duration', config['max_duration'], (*ABSOLUTE, 'ep'))
        unit = 'ba' if duration.unit == 'ep' else duration.unit
        per_batch = per_batch_of(unit, batch, length)
        if not per_batch:
            raise ValueError(f"max_duration='{duration}' needs global_train_batch_size and max_seq_len")
        num_batches = duration.batches(batch, length, per_epoch)
        if num_batches is None:
            raise ValueError(
                f"max_duration='{duration}' is in epochs, whose length only the data knows; "
                'write it in tok, ba or sp, or give train_subset_num_batches=<batches per epoch>'
            )
        phases = phases_of(section, str(duration), per_epoch)
        spans = list(phases.spans) if phases else []
        # a batch at each edge, however coarse the rest
        edges = [int(span.begin // per_batch) + k for span in spans for k in (0, 1)]
        some = np.linspace(0, num_batches - 1, min(num_batches, MAX_POINTS)).round().astype(int)
        batches = np.unique([*some, *(k for k in edges if k < num_batches)])
        alphas = preview(build(section), str(duration), batch, length, per_epoch, batches.tolist())
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f'{path}: scheduler {section["name"]}: {error}') from error
    starts = batches * float(per_batch)
    title = f'{path.stem}  ({section["name"]})'
    return Curve(title, unit, per_batch, num_batches, starts, lr * alphas, lr, spans or find_spans(starts, alphas))


def find_spans(starts: np.ndarray, alphas: np.ndarray) -> list[Span]:
    """Pieces of a schedule that does not say its phases: where it rises, stays and falls, as finely as sampled."""
    change = np.diff(alphas)
    # rounding is no rise
    sign = np.where(np.abs(change) <= 1e-9 * np.max(np.abs(alphas)), 0, np.sign(change)).astype(int)
    names = {1: 'rises', 0: 'stays', -1: 'falls'}
    cuts = [0, *(np.flatnonzero(np.diff(sign)) + 1).tolist(), len(sign)]
    return [
        Span(names[int(sign[a])], float(starts[a]), float(starts[b]), float(alphas[a]), float(alphas[b]), '')
        for a, b in zip(cuts, cuts[1:], strict=False)
        if b > a
    ]


def describe(curve: Curve) -> str:
    """One row per phase, learning rates as the optimizer gets them."""
    unit = UNIT_NAMES[curve.unit]
    per_batch = None if curve.unit == 'ba' else curve.per_batch
    size = f' of {per_batch:,} {unit}' if per_batch else ''
    first, high, last = (f'{lr:.4g}' for lr in (curve.lrs[0], curve.lrs.max(), curve.lrs[-1]))
    return (
        f'{curve.title}, times in {unit}\n{format_spans(curve.spans, curve.unit, curve.lr, per_batch)}\n'
        f'{curve.num_batches:,} batches{size}; LR of the first {first}, highest {high}, last {last}\n'
    )


def draw(curve: Curve, axes: 'Axes') -> None:
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
    axes.xaxis.set_major_formatter(lambda value, _: exact(value))
    axes.yaxis.set_major_formatter(lambda value, _: scientific(value))
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
    args = parser.parse_intermixed_args(argv)
    paths = [Path(text) for text in args.inputs if '=' not in text]
    if not paths:
        parser.error('no YAML given')
    try:
        curves = [curve(path, [text for text in args.inputs if '=' in text]) for path in paths]
    except (ValueError, OSError) as error:
        parser.error(str(error))
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.1 * len(curves)), layout='constrained')
    for one, axes in zip(curves, figure.subplots(len(curves), 1, squeeze=False)[:, 0], strict=True):
        print(describe(one))
        draw(one, axes)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=160)
    print(f'wrote {args.out}')


if __name__ == '__main__':
    main()
