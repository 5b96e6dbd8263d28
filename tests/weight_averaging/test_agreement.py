# SPDX-License-Identifier: Apache-2.0
"""What may be averaged, in which order, and under which names the result is saved: checkpoints that others made."""

import json
import re
import shutil
import tempfile
from pathlib import Path

import average_checkpoints
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dist_cp
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, OPTConfig

from cpt_algorithms.weight_averaging.offline.select import AverageError, find

SIZES = {'hidden_size': 16, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'vocab_size': 64}
WORDS = st.sampled_from(['checkpoint-', 'step_', 'global_step', 'epoch=', 'v2-iter', 'run 3 at ', 'ba'])


def average(out: Path, *arguments: object) -> Path:
    average_checkpoints.main([*map(str, arguments), '--out', str(out)])
    return out


def refusal(capsys, out: Path, *arguments: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        average(out, *arguments)
    assert exit_info.value.code == 2 and not out.exists()
    return capsys.readouterr().err.splitlines()[-1]


# Order


@settings(deadline=None, max_examples=60)
@given(
    WORDS,
    st.lists(st.integers(0, 10**6), min_size=2, max_size=5, unique=True),
    st.sampled_from(['', '.pt', '-rank0.pt', '-of-3.safetensors', '/model.safetensors']),
    st.booleans(),
    st.randoms(),
)
def test_numbers_in_names_are_numbers(word, steps, ending, with_epoch, random):
    """Whatever stands around them, and whether or not epochs rise with them."""
    steps = sorted(steps)
    names = [f'{f"epoch{number // 2}-" if with_epoch else ""}{word}{step}{ending}' for number, step in enumerate(steps)]
    with tempfile.TemporaryDirectory() as folder:
        made = [Path(folder, name) for name in names]
        for path in random.sample(made, len(made)):
            path.parent.mkdir(exist_ok=True)
            path.touch()
        pattern = f'{folder}/*{"/*" if ending[:1] == "/" else ""}'
        assert [one.path for one in find([pattern], order_matters=True)] == list(map(str, made))


@pytest.mark.parametrize(
    'names',
    [
        ('best', 'checkpoint-500', 'checkpoint-1000'),  # a word is no number
        ('3f2ac0', '91bb7e'),  # revisions of a hub
        ('loss0.52-step100', 'loss0.48-step200'),  # two numbers, two orders
        ('at1.25B', 'at1.5B'),  # 25 is more than 5
        ('at500M', 'at1B'),
    ],
)
def test_an_order_that_names_do_not_say_is_refused_where_it_matters(names, tmp_path, capsys):
    for name in names:
        (tmp_path / 'in' / name).mkdir(parents=True)
        save_file({'w': torch.ones(1)}, tmp_path / 'in' / name / 'model.safetensors', {'format': 'pt'})
        (tmp_path / 'in' / name / 'config.json').write_text('{}')
    for how in (['--weights', 'linear'], ['--window', '2'], ['--may-differ']):
        message = refusal(capsys, tmp_path / 'out', tmp_path / 'in' / '*', *how)
        assert re.search('in/.*oldest first', message), message
    average(tmp_path / 'out', tmp_path / 'in' / '*')  # equal weights have no order
    average(tmp_path / 'listed', *(tmp_path / 'in' / name for name in names), '--weights', 'linear')


def test_a_glob_that_the_shell_has_sorted_as_text_is_refused_where_the_order_matters(tmp_path):
    steps = [tmp_path / f'checkpoint-{step}' for step in (500, 1000, 1500)]
    for step in steps:
        step.touch()
    by_shell = sorted(map(str, steps))
    with pytest.raises(AverageError, match='quote the glob'):
        find(by_shell, order_matters=True)
    assert len(find(by_shell)) == 3
    for order in (steps, steps[::-1]):  # as somebody means it
        assert [one.path for one in find(list(map(str, order)), order_matters=True)] == list(map(str, order))


# What agrees


def write(folder: Path, number: int, config: dict, tokenizer: dict, **tensors: torch.Tensor) -> None:
    folder.mkdir(parents=True)
    save_file({'w': torch.full((2,), float(number)), **tensors}, folder / 'model.safetensors', {'format': 'pt'})
    (folder / 'config.json').write_text(json.dumps(config))
    (folder / 'tokenizer.json').write_text(json.dumps(tokenizer))


SCALING = {'rope_type': 'linear', 'factor': 8.0}
CONFIG = {'model_type': 'llama', 'hidden_size': 8, 'rope_theta': 500000.0, 'rope_scaling': SCALING}
TOKENIZER = {'model': {'vocab': {'a': 0, 'b': 1}}, 'added_tokens': [{'id': 2, 'content': '<s>', 'special': True}]}
CODES = {'w.codes': torch.tensor([1, 2], dtype=torch.int8)}


@pytest.mark.parametrize(
    ('config', 'tokenizer', 'codes', 'words'),
    [
        ({**CONFIG, 'rope_theta': 10000.0}, TOKENIZER, CODES, 'config.json: rope_theta: 500000.0 -> 10000.0'),
        ({**CONFIG, 'rope_scaling': {**SCALING, 'factor': 4.0}}, TOKENIZER, CODES, 'rope_scaling.factor: 8.0 -> 4.0'),
        ({**CONFIG, 'rms_norm_eps': 1e-5}, TOKENIZER, CODES, 'rms_norm_eps: 1e-06 -> 1e-05'),  # beside the default
        (CONFIG, {**TOKENIZER, 'model': {'vocab': {'a': 1, 'b': 0}}}, CODES, 'tokenizer.json: model.vocab.a: 0 -> 1'),
        (CONFIG, {**TOKENIZER, 'added_tokens': []}, CODES, 'tokenizer.json: added_tokens'),
        (CONFIG, TOKENIZER, {'w.codes': torch.tensor([1, 3], dtype=torch.int8)}, 'w.codes, which is int8'),
    ],
)
def test_what_is_no_weight_agrees_or_is_named(config, tokenizer, codes, words, tmp_path, capsys):
    write(tmp_path / 'in' / 'ba1', 1, CONFIG, TOKENIZER, **CODES)
    write(tmp_path / 'in' / 'ba2', 3, config, tokenizer, **codes)
    message = refusal(capsys, tmp_path / 'out', tmp_path / 'in' / 'ba*')
    assert 'ba2 differs from ' in message and words in message, message
    out = average(tmp_path / 'out', tmp_path / 'in' / 'ba*', '--may-differ')
    tensors = load_file(out / 'model.safetensors')
    assert tensors['w'].tolist() == [2.0, 2.0] and tensors['w.codes'].equal(codes['w.codes'])
    assert json.loads((out / 'tokenizer.json').read_text()) == tokenizer


def test_what_says_where_a_model_came_from_may_differ(tmp_path):
    write(tmp_path / 'in' / 'ba1', 1, {**CONFIG, '_name_or_path': 'x', 'transformers_version': '4.1'}, TOKENIZER)
    defaults = {'rms_norm_eps': 1e-6, 'torch_dtype': 'float32', 'attention_bias': False}  # that a newer release writes
    write(tmp_path / 'in' / 'ba2', 3, {**CONFIG, **defaults}, {**TOKENIZER, 'truncation': {'max_length': 8}})
    average(tmp_path / 'out', tmp_path / 'in' / 'ba*')


@pytest.mark.parametrize('key', ['quantization_config', 'compression_config'])
def test_quantised_models_are_refused_whatever_may_differ(key, tmp_path, capsys):
    for number in (1, 2):
        write(tmp_path / 'in' / f'ba{number}', number, {**CONFIG, key: {'quant_method': 'gptq'}}, TOKENIZER, **CODES)
    for how in ([], ['--may-differ']):
        assert key in refusal(capsys, tmp_path / 'out', tmp_path / 'in' / 'ba*', *how)


def test_tokenizers_of_sharded_checkpoints(tmp_path, capsys):
    """Whose tokens are entries of their own."""
    for number, vocabulary in enumerate([{'a.b': 0, 'c': 1}, {'a.b': 0, 'c': 1}, {'a.b': 1, 'c': 0}], start=1):
        content = {'file_extension': '.json', 'content': {'model': {'vocab': vocabulary}}}
        config = {'config': {'content': {'model_type': 'x'}}}
        saved = {'huggingface': {'model': config, 'tokenizer': {'tokenizer.json': content}}}
        state = {'model': {'model.w': torch.full((2,), float(number))}, 'integrations': saved}
        dist_cp.save({'state': state}, checkpoint_id=str(tmp_path / 'in' / f'ep0-ba{number}'), no_dist=True)
    average(tmp_path / 'same', tmp_path / 'in' / 'ep0-ba1', tmp_path / 'in' / 'ep0-ba2')
    message = refusal(capsys, tmp_path / 'out', tmp_path / 'in')
    assert 'ba3 differs' in message and 'tokenizer.json/content/model/vocab/a.b' in message, message


# Names


FAMILIES = {
    'gpt2': GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=32),
    'bloom': BloomConfig(**SIZES),
    'pythia': GPTNeoXConfig(**SIZES, intermediate_size=24),
    'opt': OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32),
    'llama': LlamaConfig(**SIZES, intermediate_size=24),
    'tied llama': LlamaConfig(**SIZES, intermediate_size=24, tie_word_embeddings=True),
}
OLD_BUFFERS = {
    'gpt2': {'h.0.attn.bias': (1, 1, 8, 8), 'h.0.attn.masked_bias': ()},
    'pythia': {'gpt_neox.layers.0.attention.bias': (8, 8), 'gpt_neox.layers.1.attention.rotary_emb.inv_freq': (4,)},
    'llama': {'model.layers.0.self_attn.rotary_emb.inv_freq': (4,)},
}


