# SPDX-License-Identifier: Apache-2.0
"""The plots of the report, one figure each, for people of any sight and screens of any width."""

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from math import inf, isfinite
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from cpt_algorithms.evaluation.functional import by_average, is_point
from cpt_algorithms.foresight.fits import Estimate
from cpt_algorithms.formatting import exact, flop, percent, scientific, short, shortened
from cpt_algorithms.report.run_records import Arm, RunRecord, RunSet, read_until, size_name
from cpt_algorithms.report.tables import Row

__all__ = ['plots_of', 'png', 'svg']

# Okabe and Ito's colours without their yellow, then Paul Tol's: told apart by colour-blind people
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#882255', '#999933', '#332288', '#44AA99')
RETRAINED = {'union': '#000000', 'matched': '#7c5a43'}
SHARED, INK, FAINT = '#8a8f98', '#22303c', '#d5dae1'
MARKERS = 'osD^vPXp*h'
AVERAGE_STYLES = ('-.', ':', (0, (4, 1.5)), (0, (1, 1, 4, 1)))
WIDTH, HEIGHT = 4.3, 3.0  # inches; 9-point letters are still legible at the width of a phone
STYLE: dict[Any, Any] = {
    'font.family': 'DejaVu Sans',
    'font.size': 9,
    'axes.titlesize': 10,
    'axes.titleweight': 'bold',
    'axes.titlelocation': 'left',
    **dict.fromkeys(('axes.spines.top', 'axes.spines.right'), False),
    'axes.edgecolor': SHARED,
    **dict.fromkeys(('axes.labelcolor', 'text.color', 'xtick.color', 'ytick.color'), INK),
    'axes.grid': True,
    'grid.color': FAINT,
    'grid.linewidth': 0.6,
    'axes.axisbelow': True,
    'text.parse_math': False,  # names may have a $
    'legend.frameon': False,
    'legend.fontsize': 8.5,
    'svg.fonttype': 'path',
    'svg.hashsalt': 'cpt_algorithms',  # the same picture is the same file
}

MOST_ARMS = 20  # in a plot; no legend of more can be read, and to place its names takes minutes

Values = Callable[[RunRecord], list[list[float]]]


@dataclass(frozen=True)
class Plot:
    """A figure of the report."""

    name: str  # of its file, without the ending
    title: str  # what it shows, for people who cannot see it
    figure: Figure


def png(plot: Plot) -> bytes:
    """The figure as a PNG file."""
    with matplotlib.rc_context(STYLE):
        buffer = io.BytesIO()
        plot.figure.savefig(buffer, format='png', dpi=200, metadata={'Software': None})
    return buffer.getvalue()


def svg(plot: Plot) -> str:
    """The figure as an element of a page, whose ids do not clash with those of other figures."""
    with matplotlib.rc_context(STYLE):
        buffer = io.StringIO()
        nothing = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
        plot.figure.savefig(buffer, format='svg', metadata=nothing)
    text = buffer.getvalue()
    text = re.sub(r'<metadata>.*?</metadata>', '', text[text.index('<svg') :], flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf'\g<1>{plot.name}-', text)
    head = re.search(r'viewBox="[^"]*"', text)
    assert head is not None, 'matplotlib says how large it is'
    return f'<svg role="img" {head[0]} xmlns:xlink="http://www.w3.org/1999/xlink">{text[text.index(">") + 1 :]}'.strip()


def plots_of(study: RunSet, rows: Sequence[Row]) -> Iterator[Plot]:
    """Every plot that there are numbers for."""
    taken: Counter[str] = Counter()
    for size in study.sizes:
        every = study.arms(size)
        arms = _shown(every, [row for row in rows if row.size == size])
        names = {arm.name for arm in arms}
        of_size = [row for row in rows if row.size == size and row.arm in names]
        title = size_name(size) if len(study.sizes) > 1 else ''
        is_part = f'the {len(arms)} best of {len(every)} arms' if len(arms) < len(every) else ''
        with matplotlib.rc_context(STYLE):
            made = [_loss(study, arms, name) for name in study.data]
            made += [_averages(study, arms, name) for name in study.data]
            colours = _colours(arms)
            made += [_plane(of_size, colours), _learning_rates(study, arms), _cost(of_size, colours)]
            found = [plot for plot in made if plot is not None]
            for plot in found:
                plot.figure.axes[0].set_title('\n'.join(filter(None, (plot.title, title, is_part))))
                plot.figure.draw_without_rendering()
                plot.figure.set_layout_engine('none')  # it is laid out, for all files
        for plot in found:
            name = '-'.join(filter(None, (plot.name, _slug(title))))
            taken[name] += 1  # c++ and c# are both c to a file
            name += f'-{taken[name]}' if taken[name] > 1 else ''
            yield Plot(name, ', '.join(filter(None, (plot.title, title, is_part))), plot.figure)


