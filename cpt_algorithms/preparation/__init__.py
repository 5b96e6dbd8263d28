# SPDX-License-Identifier: Apache-2.0
"""From text to datasets that stages can read."""

from typing import TYPE_CHECKING

from cpt_algorithms.lazy import lazy_names

if TYPE_CHECKING:
    from cpt_algorithms.preparation.sources import PrepareError
    from cpt_algorithms.preparation.tokenizer import hash_tokenizer

__all__ = ['PrepareError', 'hash_tokenizer']

__getattr__ = lazy_names(__name__, {'PrepareError': 'sources', 'hash_tokenizer': 'tokenizer'})
