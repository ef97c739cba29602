"""What an array of another library is: pointer, element type, shape, strides, device."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

from .dlpack import describe_dlpack
from .errors import InvalidArgument


class Array(NamedTuple):
    """``strides`` in elements; ``device`` a CUDA device index, None on the host, or -1 for a GPU
    that the array's interface does not name. ``keep`` is what the memory may hang on: hold it while
    the pointer is used."""

    pointer: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    device: int | None
    keep: Any
    writable: bool = True


def describe(array: Any) -> Array:
    """Look at a torch, CuPy, NumPy or DLPack array without copying it; raises InvalidArgument."""
    # Torch first, and by its own names: its array interface knows no bfloat16.
    if is_torch(array):
        return _torch(array)
    for name, device in (("__cuda_array_interface__", -1), ("__array_interface__", None)):
        interface = getattr(array, name, None)
        if interface is not None:
            return _interface(array, interface, device)
    if hasattr(array, "__dlpack__"):
        d = describe_dlpack(array)
        strides = _row_major(d.shape) if d.strides is None else d.strides
        return Array(d.pointer, d.dtype, d.shape, strides, d.device, d.capsule)
    raise InvalidArgument(
        f"{type(array).__name__} is no array: give a torch tensor or an object with "
        "__cuda_array_interface__, __array_interface__ or __dlpack__ (CuPy, NumPy, JAX, …)"
    )


def is_torch(array: Any) -> bool:
    """Whether it is a torch tensor, without importing torch."""
    return hasattr(array, "data_ptr") and hasattr(array, "element_size")


@lru_cache(maxsize=1024)  # the same bundles come again and again
def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _torch(tensor: Any) -> Array:
    kind = tensor.device.type
    if kind not in ("cpu", "cuda"):
        raise InvalidArgument(f"a tensor on {tensor.device} cannot be exchanged")
    # Torch conjugates and negates lazily: memory then holds other numbers.
    if tensor.is_conj() or tensor.is_neg():
        raise InvalidArgument(
            "a tensor that is conjugated or negated lazily cannot be exchanged: give "
            "tensor.resolve_conj().resolve_neg()"
        )
    try:
        pointer = tensor.data_ptr()
    except RuntimeError as error:  # sparse, or of a kind that has none
        raise InvalidArgument(f"{type(tensor).__name__} has no memory to send: {error}") from error
    return Array(
        pointer,
        str(tensor.dtype).removeprefix("torch."),
        tuple(tensor.shape),
        tuple(tensor.stride()),
        tensor.device.index if kind == "cuda" else None,
        tensor,
    )


def _interface(array: Any, interface: dict[str, Any], device: int | None) -> Array:
    data = interface.get("data")
    # Anything else is an object with the bytes in it, or none: the protocol knows that, too.
    if not (isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], int)):
        raise InvalidArgument(
            f"the array interface of {type(array).__name__} gives no address, but data of type "
            f"{type(data).__name__}: give numpy.asarray(array) of it"
        )
    pointer, read_only = data
    dtype, itemsize = _typestr(interface["typestr"])
    shape = tuple(interface["shape"])
    given = interface.get("strides")
    if given is None:
        strides = _row_major(shape)
    elif any(s % itemsize for s in given):
        raise InvalidArgument(f"strides {tuple(given)} are no multiples of the element size")
    else:
        strides = tuple(s // itemsize for s in given)
    keep = array, interface  # either may be what was made for this look only
    return Array(pointer, dtype, shape, strides, device, keep, not read_only)


@cache
def _typestr(text: str) -> tuple[str, int]:
    kinds = {"b": "bool", "i": "int", "u": "uint", "f": "float", "c": "complex"}
    order, kind, size = text[0], text[1], text[2:]
    if order == ">" or kind not in kinds or not size.isdigit():
        raise InvalidArgument(f"element type {text!r} cannot be exchanged")
    bits = "" if kind == "b" else str(int(size) * 8)
    return kinds[kind] + bits, int(size)
