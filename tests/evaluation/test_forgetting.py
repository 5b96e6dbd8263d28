# SPDX-License-Identifier: Apache-2.0
"""Forgetting against the untouched parent: by hand, in real runs, after restarts, and as W&B gets it."""

import json
import shutil
from math import exp, log

import pytest
import recorder
import tiny
import torch
import wandb_files
from composer.loggers import LoggerDestination
from llmfoundry import registry
from streaming import StreamingDataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cpt_algorithms import Forgetting
from cpt_algorithms.evaluation.forgetting import token_bytes
from cpt_algorithms.evaluation.functional import bits_per_byte, by_average, changes, thinned
from cpt_algorithms.stage.preflight import preflight
from cpt_algorithms.stage.restart_checks import write_record
from cpt_algorithms.stage.run import _tracked
from cpt_algorithms.stage.stage import Stage
from cpt_algorithms.validation import ConfigError

TEXT = 'def f(x): return "Grüße, мир, 世界 🌍"\n\tif a  ==  b:\n'


def test_changes_by_hand():
    parent = {'pile': 2.0, 'books': 3.0, 'german': 4.0}
    losses = {'pile': 2.5, 'books': 2.75, 'german': 1.5, 'pile/lawa': 2.25, 'books/lawa': 3.0, 'german/lawa': 1.0}
    assert changes(losses, parent, ['pile', 'books'], ['german']) == {
        'forgetting/pile': 0.5,
        'forgetting/books': -0.25,
        'forgetting/mean': 0.125,
        'adaptation/german': 2.5,
        'adaptation/mean': 2.5,
        'forgetting/pile/lawa': 0.25,
        'forgetting/books/lawa': 0.0,
        'forgetting/mean/lawa': 0.125,
        'adaptation/german/lawa': 3.0,
        'adaptation/mean/lawa': 3.0,
    }
    assert set(changes(parent, parent, ['pile', 'books'], ['german']).values()) == {0.0}
    # a mean over some of the datasets would be taken for one over all
    assert changes({'pile': 2.5}, parent, ['pile', 'books'], ['german']) == {'forgetting/pile': 0.5}
    assert by_average({'a': 1.0, 'a/b': 2.0, 'a/b/lawa': 3.0}, ['a', 'a/b']) == {
        '': {'a': 1.0, 'a/b': 2.0},
        'lawa': {'a/b': 3.0},
    }


def test_bits_per_byte_by_hand():
    assert bits_per_byte(log(2) * 6, 3) == pytest.approx(2)  # 6 bits a token, 3 bytes a token


def test_a_curve_is_thinned_evenly():
    points: list[list[float]] = []
    for batch in range(1000):
        points = thinned(points, [batch, batch / 2], most=50)
    steps = {after[0] - before[0] for before, after in zip(points, points[1:], strict=False)}
    assert steps == {32}
    assert (len(points), points[0], points[-1]) == (32, [0, 0], [992, 496])
    assert len(thinned([[batch] for batch in range(2000)], [2000])) == 1001
    assert len(thinned([[batch] for batch in range(8000)], [8000], most=8000)) == 4001
    points, seen = [], []
    for batch in range(11, 20):
        points = thinned(points, [batch, 7], most=3)
        seen.append([batch for batch, _ in points])
    assert seen == [
        [11], [11, 12], [11, 12, 13], [11, 13], [11, 13, 15], [11, 13, 15], [11, 15], [11, 15], [11, 15, 19],
    ]  # fmt: skip


def byte_level():
    """As GPT-NeoX's: every byte is written as a character."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=['<|endoftext|>'])
    backend.train_from_iterator(['def return if the of Grüße'] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token='<|endoftext|>')


def sentencepiece():
    """As Llama 2's: pieces with a visible space, and bytes for what no piece covers."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token='<unk>', fuse_unk=True))
    backend.normalizer = normalizers.Replace(' ', '\u2581')
    backend.decoder = decoders.Sequence([decoders.Replace('\u2581', ' '), decoders.ByteFallback(), decoders.Fuse()])
    special = ['<unk>', '<s>', *(f'<0x{byte:02X}>' for byte in range(256))]
    backend.train_from_iterator(
        ['def return if the of Grüße'] * 9, trainers.BpeTrainer(vocab_size=400, special_tokens=special)
    )
    # the bytes are ordinary tokens, as in Llama 2
    model = json.loads(backend.to_str())
    model['added_tokens'] = [token for token in model['added_tokens'] if not token['content'].startswith('<0x')]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(model)), unk_token='<unk>', bos_token='<s>'
    )


