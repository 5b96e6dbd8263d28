# SPDX-License-Identifier: Apache-2.0
"""Duplicates found on disk are those a set and a dict find in memory, whatever the parts and the memory allowed."""

import random
import tracemalloc
import unicodedata
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt_algorithms.preparation import duplicates
from cpt_algorithms.preparation.duplicates import (
    NearDuplicates,
    digests,
    first_occurrences,
    is_held_out,
    near_duplicates,
    shingles,
    signatures,
)

SETTINGS = NearDuplicates()
WORDS = [f'{a}{b}{c}' for a in 'bdfgklmn' for b in 'aeiou' for c in 'lnrst']
TINY = 224 * 6  # six keys at once


def document(seed, length=200):
    return random.Random(seed).choices(WORDS, k=length)


def changed(words, count, seed=0):
    """Other words in ``count`` places."""
    words = list(words)
    for place in random.Random(seed).sample(range(len(words)), count):
        words[place] = 'xx' + words[place]
    return words


def jaccard(one, other):
    a, b = ({tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (one, other))
    return len(a & b) / len(a | b)


def saved(folder, name, tables):
    folder.mkdir(exist_ok=True)
    files = [folder / f'{name}{number}.npy' for number in range(len(tables))]
    for file, table in zip(files, tables, strict=True):
        np.save(file, table)
    return files


def parts_of(table, cuts):
    return [table[start:stop] for start, stop in pairwise([0, *sorted(cuts), len(table)])]


@given(st.text(st.sampled_from(' \n\raΣσe\u0301\u200b漢'), max_size=40), st.integers(1, 5))
def test_windows_of_a_text_do_not_matter(text, size):
    expected = digests([text]).tolist(), list(shingles(text, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, '_WINDOW', size)
        assert (digests([text]).tolist(), list(shingles(text, 2))) == expected


def find_first(folder, parts, earlier=(), max_bytes=1 << 29):
    out = [folder / f'first{number}.npy' for number in range(len(parts))]
    first_occurrences(saved(folder, 'd', parts), out, saved(folder, 'e', earlier), max_bytes)
    return [np.load(path).tolist() for path in out]


def find_near(folder, parts, held_out=None, earlier=(), max_bytes=1 << 29):
    masks = held_out or [np.zeros(len(part), bool) for part in parts]
    out = [folder / f'near{number}.npy' for number in range(len(parts))]
    files = saved(folder, 's', parts), saved(folder, 'h', masks)
    near_duplicates(*files, out, saved(folder, 'e', earlier), max_bytes)
    return [np.load(path).tolist() for path in out]


def sign(*documents):
    return signatures([' '.join(words) for words in documents], SETTINGS)


def test_a_digest_is_blake2b_of_the_text_and_decides_the_split():
    import hashlib

    texts = ['', 'a', 'Grüße', *map(str, range(2000))]
    found = digests(texts)
    for text, row in zip(texts, found, strict=True):
        expected = hashlib.blake2b(text.encode(), digest_size=16).digest()
        assert b''.join(int(number).to_bytes(8, 'big') for number in row) == expected
    held_out = is_held_out(found, 0.1)
    assert held_out.tolist() == [int(row[0]) < 0.1 * 2**64 for row in found]
    assert 0.08 < held_out.mean() < 0.12
    edge = np.array([[2**63 - 1, 0], [2**63, 0]], np.uint64)
    assert is_held_out(edge, 0.5).tolist() == [True, False]
    assert is_held_out(edge - 2**63 + 2, 1e-19).tolist() == [True, False]  # 1 and 2 of 1.8 in 2**64
    assert digests([]).shape == (0, 2)


INVISIBLE = ['\ufeff', '\u200b', '\u200c', '\u200d', '\u2060', '\u00ad', '\u200e', '\ufe0f', '\u034f']


@given(words=st.lists(st.sampled_from(['a', 'é', 'Å', 'ñ', '한', '漢', ' ', '\n']), max_size=12), data=st.data())
@settings(max_examples=60, deadline=None)
def test_what_nobody_sees_makes_no_new_text(words, data):
    ways = {'\n': ['\n', '\r\n', '\r']}
    spelled = [
        data.draw(st.sampled_from(ways.get(word) or [word, unicodedata.normalize('NFD', word)])) for word in words
    ]
    marks = data.draw(st.lists(st.tuples(st.integers(0, len(words)), st.sampled_from(INVISIBLE)), max_size=3))
    for at, mark in sorted(marks, reverse=True):
        spelled.insert(at, mark)
    other = ''.join(spelled)
    one, two = digests([''.join(words), other])
    if not any(one == '\r' and two == '\n' for one, two in pairwise(spelled)):
        assert one.tolist() == two.tolist()
    assert digests([''.join(words) + 'x'])[0].tolist() != two.tolist()


def test_exact_repeats_within_and_across_parts_and_earlier_data(tmp_path):
    parts = [digests(texts) for texts in (['a', 'b', 'a'], [], ['c', 'b', 'c', 'd'])]
    assert find_first(tmp_path, parts) == [[True, True, False], [], [True, False, False, True]]
    earlier = [digests(['x', 'c']), digests(['x'])]
    assert find_first(tmp_path, parts, earlier) == [[True, True, False], [], [False, False, False, True]]
    assert sorted(path.name[0] for path in tmp_path.iterdir()) == sorted('ddd' + 'ee' + 'fff')  # nothing left behind


def test_digests_that_share_their_first_half_differ(tmp_path):
    table = np.array([[5, 1], [5, 2], [5, 1], [4, 1]], np.uint64)
    assert find_first(tmp_path, [table]) == [[True, True, False, True]]


@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=60),
    spread=st.booleans(),
    cuts=st.lists(st.integers(0, 60), max_size=6),
    num_earlier=st.integers(0, 2),
    max_bytes=st.sampled_from([1, TINY, 1 << 20]),
)
@settings(deadline=None, max_examples=60)
def test_first_occurrences_are_those_of_a_set(tmp_path_factory, rows, spread, cuts, num_earlier, max_bytes):
    scale = 2**62 if spread else 1  # or all in one range of values, more than fits
    table = np.array([(a * scale, b) for a, b in rows], np.uint64).reshape(-1, 2)
    parts = parts_of(table, [min(cut, len(table)) for cut in cuts])
    num_earlier = min(num_earlier, len(parts) - 1)
    seen, expected = set(), []
    for part in parts:
        mine = [tuple(row) for row in part.tolist()]
        expected.append([row not in seen and row not in mine[:index] for index, row in enumerate(mine)])
        seen.update(mine)
    folder = tmp_path_factory.mktemp('first')
    found = find_first(folder, parts[num_earlier:], parts[:num_earlier], max_bytes)
    assert found == expected[num_earlier:]


