# SPDX-License-Identifier: Apache-2.0
"""The report, from run folders written here, against numbers one can work out by hand."""

import csv
import html.parser
import json
import re
import shutil
from math import log, nan, sqrt

import pytest
import report as script
from rich.console import Console

from cpt_algorithms.report.page import rich_table, write_report
from cpt_algorithms.report.plots import plots_of
from cpt_algorithms.report.run_records import read_runs
from cpt_algorithms.report.tables import finding, missing, over_seeds, rows_of, scores_of

# 10 batches of 2 x 50 tokens
BATCH, LENGTH, PARAMETERS = 2, 50, 1000
START = {'old': 3.0, 'new': 5.0}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_run(
    folder, final, parent=None, batches=10, reached=None, replay=0.0, parameters=PARAMETERS, start=START, **more
):
    """A run whose losses fall (or rise) in a line from the start to `final`; `reached` of its batches are trained."""
    done, tokens = reached is None, batches * BATCH * LENGTH
    reached = batches if reached is None else reached
    dataset = {'new': {'new' if parent else 'old': {'local': 'data/x', 'split': 'train'}}}
    if replay:
        dataset['replay'] = {'fraction': replay, 'streams': {'old': {'local': 'data/y', 'split': 'train'}}}
    config = {
        'run_name': folder.name, 'seed': int(folder.name.rpartition('-s')[2]), 'max_duration': f'{tokens}tok',
        'global_train_batch_size': BATCH, 'max_seq_len': LENGTH, 'optimizer': {'lr': 0.01},
        'scheduler': {'name': 'rewarm_cosine', 'alpha_f': 0.1}, 'train_loader': {'dataset': dataset},
        'eval_loader': [{'label': 'old'}, {'label': 'new'}],
    }  # fmt: skip
    write(
        folder / 'stage.json',
        {'run_name': folder.name, 'parent': parent, 'data': dataset, 'max_duration': f'{tokens}tok', 'config': config,
         'versions': {'torch': '2.7.0'}},
    )  # fmt: skip

    def line(label):
        begin, end = start[label.split('/')[0]], final[label]
        return [[b, b * BATCH * LENGTH, begin + (end - begin) * b / batches] for b in range(0, reached + 1, 5)]

    write(
        folder / 'losses.json',
        {
            'losses': {label: line(label) for label in final},
            'final': {label: {'mean': loss, 'stderr': 0.0, 'count': 1} for label, loss in final.items()} if done else {},
            'learning_rate': [[b, b * BATCH * LENGTH, 0.01 * (1 - b / batches)] for b in range(reached)],
            'cost': {'tokens': reached * BATCH * LENGTH, 'seconds': 360.0 * reached / batches, 'devices': 2,
                     'device': 'gpu', 'parameters': parameters, 'batch': reached, **more},
        },
    )  # fmt: skip
    if parent:
        lengths = {'old': 4.0, 'new': 2.0}
        write(folder / 'forgetting.json', {'old': ['old'], 'new': ['new'], 'parent': start, 'bytes_per_token': lengths})
    if done:
        write(folder / 'done.json', {'batch': batches, 'parameters': parameters})


def entry(name, arm, stage, seed, parent=None, tokens=None):
    run = {'name': name, 'arm': arm, 'stage': stage, 'seed': seed, 'parent': parent, 'tokens': tokens, 'batches': 10}
    return {**run, 'trunk': {}}


