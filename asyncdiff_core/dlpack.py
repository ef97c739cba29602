"""A look into a DLPack capsule: the array behind it, without taking it over.

The structures are those of DLPack 0.x capsules (``dltensor``), which every producer gives when it
is not asked for a newer version. Source: https://dmlc.github.io/dlpack/latest/c_api.html
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

from .errors import InvalidArgument

_HOST = (1, 3)  # kDLCPU, kDLCUDAHost
_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged
_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class Described(NamedTuple):
    """``strides`` in elements, None for row-major; ``device`` a CUDA index, None on the host. The
    memory is there at least as long as ``capsule``."""

    pointer: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    device: int | None
    capsule: Any


def describe_dlpack(array: Any) -> Described:
    """What an object with ``__dlpack__`` holds. Raises InvalidArgument."""
    kind, index = (int(x) for x in array.__dlpack_device__())
    if kind not in _HOST + _CUDA:
        raise InvalidArgument(f"an array on DLPack device type {kind} cannot be exchanged")
    # Stream -1: no synchronisation. Who calls orders the exchange after the array's work.
    capsule = array.__dlpack__(stream=-1) if kind in _CUDA else array.__dlpack__()
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    tensor = _Tensor.from_address(get(capsule, b"dltensor"))
    name = _KINDS.get(tensor.code)
    if name is None or tensor.lanes != 1:
        raise InvalidArgument(
            f"DLPack type code {tensor.code} with {tensor.lanes} lanes cannot be exchanged"
        )
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    strides = tuple(tensor.strides[i] for i in range(tensor.ndim)) if tensor.strides else None
    pointer = (tensor.data or 0) + tensor.byte_offset
    dtype = name if name == "bool" else f"{name}{tensor.bits}"
    return Described(pointer, dtype, shape, strides, index if kind in _CUDA else None, capsule)
