# SPDX-License-Identifier: Apache-2.0
"""``scripts/evaluate.py``: real exports, real lm-eval; and the arithmetic of scores and paired differences."""

import json
import os
import random
import shutil
from math import log, sqrt
from pathlib import Path

import evaluate as script
import lm_eval as harness
import pytest
import tiny
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cpt_algorithms.checkpoints import exports
from cpt_algorithms.evaluation import lm_eval
from cpt_algorithms.evaluation.functional import Mean
from cpt_algorithms.evaluation.lm_eval import (
    check_form,
    check_suite,
    compare,
    load_model,
    load_suite,
    mean_over_tasks,
    paired_delta,
    score,
    within_noise,
)

ITEMS = 24


# Arithmetic


def test_score_by_hand():
    # 1 of 4: variance of the items 3/16 * 4/3 = 1/4, of the mean 1/16
    assert score([1, 0, 0, 0], [1, 1, 1, 1]) == Mean(0.25, 0.25, 4)
    # 6 bits on 2 bytes: residuals 4 - 3 and 2 - 3; sqrt(2/1 * 2) / 2
    assert score([4, 2], [1, 1]) == Mean(3, 1, 2)
    # 9 bits on 3 bytes: 2 - 3 and 7 - 6; sqrt(2 * 2) / 3
    assert score([2, 7], [1, 2]) == Mean(3, 2 / 3, 2)
    assert score([0.5], [1]) == Mean(0.5, 0, 1)
    with pytest.raises(ValueError, match='no item'):
        score([], [])


@given(st.lists(st.sampled_from([0, 1]), min_size=2, max_size=50))
def test_score_is_lm_evals_mean_and_standard_error(values: list[int]):
    from lm_eval.api.metrics import mean, mean_stderr

    ours = score(values, [1] * len(values))
    assert ours.value == pytest.approx(mean(values)) and ours.stderr == pytest.approx(mean_stderr(values), abs=1e-12)


def test_paired_delta_by_hand():
    # +1 -1 +1 0: mean 1/4, squares 3 - 4/16, sqrt(11/4 * 4/3) / 4
    delta = paired_delta([1, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 1])
    assert delta.value == 0.25 and delta.stderr == pytest.approx(sqrt(11 / 3) / 4)
    # what both share cancels, whatever the items' spread
    assert paired_delta([10, 3, 8], [9, 2, 7], [1, 1, 1]) == Mean(1, 0, 3)


def test_within_noise():
    assert within_noise(Mean(0.195, 0.1, 9)) and within_noise(Mean(-0.195, 0.1, 9)) and within_noise(Mean(0, 0, 9))
    assert not within_noise(Mean(0.197, 0.1, 9))
    assert within_noise(Mean(1, 0, 1))  # one item says nothing


def test_mean_over_tasks_by_hand():
    assert mean_over_tasks([Mean(0.2, 0.03, 10), Mean(0.6, 0.04, 1000)]) == Mean(0.4, pytest.approx(0.025), 1010)


# Suites


@pytest.mark.parametrize(
    ('suite', 'problem'),
    [
        ([], 'a suite is a mapping'),
        ({'name': 'x'}, 'tasks is missing'),
        ({'name': 'x', 'tasks': {'A': {'task': 'piqa', 'num_fewshot': 0, 'metric': 'acc'}}, 'taks': {}}, "taks is not a key that anything reads; did you mean 'tasks'?"),
        ({'name': 'x', 'tasks': {'A': {'task': 'piqa', 'num_fewshots': 0, 'metric': 'acc'}}}, 'tasks.A.num_fewshots is not a key'),
        ({'name': 'x', 'tasks': {'A': {'task': 'piqa', 'num_fewshot': 0}}}, 'tasks.A.metric is missing'),
        ({'name': 'x', 'tasks': {'A': {'task': 'piqa', 'num_fewshot': -1, 'metric': 'acc'}}}, 'tasks.A.num_fewshot=-1 must be'),
        ({'name': 'x', 'tasks': {'A': {'task': {'dataset_path': 'json'}, 'num_fewshot': 0, 'metric': 'acc'}}}, 'tasks.A.task must be'),
        ({'name': 'x', 'tasks': {'A': 'piqa'}}, 'tasks.A must be a mapping'),
        ({'name': 'a/b', 'tasks': {'A': {'task': 'piqa', 'num_fewshot': 0, 'metric': 'acc'}}}, "name='a/b' must be"),
        ({'name': 'x', 'tasks': {'A': {'task': 'piqa', 'num_fewshot': 0, 'metric': 'acc'}}, 'missing': {'A': 'why'}}, 'A is both in tasks and in missing'),
    ],
)  # fmt: skip
def test_form(suite, problem: str):
    found = check_form(suite)
    assert len(found) == 1 and problem in found[0]


