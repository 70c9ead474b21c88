"""A proof proves what it says: the model as it is, several inputs and members, and nothing compared is a failure."""

# Models here are put together of attributes that a type checker does not see.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import itertools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rebasin
from experiments.zoo_blocks import Apply
from rebasin.errors import TraceError, VerificationError
from rebasin.spec import Cell, Group, Leaf, Permutation, PermutationSpec, Site
from rebasin.tensors.memory import duplicate, sharing, tensors_of
from rebasin.tensors.precision import full_precision


def hidden(width: int = 6, **modules: nn.Module) -> dict[str, Any]:
    return {"a": nn.Linear(5, width), "o": nn.Linear(width, 3), **modules}


def free(*places: tuple[str, int], size: int = 6, shapes: dict[str, tuple[int, ...]]) -> PermutationSpec:
    """A spec that claims every permutation of `size` neurons at these (parameter, axis)."""
    sites = tuple(Site(name, axis, range(size)) for name, axis in places)
    return PermutationSpec((Group("g", (Cell("g", size, sites),), Leaf(0, range(size))),), shapes)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for n, t in model.state_dict().items()}


# ------------------------------------------------------------------------------------------ nothing is proved


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_output_that_is_not_finite_fails(value: float) -> None:
    model = Apply(lambda m, x: (m.o(torch.relu(m.a(x))), m.o(m.a(x)) * value), **hidden())
    report = rebasin.verify(model, rebasin.trace(model, torch.randn(2, 5)), torch.randn(2, 5))
    assert not report.passed and "not finite" in report.problem
    with pytest.raises(VerificationError, match="output.1"):
        report.require()


def test_root_of_a_parameter_is_no_failure() -> None:
    """Noise that would make it negative is replaced by noise that does not."""
    model = Apply(lambda m, x: m.o(m.a(x) * m.v.sqrt()), {"v": torch.rand(6) + 0.5}, **hidden())
    report = rebasin.verify(
        model, rebasin.trace(model, torch.randn(2, 5)), torch.randn(2, 5), dtype=torch.float64
    )
    assert report.passed and report.moved


def test_masked_logits_are_compared_where_they_are_finite() -> None:
    mask = torch.tensor([0.0, float("-inf"), 0.0])
    model = Apply(lambda m, x: m.o(torch.relu(m.a(x))) + mask.to(x), **hidden())
    assert rebasin.verify(model, rebasin.trace(model, torch.randn(2, 5)), torch.randn(2, 5)).passed


@pytest.mark.parametrize("output", ["integers", "zeros", "none"])
def test_nothing_compared_fails(output: str) -> None:
    give = {
        "integers": lambda y: y.argmax(-1),
        "zeros": torch.zeros_like,
        "none": lambda y: None,
    }[output]
    model = Apply(lambda m, x: give(m.o(torch.relu(m.a(x)))), **hidden())
    report = rebasin.verify(model, rebasin.trace(model, torch.randn(2, 5)), torch.randn(2, 5))
    assert not report.passed and "Nothing was compared" in report.problem


@dataclass
class Holder:
    logits: Tensor

    def __post_init__(self) -> None:
        self.extra = SimpleNamespace(x=1)


OPAQUE = {
    "object": lambda y: SimpleNamespace(logits=y),
    "iterator": lambda y: iter([y]),
    "generator": lambda y: (t for t in [y]),
    "nested object": lambda y: {"deep": [y, SimpleNamespace(h=y)]},
    "function": lambda y: lambda: y,
    "set": lambda y: {y},
    "map": lambda y: map(torch.relu, [y]),
}


@pytest.mark.parametrize("kind", OPAQUE)
def test_output_out_of_sight_is_refused(kind: str) -> None:
    model = Apply(lambda m, x: OPAQUE[kind](m.o(torch.relu(m.a(x)))), **hidden())
    x = torch.randn(2, 5)
    with pytest.raises(
        TraceError, match=r"output.* is of the type \w+, which can't be looked into; return tensors"
    ):
        rebasin.trace(model, x)
    spec = free(("a.weight", 0), shapes=shapes_of(model))
    with pytest.raises(TraceError):
        rebasin.verify(model, spec, x)


