# SPDX-License-Identifier: Apache-2.0
"""Print what a sequence will train."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cpt_algorithms.cost.tables import print_schedule
from cpt_algorithms.launch.launcher import Resources, command
from cpt_algorithms.sequence.expand import Run
from cpt_algorithms.sequence.run import recipe_of
from cpt_algorithms.terminal import print_table

__all__ = ['print_commands', 'print_runs']


def print_runs(title: str, runs: Sequence[Run], console: Console) -> None:
    """Print the runs: their data, their length, their learning rates."""
    table = Table(title=escape(f'{title}: {len(runs)} runs'), title_justify='left')
    for column in ('run', 'parent', 'tokens'):
        table.add_column(column)
    table.add_column('batches', justify='right')
    total = 0
    for run in runs:
        tokens = run.stage.tokens_by_stream()
        total += sum(tokens.values())
        read = ', '.join(f'{name} {count:,}' for name, count in tokens.items() if count)
        if merge := run.stage.merge:
            read = merge.described
        start = f' at {sum(run.tokens_before_branch.values()):,}' if run.tokens_before_branch else ''
        table.add_row(escape(run.name), f'{run.parent or "(from scratch)"}{start}', escape(read), f'{run.batches:,}')
    print_table(table, console)
    console.print(f'{total:,} tokens to train in all\n')
    for run in runs:
        if run.batches:
            print_schedule(run.stage, console)


def print_commands(resources: Resources, runs: Sequence[Run], recipes: Path, console: Console) -> None:
    """Print the command that trains each run, for the shell of each of its nodes, under any scheduler."""
    lines = []
    if resources.nodes > 1:
        last = resources.nodes - 1
        lines.append(f'# on each node: NODE_RANK is 0 to {last}, MASTER_ADDR the node whose rank is 0')
    for run in runs:
        lines.append(f'# {run.name}' + (f', when {" and ".join(run.needs)} is done' if run.needs else ''))
        lines.append(command(resources, recipes / recipe_of(run), run.folder / 'run.yaml'))
    console.print('\n'.join(lines), soft_wrap=True, markup=False)
