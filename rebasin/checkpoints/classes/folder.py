"""Folders of transformers and diffusers: which models are in them, of which classes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, shown
from ..folders import INDEX, load_config
from .known import Config, Known, decoded, known

MODEL, TRANSFORMER = "model", "transformer"
"""What the only model of a folder is called; one that makes pictures as in the folders of pipelines."""

STABLE_DIFFUSION = (
    "UNet2DConditionModel", "AutoencoderKL", "CLIPTextModel", "CLIPTextModelWithProjection",
    "StableDiffusionSafetyChecker",
)  # fmt: skip
"""Classes of the models whose files are known by their tensors; a folder of these alone needs no other way."""


def classes_in(folder: Path) -> tuple[str, dict[str, Known]] | None:
    """What a folder is (its own class, or its pipeline's) and its models: component -> class; None if it says nothing,
    or is of Stable Diffusion, which is known otherwise.

    Raises:
        CheckpointError: a configuration is damaged, or the libraries have no such class.
    """
    index = load_config(folder, INDEX)
    if index is None:
        config = load_config(folder)
        if config is None or _name(config) in STABLE_DIFFUSION:
            return None
        own = known(config, folder / "config.json")
        if own is None:
            return None
        pictures = own.library == "diffusers" and "Transformer" in own.name
        return own.name, {TRANSFORMER if pictures else MODEL: own}
    parts = {name: told for name, told in index.items() if (folder / name / "config.json").is_file()}
    named = [told[1] for told in parts.values() if isinstance(told, list) and len(told) == 2]
    if all(name in STABLE_DIFFUSION for name in named):
        return None
    models: dict[str, Known] = {}
    for name, told in parts.items():
        if not (isinstance(told, list) and len(told) == 2 and told[0] in ("diffusers", "transformers")):
            continue
        file = folder / name / "config.json"
        if (own := known(load_config(folder / name) or {}, file)) is None:
            continue
        if told[1] is not None and own.name != told[1]:
            raise CheckpointError(
                f"{folder / INDEX} says that {name} is {shown(told[1])}, but {file} says {shown(own.name)}; the folder"
                " is mixed of two models, so get it again."
            )
        models[name] = own
    return str(index.get("_class_name")), models


def _name(config: Mapping[str, Any]) -> object:
    """The class that a configuration names first."""
    named = config.get("architectures")
    return config.get("_class_name") or (named[0] if isinstance(named, list) and named else None)


BOOKKEEPING = re.compile(
    r"^_|version$|^(torch_)?dtype$|^architectures$|token_id|label2id|id2label|dropout|drop_prob|initializer|use_cache"
    r"|^vocab_size$|^(temperature|top_[kp]|do_sample|num_beams|.*_length|.*_penalty)$|^quantization_config$|^auto_map$"
    r"|^problem_type$|^finetuning_task$|^return_dict$|^output_|^tie_word_embeddings$|^pretraining_tp$"
)
"""Entries that say nothing about what a model computes with the weights that it has."""

STRUCTURE = re.compile(r"head|_act|activation|hidden_act|norm_type|layer_types|block_types|qk_norm|parallel")
"""Entries that make another network of the same tensors."""


def differences(a: Config, b: Config, before: str = "") -> dict[str, tuple[Any, Any]]:
    """Entry -> its values, of those that differ in two configurations and are no bookkeeping."""
    found: dict[str, tuple[Any, Any]] = {}
    a, b = decoded(a), decoded(b)
    for key in dict.fromkeys([*a, *b]):
        one, other = a.get(key), b.get(key)
        if BOOKKEEPING.search(key) or one == other:
            continue
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found |= differences(one, other, f"{before}{key}.")
        else:
            found[before + key] = one, other
    return found
