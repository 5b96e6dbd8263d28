# SPDX-License-Identifier: Apache-2.0
"""``scripts/average_checkpoints.py``: every format in and out, right to the last place, refusing, being killed, S3."""

import json
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import average_checkpoints
import pytest
import sharded_writer
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from spoilt_checkpoints import Evil, evil_metadata, put_entry, rewrite, saved, write_metadata
from torch.distributed import checkpoint as dist_cp
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, LlamaConfig

from cpt_algorithms.checkpoints.errors import CheckpointError
from cpt_algorithms.checkpoints.open import (
    Chunk,
    TensorOnDisk,
    contiguous,
    open_checkpoint,
    read_metadata,
    safe_globals,
)
from cpt_algorithms.compat import weights_dtype_key
from cpt_algorithms.files import hidden_sibling
from cpt_algorithms.stage.parent_checks import _parent_shapes
from cpt_algorithms.weight_averaging.functional import WINDOW_WEIGHTS, window_weights
from cpt_algorithms.weight_averaging.offline import average as merge
from cpt_algorithms.weight_averaging.offline import averaged_checkpoint
from cpt_algorithms.weight_averaging.offline.average import Average, average_tensors
from cpt_algorithms.weight_averaging.offline.select import AverageError, Found, latest, windows_of

SCRIPT = Path(average_checkpoints.__file__)
SMALL = {
    'vocab_size': 64, 'hidden_size': 16, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'intermediate_size': 32,
    'max_position_embeddings': 16,
}  # fmt: skip


def average(out: Path | str, *arguments: object) -> Path:
    """Runs the script in this process."""
    average_checkpoints.main([*map(str, arguments), '--out', str(out)])
    return Path(out)


def error_of(capsys: pytest.CaptureFixture, out: Path, *arguments: object) -> str:
    """The one line the script prints before it exits with status 2, having left nothing."""
    before = sorted(out.parent.iterdir())
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        average(out, *arguments)
    printed = capsys.readouterr().err.splitlines()
    assert exit_info.value.code == 2
    errors = [line for line in printed if line.startswith('average_checkpoints: error: ')]
    assert len(errors) == 1
    assert sorted(out.parent.iterdir()) == before
    return errors[0]


def load(path: Path) -> dict[str, torch.Tensor]:
    """The model of a Composer checkpoint."""
    with torch.serialization.safe_globals(safe_globals()):
        return torch.load(path, weights_only=True)['state']['model']


def mean(tensors: list[dict[str, torch.Tensor]], weights: list[float]) -> dict[str, torch.Tensor]:
    """In float64; sums of whole multiples are exact, so that what cancels is 0 and no rounding error."""
    scale = min(map(abs, weights))
    factors = [round(weight / scale, 14) for weight in weights]
    return {
        name: sum(f * each[name].double() for f, each in zip(factors, tensors, strict=True)) * scale
        for name in tensors[0]
    }


def dtype_in(folder: Path) -> str:
    config = json.loads((folder / 'config.json').read_text())
    return config[weights_dtype_key(config)]


def units(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest distance, in units of the last place of the result's dtype."""
    bits = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}[result.dtype]
    exponent = torch.frexp(exact).exponent.clamp(min={torch.float16: -13}.get(result.dtype, -125))
    return float(((result.double() - exact).abs() / torch.ldexp(torch.ones_like(exact), exponent - bits)).max())


def assert_right(result: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], most: float = 0.5001) -> None:
    assert result.keys() == exact.keys()
    for name, tensor in result.items():
        assert units(tensor, exact[name]) <= most, name


# The arithmetic


def stored(path: Path, tensor: torch.Tensor) -> TensorOnDisk:
    """A tensor in a file of its own, behind a few other bytes."""
    path.write_bytes(b'other' + bytes(merge.as_bytes(tensor.reshape(-1))))
    chunk = Chunk(path, 5, (0,) * tensor.dim(), tuple(tensor.shape), contiguous(tuple(tensor.shape)))
    return TensorOnDisk(tensor.dtype, tuple(tensor.shape), lambda: [chunk])


def averaged(parts: list[tuple[float, TensorOnDisk]], dtype: torch.dtype, accumulate=torch.float32) -> torch.Tensor:
    result = torch.zeros(parts[0][1].shape, dtype=dtype)
    data = merge.as_bytes(result.view(-1))

    def write(begin: int, block: memoryview) -> None:
        data[begin : begin + len(block)] = block

    average_tensors([Average(parts, dtype, write)], accumulate)
    return result


def test_by_hand(tmp_path: Path):
    parts = [stored(tmp_path / f'{i}', torch.tensor(values)) for i, values in enumerate([[3.0, 0.0], [6.0, -8.0]])]
    assert averaged([(0.5, parts[0]), (0.5, parts[1])], torch.float32).tolist() == [4.5, -4.0]
    assert averaged([(0.25, parts[0]), (0.75, parts[1])], torch.float32).tolist() == [5.25, -6.0]
    assert averaged([(2.0, parts[0]), (-1.0, parts[1])], torch.float32).tolist() == [0.0, 8.0]
    nothing = (0.0, stored(tmp_path / 'nan', torch.tensor([torch.nan] * 2)))
    assert averaged([nothing, (1.0, parts[1])], torch.float32).tolist() == [6, -8]


@pytest.mark.parametrize(
    ('dtype', 'accumulate'),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float64)],
)
@pytest.mark.parametrize('kind', ['uniform', 'linear', 'ema', 'one_minus_sqrt'])
def test_half_a_unit_in_the_last_place(dtype, accumulate, kind, tmp_path, monkeypatch):
    """Of checkpoints that are near each other; with equal and linear weights even of ones that cancel."""
    monkeypatch.setattr(merge, 'BLOCK', 1000)
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(10_007, generator=generator)
    if kind in ('uniform', 'linear'):
        base.zero_()
    tensors = [(base + 0.1 * torch.randn(10_007, generator=generator)).to(dtype) for _ in range(5)]
    weights = window_weights(kind, 5)
    parts = [(w, stored(tmp_path / f'{i}', tensor)) for i, (w, tensor) in enumerate(zip(weights, tensors, strict=True))]
    exact = mean([{'x': tensor} for tensor in tensors], weights)['x']
    assert units(averaged(parts, dtype, accumulate), exact) <= 0.5005


