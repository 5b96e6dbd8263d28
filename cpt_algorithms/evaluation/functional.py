# SPDX-License-Identifier: Apache-2.0
"""Forgetting, adaptation and cost: arithmetic on validation losses and scores of benchmarks."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, log, sqrt
from statistics import fmean
from typing import Any, TypeVar

__all__ = [
    'Flips',
    'Mean',
    'adaptation',
    'bits_per_byte',
    'by_average',
    'changes',
    'check_labels',
    'cuts_of',
    'final_loss',
    'flips',
    'forgetting',
    'has_diverged',
    'has_same_items',
    'in_final_window',
    'is_accuracy',
    'is_point',
    'mean_over_tasks',
    'name_of_point',
    'paired_delta',
    'score',
    'shots_of',
    'split_label',
    'steps_saved',
    'thinned',
    'training_flops',
    'within_noise',
    'without_averages',
]


Value = TypeVar('Value')


@dataclass(frozen=True)
class Mean:
    """A mean of ``count`` values with its standard error, which is 0 for a single value."""

    value: float
    stderr: float
    count: int


def in_final_window(batches_left: int, window: int, interval: int) -> bool:
    """Whether the final-loss protocol evaluates when this many batches are left.

    At the end and every ``interval`` batches before it, over the last ``window`` batches: with 100 and 10, when 90, 80,
    ..., 10, 0 batches are left.
    """
    return 0 <= batches_left < window and batches_left % interval == 0


def final_loss(losses: Sequence[float]) -> Mean:
    r"""Final loss: the mean of the losses evaluated in the final window, with its standard error.

    :math:`\bar L = \frac1n \sum L_i`, :math:`s = \sqrt{\sum (L_i - \bar L)^2 / (n - 1)} / \sqrt n`.

    Source: Ibrahim et al. 2024, captions of Tables 2-4.
    """
    if not losses:
        raise ValueError('no loss was evaluated in the final window; is max_duration reached?')
    mean = sum(losses) / len(losses)
    variance = sum((loss - mean) ** 2 for loss in losses) / max(len(losses) - 1, 1)
    return Mean(mean, sqrt(variance / len(losses)), len(losses))


def forgetting(loss: float, parent_loss: float) -> float:
    """Validation loss on an old dataset minus the parent's; positive means that something was forgotten."""
    return loss - parent_loss


def adaptation(loss: float, parent_loss: float) -> float:
    """The parent's validation loss on the new dataset minus the loss now; positive means that something was learned."""
    return parent_loss - loss


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    r"""Loss that can be compared between tokenizers: :math:`L / \ln 2 / b`, with b UTF-8 bytes per predicted token."""
    return loss / log(2) / bytes_per_token


# What the callbacks ema and lawa call their averages, and what points of a line between two models are called.
_AVERAGE = re.compile(r'lawa|ema_[^/]+|alpha_[^/]+')
_POINT = 'alpha_'


def split_label(label: str, datasets: Iterable[str]) -> tuple[str, str] | None:
    """The dataset and the average that a label of an evaluator means; None if it is on no such dataset.

    Args:
        label: A dataset, or ``<dataset>/<average>`` for averaged weights. Names of datasets may hold slashes.
        datasets: Those that are known.
    """
    known = {*datasets}
    if label in known:
        return label, ''
    dataset, _, average = label.rpartition('/')
    return (dataset, average) if dataset in known and _AVERAGE.fullmatch(average) else None


def name_of_point(alpha: float) -> str:
    """What the model ``(1 - alpha) parent + alpha child`` is called, beside averages."""
    return f'{_POINT}{alpha:g}'


def is_point(average: str) -> bool:
    """Whether it is one of these."""
    return average.startswith(_POINT)


def by_average(losses: Mapping[str, Value], datasets: Iterable[str]) -> dict[str, dict[str, Value]]:
    """``{average: {dataset: loss}}``, with the training weights under ''.

    Args:
        losses: ``{label: loss}``; see :func:`split_label`.
        datasets: Those wanted; others are left out.
    """
    wanted = list(datasets)
    result: dict[str, dict[str, Value]] = {}
    for label, loss in losses.items():
        if found := split_label(label, wanted):
            result.setdefault(found[1], {})[found[0]] = loss
    return result


def without_averages(labels: Iterable[str]) -> list[str]:
    """The datasets among labels of evaluators, in order and each once, without ``<dataset>/<average>``."""
    names = list(dict.fromkeys(labels))
    return [name for name in names if not split_label(name, [other for other in names if other != name])]


