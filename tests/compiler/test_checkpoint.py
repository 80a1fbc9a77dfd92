"""Checkpoints in both published layouts, and everything that can be wrong with one."""

from __future__ import annotations

import argparse
import builtins
import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import re
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from smc.compiler.checkpoint import Weights, load_checkpoint, random_weights
from smc.compiler.config import ModelConfig, read_config_json
from smc.exported.errors import BadCheckpoint, InputMissing
from tests.conformance import DATA, state_dict_shapes

SLIM = ModelConfig(
    enc_embed_dim=32,
    enc_depth=1,
    enc_num_heads=2,
    dec_embed_dim=32,
    dec_depth=4,
    dec_num_heads=2,
    output_mode="pts3d+desc1",
    dpt_dim=32,
    dpt_level_dims=(32, 32, 64, 64),
)
"""The same architecture in a few megabytes."""

WEIGHTS = random_weights(SLIM, 0)

TINY_CONFIG = DATA / "tiny_landscape.config.json"

State = dict[Any, Any]


def published(weights: Weights) -> dict[str, Tensor]:
    """The state dict as the original writes it: with what inference never reads (NaN here) and both names of every alias."""
    state = dict(weights.tensors)
    width = weights.config.dpt_dim
    state["mask_token"] = torch.full((1, 1, weights.config.dec_embed_dim), torch.nan)
    for head in ("downstream_head1", "downstream_head2"):
        for conv in ("conv1", "conv2"):
            unit = f"{head}.dpt.scratch.refinenet4.resConfUnit1.{conv}"
            state[f"{unit}.weight"] = torch.full((width, width, 3, 3), torch.nan)
            state[f"{unit}.bias"] = torch.full((width,), torch.nan)
        for level in range(4):
            # Two tensors over one storage, as in the original's state dict.
            state[f"{head}.dpt.scratch.layer{level + 1}_rn.weight"] = state[f"{head}.dpt.scratch.layer_rn.{level}.weight"].detach()
    return state


def first_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if ".scratch.layer_rn." not in name}


def second_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not re.search(r"\.scratch\.layer\d_rn\.", name)}


def model_string(config: ModelConfig) -> str:
    return f"AsymmetricMASt3R({', '.join(f'{name}={value!r}' for name, value in dataclasses.asdict(config).items())})"


