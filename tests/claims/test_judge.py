# SPDX-License-Identifier: Apache-2.0
"""The judge of claims, on verdicts and runs small enough to work out by hand."""

import numpy as np
import pytest
from run_folders import write_run

from cpt_algorithms.files import write_json
from scripts.claims.judge import Claim, Condition, Finding, NotRun, Runs, judge

# Of one seed: [batch, token, loss]; the average is also evaluated at batch 6, and not at 0.
RAW = [[0, 0, 3.0], [2, 8, 5.0], [4, 16, 4.0], [8, 32, 6.0]]
EMA = [[2, 8, 5.5], [4, 16, 3.5], [6, 24, 1.0], [8, 32, 5.75]]


def write(folder, seeds=(2, 1), finished=(1, 2)):
    tokens = {'tokens': {'new': 32}, 'tokens_before_branch': {}, 'batches': 8, 'judged_by': {}}
    planned = {'arm': 'a', 'stage': 'x', 'parent': None, 'plan': 'p', **tokens}
    runs = [{**planned, 'name': f'a-s{seed}', 'seed': seed} for seed in seeds]
    plan = {'plan': 'p', 'plans': {'p': {'tokens': {}}}}
    write_json(folder / 'sequence.json', {'name': 'q', 'data': ['d', 'e'], **plan, 'runs': runs})
    for seed in seeds:
        run = folder / f'a-s{seed}'
        losses = {'d': RAW, 'd/ema': EMA, 'e': [[8, 32, 1.0]]}
        losses = {label: [[*at, loss + seed] for *at, loss in rows] for label, rows in losses.items()}
        final = {'d': {'mean': 10.0 + seed}, 'd/ema': {'mean': 8.0 * seed}, 'e': {'mean': 2.0}}
        write_json(run / 'losses.json', {'losses': losses, 'final': final})
        if seed in finished:
            write_json(run / 'done.json', {'batch': 8, 'time': {'ba': 8}, 'max_duration': '8ba'})
    return Runs(folder)


def test_runs_are_given_seed_by_seed(tmp_path):
    runs = write(tmp_path)
    assert runs.seeds == [1, 2]
    assert [run.name for run in runs.named('a')] == ['a-s1', 'a-s2']
    assert runs.final('a', 'd').tolist() == [11, 12]
    assert runs.final('a', 'd', 'ema').tolist() == [8, 16]
    assert runs.mean_final('a', ['d', 'e']).tolist() == [6.5, 7.0]
    assert runs.last('a', 'd').tolist() == [7, 8]
    first, second = runs.curves('a', 'd', 'ema')
    assert first.tolist() == [[0.25, 6.5], [0.5, 4.5], [0.75, 2.0], [1.0, 6.75]], 'over the share of the run'
    assert second[:, 1].tolist() == [7.5, 5.5, 3.0, 7.75]


def test_runs_of_no_sequence_are_those_of_the_folder(tmp_path):
    for seed in (1, 2):
        start = {'old': 3.0 + seed, 'new': 5.0}
        write_run(tmp_path / f'a-s{seed}', {'old': 4.5, 'new': 4.0}, parent='parent', start=start)
    (tmp_path / 'notes').mkdir()
    runs = Runs(tmp_path)
    assert runs.seeds == [1, 2] and runs.final('a', 'old').tolist() == [4.5, 4.5]
    forgotten, learned = runs.changes('a', 'old', 'new')
    assert forgotten.tolist() == [0.5, -0.5] and learned.tolist() == [1.0, 1.0]
    with pytest.raises(NotRun, match=f'^the losses of the parent of a in {tmp_path.parent.name}/{tmp_path.name}$'):
        runs.changes('a', 'older', 'new')
    assert Runs(tmp_path, [2]).final('a', 'new').tolist() == [4.0]
    with pytest.raises(NotRun, match='^a-s3 in '):
        Runs(tmp_path, [2, 3]).named('a')


def test_gain_and_rise_by_hand(tmp_path):
    runs = write(tmp_path)
    # raw minus average: -0.5 at 0.25, 0.5 at 0.5, 0.25 at 1
    for begin, end, gain in ((0.25, 0.5, 0.0), (0.26, 1.0, 0.375), (0.6, 1.0, 0.25)):
        assert runs.gain('a', 'd', 'ema', begin, end).tolist() == [gain, gain]
    for until, rise in ((0.25, [5.0, 4.0]), (0.2, [3.0, 2.0]), (1.0, [6.0, 5.0])):
        assert runs.rise('a', 'd', np.array([1.0, 3.0]), until).tolist() == rise


