# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of exported models with lm-eval, item by item, so that a model and its parent are compared in pairs."""

import hashlib
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import version
from math import isclose, isnan, log
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from cpt_algorithms.checkpoints.exports import (
    CARD,
    RECIPE,
    PretrainedModel,
    folder_of_pretrained,
    load_export,
    models_of,
    parent_of,
)
from cpt_algorithms.evaluation.functional import (
    Flips,
    Mean,
    cuts_of,
    flips,
    has_same_items,
    is_accuracy,
    mean_over_tasks,
    paired_delta,
    score,
    shots_of,
    within_noise,
)
from cpt_algorithms.evaluation.suite import Suite, SuiteTask, load_tasks, read_result, why_unavailable
from cpt_algorithms.files import nearest_existing, write_json
from cpt_algorithms.formatting import one_line
from cpt_algorithms.terminal import make_console, print_table

# lm-eval, torch and transformers take 15 s to import, and are imported where they are used.

__all__ = ['Row', 'compare', 'evaluate_runs', 'load_model', 'print_result']


def load_model(folder: Path, device: str, batch_size: int) -> Any:
    """An exported model as lm-eval uses it: see :func:`~cpt_algorithms.checkpoints.exports.load_export`.

    Raises:
        ValueError: If it cannot be loaded, or not all of its weights are there.
    """
    huggingface: Any = import_module('lm_eval.models.huggingface')
    model, tokenizer, max_length = load_export(folder, device)
    kind = _counting_cuts(huggingface.HFLM)
    return kind(model, backend='causal', tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)


def _counting_cuts(kind: Any) -> Any:
    """lm-eval's model, which also counts prompts and those of them that it cuts to the model's length, on the left."""

    class Counting(kind):
        prompts = cut = 0

        def _count(self, lengths: Sequence[int], most: int) -> None:
            self.prompts += len(lengths)
            self.cut += sum(length > most for length in lengths)

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            # the last token is predicted, and not read
            self._count([len(context) + len(rest) for _, context, rest in requests], self.max_length + 1)
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

        def tok_batch_encode(self, strings: Any, *args: Any, **kwargs: Any) -> Any:
            if most := kwargs.get('left_truncate_len'):
                _, mask = super().tok_batch_encode(strings, *args, **{**kwargs, 'left_truncate_len': None})
                self._count(mask.sum(1).tolist(), most)
            return super().tok_batch_encode(strings, *args, **kwargs)

    return Counting


def evaluate_runs(
    runs: Sequence[Path],
    suite: Suite,
    parent: Path | None = None,
    device: str | None = None,
    batch_size: int = 16,
    limit: int | None = None,
) -> dict[Path, dict[str, Any]]:
    """Evaluate exported models of runs beside their parents, each once, print the scores and keep those of every item.

    Results go to ``lm_eval/<suite>/<model>.json`` beside the model; those of a pretrained model, or of a parent whose
    folder cannot be written, to ``base.json`` beside the run's own, and runs whose folders stand side by side share
    them. The file is written after every task. A task is not run again if suite entry, limit, release of lm-eval (which
    fixes its task versions), model files and the rows of its data, wherever ``datasets`` has them from, are the same,
    or the data cannot be had any more. A task that fails is noted, and the others are run.

    Args:
        runs: Folders of runs, whose newest export and averages are evaluated, or of Hugging Face models.
        suite: Of :func:`load_suite`.
        parent: The run or model that all are compared with. Default: what each run's ``stage.json`` names.
        device: ``cpu`` or ``cuda``. Default: ``cuda`` if there is one.
        batch_size: Sequences at once. Default: ``16``.
        limit: Items of each task at most; such results go to ``lm_eval/<suite>-limit<N>``. Default: ``None``.

    Returns:
        What the file of each model holds: ``{suite, model, tasks: {name: {task, version, num_fewshot, metric,
        higher_is_better, score, stderr, count, values, weights, choices, items, prompts, cut, entry, data}}, missing:
        {name: reason}, settings}``. ``choices`` are those of each item, of a task that has some, ``items`` is the
        identity of the items, ``cut`` how many of the ``prompts`` were too long for the model and lost their
        beginning, ``entry`` and ``data``, a hash, are what the task was run with.

    Raises:
        ValueError: If a model is not there or cannot be loaded.
    """
    import torch

    say = cache(print)  # a task is missing for all models
    given = models_of(parent)[0] if parent else None

    def parent_if_there(run: Path) -> Path | PretrainedModel | None:
        try:
            found = given or parent_of(run)
        except ValueError as missing:
            say(str(missing))
            return None
        if isinstance(found, Path) and not _is_writable(found.parent):
            return PretrainedModel(str(found), models_of(run)[0].parent)
        return found

    models = {model: run for run in runs for model in models_of(run)}
    for model in models:
        if not _is_writable(model.parent):
            raise ValueError(
                f'{model}: results go to lm_eval/ beside it, and {model.parent} cannot be written: copy it'
            )
    parents = {run: parent_if_there(run) for run in runs}
    _quiet()
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    results: dict[Path | PretrainedModel | None, Any] = {None: None}
    for model in dict.fromkeys([*parents.values(), *models]):
        if model:
            results[model] = _evaluate(model, suite, device, batch_size, limit, say)
    for model, run in models.items():
        print_result(results[model], results[parents[run]])
    return {model: results[model] for model in models}


