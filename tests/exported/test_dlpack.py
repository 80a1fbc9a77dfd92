"""DLPack capsules, field by field and as numpy and torch take them: from memory of the host, which is the same but for the device."""

from __future__ import annotations

import ctypes
import gc
import threading
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cuda.bindings", reason="needs cuda-bindings")

from smc.exported.engines import cuda_memory as cuda  # it needs cuda-bindings
from smc.exported.engines import dlpack
from tests.exported.test_cuda_memory import HostMemory

HOST = (dlpack.CPU, 0)

TENSOR = (
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
"""DLTensor, with its device and its type spread out."""


class PlainTensor(ctypes.Structure):
    """DLManagedTensor."""

    _fields_ = (*TENSOR, ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class VersionedTensor(ctypes.Structure):
    """DLManagedTensorVersioned."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        *TENSOR,
    )


KINDS = {dlpack.PLAIN: PlainTensor, dlpack.VERSIONED: VersionedTensor}
NEWEST = dlpack.VERSIONED if np.lib.NumpyVersion(np.__version__) >= "2.1.0" else dlpack.PLAIN
"""What numpy gives a reader that knows versions."""


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays say that they are where they are here."""
    monkeypatch.setattr(cuda.DeviceArray, "__dlpack_device__", lambda self: HOST)


def made(memory: HostMemory, dtype: str = "float32", shape: tuple[int, ...] = (2, 3, 4)) -> tuple[cuda.DeviceArray, np.ndarray]:
    """An array with values, and these."""
    array = cuda.DeviceArray(memory.pool(), shape, dtype)
    values = np.arange(np.prod(shape), dtype=dtype).reshape(shape)
    ctypes.memmove(array.address, values.ctypes.data, values.nbytes)
    return array, values


def content(capsule: Any, name: bytes) -> Any:
    get = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))
    return KINDS[name].from_address(get(capsule, name))


@pytest.mark.parametrize(
    ("version", "name"), [(None, dlpack.PLAIN), ((0, 8), dlpack.PLAIN), ((1, 0), NEWEST), ((1, 1), NEWEST), ((2, 0), NEWEST)]
)
@pytest.mark.parametrize(
    ("dtype", "code", "bits"), [("float16", 2, 16), ("float32", 2, 32), ("int32", 0, 32), ("int64", 0, 64), ("uint8", 1, 8)]
)
def test_a_capsule_describes_the_array(dtype: str, code: int, bits: int, version: tuple[int, int] | None, name: bytes) -> None:
    """In the newest version that its reader knows."""
    memory = np.zeros((2, 3, 4), dtype)
    capsule = dlpack.make_capsule(memory, (dlpack.CUDA, 1), version)
    tensor = content(capsule, name)
    assert (tensor.data, tensor.byte_offset) == (memory.ctypes.data, 0)
    assert (tensor.device_type, tensor.device_id) == (2, 1)
    assert (tensor.code, tensor.bits, tensor.lanes) == (code, bits, 1)
    assert (tensor.ndim, tensor.shape[:3]) == (3, [2, 3, 4])
    assert not tensor.strides or tensor.strides[:3] == [12, 4, 1]
    if name == dlpack.VERSIONED:
        assert tensor.major == 1
        assert tensor.flags == 0, "neither read-only nor a copy"


@pytest.mark.parametrize("version", [None, (1, 0)])
def test_a_reader_that_refuses_the_device_says_so_and_keeps_nothing(version: tuple[int, int] | None) -> None:
    """numpy, which reads no GPU, drops the capsule while its own exception is pending."""

    class OfVersion(cuda.DeviceArray):
        def __dlpack__(self, **asked: Any) -> Any:
            return super().__dlpack__(max_version=version)

        def __dlpack_device__(self) -> tuple[int, int]:
            return dlpack.CUDA, 0

    memory = HostMemory()
    array = OfVersion(memory.pool(), (2, 3), np.float32)
    with pytest.raises((BufferError, RuntimeError), match=r"[Dd]evice"):
        np.from_dlpack(array)
    del array
    gc.collect()
    assert not memory.blocks


