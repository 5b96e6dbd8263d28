# SPDX-License-Identifier: Apache-2.0
"""A stage small enough to run in a second or two, as an llm-foundry YAML in Python."""

import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from importlib.metadata import EntryPoint
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import catalogue
import continue_pretraining
import pytest
import recorder
import sequence
import torch
from composer.models import ComposerModel
from composer.utils import collect_env
from llmfoundry.callbacks import hf_checkpointer
from llmfoundry.command_utils import train
from omegaconf import OmegaConf
from streaming import StreamingDataset

from cpt_algorithms.checkpoints.open import time_of
from cpt_algorithms.replay.lazy_dataset import LazyStreamingDataset
from cpt_algorithms.sequence.expand import Run, expand
from cpt_algorithms.sequence.read import read_sequence
from cpt_algorithms.sequence.spec import SequenceSpec
from cpt_algorithms.stage.preflight import preflight
from cpt_algorithms.stage.run import DATASETS_LOCK
from cpt_algorithms.stage.stage import Stage
from cpt_algorithms.validation import ConfigError

SEQ_LEN = 16
VOCAB = 256
BATCH = 8
TOKENS_PER_BATCH = SEQ_LEN * BATCH
KILLED = -signal.SIGKILL
ROOT = Path(__file__).parents[1]
RECIPE = ROOT / 'recipes' / 'continue_pretraining.py'
SEQUENCE = ROOT / 'recipes' / 'sequence.py'


def one_dataset_at_a_time() -> None:
    """Let only one process of this machine build a StreamingDataset at a time, as the recipes do.

    Two that start at the same moment can pick the same shared memory.
    """
    for kind in (StreamingDataset, LazyStreamingDataset):

        def init(self: StreamingDataset, *args: Any, build: Callable[..., None] = kind.__init__, **kwargs: Any) -> None:
            # the other ranks wait for this one anyway
            with DATASETS_LOCK if os.environ.get('LOCAL_RANK', '0') == '0' else nullcontext():
                build(self, *args, **kwargs)

        kind.__init__ = init


def same_work_once() -> None:
    """What every run in this process would do again, and takes longer than its training, is done once."""
    # LLM Foundry looks for each part of a model among the entry points of all installed packages
    find, found = catalogue.Registry._get_entry_points, {}

    def find_once(registry: catalogue.Registry) -> list[EntryPoint]:
        if registry.entry_point_namespace not in found:
            found[registry.entry_point_namespace] = list(find(registry))
        return found[registry.entry_point_namespace]

    catalogue.Registry._get_entry_points = find_once
    collect_env.get_composer_commit_hash = cache(collect_env.get_composer_commit_hash)
    # it rewrites its own sources for each export
    edit, edited = hf_checkpointer.edit_files_for_hf_compatibility, {}

    def edit_once(folder: str, *arguments: Any) -> None:
        sources = [(path.name, path.read_text()) for path in sorted(Path(folder).glob('*.py'))]
        auto_map = json.loads((Path(folder) / 'config.json').read_text()).get('auto_map')
        key = json.dumps([auto_map, arguments, sources])
        if key not in edited:
            edit(folder, *arguments)
            edited[key] = {path.name: path.read_text() for path in Path(folder).glob('*.py')}
        for name, text in edited[key].items():
            (Path(folder) / name).write_text(text)

    hf_checkpointer.edit_files_for_hf_compatibility = edit_once
    # garbage is not looked for among what was imported
    gc.collect()
    gc.freeze()


