"""The kernels of packed values in Triton's interpreter, beside the reference. A process of its own,
because Triton decides when it is imported whether it interprets (TRITON_INTERPRET=1)."""

from __future__ import annotations

import torch
from codecs_example import DTYPES, SIZES, check_wild, example, same, sent, wild

from asyncdiff.runtime.exchange.compression import kernels, reference
from asyncdiff.runtime.exchange.compression.codec import LARGEST


def main() -> None:
    """Raise AssertionError where anything is other."""
    for kind in LARGEST:
        for dtype in DTYPES:
            for count in SIZES:
                mine, theirs = example(dtype, count), example(dtype, count)
                kernels.encode(*mine, kind)
                reference.encode(*theirs, kind)
                assert torch.equal(mine.packed, theirs.packed), (kind, dtype, count)
                # The interpreter cuts what it makes a bfloat16 of off, where a GPU rounds it.
                exact = dtype is not torch.bfloat16
                assert torch.equal(mine.new, theirs.new) or not exact, (kind, dtype, count)
                torch.testing.assert_close(mine.new, theirs.new, rtol=0.01, atol=1e-3)
                kernels.decode(mine.packed, mine.last, mine.older, mine.older, kind)
                assert torch.equal(mine.older, mine.new), (kind, dtype, count)
        for dtype in DTYPES:
            values = wild(dtype, SIZES[2])
            mine, theirs = (sent(codec, values, kind) for codec in (kernels, reference))
            check_wild(mine)
            # Of bfloat16 it cuts off, and what comes after differs.
            for a, b in zip(mine, theirs, strict=True) if dtype is not torch.bfloat16 else ():
                assert torch.equal(a.packed, b.packed), (kind, dtype)
                same(a.value, b.value)


if __name__ == "__main__":
    main()
