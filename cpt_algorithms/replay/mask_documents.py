# SPDX-License-Identifier: Apache-2.0
"""Documents in a packed row that do not see each other."""

import logging
from typing import Any

import torch
from composer.core import Callback, State
from composer.core.precision import get_precision_context
from composer.loggers import Logger

__all__ = ['MaskDocuments', 'attention_mask_of', 'document_ids', 'positions_of']

log = logging.getLogger(__name__)


# What each attention of transformers takes; flash attention finds documents where positions restart.
ATTENTIONS = ('sdpa', 'eager', 'flash_attention_2')


def document_ids(input_ids: torch.Tensor, eos_token_id: int | None, bos_token_id: int | None) -> torch.Tensor:
    """Which document of its row each token is of, from 0.

    Args:
        input_ids: ``(rows, length)``.
        eos_token_id: The token that ends each document, and belongs to it.
        bos_token_id: Or the one that begins each.
    """
    if eos_token_id is None:
        begins = input_ids == bos_token_id
    else:
        begins = torch.roll(input_ids, 1, dims=1) == eos_token_id
    begins[:, 0] = False
    return begins.cumsum(dim=1)


def positions_of(documents: torch.Tensor) -> torch.Tensor:
    """Positions that restart at each document; documents as :func:`document_ids` gives them."""
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = torch.where(documents.diff(dim=1, prepend=documents[:, :1] - 1) > 0, places, 0)
    return places - begins.cummax(dim=1).values


def attention_mask_of(documents: torch.Tensor) -> torch.Tensor:
    """``(rows, 1, length, length)``: True where a token may look: at itself and what came before in its document."""
    length = documents.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    return (causal & (documents[:, :, None] == documents[:, None, :]))[:, None]


