# SPDX-License-Identifier: Apache-2.0
"""Mistakes about tokenizers, lengths and held-out data are refused; what is right passes."""

import json
import random
import shutil

import numpy as np
import prepare_data
import pytest
import tiny
from streaming import MDSWriter
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from cpt_algorithms.files import write_json
from cpt_algorithms.replay.replay_text import ReplayTextDataset
from cpt_algorithms.replay.streams import StreamError
from cpt_algorithms.stage.preflight import preflight
from cpt_algorithms.stage.stage import Stage

VOCAB = 280
LONG = 10**30  # transformers' own value for no limit


def texts(seed, count=80):
    generator = random.Random(seed)
    words = ['loss', 'rate', 'replay', 'token', 'warm', 'cosine', 'anneal', 'stage', f'own{seed}']
    return [' '.join(generator.choices(words, k=generator.randint(10, 60))) for _ in range(count)]


def prepare(out, seed, *arguments, val_fraction='0.2', length='16'):
    """``out`` with one dataset, by the real script."""
    source = out.with_suffix('.jsonl')
    source.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts(seed)), encoding='utf-8')
    own = [] if {'--tokenizer', '--earlier'} & set(arguments) else ['--vocab-size', str(VOCAB)]
    given = ['--val-fraction', val_fraction, '--max-seq-len', length, *own, *arguments]
    prepare_data.main(['--out', str(out), '--dataset', f'{out.name}=jsonl:{source}', *given])
    return out


@pytest.fixture(scope='module')
def roots(tmp_path_factory):
    """Prepared data: ``new``, and what differs from it in one thing each."""
    folder = tmp_path_factory.mktemp('prepared')
    new = prepare(folder / 'new', 1)
    tokenizer = ('--tokenizer', str(new / 'tokenizer'))
    return {
        'new': new,
        'old': prepare(folder / 'old', 2, *tokenizer),
        'other': prepare(folder / 'other', 3),
        'half': prepare(folder / 'half', 4, *tokenizer, val_fraction='0.5'),
        'after': prepare(folder / 'after', 5, '--earlier', str(new), val_fraction='0.5'),
        'long': prepare(folder / 'long', 6, *tokenizer, length='32'),
    }


def stream(root, split='train', name=None):
    return {'local': str(root / (name or root.name)), 'split': split}


def evaluator(root, split='val', length=16):
    loader = tiny.eval_loader(root.name, root)
    return {**loader, 'dataset': {**stream(root, split), 'max_seq_len': length}}


def config(folder, roots, *evaluated, new='new', old=(), **over):
    """A stage on ``new`` with replay of ``old``, judged on ``evaluated``."""
    data = {'new': roots[new] / new, 'tokenizer': roots['new'] / 'tokenizer'}
    dataset = {'replay': {'fraction': 0.05, 'streams': {name: stream(roots[name]) for name in old}}} if old else {}
    base = {'max_duration': '2ba', 'model': {'vocab_size': VOCAB}, 'train_loader': {'dataset': dataset}}
    base |= {'scheduler': {'name': 'rewarm_cosine', 't_warmup': '1ba'}, 'eval_loader': [*evaluated]}
    return tiny.merge(tiny.config(folder, data, 'run', **base), over)


def only_problem(cfg, *said, **how):
    found = tiny.problems(cfg, **how)
    assert len(found) == 1, found
    assert '\n' not in found[0]
    for words in said:
        assert words in found[0], found
    return found[0]


def fine(cfg, **how):
    preflight(Stage.from_yaml(cfg), **how)


def test_what_is_right_passes(roots, tmp_path):
    cfg = config(tmp_path, roots, evaluator(roots['new']), evaluator(roots['old']), old=['old'])
    fine(cfg)
    fine(tiny.merge(cfg, {'tokenizer': {'kwargs': {'model_max_length': LONG}}}))
    shutil.copytree(roots['new'] / 'tokenizer', tmp_path / 'copy')  # the same tokenizer elsewhere, written otherwise
    file = tmp_path / 'copy' / 'tokenizer.json'
    file.write_text(json.dumps(json.loads(file.read_text()), indent=7))
    fine(tiny.merge(cfg, {'tokenizer': {'name': str(tmp_path / 'copy')}}))


