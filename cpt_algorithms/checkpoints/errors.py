# SPDX-License-Identifier: Apache-2.0
"""How checkpoints are refused; without torch, so that a command line can catch these errors at once."""

__all__ = ['CheckpointError', 'UnsafeCheckpointError']


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete, damaged, of no supported kind, or not safe to read."""


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint that could run code of its own if Composer or torch loaded it."""
