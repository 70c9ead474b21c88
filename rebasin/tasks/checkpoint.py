"""Two Stable Diffusion checkpoints as people have them: one component of them is aligned, merged and measured.

The command `rebasin merge` does all components and never holds one as a whole; this task is for looking closely at
one: every algorithm, curves, figures, report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..checkpoints import Checkpoint, component_spec, open_checkpoint, require_same_family, save_checkpoint
from ..checkpoints.architectures import component_config
from ..checkpoints.checkpoint import require_fitting, require_same_prediction
from ..checkpoints.joint import joint_module, joint_spec, joint_state, without_prefix
from ..checkpoints.specs import proof
from ..errors import ConfigError
from ..spec import PermutationSpec
from ..types import State
from .agreement import Agreement, outputs_of, with_targets
from .base import Part, Task, require

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

JOINT = "joint"

JOINT_TOLERANCE = 1e-9
"""What the proof of a joint spec demands."""


def load(cfg: DictConfig) -> Task:
    """The component `model.component` of the checkpoints `model.a` and `model.b`.

    Raises:
        ConfigError: a file is not given, an option is unknown, or the evaluation needs more memory than there is.
        CheckpointError: a file is missing, damaged or something else, or the two are of different families, have
            different tensors or predict different things.
    """
    require(cfg, "objective", "agreement")
    a, b = (_open(cfg, name) for name in ("a", "b"))
    require_same_family(a, b)
    pair = _Pair(a, b, cfg.model.component, cfg.model.dtype, bool(cfg.model.joint))
    pair.check()
    require_fitting(a, b, pair.names)
    if "unet" in pair.names and not cfg.model.mix_predictions:
        require_same_prediction((a, b), "model.mix_predictions=true")
    measuring = not cfg.dry_run and cfg.model.batches > 0
    batches = pair.batches(cfg.model.batches, cfg.seed) if measuring else {}
    return Task(
        parts={pair.name: pair.part(measuring)},
        aligned=pair.name,
        labels=(a.path.name, b.path.name),
        endpoints=lambda progress: (pair.state(a), pair.state(b)),
        objective=Agreement(),
        batches=batches,
        export=pair.export,
        plan=pair.plan(cfg.model.batches),
    )


def _open(cfg: DictConfig, name: str) -> Checkpoint:
    path = cfg.model[name]
    if path is None:
        raise ConfigError(f"model=checkpoint needs model.{name}, a checkpoint's file or a diffusers folder.")
    return open_checkpoint(Path(str(path)).expanduser())


@dataclass(frozen=True, eq=False)
class _Pair:
    """Two checkpoints and the component of them that is looked at; with `joint` UNet and text encoders together."""

    a: Checkpoint
    b: Checkpoint
    component: str
    kind: str | None
    joint: bool

    @property
    def name(self) -> str:
        return JOINT if self.joint else self.component

    @property
    def names(self) -> tuple[str, ...]:
        """The components behind `name`."""
        both = [name for name in self.a.components if name in self.b.components]
        return tuple(name for name in both if name != "vae") if self.joint else (self.component,)

    def check(self) -> None:
        if self.kind not in (None, *DTYPES):
            raise ConfigError(f"model.dtype is {self.kind!r}; it takes {', '.join(DTYPES)} or null.")
        for checkpoint in (self.a, self.b):
            checkpoint.require(self.component)
        if self.joint and (self.component != "unet" or len(self.names) < 2):
            raise ConfigError(
                "model.joint=true needs model.component=unet and a text encoder in both checkpoints; they have"
                f" {', '.join(self.names)}."
            )

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: bf16 where fp32 would take over 6 GB for each copy of the model (SDXL's UNet)."""
        if self.kind is not None:
            return DTYPES[self.kind]
        return torch.float32 if 4 * sum(self.sizes) < 6e9 else torch.bfloat16

    @cached_property
    def sizes(self) -> list[int]:
        """How many numbers each tensor has."""
        return [prod(shape) for name in self.names for shape in self.a.shapes(name).values()]

    @cached_property
    def spec(self) -> PermutationSpec:
        """The proved spec."""
        if self.joint:
            return joint_spec(self.a, self.names)
        return component_spec(self.a, self.component)

    @property
    def proved(self) -> float:
        """The largest relative error in the proof of the spec, at reduced width in float64 (see checkpoints.specs)."""
        if self.joint:
            return JOINT_TOLERANCE  # made and proved at once, else there were no spec
        config = component_config(self.a, self.component)
        return proof(self.spec, config, self.a.family, self.component).max_relative_error

    def part(self, measuring: bool) -> Part:
        """The module: with A's weights where something is measured, else without numbers."""
        model, args, kwargs = self.built()
        if measuring:
            model = self.filled(model, self.a)
        # A spec that was restricted (structure=within) is a part of the one that is proved.
        return Part(model, args, kwargs, derive=lambda: self.spec, proved=lambda _: self.proved)

    def state(self, checkpoint: Checkpoint) -> State:
        if not self.joint:
            return checkpoint.component(self.component)
        return joint_state(checkpoint, self.names)

    def built(self) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        """The architecture, its parameters without numbers, and example inputs, which have some."""
        from accelerate import init_empty_weights

        from ..checkpoints import modules

        with init_empty_weights(include_buffers=False):
            parts = {name: modules.build(name, component_config(self.a, name)) for name in self.names}
        if not self.joint:
            return parts[self.component]
        return joint_module(parts)

    def filled(self, model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
        """A module whose parameters have no numbers, given those of a checkpoint."""
        state = self.state(checkpoint)
        model.load_state_dict({name: self.cast(state[name]) for name in model.state_dict()}, assign=True)
        return model.eval()

    def inputs(self, count: int, seed: int) -> list[dict[str, Any]]:
        found = []
        with torch.random.fork_rng():
            for number in range(count):
                torch.manual_seed(1000 * seed + number)
                _, args, kwargs = self.built()
                found.append(pytree.tree_map_only(Tensor, self.cast, {"args": args, "kwargs": kwargs}))
        return found

    def cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def batches(self, count: int, seed: int) -> dict[str, Sequence[Any]]:
        """Random inputs with the mean of A's and B's outputs; one model at a time is in memory.

        Raises:
            ConfigError: there is not as much memory.
        """
        need, free = self.memory(), _available()
        if free is not None and need > free:
            raise ConfigError(
                f"Measuring the {self.name} of {self.a.path.name} takes about {need / 1e9:.0f} GB of memory, but"
                f" {free / 1e9:.0f} GB are free; model.batches=0 aligns and merges without measuring, and the command"
                " rebasin merge takes the least."
            )
        inputs = {"heldout": self.inputs(count, seed), "train": self.inputs(count, seed + 1)}
        told = []
        for checkpoint in (self.a, self.b):
            model = self.filled(self.built()[0], checkpoint)
            told.append({split: outputs_of(model, own) for split, own in inputs.items()})
            del model
        return {split: with_targets(own, told[0][split], told[1][split]) for split, own in inputs.items()}

    def memory(self, measuring: bool = True) -> float:
        """Bytes at the peak: the model, a copy to put it back, one tensor in float32; or only what aligning takes."""
        each = max(2, 2 * self.dtype.itemsize) if measuring else 2  # bytes for a number
        return 1e9 + each * sum(self.sizes) + 16 * max(self.sizes)

    def plan(self, batches: int) -> list[str]:
        """What `dry_run=true` tells besides the spec."""
        sizes = ", ".join(
            f"{c.path.name} is {c.title}, {_size(c.path) / 1e9:.2f} GB" for c in (self.a, self.b)
        )
        numbers = f"{sum(self.sizes):,} numbers of {', '.join(self.names)}"
        memory = f"about {self.memory(batches > 0) / 1e9:.1f} GB of memory"
        how = f"computing in {str(self.dtype).removeprefix('torch.')}" if batches else "without measuring"
        return [f"{sizes};", f"{numbers}; {memory}, {how};"]

    def export(self, folder: Path, merged: State, metadata: Mapping[str, str]) -> Path:
        """The merge as a whole checkpoint: A with this component replaced, in A's names, order and types."""
        suffix = "" if self.a.path.is_dir() else ".safetensors"
        parts = {name: without_prefix(merged, f"{name}.") if self.joint else merged for name in self.names}
        header = {**self.a.metadata, **metadata}
        return save_checkpoint(folder / f"checkpoint{suffix}", self.a, self.a.restore(parts), header).path


def _available() -> float | None:
    """Bytes of memory that are free for the asking; None where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    except (OSError, ValueError):
        pass
    return None


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files if file.is_file())
