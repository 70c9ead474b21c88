"""Weight matching with maps: planted alignments are found, steps never lose, gauges are gauges."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from test_maps import Residual, known, standard
from torch import Tensor, nn

import rebasin
from experiments.zoo import ZOO
from rebasin.errors import DataError, SpecMismatchError
from rebasin.matching import learned_matching
from rebasin.matching.maps import activation_alignment, weight_alignment
from rebasin.matching.maps.gauge import canonical, rows
from rebasin.matching.maps.matching import procrustes, touched_by
from rebasin.models import tiny_sd
from rebasin.spec import Alignment, PermutationSpec

State = dict[str, Tensor]


def drawn(spec: PermutationSpec, seed: int = 0, dtype: torch.dtype = torch.float64) -> State:
    """Weights as trainings leave them: matrices of unit gain, gains around one, small biases."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in spec.shapes.items():
        noise = torch.randn(shape, generator=generator, dtype=dtype)
        gain = len(shape) == 1 and name.endswith("weight")
        state[name] = noise * (0.1 if len(shape) < 2 else math.prod(shape[1:]) ** -0.5) + gain
    return state


def noisy(state: State, share: float) -> State:
    torch.manual_seed(5)
    return {n: t + share * t.std() * torch.randn_like(t) if t.numel() > 1 else t for n, t in state.items()}


def apart(a: State, b: State) -> float:
    return math.sqrt(sum(float((b[n] - t).square().sum()) for n, t in a.items()))


def model_of(name: str) -> tuple[nn.Module, tuple, dict]:
    torch.manual_seed(0)
    if name == "residual":
        return Residual(), (torch.randn(2, 5, 12),), {}
    family = (
        "blocks" if name in ZOO["blocks"] else "transformers" if name in ZOO["transformers"] else "diffusers"
    )
    return ZOO[family][name](False)


PLANTED = [
    "residual",
    "rope_gqa",
    "conv_flatten_linear",
    "gpt2",
    "llama_gqa",
    "vit_classifier_logits",
    "transformer_encoder",
]


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_alignment_is_found(name: str) -> None:
    """Permutation, rotations, matrices in heads, scales, signs at once: to rounding, and to the noise."""
    model, args, kwargs = model_of(name)
    spec = rebasin.trace(model, *args, **kwargs)
    a = drawn(spec)
    planted = spec.random_alignment(7).invert()
    norm = apart(a, {n: torch.zeros_like(t) for n, t in a.items()})
    found = weight_alignment(spec, a, planted.apply(a))
    assert found.converged and not found.left_out
    assert found.distance_after < 1e-4 * norm < 0.3 * found.distance_before
    near = noisy(a, 0.1)
    found = weight_alignment(spec, a, planted.apply(near))
    assert found.distance_after < 1.1 * apart(a, near)
    moved = found.alignment.apply(planted.apply(near))
    names = touched_by(spec)
    told = apart({n: a[n] for n in names}, {n: moved[n] for n in names})
    assert told == pytest.approx(found.distance_after)


def test_a_planted_alignment_of_the_embedded_unet_is_found() -> None:
    """Trained weights: a permutation and random maps of all groups, without noise and with it."""
    model, spec, _ = trained_unet()
    a = dict(model.state_dict())
    planted, names = spec.random_alignment(7).invert(), touched_by(spec)
    norm = math.sqrt(sum(float(a[name].square().sum()) for name in names))
    for share in (0.0, 0.1):
        near = noisy(a, share)
        found = weight_alignment(spec, a, planted.apply(near))
        there = apart({n: a[n] for n in names}, {n: near[n] for n in names})
        assert found.converged and found.distance_before > norm
        assert found.distance_after < 1e-4 * norm + 1.01 * there


def test_no_sweep_loses_and_the_function_stays() -> None:
    model, spec, x = standard()
    a, b = drawn(spec, 0), drawn(spec, 1)
    found = weight_alignment(spec, a, b)
    objectives = [sweep.objective for sweep in found.history]
    assert objectives == sorted(objectives) and found.initial_objective < objectives[0]
    model.load_state_dict(b)
    wanted = model(x)
    model.load_state_dict(found.alignment.apply(b))
    torch.testing.assert_close(model(x), wanted, rtol=1e-9, atol=1e-9)
    again = weight_alignment(spec, a, b)
    assert again.alignment.is_close(found.alignment, 1e-12) and again.to_dict()["left_out"] == {}
    better = rebasin.weight_matching(spec, a, b)
    assert found.distance_after < better.distance_after


