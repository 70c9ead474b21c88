"""torchvision's architectures, in a process of their own: its wheel breaks other imports on a CPU build of torch.

The whole list is in docs/architectures.md (`python -m experiments.architectures`); here is a sample of its kinds.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
from aside import ROOT, environment


@pytest.fixture(scope="module")
def vision() -> dict[str, str]:
    found = environment("vision", needs="torchvision")
    if found is None:
        pytest.skip(
            "no torchvision: pip install --no-deps --target .venv/vision torchvision==0.28.0 'timm>=1.0'"
        )
    return found


SAMPLE = ("mobilenet_v3_small",)

NETWORKS = f"""
import torch
from experiments import architectures
from rebasin import trace, weight_matching
from rebasin.models import build
from rebasin.tracing import verify

torch.set_num_threads(1)
for library in ("torchvision", "timm"):
    for name in ("resnet18", "resnet50") if library == "torchvision" else ("resnet18",):
        model = build("library", library=library, network=name, channels=3, classes=10).eval()
        x = torch.randn(2, 3, 32, 32)
        spec = trace(model, x)
        if name == "resnet18":
            verify(model, spec, x).require()
        print(library, name, len(spec), model(x).shape[1])
        if library == "torchvision" and name == "resnet18":
            b = spec.random(seed=1).apply(model.state_dict())
            found = weight_matching(spec, model.state_dict(), b).permutation.apply(b)
            assert all(torch.equal(found[key], tensor) for key, tensor in model.state_dict().items())
architectures.main(family=["torchvision"], only=list({SAMPLE}))
"""


def test_networks_of_torchvision_and_timm(vision: dict[str, str]) -> None:
    """Really built, with the official number of groups (37 for a ResNet50); the small proved, a plant found."""
    run = subprocess.run(
        [sys.executable, "-c", NETWORKS], cwd=ROOT, env=vision, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    lines = run.stdout.splitlines()
    assert "torchvision resnet18 12 10" in lines and "torchvision resnet50 37 10" in lines
    assert "timm resnet18 12 10" in lines
    assert run.stdout.split().count("yes") == len(SAMPLE) and "NO" not in run.stdout.split()
