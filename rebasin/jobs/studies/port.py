"""What the permutation specs that circulate for Stable Diffusion do to the function that they must preserve.

Hand-written specs leave out ties that the UNet's computation needs. Here each kind of mistake is made on purpose, on a
real UNet with its trained weights, with the neurons that it concerns permuted at random and nothing else; "all of them
at once" is such a spec, and "derived" is ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig
from torch import nn

from ...errors import ConfigError
from ...reporting.console import Console
from ...spec import Cell, Group, Leaf, PermutationSpec, Site
from ...tasks import load_task
from ...tracing import verify

Tie = tuple[str, tuple[tuple[str, int], ...]]
"""A name, and the (parameter, axis) pairs that one free permutation acts on."""


def study(cfg: DictConfig, console: Console, draws: int = 3) -> list[dict[str, Any]]:
    """One row for each mistake and each of `draws` random permutations: relative L2 error of the UNet's output, and
    the held-out denoising loss of A before and after A itself was permuted.
    """
    with console.stage("load"):
        task = load_task(cfg)
        part = task.parts[task.aligned]
        a = task.endpoints(console.progress)[0]
        part.model.load_state_dict(dict(a))
    with console.stage("spec"):
        derived = part.spec()
        ties = mistakes(part.model)
        specs = {name: _spec(derived, own) for name, own in ties.items()}
        # Whichever mistake comes first has the axis: as in the specs in use, each axis has one permutation.
        specs["all of them at once"] = _spec(derived, _disjoint(t for own in ties.values() for t in own))
        specs["derived (none)"] = derived
    rows = []
    with console.stage("evaluate"):
        before = task.objective.evaluate(part.model, task.batches["heldout"])["loss"]
        for name, spec in specs.items():
            for seed in range(draws):
                permutation = spec.random(seed)
                report = verify(
                    part.model, spec, *part.args, permutation=permutation, randomise=False, find_guilty=False,
                    **part.kwargs,
                )  # fmt: skip
                part.model.load_state_dict(permutation.apply(a))
                after = task.objective.evaluate(part.model, task.batches["heldout"])["loss"]
                part.model.load_state_dict(dict(a))
                rows.append(
                    {
                        "mistake": name,
                        "draw": seed,
                        "neurons": spec.neurons,
                        "relative error": report.max_relative_error,
                        "loss of A": before,
                        "loss of A permuted": after,
                        "legal": report.passed,
                    }
                )
            console.say(f"{name}: relative error {rows[-1]['relative error']:.2g}")
    return rows


def mistakes(unet: nn.Module) -> dict[str, list[Tie]]:
    """Kind of mistake -> the permutations that make it, for a diffusers UNet2DConditionModel.

    Raises:
        ConfigError: the model is something else.
    """
    modules = dict(unet.named_modules())
    attentions = [n for n, m in modules.items() if type(m).__name__ == "Attention"]
    blocks = [n for n, m in modules.items() if type(m).__name__ == "ResnetBlock2D"]
    forwards = [n.removesuffix(".net.2") for n in modules if n.endswith(".ff.net.2")]
    if not attentions or not blocks or not forwards:
        raise ConfigError("The port's spec is one of Stable Diffusion's UNet: choose model=tiny_sd.")
    shortcuts = [n for n in blocks if getattr(modules[n], "conv_shortcut", None) is not None]
    found: dict[str, list[Tie]] = {
        "heads not kept together": [
            (f"{n}.qk", ((f"{n}.to_q.weight", 0), (f"{n}.to_k.weight", 0))) for n in attentions
        ],
        "queries and keys apart": [
            (f"{n}.to_{c}", ((f"{n}.to_{c}.weight", 0),)) for n in attentions if ".attn2" in n for c in "qk"
        ],
        "values not tied to their output": [
            (f"{n}.v", ((f"{n}.to_v.weight", 0), (f"{n}.to_v.weight", 1))[:1]) for n in attentions
        ],
        "GEGLU's halves in one": [
            (f"{n}.geglu", ((f"{n}.net.0.proj.weight", 0), (f"{n}.net.0.proj.bias", 0))) for n in forwards
        ],
        "GroupNorm's groups not kept": [
            (f"{n}.inner", (*_both(f"{n}.conv1"), *_both(f"{n}.time_emb_proj"), *_both(f"{n}.norm2"),
                            (f"{n}.conv2.weight", 1)))
            for n in blocks
        ],
        "a ResBlock's layers apart": [
            (f"{n}.{own}", _both(f"{n}.{own}")) for n in blocks for own in ("conv1", "time_emb_proj", "norm2")
        ],
        "residual and shortcut apart": [(f"{n}.shortcut", _both(f"{n}.conv_shortcut")) for n in shortcuts],
        "skip concatenation in one": [
            (f"{n}.concat", ((f"{n}.norm1.weight", 0), (f"{n}.norm1.bias", 0), (f"{n}.conv1.weight", 1),
                             (f"{n}.conv_shortcut.weight", 1)))
            for n in shortcuts if n.startswith("up_blocks")
        ],
        "latents and predicted noise moved": [
            ("conv_in", (("conv_in.weight", 1),)), ("conv_out", _both("conv_out")),
        ],
    }  # fmt: skip
    names = dict(unet.named_parameters())
    return {
        kind: [(name, tuple((p, axis) for p, axis in on if p in names)) for name, on in ties]
        for kind, ties in found.items()
    }


def _both(module: str) -> tuple[tuple[str, int], ...]:
    """The outputs of a layer: its weight's first axis and its bias."""
    return (f"{module}.weight", 0), (f"{module}.bias", 0)


def _disjoint(ties: Iterable[Tie]) -> list[Tie]:
    taken: set[tuple[str, int]] = set()
    found = []
    for name, on in ties:
        if not taken & set(on):
            taken |= set(on)
            found.append((name, on))
    return found


def _spec(derived: PermutationSpec, ties: Iterable[Tie]) -> PermutationSpec:
    """A spec of these free permutations, for the same architecture."""
    groups = []
    for name, on in ties:
        size = derived.shapes[on[0][0]][on[0][1]]
        sites = tuple(Site(parameter, axis, range(size)) for parameter, axis in on)
        groups.append(Group(name, (Cell(name, size, sites),), Leaf(0, range(size))))
    return PermutationSpec(tuple(groups), derived.shapes, derived.buffers, derived.aliases)