one_dataset_at_a_time()
same_work_once()


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Deep merge; None removes a key."""
    merged = dict(base)
    for key, value in over.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict) and 'name' not in value:
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def eval_loader(label: str, data: Path) -> dict[str, Any]:
    """An evaluator on the validation split of a dataset."""
    return {
        'name': 'text',
        'label': label,
        'drop_last': False,
        'num_workers': 0,
        'prefetch_factor': None,
        'persistent_workers': False,
        'dataset': {'local': str(data), 'split': 'val', 'max_seq_len': SEQ_LEN},
    }


def config(folder: Path, data: dict[str, Path], run_name: str, **over: Any) -> dict[str, Any]:
    """A stage on ``data['new']``; keyword arguments are merged over it."""
    base = {
        'run_name': run_name,
        'save_folder': str(folder / run_name),
        'seed': 17,
        'max_seq_len': SEQ_LEN,
        'max_duration': '8ba',
        'global_train_batch_size': BATCH,
        'device_train_microbatch_size': 2,
        'device_eval_batch_size': BATCH,
        'precision': 'fp32',
        'save_interval': '2ba',
        'eval_interval': '1000ba',
        'autoresume': True,
        'python_log_level': 'warning',
        'log_to_console': False,
        'log_config': False,
        'code_paths': [str(ROOT / 'tests' / 'recorder.py')],
        'tokenizer': {'name': str(data['tokenizer']), 'kwargs': {'model_max_length': SEQ_LEN}},
        'model': {
            'name': 'mpt_causal_lm',
            'init_device': 'cpu',
            'd_model': 16,
            'n_heads': 2,
            'n_layers': 1,
            'expansion_ratio': 2,
            'max_seq_len': SEQ_LEN,
            'vocab_size': VOCAB,
            'loss_fn': 'torch_crossentropy',
            'attn_config': {'attn_impl': 'torch'},
            'use_train_metrics': False,
        },
        'optimizer': {'name': 'decoupled_adamw', 'lr': 1e-3, 'betas': [0.9, 0.95], 'weight_decay': 1e-5},
        'scheduler': {'name': 'rewarm_cosine', 't_warmup': '4ba', 'alpha_i': 0.25},
        'callbacks': {'stage_start': {}, 'recorder': {'path': str(folder / f'{run_name}.jsonl')}},
        'train_loader': {
            'name': 'replay_text',
            'drop_last': True,
            'num_workers': 0,
            'dataset': {'max_seq_len': SEQ_LEN, 'shuffle': True, 'new': {'local': str(data['new']), 'split': 'train'}},
        },
    }
    return merge(base, over)


def sequence_common(folder: Path, data: dict[str, Path], **over: Any) -> dict[str, Any]:
    """What stages of a sequence have in common, from ``config``."""
    derived = (
        'run_name',
        'save_folder',
        'seed',
        'autoresume',
        'code_paths',
        'max_duration',
        'callbacks',
        'train_loader',
    )
    common = {key: value for key, value in config(folder, data, 'unused').items() if key not in derived}
    evaluated = {key: value for key, value in eval_loader('', data['old']).items() if key != 'label'}
    base = {
        **common,
        'log_to_console': True,
        'train_loader': {'num_workers': 0, 'dataset': {'max_seq_len': SEQ_LEN, 'shuffle': True}},
        'eval_loader': {**evaluated, 'dataset': {'max_seq_len': SEQ_LEN}},
        'callbacks': {'final_loss': {'window': '4ba', 'interval': '2ba'}},
    }
    return merge(base, over)


def sequence_spec(folder: Path, data: dict[str, Path], duration: str = '16ba', /, **over: Any) -> dict[str, Any]:
    """A sequence of two stages, ``old`` and ``new``; keyword arguments replace its sections."""
    return {
        'name': 'test',
        'folder': str(folder / 'runs'),
        'jobs': 2,
        'data': {name: {'local': str(data[name])} for name in ('old', 'new')},
        'stages': {'old': {'max_duration': duration}, 'new': {'max_duration': duration}},
        'common': over.pop('common', None) or sequence_common(folder, data),
        **over,
    }


def runs_of(spec: dict[str, Any]) -> list[Run]:
    """The runs of a sequence YAML."""
    return expand(SequenceSpec.from_yaml(spec))


def save(cfg: dict[str, Any], path: Path) -> Path:
    """Write a YAML."""
    OmegaConf.save(OmegaConf.create(cfg), path)
    return path


class Number(ComposerModel):
    """A model of one weight."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([weight]))

    def forward(self, batch: Any) -> Any:
        """The weight, times the batch."""
        return self.weight * batch

    def loss(self, outputs: Any, batch: Any) -> Any:
        """Their sum."""
        return outputs.sum()


