# SPDX-License-Identifier: Apache-2.0
"""The claims of both papers, tested on installed text with small models: seeds, intervals, verdicts.

    make data-claims
    python scripts/claims/claims.py             # everything, hours on a laptop
    python scripts/claims/claims.py --quick     # an eighth of the tokens: that the machinery works, in under 20 minutes

Trains the sequences of yamls/claims/ (recipes/sequence.py; run the same command again after any interruption), and what
is compared with union also with other widths of the model and tokens per parameter. papers.py states each claim and
its bounds. A claim is *reproduced* if the 95 % intervals over seeds (Student's t) of all its quantities lie within
their bounds, *not reproduced* if one lies outside, and *inconclusive at this scale* otherwise; without bounds it is
*measured*. Ends with FOLDER/claims.json, claims.md and claims.png.
"""

import argparse
import os
import time
from pathlib import Path

from training import FULL, QUICK, TREND, console, train, train_on_samples


def main() -> None:
    """Train, judge, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true', help=f'stages of {QUICK:,} tokens, and no others')
    parser.add_argument('--folder', type=Path, default=Path('runs/claims'))
    parser.add_argument('--jobs', type=int, default=os.cpu_count(), help='runs at a time; default: one for each core')
    arguments = parser.parse_intermixed_args()

    from evidence import Evidence  # torch and Composer, which take seconds to import
    from judge import judge
    from papers import CLAIMS
    from results import as_data, draw, page, table, trend

    from cpt_algorithms.files import write_atomic, write_json
    from cpt_algorithms.report.made_with import made_with
    from cpt_algorithms.terminal import print_table

    started = time.monotonic()
    full = QUICK if arguments.quick else FULL
    train(arguments.folder / f'{full}tok', full, arguments.jobs)
    train_on_samples((arguments.folder / f'{full}tok').resolve(), full, arguments.jobs)
    for model in () if arguments.quick else TREND:
        train(arguments.folder / model.name, model.tokens, arguments.jobs, model)
    evidence = Evidence(arguments.folder / f'{full}tok')
    findings, points, made = judge(CLAIMS, evidence), trend([evidence, *map(evidence.of, TREND)]), made_with()
    if arguments.quick:
        made += '; --quick: models that have barely begun to learn, so that the verdicts say little about the claims'
    print_table(table(findings, f'stages of {full:,} tokens; {made}'), console)
    write_json(arguments.folder / 'claims.json', as_data(findings, points, made))
    write_atomic(arguments.folder / 'claims.md', page(findings, points, made).encode())
    draw(points, arguments.folder / 'claims.png')
    console.print(f'{arguments.folder}/claims.json, claims.md and claims.png ({time.monotonic() - started:.0f} s)')


if __name__ == '__main__':
    main()
