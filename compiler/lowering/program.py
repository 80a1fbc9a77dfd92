"""From calls to a launch program: places for buffers, and launches by the tuned tiles."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from smc.compiler.launch_program import ALIGNMENT, KernelTable, Place, itemsize
from smc.compiler.lowering.arena import Arena, pack
from smc.compiler.lowering.context import Call
from smc.compiler.lowering.lanes import assign
from smc.compiler.lowering.lower import Lowered
from smc.compiler.lowering.parts import DESCRIPTORS, parts
from smc.compiler.lowering.views import Buffer, View
from smc.compiler.lowering.weight_file import WeightFile
from smc.compiler.operations import default_tile, launches, workspace
from smc.compiler.tuning import Tuning
from smc.exported.engines.cuda_program import Program, Region, Step
from smc.plugins.compile import fits, shared_memory_limit
from smc.plugins.launch import Launch
from smc.plugins.matching import launches as matching
from smc.plugins.matching.specification import Matching


class ProgramWriter:
    """Makes the programs of one plan, with the kernels and weights that they share."""

    def __init__(self, table: KernelTable, weights: WeightFile, tuning: Tuning) -> None:
        self._table, self._weights, self._tuning = table, weights, tuning

    def write(self, stage: str, lowered: Lowered, like: Program | None = None) -> Program:
        """The program of a lowered graph. Its outputs lie where `like`, a program of the same graph, has them.

        Raises:
            ValueError: a kernel does not compile.
            OSError: the weights cannot be written.
        """
        made = [(call, launched) for call, launched in self._cut(lowered.calls) if launched]  # none for what is empty
        calls = [call for call, _ in made]
        slots = assign(calls)
        kept = dict.fromkeys(view.buffer for view in (*lowered.inputs.values(), *lowered.outputs.values()))  # in order, as no set is
        arena = pack(calls, slots, kept, _starts(lowered.outputs, like.outputs) if like else {})
        steps: list[Step] = []
        last_step: list[int] = []  # of each call
        for (call, launched), slot, part in zip(made, slots, parts(calls, lowered.outputs), strict=True):
            places = {name: self._place(buffer, arena) for name, buffer in call.operands.items()}
            for i, launch in enumerate(launched):
                waits = tuple(last_step[other] for other in slot.waits) if i == 0 else ()
                label = f"{type(call.operation).__name__} {call.label}"
                steps.append(self._table.step(launch, places, label, slot.lane, waits, part))
            last_step.append(len(steps) - 1)
        inputs, outputs = ({name: _region(view, arena) for name, view in views.items()} for views in (lowered.inputs, lowered.outputs))
        return Program(stage, inputs, outputs, arena.size, tuple(steps))

    def _cut(self, calls: Sequence[Call]) -> list[tuple[Call, list[Launch]]]:
        """Each call, with the memory that its launches take besides, and the launches, as `_choose` has them."""
        chosen = self._choose([(call.operation, f"{type(call.operation).__name__} {call.label}") for call in calls])
        return [(_with_workspace(call, tile), launched) for call, (tile, launched) in zip(calls, chosen, strict=True)]

    def _choose(self, operations: Sequence[tuple[Any, str]]) -> list[tuple[Any, list[Launch]]]:
        """The tile of each operation, given with its label, and the launches, whose kernels are compiled and fit the GPU.

        The tile of an operation that was timed may not go with one that is only similar: that gets the default one.

        Raises:
            ValueError: a kernel does not compile, or does not fit.
        """
        sm = self._tuning.sm
        ways = [(tile, _launches_or_none(operation, tile, sm)) for operation, _ in operations for tile in [self._tuning.tile(operation)]]
        self._compile(launched for _, launched in ways if launched)
        chosen: list[tuple[Any, list[Launch]]] = []
        for (operation, _), (tile, launched) in zip(operations, ways, strict=True):
            if launched is None or not self._runs(launched):
                tile = default_tile(operation, sm)
                launched = launches(operation, tile, sm)
            chosen.append((tile, launched))
        self._compile(launched for _, launched in chosen)
        for (_, label), (_, launched) in zip(operations, chosen, strict=True):
            self._check_fit(launched, label)
        return chosen

    def _check_fit(self, launched: Sequence[Launch], label: str) -> None:
        """Raise ValueError for a kernel that the GPU has too little shared memory for."""
        for launch in launched:
            needed, limit = self._table.compiled(launch.kernel).shared_memory, shared_memory_limit(self._tuning.sm)
            if needed > limit:
                raise ValueError(f"{label} takes {needed:,} bytes of shared memory a block, and the GPU has {limit:,}")

    def _compile(self, launched: Iterable[Sequence[Launch]]) -> None:
        self._table.compile([launch.kernel for group in launched for launch in group])

    def _runs(self, launched: Sequence[Launch]) -> bool:
        try:
            return all(fits(self._table.compiled(launch.kernel), self._tuning.sm) for launch in launched)
        except ValueError:
            return False

    def write_matcher(self, decoder: Program) -> Program:
        """The matching of the maps that a decoder for one pair leaves in its arena; its own memory lies behind the decoder's.

        Raises:
            ValueError: the maps are too large for it, or a kernel does not compile.
        """
        places = {name: decoder.outputs[output] for name, output in zip(("desc1", "desc2", "conf1", "conf2"), DESCRIPTORS, strict=True)}
        shape1, shape2 = (places[name].shape[1:] for name in ("desc1", "desc2"))
        operation = Matching((shape1[0], shape1[1]), (shape2[0], shape2[1]), shape1[2])
        ((tile, launched),) = self._choose([(operation, "matching")])
        regions = {name: Region("arena", place.offset, place.dtype, place.shape[1:]) for name, place in places.items()}
        end = decoder.arena_bytes
        for name, (dtype, shape) in (matching.operand_shapes(operation) | workspace(operation, tile)).items():
            if name not in regions:
                regions[name] = Region("arena", end, dtype, shape)
                end += -(-math.prod(shape) * itemsize(dtype) // ALIGNMENT) * ALIGNMENT
        where: dict[str, Place] = {name: ("arena", region.offset) for name, region in regions.items()}
        steps = tuple(self._table.step(launch, where, f"Matching {launch.kernel.function.rpartition(':')[2]}") for launch in launched)
        inputs, outputs = ({name: regions[name] for name in names} for names in (matching.INPUTS, matching.OUTPUTS))
        return Program("matcher", inputs, outputs, end, steps)

    def _place(self, buffer: Buffer, arena: Arena) -> Place:
        if buffer.values is not None:
            return "weights", self._weights.add(buffer)
        return "arena", arena.offsets[buffer]


def _launches_or_none(operation: Any, tile: Any, sm: int) -> list[Launch] | None:
    try:
        return launches(operation, tile, sm)
    except ValueError:
        return None


def _with_workspace(call: Call, tile: Any) -> Call:
    extra = {
        name: Buffer(f"{call.label}/{name}", dtype, math.prod(shape)) for name, (dtype, shape) in workspace(call.operation, tile).items()
    }
    return replace(call, operands={**call.operands, **extra})


def _starts(views: Mapping[str, View], regions: Mapping[str, Region]) -> dict[Buffer, int]:
    """Where the views' buffers start, in bytes, if they lie in these regions."""
    return {view.buffer: regions[name].offset - view.offset * itemsize(view.dtype) for name, view in views.items()}


def _region(view: View, arena: Arena) -> Region:
    return Region("arena", arena.offsets[view.buffer] + view.offset * itemsize(view.dtype), view.dtype, view.shape)
