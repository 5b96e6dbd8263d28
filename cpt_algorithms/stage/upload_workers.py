# SPDX-License-Identifier: Apache-2.0
"""Imported by the process from which Composer's upload workers are forked, and by nothing else.

It imports what they need, once for all of them, and lets them die with their run.
"""

import os

from cpt_algorithms.launch.processes import die_with_parent

die_with_parent()
os.register_at_fork(after_in_child=die_with_parent)

# what the recipe imports too: multiprocessing has every worker import the main script again
import llmfoundry.command_utils  # noqa: E402, F401