def brute_force(table, held_out, num_earlier):
    """Documents to drop, by a search of the graph of documents that share a value in a column."""
    n = len(table)
    rank = [(i >= num_earlier, i >= num_earlier and not held_out[i], i) for i in range(n)]
    group = list(range(n))
    for i in range(n):
        for j in range(i):
            if (table[i] == table[j]).any():
                old, new = group[i], group[j]
                group = [new if g == old else g for g in group]
    best = {g: min(rank[i] for i in range(n) if group[i] == g) for g in set(group)}
    return [rank[i] != best[group[i]] for i in range(num_earlier, n)]


@given(
    rows=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=24),
    held_out=st.lists(st.booleans(), min_size=24, max_size=24),
    cuts=st.lists(st.integers(0, 24), max_size=6),
    num_earlier=st.integers(0, 2),
    max_bytes=st.sampled_from([1, TINY, 1 << 20]),
)
@settings(deadline=None, max_examples=80)
def test_near_duplicates_are_those_of_a_search(tmp_path_factory, rows, held_out, cuts, num_earlier, max_bytes):
    values = np.random.default_rng(0).integers(0, 2**64, (2, 9), np.uint64)  # a band's hashes are uniform, and its own
    table = np.array([(values[0, a], values[1, b]) for a, b in rows], np.uint64).reshape(-1, 2)
    held_out = np.array(held_out[: len(table)], bool)
    cuts = [min(cut, len(table)) for cut in cuts]
    parts, masks = parts_of(table, cuts), parts_of(held_out, cuts)
    num_earlier = min(num_earlier, len(parts) - 1)
    found = find_near(
        tmp_path_factory.mktemp('near'), parts[num_earlier:], masks[num_earlier:], parts[:num_earlier], max_bytes
    )
    expected = brute_force(table.tolist() and table, held_out, sum(map(len, parts[:num_earlier])))
    assert [drop for part in found for drop in part] == expected
    assert [len(part) for part in found] == [len(part) for part in parts[num_earlier:]]


