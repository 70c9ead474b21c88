"""Quantised files as ComfyUI and its converters write them, from plain weights: an answer to compare others with.

Written after the formats' descriptions alone (docs/checkpoints.md), one tile after the other, and shares nothing with
rebasin/tensors/quantised: what that reads and writes is checked against this.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import ceil
from pathlib import Path

import torch
from torch import Tensor

KINDS = (
    "fp8_old", "fp8", "fp8_e5m2", "fp8_rows", "fp8_blocks", "int8", "int8_rows", "int8_blocks", "mxfp8", "nvfp4",
)  # fmt: skip
"""`_old`: scale_weight and scaled_fp8, else weight_scale and marks; _rows, _blocks: a scale for each, else for all."""

BLOCK = 8
"""Rows and columns of a block of fp8_blocks and int8_blocks; real files have 64 or 128."""

FORMATS = {
    "fp8": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2", "fp8_rows": "float8_e4m3fn_rowwise",
    "fp8_blocks": "float8_e4m3fn_blockwise", "int8": "int8_tensorwise", "int8_rows": "int8_tensorwise",
    "int8_blocks": "int8_blockwise", "mxfp8": "mxfp8", "nvfp4": "nvfp4",
}  # fmt: skip

FOUR_BITS = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def chosen(name: str, shape: tuple[int, ...]) -> bool:
    """Whether converters quantise a tensor: the matrices of a UNet's transformer blocks."""
    return ".transformer_blocks." in name and name.endswith("weight") and len(shape) == 2


