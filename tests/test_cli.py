"""The command `rebasin` on narrow models of Stable Diffusion 1: what each command does, and what it leaves."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_files import IDS, Files, digest, read, rebasin

from rebasin.adapters import move_adapter, union
from rebasin.checkpoints import architecture, load_safetensors, open_checkpoint, save_safetensors
from rebasin.cli import permute_file, stages
from rebasin.spec import Permutation, PermutationSpec

COMMANDS = ("merge", "align", "compare", "verify", "apply", "inspect", "methods")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("files"))


@pytest.fixture(autouse=True)
def untouched(files: Files):
    yield
    files.check_untouched()


def test_help_is_quick_and_has_examples() -> None:
    run = [sys.executable, "-X", "importtime", "-m", "rebasin", "--help"]
    found = subprocess.run(
        run, capture_output=True, text=True, check=True, env={"COLUMNS": "100", "PATH": ""}
    )
    assert " torch" not in found.stderr and " diffusers" not in found.stderr
    assert all(command in found.stdout for command in COMMANDS)
    for command in COMMANDS:
        text = rebasin(command, "--help")
        assert f"rebasin {command}" in text and "--help" in text
        assert len(text.splitlines()) > 12
    assert rebasin("--version").startswith("rebasin ")


def test_planted_permutation_is_undone_by_merge(files: Files, tmp_path: Path) -> None:
    """B is A with its neurons in another order, so the aligned midpoint is A; the naive one is not."""
    coverage = files.planted["unet"].spec.coverage()
    assert coverage.one > 0.999 and coverage.both > 0.9
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


def test_align_verify_apply_inspect(files: Files, tmp_path: Path) -> None:
    aligned, kept = tmp_path / "aligned.safetensors", tmp_path / "aligned.permutation.safetensors"
    text = rebasin("align", files.a, files.b, "-o", aligned)
    assert "Is it legal? Yes" in text and "outputs before and after" in text
    a, b = read(files.a), read(aligned)
    assert list(b) == list(read(files.b))
    for name in b:
        torch.testing.assert_close(b[name], a[name], rtol=0, atol=0)

    assert "Do they compute the same? Yes" in rebasin("verify", files.b, aligned)
    assert "Do they compute the same? Yes" in rebasin("verify", kept, files.f, "--only", "vae")
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


@pytest.mark.usefixtures("real_pictures")
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
    text = rebasin("compare", files.a, files.f, "--only", "text_encoder")
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
    assert "betas" not in small and torch.equal(small[IDS], torch.arange(77)[None])
    assert all(t.dtype == torch.bfloat16 for n, t in small.items() if n != IDS)
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


def test_controlnet_follows_its_unet(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a ControlNet adds to the first skip connection arrives where that connection's neurons went."""
    from diffusers import ControlNetModel

    unet = architecture(open_checkpoint(files.a), "unet")[0]
    with torch.device("meta"):
        control = ControlNetModel.from_unet(unet, load_weights_from_unet=False)  # type: ignore[arg-type]
    state = {name: torch.randn(t.shape) for name, t in control.state_dict().items()}
    (tmp_path / "net").mkdir()
    file = save_safetensors(tmp_path / "net" / "diffusion_pytorch_model.safetensors", state)
    (tmp_path / "net" / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    kept = tmp_path / "p.safetensors"
    union(files.planted).save(kept)
    derive, made = permute_file.controlnet_spec, {}

    def once(spec: PermutationSpec) -> PermutationSpec:
        """The symmetries of both, derived by the first command; the others are about spellings."""
        if spec.hash not in made:
            made[spec.hash] = derive(spec)
        return made[spec.hash]

    monkeypatch.setattr(permute_file, "controlnet_spec", once)
    assert "a ControlNet" in rebasin("inspect", file)
    rows = dict(files.planted["unet"].axes_of("conv_in.weight"))[0]
    for given in (file, tmp_path / "net"):
        rebasin("apply", kept, given, "-o", tmp_path / "moved.safetensors", "--overwrite")
        moved = read(tmp_path / "moved.safetensors")
        name = "controlnet_down_blocks.0.weight"
        assert torch.equal(moved[name], state[name][rows]) and not torch.equal(moved[name], state[name])
        assert torch.equal(moved["conv_in.weight"], state["conv_in.weight"])  # its own neurons stay
    ldm = {}
    for name, tensor in state.items():
        theirs = re.sub(r"^(controlnet_down_blocks\.\d+|controlnet_mid_block)\.", r"\1.0.", name)
        theirs = theirs.replace("controlnet_down_blocks", "zero_convs")
        ldm[theirs.replace("controlnet_mid_block", "middle_block_out")] = tensor
    files_of = {
        "plain": ldm,  # without LDM's control_model.
        "wrapped": {f"module.control_model.{n}": t for n, t in ldm.items()},
        "more": {**state, "controlnet_down_blocks.99.weight": torch.ones(4, 4, 1, 1)},
        "whole": {**{f"control_model.{n}": t for n, t in ldm.items()}, **load_safetensors(files.b)},
    }
    for kind, tensors in files_of.items():
        out = tmp_path / f"moved_{kind}.safetensors"
        given = save_safetensors(tmp_path / f"{kind}.safetensors", tensors)
        told = rebasin("apply", kept, given, "-o", out, expect=2 * (kind in ("more", "whole")))
        if kind == "more":
            assert "adds to a place that the aligned UNet has not" in told and not out.exists()
        elif kind == "whole":
            assert "holds a model besides a ControlNet" in told and not out.exists()
        else:
            name = next(n for n in read(out) if n.endswith("zero_convs.0.0.weight"))
            assert torch.equal(read(out)[name], state["controlnet_down_blocks.0.weight"][rows])
    for option, words in (
        (("--variant", "fp16"), "it has no variants"),
        (("--unfold",), "--unfold is for the LoKr"),
    ):
        assert words in rebasin("apply", kept, file, "-o", tmp_path / "n.safetensors", *option, expect=2)


def test_interrupt_says_how_to_go_on_and_leaves_nothing(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It sends itself what Ctrl-C sends when it has read the files: from outside, one may come too early or too late.
    hashes = stages.hashes

    def interrupted(*args: Any) -> tuple[str, ...]:
        signal.raise_signal(signal.SIGINT)
        return hashes(*args)

    monkeypatch.setattr(stages, "hashes", interrupted)
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # what runs in the background ignores it
    try:
        told = rebasin("align", files.a, files.b, "-o", tmp_path / "out.safetensors", expect=130)
    finally:
        signal.signal(signal.SIGINT, before)
    assert "the same command continues" in told and "Traceback" not in told
    assert not list(tmp_path.iterdir())
