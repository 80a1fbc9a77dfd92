"""DLPack capsules (dlpack.h, versions 0.8 and 1.0), by which torch, CuPy, JAX and others read an array's memory in place."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

CPU, CUDA = 1, 2
"""DLDeviceType."""

PLAIN, VERSIONED = b"dltensor", b"dltensor_versioned"
"""Names of capsules that nobody has taken yet; who takes one renames it, and then calls its deleter when done."""

_VERSION = (1, 0)
_CODES = {"i": 0, "u": 1, "f": 2}
"""numpy's kinds as DLDataTypeCode."""


class Tensor(ctypes.Structure):
    """DLTensor, with its device and its type spread out."""

    _fields_ = (
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
    )


class PlainTensor(ctypes.Structure):
    """DLManagedTensor."""

    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class VersionedTensor(ctypes.Structure):
    """DLManagedTensorVersioned."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    )


_lent: dict[int, Any] = {}
"""Address of a managed tensor -> what must live until its deleter is called."""

_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(("PyCapsule_New", ctypes.pythonapi))
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))


def _delete(managed: int, lent: dict[int, Any] = _lent) -> None:
    """The deleter of every tensor; it may be called in any thread."""
    lent.pop(managed, None)


def _destroy(capsule: int, lent: dict[int, Any] = _lent, is_valid: Any = _is_valid, pointer: Any = _pointer) -> None:
    """The destructor of every capsule, by address since the object is being freed: one that nobody took frees its tensor."""
    for name in (PLAIN, VERSIONED):
        if is_valid(capsule, name):
            lent.pop(pointer(capsule, name), None)


_DELETER, _DESTRUCTOR = (ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function) for function in (_delete, _destroy))
for _callback in (_DELETER, _DESTRUCTOR):  # others may still call them while the interpreter ends, when this module is gone
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_callback))


def make_capsule(
    owner: object, address: int, shape: Sequence[int], dtype: np.dtype[Any], device: tuple[int, int], max_version: tuple[int, int] | None
) -> Any:
    """A capsule for contiguous memory.

    Args:
        owner: kept until the tensor's deleter is called, or until the capsule goes without having been taken.
        address: of the first element.
        shape, dtype: integers or floats.
        device: type and number.
        max_version: what the reader understands; None, or below 1.0, for one from before versions.
    """
    managed = VersionedTensor(*_VERSION) if max_version is not None and max_version[0] >= 1 else PlainTensor()
    strides = [int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape))]
    arrays = [(ctypes.c_int64 * len(shape))(*values) for values in (shape, strides)]
    managed.tensor = Tensor(
        address,
        *device,
        len(shape),
        _CODES[dtype.kind],
        8 * dtype.itemsize,
        1,
        *(ctypes.cast(array, ctypes.POINTER(ctypes.c_int64)) for array in arrays),
    )
    managed.deleter = ctypes.cast(_DELETER, ctypes.c_void_p)
    at = ctypes.addressof(managed)
    _lent[at] = managed, arrays, owner
    return _new_capsule(at, VERSIONED if isinstance(managed, VersionedTensor) else PLAIN, ctypes.cast(_DESTRUCTOR, ctypes.c_void_p))
