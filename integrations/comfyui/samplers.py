"""What is known of ComfyUI's samplers by their names, and the times of their steps."""

from __future__ import annotations

from typing import Any

import torch

#: Functions of samplers that evaluate the denoiser once at each sigma but the last, in order.
#: Others (heun, dpm_2, dpmpp_sde, ...) do so twice, or at sigmas in between.
ONCE = {
    "sample_euler", "sample_euler_cfg_pp", "sample_euler_ancestral", "sample_euler_ancestral_RF",
    "sample_euler_ancestral_cfg_pp", "sample_lms", "sample_dpmpp_2m", "sample_dpmpp_2m_cfg_pp",
    "sample_dpmpp_2m_sde", "sample_dpmpp_2m_sde_gpu", "sample_dpmpp_2m_sde_heun",
    "sample_dpmpp_2m_sde_heun_gpu", "sample_dpmpp_3m_sde", "sample_dpmpp_3m_sde_gpu", "sample_ddpm",
    "sample_lcm", "sample_ipndm", "sample_ipndm_v", "sample_deis", "sample_res_multistep",
    "sample_res_multistep_cfg_pp", "sample_res_multistep_ancestral",
    "sample_res_multistep_ancestral_cfg_pp", "sample_gradient_estimation",
    "sample_gradient_estimation_cfg_pp", "sample_er_sde", "sample_sa_solver", "sample_unipc",
    "sample_unipc_bh2",
}  # fmt: skip


def name_of(sampler: Any) -> str:
    """What a sampler object of ComfyUI calls the function that it runs."""
    function = getattr(sampler, "sampler_function", None)
    return getattr(function, "__name__", type(sampler).__name__)


def times_of(model_sampling: Any, sigmas: torch.Tensor) -> torch.Tensor:
    """The denoiser's timestep arguments at these sigmas, float32, one a step."""
    return model_sampling.timestep(sigmas).float().reshape(-1)
