"""Checkpoints of random weights, of any size, and copies of them whose relation is known: for tests and measurements.

Nothing is in memory as a whole, and a tensor depends only on its name and the seed, so a full SDXL takes the memory of
its largest tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from ..types import DerivedState, LazyTensor, State, dtype_of, passed, shape_of
from .architectures import build
from .components import TEXT, UNET
from .key_map import shapes_of
from .layouts import single_file
from .reduced_width import reduced_configs


def random_checkpoint(
    family: str,
    width: int | None = None,
    *,
    variant: str = "base",
    depth: int | None = None,
    vocabulary: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
    ema: bool = False,
) -> DerivedState:
    """A single file's tensors of a family, as released or narrower (see `reduced_configs`), lazily.

    Everything that the released files have besides the components is there, too: position ids, SD2's layer and
    projection that are not used, the noise schedule, and with `ema` a second UNet of averaged weights.
    """
    configs = reduced_configs(family, width, variant=variant, depth=depth, vocabulary=vocabulary)
    if family == "sd2":
        configs[TEXT]["num_hidden_layers"] += 1
    states = {}
    for name, config in configs.items():
        module, _, _ = build(name, config)
        shapes = shapes_of(module.state_dict())
        if family == "sd2" and name == TEXT:
            shapes["text_projection.weight"] = (config["hidden_size"], config["hidden_size"])
        states[name] = random_state(shapes, seed, dtype, f"{name}.")
    whole = single_file(family, states)
    tensors = {name: passed(whole, name) for name in whole}
    tensors |= {
        name: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in _extras(family).items()
    }
    if ema:
        average = random_state(shapes_of(states[UNET]), seed + 1, torch.float32, "ema.")
        unet = single_file(family, {UNET: average})
        tensors |= {ema_name(name): passed(unet, name) for name in unet}
    return DerivedState(tensors)


def random_state(
    shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: torch.dtype, prefix: str = ""
) -> DerivedState:
    """Matrices ~ N(0, 1 / fan-in), vectors N(0, 0.01), weights of norms around 1."""

    def lazy(name: str, shape: tuple[int, ...]) -> LazyTensor:
        def make() -> Tensor:
            noise = torch.randn(shape, generator=_generator(prefix + name, seed))
            if len(shape) > 1:
                noise *= (max(1, noise.numel() // shape[0])) ** -0.5
            else:
                noise *= 0.1
                noise += 1.0 if "norm" in name and name.endswith("weight") else 0.0
            return noise.to(dtype)

        return LazyTensor(shape, dtype, make)

    return DerivedState({name: lazy(name, shape) for name, shape in shapes.items()})


def noisy(state: State, size: float, seed: int = 0) -> DerivedState:
    """`state` with normal noise of `size` times each tensor's standard deviation: a stand-in for a fine-tune."""

    def lazy(name: str) -> LazyTensor:
        def make() -> Tensor:
            tensor = state[name]
            if not tensor.is_floating_point() or tensor.numel() < 2:
                return tensor
            wide = tensor.float()
            noise = torch.randn(wide.shape, generator=_generator(f"noise.{name}", seed))
            return wide.add_(noise, alpha=size * float(wide.std())).to(tensor.dtype)

        return LazyTensor(shape_of(state, name), dtype_of(state, name), make)

    return DerivedState({name: lazy(name) for name in state})


def ema_name(name: str) -> str:
    """The name under which the original code keeps the average of a tensor of the UNet."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _extras(family: str) -> dict[str, Tensor]:
    extras: dict[str, Tensor] = {}
    if family in ("sd1", "sdxl"):
        prefix = "cond_stage_model" if family == "sd1" else "conditioner.embedders.0"
        extras[f"{prefix}.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    if family != "sd1":
        prefix = {"sd2": "cond_stage_model", "sdxl": "conditioner.embedders.1"}.get(
            family, "conditioner.embedders.0"
        )
        extras[f"{prefix}.model.logit_scale"] = torch.tensor(4.6055)
    if family in ("sd1", "sd2"):
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        extras |= {"betas": betas.float(), "alphas_cumprod": torch.cumprod(1 - betas, 0).float()}
    return extras
