# SPDX-License-Identifier: Apache-2.0
"""The claims of both papers, each a function of the evidence whose docstring states it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from evidence import Evidence, window_loss
from judge import Claim, Condition, NotRun
from training import RECOMMENDED, SAMPLED, SPACING, TREND, WIDTH

from cpt_algorithms.evaluation.functional import steps_saved

__all__ = ['CLAIMS', 'EMAS', 'PAPERS_EMA']

EMAS = ('ema_0.012dur', 'ema_0.035dur', 'ema_0.1dur')
PAPERS_EMA = 'ema_6738tok'  # 0.9 at each batch of 1024 tokens
# What counts as free of charge, in nats per token.
FREE = 0.03
# What counts as foreseen: what the quickstart's pilots foretold was up to 0.09 off.
FORESEEN = 0.05
# Written by foretell.py, and committed, before what it speaks of was trained.
FORETOLD = json.loads((Path(__file__).parents[2] / 'yamls' / 'claims' / 'foretold.json').read_text(encoding='utf-8'))
# What counts as equal: twice what the first paper rounds its losses to, in nats per token.
EQUAL = 0.02
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
        without, little = of.forgetting(shift), of.forgetting(shift, 1)
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
                runs.final(f'from_scratch_{new}-from_scratch', new) - update,
                above=0,
            ),
        ]
    return conditions


@claim('Fig. 3')
def c7(of: Evidence) -> list[Condition]:
    """Without re-warming it adapts worst and forgets least."""
    runs = of.strong
    cold, warm, flat = 'cpp-constant_eta_min', 'cpp-replay_0pct', 'cpp-constant_eta_max'
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
    low, one, high = 'cpp-half_eta_max', 'cpp-replay_0pct', 'cpp-double_eta_max'
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
    one = of.mean_loss('strong', 'cpp-replay_0pct')
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
        Condition('rise, new minus same data', of.spike('cpp-replay_0pct') - same, above=0),
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


@claim('')
def c14(of: Evidence) -> list[Condition]:
    """What the laws foretold of arms and a schedule before they were trained is right to 0.05."""
    conditions = []
    for arm in FORETOLD:
        runs, new = of.shifts[arm['shift']]
        if of.tokens(arm['shift']) != arm['tokens']:
            raise NotRun(f'stages of {arm["tokens"]:,} tokens, of which it was foretold')
        for data in ('python', new):
            # shares were fitted to means over the final window, an ending is the last loss
            loss = runs.last if arm['is_ending'] else runs.final
            off = loss(arm['run'], data) - arm['losses'][data]['value']
            conditions.append(
                Condition(f'measured minus foretold, {arm["shift"]}, {arm["arm"]}, {data}', off, -FORESEEN, FORESEEN)
            )
    return conditions


@claim('no paper separates it')
def c15(of: Evidence) -> list[Condition]:
    """Continuing costs nothing: the update is level with its own mixture from scratch at full compute."""
    return [
        Condition(
            f'update minus matched, {shift}, {percent} %, {model.tokens_per_parameter} tokens per parameter',
            of.of(model).continuing(shift),
            above=-FREE,
            below=FREE,
        )
        for shift, percent in RECOMMENDED.items()
        for model in TREND
        if model.d_model == 8 and model.tokens_per_parameter in (100, 400)
    ]


@claim('no paper separates it')
def c16(of: Evidence) -> list[Condition]:
    """What the mixture costs changes with the size of the model, at equal tokens per parameter."""
    sizes = {model.d_model: of.of(model) for model in TREND if model.tokens_per_parameter == 25} | {WIDTH: of}
    conditions = []
    for shift in RECOMMENDED:
        prices = {width: evidence.mixture(shift) for width, evidence in sizes.items()}
        conditions += [
            Condition(f'matched minus union, {shift}, d_model {width}', price) for width, price in prices.items()
        ]
        least, most = min(prices), max(prices)
        count = min(map(len, prices.values()))  # of the seeds of all
        difference = prices[most][:count] - prices[least][:count]
        conditions.append(Condition(f'the same, {shift}, d_model {most} minus {least}', difference))
    return conditions


@claim('divided')
def c17(of: Evidence) -> list[Condition]:
    """A point between parent and update has a lower mean loss than both."""
    conditions = []
    for shift in of.shifts:
        best, parent, update = of.best_within(shift, 0)
        off = best - np.minimum(parent, update)
        conditions.append(Condition(f'best point within minus the better end, {shift}, 0 %', off, below=0))
    return conditions


@claim('divided')
def c18(of: Evidence) -> list[Condition]:
    """At equal forgetting, the line from the parent to an update without replay learns otherwise than replay does."""
    conditions = []
    for shift, percent in RECOMMENDED.items():
        runs, new = of.shifts[shift]
        line = sorted(of.line(shift, 0).items())
        old, learned = (np.array([losses[which] for _, losses in line]) for which in (0, 1))
        # the last evaluation, as points of a line have no other
        replay = [runs.last(of.after(shift, percent), data) for data in ('python', new)]
        if not (np.diff(old, axis=0) > 0).all() or not ((old[0] <= replay[0]) & (replay[0] <= old[-1])).all():
            raise NotRun(f'a line under the {shift} shift on which each loss of old data is that of one point')
        at_equal = [np.interp(replay[0][seed], old[:, seed], learned[:, seed]) for seed in range(old.shape[1])]
        conditions.append(Condition(f'D1: line minus {percent} % replay, {shift}', np.array(at_equal) - replay[1]))
    return conditions


@claim('divided')
def c19(of: Evidence) -> list[Condition]:
    """A line on top of replay has a lower mean loss than replay alone."""
    conditions = []
    for shift, percent in RECOMMENDED.items():
        best, _, alone = of.best_within(shift, percent)
        conditions.append(Condition(f'best point within minus replay, {shift}, {percent} %', best - alone, below=0))
    return conditions


@claim('')
def c20(of: Evidence) -> list[Condition]:
    """A soup of three orders of the data has a lower mean loss than its best member."""
    conditions = []
    for shift, percent in RECOMMENDED.items():
        runs, new = of.shifts[shift]
        members = [of.after(shift, percent), f'{new}-order_2', f'{new}-order_3']
        # the last evaluation, as the soup has no other
        one, *others = ([runs.last(run, data) for data in ('python', new)] for run in members)
        best = np.min([np.mean(each, axis=0) for each in (one, *others)], axis=0)
        soup = of.mean_loss(shift, f'{of.after(shift, percent)}-soup')
        conditions.append(Condition(f'soup minus its best member, {shift}, {percent} %', soup - best, below=0))
    return conditions


@claim('')
def c21(of: Evidence) -> list[Condition]:
    """Whether documents of a row see each other changes neither forgetting nor adaptation."""
    conditions = []
    for shift, percent in RECOMMENDED.items():
        runs, new = of.shifts[shift]
        masked, plain = (
            runs.changes(name, 'python', new) for name in (f'{new}-masked_{percent}pct', of.after(shift, percent))
        )
        conditions += [
            Condition(f'{what}, masked minus not, {shift}, {percent} %', one - other, above=-EQUAL, below=EQUAL)
            for what, one, other in zip(('forgetting', 'adaptation'), masked, plain, strict=True)
        ]
    return conditions


@claim('')
def c22(of: Evidence) -> list[Condition]:
    """Replay of what the parent writes itself forgets less than none and more than true replay."""
    return [
        Condition(
            f'share of what true replay spares that samples spare, strong, {percent} %',
            of.kept_by_samples(percent),
            above=0,
            below=1,
        )
        for percent in SAMPLED
    ]


@claim('')
def c23(of: Evidence) -> list[Condition]:
    """At equal replayed tokens, replay late in a stage spares and costs more than throughout, and early less."""
    early, even, late = (
        (of.strong.final(name, 'python'), of.strong.final(name, 'cpp'))
        for name in ('cpp-early_25pct', 'cpp-replay_25pct', 'cpp-late_25pct')
    )
    return [
        Condition('D0: early minus even, strong, 25 %', early[0] - even[0], above=0),
        Condition('D0: even minus late, strong, 25 %', even[0] - late[0], above=0),
        Condition('D1: late minus even, strong, 25 %', late[1] - even[1], above=0),
        Condition('D1: even minus early, strong, 25 %', even[1] - early[1], above=0),
    ]


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
            of_seeds.append(window_loss(kept, last, count, SPACING) - window_loss(kept, last, 5, SPACING))
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
            kind: np.array([window_loss(kept, round(at * len(kept.batches)), 5, 2 * SPACING, kind) for kept in of.kept])
            for kind in ('uniform', 'linear', 'ema')
        }

    early, late = losses(0.15), losses(1.0)
    spread = {name: np.ptp(list(each.values()), axis=0) for name, each in (('early', early), ('late', late))}
    return [
        Condition('spread of SMA, WMA and EMA, early minus late', spread['early'] - spread['late'], above=0),
        Condition('SMA minus WMA, early', early['uniform'] - early['linear'], above=0),
        Condition('spread, late', spread['late'], below=EQUAL),
    ]
