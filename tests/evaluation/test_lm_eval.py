# SPDX-License-Identifier: Apache-2.0
"""``scripts/evaluate.py``: suites, real exports, real lm-eval."""

import json
import os
import random
import re
import shutil
from math import log
from pathlib import Path

import evaluate as script
import lm_eval as harness
import pytest
import tiny
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cpt_algorithms.checkpoints import exports
from cpt_algorithms.evaluation import lm_eval, suite
from cpt_algorithms.evaluation.functional import score, within_noise
from cpt_algorithms.evaluation.lm_eval import compare, load_model
from cpt_algorithms.evaluation.suite import Suite, SuiteTask, check_suite, load_suite, load_tasks, task_manager
from cpt_algorithms.validation import ConfigError, parse_section

ITEMS = 24
PIQA = {'task': 'piqa', 'num_fewshot': 0, 'metric': 'acc'}


# Suites


@given(st.lists(st.sampled_from([0, 1]), min_size=2, max_size=50))
def test_score_is_lm_evals_mean_and_standard_error(values):
    from lm_eval.api.metrics import mean, mean_stderr

    ours = score(values, [1] * len(values))
    assert ours.value == pytest.approx(mean(values)) and ours.stderr == pytest.approx(mean_stderr(values), abs=1e-12)


@pytest.mark.parametrize(
    ('suite', 'problem'),
    [
        ({}, r'tasks is missing'),
        ({'tasks': {'A': PIQA}, 'taks': {}}, r"taks .* 'tasks'\?"),
        ({'tasks': {'A': {**PIQA, 'num_fewshots': 0}}}, r"tasks\.A\.num_fewshots .* 'num_fewshot'\?"),
        ({'tasks': {'A': {**PIQA, 'metric': None}}}, r'tasks\.A\.metric is missing'),
        ({'tasks': {'A': {**PIQA, 'num_fewshot': -1}}}, r'tasks\.A\.num_fewshot=-1 .* at least 0'),
        ({'tasks': {'A': {**PIQA, 'num_fewshot': True}}}, r'tasks\.A\.num_fewshot=True'),
        ({'tasks': {'A': {**PIQA, 'task': {'dataset_path': 'json'}}}}, r"tasks\.A\.task=\{'dataset_path'"),
        ({'tasks': {'A': 'piqa'}}, r"tasks\.A='piqa' .* a mapping"),
        ({'name': 'a/b', 'tasks': {'A': PIQA}}, r"name='a/b'"),
        ({'tasks': {'A': PIQA}, 'missing': {'A': 'why'}}, r'missing\.A'),
    ],
)
def test_what_is_no_suite(suite, problem):
    with pytest.raises(ConfigError) as refused:
        parse_section(Suite, {'name': 'x', **suite})
    [line] = refused.value.problems
    assert re.match(problem, line)


@pytest.mark.long
@pytest.mark.parametrize('path', sorted((tiny.ROOT / 'yamls' / 'eval').glob('*.yaml')), ids=lambda path: path.stem)
def test_every_suite_can_be_run(path, tmp_path):
    suite = load_suite([path, f'variables.root={tmp_path}'] if path.stem == 'offline' else path)
    assert suite.name == path.stem
    (tmp_path / 'lm_eval').mkdir()
    for entry in suite.tasks.values():
        for file in entry.data_files:
            Path(file).touch()
    assert check_suite(suite) == []


def test_unknown_task_and_missing_data(tmp_path):
    more = 'tasks.Hella={task: hellaswga, num_fewshot: 0, metric: acc}'
    suite = load_suite([tiny.ROOT / 'yamls/eval/offline.yaml', f'variables.root={tmp_path}', more])
    problems = check_suite(suite)
    assert [problem.partition(': ')[0] for problem in problems] == [f'tasks.{name}' for name in suite.tasks]
    assert f'{tmp_path}/lm_eval/python_passages.jsonl' in problems[0]
    assert "'hellaswga'" in problems[4] and "'hellaswag'" in problems[4]


# Real models