def test_a_gauge_is_the_same_for_all_that_compute_the_same() -> None:
    """Up to a permutation and orthogonal matrices: gains are one, writers as large as readers, Gram matrices equal."""
    _, spec, _ = standard()
    a = drawn(spec)
    for state in (a, spec.random_alignment(3).apply(a)):
        gauged = canonical(spec, state).apply(state)
        for group in spec.continuous:
            gram = torch.zeros(2, group.count, group.size, group.size, dtype=torch.float64)
            for site in group.sites:
                own = rows(site, gauged[site.parameter], group.count)
                gram[int(site.power < 0)] += own @ own.mT
            if group.kind == "invertible" or group.name.startswith("parts.1"):
                torch.testing.assert_close(gram[0], gram[1], rtol=1e-6, atol=1e-9)
        for k in range(3):
            torch.testing.assert_close(gauged[f"norms.{k}.weight"], torch.ones(12).double())
    first, second = (canonical(spec, s).apply(s) for s in (a, spec.random_alignment(3).apply(a)))
    for name, tensor in first.items():
        assert float(second[name].norm()) == pytest.approx(float(tensor.norm()), rel=1e-6), name


def test_procrustes_is_the_best_of_its_kind() -> None:
    _, spec, _ = standard()
    generator = torch.Generator().manual_seed(0)
    for group in spec.continuous:
        shape = (group.neurons, 1, 1) if len(group.shape) == 1 else group.shape
        products = torch.randn(shape, generator=generator, dtype=torch.float64)
        best = procrustes(group, products)
        if group.kind.startswith("rotations"):
            assert group.distance(best) < 1e-12
            others = [group.random(generator) for _ in range(200)]
            assert all((other * products).sum() < (best * products).sum() for other in others)
        elif group.kind == "scales":
            assert (best * products.reshape(-1)).min() >= 0


def test_gains_that_no_scale_takes_away_hold_their_stream() -> None:
    _, spec, _ = known("rms norm, one plus gain")
    a = drawn(spec)
    result = weight_alignment(spec, a, spec.random_alignment(1).apply(a))
    assert result.left_out == {"enter.weight[0]": "gains stand before it that no scale takes away"}
    assert "enter.weight[0]" not in result.alignment.maps


