# SPDX-License-Identifier: Apache-2.0
"""Break the code on purpose, one small change at a time, and see whether a test fails: ``python scripts/mutants.py``.

Changes ("mutants"), tests and modules are those of ``[tool.mutmut]`` in ``pyproject.toml``. Ends with an error if a
mutant survives that ``tests/equivalent_mutants.txt`` does not explain, or if one that it explains is no longer there.
Names of mutants may be given (``'cpt_algorithms.replay.*'``); then only these are tested.
"""

import shutil
import subprocess
import sys
from pathlib import Path

MUTMUT = Path(sys.executable).with_name('mutmut')
EXPLAINED = Path('tests/equivalent_mutants.txt')


def mutmut(*arguments: str) -> str:
    """What mutmut prints."""
    return subprocess.run([MUTMUT, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def changed_lines(mutant: str) -> str:
    """What a mutant puts into the code: ``module: its lines``."""
    lines = mutmut('show', mutant).splitlines()
    added = [line[1:].strip() for line in lines if line.startswith('+') and not line.startswith('+++')]
    return f'{mutant.rpartition(".")[0]}: {" ".join(added)}'


def main(names: list[str]) -> None:
    """Test the mutants, and compare the survivors with those that are explained."""
    shutil.rmtree('mutants', ignore_errors=True)
    subprocess.run([MUTMUT, 'run', *names], check=True)
    results = dict(line.strip().split(': ') for line in mutmut('results').splitlines())
    survivors = {changed_lines(name): name for name, status in results.items() if status != 'timeout'}
    lines = EXPLAINED.read_text(encoding='utf-8').splitlines()
    explained = {line for line in lines if line and not line.startswith('#')}
    for change in survivors.keys() - explained:
        print(f'survived: {survivors[change]}\n    {change}')
    gone = set() if names else explained - survivors.keys()
    for change in gone:
        print(f'{EXPLAINED} explains what does not survive: {change}')
    if gone or survivors.keys() - explained:
        sys.exit(1)
    print(f'{len(survivors)} mutants survived, as {EXPLAINED} explains')


if __name__ == '__main__':
    main(sys.argv[1:])
