# SPDX-License-Identifier: Apache-2.0
"""``scripts/prepare_data.py``: packing, splits, determinism, refusal, being killed, and what reads its output."""

import functools
import gzip
import itertools
import json
import lzma
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import prepare_data
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstd
from composer.utils.object_store import S3ObjectStore
from hypothesis import given, settings
from hypothesis import strategies as st
from llmfoundry.data.text_data import StreamingTextDataset
from llmfoundry.utils.builders import build_tokenizer
from streaming import StreamingDataset
from streaming.base.util import clean_stale_shared_memory

from cpt_algorithms.files import locked_sibling
from cpt_algorithms.preparation import lm_eval_items, parts, reading, sources
from cpt_algorithms.preparation.duplicates import digests, is_held_out
from cpt_algorithms.preparation.sources import Source
from cpt_algorithms.preparation.tokenizer import EOS, hash_tokenizer

SCRIPT = Path(prepare_data.__file__)
LENGTH = 16
SMALL = [f'--max-seq-len={LENGTH}', '--val-fraction=0.2', '--vocab-size=300']


def make_texts(seed, count=60):
    """Distinct documents of a few dozen words, one with non-ASCII letters and one that spells EOS."""
    generator = random.Random(seed)
    words = ['loss', 'rate', 'replay', 'token', 'warm', 'cosine', 'anneal', 'stage', 'größe', '学習']
    texts = [' '.join(generator.choices(words, k=generator.randint(10, 60))) for _ in range(count)]
    return [f'{seed} spells {EOS} in the middle', *texts]


def read_all(spec, size=10**6, text_key='text'):
    """Every document of a source cut into parts."""
    source = Source.parse(f'x={spec}')
    cut = sources.parts_of(source, sources.find_files(source), text_key, size, Path())
    return [text for part in cut for text in sources.read(part)]


def write_jsonl(path, texts, key='text'):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps({key: text}) + '\n' for text in texts), encoding='utf-8')
    return path


def jsonl(path, texts):
    """The option for a dataset of these texts, named as its file."""
    return f'--dataset={path.stem}=jsonl:{write_jsonl(path, texts)}'


def prepare(out, *arguments):
    """Runs the script in this process and returns the manifest."""
    given = {'--tokenizer', '--parent', '--earlier'} & {*arguments}  # what comes later wins
    prepare_data.main(['--out', str(out), *(SMALL[:2] if given else SMALL), *arguments])
    return json.loads((out / 'manifest.json').read_text())


@functools.cache
def read_tokens(out, dataset, split):
    clean_stale_shared_memory()
    data = StreamingDataset(local=str(out / dataset), split=split, shuffle=False, batch_size=1)
    return np.stack([data[position]['tokens'] for position in range(len(data))])


@functools.cache
def read_documents(out, dataset, split):
    """The whole documents of a split, decoded; what follows the last EOS is not one."""
    tokenizer = build_tokenizer(str(out / 'tokenizer'), {'model_max_length': LENGTH})
    tokens = read_tokens(out, dataset, split).ravel()
    ends = np.flatnonzero(tokens == tokenizer.eos_token_id)
    return [tokenizer.decode(part[:-1]) for part in np.split(tokens, ends + 1)[:-1]]


def every_byte(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob('*') if file.is_file()}


class Two(NamedTuple):
    out: Path
    manifest: dict
    texts: dict
    specs: list


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    """Two datasets that share ten documents, one of them also repeated within the first."""
    folder = tmp_path_factory.mktemp('two')
    old, new = make_texts(0), make_texts(1)
    texts = {'old': [*old, '', old[3], '  \n'], 'new': [*old[:10], *new]}
    for name, rows in texts.items():
        write_jsonl(folder / f'{name}.jsonl', rows)
    datasets = [f'--dataset={name}=jsonl:{folder / name}.jsonl' for name in texts]
    return Two(folder / 'out', prepare(folder / 'out', *datasets), texts, datasets)


def counted(dataset, name):
    return sum(split[name] for split in dataset['splits'].values())


def in_val(text, val_fraction=0.2):
    return bool(is_held_out(digests([text]), val_fraction)[0])


def test_a_subset_is_a_part_of_a_larger_one(two, tmp_path):
    whole, specs = two.out, [*two.specs, '--tokenizer', f'{two.out}/tokenizer']
    kept = {share: tmp_path / share for share in ('0.3', '0.6')}
    made = {share: prepare(out, *specs, f'--train-subset={share}') for share, out in kept.items()}
    for name in ('old', 'new'):
        least, more, every = (set(read_documents(out, name, 'train')) for out in (*kept.values(), whole))
        assert set() < least < more < every
        assert 0.1 * len(every) < len(least) < 0.5 * len(every)
        val = [read_documents(out, name, 'val') for out in (*kept.values(), whole)]
        assert val[0] == val[1] == val[2]
        counts = made['0.3']['datasets'][name]['splits']['train']
        assert counts['tokens'] < 0.6 * two.manifest['datasets'][name]['splits']['train']['tokens']


