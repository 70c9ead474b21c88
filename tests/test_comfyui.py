"""The nodes for ComfyUI: what they do on states and files; and, where its source is at hand, in ComfyUI itself."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cli_files import Files, digest, read, rebasin

from experiments.original_names import tensors, wan
from rebasin.checkpoints import load_metadata, save_safetensors
from rebasin.checkpoints.random_weights import random_checkpoint
from rebasin.cli import loaded
from rebasin.errors import ConfigError

NODES = Path(__file__).parent.parent / "integrations" / "comfyui"

TEXT = "cond_stage_model.transformer."

START = """
import runpy, sys
from rebasin.integrations.torchvision import prepare_torchvision
prepare_torchvision()
sys.argv = ["main.py", *sys.argv[1:]]
sys.path.insert(0, ".")
runpy.run_path("main.py", run_name="__main__")
"""
"""torchvision's wheels do not load beside a CPU build of torch without this."""


@pytest.fixture(scope="module")
def work() -> ModuleType:
    found = importlib.util.spec_from_file_location("comfyui_work", NODES / "work.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["comfyui_work"] = module
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("files"), ("text_encoder",))


def clip_of(path: Path) -> dict[str, torch.Tensor]:
    """A text encoder as ComfyUI's CLIP names it, with what it adds."""
    own = {
        f"clip_l.transformer.{n.removeprefix(TEXT)}": t for n, t in read(path).items() if n.startswith(TEXT)
    }
    return {**own, "clip_l.logit_scale": torch.tensor(1.0)}


def test_loaded_text_encoders_are_aligned_and_merged_as_files_are(
    files: Files, work: ModuleType, tmp_path: Path
) -> None:
    a, b = (work.known(work.parts_of({}, clip_of(path))) for path in (files.a, files.b))
    assert list(a) == ["clip_l"]
    apart = loaded.compare(a, b)
    assert apart.short == "No" and "Do they share a basin? No" in work.report(apart)
    found = loaded.align(a, b)
    rebasin("align", files.a, files.b, "-o", tmp_path / "aligned.safetensors")
    _, moved = work.names_of(found.parts)
    wanted = clip_of(tmp_path / "aligned.safetensors")
    assert set(moved) == {name for name in wanted if "transformer" in name and "position_ids" not in name} | {
        name for name in moved if "position_ids" in name
    }
    for name, (state, own) in moved.items():
        assert torch.equal(state[own], wanted[name]), name
    assert found.moved > 0 and set(work.changed(found.parts, b)["clip_l"]) < set(b["clip_l"])
    assert not work.changed(a, a)["clip_l"]
    merged = loaded.merge([a, found.parts], alpha=0.3)
    rebasin("merge", files.a, files.b, "--alpha", 0.3, "-o", tmp_path / "merged.safetensors")
    expected = clip_of(tmp_path / "merged.safetensors")
    for name, (state, own) in work.names_of(merged.parts)[1].items():
        assert torch.equal(state[own], expected[name]), name
    recipe, figures = work.made_of(found, merged)
    assert recipe["command"] == "merge" and recipe["aligned"]["command"] == "align"
    path = loaded.save(tmp_path / "saved.safetensors", read(files.a), recipe, figures, dtype="fp16")
    told = json.loads(load_metadata(path)["rebasin"])
    assert told["recipe"]["alpha"] == 0.3 and told["alignment"]["text_encoder"]["moved"] == found.moved
    assert all(tensor.dtype == torch.float16 for tensor in read(path).values() if tensor.is_floating_point())
    assert "weighted_sum" in rebasin("inspect", path)


def test_a_lora_follows_what_a_node_has_aligned(files: Files, work: ModuleType, tmp_path: Path) -> None:
    parts = [work.known(work.parts_of({}, clip_of(path))) for path in (files.a, files.b)]
    found = loaded.align(*parts)
    path = work.apply_to_file(found, files.lora, tmp_path / "moved.safetensors")
    rebasin("align", files.a, files.b, "-o", tmp_path / "aligned.safetensors")
    kept = tmp_path / "aligned.permutation.safetensors"
    other = work.apply_to_file(kept, files.lora, tmp_path / "other.safetensors")
    assert all(torch.equal(tensor, read(other)[name]) for name, tensor in read(path).items())
    assert any(not torch.equal(tensor, read(files.lora)[name]) for name, tensor in read(path).items())


def test_the_file_of_a_node_is_that_of_the_command(files: Files, work: ModuleType, tmp_path: Path) -> None:
    weights = "fc1=0.4,default=0.2"
    ours = work.merge_files(
        [files.a, files.b], tmp_path / "node.safetensors", method="weighted_sum", weights=weights
    )
    rebasin("merge", files.a, files.b, "--weights", weights, "-o", tmp_path / "merged.safetensors")
    assert digest(ours) == digest(tmp_path / "merged.safetensors")
    aligned, kept = work.align_files(files.a, files.b, tmp_path / "aligned.safetensors")
    assert aligned.exists() and kept.exists()


