"""Models on the Hub, by its real client, against a server of this machine that speaks its language."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from cli_files import read, rebasin
from hub_server import TOKEN, Hub, serving
from transformers import GPT2Config, GPT2LMHeadModel

from rebasin.checkpoints import hub as hub_module
from rebasin.checkpoints import save_safetensors
from rebasin.checkpoints.hub import Place, local, needed
from rebasin.checkpoints.random_weights import random_checkpoint
from rebasin.errors import CheckpointError, ConfigError
from rebasin.files import cache_folder

TEXT = "cond_stage_model."


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Two text encoders as single files, and a folder of transformers."""
    where = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        whole = random_checkpoint("sd1", 16, depth=1, vocabulary=64, seed=seed)
        save_safetensors(
            where / f"{name}.safetensors", {n: whole[n].clone() for n in whole if n.startswith(TEXT)}
        )
    config = GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(where / "gpt")
    return {p.relative_to(where).as_posix(): p.read_bytes() for p in where.rglob("*") if p.is_file()}


@pytest.fixture
def hub(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    constants = huggingface_hub.constants
    with serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("REBASIN_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        gpt = {n.removeprefix("gpt/"): b for n, b in files.items() if n.startswith("gpt/")}
        card = b"---\nlicense: apache-2.0\n---\n# Of A\n"
        junk = {"pytorch_model.bin": b"x", "tf_model.h5": b"x", "picture.png": b"x", ".gitattributes": b"x"}
        server.repos = {
            "someone/files": {"main": {n: files[n] for n in ("a.safetensors", "b.safetensors")}},
            "someone/gpt": {"main": {**gpt, **junk, "README.md": card}, "old": {**gpt, "extra.json": b"{}"}},
            "someone/terms": {"main": gpt},
        }
        server.gated = {"someone/terms"}
        yield server


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("hf://a/b", Place("a/b", None, None)),
        ("hf://a/b/", Place("a/b", None, None)),
        ("hf://a/b@v1.0/unet/x.safetensors", Place("a/b", "v1.0", "unet/x.safetensors")),
        ("hf://a/b@refs%2Fpr%2F1", Place("a/b", "refs/pr/1", None)),
        ("a/b", None),
        ("/hf:/a", None),
    ],
)
def test_places(text: str, place: Place | None) -> None:
    assert Place.of(text) == place and Place.of(Path(text)) == place
    if place is not None:
        assert Place.of(str(place).replace("refs/pr/1", "refs%2Fpr%2F1")) == place


def test_of_a_repository_what_its_model_needs_is_fetched() -> None:
    names = [
        "model_index.json", "v1-5.safetensors", "v1-5.ckpt", "flax_model.msgpack", "README.md", "a.png",
        ".gitattributes",
        "unet/config.json", "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors", "vae/config.json", "vae/diffusion_pytorch_model.bin",
        "text_encoder/config.json", "text_encoder/model.fp16-00001-of-00002.safetensors",
        "text_encoder/model.fp16-00002-of-00002.safetensors", "text_encoder/model.safetensors.index.fp16.json",
    ]  # fmt: skip
    common = {
        "model_index.json",
        "README.md",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
    }
    rest = {"vae/diffusion_pytorch_model.bin", *names[-3:]}
    assert set(needed(names)) == {*common, *rest, "unet/diffusion_pytorch_model.safetensors"}
    assert set(needed(names, "fp16")) == {*common, *rest, "unet/diffusion_pytorch_model.fp16.safetensors"}
    assert needed([n for n in names if n.startswith("vae/")], below="vae/") == names[11:13]


