# SPDX-License-Identifier: Apache-2.0
"""``make gpu``: a table at the end, of what ran and what was measured; ``--results FILE`` keeps it as JSON."""

import json
import os

# before anything of CUDA begins: what cuBLAS needs in order to sum in the same order each time
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')

from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cpt_algorithms.report.made_with import made_with
from cpt_algorithms.terminal import print_table


def pytest_addoption(parser: pytest.Parser) -> None:
    """Only known where tests/gpu is named on the command line."""
    parser.addoption('--results', type=Path, metavar='FILE', help='also write the table there, as JSON')


def pytest_collection_finish(session: pytest.Session) -> None:
    """Without a GPU the tests of one cannot say anything."""
    if not torch.cuda.is_available() and any(item.get_closest_marker('gpu') for item in session.items):
        pytest.exit('make gpu needs a GPU that torch can use; without one, the same code runs in make test', 2)


@pytest.fixture
def measured(record_property):
    """Notes a number with its unit, for the table."""
    return lambda **found: [record_property(name.replace('_', ' '), value) for name, value in found.items()]


def pytest_terminal_summary(terminalreporter, config) -> None:
    """The table, if this folder was asked for."""
    path = config.getoption('--results', 'not here')
    if path == 'not here':
        return
    lines = []
    for outcome in ('passed', 'failed', 'error', 'skipped'):
        for report in terminalreporter.stats.get(outcome, []):
            if 'tests/gpu/' in report.nodeid and (report.when == 'call' or outcome != 'passed'):
                name = report.nodeid.partition('::')[2].removeprefix('test_').replace('_', ' ')
                crash = getattr(getattr(report.longrepr, 'reprcrash', None), 'message', report.longreprtext)
                why = '' if outcome == 'passed' else (crash.splitlines() or [''])[0]
                lines.append([name, outcome, round(report.duration, 1), dict(report.user_properties), why])
    if path:
        keys = ('case', 'outcome', 'seconds', 'measured', 'why')
        cases = [dict(zip(keys, line, strict=True)) for line in lines]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({'with': made_with(), 'cases': cases}, indent=1))
    table = Table(title=made_with())
    for column in ('case', 'outcome', 's', 'measured'):
        table.add_column(column, overflow='fold', justify='right' if column == 's' else 'left')
    for name, outcome, seconds, found, why in lines:
        told = why or ', '.join(f'{key} {value}' for key, value in found.items())
        table.add_row(escape(name), outcome, f'{seconds}', escape(told))
    print_table(table, Console(width=None if os.isatty(1) else 160))
