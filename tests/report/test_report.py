# SPDX-License-Identifier: Apache-2.0
"""The report, from run folders written here, against numbers one can work out by hand."""

import csv
import html.parser
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from math import log, nan, sqrt
from pathlib import Path

import plot_averages
import pytest
import report as script
from rich.console import Console
from run_folders import PARAMETERS, change, entry, read, write, write_plan, write_run, write_sequence

from cpt_algorithms.report import plots
from cpt_algorithms.report.page import rich_table, write_report
from cpt_algorithms.report.plots import plots_of
from cpt_algorithms.report.run_records import read_runs
from cpt_algorithms.report.tables import contenders, finding, missing, over_seeds, rows_of, scores_of

PATH = Path(__file__).parents[2]


@pytest.fixture
def no_plots(monkeypatch):
    """They take most of the time."""
    monkeypatch.setattr('cpt_algorithms.report.page.plots_of', lambda study, rows: [])


@pytest.fixture
def tiny(tmp_path):
    """One seed."""
    return write_sequence(tmp_path / 'tiny', seeds=(1,))


@pytest.fixture
def alone(tmp_path):
    """A run whose parent is not there."""
    write_run(tmp_path / 'new-s1', {'old': 3.5, 'new': 1.0}, 's3://bucket/base/latest-rank0.pt')
    return tmp_path / 'new-s1'


def rows(*folders):
    return {row.name: row for row in rows_of(read_runs(folders))}


def said_of(name, *folders):
    """What is missing of one run."""
    study = read_runs(folders)
    return [line for line in missing(study, rows_of(study)) if line.startswith(f'{name}: ')]


def scored(study):
    return {scores.row.name: scores for scores in scores_of(study, rows_of(study))}


def terminal(report):
    """The table as a terminal shows it."""
    console = Console(width=200, record=True, file=open('/dev/null', 'w'))
    console.print(rich_table(report))
    return console.export_text()