def test_float32_with_float32_sums_is_nearly_right(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = [0.02 + 0.001 * torch.randn(10_000, generator=generator) for _ in range(5)]
    parts = [(0.2, stored(tmp_path / f'{i}', tensor)) for i, tensor in enumerate(tensors)]
    exact = mean([{'x': tensor} for tensor in tensors], [0.2] * 5)['x']
    assert units(averaged(parts, torch.float32), exact) < 4
    assert averaged(parts, torch.float64, torch.float64).sub(exact).abs().max() < 1e-16


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=4), st.data())
def test_any_chunks_of_any_layout(tmp_path_factory, shape, data):
    """A tensor cut into boxes, each stored in its own order, is read as it was."""
    folder = tmp_path_factory.mktemp('chunks')
    whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    boxes = [((0,) * len(shape), whole)]
    for axis, size in enumerate(shape):
        if data.draw(st.booleans()):
            cut = data.draw(st.integers(0, size))
            boxes = [
                half
                for at, box in boxes
                for half in (
                    (at, box.narrow(axis, 0, cut)),
                    ((*at[:axis], cut, *at[axis + 1 :]), box.narrow(axis, cut, size - cut)),
                )
            ]
    chunks = []
    for number, (at, box) in enumerate(boxes):
        if not box.numel():
            continue
        order = data.draw(st.permutations(range(box.dim())))
        inverse = [order.index(axis) for axis in range(box.dim())]
        laid_out = box.permute(order).contiguous().permute(inverse)
        path = folder / str(number)
        path.write_bytes(box.permute(order).numpy().tobytes())
        chunks.append(Chunk(path, 0, at, tuple(box.shape), tuple(laid_out.stride())))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, 'BLOCK', data.draw(st.integers(1, 40)))
        found = TensorOnDisk(torch.float32, tuple(shape), lambda: chunks)
        assert averaged([(1.0, found)], torch.float32).equal(whole)
        assert averaged([(0.5, found), (0.5, found)], torch.float64).equal(whole.double())


def test_a_file_that_shrinks_is_an_error(tmp_path):
    part = stored(tmp_path / 'x', torch.ones(100))
    os.truncate(tmp_path / 'x', 50)
    with pytest.raises(CheckpointError, match='x ended early, at byte 50'):
        averaged([(1.0, part)], torch.float32)


# Which checkpoints


def made_up(*batches: int) -> list[Found]:
    return [Found(f'run/ep0-ba{batch}-rank0.pt') for batch in batches]


def batches(found: list[Found]) -> list[int | None]:
    return [one.batch for one in found]


def test_the_latest_by_hand():
    found = made_up(9, 1, 3, 5, 7)
    assert batches(latest(found, 3, None)) == [5, 7, 9]
    assert batches(latest(found, 3, 4)) == [1, 5, 9]
    with pytest.raises(AverageError, match='--every 3: batch 6 is missing'):
        latest(found, 3, 3)


def test_windows_by_hand():
    found = made_up(1, 2, 3, 4, 5)
    assert [batches(each) for each in windows_of(found, None, 1)] == [[1, 2, 3, 4, 5]]
    assert [batches(each) for each in windows_of(found, 3, 1)] == [[1, 2, 3], [2, 3, 4], [3, 4, 5]]
    assert [batches(each) for each in windows_of(found, 2, 2)] == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ('path', 'name', 'batch'),
    [
        ('run/ep0-ba10-rank0.pt', 'ep0-ba10', 10),
        ('run/ep1-ba20', 'ep1-ba20', 20),
        ('run/huggingface/ba7', 'ba7', 7),
        ('run/huggingface/ba7/model.safetensors', 'ba7', 7),
        ('run/huggingface/ba7-ema_100ba', 'ba7-ema_100ba', 7),
        ('alibaba3/x.safetensors', 'x', None),
    ],
)
def test_names(path, name, batch):
    assert (Found(path).name, Found(path).batch) == (name, batch)


def test_help_names_all_weights(capsys):
    with pytest.raises(SystemExit):
        average_checkpoints.main(['--help'])
    printed = capsys.readouterr().out
    assert all(name in printed for name in WINDOW_WEIGHTS)


# A real run: tied embeddings, both callbacks, exports


def llama(folder: Path) -> dict:
    return {'name': 'hf_causal_lm', 'pretrained_model_name_or_path': str(folder / 'llama'), 'pretrained': False,
            'init_device': 'cpu', 'use_flash_attention_2': False, 'use_train_metrics': False}  # fmt: skip


NOTHING_LEARNED = {'name': 'decoupled_adamw', 'lr': 1e-30, 'betas': [0.9, 0.95], 'weight_decay': 0.0}


@pytest.fixture(scope='module')
def run(tmp_path_factory, data) -> Path:
    """Checkpoints and exports of batches 2, 4 and 6, the averages of both callbacks in them."""
    folder = tmp_path_factory.mktemp('run')
    LlamaConfig(**{**SMALL, 'vocab_size': tiny.VOCAB}, tie_word_embeddings=True).save_pretrained(folder / 'llama')
    cfg = tiny.config(
        folder, data, 'run', max_duration='6ba',
        model=llama(folder),
        callbacks={
            'ema': {'half_life': ['2ba', '0.5dur']}, 'lawa': {'k': 2, 'interval': '2ba', 'weights': 'linear'},
            'hf_checkpointer': {'save_folder': str(folder / 'run'), 'save_interval': '2ba', 'precision': 'float32'},
        },
    )  # fmt: skip
    tiny.run(cfg)
    return folder / 'run'