def sentences(seed: int, length: int) -> list[str]:
    generator = random.Random(seed)
    return [' '.join(generator.choices('abcdefghijklmnopqrst', k=length)) for _ in range(ITEMS)]


@pytest.fixture(scope='module')
def tasks(tmp_path_factory):
    """A suite of bits per byte, multiple choice and exact match, on documents of unequal lengths."""
    folder = tmp_path_factory.mktemp('tasks')
    rows = {
        # the longest is read in two windows
        'bits': [{'text': text} for text in [*sentences(0, 6), *sentences(1, 12)]],
        'choice': [
            {'context': context, 'choices': [f' {end}' for end in sentences(at, 3)[:4]], 'answer': at % 4}
            for at, context in enumerate(sentences(2, 4))
        ],
        'exact': [{'question': text, 'answer': 'a a'} for text in sentences(3, 4)],
    }

    def metrics(*names, aggregation='mean', higher_is_better=True):
        of_all = {'aggregation': aggregation, 'higher_is_better': higher_is_better}
        return {'metric_list': [{'metric': name, **of_all} for name in names]}

    configs = {
        'bits': {
            'output_type': 'loglikelihood_rolling', 'doc_to_text': '', 'doc_to_target': 'text',
            **metrics('bits_per_byte', aggregation='bits_per_byte', higher_is_better=False),
        },
        'choice': {
            'output_type': 'multiple_choice', 'doc_to_text': 'context', 'doc_to_choice': 'choices',
            'doc_to_target': 'answer', 'target_delimiter': '', **metrics('acc', 'acc_norm'),
        },
        'exact': {
            'output_type': 'generate_until', 'doc_to_text': 'question', 'doc_to_target': 'answer',
            'generation_kwargs': {'until': ['\n'], 'max_gen_toks': 3}, **metrics('exact_match'),
        },
    }  # fmt: skip
    made = {}
    for name, config in configs.items():
        file = folder / f'{name}.jsonl'
        file.write_text(''.join(json.dumps(item) + '\n' for item in rows[name]))
        source = {'task': name, 'dataset_path': 'json', 'dataset_kwargs': {'data_files': {'test': str(file)}}}
        task = {**source, 'test_split': 'test', 'metadata': {'version': 3}, **config}
        made[name] = {'task': task, 'num_fewshot': 0, 'metric': config['metric_list'][0]['metric']}
    return made


@pytest.fixture(scope='module')
def suite_file(tmp_path_factory, tasks):
    path = tmp_path_factory.mktemp('suite') / 'small.yaml'
    path.write_text(yaml.safe_dump({'name': 'small', 'tasks': tasks, 'missing': {'Later': 'does not exist yet'}}))
    return path


@pytest.fixture(scope='module')
def trained(tmp_path_factory, data):
    """Runs ``base`` and, from it, ``child`` with an average; and the logits of the child in training."""
    folder = tmp_path_factory.mktemp('runs')
    load_path = str(folder / 'base' / 'latest-rank0.pt')
    started = {'load_path': load_path, 'load_weights_only': True}
    with_average = {'stage_start': {'optimizer_state': 'reset'}, 'lawa': {'k': 2, 'interval': '1ba'}}
    for name, over, callbacks in (('base', {}, {}), ('child', started, with_average)):
        export = {'save_folder': str(folder / name), 'save_interval': '4ba', 'precision': 'float32'}
        tiny.run(tiny.config(
            folder, data, name, callbacks={'hf_checkpointer': export, **callbacks},
            max_duration='4ba', save_interval='4ba', optimizer={'lr': 0.01}, **over,
        ))  # fmt: skip
        (folder / name / 'stage.json').write_text(json.dumps({'run_name': name, 'parent': over.get('load_path')}))
    return folder, torch.load(folder / 'child' / 'latest-rank0.pt', weights_only=False)['state']['model']


@pytest.fixture(scope='module')
def lm(trained):
    return load_model(trained[0] / 'child' / 'huggingface' / 'ba4', 'cpu', 4)


