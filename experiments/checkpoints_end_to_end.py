"""Full-size checkpoints through the command line: is a planted permutation undone, in what time and memory?

    python -m experiments.checkpoints_end_to_end sd1   --folder runs/sd1     about 25 GB of disk
    python -m experiments.checkpoints_end_to_end sdxl  --folder runs/sdxl    about 35 GB
    python -m experiments.checkpoints_end_to_end sd1   --folder runs/small --width 40      seconds

Checkpoints of random weights are made by scripts/make_random_checkpoint.py: A; B, which is A with its neurons in a
random order; C, which is A with 2 % noise, as a fine-tune is. Each step is a process of its own, whose time and peak
of resident memory (pages of mapped files included) are measured by the kernel. Steps that are in results.json already
are not done again.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import torch
import typer

from rebasin.checkpoints import load_safetensors, open_checkpoint, save_checkpoint, write_text

P = ParamSpec("P")
T = TypeVar("T")

MAKE = [sys.executable, "scripts/make_random_checkpoint.py"]
PROVE = """
import sys
from rebasin.checkpoints import component_spec, open_checkpoint
checkpoint = open_checkpoint(sys.argv[1])
print({name: component_spec(checkpoint, name) for name in checkpoint.components})
"""
REBASIN = [sys.executable, "-m", "rebasin"]


def measured(command: list[str]) -> dict[str, Any]:
    """Run a command; seconds on the clock and of the processor, and the peak of its resident memory in bytes."""
    began = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    code = os.waitstatus_to_exitcode(status)
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}.")
    return {"seconds": seconds, "cpu": usage.ru_utime + usage.ru_stime, "peak": usage.ru_maxrss * 1024}


def apart(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call it in a process of its own: the memory of this one would count in the peak of those it starts."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def equal(a: Path, b: Path) -> dict[str, Any]:
    """How many tensors of two files are equal bit for bit, and the largest difference of the others."""
    ours, theirs = load_safetensors(a), load_safetensors(b)
    same, largest = 0, 0.0
    for name in ours:
        x, y = ours[name], theirs[name]
        if torch.equal(x, y):
            same += 1
        else:
            largest = max(largest, float((x.float() - y.float()).abs().max()))
    return {"tensors": len(ours), "equal": same, "largest difference": largest}


def loads_in_diffusers(file: Path, folder: Path) -> dict[str, Any]:
    """Load the parts of a single file by diffusers' own converter, with our configs, and compare with our reader."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import (
        create_diffusers_clip_model_from_ldm,
        load_single_file_checkpoint,
    )
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    from rebasin.checkpoints.architectures import component_config
    from rebasin.checkpoints.output import write_json

    checkpoint = open_checkpoint(file)
    for name in checkpoint.components:
        (folder / name).mkdir(parents=True, exist_ok=True)
        write_json(folder / name / "config.json", component_config(checkpoint, name))
    texts = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    found = {}
    for name in checkpoint.components:
        # Half precision in and out: nothing is to be rounded on the way.
        if name in texts:
            raw = load_single_file_checkpoint(str(file), local_files_only=True)
            model: Any = create_diffusers_clip_model_from_ldm(
                texts[name],
                raw,
                subfolder=name,
                config=str(folder),
                torch_dtype=torch.float16,
                local_files_only=True,
            )
            del raw
        else:
            kind: Any = AutoencoderKL if name == "vae" else UNet2DConditionModel
            model = kind.from_single_file(
                str(file),
                config=str(folder),
                subfolder=name,
                torch_dtype=torch.float16,
                local_files_only=True,
            )
        ours, same = checkpoint.component(name), 0
        own = {
            n if n.startswith("text_") or name not in texts else f"text_model.{n}": t
            for n, t in model.state_dict().items()
        }
        for n in ours:
            same += int(torch.equal(ours[n].half(), own[n]))
        found[name] = {"tensors": len(ours), "equal": same, "of the module": len(own)}
        del model, own
    return found