def trajectory(run: Path) -> list[dict[str, torch.Tensor]]:
    return [load(run / f'ep0-ba{batch}-rank0.pt') for batch in (2, 4, 6)]


def without_tied(model: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix('model.'): tensor for name, tensor in model.items() if name != 'model.lm_head.weight'}


def test_a_run_as_hugging_face_model(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(run.parent)  # where it was made, its record does not tell
    out = average(tmp_path / 'out', run.name, '--accumulate', 'float64')
    printed = capsys.readouterr().out
    assert all(f'ep0-ba{batch}-rank0.pt' in printed for batch in (2, 4, 6)) and 'latest' not in printed
    exact = mean(trajectory(run), [1 / 3] * 3)
    assert_right(load_file(out / 'model.safetensors'), without_tied(exact))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_right({f'model.{name}': tensor for name, tensor in model.state_dict().items()}, exact)
    assert len(AutoTokenizer.from_pretrained(out)) == tiny.VOCAB
    record = json.loads((out / 'average.json').read_text())
    assert [one['path'] for one in record['inputs']] == [str(run / f'ep0-ba{b}-rank0.pt') for b in (2, 4, 6)]
    assert [one['weight'] for one in record['inputs']] == [1 / 3] * 3
    assert record['inputs'][0]['bytes'] == (run / 'ep0-ba2-rank0.pt').stat().st_size
    assert (record['accumulator'], record['dtypes'], record['to']) == ('float64', ['float32'], 'hf')
    assert record['versions']['torch'] == torch.__version__.split('+')[0]
    # the exports of the same batches, among them those of averages, give the same
    exports = average(tmp_path / 'exports', run / 'huggingface', '--accumulate', 'float64')
    assert (exports / 'model.safetensors').read_bytes() == (out / 'model.safetensors').read_bytes()


def test_a_run_as_parent_of_a_stage(run, data, tmp_path):
    options = '--last 2 --every 2ba --to pt --weights linear --accumulate float64'
    out = average(tmp_path / 'out.pt', run, *options.split())
    exact = mean(trajectory(run)[1:], [1 / 3, 2 / 3])
    assert json.loads((tmp_path / 'out.pt.average.json').read_text())['weights'] == 'linear'
    for options in ({}, {'mmap': True}):
        model = torch.load(out, weights_only=True, **options)['state']['model']
        assert_right(model, exact)
        assert list(model) == list(exact)
        assert model['model.lm_head.weight'].data_ptr() == model['model.model.embed_tokens.weight'].data_ptr()
    cfg = tiny.config(
        tmp_path, data, 'next', max_duration='2ba', load_path=str(out), load_weights_only=True, scheduler={'t_warmup': '1ba'},
        model=llama(run.parent), optimizer=NOTHING_LEARNED,
    )  # fmt: skip
    tiny.run(cfg)
    trained = load(tmp_path / 'next' / 'ep0-ba2-rank0.pt')
    assert all(trained[name].equal(model[name]) for name in model), 'nothing was learned at a learning rate of 0'
    # what was averaged can be averaged
    again = average(tmp_path / 'again', out)
    assert_right(load_file(again / 'model.safetensors'), without_tied({k: v.double() for k, v in model.items()}), 0)


def test_exports_as_parent_of_a_stage(run, tmp_path):
    """The names that safetensors leave out for tied tensors are there again."""
    out = average(tmp_path / 'out.pt', run / 'huggingface', '--to', 'pt', '--accumulate', 'float64')
    model = load(out)
    assert_right(model, mean(trajectory(run), [1 / 3] * 3))
    assert model['model.lm_head.weight'].data_ptr() == model['model.model.embed_tokens.weight'].data_ptr()


def test_sharded_result(run, tmp_path):
    out = average(tmp_path / 'out', run, '--to', 'sharded', '--dtype', 'bfloat16')
    exact = mean(trajectory(run), [1 / 3] * 3)
    model = {name: torch.zeros(tensor.shape, dtype=torch.bfloat16) for name, tensor in exact.items()}
    dist_cp.load({'state': {'model': model}}, checkpoint_id=out)
    assert_right(model, exact)
    assert (out / 'average.json').exists()
    again = average(tmp_path / 'again', out)
    assert dtype_in(again) == 'bfloat16'
    tied = load_file(again / 'model.safetensors')
    assert tied.pop('lm_head.weight').equal(tied['model.embed_tokens.weight'])
    assert_right(tied, without_tied(exact))


@pytest.mark.slow
def test_sharded_result_as_parent_of_a_stage_of_two_ranks(run, data, tmp_path):
    """And what the two ranks save is averaged, too."""
    out = average(tmp_path / 'out', run, '--to', 'sharded')
    cfg = tiny.config(
        tmp_path, data, 'next', max_duration='2ba', load_path=str(out), scheduler={'t_warmup': '1ba'},
        model=llama(run.parent), optimizer=NOTHING_LEARNED,
        fsdp_config={'state_dict_type': 'sharded'}, save_interval='1ba',
    )  # fmt: skip
    tiny.launch(tiny.RECIPE, tiny.save(cfg, tmp_path / 'next.yaml'))
    assert len(list((tmp_path / 'next' / 'ep0-ba2').glob('*.distcp'))) == 2
    again = average(tmp_path / 'again', tmp_path / 'next')
    expected = load_file(average(tmp_path / 'hf', run) / 'model.safetensors')
    result = load_file(again / 'model.safetensors')
    assert all(result[name].equal(expected[name]) for name in expected), 'nothing was learned at a learning rate of 0'


def kept(run: Path, callback: str) -> dict:
    with torch.serialization.safe_globals(safe_globals()):
        state = torch.load(run / 'ep0-ba6-rank0.pt', weights_only=True)['state']
    return state['callbacks'][callback]


@pytest.mark.parametrize('name', ['ema_2ba', 'ema_0.5dur'])
def test_the_runs_own_ema(run, tmp_path, name):
    out = average(tmp_path / 'out', run / 'latest-rank0.pt', '--average', name)
    expected = {key.removeprefix('model.'): tensor for key, tensor in kept(run, 'EMA')['averages'][name].items()}
    result = load_file(out / 'model.safetensors')
    assert result.keys() == expected.keys() and all(result[key].equal(expected[key]) for key in result)
    export = load_file(run / 'huggingface' / f'ba6-{name}' / 'model.safetensors')
    assert all(result[key].equal(export[key]) for key in export)
    assert json.loads((out / 'average.json').read_text())['inputs'][0]['path'].endswith('ep0-ba6-rank0.pt')


def test_the_runs_own_lawa(run, tmp_path):
    out = average(tmp_path / 'out', run / 'ep0-ba6-rank0.pt', '--average', 'lawa', '--accumulate', 'float64')
    exact = mean(trajectory(run)[1:], [1 / 3, 2 / 3])
    assert_right(load_file(out / 'model.safetensors'), without_tied(exact))
    record = json.loads((out / 'average.json').read_text())
    assert record['averaged'] == 'lawa' and record['parts_of_the_average'] == [1 / 3, 2 / 3]


def test_windows_of_a_run(run, tmp_path):
    average(tmp_path / 'out', f'{run}/ep*.pt', '--window', 2, '--accumulate', 'float64')
    assert sorted(os.listdir(tmp_path / 'out')) == ['ep0-ba4', 'ep0-ba6']
    for first, name in enumerate(['ep0-ba4', 'ep0-ba6']):
        exact = mean(trajectory(run)[first : first + 2], [0.5, 0.5])
        assert_right(load_file(tmp_path / 'out' / name / 'model.safetensors'), without_tied(exact))
    average(tmp_path / 'blocks', run, '--window', 2, '--stride', 2, '--to', 'pt')
    assert sorted(os.listdir(tmp_path / 'blocks')) == ['ep0-ba4.pt', 'ep0-ba4.pt.average.json']


def test_config_without_an_export(run, tmp_path):
    """From the checkpoint's own state, tokenizer and all; or from --config."""
    for batch in (2, 4):
        shutil.copy(run / f'ep0-ba{batch}-rank0.pt', tmp_path)
    out = average(tmp_path / 'out', f'{tmp_path}/*.pt')
    assert AutoModelForCausalLM.from_pretrained(out).config.hidden_size == SMALL['hidden_size']
    assert AutoTokenizer.from_pretrained(out)('!!')['input_ids'] == [0, 0]
    given = average(tmp_path / 'given', f'{tmp_path}/*.pt', '--config', run.parent / 'llama')
    assert not (given / 'tokenizer.json').exists()


# Hugging Face in and out


def models(folder: Path, config, count: int = 3, dtype: torch.dtype = torch.bfloat16, **options) -> list[dict]:
    found = []
    for number in range(count):
        torch.manual_seed(number)
        model = AutoModelForCausalLM.from_config(config).to(dtype)
        model.save_pretrained(folder / f'ba{number}', **options)
        found.append(model.state_dict())
    return found


@pytest.mark.parametrize('shards', ['one file', 'shards'])
@pytest.mark.parametrize(
    'config',
    [LlamaConfig(**SMALL, tie_word_embeddings=True), LlamaConfig(**SMALL), GPTNeoXConfig(**SMALL)],
    ids=['tied llama', 'llama', 'neox'],
)
def test_hugging_face(config, shards, tmp_path):
    states = models(tmp_path, config, **({'max_shard_size': '4KB'} if shards == 'shards' else {}))
    out = average(tmp_path / 'out', f'{tmp_path}/ba*', *(['--max-shard-size', '4KB'] if shards == 'shards' else []))
    if shards == 'shards':
        ours, theirs = (json.loads((f / 'model.safetensors.index.json').read_text()) for f in (out, tmp_path / 'ba2'))
        assert ours['weight_map'].keys() == theirs['weight_map'].keys()
        assert (
            ours['metadata']['total_size'] == theirs['metadata']['total_size']
            and len(set(ours['weight_map'].values())) > 3
        )
    assert {f.name for f in out.glob('*.json')} >= {f.name for f in (tmp_path / 'ba2').glob('*.json')}
    model = AutoModelForCausalLM.from_pretrained(out, torch_dtype='auto')
    assert model.dtype == torch.bfloat16
    assert_right(model.state_dict(), mean(states, [1 / 3] * 3))


def test_files_instead_of_folders(tmp_path):
    states = models(tmp_path, LlamaConfig(**SMALL))
    files = [tmp_path / f'ba{number}' / 'model.safetensors' for number in (2, 0)]
    out = average(tmp_path / 'out', *files, '--weights', '0.25,0.75', '--dtype', 'float32')  # in the order given
    assert_right(load_file(out / 'model.safetensors'), mean([states[2], states[0]], [0.25, 0.75]), 1)
    assert dtype_in(out) == 'float32'


def test_what_is_no_floating_point_number_is_the_newest_if_it_may_differ(tmp_path, capsys):
    big = 2**53 + 1
    for n in (1, 2):
        tensors = {'w': torch.tensor([float(n)]), 'steps': torch.tensor([big + n]), 'mask': torch.tensor(n > 1)}
        write_hf(tmp_path / f'ba{n}', tensors)
    message = error_of(capsys, tmp_path / 'out', f'{tmp_path}/ba*')
    words = ('ba2 differs from ', 'mask, which is bool', 'steps, which is int64', '--may-differ')
    assert all(word in message for word in words), message
    out = average(tmp_path / 'out', f'{tmp_path}/ba*', '--may-differ')
    result = load_file(out / 'model.safetensors')
    assert (result['w'].item(), result['steps'].item(), result['mask'].item()) == (1.5, big + 2, True)
    assert sorted(json.loads((out / 'average.json').read_text())['copied_from_newest']) == ['mask', 'steps']


# Other ways to store tensors


def test_odd_tensors_of_a_pt_file(tmp_path):
    """Transposed, part of a larger storage, tied, empty, scalar; saved from a GPU."""
    base = torch.arange(60.0)
    part = base[7:].as_strided((3, 4), (5, 1))
    model = {
        'a': torch.arange(6.0).view(2, 3).t(),
        'b': part,
        'c': part,
        'd': torch.empty(0, 3),
        'e': torch.tensor(7.0),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.serialization, 'location_tag', lambda storage: 'cuda:3')
        torch.save({'state': {'model': model}}, tmp_path / 'x.pt')
    found = open_checkpoint(tmp_path / 'x.pt')
    assert found.aliases == {'c': 'b'} and found.prefix == ''
    out = average(tmp_path / 'out.pt', tmp_path / 'x.pt', '--to', 'pt')
    result = load(out)
    assert all(result[name].equal(model[name]) for name in model)


@pytest.fixture(scope='module')
def shards(tmp_path_factory) -> Path:
    """Three sharded checkpoints of two ranks; see sharded_writer.py."""
    folder = tmp_path_factory.mktemp('shards')
    command = [sys.executable, sharded_writer.__file__, str(folder), '3']
    ranks = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
    try:
        assert [rank.wait(300) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    assert len(list((folder / 'ep0-ba1').glob('*.distcp'))) == 2
    return folder


def test_shards_of_ranks(shards, tmp_path):
    found = open_checkpoint(shards / 'ep0-ba2')
    content = {'model_type': 'llama', 'layers': [1, 2], 'nested': {'a.b': None}}
    assert found.integrations == {'huggingface': {'model': {'config': {'content': content}}}}
    assert len(found.tensors['columns'].chunks) == 2
    out = average(tmp_path / 'out', shards, '--accumulate', 'float64', '--may-differ')  # steps are counted
    result = load_file(out / 'model.safetensors')
    states = [sharded_writer.tensors(number) for number in range(3)]
    assert result.pop('steps').item() == 2
    exact = mean(states, [1 / 3] * 3)
    del exact['steps']
    assert_right(result, exact)
    assert json.loads((out / 'config.json').read_text())['layers'] == [1, 2]


def test_averages_in_shards(shards, tmp_path):
    original = sharded_writer.tensors(2)
    for name, factor in {'ema_0.01dur': 2, 'lawa': (1 * 1 + 2 * 4) / 3}.items():
        out = average(tmp_path / name, shards / 'ep0-ba3', '--average', name)
        result = load_file(out / 'model.safetensors')
        for each in ('rows', 'tied'):
            torch.testing.assert_close(result.pop(each), factor * original['rows'])
        assert all(tensor.equal(original[key]) for key, tensor in result.items())
        kept = json.loads((out / 'average.json').read_text())['not_in_the_callback']
        assert sorted(kept) == sorted(original.keys() - {'rows', 'tied', 'steps'})


# Never running what a file brings along


def test_no_tensor_is_left_out_because_metadata_calls_it_otherwise(shards, tmp_path):
    shutil.copytree(shards / 'ep0-ba1', tmp_path / 'x')
    found = read_metadata(tmp_path / 'x')
    key = next(key for key in found.planner_data if key.startswith('state.model.'))
    for path in ((), ('state', 'model'), ('state', 'model', 'x')):
        found.planner_data[key] = path
        write_metadata(tmp_path / 'x', found)
        with pytest.raises(CheckpointError, match=f'does not say to which part of the state {key} belongs'):
            open_checkpoint(tmp_path / 'x')


def malicious_file(path: Path, sign: Path) -> None:
    torch.save({'state': {'model': {'model.w': torch.ones(1)}, 'callbacks': Evil(sign)}}, path)


MALICIOUS = {
    'x.pt': malicious_file,
    '.metadata': evil_metadata,
    'state.model.model.whole in': lambda path, sign: put_entry(path, 'state.model.model.whole', saved(Evil(sign))),
}


@pytest.mark.parametrize('what', MALICIOUS)
def test_malicious_checkpoints(what, shards, tmp_path, capsys):
    sign, path = tmp_path / 'sign', tmp_path / 'x.pt'
    if what != 'x.pt':
        shutil.copytree(shards / 'ep0-ba1', path)
    MALICIOUS[what](path, sign)
    message = error_of(capsys, tmp_path / 'out', path)
    assert what in message and 'posix.system' in message and not sign.exists()
    if what == '.metadata':
        with pytest.raises(CheckpointError, match='not safe'):
            _parent_shapes(str(path))  # of preflight
        assert not sign.exists()


@pytest.mark.parametrize(
    ('module', 'attribute'),
    [('builtins', 'eval'), ('torch', 'load'), ('torch.distributed.checkpoint.metadata', 'os.system'), ('torch', 'Size.mro')],
)  # fmt: skip
def test_metadata_imports_nothing_else(module, attribute, tmp_path):
    code = pickle.PROTO + b'\x04' + b''.join(
        pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode() for text in (module, attribute)
    ) + pickle.STACK_GLOBAL + b'.'  # fmt: skip
    (tmp_path / '.metadata').write_bytes(code)
    with pytest.raises(CheckpointError, match='not safe to read: it asks to import'):
        read_metadata(tmp_path)


class Attribute:
    """Pickles as ``getattr(of, name)``, as members of an enumeration do in early releases of Python 3.11."""

    def __init__(self, *words: object) -> None:
        self.words = words

    def __reduce__(self) -> tuple:
        return getattr, self.words


def test_attributes_in_metadata_are_those_of_one_enumeration(shards, tmp_path):
    found = read_metadata(shards / 'ep0-ba1')

    def read(*words: object) -> object:
        data = pickle.dumps(Metadata(found.state_dict_metadata, Attribute(*words), found.storage_data))
        (tmp_path / '.metadata').write_bytes(data)
        return read_metadata(tmp_path).planner_data

    assert read(_MEM_FORMAT_ENCODING, 'TORCH_CONTIGUOUS_FORMAT') is _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    for words in ((_MEM_FORMAT_ENCODING, '__init__'), (torch.Size, 'mro')):
        with pytest.raises(CheckpointError, match='not safe to read: it asks for'):
            read(*words)


# Errors


def write_hf(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})
    (folder / 'config.json').write_text('{}')
    return folder


@pytest.fixture
def good(tmp_path) -> Path:
    """Two checkpoints that go together."""
    for number in (1, 2):
        write_hf(tmp_path / f'ba{number}', {name: torch.ones(2, 3) for name in 'abcde'})
    return tmp_path


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        ('ba* --weights uniformly', '--weights uniformly'),
        ('ba* --weights 0.5,0.6', '--weights 0.5,0.6'),
        ('ba* --weights 0.5,0.2,0.3', '--weights 0.5,0.2,0.3'),
        ('ba* --decay 0.5', '--decay 0.5'),
        ('ba* --weights ema --decay 2', 'decay=2.0'),
        ('ba* --last 0', '--last 0'),
        ('ba* --last 3', '--last 3 1, 2'),
        ('ba* --every 1ba', '--every 1ba --last'),
        ('ba* --last 2 --every 1ep', '--every 1ep 1000ba'),
        ('ba* --last 2 --every 2', '--every 2 0 1, 2'),
        ('ba* --window 3', '--window 3'),
        ('ba* --stride 2', '--stride 2 --window'),
        ('ba* --to pt', '--out .pt --to pt'),
        ('ba* --to bin', '--to bin'),
        ('ba* --max-shard-size 5G', '--max-shard-size 5G 5GB'),
        ('ba* --config nowhere', '--config nowhere config.json'),
        ('whole.pt --to sharded --config ba1', '--config ba1 --to sharded'),
        ('ba* --weights=', '--weights'),
        ('ba* --average ema_1ba', 'ba1 ema_1ba none'),
        ('ba1 ba1/', 'ba1'),
        ('ba1 nowhere', 'nowhere Composer'),
        ('nowhere*', 'nowhere*'),
        ('ba1 empty', 'empty Composer'),
        ('ba1 unfinished', 'unfinished .metadata'),
        ('ba1 text.pt', 'text.pt damaged'),
        ('ba1 bin/pytorch_model.bin', 'pytorch_model.bin state.model Composer'),
        ('ba1 deflated.pt', 'deflated.pt compressed'),
        ('ba1 short.pt', 'short.pt damaged'),
        ('ba1 short.safetensors', 'short.safetensors damaged'),
        ('ba1 index', 'index/model.safetensors.index.json model-2.safetensors'),
        ('ba1 outside', '../ba1/model.safetensors'),
        ('ba1 renamed', 'renamed ba1 a b x missing'),
        ('ba1 reshaped', 'a (2, 3) (3, 2) b c 2 more'),
        ('ba1 half', 'half ba1 a float32 float16'),
        ('float8', 'float8/model.safetensors a F8_E4M3 F64'),
        ('configless', 'configless config.json --config'),
        ('ba1 s3:x', 's3:x'),
    ],
)
def test_bad_input_is_named(arguments, words, good, capsys, monkeypatch):
    """In one line that says which, in this order."""
    ones = {name: torch.ones(2, 3) for name in 'abcde'}
    (good / 'empty').mkdir()
    (good / 'unfinished').mkdir()
    (good / 'unfinished' / '__0_0.distcp').touch()
    (good / 'text.pt').write_text('hello')
    (good / 'bin').mkdir()
    torch.save(ones, good / 'bin' / 'pytorch_model.bin')
    torch.save({'state': {'model': ones}}, good / 'whole.pt')
    shutil.copy(good / 'whole.pt', good / 'deflated.pt')
    rewrite(good / 'deflated.pt', lambda members: None, zipfile.ZIP_DEFLATED)
    (good / 'short.pt').write_bytes((good / 'whole.pt').read_bytes()[:-100])
    (good / 'short.safetensors').write_bytes((good / 'ba1' / 'model.safetensors').read_bytes()[:-1])
    for name, file in {'index': 'model-2.safetensors', 'outside': '../ba1/model.safetensors'}.items():
        (good / name).mkdir()
        (good / name / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': {'a': file}}))
    write_hf(good / 'renamed', {name: torch.ones(2, 3) for name in 'cdex'})
    write_hf(good / 'reshaped', {name: torch.ones(3, 2) for name in 'abcde'})
    write_hf(good / 'half', {**ones, 'a': ones['a'].half()})
    write_hf(good / 'float8', {'a': torch.ones(1).to(torch.float8_e4m3fn)})
    write_hf(good / 'configless', ones)
    (good / 'configless' / 'config.json').unlink()
    monkeypatch.setattr(averaged_checkpoint, 'average_tensors', None)  # found before any work
    monkeypatch.chdir(good)
    message = error_of(capsys, good / 'out', *arguments.split())
    assert re.search('.*'.join(map(re.escape, words.split())), message), message


def test_unknown_average_names_those_that_are_there(run, tmp_path, capsys):
    message = error_of(capsys, tmp_path / 'out', run / 'ep0-ba6-rank0.pt', '--average', 'ema_3ba')
    assert "'ema_3ba'; there are: ema_2ba, ema_0.5dur, lawa" in message


ROWS = 'state.model.model.rows'


def lead_outside(found: Metadata, folder: Path) -> None:
    for info in found.storage_data.values():
        info.relative_path = f'../../{info.relative_path}'


def claim_more(found: Metadata, folder: Path) -> None:
    rows = found.state_dict_metadata[ROWS]
    rows.size = torch.Size([2**40, *rows.size[1:]])
    rows.chunks[0].sizes = torch.Size([2**40 - sum(chunk.sizes[0] for chunk in rows.chunks[1:]), *rows.size[1:]])


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lead_outside, 'outside the folder'),
        (lambda found, _: found.state_dict_metadata[ROWS].chunks.pop(), f'does not hold all of {ROWS}'),
        (lambda _, folder: os.truncate(folder / '__0_0.distcp', 100), '__0_0.distcp is damaged'),
        (lambda _, folder: (folder / '__1_0.distcp').unlink(), '__1_0.distcp is missing'),
        (lambda found, _: found.storage_data.clear(), '.metadata does not say where state.'),
        (claim_more, f'{ROWS} is larger'),
    ],
)
def test_damaged_shards(damage, message, shards, tmp_path, capsys):
    shutil.copytree(shards / 'ep0-ba1', tmp_path / 'x')
    found = read_metadata(tmp_path / 'x')
    damage(found, tmp_path / 'x')
    write_metadata(tmp_path / 'x', found)
    assert message in error_of(capsys, tmp_path / 'out', tmp_path / 'x')


