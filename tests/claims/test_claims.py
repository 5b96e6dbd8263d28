# SPDX-License-Identifier: Apache-2.0
"""Claims are judged by intervals over seeds; what they ask for is what the sequences train."""

import shutil
from dataclasses import replace

import evidence
import numpy as np
import papers
import pytest
import results
import tiny
import training
from judge import Claim, Condition, Finding, judge
from tiny import ROOT, planned

from cpt_algorithms.files import write_json
from cpt_algorithms.report.run_records import read_runs
from cpt_algorithms.sequence.run import write_sequence
from cpt_algorithms.sequence.spec import SequenceSpec
from cpt_algorithms.stage.stage import Stage

SEEDS = (17, 18, 19)
for each in papers.FORETOLD:  # the world here is smaller
    each['tokens'] = 131072


def test_a_page_says_what_decided():
    good, bad = Condition('a', [1, 1.1, 0.9], above=0), Condition('b', [-1, -1.1, -0.9], above=0)
    claim = Claim('C0', 'says', 'paper', lambda evidence: [])
    findings = [Finding(claim, [good, bad]), Finding(claim, [], 'cpp-s17 in runs')]
    lines = results.page(findings, [], 'made here').splitlines()
    assert '| C0 says | paper | cpp-s17 in runs | not run |' in lines
    assert '| C0 says | paper | b: -1.000 ± 0.248 | not reproduced |' in lines
    assert '| C0 | a | > 0 | +1.000 ± 0.248 |' in lines
    assert '| C0 | b | > 0 | -1.000 ± 0.248 (not reproduced) |' in lines


# A world of made-up losses, in the folders that the sequences would make


def constant_run(average, share):
    """An average that is worse at first, and then gains."""
    gain = {'': 0.0, 'lawa': 0.12, papers.PAPERS_EMA: 0.05}.get(average, 0.121)
    return 4 - 0.5 * share - (gain if share > 0.1 else -0.1)


def spiking(average, share):
    return constant_run(average, share) + (0.625 <= share < 0.66) * (1.0 if not average else 0.2)


def cosine(average, share):
    return 4 - share - (0.1 * (1 - share) if average else 0.0)


AVERAGING = {
    'python-constant': constant_run,
    'python-constant-anneal': lambda average, share: 2.87,
    'python-constant-merge': lambda average, share: 2.88,
    'python-constant_a_tenth': lambda average, share: 5 - share - (0.01 if average else 0.0),
    'python-cosine_to_zero': cosine,
    'python-spike': spiking,
}


def foretold(run):
    return next(tuple(each['value'] for each in arm['losses'].values()) for arm in papers.FORETOLD if arm['run'] == run)


