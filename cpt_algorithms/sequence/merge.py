# SPDX-License-Identifier: Apache-2.0
"""A merge: a window, a line or a soup of checkpoints, evaluated and exported like a run that was trained."""

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from math import inf, isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from composer.utils import dist, get_device
from filelock import FileLock, Timeout
from llmfoundry.command_utils import evaluate as evaluate_losses
from llmfoundry.utils.config_utils import EVAL_CONFIG_KEYS
from omegaconf import OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cpt_algorithms.checkpoints.exports import RECIPE, folder_of_pretrained, newest_export
from cpt_algorithms.checkpoints.guard import guard_loading
from cpt_algorithms.checkpoints.save_folder import resolve_latest, weights_in
from cpt_algorithms.evaluation.functional import name_of_point
from cpt_algorithms.evaluation.suite import digest_of
from cpt_algorithms.files import (
    StorageError,
    holder_of,
    is_remote,
    null_as_nan,
    read_json,
    remove_partials,
    take,
    write_json,
)
from cpt_algorithms.formatting import first_of
from cpt_algorithms.stage.identity import changes
from cpt_algorithms.stage.model_card import write_card
from cpt_algorithms.stage.record import done_with, read_record
from cpt_algorithms.stage.restart_checks import check_restart, write_record
from cpt_algorithms.stage.run import DATASETS_LOCK, evaluate
from cpt_algorithms.stage.stage import Merge, Stage
from cpt_algorithms.terminal import make_console, print_table
from cpt_algorithms.weight_averaging.functional import window_weights
from cpt_algorithms.weight_averaging.offline.average_files import average_files
from cpt_algorithms.weight_averaging.offline.select import AverageError, Found, find, latest
from cpt_algorithms.weight_averaging.offline.storage import download

__all__ = ['merge_stage', 'print_line']


def merge_stage(stage: Stage) -> None:
    """Make, evaluate and export, unless that is done already; exit with one line if it has to stop."""
    merge, suite = stage.merge, stage.suite
    if merge is None:
        sys.exit(f'{stage.run_name}: variables.merge is missing: which checkpoints are averaged')
    folder = Path(stage.folder)
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
    lock = FileLock(folder / '.lock')
    if int(os.environ.get('WORLD_SIZE', '1')) > 1:
        timeout = max(stage.dist_timeout, 6 * 3600.0)  # the others wait while one averages, and scores
        dist.initialize_dist(get_device(None), timeout=timeout)
    if _is_first():
        try:
            take(lock, folder.name, timeout=30)
        except Timeout:
            sys.exit(f'save_folder={folder}: {holder_of(lock)} is at work there; wait for it or stop it')
        remove_partials(folder)
        _keep_what_is_the_same(stage, folder, not done)
        if not done:
            write_record(stage)
    dist.barrier()
    guard_loading()
    scored = _make_line(stage, merge, folder) if merge.line else _make_average(stage, merge, folder, not done)
    if _is_first():
        done = {'batch': 0, 'time': {}, 'max_duration': str(stage.max_duration), 'lm_eval': asked if scored else None}
        write_json(folder / 'done.json', done)


def _is_first() -> bool:
    """Whether this is the rank that writes files."""
    return os.environ.get('RANK', '0') == '0'


def _make_average(stage: Stage, merge: Merge, folder: Path, is_new: bool) -> bool:
    """Make a window or a soup; whether nothing of its suite is left to try again."""
    checkpoint, exported = _made(folder, merge)
    if _is_first():
        if not checkpoint.exists():
            inputs = _inputs_of(stage, merge)
            _average(stage, inputs, merge.weights, checkpoint)
        _export(stage, merge, checkpoint, exported)
    dist.barrier()
    if is_new:
        _measure_losses(stage, checkpoint, folder)
    return not _is_first() or _score(stage, folder)


