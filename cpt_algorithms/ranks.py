# SPDX-License-Identifier: Apache-2.0
"""Work that one rank does for all."""

from collections.abc import Callable
from typing import Any, TypeVar

from composer.utils import dist

from cpt_algorithms.files import StorageError

__all__ = ['on_rank_zero']

Result = TypeVar('Result')


def on_rank_zero(do: Callable[[], Result]) -> Result:
    """The result of what only rank 0 does, on all ranks.

    Raises:
        ValueError: On all ranks, if rank 0 raises one; a :class:`StorageError` remains one.
    """
    found: list[Any] = [None, None]
    if dist.get_global_rank() == 0:
        try:
            found = [do(), None]
        except ValueError as error:
            found = [None, (StorageError if isinstance(error, StorageError) else ValueError, str(error))]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    if found[1] is not None:
        kind, said = found[1]
        raise kind(said)
    return found[0]
