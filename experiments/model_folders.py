"""Whole merges of folders of transformers and diffusers: small models of many classes through the command.

    python -m experiments.model_folders                          # writes docs/model_folders.json and the page's table
    python -m experiments.model_folders --only LlamaForCausalLM

Two models of a class with random weights are saved as their library saves them, merged by `rebasin merge --maps` in a
process of its own, verified against B by `rebasin verify`, and the result is loaded by the library.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

Row = dict[str, Any]

CLASSES = (
    "transformers:GPT2LMHeadModel", "transformers:BertForMaskedLM", "transformers:ViTForImageClassification",
    "transformers:CLIPModel", "transformers:T5ForConditionalGeneration",
    "transformers:WhisperForConditionalGeneration", "transformers:LlamaForCausalLM",
    "transformers:MistralForCausalLM", "transformers:Qwen2ForCausalLM", "transformers:Qwen3ForCausalLM",
    "transformers:Gemma2ForCausalLM", "transformers:Phi3ForCausalLM", "transformers:MixtralForCausalLM",
    "diffusers:SD3Transformer2DModel", "diffusers:FluxTransformer2DModel", "diffusers:Flux2Transformer2DModel",
    "diffusers:QwenImageTransformer2DModel", "diffusers:ZImageTransformer2DModel", "diffusers:WanTransformer3DModel",
    "diffusers:PixArtTransformer2DModel", "diffusers:UNet2DModel", "diffusers:AutoencoderKLWan",
)  # fmt: skip

BEGIN, END = "<!-- made by python -m experiments.model_folders -->", "<!-- end -->"


def saved(library: str, name: str, seed: int, folder: Path) -> None:
    """A small model of this class with random weights, norms and biases included, as its library saves it."""
    import torch

    from .zoo_library import build

    torch.manual_seed(seed)
    model: Any = build(library, name, False)[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)


def command(*arguments: object) -> tuple[str, float, float]:
    """What `rebasin` says, its seconds, and the peak of its memory in bytes.

    Raises:
        RuntimeError: it failed; the message is its last line.
    """
    code = (
        "import resource, sys; sys.argv[0] = 'rebasin'\n"
        "from rebasin.cli import main\n"
        "try:\n    main()\nfinally:\n"
        "    print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, errors="replace"
    )
    text = done.stdout + done.stderr
    peak = re.search(r"PEAK (\d+)", text)
    if done.returncode:
        lines = [line for line in text.splitlines() if line.startswith("Error")] or text.strip().splitlines()
        raise RuntimeError(lines[-1][:200])
    return text, time.perf_counter() - began, float(peak[1]) * 1024 if peak else 0.0


def examine(library: str, name: str) -> Row:
    import importlib

    import torch

    from rebasin.checkpoints.provenance import read
    from rebasin.tensors import load_metadata

    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for seed, which in enumerate("ab"):
            saved(library, name, seed, root / which)
        text, seconds, memory = command("merge", root / "a", root / "b", "-o", root / "m", "--maps")
        command("align", root / "a", root / "b", "-o", root / "aligned", "--maps")
        verified, *_ = command("verify", root / "b", root / "aligned")
        file = next((root / "m").glob("*.safetensors"))
        (made,) = ((read(load_metadata(file)) or {})["alignment"] or {}).values()
        loaded = getattr(importlib.import_module(library), name).from_pretrained(root / "m")
        finite = all(bool(torch.isfinite(p).all()) for p in loaded.parameters())
        error = re.search(r"(\d\.\de[-+]\d+) relative", text) or re.search(r"(\d\.\de[-+]\d+)", verified)
        return {
            "class": name,
            "neurons": made["neurons"],
            "moved": made["moved"],
            "maps": made["maps"],
            "before": made["distance_before"],
            "after": made["distance_after"],
            "error": float(error[1]) if error else None,
            "loads": finite,
            "seconds": seconds,
            "memory": memory,
        }


def table(rows: list[Row]) -> list[str]:
    lines = [
        "| class (small, random weights) | neurons | moved | maps | distance of the weights | outputs of B"
        " | loads | seconds | memory |",
        "|---|--:|--:|--:|--:|--:|---|--:|--:|",
    ]
    for row in rows:
        if "fault" in row:
            lines.append(f"| {row['class']} | {row['fault']} | | | | | | | |")
            continue
        error = "-" if row["error"] is None else f"{row['error']:.0e}"
        lines.append(
            f"| {row['class']} | {row['neurons']:,} | {row['moved']:,} | {row['maps']} |"
            f" {row['before']:.4g} to {row['after']:.4g} | {error} | {'yes' if row['loads'] else '**no**'} |"
            f" {row['seconds']:.0f} | {row['memory'] / 1e9:.1f} GB |"
        )
    return lines


def main(only: Annotated[list[str] | None, typer.Option(help="a class; may be repeated")] = None) -> None:
    """Merge small folders of many classes; exits with 1 if one fails."""
    work = [one.split(":") for one in CLASSES if not only or one.split(":")[1] in only]
    rows: list[Row] = []
    for library, name in track(work, description="folders"):
        try:
            rows.append(examine(library, name))
        except Exception as error:
            rows.append({"class": name, "fault": f"{type(error).__name__}: {error}"[:300]})
    typer.echo("\n".join(table(rows)))
    if not only:
        page = Path("docs/model_folders.md")
        text = page.read_text(encoding="utf-8")
        made = "\n".join([BEGIN, "", *table(rows), "", END])
        page.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: made, text, flags=re.S), encoding="utf-8")
        page.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    typer.echo(f"{len(rows)} classes; this process took {peak:.1f} GB")
    if any("fault" in row or not row["loads"] for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
