# SPDX-License-Identifier: Apache-2.0
"""Files as they come from disks: any encoding, what is broken in them named by file and line, or left out and listed."""

import gzip
import json
import re
import tempfile
from pathlib import Path

import datasets
import prepare_data
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt_algorithms.preparation import sources
from cpt_algorithms.preparation.reading import PrepareError

ENCODINGS = ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be', 'utf-32', 'cp1252', 'gb18030', 'shift_jis']


def read_all(spec, size=10**6, encoding=None, skip_broken=False):
    """Every document of a source cut into parts, and what was left out."""
    (source,), broken = sources.parse_sources([f'x={spec}'], encoding, skip_broken), sources.Broken()
    cut = sources.parts_of(source, sources.find_files(source), 'text', size, Path())
    return [text for part in cut for text in sources.read(part, broken)], broken


@pytest.mark.parametrize('encoding', ENCODINGS)
@given(
    texts=st.lists(st.text(st.sampled_from('aé\u0100\u0a0a漢ソ\n\r"\\'), max_size=6), min_size=1, max_size=9),
    size=st.integers(1, 60),
    packed=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_any_encoding_in_parts_of_any_size(encoding, texts, size, packed):
    """Of letters some of whose bytes are a line end or a backslash in some encoding."""
    texts = [text.encode(encoding, 'ignore').decode(encoding) for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        lines = ''.join(json.dumps({'text': text}, ensure_ascii=False) + '\n' for text in texts)
        file = Path(folder, 'a.jsonl.gz' if packed else 'a.jsonl')
        file.write_bytes(gzip.compress(lines.encode(encoding)) if packed else lines.encode(encoding))
        assert read_all(f'jsonl:{file}', size, encoding)[0] == texts
        Path(folder, 'a.txt').write_bytes(texts[0].encode(encoding))
        assert read_all(f'text:{folder}/a.txt', size, encoding)[0] == [texts[0].removeprefix('\ufeff')]


BROKEN = {
    b'{"text": "caf\xe9"}': 'byte {at}, 0xe9, is not UTF-8: it looks like cp1252; give --encoding cp1252',
    b'{"text": "%b"}' % 'Привет, как дела'.encode('cp1251'): 'give the --encoding of its script, such as cp1251',
    b'{"text": "cut': 'no JSON from its column 10 on',
    b'[' * 15_000: 'its JSON is nested too deeply',
    b'{"id": 3}': "no column 'text' (--text-key); it has: id",
    b'{"text": 3}': "column 'text' holds int, not text",
    b'[1]': "a line holds list, not an object with 'text'",
}


@given(
    rows=st.lists(st.sampled_from([b'', b'{"text": "a"}', b'{"text": "\xc3\xa9"}', *BROKEN]), min_size=1, max_size=12),
    size=st.integers(1, 60),
)
@settings(max_examples=60, deadline=None)
def test_what_is_broken_is_named_by_its_line_or_left_out(rows, size):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, 'a.jsonl')
        file.write_bytes(b'\n'.join(rows))
        expected = [json.loads(row)['text'] for row in rows if row and row not in BROKEN]
        wrong = [number for number, row in enumerate(rows) if row in BROKEN]
        texts, broken = read_all(f'jsonl:{file}', size, skip_broken=True)
        assert texts == expected and broken.count == len(wrong)
        for number, found in zip(wrong, broken.first, strict=True):
            assert found.startswith(f'{file}, line {number + 1}: ')
            at = len(b'\n'.join(rows[: number + 1])) - len(rows[number]) + rows[number].find(b'\xe9')
            assert BROKEN[rows[number]].format(at=at) in found
        if wrong:
            with pytest.raises(PrepareError, match=re.escape(f'{file}, line {wrong[0] + 1}: ')):
                read_all(f'jsonl:{file}', size)


FILES = {
    'empty.parquet': (b'', 'it is empty'),
    'lfs.parquet': (b'version https://git-lfs.github.com/spec/v1\noid sha256:6e\n', 'it is a Git LFS pointer'),
    'lfs.jsonl': (b'version https://git-lfs.github.com/spec/v1\n', 'is a Git LFS pointer'),
    'saved.parquet': (b'ARROW1\0\0' * 9, 'it is an Arrow file, as save_to_disk writes; read its folder with hf:'),
    'cut.jsonl.gz': (gzip.compress(b'{"text": "b"}\n' * 999)[:-20], 'Compressed file ended'),
    'packed.jsonl': (gzip.compress(b'{"text": "b"}\n'), 'is a .gz file by its content; name it so'),
    'other.parquet': (None, "no column 'text' (--text-key); it has: id"),
    'latin.txt': (b'caf\xe9', 'byte 3, 0xe9, is not UTF-8: it looks like cp1252'),
    'wide.txt': ('café'.encode('utf-16'), 'it looks like UTF-16; give --encoding utf-16,'),
    'wide_le.txt': ('ĀĀ plain text é'.encode('utf-16-le'), 'it looks like UTF-16; give --encoding utf-16-le'),
}


@pytest.mark.parametrize('name', FILES)
def test_a_broken_file_among_others(name, tmp_path):
    content, reason = FILES[name]
    kind = {'txt': 'text', 'parquet': 'parquet'}.get(name.rpartition('.')[2], 'jsonl')
    good = tmp_path / f'a.{name.partition(".")[2]}'
    if kind == 'parquet':
        pq.write_table(pa.table({'text': ['a']}), good)
    else:
        good.write_bytes(
            {'text': b'a'}.get(kind, gzip.compress(b'{"text": "a"}') if name.endswith('gz') else b'{"text": "a"}')
        )
    if content is None:
        pq.write_table(pa.table({'id': [1]}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(PrepareError, match=re.escape(str(tmp_path / name)) + '.*' + re.escape(reason)):
        read_all(f'{kind}:{tmp_path}/*')
    texts, broken = read_all(f'{kind}:{tmp_path}/*', skip_broken=True)
    assert 'a' in texts and broken.count == 1 and name in broken.first[0] and reason in broken.first[0]


def test_a_zstd_window_that_is_too_large(tmp_path):
    """The head of a frame of zstd --long=31 from a pipe, whose size is not known."""
    file = tmp_path / 'a.jsonl.zst'
    file.write_bytes(bytes([0x28, 0xB5, 0x2F, 0xFD, 0x00, 21 << 3, 0x61, 0, 0]) + b'{"text": "a"}')
    with pytest.raises(PrepareError, match='zstd -dc --long=31 .*a.jsonl.zst'):
        read_all(f'jsonl:{file}')


def texts_of(count):
    return [f'document {number} ' + 'word ' * (number % 7 + 9) for number in range(count)]


def prepare(out, *arguments):
    prepare_data.main(['--out', str(out), '--max-seq-len=16', '--val-fraction=0.2', '--vocab-size=300', *arguments])
    return json.loads((out / 'manifest.json').read_text())


def test_what_is_left_out_is_counted_and_listed(tmp_path, capsys):
    texts = texts_of(80)
    rows = [json.dumps({'text': text if number % 2 else None, 'body': text}) for number, text in enumerate(texts)]
    file = tmp_path / 'a.jsonl'
    file.write_bytes('\n'.join([*rows, '{"text": "caf']).encode() + b'\xe9"}')
    manifest = prepare(tmp_path / 'out', f'--dataset=a=jsonl:{file}', '--skip-broken')
    printed = capsys.readouterr().out
    for record in (manifest['datasets']['a'], manifest['datasets']['a']['sources']['a']):
        assert [record[key] for key in ('rows', 'skipped', 'broken')] == [81, 40, 1]
        assert record['first_broken'][0].startswith(f'{file}, line 81: byte ')
    assert 'a: 40 of 81 rows have no text' in printed and 'a: 1 of 81 rows cannot be read' in printed
    assert f'  {file}, line 81: byte ' in printed
    file.write_text(re.sub('"text": "[^"]*"', '"text": null', '\n'.join(rows)))
    with pytest.raises(SystemExit):
        prepare(tmp_path / 'none', f'--dataset=a=jsonl:{file}')
    said = capsys.readouterr().err
    assert "dataset a: none of its 80 rows has text in the column 'text'; it has: text, body" in said
    for first in ('', '\n', 'no JSON\n'):
        file.write_text(f'{first}{{"text": null}}\n')
        with pytest.raises(SystemExit):
            prepare(tmp_path / 'none', f'--dataset=a=jsonl:{file}', '--skip-broken')
        assert 'none of its' in capsys.readouterr().err


@pytest.mark.parametrize('encoding', [None, 'utf-8', 'utf-16-le'])
def test_the_mark_of_an_encoding_is_no_text(encoding, tmp_path):
    file = tmp_path / 'a.jsonl'
    file.write_bytes('\ufeff{"text": "first"}\n{"text": "second"}\n'.encode(encoding or 'utf-8'))
    assert read_all(f'jsonl:{file}', encoding=encoding)[0] == ['first', 'second']


def test_a_file_where_the_data_would_go_is_refused(tmp_path, capsys):
    (tmp_path / 'a.txt').write_text(texts_of(1)[0])
    with pytest.raises(SystemExit):
        prepare(tmp_path / 'a.txt', f'--dataset=a=text:{tmp_path}/a.txt')
    assert 'a.txt exists and was not made by this script' in capsys.readouterr().err


def test_folders_of_save_to_disk_and_other_files_of_datasets(tmp_path):
    texts = texts_of(20)
    data = datasets.Dataset.from_dict({'text': texts})
    data.save_to_disk(str(tmp_path / 'one'))
    datasets.DatasetDict({'train': data, 'test': data.select(range(3))}).save_to_disk(str(tmp_path / 'two'))
    data.to_csv(tmp_path / 'a.csv')

    def read(target):
        (source,) = sources.parse_sources([f'x=hf:{target}'])
        cut = sources.parts_of(source, [], 'text', 300, Path(tempfile.mkdtemp(dir=tmp_path)))
        return [text for part in cut for text in sources.read(part)]

    assert read(tmp_path / 'one') == read(tmp_path / 'two') == texts
    assert read(f'{tmp_path}/two?split=test') == texts[:3]
    assert read(f'csv?data_files={tmp_path}/a.csv') == texts
    with pytest.raises(PrepareError, match="'tset'.*did you mean 'test'"):
        read(f'{tmp_path}/two?split=tset')


def test_rows_of_datasets_that_hold_no_text(tmp_path):
    data = datasets.Dataset.from_dict({'text': [['a'], None, ['b']]})
    data.save_to_disk(str(tmp_path / 'lists'))

    def read(skip_broken, broken=None):
        (source,) = sources.parse_sources([f'x=hf:{tmp_path}/lists'], skip_broken=skip_broken)
        cut = sources.parts_of(source, [], 'text', 1, tmp_path / 'spool')
        return [text for part in cut for text in sources.read(part, broken)]

    refused = f"^dataset x: cannot read hf:{tmp_path}/lists: row 1: column 'text' holds list, not text"
    with pytest.raises(PrepareError, match=refused):
        read(False)
    assert read(True, broken := sources.Broken()) == [''] and broken.count == 2
    assert broken.first[1] == "row 3: column 'text' holds list, not text"
    with pytest.raises(PrepareError, match=refused):  # from what was streamed before
        read(False)
