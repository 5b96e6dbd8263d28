# SPDX-License-Identifier: Apache-2.0
"""One stage: what its YAML says, whether all is there, how it starts and runs."""

from typing import TYPE_CHECKING

from cpt_algorithms.lazy import lazy_names

if TYPE_CHECKING:
    from cpt_algorithms.stage.branch_points import BranchPoints
    from cpt_algorithms.stage.stage_start import StageStart

__all__ = ['BranchPoints', 'StageStart']

__getattr__ = lazy_names(__name__, {'BranchPoints': 'branch_points', 'StageStart': 'stage_start'})
