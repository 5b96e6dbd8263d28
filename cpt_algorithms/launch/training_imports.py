# SPDX-License-Identifier: Apache-2.0
"""Imported by the process that runs are forked from, and by nothing else: what training needs seconds to load."""

import signal

from cpt_algorithms.launch.processes import die_with_parent
from cpt_algorithms.quiet import ignore_known_warnings

die_with_parent()
# A fork takes it when it has begun: Composer's handler raises SystemExit, which is lost in what runs after a fork.
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
ignore_known_warnings()

import llmfoundry.command_utils  # noqa: E402, F401
import lm_eval  # noqa: E402, F401
from composer.utils.collect_env import get_cpu_model  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING  # noqa: E402

import cpt_algorithms.evaluation.lm_eval  # noqa: E402, F401

# Composer asks for both in each run, which takes a second or two: every causal model, and the processor's name.
MODEL_FOR_CAUSAL_LM_MAPPING.values()
get_cpu_model()