def _make_line(stage: Stage, merge: Merge, folder: Path) -> bool:
    """Make and judge the points of a line, one after another, and keep the best: that of the lowest mean loss.

    What is known of the points goes to ``points``, and into the run's own ``losses.json``; of two that are as good, the
    one nearer to the parent counts. Whether nothing of its suite is left to try again.
    """
    assert merge.line, 'that of a line'
    checkpoint, exported = _made(folder, merge)
    losses: dict[float, Any] = {}
    is_scored, asked = True, digest_of(stage.suite) if stage.suite else None
    inputs = _inputs_of(stage, merge) if _is_first() else []
    for alpha in sorted(merge.line):
        name = name_of_point(alpha)
        place = folder / 'points' / name
        known, scored = read_json(place / 'losses.json'), read_json(place / 'scored.json')
        to_be_scored = asked is not None and (scored or {}).get('lm_eval') != asked
        model, to_score = place / 'model.pt', exported.with_name(f'{exported.name}-{name}')
        if _is_first() and (to_be_scored or not known) and not model.exists():
            place.mkdir(parents=True, exist_ok=True)
            _average(stage, inputs, [1 - alpha, alpha], model)
        dist.barrier()
        if not known:
            _measure_losses(stage, model, place)
            dist.barrier()
        losses[alpha] = read_json(place / 'losses.json')
        if _is_first():
            if to_be_scored:  # lm-eval takes Hugging Face models
                shutil.rmtree(to_score, ignore_errors=True)
                _export(stage, merge, model, to_score, name_of_point(alpha))
                if _score(stage, to_score):
                    write_json(place / 'scored.json', {'lm_eval': asked})
                else:
                    is_scored = False
                shutil.rmtree(to_score)
            for file in place.glob('model.pt*'):
                file.unlink()
    if not _is_first():
        return True
    ended = {
        alpha: {label: rows[-1][2] for label, rows in null_as_nan(measured['losses']).items()}
        for alpha, measured in losses.items()
    }
    means = {alpha: fmean(found.values()) for alpha, found in ended.items()}
    best = min(means, key=lambda alpha: means[alpha] if isfinite(means[alpha]) else inf)
    if not checkpoint.exists():
        _average(stage, inputs, [1 - best, best], checkpoint)
    _export(stage, merge, checkpoint, exported, name_of_point(best))
    points = {
        f'{label}/{name_of_point(alpha)}': rows
        for alpha, measured in losses.items()
        for label, rows in measured['losses'].items()
    }
    write_json(folder / 'losses.json', {**losses[best], 'losses': {**losses[best]['losses'], **points}, 'alpha': best})
    print_line(ended, best, make_console())
    print(f'alpha {best:g} has the lowest mean loss: {checkpoint}, {exported}')
    return _score(stage, folder) and is_scored


def print_line(losses: Mapping[float, Mapping[str, float]], best: float, console: Console) -> None:
    """The losses of the points of a line, by alpha."""
    names = list(losses[best])
    shown = Table(title='(1 - alpha) parent + alpha child: losses, nats/token', title_justify='left')
    for column in ('alpha', *names, 'mean'):
        shown.add_column(escape(column), justify='right')
    for alpha, found in losses.items():
        numbers = [f'{found[name]:.3f}' for name in names]
        style = 'bold' if alpha == best else None
        shown.add_row(f'{alpha:g}', *numbers, f'{fmean(found.values()):.3f}', style=style)
    print_table(shown, console)


def _score(stage: Stage, models: Path) -> bool:
    """Run the suite on exports, if there is one; whether nothing is left to try again."""
    return not stage.suite or evaluate(models, stage.suite)[1]


def _made(folder: Path, merge: Merge) -> tuple[Path, Path]:
    """The average, as a checkpoint and as an export."""
    return folder / 'merged.pt', folder / 'huggingface' / f'ba{merge.batch}'


def _keep_what_is_the_same(stage: Stage, folder: Path, goes_on: bool) -> None:
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
    elif changes(before, stage, goes_on):
        checkpoint, exported = _made(folder, merge)
        checkpoint.unlink(missing_ok=True)
        for made in (exported, *exported.parent.glob(f'{exported.name}-*'), folder / 'points'):
            shutil.rmtree(made, ignore_errors=True)
        for scores in exported.parent.glob(f'lm_eval/*/{exported.name}*.json'):
            scores.unlink()


