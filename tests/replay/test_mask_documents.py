# SPDX-License-Identifier: Apache-2.0
"""Documents in one row: each as if it were alone, for every kind of model; and a run that is trained so."""

import json
from types import SimpleNamespace

import pretrained
import pytest
import tiny
import torch
from llmfoundry.utils.builders import build_composer_model, build_tokenizer
from transformers.modeling_attn_mask_utils import AttentionMaskConverter

from cpt_algorithms.replay.mask_documents import MaskDocuments, attention_mask_of, document_ids, positions_of

EOS = 7
ROWS = torch.tensor([[3, 5, EOS, 4, 9, 2, EOS, 8], [EOS, 6, 6, EOS, 2, 3, 4, EOS]])
DOCUMENTS = [[0, 0, 0, 1, 1, 1, 1, 2], [0, 1, 1, 1, 2, 2, 2, 2]]
POSITIONS = [[0, 1, 2, 0, 1, 2, 3, 0], [0, 0, 1, 2, 0, 1, 2, 3]]


def test_by_hand():
    documents = document_ids(ROWS, EOS, None)
    assert documents.tolist() == DOCUMENTS and positions_of(documents).tolist() == POSITIONS
    assert document_ids(ROWS, None, EOS).tolist() == [[0, 0, 1, 1, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1, 1, 2]]
    mask = attention_mask_of(documents)[0, 0]
    assert mask.int().tolist()[4] == [0, 0, 0, 1, 1, 0, 0, 0]
    assert mask.int().tolist()[7] == [0, 0, 0, 0, 0, 0, 0, 1]


MPT = {
    'name': 'mpt_causal_lm', 'init_device': 'cpu', 'd_model': 16, 'n_heads': 2, 'n_layers': 2, 'expansion_ratio': 2,
    'max_seq_len': 16, 'vocab_size': tiny.VOCAB, 'loss_fn': 'torch_crossentropy', 'use_train_metrics': False,
}  # fmt: skip
KINDS = {
    'learned positions': {'attn_impl': 'torch', 'attn_uses_sequence_id': True},
    'alibi': {'attn_impl': 'torch', 'attn_uses_sequence_id': True, 'alibi': True},
    'gpt_neox': 'sdpa',
    'gpt_neox eager': 'eager',
    'llama': 'sdpa',
    'llama eager': 'eager',
    'qwen3': 'sdpa',
}


@pytest.fixture
def model_of(data, tmp_path):
    """A Composer model of a kind, of random weights, in evaluation."""

    def model_of(kind, **how):
        torch.manual_seed(3)
        tokenizer = build_tokenizer(str(data['tokenizer']), {'model_max_length': tiny.SEQ_LEN})
        settings = KINDS.get(kind, how.get('attention'))
        if isinstance(settings, dict):
            section = {**MPT, 'attn_config': settings}
        else:
            name = kind.partition(' ')[0]
            base = tmp_path / name
            if not base.exists():
                pretrained.make(name, tmp_path, data['tokenizer'], **how.get('over', {}))
            section = {
                'name': 'hf_causal_lm', 'pretrained_model_name_or_path': str(base), 'pretrained': True,
                'init_device': 'cpu', 'use_train_metrics': False, 'attn_implementation': settings,
            }  # fmt: skip
        name = section.pop('name')
        return build_composer_model(name, section, tokenizer).eval()

    return model_of


def masking(model):
    callback = MaskDocuments(eos_token_id=EOS)
    callback.init(SimpleNamespace(model=model), None)
    return callback


def batch_of(rows):
    return {'input_ids': rows, 'attention_mask': torch.ones_like(rows), 'labels': rows.clone()}


@pytest.mark.parametrize('kind', KINDS)
def test_each_document_is_as_if_it_were_alone(model_of, kind):
    model = model_of(kind)
    callback = masking(model)
    embedding = model.model.get_input_embeddings()
    seen = []
    hook = embedding.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad_()))
    batch = callback.masked(batch_of(ROWS))
    logits = model(batch).logits
    for row, documents in zip(range(len(ROWS)), DOCUMENTS, strict=True):
        for number in set(documents):
            own = torch.tensor([each == number for each in documents])
            alone = model(callback.masked(batch_of(ROWS[row, own][None]))).logits[0]
            torch.testing.assert_close(logits[row, own], alone, rtol=1e-5, atol=1e-5)
            # the loss of one document, by what it looks at
            (gradient,) = torch.autograd.grad(logits[row, own].logsumexp(-1).sum(), seen[0], retain_graph=True)
            assert gradient[row, own].abs().max() > 0 and gradient[row, ~own].abs().max() == 0
    hook.remove()
    joined = model(batch_of(ROWS)).logits if not isinstance(KINDS[kind], dict) else None
    assert joined is None or (joined - logits).abs().max() > 1e-3, 'unmasked, they see each other'


