"""The engine: sound on every block, covered, deterministic, and wrong permutations are caught."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rebasin
from experiments.zoo import ZOO
from rebasin.errors import SpecMismatchError, TraceError, VerificationError
from rebasin.spec import Branch, Group, Leaf, Permutation, PermutationSpec, to_array

BLOCKS = ZOO["blocks"]
QUICK = ["clip_text", "gpt2", "llama_gqa", "t5"]


def traced(family: str, name: str):
    torch.manual_seed(0)
    model, args, kwargs = ZOO[family][name](False)
    return model, args, kwargs, rebasin.trace(model, *args, **kwargs)


@pytest.mark.parametrize("name", BLOCKS)
def test_block_is_sound(name: str) -> None:
    """Random members of the group preserve the function, in single and in double precision."""
    model, args, kwargs, spec = traced("blocks", name)
    for seed, dtype in ((0, torch.float32), (1, torch.float64), (2, torch.float64)):
        rebasin.verify(model, spec, *args, dtype=dtype, seed=seed, **kwargs).require()
    p, q = spec.random(3), spec.random(4)
    assert spec.contains(p) and spec.contains(p.compose(q)) and spec.contains(p.invert())
    assert p.compose(p.invert()) == spec.identity()
    state = model.state_dict()
    twice, once = p.apply(q.apply(state)), p.compose(q).apply(state)
    assert all(torch.equal(twice[k], once[k]) for k in state)
    assert rebasin.trace(model, *args, **kwargs) == spec == PermutationSpec.from_json(spec.to_json())


@pytest.mark.parametrize("name", QUICK)
def test_transformer_is_sound(name: str) -> None:
    model, args, kwargs, spec = traced("transformers", name)
    report = rebasin.verify(model, spec, *args, dtype=torch.float64, **kwargs)
    assert report.passed and report.moved > 100


@pytest.mark.parametrize("name", ["autoencoder_kl", "unet2d"])
def test_diffusion_model_is_sound_and_covered(name: str) -> None:
    model, args, kwargs, spec = traced("diffusers", name)
    rebasin.verify(model, spec, *args, **kwargs).require()
    assert spec.coverage().one > 0.999 and spec.coverage().both > 0.95


EXPECTED = {  # group structures, in the order of the parameters
    "mlp": ["S12", "S9"],
    "residual_mlp": ["S12", "S20"],
    "conv_flatten_linear": ["S8", "S6"],
    "group_norm": ["S3 wr S4"],
    "geglu": ["S12"],
    "shared_module": ["S8"],
    "fused_qkv": ["(S4^2) wr S4"],
    "handwritten_attention": ["S16", "(S4^2) wr S4"],
    "multihead_attention": ["S16", "(S4^2) wr S4"],
    "concat_of_halves": ["S6", "S6"],
    "depthwise_multiplier": ["S3 wr S8"],
    "max_over_channels": ["S8"],
    "mixer": ["S8", "S6", "S12"],
    "embedding_tied": ["S8", "S12"],
    "lstm": ["S7", "S7"],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_block_has_all_its_freedom(name: str) -> None:
    assert [g.structure for g in traced("blocks", name)[3]] == EXPECTED[name]


def _members(group: Group) -> list[dict[str, np.ndarray]]:
    """Every permutation that the tree allows, by enumeration."""

    def of(dst, src):
        if isinstance(dst, Leaf):
            for order in itertools.permutations(to_array(src.neurons)):
                yield [(dst, order)]
            return
        n = len(dst.children)
        orders = dst.moves
        if isinstance(orders, str):
            orders = [tuple(range(n))] if orders == "fixed" else list(itertools.permutations(range(n)))
        for order in orders:
            for parts in itertools.product(
                *(list(of(c, src.children[j])) for c, j in zip(dst.children, order, strict=True))
            ):
                yield [x for part in parts for x in part]

    found = []
    for assignment in of(group.tree, group.tree):
        index = {c.name: np.arange(c.size) for c in group.cells}
        for leaf, order in assignment:
            index[group.cells[leaf.cell].name][to_array(leaf.neurons)] = order
        found.append(index)
    return found


TINY = {
    "attention": (lambda: _attention(4, 2), (torch.randn(2, 3, 5),)),
    "group_norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1)),
        (torch.randn(2, 3, 3, 3),),
    ),
    "grouped": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 2, 1)),
        (torch.randn(2, 3, 3, 3),),
    ),
    "geglu": (lambda: _geglu(3), (torch.randn(2, 5),)),
}


def _geglu(width: int) -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(5, 2 * width), nn.Linear(width, 2)

        def forward(self, x):
            a, b = self.up(x).chunk(2, -1)
            return self.down(a * torch.sigmoid(b))

    return Net()


def _attention(width: int, heads: int) -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(5, width) for _ in range(3))
            self.o = nn.Linear(width, 2)

        def forward(self, x):
            b, t, _ = x.shape
            q, k, v = (f(x).view(b, t, heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.o(y.transpose(1, 2).reshape(b, t, width))

    return Net()


@pytest.mark.parametrize("name", TINY)
def test_brute_force(name: str) -> None:
    """Every permutation of the derived group preserves the function, and no other one of its cells' neurons does."""
    build, args = TINY[name]
    model = build()
    spec = rebasin.trace(model, *args)
    (group,) = spec
    members = _members(group)
    key = lambda index: tuple(tuple(int(x) for x in index[c.name]) for c in group.cells)  # noqa: E731
    legal = {key(m) for m in members}
    assert len(legal) == len(members) == round(10**group.log10_size)

    def error(index) -> float:
        p = Permutation(spec, index)
        return rebasin.verify(
            model, spec, *args, permutation=p, dtype=torch.float64, find_guilty=False
        ).max_relative_error

    every = itertools.product(*(itertools.permutations(range(c.size)) for c in group.cells))
    for checked, orders in enumerate(every):
        index = {c.name: np.array(o) for c, o in zip(group.cells, orders, strict=True)}
        inside = key(index) in legal
        assert spec.contains(Permutation(spec, index)) == inside
        if inside or checked % 7 == 0:  # legal ones all, illegal ones a sample
            assert (error(index) < 1e-9) == inside, index