def test_nothing_is_overwritten(good, capsys):
    for out, options in {'hf': [], 'x.pt': ['--to', 'pt'], 'sharded': ['--to', 'sharded']}.items():
        average(good / out, f'{good}/ba*', *options)
        assert 'exists; choose another --out or delete it' in error_of(capsys, good / out, f'{good}/ba*', *options)
    (good / 'x.pt').unlink()
    assert 'x.pt.average.json exists' in error_of(capsys, good / 'x.pt', f'{good}/ba*', '--to', 'pt')


def test_dry_run_leaves_nothing(good, capsys):
    before = sorted(good.iterdir())
    average(good / 'out', f'{good}/ba*', '--dry-run')
    assert sorted(good.iterdir()) == before
    assert 'ba2' in capsys.readouterr().out


def test_a_place_where_nothing_can_be_made(good, capsys):
    with pytest.raises(SystemExit):
        average(good / 'ba1' / 'config.json' / 'out', f'{good}/ba*')
    assert 'config.json' in capsys.readouterr().err.splitlines()[-1]


def test_too_little_disk(good, capsys, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: shutil._ntuple_diskusage(10, 10, 0))
    assert 'writing out needs 0.0 GB in' in error_of(capsys, good / 'out', f'{good}/ba*')


@pytest.mark.parametrize('to', ['hf', *(pytest.param(to, marks=pytest.mark.slow) for to in ('pt', 'sharded'))])
def test_killed_half_way_leaves_nothing_that_looks_finished(to, good):
    """Kills the process when the data of the third tensor is to be written."""
    out = good / 'out.pt'
    code = (
        'import os, signal, sys; sys.path.insert(0, sys.argv[1])\n'
        'import average_checkpoints\nfrom cpt_algorithms.weight_averaging.offline import average as merge\n'
        'original, calls = merge._average_block, []\n'
        'def block(*arguments):\n'
        '    calls.append(1)\n'
        '    if len(calls) == 3: os.kill(os.getpid(), signal.SIGKILL)\n'
        '    return original(*arguments)\n'
        'merge._average_block = block\n'
        'average_checkpoints.main(sys.argv[2:])\n'
    )
    command = [sys.executable, '-c', code, str(SCRIPT.parent), str(good / 'ba1'), str(good / 'ba2')]
    done = subprocess.run([*command, '--out', str(out), '--to', to], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists() and (good / '.out.pt.partial').exists()
    average(out, f'{good}/ba*', '--to', to)
    assert out.exists() and not (good / '.out.pt.partial').exists()


def test_killed_between_a_result_and_its_companion_it_can_be_run_again(good, capsys):
    """Two renames make them appear, the companion's first."""
    out, partial = good / 'out.pt', good / '.out.pt.partial'
    average(out, f'{good}/ba*', '--to', 'pt')
    partial.mkdir()
    out.rename(partial / out.name)
    average(out, f'{good}/ba*', '--to', 'pt')
    assert out.exists() and not partial.exists()
    out.unlink()
    assert 'out.pt.average.json exists' in error_of(capsys, out, f'{good}/ba*', '--to', 'pt'), "somebody else's"


def test_two_runs_at_once(good, capsys):
    out, arguments = good / 'out.pt', (f'{good}/ba*', '--to', 'pt')
    with hidden_sibling(out, RuntimeError()):
        assert 'another run is making' in error_of(capsys, out, *arguments)
    average(out, *arguments)


# Memory


@pytest.mark.long
def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """Three checkpoints of 128 MB, most of it one tensor, take a few MB more than one of 1 KB."""
    big = 64 << 20
    entries = {
        'small': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]},
        'big': {'dtype': 'BF16', 'shape': [big], 'data_offsets': [8, 8 + 2 * big]},
    }
    header = json.dumps(entries).encode()
    for number in range(3):
        folder = tmp_path / f'ba{number}'
        folder.mkdir()
        with open(folder / 'model.safetensors', 'wb') as file:
            file.write(struct.pack('<Q', len(header)) + header)
            file.truncate(8 + len(header) + 8 + 2 * big)  # zeros
        (folder / 'config.json').write_text('{}')
    write_hf(tmp_path / 'tiny', {'a': torch.ones(10)})
    code = (
        'import resource, sys; sys.path.insert(0, sys.argv[1]); folder = sys.argv[2]\n'
        'import average_checkpoints\n'
        'def peak(source, to, out):\n'
        '    average_checkpoints.main([f"{folder}/{source}", "--to", to, "--out", f"{folder}/{out}"])\n'
        '    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n'
        'before = max(peak("tiny", "hf", "1"), peak("tiny", "pt", "1.pt"))\n'
        'print(max(peak("ba*", "hf", "2"), peak("ba*", "pt", "2.pt")) - before)\n'
    )
    command = [sys.executable, '-c', code, str(SCRIPT.parent), str(tmp_path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert float(printed.splitlines()[-1]) < 40


# Object storage


def put(client, folder: Path, prefix: str) -> None:
    for file in folder.rglob('*'):
        if file.is_file() and not file.is_symlink():
            client.upload_file(str(file), 'bucket', f'{prefix}/{file.relative_to(folder)}')


def names(client, prefix: str) -> set[str]:
    found = client.list_objects_v2(Bucket='bucket', Prefix=prefix).get('Contents', [])
    return {entry['Key'] for entry in found}


@pytest.mark.long
def test_object_storage(run, shards, bucket, tmp_path, capsys):
    put(bucket, run, 'runs/stage')
    bucket.put_object(Bucket='bucket', Key='runs/stage/latest-rank0.pt.symlink', Body=b'runs/stage/ep0-ba6-rank0.pt')
    here = average(tmp_path / 'here', run, '--last', 2)
    data = (here / 'model.safetensors').read_bytes()
    for number, source in enumerate(['runs/stage', 'runs/stage/ep0-ba[46]*.pt', 'runs/stage/huggingface/ba?']):
        out = average(tmp_path / f'{number}', f's3://bucket/{source}', '--last', 2)
        assert (out / 'model.safetensors').read_bytes() == data
        assert (out / 'tokenizer.json').exists()
        record = json.loads((out / 'average.json').read_text())
        assert record['inputs'][1]['path'].startswith('s3://bucket/runs/stage/')
    put(bucket, shards, 'shards')
    average(tmp_path / 'from shards', 's3://bucket/shards/ep0-ba1', shards / 'ep0-ba2', '--may-differ')
    expected = average(tmp_path / 'local', shards / 'ep0-ba1', shards / 'ep0-ba2', '--may-differ')
    from_shards, expected = (folder / 'model.safetensors' for folder in (tmp_path / 'from shards', expected))
    assert from_shards.read_bytes() == expected.read_bytes()
    # and back
    average_checkpoints.main(['s3://bucket/runs/stage', '--last', '2', '--out', 's3://bucket/merged/hf'])
    assert {name.rpartition('/')[2] for name in names(bucket, 'merged/hf/')} == set(os.listdir(here))
    average_checkpoints.main([str(run), '--to', 'pt', '--out', 's3://bucket/merged/x.pt'])
    assert names(bucket, 'merged/x.pt') == {'merged/x.pt', 'merged/x.pt.average.json'}
    assert sorted(p.name for p in tmp_path.iterdir()) == ['0', '1', '2', 'from shards', 'here', 'local']
    capsys.readouterr()
    for arguments, message in {
        ('s3://bucket/nothing',): 's3://bucket/nothing: no checkpoint found',
        ('s3://bucket/nothing/*',): 's3://bucket/nothing/*: no checkpoint found',
        ('s3://nobucket/x',): 's3://nobucket/x',
        ('nowhere://bucket/x',): 'nowhere://bucket/x',
    }.items():
        assert message in error_of(capsys, tmp_path / 'out', *arguments)
    with pytest.raises(SystemExit):
        average_checkpoints.main([str(run), '--out', 's3://bucket/merged/hf'])
    assert 's3://bucket/merged/hf exists' in capsys.readouterr().err


# Sums with names


@pytest.fixture
def relatives(tmp_path) -> Path:
    """A base, what was made of it in two ways, and one of another precision."""
    values = {'base': [1.0, 2.0, 4.0], 'instruct': [1.5, 2.0, 3.0], 'child': [3.0, -2.0, 4.0]}
    for name, value in values.items():
        write_hf(tmp_path / name, {'x': torch.tensor(value)})
    write_hf(tmp_path / 'half', {'x': torch.tensor(values['base']).bfloat16()})
    return tmp_path


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        ('child --parent base --alpha 0', [1.0, 2.0, 4.0]),
        ('child --parent half --alpha 0.25', [1.5, 1.0, 4.0]),
        ('child --parent base --alpha 1', [3.0, -2.0, 4.0]),
        ('child --parent base --alpha 1.5', [4.0, -4.0, 4.0]),
        ('child --plus instruct --minus base', [3.5, -2.0, 3.0]),
        ('child --plus instruct --minus half', [3.5, -2.0, 3.0]),
    ],
)
def test_sums_with_names(relatives, monkeypatch, arguments, expected):
    monkeypatch.chdir(relatives)
    made = load_file(average(relatives / 'out', *arguments.split()) / 'model.safetensors')
    assert made['x'].tolist() == expected and made['x'].dtype == torch.float32
    inputs = json.loads((relatives / 'out' / 'average.json').read_text())['inputs']
    assert sum(each['weight'] for each in inputs) == 1 and inputs[-1]['path'].endswith('child')


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        ('child instruct base --weights 1,1,-1', '--weights 1,1,-1 child --plus instruct --minus base'),
        ('base child --weights=-0.5,1.5', '--weights -0.5,1.5 child --parent base --alpha 1.5'),
        ('base child instruct --weights 2,-0.5,-0.5', 'INPUT --parent PARENT --alpha A'),
        ('child --parent base', '--parent base needs --alpha'),
        ('child --minus base', '--minus base needs --plus'),
        ('child --parent base --alpha 1 --plus instruct --minus base', '--plus instruct does not go with --parent'),
        ('child --parent base --alpha 0.5 --weights linear', '--weights linear does not go with --parent'),
        ('child instruct --parent base --alpha 0.5', '--alpha is for one INPUT, not 2'),
        ('child --parent base --alpha nan', '--alpha nan'),
        ('child --parent larger --alpha 0.5', 'child does not fit larger: x is (4,) there and (3,) here'),
    ],
)
def test_what_is_no_sum_is_named(relatives, capsys, monkeypatch, arguments, words):
    write_hf(relatives / 'larger', {'x': torch.ones(4)})  # a vocabulary with a row more
    monkeypatch.chdir(relatives)
    message = error_of(capsys, relatives / 'out', *arguments.split())
    assert re.search('.*'.join(map(re.escape, words.split())), message), message
