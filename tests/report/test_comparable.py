# SPDX-License-Identifier: Apache-2.0
"""Only what is comparable is compared: plans, numbers that are none, names that hold the names of others."""

import json
import time
from math import inf, isnan, nan

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from run_folders import change, entry, read, write, write_plan, write_run, write_sequence
from tiny import ROOT

from cpt_algorithms.evaluation.functional import by_average, changes, check_labels, split_label, without_averages
from cpt_algorithms.files import null_as_nan, read_json, write_json
from cpt_algorithms.report import plots
from cpt_algorithms.report.page import _tables, write_report
from cpt_algorithms.report.run_records import read_runs
from cpt_algorithms.report.tables import contenders, finding, missing, rows_of, summary_of
from cpt_algorithms.sequence import run as sequence_run
from cpt_algorithms.sequence.expand import expand
from cpt_algorithms.sequence.read import load_yaml, read_sequence
from cpt_algorithms.sequence.spec import SequenceSpec
from cpt_algorithms.sequence.sweep import expand_trials

QUICKSTART = ROOT / 'yamls' / 'sequence' / 'quickstart.yaml'


@pytest.fixture
def tiny(tmp_path):
    return write_sequence(tmp_path / 'tiny', seeds=(1,))


def refuse(constant):
    raise ValueError(f'{constant} is no JSON')


def strict(path):
    return json.loads(path.read_text(), parse_constant=refuse)


# Numbers that are none

VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda each: st.one_of(st.lists(each), st.dictionaries(st.text(), each)),
    max_leaves=12,
)


def with_null(value):
    if isinstance(value, dict):
        return {key: with_null(each) for key, each in value.items()}
    if isinstance(value, list):
        return [with_null(each) for each in value]
    return None if isinstance(value, float) and (isnan(value) or abs(value) == inf) else value


