# SPDX-License-Identifier: Apache-2.0
"""One clear error for a key that nobody reads."""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ['check_keys']


def check_keys(where: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Refuse unknown keys, naming the nearest right one.

    Args:
        where: The section they stand in, as a dotted path.
        given: Keys found there.
        allowed: Keys that mean something there.

    Raises:
        ValueError: If a key is unknown.
    """
    allowed = sorted(allowed)
    for key in given:
        if key not in allowed:
            near = get_close_matches(str(key), allowed, n=1)
            hint = f'did you mean {near[0]!r}?' if near else f'one of {", ".join(allowed)} is possible'
            path = f'{where}.{key}' if where else key
            raise ValueError(f'{path} is not a key that anything reads; {hint}')
