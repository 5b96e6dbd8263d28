# SPDX-License-Identifier: Apache-2.0
"""The cost of a training step with everything of ours on, against the same LLM Foundry YAML without it.

    make data && python scripts/benchmarks/training_step.py

Ours: replay_text with 5 % replay, stage_start, final_loss, forgetting, ema with two half-lives, lawa. Stock: LLM
Foundry's own text loader and nothing else.

A step, and of it the wait for data: each side trains in a process of its own, and they take turns batch by batch, so
that what else the machine does slows both. Four batches count together (``lawa`` has work in every second), the first
not. The start until the first batch, a checkpoint, and resuming: runs of both sides in turns in one process.
"""

import argparse
import gc
import json
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from multiprocessing.synchronize import Semaphore
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, default=ROOT / 'data' / 'quickstart')
    parser.add_argument('--rounds', type=int, default=5, help='of starting, saving and resuming')
    parser.add_argument('--batches', type=int, default=208, help='that take turns')
    parser.add_argument('--width', type=int, default=384)
    parser.add_argument('--layers', type=int, default=6)
    parser.add_argument('--json', type=Path, help='also write the numbers there')
    return parser.parse_intermixed_args()


if __name__ == '__main__':
    OPTIONS = parse()  # before the imports that take seconds

import torch
from composer import Trainer
from composer.callbacks import CheckpointSaver
from composer.core import Callback, State
from composer.loggers import Logger
from llmfoundry import registry
from llmfoundry.command_utils import train
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from cpt_algorithms.terminal import print_table

SIDES = ('stock', 'ours')
# Batches of a run for start, save and resume; and of what takes turns, counted together.
BATCHES, TOGETHER = 16, 4
WHAT = {
    'step': 'a training step, data included',
    'wait': 'of it, waiting for data',
    'start': 'start, until the first batch',
    'save': 'saving a checkpoint',
    'resume': 'resuming, until the first batch',
}


class Stopwatch(Callback):
    """Seconds of the steps of a run, and when the first began."""

    latest: 'Stopwatch'
    turns: tuple[Semaphore, Semaphore] | None = None  # this side's, the other's

    def __init__(self) -> None:
        Stopwatch.latest = self
        self.began: float | None = None
        self.steps: list[float] = []
        self.waits: list[float] = []
        self.ends: list[float] = []
        self._batch = self._before = 0.0

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """A step begins by asking for data."""
        if self.turns:
            assert self.turns[0].acquire(timeout=600), 'the other side has ended'
        self._before = time.perf_counter()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """The data are there."""
        self._batch = time.perf_counter()
        self.began = self.began or self._batch

    def batch_end(self, state: State, logger: Logger) -> None:
        """Callbacks that come before this one, and so all of ours, have done their work for the batch."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.steps.append(self.ends[-1] - self._before)
        self.waits.append(self._batch - self._before)
        if self.turns:
            self.turns[1].release()


registry.callbacks.register('stopwatch', func=Stopwatch)


def saves() -> list[float]:
    """Seconds of every checkpoint from now on."""
    found: list[float] = []
    save = CheckpointSaver._save_checkpoint

    def timed(*arguments: Any, **words: Any) -> None:
        begun = time.perf_counter()
        save(*arguments, **words)
        found.append(time.perf_counter() - begun)

    CheckpointSaver._save_checkpoint = timed  # pyright: ignore[reportAttributeAccessIssue]
    return found


def mpt(width: int, layers: int) -> dict[str, Any]:
    """An MPT's section of the YAML."""
    return {
        'name': 'mpt_causal_lm', 'init_device': 'cpu', 'd_model': width, 'n_heads': 8, 'n_layers': layers,
        'expansion_ratio': 4, 'max_seq_len': 128, 'vocab_size': 2048, 'loss_fn': 'torch_crossentropy',
        'attn_config': {'attn_impl': 'torch'}, 'use_train_metrics': False,
    }  # fmt: skip


