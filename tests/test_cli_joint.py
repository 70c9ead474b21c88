"""`--joint`: the text encoder's residual stream moves together with the UNet's cross attention."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from cli_files import Files, read, rebasin

from rebasin.checkpoints import open_checkpoint, save_safetensors
from rebasin.checkpoints.joint import joint_spec, joint_state
from rebasin.spec import Permutation


def test_joint_permutation_is_undone(tmp_path: Path) -> None:
    files = Files(tmp_path, ("unet", "text_encoder"), plant=False)
    a = open_checkpoint(files.a)
    spec = joint_spec(a, ("unet", "text_encoder"))
    stream = [g for g in spec if len({s.parameter.split(".")[0] for c in g.cells for s in c.sites}) == 2]
    assert len(stream) == 1  # what passes from the one to the other is one group
    moved = spec.random(2).apply(joint_state(a, ("unet", "text_encoder")))
    states = {
        part: {n.removeprefix(f"{part}."): t for n, t in moved.items() if n.startswith(f"{part}.")}
        for part in a.components
    }
    b = save_safetensors(tmp_path / "joint.safetensors", a.restore(states))

    out = tmp_path / "out.safetensors"
    text = rebasin("merge", files.a, b, "-o", out, "--joint")
    assert "Is it legal? Yes" in text and "Did anything move? Yes" in text
    merged, original = read(out), read(files.a)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, original[name], rtol=0, atol=1e-6)
    told = json.loads(rebasin("inspect", tmp_path / "out.permutation.safetensors", "--json"))
    assert {row["component"] for row in told["components"]} == {"unet", "text_encoder"}

    assert "Do they compute the same? Yes" in rebasin("verify", tmp_path / "out.permutation.safetensors", b)
    assert "Do they compute the same? Yes" in rebasin("verify", files.a, b, "--joint")
    assert "Do they compute the same? No" in rebasin("verify", files.a, b, "--only", "text_encoder", expect=1)

    # A LoRA of B's text encoder and UNet follows, and B itself does.
    kept = tmp_path / "out.permutation.safetensors"
    rebasin("apply", kept, files.lora, "-o", tmp_path / "lora2.safetensors")
    key = "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"
    columns = dict(Permutation.load(kept).axes_of("text_encoder.text_model.encoder.layers.0.mlp.fc1.weight"))[
        1
    ]
    assert torch.equal(read(tmp_path / "lora2.safetensors")[key], read(files.lora)[key][:, columns])
    rebasin("apply", kept, b, "-o", tmp_path / "back.safetensors")
    back = read(tmp_path / "back.safetensors")
    assert all(torch.equal(tensor, original[name]) for name, tensor in back.items())
