# SPDX-License-Identifier: Apache-2.0
"""Text that a model writes: drawn with its own probabilities, the same whoever draws it and however often it is killed."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import huggingface_hub
import prepare_data
import pretrained
import pytest
import tiny
import torch
from rich.console import Console
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpt_algorithms.cost.estimate import model_size
from cpt_algorithms.cost.tables import print_costs
from cpt_algorithms.formatting import flop, short
from cpt_algorithms.preparation import sampling
from cpt_algorithms.preparation.manifest import sampled_from
from cpt_algorithms.preparation.reading import PrepareError
from cpt_algorithms.preparation.sampling import Sampling, sample
from cpt_algorithms.stage.stage import Stage

START, STOP = 5, 3


@pytest.fixture(scope='module')
def parent(data, tmp_path_factory):
    """A small model that prefers some tokens to others."""
    stop = AutoTokenizer.from_pretrained(data['tokenizer']).eos_token_id
    folder = pretrained.make('llama', tmp_path_factory.mktemp('parent'), data['tokenizer'], eos_token_id=stop)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight *= 12
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def model(parent):
    return AutoModelForCausalLM.from_pretrained(parent).eval()


def next_token(model, tokens, temperature=1.0):
    with torch.no_grad():
        return torch.softmax(model(torch.tensor([tokens])).logits[0, -1].double() / temperature, -1).numpy()


def p_value(found, probabilities):
    """That so many tokens of each kind are drawn with these probabilities; rare ones count as one kind."""
    expected, counts = sum(found.values()) * probabilities, [found[token] for token in range(len(probabilities))]
    rare = expected < 5
    kinds = [*zip(expected[~rare], [n for n, few in zip(counts, rare, strict=True) if not few], strict=True)]
    kinds.append((expected[rare].sum(), sum(n for n, few in zip(counts, rare, strict=True) if few)))
    ideal, seen = zip(*kinds, strict=True)
    return chisquare(seen, ideal).pvalue


@pytest.mark.parametrize('temperature', [1.0, 0.5])
def test_tokens_come_as_often_as_the_model_says(model, temperature):
    documents = sample(model, [START], [STOP], 6000, 4, temperature, seed=1)
    first = Counter(document[0] for document in documents)
    assert p_value(first, next_token(model, [START], temperature)) > 1e-3
    common = next(token for token, _ in first.most_common() if token != STOP)
    second = Counter(document[1] for document in documents if document[0] == common)
    assert p_value(second, next_token(model, [START, common], temperature)) > 1e-3
    # and another temperature would be noticed
    assert p_value(first, next_token(model, [START], 0.8 * temperature)) < 1e-3


def test_the_models_own_settings_change_nothing(model):
    plain = sample(model, [START], [STOP], 8, 10)
    model.generation_config.top_k, model.generation_config.repetition_penalty = 3, 2.0
    assert sample(model, [START], [STOP], 8, 10) == plain
    assert sample(model, [START], [STOP], 8, 10, seed=18) != plain


def test_long_documents_go_on_behind_the_second_half_of_the_window(model):
    # nearly no temperature: each token is the likeliest after those in the window
    window = 8
    (document,) = sample(model, [START], [STOP], 1, window, 1e-4, max_tokens=30)
    if STOP not in document:
        assert 30 <= len(document) < 30 + window // 2
    read = [START]
    for token in document:
        read = read[window // 2 :] if len(read) == window else read
        assert token == next_token(model, read).argmax()
        read.append(token)
    many = sample(model, [START], [STOP], 200, window, max_tokens=30)
    assert all(STOP not in document[:-1] for document in many)
    assert all(document[-1] == STOP or len(document) >= 30 for document in many)
    assert sum(document[-1] == STOP for document in many) > 5 and len({len(document) for document in many}) > 5


def arguments(parent, out, workers=1, more=''):
    spec = f'--dataset=old=sampled:{parent}?tokens=3000&batch_size=32&max_tokens=40{more}'
    return ['--out', str(out), spec, f'--parent={parent}', '--val-fraction=0.1', f'--workers={workers}']


def every_byte(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob('*') if file.is_file()}


@pytest.mark.long
def test_the_same_bytes_for_any_processes_and_after_a_kill(parent, tmp_path):
    prepare_data.main(arguments(parent, tmp_path / 'one'))
    prepare_data.main(arguments(parent, tmp_path / 'two', workers=2))
    expected = every_byte(tmp_path / 'one')
    assert every_byte(tmp_path / 'two') == expected
    batches = 0
    for workers in (1, 2):
        out, partial = tmp_path / f'killed-{workers}', tmp_path / f'.killed-{workers}.partial'
        command = [sys.executable, prepare_data.__file__, *arguments(parent, out, workers)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (done := list(partial.glob('work/spool/*/*/*.parquet'))):
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL and not out.exists()
        batches += len(done)
        times = {file: file.stat().st_mtime_ns for file in done}
        again = subprocess.Popen([*command, f'--workers={workers}'], stdout=subprocess.DEVNULL)
        while partial.exists() or again.poll() is None:  # what is there is not made again
            assert all(file.stat().st_mtime_ns == made for file, made in times.items() if file.exists())
            time.sleep(0.02)
        assert again.wait() == 0 and every_byte(out) == expected
    assert batches


def test_what_was_sampled_stands_in_for_what_its_parent_has_read(parent, data, tmp_path, capsys):
    out = tmp_path / 'sampled'
    prepare_data.main(arguments(parent, out))
    manifest = json.loads((out / 'manifest.json').read_text())
    source = manifest['datasets']['old']['sources']['old']
    assert source['kind'] == 'sampled' and 'temperature=1.0' in source['target'] and 'seed=17' in source['target']
    assert re.fullmatch('model [0-9a-f]{16}', manifest['request']['files']['old'])
    for places in ([str(out / 'old')], [None, str(out / 'old')], ['s3://bucket/old', str(out / 'old')]):
        sampled = sampled_from(places, 'train')
        assert sampled is not None and sampled.models == str(parent) and sampled.is_whole
        # of the sources: with what was too little for a row in the end
        whole = sum(split['tokens'] for split in manifest['datasets']['old']['splits'].values())
        assert 0 <= sampled.tokens - whole < 2 * 16

    streams = {'old': {'local': str(out / 'old'), 'split': 'train'}}
    over = {'train_loader': {'dataset': {'replay': {'fraction': 0.25, 'streams': streams}}}}
    stage = Stage.from_yaml(tiny.merge(tiny.config(tmp_path, data, 'child'), over))
    assert stage.mix is not None
    assert stage.mix.old['old'].stand_in_for == f'what {parent} was trained on (sampled from it)'
    print_costs({'child': stage}, console := Console(file=io.StringIO(), width=300))
    spent = flop(2 * model_size(stage.model).parameters * sampled.tokens)
    assert f'old was sampled from {parent}: {short(sampled.tokens)} tokens, {spent} FLOP' in console.file.getvalue()
    streams['old']['stand_in_for'] = 'the web'
    said = Stage.from_yaml(tiny.merge(tiny.config(tmp_path, data, 'child'), over))
    assert said.mix is not None and said.mix.old['old'].stand_in_for == 'the web', 'what is written stays'
    assert sampled_from([str(data['old'])], 'train') is None and sampled_from([], None) is None
    manifest['datasets']['old']['sources']['web'] = {**source, 'kind': 'jsonl'}
    (out / 'manifest.json').write_text(json.dumps(manifest))
    in_part = sampled_from([str(out / 'old')], 'train')
    assert in_part is not None and in_part.tokens == sampled.tokens and not in_part.is_whole
    del streams['old']['stand_in_for']
    unsaid = Stage.from_yaml(tiny.merge(tiny.config(tmp_path, data, 'child'), over))
    assert unsaid.mix is not None and unsaid.mix.old['old'].stand_in_for is None, 'in part'
    del manifest['datasets']['old']['sources']['web']
    (out / 'manifest.json').write_text(json.dumps(manifest))

    config = json.loads((parent / 'config.json').read_text())
    (parent / 'config.json').write_text(json.dumps({**config, 'another': 'model'}))
    try:
        capsys.readouterr()
        with pytest.raises(SystemExit):
            prepare_data.main(arguments(parent, out))
        assert 'files was {"old": "model ' in capsys.readouterr().err
    finally:
        (parent / 'config.json').write_text(json.dumps(config))


@pytest.mark.parametrize(
    ('target', 'message'),
    [
        ('x', r'sampled:x: tokens is missing'),
        ('x?tokens=0', r'sampled:x\?tokens=0: tokens=0 must be at least 1'),
        ('x?tokens=9&temprature=1', r"temprature .* did you mean 'temperature'"),
        ('x?tokens=9&temperature=0', r'temperature=0 must be '),
        ('x?tokens=9&temperature=hot', r"temperature='hot' must be a number"),
        ('x?tokens', r'expected options as name=value&name=value after the \?'),
    ],
)
def test_wrong_targets_are_named(target, message):
    with pytest.raises(PrepareError, match=message):
        Sampling.parse(target)


def test_the_model_of_a_run_a_checkpoint_or_a_folder(parent, tmp_path, monkeypatch):
    run = tmp_path / 'run'
    (run / 'huggingface').mkdir(parents=True)
    for batch in (10, 20):
        (run / 'huggingface' / f'ba{batch}').symlink_to(parent)
    for batch in (10, 20, 30):
        (run / f'ep0-ba{batch}-rank0.pt').write_bytes(b'')
    (run / 'latest-rank0.pt').symlink_to('ep0-ba20-rank0.pt')
    found = {'': 'ba20', '/huggingface/ba10': 'ba10', '/ep0-ba10-rank0.pt': 'ba10', '/latest-rank0.pt': 'ba20'}
    for named, expected in found.items():
        folder = Sampling.parse(f'{run}{named}?tokens=9').folder
        assert folder == (parent.resolve() if named == '/huggingface/ba10' else run / 'huggingface' / expected)
    with pytest.raises(PrepareError, match=r'the checkpoint has no export huggingface/ba30 beside it'):
        _ = Sampling.parse(f'{run}/ep0-ba30-rank0.pt?tokens=9').folder
    cached, asked = tmp_path / 'cached', []
    cached.mkdir()
    (cached / 'tokenizer.json').write_text('{}')
    monkeypatch.setattr(sampling, 'folder_of_pretrained', lambda name: cached)
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda name: asked.append(name) or str(cached))
    named = Sampling.parse('some/model?tokens=9')
    assert named.folder == cached and asked == ['some/model'], 'its tokenizer alone is no model'
    (cached / 'model.safetensors').write_bytes(b'')
    assert named.folder == cached and asked == ['some/model'], 'what is there is not fetched'
    monkeypatch.undo()
    with pytest.raises(PrepareError, match='sampled:nobody/nothing'):
        _ = Sampling.parse('nobody/nothing?tokens=9').folder
