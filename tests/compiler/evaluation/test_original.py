"""The original in torch as a matcher, beside a bundle of the same weights."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import smc
from smc.compiler.checkpoint import random_weights
from smc.compiler.config import ModelConfig
from smc.compiler.evaluation.matchers import BundleMatcher
from smc.compiler.evaluation.original import BlockMatchedBundle

ORIGINAL = """
import json, sys
import numpy as np
from pathlib import Path
from smc.compiler.config import ModelConfig
from smc.compiler.evaluation.original import OriginalMatcher
config, weights, images = sys.argv[1:]
matcher = OriginalMatcher(ModelConfig.from_fields(json.loads(config)), Path(weights), "eager-float32", "cpu", (96, 128))
image0, image1 = np.load(images)
found = matcher.match(image0, image1)
again = matcher.match(image0, image1)
assert np.array_equal(found.keypoints0, again.keypoints0)
print(json.dumps([matcher.describe(), np.column_stack([found.keypoints0, found.keypoints1]).tolist(), found.confidence.tolist()]))
"""


def test_the_original_finds_what_a_float32_bundle_finds(tiny_matcher: smc.Matcher, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 120, 160, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    config = tiny_matcher.manifest.model.config
    torch.save(random_weights(ModelConfig.from_fields(config), 0).tensors, tmp_path / "weights.pt")
    # In a process of its own, since it sets torch's switches and exchanges functions of the model.
    command = [sys.executable, "-P", "-c", ORIGINAL, json.dumps(config), str(tmp_path / "weights.pt"), str(tmp_path / "images.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    described, rows, confidence = json.loads(done.stdout)
    assert described == {
        "matcher": "original",
        "variant": "eager-float32",
        "model": ModelConfig.from_fields(config).to_json(),
        "weights_sha256": hashlib.sha256((tmp_path / "weights.pt").read_bytes()).hexdigest(),
        "shape": [96, 128],
        "device": "cpu",
        "torch": str(torch.__version__),
    }

    bundle = BundleMatcher(tiny_matcher)
    for matcher in (bundle, BlockMatchedBundle(tiny_matcher, "cpu")):
        found = matcher.match(*images)
        expected = set(map(tuple, np.column_stack([found.keypoints0, found.keypoints1]).tolist()))
        assert len(expected) > 5
        assert len(expected & set(map(tuple, rows))) > 0.95 * len(expected)
    assert len(confidence) == len(rows)
    assert np.isclose(np.median(confidence), np.median(found.confidence), rtol=1e-3)


def test_a_bundle_with_the_originals_matching_is_named_so(tiny_matcher: smc.Matcher) -> None:
    own, block = BundleMatcher(tiny_matcher).describe(), BlockMatchedBundle(tiny_matcher, "cpu").describe()
    assert own["matcher"] != block["matcher"]
    assert own["build_key"] == block["build_key"]
    assert (block["device"], block["torch"]) == ("cpu", str(torch.__version__))


DESCRIBED = """
import json, sys
from pathlib import Path
from smc.compiler.config import ModelConfig
from smc.compiler.evaluation.original import OriginalMatcher
config, *weights = sys.argv[1:]
config = ModelConfig.from_fields(json.loads(config))
print(json.dumps([OriginalMatcher(config, Path(path), "eager-float32", "cpu", (96, 128)).describe() for path in weights]))
"""


def test_results_of_other_weights_are_not_gone_on_with(tiny_matcher: smc.Matcher, tmp_path: Path) -> None:
    config = tiny_matcher.manifest.model.config
    paths = [tmp_path / folder / "weights.pt" for folder in ("first", "again", "other")]
    for path, seed in zip(paths, (0, 0, 1), strict=True):
        path.parent.mkdir()
        torch.save(random_weights(ModelConfig.from_fields(config), seed).tensors, path)
    command = [sys.executable, "-P", "-c", DESCRIBED, json.dumps(config), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, again, other = json.loads(done.stdout)
    assert first == again
    assert {name for name in first if first[name] != other[name]} == {"weights_sha256"}