def write_sequence(folder, seeds=(1, 2, 3), union=True, averages=(), parameters=PARAMETERS):
    """Stage `old`, then `new` without replay and with 25 %; seed s forgets s/10 more and learns s/10 less."""
    runs = []
    for seed in seeds:
        off = seed / 10
        parent = f'old-s{seed}'
        write_run(folder / parent, {'old': 3.0, 'new': 5.0}, start={'old': 9.0, 'new': 9.0}, parameters=parameters)
        runs.append(entry(parent, 'none', 'old', seed, tokens={'old': 1000}))
        for arm, slug, old, new, replay in (('none', 'none', 4.0, 1.0, 0), ('replay 25 %', 'r25', 3.2, 1.5, 0.25)):
            final = {'old': old + off, 'new': new + off}
            final |= {f'{label}/{a}': loss - 0.5 for a in averages for label, loss in final.items()}
            path = f'{folder}/{parent}/latest-rank0.pt'
            write_run(folder / f'new-{slug}-s{seed}', final, path, replay=replay, parameters=parameters)
            tokens = {'new': 750, 'old': 250} if replay else {'new': 1000}
            runs.append(entry(f'new-{slug}-s{seed}', arm, 'new', seed, parent, tokens))
        if union:
            final = {'old': 2.5, 'new': 1.2}
            write_run(
                folder / f'union-s{seed}', final, batches=20, start={'old': 9.0, 'new': 9.0}, parameters=parameters
            )
            runs.append(entry(f'union-s{seed}', 'union', 'union', seed, tokens={'new': 1000, 'old': 1000}))
    stages = {'old': 1000, 'new': 1000}
    write(folder / 'sequence.json', {'name': 'tiny', 'data': ['old', 'new'], 'stages': stages, 'runs': runs})
    return folder


@pytest.fixture
def no_plots(monkeypatch):
    """They take most of the time."""
    monkeypatch.setattr('cpt_algorithms.report.page.plots_of', lambda study, rows: [])


def rows(*folders):
    return {row.name: row for row in rows_of(read_runs(folders))}


