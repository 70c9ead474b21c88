"""Diffusers folders that are damaged, contradict themselves or have more than the weights: one sentence before any
work, and what is no weights comes along.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_files import rebasin
from hydra import compose, initialize_config_dir

from rebasin.checkpoints import belongings, open_checkpoint, save_checkpoint, save_safetensors
from rebasin.checkpoints.folders import load_weights
from rebasin.checkpoints.random_weights import random_checkpoint
from rebasin.errors import CheckpointError
from rebasin.files import config_dir
from rebasin.tasks import load_task

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a narrow model."""
    where = tmp_path_factory.mktemp("folders")
    state = random_checkpoint("sd1", 16, depth=1, vocabulary=64)
    single = save_safetensors(where / "whole.safetensors", {name: state[name].clone() for name in state})
    return save_checkpoint(where / "whole", open_checkpoint(single)).path


@pytest.fixture
def pair(whole: Path, tmp_path: Path) -> tuple[Path, Path]:
    for name in "AB":
        shutil.copytree(whole, tmp_path / name)
    return tmp_path / "A", tmp_path / "B"


def told(a: Path, b: Path, *options: object, expect: int = 2) -> str:
    """What `merge --dry-run` says of two folders: its error, or all of it."""
    out = rebasin("merge", a, b, "-o", a.parent / "out", "--dry-run", "--no-align", *options, expect=expect)
    if not expect:
        return out
    sentence = out.strip().splitlines()[-1]
    assert sentence.startswith("Error: ") and sentence.endswith(".") and len(sentence) <= 400, sentence
    return sentence


def changed(file: Path, **entries: Any) -> str:
    return json.dumps({**json.loads(file.read_text()), **entries})


