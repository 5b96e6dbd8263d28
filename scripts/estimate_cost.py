# SPDX-License-Identifier: Apache-2.0
"""What a stage or a sequence will do and cost, before it is paid for. Trains nothing, reads no data and no weights.

    python scripts/estimate_cost.py STAGE_OR_SEQUENCE.yaml [key=value ...] [--gpu h100] [--gpus N] [--mfu 0.4]

Tokens of each stream in each phase, steps, learning rates where phases meet; FLOP and GPU-hours; memory of one GPU by
part, under the YAML's fsdp_config; checkpoints and disk; and what updating saves against training from scratch on
everything.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from yaml import YAMLError

from cpt_algorithms.cost.estimate import GPUS, tokens_of_streams
from cpt_algorithms.cost.tables import print_costs, print_phases
from cpt_algorithms.files import StorageError, read_json, write_json
from cpt_algorithms.launch.launcher import resources_of
from cpt_algorithms.sequence.expand import plan, stage_tokens
from cpt_algorithms.sequence.scale import load_scaled
from cpt_algorithms.stage.preflight import resolve

NEEDED = ('model', 'optimizer', 'scheduler', 'train_loader', 'max_duration', 'max_seq_len', 'global_train_batch_size')


def read(words: list[str]) -> tuple[dict[str, dict[str, Any]], dict[str, int] | None, int]:
    """What a stage or sequence means.

    Returns:
        The train YAMLs, by name; the token budget of each stage if it is known; the GPUs that each run is on.

    Raises:
        ValueError: If it cannot be read, or is not right.
    """
    try:
        given = load_scaled(words)
    except (OSError, OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f'cannot be read: {error}') from None
    is_sequence = 'stages' in given
    named = {run.name: run.config for run in plan(given)} if is_sequence else {Path(words[0]).stem: given}
    configs = {name: resolve(config) for name, config in named.items()}
    for name, config in configs.items():
        if missing := [key for key in NEEDED if config.get(key) is None]:
            raise ValueError(f'{name}: {missing[0]} is missing')
    if not is_sequence:
        return configs, budgets(*configs.items()), 8
    layout = resources_of(given)
    return configs, stage_tokens(given), layout.nodes * layout.nproc


def budgets(stage: tuple[str, dict[str, Any]]) -> dict[str, int] | None:
    """Tokens of a stage and of those before it, from the ``stage.json`` of each; None if a parent has none."""
    name, config = stage
    found = {name: sum(tokens_of_streams(config).values())}
    while parent := config.get('load_path'):
        before = read_json(f'{str(parent).rpartition("/")[0]}/stage.json')
        if before is None:
            return None
        config = before['config']
        found = {before['run_name']: sum(tokens_of_streams(config).values()), **found}
    return found


def main(argv: list[str] | None = None) -> None:
    """Read, reckon, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('words', nargs='+', metavar='YAML | key=value', help='a stage or sequence, and overrides')
    parser.add_argument('--gpu', default='h100', help=f'{", ".join(GPUS)}, or a peak in FLOP/s (default: h100)')
    parser.add_argument('--gpus', type=int, help="that each run is on (default: a sequence's nodes x nproc, or 8)")
    parser.add_argument('--mfu', type=float, default=0.4, help='model FLOPs utilisation (default: 0.4)')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the numbers there too')
    arguments = parser.parse_intermixed_args(argv)
    # rich would take a log file for a narrow terminal
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        configs, stages, gpus = read(arguments.words)
        print_phases(configs, console)
        costs = print_costs(
            configs, console, gpu=arguments.gpu, gpus=arguments.gpus or gpus, mfu=arguments.mfu, stages=stages
        )
    except (ValueError, StorageError) as error:
        sys.exit(f'{arguments.words[0]}: {error}')
    except (KeyError, TypeError, AttributeError) as error:
        sys.exit(f'{arguments.words[0]} is not of the form llm-foundry reads: {error!r}')
    if arguments.json:
        totals = {
            name: {'memory_total': cost.memory.total, 'disk_total': cost.disk.total} for name, cost in costs.items()
        }
        write_json(arguments.json, {name: {**asdict(cost), **totals[name]} for name, cost in costs.items()})


if __name__ == '__main__':
    main()
