# SPDX-License-Identifier: Apache-2.0
"""Every table at every width: names wrap, numbers are whole."""

import ast
import io
import re
from contextlib import redirect_stdout
from types import SimpleNamespace
from unittest import mock

import average_checkpoints
import prepare_data
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from tiny import ROOT

from cpt_algorithms.cost.tables import print_costs
from cpt_algorithms.evaluation import lm_eval
from cpt_algorithms.foresight.answers import Answer, Cheapest, Ending
from cpt_algorithms.foresight.fits import Estimate
from cpt_algorithms.foresight.show import print_answers, print_cheapest, print_endings
from cpt_algorithms.report.page import Report, print_report
from cpt_algorithms.report.tables import OverSeeds, Row
from cpt_algorithms.sequence.expand import expand
from cpt_algorithms.sequence.merge import print_line
from cpt_algorithms.sequence.show import print_runs
from cpt_algorithms.sequence.spec import SequenceSpec
from cpt_algorithms.terminal import print_table
from cpt_algorithms.weight_averaging.offline.select import Found

LONG = 'optimizer.lr=0.000123, replay.fraction=0.05, scheduler.alpha_f=0.1, scheduler.t_warmup=0.01du'
NUMBER = re.compile(r'[-+]?\d[\d.,]*')


def console_of(width):
    return Console(width=width, file=io.StringIO(), legacy_windows=False)


def names(count):
    """Of 92 characters."""
    return [f'{LONG[:90]}{index:02}' for index in range(count)]


def runs():
    given = OmegaConf.to_container(OmegaConf.load(ROOT / 'yamls' / 'sequence' / 'quickstart.yaml'), resolve=True)
    arms = {name: {'cpp': {'optimizer': {'lr': 0.001 * (index + 1)}}} for index, name in enumerate(names(3))}
    return expand(SequenceSpec.from_yaml({**given, 'arms': arms}))


def of_a_sequence(console):
    print_runs('a sequence', runs(), {}, console)


def of_a_line(console):
    points = {alpha: dict.fromkeys(names(2), 2.3456 + alpha) for alpha in (0, 0.25, 1)}
    print_line(points, 0.25, console)


def of_costs(console):
    print_costs({run.name: run.stage for run in runs()}, console, budgets=dict.fromkeys(names(2), 10**11))


def of_the_report(console):
    data = ['pile', 'slimpajama', 'german', 'a-dataset-with-a-long-name-of-its-own']
    run = SimpleNamespace(state='finished', has_diverged=False, other_plan=(), alpha=None)
    columns = [f'loss {name}' for name in [*data, 'mean']]
    columns += ['forgetting', 'adaptation', 'tokens', 'flops', 'compute vs union']
    values = [3.1234, 2.4567, 1.9876, 4.4321, 2.9876, 0.1234, -1.2345, 3e11, 7.3e20, 0.6]
    of = {c: OverSeeds(v, abs(v) / 100, (v, v)) for c, v in zip(columns, values, strict=True)}
    rows = [Row(name, '', None, 'update', [run, run], [], of) for name in names(3)]
    study = SimpleNamespace(name=LONG, data=data, label=lambda name, size: name, sizes=[None])
    print_report(Report(study, [], rows, [], [], ROOT / 'report.html'), console)


def of_lm_eval(console):
    task = {'num_fewshot': 5, 'score': 0.12345, 'stderr': 0.01234, 'count': 12345, 'values': [0, 1], 'weights': [1, 1],
            'higher_is_better': True, 'entry': {}, 'items': 'x', 'choices': [4, 4], 'prompts': 36000, 'cut': 1234}  # fmt: skip
    result = {'model': LONG, 'suite': 'english', 'tasks': dict.fromkeys(names(3), task), 'missing': {LONG: 'why'}}
    with mock.patch.object(lm_eval, 'make_console', lambda: console):
        lm_eval.print_result(result, result)


def of_an_average(console):
    found = [Found(f'/runs/{name}/ep0-ba{index}000000-rank0.pt') for index, name in enumerate(names(3))]
    with mock.patch.object(average_checkpoints, 'make_console', lambda: console):
        average_checkpoints.print_inputs(found, [0.123456, 0.234567, 0.641977], f'/runs/{LONG}', 'lawa')


def of_a_preparation(console):
    counts = SimpleNamespace(documents=12_345_678, duplicates=123_456, near_duplicates=1_234, contaminated=4_321, tokens=299_123_456_789,
                             samples=146_056_375, bytes=1_196_493_827_156)  # fmt: skip
    source = SimpleNamespace(splits={'train': counts, 'val': counts}, skipped=0, broken=0)
    dataset = SimpleNamespace(splits=source.splits, sources=dict.fromkeys(names(2), source), contamination={})
    request = SimpleNamespace(near_duplicates=True, max_seq_len=2048, decontaminate=['x'], keep_contaminated=False)
    tokenizer = SimpleNamespace(vocab_size=50432, document_start=[], document_end=['</s>'])
    manifest = SimpleNamespace(request=request, tokenizer=tokenizer, datasets={LONG: dataset})
    with mock.patch('cpt_algorithms.terminal.make_console', lambda: console), redirect_stdout(console.file):
        prepare_data.print_counts(manifest, LONG)


