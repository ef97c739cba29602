"""The drop-in's tests pass in processes that share out the ranks, with the bits of one process."""

from __future__ import annotations

from pathlib import Path

import group_dropin
import pytest
from group import run

#: Whose tests have so many ranks, and a part of them where all take more than a minute.
FILES = {
    "test_diffusers.py any_scheduler or image": (2, 3),
    "test_diffusers.py transformers or flux": (2, 3, 4),
    "test_diffusers.py not (any_scheduler or image or transformers or flux)": (2, 3, 4),
    "test_dropin_adapters.py ": (2, 3, 4),
    "test_dropin_branches.py ": (2,),
    "test_dropin_changes.py ": (2, 3, 4),
    "test_dropin_handle.py ": (2, 3, 4),
    "test_dropin_hooks.py ": (2, 3, 4),
    "test_dropin_modular.py ": (2,),
    "test_dropin_pipeline.py ": (2,),
    "test_dropin_prepare.py ": (2,),
    "test_dropin_quality.py ": (2, 3, 4),
    "test_dropin_refusals.py ": (2,),
    "test_dropin_surroundings.py ": (2,),
    "test_dropin_times.py ": (2,),
    "test_dropin_tokens.py plain_one": (2, 4),
    "test_dropin_tokens.py not plain_one": (2,),
    "test_dropin_weights.py ": (2,),
    "test_step_calls.py ": (2,),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tests", "processes"), [(tests, n) for tests, counts in FILES.items() for n in counts]
)
def test_as_in_one_process(tests: str, processes: int, tmp_path: Path) -> None:
    """Where cuts are measured they may be others; then the processes still agree."""
    option = f"{processes} {tests}"
    (tmp_path / "alone").mkdir()
    (tmp_path / "group").mkdir()
    (alone,) = run(group_dropin.dropin, 1, tmp_path / "alone", [option])
    first, *others = run(group_dropin.dropin, processes, tmp_path / "group", [option])
    assert first and all(other == first for other in others)
    passed = {name for name, (said, _) in first.items() if said == "passed"}
    assert passed == {name for name, (said, _) in alone.items() if said == "passed"} != set()
    failed = {name: said for name, (said, _) in first.items() if said not in ("passed", "skipped")}
    assert not failed
    for name in passed:
        (_, mine), (_, theirs) = alone[name], first[name]
        if {cuts for cuts, _ in mine} == {cuts for cuts, _ in theirs}:
            assert mine == theirs, name
