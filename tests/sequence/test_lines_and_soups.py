# SPDX-License-Identifier: Apache-2.0
"""Lines from parent to child and soups: real models, made, judged, exported and reported."""

import json

import pretrained
import pytest
import tiny
import torch
from safetensors.torch import load_file

from cpt_algorithms.checkpoints.open import safe_globals
from cpt_algorithms.report.page import write_report
from cpt_algorithms.report.run_records import read_runs
from cpt_algorithms.report.tables import rows_of
from cpt_algorithms.sequence.branches import merge_of
from cpt_algorithms.sequence.check import check
from cpt_algorithms.sequence.expand import expand
from cpt_algorithms.sequence.merge import merge_stage
from cpt_algorithms.sequence.run import write_sequence
from cpt_algorithms.sequence.spec import SequenceSpec

LINE = [0, 0.5, 1]
ORDERS = {
    'first': {'new': {'branches': {'line': {'line': LINE}, 'soup': {'soup': ['second']}}}},
    'second': {'new': {'train_loader': {'dataset': {'shuffle_seed': 5}}}},
}


def weights(path):
    with torch.serialization.safe_globals(safe_globals()):
        return torch.load(path, weights_only=True)['state']['model']


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def spec(data, tmp_path):
    common = tiny.sequence_common(tmp_path, data, optimizer={'lr': 1e-2})
    return tiny.sequence_spec(tmp_path, data, '8ba', common=common, arms=ORDERS, name='made')


def train(spec, folder):
    """All runs of a sequence in this process, as its loop would one after another; by name."""
    read = SequenceSpec.from_yaml(spec)
    runs = expand(read)
    check(runs, 1)
    write_sequence(read, runs)
    for run in runs:
        if run.stage.merge:
            merge_stage(run.stage)
        else:
            tiny.recipe_here(run.stage.to_train_yaml(), folder)
    return {run.name: run.folder for run in runs}


def test_a_line_and_a_soup_of_two_orders(spec, data, tmp_path, capsys):
    folders = train(spec, tmp_path)
    parent, child, other = (
        weights(folders[name] / 'latest-rank0.pt') for name in ('old-s17', 'new-first-s17', 'new-second-s17')
    )
    assert not same(child, other)
    soup = weights(folders['new-first-soup-s17'] / 'merged.pt')
    for name, tensor in soup.items():
        torch.testing.assert_close(tensor, (child[name] + other[name]) / 2, rtol=1e-6, atol=1e-7)

    line = folders['new-first-line-s17']
    measured = json.loads((line / 'losses.json').read_text())
    points = {name: rows for name, rows in measured['losses'].items() if '/' in name}
    assert set(points) == {f'{data}/alpha_{a:g}' for data in ('old', 'new') for a in LINE}
    means = {a: sum(points[f'{data}/alpha_{a:g}'][0][2] for data in ('old', 'new')) / 2 for a in LINE}
    best = measured['alpha']
    assert means[best] == min(means.values())
    assert measured['losses']['old'] == points[f'old/alpha_{best:g}']
    started = json.loads((line / 'forgetting.json').read_text())['parent']
    assert {data: points[f'{data}/alpha_0'][0][2] for data in started} == started, 'the untouched parent, bit by bit'
    ended = json.loads((folders['new-first-s17'] / 'losses.json').read_text())['losses']
    assert points['new/alpha_1'][0][2] == ended['new'][-1][2]
    made, exported = weights(line / 'merged.pt'), load_file(line / 'huggingface' / 'ba8' / 'model.safetensors')
    assert same(made, {0: parent, 1: child}.get(best, made))
    assert all(torch.equal(tensor, made[f'model.{name}']) for name, tensor in exported.items())
    assert not list(line.glob('points/*/model*')) and [path.name for path in (line / 'huggingface').iterdir()] == [
        'ba8'
    ]

    study = read_runs([tmp_path / 'runs'])
    rows = {row.name: row for row in rows_of(study)}
    of_line = rows[f'first, line at {best:g}']
    assert rows['first, line, alpha_0'].columns['forgetting'].mean == 0
    assert of_line.columns['loss mean'].mean == pytest.approx(means[best])
    assert rows['first, soup'].columns['new tokens'].mean == 2 * 8 * tiny.TOKENS_PER_BATCH, 'it has two to pay for'
    report = write_report([tmp_path / 'runs'], tmp_path / 'report')
    page = report.path.read_text()
    assert 'Between parent and child' in page and page.count('first, line, alpha_0.5') == 1
    assert 'alpha_' not in report.findings[0]

    # what is there is not made again, and another line is refused
    before = (line / 'losses.json').stat().st_mtime_ns
    capsys.readouterr()
    train(spec, tmp_path)
    assert 'new-first-line-s17: finished already' in capsys.readouterr().out
    assert (line / 'losses.json').stat().st_mtime_ns == before
    spec['arms'] = {**ORDERS, 'first': {'new': {'branches': {'line': {'line': [0.25]}}}}}
    with pytest.raises(ValueError, match=r'new-first-line-s17: .*merge\.line'):
        train(spec, tmp_path)

    # the same by hand
    stage = merge_of(f'{folders["new-first-s17"]}/latest-rank0.pt', ['line=[0,0.5,1]', f'save_folder={tmp_path}/hand'])
    merge_stage(stage)
    by_hand = json.loads((tmp_path / 'hand' / 'losses.json').read_text())
    assert (by_hand['losses'], by_hand['alpha']) == (measured['losses'], best)
    assert same(weights(tmp_path / 'hand' / 'merged.pt'), made)


