"""ComfyUI's own ``main.py``: ``python serve.py FOLDER_OF_COMFYUI OPTIONS...``."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2] / "benchmarks")
    from comfyui.loading import pretend_unused

    pretend_unused()
    folder = Path(sys.argv[1])
    sys.path[0] = str(folder)  # as if main.py had been named on the command line
    sys.argv = [str(folder / "main.py"), *sys.argv[2:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
