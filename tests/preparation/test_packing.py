# SPDX-License-Identifier: Apache-2.0
"""The functions of a preparation that need no file: packing, selection, chunks, items of tasks."""

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cpt_algorithms.preparation import lm_eval_items, sources
from cpt_algorithms.preparation.packing import Selector, cut, pieces


def cut_all(tokens, max_seq_len, at_once=1 << 20):
    blocks = cut([np.array(part, np.int32) for part in tokens], max_seq_len, at_once)
    return [row for block in blocks for row in block.tolist()]


def test_cut_by_hand():
    assert cut_all([[7, 1, 2], [3, 9], [], [4, 5, 9]], 3) == [[7, 1, 2], [3, 9, 4]]
    assert cut_all([], 4) == []
    assert [len(block) for block in cut([np.arange(1000, dtype=np.int32)], 4, at_once=100)] == [25] * 10  # and no more


@given(st.lists(st.lists(st.integers(1, 9), max_size=12), max_size=8), st.integers(2, 7), st.integers(1, 20))
def test_samples_do_not_depend_on_what_is_cut_at_once(parts, max_seq_len, at_once):
    samples, tokens = cut_all(parts, max_seq_len), sum(parts, [])
    assert cut_all(parts, max_seq_len, at_once) == samples
    assert sum(samples, []) == tokens[: len(tokens) // max_seq_len * max_seq_len]


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=12), st.integers(0, 4))
def test_pieces_are_the_tokens_of_the_documents(documents, trim):
    lengths = np.array([length for length, _ in documents], np.uint32)
    wanted = np.array([chosen and length > trim for length, chosen in documents], bool)
    texts = np.split(np.arange(lengths.sum(), dtype=np.int32), np.cumsum(lengths)[:-1]) if documents else []
    expected = sum((text.tolist() for text, chosen in zip(texts, wanted, strict=True) if chosen), [])
    found = [part.tolist() for part in pieces(np.arange(lengths.sum(), dtype=np.int32), lengths, wanted, trim)]
    assert sum(found, []) == (expected[:-trim] if trim else expected)
    assert len(found) <= np.count_nonzero(wanted)


def select(documents, **max_tokens):
    """Each letter is a document of 10 tokens: Val or Train, small where its text came before."""
    marks = list(documents)
    selector = Selector({'train': None, 'val': None} | max_tokens)
    everything = np.ones(len(marks), bool)
    first = np.array([mark.isupper() for mark in marks])
    held_out = np.array([mark.upper() == 'V' for mark in marks])
    selections = selector.select(
        held_out, np.full(len(marks), 10, np.uint32), first, ~everything, everything, ~everything
    )
    found = {}
    for split, chosen in selections.items():
        text = ''.join(mark if wanted else '.' for mark, wanted in zip(marks, chosen.documents, strict=True))
        found[split] = (text, chosen.trim, chosen.counts.duplicates, selector.ended)
    return found


def test_selection_by_hand():
    assert select('TVtTV') == {'train': ('T..T.', 0, 1, False), 'val': ('.V..V', 0, 0, False)}
    # the document that reaches the limit is cut; val without a limit ends with it; what follows is not even counted
    assert select('TVTVTtvV', train=15) == {'train': ('T.T.....', 5, 0, True), 'val': ('.V......', 0, 0, True)}
    assert select('TVTtVV', train=20, val=15) == {'train': ('T.T...', 0, 0, True), 'val': ('.V..V.', 5, 0, True)}
    assert select('TVTtVV', train=20, val=50) == {'train': ('T.T...', 0, 0, False), 'val': ('.V..VV', 0, 0, False)}
    assert select('TVTvVT', val=10) == {'train': ('T.T..T', 0, 0, False), 'val': ('.V....', 0, 0, False)}


def test_contaminated_documents_are_counted_apart_from_duplicates():
    first, near, tainted = (np.array(each, bool) for each in ([1, 1, 0, 1], [0, 0, 0, 1], [1, 0, 1, 1]))
    selection = Selector({'train': None, 'val': None}).select(
        np.zeros(4, bool), np.full(4, 10, np.uint32), first, near, np.ones(4, bool), tainted
    )['train']
    assert selection.documents.tolist() == [False, True, False, False]
    counts = selection.counts
    assert (counts.documents, counts.duplicates, counts.near_duplicates, counts.contaminated) == (1, 1, 1, 1)


