"""How often a pipeline is going to call its denoiser in a step, told by its code at the first call.

Many pipelines guide in two calls, if they guide at all. What the second one depends on is mostly
known when the first one is made: before the denoiser is prepared, which takes minutes.
"""

from __future__ import annotations

import ast
import inspect
import operator
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ...errors import SchedulerError

#: A call depends on these, each with whether it has to hold.
_Conditions = tuple[tuple[ast.expr, bool], ...]
_COMPARE = {
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}


class _Unknown(Exception):
    """A condition needs what is not there yet, or what would have to be computed."""


@dataclass(frozen=True)
class _Site:
    """A call of the denoiser in a pipeline's code: its lines, and the innermost loop around it."""

    first: int
    last: int
    loop: ast.AST | None
    conditions: _Conditions


def check_calls(pipe: Any, name: str) -> None:
    """Raise SchedulerError if ``pipe``, whose code is running and calls its attribute ``name`` for
    the first time in a step, is going to do so again in the same step. Says nothing where its code
    does not tell."""
    function = inspect.unwrap(type(pipe).__call__)
    frame = sys._getframe()
    while frame.f_code is not getattr(function, "__code__", None):
        if frame.f_back is None:
            return
        frame = frame.f_back
    sites = _sites(function, name)
    line = frame.f_lineno - frame.f_code.co_firstlineno + 1
    here = [s for s in sites if s.first <= line <= s.last]
    names = frame.f_locals
    more = [
        s
        for s in sites
        if here and s not in here and s.loop is here[0].loop and _holds(s.conditions, names)
    ]
    if more:
        why = " and ".join(ast.unparse(test) for test, _ in more[0].conditions) or "always"
        raise SchedulerError(
            f"{type(pipe).__name__} is going to call its denoiser {1 + len(more)} times in each "
            f"step ({why}): guidance in two calls, which asynchronous denoising cannot serve. "
            "Switch it off (guidance_scale=1, true_cfg_scale=1, no negative prompt), or run the "
            "pipeline without asyncdiff (asyncdiff.restore(pipe))"
        )


@cache
def _sites(function: Any, name: str) -> list[_Site]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # no source
        return []
    called = {ast.unparse(ast.Attribute(ast.Name("self"), name))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.value) in called:
            called |= {ast.unparse(target) for target in node.targets}
    return list(_within(tree, called, None, ()))


def _within(
    node: ast.AST, called: set[str], loop: ast.AST | None, conditions: _Conditions
) -> Iterator[_Site]:
    """The calls in a piece of code."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) in called:
        yield _Site(node.lineno, node.end_lineno or node.lineno, loop, conditions)
    if isinstance(node, (ast.For, ast.While)):
        loop = node
    for field, value in ast.iter_fields(node):
        inside = conditions
        if isinstance(node, (ast.If, ast.IfExp)) and field in ("body", "orelse"):
            inside = (*conditions, (node.test, field == "body"))
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _within(child, called, loop, inside)


def _holds(conditions: _Conditions, names: Mapping[str, Any]) -> bool:
    """Whether conditions are known to hold where variables have these values."""
    try:
        return all(_truth(_value(test, names)) is wanted for test, wanted in conditions)
    except (_Unknown, TypeError, ValueError):  # also of arrays, which are neither true nor false
        return False


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """The value of an expression of names, attributes, comparisons and logic, without side effects.
    Raises _Unknown for any other."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        if node.id not in names:
            raise _Unknown
        return names[node.id]
    if isinstance(node, ast.Attribute):
        try:
            return getattr(_value(node.value, names), node.attr)
        except AttributeError as e:
            raise _Unknown from e
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return not _truth(_value(node.operand, names))
    if isinstance(node, ast.BoolOp):
        both = isinstance(node.op, ast.And)
        return (all if both else any)(_truth(_value(x, names)) for x in node.values)
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
        left, right = _value(node.left, names), _value(node.comparators[0], names)
        return _COMPARE[type(node.ops[0])](left, right)
    raise _Unknown


def _truth(value: Any) -> bool:
    if isinstance(value, torch.Tensor):  # maybe on a GPU, for which the host would wait
        raise _Unknown
    return bool(value)
