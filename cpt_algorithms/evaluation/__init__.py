# SPDX-License-Identifier: Apache-2.0
"""Measurements inside a run: forgetting and adaptation."""

from typing import TYPE_CHECKING

from cpt_algorithms.lazy import lazy_names

if TYPE_CHECKING:
    from cpt_algorithms.evaluation.final_loss import FinalLoss
    from cpt_algorithms.evaluation.forgetting import Forgetting

__all__ = ['FinalLoss', 'Forgetting']

__getattr__ = lazy_names(__name__, {'FinalLoss': 'final_loss', 'Forgetting': 'forgetting'})
