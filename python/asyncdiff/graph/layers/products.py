"""Products of integers that GPUs do not take as they are.

Quantised layers whose activations are integers, too, multiply them into 32 bits. cuBLAS does so
for more than 16 rows only; the layers look at that when they are called by themselves, but not
while they are exported.
"""

from __future__ import annotations

import torch
from torch import fx
from torch._higher_order_ops.out_dtype import out_dtype

aten = torch.ops.aten

#: Of the first factor, at least.
_ROWS = 17


def fill_rows(graph: fx.Graph) -> None:
    """Give products of integers that have too few rows further ones, of zeros, and take them from
    the result: the others are the same."""
    for node in list(graph.find_nodes(op="call_function", target=out_dtype)):
        operation, dtype, left = node.args[:3]
        rows = left.meta["val"].shape[0]
        if (operation, dtype) != (aten.mm.default, torch.int32) or rows >= _ROWS:
            continue
        with graph.inserting_before(node):
            more = [0, 0, 0, _ROWS - rows]
            wide = graph.call_function(aten.constant_pad_nd.default, (left, more))
            product = graph.call_function(out_dtype, (operation, dtype, wide, node.args[3]))
            result = graph.call_function(aten.slice.Tensor, (product, 0, 0, rows))
        wide.meta["val"] = aten.constant_pad_nd.default(left.meta["val"], more)
        value = node.meta["val"]
        product.meta["val"] = value.new_empty((_ROWS, value.shape[1]))
        result.meta["val"] = product.meta["val"][:rows]
        for made in (wide, product, result):
            made.meta = {**node.meta, "val": made.meta["val"]}
        node.replace_all_uses_with(result)
        graph.erase_node(node)