@pytest.mark.parametrize('without_prefix', [False, True], ids=['as saved', 'without prefix'])
@pytest.mark.parametrize('family', FAMILIES)
def test_published_models_become_what_load_path_takes(family, without_prefix, tmp_path, capsys):
    """Every name of the model that transformers builds and no other, whatever names and buffers the files have."""
    folder = tmp_path / 'ba1'
    model = AutoModelForCausalLM.from_config(FAMILIES[family])
    model.save_pretrained(folder)
    prefix = f'{model.base_model_prefix}.' if without_prefix else ''
    weights = {name.removeprefix(prefix): each for name, each in load_file(folder / 'model.safetensors').items()}
    old = {name: torch.ones(shape) for name, shape in OLD_BUFFERS.get(family, {}).items()}
    save_file({**weights, **old}, folder / 'model.safetensors', {'format': 'pt'})
    for to in ('pt', 'sharded'):
        average(tmp_path / f'{to}.pt', folder, '--to', to)
    state = torch.load(tmp_path / 'pt.pt', weights_only=True)['state']['model']
    expected = model.state_dict()
    assert state.keys() == {f'model.{name}' for name in expected}
    assert all(state[f'model.{name}'].equal(tensor) for name, tensor in expected.items())
    planned = dist_cp.FileSystemReader(tmp_path / 'sharded.pt').read_metadata().state_dict_metadata
    assert {f'state.model.{key}' for key in state} == {key for key in planned if key.startswith('state.model.')}
    for name, change in {
        'w.extra': {**weights, 'w.extra': torch.ones(1)},
        'missing': dict(list(weights.items())[1:]),
    }.items():
        save_file(change, folder / 'model.safetensors', {'format': 'pt'})
        message = refusal(capsys, tmp_path / 'out.pt', folder, '--to', 'pt')
        assert 'config.json' in message and name in message, message