def training_checkpoint(config: ModelConfig, state: State) -> dict[str, Any]:
    """What the original's training script saves."""
    return {
        "args": argparse.Namespace(model=model_string(config), lr=1e-4, output_dir="out", pretrained=None, amp=True),
        "model": state,
        "optimizer": {"state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.randn(64, 64)}}, "param_groups": [{"lr": 1e-4}]},
        "scaler": {"scale": 65536.0, "_growth_tracker": 3},
        "epoch": 12,
        "best_so_far": float("inf"),
    }


def write_pth(path: Path, state: State, **how: Any) -> Path:
    torch.save(training_checkpoint(SLIM, state), path, **how)
    return path


def write_folder(path: Path, state: dict[str, Tensor]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(dataclasses.asdict(SLIM)))
    save_file(state, path / "model.safetensors")
    return path


def refusal(path: Path) -> str:
    with pytest.raises(BadCheckpoint) as caught:
        load_checkpoint(path)
    assert caught.value.exit_status == 65
    message = str(caught.value)
    assert str(path) in message
    assert "In PyTorch" not in message, "torch's advice is to load the file unsafely"
    assert len(message) < 3_000
    return message


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert not tensor.requires_grad
        assert torch.equal(tensor, wanted[name]), name


@pytest.fixture(scope="module")
def slim_pth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only."""
    return write_pth(tmp_path_factory.mktemp("slim") / "slim.pth", published(WEIGHTS))


@pytest.fixture(scope="module")
def slim_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only."""
    return write_folder(tmp_path_factory.mktemp("slim") / "slim", first_names(published(WEIGHTS)))


@pytest.fixture(scope="module")
def tiny() -> Weights:
    return random_weights(read_config_json(TINY_CONFIG), 0)


@pytest.fixture(autouse=True)
def keep_no_files(tmp_path: Path) -> Iterator[None]:
    """Checkpoints are large, and pytest would keep them for three runs."""
    yield
    shutil.rmtree(tmp_path)


def test_the_original_names_are_tried(tiny: Weights) -> None:
    assert {name: list(tensor.shape) for name, tensor in published(tiny).items()} == state_dict_shapes("tiny_landscape")


def test_tiny_pth_loads_exactly(tiny: Weights, tmp_path: Path) -> None:
    torch.save(training_checkpoint(tiny.config, published(tiny)), tmp_path / "tiny.pth")
    weights = load_checkpoint(tmp_path / "tiny.pth")
    assert (weights.config, weights.source) == (tiny.config, "tiny.pth")
    assert_same(weights.tensors, tiny.tensors)


def test_tiny_folder_loads_exactly(tiny: Weights, tmp_path: Path) -> None:
    shutil.copy(TINY_CONFIG, tmp_path / "config.json")
    assert "Infinity" in TINY_CONFIG.read_text()
    save_file(first_names(published(tiny)), tmp_path / "model.safetensors", {"format": "pt"})
    weights = load_checkpoint(tmp_path)
    assert (weights.config, weights.source) == (tiny.config, "model.safetensors")
    assert_same(weights.tensors, tiny.tensors)


def test_bare_safetensors_loads_as_its_folder_does(slim_folder: Path) -> None:
    weights = load_checkpoint(slim_folder / "model.safetensors")
    assert (weights.config, weights.source) == (SLIM, "model.safetensors")
    assert_same(weights.tensors, WEIGHTS.tensors)


@pytest.mark.parametrize(
    "names", [published, lambda w: first_names(published(w)), lambda w: second_names(published(w)), lambda w: w.tensors]
)
@pytest.mark.parametrize("layout", ["pth", "safetensors"])
def test_either_alias_will_do(names: Callable[[Weights], dict[str, Tensor]], layout: str, tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in names(WEIGHTS).items()}
    path = write_pth(tmp_path / "slim.pth", state) if layout == "pth" else write_folder(tmp_path / "slim", state)
    assert_same(load_checkpoint(path).tensors, WEIGHTS.tensors)


@pytest.mark.parametrize("layout", ["pth", "safetensors"])
@pytest.mark.parametrize("order", [list, reversed])
def test_second_alias_wins(layout: str, order: Callable[[list[Any]], Any], tmp_path: Path) -> None:
    state = published(WEIGHTS)
    state |= {name: tensor + 1 for name, tensor in state.items() if re.search(r"\.layer\d_rn\.", name)}
    state = dict(order(list(state.items())))
    path = write_pth(tmp_path / "slim.pth", state) if layout == "pth" else write_folder(tmp_path / "slim", state)
    assert_same(load_checkpoint(path).tensors, WEIGHTS.tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: tensor.to(dtype) for name, tensor in WEIGHTS.tensors.items()}
    wanted = {name: tensor.float() for name, tensor in state.items()}
    assert_same(load_checkpoint(write_pth(tmp_path / "slim.pth", state)).tensors, wanted)
    assert_same(load_checkpoint(write_folder(tmp_path / "slim", state)).tensors, wanted)


@pytest.mark.parametrize("how", [{"_use_new_zipfile_serialization": False}, {"pickle_protocol": 3}])
def test_older_torch_formats_load(how: dict[str, Any], tmp_path: Path) -> None:
    assert_same(load_checkpoint(write_pth(tmp_path / "slim.pth", published(WEIGHTS), **how)).tensors, WEIGHTS.tensors)


def test_parameters_load_as_plain_tensors(tmp_path: Path) -> None:
    state = OrderedDict((name, torch.nn.Parameter(tensor)) for name, tensor in WEIGHTS.tensors.items())
    assert_same(load_checkpoint(write_pth(tmp_path / "slim.pth", state)).tensors, WEIGHTS.tensors)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_repacked_zip_loads(compression: int, slim_pth: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(slim_pth) as old, zipfile.ZipFile(tmp_path / "slim.pth", "w", compression) as new:
        for name in reversed(old.namelist()):
            new.writestr(name, old.read(name))
    assert_same(load_checkpoint(tmp_path / "slim.pth").tensors, WEIGHTS.tensors)


def test_name_of_the_file_does_not_matter(slim_pth: Path, tmp_path: Path) -> None:
    path = tmp_path / "gewichte (1) é\n.bin"
    shutil.copy(slim_pth, path)
    assert load_checkpoint(path).source == path.name


def test_header_that_looks_like_a_web_page_loads(slim_folder: Path, tmp_path: Path) -> None:
    (old_length,) = struct.unpack("<Q", (content := (slim_folder / "model.safetensors").read_bytes())[:8])
    length = next(n for n in range(old_length, 1 << 24) if struct.pack("<Q", n).startswith(b" <"))
    header = content[8 : 8 + old_length].ljust(length)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + header + content[8 + old_length :])
    shutil.copy(slim_folder / "config.json", tmp_path)
    assert_same(load_checkpoint(tmp_path).tensors, WEIGHTS.tensors)


def test_sha256_is_of_the_weight_file(slim_pth: Path, slim_folder: Path) -> None:
    assert load_checkpoint(slim_pth).sha256 == hashlib.sha256(slim_pth.read_bytes()).hexdigest()
    assert load_checkpoint(slim_folder).sha256 == hashlib.sha256((slim_folder / "model.safetensors").read_bytes()).hexdigest()
    assert WEIGHTS.sha256 is None


def test_model_is_built_over_the_loaded_tensors(slim_pth: Path) -> None:
    weights = load_checkpoint(slim_pth)
    model = weights.build_model()
    assert not model.training
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == weights.tensors[name].data_ptr()
        assert not parameter.requires_grad


def test_random_weights_follow_their_seed() -> None:
    assert_same(random_weights(SLIM, 0).tensors, WEIGHTS.tensors)
    other = random_weights(SLIM, 1)
    assert not any(torch.equal(tensor, WEIGHTS.tensors[name]) for name, tensor in other.tensors.items())
    assert other.source == "random weights, seed 1"


@pytest.mark.parametrize("present", [[], ["model.safetensors"], ["config.json"]])
def test_incomplete_folder_is_missing(present: list[str], slim_folder: Path, tmp_path: Path) -> None:
    for name in present:
        shutil.copy(slim_folder / name, tmp_path)
    absent = "config.json" if present == ["model.safetensors"] else "model.safetensors"
    with pytest.raises(InputMissing, match=f"{absent}: No such file") as caught:
        load_checkpoint(tmp_path)
    assert caught.value.exit_status == 66


@pytest.mark.parametrize("name", ["absent.pth", "absent.safetensors", "absent/", "a" * 5_000], ids=["pth", "safetensors", "folder", "long"])
def test_missing_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputMissing) as caught:
        load_checkpoint(tmp_path / name)
    assert caught.value.exit_status == 66


