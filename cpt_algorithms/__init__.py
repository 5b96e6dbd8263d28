# SPDX-License-Identifier: Apache-2.0
"""Continual pre-training for Composer and LLM Foundry: the whole public surface.

LLM Foundry finds the schedulers, the callbacks and the loader by their YAML names; import them from here to use them in
Python. Parts are imported when they are first asked for: LLM Foundry alone takes ten seconds and half a gigabyte.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cpt_algorithms.evaluation import FinalLoss, Forgetting, adaptation, final_loss, forgetting
    from cpt_algorithms.replay import ReplayTextDataset, build_replay_text_dataloader
    from cpt_algorithms.schedulers import (
        InfiniteScheduler,
        RewarmConstantScheduler,
        RewarmCosineScheduler,
        WSDScheduler,
        preview,
    )
    from cpt_algorithms.stage import PreflightError, StageStart, preflight, resolve
    from cpt_algorithms.weight_averaging import EMA, LAWA

__all__ = [
    'EMA',
    'FinalLoss',
    'Forgetting',
    'InfiniteScheduler',
    'LAWA',
    'PreflightError',
    'ReplayTextDataset',
    'RewarmConstantScheduler',
    'RewarmCosineScheduler',
    'StageStart',
    'WSDScheduler',
    'adaptation',
    'build_replay_text_dataloader',
    'final_loss',
    'forgetting',
    'preflight',
    'preview',
    'resolve',
]

_PARTS = ('evaluation', 'replay', 'schedulers', 'stage', 'weight_averaging')


def __getattr__(name: str) -> Any:
    if name in __all__:
        for part in _PARTS:
            module = import_module(f'cpt_algorithms.{part}')
            if name in module.__all__:
                return getattr(module, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
