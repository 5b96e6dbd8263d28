# SPDX-License-Identifier: Apache-2.0
"""Train one stage and export it: locks, what a kill left behind, lineage, resuming, object storage, lm-eval."""

import logging
import multiprocessing
import os
import platform
import secrets
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from composer import Trainer
from composer.callbacks import CheckpointSaver
from composer.core import Callback, State
from composer.loggers import Logger, RemoteUploaderDownloader, remote_uploader_downloader
from composer.utils import dist, get_device, parse_uri, remote_uploader
from filelock import FileLock, Timeout
from llmfoundry import registry
from llmfoundry.command_utils import train
from omegaconf import OmegaConf
from torch.distributed.checkpoint.api import CheckpointException

from cpt_algorithms.checkpoints.errors import CheckpointError
from cpt_algorithms.checkpoints.guard import guard_loading
from cpt_algorithms.checkpoints.save_folder import (
    batch_of,
    fetch_checkpoint,
    latest_link,
    newest_complete,
    repair,
    resolve_latest,
)
from cpt_algorithms.evaluation.lm_eval import evaluate_runs
from cpt_algorithms.evaluation.suite import digest_of, load_suite
from cpt_algorithms.files import (
    StorageError,
    exists,
    holder_of,
    is_remote,
    read_json,
    remove_partials,
    take,
    write_atomic,
    write_json,
)
from cpt_algorithms.ranks import on_rank_zero
from cpt_algorithms.replay.dataset_numbers import unique_shm_prefixes
from cpt_algorithms.replay.streams import StreamError
from cpt_algorithms.stage.console_line import ConsoleLine
from cpt_algorithms.stage.ending import Ending, has_ended
from cpt_algorithms.stage.preflight import PreflightError, preflight
from cpt_algorithms.stage.record import done_with
from cpt_algorithms.stage.restart_checks import format_problem, write_record
from cpt_algorithms.stage.saving import StoppedError, disk_problem, savers
from cpt_algorithms.stage.stage import Stage

__all__ = ['DATASETS_LOCK', 'check_or_exit', 'evaluate', 'train_stage']

# Streaming numbers the datasets of a machine, and two runs that start at the same moment can pick the same number.
DATASETS_LOCK = FileLock(Path(tempfile.gettempdir()) / f'cpt_algorithms_datasets_{os.getuid()}.lock')


class DatasetsBuilt(Callback):
    """Lets the next run of this machine build its datasets."""

    def init(self, state: State, logger: Logger) -> None:
        """The trainer is made after its dataloaders."""
        DATASETS_LOCK.release()


class OneWriter(Callback):
    """Saves into object storage only while no other process has started to, and keeps the local disk free.

    There are no locks in object storage. Every start leaves its token in ``writer.json``: the process that started last
    goes on, another stops with an error when it comes to its next checkpoint, before it writes it.

    Args:
        folder: The run's ``save_folder``.
        token: What this start has left there.
    """

    def __init__(self, folder: str, token: str) -> None:
        self.folder, self.token = folder, token

    def after_load(self, state: State, logger: Logger) -> None:
        """Look before every checkpoint."""
        for saver in savers(state):
            self._guard(saver)

    def _guard(self, saver: CheckpointSaver) -> None:
        save = saver._save_checkpoint

        def save_if_it_is_ours(state: State, logger: Logger) -> None:
            writer = on_rank_zero(lambda: read_json(f'{self.folder}/writer.json')) or {}
            if writer.get('token') != self.token:
                raise StoppedError(
                    f'save_folder={self.folder}: another process has started to train there '
                    f'({writer.get("host")}, process {writer.get("pid")}), and goes on; this one stops'
                )
            save(state, logger)
            # what is being uploaded is a copy; Composer deletes this one on rank 0 only, or never
            shutil.rmtree(saver.folder, ignore_errors=True)

        saver._save_checkpoint = save_if_it_is_ours


def fork_upload_workers() -> None:
    """Let Composer fork its upload workers from one process that has imported what they need, and that dies with us.

    It spawns them, eight for each rank: every one imports everything again, for ten seconds and almost a gigabyte, and
    lives on if the run is killed.
    """
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['cpt_algorithms.stage.upload_workers'])
    for module in (remote_uploader, remote_uploader_downloader):
        vars(module)['multiprocessing'] = SimpleNamespace(get_context=lambda method: context)


def wait_for_uploads(trainer: Trainer) -> None:
    """Return when the export is in the bucket; Composer itself waits only until the upload of its last file has begun.

    Raises:
        Exception: What went wrong with an upload.
    """
    for callback in trainer.state.callbacks:
        if isinstance(callback, RemoteUploaderDownloader):
            while callback._logged_objects or callback._enqueued_objects:
                callback._check_workers()
                time.sleep(0.1)


def _tracked(loggers: dict[str, Any], wandb_id: str) -> dict[str, Any]:
    """Loggers with which a restarted run goes on as the same W&B run."""
    given = loggers.get('wandb') or {}
    if 'wandb' not in loggers or not given.get('rank_zero_only', True):
        return loggers
    init = {'id': wandb_id, 'resume': 'allow', **(given.get('init_kwargs') or {})}
    return {**loggers, 'wandb': {**given, 'init_kwargs': init}}