def test_data_of_another_tokenizer(roots, tmp_path):
    other = roots['other'] / 'tokenizer'
    only_problem(
        config(tmp_path, roots, evaluator(roots['new']), old=['other']),
        f'tokenizer={roots["new"]}/tokenizer is not the one that the data of train_loader.dataset.replay.streams.other',
        f'use {other}, or prepare the data again with --tokenizer {roots["new"]}/tokenizer',
    )
    only_problem(config(tmp_path, roots, evaluator(roots['other'])), 'the data of eval_loader[0].dataset was')
    wrong = config(tmp_path, roots, evaluator(roots['new']), tokenizer={'name': str(other)})
    only_problem(wrong, 'the data of train_loader.dataset.new.new, eval_loader[0].dataset was')
    # where it is not known what the data was made with, nothing is said
    shutil.copytree(roots['new'] / 'new', tmp_path / 'new')
    wrong = tiny.merge(
        wrong, {'train_loader': {'dataset': {'new': {'local': str(tmp_path / 'new')}}}, 'eval_loader': []}
    )
    fine(wrong)
    shutil.copy(roots['new'] / 'manifest.json', tmp_path)
    only_problem(wrong, 'is not the one that')
    shutil.copy(roots['half'] / 'manifest.json', tmp_path)  # of other datasets
    fine(wrong)


def test_one_merge_more_is_another_tokenizer(roots, tmp_path):
    """And so is the same vocabulary in another order, which no size tells."""
    cfg = config(tmp_path, roots)
    saved = json.loads((roots['new'] / 'tokenizer' / 'tokenizer.json').read_text())

    def with_model(name, change):
        shutil.copytree(roots['new'] / 'tokenizer', tmp_path / name)
        model = json.loads(json.dumps(saved))
        change(model['model'])
        (tmp_path / name / 'tokenizer.json').write_text(json.dumps(model))
        return tiny.merge(cfg, {'tokenizer': {'name': str(tmp_path / name)}})

    def swap(model):
        one, other = list(model['vocab'])[-2:]
        model['vocab'][one], model['vocab'][other] = model['vocab'][other], model['vocab'][one]

    fine(with_model('same', lambda model: None))
    only_problem(with_model('swapped', swap), 'is not the one that the data of train_loader.dataset.new.new')
    only_problem(with_model('merges', lambda model: model['merges'].pop()), 'is not the one that the data of')


def with_parent(cfg, parent, **how):
    return tiny.merge(cfg, {'load_path': f'{parent}/latest-rank0.pt', **how})


def said_of_the_tokenizer(cfg):
    return [problem for problem in tiny.problems(cfg) if 'the tokenizer of the parent' in problem]


def test_a_tokenizer_that_is_not_the_parents(roots, tmp_path):
    parent = tmp_path / 'parent'
    cfg = with_parent(config(tmp_path, roots), parent)
    assert not said_of_the_tokenizer(cfg)  # nothing is known of it

    def of_parent(name):
        given = {**cfg, 'tokenizer': {'name': str(roots[name] / 'tokenizer')}}
        write_json(parent / 'stage.json', {'run_name': 'parent', 'config': given})

    # its YAML tells
    of_parent('other')
    (found,) = said_of_the_tokenizer(cfg)
    assert f'load_path={parent}/latest-rank0.pt' in found
    assert f'use {roots["other"]}/tokenizer, and data prepared with it' in found
    of_parent('new')
    assert not said_of_the_tokenizer(cfg)
    # what was exported tells better: the folder that the YAML names may hold another by now
    for name, batch in (('new', 9), ('other', 10)):
        shutil.copytree(roots[name] / 'tokenizer', parent / 'huggingface' / f'ba{batch}')
        write_json(parent / 'huggingface' / f'ba{batch}' / 'config.json', {})
    (found,) = said_of_the_tokenizer(cfg)
    assert f'use {parent}/huggingface/ba10, and' in found
    fine(cfg, parent_is_there=False)
    shutil.rmtree(parent / 'huggingface' / 'ba10')
    assert not said_of_the_tokenizer(cfg)


