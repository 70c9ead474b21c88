"""Stable Diffusion checkpoints as people have them: one component of them is aligned, merged and measured.

The command `rebasin merge` does all components by their weights and never holds one as a whole; this task is for every
algorithm and objective, for curves, pictures and a report. The components around the aligned one are A's, for all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from math import isfinite, prod
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..checkpoints import Checkpoint, component_spec, require_same_family
from ..checkpoints.architectures import Built, Config, component_config
from ..checkpoints.checkpoint import open_each, require_fitting, require_same_prediction, several_variants
from ..checkpoints.hub import local
from ..checkpoints.joint import joint_spec, joint_state, prompted_unet
from ..checkpoints.output import bytes_of
from ..checkpoints.pipeline import Plan, assemble, load_component, plan_pipeline
from ..checkpoints.provenance import size_of
from ..checkpoints.specs import proof
from ..checkpoints.tokenizers import cut
from ..data import captioned_folder
from ..data.prompts import read_prompts
from ..data.sampled import Batch, Placed, check_sampling
from ..errors import ConfigError, shown
from ..integrations.hydra import function_of
from ..matching.weights.estimate import about
from ..spec import PermutationSpec
from ..tensors.free_memory import free_memory
from ..tensors.modules import device_of, find_device
from ..types import State, arguments_of
from . import whole_checkpoint
from .agreement import Agreement, outputs_of, with_targets
from .around import Around, check_side, diffusion_task, sampler
from .base import Part, Task, require
from .checkpoint_costs import Pass, Run, forward_pass
from .prompted import KINDS, check_scorer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

JOINT = "joint"

JOINT_TOLERANCE = 1e-9
"""What the proof of a joint spec demands."""


def load(cfg: DictConfig) -> Task:
    """The component `model.component` of the checkpoints `model.a` and `model.b`, or of `model.files`.

    Raises:
        ConfigError: a file is not given, an option is unknown or makes no sense, or there is not enough memory.
        CheckpointError: a file is missing, damaged or something else, or they are of different families, have
            different tensors, predict different things or make no pictures, where those are wanted.
        DataError: prompts or images can't be read.
    """
    require(cfg, "objective", "agreement", *KINDS)
    wanted = _wanted(cfg)
    _check_numbers(cfg)
    texts = _check_files(cfg)
    if cfg.objective.kind == "agreement" and cfg.model.batches < 1 and "batches" in _takes(cfg):
        raise ConfigError(
            f"algo={cfg.algo.name} looks at batches, but model.batches is {cfg.model.batches}; it must be at least 1."
        )
    files = _files(cfg)
    models = tuple(open_each(list(files.values()), cfg.model.variant, "model.variant"))
    for other in models[1:]:
        require_same_family(models[0], other)
    pair = Members(models, cfg)
    pair.check(wanted)
    for other in models[1:]:
        require_fitting(models[0], other, pair.names)
    if "unet" in pair.names and not cfg.model.mix_predictions:
        require_same_prediction(models, "model.mix_predictions=true")
    plan = (
        plan_pipeline(models[0], tokenizer=cfg.model.tokenizer, prediction=cfg.model.prediction)
        if wanted
        else None
    )
    if plan is not None and cfg.model.size is not None:
        levels = component_config(models[0], "vae").get("block_out_channels", ())
        check_side(cfg.model.size, 2 ** max(0, len(levels) - 1))
    pair.require_memory(plan is not None)
    if plan is not None:  # ImageReward takes a while and is kept for the run, so this comes last
        for name, group in _groups(cfg).items():
            check_scorer(group, name)
    common: dict[str, Any] = {
        "labels": _labels(models),
        "endpoints": lambda progress: tuple(pair.state(model) for model in models),
        "export": whole_checkpoint.export(models, pair.names, pair.name, cfg),
        "remarks": [*several_variants(models, cfg.model.variant), *_cut(cfg, plan, texts)],
        # A whole checkpoint, and of the component both B aligned and the merge.
        "room": size_of(models[0].path) + 2.0 * bytes_of(pair.state(models[0])),
        "plan": pair.plan(plan) if cfg.dry_run else (),
    }
    if cfg.dry_run or plan is None:
        measuring = not cfg.dry_run and cfg.model.batches > 0
        batches = pair.batches(cfg.model.batches, cfg.seed) if measuring else {}
        part = pair.part(filled=measuring)
        return Task({pair.name: part}, pair.name, objective=Agreement(), batches=batches, **common)
    part = pair.part(filled=True).on(find_device(cfg.device))
    around = pair.around(part.model, plan)
    placed, embed = pair.placed(around), around.prompted if pair.joint else around.states
    captions = read_prompts(cfg.model.prompts)
    if cfg.objective.kind != "agreement":
        data = cfg.data.kind != "none"
        return diffusion_task(
            cfg, part, around, placed, embed,
            name=pair.name, prompts=captions, teachers=pair.teachers(part.model), data=data, **common,
        )  # fmt: skip
    batches = pair.batches(cfg.model.batches, cfg.seed) if cfg.model.batches > 0 else {}
    return Task(
        {pair.name: part}, pair.name, objective=Agreement(), batches=batches, pipeline=placed, captions=captions,
        maker=around.maker(embed, captions) if placed.denoises else None,
        sampler=sampler(cfg, part.model, placed, captions), **common,
    )  # fmt: skip


def _wanted(cfg: DictConfig) -> dict[str, bool]:
    """The options that need a whole pipeline: how they are written -> whether they need a denoiser in it."""
    algo, found = cfg.get("algo") or {}, {}
    if cfg.objective.kind != "agreement":
        found[f"objective={cfg.objective.name}"] = True
    if "pipeline" in _takes(cfg):
        found[f"algo={cfg.algo.name}"] = False
    if algo and "reward" in algo:
        found[f"algo={cfg.algo.name}"] = True
    if "scorer" in cfg.evaluate:
        found[f"evaluate={cfg.evaluate.name}"] = True
    if cfg.model.samples > 0:
        found[f"model.samples={cfg.model.samples}"] = False
    return found


def _takes(cfg: DictConfig) -> dict[str, Any]:
    """The arguments of the run's algorithm."""
    algo = cfg.get("algo")
    return arguments_of(function_of(algo, "algo._target_", f"algo={algo.name}")) if algo else {}