def config(side: str, data: Path, folder: Path, model: dict[str, Any], length: int = 128) -> dict[str, Any]:
    """The YAML of a side; ``length`` is the tokens of a row."""
    stream = {'local': str(data / 'cpp'), 'split': 'train'}
    evaluator = {
        'name': 'text',
        'drop_last': False,
        'num_workers': 0,
        'prefetch_factor': None,
        'persistent_workers': False,
    }
    cfg: dict[str, Any] = {
        'run_name': side,
        'save_folder': str(folder),
        'seed': 17,
        'max_seq_len': length,
        'max_duration': f'{BATCHES}ba',
        'global_train_batch_size': 16,
        'device_train_microbatch_size': 16,
        'device_eval_batch_size': 16,
        'precision': 'fp32',
        'save_interval': f'{BATCHES // 2}ba',
        'autoresume': True,
        'eval_interval': '1000ba',
        'eval_subset_num_batches': 1,
        'python_log_level': 'warning',
        'log_to_console': False,
        'progress_bar': False,
        'log_config': False,
        'tokenizer': {'name': str(data / 'tokenizer'), 'kwargs': {'model_max_length': length}},
        'model': dict(model),
        'optimizer': {'name': 'decoupled_adamw', 'lr': 1e-3, 'betas': [0.9, 0.95], 'eps': 1e-8, 'weight_decay': 0.0},
        'algorithms': {'gradient_clipping': {'clipping_type': 'norm', 'clipping_threshold': 1.0}},
        'callbacks': {'stopwatch': {}},
    }
    loader = {'drop_last': True, 'num_workers': 1, 'pin_memory': False}
    if side == 'stock':
        return {
            **cfg,
            'scheduler': {'name': 'cosine_with_warmup', 't_warmup': '2ba', 'alpha_f': 0.1},
            'train_loader': {**loader, 'name': 'text', 'dataset': {'max_seq_len': length, 'shuffle': True, **stream}},
        }
    old = {'local': str(data / 'python'), 'split': 'train'}
    validation = {
        label: {'local': str(data / label), 'split': 'val', 'max_seq_len': length} for label in ('python', 'cpp')
    }
    return {
        **cfg,
        'scheduler': {'name': 'rewarm_cosine', 't_warmup': '2ba', 'alpha_f': 0.1},
        'train_loader': {
            **loader,
            'name': 'replay_text',
            'dataset': {
                'max_seq_len': length, 'shuffle': True, 'new': stream,
                'replay': {'fraction': 0.05, 'streams': {'python': old}},
            },
        },
        'eval_first': True,  # the parent, for forgetting: its time is in the start
        'eval_loader': [{**evaluator, 'label': label, 'dataset': place} for label, place in validation.items()],
        'callbacks': {
            'stage_start': {},
            'final_loss': {'window': '1ba', 'interval': '1ba'},
            'forgetting': {'new': ['cpp'], 'old': ['python']},
            'ema': {'half_life': ['4ba', '16ba']},
            'lawa': {'k': 5, 'interval': '2ba'},
            'stopwatch': {},  # after them
        },
    }  # fmt: skip


def run(cfg: dict[str, Any]) -> tuple[Stopwatch, float]:
    """Train; the stopwatch, and when the start was."""
    begun = time.perf_counter()
    trainer: Trainer | None = None
    try:
        trainer = train(OmegaConf.create(cfg))
    finally:
        if trainer is not None:
            trainer.close()
    del trainer
    gc.collect()
    return Stopwatch.latest, begun


TURNS: dict[str, Semaphore] = {}


def share(turns: dict[str, Semaphore]) -> None:
    """Whose turn it is, for a process that begins."""
    TURNS.update(turns)
    multiprocessing.set_start_method('fork', force=True)  # of DataLoader workers, as in a run of its own


class Turns(NamedTuple):
    """What a side that takes turns has measured: seconds of each batch, and its peak of the GPU's memory in bytes."""

    steps: list[float]
    waits: list[float]
    peak: int