@pytest.mark.parametrize('path', sorted((tiny.ROOT / 'yamls' / 'eval').glob('*.yaml')), ids=lambda path: path.stem)
def test_every_suite_can_be_run(path: Path, tmp_path: Path):
    suite = load_suite(path, [f'variables.root={tmp_path}'] if path.stem == 'offline' else [])
    assert suite['name'] == path.stem
    (tmp_path / 'lm_eval').mkdir()
    for entry in suite['tasks'].values():
        for file in lm_eval._data_files(entry['task']):
            Path(file).touch()
    assert check_suite(suite) == []


def test_unknown_task_and_missing_data(tmp_path: Path):
    suite = load_suite(tiny.ROOT / 'yamls/eval/offline.yaml', [f'variables.root={tmp_path}'])
    suite['tasks']['Hella'] = {'task': 'hellaswga', 'num_fewshot': 0, 'metric': 'acc'}
    problems = check_suite(suite)
    assert len(problems) == 5
    assert f'{tmp_path}/lm_eval/python_passages.jsonl does not exist' in problems[0]
    assert 'tasks.Hella: lm-eval' in problems[4] and "no task 'hellaswga'; the nearest: hellaswag" in problems[4]


# Real models


def sentences(seed: int, length: int) -> list[str]:
    generator = random.Random(seed)
    return [' '.join(generator.choices('abcdefghijklmnopqrst', k=length)) for _ in range(ITEMS)]


def inline(name: str, file: Path, **over) -> dict:
    return {
        'task': name,
        'dataset_path': 'json',
        'dataset_kwargs': {'data_files': {'test': str(file)}},
        'test_split': 'test',
        'metadata': {'version': 3},
        **over,
    }


@pytest.fixture(scope='module')
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """A suite of bits per byte, multiple choice and exact match, on documents of unequal lengths."""
    folder = tmp_path_factory.mktemp('tasks')
    rows = {
        # the longest is read in two windows
        'text': [{'text': text} for text in [*sentences(0, 6), *sentences(1, 12)]],
        'choice': [
            {'context': context, 'choices': [f' {end}' for end in sentences(at, 3)[:4]], 'answer': at % 4}
            for at, context in enumerate(sentences(2, 4))
        ],
        'exact': [{'question': text, 'answer': 'a a'} for text in sentences(3, 4)],
    }
    for name, items in rows.items():
        (folder / f'{name}.jsonl').write_text(''.join(json.dumps(item) + '\n' for item in items))
    metric = {'aggregation': 'mean', 'higher_is_better': True}
    made = {
        'bits': inline('bits', folder / 'text.jsonl', output_type='loglikelihood_rolling', doc_to_text='', doc_to_target='text', metric_list=[{'metric': 'bits_per_byte', 'aggregation': 'bits_per_byte', 'higher_is_better': False}]),
        'choice': inline('choice', folder / 'choice.jsonl', output_type='multiple_choice', doc_to_text='context', doc_to_choice='choices', doc_to_target='answer', target_delimiter='', metric_list=[{'metric': 'acc', **metric}, {'metric': 'acc_norm', **metric}]),
        'exact': inline('exact', folder / 'exact.jsonl', output_type='generate_until', doc_to_text='question', doc_to_target='answer', generation_kwargs={'until': ['\n'], 'max_gen_toks': 3}, metric_list=[{'metric': 'exact_match', **metric}]),
    }  # fmt: skip
    metrics = {'bits': 'bits_per_byte', 'choice': 'acc', 'exact': 'exact_match'}
    return {name: {'task': task, 'num_fewshot': 0, 'metric': metrics[name]} for name, task in made.items()}


