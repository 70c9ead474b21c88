"""Aligning two SDXL checkpoints of full size, against the method `rebasin` of the PyPI package sd-mecha.

    python -m venv peer && peer/bin/pip install sd-mecha
    python -m experiments.benchmark_sd_mecha --peer peer/bin/python --folder runs/mecha      about 30 GB of disk

B is A (random fp16 weights) with its neurons in a random order, by a permutation that changes no output. Both bring
B to A, each in a process of its own, with as many threads. Told are seconds, those of the processor, the peak of
resident memory, how far B is from A before and after (relative to |A|, over the UNet and the text encoders), how many
of its tensors became A's bit for bit, and whether the aligned B still computes what B does (`rebasin verify`). Steps
that are in results.json already are not done again.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from experiments.checkpoints_end_to_end import MAKE, REBASIN, measured
from rebasin.checkpoints import load_safetensors, open_checkpoint, write_text

PEER = """
import sys, torch, sd_mecha
b, a, output, threads, sweeps = sys.argv[1:]
torch.set_num_threads(int(threads))
recipe = sd_mecha.rebasin(sd_mecha.model(b), sd_mecha.model(a), iters=int(sweeps))
sd_mecha.merge(recipe, output=output, merge_device="cpu", merge_dtype=torch.float32, output_dtype=torch.float16,
               threads=int(threads), strict_mandatory_keys=False)
"""
MATCHED = ("unet", "text_encoder", "text_encoder_2")


def nearness(file: Path, a: Path) -> dict[str, Any]:
    """How far the aligned components of `file` are from those of `a`, and how many of their tensors are equal."""
    ours, theirs = open_checkpoint(file), open_checkpoint(a)
    squares, norms, same, count = [], [], 0, 0
    for part in MATCHED:
        x, y = ours.component(part), theirs.component(part)
        for name in y:
            one, other = x[name].float(), y[name].float()
            same, count = same + int(torch.equal(one, other)), count + 1
            squares.append(float((one - other).square().sum()))
            norms.append(float(other.square().sum()))
    return {"distance": math.sqrt(math.fsum(squares) / math.fsum(norms)), "equal": same, "tensors": count}


def preserved(b: Path, aligned: Path, threads: int) -> dict[str, Any]:
    """What `rebasin verify` says of B before and after."""
    command = [*REBASIN, "verify", str(b), str(aligned), "--threads", str(threads)]
    found = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"}
    )
    if found.returncode not in (0, 1):
        raise SystemExit(found.stderr)
    says = re.search(r"Do they compute the same\?.*", found.stdout)
    return {"same function": found.returncode == 0, "says": says.group(0) if says else found.stdout[-300:]}


def main(
    peer: Annotated[Path, typer.Option(help="the Python of an environment that has sd-mecha")],
    folder: Annotated[Path, typer.Option(help="where checkpoints and results.json are kept")],
    threads: Annotated[int, typer.Option(help="of both")] = 2,
    sweeps: Annotated[int, typer.Option(help="of the peer at most; its own default is 10")] = 10,
    clean: Annotated[bool, typer.Option(help="remove the checkpoints in the end")] = True,
) -> None:
    """Make the pair, align it both ways, compare."""
    folder.mkdir(parents=True, exist_ok=True)
    a, b, theirs, ours = (folder / f"{name}.safetensors" for name in ("a", "b", "peer", "ours"))
    parts = [word for part in MATCHED for word in ("--component", part)]
    results = folder / "results.json"
    found: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    run_peer = [str(peer), "-c", PEER, str(b), str(a), str(theirs), str(threads), str(sweeps)]
    run_ours = [
        *REBASIN,
        "align",
        str(a),
        str(b),
        "-o",
        str(ours),
        "--overwrite",
        "--threads",
        str(threads),
        "--no-check",
    ]
    steps = {
        "make A": lambda: measured([*MAKE, "new", "sdxl", str(a)]),
        "make B": lambda: measured([*MAKE, "permute", str(a), str(b), *parts]),
        "before": lambda: nearness(b, a),
        "sd-mecha": lambda: measured(run_peer),
        "sd-mecha, result": lambda: nearness(theirs, a),
        "sd-mecha, function": lambda: preserved(b, _filled(theirs, b), threads),
        "ours": lambda: measured(run_ours),
        "ours, result": lambda: nearness(ours, a),
        "ours, function": lambda: preserved(b, ours, threads),
    }
    for name, step in steps.items():
        if name not in found:
            found[name] = step()
            write_text(results, json.dumps(found, indent=1) + "\n")
        typer.echo(f"{name}: {json.dumps(found[name])}")
    for path in (a, b, theirs, ours) if clean else ():
        path.unlink(missing_ok=True)


def _filled(file: Path, source: Path) -> Path:
    """Say so if the peer left tensors out; its file can't be compared as a whole then."""
    missing = set(load_safetensors(source)) - set(load_safetensors(file))
    if missing:
        raise SystemExit(f"{file} lacks {len(missing)} tensors of {source}, such as {min(missing)}.")
    return file


if __name__ == "__main__":
    sys.exit(typer.run(main))
