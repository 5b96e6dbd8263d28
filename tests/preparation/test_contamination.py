# SPDX-License-Identifier: Apache-2.0
"""Items of benchmarks planted in documents: each is found, nothing else is, and what that does to data and report."""

import json
import random
import re

import numpy as np
import prepare_data
import pytest
import tiny
import yaml

from cpt_algorithms.files import write_json
from cpt_algorithms.preparation.contamination import BenchmarkItems, ngram_hashes, read_items, texts_of
from cpt_algorithms.preparation.manifest import prepared_in
from cpt_algorithms.preparation.reading import PrepareError
from cpt_algorithms.report.page import write_report

WORDS = [f'w{number}' for number in range(3000)]


def sentence(draws, count):
    return ' '.join(draws.choices(WORDS, k=count))


def test_hashes_of_ngrams_by_hand():
    factor, words = 0x9E3779B97F4A7C15, [3, 5, 7]
    expected = [(3 + 5 * factor) % 2**64, (5 + 7 * factor) % 2**64]
    assert ngram_hashes(np.array(words, np.uint64), 2).tolist() == expected
    assert ngram_hashes(np.array(words, np.uint64), 3).tolist() == [(3 + 5 * factor + 7 * factor**2) % 2**64]
    assert not len(ngram_hashes(np.array(words, np.uint64), 4))


def test_planted_items_are_found_and_nothing_else():
    draws = random.Random(1)
    tasks = {name: [[sentence(draws, 30)] for _ in range(200)] for name in ('one', 'two')}
    items = BenchmarkItems.of(tasks)
    documents, planted = [], set()
    for number in range(2000):
        text = sentence(draws, draws.randint(0, 300))
        if number % 4 == 0:  # 13 words of an item, spelled otherwise, anywhere in a document
            task, item = draws.randrange(2), draws.randrange(200)
            words = list(tasks[('one', 'two')[task]][item][0].split())
            begin = draws.randrange(30 - 12)
            part = ', '.join(words[begin : begin + 13]).upper()
            text = f'{text} {part}. {sentence(draws, 20)}'
            planted.add((number, task, item))
        elif number % 4 == 1:  # 12 words are too few
            words = tasks['one'][draws.randrange(200)][0].split()
            text = f'{text} {" ".join(words[:12])} {sentence(draws, 20)}'
        documents.append(text)
    found = items.find(documents)
    assert {*map(tuple, found.tolist())} == planted
    hits = items.hits(found)
    assert sum(each.documents for each in hits.values()) == 500
    assert hits['two'].items == len({item for _, task, item in planted if task == 1}) and hits['two'].of == 200


def test_short_items_are_found_as_a_whole_and_templates_not_at_all(tmp_path):
    draws = random.Random(2)
    template = sentence(draws, 20)
    tasks = {
        'short': [[sentence(draws, 9)], [sentence(draws, 4)], [sentence(draws, 4), sentence(draws, 10)]],
        'asked': [[f'{template} {sentence(draws, 15)}'] for _ in range(12)],
    }
    items = BenchmarkItems.of(tasks)
    assert items.short == (1, 0) and items.counts == (3, 12) and items.sizes == (9, 10, 13)
    # nothing is an item's own of a task that asks one thing; a passage that few of many items share is theirs
    assert BenchmarkItems.of({'same': [[template]] * 12}).short == (12,)
    many = {'read': [*([[template]] * 12), *([sentence(draws, 20)] for _ in range(200))]}
    assert len(BenchmarkItems.of(many).find([template])) == 12
    around = sentence(draws, 30)
    texts = [
        f'{around} {tasks["short"][0][0]} {around}',
        f'{around} {tasks["short"][1][0]} {around}',
        f'{around} {tasks["short"][2][1]} {around}',
        f'{around} {template} {around}',
        tasks['asked'][5][0],
    ]
    expected = [[0, 0, 0], [2, 0, 2], [4, 1, 5]]
    assert items.find(texts).tolist() == expected
    items.save(tmp_path / 'items.npz')
    again = BenchmarkItems.load(str(tmp_path / 'items.npz'))
    assert again.digest == items.digest and again.find(texts).tolist() == expected and again.short == (1, 0)
    assert BenchmarkItems.of(tasks, 12).digest != items.digest
    assert not len(items.find(['', 'one word']))


def test_what_all_questions_share_is_no_part_of_them():
    asked = [(f'Question: {words}\nAnswer:', ['yes it is', 'no'], '') for words in ('is a b', 'is c')]
    assert texts_of(asked) == [['a b yes it is ', 'a b no '], ['c yes it is ', 'c no ']]
    assert texts_of([('Q: one item alone', ['a'], 'b')]) == [['q one item alone a b']]
    draws = random.Random(5)
    questions, answers = ([sentence(draws, count) for _ in range(30)] for count in (10, 4))
    items = BenchmarkItems.of(
        {'arc': texts_of([(f'Question: {q}\nAnswer:', [a], '') for q, a in zip(questions, answers, strict=True)])}
    )
    found = items.find([f'{q}? {a}.' for q, a in zip(questions, answers, strict=True)])
    assert found.tolist() == [[n, 0, n] for n in range(30)], 'without the form, as a web page has it'


