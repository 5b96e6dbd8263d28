# SPDX-License-Identifier: Apache-2.0
"""Merge instead of anneal: a run's last checkpoints averaged, then evaluated and exported like a run that was trained.

    python recipes/merge.py runs/merged/run.yaml          # written by sequence.py for a stage's branches

The YAML is the trunk's, with ``variables.merge: {of: save_folder of the trunk, batch: its last, last: 5, every: 100ba,
weights: uniform}``. scripts/average_checkpoints.py averages; ``merged.pt`` in ``save_folder`` is what a stage can start
from. To average by hand, use that script.
"""

import os

from cpt_algorithms.launch.processes import die_with_parent

if __name__ == '__main__' and 'LOCAL_RANK' in os.environ:
    # if the launcher is killed, do not go on beside the restarted run; the imports below take seconds
    die_with_parent()

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from composer.utils import dist, get_device
from continue_pretraining import DATASETS_LOCK, evaluate, load, note_lineage
from filelock import FileLock, Timeout
from llmfoundry.command_utils import evaluate as evaluate_losses
from llmfoundry.utils.config_utils import EVAL_CONFIG_KEYS
from omegaconf import OmegaConf

from cpt_algorithms.checkpoints.guard import guard_loading
from cpt_algorithms.files import read_json, write_json

AVERAGE = Path(__file__).parents[1] / 'scripts' / 'average_checkpoints.py'


def average(merge: dict[str, Any], out: Path, kind: str) -> None:
    """Make ``out`` of the trunk's checkpoints, unless it is there.

    Raises:
        SystemExit: If that fails; the script has said why.
    """
    if out.exists():
        return
    how = ['--last', str(merge['last']), '--every', str(merge['every']), '--weights', str(merge['weights'])]
    command = [sys.executable, str(AVERAGE), str(merge['of']), *how, '--to', kind, '--out', str(out)]
    # left alone, it would have a restart refused, which makes the same
    if subprocess.run(command, check=False, preexec_fn=die_with_parent).returncode:
        sys.exit(f'the checkpoints of {merge["of"]} could not be averaged')


def losses_of(cfg: dict[str, Any], checkpoint: Path) -> None:
    """Have ``final_loss`` and ``forgetting`` write what the merged weights are worth."""
    config = {key: value for key, value in cfg.items() if key in EVAL_CONFIG_KEYS}
    if config.get('fsdp_config'):
        config['fsdp_config'] = {**config['fsdp_config'], 'state_dict_type': 'full'}
    config['callbacks'] = {
        name: cfg['callbacks'][name] for name in ('final_loss', 'forgetting') if name in cfg['callbacks']
    }
    # llm-foundry's evaluation judges by the metrics of training
    config['model'] = {**cfg['model'], 'use_train_metrics': True}
    config |= {'tokenizer': cfg['tokenizer'], 'load_path': str(checkpoint), 'log_config': False}
    if os.environ.get('LOCAL_RANK', '0') == '0':
        DATASETS_LOCK.acquire()
    try:
        evaluate_losses(OmegaConf.create(config))
    finally:
        DATASETS_LOCK.release(force=True)


def main() -> None:
    """Average, evaluate, export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('yaml', help='a train YAML with variables.merge')
    arguments = parser.parse_args()
    cfg = load(arguments.yaml, [])
    merge, suite = cfg['variables']['merge'], cfg['variables'].get('lm_eval')
    folder, checkpoint = Path(cfg['save_folder']), Path(cfg['save_folder'], 'merged.pt')
    folder.mkdir(parents=True, exist_ok=True)
    done = read_json(folder / 'done.json')
    if done and (not suite or done['lm_eval'] == suite):
        print(f'{cfg["run_name"]}: finished already')
        return
    rank_zero, lock = os.environ.get('RANK', '0') == '0', FileLock(folder / '.lock')
    if int(os.environ.get('WORLD_SIZE', '1')) > 1:
        dist.initialize_dist(get_device(None), timeout=cfg.get('dist_timeout', 6 * 3600.0))  # averaging
    if rank_zero:
        try:
            lock.acquire(timeout=30)
        except Timeout:
            sys.exit(f'save_folder={folder}: another process is at work there; wait for it or stop it')
        note_lineage(cfg, str(folder), resumes=False)
        average(merge, checkpoint, 'pt')
        average(merge, folder / 'huggingface' / f'ba{merge["batch"]}', 'hf')
    dist.barrier()
    guard_loading()
    if not done:
        losses_of(cfg, checkpoint)
    if rank_zero:
        done = {'batch': 0, 'lm_eval': None}
        write_json(folder / 'done.json', done)
        if suite and evaluate(folder, suite)[1]:
            write_json(folder / 'done.json', {**done, 'lm_eval': suite})


if __name__ == '__main__':
    main()
