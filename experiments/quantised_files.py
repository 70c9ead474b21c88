"""What files of codes and scales lose: when they are made, read, written unchanged, with neurons moved, and merged.

    python -m experiments.quantised_files                     # prints the table and writes docs/quantised.md
    python -m experiments.quantised_files --width 320 --out /tmp/full.md

The UNet is that of Stable Diffusion 1 with random weights and `--width` channels (320: its own). The matrices of its
transformers are stored in each format (GGUF: all large tensors), read, written unchanged, written with rows and
columns in another order, and merged half and half with a copy that has noise of a tenth.

Errors are the largest of all codes, in steps: the widest distance between neighbouring codes of the format, for the
scale that the number has in the file where it is. Half a step is what rounding can cost; where a tile has got another
scale, its old numbers lie between the codes of the new one. Q4_0's codes go from -8 to 7, so at one end it is a whole
step. Seconds are of reading all tensors, and of merging and writing them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.quantised_reference import FORMATS as MARKED
from experiments.quantised_reference import chosen, write_gguf
from rebasin.checkpoints import Checkpoint, open_checkpoint, save_checkpoint, save_safetensors
from rebasin.checkpoints.random_weights import noisy, random_checkpoint
from rebasin.merging import merge
from rebasin.tensors.quantised import FORMATS
from rebasin.tensors.quantised.tiles import Tile, largest, spread
from rebasin.types import DerivedState, LazyTensor, State, passed

HEADER = "_quantization_metadata"

BLOCK = 64


class Kind(NamedTuple):
    """A format: what it is called in the table, the tile of a matrix of given shape, and the widest step in a tile as a
    share of the tile's largest number."""

    title: str
    tile: Callable[[tuple[int, int]], Tile]
    step: float


def of_all(shape: tuple[int, int]) -> Tile:
    return Tile(*shape)


def of_rows(shape: tuple[int, int]) -> Tile:
    return Tile(1, shape[1])


def blocks(rows: int, columns: int) -> Callable[[tuple[int, int]], Tile]:
    return lambda shape: Tile(rows, columns)


E4M3, E5M2, INT8 = 32 / 448, 8192 / 57344, 1 / 127

KINDS = {
    "fp8": Kind("fp8 e4m3, a scale for all", of_all, E4M3),
    "fp8_e5m2": Kind("fp8 e5m2, a scale for all", of_all, E5M2),
    "fp8_rows": Kind("fp8 e4m3, a scale for each row", of_rows, E4M3),
    "fp8_blocks": Kind(f"fp8 e4m3, squares of {BLOCK}", blocks(BLOCK, BLOCK), E4M3),
    "int8": Kind("int8, a scale for all", of_all, INT8),
    "int8_rows": Kind("int8, a scale for each row", of_rows, INT8),
    "int8_blocks": Kind(f"int8, squares of {BLOCK}", blocks(BLOCK, BLOCK), INT8),
    "mxfp8": Kind("mxfp8", blocks(1, 32), 32 / 256),
    "nvfp4": Kind("nvfp4", blocks(1, 16), 2 / 6),
    "Q8_0": Kind("GGUF Q8_0", blocks(1, 32), 1 / 127),
    "Q5_1": Kind("GGUF Q5_1", blocks(1, 32), 2 / 31),
    "Q4_0": Kind("GGUF Q4_0", blocks(1, 32), 1 / 8),
}