# What is written


def test_each_document_once_whole_and_in_order(two):
    out, manifest, texts, _ = two
    seen = set()
    for name, rows in texts.items():
        expected = {'train': [], 'val': []}
        for text in rows:
            if text.strip() and text not in seen:
                seen.add(text)
                expected['val' if in_val(text) else 'train'].append(text)
        for split in ('train', 'val'):
            documents = read_documents(out, name, split)
            assert documents == expected[split][: len(documents)]
            assert len(expected[split]) - len(documents) <= 1 + LENGTH  # in the dropped tokens
            assert manifest['datasets'][name]['splits'][split]['documents'] == len(expected[split])
    assert any(EOS in document for split in ('train', 'val') for document in read_documents(out, 'old', split))


def test_counts(two):
    out, manifest, _, specs = two
    datasets = manifest['datasets']
    assert [datasets[name]['skipped'] for name in ('old', 'new')] == [2, 0]
    assert [counted(dataset, 'duplicates') for dataset in datasets.values()] == [1, 10]
    for name, dataset in datasets.items():
        for split, counts in dataset['splits'].items():
            tokens = read_tokens(out, name, split)
            assert tokens.shape == (counts['samples'], LENGTH) and tokens.size == counts['tokens']
            assert 0 <= counts['leftover'] < LENGTH


def test_bytes_are_those_of_the_text_written(two):
    out, manifest, _, specs = two
    tokenizer = build_tokenizer(str(out / 'tokenizer'), {'model_max_length': LENGTH})
    for name, dataset in manifest['datasets'].items():
        for split, counts in dataset['splits'].items():
            tokens = read_tokens(out, name, split).ravel()
            text = tokenizer.decode(tokens[tokens != tokenizer.eos_token_id])
            assert abs(counts['bytes'] - len(text.encode())) <= 3


def test_lm_eval_items_are_of_documents_held_out(tmp_path, monkeypatch):
    texts = ['\n'.join(make_texts(at, 8)) for at in range(60)]
    for name in ('SMALLEST_PART', 'LARGEST_PART'):
        monkeypatch.setattr(sources, name, 20_000)
    # documents that came before, in the same part and in another, and one that is blank
    data = jsonl(tmp_path / 'a.jsonl', [*texts[:2], '', *texts[:30], *texts])
    manifest = prepare(tmp_path / 'out', data, '--max-val-tokens', '4000')
    counts = manifest['datasets']['a']
    val = [text for text in texts if in_val(text)][: counts['splits']['val']['documents']]
    rows = {}
    for kind in ('passages', 'continuations'):
        lines = (tmp_path / 'out' / 'lm_eval' / f'a_{kind}.jsonl').read_text().splitlines()
        rows[kind] = [json.loads(line) for line in lines]
        assert 0 < len(lines) == counts['lm_eval'][kind] <= lm_eval_items.ITEMS
    assert counts['parts'] > 3
    lm_eval_items.write_lm_eval(tmp_path / 'expected', 'a', val, LENGTH)
    assert every_byte(tmp_path / 'out' / 'lm_eval') == every_byte(tmp_path / 'expected'), 'of these, in their order'
    for row in rows['passages']:
        assert len(row['text']) <= 2 * LENGTH and any(row['text'] in text for text in val)
    for row in rows['continuations']:
        right = row['choices'][row['answer']]
        assert any(row['context'] + right in text for text in val)
        assert len({len(choice) for choice in row['choices']}) == 1 and len(set(row['choices'])) == 4


def test_too_few_documents_for_lm_eval_give_no_file(tmp_path):
    texts = ['\n'.join(make_texts(at, 8)) for at in range(12)]
    val = [text for text in texts if in_val(text)]
    train = [text for text in texts if text not in val]
    data = jsonl(tmp_path / 'a.jsonl', [*train, val[0]])
    manifest = prepare(tmp_path / 'out', data)
    assert manifest['datasets']['a']['lm_eval']['continuations'] == 0
    assert [file.name for file in (tmp_path / 'out' / 'lm_eval').iterdir()] == ['a_passages.jsonl']


def test_tokenizer(two):
    out, manifest, _, specs = two
    tokenizer = build_tokenizer(str(out / 'tokenizer'), {'model_max_length': 77})
    assert tokenizer.model_max_length == 77
    assert tokenizer.eos_token == tokenizer.pad_token == EOS
    assert len(tokenizer) == manifest['tokenizer']['vocab_size'] == 300
    assert manifest['tokenizer']['eos_token_id'] == tokenizer.eos_token_id
    text = 'any\tbytes \x00 größe 学習 🙂\r\n'
    assert tokenizer.decode(tokenizer(text)['input_ids']) == text


def test_llmfoundry_reads_it(two):
    out, manifest, _, specs = two
    tokenizer = build_tokenizer(str(out / 'tokenizer'), {'model_max_length': LENGTH})
    clean_stale_shared_memory()
    data = StreamingTextDataset(
        tokenizer, LENGTH, local=str(out / 'old'), split='train', shuffle=False, batch_size=1, validate_hash='xxh64'
    )
    assert len(data) == manifest['datasets']['old']['splits']['train']['samples']
    assert data[0].tolist() == read_tokens(out, 'old', 'train')[0].tolist()


