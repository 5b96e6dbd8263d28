# SPDX-License-Identifier: Apache-2.0
"""The local data of a suite's tasks: all that ``datasets`` reads of it counts, by content, however it is named."""

import os
from pathlib import Path

import datasets
import lm_eval as harness
import pytest
import yaml

from cpt_algorithms.evaluation import lm_eval, suite
from cpt_algorithms.evaluation.suite import SuiteTask, load_tasks, why_unavailable

ROW = '{"text": "a"}\n'
TASK = {'output_type': 'multiple_choice', 'doc_to_text': 'text', 'doc_to_choice': ['a', 'b'], 'doc_to_target': 0}
FILES = {'one.jsonl': 1, 'two.jsonl': 2, 'sub/three.jsonl': 3}
# how a config may name some of them, {} standing for the folder; and files that are none of it
NAMED = {
    'a file': ({'dataset_path': 'json', 'dataset_kwargs': {'data_files': '{}/one.jsonl'}}, ['two.jsonl']),
    'a list': ({'dataset_path': 'json', 'dataset_kwargs': {'data_files': ['{}/one.jsonl', '{}/two.jsonl']}}, ['new.jsonl']),
    'by split': ({'dataset_path': 'json', 'dataset_kwargs': {'data_files': {'test': ['{}/one.jsonl']}}}, ['two.jsonl']),
    'a glob': ({'dataset_path': 'json', 'dataset_kwargs': {'data_files': {'test': '{}/*.jsonl'}}}, ['new.txt']),
    'a deep glob': ({'dataset_path': 'json', 'dataset_kwargs': {'data_files': '{}/**/*.jsonl'}}, ['new.txt']),
    'a data folder': ({'dataset_path': 'json', 'dataset_kwargs': {'data_dir': '{}'}}, []),
    'in a data folder': ({'dataset_path': 'json', 'dataset_kwargs': {'data_dir': '{}', 'data_files': '*.jsonl'}}, []),
    'a folder': ({'dataset_path': '{}'}, []),
    'in a folder': ({'dataset_path': '{}', 'dataset_kwargs': {'data_files': {'test': 'o*.jsonl'}}}, []),
    'from home': ({'dataset_path': 'json', 'dataset_kwargs': {'data_files': '~/d[1]/one.jsonl'}}, ['two.jsonl']),
}  # fmt: skip


def put(value, folder: Path):
    """A config with the folder filled in."""
    if isinstance(value, dict):
        return {key: put(each, folder) for key, each in value.items()}
    return [put(each, folder) for each in value] if isinstance(value, list) else value.replace('{}', str(folder))


def hash_of(task: SuiteTask) -> str:
    return lm_eval._hash_rows(load_tasks(task))


@pytest.mark.parametrize('named', [named for named in NAMED if named != 'from home'])  # which is a shell's
def test_all_that_datasets_reads_counts_by_its_rows(named, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    folder = tmp_path / 'd'
    for name, count in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(ROW * count)
    config, others = NAMED[named]
    config = put(config, folder)
    files = config.get('dataset_kwargs', {}).get('data_files')
    split = 'test' if isinstance(files, dict) else 'train'
    task = SuiteTask(task={'task': 'x', 'test_split': split, **TASK, **config}, num_fewshot=0, metric='acc')
    builder = datasets.load_dataset_builder(config['dataset_path'], **config.get('dataset_kwargs', {}))
    read = {Path(file) for files in builder.config.data_files.values() for file in files}
    assert read and why_unavailable(task) is None
    known = hash_of(task)
    for file in read:
        before, times = file.read_text(), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
        os.utime(file)
        assert hash_of(task) == known, 'it was touched'
        file.write_text(before.replace('a', 'b'))
        os.utime(file, ns=times)
        assert hash_of(task) != known, f'{file} has changed, its size and time have not'
        file.write_text(before)
    for name in others:
        (folder / name).write_text(ROW)
        assert hash_of(task) == known, f'{name} is none of its data'


def test_a_task_of_the_catalogue_is_known_by_its_rows(tmp_path, monkeypatch):
    """Its dataset is read from the hub or its cache, and may be another one tomorrow under the same release."""
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    hub = {'of today': ['a', 'b'], 'of tomorrow': ['a', 'c']}
    config = {'task': 'known', 'dataset_path': 'some/name', 'test_split': 'test', **TASK}
    (tmp_path / 'known.yaml').write_text(yaml.safe_dump(config))
    manager = harness.tasks.TaskManager(include_defaults=False, include_path=tmp_path)
    monkeypatch.setattr(suite, 'task_manager', lambda with_known_tasks: manager)
    hashes = {}
    for name, texts in [*hub.items(), ('again', hub['of today'])]:
        rows = datasets.DatasetDict(test=datasets.Dataset.from_dict({'text': texts}))
        monkeypatch.setattr(datasets, 'load_dataset', lambda rows=rows, **_: rows)
        hashes[name] = hash_of(SuiteTask(task='known', num_fewshot=0, metric='acc'))
    assert hashes['of today'] == hashes['again'] != hashes['of tomorrow']


@pytest.mark.parametrize('named', NAMED)
def test_data_that_is_not_there_is_said(named, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    task = SuiteTask(task={'task': 'x', **put(NAMED[named][0], tmp_path / 'd')}, num_fewshot=0, metric='acc')
    assert 'does not exist' in (why_unavailable(task) or '')


def test_data_elsewhere_is_not_looked_for_here():
    for config in (
        {'dataset_path': 'hub/name'},
        {'dataset_path': 'json', 'dataset_kwargs': {'data_files': 'hf://x/*'}},
    ):
        task = SuiteTask(task={'task': 'x', **config}, num_fewshot=0, metric='acc')
        assert task.data_files == [] and why_unavailable(task) is None
    assert SuiteTask(task='piqa', num_fewshot=0, metric='acc').data_files == []
