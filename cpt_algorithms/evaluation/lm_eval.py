# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of exported models with lm-eval, item by item, so that a model and its parent are compared in pairs."""

import hashlib
import json
import logging
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import version
from math import isclose, log, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from yaml import YAMLError

from cpt_algorithms.checkpoints.exports import PretrainedModel, folder_of_pretrained
from cpt_algorithms.evaluation.functional import Mean
from cpt_algorithms.files import read_yaml, write_json
from cpt_algorithms.validation import check_keys

__all__ = [
    'Row',
    'check_form',
    'check_suite',
    'compare',
    'evaluate',
    'evaluate_all',
    'load_model',
    'load_suite',
    'load_suite_of',
    'mean_over_tasks',
    'paired_delta',
    'print_result',
    'result_file',
    'score',
    'within_noise',
]

Suite = dict[str, Any]

_SUITE_KEYS = ('name', 'variables', 'tasks', 'missing')
_TASK_KEYS = ('task', 'num_fewshot', 'metric')
_FILE_BUILDERS = ('json', 'csv', 'parquet', 'text', 'arrow')
# results are used again only if these are what they were
_SAME = ('lm_eval', 'limit', 'model_files')


# Arithmetic


def score(values: Sequence[float], weights: Sequence[float]) -> Mean:
    r"""The score of a task with its standard error, by linearisation of the ratio.

    :math:`r = \sum v_i / \sum w_i`, :math:`s^2 = \frac{n}{n-1} \sum (v_i - r w_i)^2 / (\sum w_i)^2`. With weights 1,
    the mean and its usual standard error. Items are taken as independent, also those from one document.

    Args:
        values: Of each item: accuracy, exact match, or bits.
        weights: Of each item: 1, or bytes for bits per byte.

    Raises:
        ValueError: If there is no item.

    Source: Cochran 1977, Sampling Techniques, 6.3-6.4.
    """
    if not values:
        raise ValueError('there is no item')
    count, total = len(values), sum(weights)
    ratio = sum(values) / total
    residuals = sum((value - ratio * weight) ** 2 for value, weight in zip(values, weights, strict=True))
    return Mean(ratio, sqrt(residuals * count / max(count - 1, 1)) / total, count)


def paired_delta(values: Sequence[float], parent_values: Sequence[float], weights: Sequence[float]) -> Mean:
    """Score minus the parent's on the same items; its standard error is that of the differences item by item.

    Items that both models get right, or wrong, cancel: this is much less than the two scores' errors together.

    Args:
        values: Of each item.
        parent_values: The parent's, of the same items.
        weights: Of each item, which do not depend on the model.
    """
    return score([ours - theirs for ours, theirs in zip(values, parent_values, strict=True)], weights)


def within_noise(delta: Mean) -> bool:
    """Whether 0 lies in the 95 % confidence interval of a difference, +- 1.96 standard errors; always with one item."""
    return delta.count < 2 or abs(delta.value) <= 1.96 * delta.stderr


def mean_over_tasks(means: Sequence[Mean]) -> Mean:
    r"""Mean over tasks, each counting the same: :math:`\frac1k \sum m_j \pm \frac1k \sqrt{\sum s_j^2}`.

    Args:
        means: Scores of the tasks, or differences, at least one.
    """
    stderr = sqrt(sum(mean.stderr**2 for mean in means)) / len(means)
    return Mean(sum(mean.value for mean in means) / len(means), stderr, sum(mean.count for mean in means))


# Suites


def load_suite(path: str | Path, overrides: Sequence[str] = ()) -> Suite:
    """Read a suite.

    Args:
        path: A YAML with ``name``, ``tasks``, and if need be ``missing`` and ``variables`` for ``${variables.x}``.
        overrides: ``key=value`` with dotted keys.

    Raises:
        ValueError: If it cannot be read or has not the form of a suite, with all problems.
    """
    try:
        given = OmegaConf.merge(read_yaml(path), OmegaConf.from_dotlist(list(overrides)))
        suite = OmegaConf.to_container(given, resolve=True)
    except (OSError, ValueError, OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f'{path} cannot be read as a suite: {" ".join(str(error).split())}') from None
    if problems := check_form(suite):
        raise ValueError(f'{path}: {"; ".join(problems)}')
    assert isinstance(suite, dict), 'it has been checked'
    return {str(key): value for key, value in suite.items()}