def test_tensors_beside_the_fields_of_an_output_are_outputs() -> None:
    def give(m: Any, x: Tensor) -> Holder:
        held = Holder(m.o(torch.relu(m.a(x))))
        held.extra = m.a(x)  # type: ignore[assignment]
        return held

    spec = rebasin.trace(Apply(give, **hidden()), torch.randn(2, 5))
    assert spec.neurons == 0 and any("extra" in p.reason for p in spec.pins)


def test_whole_numbers_and_masks_are_outputs() -> None:
    model = Apply(lambda m, x: (m.o(torch.relu(h := m.a(x))), h > 0), **hidden())
    assert rebasin.trace(model, torch.randn(2, 5)).neurons == 0


# ------------------------------------------------------------------------------------------ the model as it is


def shared(kind: str) -> nn.Module:
    model = Apply(
        lambda m, x: m.o(torch.relu(m.c(torch.relu(m.b(torch.relu(m.a(x))))))),
        a=nn.Linear(5, 6),
        b=nn.Linear(6, 6),
        c=nn.Linear(6, 6),
        o=nn.Linear(6, 3),
    )
    b, c, o = model.b.weight, model.c.weight, model.o.weight
    if kind == "data":
        c.data = b.data
    elif kind == "transposed":
        c.data = b.data.t()
    elif kind == "slice":
        o.data = b.data[2:5]
    elif kind == "step":
        o.data = b.data[::2]
    elif kind == "columns":
        model.a.weight.data = b.data[:, 1:]
    elif kind == "row":
        model.b.bias.data = c.data[2]
    elif kind == "column":
        model.b.bias.data = c.data[:, 2]
    elif kind == "overlap":
        pool = torch.randn(8, 6)
        b.data, c.data = pool[:6], pool[2:]
    elif kind == "apart":
        pool = torch.randn(12, 6)
        b.data, c.data = pool[:6], pool[6:]
    elif kind == "interleaved":
        pool = torch.randn(6, 12)
        b.data, c.data = pool[:, ::2], pool[:, 1::2]
    elif kind == "flat":
        c.data = b.data.reshape(-1)[:].view(6, 6).flatten().as_strided((6, 6), (1, 6))
    elif kind == "expanded":
        model.b.bias.data = torch.zeros(1).expand(6)
    elif kind == "buffer":
        model.register_buffer("table", b.data.t(), persistent=False)
        model.function = lambda m, x: (
            m.o(torch.relu(m.c(torch.relu(m.b(torch.relu(m.a(x))))))) + m.table.sum()
        )
    elif kind == "attribute":
        model.held = {"w": b.data[0]}
        model.function = lambda m, x: m.o(torch.relu(m.b(torch.relu(m.a(x)))) * m.held["w"])
    return model


KINDS = (
    "data transposed slice step columns row column overlap apart interleaved flat expanded buffer attribute"
)


@pytest.mark.parametrize("kind", KINDS.split())
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_memory_that_is_shared_moves_as_one(kind: str, device: str) -> None:
    """The permuted state, loaded into the very model, changes nothing; the meta model has the same spec."""
    model, x = shared(kind), torch.randn(2, 5)
    spec = rebasin.trace(model, x)
    if device == "meta":
        if kind == "expanded":
            return
        with torch.device("meta"):
            assert rebasin.trace(shared(kind), x) == spec
        return
    assert rebasin.verify(model, spec, x, dtype=torch.float64).passed
    if kind in ("data", "apart", "interleaved", "slice", "transposed", "row", "buffer"):
        assert spec.neurons
    with torch.no_grad():
        before = model(x)
        for seed in range(4):
            wanted = spec.random(seed).apply({n: t.clone() for n, t in model.state_dict().items()})
            if kind != "expanded":
                model.load_state_dict(wanted)
                assert all(torch.equal(t, wanted[n]) for n, t in model.state_dict().items())
            torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("kind", ["data", "transposed", "slice"])
