# SPDX-License-Identifier: Apache-2.0
"""Two FSDP2 ranks on CPU under the composer launcher: sharded parent, killed and resumed stage, refused mistakes."""

import json
import os
import shutil

import pytest
import recorder
import tiny
from streaming import StreamingDataset
from transformers import AutoTokenizer

SHARDED = {'fsdp_config': {'state_dict_type': 'sharded'}}


def train(folder, cfg, expect=0):
    return tiny.launch(tiny.RECIPE, tiny.save(cfg, folder / f'{cfg["run_name"]}.yaml'), expect=expect)


def parent(folder, data):
    """A stage that ends with an FSDP2 sharded checkpoint at batch 4, of another learning rate and weight decay."""
    optimizer = {'name': 'decoupled_adamw', 'lr': 7e-3, 'betas': [0.9, 0.95], 'weight_decay': 0.2}
    d0 = {'dataset': {'new': {'local': str(data['old']), 'split': 'train'}}}
    return tiny.config(
        folder, data, 'parent', max_duration='4ba', save_interval='4ba', optimizer=optimizer, train_loader=d0,
        scheduler={'t_warmup': '1ba'}, **SHARDED,
    )  # fmt: skip


def stage(folder, data, run_name, **over):
    replay = {'fraction': 0.25, 'streams': {'old': {'local': str(data['old']), 'split': 'train'}}}
    cfg = tiny.config(
        folder, data, run_name, load_path=str(folder / 'parent' / 'ep0-ba4'),
        train_loader={'num_workers': 1, 'dataset': {'replay': replay}}, save_interval='3ba', **SHARDED,
    )  # fmt: skip
    return tiny.merge(cfg, over)


def judged(data):
    """Forgetting, during and after."""
    callbacks = {'forgetting': {'new': ['new'], 'old': ['old']}, 'final_loss': {'window': '4ba', 'interval': '2ba'}}
    return {'eval_loader': [tiny.eval_loader(label, data[label]) for label in ('old', 'new')], 'callbacks': callbacks}


def suite(folder):
    (folder / 'texts.jsonl').write_text('{"text": "!!\\"#$%&"}\n{"text": "$%&()"}\n')
    task = {
        'task': 'texts', 'dataset_path': 'json', 'dataset_kwargs': {'data_files': {'test': str(folder / 'texts.jsonl')}},
        'test_split': 'test', 'output_type': 'loglikelihood_rolling', 'doc_to_text': '', 'doc_to_target': 'text',
        'metric_list': [{'metric': 'bits_per_byte', 'aggregation': 'bits_per_byte', 'higher_is_better': False}],
    }  # fmt: skip
    tasks = {'texts': {'task': task, 'num_fewshot': 0, 'metric': 'bits_per_byte'}}
    return str(tiny.save({'name': 'texts', 'tasks': tasks}, folder / 'suite.yaml'))


