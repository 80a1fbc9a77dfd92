"""What a build starts from: a checkpoint's torch model, or ONNX files that somebody exported. Both give graphs and a reference."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from smc.compiler import verify
from smc.exported.errors import BadInput
from smc.exported.images import PATCH
from smc.exported.manifest import ModelInfo

if TYPE_CHECKING:
    import onnx_ir as ir

    from smc.compiler.checkpoint import Weights
    from smc.passes.tensors import Dim

STAGES = ("encoder", "decoder")
MAPS = tuple(f"{name}{view}" for view in (1, 2) for name in ("pts3d", "conf", "desc", "desc_conf"))
"""The decoder's outputs, in order."""

Report = Callable[[str, float], None]


class Source(Protocol):
    """A model to compile.

    Attributes:
        info: what the manifest says of it.
        reference: what `run` is, for reports.
        fixed_shape: the one (H, W) input shape that the graphs take, None if they take any.
    """

    info: ModelInfo
    reference: str
    fixed_shape: tuple[int, int] | None

    def export(self, report: Report) -> dict[str, ir.Model]:
        """The float32 graphs of the stages; their weights may share memory with the source."""

    def run(self, pairs: Sequence[verify.SamplePair], report: Report) -> list[verify.Outputs]:
        """Features and maps of pairs in float32, by the source's own means."""

    def close(self) -> None:
        """Let go of the weights."""


class CheckpointSource:
    """Weights of a checkpoint, or random ones, in the torch model."""

    fixed_shape: tuple[int, int] | None = None

    def __init__(self, weights: Weights) -> None:
        import torch

        self._model = weights.build_model()
        self.reference = f"torch {torch.__version__} in float32"
        self.info = ModelInfo(
            source=weights.source.encode(errors="replace").decode(),  # a file's name need not be Unicode, a manifest is
            checkpoint_sha256=weights.sha256,
            parameters=sum(p.numel() for p in self._model.parameters()),
            config=weights.config.to_json(),
        )

    def export(self, report: Report) -> dict[str, ir.Model]:
        from smc.compiler.export import export_decoder, export_encoder

        report("exporting the encoder", 0.0)
        encoder = export_encoder(self._model)
        report("exporting the decoder", 0.4)
        return {"encoder": encoder, "decoder": export_decoder(self._model)}

    def run(self, pairs: Sequence[verify.SamplePair], report: Report) -> list[verify.Outputs]:
        import torch

        outputs = []
        for i, pair in enumerate(pairs):
            report(f"float32 reference, {pair.title}", i / len(pairs))
            with torch.inference_mode():
                features1, features2 = (self._model.encode(torch.from_numpy(view)) for view in (pair.view1, pair.view2))
                maps = self._model.decode(features1, features2)
            named = {"features1": features1, "features2": features2, **maps}
            outputs.append({name: np.ascontiguousarray(value[0].numpy()) for name, value in named.items()})
        return outputs

    def close(self) -> None:
        del self._model