@given(st.text('TVtv', max_size=20), st.integers(1, 99), st.none() | st.integers(1, 99), st.integers(0, 20))
def test_selection_does_not_depend_on_parts(documents, train, val, middle):
    marks = np.array(list(documents), 'U1')
    held_out, first = np.isin(marks, ['V', 'v']), np.isin(marks, ['T', 'V'])
    lengths, near = np.arange(len(marks), dtype=np.uint32), np.zeros(len(marks), bool)

    def selected(cuts):
        selector = Selector({'train': train, 'val': val})
        results = [
            selector.select(held_out[cut], lengths[cut], first[cut], near[cut], ~near[cut], near[cut]) for cut in cuts
        ]
        return [
            [
                np.concatenate([result[split].documents for result in results]).tolist(),
                sum(result[split].trim for result in results),
                sum(result[split].counts.duplicates for result in results),
            ]
            for split in ('train', 'val')
        ] + [selector.ended]

    assert selected([slice(0, middle), slice(middle, None)]) == selected([slice(None)])


@given(st.lists(st.text(max_size=9)), st.integers(1, 20))
def test_chunks_keep_every_text_in_order(texts, size):
    chunks = list(sources.in_chunks(texts, size))
    assert [text for chunk in chunks for text in chunk] == texts
    assert all(sum(map(len, chunk[:-1])) < size for chunk in chunks)


def test_hash_order_depends_on_names_below_the_folder_only():
    names = [f'package/{number}.py' for number in range(50)]
    ordered = sources.hash_order('', names)
    assert ordered == sources.hash_order('.', reversed(names)) != names
    assert [f'/a/{name}' for name in ordered] == sources.hash_order('/a', [f'/a/{name}' for name in names])


def test_the_order_of_texts_is_the_same_wherever_they_lie(tmp_path):
    found = []
    for folder in (tmp_path / 'here', tmp_path / 'moved' / 'there'):
        (folder / 'sub').mkdir(parents=True)
        for number in range(40):
            (folder / ('sub' if number % 3 else '.') / f'{number}.txt').write_text('a')
        (source,) = sources.parse_sources([f'x=text:{folder}/**/*.txt'])
        found.append([Path(file).relative_to(folder) for file in sources.find_files(source)])
    assert found[0] == found[1] != sorted(found[0]) and len(found[0]) == 40


def test_hf_arguments():
    assert sources.hf_arguments('allenai/c4?name=en&split=validation') == {
        'path': 'allenai/c4',
        'name': 'en',
        'split': 'validation',
    }
    assert sources.hf_arguments('org/data') == {'path': 'org/data', 'split': 'train'}


@given(st.text(alphabet='ab \n', max_size=60), st.integers(2, 9))
def test_passages_are_the_text_in_pieces(text, length):
    pieces = lm_eval_items.passages(text, length)
    assert ''.join(pieces) == text and all(0 < len(piece) <= length for piece in pieces)


def test_passages_by_hand():
    # after a newline in the second half, else a space there, else anywhere
    assert lm_eval_items.passages('abc\nd e fghijklmn', 6) == ['abc\n', 'd e ', 'fghijk', 'lmn']


def test_continuations_by_hand():
    # of 16 characters 12 can be context, which is cut after the last space in their second half, and 4 follow
    documents = [f'{letter * 7} {letter * 4} xyz' for letter in 'abcde']
    items = lm_eval_items.continuations(documents, 16, 9)
    assert sorted(item['context'] for item in items) == [f'{letter * 7} ' for letter in 'abcde']
    for item in items:
        right = item['context'][0] * 4
        assert item['choices'][item['answer']] == right and len(set(item['choices'])) == 4
        assert set(item['choices']) <= {letter * 4 for letter in 'abcde'}
    assert lm_eval_items.continuations(documents, 16, 2) == items[:2]
    assert lm_eval_items.continuations(documents[:3], 16, 9) == [], 'there are not three others'
