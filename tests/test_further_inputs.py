"""What a plain fine-tune has learnt, added to an inpainting model, whose further input channels stay."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from cli_files import rebasin
from torch import Tensor

from rebasin.checkpoints import (
    component_spec,
    load_safetensors,
    open_checkpoint,
    save_checkpoint,
    save_safetensors,
)
from rebasin.checkpoints.further_inputs import with_further_inputs
from rebasin.checkpoints.random_weights import noisy, random_checkpoint
from rebasin.types import State

torch.set_num_threads(1)

CONV = "model.diffusion_model.input_blocks.0.0.weight"


@cache
def unet(variant: str, noise: float = 0) -> Mapping[str, Tensor]:
    whole: State = random_checkpoint("sd1", 16, variant=variant, depth=1, vocabulary=64, dtype=torch.float32)
    whole = noisy(whole, noise, 3) if noise else whole
    return {name: whole[name] for name in whole if name.startswith("model.diffusion_model.")}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models with further inputs (the same weights but for these), their plain base, and a fine-tune, permuted."""
    folder = tmp_path_factory.mktemp("files")
    for variant in ("inpainting", "instruct-pix2pix"):
        save_safetensors(folder / f"{variant}.safetensors", dict(unet(variant)), {"modelspec.title": "A"})
    save_safetensors(folder / "base.safetensors", dict(unet("base")))
    plain = open_checkpoint(save_safetensors(folder / "tuned.safetensors", dict(unet("base", 0.05))))
    # Moved as the first model's neurons are: the one spec is derived once.
    first, wide = with_further_inputs([open_checkpoint(folder / "inpainting.safetensors"), plain])
    moved = wide.restore({"unet": component_spec(first, "unet").random(5).view(wide.component("unet"))})
    tensors = {name: moved[name][:, :4].contiguous() if name == CONV else moved[name] for name in moved}
    save_safetensors(folder / "b.safetensors", tensors)
    return folder


@pytest.mark.parametrize(
    ("variant", "tuned"), [("inpainting", "b"), ("inpainting", "tuned"), ("instruct-pix2pix", "tuned")]
)
def test_the_difference_is_added_and_further_inputs_stay(
    files: Path, tmp_path: Path, variant: str, tuned: str
) -> None:
    a, b, base = (files / f"{name}.safetensors" for name in (variant, tuned, "base"))
    out = tmp_path / "out.safetensors"
    options = ["--method", "add_difference", "--base", base, "--alpha", "0.5", "--no-check"]
    rebasin("merge", a, b, "-o", out, *options, *(["--no-align"] if tuned == "tuned" else []))
    merged = load_safetensors(out)
    assert merged.metadata["modelspec.title"] == "A" and list(merged) == list(load_safetensors(a))
    assert open_checkpoint(out).variant == variant
    assert torch.equal(merged[CONV][:, 4:], unet(variant)[CONV][:, 4:]), "to the bit"
    for name, tensor in unet(variant).items():
        wanted = tensor.clone()
        own = wanted[:, :4] if name == CONV else wanted
        own += 0.5 * (unet("base", 0.05)[name] - unet("base")[name])
        assert torch.allclose(merged[name], wanted, atol=1e-6, rtol=0), name
    assert (merged[CONV][:, :4] - unet(variant)[CONV][:, :4]).abs().max() > 1e-3


@pytest.mark.parametrize("named", ["unet of a pipeline", "unet alone"])
def test_folders_are_merged_as_files_are(files: Path, tmp_path: Path, named: str) -> None:
    """The configurations of the two kinds differ in their input channels, which is what is asked for."""
    inside = "unet" if named == "unet alone" else "."
    folders: list[Path] = []
    for name in ("inpainting", "b", "base"):
        saved = save_checkpoint(tmp_path / name, open_checkpoint(files / f"{name}.safetensors"))
        folders.append(saved.path / inside)
    single = [files / f"{name}.safetensors" for name in ("inpainting", "b", "base")]
    for form, (a, b, base) in (("folder", folders), ("file", single)):
        rebasin("merge", a, b, "-o", tmp_path / f"of-{form}", "--method", "add_difference", "--base", base)
    one, other = (open_checkpoint(tmp_path / f"of-{form}") for form in ("folder", "file"))
    for name, tensor in one.component("unet").items():
        assert torch.equal(tensor, other.component("unet")[name]), name


def test_the_check_of_a_permuted_model_computes_with_its_further_inputs(files: Path, tmp_path: Path) -> None:
    a, b, base = (files / f"{name}.safetensors" for name in ("inpainting", "b", "base"))
    told = rebasin(
        "merge", a, b, "-o", tmp_path / "o.safetensors", "--method", "add_difference", "--base", base
    )
    assert "check" in told and "relative" in told


@pytest.mark.parametrize(
    ("models", "options"),
    [
        (("inpainting", "b"), []),
        (("b", "inpainting"), ["--method", "add_difference", "--base", "base"]),
        (("inpainting", "b"), ["--method", "add_difference", "--base", "inpainting"]),
        (("inpainting", "b"), ["--method", "train_difference", "--base", "base"]),
    ],
)
def test_other_ways_are_refused_by_a_sentence_that_tells_this_one(
    files: Path, tmp_path: Path, models: tuple[str, str], options: list[str]
) -> None:
    given = [files / f"{x}.safetensors" if (files / f"{x}.safetensors").exists() else x for x in options]
    paths = [files / f"{name}.safetensors" for name in models]
    told = rebasin("merge", *paths, "-o", tmp_path / "o.safetensors", *given, expect=2)
    words = " ".join(told.split())
    assert "what the plain one has learnt since a plain base can be added to the other" in words, words
    assert not (tmp_path / "o.safetensors").exists()