class OnnxSource:
    """An encoder and a decoder that somebody exported.

    The encoder takes one float32 image (batch, 3, H, W) in [-1, 1] and returns features (batch, H/16, W/16, channels), or
    (batch, H/16 * W/16, channels); the decoder takes the features of two images and returns the maps of `MAPS` under these names:
    (batch, H, W, 3) for points, (batch, H, W, D) for descriptors, (batch, H, W) for confidences.
    """

    def __init__(self, encoder: Path, decoder: Path) -> None:
        """Read and check both files. Raises InputMissing, BadInput."""
        from smc.compiler.graph_files import parameter_count, read_onnx

        self._models = {"encoder": read_onnx(encoder), "decoder": read_onnx(decoder)}
        self._names = {"encoder": encoder.name, "decoder": decoder.name}
        _check_interface(encoder, self._models["encoder"], inputs=1, outputs=None)
        _check_interface(decoder, self._models["decoder"], inputs=2, outputs=MAPS)
        for model in self._models.values():
            _complete(model)
        self.reference = "the ONNX files in ONNX Runtime, not optimised"
        height, width = _dims(_inputs(self._models["encoder"])[0])[2:]
        self.fixed_shape = (height, width) if isinstance(height, int) and isinstance(width, int) else None
        self.info = ModelInfo(
            source=" and ".join(path.name.encode(errors="replace").decode() for path in (encoder, decoder)),
            checkpoint_sha256=_digest(self._models),
            parameters=sum(map(parameter_count, self._models.values())),
            config={},
        )

    def export(self, report: Report) -> dict[str, ir.Model]:
        return dict(self._models)

    def run(self, pairs: Sequence[verify.SamplePair], report: Report) -> list[verify.Outputs]:
        """As `Source.run`.

        Raises:
            BadInput: features or maps are not of the types and shapes that they should be, or are not what a file takes.
            BackendFailed: the graphs fail.
        """
        from smc.compiler.graph_files import import_graph
        from smc.compiler.graph_runner import GraphRunner

        encoder, decoder = (GraphRunner(import_graph(self._models[stage], self._names[stage])) for stage in STAGES)
        (image,), tokens = (_inputs(self._models[stage]) for stage in STAGES)
        outputs = []
        for i, pair in enumerate(pairs):
            report(f"float32 reference, {pair.title}", i / len(pairs))
            features: list[NDArray[Any]] = []
            for view, shape in zip((pair.view1, pair.view2), pair.shapes, strict=True):
                _check_fits(self._names["encoder"], image, view, shape)
                features += encoder.run({encoder.inputs[0]: view}).values()
                _check_features(self._names["encoder"], features[-1], shape)
            for tensor, values, shape in zip(tokens, features, pair.shapes, strict=True):
                _check_fits(self._names["decoder"], tensor, values, shape)
            maps = decoder.run(dict(zip(decoder.inputs, features, strict=True)))
            for name in MAPS:
                _check_map(self._names["decoder"], name, maps[name], pair.shapes[int(name[-1]) - 1])
            named = {"features1": features[0], "features2": features[1], **maps}
            outputs.append({name: np.asarray(value)[0] for name, value in named.items()})
        return outputs

    def close(self) -> None:
        self._models.clear()


def _check_fits(file: str, taken: ir.Value, values: NDArray[Any], shape: tuple[int, int]) -> None:
    """Raise BadInput where a file fixes its input to other sizes than those of the values of an image of `shape`."""
    sizes = _dims(taken)
    if len(sizes) != values.ndim or any(isinstance(size, int) and size != found for size, found in zip(sizes, values.shape, strict=True)):
        from smc.compiler.stage_inputs import written

        height, width = shape
        raise BadInput(
            f"{file}: its input {taken.name} takes {written(sizes)}, and for an image of {width}x{height} it is given {values.shape}",
            fix="export both files with dynamic dimensions, or both for one image of one shape, and give that --shape",
        )


def _check_features(file: str, features: NDArray[Any], shape: tuple[int, int]) -> None:
    from smc.compiler.stage_inputs import feature_sizes

    layouts = [tuple(feature_sizes(rank, 1, shape)[:-1]) for rank in (4, 3)]
    if features.dtype != np.float32 or features.shape[:-1] not in layouts:
        height, width = shape
        wanted = " or ".join(f"({', '.join(map(str, sizes))}, channels)" for sizes in layouts)
        raise BadInput(
            f"{file}: its features of an image of {width}x{height} are {features.dtype} {features.shape}; float32 {wanted} was expected"
        )


def _check_map(file: str, name: str, value: Any, shape: tuple[int, int]) -> None:
    channels = {"pts3d": (3,), "conf": (), "desc_conf": (), "desc": None}[name[:-1]]
    fits = value.shape[1:] == (*shape, *channels) if channels is not None else value.ndim == 4 and value.shape[1:3] == shape
    if value.dtype != np.float32 or not fits:
        height, width = shape
        wanted = f"(1, {height}, {width}" + {"pts3d": ", 3", "desc": ", D"}.get(name[:-1], "") + ")"
        raise BadInput(f"{file}: its output {name} is {value.dtype} {value.shape}; float32 {wanted} was expected")


