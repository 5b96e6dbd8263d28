# SPDX-License-Identifier: Apache-2.0
"""A merge: a run's last checkpoints averaged, then evaluated and exported like a run that was trained."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from composer.utils import dist, get_device
from filelock import FileLock, Timeout
from llmfoundry.command_utils import evaluate as evaluate_losses
from llmfoundry.utils.config_utils import EVAL_CONFIG_KEYS
from omegaconf import OmegaConf

from cpt_algorithms.checkpoints.guard import guard_loading
from cpt_algorithms.checkpoints.save_folder import weights_in
from cpt_algorithms.evaluation.suite import digest_of
from cpt_algorithms.files import StorageError, holder_of, remove_partials, take, write_json
from cpt_algorithms.formatting import first_of
from cpt_algorithms.launch.processes import die_with_parent
from cpt_algorithms.launch.wandb_runs import environment_of_children
from cpt_algorithms.stage.identity import changes
from cpt_algorithms.stage.record import done_with, read_record
from cpt_algorithms.stage.restart_checks import check_restart, write_record
from cpt_algorithms.stage.run import DATASETS_LOCK, evaluate
from cpt_algorithms.stage.stage import Merge, Stage
from cpt_algorithms.weight_averaging.offline.select import AverageError, find, latest

__all__ = ['merge_stage']


def merge_stage(stage: Stage, average_script: Path) -> None:
    """Average, evaluate and export, unless that is done already; exit with one line if it has to stop."""
    merge, suite = stage.merge, stage.suite
    if merge is None:
        sys.exit(f'{stage.run_name}: variables.merge is missing: which checkpoints are averaged')
    folder = Path(stage.folder)
    checkpoint, exported = _made(folder, merge)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        check_restart(stage)
    except ValueError as error:
        sys.exit(f'{stage.run_name} stopped: {error}')
    done = done_with(stage)
    asked = digest_of(suite) if suite else None
    if done and (not suite or done['lm_eval'] == asked):
        print(f'{stage.run_name}: finished already')
        return
    rank_zero, lock = os.environ.get('RANK', '0') == '0', FileLock(folder / '.lock')
    if int(os.environ.get('WORLD_SIZE', '1')) > 1:
        timeout = stage.dist_timeout if 'dist_timeout' in stage.given else 6 * 3600.0  # averaging
        dist.initialize_dist(get_device(None), timeout=timeout)
    if rank_zero:
        try:
            take(lock, folder.name, timeout=30)
        except Timeout:
            sys.exit(f'save_folder={folder}: {holder_of(lock)} is at work there; wait for it or stop it')
        remove_partials(folder)
        _keep_what_is_the_same(stage, folder)
        write_record(stage)
        _average(stage, merge, checkpoint, 'pt', average_script)
        _average(stage, merge, exported, 'hf', average_script)
    dist.barrier()
    guard_loading()
    if not done:
        _measure_losses(stage, checkpoint)
    if rank_zero:
        done = {'batch': 0, 'time': {}, 'max_duration': str(stage.max_duration), 'lm_eval': None}
        write_json(folder / 'done.json', done)
        if suite and evaluate(folder, suite)[1]:
            write_json(folder / 'done.json', {**done, 'lm_eval': asked})


def _made(folder: Path, merge: Merge) -> tuple[Path, Path]:
    """The average, as a checkpoint and as an export."""
    return folder / 'merged.pt', folder / 'huggingface' / f'ba{merge.batch}'


def _keep_what_is_the_same(stage: Stage, folder: Path) -> None:
    """Remove what an unfinished merge has made of another trunk, or otherwise; exit if weights are of no merge."""
    try:
        before = read_record(folder)
    except ValueError as error:
        sys.exit(f'{stage.run_name} stopped: {error}')
    merge = before.config.merge if before is not None else None
    if before is None or merge is None:
        if found := weights_in(folder):
            sys.exit(
                f'{stage.run_name} stopped: save_folder={folder} holds weights ({first_of(found)}), and no stage.json '
                'that says of what they were averaged; choose another save_folder'
            )
    elif changes(before, stage):
        checkpoint, exported = _made(folder, merge)
        checkpoint.unlink(missing_ok=True)
        if exported.exists():
            shutil.rmtree(exported)


def _average(stage: Stage, merge: Merge, out: Path, kind: str, script: Path) -> None:
    """Make ``out`` of the trunk's checkpoints, unless it is there."""
    if out.exists():
        return
    try:
        # what the trunk has trained since, if it goes on, is of no merge at this batch
        found = [one for one in find([merge.of]) if one.batch is None or one.batch <= merge.batch]
        inputs = [one.path for one in latest(found, merge.last, stage.batches_of('every', merge.every))]
        if (newest := max(one.batch or 0 for one in found)) != merge.batch:
            raise AverageError(f'batch {merge.batch:,} is to be the newest, and that is {newest:,}')
    except (AverageError, StorageError) as error:
        sys.exit(f'variables.merge.batch={merge.batch}: the checkpoints of {merge.of} cannot be averaged: {error}')
    command = [sys.executable, str(script), *inputs, '--weights', merge.weights, '--to', kind, '--out', str(out)]
    # left alone, it would have a restart refused, which makes the same
    done = subprocess.run(command, check=False, preexec_fn=die_with_parent, env=environment_of_children(os.environ))
    if done.returncode:
        sys.exit(f'the checkpoints of {merge.of} could not be averaged')


def _measure_losses(stage: Stage, checkpoint: Path) -> None:
    """Have ``final_loss`` and ``forgetting`` write what the merged weights are worth."""
    given = stage.to_train_yaml()
    config = {key: value for key, value in given.items() if key in EVAL_CONFIG_KEYS}
    if config.get('fsdp_config'):
        config['fsdp_config'] = {**config['fsdp_config'], 'state_dict_type': 'full'}
    callbacks = given['callbacks']
    config['callbacks'] = {name: callbacks[name] for name in ('final_loss', 'forgetting') if name in callbacks}
    # llm-foundry's evaluation judges by the metrics of training
    config['model'] = {**given['model'], 'use_train_metrics': True}
    config |= {'tokenizer': given['tokenizer'], 'load_path': str(checkpoint), 'log_config': False}
    if os.environ.get('LOCAL_RANK', '0') == '0':
        take(DATASETS_LOCK, f'{stage.run_name}, building model and datasets')
    try:
        evaluate_losses(OmegaConf.create(config))
    finally:
        DATASETS_LOCK.release(force=True)
