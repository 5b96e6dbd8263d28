# SPDX-License-Identifier: Apache-2.0
"""Documents in a packed row that do not see each other."""

from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger

__all__ = ['MaskDocuments', 'attention_mask_of', 'document_ids', 'positions_of']

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

    Before each forward pass, positions restart at each document, the first token of a document is no label (it would be
    foretold from another one), and the model is told what may look where: an MPT by ``sequence_id``, of which
    ``model.attn_config.attn_uses_sequence_id: true`` makes use; others of transformers by a mask of four dimensions, or
    for flash attention by the positions. No code of a model changes, and loaders need to know nothing of it.

    Args:
        eos_token_id: The token that ends each document. Default: ``None``, the tokenizer's.
        bos_token_id: Of data whose documents only begin with a token: that one. Default: ``None``.

    Raises:
        ValueError: If the model cannot be told, or nothing says where documents end.

    Cost: a boolean mask of ``length^2`` for each row, and with sdpa another kernel than the fastest.

    Source: Zhao et al. 2024 (2402.13991); Llama 3 (2407.21783), section 3.2.
    """

    def __init__(self, eos_token_id: int | None = None, bos_token_id: int | None = None) -> None:
        if eos_token_id is not None and bos_token_id is not None:
            raise ValueError(f'callbacks.mask_documents: eos_token_id={eos_token_id} or bos_token_id, and not both')
        self.eos_token_id, self.bos_token_id = eos_token_id, bos_token_id
        self.attention = ''  # of transformers; none of an MPT
        self.window: int | None = None  # how far some layers look back

    def init(self, state: State, logger: Logger) -> None:
        """Look at the model."""
        model: Any = state.model
        self.attention = check_model(model)
        config = model.model.config
        if self.attention and getattr(config, 'use_sliding_window', True):
            self.window = getattr(config, 'sliding_window', None)
        if self.eos_token_id is None and self.bos_token_id is None:
            self.eos_token_id = getattr(getattr(model, 'tokenizer', None), 'eos_token_id', None)
            if self.eos_token_id is None:
                raise ValueError('callbacks.mask_documents.eos_token_id is missing: the tokenizer has no end of text')

    def before_forward(self, state: State, logger: Logger) -> None:
        """Tell the model."""
        state.batch = self.masked(state.batch)

    def eval_before_forward(self, state: State, logger: Logger) -> None:
        """The same."""
        state.batch = self.masked(state.batch)

    def masked(self, batch: Any) -> dict[str, Any]:
        """A batch with what the model needs to be told."""
        documents = document_ids(batch['input_ids'], self.eos_token_id, self.bos_token_id)
        positions = positions_of(documents)
        result = {**batch, 'position_ids': positions}
        if 'labels' in batch:
            # that of a row's first token is nothing that is foretold
            result['labels'] = batch['labels'].masked_fill((positions == 0) & (documents > 0), -100)
        if not self.attention:
            result['sequence_id'] = documents
            return result
        real = batch.get('attention_mask')
        result.pop('attention_mask', None)
        if self.attention == 'flash_attention_2':
            return result
        if self.window and self.window < documents.shape[1]:
            raise ValueError(
                f'callbacks.mask_documents: some layers look back {self.window} tokens only, which a mask of documents '
                f'would take from them in rows of {documents.shape[1]}; use flash attention, or shorter rows'
            )
        mask = attention_mask_of(documents)
        if real is not None and not bool(real.all()):  # what was padded is looked at by nobody but itself
            mask &= real.bool()[:, None, None, :] | torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
        if self.attention == 'eager':
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)
        result['attention_mask'] = mask
        return result


def check_model(model: Any) -> str:
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
        raise ValueError(
            f'callbacks.mask_documents: attention {used!r} takes no mask; one of {", ".join(ATTENTIONS)} does'
        )
    return used
