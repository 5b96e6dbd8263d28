# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures. Everything runs offline, on CPU."""

import os

# Before torch is imported anywhere: parallel test processes must not fight over the cores.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('HF_DATASETS_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
os.environ.setdefault('WANDB_MODE', 'offline')