@pytest.mark.parametrize("version", [None, (1, 0)])
def test_a_capsule_that_nobody_takes_lets_go_of_the_memory(host: None, version: tuple[int, int] | None) -> None:
    memory = HostMemory()
    array, _ = made(memory)
    capsule = array.__dlpack__(max_version=version)
    del array
    gc.collect()
    assert memory.blocks
    del capsule
    gc.collect()
    assert not memory.blocks


@pytest.mark.parametrize(("version", "name"), [(None, dlpack.PLAIN), ((1, 0), NEWEST)])
def test_the_deleter_lets_go_of_the_memory_in_any_thread(host: None, version: tuple[int, int] | None, name: bytes) -> None:
    memory = HostMemory()
    array, _ = made(memory)
    capsule = array.__dlpack__(max_version=version)
    managed = content(capsule, name)
    rename = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_SetName", ctypes.pythonapi))
    taken = b"used_" + name
    rename(capsule, taken)
    del capsule, array
    gc.collect()
    assert memory.blocks  # who took it has it
    delete = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(managed.deleter)
    thread = threading.Thread(target=delete, args=(ctypes.addressof(managed),))
    thread.start()
    thread.join()
    gc.collect()
    assert not memory.blocks


@pytest.mark.parametrize("dtype", ["float16", "float32", "int64"])
def test_numpy_reads_it_in_place(host: None, dtype: str) -> None:
    memory = HostMemory()
    array, values = made(memory, dtype)
    seen = np.from_dlpack(array)
    assert seen.ctypes.data == array.address
    np.testing.assert_array_equal(seen, values)
    part = np.from_dlpack(array[1])
    assert np.from_dlpack(array[:0]).shape == (0, 3, 4)
    del array, seen
    gc.collect()
    np.testing.assert_array_equal(part, values[1])
    del part
    gc.collect()
    assert not memory.blocks


def test_torch_reads_it_in_place(host: None) -> None:
    torch = pytest.importorskip("torch")
    memory = HostMemory()
    array, values = made(memory)
    for capsule in (array, array.__dlpack__()):  # the newest that torch knows, and the one from before versions
        seen = torch.from_dlpack(capsule)
        assert seen.data_ptr() == array.address
        np.testing.assert_array_equal(seen.numpy(), values)
    del array, seen, capsule
    gc.collect()
    assert not memory.blocks


@pytest.mark.parametrize("asked", [{"copy": True}, {"dl_device": (dlpack.CUDA, 1)}, {"dl_device": (dlpack.CUDA, 0), "copy": True}])
def test_copies_and_other_devices_are_refused(host: None, asked: dict[str, Any]) -> None:
    array, _ = made(HostMemory())
    with pytest.raises(BufferError, match=r"numpy\.asarray"):
        array.__dlpack__(**asked)
    array.__dlpack__(dl_device=HOST, copy=False, stream=7)


@pytest.mark.gpu
@pytest.mark.parametrize("library", ["torch", "cupy"])
def test_others_read_arrays_on_the_gpu(library: str) -> None:
    xp = pytest.importorskip(library)
    cuda.use_device(cuda.devices()[0].index)
    pool, stream = cuda.device_pool(), cuda.Stream()
    values = np.arange(24, dtype=np.float16).reshape(2, 3, 4)
    array = cuda.DeviceArray(pool, values.shape, values.dtype)
    stream.copy(array.address, values.ctypes.data, values.nbytes)
    stream.synchronize()
    assert array.__dlpack_device__() == (dlpack.CUDA, cuda.devices()[0].index)
    seen = xp.from_dlpack(array)
    seen += 1
    address = array.address
    np.testing.assert_array_equal(np.asarray(array), values + 1)
    del array, seen
    gc.collect()
    assert cuda.DeviceArray(pool, values.shape, values.dtype).address == address  # it went back to its pool
