# SPDX-License-Identifier: Apache-2.0
"""Forgetting, adaptation and cost: a page about runs, at any time, finished or not.

    python scripts/report.py runs/quickstart
    python scripts/report.py runs/small runs/large --out report       # model sizes side by side
    python scripts/report.py runs/one_stage                           # a run without a sequence; its parents are found

Writes report.html (one file; open it in a browser), its plots as PNG, table.csv and report.json.
"""

import argparse
import sys
from pathlib import Path

from cpt_algorithms.launch.processes import refuse_launcher, run_command


def main(argv: list[str] | None = None) -> None:
    """Read, write, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN', help='sequence folders or run folders')
    parser.add_argument('--out', type=Path, help='folder to write to (default: the first RUN)')
    arguments = parser.parse_intermixed_args(argv)
    # so that --help answers at once
    from cpt_algorithms.report.page import print_report, write_report
    from cpt_algorithms.terminal import make_console

    try:
        report = write_report(arguments.runs, arguments.out or arguments.runs[0])
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print_report(report, make_console())


if __name__ == '__main__':
    refuse_launcher()
    run_command(main)
