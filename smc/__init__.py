"""speedy-mast3r: load a compiled MASt3R bundle and match images.

    matcher = smc.load("bundle")
    matches = matcher.match("a.jpg", "b.jpg")

Importing this package brings in the runtime alone: never torch, onnx or the compiler.
"""

import os

from smc.exported.errors import (
    AccuracyFailed,
    BackendFailed,
    BadCheckpoint,
    BadImage,
    BadInput,
    BundleDamaged,
    BundleMismatch,
    Busy,
    CannotWrite,
    DiskError,
    InputMissing,
    NoTarget,
    OutOfMemory,
    SmcError,
    UsageError,
)
from smc.exported.images import load_image
from smc.exported.matcher import Features, Matcher, Matches, load
from smc.exported.matching import fast_reciprocal_nn

# ONNX Runtime, which is imported later, reports its use to Microsoft unless told not to.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = [
    "AccuracyFailed",
    "BackendFailed",
    "BadCheckpoint",
    "BadImage",
    "BadInput",
    "BundleDamaged",
    "BundleMismatch",
    "Busy",
    "CannotWrite",
    "DiskError",
    "Features",
    "InputMissing",
    "Matcher",
    "Matches",
    "NoTarget",
    "OutOfMemory",
    "SmcError",
    "UsageError",
    "fast_reciprocal_nn",
    "load",
    "load_image",
]