@pytest.fixture
def runs(trained, tmp_path):
    """A copy without results."""
    shutil.copytree(trained[0], tmp_path / 'runs', symlinks=True)
    for name in ('base', 'child'):
        stage = tmp_path / 'runs' / name / 'stage.json'
        stage.write_text(stage.read_text().replace(str(trained[0]), str(tmp_path / 'runs')))
    return tmp_path / 'runs'


@pytest.fixture
def model(runs):
    return runs / 'base' / 'huggingface' / 'ba4'


@pytest.fixture
def ran(monkeypatch):
    """The inline tasks that lm-eval ran, in order."""
    names: list[str] = []
    original = harness.evaluate

    def evaluate(*args, **kwargs):
        names.extend(kwargs['task_dict']['tasks'])
        return original(*args, **kwargs)

    monkeypatch.setattr(harness, 'evaluate', evaluate)
    return names


@pytest.fixture
def main(suite_file, capsys):
    """Runs the script with the small suite: exit status, what it printed, and its errors."""

    def run(*arguments, suite=suite_file):
        status = 0
        try:
            script.main([*map(str, arguments), '--suite', str(suite), '--device', 'cpu'])
        except SystemExit as error:
            status = int(error.code or 0)
        return status, *capsys.readouterr()

    return run


def run_task(lm, entry, limit=None):
    return lm_eval._run(lm, entry, load_tasks(entry), limit)


def read(run, export='ba4', suite='small'):
    return json.loads((run / 'huggingface' / 'lm_eval' / suite / f'{export}.json').read_text())


def test_the_model_that_is_evaluated_is_the_one_that_was_trained(trained, lm, tasks):
    folder, state = trained
    assert type(lm.model).__module__.startswith('llmfoundry')
    ours = {f'model.{name}': value for name, value in lm.model.state_dict().items()}
    assert ours.keys() == state.keys() and all(torch.equal(ours[name], state[name]) for name in state)
    assert lm.max_length == tiny.SEQ_LEN and not lm.model.training

    # bits per byte from the logits, of the documents that fit into one window after EOS
    result = run_task(lm, SuiteTask(**tasks['bits']), ITEMS)
    tokenizer = AutoTokenizer.from_pretrained(folder / 'child' / 'huggingface' / 'ba4')
    for text, bits, num_bytes in zip(sentences(0, 6), result['values'], result['weights'], strict=True):
        tokens = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)['input_ids']]])
        with torch.no_grad():
            log_probabilities = lm.model(tokens).logits[0, :-1].float().log_softmax(-1)
        nats = -log_probabilities.gather(-1, tokens[0, 1:, None]).sum().item()
        assert bits == pytest.approx(nats / log(2), rel=1e-5) and num_bytes == len(text)


def test_a_parent_whose_folder_cannot_be_written(runs, main, monkeypatch):
    monkeypatch.setattr(lm_eval, '_is_writable', lambda folder: 'base' not in folder.parts)
    monkeypatch.chdir(runs / 'child' / 'huggingface' / 'ba4')
    status, printed, _ = main('.', '--limit', 2)
    assert status == 0 and printed.count('against') == 1
    there = sorted(path.name for path in Path('../lm_eval/small-limit2').iterdir())
    assert there == ['ba4.json', 'base.json'] and not Path('lm_eval').exists()
    assert read(runs / 'child', 'base', 'small-limit2')['model'].endswith('base/huggingface/ba4')
    status, _, error = main(runs / 'base')
    assert status == 2 and 'base/huggingface cannot be written' in error


