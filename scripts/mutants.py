# SPDX-License-Identifier: Apache-2.0
"""Break the code on purpose, one small change at a time, and see whether a test fails: ``python scripts/mutants.py``.

Changes ("mutants"), tests and modules are those of ``[tool.mutmut]`` in ``pyproject.toml``. Ends with an error if a
mutant survives that ``tests/equivalent_mutants.txt`` does not explain, or if a line of it explains no survivor.
"""

import argparse
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MUTMUT = Path(sys.executable).with_name('mutmut')
EXPLAINED = Path('tests/equivalent_mutants.txt')


def mutmut(*arguments: str) -> str:
    """The output of mutmut."""
    return subprocess.run([MUTMUT, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def function_of(mutant: str) -> str:
    """``module.Class.method`` of ``module.xǁClassǁmethod__mutmut_3``; without a class, it begins with ``x_``."""
    module, _, name = mutant.rpartition('.')
    return f'{module}.{re.sub(r"^xǁ|^x_|__mutmut_[0-9]+$", "", name).replace("ǁ", ".")}'


def changed_lines(mutant: str) -> str:
    """The change of a mutant: ``module: its lines``."""
    lines = mutmut('show', mutant).splitlines()
    added = [line[1:].strip() for line in lines if line.startswith('+') and not line.startswith('+++')]
    return f'{mutant.rpartition(".")[0]}: {" ".join(added)}'


def explains(line: str, mutant: str, change: str) -> bool:
    """Whether a line of the explanations is a mutant's.

    ``module: code`` is what one puts there, ``module.function: *`` all of a function's; after ``~`` each ``...`` stands
    for anything.
    """
    if line.startswith('~ '):
        return re.fullmatch('.*'.join(map(re.escape, line[2:].split('...'))), change) is not None
    return line == change or line == f'{function_of(mutant)}: *'


def main() -> None:
    """Test the mutants, and compare the survivors with those that are explained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', metavar='NAME', help="such as 'cpt_algorithms.replay.*' (default: all)")
    given = parser.parse_intermixed_args().names
    shutil.rmtree('mutants', ignore_errors=True)
    subprocess.run([MUTMUT, 'run', *given], check=True)
    results = dict(line.strip().split(': ') for line in mutmut('results').splitlines())
    names = [name for name, status in results.items() if status != 'timeout']
    with ThreadPoolExecutor() as pool:
        survivors = dict(zip(names, pool.map(changed_lines, names), strict=True))
    lines = EXPLAINED.read_text(encoding='utf-8').splitlines()
    reasons = {line for line in lines if line and not line.startswith('#')}
    by = {name: [line for line in reasons if explains(line, name, change)] for name, change in survivors.items()}
    unexplained = [name for name, why in by.items() if not why]
    for name in unexplained:
        print(f'survived: {name}\n    {survivors[name]}')
    gone = set() if given else reasons - {line for why in by.values() for line in why}
    for line in sorted(gone):
        print(f'{EXPLAINED} explains what does not survive: {line}')
    if gone or unexplained:
        sys.exit(1)
    print(f'{len(survivors)} mutants survived, as {EXPLAINED} explains')


if __name__ == '__main__':
    main()
