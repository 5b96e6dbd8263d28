# SPDX-License-Identifier: Apache-2.0
"""Who may import whom: rooms without cycles, recipes that are wiring, commands that answer at once."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from tiny import ROOT

LIBRARY = ROOT / 'cpt_algorithms'
RECIPES = sorted((ROOT / 'recipes').glob('*.py'))
COMMANDS = [
    path
    for path in [*RECIPES, *sorted((ROOT / 'scripts').rglob('*.py'))]
    if 'Parser(' in path.read_text() and 'def main' in path.read_text()
]
HEAVY = {'torch', 'composer', 'llmfoundry', 'streaming', 'transformers'}


def imports_of(path):
    """Every module that a file names in an import, wherever that stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (f'{node.module}.{alias.name}' for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def room_of(name):
    """``stage`` of ``cpt_algorithms.stage.run``."""
    return name.split('.')[1]


def test_no_room_imports_one_that_imports_it():
    rooms = {}
    for path in LIBRARY.rglob('*.py'):
        if path.parent != LIBRARY or path.name != '__init__.py':  # which has the names of all rooms
            here = path.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.')
            there = {room_of(name) for name in imports_of(path) if name.startswith('cpt_algorithms.')}
            rooms.setdefault(room_of(here), set()).update(there - {room_of(here)})
    order = list(TopologicalSorter(rooms).static_order())  # raises CycleError, which names the cycle
    assert order.index('stage') < order.index('sequence') < len(order)
    assert 'report' not in {room for those in rooms.values() for room in those}, 'it is above all others'


@pytest.mark.parametrize('recipe', RECIPES, ids=lambda path: path.stem)
def test_no_recipe_imports_another(recipe):
    names = {path.stem for path in RECIPES}
    assert not names & {name.partition('.')[0] for name in imports_of(recipe)}


@pytest.mark.parametrize('command', COMMANDS, ids=lambda path: path.stem)
def test_help_does_not_import_what_takes_seconds(command):
    code = f"""
import runpy, sys
sys.argv = [{str(command)!r}, '--help']
sys.path.insert(0, {str(command.parent)!r})
try:
    runpy.run_path(sys.argv[0], run_name='__main__')
except SystemExit as end:
    assert not end.code
print('imported', sorted({HEAVY} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert 'usage: ' in done.stdout
    assert done.stdout.splitlines()[-1] == 'imported []'


@pytest.mark.parametrize(
    'code',
    [
        'import cpt_algorithms.stage.record',  # a report reads what it writes
        'import cpt_algorithms.launch.slurm_node',  # waits beside the training processes, whose memory is wanted
        f'import runpy; runpy.run_path({str(LIBRARY / "schedulers" / "functional.py")!r}); HEAVY.add("numpy")',
    ],
)
def test_what_needs_nothing_heavy_imports_nothing_heavy(code):
    code = f'import sys; HEAVY = {HEAVY}; {code}; print(*HEAVY & sys.modules.keys())'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == ''
