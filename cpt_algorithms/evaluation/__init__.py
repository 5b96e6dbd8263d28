# SPDX-License-Identifier: Apache-2.0
"""What was forgotten, what was learned, what it cost."""

from cpt_algorithms.evaluation.final_loss import FinalLoss
from cpt_algorithms.evaluation.forgetting import Forgetting
from cpt_algorithms.evaluation.functional import adaptation, final_loss, forgetting, training_flops

__all__ = ['FinalLoss', 'Forgetting', 'adaptation', 'final_loss', 'forgetting', 'training_flops']
