#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What a run will give, from pilot runs that have finished: how much replay it needs, how it ends, what is cheapest.

    python scripts/foresee.py runs/pilots                      # the share at which old loss is back at the parent's
    python scripts/foresee.py runs/pilots --forgetting 0.05    # at which at most 0.05 nats per token are forgotten
    python scripts/foresee.py runs/pilots --forgetting 0.5 --adaptation 2.2     # the shortest update that keeps both
    python scripts/foresee.py runs/pilots --tokens 4000000     # losses at the end of an update of so many tokens
    python scripts/foresee.py runs/pilots --scheduler '{name: wsd, t_warmup: 0.01dur, t_decay: 0.2dur, alpha_f: 0.0}'
    python scripts/foresee.py runs/pilots --out answer.png --json answer.json

Pilots are updates of one parent. For a share they differ in `replay.fraction` alone: three or more, better five, with
several seeds, and on both sides of the answer. For an ending they may differ in schedule and length. What is foretold
holds for their model and learning rate.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpt_algorithms.quiet import ignore_known_warnings

if TYPE_CHECKING:
    from rich.console import Console

    from cpt_algorithms.report.run_records import RunSet


def parse(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folders', nargs='+', type=Path, help='of finished runs: a sequence, or single ones')
    parser.add_argument('--forgetting', type=float, default=0.0, help='allowed, in nats per token; default: 0')
    parser.add_argument('--adaptation', type=float, help='wanted, in nats per token: how short can an update be?')
    parser.add_argument('--tokens', type=int, help="of the update whose end is asked for; default: the pilots'")
    parser.add_argument('--scheduler', help='its schedule, as YAML has it; default: that of the pilots')
    parser.add_argument('--out', type=Path, help='draw pilots, law and answer')
    parser.add_argument('--json', type=Path, help='write the numbers')
    given = parser.parse_intermixed_args(words)
    if given.adaptation is not None and (given.tokens or given.scheduler):
        parser.error(
            '--adaptation asks how many tokens are needed, and --tokens and --scheduler how they end: one of both'
        )
    for path in filter(None, (given.out, given.json)):
        if not path.parent.is_dir():
            parser.error(f'{path}: there is no folder {path.parent}')
    return given


def shares(study: 'RunSet', given: argparse.Namespace, console: 'Console') -> Any:
    """The smallest share of old data."""
    from cpt_algorithms.foresight.answers import smallest_share
    from cpt_algorithms.foresight.show import draw, print_answers
    from cpt_algorithms.report.pilots import pilots_of

    pilots = pilots_of(study)
    found = {old: (each, smallest_share(each, given.forgetting)) for old, each in pilots.items()}
    print_answers({old: answer for old, (_, answer) in found.items()}, given.forgetting, console)
    if given.out:
        draw(found, given.forgetting, given.out)
    return {old: asdict(answer) for old, (_, answer) in found.items()}


def endings(study: 'RunSet', given: argparse.Namespace, console: 'Console') -> Any:
    """The losses at the end of an update, for each mixture."""
    from omegaconf import OmegaConf

    from cpt_algorithms.foresight.answers import ending_of
    from cpt_algorithms.foresight.show import draw_endings, print_endings
    from cpt_algorithms.report.pilots import rates_of, update_pilots_of

    scheduler: Any = OmegaConf.to_container(OmegaConf.create(given.scheduler)) if given.scheduler else None
    if scheduler is not None and not isinstance(scheduler, dict):
        raise ValueError(f'--scheduler {given.scheduler}: expected a mapping, such as {{name: wsd, t_warmup: 0.01dur}}')
    found, drawn, per_batch, tokens = {}, [], 1, 0
    for pilots in update_pilots_of(study):
        per_batch = pilots.stage.global_train_batch_size * pilots.stage.max_seq_len
        rates = rates_of(pilots.stage, given.tokens or pilots.updates[0].tokens, scheduler)
        tokens, (endings, warnings) = len(rates) * per_batch, ending_of(pilots.updates, rates)
        found[pilots.updates[0].name] = endings, warnings
        drawn.append((pilots.updates, endings, rates))
    print_endings(found, tokens, [old for run in study.given for old in run.old], console)
    if given.out:
        draw_endings(drawn, per_batch, given.out)
    return {name: {data: asdict(each) for data, each in endings.items()} for name, (endings, _) in found.items()}


def shortest(study: 'RunSet', given: argparse.Namespace, console: 'Console') -> Any:
    """The shortest update that keeps to both bounds."""
    from cpt_algorithms.foresight.answers import cheapest
    from cpt_algorithms.foresight.show import draw_cheapest, print_cheapest
    from cpt_algorithms.report.pilots import rates_of, update_pilots_of

    every = update_pilots_of(study)
    groups: dict[str, list[Any]] = {}
    for each in every:
        groups.setdefault(each.alike, []).append(each)
    pilots = max(groups.values(), key=len)
    if others := [each.updates[0].name for each in every if each not in pilots]:
        console.print(f'left out, as they differ in more than the share: {", ".join(others)}', markup=False)
    stage = pilots[0].stage
    found = cheapest(
        [each.updates for each in pilots], lambda tokens: rates_of(stage, tokens), given.forgetting, given.adaptation
    )
    print_cheapest(found, given.forgetting, given.adaptation, console)
    if given.out:
        draw_cheapest(found, given.forgetting, given.adaptation, given.out)
    return asdict(found)


def main(words: list[str] | None = None) -> None:
    """Read, fit, print, draw."""
    given = parse(words)
    ignore_known_warnings()
    from cpt_algorithms.files import write_json  # seconds that --help does not need
    from cpt_algorithms.report.run_records import read_runs
    from cpt_algorithms.terminal import make_console

    console, where = make_console(), ', '.join(map(str, given.folders))
    try:
        study = read_runs(given.folders)
    except (OSError, ValueError) as error:
        sys.exit(f'{where}: {error}')
    ignored = [run.name for run in study.given if run.kind == 'update' and run.has_diverged]
    if ignored:
        console.print(f'left out, as they have diverged: {", ".join(ignored)}', markup=False)
    question = shortest if given.adaptation is not None else endings if given.tokens or given.scheduler else shares
    try:
        answer = question(study, given, console)
    except (OSError, ValueError) as error:
        sys.exit(f'{where}: {error}')
    if given.json:
        write_json(given.json, answer)
    if given.out:
        console.print(f'{given.out}')


if __name__ == '__main__':
    main()
