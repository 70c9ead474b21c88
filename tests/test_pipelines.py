"""Checkpoints as pipelines of diffusers: the pictures are those of diffusers' own loaders, without network."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from rebasin.checkpoints import (
    Checkpoint,
    architecture,
    component_spec,
    open_checkpoint,
    require_same_family,
    save_checkpoint,
    save_safetensors,
)
from rebasin.checkpoints.pipeline import PIPELINES, assemble, load_component, plan_pipeline, quiet
from rebasin.checkpoints.random_weights import random_checkpoint
from rebasin.checkpoints.reduced_width import REDUCED_WIDTH
from rebasin.checkpoints.schedulers import new_scheduler, scheduler_config
from rebasin.checkpoints.tokenizers import MERGES, clip_tokenizer, load_tokenizer
from rebasin.errors import CheckpointError, ConfigError
from rebasin.files import PACKAGE
from rebasin.models import tiny_sd
from tests.cli_files import small_tokenizer

CAT = [49406, 320, 1125, 539, 320, 2368, 49407]
"""What CLIP reads for "a photo of a cat"."""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


@cache
def tensors(family: str, variant: str = "base", vocabulary: int | None = None) -> dict[str, torch.Tensor]:
    state = random_checkpoint(
        family, REDUCED_WIDTH[family], variant=variant, depth=1, vocabulary=vocabulary, dtype=torch.float32
    )
    return dict(state)


def made(
    folder: Path, family: str, more: dict[str, torch.Tensor] | None = None, **options: Any
) -> Checkpoint:
    """A narrow single file; by default it reads the 64 tokens of `small_tokenizer`."""
    metadata = options.pop("metadata", {})
    without = options.pop("without", "/")
    state = tensors(family, **{"vocabulary": 64, **options})
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(without)}
    return open_checkpoint(
        save_safetensors(folder / f"{family}.safetensors", {**kept, **(more or {})}, metadata)
    )


def picture(pipeline: Any, **more: Any) -> np.ndarray:
    """An image of a prompt in two steps, of 64 pixels where the pipeline may be told."""
    name, black = type(pipeline).__name__, Image.new("RGB", (64, 64))
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np"}
    if "Inpaint" in name:
        options |= {"image": black, "mask_image": Image.new("L", (64, 64), 255), "strength": 1.0}
    if "Img2Img" in name:
        options |= {"image": black, "strength": 1.0}
    else:
        options |= {"height": 64, "width": 64}
    with torch.no_grad():
        noise = torch.Generator().manual_seed(0)
        return pipeline("A photo of a cat!", generator=noise, **{**options, **more}).images[0]


def test_clips_tokens_are_the_known_ones():
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == CAT
    assert tokenizer("Hello, it's 25° été 猫").input_ids == [
        49406, 3306, 267, 585, 568, 273, 276, 6858, 3459, 39694, 163, 234, 360, 49407,
    ]  # fmt: skip
    filled = tokenizer("a photo of a cat", padding="max_length", truncation=True).input_ids
    assert filled == CAT + [49407] * 70
    zeros = clip_tokenizer("!")("a photo of a cat", padding="max_length", truncation=True).input_ids
    assert zeros == CAT + [0] * 70
    cut = tokenizer("cat " * 100, padding="max_length", truncation=True).input_ids
    assert cut == [49406, *[2368] * 75, 49407]


def test_the_wheel_has_clips_tokens_and_says_whose_they_are():
    config = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = config["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["rebasin"] and "exclude" not in wheel
    assert MERGES.is_relative_to(PACKAGE) and MERGES.stat().st_size < 300_000
    attribution = MERGES.with_name("ATTRIBUTION.md").read_text(encoding="utf-8")
    assert MERGES.name in attribution and "Copyright (c) 2021 OpenAI" in attribution
    ignored = (PACKAGE.parent / ".gitignore").read_text(encoding="utf-8")
    assert not any(end in ignored for end in (".gz", "assets"))


@pytest.mark.parametrize(
    ("family", "variant", "prediction", "kind"),
    [
        ("sd1", "base", None, "StableDiffusionPipeline"),
        ("sd1", "inpainting", None, "StableDiffusionInpaintPipeline"),
        ("sd2", "base", "v_prediction", "StableDiffusionPipeline"),
        ("sdxl", "base", None, "StableDiffusionXLPipeline"),
        ("sdxl_refiner", "base", None, "StableDiffusionXLImg2ImgPipeline"),
    ],
)
def test_pictures_are_those_of_diffusers_own_loader(folder, family, variant, prediction, kind):
    """A single file, and the folder that is written of it, which diffusers loads as a pipeline."""
    from diffusers import DiffusionPipeline

    metadata = {} if prediction is None else {"modelspec.prediction_type": prediction}
    single = made(folder, family, variant=variant, vocabulary=None, metadata=metadata)
    written = save_checkpoint(folder / f"{family}_{variant}_{prediction}", single).path
    whole = open_checkpoint(written)
    with quiet():
        theirs: Any = DiffusionPipeline.from_pretrained(written, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    expected = picture(theirs)
    assert expected.shape == (64, 64, 3) and expected.std() > 0.01
    for checkpoint in (single, whole):
        ours = assemble(checkpoint)
        assert type(ours).__name__ == type(theirs).__name__ == kind
        assert ours.scheduler.config.prediction_type == (prediction or "epsilon")
        assert np.abs(picture(ours) - expected).max() < 1e-5
        for name in ("tokenizer", "tokenizer_2"):
            if (own := getattr(ours, name, None)) is not None:
                assert own("a photo of a cat").input_ids == CAT
                zero = name == "tokenizer_2" or family == "sd2"
                assert own.pad_token_id == getattr(theirs, name).pad_token_id == (0 if zero else 49407)
    if family == "sdxl_refiner":
        assert ours.config.requires_aesthetics_score and not ours.config.force_zeros_for_empty_prompt
    if prediction is not None:
        other = assemble(single, prediction="epsilon")
        assert np.abs(picture(other) - expected).max() > 1e-3


def test_modules_take_the_place_of_components_and_are_shared(folder):
    checkpoint = made(folder, "sdxl_refiner")
    tokens = small_tokenizer(folder / "tokens")
    filled = {name: architecture(checkpoint, name, device="cpu")[0] for name in checkpoint.components}
    for name, module in filled.items():
        module.load_state_dict(dict(checkpoint.component(name)))
    pipeline = assemble(checkpoint, tokenizer=tokens, modules=filled)
    plain = assemble(checkpoint, tokenizer=tokens)
    assert np.abs(picture(pipeline) - picture(plain)).max() < 1e-5
    for name, module in filled.items():
        part = getattr(pipeline, name)
        assert {p.data_ptr() for p in part.parameters()} == {p.data_ptr() for p in module.parameters()}
        assert type(part) is type(getattr(plain, name)) and not type(part).__module__.startswith("rebasin")
        assert not part.training
    half = load_component(checkpoint, "vae", torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_the_embedded_pipeline_as_a_folder(folder):
    with quiet():
        theirs = tiny_sd.load_pipeline("low")
        theirs.save_pretrained(folder / "tiny")
    checkpoint = open_checkpoint(folder / "tiny")
    assert (checkpoint.family, checkpoint.variant) == ("sd1", "base")
    assert checkpoint.components == ("unet", "vae", "text_encoder")
    call = {"prompt": ["a handwritten three", ""], "num_inference_steps": 2, "output_type": "np"}

    def images(pipeline: Any) -> np.ndarray:
        return pipeline(**call, generator=torch.Generator().manual_seed(0)).images

    expected = images(theirs)
    assert expected.shape == (2, 32, 32, 1)
    ours = assemble(checkpoint)
    assert np.abs(images(ours) - expected).max() < 1e-5
    assert dict(ours.scheduler.config) == dict(theirs.scheduler.config)
    assert len(component_spec(checkpoint, "vae")) > 20  # derived, and proved at reduced width
    # What is written of it is the same pipeline, scheduler and tokenizer included.
    written = open_checkpoint(save_checkpoint(folder / "tiny_again", checkpoint).path)
    assert np.abs(images(assemble(written)) - expected).max() < 1e-5
    with pytest.raises(CheckpointError, match=r"The unet of \S+tiny has down_block_types .*; name a folder"):
        save_checkpoint(folder / "tiny.safetensors", checkpoint)
    with pytest.raises(CheckpointError, match="different architectures"):
        require_same_family(checkpoint, made(folder, "sdxl"))


@cache
def plain(folder: Path, family: str) -> Checkpoint:
    return made(folder, family)


def marked(folder: Path, family: str, *marks: str, **metadata: str) -> Checkpoint:
    """A checkpoint with these marks among its names; its tensors are not there."""
    return replace(plain(folder, family), raw={mark: torch.ones(1) for mark in marks}, metadata=metadata)


def test_schedulers_have_the_right_prediction_type(folder):
    config = scheduler_config(marked(folder, "sd1"))
    assert (config["_class_name"], config["prediction_type"]) == ("PNDMScheduler", "epsilon")
    velocity = scheduler_config(marked(folder, "sdxl", "v_pred"))
    assert velocity["prediction_type"] == "v_prediction" and "rescale_betas_zero_snr" not in velocity
    for family, kind in (
        ("sd1", "DDIMScheduler"),
        ("sd2", "DDIMScheduler"),
        ("sdxl", "EulerDiscreteScheduler"),
    ):
        checkpoint = marked(folder, family, "v_pred", "ztsnr")
        scheduler = new_scheduler(scheduler_config(checkpoint), checkpoint.path)
        assert type(scheduler).__name__ == kind and scheduler.config.prediction_type == "v_prediction"
        assert scheduler.config.rescale_betas_zero_snr and scheduler.config.timestep_spacing == "trailing"
        assert scheduler.alphas_cumprod[-1] < 1e-6  # the noisiest step is noise alone
    # Noise can't be predicted from noise alone: the mark counts for velocity only.
    assert "rescale_betas_zero_snr" not in scheduler_config(marked(folder, "sd1", "ztsnr"))
    told = scheduler_config(marked(folder, "sd1"), "v")
    assert told["prediction_type"] == "v_prediction"


def test_what_makes_no_pipeline_is_refused_in_one_sentence(folder):
    tokens = small_tokenizer(folder / "tokens")
    unknown = plain(folder, "sd2")
    with pytest.raises(ConfigError, match=r"Nothing tells whether .*say model\.prediction=epsilon or"):
        plan_pipeline(unknown, tokenizer=tokens)
    assert (
        plan_pipeline(unknown, tokenizer=tokens, prediction="v").scheduler["prediction_type"]
        == "v_prediction"
    )
    with pytest.raises(
        ConfigError, match=r"model\.prediction is 'x0'; it takes epsilon, v_prediction or null"
    ):
        plan_pipeline(unknown, tokenizer=tokens, prediction="x0")
    with pytest.raises(CheckpointError, match=r"mark 'edm_vpred\.sigma_max' .* EDM's noise levels"):
        plan_pipeline(marked(folder, "sdxl", "edm_vpred.sigma_max"), tokenizer=tokens)
    with pytest.raises(
        CheckpointError, match="has no vae, without which there are no pictures; it has unet, text"
    ):
        plan_pipeline(made(folder, "sd1", without="first_stage_model."), tokenizer=tokens)
    with pytest.raises(CheckpointError, match=r"is Stable Diffusion 1 \(depth\), which needs further inputs"):
        plan_pipeline(replace(plain(folder, "sd1"), variant="depth"), tokenizer=tokens)


def test_a_tokenizer_of_another_vocabulary_is_refused(folder):
    checkpoint = made(folder, "sd1")
    with pytest.raises(
        CheckpointError,
        match=r"The tokenizer CLIP's, .* has 49,408 tokens, but the text_encoder of \S+ knows 64; .*model\.tokenizer=",
    ):
        load_tokenizer(checkpoint, "text_encoder")
    with pytest.raises(CheckpointError, match=r"tokens80 has 80 tokens, but the text_encoder .* knows 64"):
        load_tokenizer(checkpoint, "text_encoder", small_tokenizer(folder / "tokens80", 80))
    with pytest.raises(CheckpointError, match="There is no tokenizer .*nowhere"):
        load_tokenizer(checkpoint, "text_encoder", folder / "nowhere")
    with pytest.raises(
        CheckpointError, match=r"notes\.txt is no tokenizer that can be read: .*merge 1 is no pair"
    ):
        (folder / "notes.txt").write_text("these are no merges\n")
        load_tokenizer(checkpoint, "text_encoder", folder / "notes.txt")
    (folder / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty has no tokenizer: neither"):
        load_tokenizer(checkpoint, "text_encoder", folder / "empty")
    # A pipeline's folder is looked into, and CLIP's own file of merges is read.
    small_tokenizer(folder / "pipe" / "tokenizer")
    assert len(load_tokenizer(checkpoint, "text_encoder", folder / "pipe")) == 64
    # One that serves both of SDXL's encoders fills up with zeros for the second.
    for name, pad in (("text_encoder", 63), ("text_encoder_2", 0)):
        tokenizer = load_tokenizer(plain(folder, "sdxl"), name, folder / "pipe")
        assert tokenizer("a", padding="max_length", truncation=True).input_ids == [62, 28, 63] + [pad] * 74
    wide = made(folder, "sd1", vocabulary=None)
    assert load_tokenizer(wide, "text_encoder", MERGES)("a photo of a cat").input_ids == CAT


def test_what_a_damaged_folder_has_is_named(folder):
    small_tokenizer(folder / "tokens")
    whole = save_checkpoint(folder / "whole", made(folder, "sd1")).path
    notes = json.loads((whole / "model_index.json").read_text())
    assert notes["tokenizer"] == [None, None]  # 64 tokens are not CLIP's
    config = whole / "scheduler" / "scheduler_config.json"
    config.write_text('{"_class_name": "Path"}')
    checkpoint = open_checkpoint(whole)
    with pytest.raises(
        CheckpointError, match="The scheduler of .*whole is 'Path', which diffusers does not have"
    ):
        assemble(checkpoint, tokenizer=folder / "tokens")
    config.write_text("{")
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json is no readable configuration"):
        plan_pipeline(checkpoint, tokenizer=folder / "tokens")


def test_every_pipeline_is_one_of_diffusers():
    import diffusers

    for classes in PIPELINES.values():
        for name in classes:
            assert issubclass(getattr(diffusers, name), diffusers.DiffusionPipeline)


def test_a_module_of_the_library_stays_as_it_is():
    from rebasin.checkpoints.modules import native

    module = nn.Linear(1, 1)
    assert native(module) is module
