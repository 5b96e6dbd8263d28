# SPDX-License-Identifier: Apache-2.0
"""Every real token is a label, the end of a text included, also where a tokenizer pads with it."""

import copy

import pytest
import tiny
import torch
from composer.core import Callback
from hypothesis import given
from hypothesis import strategies as st
from llmfoundry import registry
from llmfoundry.data.text_data import build_text_dataloader
from llmfoundry.models.mpt import ComposerMPTCausalLM
from streaming import MDSWriter
from transformers import AutoTokenizer
from transformers.data.data_collator import DataCollatorForLanguageModeling

from cpt_algorithms.replay.labels import label_every_token
from cpt_algorithms.replay.replay_text import build_replay_text_dataloader

WORKERS = {'num_workers': 0, 'prefetch_factor': None, 'persistent_workers': False, 'drop_last': False}


@pytest.fixture(scope='module')
def tokenizer(data):
    made = AutoTokenizer.from_pretrained(str(data['tokenizer']), model_max_length=tiny.SEQ_LEN)
    assert made.pad_token_id == made.eos_token_id == 255
    return made


@pytest.fixture(scope='module')
def documents(tmp_path_factory):
    """Rows in which texts end, as tokens; and texts."""
    root = tmp_path_factory.mktemp('documents')
    rows = torch.randint(0, 250, (16, tiny.SEQ_LEN), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    rows[:, 5::6] = 255
    with MDSWriter(out=str(root / 'tokens' / 'train'), columns={'tokens': f'ndarray:int32:{tiny.SEQ_LEN}'}) as writer:
        for row in rows.numpy():
            writer.write({'tokens': row})
    with MDSWriter(out=str(root / 'text' / 'train'), columns={'text': 'str'}) as writer:
        for size in range(1, 9):
            writer.write({'text': '<|endoftext|>'.join('abcdefghi'[:size])})
    return root


def ours(folder, tokenizer, **dataset):
    return build_replay_text_dataloader(
        tokenizer, 4, {'max_seq_len': tiny.SEQ_LEN, 'new': {'local': str(folder), 'split': 'train'}, **dataset}
    ).dataloader


def stock(folder, tokenizer):
    dataset = {'max_seq_len': tiny.SEQ_LEN, 'local': str(folder), 'split': 'train'}
    return build_text_dataloader(tokenizer, 4, dataset, **WORKERS).dataloader


def gradient(batch):
    """Of the logits."""
    torch.manual_seed(1)
    model = ComposerMPTCausalLM(
        tokenizer=None, d_model=16, n_heads=2, n_layers=1, max_seq_len=tiny.SEQ_LEN, vocab_size=tiny.VOCAB,
        loss_fn='torch_crossentropy', attn_config={'attn_impl': 'torch'}, use_train_metrics=False,
    )  # fmt: skip
    outputs = model(batch)
    outputs.logits.retain_grad()
    loss = model.loss(outputs, batch)
    (loss if isinstance(loss, torch.Tensor) else loss['total']).backward()
    return outputs.logits.grad


def test_the_gradient_reaches_the_end_of_a_text(documents, tokenizer):
    batch = next(iter(ours(documents / 'tokens', tokenizer)))
    theirs = next(iter(stock(documents / 'tokens', tokenizer)))
    before_the_end = batch['input_ids'][:, 1:] == 255
    assert before_the_end.sum() == 4 * 2
    for found, sign in ((batch, -1), (theirs, 0)):
        ends = gradient(found)[:, :-1, 255][before_the_end]
        assert (ends.sign() == sign).all(), 'the probability of the end rises; with stock it is not touched'
    assert (batch['labels'] == batch['input_ids']).all()
    assert batch['loss_generating_tokens'] == [tiny.SEQ_LEN - 1] * 4, 'microbatches are weighed by these'


@pytest.mark.parametrize('make', [ours, stock], ids=['replay_text', 'an evaluator'])
@pytest.mark.parametrize('side', ['left', 'right'])
def test_texts_that_are_padded_here(side, make, documents, tokenizer):
    tokenizer = copy.copy(tokenizer)
    tokenizer.padding_side = side
    loader = make(documents / 'text', tokenizer)
    label_every_token(loader)
    label_every_token(loader)  # twice is once
    batches = list(loader)
    assert sum(len(batch['labels']) for batch in batches) == 8
    for batch in batches:
        for labels, mask, ids in zip(batch['labels'], batch['attention_mask'], batch['input_ids'], strict=True):
            size = int(mask.sum())
            real = slice(None, size) if side == 'right' else slice(tiny.SEQ_LEN - size, None)
            assert (labels[real] == ids[real]).all()
            assert (labels == -100).sum() == tiny.SEQ_LEN - size


@given(
    rows=st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=9), min_size=1, max_size=5),
    pad=st.sampled_from(['<|endoftext|>', '!']),
    side=st.sampled_from(['left', 'right']),
    as_tensors=st.booleans(),
)
def test_every_real_token_and_no_padding(rows, pad, side, as_tensors, tokenizer):
    tokenizer = copy.copy(tokenizer)
    tokenizer.pad_token, tokenizer.padding_side = pad, side
    loader = torch.utils.data.DataLoader([], collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False))
    label_every_token(loader)
    batch = loader.collate_fn([torch.tensor(row) if as_tensors else {'input_ids': row} for row in rows])
    length = max(map(len, rows))
    fill = [[-100] * (length - len(row)) for row in rows]
    expected = [f + row if side == 'left' else row + f for f, row in zip(fill, rows, strict=True)]
    assert batch['labels'].tolist() == expected


