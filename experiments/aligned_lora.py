"""A LoRA under an alignment at the size of Stable Diffusion 1.5, on random weights, tensor by tensor.

    python -m experiments.aligned_lora

Every linear layer of a block of the UNet gets a LoRA of rank 16. The block is computed in fp32 with weights and LoRA,
and with both moved, for an input whose channels are moved, too; the outputs' relative difference is printed.
"""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from rebasin.adapters import align_adapter
from rebasin.checkpoints.architectures import build, published
from rebasin.checkpoints.random_weights import random_state
from rebasin.tracing import trace
from rebasin.types import State

BLOCKS = ("down_blocks.0.attentions.0", "mid_block.attentions.0")
RANK = 16


def main() -> None:
    """Print the difference for each block."""
    console = Console(soft_wrap=True)
    module, args, kwargs = build("unet", published("sd1")["unet"])
    spec = trace(module, *args, **kwargs)
    alignment = spec.random_alignment(1)
    base = random_state(spec.shapes, 0, torch.float32)
    view = alignment.view(base)
    generator = torch.Generator().manual_seed(2)
    for block in BLOCKS:
        own = [name for name in spec.shapes if name.startswith(f"{block}.")]
        adapter: dict[str, Tensor] = {}
        for name in own:
            out, *inner = spec.shapes[name]
            if len(inner):
                stem = f"unet.{name.removesuffix('.weight')}"
                kernel = inner[1:]
                adapter[f"{stem}.lora_B.weight"] = 0.1 * torch.randn(
                    out, RANK, *(1 for _ in kernel), generator=generator
                )
                adapter[f"{stem}.lora_A.weight"] = 0.1 * torch.randn(RANK, *inner, generator=generator)
        moved = align_adapter(alignment, adapter, base)
        net: Any = module.get_submodule(block).to_empty(device="cpu").eval()
        size = spec.shapes[f"{block}.norm.weight"][0]
        index = dict(alignment.permutation.axes_of(f"{block}.norm.weight"))[0]
        x = torch.randn(1, size, 16, 16, generator=generator)
        text = torch.randn(1, 77, 768, generator=generator)

        wanted = _computed(net, base, adapter, block, x, text)[:, index]
        found = _computed(net, view, moved, block, x[:, index], text)
        still = _computed(net, base, {}, block, x, text)[:, index]
        left = _computed(net, view, adapter, block, x[:, index], text)
        error, effect, unmoved = (float((y - wanted).norm() / wanted.norm()) for y in (found, still, left))
        console.print(
            f"{block}: {len(adapter) // 2} layers, moved {error:.1e}, without the LoRA {effect:.2f}, LoRA not moved"
            f" {unmoved:.2f}",
            highlight=False,
        )


def _computed(net: Any, state: State, adapter: State, block: str, x: Tensor, text: Tensor) -> Tensor:
    """What a block of the UNet computes with its weights and what the adapter adds to them."""
    own = [name for name in state if name.startswith(f"{block}.")]
    net.load_state_dict({name.removeprefix(f"{block}."): state[name] + _added(adapter, name) for name in own})
    with torch.no_grad():
        return net(x, encoder_hidden_states=text).sample


def _added(factors: State, name: str) -> Tensor | float:
    stem = f"unet.{name.removesuffix('.weight')}"
    if f"{stem}.lora_B.weight" not in factors:
        return 0.0
    up, down = factors[f"{stem}.lora_B.weight"], factors[f"{stem}.lora_A.weight"]
    product = up.flatten(1) @ down.flatten(1)
    return product.reshape(*product.shape, *(1 for _ in down.shape[2:]))


if __name__ == "__main__":
    main()
