"""Code that is written when it is first asked for, however that is."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from asyncdiff.graph.tracing.lazy_code import LazyModule, uncompiled


def _graph() -> fx.Graph:
    graph = fx.Graph()
    graph.output(graph.call_function(torch.neg, (graph.placeholder("x"),)))
    return graph


def _lazy() -> fx.GraphModule:
    return LazyModule(nn.Module(), _graph())


def _meanwhile() -> fx.GraphModule:
    """Made as torch.export makes its own."""
    with uncompiled():
        return fx.GraphModule(nn.Module(), _graph())


def _pickled(module: fx.GraphModule) -> fx.GraphModule:
    again: fx.GraphModule = pickle.loads(pickle.dumps(module))
    return again


@pytest.mark.parametrize(
    "make, copied",
    [
        (_lazy, copy.copy),
        (_lazy, copy.deepcopy),
        (_lazy, _pickled),
        (_meanwhile, copy.copy),
        (_meanwhile, copy.deepcopy),
    ],
)
@pytest.mark.parametrize("called", [False, True])
def test_copies(
    make: Callable[[], fx.GraphModule],
    copied: Callable[[fx.GraphModule], fx.GraphModule],
    called: bool,
) -> None:
    module = make()
    if called:
        module(torch.ones(1))
    assert copied(module)(torch.ones(1)) == module(torch.ones(1)) == -1


@pytest.mark.parametrize("make", [_lazy, _meanwhile])
@pytest.mark.parametrize("shown", [str, lambda m: m.code, lambda m: m.print_readable(False)])
def test_what_is_shown(
    make: Callable[[], fx.GraphModule], shown: Callable[[fx.GraphModule], str]
) -> None:
    assert "neg" in shown(make())


def test_it_is_written_anew_when_the_graph_has_changed() -> None:
    module = _lazy()
    assert module(torch.ones(1)) == -1 and "neg" in module.code
    (node,) = module.graph.find_nodes(op="call_function", target=torch.neg)
    node.target = torch.exp
    module.recompile()
    assert "exp" in str(module) and module(torch.zeros(1)) == 1
    assert _pickled(module)(torch.zeros(1)) == 1
    node.target = torch.cos
    module.recompile()  # later again
    assert module(torch.zeros(1)) == 1 and "cos" in module.code
