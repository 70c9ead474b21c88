"""Adapters follow an alignment with maps: aligned base and aligned adapter compute what base and adapter do."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

import rebasin
from rebasin.adapters import align_adapter
from rebasin.errors import AdapterError
from rebasin.spec import Alignment, PermutationSpec

State = dict[str, Tensor]
PREFIX = "down_blocks.0.attentions.0"
BLOCK = f"{PREFIX}.transformer_blocks.0"
LINEAR = [
    f"{BLOCK}.{n}"
    for n in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "ff.net.2")
]
LINEAR += [f"{BLOCK}.ff.net.0.proj", "time_embedding.linear_1"]


@cache
def world() -> tuple[UNet2DConditionModel, PermutationSpec, tuple[Any, ...]]:
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4, cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 8)
    return model, rebasin.trace(model, *inputs), inputs


def computed(state: State, changes: State) -> Tensor:
    model, _, inputs = world()
    full = {n: t + changes.get(n, 0) for n, t in state.items()}
    model.load_state_dict(full)
    with torch.no_grad():
        return model(*inputs).sample


def lora(modules: list[str], seed: int = 0) -> State:
    """kohya's names, rank 3."""
    generator = torch.Generator().manual_seed(seed)
    shapes = world()[1].shapes
    found = {}
    for name in modules:
        out, inner, *kernel = shapes[f"{name}.weight"]
        flat = "lora_unet_" + name.replace(".", "_")
        found[f"{flat}.lora_up.weight"] = 0.3 * torch.randn(out, 3, *(1 for _ in kernel), generator=generator)
        found[f"{flat}.lora_down.weight"] = 0.3 * torch.randn(3, inner, *kernel, generator=generator)
        found[f"{flat}.alpha"] = torch.tensor(3.0)
    return found


def difference(adapter: State) -> State:
    """What LoRA, LoHa and full differences add to the weights."""
    names = {"lora_unet_" + n.removesuffix(".weight").replace(".", "_"): n for n in world()[1].shapes}
    found: State = {}
    for key, tensor in adapter.items():
        flat, _, factor = key.partition(".")
        name = names.get(flat, "")
        if factor == "lora_up.weight":
            down = adapter[f"{flat}.lora_down.weight"]
            found[name] = torch.einsum("or...,ri...->oi...", tensor.flatten(1), down.flatten(1)).reshape(
                world()[1].shapes[name]
            )
        elif factor == "hada_w1_a":
            a, b, c, d = (adapter[f"{flat}.hada_{k}"] for k in ("w1_a", "w1_b", "w2_a", "w2_b"))
            found[name] = (a @ b) * (c @ d)
        elif factor == "diff":
            found[name] = tensor
        elif factor == "diff_b":
            found[name.removesuffix("weight") + "bias"] = tensor
    return found


@pytest.fixture(scope="module")
def base() -> State:
    return {n: t.clone() for n, t in world()[0].state_dict().items()}


def follows(adapter: State, alignment: Alignment, base: State) -> None:
    aligned = align_adapter(alignment, adapter, base)
    wanted = computed(base, difference(adapter))
    found = computed(alignment.apply(base), difference(aligned))
    without = computed(base, {})
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
    assert (wanted - without).norm() > 1e-2 * wanted.norm()
    assert (computed(alignment.apply(base), difference(adapter)) - wanted).norm() > 1e-2 * wanted.norm()


@pytest.mark.parametrize("seed", [1, 2])
def test_a_lora_on_every_kind_of_layer_follows(base: State, seed: int) -> None:
    follows(
        lora([*LINEAR, f"{PREFIX}.proj_in", f"{PREFIX}.proj_out"]), world()[1].random_alignment(seed), base
    )


def test_full_differences_and_biases_follow(base: State) -> None:
    shapes, found = world()[1].shapes, {}
    for name in (f"{BLOCK}.attn1.to_out.0", f"{BLOCK}.ff.net.0.proj"):
        flat = "lora_unet_" + name.replace(".", "_")
        found[f"{flat}.diff"] = 0.2 * torch.randn(shapes[f"{name}.weight"])
        found[f"{flat}.diff_b"] = 0.2 * torch.randn(shapes[f"{name}.bias"])
    follows(found, world()[1].random_alignment(3), base)


def loha(name: str) -> State:
    out, inner = world()[1].shapes[f"{name}.weight"]
    flat = "lora_unet_" + name.replace(".", "_")
    shapes = {"w1_a": (out, 3), "w1_b": (3, inner), "w2_a": (out, 3), "w2_b": (3, inner)}
    return {f"{flat}.hada_{k}": 0.5 * torch.randn(s) for k, s in shapes.items()} | {
        f"{flat}.alpha": torch.tensor(3.0)
    }


def test_a_product_by_elements_follows_scales_alone(base: State) -> None:
    spec = world()[1]
    whole = spec.random_alignment(4)
    scales = whole.without(g.name for g in spec.continuous if g.kind != "scales")
    follows(loha(f"{BLOCK}.ff.net.2"), scales, base)
    with pytest.raises(AdapterError, match=r"ff_net_2.*'hada_w1_a', which can't follow the map of"):
        align_adapter(whole, loha(f"{BLOCK}.ff.net.2"), base)


def test_products_that_do_not_fit_are_told_before_they_are_written_out(base: State) -> None:
    whole, flat = world()[1].random_alignment(4), "lora_unet_" + f"{BLOCK}.attn1.to_q".replace(".", "_")
    small = loha(f"{BLOCK}.attn1.to_q")
    odd = {**small, f"{flat}.hada_w2_b": torch.ones(2, 16), f"{flat}.hada_w2_a": torch.ones(12, 2)}
    for adapter, words in (
        (
            {f"{flat}.lokr_w1": torch.ones(5, 5), f"{flat}.lokr_w2": torch.ones(12, 12)},
            "does not make up a LoKr",
        ),
        ({f"{flat}.lokr_w1": torch.ones(2, 8), f"{flat}.lokr_w2": torch.ones(2, 8)}, "make up a LoKr"),
        ({n: t for n, t in small.items() if not n.endswith("w2_b")}, "has no hada_w2_b"),
        (odd, "fit"),
    ):
        with pytest.raises(AdapterError, match=words):
            align_adapter(whole, adapter, base, unfold=True)


def test_what_can_not_follow_is_told(base: State) -> None:
    whole = world()[1].random_alignment(4)
    flat = "lora_unet_" + f"{BLOCK}.attn1.to_q".replace(".", "_")
    dora = lora([f"{BLOCK}.attn1.to_q"]) | {f"{flat}.dora_scale": torch.ones(16, 1)}
    with pytest.raises(AdapterError, match="'dora_scale', which can't follow the map of"):
        align_adapter(whole, dora, base)
    norm = {
        "lora_unet_" + f"{BLOCK}.norm1".replace(".", "_") + f".{k}": torch.ones(16)
        for k in ("w_norm", "b_norm")
    }
    with pytest.raises(AdapterError, match="changes the gains .*norm1.weight', which maps"):
        align_adapter(whole, norm, base)
    plain = Alignment.of(whole.permutation)
    assert align_adapter(plain, dora, base).keys() == dora.keys()
