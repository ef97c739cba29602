"""Products of integers that GPUs do not take as they are.

Quantised layers whose activations are integers, too, multiply them into 32 bits. cuBLAS does so
for more than 16 rows only; the layers look at that when they are called by themselves, but not
while they are exported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.out_dtype import out_dtype

aten = torch.ops.aten

#: Of the first factor, at least.
ROWS = 17
#: The product.
INTEGERS = aten._int_mm.default


def fill_rows(graph: fx.Graph) -> None:
    """Give products of integers that have too few rows further ones, of zeros, and take them from
    the result: the others are the same."""
    for node in list(graph.nodes):
        factor = _first_factor(node)
        if factor is None:
            continue
        left = node.args[factor]
        rows = left.meta["val"].shape[0]
        if rows >= ROWS:
            continue
        with graph.inserting_before(node):
            wide, product, result = with_rows(graph, node.target, node.args, factor, rows)
        wide.meta["val"] = aten.constant_pad_nd.default(left.meta["val"], wide.args[1])
        value = node.meta["val"]
        product.meta["val"] = value.new_empty((ROWS, value.shape[1]))
        result.meta["val"] = product.meta["val"][:rows]
        for made in (wide, product, result):
            made.meta = {**node.meta, "val": made.meta["val"]}
        node.replace_all_uses_with(result)
        graph.erase_node(node)


def with_rows(
    graph: fx.Graph, target: Any, args: tuple[Any, ...], factor: int, rows: int
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """A product of integers whose first factor, the argument ``factor``, has so few rows: that with
    further ones, the product, and its rows."""
    more = [0, 0, 0, ROWS - rows]
    wide = graph.call_function(aten.constant_pad_nd.default, (args[factor], more))
    product = graph.call_function(target, (*args[:factor], wide, *args[factor + 1 :]))
    return wide, product, graph.call_function(aten.slice.Tensor, (product, 0, 0, rows))


def _first_factor(node: fx.Node) -> int | None:
    """Which argument is the first factor of a product of integers; None for another operation."""
    if node.op != "call_function":
        return None
    if node.target is INTEGERS:
        return 0
    # Until the graph is decomposed; on CPUs also afterwards.
    if node.target is out_dtype and node.args[:2] == (aten.mm.default, torch.int32):
        return 2
    return None
