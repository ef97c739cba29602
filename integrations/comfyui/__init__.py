"""ComfyUI's entry to the node pack: the nodes, by class name, and what its menu calls them."""

from .node import AsyncDiffByQuality, AsyncDiffParallel

NODE_CLASS_MAPPINGS = {
    "AsyncDiffByQuality": AsyncDiffByQuality,
    "AsyncDiffParallel": AsyncDiffParallel,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "AsyncDiffByQuality": "AsyncDiff parallel",
    "AsyncDiffParallel": "AsyncDiff parallel (by hand)",
}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
