# SPDX-License-Identifier: Apache-2.0
"""When and how fast: learning-rate schedules for runs that are continued."""

from typing import TYPE_CHECKING

from cpt_algorithms.lazy import lazy_names

if TYPE_CHECKING:
    from cpt_algorithms.schedulers.infinite import InfiniteScheduler
    from cpt_algorithms.schedulers.phase_scheduler import PhaseScheduler
    from cpt_algorithms.schedulers.rewarm import RewarmConstantScheduler, RewarmCosineScheduler
    from cpt_algorithms.schedulers.wsd import WSDScheduler

__all__ = ['InfiniteScheduler', 'PhaseScheduler', 'RewarmConstantScheduler', 'RewarmCosineScheduler', 'WSDScheduler']

__getattr__ = lazy_names(
    __name__,
    {
        'InfiniteScheduler': 'infinite',
        'PhaseScheduler': 'phase_scheduler',
        'RewarmConstantScheduler': 'rewarm',
        'RewarmCosineScheduler': 'rewarm',
        'WSDScheduler': 'wsd',
    },
)
