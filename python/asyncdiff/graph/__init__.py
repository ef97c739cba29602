"""A denoiser as a graph: call signature, export, programs of components, what leaves the loop,
compilation, weights."""
