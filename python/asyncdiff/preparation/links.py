"""How fast the links between devices are, kept for other processes on the same ones."""

from __future__ import annotations

from collections.abc import Sequence

from ..partition.links import Links
from .folder import preparations
from .identity import digest
from .key import versions

_KIND = "links"


class KeptLinks:
    """The links between ranks on GPUs of these names, in the order of ranks; ``transport``: how
    bundles are made to travel."""

    def __init__(self, names: Sequence[str], transport: str) -> None:
        self._folder = preparations()
        self._key = digest([list(names), transport, versions()])
        self._of = f"links between {len(names)} GPUs"

    def get(self) -> list[list[float]] | None:
        """What :meth:`Links.to_list` told of those that are known."""
        if not self._folder.usable():
            return None
        data = self._folder.read(_KIND, self._key)
        try:
            return None if data is None else [[*map(float, row)] for row in data["links"]]
        except (KeyError, TypeError, ValueError) as e:  # whatever is in a file
            where = self._folder.file(_KIND, self._key)
            self._folder.say(f"a preparation on the disk is ignored, {where}: {e!r}")
            return None

    def keep(self, links: Links) -> None:
        """Keep them, if any were measured."""
        if links.pairs and self._folder.usable():
            self._folder.write(_KIND, self._key, self._of, {"links": links.to_list()})
