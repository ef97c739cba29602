"""A command whose parameters are groups of options, as typer wants it: option by option."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_type_hints

import typer


@dataclass(frozen=True)
class Given:
    """Which parameters of a command were given on the command line: what a command gets for a
    parameter of this type."""

    names: frozenset[str] = frozenset()


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """A command as typer sees it: each parameter that is a group of options (a dataclass) replaced
    by the options of the group, which the command then gets as one object."""
    hints = get_type_hints(command, include_extras=True)
    wanting = [name for name, kind in hints.items() if kind is Given]
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if kind is Given:
            parameters.append(_parameter(_CONTEXT, typer.Context, inspect.Parameter.empty))
        elif is_dataclass(kind):
            groups[parameter.name] = kind
            own = get_type_hints(kind, include_extras=True)
            parameters += [_parameter(f.name, own[f.name], f.default) for f in fields(kind)]
        else:
            parameters.append(_parameter(parameter.name, kind, parameter.default))

    @functools.wraps(command)
    def run(**values: Any) -> None:
        context = values.pop(_CONTEXT, None)
        for name in wanting:
            values[name] = Given(frozenset(p for p in values if _is_given(context, p)))
        for name, kind in groups.items():
            values[name] = kind(**{f.name: values.pop(f.name) for f in fields(kind)})
        command(**values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


#: The parameter by which typer hands over what it has read.
_CONTEXT = "context"


def _is_given(context: typer.Context, parameter: str) -> bool:
    source = context.get_parameter_source(parameter)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


def _parameter(name: str, kind: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def option_of(group: type, name: str) -> str:
    """The long flag of an option of a group."""
    (option,) = get_type_hints(group, include_extras=True)[name].__metadata__
    named = [d for d in (option.default, *option.param_decls) if str(d).startswith("--")]
    return named[0] if named else "--" + name.replace("_", "-")
