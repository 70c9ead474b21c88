"""`rebasin apply` with an alignment: what was moved along computes with the moved model what it did with the model."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_files import read, rebasin
from torch import Tensor

from rebasin.adapters import union
from rebasin.adapters.move import modules_of, parameters_of
from rebasin.checkpoints import Checkpoint, component_spec, open_checkpoint, save_safetensors
from rebasin.checkpoints.joint import joint_spec
from rebasin.checkpoints.random_weights import random_checkpoint
from rebasin.checkpoints.reduced_width import REDUCED_WIDTH
from rebasin.cli.function import compare_chains, compare_functions, compute
from rebasin.spec import Alignment

torch.set_num_threads(1)

State = dict[str, Tensor]

SPATIAL = {"sd1": "down_blocks.0.attentions.0", "sdxl": "down_blocks.1.attentions.0"}
INNER = (
    "attn1.to_q",
    "attn1.to_k",
    "attn1.to_v",
    "attn1.to_out.0",
    "attn2.to_q",
    "attn2.to_v",
    "ff.net.0.proj",
)
TEXT = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("aligned")


@cache
def world(folder: Path, family: str) -> tuple[Path, Path, Path, Alignment]:
    """A model in single precision, an alignment of all its components, and the model that it makes of it."""
    file, kept, moved = (folder / f"{family}{end}.safetensors" for end in ("", ".alignment", "_moved"))
    tensors = random_checkpoint(family, REDUCED_WIDTH[family], depth=1, vocabulary=64, dtype=torch.float32)
    save_safetensors(file, tensors, keep_order=True)
    checkpoint = open_checkpoint(file)
    member = union({n: component_spec(checkpoint, n).random_alignment(3) for n in checkpoint.components})
    member.save(kept, {"files": json.dumps([{"name": x, "sha256": x} for x in "ab"])})
    rebasin("apply", kept, file, "-o", moved)
    return file, kept, moved, member


def linear(family: str) -> dict[str, list[str]]:
    """Component -> weights that adapters change."""
    spatial = SPATIAL[family]
    unet = [f"{spatial}.transformer_blocks.0.{name}" for name in (*INNER, "ff.net.2")]
    unet += [
        f"{spatial}.proj_in",
        f"{spatial}.proj_out",
        "time_embedding.linear_1",
        "down_blocks.0.resnets.0.conv1",
    ]
    texts = ["text_encoder"] + ["text_encoder_2"] * (family == "sdxl")
    own = [f"text_model.encoder.layers.0.{name}" for name in TEXT]
    return {"unet": unet} | {name: own for name in texts}


def factors(checkpoint: Checkpoint, names: dict[str, list[str]], layout: str) -> State:
    """A LoRA of rank 3 in the names of kohya's scripts, of PEFT or of older diffusers."""
    generator, found = torch.Generator().manual_seed(1), {}
    short = {"unet": "lora_unet", "text_encoder_2": "lora_te2"}
    short["text_encoder"] = "lora_te1" if "text_encoder_2" in names else "lora_te"
    for component, modules in names.items():
        shapes = checkpoint.shapes(component)
        for name in modules:
            out, inner, *kernel = shapes[f"{name}.weight"]
            up = 0.3 * torch.randn(out, 3, *(1 for _ in kernel), generator=generator)
            down = 0.3 * torch.randn(3, inner, *kernel, generator=generator)
            if layout == "kohya":
                flat = f"{short[component]}_{name.replace('.', '_')}"
                found |= {f"{flat}.lora_up.weight": up, f"{flat}.lora_down.weight": down}
                found[f"{flat}.alpha"] = torch.tensor(3.0)
            elif layout == "peft":
                found |= {f"{component}.{name}.lora_B.weight": up, f"{component}.{name}.lora_A.weight": down}
            else:
                found |= {
                    f"{component}.{name}.lora.up.weight": up,
                    f"{component}.{name}.lora.down.weight": down,
                }
    return found


def with_adapter(checkpoint: Checkpoint, member: Alignment, adapter: State) -> dict[str, State]:
    """The components with what the adapter adds to their weights."""
    states: dict[str, State] = {n: dict(checkpoint.component(n)) for n in checkpoint.components}
    modules = modules_of(adapter)
    for module, parameter in zip(modules, parameters_of(member.spec, modules, "x"), strict=True):
        assert parameter is not None
        component, _, name = parameter.partition(".")
        own = {factor: adapter[key].float() for factor, key in module.keys.items()}
        weight = states[component][name]
        if "up" in own:
            added = torch.einsum("or,ri->oi", own["up"].flatten(1), own["down"].flatten(1))
            added = added * float(own.get("constant", 3.0)) / own["up"].shape[1]
        elif "hada_w1_a" in own:
            added = own["hada_w1_a"] @ own["hada_w1_b"] * (own["hada_w2_a"] @ own["hada_w2_b"])
        elif "lokr_w1" in own:
            added = torch.kron(own["lokr_w1"], own["lokr_w2"])
        else:
            added = own["diff"]
        states[component][name] = weight + added.reshape(weight.shape)
        if "diff_b" in own:
            bias = name.removesuffix("weight") + "bias"
            states[component][bias] = states[component][bias] + own["diff_b"]
    return states


def follows(folder: Path, family: str, adapter: State, *options: object) -> State:
    """The adapter as the command moves it, which computes with the moved model what it does with the model."""
    file, kept, moved, member = world(folder, family)
    given, out = folder / "adapter.safetensors", folder / "adapter_out.safetensors"
    save_safetensors(given, adapter)
    rebasin("apply", kept, given, "-o", out, "--base", file, "--overwrite", *options)
    before, after = open_checkpoint(file), open_checkpoint(moved)
    wanted = with_adapter(before, member, adapter)
    found = with_adapter(after, member, read(out))
    for name in {module.component for module in modules_of(adapter)} & set(before.components):
        one, other = compute(before, name, wanted[name]), compute(after, name, found[name])
        plain = compute(before, name, before.component(name))
        for output, tensor in one.items():
            assert (other[output] - tensor).norm() < 1e-5 * tensor.norm()
        assert any((plain[n] - t).norm() > 1e-2 * t.norm() for n, t in one.items())
    return read(out)


@pytest.mark.parametrize(("family", "layout"), [("sd1", "kohya"), ("sd1", "diffusers"), ("sdxl", "peft")])
def test_loras_follow(folder: Path, family: str, layout: str) -> None:
    checkpoint = open_checkpoint(world(folder, family)[0])
    adapter = factors(checkpoint, linear(family), layout)
    out = follows(folder, family, adapter)
    assert out.keys() == adapter.keys()
