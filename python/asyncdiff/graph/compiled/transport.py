"""Pieces on their way to another process of ours, and messages between the two."""

from __future__ import annotations

import io
import pickle
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

_HEADER = struct.Struct("!Q")


class NotSentError(Exception):
    """A piece that has no form in which it could be sent."""


@dataclass(frozen=True)
class _Place:
    """Stands for the node at a place in the order of the graph."""

    place: int


def packed(piece: fx.GraphModule, given: Sequence[Any]) -> bytes:
    """A piece and what is given to it, for :func:`unpacked`. Raises NotSentError.

    Torch would send a graph as source code, and trace that again. This is node by node, so that the
    other process has the same graph, by which inductor's cache goes.
    """
    places: dict[Any, Any] = {node: _Place(i) for i, node in enumerate(piece.graph.nodes)}
    nodes = []
    for node in piece.graph.nodes:
        if node.op not in ("placeholder", "call_function", "output"):
            raise NotSentError(f"a node of kind {node.op}")
        args, kwargs = (
            map_aggregate(x, lambda a: places[a] if isinstance(a, fx.Node) else a)
            for x in (node.args, node.kwargs)
        )
        nodes.append((node.op, node.name, node.target, args, kwargs))
    out = io.BytesIO()
    try:
        _Pickler(out, pickle.HIGHEST_PROTOCOL).dump((nodes, list(given)))
    except Exception as e:  # pickling raises what objects like
        raise NotSentError(str(e)) from e
    return out.getvalue()


def unpacked(data: bytes) -> tuple[fx.GraphModule, list[Any]]:
    """The piece, and what is given to it. Only for what a process of ours has sent: a pickle may do
    anything. Raises what unpickling does, and ValueError."""
    written, given = pickle.loads(data)
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    for op, name, target, args, kwargs in written:
        args, kwargs = (
            map_aggregate(x, lambda a: nodes[a.place] if isinstance(a, _Place) else a)
            for x in (args, kwargs)
        )
        nodes.append(graph.create_node(op, target, args, kwargs, name))
        if nodes[-1].name != name:
            raise ValueError(f"there are two nodes {name}")
    return fx.GraphModule(nn.Module(), graph), given


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        """Torch's operations go by their names."""
        if isinstance(obj, torch._ops.OpOverload):
            return _operation, (obj.namespace, obj.overloadpacket.__name__, obj._overloadname)
        return NotImplemented


def _operation(namespace: str, name: str, overload: str) -> Any:
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def send(connection: socket.socket, message: bytes) -> None:
    """Send a message. Raises OSError, TimeoutError included."""
    connection.sendall(_HEADER.pack(len(message)) + message)


def receive(connection: socket.socket) -> bytes:
    """The next message. Raises OSError, TimeoutError included; EOFError where the other end is
    closed."""
    (count,) = _HEADER.unpack(_exactly(connection, _HEADER.size))
    return _exactly(connection, count)


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = connection.recv(min(count - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)
