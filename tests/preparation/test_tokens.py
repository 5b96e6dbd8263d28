# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: a long text in windows has the tokens of the whole, and an equal hash means equal tokens."""

import copy
import functools
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

from cpt_algorithms.preparation.parts import encode_long
from cpt_algorithms.preparation.reading import PrepareError
from cpt_algorithms.preparation.tokenizer import EOS, document_ends, hash_tokenizer, train_tokenizer

WORDS = [
    'loss',
    'rate',
    'replay',
    "isn't",
    'größe',
    'cafe\u0301',
    '学習',
    'กำลัง',
    '12345',
    '3.14',
    'x_y',
    '<tool>',
    '🙂',
    EOS,
]
SPACES = [' ', '  ', '\n', '\n\n', '\t', '', '\r\n', ' ' * 9]
DIGITS = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def prose(seed, count=4000):
    generator = random.Random(seed)
    return ''.join(generator.choice(WORDS) + generator.choice(SPACES) for _ in range(count))


@functools.cache
def tokenizers():
    """Of the kinds that models have: GPT-2, Llama 2, Llama 3, T5, BERT."""
    texts = [prose(seed, 500) for seed in range(20)]
    assert {*train_tokenizer(texts, 400)('text')} == {'input_ids', 'attention_mask'}, 'what generate() takes'
    gpt2 = train_tokenizer(texts, 400).backend_tokenizer
    llama2, llama3 = Tokenizer(models.BPE(byte_fallback=True, unk_token='?')), Tokenizer(models.BPE(ignore_merges=True))
    llama2.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    split = pre_tokenizers.Split(Regex(DIGITS), 'isolated')
    llama3.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    t5, bert = Tokenizer(models.Unigram()), Tokenizer(models.WordPiece(unk_token='?'))
    t5.normalizer, t5.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace(prepend_scheme='first')
    bert.normalizer, bert.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    quiet = {'vocab_size': 400, 'show_progress': False}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    for tokenizer, trainer in (
        (llama2, trainers.BpeTrainer(**quiet, special_tokens=['?'])),
        (llama3, trainers.BpeTrainer(**quiet, initial_alphabet=alphabet)),
        (t5, trainers.UnigramTrainer(**quiet, unk_token='?', special_tokens=['?'])),
        (bert, trainers.WordPieceTrainer(**quiet, special_tokens=['?'])),
    ):
        tokenizer.train_from_iterator(
            [word for text in texts for word in text.split(' ')] if tokenizer is llama2 else texts, trainer
        )
    found = {'gpt2': gpt2, 'llama2': llama2, 'llama3': llama3, 't5': t5, 'bert': bert}
    for tokenizer in found.values():
        tokenizer.add_tokens([AddedToken('<tool>', lstrip=True, normalized=False)])
        tokenizer.encode_special_tokens = True
    return found


RUNS = st.tuples(st.sampled_from([*WORDS, *SPACES, 'a', '7', '\u0301', 'é']), st.integers(1, 400))


@pytest.mark.parametrize('kind', ['gpt2', 'llama2', 'llama3', 't5', 'bert'])
@given(seed=st.integers(0, 99), runs=st.lists(RUNS, max_size=6), size=st.integers(2048, 4000))
@settings(max_examples=15, deadline=None)
def test_a_long_text_has_the_tokens_of_the_whole(kind, seed, runs, size):
    tokenizer, text = tokenizers()[kind], prose(seed, 500)
    text = ''.join([text, *(word * count for word, count in runs), text])
    windows = list(encode_long(tokenizer, text, size))
    assert np.concatenate(windows).tolist() == tokenizer.encode(text, add_special_tokens=False).ids


def test_windows_are_no_larger_than_they_must():
    text = prose(1)
    for kind, tokenizer in tokenizers().items():
        windows = list(encode_long(tokenizer, text, 2048))
        assert len(windows) > len(text) / 2048, kind
    assert len(list(encode_long(tokenizers()['bert'], 'a' * 5000, 2048))) == 1  # one word, whatever its length


