"""torchvision's architectures, in a process of their own: its wheel breaks other imports on a CPU build of torch.

The whole list is in docs/architectures.md (`python -m experiments.architectures`); here is a sample of its kinds.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _vision() -> Path | None:
    """Where `make test` puts torchvision: beside the environment, so that only this test sees it."""
    folders = [
        os.environ.get("REBASIN_VISION", ""),
        str(ROOT / ".venv" / "vision"),
        str(Path(sys.prefix) / "vision"),
    ]
    return next((Path(f) for f in folders if f and (Path(f) / "torchvision").is_dir()), None)


def test_torchvision_sample() -> None:
    folder = _vision()
    if folder is None and importlib.util.find_spec("torchvision") is None:
        pytest.skip("no torchvision: pip install --no-deps --target .venv/vision torchvision==0.28.0")
    names = [
        "resnet18",
        "resnext50_32x4d",
        "mobilenet_v3_small",
        "shufflenet_v2_x1_0",
        "squeezenet1_1",
        "vgg11",
    ]
    command = [sys.executable, "-m", "experiments.architectures", "--family", "torchvision"]
    for name in names:
        command += ["--only", name]
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), str(folder or "")]))
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert "NO" not in run.stdout.split()


NETWORKS = """
import importlib.util, torch
from rebasin import trace, weight_matching
from rebasin.models import build
from rebasin.tracing import verify

torch.set_num_threads(1)
for library in ("torchvision", "timm"):
    if importlib.util.find_spec(library) is None:
        continue
    for name in ("resnet18", "resnet50"):
        model = build("library", library=library, network=name, channels=3, classes=10).eval()
        x = torch.randn(2, 3, 32, 32)
        spec = trace(model, x)
        verify(model, spec, x).require()
        print(library, name, len(spec), model(x).shape[1])
        if name == "resnet18":
            b = spec.random(seed=1).apply(model.state_dict())
            found = weight_matching(spec, model.state_dict(), b).permutation.apply(b)
            assert all(torch.equal(found[key], tensor) for key, tensor in model.state_dict().items())
"""


def test_resnets_of_torchvision_and_timm() -> None:
    """Really built, with the official number of groups (37 for a ResNet50), proved, and a planted permutation found."""
    folder = _vision()
    if folder is None and importlib.util.find_spec("torchvision") is None:
        pytest.skip("no torchvision: pip install --no-deps --target .venv/vision torchvision==0.28.0 timm")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", ""), str(folder or "")]))
    run = subprocess.run(
        [sys.executable, "-c", NETWORKS],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    lines = run.stdout.splitlines()
    assert "torchvision resnet18 12 10" in lines and "torchvision resnet50 37 10" in lines
    if folder is not None and (folder / "timm").is_dir():
        assert "timm resnet18 12 10" in lines and "timm resnet50 37 10" in lines
