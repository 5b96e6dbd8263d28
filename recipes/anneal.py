# SPDX-License-Identifier: Apache-2.0
"""A branch: the learning rate of a run annealed from one of its checkpoints, to have a model to use.

    composer -n 8 recipes/anneal.py runs/trunk/latest-rank0.pt t_anneal=45000000000tok
    python recipes/anneal.py runs/trunk/ep0-ba900-rank0.pt t_anneal=100ba anneal=linear alpha_f=0 save_folder=runs/a
    python recipes/anneal.py runs/trunk/latest-rank0.pt t_anneal=100ba --dry-run

The checkpoint must be of the constant phase of a run of continue_pretraining.py, whose YAML is the branch's: the same
model, optimizer state, learning rate, and data, read on behind what the trunk has read. Any other ``key=value`` of an
llm-foundry YAML changes that, such as another mix: ``train_loader.dataset.new={...}``. The trunk stays as it is and can
be trained on. Run the same command again after a crash. ``save_folder`` is ``<trunk>-anneal-ba<batch>`` by default.
"""

import os
import sys

from cpt_algorithms.launch.processes import die_with_parent

if __name__ == '__main__' and 'LOCAL_RANK' in os.environ:
    # if the launcher is killed, do not train on beside the restarted run; the imports below take seconds
    die_with_parent()

import argparse
from pathlib import Path
from typing import Any

import continue_pretraining
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cpt_algorithms.checkpoints.save_folder import batch_of, resolve_latest
from cpt_algorithms.files import StorageError, is_remote, read_json
from cpt_algorithms.sequence.branches import anneal_branch
from cpt_algorithms.sequence.expand import ANNEAL_KEYS, NOT_OF_A_BRANCH
from cpt_algorithms.stage.preflight import resolve


def branch_of(checkpoint: str, overrides: list[str]) -> dict[str, Any]:
    """The YAML of the branch.

    Args:
        checkpoint: A checkpoint of the trunk.
        overrides: ``key=value``.

    Raises:
        ValueError: If it is no checkpoint of a run, the trunk is not in its constant phase, or a key is missing.
    """
    try:
        if is_remote(checkpoint):
            real = resolve_latest(checkpoint)
        else:
            link = Path(checkpoint)
            real = str(link.with_name(os.readlink(link)) if link.is_symlink() else link)
        folder, _, name = real.rpartition('/')
        batch, stage = batch_of(name), read_json(f'{folder or "."}/stage.json')
        given: Any = OmegaConf.to_container(OmegaConf.from_cli(overrides), resolve=True)
    except (OSError, StorageError, OmegaConfBaseException) as error:
        raise ValueError(f'{checkpoint}: {error}') from None
    if not batch or not stage:
        raise ValueError(
            f'{checkpoint} is not a checkpoint of a run of continue_pretraining.py (ep...-ba..., or latest)'
        )
    how = {key: given.pop(key) for key in ANNEAL_KEYS if key in given}
    if 't_anneal' not in how:
        raise ValueError('t_anneal is missing: the length of the branch, such as t_anneal=45000000000tok')
    if wrong := [key for key in (*NOT_OF_A_BRANCH, 'load_path') if key in given]:
        raise ValueError(
            f'{wrong[0]}: a branch has this from its trunk; {", ".join(ANNEAL_KEYS)} say how it is annealed'
        )
    run_name = given.pop('run_name', None) or f'{stage["run_name"]}-anneal-ba{batch}'
    save_folder = given.pop('save_folder', None) or '/'.join(filter(None, [folder.rpartition('/')[0], run_name]))
    try:
        branch = anneal_branch(stage['config'], run_name, save_folder, real, batch, **how)
    except ValueError as error:
        raise ValueError(f'{checkpoint}: {error}') from None
    # streams in place of the trunk's, and not both
    dataset, own = branch['train_loader']['dataset'], given.get('train_loader', {}).get('dataset', {})
    if 'new' in own:
        del dataset['new']
    if 'streams' in (own.get('replay') or {}):
        (dataset.get('replay') or {}).pop('streams', None)
    merged = OmegaConf.merge(OmegaConf.create(branch), OmegaConf.create(given))
    return resolve(OmegaConf.to_container(merged, resolve=True))  # pyright: ignore[reportArgumentType]


def main() -> None:
    """Check, anneal, export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', help="a trunk's checkpoint, local or a URI")
    parser.add_argument('overrides', nargs='*', help='key=value: t_anneal, anneal, alpha_f, and of the YAML')
    parser.add_argument('--dry-run', action='store_true', help='check everything, print phases and cost, and stop')
    arguments = parser.parse_args()
    try:
        cfg = branch_of(arguments.checkpoint, arguments.overrides)
    except ValueError as error:
        sys.exit(f'no branch was started: {error}')
    continue_pretraining.check_and_run(cfg, arguments.checkpoint, arguments.dry_run)


if __name__ == '__main__':
    main()
