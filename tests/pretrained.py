# SPDX-License-Identifier: Apache-2.0
"""Pretrained models: tiny ones of random weights, a stage that updates them, and how their users load the result."""

import json
import shutil
from pathlib import Path

import tiny
import torch
from streaming import StreamingDataset
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    'vocab_size': tiny.VOCAB, 'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 2,
    'num_attention_heads': 4, 'max_position_embeddings': tiny.SEQ_LEN,
}  # fmt: skip
LONG = 64
# What people continue: the type in config.json, and what else a tiny one of it is given.
HEADS = {'num_key_value_heads': 2, 'head_dim': 8}
ENDS = {'bos_token_id': 0, 'eos_token_id': 0, 'pad_token_id': 0}
FAMILIES = {
    'apertus': HEADS, 'gemma2': HEADS, 'gemma3_text': HEADS, 'gpt2': {}, 'gpt_neox': {}, 'llama': HEADS,
    'gpt_oss': {**HEADS, 'num_local_experts': 4, 'num_experts_per_tok': 2}, 'mistral': HEADS, 'olmo2': HEADS,
    'olmo3': HEADS, 'phi3': HEADS, 'qwen2': HEADS, 'qwen3': {**HEADS, 'tie_word_embeddings': True}, 'smollm3': HEADS,
}  # fmt: skip
KINDS = {
    **{kind: (kind, {**more, **ENDS}) for kind, more in FAMILIES.items()},
    'neox': ('gpt_neox', {'rotary_pct': 0.25, 'use_parallel_residual': True}),
    'llama': ('llama', {'num_key_value_heads': 2}),
    'tied_llama': ('llama', {'num_key_value_heads': 2, 'tie_word_embeddings': True}),
}


def make(kind, folder, tokenizer, dtype=torch.float32, **over):
    """A random model, saved as people publish them: weights, config and tokenizer in one folder."""
    torch.manual_seed(5)
    model_type, more = KINDS[kind]
    config = AutoConfig.for_model(model_type, **SIZES | more | over)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder / kind)
    shutil.copytree(tokenizer, folder / kind, dirs_exist_ok=True)
    return folder / kind


def stage(folder, data, run_name, base, **over):
    """An update of a base with ``new``; ``old`` stands in for what the base has learned, which nobody knows."""
    stand_in = {'local': str(data['old']), 'split': 'train', 'stand_in_for': 'what it was trained on'}
    model = {
        'name': 'hf_causal_lm', 'pretrained_model_name_or_path': str(base), 'pretrained': True, 'init_device': 'cpu',
        'use_train_metrics': False, 'attn_implementation': 'sdpa',
    }  # fmt: skip
    cfg = tiny.config(
        folder, data, run_name, eval_interval='3ba', save_num_checkpoints_to_keep=-1,
        eval_loader=[tiny.eval_loader('fresh', data['new']), tiny.eval_loader('past', data['old'])],
        train_loader={'dataset': {'replay': {'fraction': 0.25, 'streams': {'old': stand_in}}}},
        callbacks={
            'forgetting': {'new': ['fresh'], 'old': ['past']}, 'final_loss': {'window': '4ba', 'interval': '2ba'},
            'ema': {'half_life': '2ba'}, 'lawa': {'k': 2, 'interval': '2ba'},
        },
        optimizer={'lr': 5e-3},
    )  # fmt: skip
    return tiny.merge({**cfg, 'model': model}, over)


def read(path):
    return json.loads(Path(path).read_text())


def load(folder):
    """As its users load it; nothing may be missing."""
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    return model.eval()


def logits(model):
    tokens = torch.arange(2 * tiny.SEQ_LEN).reshape(2, -1)
    with torch.no_grad():
        return model(tokens).logits


def of_checkpoint(path, config):
    """The model that a Composer checkpoint holds, by transformers alone."""
    model = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(config).config)
    state = torch.load(path, weights_only=False)['state']['model']
    model.load_state_dict({name.removeprefix('model.'): value for name, value in state.items()})
    return model.eval()


def loss_by_hand(model, folder, tokenizer):
    """Mean loss over a validation set, without Composer."""
    nats, count = 0.0, 0
    for row in StreamingDataset(local=str(folder), split='val', batch_size=1):
        ids = torch.as_tensor(row['tokens'].astype('int64'))[None]
        with torch.no_grad():
            predictions = model(ids).logits[0, :-1]
        nats += float(torch.nn.functional.cross_entropy(predictions, ids[0, 1:], reduction='sum'))
        count += ids.numel() - 1
    return nats / count