DAMAGE: dict[str, tuple[str, Any, str]] = {
    "cut": ("unet/config.json", b'{"in_channels": ', "unet/config.json is no readable configuration"),
    "cut text encoder": ("text_encoder/config.json", b"{", "text_encoder/config.json is no readable"),
    "list": ("vae/config.json", b"[]", "vae/config.json is no readable configuration"),
    "binary": ("unet/config.json", b"\xff\xfe bad", "unet/config.json is no readable configuration"),
    "folder": ("vae/config.json", None, "vae/config.json is no readable configuration: Is a directory"),
    "class": (
        "unet/config.json", {"_class_name": "FluxTransformer2DModel"},
        "unet/config.json is of class 'FluxTransformer2DModel', but the tensors beside it are those of a unet",
    ),
    "channels": ("unet/config.json", {"in_channels": "four"}, "says in_channels 'four', but the tensors"),
    "widths": ("vae/config.json", {"block_out_channels": [10**9, 2]}, r"says block_out_channels [1000000000, 2],"),
    "vocabulary": ("text_encoder/config.json", {"vocab_size": 65}, "says vocab_size 65, but the tensors"),
    "index": ("model_index.json", b"[1,2]", "model_index.json is no readable configuration"),
    "other index": (
        "model_index.json", {"_class_name": "StableDiffusionXLPipeline"},
        "model_index.json says StableDiffusionXLPipeline, but the tensors are those of Stable Diffusion 1",
    ),
    "scheduler": (
        "scheduler/scheduler_config.json", b'{"prediction_type": "v_pre',
        "scheduler_config.json is no readable configuration",
    ),
    "prediction": (
        "scheduler/scheduler_config.json", {"prediction_type": ["a"]},
        "scheduler_config.json says prediction_type ['a'], but",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_configurations_are_told_before_any_work(pair, damage):
    file, change, message = DAMAGE[damage]
    for one in pair:
        place = one / file
        before = place.read_bytes()
        if change is None:
            place.unlink()
            place.mkdir()
        else:
            place.write_bytes(change if isinstance(change, bytes) else changed(place, **change).encode())
        sentence = told(*pair)
        assert message in sentence and f"{one}/" in sentence
        if change is None:
            place.rmdir()
        place.write_bytes(before)


def test_links_that_lead_nowhere_are_no_missing_configurations(pair):
    a, b = pair
    (b / "unet/config.json").unlink()
    (b / "unet/config.json").symlink_to("/nowhere/config.json")
    assert "unet/config.json is no readable configuration: No such file" in told(a, b)


def test_a_scheduler_tells_what_is_predicted(pair):
    a, b = pair
    config = b / "scheduler/scheduler_config.json"
    config.write_text(changed(config, prediction_type="v_prediction"))
    assert "(scheduler_config.json says so)" in told(a, b)
    config.write_text(changed(config, prediction_type="sample"))
    assert open_checkpoint(b).prediction.reason == "scheduler_config.json says sample"
    assert open_checkpoint(b).prediction.kind is None


def test_of_several_variants_it_is_told_which_one_is_taken(pair):
    a, b = pair
    shutil.copy(b / UNET, (b / UNET).with_suffix(".fp16.safetensors"))
    line = "Of several variants in B the one without a name is taken (unet: not fp16); choose with --variant"
    assert line in told(a, b, expect=0)
    assert "Of several variants" not in told(a, b, "--variant", "fp16", expect=0)
    # In a run, too: it has the option that the sentence names.
    overrides = ["model=checkpoint", f"model.a={a}", f"model.b={b}", "model.batches=0"]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        assert str(*load_task(compose("config", overrides)).remarks).startswith(line)
    (b / UNET).rename((b / UNET).with_suffix(".non_ema.safetensors"))
    assert (
        "B/unet has the variants fp16, non_ema; choose with --variant, in a run with model.variant"
        in told(a, b)
    )
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("config", [*overrides, "model.variant=fp16"])
        load_task(cfg)
        with pytest.raises(CheckpointError, match=r"None of the inputs .* variant 'x' \(model.variant\)"):
            load_task(compose("config", [*overrides, "model.variant=x"]))


def test_pickles_without_a_variant_come_before_other_variants(pair):
    _, b = pair
    state = dict(open_checkpoint(b / "unet").raw)
    (b / UNET).rename((b / UNET).with_suffix(".fp16.safetensors"))
    torch.save({name: torch.zeros_like(one) for name, one in state.items()}, (b / UNET).with_suffix(".bin"))
    found = open_checkpoint(b / "unet").raw
    assert not any(found[name].any() for name in found)


def test_what_both_have_is_named_where_one_has_no_unet(pair):
    a, b = pair
    shutil.rmtree(b / "unet")
    for one, other in (pair, pair[::-1]):
        sentence = told(one, other)
        assert "B has no unet, which " in sentence
        assert sentence.endswith("rebasin merge with --only vae --only text_encoder.")
        assert "Write" in told(one, other, "--only", "vae", "--only", "text_encoder", expect=0)
    assert "B has no unet" in told(a, b, "--only", "unet")
    out = a.parent / "vae"
    rebasin("merge", a, b, "-o", out, "--no-align", "--only", "vae")
    assert open_checkpoint(out).components == ("unet", "vae", "text_encoder")
    rebasin("align", a, b, "-o", out.with_name("text"), "--only", "text_encoder")
    shutil.rmtree(b / "vae")
    config = b / "text_encoder/config.json"
    state = dict(open_checkpoint(b / "text_encoder").raw)
    name = next(name for name in state if name.endswith("token_embedding.weight"))
    save_safetensors(b / "text_encoder/model.safetensors", {**state, name: state[name][:60]})
    config.write_text(changed(config, vocab_size=60))
    assert told(a, b).endswith(f"has no unet, vae, which {a} has, so there is nothing to merge.")


def test_what_is_no_weights_is_copied(pair, monkeypatch):
    a, b = pair
    (a / "feature_extractor").mkdir()
    (a / "feature_extractor/preprocessor_config.json").write_text("{}")
    (a / "safety_checker").mkdir()
    (a / "safety_checker/model.safetensors").write_bytes(b"0" * 2000)
    (a / "notes.txt").write_text("hi")
    (a / ".git").mkdir()
    (a / ".git/HEAD").write_text("")
    (a / "unet/README.md").write_text("hi")
    (a / "unet/diffusion_pytorch_model.fp16.bin").write_text("old")
    (a / "tokenizer").symlink_to("/nowhere")
    index = a / "model_index.json"
    classes = {
        "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    }
    index.write_text(changed(index, **classes))
    monkeypatch.setattr(belongings, "LARGE", 1000)
    out = a / "out"  # in the folder itself: it does not copy its own beginnings
    text = rebasin("merge", a, b, "-o", out, "--no-align")
    assert "Not copied from A, as it is large and not merged: safety_checker (2.0 kB); copy it" in text
    assert "Not copied from A, as it can't be read (a link that leads nowhere?): tokenizer." in text
    new = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    ours = {path.relative_to(b).as_posix() for path in b.rglob("*") if path.is_file()}
    assert new - ours == {
        "feature_extractor/preprocessor_config.json",
        "notes.txt",
        "unet/README.md",
        "README.md",
    }
    written = json.loads((out / "model_index.json").read_text())
    assert written["feature_extractor"] == ["transformers", "CLIPImageProcessor"]
    assert written["safety_checker"] == [None, None] and written["requires_safety_checker"] is False
    monkeypatch.undo()
    saved = save_checkpoint(a.parent / "again", open_checkpoint(a))
    assert (saved.path / "safety_checker/model.safetensors").is_file()
    written = json.loads((saved.path / "model_index.json").read_text())
    assert written["safety_checker"] == classes["safety_checker"] and written["requires_safety_checker"]


def test_an_index_of_shards_tells_where_each_tensor_is(tmp_path: Path) -> None:
    name = "diffusion_pytorch_model-0000{}-of-00002.safetensors"
    files = {name.format(n): {f"{x}.weight": torch.ones(2)} for n, x in ((1, "a"), (2, "b"))}
    for file, tensors in files.items():
        save_safetensors(tmp_path / file, tensors)
    places = {tensor: file for file, tensors in files.items() for tensor in tensors}
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert list(load_weights(tmp_path)) == ["a.weight", "b.weight"]
    index.write_text(json.dumps({"weight_map": {**places, "b.weight": name.format(1)}}))
    with pytest.raises(
        CheckpointError, match=f"'b.weight' is in {name.format(1)}, but it is in {name.format(2)}"
    ):
        load_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {**places, "c.weight": name.format(1)}}))
    with pytest.raises(CheckpointError, match="names the tensor 'c.weight', which is in none"):
        load_weights(tmp_path)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_the_folder_of_a_component_comes_back_as_one(whole: Path, tmp_path: Path, component: str) -> None:
    a = Path(shutil.copytree(whole / component, tmp_path / "a"))
    (a / "README.md").write_text("mine")
    rebasin("merge", a, whole / component, "-o", tmp_path / "merged")
    written = {file.name for file in (tmp_path / "merged").iterdir()}
    assert written == {file.name for file in a.iterdir()}
    assert open_checkpoint(tmp_path / "merged").components == open_checkpoint(a).components
