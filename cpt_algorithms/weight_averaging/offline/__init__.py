# SPDX-License-Identifier: Apache-2.0
"""Averages of checkpoints on disk."""
