"""Every default model, with really trained weights: legal, and what is hidden in it is found again.

B is A under a random member of the group, plus noise of 0.1 standard deviations in every tensor.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import rebasin
from rebasin.data import classification
from rebasin.models import tiny_sd
from rebasin.models.cache import trained
from rebasin.models.train import RECIPES, Recipe
from rebasin.objectives import CrossEntropy
from rebasin.spec import Permutation

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("mlp", {"width": 128}),
    "vgg16": ("vgg", {"depth": 16, "width": 8, "norm": "layer"}),
    "vgg11_bn": ("vgg", {"depth": 11, "width": 8, "norm": "batch"}),
    "resnet20": ("resnet", {"width": 0.5, "norm": "layer", "blocks": 3}),
    "resnet8_bn": ("resnet", {"width": 0.5, "norm": "batch", "blocks": 1}),
}
MODELS = [*NETWORKS, "unet", "vae", "text_encoder"]


@cache
def default(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    if name in NETWORKS:
        digits = classification.load("digits")
        kind, options = NETWORKS[name]
        recipe = Recipe(**{**vars(RECIPES[kind]), "epochs": 3})
        return trained(kind, digits, options, recipe, seed=0).model(), (digits.test_x[:4],)
    if name == "unet":
        condition = torch.randn(2, 16, tiny_sd.load_text_encoder().config.hidden_size)
        return tiny_sd.load_unet("seed0"), (torch.randn(2, 4, 8, 8), torch.tensor([10, 700]), condition)
    if name == "vae":
        return tiny_sd.load_vae(), (torch.rand(2, 1, 32, 32) * 2 - 1,)
    tokens = tiny_sd.load_tokenizer()(["a handwritten seven", ""], padding="max_length", return_tensors="pt")
    return tiny_sd.load_text_encoder(), (tokens.input_ids,)


@pytest.mark.parametrize("name", MODELS)
def test_legal_with_its_own_weights(name: str) -> None:
    """Random and real weights; and one swap that the spec does not allow must be seen."""
    model, args = default(name)
    spec = rebasin.trace(model, *args)
    assert spec.coverage().one > (0.9 if name != "text_encoder" else 0.6)
    rebasin.verify(model, spec, *args).require()
    rebasin.verify(model, spec, *args, randomise=False, dtype=torch.float64).require()
    group = next((g for g in spec if g.structure != f"S{g.neurons}"), None)
    if group is None:  # every permutation of these cells is legal; forget one place where a cell acts
        group = spec.groups[0]
        cells = tuple(type(c)(c.name, c.size, c.sites[:-1]) for c in group.cells)
        spec = type(spec)((type(group)(group.name, cells, group.tree),), spec.shapes, spec.buffers)
        wrong = spec.random(1)
    else:  # across heads or norm groups
        cell = group.cells[0]
        order = np.random.default_rng(0).permutation(cell.size)
        wrong = Permutation(spec, {**spec.identity().index, cell.name: order})
        assert not spec.contains(wrong)
    assert not rebasin.verify(model, spec, *args, permutation=wrong).passed


@pytest.mark.parametrize("name", MODELS)
def test_what_was_planted_is_found(name: str) -> None:
    model, args = default(name)
    spec = rebasin.trace(model, *args)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    hidden = spec.random(7)
    generator = torch.Generator().manual_seed(3)
    moved = {
        n: t + 0.1 * t.std(correction=0) * torch.randn(t.shape, generator=generator)
        if t.is_floating_point()
        else t
        for n, t in hidden.apply(state).items()
    }
    result = rebasin.weight_matching(spec, state, moved, seed=0)
    assert result.converged
    found = {n: np.count_nonzero(result.permutation.index[n] != p) for n, p in hidden.invert().index.items()}
    assert not any(found.values()), found


def test_aligning_helps_mlps_and_width_helps_aligning() -> None:
    """The paper's first finding, on scikit-learn's digits: 32 and 128 here, 512 in the README."""
    digits = classification.load("digits")
    objective = CrossEntropy()
    aligned = {}
    for width in (32, 128):
        recipe = Recipe(epochs=12)
        nets = [trained("mlp", digits, {"width": width}, recipe, seed=s) for s in (0, 1)]
        model = nets[0].model()
        spec = rebasin.trace(model, digits.test_x[:1])
        a, b = nets[0].state, nets[1].state
        brought = rebasin.weight_matching(spec, a, b, seed=0).permutation.apply(b)
        batches = digits.batches("test", 355)
        curves = [
            rebasin.barrier(model, a, end, lambda m, data=batches: objective.evaluate(m, data))
            for end in (b, brought)
        ]
        aligned[width] = curves[1].barrier
        assert curves[1].barrier < 0.5 * curves[0].barrier
    assert aligned[128] < aligned[32]
