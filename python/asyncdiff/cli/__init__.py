"""The command line: ``asyncdiff demo | generate | plan | tune | calibrate | doctor | bench``.

One file a command, in ``commands/``. Nothing here imports torch before a command runs, so that
``--help`` is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .failures import explain

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    0: done. 2: the user's mistake or something missing, said in one line. 130: interrupted.
    Anything else that is raised is a fault of asyncdiff, and its traceback is left to be seen.
    """
    try:
        from .app import command

        args = None if argv is None else list(argv)
        # Not "standalone": all mistakes then look alike, whoever finds them.
        done = command().main(args=args, prog_name="asyncdiff", standalone_mode=False)
    except KeyboardInterrupt:
        done = INTERRUPTED
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        if message:
            print(f"asyncdiff: {message}", file=sys.stderr)
        return 2
    code = done if isinstance(done, int) else 0
    if code == INTERRUPTED:
        print("asyncdiff: interrupted", file=sys.stderr)
    return code