@pytest.fixture(scope='module')
def suite(tmp_path_factory):
    """A suite of a multiple choice and of an exact match, on local files, and what its items are."""
    folder, draws = tmp_path_factory.mktemp('suite'), random.Random(3)
    rows = [
        {'question': sentence(draws, 12), 'choices': [sentence(draws, 6) for _ in range(4)], 'answer': 1}
        for _ in range(20)
    ]
    (folder / 'rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    shared = {'dataset_path': 'json', 'dataset_kwargs': {'data_files': {'test': str(folder / 'rows.jsonl')}},
              'test_split': 'test', 'doc_to_text': 'question', 'metadata': {'version': 1}}  # fmt: skip
    tasks = {
        'choice': {'task': {**shared, 'task': 'choice', 'output_type': 'multiple_choice', 'doc_to_choice': 'choices',
                            'doc_to_target': 'answer'}, 'num_fewshot': 0, 'metric': 'acc'},
        'exact': {'task': {**shared, 'task': 'exact', 'output_type': 'generate_until',
                           'doc_to_target': '{{choices[answer]}}'}, 'num_fewshot': 0, 'metric': 'exact_match'},
    }  # fmt: skip
    (folder / 'suite.yaml').write_text(yaml.safe_dump({'name': 'small', 'tasks': tasks}))
    return folder / 'suite.yaml', rows


def test_items_are_read_as_they_are_asked(suite):
    path, rows = suite
    items = read_items([str(path)])
    assert items.tasks == ('choice', 'exact') and items.counts == (20, 20)
    texts = [f'{row["question"]} {row["choices"][0]}' for row in rows]
    of_choice = [item for _, task, item in items.find(texts).tolist() if task == 0]
    assert of_choice == list(range(20)), 'an item with a wrong answer is the item, too'
    right = items.find([f'{row["question"]} {row["choices"][1]}' for row in rows]).tolist()
    assert [item for _, task, item in right if task == 1] == list(range(20))


