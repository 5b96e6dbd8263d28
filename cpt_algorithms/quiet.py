# SPDX-License-Identifier: Apache-2.0
"""Warnings of other packages that no user of a recipe can do anything about. Imports nothing that takes long."""

import logging
import sys
import warnings

__all__ = ['ignore_known_warnings']

# How each begins, as a regular expression. They are about these packages' own code, or repeat what we say.
_KNOWN = (
    'pkg_resources is deprecated',  # llm-foundry's callbacks
    'The `use_auth_token` argument is deprecated',  # llm-foundry to transformers
    'To copy construct from a tensor',  # Composer's trainer
    'Using a non-tuple sequence for multidimensional indexing',  # llm-foundry's initialisation, since torch 2.9
    '`torch.jit.script` is deprecated',  # Composer's import, since torch 2.10
    'Specifying the ConsoleLogger via `loggers`',  # which the recipe does
    'Specifying `eval_interval=',  # the default, of a stage without evaluators
    "'pin_memory' argument is set as true but no accelerator",  # the default, on CPU
    'torch.distributed.*is a private function',
    'TypedStorage is deprecated',
    '`do_sample` is set to `False`',  # a published generation_config.json, which is passed on as it is
)
_KNOWN_LOGS = {
    'composer.models.huggingface': 'The tokenizer was not provided',  # preflight's models need none
    'transformers.modeling_utils': 'has generative capabilities',  # of llm-foundry's MPT, to its authors
}


def ignore_known_warnings() -> None:
    """Leave out the warnings listed here; with ``python -W default`` they are all shown."""
    if sys.warnoptions:
        return
    for message in _KNOWN:
        warnings.filterwarnings('ignore', message=message)
    for name, message in _KNOWN_LOGS.items():
        logging.getLogger(name).addFilter(lambda record, message=message: message not in record.getMessage())
