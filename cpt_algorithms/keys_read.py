# SPDX-License-Identifier: Apache-2.0
"""Which keys of a mapping a function of somebody else's reads, from its source: what may stand in a YAML follows."""

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any

__all__ = ['keys_read']


@cache
def keys_read(function: Callable[..., Any], argument: str) -> frozenset[str]:
    """The keys that a function, and those of its module that it hands the mapping to, reads.

    ``mapping['key']``, ``mapping.get('key')``, ``mapping.pop('key')`` and ``'key' in mapping``; what is read under a
    name that is only known while it runs, or handed on whole (``**mapping``), is not among them.

    Args:
        function: A function whose source is there.
        argument: What it calls the mapping: an argument, or a variable.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Subscript) and _is(node.value, argument):
            found |= _text(node.slice)
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In) and _is(node.comparators[0], argument):
            found |= _text(node.left)
        elif isinstance(node, ast.Call):
            if (
                isinstance(node.func, ast.Attribute)
                and node.func.attr in ('get', 'pop')
                and _is(node.func.value, argument)
            ):
                found |= _text(node.args[0])
            elif isinstance(node.func, ast.Name):
                found |= _of_helper(function, node, node.func.id, argument)
    return frozenset(found)


def _of_helper(function: Any, call: ast.Call, name: str, argument: str) -> frozenset[str]:
    helper = function.__globals__.get(name)
    if not inspect.isfunction(helper) or helper.__module__ != function.__module__ or helper is function:
        return frozenset()
    names = list(inspect.signature(helper).parameters)
    passed = [there for there, given in zip(names, call.args, strict=False) if _is(given, argument)]
    passed += [each.arg for each in call.keywords if each.arg and _is(each.value, argument)]
    return frozenset().union(*(keys_read(helper, there) for there in passed))


def _is(node: ast.expr, name: str) -> bool:
    """The variable, or its ``keys()``."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == 'keys':
        node = node.func.value
    return isinstance(node, ast.Name) and node.id == name


def _text(node: ast.expr) -> set[str]:
    return {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()
