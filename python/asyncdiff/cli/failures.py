"""Which exceptions are the user's to mend, and what to tell them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType

from ..errors import AsyncDiffError, InputError
from ..launcher import several_processes
from .flags import in_flags

#: optional module -> the extra that brings it
EXTRAS = {
    "accelerate": "diffusers",
    "diffusers": "diffusers",
    "matplotlib": "demo",
    "numpy": "demo",
    "PIL": "demo",
    "rich": "demo",
    "safetensors": "diffusers",
    "skimage": "demo",
    "torch": "demo",
    "transformers": "diffusers",
    "typer": "demo",
}


def explain(error: BaseException) -> str | None:
    """What to tell the user, in the words of the command line; None where the exception is a fault
    of asyncdiff itself. One line, or nothing where everything was said."""
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # of typer's parser
        if type(error).__name__ == "NoArgsIsHelpError":
            return ""  # the help that was shown says it all
        return _line(error.format_message().removeprefix("Invalid value: "))
    if isinstance(error, AsyncDiffError) or _of_core(error):
        return in_flags(_line(str(error))) or type(error).__name__
    if type(error).__name__ == "OutOfMemoryError":
        return f"not enough memory on the GPU: {_line(str(error))}"
    if isinstance(error, ModuleNotFoundError):
        module = (error.name or "").partition(".")[0]
        if module == "asyncdiff_bench":
            return (
                "the exchange benchmark (asyncdiff_bench) is not installed: install asyncdiff "
                "again, with `pip install .`, or `make env` in a checkout"
            )
        if module in EXTRAS:
            return f"{module} is not installed: pip install 'asyncdiff[{EXTRAS[module]}]'"
    return None


def _line(text: str) -> str:
    return " ".join(text.split())


def _of_core(error: BaseException) -> bool:
    """An error that the core raises on purpose. By name: the core may not be importable here."""
    return any(
        kind.__module__.partition(".")[0] == "asyncdiff_core" for kind in type(error).__mro__
    )


@contextlib.contextmanager
def asked_of(name: str) -> Iterator[None]:
    """Around what a library is asked to do as the user wants it: ValueErrors that it raises are
    about that, and become InputErrors. Those that have to do with asyncdiff stay what they are."""
    try:
        yield
    except AsyncDiffError:
        raise
    except (ValueError, NotImplementedError) as error:
        if _ours(error.__traceback__):
            raise
        raise InputError(f"{name} refuses: {_line(str(error))}") from error


def _ours(trace: TracebackType | None) -> bool:
    """Whether an error was raised in asyncdiff, or came through its engine."""
    own = False
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__", ""))
        own = module.startswith(("asyncdiff.", "asyncdiff_core"))
        if own and not module.startswith(_CALLERS):
            return True
        trace = trace.tb_next
    return own


#: What of asyncdiff calls libraries on the user's behalf.
_CALLERS = ("asyncdiff.cli", "asyncdiff.demo", "asyncdiff.integrations", "asyncdiff.tools")


def refuse_launchers() -> None:
    """Raise InputError under torchrun and the like, where every process would do all of the
    work."""
    if several_processes():
        raise InputError(
            "this is one of several processes (WORLD_SIZE is above 1), each of which would do all "
            "of the work: only `asyncdiff generate` runs under torchrun, so start it without"
        )