def evaluate(folder: Path, given: str | list[str]) -> tuple[dict[str, float], bool]:
    """Run lm-eval on what was exported, beside the parent.

    Returns:
        The scores as metrics, and whether there is nothing left to try again.
    """
    try:
        suite = load_suite(given)
        results = evaluate_runs([folder], suite)
    except Exception as error:  # of any kind: the model is trained and exported, and others may start from it
        print(f'{folder}: lm-eval could not be run; the same command tries again: {type(error).__name__}: {error}')
        return {}, False
    metrics = {}
    for model, result in results.items():
        average = model.name.partition('-')[2]
        for name, task in result['tasks'].items():
            metrics[f'lm_eval/{name}/{average}' if average else f'lm_eval/{name}'] = task['score']
    return metrics, all(set(result['missing']) == set(suite.missing) for result in results.values())


def take_local(folder: Path, lock: FileLock) -> None:
    """Lock a local folder, and repair it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        take(lock, folder.name, timeout=30)
    except Timeout:
        sys.exit(f'save_folder={folder}: {holder_of(lock)} is training there; wait for it or stop it')
    remove_partials(folder)
    repair(folder)


def take_remote(folder: str) -> str:
    """The same in object storage, where nothing is locked and Composer deletes nothing: the token of this start."""
    token = secrets.token_hex(8)
    write_json(f'{folder}/writer.json', {'token': token, 'host': platform.node(), 'pid': os.getpid()})
    if (checkpoint := newest_complete(folder)[1]) is not None:  # to which ``latest`` leads from now on
        link = latest_link(sharded=not checkpoint.endswith('.pt'))
        write_atomic(f'{folder}/{link}.symlink', parse_uri(checkpoint)[2].encode())
    return token


def is_at_end(stage: Stage, checkpoint: str) -> bool:
    """Whether a checkpoint of a stage is its last, by what it says itself.

    Cost: of one in object storage, a download, unless its batches could not have been enough and nothing stops early.
    """
    if not is_remote(checkpoint):
        return has_ended(checkpoint, stage.max_duration)
    can_stop = 'early_stopper' in stage.callbacks.given
    # of rows as long as they can be
    if not can_stop and stage.batches is not None and (batch_of(checkpoint) or 0) < stage.batches:
        return False
    with tempfile.TemporaryDirectory() as here:
        return has_ended(fetch_checkpoint(checkpoint, Path(here)), stage.max_duration)


def check_or_exit(stage: Stage, what: str) -> None:
    """Refuse a stage before anything expensive starts: on all ranks, with every problem, and exit.

    Args:
        stage: The stage.
        what: What to call its YAML.
    """
    world_size, rank_zero = dist.get_world_size(), dist.get_global_rank() == 0
    if world_size > 1:  # llm-foundry's tokenizer builder wants it; train() finds it done
        dist.initialize_dist(get_device(None), timeout=stage.dist_timeout)
    problems: list[str] = []
    try:
        preflight(stage, world_size)
    except PreflightError as error:
        problems = error.problems
    if world_size > 1:  # a cache or a network may be another on each node, and all must stop at once
        problems = list(dict.fromkeys(problem for each in dist.all_gather_object(problems) for problem in each))
    if problems:
        sys.exit(f'{what} was refused before training:\n{PreflightError(problems)}' if rank_zero else 1)


def train_stage(stage: Stage) -> None:
    """Train and export what passed preflight, unless that is done already; exit with one line if it has to stop."""
    # Composer has downloaded a copy, which messages name
    copied = f' (copied from load_path={stage.load_path})' if is_remote(stage.load_path or '') else ''
    try:
        _train(stage)
    except (StorageError, StreamError, CheckpointError, StoppedError) as error:
        sys.exit(f'{stage.run_name} stopped: {error}{copied}')
    except CheckpointException as failures:  # torch's, of all ranks
        for error, _ in failures.failures.values():
            if isinstance(error, CheckpointError):
                sys.exit(f'{stage.run_name} stopped: {error}{copied}')
        raise
    except OSError as error:
        if (reason := disk_problem(error)) is None:
            raise
        sys.exit(f'{stage.run_name} stopped: {error.filename or stage.folder}: {reason}')


@dataclass(frozen=True)
class _Begun:
    """What rank 0 found, and did, in a run's folder before the trainer is made."""

    latest: int  # batch of the newest checkpoint; 0 without any
    newest: str | None  # that checkpoint
    is_trained: bool  # whether only the export is left
    parent_is_evaluated: bool
    token: str | None  # of this start, in object storage
    parent: str | None  # load_path, of which links are followed
    wandb_id: str


