"""The shipped text-to-emoji model: weights, word encoder, pipeline.

from asyncdiff import demo
demo.load()("smiling face with sunglasses").images[0].save("emoji.png")
"""

from .model import captions, known_prompts, load

__all__ = ["captions", "known_prompts", "load"]