# (D0, D1, the highest loss on D0 in the beginning), or of points of a line (D0, D1)
WEAK = {
    'python': (3.0, 3.8, 3.0),
    'stdlib-replay_0pct': (3.3, 3.0, 3.5),
    'stdlib-replay_0pct-line': {0: (3.0, 3.8), 0.25: (3.01, 3.4), 0.5: (3.04, 3.01), 0.75: (3.1, 3.0), 1: (3.3, 3.0)},
    'stdlib-replay_5pct-line': {0: (3.0, 3.8), 0.5: (3.01, 3.01), 1: (3.05, 3.008)},
    'stdlib-replay_5pct-soup': (3.0, 3.0, 3.0),
    'stdlib-order_2': (3.05, 3.01, 3.5),
    'stdlib-order_3': (3.06, 3.008, 3.5),
    'stdlib-masked_5pct': (3.05, 3.008, 3.5),
    'stdlib-replay_20pct': (*foretold('stdlib-replay_20pct'), 3.5),
    'stdlib-replay_1pct': (3.12, 3.004, 3.5),
    'stdlib-replay_5pct': (3.05, 3.008, 3.5),
    'stdlib-replay_10pct': (3.02, 3.012, 3.5),
    'stdlib-replay_50pct': (2.9, 3.05, 3.5),
    'from_scratch_stdlib-from_scratch': (3.6, 3.1, 3.6),
    'union_stdlib': (2.99, 3.04, 3.0),
    'matched_stdlib': (3.04, 3.02, 3.04),
}
STRONG = {
    'python': (3.0, 6.0, 3.0),
    'cpp-replay_0pct': (4.2, 2.0, 4.3),
    'cpp-replay_0pct-line': {0: (3.0, 6.0), 0.5: (3.05, 2.5), 1: (4.2, 2.0)},
    'cpp-replay_25pct-line': {0: (3.0, 6.0), 0.75: (3.01, 2.04), 1: (3.05, 2.04)},
    'cpp-replay_25pct-soup': (3.0, 2.0, 3.0),
    'cpp-order_2': (3.05, 2.05, 4.3),
    'cpp-order_3': (3.06, 2.04, 4.3),
    'cpp-early_25pct': (3.1, 2.03, 4.3),
    'cpp-late_25pct': (3.0, 2.05, 4.3),
    'cpp-masked_25pct': (3.05, 2.04, 4.3),
    'cpp-replay_15pct': (*foretold('cpp-replay_15pct'), 4.3),
    'cpp-wsd_25pct': (*foretold('cpp-wsd_25pct'), 4.3),
    'cpp-replay_1pct': (3.5, 2.004, 4.3),
    'cpp-replay_5pct': (3.3, 2.01, 4.3),
    'cpp-replay_10pct': (3.2, 2.02, 4.3),
    'cpp-replay_25pct': (3.05, 2.04, 4.3),
    'cpp-replay_50pct': (2.9, 2.1, 4.3),
    'cpp-constant_eta_min': (3.6, 2.5, 3.6),
    'cpp-constant_eta_max': (4.4, 2.2, 4.5),
    'cpp-half_eta_max': (4.0, 2.1, 4.1),
    'cpp-double_eta_max': (4.4, 1.9, 4.6),
    'cpp-warm_up_0pct': (4.203, 2.0, 4.3),
    'cpp-warm_up_0.5pct': (4.2, 2.0, 4.3),
    'cpp-warm_up_2pct': (4.198, 2.0, 4.3),
    'cpp-same_data': (2.9, 6.0, 3.1),
    'cpp-same_data_double_eta_max': (2.9, 6.0, 3.2),
    'from_scratch_cpp-from_scratch': (6.0, 2.3, 6.0),
    'union_cpp': (3.0, 2.1, 3.0),
    'matched_cpp': (3.06, 2.03, 3.06),
}
INFINITE = {
    'split_1': (3.0, 3.0, 3.0),
    'split_2': (2.9, 2.9, 3.2),
    'split_3': (2.8, 2.8, 3.1),
    'split_1-infinite': (3.1, 3.1, 3.1),
    'split_2-infinite': (3.0, 3.0, 3.11),
    'split_3-infinite': (2.9, 2.9, 3.01),
    'split_1-infinite-anneal': (3.0, 3.0, 3.0),
    'split_2-infinite-anneal': (2.9, 2.9, 2.9),
    'split_3-infinite-anneal': (2.8, 2.8, 2.8),
}


class Kept:
    """A trajectory along which spans of about twenty checkpoints are best, and linear weights early."""

    batches = list(range(1, 257))
    best, linear = 20, 1

    def __init__(self, seed):
        self.seed = seed

    def loss(self, weights):
        span = max(weights) - min(weights) + 1
        early = 1 / max(weights)
        newest = weights[max(weights)]
        swa = 0.2 if len(weights) > 20 else 0.0
        return (
            3 - 0.1 * np.exp(-(np.log(span / self.best) ** 2)) + swa - self.linear * early * newest + 1e-3 * self.seed
        )


class BestAtOnce(Kept):
    best = 1


class UniformFirst(Kept):
    linear = -1


