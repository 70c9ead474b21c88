"""Adapters follow their model: aligned B with the moved adapter computes what B with the adapter does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rebasin
from rebasin import tracing
from rebasin.adapters import (
    component_of,
    describe_adapter,
    extend,
    is_adapter,
    is_controlnet,
    joint_controlnet,
    move_adapter,
    move_controlnet,
    part,
    union,
)
from rebasin.adapters.aligned import maps_at_work
from rebasin.adapters.embeddings import move_embeddings
from rebasin.adapters.move import LACKING, Module, _parameter
from rebasin.adapters.names import table
from rebasin.checkpoints import architecture
from rebasin.checkpoints.architectures import build
from rebasin.checkpoints.reduced_width import REDUCED_WIDTH, reduced_configs
from rebasin.errors import AdapterError, SpecMismatchError
from rebasin.spec import Alignment

torch.set_num_threads(1)
RANK = 3
WIDTH = 24  # of the text encoder

MODULES = {
    "down_blocks.0.attentions.1.proj_in": ("unet", "input_blocks_2_1_proj_in"),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (
        "unet",
        "input_blocks_1_1_transformer_blocks_0_attn1_to_q",
    ),
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0": (
        "unet",
        "middle_block_1_transformer_blocks_0_attn2_to_out_0",
    ),
    "up_blocks.1.attentions.2.transformer_blocks.0.ff.net.0.proj": (
        "unet",
        "output_blocks_5_1_transformer_blocks_0_ff_net_0_proj",
    ),
    "down_blocks.1.resnets.0.conv2": ("unet", "input_blocks_4_0_out_layers_3"),
    "down_blocks.1.resnets.0.time_emb_proj": ("unet", "input_blocks_4_0_emb_layers_1"),
    "down_blocks.0.downsamplers.0.conv": ("unet", "input_blocks_3_0_op"),
    "up_blocks.0.upsamplers.0.conv": ("unet", "output_blocks_2_1_conv"),
    "up_blocks.3.resnets.1.conv_shortcut": ("unet", "output_blocks_10_0_skip_connection"),
    "time_embedding.linear_1": ("unet", "time_embed_0"),
    "conv_out": ("unet", "out_2"),
    "encoder.layers.0.self_attn.v_proj": ("text_encoder", "text_model_encoder_layers_0_self_attn_v_proj"),
    "encoder.layers.1.mlp.fc1": ("text_encoder", "text_model_encoder_layers_1_mlp_fc1"),
}
"""The module, its component, and its name in kohya's files with LDM's block numbers."""


class SmallPipeline:
    """A narrow Stable Diffusion 1: the library's own UNet and text encoder, with a random permutation of both."""

    def __init__(self) -> None:
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        torch.manual_seed(0)
        self.unet = UNet2DConditionModel(
            block_out_channels=(16, 32, 32, 32),
            attention_head_dim=4,
            cross_attention_dim=WIDTH,
            norm_num_groups=4,
            sample_size=8,
        ).double()
        config = CLIPTextConfig(
            vocab_size=40,
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=8,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
        self.text = CLIPTextModel(config).double()
        for tensor in (*self.unet.parameters(), *self.text.parameters()):
            tensor.data += 0.05 * torch.randn_like(tensor)
        self.ids = torch.tensor([[0, 5, 9, 30, 1]])
        self.latents, self.time = torch.randn(1, 4, 8, 8).double(), torch.tensor([7])
        hidden = torch.zeros(1, 5, WIDTH).double()
        self.specs = {
            "unet": rebasin.trace(self.unet, self.latents, self.time, hidden),
            "text_encoder": rebasin.trace(self.text, self.ids),
        }
        self.permutation = union({name: spec.random(3) for name, spec in self.specs.items()})
        self.state = {f"unet.{n}": t.clone() for n, t in self.unet.state_dict().items()}
        self.state |= {f"text_encoder.{n}": t.clone() for n, t in self.text.state_dict().items()}

    def __call__(self, state: dict[str, Tensor]) -> Tensor:
        """The predicted noise for a prompt."""
        own = {"unet": self.unet, "text_encoder": self.text}
        for name, model in own.items():
            model.load_state_dict(
                {n.removeprefix(f"{name}."): t for n, t in state.items() if n.startswith(f"{name}.")}
            )
        with torch.no_grad():
            return self.unet(self.latents, self.time, self.text(self.ids)[0]).sample


@pytest.fixture(scope="module")
def pipeline() -> SmallPipeline:
    return SmallPipeline()


# What an adapter means, from its definition: factors -> difference ----------------------------------------------


def rand(*shape: int) -> Tensor:
    return 0.2 * torch.randn(*shape, dtype=torch.float64)


def lora(shape: tuple[int, ...], core: bool = False) -> dict[str, Tensor]:
    """LoRA as kohya has it: a convolution's kernel is in `down`, or (core) in `mid`."""
    out, inp, *kernel = shape
    flat = [1] * len(kernel)
    factors = {"lora_up.weight": rand(out, RANK, *flat), "alpha": torch.tensor(2.0, dtype=torch.float64)}
    if core and kernel and kernel[0] > 1:
        return factors | {
            "lora_down.weight": rand(RANK, inp, *flat),
            "lora_mid.weight": rand(RANK, RANK, *kernel),
        }
    return factors | {"lora_down.weight": rand(RANK, inp, *kernel)}


def loha(shape: tuple[int, ...], core: bool = False) -> dict[str, Tensor]:
    out, inp, *kernel = shape
    factors = {"alpha": torch.tensor(2.0, dtype=torch.float64)}
    for i in (1, 2):
        if core and kernel and kernel[0] > 1:
            factors |= {f"hada_w{i}_a": rand(RANK, out), f"hada_w{i}_b": rand(RANK, inp)}
            factors |= {f"hada_t{i}": rand(RANK, RANK, *kernel)}
        else:
            factors |= {
                f"hada_w{i}_a": rand(out, RANK),
                f"hada_w{i}_b": rand(RANK, inp * int(np.prod(kernel))),
            }
    return factors


def lokr(
    shape: tuple[int, ...], core: bool = False, whole: bool = False, both: bool = False
) -> dict[str, Tensor]:
    out, inp, *kernel = shape
    outs, ins = (2 if out % 2 == 0 else 1), (4 if inp % 4 == 0 else 1)
    factors = {"alpha": torch.tensor(2.0, dtype=torch.float64)}
    if both:
        factors |= {"lokr_w1_a": rand(outs, RANK), "lokr_w1_b": rand(RANK, ins)}
    else:
        factors |= {"lokr_w1": rand(outs, ins)}
    if whole:
        return factors | {"lokr_w2": rand(out // outs, inp // ins, *kernel)}
    if core and kernel and kernel[0] > 1:
        factors |= {"lokr_t2": rand(RANK, RANK, *kernel)}
        return factors | {"lokr_w2_a": rand(RANK, out // outs), "lokr_w2_b": rand(RANK, inp // ins)}
    pixels = int(np.prod(kernel))
    return factors | {"lokr_w2_a": rand(out // outs, RANK), "lokr_w2_b": rand(RANK, inp // ins * pixels)}


def full(shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {"diff": rand(*shape), "diff_b": rand(shape[0])}


def ia3(shape: tuple[int, ...], on_input: bool = False) -> dict[str, Tensor]:
    flat = [1] * len(shape[2:])
    weight = rand(1, shape[1], *flat) if on_input else rand(shape[0], *flat, 1)
    return {"weight": weight, "on_input": torch.tensor(on_input)}


def difference(factors: dict[str, Tensor], weight: Tensor) -> Tensor:
    """What the factors add to the weight, in float64."""
    f = {name: tensor.double() for name, tensor in factors.items()}
    shape = weight.shape
    if "diff" in f:
        return f["diff"].reshape(shape)
    if "on_input" in f:
        v = f["weight"].reshape(1, -1) if f["on_input"] else f["weight"].reshape(-1, 1)
        return weight * v.reshape(*v.shape, *(1 for _ in shape[2:]))
    if "lora_up.weight" in f:
        up, down = f["lora_up.weight"].flatten(1), f["lora_down.weight"]
        if "lora_mid.weight" in f:
            down = torch.einsum("pm...,mi->pi...", f["lora_mid.weight"], down.flatten(1))
        return (f["alpha"] / down.shape[0] * (up @ down.flatten(1))).reshape(shape)
    if "hada_w1_a" in f:
        sides = []
        for i in (1, 2):
            a, b = f[f"hada_w{i}_a"], f[f"hada_w{i}_b"]
            core = f.get(f"hada_t{i}")
            side = a @ b if core is None else torch.einsum("ij...,jr,ip->pr...", core, b, a)
            sides.append(side.reshape(shape))
        return f["alpha"] / RANK * sides[0] * sides[1]
    w1 = f["lokr_w1"] if "lokr_w1" in f else f["lokr_w1_a"] @ f["lokr_w1_b"]
    scale = f["alpha"] / RANK if {"lokr_w1_a", "lokr_w2_a"} & f.keys() else 1.0
    small = (shape[0] // w1.shape[0], shape[1] // w1.shape[1], *shape[2:])
    if "lokr_w2" in f:
        w2 = f["lokr_w2"]
    elif "lokr_t2" in f:
        w2 = torch.einsum("ij...,ip,jr->pr...", f["lokr_t2"], f["lokr_w2_a"], f["lokr_w2_b"])
    else:
        w2 = (f["lokr_w2_a"] @ f["lokr_w2_b"]).reshape(small)
    return scale * torch.kron(w1.reshape(*w1.shape, *(1 for _ in shape[2:])), w2.contiguous())


def decomposed(weight: Tensor, difference: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA: rows (or columns) of W + D at the length that `magnitude` says."""
    total = weight + difference
    dims = tuple(d for d in range(total.ndim) if magnitude.shape[d] == 1)
    return total / total.square().sum(dim=dims, keepdim=True).sqrt() * magnitude


def adapted(
    pipeline: SmallPipeline, state: dict[str, Tensor], adapter: dict[str, Tensor], name_of: Callable
) -> dict[str, Tensor]:
    """`state` with the adapter merged into it."""
    result = dict(state)
    used = set()
    for module, (component, ldm) in MODULES.items():
        parameter = f"{component}.{module}.weight"
        start = name_of(component, module, ldm) + "."
        factors = {key.removeprefix(start): t for key, t in adapter.items() if key.startswith(start)}
        used |= {start + factor for factor in factors}
        if factors:
            weight = state[parameter]
            delta = difference(factors, weight)
            result[parameter] = (
                decomposed(weight, delta, factors["dora_scale"])
                if "dora_scale" in factors
                else weight + delta
            )
        if "diff_b" in factors and f"{component}.{module}.bias" in state:
            result[f"{component}.{module}.bias"] = state[f"{component}.{module}.bias"] + factors["diff_b"]
    assert used == adapter.keys()  # no tensor of the adapter was left out
    return result


def kohya_ldm(component: str, module: str, ldm: str) -> str:
    return f"lora_{'te' if component == 'text_encoder' else 'unet'}_{ldm}"


def kohya_diffusers(component: str, module: str, ldm: str) -> str:
    return kohya_ldm(component, module, ldm if component == "text_encoder" else module.replace(".", "_"))


def make(
    pipeline: SmallPipeline,
    factors: Callable[..., dict[str, Tensor]],
    name_of: Callable = kohya_ldm,
    dora: str = "",
):
    torch.manual_seed(1)
    adapter = {}
    for module, (component, ldm) in MODULES.items():
        shape = tuple(pipeline.state[f"{component}.{module}.weight"].shape)
        own = factors(shape)
        flat = [1] * len(shape[2:])
        if dora == "rows":
            own["dora_scale"] = 1 + rand(shape[0], 1, *flat)
        elif dora == "columns":
            own["dora_scale"] = 1 + rand(1, shape[1], *flat)
        adapter |= {f"{name_of(component, module, ldm)}.{factor}": t for factor, t in own.items()}
    return adapter


def check(
    pipeline: SmallPipeline, adapter: dict[str, Tensor], name_of: Callable = kohya_ldm, **options
) -> dict[str, Tensor]:
    before = {name: tensor.clone() for name, tensor in adapter.items()}
    moved = move_adapter(pipeline.permutation, adapter, **options)
    expected = pipeline(adapted(pipeline, pipeline.state, adapter, name_of))
    plain = pipeline(pipeline.state)
    assert (expected - plain).norm() > 1e-2 * plain.norm()  # the adapter does something
    aligned = pipeline.permutation.apply(pipeline.state)
    torch.testing.assert_close(pipeline(aligned), plain, rtol=0, atol=1e-9)
    found = pipeline(adapted(pipeline, aligned, moved, name_of))
    tolerance = (
        1e-9 if all(t.dtype == torch.float64 for t in moved.values() if t.is_floating_point()) else 1e-5
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    stale = pipeline(adapted(pipeline, aligned, adapter, name_of))
    assert (stale - expected).norm() > 1e-3 * expected.norm()  # and it had to be moved
    assert all(torch.equal(before[name], adapter[name]) for name in before)
    return moved


KINDS: dict[str, tuple[Callable[..., dict[str, Tensor]], str]] = {
    "LoRA": (lora, ""),
    "LoCon with a core": (functools.partial(lora, core=True), ""),
    "LoHa": (loha, ""),
    "LoHa with cores": (functools.partial(loha, core=True), ""),
    "full difference": (full, ""),
    "IA3": (ia3, ""),
    "IA3 on inputs": (functools.partial(ia3, on_input=True), ""),
    "LoRA, DoRA of rows": (lora, "rows"),
    "LoHa, DoRA of columns": (loha, "columns"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kohya_and_lycoris(pipeline: SmallPipeline, kind: str) -> None:
    factors, dora = KINDS[kind]
    adapter = make(pipeline, factors, dora=dora)
    moved = check(pipeline, adapter)
    assert moved.keys() == adapter.keys() and is_adapter(adapter)


def test_kohya_with_diffusers_block_names(pipeline: SmallPipeline) -> None:
    check(pipeline, make(pipeline, lora, kohya_diffusers), kohya_diffusers)


@pytest.mark.parametrize("options", [{}, {"core": True}, {"whole": True}, {"both": True}], ids=str)
def test_lokr(pipeline: SmallPipeline, options: dict) -> None:
    adapter = make(pipeline, functools.partial(lokr, **options))
    with pytest.raises(AdapterError, match="lora_unet_.*Kronecker.*unfold"):
        move_adapter(pipeline.permutation, adapter)
    moved = check(pipeline, adapter, unfold=True)
    left = {key.rsplit(".", 1)[0] for key in moved if "lokr" in key}
    assert "lora_unet_conv_out" not in left and len(left) < len(MODULES)


def test_lokr_stays_where_the_permutation_is_a_product(pipeline: SmallPipeline) -> None:
    """A permutation of whole blocks, and of the places within all blocks alike, is carried by the factors."""
    spec = pipeline.specs["unet"]
    p = spec.identity()
    group = next(
        g
        for g in spec
        if any(s.parameter == "time_embedding.linear_1.weight" for c in g.cells for s in c.sites)
    )
    (cell,) = group.cells
    blocks, inside = np.array([1, 0]), np.random.default_rng(0).permutation(cell.size // 2)
    index = dict(p.index) | {cell.name: (blocks[:, None] * (cell.size // 2) + inside).reshape(-1)}
    product = rebasin.Permutation(spec, index)
    torch.manual_seed(2)
    weight = pipeline.unet.state_dict()["time_embedding.linear_1.weight"]
    for options in ({}, {"whole": True}, {"both": True}):
        factors = lokr(tuple(weight.shape), **options)
        name = "lora_unet_time_embedding_linear_1."
        moved = move_adapter(product, {name + f: t for f, t in factors.items()})
        assert moved.keys() == {name + f for f in factors}
        new = {key.removeprefix(name): t for key, t in moved.items()}
        expected = product.apply_to("time_embedding.linear_1.weight", difference(factors, weight))
        torch.testing.assert_close(difference(new, weight), expected)
        assert not torch.equal(difference(new, weight), difference(factors, weight))


DIFFUSERS = {
    "peft": ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight"),
    "named": ("base_model.model.{}.lora_A.default.weight", "base_model.model.{}.lora_B.default.weight"),
    "linear layer": ("unet.{}.lora_linear_layer.down.weight", "unet.{}.lora_linear_layer.up.weight"),
    "dots": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
    "processor": ("unet.{}.processor.{}_lora.down.weight", "unet.{}.processor.{}_lora.up.weight"),
}


@pytest.mark.parametrize("style", DIFFUSERS)
def test_diffusers_names(pipeline: SmallPipeline, style: str) -> None:
    """The same factors under the names of diffusers and PEFT move as they do under kohya's."""
    adapter = {
        k: t for k, t in make(pipeline, lora).items() if "attn" in k and "lora_unet" in k and "alpha" not in k
    }
    expected = move_adapter(pipeline.permutation, adapter)
    names = {kohya_ldm(*v[:1], k, v[1]): k for k, v in MODULES.items()}
    renamed = {}
    for key in adapter:
        start, _, factor = key.partition(".")
        pattern = DIFFUSERS[style]["up" in factor]
        path = names[start]
        if style == "processor":
            outer, _, inner = path.removesuffix(".0").rpartition(".")
            renamed[key] = pattern.format(outer, inner)
        else:
            renamed[key] = pattern.format(path)
    moved = move_adapter(pipeline.permutation, {renamed[key]: t for key, t in adapter.items()})
    assert moved.keys() == set(renamed.values())
    assert all(torch.equal(moved[renamed[key]], expected[key]) for key in adapter)
    assert any(not torch.equal(expected[key], adapter[key]) for key in adapter)


def test_peft_magnitudes_and_text_encoder(pipeline: SmallPipeline) -> None:
    module = "encoder.layers.1.mlp.fc1"
    rows = dict(pipeline.permutation.axes_of(f"text_encoder.{module}.weight"))[0]
    vector = torch.arange(32.0)
    for prefix in ("text_encoder.text_model.", "text_encoder."):
        pair = {
            f"{prefix}{module}.lora_A.weight": rand(1, WIDTH),
            f"{prefix}{module}.lora_B.weight": rand(32, 1),
        }
        key = f"{prefix}{module}.lora_magnitude_vector"
        assert torch.equal(move_adapter(pipeline.permutation, {**pair, key: vector})[key], vector[rows])
    start = "unet.down_blocks.1.resnets.0.conv2"
    pair = {f"{start}.lora_A.weight": rand(1, 32, 3, 3), f"{start}.lora_B.weight": rand(32, 1, 1, 1)}
    conv = f"{start}.lora_magnitude_vector.weight"
    rows = dict(pipeline.permutation.axes_of("unet.down_blocks.1.resnets.0.conv2.weight"))[0]
    moved = move_adapter(pipeline.permutation, {**pair, conv: vector.reshape(1, 32, 1, 1)})[conv]
    assert torch.equal(moved.reshape(-1), vector[rows])


def test_one_component_and_joint_permutations(pipeline: SmallPipeline) -> None:
    """A permutation of the UNet alone leaves the text encoder's modules; a joint one moves what both share."""
    adapter = make(pipeline, lora)
    alone = move_adapter(part(pipeline.permutation, pipeline.specs["unet"], "unet."), adapter)
    both = move_adapter(pipeline.permutation, adapter)
    for key in adapter:
        assert torch.equal(alone[key], adapter[key] if "lora_te" in key else both[key])

    joint = rebasin.compose(
        lambda te, un, ids, x, t: un(x, t, te(ids)[0]).sample, text_encoder=pipeline.text, unet=pipeline.unet
    )
    spec = rebasin.trace(joint, pipeline.ids, pipeline.latents, pipeline.time)
    stream = pipeline.permutation
    try:
        pipeline.permutation = spec.random(1)
        assert (
            dict(pipeline.permutation.axes_of("text_encoder.encoder.layers.0.self_attn.v_proj.weight"))[1]
            is not None
        )
        check(pipeline, adapter)
    finally:
        pipeline.permutation = stream


def test_refusals(pipeline: SmallPipeline) -> None:
    weight = rand(RANK, 16)
    with pytest.raises(AdapterError, match="single_transformer_blocks.*another architecture"):
        move_adapter(
            pipeline.permutation, {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": weight}
        )
    with pytest.raises(AdapterError, match="OFT"):
        move_adapter(pipeline.permutation, {"lora_unet_time_embed_0.oft_blocks": rand(2, 4, 4)})
    with pytest.raises(AdapterError, match=r"shape \(3, 5\).*16 neurons"):
        move_adapter(pipeline.permutation, pair_of("lora_unet_time_embed_0", 64, 5))
    with pytest.raises(AdapterError, match="nothing to move"):
        move_adapter(
            part(pipeline.permutation, pipeline.specs["unet"], "unet."),
            {"lora_te_x.lora_down.weight": weight},
        )
    with pytest.raises(AdapterError, match=r"'first_stage_model.x.bias'.*no part of a LoRA"):
        move_adapter(pipeline.permutation, {"first_stage_model.x.bias": weight})
    assert not is_adapter(pipeline.state) and not is_adapter([])


def pair_of(module: str, out: int, inp: int) -> dict[str, Tensor]:
    return {f"{module}.lora_up.weight": rand(out, RANK), f"{module}.lora_down.weight": rand(RANK, inp)}


LINEAR, CONV = "lora_unet_time_embed_0", "lora_unet_input_blocks_4_0_out_layers_3"
"""Of shapes (64, 16) and (32, 32, 3, 3)."""

HALVES: dict[str, tuple[dict[str, Tensor], str]] = {
    "no up": ({"lora_down.weight": rand(3, 16)}, "no lora_up"),
    "no down": ({"lora_up.weight": rand(64, 3), "alpha": torch.tensor(1.0)}, "no lora_down"),
    "alpha alone": ({"alpha": torch.tensor(1.0)}, "has alpha, but nothing"),
    "DoRA norm alone": ({"dora_scale": rand(64, 1)}, "has dora_scale, but nothing"),
    "LoHa without a factor": (
        {"hada_w1_a": rand(64, 2), "hada_w1_b": rand(2, 16), "hada_w2_a": rand(64, 2)},
        "no hada_w2_b",
    ),
    "LoKr without w2": ({"lokr_w1": rand(4, 4)}, "no lokr_w2"),
    "LoKr with half a w1": ({"lokr_w1_a": rand(4, 2), "lokr_w2": rand(16, 4)}, "no lokr_w1_b"),
    "LoKr with two w2": (
        {"lokr_w1": rand(4, 4), "lokr_w2": rand(16, 4), "lokr_w2_a": rand(16, 1), "lokr_w2_b": rand(1, 4)},
        "lokr_w2_a",
    ),
    "LoKr with a whole w2 and a core": (
        {"lokr_w1": rand(4, 4), "lokr_w2": rand(16, 4), "lokr_t2": rand(2, 2, 1, 1)},
        "lokr_t2, which does not belong",
    ),
    "LoKr with a core of w1": (
        {
            "lokr_w1_a": rand(4, 2),
            "lokr_w1_b": rand(2, 4),
            "lokr_t1": rand(2, 2, 1, 1),
            "lokr_w2": rand(16, 4),
        },
        "lokr_t1, which does not belong",
    ),
    "LoKr too large": ({"lokr_w1": rand(4, 4), "lokr_w2": rand(64, 16)}, "does not make up a LoKr"),
    "IA3 of inputs or outputs": ({"weight": rand(64)}, "no on_input"),
    "two kinds": (
        {"lora_up.weight": rand(64, 3), "lora_down.weight": rand(3, 16), "hada_w1_a": rand(64, 3)},
        "two kinds, LoRA and LoHa",
    ),
    "other ranks": ({"lora_up.weight": rand(64, 5), "lora_down.weight": rand(2, 16)}, "ranks do not fit"),
    "long alpha": (
        {"lora_up.weight": rand(64, 2), "lora_down.weight": rand(2, 16), "alpha": rand(7)},
        "one number",
    ),
    "core of a linear layer": (
        {"lora_up.weight": rand(64, 2), "lora_down.weight": rand(2, 16), "lora_mid.weight": rand(2, 2, 3, 3)},
        "does not make up a LoRA",
    ),
    "core of another rank": (
        {"lora_up.weight": rand(64, 2), "lora_down.weight": rand(2, 16), "lora_mid.weight": rand(2, 3, 1, 1)},
        "ranks do not fit",
    ),
    "norm of another kind": ({"diff": rand(64, 16), "dora_scale": rand(64, 1)}, "does not belong"),
    "long difference": ({"diff": rand(64, 16, 3)}, "does not make up a full difference"),
    "two adapters": (
        {f"lora_{x}.{name}.weight": rand(2, 2) for x in "AB" for name in ("one", "two")},
        "the same factor",
    ),
}


@pytest.mark.parametrize("case", HALVES)
def test_modules_that_are_not_whole(pipeline: SmallPipeline, case: str) -> None:
    """Refused wherever they are, also in a component that was not aligned."""
    factors, sentence = HALVES[case]
    module = {f"{LINEAR}.{factor}": tensor for factor, tensor in factors.items()}
    whole = pair_of("lora_te_text_model_encoder_layers_1_mlp_fc1", 32, WIDTH)
    with pytest.raises(AdapterError, match=sentence) as found:
        move_adapter(pipeline.permutation, {**whole, **module}, unfold=True, what="w" * 60)
    assert "time_embed_0" in str(found.value) and len(str(found.value)) <= 300
    if "make up" not in sentence:  # what weight that is, is known in aligned components alone
        with pytest.raises(AdapterError, match=sentence):
            text = part(pipeline.permutation, pipeline.specs["text_encoder"], "text_encoder.")
            move_adapter(text, {**whole, **module})


def test_a_module_under_two_names(pipeline: SmallPipeline) -> None:
    other = pair_of("unet.time_embedding.linear_1", 64, 16)
    with pytest.raises(AdapterError, match=f"twice, as '{LINEAR}' and as 'unet.time_embedding.linear_1'"):
        move_adapter(pipeline.permutation, pair_of(LINEAR, 64, 16) | other)


def test_a_second_text_encoder_that_the_model_has_not(pipeline: SmallPipeline) -> None:
    """It is known from the UNet alone; the first one is left as it is where only the UNet was aligned."""
    own = pair_of(LINEAR, 64, 16)
    unet = part(pipeline.permutation, pipeline.specs["unet"], "unet.")
    for permutation in (pipeline.permutation, unet):
        with pytest.raises(AdapterError, match="lora_te2_.*no second text encoder"):
            move_adapter(
                permutation, own | pair_of("lora_te2_text_model_encoder_layers_0_mlp_fc1", 32, WIDTH)
            )
    first = pair_of("lora_te_text_model_encoder_layers_0_mlp_fc1", 32, WIDTH)
    moved = move_adapter(unet, own | first)
    assert all(moved[key] is first[key] for key in first)


def test_describe(pipeline: SmallPipeline) -> None:
    info = describe_adapter(make(pipeline, loha, dora="rows"))
    assert info.kinds == {"LoHa with DoRA": len(MODULES)} and info.ranks == (RANK,) and info.naming == "kohya"
    assert info.components == {"unet": len(MODULES) - 2, "text_encoder": 2}


@pytest.mark.parametrize(
    ("family", "component"),
    [
        ("sd1", "unet"),
        ("sd1", "vae"),
        ("sd2", "text_encoder"),
        ("sdxl", "text_encoder"),
        ("sdxl", "text_encoder_2"),
    ],
)
def test_a_spec_of_one_component_is_known_by_its_names(family: str, component: str) -> None:
    shapes = {
        name: tuple(tensor.shape) for name, tensor in architecture(family, component)[0].state_dict().items()
    }
    assert component_of(rebasin.spec.PermutationSpec((), shapes)) == (component,)


def test_union_part_and_extend(pipeline: SmallPipeline) -> None:
    spec = pipeline.specs["unet"]
    own = part(pipeline.permutation, spec, "unet.")
    assert own == spec.random(3) and union(
        {"unet": own, "text_encoder": pipeline.specs["text_encoder"].random(3)}
    ) == (pipeline.permutation)
    assert pipeline.permutation.spec.contains(pipeline.permutation)
    with pytest.raises(SpecMismatchError):
        extend(
            pipeline.permutation,
            union({"unet": rebasin.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).identity()}).spec,
        )


def _zeros(spec: rebasin.spec.PermutationSpec) -> dict[str, Tensor]:
    """What a joint spec has besides a UNet."""
    names = [name for name in spec.shapes if not name.startswith("unet.")]
    return {name: torch.zeros(spec.shapes[name], dtype=torch.float64) for name in names}


class Encoder(torch.nn.Module):
    """The names of a text encoder, and a stream that nothing holds."""

    def __init__(self) -> None:
        super().__init__()
        self.text_model = torch.nn.Module()
        self.text_model.embeddings = torch.nn.Module()
        self.text_model.embeddings.token_embedding = torch.nn.Embedding(9, 6)
        self.text_model.norm = torch.nn.LayerNorm(6)
        self.text_model.read = torch.nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        model: Any = self.text_model
        return model.read(model.norm(model.embeddings.token_embedding(ids)))


def test_textual_inversions_follow_a_stream_that_moves() -> None:
    torch.manual_seed(0)
    model, ids = Encoder().double(), torch.tensor([[1, 2, 3]])
    alignment = rebasin.trace(model, ids).random_alignment(2)
    whole = union({"text_encoder": alignment})
    state, table = dict(model.state_dict()), "text_model.embeddings.token_embedding.weight"
    embedding = {"emb_params": rand(2, 6)}
    assert any(site.parameter == table for g in alignment.spec.continuous for site in g.sites)
    moved = move_embeddings(whole, embedding, maps_at_work(whole, None))["emb_params"]

    def run(state: dict[str, Tensor], vectors: Tensor) -> Tensor:
        rows = state[table].clone()
        rows[2:4] = vectors
        model.load_state_dict({**state, table: rows})
        return model(ids)

    expected = run(state, embedding["emb_params"])
    torch.testing.assert_close(run(alignment.apply(state), moved), expected, rtol=0, atol=1e-12)
    with pytest.raises(AdapterError, match="of width 5, but the aligned text encoder needs 6"):
        move_embeddings(whole, {"emb_params": rand(2, 5)})


@pytest.mark.parametrize("layout", ["diffusers", "ldm"])
def test_controlnet(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a UNet of two levels; that of Stable Diffusion 1 is in test_cli.py."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    torch.manual_seed(4)
    model = UNet2DConditionModel(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
        norm_num_groups=4,
    ).double()
    control = ControlNetModel.from_unet(model, load_weights_from_unet=False).double()
    for tensor in control.parameters():  # its last layers begin at zero
        tensor.data += 0.05 * torch.randn_like(tensor)
    state = control.state_dict()
    latents, time, hint = torch.randn(1, 4, 8, 8).double(), torch.tensor([7]), rand(1, 3, 64, 64)
    hidden = rand(1, 5, WIDTH)
    trace, seen = tracing.trace, []
    monkeypatch.setattr(tracing, "trace", lambda *given: seen.append(given) or trace(*given))
    joint = joint_controlnet(model, latents, time, hidden)
    monkeypatch.undo()
    both = [{s.parameter.split(".")[0] for c in g.cells for s in c.sites} for g in joint]
    assert {"controlnet", "unet"} in both and joint.coverage().one > 0.999
    if layout == "diffusers":
        (module, *args), *_ = seen
        rebasin.verify(module, joint, *args, dtype=torch.float64).require()
    own = rebasin.trace(model, latents, time, hidden).random(3)
    permutation = union({"unet": own})

    def run(unet: dict[str, Tensor], controlnet: dict[str, Tensor]) -> Tensor:
        control.load_state_dict(controlnet)
        model.load_state_dict(unet)
        with torch.no_grad():
            down, middle = control(latents, time, hidden, hint, return_dict=False)
            added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            return model(latents, time, hidden, **added).sample

    def renamed(state: dict[str, Tensor], back: bool = False) -> dict[str, Tensor]:
        if layout == "diffusers":
            return state
        pairs = [(f"controlnet_down_blocks.{i}.", f"control_model.zero_convs.{i}.0.") for i in range(4)]
        pairs.append(("controlnet_mid_block.", "control_model.middle_block_out.0."))
        result = {}
        for name, tensor in state.items():
            for ours, theirs in pairs:
                a, b = (theirs, ours) if back else (ours, theirs)
                if name.startswith(a):
                    name = b + name.removeprefix(a)
            result[name] = tensor
        return result

    unet = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: tensor.clone() for name, tensor in state.items()}
    expected = run(unet, state)
    file = renamed(state)
    assert is_controlnet(file) and not is_controlnet(unet)
    moved = move_controlnet(permutation, file, joint)
    assert list(moved) == list(file)
    aligned = own.apply(unet)
    torch.testing.assert_close(run(aligned, renamed(moved, back=True)), expected, rtol=0, atol=1e-9)
    assert (run(aligned, state) - expected).norm() > 1e-3 * expected.norm()
    # Its own streams and norms stay under maps of the UNet, too; texts that are mapped are read as such.
    mapped = rebasin.trace(model, latents, time, hidden).random_alignment(3)
    followed = move_controlnet(union({"unet": mapped}), file, joint)
    torch.testing.assert_close(
        run(mapped.apply(unet), renamed(followed, back=True)), expected, rtol=0, atol=1e-9
    )
    source = next(g for g in joint.continuous if any(s.parameter == "source.weight" for s in g.sites))
    turned = Alignment(joint.identity(), {source.name: source.random(torch.Generator().manual_seed(1))})
    matrix = turned.maps[source.name][0]
    followed = move_controlnet(turned, file, joint) if layout == "diffusers" else None
    if followed is not None:
        view = turned.view({**{f"unet.{n}": t for n, t in unet.items()}, **_zeros(joint)})
        hidden = hidden @ matrix.T
        texts = {name: view[f"unet.{name}"] for name in unet}
        torch.testing.assert_close(run(texts, followed), expected, rtol=0, atol=1e-9)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(run(texts, state), expected, rtol=0, atol=1e-9)
    with pytest.raises(AdapterError, match="zero_convs|controlnet_down_blocks"):
        move_controlnet(
            permutation,
            {n: t for n, t in file.items() if "down_blocks.3." not in n and "zero_convs.3." not in n},
            joint,
        )
    with pytest.raises(AdapterError, match="another architecture"):
        name = next(n for n in file if "mid_block.weight" in n or "block_out.0.weight" in n)
        move_controlnet(permutation, file | {name: rand(8, 8, 1, 1)}, joint)


def test_what_text_encoders_a_model_lacks_is_told_by_its_unet() -> None:
    lacks = {}
    for family in ("sd1", "sdxl", "sdxl_refiner"):
        config = reduced_configs(family, REDUCED_WIDTH[family], depth=1, vocabulary=64)["unet"]
        unet = table(build("unet", config, "meta")[0].state_dict())
        lacks[family] = [name for name, lacking in LACKING.items() if lacking(unet)]
        module = Module(name := "lora_te1_text_model_encoder_layers_0_mlp_fc1", "text_encoder", name, {})
        if family == "sdxl_refiner":
            with pytest.raises(AdapterError, match="the aligned model has no first text encoder"):
                _parameter(module, {"unet": unet}, "x")
        else:
            assert _parameter(module, {"unet": unet}, "x") is None
    assert lacks == {"sd1": ["text_encoder_2"], "sdxl": [], "sdxl_refiner": ["text_encoder"]}


@pytest.mark.parametrize(
    ("module", "part"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv", "transformer"),
        ("transformer.transformer_blocks.0.attn.to_q", "transformer"),
        ("lora_transformer_transformer_blocks_0_attn_to_q", "transformer"),
        ("diffusion_model.blocks.0.self_attn.q", "transformer"),
        ("diffusion_model.layers.0.attention.qkv", "transformer"),
        ("base_model.model.model.layers.0.self_attn.q_proj", "model"),
        ("base_model.model.down_blocks.0.attentions.0.proj_in", "unet"),
        ("lora_unet_input_blocks_4_1_proj_in", "unet"),
        ("unet.mid_block.attentions.0.proj_in", "unet"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "text_encoder"),
    ],
)
def test_what_a_module_is_of_is_told_by_its_path(module: str, part: str) -> None:
    state = {f"{module}.lora_A.weight": torch.ones(2, 4), f"{module}.lora_B.weight": torch.ones(4, 2)}
    assert dict(describe_adapter(state).components) == {part: 1}
