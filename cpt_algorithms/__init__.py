# SPDX-License-Identifier: Apache-2.0
"""Continual pre-training for Composer and LLM Foundry: the whole public surface.

LLM Foundry finds the schedulers, the callbacks and the loader by their YAML names; import them from here to use them in
Python. Parts are imported when they are first asked for: LLM Foundry alone takes ten seconds and half a gigabyte.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import cpt_algorithms.compat  # noqa: F401  mends what other releases of the packages below break

if TYPE_CHECKING:
    from cpt_algorithms.evaluation.final_loss import FinalLoss
    from cpt_algorithms.evaluation.forgetting import Forgetting
    from cpt_algorithms.evaluation.functional import adaptation, final_loss, forgetting
    from cpt_algorithms.replay.mask_documents import MaskDocuments
    from cpt_algorithms.replay.replay_text import ReplayTextDataset, build_replay_text_dataloader
    from cpt_algorithms.schedulers.preview import preview
    from cpt_algorithms.schedulers.schedulers import (
        InfiniteScheduler,
        RewarmConstantScheduler,
        RewarmCosineScheduler,
        WSDScheduler,
    )
    from cpt_algorithms.stage.preflight import PreflightError, preflight
    from cpt_algorithms.stage.stage import Stage
    from cpt_algorithms.stage.stage_start import StageStart
    from cpt_algorithms.weight_averaging.ema import EMA
    from cpt_algorithms.weight_averaging.lawa import LAWA

__all__ = [
    'EMA',
    'FinalLoss',
    'Forgetting',
    'InfiniteScheduler',
    'LAWA',
    'MaskDocuments',
    'PreflightError',
    'ReplayTextDataset',
    'RewarmConstantScheduler',
    'RewarmCosineScheduler',
    'Stage',
    'StageStart',
    'WSDScheduler',
    'adaptation',
    'build_replay_text_dataloader',
    'final_loss',
    'forgetting',
    'preflight',
    'preview',
]

_MODULES = {
    **dict.fromkeys(('adaptation', 'final_loss', 'forgetting'), 'evaluation.functional'),
    'FinalLoss': 'evaluation.final_loss',
    'Forgetting': 'evaluation.forgetting',
    'MaskDocuments': 'replay.mask_documents',
    **dict.fromkeys(('ReplayTextDataset', 'build_replay_text_dataloader'), 'replay.replay_text'),
    'preview': 'schedulers.preview',
    **dict.fromkeys([name for name in __all__ if name.endswith('Scheduler')], 'schedulers.schedulers'),
    **dict.fromkeys(('PreflightError', 'preflight'), 'stage.preflight'),
    'Stage': 'stage.stage',
    'StageStart': 'stage.stage_start',
    'EMA': 'weight_averaging.ema',
    'LAWA': 'weight_averaging.lawa',
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'{__name__}.{_MODULES[name]}'), name)