def test_wrong_permutations_are_caught() -> None:
    """Across GroupNorm groups, across heads, of v alone, untied halves of GEGLU: each must fail, the guilty named."""
    model, args = TINY["group_norm"][0](), TINY["group_norm"][1]
    spec = rebasin.trace(model, *args)
    wrong = Permutation(spec, {spec.groups[0].cells[0].name: np.array([0, 2, 1, 3])})
    assert not spec.contains(wrong)
    report = rebasin.verify(model, spec, *args, permutation=wrong)
    assert not report.passed and report.guilty == (spec.groups[0].name,)
    with pytest.raises(VerificationError, match=spec.groups[0].name):
        report.require()

    model, args = TINY["attention"][0](), TINY["attention"][1]
    spec = rebasin.trace(model, *args)
    for (
        cell
    ) in spec.cells.values():  # two heads of two: swap a neuron between heads; swap heads in one cell alone
        for order in ([0, 2, 1, 3], [2, 3, 0, 1]):
            index = {**spec.identity().index, cell.name: np.array(order)}
            assert not spec.contains(Permutation(spec, index))
            assert not rebasin.verify(model, spec, *args, permutation=Permutation(spec, index)).passed


@pytest.mark.parametrize("forgotten", ["1.running_mean", "1.running_var", "0.bias", "1.weight"])
def test_a_spec_that_forgets_a_tensor_fails(forgotten: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1))
    x = torch.randn(2, 3, 4, 4)
    data = rebasin.trace(model, x)
    cells = [
        type(c)(c.name, c.size, tuple(s for s in c.sites if s.parameter != forgotten))
        for c in data.groups[0].cells
    ]
    assert any(len(a.sites) < len(b.sites) for a, b in zip(cells, data.groups[0].cells, strict=True))
    broken = PermutationSpec((Group("g", tuple(cells), data.groups[0].tree),), data.shapes, data.buffers)
    assert not rebasin.verify(model, broken, x).passed


def test_geglu_halves_untied_fails() -> None:
    model, args = TINY["geglu"][0](), TINY["geglu"][1]
    spec = rebasin.trace(model, *args)
    cell = spec.groups[0].cells[0]
    only_first = tuple(s for s in cell.sites if s.positions[0] < 3 or s.axis == 1)
    broken = PermutationSpec(
        (Group("g", (type(cell)("g", cell.size, only_first),), spec.groups[0].tree),), spec.shapes
    )
    assert not rebasin.verify(model, broken, *args).passed