def check_labels(labels: Sequence[str]) -> None:
    """Refuse names of datasets that results could not be told apart by.

    Raises:
        ValueError: If one is there twice, is ``mean``, or is what the results of another are called.
    """
    for label in labels:
        if label == 'mean':
            raise ValueError("eval_loader: 'mean' is the mean over all datasets in results; give it another label")
        if (count := labels.count(label)) > 1:
            raise ValueError(f'eval_loader: {count} loaders have the label {label!r}; name them differently')
        others = [other for other in labels if other != label]
        found = [other for other in others if label in (f'{other}_stderr', f'{other} interval')]
        found += [split[0]] if (split := split_label(label, others)) else []
        for other in found[:1]:
            raise ValueError(f'eval_loader: a result of {other!r} is called {label!r}, too; give it another label')


def changes(
    losses: Mapping[str, float], parent: Mapping[str, float], old: Sequence[str], new: Sequence[str]
) -> dict[str, float]:
    """Forgetting of every old dataset, adaptation to every new one, and their means, against the untouched parent.

    Args:
        losses: As in :func:`by_average`.
        parent: ``{dataset: loss of the parent's weights}``.
        old: Datasets learned before.
        new: Datasets of this stage.

    Returns:
        ``{'forgetting/<label>': ..., 'forgetting/mean[/<average>]': ..., 'adaptation/<label>': ..., ...}``.
    """
    result: dict[str, float] = {}
    for average, of in by_average(losses, [*old, *new]).items():
        suffix = f'/{average}' if average else ''
        for key, datasets, change in (('forgetting', old, forgetting), ('adaptation', new, adaptation)):
            changed = {name: change(of[name], parent[name]) for name in datasets if name in of}
            result |= {f'{key}/{name}{suffix}': value for name, value in changed.items()}
            if changed and len(changed) == len(datasets):
                result[f'{key}/mean{suffix}'] = sum(changed.values()) / len(changed)
    return result


def score(values: Sequence[float], weights: Sequence[float]) -> Mean:
    r"""The score of a task with its standard error, by linearisation of the ratio.

    :math:`r = \sum v_i / \sum w_i`, :math:`s^2 = \frac{n}{n-1} \sum (v_i - r w_i)^2 / (\sum w_i)^2`. With weights 1,
    the mean and its usual standard error. Items are taken as independent, also those from one document.

    Args:
        values: Of each item: accuracy, exact match, or bits.
        weights: Of each item: 1, or bytes for bits per byte.

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

    Items that both models get right, or wrong, cancel: this is much less than the two scores' errors together. The
    weights of items do not depend on the model.
    """
    return score([ours - theirs for ours, theirs in zip(values, parent_values, strict=True)], weights)


@dataclass(frozen=True)
class Flips:
    """Items that a model answers otherwise than its parent, as shares of all items.

    Args:
        lost: Right before and wrong now.
        gained: Wrong before and right now.
        chance: The most of each that guessing gives by itself; 0 where nothing can be guessed.
        truly_lost: At least so many were known before and are not now; below 0 where guesses were kept.
        truly_gained: The reverse.
    """

    lost: Mean
    gained: Mean
    chance: float
    truly_lost: Mean
    truly_gained: Mean


def flips(answers: Sequence[tuple[Sequence[float], Sequence[float]]], choices: Sequence[int] | None) -> Flips | None:
    r"""How many items changed sides: what the change of a score hides, in which lost and gained ones cancel.

    Who does not know an item of k choices guesses it, right with probability 1/k. Items that both models get wrong
    (a share :math:`w`) neither knows. If they guess independently, as many as :math:`w / (k - 1)` are right by luck
    before and wrong now, and as many the reverse; a model that keeps its parent's guesses has fewer of both. So items
    that were known and are not are at least :math:`(\text{lost} - w / (k - 1)) \cdot k / (k - 1)`, as some of them are
    guessed now, and at most all that were lost. Means over items, each with its own k.

    Args:
        answers: Of each seed, 1 or 0 of every item, of the model and of its parent.
        choices: Of every item, those that it is chosen from; empty where nothing is; None if not known.

    Returns:
        None if items are not right or wrong, or what could be guessed is not known.

    Source: Harmon et al. 2025, *Mapping Post-Training Forgetting in Language Models at Scale*, who take what is guessed
    from the two accuracies; taking it from what both get wrong needs no assumption on which items the two know.
    """
    if choices is None or not all(value in (0, 1) for seed in answers for values in seed for value in values):
        return None
    luck = [1 / (k - 1) if k > 1 else 0.0 for k in choices] or [0.0] * len(answers[0][0])

    def over_items(of_item: Callable[[float, float, float], float]) -> Mean:
        seeds = [[of_item(*each) for each in zip(ours, theirs, luck, strict=True)] for ours, theirs in answers]
        return score([fmean(item) for item in zip(*seeds, strict=True)], [1] * len(luck))

    return Flips(
        over_items(lambda now, before, _: before * (1 - now)),
        over_items(lambda now, before, _: now * (1 - before)),
        over_items(lambda now, before, g: g * (1 - now) * (1 - before)).value,
        over_items(lambda now, before, g: (1 + g) * (1 - now) * (before - g * (1 - before))),
        over_items(lambda now, before, g: (1 + g) * (1 - before) * (now - g * (1 - now))),
    )


