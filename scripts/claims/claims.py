# SPDX-License-Identifier: Apache-2.0
"""The claims of both papers, tested on installed text with small models: seeds, intervals, verdicts.

    make data-claims
    python scripts/claims/claims.py             # everything, hours on a laptop
    python scripts/claims/claims.py --quick     # an eighth of the tokens: that the machinery works, in under 20 minutes

Trains the sequences of yamls/claims/ (recipes/sequence.py; run the same command again after any interruption), and what
is compared with union also with other numbers of tokens and other widths of the model; holds what came out against
bounds that stand in this file. A claim is *reproduced* if the 95 % intervals over seeds (Student's t) of all its
quantities lie within their bounds, *not reproduced* if one lies outside, and *inconclusive at this scale* otherwise.
Ends with FOLDER/claims.json, claims.md and claims.png.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import yaml
from judge import Claim, Condition, Finding, NotRun, Runs, judge
from kept_checkpoints import KeptCheckpoints
from made_with import made_with
from rich.console import Console
from rich.table import Table

from cpt_algorithms.evaluation.functional import steps_saved
from cpt_algorithms.files import write_atomic, write_json
from cpt_algorithms.weight_averaging.functional import window_weights

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
FULL, QUICK = 1_048_576, 131_072
# How near union an update comes changes with the tokens of its stages and the model: also trained are these, (tokens,
# d_model). The YAMLs have 32.
TREND = ((FULL // 4, 32), (4 * FULL, 32), (FULL, 64), (4 * FULL, 16))
# What the paper recommends: percent of replay under each shift.
RECOMMENDED = {'weak': 5, 'strong': 25}
SEQUENCES = ('weak_shift', 'strong_shift', 'infinite', 'averaging')
EMAS = ('ema_0.012dur', 'ema_0.035dur', 'ema_0.1dur')
PAPERS_EMA = 'ema_6738tok'  # 0.9 at each batch of 1024 tokens
# LAWA takes every fourth checkpoint of the constant run: windows can also be narrower than its own.
SPACING = 4
# What counts as equal: twice what the first paper rounds its losses to, in nats per token.
EQUAL = 0.02
console = Console(width=None if sys.stdout.isatty() else 140)


def variables(sequence: str, tokens: int) -> dict[str, int]:
    """Times of a sequence whose stages have ``tokens`` if it is about shifts, in whole batches of 1024 tokens."""
    if sequence == 'averaging':
        batches = 2 * tokens // 1024
        every = batches // 64
        return {
            'tokens': batches * 1024,
            'warmup': round(0.02 * batches) * 1024,
            'anneal': batches * 1024 * 10 // 64,
            'spike': batches * 5 // 8 + every // 2 - 4,  # the evaluation comes after some of it has healed
            'every': every,
            'save': every // SPACING,
            'eval': max(2 * every, 16),  # of few batches the evaluations would take longer than the training
            'window': 4 * every,
        }
    batches = tokens // 1024 // (2 if sequence == 'infinite' else 1)
    window = min(100, batches // 10)
    times = {'tokens': batches * 1024, 'window': window, 'interval': max(1, window // 5)}
    if sequence == 'infinite':
        shares = {'warmup': 0.01, 'cooldown': 0.6, 'anneal': 0.15}
        times |= {key: max(1, round(share * batches)) * 1024 for key, share in shares.items()}
    return times


class Evidence:
    """All sequences at one number of tokens.

    Args:
        folder: Where their folders are.
    """

    def __init__(self, folder: Path) -> None:
        self.weak, self.strong, self.infinite, self.averaging = (Runs(folder / name) for name in SEQUENCES)
        self.shifts = {'weak': (self.weak, 'stdlib'), 'strong': (self.strong, 'cpp')}

    def forgetting(self, shift: str, arm: str = '') -> np.ndarray:
        """On Python, of an update."""
        runs, new = self.shifts[shift]
        return runs.final(f'{new}{arm}', 'python') - runs.final('python', 'python')

    def after(self, shift: str, percent: int) -> str:
        """The run with this much replay."""
        return self.shifts[shift][1] + (f'-replay_{percent}pct' if percent else '')

    def on_new(self, shift: str, percent: int) -> np.ndarray:
        """Loss on the new data."""
        runs, new = self.shifts[shift]
        return runs.final(self.after(shift, percent), new)

    def mean_loss(self, shift: str, run: str) -> np.ndarray:
        """Mean of the losses on old and new data."""
        runs, new = self.shifts[shift]
        return runs.mean_final(run, ('python', new))

    def parameters(self, shift: str) -> int:
        """Of the model."""
        return self.shifts[shift][0].named('python')[0].parameters or 0

    def gap(self, shift: str) -> np.ndarray:
        """Mean loss minus union's, of the replay fraction that the paper recommends for the shift."""
        return self.mean_loss(shift, self.after(shift, RECOMMENDED[shift])) - self.mean_loss(
            shift, f'union_{self.shifts[shift][1]}'
        )

    def spike(self, run: str) -> np.ndarray:
        """How far the loss on Python rises in the first tenth of an update."""
        return self.strong.rise(run, 'python', self.strong.final('python', 'python'), 0.1)

    @cached_property
    def kept(self) -> list[KeptCheckpoints]:
        """The checkpoints of the constant run, of each seed."""
        return [KeptCheckpoints(run.folder) for run in self.averaging.named('python-constant')]

    def window_gain(self, k: int, nu: int) -> np.ndarray:
        """Raw loss minus that of a window of k checkpoints nu saves apart; mean over ends in the second half."""
        return np.array(
            [np.mean([_raw(kept, end) - _window(kept, end, k, nu) for end in _ends(kept)]) for kept in self.kept]
        )