def _shown(arms: Sequence[Arm], rows: Sequence[Row]) -> list[Arm]:
    """All arms, or if there are too many, those of today's plan with the lowest mean losses, in order."""
    if len(arms) <= MOST_ARMS:
        return list(arms)
    losses = {row.arm: row.columns['loss mean'].mean for row in rows if 'loss mean' in row.columns and not row.average}

    def rank(arm: Arm) -> tuple[bool, bool, float]:
        loss = losses.get(arm.name, inf)
        return bool(arm.runs[0].other_plan), arm.kind != 'union', loss if isfinite(loss) else inf

    best = {arm.name for arm in sorted(arms, key=rank)[:MOST_ARMS]}
    return [arm for arm in arms if arm.name in best]


def _slug(text: str) -> str:
    return re.sub(r'\W+', '_', text).strip('_')


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, HEIGHT), layout='constrained')
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _colours(arms: Sequence[Arm]) -> dict[str, str]:
    """An arm has one colour in all plots; first stages by themselves are not lines of their own."""
    updates = [arm.name for arm in arms if arm.kind == 'update']
    names = updates or [arm.name for arm in arms if arm.kind not in RETRAINED]
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    return colours | {arm.name: RETRAINED[arm.kind] for arm in arms if arm.kind in RETRAINED}


@dataclass
class _Line:
    """One stage of an arm, or of several that share it."""

    label: str
    colour: str
    style: Any
    start: float
    runs: list[RunRecord] = field(default_factory=list)
    seeds: list[list[list[float]]] = field(default_factory=list)  # [[token, value], ...]


def _lines(study: RunSet, arms: Sequence[Arm], values: Values) -> list[_Line]:
    """Stages before an arm's last one are dashed; those of several arms are one grey line."""
    colours = _colours(arms)
    drawn = [arm for arm in arms if arm.name in colours]
    users = Counter(run.folder for arm in drawn for last in arm.runs for run in study.chain(last)[:-1])
    own = {last.folder for arm in drawn for last in arm.runs}
    lines: dict[tuple[str, str, str], _Line] = {}
    for arm in drawn:
        for last in arm.runs:
            for run in study.chain(last):
                start = read_until(run.parent, run.begins, study.runs)
                is_shared = users[run.folder] > 1
                label = f'{run.stage} (shared)' if is_shared else arm.name
                colour, style = SHARED if is_shared else colours[arm.name], '-' if run is last else '--'
                # several shared runs of a stage, a trunk and its branch, or two sequences are not seeds of one
                key = (label, run.sequence, run.name.removesuffix(f'-s{run.seed}'))
                line = lines.setdefault(key, _Line(label, colour, style, start))
                points = [[start + token, value] for _, token, value in values(run)]
                is_drawn = run is not last and run.folder in own  # a trunk that is an arm itself
                if points and run not in line.runs and not is_drawn:
                    line.runs.append(run)
                    line.seeds.append(points)
    return [line for line in lines.values() if line.seeds]