@pytest.fixture(scope='module')
def suite_file(tmp_path_factory: pytest.TempPathFactory, tasks: dict[str, dict]) -> Path:
    path = tmp_path_factory.mktemp('suite') / 'small.yaml'
    path.write_text(yaml.safe_dump({'name': 'small', 'tasks': tasks, 'missing': {'Later': 'does not exist yet'}}))
    return path


@pytest.fixture(scope='module')
def trained(tmp_path_factory: pytest.TempPathFactory, data) -> tuple[Path, dict[str, torch.Tensor]]:
    """Runs ``base`` and, from it, ``child`` with an average; and the logits of the child in training."""
    folder = tmp_path_factory.mktemp('runs')

    def export(name: str) -> dict:
        return {'hf_checkpointer': {'save_folder': str(folder / name), 'save_interval': '4ba', 'precision': 'float32'}}

    common = {'max_duration': '4ba', 'save_interval': '4ba', 'optimizer': {'lr': 0.01}}
    tiny.run(tiny.config(folder, data, 'base', callbacks=export('base'), **common))
    load_path = str(folder / 'base' / 'latest-rank0.pt')
    child = tiny.config(
        folder, data, 'child', callbacks={**export('child'), 'stage_start': {'optimizer_state': 'reset'}, 'lawa': {'k': 2, 'interval': '1ba'}},
        load_path=load_path, load_weights_only=True, **common,
    )  # fmt: skip
    tiny.run(child)
    for name, parent in {'base': None, 'child': load_path}.items():
        (folder / name / 'stage.json').write_text(json.dumps({'run_name': name, 'parent': parent}))
    state = torch.load(folder / 'child' / 'latest-rank0.pt', weights_only=False)['state']['model']
    return folder, state


@pytest.fixture()
def runs(trained: tuple[Path, dict], tmp_path: Path) -> Path:
    """A copy without results."""
    shutil.copytree(trained[0], tmp_path / 'runs', symlinks=True)
    for name in ('base', 'child'):
        stage = tmp_path / 'runs' / name / 'stage.json'
        stage.write_text(stage.read_text().replace(str(trained[0]), str(tmp_path / 'runs')))
    return tmp_path / 'runs'