def _built(configs: Mapping[str, Config], name: str) -> Built:
    """See `Members.built`; `name` is that of one of the components, or tells that they are joint."""
    from accelerate import init_empty_weights

    from ..checkpoints import modules

    with init_empty_weights(include_buffers=False):
        parts = {component: modules.build(component, config) for component, config in configs.items()}
    return prompted_unet(parts) if name == JOINT else parts[name]


@cache
def _once(configs: str, name: str, latent: int | None, dtype: torch.dtype) -> Pass:
    """One sample's forward pass of what these configs, in JSON, say; the same for all files that have them."""
    with torch.random.fork_rng(
        devices=[]
    ):  # example inputs are drawn, and no run's numbers depend on an earlier one
        return forward_pass(*_built(json.loads(configs), name), latent, dtype)


def _groups(cfg: DictConfig) -> dict[str, Any]:
    """The groups of options that may have prompts or a scorer, as users name them."""
    found = {name: cfg.get(name) or {} for name in ("objective", "evaluate", "model", "algo")}
    return {**found, "algo.reward": found["algo"].get("reward") or {}}


def _check_numbers(cfg: DictConfig) -> None:
    """Look at the options that make pictures, whose faults the sampler would find long after the alignment."""
    whole = {
        f"model.{n}": least for n, least in (("batches", 0), ("samples", 0), ("steps", 1), ("seeds_shown", 1))
    }
    whole |= dict.fromkeys(
        ("objective.batch_size", "objective.steps", "objective.samples", "evaluate.seeds"), 1
    )
    whole |= dict.fromkeys(("evaluate.batch_size", "evaluate.steps", "data.batch_size"), 1)
    whole |= {
        n: 1 for n in ("model.size", "data.train", "data.heldout") if OmegaConf.select(cfg, n) is not None
    }
    for name, least in whole.items():
        group, _, field = name.partition(".")
        if field not in cfg[group]:
            continue
        value = cfg[group][field]
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{name} is {shown(value)}, but it must be a whole number from {least} on.")
    if not isinstance(cfg.model.guidance, int | float) or not isfinite(cfg.model.guidance):
        raise ConfigError(f"model.guidance is {shown(cfg.model.guidance)}, but it must be a finite number.")
    takes = _takes(cfg)
    if "pipeline" in takes:
        algo = {**takes, **(cfg.get("algo") or {})}
        check_sampling(algo["points"], algo["steps"], algo["batch_size"], "algo.")


