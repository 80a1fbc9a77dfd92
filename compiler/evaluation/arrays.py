"""Reading .npz files that hold Python objects, as LoFTR's lists do, without running what a pickle asks for."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smc.exported.errors import BadInput, InputMissing

ALLOWED = {
    (f"numpy.{core}.multiarray", name): getattr(np._core.multiarray, name)  # type: ignore[attr-defined]
    for core in ("core", "_core")  # before NumPy 2, and since
    for name in ("_reconstruct", "scalar")
} | {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
"""What arrays and numbers of NumPy are pickled with; none of it does anything else."""


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and arrays need no such thing") from None


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a .npz file, those of objects among them.

    Raises:
        InputMissing: the file cannot be read.
        BadInput: it is damaged, or holds more than arrays, lists, numbers and text.
    """
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                found[member.removesuffix(".npy")] = _read(archive.read(member))
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise InputMissing(f"{path}: {error.strerror}") from error
    except Exception as error:  # unpickling damaged data raises nearly anything
        raise BadInput(f"{path}: not a .npz file of arrays ({type(error).__name__}: {error})") from error
    return found


def _read(data: bytes) -> NDArray[Any]:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(file)
    if not dtype.hasobject:
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    array = np.asarray(_ArraysOnly(file).load())
    if array.dtype != object:
        raise ValueError(f"{array.dtype}, {dtype} was expected")
    return array.reshape(shape, order="F" if fortran else "C")
