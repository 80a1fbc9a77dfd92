"""Losses against plain numpy, and a run of a very small model: it learns, it resumes, and what it writes can be built."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator

from smc.compiler.build import BuildRequest, build
from smc.compiler.checkpoint import load_checkpoint
from smc.compiler.config import PRESETS, ModelConfig
from smc.compiler.model import Mast3r
from smc.compiler.scenes.draw import Difficulty
from smc.compiler.scenes.pairs import HELD_OUT_SEED, PairBatch, draw_batch
from smc.compiler.scenes.textures import draw_textures
from smc.compiler.training.losses import ALPHA, MATCHING_ALPHA, TEMPERATURE, draw_correspondences, matching_loss, points_loss
from smc.compiler.training.network import initialise
from smc.compiler.training.plan import LARGE, PEAK_LR, PHASES, SMALL, WARM_UP_STEPS, Phase, difficulty_at, lr_at, phase_at
from smc.compiler.training.state import STATE
from smc.compiler.training.train import SEEDS, Options, Run
from smc.exported.errors import BadInput, CannotWrite, NoTarget, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")

MICRO = ModelConfig(
    enc_embed_dim=32,
    enc_depth=1,
    enc_num_heads=1,
    dec_embed_dim=32,
    dec_depth=4,
    dec_num_heads=1,
    mlp_ratio=2,
    dpt_dim=8,
    dpt_level_dims=(8, 8, 8, 8),
    desc_mlp_ratio=0.5,
)


@pytest.fixture(scope="module")
def batch() -> PairBatch:
    generator = Generator().manual_seed(0)
    return draw_batch(generator, draw_textures(generator, None, 4, 64), 3, 48, 64)


def options(out: Path, steps: int = 6) -> Options:
    phase = Phase(until=1.0, shapes=((32, 48),), pairs=2, correspondences=32)
    return Options(
        out=out,
        config=MICRO,
        photographs=None,
        steps=steps,
        device="cpu",
        compile=False,
        phases=(phase,),
        textures=4,
        texture_side=32,
        refresh=3,
        evaluate_steps=100,
        log_steps=1,
        evaluated=2,
    )


def test_points_loss_is_what_numpy_says() -> None:
    rng = np.random.default_rng(0)
    points, truth = rng.normal(size=(2, 2, 4, 5, 3)), rng.normal(size=(2, 2, 4, 5, 3))
    confidence, valid = 1 + rng.random((2, 2, 4, 5)), rng.random((2, 2, 4, 5)) < 0.7
    wanted = np.zeros(2)
    errors = np.zeros((2, 2, 4, 5))
    for pair in range(2):
        seen = valid[:, pair]
        scales = [np.linalg.norm(cloud[:, pair], axis=-1)[seen].mean() for cloud in (points, truth)]
        errors[:, pair] = np.linalg.norm(points[:, pair] / scales[0] - truth[:, pair] / scales[1], axis=-1)
    for view in range(2):
        term = confidence[view] * errors[view] - ALPHA * np.log(confidence[view])
        wanted += [term[valid[view]].mean(), errors[view][valid[view]].mean() / 2]
    both = [tuple(torch.from_numpy(x)) for x in (points, confidence, truth, valid)]
    found = points_loss(*((x[0], x[1]) for x in both))
    np.testing.assert_allclose([float(x) for x in found], wanted, rtol=1e-6)


def test_points_loss_does_not_see_the_scale() -> None:
    points = torch.randn(2, 1, 4, 5, 3, generator=Generator().manual_seed(0))
    ones, valid = torch.ones(1, 4, 5), torch.ones(1, 4, 5, dtype=torch.bool)
    loss, distance = points_loss((7 * points[0], 7 * points[1]), (ones, ones), (points[0], points[1]), (valid, valid))
    assert float(loss) < 1e-4
    assert float(distance) < 1e-4


def test_matching_loss_is_what_numpy_says() -> None:
    rng = np.random.default_rng(1)
    desc = rng.normal(size=(2, 2, 6, 4))
    desc /= np.linalg.norm(desc, axis=-1, keepdims=True)
    confidence, real = 0.5 + rng.random((2, 2, 6)), rng.random((2, 6)) < 0.8
    pixels = np.stack([np.tile(np.arange(6), (2, 1)), np.tile([0, 1, 2, 3, 4, 4], (2, 1))])  # the last two share one pixel
    real[:, 4:] = True
    terms, plain = [], []
    for pair in range(2):
        exact = np.exp(desc[0, pair] @ desc[1, pair].T / TEMPERATURE)
        for i in np.flatnonzero(real[pair]):
            others = [j for j in np.flatnonzero(real[pair]) if j == i or {i, j} != {4, 5}]
            nce = -(np.log(exact[i, i] / exact[i, others].sum()) + np.log(exact[i, i] / exact[others, i].sum())) / 2
            weight = confidence[:, pair, i].mean()
            plain.append(nce)
            terms.append(weight * nce - MATCHING_ALPHA * np.log(weight))
    tensors = [torch.from_numpy(x) for x in (*desc, *confidence)]
    found = matching_loss(*tensors, tuple(torch.from_numpy(pixels)), torch.from_numpy(real))
    np.testing.assert_allclose([float(x) for x in found], [np.mean(terms), np.mean(plain)], rtol=1e-6)


def test_gradients_are_finite_where_nothing_is_valid() -> None:
    points = torch.zeros(1, 2, 2, 3, requires_grad=True)
    ones, nothing = torch.ones(1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.bool)
    points_loss((points, points), (ones, ones), (points.detach(), points.detach()), (nothing, nothing))[0].backward()
    desc = torch.zeros(1, 3, 4, requires_grad=True)
    index, none = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.bool)
    matching_loss(desc, desc, torch.ones(1, 3), torch.ones(1, 3), (index, index), none)[0].backward()
    for x in (points, desc):
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()


def test_correspondences_are_true_to_half_a_pixel(batch: PairBatch) -> None:
    first, second, real = draw_correspondences(Generator().manual_seed(1), batch, 100)
    assert first.shape == second.shape == real.shape == (3, 100)
    assert real.float().mean() > 0.5
    xy = torch.stack([first % 64, first // 64], dim=-1).float()
    there, visible = batch.warp(xy)
    assert visible[real].all()
    found = torch.stack([second % 64, second // 64], dim=-1).float()
    assert (found - there).abs()[real].max() <= 0.5001


def test_descriptors_start_by_what_a_patch_shows_not_by_where_in_it() -> None:
    network = Mast3r(MICRO)
    initialise(network)
    with torch.no_grad():
        maps = network(torch.randn(1, 3, 32, 48), torch.randn(1, 3, 32, 48))
    desc = maps["desc1"][0].unfold(0, 16, 16).unfold(1, 16, 16)  # (2, 3, D, 16, 16)
    assert (desc - desc[..., :1, :1]).abs().max() < 1e-5
    assert (desc[0, 0] - desc[1, 2]).abs().max() > 1e-2


def test_a_pair_serves_twice_and_is_turned_the_second_time(tmp_path: Path) -> None:
    run = Run(options(tmp_path))
    first, second, third = (run._draw(step) for step in range(3))
    assert second.images[0] is first.images[1]
    assert not torch.equal(third.images[0], first.images[0])
    # A run that goes on in the middle of the two draws the same.
    assert torch.equal(Run(options(tmp_path / "again"))._draw(1).images[0], second.images[0])


def test_plan_covers_the_run() -> None:
    assert phase_at(0.0, PHASES).shapes[0] == SMALL
    assert phase_at(0.99, PHASES).shapes[0] == phase_at(1.5, PHASES).shapes[0] == LARGE
    assert difficulty_at(0.0).view_angle < 20 < 59 < difficulty_at(0.5).view_angle
    rates = [lr_at(i / 1000, i, None) for i in range(1001)]
    assert rates[0] < 0.01 * max(rates)
    assert max(rates) == rates[WARM_UP_STEPS - 1]
    assert rates[-1] < 0.02 * max(rates)


@pytest.mark.parametrize("steps", [1, 5, 100, 1999, 2000, 10_000])
def test_the_learning_rate_of_a_run_by_steps_reaches_its_peak(steps: int) -> None:
    rates = [lr_at(i / steps, i, steps) for i in range(steps)]
    warm_up = rates.index(max(rates))
    assert warm_up < max(1, min(WARM_UP_STEPS, steps // 10))
    assert max(rates) > 0.97 * PEAK_LR


def test_the_trained_preset_is_small_enough_to_ship() -> None:
    from smc.compiler.checkpoint import parameter_shapes

    values = sum(int(np.prod(shape)) for shape in parameter_shapes(PRESETS["pocket"]).values())
    assert 2 * values < 15_800_000  # of 16 MB, names and shapes take the rest


def test_a_run_learns_resumes_and_can_be_built(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    quiet: list[str] = []
    record = Run(options(whole)).train(quiet.append)
    Run(options(parts)).train(quiet.append, stop_after=4)
    again = Run(options(parts))
    assert again.step == 4
    again.train(quiet.append)

    one, other = (load_checkpoint(folder) for folder in (whole, parts))
    assert one.config == MICRO
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(tensor, other.tensors[name], rtol=1e-3, atol=1e-4)
    assert record["steps"] == 6
    assert json.loads((whole / "training.json").read_text())["pairs"] == 12
    log = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6, 6]
    assert 0 <= log[-1]["recall"] <= 1

    result = build(BuildRequest(gpu="cpu", out=tmp_path / "bundle", checkpoint=whole, shapes=((48, 64),)))
    assert result.path.exists()


def test_a_few_steps_on_one_batch_lower_the_loss(tmp_path: Path) -> None:
    from smc.compiler.training.network import trainable_functions

    run = Run(options(tmp_path, steps=100))
    losses = []
    with trainable_functions(run.device):
        batch = run._draw(0)
        for group in run.optimizer.param_groups:
            group["lr"] = 1e-3
        for _ in range(12):
            found = run._backward(batch)
            run._update(found)
            losses.append(float(found["loss"]))
    assert losses[-1] < losses[0] - 0.1
    assert run.skipped == 0


def test_a_run_can_begin_with_what_another_has_learnt(tmp_path: Path) -> None:
    first = Run(options(tmp_path / "first", steps=2)).train([].append)
    run = Run(dataclasses.replace(options(tmp_path / "second", steps=2), start=tmp_path / "first"))
    for name, tensor in load_checkpoint(tmp_path / "first").tensors.items():
        torch.testing.assert_close(run.network.state_dict()[name], tensor)
    assert run._difficulty() == Difficulty()
    assert run.train([].append)["start"]["training"]["pairs"] == first["pairs"]
    with pytest.raises(BadInput, match="another model"):
        Run(dataclasses.replace(options(tmp_path / "third"), start=tmp_path / "first", config=dataclasses.replace(MICRO, dec_depth=8)))


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    run = Run(options(tmp_path))
    run.save()
    assert (tmp_path / STATE).exists()
    with pytest.raises(BadInput, match="another model, seed or start"):
        Run(dataclasses.replace(options(tmp_path), seed=1))


def test_a_run_that_was_begun_before_there_were_starts_goes_on(tmp_path: Path) -> None:
    Run(options(tmp_path)).train([].append, stop_after=1)
    state = torch.load(tmp_path / STATE, weights_only=True)
    del state["start"]
    torch.save(state, tmp_path / STATE)
    assert Run(options(tmp_path)).step == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minutes": 1.0}, "minutes or by steps"),
        ({"steps": None}, "minutes or by steps"),
        ({"steps": 0}, "0 steps"),
        *(({"steps": None, "minutes": value}, f"{value} minutes") for value in (-1.0, 0.0, np.nan, np.inf)),
        *(({"save_minutes": value}, f"every {value} minutes") for value in (-1.0, np.nan)),
        ({"seed": -1}, "seed -1"),
        ({"seed": SEEDS}, f"from 0 to {SEEDS - 1}"),
    ],
)
def test_a_run_needs_one_limit_and_a_seed_for_training(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(options(tmp_path), **changes)


def test_no_run_draws_from_the_seeds_that_are_for_evaluation(tmp_path: Path) -> None:
    run = Run(dataclasses.replace(options(tmp_path), seed=SEEDS - 1))
    assert run._seed(2**26 - 1, 3) < HELD_OUT_SEED


def test_a_gpu_that_is_absent_is_told_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NoTarget, match="finds no GPU"):
        Run(dataclasses.replace(options(tmp_path / "run"), device="cuda"))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CannotWrite, match="file/run: Not a directory"):
        Run(options(tmp_path / "file" / "run"))
