# SPDX-License-Identifier: Apache-2.0
"""Every real token is a label, also the end of a text where a tokenizer pads with it."""

from collections.abc import Mapping
from typing import Any

import torch
from composer.core import State
from transformers.data.data_collator import DataCollatorForLanguageModeling

__all__ = ['label_every_token', 'label_every_token_of']


class _EveryToken(DataCollatorForLanguageModeling):
    """Leaves out what was padded here, or by the tokenizer; the stock collator every token that equals padding."""

    def torch_call(self, examples: list[Any]) -> dict[str, Any]:
        lengths = [] if isinstance(examples[0], Mapping) else [len(example) for example in examples]
        batch = super().torch_call(examples)
        ids = batch['input_ids']
        if lengths:
            places = torch.arange(ids.shape[1])
            places = places if self.tokenizer.padding_side == 'right' else places.flip(0)
            is_real = places < torch.tensor(lengths)[:, None]
        elif 'attention_mask' not in batch:  # of a tokenizer that never says what it has padded
            return batch
        else:
            is_real = batch['attention_mask'].bool()
        return {**batch, 'labels': torch.where(is_real, ids, -100)}


def label_every_token(loader: Any) -> None:
    """Have a loader of packed or padded text give every real token a label, the end of a text included.

    llm-foundry's text loaders give none to what equals the padding token, which in many tokenizers is the end of text:
    a model would never be taught to stop, nor be judged by it. Loaders with labels of their own stay as they are.

    Args:
        loader: A ``DataLoader`` that has not begun.
    """
    holder, name = loader, 'collate_fn'
    while hasattr(collator := getattr(holder, name, None), 'base_collator'):
        holder, name = collator, 'base_collator'
    if type(collator) is DataCollatorForLanguageModeling and not collator.mlm:
        setattr(holder, name, _EveryToken(collator.tokenizer, mlm=False))


def label_every_token_of(state: State) -> None:
    """The same for all loaders of a run."""
    evaluated = (getattr(evaluator.dataloader, 'dataloader', None) for evaluator in state.evaluators)
    for loader in (state.train_dataloader, state.dataloader, *evaluated):
        label_every_token(loader)
