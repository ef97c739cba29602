"""ComfyUI's entry to the node pack: the nodes, by class name, and what its menu calls them."""

from .node import AsyncDiffParallel

NODE_CLASS_MAPPINGS = {"AsyncDiffParallel": AsyncDiffParallel}
NODE_DISPLAY_NAME_MAPPINGS = {"AsyncDiffParallel": "AsyncDiff parallel"}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