def main(
    family: Annotated[str, typer.Argument(help="sd1, sd2 or sdxl")],
    folder: Annotated[Path, typer.Option(help="where checkpoints and results.json are kept")],
    width: Annotated[int | None, typer.Option(help="channels of the first level; default: full size")] = None,
    threads: Annotated[int, typer.Option(help="of torch")] = 2,
    table: Annotated[bool, typer.Option("--table", help="only print what was measured, as a table")] = False,
    clean: Annotated[bool, typer.Option(help="remove each checkpoint as soon as it is not needed")] = True,
) -> None:
    """Make, align, merge, load; prints and keeps what was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    a, b, c = (folder / f"{name}.safetensors" for name in "abc")
    aligned, plain, merged = (folder / f"{name}.safetensors" for name in ("aligned", "plain", "merged"))
    narrow = ["--width", str(width)] if width else []
    own = ["--threads", str(threads)]
    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "make A": lambda: measured([*MAKE, "new", family, str(a), *narrow]),
        "make C, A with noise": lambda: measured([*MAKE, "noise", str(a), str(c)]),
        "trace and prove the specs": lambda: measured([sys.executable, "-c", PROVE, str(a)]),
        "merge A and C without aligning": lambda: measured(
            [*REBASIN, "merge", str(a), str(c), "-o", str(plain), "--no-align", "--overwrite", *own]
        ),
        "merge A and C aligned": lambda: measured(
            [*REBASIN, "merge", str(a), str(c), "-o", str(merged), "--overwrite", *own]
        ),
        "aligned merge is the plain one": lambda: apart(equal, merged, plain),
        "the merge in diffusers": lambda: apart(loads_in_diffusers, merged, folder / "configs"),
        "make B, A permuted": lambda: measured([*MAKE, "permute", str(a), str(b)]),
        "align B to A": lambda: measured(
            [*REBASIN, "align", str(a), str(b), "-o", str(aligned), "--overwrite", *own]
        ),
        "aligned B is A": lambda: apart(equal, aligned, a),
        "as a diffusers folder and back": lambda: apart(_around, a, folder),
    }
    done_with = {
        "as a diffusers folder and back": (a,),
        "aligned B is A": (b, aligned),
        "the merge in diffusers": (c, plain, merged),
    }
    results = folder / "results.json"
    if table:
        typer.echo(markdown(json.loads(results.read_text())))
        return
    found: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    for name, step in steps.items():
        if name not in found:
            found[name] = step()
            found["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
            write_text(results, json.dumps(found, indent=1) + "\n")
        typer.echo(f"{name}: {_told(found[name])}")
        for path in done_with.get(name, ()) if clean else ():
            path.unlink(missing_ok=True)


def _around(a: Path, folder: Path) -> dict[str, Any]:
    """A single file -> a diffusers folder -> a single file."""
    import shutil

    once, twice = folder / "as_folder", folder / "back.safetensors"
    shutil.rmtree(once, ignore_errors=True)
    save_checkpoint(once, open_checkpoint(a))
    save_checkpoint(twice, open_checkpoint(once))
    shutil.rmtree(once)
    ours, theirs = load_safetensors(a), load_safetensors(twice)
    result = {
        "tensors": len(ours),
        "equal": sum(n in theirs and torch.equal(ours[n], theirs[n]) for n in ours),
        "left out": [n for n in ours if n not in theirs],
    }
    twice.unlink()
    return result


def markdown(found: dict[str, Any]) -> str:
    """results.json as the table of docs/checkpoints.md."""
    lines = ["| step | seconds | of processor | peak memory |", "|---|---|---|---|"]
    facts = []
    for name, figures in found.items():
        if isinstance(figures, dict) and "peak" in figures:
            row = f"{figures['seconds']:.0f} | {figures['cpu']:.0f} | {figures['peak'] / 1e9:.2f} GB"
            lines.append(f"| {name} | {row} |")
        else:
            facts.append(f"{name}: {figures if isinstance(figures, str) else json.dumps(figures)}")
    return "\n".join([*lines, "", *facts])


def _told(figures: dict[str, Any]) -> str:
    if "peak" not in figures:
        return json.dumps(figures)
    return f"{figures['seconds']:.0f} s, {figures['cpu']:.0f} s of processor, {figures['peak'] / 1e9:.2f} GB"


if __name__ == "__main__":
    typer.run(main)