def test_limits(tmp_path):
    data = jsonl(tmp_path / 'a.jsonl', make_texts(2, 200))
    everything = prepare(tmp_path / 'all', data)['datasets']['a']['splits']
    limits = ('--max-train-tokens', '1000', '--max-val-tokens', '100')
    some = prepare(tmp_path / 'some', data, *limits)['datasets']['a']['splits']
    assert [some[split]['tokens'] for split in ('train', 'val')] == [1000 // LENGTH * LENGTH, 100 // LENGTH * LENGTH]
    for split, counts in some.items():
        tokens = read_tokens(tmp_path / 'some', 'a', split)
        assert tokens.tolist() == read_tokens(tmp_path / 'all', 'a', split)[: len(tokens)].tolist()
        assert counts['bytes'] < everything[split]['bytes']
    train = prepare(tmp_path / 'train', data, *limits[:2])['datasets']['a']['splits']
    assert train['train'] == some['train'] and train['val']['documents'] < everything['val']['documents']


def test_the_same_bytes_again_whatever_the_chunks(two, tmp_path, monkeypatch):
    out, manifest, _, specs = two
    monkeypatch.setattr(parts, 'CHUNK', 500)
    prepare(tmp_path / 'again', *specs)
    assert every_byte(tmp_path / 'again') == every_byte(out)


# Parts and sources


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of 2,000 bytes."""
    monkeypatch.setattr(sources, 'SMALLEST_PART', 2000)
    monkeypatch.setattr(sources, 'LARGEST_PART', 2000)


@pytest.fixture
def three_sources(tmp_path):
    """The specifications of two datasets, of which the first has three sources, and all texts."""
    texts = make_texts(20, 160)
    folder = tmp_path / 'input'
    (folder / 'notes').mkdir(parents=True)
    write_jsonl(folder / '0.jsonl', texts[:50])
    write_jsonl(folder / '1.jsonl', [*texts[50:60], texts[3], ''])
    pq.write_table(pa.table({'text': [*texts[60:100], None, texts[70]]}), folder / 'x.parquet', row_group_size=7)
    for number, text in enumerate([*texts[100:120], texts[0]]):
        (folder / 'notes' / f'{number}.txt').write_text(text, encoding='utf-8')
    write_jsonl(folder / 'new.jsonl', [*texts[90:], *make_texts(21, 20)])
    specs = [
        f'web/cc=jsonl:{folder}/?.jsonl',
        f'web/books=parquet:{folder}/x.parquet',
        f'web/notes=text:{folder}/notes/*.txt',
        f'new=jsonl:{folder}/new.jsonl',
    ]
    return [f'--dataset={spec}' for spec in specs], [*texts, *make_texts(21, 20)]


def test_many_parts_of_many_sources(small_parts, three_sources, tmp_path):
    specs, texts = three_sources
    manifest = prepare(tmp_path / 'out', *specs)
    web = manifest['datasets']['web']
    assert web['parts'] > 10 and list(web['sources']) == ['cc', 'books', 'notes']
    # each document is somewhere, once: as many tokens as they have, of which fewer than a sample per split are lost
    tokenizer = build_tokenizer(str(tmp_path / 'out' / 'tokenizer'), {'model_max_length': LENGTH})
    lengths = {text: len(tokenizer(text, split_special_tokens=True)['input_ids']) + 1 for text in texts}
    for name, own in {'web': texts[:120], 'new': texts[120:]}.items():
        for split, counts in manifest['datasets'][name]['splits'].items():
            expected = [text for text in own if in_val(text) == (split == 'val')]
            assert counts['documents'] == len(expected)
            assert counts['tokens'] + counts['leftover'] == sum(lengths[text] for text in expected)
            tokens = read_tokens(tmp_path / 'out', name, split)
            assert tokens.size == counts['tokens'] and counts['leftover'] < LENGTH
            ends = np.count_nonzero(tokens == tokenizer.eos_token_id)
            assert len(expected) - counts['leftover'] <= ends <= len(expected)
            # whole ones, but for those across the end of a part
            assert set(read_documents(tmp_path / 'out', name, split)) & set(expected)
            documents = np.load(tmp_path / 'out' / name / split / 'documents.npy')
            assert {row.tobytes() for row in documents} == {row.tobytes() for row in digests(expected)}
    # per source, what it gives first
    assert [counted(source, 'documents') for source in web['sources'].values()] == [60, 40, 20]
    assert [counted(source, 'duplicates') for source in web['sources'].values()] == [1, 1, 1]
    assert [source['skipped'] for source in web['sources'].values()] == [1, 1, 0]
    assert counted(web['sources']['books'], 'tokens') == sum(lengths[text] for text in texts[60:100])
    assert counted(manifest['datasets']['new'], 'duplicates') == 30  # text 90 to 119


def test_limits_over_many_parts(small_parts, three_sources, tmp_path):
    specs, _ = three_sources
    everything = prepare(tmp_path / 'all', *specs)
    limits = ('--max-train-tokens', '1600', '--max-val-tokens', '320')
    manifest = prepare(tmp_path / 'some', *specs, *limits)
    for name, dataset in manifest['datasets'].items():
        assert [counts['tokens'] for counts in dataset['splits'].values()] == [1600, 320]
        for split in ('train', 'val'):
            own, all_of_it = (np.load(tmp_path / out / name / split / 'documents.npy') for out in ('some', 'all'))
            if name == 'web':
                assert own.tolist() == all_of_it[: len(own)].tolist()
    # what the limits left out of the first dataset is not a duplicate in the second
    counts = [dataset['splits']['train'] for dataset in manifest['datasets'].values()]
    assert counts[1]['duplicates'] < everything['datasets']['new']['splits']['train']['duplicates']


@pytest.mark.parametrize('name', ['a.jsonl.gz', 'a.jsonl.zst', 'a.jsonl.xz'])
def test_compressed_lines(name, tmp_path):
    texts = make_texts(22)
    data = write_jsonl(tmp_path / 'a.jsonl', texts).read_bytes()
    compress = {'gz': gzip.compress, 'xz': lzma.compress, 'zst': zstd.compress}[name.rpartition('.')[2]]
    (tmp_path / name).write_bytes(compress(data))
    assert read_all(f'jsonl:{tmp_path / name}') == texts


def test_lines_that_not_every_parser_reads(tmp_path):
    data = tmp_path / 'a.jsonl'
    data.write_text('{"text": "a", "score": NaN}\n{"text": "half \\ud83d"}\n{"text": "b"}\n')
    assert read_all(f'jsonl:{data}') == ['a', 'half \ud83d', 'b']


@given(st.lists(st.text(st.sampled_from('aé\n'), max_size=5), max_size=9), st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_lines_do_not_depend_on_where_files_are_cut(texts, size):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, 'a.jsonl')
        file.write_text(
            ''.join(json.dumps({'text': text}, ensure_ascii=False) + '\n' for text in texts), encoding='utf-8'
        )
        assert read_all(f'jsonl:{file}', size) == texts


def test_streamed_rows_are_read_once_and_resumed(tmp_path):
    texts = make_texts(23)
    for number in range(3):
        write_jsonl(tmp_path / 'data' / f'{number}.jsonl', texts[number::3])
    in_order = [text for number in range(3) for text in texts[number::3]]
    source = Source.parse(f'x=hf:{tmp_path / "data"}')
    first = sources.parts_of(source, [], 'text', 1000, tmp_path / 'spool')
    begun = [next(first) for _ in range(5)]
    first.close()
    (tmp_path / 'data' / '0.jsonl').write_text(json.dumps({'text': 'read again'}) + '\n')
    spooled = list(sources.parts_of(source, [], 'text', 1000, tmp_path / 'spool'))
    assert spooled[:5] == begun and len(spooled) > 8
    assert [text for part in spooled for text in sources.read(part)] == in_order
    assert list(sources.parts_of(source, [], 'text', 1000, tmp_path / 'spool')) == spooled


# The same again, something else, and being killed


def test_same_request_is_not_done_twice(two, monkeypatch, capsys):
    out, manifest, _, specs = two
    monkeypatch.setattr(prepare_data, 'prepare', None)
    assert prepare(out, *specs) == manifest
    printed = capsys.readouterr().out
    assert 'already prepared' in printed
    assert f'{manifest["datasets"]["old"]["splits"]["train"]["tokens"]:,}' in printed


def error_of(capsys, out, *arguments):
    """The one line the script prints before it exits with status 2, having left nothing new."""
    before = sorted(out.parent.iterdir())
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        prepare(out, *arguments)
    printed = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert printed.startswith('prepare_data: error: ') and printed.count('\n') == 1
    kept = [out.parent / f'.{out.name}.partial'] if 'goes on from' in printed else []
    assert sorted(out.parent.iterdir()) == sorted({*before, *kept})
    return printed


def test_a_different_request_is_refused(two, capsys):
    out, manifest, _, specs = two
    before = every_byte(out)
    message = error_of(capsys, out, *specs, '--max-seq-len', '32')
    assert 'max_seq_len was 16, now 32' in message and 'choose another --out or delete it' in message
    assert 'datasets was' in error_of(capsys, out, specs[0])
    assert every_byte(out) == before


def test_something_else_is_refused(tmp_path, capsys):
    data, out = jsonl(tmp_path / 'a.jsonl', make_texts(3)), tmp_path / 'out'
    out.mkdir()  # an empty folder is fine
    manifest = prepare(out, data)
    manifest['request']['format'] -= 1
    (out / 'manifest.json').write_text(json.dumps(manifest))
    assert 'format was 3, now 4' in error_of(capsys, out, data)
    write_jsonl(tmp_path / 'a.jsonl', make_texts(4))
    assert 'files was {"a": "1 files, ' in error_of(capsys, out, data)
    (out / 'manifest.json').unlink()
    assert 'was not made by this script' in error_of(capsys, out, data)


def kill_at(moment, patched, arguments):
    """Runs the script in a process that kills itself as it calls a function for the n-th time."""

    def run():
        original, calls = getattr(*patched), itertools.count(1)

        def call(*arguments, **keywords):
            number = next(calls)
            if 2 * number == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*arguments, **keywords)
            if 2 * number + 1 == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(*patched, call)
        prepare_data.main(arguments)

    process = multiprocessing.get_context('fork').Process(target=run)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.long
def test_killed_at_any_moment_it_goes_on(small_parts, three_sources, tmp_path, monkeypatch):
    """Kills the script before and after things get their names: parts, shards, their places."""
    specs, _ = three_sources
    rename, renamed = Path.rename, []
    with monkeypatch.context() as counting:
        counting.setattr(Path, 'rename', lambda file, target: renamed.append(file) or rename(file, target))
        manifest = prepare(tmp_path / 'whole', *specs)
    num_parts = sum(dataset['parts'] for dataset in manifest['datasets'].values())
    expected = every_byte(tmp_path / 'whole')
    read, reads = sources.read, []
    options = [*SMALL, *specs]
    last = 2 * len(renamed)
    for moment in (3, last // 3, last - 29, last):
        out = tmp_path / f'killed-{moment}'
        partial = tmp_path / f'.killed-{moment}.partial'
        kill_at(moment, (Path, 'rename'), ['--out', str(out), *options])
        assert partial.exists() and not out.exists()
        done = len(list(partial.glob('work/parts/[!.]*')))
        monkeypatch.setattr(parts, 'read', lambda part, broken: reads.append(part) or read(part, broken))
        reads.clear()
        prepare(out, *specs)
        assert len(reads) == num_parts - done
        assert every_byte(out) == expected
        assert not partial.exists()
    assert done == num_parts, 'some are killed in the end'


@pytest.mark.slow
def test_killed_with_its_processes(tmp_path):
    """Kills the script, which has others working for it, and goes on in one process."""
    texts = [' '.join(make_texts(number, 40)) for number in range(1500)]
    specs = [f'--dataset={name}=jsonl:{write_jsonl(tmp_path / name, texts[at::2])}' for at, name in enumerate('ab')]
    whole = prepare(tmp_path / 'whole', *specs, '--workers', '1')
    for delay in (0, 0.5, 1.5):
        out, partial = tmp_path / f'out-{delay}', tmp_path / f'.out-{delay}.partial'
        command = [sys.executable, str(SCRIPT), '--out', str(out), '--workers=2', *SMALL, *specs]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            while not list(partial.glob('work/parts/*')):
                assert process.poll() is None
                time.sleep(0.01)
            time.sleep(delay)
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not out.exists()
        assert prepare(out, *specs, '--workers', '1') == whole
        assert every_byte(out) == every_byte(tmp_path / 'whole')


@pytest.mark.slow
def test_processes_make_the_same_bytes(small_parts, three_sources, tmp_path):
    specs, _ = three_sources
    for workers in (1, 2):
        prepare(tmp_path / str(workers), *specs, '--workers', str(workers))
    assert every_byte(tmp_path / '1') == every_byte(tmp_path / '2')


@pytest.mark.slow
def test_spark_makes_the_same_bytes(small_parts, three_sources, tmp_path, monkeypatch):
    """Two processes of Spark; all but the name of the engine is the same."""
    specs, _ = three_sources
    session = pytest.importorskip('pyspark.sql').SparkSession
    local = prepare(tmp_path / 'local', *specs, '--compression', 'zstd')
    session.builder.master('local[2]').config('spark.ui.enabled', 'false').getOrCreate()
    spark = prepare(tmp_path / 'spark', *specs, '--compression', 'zstd', '--engine', 'spark')
    assert [local.pop('engine'), spark.pop('engine')] == ['local', 'spark']
    assert spark == local
    expected, found = (every_byte(tmp_path / name) for name in ('local', 'spark'))
    del expected['manifest.json'], found['manifest.json']
    assert found == expected


def test_two_runs_at_once(tmp_path, capsys):
    data = write_jsonl(tmp_path / 'data.jsonl', make_texts(0))
    with locked_sibling(tmp_path / 'out', RuntimeError()) as partial:
        (partial / 'file').touch()
        message = error_of(capsys, tmp_path / 'out', f'--dataset=a=jsonl:{data}')
        assert f'another run is preparing {tmp_path / "out"}' in message
        assert (partial / 'file').exists()
    with locked_sibling(tmp_path / 'out', RuntimeError()) as partial:
        assert (partial / 'file').exists()


# Compression and object storage


def test_compressed_shards(two, tmp_path):
    out, manifest, _, specs = two
    prepare(tmp_path / 'out', *specs, '--compression', 'zstd:7')
    assert {file.suffix for file in (tmp_path / 'out').rglob('shard.*')} == {'.zstd'}
    assert read_tokens(tmp_path / 'out', 'old', 'train').tolist() == read_tokens(out, 'old', 'train').tolist()


def test_object_storage(two, bucket, tmp_path, monkeypatch, capsys):
    """Killed while it uploads, it goes on; the same bytes as in a folder; read by Streaming."""
    out, manifest, _, specs = two
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    options = [*SMALL, *specs]

    def there():
        objects = bucket.list_objects_v2(Bucket='bucket').get('Contents', [])
        return {
            item['Key'].removeprefix('data/'): bucket.get_object(Bucket='bucket', Key=item['Key'])['Body'].read()
            for item in objects
        }

    expected = every_byte(out)
    kill_at(25, (S3ObjectStore, 'upload_object'), ['--out', 's3://bucket/data', *options])
    assert 0 < len(there()) < len(expected) and 'manifest.json' not in there()
    again, original = [], S3ObjectStore.upload_object

    def upload(self, name, filename):
        again.append(name)
        original(self, name, filename)

    monkeypatch.setattr(S3ObjectStore, 'upload_object', upload)
    prepare_data.main(['--out', 's3://bucket/data', *options])
    assert there() == expected and again[-1] == 'data/manifest.json'
    assert len(again) < len(expected)
    assert not list(tmp_path.glob('*prepare_data*')), 'nothing is left on this machine'
    capsys.readouterr()
    prepare_data.main(['--out', 's3://bucket/data', *options])
    assert 'already prepared' in capsys.readouterr().out
    clean_stale_shared_memory()
    data = StreamingDataset(remote='s3://bucket/data/old', local=str(tmp_path / 'cache'), split='train', batch_size=1)
    assert len(data) == manifest['datasets']['old']['splits']['train']['samples']

    def refused(*arguments):
        with pytest.raises(SystemExit):
            prepare_data.main([*arguments, *options])
        return capsys.readouterr().err

    assert 'compression was null, now "zstd"' in refused('--out', 's3://bucket/data', '--compression', 'zstd')
    assert '--out s3://bucket/data/old: holds train/' in refused('--out', 's3://bucket/data/old')
    assert 's3://no-such-bucket/data' in refused('--out', 's3://no-such-bucket/data')
    assert there() == expected


# What came before, and the model that will be trained


def test_earlier_data(two, tmp_path, capsys):
    out, manifest, texts, _ = two
    fresh = make_texts(30)
    data = jsonl(tmp_path / 'c.jsonl', [*texts['old'][:20], *texts['new'][20:40], *fresh])
    third = prepare(tmp_path / 'out', data, '--earlier', str(out))
    assert [counted(third['datasets']['c'], key) for key in ('duplicates', 'documents')] == [40, len(fresh)]
    assert third['tokenizer']['hash'] == manifest['tokenizer']['hash']
    other = prepare(tmp_path / 'other', data, '--vocab-size', '280')
    assert other['tokenizer']['hash'] != manifest['tokenizer']['hash']
    for message, *arguments in (
        ('have different tokenizers', '--tokenizer', str(tmp_path / 'other' / 'tokenizer'), '--earlier', str(out)),
        ('near-duplicates are looked for', '--earlier', str(out), '--near-duplicates'),
        ('no manifest.json', '--earlier', str(tmp_path)),
    ):
        assert message in error_of(capsys, tmp_path / 'no', data, *arguments)


def test_near_duplicates(tmp_path):
    """A training document nearly equal to a validation document is dropped, also across datasets and preparations."""
    long = [
        ' '.join(f'w{generator.randrange(9**9)}' for _ in range(120)) for generator in map(random.Random, range(80))
    ]
    nearly = [f'{text} changed' for text in long]
    data = [write_jsonl(tmp_path / f'{name}.jsonl', texts) for name, texts in {
        'a': [*long[:40], *nearly[:30]], 'b': [*nearly[30:40], *long[40:]], 'c': [*nearly[40:60], *make_texts(31)],
    }.items()]  # fmt: skip
    specs = [f'--dataset={file.stem}=jsonl:{file}' for file in data]
    manifest = prepare(tmp_path / 'ab', *specs[:2], '--near-duplicates')
    assert [counted(dataset, 'near_duplicates') for dataset in manifest['datasets'].values()] == [30, 10]
    in_a = [text for number in range(30) for text in (long[number], nearly[number])]
    kept = {row.tobytes() for split in ('train', 'val') for row in np.load(tmp_path / f'ab/a/{split}/documents.npy')}
    for number in range(30):
        pair = in_a[2 * number : 2 * number + 2]
        first = next((text for text in pair if in_val(text)), pair[0])
        assert [digests([text])[0].tobytes() in kept for text in pair] == [text == first for text in pair]
    later = prepare(tmp_path / 'later', specs[2], '--near-duplicates', '--earlier', str(tmp_path / 'ab'))
    assert counted(later['datasets']['c'], 'near_duplicates') == 20


def test_the_parents_tokenizer_vocabulary_and_length(two, tmp_path, capsys):
    out, manifest, _, specs = two
    data = f'--dataset=c=jsonl:{write_jsonl(tmp_path / "c.jsonl", make_texts(32))}'
    model = tmp_path / 'run' / 'huggingface' / 'ba10'
    shutil.copytree(out / 'tokenizer', model)
    config = {'vocab_size': 304, 'max_position_embeddings': 24}
    (model / 'config.json').write_text(json.dumps(config))
    parent = ('--parent', str(tmp_path / 'run'))
    prepare_data.main(['--out', str(tmp_path / 'out'), data, *parent, '--val-fraction', '0.2'])
    found = json.loads((tmp_path / 'out' / 'manifest.json').read_text())
    assert found['tokenizer']['hash'] == manifest['tokenizer']['hash'] == hash_tokenizer(model)
    assert found['request']['max_seq_len'] == 24
    prepare(tmp_path / 'short', data, *parent, '--tokenizer', str(out / 'tokenizer'))

    assert '--max-seq-len 25: --parent' in error_of(capsys, tmp_path / 'no', data, *parent, '--max-seq-len', '25')
    other = ['--tokenizer', str(prepare_tokenizer(tmp_path / 'other', out / 'tokenizer'))]
    assert 'have different tokenizers' in error_of(capsys, tmp_path / 'no', data, *parent, *other)
    (model / 'config.json').write_text(json.dumps({**config, 'vocab_size': 299}))
    message = error_of(capsys, tmp_path / 'no', data, *parent)
    assert 'its vocabulary of 300 is larger than that of --parent' in message and message.rstrip().endswith('299')


def prepare_tokenizer(folder, original):
    """The same tokenizer but for two tokens that have changed places."""
    shutil.copytree(original, folder)
    content = json.loads((folder / 'tokenizer.json').read_text())
    vocab = content['model']['vocab']
    vocab['a'], vocab['b'] = vocab['b'], vocab['a']
    (folder / 'tokenizer.json').write_text(json.dumps(content))
    return folder


def test_the_hash_is_of_what_a_tokenizer_does(two, tmp_path):
    out, manifest, _, specs = two
    tokenizer = build_tokenizer(str(out / 'tokenizer'), {'model_max_length': 99, 'padding_side': 'left'})
    tokenizer.save_pretrained(tmp_path / 'saved')
    assert hash_tokenizer(tmp_path / 'saved') == manifest['tokenizer']['hash']
    assert hash_tokenizer(prepare_tokenizer(tmp_path / 'swapped', out / 'tokenizer')) != manifest['tokenizer']['hash']
    tokenizer.eos_token = 'a'
    tokenizer.save_pretrained(tmp_path / 'eos')
    assert hash_tokenizer(tmp_path / 'eos') != manifest['tokenizer']['hash']
    with pytest.raises(ValueError, match='no fast tokenizer found'):
        hash_tokenizer(tmp_path)


# Sources


def test_sources_of_one_text_agree(tmp_path):
    texts = make_texts(6)
    (tmp_path / 'notes' / 'deep').mkdir(parents=True)
    for number, text in enumerate(texts):
        (tmp_path / 'notes' / ('deep' if number % 2 else '') / f'{number}.txt').write_text(text, encoding='utf-8')
    write_jsonl(tmp_path / 'x[1].jsonl', texts[:20], 'body')
    write_jsonl(tmp_path / 'x[2].jsonl', texts[20:], 'body')
    pq.write_table(pa.table({'id': range(len(texts)), 'body': texts}), tmp_path / 'x.parquet')

    def read(kind, target):
        return read_all(f'{kind}:{tmp_path / target}', text_key='body')

    assert read('jsonl', 'x*.jsonl') == texts  # the order of the file names, then of the rows
    assert read('parquet', 'x.parquet') == texts
    notes = read('text', 'notes/**/*.txt')
    assert sorted(notes) == sorted(texts) and notes != texts


@pytest.mark.parametrize(
    'text',
    ['cpp', 'sympy', *(pytest.param(text, marks=pytest.mark.slow) for text in sources.INSTALLED if text != 'cpp')],
)
def test_installed(text, tmp_path):
    limits = ('--max-train-tokens', '20000', '--max-val-tokens', '2000', '--tokenizer-documents', '20')
    manifest = prepare(tmp_path / 'out', f'--dataset=x=installed:{text}', *limits)
    splits = manifest['datasets']['x']['splits']
    assert [splits[split]['tokens'] for split in ('train', 'val')] == [20000, 2000]
    assert manifest['datasets']['x']['files'] > 100


def test_files_that_are_not_prose_or_code_are_blank(tmp_path):
    contents = {
        'a.py': b'x = 1\n',
        'latin.py': b'\xe9',
        'large.py': b'#' * (reading.MAX_INSTALLED_BYTES + 1),
        'METADATA': b'Name: x\nVersion: 1\n\n# Readme\n\nBody: text\n',
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    units = tuple((str(tmp_path / name), 0, 0) for name in contents)
    texts = list(sources.read(sources.Part(Source.parse('x=installed:python'), units, 0, 'text')))
    assert texts == ['x = 1\n', '', '', '# Readme\n\nBody: text\n']


def test_given_tokenizer(two, tmp_path, capsys):
    out, manifest, _, specs = two
    data = jsonl(tmp_path / 'a.jsonl', make_texts(7))
    other = prepare(tmp_path / 'out', data, '--tokenizer', str(out / 'tokenizer'))
    assert other['tokenizer'] == {**manifest['tokenizer'], 'hash': other['tokenizer']['hash']}
    assert other['request']['tokenizer_hash'] == manifest['tokenizer']['hash']
    text = next(text for text in make_texts(7) if not in_val(text))
    assert read_documents(tmp_path / 'out', 'a', 'train')[0] == text


# Errors


@pytest.fixture
def no_work(monkeypatch):
    """What is wrong is found before any work."""
    monkeypatch.setattr(prepare_data, 'prepare', None)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ('--dataset=a=jsonl:missing/*.jsonl', r'dataset a: .* jsonl:missing/\*\.jsonl'),
        ('--dataset=a=jsno:x', "'jsno'.* 'jsonl'"),
        ('--dataset=a=quux:x', "'quux'.* hf, installed, jsonl, parquet, sampled, text"),
        ('--dataset=a=installed:pyhton', "'pyhton'.* 'python'"),
        ('--dataset=german', "'german': .*NAME=KIND:TARGET"),
        ('--dataset=../a=installed:python', "'../a'"),
        ('--dataset=tokenizer=installed:python', "'tokenizer'"),
        ('--dataset=lm_eval=installed:python', "'lm_eval'"),
        ('--dataset=a=installed:python --dataset=a=installed:cpp', 'dataset a .*twice'),
        ('--dataset=a=hf:x/y?splt=train', "'splt'.* 'split'"),
        ('--dataset=a=hf:x/y?train', 'hf:x/y.train: .*name=value'),
        ('--dataset=a=hf:nobody/no-such-dataset', 'dataset a: .*hf:nobody/no-such-dataset: '),
        ('--max-seq-len=1', '--max-seq-len=1 .*at least 2'),
        ('--max-seq-len=x', "--max-seq-len: .*'x'"),
        ('--val-fraction=1', '--val-fraction=1.0 .*below 1'),
        ('--val-fraction=nan --workers=0', '--val-fraction=nan .*; --workers=0 .*at least 1'),
        ('--engine=sprak', "--engine='sprak' .*'spark'"),
        ('--max-train-tokens=15', '--max-train-tokens 15: .*16'),
        ('--vocab-size=256', '--vocab-size=256 .*at least 257'),
        ('--tokenizer-documents=0', '--tokenizer-documents=0 .*at least 1'),
        ('--tokenizer x --tokenizer-documents 9', '--tokenizer-documents .* x '),
        ('--near-threshold=0.9', '--near-threshold 0.9 .*--near-duplicates'),
        ('--compression=zsdt', 'zsdt: .*zstd'),
        ('--out=hf://datasets/a --dataset=a=jsonl:missing', 'hf://datasets/a: .* azure://, .* s3://'),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path, capsys, no_work):
    assert re.search(message, error_of(capsys, tmp_path / 'out', *arguments.split()))


@pytest.mark.parametrize(
    ('rows', 'message'),
    [
        ('{"body": "x", "id": 1}\n', "dataset a: .*'text' .*--text-key.*: body, id"),
        ('{"text": 3}\n', "dataset a: .*'text' .*int"),
        ('', 'dataset a: .*no rows|dataset a: cannot read'),
    ],
)
def test_wrong_rows(rows, message, tmp_path, capsys, no_work):
    (tmp_path / 'a.jsonl').write_text(rows)
    assert re.search(message, error_of(capsys, tmp_path / 'out', f'--dataset=a=jsonl:{tmp_path}/a.jsonl'))


@pytest.mark.parametrize(
    ('name', 'content'),
    [('b.txt', b'caf\xe9'), ('b.jsonl', b'{"text": "a"}\n{"text": \n'), ('b.parquet', b'no parquet')],
)
def test_broken_files(name, content, tmp_path, capsys):
    data = jsonl(tmp_path / 'a.jsonl', make_texts(8))
    (tmp_path / name).write_bytes(content)
    broken = f'{name[2:].replace("txt", "text")}:{tmp_path / name}'
    message = error_of(capsys, tmp_path / 'out', data, f'--dataset=b={broken}')
    assert f'dataset b: cannot read {broken}: ' in message


@pytest.mark.parametrize(
    ('texts', 'options', 'message'),
    [
        (make_texts(8), ['--tokenizer', 'nobody/no-such'], '--tokenizer nobody/no-such: '),
        (['one short document'], [], '(train|val) has no sample of 16 tokens'),
    ],
)
def test_a_preparation_that_cannot_be(texts, options, message, tmp_path, capsys):
    data = jsonl(tmp_path / 'a.jsonl', texts)
    assert re.search(message, error_of(capsys, tmp_path / 'out', data, *options))