@pytest.mark.parametrize('kind', ['gpt2', 'llama2', 'llama3'])
@given(
    seed=st.integers(0, 99), letters=st.sampled_from(['ab', 'lorepay', 'größe', '学習']), size=st.integers(2048, 4000)
)
@settings(max_examples=15, deadline=None)
def test_a_word_of_any_length_is_cut_where_bpe_is_the_same(kind, seed, letters, size):
    tokenizer, text = tokenizers()[kind], ' ' + ''.join(random.Random(seed).choices(letters, k=20_000)) + ' '
    windows = list(encode_long(tokenizer, text, size))
    assert np.concatenate(windows).tolist() == tokenizer.encode(text, add_special_tokens=False).ids
    assert len(windows) > 2


MEASURED = r"""
import json, random, re, sys
from cpt_algorithms.preparation import parts
from cpt_algorithms.preparation.sources import Part, Source

parts.CHUNK = 1 << 15
folder, between, letters = sys.argv[1], sys.argv[2], random.Random(0)
words = [''.join(letters.choices('lorepays', k=letters.randint(2, 9))) for _ in range(5000)]
for number, size in enumerate((200_000, 2_000_000)):
    file = f'{folder}/{number}.jsonl'
    with open(file, 'w') as lines:
        print(json.dumps({'text': between.join(letters.choices(words, k=size // (5 + len(between))))}), file=lines)
    part = Part(Source('a', 'a', 'jsonl', file), ((file, 0, 0),), size, 'text')
    near = {'threshold': 0.8, 'num_perm': 128, 'ngram': 5} if between else None
    parts.tokenize(parts.TokenizeJob(part, f'{folder}/tokenizer.json', '', ([], [0]), 0.1, near, None, folder))
    peak = re.search(r'VmHWM:\s+(\d+) kB', open('/proc/self/status').read())[1]  # ru_maxrss is also the parent's
    print(int(peak) * 1024, size)
"""


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='the peak of memory is read from there')
@pytest.mark.parametrize('between', ['', ' '], ids=['letters alone', 'words'])
def test_memory_of_a_long_document(between, tmp_path):
    """That of its line while JSON is read, or of its text."""
    tokenizers()['gpt2'].save(str(tmp_path / 'tokenizer.json'))
    command = [sys.executable, '-c', MEASURED, str(tmp_path), between]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (small, less), (large, more) = (map(int, line.split()) for line in printed.splitlines())
    assert large - small < 8 * (more - less), f'{(large - small) / (more - less):.1f} bytes of memory for a byte'


# What is put around a document


def fast(kind, **tokens):
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizers()[kind].to_str()), **tokens)


def template(*, bos=None, eos=None):
    around = [(token, at) for token, at in ((bos, 1), (eos, 2)) if token]
    single = ' '.join([*([bos] if bos else []), '$A', *([eos] if eos else [])])
    return TemplateProcessing(single=single, special_tokens=around)


@pytest.mark.parametrize('kind', ['gpt2', 'llama3', 'bert'])
def test_documents_begin_and_end_as_the_tokenizer_itself_has_it(kind):
    tokenizer = fast(kind, eos_token=tokenizers()[kind].id_to_token(2))

    def ends(**given):
        return document_ends(tokenizer, **given)

    assert ends() == ([], [2])
    for bos, eos, expected in (
        (None, None, ([], [2])),
        ('<b>', None, ([1], [2])),
        ('<b>', '<e>', ([1], [2])),
        (None, '<e>', ([], [2])),
    ):
        tokenizer.backend_tokenizer.post_processor = template(bos=bos, eos=eos)
        assert ends() == expected
        whole = tokenizer('loss')['input_ids']
        start, end = ends()
        assert [*start, *tokenizer('loss', add_special_tokens=False)['input_ids'], *end] in (whole, [*whole, 2])
    tokenizer.backend_tokenizer.post_processor = template(bos='<b>')
    chosen = tokenizer.convert_ids_to_tokens(7)
    assert ends(bos_text='', eos_text=chosen) == ([], [7]) and ends(bos_text=chosen) == ([7], [2])
    with pytest.raises(PrepareError, match="--eos-text '<no token>' must be one token"):
        ends(eos_text='<no token>')
    tokenizer = fast(kind)
    with pytest.raises(PrepareError, match='no EOS token .* --eos-text'):
        ends()
    assert ends(eos_text=chosen) == ([], [7])