def test_a_line_from_a_published_model_in_another_precision(data, tmp_path):
    base = pretrained.make('tied_llama', tmp_path, data['tokenizer'], torch.bfloat16)
    cfg = pretrained.stage(tmp_path, data, 'update', base, max_duration='6ba', callbacks={'ema': None, 'lawa': None})
    tiny.recipe_here(cfg, tmp_path)
    merge_stage(merge_of(str(tmp_path / 'update' / 'latest-rank0.pt'), ['line=[0,0.5,1]']))
    measured = json.loads((tmp_path / 'update-line' / 'losses.json').read_text())
    started = json.loads((tmp_path / 'update-line' / 'forgetting.json').read_text())['parent']
    assert {name: measured['losses'][f'{name}/alpha_0'][0][2] for name in started} == pytest.approx(started, abs=2e-3)
    made = load_file(tmp_path / 'update-line' / 'huggingface' / 'ba6' / 'model.safetensors')
    assert {tensor.dtype for tensor in made.values()} == {torch.float32}, 'as the child'


@pytest.mark.parametrize(
    ('arms', 'message'),
    [
        ({'a': {'old': {'branches': {'x': {'line': [0, 1]}}}}}, r'stages\.old\.branches\.x, .* trained from scratch'),
        ({'a': {'new': {'branches': {'x': {'line': []}}}}}, r'branches\.x\.line'),
        ({'a': {'new': {'branches': {'x': {'line': [0], 'alpha_f': 0.1}}}}}, r'branches\.x\.alpha_f is not a key'),
        ({'a': {'new': {'branches': {'x': {'soup': ['b']}}}}}, r"soup: no arm with this stage is called 'b'"),
        ({'a': {'new': {'branches': {'x': {'soup': ['a']}}}}}, r"soup: 'a' is the same run as another one"),
        ({'a': {'new': {'branches': {'x': {'soup': 'seeds'}}}}}, r'soup=seeds: there is one seed, 17'),
    ],
)
def test_what_cannot_be_made_is_named(spec, arms, message):
    with pytest.raises(ValueError, match=message):
        tiny.runs_of({**spec, 'arms': arms})


def test_a_soup_of_seeds_is_one_run_that_waits_for_all(spec):
    spec = {**spec, 'seeds': [1, 2, 3], 'arms': {'a': {'new': {'branches': {'soup': {'soup': 'seeds'}}}}}}
    soups = [run for run in tiny.runs_of(spec) if run.stage.merge]
    assert [run.name for run in soups] == ['new-a-soup-s1']
    assert soups[0].needs == ['new-a-s1', 'new-a-s2', 'new-a-s3']
    assert soups[0].stage.merged[-1].endswith('new-a-s1/latest-rank0.pt')


def test_by_hand_what_is_wrong_is_named(data, tmp_path):
    tiny.recipe_here(tiny.config(tmp_path, data, 'stage'), tmp_path)
    for words, message in (
        ([], r'one of line=\[0,0.5,1\], soup'),
        (['line=[0,1]'], r'line: it was trained from scratch'),
        (['last=3', 'every=2ba', 'soup=[x]'], r'soup does not go with last'),
        (['line=[0,1]', 'weights=ema'], r'weights does not go with line'),
        (['line=[0,1]', 'save_folder=s3://bucket/line'], r'save_folder=s3://bucket/line: .* of this machine'),
        (['last=3'], r'last needs every'),
        (['lin=[0,1]'], "did you mean 'line'"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_of(str(tmp_path / 'stage' / 'latest-rank0.pt'), words)
