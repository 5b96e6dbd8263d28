# SPDX-License-Identifier: Apache-2.0
"""One stage: parent checkpoint + new data + replay + schedule -> checkpoints and a Hugging Face model.

    composer -n 8 recipes/continue_pretraining.py yamls/continue_pretraining/tiny_cpu.yaml [key=value ...]
    python recipes/continue_pretraining.py STAGE.yaml --dry-run        # every check, phases and cost; trains nothing

The YAML is an ordinary llm-foundry train YAML. Everything that can be checked without training is checked first; then
llm-foundry trains; at the end the model lies in ``save_folder/huggingface``. With ``variables.lm_eval: SUITE.yaml``, it
and its averages are then evaluated on the suite. Run the same command again after a crash: it goes on from the latest
checkpoint, and does nothing if the stage is done. ``save_folder`` may be a URI such as ``s3://bucket/run``: then what
is needed to go on is there and not on this machine.
"""

import argparse
import logging
import multiprocessing
import os
import platform
import secrets
import shutil
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cpt_algorithms.launch.processes import die_with_parent

if __name__ == '__main__' and 'LOCAL_RANK' in os.environ:
    # if the launcher is killed, do not train on beside the restarted run; the imports below take seconds
    die_with_parent()

from composer import Trainer
from composer.callbacks import CheckpointSaver
from composer.core import Callback, State
from composer.loggers import Logger, RemoteUploaderDownloader, remote_uploader_downloader
from composer.utils import dist, get_device, parse_uri, remote_uploader
from filelock import FileLock, Timeout
from llmfoundry import registry
from llmfoundry.command_utils import train
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from torch.distributed.checkpoint.api import CheckpointException
from yaml import YAMLError

from cpt_algorithms.checkpoints.errors import CheckpointError
from cpt_algorithms.checkpoints.exports import folder_of_pretrained, pretrained_model_of
from cpt_algorithms.checkpoints.guard import guard_loading
from cpt_algorithms.checkpoints.save_folder import latest_link, newest_complete, repair, resolve_latest
from cpt_algorithms.cost.tables import print_costs
from cpt_algorithms.evaluation.lm_eval import evaluate_runs
from cpt_algorithms.evaluation.suite import load_suite
from cpt_algorithms.files import StorageError, exists, is_remote, read_json, read_yaml, write_atomic, write_json
from cpt_algorithms.replay.dataset_numbers import unique_shm_prefixes
from cpt_algorithms.replay.streams import StreamError
from cpt_algorithms.schedulers.phases import phases_of
from cpt_algorithms.stage.preflight import PreflightError, latest_batch, preflight, resolve, total_batches
from cpt_algorithms.stage.saving import StoppedError, disk_problem

# Streaming numbers the datasets of a machine, and two runs that start at the same moment can pick the same number.
DATASETS_LOCK = FileLock(Path(tempfile.gettempdir()) / f'cpt_algorithms_datasets_{os.getuid()}.lock')
STACK = ('cpt-algorithms', 'llm-foundry', 'mosaicml', 'mosaicml-streaming', 'torch', 'transformers')


