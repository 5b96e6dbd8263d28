# SPDX-License-Identifier: Apache-2.0
"""When and how fast: learning-rate schedules for runs that are continued."""

from typing import TYPE_CHECKING

from cpt_algorithms.lazy import lazy_names

if TYPE_CHECKING:
    from cpt_algorithms.schedulers.schedulers import (
        InfiniteScheduler,
        RewarmConstantScheduler,
        RewarmCosineScheduler,
        WSDScheduler,
    )

__all__ = ['InfiniteScheduler', 'RewarmConstantScheduler', 'RewarmCosineScheduler', 'WSDScheduler']

__getattr__ = lazy_names(__name__, dict.fromkeys(__all__, 'schedulers'))
