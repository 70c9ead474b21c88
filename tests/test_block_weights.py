"""Block weights: which tensor is in which block, and what every form of a setting gives it."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from rebasin.errors import ConfigError
from rebasin.merging import merge
from rebasin.merging.block_figure import block_figure
from rebasin.merging.block_names import SD1, SDXL, find_blocks
from rebasin.merging.block_settings import preset, preset_names
from rebasin.merging.blocks import block_weights

SDXL_ATTENTION = {"IN": {4, 5, 7, 8}, "OUT": {0, 1, 2, 3, 4, 5}}


def ldm(levels: int, layers: int) -> Iterator[str]:
    """Names as in a checkpoint file: a UNet with `layers` resnets on each level going down, one more going up."""
    unet = "model.diffusion_model."
    yield from (f"{unet}time_embed.0.weight", f"{unet}input_blocks.0.0.weight")
    for i in range(1, levels * (layers + 1)):
        kind = "0.op.weight" if i % (layers + 1) == 0 else "0.in_layers.2.weight"
        yield f"{unet}input_blocks.{i}.{kind}"
        if kind.startswith("0.in"):
            yield f"{unet}input_blocks.{i}.1.transformer_blocks.0.attn2.to_k.weight"
    yield from (
        f"{unet}middle_block.0.in_layers.2.weight",
        f"{unet}middle_block.1.transformer_blocks.0.attn1.to_q.weight",
    )
    for i in range(levels * (layers + 1)):
        yield f"{unet}output_blocks.{i}.0.in_layers.2.weight"
        yield f"{unet}output_blocks.{i}.1.transformer_blocks.0.attn1.to_q.weight"
    yield from (f"{unet}out.0.weight", f"{unet}out.2.bias")
    yield from (
        "first_stage_model.decoder.conv_in.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
    )


def diffusers(levels: int, layers: int, prefix: str = "") -> Iterator[str]:
    """The same UNet in diffusers' names, in the same order."""
    yield from (f"{prefix}time_embedding.linear_1.weight", f"{prefix}conv_in.weight")
    for i in range(1, levels * (layers + 1)):
        block, layer = divmod(i - 1, layers + 1)
        if layer == layers:
            yield f"{prefix}down_blocks.{block}.downsamplers.0.conv.weight"
        else:
            yield f"{prefix}down_blocks.{block}.resnets.{layer}.conv1.weight"
            yield f"{prefix}down_blocks.{block}.attentions.{layer}.transformer_blocks.0.attn2.to_k.weight"
    yield f"{prefix}mid_block.resnets.0.conv1.weight"
    yield f"{prefix}mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    for i in range(levels * (layers + 1)):
        block, layer = divmod(i, layers + 1)
        yield f"{prefix}up_blocks.{block}.resnets.{layer}.conv1.weight"
        yield f"{prefix}up_blocks.{block}.attentions.{layer}.transformer_blocks.0.attn1.to_q.weight"
    yield from (f"{prefix}conv_norm_out.weight", f"{prefix}conv_out.bias")
    if prefix:
        yield from ("vae.decoder.conv_in.weight", "text_encoder.text_model.final_layer_norm.bias")


SD1_NAMES, SDXL_NAMES = list(ldm(4, 2)), list(ldm(3, 2))


def states(names: list[str]) -> list[dict[str, Tensor]]:
    generators = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    return [{name: torch.randn(2, 2, generator=g) for name in names} for g in generators]


@pytest.mark.parametrize(("levels", "order", "kind"), [(4, SD1, "sd1"), (3, SDXL, "sdxl")])
def test_the_communitys_names_in_both_layouts(levels: int, order: tuple[str, ...], kind: str) -> None:
    theirs = find_blocks(ldm(levels, 2))
    assert theirs.order == order and theirs.kind == kind
    pipeline = find_blocks(diffusers(levels, 2, "unet."))
    assert pipeline.order == order and pipeline.kind == kind
    assert list(pipeline.of.values()) == list(theirs.of.values())
    alone = find_blocks(diffusers(levels, 2))
    assert list(alone.of.values()) == list(theirs.of.values())[:-2]


