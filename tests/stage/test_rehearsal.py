# SPDX-License-Identifier: Apache-2.0
"""What the end of a run needs is tried at its start; what a parent was published with is passed on as it was."""

import json
import shutil
import sys

import average_checkpoints
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaTokenizerFast
from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

from cpt_algorithms.stage.on_meta import model_on_meta
from cpt_algorithms.stage.preflight import preflight
from cpt_algorithms.stage.rehearsal import rehearse
from cpt_algorithms.stage.saving import StoppedError
from cpt_algorithms.stage.stage import Model, Stage
from cpt_algorithms.validation import ConfigError

UNWRITABLE = '{"do_sample": false, "temperature": 0.9, "top_p": 0.6,  "eos_token_id": 255}'


@pytest.fixture(scope='module')
def parent(data, tmp_path_factory):
    """A model as many are published; with `temperature`, also as some older ones are."""
    folder = tmp_path_factory.mktemp('published')
    config = LlamaConfig(
        vocab_size=tiny.VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=tiny.SEQ_LEN, eos_token_id=255, pad_token_id=255, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(data['tokenizer'])).save_pretrained(folder)
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**config, 'temperature': 0.5}))
    (folder / 'generation_config.json').write_text(UNWRITABLE)
    return folder


def stage(parent, data, tmp_path, **over):
    model = {'name': 'hf_causal_lm', 'pretrained_model_name_or_path': str(parent), 'init_device': 'cpu'}
    return tiny.config(
        tmp_path, data, 'child', model={**model, 'use_train_metrics': False}, tokenizer={'name': str(parent)},
        max_duration='2ba', save_interval='1ba', scheduler={'t_warmup': '1ba'}, **over,
    )  # fmt: skip


def test_the_published_generation_config_is_passed_on(parent, data, tmp_path, monkeypatch):
    cfg = stage(parent, data, tmp_path, callbacks={'ema': {'half_life': '2ba'}})
    cfg = Stage.from_yaml(cfg).to_train_yaml()
    tiny.run(cfg)
    exports = sorted((tmp_path / 'child' / 'huggingface').iterdir())
    assert [path.name for path in exports] == ['ba2', 'ba2-ema_2ba']
    average = [str(path) for path in exports]
    monkeypatch.setattr(sys, 'argv', ['average_checkpoints.py', *average, '--out', str(tmp_path / 'average')])
    average_checkpoints.main()
    for folder in (*exports, tmp_path / 'average'):
        assert (folder / 'generation_config.json').read_text() == UNWRITABLE
        assert LlamaForCausalLM.from_pretrained(folder).generation_config.top_p == 0.6


SETTINGS = {
    'do_sample': st.booleans(),
    'temperature': st.floats(0.1, 2),
    'top_p': st.floats(0.1, 1),
    'typical_p': st.floats(0.1, 1),
    'num_beams': st.integers(1, 3),
    'length_penalty': st.floats(0.5, 2),
    'num_return_sequences': st.integers(1, 3),
    'return_dict_in_generate': st.booleans(),
    'output_scores': st.booleans(),
    'cache_implementation': st.sampled_from(['static', 'hybrid']),
    'a_key_of_another_version': st.booleans(),
}


@settings(max_examples=12, deadline=None)
@given(published=st.fixed_dictionaries({}, optional=SETTINGS))
def test_whatever_transformers_reads_can_be_exported(published, parent, tmp_path_factory):
    folder = shutil.copytree(parent, tmp_path_factory.mktemp('other'), dirs_exist_ok=True)
    (folder / 'generation_config.json').write_text(json.dumps(published))
    try:
        GenerationConfig.from_pretrained(folder)
    except ValueError:
        return
    given = {'name': 'hf_causal_lm', 'pretrained_model_name_or_path': str(folder)}
    rehearse(model_on_meta(Model.model_validate(given)))
    shutil.rmtree(folder)


class Published(PreTrainedTokenizerFast):
    """Saves a file of its own beside tokenizer.json, as some families do."""

    file = ('qwen.tiktoken', b'IA== 220\n')

    def _save_pretrained(self, save_directory, file_names, legacy_format=None, filename_prefix=None):
        saved = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        place = f'{save_directory}/{self.file[0]}'
        with open(place, 'wb') as written:
            written.write(self.file[1])
        return (*saved, place)


@pytest.mark.parametrize('file', ['qwen.tiktoken', 'tokenizer.model', 'vocab.bin', 'merges.json', 'bpe.txt'])
def test_a_tokenizer_that_no_checkpoint_can_hold(file, parent, monkeypatch):
    monkeypatch.setattr(Published, 'file', (file, b'\xff\xfe 220\n'))
    given = {'name': 'hf_causal_lm', 'pretrained_model_name_or_path': str(parent)}
    model = model_on_meta(Model.model_validate(given))
    vars(model)['tokenizer'] = Published.from_pretrained(parent)
    with pytest.raises(ValueError, match=rf'tokenizer={parent}: {file} .*without {file}') as caught:
        rehearse(model)
    assert '/tmp' not in str(caught.value).replace(str(parent), '')


def test_it_is_refused_before_the_first_batch_and_its_copy_is_not(parent, data, tmp_path):
    published = shutil.copytree(parent, tmp_path / 'published')
    (published / 'tokenizer.model').write_bytes(b'IA== 220\nIQ== 0\n')  # tiktoken's form
    LlamaTokenizerFast(
        vocab_file=str(published / 'tokenizer.model'), tokenizer_file=str(published / 'tokenizer.json'),
        eos_token='<|endoftext|>', bos_token=None, unk_token='<|endoftext|>', add_bos_token=False, legacy=False,
    ).save_pretrained(published)  # fmt: skip
    cfg = stage(published, data, tmp_path)
    with pytest.raises(ConfigError, match=rf'tokenizer={published}: tokenizer\.model .*without tokenizer\.model'):
        preflight(Stage.from_yaml(cfg))
    with pytest.raises(StoppedError, match='tokenizer.model'):
        tiny.run(cfg)
    assert not list((tmp_path / 'child').glob('ep*'))
    copied = shutil.copytree(published, tmp_path / 'copied', ignore=lambda *_: ['tokenizer.model'])
    preflight(Stage.from_yaml({**cfg, 'tokenizer': {'name': str(copied)}}))


def test_a_disk_without_room_for_a_checkpoint_is_named_at_the_start(data, tmp_path, monkeypatch):
    cfg = tiny.config(tmp_path, data, 'run', max_duration='2ba', scheduler={'t_warmup': '1ba'})
    weights = sum(each.numel() for each in model_on_meta(Stage.from_yaml(cfg).model).parameters())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=3 * 4 * weights - 1))
    with pytest.raises(StoppedError, match=rf'^save_folder={tmp_path}/run: a checkpoint takes \S+ MB or more'):
        tiny.run(cfg)
    assert not list((tmp_path / 'run').glob('*.pt'))
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=3 * 4 * weights))
    assert sorted(tiny.run(cfg)) == [0, 1]