def test_a_run_its_average_and_its_parent(runs, main):
    status, printed, _ = main(runs / 'child')
    assert status == 0 and printed.count('against') == 2
    exports = sorted(path.name for path in (runs / 'child' / 'huggingface').glob('ba*'))
    assert exports == ['ba4', 'ba4-lawa']
    results = {name: read(runs / 'child', name) for name in exports}
    parent = read(runs / 'base')
    assert results['ba4']['tasks']['bits']['score'] != results['ba4-lawa']['tasks']['bits']['score']
    for name, result in results.items():
        assert result['suite'] == 'small' and result['model'].endswith(f'child/huggingface/{name}')
        assert result['missing'] == {'Later': 'does not exist yet'}
        assert result['settings']['lm_eval'] == harness.__version__ and result['settings']['limit'] is None
        assert [row.name for row in compare(result, parent)] == ['bits', 'choice', 'exact', 'mean of 2']
        for task in result['tasks'].values():
            assert task['version'] == 3 and task['num_fewshot'] == 0
            assert len(task['values']) == len(task['weights']) == task['count']
            assert task['score'] == pytest.approx(sum(task['values']) / sum(task['weights']))
            assert task['stderr'] == score(task['values'], task['weights']).stderr
    bits, choice = (results['ba4']['tasks'][name] for name in ('bits', 'choice'))
    assert not bits['higher_is_better'] and bits['count'] == 2 * ITEMS
    assert choice['higher_is_better'] and choice['weights'] == [1] * ITEMS
    assert choice['choices'] == [4] * ITEMS and bits['choices'] == []
    changed = compare(results['ba4'], parent)[1].flips
    assert changed is not None and changed.lost.value - changed.gained.value == pytest.approx(
        parent['tasks']['choice']['score'] - choice['score']
    )
    assert printed.count('items that changed sides') == 2 and f'{100 * changed.chance:.1f}' in printed
    row = compare(results['ba4'], parent)[0]
    assert row.delta.value == pytest.approx(row.score.value - row.parent.value)
    assert row.delta.stderr < row.parent.stderr + row.score.stderr
    assert f'{row.score.value:.4f} ± {row.score.stderr:.4f}' in printed and f'{row.delta.value:+.4f}' in printed


@pytest.fixture
def found(monkeypatch):
    """What lm-eval itself makes of a task."""
    results = {}
    original = harness.evaluate
    monkeypatch.setattr(harness, 'evaluate', lambda **given: results.update(original(**given)) or results)
    return results


def test_scores_and_prompts_are_those_of_simple_evaluate(lm, tasks, found):
    entries = {name: SuiteTask(**entry) for name, entry in tasks.items()}
    entries['choice'] = SuiteTask(**{**tasks['choice'], 'num_fewshot': 2})
    expected = harness.simple_evaluate(
        model=lm, tasks=[{**entry.task, 'num_fewshot': entry.num_fewshot} for entry in entries.values()],
        task_manager=task_manager(False), bootstrap_iters=0,
    )  # fmt: skip
    for name, entry in entries.items():
        ours = run_task(lm, entry)
        assert ours['score'] == pytest.approx(expected['results'][name][f'{entry.metric},none'], rel=1e-9)
        prompts, theirs = ([sample['prompt_hash'] for sample in of['samples'][name]] for of in (found, expected))
        assert prompts == theirs
        assert name == 'bits' or len(set(prompts)) == ITEMS
        assert found['n-shot'] == {name: expected['n-shot'][name]} == {name: entry.num_fewshot}


def test_prompts_that_are_cut_are_counted_and_shown(model, main, lm, tasks, found):
    for name, shots in (('bits', 0), ('choice', 0), ('choice', 9), ('exact', 9)):
        ours = run_task(lm, SuiteTask(**{**tasks[name], 'num_fewshot': shots}), 7)
        requests = [request for sample in found['samples'][name] for request in sample['arguments']]
        room = lm.max_length + 1 if name == 'choice' else lm.max_length - 3  # of which 3 are to be generated
        texts = [''.join(request) if name == 'choice' else request[0] for request in requests]
        cut = sum(len(lm.tokenizer(text)['input_ids']) > room for text in texts)
        assert (ours['cut'], ours['cut'] > 0) == ((0 if name == 'bits' else cut), shots > 0)
        assert name == 'bits' or ours['prompts'] == len(requests)
    _, printed, _ = main(model, '--parent', model, 'tasks.choice.num_fewshot=9', '--limit', 7)
    choice, exact = (
        next(line.split() for line in printed.splitlines() if name in line) for name in ('choice', 'exact')
    )
    assert choice[:6] == ['choice', '≤', '9', '28', 'of', '28'] and exact[:3] == ['exact', '0', '7']


