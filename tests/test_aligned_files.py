"""`rebasin apply` with an alignment: what was moved along computes with the moved model what it did with the model."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from cli_files import read, rebasin
from torch import Tensor

from rebasin.adapters import union
from rebasin.adapters.move import modules_of, parameters_of
from rebasin.checkpoints import (
    Checkpoint,
    component_spec,
    load_metadata,
    open_checkpoint,
    save_safetensors,
)
from rebasin.checkpoints.random_weights import random_checkpoint
from rebasin.checkpoints.reduced_width import REDUCED_WIDTH
from rebasin.cli.function import compute
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


PARTS = {
    "sd1": ("model.diffusion_model.", "cond_stage_model."),
    "sdxl": ("model.diffusion_model.", "conditioner.embedders.1."),
    "clip_l": ("cond_stage_model.",),
}
"""What of a family is in the files here."""


@cache
def world(folder: Path, family: str) -> tuple[Path, Path, Path, Alignment]:
    """A model in single precision, an alignment of all its components, and the model that it makes of it."""
    file, kept, moved = (folder / f"{family}{end}.safetensors" for end in ("", ".alignment", "_moved"))
    of = "sd1" if family == "clip_l" else family
    tensors = random_checkpoint(of, REDUCED_WIDTH[of], depth=1, vocabulary=64, dtype=torch.float32)
    own = {name: tensors[name] for name in tensors if name.startswith(PARTS[family])}
    save_safetensors(file, own, keep_order=True)
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
    own = [f"text_model.encoder.layers.0.{name}" for name in TEXT]
    return {"unet": unet, "text_encoder" + "_2" * (family == "sdxl"): own}


def factors(checkpoint: Checkpoint, names: dict[str, list[str]], layout: str) -> State:
    """A LoRA of rank 3 in the names of kohya's scripts, of PEFT or of older diffusers."""
    generator, found = torch.Generator().manual_seed(1), {}
    short = {"unet": "lora_unet", "text_encoder_2": "lora_te2"}
    short["text_encoder"] = "lora_te"
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
    for name in {str(module.component) for module in modules_of(adapter)} & set(before.components):
        one, other = compute(before, name, wanted[name]), compute(after, name, found[name])
        plain = compute(before, name, before.component(name))
        for output, tensor in one.items():
            assert (other[output] - tensor).norm() < 1e-5 * tensor.norm()
        assert any((plain[n] - t).norm() > 1e-2 * t.norm() for n, t in one.items())
    return read(out)


@pytest.mark.parametrize(("family", "layout"), [("sd1", "kohya"), ("sdxl", "peft")])
def test_loras_follow(folder: Path, family: str, layout: str) -> None:
    checkpoint = open_checkpoint(world(folder, family)[0])
    adapter = factors(checkpoint, linear(family), layout)
    out = follows(folder, family, adapter)
    assert out.keys() == adapter.keys()
    if family == "sd1":  # other names, the same factors
        other = factors(checkpoint, linear(family), "diffusers")
        file, kept, _, _ = world(folder, family)
        given = save_safetensors(folder / "other.safetensors", other)
        rebasin("apply", kept, given, "-o", folder / "other_out.safetensors", "--base", file)
        moved = [t for n, t in read(folder / "other_out.safetensors").items()]
        wanted = [t for n, t in out.items() if not n.endswith("alpha")]
        assert all(torch.equal(one, two) for one, two in zip(moved, wanted, strict=True))
        told = rebasin("apply", kept, given, "-o", folder / "n.safetensors", expect=2)
        assert "is turned by the gains" in told and "--base" in told and len(told.strip().splitlines()) == 1


