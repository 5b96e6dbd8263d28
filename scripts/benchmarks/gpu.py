# SPDX-License-Identifier: Apache-2.0
"""The speed of the 405M GPT-NeoX on one GPU in bf16, and what our parts add to it: tokens/s, MFU, memory, saving.

    make bench-gpu                                       # on a machine with a GPU
    python scripts/benchmarks/gpu.py --tiny              # a rehearsal with a tiny model; also without a GPU, in fp32

Every run trains through LLM Foundry's ``train`` on rows of random tokens, with 5 % replay. In order of worth:

1. ceilings: a large matrix product, a copy within the GPU's memory, pinned copies to and from the host
2. a training step as it is, and compiled
3. everything of ours against stock parts: two processes share the GPU and take turns batch by batch
4. LAWA's snapshot and an EMA update, in bytes per second
5. other training steps: compiled with the largest microbatch, FSDP2 (one process has nobody to gather from), eager
   attention, FlashAttention 2
6. saving a checkpoint with and without averages; then MPT with its fused loss, and Liger's kernels

While it compiles, transformers 4.57 gives sdpa a mask instead of ``is_causal``, so that a compiled step has another
kernel of attention, too.

The JSON is written again after each measurement, so that a killed run loses only its last one. When the budget is
spent, the rest is skipped. Measurements that fail are reported, and the exit code is 1.

MFU counts the FLOPs of ``cost.estimate.flops_per_token``, as LLM Foundry does; ``6 N`` counts all parameters and no
attention.
"""

import argparse
import functools
import gc
import importlib
import json
import math
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tiny', action='store_true', help='rehearse with a tiny model and a few steps')
    parser.add_argument('--budget', type=float, default=420, help='seconds after which no measurement begins')
    parser.add_argument('--json', type=Path, help='also write the numbers there')
    return parser.parse_intermixed_args()


if __name__ == '__main__':
    OPTIONS = parse()  # before the imports that take seconds

from cpt_algorithms.quiet import ignore_known_warnings

ignore_known_warnings()

import numpy as np
import torch
import yaml
from composer import Trainer
from composer.core import Timestamp
from llmfoundry.command_utils import train
from rich.table import Table
from streaming import MDSWriter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from training_step import SIDES, config, run, saves, together, turns_of
from transformers import PreTrainedTokenizerFast

from cpt_algorithms.cost.estimate import GPUS, Gpu, ModelSize, costs_of, find_gpu, flops_per_token, model_size
from cpt_algorithms.report.made_with import made_with
from cpt_algorithms.stage.on_meta import model_on_meta
from cpt_algorithms.stage.stage import Model, Stage
from cpt_algorithms.terminal import make_console, print_table
from cpt_algorithms.weight_averaging.functional import update_ema_
from cpt_algorithms.weight_averaging.lawa import LAWA
from cpt_algorithms.weight_averaging.local_shards import LocalShards

Found = dict[str, Any]
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
# LAWA's window in the runs that take turns: it is full, and its pinned memory is there, before batch FIRST.
LAWA_K, LAWA_INTERVAL, FIRST = 3, 4, 16
ANCHORS = (
    "Anchors: LLM Foundry's own runs on H100s reach 35 to 40 % MFU at 760M and 42 to 46 % at 1.3B; aim: 45 % at 405M."
)


EVALUATION = ('eval_first', 'eval_loader', 'eval_interval', 'eval_subset_num_batches')


class Skipped(Exception):
    """A measurement that cannot be made here."""


class Measurements:
    """What was measured so far, by section and name. It is on the disk after each measurement.

    Args:
        path: The JSON.
        budget: Seconds after which no measurement begins.
    """

    def __init__(self, path: Path | None, budget: float) -> None:
        self.found: Found = {'made with': made_with()}
        if DEVICE == 'cuda':
            self.found['gpu'] = f'{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}'
        self.found['failed'], self.found['skipped'] = {}, {}
        self._path, self._budget, self._begun = path, budget, time.perf_counter()
        self._console = make_console()

    def take(self, section: str, name: str, measure: Callable[[], Found]) -> Found | None:
        """Measure, unless the budget is spent. None if there is no result, which is said and recorded."""
        label, begun, result = f'{section}: {name}', time.perf_counter(), None
        try:
            if begun - self._begun > self._budget:
                raise Skipped(f'the budget of {self._budget:.0f} s is spent')
            free()
            result = measure()
            self.found.setdefault(section, {})[name] = result
            said = 'done'
        except Skipped as reason:
            said = f'skipped: {reason}'
            self.found['skipped'][label] = str(reason)
        except Exception as error:
            said = f'failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}'
            self.found['failed'][label] = traceback.format_exc()
        now = time.perf_counter()
        self._console.print(f'[{now - self._begun:4.0f} s] {label}, {now - begun:.1f} s: {said}', markup=False)
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(self.found, indent=1))
        return result


