# SPDX-License-Identifier: Apache-2.0
"""Checkpoints, save folders and exports on disk."""