def load_suite_of(given: str | Sequence[str]) -> Suite:
    """The suite that ``variables.lm_eval`` of a stage names.

    Args:
        given: A path, or a path and ``key=value`` words, as ``scripts/evaluate.py`` takes them.

    Raises:
        ValueError: As :func:`load_suite`.
    """
    path, *overrides = [given] if isinstance(given, str) else given
    return load_suite(path, overrides)


def check_form(suite: Any) -> list[str]:
    """What is wrong with a suite's keys and values, whatever is installed.

    Args:
        suite: What its YAML says.
    """
    if not isinstance(suite, Mapping):
        return ['a suite is a mapping with the keys name and tasks']
    problems: list[str] = []

    def check(good: bool, problem: str) -> None:
        if not good:
            problems.append(problem)

    def keys(where: str, given: Mapping[str, Any], allowed: Iterable[str], required: Iterable[str]) -> None:
        try:
            check_keys(where, given, allowed)
        except ValueError as error:
            problems.append(str(error))  # mostly what seems to be missing is this one
        else:
            problems.extend(f'{where}.{key} is missing'.removeprefix('.') for key in required if given.get(key) is None)

    keys('', suite, _SUITE_KEYS, ('name', 'tasks'))
    name, tasks, missing = suite.get('name', ''), suite.get('tasks') or {}, suite.get('missing') or {}
    check(isinstance(name, str) and '/' not in name, f'name={name!r} must be the name of a folder')
    if not isinstance(tasks, Mapping) or not isinstance(missing, Mapping):
        return [*problems, 'tasks and missing must be mappings']
    for entry_name, entry in tasks.items():
        where = f'tasks.{entry_name}'
        if not isinstance(entry, Mapping):
            problems.append(f'{where} must be a mapping with the keys {", ".join(_TASK_KEYS)}')
            continue
        keys(where, entry, _TASK_KEYS, _TASK_KEYS)
        task, shots, metric = (entry.get(key) for key in _TASK_KEYS)
        is_inline = isinstance(task, Mapping) and isinstance(task.get('task'), str)
        check(
            isinstance(task, str | None) or is_inline,
            f"{where}.task must be a name that lm-eval knows, or a task's config with its own name as task",
        )
        whole = isinstance(shots, int) and not isinstance(shots, bool) and shots >= 0
        check(shots is None or whole, f'{where}.num_fewshot={shots!r} must be a whole number of at least 0')
        check(isinstance(metric, str | None), f'{where}.metric={metric!r} must be the name of a metric')
    problems += [f'{entry} is both in tasks and in missing' for entry in tasks if entry in missing]
    return problems


@cache
def _task_manager(with_known_tasks: bool) -> Any:
    # reading lm-eval's 14,000 configs takes 7 s
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=with_known_tasks)


def _data_files(task: Any) -> list[str]:
    """Local files that an inline task reads."""
    if not isinstance(task, Mapping) or task.get('dataset_path') not in _FILE_BUILDERS:
        return []
    given = (task.get('dataset_kwargs') or {}).get('data_files') or []
    groups = given.values() if isinstance(given, Mapping) else [given]
    files = [file for group in groups for file in ([group] if isinstance(group, str) else group)]
    return [file for file in files if '*' not in file and '://' not in file]


def _unavailable(task: Any) -> str | None:
    """Why a task of a suite cannot be run here, as far as that shows without its data."""
    if isinstance(task, str):
        known = _task_manager(True).all_tasks
        if task not in known:
            near = ', '.join(get_close_matches(task, known, n=3))
            return f'lm-eval {version("lm_eval")} has no task {task!r}' + (f'; the nearest: {near}' if near else '')
    missing = [file for file in _data_files(task) if not Path(file).exists()]
    return f'{missing[0]} does not exist; prepare the data first (scripts/prepare_data.py)' if missing else None