def test_a_parent_in_object_storage(roots, tmp_path, bucket):
    def upload(name):
        for file in (roots[name] / 'tokenizer').iterdir():
            bucket.upload_file(str(file), 'bucket', f'runs/parent/huggingface/ba4/{file.name}')

    cfg = with_parent(config(tmp_path, roots), 's3://bucket/runs/parent')
    assert not said_of_the_tokenizer(cfg)
    upload('other')
    assert 'use s3://bucket/runs/parent/huggingface/ba4, and' in said_of_the_tokenizer(cfg)[0]
    upload('new')
    assert not said_of_the_tokenizer(cfg)
    # data in object storage has its manifest there
    for root in (roots['other'], roots['new']):
        for file in (root / root.name).rglob('*.*'):
            bucket.upload_file(str(file), 'bucket', f'{root.name}/{file.relative_to(root)}')
        bucket.upload_file(str(root / 'manifest.json'), 'bucket', f'{root.name}/manifest.json')
    remote = {'new': {'remote': 's3://bucket/other/other/', 'local': str(tmp_path / 'cache'), 'split': 'train'}}
    cfg = config(tmp_path, roots, train_loader={'dataset': remote})
    only_problem(cfg, 'the data of train_loader.dataset.new.new was', 'use s3://bucket/other/tokenizer, or prepare')
    fine(tiny.merge(cfg, {'train_loader': {'dataset': {'new': {'remote': 's3://bucket/new/new'}}}}))


def test_a_vocabulary_larger_than_the_models(roots, tmp_path):
    cfg = config(tmp_path, roots)
    said = (
        f'tokenizer={roots["new"]}/tokenizer has {VOCAB} tokens, more than the 279 of the model: set model.vocab_size'
    )
    only_problem(tiny.merge(cfg, {'model': {'vocab_size': 279}}), said)
    fine(tiny.merge(cfg, {'model': {'vocab_size': VOCAB + 20}}))  # padded to a round number


def test_rows_longer_than_the_model_can_read(roots, tmp_path):
    cfg = config(tmp_path, roots)
    too_short = tiny.merge(cfg, {'model': {'max_seq_len': 15}})
    only_problem(too_short, 'max_seq_len=16 is longer than the model can read: model.max_seq_len is 15; set it to 16')
    fine(tiny.merge(cfg, {'model': {'max_seq_len': 17}}))
    longer = config(tmp_path, roots, evaluator(roots['long'], length=32))
    only_problem(longer, 'eval_loader[0].dataset.max_seq_len=32 is longer', 'model.max_seq_len is 16; set it to 32')
    fine(tiny.merge(longer, {'model': {'max_seq_len': 32}}))


def test_hugging_face_models_too(roots, tmp_path):
    sizes = {'vocab_size': 279, 'max_position_embeddings': 8, 'hidden_size': 16, 'num_attention_heads': 2}
    write_json(tmp_path / 'neox' / 'config.json', {'model_type': 'gpt_neox', **sizes})
    write_json(tmp_path / 'gpt2' / 'config.json', {'model_type': 'gpt2', 'vocab_size': 279, 'n_positions': 8})
    for name in ('neox', 'gpt2'):
        model = {'name': 'hf_causal_lm', 'pretrained_model_name_or_path': str(tmp_path / name), 'pretrained': False}
        cfg = {**config(tmp_path, roots), 'model': model}
        found = tiny.problems(cfg)
        assert len(found) == 2, found
        assert 'more than the 279 of the model: set model.config_overrides.vocab_size to at least 280' in found[0]
        assert 'model.config_overrides.max_position_embeddings is 8; set it to 16' in found[1]
        model['config_overrides'] = {'vocab_size': 280, 'max_position_embeddings': 16}
        fine(cfg)
    model['pretrained_model_name_or_path'] = str(tmp_path / 'nowhere')
    only_problem(cfg, f'model.pretrained_model_name_or_path={tmp_path}/nowhere does not exist')


