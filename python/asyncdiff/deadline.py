"""How long a rank waits for another before it gives up."""

from __future__ import annotations

import asyncdiff_core as core

from .errors import InputError


def check_deadline(deadline: float | None) -> float:
    """The deadline in seconds; None takes ``ASYNCDIFF_DEADLINE``, else 10.

    What is allowed is the core's business: it is asked. Raises InputError for what is not a
    positive number of seconds, at most a day, the environment's included, and for what the
    environment says of links (``ASYNCDIFF_LINK``) where that is none, or would be too slow for it.
    """
    try:
        seconds = core.HostFabric(1, deadline=deadline, link="off").deadline
    except (TypeError, core.InvalidArgument) as e:
        if deadline is None:
            raise InputError(str(e)) from e
        raise InputError(
            f"deadline={deadline!r}: write a positive number of seconds, at most a day, or None "
            "for ASYNCDIFF_DEADLINE, else 10"
        ) from e
    try:
        core.HostFabric(1, deadline=seconds)
    except core.InvalidArgument as e:
        raise InputError(str(e)) from e
    return seconds
