"""The original as a matcher, for what the techniques change to be measured against: its network in torch, and its matching.

`OriginalMatcher` is both; `BlockMatchedBundle` is a bundle's network with the original's matching. Both are those that `smc bench` times.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smc.compiler.bench.torch_matching import pixel_confidence, reciprocal_matches
from smc.compiler.bench.torch_network import TorchNetwork
from smc.compiler.bench.variants import VARIANTS
from smc.compiler.config import ModelConfig
from smc.compiler.evaluation.matchers import BundleMatcher, Correspondences
from smc.exported.images import PATCH, View, load_view
from smc.exported.matcher import Matcher


class OriginalMatcher:
    """The torch model in one of the variants of `smc.compiler.bench.variants`. Owns its process, as `TorchNetwork` does."""

    def __init__(self, config: ModelConfig, weights: Path, variant: str, device: str, shape: tuple[int, int]) -> None:
        """`weights` is a state dict in float32, as `torch.save` writes it; `shape` the (H, W) of the network's input."""
        self.variant, self.shape, self._config = VARIANTS[variant], shape, config
        self._network = TorchNetwork(config, str(weights), self.variant, torch.device(device))
        self._grid = shape[0] // PATCH, shape[1] // PATCH
        self._network.prepare(*self._grid)
        with weights.open("rb") as file:
            self._sha256 = hashlib.file_digest(file, "sha256").hexdigest()

    def describe(self) -> dict[str, Any]:
        return {
            "matcher": "original",
            "variant": self.variant.name,
            "model": self._config.to_json(),
            "weights_sha256": self._sha256,
            "shape": list(self.shape),
            **_torch_on(self._network.device),
        }

    def match(self, image0: NDArray[np.uint8], image1: NDArray[np.uint8]) -> Correspondences:
        views = load_view(image0, [self.shape]), load_view(image1, [self.shape])
        network = self._network
        network.begin()
        features = [network.encode(network.upload(np.stack([view.rgb]))) for view in views]
        maps = network.heads(*network.decode(*features), *self._grid)
        return _block_matches({name: values[0] for name, values in maps.items()}, views)


class BlockMatchedBundle:
    """A loaded bundle whose descriptors the original's matching takes, in torch on `device`.

    Owns its process, as `OriginalMatcher` does: it sets torch's precision of products of matrices.
    """

    def __init__(self, matcher: Matcher, device: str) -> None:
        self.matcher, self.device = matcher, torch.device(device)
        torch.set_float32_matmul_precision("highest")

    def describe(self) -> dict[str, Any]:
        return BundleMatcher(self.matcher).describe() | {"matcher": "bundle's network, original's matching", **_torch_on(self.device)}

    def match(self, image0: NDArray[np.uint8], image1: NDArray[np.uint8]) -> Correspondences:
        shapes = self.matcher.manifest.input_shapes
        views = load_view(image0, shapes), load_view(image1, shapes)
        maps = self.matcher.infer(views[0].pixels[None], views[1].pixels[None])
        return _block_matches({name: torch.from_numpy(values).to(self.device) for name, values in maps.items()}, views)


def _torch_on(device: torch.device) -> dict[str, str]:
    """What torch's results depend on: the GPU by its name, or "cpu", and torch's version."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "torch": str(torch.__version__)}


def _block_matches(maps: dict[str, Tensor], views: tuple[View, View]) -> Correspondences:
    """The original's matches from maps (H, W, ...), in pixels of the images."""
    xy0, xy1 = reciprocal_matches(maps["desc1"], maps["desc2"])
    confidence = pixel_confidence(xy0, xy1, maps["desc_conf1"], maps["desc_conf2"])
    return Correspondences(views[0].framing.to_image(xy0), views[1].framing.to_image(xy1), confidence)