def test_spec_that_unties_shared_memory_fails(kind: str) -> None:
    model = shared(kind)
    names = [("b.weight", 0), ("b.bias", 0), ("c.weight", 1)]
    if kind == "transposed":  # rows of the one are columns of the other
        names = [("a.weight", 0), ("a.bias", 0), ("b.weight", 1)]
    report = rebasin.verify(
        model, free(*names, shapes=shapes_of(model)), torch.randn(2, 5), dtype=torch.float64
    )
    assert not report.passed and report.guilty == ("g",)


def test_model_is_left_bit_for_bit() -> None:
    """Also when it is interrupted, and when it keeps things of its own."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.o, self.calls, self.seen = nn.Linear(5, 6), nn.Linear(6, 3), 0, []
            self.register_buffer("count", torch.zeros(1))
            self.stop = False

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen.append(x)
            self.table = x.sum()
            self.count.add_(1)
            if self.stop and self.calls > 2:
                raise KeyboardInterrupt
            return self.o(torch.relu(self.a(x)))

    model, x = Net(), torch.randn(2, 5)
    spec = rebasin.trace(model, x)
    before = {n: (t.data_ptr(), t.clone()) for n, t in model.state_dict().items()}
    attributes = set(vars(model))

    def as_before() -> bool:
        same = all(
            t.data_ptr() == before[n][0] and torch.equal(t, before[n][1])
            for n, t in model.state_dict().items()
        )
        return same and set(vars(model)) == attributes and model.calls == 0 and not model.seen

    assert rebasin.verify(model, spec, x, dtype=torch.float64).passed and as_before()
    calls = iter(range(10))

    def interrupt(module: nn.Module, args: Any, output: Any) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt

    with model.o.register_forward_hook(interrupt), pytest.raises(KeyboardInterrupt):
        rebasin.verify(model, spec, x, dtype=torch.float64)
    assert as_before()


def weight_normed() -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(5, 6)), nn.ReLU(), nn.Linear(6, 3))  # type: ignore[deprecated]


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    model[1].register_forward_hook(lambda module, args, output: 2 * output)
    return model


def branches() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.cond(x.sum() > 0, lambda z: m.a(z), lambda z: m.b(z), (x,))
        return m.o(torch.relu(m.c(y)))

    return Apply(forward, a=nn.Linear(5, 6), b=nn.Linear(5, 6), c=nn.Linear(6, 6), o=nn.Linear(6, 3))


UNUSUAL = {
    "old weight_norm": (weight_normed, "float64", 6),
    "parametrized weight_norm": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(5, 6)), nn.ReLU(), nn.Linear(6, 3)
        ),
        "float64",
        6,
    ),
    "orthogonal": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.orthogonal(nn.Linear(5, 6)), nn.ReLU(), nn.Linear(6, 3)
        ),
        "float64",
        6,
    ),
    "hook": (hooked, "float64", 6),
    "complex": (
        lambda: Apply(
            lambda m, x: m.o(torch.relu(m.a((x.to(m.w.dtype) @ m.w.T).abs()))),
            {"w": torch.randn(4, 5, dtype=torch.cfloat)},
            a=nn.Linear(4, 6),
            o=nn.Linear(6, 3),
        ),
        "float64",
        6,
    ),
    "whole numbers": (
        lambda: Apply(
            lambda m, x: m.o(torch.relu(m.a(x * m.codes))),
            **{"a": nn.Linear(5, 6), "o": nn.Linear(6, 3)},
        ),
        "float64",
        6,
    ),
    "half beside single": (
        lambda: Apply(
            lambda m, x: m.o(torch.relu(m.a(x)).to(m.o.weight.dtype)),
            a=nn.Linear(5, 6),
            o=nn.Linear(6, 3).half(),
        ),
        "float64",
        6,
    ),
    "casts of its own": (
        lambda: Apply(lambda m, x: m.o(torch.relu(m.a(x)).float()), **hidden()),
        "float64",
        6,
    ),
    "single precision only": (
        lambda: Apply(
            lambda m, x: m.o(torch.relu(m.a(x))) + x.view(torch.int32).view(2, 5)[0, 0] * 0, **hidden()
        ),
        "float32",
        6,
    ),
    "branches": (branches, "float64", 6),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_models_are_proved(name: str) -> None:
    build, dtype, neurons = UNUSUAL[name]
    model = build()
    if name == "whole numbers":
        model.register_parameter("codes", nn.Parameter(torch.arange(5), requires_grad=False))
    x = torch.randn(2, 5)
    spec = rebasin.trace(model, x)
    report = rebasin.verify(model, spec, x, dtype=torch.float64)
    assert report.passed and report.dtype == dtype and spec.neurons == neurons
    assert rebasin.verify(model, spec, x).passed
    torch.testing.assert_close(duplicate(model)(x), model(x))


def test_model_that_fails_on_its_inputs_is_one_sentence() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    spec = rebasin.trace(model, torch.randn(2, 5))
    with pytest.raises(VerificationError, match=r"^The model can't be computed on these inputs: [^\n]*\.$"):
        rebasin.verify(model, spec, torch.randn(2, 7))
    with pytest.raises(VerificationError, match="call it once"):
        rebasin.verify(nn.LazyLinear(3), spec, torch.randn(2, 7))
    with pytest.raises(TraceError, match="call it once"):
        rebasin.trace(nn.LazyLinear(3), torch.randn(2, 7))


# ------------------------------------------------------------------------------------------ several inputs and members


def test_symmetry_of_one_input_only_is_caught() -> None:
    """The codes that this input looks up are the same; those of another are not."""
    model = Apply(lambda m, i: m.o(m.e(i)), e=nn.Embedding(6, 4), o=nn.Linear(4, 3))
    spec = free(("e.weight", 0), shapes=shapes_of(model))
    member = Permutation(spec, {"g": np.array([0, 1, 2, 3, 5, 4])})
    ids = torch.tensor([[0, 1], [2, 5]])
    broken = rebasin.verify(model, spec, ids, permutation=member)
    assert not broken.passed
    only_zero = Apply(lambda m, x: m.o(F.relu(m.a(x)) * (x[:, :1] > 0)), **hidden())
    wrong = free(("a.weight", 0), ("a.bias", 0), shapes=shapes_of(only_zero))
    negative = -torch.rand(4, 5) * 0.01
    assert not rebasin.verify(only_zero, wrong, negative).passed


def test_symmetry_of_one_batch_size_only_is_caught() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.relu(m.a(x))
        return m.o(y.flip(-1) if x.shape[0] == 1 else y)

    model = Apply(forward, **hidden())
    spec = rebasin.trace(model, torch.randn(2, 5))
    assert spec.neurons == 6
    palindromes_only = rebasin.verify(model, spec, torch.randn(2, 5))
    assert not palindromes_only.passed


def test_every_member_of_a_small_group_is_likely_seen() -> None:
    """A code that 10 of 30 members leave alone: one member is no proof."""
    model = Apply(lambda m, x: m.o(torch.relu(m.a(x))[:, [0, 0, 0, 0, 0, 1]]), **hidden())
    spec = free(("a.weight", 0), ("a.bias", 0), shapes=shapes_of(model))
    assert not any(rebasin.verify(model, spec, torch.randn(2, 5), seed=s).passed for s in range(20))


# ------------------------------------------------------------------------------------------ precision


def settings() -> list[Any]:
    get, keys = (
        torch._C._get_fp32_precision_getter,
        itertools.product(("cuda", "mkldnn"), ("all", "matmul", "conv", "rnn")),
    )
    found: list[Any] = [get(*key) for key in (*keys, ("generic", "all"))]
    matmul = torch.backends.cuda.matmul
    found += [matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction]
    return [*found, torch.is_autocast_enabled("cpu")]


def test_precision_is_full_inside_and_as_it_was_outside() -> None:
    start = settings()
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    spec, seen = rebasin.trace(model, torch.randn(2, 5)), []
    model.register_forward_hook(lambda *_: seen.append(settings()))
    try:
        torch.set_float32_matmul_precision("medium")
        torch.backends.cudnn.allow_tf32 = True
        before = settings()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert rebasin.verify(model, spec, torch.randn(2, 5)).passed
        assert settings() == before and torch.get_float32_matmul_precision() == "medium"
        with pytest.raises(KeyboardInterrupt), full_precision(torch.device("cpu")):
            raise KeyboardInterrupt
        assert settings() == before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen and all(set(now[:9]) == {"ieee"} and not any(now[9:]) for now in seen)
    assert len(start) == len(settings())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_convolutions_on_cuda_are_proved_with_tf32_on() -> None:
    torch.backends.cudnn.allow_tf32 = True
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3),
        nn.ReLU(),
        nn.Conv2d(64, 4, 3),
    )
    model, x = model.cuda(), torch.randn(2, 3, 16, 16, device="cuda")
    assert rebasin.verify(model, rebasin.trace(model, x), x).passed
    assert torch.backends.cudnn.allow_tf32


# ------------------------------------------------------------------------------------------ odd tensors


ODD_OUTPUTS = {
    "sparse": Tensor.to_sparse,
    "rows": Tensor.to_sparse_csr,
    "quantised": lambda y: torch.quantize_per_tensor(y, 0.1, 0, torch.qint8),
    "eight bits": lambda y: y.to(torch.float8_e4m3fn),
}
ODD_INPUTS = {
    "sparse": torch.randn(2, 5).to_sparse(),
    "eight bits": torch.randn(2, 5).to(torch.float8_e4m3fn),
    "unsigned": torch.arange(10).view(2, 5).to(torch.uint16),
    "all numbers": torch.tensor([[-(2**63), 2**63 - 1, 0, 1, 2]]),
}


@pytest.mark.parametrize("kind", ODD_OUTPUTS)
def test_outputs_of_any_layout_are_compared(kind: str) -> None:
    model, x = Apply(lambda m, x: ODD_OUTPUTS[kind](m.o(torch.relu(m.a(x)))), **hidden()), torch.randn(2, 5)
    spec = rebasin.trace(model, x)
    assert spec.neurons == 6 and rebasin.verify(model, spec, x).passed
    wrong = free(("a.weight", 0), shapes=shapes_of(model))
    assert not rebasin.verify(model, wrong, x).passed


@pytest.mark.parametrize("kind", ODD_INPUTS)
def test_inputs_in_which_torch_can_not_draw_are_taken_as_they_are(kind: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.o(torch.relu(m.a(x.to_dense() if x.is_sparse else x.float())))

    model, x = Apply(forward, **hidden()), ODD_INPUTS[kind]
    spec = rebasin.trace(model, x)
    assert spec.neurons == 6 and rebasin.verify(model, spec, x).passed


def test_a_nested_input_is_refused_in_a_sentence() -> None:
    x = torch.nested.nested_tensor([torch.randn(2, 5), torch.randn(3, 5)])
    with pytest.raises(TraceError, match="can't be exported"):
        rebasin.trace(Apply(lambda m, x: m.o(torch.relu(m.a(x.to_padded_tensor(0.0)))), **hidden()), x)


# ------------------------------------------------------------------------------------------ copies


def test_a_copy_shares_memory_as_the_model_does() -> None:
    model = shared("transposed")
    made = duplicate(model)
    state, copy = dict(model.state_dict(keep_vars=True)), dict(made.state_dict(keep_vars=True))
    assert sharing(state, {}).views == sharing(copy, {}).views and sharing(copy, {}).views
    assert not {t.data_ptr() for t in tensors_of(model).values()} & {
        t.data_ptr() for t in tensors_of(made).values()
    }
    with torch.no_grad():
        made.b.weight.zero_()
    assert not made.c.weight.any() and model.b.weight.any()


class Recorder(nn.Module):
    """Returns what a hook recorded inside, as transformers does: the hook is installed on the first call, once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 4)
        self.installed = False
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if not self.installed:
            self.installed = True
            for layer in (self.first, self.last):
                layer.register_forward_hook(lambda _, __, y: self.seen.append(y.sum(-1)))
        self.seen = []
        y = self.last(self.first(x).relu())
        return y, *self.seen


def test_hooks_that_a_model_installs_on_its_first_call_are_its_state() -> None:
    x = torch.randn(3, 4)
    spec = rebasin.trace(Recorder(), x)
    assert spec.neurons == 6
    model = Recorder()
    assert rebasin.verify(model, spec, x, dtype=torch.float64).passed
    assert not model.installed and not model.first._forward_hooks and not model.last._forward_hooks
