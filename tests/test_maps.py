"""Continuous symmetries: found where they are, proved, a group, and wrong ones are caught."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rebasin
from experiments.zoo import ZOO
from rebasin.errors import CheckpointError, RebasinError, SpecMismatchError
from rebasin.spec import Alignment, ContinuousGroup, MapSite, Permutation, PermutationSpec
from rebasin.tensors import load_safetensors, save_safetensors

C, H = 12, 3


class Attention(nn.Module):
    """Attention by heads, with whatever is to happen to q and k before they meet."""

    def __init__(self, meet: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(C, C) for _ in range(4))
        self.meet = meet

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (H, C // H)).transpose(1, 2) for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(self.meet(q), self.meet(k), v)
        return self.o(out.transpose(1, 2).flatten(2))


class Gated(nn.Module):
    def __init__(self, gate: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.up, self.down, self.gate = nn.Linear(C, 20), nn.Linear(10, C), gate

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).chunk(2, -1)
        return self.down(value * self.gate(gate))


class Written(nn.Module):
    """RMSNorm as most models write it out; `plus`: the gain is 1 + weight."""

    def __init__(self, n: int, plus: float = 0.0) -> None:
        super().__init__()
        self.weight, self.plus = nn.Parameter(torch.ones(n)), plus

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * (self.plus + self.weight if self.plus else self.weight)


class Centred(nn.Module):
    """LayerNorm written out."""

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()


class Residual(nn.Module):
    """A stream of `C` with two parts behind norms; `between` may touch the stream itself."""

    def __init__(
        self,
        norm: Callable[[], nn.Module] = lambda: nn.LayerNorm(C),
        part: Callable[[], nn.Module] = Gated,
        between: Callable[[Tensor], Tensor] = lambda x: x,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(C, C), nn.Linear(C, C)
        self.norms = nn.ModuleList(norm() for _ in range(3))
        self.parts = nn.ModuleList([Attention(), part()])
        self.between, self.tied = between, tied

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.enter(x))
        for norm, part in zip(self.norms, self.parts, strict=False):
            x = x + part(norm(x))
        x = self.norms[2](x)
        return x @ self.enter.weight if self.tied else self.leave(x)


def modulated(x: Tensor) -> Tensor:
    return x * torch.linspace(0.5, 2, C).to(x)


def shifted(x: Tensor) -> Tensor:
    return x + torch.linspace(-1, 1, C).to(x)


class Adaptive(nn.Module):
    """adaLN: what is normalised is scaled and shifted by what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave, self.condition = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, 2 * C)
        self.part, self.norm = nn.Linear(C, C), nn.LayerNorm(C, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.condition(x.mean(1, keepdim=True)).chunk(2, -1)
        h = self.enter(x)
        return self.leave(h + self.part(self.norm(h) * (1 + scale) + shift))


def rotary(x: Tensor) -> Tensor:
    """Pairs (i, i + d / 2) are turned by an angle that grows with the position."""
    d = x.shape[-1]
    angle = torch.outer(torch.arange(x.shape[-2]), 10.0 ** -torch.arange(d // 2)).to(x)
    cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))
    return x * cos + torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1) * sin


def found(model: nn.Module) -> tuple[nn.Module, PermutationSpec, Tensor]:
    """A model in float64 with gains that are not one, its spec, and inputs; the spec is proved."""
    torch.manual_seed(0)
    for p in model.parameters():
        p.data = p.data.double() + 0.3 * torch.randn(p.shape, dtype=torch.float64)
    x = torch.randn(2, 5, C, dtype=torch.float64)
    spec = rebasin.trace(model.eval().double(), x)
    report = rebasin.verify(model, spec, x).require()
    assert report.maps == len(spec.continuous) and report.dtype == "float64"
    return model, spec, x


@cache
def known(name: str) -> tuple[nn.Module, PermutationSpec, Tensor]:
    """What is found in one of STREAMS or PARTS, for all tests that look at it."""
    return found((STREAMS | PARTS)[name][0])


