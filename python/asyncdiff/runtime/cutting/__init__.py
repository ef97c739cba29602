"""Where a denoiser is cut: what its nodes, its components and the links take on the devices that
there are, what fits there, and one cut for all processes."""
