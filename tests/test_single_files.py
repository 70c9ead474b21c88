"""Single files of today's image and video models: families and properties, on narrow twins in their own code's names.

What the converters of diffusers do is taken from them, so their own outputs on random weights are compared as well.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_files import read, rebasin
from torch import Tensor

from experiments.original_names import (
    ORIGINAL,
    RELEASED,
    Shapes,
    flux1,
    joined,
    lumina2,
    sd3,
    tensors,
    under,
    wan,
    z_image,
)
from rebasin.checkpoints import Checkpoint, component_spec, open_checkpoint, save_checkpoint, save_safetensors
from rebasin.checkpoints.architectures import architecture
from rebasin.checkpoints.classes.known import built
from rebasin.checkpoints.classes.single_file import FAMILIES, single
from rebasin.errors import CheckpointError
from rebasin.integrations.huggingface import quiet
from rebasin.types import DerivedState, LazyTensor

PREFIX = "model.diffusion_model."

BESIDE: Shapes = {
    "text_encoders.t5xxl.transformer.shared.weight": (6, 4),
    "text_encoders.clip_l.logit_scale": (),
    "vae.decoder.conv_in.weight": (4, 2, 3, 3),
}
"""What all-in-one files have, too."""

KINDS = list(ORIGINAL)


@dataclass(frozen=True)
class Pair:
    """A whole file A of a family, and B: the same network, its neurons moved, after and before other tensors."""

    kind: str
    a: Path
    b: Path
    checkpoint: Checkpoint


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def pair(kind: str) -> Pair:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            own = {PREFIX + name: tensor for name, tensor in tensors(ORIGINAL[kind]()).items()}
            a = save_safetensors(folder / "a.safetensors", tensors(BESIDE, 1) | own, keep_order=True)
            checkpoint = open_checkpoint(a)
            moved = (
                component_spec(checkpoint, "transformer").random(3).apply(checkpoint.component("transformer"))
            )
            b = save_safetensors(
                folder / "b.safetensors", checkpoint.restore({"transformer": moved}), keep_order=True
            )
            made[kind] = Pair(kind, a, b, checkpoint)
        return made[kind]

    return pair


def written(folder: Path, shapes: Shapes, prefix: str = "", **more: Any) -> Path:
    own = {prefix + name: tensor for name, tensor in tensors(shapes, **more).items()}
    return save_safetensors(folder / "x.safetensors", own, keep_order=True)


def equal(one: Any, other: Any) -> bool:
    """The same names in the same order, types and bits."""
    return list(one) == list(other) and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


# --------------------------------------------------------------------------------------------- name maps


@pytest.mark.parametrize("prefix", ["", PREFIX, "diffusion_model."])
@pytest.mark.parametrize("kind", KINDS)
def test_family_is_told_by_tensors_and_the_way_back_is_exact(kind: str, prefix: str, tmp_path: Path) -> None:
    whole = joined(BESIDE, under(prefix[:-1], ORIGINAL[kind]()) if prefix else ORIGINAL[kind]())
    values = tensors(whole)
    values |= {name: values[name].bfloat16() for name in list(values)[::3]}
    checkpoint = open_checkpoint(save_safetensors(tmp_path / "x.safetensors", values, keep_order=True))
    assert (checkpoint.family, checkpoint.components) == (kind, ("transformer",))
    state = checkpoint.component("transformer")
    model = built(checkpoint.classes["transformer"], "here")
    model.load_state_dict(dict(state), strict=True)
    assert equal(checkpoint.restore({"transformer": state}), values)
    assert equal(checkpoint.restore({"transformer": {n: t.clone() for n, t in state.items()}}), values)
    left = {name for names in checkpoint.extras.values() for name in names}
    assert left - {prefix + "norm_final.weight"} == set(BESIDE)


NUMBERS: dict[str, Callable[[str], str]] = {
    "FluxTransformer2DModel": lambda code: code.replace("3072", "16"),
    "ChromaTransformer2DModel": lambda code: code.replace("3072", "16"),
    "Lumina2Transformer2DModel": lambda code: code.replace("2304", "144").replace("768", "48"),
}
"""Converters that count on the released width, as they would be for the narrow ones."""


def converted(kind: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What diffusers makes of a file's tensors."""
    with quiet():
        from diffusers.loaders import single_file_model, single_file_utils

    convert = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[kind]["checkpoint_mapping_fn"]
    if kind in NUMBERS:
        names = dict(vars(single_file_utils))
        exec(NUMBERS[kind](inspect.getsource(convert)), names)
        convert = names[convert.__name__]
    return convert(checkpoint=dict(state))