def test_what_a_node_can_not_do_is_one_sentence(files: Files, work: ModuleType, tmp_path: Path) -> None:
    part = work.parts_of({}, clip_of(files.a))
    for call, sentence in (
        (lambda: work.output_of(tmp_path, "../x"), "leads out of the folder"),
        (lambda: work.one_of(None, " "), "Connect an alignment"),
        (lambda: work.require_free(files.a, False), "switch overwrite on"),
        (
            lambda: work.whole_of({"a": torch.ones(1)}, {"diffusion_model.x": torch.ones(1)}),
            "saved under other names",
        ),
        (lambda: loaded.align(part, {"unet": {}}), "no part in common"),
        (lambda: loaded.merge([part]), "two models or more"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            call()
    assert work.output_of(tmp_path, "some/name").name == "name.safetensors"
    assert work.alpha_of("uniform_soup", 0.5) is None and work.alpha_of("slerp", 0.5) == 0.5


def test_the_example_workflows_are_whole() -> None:
    text = (NODES / "nodes.py").read_text(encoding="utf-8")
    for path in (NODES / "examples").glob("*.json"):
        for node in json.loads(path.read_text()).values():
            assert node["class_type"] == "UNETLoader" or f'node_id="{node["class_type"]}"' in text
            assert f"({path.relative_to(NODES)})" in (NODES / "README.md").read_text(encoding="utf-8")


class ComfyUI:
    """A running server; `post` does a workflow."""

    def __init__(self, data: Path, port: int) -> None:
        self.data, self.url = data, f"http://127.0.0.1:{port}"
        python = os.environ.get("COMFYUI_PYTHON", sys.executable)
        root = str(NODES.parent.parent)
        self.log = open(data / "log.txt", "w")  # noqa: SIM115
        options = ["--cpu", "--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(data)]
        options += ["--disable-api-nodes", "--force-fp32", "--fp32-text-enc", "--disable-auto-launch"]
        self.process = subprocess.Popen(
            [python, "-c", START, *options],
            cwd=os.environ["COMFYUI_PATH"],
            env={**os.environ, "PYTHONPATH": root},
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def ask(self, path: str, data: Any = None) -> Any:
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def wait(self, seconds: float = 1800) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, (self.data / "log.txt").read_text()[-3000:]
            try:
                self.ask("/queue")
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(1)
        raise AssertionError((self.data / "log.txt").read_text()[-3000:])

    def post(self, workflow: dict[str, Any], seconds: float = 1800) -> dict[str, Any]:
        try:
            number = self.ask("/prompt", {"prompt": workflow})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if done := self.ask(f"/history/{number}").get(number):
                assert done["status"]["status_str"] == "success", json.dumps(done["status"])[-3000:]
                return done["outputs"]
            time.sleep(0.5)
        raise AssertionError("it takes too long")


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUI]:
    data = tmp_path_factory.mktemp("comfyui")
    for name in ("checkpoints", "diffusion_models", "loras"):
        (data / "models" / name).mkdir(parents=True)
    (data / "custom_nodes").mkdir()
    (data / "custom_nodes" / "rebasin").symlink_to(NODES)
    for seed, name in enumerate("ab"):
        narrow = random_checkpoint("sd1", 16, depth=1, vocabulary=64, seed=seed)
        save_safetensors(data / "models" / "checkpoints" / f"{name}.safetensors", narrow)
        wan = data / "models" / "diffusion_models" / f"wan_{name}.safetensors"
        save_safetensors(wan, wan_of(seed))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = ComfyUI(data, port)
    try:
        server.wait()
        yield server
    finally:
        server.process.terminate()
        server.process.wait(30)
        server.log.close()


def wan_of(seed: int) -> dict[str, torch.Tensor]:
    """Wan's transformer, two blocks of one head, in the names of its own code: ComfyUI takes any width of it."""
    return tensors(wan(text=4096, time=256), seed)  # widths that ComfyUI takes for granted


@pytest.mark.comfyui
def test_a_workflow_writes_the_file_of_the_command(comfyui: ComfyUI, tmp_path: Path) -> None:
    assert "RebasinMergeFiles" in comfyui.ask("/object_info")
    told = comfyui.post(json.loads((NODES / "examples" / "merge_files.json").read_text()))
    path = comfyui.data / "output" / "checkpoints" / "merged.safetensors"
    assert str(path) in json.dumps(told)
    models = [comfyui.data / "models" / "checkpoints" / f"{name}.safetensors" for name in "ab"]
    rebasin(
        "merge", *models, "--alpha", 0.3, "--weights", "IN=0.2,OUT=0.7", "-o", tmp_path / "merged.safetensors"
    )
    assert digest(path) == digest(tmp_path / "merged.safetensors")


@pytest.mark.comfyui
def test_loaded_models_are_merged_as_files_are(comfyui: ComfyUI, tmp_path: Path) -> None:
    told = comfyui.post(json.loads((NODES / "examples" / "merge_loaded.json").read_text()))
    assert "Do they share a basin? Yes" in json.dumps(told)
    path = comfyui.data / "output" / "checkpoints" / "loaded.safetensors"
    models = [comfyui.data / "models" / "diffusion_models" / f"wan_{name}.safetensors" for name in "ab"]
    rebasin("merge", *models, "--alpha", 0.3, "-o", tmp_path / "merged.safetensors")
    ours, found = read(tmp_path / "merged.safetensors"), read(path)
    assert {f"model.diffusion_model.{name}" for name in ours} == set(found)
    for name, tensor in ours.items():
        assert torch.equal(found[f"model.diffusion_model.{name}"], tensor), name
    made = json.loads(load_metadata(path)["rebasin"])
    assert made["recipe"]["command"] == "merge" and made["recipe"]["aligned"]["command"] == "align"
