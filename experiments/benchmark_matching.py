"""How fast weight matching is, and how good, against three yardsticks measured in the same run.

    matmul   one product of two square matrices, timed here, scaled to the floating point operations of one
             sweep: what the cost matrices alone would take at best
    loop     the paper's algorithm as it prints it (`rebasin.matching.reference`), on the same spec
    peer     the PyPI package `rebasin`, which has our import name and so needs an environment of its own:
                 python -m venv peer && peer/bin/pip install torch numpy scipy tqdm graphviz torchview
                 peer/bin/pip install --no-deps rebasin

    python -m experiments.benchmark_matching                               # small networks, without the peer
    python -m experiments.benchmark_matching --peer peer/bin/python        # with it
    python -m experiments.benchmark_matching --cases sd15 --pairs near     # full size, by shape
    python -m experiments.benchmark_matching --scaling                     # cost against width and depth

Every measurement runs in a process of its own, so that its peak memory is its own. Endpoints are in memory and
count; those of full size are fp16 files, read lazily. `random` pairs are drawn independently, with nothing to
find; `near` is A plus 10 % noise, like two fine-tunes of one base; `planted` is that under a hidden permutation,
which must be found again; `trained` are two short trainings of the network from different seeds, on the digits that
come with scikit-learn or, with --data, on MNIST. Seconds are the median of --repeats calls in one process (the
peer's orders, and with them its sweeps, differ from call to call); tracing
(the peer: its own analysis of the networks) is told apart, and counts in the last ratio. Writes matching.json and
matching.md (or scaling.json and scaling.png) to --out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rebasin.types import State

# Nothing of ours is imported here: this file is also run by the peer's Python, where `rebasin` is the peer.


# Networks ---------------------------------------------------------------------------------------------------


class ResidualNet(nn.Module):
    """ResNet18 (basic blocks) or ResNet50 (bottlenecks), with the shapes of He et al., torch only."""

    def __init__(self, blocks: tuple[int, ...], bottleneck: bool, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        layers: list[nn.Module] = []
        size = 64
        for stage, count in enumerate(blocks):
            for block in range(count):
                layers.append(ResidualBlock(size, 64 * 2**stage, 2 if stage and not block else 1, bottleneck))
                size = 64 * 2**stage * (4 if bottleneck else 1)
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(size, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        outputs = 4 * width if bottleneck else width
        kernels = [(inputs, width, 1), (width, width, 3), (width, outputs, 1)]
        if not bottleneck:
            kernels = [(inputs, width, 3), (width, width, 3)]
        strided = 1 if bottleneck else 0
        layers: list[nn.Module] = []
        for k, (fan_in, fan_out, size) in enumerate(kernels):
            step = stride if k == strided else 1
            layers += [nn.Conv2d(fan_in, fan_out, size, step, size // 2, bias=False), nn.BatchNorm2d(fan_out)]
            if k + 1 < len(kernels):
                layers.append(nn.ReLU())
        self.body = nn.Sequential(*layers)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.last = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x) + self.shortcut(x))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )  # fmt: skip


def vgg16() -> nn.Module:
    from rebasin.models import VGG

    return VGG(16)


def resnet20x4() -> nn.Module:
    from rebasin.models import ResNet

    return ResNet(4)


def unet(**config: Any) -> nn.Module:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel(**config)


SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@dataclass(frozen=True)
class Case:
    """A network: how to build it, its example inputs, and whether the peer can take it too (torch alone)."""

    build: Callable[[], nn.Module]
    example: Callable[[torch.device], tuple[tuple[Tensor, ...], dict[str, Any]]]
    peer: bool = False
    by_shape: bool = (
        False  # so large that its weights are drawn in fp16 from the shapes, and the loop is left out
    )


def _image(device: torch.device) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    return (torch.zeros(2, 3, 32, 32, device=device),), {}


def _flat(device: torch.device) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    return (torch.zeros(2, 784, device=device),), {}


def _latent(text: int, pooled: bool) -> Callable[[torch.device], tuple[tuple[Tensor, ...], dict[str, Any]]]:
    def example(device: torch.device) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        kwargs: dict[str, Any] = {
            "sample": torch.zeros(2, 4, 32, 32, device=device),
            "timestep": torch.zeros(2, dtype=torch.long, device=device),
            "encoder_hidden_states": torch.zeros(2, 77, text, device=device),
        }
        if pooled:
            kwargs["added_cond_kwargs"] = {
                "text_embeds": torch.zeros(2, 1280, device=device),
                "time_ids": torch.zeros(2, 6, device=device),
            }
        return (), kwargs

    return example


CASES = {
    "mlp": Case(mlp, _flat, peer=True),
    "resnet18": Case(lambda: ResidualNet((2, 2, 2, 2), False), _image, peer=True),
    "resnet50": Case(lambda: ResidualNet((3, 4, 6, 3), True), _image, peer=True),
    "vgg16": Case(vgg16, _image),
    "resnet20x4": Case(resnet20x4, _image),
    "sd15": Case(lambda: unet(**SD15), _latent(768, False), by_shape=True),
    "sdxl": Case(lambda: unet(**SDXL), _latent(2048, True), by_shape=True),
}


# Endpoints --------------------------------------------------------------------------------------------------


def endpoints(spec: Any, case: Case, pair: str, seed: int, data: Path | None = None) -> tuple[State, State]:
    """Two states that fit `spec`, on the CPU, of a network that is small enough to be built."""
    if pair == "trained":
        a, b = (trained(case, seed + side, data) for side in range(2))
        return a, b
    torch.manual_seed(seed)
    a = {k: v.clone() for k, v in case.build().state_dict().items() if v.is_floating_point()}
    if pair == "random":
        again = case.build().state_dict()
        return a, {name: again[name] for name in a}
    b = {
        name: (t.float() + 0.1 * _spread(t) * torch.randn(t.shape)).to(t.dtype)
        if name not in spec.buffers
        else t
        for name, t in a.items()
    }
    return a, spec.random(seed + 1).apply(b) if pair == "planted" else b


def trained(case: Case, seed: int, data: Path | None, steps: int = 240, batch: int = 500) -> State:
    """The network after two epochs of MNIST, or as many steps on the digits, images scaled to its input."""
    from rebasin.data import classification

    images = classification.load("digits") if data is None else classification.load("mnist", data)
    shape = case.example(torch.device("cpu"))[0][0].shape[1:]
    square = shape[1:] if len(shape) == 3 else (math.isqrt(shape[0]),) * 2
    torch.manual_seed(seed)
    model = case.build().train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    order: list[Tensor] = []
    for _ in range(steps):
        order = order or list(torch.randperm(len(images.train_x)).split(batch))
        chosen = order.pop()
        x = nn.functional.interpolate(images.train_x[chosen].float(), tuple(square))
        x = x.expand(-1, shape[0], -1, -1) if len(shape) == 3 else x.flatten(1)
        loss = nn.functional.cross_entropy(model(x), images.train_y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {k: v.detach().clone() for k, v in model.state_dict().items() if v.is_floating_point()}


class Drawn(Mapping[str, Tensor]):
    """fp16 weights of full size, each tensor drawn when it is asked for: making a file of them takes no memory."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], seed: int, base: Drawn | None = None) -> None:
        self.shapes, self.seed, self.base = shapes, seed, base

    def __getitem__(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{name}".encode()))
        noise = torch.randn(self.shapes[name], generator=generator)
        if self.base is None:
            return (noise / math.sqrt(max(1, math.prod(noise.shape[1:])))).half()
        tensor = self.base[name]
        return (tensor.float() + 0.1 * _spread(tensor) * noise).half()

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def shape_of(self, name: str) -> tuple[int, ...]:
        return tuple(self.shapes[name])

    def dtype_of(self, name: str) -> torch.dtype:
        return torch.float16


def make_files(spec: Any, pair: str, seed: int, folder: Path) -> None:
    """The endpoints of a network of full size as two files, a.safetensors and b.safetensors."""
    from rebasin.checkpoints import save_safetensors

    a = Drawn(spec.shapes, seed)
    b = Drawn(spec.shapes, seed + 1, None if pair == "random" else a)
    save_safetensors(folder / "a.safetensors", a)
    save_safetensors(folder / "b.safetensors", spec.random(seed + 1).view(b) if pair == "planted" else b)


def _spread(tensor: Tensor) -> float:
    deviation = float(tensor.float().std(correction=0))
    return deviation or 1.0  # fresh norms are constant


def traced(case: Case) -> tuple[Any, float]:
    import rebasin

    began = time.perf_counter()
    with torch.device("meta"):
        model = case.build()
    args, kwargs = case.example(torch.device("meta"))
    return rebasin.trace(model, *args, **kwargs), time.perf_counter() - began


def flops(spec: Any) -> float:
    """Multiplications and additions of all cost matrices of one sweep, were none of their blocks left out."""
    total = 0.0
    for name, axes in spec.axes.items():
        if name not in spec.buffers:
            numel = math.prod(spec.shapes[name])
            for axis, sites in axes.items():
                for cell, site in sites:
                    total += (
                        2.0 * spec.cells[cell].size * numel * len(site.positions) / spec.shapes[name][axis]
                    )
    return total


# Methods ----------------------------------------------------------------------------------------------------


def run_ours(case: Case, a: State, b: State, spec: Any, init: str, seed: int) -> dict[str, Any]:
    from rebasin import weight_matching

    result = weight_matching(spec, a, b, init=init, seed=seed)  # pyright: ignore[reportArgumentType]
    return {
        "objective": result.objective,
        "naive": result.initial_objective,
        "sweeps": result.sweeps,
        "first_sweep": result.history[1].seconds,
        "converged": result.converged,
        "moved": result.moved,
        "permutation": result.permutation,
    }


def run_loop(case: Case, a: State, b: State, spec: Any, seed: int) -> dict[str, Any]:
    from rebasin.matching import reference

    began = time.perf_counter()
    permutation, sweeps = reference.weight_matching(spec, a, b, seed=seed)
    return {
        "objective": inner(spec, a, permutation.apply(b)),
        "sweeps": sweeps,
        "first_sweep": (time.perf_counter() - began) / sweeps,  # the mean: all of its sweeps are alike
        "moved": permutation.moved(),
        "permutation": permutation,
    }


def inner(spec: Any, a: State, b: Mapping[str, Tensor]) -> float:
    """The objective: <A, B> over the parameters that the spec permutes."""
    names = [name for name in spec.axes if name not in spec.buffers]
    return math.fsum(float((a[n].double() * b[n].double()).sum()) for n in names)


def work(options: argparse.Namespace) -> None:
    """One measurement; its figures go to a file."""
    torch.set_num_threads(options.threads)
    case = CASES[options.work]
    if options.method == "matmul":
        _report(options, {"rate": _matmul_rate()})
        return
    if options.method == "peer":
        _work_peer(options, case)
        return
    import scipy.optimize  # noqa: F401  (loading libraries is not what is measured)

    import rebasin.matching  # noqa: F401

    spec, tracing = traced(case)
    if options.method == "files":
        make_files(spec, options.pair, options.seed, Path(options.endpoints))
        _report(options, {})
        return
    if case.by_shape:
        from rebasin.checkpoints import load_safetensors

        a, b = (load_safetensors(Path(options.endpoints) / f"{side}.safetensors") for side in "ab")
    else:
        a, b = _given(options) or endpoints(spec, case, options.pair, options.seed, options.data)
    figures: dict[str, Any] = {"tracing": tracing, "flops": flops(spec), "neurons": spec.neurons}
    if options.method == "endpoints":
        arrays: dict[str, Any] = {
            f"{s}/{n}": t.numpy() for s, m in (("a", a), ("b", b)) for n, t in m.items()
        }
        np.savez(options.endpoints, **arrays)
        _report(options, figures | {"objective": inner(spec, a, b)})
        return
    if options.method == "judge":  # what the peer made of B, measured like ours
        with np.load(options.aligned) as file:
            aligned = {name: torch.from_numpy(file[name]) for name in file.files}
        _report(
            options,
            {
                "objective": inner(spec, a, aligned),
                "naive": inner(spec, a, b),
                "function_error": _function_error(case, b, aligned),
            },
        )
        return
    _compile()
    once = case.by_shape or options.method == "loop"
    calls: list[tuple[float, float]] = []
    for _ in range(1 if once else options.repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        if options.method == "loop":
            made = run_loop(case, a, b, spec, options.seed)
        else:
            made = run_ours(case, a, b, spec, options.method.removeprefix("ours-"), options.seed)
        calls.append((time.perf_counter() - wall, time.process_time() - cpu))
        figures |= made
    figures["seconds"], figures["cpu"] = _median(calls)
    permutation = figures.pop("permutation")
    figures.setdefault("naive", inner(spec, a, b) if not case.by_shape else math.nan)
    if options.pair == "planted":
        hidden = spec.random(options.seed + 1).invert()
        right = sum(int((permutation.index[n] == i).sum()) for n, i in hidden.index.items())
        figures["recovered"] = right / spec.neurons
    _report(options, figures)


def _compile() -> None:
    """Loading libraries is not what is measured, and neither is compiling, once for an installation."""
    from rebasin.matching.assignment.jonker_volgenant import solve

    solve(np.zeros((4, 4), dtype=np.float32))


def _median(calls: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Of wall clock and of CPU time, each by itself."""
    wall, cpu = zip(*calls, strict=True)
    return statistics.median(wall), statistics.median(cpu)


def _given(options: argparse.Namespace) -> tuple[State, State] | None:
    """Endpoints that an earlier process left in a file, if there is one."""
    if options.endpoints is None or not Path(options.endpoints).exists():
        return None
    with np.load(options.endpoints) as file:
        a, b = (
            {n[2:]: torch.from_numpy(file[n]) for n in file.files if n.startswith(side + "/")}
            for side in "ab"
        )
    return a, b


def _work_peer(options: argparse.Namespace, case: Case) -> None:
    """In the peer's own Python: align, and leave the aligned weights for `judge`."""
    import rebasin

    if hasattr(rebasin, "weight_matching"):
        raise SystemExit("This is our own package, not the peer: give --peer the Python of its environment.")
    states = _given(options)
    assert states is not None
    args, _ = case.example(torch.device("cpu"))
    torch.manual_seed(options.seed)
    figures: dict[str, Any] = {}
    models: list[nn.Module] = []
    calls: list[tuple[float, float]] = []
    for _ in range(options.repeats):
        models = [case.build().eval() for _ in states]
        for model, state in zip(models, states, strict=True):
            model.load_state_dict(state, strict=False)
        began = time.perf_counter()
        descent = rebasin.PermutationCoordinateDescent(*models, torch.randn(args[0].shape))  # pyright: ignore
        wall, cpu = time.perf_counter(), time.process_time()
        descent.rebasin()
        calls.append((time.perf_counter() - wall, time.process_time() - cpu))
        figures["tracing"] = max(wall - began, figures.get("tracing", 0.0))  # the first, as for ours
    figures["seconds"], figures["cpu"] = _median(calls)
    aligned: dict[str, Any] = {
        n: t.detach().numpy() for n, t in models[1].state_dict().items() if t.is_floating_point()
    }
    np.savez(options.aligned, **aligned)
    _report(options, figures)


def _function_error(case: Case, before: State, after: State) -> float:
    """How much the aligned model's outputs differ from B's, relative; evaluation mode."""
    outputs = []
    args, _ = case.example(torch.device("cpu"))
    torch.manual_seed(0)
    x = torch.randn(args[0].shape)
    for state in (before, after):
        model = case.build().eval()
        model.load_state_dict(state, strict=False)
        with torch.no_grad():
            outputs.append(model(x))
    return float((outputs[0] - outputs[1]).norm() / outputs[0].norm())


def _matmul_rate(size: int = 4096) -> dict[str, float]:
    """Floating point operations a second, of wall clock and of CPU time; float32, the best of three."""
    x = torch.randn(size, size)
    wall, cpu = [], []
    for _ in range(3):
        began = time.perf_counter(), time.process_time()
        torch.mm(x, x)
        wall.append(time.perf_counter() - began[0])
        cpu.append(time.process_time() - began[1])
    return {"wall": 2 * size**3 / min(wall), "cpu": 2 * size**3 / min(cpu)}


def _report(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    figures["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1e9 if sys.platform == "darwin" else 1e6
    )
    Path(options.result).write_text(json.dumps(figures))


# The table --------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace, case: str, pair: str, method: str, **files: Path) -> dict[str, Any]:
    """Run one measurement in a process of its own; a failure is a result, too."""
    python = options.peer if method == "peer" else sys.executable
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [
            str(python),
            str(Path(__file__).resolve()),
            "--work",
            case,
            "--method",
            method,
            "--pair",
            pair,
        ]
        command += ["--threads", str(options.threads), "--seed", str(options.seed), "--result", str(result)]
        command += ["--repeats", str(options.repeats)]
        if options.data is not None:
            command += ["--data", str(options.data)]
        for name, path in files.items():
            command += [f"--{name}", str(path)]
        root = str(Path(__file__).resolve().parent.parent)
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        if method == "peer":
            environment.pop("PYTHONPATH", None)  # else its interpreter could find ours under the same name
        else:
            environment["PYTHONPATH"] = os.pathsep.join(
                filter(None, [root, os.environ.get("PYTHONPATH", "")])
            )
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=options.timeout, check=False
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {options.timeout} s"}
        if done.returncode or not result.exists():
            return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1][:200]}
        return json.loads(result.read_text())


def table(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    rate = measure(options, "mlp", "random", "matmul")["rate"]
    for name in options.cases:
        case = CASES[name]
        for pair in options.pairs:
            methods = ["ours-identity", "ours-forward"] + ([] if case.by_shape else ["loop"])
            with tempfile.TemporaryDirectory(prefix="rebasin-benchmark-") as folder:
                files = _files(options, name, pair, Path(folder))
                for method in methods:
                    figures = measure(options, name, pair, method, **files)
                    if "flops" in figures:
                        figures["floor"] = figures["flops"] / rate["wall"]
                        figures["sweep_over_matmul"] = figures["first_sweep"] / figures["floor"]
                        figures["cpu_over_matmul"] = figures["cpu"] / (figures["flops"] / rate["cpu"])
                    rows.append({"case": name, "pair": pair, "method": method, **figures})
                    _say(rows[-1])
                if options.peer and case.peer:
                    figures = _peer(options, name, pair, Path(folder) / "aligned.npz", **files)
                    rows.append({"case": name, "pair": pair, "method": "peer", **figures})
                    _say(rows[-1])
    return rows


def _files(options: argparse.Namespace, case: str, pair: str, folder: Path) -> dict[str, Path]:
    """Endpoints on disk: those of full size as two files, others as one that all methods and the peer read."""
    whole = CASES[case].by_shape
    target = folder if whole else folder / "endpoints.npz"
    made = measure(options, case, pair, "files" if whole else "endpoints", endpoints=target)
    if "failed" in made:
        raise SystemExit(f"The endpoints of {case} can't be made: {made['failed']}")
    return {"endpoints": target}


def _peer(options: argparse.Namespace, case: str, pair: str, aligned: Path, **files: Path) -> dict[str, Any]:
    figures = measure(options, case, pair, "peer", aligned=aligned, **files)
    if "failed" in figures:
        return figures
    judged = measure(options, case, pair, "judge", aligned=aligned, **files)
    judged.pop("peak_gb", None)
    return {**figures, **judged}


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "case": ("network", str),
    "pair": ("pair", str),
    "method": ("method", str),
    "tracing": ("tracing s", lambda v: f"{v:.2f}"),
    "seconds": ("seconds", lambda v: f"{v:.3g}"),
    "cpu": ("CPU s", lambda v: f"{v:.3g}"),
    "sweeps": ("sweeps", str),
    "sweep_over_matmul": ("first sweep / matmul", lambda v: f"{v:.2f}"),
    "naive": ("naive objective", lambda v: f"{v:.6g}"),
    "objective": ("objective", lambda v: f"{v:.6g}"),
    "recovered": ("recovered", lambda v: f"{v:.2%}"),
    "function_error": ("function changed by", lambda v: f"{v:.1e}"),
    "peak_gb": ("peak GB", lambda v: f"{v:.2f}"),
    "slower": ("times ours-forward", lambda v: f"{v:.1f}"),
    "slower_cpu": ("in CPU s", lambda v: f"{v:.1f}"),
    "slower_whole": ("with tracing", lambda v: f"{v:.1f}"),
    "failed": ("failed", str),
}


def markdown(rows: list[dict[str, Any]], machine: Mapping[str, Any]) -> str:
    for row in rows:
        same = [
            r
            for r in rows
            if (r["case"], r["pair"], r["method"]) == (row["case"], row["pair"], "ours-forward")
        ]
        if same and "seconds" in row and "seconds" in same[0]:
            row["slower"] = row["seconds"] / same[0]["seconds"]
            row["slower_cpu"] = row["cpu"] / same[0]["cpu"]
            ours, theirs = (r["seconds"] + r.get("tracing", 0.0) for r in (same[0], row))
            row["slower_whole"] = theirs / ours
    used = {key: column for key, column in COLUMNS.items() if any(key in row for row in rows)}
    lines = ["| " + " | ".join(title for title, _ in used.values()) + " |", "|" + "---|" * len(used)]
    for row in rows:
        lines.append(
            "| " + " | ".join(f(row[key]) if key in row else "" for key, (_, f) in used.items()) + " |"
        )
    told = ", ".join(f"{key} {value}" for key, value in machine.items())
    return f"{told}\n\n" + "\n".join(lines) + "\n"


def describe_machine(threads: int) -> dict[str, Any]:
    import scipy

    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        named = [line for line in information.read_text().splitlines() if line.startswith("model name")]
        model = named[0].split(":", 1)[1].strip() if named else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "scipy": scipy.__version__,
    }


def scaling(options: argparse.Namespace) -> None:
    """Seconds to convergence of independent random MLPs against width and depth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    import rebasin

    torch.set_num_threads(options.threads)
    _compile()
    rows = []
    for depth, width in [(2, w) for w in (64, 128, 256, 512, 1024, 2048)] + [
        (d, 256) for d in (1, 4, 8, 16, 32)
    ]:
        sizes = [256] + [width] * depth + [10]
        layers = [m for n, o in pairwise(sizes) for m in (nn.Linear(n, o), nn.ReLU())][:-1]
        spec = rebasin.trace(nn.Sequential(*layers), torch.zeros(2, 256))
        torch.manual_seed(options.seed)
        a, b = ({n: torch.randn(s) / s[-1] ** 0.5 for n, s in spec.shapes.items()} for _ in range(2))
        for init in ("identity", "forward"):
            results = [
                rebasin.weight_matching(spec, a, b, init=init, seed=options.seed)
                for _ in range(options.repeats)
            ]
            result, seconds = results[0], statistics.median(r.seconds for r in results)
            rows.append({"depth": depth, "width": width, "init": init, "seconds": seconds})
            rows[-1] |= {"sweeps": result.sweeps, "objective": result.objective}
            _say(rows[-1])
    (options.out / "scaling.json").write_text(json.dumps(rows, indent=1))
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    for panel, (key, other, fixed) in zip(
        panels, (("width", "depth", 2), ("depth", "width", 256)), strict=True
    ):
        for init in ("identity", "forward"):
            points = sorted((r[key], r["seconds"]) for r in rows if r[other] == fixed and r["init"] == init)
            panel.loglog(*zip(*points, strict=True), "o-", label=init)
        panel.set_xlabel(f"{key} ({other} {fixed})")
    panels[0].set_ylabel("seconds to convergence")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(options.out / "scaling.png", dpi=120)


def _say(row: Mapping[str, Any]) -> None:
    print(
        "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True
    )


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(
        prog="python -m experiments.benchmark_matching",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    described.add_argument("--cases", nargs="+", default=["mlp", "resnet18"], choices=CASES)
    described.add_argument(
        "--pairs", nargs="+", default=["random", "planted"], choices=["random", "near", "planted", "trained"]
    )
    described.add_argument("--data", type=Path, help="MNIST for `trained` pairs: an .npz, or the IDX folder")
    described.add_argument(
        "--repeats", type=int, default=3, help="calls in one process, of which the median counts"
    )
    described.add_argument("--peer", type=Path, help="the Python of an environment that has the PyPI package")
    described.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of every method alike")
    described.add_argument("--seed", type=int, default=0)
    described.add_argument("--timeout", type=int, default=3600, help="seconds for one measurement")
    described.add_argument("--out", type=Path, default=Path("outputs/benchmark_matching"))
    described.add_argument(
        "--scaling", action="store_true", help="measure cost against width and depth instead"
    )
    for inside in ("work", "method", "pair", "result", "endpoints", "aligned"):
        described.add_argument(f"--{inside}", help=argparse.SUPPRESS)
    return described


def main() -> None:
    options = parser().parse_args()
    if options.work:
        work(options)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    if options.scaling:
        scaling(options)
        return
    rows = table(options)
    machine = describe_machine(options.threads)
    text = markdown(rows, machine)
    (options.out / "matching.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    (options.out / "matching.md").write_text(text)
    print("\n" + text)


if __name__ == "__main__":
    main()