def test_interval_by_hand():
    found = over_seeds([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.half == pytest.approx(4.302653 / sqrt(3))  # t of 2 degrees of freedom; sample deviation 1
    assert over_seeds([1.5]).half is None
    assert (found.text(1), over_seeds([0.015]).text(1, 100)) == ('2.0 ± 2.5', '1.5')


def test_table_by_hand(tmp_path):
    found = rows(write_sequence(tmp_path))
    assert {name: row.kind for name, row in found.items()} == {
        'old only': 'scratch', 'none': 'update', 'replay 25 %': 'update', 'union': 'union'
    }  # fmt: skip
    none, replay = found['none'].columns, found['replay 25 %'].columns
    expected = {
        'loss old': 4.2, 'loss mean': (4.2 + 1.2) / 2, 'forgetting': 4.2 - 3.0, 'adaptation': 5.0 - 1.2,
        'bits per byte new': 1.2 / log(2) / 2,
    }  # fmt: skip
    assert {column: none[column].mean for column in expected} == pytest.approx(expected)
    assert none['forgetting'].half == pytest.approx(4.302653 * 0.1 / sqrt(3))
    # known from text and tokenizer, so also for runs without a parent
    assert found['union'].columns['bits per byte old'].mean == pytest.approx(2.5 / log(2) / 4)
    assert not {'forgetting', 'adaptation'} & {*found['union'].columns, *found['old only'].columns}
    cost = {
        'tokens': 1000, 'new tokens': 750, 'replayed tokens': 250, 'flops': 6 * PARAMETERS * 1000,
        'compute vs union': 0.5, 'device hours': 0.2, 'device hours saved': 0.0,
    }  # fmt: skip
    assert {column: replay[column].mean for column in cost} == pytest.approx(cost), '360 s on 2 devices, as union'


def test_the_distance_to_union_has_two_parts(tmp_path):
    """Of the same seed, and of the update's own mixture."""
    folder = write_sequence(tmp_path)
    plan = read(folder / 'sequence.json')
    for seed in (1, 2, 3):
        for share, loss in ((25, 2.0), (50, 9.0)):
            name = f'matched-r{share}-s{seed}'
            write_run(folder / name, {'old': loss, 'new': loss + seed / 10}, batches=20, parameters=PARAMETERS)
            tokens = {'new': 2000 - 20 * share, 'old': 20 * share}
            plan['runs'].append(entry(name, f'matched {share} %', 'matched', seed, tokens=tokens))
    write_plan(folder, 'tiny', {'old': 1000, 'new': 1000}, plan['runs'])
    report = write_report([folder], tmp_path)
    found = {row.arm: row for row in report.rows}
    replay, matched = found['replay 25 %'].columns, found['matched 25 %']
    assert matched.kind == 'matched'
    # update (3.2 + 1.5) / 2 + s / 10; matched 2 + s / 20; union (2.5 + 1.2) / 2
    prices = {'above union': 2.55 - 1.85, 'price of mixture': 2.1 - 1.85, 'price of continuing': 2.55 - 2.1}
    assert {column: replay[column].mean for column in prices} == pytest.approx(prices)
    assert replay['price of continuing'].values == pytest.approx((0.35 + 0.05, 0.35 + 0.1, 0.35 + 0.15))
    assert 'price of mixture' not in found['none'].columns, 'its mixture, all new, was not trained from scratch'
    assert found['none'].columns['above union'].mean == pytest.approx(2.7 - 1.85)
    assert not {*prices} & {*matched.columns, *found['union'].columns}
    said = report.findings[0]
    assert '+0.250 is the price of its mixture' in said and '+0.450 that of continuing' in said
    forgot = {arm: found[arm].columns['forgetting'].mean for arm in ('replay 25 %', 'none')}
    assert f'forgot {forgot["replay 25 %"]:.2f} nats/token ({forgot["none"]:.2f} without replay) of old' in said
    assert 'price of continuing' in report.path.read_text()


def test_without_union_the_saving_is_an_estimate(tmp_path, no_plots):
    folder = write_sequence(tmp_path, union=False)
    columns = rows(folder)['none'].columns
    assert 'device hours saved' not in columns
    assert columns['device hours saved (estimated)'].mean == pytest.approx(0.2 / 1000 * 2000 - 0.2)
    report = write_report([folder], tmp_path / 'out')
    assert any('union' in line for line in report.missing)
    assert 'estimated' in report.path.read_text()


def test_finding(tmp_path):
    folder = write_sequence(tmp_path)
    found = finding(rows_of(read_runs([folder])), PARAMETERS)
    for number in ('replay 25 %', '0.40', '3.30', '50 %', '0.700 above'):
        assert number in found
    for seed, old in ((1, 3.9), (2, 3.0), (3, 5.0)):
        write_run(folder / f'new-none-s{seed}', {'old': old, 'new': 1.0}, f'{folder}/old-s{seed}/latest-rank0.pt')
    best, _, others = finding(rows_of(read_runs([folder])), PARAMETERS).partition('seeds do not tell')
    assert best.startswith('none') and 'replay 25 %' in others


def test_half_finished_failed_and_not_started(tmp_path):
    folder = write_sequence(tmp_path / 'tiny', seeds=(1, 2))
    path = f'{folder}/old-s1/latest-rank0.pt'
    for name in ('new-r25-s1', 'new-r25-s2', 'new-none-s2', 'union-s1', 'union-s2'):
        shutil.rmtree(folder / name)
    write_run(folder / 'new-r25-s1', {'old': 3.4, 'new': 1.0}, path, reached=5)
    log = ['Traceback (most recent call last):', 'ValueError: no such dataset', 'rank 0 exits', '']
    write_run(folder / 'new-none-s2', {'old': 3.4, 'new': 1.0}, path, reached=5, log=log)
    report = write_report([folder], tmp_path / 'out')
    found = {row.name: row for row in report.rows}
    half = found['replay 25 %']
    assert half.note == 'at batch 5 of 10, 1 more not finished'
    # half-way in a line from 3.0 to 3.4: the latest loss, and no interval
    assert half.columns['forgetting'].mean == pytest.approx(0.2)
    assert half.columns['forgetting'].half is None
    # the mean is over finished seeds alone
    assert found['none'].columns['loss old'].values == (4.1,)
    assert found['none'].note == '1 more not finished'
    assert found['union'].note == 'not started, 1 more not finished'
    states = {run.name: (run.state, run.batch, run.error) for run in report.study.given if run.state != 'finished'}
    assert states == {
        'new-r25-s1': ('unfinished', 5, ''), 'new-none-s2': ('failed', 5, 'ValueError: no such dataset'),
        **dict.fromkeys(('union-s1', 'union-s2', 'new-r25-s2'), ('not started', 0, '')),
    }  # fmt: skip
    assert {line.partition(':')[0] for line in report.missing} >= states.keys()
    page = report.path.read_text()
    for text in ('at batch 5 of 10', 'ValueError: no such dataset', '1 run failed', '1 run unfinished', 'not started'):
        assert text in page
    assert (tmp_path / 'out' / 'loss-new.png').exists(), 'unfinished runs have curves'


def test_nothing_but_a_plan(tiny, tmp_path):
    for path in tiny.glob('*-s1'):
        shutil.rmtree(path)
    report = write_report([tiny], tmp_path / 'out')
    assert {row.note for row in report.rows} == {'not started'}
    (line,) = said_of('new-none-s1', tiny)
    assert 'old-s1' in line, 'it waits for its parent'


def test_a_run_that_is_trained_on_is_not_finished(tiny):
    change(tiny / 'new-none-s1' / 'done.json', lambda value: value.update(batch=6, max_duration='6ba'))
    assert not rows(tiny)['none'].is_finished


def test_averages_are_rows_against_the_raw_parent(tmp_path):
    found = rows(write_sequence(tmp_path, averages=('lawa', 'ema_5ba')))
    updates = [f'{a}{x}' for a in ('none', 'replay 25 %') for x in ('', ', lawa', ', ema_5ba')]
    assert list(found) == ['old only', *updates, 'union']
    assert found['none, lawa'].columns['forgetting'].mean == pytest.approx(4.2 - 0.5 - 3.0)
    assert found['none, lawa'].columns['tokens'].mean == 1000


def test_model_sizes_side_by_side(tmp_path, no_plots):
    small = write_sequence(tmp_path / 'small', seeds=(1, 2))
    large = write_sequence(tmp_path / 'large', seeds=(1,), parameters=10**7)
    report = write_report([large, small], tmp_path / 'out')
    assert [(row.name, row.size) for row in report.rows][::4] == [('old only', 1000), ('old only', 10**7)]
    page = report.path.read_text()
    assert page.index('1.00 k parameters') < page.index('10.0 M parameters')
    assert 'loss-old-1_00_k_parameters' in [plot.name for plot in plots_of(report.study, report.rows)]
    assert len(report.findings) == 2
    (line,) = (line for line in report.missing if 'seed' in line)
    assert 'none (10.0 M parameters)' in line and '1.00 k' not in line


def benchmark(folder, right, missing=(), export='ba10', shots=0):
    """`right` of 4 items."""
    values = [int(item < right) for item in range(4)]
    task = {'task': 'x', 'version': 1, 'num_fewshot': shots, 'metric': 'acc', 'higher_is_better': True, 'stderr': 0.2,
            'score': right / 4, 'count': 4, 'values': values, 'weights': [1] * 4,
            'entry': {'task': 'x', 'num_fewshot': shots}, 'items': 'abcd', 'choices': [3] * 4}  # fmt: skip
    bits = {**task, 'metric': 'bits_per_byte', 'higher_is_better': False, 'score': right / 8, 'weights': [2] * 4}
    write(
        folder / 'huggingface' / 'lm_eval' / 'english' / f'{export}.json',
        {'suite': 'english', 'model': 'x', 'tasks': {'arc': task, 'wiki': bits},
         'missing': dict.fromkeys(missing, 'its data is not here'), 'settings': {}},
    )  # fmt: skip


def test_benchmarks_by_hand(tiny, tmp_path, no_plots):
    benchmark(tiny / 'old-s1', 3)
    benchmark(tiny / 'new-none-s1', 1)
    benchmark(tiny / 'new-r25-s1', 3, missing=['trivia'])
    found = scored(read_runs([tiny]))
    assert list(found) == ['old only', 'none', 'replay 25 %']
    none = found['none']
    assert none.tasks['arc'].mean == 25  # an accuracy in percent
    assert none.tasks['wiki'].mean == 1 / 8
    # two of four items got worse: -1, -1, 0, 0 has the mean -1/2 and the sample deviation sqrt(1/3)
    assert none.deltas['arc'].value == pytest.approx(-50)
    assert none.deltas['arc'].stderr == pytest.approx(100 * sqrt(1 / 3) / 2)
    assert none.deltas['wiki'].value == pytest.approx(-1 / 4)
    assert none.mean is not None and none.mean.mean == 25, 'of accuracies alone'
    assert found['old only'].deltas == {}
    report = write_report([tiny], tmp_path / 'out')
    said = [line for line in report.missing if line.startswith('lm-eval english: ')]
    assert 'union-s1' in said[0] and 'trivia' in said[1] and 'new-r25-s1' in said[1]
    page = report.path.read_text()
    assert 'Losses and benchmarks' in page and '-50.00 ± 28.87' in page
    saved = read(tmp_path / 'out' / 'report.json')['benchmarks']
    assert saved[1]['against parent']['arc']['noise'] is True
    # of four items two were lost and none gained, one was wrong in both; of 3 choices half as many by luck
    changed = none.flips['arc']
    assert list(none.flips) == ['arc'] and (changed.lost.value, changed.gained.value) == (1 / 2, 0)
    assert changed.chance == pytest.approx(1 / 8)
    assert changed.truly_lost.value == pytest.approx((1 / 2 - 1 / 8) * 3 / 2)
    assert saved[1]['items that changed sides']['arc']['lost']['value'] == 0.5
    assert 'Items that changed sides: english' in page and '50.0 / 0.0' in page and found['old only'].flips == {}


def test_answers_to_another_question_have_a_column_of_their_own(tiny, tmp_path, no_plots):
    benchmark(tiny / 'new-none-s1', 1)
    benchmark(tiny / 'new-r25-s1', 3, shots=25)
    found = scored(read_runs([tiny]))
    assert list(found['none'].tasks) == ['arc', 'wiki'], 'as the first was asked'
    assert list(found['replay 25 %'].tasks) == ['arc (num_fewshot: 25)', 'wiki (num_fewshot: 25)']
    assert found['none'].mean is None is found['replay 25 %'].mean
    page = write_report([tiny], tmp_path / 'out').path.read_text()
    assert '25-shot' in page and '0-shot' in page


def test_a_run_is_compared_with_the_checkpoint_that_it_began_from(tiny):
    parent, branch = tiny / 'old-s1', tiny / 'anneal-s1'
    for export, right in (('ba5', 2), ('ba10', 3)):
        benchmark(parent, right, export=export)
    write_run(tiny / 'new-none-s1', {'old': 4.0, 'new': 1.0}, f'{parent}/ep0-ba5-rank0.pt')
    write_run(tiny / 'new-r25-s1', {'old': 4.0, 'new': 1.0}, f'{parent}/ep0-ba7-rank0.pt')
    write_run(branch, {'old': 4.0, 'new': 1.0}, f'{tiny}/new-none-s1/ep0-ba5-rank0.pt')
    added = entry('anneal-s1', 'anneal', 'new', 1, 'new-none-s1', {'new': 500}, before={'new': 500})
    change(tiny / 'sequence.json', lambda value: value['runs'].append(added))
    for run in ('new-none-s1', 'new-r25-s1', 'anneal-s1'):
        benchmark(tiny / run, 1)
    deltas = {name: scores.deltas for name, scores in scored(read_runs([tiny])).items()}
    assert deltas['none']['arc'].value == deltas['anneal']['arc'].value == pytest.approx(-25), 'of batch 5'
    assert deltas['replay 25 %'] == {}, 'batch 7 was not scored'


def test_what_was_scored_before_the_end_is_no_result(tiny):
    for run, export in (('new-none-s1', 'ba5'), ('new-r25-s1', 'ba10'), ('new-r25-s1', 'ba5-lawa')):
        benchmark(tiny / run, 1, export=export)
    study = read_runs([tiny])
    assert list(scored(study)) == ['replay 25 %']
    said = [line for line in missing(study, rows_of(study)) if line.startswith('lm-eval english: ')]
    assert said[1:] == [
        'lm-eval english: no results of new-none-s1 at batch 10, only at batch 5',
        'lm-eval english: no results of new-r25-s1, lawa at batch 10, only at batch 5',
    ]
    (tiny / 'union-s1' / 'done.json').unlink()
    benchmark(tiny / 'union-s1', 1, export='ba8')
    assert 'union' in scored(read_runs([tiny])), 'the newest of a run that goes on'


def test_seeds_that_answer_the_same_items_are_not_more_items(tmp_path):
    folder = write_sequence(tmp_path, seeds=(1, 2))
    for seed in (1, 2):
        benchmark(folder / f'old-s{seed}', 3)
        benchmark(folder / f'new-none-s{seed}', 1, missing=['trivia'])
        benchmark(folder / f'new-r25-s{seed}', seed)
    study = read_runs([folder])
    found = scored(study)
    assert found['none'].deltas['arc'].stderr == pytest.approx(100 * sqrt(1 / 3) / 2), 'as for one seed'
    # mean over the seeds of each item: 0, -1/2, -1, 0, with the sample deviation sqrt(11/48)
    assert found['replay 25 %'].deltas['arc'].value == pytest.approx(-37.5)
    assert found['replay 25 %'].deltas['arc'].stderr == pytest.approx(100 * sqrt(11 / 48) / 2)
    (line,) = (line for line in missing(study, rows_of(study)) if 'trivia' in line)
    assert 'new-none-s1, new-none-s2' in line


def test_arms_of_two_sequences_are_not_seeds_of_one(tmp_path):
    one = write_sequence(tmp_path / 'one', seeds=(1, 2))
    two = write_sequence(tmp_path / 'two', seeds=(2, 3))
    study = read_runs([one, two])
    found = {row.name: row for row in rows_of(study)}
    assert found['none (one)'].columns['loss old'].values == (4.1, 4.2)
    assert found['none (two)'].columns['loss old'].values == (4.2, 4.3)
    assert {'union (one)', 'union (two)', 'old only (one)', 'old only (two)'} <= found.keys()
    lines = plots._lines(study, study.arms(PARAMETERS), lambda run: run.losses['old'])
    shared = [[run.folder for run in line.runs] for line in lines if line.label == 'old (shared)']
    assert shared == [[f'{one}/old-s1', f'{one}/old-s2'], [f'{two}/old-s2', f'{two}/old-s3']]


def test_hours_are_saved_against_union_of_the_same_sequence(tmp_path):
    one, two = write_sequence(tmp_path / 'one', seeds=(1,)), write_sequence(tmp_path / 'two', seeds=(2,))
    change(two / 'union-s2' / 'losses.json', lambda value: value['cost'].update(device_seconds=7200.0))
    three = write_sequence(tmp_path / 'three', seeds=(1,), union=False)
    study = read_runs([one, two, three])
    found = {row.name: row.columns for row in rows_of(study)}
    assert found['none (one)']['device hours saved'].mean == pytest.approx(0.2 - 0.2)
    assert found['none (two)']['device hours saved'].mean == pytest.approx(2 - 0.2)
    assert found['none (three)']['device hours saved (estimated)'].mean == pytest.approx(0.4 - 0.2)
    (bars,) = (plot.figure.axes[0] for plot in plots_of(study, rows_of(study)) if plot.name == 'cost')
    assert 'union' in [text.get_text() for text in bars.texts], 'dotted, of the sequence that has not trained it'


@pytest.mark.parametrize(('loaders', 'data'), [(None, []), ({'label': 'old'}, ['old'])])
def test_a_run_without_several_evaluators(loaders, data, tmp_path, no_plots):
    write_run(tmp_path / 'run-s1', eval_loader=loaders)
    (tmp_path / 'run-s1' / 'losses.json').unlink()
    report = write_report([tmp_path / 'run-s1'], tmp_path / 'out')
    assert report.study.data == data
    assert [run.state for run in report.study.given] == ['finished']


@pytest.mark.parametrize('arm', ['lr [/high] [x]', r'<b>$\x$ & more'])
def test_names_that_look_like_markup(arm, tiny, tmp_path):
    change(tiny / 'sequence.json', lambda value: value['runs'][1].update(arm=arm))
    report = write_report([tiny], tmp_path / 'out')
    assert arm in terminal(report)
    page = report.path.read_text()
    assert '<b>$' not in page and arm.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;') in page


def test_a_damaged_file_is_named(tiny):
    (tiny / 'old-s1' / 'losses.json').write_text('{"losses": ')
    with pytest.raises(ValueError, match=r'old-s1/losses\.json'):
        read_runs([tiny])


def test_single_runs_find_their_ancestors(tmp_path, no_plots):
    folder = write_sequence(tmp_path, seeds=(1, 2))
    report = write_report([folder / 'new-r25-s1'], tmp_path / 'out')
    (row,) = report.rows
    assert row.name == 'new-r25', 'the seed is not part of an arm'
    assert row.columns['forgetting'].mean == pytest.approx(0.3)
    assert row.columns['replayed tokens'].mean == 250
    assert row.columns['compute vs union'].mean == 0.5
    assert [run.name for run in report.study.runs.values()] == ['old-s1', 'new-r25-s1']
    (row,) = rows(folder / 'new-none-s1', folder / 'new-none-s2').values()
    assert len(row.columns['loss old'].values) == 2, 'two seeds are one arm'


def test_a_branch_of_a_single_run_has_what_its_trunk_had_read(tiny):
    trunk = tiny / 'new-r25-s1'
    dataset = read(trunk / 'stage.json')['config']['train_loader']['dataset']
    loader = {'name': 'replay_text', 'dataset': {**dataset, 'resume_after': f'{trunk}/ep0-ba6-rank0.pt'}}
    final = {'old': 3.1, 'new': 1.4}
    write_run(tiny / 'anneal-s1', final, f'{trunk}/ep0-ba6-rank0.pt', batches=4, train_loader=loader)
    merge = {'of': str(trunk), 'batch': 10, 'last': 2, 'every': '5ba'}
    write_run(
        tiny / 'merge-s1', final, f'{trunk}/ep0-ba10-rank0.pt', batches=0, max_duration='0ba',
        train_loader=loader, variables={'merge': merge},
    )  # fmt: skip
    study = read_runs([tiny / 'anneal-s1', tiny / 'merge-s1'])
    anneal, merged = study.given
    assert anneal.tokens == {'new': 300, 'old': 100}
    assert anneal.tokens_before_branch == {'new': 450, 'old': 150}
    assert (anneal.budget, anneal.replayed, anneal.union_tokens, anneal.kind) == (1000, 250, 2000, 'update')
    assert study.hours(anneal) == pytest.approx(0.2 + 0.2 * 600 / 1000)
    assert (sum(merged.tokens.values()), merged.budget, merged.union_tokens) == (0, 1000, 2000)


def test_what_a_parent_read_after_a_run_left_it_is_not_the_runs(tiny):
    """In union's tokens, and where the plots begin; an anneal is no stage after the whole trunk."""
    parent, child, anneal = tiny / 'old-s1', tiny / 'child-s1', tiny / 'anneal-s1'
    write_run(child, {'new': 1.0}, f'{parent}/ep0-ba5-rank0.pt')
    (child / 'forgetting.json').unlink()
    change(child / 'losses.json', lambda value: value['losses']['new'].pop(0))
    dataset = {'new': {'new': {'local': 'data/x'}}, 'resume_after': f'{child}/ep0-ba6-rank0.pt'}
    loader = {'name': 'replay_text', 'dataset': dataset}
    write_run(anneal, {'new': 0.9}, f'{child}/ep0-ba6-rank0.pt', batches=4, train_loader=loader)
    study = read_runs([child, anneal])
    assert [run.union_tokens for run in study.given] == [500 + 1000, 500 + 600 + 400]
    lines = plots._lines(study, study.arms(PARAMETERS), lambda run: run.losses['new'])
    assert {line.label: line.start for line in lines} == {'old-s1 (shared)': 0, 'child': 500, 'anneal': 1100}
    assert plots._from_parent(study, study.given[0], 'new')[0][2] == read(parent / 'losses.json')['losses']['new'][1][2]


def test_a_branch_of_a_trunk_that_goes_on_has_its_share_of_the_hours(tiny):
    trunk = tiny / 'new-none-s1'
    write_run(trunk, {'old': 4.0, 'new': 1.0}, f'{tiny}/old-s1/latest-rank0.pt', reached=5)
    write_run(tiny / 'anneal-s1', {'old': 4.0, 'new': 1.0}, f'{trunk}/ep0-ba5-rank0.pt', batches=5)
    added = entry('anneal-s1', 'anneal', 'new', 1, 'new-none-s1', {'new': 500}, before={'new': 500})
    change(tiny / 'sequence.json', lambda value: value['runs'].append(added))
    assert rows(tiny)['anneal'].columns['device hours'].mean == pytest.approx(0.2 + 0.1), 'all of the trunk so far'


def test_a_parent_that_is_not_there_is_said(alone):
    study = read_runs([alone])
    (row,) = rows_of(study)
    assert row.columns['forgetting'].mean == pytest.approx(0.5), 'known from the start of the stage'
    assert 'compute vs union' not in row.columns
    assert study.missing_parents == {'new-s1': 's3://bucket/base'}
    assert any('s3://bucket/base' in line for line in said_of('new-s1', alone))


def test_a_stand_in_for_unknown_data_is_named(alone, tmp_path, no_plots):
    streams = {'web': {'local': 'data/web', 'split': 'train', 'stand_in_for': 'the data of Pythia'}}
    replay = {'fraction': 0.05, 'streams': streams}
    assert 'the data of Pythia' not in write_report([alone], tmp_path / 'out').path.read_text()
    change(alone / 'stage.json', lambda value: value['config']['train_loader']['dataset'].update(replay=replay))
    report = write_report([alone], tmp_path / 'out')
    assert 'web' in report.findings[-1] and 'the data of Pythia' in report.findings[-1]
    assert report.findings[-1] in report.path.read_text()


@pytest.mark.parametrize(
    ('dataset', 'duration', 'tokens'),
    [
        ({'new': {'local': 'data/x'}}, '10ba', {'new': 1000}),
        ({'new': {'a': {'local': 'data/x'}, 'b': {'local': 'data/y'}}}, '1ep', {'a + b': 1000}),
    ],
    ids=['one stream without a name', 'epochs'],
)
def test_streams_of_a_single_run(dataset, duration, tokens, alone):
    loader = {'name': 'replay_text', 'dataset': dataset}
    change(alone / 'stage.json', lambda value: value['config'].update(max_duration=duration, train_loader=loader))
    change(alone / 'done.json', lambda value: value.update(max_duration=duration))
    (run,) = read_runs([alone]).given
    assert (run.tokens, run.batches, run.state) == (tokens, 10 if duration == '10ba' else None, 'finished')


def test_three_stages(tiny, tmp_path, no_plots):
    write_run(tiny / 'more-none-s1', {'old': 4.5, 'new': 4.0}, f'{tiny}/new-none-s1/latest-rank0.pt')
    more = entry('more-none-s1', 'none', 'more', 1, 'new-none-s1', {'more': 1000})
    change(tiny / 'sequence.json', lambda value: value['runs'].append(more))
    report = write_report([tiny], tmp_path / 'out')
    names = [row.name for row in report.rows]
    assert names == ['old only', 'replay 25 %', 'union', 'none'], 'stages between are no rows'
    last = report.rows[-1].runs[0]
    assert [run.name for run in report.study.chain(last)] == ['old-s1', 'new-none-s1', 'more-none-s1']


def test_only_what_ends_where_the_sequence_does_is_compared(tiny):
    """A branch of a stage between, and a trunk that its branch leaves, would be the best: they have done less."""
    trunk = f'{tiny}/new-none-s1/latest-rank0.pt'
    write_run(tiny / 'more-none-s1', {'old': 4.5, 'new': 4.0}, trunk, batches=5)
    write_run(tiny / 'more-anneal-s1', {'old': 4.6, 'new': 4.1}, f'{tiny}/more-none-s1/ep0-ba5-rank0.pt', batches=5)
    write_run(tiny / 'new-anneal-s1', {'old': 1.0, 'new': 0.5}, trunk, batches=5)
    added = [
        entry('more-none-s1', 'none', 'more', 1, 'new-none-s1', {'more': 500}),
        entry('more-anneal-s1', 'none, anneal', 'more', 1, 'more-none-s1', {'more': 500}, before={'more': 500}),
        entry('new-anneal-s1', 'none, anneal after new', 'new', 1, 'new-none-s1', {'new': 500}, before={'new': 500}),
    ]
    plan = read(tiny / 'sequence.json')
    added = [{**each, 'batches': 5} for each in added]
    write_plan(tiny, 'tiny', {'old': 1000, 'new': 1000, 'more': 1000}, [*plan['runs'], *added])
    found = rows(tiny)
    assert [row.arm for row in contenders(list(found.values()), PARAMETERS)] == ['none, anneal']
    assert 'above union' not in found['none, anneal after new'].columns and 'above union' not in found['none'].columns


def test_the_lowest_union_is_the_one_that_counts_in_whatever_order(tmp_path):
    folder = write_sequence(tmp_path, seeds=(1,))
    write_run(folder / 'other-s1', {'old': 2.0, 'new': 1.0}, batches=20)
    other = entry('other-s1', 'union low lr', 'union', 1, tokens={'new': 1000, 'old': 1000})
    runs = read(folder / 'sequence.json')['runs']
    for each in ([*runs, other], [other, *runs]):
        write_plan(folder, 'tiny', {'old': 1000, 'new': 1000}, each)
        assert rows(folder)['replay 25 %'].columns['above union'].mean == pytest.approx((3.3 + 1.6) / 2 - 1.5)


def test_a_mixture_is_the_same_but_for_a_sample(tmp_path):
    """1 of 20 samples is 0.05 of one, and not of another number of them."""
    folder = write_sequence(tmp_path, seeds=(1,))
    runs = {run.name: run for run in read_runs([folder]).given}
    update, union = runs['new-r25-s1'], runs['union-s1']
    assert not update.has_mixture_of(union)
    assert replace(union, tokens={'new': 1450, 'old': 550}).has_mixture_of(update)
    assert not replace(union, tokens={'new': 1300, 'old': 700}).has_mixture_of(update)


def test_only_seeds_are_drawn_as_seeds(tmp_path):
    # two arms with a first stage of their own, each shared by a trunk and a branch, of which both are arms
    runs = []
    for number, arm in enumerate(('a', 'b')):
        first, trunk, branch = f'old-{arm}-s1', f'new-{arm}-s1', f'new-{arm}-anneal-s1'
        runs += [
            entry(first, arm, 'old', 1, tokens={'old': 1000}),
            entry(trunk, arm, 'new', 1, first, {'new': 1000}),
            entry(branch, f'{arm}, anneal', 'new', 1, trunk, {'new': 1000}, before={'new': 1000}),
        ]
        write_run(tmp_path / first, {'old': 3.0 + number, 'new': 5.0})
        write_run(tmp_path / trunk, {'old': 3.2 + number, 'new': 4.0}, str(tmp_path / first / 'x.pt'))
        write_run(tmp_path / branch, {'old': 3.1 + number, 'new': 3.0}, str(tmp_path / trunk / 'x.pt'))
    write_plan(tmp_path, 'test', {'old': 1000, 'new': 1000}, runs)
    study = read_runs([tmp_path])
    plots = {plot.name: plot.figure.axes[0] for plot in plots_of(study, rows_of(study))}
    drawn = [line for line in plots['loss-old'].lines if len(line.get_xdata()) > 2 or line.get_label()[0] != '_']
    # an end for each run, and none of them a mean
    ends = sorted(float(line.get_ydata()[-1]) for line in drawn if line.get_linestyle() != ':')
    assert ends == pytest.approx([3.0, 3.1, 3.2, 4.0, 4.1, 4.2])


def test_a_stage_on_its_parents_own_data_is_drawn_from_where_that_ended(tmp_path):
    folder = write_sequence(tmp_path, seeds=(1,), union=False) / 'new-none-s1'
    (folder / 'forgetting.json').unlink()
    losses = {label: curve[1:] for label, curve in read(folder / 'losses.json')['losses'].items()}
    change(folder / 'losses.json', lambda value: value.update(losses=losses))
    study = read_runs([tmp_path])
    (axis,) = (plot.figure.axes[0] for plot in plots_of(study, rows_of(study)) if plot.name == 'loss-old')
    (line,) = (line for line in axis.lines if line.get_label() == 'none')
    assert (line.get_xdata()[0], line.get_ydata()[0]) == (1000, 3.0)


def test_what_a_run_lacks_is_said_and_wins_nothing(tiny):
    path = f'{tiny}/old-s1/latest-rank0.pt'
    write_run(tiny / 'new-none-s1', {'old': 4.0}, path)
    assert ['not evaluated on new' in line for line in said_of('new-none-s1', tiny)] == [True]
    assert 'loss mean' not in rows(tiny)['none'].columns
    write_run(tiny / 'new-r25-s1', {'old': nan, 'new': nan}, path)
    assert ['old, new' in line for line in said_of('new-r25-s1', tiny)] == [True]
    write_run(tiny / 'new-none-s1', {'old': 4.1, 'new': 1.1}, path)
    best = finding(rows_of(read_runs([tiny])), PARAMETERS)
    assert best.startswith('none: ') and '1.10' in best


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.links, self.ids, self.tags = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ('meta', 'link', 'br', 'img'):
            self.open.append(tag)
        self.links += [value for key, value in attrs if key in ('src', 'href', 'xlink:href', 'action', 'data')]
        self.ids += [value for key, value in attrs if key == 'id']

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in ('meta', 'link', 'br', 'img'):
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_no_other_file_and_is_the_same_every_time(tmp_path):
    folder = write_sequence(tmp_path / 'tiny', seeds=(1, 2), averages=('lawa',))
    texts = []
    for name in ('one', 'two'):
        report = write_report([folder], tmp_path / name)
        texts.append([(tmp_path / name / file).read_bytes() for file in ('report.html', 'report.json', 'table.csv')])
    assert texts[0] == texts[1]
    text = report.path.read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert all(link.startswith('#') for link in page.links), 'nothing is asked for outside'
    assert all(link[1:] in page.ids for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    assert '@import' not in text and 'url(http' not in text and 'script' not in page.tags
    plots = sorted(path.name for path in (tmp_path / 'two').glob('*.png'))
    names = ('averages-new', 'averages-old', 'cost', 'forgetting-adaptation', 'learning-rate', 'loss-new', 'loss-old')
    assert plots == [f'{name}.png' for name in names]
    assert page.tags.count('svg') == len(plots)
    assert str(tmp_path) not in text


def test_csv_json_and_terminal_say_the_same(tmp_path, no_plots):
    report = write_report([write_sequence(tmp_path / 'tiny')], tmp_path / 'out')
    with open(tmp_path / 'out' / 'table.csv', encoding='utf-8') as file:
        table = {row['arm']: row for row in csv.DictReader(file)}
    found = {row['arm']: row for row in read(tmp_path / 'out' / 'report.json')['rows']}
    assert float(table['none']['forgetting']) == found['none']['forgetting'] == pytest.approx(1.2)
    assert float(table['none']['forgetting interval']) == pytest.approx(4.302653 * 0.1 / sqrt(3))
    assert table['union']['forgetting'] == ''
    assert re.search(r'none .*\+1\.200 ±0\.248', terminal(report))


def test_script(tiny, tmp_path, capsys, no_plots):
    script.main([str(tiny)])
    printed = capsys.readouterr().out
    assert printed.startswith('replay 25 %: ')
    assert printed.count('missing: ') == len(read(tiny / 'report.json')['missing']) > 0
    assert f'report: {tiny}/report.html' in printed
    (tmp_path / 'empty').mkdir()
    with pytest.raises(SystemExit, match=str(tmp_path / 'empty')):
        script.main([str(tmp_path / 'empty')])


def test_averages_are_plotted_of_runs_that_diverged_or_are_shorter(tmp_path, monkeypatch, capsys):
    for seed, batches in ((1, 40), (2, 20)):
        write_run(tmp_path / f'run-s{seed}', {'old': 2.0, 'old/lawa': 1.0}, batches=batches, start={'old': 2.0})
    shown = plot_averages.rows_of(plot_averages.read([*tmp_path.iterdir()], 'old')['run'], 5, None)
    assert [row[4] for row in shown] == ['2.000 ± 0.000', '1.000 ± 0.000'], 'at the end of each'
    losses = {'old': [[0, 0, 2.0], [5, 500, None], [10, 1000, None]], 'old/lawa': [[0, 0, 2.0], [10, 1000, 1.5]]}
    change(tmp_path / 'run-s2' / 'losses.json', lambda value: value.update(losses=losses))
    monkeypatch.setattr(sys, 'argv', ['plot_averages', *map(str, tmp_path.iterdir()), '--out', str(tmp_path / 'a.png')])
    plot_averages.main()
    assert (tmp_path / 'a.png').exists() and 'nan' in capsys.readouterr().out
    monkeypatch.setattr(sys, 'argv', ['plot_averages', str(tmp_path / 'nowhere')])
    with pytest.raises(SystemExit):
        plot_averages.main()
    assert 'nowhere is no folder with losses.json' in capsys.readouterr().err


@pytest.mark.parametrize('name', ['report', 'lineage'])
def test_scripts_that_read_json_import_no_torch(name, tiny):
    code = (
        f"import sys; import {name}; assert not {{'rich', 'matplotlib'}} & {{*sys.modules}}; {name}.main(sys.argv[1:]);"
        "sys.exit(sorted({'torch', 'composer', 'llmfoundry', 'streaming', 'transformers'} & {*sys.modules}) or 0)"
    )
    path = f'{PATH}:{PATH / "scripts"}'
    found = subprocess.run(
        [sys.executable, '-c', code, str(tiny)], env={**os.environ, 'PYTHONPATH': path}, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