def test_names_that_differ_from_the_rule() -> None:
    of = find_blocks(
        [*diffusers(4, 2), "up_blocks.0.upsamplers.0.conv.weight", "add_embedding.linear_1.bias"]
    ).of
    assert of["up_blocks.0.upsamplers.0.conv.weight"] == "OUT02"  # as output_blocks.2.1.conv is
    assert of["conv_norm_out.weight"] == of["conv_out.bias"] == "OUT11"
    assert of["add_embedding.linear_1.bias"] == of["time_embedding.linear_1.weight"] == "BASE"
    sdxl = find_blocks(
        [*ldm(3, 2), "model.diffusion_model.label_emb.0.0.weight", "conditioner.embedders.1.model.ln.bias"]
    )
    assert sdxl.of["model.diffusion_model.label_emb.0.0.weight"] == "BASE"
    assert sdxl.of["conditioner.embedders.1.model.ln.bias"] == "BASE"


def test_other_models_have_layers_for_blocks() -> None:
    blocks = find_blocks(["stem.weight", "stem.bias", "layer1.0.conv.weight", "head.weight", "scale"])
    assert (
        blocks.kind == "layers" and blocks.order == ("stem", "layer1.0.conv", "head", "scale") == blocks.depth
    )
    weights = block_weights([0, 1], blocks.of)
    assert [weights(n) for n in blocks.of] == pytest.approx([0, 0, 1 / 3, 2 / 3, 1])


@pytest.mark.parametrize("names", [SD1_NAMES, SDXL_NAMES, list(diffusers(4, 2)), ["a.weight", "b.weight"]])
def test_weights_0_and_1_reproduce_the_inputs_to_the_bit(names: list[str]) -> None:
    a, b = states(names)
    for setting, end in ((0, a), ("ALL_A", a), (1, b), ("ALL_B", b)):
        for method in ("weighted_sum", "slerp", "geometric_sum"):
            merged = merge(method, [a, b], weights=block_weights(setting, names, default=float(end is b)))
            assert all(torch.equal(merged[n], end[n]) for n in names)
    half = block_weights({"default": 0} if "a.weight" in names else {"IN": 1, "default": 0}, names)
    merged = merge("slerp", [a, b], weights=half)
    assert all(torch.equal(merged[n], (b if half(n) else a)[n]) for n in names)


def weights(setting: Any, names: list[str] = SD1_NAMES, default: float | None = None) -> dict[str, float]:
    """One weight for each block; None stands for several."""
    found = block_weights(setting, names, default)
    return {row.block: row.low if row.low == row.high else float("nan") for row in found.rows()}


def test_blocks_ranges_and_sides() -> None:
    got = weights("IN04=0.2, IN06-IN08=0.3, M00=1, OUT=0.7, BASE=0.1, default=0.5")
    expected = dict.fromkeys(SD1, 0.5) | {
        "IN04": 0.2,
        "IN06": 0.3,
        "IN07": 0.3,
        "IN08": 0.3,
        "M00": 1.0,
        "BASE": 0.1,
    }
    assert got == expected | {b: 0.7 for b in SD1 if b.startswith("OUT")}
    assert weights("IN10-OUT01=1,default=0")["M00"] == 1
    assert weights({"in4": 0.2, "default": 0})["IN04"] == 0.2
    assert weights("IN=0.1,IN00=0.9,default=0")["IN00"] == 0.9, "the last entry counts"
    assert weights("IN00=0.9,IN=0.1,default=0")["IN00"] == 0.1
    assert weights("MID=1,default=0")["M00"] == 1 == weights("M=1,default=0")["M00"]


