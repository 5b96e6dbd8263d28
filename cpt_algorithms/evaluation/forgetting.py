# SPDX-License-Identifier: Apache-2.0
"""``forgetting``: what a stage forgets and learns, against the parent it started from, at every evaluation."""

import json
import logging
from collections.abc import Sequence
from math import exp
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist, format_name_with_dist
from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

from cpt_algorithms.evaluation.final_loss import FinalLoss, batches_left, dataset_of, loss_of
from cpt_algorithms.evaluation.functional import bits_per_byte, by_average, changes
from cpt_algorithms.files import null_as_nan, read_json, write_json
from cpt_algorithms.ranks import on_rank_zero
from cpt_algorithms.replay.labels import label_every_token_of
from cpt_algorithms.validation import nearest

__all__ = ['Forgetting', 'token_bytes']

log = logging.getLogger(__name__)


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor | None:
    """UTF-8 bytes of the text that each token stands for; special tokens stand for none.

    Exact for byte-level BPE (GPT-2, GPT-NeoX, Llama 3) and SentencePiece (Llama 2, T5), also where a token ends in the
    middle of a character.

    Returns:
        int64, shape (vocabulary,); None for a tokenizer of another kind.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.backend_tokenizer.decoder is None:
        return None
    decoder: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.decoder.__getstate__())
    kinds = {part['type'] for part in decoder.get('decoders', [decoder])}
    if not kinds & {'ByteLevel', 'ByteFallback', 'Metaspace'}:
        return None

    def size(token: str) -> int:
        if 'ByteLevel' in kinds:
            return len(token)  # each byte is written as one character
        is_byte = len(token) == 6 and token.startswith('<0x') and token.endswith('>')
        return 1 if is_byte else len(token.replace('\u2581', ' ').encode())

    vocabulary = tokenizer.get_vocab()
    sizes = torch.zeros(max(vocabulary.values()) + 1, dtype=torch.int64)
    for token, index in vocabulary.items():
        sizes[index] = size(token)
    for index, added in tokenizer.added_tokens_decoder.items():
        sizes[index] = 0 if added.special else len(added.content.encode())
    return sizes


class Forgetting(Callback):
    """Forgetting of every old dataset and adaptation to every new one, against the untouched parent.

    The parent, a checkpoint or a pretrained model, is evaluated by ``eval_first: true``, when the stage starts. Its
    losses are part of the run's checkpoints and of ``save_folder/forgetting.json``, and are not evaluated again. At
    every evaluation these are logged, for the training weights and, as ``<dataset>/<average>``, for averaged ones:

    * ``forgetting/<old dataset>`` = loss - the parent's loss, and ``forgetting/mean``;
    * ``adaptation/<new dataset>`` = the parent's loss - loss, and ``adaptation/mean``;
    * ``perplexity/<dataset>`` = exp(loss) and ``bits_per_byte/<dataset>`` = loss / ln 2 / bytes per token.

    The parent against itself is exactly 0. At the end, if ``final_loss`` is among the callbacks, the same follows from
    the final losses, as ``final_forgetting/...`` and ``final_adaptation/...``.

    Args:
        new: Labels of the evaluation datasets of what is learned in this stage.
        old: Labels of those of what was learned before, or of what is most like it. Default: none, and no forgetting is
            measured.
        save_folder: Where ``forgetting.json`` goes, a path or URI; ``{run_name}`` is filled in. Default: ``None``, no
            file.
        metric: Name of the loss among the evaluation metrics. Default: ``LanguageCrossEntropy``.
        parent_losses: The ``forgetting.json`` of another run, a path or URI: that run's parent is compared with, and
            not the model that this one starts from. For a branch, whose stage began with its trunk. Default: ``None``.

    Raises:
        ValueError: If a label is on no evaluation dataset or in both lists, or the parent was not evaluated.

    Cost: one evaluation of every dataset, of the parent.
    """

    def __init__(
        self,
        new: Sequence[str],
        old: Sequence[str] = (),
        save_folder: str | None = None,
        metric: str = 'LanguageCrossEntropy',
        parent_losses: str | None = None,
    ) -> None:
        for key, labels in (('new', new), ('old', old)):
            if isinstance(labels, str) or not (labels or key == 'old'):
                raise ValueError(f'callbacks.forgetting.{key}={labels!r} must be a list of labels, such as [german]')
        if both := [label for label in new if label in old]:
            raise ValueError(f'callbacks.forgetting: {both[0]!r} is both new and old')
        self.new, self.old = list(new), list(old)
        self.save_folder = save_folder
        self.metric = metric
        self.parent_losses = parent_losses
        self.parent: dict[str, float] = {}
        self.bytes_per_token: dict[str, float] = {}
        self._losses: dict[str, float] = {}
        self._token_bytes: torch.Tensor | None = None
        self._counts = torch.zeros(2, dtype=torch.int64)

    def state_dict(self) -> dict[str, Any]:
        """The parent's losses, as one JSON string."""
        return {'parent': json.dumps({'parent': self.parent, 'bytes_per_token': self.bytes_per_token})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        vars(self).update(json.loads(state['parent']))

    def _path(self, state: State) -> str | None:
        if self.save_folder is None:
            return None
        return f'{format_name_with_dist(self.save_folder, state.run_name)}/forgetting.json'

    def after_load(self, state: State, logger: Logger) -> None:
        """Take the parent's losses from the file if the run was stopped before its first checkpoint."""
        labels = [dataset_of(evaluator.label) for evaluator in state.evaluators]  # none if nothing will be trained
        if labels and (unknown := [label for label in (*self.old, *self.new) if label not in labels]):
            raise ValueError(
                f'callbacks.forgetting: no eval_loader has the label {unknown[0]!r}; {nearest(unknown[0], labels)}'
            )
        path = self.parent_losses or self._path(state)
        found = on_rank_zero(lambda: read_json(path) if path is not None and not self.parent else None)
        if found and {*self.old, *self.new} <= set(found['parent']):
            self.parent, self.bytes_per_token = null_as_nan(found['parent']), found['bytes_per_token']

    def fit_start(self, state: State, logger: Logger) -> None:
        """Insist on the parent's losses; they are the first point of the run's curves."""
        if missing := [label for label in (*self.old, *self.new) if label not in self.parent]:
            hint = f'look into {self.parent_losses}' if self.parent_losses else 'set eval_first: true'
            raise ValueError(f'callbacks.forgetting: the parent was not evaluated on {missing[0]!r}; {hint}')
        for callback in () if self.parent_losses else state.callbacks:
            if isinstance(callback, FinalLoss) and not callback.losses:
                callback.losses = {label: [[0, 0, loss, 0.0]] for label, loss in self.parent.items()}

    # the parent

    def eval_standalone_start(self, state: State, logger: Logger) -> None:
        """The evaluation before the first batch is the parent's."""
        if not state.timestamp.batch.value and not self.parent_losses:
            self.parent, self.bytes_per_token = {}, {}
            tokenizer = getattr(getattr(state.model, 'module', state.model), 'tokenizer', None)
            self._token_bytes = token_bytes(tokenizer) if tokenizer is not None else None
            if self._token_bytes is None:
                log.warning('forgetting: the bytes of this tokenizer are not known; there will be no bits per byte')
            else:
                self._token_bytes = state.device.tensor_to_device(self._token_bytes)

    def eval_start(self, state: State, logger: Logger) -> None:
        """Begin to count."""
        label_every_token_of(state)
        self._counts = state.device.tensor_to_device(torch.zeros(2, dtype=torch.int64))

    def eval_before_forward(self, state: State, logger: Logger) -> None:
        """Count the tokens that are predicted, and the bytes they stand for; the forward pass takes the labels away."""
        # of a dataset that is not judged by the loss, labels may be texts
        is_judged = self.metric in state.eval_metrics.get(str(state.dataloader_label), {})
        if self._token_bytes is not None and is_judged:
            # as the loss does: the first token of a row is not predicted, and -100 is padding
            labels = state.batch['labels'][:, 1:]
            predicted = labels[labels >= 0]
            sizes = self._token_bytes[predicted.clamp(max=len(self._token_bytes) - 1)]
            self._counts += torch.stack([torch.tensor(predicted.numel(), device=sizes.device), sizes.sum()])

    def eval_end(self, state: State, logger: Logger) -> None:
        """Keep the loss of the dataset that was just evaluated."""
        loss = loss_of(state, self.metric)
        if loss is None:
            return
        label = dataset_of(str(state.dataloader_label))
        self._losses[label] = loss
        if not state.timestamp.batch.value and not self.parent_losses:
            self.parent[label] = loss
        if self._token_bytes is not None:
            dist.all_reduce(self._counts)
            tokens, size = self._counts.tolist()
            if tokens and size:
                self.bytes_per_token[label] = size / tokens

    def eval_standalone_end(self, state: State, logger: Logger) -> None:
        """Write and log: nothing is forgotten yet."""
        self._token_bytes = None
        path = self._path(state)
        if not state.timestamp.batch.value and path is not None and dist.get_global_rank() == 0:
            saved = {'old': self.old, 'new': self.new, 'parent': self.parent, 'bytes_per_token': self.bytes_per_token}
            write_json(path, saved)
        self._log(logger)

    # the stage

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """Log what has changed; after the last batch, also by the final losses."""
        self._log(logger)
        for callback in state.callbacks:
            if isinstance(callback, FinalLoss) and not batches_left(state):
                final = {label: mean['mean'] for label, mean in callback.final().items()}
                changed = changes(final, self.parent, self.old, self.new)
                logger.log_metrics({f'final_{key}': value for key, value in changed.items()})

    def _log(self, logger: Logger) -> None:
        metrics = changes(self._losses, self.parent, self.old, self.new)
        for average, losses in by_average(self._losses, self.parent).items():
            suffix = f'/{average}' if average else ''
            for dataset, loss in losses.items():
                metrics[f'perplexity/{dataset}{suffix}'] = exp(min(loss, 700))  # beyond it is no float
                if dataset in self.bytes_per_token:
                    size = self.bytes_per_token[dataset]
                    metrics[f'bits_per_byte/{dataset}{suffix}'] = bits_per_byte(loss, size)
        logger.log_metrics(metrics)
        self._losses = {}
