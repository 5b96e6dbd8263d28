# SPDX-License-Identifier: Apache-2.0
"""When, on which machine and with which releases the numbers of a document were made."""

import os
import platform
from datetime import date
from importlib.metadata import version

__all__ = ['made_with']

_STACK = ('torch', 'mosaicml', 'llm-foundry', 'mosaicml-streaming', 'transformers')


def made_with() -> str:
    """A line: the date, the processor and its cores, the GPU if there is one, Python and the stack."""
    import torch
    from composer.utils.collect_env import get_cpu_model  # Composer takes seconds to import

    versions = [f'{name} {version(name)}' for name in _STACK]
    python = f'Python {platform.python_version()}'
    cores = f'{os.cpu_count()} cores of {get_cpu_model()}'
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return ', '.join([date.today().isoformat(), cores, *gpu, python, *versions])