def test_other_kinds_follow_and_what_can_not_is_written_out_or_told(folder: Path) -> None:
    file, kept, _, _ = world(folder, "sd1")
    shapes = open_checkpoint(file).shapes("unet")
    block = f"{SPATIAL['sd1']}.transformer_blocks.0"
    generator = torch.Generator().manual_seed(2)

    def rand(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    def flat(name: str) -> str:
        return f"lora_unet_{name.replace('.', '_')}"

    whole = {f"{flat(n)}.diff": rand(*shapes[f"{n}.weight"]) for n in (f"{block}.ff.net.0.proj", "conv_in")}
    whole[f"{flat(block)}_ff_net_0_proj.diff_b"] = rand(*shapes[f"{block}.ff.net.0.proj.bias"])
    q, (out, inner) = f"{block}.attn1.to_q", shapes[f"{block}.attn1.to_q.weight"]
    sizes = {"w1_a": (out, 2), "w1_b": (2, inner), "w2_a": (out, 2), "w2_b": (2, inner)}
    loha = {f"{flat(q)}.hada_{k}": rand(*size) for k, size in sizes.items()}
    k = f"{block}.attn2.to_out.0"
    lokr = {f"{flat(k)}.lokr_w1": rand(4, 4), f"{flat(k)}.lokr_w2": rand(out // 4, inner // 4)}
    moved = follows(folder, "sd1", {**whole, **loha, **lokr}, "--unfold")
    assert f"{flat(q)}.hada_w1_a" not in moved and f"{flat(k)}.lokr_w1" not in moved
    for adapter, word in ((loha, "hada"), (lokr, "Kronecker")):
        given = save_safetensors(folder / "told.safetensors", adapter)
        told = rebasin("apply", kept, given, "-o", folder / "n.safetensors", "--base", file, expect=2)
        assert word in told and "--unfold" in told and given.name in told


def test_rounding_is_measured_and_told(folder: Path) -> None:
    file, kept, moved, _ = world(folder, "clip_l")
    narrow = save_safetensors(folder / "half.safetensors", read(file), dtype=torch.float16)
    out = folder / "half_out.safetensors"
    said = " ".join(rebasin("apply", kept, narrow, "-o", out).split())
    wide, found = read(moved), read(out)
    acted = [n for n, t in wide.items() if t.is_floating_point() and not torch.equal(t.half(), found[n])]
    told = float(json.loads(load_metadata(out)["rebasin"])["rounding"])
    assert 1e-4 < told < 4e-4 and f"What did rounding cost? {told:.1e}"[:30] in said and acted
    assert f"rounding what maps moved has cost {told:.2e}" in " ".join(rebasin("inspect", out).split())
    said = rebasin("apply", kept, file, "-o", folder / "plain.safetensors", "--dry-run")
    assert "neurons and 4 maps" in " ".join(said.split()) and not (folder / "plain.safetensors").exists()
    back = folder / "back.safetensors"
    assert "Nothing" in rebasin("apply", kept, moved, "-o", back, "--inverse")
    for name, tensor in read(file).items():
        torch.testing.assert_close(read(back)[name], tensor, rtol=1e-4, atol=1e-4)


def test_a_planted_alignment_is_found_kept_reused_and_given(folder: Path, tmp_path: Path) -> None:
    a, _, b, _ = world(folder, "clip_l")
    out, merged = tmp_path / "al.safetensors", tmp_path / "m.safetensors"
    part = ("--only", "text_encoder")
    plan = rebasin("align", a, b, "-o", out, "--maps", *part, "--dry-run")
    assert "and by maps of 4 groups" in plan and "Nothing was done" in plan
    said = " ".join(rebasin("align", a, b, "-o", out, "--maps", *part).split())
    kept = tmp_path / "al.alignment.safetensors"
    assert (
        "4 groups have maps" in said and f"alignment in {kept}" in said and "What did rounding cost?" in said
    )
    wanted, found = read(a), read(out)
    text = [n for n in wanted if n.startswith("cond_stage_model.") and wanted[n].is_floating_point()]
    assert all((found[n] - wanted[n]).norm() < 1e-4 * wanted[n].norm().clamp_min(1) for n in text)
    assert "as found before" in rebasin("align", a, b, "-o", out, "--maps", *part, "--overwrite")
    rebasin("merge", a, b, "-o", merged, "--permutation", kept, *part)
    middle = read(merged)
    assert all((middle[n] - wanted[n]).norm() < 1e-4 * wanted[n].norm().clamp_min(1) for n in text)
    made = json.loads(load_metadata(out)["rebasin"])
    assert made["alignment"]["text_encoder"]["maps"] == 4 and made["recipe"]["maps"] and made["rounding"]
    assert "an alignment, legal by its own spec" in " ".join(rebasin("inspect", kept).split())
    assert "text_encoder" in rebasin("verify", kept, b)
    rebasin("merge", a, b, "-o", merged, "--maps", *part, "--overwrite", "--dtype", "fp16")
    assert (tmp_path / "m.alignment.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--permutation", "x"), "--maps finds an alignment and --permutation gives one"),
        (("--no-align",), "--maps and --no-align contradict each other"),
        (("--start", "identity"), "--start identity has no effect with --maps"),
        (("--fisher", "x", "--method", "fisher"), "--fisher is the information of single weights"),
    ],
)
def test_what_does_not_go_with_maps_is_told(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    told = rebasin("merge", "a", "b", "-o", tmp_path / "m.safetensors", "--maps", *options, expect=2)
    assert words in told and told.strip().endswith(".")
    told = rebasin("merge", "a", "b", "c", "-o", tmp_path / "m.safetensors", "--maps", expect=2)
    assert "--maps aligns two models, but 3 are given" in told


def test_compare_tells_one_model_in_another_basis(folder: Path, tmp_path: Path) -> None:
    """Permutations see two models; maps see one."""
    file, _, moved, _ = world(folder, "clip_l")
    told = rebasin("compare", file, moved)
    assert "Do they share a basin? No" in told and "by maps" not in told
    figures = tmp_path / "apart.json"
    told = rebasin("compare", file, moved, "--maps", "--json", figures)
    assert "Do they share a basin? Up to maps. permutations leave" in told and "align with --maps" in told
    rows = json.loads(figures.read_text())["blocks"]
    assert max(row["mapped"] for row in rows) < 1e-3 < 0.5 < max(row["after"] for row in rows)
    other = tmp_path / "other.safetensors"
    tensors = read(file)
    noise = {n: t + 0.5 * t.std() * torch.randn_like(t) for n, t in tensors.items() if t.is_floating_point()}
    save_safetensors(other, {**tensors, **{n: t for n, t in noise.items() if t.ndim > 1}}, keep_order=True)
    assert "Do they share a basin? Yes" in rebasin("compare", file, other, "--maps")