def check_suite(suite: Mapping[str, Any]) -> list[str]:
    """Everything wrong with a suite that shows without a model: keys, values, task names, local data files.

    Args:
        suite: What its YAML says, interpolations resolved.

    Returns:
        One line for each problem.

    Cost: 7 s the first time, if a task is named that lm-eval is to know.
    """
    if problems := check_form(suite):
        return problems
    reasons = {name: _unavailable(entry['task']) for name, entry in suite['tasks'].items()}
    return [f'tasks.{name}: {reason}' for name, reason in reasons.items() if reason]


# Models


def load_model(folder: Path, device: str, batch_size: int) -> Any:
    """An exported model as lm-eval uses it.

    Models that LLM Foundry's ``mpt_causal_lm`` exported are loaded with LLM Foundry's own class: for these,
    ``AutoModelForCausalLM`` takes transformers' ``mpt``, which knows no learned positions, and gives other numbers
    without a word. No code is taken from the folder.

    Args:
        folder: A Hugging Face model with its tokenizer.
        device: ``cpu`` or ``cuda``.
        batch_size: Sequences at once.

    Raises:
        ValueError: If it cannot be loaded, or not all of its weights are there.
    """
    # neither is annotated in a way that a type checker follows
    transformers: Any = import_module('transformers')
    huggingface: Any = import_module('lm_eval.models.huggingface')
    settings = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    arguments: dict[str, Any] = {'torch_dtype': 'auto', 'output_loading_info': True, 'trust_remote_code': False}
    max_length = None
    try:
        if settings.get('architectures') == ['MPTForCausalLM']:
            mpt: Any = import_module('llmfoundry.models.mpt')
            config = mpt.MPTConfig.from_pretrained(folder)
            config.init_device = 'cpu'
            if device == 'cpu' or settings.get('torch_dtype') == 'float32':  # flash attention can do neither
                config.attn_config['attn_impl'] = 'torch'
            model, loaded = mpt.MPTForCausalLM.from_pretrained(folder, config=config, **arguments)
            max_length = config.max_seq_len  # which lm-eval does not look for
        else:
            model, loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, **arguments)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise ValueError(f'{folder} cannot be loaded: {_short(error)}') from None
    if lacking := [*loaded['missing_keys'], *loaded['unexpected_keys'], *loaded['mismatched_keys']]:
        raise ValueError(f'{folder} cannot be loaded: weights do not fit its config.json, such as {lacking[0]}')
    model.to(device)
    return huggingface.HFLM(model, backend='causal', tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)


def _short(error: BaseException) -> str:
    text = ' '.join(str(error).split())
    return f'{type(error).__name__}: {text[:200]}{"..." if len(text) > 200 else ""}'


def _stat(file: Path) -> list[int]:
    return [file.stat().st_size, file.stat().st_mtime_ns]


# Evaluation


def result_file(model: Path | PretrainedModel, suite: Mapping[str, Any], limit: int | None) -> Path:
    """Where the results of a model go; those with a limit stand apart, as a try must not replace them.

    Args:
        model: Its folder, or the pretrained model of a run, whose results go beside the run's own as ``base.json``.
        suite: The suite.
        limit: Items of each task at most.
    """
    folder = suite['name'] if limit is None else f'{suite["name"]}-limit{limit}'
    if isinstance(model, PretrainedModel):
        return model.run / 'huggingface' / 'lm_eval' / folder / 'base.json'
    return model.parent / 'lm_eval' / folder / f'{model.name}.json'


