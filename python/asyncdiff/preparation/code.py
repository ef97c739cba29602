"""Which code computes: a word for functions, with all that they may reach by name.

A version says what a package's code is only where nobody changes it: not of a package that is
developed, of a user's own denoiser, nor where a function was put in another one's place. So the
bytecode of functions counts, that of the functions that they name, plain values that they name, and
the source files of all of these and of the classes that they name.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import sysconfig
import types
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..graph.state.surroundings import Surroundings
from ..graph.writes import bits

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
#: Where code lies that versions tell of: Python's own, and torch's.
_VERSIONED = (str(Path(torch.__file__).parent), sysconfig.get_path("stdlib"), "<frozen")
_INSTALLED = ("site-packages", "dist-packages")


class Code:
    """Takes functions and classes in; :meth:`word` is one for all of them."""

    def __init__(self) -> None:
        self._found = hashlib.blake2b(digest_size=16)
        self._seen: set[Any] = set()
        #: what was seen stays, so that its address is nobody else's
        self._held: list[Any] = []
        #: functions whose content is still to be taken in, with the class that each is a method of
        self._due: deque[tuple[types.FunctionType, type | None]] = deque()
        self._files: set[str] = set()
        #: what it reads of what changes while a program runs
        self.surroundings = Surroundings()

    def word(self) -> str:
        """A word that other code does not have."""
        while self._due:
            self._content(*self._due.popleft())
        found = self._found.copy()
        for name in sorted(self._files):
            try:
                found.update(_of_file(name, Path(name).stat().st_mtime_ns))
            except OSError:  # made at run time: its bytecode is known
                continue
        return found.hexdigest()

    def reach(self, cls: type, method: str) -> None:
        """Take in what a method of a class reaches: a layer's forward, a processor's call."""
        self._say("class", cls.__module__, cls.__qualname__, method)
        if self._new((id(cls), method), cls):
            self._method(cls, method)
            for base in cls.__mro__:
                if base not in (object, torch.nn.Module) and _versioned(_file_of(base)):
                    self._exchanged(base, cls)

    def kind(self, cls: type) -> None:
        """Take in what all methods of a class reach: of an attention processor, say."""
        self.value(cls)
        for base in cls.__mro__:
            if base is not object and not _versioned(_file_of(base)):
                for name, x in list(vars(base).items()):
                    if isinstance(_inside(x), types.FunctionType):
                        self.reach(cls, name)

    def value(self, value: Any, names: Iterable[str] = ()) -> None:
        """Take in what a function names. ``names``: what else it names, of a module's content.

        Of containers that may be written to, and of objects, only what they are: they change while
        a program runs.
        """
        if isinstance(value, _PLAIN):
            self._say(type(value).__name__, repr(value))
        elif isinstance(value, (tuple, frozenset)):
            # A set has no order.
            for x in value if isinstance(value, tuple) else sorted(value, key=repr):
                self.value(x)
        elif isinstance(value, type):
            self._say("class", value.__module__, value.__qualname__)
            file = _file_of(value)
            if file and not _versioned(file):
                self._files.add(file)
        elif isinstance(value, types.ModuleType):
            self._module(value, names)
        elif isinstance(value, torch.Tensor):  # which becomes a constant of the graph
            self._say(repr(word_of_tensor(value)))
        elif not self._function(value):
            self._say("object", type(value).__module__, type(value).__qualname__)

    def _exchanged(self, base: type, owner: type) -> None:
        """Take in what was put in the place of methods of a class that a version tells of."""
        for name, x in list(vars(base).items()):
            function = _inside(x)
            if isinstance(function, types.FunctionType) and not _versioned(
                function.__code__.co_filename
            ):
                self._say(name)
                self._function(x, owner)

    def _say(self, *words: str) -> None:
        for word in words:
            self._found.update(word.encode() + b"\0")

    def _new(self, key: Any, value: Any) -> bool:
        if key in self._seen:
            return False
        self._seen.add(key)
        self._held.append(value)
        return True

    def _module(self, module: types.ModuleType, names: Iterable[str]) -> None:
        self._say("module", module.__name__)
        content = vars(module)
        for name in names:
            if name in content and self._new((id(module), name), module):
                self._say(name)
                self.value(content[name], names)

    def _method(self, cls: type, name: str) -> None:
        for base in cls.__mro__:
            if name in vars(base):
                self._say(name)
                self._function(vars(base)[name], cls)
                return

    def _function(self, value: Any, owner: type | None = None) -> bool:
        """Take in a function, if it is one; ``owner``: whose method it is."""
        function = _inside(value)
        name = getattr(function, "__qualname__", None)
        if not isinstance(name, str):
            return False
        self._say("function", str(getattr(function, "__module__", "")), name)
        if not isinstance(function, types.FunctionType) or _versioned(
            function.__code__.co_filename
        ):
            return True
        if self._new((id(function), id(owner)), (function, owner)):
            self._due.append((function, owner))
        return True

    def _content(self, function: types.FunctionType, owner: type | None) -> None:
        self._say("content", function.__qualname__)
        self._files.add(function.__code__.co_filename)
        names = self._bytecode(function.__code__)
        self.value(function.__defaults__)
        self.value(function.__kwdefaults__)
        for cell in function.__closure__ or ():
            try:
                self.value(cell.cell_contents, names)
            except ValueError:  # not assigned yet
                continue
        for name in names:
            if name in function.__globals__:
                self._say(name)
                self.value(function.__globals__[name], names)
            if owner is not None:
                self._method(owner, name)

    def _bytecode(self, code: types.CodeType) -> list[str]:
        """Take in what a function does; all names in it."""
        self._found.update(code.co_code)
        names = list(code.co_names)
        self._say(*code.co_varnames, *code.co_freevars, *names)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                names += self._bytecode(constant)
            else:
                self.value(constant)
        return list(dict.fromkeys(names))


def word_of_tensor(x: torch.Tensor) -> tuple[Any, ...]:
    """A tensor that is no weight, by its values. On a GPU the host waits."""
    about = type(x).__qualname__, tuple(x.shape), x.stride(), str(x.dtype), str(x.device)
    if x.device.type == "meta" or x.numel() == 0:
        return about
    values = bits(x.detach().contiguous()).cpu().numpy()
    return *about, hashlib.blake2b(values.data, digest_size=16).hexdigest()


def _inside(value: Any) -> Any:
    """The function in a method, property, partial or cached function."""
    for attribute in ("__func__", "fget", "func", "__wrapped__"):
        inner = None if isinstance(value, types.FunctionType) else getattr(value, attribute, None)
        if callable(inner):
            return _inside(inner)
    return value


def _file_of(cls: type) -> str:
    """The file of the module that a class is of, '' where there is none."""
    return getattr(sys.modules.get(cls.__module__), "__file__", None) or ""


@functools.cache
def _versioned(file: str) -> bool:
    """Whether a version tells what a file's code is."""
    for folder in _VERSIONED:
        if file.startswith(folder):
            return not any(part in file.removeprefix(folder) for part in _INSTALLED)
    return False


@functools.lru_cache(maxsize=4096)
def _of_file(name: str, written: int) -> bytes:
    return hashlib.blake2b(Path(name).read_bytes(), digest_size=16).digest()