def test_a_few_words_changed_is_found_and_another_document_is_not(tmp_path):
    base = document(0, 400)
    near = changed(base, 2)
    other = [*base[:100], *document(1, 300)]  # the same beginning, such as a licence
    assert jaccard(base, near) > 0.94
    assert jaccard(base, other) < 0.2
    parts = [sign(base, other), sign(document(2), near)]
    assert find_near(tmp_path, parts) == [[False, False], [False, True]]
    # the one that comes first stays, whichever it is
    assert find_near(tmp_path, [sign(near), sign(other, base)]) == [[False], [False, True]]


def test_case_and_punctuation_are_not_looked_at_and_words_are(tmp_path):
    words = document(3)
    texts = [' '.join(words), ', '.join(words).upper() + '!', '\n\n'.join(words), ' '.join(reversed(words))]
    assert find_near(tmp_path, [signatures(texts, SETTINGS)]) == [[False, True, True, False]]


def test_short_documents_are_duplicates_only_of_the_same_words(tmp_path):
    texts = [
        'one two three',
        'One, two: three',
        'one two',
        'one two three four',
        '!!',
        '??',
        '!!',
        'one two three four 5',
    ]
    found = find_near(tmp_path, [signatures(texts, SETTINGS)])
    assert found == [[False, True, False, False, False, False, True, False]]


def test_a_training_document_yields_to_validation_and_both_to_earlier_data(tmp_path):
    base = document(4, 400)
    near = [changed(base, 1, seed) for seed in range(3)]
    parts = [sign(base, document(5)), sign(near[0], near[1], document(6))]
    masks = [np.array([False, False]), np.array([True, True, False])]
    assert find_near(tmp_path, parts, masks) == [[True, False], [False, True, False]]
    # a model has been trained on it: it measures nothing any more
    assert find_near(tmp_path, parts, masks, [sign(near[2])]) == [[True, False], [True, True, False]]
    assert find_near(tmp_path, parts, masks, [sign(document(7))]) == [[True, False], [False, True, False]]


def test_chains_are_one_group(tmp_path):
    chain = [document(8, 300)]
    for step in range(6):
        following = list(chain[-1])
        following[50 * step : 50 * step + 6] = document(100 + step, 6)
        chain.append(following)
    assert all(jaccard(a, b) > 0.93 for a, b in pairwise(chain))
    assert jaccard(chain[0], chain[-1]) < 0.7
    table = sign(*chain)
    assert all((a == b).any() for a, b in pairwise(table))
    assert not (table[0] == table[-1]).any()
    middle_last = table[[0, 6, 1, 5, 2, 4, 3]]
    for max_bytes in (1, TINY, 1 << 30):
        assert find_near(tmp_path, [middle_last[:4], middle_last[4:]], max_bytes=max_bytes) == [
            [False, *[True] * 3],
            [True] * 3,
        ]


def test_signatures_do_not_change():
    """Of data prepared before: if a library computes them differently, its version must be refused, not mixed."""
    found = signatures(
        ['to be or not to be that is the question', 'Grüße aus Köln'], NearDuplicates(num_perm=16, ngram=2)
    )
    assert found.tolist() == [[15581347607926947580, 2801960264704939531], [13388515224488139437, 16824445922573593730]]


def test_long_documents_are_hashed_in_pieces(monkeypatch):
    text = ' '.join(document(9, 3000))
    whole = signatures([text], SETTINGS)
    monkeypatch.setattr('cpt_algorithms.preparation.duplicates._SHINGLES', 7)
    assert (signatures([text], SETTINGS) == whole).all()