@pytest.mark.parametrize("names", [SD1_NAMES, list(diffusers(4, 2))])
def test_modules_kinds_and_patterns(names: list[str]) -> None:
    def chosen(selector: str) -> set[str]:
        found = block_weights({selector: 1, "default": 0}, names)
        return {n for n in names if found(n) == 1}

    assert (
        chosen("attn2")
        == {n for n in names if ".attn2." in n}
        == chosen("attn2.to_k")
        == chosen("re:attn2\\.")
    )
    assert chosen("attn1") == chosen("*.to_q.weight") == {n for n in names if "attn1" in n}
    assert chosen("attention") == {n for n in names if "attn" in n}
    assert chosen("resnet") == {n for n in names if "resnets" in n or "in_layers" in n}
    assert len(chosen("OUT:attn1")) == 12 == len(chosen("OUT")) // 2 - 1
    assert chosen("bias") == {n for n in names if n.endswith("bias")}
    prefix = "up_blocks.1" if "conv_in.weight" in names else "model.diffusion_model.output_blocks"
    assert chosen(prefix) == {n for n in names if n.startswith(prefix)}


def test_lists() -> None:
    assert weights(list(range(26))) == dict(zip(SD1, range(26), strict=True))
    assert weights(list(range(25)), default=9) == {"BASE": 9} | dict(zip(SD1[1:], range(25), strict=True))
    assert weights("0, 1, 0", default=0.5)["M00"] == 1 and weights("[0,1,0]", default=0.5)["IN06"] == 0.5
    ramp = weights("OUT=[0,1],default=0.5")
    assert [ramp[f"OUT{i:02}"] for i in range(12)] == pytest.approx([i / 11 for i in range(12)])
    assert ramp["IN03"] == 0.5
    assert weights("0.3") == dict.fromkeys(SD1, 0.3) == weights(0.3)
    assert weights("0.3, IN05=1")["IN05"] == 1


def test_presets() -> None:
    assert len(preset_names()) == 38 and all(len(preset(n)) == 26 for n in preset_names())
    assert weights("GRAD_V")["M00"] == 0 and weights("grad_v")["IN00"] == 1 == weights("GRAD_V")["OUT11"]
    assert (
        weights("GRAD_A")["IN06"] == 0.5
        and weights("FLAT_25")["OUT03"] == 0.25
        and weights("FLAT_25")["BASE"] == 0
    )
    assert (
        preset("HALF_SMOOTHSTEP") == preset("SMOOTHSTEP/2") != preset("SMOOTHSTEP*2") == preset("2SMOOTHSTEP")
    )
    for name, opposite in (
        ("GRAD_V", "GRAD_A"),
        ("COSINE", "REVERSE_COSINE"),
        ("SMOOTHSTEP", "REVERSE-SMOOTHSTEP"),
    ):
        assert [a + b for a, b in zip(preset(name)[1:], preset(opposite)[1:], strict=True)] == pytest.approx(
            [1] * 25
        )
    mixed = weights("GRAD_V, BASE=0.5, OUT11=0")
    assert mixed["BASE"] == 0.5 and mixed["OUT11"] == 0 and mixed["OUT10"] == pytest.approx(0.916667)
    assert weights({"preset": "WRAP12", "M00": 0.5})["M00"] == 0.5


def test_presets_on_other_architectures() -> None:
    sdxl = block_weights("GRAD_V", SDXL_NAMES, 0.5)
    by_block = {row.block: row.low for row in sdxl.rows()}
    assert by_block["IN08"] == pytest.approx(0.333333) and by_block["M00"] == 0 and by_block["VAE"] == 0.5
    assert any("IN09" in note for note in sdxl.notes) and any(
        "VAE" in note and "0.5" in note for note in sdxl.notes
    )
    spread = {row.block: row.low for row in block_weights("GRAD_V@depth", SDXL_NAMES, 0.5).rows()}
    assert (
        spread["IN00"] == 1 == spread["OUT08"]
        and spread["M00"] == 0
        and spread["OUT00"] == pytest.approx(1 / 9, abs=1e-3)
    )
    tiny = block_weights("GRAD_V", list(diffusers(2, 1)))
    assert [row.low for row in tiny.rows()][1] == 1 and any("spread over" in note for note in tiny.notes)