def inputs(args: tuple, kwargs: dict[str, Any], count: int) -> list[tuple[tuple, dict[str, Any]]]:
    """Batches like an example call's, of random numbers: enough to tell all dimensions of a stream."""

    def drawn_like(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        shape = (16, *value.shape[1:])
        return torch.randint(0, 60, shape) if not value.is_floating_point() else torch.randn(shape).double()

    return [
        (tuple(map(drawn_like, args)), {name: drawn_like(value) for name, value in kwargs.items()})
        for _ in range(count)
    ]


def trained_unet() -> tuple[nn.Module, PermutationSpec, list[tuple[tuple, dict[str, Any]]]]:
    """The embedded UNet in double precision, its spec, and batches of noise."""
    model = tiny_sd.load_unet("seed0")
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    shape = (16, config.in_channels, config.sample_size, config.sample_size)
    width = config.cross_attention_dim
    data = [
        (
            (
                torch.randn(shape, generator=generator).double(),
                torch.randint(0, 1000, (16,), generator=generator),
                torch.randn(16, 1, width, generator=generator).double(),
            ),
            {},
        )
        for _ in range(6)
    ]
    x, times, condition = data[0][0]
    spec = rebasin.trace(model, x[:2].float(), times[:2], condition[:2].float())
    return model.double().eval(), spec, data


@pytest.mark.parametrize(
    "name", ["residual", "rope_gqa", "gpt2", "llama_gqa", "vit_classifier_logits", "trained unet"]
)
def test_a_planted_alignment_is_found_by_activations(name: str) -> None:
    """To rounding, and close to the noise; signs behind norms and groups that are seen nowhere (RoPE) included."""
    if name == "trained unet":
        model, spec, data = trained_unet()
    else:
        model, args, kwargs = model_of(name)
        spec = rebasin.trace(model, *args, **kwargs)
        model = model.double().eval()
        model.load_state_dict({**model.state_dict(), **drawn(spec)}, strict=False)
        data = inputs(args, kwargs, 6)
    other = copy.deepcopy(model)
    a = {n: t.clone() for n, t in model.state_dict().items()}
    planted, names = spec.random_alignment(7).invert(), touched_by(spec)
    norm = math.sqrt(sum(float(a[n].square().sum()) for n in names))
    for share in (0.0, 0.1):
        near = noisy(a, share)
        other.load_state_dict(planted.apply(near))
        found = activation_alignment(
            spec, model, other, data, tokens=None, forward=lambda m, batch: m(*batch[0], **batch[1])
        )
        there = apart({n: a[n] for n in names}, {n: near[n] for n in names})
        assert not found.left_out and found.objective >= found.initial_objective
        assert found.distance_after < 1e-4 * norm + 1.25 * there and norm < found.distance_before
        assert bool(found.fallback) == (name in ("rope_gqa", "llama_gqa"))
    assert all(torch.equal(t, a[n]) for n, t in model.state_dict().items())


class Block(nn.Module):
    """A block of a transformer whose heads have matrices on one side, and permutations or signs on the other."""

    def __init__(self, kind: str, n: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.kind, self.heads = kind, heads
        self.enter, self.leave = nn.Linear(6, n), nn.Linear(n, 4)
        self.norm, self.last = nn.RMSNorm(n), nn.RMSNorm(n)
        self.q, self.k, self.v, self.out, self.gate = (nn.Linear(n, n) for _ in range(5))
        width = n // heads if kind == "norms in heads" else n
        self.q_norm, self.k_norm = nn.RMSNorm(width), nn.RMSNorm(width)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        y = self.norm(x)
        q, k, v = self.q(y), self.k(y), self.v(y)
        if self.kind == "norms over all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = self.split(q), self.split(k), self.split(v)
        if self.kind == "norms in heads":
            q, k = self.q_norm(q), self.k_norm(k)
        v = torch.relu(v) if self.kind == "cut values" else v
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = y * torch.sigmoid(self.gate(x)) if self.kind == "gated" else y
        return self.leave(self.last(x + self.out(y)))


class Behind(nn.Module):
    """x + norm(f(x)): the norm lets nothing but signs through."""

    def __init__(self, n: int = 12) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, n), nn.Linear(n, 4)
        self.up, self.down = nn.Linear(n, 20), nn.Linear(20, n)
        self.norm, self.last = nn.RMSNorm(n), nn.RMSNorm(n)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.leave(self.last(x + self.norm(self.down(nn.functional.gelu(self.up(x))))))


class Dynamic(nn.Module):
    """tanh(a x) g + b in the place of a norm."""

    def __init__(self, n: int = 8) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, n), nn.Linear(n, 4)
        self.a, self.g, self.b = (nn.Parameter(torch.randn(k)) for k in (1, n, n))

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.tanh(self.a * self.enter(x)) * self.g + self.b)


class Square(nn.Module):
    """One rotation acts on both axes of a matrix."""

    def __init__(self, n: int = 6) -> None:
        super().__init__()
        self.enter, self.leave, self.square = nn.Linear(6, n), nn.Linear(n, 4), nn.Linear(n, n)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.leave(x + self.square(nn.functional.rms_norm(x, x.shape[-1:])))


BUILT: dict[str, Any] = {
    **{kind: lambda kind=kind: Block(kind) for kind in ("gated", "norms over all", "norms in heads", "cut values")},
    "norm behind": Behind, "dynamic tanh": Dynamic, "both axes": Square,
}  # fmt: skip


@pytest.mark.parametrize("what", ["permutation", "maps", "both"])
@pytest.mark.parametrize("name", BUILT)
def test_what_is_planted_in_a_built_model_is_found_by_both(name: str, what: str) -> None:
    """Blocks whose parts are moved in different ways; nothing is left by weights or by activations."""
    torch.manual_seed(3)
    model = BUILT[name]().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x = torch.randn(4, 5, 6).double()
    spec = rebasin.trace(model, x)
    a = {n: t.clone() for n, t in model.state_dict().items()}
    whole = spec.random_alignment(5)
    planted = {
        "permutation": Alignment.of(spec.random(5)),
        "maps": Alignment(spec.identity(), whole.maps),
        "both": whole,
    }[what]
    other = copy.deepcopy(model)
    other.load_state_dict(planted.apply(a))
    norm = apart(a, {n: torch.zeros_like(t) for n, t in a.items()})
    found = weight_alignment(spec, a, other.state_dict())
    assert found.distance_after < 1e-5 * norm < 1e-4 * found.distance_before
    seen = activation_alignment(spec, model, other, [torch.randn(40, 5, 6).double() for _ in range(4)])
    assert seen.distance_after < 1e-5 * norm