def test_no_document_is_a_label_of_another(model_of):
    batch = masking(model_of('llama')).masked(batch_of(ROWS))
    assert batch['labels'].tolist() == [
        [3, 5, EOS, -100, 9, 2, EOS, -100],
        [EOS, -100, 6, EOS, -100, 3, 4, EOS],
    ]


def test_padding_is_looked_at_by_nobody_else(model_of):
    model = model_of('llama')
    padded = batch_of(ROWS[:1])
    padded['attention_mask'][0, -3:] = 0
    mask = masking(model).masked(padded)['attention_mask'][0, 0]
    assert (mask[:5, 5:] < -1e30).all() and (mask.diagonal() == 0).all()
    # what transformers does with it on a GPU, where it takes no other
    unmasked = AttentionMaskConverter._unmask_unattended(mask[None, None], torch.finfo(torch.float32).min)
    assert torch.equal(unmasked[0, 0], mask)
    assert torch.isfinite(model(masking(model).masked(padded)).logits).all()


def test_what_cannot_be_told_is_refused(model_of):
    with pytest.raises(ValueError, match=r'an MPT needs model\.attn_config\.attn_uses_sequence_id: true'):
        masking(build_composer_model('mpt_causal_lm', {k: v for k, v in MPT.items() if k != 'name'}, None))
    with pytest.raises(ValueError, match='eos_token_id=1 or bos_token_id, and not both'):
        MaskDocuments(1, 2)
    narrow = model_of('mistral', attention='sdpa', over={'sliding_window': 4})
    with pytest.raises(ValueError, match=r'look back 4 tokens only, .* in rows of 8; use flash attention'):
        masking(narrow).masked(batch_of(ROWS))


def test_flash_attention_is_given_one_row(model_of):
    callback = masking(model_of('llama'))
    callback.attention = 'flash_attention_2'
    batch = callback.masked(batch_of(ROWS))
    assert 'attention_mask' not in batch
    assert batch['position_ids'].tolist() == [[*POSITIONS[0], *POSITIONS[1]]]
    assert batch['labels'][0, 8].item() == -100, 'or it would be foretold from the row before'


def test_prompts_for_generation_and_packed_batches_are_left_alone(model_of):
    callback = masking(model_of('llama'))
    prompt = {'mode': 'generate', 'input_ids': ROWS, 'labels': ['an answer']}
    assert callback.masked(callback.labelled(prompt)) is prompt
    packed = {**batch_of(ROWS), 'sequence_id': torch.tensor([[0] * 3 + [1] * 5] * 2), 'loss_generating_tokens': [7, 7]}
    assert callback.labelled(packed)['loss_generating_tokens'] == [6, 6]


@pytest.mark.parametrize('kind', ['learned positions', 'llama'])
def test_a_model_that_ignores_it_is_found_before_training(model_of, kind, monkeypatch):
    model = model_of(kind)
    callback, state = masking(model), SimpleNamespace(model=model, precision='fp32')
    callback.fit_start(state, None)
    monkeypatch.setattr(
        callback, 'masked', lambda batch: {**batch, 'sequence_id': torch.zeros_like(batch['input_ids'])}
    )
    callback._is_checked = False
    with pytest.raises(ValueError, match='documents see each other all the same'):
        callback.fit_start(state, None)


def test_a_run_in_which_documents_do_not_see_each_other(data, tmp_path, capsys):
    ends = {'eos_token_id': EOS}
    more = {
        'eval_interval': '4ba',
        'eval_loader': [tiny.eval_loader('new', data['new'])],
        'model': {'attn_config': {'attn_uses_sequence_id': True}},
    }
    losses = {}
    for name, callbacks in (('masked', {'mask_documents': ends, 'final_loss': {}}), ('not', {'final_loss': {}})):
        cfg = tiny.config(tmp_path, data, name, callbacks=callbacks, **(more if name == 'masked' else {
            key: value for key, value in more.items() if key != 'model'
        }))  # fmt: skip
        tiny.recipe_here(cfg, tmp_path)
        losses[name] = json.loads((tmp_path / name / 'losses.json').read_text())['losses']['new'][-1][2]
    assert losses['masked'] != losses['not']
    longer = tiny.config(tmp_path, data, 'masked', callbacks={'final_loss': {}}, **{**more, 'max_duration': '12ba'})
    del longer['model']['attn_config']['attn_uses_sequence_id']
    with pytest.raises(SystemExit, match='mask_documents'):
        tiny.recipe_here(longer, tmp_path)
