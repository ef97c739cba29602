"""How often a pipeline is going to call its denoiser in a step, told by its code at the first call.

Many pipelines guide in two calls, if they guide at all. What the second one depends on is mostly
known when the first one is made: before settings are chosen, and the denoiser is prepared for them.
"""

from __future__ import annotations

import ast
import copy
import inspect
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import FrameType
from typing import Any

#: A call depends on these, each with whether it has to hold.
_Conditions = tuple[tuple[ast.expr, bool], ...]
#: What conditions may be made of, to be looked at ahead: nothing that computes or calls something.
_PLAIN = (
    *(ast.Constant, ast.Name, ast.Attribute, ast.expr_context, ast.Compare, ast.cmpop),
    *(ast.BoolOp, ast.boolop, ast.UnaryOp, ast.Not),
)


@dataclass(frozen=True)
class _Site:
    """A call of the denoiser in a pipeline's code, and the innermost loop around it."""

    lines: range
    loop: ast.AST | None
    conditions: _Conditions


def calls_in_a_step(pipe: Any, name: str) -> int | None:
    """How often ``pipe``, whose code is running and calls its attribute ``name`` for the first time
    in a step, calls it in this step; None where its code does not tell."""
    function = inspect.unwrap(type(pipe).__call__)
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not getattr(function, "__code__", None):
        frame = frame.f_back
    if frame is None:
        return None
    sites = _sites(function, name)
    line = frame.f_lineno - frame.f_code.co_firstlineno + 1
    loops = [s.loop for s in sites if line in s.lines]
    if not loops:
        return None
    others = [s for s in sites if line not in s.lines and s.loop is loops[0]]
    return 1 + sum(_hold(s.conditions, frame) for s in others)


def most_conditions(guider: Any) -> int | None:
    """How many calls the steps of a modular pipeline have at most, whose ``guider`` is in its first
    step: some have more in the middle. None where there is no guider, or it does not tell."""
    try:
        probe, state = copy.copy(guider), guider.get_state()
        found = []
        for step in range(state["num_inference_steps"]):
            probe.set_state(step, state["num_inference_steps"], state["timestep"])
            found.append(probe.num_conditions)
        return max(found, default=None)
    except (AttributeError, KeyError, TypeError):
        return None


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
        lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
        yield _Site(lines, loop, conditions)
    if isinstance(node, (ast.For, ast.While)):
        loop = node
    for field, value in ast.iter_fields(node):
        inside = conditions
        if isinstance(node, (ast.If, ast.IfExp)) and field in ("body", "orelse"):
            inside = (*conditions, (node.test, field == "body"))
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _within(child, called, loop, inside)


def _hold(conditions: _Conditions, frame: FrameType) -> bool:
    """Whether conditions are known to hold for the variables of code that runs."""
    for test, wanted in conditions:
        if not all(isinstance(node, _PLAIN) for node in ast.walk(test)):
            return False
        code = compile(ast.Expression(test), "<condition>", "eval")
        try:
            if bool(eval(code, {"__builtins__": {}}, frame.f_locals)) is not wanted:
                return False
        except Exception:  # a variable that is not there yet, an array that is neither true nor not
            return False
    return True