def problems(cfg: dict[str, Any], *arguments: int, **how: Any) -> list[str]:
    """What preflight refuses a stage for."""
    with pytest.raises(ConfigError) as refused:
        preflight(Stage.from_yaml(cfg), *arguments, **how)
    return refused.value.problems


def said(cfg: dict[str, Any]) -> str:
    """All of :func:`problems` as one text."""
    return '\n'.join(problems(cfg))


def planned(*words: object) -> tuple[SequenceSpec, list[Run]]:
    """The sequence that a command line of ``recipes/sequence.py`` means, and its runs."""
    arguments = sequence.parse([str(word) for word in words])
    return read_sequence(arguments.words, arguments.sweep, arguments.trial)


def run(cfg: dict[str, Any] | Stage) -> dict[int, dict]:
    """Train in this process, without the recipe, and return the witness's lines by batch."""
    cfg = cfg.to_train_yaml() if isinstance(cfg, Stage) else cfg
    trainer = None
    try:
        trainer = train(OmegaConf.create(cfg))
    finally:
        if trainer is not None:
            trainer.close()
        del trainer
        gc.collect()
    return recorder.read(cfg['callbacks']['recorder']['path'])


def recipe(cfg: dict[str, Any], folder: Path, *arguments: object, expect: int = 0) -> str:
    """``python recipes/continue_pretraining.py`` in a process of its own; returns what it printed."""
    path = save(cfg, folder / f'{cfg["run_name"]}.yaml')
    done = subprocess.run(
        [sys.executable, str(RECIPE), str(path), *map(str, arguments)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def recipe_here(cfg: dict[str, Any], folder: Path) -> None:
    """The recipe in this process, which has imported everything already."""
    path = save(cfg, folder / f'{cfg["run_name"]}.yaml')
    words, sys.argv = sys.argv, ['continue_pretraining.py', str(path)]
    try:
        continue_pretraining.main()
    finally:
        sys.argv = words
        gc.collect()  # the run's lock


def killed_after(cfg: dict[str, Any], batch: int) -> int:
    """Leave the folder of a finished run as a kill between two batches does; returns the batch of its latest checkpoint."""
    run = Path(cfg['save_folder'])
    shutil.rmtree(run / 'huggingface')
    (run / 'done.json').unlink()
    for path in run.glob('ep*-ba*'):
        if time_of(path)['ba'] > batch:
            path.unlink()
    newest = max(run.glob('ep*-ba*'), key=lambda path: time_of(path)['ba'])
    (run / 'latest-rank0.pt').unlink()
    (run / 'latest-rank0.pt').symlink_to(newest.name)
    return time_of(newest)['ba']


def start(script: Path, *arguments: object) -> subprocess.Popen[str]:
    """``python script arguments``, whose output can be read."""
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def launch(script: Path, *arguments: object, expect: int = 0, ranks: int = 2) -> str:
    """``composer -n <ranks> script arguments`` with FSDP2; returns what it printed.

    ``expect``: how the rank that ends first must end, such as ``KILLED``.
    """
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    command = [sys.executable, '-m', 'composer.cli.launcher', '-n', str(ranks), '--master_port', str(port)]
    path = [str(ROOT / 'tests'), str(ROOT / 'recipes'), *filter(None, [os.environ.get('PYTHONPATH')])]
    done = subprocess.run(
        [*command, str(script), *map(str, arguments)],
        env={**os.environ, 'FSDP_VERSION': '2', 'PYTHONPATH': os.pathsep.join(path)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    printed = done.stdout + done.stderr
    crashed = re.findall(r'Rank \d+ crashed with exit code (-?\d+)', printed)
    assert [int(code) for code in crashed] == [expect] * (expect != 0), printed[-6000:]
    assert (done.returncode == 0) == (expect == 0), printed[-6000:]
    return printed


def stop_fork_server() -> None:
    """End this process's fork server, whoever else holds its pipe: processes that other tests have forked may."""
    pid = forkserver._forkserver._forkserver_pid
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
    forkserver._forkserver._stop()