def test_nothing_is_dropped() -> None:
    partial = block_weights("IN00=1", SD1_NAMES, default=0.5)
    assert partial.notes and "default 0.5" in partial.notes[0] and "OUT00 to OUT11" in partial.notes[0]
    assert sum(row.tensors for row in partial.rows()) == len(SD1_NAMES)
    with pytest.raises(ConfigError, match=r"set 1 of 51 tensors.*in BASE: add default="):
        block_weights("IN00=1", SD1_NAMES)
    with pytest.raises(ConfigError, match="another model"):
        partial("somewhere.else")


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("IN12=1", "'IN12' is not in this model; it has BASE, IN00 to IN11"),
        ("VAE=1", "'VAE' is not in this model .*another architecture"),
        ("atn2=1", "did you mean attn2"),
        ("GRAD_W", "no preset .* 'GRAD_W'; there are GRAD_"),
        ("re:nothing=1", "'re:nothing' selects no tensor"),
        ("re:(=1", "no regular expression"),
        ("*.zzz=1", "selects no tensor"),
        ("M00:attn2=1", "'M00:attn2' selects no tensor"),
        ("IN05-IN01=1", "backwards: write IN01-IN05"),
        ("IN00=much", "of 'IN00' is 'much'"),
        ("IN00=nan", "of 'IN00' is 'nan'"),
        ("IN00=1, M00", "'M00' is no entry"),
        ("default=[0,1]", "is one number"),
        ("", "are empty"),
        (None, "None"),
        ({"IN00": None}, "of 'IN00' is None"),
        ([], r"\[\]"),
        ("missing.yaml", "missing.yaml can't be read"),
    ],
)
def test_what_is_not_understood_is_told(setting: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        block_weights(setting, SD1_NAMES, default=0.5)


def test_a_yaml_file_says_the_same_as_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        yaml.safe_dump({"attn2": 0.3, "OUT": [0, 1], "preset": "GRAD_V"}, sort_keys=False), encoding="utf-8"
    )
    expected = block_weights("GRAD_V,attn2=0.3,OUT=[0,1]", SD1_NAMES)
    assert block_weights(str(path), SD1_NAMES).weights == expected.weights


def test_the_table_and_the_picture_show_every_block() -> None:
    found = block_weights("GRAD_V, OUT:attn1=0.3", SD1_NAMES)
    lines = found.table().splitlines()
    assert len(lines) == 27 and lines[0].split()[:2] == ["block", "weight"]
    assert lines[26].startswith("OUT11") and "0.3 to 1" in lines[26] and "OUT:attn1" in lines[26]
    axes = block_figure(found).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == list(SD1)
    heights = [patch.get_height() for patch in axes.patches]  # pyright: ignore[reportAttributeAccessIssue]
    assert heights == pytest.approx([row.mean for row in found.rows()])
    many = block_weights([0, 1], [f"layer{i}.weight" for i in range(100)])
    assert block_figure(many).axes[0].lines


@pytest.mark.skipif(importlib.util.find_spec("sd_mecha") is None, reason="needs the extra mecha")
@pytest.mark.parametrize(("config", "blocks"), [("sd1-ldm", "sd1"), ("sdxl-sgm", "sdxl")])
def test_sd_mecha_puts_every_tensor_into_the_same_block(config: str, blocks: str) -> None:
    from sd_mecha.extensions import merge_methods, model_configs

    names = list(model_configs.resolve(config).keys())
    method = merge_methods.resolve(f"convert_{blocks}_blocks_to_{config.split('-')[1]}")
    kept: dict[str, str] = {}

    class Keys:
        keys = type("Same", (), {"__getitem__": lambda self, key: key})()

        def __setitem__(self, name: str, block: str) -> None:
            kept[name] = block

    method.__wrapped__.map_keys(Keys())
    assert kept == dict(find_blocks(names).of)