def test_a_tokenizer_that_is_not_the_pretrained_models(roots, tmp_path):
    sizes = {'hidden_size': 16, 'intermediate_size': 16, 'num_hidden_layers': 1, 'num_attention_heads': 2}
    for name, vocab_size in (('new', VOCAB), ('other', VOCAB), ('small', VOCAB - 1)):
        shape = GPTNeoXConfig(vocab_size=vocab_size, max_position_embeddings=16, eos_token_id=0, **sizes)
        GPTNeoXForCausalLM(shape).save_pretrained(tmp_path / name)
        tokenizer = roots['other' if name == 'small' else name] / 'tokenizer'
        shutil.copytree(tokenizer, tmp_path / name, dirs_exist_ok=True)

    def stage(name, **model):
        model = {'name': 'hf_causal_lm', 'pretrained_model_name_or_path': str(tmp_path / name), **model}
        return {**config(tmp_path, roots), 'model': model}

    said = f'is not the tokenizer of the parent, model.pretrained_model_name_or_path={tmp_path}/other: the same numbers'
    only_problem(stage('other'), said, f'use {tmp_path}/other, and data prepared with it')
    only_problem(stage('other'), said, parent_is_there=False)  # it is there anyway
    fine(stage('new'))
    fine(stage('other', pretrained=False))
    # said to be larger, so that tokens may be added
    fine(stage('small', allow_embedding_resizing=True))


def test_rows_that_an_evaluator_would_cut(roots, tmp_path):
    cfg = config(tmp_path, roots, evaluator(roots['long'], length=16))
    only_problem(cfg, 'eval_loader[0].dataset.max_seq_len=16, but the data of eval_loader[0].dataset was packed', '32')
    longer = tiny.merge(cfg, {'model': {'max_seq_len': 32}, 'eval_loader': [evaluator(roots['long'], length=32)]})
    fine(longer)
    fine(tiny.merge(longer, {'eval_loader': [evaluator(roots['new'], length=32)]}))  # shorter rows are only shorter


def stock(root, length):
    dataset = {**stream(root), 'max_seq_len': length}
    workers = {'num_workers': 0, 'prefetch_factor': None, 'persistent_workers': False}
    return {'name': 'text', 'drop_last': True, **workers, 'dataset': dataset}


def test_rows_of_another_length_in_the_stock_loader(roots, tmp_path):
    cfg = config(tmp_path, roots)
    fine({**cfg, 'train_loader': stock(roots['new'], 16)})
    longer = tiny.merge(
        {**cfg, 'train_loader': stock(roots['new'], 32)}, {'max_seq_len': 32, 'model': {'max_seq_len': 32}}
    )
    only_problem(longer, 'train_loader.dataset.max_seq_len=32', 'rows of 16 tokens', 'counted for more than they have')


def by_others(folder, rows, encoding='ndarray:int32', **options):
    """Rows of tokens, as another converter writes them."""
    with MDSWriter(out=str(folder), columns={'tokens': encoding}, **options) as out:
        for row in rows:
            out.write({'tokens': row.tobytes() if encoding == 'bytes' else row})
    return folder


def test_a_column_beside_the_tokens_says_nothing_of_the_rows(roots, tmp_path):
    with MDSWriter(
        out=str(tmp_path / 'more'), columns={'tokens': 'ndarray:int32:16', 'label': 'ndarray:int32:1'}
    ) as out:
        for _ in range(40):
            out.write({'tokens': np.zeros(16, np.int32), 'label': np.zeros(1, np.int32)})
    data = {'local': str(tmp_path / 'more'), 'split': None}
    fine(config(tmp_path, roots, train_loader={'dataset': {'new': data}}, max_duration='1ba'))


