# SPDX-License-Identifier: Apache-2.0
"""Work that one rank does for all."""

import pickle
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from composer.utils import dist

__all__ = ['on_rank_zero']

Result = TypeVar('Result')


def on_rank_zero(do: Callable[[], Result]) -> Result:
    """The result of what only rank 0 does, on all ranks.

    Raises:
        ValueError: On all ranks, if rank 0 raises one; of its own class (``CheckpointError``) if that can be sent.
    """
    found: list[Any] = [None, None]
    if dist.get_global_rank() == 0:
        try:
            found = [do(), None]
        except ValueError as error:
            found = [None, _sendable(error)]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


def _sendable(error: ValueError) -> ValueError:
    """The error, if other ranks find the same in what is sent; else what it says."""
    with suppress(Exception):  # whatever its class makes of being pickled
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    return ValueError(str(error))