def as_file(
    state: Mapping[str, Tensor], kind: str, choose: Callable[[str, tuple[int, ...]], bool] = chosen
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Tensor]]:
    """The tensors of a file, its header, and the numbers that the codes stand for."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Tensor] = {}
    layers: dict[str, object] = {}
    if kind == "fp8_old":
        tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    for name, tensor in state.items():
        if not choose(name, tuple(tensor.shape)):
            tensors[name] = tensor
            continue
        own, numbers[name] = quantise(tensor.float(), kind)
        layer = name.removesuffix(".weight")
        tensors[name] = own.pop("")
        if kind == "fp8_old":
            tensors |= {f"{layer}.scale_weight": own["_scale"], f"{layer}.scale_input": torch.tensor(0.5)}
            continue
        tensors |= {f"{name}{ending}": part for ending, part in own.items()}
        mark: dict[str, object] = {"format": FORMATS[kind]}
        if kind.endswith("blocks"):
            mark["group_size"] = BLOCK
        if kind in ("mxfp8", "nvfp4"):
            layers[layer] = {**mark, "orig_shape": list(tensor.shape)}
        else:
            tensors[f"{layer}.input_scale"] = torch.tensor(0.5)
            tensors[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(mark).encode()), dtype=torch.uint8)
    header = (
        {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})} if layers else {}
    )
    return tensors, header, numbers


def quantise(weight: Tensor, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    """The parts of a matrix by what their names end in, and the numbers that these are."""
    if kind in ("mxfp8", "nvfp4"):
        return in_blocks(weight, kind)
    dtype = (
        torch.int8
        if kind.startswith("int8")
        else torch.float8_e5m2
        if "e5m2" in kind
        else torch.float8_e4m3fn
    )
    most = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    rows, columns = weight.shape
    high, wide = (BLOCK, BLOCK) if "blocks" in kind else (1, columns) if "rows" in kind else (rows, columns)
    scale = torch.empty(ceil(rows / high), ceil(columns / wide))
    codes, numbers = torch.empty_like(weight).to(dtype), torch.empty_like(weight)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            place = slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide)
            by = weight[place].abs().max() / most
            scale[i, j] = by
            own = (weight[place] / by).clamp(-most, most)
            codes[place] = (own.round() if dtype == torch.int8 else own).to(dtype)
            numbers[place] = codes[place].float() * by
    return {"": codes, "_scale": scale if scale.numel() > 1 else scale.reshape(())}, numbers


def in_blocks(weight: Tensor, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    size, pad = (32, 32) if kind == "mxfp8" else (16, 16)
    rows, columns = (ceil(n / pad) * pad for n in weight.shape)
    whole = torch.zeros(rows, columns)
    whole[: weight.shape[0], : weight.shape[1]] = weight
    high, wide = ceil(rows / 128) * 128, ceil(columns / size / 4) * 4
    dtype = torch.uint8 if kind == "mxfp8" else torch.float8_e4m3fn
    stored = torch.zeros(high * wide, dtype=dtype)
    numbers = torch.zeros_like(whole)
    of_all = whole.abs().max() / (448 * 6)
    nibbles = torch.zeros(rows, columns, dtype=torch.uint8)
    for i in range(rows):
        for j in range(columns // size):
            own = whole[i, j * size : (j + 1) * size]
            place = ((i // 128) * (wide // 4) + j // 4) * 512 + (i % 32) * 16 + (i % 128) // 32 * 4 + j % 4
            most = float(own.abs().max())
            if most == 0:
                continue
            if kind == "mxfp8":
                exponent = next(e for e in range(-126, 127) if most / 448 <= 2.0**e)
                stored[place] = exponent + 127
                numbers[i, j * size : (j + 1) * size] = (own / 2.0**exponent).to(
                    torch.float8_e4m3fn
                ).float() * 2.0**exponent
                continue
            stored[place] = (own.abs().max() / 6 / of_all).clamp(max=448).to(torch.float8_e4m3fn)
            by = stored[place].float() * of_all
            table = torch.tensor(FOUR_BITS)
            nearest = ((own / by).abs()[:, None] - table).abs().argmin(1)
            nibbles[i, j * size : (j + 1) * size] = nearest.to(torch.uint8) | ((own < 0).to(torch.uint8) << 3)
            numbers[i, j * size : (j + 1) * size] = table[nearest] * own.sign() * by
    scale = stored.reshape(high, wide)
    cut = numbers[: weight.shape[0], : weight.shape[1]].contiguous()
    if kind == "nvfp4":
        return {"": nibbles[:, ::2] << 4 | nibbles[:, 1::2], "_scale": scale, "_scale_2": of_all}, cut
    exponents = torch.zeros(rows, columns // size)
    for i in range(rows):
        for j in range(columns // size):
            place = ((i // 128) * (wide // 4) + j // 4) * 512 + (i % 32) * 16 + (i % 128) // 32 * 4 + j % 4
            exponents[i, j] = float(stored[place]) - 127
    codes = whole / torch.exp2(exponents).repeat_interleave(size, 1)
    return {"": codes.to(torch.float8_e4m3fn), "_scale": scale}, cut


def write_gguf(path: Path, state: Mapping[str, Tensor], kind: str, arch: str = "sd1") -> dict[str, Tensor]:
    """A GGUF file of a UNet as ComfyUI-GGUF's converter writes it; the numbers that it holds.

    Vectors and small tensors are float32, matrices whose rows are no multiple of 256 lie as rows of 256 if they can,
    and what the type can't hold is float16.
    """
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    numbers = {}
    for name, tensor in state.items():
        own, data = name.removeprefix("model.diffusion_model."), tensor.float().numpy()
        wanted = "F32" if tensor.dim() < 2 or tensor.numel() <= 1024 else kind
        if (
            tensor.dim() > 1
            and tensor.numel() >= 512
            and tensor.numel() % 256 == 0
            and tensor.shape[-1] % 256
        ):
            writer.add_array(f"comfy.gguf.orig_shape.{own}", [int(n) for n in tensor.shape])
            data = data.reshape(-1, 256)
        number = gguf.GGMLQuantizationType[wanted]
        if data.shape[-1] % gguf.GGML_QUANT_SIZES[number][0]:
            number = gguf.GGMLQuantizationType.F16
        packed = gguf.quants.quantize(data, number)
        numbers[own] = torch.from_numpy(gguf.quants.dequantize(packed, number)).reshape(tensor.shape)
        writer.add_tensor(own, packed, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return numbers
