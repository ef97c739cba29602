"""``asyncdiff bench exchange``, its results with the hardware, versions and command, as a file.

    python benchmarks/exchange/run.py                # $OUT/exchange.json and .png
    python benchmarks/exchange/run.py --quick --cases latency

Takes all options of the command; a later --out or --png goes before those given here. To be shown
in the README, the JSON goes to benchmarks/results/exchange_*.json.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import results_file
from asyncdiff.cli import main

OUT = Path(os.environ.get("OUT", results_file.ROOT / "benchmarks" / "results"))

if __name__ == "__main__":
    files = ["--out", str(OUT / "exchange.json"), "--png", str(OUT / "exchange.png")]
    sys.exit(main(["bench", "exchange", *files, *sys.argv[1:]]))