@pytest.fixture
def prepared(suite, tmp_path):
    """Documents of which ten hold an item each; prepare with options."""
    path, rows = suite
    draws = random.Random(4)
    texts = [sentence(draws, 60) for _ in range(150)]
    for number in range(10):
        texts[7 * number] += f' {rows[number]["question"]} {rows[number]["choices"][1]}'
    (tmp_path / 'a.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))

    def prepare(name, *options):
        common = ['--max-seq-len=16', '--val-fraction=0.2', '--vocab-size=300', f'--dataset=a=jsonl:{tmp_path}/a.jsonl']
        given = [f'--decontaminate={path}'] if '--plain' not in options else []
        prepare_data.main(['--out', str(tmp_path / name), *common, *given, *(o for o in options if o != '--plain')])
        return tmp_path / name, json.loads((tmp_path / name / 'manifest.json').read_text())

    return prepare


def test_documents_are_dropped_or_listed(prepared, capsys, tmp_path):
    plain, all_of_them = prepared('plain', '--plain')
    dropped, manifest = prepared('dropped')
    assert 'a, choice: 10 of 20 items found, documents dropped: 10' in capsys.readouterr().out
    counts = [each['datasets']['a']['splits'] for each in (all_of_them, manifest)]
    documents = [sum(split['documents'] for split in splits.values()) for splits in counts]
    assert documents == [150, 140] and sum(split['contaminated'] for split in counts[1].values()) == 10
    expected = {'documents': 10, 'items': 10, 'of': 20, 'short': 0}
    assert manifest['datasets']['a']['contamination'] == {'choice': expected, 'exact': expected}
    lines = [json.loads(line) for line in (dropped / 'a' / 'contaminated.jsonl').read_text().splitlines()]
    assert [line['items'] for line in lines] == [{'choice': [n], 'exact': [n]} for n in range(10)]
    assert all(re.fullmatch('[0-9a-f]{32}', line['document']) for line in lines)
    assert prepared_in([str(dropped / 'a')], 'train').contamination == {}, 'they are gone'

    _, manifest = prepared('limited', '--max-train-tokens=4000', '--max-val-tokens=1000')
    counts = manifest['datasets']['a']['splits']
    assert 0 < sum(split['contaminated'] for split in counts.values()) < 10, 'what comes behind is not wanted'
    assert manifest['datasets']['a']['contamination']['choice']['documents'] == sum(
        split['contaminated'] for split in counts.values()
    )

    capsys.readouterr()
    kept, manifest = prepared('kept', '--keep-contaminated')
    in_val = sum(
        json.loads(line)['split'] == 'val' for line in (kept / 'a' / 'contaminated.jsonl').read_text().splitlines()
    )
    assert 0 < in_val < 10 and f'documents for training that are kept: {10 - in_val}' in capsys.readouterr().out
    assert sum(split['documents'] for split in manifest['datasets']['a']['splits'].values()) == 150
    for place, split in ((kept / 'a', 'train'), (kept / 'a' / 'train', '')):
        of_choice = prepared_in([str(place)], split).contamination['choice']
        assert (of_choice.documents, of_choice.items, of_choice.of) == (10 - in_val, 10 - in_val, 20)
    assert prepared_in(['s3://bucket/a', None, str(tmp_path)], 'train') is None
    for split in ('train', 'val'):
        shards = {file.name for file in (kept / 'a' / split).rglob('*.mds')}
        assert shards and all(
            (kept / 'a' / split / path.relative_to(plain / 'a' / split)).read_bytes() == path.read_bytes()
            for path in (plain / 'a' / split).rglob('*.mds')
        )


def test_the_report_marks_tasks_whose_items_were_trained_on(prepared, tmp_path, data):
    kept, manifest = prepared('kept', '--keep-contaminated')
    hits = manifest['datasets']['a']['contamination']['choice']
    config = tiny.config(tmp_path, data, 'run')
    config['train_loader']['dataset']['new'] = {'a': {'local': str(kept / 'a'), 'split': 'train'}}
    run, rows = tmp_path / 'run', [[0, 0, 3.0], [8, 1024, 2.0]]
    write_json(run / 'stage.json', {'run_name': 'run', 'config': config})
    write_json(
        run / 'losses.json',
        {
            'losses': {'a': rows},
            'final': {'a': {'mean': 2.0}},
            'cost': {'parameters': 1, 'device': 'cpu', 'devices': 1, 'device_seconds': 1.0, 'tokens': 1024, 'batch': 8},
        },
    )
    write_json(run / 'done.json', {'batch': 8, 'time': {}, 'max_duration': config['max_duration']})
    task = {'num_fewshot': 0, 'metric': 'acc', 'higher_is_better': True, 'score': 0.5, 'stderr': 0.1, 'count': 2,
            'values': [0, 1], 'weights': [1, 1], 'entry': {}, 'items': 'x', 'choices': [4, 4]}  # fmt: skip
    tasks = {'a choice': {**task, 'task': 'choice'}, 'another': {**task, 'task': 'other'}}
    result = {'suite': 'small', 'model': 'x', 'tasks': tasks, 'missing': {}, 'settings': {}}
    write_json(run / 'huggingface' / 'lm_eval' / 'small' / 'ba8.json', result)
    report = write_report([run], tmp_path / 'out')
    said = [line for line in report.missing if 'training data' in line]
    assert said == [
        f'lm-eval small: all runs: a choice: at least {hits["items"]} of its 20 items are in the training data'
    ]
    page = report.path.read_text()
    assert page.count('items in training data') and 'another' in page


def test_other_items_are_another_request(prepared, suite, capsys):
    prepared('out')
    path, rows = suite
    file = path.parent / 'rows.jsonl'
    before = file.read_text()
    file.write_text(before + json.dumps({**rows[0], 'question': sentence(random.Random(9), 30)}) + '\n')
    try:
        with pytest.raises(SystemExit):
            prepared('out')
        assert 'items_hash was' in capsys.readouterr().err
    finally:
        file.write_text(before)


def test_what_cannot_be_looked_for_is_an_error(suite, tmp_path, capsys):
    with pytest.raises(PrepareError, match='--decontaminate nowhere.yaml: '):
        read_items(['nowhere.yaml'])
    given = yaml.safe_load(suite[0].read_text())
    given['tasks']['choice']['task']['dataset_kwargs']['data_files']['test'] = str(tmp_path / 'gone.jsonl')
    (tmp_path / 'gone.yaml').write_text(yaml.safe_dump(given))
    with pytest.raises(PrepareError, match='--decontaminate .*gone.yaml: FileNotFoundError'):
        read_items([str(tmp_path / 'gone.yaml')])
    for option in ('--keep-contaminated', '--contamination-ngram=8'):
        with pytest.raises(SystemExit):
            prepare_data.main(['--out', str(tmp_path / 'no'), option])
        assert f'{option.partition("=")[0]} is of --decontaminate' in capsys.readouterr().err


def test_two_suites_may_ask_one_task_and_not_two_of_one_name(suite, tmp_path):
    path, _ = suite
    assert read_items([str(path), str(path)]).digest == read_items([str(path)]).digest
    given = yaml.safe_load(path.read_text())
    given['tasks']['choice']['task']['doc_to_text'] = 'asked: {{question}}'
    (tmp_path / 'other.yaml').write_text(yaml.safe_dump(given))
    with pytest.raises(PrepareError, match="another task 'choice' comes before it"):
        read_items([str(path), str(tmp_path / 'other.yaml')])


def test_a_manifest_that_says_nothing_of_it(tmp_path):
    write_json(tmp_path / 'manifest.json', {'request': {'format': 0}})
    assert prepared_in([str(tmp_path / 'a')], 'train') is None
