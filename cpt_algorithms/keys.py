# SPDX-License-Identifier: Apache-2.0
"""One clear error for a key that nobody reads, and for a value that cannot be."""

from collections import abc
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from reprlib import Repr
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

__all__ = ['check_keys', 'check_layers', 'check_place', 'check_plain', 'check_type', 'shown']

# Ten times the layers of the deepest that was trained; each takes a millisecond to build, and 10 kB.
MOST_LAYERS = 10_000
_LAYERS = ('n_layers', 'n_layer', 'num_layers', 'num_hidden_layers')
# The longest name of a file on common disks, in bytes.
_LONGEST_NAME = 255
_short = Repr()
_short.maxstring = _short.maxother = 80
_UNIONS = (Union, UnionType)
_MAPPINGS = (dict, abc.Mapping, abc.MutableMapping)
_LISTS = (list, tuple, set, abc.Sequence, abc.Iterable)


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


def shown(value: Any) -> str:
    """A value as an error shows it: in one line, and not a page of it."""
    return _short.repr(value)


def check_plain(value: Any, where: str = '') -> None:
    """Refuse what YAML can say and no part of a YAML here means: keys that are no text, and text with a zero byte.

    Args:
        value: What was read, mappings and lists in each other.
        where: Its dotted path. Default: the top.

    Raises:
        ValueError: Naming the path.
    """
    if isinstance(value, str) and '\0' in value:
        raise ValueError(f'{where}={shown(value)} has a zero byte in it; write it again')
    if value == '???':  # OmegaConf's mark
        raise ValueError(f'{where} is missing: {value} stands for it')
    for key in value if isinstance(value, Mapping) else ():
        if not isinstance(key, str) or not key:
            raise ValueError(f'{where or "the YAML"}: {key!r} cannot be a key, which is text; put it in quotes')
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        path = f'[{key}]' if isinstance(value, list) else f'.{key}'
        check_plain(item, f'{where}{path}'.removeprefix('.'))


def check_place(key: str, value: Any) -> None:
    """Refuse what cannot be the path of a file or folder.

    Args:
        key: What it is called in an error.
        value: The path or URI.

    Raises:
        ValueError: If it cannot be.
    """
    check_type(key, value, str)
    if not value.strip():
        raise ValueError(f'{key}={value!r} is empty; give a path')
    if long := [part for part in Path(value).parts if len(part.encode()) > _LONGEST_NAME]:
        raise ValueError(
            f'{key}={shown(value)}: {shown(long[0])} is longer than a name on a disk, {_LONGEST_NAME} bytes'
        )


def check_type(where: str, value: Any, hint: Any) -> None:
    """Refuse a value of another type than a Python annotation asks for, as YAML knows types.

    A list may stand for a tuple or a set, a whole number for a float. Numbers are finite. What YAML cannot say is not
    judged.

    Args:
        where: Its dotted path.
        value: What was read.
        hint: The annotation.

    Raises:
        ValueError: Naming the path, the value and the right types.
    """
    if not _fits(value, hint):
        kinds = ' or '.join(dict.fromkeys(_kinds(hint)))
        quotes = '; put it in quotes' if _fits(str(value), hint) and isinstance(value, int | float) else ''
        raise ValueError(f'{where}={shown(value)} must be {kinds}{quotes}')


def check_layers(where: str, section: Mapping[str, Any]) -> None:
    """Refuse a model that would be built for hours: one of more layers than :data:`MOST_LAYERS`.

    Args:
        where: The section's dotted path, or the file's.
        section: Of a model; layers may also be counted in its ``config_overrides``.

    Raises:
        ValueError: Naming the key and the value.
    """
    for key in _LAYERS:
        if isinstance(number := section.get(key), int) and number > MOST_LAYERS:
            raise ValueError(f'{where}.{key}={shown(number)} must be a number of layers, at most {MOST_LAYERS:,}')
    if isinstance(inner := section.get('config_overrides'), Mapping):
        check_layers(f'{where}.config_overrides', inner)


def _fits(value: Any, hint: Any) -> bool:
    origin, inside = get_origin(hint) or hint, get_args(hint)
    if origin in _UNIONS:
        return any(_fits(value, each) for each in inside)
    if origin is Literal:
        return value in inside
    if origin in (bool, str):
        return isinstance(value, origin)
    if origin in (int, float):
        kinds = int if origin is int else int | float
        return isinstance(value, kinds) and not isinstance(value, bool) and isfinite(value)
    if origin in _MAPPINGS:
        return isinstance(value, Mapping) and (not inside or all(_fits(item, inside[1]) for item in value.values()))
    if origin in _LISTS:
        return isinstance(value, list | tuple) and all(_fits(item, inside[0]) for item in value if inside)
    return value is None if origin in (None, NoneType) else True


def _kinds(hint: Any) -> list[str]:
    origin = get_origin(hint) or hint
    if origin in _UNIONS:
        return [kind for each in get_args(hint) for kind in _kinds(each)]
    if origin is Literal:
        return [repr(each) for each in get_args(hint)]
    names = {bool: 'true or false', str: 'text', int: 'a whole number', float: 'a number', NoneType: 'null'}
    many = {'a mapping': _MAPPINGS, 'a list': _LISTS}
    kind = names.get(origin) or next((name for name, kinds in many.items() if origin in kinds), 'something else')
    of = get_args(hint)[-1] if kind in many and get_args(hint) else Any
    return [kind if of in (Any, Ellipsis) else f'{kind} of {" or ".join(_kinds(of))}']
