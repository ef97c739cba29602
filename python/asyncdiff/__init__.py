"""Asynchronous denoising of diffusion models over several GPUs (AsyncDiff, NeurIPS 2024)."""
