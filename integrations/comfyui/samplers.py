"""What is known of ComfyUI's samplers, and of the times and clean images of their steps."""

from __future__ import annotations

from typing import Any

import torch

from asyncdiff.errors import SchedulerError
from asyncdiff.sampling.clean_image import CleanImage

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
#: Below this share of the prediction in x0, or above its inverse, the two cannot be told apart.
_TINY = 1e-8


def name_of(sampler: Any) -> str:
    """What a sampler object of ComfyUI calls the function that it runs."""
    function = getattr(sampler, "sampler_function", None)
    return getattr(function, "__name__", type(sampler).__name__)


def times_of(model_sampling: Any, sigmas: torch.Tensor) -> torch.Tensor:
    """The denoiser's timestep arguments at these sigmas, float32, one a step."""
    return model_sampling.timestep(sigmas).float().reshape(-1)


def clean_images(model_sampling: Any, sigmas: list[float]) -> CleanImage:
    """How clean images follow from predictions at these sigmas, which waves have to know. It is
    read off what ``model_sampling`` makes of images of zeros and ones.

    Raises SchedulerError where they do not follow.
    """
    one, zero = torch.ones(1, 1, 1, 1).double(), torch.zeros(1, 1, 1, 1).double()
    rows = []
    for value in sigmas:
        sigma = torch.tensor([value], dtype=torch.float64)
        scale = model_sampling.calculate_input(sigma, one.clone())
        of_input = model_sampling.calculate_denoised(sigma, zero.clone(), one.clone()) / scale
        of_output = model_sampling.calculate_denoised(sigma, one.clone(), zero.clone())
        image = scale * model_sampling.noise_scaling(sigma, zero.clone(), one.clone())
        noise = scale * model_sampling.noise_scaling(sigma, one.clone(), zero.clone())
        row = [float(x) for x in (of_input, of_output, image, noise)]
        if not _TINY < abs(row[1]) < 1 / _TINY:
            raise SchedulerError(
                f"AsyncDiff parallel: at sigma {value:g} the clean image does not follow from the "
                "prediction: choose schedule asyncdiff"
            )
        rows.append(row)
    columns = (tuple(column) for column in zip(*rows, strict=True))
    return CleanImage(*columns, {"class": type(model_sampling).__name__})
