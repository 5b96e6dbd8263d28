# SPDX-License-Identifier: Apache-2.0
"""Phases and cost of a stage or a sequence, before it is paid for. Trains nothing, reads no data and no weights.

    python scripts/estimate_cost.py STAGE_OR_SEQUENCE.yaml [key=value ...] [--gpu h100] [--gpus N] [--mfu 0.4]

Tokens of each stream in each phase, steps, learning rates where phases meet; FLOP and GPU-hours; memory of one GPU by
part, under the YAML's fsdp_config; checkpoints and disk; and what updating saves against training from scratch on
everything.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path


def read(words):
    """What a stage or sequence means.

    Returns:
        The stages, by name; the token budget of each stage if it is known; the pretrained model that the first begins
        from, or None; the GPUs that each run is on.

    Raises:
        ValueError: If it cannot be read, or is not right.
    """
    from cpt_algorithms.cost.tables import base_of
    from cpt_algorithms.launch.launcher import resources_of
    from cpt_algorithms.sequence.expand import expand
    from cpt_algorithms.sequence.read import load_yaml
    from cpt_algorithms.sequence.spec import SequenceSpec
    from cpt_algorithms.stage.stage import Stage

    given = load_yaml(words)
    if 'stages' not in given:
        stage = Stage.from_yaml(given)
        name = Path(words[0]).stem
        budgets, base = budgets_of(name, stage)
        return {name: stage}, budgets, base, 8
    spec = SequenceSpec.from_yaml(given)
    stages = {run.name: run.stage for run in expand(spec)}
    return stages, spec.stage_tokens, base_of(stages), resources_of(spec.given).ranks


def budgets_of(name, stage):
    """Tokens of a stage and of those before it, from the ``stage.json`` of each; and the model that they begin from.

    Of a parent, those until the checkpoint that was taken; a branch and what its trunk had read are one stage.

    Returns:
        The tokens by name of the stage or folder of its ancestor, None if a parent has no ``stage.json``; the
        pretrained model that the oldest begins from, or None.
    """
    from cpt_algorithms.stage.record import read_record

    last, found = name, {name: sum(stage.tokens_by_stream().values())}
    while stage.begins:
        folder, batch = stage.begins
        record = read_record(folder)
        if record is None:
            return None, None
        tokens = record.config.tokens_by_stream() if batch is None else record.config.tokens_until(batch)
        if stage.is_branch:
            found[last] += sum(tokens.values())
        else:
            last, found = folder, {folder: sum(tokens.values()), **found}
        stage = record.config
    return found, stage.pretrained_model


def main(argv=None) -> None:
    """Read, reckon, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('words', nargs='+', metavar='YAML | key=value', help='a stage or sequence, and overrides')
    parser.add_argument('--gpu', default='h100', help='such as a100, or a peak in FLOP/s (default: h100)')
    parser.add_argument('--gpus', type=int, help="that each run is on (default: a sequence's nodes x nproc, or 8)")
    parser.add_argument('--mfu', type=float, default=0.4, help='model FLOPs utilisation (default: 0.4)')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the numbers there too')
    arguments = parser.parse_intermixed_args(argv)

    from cpt_algorithms.cost.tables import print_costs, print_phases
    from cpt_algorithms.files import write_json
    from cpt_algorithms.terminal import make_console

    console = make_console()
    try:
        stages, budgets, base, gpus = read(arguments.words)
        print_phases(stages, console)
        costs = print_costs(
            stages,
            console,
            gpu=arguments.gpu,
            gpus=arguments.gpus or gpus,
            mfu=arguments.mfu,
            budgets=budgets,
            base=base,
        )
    except ValueError as error:
        sys.exit(f'{arguments.words[0]}: {error}')
    if arguments.json:
        totals = {
            name: {'memory_total': cost.memory.total, 'disk_total': cost.disk.total} for name, cost in costs.items()
        }
        write_json(arguments.json, {name: {**asdict(cost), **totals[name]} for name, cost in costs.items()})


if __name__ == '__main__':
    main()