@pytest.mark.parametrize('kind', ['replay_text', 'text', 'eval'])
def test_rows_that_other_converters_made(kind, roots, tmp_path):
    """Whatever their index says of their length: one row is looked at."""

    def stage(rows, encoding='ndarray:int32', given=None, **options):
        by_others(folder := tmp_path / str(len(list(tmp_path.iterdir()))), rows, encoding, **options)
        data, extra = {'local': str(folder), 'split': None}, given or {}
        if kind == 'replay_text':
            return config(tmp_path, roots, train_loader={'dataset': {'new': data, **extra}}, max_duration='1ba')
        stock_loader = {**stock(roots['new'], 16)}
        stock_loader['dataset'] = {**data, 'max_seq_len': 16, **extra}
        if kind == 'text':
            return {**config(tmp_path, roots), 'train_loader': stock_loader}
        return config(tmp_path, roots, {**stock_loader, 'label': 'x', 'drop_last': False})

    def rows(length, dtype=np.int32, largest=VOCAB - 1):
        return [np.full(length, largest, dtype)] * 40

    for encoding in ('ndarray:int32', 'ndarray', 'ndarray:int32:32'):
        for options in ({}, {'compression': 'zstd'}):
            only_problem(stage(rows(32), encoding, **options), 'to rows of 32 tokens')
    fine(stage(rows(16)))
    if kind == 'eval':
        fine(stage(rows(8)))  # shorter rows are only shorter
    else:
        only_problem(stage(rows(8)), 'to rows of 8 tokens')
    fine(stage(rows(16, np.int64), 'bytes'))
    fine(stage(rows(16), 'bytes', {'token_encoding_type': 'int32'}))
    only_problem(stage(rows(16), 'bytes'), 'rows of 8 tokens' if kind != 'eval' else 'holds token ')
    only_problem(stage(rows(16, largest=VOCAB)), f'a row holds token {VOCAB}, and the model has {VOCAB}')
    if kind != 'replay_text':
        return
    # the row that is looked at is right, and one that is read later is not
    cfg = stage([*rows(16)[:9], *rows(24)])
    fine(cfg)
    dataset = ReplayTextDataset(None, 16, new=cfg['train_loader']['dataset']['new'])
    with pytest.raises(StreamError, match='max_seq_len=16, but the data holds a row of 24 tokens'):
        dataset[9]


def test_documents_that_begin_or_end_otherwise(roots, tmp_path):
    """Compared between all data, and of what they end with, with the parent's configuration."""
    token = json.loads((roots['new'] / 'tokenizer' / 'tokenizer.json').read_text())['model']['vocab']
    letter, other = '!', token['!']
    given = ('--tokenizer', str(roots['new'] / 'tokenizer'))
    ends = {
        'bos': prepare(tmp_path / 'bos', 7, *given, '--bos-text', letter),
        'eos': prepare(tmp_path / 'eos', 8, *given, '--eos-text', letter),
    }
    for name, said in (('bos', f'begin with {letter} and end with <|'), ('eos', f'their text and end with {letter},')):
        everything = {**roots, **ends}
        only_problem(
            config(tmp_path, everything, evaluator(ends[name])), 'eval_loader[0].dataset: its documents ', said
        )
        only_problem(config(tmp_path, everything, old=[name]), f'streams.{name}: its documents ', said)
        fine(config(tmp_path, everything, evaluator(ends[name]), new=name))

    sizes = {'hidden_size': 16, 'intermediate_size': 16, 'num_hidden_layers': 1, 'num_attention_heads': 2}
    GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=VOCAB, max_position_embeddings=16, eos_token_id=other, **sizes)
    ).save_pretrained(tmp_path / 'model')
    shutil.copytree(roots['new'] / 'tokenizer', tmp_path / 'model', dirs_exist_ok=True)

    def stage(name, **model):
        model = {'name': 'hf_causal_lm', 'pretrained_model_name_or_path': str(tmp_path / 'model'), **model}
        return {**config(tmp_path, {**roots, **ends}, new=name), 'model': model}

    only_problem(stage('new'), 'its documents end with <|endoftext|>, and the parent', 'stops at ! (config.json) and !')
    fine(stage('eos'))
    fine(stage('new', pretrained=False))
    fine(stage('new', config_overrides={'eos_token_id': 0}))
    generation = tmp_path / 'model' / 'generation_config.json'
    write_json(generation, {'eos_token_id': [other, 0]})
    fine(stage('new'))
    generation.unlink()
    ends['chosen'] = prepare(tmp_path / 'chosen', 9, *given, '--eos-text', '<|endoftext|>')
    fine(stage('chosen'))
    # and before any work
    with pytest.raises(SystemExit):
        prepare(tmp_path / 'no', 9, '--parent', str(tmp_path / 'model'), *given)
    assert not (tmp_path / 'no').exists()
    made = prepare(tmp_path / 'yes', 9, '--parent', str(tmp_path / 'model'), *given, '--eos-text', letter)
    assert json.loads((made / 'manifest.json').read_text())['tokenizer']['document_end'] == [letter]


