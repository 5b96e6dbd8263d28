# SPDX-License-Identifier: Apache-2.0
"""The model and the tokenizer of a YAML, without memory for weights."""

import logging
import re

from accelerate import init_empty_weights
from composer.models import ComposerModel
from llmfoundry.utils.builders import build_composer_model, build_tokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from cpt_algorithms.files import StorageError
from cpt_algorithms.formatting import one_line
from cpt_algorithms.stage.stage import Model, Tokenizer

__all__ = ['model_on_meta', 'tokenizer_of']

log = logging.getLogger(__name__)


def tokenizer_of(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    """The tokenizer that a YAML names.

    Args:
        tokenizer: Its section.

    Raises:
        StorageError: If the hub cannot be reached.
        ValueError: If it cannot be loaded.
    """
    try:
        return build_tokenizer(tokenizer.name, dict(tokenizer.kwargs.given))
    except Exception as error:
        first_line = ' '.join(str(error).strip().splitlines()[:1])
        kind = StorageError if "couldn't connect" in first_line else ValueError
        raise kind(f'tokenizer={dict(tokenizer.given)} cannot be loaded: {first_line}') from None


def model_on_meta(model: Model, tokenizer: PreTrainedTokenizerBase | None = None) -> ComposerModel:
    """The model that a YAML describes, without memory for its weights, and without reading pretrained ones.

    Args:
        model: The YAML's section.
        tokenizer: May enlarge the embeddings of an MPT. Default: ``None``.

    Raises:
        ValueError: If it cannot be built.
    """
    section = {**model.arguments, 'init_device': 'meta'}
    section.pop('master_weights_dtype', None)
    if model.name == 'hf_causal_lm':  # kernels that are not installed here would be refused
        section |= {'pretrained': False, 'use_flash_attention_2': False, 'attn_implementation': None}
    try:
        return build_composer_model(
            model.name, section, tokenizer, init_context=init_empty_weights(include_buffers=False)
        )
    except Exception as error:
        # of a package that only a machine with a GPU has, or of the hub
        kind = StorageError if re.search("is not installed|couldn't connect", str(error)) else ValueError
        raise kind(f'model cannot be built: {one_line(error)}') from None
