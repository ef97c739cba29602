"""What goes on while a denoiser is exported."""