def test_a_merge_of_files_on_the_hub_is_that_of_the_same_files(
    hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(files[f"{name}.safetensors"])
    rebasin("merge", "a.safetensors", "b.safetensors", "-o", "here.safetensors", "--no-align")
    places = [f"hf://someone/files{rev}/{n}.safetensors" for n, rev in (("a", ""), ("b", "@main"))]
    said = rebasin("merge", *places, "-o", "there.safetensors", "--no-align", "--model-card")
    assert "there.md" in said and "in all, by the models' sizes" in said
    here, there = read(tmp_path / "here.safetensors"), read(tmp_path / "there.safetensors")
    assert here.keys() == there.keys() and all(here[n].equal(there[n]) for n in here)
    page = (tmp_path / "there.md").read_text()
    assert "base_model:\n- someone/files" in page and f"`{places[1]}`" in page and "weighted_sum" in page
    assert "| align | `False` |" in page and "align False" in rebasin("inspect", "there.safetensors")
    again = ("-o", "there.safetensors", "--no-align", "--model-card")
    (tmp_path / "there.safetensors").unlink()
    assert "there.md, where the model card would go, exists" in rebasin("merge", *places, *again, expect=2)
    before = len(hub.got)
    rebasin("inspect", places[0])
    fetched = [one for one in hub.got[before:] if one.startswith("GET") and "/resolve/" in one]
    assert not fetched  # it is in the cache


def test_a_folder_has_its_name_and_goes_back_with_a_page(hub: Hub, tmp_path: Path) -> None:
    found = local("hf://someone/gpt")
    assert found.name == "gpt" and sorted(p.name for p in found.iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    said = rebasin("inspect", "hf://someone/gpt@old", "--json")
    assert json.loads(said[said.index("{") :])["file"] == "gpt"
    rebasin("merge", "hf://someone/gpt", "hf://someone/gpt@old", "-o", "merged", "--push-to-hub", "me/merged")
    page = (tmp_path / "merged" / "README.md").read_text()
    assert "license: apache-2.0" in page and "library_name: transformers" in page and "# Of A" not in page
    sent = hub.repos["me/merged"]["main"]
    assert hub.private["me/merged"] and sent["README.md"].decode() == page
    assert sent["model.safetensors"] == (tmp_path / "merged" / "model.safetensors").read_bytes()
    assert "merged.permutation.safetensors" in sent and not (tmp_path / "merged" / "extra.json").exists()
    rebasin(
        "merge", "hf://someone/gpt", "hf://someone/gpt@old", "-o", "plain", "--no-model-card", "--no-align"
    )
    assert "# Of A" in (tmp_path / "plain" / "README.md").read_text()


def test_recipes_name_models_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    places = [f"hf://someone/files/{n}.safetensors" for n in "ab"]
    rebasin("merge", *places, "-o", "one.safetensors", "--no-align", "--save-recipe", "one.yaml")
    text = (tmp_path / "one.yaml").read_text()
    assert all(f"file: {place}\n" in text for place in places)
    rebasin("merge", "--recipe", "one.yaml", "-o", "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()
    (tmp_path / "kit.yaml").write_text(
        "merge_method: linear\nmodels:\n- model: someone/gpt\n  parameters: {weight: 1}\n"
        "- model: someone/gpt@old\n  parameters: {weight: 1}\n"
    )
    rebasin("merge", "--recipe", "kit.yaml", "-o", "kit", "--save-recipe", "kit2.yaml")
    assert "hf://someone/gpt@old" in (tmp_path / "kit2.yaml").read_text()
    rebasin("merge", "hf://someone/gpt", "hf://someone/gpt@old", "-o", "plain", "--no-align")
    ours, plain = read(tmp_path / "kit/model.safetensors"), read(tmp_path / "plain/model.safetensors")
    assert ours.keys() == plain.keys() and all(ours[n].equal(plain[n]) for n in ours)
    (tmp_path / "kit.yaml").write_text("merge_method: linear\nmodels:\n- model: someone/none\n- model: x")
    said = rebasin("merge", "--recipe", "kit.yaml", "-o", "none", expect=2)
    assert (
        "line 3: there is no 'someone/none' beside this file, and hf://someone/none is not on the Hub" in said
    )


def test_without_network_what_was_fetched_is_there(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    file, folder = local("hf://someone/files/a.safetensors"), local("hf://someone/gpt")
    hub.repos = {}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert local("hf://someone/files/a.safetensors") == file and local("hf://someone/gpt") == folder
    with pytest.raises(
        CheckpointError, match=r"^hf://someone/files/b.safetensors is not in the Hub's cache, and HF_HUB"
    ):
        local("hf://someone/files/b.safetensors")
    with pytest.raises(ConfigError, match="needs the Hub, but HF_HUB_OFFLINE is set"):
        hub_module.require_repo("me/merged")


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("hf://someone", "is no place on the Hub; write"),
        ("hf://someone/none", "is not on the Hub, or is not yours to read"),
        ("hf://someone/none/a.safetensors", "is not on the Hub, or is not yours to read"),
        ("hf://someone/files@v2/a.safetensors", "has no such revision"),
        ("hf://someone/files/c.safetensors", "did you mean 'b.safetensors'"),
        ("hf://someone/terms", "asks you to accept its terms first"),
    ],
)
def test_what_is_not_there_is_a_sentence(
    hub: Hub, place: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "terms" in place:
        monkeypatch.delenv("HF_TOKEN")
    said = rebasin("inspect", place, expect=2)
    assert sentence in said and said.startswith(f"Error: {place}") and len(said) < 300


def test_a_hub_that_is_not_there_is_a_sentence(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.shutdown()
    hub.socket.close()
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client tries five times
    said = rebasin("inspect", "hf://someone/files/a.safetensors", expect=2)
    assert "can't be fetched" in said and "check the connection" in said and len(said) < 300
    hub.serve_forever = lambda: None  # type: ignore[method-assign]


def test_pushing_is_looked_at_before_the_work(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    models = ["hf://someone/files/a.safetensors", "hf://someone/files/b.safetensors", "-o", "ab.safetensors"]
    said = rebasin("merge", *models, "--push-to-hub", "merged", expect=2)
    assert "give the name of a repository, owner/name" in said
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "log in (hf auth login) or set HF_TOKEN" in rebasin(
        "merge", *models, "--push-to-hub", "me/x", expect=2
    )
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    said = rebasin("merge", *models, "--no-align", "--push-to-hub", "me/x", expect=2)
    assert "log in with a token that may write" in said and (tmp_path / "ab.safetensors").exists()
    assert "ab.safetensors is written, but not on the Hub" in said and "hf upload me/x ab.safetensors" in said
    said = rebasin("merge", *models[:2], "-o", "hf://me/x", expect=2)
    assert "to send it to the Hub, too, give --push-to-hub" in said


def test_the_command_goes_to_the_hub_that_the_environment_names(hub: Hub, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_CACHE": str(tmp_path / "h")}
    del environment["HF_HUB_OFFLINE"]  # the libraries are kept from the Hub, and we are not
    command = [sys.executable, "-m", "rebasin", "inspect", "hf://someone/files/a.safetensors"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "text_encoder" in ran.stdout, ran.stderr
    (tmp_path / "both.yaml").write_text(
        "rebasin: 1\nmodels:\n- hf://someone/files/a.safetensors\n- hf://someone/files/b.safetensors\nalign: false\n"
        "output: both.safetensors\n"
    )
    recipe = ("merge", "--recipe", "both.yaml", "--push-to-hub", "me/both")
    ran = subprocess.run(
        [*command[:3], *recipe], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert ran.returncode == 0 and hub.repos["me/both"]["main"]["both.safetensors"], ran.stderr
    assert cache_folder() == tmp_path / "cache"