def standard() -> tuple[nn.Module, PermutationSpec, Tensor]:
    return known("layer norm")


def kinds(spec: PermutationSpec) -> dict[str, tuple[str, int, int]]:
    return {g.name: (g.kind, g.count, g.size) for g in spec.continuous}


HEADS = {"parts.0.q.weight[0]": ("invertible", H, C // H), "parts.0.v.weight[0]": ("invertible", H, C // H)}
GATE = {"parts.1.up.weight[0]": ("scales", 10, 1)}
GAINS = {f"norms.{k}.weight[0]": ("scales", C, 1) for k in range(3)}
STREAMS: dict[str, tuple[nn.Module, dict[str, Any]]] = {
    "layer norm": (Residual(), {"enter.weight[0]": ("rotations that keep ones", 1, C)} | GAINS),
    "rms norm": (Residual(lambda: nn.RMSNorm(C)), {"enter.weight[0]": ("rotations", 1, C)} | GAINS),
    "rms norm, written out": (Residual(lambda: Written(C)), {"enter.weight[0]": ("rotations", 1, C)} | GAINS),
    "rms norm, one plus gain": (Residual(lambda: Written(C, 1.0)), {"enter.weight[0]": ("rotations", 1, C)}),
    "layer norm, written out": (Residual(Centred), {"enter.weight[0]": ("rotations that keep ones", 1, C)}),
    "no norm": (Residual(nn.Identity), {"enter.weight[0]": ("invertible", 1, C)}),
    "batch of a table": (Residual(between=shifted), GAINS),
    "scaled by a table": (Residual(between=modulated), GAINS),
    "through tanh": (
        Residual(lambda: nn.RMSNorm(C), between=torch.tanh),
        {"enter.weight[0]": ("signs", C, 1)} | GAINS,
    ),
    "cut at zero": (
        Residual(nn.Identity, between=torch.relu),
        {"enter.weight[0]": ("positive scales", C, 1)},
    ),
    "tied": (Residual(tied=True), {n: g for n, g in GAINS.items() if "2" not in n}),
    "tied, no gain behind": (
        Residual(Centred, tied=True),
        {"enter.weight[0]": ("rotations that keep ones", 1, C)},
    ),
}


@pytest.mark.parametrize("name", STREAMS)
def test_the_group_of_a_stream_is_what_all_its_operators_commute_with(name: str) -> None:
    expected, actual = STREAMS[name][1], kinds(known(name)[1])
    assert {n: g for n, g in actual.items() if not n.startswith("parts")} == expected
    assert {n: g for n, g in actual.items() if n.startswith("parts")} == HEADS | GATE


PARTS = {
    "rope": (
        Attention(rotary),
        {"q.weight[0]": ("scales", C // 2, 1), "v.weight[0]": ("invertible", H, C // H)},
    ),
    "normed q and k": (
        Attention(lambda x: F.normalize(x, dim=-1)),
        {"q.weight[0]": ("rotations", H, C // H), "v.weight[0]": ("invertible", H, C // H)},
    ),
    "geglu": (Gated(), {"up.weight[0]": ("scales", 10, 1)}),
    "linear gate": (
        Gated(lambda x: x),
        {"up.weight[0]": ("scales", 10, 1), "up.weight[0]'": ("scales", 10, 1)},
    ),
    "adaptive": (Adaptive(), {}),
    "low rank": (
        nn.Sequential(nn.Linear(C, 4, bias=False), nn.Linear(4, C)),
        {"0.weight[0]": ("invertible", 1, 4)},
    ),
    "two relus": (
        nn.Sequential(nn.Linear(C, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3)),
        {"0.weight[0]": ("positive scales", 9, 1), "2.weight[0]": ("positive scales", 7, 1)},
    ),
    "gelu": (nn.Sequential(nn.Linear(C, 9), nn.GELU(), nn.Linear(9, 3)), {}),
    "tanh": (nn.Sequential(nn.Linear(C, 9), nn.Tanh(), nn.Linear(9, 3)), {"0.weight[0]": ("signs", 9, 1)}),
}


TOKENS = torch.tensor([True, False, False, False, True])[:, None]
BETWEEN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "masked tokens": (lambda h: h.masked_fill(TOKENS, 0.0), "invertible"),
    "masked in place": (lambda h: h.clone().masked_fill_(TOKENS, 0), "invertible"),
    "masked with a number": (lambda h: h.masked_fill(TOKENS, 1.0), ""),
    "masked by itself": (lambda h: h.masked_fill(h > 0, 0.0), ""),
    "masked neurons": (lambda h: h.masked_fill(torch.arange(C) % 2 == 0, 0.0), "scales"),
    "chosen or zero": (lambda h: torch.where(TOKENS, h, 0.0), "invertible"),
    "zero or chosen": (lambda h: torch.where(TOKENS, 0.0, h), "invertible"),
    "one of two": (lambda h: torch.where(TOKENS, h, 2 * h), "invertible"),
    "chosen or a number": (lambda h: torch.where(TOKENS, h, 1.0), ""),
    "chosen or a table": (lambda h: torch.where(TOKENS, h, torch.linspace(1, 2, C).to(h)), ""),
    "chosen by neuron": (lambda h: torch.where(torch.arange(C) % 2 == 0, h, 3 * h), "scales"),
    "cut by clamp": (lambda h: h.clamp(min=0), "positive scales"),
    "clamped on both sides": (lambda h: h.clamp(0, 1), ""),
    "clamped elsewhere": (lambda h: h.clamp(min=-1), ""),
    "absolute": (torch.abs, "positive scales"),
    "largest over positions": (lambda h: h.amax(1, keepdim=True) + 0 * h[:, :1], "positive scales"),
    "largest and its place": (lambda h: h.max(1)[0], "positive scales"),
    "the largest one's place": (lambda h: h + h.max(1, keepdim=True)[1], ""),
    "place of the smallest, and it": (lambda h: h.min(1)[0] * (1 + h.min(1)[1]), "positive scales"),
    "largest over neurons": (lambda h: h - h.amax(-1, keepdim=True), ""),
    "summed up over positions": (lambda h: h.cumsum(1), "invertible"),
    "summed up over neurons": (lambda h: h.cumsum(-1), ""),
    "rounded to eight bits": (lambda h: h.to(torch.float8_e4m3fn).to(h.dtype), ""),
}
"""What stands between a writer and a reader, and the kind of maps that it leaves."""


class Between(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.enter, self.leave, self.between = nn.Linear(C, C), nn.Linear(C, 3), between

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.between(self.enter(x)))


@pytest.mark.parametrize("name", BETWEEN)
def test_what_stands_between_leaves_what_it_commutes_with(name: str) -> None:
    """By the outputs, not by verify: on other inputs than traced."""
    between, kind = BETWEEN[name]
    torch.manual_seed(0)
    model, x = Between(between).double(), torch.randn(2, 5, C, dtype=torch.float64)
    spec = rebasin.trace(model, x)
    assert [group.kind for group in spec.continuous] == ([kind] if kind else [])
    state = {n: t.clone() for n, t in model.state_dict().items()}
    y = torch.randn(3, 5, C, dtype=torch.float64)
    wanted = model(y)
    model.load_state_dict(spec.random_alignment(1).apply(state))
    torch.testing.assert_close(model(y), wanted, rtol=1e-9, atol=1e-9)


class Several(nn.Module):
    """Parts behind norms are added to one stream that is cut at zero, as in a ResNet: the norms' gains and the stream
    are scaled alike, and what reads it is scaled back.
    """

    def __init__(self, norm: Callable[[], nn.Module], final: bool = False) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(C, C), nn.Linear(C, 3)
        self.parts = nn.ModuleList(nn.Linear(C, C) for _ in range(2))
        self.norms = nn.ModuleList(norm() for _ in range(3))
        self.final = norm() if final else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norms[2](self.enter(x).mT).mT)
        for norm, part in zip(self.norms, self.parts, strict=False):
            x = torch.relu(x + norm(part(x).mT).mT)
        return self.leave(self.final(x.mT).mT)


class Channels(nn.LayerNorm):
    """LayerNorm over the channels of [n, channels, positions]."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.mT).mT


SEVERAL: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm1d(C),
    "group": lambda: nn.GroupNorm(3, C),
    "layer": lambda: Channels(C),
}


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("name", SEVERAL)
def test_norms_that_write_into_one_stream_are_scaled_together(name: str, final: bool) -> None:
    model, spec, x = found(Several(SEVERAL[name], final))
    stream = [
        g
        for g in spec.continuous
        if {s.parameter for s in g.sites} >= {f"norms.{k}.weight" for k in range(3)}
    ]
    # A norm in the end divides each channel by what it multiplies it with, up to its eps: that is left out.
    assert [g.kind for g in stream] == ([] if final else ["positive scales"])
    if final:
        return
    assert {(s.parameter, s.power) for s in stream[0].sites} == {
        *((f"norms.{k}.{what}", 1) for k in range(3) for what in ("weight", "bias")),
        *((f"parts.{k}.weight", -1) for k in range(2)),
        ("leave.weight", -1),
    }
    only = Alignment(spec.identity(), {stream[0].name: torch.linspace(0.5, 2, C)})
    wrong = only.apply(model.state_dict()) | {"norms.1.bias": model.state_dict()["norms.1.bias"]}
    for state, same in ((only.apply(model.state_dict()), True), (wrong, False)):
        again = copy.deepcopy(model)
        again.load_state_dict(state)
        assert torch.allclose(again(x), model(x), rtol=1e-9, atol=1e-9) is same


@pytest.mark.parametrize("name", PARTS)
def test_parts_have_the_groups_of_the_literature(name: str) -> None:
    assert kinds(known(name)[1]) == PARTS[name][1]


def test_what_limits_a_group_is_told() -> None:
    _, spec, _ = standard()
    stream = spec.continuous[0]
    assert stream.limit.startswith("layer_norm at norms.0") and "test_maps.py" in spec.summary()
    assert stream.dimension == (C - 1) * (C - 2) // 2 and stream.structure == f"O({C - 1})"
    assert "free dimensions in 7 continuous groups" in spec.summary()
    assert {g.limit for g in spec.continuous if g.kind == "invertible"} == {""}


# Wrong maps are caught ------------------------------------------------------------------------------------------


def with_groups(spec: PermutationSpec, *groups: ContinuousGroup) -> PermutationSpec:
    return replace(spec, groups=(), continuous=groups)


def stream_of(model: nn.Module, names: str, kind: Any, gain: Any = None) -> ContinuousGroup:
    """A hand-made group: names of parameters with their axis, "-" before readers."""
    sites = []
    for word in names.split():
        name, axis = word.lstrip("-").split("@")
        size = model.state_dict()[name].shape[int(axis)]
        sites.append(MapSite(name, int(axis), range(size), -1 if word.startswith("-") else 1))
    count, size = (size, 1) if kind in ("scales", "signs") else (1, size)
    return ContinuousGroup("wrong", kind, count, size, tuple(sites))


@cache
def wrong_specs() -> list[tuple[str, nn.Module, PermutationSpec, Tensor]]:
    return list(_wrong_specs())


def _wrong_specs() -> Iterator[tuple[str, nn.Module, PermutationSpec, Tensor]]:
    model, spec, x = standard()
    stream = spec.continuous[0]
    yield "a rotation that moves the ones", model, with_groups(spec, replace(stream, kind="rotations")), x
    without = replace(stream, sites=tuple(replace(s, gain=None) for s in stream.sites))
    yield "gains forgotten", model, with_groups(spec, without), x
    heads = next(g for g in spec.continuous if g.name == "parts.0.q.weight[0]")
    only = replace(heads, sites=tuple(s for s in heads.sites if "k." not in s.parameter))
    yield "q alone", model, with_groups(spec, only), x
    across = replace(heads, count=1, size=C)
    yield "q and k across heads", model, with_groups(spec, across), x
    gate = next(g for g in spec.continuous if g.name == "parts.1.up.weight[0]")
    half = tuple(
        replace(s, positions=range(10, 20)) if s.parameter.startswith("parts.1.up") else s for s in gate.sites
    )
    yield "the gate's half", model, with_groups(spec, replace(gate, sites=half)), x
    model, spec, x = known("tied")
    here = tuple(s for s in stream.sites if "leave" not in s.parameter)
    yield "one of two tied tensors", model, with_groups(spec, replace(stream, sites=here)), x
    model, spec, x = known("batch of a table")
    yield "past a fixed table", model, with_groups(spec, stream), x
    model, spec, x = known("adaptive")
    names = "enter.weight@0 enter.bias@0 part.weight@0 part.bias@0 -leave.weight@1 -part.weight@1"
    yield "across adaLN", model, with_groups(spec, stream_of(model, names, "rotations that keep ones")), x
    model, spec, x = known("rope")
    pairs = replace(spec.continuous[0], kind="scales", count=C, size=1)
    sites = tuple(
        MapSite(f"{n}.{p}", 0, range(C), s) for n, s in (("q", 1), ("k", -1)) for p in ("weight", "bias")
    )
    yield "scales that differ within a pair of RoPE", model, with_groups(spec, replace(pairs, sites=sites)), x


@pytest.mark.parametrize("number", range(9))
def test_wrong_maps_change_the_outputs_and_are_named(number: int) -> None:
    what, model, spec, x = wrong_specs()[number]
    report = rebasin.verify(model, spec, x)
    assert not report.passed and report.max_relative_error > 1e-3, what
    assert report.guilty == (f"map of {spec.continuous[0].name}",), what


def test_a_map_does_not_act_where_it_would_divide_by_nothing() -> None:
    model, spec, x = standard()
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.norms[0].weight[3] = 1e-9  # type: ignore[index, union-attr]
    state = model.state_dict()
    assert list(spec.stuck(state)) == ["enter.weight[0]"]
    moved = spec.random_alignment(1)
    with pytest.raises(
        SpecMismatchError, match=r"enter.weight\[0\]' can't act, as it divides by the gains 'norms.0"
    ):
        moved.apply(state)
    moved.without(spec.stuck(state)).apply(state)
    report = rebasin.verify(model, spec, x, randomise=False).require()
    assert report.maps == len(spec.continuous) - 1


# A group --------------------------------------------------------------------------------------------------------

GROUPS = ["transformer_encoder", "rope_gqa", "conv_flatten_linear", "multihead_attention", "geglu"]


@pytest.mark.parametrize("name", GROUPS)
def test_alignments_are_a_group(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, args, kwargs = ZOO["blocks"][name](False)
    spec = rebasin.trace(model, *args, **kwargs)
    state = {n: torch.randn(t.shape, dtype=torch.float64) + 1 for n, t in model.state_dict().items()}
    a, b = spec.random_alignment(1), spec.random_alignment(2)
    assert not a.is_close(b) and not a.is_identity and a.is_close(spec.random_alignment(1))
    close(a.compose(b).apply(state), a.apply(b.apply(state)))
    close(a.invert().apply(a.apply(state)), state)
    assert a.invert().compose(a).is_close(Alignment.of(spec.identity()), 1e-9)
    assert a.compose(b).invert().is_close(b.invert().compose(a.invert()), 1e-6)
    plain = Alignment.of(spec.random(3))
    assert all(torch.equal(plain.apply(state)[n], t) for n, t in plain.permutation.apply(state).items())
    a.save(tmp_path / "a.safetensors")
    assert Alignment.load(tmp_path / "a.safetensors").is_close(a, 1e-15)
    plain.permutation.save(tmp_path / "p.safetensors")
    assert Alignment.load(tmp_path / "p.safetensors").is_close(plain)
    view = a.view(save(tmp_path, state))  # lazy: tensor by tensor, from a file
    close({n: view[n] for n in view}, a.apply(state))


def save(folder: Path, state: dict[str, Tensor]) -> Any:
    save_safetensors(folder / "state.safetensors", {n: t.contiguous() for n, t in state.items()})
    return load_safetensors(folder / "state.safetensors")


def close(a: Any, b: Any, rtol: float = 1e-9) -> None:
    assert a.keys() == b.keys()
    for name, tensor in b.items():
        assert (a[name] - tensor).norm() <= rtol * tensor.norm(), name


def test_specs_with_maps_are_written_and_old_ones_read() -> None:
    _, spec, _ = standard()
    again = PermutationSpec.from_json(spec.to_json())
    assert again == spec and again.maps_hash == spec.maps_hash and kinds(again) == kinds(spec)
    old = json.loads(spec.to_json()) | {"format": 1}
    del old["continuous"]
    before = PermutationSpec.from_json(json.dumps(old))
    assert before == spec and not before.continuous and before.maps_hash != spec.maps_hash
    state = {n: torch.randn(s) for n, s in spec.shapes.items()}
    close(before.random(1).apply(state), spec.random(1).apply(state))
    with pytest.raises(SpecMismatchError, match="reads 1 to 2"):
        PermutationSpec.from_json(json.dumps(old | {"format": 3}))


def test_matrices_that_are_none_of_their_group_are_refused() -> None:
    _, spec, _ = standard()
    right = spec.random_alignment(0)
    for name, make, words in (
        ("enter.weight[0]", lambda m: m + 1e-3, "not orthogonal with rows that sum to one"),
        ("enter.weight[0]", lambda m: m[0], "wants a tensor of shape"),
        ("parts.0.q.weight[0]", torch.zeros_like, "not well conditioned"),
        ("parts.1.up.weight[0]", lambda m: m * 0, "not numbers but zero"),
        ("parts.1.up.weight[0]", lambda m: m * torch.nan, "not numbers but zero"),
    ):
        with pytest.raises(SpecMismatchError, match=words):
            Alignment(right.permutation, {**right.maps, name: make(right.maps[name])})
    with pytest.raises(SpecMismatchError, match="has no continuous group 'x'"):
        Alignment(right.permutation, {"x": torch.eye(2)})


@pytest.mark.parametrize("change", ["digest", "shape", "name", "kind", "other"])
def test_a_damaged_alignment_is_told(tmp_path: Path, change: str) -> None:
    _, spec, _ = standard()
    path = tmp_path / "a.safetensors"
    spec.random_alignment(0).save(path)
    file = load_safetensors(path)
    tensors, header = dict(file), dict(file.metadata)
    name = "map:parts.1.up.weight[0]"
    match change:
        case "digest":
            tensors[name] = tensors[name] * 2
        case "shape":
            tensors[name] = tensors[name][:3]
        case "name":
            tensors["map:q"] = tensors.pop(name)
        case "kind":
            tensors["map:enter.weight[0]"] = tensors["map:enter.weight[0]"] * 2
        case _:
            header = {}
    save_safetensors(path, tensors, header)
    with pytest.raises(CheckpointError, match="is damaged|does not allow|holds no alignment"):
        Alignment.load(path)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3), (torch.float32, 1e-6)]
)
def test_types_stay_and_rounding_is_that_of_the_type(dtype: torch.dtype, bound: float) -> None:
    model, spec, _ = standard()
    state = {n: t.to(dtype) for n, t in model.state_dict().items()}
    moved = spec.random_alignment(1)
    exact = moved.apply({n: t.double() for n, t in state.items()})
    for name, tensor in moved.apply(state).items():
        assert tensor.dtype == dtype
        assert (tensor.double() - exact[name]).norm() < bound * exact[name].norm(), name


# What a stranger's models have shown: what is told deep below is told of the neuron -----------------------------


class Squeezed(nn.Module):
    """Two squeezes, then the energies of halves: a half's channels are told apart from the other's far below."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(C, 4)

    def forward(self, x: Tensor) -> Tensor:
        image = self.a(x[:, 0])[:, :, None, None] * x[:, None, 1:5, :4]
        h = F.pixel_unshuffle(F.pixel_unshuffle(image, 2), 2).flatten(1).view(len(x), 4, -1)
        return torch.stack([h[:, :2].pow(2).sum((1, 2)), h[:, 2:].pow(2).sum((1, 2))], -1)


class Doubled(nn.Module):
    """Copies of copies of copies, of which halves are summed."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(C, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        for _ in range(3):
            h = torch.cat([h, h], -1)
        return torch.stack([h[..., :4].sum(-1), h[..., 4:8].sum(-1)], -1)


class Multiplied(nn.Module):
    """A table between many products with one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.g = nn.Linear(C, 8), nn.Linear(8, 3), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        g = self.g
        return self.c(self.a(x) * g * g * g * torch.linspace(1, 2, 8).to(x) * g * g * g)


class Offset(nn.Module):
    """One vector as gains, and as one plus them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.d = nn.Linear(C, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.norm, self.g = nn.RMSNorm(8, elementwise_affine=False), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.a(x))
        return self.c(h * self.g) + self.d(h * (1 + self.g))


class Padded(nn.Module):
    """A stream that is padded by a number on both sides, and written again: at `cut` through ReLU."""

    def __init__(self, value: float = 0.0, cut: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(C, 4), nn.Linear(C, 8), nn.Linear(8, 3)
        self.value, self.cut = value, cut

    def forward(self, x: Tensor) -> Tensor:
        h = F.pad(self.a(x), (1, 3), value=self.value) + self.b(x)
        return self.c(h.relu() if self.cut else h)


def test_zeros_that_are_padded_with_hold_nothing() -> None:
    models = Padded(), Padded(cut=True), Padded(value=1.0)
    structures = [[g.structure for g in found(model)[1].continuous] for model in models]
    assert structures == [["GL(4)", "GL(4)"], ["R+^4", "R+^4"], []]


class Scaled(nn.Module):
    """A stream that is multiplied by what becomes of a vector."""

    def __init__(self, become: Callable[[Tensor], Tensor], norm: bool = True) -> None:
        super().__init__()
        self.a, self.c, self.g = nn.Linear(C, C), nn.Linear(C, 3), nn.Parameter(torch.ones(C))
        self.become, self.norm = become, norm

    def forward(self, x: Tensor) -> Tensor:
        h = F.rms_norm(self.a(x), (C,)) if self.norm else self.a(x)
        return self.c(h[:, :2] * self.become(self.g))


BECOME: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda g: g.softmax(0),
    "log_softmax": lambda g: g.log_softmax(-1),
    "layer_norm": lambda g: F.layer_norm(g, (C,)),
    "group_norm": lambda g: F.group_norm(g[None], 1)[0],
    "rms_norm": lambda g: 1 + F.rms_norm(g, (C,)),
    "exp": lambda g: g.exp(),
    "relu": lambda g: g.relu(),
    "cumsum": lambda g: g.cumsum(0),
    "a row of ones": lambda g: F.pad(g[None], (0, 0, 0, 1), value=1.0),
    "a row of zeros": lambda g: F.pad(g[None], (0, 0, 0, 1)),
    "mean": lambda g: g - g.mean(),
}


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("what", list(BECOME))
def test_what_becomes_of_a_gain_is_none(what: str, norm: bool) -> None:
    _, spec, _ = found(Scaled(BECOME[what], norm))
    assert not [site for group in spec.continuous for site in group.sites if site.gain is not None]


class Squares(nn.Module):
    """A product of alike factors, one of which is the same for all tokens."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(C, C, bias=False), nn.Parameter(torch.ones(C))
        self.enter, self.leave, self.how = nn.Linear(C, 5), nn.Linear(5, 3), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.b + self.a(x)
        product = self.b.expand_as(y) * y if self.how[1:] == "left" else y * self.b.expand_as(y)
        h, sums = self.enter(x[:, 0]), product.sum(-1)
        return self.leave((h + sums).relu() if self.how[0] == "+" else h * sums)


@pytest.mark.parametrize("how", ["+left", "*left", "+right", "*right"])
def test_a_product_with_what_is_alike_for_all_tokens_is_not(how: str) -> None:
    _, spec, _ = found(Squares(how))
    assert [group.name for group in spec.groups] == ["b"]


@pytest.mark.parametrize("model", [Squeezed, Doubled, Multiplied, Offset, Padded])
def test_what_is_told_far_below_is_told_of_the_neuron(model: Callable[[], nn.Module]) -> None:
    made, spec, x = found(model())
    for seed in range(3):
        again = copy.deepcopy(made)
        again.load_state_dict(spec.random_alignment(seed).apply(made.state_dict()))
        torch.testing.assert_close(again(x), made(x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("dtype", "gain", "acts"),
    [
        (torch.float64, 1e-5, True), (torch.float32, 1e-4, True), (torch.float32, 1e-6, False),
        (torch.float16, 0.1, True), (torch.float16, 1e-3, False), (torch.bfloat16, 0.01, False),
        (torch.float64, float("inf"), False),
    ],
)  # fmt: skip
def test_a_map_does_not_divide_by_what_its_type_can_not_carry(
    dtype: torch.dtype, gain: float, acts: bool
) -> None:
    model, spec, _ = standard()
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    state["norms.0.weight"] = torch.ones_like(state["norms.0.weight"])
    state["norms.0.weight"][3] = gain
    assert ("enter.weight[0]" in spec.stuck(state)) is not acts


def test_misuse_of_alignments_is_one_sentence(tmp_path: Path) -> None:
    model, spec, _ = standard()
    moved, state = spec.random_alignment(1), model.state_dict()
    path = tmp_path / "alignment.safetensors"
    moved.save(path)
    assert moved.without("enter.weight[0]").maps.keys() == moved.maps.keys() - {"enter.weight[0]"}
    assert moved.is_close(moved, 0.0)
    tries: list[tuple[Callable[[], object], str]] = [
        (lambda: moved.without(["enter"]), "no continuous group 'enter'"),
        (
            lambda: moved.apply({n: t.long() for n, t in state.items()}),
            "is int64, but maps act on floating point numbers",
        ),
        (lambda: moved.apply({n: t * 1j for n, t in state.items()}), "is complex128"),
        (lambda: spec.stuck({}), "has no tensor"),
        (lambda: Alignment(None, {}), "its permutation is of type NoneType"),  # type: ignore[arg-type]
        (lambda: Alignment(spec.identity(), [1]), "its maps is of type list"),  # type: ignore[arg-type]
        (lambda: Permutation.load(path), "holds an alignment with maps: read it with rebasin.Alignment.load"),
    ]
    for call, sentence in tries:
        with pytest.raises(RebasinError, match=sentence):
            call()


def test_a_spec_whose_maps_were_changed_is_damaged() -> None:
    _, spec, _ = standard()
    data = json.loads(spec.to_json())
    data["continuous"][0]["sites"].pop()
    with pytest.raises(SpecMismatchError, match="hash does not fit"):
        PermutationSpec.from_json(json.dumps(data))