unique_shm_prefixes()


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
        for saver in state.callbacks:
            if isinstance(saver, CheckpointSaver):
                self._guard(saver)

    def _guard(self, saver: CheckpointSaver) -> None:
        save = saver._save_checkpoint

        def save_if_it_is_ours(state: State, logger: Logger) -> None:
            there = [read_json(f'{self.folder}/writer.json')] if dist.get_global_rank() == 0 else [None]
            dist.broadcast_object_list(there)
            writer = there[0] or {}
            if writer.get('token') != self.token:
                raise RuntimeError(
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
        module.multiprocessing = SimpleNamespace(get_context=lambda method: context)


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


def load(yaml: str, overrides: list[str]) -> dict[str, Any]:
    """The YAML with ``key=value`` overrides, resolved."""
    try:
        merged = OmegaConf.merge(read_yaml(yaml), OmegaConf.from_cli(overrides))
        return resolve(OmegaConf.to_container(merged, resolve=True))  # pyright: ignore[reportArgumentType]
    except (OSError, OmegaConfBaseException, YAMLError, ValueError) as error:
        sys.exit(f'{yaml} cannot be read: {error}')


def print_phases(cfg: dict[str, Any]) -> None:
    """The schedule, as the multipliers of ``optimizer.lr`` that each batch will be trained with."""
    if phases := phases_of(cfg['scheduler'], cfg['max_duration']):
        print(
            f'{cfg["run_name"]}: {cfg["scheduler"]["name"]}, times lr {cfg["optimizer"]["lr"]:g}\n{phases}', flush=True
        )


def parent_files(cfg: dict[str, Any]) -> dict[str, list[int]] | None:
    """Size and time of the files of the model that a stage starts from; None if they are not here."""
    base = pretrained_model_of(cfg)
    try:
        parent = folder_of_pretrained(base) if base else Path(cfg.get('load_path') or '')
        stats = {file.name: file.stat() for file in (sorted(parent.iterdir()) if parent.is_dir() else [parent])}
    except (OSError, ValueError):
        return None
    # to be compared for equality: which of two is older is a matter of the clock, which may have been set
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def note_lineage(cfg: dict[str, Any], folder: str, resumes: bool) -> None:
    """``stage.json``: whose checkpoints these are, from which parent, on what data, made with what.

    The parent is a checkpoint, or the name of a pretrained model as the YAML gives it; null from scratch.

    Written when the stage starts, and when a restart extends it. In a local folder, the parent's losses of a start that
    was stopped before its first checkpoint are kept if nothing has changed since, and otherwise removed.
    """
    known, losses = f'{folder}/stage.json', Path(folder) / 'forgetting.json'
    before = read_json(known) or {}
    wandb_id = before.pop('wandb_id', secrets.token_hex(4))
    lineage = {
        'run_name': cfg['run_name'],
        'parent': cfg.get('load_path') or pretrained_model_of(cfg),
        'data': cfg['train_loader']['dataset'],
        'max_duration': cfg['max_duration'],
        'config': cfg,
        'versions': {name: version(name) for name in STACK},
        'parent_files': parent_files(cfg),
    }
    if resumes and before.get('max_duration') == cfg['max_duration']:
        return
    if not is_remote(folder) and losses.exists() and not resumes:
        if before != lineage or lineage['parent_files'] is None:
            losses.unlink()
    write_json(known, {**lineage, 'wandb_id': wandb_id})


def track(cfg: dict[str, Any], folder: str) -> None:
    """Let a restarted run go on as the same W&B run."""
    loggers = cfg.get('loggers') or {}
    given = loggers.get('wandb') or {}
    wandb_id = read_json(f'{folder}/stage.json').get('wandb_id')
    if 'wandb' in loggers and wandb_id and given.get('rank_zero_only', True):
        init = {'id': wandb_id, 'resume': 'allow', **(given.get('init_kwargs') or {})}
        loggers['wandb'] = {**given, 'init_kwargs': init}


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
    """Lock a local folder, repair it, and forget that a shorter run, which is now extended, was done."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=30)
    except Timeout:
        sys.exit(f'save_folder={folder}: another process is training there; wait for it or stop it')
    repair(folder)
    (folder / 'done.json').unlink(missing_ok=True)


def take_remote(folder: str) -> tuple[str, str | None]:
    """The same in object storage, where nothing is locked and Composer deletes nothing.

    Returns:
        The token of this start, and the newest whole checkpoint, to which ``latest`` leads now.
    """
    token = secrets.token_hex(8)
    write_json(f'{folder}/writer.json', {'token': token, 'host': platform.node(), 'pid': os.getpid()})
    if exists(f'{folder}/done.json'):
        write_json(f'{folder}/done.json', {'batch': 0})
    checkpoint = newest_complete(folder)[1]
    if checkpoint is not None:
        link = latest_link(sharded=not checkpoint.endswith('.pt'))
        write_atomic(f'{folder}/{link}.symlink', parse_uri(checkpoint)[2].encode())
    return token, checkpoint


def main() -> None:
    """Check, train, export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('yaml', help='an llm-foundry train YAML')
    parser.add_argument('overrides', nargs='*', help='key=value, as for llmfoundry train')
    parser.add_argument('--dry-run', action='store_true', help='check everything, print phases and cost, and stop')
    arguments = parser.parse_args()
    check_and_run(load(arguments.yaml, arguments.overrides), arguments.yaml, arguments.dry_run)


def check_and_run(cfg: dict[str, Any], what: str, dry_run: bool) -> None:
    """Refuse, show, and unless it is a dry run, train and export; ``what`` names the YAML in messages."""
    world_size = int(os.environ.get('WORLD_SIZE', '1'))
    rank_zero = os.environ.get('RANK', '0') == '0'
    if world_size > 1:  # llm-foundry's tokenizer builder wants it; train() finds it done
        dist.initialize_dist(get_device(None), timeout=cfg.get('dist_timeout', 600.0))
    problems = []
    try:
        preflight(cfg, world_size)
    except PreflightError as error:
        problems = error.problems
    if world_size > 1:  # a cache or a network may be another on each node, and all must stop at once
        problems = list(dict.fromkeys(problem for each in dist.all_gather_object(problems) for problem in each))
    if problems:
        sys.exit(f'{what} was refused before training:\n{PreflightError(problems)}' if rank_zero else 1)
    if rank_zero:
        print_phases(cfg)
    if dry_run:
        if rank_zero:
            try:
                print_costs({cfg['run_name']: cfg}, Console(width=140), gpus=world_size)
            except ValueError as error:  # epochs, mixtures of experts: they can be trained
                print(f'what it will cost is not known: {error}')
        return
    try:
        run(cfg, world_size, rank_zero)
    except (StorageError, StreamError, CheckpointError, StoppedError) as error:
        sys.exit(f'{cfg["run_name"]} stopped: {error}{copy_of(cfg)}')
    except CheckpointException as failures:  # torch's, of all ranks
        for error, _ in failures.failures.values():
            if isinstance(error, CheckpointError):
                sys.exit(f'{cfg["run_name"]} stopped: {error}{copy_of(cfg)}')
        raise
    except OSError as error:
        if (reason := disk_problem(error)) is None:
            raise
        sys.exit(f'{cfg["run_name"]} stopped: {error.filename or cfg["save_folder"]}: {reason}')


def copy_of(cfg: dict[str, Any]) -> str:
    """Where a checkpoint comes from that Composer has downloaded, for messages that name the copy."""
    return f' (copied from load_path={cfg["load_path"]})' if is_remote(cfg.get('load_path') or '') else ''


def run(cfg: dict[str, Any], world_size: int, rank_zero: bool) -> None:
    """Train and export what passed preflight, unless that is done already."""
    guard_loading()  # stage_start may say otherwise
    suite = (cfg.get('variables') or {}).get('lm_eval')
    cfg['save_folder'] = folder = cfg['save_folder'].format(run_name=cfg['run_name'])
    total = total_batches(cfg)
    done = read_json(f'{folder}/done.json') or {'batch': 0}
    if done['batch'] and (total is None or done['batch'] >= total):
        if rank_zero:
            print(f'{cfg["run_name"]}: finished already, at batch {done["batch"]}')
            if suite and done.get('lm_eval') != suite and evaluate(Path(folder), suite)[1]:
                write_json(f'{folder}/done.json', {**done, 'lm_eval': suite})
        return
    remote = is_remote(folder)
    lock = FileLock(Path(folder) / '.lock')  # a local folder is ours until we return
    there: list[Any] = [None] * 5
    if rank_zero:
        token = checkpoint = None
        if remote:
            token, checkpoint = take_remote(folder)
        else:
            take_local(Path(folder), lock)
        latest = latest_batch(folder)
        note_lineage(cfg, folder, latest > 0)
        track(cfg, folder)
        parent_is_evaluated = exists(f'{folder}/forgetting.json') and (latest > 0 or not remote)
        # Composer finds latest-rank0.pt in object storage, but no latest-sharded-rank0
        parent = resolve_latest(cfg['load_path']) if is_remote(cfg.get('load_path') or '') else cfg.get('load_path')
        there = [latest, parent_is_evaluated, checkpoint, token, parent]
    if world_size > 1:
        dist.broadcast_object_list(there)  # also waits for what rank 0 does above
    latest, parent_is_evaluated, checkpoint, token, cfg['load_path'] = there
    if parent_is_evaluated:
        cfg['eval_first'] = False
    if not latest:
        # there is nothing to resume; Composer would ask W&B for it, which fails if W&B is offline
        cfg['autoresume'] = False
    if remote:
        # Composer's own way takes the copy that an earlier resume has left in the working folder, however old
        cfg['autoresume'] = False
        if checkpoint:
            cfg |= {'load_path': checkpoint, 'load_weights_only': False, 'load_ignore_keys': None}
        # half of a checkpoint may be there, or come yet from a killed process; OneWriter keeps others away
        cfg |= {'save_overwrite': True, 'save_num_checkpoints_to_keep': -1}
        fork_upload_workers()
        registry.callbacks.register('one_writer', func=OneWriter)
        cfg['callbacks']['one_writer'] = {'folder': folder, 'token': token}
    # killed between the last checkpoint and the end of the export
    cfg['only_hf_checkpoint'] = total is not None and latest >= total
    registry.callbacks.register('datasets_built', func=DatasetsBuilt)
    cfg['callbacks']['datasets_built'] = {}
    if os.environ.get('LOCAL_RANK', '0') == '0':
        DATASETS_LOCK.acquire()
    logging.getLogger('cpt_algorithms').setLevel(logging.INFO)  # what the first step used, whatever python_log_level
    try:
        trainer = train(OmegaConf.create(cfg))
    finally:
        DATASETS_LOCK.release(force=True)  # which it had kept if it failed before the datasets were built
    wait_for_uploads(trainer)
    if rank_zero:
        done = {'batch': int(trainer.state.timestamp.batch.value), 'lm_eval': None}
        write_json(f'{folder}/done.json', done)
        if suite:
            # their memory is wanted for the exported models
            for optimizer in trainer.state.optimizers:
                optimizer.state.clear()
            trainer.state.model.to_empty(device='meta')
            metrics, complete = evaluate(Path(folder), suite)
            trainer.logger.log_metrics(metrics)
            if complete:
                write_json(f'{folder}/done.json', {**done, 'lm_eval': suite})


if __name__ == '__main__':
    main()