def test_what_was_not_run_is_named(tmp_path):
    runs = write(tmp_path, seeds=(1, 2, 3), finished=(2,))
    with pytest.raises(NotRun) as error:
        runs.named('a')
    assert str(error.value) == f'a-s1, a-s3 in {tmp_path.parent.name}/{tmp_path.name}'
    with pytest.raises(NotRun, match='^b-s1, b-s2, b-s3 in '):
        runs.named('b')
    nothing = Runs(tmp_path / 'nowhere')
    assert nothing.seeds == []
    with pytest.raises(NotRun, match='^a in .*nowhere$'):
        nothing.named('a')


# Of [0.1, 0.2, 0.3] the mean is 0.2, the half-width 4.303 x 0.1 / sqrt(3) = 0.248: the interval is -0.048 to 0.448
SPREAD, ALIKE = [0.1, 0.2, 0.3], [1, 1, 1]


@pytest.mark.parametrize(
    ('values', 'above', 'below', 'verdict'),
    [
        (SPREAD, -0.05, np.inf, 'reproduced'),
        (SPREAD, -0.04, np.inf, 'inconclusive at this scale'),
        (SPREAD, 0.44, np.inf, 'inconclusive at this scale'),
        (SPREAD, 0.45, np.inf, 'not reproduced'),
        (SPREAD, -np.inf, 0.45, 'reproduced'),
        (SPREAD, -np.inf, 0.44, 'inconclusive at this scale'),
        (SPREAD, -np.inf, -0.05, 'not reproduced'),
        (SPREAD, -0.05, 0.45, 'reproduced'),
        (SPREAD, 0.0, 0.45, 'inconclusive at this scale'),
        # an interval of no width; the bound itself is outside
        (ALIKE, 0.5, np.inf, 'reproduced'),
        (ALIKE, 0.5, 1.5, 'reproduced'),
        (ALIKE, 1, np.inf, 'not reproduced'),
        (ALIKE, -np.inf, 1, 'not reproduced'),
        (ALIKE, -np.inf, 1.5, 'reproduced'),
        ([5.0], 0, np.inf, 'inconclusive at this scale'),
        (SPREAD, -np.inf, np.inf, 'measured'),
    ],
)
def test_a_condition_is_judged_by_its_whole_interval(values, above, below, verdict):
    assert Condition('', values, above, below).verdict == verdict


def test_bounds_and_interval():
    assert Condition('', SPREAD).over_seeds.half == pytest.approx(0.2484, abs=1e-4)
    assert [Condition('', [], *at).bounds for at in ((0.5,), (0.5, 1.5), (-np.inf, 1), ())] == [
        '> 0.5',
        '0.5 to 1.5',
        '< 1',
        '',
    ]


def test_a_claim_is_as_good_as_its_worst_condition():
    good, bad = Condition('', [1, 1, 1], above=0), Condition('', [-1, -1, -1], above=0)
    open_, measured = Condition('', [1, -1, 0], above=0), Condition('', [1, -1, 0])
    claim = Claim('C0', 'says', 'paper', lambda evidence: [])

    def verdict(*conditions):
        return Finding(claim, list(conditions)).verdict

    assert verdict(good, good) == 'reproduced'
    assert verdict(good, open_) == 'inconclusive at this scale'
    assert verdict(open_, bad, good) == 'not reproduced'
    assert verdict(measured, good) == 'measured'
    assert verdict(measured, bad) == 'not reproduced'


def test_every_claim_has_a_finding():
    def missing(evidence):
        raise NotRun(f'nothing in {evidence}')

    passing = Claim('C1', '', '', lambda evidence: [Condition(evidence, [2, 2], above=1)])
    claims = [passing, Claim('C2', '', '', missing)]
    run, not_run = judge(claims, 'runs')
    assert (run.claim, run.conditions[0].what, run.missing, run.verdict) == (claims[0], 'runs', '', 'reproduced')
    assert not_run == Finding(claims[1], [], 'nothing in runs')
    assert not_run.verdict == 'not run'
