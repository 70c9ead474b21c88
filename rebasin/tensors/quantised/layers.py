"""Which weights of a file are codes, in which format, and which tensors belong to them."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...errors import CheckpointError, shown
from ...files import SchemaError, conform, parse
from ...types import WRAPPER, State, dtype_of, shape_of
from .formats import FORMATS, SCALED, Format
from .grids import GRIDS

MARKS = r"(?:^|[./])(?:scaled_fp8|comfy_quant|scale_input|input_scale|scale_output|output_scale)$"
"""What tells a loader how to read, and to compute in 8 bits, and is of no use to the numbers."""

REFUSED = (
    r"(?:^|\.)(?:qweight|qzeros|g_idx|SCB|(?:nested_)?absmax|(?:nested_)?quant_map|weight_packed|weight_scale_2"
    r"|\w*scale_inv|(?:\w+_)?zero_points?|_packed_params|quant_state\b.*|_data|_scale)$"
)
"""What GPTQ, AWQ, bitsandbytes, quanto, torch and others leave beside their codes."""

HEADER = "_quantization_metadata"
"""The entry of a safetensors header that tells the formats of layers, as marks in tensors do."""

LONGEST_MARK = 1 << 16
"""Bytes of a mark; all that are known have less than 200."""


@dataclass(frozen=True)
class Layer:
    """A weight that a file has as codes.

    Attributes:
        format: how.
        parts: "codes", "scale" and, in nvfp4, "scale_2" -> the tensor's name.
        shape: of the weight, without paddings.
    """

    format: Format
    parts: Mapping[str, str]
    shape: tuple[int, ...]


def layers_of(state: State, where: object, metadata: Mapping[str, str]) -> dict[str, Layer]:
    """Weight -> how it is stored, for all that are codes; of tensors only the marks are read.

    Raises:
        CheckpointError: there are codes of another kind, or scales that do not fit; names the tensor and `where`.
    """
    told = _told(state, where, metadata)
    names, found = set(state), {}
    for name, scale in scaled(state):
        own = told.pop(name.removesuffix("weight").removesuffix("."), {})
        found[name] = _layer(state, names, where, name, scale, own)
    for layer, own in told.items():
        if f"{layer}.weight" not in names:
            continue
        # Plain numbers in 8 bits have no need of a scale, but in a file that has scales one was lost.
        plain = own.get("format", "").startswith("float8") and dtype_of(state, f"{layer}.weight") in GRIDS
        if found or not plain:
            raise CheckpointError(
                f"Tensor {shown(f'{layer}.weight')} of {where} has no scale that is known here, but is marked as"
                f" {shown(own.get('format'))}; take the file that this one was made from."
            )
    if found and any(re.search(r"(?:^|[./])scaled_fp8$", name) for name in names):
        _require_all_scaled(state, found, where)
    used = {part for layer in found.values() for part in layer.parts.values()}
    foreign = next((name for name in state if name not in used and re.search(REFUSED, name)), None)
    if foreign is not None:
        raise CheckpointError(
            f"{where} is quantised in a way that is not known here (it has {shown(foreign)}); take the file that it"
            " was made from."
        )
    return found


def _require_all_scaled(state: State, found: Container[str], where: object) -> None:
    """Raise `CheckpointError` for a matrix in 8 bits without a scale in a file that says that it is scaled."""
    for name in state:
        if name not in found and dtype_of(state, name) in GRIDS and len(shape_of(state, name)) > 1:
            raise CheckpointError(
                f"Tensor {shown(name)} of {where} has no scale, but the file is marked as scaled (scaled_fp8) and its"
                " other weights have one; take the file that this one was made from."
            )


def scaled(state: State, floats: bool = True) -> Iterator[tuple[str, str]]:
    """Each weight that has a scale, and the scale; `floats`: of a checkpoint, whose codes someone may have widened."""
    names = set(state)  # `in` may read the tensor of a mapping of the user's own
    for name in state if any(one.endswith(("scale", "scale_weight")) for one in names) else ():
        base, dtype = name.removesuffix("weight"), dtype_of(state, name)
        codes = dtype in GRIDS or (dtype == torch.uint8 and base != name)
        if codes or (floats and base != name):
            own = [
                f"{base}scale_weight",
                f"{name}_scale",
                *([f"{base}scale", f"{name}.scale"] if codes else ()),
            ]
            if found := next((scale for scale in own if scale in names), None):
                yield name, found


def require_numbers(state: State, where: object) -> None:
    """Raise `CheckpointError` if a state has codes with scales, which must not be averaged as they are."""
    if found := next(scaled(state, floats=False), None):
        raise CheckpointError(
            f"Tensor {shown(found[0])} of {where} is stored as codes with the scale {shown(found[1])}: multiply them"
            " first (rebasin.checkpoints.open_checkpoint does)."
        )


def _layer(
    state: State, names: Container[str], where: object, name: str, scale: str, told: Mapping[str, Any]
) -> Layer:
    parts = {"codes": name, "scale": scale}
    second = f"{name}_scale_2"
    if second in names:
        if told.get("format") != "nvfp4":
            raise CheckpointError(
                f"{where} is quantised in a way that is not known here (it has {shown(second)} without a mark that"
                " tells the format); take the file that it was made from."
            )
        parts["scale_2"] = second
    own = _format(told)
    shapes = {role: shape_of(state, part) for role, part in parts.items()}
    dtypes = {role: dtype_of(state, part) for role, part in parts.items()}
    whole = own.shape(shapes["codes"])
    shape = _unpadded(state, names, name, whole, told)
    lacks = told.get("format") == "nvfp4" and "scale_2" not in parts
    coded = dtypes["codes"].is_floating_point or dtypes["codes"] in GRIDS or told.get("format") == "nvfp4"
    if lacks or not coded or not own.fits(dtypes, shape, shapes):
        by = told.get("format", "rows")
        raise CheckpointError(
            f"The scale {shown(scale)} of {where} has shape {shapes['scale']}, which does not fit its weight's"
            f" {shapes['codes']} by {by}; take the file that this one was made from."
        )
    return Layer(own, parts, shape)


def _format(told: Mapping[str, Any]) -> Format:
    own = FORMATS.get(told.get("format", ""), SCALED)
    return replace(own, block=told["group_size"]) if own.tiled and told.get("group_size") else own


def _unpadded(
    state: State, names: Container[str], name: str, whole: tuple[int, ...], told: Mapping[str, Any]
) -> tuple[int, ...]:
    """The shape of a weight without paddings: as its mark tells it, or at least with the rows of its bias."""
    own = told.get("orig_shape")
    if own is not None:
        return tuple(own)
    bias = name.removesuffix("weight") + "bias"
    if told.get("format") in ("mxfp8", "nvfp4") and len(whole) == 2 and bias in names:
        return (shape_of(state, bias)[0], whole[1])
    return whole


def _told(state: State, where: object, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Layer -> what its mark says of it: "format" and others, from the header and from tensors."""
    found: dict[str, Any] = {}
    try:
        place = f"{HEADER} in the header"
        if HEADER in metadata:
            header = conform(Mapping[str, Any], parse(metadata[HEADER]))
            for layer, own in conform(Mapping[str, Any], header.get("layers", {})).items():
                found[WRAPPER.sub("", layer)] = _checked(own)
        for name in state:
            if re.search(r"(?:^|[./])comfy_quant$", name):
                place = shown(name)
                if (
                    dtype_of(state, name) != torch.uint8
                    or torch.Size(shape_of(state, name)).numel() > LONGEST_MARK
                ):
                    raise SchemaError("it is no text")
                own = _checked(parse(state[name].numpy().tobytes()))
                layer = name.removesuffix("comfy_quant").removesuffix(".")
                found[layer] = {**found.get(layer, {}), **own}
    except SchemaError as error:
        raise CheckpointError(
            f"{where} is damaged: the mark of its quantisation {place} is none ({error}); get it again."
        ) from error
    for layer, own in found.items():
        kind = own.get("format", "")
        kind = f"{kind} with convrot" if own.get("convrot") else kind
        if kind and kind not in FORMATS:
            raise CheckpointError(
                f"{where} is quantised in a way that is not known here ({shown(layer)} is marked as {shown(kind)});"
                " take the file that it was made from."
            )
    return found


def _checked(own: Any) -> dict[str, Any]:
    """A mark, with what some write one level deeper brought up.

    Raises:
        SchemaError: it is none.
    """
    told = dict(conform(Mapping[str, Any], own))
    told = {**conform(Mapping[str, Any], told.pop("params", None) or {}), **told}
    conform(str, told.get("format", ""))
    shape = conform(list[int], told.get("orig_shape") or [0])
    size = conform(int, told.get("group_size") or 0)
    if size < 0 or min(shape, default=0) < 0:
        raise SchemaError("its sizes are none")
    return told