@pytest.mark.parametrize('collate', [None, DataCollatorForLanguageModeling], ids=['none', 'masked'])
def test_labels_of_another_kind_stay(collate, tokenizer):
    tokenizer = copy.copy(tokenizer)
    tokenizer.mask_token = '!'
    collate = collate and collate(tokenizer, mlm=True, mlm_probability=0.5)
    loader = torch.utils.data.DataLoader([], collate_fn=collate)
    before = loader.collate_fn
    label_every_token(loader)
    assert loader.collate_fn is before


@pytest.mark.parametrize('callback', ['stage_start', 'final_loss', 'forgetting'])
def test_a_run_trains_and_judges_by_them(callback, documents, data, tmp_path):
    """A stock train loader and a stock evaluator, in a real run."""
    seen = []

    class Witness(Callback):
        def eval_before_forward(self, state, logger):
            seen.append(('eval', bool((state.batch['labels'] == state.batch['input_ids']).all())))

        def after_dataloader(self, state, logger):
            seen.append(('train', bool((state.batch['labels'] == state.batch['input_ids']).all())))

    registry.callbacks.register('witness', func=Witness)
    evaluated = tiny.eval_loader('a', documents / 'tokens')
    evaluated['dataset']['split'] = 'train'
    given = {
        'stage_start': {},
        'final_loss': {'window': '1ba', 'interval': '1ba'},
        'forgetting': {'new': ['a'], 'old': ['b']},
    }
    cfg = tiny.config(
        tmp_path, data, callback, max_duration='1ba', eval_interval='1ba', eval_first=True, save_interval='8ba',
        eval_loader=[evaluated, {**evaluated, 'label': 'b'}], scheduler={'name': 'constant_with_warmup', 't_warmup': '0ba'},
        train_loader={**WORKERS, 'name': 'text', 'dataset': evaluated['dataset']},
    )  # fmt: skip
    cfg['callbacks'] = {'recorder': cfg['callbacks']['recorder'], 'witness': {}, callback: given[callback]}
    tiny.run(cfg)
    assert seen.count(('eval', True)) == 2 * 2 * 2, 'two batches of two datasets, before and after'
    assert ('eval', False) not in seen
    assert callback != 'stage_start' or ('train', True) in seen
