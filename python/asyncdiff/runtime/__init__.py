"""Runs plans: engine, workers, mailboxes, CUDA graphs, caches. Knows nothing of samplers."""
