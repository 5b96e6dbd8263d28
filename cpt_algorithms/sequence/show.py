# SPDX-License-Identifier: Apache-2.0
"""Print what a sequence will train."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cpt_algorithms.cost.tables import print_schedule
from cpt_algorithms.launch.launcher import Resources, command
from cpt_algorithms.sequence.expand import Run
from cpt_algorithms.sequence.run import recipe_of
from cpt_algorithms.sequence.spec import FROM_SCRATCH
from cpt_algorithms.terminal import print_table

# Of the passes that are wanted, how far others are away before somebody is told.
UNEVEN = 0.1

__all__ = ['print_commands', 'print_runs']


def print_runs(title: str, runs: Sequence[Run], wanted: Mapping[str, float], console: Console) -> None:
    """Print the runs: their data and how often they read it, their length, their learning rates.

    Args:
        title: Of the sequence.
        runs: Its runs.
        wanted: Passes over datasets that they should have.
        console: Where to.
    """
    table = Table(title=escape(f'{title}: {len(runs)} runs'), title_justify='left')
    for column in ('run', 'parent', 'tokens'):
        table.add_column(column)
    table.add_column('batches', justify='right')
    total, uneven = 0, {}
    for run in runs:
        tokens, passes = run.stage.tokens_by_stream(), run.stage.passes()
        total += sum(tokens.values())
        times = {name: f' ({count:.2g}x)' for name, count in passes.items()}
        read = ', '.join(f'{name} {count:,}{times.get(name, "")}' for name, count in tokens.items() if count)
        new = run.stage.mix.name if run.stage.mix else ''  # of replayed data, arms read more and less
        # a trunk that is annealed is a part of its stage
        is_whole = not any(run.name == other.parent and other.tokens_before_branch and other.batches for other in runs)
        if new in wanted and new in passes and is_whole and not run.tokens_before_branch:
            if run.stage_name not in FROM_SCRATCH:
                uneven.setdefault((new, run.stage_name), passes[new])
        if merge := run.stage.merge:
            read = merge.described
        start = f' at {sum(run.tokens_before_branch.values()):,}' if run.tokens_before_branch else ''
        table.add_row(escape(run.name), f'{run.parent or "(from scratch)"}{start}', escape(read), f'{run.batches:,}')
    print_table(table, console)
    console.print(f'{total:,} tokens to train in all; (2x): so often is what there is of it read\n')
    for (name, stage), count in uneven.items():
        if abs(count / wanted[name] - 1) > UNEVEN:
            share = count / wanted[name]
            less, more = f'prepare_data.py --train-subset {share:.2g}', f'{share:.2g} times as much data'
            console.print(
                f'{name} in {stage} is read {count:.2g} times, and {wanted[name]:g} times in the run that this is a '
                f'pilot of: take {less if share < 1 else more}, or the pilot misleads',
                soft_wrap=True,
            )
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