def of_foresight(console):
    loss = Estimate(2.3456, 2.1234, 2.5678)
    answer = Answer(Estimate(0.0987, 0.0654, 0.1345), dict.fromkeys(names(2), loss), (), 0.1234, ())
    print_answers({LONG: answer}, 0.05, console)
    print_endings({LONG: (dict.fromkeys(names(2), Ending(loss, loss, 0.1234)), ())}, 4_000_000, names(1), console)
    print_cheapest(Cheapest(Estimate(1_500_000, 0, 2_000_000), 0.1234, 0.4567, 2.3456, (), ()), 0.5, 2.3, console)


TABLES = {
    'cpt_algorithms/cost/tables.py': of_costs,
    'cpt_algorithms/evaluation/lm_eval.py': of_lm_eval,
    'cpt_algorithms/foresight/show.py': of_foresight,
    'cpt_algorithms/report/page.py': of_the_report,
    'cpt_algorithms/sequence/merge.py': of_a_line,
    'cpt_algorithms/sequence/show.py': of_a_sequence,
    'scripts/average_checkpoints.py': of_an_average,
    'scripts/prepare_data.py': of_a_preparation,
}
# Made and printed in one function that trains or reads runs; their columns are those of print_table all the same.
OTHERS = {'scripts/claims/results.py', 'scripts/claims/lawa_window.py', 'scripts/plot_averages.py'}


def test_no_table_is_printed_in_another_way():
    made, printed = set(), set()
    for path in [*ROOT.glob('cpt_algorithms/**/*.py'), *ROOT.glob('scripts/**/*.py'), *ROOT.glob('recipes/*.py')]:
        name, nodes = path.relative_to(ROOT).as_posix(), ast.walk(ast.parse(path.read_text()))
        calls = [ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)]
        if 'Table' in calls and name != 'cpt_algorithms/terminal.py':
            made.add(name)
            printed |= {name} if 'print_table' in calls else set()
    made = {name for name in made if not name.startswith('scripts/benchmarks/')}
    assert made == {*TABLES, *OTHERS}
    assert made - printed == {'scripts/claims/results.py'}, 'which claims.py prints'


def numbers(text):
    """Of a printed table, but for those in names."""
    for name in [*names(3), LONG]:
        for each in (name, name.replace('=', '_').replace(', ', '_')):
            text = text.replace(each, '')
    return sorted(word for line in text.splitlines() for word in line.split() if NUMBER.fullmatch(word))


@pytest.mark.parametrize('table', TABLES.values(), ids=lambda table: table.__name__)
def test_numbers_are_whole_at_every_width(table):
    table(wide := console_of(10_000))
    expected = numbers(wide.file.getvalue())
    assert len(expected) > 5
    for width in (80, 100, 140):
        table(narrow := console_of(width))
        lines = narrow.file.getvalue().splitlines()
        found = [word for line in lines for word in line.split() if NUMBER.fullmatch(word)]
        for number in expected:
            assert number in found, f'{number} at {width}'
            found.remove(number)
        assert '…' not in narrow.file.getvalue()
        in_tables = [line for line in lines if not line.startswith(('report: ', '  the report', '  besides'))]
        assert all(len(line.rstrip()) <= width for line in in_tables if '  ' in line.strip()), width


CELLS = st.from_regex(r'\A-?\d{1,3}(,\d{3}){0,4}(\.\d{1,4})?\Z')


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.text('abc =,.', min_size=1, max_size=120), min_size=1, max_size=3),
    st.integers(1, 12).flatmap(
        lambda count: st.lists(st.lists(CELLS, min_size=count, max_size=count), min_size=1, max_size=3)
    ),
    st.text('ab c', max_size=60),
    st.sampled_from([60, 80, 100, 140]),
)
def test_any_table(given_names, rows, head, width):
    table = Table('name')
    for index in range(len(rows[0])):
        table.add_column(f'{head}{index}', justify='right')
    for index, cells in enumerate(rows):
        table.add_row(given_names[index % len(given_names)], *cells)
    print_table(table, console := console_of(width))
    lines = console.file.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    words = [word for line in lines for word in line.split()]
    for number in (cell for cells in rows for cell in cells):
        assert number in words
        words.remove(number)
    letters = ''.join(''.join(given_names[index % len(given_names)].split()) for index in range(len(rows)))
    printed = ''.join(line.split('│')[1] for line in lines if line.count('│') > 1)
    assert len(''.join(printed.split())) >= len(letters), 'and names are whole, on several lines'
