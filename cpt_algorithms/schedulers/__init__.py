# SPDX-License-Identifier: Apache-2.0
"""When and how fast: learning-rate schedules for runs that are continued."""

from cpt_algorithms.schedulers.infinite import InfiniteScheduler
from cpt_algorithms.schedulers.phase_scheduler import PhaseScheduler, format_phases
from cpt_algorithms.schedulers.preview import count_batches, preview
from cpt_algorithms.schedulers.rewarm import RewarmConstantScheduler, RewarmCosineScheduler
from cpt_algorithms.schedulers.wsd import WSDScheduler

__all__ = [
    'InfiniteScheduler',
    'PhaseScheduler',
    'RewarmConstantScheduler',
    'RewarmCosineScheduler',
    'WSDScheduler',
    'count_batches',
    'format_phases',
    'preview',
]
