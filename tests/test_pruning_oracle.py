"""An independent witness: Torch-Pruning's dependency groups say which channels must go together, and so do we."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rebasin
from rebasin.models.resnet import ResNet
from rebasin.models.vgg import VGG
from rebasin.spec import to_array

pruning = pytest.importorskip("torch_pruning")

MODELS = {
    "mlp": lambda: (
        nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3)),
        torch.randn(2, 6),
    ),
    "conv_bn": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3),
            nn.Flatten(),
            nn.Linear(24, 3),
        ),
        torch.randn(2, 3, 6, 6),
    ),
    "vgg_bn": lambda: (VGG(depth=11, width=8, norm="batch", channels=1, classes=10), torch.randn(2, 1, 8, 8)),
    "resnet_bn": lambda: (ResNet(width=0.5, norm="batch", channels=1, classes=10), torch.randn(2, 1, 8, 8)),
}


@pytest.mark.parametrize("name", MODELS)
def test_dependency_groups_agree(name: str) -> None:
    """For every output channel of every layer: the (weight, axis, index) triples that it drags along are the same."""
    model, x = MODELS[name]()
    model.eval()
    spec = rebasin.trace(model, x)
    ours: dict[tuple[str, int, int], frozenset] = {}
    for cell in spec.cells.values():
        sites = [
            (s.parameter, s.axis, to_array(s.positions)) for s in cell.sites if s.parameter.endswith("weight")
        ]
        for i in range(cell.size):
            neuron = frozenset((p, axis, int(positions[i])) for p, axis, positions in sites)
            ours.update(dict.fromkeys(neuron, neuron))
    graph = pruning.DependencyGraph().build_dependency(model, example_inputs=x)
    names = {module: n for n, module in model.named_modules()}
    checked = 0
    for module, layer in names.items():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        prune = (
            pruning.prune_conv_out_channels
            if isinstance(module, nn.Conv2d)
            else pruning.prune_linear_out_channels
        )
        for i in range(module.weight.shape[0]):
            if (f"{layer}.weight", 0, i) not in ours:
                continue  # the classes
            theirs = set()
            for dependency, indices in graph.get_pruning_group(module, prune, idxs=[i]):
                target = dependency.target.module
                if target in names and getattr(target, "weight", None) is not None:
                    axis = 1 if "in_channels" in dependency.handler.__name__ and target.weight.ndim > 1 else 0
                    theirs |= {(f"{names[target]}.weight", axis, int(j)) for j in indices}
            assert ours[(f"{layer}.weight", 0, i)] == theirs, (layer, i)
            checked += 1
    assert checked >= 14