def template(shape: tuple[int, int], kind: str) -> dict[str, Tensor]:
    """Parts of the right shapes and types, all zero."""
    rows, columns = shape
    if kind in ("mxfp8", "nvfp4"):
        size = pad = 32 if kind == "mxfp8" else 16
        rows, columns = -(-rows // pad) * pad, -(-columns // pad) * pad
        high, wide = -(-rows // 128) * 128, -(-(columns // size) // 4) * 4
        if kind == "mxfp8":
            scale = torch.zeros(high, wide, dtype=torch.uint8)
            return {"codes": torch.zeros(rows, columns).to(torch.float8_e4m3fn), "scale": scale}
        scale = torch.zeros(high, wide).to(torch.float8_e4m3fn)
        codes = torch.zeros(rows, columns // 2, dtype=torch.uint8)
        return {"codes": codes, "scale": scale, "scale_2": torch.zeros(())}
    dtype = torch.int8 if "int8" in kind else torch.float8_e5m2 if "e5m2" in kind else torch.float8_e4m3fn
    count = KINDS[kind].tile(shape).count(*shape)
    scale = torch.ones(count if "rows" in kind or "blocks" in kind else ())
    return {"codes": torch.zeros(shape).to(dtype), "scale": scale}


def write(path: Path, state: State, kind: str) -> None:
    """A file in this format."""
    if path.suffix == ".gguf":
        write_gguf(path, dict(state), kind)
        return
    tensors, layers = {}, {}
    own = FORMATS[MARKED[kind]]
    own = replace(own, block=BLOCK) if own.tiled else own
    for name in state:
        tensor = state[name]
        if not chosen(name, tuple(tensor.shape)):
            tensors[name] = tensor
            continue
        rows, columns = tensor.shape
        parts = own.quantise(tensor.float(), template((rows, columns), kind))
        tensors[name] = parts["codes"]
        tensors |= {f"{name}_{role}": part for role, part in parts.items() if role != "codes"}
        mark: dict[str, object] = {"format": MARKED[kind], "orig_shape": [rows, columns]}
        layers[name.removesuffix(".weight")] = mark | ({"group_size": BLOCK} if "blocks" in kind else {})
    save_safetensors(path, tensors, {HEADER: json.dumps({"format_version": "1.0", "layers": layers})})


def steps(kind: Kind, own: Tensor, reference: Tensor, gguf: bool) -> float:
    """The largest distance of two tensors, in steps of the first."""
    rows = own.reshape(-1, 32) if gguf else own
    tile = kind.tile((rows.shape[0], rows.shape[1]))
    size = spread(largest(rows, tile) * kind.step, tile, *rows.shape)
    return float(((rows - reference.reshape(rows.shape)).abs() / size.clamp(min=1e-30)).max())


def measure(kind: str, width: int, folder: Path) -> dict[str, float]:
    own, gguf = KINDS[kind], kind[0] == "Q"
    whole = random_checkpoint("sd1", width)
    original = DerivedState({n: passed(whole, n) for n in whole if n.startswith("model.diffusion_model.")})
    path = folder / f"a.{'gguf' if gguf else 'safetensors'}"
    write(path, original, kind)
    checkpoint = open_checkpoint(path)
    assert checkpoint.quantised is not None
    prefix = "model.diffusion_model." if gguf else ""
    codes = sorted(checkpoint.quantised.codes)
    began = perf_counter()
    for name in checkpoint.raw:
        checkpoint.raw[name]
    found = {"bytes": path.stat().st_size, "read seconds": perf_counter() - began}

    def worst(state: State, wanted: Callable[[str], Tensor]) -> float:
        return max(steps(own, state[n], wanted(n), gguf) for n in codes)

    found["made"] = worst(checkpoint.raw, lambda n: original[prefix + n].float())
    again = open_checkpoint(save_checkpoint(folder / f"b{path.suffix}", checkpoint).path)
    found["unchanged"] = worst(again.raw, lambda n: checkpoint.raw[n])
    for axis, name in ((0, "rows"), (1, "columns")):
        moved = reordered(checkpoint, codes, axis)
        saved = save_checkpoint(folder / f"c{path.suffix}", checkpoint, moved)
        found[name] = worst(open_checkpoint(saved.path).raw, lambda n, moved=moved: moved[n])
    other = noisy(original, 0.1, 1)
    plain = open_checkpoint(save_safetensors(folder / "plain.safetensors", other))
    merged = merge("weighted_sum", [checkpoint.component("unet"), plain.component("unet")], weights=0.5)
    began = perf_counter()
    saved = save_checkpoint(folder / f"d{path.suffix}", checkpoint, checkpoint.restore({"unet": merged}))
    found["write seconds"] = perf_counter() - began
    result = open_checkpoint(saved.path).raw
    found["merged"] = worst(result, lambda n: (checkpoint.raw[n] + other[prefix + n].float()) / 2)
    return found


def reordered(checkpoint: Checkpoint, codes: list[str], axis: int) -> State:
    """The model with the rows or columns of all that is codes in another order."""

    def lazy(name: str) -> LazyTensor:
        shape = checkpoint.raw[name].shape
        order = torch.randperm(shape[axis], generator=torch.Generator().manual_seed(len(name)))
        return LazyTensor(tuple(shape), torch.float32, lambda: checkpoint.raw[name].index_select(axis, order))

    known = set(codes)
    return DerivedState({n: lazy(n) if n in known else passed(checkpoint.raw, n) for n in checkpoint.raw})


COLUMNS = ("made", "unchanged", "rows", "columns", "merged")


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    lines = [
        "| format | MB | made | unchanged | rows moved | columns moved | merged | seconds to read | to merge, write |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for kind, own in found.items():
        errors = " | ".join("0" if own[name] == 0 else f"{own[name]:.2f}" for name in COLUMNS)
        seconds = f"{own['read seconds']:.2f} | {own['write seconds']:.2f}"
        lines.append(f"| {KINDS[kind].title} | {own['bytes'] / 1e6:.1f} | {errors} | {seconds} |")
    return "\n".join(lines)


PAGE = """# What files of codes and scales lose

{what}

{table}

Made by `python -m experiments.quantised_files --width {width}` on one thread.
[The formats](checkpoints.md#codes-and-scales).
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--width", type=int, default=64, help="channels of the first level; 320: Stable Diffusion 1's own"
    )
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--out", type=Path, default=Path("docs/quantised.md"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for kind in given.kinds:
        with tempfile.TemporaryDirectory() as folder:
            found[kind] = measure(kind, given.width, Path(folder))
        print(table({kind: found[kind]}).splitlines()[-1], flush=True)
    what = (
        (__doc__ or "").split("\n\n", 2)[2].strip().replace("`--width` channels", f"{given.width} channels")
    )
    given.out.write_text(PAGE.format(what=what, table=table(found), width=given.width))
    print(f"\n{table(found)}\n\n{given.out}")


if __name__ == "__main__":
    main()
