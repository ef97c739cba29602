"""``python -m asyncdiff_core --cmakedir | --includes | --cflags | --libs | --info``: for build
scripts."""

from __future__ import annotations

import argparse

from . import build_info, get_cmake_dir, get_compile_flags, get_include, get_link_flags


def main() -> None:
    """Print what was asked for, one line each."""
    parser = argparse.ArgumentParser(prog="python -m asyncdiff_core")
    parser.add_argument("--cmakedir", action="store_true", help="folder of the CMake package")
    parser.add_argument("--includes", action="store_true", help="include flag for a compiler")
    parser.add_argument("--cflags", action="store_true", help="all flags for a compiler")
    parser.add_argument("--libs", action="store_true", help="flags for a linker, after the objects")
    parser.add_argument("--info", action="store_true", help="what it was built with")
    args = parser.parse_args()
    if not any(vars(args).values()):
        parser.print_help()
    if args.cmakedir:
        print(get_cmake_dir())
    if args.includes:
        print(f"-I{get_include()}")
    if args.cflags:
        print(*get_compile_flags())
    if args.libs:
        print(*get_link_flags())
    if args.info:
        print(*(f"{k}: {v}" for k, v in build_info().items()), sep="\n")


if __name__ == "__main__":
    main()
