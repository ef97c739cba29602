"""``asyncdiff.parallelize(pipe)`` for pipelines of diffusers."""