def _ends(kept: KeptCheckpoints) -> list[int]:
    last = len(kept.batches)
    return list(range(last // 2, last + 1, last // 8))


def _raw(kept: KeptCheckpoints, end: int) -> float:
    return kept.loss({kept.batches[end - 1]: 1.0})


def _window(kept: KeptCheckpoints, end: int, k: int, nu: int, kind: str = 'uniform') -> float:
    """Of ``k`` checkpoints, every ``nu``-th, up to the ``end``-th; fewer if there were not as many."""
    window = kept.batches[end - 1 :: -nu][:k][::-1]
    return kept.loss(dict(zip(window, window_weights(kind, len(window)), strict=True)))


CLAIMS: list[Claim] = []


def claim(paper: str) -> Callable[[Callable[[Evidence], list[Condition]]], None]:
    """A claim, which its docstring states: ``paper`` has the paper's numbers."""

    def add(test: Callable[[Evidence], list[Condition]]) -> None:
        says = (test.__doc__ or '').removesuffix('.')
        CLAIMS.append(Claim(test.__name__.upper(), says, paper, test))

    return add


@claim('+0.27 weak, +1.39 strong')
def c1(of: Evidence) -> list[Condition]:
    """An update without replay forgets; more under a strong shift."""
    weak, strong = of.forgetting('weak'), of.forgetting('strong')
    return [
        Condition('forgetting, weak shift', weak, above=0),
        Condition('forgetting, strong minus weak', strong - weak, above=0),
    ]


@claim('67 % weak, 53 % strong')
def c2(of: Evidence) -> list[Condition]:
    """1 % replay spares most of the forgetting."""
    shares = {}
    for shift in of.shifts:
        without, little = of.forgetting(shift), of.forgetting(shift, '-replay_1pct')
        shares[shift] = (without - little) / without
    return [
        Condition(f'share of forgetting that 1 % spares, {shift}', share, above=0.5) for shift, share in shares.items()
    ]


@claim('10 %: 0.01, 0.02; 50 %: 0.04, 0.11')
def c3(of: Evidence) -> list[Condition]:
    """Replay costs little on D1 up to 10 %, visibly at 50 %."""
    conditions = []
    for shift in of.shifts:
        cost = {percent: of.on_new(shift, percent) - of.on_new(shift, 0) for percent in (1, 5, 10, 50)}
        conditions += [
            Condition(f'cost of 10 % on D1, {shift}', cost[10], below=0.03),
            Condition(f'cost of 50 % on D1, {shift}', cost[50], above=0.03),
            Condition(f'cost of 10 % minus 1 %, {shift}', cost[10] - cost[1], above=0),
            Condition(f'cost of 50 % minus 10 %, {shift}', cost[50] - cost[10], above=0),
        ]
    return conditions


@claim('2.47 to 2.35 weak, 2.34 to 1.73 strong')
def c4(of: Evidence) -> list[Condition]:
    """More replay, lower mean loss."""
    conditions = []
    for shift in of.shifts:
        percents = (0, 1, 5, 10, 50)
        means = [of.mean_loss(shift, of.after(shift, percent)) for percent in percents]
        conditions += [
            Condition(f'mean loss, {low} % minus {high} %, {shift}', means[i] - means[i + 1], above=0)
            for i, (low, high) in enumerate(zip(percents, percents[1:], strict=False))
        ]
    return conditions


@claim('+0.02 weak, 0.00 strong')
def c5(of: Evidence) -> list[Condition]:
    """Re-warming, re-decaying and replay are as good as union."""
    return [
        Condition('mean loss minus union, weak, 5 %', of.gap('weak'), below=0.03),
        Condition('mean loss minus union, strong, 25 %', of.gap('strong'), below=0.03),
    ]


@claim('2.51 to 2.53; 1.16 to 1.25')
def c6(of: Evidence) -> list[Condition]:
    """The update is better on D1 than union and than from scratch."""
    conditions = []
    for shift, percent in RECOMMENDED.items():
        runs, new = of.shifts[shift]
        update = of.on_new(shift, percent)
        conditions += [
            Condition(
                f'D1: union minus {percent} % replay, {shift}', runs.final(f'union_{new}', new) - update, above=0
            ),
            Condition(
                f'D1: from scratch minus {percent} % replay, {shift}',
                runs.final(f'single_{new}-from_scratch', new) - update,
                above=0,
            ),
        ]
    return conditions


@claim('Fig. 3')
def c7(of: Evidence) -> list[Condition]:
    """Without re-warming it adapts worst and forgets least."""
    runs = of.strong
    cold, warm, flat = 'cpp-constant_eta_min', 'cpp', 'cpp-constant_eta_max'
    return [
        Condition('D1: constant eta_min minus re-warmed', runs.final(cold, 'cpp') - runs.final(warm, 'cpp'), above=0),
        Condition(
            'D1: constant eta_min minus constant eta_max', runs.final(cold, 'cpp') - runs.final(flat, 'cpp'), above=0
        ),
        Condition(
            'D0: re-warmed minus constant eta_min', runs.final(warm, 'python') - runs.final(cold, 'python'), above=0
        ),
    ]


@claim('Fig. 3')
def c8(of: Evidence) -> list[Condition]:
    """A larger eta_max adapts more and forgets more."""
    low, one, high = 'cpp-half_eta_max', 'cpp', 'cpp-double_eta_max'
    conditions = []
    for label, a, b in (('half minus one', low, one), ('one minus double', one, high)):
        new, old = (of.strong.final(a, name) - of.strong.final(b, name) for name in ('cpp', 'python'))
        conditions += [
            Condition(f'D1: {label}', new, above=0),
            Condition(f'D0: {label}', old, below=0),
        ]
    return conditions


@claim('0, 0.5, 1, 2 % alike')
def c9(of: Evidence) -> list[Condition]:
    """The length of the warm-up does not matter."""
    one = of.mean_loss('strong', 'cpp')
    return [
        Condition(
            f'mean loss, warm-up {percent} % minus 1 %',
            of.mean_loss('strong', f'cpp-warm_up_{percent}pct') - one,
            above=-EQUAL,
            below=EQUAL,
        )
        for percent in ('0', '0.5', '2')
    ]


@claim('+0.1, +0.2; +0.35, +0.45')
def c10(of: Evidence) -> list[Condition]:
    """The loss rises on the same data, too; more with eta_max, and with a shift."""
    same, same_double = of.spike('cpp-same_data'), of.spike('cpp-same_data_double_eta_max')
    return [
        Condition('rise of the loss, same data', same, above=0),
        Condition('rise at double eta_max minus at one, same data', same_double - same, above=0),
        Condition('rise, new minus same data', of.spike('cpp') - same, above=0),
        Condition('rise, new minus same data, double eta_max', of.spike('cpp-double_eta_max') - same_double, above=0),
    ]


@claim('Figs. 8-9')
def c11(of: Evidence) -> list[Condition]:
    """An infinite schedule ends as a cosine, and rises less at boundaries."""
    runs, splits = of.infinite, ('split_1', 'split_2', 'split_3')
    conditions = []
    for index, stage in ((1, 'split_1'), (3, 'split_3')):
        gap = runs.mean_final(f'{stage}-infinite-anneal', splits) - runs.mean_final(stage, splits)
        conditions.append(Condition(f'annealed minus cosine, after split {index}', gap, below=EQUAL))
    rises = []
    for cosine, infinite, before in (
        ('split_2', 'split_2-infinite', 'split_1'),
        ('split_3', 'split_3-infinite', 'split_2'),
    ):
        at = runs.final(before, before), runs.final(f'{before}-infinite', before)
        rises.append(runs.rise(cosine, before, at[0], 0.2) - runs.rise(infinite, before, at[1], 0.2))
    conditions.append(Condition('rise at boundaries, cosine minus infinite', np.mean(rises, axis=0), above=0))
    return conditions


@claim('-0.12 at 20k')
def w1(of: Evidence) -> list[Condition]:
    """LAWA lowers the loss through the middle of training."""
    gain = of.averaging.gain('python-constant', 'python', 'lawa', 0.2, 0.7)
    return [Condition('raw minus LAWA, from 20 % to 70 % of the run', gain, above=0)]


@claim('0.12 and 0.06')
def w2(of: Evidence) -> list[Condition]:
    """More at a higher rate."""
    high, low = (
        of.averaging.gain(run, 'python', 'lawa', 1 / 3, 1) for run in ('python-constant', 'python-constant_a_tenth')
    )
    return [Condition('gain at the rate minus at a tenth, from a third on', high - low, above=0)]


@claim('')
def w3(of: Evidence) -> list[Condition]:
    """Wider spacing gains more, up to a limit."""
    spacings = (1, 2, 4, 8, 16, 24)  # the widest still fits into half of the run
    gains = {nu: of.window_gain(5, nu) for nu in spacings}
    best = max(gains, key=lambda nu: gains[nu].mean())
    first, last = min(gains), max(gains)
    span = 100 * 5 * best / len(of.kept[0].batches)
    return [
        Condition(
            f'gain at the best spacing (span {span:.0f} % of the run) minus the narrowest',
            gains[best] - gains[first],
            above=0,
        ),
        Condition('gain at the best spacing minus the widest', gains[best] - gains[last], above=0),
    ]


@claim('~30 %')
def w4(of: Evidence) -> list[Condition]:
    """It saves steps to the same loss."""
    saved = []
    for raw, averaged in zip(
        of.averaging.curves('python-constant', 'python'),
        of.averaging.curves('python-constant', 'python', 'lawa'),
        strict=True,
    ):
        share = steps_saved(raw.tolist(), averaged.tolist(), 0.0625)
        saved.append(0.0 if share is None else share)
    return [Condition('share of the steps saved by LAWA', saved, above=0.2)]


@claim('3.0421 and 3.0413')
def w5(of: Evidence) -> list[Condition]:
    """Better than EMA 0.9 and than SWA from early on; tuned EMA is level."""
    runs, run = of.averaging, 'python-constant'
    lawa = runs.final(run, 'python', 'lawa')
    tuned = min((runs.final(run, 'python', each) for each in EMAS), key=np.mean)
    swa = {}
    for when, begin in (('early', 0.2), ('late', 0.75)):
        of_seeds = []
        for kept in of.kept:
            last = len(kept.batches)
            count = round((1 - begin) * last) // SPACING
            of_seeds.append(_window(kept, last, count, SPACING) - _window(kept, last, 5, SPACING))
        swa[when] = np.array(of_seeds)
    return [
        Condition('EMA 0.9 minus LAWA', runs.final(run, 'python', PAPERS_EMA) - lawa, above=0),
        Condition('SWA from 20 % on minus LAWA', swa['early'], above=0),
        Condition('tuned EMA minus LAWA', tuned - lawa, above=-EQUAL, below=EQUAL),
    ]


@claim('0.12 to 0.045')
def w6(of: Evidence) -> list[Condition]:
    """The gain fades as the rate goes to zero."""
    middle, end = (
        of.averaging.gain('python-cosine_to_zero', 'python', 'lawa', *part) for part in ((1 / 3, 2 / 3), (0.9, 1))
    )
    return [Condition('gain in the last tenth minus the middle third, cosine to zero', end - middle, below=0)]


@claim('2 of 2')
def w7(of: Evidence) -> list[Condition]:
    """Averages ride out spikes of the loss."""
    rises = {}
    for average in ('', 'lawa'):
        of_seeds = []
        for curve in of.averaging.curves('python-spike', 'python', average):
            before = curve[(curve[:, 0] > 0.55) & (curve[:, 0] < 0.625), 1].mean()
            of_seeds.append(curve[(curve[:, 0] >= 0.625) & (curve[:, 0] < 0.7), 1].max() - before)
        rises[average] = np.array(of_seeds)
    return [
        Condition('rise of the raw loss', rises[''], above=0.1),
        Condition('rise of LAWA over rise of raw (share)', rises['lawa'] / rises[''], below=1),
    ]


@claim('+3.3 points')
def w8(of: Evidence) -> list[Condition]:
    """Better zero-shot, half-way."""
    gain = of.averaging.gain('python-constant', 'stdlib', 'lawa', 0.4, 0.6)
    return [Condition('raw minus LAWA on text never trained on, half-way', gain, above=0)]


@claim('+1.28 points (WSM)')
def w9(of: Evidence) -> list[Condition]:
    """Merging at a constant rate is as good as annealing."""
    merged, annealed = (of.averaging.last(f'python-constant-{how}', 'python') for how in ('merge', 'anneal'))
    return [Condition('merged minus annealed, at equal tokens', merged - annealed, above=-EQUAL, below=EQUAL)]


@claim('PMA Fig. 4')
def w10(of: Evidence) -> list[Condition]:
    """Weights of the average matter early (linear best), not late."""

    def losses(at: float) -> dict[str, np.ndarray]:
        return {
            kind: np.array([_window(kept, round(at * len(kept.batches)), 5, 2 * SPACING, kind) for kept in of.kept])
            for kind in ('uniform', 'linear', 'ema')
        }

    early, late = losses(0.15), losses(1.0)
    spread = {name: np.ptp(list(each.values()), axis=0) for name, each in (('early', early), ('late', late))}
    return [
        Condition('spread of SMA, WMA and EMA, early minus late', spread['early'] - spread['late'], above=0),
        Condition('SMA minus WMA, early', early['uniform'] - early['linear'], above=0),
        Condition('spread, late', spread['late'], below=EQUAL),
    ]


def train(folder: Path, tokens: int, jobs: int, d_model: int | None = None) -> None:
    """Run the sequences; one that fails does not stop the others.

    Args:
        folder: Where their folders are.
        tokens: See :func:`variables`.
        jobs: Runs at a time.
        d_model: If given, only what is compared with union, with a model of this width. Default: everything, with
            the YAMLs' models.
    """
    for name in ('weak_shift', 'strong_shift') if d_model else SEQUENCES:
        path = ROOT / 'yamls' / 'claims' / f'{name}.yaml'
        if d_model:
            spec = yaml.safe_load(path.read_text(encoding='utf-8'))
            percent = RECOMMENDED[name.removesuffix('_shift')]
            spec['arms'] = {arm: spec['arms'][arm] for arm in (f'replay {percent} %', 'union')}
            spec['common']['model']['d_model'] = d_model
            path = folder / f'{name}.yaml'
            write_atomic(path, yaml.safe_dump(spec, sort_keys=False).encode())
        settings = [f'variables.{key}={value}' for key, value in variables(name, tokens).items()]
        words = [str(path), f'folder={(folder / name).resolve()}', f'jobs={jobs}', *settings]
        console.print(f'\n{name}, stages of {tokens:,} tokens', style='bold')
        code = subprocess.run([sys.executable, str(ROOT / 'recipes' / 'sequence.py'), *words], cwd=ROOT).returncode
        if code:
            console.print(f'{name} ended with {code}: what it lacks is in the table as not run')


def number_of(condition: Condition) -> str:
    """Mean and half-width."""
    mean = condition.over_seeds
    return f'{mean.mean:+.3f}' + ('' if mean.half is None else f' ± {mean.half:.3f}')


def measured(condition: Condition) -> str:
    """The same, and what it means if not that the claim holds."""
    number = number_of(condition)
    return number if condition.verdict == 'reproduced' else f'{number} ({condition.verdict})'


def print_findings(findings: list[Finding], title: str) -> None:
    """A table for the terminal."""
    shown = Table(title=title, title_justify='left')
    for column in ('claim', 'verdict', 'quantity (nats/token)', 'must be', 'measured'):
        shown.add_column(column, overflow='fold')
    for finding in findings:
        first = [f'{finding.claim.name} {finding.claim.says}', finding.verdict]
        for condition in finding.conditions:
            shown.add_row(*first, condition.what, condition.bounds, measured(condition))
            first = ['', '']
        if finding.missing:
            shown.add_row(*first, finding.missing)
        shown.add_section()
    console.print(shown)


@dataclass(frozen=True)
class Point:
    """Mean loss minus union's under a shift, with so many parameters and tokens of each stage."""

    label: str
    parameters: int
    tokens: int
    gap: Condition


def trend(ran: Mapping[int, Sequence[Evidence]]) -> list[Point]:
    """The gap to union under each shift, model by model, at each number of tokens where it was run."""
    points = []
    for shift in ('weak', 'strong'):
        for tokens, evidence in ((tokens, each) for tokens, several in ran.items() for each in several):
            try:
                gap, parameters = Condition('', evidence.gap(shift)), evidence.parameters(shift)
            except NotRun:
                continue
            points.append(Point(f'{shift} shift, {RECOMMENDED[shift]} % replay', parameters, tokens, gap))
    order = {point.label: index for index, point in enumerate(points)}
    return sorted(points, key=lambda point: (order[point.label], point.parameters, point.tokens))


def page(findings: list[Finding], points: list[Point], made: str) -> str:
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
    gaps = ['| shift | parameters | tokens of each stage | mean loss minus union |', '|---|---|---|---|']
    gaps += [f'| {each.label} | {each.parameters:,} | {each.tokens:,} | {number_of(each.gap)} |' for each in points]
    return '\n'.join([made, '', *short, '', *whole, '', *gaps, ''])


def as_data(finding: Finding) -> dict[str, Any]:
    """The same, with the number of each seed."""
    conditions = [
        {'what': each.what, 'must be': each.bounds, 'values': [*map(float, each.values)], 'verdict': each.verdict}
        for each in finding.conditions
    ]
    return {
        'claim': finding.claim.name,
        'verdict': finding.verdict,
        'missing': finding.missing,
        'conditions': conditions,
    }


def draw(points: list[Point], path: Path) -> None:
    """How the gap to union changes with the tokens of a stage and the size of the model."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout='constrained')
    labels = list(dict.fromkeys(each.label for each in points))
    sizes = sorted({each.parameters for each in points})
    series = list(dict.fromkeys((each.label, each.parameters) for each in points))
    for index, (label, parameters) in enumerate(series):
        aside = 1.05 ** (index - len(series) / 2)  # or the intervals would hide each other
        line = [each for each in points if (each.label, each.parameters) == (label, parameters)]
        means = [each.gap.over_seeds for each in line]
        axes.errorbar(
            [each.tokens * aside for each in line],
            [mean.mean for mean in means],
            yerr=[mean.half or 0.0 for mean in means],
            color=f'C{labels.index(label)}',
            marker='os^D'[sizes.index(parameters) % 4],
            capsize=3,
            label=f'{label}, {parameters:,} parameters',
        )
    axes.axhline(0, color='black', linewidth=0.8)
    axes.axhline(0.03, color='grey', linewidth=0.8, linestyle='--', label='bound of C5')
    axes.set_xscale('log')
    ticks = sorted({each.tokens for each in points})
    axes.set_xticks(ticks, [f'{tokens:,}' for tokens in ticks])
    axes.minorticks_off()
    axes.set(xlabel='tokens of each stage', ylabel='mean loss minus union, nats/token')
    figure.legend(loc='outside upper center', ncols=2, fontsize='small', frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Train, judge, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true', help=f'stages of {QUICK:,} tokens, and no others')
    parser.add_argument('--folder', type=Path, default=Path('runs/claims'))
    parser.add_argument('--jobs', type=int, default=os.cpu_count(), help='runs at a time; default: one for each core')
    arguments = parser.parse_args()
    started = time.monotonic()

    def place(tokens: int, d_model: int | None = None) -> Path:
        return arguments.folder / (f'{tokens}tok' + (f'-d_model_{d_model}' if d_model else ''))

    full = QUICK if arguments.quick else FULL
    train(place(full), full, arguments.jobs)
    evidence = Evidence(place(full))
    ran = {full: [evidence]}
    for tokens, d_model in () if arguments.quick else TREND:
        folder = place(tokens, d_model)
        train(folder, tokens, arguments.jobs, d_model)
        ran.setdefault(tokens, []).append(Evidence(folder))
    findings = judge(CLAIMS, evidence)
    points, made = trend(ran), made_with()
    if arguments.quick:
        made += '; --quick: models that have barely begun to learn, so that the verdicts say little about the claims'
    print_findings(findings, f'stages of {full:,} tokens; {made}')
    data = {
        'made': made,
        'findings': [as_data(each) for each in findings],
        'trend': [
            {
                'shift': each.label,
                'parameters': each.parameters,
                'tokens': each.tokens,
                'values': [*map(float, each.gap.values)],
            }
            for each in points
        ],
    }
    write_json(arguments.folder / 'claims.json', data)
    write_atomic(arguments.folder / 'claims.md', page(findings, points, made).encode())
    draw(points, arguments.folder / 'claims.png')
    console.print(f'{arguments.folder}/claims.json, claims.md and claims.png ({time.monotonic() - started:.0f} s)')


if __name__ == '__main__':
    main()
