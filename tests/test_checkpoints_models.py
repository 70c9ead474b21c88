"""Stable Diffusion checkpoints of every family, of reduced width: detection, key maps, specs, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from rebasin.checkpoints import (
    architecture,
    component_spec,
    load_safetensors,
    open_checkpoint,
    require_same_family,
    save_checkpoint,
    save_safetensors,
)
from rebasin.checkpoints.architectures import build, component_config
from rebasin.checkpoints.random_weights import ema_name, noisy, random_checkpoint
from rebasin.checkpoints.reduced_width import REDUCED_WIDTH, narrow
from rebasin.checkpoints.specs import proof, structure
from rebasin.errors import CheckpointError, VerificationError

FAMILIES = {
    "sd1": ("unet", "vae", "text_encoder"),
    "sd2": ("unet", "vae", "text_encoder"),
    "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2"),
    "sdxl_refiner": ("unet", "vae", "text_encoder_2"),
}


def make(family: str, **options: Any) -> dict[str, torch.Tensor]:
    options = {"depth": 2, "vocabulary": 40, **options}
    return dict(random_checkpoint(family, REDUCED_WIDTH[family], **options))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A narrow single file of each family."""
    folder = tmp_path_factory.mktemp("narrow")
    return {
        family: save_safetensors(
            folder / f"{family}.safetensors", make(family), {"format": "pt", "author": "me"}
        )
        for family in FAMILIES
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_file_is_known_by_its_tensors_alone(files, family):
    found = open_checkpoint(files[family])
    assert (found.family, found.variant, found.layout) == (family, "base", "ldm")
    assert found.components == FAMILIES[family]
    assert found.metadata["author"] == "me"
    # logit_scale; of SD2 also a layer of 12 tensors and the projection.
    assert len(found.extras.get("unused", ())) == {"sd1": 0, "sd2": 12 + 2}.get(family, 1)
    assert set(found.extras) <= {"unused", "position_ids", "schedule"}


@pytest.mark.parametrize("family", FAMILIES)
def test_our_names_and_numbers_are_those_of_diffusers_own_converters(files, family, tmp_path):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders import single_file_utils as theirs
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    checkpoint = open_checkpoint(files[family])
    raw = dict(load_safetensors(files[family]))
    folder = save_checkpoint(tmp_path / "configs", checkpoint).path
    for name in checkpoint.components:
        ours = dict(checkpoint.component(name))
        if name == "unet":
            expected = theirs.convert_ldm_unet_checkpoint(dict(raw), component_config(checkpoint, name))
        elif name == "vae":
            expected = theirs.convert_ldm_vae_checkpoint(dict(raw), component_config(checkpoint, name))
        else:
            # As diffusers does it: width 2048 of the released models is what its shortcuts look at, so both encoders
            # are converted by the functions that it would choose.
            if family in ("sd1", "sdxl") and name == "text_encoder":
                expected = theirs.convert_ldm_clip_checkpoint(dict(raw))
            else:
                prefix = {"sd2": "cond_stage_model.model.", "sdxl": "conditioner.embedders.1.model."}.get(
                    family, "conditioner.embedders.0.model."
                )
                module = build(name, component_config(checkpoint, name))[0]
                expected = theirs.convert_open_clip_checkpoint(module, dict(raw), prefix)
            # diffusers keeps what SD2 does not use unless it has the released number of layers.
            expected = {n: t for n, t in expected.items() if n in ours or family != "sd2"}
            expected.pop("text_model.embeddings.position_ids", None)
        assert expected.keys() == ours.keys()
        for key, tensor in expected.items():
            assert torch.equal(ours[key], tensor), key

    # And the whole way: the files that people load, by the function that they call, with configs from a folder.
    for kind, name in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae")):
        module: Any = kind.from_single_file(
            str(files[family]), config=str(folder), subfolder=name, local_files_only=True
        )
        state, own = module.state_dict(), checkpoint.component(name)
        assert set(state) == set(own)
        assert all(torch.equal(state[n], own[n].float()) for n in own)
    for kind, name in ((CLIPTextModel, "text_encoder"), (CLIPTextModelWithProjection, "text_encoder_2")):
        if name in checkpoint.components:
            state = kind.from_pretrained(folder / name).state_dict()
            own = checkpoint.component(name)
            plain = {n.removeprefix("text_model."): n for n in own}
            assert {n.removeprefix("text_model.") for n in state} == set(plain)
            for n, tensor in state.items():
                assert torch.equal(tensor.float(), own[plain[n.removeprefix("text_model.")]].float())


@pytest.mark.parametrize("family", FAMILIES)
def test_to_a_folder_and_back_no_bit_changes(files, family, tmp_path):
    original = open_checkpoint(files[family])
    save_checkpoint(tmp_path / "folder", original)
    folder = open_checkpoint(tmp_path / "folder")
    assert (folder.family, folder.layout, folder.components) == (family, "diffusers", FAMILIES[family])
    saved = save_checkpoint(tmp_path / "back.safetensors", folder, metadata={"author": "me"})
    back = load_safetensors(saved.path)
    extras = {name for names in original.extras.values() for name in names}
    assert set(back) == set(original.raw) - extras
    for name in back:
        assert torch.equal(back[name], original.raw[name]), name
    for name in FAMILIES[family]:
        assert component_config(folder, name) == component_config(original, name)


RELEASED = {
    "sd1": (
        1131,
        {
            "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
            "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
            "model.diffusion_model.output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
            "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
            "model.diffusion_model.middle_block.1.proj_in.weight": (1280, 1280, 1, 1),
            "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
            "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
            "cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77),
        },
    ),
    "sd2": (
        686 + 248 + 24 * 12 + 6,
        {
            "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
            "model.diffusion_model.middle_block.1.proj_in.weight": (1280, 1280),
            "cond_stage_model.model.transformer.resblocks.23.attn.in_proj_weight": (3072, 1024),
            "cond_stage_model.model.text_projection": (1024, 1024),
        },
    ),
    "sdxl": (
        2515,
        {
            "model.diffusion_model.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
            "model.diffusion_model.output_blocks.5.2.conv.weight": (640, 640, 3, 3),
            "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
            "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
            "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (1280,),
            "conditioner.embedders.1.model.positional_embedding": (77, 1280),
            "conditioner.embedders.1.model.logit_scale": (),
        },
    ),
}
"""How many tensors the released files have (without noise schedules), and names and shapes of some of them."""


@pytest.mark.parametrize("family", RELEASED)
def test_full_size_names_are_those_of_the_released_files(family):
    count, known = RELEASED[family]
    state = random_checkpoint(family)
    names = [name for name in state if name not in ("betas", "alphas_cumprod")]
    assert len(names) == count
    for name, shape in known.items():
        assert state.shape_of(name) == shape, name


def test_what_is_put_together_again_keeps_names_order_types_and_extras(files, tmp_path):
    checkpoint = open_checkpoint(files["sd1"])
    unet = {name: tensor.float() + 1 for name, tensor in checkpoint.component("unet").items()}
    whole = checkpoint.restore({"unet": unet})
    assert list(whole) == list(checkpoint.raw)
    path = save_checkpoint(tmp_path / "x.safetensors", checkpoint, whole, checkpoint.metadata).path
    saved = load_safetensors(path)
    assert saved.metadata["author"] == "me"
    assert list(saved) == list(checkpoint.raw)
    changed = 0
    for name in saved:
        assert saved.dtype_of(name) == checkpoint.raw.dtype_of(name)  # type: ignore[attr-defined]
        if name.startswith("model.diffusion_model."):
            expected = (checkpoint.raw[name].float() + 1).half()
            changed += 1
        else:
            expected = checkpoint.raw[name]
        assert torch.equal(saved[name], expected), name
    assert changed == len(unet)
    wide = checkpoint.restore({"unet": unet}, keep_dtype=False)
    assert wide.dtype_of("model.diffusion_model.out.2.bias") == torch.float32


@pytest.mark.parametrize(("variant", "channels"), [("inpainting", 9), ("instruct-pix2pix", 8)])
def test_variants_are_told_by_the_input_channels(files, tmp_path, variant, channels):
    path = save_safetensors(tmp_path / "x.safetensors", make("sd1", variant=variant))
    checkpoint = open_checkpoint(path)
    assert (checkpoint.family, checkpoint.variant) == ("sd1", variant)
    assert component_config(checkpoint, "unet")["in_channels"] == channels
    with pytest.raises(CheckpointError, match=rf"sd1\.safetensors is Stable Diffusion 1 and .*\({variant}\)"):
        require_same_family(open_checkpoint(files["sd1"]), checkpoint)


@pytest.mark.parametrize(
    ("family", "prefix", "strip", "component", "known"),
    [
        ("sd1", "model.diffusion_model.", False, "unet", "sd1"),
        ("sdxl", "model.diffusion_model.", True, "unet", "sdxl"),
        ("sd2", "first_stage_model.", False, "vae", "vae"),
        ("sd1", "first_stage_model.", True, "vae", "vae"),
        ("sd1", "cond_stage_model.transformer.", True, "text_encoder", "clip_l"),
        ("sdxl", "conditioner.embedders.1.model.", True, "text_encoder", "clip_h"),
    ],
)
def test_parts_alone(files, tmp_path, family, prefix, strip, component, known):
    raw = load_safetensors(files[family])
    part = {name.removeprefix(prefix if strip else ""): raw[name] for name in raw if name.startswith(prefix)}
    checkpoint = open_checkpoint(save_safetensors(tmp_path / "part.safetensors", part))
    assert checkpoint.components == (component,)
    assert checkpoint.family == known
    whole = open_checkpoint(files[family])
    like = whole.component("text_encoder_2" if known == "clip_h" else component)
    mine = checkpoint.component(component)
    assert all(torch.equal(mine[name], like[name]) for name in mine)
    module, _, _ = architecture(checkpoint, component)
    assert set(module.state_dict()) <= set(mine)
    with pytest.raises(CheckpointError, match="different architectures|has no unet"):
        require_same_family(checkpoint, open_checkpoint(files["sd2" if known == "sd1" else "sd1"]))


def test_a_part_in_diffusers_names_and_deprecated_ones(files, tmp_path):
    vae = dict(open_checkpoint(files["sd1"]).component("vae"))
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    renamed = {}
    for name, tensor in vae.items():
        for new, deprecated in old.items():
            name = name.replace(f"attentions.0.{new}", f"attentions.0.{deprecated}")
        renamed[name] = tensor
    assert set(renamed) != set(vae)
    checkpoint = open_checkpoint(save_safetensors(tmp_path / "vae.safetensors", renamed))
    assert checkpoint.layout == "diffusers"
    assert set(checkpoint.component("vae")) == set(vae)


def test_folders_with_variants_and_shards(files, tmp_path):
    save_checkpoint(tmp_path / "m", open_checkpoint(files["sd1"]))
    unet = tmp_path / "m" / "unet"
    whole = unet / "diffusion_pytorch_model.safetensors"
    state = dict(load_safetensors(whole))
    names = sorted(state)
    whole.unlink()
    for number, part in enumerate((names[::2], names[1::2]), 1):
        save_safetensors(
            unet / f"diffusion_pytorch_model-0000{number}-of-00002.safetensors", {n: state[n] for n in part}
        )
    # An index that points elsewhere is not followed.
    index = unet / "diffusion_pytorch_model.safetensors.index.json"
    shard = "diffusion_pytorch_model-00001-of-00002.safetensors"
    for told, message in (
        (
            {names[0]: "../../secret.safetensors"},
            r"unet is incomplete: .* names the shard '../../secret.*not there",
        ),
        (
            {"ghost": shard},
            r"unet is incomplete: .* names the tensor 'ghost', which is in none of its shards",
        ),
        ([1], "is no index of shards: its weight_map is damaged"),
    ):
        index.write_text(json.dumps({"weight_map": told}))
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / "m")
    index.write_text(json.dumps({"weight_map": {names[0]: shard}}))
    checkpoint = open_checkpoint(tmp_path / "m")
    assert all(torch.equal(checkpoint.component("unet")[n], state[n]) for n in names)
    (unet / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"unet is incomplete: part 2 of 2 is missing"):
        open_checkpoint(tmp_path / "m")
    for variant in ("fp16", "ema"):
        save_safetensors(unet / f"diffusion_pytorch_model.{variant}.safetensors", state)
    (unet / "diffusion_pytorch_model-00001-of-00002.safetensors").unlink()
    with pytest.raises(
        CheckpointError,
        match="has the variants ema, fp16; choose with --variant, in a run",
    ):
        open_checkpoint(tmp_path / "m")
    with pytest.raises(CheckpointError, match="no variant 'bf16'; it has ema, fp16"):
        open_checkpoint(unet, "bf16")
    assert open_checkpoint(unet, "fp16").family == "sd1"
    with pytest.raises(CheckpointError, match="no diffusers folder"):
        open_checkpoint(tmp_path)