def test_groups_are_pooled_as_lm_eval_weights_them(lm, tasks, tmp_path, monkeypatch, found):
    choice = tasks['choice']['task']
    file = Path(choice['dataset_kwargs']['data_files']['test'])
    (few := tmp_path / 'few.jsonl').write_text(''.join(file.read_text().splitlines(keepends=True)[:5]))
    weighted = {'aggregate_metric_list': [{'metric': 'acc', 'weight_by_size': True}]}
    for name, config in {
        'both': {'group': 'both', 'task': ['all', 'few'], 'metadata': {'version': 5}, **weighted},
        'all': {**choice, 'task': 'all'},
        'few': {**choice, 'task': 'few', 'dataset_kwargs': {'data_files': {'test': str(few)}}},
    }.items():
        (tmp_path / f'{name}.yaml').write_text(yaml.safe_dump(config))
    manager = harness.tasks.TaskManager(include_defaults=False, include_path=tmp_path)
    monkeypatch.setattr(suite, 'task_manager', lambda with_known_tasks: manager)
    ours = run_task(lm, SuiteTask(task='both', num_fewshot=0, metric='acc'))
    assert ours['count'] == ITEMS + 5 and str(ours['version']) == '5'
    assert ours['score'] == pytest.approx(found['results']['both']['acc,none'])


def test_a_model_against_itself(runs, model, main):
    status, printed, _ = main(model, '--parent', model)
    result = read(runs / 'base')
    rows = compare(result, result)
    assert all(row.delta.value == row.delta.stderr == 0 and within_noise(row.delta) for row in rows)
    assert (status, printed.count('within noise'), len(rows)) == (0, 4, 4)


