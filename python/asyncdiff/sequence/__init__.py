"""Sequence parallelism: the tokens of a transformer shared out among ranks."""
