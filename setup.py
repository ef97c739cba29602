"""Packages for setuptools; CMakeLists.txt builds the extension (scikit-build-core's plugin)."""

from setuptools import find_packages, setup

# Without an entry for "": editable installs put the extension relative to that one, and it belongs
# into asyncdiff_core/ beside this file.
setup(
    packages=[*find_packages("python"), *find_packages("benchmarks/exchange"), "asyncdiff_core"],
    package_dir={
        "asyncdiff": "python/asyncdiff",
        "asyncdiff_bench": "benchmarks/exchange/asyncdiff_bench",
        "asyncdiff_core": "asyncdiff_core",
    },
    cmake_source_dir=".",
)
