"""What a denoiser is made of, and what of that a captured graph follows."""
