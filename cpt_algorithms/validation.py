# SPDX-License-Identifier: Apache-2.0
"""Strict types for YAML and JSON: every mistake at once, each one line with the key, its value and the remedy.

:class:`Section` is the base of everything that is read from a YAML or JSON file; pydantic does the work, and nothing is
coerced. :func:`check_type` is the same for a single value and a Python annotation of somebody else's.
"""

import copy
import re
from collections import abc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from reprlib import Repr
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    model_validator,
)

__all__ = [
    'ConfigError',
    'PathStr',
    'Section',
    'check_keys',
    'check_type',
    'fits_on_a_disk',
    'differences',
    'misfits',
    'nearest',
    'parse_section',
    'short_repr',
    'with_home',
]

_HOME = re.compile(r'^(~|\$HOME)(?=/|$)')
_short = Repr()
_short.maxstring = _short.maxother = 80


class ConfigError(ValueError):
    """All problems of a YAML.

    Args:
        problems: Each with its key, its value and what would be right.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__('\n'.join(f'  {number}. {problem}' for number, problem in enumerate(problems, start=1)))


class Section(BaseModel):
    """A section of a YAML: typed, frozen, unknown keys kept; ``key: null`` is as if the key were not there.

    Subclasses that know all their keys say ``model_config = ConfigDict(extra='forbid')``.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra='allow', allow_inf_nan=False, protected_namespaces=())
    _given: Mapping[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode='wrap')
    @classmethod
    def _keep_what_was_given(cls, given: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        if not isinstance(given, Mapping):
            return handler(given)
        section = handler(cls.without_null(given))
        section._given = given
        return section

    @classmethod
    def without_null(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The section without keys that are null."""
        return {key: value for key, value in given.items() if value is not None or key not in cls.model_fields}

    @property
    def given(self) -> Mapping[str, Any]:
        """The section as it was written."""
        return self._given

    @property
    def arguments(self) -> dict[str, Any]:
        """A copy of the section as it was written without its ``name``: what LLM Foundry's builders take."""
        return copy.deepcopy({key: value for key, value in self._given.items() if key != 'name'})


Kind = TypeVar('Kind', bound=BaseModel)


def parse_section(kind: type[Kind], given: Any, where: str = '') -> Kind:
    """Read a mapping as a typed section; ``where`` is its dotted path, for errors, and by default the top.

    Raises:
        ConfigError: With everything that is wrong.
    """
    if problems := list(_scalar_problems(given, where)):
        raise ConfigError(problems)
    given = with_home(given)
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise ConfigError(_problems_of(error, given, where, kind)) from None


def short_repr(value: Any) -> str:
    """A value as an error shows it: in one line, and not a page of it."""
    return _short.repr(value)


def nearest(word: Any, known: Iterable[str]) -> str:
    """The end of an error about a word that is not known: the nearest right one, or all of them."""
    known = sorted(known)
    near = get_close_matches(str(word), known, n=1)
    return f'did you mean {near[0]!r}?' if near else f'one of {", ".join(known) or "none"} is possible'


def differences(old: Any, new: Any, path: str = '') -> list[str]:
    """Changes, a line for each leaf: ``optimizer.lr: 0.001 -> 0.01``."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = (differences(old.get(k), new.get(k), f'{path}.{k}' if path else k) for k in {**old, **new})
        return [line for lines in found for line in lines]
    then, now = ('absent' if each is None else each for each in (old, new))
    return [] if old == new else [f'{path}: {then} -> {now}']


def misfits(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """How the tensors of two models differ, of which a shape is given for each name."""
    found = [f'{k} is {there[k]} there and {here[k]} here' for k in there if k in here and there[k] != here[k]]
    found += [f'{k} is missing here' for k in there if k not in here]
    return found + [f'{k} is missing there' for k in here if k not in there]


def check_keys(where: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Refuse unknown keys of the section at a dotted path, naming the nearest right one.

    Raises:
        ValueError: If a key is unknown.
    """
    allowed = set(allowed)
    for key in given:
        if key not in allowed:
            raise ValueError(_unknown(f'{where}.{key}' if where else key, key, allowed))


def _unknown(path: str, key: Any, allowed: Iterable[str]) -> str:
    return f'{path} is not a key that anything reads; {nearest(key, allowed)}'


def with_home(value: Any) -> Any:
    """A value with the home folder for a ``~`` or ``$HOME`` that a text begins with, as a shell reads it."""
    if isinstance(value, Mapping):
        return {key: with_home(each) for key, each in value.items()}
    if isinstance(value, list):
        return [with_home(each) for each in value]
    return _HOME.sub(lambda _: str(Path.home()), value) if isinstance(value, str) else value


def _scalar_problems(value: Any, where: str) -> Iterator[str]:
    """Problems of YAML itself: keys that are no text, and OmegaConf's ``???``."""
    if value == '???':
        yield f'{where} is missing: {value} stands for it'
    for key in value if isinstance(value, Mapping) else ():
        if not isinstance(key, str) or not key:
            yield f'{where or "the YAML"}: {key!r} cannot be a key, which is text; put it in quotes'
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        path = f'[{key}]' if isinstance(value, list) else f'.{key}'
        yield from _scalar_problems(item, f'{where}{path}'.removeprefix('.'))


def fits_on_a_disk(path: str) -> str:
    """Refuse a path with a name that no disk can hold, or that begins as only a shell can read it."""
    if re.match(r'~|\$(?!\{[a-z])', path):  # ${key} is OmegaConf's, of a YAML that is scaled before it is resolved
        raise ValueError('only ~/ and $HOME/ are filled in; write ${oc.env:NAME} for another variable of the shell')
    if any(len(part.encode()) > 255 for part in path.split('/')):
        raise ValueError('a name on a disk has at most 255 bytes')
    return path


# A path or URI: text that is not empty, of names that a disk can hold.
PathStr = Annotated[str, Field(min_length=1, pattern=r'^[^\x00]*[^\s\x00][^\x00]*$'), AfterValidator(fits_on_a_disk)]


def check_type(where: str, value: Any, hint: Any) -> None:
    """Refuse a value of another type than a Python annotation asks for, as YAML knows types.

    A list may stand for a tuple or a set, a whole number for a float. Numbers are finite. What YAML cannot say is not
    judged.

    Raises:
        ValueError: Naming the path, the value and the right types.
    """
    try:
        adapter = _adapter(hint)
    except TypeError:  # a hint that cannot be hashed
        adapter = _adapter.__wrapped__(hint)
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        raise ValueError(_problems_of(error, value, where)[0]) from None


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(_as_yaml(hint), config=ConfigDict(strict=True, allow_inf_nan=False))


_LISTS = (list, tuple, set, frozenset, abc.Sequence, abc.Iterable)
_MAPPINGS = (dict, abc.Mapping, abc.MutableMapping)


def _as_yaml(hint: Any) -> Any:
    """An annotation with YAML's types in place of Python's; ``Any`` for values that nobody can write."""
    origin, inside = get_origin(hint) or hint, get_args(hint)
    if origin is Annotated:
        return hint
    if origin in (Union, UnionType):
        return Union[tuple(_as_yaml(each) for each in inside)]  # noqa: UP007
    if origin in _MAPPINGS:
        return dict[str, _as_yaml(inside[1])] if inside else dict[str, Any]
    if origin is tuple and inside and Ellipsis not in inside:
        each = Union[tuple(map(_as_yaml, inside))]  # noqa: UP007
        return Annotated[list[each], Field(min_length=len(inside), max_length=len(inside))]
    if origin in _LISTS:
        return list[_as_yaml(inside[0])] if inside else list[Any]
    return hint if origin in (bool, str, int, float, Literal, None, NoneType) else Any


_KINDS = {
    'bool_type': 'true or false',
    'string_type': 'text',
    'none_required': 'null',
    **dict.fromkeys(('int_type', 'int_from_float'), 'a whole number'),
    **dict.fromkeys(('float_type', 'finite_number'), 'a number'),
    **dict.fromkeys(('dict_type', 'mapping_type', 'model_type', 'model_attributes_type'), 'a mapping'),
    **dict.fromkeys(('list_type', 'tuple_type'), 'a list'),
}
_BOUNDS = {
    'greater_than_equal': ('at least', 'ge'),
    'greater_than': ('above', 'gt'),
    'less_than_equal': ('at most', 'le'),
    'less_than': ('below', 'lt'),
}


def _problems_of(error: ValidationError, given: Any, where: str = '', kind: type[BaseModel] | None = None) -> list[str]:
    """Pydantic's errors, one line for each key: alternatives of one value are one problem."""
    found: dict[str, list[Any]] = {}
    for each in error.errors(include_url=False):
        path, value = _find(given, each['loc'], each['type'])
        found.setdefault(f'{where}{path}'.removeprefix('.'), [value]).append(each)
    return [_problem(path, value, each, kind) for path, (value, *each) in found.items()]


def _find(value: Any, loc: tuple[int | str, ...], error: str) -> tuple[str, Any]:
    """The path of what is wrong and its value; of the ways in pydantic's ``loc``, unions are left out."""
    path = ''
    for number, step in enumerate(loc):
        is_last = number == len(loc) - 1
        if isinstance(value, Mapping) and (step in value or (is_last and error == 'missing')):
            path, value = f'{path}.{step}', value.get(step)
        elif isinstance(value, list) and isinstance(step, int):
            path, value = f'{path}[{step}]', value[step]
    return path, value


def _problem(path: str, value: Any, errors: list[Any], kind: type[BaseModel] | None) -> str:
    kinds: list[str] = []
    for each in errors:
        name, context = each['type'], each.get('ctx', {})
        if name == 'missing':
            return f'{path} is missing'
        if name == 'extra_forbidden':
            return _unknown(path, path.rpartition('.')[2], _keys_at(kind, each['loc'][:-1]))
        if name in ('value_error', 'assertion_error'):
            said = str(context.get('error', each['msg']))
            return said.replace('KEY', path, 1) if said.startswith('KEY') else f'{path}={short_repr(value)}: {said}'
        if name in ('string_too_short', 'string_pattern_mismatch'):
            return f'{path}={short_repr(value)} must be a path'
        if name == 'literal_error':
            choices = context['expected'].replace("'", '').replace(' or ', ', ').split(', ')
            kinds += [f'one of {", ".join(choices)}' if len(choices) > 1 else repr(choices[0])]
            if isinstance(value, str) and len(errors) == 1:
                return f'{path}={short_repr(value)} is not possible; {nearest(value, choices)}'
        elif name in _BOUNDS:
            word, bound = _BOUNDS[name]
            kinds.append(f'{word} {context[bound]:g}')
        elif name in ('too_short', 'too_long'):
            few = name == 'too_short'
            kinds.append(f'a list of at {"least" if few else "most"} {context["min_length" if few else "max_length"]}')
        else:
            kinds.append(_KINDS.get(name) or str(each['msg']))
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    quotes = '; put it in quotes' if 'text' in kinds and is_number else ''
    return f'{path}={short_repr(value)} must be {" or ".join(dict.fromkeys(kinds))}{quotes}'


def _keys_at(kind: Any, loc: Sequence[int | str]) -> list[str]:
    """The keys that a section below a type has."""
    for step in loc:
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            kind = get_args(kind)[-1] if get_args(kind) else None  # of a mapping or list
        elif step in kind.model_fields:
            kind = kind.model_fields[str(step)].annotation
        else:
            kind = get_args(kind.__annotations__.get('__pydantic_extra__', dict[str, Any]))[-1]
        while get_origin(kind) in (Annotated, Union, UnionType):
            kinds = [each for each in get_args(kind) if each is not NoneType]
            kind = kinds[0] if get_origin(kind) is Annotated else kinds[-1]
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []
