"""The command `rebasin` on narrow twins of Stable Diffusion 1: what each command does, and what it leaves."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rebasin.adapters import move_adapter
from rebasin.checkpoints import component_spec, load_safetensors, open_checkpoint, save_safetensors
from rebasin.checkpoints.architectures import build
from rebasin.checkpoints.layouts import single_file
from rebasin.checkpoints.twins import twin
from rebasin.cli import main
from rebasin.cli.alignment import of_component
from rebasin.spec import Permutation

COMMANDS = ("merge", "align", "compare", "verify", "apply", "inspect")


def rebasin(*arguments: object, expect: int = 0) -> str:
    """Run the command in this process; its output, errors included."""
    text = io.StringIO()
    code = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rebasin", *map(str, arguments)])
        patch.setenv("COLUMNS", "200")
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            try:
                main()
            except SystemExit as stop:
                code = int(stop.code or 0)
    assert code == expect, text.getvalue()
    return text.getvalue()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def components(seed: int) -> dict[str, dict[str, Tensor]]:
    """Random weights for every component of a narrow Stable Diffusion 1."""
    torch.manual_seed(seed)
    made = {}
    for name, config in twin("sd1", 16, depth=1, vocabulary=64).items():
        state = build(name, config, "cpu")[0].state_dict()
        made[name] = {
            n: t + 0.05 * torch.randn_like(t) if t.is_floating_point() else t for n, t in state.items()
        }
    return made


class Files:
    """A, its planted copy B, a fine-tune F, and a LoRA of B; nothing here is ever to change."""

    def __init__(self, folder: Path) -> None:
        parts = components(0)
        ids = {
            "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None].float()
        }
        extra = {"model_ema.decay": torch.tensor(0.5), "betas": torch.ones(4)}
        self.a, self.b, self.f = (folder / f"{name}.safetensors" for name in "abf")
        whole = dict(single_file("sd1", parts)) | ids | extra
        save_safetensors(
            self.a, whole, {"modelspec.title": "A", "modelspec.hash_sha256": "stale"}, keep_order=True
        )
        checkpoint = open_checkpoint(self.a)
        self.planted = {name: component_spec(checkpoint, name).random(5) for name in parts}
        moved = {name: p.apply(parts[name]) for name, p in self.planted.items()}
        save_safetensors(self.b, dict(single_file("sd1", moved)) | ids)
        tuned = {n: {k: t + 1e-3 * torch.randn_like(t) for k, t in part.items()} for n, part in parts.items()}
        save_safetensors(self.f, single_file("sd1", tuned))
        self.lora = folder / "lora.safetensors"
        q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
        v = "lora_te_text_model_encoder_layers_0_mlp_fc1"
        width = parts["text_encoder"]["text_model.encoder.layers.0.mlp.fc1.weight"].shape
        factors = {
            f"{q}.lora_down.weight": torch.randn(2, 16),
            f"{q}.lora_up.weight": torch.randn(16, 2),
            f"{q}.alpha": torch.tensor(2.0),
            f"{v}.lora_down.weight": torch.randn(2, width[1]),
            f"{v}.lora_up.weight": torch.randn(width[0], 2),
        }
        save_safetensors(self.lora, factors, {"ss_network_dim": "2"})
        self.all = [self.a, self.b, self.f, self.lora]
        self.digests = [digest(path) for path in self.all]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("twins"))


@pytest.fixture(autouse=True)
def untouched(files: Files):
    yield
    assert [digest(path) for path in files.all] == files.digests


def read(path: Path) -> dict[str, Tensor]:
    return dict(load_safetensors(path))


def test_help_is_quick_and_has_examples() -> None:
    began = time.perf_counter()
    run = [sys.executable, "-X", "importtime", "-m", "rebasin", "--help"]
    found = subprocess.run(
        run, capture_output=True, text=True, check=True, env={"COLUMNS": "100", "PATH": ""}
    )
    assert (
        time.perf_counter() - began < 20
    )  # the machine may be busy; what counts is that torch is not waited for
    assert " torch" not in found.stderr and " diffusers" not in found.stderr
    assert all(command in found.stdout for command in COMMANDS)
    for command in COMMANDS:
        text = rebasin(command, "--help")
        assert f"rebasin {command}" in text and "--help" in text
        assert command == "apply" or len(text.splitlines()) > 15
    assert rebasin("--version").startswith("rebasin ")


def test_planted_permutation_is_undone_by_merge(files: Files, tmp_path: Path) -> None:
    """B is A with its neurons in another order, so the aligned midpoint is A; the naive one is not."""
    out = tmp_path / "merged.safetensors"
    text = rebasin("merge", files.a, files.b, "-o", out, "--alpha", 0.5)
    assert (
        "Is it legal? Yes" in text and "Did anything move? Yes" in text and str(out) in text.replace("\n", "")
    )
    a, merged = read(files.a), read(out)
    assert list(merged) == [name for name in a if name != "model_ema.decay"]  # a merge has no moving average
    for name in merged:
        assert merged[name].dtype == a[name].dtype
        torch.testing.assert_close(merged[name], a[name], rtol=0, atol=1e-6)
    assert {path.name for path in tmp_path.iterdir()} == {
        "merged.safetensors",
        "merged.permutation.safetensors",
    }

    told = json.loads(load_safetensors(out).metadata["rebasin"])
    assert [one["name"] for one in told["inputs"]] == ["a.safetensors", "b.safetensors"]
    assert [one["sha256"] for one in told["inputs"]] == files.digests[:2]
    assert told["recipe"]["alpha"] == 0.5 and told["recipe"]["method"] == "weighted_sum"
    unet = told["alignment"]["unet"]
    assert unet["spec"] == files.planted["unet"].spec.hash and unet["moved"] > 0
    assert (
        unet["objective"] > unet["initial_objective"]
        and unet["distance_after"] < 1e-3 * unet["distance_before"]
    )
    header = load_safetensors(out).metadata
    assert (
        header["format"] == "pt"
        and header["modelspec.title"] == "A"
        and "modelspec.hash_sha256" not in header
    )
    assert set(json.loads(header["sd_merge_models"])) == set(files.digests[:2])
    assert str(tmp_path.parent) not in json.dumps(header)  # names, no paths

    naive = tmp_path / "naive.safetensors"
    text = rebasin("merge", files.a, files.b, "-o", naive, "--no-align")
    assert "Nothing to ask" in text
    name = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    assert (read(naive)[name] - a[name]).norm() > 0.1 * a[name].norm()
    torch.testing.assert_close(read(naive)[name], (a[name] + read(files.b)[name]) / 2)


def test_a_finished_alignment_is_used_again(files: Files, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    rebasin("merge", files.a, files.b, "-o", out)
    kept = digest(tmp_path / "m.permutation.safetensors")
    assert "exists" in rebasin("merge", files.a, files.b, "-o", out, expect=2)
    text = rebasin("merge", files.a, files.b, "-o", out, "--alpha", 0.25, "--overwrite")
    assert "as found before" in text and digest(tmp_path / "m.permutation.safetensors") == kept
    text = rebasin("merge", files.a, files.b, "-o", out, "--seed", 1, "--overwrite")
    assert "as found before" not in text
    other = tmp_path / "other.safetensors"
    text = rebasin(
        "merge", files.a, files.b, "-o", other, "--permutation", tmp_path / "m.permutation.safetensors"
    )
    assert "as found before" in text and not (tmp_path / "other.permutation.safetensors").exists()


def test_align_verify_apply_inspect(files: Files, tmp_path: Path) -> None:
    aligned, kept = tmp_path / "aligned.safetensors", tmp_path / "aligned.permutation.safetensors"
    text = rebasin("align", files.a, files.b, "-o", aligned)
    assert "Is it legal? Yes" in text and "outputs before and after" in text
    a, b = read(files.a), read(aligned)
    assert list(b) == [name for name in read(files.b)]
    for name in b:
        torch.testing.assert_close(b[name], a[name], rtol=0, atol=0)

    assert "Do they compute the same? Yes" in rebasin("verify", files.b, aligned)
    assert "Do they compute the same? Yes" in rebasin("verify", kept, files.f)
    text = rebasin("verify", files.a, files.f, "--only", "text_encoder", expect=1)
    assert "Do they compute the same? No" in text and "the text_encoder computes something else" in text

    moved = tmp_path / "lora_aligned.safetensors"
    rebasin("apply", kept, files.lora, "-o", moved)
    permutation = Permutation.load(kept)
    expected = move_adapter(permutation, read(files.lora))
    found = read(moved)
    assert (
        all(torch.equal(found[name], expected[name]) for name in expected) and found.keys() == expected.keys()
    )
    assert any(not torch.equal(found[name], tensor) for name, tensor in read(files.lora).items())
    assert load_safetensors(moved).metadata["ss_network_dim"] == "2"
    rebasin("apply", kept, moved, "--inverse", "-o", tmp_path / "back.safetensors")
    assert all(torch.equal(t, read(files.lora)[n]) for n, t in read(tmp_path / "back.safetensors").items())

    again = tmp_path / "again.safetensors"
    rebasin("apply", kept, files.b, "-o", again)
    assert all(torch.equal(read(again)[n], b[n]) for n in b)

    text = rebasin("inspect", aligned)
    assert "Stable Diffusion 1" in text and "from b.safetensors" in text and "text_encoder" in text
    told = json.loads(rebasin("inspect", aligned, "--json", "--hash"))
    assert told["sha256"] == digest(aligned) and told["made"]["recipe"]["command"] == "align"
    assert {row["component"] for row in told["components"]} == {"unet", "vae", "text_encoder"}
    assert told["components"][0]["parameters"] == sum(
        t.numel() for n, t in a.items() if n.startswith("model.diffusion_model.")
    )
    told = json.loads(rebasin("inspect", kept, "--json"))
    assert told["kind"] == "permutation" and {row["component"] for row in told["components"]} == set(
        files.planted
    )
    assert sum(row["moved"] for row in told["components"]) == permutation.moved()
    assert "LoRA" in rebasin("inspect", moved) and "made by" in rebasin("inspect", moved).lower()


def test_compare_says_who_shares_a_basin(files: Files, tmp_path: Path) -> None:
    figures, plot = tmp_path / "apart.json", tmp_path / "apart.png"
    text = rebasin("compare", files.a, files.b, "--json", figures, "--plot", plot)
    assert "Do they share a basin? No" in text and "down_blocks.1" in text
    told = json.loads(figures.read_text())
    assert all(row["after"] < 1e-3 < row["before"] for row in told["blocks"] if row["name"] == "mid_block")
    for component, planted in files.planted.items():
        rows = [row for row in told["blocks"] if row["component"] == component]
        assert sum(row["neurons"] for row in rows) == planted.spec.neurons
    assert plot.read_bytes()[:4] == b"\x89PNG"
    text = rebasin("compare", files.a, files.f)
    assert "Do they share a basin? Yes" in text and "100.0%" in text


def test_output_types_pruning_vae_and_position_ids(files: Files, tmp_path: Path) -> None:
    out = tmp_path / "small.safetensors"
    rebasin(
        "merge",
        files.a,
        files.f,
        "-o",
        out,
        "--no-align",
        "--dtype",
        "bf16",
        "--prune",
        "--fix-clip",
        "--vae",
        files.b,
    )
    small, vae = read(out), read(files.b)
    ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    assert "betas" not in small and torch.equal(small[ids], torch.arange(77)[None])
    assert all(t.dtype == torch.bfloat16 for n, t in small.items() if n != ids)
    for name in small:
        if name.startswith("first_stage_model."):
            assert torch.equal(small[name], vae[name].bfloat16())
    mean = (
        read(files.a)["model.diffusion_model.out.2.bias"] + read(files.f)["model.diffusion_model.out.2.bias"]
    ) / 2
    assert torch.equal(small["model.diffusion_model.out.2.bias"], mean.bfloat16())

    rebasin("merge", files.a, files.f, "-o", tmp_path / "tiny.safetensors", "--no-align", "--dtype", "fp8")
    tiny = read(tmp_path / "tiny.safetensors")
    assert tiny["model.diffusion_model.input_blocks.0.0.weight"].dtype == torch.float8_e4m3fn
    assert tiny["model.diffusion_model.input_blocks.0.0.bias"].dtype == torch.float16
    assert tiny["first_stage_model.quant_conv.weight"].dtype == torch.float16

    rebasin("merge", files.a, files.f, "-o", tmp_path / "old.ckpt", "--no-align")
    pickled = torch.load(tmp_path / "old.ckpt", weights_only=True)["state_dict"]
    assert pickled.keys() == read(files.a).keys() - {"model_ema.decay"}


def test_methods_weights_and_base(files: Files, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    name = "model.diffusion_model.out.2.weight"
    a, b, f = (read(path)[name] for path in (files.a, files.b, files.f))
    rebasin(
        "merge",
        files.a,
        files.b,
        "-o",
        out,
        "--no-align",
        "--method",
        "add_difference",
        "--base",
        files.f,
        "--alpha",
        0.5,
    )
    torch.testing.assert_close(read(out)[name], a + 0.5 * (b - f))
    rebasin("merge", files.a, files.b, files.f, "-o", out, "--overwrite", "--no-align", "--weights", "2,1,1")
    torch.testing.assert_close(read(out)[name], (2 * a + b + f) / 4)
    told = json.loads(load_safetensors(out).metadata["rebasin"])
    assert len(told["inputs"]) == 3 and told["recipe"]["weights"] == "2,1,1"
    assert "needs a base" in rebasin(
        "merge", files.a, files.b, "-o", tmp_path / "x.safetensors", "--method", "ties_sum", expect=2
    )
    assert "no merge method" in rebasin(
        "merge", files.a, files.b, "-o", tmp_path / "x.safetensors", "--method", "magic", expect=2
    )
    text = rebasin("merge", files.a, files.b, "-o", tmp_path / "x.safetensors", "--option", "k=1", expect=2)
    assert "no option" in text
    text = rebasin(
        "merge", files.a, files.b, files.f, "-o", tmp_path / "x.safetensors", "--alpha", 0.5, expect=2
    )
    assert "--weights with 3 numbers" in text


def test_more_than_two_models(files: Files, tmp_path: Path) -> None:
    """Three copies of one model, two of them permuted or tuned, come together; each keeps its permutation."""
    out = tmp_path / "soup.safetensors"
    rebasin("merge", files.a, files.b, files.f, "-o", out, "--weights", "1,1,2")
    a, f, merged = read(files.a), read(files.f), read(out)
    for name in f:
        torch.testing.assert_close(merged[name], (a[name] + f[name]) / 2, rtol=1e-5, atol=1e-6)
    assert {path.name for path in tmp_path.iterdir()} == {
        "soup.safetensors",
        "soup.permutation-2.safetensors",
        "soup.permutation-3.safetensors",
    }
    p = of_component(Permutation.load(tmp_path / "soup.permutation-2.safetensors"), "vae")
    assert p is not None and p.moved() == files.planted["vae"].invert().moved()
    text = rebasin("merge", files.a, files.b, files.f, "-o", out, "--weights", "1,1,2", "--overwrite")
    assert "as found before" in text


def test_dry_run_tells_and_does_nothing(files: Files, tmp_path: Path) -> None:
    text = rebasin(
        "merge", files.a, files.b, "-o", tmp_path / "m.safetensors", "--dtype", "fp16", "--dry-run"
    )
    assert (
        "Memory about" in text and "time about" in text and "Nothing was done" in text and "neurons" in text
    )
    text = rebasin("align", files.a, files.b, "-o", tmp_path / "m.safetensors", "--dry-run")
    assert "Nothing was done" in text
    assert not list(tmp_path.iterdir())