def _begin(stage: Stage, lock: FileLock) -> _Begun:
    folder, remote, parent = stage.folder, is_remote(stage.folder), stage.load_path
    token = take_remote(folder) if remote else take_local(Path(folder), lock)
    latest, newest = newest_complete(folder)
    record = write_record(stage, resumes=latest > 0)
    parent_is_evaluated = exists(f'{folder}/forgetting.json') and (latest > 0 or not remote)
    # Composer finds latest-rank0.pt in object storage, but no latest-sharded-rank0
    if parent and is_remote(parent):
        parent = resolve_latest(parent)
    is_trained = newest is not None and is_at_end(stage, newest)
    return _Begun(latest, newest, is_trained, parent_is_evaluated, token, parent, record.wandb_id)


def _train_yaml(stage: Stage, begun: _Begun) -> dict[str, Any]:
    """What LLM Foundry's ``train`` is given."""
    cfg = {**stage.to_train_yaml(), 'save_folder': stage.folder, 'load_path': begun.parent}
    cfg['loggers'] = _tracked(cfg.get('loggers') or {}, begun.wandb_id)
    if cfg.get('log_to_console', True) and not cfg.get('progress_bar'):
        registry.loggers.register('console_line', func=ConsoleLine)
        cfg['log_to_console'] = False
        cfg['loggers']['console_line'] = {'log_interval': str(stage.console_log_interval)}
    if begun.parent_is_evaluated:
        cfg['eval_first'] = False
    if dist.get_world_size() == 1 and cfg['model'].get('init_device') == 'mixed':
        cfg['model'] = {**cfg['model'], 'init_device': 'cpu'}  # all that one process can mean
    if not begun.latest:
        # there is nothing to resume; Composer would ask W&B for it, which fails if W&B is offline
        cfg['autoresume'] = False
    if is_remote(stage.folder):
        # Composer's own way takes the copy that an earlier resume has left in the working folder, however old
        cfg['autoresume'] = False
        if begun.newest:
            cfg |= {'load_path': begun.newest, 'load_weights_only': False, 'load_ignore_keys': None}
        # half of a checkpoint may be there, or come yet from a killed process; OneWriter keeps others away
        cfg |= {'save_overwrite': True, 'save_num_checkpoints_to_keep': -1}
        fork_upload_workers()
        registry.callbacks.register('one_writer', func=OneWriter)
        cfg['callbacks']['one_writer'] = {'folder': stage.folder, 'token': begun.token}
    # killed between the last checkpoint and the end of the export
    cfg['only_hf_checkpoint'] = begun.is_trained
    registry.callbacks.register('datasets_built', func=DatasetsBuilt)
    cfg['callbacks']['datasets_built'] = {}
    registry.callbacks.register('ending', func=Ending)
    cfg['callbacks']['ending'] = {'max_duration': str(stage.max_duration)}
    return cfg


def _train(stage: Stage) -> None:
    guard_loading()  # stage_start may say otherwise
    unique_shm_prefixes()
    rank_zero, folder = dist.get_global_rank() == 0, stage.folder
    if (done := done_with(stage)) is not None:
        if rank_zero:
            print(f'{stage.run_name}: finished already, at batch {done["batch"]}')
            asked = digest_of(stage.suite) if stage.suite else None
            if stage.suite and done.get('lm_eval') != asked and evaluate(Path(folder), stage.suite)[1]:
                write_json(f'{folder}/done.json', {**done, 'lm_eval': asked})
        return
    if problem := format_problem(stage, dist.get_world_size()):
        raise StoppedError(problem)
    lock = FileLock(Path(folder) / '.lock')  # a local folder is ours until we return
    cfg = _train_yaml(stage, on_rank_zero(lambda: _begin(stage, lock)))
    if os.environ.get('LOCAL_RANK', '0') == '0':
        take(DATASETS_LOCK, f'{stage.run_name}, building model and datasets')
    # what the first step used, at any python_log_level
    logging.getLogger('cpt_algorithms').setLevel(logging.INFO)
    logging.getLogger('cpt_algorithms.schedulers').setLevel(logging.WARNING)  # the phases have been printed
    try:
        trainer = train(OmegaConf.create(cfg))
    finally:
        DATASETS_LOCK.release(force=True)  # which it had kept if it failed before the datasets were built
    wait_for_uploads(trainer)
    if rank_zero:
        _finish(stage, trainer)


def _finish(stage: Stage, trainer: Trainer) -> None:
    """Note that a run is done, and judge what it exported."""
    now, folder = trainer.state.timestamp, stage.folder
    time = {'ep': now.epoch.value, 'ba': now.batch.value, 'sp': now.sample.value, 'tok': now.token.value}
    done = {'batch': time['ba'], 'time': time, 'max_duration': str(stage.max_duration), 'lm_eval': None}
    write_json(f'{folder}/done.json', done)
    print(f'{stage.run_name}: finished at batch {time["ba"]}; checkpoints and export lie in {folder}')
    if stage.suite:
        # their memory is wanted for the exported models
        for optimizer in trainer.state.optimizers:
            optimizer.state.clear()
        trainer.state.model.to_empty(device='meta')
        metrics, complete = evaluate(Path(folder), stage.suite)
        trainer.logger.log_metrics(metrics)
        if complete:
            write_json(f'{folder}/done.json', {**done, 'lm_eval': digest_of(stage.suite)})
