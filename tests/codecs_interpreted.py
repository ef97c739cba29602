"""The kernels of packed values in Triton's interpreter, beside the reference. A process of its own,
because Triton decides when it is imported whether it interprets (TRITON_INTERPRET=1)."""

from __future__ import annotations

import torch
from codecs_example import DTYPES, SIZES, example

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
        bad = example(torch.float32, SIZES[0])
        bad.value[100] = torch.nan
        kernels.encode(*bad, kind)
        kernels.decode(bad.packed, bad.last, bad.older, bad.older, kind)
        assert bad.new[100].isnan() and bad.older[100].isnan()
        assert bad.new[:64].isfinite().all() and bad.new[128:].isfinite().all()


if __name__ == "__main__":
    main()
