"""DLPack capsules (dlpack.h, versions 0.8 and 1.0), by which torch, CuPy, JAX and others read an array's memory in place."""

from __future__ import annotations

import ctypes
from typing import Any

from numpy.typing import NDArray

CPU, CUDA = 1, 2
"""DLDeviceType."""

PLAIN, VERSIONED = b"dltensor", b"dltensor_versioned"
"""Names of capsules that nobody has taken yet; who takes one renames it, and then calls its deleter when done."""

_DEVICE_AT = {PLAIN: 8, VERSIONED: 40}
"""Where a capsule's DLManagedTensor or DLManagedTensorVersioned has its DLDevice, two int32: type and number."""

_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))


def make_capsule(array: NDArray[Any], device: tuple[int, int], max_version: tuple[int, int] | None) -> Any:
    """A capsule for memory of a device.

    numpy makes it, so that its destructor is C code: it may be dropped while an exception is pending, when Python code cannot be called.

    Args:
        array: over the memory, which numpy need not be able to read; writable. It lives until the tensor's deleter is called, or until
            the capsule goes without having been taken.
        device: type and number.
        max_version: what the reader understands; None, or below 1.0, for a capsule from before versions.

    Raises BufferError: an array of a type that DLPack does not have.
    """
    try:
        capsule = array.__dlpack__(max_version=max_version)
    except TypeError:  # numpy below 2.1 knows no versions
        capsule = array.__dlpack__()
    name = _name(capsule)
    (ctypes.c_int32 * 2).from_address(_pointer(capsule, name) + _DEVICE_AT[name])[:] = list(device)
    return capsule
