"""The engine against exact results of the published algorithm, on the CPU."""

from __future__ import annotations

import pytest
import reference
import torch
from rotation import often

import asyncdiff

#: A case of each denoiser in which the pipeline is compared once more after ``restore()``.
WHOLE = ("sd21_ddim_n3s2w3", "sdxl_euler_n3s2w1")
#: Tried every time: a stride, two components, two samplers, many components.
OFTEN = ("sd21_ddim_n3s2w3", "sd21_ddim_n2s1w1", "sd21_ddim_n2s2w1", "sd21_dpm_n4s1w1")


@pytest.mark.parametrize("name", often(OFTEN, reference.NAMES))
def test_reference_case(name: str) -> None:
    spec = reference.case(name)
    pipe = reference.pipeline(spec)
    ranks = spec["components"] + spec["stride"] - 1
    handle = asyncdiff.parallelize(pipe, devices=["cpu"] * ranks, **reference.settings(spec))
    got = reference.run(pipe, spec)
    assert reference.distance(got, reference.expected()[name]) < 1e-4
    # A second generation, on mailboxes that the first one left behind, is the same.
    assert torch.equal(reference.run(pipe, spec), got)
    report = handle.report()
    assert report.steps == spec["steps"]
    handle.restore()
    if name in WHOLE:  # exactly the plain pipeline, as in test_families and test_diffusers
        assert torch.equal(reference.run(pipe, spec), reference.run(reference.pipeline(spec), spec))