def _check_files(cfg: DictConfig) -> list[str]:
    """Look at prompts and images before any model is opened; the texts that models are told."""
    texts = []
    for group in _groups(cfg).values():
        given = group.get("prompts")
        if isinstance(given, str | Path):
            texts += read_prompts(given)
    needed = cfg.objective.kind in ("denoising", "distillation")
    if needed and cfg.data.kind == "captioned folder":
        texts += captioned_folder.check(cfg.data.path, train=cfg.data.train, heldout=cfg.data.heldout)
    elif needed:
        require(cfg, "data", "captioned folder", "captioned images", "none")
        if cfg.objective.kind == "denoising" and cfg.data.kind == "none":
            raise ConfigError(
                "objective=denoising needs images with captions: give data=captioned_folder data.path=FOLDER, or choose"
                " objective=distillation, which needs none."
            )
    return texts


def _cut(cfg: DictConfig, plan: Plan | None, texts: Sequence[str]) -> list[str]:
    """What is to be said of prompts that are too long; those that ship are only looked at where none are given."""
    if plan is None:
        return []
    told = cut(texts or read_prompts(cfg.model.prompts), plan.tokenizers.values())
    return [told] if told else []


def _files(cfg: DictConfig) -> dict[str, Path]:
    """Option -> path of each checkpoint."""
    if cfg.model.files:
        if cfg.model.a is not None or cfg.model.b is not None:
            raise ConfigError("model.files names all checkpoints; leave out model.a and model.b.")
        found = {f"files[{i}]": path for i, path in enumerate(cfg.model.files)}
        if len(found) < 2:
            raise ConfigError("model.files has one checkpoint, but it takes two or more.")
    else:
        found = {name: cfg.model[name] for name in ("a", "b")}
    for name, path in found.items():
        if path is None:
            raise ConfigError(
                f"model=checkpoint needs model.{name}, a checkpoint's file or a diffusers folder."
            )
    return {name: local(str(path), cfg.model.variant) for name, path in found.items()}


def _labels(models: Sequence[Checkpoint]) -> tuple[str, ...]:
    """File names, with their folders where those are the same."""
    names = [model.path.name for model in models]
    if len(set(names)) < len(names):
        names = ["/".join(model.path.resolve().parts[-2:]) for model in models]
    return tuple(names)


