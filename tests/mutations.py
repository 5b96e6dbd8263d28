# SPDX-License-Identifier: Apache-2.0
"""Spoilt YAMLs and JSON files: one or several changes of the kind that people and broken disks make."""

import copy
import re
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

Place = tuple[Any, ...]

# What a leaf or a section becomes. Nothing here leads to a network or into a file with code.
VALUES: list[Any] = [
    None, '', ' ', -1, 0, 1, 3, 2.5, -0.0, 1e-12, 1e30, float('nan'), float('inf'), 10**18, True, False, [], {}, [None],
    [[]], {'a': {'b': [1]}}, {'': None}, {1: 2}, '5', '5 ba', '1dur', '7ba', '-3ba', '1e30tok', 'nanba', '0.1dur', '3ep',
    'x' * 3000, 'a folder/with spaces', 'größe/数据', '../..', '/dev/null', '%s{}', '{run_name}', '{nope}', '\x00', 'nan',
    '5%', '1/3', '1/0', 'yes',
]  # fmt: skip
# What OmegaConf resolves, or cannot.
INTERPOLATIONS = ['${oc.env:NOPE}', '${nope.nope}', '${', '${oc.decode:"1"}', '${nope:1}', '???']


def places(value: Any, path: Place = ()) -> Iterator[Place]:
    """Where everything in nested mappings and lists stands."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield (*path, key)
        yield from places(item, (*path, key))


def at(value: Any, place: Place) -> Any:
    """What stands there."""
    for key in place:
        value = value[key]
    return value


def put(value: Any, place: Place, new: Any) -> None:
    """Let something stand there."""
    at(value, place[:-1])[place[-1]] = new


def delete(value: Any, place: Place) -> None:
    """Take it away."""
    del at(value, place[:-1])[place[-1]]


def rename(value: Any, place: Place, name: Any) -> None:
    """Call a key of a mapping otherwise, in its place."""
    section = at(value, place[:-1])
    if isinstance(section, dict):
        items = [(name if key == place[-1] else key, item) for key, item in section.items()]
        section.clear()
        section.update(items)


def swap(value: Any, one: Place, other: Place) -> None:
    """Let two values change places, unless one is in the other."""
    if one != other[: len(one)] and other != one[: len(other)]:
        first, second = at(value, one), at(value, other)
        put(value, one, second)
        put(value, other, first)


def spoil(value: Any, how: str, place: Place, extra: Any) -> None:
    """One change; ``extra`` is a value, a name, or another place."""
    if how == 'put':
        put(value, place, copy.deepcopy(extra))
    elif how == 'delete':
        delete(value, place)
    elif how == 'rename':
        rename(value, place, extra)
    elif how == 'swap':
        swap(value, place, extra)
    elif isinstance(at(value, place), list):  # twice
        at(value, place).extend(copy.deepcopy(at(value, place)))


@st.composite
def spoilt(draw: st.DrawFn, whole: Any, most: int = 2, values: list[Any] = VALUES) -> tuple[Any, list[Place]]:
    """A copy with one to ``most`` changes, and where they are."""
    value, where = copy.deepcopy(whole), []
    for _ in range(draw(st.integers(1, most))):
        there = list(places(value))
        if not there:
            break
        place = draw(st.sampled_from(there))
        how = draw(st.sampled_from(['put', 'put', 'put', 'put', 'delete', 'rename', 'swap', 'twice']))
        extra: Any = None
        if how == 'put':
            extra = draw(st.sampled_from(values))
        elif how == 'rename':
            extra = draw(st.sampled_from([f'{place[-1]}x', str(place[-1])[1:], 'größe', '', 5, True]))
            where.append((*place[:-1], str(extra)))
        elif how == 'swap':
            extra = draw(st.sampled_from(there))
            where.append(extra)
        where.append(place)
        spoil(value, how, place, extra)
    return value, [*where, *(use for place in where for use in uses(whole, place))]


def uses(whole: Any, place: Place) -> Iterator[Place]:
    """Where a changed variable stands in the values of other keys."""
    if 'variables' in place:
        name = '.'.join(map(str, place[place.index('variables') :]))
        for each in places(whole):
            if isinstance(at(whole, each), str) and f'${{{name}' in at(whole, each):
                yield each


def names_it(message: str, where: list[Place]) -> bool:
    """Whether a message has a key that leads to one of the changes, or ends one of the paths."""
    if any(not any(isinstance(key, str) and len(key) > 1 for key in place) for place in where):
        return True  # all of it
    words = {word for place in where for key in place if isinstance(key, str) for word in (key, *key.split('.'))}
    keys = {word for word in words if len(word) > 1}
    if 'cannot be a key' in message:
        return True  # and shows the key
    if 'means the same runs as arms.' in message:
        return True  # what made them alike may be what is no longer there
    if 'no earlier stage has read other data to replay' in message:
        return True  # and names the stage that was left; the one before it is no longer there
    return any(re.search(rf'(?<!\w){re.escape(key)}(?!\w)', message) for key in keys)
