# SPDX-License-Identifier: Apache-2.0
"""When a stage starts: which weights, at which learning rate, and is everything there."""

from cpt_algorithms.stage.branch import BranchPoints
from cpt_algorithms.stage.preflight import PreflightError, latest_batch, preflight, resolve, total_batches
from cpt_algorithms.stage.stage_start import StageStart

__all__ = ['BranchPoints', 'PreflightError', 'StageStart', 'latest_batch', 'preflight', 'resolve', 'total_batches']
