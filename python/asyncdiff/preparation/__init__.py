"""What preparing a denoiser found out, kept on the disk for other processes."""