class MaskDocuments(Callback):
    """Packed documents do not attend to each other, in training and in every evaluation.

    The first token of a document is no label (it would be foretold from another one). Before each forward pass,
    positions restart at each document, and the model is told what may look where: an MPT by ``sequence_id``, of which
    ``model.attn_config.attn_uses_sequence_id: true`` makes use; others of transformers by a mask of four dimensions, or
    for flash attention by the positions, in one row. No code of a model changes, and no loader needs to know of it.
    Before anything is trained, two rows that differ in their first document must give the second one the same logits.

    Args:
        eos_token_id: The token that ends each document. Default: ``None``, the tokenizer's.
        bos_token_id: Of data whose documents only begin with a token: that one. Default: ``None``.

    Raises:
        ValueError: If the model cannot be told, its documents see each other all the same, or nothing says where
            documents end.

    Cost: a mask of ``length^2`` for each row, and with sdpa another kernel than the fastest; two short forward passes.

    Source: Zhao et al. 2024 (2402.13991); Llama 3 (2407.21783), section 3.2.
    """

    def __init__(self, eos_token_id: int | None = None, bos_token_id: int | None = None) -> None:
        if eos_token_id is not None and bos_token_id is not None:
            raise ValueError(f'callbacks.mask_documents: eos_token_id={eos_token_id} or bos_token_id, and not both')
        self.eos_token_id, self.bos_token_id = eos_token_id, bos_token_id
        self.attention = ''  # of transformers; none of an MPT
        self.window: int | None = None  # how far some layers look back
        self.dtype = torch.float32
        self._is_checked = False

    def init(self, state: State, logger: Logger) -> None:
        """Look at the model."""
        model: Any = state.model
        self.attention = attention_of(model)
        config = model.model.config
        if self.attention and getattr(config, 'use_sliding_window', True):
            self.window = getattr(config, 'sliding_window', None)
        self.dtype = next(model.parameters()).dtype
        if self.eos_token_id is None and self.bos_token_id is None:
            self.eos_token_id = getattr(getattr(model, 'tokenizer', None), 'eos_token_id', None)
            if self.eos_token_id is None:
                raise ValueError('callbacks.mask_documents.eos_token_id is missing: the tokenizer has no end of text')

    def fit_start(self, state: State, logger: Logger) -> None:
        """Try whether documents see each other."""
        if not self._is_checked:
            self._is_checked = True
            self._check(state)

    def eval_standalone_start(self, state: State, logger: Logger) -> None:
        """The same."""
        self.fit_start(state, logger)

    def batch_start(self, state: State, logger: Logger) -> None:
        """No first token of a document is a label, also where tokens are counted."""
        state.batch = self.labelled(state.batch)
        ends = self.bos_token_id if self.eos_token_id is None else self.eos_token_id
        if state.timestamp.batch == 0 and not bool((state.batch['input_ids'] == ends).any()):
            log.warning(f'mask_documents: token {ends}, which separates documents, is not in the first batch')

    def eval_batch_start(self, state: State, logger: Logger) -> None:
        """The same."""
        state.batch = self.labelled(state.batch)

    def before_forward(self, state: State, logger: Logger) -> None:
        """Tell the model."""
        state.batch = self.masked(state.batch)

    def eval_before_forward(self, state: State, logger: Logger) -> None:
        """The same."""
        state.batch = self.masked(state.batch)

    def documents(self, batch: Any) -> torch.Tensor:
        """Which document of its row each token is of; as the loader says, if it does."""
        if 'sequence_id' in batch:
            return batch['sequence_id'].clamp(min=0)
        return document_ids(batch['input_ids'], self.eos_token_id, self.bos_token_id)

    def labelled(self, batch: Any) -> Any:
        """A batch in which no first token of a document is a label; a prompt for generation as it is."""
        if not isinstance(batch.get('labels'), torch.Tensor) or batch.get('mode') == 'generate':
            return batch
        documents = self.documents(batch)
        begins = (positions_of(documents) == 0) & (documents > 0)  # that of a row's first token is never foretold
        result = {**batch, 'labels': batch['labels'].masked_fill(begins, -100)}
        if 'loss_generating_tokens' in batch:  # of packed loaders; by row, as the model shifts labels
            result['loss_generating_tokens'] = (result['labels'][:, 1:] != -100).sum(dim=1).tolist()
        return result

    def masked(self, batch: Any) -> Any:
        """A batch with what the model needs to be told."""
        if batch.get('mode') == 'generate':
            return batch
        batch, documents = self.labelled(batch), self.documents(batch)
        result = {**batch, 'position_ids': positions_of(documents)}
        if not self.attention:
            return {**result, 'sequence_id': documents}
        real = result.pop('attention_mask', None)
        if self.attention == 'flash_attention_2':  # which looks for positions that restart in one row alone
            if 'labels' in result:
                result['labels'] = result['labels'].masked_fill(result['position_ids'] == 0, -100)
            return {
                key: each.reshape(1, -1) if key in ('input_ids', 'labels', 'position_ids') else each
                for key, each in result.items()
            }
        if self.window and self.window < documents.shape[1]:
            raise ValueError(
                f'callbacks.mask_documents: some layers look back {self.window} tokens only, which a mask of documents '
                f'would take from them in rows of {documents.shape[1]}; use flash attention, or shorter rows'
            )
        mask = attention_mask_of(documents)
        if real is not None and not bool(real.all()):  # what was padded is looked at by nobody but itself
            mask &= real.bool()[:, None, None, :] | torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
        # to be added; transformers takes no other on a GPU. The lowest number of bfloat16 is one in each precision but
        # float16, in which infinity is right, too: no row is all masked.
        unseen = torch.finfo(torch.bfloat16).min
        result['attention_mask'] = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, unseen).to(self.dtype)
        return result

    def _check(self, state: State) -> None:
        model: Any = state.model
        ends = self.bos_token_id if self.eos_token_id is None else self.eos_token_id
        assert ends is not None, 'init has looked'
        words = [token for token in range(12) if token != ends]
        first, second, other = words[:4], words[4:8], words[3::-1]
        rows = torch.tensor([[*first, ends, *second], [*other, ends, *second]], device=next(model.parameters()).device)
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), get_precision_context(state.precision):
                found = model(self.masked({'input_ids': rows, 'attention_mask': torch.ones_like(rows)}))
        except Exception as error:
            raise ValueError(f'callbacks.mask_documents: this model cannot be told: {error}') from error
        finally:
            model.train(was_training)
        logits = found.logits.reshape(2, rows.shape[1], -1).float()[:, -len(second) :]
        off = float((logits[0] - logits[1]).abs().max() / logits.abs().max().clamp(min=1e-12))
        if off > 1e-2:
            raise ValueError(
                f'callbacks.mask_documents: documents see each other all the same (logits change by {off:.2g} of the '
                f'largest): {type(model.model.config).__name__[:-6]} or its attention ignores positions or mask'
            )


def attention_of(model: Any) -> str:
    """How a Composer model is told: by which attention of transformers; nothing of an MPT.

    Raises:
        ValueError: If it cannot be.
    """
    config = getattr(getattr(model, 'model', model), 'config', None)
    attention = getattr(config, 'attn_config', None)
    if isinstance(attention, dict):
        if not attention.get('attn_uses_sequence_id'):
            raise ValueError('callbacks.mask_documents: an MPT needs model.attn_config.attn_uses_sequence_id: true')
        return ''
    arguments = getattr(model, 'model_forward_args', ())
    if 'position_ids' not in arguments:
        raise ValueError(f'callbacks.mask_documents: {type(config).__name__[:-6]} takes no position_ids')
    used = getattr(config, '_attn_implementation', None)
    if used not in ATTENTIONS:
        known = ', '.join(ATTENTIONS)
        raise ValueError(f'callbacks.mask_documents: attention {used!r} takes no mask of documents; {known} do')
    return used
