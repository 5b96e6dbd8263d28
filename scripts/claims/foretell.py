# SPDX-License-Identifier: Apache-2.0
"""What the laws say of arms of yamls/claims/ before they are trained: write yamls/claims/foretold.json, and commit it.

    python scripts/claims/foretell.py runs/claims/1048576tok

Shares by the mixing law of the finished updates of each seed, a schedule by the law of the loss along an update.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cpt_algorithms.report.run_records import RunSet

OUT = Path(__file__).parents[2] / 'yamls' / 'claims' / 'foretold.json'
SHARES = {'weak': 0.2, 'strong': 0.15}
SCHEDULE = {'name': 'wsd', 't_warmup': '0.01dur', 't_decay': '0.2dur', 'alpha_f': 0.0}


def at_share(study: 'RunSet', share: float) -> dict[str, Any]:
    """Losses at a share that no pilot has."""
    from cpt_algorithms.foresight.fits import mixing_law, over_seeds
    from cpt_algorithms.report.pilots import pilots_of

    losses: dict[str, list[float]] = {}
    for old, pilots in pilots_of(study).items():
        for each in pilots:
            start = next(run.at_start[old] for run in study.given if run.seed == each.seed and old in run.at_start)
            known = {old: tuple(start + forgot for forgot in each.forgetting), **each.on_new}
            for name, found in known.items():
                losses.setdefault(name, []).append(float(mixing_law(each.shares, found).loss(share)))
    return {name: vars(over_seeds(values)) for name, values in losses.items()}


def main() -> None:
    """Read, foretell, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, help='of the sequences weak_shift and strong_shift')
    folder = parser.parse_intermixed_args().folder
    from cpt_algorithms.files import write_json  # seconds that --help does not need
    from cpt_algorithms.foresight.answers import ending_of
    from cpt_algorithms.report.pilots import rates_of, update_pilots_of
    from cpt_algorithms.report.run_records import read_runs

    found = []
    for shift, new in (('weak', 'stdlib'), ('strong', 'cpp')):
        study, percent = read_runs([folder / f'{shift}_shift']), round(100 * SHARES[shift])
        if any(run.name.startswith((f'{new}-replay_{percent}pct', f'{new}-wsd')) for run in study.given):
            sys.exit(f'{folder}/{shift}_shift: what is to be foretold is trained already')
        tokens = max(run.spent for run in study.given if run.kind == 'update')
        named = {'shift': shift, 'arm': f'replay {percent} %', 'run': f'{new}-replay_{percent}pct', 'tokens': tokens}
        found.append({**named, 'is_ending': False, 'losses': at_share(study, SHARES[shift])})
        if shift == 'strong':
            pilots = next(each for each in update_pilots_of(study) if abs(each.updates[0].share - 0.25) < 0.01)
            rates = rates_of(pilots.stage, pilots.updates[0].tokens, SCHEDULE)
            endings, _ = ending_of(pilots.updates, rates)
            named |= {'arm': 'wsd, 25 %', 'run': f'{new}-wsd_25pct', 'is_ending': True}
            found.append({**named, 'losses': {name: vars(ending.loss) for name, ending in endings.items()}})
    write_json(OUT, found)


if __name__ == '__main__':
    main()