def in_turns(side: str, cfg: dict[str, Any]) -> Turns:
    """A side's own process."""
    (other,) = TURNS.keys() - {side}
    Stopwatch.turns = (TURNS[side], TURNS[other])
    watch, _ = run(cfg)
    return Turns(watch.steps, watch.waits, torch.cuda.max_memory_allocated())


def turns_of(configs: dict[str, dict[str, Any]]) -> dict[str, Turns]:
    """Both sides train, batch by batch in turns."""
    spawn = multiprocessing.get_context('spawn')  # a fork of torch's threads hangs
    turns = {side: spawn.Semaphore(number == 0) for number, side in enumerate(SIDES)}
    with ProcessPoolExecutor(2, spawn, share, (turns,)) as pool:
        both = [pool.submit(in_turns, side, configs[side]) for side in SIDES]
        done, waiting = wait(both, return_when=FIRST_EXCEPTION)
        if waiting:  # for the turn of a side that has failed
            for process in (*pool._processes.values(),):
                process.kill()
        for failed in done:
            failed.result()
        return {side: future.result() for side, future in zip(SIDES, both, strict=True)}


def together(each: list[float], first: int = TOGETHER) -> list[float]:
    """Means of the batches that count together, from ``first`` on; what a run does at its end follows the last."""
    groups = range(first, len(each) - TOGETHER, TOGETHER)
    return [statistics.mean(each[begin : begin + TOGETHER]) for begin in groups]


def main(arguments: argparse.Namespace) -> None:
    """Measure, print a table, write the numbers."""
    taken: dict[str, dict[str, list[float]]] = {what: {side: [] for side in SIDES} for what in WHAT}
    checkpoints, model = saves(), mpt(arguments.width, arguments.layers)
    with tempfile.TemporaryDirectory() as name:
        pair = {
            side: config(side, arguments.data, Path(name) / side, model)
            | {'max_duration': f'{arguments.batches}ba', 'save_interval': f'{arguments.batches}ba'}
            for side in SIDES
        }
        both = turns_of(pair)
        taken['step'] = {side: together(both[side].steps) for side in SIDES}
        taken['wait'] = {side: together(both[side].waits) for side in SIDES}
        for number in tqdm(range(arguments.rounds), 'rounds', disable=None):
            for side in SIDES if number % 2 else SIDES[::-1]:
                folder = Path(name) / side
                shutil.rmtree(folder, ignore_errors=True)
                cfg = config(side, arguments.data, folder, model)
                checkpoints.clear()
                watch, begun = run(cfg)
                assert watch.began is not None, 'it has trained'
                taken['start'][side].append(watch.began - begun)
                taken['save'][side].append(statistics.median(checkpoints))
                (folder / 'latest-rank0.pt').unlink()
                (folder / f'ep0-ba{BATCHES}-rank0.pt').unlink()
                (folder / 'latest-rank0.pt').symlink_to(f'ep0-ba{BATCHES // 2}-rank0.pt')
                watch, begun = run(cfg)
                assert watch.began is not None and len(watch.steps) == BATCHES // 2, 'it has resumed'
                taken['resume'][side].append(watch.began - begun)
    table = Table(title='seconds, median (min to max)', title_justify='left')
    for column in ('', *SIDES, 'ours / stock, median of rounds (min to max)'):
        table.add_column(column)
    for what, sides in taken.items():
        ratios = [ours / stock for stock, ours in zip(*(sides[side] for side in SIDES), strict=True)]
        cells = [f'{statistics.median(x):.4f} ({min(x):.4f} to {max(x):.4f})' for x in (sides[side] for side in SIDES)]
        ratio = f'{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})'
        table.add_row(WHAT[what], *cells, ratio)
    print_table(table, Console(width=None if sys.stdout.isatty() else 140))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(taken, indent=1))


if __name__ == '__main__':
    main(OPTIONS)