@pytest.mark.parametrize("kind", KINDS)
def test_components_are_what_diffusers_converter_makes(kind: str, tmp_path: Path) -> None:
    shapes = ORIGINAL[kind]()
    found = open_checkpoint(written(tmp_path, shapes)).component("transformer")
    expected = converted(kind, tensors(shapes))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_files_in_diffusers_own_names_are_known(kind: str, tmp_path: Path) -> None:
    original = open_checkpoint(written(tmp_path, ORIGINAL[kind](), PREFIX))
    state = original.component("transformer")
    path = save_safetensors(tmp_path / "own.safetensors", {f"transformer.{n}": state[n] for n in state})
    own = open_checkpoint(path)
    assert own.classes == original.classes and own.layout == "diffusers"
    assert equal(dict(sorted(own.component("transformer").items())), dict(sorted(state.items())))
    architecture(own, "transformer")


def test_inspect_tells_the_layout(tmp_path: Path) -> None:
    original, own = written(tmp_path, flux1()), tmp_path / "own.safetensors"
    save_safetensors(own, open_checkpoint(original).component("transformer"))
    saved = save_checkpoint(tmp_path / "folder", open_checkpoint(own)).path
    layouts = "single file, in the names of its own code", "single file, in diffusers' names", "a folder"
    for path, layout in zip((original, own, saved), layouts, strict=True):
        told = rebasin("inspect", path)
        assert "Flux.1" in told or "FluxTransformer2DModel" in told
        assert layout in told


def test_the_last_frame_of_wan_is_known_where_the_converter_forgets_it(tmp_path: Path) -> None:
    values = tensors(wan(image=20))
    checkpoint = open_checkpoint(save_safetensors(tmp_path / "x.safetensors", values, keep_order=True))
    state = checkpoint.component("transformer")
    assert torch.equal(state["condition_embedder.image_embedder.pos_embed"], values["img_emb.emb_pos"])
    built(checkpoint.classes["transformer"], "here").load_state_dict(dict(state), strict=True)
    assert equal(checkpoint.restore({"transformer": state}), values)


