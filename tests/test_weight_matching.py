"""Weight matching on small architectures: what was planted is found, and every promise about the way there
holds.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rebasin.errors import CheckpointError, ConfigError, SpecMismatchError
from rebasin.matching import MatchState, exchange_losses, weight_matching
from rebasin.matching.assignment.blocks import assign, leaves
from rebasin.matching.schedule import neighbours, run_in_order, sharing
from rebasin.matching.weights.costs import WeightCosts, tensor_cores
from rebasin.matching.weights.endpoints import Endpoints, inner
from rebasin.matching.weights.noise import noise_weight, repeats_weight
from rebasin.spec import Branch, Cell, Group, Leaf, Permutation, PermutationSpec, Site

State = dict[str, Tensor]


def free(name: str, size: int, *sites: tuple[str, int] | Site) -> Group:
    """A group of one cell whose neurons are all exchangeable, at whole axes."""
    made = tuple(s if isinstance(s, Site) else Site(s[0], s[1], range(size)) for s in sites)
    return Group(name, (Cell(name, size, made),), Leaf(0, range(size)))


def mlp() -> PermutationSpec:
    """12-32-24-5 with biases."""
    return PermutationSpec(
        (free("h0", 32, ("w0", 0), ("b0", 0), ("w1", 1)), free("h1", 24, ("w1", 0), ("b1", 0), ("w2", 1))),
        {"w0": (32, 12), "b0": (32,), "w1": (24, 32), "b1": (24,), "w2": (5, 24), "b2": (5,)},
    )


def conv_flatten_linear() -> PermutationSpec:
    """Convolution, batch norm with its statistics, flattening of 3x3 pixels, linear layers; a tied output
    weight.
    """
    pixels = tuple(Site("w1", 1, range(k, 16 * 9, 9)) for k in range(9))
    norms = [(f"n0.{s}", 0) for s in ("weight", "bias", "running_mean", "running_var")]
    shapes: dict[str, tuple[int, ...]] = {f: (16,) for f, _ in norms}
    return PermutationSpec(
        (free("c0", 16, ("w0", 0), *norms, *pixels), free("h1", 20, ("w1", 0), ("w2", 1), ("w2", 0))),
        shapes | {"w0": (16, 3, 3, 3), "w1": (20, 16 * 9), "w2": (20, 20)},
        buffers=frozenset({"n0.running_mean", "n0.running_var"}),
        aliases={"tied": "w1"},
    )


def group_norm() -> PermutationSpec:
    """Convolutions around a GroupNorm(4) of 24 channels; a stream of 16 in blocks that stay in place."""
    blocks = tuple(Leaf(0, range(6 * k, 6 * k + 6)) for k in range(4))
    inside = Cell("inside", 24, tuple(Site(n, a, range(24)) for n, a in (("w0", 0), ("g", 0), ("w1", 1))))
    stream = Cell("stream", 16, tuple(Site(n, 0, range(16)) for n in ("w1", "b1")))
    stream = replace(stream, sites=(*stream.sites, *(Site(n, 1, range(16)) for n in ("w0", "w2"))))
    fixed = tuple(Leaf(0, n) for n in (range(5), range(5, 10), range(10, 16)))
    return PermutationSpec(
        (
            Group("inside", (inside,), Branch(blocks, "any")),
            Group("stream", (stream,), Branch(fixed, "fixed")),
            # Two cells on one axis: a concatenation of the stream with something else.
            free("other", 8, ("u", 0), Site("w2", 1, range(16, 24))),
        ),
        {"w0": (24, 16, 3, 3), "g": (24,), "w1": (16, 24, 3, 3), "b1": (16,), "w2": (7, 24), "u": (8, 9)},
    )


def attention() -> PermutationSpec:
    """Four heads over a residual stream of 20, q/k 5 and v/out 6 wide, and a gated MLP whose halves move
    together.
    """
    heads = 4
    qk = Cell("qk", 5 * heads, tuple(Site(n, 0, range(5 * heads)) for n in ("q", "q.bias", "k")))
    vo = Cell("vo", 6 * heads, tuple(Site(n, a, range(6 * heads)) for n, a in (("v", 0), ("o", 1))))
    tree = Branch(
        tuple(
            Branch((Leaf(0, range(5 * h, 5 * h + 5)), Leaf(1, range(6 * h, 6 * h + 6))), "fixed")
            for h in range(heads)
        ),
        "any",
    )
    reads = [(n, 1) for n in ("q", "k", "v", "up", "head")]
    writes = [(n, 0) for n in ("o", "down")]
    return PermutationSpec(
        (
            free("stream", 20, ("embed", 1), ("norm", 0), *reads, *writes),
            Group("heads", (qk, vo), tree),
            free("gate", 24, Site("up", 0, range(24)), Site("up", 0, range(24, 48)), ("down", 1)),
        ),
        {
            "embed": (30, 20), "norm": (20,), "q": (20, 20), "q.bias": (20,), "k": (20, 20), "v": (24, 20),
            "o": (20, 24), "up": (48, 20), "down": (20, 24), "head": (10, 20),
        },
    )  # fmt: skip


def recurrent() -> PermutationSpec:
    """A recurrent matrix: its group meets it on both axes, and the objective is quadratic."""
    return PermutationSpec(
        (free("h", 32, ("in", 0), ("b", 0), ("again", 0), ("again", 1), ("out", 1)),),
        {"in": (32, 10), "b": (32,), "again": (32, 32), "out": (4, 32)},
    )


def bilinear() -> PermutationSpec:
    """Two cells of one group on the two axes of one tensor, each by itself linear."""
    cells = (
        Cell("x", 12, (Site("wx", 0, range(12)), Site("form", 0, range(12)))),
        Cell("y", 10, (Site("wy", 0, range(10)), Site("form", 1, range(10)))),
    )
    tree = Branch((Leaf(0, range(12)), Leaf(1, range(10))), "fixed")
    return PermutationSpec((Group("xy", cells, tree),), {"wx": (12, 30), "wy": (10, 30), "form": (12, 10)})


def chain() -> PermutationSpec:
    """Nine hidden layers of 8: information takes many sweeps to get through."""
    layers = tuple(free(f"h{k}", 8, (f"w{k}", 0), (f"w{k + 1}", 1)) for k in range(9))
    return PermutationSpec(layers, {f"w{k}": (8, 8) for k in range(10)})


SPECS: dict[str, Callable[[], PermutationSpec]] = {
    f.__name__: f for f in (mlp, conv_flatten_linear, group_norm, attention, recurrent, bilinear)
}


def draw(spec: PermutationSpec, seed: int, dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in spec.shapes.items()}


def noisy(state: State, noise: float, seed: int = 99) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: t + noise * t.std(correction=0) * torch.randn(t.shape, generator=generator)
        for n, t in state.items()
    }


def planted(spec: PermutationSpec, noise: float, seed: int = 5) -> tuple[State, State, Permutation]:
    """A, B = A permuted plus noise, and the permutation that brings B back."""
    a = draw(spec, seed)
    hidden = spec.random(seed + 1)
    return a, hidden.apply(noisy(a, noise)), hidden.invert()


def objective(spec: PermutationSpec, a: State, b: State) -> float:
    return math.fsum(inner(a[n], b[n]) for n in spec.axes if n not in spec.buffers)


def squared(spec: PermutationSpec, a: State, b: State) -> float:
    return math.fsum(
        float((a[n].double() - b[n].double()).square().sum()) for n in spec.axes if n not in spec.buffers
    )


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("init", ["identity", "forward"])
def test_a_planted_permutation_is_recovered_completely(name: str, noise: float, init: Any) -> None:
    spec = SPECS[name]()
    a, b, back = planted(spec, noise)
    result = weight_matching(spec, a, b, init=init)
    assert result.permutation == back
    assert result.converged
    assert result.distance_after <= result.distance_before
    if noise == 0:
        assert result.distance_after == 0


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("init", ["identity", "forward"])
def test_a_b_too_large_to_be_held_gives_the_same(
    name: str, init: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SPECS[name]()
    a, b, _ = planted(spec, 0.3)
    held = weight_matching(spec, a, b, init=init)
    monkeypatch.setattr("rebasin.matching.weights.endpoints.HELD", 200)
    assert Endpoints(spec, a, b)._followed  # pyright: ignore[reportPrivateUsage]
    followed = weight_matching(spec, a, b, init=init)
    assert followed.permutation == held.permutation
    assert (followed.sweeps, followed.distance_after) == (held.sweeps, held.distance_after)


def networks() -> dict[str, tuple[Any, tuple[Tensor, ...], dict[str, Tensor]]]:
    """Real models, their specs to be traced: (model, example arguments, example keywords)."""
    from transformers import ViTConfig, ViTModel

    from rebasin.models import MLP, VGG, ResNet
    from rebasin.models.tiny_sd import new_unet

    images = (torch.zeros(2, 3, 16, 16),)
    vit = ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=16,
        patch_size=4,
    )
    unet = new_unet(0)
    denoise = {
        "sample": torch.zeros(1, unet.config["in_channels"], 8, 8),
        "timestep": torch.tensor([1]),
        "encoder_hidden_states": torch.zeros(1, 8, unet.config["cross_attention_dim"]),
    }
    return {
        "mlp": (MLP(width=64), (torch.zeros(2, 64),), {}),
        "vgg": (VGG(11, 16, "batch"), images, {}),
        "resnet": (ResNet(1, "batch", blocks=1), images, {}),
        "resnet with group norm": (ResNet(1, "group", blocks=1), images, {}),
        "vision transformer": (ViTModel(vit).eval(), images, {}),
        "diffusion unet": (unet, (), denoise),
    }


def test_planted_permutations_of_real_networks_are_recovered() -> None:
    import rebasin

    for name, (model, args, kwargs) in networks().items():
        spec = rebasin.trace(model, *args, **kwargs)
        for noise in (0.0, 0.3, 1.0):
            a, b, back = planted(spec, noise)
            for init in ("identity", "forward") if noise < 1 else ("forward",):
                result = weight_matching(spec, a, b, init=init)
                right = sum(int((i == back.index[n]).sum()) for n, i in result.permutation.index.items())
                assert right >= (1 if noise < 1 else 0.92) * spec.neurons, (name, noise, init)
                assert result.converged
                if init == "forward" and noise < 1:
                    assert result.sweeps == 1  # the first guess was it already


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("order", ["random", "forward", "backward"])
@pytest.mark.parametrize("normalize", ["repeats", "noise", "tensor", "paper"])
def test_the_objective_never_falls_and_is_what_it_says(name: str, order: Any, normalize: Any) -> None:
    spec = SPECS[name]()
    a, b = draw(spec, 1), draw(spec, 2)  # nothing to find: the hardest case
    result = weight_matching(spec, a, b, order=order, normalize=normalize)
    assert spec.contains(result.permutation)
    assert result.converged
    assert all(update.gain >= 0 for sweep in result.history for update in sweep.updates)
    for before, after in zip(result.history, result.history[1:], strict=False):
        gained = sum(update.gain for update in after.updates)
        assert after.objective - before.objective == pytest.approx(gained, rel=1e-9, abs=1e-9)
    moved = result.permutation.apply(b)
    assert result.history[-1].objective == result.objective
    assert result.moved == result.permutation.moved() == sum(result.moved_per_group.values())
    assert result.distance_after**2 == pytest.approx(squared(spec, a, moved), rel=1e-9)
    if normalize == "paper":
        assert result.objective == pytest.approx(objective(spec, a, moved), rel=1e-9)
        assert result.initial_objective == pytest.approx(objective(spec, a, b), rel=1e-9)
        norms = squared(spec, a, {n: torch.zeros_like(t) for n, t in a.items()})
        norms += squared(spec, b, {n: torch.zeros_like(t) for n, t in b.items()})
        assert result.distance_after**2 == pytest.approx(norms - 2 * result.objective, rel=1e-9)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("normalize", ["repeats", "noise", "paper"])
def test_it_ends_where_no_group_can_be_improved(name: str, normalize: Any) -> None:
    spec = SPECS[name]()
    a, b = draw(spec, 3), draw(spec, 4)
    result = weight_matching(spec, a, b, normalize=normalize)
    pair = Endpoints(spec, a, b, normalize=normalize)
    pair.set(result.permutation)
    assert pair.objective == pytest.approx(result.objective, rel=1e-12)
    again = weight_matching(spec, a, b, init=result.permutation, normalize=normalize)
    assert again.permutation == result.permutation
    assert again.sweeps == 1
    aligned = result.permutation.apply(b)
    assert weight_matching(spec, a, aligned, normalize=normalize).permutation.is_identity
    if name not in ("recurrent", "bilinear", "conv_flatten_linear"):
        for group in spec:
            assert assign(group, WeightCosts(pair)).gain <= 1e-6 * abs(result.objective)


@pytest.mark.parametrize("name", ["mlp", "group_norm", "attention"])
def test_a_cost_matrix_says_what_the_objective_does(name: str) -> None:
    spec = SPECS[name]()
    a, b = draw(spec, 1, torch.float64), draw(spec, 2, torch.float64)
    pair = Endpoints(spec, a, b)
    pair.set(spec.random(0))
    for group in spec:
        stay, index = pair.permutation, spec.random(3).index
        costs = WeightCosts(pair)
        for cell in group.cells:
            assert torch.allclose(
                costs.block(cell.name, np.arange(cell.size)[::-1].copy()).flip(0, 1),
                costs.block(cell.name, range(cell.size)),
            )
        predicted = sum(
            float(c[range(len(c)), index[cell.name]].sum() - c.trace())
            for cell in group.cells
            for c in [costs.block(cell.name, range(cell.size))]
        )
        moved = Permutation(
            spec,
            {n: i[index[n]] if n in {c.name for c in group.cells} else i for n, i in stay.index.items()},
        )
        true = objective(spec, a, moved.apply(b)) - objective(spec, a, stay.apply(b))
        assert predicted == pytest.approx(true, rel=1e-9)
        assert pair.propose(group, index).gain == pytest.approx(true, rel=1e-9)


def test_buffers_move_but_do_not_count() -> None:
    spec = conv_flatten_linear()
    a, b, back = planted(spec, 0.1)
    b = b | {n: 1e6 * torch.randn(16) for n in spec.buffers}
    result = weight_matching(spec, a, b)
    assert result.permutation == back
    moved = result.permutation.apply(b)
    for name in spec.buffers:
        assert torch.equal(moved[name], b[name][result.permutation.index["c0"]])


def test_tied_weights_count_once_under_whichever_name_they_have() -> None:
    spec = conv_flatten_linear()
    a, b, _ = planted(spec, 0.3)
    expected = weight_matching(spec, a, b)
    renamed = {("tied" if n == "w1" else n): t for n, t in b.items()}
    both = b | {"tied": b["w1"]}
    for other in (renamed, both):
        assert weight_matching(spec, a, other).objective == expected.objective


def test_normalising_makes_every_tensor_count_the_same() -> None:
    spec = mlp()
    a, b, back = planted(spec, 0.1)
    # An enormous parameter that says nothing drowns the rest.
    a["w2"], b["w2"] = 1e4 * draw(spec, 50)["w2"], 1e4 * draw(spec, 51)["w2"]
    found = [weight_matching(spec, a, b, normalize=n) for n in ("paper", "tensor", "noise")]
    agree = [sum(int((i == back.index[n]).sum()) for n, i in r.permutation.index.items()) for r in found]
    assert agree[0] < 0.6 * spec.neurons
    assert min(agree[1:]) > 0.8 * spec.neurons
    assert found[1].objective <= len(spec.axes)


def test_numbers_that_say_one_thing_count_as_one() -> None:
    """Gains for every pixel that differ by their means alone, and a bias in other units: noise weights see through."""
    spec = mlp()
    a, b, back = planted(spec, 0.5)
    many = 400
    groups = tuple(_with_site(group, "gains") for group in spec.groups)
    spec = replace(spec, groups=groups, shapes={**spec.shapes, "gains": (32, many)})
    for state, seed in ((a, 60), (b, 61)):
        levels = torch.randn(32, 1, generator=torch.Generator().manual_seed(seed))
        state["gains"] = (
            3 + levels + 0.01 * torch.randn(32, many, generator=torch.Generator().manual_seed(seed))
        )
    right = {}
    for normalize in ("paper", "noise", "repeats"):
        found = weight_matching(spec, a, b, normalize=normalize).permutation
        right[normalize] = int((found.index["h0"] == back.index["h0"]).sum())
    assert right["paper"] < 16 < 30 <= min(right["noise"], right["repeats"])


def _with_site(group: Group, name: str) -> Group:
    cells = [
        replace(c, sites=(*c.sites, Site(name, 0, range(32)))) if c.name == "h0" else c for c in group.cells
    ]
    return replace(group, cells=tuple(cells))


def test_noise_weights_are_those_of_the_covariance() -> None:
    """tr S / tr S^2, one over the variance for independent numbers; no matter in which order slices and numbers are."""
    random = torch.Generator().manual_seed(0)
    x, y = (2 * torch.randn(48, 300, generator=random) for _ in range(2))
    assert noise_weight(x, y, [0]) == pytest.approx(1 / 4, rel=0.05)
    assert noise_weight(x, y, [0, 1]) == pytest.approx(1 / 4, rel=0.05)
    shared = torch.randn(48, 1, generator=random).expand(48, 300)
    assert noise_weight(shared, shared, [0]) == pytest.approx(1 / 300 / float(shared[:, 0].var()), rel=0.05)
    order = torch.randperm(48, generator=random)
    assert noise_weight(x, y[order], [0]) == pytest.approx(noise_weight(x, y, [0]), rel=1e-12)
    assert noise_weight(10 * x, y, [0]) == pytest.approx(noise_weight(x, y, [0]) / 10, rel=1e-6)
    assert repeats_weight(x, y, [0]) == repeats_weight(shared, shared, [0, 1]) == 1
    assert repeats_weight(shared, shared, [0]) == pytest.approx(1 / 300, rel=0.05)
    assert repeats_weight(torch.ones(8, 3), torch.ones(8, 3), [0]) == 1
    assert noise_weight(torch.ones(8, 3), torch.ones(8, 3), [0]) == 0
    assert noise_weight(1 + 1e-6 * x, 1 + 1e-6 * y, [0]) < 1e5  # no more than float32 can do with its mean
    assert 0 < noise_weight(x[:, 0], y[:, 0], [0]) < 1


def test_nothing_that_was_passed_in_is_changed() -> None:
    spec = attention()
    a, b = draw(spec, 1), draw(spec, 2)
    init = spec.random(3)
    before = [{n: t.clone() for n, t in s.items()} for s in (a, b)]
    index = {n: i.copy() for n, i in init.index.items()}
    result = weight_matching(spec, a, b, init=init, normalize="paper")
    assert result.permutation != init
    for state, kept in zip((a, b), before, strict=True):
        assert all(torch.equal(t, kept[n]) for n, t in state.items())
    assert all(np.array_equal(i, index[n]) for n, i in init.index.items())
    assert result.initial_objective == pytest.approx(objective(spec, a, b))
    assert result.history[0].objective == pytest.approx(objective(spec, a, init.apply(b)))


def test_states_may_be_lazy_have_further_keys_and_half_precision() -> None:
    spec = mlp()
    a, b, back = planted(spec, 0.1)

    class Lazy(dict[str, Tensor]):
        read = 0

        def __getitem__(self, name: str) -> Tensor:
            Lazy.read += 1
            return super().__getitem__(name).clone()

    state = Lazy({n: t.half() for n, t in b.items()} | {"step": torch.tensor(3)})
    result = weight_matching(spec, Lazy(a), state)
    assert result.permutation == back
    assert Lazy.read > 0
    assert result.permutation.apply(state)["w0"].dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
@pytest.mark.parametrize("init", ["identity", "forward", "random"])
def test_states_of_few_bits_are_moved_too(dtype: torch.dtype, init: Any) -> None:
    """Whole axes and slices of them; torch writes no slices of float8."""
    spec = mlp()
    for seed in range(4):
        a, b = draw(spec, 2 * seed), draw(spec, 2 * seed + 1)
        low = {name: tensor.to(dtype) for name, tensor in b.items()}
        wide = {name: tensor.to(b[name]) for name, tensor in low.items()}
        found = weight_matching(spec, a, low, init=init, seed=seed)
        assert found.permutation == weight_matching(spec, a, wide, init=init, seed=seed).permutation


def test_restarts_keep_the_best_and_tell_the_spread() -> None:
    spec = mlp()
    a, b = draw(spec, 1), draw(spec, 2)
    result = weight_matching(spec, a, b, init="identity", restarts=6, normalize="paper")
    alone = weight_matching(spec, a, b, init="identity", normalize="paper")
    assert len(result.restarts) == 6
    assert result.restarts[0] == alone.objective
    assert result.objective == max(result.restarts)
    assert result.spread == max(result.restarts) - min(result.restarts) > 0
    assert objective(spec, a, result.permutation.apply(b)) == pytest.approx(result.objective, rel=1e-12)
    # In a fixed order only another start makes another descent.
    assert weight_matching(spec, a, b, restarts=3, order="forward").spread > 0


def test_max_sweeps_ends_it_unconverged() -> None:
    spec = mlp()
    result = weight_matching(spec, draw(spec, 1), draw(spec, 2), max_sweeps=1)
    assert not result.converged
    assert result.sweeps == 1


def test_the_order_can_be_given_and_decides_the_path() -> None:
    spec = attention()
    a, b = draw(spec, 1), draw(spec, 2)
    asked: list[tuple[int, int]] = []

    def backward(sweep: int, groups: int) -> list[int]:
        asked.append((sweep, groups))
        return list(range(groups))[::-1]

    given = weight_matching(spec, a, b, order=backward)
    named = weight_matching(spec, a, b, order="backward")
    assert asked == [(k, 3) for k in range(given.sweeps)]
    assert given.permutation == named.permutation
    assert [u.group for u in given.history[1].updates] == ["gate", "heads", "stream"]


def test_a_group_is_looked_at_again_only_after_a_neighbour_moved() -> None:
    spec = chain()
    near = neighbours(spec)
    assert near[0] == {1}
    assert near[4] == {3, 5}
    result = weight_matching(spec, draw(spec, 1), draw(spec, 2))
    changed: dict[str, set[str]] = {}
    for sweep in result.history[1:]:
        for update in sweep.updates:
            names = changed.get(update.group)
            assert names is None or names, f"{update.group} was recomputed though nothing near it had changed"
            changed[update.group] = set()
            if update.moved:
                for k in near[int(update.group[1:])]:
                    if f"h{k}" in changed:
                        changed[f"h{k}"].add(update.group)
    assert all(not names for names in changed.values())  # the proof of convergence
    assert sum(len(s.updates) for s in result.history) < result.sweeps * len(spec)


@pytest.mark.parametrize("name", ["group_norm", "attention", "mlp"])
def test_threads_change_nothing(name: str) -> None:
    spec = SPECS[name]()
    a, b = draw(spec, 1), draw(spec, 2)
    alone, together = (weight_matching(spec, a, b, workers=w) for w in (1, 4))
    assert alone.permutation == together.permutation
    assert alone.objective == together.objective
    assert [s.updates for s in alone.history] == [s.updates for s in together.history]


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_tf32_is_as_asked_and_as_before_afterwards(wanted: bool, before: bool) -> None:
    seen: list[object] = []

    def order(sweep: int, groups: int) -> range:
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        return range(groups)

    spec = attention()
    with tensor_cores(before):
        weight_matching(spec, draw(spec, 1), draw(spec, 2), order=order, tf32=wanted)
        assert torch.backends.cuda.matmul.allow_tf32 is before
    assert seen and set(seen) == {wanted}


def test_threads_wait_for_earlier_groups_that_share_a_tensor() -> None:
    spec = group_norm()
    before = sharing(spec)
    assert before[2] == {
        1
    }  # the concatenation: on the same axis, so no neighbours, yet they write one tensor
    assert neighbours(spec)[2] == frozenset()
    rng = np.random.default_rng(0)
    for _ in range(30):
        n = 12
        links = [frozenset(int(x) for x in rng.choice(n, 2)) - {k} for k in range(n)]
        links = [frozenset({j for j in range(n) if j in links[k] or k in links[j]}) for k in range(n)]
        order = rng.permutation(n).tolist()
        done: list[int] = []
        run_in_order(done.append, order, links, workers=4)
        assert sorted(done) == list(range(n))
        for k in range(n):
            for j in links[k]:
                assert (done.index(j) < done.index(k)) == (order.index(j) < order.index(k))


def test_an_error_in_a_thread_reaches_the_caller() -> None:
    def fail(group: int) -> None:
        raise ConfigError(f"group {group}")

    with pytest.raises(ConfigError, match="group 0"):
        run_in_order(fail, [0], [frozenset()], workers=2)


@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize("init", ["identity", "forward"])
def test_an_interrupted_run_ends_as_if_it_never_was(tmp_path: Path, restarts: int, init: Any) -> None:
    spec = chain()
    a, b = draw(spec, 1), draw(spec, 2)
    states: list[MatchState] = []
    whole = weight_matching(spec, a, b, init=init, restarts=restarts, checkpoint=states.append)
    assert len(states) > 2
    for k in (0, len(states) // 2, len(states) - 1):
        path = tmp_path / f"{k}.safetensors"
        states[k].save(path)
        resumed = MatchState.load(path)
        continued = weight_matching(spec, a, b, init=init, restarts=restarts, resume_from=resumed)
        assert continued.permutation == whole.permutation
        assert continued.objective == whole.objective
        assert continued.restarts == whole.restarts
        assert continued.converged
        assert [(s.number, s.objective, s.updates) for s in continued.history] == [
            (s.number, s.objective, s.updates) for s in whole.history
        ]
        assert continued.seconds > states[k].seconds
    assert not list(tmp_path.glob("*.part*"))


def test_only_the_same_run_can_be_continued(tmp_path: Path) -> None:
    spec = mlp()
    a, b = draw(spec, 1), draw(spec, 2)
    states: list[MatchState] = []
    weight_matching(spec, a, b, checkpoint=states.append)
    with pytest.raises(ConfigError, match="its seed differed"):
        weight_matching(spec, a, b, seed=1, resume_from=states[0])
    with pytest.raises(ConfigError, match="its weights differed"):
        weight_matching(spec, a, draw(spec, 3), resume_from=states[0])
    other = attention()
    with pytest.raises(ConfigError, match="its architecture differed"):
        weight_matching(other, draw(other, 1), draw(other, 2), resume_from=states[0])
    path = tmp_path / "p.safetensors"
    states[0].current.permutation.save(path)
    with pytest.raises(CheckpointError, match="holds no interrupted matching"):
        MatchState.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="is a line of text"):
        MatchState.load(path)


def test_progress_tells_where_it_stands() -> None:
    spec = attention()
    events: list[dict[str, object]] = []
    result = weight_matching(spec, draw(spec, 1), draw(spec, 2), progress=events.append, max_sweeps=50)
    assert [e["step"] for e in events] == list(range(1, result.sweeps + 1))
    assert all(e["stage"] == "weight matching" and e["total"] == 50 for e in events)
    assert events[-1]["objective"] == result.objective
    assert events[-1]["moved"] == result.moved
    assert {"seconds", "restart"} <= events[0].keys()
    assert result.to_dict()["history"][0]["number"] == 0


def test_progress_within_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rebasin.matching.weights.initial.EVERY", 0.0)
    spec = attention()
    events: list[dict[str, Any]] = []
    result = weight_matching(spec, draw(spec, 1), draw(spec, 2), init="forward", progress=events.append)
    within = [event for event in events if event["stage"].endswith("group")]
    assert {event["stage"].split(", ")[1] for event in within} >= {"first guess", "sweep 1"}
    assert all(1 <= event["step"] <= event["total"] == len(spec) and event["left"] >= 0 for event in within)
    assert [event["step"] for event in events if event not in within] == list(range(1, result.sweeps + 1))


def described() -> str:
    spec = attention()
    found = weight_matching(spec, draw(spec, 1), draw(spec, 2), restarts=2, seed=3)
    index = {name: places.tolist() for name, places in found.permutation.index.items()}
    return f"{found.objective!r} {index} {found.restarts}"


def test_the_same_in_every_process() -> None:
    program = "import test_weight_matching as t, torch; torch.set_num_threads(1); print(t.described())"
    salt = "1" if os.environ.get("PYTHONHASHSEED") == "2" else "2"
    there = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parent,
        env={"PYTHONHASHSEED": salt, "PATH": "", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert there.stdout.strip() == described()


@pytest.mark.parametrize("name", ["mlp", "group_norm", "attention"])
def test_exchange_losses_are_what_the_best_exchange_costs(name: str) -> None:
    spec = SPECS[name]()
    a, b = draw(spec, 1), draw(spec, 2)
    found = weight_matching(spec, a, b, normalize="paper").permutation
    losses = exchange_losses(spec, a, b, found, normalize="paper")
    best = objective(spec, a, found.apply(b))
    for group in spec:
        least = math.inf
        for leaf in leaves(group.tree):
            cell = group.cells[leaf.cell].name
            for i, j in itertools.combinations(leaf.neurons, 2):
                index = found.index[cell].copy()
                index[[i, j]] = index[[j, i]]
                swapped = Permutation(spec, {**found.index, cell: index})
                least = min(least, best - objective(spec, a, swapped.apply(b)))
        assert losses[group.name] == pytest.approx(least, rel=1e-3, abs=1e-3)
        assert least > 0
    quadratic = recurrent()
    assert exchange_losses(quadratic, draw(quadratic, 1), draw(quadratic, 2), quadratic.identity()) == {}


def test_bad_weights_are_named_before_any_work() -> None:
    spec = mlp()
    good = draw(spec, 1)

    def check(error: type[Exception], pattern: str, a: State = good, b: State = good, **options: Any) -> None:
        with pytest.raises(error, match=pattern):
            weight_matching(spec, a, b, **options)

    for value in (math.nan, math.inf):
        bad = good | {"w1": good["w1"].clone().index_fill_(0, torch.tensor([3]), value)}
        check(CheckpointError, "Tensor 'w1' of A has NaN or infinite values", a=bad)
        check(CheckpointError, "Tensor 'w1' of B has NaN or infinite values", b=bad)
    check(SpecMismatchError, "B has no tensor 'b1'", b={n: t for n, t in good.items() if n != "b1"})
    check(SpecMismatchError, r"Tensor 'w2' of A has shape \(5, 25\)", a=good | {"w2": torch.zeros(5, 25)})
    check(CheckpointError, "Tensor 'w0' of B is int8, not floating point", b=good | {"w0": good["w0"].char()})
    check(ConfigError, "random, forward, backward or a function as order, not 'sideways'", order="sideways")
    check(ConfigError, "identity, forward, random or a Permutation as init, not 'best'", init="best")
    check(ConfigError, "normalize is 'layer'; choose one of repeats, paper, tensor, noise", normalize="layer")
    check(ConfigError, "at least 1", restarts=0)
    check(ConfigError, "numbers 0 to 1 once", order=lambda sweep, groups: [0, 0])
    check(SpecMismatchError, "another architecture", init=attention().identity())


def test_an_illegal_start_is_refused() -> None:
    spec = group_norm()
    index = {n: np.arange(c.size) for n, c in spec.cells.items()}
    index["inside"][[0, 6]] = [6, 0]  # across two groups of the GroupNorm
    with pytest.raises(SpecMismatchError, match="illegal"):
        weight_matching(spec, draw(spec, 1), draw(spec, 2), init=Permutation(spec, index))


def test_dead_neurons_stay_where_they_are() -> None:
    spec = mlp()
    a, b, back = planted(spec, 0.1)
    dead = [3, 7, 20]
    for state, where in ((a, dead), (b, back.index["h0"][dead])):
        state["w0"][where] = state["b0"][where] = 0
        state["w1"][:, where] = 0
    result = weight_matching(spec, a, b)
    alive = np.setdiff1d(np.arange(32), dead)
    assert np.array_equal(result.permutation.index["h0"][alive], back.index["h0"][alive])
    nothing = {n: torch.zeros_like(t) for n, t in a.items()}
    assert weight_matching(spec, nothing, b).permutation.is_identity
    assert weight_matching(spec, nothing, b, normalize="tensor").converged
    assert weight_matching(spec, nothing, b, normalize="paper").permutation.is_identity


def test_a_spec_without_groups_has_nothing_to_do() -> None:
    spec = PermutationSpec((), {"w": (2, 2)})
    result = weight_matching(spec, {"w": torch.ones(2, 2)}, {"w": torch.ones(2, 2)})
    assert result.converged
    assert result.sweeps == 0
    assert result.objective == 0