# Equality

FLAGS = ('special', 'lstrip', 'rstrip', 'single_word', 'normalized')
CHANGES = [
    *((lambda form, flag=flag: form['added_tokens'][-1].update({flag: not form['added_tokens'][-1][flag]})) for flag in FLAGS),
    lambda form: form.update(normalizer={'type': 'Lowercase'}),
    lambda form: form.update(normalizer=None),
    lambda form: form.update(pre_tokenizer={'type': 'Whitespace'}),
    lambda form: form.update(post_processor=None),
    lambda form: form.update(post_processor={'type': 'BertProcessing', 'sep': ['s', 2], 'cls': ['c', 1]}),
    lambda form: form.update(post_processor={'type': 'ByteLevel', 'add_prefix_space': True, 'trim_offsets': False, 'use_regex': True}),
    lambda form: form.update(decoder=None),
    lambda form: form.update(truncation=None, padding=None),
    lambda form: form['model'].update(byte_fallback=not form['model'].get('byte_fallback')) if form['model']['type'] != 'WordPiece' else None,
    lambda form: form['model'].update(ignore_merges=True) if form['model']['type'] == 'BPE' else None,
    lambda form: form['model'].update(unk_id=None) if form['model']['type'] == 'Unigram' else None,
    lambda form: form['model'].update(max_input_chars_per_word=3) if form['model']['type'] == 'WordPiece' else None,
    lambda form: form['model'].update(continuing_subword_prefix='') if form['model']['type'] == 'WordPiece' else None,
]  # fmt: skip
TEXTS = ['loss  <tool>  rate', 'x<tool>y <TOOL>', 'Größe', 'größe ' + EOS, '12345 ✓', ' a', '']


def hash_of(form):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, 'tokenizer.json').write_text(json.dumps(form), encoding='utf-8')
        Path(folder, 'tokenizer_config.json').write_text('{}')
        return hash_tokenizer(Path(folder))


def tokens_of(form):
    """With special tokens spelled out in the text as text, and as tokens; with and without what is put around it."""
    found = []
    for spelled in (False, True):
        tokenizer = Tokenizer.from_str(json.dumps(form))
        tokenizer.encode_special_tokens = spelled
        for text in TEXTS:
            try:
                found += [tokenizer.encode(text, add_special_tokens=around).ids for around in (False, True)]
            except Exception as error:  # of a Unigram that has no token for what it does not know
                found.append(str(error))
    return found


@pytest.mark.parametrize('kind', ['gpt2', 'llama2', 'llama3', 't5', 'bert'])
@given(
    one=st.sets(st.sampled_from(range(len(CHANGES))), max_size=2),
    other=st.sets(st.sampled_from(range(len(CHANGES))), max_size=2),
)
@settings(max_examples=40, deadline=None)
def test_an_equal_hash_means_equal_tokens(kind, one, other):
    forms = []
    for changes in (one, other):
        forms.append(json.loads(tokenizers()[kind].to_str()))
        for change in sorted(changes):
            CHANGES[change](forms[-1])
    if hash_of(forms[0]) == hash_of(forms[1]):
        assert tokens_of(forms[0]) == tokens_of(forms[1])


def test_what_does_not_change_the_tokens_does_not_change_the_hash():
    tokenizer = tokenizers()['gpt2']
    form = json.loads(tokenizer.to_str())
    other = copy.deepcopy(form)
    other |= {'post_processor': json.loads(pickled) if (pickled := decoders.ByteLevel().__getstate__()) else None}
    other['model'] |= {'merges': [' '.join(merge) for merge in form['model']['merges']]}
    del other['model']['byte_fallback'], other['model']['ignore_merges']
    assert hash_of(other) == hash_of(form)
