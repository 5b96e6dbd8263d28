# SPDX-License-Identifier: Apache-2.0
"""Continual pre-training for Composer and LLM Foundry."""