DIFFERENT: dict[str, dict[str, Any]] = {
    "SD3Transformer2DModel": dict(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
        dual_attention_layers=list(range(13)), qk_norm="rms_norm",
    ),
    "FluxTransformer2DModel": dict(guidance_embeds=True),
}  # fmt: skip
"""Where a release has other entries than diffusers' defaults: 3.5 medium, and Flux.1-dev."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_released_file_has_the_configuration_of_its_release(kind: str) -> None:
    shapes = ORIGINAL[kind](**RELEASED[kind])

    def never() -> Tensor:
        raise AssertionError("a tensor was read")

    raw = DerivedState({name: LazyTensor(shape, torch.bfloat16, never) for name, shape in shapes.items()})
    found = single(raw, "here")
    assert found is not None
    with quiet():
        import diffusers

    known = inspect.signature(getattr(diffusers, kind).__init__).parameters
    released = {name: one.default for name, one in known.items() if name != "self"} | DIFFERENT.get(kind, {})
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in released.items()}
    assert found.known.config == {"_class_name": kind, **plain}
    with torch.device("meta"):
        state = built(found.known, "here").state_dict()
    assert {key.name: key.shape for key in found.keys} == {name: tuple(t.shape) for name, t in state.items()}


def test_codes_with_scales_are_the_numbers_that_they_stand_for(tmp_path: Path) -> None:
    values, name = tensors(flux1()), "single_blocks.0.linear1.weight"
    codes = values[name].to(torch.float8_e4m3fn)
    marks = {"single_blocks.0.linear1.scale_weight": torch.tensor(2.0), "scaled_fp8": torch.empty(0)}
    path = save_safetensors(tmp_path / "x.safetensors", values | {name: codes} | marks, keep_order=True)
    found = open_checkpoint(path).component("transformer")["single_transformer_blocks.0.proj_mlp.weight"]
    assert torch.equal(found, 2 * codes.float()[48:])


def test_every_family_is_tested() -> None:
    assert {family.kind for family in FAMILIES} == set(ORIGINAL)


# ------------------------------------------------------------------------------------------ aligning, merging


@pytest.mark.parametrize("kind", KINDS)
def test_align_finds_the_planted_permutation(kind: str, pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    pair = pairs(kind)
    a, b = read(pair.a), read(pair.b)
    moved = [name for name in a if not torch.equal(a[name], b[name])]
    assert len(moved) > len(a) / 2 and all(name.startswith(PREFIX) for name in moved)
    out = rebasin("align", pair.a, pair.b, "-o", tmp_path / "c.safetensors")
    assert equal(read(tmp_path / "c.safetensors"), a), out
    assert "Do they compute the same? Yes." in rebasin("verify", pair.b, tmp_path / "c.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_merge_with_itself_is_the_file_itself(
    kind: str, pairs: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair = pairs(kind)
    out = rebasin("merge", pair.a, pair.a, "-o", tmp_path / "c.safetensors")
    assert equal(read(tmp_path / "c.safetensors"), read(pair.a))
    told = "as in a.safetensors, are other tensors: 2 of text encoders (text_encoders) and 1 of a VAE (vae)."
    assert told in " ".join(out.split())


@pytest.mark.parametrize("kind", KINDS)
def test_written_as_a_folder_diffusers_loads_it(kind: str, tmp_path: Path) -> None:
    with quiet():
        import diffusers

    checkpoint = open_checkpoint(written(tmp_path, ORIGINAL[kind](), PREFIX))
    saved = save_checkpoint(tmp_path / "folder", checkpoint)
    with quiet():
        model = getattr(diffusers, kind).from_pretrained(saved.path)
    state = checkpoint.component("transformer")
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    again = open_checkpoint(saved.path)
    assert again.family == kind and equal(
        dict(sorted(again.component("transformer").items())), dict(sorted(state.items()))
    )


# ------------------------------------------------------------------------------------------------- refusals


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path)
    told = str(error.value)
    assert path.name in told  # a long folder is cut
    assert "\n" not in told and told.endswith(".") and len(told) < 400
    return told


@pytest.mark.parametrize("kind", KINDS)
def test_an_incomplete_file_is_told(kind: str, tmp_path: Path) -> None:
    shapes = ORIGINAL[kind]()
    probes = {probe for family in FAMILIES for probe in (*family.probes, *family.own)}
    needed = [name for name in shapes if name not in probes and name != "norm_final.weight"]
    for name in needed[:: len(shapes) // 3]:
        told = refused(written(tmp_path, {n: s for n, s in shapes.items() if n != name}))
        assert "incomplete" in told and FAMILY[kind] in told, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_too_few_is_told(kind: str, tmp_path: Path) -> None:
    """Of the tallest tensors of a block, and of those that are several of the class's in one."""
    shapes = ORIGINAL[kind]()
    tall = sorted((name for name in shapes if ".1." in name), key=lambda name: -shapes[name][0])
    assert tall
    for name in dict.fromkeys([*tall[:2], *(name for name in tall if "qkv" in name)]):
        rows, *rest = shapes[name]
        told = refused(written(tmp_path, {**shapes, name: (rows - 1, *rest)}))
        assert FAMILY[kind] in told or name in told, name


def test_what_is_missing_or_of_another_size_is_named(tmp_path: Path) -> None:
    """Where diffusers' converter itself fails."""
    shapes = ORIGINAL["FluxTransformer2DModel"]()
    missing, split = "double_blocks.1.img_attn.proj.bias", "single_blocks.0.linear1.weight"
    told = refused(written(tmp_path, {name: shape for name, shape in shapes.items() if name != missing}))
    assert f"({missing!r} is missing)" in told
    rows, columns = shapes[split]
    told = refused(written(tmp_path, {**shapes, split: (rows - 1, columns)}))
    assert f"(its {split!r} has the shape ({rows - 1}, {columns}))" in told


