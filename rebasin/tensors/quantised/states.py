"""States of numbers from files of codes, and back, one layer at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...types import (
    DerivedState,
    LazyTensor,
    Lost,
    State,
    dtype_of,
    is_finite,
    origin_of,
    passed,
    place_of,
    shape_of,
)
from .layers import HEADER, MARKS, Layer, layers_of


class DecodedState(DerivedState):
    """A state of numbers out of a file that has some of them as codes; `quantised` tells how."""

    quantised: Quantised


class EncodedState(DerivedState):
    """A state as a file has it. Tensors of a layer are made together: whoever asks in the order of `together` has each
    layer made once.
    """

    together: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Quantised:
    """How a file stores its weights.

    Attributes:
        file: its tensors as they are, in its order.
        layers: the weights that are codes.
        marks: names of the tensors that tell loaders about them.
        metadata: what its header says of that.
    """

    file: State
    layers: Mapping[str, Layer]
    marks: frozenset[str]
    metadata: Mapping[str, str]

    @property
    def codes(self) -> frozenset[str]:
        """The names of the weights that are codes."""
        return frozenset(self.layers)

    def kind(self, name: str) -> str:
        """What a weight that is codes is stored as, in a word."""
        layer = self.layers[name]
        dtype = str(dtype_of(self.file, name)).removeprefix("torch.")
        return layer.format.name or f"{dtype} with scales"

    def numbers(self, name: str) -> Tensor:
        """A weight that is codes, in float32."""
        layer = self.layers[name]
        return layer.format.dequantise(self.parts(name), layer.shape)

    def parts(self, name: str) -> dict[str, Tensor]:
        """The tensors of a weight that is codes."""
        return {role: self.file[part] for role, part in self.layers[name].parts.items()}

    def without(self, prefix: str) -> Quantised:
        """The same with names that lack this word before them."""

        def own(name: str) -> str:
            return name.removeprefix(prefix)

        layers = {
            own(name): Layer(one.format, {role: own(part) for role, part in one.parts.items()}, one.shape)
            for name, one in self.layers.items()
        }
        metadata = dict(self.metadata)
        if HEADER in metadata:
            told = json.loads(metadata[HEADER])
            told["layers"] = {own(name): value for name, value in told.get("layers", {}).items()}
            metadata[HEADER] = json.dumps(told)
        file = DerivedState({own(name): passed(self.file, name) for name in self.file})
        return Quantised(file, layers, frozenset(map(own, self.marks)), metadata)

    def encoded(self, state: State, where: object, lost: Lost | None = None) -> EncodedState:
        """`state`, which has the weights as numbers, as the file had them: in its order, with codes, scales and marks.

        A weight that has not changed has its codes and scales to the bit; else scales are found anew, but for tiles
        that have only moved. What the state lacks is left out with all that belongs to it; what it has besides comes
        last. `lost` is told what each weight that has changed was to be and what its codes are worth.

        Raises:
            CheckpointError: a weight has another shape, or, when it is asked for, values that are none.
        """
        owner = {part: name for name, layer in self.layers.items() for part in layer.parts.values()}
        last: dict[str, dict[str, Tensor]] = {}

        def made(name: str, part: str) -> Tensor:
            if name not in last:
                last.clear()
                last[name] = self._made(name, state, where, lost)
            return last[name][part]

        present = set(state)
        bases = {name.rpartition("weight")[0] for name in present if name.endswith("weight")}
        tensors: dict[str, LazyTensor] = {}
        for name in self.file:
            weight = owner.get(name)
            if weight is not None:
                if weight in present:
                    self._require_shape(weight, state, where)
                    shape, dtype = shape_of(self.file, name), dtype_of(self.file, name)
                    tensors[name] = LazyTensor(
                        shape, dtype, partial(made, weight, name), origin_of(state, weight)
                    )
            elif name in self.marks:
                base = re.sub(MARKS, "", name)
                if not base or f"{base}." in bases or any(one.startswith(base) for one in bases):
                    tensors[name] = passed(self.file, name)
            elif name in present:
                tensors[name] = passed(state, name)
        tensors |= {name: passed(state, name) for name in state if name not in tensors}
        encoded = EncodedState(tensors)
        order = {name: i for i, name in enumerate(tensors)}
        encoded.together = tuple(
            sorted(tensors, key=lambda name: (order[owner.get(name, name)], order[name]))
        )
        return encoded

    def _require_shape(self, name: str, state: State, where: object) -> None:
        if shape_of(state, name) != self.layers[name].shape:
            raise CheckpointError(
                f"Tensor {name!r} for {where} has shape {shape_of(state, name)}, but {self.layers[name].shape} where"
                " its format comes from."
            )

    def _made(self, name: str, state: State, where: object, lost: Lost | None) -> dict[str, Tensor]:
        layer, like = self.layers[name], self.parts(name)
        weight = state[name].detach().cpu().to(torch.float32)
        if not is_finite(weight):
            raise CheckpointError(
                f"Tensor {place_of(state, name, str(where))} has values that are infinite or no numbers, so {where} was"
                " not written."
            )
        same = torch.equal(weight, layer.format.dequantise(like, layer.shape))
        made = like if same else layer.format.quantise(weight, like)
        if lost is not None and not same:
            lost(name, weight, layer.format.dequantise(made, layer.shape))
        return {layer.parts[role]: tensor for role, tensor in made.items()}


def decoded(state: State, where: object, metadata: Mapping[str, str] | None = None) -> State:
    """`state` with its codes multiplied by their scales when they are read, in float32; itself if it has none.

    Args:
        metadata: of the file's header, which may tell formats; None: that of `state`, if it has one.

    Raises:
        CheckpointError: there are codes of another kind; names the tensor and the file, `where`.
    """
    header: Mapping[str, str] = getattr(state, "metadata", {}) if metadata is None else metadata
    layers = layers_of(state, where, header)
    marks = frozenset(name for name in state if re.search(MARKS, name))
    if not layers and not marks:
        return state
    told = {HEADER: header[HEADER]} if HEADER in header else {}
    quantised = Quantised(state, layers, marks, told)
    parts = {part for name, layer in layers.items() for part in layer.parts.values() if part != name}

    def lazy(name: str) -> LazyTensor:
        make = partial(quantised.numbers, name)
        return LazyTensor(layers[name].shape, torch.float32, make, origin_of(state, name))

    kept = [name for name in state if name not in marks and name not in parts]
    made = DecodedState({name: lazy(name) if name in layers else passed(state, name) for name in kept})
    made.quantised = quantised
    return made
