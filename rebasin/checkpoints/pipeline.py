"""A checkpoint as a pipeline of diffusers, put together without network: weights, tokenizers, scheduler.

What a diffusers folder brings comes first; what a single file lacks is that of its release (published/, assets/).
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError
from ..files import PathLike
from ..integrations.huggingface import quiet
from .architectures import architecture
from .components import TEXT, TEXT_2, UNET, VAE
from .folders import INDEX, load_config
from .schedulers import new_scheduler, scheduler_config
from .tokenizers import TOKENIZERS, load_tokenizer

if TYPE_CHECKING:
    from torch import nn

    from .checkpoint import Checkpoint

SD, XL = "StableDiffusion", "StableDiffusionXL"

PIPELINES: dict[tuple[str, str], tuple[str, ...]] = {
    (SD, "base"): (f"{SD}Pipeline", f"{SD}Img2ImgPipeline", "LatentConsistencyModelPipeline"),
    (SD, "inpainting"): (f"{SD}InpaintPipeline",),
    (SD, "instruct-pix2pix"): (f"{SD}InstructPix2PixPipeline",),
    (XL, "base"): (f"{XL}Pipeline", f"{XL}Img2ImgPipeline"),
    (XL, "inpainting"): (f"{XL}InpaintPipeline",),
    (XL, "instruct-pix2pix"): (f"{XL}InstructPix2PixPipeline",),
    ("refiner", "base"): (f"{XL}Img2ImgPipeline",),
}
"""Kind of model and its variant -> the classes that a folder may name, the one of a single file first."""

KINDS = {"sd1": SD, "sd2": SD, "sdxl": XL, "sdxl_refiner": "refiner"}

NEEDED = {SD: (UNET, VAE, TEXT), XL: (UNET, VAE, TEXT, TEXT_2), "refiner": (UNET, VAE, TEXT_2)}

OPTIONS: dict[str, Mapping[str, Any]] = {
    SD: {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    XL: {"force_zeros_for_empty_prompt": True, "add_watermarker": False},
    "refiner": {
        "requires_aesthetics_score": True,
        "force_zeros_for_empty_prompt": False,
        "add_watermarker": False,
    },
}
"""What the pipelines are told besides their parts; a folder's model_index.json may say otherwise."""

TOLD = ("force_zeros_for_empty_prompt", "requires_aesthetics_score", "is_cosxl_edit")


def pipeline_class(checkpoint: Checkpoint) -> str | None:
    """The name in diffusers of the pipeline for a checkpoint: the one that its folder names if it is one of those for
    this kind of model; None for parts alone and for variants that have none here.
    """
    classes = PIPELINES.get((KINDS.get(checkpoint.family, ""), checkpoint.variant))
    if classes is None:
        return None
    told = pipeline_index(checkpoint).get("_class_name")
    return told if told in classes else classes[0]


def pipeline_options(checkpoint: Checkpoint) -> dict[str, Any]:
    """What its class is told besides the parts."""
    index = pipeline_index(checkpoint)
    return {**OPTIONS[KINDS[checkpoint.family]], **{key: index[key] for key in TOLD if key in index}}


