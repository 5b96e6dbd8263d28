# SPDX-License-Identifier: Apache-2.0
"""The family tree of runs: what each began from, read and became.

python scripts/lineage.py runs                       # every run below a folder, with its ancestors
python scripts/lineage.py runs/german s3://bucket/runs
python scripts/lineage.py runs --json                # the same as data
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # and when they are needed, so that --help answers at once
    from rich.tree import Tree

    from cpt_algorithms.report.lineage import Node

LOOKS = {'finished': 'green', 'unfinished': 'yellow', 'failed': 'red', 'started': 'cyan', 'not started': 'dim'}


def draw(nodes: Sequence['Node'], tree: 'Tree') -> 'Tree':
    """Add nodes, and all that began from them, to a tree of rich."""
    from rich.markup import escape

    for node in nodes:
        head = f'[bold]{escape(node.name)}[/bold]  [{LOOKS[node.look]}]{escape(node.status)}[/]'
        draw(node.children, tree.add('\n'.join([head, *(f'[dim]{escape(line)}[/dim]' for line in node.details)])))
    return tree


def main(argv: list[str] | None = None) -> None:
    """Read and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folders', nargs='+', metavar='FOLDER', help='folders with runs below them, local or URIs')
    parser.add_argument('--json', action='store_true', help='print the trees as JSON')
    arguments = parser.parse_intermixed_args(argv)
    from rich.markup import escape
    from rich.tree import Tree

    from cpt_algorithms.files import to_json
    from cpt_algorithms.report.lineage import read_lineage
    from cpt_algorithms.terminal import make_console

    try:
        roots = read_lineage(arguments.folders)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    if arguments.json:
        print(to_json([root.data for root in roots]))
        return
    make_console().print(draw(roots, Tree(escape(', '.join(arguments.folders)))))


if __name__ == '__main__':
    main()