def test_what_is_done_is_not_done_again(runs, model, main, tasks, ran, monkeypatch):
    original = lm_eval._run

    def killed(lm, entry, *more):
        if entry.name == 'exact':
            raise KeyboardInterrupt
        return original(lm, entry, *more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lm_eval, '_run', killed)
        main(model)
    assert ran == ['bits', 'choice'] and list(read(runs / 'base')['tasks']) == ran
    file = Path(tasks['bits']['task']['dataset_kwargs']['data_files']['test'])
    other_metric = 'tasks.choice.metric=acc_norm'

    def runs_again(*arguments):
        ran.clear()
        assert main(model, *arguments)[0] == 0
        return list(ran)

    assert runs_again() == ['exact']
    whole = read(runs / 'base')
    assert runs_again() == []
    assert runs_again('--limit', 3) == ['bits', 'choice', 'exact']
    assert read(runs / 'base', suite='small-limit3')['tasks']['choice']['count'] == 3
    assert read(runs / 'base') == whole, 'a limit stands apart'
    assert runs_again(other_metric) == ['choice']
    os.utime(file)
    assert runs_again(other_metric) == [], 'the same data'
    then, times = read(runs / 'base')['tasks']['bits'], (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    original_data = file.read_text()
    file.write_text(original_data.replace('a', 'b'))
    os.utime(file, ns=times)
    assert runs_again(other_metric) == ['bits'], 'other data of the same size and time'
    assert read(runs / 'base')['tasks']['bits']['score'] != then['score'], 'and not the rows that datasets had kept'
    file.write_text(original_data)
    assert runs_again(other_metric) == ['bits']
    file.rename(file.with_suffix('.away'))
    assert runs_again(other_metric) == [], 'results outlive their data'
    file.with_suffix('.away').rename(file)
    os.utime(model / 'model.safetensors')
    assert runs_again() == ['bits', 'choice', 'exact'], 'another model'


def test_a_task_that_cannot_be_run(runs, model, main):
    status, printed, _ = main(
        model, 'tasks.exact.task.dataset_kwargs.data_files.test=none.jsonl', 'tasks.choice.metric=f1',
        'tasks.Wrong={task: hellaswga, num_fewshot: 0, metric: acc}', 'tasks.Hub={task: hellaswag, num_fewshot: 0, metric: acc_norm}',
    )  # fmt: skip
    result = read(runs / 'base')
    assert status == 1 and list(result['tasks']) == ['bits']
    missing = result['missing']
    assert missing.keys() == {'Later', 'choice', 'exact', 'Wrong', 'Hub'}
    for name, reason in {'choice': "'f1'.*acc, acc_norm", 'exact': 'none.jsonl', 'Wrong': "'hellaswag'"}.items():
        assert re.search(reason, missing[name])
    lines = printed.splitlines()
    assert all(lines.count(f'{name}: {missing[name]}') == 1 for name in missing if name != 'Later')


def test_a_parent_that_is_not_there(runs, main):
    status, _, error = main(runs / 'child', '--limit', 2, '--parent', runs / 'nobody')
    assert (status, error.count('\n')) == (2, 1) and f'{runs}/nobody' in error
    (runs / 'base' / 'huggingface' / 'ba4').rename(runs / 'base' / 'huggingface' / 'ba2')  # not what child began from
    status, printed, _ = main(runs / 'child', '--limit', 2)
    assert status == 0 and printed.count('latest-rank0.pt') == 1 and 'against' not in printed
    assert len(read(runs / 'child', 'ba4-lawa', 'small-limit2')['tasks']) == 3


def test_the_parent_is_the_checkpoint_that_was_loaded(runs, model):
    newest = model.with_name('ba8')
    shutil.copytree(model, newest)
    assert exports.models_of(runs / 'base') == [newest]
    for path in (runs / 'child', runs / 'child' / 'huggingface' / 'ba4-lawa'):
        assert exports.parent_of(path) == model
    assert exports.parent_of(runs / 'base') is None


def test_models_of_transformers(tmp_path, data, main):
    config = LlamaConfig(
        vocab_size=tiny.VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / 'llama')
    shutil.copytree(data['tokenizer'], tmp_path / 'llama', dirs_exist_ok=True)
    assert main(tmp_path / 'llama', '--limit', 4)[0] == 0
    result = json.loads((tmp_path / 'lm_eval' / 'small-limit4' / 'llama.json').read_text())
    assert result['tasks']['bits']['score'] > 1 and len(result['tasks']) == 3


def test_weights_that_do_not_fit_are_one_line(tmp_path, data, main):
    """Also those of a tied pair of which only the head is stored, and a configuration that no model has."""
    config = LlamaConfig(
        vocab_size=tiny.VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / 'llama')
    shutil.copytree(data['tokenizer'], tmp_path / 'llama', dirs_exist_ok=True)
    weights = load_file(tmp_path / 'llama' / 'model.safetensors')
    weights['lm_head.weight'] = weights.pop('model.embed_tokens.weight')
    save_file(weights, tmp_path / 'llama' / 'model.safetensors', {'format': 'pt'})
    written = json.loads((tmp_path / 'llama' / 'config.json').read_text())
    for config, named in (
        ({}, 'embed_tokens'),
        ({'hidden_size': 32}, 'weight'),
        ({'num_attention_heads': 'x'}, 'llama'),
    ):
        (tmp_path / 'llama' / 'config.json').write_text(json.dumps({**written, **config}))
        status, _, error = main(tmp_path / 'llama')
        assert (status, error.count('\n')) == (2, 1) and named in error and 'cannot be loaded' in error


@pytest.mark.parametrize(
    ('arguments', 'named'),
    [
        (['--batch-size', '0'], '--batch-size'),
        (['--limit', '1.5'], '--limit'),
        (['tasks.bits.metrics=acc'], "tasks.bits.metrics .* 'metric'"),
        ({'suite': 'no/such.yaml'}, 'no/such.yaml'),
        ({'layers': 2}, 'config.json.* transformer.blocks.1'),  # whose weights are not there
    ],
)
def test_what_is_refused(model, main, suite_file, arguments, named):
    changed = arguments if isinstance(arguments, dict) else {}
    config = json.loads((model / 'config.json').read_text())
    (model / 'config.json').write_text(json.dumps({**config, 'n_layers': changed.get('layers', config['n_layers'])}))
    given = [] if changed else arguments
    status, _, error = main(model, *given, suite=changed.get('suite', suite_file))
    assert (status, error.count('\n')) == (2, 1)
    assert re.search(named, error)