@pytest.fixture(scope='module')
def plans():
    """Of each sequence: its YAML and runs."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for name in training.SEQUENCES:
            overrides = [f'variables.{key}={value}' for key, value in training.stage_times(name, 131072).items()]
            found[name] = planned(f'yamls/claims/{name}.yaml', *overrides)
    return found


SAMPLED = {'cpp-sampled_5pct': (3.7, 2.01, 4.3), 'cpp-sampled_25pct': (3.3, 2.04, 4.3)}
TABLES = dict(zip(training.SEQUENCES, (WEAK, STRONG, INFINITE, AVERAGING), strict=True))


def kind_of(run):
    return run.name.removesuffix(f'-s{run.seed}')


@pytest.fixture(scope='module')
def true_world(tmp_path_factory, plans):
    """All claims hold in it, with models of any size."""
    folder = tmp_path_factory.mktemp('worlds') / 'one'
    folder.mkdir()
    for model in training.TREND:
        (folder.parent / model.name).symlink_to(folder)
    for name, (spec, runs) in plans.items():
        write_sequence(SequenceSpec.from_yaml({**spec.given, 'folder': str(folder / name)}), runs)
        assert {kind_of(each) for each in runs} == set(TABLES[name])
        for each in runs:
            write(folder / name / each.name, list(spec.data), TABLES[name][kind_of(each)], each)
    write_sampled(folder, plans, SAMPLED)
    return folder


def write_sampled(folder, plans, tables):
    spec, runs = plans['strong_shift']
    for kind, made_up in tables.items():
        for each in (run for run in runs if kind_of(run) == kind.replace('sampled', 'replay')):
            name = f'{kind}-s{each.seed}'
            config = {**each.stage.to_train_yaml(), 'run_name': name, 'save_folder': str(folder / 'sampled' / name)}
            run = replace(each, name=name, stage=Stage.from_yaml(config))
            write(folder / 'sampled' / name, list(spec.data), made_up, run)


@pytest.fixture
def world(true_world, plans, monkeypatch):
    """The same, but for what a changed run shows."""
    changed = []

    def make(run='', losses=None, kept=Kept):
        for name, (spec, runs) in plans.items():
            for each in runs:
                if f'{name}/{kind_of(each)}' == run:
                    write(folder := true_world / name / each.name, list(spec.data), losses, each)
                    changed.append((folder, list(spec.data), TABLES[name][kind_of(each)], each))
        assert len(changed) == (len(SEEDS) if run else 0)
        monkeypatch.setattr(evidence.Evidence, 'kept', [kept(seed) for seed in SEEDS])
        return evidence.Evidence(true_world)

    yield make
    for each in changed:
        write(*each)


def write(folder, data, made_up, run):
    shares = np.arange(1, 129) / 128
    losses, final = {}, {}
    averages = ('', 'lawa', *papers.EMAS, papers.PAPERS_EMA) if callable(made_up) else ('',)
    for average in () if isinstance(made_up, dict) else averages:
        for index, dataset in enumerate(data):
            label = f'{dataset}/{average}' if average else dataset
            if callable(made_up):
                curve = [made_up(average, share) for share in shares]
            else:
                end = made_up[0] if len(data) == 3 else made_up[index]
                curve = [made_up[2] if share < 0.1 else end for share in shares]
            noise = 1e-4 * (run.seed - 18)
            losses[label] = [[128 * share, 0, loss + noise] for share, loss in zip(shares, curve, strict=True)]
            final[label] = {'mean': losses[label][-1][2]}
    if isinstance(made_up, dict):
        losses = {
            f'{dataset}/alpha_{alpha:g}': [[0, 0, point[index] + 1e-4 * (run.seed - 18)]]
            for alpha, point in made_up.items()
            for index, dataset in enumerate(data)
        }
        final = {label: {'mean': rows[-1][2]} for label, rows in losses.items()}
    write_json(folder / 'stage.json', {'run_name': run.name, 'config': run.stage.to_train_yaml()})
    if run.stage.callbacks.forgetting and run.stage.load_path:
        parent = {'python': 3.0, 'stdlib': 3.8, 'cpp': 6.0}
        labels = {'old': data[:1], 'new': data[1:], 'bytes_per_token': dict.fromkeys(data, 3.0)}
        write_json(folder / 'forgetting.json', {**labels, 'parent': {name: parent.get(name, 3.0) for name in data}})
    write_json(folder / 'losses.json', {'losses': losses, 'final': final, 'cost': {'parameters': 1}})
    write_json(
        folder / 'done.json', {'batch': run.stage.batches, 'time': {}, 'max_duration': str(run.stage.max_duration)}
    )


def test_every_claim_is_reproduced_where_it_holds(world):
    found = judge(papers.CLAIMS, world())
    names = [*(f'C{i}' for i in (*range(1, 12), *range(14, 24))), *(f'W{i}' for i in range(1, 11))]
    assert [finding.claim.name for finding in found] == names
    others = {finding.claim.name: finding for finding in found if finding.verdict != 'reproduced'}
    assert {name: finding.verdict for name, finding in others.items()} == {'C16': 'measured', 'C18': 'measured'}
    prices = [float(np.mean(condition.values)) for condition in others['C16'].conditions]
    weak, strong = (3.04 + 3.02 - 2.99 - 3.04) / 2, (3.06 + 2.03 - 3.0 - 2.1) / 2
    assert prices == pytest.approx([weak, weak, weak, 0, strong, strong, strong, 0])
    # where the line has forgotten as much: at 3.05 it is a sixth of the way from 3.04 to 3.1
    at_equal = [float(np.mean(condition.values)) for condition in others['C18'].conditions]
    assert at_equal == pytest.approx([3.01 - 0.01 / 6 - 3.008, 2.5 - 2.04], abs=1e-3)


def test_windows_of_real_checkpoints(data, tmp_path, monkeypatch):
    more = {'eval_loader': [tiny.eval_loader('new', data['new'])], 'save_num_checkpoints_to_keep': -1}
    tiny.recipe_here(tiny.config(tmp_path, data, 'run', callbacks={'final_loss': {}}, **more), tmp_path)
    real = evidence.Evidence(tmp_path / 'nowhere')
    runs = read_runs([tmp_path / 'run'])
    monkeypatch.setattr(real.averaging, 'named', lambda name: runs.given)
    assert real.kept[0].batches == [2, 4, 6, 8]
    losses = [evidence.window_loss(real.kept[0], end, 1, 1) for end in (2, 3, 4)]
    assert all(4 < loss < 8 for loss in losses)
    assert evidence.window_loss(real.kept[0], 4, 4, 1) not in losses


def worse(average, share):
    return constant_run('', share) + (0.05 if average else 0)


FALSE = {
    'C1': ('weak_shift/stdlib-replay_0pct', (2.9, 3.0, 3.5)),
    'C2': ('strong_shift/cpp-replay_1pct', (4.0, 2.004, 4.3)),
    'C3': ('strong_shift/cpp-replay_10pct', (3.2, 2.04, 4.3)),
    'C4': ('weak_shift/stdlib-replay_10pct', (3.2, 3.012, 3.5)),
    'C5': ('strong_shift/union_cpp', (2.9, 2.05, 3.0)),
    'C6': ('strong_shift/from_scratch_cpp-from_scratch', (6.0, 1.9, 6.0)),
    'C7': ('strong_shift/cpp-constant_eta_min', (3.6, 1.9, 3.6)),
    'C8': ('strong_shift/cpp-half_eta_max', (4.3, 2.1, 4.1)),
    'C9': ('strong_shift/cpp-warm_up_2pct', (4.3, 2.0, 4.3)),
    'C10': ('strong_shift/cpp-same_data', (2.9, 6.0, 2.99)),
    'C11': ('infinite/split_3-infinite-anneal', (2.9, 2.9, 2.9)),
    'C14': ('strong_shift/cpp-wsd_25pct', (3.9, 1.9, 4.3)),
    'C17': ('weak_shift/stdlib-replay_0pct-line', {0: (3.0, 3.8), 0.5: (3.4, 3.6), 1: (3.3, 3.0)}),
    'C19': ('strong_shift/cpp-replay_25pct-line', {0: (3.0, 6.0), 0.5: (3.4, 3.6), 1: (3.05, 2.04)}),
    'C20': ('strong_shift/cpp-replay_25pct-soup', (3.1, 2.1, 3.1)),
    'C21': ('weak_shift/stdlib-masked_5pct', (3.15, 3.008, 3.5)),
    'C23': ('strong_shift/cpp-late_25pct', (3.2, 2.05, 4.3)),
    'C15': ('strong_shift/matched_cpp', (3.2, 2.03, 3.2)),
    'W1': ('averaging/python-constant', worse),
    'W2': ('averaging/python-constant_a_tenth', lambda average, share: 5 - share - (0.5 if average else 0)),
    'W4': ('averaging/python-constant', lambda average, share: 4 - share - (0.05 if average else 0)),
    'W5': ('averaging/python-constant', lambda average, share: constant_run(average.replace('lawa', 'ema'), share) - 0.1 * (average == papers.PAPERS_EMA)),
    'W6': ('averaging/python-cosine_to_zero', lambda average, share: 4 - share - (0.1 * share if average else 0)),
    'W7': ('averaging/python-spike', lambda average, share: constant_run('', share) + (0.625 <= share < 0.66) * (1.5 if average else 1)),
    'W8': ('averaging/python-constant', worse),
    'W9': ('averaging/python-constant-merge', lambda average, share: 2.95),
}  # fmt: skip
KEPT = {'W3': BestAtOnce, 'W10': UniformFirst}


@pytest.mark.parametrize('name', [*FALSE, *KEPT])
def test_a_claim_is_not_reproduced_where_it_does_not_hold(name, world):
    made_up = world(*FALSE.get(name, ()), kept=KEPT.get(name, Kept))
    (found,) = judge([claim for claim in papers.CLAIMS if claim.name == name], made_up)
    assert found.verdict in ('not reproduced', *(['inconclusive at this scale'] if name in KEPT else []))


@pytest.mark.parametrize('losses', [(2.9, 2.01, 4.3), (4.5, 2.01, 4.3)], ids=['better than true', 'worse than none'])
def test_samples_that_are_not_between_are_seen(losses, world, true_world, plans):
    write_sampled(true_world, plans, {'cpp-sampled_5pct': losses})
    try:
        (found,) = judge([claim for claim in papers.CLAIMS if claim.name == 'C22'], world())
        assert found.verdict == 'not reproduced'
    finally:
        write_sampled(true_world, plans, SAMPLED)


def test_a_run_that_is_missing_or_unfinished_is_named(world, true_world, tmp_path):
    assert world().strong.seeds == list(SEEDS)
    folder = tmp_path / 'world'
    shutil.copytree(true_world / 'strong_shift', folder / 'strong_shift')
    (folder / 'strong_shift' / 'cpp-same_data-s18' / 'done.json').unlink()
    found = {finding.claim.name: finding for finding in judge(papers.CLAIMS, evidence.Evidence(folder))}
    assert found['C10'].verdict == 'not run'
    assert 'cpp-same_data-s18' in found['C10'].missing
    assert found['C7'].verdict == 'reproduced'
    assert found['C22'].verdict == 'not run' and 'cpp-sampled_5pct-s17' in found['C22'].missing
    (folder / 'strong_shift' / 'cpp-masked_25pct-s17' / 'forgetting.json').unlink()
    shutil.copytree(true_world / 'weak_shift', folder / 'weak_shift')
    found = {finding.claim.name: finding for finding in judge(papers.CLAIMS, evidence.Evidence(folder))}
    assert found['C21'].missing == 'the losses of the parent of cpp-masked_25pct in world/strong_shift'


def test_the_trend_with_tokens_and_size(world, tmp_path, monkeypatch):
    small, large, long = world(), world(), world()
    nothing_yet = evidence.Evidence(tmp_path / 'nowhere')
    monkeypatch.setattr(large, 'parameters', lambda shift: 2)
    monkeypatch.setattr(long, 'tokens', lambda shift: 8000)
    points = results.trend([large, long, small, nothing_yet])
    labels = ('weak shift, 5 % replay', 'strong shift, 25 % replay')
    places = ((1, 8000), (1, 131072), (2, 131072))
    assert [(each.label, each.parameters, each.tokens) for each in points] == [
        (label, *place) for label in labels for place in places
    ]
    gaps = [np.mean(gap.values) for gap in points[0].gaps.values()]
    union, matched, update = 2.99 + 3.04, 3.04 + 3.02, 3.05 + 3.008
    assert gaps == pytest.approx([(update - union) / 2, (matched - union) / 2, (update - matched) / 2])
    lines = results.page([], points, 'made here').splitlines()
    assert (
        '| strong shift, 25 % replay | 1 | 8,000 | 8000 | -0.005 ± 0.000 | -0.005 ± 0.000 | +0.000 ± 0.000 |' in lines
    )
    results.draw(points, tmp_path / 'claims.png')
    assert (tmp_path / 'claims.png').stat().st_size > 10_000