@pytest.mark.slow  # test_sharded_averages.py kills two ranks by default
def test_a_killed_stage_resumes_identically_from_a_sharded_parent(data, tmp_path):
    train(tmp_path, parent(tmp_path, data))
    checkpoint = tmp_path / 'parent' / 'ep0-ba4'
    assert (checkpoint / '.metadata').exists()
    assert len(list(checkpoint.glob('*.distcp'))) == 2
    evaluated = {'variables': {'lm_eval': suite(tmp_path)}}
    train(tmp_path, stage(tmp_path, data, 'straight', **tiny.merge(judged(data), evaluated)))
    killed = tiny.merge(stage(tmp_path, data, 'killed', **judged(data)), {'callbacks': {'recorder': {'kill_at': 5}}})
    train(tmp_path, killed, expect=tiny.KILLED)
    assert (tmp_path / 'killed' / 'ep0-ba3' / '.metadata').exists()
    printed = train(tmp_path, tiny.merge(killed, {'callbacks': {'recorder': {'kill_at': None}}}))
    assert 'huggingface' in os.listdir(tmp_path / 'killed'), printed[-3000:]
    for rank in (0, 1):
        straight = recorder.read(tmp_path / 'straight.jsonl', rank)
        resumed = recorder.read(tmp_path / 'killed.jsonl', rank)  # refuses batches that were redone differently
        assert sorted(straight) == list(range(8))
        assert resumed == straight, 'losses (bit for bit), rows and learning rates'
    first = recorder.read(tmp_path / 'straight.jsonl')[0]
    assert first['lr'] == [1e-3 * 0.25]
    assert first['initial_lr'] == first['base_lrs'] == [1e-3]
    assert first['weight_decay'] == [1e-5]
    datasets = [
        row[0]
        for rank in (0, 1)
        for b in range(8)
        for row in recorder.read(tmp_path / 'straight.jsonl', rank)[b]['rows']
    ]
    assert datasets.count(1) == 16, 'a quarter of 64 rows is replay'
    per_rank = [
        sum(r[0] for b in range(8) for r in recorder.read(tmp_path / 'straight.jsonl', k)[b]['rows']) for k in (0, 1)
    ]
    assert min(per_rank) >= 6, f'replay is spread over the ranks: {per_rank}'
    ours, theirs = (
        {name: json.loads((tmp_path / run / f'{name}.json').read_text()) for name in ('losses', 'forgetting')}
        for run in ('killed', 'straight')
    )
    assert ours['losses'].pop('cost')['devices'] == theirs['losses'].pop('cost')['devices'] == 2
    assert ours == theirs
    tokenizer, expected = AutoTokenizer.from_pretrained(str(data['tokenizer'])), {}
    for label in ('old', 'new'):
        rows = StreamingDataset(local=str(data[label]), split='val', batch_size=1)
        tokens = [int(token) for row in rows for token in row['tokens'][1:]]
        text = [token for token in tokens if token != tokenizer.eos_token_id]  # which has no bytes
        expected[label] = sum(map(len, tokenizer.convert_ids_to_tokens(text))) / len(tokens)
    assert ours['forgetting']['bytes_per_token'] == pytest.approx(expected)
    results = json.loads((tmp_path / 'straight' / 'huggingface' / 'lm_eval' / 'texts' / 'ba8.json').read_text())
    assert results['tasks']['texts']['count'] == 2


@pytest.mark.slow  # test_done.py does it on one rank by default
def test_a_sharded_run_is_stopped_where_it_would_have_been(data, tmp_path):
    stopper = {'monitor': 'LanguageCrossEntropy', 'dataloader_label': 'eval/new', 'comp': 'greater', 'patience': '3ba'}
    cfg = tiny.config(
        tmp_path, data, 'run', eval_interval='1ba', eval_loader=tiny.eval_loader('new', data['new']),
        callbacks={'early_stopper': stopper}, **SHARDED,
    )  # fmt: skip
    train(tmp_path, tiny.merge(cfg, {'callbacks': {'recorder': {'kill_at': 4}}}), expect=tiny.KILLED)
    train(tmp_path, cfg)
    trained, run = (tmp_path / 'run.jsonl.rank0').read_text(), tmp_path / 'run'
    assert sorted(recorder.read(tmp_path / 'run.jsonl')) == list(range(5))
    (run / 'done.json').unlink()
    shutil.rmtree(run / 'huggingface')
    train(tmp_path, cfg)
    assert (tmp_path / 'run.jsonl.rank0').read_text() == trained, 'it is only exported'
    assert [path.name for path in (run / 'huggingface').iterdir()] == ['ba5']


@pytest.mark.long
def test_silent_failures_of_sharded_loads_cannot_happen(data, tmp_path):
    """Several runs in one launch; sharded_cases.py asserts on both ranks and prints a line for each case."""
    cfgs = {'parent': parent(tmp_path, data), 'case': stage(tmp_path, data, 'case')}
    paths = [tiny.save(cfg, tmp_path / f'{name}.yaml') for name, cfg in cfgs.items()]
    printed = tiny.launch(tiny.ROOT / 'tests' / 'stage' / 'sharded_cases.py', *paths)
    for case in ('kept optimizer', 'starred ignore', 'ignored optimizer', 'no autoresume', 'tensors in an algorithm'):
        assert f'{case}: ok' in printed, printed[-6000:]