def _draw(axis: Axes, lines: Sequence[_Line]) -> None:
    """Seeds as thin lines and their mean as a thick one; dotted where a stage begins."""
    labelled: set[str] = set()
    for line in lines:
        # of an arm's own stages, the last stands in the legend
        is_named = line.label not in labelled and (line.style != '--' or line.colour == SHARED)
        look = {'color': line.colour, 'linestyle': line.style, 'label': line.label if is_named else None}
        labelled |= {line.label} if is_named else set()
        if len(line.seeds) > 1:
            for points in line.seeds:
                axis.plot(*zip(*points, strict=True), color=line.colour, linestyle=line.style, linewidth=0.6, alpha=0.5)
        # what was not trained, such as a merge, is one point
        is_point = max(map(len, line.seeds)) == 1
        axis.plot(*_mean_line(line), linewidth=1.7, marker='o' if is_point else None, clip_on=not is_point, **look)
    for start in {line.start for line in lines if line.start}:
        axis.axvline(start, color=SHARED, linewidth=0.9, linestyle=':')
    last = max((points[-1][0] for line in lines for points in line.seeds), default=0)
    _count_tokens(axis.xaxis)
    axis.set_xlabel('tokens')
    axis.set_xlim(0, last or None)


def _count_tokens(axis: Axis) -> None:
    """Ticks such as 2.5 M."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: exact(value)))
    axis.set_major_locator(MaxNLocator(6))


def _mean_line(line: _Line) -> tuple[list[float], list[float]]:
    """Mean over the seeds that have finished, or else the one that has come furthest."""
    finished = [points for run, points in zip(line.runs, line.seeds, strict=True) if run.state == 'finished']
    seeds = finished or [max(line.seeds, key=lambda points: points[-1][0])]
    tokens = [token for token, _ in seeds[0]]
    values = [np.interp(tokens, [p[0] for p in points], [p[1] for p in points]) for points in seeds]
    return tokens, np.mean(values, axis=0).tolist()


def _legend(figure: Figure, axis: Axes, extra: Sequence[Line2D] = ()) -> None:
    """Under the plot, where it hides nothing."""
    handles = [*axis.get_legend_handles_labels()[0], *extra]
    for handle in handles:
        handle.set_label(shortened(str(handle.get_label()), 52))
    # two columns, unless names are too long for that
    columns = 2 if max((len(str(handle.get_label())) for handle in handles), default=0) <= 26 else 1
    figure.legend(handles=handles, loc='outside lower left', ncols=columns, handlelength=2.2, columnspacing=1.2)
    figure.set_figheight(HEIGHT + 0.19 * -(-len(handles) // columns))


def _frame(axis: Axes, lines: Sequence[_Line], name: str) -> None:
    """Show all of old data's losses in the last stages, and the last two thirds of others': more would be a cliff."""
    seeds = [(line, *seed) for line in lines for seed in zip(line.runs, line.seeds, strict=True)]
    done = [(line, run, points) for line, run, points in seeds if line.style != '--' and run.state == 'finished']
    shown = [points[-1][1] for line, _, points in seeds if line.style != '--']
    for line, run, points in done or seeds:
        share = 0 if name in run.old else (points[-1][0] - line.start) / 3
        shown += [value for token, value in points if token >= line.start + share]
    shown = [value for value in shown if isfinite(value)]
    if shown:
        margin = 0.06 * (max(shown) - min(shown)) or 0.1
        axis.set_ylim(min(shown) - margin, max(shown) + margin)


def _from_parent(study: RunSet, run: RunRecord, name: str) -> list[list[float]]:
    """Its losses; a stage starts at the checkpoint of its parent."""
    points = run.losses.get(name, [])
    # on the data that its parent learned, it is not compared with that
    parents = study.runs[run.parent].losses.get(name, []) if run.parent and not run.tokens_before_branch else []
    until = [loss for batch, _, loss in parents if run.begins is None or batch <= run.begins]
    start = run.at_start.get(name, until[-1] if until else None)
    return [[0, 0, start], *points] if start is not None and (not points or points[0][1] > 0) else points


def _role(study: RunSet, arms: Sequence[Arm], name: str) -> str:
    runs = [run for arm in arms if arm.kind == 'update' for run in arm.runs]
    role = 'old data' if any(name in run.old for run in runs) else ''
    role = 'new data' if any(name in run.new for run in runs) else role
    return f'{name} (D{study.data.index(name)}{f", {role}" if role else ""})'


def _losses(lines: Sequence[_Line], name: str) -> tuple[Figure, Axes]:
    figure, axis = _figure()
    _draw(axis, lines)
    _frame(axis, lines, name)
    axis.set_ylabel('loss (nats/token)')
    return figure, axis


def _loss(study: RunSet, arms: Sequence[Arm], name: str) -> Plot | None:
    lines = _lines(study, arms, lambda run: _from_parent(study, run, name))
    if not any(len(points) > 1 for line in lines for points in line.seeds):
        return None
    figure, axis = _losses(lines, name)
    for line in lines:
        for run in (run for run in line.runs if line.style != '--' and run.state == 'unfinished'):
            from cpt_algorithms.report.pilots import forecast_of  # which takes seconds to import

            _draw_forecast(axis, line, forecast_of(study, run, name))
    _legend(figure, axis)
    return Plot(f'loss-{_slug(name)}', f'Loss on {_role(study, arms, name)}', figure)


def _draw_forecast(axis: Axes, line: _Line, forecast: Sequence[tuple[int, Estimate]]) -> None:
    """The rest of a curve as it is foretold: dotted, in a band of 95 %."""
    if forecast:
        tokens = [line.start + token for token, _ in forecast]
        low, high = ([getattr(loss, end) for _, loss in forecast] for end in ('low', 'high'))
        axis.plot(tokens, [loss.value for _, loss in forecast], color=line.colour, linestyle=':', linewidth=1.4)
        axis.fill_between(tokens, low, high, color=line.colour, alpha=0.2, linewidth=0)
        axis.set_xlim(0, max(tokens[-1], axis.get_xlim()[1]))


def _averages(study: RunSet, arms: Sequence[Arm], name: str) -> Plot | None:
    """Averaged weights beside the training weights of the same arms, in the last stage."""
    runs = [run for arm in arms for run in arm.runs]
    averages = dict.fromkeys(a for run in runs for a in by_average(run.final, [name]) if a and not is_point(a))
    if not averages:
        return None
    styles: dict[str, Any] = dict(zip(averages, cycle(AVERAGE_STYLES), strict=False))
    averaged = [
        replace(line, style=style, label=f'_{line.label}')
        for average, style in styles.items()
        for line in _lines(study, arms, lambda run, label=f'{name}/{average}': run.losses.get(label, []))
        if line.style == '-'
    ]
    lines = _lines(study, arms, lambda run: _from_parent(study, run, name))
    lines = [line for line in lines if line.style == '-' and f'_{line.label}' in {each.label for each in averaged}]
    if not lines:
        return None
    drawn = [*lines, *averaged]
    figure, axis = _losses(drawn, name)
    axis.set_xlim(min(points[0][0] for line in drawn for points in line.seeds))
    looks = [Line2D([], [], color=INK, linestyle=style, label=average) for average, style in styles.items()]
    _legend(figure, axis, looks)
    return Plot(f'averages-{_slug(name)}', f'Averaged weights on {_role(study, arms, name)}', figure)


def _learning_rates(study: RunSet, arms: Sequence[Arm]) -> Plot | None:
    lines = _merged(_lines(study, arms, lambda run: run.learning_rate))
    if not lines:
        return None
    figure, axis = _figure()
    _draw(axis, lines)
    axis.set_ylim(0)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: scientific(value)))
    axis.set_ylabel('learning rate')
    _legend(figure, axis)
    return Plot('learning-rate', 'Learning rate, as applied', figure)


def _merged(lines: Sequence[_Line]) -> list[_Line]:
    """Lines that would hide each other as one, which says so."""
    groups: dict[str, list[_Line]] = {}
    for line in lines:
        groups.setdefault(repr((line.style, line.seeds)), []).append(line)
    merged = [(same[0], len(same) - 1) for same in groups.values()]
    return [replace(line, label=f'{line.label} and {more} alike') if more else line for line, more in merged]


def _plane(rows: Sequence[Row], colours: Mapping[str, str]) -> Plot | None:
    rows = [row for row in rows if {'forgetting', 'adaptation'} <= row.columns.keys()]
    rows = [row for row in rows if isfinite(row.columns['forgetting'].mean + row.columns['adaptation'].mean)]
    points = [row for row in rows if row.is_point]
    rows = [row for row in rows if not row.average]
    if not rows:
        return None
    figure, axis = _figure()
    for arm in dict.fromkeys(row.arm for row in points):  # from the parent to the child
        ends = [[row.columns[key].mean for row in points if row.arm == arm] for key in ('forgetting', 'adaptation')]
        axis.plot(*ends, '.-', color=colours.get(arm, INK), linewidth=1.1, markersize=4)
    for row, marker in zip(rows, cycle(MARKERS), strict=False):
        forgot, learned = row.columns['forgetting'], row.columns['adaptation']
        colour = colours.get(row.arm, INK)
        look: dict[str, Any] = {'marker': marker, 'zorder': 3}
        if len(forgot.values) > 1:
            axis.scatter(forgot.values, learned.values, s=12, color=colour, alpha=0.5, linewidths=0, **look)
        face, label = (colour, row.arm) if row.is_finished else ('white', f'{row.arm} (unfinished)')
        look |= {'facecolor': face, 'edgecolor': colour, 'label': label}
        axis.scatter(forgot.mean, learned.mean, s=60, linewidths=1.4, **look)
    axis.axvline(0, color=SHARED, linewidth=0.9)
    axis.margins(0.16, 0.14)
    axis.annotate('↖ better', (0.015, 0.985), xycoords='axes fraction', va='top', color=SHARED)
    axis.set(xlabel='forgetting (nats/token)', ylabel='adaptation (nats/token)')
    _legend(figure, axis)
    return Plot('forgetting-adaptation', 'Forgetting against adaptation', figure)


def _cost(rows: Sequence[Row], colours: Mapping[str, str]) -> Plot | None:
    rows = [row for row in rows if not row.average]
    bars = [(row, colours.get(row.arm, SHARED)) for row in rows if row.columns['tokens'].mean]
    if not bars:
        return None
    trained = {row.runs[0].plan for row in rows if row.kind == 'union'}
    planned = {r.runs[0].plan: r for r in reversed(rows) if r.runs[0].union_tokens and r.runs[0].plan not in trained}
    unions = {row.arm: row.runs[0].union_tokens or 0 for row in reversed(planned.values())}
    last = max(*(row.columns['tokens'].mean for row, _ in bars), *unions.values(), 0)
    figure, axis = _figure()
    count = len(bars) + len(unions)
    for y, (row, colour) in zip(range(count, 0, -1), bars, strict=False):
        columns = row.columns
        new, replayed = columns['new tokens'].mean, columns['replayed tokens'].mean
        face, style = ('white', ':') if row.runs[0].state == 'not started' else (colour, '-')
        axis.barh(y, new, 0.36, color=face, edgecolor=colour, linestyle=style)
        if replayed:
            axis.barh(y, replayed, 0.36, left=new, color='white', edgecolor=colour, hatch='/////', linewidth=0.8)
        said = [f'{short(new + replayed)} tokens']
        said += [flop(columns['flops'].mean)] if 'flops' in columns else []
        said += [percent(columns['compute vs union'].mean)] if 'compute vs union' in columns else []
        _bar_text(axis, y, row.arm, ', '.join(said))
    for y, (arm, union) in zip(range(len(unions), 0, -1), unions.items(), strict=True):
        axis.barh(y, union, 0.36, color='white', edgecolor=SHARED, linestyle=':')
        name = 'union' if len(unions) == 1 else f'union, for {arm}'
        _bar_text(axis, y, name, f'{short(union)} tokens, 100 %')
    axis.set(ylim=(0.6, count + 0.75), xlim=(0, last * 1.01), xlabel='tokens (hatched: replayed, dotted: not run)')
    axis.set_yticks([])
    axis.grid(visible=False)
    axis.spines['left'].set_visible(False)
    _count_tokens(axis.xaxis)
    figure.set_figheight(max(0.75 + 0.39 * count, 2.4))
    return Plot('cost', 'Cost of the last stage', figure)


def _bar_text(axis: Axes, y: float, name: str, numbers: str) -> None:
    """Above its bar: the name on the left, the numbers on the right."""
    look: dict[str, Any] = {'xycoords': ('axes fraction', 'data'), 'va': 'center', 'fontsize': 8.5}
    axis.annotate(shortened(name, 33), (0, y + 0.41), ha='left', **look)
    axis.annotate(numbers, (1, y + 0.41), ha='right', color='#52667a', **look)