def test_bytes_of_tokens_are_those_of_the_text():
    for tokenizer in (byte_level(), sentencepiece()):
        ids = tokenizer(TEXT, add_special_tokens=False).input_ids
        sizes = token_bytes(tokenizer)
        assert int(sizes[torch.tensor(ids)].sum()) == len(TEXT.encode())
        assert sizes[tokenizer.all_special_ids].sum() == 0
    gap = Tokenizer(models.BPE({'a': 0, 'bc': 7}, []))
    gap.decoder = decoders.ByteLevel()
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=gap)).tolist() == [1, 0, 0, 0, 0, 0, 0, 2]
    wordpiece = Tokenizer(models.WordPiece({'[UNK]': 0}, unk_token='[UNK]'))
    wordpiece.decoder = decoders.WordPiece()
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=wordpiece)) is None


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'new': 'german', 'old': ['pile']}, r"forgetting\.new='german' must be a list of labels"),
        ({'new': [], 'old': ['pile']}, r'forgetting\.new=\[\] must be a list'),
        ({'new': ['pile'], 'old': ['pile']}, "'pile' is both new and old"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Forgetting(**arguments)


@pytest.fixture(scope='module')
def parent(data, tmp_path_factory):
    """A model that has learned a little of the old data."""
    folder = tmp_path_factory.mktemp('parent')
    cfg = tiny.config(folder, data, 'parent', train_loader={'dataset': {'new': {'local': str(data['old'])}}})
    tiny.run(Stage.from_yaml(cfg))
    return folder / 'parent'


@pytest.fixture
def child(parent, data, tmp_path):
    return tiny.config(
        tmp_path, data, 'child', load_path=str(parent / 'latest-rank0.pt'), eval_interval='3ba',
        eval_loader=[tiny.eval_loader('fresh', data['new']), tiny.eval_loader('past', data['old'])],
        callbacks={
            'forgetting': {'new': ['fresh'], 'old': ['past']}, 'final_loss': {'window': '4ba', 'interval': '2ba'},
            'lawa': {'k': 2, 'interval': '2ba'},
        },
    )  # fmt: skip


def by_hand(export, folder):
    """Mean loss and bytes per token of a validation set, without Composer."""
    from llmfoundry.models.mpt import MPTForCausalLM

    model, tokenizer = MPTForCausalLM.from_pretrained(export).eval(), AutoTokenizer.from_pretrained(export)
    nats, tokens, size = 0.0, 0, 0
    for row in StreamingDataset(local=str(folder), split='val', batch_size=1):
        ids = torch.as_tensor(row['tokens'].astype('int64'))[None]
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        nats += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction='sum'))
        tokens += ids.numel() - 1
        text = ids[0, 1:][ids[0, 1:] != tokenizer.eos_token_id]  # the end of a text is predicted, and has no bytes
        size += sum(map(len, tokenizer.convert_ids_to_tokens(text.tolist())))  # a character is a byte
    return nats / tokens, size / tokens