def test_training_on_what_is_held_out(roots, tmp_path):
    cfg = config(tmp_path, roots)
    split = tiny.merge(cfg, {'train_loader': {'dataset': {'new': {'split': 'val'}}}, 'max_duration': '1ba'})
    only_problem(split, 'train_loader.dataset.new.new: split=val is held out to judge the model by')
    within = {'new': {'local': str(roots['new'] / 'new' / 'val'), 'split': None}}
    only_problem(tiny.merge(split, {'train_loader': {'dataset': within}}), 'split=val is held out')


def test_judging_by_what_is_trained_on(roots, tmp_path):
    both = config(tmp_path, roots, evaluator(roots['new'], 'train'))
    only_problem(both, f'eval_loader[0].dataset and train_loader.dataset.new.new both read {roots["new"]}/new/train')
    replayed = config(tmp_path, roots, evaluator(roots['old'], 'train'), old=['old'])
    only_problem(replayed, 'eval_loader[0].dataset and train_loader.dataset.replay.streams.old both read')
    # by another way to the same folder
    (tmp_path / 'link').symlink_to(roots['new'] / 'new')
    linked = evaluator(roots['new'], 'train')
    linked['dataset']['local'] = str(tmp_path / 'link')
    only_problem(config(tmp_path, roots, linked), 'both read')
    fine(config(tmp_path, roots, evaluator(roots['new']), evaluator(roots['old'], 'train')))


def test_held_out_by_another_fraction(roots, tmp_path):
    only_problem(
        config(tmp_path, roots, evaluator(roots['new']), evaluator(roots['half'])),
        'eval_loader[1].dataset holds out 0.5 of all documents and train_loader.dataset.new.new only 0.2',
        f'; prepare both with one --val-fraction, or {roots["half"]} with --earlier {roots["new"]}',
    )
    fine(config(tmp_path, roots, evaluator(roots['new']), new='half'))  # what is held out there is held out here, too
    fine(config(tmp_path, roots, evaluator(roots['after'])))  # it was prepared with what is trained on in view
    only_problem(config(tmp_path, roots, evaluator(roots['after']), old=['old']), 'streams.old only 0.2')


def test_all_at_once_and_a_manifest_that_is_cut_short(roots, tmp_path):
    cfg = config(tmp_path, roots, evaluator(roots['half']), evaluator(roots['new'], 'train'), old=['other'])
    found = tiny.problems(tiny.merge(cfg, {'model': {'vocab_size': 100, 'max_seq_len': 8}}))
    assert len(found) == 6, found
    shutil.copytree(roots['new'] / 'new', tmp_path / 'new')
    (tmp_path / 'manifest.json').write_text('{"request": ')
    cut = config(tmp_path, roots, train_loader={'dataset': {'new': {'local': str(tmp_path / 'new')}}})
    only_problem(cut, f'{tmp_path}/manifest.json cannot be read')