class Few(nn.Module):
    """Six dimensions in eight neurons: no matrix of these is determined."""

    def __init__(self, heads: bool) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(3, 8, bias=False), nn.Linear(8, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, kdim=3) if heads else nn.Linear(8, 8)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(x)
        y = self.attention(y, x, y, need_weights=False)[0] if self.heads else torch.tanh(self.attention(y))
        return self.leave(y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("heads", [False, True])
def test_what_no_weights_determine_is_left_out_and_nothing_gets_worse(
    heads: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = Few(heads).eval()
    spec = rebasin.trace(model, torch.randn(4, 5, 3))
    model = model.to(dtype)
    a = {n: t.clone() for n, t in model.state_dict().items()}
    other = copy.deepcopy(model)
    other.load_state_dict(spec.random_alignment(1).apply(a))
    data = [torch.randn(20, 5, 3).to(dtype) for _ in range(3)]
    wanted = other(data[0])
    for found in (
        weight_alignment(spec, a, other.state_dict()),
        activation_alignment(spec, model, other, data),
    ):
        assert any("dimensions of" in why for why in found.left_out.values())
        assert found.distance_after <= found.distance_before
        moved = copy.deepcopy(other)
        moved.load_state_dict(found.alignment.apply(other.state_dict()))
        torch.testing.assert_close(moved(data[0]), wanted, rtol=1e-4, atol=1e-5)


def test_a_start_without_maps_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the descent ends worse than plain weight matching, that is what is gone on from, or returned."""
    _, spec, _ = standard()
    a = drawn(spec)
    b = spec.random(4).apply(a)
    from rebasin.matching.maps import matching

    monkeypatch.setattr(matching, "_forward", lambda pair: pair.permute(spec.random(9).index))
    monkeypatch.setattr(matching, "_sweep", lambda pair, seed: iter(()))
    assert weight_alignment(spec, a, b).distance_after < 1e-9


def test_batches_of_another_width_are_told() -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)), torch.randn(4, 5)
    spec = rebasin.trace(model, torch.randn(4, 6))
    with pytest.raises(DataError, match=r"batch of \(4, 5\) float32: RuntimeError: mat1"):
        activation_alignment(spec, model, model, [x])
    for batch, words in (
        ({1: x}, "has 1 for the name of an argument"),
        (x.to("meta"), "meta"),
        (x.to_sparse(), "can't compute a batch"),
    ):
        with pytest.raises(DataError, match=words):
            activation_alignment(spec, model, model, [batch])
    with pytest.raises(DataError, match="takes 1 positional argument"):
        activation_alignment(spec, model, model, [x], forward=lambda m: m)  # type: ignore[arg-type,misc]
    for search in (learned_matching, rebasin.straight_through):
        with pytest.raises(DataError, match=r"batch of \(4, 5\) float32: RuntimeError: mat1"):
            search(spec, model, model, lambda m, b: m(b).square().mean(), [x, x], init="identity", steps=1)


def test_a_fault_of_ours_is_no_fault_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a hook of the package raises, inside of torch or not, stays what it is."""
    from rebasin.tensors.moments import Moments

    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 6)
    spec = rebasin.trace(model, x)
    ones = torch.ones(2, 3)
    for bug in (lambda *_: torch.einsum("ij,jk->ik", ones, ones), lambda *_: {}["lost"]):
        monkeypatch.setattr(Moments, "add", bug)
        with pytest.raises((RuntimeError, KeyError)) as caught:
            activation_alignment(spec, model, model, [x])
        assert not isinstance(caught.value, DataError)


def test_batches_without_samples_and_complex_maps_are_told() -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 6)
    spec = rebasin.trace(model, x)
    with pytest.raises(DataError, match="no samples"):
        activation_alignment(spec, model, model, [x[:0]])
    maps = {group.name: group.identity() * (1 + 0.5j) for group in spec.continuous}
    with pytest.raises(SpecMismatchError, match="complex"):
        Alignment(spec.identity(), maps)
