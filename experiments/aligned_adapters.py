"""Adapters under an alignment at the size of Stable Diffusion 1.5, on random weights.

    python -m experiments.aligned_adapters                       # about 3 minutes, 12 GB
    python -m experiments.aligned_adapters --only blocks         # LoRA, DoRA, LoHa, LoKr: less than a minute

Two blocks of the UNet are computed in fp32 with weights and adapter, and with both moved by a random alignment of all
groups, for an input whose channels are moved, too. A ControlNet is computed beside its whole UNet, a textual inversion
in its text encoder. `moved` is the relative difference of the outputs; `effect` what the adapter does to them, `not
moved` the difference if the adapter stays as it is. What an adapter adds is written out here by its definition.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import torch
import typer
from diffusers import ControlNetModel
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from rebasin.adapters import align_adapter, joint_controlnet, move_controlnet
from rebasin.adapters.aligned import maps_at_work
from rebasin.adapters.embeddings import move_embeddings
from rebasin.checkpoints.architectures import build, published
from rebasin.checkpoints.random_weights import random_state
from rebasin.spec import Alignment
from rebasin.tracing import trace
from rebasin.types import State

BLOCKS = ("down_blocks.0.attentions.0", "mid_block.attentions.0")
RANK = 16

Row = tuple[str, str, int, float, float, float]
Name = Callable[[str, str], str]
"""(module, factor) -> the name in a file."""


def kohya(module: str, factor: str) -> str:
    return f"lora_unet_{module.replace('.', '_')}.{factor}"


def peft(module: str, factor: str) -> str:
    return f"unet.{module}.{({'lora_up': 'lora_B', 'lora_down': 'lora_A'})[factor.removesuffix('.weight')]}.weight"


class Drawn:
    """Random factors of a kind of adapter for a layer of a shape: factor -> tensor."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def randn(self, *shape: int) -> Tensor:
        return 0.1 * torch.randn(shape, generator=self.generator)

    def lora(self, weight: Tensor) -> dict[str, Tensor]:
        out, inner, *kernel = weight.shape
        ones = [1 for _ in kernel]
        return {
            "lora_up.weight": self.randn(out, RANK, *ones),
            "lora_down.weight": self.randn(RANK, inner, *kernel),
        }

    def dora(self, weight: Tensor) -> dict[str, Tensor]:
        norms = weight.flatten(1).norm(dim=1) * (1 + self.randn(weight.shape[0]))
        return {**self.lora(weight), "dora_scale": norms.reshape(-1, *(1 for _ in weight.shape[1:]))}

    def loha(self, weight: Tensor) -> dict[str, Tensor]:
        out, inner = weight.shape[0], weight[0].numel()
        sides = {"a": (out, 4), "b": (4, inner)}
        return {f"hada_w{i}_{side}": 2 * self.randn(*shape) for i in (1, 2) for side, shape in sides.items()}

    def lokr(self, weight: Tensor) -> dict[str, Tensor]:
        out, inner = weight.shape[0], weight[0].numel()
        return {"lokr_w1": self.randn(8, 8), "lokr_w2": self.randn(out // 8, inner // 8)}


def changed(weight: Tensor, adapter: State, module: str, name: Name) -> Tensor:
    """A weight with what the adapter does to it, by the definitions of LoRA, DoRA, LoHa and LoKr."""

    def get(factor: str) -> Tensor | None:
        try:
            return adapter.get(name(module, factor))
        except KeyError:  # PEFT has no name for it
            return None

    up, down, diff = get("lora_up.weight"), get("lora_down.weight"), get("diff")
    first, small = get("hada_w1_a"), get("lokr_w1")
    alpha = get("alpha")
    if up is not None and down is not None:
        scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
        weight = weight + (scale * up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    elif diff is not None:
        weight = weight + diff.reshape(weight.shape)
    elif first is not None:
        a, b, c = (adapter[name(module, f"hada_{k}")] for k in ("w1_b", "w2_a", "w2_b"))
        weight = weight + ((first @ a) * (b @ c)).reshape(weight.shape)
    elif small is not None:
        weight = weight + torch.kron(small, adapter[name(module, "lokr_w2")]).reshape(weight.shape)
    norms = get("dora_scale")
    if norms is not None:
        length = weight.flatten(1).norm(dim=1).reshape(norms.shape)
        weight = norms * weight / length
    return weight


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def blocks(module: Any, alignment: Alignment, base: State) -> Iterator[Row]:
    """LoRA, DoRA, LoHa and LoKr on the layers of two blocks of the UNet."""
    view, shapes = alignment.view(base), alignment.spec.shapes
    for block in BLOCKS:
        weights = [name for name in shapes if name.startswith(f"{block}.") and len(shapes[name]) > 1]
        # DoRA's norms follow where a stream is read without gains in between.
        bare = [name for name in weights if name.endswith("proj_out.weight")]
        draw, net = Drawn(2), module.get_submodule(block).to_empty(device="cpu").eval()
        size = shapes[f"{block}.norm.weight"][0]
        index = dict(alignment.permutation.axes_of(f"{block}.norm.weight"))[0]
        x = 10 * draw.randn(1, size, 16, 16)
        text = 10 * draw.randn(1, 77, 768)

        def computed(state: State, adapter: State, x: Tensor, name: Name) -> Tensor:
            own = [n for n in shapes if n.startswith(f"{block}.")]  # noqa: B023
            full = {n: changed(state[n], adapter, n.removesuffix(".weight"), name) for n in own}
            net.load_state_dict({n.removeprefix(f"{block}."): t for n, t in full.items()})  # noqa: B023
            with torch.no_grad():
                return net(x, encoder_hidden_states=text).sample  # noqa: B023

        for kind, draws, chosen, name in (
            ("LoRA (kohya)", draw.lora, weights, kohya),
            ("LoRA (PEFT)", draw.lora, weights, peft),
            ("DoRA", draw.dora, bare, kohya),
            ("LoHa, unfolded", draw.loha, weights, kohya),
            ("LoKr, unfolded", draw.lokr, weights, kohya),
        ):
            adapter = {
                name(weight.removesuffix(".weight"), factor): tensor
                for weight in chosen
                for factor, tensor in draws(base[weight]).items()
            }
            moved = align_adapter(alignment, adapter, base, unfold=True)
            wanted = computed(base, adapter, x, name)[:, index]
            yield (
                kind,
                f"{block} ({size} channels)",
                len(chosen),
                apart(computed(view, moved, x[:, index], name), wanted),
                apart(computed(base, {}, x, name)[:, index], wanted),
                apart(computed(view, adapter, x[:, index], name), wanted),
            )


def controlnet(module: Any, args: tuple[Tensor, ...], alignment: Alignment, base: State) -> Row:
    """A ControlNet beside its UNet: what it adds to the streams arrives where they are now."""
    joint = joint_controlnet(module, *args)
    names = [name for name in joint.shapes if name.startswith("controlnet.")]
    drawn = random_state({name: joint.shapes[name] for name in names}, 3, torch.float32)
    control = {name.removeprefix("controlnet."): drawn[name] for name in names}
    draw = Drawn(4)
    with torch.device("meta"):
        net = ControlNetModel.from_unet(module, load_weights_from_unet=False)
    net, unet = net.to_empty(device="cpu").eval(), module.to_empty(device="cpu").eval()
    x, text, hint = (10 * draw.randn(*shape) for shape in ((1, 4, 16, 16), (1, 77, 768), (1, 3, 128, 128)))
    times = torch.tensor([500])

    def computed(state: State, adapter: State | None) -> Tensor:
        for name, tensor in unet.state_dict().items():
            tensor.copy_(state[name])
        added: dict[str, Any] = {}
        with torch.no_grad():
            if adapter is not None:
                net.load_state_dict(dict(adapter))
                down, middle = net(x, times, text, hint, return_dict=False)
                added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            return unet(x, times, text, **added).sample

    wanted, without = computed(base, control), computed(base, None)
    view = alignment.view(base)
    moved = move_controlnet(alignment, control, joint, base=base)
    found, still = computed(view, moved), computed(view, control)
    return (
        "ControlNet",
        "whole UNet",
        len(control),
        apart(found, wanted),
        apart(without, wanted),
        apart(still, wanted),
    )


def inversion() -> Row:
    """Two vectors in the place of tokens; the text encoder's stream is in its table, so they stay."""
    module, args, kwargs = build("text_encoder", published("sd1")["text_encoder"])
    spec = trace(module, *args, **kwargs)
    alignment = spec.random_alignment(1)
    base = random_state(spec.shapes, 5, torch.float32)
    table = next(name for name in spec.shapes if name.endswith("token_embedding.weight"))
    vectors = {"clip_l": Drawn(6).randn(2, spec.shapes[table][1])}
    moved = move_embeddings(alignment, vectors, maps_at_work(alignment, base))
    net: nn.Module = build("text_encoder", published("sd1")["text_encoder"], device=None)[0].eval()
    tokens = torch.arange(77)[None] % 50

    def computed(state: State, own: Tensor | None) -> Tensor:
        full = {name: state[name] for name in spec.shapes}
        if own is not None:
            full[table] = torch.cat([own, full[table][2:]])
        net.load_state_dict(full, strict=False, assign=True)
        with torch.no_grad():
            return net(tokens)

    wanted = computed(base, vectors["clip_l"])
    view = alignment.view(base)
    return (
        "textual inversion",
        "text encoder",
        1,
        apart(computed(view, moved["clip_l"]), wanted),
        apart(computed(base, None), wanted),
        apart(computed(view, vectors["clip_l"]), wanted),
    )


def main(
    only: Annotated[
        Literal["blocks", "controlnet", "inversion"] | None, typer.Option(help="one part")
    ] = None,
) -> None:
    """Print the differences for each kind of adapter."""
    console = Console(soft_wrap=True)
    began = time.perf_counter()
    table = Table("adapter", "of", "layers", "moved", "effect", "not moved")

    def tell(row: Row) -> None:
        kind, where, layers, *figures = row
        table.add_row(kind, where, str(layers), *(f"{x:.1e}" for x in figures))
        console.print(
            f"{kind}, {where}: {figures[0]:.1e}, {time.perf_counter() - began:.0f} s", highlight=False
        )

    if only in (None, "inversion"):
        tell(inversion())
    if only in (None, "blocks", "controlnet"):
        module, args, kwargs = build("unet", published("sd1")["unet"])
        spec = trace(module, *args, **kwargs)
        alignment = spec.random_alignment(1)
        base = random_state(spec.shapes, 0, torch.float32)
        if only in (None, "controlnet"):
            tell(controlnet(*build("unet", published("sd1")["unet"])[:2], alignment, base))
        if only in (None, "blocks"):
            for row in blocks(module, alignment, base):
                tell(row)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
