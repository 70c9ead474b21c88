"""Does all of it run on this GPU, how fast, in how much memory? One command, some minutes, nothing from the network.

    python -m experiments.check_gpu --out DIR                          # on the GPU, if there is one
    python -m experiments.check_gpu --out DIR --device cpu --tiny      # less than a minute: does the check itself work?
    python -m experiments.check_gpu --out DIR --data cifar10.npz       # with CIFAR-10 instead of synthetic images
    python -m experiments.check_gpu --out DIR --only sdxl --only ste
    python -m experiments.check_gpu --out DIR --only width --data cifar10.npz    # ResNet20 on CIFAR-10, widths 1 to 32

Small models are computed beside the CPU, which must agree; SDXL's and SD 1.5's UNets have random weights. A part that
fails does not end the others. After each, check_gpu.json and check_gpu.md in DIR have what is known so far: device,
versions, commit, and for each part seconds, peak memory and figures. A part during which nothing was in a CUDA device's
memory has failed: it computed elsewhere. Exits with 1 if a part failed or could not be run.
"""

from __future__ import annotations

import gc
import platform
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from experiments.check_gpu_parts import PARTS, Figures, Part, Setting, Wrong
from experiments.common import console, markdown, save, told_as_usage
from rebasin.errors import RebasinError
from rebasin.files import prepare_folder
from rebasin.reporting.results import environment
from rebasin.tensors.modules import find_device

NAME = "check_gpu"
GB = 1e9


@dataclass
class Memory:
    """The most memory during a block: in the CUDA device, as torch counts it, and of this process (0: not known)."""

    device: int = 0
    process: int = 0


@dataclass(frozen=True)
class Outcome:
    """What became of a part: seconds, peak memory in GB, figures, and a sentence if it is not ok."""

    name: str
    title: str
    status: Literal["ok", "failed", "not run"]
    sentence: str = ""
    seconds: float | None = None
    device_gb: float | None = None
    process_gb: float | None = None
    figures: Figures = field(default_factory=dict)

    @property
    def row(self) -> list[str]:
        """Its cells of the table."""
        numbers = (self.seconds, self.device_gb, self.process_gb)
        shown = [
            "" if x is None else form.format(x)
            for x, form in zip(numbers, ("{:.1f}", "{:.1f}", "{:.1f}"), strict=True)
        ]
        return [self.title, self.status, *shown, self.sentence or self.told]

    @property
    def told(self) -> str:
        """The figures in a line, long lists by their ends."""
        return ", ".join(f"{name} {_shown(value)}" for name, value in self.figures.items())


def _shown(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list | tuple):
        return " ".join(map(_shown, value))
    return str(value)


@contextmanager
def watched(device: torch.device) -> Iterator[Memory]:
    """Peak memory of the block, known at its end; the process is looked at twenty times a second."""
    found, over = Memory(), threading.Event()

    def look() -> None:
        found.process = max(found.process, resident())

    def watch() -> None:
        while not over.wait(0.05):
            look()

    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if cuda else 0
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
        look()
        if cuda:
            peak = torch.cuda.max_memory_allocated(device)
            found.device = peak if peak > before else 0


