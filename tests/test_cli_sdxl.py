"""The command `rebasin` on a narrow Stable Diffusion XL: two text encoders, and blocks of several layers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from cli_files import Files, read, rebasin

from rebasin.adapters import move_adapter
from rebasin.checkpoints import open_checkpoint, save_safetensors
from rebasin.checkpoints.joint import joint_spec, joint_state
from rebasin.spec import Permutation

PARTS = ("unet", "text_encoder", "text_encoder_2")


def test_planted_permutation_is_undone_and_the_lora_follows(tmp_path: Path) -> None:
    files = Files(tmp_path, (*PARTS, "vae"), family="sdxl")
    spec = files.planted["unet"].spec
    assert spec.coverage().one > 0.999 and spec.coverage().both > 0.9
    aligned, kept = tmp_path / "aligned.safetensors", tmp_path / "aligned.permutation.safetensors"
    text = rebasin("align", files.a, files.b, "-o", aligned)
    assert "Stable Diffusion XL" in text and "Is it legal? Yes" in text and "Did anything move? Yes" in text
    a, b = read(files.a), read(aligned)
    assert list(b) == list(read(files.b))
    assert all(torch.equal(tensor, a[name]) for name, tensor in b.items())
    told = json.loads(rebasin("inspect", kept, "--json"))
    assert {row["component"] for row in told["components"]} == {*PARTS, "vae"}

    moved = tmp_path / "lora_aligned.safetensors"
    rebasin("apply", kept, files.lora, "-o", moved)
    expected, found = move_adapter(Permutation.load(kept), read(files.lora)), read(moved)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert any(not torch.equal(tensor, read(files.lora)[name]) for name, tensor in found.items())
    files.check_untouched()


def test_joint_permutation_of_both_text_encoders_is_undone(tmp_path: Path) -> None:
    files = Files(tmp_path, PARTS, plant=False, family="sdxl")
    a = open_checkpoint(files.a)
    spec = joint_spec(a, ("unet", "text_encoder", "text_encoder_2"))
    states = {part: {} for part in a.components}
    for name, tensor in (
        spec.random(2).apply(joint_state(a, ("unet", "text_encoder", "text_encoder_2"))).items()
    ):
        part, _, rest = name.partition(".")
        states[part][rest] = tensor
    b = save_safetensors(tmp_path / "joint.safetensors", a.restore(states))
    out = tmp_path / "out.safetensors"
    text = rebasin("merge", files.a, b, "-o", out, "--joint")
    assert "Is it legal? Yes" in text and "Did anything move? Yes" in text
    original = read(files.a)
    for name, tensor in read(out).items():
        torch.testing.assert_close(tensor, original[name], rtol=0, atol=1e-6)
    files.check_untouched()