def test_tasks_that_are_not_judged_by_the_loss_are_passed_over(child, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # llm-foundry copies tasks here
    (tmp_path / 'qa.jsonl').write_text('{"context": "ab", "answer": "cd", "aliases": ["cd"]}\n' * 2)
    (tmp_path / 'lm.jsonl').write_text('{"context": "ab", "continuation": "cd"}\n' * 2)
    kinds = {'qa': 'generation_task_with_answers', 'lm': 'language_modeling'}
    tasks = [
        {'label': label, 'dataset_uri': str(tmp_path / f'{label}.jsonl'), 'num_fewshot': [0], 'icl_task_type': kind}
        for label, kind in kinds.items()
    ]
    short = {'max_duration': '2ba', 'scheduler': {**child['scheduler'], 't_warmup': '1ba'}}
    seen = Stage.from_yaml({**child, **short, 'icl_tasks': tasks, 'icl_seq_len': 16})
    preflight(seen)
    tiny.run(seen)
    judged = json.loads((tmp_path / 'child' / 'forgetting.json').read_text())
    assert set(judged['parent']) == set(judged['bytes_per_token']) == {'fresh', 'past'}


def test_without_old_data_only_adaptation_is_measured(child, data, tmp_path):
    seen = {}

    class Witness(LoggerDestination):
        def log_metrics(self, metrics, step=None):
            seen.update(metrics)

    registry.loggers.register('witness', func=Witness)
    cfg = tiny.merge(child, {'loggers': {'witness': {}}, 'callbacks': {'forgetting': {'old': None}, 'lawa': None}})
    cfg = Stage.from_yaml({**cfg, 'max_duration': '1ba', 'scheduler': {**cfg['scheduler'], 't_warmup': '1ba'}})
    preflight(cfg)
    tiny.run(cfg)
    assert 'adaptation/fresh' in seen and 'final_adaptation/mean' in seen
    assert not any('forgetting' in key for key in seen)


def test_a_real_stage_against_its_parent(child, parent, data, tmp_path, monkeypatch):
    monkeypatch.setenv('WANDB_DIR', str(tmp_path))
    cfg = tiny.merge(child, {'loggers': {'wandb': {'project': 'p'}}})
    tiny.recipe_here(cfg, tmp_path)
    judged = json.loads((tmp_path / 'child' / 'forgetting.json').read_text())
    losses = json.loads((tmp_path / 'child' / 'losses.json').read_text())
    assert (judged['new'], judged['old']) == (['fresh'], ['past'])
    for label, name in (('fresh', 'new'), ('past', 'old')):
        loss, size = by_hand(parent / 'huggingface' / 'ba8', data[name])
        assert judged['parent'][label] == pytest.approx(loss, rel=1e-5)
        assert judged['bytes_per_token'][label] == pytest.approx(size)
        assert losses['losses'][label][0] == [0, 0, judged['parent'][label]]
    witness = recorder.read(tmp_path / 'child.jsonl')
    assert losses['learning_rate'] == [[batch, line['token'], line['lr'][0]] for batch, line in witness.items()]
    cost = {key: value for key, value in losses['cost'].items() if key != 'device_seconds'}
    tokens = 8 * tiny.TOKENS_PER_BATCH
    assert cost == {'batch': 8, 'tokens': tokens, 'parameters': cost['parameters'], 'devices': 1, 'device': 'cpu'}
    assert losses['cost']['device_seconds'] > 0

    [written] = wandb_files.read(tmp_path)
    first, summary = written.history[0], written.summary
    assert first['_step'] == 0
    assert {first[key] for key in ('forgetting/past', 'forgetting/mean', 'adaptation/fresh')} == {0.0}
    assert first['bits_per_byte/past'] == pytest.approx(
        judged['parent']['past'] / log(2) / judged['bytes_per_token']['past']
    )
    final = {label: mean['mean'] for label, mean in losses['final'].items()}
    assert sorted(final) == ['fresh', 'fresh/lawa', 'past', 'past/lawa']
    last = {label: rows[-1][2] for label, rows in losses['losses'].items()}
    for average in ('', '/lawa'):
        assert summary[f'final_loss/fresh{average}'] == final[f'fresh{average}']
        assert summary[f'final_loss/mean{average}'] == pytest.approx(
            (final[f'fresh{average}'] + final[f'past{average}']) / 2
        )
        assert summary[f'final_forgetting/past{average}'] == final[f'past{average}'] - judged['parent']['past']
        assert summary[f'final_adaptation/mean{average}'] == judged['parent']['fresh'] - final[f'fresh{average}']
        assert summary[f'forgetting/past{average}'] == last[f'past{average}'] - judged['parent']['past']
        assert summary[f'perplexity/past{average}'] == pytest.approx(exp(last[f'past{average}']))
    assert summary['cost/tokens'] == tokens
    assert summary['cost/flops'] == 6 * cost['parameters'] * tokens
    assert summary['cost/device_hours'] == pytest.approx(losses['cost']['device_seconds'] / 3600)


def written(folder):
    losses = json.loads((folder / 'losses.json').read_text())
    del losses['cost']['device_seconds']
    return losses, json.loads((folder / 'forgetting.json').read_text())


@pytest.mark.long
def test_the_parent_is_evaluated_once(child, data, tmp_path, monkeypatch):
    def recipe(cfg, stop=None):
        monkeypatch.setattr(registry.callbacks.get('stop'), 'AT', stop, raising=False)
        try:
            tiny.recipe_here(cfg, tmp_path)
        except RuntimeError as error:
            assert str(error) == 'stopped'
        return written(tmp_path / 'child')[1], (tmp_path / 'child' / 'forgetting.json').stat().st_mtime_ns

    straight = tiny.merge(child, {'callbacks': {'stop': {'at': 99}}})
    recipe(straight)
    expected = written(tmp_path / 'child')
    shutil.rmtree(tmp_path / 'child')

    other = tiny.config(tmp_path, data, 'other', seed=3)
    tiny.run(Stage.from_yaml(other))
    judged, _ = recipe(tiny.merge(straight, {'load_path': str(tmp_path / 'other' / 'latest-rank0.pt')}), stop=1)
    assert judged['parent'] != expected[1]['parent']
    judged, when = recipe(straight, stop=1)
    assert judged == expected[1], 'another parent is evaluated again'
    assert recipe(straight, stop=5) == (judged, when), 'not the same one before the first checkpoint'
    assert recipe(straight) == (judged, when), 'nor after it'
    assert written(tmp_path / 'child') == expected


def test_a_restart_goes_on_as_the_same_wandb_run(child, tmp_path):
    cfg = tiny.merge(child, {'loggers': {'wandb': {}}})
    ids = []
    failed = tmp_path / 'child' / 'failed.json'
    failed.parent.mkdir()
    failed.write_text('{}')
    for given in (cfg, cfg, tiny.merge(cfg, {'loggers': {'wandb': {'init_kwargs': {'id': 'mine'}}}})):
        record = write_record(Stage.from_yaml(given))
        loggers = _tracked(given['loggers'], record.wandb_id)
        assert loggers['wandb']['init_kwargs']['resume'] == 'allow'
        ids.append(loggers['wandb']['init_kwargs']['id'])
    assert ids[0] == ids[1] != ids[2] == 'mine'
    assert not failed.exists(), 'nor as one that has failed'


def test_what_cannot_be_judged_is_refused(child, data, write_mds, tmp_path):
    def problems(over):
        with pytest.raises(ConfigError) as refused:
            preflight(Stage.from_yaml(tiny.merge(child, over)))
        return str(refused.value)

    assert 'callbacks.forgetting compares with the parent, and load_path is missing' in problems({'load_path': None})
    assert 'load_path=nowhere.pt does not exist' in problems({'load_path': 'nowhere.pt'})
    assert 'eval_first=false' in problems({'eval_first': False})
    assert "'pasd'; did you mean 'past'?" in problems({'callbacks': {'forgetting': {'old': ['pasd']}}})
    empty = write_mds(tmp_path / 'empty', 0, 0, split='val')
    assert 'eval_loader[0].dataset: ' in problems({'eval_loader': [tiny.eval_loader('past', empty)]})
    small = {**tiny.eval_loader('past', data['old']), 'drop_last': True}
    with pytest.raises(ValueError, match=r'eval_loader past: it is empty, or has less than a batch'):
        tiny.run(Stage.from_yaml(tiny.merge(child, {
            'eval_loader': [tiny.eval_loader('fresh', data['new']), small], 'device_eval_batch_size': 64,
        })))  # fmt: skip
    with pytest.raises(ValueError, match='the parent was not evaluated on .past.*set eval_first: true'):
        tiny.run({**Stage.from_yaml(child).to_train_yaml(), 'eval_first': False})