def is_accuracy(result: Mapping[str, Any]) -> bool:
    """Whether a task's score is a mean over items, and better the higher."""
    return result['higher_is_better'] and set(result['weights']) == {1}


def has_same_items(result: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether another model has answered the same items of a task, in the same way."""
    return all(other.get(key) == result.get(key) for key in ('entry', 'items', 'weights', 'cut'))


def cuts_of(result: Mapping[str, Any]) -> str:
    """How many prompts of a task did not fit the model and lost their beginning: ``3 of 36``; nothing if none."""
    return f'{result["cut"]:,} of {result["prompts"]:,}' if result.get('cut') else ''


def shots_of(num_fewshot: int | None, is_cut: bool) -> str:
    """Examples in the prompt, in words: at most so many, if some prompts were cut."""
    return '' if num_fewshot is None else f'≤ {num_fewshot}' if is_cut and num_fewshot else str(num_fewshot)


def within_noise(delta: Mean) -> bool:
    """Whether 0 lies in the 95 % confidence interval of a difference, +- 1.96 standard errors; always with one item."""
    return delta.count < 2 or abs(delta.value) <= 1.96 * delta.stderr


def mean_over_tasks(means: Sequence[Mean]) -> Mean:
    r"""Mean over tasks, each counting the same: :math:`\frac1k \sum m_j \pm \frac1k \sqrt{\sum s_j^2}`."""
    stderr = sqrt(sum(mean.stderr**2 for mean in means)) / len(means)
    return Mean(sum(mean.value for mean in means) / len(means), stderr, sum(mean.count for mean in means))


def training_flops(num_parameters: int, num_tokens: int) -> float:
    """Floating point operations of training: 6 per parameter and token (forward 2, backward 4)."""
    return 6.0 * num_parameters * num_tokens


def steps_saved(raw: Sequence[Sequence[float]], averaged: Sequence[Sequence[float]], window: float) -> float | None:
    """Share of a run's batches that averaged weights spare until they are as good as its raw weights end.

    The loss to reach is the mean of the raw losses in the last ``window`` batches, which the raw weights have had since
    the middle of these: ``1 - (first batch at which the average is that good) / (last - window / 2)``. The first batch
    is taken on a straight line between evaluations; before the first evaluation of the average nothing is assumed.

    Args:
        raw: ``[[batch, loss], ...]`` of the training weights; instead of batches, shares of the run will do.
        averaged: Likewise of an average.
        window: In the same unit.

    Returns:
        Below 0 if the average is later; ``None`` if it never gets there.
    """
    last = raw[-1][0]
    target = final_loss([loss for batch, loss in raw if batch > last - window]).value
    for index, (batch, loss) in enumerate(averaged):
        if loss <= target:
            if index:
                before, higher = averaged[index - 1]
                batch = before + (higher - target) / (higher - loss) * (batch - before)
            return 1 - batch / (last - window / 2)
    return None


def has_diverged(losses: Sequence[float]) -> bool:
    r"""Whether a run's training loss ended more than :math:`\\ln 2` above its lowest, or as no number.

    The loss is cut into twenty parts of equal length, of which the means are taken; the first batch, of which the loss
    is that of the model before any step, is looked at as well. What has few batches is cut less, never below one each.
    ``losses`` are those of evenly spaced batches.
    """
    if len(losses) < 2:
        return False
    count, most = len(losses), min(len(losses), 20)
    parts = [fmean(losses[part * count // most : (part + 1) * count // most]) for part in range(most)]
    return not isfinite(parts[-1]) or parts[-1] > min(filter(isfinite, [losses[0], *parts])) + log(2)


def thinned(points: list[list[float]], point: list[float], most: int = 2000) -> list[list[float]]:
    """A curve with one point more, and never more than ``most``: then every second one is dropped.

    Points, ``[batch, ...]``, are of every d-th batch for some power of two d; that of the next batch is taken if its
    turn has come.
    """
    step = points[1][0] - points[0][0] if len(points) > 1 else 1
    if points and (point[0] - points[0][0]) % step:
        return points
    return [*points, point] if len(points) < most else thinned(points[::2], point, most)
