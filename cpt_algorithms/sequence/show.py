# SPDX-License-Identifier: Apache-2.0
"""What a sequence will train, as it is printed."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cpt_algorithms.launch.launcher import Resources, command
from cpt_algorithms.schedulers.phases import phases_of
from cpt_algorithms.sequence.expand import Run
from cpt_algorithms.sequence.run import recipe_of
from cpt_algorithms.terminal import print_table

__all__ = ['print_commands', 'print_runs']


def print_runs(title: str, runs: Sequence[Run], console: Console) -> None:
    """What will be trained, on what, for how long, at which learning rate."""
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
            read = f'average of {merge.last} checkpoints, {merge.every} apart'
        start = f' at {sum(run.tokens_before_branch.values()):,}' if run.tokens_before_branch else ''
        table.add_row(escape(run.name), f'{run.parent or "(from scratch)"}{start}', escape(read), f'{run.batches:,}')
    print_table(table, console)
    console.print(f'{total:,} tokens to train in all\n')
    for run in (run for run in runs if run.batches):
        stage = run.stage
        if phases := phases_of(stage.scheduler.given, stage.max_duration):
            console.print(f'{run.name}: {stage.scheduler.name}, times lr {stage.optimizer.lr:g}')
            console.print(str(phases), markup=False)


def print_commands(resources: Resources, runs: Sequence[Run], recipes: Path, console: Console) -> None:
    """What trains each run, in the shell of each of its nodes, under whatever scheduler starts it there."""
    lines = []
    if resources.nodes > 1:
        last = resources.nodes - 1
        lines.append(f'# on each node: NODE_RANK is 0 to {last}, MASTER_ADDR the node whose rank is 0')
    for run in runs:
        lines.append(f'# {run.name}{f", when {run.parent} is done" if run.parent else ""}')
        lines.append(command(resources, recipes / recipe_of(run), run.folder / 'run.yaml'))
    console.print('\n'.join(lines), soft_wrap=True, markup=False)