FAMILY = {family.kind: family.title for family in FAMILIES}


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_that_nobody_knows_is_told(kind: str, tmp_path: Path) -> None:
    more: Shapes = {"ref_conv.weight": (8, 4)}
    assert "ref_conv.weight" in refused(written(tmp_path, joined(ORIGINAL[kind](), more), PREFIX))


MIXED: dict[str, tuple[Shapes, str]] = {
    "two models": (joined(under(PREFIX[:-1], flux1()), wan()), "mixes two models, Flux.1 and Wan"),
    "two in one": (joined(z_image(), wan()), "mixes two models"),
    "two alike": (joined(lumina2(), z_image()), "incomplete, or of a variant"),
    "a width between": (flux1(80, 16), "img_in.weight has 80 rows and not 3072"),
    "wan with other heads": (wan(192), "its width is 192, and no multiple of 128"),
    "keys of another number of heads": (lumina2(144, 36), "incomplete, or of a variant"),
}


@pytest.mark.parametrize("case", MIXED)
def test_what_is_no_model_of_a_family_is_told(case: str, tmp_path: Path) -> None:
    shapes, told = MIXED[case]
    assert told in refused(written(tmp_path, shapes))


OTHERS: dict[str, tuple[tuple[str, ...], str]] = {
    "kohya": (("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight",), "a LoRA"),
    "peft": (("transformer.transformer_blocks.0.attn.to_q.lora_A.weight",), "a LoRA"),
    "comfy": (("diffusion_model.blocks.0.self_attn.q.lora_down.weight",), "a LoRA"),
    "krea": (("diffusion_model.blocks.0.attn.wq.lora_A.weight",), "a LoRA"),
    "difference": (("diffusion_model.blocks.0.self_attn.q.diff",), "a LoRA"),
    "controlnet of diffusers": (
        ("controlnet_x_embedder.weight", "controlnet_blocks.0.weight"),
        "a ControlNet",
    ),
    "controlnet of X-Labs": (
        ("input_hint_block.0.weight", "double_blocks.0.img_attn.qkv.weight"),
        "a ControlNet",
    ),
    "controlnet of Z-Image": (("control_layers.0.attention.out.weight",), "a ControlNet"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_adapters_of_these_families_are_named(case: str, tmp_path: Path) -> None:
    names, told = OTHERS[case]
    assert re.search(rf" is {told}\b", refused(written(tmp_path, dict.fromkeys(names, (4, 4)))))


def test_a_lora_beside_a_whole_model_is_still_a_lora(tmp_path: Path) -> None:
    more: Shapes = {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": (2, 48)}
    assert " is a LoRA" in refused(written(tmp_path, joined(flux1(), more)))


def test_layouts_meet(tmp_path: Path) -> None:
    """A's layout is that of the result, whatever the others' are."""
    a, own, folder, out = (
        tmp_path / name for name in ("a.safetensors", "b.safetensors", "c", "out.safetensors")
    )
    save_safetensors(a, {PREFIX + name: tensor for name, tensor in tensors(wan()).items()}, keep_order=True)
    save_safetensors(own, open_checkpoint(a).component("transformer"))
    with quiet():
        import diffusers

        save_checkpoint(folder, open_checkpoint(own))
        model = diffusers.WanTransformer3DModel.from_pretrained(folder)
        model.save_pretrained(folder)  # with all that diffusers writes into a configuration
    for other in (own, folder):
        told = rebasin("merge", a, other, "-o", out, "--no-align", "--overwrite")
        assert equal(read(out), read(a)) and "differ" not in told, told


def test_two_of_one_family_that_differ_are_told_by_a_tensor(tmp_path: Path) -> None:
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_safetensors(a, tensors(sd3(text=12)))
    save_safetensors(b, tensors(sd3(text=16)))
    out = rebasin("merge", a, b, "-o", tmp_path / "c.safetensors", "--no-align", expect=2)
    assert "'context_embedder.weight'" in out and "(16, 16)" in " ".join(out.split())
