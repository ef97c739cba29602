"""The shipped text-to-emoji model: weights, word encoder, pipeline. Use asyncdiff.demo_model."""