def _done(paths: Iterable[Path], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Tasks that result files hold of the same model; of one that is in several, the last."""
    done: dict[str, Any] = {}
    for path in paths:
        try:
            old = json.loads(path.read_text(encoding='utf-8'))
        except (OSError, ValueError):
            continue
        if all(old.get('settings', {}).get(key) == settings[key] for key in _SAME):
            done |= old.get('tasks', {})
    return done


def evaluate(
    model: Path | PretrainedModel,
    suite: Mapping[str, Any],
    device: str,
    batch_size: int,
    limit: int | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Evaluate a model on a suite, going on from what was done before.

    The result file is written after every task. A task is not run again if it was with the same suite entry, limit,
    release of lm-eval (which fixes its task versions), model files and local data files, or these are gone. Runs whose
    folders stand side by side share what one of them has measured of the pretrained model that they began from.

    Args:
        model: The folder of a Hugging Face model, or the pretrained model of a run.
        suite: Of :func:`load_suite`.
        device: ``cpu`` or ``cuda``.
        batch_size: Sequences at once.
        limit: Items of each task at most. Default: ``None``.
        report: Takes one line about every task that could not be run. Default: ``print``.

    Returns:
        What the result file holds: ``{suite, model, tasks: {name: {task, version, num_fewshot, metric,
        higher_is_better, score, stderr, count, values, weights, items, entry, data}}, missing: {name: reason},
        settings}``. ``items`` is the identity of the items, ``entry`` and ``data`` are what the task was run with.

    Raises:
        ValueError: If the model cannot be loaded.
    """
    path = result_file(model, suite, limit)
    folder, others = (
        (model, []) if isinstance(model, Path) else (folder_of_pretrained(model.name), _of_other_runs(path))
    )
    settings = {
        'lm_eval': version('lm_eval'),
        'limit': limit,
        'model_files': {f.name: _stat(f) for f in sorted(folder.iterdir()) if f.is_file() and f.suffix != '.py'},
        'device': device,
        'batch_size': batch_size,
    }
    done = _done([*others, path], settings)
    result: dict[str, Any] = {'suite': path.parent.name, 'tasks': {}}
    result |= {'model': str(model) if isinstance(model, Path) else model.name}
    result |= {'missing': dict(suite.get('missing') or {}), 'settings': settings}
    loaded: Any = None
    for name, entry in suite['tasks'].items():
        reason = _unavailable(entry['task'])
        data = {} if reason else {file: _stat(Path(file)) for file in _data_files(entry['task'])}
        # results outlive their data
        if name in done and done[name]['entry'] == entry and (reason or done[name]['data'] == data):
            result['tasks'][name] = done[name]
            continue
        if not reason:
            try:
                tasks = _build(entry)
            except Exception as error:
                reason = f'its data cannot be loaded: {_short(error)}'
            else:
                loaded = loaded or load_model(folder, device, batch_size)
                try:
                    result['tasks'][name] = {**_run(loaded, tasks, entry, limit), 'entry': dict(entry), 'data': data}
                except Exception as error:  # one task of many: the others are worth having
                    reason = f'it failed: {_short(error)}'
        if reason:
            result['missing'][name] = reason
            report(f'{name}: {reason}')
        write_json(path, {**result, 'tasks': {**done, **result['tasks']}})
    # what other suites of this name have asked is kept
    kept = {name: task for name, task in done.items() if name not in suite['tasks']}
    write_json(path, {**result, 'tasks': {**kept, **result['tasks']}})
    return result


def _of_other_runs(path: Path) -> list[Path]:
    """Results of pretrained models in the runs beside the one whose ``base.json`` is given."""
    run = path.parents[3]
    return sorted(run.parent.glob(f'*/{path.relative_to(run)}'))


def evaluate_all(
    models: Sequence[Sequence[Path]],
    parents: Sequence[Path | PretrainedModel | None],
    suite: Mapping[str, Any],
    device: str | None = None,
    batch_size: int = 16,
    limit: int | None = None,
) -> dict[Path | PretrainedModel, dict[str, Any]]:
    """Evaluate models and what they are compared with, each once.

    Args:
        models: Models of each run.
        parents: Of each run, what its models are compared with.
        suite: Of :func:`load_suite`.
        device: ``cpu`` or ``cuda``. Default: ``cuda`` if there is one.
        batch_size: Sequences at once. Default: ``16``.
        limit: Items of each task at most. Default: ``None``.

    Returns:
        ``{model or parent: result of evaluate}``.

    Raises:
        ValueError: If a model cannot be loaded.
    """
    _quiet()
    if device is None:
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    print_once = cache(print)  # a task is missing for all models
    wanted = [model for parent, found in zip(parents, models, strict=True) for model in (parent, *found) if model]
    return {model: evaluate(model, suite, device, batch_size, limit, print_once) for model in dict.fromkeys(wanted)}


def _quiet() -> None:
    """Leaves lm-eval's progress bars and what goes wrong, and keeps what is offline offline."""
    if os.environ.get('HF_HUB_OFFLINE'):
        os.environ.setdefault('HF_DATASETS_OFFLINE', os.environ['HF_HUB_OFFLINE'])
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
    warnings.filterwarnings('ignore', module=r'(llmfoundry|composer|transformers|torch|lm_eval)\b')
    from transformers.utils import logging as of_transformers

    of_transformers.set_verbosity_error()
    logging.getLogger('lm_eval').setLevel(logging.WARNING)
    logging.getLogger('lm_eval.models').setLevel(logging.ERROR)  # it warns of every model that is loaded already


def _build(entry: Mapping[str, Any]) -> Any:
    """The tasks of an entry with their data, as ``lm_eval.simple_evaluate`` makes them.

    That one would leave the shots of tasks alone that say 0, and takes a second each time to describe the machine.
    """
    random.seed(DEFAULT_RANDOM_SEED)  # some tasks shuffle choices when they are loaded
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    task = entry['task']
    loaded = _task_manager(isinstance(task, str)).load([task if isinstance(task, str) else dict(task)])
    for leaf in loaded['tasks'].values():
        leaf.set_config('num_fewshot', entry['num_fewshot'])
        leaf.set_fewshot_seed(DEFAULT_OTHER_SEED)
    return loaded


def _run(model: Any, loaded: Any, entry: Mapping[str, Any], limit: int | None) -> dict[str, Any]:
    """Run one entry and keep the value of every item."""
    lm_eval: Any = import_module('lm_eval')
    metric, _, chosen = str(entry['metric']).partition(',')
    for leaf, task in loaded['tasks'].items():
        if metric not in task.aggregation():
            raise ValueError(f'metric {metric!r} is not one of {leaf}: {", ".join(task.aggregation())}')
    found = lm_eval.evaluate(lm=model, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    values: list[float] = []
    weights: list[float] = []
    items = hashlib.blake2b(digest_size=16)
    for leaf, samples in found['samples'].items():
        filters = list(dict.fromkeys(sample['filter'] for sample in samples))
        used = chosen or filters[0]
        if used not in filters or not chosen and len(filters) > 1:
            raise ValueError(f'metric: one of {", ".join(f"{metric},{name}" for name in filters)} is possible')
        samples = sorted((s for s in samples if s['filter'] == used), key=lambda sample: sample['doc_id'])
        pairs = [_value(metric, sample[metric]) for sample in samples]
        ours = score([value for value, _ in pairs], [weight for _, weight in pairs]).value
        theirs = found['results'][leaf][f'{metric},{used}']
        if not isclose(ours, theirs, rel_tol=1e-6, abs_tol=1e-9):
            raise ValueError(f'{metric} of {leaf} is no mean over items: lm-eval says {theirs}, their mean is {ours}')
        values += [value for value, _ in pairs]
        weights += [weight for _, weight in pairs]
        for sample in samples:
            items.update(f'{leaf} {sample["doc_hash"]} {sample["target_hash"]} '.encode())
    name = entry['task'] if isinstance(entry['task'], str) else entry['task']['task']
    total = score(values, weights)
    return {
        'task': name,
        'version': found['versions'].get(name, found['versions'][next(iter(found['samples']))]),
        'num_fewshot': entry['num_fewshot'],
        'metric': entry['metric'],
        'higher_is_better': bool(found['higher_is_better'][next(iter(found['samples']))].get(metric, True)),
        'score': total.value,
        'stderr': total.stderr,
        'count': total.count,
        'values': values,
        'weights': weights,
        'items': items.hexdigest(),
    }


def _value(metric: str, value: Any) -> tuple[float, float]:
    """Value and weight of an item, whole numbers as such: they are shorter in the file."""
    if metric == 'bits_per_byte':
        loglikelihood, num_bytes = value
        return -loglikelihood / log(2), int(num_bytes)
    value = float(value)
    return int(value) if value.is_integer() else value, 1


# Comparison


@dataclass(frozen=True)
class Row:
    """A task of a suite, or the mean of several, as a table shows it.

    Args:
        name: As the suite calls it.
        num_fewshot: Examples in the prompt; ``None`` of a mean.
        metric: The metric; empty of a mean.
        is_accuracy: Whether it is a mean of items that are better the higher.
        score: Of the model.
        parent: Of the parent; ``None`` if that is not there.
        delta: Model minus parent, paired; ``None`` if the parent has not answered the same items.
    """

    name: str
    num_fewshot: int | None
    metric: str
    is_accuracy: bool
    score: Mean
    parent: Mean | None
    delta: Mean | None


def _mean(task: Mapping[str, Any]) -> Mean:
    return Mean(task['score'], task['stderr'], task['count'])


def compare(result: Mapping[str, Any], parent: Mapping[str, Any] | None) -> list[Row]:
    """The tasks of a result beside the parent's, and the mean over those that measure an accuracy.

    Args:
        result: Of :func:`evaluate`, or its file.
        parent: Likewise; ``None`` for a model without.
    """
    rows: list[Row] = []
    for name, task in result['tasks'].items():
        theirs = (parent or {'tasks': {}})['tasks'].get(name)
        same = theirs is not None and all(theirs[key] == task[key] for key in ('entry', 'items', 'weights'))
        delta = paired_delta(task['values'], theirs['values'], task['weights']) if theirs and same else None
        is_accuracy = task['higher_is_better'] and set(task['weights']) == {1}
        theirs = _mean(theirs) if theirs else None
        rows.append(Row(name, task['num_fewshot'], task['metric'], is_accuracy, _mean(task), theirs, delta))
    averaged = [row for row in rows if row.is_accuracy]
    if len(averaged) > 1:
        parents = [row.parent for row in averaged if row.parent and row.delta]
        deltas = [row.delta for row in averaged if row.delta]
        whole = len(deltas) == len(averaged)
        average = mean_over_tasks([row.score for row in averaged])
        both = (mean_over_tasks(parents), mean_over_tasks(deltas)) if whole else (None, None)
        rows.append(Row(f'mean of {len(averaged)}', None, '', True, average, *both))
    return rows


# Printing


def _cell(mean: Mean | None, is_accuracy: bool, sign: str = '') -> str:
    """A number with its standard error, in percent or as it is."""
    if mean is None:
        return '-'
    if is_accuracy:
        return f'{100 * mean.value:{sign}.2f} ± {100 * mean.stderr:.2f} %'
    return f'{mean.value:{sign}.4f} ± {mean.stderr:.4f}'


def _verdict(row: Row) -> str:
    """What a difference means."""
    if row.delta is None:
        return ''
    if within_noise(row.delta):
        return 'within noise'
    arrow = '↑' if row.delta.value > 0 else '↓'
    return f'{arrow} better' if (row.delta.value > 0) == row.is_accuracy else f'{arrow} worse'


def print_result(result: dict[str, Any], parent: dict[str, Any] | None) -> None:
    """One model, beside its parent if it has one."""
    title = f'{result["model"]}: {result["suite"]}' + (f', against {parent["model"]}' if parent else '')
    table = Table('task', title=escape(title), title_justify='left', box=box.SIMPLE)
    for column in ('shots', 'n', 'score', *(('parent', 'delta') if parent else ())):
        table.add_column(column, justify='right', no_wrap=True)
    table.add_column('')
    for row in compare(result, parent):
        shots = ['', ''] if row.num_fewshot is None else [str(row.num_fewshot), f'{row.score.count:,}']
        cells = [escape(row.name), *shots, _cell(row.score, row.is_accuracy)]
        if parent:
            cells += [_cell(row.parent, row.is_accuracy), _cell(row.delta, row.is_accuracy, '+'), _verdict(row)]
        table.add_row(*cells)
    for name in result['missing']:
        table.add_row(escape(name), '', '', 'missing')
    Console(width=None if sys.stdout.isatty() else 120).print(table)
