"""The interface between models and the run."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from ..checkpoints import load_safetensors
from ..errors import ConfigError
from ..evaluation.samples import Samples
from ..integrations.hydra import function_of
from ..objectives import Objective, checked
from ..spec import PermutationSpec
from ..tensors.modules import OnDevice, device_of, find_device, to_device
from ..tracing import trace
from ..types import Progress, State
from .prompted import ImageMaker


@dataclass(frozen=True, eq=False)
class Part:
    """A module and an example call of it: what `trace` and `verify` need.

    A model that is too large to be verified at its own size brings `derive`, which makes its spec, and `proved`, which
    gives the largest relative error in the proof of that spec or raises `VerificationError`.
    """

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    derive: Callable[[], PermutationSpec] | None = None
    proved: Callable[[PermutationSpec], float] | None = None

    def on(self, device: torch.device) -> Part:
        """The same module, moved to `device`, with its example call there; one without numbers stays without."""
        if device_of(self.model).type == "meta":
            return self
        nn.Module.to(self.model, device)
        return replace(self, args=to_device(self.args, device), kwargs=to_device(dict(self.kwargs), device))

    def spec(self) -> PermutationSpec:
        """The symmetries of the module."""
        return trace(self.model, *self.args, **self.kwargs) if self.derive is None else self.derive()


@dataclass(frozen=True, eq=False)
class Task:
    """Everything a run needs to know about its models and data; algorithms see its fields only.

    Attributes:
        parts: the components whose symmetries are derived and verified, by name.
        aligned: the name of the part that is aligned and merged; the others are shared by both endpoints.
        labels: what A and B (and further models, for algorithms that take any number) are called.
        endpoints: load (or train) them; called once, after the spec is known. Takes a progress callback.
        objective: what good means.
        batches: split ("train", "heldout") -> batches of the objective.
        sampler: states by label, and a seed -> images from the same prompts and noise; None: no images.
        pipeline: a model in place of the aligned part -> its diffusion pipeline; None: it belongs to none.
        captions: prompts that the models were made for.
        others: further models of this architecture by name, for a merge that needs a base.
        maker: how the aligned part makes images of prompts, differentiably; None: it makes none.
        export: the run's folder, the merge, metadata, all models' permutations and weights -> files in the form that
            the endpoints came in; None: none.
        room: bytes of the files that a run leaves, where that is much, about.
        plan: what a dry run tells besides the spec.
        remarks: what was chosen unasked, a sentence each.
        data: what its data are called, where they are not those of the configuration.
        reads: the options at the top of the configuration that it has asked for, see `load_task`.
    """

    parts: Mapping[str, Part]
    aligned: str
    labels: tuple[str, ...]
    endpoints: Callable[[Progress | None], tuple[State, ...]]
    objective: Objective
    batches: Mapping[str, Sequence[Any]]
    sampler: Callable[[Mapping[str, State], int], Samples] | None = None
    pipeline: Callable[[nn.Module], Any] | None = None
    captions: Sequence[str] = ()
    maker: ImageMaker | None = None
    others: Mapping[str, Callable[[], State]] = field(default_factory=dict)
    export: Callable[..., Sequence[Path]] | None = None
    room: float = 0.0
    plan: Sequence[str] = ()
    remarks: Sequence[str] = ()
    data: str = "own"
    reads: frozenset[str] = frozenset()

    @property
    def model(self) -> nn.Module:
        """The architecture that is aligned; its own weights do not matter."""
        return self.parts[self.aligned].model

    def load_other(self, name: str) -> State:
        """One of `others`, or the tensors of the safetensors file `name`.

        Raises:
            ConfigError: there is neither.
        """
        if name in self.others:
            return self.others[name]()
        if not Path(name).is_file():
            known = f"; the models with a name are {', '.join(self.others)}" if self.others else ""
            raise ConfigError(f"There is no model or file {name!r}{known}.")
        return load_safetensors(name)


def load_task(cfg: DictConfig) -> Task:
    """The task that `cfg` describes.

    Raises:
        ConfigError: model, data and objective do not go together.
        DataError, CheckpointError: a file is missing or damaged.
    """
    read: set[str] = set()

    class Watched(DictConfig):
        """The configuration, which notes what the task asks it for: nothing else has an effect on the task."""

        def _get_impl(self, key: Any, *more: Any, **options: Any) -> Any:
            read.add(str(key))
            return super()._get_impl(key, *more, **options)

    watched = copy.deepcopy(cfg)
    object.__setattr__(watched, "__class__", Watched)  # whose own attributes are the options
    function = function_of(cfg.model, "model.task", f"model={cfg.model.name}")
    if not _takes_one(function):
        raise ConfigError(
            f"model.task={cfg.model.task} must take the configuration, as its only argument, and return a"
            " rebasin.tasks.Task."
        )
    task = function(watched)
    if not isinstance(task, Task):
        raise ConfigError(
            f"model.task={cfg.model.task} returns an object of type {type(task).__name__}, not a rebasin.tasks.Task."
        )
    device = find_device(cfg.device)
    return replace(
        task,
        parts={name: part.on(device) for name, part in task.parts.items()},
        objective=checked(task.objective),
        batches={split: OnDevice(batches, device) for split, batches in task.batches.items()},
        reads=frozenset(read),
    )


def _takes_one(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    except ValueError:  # it has no signature to look at
        return True
    return True


def require(cfg: DictConfig, group: str, *kinds: str) -> None:
    """Raise `ConfigError` unless the chosen config of `group` is of one of the `kinds` that the model can use."""
    found = cfg[group].get("kind")
    if found not in kinds:
        wanted = " or ".join(map(repr, kinds))
        raise ConfigError(
            f"model={cfg.model.name} needs {group} of the kind {wanted}, but {group}={cfg[group].name} is"
            f" {found!r}; leave {group} out to get the one that goes with the model."
        )