def _inputs_of(stage: Stage, merge: Merge) -> list[Found]:
    """The checkpoints that it is made of, the newest last; exits if one is not there."""
    try:
        if not (merge.last and merge.every):
            places = stage.merged
            if merge.parent and not (is_remote(merge.parent) or Path(merge.parent).exists()):
                places = [str(folder_of_pretrained(merge.parent)), *places[1:]]
            places = [resolve_latest(place) if is_remote(place) else place for place in places]
            return [one for place in places for one in find([place])]
        # what the trunk has trained since, if it goes on, is of no merge at this batch
        found = [one for one in find([merge.of]) if one.batch is None or one.batch <= merge.batch]
        inputs = latest(found, merge.last, stage.batches_of('every', merge.every))
        if (newest := max(one.batch or 0 for one in found)) != merge.batch:
            raise AverageError(f'batch {merge.batch:,} is to be the newest, and that is {newest:,}')
        return inputs
    except (ValueError, StorageError) as error:
        sys.exit(f'variables.merge.batch={merge.batch}: the checkpoints of {merge.of} cannot be averaged: {error}')


def _average(stage: Stage, inputs: Sequence[Found], weights: str | Sequence[float], out: Path) -> None:
    """Make ``out`` of checkpoints; exit if they do not fit each other."""
    places, begin = [one.path for one in inputs], stage.callbacks.stage_start
    assert stage.merge is not None, 'it is a merge'
    how = {'is_one_run': stage.merge.line is None, 'may_differ': bool(begin and begin.model_changes), 'places': places}
    try:
        weights = window_weights(weights, len(inputs)) if isinstance(weights, str) else weights
        with tempfile.TemporaryDirectory(prefix='.average-', dir=out.parent) as temporary:
            paths = download(inputs, Path(temporary), small_files=False)
            average_files(paths, weights, out, 'pt', **how)
    except (ValueError, StorageError, OSError) as error:
        sys.exit(f'{stage.run_name} stopped: {error}')


def _export(stage: Stage, merge: Merge, checkpoint: Path, out: Path, of: str = '') -> None:
    """Export what was made, unless that is done, with the configuration and tokenizer of its trunk's newest export.

    Args:
        stage: The merge.
        merge: Its section.
        checkpoint: What is exported.
        out: Where to.
        of: Which point of a line it is, for its card. Default: ``''``, of none.
    """
    try:
        if not out.exists():
            out.parent.mkdir(exist_ok=True)
            newest = None if is_remote(merge.of) else newest_export(merge.of)
            average_files([checkpoint], [1.0], out, 'hf', config=Path(newest) if newest else None)
        if not (out / RECIPE).exists():  # which is written last
            record = read_record(stage.folder)
            assert record is not None, 'it was written first'
            write_card(out, record, merge.batch, of)
    except (ValueError, OSError) as error:
        sys.exit(f'{stage.run_name} stopped: {error}')


def _measure_losses(stage: Stage, checkpoint: Path, folder: Path) -> None:
    """Have ``final_loss`` write to a folder what weights are worth, and ``forgetting`` what they are compared with."""
    given = stage.to_train_yaml()
    given.pop('loggers', None)  # of a line, each point would be a run of the tracker, and none says where it lies
    config = {key: value for key, value in given.items() if key in EVAL_CONFIG_KEYS}
    if config.get('fsdp_config'):
        config['fsdp_config'] = {**config['fsdp_config'], 'state_dict_type': 'full'}
    callbacks = given['callbacks']
    config['callbacks'] = {name: callbacks[name] for name in ('forgetting', 'mask_documents') if name in callbacks}
    config['callbacks']['final_loss'] = {**callbacks.get('final_loss', {}), 'save_folder': str(folder)}
    # llm-foundry's evaluation judges by the metrics of training
    config['model'] = {**given['model'], 'use_train_metrics': True}
    config |= {'tokenizer': given['tokenizer'], 'load_path': str(checkpoint), 'log_config': False}
    if os.environ.get('LOCAL_RANK', '0') == '0':
        take(DATASETS_LOCK, f'{stage.run_name}, building model and datasets')
    try:
        trainers, _ = evaluate_losses(OmegaConf.create(config))
    finally:
        DATASETS_LOCK.release(force=True)
    for trainer in trainers:  # which Composer keeps to the end of the process
        state: Any = trainer.state
        state.model, state.outputs, state.batch = torch.nn.Module(), None, None
    del trainers
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