def test_old_pickles_are_checkpoints_too(files, tmp_path):
    path = save_checkpoint(tmp_path / "x.ckpt", open_checkpoint(files["sd2"]), dtype=torch.float32).path
    checkpoint = open_checkpoint(path)
    assert checkpoint.family == "sd2"
    raw = load_safetensors(files["sd2"])
    assert all(torch.equal(checkpoint.raw[n].half(), raw[n].half()) for n in raw)


FOREIGN = {
    "LoRA": ("lora_unet_down_blocks_0_attentions_0.lora_down.weight", "is a LoRA or another adapter"),
    "PEFT": ("unet.down_blocks.0.attn.to_q.lora_A.weight", "is a LoRA or another adapter"),
    "LoKr": ("lycoris_unet_mid.lokr_w1", "is a LoRA or another adapter"),
    "ControlNet": ("control_model.input_blocks.0.0.weight", "is a ControlNet"),
    "SD3": (
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
        "is a part of Stable Diffusion 3",
    ),
    "Flux": ("double_blocks.0.img_attn.proj.weight", "is a part of Flux"),
    "inversion": ("emb_params", "is a textual inversion"),
    "unknown": ("layers.0.weight", "is no model that is known here"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_something_else_is_called_by_its_name(tmp_path, kind):
    name, message = FOREIGN[kind]
    path = save_safetensors(tmp_path / "x.safetensors", {name: torch.ones(2, 2)})
    with pytest.raises(
        CheckpointError,
        match=rf"x\.safetensors {message}.*(, but a model of Stable Diffusion| and no model; )",
    ):
        open_checkpoint(path)


def test_two_families_and_mixtures(files, tmp_path):
    with pytest.raises(CheckpointError, match=r"Stable Diffusion 1 and .* is Stable Diffusion XL; they have"):
        require_same_family(open_checkpoint(files["sd1"]), open_checkpoint(files["sdxl"]))
    sd1, sd2 = load_safetensors(files["sd1"]), load_safetensors(files["sd2"])
    mixed = {n: sd1[n] for n in sd1 if not n.startswith("cond_stage_model.")}
    mixed |= {n: sd2[n] for n in sd2 if n.startswith("cond_stage_model.")}
    path = save_safetensors(tmp_path / "mixed.safetensors", mixed)
    with pytest.raises(CheckpointError, match="mixes two families: its UNet is Stable Diffusion 1"):
        open_checkpoint(path)


def test_missing_blocks_and_wrong_shapes_are_named(files, tmp_path):
    raw = dict(load_safetensors(files["sd1"]))
    lost = {n: t for n, t in raw.items() if not n.startswith("model.diffusion_model.input_blocks.4.")}
    checkpoint = open_checkpoint(save_safetensors(tmp_path / "lost.safetensors", lost))
    with pytest.raises(
        CheckpointError, match=r"incomplete: its unet lacks 'down_blocks\.1\.\w+.* more tensors"
    ):
        architecture(checkpoint, "unet")
    odd = {**raw, "model.diffusion_model.out.2.weight": torch.ones(4, 17, 3, 3)}
    checkpoint = open_checkpoint(save_safetensors(tmp_path / "odd.safetensors", odd))
    with pytest.raises(CheckpointError, match=r"'model\.diffusion_model\.out\.2\.weight' .* \(4, 17, 3, 3\)"):
        architecture(checkpoint, "unet")
    whole = {**raw, "model.diffusion_model.out.2.bias": torch.ones(4, dtype=torch.int64)}
    checkpoint = open_checkpoint(save_safetensors(tmp_path / "whole.safetensors", whole))
    with pytest.raises(CheckpointError, match=r"'model\.diffusion_model\.out\.2\.bias' .* has type int64"):
        architecture(checkpoint, "unet")
    with pytest.raises(CheckpointError, match=r"has no text_encoder_2; it has unet, vae, text_encoder"):
        checkpoint.component("text_encoder_2")


def test_what_a_unet_predicts_is_told_only_where_something_tells(files, tmp_path):
    sd2 = open_checkpoint(files["sd2"])
    assert sd2.prediction.kind is None
    assert open_checkpoint(files["sd1"]).prediction.kind == "epsilon"
    raw = dict(sd2.raw)
    marked = save_safetensors(tmp_path / "marked.safetensors", {**raw, "v_pred": torch.zeros(0)})
    assert open_checkpoint(marked).prediction.kind == "v_prediction"
    told = save_safetensors(tmp_path / "told.safetensors", raw, {"modelspec.prediction_type": "epsilon"})
    assert open_checkpoint(told).prediction.kind == "epsilon"
    beside = save_safetensors(tmp_path / "beside.safetensors", raw)
    (tmp_path / "beside.yaml").write_text('model:\n  params:\n    parameterization: "v"\n')
    assert open_checkpoint(beside).prediction.kind == "v_prediction"


def test_averaged_weights_are_extras(tmp_path):
    state = make("sd1", ema=True)
    checkpoint = open_checkpoint(save_safetensors(tmp_path / "x.safetensors", state))
    assert len(checkpoint.extras["ema"]) == len(checkpoint.component("unet"))
    assert ema_name("model.diffusion_model.out.2.bias") in checkpoint.extras["ema"]


@pytest.mark.parametrize(
    ("family", "component"), [("sd1", "vae"), ("sd1", "text_encoder"), ("sdxl", "text_encoder_2")]
)
def test_a_planted_permutation_is_undone_through_files(files, tmp_path, family, component):
    import rebasin

    a = open_checkpoint(files[family])
    spec = component_spec(a, component)
    planted = spec.random(3)
    moved = a.restore({component: planted.view(a.component(component))})
    b = open_checkpoint(save_checkpoint(tmp_path / "b.safetensors", a, moved, a.metadata).path)
    assert not all(torch.equal(a.raw[n], b.raw[n]) for n in a.raw)
    found = rebasin.weight_matching(spec, a.component(component), b.component(component), init="forward")
    back = b.restore({component: found.permutation.view(b.component(component))})
    path = save_checkpoint(tmp_path / "back.safetensors", b, back, b.metadata).path
    result = load_safetensors(path)
    assert all(torch.equal(result[n], a.raw[n]) for n in a.raw)
    assert (
        path.read_bytes()[8:]
        == save_checkpoint(tmp_path / "a.safetensors", a, None, a.metadata).path.read_bytes()[8:]
    )


def test_latents_stay_in_order(files):
    spec = component_spec(open_checkpoint(files["sd1"]), "vae")
    for name, axis in (
        ("quant_conv.weight", 0),
        ("post_quant_conv.weight", 1),
        ("encoder.conv_out.weight", 0),
    ):
        if name != "encoder.conv_out.weight":
            assert axis not in spec.axes.get(name, {}), name


def test_a_proof_is_demanded_and_kept(files):
    checkpoint = open_checkpoint(files["sd1"])
    spec = component_spec(checkpoint, "text_encoder", prove=False)
    config = component_config(checkpoint, "text_encoder")
    made = proof(spec, config, "sd1", "text_encoder")
    assert made.max_relative_error < 1e-9 and made.moved > 0
    (kept,) = (Path(os.environ["REBASIN_CACHE"]) / "proofs").glob(
        f"{spec.hash}-*.json"
    )  # and the hash of its maps
    assert json.loads(kept.read_text())["twin"] == made.twin and made.maps == len(spec.continuous) > 0
    kept.unlink()
    shorter = {**config, "num_hidden_layers": 1}
    with pytest.raises(VerificationError, match="its narrow twin moves other axes together"):
        proof(spec, shorter, "sd1", "text_encoder")
    assert structure(spec) != structure(component_spec(checkpoint, "vae", prove=False))
    assert narrow(config, "text_encoder", "sd1")["num_hidden_layers"] == config["num_hidden_layers"]


def test_merging_into_a_type_that_is_too_small_and_nan_leave_no_file(files, tmp_path):
    a = open_checkpoint(files["sd1"])
    name = "time_embedding.linear_1.weight"
    large = {name: a.component("unet")[name].float() * 1e7}
    with pytest.raises(
        CheckpointError, match=r"'model\.diffusion_model\.time_embed\.0\.weight' has the value .* float16"
    ):
        save_checkpoint(tmp_path / "x.safetensors", a, a.restore({"unet": large}))
    broken = {name: torch.full_like(a.component("unet")[name], float("nan"))}
    for target in ("x.safetensors", "x.ckpt", "folder"):
        with pytest.raises(CheckpointError, match="time_embed.* infinite or no numbers"):
            save_checkpoint(tmp_path / target, a, a.restore({"unet": broken}))
    with pytest.raises(CheckpointError, match="is an input"):
        save_checkpoint(files["sd1"], a)
    with pytest.raises(CheckpointError, match="can't be written"):
        save_checkpoint(tmp_path / "nowhere" / "x.safetensors", a)
    assert os.listdir(tmp_path) == []


def test_noisy_copies_are_near_and_reproducible(files):
    raw = load_safetensors(files["sd1"])
    name = "model.diffusion_model.out.2.weight"
    once, twice = noisy(raw, 0.1, 5), noisy(raw, 0.1, 5)
    assert torch.equal(once[name], twice[name])
    ratio = float((once[name] - raw[name]).float().std() / raw[name].float().std())
    assert 0.08 < ratio < 0.12
