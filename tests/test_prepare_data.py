# SPDX-License-Identifier: Apache-2.0
"""``scripts/prepare_data.py``: packing, splits, determinism, refusal, being killed, and what reads its output."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import prepare_data
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmfoundry.data.text_data import StreamingTextDataset
from llmfoundry.utils.builders import build_tokenizer
from prepare_data import EOS, PrepareError, Source, digest, pack, split_of
from streaming import StreamingDataset
from streaming.base.util import clean_stale_shared_memory

SCRIPT = Path(prepare_data.__file__)
LENGTH = 16


def make_texts(seed: int, count: int = 60) -> list[str]:
    """Distinct documents of a few dozen words, one with non-ASCII letters and one that spells EOS."""
    generator = random.Random(seed)
    words = ['loss', 'rate', 'replay', 'token', 'warm', 'cosine', 'anneal', 'stage', 'größe', '学習']
    texts = [' '.join(generator.choices(words, k=generator.randint(10, 60))) for _ in range(count)]
    return [f'{seed} spells {EOS} in the middle', *texts]


def write_jsonl(path: Path, texts: list, key: str = 'text') -> Path:
    path.write_text(''.join(json.dumps({key: text}) + '\n' for text in texts), encoding='utf-8')
    return path


def prepare(out: Path, *arguments: str) -> dict:
    """Runs the script in this process and returns the manifest."""
    small = ['--max-seq-len', str(LENGTH), '--val-fraction', '0.2', '--vocab-size', '300']
    own = {argument for argument in arguments if argument.startswith('--')}
    defaults = [
        word for flag, value in zip(small[::2], small[1::2], strict=True) if flag not in own for word in (flag, value)
    ]
    if '--tokenizer' in own:
        defaults = defaults[:-2]
    prepare_data.main(['--out', str(out), *defaults, *arguments])
    return json.loads((out / 'manifest.json').read_text())


def read_tokens(out: Path, dataset: str, split: str) -> np.ndarray:
    clean_stale_shared_memory()
    data = StreamingDataset(local=str(out / dataset), split=split, shuffle=False, batch_size=1)
    return np.stack([data[position]['tokens'] for position in range(len(data))])


def read_documents(out: Path, dataset: str, split: str) -> list[str]:
    """The whole documents of a split, decoded; what follows the last EOS is not one."""
    tokenizer = build_tokenizer(str(out / 'tokenizer'), {'model_max_length': LENGTH})
    tokens = read_tokens(out, dataset, split).ravel()
    ends = np.flatnonzero(tokens == tokenizer.eos_token_id)
    return [tokenizer.decode(part[:-1]) for part in np.split(tokens, ends + 1)[:-1]]


def every_byte(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob('*') if file.is_file()}


@pytest.fixture(scope='module')
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, dict[str, list[str]]]:
    """Two datasets that share ten documents, one of them also repeated within the first."""
    folder = tmp_path_factory.mktemp('two')
    old, new = make_texts(0), make_texts(1)
    texts = {'old': [*old, '', old[3], '  \n'], 'new': [*old[:10], *new]}
    for name, rows in texts.items():
        write_jsonl(folder / f'{name}.jsonl', rows)
    datasets = [f'--dataset={name}=jsonl:{folder / name}.jsonl' for name in texts]
    return folder / 'out', prepare(folder / 'out', *datasets), texts


# Pure functions


def test_pack_by_hand():
    # 7, then 1 2 3 and EOS, then 4 5 and EOS, in threes
    rows, leftover = pack(np.array([7], np.int32), [[1, 2, 3], [4, 5]], eos=9, max_seq_len=3)
    assert rows.tolist() == [[7, 1, 2], [3, 9, 4]]
    assert leftover.tolist() == [5, 9]
    assert rows.dtype == leftover.dtype == np.int32


def test_pack_of_nothing():
    rows, leftover = pack(np.zeros(0, np.int32), [], eos=0, max_seq_len=4)
    assert rows.shape == (0, 4) and len(leftover) == 0


@given(st.lists(st.lists(st.integers(1, 9), max_size=12), max_size=8), st.integers(2, 7), st.integers(0, 8))
def test_pack_in_parts_is_pack_at_once(documents: list[list[int]], max_seq_len: int, cut: int):
    nothing = np.zeros(0, np.int32)
    rows, leftover = pack(nothing, documents, 0, max_seq_len)
    first, between = pack(nothing, documents[:cut], 0, max_seq_len)
    second, last = pack(between, documents[cut:], 0, max_seq_len)
    assert np.concatenate([first, second]).tolist() == rows.tolist()
    assert last.tolist() == leftover.tolist()
    assert [*rows.ravel(), *leftover] == [token for document in documents for token in [*document, 0]]


def test_split_of_by_hand():
    assert split_of(bytes(16), 1e-9) == 'val'
    assert split_of(b'\x80' + bytes(15), 0.5) == 'train'  # exactly one half is not below one half
    assert split_of(b'\x7f' + b'\xff' * 15, 0.5) == 'val'
    assert split_of(b'\xff' * 16, 0.999) == 'train'


def test_split_shares():
    share = np.mean([split_of(digest(str(number)), 0.1) == 'val' for number in range(10_000)])
    assert abs(share - 0.1) < 0.01  # 3 standard deviations


@given(st.lists(st.text(max_size=9)), st.integers(1, 20))
def test_chunks_keep_every_text_in_order(texts: list[str], size: int):
    chunks = list(prepare_data.in_chunks(texts, size))
    assert [text for chunk in chunks for text in chunk] == texts
    assert all(sum(map(len, chunk[:-1])) < size for chunk in chunks)


def test_hash_order_depends_on_names_only():
    names = [f'package/{number}.py' for number in range(50)]
    assert prepare_data.hash_order(names) == prepare_data.hash_order(reversed(names)) != names


def test_hf_arguments():
    assert prepare_data.hf_arguments('allenai/c4?name=en&split=validation') == {
        'path': 'allenai/c4',
        'name': 'en',
        'split': 'validation',
    }
    assert prepare_data.hf_arguments('org/data') == {'path': 'org/data', 'split': 'train'}


@given(st.text(alphabet='ab \n', max_size=60), st.integers(2, 9))
def test_passages_are_the_text_in_pieces(text: str, length: int):
    pieces = prepare_data.passages(text, length)
    assert ''.join(pieces) == text and all(0 < len(piece) <= length for piece in pieces)


def test_passages_by_hand():
    # after a newline in the second half, else a space there, else anywhere
    assert prepare_data.passages('abc\nd e fghijklmn', 6) == ['abc\n', 'd e ', 'fghijk', 'lmn']


def test_continuations_by_hand():
    # of 16 characters 12 can be context, which is cut after the last space in their second half, and 4 follow
    documents = [f'{letter * 7} {letter * 4} xyz' for letter in 'abcde']
    items = prepare_data.continuations(documents, 16, 9)
    assert sorted(item['context'] for item in items) == [f'{letter * 7} ' for letter in 'abcde']
    for item in items:
        right = item['context'][0] * 4
        assert item['choices'][item['answer']] == right and len(set(item['choices'])) == 4
        assert set(item['choices']) <= {letter * 4 for letter in 'abcde'}
    assert prepare_data.continuations(documents, 16, 2) == items[:2]
    assert prepare_data.continuations(documents[:3], 16, 9) == [], 'there are not three others'


# What is written


def test_each_document_once_whole_and_in_order(two: tuple[Path, dict, dict[str, list[str]]]):
    out, manifest, texts = two
    seen = set()
    for name, rows in texts.items():
        expected = {'train': [], 'val': []}
        for text in rows:
            if text.strip() and text not in seen:
                seen.add(text)
                expected[split_of(digest(text), 0.2)].append(text)
        for split in ('train', 'val'):
            documents = read_documents(out, name, split)
            assert documents == expected[split][: len(documents)]
            assert len(expected[split]) - len(documents) <= 1 + LENGTH  # in the dropped tokens
            assert manifest['datasets'][name]['splits'][split]['documents'] == len(expected[split])


def test_no_document_on_both_sides_or_twice(two: tuple[Path, dict, dict[str, list[str]]]):
    out, _, _ = two
    parts = [read_documents(out, name, split) for name in ('old', 'new') for split in ('train', 'val')]
    documents = [document for part in parts for document in part]
    assert len(documents) == len(set(documents)) > 100


def test_counts(two: tuple[Path, dict, dict[str, list[str]]]):
    out, manifest, _ = two
    datasets = manifest['datasets']
    assert [datasets[name]['skipped'] for name in ('old', 'new')] == [2, 0]
    duplicates = {
        name: sum(counts['duplicates'] for counts in dataset['splits'].values()) for name, dataset in datasets.items()
    }
    assert duplicates == {'old': 1, 'new': 10}
    for name, dataset in datasets.items():
        for split, counts in dataset['splits'].items():
            tokens = read_tokens(out, name, split)
            assert tokens.shape == (counts['samples'], LENGTH) and tokens.size == counts['tokens']
            assert 0 <= counts['leftover'] < LENGTH


def test_bytes_are_those_of_the_text_written(two: tuple[Path, dict, dict[str, list[str]]]):
    out, manifest, _ = two
    tokenizer = build_tokenizer(str(out / 'tokenizer'), {'model_max_length': LENGTH})
    for name, dataset in manifest['datasets'].items():
        for split, counts in dataset['splits'].items():
            tokens = read_tokens(out, name, split).ravel()
            text = tokenizer.decode(tokens[tokens != tokenizer.eos_token_id])
            assert abs(counts['bytes'] - len(text.encode())) <= 3


def test_text_that_spells_eos_is_text(two: tuple[Path, dict, dict[str, list[str]]]):
    out, _, _ = two
    parts = [read_documents(out, name, split) for name in ('old', 'new') for split in ('train', 'val')]
    assert any(EOS in document for part in parts for document in part)


def test_lm_eval_items_are_of_documents_held_out(tmp_path: Path):
    texts = ['\n'.join(make_texts(at, 8)) for at in range(60)]
    data = write_jsonl(tmp_path / 'a.jsonl', texts)
    manifest = prepare(tmp_path / 'out', f'--dataset=a=jsonl:{data}', '--max-val-tokens', '4000')
    counts = manifest['datasets']['a']
    val = [text for text in texts if split_of(digest(text), 0.2) == 'val'][: counts['splits']['val']['documents']]
    rows = {}
    for kind in ('passages', 'continuations'):
        lines = (tmp_path / 'out' / 'lm_eval' / f'a_{kind}.jsonl').read_text().splitlines()
        rows[kind] = [json.loads(line) for line in lines]
        assert 0 < len(lines) == counts['lm_eval'][kind] <= prepare_data.LM_EVAL_ITEMS
    for row in rows['passages']:
        assert len(row['text']) <= 2 * LENGTH and any(row['text'] in text for text in val)
    for row in rows['continuations']:
        right = row['choices'][row['answer']]
        assert any(row['context'] + right in text for text in val)
        assert len({len(choice) for choice in row['choices']}) == 1 and len(set(row['choices'])) == 4


def test_too_few_documents_for_lm_eval_give_no_file(tmp_path: Path):
    texts = ['\n'.join(make_texts(at, 8)) for at in range(12)]
    val = [text for text in texts if split_of(digest(text), 0.2) == 'val']
    train = [text for text in texts if text not in val]
    data = write_jsonl(tmp_path / 'a.jsonl', [*train, val[0]])
    manifest = prepare(tmp_path / 'out', f'--dataset=a=jsonl:{data}')
    assert manifest['datasets']['a']['lm_eval']['continuations'] == 0
    assert [file.name for file in (tmp_path / 'out' / 'lm_eval').iterdir()] == ['a_passages.jsonl']


def test_tokenizer(two: tuple[Path, dict, dict[str, list[str]]]):
    out, manifest, _ = two
    tokenizer = build_tokenizer(str(out / 'tokenizer'), {'model_max_length': 77})
    assert tokenizer.model_max_length == 77
    assert tokenizer.eos_token == tokenizer.pad_token == EOS
    assert len(tokenizer) == manifest['tokenizer']['vocab_size'] == 300
    assert manifest['tokenizer']['eos_token_id'] == tokenizer.eos_token_id
    text = 'any\tbytes \x00 größe 学習 🙂\r\n'
    assert tokenizer.decode(tokenizer(text)['input_ids']) == text


def test_llmfoundry_reads_it(two: tuple[Path, dict, dict[str, list[str]]]):
    out, manifest, _ = two
    tokenizer = build_tokenizer(str(out / 'tokenizer'), {'model_max_length': LENGTH})
    clean_stale_shared_memory()
    data = StreamingTextDataset(
        tokenizer, LENGTH, local=str(out / 'old'), split='train', shuffle=False, batch_size=1, validate_hash='xxh64'
    )
    assert len(data) == manifest['datasets']['old']['splits']['train']['samples']
    assert data[0].tolist() == read_tokens(out, 'old', 'train')[0].tolist()


def test_limits(tmp_path: Path):
    data = write_jsonl(tmp_path / 'a.jsonl', make_texts(2, 200))
    everything = prepare(tmp_path / 'all', f'--dataset=a=jsonl:{data}')['datasets']['a']['splits']
    limits = ('--max-train-tokens', '1000', '--max-val-tokens', '100')
    some = prepare(tmp_path / 'some', f'--dataset=a=jsonl:{data}', *limits)['datasets']['a']['splits']
    assert [some[split]['tokens'] for split in ('train', 'val')] == [1000 // LENGTH * LENGTH, 100 // LENGTH * LENGTH]
    for split, counts in some.items():
        tokens = read_tokens(tmp_path / 'some', 'a', split)
        assert tokens.tolist() == read_tokens(tmp_path / 'all', 'a', split)[: len(tokens)].tolist()
        assert counts['bytes'] < everything[split]['bytes']
    train = prepare(tmp_path / 'train', f'--dataset=a=jsonl:{data}', *limits[:2])['datasets']['a']['splits']
    assert train['train'] == some['train'] and train['val']['documents'] < everything['val']['documents']


@settings(max_examples=5, deadline=None)
@given(st.integers(1, 3000))
def test_result_does_not_depend_on_chunks(two: tuple[Path, dict, dict[str, list[str]]], size: int):
    out, _, texts = two
    tokenizer = build_tokenizer(str(out / 'tokenizer'), {'model_max_length': LENGTH})

    def packed(size: int) -> list:
        rows = {split: [] for split in prepare_data.SPLITS}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prepare_data, 'CHUNK_CHARACTERS', size)

            class Writer:
                def __init__(self, split: str):
                    self.split = split

                def write(self, sample: dict) -> None:
                    rows[self.split].append(sample['tokens'].tolist())

            splits = {
                split: prepare_data.SplitWriter(Writer(split), tokenizer, LENGTH, limit)
                for split, limit in {'train': 800, 'val': None}.items()
            }
            skipped = prepare_data.pack_dataset(texts['old'], splits, set(), 0.2, tokenizer)
        return [rows, skipped, [split.finish() for split in splits.values()]]

    assert packed(size) == packed(10**9)


# The same again, something else, and being killed


def test_the_same_bytes_again(two: tuple[Path, dict, dict[str, list[str]]], tmp_path: Path):
    out, manifest, _ = two
    prepare(tmp_path / 'again', *[f'--dataset={spec}' for spec in manifest['request']['datasets']])
    assert every_byte(tmp_path / 'again') == every_byte(out)


def test_same_request_is_not_done_twice(
    two: tuple[Path, dict, dict[str, list[str]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    out, manifest, _ = two
    monkeypatch.setattr(prepare_data, 'prepare', None)
    assert prepare(out, *[f'--dataset={spec}' for spec in manifest['request']['datasets']]) == manifest
    printed = capsys.readouterr().out
    assert 'already prepared' in printed
    assert f'{manifest["datasets"]["old"]["splits"]["train"]["tokens"]:,}' in printed


def error_of(capsys: pytest.CaptureFixture, out: Path, *arguments: str) -> str:
    """The one line the script prints before it exits with status 2, having left nothing new."""
    before = sorted(out.parent.iterdir())
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        prepare(out, *arguments)
    printed = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert printed.startswith('prepare_data: error: ') and printed.count('\n') == 1
    assert sorted(out.parent.iterdir()) == before
    return printed


def test_a_different_request_is_refused(two: tuple[Path, dict, dict[str, list[str]]], capsys: pytest.CaptureFixture):
    out, manifest, _ = two
    before = every_byte(out)
    datasets = [f'--dataset={spec}' for spec in manifest['request']['datasets']]
    message = error_of(capsys, out, *datasets, '--max-seq-len', '32')
    assert 'max_seq_len was 16, now 32' in message and 'choose another --out or delete it' in message
    assert 'datasets was' in error_of(capsys, out, datasets[0])
    assert every_byte(out) == before


def test_a_preparation_of_another_format_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    data = write_jsonl(tmp_path / 'a.jsonl', make_texts(3))
    manifest = prepare(tmp_path / 'out', f'--dataset=a=jsonl:{data}')
    manifest['request']['format'] -= 1
    (tmp_path / 'out' / 'manifest.json').write_text(json.dumps(manifest))
    assert 'format was 1, now 2); choose' in error_of(capsys, tmp_path / 'out', f'--dataset=a=jsonl:{data}')


def test_changed_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    data = write_jsonl(tmp_path / 'a.jsonl', make_texts(3))
    prepare(tmp_path / 'out', f'--dataset=a=jsonl:{data}')
    write_jsonl(data, make_texts(4))
    assert 'files was {"a": "1 files, ' in error_of(capsys, tmp_path / 'out', f'--dataset=a=jsonl:{data}')


def test_a_folder_of_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    data = write_jsonl(tmp_path / 'a.jsonl', make_texts(3))
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'thesis.tex').touch()
    message = error_of(capsys, tmp_path / 'out', f'--dataset=a=jsonl:{data}')
    assert 'exists and was not made by this script' in message
    (tmp_path / 'out' / 'thesis.tex').unlink()
    assert prepare(tmp_path / 'out', f'--dataset=a=jsonl:{data}')  # an empty folder is fine


@pytest.mark.parametrize('sign', ['', 'a/train', 'b/train'])
def test_killed_half_way_leaves_nothing_that_looks_finished(tmp_path: Path, sign: str):
    """Kills the script when a first path of its temporary folder appears."""
    texts = make_texts(5, 10_000)
    datasets = [f'--dataset={name}=jsonl:{write_jsonl(tmp_path / name, texts[at::2])}' for at, name in enumerate('ab')]
    out, partial = tmp_path / 'out', tmp_path / '.out.partial'
    command = [sys.executable, str(SCRIPT), '--out', str(out), '--max-seq-len=16', '--val-fraction=0.2']
    process = subprocess.Popen([*command, '--vocab-size=300', *datasets], stdout=subprocess.DEVNULL)
    try:
        while not (partial / sign).exists():
            assert process.poll() is None
            time.sleep(0.005)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert partial.exists() and not out.exists()
    (partial / 'left').touch()
    if sign == 'b/train':
        manifest = prepare(out, *datasets)
        assert not partial.exists() and not (out / 'left').exists()
        assert len(read_tokens(out, 'b', 'val')) == manifest['datasets']['b']['splits']['val']['samples']


def test_two_runs_at_once(tmp_path: Path):
    with prepare_data.appearing_whole(tmp_path / 'out') as partial:
        (partial / 'file').touch()
        with pytest.raises(PrepareError, match='another run is preparing'):
            with prepare_data.appearing_whole(tmp_path / 'out'):
                pass
        assert (partial / 'file').exists()
    assert (tmp_path / 'out' / 'file').exists()


# Sources


def test_sources_of_one_text_agree(tmp_path: Path):
    texts = make_texts(6)
    (tmp_path / 'notes' / 'deep').mkdir(parents=True)
    for number, text in enumerate(texts):
        (tmp_path / 'notes' / ('deep' if number % 2 else '') / f'{number}.txt').write_text(text, encoding='utf-8')
    write_jsonl(tmp_path / 'x[1].jsonl', texts[:20], 'body')
    write_jsonl(tmp_path / 'x[2].jsonl', texts[20:], 'body')
    pq.write_table(pa.table({'id': range(len(texts)), 'body': texts}), tmp_path / 'x.parquet')

    def read(kind: str, target: str) -> list[str]:
        source = Source.parse(f'x={kind}:{tmp_path / target}')
        return list(prepare_data.read_documents(source, prepare_data.find_files(source), 'body'))

    assert read('jsonl', 'x*.jsonl') == texts  # the order of the file names, then of the rows
    assert read('parquet', 'x.parquet') == texts
    notes = read('text', 'notes/**/*.txt')
    assert sorted(notes) == sorted(texts) and notes != texts


@pytest.mark.parametrize('text', prepare_data.INSTALLED)
def test_installed(text: str, tmp_path: Path):
    limits = ('--max-train-tokens', '20000', '--max-val-tokens', '2000', '--tokenizer-documents', '20')
    manifest = prepare(tmp_path / 'out', f'--dataset=x=installed:{text}', *limits)
    splits = manifest['datasets']['x']['splits']
    assert [splits[split]['tokens'] for split in ('train', 'val')] == [20000, 2000]
    assert manifest['datasets']['x']['files'] > 100


def test_files_that_are_not_prose_or_code_are_blank(tmp_path: Path):
    contents = {
        'a.py': b'x = 1\n',
        'latin.py': b'\xe9',
        'large.py': b'#' * (prepare_data.MAX_INSTALLED_BYTES + 1),
        'METADATA': b'Name: x\nVersion: 1\n\n# Readme\n\nBody: text\n',
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    texts = list(prepare_data.read_installed([str(tmp_path / name) for name in contents]))
    assert texts == ['x = 1\n', '', '', '# Readme\n\nBody: text\n']


def test_given_tokenizer(two: tuple[Path, dict, dict[str, list[str]]], tmp_path: Path, capsys: pytest.CaptureFixture):
    out, manifest, _ = two
    data = write_jsonl(tmp_path / 'a.jsonl', make_texts(7))
    other = prepare(tmp_path / 'out', f'--dataset=a=jsonl:{data}', '--tokenizer', str(out / 'tokenizer'))
    assert other['tokenizer'] == {**manifest['tokenizer'], 'hash': other['tokenizer']['hash']}
    assert other['request']['tokenizer_hash'] == manifest['tokenizer']['hash']
    text = next(text for text in make_texts(7) if split_of(digest(text), 0.2) == 'train')
    assert read_documents(tmp_path / 'out', 'a', 'train')[0] == text


# Errors


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--dataset=a=jsonl:missing/*.jsonl'], 'dataset a: no file found for jsonl:missing/*.jsonl'),
        (['--dataset=a=jsno:x'], "unknown source kind 'jsno'; did you mean 'jsonl'?"),
        (['--dataset=a=quux:x'], "unknown source kind 'quux'; known: installed, jsonl, parquet, text, hf"),
        (['--dataset=a=installed:pyhton'], "unknown text 'pyhton'; did you mean 'python'?"),
        (['--dataset=german'], 'expected NAME=KIND:TARGET'),
        (['--dataset=../a=installed:python'], "'../a' cannot be the name of a dataset folder"),
        (['--dataset=tokenizer=installed:python'], "'tokenizer' cannot be the name of a dataset folder"),
        (['--dataset=lm_eval=installed:python'], "'lm_eval' cannot be the name of a dataset folder"),
        (['--dataset=a=installed:python', '--dataset=a=installed:cpp'], "two datasets are called 'a'"),
        (['--dataset=a=hf:x/y?splt=train'], "unknown option 'splt'; did you mean 'split'?"),
        (['--dataset=a=hf:x/y?train'], 'expected options as name=value&name=value'),
        (['--dataset=a=hf:nobody/no-such-dataset'], 'dataset a: cannot read hf:nobody/no-such-dataset: '),
        (['--max-seq-len', '1'], '--max-seq-len 1: a sample needs at least 2 tokens'),
        (['--max-seq-len', 'x'], "argument --max-seq-len: invalid int value: 'x'"),
        (['--val-fraction', '1'], '--val-fraction 1.0: expected more than 0 and less than 1'),
        (['--val-fraction', 'nan'], '--val-fraction nan: expected more than 0 and less than 1'),
        (['--max-train-tokens', '15'], '--max-train-tokens 15: less than one sample of 16 tokens'),
        (['--vocab-size', '256'], '--vocab-size 256: expected at least 257'),
        (['--tokenizer-documents', '0'], '--tokenizer-documents 0: expected at least 1'),
        (['--tokenizer', 'x', '--tokenizer-documents', '9'], '--tokenizer-documents is for a tokenizer trained here'),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(prepare_data, 'prepare', None)  # found before any work
    assert message in error_of(capsys, tmp_path / 'out', *arguments)


@pytest.mark.parametrize(
    ('rows', 'message'),
    [
        ([{'body': 'x', 'id': 1}], "dataset a: no column 'text' (--text-key); it has: body, id"),
        ([{'text': 3}], "dataset a: column 'text' holds int, not text"),
        ([], 'dataset a: '),
    ],
)
def test_wrong_rows(
    rows: list[dict], message: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(prepare_data, 'prepare', None)
    data = tmp_path / 'a.jsonl'
    data.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    assert message in error_of(capsys, tmp_path / 'out', f'--dataset=a=jsonl:{data}')


def test_broken_files(tmp_path: Path, capsys: pytest.CaptureFixture):
    data = write_jsonl(tmp_path / 'a.jsonl', make_texts(8))
    (tmp_path / 'latin.txt').write_bytes(b'caf\xe9')
    (tmp_path / 'b.jsonl').write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / 'c.parquet').write_text('no parquet')
    for spec in ('text:latin.txt', 'jsonl:b.jsonl', 'parquet:c.parquet'):
        kind, _, name = spec.partition(':')
        message = error_of(
            capsys, tmp_path / 'out', f'--dataset=a=jsonl:{data}', f'--dataset=b={kind}:{tmp_path / name}'
        )
        assert f'dataset b: cannot read {kind}:' in message


def test_unknown_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture):
    data = write_jsonl(tmp_path / 'a.jsonl', make_texts(8))
    message = error_of(capsys, tmp_path / 'out', f'--dataset=a=jsonl:{data}', '--tokenizer', 'nobody/no-such')
    assert '--tokenizer nobody/no-such: cannot load it' in message


def test_too_little_text(tmp_path: Path, capsys: pytest.CaptureFixture):
    data = write_jsonl(tmp_path / 'a.jsonl', ['one short document'])
    message = error_of(capsys, tmp_path / 'out', f'--dataset=a=jsonl:{data}')
    assert 'val has no sample of 16 tokens' in message or 'train has no sample of 16 tokens' in message