def test_names_of_llm_foundrys_own_models_are_left_alone(tmp_path):
    """For transformers they are its own mpt, which has a tied head and no learned positions."""
    folder = tmp_path / 'ba1'
    folder.mkdir()
    (folder / 'config.json').write_text('{"model_type": "mpt", "architectures": ["MPTForCausalLM"], "d_model": 8}')
    names = ['transformer.wte.weight', 'transformer.wpe.weight']
    save_file({name: torch.ones(2, 8) for name in names}, folder / 'model.safetensors', {'format': 'pt'})
    state = torch.load(average(tmp_path / 'out.pt', folder, '--to', 'pt'), weights_only=True)['state']['model']
    assert list(state) == [f'model.{name}' for name in sorted(names)]


def test_a_tied_pair_of_which_only_the_head_is_stored(tmp_path):
    folder = tmp_path / 'ba1'
    AutoModelForCausalLM.from_config(FAMILIES['tied llama']).save_pretrained(folder)
    weights = load_file(folder / 'model.safetensors')
    weights['lm_head.weight'] = embedding = weights.pop('model.embed_tokens.weight')
    save_file(weights, folder / 'model.safetensors', {'format': 'pt'})
    shutil.copytree(folder, tmp_path / 'ba2')
    state = torch.load(average(tmp_path / 'out.pt', folder, '--to', 'pt'), weights_only=True)['state']['model']
    for name in ('model.lm_head.weight', 'model.model.embed_tokens.weight'):
        assert state[name].equal(embedding)