def test_found_as_often_as_the_formula_says():
    """Precision and recall, against true Jaccard similarities of documents with words changed."""
    bands, rows = SETTINGS.bands
    expected, found, similar = [], [], []
    for seed in range(120):
        base = document(seed, 250)
        others = [changed(base, count, seed) for count in (1, 3, 5, 7, 9, 12, 20)]
        table = sign(base, *others)
        for other, row in zip(others, table[1:], strict=True):
            similarity = jaccard(base, other)
            similar.append(similarity)
            expected.append(1 - (1 - similarity**rows) ** bands)
            found.append(bool((table[0] == row).any()))
    similar, expected, found = map(np.array, (similar, expected, found))
    for low, high in pairwise([0.3, 0.6, 0.7, 0.8, 0.9, 1]):
        inside = (low <= similar) & (similar < high)
        assert inside.sum() > 50
        deviation = 4 * np.sqrt((expected * (1 - expected))[inside].mean() / inside.sum())
        assert abs(found[inside].mean() - expected[inside].mean()) < deviation + 0.01, (low, high)
    assert found[similar > 0.95].mean() > 0.98
    assert found[similar < 0.6].mean() < 0.03


@pytest.mark.parametrize('value', [{'threshold': 80}, {'num_perm': 1}, {'ngram': 0}], ids=str)
def test_settings_out_of_range_are_named(value):
    with pytest.raises(ValueError, match=f'(?s){next(iter(value))}.*input_value={next(iter(value.values()))}'):
        NearDuplicates(**value)


def test_files_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(ValueError, match=r'd0.npy holds int64 of shape \(2, 2\); expected uint64'):
        find_first(tmp_path, [np.zeros((2, 2), np.int64)])
    with pytest.raises(ValueError, match=r's1.npy holds uint64 of shape \(2, 5\); expected .* \(documents, 9\)'):
        find_near(tmp_path, [sign(document(0)), np.zeros((2, 5), np.uint64)])
    with pytest.raises(ValueError, match=r'h0.npy holds bool of shape \(2,\); expected bool of shape \(1,\)'):
        find_near(tmp_path, [sign(document(0))], [np.zeros(2, bool)])


def test_memory_does_not_grow_with_the_documents(tmp_path):
    """Also where most are equal to one another, which no range of values can divide."""
    peaks = []
    for size in (40_000, 160_000):
        table = np.random.default_rng(0).integers(0, 2**64, (size, 2), np.uint64)
        table[size // 4 :] = table[0]
        folder = tmp_path / str(size)
        folder.mkdir()
        parts = saved(folder, 'd', np.array_split(table, 8))
        masks = saved(folder, 'h', [np.zeros(size // 8, bool)] * 8)
        out = [folder / f'{number}.npy' for number in range(8)]
        for find, files in ((first_occurrences, (parts, out)), (near_duplicates, (parts, masks, out))):
            tracemalloc.start()
            find(*files, max_bytes=1 << 20)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert sum(np.load(path).sum() for path in out) in (size // 4, size - size // 4)
    assert max(peaks) < 1.1 * (1 << 20), peaks


@pytest.mark.parametrize(
    'letters',
    [''.join(map(chr, range(first, last))) for first, last in ((0x4E00, 0x57B0), (0x3041, 0x3097), (0x0E01, 0x0E2F), (0x1780, 0x17B4), (0x1000, 0x102B))],
    ids=['Chinese', 'Japanese', 'Thai', 'Khmer', 'Burmese'],
)  # fmt: skip
def test_scripts_without_spaces_between_words(letters):
    """Pairs of 400 letters of which 3 differ share nearly all n-grams; others nothing."""
    generator = random.Random(5)
    texts = [generator.choices(letters, k=400) for _ in range(30)]
    others = [list(text) for text in texts]
    for other in others:
        for place in generator.sample(range(400), 3):
            other[place] = generator.choice(letters)
    settings = NearDuplicates(threshold=0.7)
    one, two = (signatures([''.join(text) for text in each], settings) for each in (texts, others))
    assert (one == two).any(axis=1).mean() > 0.95
    assert not (one == np.roll(two, 1, axis=0)).any()
    assert len(set(shingles(''.join(texts[0]), 5))) > 350


def test_letters_keep_their_marks():
    assert list(shingles('हिन्दी कि tiếng Việt', 1)) == ['हिन्दी', 'कि', 'tiếng', 'việt']
    assert list(shingles('A b, c  D e\nf', 5)) == ['a b c d e', 'b c d e f'] and list(shingles('a b', 5)) == ['a b']
    assert list(shingles('…', 5)) == ['…']
