#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The smallest replay fraction that forgets no more than allowed, from pilot runs that have finished.

    python scripts/foresee.py runs/pilots                      # at which the loss on old data is back at the parent's
    python scripts/foresee.py runs/pilots --forgetting 0.05    # at which at most 0.05 nats per token are forgotten
    python scripts/foresee.py runs/pilots --out share.png --json share.json

Pilots are updates of one parent that differ in `replay.fraction` alone: three or more, better five, with several seeds,
and on both sides of the answer. It holds for their model, length and schedule.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cpt_algorithms.quiet import ignore_known_warnings

if TYPE_CHECKING:
    from cpt_algorithms.foresight.answers import Answer, Pilots


def main(arguments: list[str] | None = None) -> None:
    """Read, fit, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folders', nargs='+', type=Path, help='of finished runs: a sequence, or single ones')
    parser.add_argument('--forgetting', type=float, default=0.0, help='allowed, in nats per token; default: 0')
    parser.add_argument('--out', type=Path, help='draw pilots, law and answer')
    parser.add_argument('--json', type=Path, help='write the numbers')
    given = parser.parse_intermixed_args(arguments)

    ignore_known_warnings()
    from cpt_algorithms.files import write_json  # seconds that --help does not need
    from cpt_algorithms.foresight.answers import smallest_share
    from cpt_algorithms.foresight.show import draw, print_answers
    from cpt_algorithms.report.pilots import pilots_of
    from cpt_algorithms.report.run_records import read_runs
    from cpt_algorithms.terminal import make_console

    found: dict[str, tuple[list[Pilots], Answer]] = {}
    try:
        for old, pilots in pilots_of(read_runs(given.folders)).items():
            found[old] = pilots, smallest_share(pilots, given.forgetting)
    except (OSError, ValueError) as error:
        sys.exit(f'{", ".join(map(str, given.folders))}: {error}')
    console = make_console()
    print_answers({old: answer for old, (_, answer) in found.items()}, given.forgetting, console)
    if given.json:
        write_json(given.json, {old: asdict(answer) for old, (_, answer) in found.items()})
    if given.out:
        draw(found, given.forgetting, given.out)
        console.print(f'{given.out}')


if __name__ == '__main__':
    main()