def free() -> None:
    """Give back what the last run held."""
    gc.collect()
    torch.compiler.reset()  # else the next model's shapes would be compiled as dynamic
    if DEVICE == 'cuda':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def gpu_named(name: str) -> str | None:
    """The key in ``GPUS`` of a CUDA device: the longest whose parts are all words of its name; None if there is none.

    Cards called NVL are slower than others of their name, and are none of ``GPUS``.
    """
    words = set(re.split(r'[^a-z0-9]+', name.lower()))
    keys = [key for key in GPUS if words.issuperset(key.split('-'))]
    return max(keys, key=len) if keys and 'nvl' not in words else None


# the data


def make_data(folder: Path, vocabulary: int, length: int, rows: int) -> None:
    """Rows of random tokens and a tokenizer, in the folders of ``make data``."""
    single = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(single)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = '<|endoftext|>'
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)
    fast.save_pretrained(folder / 'tokenizer')
    random = np.random.default_rng(1)
    for name, count in {'cpp/train': rows, 'python/train': rows // 4, 'cpp/val': 32, 'python/val': 32}.items():
        columns = {'tokens': f'ndarray:int32:{length}'}
        with MDSWriter(out=str(folder / name), columns=columns, hashes=['xxh64']) as writer:
            for _ in range(count):
                writer.write({'tokens': random.integers(0, vocabulary, length, dtype=np.int32)})


# ceilings


def seconds_of(work: Callable[[], object], repeats: int, warm_up: int = 3) -> list[float]:
    """Seconds of each call after the warm-up, by CUDA events or, without a GPU, by the clock."""
    taken = []
    for _ in range(warm_up + repeats):
        if DEVICE == 'cuda':
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            taken.append(begin.elapsed_time(end) / 1e3)
        else:
            begun = time.perf_counter()
            work()
            taken.append(time.perf_counter() - begun)
    return taken[warm_up:]


def ceilings(tiny: bool) -> Found:
    """FLOP/s of a bf16 matrix product; bytes/s of copies on the device (read and written) and to and from the host."""
    side, size, repeats = (256, 2**24, 5) if tiny else (8192, 2**30, 20)
    found: Found = {}
    left, right = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    taken = seconds_of(lambda: torch.mm(left, right, out=out), repeats)
    found['matrix product'] = {'seconds': taken, 'FLOP/s': 2 * side**3 / statistics.median(taken)}
    here = torch.randint(0, 256, (size,), device=DEVICE, dtype=torch.uint8)
    there = torch.empty_like(here)
    host = torch.empty(size, dtype=torch.uint8, pin_memory=DEVICE == 'cuda').copy_(here)
    copies: dict[str, tuple[int, Callable[[], object]]] = {
        'device to device': (2, lambda: there.copy_(here)),
        'host to device': (1, lambda: here.copy_(host, non_blocking=True)),
        'device to host': (1, lambda: host.copy_(here, non_blocking=True)),
    }
    for name, (times, copy) in copies.items():
        taken = seconds_of(copy, repeats)
        found[name] = {'seconds': taken, 'B/s': times * size / statistics.median(taken)}
    return found


# training steps


@contextmanager
def sharded() -> Iterator[None]:
    """LLM Foundry drops ``fsdp_config`` where there is one process; here its Trainer gets one, of FSDP2."""
    fsdp = {'state_dict_type': 'sharded'}

    def trainer(**words: Any) -> Trainer:
        return Trainer(**{**words, 'parallelism_config': {'fsdp': fsdp}})

    os.environ['FSDP_VERSION'] = '2'  # which nothing reads without an fsdp_config
    with patch.object(sys.modules[train.__module__], 'Trainer', trainer):
        yield


class Bench:
    """The runs of one model on one device.

    Args:
        folder: A temporary folder; the data are made there.
        tiny: Whether it is the rehearsal.
    """

    def __init__(self, folder: Path, tiny: bool) -> None:
        self.folder, self.tiny = folder, tiny
        self.length, self.rows, self.most = (64, 8, 8) if tiny else (2048, 32, 16)
        self.warm_up, self.timed = (1, 2) if tiny else (4, 16)
        self.turns = FIRST + LAWA_INTERVAL * (3 if tiny else 13)
        self.model = self.section('gpt_neox_tiny' if tiny else 'gpt_neox_405m')
        self.gpu: Gpu | None = None  # known once the ceilings are
        make_data(folder / 'data', self.size(self.model).vocab, self.length, self.rows * self.turns)

    def section(self, name: str) -> Found:
        """A model's section, wherever this is run from."""
        section = yaml.safe_load((ROOT / 'yamls' / 'models' / f'{name}.yaml').read_text())
        config_json = ROOT / section['pretrained_model_name_or_path']
        return {**section, 'pretrained_model_name_or_path': str(config_json)}

    def size(self, section: Found) -> ModelSize:
        """The numbers of a model."""
        return model_size(Model.model_validate(section))

    def mpt(self) -> Found:
        """The MPT of the model's size, with FlashAttention and its fused loss where they are installed."""
        size, has_flash = self.size(self.model), find_spec('flash_attn') is not None
        return {
            'name': 'mpt_causal_lm', 'init_device': 'cpu', 'd_model': size.hidden, 'n_heads': size.heads,
            'n_layers': size.layers, 'expansion_ratio': 4, 'max_seq_len': self.length, 'vocab_size': size.vocab,
            'tie_word_embeddings': False, 'use_train_metrics': False,
            'loss_fn': 'fused_crossentropy' if has_flash else 'torch_crossentropy',
            'attn_config': {'attn_impl': 'flash' if has_flash else 'torch'},
        }  # fmt: skip

    def yaml_of(self, side: str, name: str, model: Found | None = None, **over: Any) -> Found:
        """The YAML of a side. The data wait in pinned memory; a checkpoint is saved at the end only."""
        cfg = config(side, self.folder / 'data', self.folder / name / side, model or self.model, self.length)
        cfg |= {
            'global_train_batch_size': self.rows,
            'device_train_microbatch_size': self.most,
            'device_eval_batch_size': 8,
            'precision': 'amp_bf16' if DEVICE == 'cuda' else 'fp32',
            'save_num_checkpoints_to_keep': 1,
        }
        cfg['train_loader'] |= {'pin_memory': DEVICE == 'cuda'}
        if side == 'stock':
            cfg = {key: value for key, value in cfg.items() if key not in EVALUATION}
        return cfg | over

    def bare(self, model: Found, **over: Any) -> Found:
        """A training step's YAML: our loader and the stopwatch, no evaluation, no checkpoint."""
        cfg = self.yaml_of('ours', 'bare', model, max_duration=f'{self.warm_up + self.timed + 1}ba')
        for key in (*EVALUATION, 'save_folder', 'autoresume'):
            del cfg[key]
        return cfg | {'callbacks': {'stopwatch': {}}} | over

    def predicted(self, cfg: Found) -> float:
        """Bytes of GPU memory that ``cost.estimate`` predicts for a run."""
        assert self.gpu, 'the ceilings come first'
        return costs_of(Stage.from_yaml(cfg), gpu=f'{self.gpu.peak}', gpus=1).memory.total

    def microbatch(self, cfg: Found, most: int, share: float = 0.85) -> int:
        """The largest microbatch, by halves from ``most``, that is predicted to fit into a share of the GPU."""
        if DEVICE == 'cuda':
            memory = share * torch.cuda.get_device_properties(0).total_memory
            while most > 1 and self.predicted(cfg | {'device_train_microbatch_size': most}) > memory:
                most //= 2
        return most

    def step(self, model: Found | None = None, most: int | None = None, **over: Any) -> Found:
        """Seconds of training steps, from the end of one to the end of the next, and what follows from them."""
        assert self.gpu, 'the ceilings come first'
        cfg = self.bare(model or self.model, **over)
        cfg['device_train_microbatch_size'] = self.microbatch(cfg, most or self.most)
        predicted, size = self.predicted(cfg), self.size(cfg['model'])
        before = torch.cuda.memory_allocated() if DEVICE == 'cuda' else 0
        watch, begun = run(cfg)
        seconds = [later - earlier for earlier, later in pairwise(watch.ends)][self.warm_up :]
        low, middle, high = statistics.quantiles(seconds, n=4)
        speed = self.rows * self.length / middle
        return {
            'microbatch': cfg['device_train_microbatch_size'], 'seconds': seconds, 'quartiles': [low, middle, high],
            'tokens/s': speed, 'until the first step ended': watch.ends[0] - begun, 'parameters': size.parameters,
            'MFU': speed * flops_per_token(size, self.length) / self.gpu.peak,
            'MFU of 6 N': speed * 6 * size.parameters / self.gpu.peak,
            'allocated before': before, 'predicted memory': predicted,
            'peak memory': torch.cuda.max_memory_allocated() if DEVICE == 'cuda' else None,
        }  # fmt: skip

    def flash(self) -> Found:
        """With FlashAttention 2."""
        if find_spec('flash_attn') is None:
            raise Skipped('flash_attn is not installed')
        return self.step(self.model | {'attn_implementation': 'flash_attention_2'})

    def fsdp(self) -> Found:
        """Fully sharded, on one GPU."""
        with sharded():
            return self.step()

    def liger(self) -> Found:
        """With Liger's kernels, of which its fused linear cross-entropy counts; the last, as the patch stays."""
        if find_spec('liger_kernel') is None:
            raise Skipped('liger_kernel is not installed')
        apply = getattr(importlib.import_module('liger_kernel.transformers'), 'apply_liger_kernel_to_gpt_neox', None)
        if apply is None:
            raise Skipped('liger_kernel has nothing for GPT-NeoX')
        apply()
        return self.step()

    # ours against stock

    def averages(self, k: int, interval: int) -> Found:
        """Two EMAs and LAWA, each of a few batches."""
        return {'ema': {'half_life': ['4ba', '16ba']}, 'lawa': {'k': k, 'interval': f'{interval}ba'}}

    def everything(self) -> Found:
        """Both sides in turns: seconds of steps, their ratios by groups of batches, peak and predicted memory."""
        until = f'{self.turns}ba'
        pair = {side: self.yaml_of(side, 'turns', max_duration=until, save_interval=until) for side in SIDES}
        pair['ours']['callbacks'] |= self.averages(LAWA_K, LAWA_INTERVAL)
        pair['ours']['callbacks'] |= {'stopwatch': pair['ours']['callbacks'].pop('stopwatch')}  # after them
        # both are in the GPU's memory at once
        rows = self.microbatch(pair['ours'], self.most, 0.4)
        for cfg in pair.values():
            cfg['device_train_microbatch_size'] = rows
        taken = turns_of(pair)
        shutil.rmtree(self.folder / 'turns', ignore_errors=True)  # tens of gigabytes
        groups = {side: together(taken[side].steps, FIRST) for side in SIDES}
        ratios = [ours / stock for stock, ours in zip(*(groups[side] for side in SIDES), strict=True)]
        mean, error = statistics.mean(ratios), statistics.stdev(ratios) / math.sqrt(len(ratios))
        return {
            'microbatch': rows, 'steps': {side: taken[side].steps for side in SIDES}, 'groups': groups,
            'waits': {side: taken[side].waits for side in SIDES}, 'ratios': ratios,
            'median ratio': statistics.median(ratios), 'mean ratio': mean,
            '95 % interval': [mean - 1.96 * error, mean + 1.96 * error],
            'peak memory': {side: taken[side].peak if DEVICE == 'cuda' else None for side in SIDES},
            'predicted memory': {side: self.predicted(cfg) for side, cfg in pair.items()},
        }  # fmt: skip

    def snapshots(self) -> Found:
        """``LAWA.update`` into a full window, and an EMA update, on parameters of the model's shapes."""
        shapes = [each.shape for each in model_on_meta(Model.model_validate(self.model)).parameters()]
        parameters = torch.nn.ParameterList([torch.randn(shape, device=DEVICE) for shape in shapes])
        count, repeats = sum(each.numel() for each in parameters), 3 if self.tiny else 10
        lawa = LAWA('1ba', k=2)
        lawa._shards = LocalShards(parameters)
        batches = iter(range(1, 100))

        def snapshot() -> None:
            lawa.update(SimpleNamespace(timestamp=Timestamp(batch=next(batches))))  # pyright: ignore[reportArgumentType]

        averages = [each.detach().clone() for each in parameters]
        tensors = lawa.shards.tensors()
        with torch.no_grad():
            allocating = seconds_of(snapshot, 2, 0)
            taken = {
                'snapshot': seconds_of(snapshot, repeats),
                'EMA update': seconds_of(lambda: update_ema_(averages, tensors, 0.01), repeats),
            }
        moved = {'snapshot': 4 * count, 'EMA update': 12 * count}  # an update reads two and writes one
        speeds = {name: moved[name] / statistics.median(each) for name, each in taken.items()}
        return {'seconds': taken, 'while the window fills': allocating, 'bytes': moved, 'B/s': speeds}

    def saving(self, is_sharded: bool) -> Found:
        """Seconds of three checkpoints with a full window, and the bytes of the last, on both sides."""
        timed, found = saves(), {}
        with sharded() if is_sharded else nullcontext():
            for side in SIDES:
                name = 'sharded' if is_sharded else 'whole'
                cfg = self.yaml_of('stock', f'{name}-{side}', max_duration='4ba', save_interval='1ba')
                cfg['device_train_microbatch_size'] = self.microbatch(cfg, self.most)
                if side == 'ours':
                    cfg['callbacks'] |= self.averages(2, 1)
                timed.clear()
                folder = Path(cfg['save_folder'])
                try:
                    run(cfg)
                    files = [each for each in folder.rglob('*') if each.is_file() and not each.is_symlink()]
                    found[side] = {'seconds': timed[1:], 'bytes': sum(each.stat().st_size for each in files)}
                finally:
                    shutil.rmtree(folder, ignore_errors=True)
                free()
        return found


# the table


def number(value: float) -> str:
    """Three digits, or whole."""
    return f'{value:,.0f}' if abs(value) >= 100 else f'{value:.3g}'


def step_rows(name: str, cell: Found, base: Found) -> Iterator[tuple[str, float, str, str, float | None]]:
    """Of a training step."""
    what, (low, _, high) = f'{name}, microbatch {cell["microbatch"]}', cell['quartiles']
    spread = f'base; a step {low:.3g} to {high:.3g} s'
    yield what, cell['tokens/s'], 'tokens/s', spread, cell['tokens/s'] / base['tokens/s']
    yield '', 100 * cell['MFU'], '% MFU', f'6 N: {100 * cell["MFU of 6 N"]:.3g} %', None
    if cell['peak memory']:
        peak = cell['peak memory'] - cell['allocated before']
        yield (
            '',
            peak / 1e9,
            'GB peak',
            f'predicted {cell["predicted memory"] / 1e9:.3g}',
            peak / cell['predicted memory'],
        )


def table_of(found: Found) -> Table:
    """What was measured (medians, with quartiles of steps and the range of saves), its unit, and a ratio."""
    rows: list[tuple[str, float, str, str, float | None]] = []
    limits = found.get('ceilings', {}).get('all', {})
    peak = found.get('peak FLOP/s')
    for name, limit in limits.items():
        if 'FLOP/s' in limit:
            share = limit['FLOP/s'] / peak if found['peak'] else None
            rows.append(
                (name, limit['FLOP/s'] / 1e12, 'TFLOP/s', found['peak'] or 'for MFU, as no peak is known', share)
            )
        else:
            rows.append((f'copy {name}', limit['B/s'] / 1e9, 'GB/s', '', None))
    steps = found.get('step', {})
    for name, cell in steps.items():
        rows += step_rows(f'step, {name}', cell, steps.get('base', cell))
    if both := found.get('everything on', {}).get('in turns'):
        low, high = both['95 % interval']
        stock, ours = (statistics.median(both['groups'][side]) for side in SIDES)
        rows.append(('step, everything on', ours, 's', f'stock {stock:.3g}', both['median ratio']))
        rows.append(('', both['mean ratio'], 'mean ratio', f'95 %: {low:.4f} to {high:.4f}', None))
        for side in SIDES:
            if used := both['peak memory'][side]:
                expected = both['predicted memory'][side]
                what = f'memory of it, {side}, microbatch {both["microbatch"]}'
                rows.append((what, used / 1e9, 'GB peak', f'predicted {expected / 1e9:.3g}', used / expected))
    if moved := found.get('averages', {}).get('all'):
        for name, limit in (('snapshot', 'device to host'), ('EMA update', 'device to device')):
            speed = moved['B/s'][name]
            ratio = speed / limits[limit]['B/s'] if limits else None
            rows.append((f'{"LAWA" if name == "snapshot" else ""} {name}'.strip(), speed / 1e9, 'GB/s', limit, ratio))
    for form, sides in found.get('saving', {}).items():
        for unit, scale in (('seconds', 1), ('bytes', 1e9)):
            stock, ours = (np.median(sides[side][unit]) / scale for side in SIDES)
            low, high = np.min(sides['ours'][unit]) / scale, np.max(sides['ours'][unit]) / scale
            spread = f'stock {stock:.3g}; {low:.3g} to {high:.3g}' if scale == 1 else f'stock {stock:.3g}'
            rows.append((f'a checkpoint, {form}', ours, 's' if scale == 1 else 'GB', spread, ours / stock))
    table = Table(title=found.get('gpu', 'no GPU'), title_justify='left')
    for column, justify in {
        'what': 'left',
        'measured': 'right',
        'unit': 'left',
        'against': 'left',
        'ratio': 'right',
    }.items():
        table.add_column(column, justify=justify)  # pyright: ignore[reportArgumentType]
    for what, value, unit, against, ratio in rows:
        table.add_row(what, number(value), unit, against, '' if ratio is None else f'{ratio:.3f}')
    return table


def main(options: argparse.Namespace) -> int:
    """Measure and print; 1 if a measurement failed."""
    taken = Measurements(options.json, options.budget)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        bench = Bench(Path(name), options.tiny)
        limits = taken.take('ceilings', 'all', functools.partial(ceilings, options.tiny))
        known = gpu_named(torch.cuda.get_device_name()) if DEVICE == 'cuda' else None
        if known or limits:
            bench.gpu = find_gpu(known or f'{limits["matrix product"]["FLOP/s"]}')  # pyright: ignore[reportOptionalSubscript]
            taken.found['peak FLOP/s'] = bench.gpu.peak
            taken.found['peak'] = f'peak of {known}' if known else ''
        compiled = {'compile_config': {'backend': 'aot_eager'} if options.tiny else {}}
        measurements: list[tuple[str, str, Callable[[], Found]]] = [
            ('step', 'base', bench.step),
            ('step', 'compiled', functools.partial(bench.step, **compiled)),
            ('everything on', 'in turns', bench.everything),
            ('averages', 'all', bench.snapshots),
            ('step', 'compiled, largest', functools.partial(bench.step, most=bench.rows, **compiled)),
            ('step', 'FSDP2, one process', bench.fsdp),
            ('step', 'eager', functools.partial(bench.step, bench.model | {'attn_implementation': 'eager'})),
            ('step', 'FlashAttention 2', bench.flash),
            ('saving', 'one file', functools.partial(bench.saving, False)),
            ('saving', 'sharded', functools.partial(bench.saving, True)),
            ('step', f'MPT, {bench.mpt()["loss_fn"]}', functools.partial(bench.step, bench.mpt())),
            ('step', 'Liger', bench.liger),
        ]
        try:
            for section, what, measure in measurements:
                taken.take(section, what, measure)
        except KeyboardInterrupt:
            taken.found['failed']['stopped'] = 'by a signal, in the measurement after the last above'
    console = make_console()
    print_table(table_of(taken.found), console)
    console.print(ANCHORS, markup=False)
    for label, reason in taken.found['skipped'].items():
        console.print(f'skipped: {label}: {reason}', markup=False)
    for label, reason in taken.found['failed'].items():
        console.print(f'failed: {label}: {reason[-600:]}', markup=False)
    return 1 if taken.found['failed'] else 0


if __name__ == '__main__':
    sys.exit(main(OPTIONS))