def pipeline_index(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """model_index.json of a pipeline's folder, empty where there is none."""
    return load_config(checkpoint.path, INDEX) or {}


@dataclass(frozen=True, eq=False)
class Plan:
    """What a pipeline is put together from; no weights have been read.

    Attributes:
        kind: the name of its class in diffusers.
        components: the parts that have weights, in diffusers' names.
        tokenizers: text encoder -> its tokenizer.
        scheduler: its config.
        options: what the class is told besides.
    """

    kind: str
    components: tuple[str, ...]
    tokenizers: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    options: Mapping[str, Any]


def plan_pipeline(
    checkpoint: Checkpoint, *, tokenizer: PathLike | None = None, prediction: str | None = None
) -> Plan:
    """What `assemble` will do, or why it can't, before any weights are read.

    Args:
        tokenizer: see `tokenizers.load_tokenizer`.
        prediction: "epsilon" or "v_prediction", where the checkpoint does not tell, or tells wrongly.

    Raises:
        CheckpointError: a component is missing or incomplete, the variant has no pipeline here, a tokenizer has another
            vocabulary or a configuration is damaged.
        ConfigError: nothing tells what the UNet predicts.
    """
    kind = KINDS.get(checkpoint.family)
    needed = NEEDED[kind] if kind else (UNET, VAE)
    if missing := next((name for name in needed if name not in checkpoint.components), None):
        raise CheckpointError(
            f"{checkpoint.path} has no {missing}, without which there are no pictures; it has"
            f" {', '.join(checkpoint.components)}, and a whole checkpoint is needed."
        )
    assert kind is not None
    name = pipeline_class(checkpoint)
    if name is None:
        raise CheckpointError(
            f"{checkpoint.path} is {checkpoint.title}, which needs further inputs that are not made here, so there"
            " are no pictures of it; without pictures it can be aligned and merged."
        )
    # The cheap ones first: a tokenizer, and then modules, take seconds.
    scheduler = scheduler_config(checkpoint, prediction)
    tokenizers = {own: load_tokenizer(checkpoint, own, tokenizer) for own in needed if own in TOKENIZERS}
    for component in needed:
        architecture(checkpoint, component)
    return Plan(name, needed, tokenizers, scheduler, pipeline_options(checkpoint))


def assemble(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: PathLike | None = None,
    prediction: str | None = None,
    modules: Mapping[str, nn.Module] | None = None,
    without: Collection[str] = (),
    plan: Plan | None = None,
) -> Any:
    """The diffusers pipeline of a checkpoint, in eval mode, without safety checker and without a progress bar.

    Args:
        dtype: of its weights; None: float32.
        tokenizer, prediction: see `plan_pipeline`.
        modules: component -> a module that takes its place, as `architecture` or the library makes it; its tensors are
            shared, and the checkpoint's are then not read.
        without: components whose place stays empty (None).
        plan: what `plan_pipeline` found, if it was called before.

    Raises:
        RebasinError: see `plan_pipeline`.
    """
    plan = plan or plan_pipeline(checkpoint, tokenizer=tokenizer, prediction=prediction)
    given = dict(modules or {})
    parts: dict[str, Any] = {TOKENIZERS[name]: own for name, own in plan.tokenizers.items()}
    if KINDS[checkpoint.family] == "refiner":
        parts |= {TEXT: None, TOKENIZERS[TEXT]: None}
    parts["scheduler"] = new_scheduler(plan.scheduler, checkpoint.path)
    from .modules import native  # late: diffusers and transformers take seconds to import

    for name in plan.components:
        if name in without:
            parts[name] = None
        else:
            parts[name] = native(given[name]) if name in given else load_component(checkpoint, name, dtype)
    return _pipeline(plan.kind, parts, plan.options)


def load_component(checkpoint: Checkpoint, component: str, dtype: torch.dtype | None = None) -> nn.Module:
    """A component as diffusers' or transformers' own class in eval mode, with its weights in this type (float32).

    Tensors are read one after another, so there is never more than the module and one of them.

    Raises:
        CheckpointError: there is no such component, or it is incomplete.
    """
    from .modules import native

    module = architecture(checkpoint, component, device=None)[0]
    state = checkpoint.component(component)
    wanted = dtype or torch.float32
    read = {name: state[name].to(wanted) for name, _ in module.named_parameters()}
    module.load_state_dict(read, strict=False, assign=True)
    return native(module.eval())


def _pipeline(kind: str, parts: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    with quiet():
        import diffusers

        made = getattr(diffusers, kind)
        known = inspect.signature(made.__init__).parameters
        pipeline = made(**parts, **{key: value for key, value in options.items() if key in known})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