def test_meta_model_gives_the_same_spec() -> None:
    with torch.device("meta"):
        meta = ZOO["diffusers"]["unet2d"](False)[0]
    _, args, kwargs, spec = traced("diffusers", "unet2d")
    assert rebasin.trace(meta, *args, **kwargs) == spec


def test_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2))
    model[2].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    spec = rebasin.trace(model, torch.randn(3, 4))
    rebasin.verify(model, spec, torch.randn(3, 4))
    assert [m.training for m in model] == [True, True, False, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_joint_spec_frees_the_text_encoder() -> None:
    """Traced together, the hidden state between two modules is permutable; alone it is an output, and pinned."""
    text, unet = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8)), nn.Linear(8, 2)
    alone = rebasin.trace(text, torch.randn(1, 3))
    assert len(alone) == 0 and any("output" in pin.reason for pin in alone.pins)
    joint = rebasin.compose(lambda te, un, x: un(te(x)), text_encoder=text, unet=unet)
    spec = rebasin.trace(joint, torch.randn(1, 3))
    assert [s.parameter for s in spec.groups[0].cells[0].sites] == [
        "text_encoder.0.weight",
        "text_encoder.0.bias",
        "text_encoder.1.weight",
        "text_encoder.1.bias",
        "unet.weight",
    ]
    rebasin.verify(joint, spec, torch.randn(4, 3)).require()


def test_pins_name_the_operator() -> None:
    spec = traced("blocks", "unknown_operator")[3]
    assert any("fft" in pin.reason and pin.parameter == "a.weight" for pin in spec.pins)
    assert "fft" in spec.summary() and len(spec) == 0


def test_causal_masks_are_traced_if_they_are_said_to_be_causal() -> None:
    x, mask = torch.randn(2, 5, 8), nn.Transformer.generate_square_subsequent_mask(5)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    with pytest.raises(TraceError, match="mask's values .* is_causal=True and a causal mask") as caught:
        rebasin.trace(encoder, x, mask=mask)
    assert "<string>" not in str(caught.value) and "data-dependent" not in str(caught.value)
    spec = rebasin.trace(encoder, x, mask=mask, is_causal=True)
    assert rebasin.verify(encoder, spec, x, mask=mask, is_causal=True).require() and spec.neurons == 32


def test_data_dependent_control_flow_is_one_clear_sentence() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x):
            if x.sum() > 0:
                return self.a(x)
            return x

    with pytest.raises(TraceError, match=r"test_tracing.py:\d+.*rebasin.compose"):
        rebasin.trace(Net(), torch.randn(2, 3))
    linear = nn.Linear(4, 4)
    for use in (
        lambda x: linear(x * x.max().item()),
        lambda x: linear(x) if x.max().item() > 0 else x,
        lambda x: linear(torch.cat(x.split([int(n) for n in x[0].tolist()]))),
        lambda x: linear(x) if bool((x > 0).all()) else x,
    ):
        with pytest.raises(
            TraceError, match=r"it depends on values of tensors .* leave that out, trace"
        ) as told:
            rebasin.trace(rebasin.compose(lambda m, x, use=use: use(x), linear=linear), torch.randn(4, 4))
        assert len(str(told.value)) <= 300 and "data-dependent" not in str(told.value)
    with pytest.raises(TraceError, match="torch.nn.Module"):
        rebasin.trace(lambda x: x, torch.randn(2, 3))  # type: ignore[arg-type]


def test_what_torch_says_of_a_failure_is_cut_and_nothing_is_printed(
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Net(nn.Module):
        def __init__(self, fault: Any) -> None:
            super().__init__()
            self.a, self.fault = nn.Linear(3, 3), fault

        def forward(self, x):
            return self.fault(
                self.a(x)
            )  # a long line, as there are in the code of models, which is cut in sentences

    def complains(x: Tensor) -> Tensor:
        raise ValueError("it goes on and " * 50)

    faults = [
        complains,
        lambda x: x[: int(x.sum())],
        lambda x: x @ torch.ones(5, 5),
        lambda x: x.numpy(),
        lambda x: x if x.sum() > 0 else -x,
    ]
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    for fault in faults:
        with pytest.raises(TraceError) as caught:
            rebasin.trace(Net(fault), torch.randn(2, 3))
        told = str(caught.value)
        assert len(told) <= 300 and told.count(".py:") == 1 and "\n" not in told, told
        assert told.endswith("trace a part of it, or a function of modules (rebasin.compose).")
    assert capfd.readouterr() == ("", "") and not logger.disabled


def test_applying_to_another_architecture_names_the_tensor() -> None:
    spec = rebasin.trace(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.randn(1, 4))
    other = nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 2)).state_dict()
    with pytest.raises(SpecMismatchError, match=r"'0.weight'.*\(9, 4\).*\(8, 4\)"):
        spec.random().apply(other)
    del other["0.weight"]
    with pytest.raises(SpecMismatchError, match="no tensor '0.weight'"):
        spec.random().apply(other)


