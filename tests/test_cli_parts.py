"""The command `rebasin` on parts of a model, which take a moment: reuse, several models, weights, failures, kills."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cli_files import Files, digest, read, rebasin
from test_kills import PROCESSES
from torch import Tensor

from rebasin.adapters import of_component
from rebasin.checkpoints import load_safetensors, save_safetensors
from rebasin.reporting.console import Console
from rebasin.spec import Permutation
from rebasin.types import ProgressEvent

BIAS = "first_stage_model.decoder.norm_out.bias"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("parts"), ("vae", "text_encoder"))


@pytest.fixture(autouse=True)
def untouched(files: Files):
    yield
    files.check_untouched()


def test_a_merge_that_is_further_from_both_than_the_plain_one_says_so_first(
    files: Files, tmp_path: Path
) -> None:
    """F is A with a little noise, so any permutation of it harms; B is A permuted, which aligning undoes."""
    spec = files.planted["text_encoder"].spec
    rebasin("merge", files.a, files.b, "-o", tmp_path / "m.safetensors", "--only", "text_encoder")
    undone = tmp_path / "m.permutation.safetensors"
    assert Permutation.load(undone).spec.cells.keys() == {f"text_encoder.{name}" for name in spec.cells}
    for other, worse in ((files.f, True), (files.b, False)):
        given = [
            "--permutation",
            undone,
            "--only",
            "text_encoder",
            "--overwrite",
            "-o",
            tmp_path / "o.safetensors",
        ]
        text = rebasin("merge", files.a, other, *given)
        answers = [line for line in text.splitlines() if "? " in line]
        assert answers[0].startswith("Did aligning help? No." if worse else "Is it legal? Yes.")
        assert ("give --no-align" in text) == worse and "text_encoder" in text.split("compare ")[
            1
        ].splitlines()[0]
        assert "compare " not in rebasin("merge", files.a, other, *given, "--no-check")


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


def test_methods_weights_and_base(files: Files, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    name = BIAS
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
    # By block; a folder, too, and what it was made from is known from there.
    folder = tmp_path / "folder"
    rebasin("merge", files.a, files.b, "-o", folder, "--no-align", "--weights", "vae=1", "--alpha", 0)
    state = read(folder / "text_encoder" / "model.safetensors")
    key = "text_model.encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(state[key], read(files.a)[f"cond_stage_model.transformer.{key}"])
    assert torch.equal(
        read(folder / "vae" / "diffusion_pytorch_model.safetensors")["decoder.conv_norm_out.bias"], b
    )
    assert "from b.safetensors" in rebasin("inspect", folder)
    text = rebasin(
        "merge", files.a, files.b, "-o", out, "--overwrite", "--no-align", "--weights", "vea=1", expect=2
    )
    assert "'vea'" in text
    assert "needs --base FILE" in rebasin(
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


# What goes wrong -------------------------------------------------------------------------------------------------


def changed(files: Files, folder: Path, **tensors: Tensor | None) -> Path:
    """A copy of B with other tensors; None leaves one out."""
    state = {k: t for k, t in (read(files.b) | tensors).items() if t is not None}
    return save_safetensors(folder / "changed.safetensors", state)


def refused(folder: Path, *arguments: object) -> str:
    """The one sentence of a command that fails; it must leave nothing."""
    before = sorted(folder.iterdir())
    text = rebasin(*arguments, expect=2)
    sentence = text.strip().splitlines()[-1]
    assert sentence.startswith("Error: ") and sentence.endswith(".") and "Traceback" not in text
    assert sorted(folder.iterdir()) == before
    return sentence


@pytest.mark.parametrize("align", ["--align", "--no-align"])
def test_damaged_files(files: Files, tmp_path: Path, align: str) -> None:
    out = tmp_path / "out.safetensors"
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(files.b.read_bytes()[:-100])
    assert "cut.safetensors" in refused(tmp_path, "merge", files.a, cut, "-o", out, align)
    flipped = bytearray(files.b.read_bytes())
    flipped[20] ^= 0xFF
    cut.write_bytes(flipped)
    assert "cut.safetensors" in refused(tmp_path, "merge", files.a, cut, "-o", out, align)
    name = "first_stage_model.decoder.conv_in.weight"
    nan = read(files.b)[name].clone()
    nan[0, 0, 0, 0] = float("nan")
    bad = changed(files, tmp_path, **{name: nan})
    assert "conv_in.weight" in refused(tmp_path, "merge", files.a, bad, "-o", out, align)
    bad = changed(files, tmp_path, **{name: None})
    assert "conv_in.weight" in refused(tmp_path, "merge", files.a, bad, "-o", out, align)
    large = read(files.b)[BIAS] + 1e6
    bad = changed(files, tmp_path, **{BIAS: large})
    text = refused(tmp_path, "merge", files.a, bad, "-o", out, "--no-align", "--dtype", "fp16")
    assert "norm_out.bias" in text and "bf16 or fp32" in text
    (tmp_path / "pickle.ckpt").write_bytes(b"no pickle at all")
    assert "pickle.ckpt" in refused(tmp_path, "merge", files.a, tmp_path / "pickle.ckpt", "-o", out, align)
    assert "no file" in refused(tmp_path, "merge", files.a, tmp_path / "absent.safetensors", "-o", out, align)


def test_foreign_files(files: Files, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    assert "LoRA" in refused(tmp_path, "merge", files.a, files.lora, "-o", out)
    other = save_safetensors(tmp_path / "other.safetensors", {"layer.weight": torch.ones(2, 2)})
    assert "other.safetensors" in refused(tmp_path, "merge", files.a, other, "-o", out)
    vae = {n: t for n, t in read(files.b).items() if n.startswith("first_stage_model.")}
    alone = save_safetensors(tmp_path / "vae.safetensors", vae)
    text = refused(tmp_path, "merge", files.a, alone, "-o", out)
    assert "a.safetensors is" in text and "vae.safetensors is a VAE" in text
    planted = tmp_path / "planted.safetensors"
    files.planted["vae"].save(planted)
    assert "permutation" in refused(tmp_path, "merge", files.a, planted, "-o", out)
    assert "holds no permutation" in refused(tmp_path, "apply", files.a, files.lora, "-o", out)
    assert "nothing to move" in refused(tmp_path, "apply", planted, files.lora, "-o", out)
    wrong = save_safetensors(tmp_path / "wrong.safetensors", {"unet.x.lora_A.weight": torch.ones(2, 2)})
    rebasin("align", files.a, files.b, "-o", tmp_path / "aligned.safetensors")
    kept = tmp_path / "aligned.permutation.safetensors"
    assert "none of the components" in refused(tmp_path, "apply", kept, wrong, "-o", out)


def test_outputs_that_can_not_be(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge = ("merge", files.a, files.f, "--no-align", "-o")
    assert "one of the inputs" in refused(tmp_path, *merge, files.a, "--overwrite")
    assert "does not exist" in refused(tmp_path, *merge, tmp_path / "nowhere" / "out.safetensors")
    if Path("/proc/self").exists():
        assert "can't be written" in refused(tmp_path, *merge, "/proc/out.safetensors")
    (tmp_path / "out.safetensors").write_text("mine")
    assert "exists" in refused(tmp_path, *merge, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_text() == "mine"
    (tmp_path / "in.permutation.safetensors").write_text("mine, too")
    assert "in the way" in refused(tmp_path, "merge", files.a, files.f, "-o", tmp_path / "in.safetensors")
    assert "no type" in refused(tmp_path, *merge, tmp_path / "x.safetensors", "--dtype", "fp12")
    assert "has no unet" in refused(tmp_path, *merge, tmp_path / "x.safetensors", "--only", "unet")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    text = refused(tmp_path, "merge", files.a, files.f, "-o", tmp_path / "x.safetensors")
    assert "needs" in text and "free" in text  # before hours of alignment, not after


def killed_at(stage: str, command: list[str]) -> None:
    """Be killed in the middle of a stage."""
    told = Console.progress

    def progress(self: Console, event: ProgressEvent) -> None:
        if event["stage"] == stage and event["step"] > 0:
            os.kill(os.getpid(), signal.SIGKILL)
        told(self, event)

    Console.progress = progress  # pyright: ignore[reportAttributeAccessIssue]
    rebasin(*command)


@pytest.mark.parametrize("stage", ["text_encoder", "save"])
def test_killed_and_resumed(files: Files, tmp_path: Path, stage: str) -> None:
    """Killed while the second component is aligned, or while the file is written: the same command goes on.

    To the same file, see test_kills.
    """
    out = tmp_path / "out.safetensors"
    command = ["merge", str(files.a), str(files.b), "-o", str(out)]
    process = PROCESSES.Process(target=killed_at, args=(stage, command))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not out.exists()
    left = {path.name.split("-")[-1] for path in tmp_path.glob(".out*.aligned.safetensors")}
    assert left == ({"vae.aligned.safetensors"} if stage == "text_encoder" else set())
    text = rebasin(*command)
    assert ("as found before" in text) == (stage == "save")
    assert not list(tmp_path.glob(".*.aligned.safetensors")) and not list(
        tmp_path.glob(".*.matching.safetensors")
    )
