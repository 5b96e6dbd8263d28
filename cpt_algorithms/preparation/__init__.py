# SPDX-License-Identifier: Apache-2.0
"""From text to datasets that stages can read."""

from cpt_algorithms.preparation.sources import PrepareError
from cpt_algorithms.preparation.tokenizer import hash_tokenizer

__all__ = ['PrepareError', 'hash_tokenizer']