@given(value=VALUES)
def test_json_has_null_for_what_is_no_number_and_all_else_as_it_is(value, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / 'value.json'
    write_json(path, value)
    assert strict(path) == read_json(path) == with_null(value)


def test_null_is_no_number_again():
    assert repr(null_as_nan({'a': [1, None], 'b': {'c': None}})) == repr({'a': [1, nan], 'b': {'c': nan}})


@pytest.mark.parametrize(
    ('where', 'best'),
    [(['new'], 'replay 25 %, lawa'), (['old', 'new'], 'replay 25 %, lawa'), (['old/lawa'], 'replay 25 %')],
)
def test_finished_and_having_a_number_are_two_things(where, best, tmp_path, monkeypatch):
    monkeypatch.setattr('cpt_algorithms.report.page.plots_of', lambda study, rows: [])  # they take most of the time
    tiny = write_sequence(tmp_path / 'tiny', seeds=(1,), averages=('lawa',))
    for run, bad in (('new-none-s1', nan), ('new-r25-s1', None)):  # as Python wrote it, and as JSON can hold it

        def spoil(value, bad=bad):
            for label in where:
                value['final'][label]['mean'] = value['losses'][label][-1][2] = bad

        change(tiny / run / 'losses.json', spoil)
    report = write_report([tiny], tmp_path / 'out')
    assert strict(tmp_path / 'out' / 'report.json')['rows']
    assert report.findings[0].startswith(f'{best}: forgot ') and 'finished' not in report.findings[0]
    assert sum('is not a number' in line for line in report.missing) == 2


def test_updates_without_any_number_are_said_to_be_so(tiny):
    for run, bad in (('new-none-s1', nan), ('new-r25-s1', inf)):
        change(tiny / run / 'losses.json', lambda value, bad=bad: value['final']['new'].update(mean=bad))
    said = finding(rows_of(read_runs([tiny])), 1000)
    assert said == 'Every update that has finished has ended with losses that are no numbers.'
    loss = [[b, b, 2.0] for b in range(9)] + [[9, 9, None]]
    change(tiny / 'new-none-s1' / 'losses.json', lambda value: value.update(training_loss=loss))
    said = finding(rows_of(read_runs([tiny])), 1000)
    assert said == 'Every update that has finished has diverged or has ended with losses that are no numbers.'


# Plans


def spec_of(folder, **over):
    given = OmegaConf.to_container(OmegaConf.load(QUICKSTART), resolve=True)
    given['stages']['cpp'] |= over
    return SequenceSpec.from_yaml({**given, 'folder': str(folder), 'arms': None})


def finish(folder, run, forgot):
    """As if it had been trained."""
    parent = f'{folder}/{run.parent}/latest-rank0.pt' if run.parent else None
    start = {'python': 3.0, 'cpp': 5.0}
    kept = ('max_duration', 'global_train_batch_size', 'max_seq_len', 'callbacks', 'eval_subset_num_batches')
    given = {key: run.stage.given[key] for key in kept if key in run.stage.given}
    write_run(folder / run.name, {'python': 3.0 + forgot, 'cpp': 1.0}, parent, start=start, **given)
    change(folder / run.name / 'losses.json', lambda measured: measured['cost'].update(batch=run.batches))
    if parent:
        write(folder / run.name / 'forgetting.json', {
            'old': ['python'], 'new': ['cpp'], 'parent': start, 'bytes_per_token': {},
        })  # fmt: skip


def test_trials_of_another_plan_are_kept_and_compared_only_with_each_other(tmp_path):
    longer = {'max_duration': '3276800tok'}
    done = {}
    for over, values in (
        ({}, (0.002, 0.003)),
        (longer, (0.004, 0.005)),
        ({'eval_interval': '7ba', **longer}, (0.006,)),
    ):
        spec = spec_of(tmp_path, **over)
        trials = [[f'cpp.optimizer.lr={value}'] for value in values]
        runs = expand_trials(spec, trials)
        sequence_run.write_sequence(spec, runs, keep=True)
        for run in runs:
            finish(tmp_path, run, forgot=run.stage.optimizer.lr)
        done |= {run.name: run.arm for run in runs if run.parent}
    rows = {row.arm: row for row in rows_of(read_runs([tmp_path]))}
    assert {'optimizer.lr=0.002 (other plan)', 'optimizer.lr=0.003 (other plan)'} <= rows.keys() and len(done) == 5
    ours = [row.arm for row in contenders(list(rows.values()), 1000)]
    theirs = [row.arm for row in contenders(list(rows.values()), 1000, rows['optimizer.lr=0.002 (other plan)'].peers)]
    assert sorted(ours) == ['optimizer.lr=0.004', 'optimizer.lr=0.005', 'optimizer.lr=0.006']
    assert sorted(theirs) == ['optimizer.lr=0.002 (other plan)', 'optimizer.lr=0.003 (other plan)']
    said = finding(list(rows.values()), 1000)
    assert said.startswith('optimizer.lr=0.004: '), 'and not the one that forgot least, of a shorter stage'
    shares = {
        arm: row.columns['compute vs union'].mean for arm, row in rows.items() if 'compute vs union' in row.columns
    }
    then, now = spec_of(tmp_path).stage_tokens, spec_of(tmp_path, **longer).stage_tokens
    assert shares['optimizer.lr=0.002 (other plan)'] == then['cpp'] / sum(then.values())
    assert shares['optimizer.lr=0.004'] == now['cpp'] / sum(now.values())
    study = read_runs([tmp_path])
    [line] = [line for line in missing(study, rows_of(study)) if 'another plan' in line]
    assert 'cpp.max_duration: ' in line and '-> 3276800tok' in line
    assert line.count('cpp-optimizer.lr_0.00') == 2


def test_what_is_judged_on_more_data_is_not_compared_with_what_was_judged_on_less(tmp_path):
    before = spec_of(tmp_path, eval_subset_num_batches=4)
    for run in expand_trials(before, [['cpp.optimizer.lr=0.002']]):
        finish(tmp_path, run, forgot=0.0)
    spec = spec_of(tmp_path)
    runs = expand_trials(spec, [['cpp.optimizer.lr=0.002'], ['cpp.optimizer.lr=0.003']])
    sequence_run.write_sequence(spec, runs)
    for run in runs:
        if not (tmp_path / run.name / 'done.json').exists():
            finish(tmp_path, run, forgot=0.5)
    study = read_runs([tmp_path])
    found = rows_of(study)
    assert [row.arm for row in contenders(found, 1000)] == ['optimizer.lr=0.003']
    assert any('eval_subset_num_batches: 4 -> -1' in line for line in missing(study, found))


def test_several_sequences_are_compared_as_far_as_they_are_judged_alike(tmp_path):
    """Here the second is judged on less, in the tokens of a tokenizer of its own."""
    for name, length, over in (('one', 4.0, {}), ('two', 8.0, {'eval_subset_num_batches': 4})):
        write_sequence(tmp_path / name, seeds=(1,))
        for folder in (tmp_path / name).glob('*-s1'):
            change(folder / 'stage.json', lambda stage, over=over: stage['config'].update(over))
            if (folder / 'forgetting.json').exists():
                change(
                    folder / 'forgetting.json',
                    lambda kept, length=length: kept.update(bytes_per_token={'old': length, 'new': length}),
                )
        change(
            tmp_path / name / 'sequence.json',
            lambda plan, over=over: [run['judged_by'].update(over) for run in plan['runs']],
        )
    alone = {row.arm: row.columns['bits per byte old'].mean for row in rows_of(read_runs([tmp_path / 'one']))}
    for order in (('one', 'two'), ('two', 'one')):
        study = read_runs([tmp_path / name for name in order])
        rows = rows_of(study)
        together = {row.arm: row.columns['bits per byte old'].mean for row in rows}
        assert {arm: together[f'{arm} (one)'] for arm in alone} == alone
        assert {row.arm for row in contenders(rows, 1000)} == {f'{arm} ({order[0]})' for arm in ('none', 'replay 25 %')}
        assert f'({order[0]}): ' in finding(rows, 1000)
        [line] = [line for line in missing(study, rows) if line.startswith('Judged by another evaluation')]
        assert f'({order[1]})' in line and f'({order[0]})' not in line


def test_a_run_that_was_stopped_early_has_read_what_it_has_read(tmp_path):
    write_sequence(tmp_path, seeds=(1,))
    run = tmp_path / 'new-none-s1'
    change(run / 'losses.json', lambda measured: measured['cost'].update(batch=4, tokens=400))
    (row,) = [row for row in rows_of(read_runs([tmp_path])) if row.arm == 'none']
    assert {key: row.columns[key].mean for key in ('tokens', 'new tokens', 'compute vs union')} == {
        'tokens': 400, 'new tokens': 400, 'compute vs union': 0.2,
    }  # fmt: skip


def test_a_trial_with_a_seed_that_failed_has_no_number(tmp_path):
    write_sequence(tmp_path, seeds=(1, 2))
    assert summary_of(rows_of(read_runs([tmp_path])), ['old', 'new'], 'none')['final_loss/old'] == pytest.approx(4.15)
    (tmp_path / 'new-none-s2' / 'done.json').unlink()
    assert summary_of(rows_of(read_runs([tmp_path])), ['old', 'new'], 'none') == {}


@pytest.mark.parametrize(
    'over',
    [{'train_loader': {'num_workers': 3, 'dataset': {'cache_limit': '1gb'}}}, {'callbacks': {'speed_monitor': {}}}],
)
def test_what_changes_no_result_changes_no_plan(over, tmp_path):
    plans = [sequence_run._plan_of(spec_of(tmp_path, **each)) for each in ({}, over)]
    assert plans[0] == plans[1]


@pytest.mark.parametrize('path', sorted(QUICKSTART.parent.glob('*.yaml')), ids=lambda path: path.stem)
def test_the_plan_of_every_sequence_can_be_written(path, monkeypatch):
    monkeypatch.chdir(QUICKSTART.parents[2])
    plan = sequence_run._plan_of(SequenceSpec.from_yaml(load_yaml([str(path)])))
    assert json.loads(json.dumps(plan)) == plan
    assert all('model' in stage and 'eval_interval' not in stage for stage in plan['stages'].values())


def test_trials_stay_when_the_sequence_itself_is_run(tmp_path):
    spec = spec_of(tmp_path)
    trials = expand_trials(spec, [['cpp.optimizer.lr=0.002']])
    sequence_run.write_sequence(spec, trials, keep=True)
    plain = expand(spec)
    for _ in range(2):
        sequence_run.write_sequence(spec, plain)
        assert {run['name'] for run in read(tmp_path / 'sequence.json')['runs']} == {
            run.name for run in [*plain, *trials]
        }
    sequence_run.write_sequence(spec, [])  # as if its first stage had another name since
    kept = {run['name']: run for run in read(tmp_path / 'sequence.json')['runs']}
    assert kept.keys() == {run.name for run in trials}, 'with what they began from'
    read_runs([tmp_path])


def test_arms_that_are_left_out_of_a_sequence_are_left_out_of_its_report(tmp_path):
    spec = spec_of(tmp_path)
    for values in ((0.002, 0.003), (0.004,)):
        sequence_run.write_sequence(spec, expand_trials(spec, [[f'cpp.optimizer.lr={value}'] for value in values]))
    assert [run['arm'] for run in read(tmp_path / 'sequence.json')['runs'][1:]] == ['optimizer.lr=0.004']


# Metrics of a sweep


def test_a_metric_that_no_trial_logs_is_refused_with_the_nearest(tmp_path):
    sweep = yaml.safe_load((ROOT / 'yamls' / 'sweeps' / 'replay_fraction.yaml').read_text())
    sweep['command'][3] = str(ROOT / sweep['command'][3])
    file = tmp_path / 'sweep.yaml'

    def read_with(name, *words):
        file.write_text(yaml.safe_dump({**sweep, 'metric': {'name': name, 'goal': 'minimize'}}))
        return read_sequence(words, str(file))

    averages = ('common.callbacks.lawa={interval: 5ba}', 'common.callbacks.ema={half_life: [7ba, 9ba]}')
    _, runs = read_with('final_forgetting/mean/ema_9ba', *averages)
    study = write_sequence(tmp_path / 'tiny', seeds=(1,), averages=('lawa', 'ema_7ba', 'ema_9ba'))
    summary = summary_of(rows_of(read_runs([study])), ['old', 'new'], 'none')
    for name in summary:  # whatever the summary of a trial has
        read_with(name.replace('old', 'python').replace('new', 'cpp'), *averages)
    assert len(summary) == 7 * 4
    for wrong, right in {
        'loss/avrage': 'final_loss', 'final_loss/average': 'final_loss/', 'final_loss/mean/lawa': 'final_loss/mean',
        'final_forgetting/cpp': 'final_', 'final_loss/cp': 'final_loss/cpp',
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f'metric.name={wrong!r} is logged by no trial; .*{right}'):
            read_with(wrong)


# Names


NAMES = st.lists(
    st.sampled_from(['a', 'a/b', 'a/b/c', 'b', 'ema', 'a/lawa', 'lawa', 'x y', 'a.b', 'a-s17', 'eval/a', 'loss a', 'a (b)']),
    min_size=1, unique=True,
)  # fmt: skip


@given(NAMES, st.sampled_from(['lawa', 'ema_5ba', 'ema_0.01dur']))
def test_a_label_is_taken_apart_by_the_datasets_that_are_known(names, average):
    try:
        check_labels(names)
    except ValueError as error:
        assert 'a/lawa' in str(error) and {'a', 'a/lawa'} <= {*names}
        return
    labels = [*names, *(f'{name}/{average}' for name in names if f'{name}/{average}' not in names)]
    for name in names:
        assert split_label(name, names) == (name, '') and split_label(f'{name}/{average}', names) in (
            (name, average),
            (f'{name}/{average}', ''),
        )
    if not any(name.endswith('/lawa') for name in names):
        assert without_averages(labels) == names
        losses = {label: float(index) for index, label in enumerate(labels)}
        for wanted in ([names[0]], names):  # some of them, or all
            found = by_average(losses, wanted)
            assert found == {
                '': {name: losses[name] for name in wanted},
                average: {name: losses[f'{name}/{average}'] for name in wanted},
            }
            changed = changes(losses, losses, wanted[:1], wanted[1:])
            assert set(changed.values()) <= {
                0.0,
                *(losses[f'{n}/{average}'] - losses[n] for n in wanted),
                *changed.values(),
            }


@pytest.mark.parametrize(
    'labels', [['mean'], ['a', 'a'], ['a', 'a_stderr'], ['a interval', 'a'], ['a', 'a/lawa'], ['a/ema_5ba', 'a']]
)
def test_a_name_by_which_results_cannot_be_told_apart_is_refused(labels):
    with pytest.raises(ValueError, match=r'eval_loader.* label'):
        check_labels(labels)


@pytest.mark.long
def test_datasets_whose_names_hold_the_names_of_others(tmp_path):
    """In every column, plot and line of the report."""
    names = ['code', 'code/python (v2) %', 'loss code']
    old, new = names[:1], names[1:]
    folder, start = tmp_path / 'r', dict.fromkeys(names, 4.0)
    final = {name: 3.0 + index for index, name in enumerate(names)}
    final |= {f'{name}/lawa': loss - 0.5 for name, loss in final.items()}
    write_run(folder / 'a-s1', dict.fromkeys(names, 4.0), start=start)
    write_run(folder / 'b-s1', final, f'{folder}/a-s1/latest-rank0.pt', start=start)
    given = {'old': old, 'new': new, 'parent': start, 'bytes_per_token': dict.fromkeys(names, 2.0)}
    write(folder / 'b-s1' / 'forgetting.json', given)
    runs = [entry('a-s1', 'x', 'a', 1, tokens={'code': 1000}), entry('b-s1', 'x', 'b', 1, 'a-s1', {'code': 1000})]
    write_plan(folder, 'names', {'a': 1000, 'b': 1000}, runs, names)
    for folders in ([folder], [folder / 'b-s1']):
        report = write_report(folders, tmp_path / 'out')
        assert report.study.data == names
        row, average = (row for row in report.rows if row.arm in ('x', 'b'))
        assert [row.columns[f'loss {name}'].mean for name in names] == [3.0, 4.0, 5.0] and average.average == 'lawa'
        assert row.columns['loss mean'].mean == 4.0 and average.columns['loss mean'].mean == 3.5
        assert row.columns['forgetting'].mean == -1.0 and row.columns['adaptation code/python (v2) %'].mean == 0.0
        page = (tmp_path / 'out' / 'report.html').read_text()
        assert 'final loss code 3.000, code/python (v2) % 4.000, loss code 5.000' in page.replace('\u00a0', ' ')
        assert page.count('D1 code/python (v2) %') >= 2, 'whole in the heads of tables'


def many(folder, count):
    write_run(folder / 'old-s1', {'old': 3.0, 'new': 5.0}, start={'old': 9.0, 'new': 9.0})
    runs = [entry('old-s1', 'arm 0', 'old', 1, tokens={'old': 1000})]
    for index in range(count):
        final = {'old': 3.2 + index / 100, 'new': 1.5}
        write_run(folder / f'new-{index}-s1', final, f'{folder}/old-s1/latest-rank0.pt', batches=20, new='new')
        runs.append(
            entry(f'new-{index}-s1', f'optimizer.lr={0.0001 * (index + 1):.4g}', 'new', 1, 'old-s1', {'new': 1000})
        )
    write_plan(folder, 'many', {'old': 1000, 'new': 1000}, runs)


def test_two_hundred_arms_are_all_in_the_tables_and_the_best_in_the_plots(tmp_path, monkeypatch):
    """Legends of more take time that grows with their square, and nobody can read them."""
    many(tmp_path, 200)
    drawn = []
    monkeypatch.setattr(plots, '_loss', lambda study, arms, name: drawn.append([arm.name for arm in arms]))
    for other in ('_averages', '_learning_rates', '_plane', '_cost'):
        monkeypatch.setattr(plots, other, lambda *given: None)
    started = time.process_time()
    report = write_report([tmp_path], tmp_path)
    assert time.process_time() - started < 10
    assert drawn[0] == [f'optimizer.lr={0.0001 * (index + 1):.4g}' for index in range(20)]
    page = (tmp_path / 'report.html').read_text()
    assert all(row.name in page for row in report.rows) and len(report.rows) == 201


@pytest.mark.slow
def test_a_report_of_two_hundred_arms_takes_seconds(tmp_path):
    many(tmp_path, 200)
    started = time.process_time()
    report = write_report([tmp_path], tmp_path)
    assert time.process_time() - started < 20, 'it grew with the square of the arms: 100 s'
    assert 'the 20 best of 201 arms' in report.path.read_text()


@pytest.mark.parametrize('count', [1, 4, 12])
def test_on_paper_every_column_is_there_once(count, tmp_path, monkeypatch):
    """What a page cannot hold stands below, with the names: paper has no scroll bars."""
    monkeypatch.setattr('cpt_algorithms.report.page.plots_of', lambda study, rows: [])
    names, folder = [f'd{number}' for number in range(count)], tmp_path / 'paper'
    write_run(folder / 'a-s1', dict.fromkeys(names, 4.0), start=dict.fromkeys(names, 9.0))
    runs = [entry('a-s1', 'x', 'a', 1, tokens={'d0': 1000})]
    write_plan(folder, 'p', {'a': 1000}, runs, names)
    report = write_report([folder], folder)
    for table in _tables(report):
        heads = [(title, head) for title, heads in table.heads for head in heads]
        assert heads == [(title, head) for part in table.parts for title, of in part.heads for head in of]
        for line, *lines in zip(table.lines, *(part.lines for part in table.parts), strict=True):
            assert {each.name for each in lines} == {line.name}
            assert line.cells == [cell for each in lines for cell in each.cells]
        assert all(sum(len(of) for _, of in part.heads) <= 10 for part in table.parts)
    page = report.path.read_text()
    assert page.count('class="scroll part"') == page.count('class="scroll whole"') * 2 and (count > 4) == (
        'scroll part"' in page
    )
    assert '.scroll.part { display: none; }' in page and '.scroll.whole { display: none; }' in page
