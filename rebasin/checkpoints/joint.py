"""UNet and text encoders as one: what passes between them may be reordered, too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..spec import PermutationSpec
from ..tracing import compose
from ..types import DerivedState, State, passed
from .architectures import Built, architecture, build, component_config
from .reduced_width import narrow
from .specs import prove, proved

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

TEXTS = ("text_encoder", "text_encoder_2")
PARTS = (*TEXTS, "unet")


def joint_spec(checkpoint: Checkpoint, components: Sequence[str]) -> PermutationSpec:
    """The spec of a UNet and its text encoders together, with names `unet.*`, `text_encoder.*`.

    Traced at full size; proved in float64 at reduced width, which must move the same axes together.

    Raises:
        VerificationError: the proof failed; nothing may be aligned with this spec.
    """
    family = checkpoint.family
    own = {name: component_config(checkpoint, name) for name in components if name in PARTS}
    configs = {name: narrow(own[name], name, family) for name in TEXTS if name in own}
    reads = sum(config["hidden_size"] for config in configs.values())
    pooled = list(configs.values())[-1]["projection_dim"]
    configs["unet"] = narrow(own["unet"], "unet", family, reads, pooled)

    def reduced() -> Built:
        return joint_module({name: build(name, config, "cpu") for name, config in configs.items()})

    def proof(spec: PermutationSpec) -> None:
        prove(spec, reduced, f"The joint spec of {checkpoint.path}", twin=configs != own)

    return proved(joint_module({name: architecture(checkpoint, name) for name in components}), proof)


def joint_module(built: Mapping[str, Built]) -> Built:
    """The modules as one that goes from token ids to predicted noise, and its example inputs."""
    texts = [name for name in TEXTS if name in built]
    unet, (sample, timestep, _), kwargs = built["unet"]
    added = kwargs.get("added_cond_kwargs", {})
    ids = [built[name][1][0] for name in texts]
    numbers = [added["time_ids"]] if added else []
    modules = {name: built[name][0] for name in texts} | {"unet": unet}
    return compose(partial(_noise, len(texts)), **modules), (*ids, sample, timestep, *numbers), {}


def _noise(n: int, *given: Any) -> Tensor:
    """What the UNet predicts, given n text encoders, the UNet, token ids of each, latents, timesteps, numbers."""
    encoders, (net, *inputs) = given[:n], given[n:]
    tokens, (x, t, *rest) = inputs[:n], inputs[n:]
    hidden, pooled = [], None
    for encoder, own in zip(encoders, tokens, strict=True):
        states = encoder(own)
        if isinstance(states, tuple):
            states, pooled = states
        hidden.append(states)
    more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": rest[0]}} if rest else {}
    return net(x, t, torch.cat(hidden, dim=-1), **more).sample


def joint_state(checkpoint: Checkpoint, components: Iterable[str]) -> DerivedState:
    """These components as the one state that a joint spec speaks of, with names `component.name`."""
    states = {name: checkpoint.component(name) for name in components}
    return DerivedState({f"{own}.{name}": passed(s, name) for own, s in states.items() for name in s})


def without_prefix(state: State, prefix: str) -> DerivedState:
    """The part of a joint state whose names start with `prefix`, without it."""
    own = (name.removeprefix(prefix) for name in state if name.startswith(prefix))
    return DerivedState({name: passed(state, prefix + name) for name in own})


class PromptedUNet(nn.Module):
    """Text encoders and UNet as one, called like the UNet, but with token ids in the place of text states.

    It computes what the pipeline does: SDXL reads the states before the last layer, and the pooled text.
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.texts = tuple(name for name in TEXTS if name in parts)
        for name in (*self.texts, "unet"):
            self.add_module(name, parts[name])

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        ids: Mapping[str, Tensor],
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """ids: text encoder -> token ids [n, length]; added_cond_kwargs: SDXL's `time_ids`."""
        hidden, pooled, unet = [], None, cast(Any, self.unet)
        for name in self.texts:
            encoder: Any = getattr(self, name)
            found = encoder.text_model(
                input_ids=ids[name], output_hidden_states=added_cond_kwargs is not None
            )
            hidden.append(found.last_hidden_state if added_cond_kwargs is None else found.hidden_states[-2])
            pooled = found.pooler_output
        if added_cond_kwargs is None:
            return unet(sample, timestep, hidden[0])
        last: Any = getattr(self, self.texts[-1])
        added = {**added_cond_kwargs, "text_embeds": last.text_projection(pooled)}
        return unet(sample, timestep, torch.cat(hidden, dim=-1), added_cond_kwargs=added)


def prompted_unet(built: Mapping[str, Built]) -> Built:
    """The modules as a `PromptedUNet`, and its example inputs."""
    model = PromptedUNet({name: one[0] for name, one in built.items()}).eval()
    _, (sample, timestep, _), kwargs = built["unet"]
    ids = {name: built[name][1][0] for name in model.texts}
    added = kwargs.get("added_cond_kwargs")
    more = {} if added is None else {"added_cond_kwargs": {"time_ids": added["time_ids"]}}
    return model, (sample, timestep), {"ids": ids, **more}
