"""Random networks have no false symmetry; rules say something about all of an operator, and the rest is pinned."""

# Models here are put together of attributes that a type checker does not see.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import contextlib
import functools
import io
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rebasin
from experiments.attack_zoo import attack, examine
from experiments.zoo_blocks import Apply
from experiments.zoo_random import Network, Plan, Step, describe, draw
from rebasin.spec import PermutationSpec
from rebasin.tracing.cache import fingerprint
from rebasin.tracing.rules import RULES
from rebasin.tracing.rules.elementwise import tagged

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("first", range(0, 100, 20))
def test_random_networks_have_no_false_symmetry(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REBASIN_CACHE", "off")
    outcomes = list(attack(range(first, first + 20)))
    for _, number, _, outcome in outcomes:
        assert not outcome.fault, f"python -m experiments.attack_zoo --network {number}: {outcome.fault}"
        assert not outcome.beyond, f"network {number}: {outcome.beyond}"
    tally = outcomes[-1][0]
    assert tally.symmetric >= 6 and tally.refused <= 2


@pytest.mark.parametrize("number", [503, 561, 2866, 2898, 3329, 5635, 20249])
def test_what_the_long_attack_has_found(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """2866: an output that is zero up to rounding; 3329: the one below, in the clothes of the grammar; 20249:
    another that is zero up to rounding. 503, 561 and 5635 had maps that change the output: two scales met, and one was
    forgotten; groups of one channel. 2898: a stream and the scales of what it is divided by begin at one element.
    """
    monkeypatch.setenv("REBASIN_CACHE", "off")
    assert not examine(draw(number)).fault


class Products(nn.Module):
    """All products of a layer's neurons with one another, those in pairs as complex numbers: (i, j) is not (j, i)."""

    def __init__(self, softmax: bool, turned: bool) -> None:
        super().__init__()
        self.a, self.head, self.angle = nn.Linear(4, 4), nn.Linear(16, 3), nn.Parameter(torch.randn(2))
        self.softmax, self.turned = softmax, turned

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = (y.mT @ y).softmax(-1) if self.softmax else y.mT @ y.abs()
        z = torch.view_as_complex(z.unflatten(-1, (-1, 2)).contiguous())
        z = z * torch.polar(torch.ones(2), self.angle) if self.turned else z
        return self.head(torch.view_as_real(z).flatten(-2).flatten(1))


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("turned", [True, False])
def test_sets_that_cross_change_places_with_all_that_they_share(softmax: bool, turned: bool) -> None:
    """Two sets that both have all members: one's rows are the other's columns, so the products move as one."""
    model, x = Products(softmax, turned), torch.randn(2, 3, 4)
    spec = rebasin.trace(model, x)
    assert rebasin.verify(model, spec, x, dtype=torch.float64).passed
    members = {tuple(map(tuple, spec.random(seed).index.values())) for seed in range(40)}
    assert len(members) == 2, "nothing moves, or both pairs change places"


def test_a_network_is_a_number() -> None:
    assert draw(7) == draw(7) and describe(draw(7)) == describe(draw(7))
    plan = Plan((2, 5), (Step("linear", (0,), 3), Step("unary", (1,), 4), Step("linear", (2,), 5)))
    assert [s.name for s in plan.without(1).steps] == ["linear", "linear"]
    assert plan.without(1).steps[1].inputs == (1,)


def test_the_attack_finds_what_is_planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that forgets to tie a bias is a false symmetry that the attack sees."""
    from rebasin.tracing.rules import linear
    from rebasin.tracing.rules.registry import rule

    monkeypatch.setenv("REBASIN_CACHE", "off")
    kept = dict(RULES)
    try:

        @rule("linear", takes="input weight bias")
        def forgetful(call: Any) -> Any:
            c, x, weight = call.constraints, call.tensor("input").label, call.tensor("weight").label
            return linear.contract(c, linear.combine(c, [x.expand_rank([x.ndim - 1]), weight]), [-1])

        assert any(outcome.fault for _, _, _, outcome in attack(range(12)))
    finally:
        RULES.update(kept)


# ------------------------------------------------------------------------------------------ declarations


def schemas(name: str) -> list[torch._C.FunctionSchema]:
    """The schemas of an operator's overloads that work on tensors, without those that write their result elsewhere."""
    space, _, own = name.rpartition("::")
    if space == "transformers":
        import transformers.integrations.moe  # noqa: F401 - which registers its operators
    packet = getattr(getattr(torch.ops, space or "aten"), own)
    found = [getattr(packet, overload)._schema for overload in packet.overloads()]
    return [
        s
        for s in found
        if not any(a.is_out or "Dimname" in str(a.type) for a in s.arguments)
        and any("Tensor" in str(r.type) for r in s.returns)
        and not (name == "index" and str(s.arguments[0].type) != "Tensor")  # those of Python's lists
    ]


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_rule_says_something_about_every_argument(name: str) -> None:
    gaps = {f"{s}: {a.name}" for s in schemas(name) for a in s.arguments if not RULES[name].declares(a)}
    assert not gaps and schemas(name)


def test_rules_declare_nothing_that_no_operator_has() -> None:
    known: dict[Any, set[str]] = {}
    declared: dict[Any, set[str]] = {}
    for name, rule in RULES.items():
        known.setdefault(rule.function, set()).update(a.name for s in schemas(name) for a in s.arguments)
        declared.setdefault(rule.function, set()).update(
            rule.takes | rule.index | rule.shape_of | rule.refuses
        )
    assert not {(f.__name__, n) for f, names in declared.items() for n in names - known[f]}


def test_pointwise_operators_take_tensors_and_numbers_alone() -> None:
    """PyTorch's tag is trusted: the schema of each operator that has it is what the tag says."""
    plain = {
        "Tensor",
        "number",
        "bool",
        "float",
        "int",
        "Optional[Tensor]",
        "Optional[number]",
        "Optional[float]",
    }
    plain |= {"str", "Optional[str]", "Optional[int]", "Optional[Generator]"}
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads() if isinstance(packet, torch._ops.OpOverloadPacket) else []:
            target = getattr(packet, overload)
            if tagged(target) is not None:
                arguments = target._schema.arguments
                assert {str(a.type) for a in arguments} <= plain, target
                assert not {"dim", "axis", "dims"} & {a.name for a in arguments}, target


# ------------------------------------------------------------------------------------------ kinds of false symmetries


def checked(model: nn.Module, x: Tensor, *more: Any) -> PermutationSpec:
    spec = rebasin.trace(model, x, *more)
    assert rebasin.verify(model, spec, x, *more, dtype=torch.float64).require().passed
    assert not [p.reason for p in spec.pins if "beyond its rule" in p.reason]
    return spec


def mlp(middle: Callable[..., Tensor], width: int = 6, out: int = 6, **parameters: Tensor) -> nn.Module:
    return Apply(
        lambda m, x: m.o(middle(torch.relu(m.a(x)), m) if parameters else middle(torch.relu(m.a(x)))),
        parameters,
        a=nn.Linear(5, width),
        o=nn.Linear(out, 3),
    )


def attended(h: Tensor, m: Any) -> Tensor:
    k, v = m.k.expand(h.shape[0], -1, -1), m.v.expand(h.shape[0], -1, -1)
    return F.scaled_dot_product_attention(h, k, v, is_causal=True)


def native_norm(h: Tensor) -> tuple[Tensor, ...]:
    return torch.native_layer_norm(h, [6], None, None, 1e-5)


def part_set(x: Tensor, values: Tensor, where: slice | int) -> Tensor:
    x = x.clone()
    x[:, where] = values
    return x


TOKENS = (2, 4, 5)
FOUND = {
    # name: (model, shape of the input, neurons)
    "diff with prepend": (lambda: mlp(lambda h, m: torch.diff(h, dim=0, prepend=m.p), p=torch.randn(1, 6)), (2, 5), 0),
    "diff with append": (lambda: mlp(lambda h, m: torch.diff(h, dim=0, append=m.p), p=torch.randn(1, 6)), (2, 5), 0),
    "repeated index": (lambda: mlp(lambda h, m: torch.einsum("cc,bc->bc", m.d, h), d=torch.randn(6, 6)), (2, 5), 0),
    "repeated index of a product": (lambda: mlp(lambda h: torch.einsum("bi,bi,ci->bi", h, h, h[:1])), (2, 5), 6),
    "trace of a product": (lambda: mlp(lambda h, m: h * torch.einsum("ii->", m.d), d=torch.randn(6, 6)), (2, 5), 6),
    "learned causal keys": (
        lambda: mlp(attended, k=torch.randn(4, 6), v=torch.randn(4, 6)),
        TOKENS,
        12,  # q and k, v; not the four keys
    ),
    "gather": (lambda: mlp(lambda h: torch.gather(h, -1, h.argsort(-1))), (2, 5), 0),
    "smaller index": (lambda: mlp(lambda h: torch.gather(h, 0, h.argsort(0)[:, :4]), out=4), (2, 5), None),
    "take along": (lambda: mlp(lambda h: torch.take_along_dim(h, h.argmax(0, keepdim=True), 0)), (2, 5), 6),
    "take along all": (lambda: mlp(lambda h: torch.take_along_dim(h, h.reshape(-1).argsort()).view(2, 6)), (2, 5), 0),
    "addmv": (lambda: Apply(lambda m, x: m.o(torch.relu(torch.addmv(m.b, m.w, m.a(x)[0]))),
        {"b": torch.randn(6), "w": torch.randn(6, 7)}, a=nn.Linear(5, 7), o=nn.Linear(6, 3)), (1, 5), 13),
    "addbmm": (lambda: mlp(lambda h: torch.addbmm(h[0], h, h.transpose(1, 2) @ h)), TOKENS, 6),
    "other numbers": (lambda: mlp(lambda h: h.view(torch.int32).view(torch.float32)), (2, 5), 0),
    "halves of numbers": (lambda: mlp(lambda h: h * h.contiguous().view(torch.int16).float().mean()), (2, 5), 0),
    "native dropout": (lambda: mlp(lambda h: torch.native_dropout(h, 0.5, False)[0]), (2, 5), 6),
    "dropout that stays on": (lambda: mlp(lambda h: F.dropout(h, 0.5, True)), (2, 5), 0),
    "statistics of a norm": (lambda: mlp(lambda h: h * native_norm(h)[1]), (2, 5), 0),
    "its own result": (lambda: mlp(lambda h: native_norm(h)[0]), (2, 5), 6),
    "median by place": (lambda: mlp(lambda h: h + h.median(-1, keepdim=True).indices), (2, 5), 0),
    "frexp": (lambda: mlp(lambda h: torch.frexp(h).mantissa * torch.frexp(h).exponent), (2, 5), 6),
    "padded": (lambda: mlp(lambda h: F.pad(h, (1, 2)), out=9), (2, 5), 9),
    "padded with two values": (lambda: mlp(lambda h: F.pad(F.pad(h, (0, 2)), (0, 2), value=1.0), out=10), (2, 5), 10),
    "zeros beside": (lambda: mlp(lambda h: torch.cat([h, h.new_zeros(h.shape[0], 3)], -1), out=9), (2, 5), 9),
    "constants beside": (lambda: mlp(lambda h: torch.cat([h, torch.arange(3.0).expand(2, 3)], -1), out=9), (2, 5), 6),
    "written into zeros": (lambda: mlp(lambda h: part_set(h.new_zeros(len(h), 9), h, slice(2, 8)), out=9), (2, 5), 9),
    "with a step": (lambda: mlp(lambda h: part_set(h.new_zeros(len(h), 12), h, slice(0, 12, 2)), out=12), (2, 5), 12),
    "written over": (lambda: mlp(lambda h: part_set(h, 2 * h[:, 4:], slice(0, 2))), (2, 5), 4),
    "one written": (lambda: mlp(lambda h: part_set(h, h.sum(-1), 3)), (2, 5), 5),
    "weight norm over all": (
        lambda: Apply(lambda m, x: m.o(torch.relu(F.linear(x, torch._weight_norm(m.v, m.g, -1)))),
        {"v": torch.randn(6, 5), "g": torch.rand(1)}, o=nn.Linear(6, 3)), (2, 5), 6),
    "tied autoencoder": (
        lambda: Apply(lambda m, x: torch.relu(x @ m.w) @ m.w.t() + m.b, {"w": torch.randn(5, 8), "b": torch.randn(5)}),
        (2, 5),
        8,
    ),
    "norm of a parameter": (lambda: mlp(lambda h, m: h * m.s.norm(), s=torch.randn(4)), (2, 5), 10),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_is_right(name: str) -> None:
    build, shape, neurons = FOUND[name]
    x = torch.randn(shape)
    model = build()
    if name in ("gather", "smaller index", "take along all", "take along"):
        spec = rebasin.trace(model, x)
        assert rebasin.verify(model, spec, x, dtype=torch.float64).passed
    else:
        spec = checked(model, x)
    assert neurons is None or spec.neurons == neurons


@pytest.mark.parametrize("read", ["select", "flat", "index", "embedding"])
def test_codebooks_keep_their_codes(read: str) -> None:
    """Tokens as neurons: whoever looks up by their values knows their place."""

    def forward(m: Any, x: Tensor) -> Tensor:
        index = torch.cdist(m.a(x), m.code).argmin(-1)
        rows = {
            "select": lambda: m.code.index_select(0, index.view(-1)).view(*index.shape, -1),
            "flat": lambda: m.code.index_select(0, index.flatten()).unflatten(0, index.shape),
            "index": lambda: m.code[index],
            "embedding": lambda: F.embedding(index, m.code),
        }[read]()
        return m.o(rows)

    model = Apply(forward, {"code": torch.randn(7, 6)}, a=nn.Linear(5, 6), o=nn.Linear(6, 3))
    spec = rebasin.trace(model, torch.randn(TOKENS))
    assert not any(
        site.parameter == "code" and site.axis == 0 for c in spec.cells.values() for site in c.sites
    )
    assert rebasin.verify(model, spec, torch.randn(TOKENS), dtype=torch.float64).passed


def test_mutated_buffer_is_read_by_the_next_call() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.relu(m.a(x))
        y = m.o(h - m.mean)
        m.mean.mul_(0.9).add_(h.mean(0), alpha=0.1)
        return y

    model = Apply(forward, a=nn.Linear(5, 6), o=nn.Linear(6, 3))
    model.register_buffer("mean", torch.randn(6))
    spec = checked(model, torch.randn(2, 5))
    assert [s.parameter for c in spec.cells.values() for s in c.sites] == [
        "a.weight",
        "a.bias",
        "o.weight",
        "mean",
    ]
    layers = {"a": nn.Linear(5, 6), "o": nn.Linear(6, 3)}
    apart = Apply(lambda m, x: (m.o(torch.relu(m.a(x))), m.seen.add_(m.a(x).mean(0)))[0], **layers)
    apart.register_buffer("seen", torch.randn(6))
    spec = checked(apart, torch.randn(2, 5))
    assert any(s.parameter == "seen" for c in spec.cells.values() for s in c.sites)


def test_a_residual_network_with_padded_shortcuts_has_all_its_neurons() -> None:
    """ResNet20 for CIFAR with option A: 64 of the stream, those of its padding included, and 336 inside the blocks."""

    class Block(nn.Module):
        def __init__(self, inside: int, out: int, stride: int) -> None:
            super().__init__()
            self.c1, self.b1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
            self.c2, self.b2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
            self.stride, self.extra = stride, (out - inside) // 2

        def forward(self, x: Tensor) -> Tensor:
            y = self.b2(self.c2(torch.relu(self.b1(self.c1(x)))))
            short = x[:, :, :: self.stride, :: self.stride]
            return torch.relu(y + F.pad(short, (0, 0, 0, 0, self.extra, self.extra), "constant", 0))

    sizes = [(16, 16), (16, 16), (16, 16), (16, 32), (32, 32), (32, 32), (32, 64), (64, 64), (64, 64)]
    blocks = [Block(inside, out, 1 if inside == out else 2) for inside, out in sizes]
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), *blocks,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    assert checked(model, torch.randn(2, 3, 8, 8)).neurons == 400


def test_what_no_rule_knows_is_pinned_in_one_reason() -> None:
    """A rule that fails, an argument that none declares: pins, never a traceback."""
    from rebasin.tracing.rules.registry import rule

    kept = dict(RULES)
    model, x = mlp(lambda h: torch.tanh(h).cumsum(-1)), torch.randn(2, 5)
    try:

        @rule("cumsum", takes="self dim")
        def broken(call: Any) -> Any:
            raise IndexError("of a rule")

        spec = rebasin.trace(model, x)
        assert spec.neurons == 0 and any(
            "cumsum" in p.reason and "beyond its rule" in p.reason for p in spec.pins
        )
        rule("cumsum", takes="self")(kept["cumsum"].function)
        spec = rebasin.trace(model, x)
        assert spec.neurons == 0 and any("argument 'dim'" in p.reason for p in spec.pins)
    finally:
        RULES.update(kept)


# ------------------------------------------------------------------------------------------ cache


def encoder(activation: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, activation=activation, batch_first=True)


def test_fingerprints_tell_functions_apart() -> None:
    x = torch.randn(1, 3, 8)
    kinds: list[Any] = [
        F.gelu,
        F.relu,
        torch.relu,
        torch.tanh,
        nn.GELU(),
        nn.GELU().forward,
        nn.Tanh().forward,
    ]
    kinds += [partial(F.leaky_relu, negative_slope=s) for s in (0.1, 0.2)]
    kinds += [partial(F.gelu, approximate=a) for a in ("none", "tanh")]
    found = [fingerprint(encoder(k), (x,), {}) for k in kinds]
    assert None not in found and len(set(found)) == len(found)
    assert found == [fingerprint(encoder(k), (x,), {}) for k in kinds]
    assert fingerprint(encoder(lambda t: t), (x,), {}) is None
    impostor = functools.wraps(F.relu)(lambda t: t.flip(-1))
    assert fingerprint(encoder(impostor), (x,), {}) is None


def test_fingerprints_tell_constants_and_shared_memory_apart() -> None:
    x, found = torch.randn(1, 4), set()
    for kind in range(7):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        if kind in (1, 2):
            model.register_buffer("table", torch.full((4,), float(kind)), persistent=False)
        if kind == 3:
            model[1].weight = model[0].weight
        if kind == 4:
            model[1].weight.data = model[0].weight.data.t()
        if kind == 5:
            model[1].bias.data = model[0].weight.data[0]
        if kind == 6:
            model[0].held = model[0].weight.data.t()
        found.add(fingerprint(model, (x,), {}))
    assert len(found) == 7 and None not in found


SCRIPT = """
import torch
from diffusers import UNet2DConditionModel
from rebasin.tracing.cache import fingerprint
with torch.device("meta"):
    unet = UNet2DConditionModel(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), attention_head_dim=4)
first = fingerprint(unet, (torch.randn(1),), {})
unet.kinds = {"b", "a", "c", "d"}
print(first, fingerprint(unet, (torch.randn(1),), {}))
"""


def test_fingerprints_are_the_same_in_every_process() -> None:
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "2" else "2"
    command = [sys.executable, "-c", SCRIPT]
    told = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": seed}, cwd=ROOT
    )
    assert told.returncode == 0, told.stderr
    with contextlib.redirect_stdout(io.StringIO()) as here:
        exec(SCRIPT, {})
    assert told.stdout == here.getvalue() and "None" not in told.stdout and len(set(told.stdout.split())) == 2


def test_cached_spec_that_is_damaged_or_false_is_traced_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rebasin import tracing
    from rebasin.spec import Cell, Group, Leaf, Site

    monkeypatch.setenv("REBASIN_CACHE", str(tmp_path))
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(2, 4)
    right = rebasin.trace(model, x)
    (file,) = (tmp_path / "specs").glob("*.json")
    text = file.read_text()
    changed = [text[: len(text) // 2], text.replace('"cells"', '"sells"'), text.replace("6", "x")]
    for damaged in ("", "{}", "[]", "null", *changed):
        file.write_text(damaged)
        assert rebasin.trace(model, x) == right and file.read_text() == text
    only_bias = Group("g", (Cell("g", 6, (Site("0.bias", 0, range(6)),)),), Leaf(0, range(6)))
    false = PermutationSpec((only_bias,), right.shapes)
    file.write_text(false.to_json())
    tracing._proved.clear()
    assert rebasin.trace(model, x) == right and file.read_text() == text
    # Where it is not proved on reading (a large model, one without numbers), a failed proof forgets it.
    file.write_text(false.to_json())
    monkeypatch.setattr(tracing, "_stands", lambda *_: True)
    assert rebasin.trace(model, x) == false
    assert not rebasin.verify(model, false, x).passed and not file.exists()
    assert rebasin.trace(model, x) == right


def test_outcomes_tell_a_false_symmetry() -> None:
    plan = Plan((2, 5), (Step("linear", (0,), 8), Step("unary", (1,), 4), Step("head", (2,), 6)))
    assert examine(plan).neurons and not examine(plan).fault
    assert len(Network(plan).shapes) == 4


def test_false_spec_of_a_component_is_traced_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its proof is made at reduced width: what fails there is forgotten, and traced and proved once more."""
    from rebasin.checkpoints import specs
    from rebasin.errors import VerificationError

    monkeypatch.setenv("REBASIN_CACHE", str(tmp_path))
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(2, 4)
    right = rebasin.trace(model, x)
    (file,) = (tmp_path / "specs").glob("*.json")
    false = PermutationSpec((), right.shapes)
    file.write_text(false.to_json())
    monkeypatch.setattr(specs, "architecture", lambda *_: (model, (x,), {}))
    monkeypatch.setattr(specs, "component_config", lambda *_: {})
    tried = []

    def proof(spec: PermutationSpec, *_: Any) -> None:
        tried.append(spec)
        if spec != right:
            raise VerificationError("Not this one.")

    monkeypatch.setattr(specs, "proof", proof)
    checkpoint: Any = type("Checkpoint", (), {"family": "sd15", "classes": {}})()
    assert specs.component_spec(checkpoint, "unet") == right and tried == [false, right]
    right_now = right
    right = false
    with pytest.raises(VerificationError):
        specs.component_spec(checkpoint, "unet")
    assert tried[2:] == [right_now, right_now]  # from the file, and traced anew; then it is an error
