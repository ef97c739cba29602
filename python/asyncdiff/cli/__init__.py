"""The command line: ``asyncdiff demo | generate | plan | tune | calibrate | doctor | bench``.

One file a command. Nothing here imports torch before a command runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .failures import explain


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    0: done. 2: the user's mistake or something missing, said in one line. 130: interrupted.
    Anything else that is raised is a fault of asyncdiff, and its traceback is left to be seen.
    """
    try:
        from .app import app
    except ModuleNotFoundError as error:
        message = explain(error)
        if message is None:
            raise
        print(f"asyncdiff: {message}", file=sys.stderr)
        return 2
    try:
        app(args=None if argv is None else list(argv), prog_name="asyncdiff")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except KeyboardInterrupt:
        print("asyncdiff: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        print(f"asyncdiff: {message}", file=sys.stderr)
        return 2
    return 0
