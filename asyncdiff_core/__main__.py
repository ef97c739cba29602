"""``python -m asyncdiff_core --cmakedir | --pkgconfigdir | --includes | --cflags | --libs |
--info``: for build scripts."""

from __future__ import annotations

import argparse
import shlex
import sys

from . import (
    build_info,
    get_cmake_dir,
    get_compile_flags,
    get_include,
    get_link_flags,
    get_pkgconfig_dir,
)
from .errors import CoreError


def main() -> int:
    """Print what was asked for, one line each, quoted for a shell where several flags stand on it.

    Returns 2 after one line about what is wrong.
    """
    parser = argparse.ArgumentParser(prog="python -m asyncdiff_core")
    parser.add_argument("--cmakedir", action="store_true", help="folder of the CMake package")
    parser.add_argument("--pkgconfigdir", action="store_true", help="folder of the .pc files")
    parser.add_argument("--includes", action="store_true", help="include flag for a compiler")
    parser.add_argument("--cflags", action="store_true", help="all flags for a compiler")
    parser.add_argument("--libs", action="store_true", help="flags for a linker, after the objects")
    parser.add_argument("--cuda", action="store_true", help="--cflags and --libs for GPUs too")
    parser.add_argument("--info", action="store_true", help="what it was built with")
    args = parser.parse_args()
    if not any(vars(args).values()):
        parser.print_help()
    if args.cuda and not (args.cflags or args.libs):
        parser.error("--cuda goes with --cflags and --libs")
    try:
        if args.cmakedir:
            print(get_cmake_dir())
        if args.pkgconfigdir:
            print(get_pkgconfig_dir())
        if args.includes:
            print(shlex.quote(f"-I{get_include()}"))
        if args.cflags:
            print(shlex.join(get_compile_flags(args.cuda)))
        if args.libs:
            print(shlex.join(get_link_flags(args.cuda)))
    except CoreError as error:
        print(f"asyncdiff_core: {error}", file=sys.stderr)
        return 2
    if args.info:
        print(*(f"{k}: {v}" for k, v in build_info().items()), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
