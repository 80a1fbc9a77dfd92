from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from smc.compiler.launch_program import ALIGNMENT
from smc.compiler.lowering.views import Buffer
from smc.compiler.lowering.weight_file import WeightFile


def buffer(values: NDArray[Any]) -> Buffer:
    return Buffer("weight", values.dtype.name, values.size, values)


def numbers(*shape: int, dtype: Any = np.float32, seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def written(path: Path, *arrays: NDArray[Any]) -> tuple[list[int], bytes]:
    with WeightFile(path / "weights.bin") as file:
        offsets = [file.add(buffer(values)) for values in arrays]
    data = (path / "weights.bin").read_bytes()
    assert file.size == len(data)
    for offset, values in zip(offsets, arrays, strict=True):
        assert data[offset : offset + values.nbytes] == np.ascontiguousarray(values).tobytes()
    return offsets, data


def test_weights_are_aligned_and_whole(tmp_path: Path) -> None:
    arrays = [
        numbers(3, 5),
        numbers(7, dtype=np.float16),
        numbers(1, seed=1),
        np.arange(9),
        numbers(4, 4, dtype=ml_dtypes.bfloat16),
        np.array(2.5),
    ]
    offsets, _ = written(tmp_path, *arrays)
    assert all(offset % ALIGNMENT == 0 for offset in offsets)
    assert len(set(offsets)) == len(arrays)


def test_equal_weights_are_there_once_whatever_their_shape(tmp_path: Path) -> None:
    values = numbers(6, 4)
    (first, second, third), data = written(tmp_path, values, values.copy(), values.reshape(2, 12))
    assert first == second == third
    assert len(data) == values.nbytes


def test_equal_bytes_of_another_type_are_other_weights(tmp_path: Path) -> None:
    zeros: list[NDArray[Any]] = [np.zeros(4, np.float32), np.zeros(8, np.float16)]
    (first, second), _ = written(tmp_path, *zeros)
    assert first != second


def test_transposed_weights_are_stored_as_they_are_read(tmp_path: Path) -> None:
    values = numbers(6, 4)
    (first, second), _ = written(tmp_path, values, values.T)
    assert first != second


def test_the_halves_of_stacked_weights_are_not_stored_again(tmp_path: Path) -> None:
    both = numbers(2, 8, 4)
    offsets, data = written(tmp_path, both, both[0], both[1])
    assert offsets == [0, 0, both[0].nbytes]
    assert len(data) == both.nbytes


def test_halves_between_16_bytes_are_stored_apart(tmp_path: Path) -> None:
    both = numbers(2, 3)
    offsets, _ = written(tmp_path, both, both[1])
    assert offsets[1] % ALIGNMENT == 0


def test_halves_that_were_there_before_keep_their_place(tmp_path: Path) -> None:
    both = numbers(2, 8, 4)
    offsets, _ = written(tmp_path, both[1], both, both[1])
    assert offsets[0] == offsets[2] == 0
    assert offsets[1] > 0