def _evaluate(
    model: Path | PretrainedModel,
    suite: Suite,
    device: str,
    batch_size: int,
    limit: int | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    import torch

    of_suite = Path('lm_eval') / (suite.name if limit is None else f'{suite.name}-limit{limit}')
    if isinstance(model, Path):
        folder, name, path = model, str(model), model.parent / of_suite / f'{model.name}.json'
        files = [path]
    else:
        folder, name, path = folder_of_pretrained(model.name), model.name, model.beside / of_suite / 'base.json'
        files = [*sorted(model.beside.parents[1].glob(f'*/{model.beside.name}/{of_suite}/base.json')), path]
    others = (CARD, RECIPE)
    files_of_model = [f for f in sorted(folder.iterdir()) if f.is_file() and f.suffix != '.py' and f.name not in others]
    same = {
        'lm_eval': version('lm_eval'),
        'limit': limit,
        'model_files': {f.name: [(stat := f.stat()).st_size, stat.st_mtime_ns] for f in files_of_model},
    }
    known: dict[str, Any] = {}
    for old in filter(None, map(read_result, files)):
        known |= old['tasks'] if same.items() <= old['settings'].items() else {}

    entries = {task: entry.model_dump() for task, entry in suite.tasks.items()}
    done = {task: old for task, old in known.items() if task in entries and old['entry'] == entries[task]}
    result = {'suite': of_suite.name, 'model': name, 'tasks': done, 'missing': dict(suite.missing)}
    result |= {'settings': {**same, 'device': device, 'batch_size': batch_size}}
    loaded_model = None
    for task, entry in suite.tasks.items():
        reason, loaded, data = why_unavailable(entry), None, ''
        if not reason:
            try:
                loaded = load_tasks(entry)
                data = _hash_rows(loaded)
            except Exception as error:  # one task of many: the others are worth having
                reason = f'it failed: {_one_line(error)}'
        if task in done and (reason or done[task]['data'] == data):  # which outlives its data
            reason = None
        else:
            done.pop(task, None)
            if not reason:
                with torch.random.fork_rng(devices=[]):  # from which samples are drawn
                    loaded_model = loaded_model or load_model(folder, device, batch_size)
                try:
                    done[task] = {**_run(loaded_model, entry, loaded, limit), 'entry': entries[task], 'data': data}
                except Exception as error:
                    reason = f'it failed: {_one_line(error)}'
        if reason:
            result['missing'][task] = reason
            say(f'{task}: {reason}')
        result['tasks'] = {each: done[each] for each in entries if each in done}
        write_json(path, result)
    return result


def _is_writable(folder: Path) -> bool:
    return os.access(nearest_existing(folder / 'lm_eval'), os.W_OK)


def _one_line(error: BaseException) -> str:
    text = one_line(error)
    return f'{type(error).__name__}: {text[:200]}{"..." if len(text) > 200 else ""}'


def _quiet() -> None:
    """Silence all but lm-eval's progress bars and errors, and stay offline where the hub is."""
    if os.environ.get('HF_HUB_OFFLINE'):
        os.environ.setdefault('HF_DATASETS_OFFLINE', os.environ['HF_HUB_OFFLINE'])
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
    warnings.filterwarnings('ignore', module=r'(llmfoundry|composer|transformers|torch|lm_eval)\b')
    import datasets
    from transformers.utils import logging as of_transformers

    datasets.disable_progress_bars()  # local data is read again for every model
    of_transformers.set_verbosity_error()
    logging.getLogger('lm_eval').setLevel(logging.WARNING)
    logging.getLogger('lm_eval.models').setLevel(logging.ERROR)  # it warns of every model that is loaded already


def _hash_rows(loaded: Any) -> str:
    """A hash of all rows that tasks have, whether files, folders, the hub or its cache hold them."""
    content = hashlib.blake2b(digest_size=16)
    for name, task in loaded['tasks'].items():
        for split, rows in task.dataset.items():
            content.update(f'{name} {split} {rows.features} '.encode())
            for table in rows.with_format('arrow').iter(1000):
                for batch in table.combine_chunks().to_batches():
                    content.update(batch.serialize())
    return content.hexdigest()


def _run(model: Any, entry: SuiteTask, loaded: Any, limit: int | None) -> dict[str, Any]:
    """Run a task that is loaded, and keep the value of every item."""
    lm_eval: Any = import_module('lm_eval')
    metric, _, wanted = entry.metric.partition(',')
    for leaf, task in loaded['tasks'].items():
        if metric not in task.aggregation():
            raise ValueError(f'metric {metric!r} is not one of {leaf}: {", ".join(task.aggregation())}')
    model.prompts = model.cut = 0
    found = lm_eval.evaluate(lm=model, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    pairs: list[tuple[float, float]] = []
    choices: list[int] = []
    items = hashlib.blake2b(digest_size=16)
    for leaf, samples in found['samples'].items():
        filters = list(dict.fromkeys(sample['filter'] for sample in samples))
        used = wanted or filters[0]
        if used not in filters or not wanted and len(filters) > 1:
            raise ValueError(f'metric: one of {", ".join(f"{metric},{name}" for name in filters)} is possible')
        samples = sorted((s for s in samples if s['filter'] == used), key=lambda sample: sample['doc_id'])
        of_leaf = [_value(metric, sample[metric]) for sample in samples]
        ours, theirs = score(*zip(*of_leaf, strict=True)).value, found['results'][leaf][f'{metric},{used}']
        if not isclose(ours, theirs, rel_tol=1e-6, abs_tol=1e-9) and not (isnan(ours) and isnan(theirs)):
            raise ValueError(f'{metric} of {leaf} is no mean over items: lm-eval says {theirs}, their mean is {ours}')
        pairs += of_leaf
        task = loaded['tasks'][leaf]
        if task.OUTPUT_TYPE == 'multiple_choice' and metric.startswith('acc'):
            choices += [len(task.doc_to_choice(sample['doc'])) for sample in samples]
        for sample in samples:
            items.update(f'{leaf} {sample["doc_hash"]} {sample["target_hash"]} '.encode())
    values, weights = map(list, zip(*pairs, strict=True))
    total = score(values, weights)
    first = next(iter(found['samples']))
    return {
        'task': entry.name,
        'version': found['versions'].get(entry.name, found['versions'][first]),
        'num_fewshot': entry.num_fewshot,
        'metric': entry.metric,
        'higher_is_better': bool(found['higher_is_better'][first].get(metric, True)),
        'score': total.value,
        'stderr': total.stderr,
        'count': total.count,
        'values': values,
        'weights': weights,
        'choices': choices if len(choices) == len(values) else [],
        'items': items.hexdigest(),
        'prompts': model.prompts,
        'cut': model.cut,
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
    """A task of a suite, or the mean of several, as a table shows it."""

    name: str
    num_fewshot: int | None  # examples in the prompt; None of a mean
    is_accuracy: bool  # whether it is a mean of items that are better the higher
    score: Mean
    parent: Mean | None  # the parent's score, if that is there
    delta: Mean | None  # model minus parent, paired; None if the parent has not answered the same items
    flips: Flips | None = None  # items that changed sides, if the parent has answered the same ones
    cut: str = ''  # how many prompts did not fit the model, and lost their beginning

    @property
    def shots(self) -> str:
        """Examples in the prompt: at most so many, if some prompts were cut."""
        return shots_of(self.num_fewshot, bool(self.cut))

    def cell(self, mean: Mean | None, sign: str = '') -> str:
        """A number of it with its standard error, in percent or as it is."""
        if mean is None:
            return '-'
        scale, digits, unit = (100, 2, ' %') if self.is_accuracy else (1, 4, '')
        return f'{scale * mean.value:{sign}.{digits}f} ± {scale * mean.stderr:.{digits}f}{unit}'

    @property
    def verdict(self) -> str:
        """The difference in words."""
        if self.delta is None or isnan(self.delta.value):
            return ''
        if within_noise(self.delta):
            return 'within noise'
        is_up = self.delta.value > 0
        return f'{"↑" if is_up else "↓"} {"better" if is_up == self.is_accuracy else "worse"}'


def compare(result: Mapping[str, Any], parent: Mapping[str, Any] | None) -> list[Row]:
    """The tasks of a result beside the parent's, if it has one, and the mean over those that measure an accuracy."""
    rows: list[Row] = []
    for name, task in result['tasks'].items():
        theirs, delta, changed = parent['tasks'].get(name) if parent else None, None, None
        if theirs and has_same_items(task, theirs):
            delta = paired_delta(task['values'], theirs['values'], task['weights'])
            changed = flips([(task['values'], theirs['values'])], task.get('choices')) if is_accuracy(task) else None
        of_parent, is_share = _mean_of(theirs) if theirs else None, is_accuracy(task)
        shots, cut = task['num_fewshot'], cuts_of(task)
        rows.append(Row(name, shots, is_share, _mean_of(task), of_parent, delta, changed, cut))
    scored = [row for row in rows if row.is_accuracy]
    if len(scored) > 1:
        paired = [(row.parent, row.delta) for row in scored if row.parent and row.delta]
        both = [mean_over_tasks(means) for means in zip(*paired, strict=True)] if len(paired) == len(scored) else []
        theirs, delta = both or (None, None)
        scores = mean_over_tasks([row.score for row in scored])
        rows.append(Row(f'mean of {len(scored)}', None, True, scores, theirs, delta))
    return rows


def _mean_of(task: Mapping[str, Any]) -> Mean:
    return Mean(task['score'], task['stderr'], task['count'])


def print_result(result: Mapping[str, Any], parent: Mapping[str, Any] | None) -> None:
    """Print what :func:`compare` finds."""
    title = f'{result["model"]}: {result["suite"]}' + (f', against {parent["model"]}' if parent else '')
    table = Table('task', title=escape(title), title_justify='left', box=box.SIMPLE)
    rows = compare(result, parent)
    is_cut = any(row.cut for row in rows)
    heads = ('shots', *(('prompts cut',) if is_cut else ()), 'n', 'score', *(('parent', 'delta') if parent else ()))
    for column in heads:
        table.add_column(column, justify='right', no_wrap=True)
    table.add_column('')
    for row in rows:
        against = [row.cell(row.parent), row.cell(row.delta, '+'), row.verdict] if parent else []
        count = '' if row.num_fewshot is None else f'{row.score.count:,}'
        table.add_row(escape(row.name), row.shots, *([row.cut] if is_cut else []), count, row.cell(row.score), *against)
    for name in result['missing']:
        table.add_row(escape(name), *[''] * (heads.index('score')), 'missing')
    print_table(table, console := make_console())
    if any(row.flips for row in rows):
        print_table(_flips_table(rows), console)


def _flips_table(rows: Sequence[Row]) -> Table:
    table = Table('task', title='items that changed sides, in % ± 95 % interval', title_justify='left', box=box.SIMPLE)
    heads = ('right before,\nwrong now', 'wrong before,\nright now', 'each by guessing,\nat most')
    for column in (*heads, 'lost,\nat least', 'gained,\nat least'):
        table.add_column(column, justify='right')
    for row in rows:
        if found := row.flips:
            chance = f'{100 * found.chance:.1f}'
            beyond = (_share(each) if each.value > 0 else '0' for each in (found.truly_lost, found.truly_gained))
            table.add_row(escape(row.name), _share(found.lost), _share(found.gained), chance, *beyond)
    return table


def _share(mean: Mean) -> str:
    return f'{100 * mean.value:.1f} ± {196 * mean.stderr:.1f}'
