"""The torch model against the original's outputs."""

from __future__ import annotations

import pytest
import torch

from smc.compiler.checkpoint import random_weights
from smc.compiler.config import ModelConfig, read_config_json
from smc.compiler.model import Mast3r, rope_2d, rotate
from tests.conformance import DATA, case_images, load_case, relative_error, state_dict_shapes

LIMIT = 2e-5
"""What two correct float32 implementations reach, with room."""

TINY = ["tiny_landscape", "tiny_portrait_mixed"]
CASES = [*TINY, pytest.param("large_160x224", marks=[pytest.mark.large, pytest.mark.xdist_group("large")])]


def build_case(name: str) -> Mast3r:
    return random_weights(read_config_json(DATA / f"{name}.config.json"), seed=0).build_model()


@pytest.mark.parametrize("name", CASES)
def test_maps_equal_the_original(name: str) -> None:
    case = load_case(name)
    model = build_case(name)
    with torch.inference_mode():
        maps = model(*map(torch.from_numpy, case_images(case)))
    stride = int(case["stride"])
    for output, value in maps.items():
        assert relative_error(value[0, ::stride, ::stride].numpy(), case[output]) < LIMIT, output


@pytest.mark.parametrize("name", TINY)
def test_tokens_equal_the_original(name: str) -> None:
    case = load_case(name)
    model = build_case(name)
    with torch.inference_mode():
        features = [model.encode(torch.from_numpy(image)) for image in case_images(case)]
        tokens = model.decode_tokens(*features)
    for view in (1, 2):
        assert relative_error(features[view - 1].flatten(1, 2).numpy(), case[f"feat{view}"]) < LIMIT
        assert relative_error(tokens[view - 1][-1].numpy(), case[f"dec{view}_last"]) < LIMIT


@pytest.mark.parametrize("name", [*TINY, "large_160x224"])
def test_parameters_are_the_originals(name: str) -> None:
    config = read_config_json(DATA / f"{name}.config.json")
    with torch.device("meta"):
        found = {key: list(value.shape) for key, value in Mast3r(config).state_dict().items()}
    original = state_dict_shapes(name)
    assert found.items() <= original.items()
    unused = original.keys() - found.keys()
    assert all("mask_token" in key or "refinenet4.resConfUnit1" in key or "_rn.weight" in key for key in unused), unused


def test_batch_gives_the_same_as_one_by_one() -> None:
    model = build_case("tiny_landscape")
    images = torch.rand(2, 3, 3, 48, 64) * 2 - 1  # view, batch, channel, row, column
    with torch.inference_mode():
        together = model(images[0], images[1])
        alone = model(images[0, 2:], images[1, 2:])
    for output in together:
        assert relative_error(together[output][2].numpy(), alone[output][0].numpy()) < LIMIT, output


def test_rotation_keeps_norms_and_depends_on_relative_position_only() -> None:
    cos, sin = rope_2d(4, 5, head_dim=16, base=100.0)
    q, k = torch.randn(2, 16, dtype=torch.float64)
    rotated_q, rotated_k = (rotate(x.expand(1, 1, 20, 16), (cos.double(), sin.double()))[0, 0] for x in (q, k))
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm().expand(20), rtol=1e-6, atol=0)
    scores = (rotated_q @ rotated_k.T).reshape(4, 5, 4, 5)
    torch.testing.assert_close(scores[0, 0, 2, 3], scores[1, 1, 3, 4], rtol=1e-5, atol=1e-5)
    assert not torch.isclose(scores[0, 0, 2, 3], scores[0, 0, 3, 2])


@pytest.mark.parametrize(
    ("mode", "field"),
    [(("sigmoid", 0.5, 2.0), "conf_mode"), (("exp", 1.0, 3.0), "conf_mode"), (("exp", 0.0, 1.5), "desc_conf_mode")],
)
def test_confidence_bounds_hold(mode: tuple[str, float, float], field: str) -> None:
    maps = run_tiny(**{field: mode})
    low, high = mode[1:]
    output = maps[field.removesuffix("_mode") + "1"]
    assert output.min() >= low
    assert output.max() <= high
    assert output.std() > 0


@pytest.mark.parametrize("kind", ["linear", "square"])
def test_depth_modes_differ_in_length_alone(kind: str) -> None:
    plain = run_tiny()["pts3d1"]
    other = run_tiny(depth_mode=(kind, -float("inf"), float("inf")))["pts3d1"]
    directions = [torch.nn.functional.normalize(points, dim=-1) for points in (other, plain)]
    torch.testing.assert_close(*directions, rtol=0, atol=1e-4)
    assert not torch.allclose(other, plain)


def test_one_confidence_serves_both() -> None:
    maps = run_tiny(two_confs=False)
    torch.testing.assert_close(maps["desc_conf2"], maps["conf2"], rtol=0, atol=0)


def test_sizes_follow_the_configuration() -> None:
    maps = run_tiny(output_mode="pts3d+desc16", dpt_dim=32, dpt_level_dims=(8, 16, 24, 32))
    assert maps["desc1"].shape == (1, 48, 64, 16)
    torch.testing.assert_close(maps["desc1"].norm(dim=-1), torch.ones(1, 48, 64))


def run_tiny(**fields: object) -> dict[str, torch.Tensor]:
    """One pair through a minimal model whose weights depend on the parameters' names alone."""
    defaults = {"enc_embed_dim": 32, "enc_depth": 1, "enc_num_heads": 2, "dec_embed_dim": 32, "dec_depth": 4, "dec_num_heads": 2}
    config = ModelConfig(**(defaults | fields))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(2, 1, 3, 48, 64, generator=generator) * 2 - 1
    with torch.inference_mode():
        return random_weights(config, seed=1).build_model()(images[0], images[1])