@pytest.fixture()
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The inline tasks that lm-eval ran, in order."""
    names: list[str] = []
    original = harness.evaluate

    def evaluate(*args, **kwargs):
        names.extend(kwargs['task_dict']['tasks'])
        return original(*args, **kwargs)

    monkeypatch.setattr(harness, 'evaluate', evaluate)
    return names


def main(*arguments: object) -> int:
    """The exit status."""
    try:
        script.main([*map(str, arguments), '--device', 'cpu'])
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def read(run: Path, export: str = 'ba4', suite: str = 'small') -> dict:
    return json.loads((run / 'huggingface' / 'lm_eval' / suite / f'{export}.json').read_text())


def test_the_model_that_is_evaluated_is_the_one_that_was_trained(trained: tuple[Path, dict], tasks: dict[str, dict]):
    folder, state = trained
    export = folder / 'child' / 'huggingface' / 'ba4'
    lm = load_model(export, 'cpu', 4)
    assert type(lm.model).__module__.startswith('llmfoundry')
    ours = {f'model.{name}': value for name, value in lm.model.state_dict().items()}
    assert ours.keys() == state.keys() and all(torch.equal(ours[name], state[name]) for name in state)
    assert lm.max_length == tiny.SEQ_LEN and not lm.model.training

    # bits per byte from the logits, of the documents that fit into one window after EOS
    result = lm_eval._run(lm, lm_eval._build(tasks['bits']), tasks['bits'], ITEMS)
    tokenizer = AutoTokenizer.from_pretrained(export)
    for text, bits, num_bytes in zip(sentences(0, 6), result['values'], result['weights'], strict=True):
        tokens = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)['input_ids']]])
        with torch.no_grad():
            log_probabilities = lm.model(tokens).logits[0, :-1].float().log_softmax(-1)
        nats = -log_probabilities.gather(-1, tokens[0, 1:, None]).sum().item()
        assert bits == pytest.approx(nats / log(2), rel=1e-5) and num_bytes == len(text)


def test_a_run_its_average_and_its_parent(runs: Path, suite_file: Path, capsys: pytest.CaptureFixture):
    assert main(runs / 'child', '--suite', suite_file) == 0
    exports = sorted(path.name for path in (runs / 'child' / 'huggingface').glob('ba*'))
    assert exports == ['ba4', 'ba4-lawa']
    printed = capsys.readouterr().out
    assert printed.count('against') == 2
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
    row = compare(results['ba4'], parent)[0]
    assert row.delta.value == pytest.approx(row.score.value - row.parent.value)
    assert row.delta.stderr < row.parent.stderr + row.score.stderr
    assert f'{row.score.value:.4f} ± {row.score.stderr:.4f}' in printed and f'{row.delta.value:+.4f}' in printed


def test_scores_are_lm_evals(trained: tuple[Path, dict], tasks: dict[str, dict]):
    lm = load_model(trained[0] / 'child' / 'huggingface' / 'ba4', 'cpu', 4)
    found = harness.simple_evaluate(
        model=lm, tasks=[entry['task'] for entry in tasks.values()], task_manager=lm_eval._task_manager(False), bootstrap_iters=0
    )  # fmt: skip
    for name, entry in tasks.items():
        ours = lm_eval._run(lm, lm_eval._build(entry), entry, None)
        assert ours['score'] == pytest.approx(found['results'][name][f'{entry["metric"]},none'], rel=1e-9)


def test_prompts_are_lm_evals(trained: tuple[Path, dict], tasks: dict[str, dict]):
    lm = load_model(trained[0] / 'child' / 'huggingface' / 'ba4', 'cpu', 4)
    entry = {**tasks['choice'], 'num_fewshot': 2}
    theirs = harness.simple_evaluate(
        model=lm, tasks=[entry['task']], num_fewshot=2, task_manager=lm_eval._task_manager(False), bootstrap_iters=0
    )
    ours = harness.evaluate(lm=lm, task_dict=lm_eval._build(entry), bootstrap_iters=0)
    hashes = [[sample['prompt_hash'] for sample in found['samples']['choice']] for found in (theirs, ours)]
    assert hashes[0] == hashes[1] and len(set(hashes[0])) == ITEMS
    assert theirs['n-shot'] == ours['n-shot'] == {'choice': 2}


def test_groups_are_pooled_as_lm_eval_weights_them(
    trained: tuple[Path, dict], tasks: dict[str, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lm = load_model(trained[0] / 'base' / 'huggingface' / 'ba4', 'cpu', 4)
    choice = tasks['choice']['task']
    file = Path(choice['dataset_kwargs']['data_files']['test'])
    (few := tmp_path / 'few.jsonl').write_text(''.join(file.read_text().splitlines(keepends=True)[:5]))
    group = {
        'group': 'both',
        'task': ['all', 'few'],
        'aggregate_metric_list': [{'metric': 'acc', 'weight_by_size': True}],
    }
    for name, config in {
        'both': {**group, 'metadata': {'version': 5}},
        'all': {**choice, 'task': 'all'},
        'few': {**choice, 'task': 'few', 'dataset_kwargs': {'data_files': {'test': str(few)}}},
    }.items():
        (tmp_path / f'{name}.yaml').write_text(yaml.safe_dump(config))
    manager = harness.tasks.TaskManager(include_defaults=False, include_path=tmp_path)
    monkeypatch.setattr(lm_eval, '_task_manager', lambda with_known_tasks: manager)
    seen = []
    original = harness.evaluate
    monkeypatch.setattr(harness, 'evaluate', lambda **kwargs: seen.append(original(**kwargs)) or seen[-1])
    entry = {'task': 'both', 'num_fewshot': 0, 'metric': 'acc'}
    ours = lm_eval._run(lm, lm_eval._build(entry), entry, None)
    assert ours['count'] == ITEMS + 5 and str(ours['version']) == '5'
    assert ours['score'] == pytest.approx(seen[0]['results']['both']['acc,none'])


def test_a_model_against_itself(runs: Path, suite_file: Path, capsys: pytest.CaptureFixture):
    model = runs / 'base' / 'huggingface' / 'ba4'
    assert main(model, '--suite', suite_file, '--parent', model) == 0
    result = read(runs / 'base')
    rows = compare(result, result)
    assert all(row.delta.value == row.delta.stderr == 0 and within_noise(row.delta) for row in rows)
    assert capsys.readouterr().out.count('within noise') == len(rows) == 4


def test_what_is_done_is_not_done_again(
    runs: Path, suite_file: Path, tasks: dict[str, dict], ran: list[str], monkeypatch: pytest.MonkeyPatch
):
    model = runs / 'base' / 'huggingface' / 'ba4'
    original = lm_eval._run

    def killed(lm, loaded, entry, limit):
        if entry['metric'] == 'exact_match':
            raise KeyboardInterrupt
        return original(lm, loaded, entry, limit)

    with monkeypatch.context() as patch:
        patch.setattr(lm_eval, '_run', killed)
        with pytest.raises(KeyboardInterrupt):
            script.main([str(model), '--suite', str(suite_file), '--device', 'cpu'])
    assert ran == ['bits', 'choice'] and list(read(runs / 'base')['tasks']) == ran
    assert main(model, '--suite', suite_file) == 0
    assert ran == ['bits', 'choice', 'exact']
    whole = read(runs / 'base')
    assert main(model, '--suite', suite_file) == 0 and ran == ['bits', 'choice', 'exact']
    # a limit stands apart
    assert main(model, '--suite', suite_file, '--limit', 3) == 0 and len(ran) == 6
    assert read(runs / 'base', suite='small-limit3')['tasks']['choice']['count'] == 3
    assert read(runs / 'base') == whole
    # another metric runs that task; other data its tasks; another model all
    assert main(model, '--suite', suite_file, 'tasks.choice.metric=acc_norm') == 0 and ran[6:] == ['choice']
    os.utime(tasks['bits']['task']['dataset_kwargs']['data_files']['test'])
    assert main(model, '--suite', suite_file, 'tasks.choice.metric=acc_norm') == 0 and ran[7:] == ['bits']
    # results outlive their data
    file = Path(tasks['bits']['task']['dataset_kwargs']['data_files']['test'])
    file.rename(file.with_suffix('.away'))
    assert main(model, '--suite', suite_file, 'tasks.choice.metric=acc_norm') == 0 and not ran[8:]
    file.with_suffix('.away').rename(file)
    os.utime(model / 'model.safetensors')
    assert main(model, '--suite', suite_file) == 0 and ran[8:] == ['bits', 'choice', 'exact']


def test_a_task_that_cannot_be_run(runs: Path, suite_file: Path, capsys: pytest.CaptureFixture):
    model = runs / 'base' / 'huggingface' / 'ba4'
    overrides = ('tasks.exact.task.dataset_kwargs.data_files.test=none.jsonl', 'tasks.choice.metric=f1')
    added = '{task: hellaswga, num_fewshot: 0, metric: acc}', '{task: hellaswag, num_fewshot: 0, metric: acc_norm}'
    assert main(model, '--suite', suite_file, *overrides, f'tasks.Wrong={added[0]}', f'tasks.Hub={added[1]}') == 1
    printed = capsys.readouterr().out.splitlines()
    result = read(runs / 'base')
    assert list(result['tasks']) == ['bits']
    assert list(result['missing']) == ['Later', 'choice', 'exact', 'Wrong', 'Hub']
    expected = {
        'choice': "metric 'f1' is not one of choice: acc, acc_norm",
        'exact': 'none.jsonl does not exist; prepare the data first',
        'Wrong': "has no task 'hellaswga'; the nearest: hellaswag",
        'Hub': 'its data cannot be loaded: ',
    }
    for name, reason in expected.items():
        assert reason in result['missing'][name]
        assert sum(line.startswith(f'{name}: ') and reason in line for line in printed) == 1


def test_a_parent_that_is_not_there(runs: Path, suite_file: Path, capsys: pytest.CaptureFixture):
    arguments = ('--suite', suite_file, '--limit', '2')
    assert main(runs / 'child', *arguments, '--parent', runs / 'nobody') == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and f'{runs}/nobody: no model found' in error
    (runs / 'base' / 'huggingface' / 'ba4').rename(runs / 'base' / 'huggingface' / 'ba2')  # not what child began from
    assert main(runs / 'child', *arguments) == 0
    printed = capsys.readouterr().out
    assert 'latest-rank0.pt has no export huggingface/ba4 beside it' in printed and 'against' not in printed
    assert len(read(runs / 'child', 'ba4-lawa', 'small-limit2')['tasks']) == 3


def test_the_parent_is_the_checkpoint_that_was_loaded(runs: Path):
    newest = runs / 'base' / 'huggingface' / 'ba8'
    shutil.copytree(runs / 'base' / 'huggingface' / 'ba4', newest)
    assert exports.models_of(runs / 'base') == [newest]
    assert exports.parent_of(runs / 'child') == runs / 'base' / 'huggingface' / 'ba4'
    assert exports.parent_of(runs / 'child' / 'huggingface' / 'ba4-lawa') == runs / 'base' / 'huggingface' / 'ba4'
    assert exports.parent_of(runs / 'base') is None


def test_models_of_transformers(tmp_path: Path, data, suite_file: Path):
    config = LlamaConfig(
        vocab_size=tiny.VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / 'llama')
    shutil.copytree(data['tokenizer'], tmp_path / 'llama', dirs_exist_ok=True)
    assert main(tmp_path / 'llama', '--suite', suite_file, '--limit', 4) == 0
    result = json.loads((tmp_path / 'lm_eval' / 'small-limit4' / 'llama.json').read_text())
    assert result['tasks']['bits']['score'] > 1 and len(result['tasks']) == 3


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['{suite}', '--batch-size', '0'], 'argument --batch-size: '),
        (['no/such.yaml'], 'no/such.yaml cannot be read as a suite'),
        (['{suite}', 'tasks.bits.metrics=acc'], "tasks.bits.metrics is not a key that anything reads; did you mean 'metric'?"),
    ],
)  # fmt: skip
def test_wrong_arguments(
    trained: tuple[Path, dict], suite_file: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture
):
    model = trained[0] / 'base'
    assert main(model, '--suite', *[argument.format(suite=suite_file) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith('evaluate: error: ') and error.count('\n') == 1 and message in error


def test_weights_that_are_not_there(runs: Path, suite_file: Path, capsys: pytest.CaptureFixture):
    model = runs / 'base' / 'huggingface' / 'ba4'
    config = json.loads((model / 'config.json').read_text())
    (model / 'config.json').write_text(json.dumps({**config, 'n_layers': 2}))
    assert main(model, '--suite', suite_file) == 2
    assert 'weights do not fit its config.json, such as transformer.blocks.1.' in capsys.readouterr().err