def _inputs(model: ir.Model) -> list[ir.Value]:
    """What a graph takes; older files list its weights among its inputs."""
    return [value for value in model.graph.inputs if value.name not in model.graph.initializers]


def _dims(value: ir.Value) -> list[Dim]:
    """The dimensions of a graph's input: none where it states no shape."""
    return [size if isinstance(size, int) else size.value for size in value.shape or ()]


def _complete(model: ir.Model) -> None:
    """Add what a checked graph leaves open about its inputs, and take away what it says of its outputs where that may not be so.

    Dimensions without a name get one by their place, and an image has three channels. What depends on dynamic dimensions is inferred:
    torch's older exporter states the shapes that the example's outputs had, unless `dynamic_axes` lists these as well.
    """
    import onnx_ir as ir

    from smc.passes.tensors import is_made_up

    inputs = _inputs(model)
    for view, value in enumerate(inputs, 1):
        sizes = _dims(value)
        if len(inputs) == 1:
            names = ["batch", "channels", "height", "width"]
            sizes[1] = 3
        else:
            names = ["batch", *([f"rows{view}", f"cols{view}"] if len(sizes) == 4 else [f"tokens{view}"]), "channels"]
        value.shape = ir.Shape([name if is_made_up(size or None) else size for size, name in zip(sizes, names, strict=True)])
    if any(not isinstance(size, int) for value in inputs for size in _dims(value)):
        for value in model.graph.outputs:
            value.shape = None


def _check_interface(path: Path, model: ir.Model, inputs: int, outputs: tuple[str, ...] | None) -> None:
    from smc.compiler.stage_inputs import written

    taken = _inputs(model)
    if len(taken) != inputs:
        names = ", ".join(str(value.name) for value in taken)
        wanted = "one image" if inputs == 1 else "the features of two images"
        raise BadInput(f"{path}: it takes {len(taken)} inputs ({names}), {wanted} was expected")
    for value in taken:
        if str(value.dtype) != "FLOAT":
            raise BadInput(f"{path}: its input {value.name} is {value.dtype}, float32 was expected")
        sizes = _dims(value)
        if inputs == 1:
            fits, layouts = len(sizes) == 4 and (sizes[1] == 3 or not isinstance(sizes[1], int)), "(batch, 3, height, width)"
        else:
            fits, layouts = len(sizes) in (3, 4), "(batch, rows, cols, channels) or (batch, rows * cols, channels)"
        if not fits:
            stated = "no shape" if value.shape is None else f"the shape {written(sizes)}"
            raise BadInput(f"{path}: its input {value.name} has {stated}, {layouts} was expected")
        if inputs == 1 and any(isinstance(size, int) and size % PATCH for size in sizes[2:]):
            raise BadInput(f"{path}: its input is {sizes[3]}x{sizes[2]}, multiples of {PATCH} were expected")
    made = [str(value.name) for value in model.graph.outputs]
    if outputs is None and len(made) != 1:
        raise BadInput(f"{path}: it returns {len(made)} outputs ({', '.join(made)}), the features alone were expected")
    if outputs is not None and set(made) != set(outputs):
        raise BadInput(f"{path}: its outputs are {', '.join(made)}; exactly {', '.join(outputs)} were expected")


def _digest(models: dict[str, ir.Model]) -> str:
    """A hash over both graphs and all their weights."""
    import onnx_ir as ir

    digest = hashlib.sha256()
    for model in models.values():
        digest.update(ir.to_proto(model).SerializeToString(deterministic=True))
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):  # the others are in the graph
                digest.update(value.const_value.numpy().reshape(-1).view(np.uint8).data)  # bfloat16 has no buffer of its own
    return digest.hexdigest()
