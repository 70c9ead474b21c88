"""Peak memory and time of merging two checkpoint files of full size, tensor by tensor.

    python -m experiments.benchmark_merge FOLDER                               # SDXL, fp16: 21 GB of disk while it runs
    python -m experiments.benchmark_merge FOLDER --family sd1 --methods slerp,ties_sum

The two files have a family's tensors, by shape, with noise; methods that need a base get the first file once more.
Every method runs in a process of its own, reads both files and writes the merge; `idle` only imports the same
packages. Peak memory is that process's largest resident set, which counts everything: Python, torch and buffers. The
files are removed at the end, unless --keep is given.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

METHODS = "idle,weighted_sum,add_difference,slerp,ties_sum,dropout"
NOISE = 1 << 22


class Noise(Mapping[str, Tensor]):
    """Tensors of given shapes, filled from one buffer of noise, at an offset that depends on name and seed."""

    def __init__(self, shapes: Mapping[str, Tensor], seed: int):
        self.shapes, self.seed = shapes, seed
        drawn = torch.randn(NOISE, generator=torch.Generator().manual_seed(seed))
        self.buffer = (0.02 * drawn).half().repeat(2)

    def shape_of(self, name: str) -> tuple[int, ...]:
        return self.shapes.shape_of(name)  # pyright: ignore[reportAttributeAccessIssue]

    def dtype_of(self, name: str) -> torch.dtype:
        return self.shapes.dtype_of(name)  # pyright: ignore[reportAttributeAccessIssue]

    def __getitem__(self, name: str) -> Tensor:
        shape, dtype = self.shape_of(name), self.dtype_of(name)
        if not dtype.is_floating_point:
            return torch.arange(torch.Size(shape).numel(), dtype=dtype).reshape(shape)
        start = zlib.crc32(f"{self.seed}:{name}".encode()) % NOISE
        count = torch.Size(shape).numel()
        block = self.buffer[start : start + NOISE]
        return block.repeat(-(-count // NOISE))[:count].reshape(shape).to(dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def make(folder: Path, family: str) -> list[Path]:
    """The two files."""
    from rebasin.checkpoints import save_safetensors
    from rebasin.checkpoints.random_weights import random_checkpoint

    shapes = random_checkpoint(family)
    return [save_safetensors(folder / f"{name}.safetensors", Noise(shapes, i)) for i, name in enumerate("ab")]


def work(folder: Path, method: str) -> dict[str, float]:
    """Merge the files of the folder in this process, and say what it took."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    from experiments.common import peak_memory
    from rebasin.checkpoints import load_safetensors, save_safetensors
    from rebasin.merging import METHODS, merge

    started, cpu = time.perf_counter(), time.process_time()
    out = folder / f"{method}.safetensors"
    if method != "idle":
        a, b = (load_safetensors(folder / f"{name}.safetensors") for name in "ab")
        base = load_safetensors(folder / "a.safetensors") if METHODS[method].needs_base else None
        save_safetensors(out, merge(method, [a, b], base=base))
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    size = out.stat().st_size if out.exists() else 0
    out.unlink(missing_ok=True)
    return {"seconds": seconds, "cpu_seconds": cpu, "peak": peak_memory(), "bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", default="sdxl", help="sd1, sd2, sdxl or sdxl_refiner")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        print(json.dumps(work(options.folder, options.work)))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    files = [options.folder / "a.safetensors", options.folder / "b.safetensors"]
    try:
        if not all(file.exists() for file in files):
            make(options.folder, options.family)
        print(f"two files of {options.family}, {files[0].stat().st_size / 1e9:.2f} GB each")
        print(f"{'method':24}{'peak memory':>12}{'seconds':>10}{'CPU seconds':>13}")
        for method in options.methods.split(","):
            module = "experiments.benchmark_merge"
            command = [sys.executable, "-m", module, str(options.folder), "--work", method]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            peak = f"{found['peak'] / 1e9:.2f} GB"
            print(f"{method:24}{peak:>12}{found['seconds']:>10.0f}{found['cpu_seconds']:>13.0f}", flush=True)
    finally:
        if not options.keep:
            for file in files:
                file.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