def test_interval_by_hand():
    found = over_seeds([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.half == pytest.approx(4.302653 / sqrt(3))  # t of 2 degrees of freedom; sample deviation 1
    assert over_seeds([1.5]).half is None


def test_table_by_hand(tmp_path):
    found = rows(write_sequence(tmp_path))
    assert list(found) == ['old only', 'none', 'replay 25 %', 'union']
    columns = found['none'].columns
    assert columns['loss old'].mean == pytest.approx(4.2)
    assert columns['loss mean'].mean == pytest.approx((4.2 + 1.2) / 2)
    assert columns['forgetting'].mean == pytest.approx(4.2 - 3.0)
    assert columns['forgetting'].half == pytest.approx(4.302653 * 0.1 / sqrt(3))
    assert columns['adaptation'].mean == pytest.approx(5.0 - 1.2)
    assert columns['bits per byte new'].mean == pytest.approx(1.2 / log(2) / 2)
    # known from text and tokenizer, so also for runs without a parent
    assert found['union'].columns['bits per byte old'].mean == pytest.approx(2.5 / log(2) / 4)
    assert 'forgetting' not in found['union'].columns
    assert 'forgetting' not in found['old only'].columns


def test_cost_by_hand(tmp_path):
    columns = rows(write_sequence(tmp_path))['replay 25 %'].columns
    assert columns['tokens'].mean == 1000
    assert columns['replayed tokens'].mean == 250
    assert columns['flops'].mean == 6 * PARAMETERS * 1000
    assert columns['compute against union'].mean == 0.5
    assert columns['device hours'].mean == pytest.approx(0.2)  # 360 s on 2 devices
    assert columns['device hours saved'].mean == pytest.approx(0.0)  # the union run took as long


def test_without_union_the_saving_is_an_estimate(tmp_path, no_plots):
    folder = write_sequence(tmp_path, union=False)
    columns = rows(folder)['none'].columns
    assert 'device hours saved' not in columns
    assert columns['device hours saved (estimated)'].mean == pytest.approx(0.2 / 1000 * 2000 - 0.2)
    study = read_runs([folder])
    assert any('No union baseline' in line for line in missing(study, rows_of(study)))
    assert 'estimated' in write_report([folder], tmp_path / 'out').path.read_text()


def test_finding(tmp_path):
    study = read_runs([write_sequence(tmp_path)])
    assert finding(rows_of(study), PARAMETERS) == (
        'replay 25 %: forgot 0.40 nats/token of old and learned 3.30 of new, for 50 % of the compute of training on '
        'everything; its mean loss is 0.70 above that of union.'
    )


def test_arms_that_the_seeds_do_not_tell_apart_are_named(tmp_path):
    folder = write_sequence(tmp_path)
    for seed, old in ((1, 3.9), (2, 3.0), (3, 5.0)):
        write_run(folder / f'new-none-s{seed}', {'old': old, 'new': 1.0}, f'{folder}/old-s{seed}/latest-rank0.pt')
    found = finding(rows_of(read_runs([folder])), PARAMETERS)
    assert 'do not tell its mean loss from that of replay 25 %.' in found


def test_half_finished_failed_and_not_started(tmp_path):
    folder = write_sequence(tmp_path / 'tiny', seeds=(1, 2))
    path = f'{folder}/old-s1/latest-rank0.pt'
    for name in ('new-r25-s1', 'new-r25-s2', 'new-none-s2', 'union-s1', 'union-s2'):
        shutil.rmtree(folder / name)
    write_run(folder / 'new-r25-s1', {'old': 3.4, 'new': 1.0}, path, reached=5)
    write_run(folder / 'new-none-s2', {'old': 3.4, 'new': 1.0}, path, reached=5)
    log = ['Traceback (most recent call last):', 'ValueError: no such dataset', 'rank 0 exits', '']
    write(folder / 'new-none-s2' / 'failed.json', {'returncode': 1, 'log': log})
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
    said = '\n'.join(report.missing)
    assert 'new-r25-s1: unfinished, at batch 5 of 10' in said
    assert 'new-none-s2: failed, last evaluated at batch 5 of 10: ValueError: no such dataset' in said
    assert 'union-s1: not started' in said
    page = report.path.read_text()
    for text in ('at batch 5 of 10', 'ValueError: no such dataset', '1 run failed', '1 run unfinished'):
        assert text in page
    assert (tmp_path / 'out' / 'loss-new.png').exists(), 'unfinished runs have curves'


def test_nothing_but_a_plan(tmp_path, no_plots):
    folder = write_sequence(tmp_path / 'tiny', seeds=(1,))
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    report = write_report([folder], tmp_path / 'out')
    assert report.findings == ['Nothing has finished yet: every number is the latest one.']
    assert 'new-none-s1: not started (its parent old-s1: not started)' in report.missing


def test_averages_are_rows_against_the_raw_parent(tmp_path):
    folder = write_sequence(tmp_path / 'tiny', averages=('lawa', 'ema_5ba'))
    found = rows(folder)
    assert list(found) == [
        'old only',
        *(f'{a}{x}' for a in ('none', 'replay 25 %') for x in ('', ', lawa', ', ema_5ba')),
        'union',
    ]
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
    said = 'Only one seed, so no interval: old only (10.0 M parameters), none (10.0 M parameters)'
    assert any(line.startswith(said) for line in report.missing)


def benchmark(folder, right, missing=()):
    """`right` of 4 items."""
    values = [int(item < right) for item in range(4)]
    task = {'task': 'x', 'version': 1, 'num_fewshot': 0, 'metric': 'acc', 'higher_is_better': True, 'stderr': 0.2,
            'score': right / 4, 'count': 4, 'values': values, 'weights': [1] * 4,
            'entry': {'task': 'x'}, 'items': 'abcd'}  # fmt: skip
    bits = {**task, 'metric': 'bits_per_byte', 'higher_is_better': False, 'score': right / 8, 'weights': [2] * 4}
    write(
        folder / 'huggingface' / 'lm_eval' / 'english' / 'ba10.json',
        {'suite': 'english', 'model': 'x', 'tasks': {'arc': task, 'wiki': bits},
         'missing': dict.fromkeys(missing, 'its data is not here'), 'settings': {}},
    )  # fmt: skip


def test_benchmarks_by_hand(tmp_path, no_plots):
    folder = write_sequence(tmp_path / 'tiny', seeds=(1,))
    benchmark(folder / 'old-s1', 3)
    benchmark(folder / 'new-none-s1', 1)
    benchmark(folder / 'new-r25-s1', 3, missing=['trivia'])
    study = read_runs([folder])
    found = {scores.row.name: scores for scores in scores_of(study, rows_of(study))}
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
    report = write_report([folder], tmp_path / 'out')
    assert 'lm-eval english: no results of union-s1' in report.missing
    assert 'lm-eval english: trivia is missing in new-r25-s1: its data is not here' in report.missing
    page = report.path.read_text()
    assert 'Losses and benchmarks' in page
    assert '-50.00 ± 28.87' in page
    saved = json.loads((tmp_path / 'out' / 'report.json').read_text())['benchmarks']
    assert saved[1]['against parent']['arc']['noise'] is True


def test_seeds_that_answer_the_same_items_are_not_more_items(tmp_path):
    folder = write_sequence(tmp_path, seeds=(1, 2))
    for seed in (1, 2):
        benchmark(folder / f'old-s{seed}', 3)
        benchmark(folder / f'new-none-s{seed}', 1, missing=['trivia'])
        benchmark(folder / f'new-r25-s{seed}', seed)
    study = read_runs([folder])
    found = {scores.row.name: scores for scores in scores_of(study, rows_of(study))}
    assert found['none'].deltas['arc'].stderr == pytest.approx(100 * sqrt(1 / 3) / 2), 'as for one seed'
    # mean over the seeds of each item: 0, -1/2, -1, 0, with the sample deviation sqrt(11/48)
    assert found['replay 25 %'].deltas['arc'].value == pytest.approx(-37.5)
    assert found['replay 25 %'].deltas['arc'].stderr == pytest.approx(100 * sqrt(11 / 48) / 2)
    said = [line for line in missing(study, rows_of(study)) if 'trivia' in line]
    assert said == ['lm-eval english: trivia is missing in new-none-s1, new-none-s2: its data is not here']


def test_arms_of_two_sequences_are_not_seeds_of_one(tmp_path):
    found = rows(write_sequence(tmp_path / 'one', seeds=(1,)), write_sequence(tmp_path / 'two', seeds=(1,)))
    assert found['none'].columns['loss old'].count == 1
    assert found['none (two)'].columns['loss old'].count == 1


@pytest.mark.parametrize('loaders', [None, {'label': 'old'}])
def test_a_run_without_several_evaluators(loaders, tmp_path, no_plots):
    write_run(tmp_path / 'run-s1', {'old': 3.5, 'new': 1.0})
    stage = json.loads((tmp_path / 'run-s1' / 'stage.json').read_text())
    stage['config']['eval_loader'] = loaders
    write(tmp_path / 'run-s1' / 'stage.json', stage)
    (tmp_path / 'run-s1' / 'losses.json').unlink()
    report = write_report([tmp_path / 'run-s1'], tmp_path / 'out')
    [row] = report.rows
    assert (row.name, row.kind, report.study.data) == ('run', 'scratch', [])
    means = {name: column.mean for name, column in row.columns.items()}
    assert means == {'tokens': 1000, 'new tokens': 1000, 'replayed tokens': 0}


def test_names_that_look_like_markup(tmp_path, no_plots):
    folder = write_sequence(tmp_path, seeds=(1,))
    sequence = json.loads((folder / 'sequence.json').read_text())
    sequence['runs'][1]['arm'] = 'lr [/high] [x]'
    write(folder / 'sequence.json', sequence)
    console = Console(width=200, record=True)
    console.print(rich_table(write_report([folder], tmp_path / 'out')))
    assert 'lr [/high] [x]' in console.export_text()


def test_a_damaged_file_is_named(tmp_path):
    folder = write_sequence(tmp_path, seeds=(1,))
    (folder / 'old-s1' / 'losses.json').write_text('{"losses": ')
    with pytest.raises(ValueError, match=r'old-s1/losses\.json cannot be read'):
        read_runs([folder])


def test_single_runs_find_their_ancestors(tmp_path, no_plots):
    folder = write_sequence(tmp_path / 'tiny', seeds=(1,))
    report = write_report([folder / 'new-r25-s1'], tmp_path / 'out')
    (row,) = report.rows
    assert row.name == 'new-r25', 'the seed is not part of an arm'
    assert row.columns['forgetting'].mean == pytest.approx(0.3)
    assert row.columns['replayed tokens'].mean == 250
    assert row.columns['compute against union'].mean == 0.5
    assert [run.name for run in report.study.runs.values()] == ['old-s1', 'new-r25-s1']


def test_two_seeds_of_a_single_run_are_one_arm(tmp_path):
    folder = write_sequence(tmp_path, seeds=(1, 2))
    (row,) = rows(folder / 'new-none-s1', folder / 'new-none-s2').values()
    assert row.columns['loss old'].count == 2


def test_a_parent_that_is_not_there_is_said(tmp_path, no_plots):
    write_run(tmp_path / 'new-s1', {'old': 3.5, 'new': 1.0}, 's3://bucket/base/latest-rank0.pt')
    report = write_report([tmp_path / 'new-s1'], tmp_path / 'out')
    (row,) = report.rows
    assert row.columns['forgetting'].mean == pytest.approx(0.5), 'known from the start of the stage'
    assert 'compute against union' not in row.columns
    assert any('parent (s3://bucket/base) is not there' in line for line in report.missing)


def test_a_stand_in_for_unknown_data_is_named(tmp_path, no_plots):
    write_run(tmp_path / 'new-s1', {'old': 3.5, 'new': 1.0}, 's3://bucket/base/latest-rank0.pt')
    assert not any('stands in' in line for line in write_report([tmp_path / 'new-s1'], tmp_path / 'out').findings)
    stage = json.loads((tmp_path / 'new-s1' / 'stage.json').read_text())
    streams = {'web': {'local': 'data/web', 'split': 'train', 'stand_in_for': 'the data of Pythia'}}
    stage['config']['train_loader']['dataset']['replay'] = {'fraction': 0.05, 'streams': streams}
    write(tmp_path / 'new-s1' / 'stage.json', stage)
    report = write_report([tmp_path / 'new-s1'], tmp_path / 'out')
    assert report.findings[-1] == 'web stands in for the data of Pythia: forgetting is measured on it.'
    assert 'stands in for the data of Pythia' in report.path.read_text()


def test_one_stream_without_a_name_and_epochs(tmp_path):
    write_run(tmp_path / 'new-s1', {'old': 3.5, 'new': 1.0}, 's3://bucket/base/latest-rank0.pt')
    stage = json.loads((tmp_path / 'new-s1' / 'stage.json').read_text())
    stage['config']['train_loader']['dataset'] = {'new': {'local': 'data/x', 'split': 'train'}}
    write(tmp_path / 'new-s1' / 'stage.json', stage)
    (run,) = read_runs([tmp_path / 'new-s1']).runs.values()
    assert run.tokens == {'new': 1000}
    stage['config']['max_duration'] = '1ep'
    write(tmp_path / 'new-s1' / 'stage.json', stage)
    (run,) = read_runs([tmp_path / 'new-s1']).runs.values()
    assert (run.tokens, run.batches) == ({'data': 1000}, None)


def test_three_stages(tmp_path, no_plots):
    folder = write_sequence(tmp_path / 'tiny', seeds=(1,))
    sequence = json.loads((folder / 'sequence.json').read_text())
    write_run(folder / 'more-none-s1', {'old': 4.5, 'new': 4.0}, f'{folder}/new-none-s1/latest-rank0.pt')
    sequence['runs'].append(entry('more-none-s1', 'none', 'more', 1, 'new-none-s1', {'more': 1000}))
    write(folder / 'sequence.json', sequence)
    report = write_report([folder], tmp_path / 'out')
    assert [row.name for row in report.rows] == ['old only', 'replay 25 %', 'union', 'none'], (
        'stages between are no rows'
    )
    last = report.rows[-1].runs[0]
    assert [run.name for run in report.study.chain(last)] == ['old-s1', 'new-none-s1', 'more-none-s1']


def test_only_seeds_are_drawn_as_seeds(tmp_path):
    # two arms with a first stage of their own, each shared by a trunk and a branch, of which both are arms
    runs = []
    for number, arm in enumerate(('a', 'b')):
        first, trunk, branch = f'old-{arm}-s1', f'new-{arm}-s1', f'new-{arm}-anneal-s1'
        runs += [
            entry(first, arm, 'old', 1, tokens={'old': 1000}),
            entry(trunk, arm, 'new', 1, first, {'new': 1000}),
            {**entry(branch, f'{arm}, anneal', 'new', 1, trunk, {'new': 1000}), 'trunk': {'new': 1000}},
        ]
        write_run(tmp_path / first, {'old': 3.0 + number, 'new': 5.0})
        write_run(tmp_path / trunk, {'old': 3.2 + number, 'new': 4.0}, str(tmp_path / first / 'x.pt'))
        write_run(tmp_path / branch, {'old': 3.1 + number, 'new': 3.0}, str(tmp_path / trunk / 'x.pt'))
    sequence = {'name': 'test', 'data': ['old', 'new'], 'stages': {'old': 1000, 'new': 1000}, 'runs': runs}
    write(tmp_path / 'sequence.json', sequence)
    study = read_runs([tmp_path])
    plots = {plot.name: plot.figure.axes[0] for plot in plots_of(study, rows_of(study))}
    drawn = [line for line in plots['loss-old'].lines if len(line.get_xdata()) > 2 or line.get_label()[0] != '_']
    # an end for each run, and none of them a mean
    ends = sorted(float(line.get_ydata()[-1]) for line in drawn if line.get_linestyle() != ':')
    assert ends == pytest.approx([3.0, 3.1, 3.2, 4.0, 4.1, 4.2])


def test_a_stage_on_its_parents_own_data_is_drawn_from_where_that_ended(tmp_path):
    folder = write_sequence(tmp_path, seeds=(1,), union=False) / 'new-none-s1'
    (folder / 'forgetting.json').unlink()
    measured = json.loads((folder / 'losses.json').read_text())
    measured['losses'] = {label: curve[1:] for label, curve in measured['losses'].items()}
    write(folder / 'losses.json', measured)
    study = read_runs([tmp_path])
    (axis,) = (plot.figure.axes[0] for plot in plots_of(study, rows_of(study)) if plot.name == 'loss-old')
    (line,) = (line for line in axis.lines if line.get_label() == 'none')
    assert (line.get_xdata()[0], line.get_ydata()[0]) == (1000, 3.0)


def test_a_validation_set_that_was_not_evaluated_is_said(tmp_path):
    folder = write_sequence(tmp_path, seeds=(1,))
    write_run(folder / 'new-none-s1', {'old': 4.0}, f'{folder}/old-s1/latest-rank0.pt')
    study = read_runs([folder])
    assert 'new-none-s1: not evaluated on new' in missing(study, rows_of(study))
    assert 'loss mean' not in rows(folder)['none'].columns


def test_a_run_that_diverged_is_said_and_wins_nothing(tmp_path):
    folder = write_sequence(tmp_path / 'tiny', seeds=(1,))
    write_run(folder / 'new-r25-s1', {'old': nan, 'new': nan}, f'{folder}/old-s1/latest-rank0.pt')
    report = write_report([folder], tmp_path / 'out')
    assert report.findings[0].startswith('none: forgot 1.10')
    assert 'new-r25-s1: its loss on old, new is not a number' in report.missing


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


def test_names_are_escaped(tmp_path):
    folder = write_sequence(tmp_path / 'tiny', seeds=(1,))
    text = (folder / 'sequence.json').read_text().replace('replay 25 %', r'<b>$\\x$ & more')
    (folder / 'sequence.json').write_text(text)
    page = write_report([folder], tmp_path / 'out').path.read_text()
    assert '<b>$' not in page
    assert r'&lt;b&gt;$\x$ &amp; more' in page


def test_csv_json_and_terminal_say_the_same(tmp_path, no_plots):
    report = write_report([write_sequence(tmp_path / 'tiny')], tmp_path / 'out')
    with open(tmp_path / 'out' / 'table.csv', encoding='utf-8') as file:
        table = {row['arm']: row for row in csv.DictReader(file)}
    found = {row['arm']: row for row in json.loads((tmp_path / 'out' / 'report.json').read_text())['rows']}
    assert float(table['none']['forgetting']) == found['none']['forgetting'] == pytest.approx(1.2)
    assert float(table['none']['forgetting interval']) == pytest.approx(4.302653 * 0.1 / sqrt(3))
    assert table['union']['forgetting'] == ''
    console = Console(width=160, record=True, file=open('/dev/null', 'w'))
    console.print(rich_table(report))
    shown = console.export_text()
    assert re.search(r'none .*\+1\.200 ±0\.248', shown), shown


def test_script(tmp_path, capsys, no_plots):
    folder = write_sequence(tmp_path / 'tiny', seeds=(1,))
    script.main([str(folder)])
    printed = capsys.readouterr().out
    assert 'replay 25 %: forgot 0.30' in printed
    assert 'missing: Only one seed' in printed
    assert (folder / 'report.html').exists()
    (tmp_path / 'empty').mkdir()
    with pytest.raises(SystemExit, match='it is not a sequence or run folder'):
        script.main([str(tmp_path / 'empty')])
