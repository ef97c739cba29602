"""``python -m asyncdiff`` is ``asyncdiff``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