@dataclass(frozen=True, eq=False)
class Members:
    """Checkpoints and the component of them that is looked at; with `joint` UNet and text encoders together."""

    models: tuple[Checkpoint, ...]
    cfg: DictConfig

    @property
    def a(self) -> Checkpoint:
        return self.models[0]

    @property
    def component(self) -> str:
        return self.cfg.model.component

    @property
    def joint(self) -> bool:
        return bool(self.cfg.model.joint)

    @property
    def name(self) -> str:
        return JOINT if self.joint else self.component

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The components behind `name`."""
        both = [name for name in self.a.components if all(name in model.components for model in self.models)]
        return tuple(name for name in both if name != "vae") if self.joint else (self.component,)

    def check(self, wanted: Mapping[str, bool]) -> None:
        """Refuse options that do not go together."""
        options = self.cfg.model
        if options.dtype not in (None, *DTYPES):
            raise ConfigError(f"model.dtype is {options.dtype!r}; it takes {', '.join(DTYPES)} or null.")
        for checkpoint in self.models:
            checkpoint.require(self.component)
        if self.joint and (self.component != "unet" or len(self.names) < 2):
            raise ConfigError(
                "model.joint=true needs model.component=unet and a text encoder in both checkpoints; they have"
                f" {', '.join(self.names)}."
            )
        if self.component != "unet" and (
            told := next((name for name, denoiser in wanted.items() if denoiser), None)
        ):
            raise ConfigError(
                f"{told} looks at a denoiser, which model.component={self.component} is not; choose"
                " model.component=unet, or leave it out."
            )  # fmt: skip

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: bf16 where fp32 would take over 6 GB for each copy of the model (SDXL's UNet)."""
        if self.cfg.model.dtype is not None:
            return DTYPES[self.cfg.model.dtype]
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

    def part(self, filled: bool) -> Part:
        """The module: with A's weights where something is computed, else without numbers."""
        model, args, kwargs = self.built()
        if filled:
            model = self.filled(model, self.a)
        # A spec that was restricted (structure=within) is a part of the one that is proved.
        return Part(model, args, kwargs, derive=lambda: self.spec, proved=lambda _: self.proved)

    def state(self, checkpoint: Checkpoint) -> State:
        if not self.joint:
            return checkpoint.component(self.component)
        return joint_state(checkpoint, self.names)

    def built(self) -> Built:
        """The architecture, its parameters without numbers, and example inputs, which have some."""
        return _built(self.configs, self.name)

    @cached_property
    def configs(self) -> dict[str, Config]:
        """Of the components that are aligned."""
        return {name: component_config(self.a, name) for name in self.names}

    def filled(self, model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
        """A module whose parameters have no numbers, given those of a checkpoint."""
        state = self.state(checkpoint)
        model.load_state_dict({name: self.cast(state[name]) for name in model.state_dict()}, assign=True)
        return model.eval()

    def teachers(self, a: nn.Module) -> Callable[[], tuple[nn.Module, nn.Module]]:
        """A, which is there, and B."""
        return lambda: (a, nn.Module.to(self.filled(self.built()[0], self.models[1]), device_of(a)))

    def cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    # Pictures -------------------------------------------------------------------------------------------------------

    def around(self, model: nn.Module, plan: Plan) -> Around:
        """A's pipeline with this model in it; text encoders that are not aligned are loaded while they are used."""
        parts = {name: getattr(model, name) for name in self.names} if self.joint else {self.component: model}
        absent = [name for name in plan.tokenizers if name not in parts]
        pipeline = assemble(self.a, modules=parts, plan=plan, without=absent)
        return Around(
            pipeline,
            self.cfg.model.size,
            absent,
            partial(load_component, self.a),
            find_device(self.cfg.device),
        )

    def placed(self, around: Around) -> Placed:
        """How models stand in the pipeline, and what they are given of what is recorded there."""
        from ..checkpoints.modules import native

        def make(model: nn.Module) -> Any:
            parts = (
                {name: getattr(model, name) for name in self.names} if self.joint else {self.component: model}
            )
            return around.holding(**{name: native(part) for name, part in parts.items()})

        def picture(batch: Batch, texts: Sequence[str]) -> Batch:
            (image,), _ = batch
            return (image, around.encode(image, scale=False)), {}

        def ids(batch: Batch, texts: Sequence[str]) -> Batch:
            args, kwargs = batch
            return (args[0] if args else kwargs["input_ids"],), {}

        if self.joint:
            return Placed(make, "unet", around.given(around.prompted), around.call)
        given = {"unet": None, "vae": picture}.get(self.component, ids)
        return Placed(make, self.component, given, around.call, denoises=self.component == "unet")

    # Random inputs --------------------------------------------------------------------------------------------------

    def inputs(self, count: int, seed: int) -> list[dict[str, Any]]:
        found = []
        with torch.random.fork_rng():
            for number in range(count):
                torch.manual_seed(1000 * seed + number)
                _, args, kwargs = self.built()
                found.append(pytree.tree_map_only(Tensor, self.cast, {"args": args, "kwargs": kwargs}))
        return found

    def batches(self, count: int, seed: int) -> dict[str, Sequence[Any]]:
        """Random inputs with the mean of A's and B's outputs; one model at a time is in memory."""
        inputs = {"heldout": self.inputs(count, seed), "train": self.inputs(count, seed + 1)}
        told = []
        for checkpoint in self.models[:2]:
            model = nn.Module.to(self.filled(self.built()[0], checkpoint), find_device(self.cfg.device))
            told.append({split: outputs_of(model, own) for split, own in inputs.items()})
            del model
        return {split: with_targets(own, told[0][split], told[1][split]) for split, own in inputs.items()}

    # Memory and time ------------------------------------------------------------------------------------------------

    def costs(self, wanted: bool, spec: bool) -> Run:
        """What the run takes; without `spec`, which takes a moment to derive, only what files and shapes tell."""
        cfg, takes = self.cfg, _takes(self.cfg)
        computing = wanted or cfg.model.batches > 0
        config = component_config(self.a, "unet") if "unet" in self.a.components else {}
        levels = (
            component_config(self.a, "vae")["block_out_channels"] if "vae" in self.a.components else [0] * 4
        )
        factor = 2 ** (len(levels) - 1)
        side = cfg.model.size or factor * int(config.get("sample_size") or 64)
        latent = side // factor if wanted and self.component == "unet" and not self.joint else None
        once = _once(json.dumps(self.configs), self.name, latent, self.dtype) if computing else None
        text, rest = 0.0, 0.0
        for name in self.a.components if wanted else ():
            size = 4.0 * sum(prod(shape) for shape in self.a.shapes(name).values()) * (name not in self.names)
            text, rest = (text + size, rest) if name.startswith("text") else (text, rest + size)
        return Run(
            cfg, takes, self.spec if spec else None, sum(self.sizes), max(self.sizes), self.dtype, (text, rest), once,
            side, wanted,
        )  # fmt: skip

    def require_memory(self, wanted: bool) -> None:
        """Refuse what does not fit; a dry run, too, says so.

        Raises:
            ConfigError: there is not as much memory.
        """
        if not wanted and (self.cfg.model.batches < 1 or self.cfg.dry_run):
            return
        need, free = self.costs(wanted, spec=False).memory(), free_memory(find_device(self.cfg.device))
        if free is not None and need > free:
            less = (
                "model.dtype=bf16, a smaller model.size or batch_size, algo.checkpointing=true, algo.optimizer=sgd or"
                " algo=activation_matching take less"
                if wanted
                else "model.batches=0 aligns and merges without measuring, and the command rebasin merge takes the"
                " least"
            )
            raise ConfigError(
                f"Measuring the {self.name} of {self.a.path.name} takes about {need / 1e9:.1f} GB of memory, but"
                f" {free / 1e9:.1f} GB are free; {less}."
            )

    def plan(self, plan: Plan | None) -> list[str]:
        """What `dry_run=true` tells besides the spec."""
        sizes = ", ".join(f"{c.path.name} is {c.title}, {size_of(c.path) / 1e9:.2f} GB" for c in self.models)
        numbers = f"{sum(self.sizes):,} numbers of {', '.join(self.names)}"
        costs = self.costs(plan is not None, spec=True)
        how = "without measuring"
        if costs.once is not None:
            how = f"computing in {str(self.dtype).removeprefix('torch.')}"
        takes = f"about {costs.memory() / 1e9:.1f} GB of memory and {about(costs.seconds())} on this machine's CPU"
        told = [f"{sizes};", f"{numbers}; {takes}, {how};"]
        if plan is not None:
            others = [name for name in plan.components if name not in self.names]
            told.append(f"pictures by {plan.kind} with {', '.join(others)} of {self.a.path.name};")
        return told