def test_folder_in_place_of_the_weights_is_missing(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(InputMissing):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "empty (0 bytes)"),
        (b"<!DOCTYPE html><html>Sign in</html>", "HTML or XML page of 35 bytes"),
        (b"\n  <html>404</html>", "HTML or XML page of 19 bytes"),
        (b"\xef\xbb\xbf<?xml version='1.0'?><Error/>", "HTML or XML page of 32 bytes"),
        (b"x", "1 bytes"),
        (b"PK", "2 bytes"),
        (b"\0" * 1_000, "1,000 bytes"),
        (b"\xff" * 1_000, "1,000 bytes"),
        (bytes(range(256)) * 8, "2,048 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "63 bytes"),
        (b"PK\x05\x06" + b"\0" * 18, "22 bytes"),
        (b"PK\x06\x07" + b"\xff" * 16 + b"PK\x05\x06" + b"\xff" * 16 + b"\0\0", "42 bytes"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_what_is_no_checkpoint_is_refused(content: bytes, complaint: str, suffix: str, slim_folder: Path, tmp_path: Path) -> None:
    shutil.copy(slim_folder / "config.json", tmp_path)
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    assert complaint in refusal(path)


def sizes(message: str) -> tuple[int, int]:
    """(expected, found) in bytes."""
    numbers = re.search(r"([\d,]+) bytes expected.*?, ([\d,]+) found", message)
    assert numbers, message
    expected, found = (int(number.replace(",", "")) for number in numbers.groups())
    return expected, found


@pytest.mark.parametrize("kept", [4, 29, 30, 64, 100, 1_000, 0.01, 0.1, 0.5, 0.9, 0.99, -1_000, -22, -1])
def test_truncated_pth_tells_both_sizes(kept: float, slim_pth: Path, tmp_path: Path) -> None:
    content = slim_pth.read_bytes()
    path = tmp_path / "cut.pth"
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    expected, found = sizes(refusal(path))
    assert found == path.stat().st_size < expected <= len(content)
    if found > 0.1 * len(content):  # the pickle, which names the storages, is there
        assert expected > 0.9 * len(content)


@pytest.mark.parametrize("kept", [8, 9, 1_000, 0.5, -1])
def test_truncated_safetensors_tells_both_sizes(kept: float, slim_folder: Path, tmp_path: Path) -> None:
    content = (slim_folder / "model.safetensors").read_bytes()
    shutil.copy(slim_folder / "config.json", tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    expected, found = sizes(refusal(path))
    assert found == path.stat().st_size < expected <= len(content)
    if found > 100_000:  # the header is there
        assert expected == len(content)


@pytest.mark.parametrize("kept", [1, 20, 0.01, 0.5, -1])
def test_truncated_legacy_pth_is_refused(kept: float, tmp_path: Path) -> None:
    path = write_pth(tmp_path / "cut.pth", WEIGHTS.tensors, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    assert f"{path.stat().st_size:,} bytes" in refusal(path)


def test_surplus_bytes_are_refused(slim_folder: Path, tmp_path: Path) -> None:
    content = (slim_folder / "model.safetensors").read_bytes()
    shutil.copy(slim_folder / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content + b"\0")
    assert sizes(refusal(tmp_path / "model.safetensors")) == (len(content), len(content) + 1)


@pytest.mark.parametrize("length", [0, 1, 7, 1_000_000, 100_000_000, 100_000_001, 1 << 63, (1 << 64) - 1])
def test_wild_safetensors_header_length(length: int, slim_folder: Path, tmp_path: Path) -> None:
    content = (slim_folder / "model.safetensors").read_bytes()
    shutil.copy(slim_folder / "config.json", tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + content[8:])
    assert f"{len(content):,}" in refusal(path)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"{",
        b"[" * 100_000,
        b'{"a": 1}',
        b'{"a": {}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": []}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, "4"]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4.5]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1%s]}}' % (b"0" * 4_000),
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1%s]}}' % (b"0" * 5_000),
        b'{"a": {"dtype": "F32", "shape": [18446744073709551615, 2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"__metadata__": {"format": 3}}',
        b"\xff\xfe\xfd\xfc",
    ],
    ids=lambda header: ascii(header)[:60],
)
def test_bad_safetensors_header(header: bytes, slim_folder: Path, tmp_path: Path) -> None:
    shutil.copy(slim_folder / "config.json", tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    refusal(path)


class Payload:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


PAYLOADS: dict[str, Callable[[Path], Payload]] = {
    f"{os.system.__module__}.system": lambda mark: Payload(os.system, f"touch '{mark}'"),
    "shutil.copyfile": lambda mark: Payload(shutil.copyfile, os.devnull, str(mark)),
    "exec": lambda mark: Payload(builtins.exec, f"open({str(mark)!r}, 'w').close()"),
    "eval": lambda mark: Payload(builtins.eval, f"open({str(mark)!r}, 'w').close()"),
}


@pytest.mark.parametrize("name", PAYLOADS)
def test_payloads_are_live(name: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    pickle.loads(pickle.dumps(PAYLOADS[name](mark)))
    assert mark.exists()


@pytest.mark.parametrize("name", PAYLOADS)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("container", ["bare", "zip", "legacy"])
def test_payload_never_runs_and_is_named(name: str, protocol: int, container: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "evil.pth"
    payload = PAYLOADS[name](mark)
    if container == "bare":
        path.write_bytes(pickle.dumps(payload, protocol))
    else:
        content = {"args": None, "model": OrderedDict({"enc_norm.bias": payload})}
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=container == "zip")
    assert re.search(rf"wants to run (builtins\.|__builtin__\.)?{re.escape(name)};", refusal(path))
    assert not mark.exists()


def test_other_class_than_namespace_is_named(tmp_path: Path) -> None:
    torch.save({"args": Path("x"), "model": {}}, tmp_path / "odd.pth")
    assert "wants to run pathlib." in refusal(tmp_path / "odd.pth")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([], "a dictionary with 'args' and 'model' was expected"),
        (torch.zeros(3), "a dictionary with 'args' and 'model' was expected"),
        ({}, "a dictionary with 'args' and 'model' was expected"),
        (WEIGHTS.tensors, "a dictionary with 'args' and 'model' was expected"),
        ({"args": argparse.Namespace(model="x")}, "a dictionary with 'args' and 'model' was expected"),
        ({"args": argparse.Namespace(model="x"), "model": [1]}, "a dictionary with 'args' and 'model' was expected"),
        ({"model": {}}, "'args' holds no model string"),
        ({"model": {}, "args": None}, "'args' holds no model string"),
        ({"model": {}, "args": {"model": "x"}}, "'args' holds no model string"),
        ({"model": {}, "args": argparse.Namespace}, "'args' holds no model string"),
        ({"model": {}, "args": argparse.Namespace()}, "'args' holds no model string"),
        ({"model": {}, "args": argparse.Namespace(model=24)}, "'args' holds no model string"),
    ],
)
def test_other_content_is_refused(content: Any, complaint: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pth")
    assert complaint in refusal(tmp_path / "other.pth")


def test_model_string_is_not_evaluated(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for text in (f"open({str(mark)!r}, 'w')", f"AsymmetricMASt3R(enc_depth=open({str(mark)!r}, 'w'))"):
        torch.save({"args": argparse.Namespace(model=text), "model": {}}, tmp_path / "evil.pth")
        with pytest.raises(BadCheckpoint, match="model string"):
            load_checkpoint(tmp_path / "evil.pth")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({3: torch.zeros(3)}, "maps 3 to a Tensor"),
        ({("a", 1): torch.zeros(3)}, "maps ('a', 1) to a Tensor"),
        ({"enc_norm.bias": [0.0] * 32}, "maps 'enc_norm.bias' to a list"),
        ({"enc_norm.bias": None}, "maps 'enc_norm.bias' to a NoneType"),
        ({"mask_token": "x"}, "maps 'mask_token' to a str"),
        ({"x" * 9_999: 3}, "xxx' to a int"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_entries_other_than_named_tensors_are_refused(entry: State, complaint: str, tmp_path: Path) -> None:
    path = write_pth(tmp_path / "slim.pth", published(WEIGHTS) | entry)
    assert complaint in refusal(path)


def complaint_lists(message: str) -> dict[str, list[str]]:
    """Of a message about names: what is wrong -> "how many in all", then the names told."""
    lists = {}
    for part in message.partition("; ")[2].split("; "):
        count, kind, names = re.fullmatch(r"(\d+) ([a-z -]+): (.*)", part).groups()  # type: ignore[union-attr]
        lists[kind] = [count, *re.split(r", (?=[a-z]+[\d_.])", names)]
    return lists


@pytest.mark.parametrize("layout", ["pth", "safetensors"])
def test_wrong_architecture_names_five_of_each(layout: str, tmp_path: Path) -> None:
    names = list(WEIGHTS.tensors)
    missing, misshapen, extra = names[10:17], names[30:38], [f"encoder.layer{i}.weight" for i in range(9)]
    state = {name: tensor for name, tensor in WEIGHTS.tensors.items() if name not in missing}
    state |= {name: torch.zeros(5, 7) for name in [*misshapen, *extra]}
    path = write_pth(tmp_path / "a.pth", state) if layout == "pth" else write_folder(tmp_path / "a", state) / "model.safetensors"
    shapes = [f"{name} (expected {list(WEIGHTS.tensors[name].shape)}, found [5, 7])" for name in misshapen]
    assert complaint_lists(refusal(path)) == {
        "missing": ["7", *missing[:5]],
        "unexpected": ["9", *extra[:5]],
        "misshapen": ["8", *shapes[:5]],
    }


def test_weights_of_another_configuration(tmp_path: Path) -> None:
    other = dataclasses.replace(SLIM, enc_depth=2, dec_embed_dim=64)
    path = tmp_path / "slim.pth"
    torch.save(training_checkpoint(other, published(WEIGHTS)), path)
    found = complaint_lists(refusal(path))
    assert found["missing"][1].startswith("enc_blocks.1.")
    assert "decoder_embed.weight (expected [64, 32], found [32, 32])" in found["misshapen"]


@pytest.mark.parametrize(
    "change",
    [
        torch.Tensor.int,
        torch.Tensor.bool,
        lambda tensor: tensor.to(torch.complex64),
        torch.Tensor.to_sparse,
        lambda tensor: tensor.to("meta"),
    ],
    ids=["int", "bool", "complex", "sparse", "meta"],
)
def test_unusual_tensors_are_refused(change: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    name = "enc_norm.weight"
    path = write_pth(tmp_path / "slim.pth", WEIGHTS.tensors | {name: change(WEIGHTS.tensors[name])})
    assert complaint_lists(refusal(path)) == {"not dense floating-point": ["1", name]}


@pytest.mark.parametrize("layout", ["pth", "safetensors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_named(layout: str, value: float, tmp_path: Path) -> None:
    name = "downstream_head2.dpt.scratch.layer_rn.3.weight"
    state = {key: tensor.clone() for key, tensor in WEIGHTS.tensors.items()}
    state[name].view(-1)[-1] = value
    path = write_pth(tmp_path / "a.pth", state) if layout == "pth" else write_folder(tmp_path / "a", state) / "model.safetensors"
    assert refusal(path).endswith(f"NaN or infinite values in {name}")


def test_many_values_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    names = list(WEIGHTS.tensors)[:8]
    path = write_pth(tmp_path / "slim.pth", WEIGHTS.tensors | {name: WEIGHTS.tensors[name] / 0 for name in names})
    assert refusal(path).endswith(f"NaN or infinite values in {', '.join(names[:5])} and 3 more")


def test_too_large_for_float32_is_named(tmp_path: Path) -> None:
    path = write_pth(tmp_path / "slim.pth", WEIGHTS.tensors | {"enc_norm.bias": torch.full((32,), 1e300, dtype=torch.float64)})
    assert refusal(path).endswith("NaN or infinite values in enc_norm.bias")


def flips(content: bytes, seed: int) -> bytes:
    """The content with three bytes changed, two of them where a format keeps its structure."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(0, 40_000, (2,), generator=generator).tolist()
    changed = bytearray(content)
    for position in (ends[0], -1 - ends[1] // 20, int(torch.randint(0, len(content), (), generator=generator))):
        changed[position] ^= int(torch.randint(1, 256, (), generator=generator))
    return bytes(changed)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("layout", ["zip.pth", "legacy.pth", "model.safetensors"])
def test_flipped_bytes_load_or_are_refused(layout: str, seed: int, tmp_path: Path) -> None:
    path = tmp_path / layout
    if layout == "model.safetensors":
        (tmp_path / "config.json").write_text(json.dumps(SLIM.to_json()))
        path.write_bytes(save(WEIGHTS.tensors))
    else:
        write_pth(path, WEIGHTS.tensors, _use_new_zipfile_serialization=layout == "zip.pth")
    path.write_bytes(flips(path.read_bytes(), seed))
    with contextlib.suppress(BadCheckpoint):
        assert list(load_checkpoint(path).tensors) == list(WEIGHTS.tensors)