def resident() -> int:
    """Bytes that this process has in memory now; 0 where the system has no /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def missing(part: Part) -> list[str]:
    """The packages that a part would import in vain."""
    return [name for name in part.needs if find_spec(name) is None]


def outcome(part: Part, given: Setting) -> Outcome:
    """Run a part; whatever it raises is its outcome."""
    began, sentence, figures = time.perf_counter(), "", Figures()
    with watched(given.device) as memory:
        try:
            figures = part.run(given)
        except (Wrong, RebasinError) as error:
            sentence = str(error)
        except (
            Exception
        ) as error:  # the others are to be run all the same, on a device that does what it will
            first = (str(error).splitlines() or [""])[0]
            sentence = f"{type(error).__name__}: {first[:300]}"
        seconds = time.perf_counter() - began
    if not sentence and given.device.type == "cuda" and not memory.device:
        sentence = "Nothing was in the device's memory, so it was computed elsewhere."
    gc.collect()
    return Outcome(
        part.name, part.title, "failed" if sentence else "ok", sentence, round(seconds, 2),
        round(memory.device / GB, 2) if given.device.type == "cuda" else None,
        round(memory.process / GB, 2) or None, figures,
    )  # fmt: skip


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on: device, versions, commit."""
    found: dict[str, Any] = {
        **environment(str(device)),
        "processor": platform.processor() or platform.machine(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        found |= {
            "memory_gb": round(properties.total_memory / GB, 1),
            "multiprocessors": properties.multi_processor_count,
        }
    return {**found, "commit": commit()}


def commit() -> str | None:
    """The commit of this checkout, with a + if files differ from it; None outside of one."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def chosen(only: Sequence[str] | None) -> list[Part]:
    """The parts of these names; by default all that are checks."""
    known = {part.name: part for part in PARTS}
    if unknown := [name for name in only or () if name not in known]:
        raise typer.BadParameter(f"There is no part {unknown[0]!r}: choose of {', '.join(known)}.")
    return [part for part in PARTS if (part.name in only if only else not part.asked)]


def table(found: Sequence[Outcome]) -> str:
    """The outcomes as markdown."""
    head = "| part | | seconds | GB, device | GB, process | |"
    return markdown(head, "|---|---|---:|---:|---:|---|", (one.row for one in found))


def left(parts: Sequence[Part], done: Sequence[Outcome]) -> float:
    """Seconds that the parts after `done` may take, by how those took beside what was expected."""
    ran = [(one.seconds, part.seconds) for one, part in zip(done, parts, strict=False) if one.status == "ok"]
    pace = sum(s or 0.0 for s, _ in ran) / expected if (expected := sum(e for _, e in ran)) else 1.0
    return pace * sum(part.seconds for part in parts[len(done) :])


def check(parts: Sequence[Part], given: Setting, out: Path) -> list[Outcome]:
    """Run the parts one after the other; the files in `out` have after each what is known."""
    done: list[Outcome] = []
    told = machine(given.device)
    lacking = {part.name: missing(part) for part in parts}
    for name, packages in lacking.items():
        if packages:
            console.print(f"{name} will not be run: install {', '.join(packages)}.", markup=False)
    began = time.perf_counter()
    for number, part in enumerate(parts, 1):
        place = f"{number}/{len(parts)} {part.title}"

        def say(text: str, place: str = place) -> None:
            console.print(f"    {place}: {text}", markup=False, style="dim")

        if lacking[part.name]:
            sentence = f"Not installed: {', '.join(lacking[part.name])}."
            done.append(Outcome(part.name, part.title, "not run", sentence))
        else:
            rest = left(parts, done)
            console.print(f"{place} (to the end about {rest:.0f} s)", markup=False)
            done.append(outcome(part, replace(given, say=say)))
        one = done[-1]
        console.print(f"    {one.status}: {one.sentence or one.told}", markup=False)
        payload = {
            "machine": told,
            "tiny": given.tiny,
            "data": None if given.data is None else given.data.name,
            "seconds": round(time.perf_counter() - began, 1),
            "parts": [asdict(one) for one in done],
        }
        save(out, NAME, payload, table(done))
    return done


def main(
    out: Annotated[Path, typer.Option(help="the folder for check_gpu.json and check_gpu.md")],
    device: Annotated[str, typer.Option(help="auto, cuda, cuda:1 or cpu")] = "auto",
    tiny: Annotated[bool, typer.Option("--tiny", help="small models: does the check itself work?")] = False,
    only: Annotated[list[str] | None, typer.Option(help="only this part; may be repeated")] = None,
    data: Annotated[
        Path | None, typer.Option(help="CIFAR-10, as data.path takes it; default: synthetic images")
    ] = None,
) -> None:
    """Run everything on a device and leave what it took."""
    parts = chosen(only)
    with told_as_usage():
        where = find_device(device, "--device")
        prepare_folder(out)
    if data is not None and not data.exists():
        raise typer.BadParameter(f"There is no {data}.")
    with tempfile.TemporaryDirectory() as folder:
        done = check(parts, Setting(where, tiny, Path(folder), data), out)
    console.print("\n" + table(done), markup=False)
    bad = [one.name for one in done if one.status != "ok"]
    told = f"{', '.join(bad)}: not ok." if bad else "All parts are ok."
    console.print(f"{told} {out / NAME}.json, {out / NAME}.md", markup=False)
    if bad:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