def test_permutation_file_stands_alone(tmp_path) -> None:
    spec = traced("blocks", "handwritten_attention")[3]
    p = spec.random(5)
    p.save(tmp_path / "p.safetensors")
    assert Permutation.load(tmp_path / "p.safetensors") == p
    assert [f.name for f in tmp_path.iterdir()] == ["p.safetensors"]
    data = (tmp_path / "p.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[:-9])
    with pytest.raises(ValueError, match="cut.safetensors"):
        Permutation.load(tmp_path / "cut.safetensors")


def test_overlapping_partitions_keep_their_automorphisms() -> None:
    """GroupNorm(6) over 12 and GroupNorm(4) over the same 12 overlap as 2|1 1|2: the mirror image is legal."""
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.GroupNorm(3, 6), nn.GroupNorm(2, 6), nn.Conv2d(6, 2, 1))
    spec = rebasin.trace(model, torch.randn(2, 3, 4, 4))
    (group,) = spec.groups
    assert isinstance(group.tree, Branch) and len(group.tree.moves) == 2
    rebasin.verify(model, spec, torch.randn(2, 3, 4, 4), dtype=torch.float64, seed=1).require()


def _small_unet(**changes):
    from diffusers import UNet2DConditionModel

    config: dict[str, Any] = dict(
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=32,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return UNet2DConditionModel(**{**config, **changes})


def test_joint_text_encoder_and_unet() -> None:
    """The hidden state of CLIP becomes permutable together with the cross attention that reads it."""
    text, _, inputs = ZOO["transformers"]["clip_text"](False)
    unet = _small_unet()
    args = (inputs["input_ids"], torch.randn(1, 4, 8, 8), torch.tensor([3]))
    alone = rebasin.trace(text, **inputs)
    joint = rebasin.compose(
        lambda te, un, ids, x, t: un(x, t, te(input_ids=ids)[0]).sample, text_encoder=text, unet=unet
    )
    spec = rebasin.trace(joint, *args)
    both = [g for g in spec if len({s.parameter.split(".")[0] for c in g.cells for s in c.sites}) == 2]
    assert not any("embed" in s.parameter for c in alone.cells.values() for s in c.sites)
    assert [g.structure for g in both] == ["S32"]
    rebasin.verify(joint, spec, *args, dtype=torch.float64).require()


def test_spec_cache(tmp_path, monkeypatch) -> None:
    """Models of installed packages are cached; another shape or input is another key; own code is never cached."""
    monkeypatch.setenv("REBASIN_CACHE", str(tmp_path))
    files = lambda: list((tmp_path / "specs").glob("*.json")) if (tmp_path / "specs").exists() else []  # noqa: E731
    net = lambda width: nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))  # noqa: E731
    first = rebasin.trace(net(8), torch.randn(1, 4))
    assert len(files()) == 1 and rebasin.trace(net(8), torch.randn(1, 4)) == first and len(files()) == 1
    assert len(rebasin.trace(net(9), torch.randn(1, 4)).cells["0"].sites[0].positions) == 9
    assert len(files()) == 2
    files()[0].write_text("{}")
    files()[1].write_text("{}")
    assert rebasin.trace(net(8), torch.randn(1, 4)) == first  # a damaged entry is traced again
    model, args, kwargs = BLOCKS["geglu"](False)
    rebasin.trace(model, *args, **kwargs)
    assert len(files()) == 2
    monkeypatch.setenv("REBASIN_CACHE", "off")
    assert rebasin.trace(net(8), torch.randn(1, 4)) == first
