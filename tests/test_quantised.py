"""Files of codes and scales: read as numbers, written as they were, merged, moved, and refused if damaged."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from cli_files import Files, rebasin
from torch import Tensor

from experiments.quantised_reference import KINDS, as_file, chosen
from rebasin.checkpoints import load_safetensors, open_checkpoint, save_checkpoint, save_safetensors
from rebasin.checkpoints.random_weights import random_checkpoint
from rebasin.errors import CheckpointError
from rebasin.spec import Permutation
from rebasin.tensors.quantised import EncodedState, Quantised, decoded, tiles
from rebasin.tensors.quantised.grids import PAIRS
from rebasin.types import DerivedState, State

torch.set_num_threads(1)

BLOCKS = ("fp8_blocks", "int8_blocks", "mxfp8", "nvfp4")

STEPS = {"int8": 1 / 127, "fp8": 32 / 448, "fp8_e5m2": 8192 / 57344, "mxfp8": 32 / 256, "nvfp4": 2 / 6}
"""The widest step between two codes, as a share of the largest number with the same scale."""


def step(kind: str) -> float:
    return STEPS.get(kind) or STEPS[kind.partition("_")[0]]


@cache
def plain() -> dict[str, Tensor]:
    whole = random_checkpoint("sd1", 16, depth=1, vocabulary=64)
    return {name: whole[name] for name in whole if name.startswith("model.diffusion_model.")}


@cache
def plain_file(kind: str, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors, header, _ = as_file({prefix + name: tensor for name, tensor in plain().items()}, kind)
    return tensors, header


def odd(seed: int = 0) -> dict[str, Tensor]:
    """Matrices whose sizes no block divides, and one that several blocks divide; more than 128 rows."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"a": (140, 200), "b": (24, 40), "c": (32, 64), "d": (1, 3)}
    return {
        f"x.transformer_blocks.0.{name}.weight": torch.randn(size, generator=generator)
        for name, size in sizes.items()
    }


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def opened(
    weights: dict[str, Tensor], kind: str
) -> tuple[State, Quantised, dict[str, Tensor], dict[str, str]]:
    tensors, header, _ = as_file(weights, kind)
    state = decoded(tensors, "file", header)
    quantised: Quantised = state.quantised  # pyright: ignore[reportAttributeAccessIssue]
    return state, quantised, tensors, header


def again(quantised: Quantised, state: dict[str, Tensor], header: dict[str, str]) -> State:
    """What is read of a state that was written in a file's format."""
    return decoded(dict(quantised.encoded(state, "out")), "out", header)


# -------------------------------------------------------------------------------------------- numbers and layouts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_numbers_are_those_of_the_reference_and_new_ones_get_its_codes(kind: str, seed: int) -> None:
    weights = odd(seed)
    tensors, _, numbers = as_file(weights, kind)
    state, quantised, _, _ = opened(weights, kind)
    assert set(state) == set(weights) and all(torch.equal(state[name], numbers[name]) for name in weights)
    others = {name: 3 * weight for name, weight in odd(seed + 2).items()}
    written = quantised.encoded(others, "out")
    wanted, *_ = as_file(others, kind)
    assert list(written) == list(tensors)
    assert [name for name in wanted if not same(written[name], wanted[name])] == []


def test_scales_lie_where_tensor_cores_look_for_them() -> None:
    scales = torch.arange(1, 1 + 200 * 7).reshape(200, 7)
    stored = tiles.swizzled(scales).reshape(-1)
    assert len(stored) == 256 * 8
    for i, j in ((0, 0), (1, 0), (32, 0), (0, 1), (127, 3), (0, 4), (128, 0), (199, 6)):
        place = ((i // 128) * 2 + j // 4) * 512 + (i % 32) * 16 + (i % 128) // 32 * 4 + j % 4
        assert stored[place] == scales[i, j]
    assert torch.equal(tiles.unswizzled(stored, 200, 7), scales)


def test_four_bits_are_rounded_to_the_nearest_and_ties_to_the_even_code() -> None:
    numbers = torch.tensor([[0.25, 0.26, 0.75, -1.25, 1.75, 2.5, 3.5, 5.0, 5.1, -9.0]])
    assert PAIRS.numbers(PAIRS.codes(numbers)).tolist() == [
        [0.0, 0.5, 1.0, -1.0, 2.0, 2.0, 4.0, 4.0, 6.0, -6.0]
    ]


# ------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize(
    ("kind", "ending"), [*((kind, "safetensors") for kind in KINDS), ("fp8_old", "ckpt"), ("mxfp8", "ckpt")]
)
def test_a_file_that_is_written_unchanged_has_every_bit_again(tmp_path: Path, kind: str, ending: str) -> None:
    tensors, header = plain_file(kind)
    path = save_safetensors(tmp_path / "a.safetensors", tensors, header, keep_order=True)
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.raw) == set(plain()) and isinstance(checkpoint.quantised, Quantised)
    asked: list[str] = []

    def progress(event: dict[str, object]) -> None:
        asked.append(str(event["name"]))

    saved = save_checkpoint(tmp_path / f"b.{ending}", checkpoint, progress=progress)
    if ending == "ckpt" and header:  # the marks are in the header, which a pickle has not
        assert any("written as float16" in note for note in saved.notes)
        assert open_checkpoint(saved.path).quantised is None
        return
    assert not saved.notes
    written = open_checkpoint(saved.path).quantised
    assert isinstance(written, Quantised)
    assert list(written.file) == list(tensors), "names and order"
    assert [name for name in tensors if not same(written.file[name], tensors[name])] == []
    if ending == "safetensors":
        assert {k: v for k, v in load_safetensors(saved.path).metadata.items() if k != "format"} == header
    first = next(iter(checkpoint.quantised.layers.values()))
    places = sorted(asked.index(name) for name in first.parts.values())
    assert places[-1] - places[0] == len(places) - 1, "a layer's tensors are made together"


@pytest.mark.parametrize("kind", KINDS)
def test_new_weights_are_within_half_a_step(kind: str) -> None:
    state, quantised, _, header = opened(odd(), kind)
    new = {name: 0.5 * state[name] + 0.5 * odd(1)[name] for name in state}
    read = again(quantised, new, header)
    for name, weight in new.items():
        error, size = (read[name] - weight).abs(), weight.abs().max()
        assert error.max() > 0 or weight.numel() < 4
        assert error.max() <= 0.51 * step(kind) * size, name


@pytest.mark.parametrize("kind", KINDS)
def test_moved_rows_and_columns_keep_their_numbers(kind: str) -> None:
    state, quantised, _, header = opened(odd(), kind)
    generator = torch.Generator().manual_seed(1)
    for axis in (0, 1):
        moved = {}
        for name in state:
            weight = state[name]
            moved[name] = weight.index_select(axis, torch.randperm(weight.shape[axis], generator=generator))
        read = again(quantised, moved, header)
        blocks = kind in BLOCKS if axis == 1 else kind in ("fp8_blocks", "int8_blocks")
        for name, weight in moved.items():
            if not blocks:
                assert torch.equal(read[name], weight), (axis, name)
            assert (read[name] - weight).abs().max() <= 0.51 * step(kind) * weight.abs().max()
        if blocks and kind != "mxfp8":  # whose scales are powers of two; or the test above sees nothing
            assert any(not torch.equal(read[name], moved[name]) for name in moved)


@pytest.mark.parametrize("kind", ["fp8_old", "fp8", "fp8_e5m2", "fp8_rows", "int8", "int8_rows"])
def test_scales_that_are_not_those_of_the_largest_values_stay_when_neurons_move(kind: str) -> None:
    """As converters choose them that look for the scale with the smallest error."""
    tensors, header, _ = as_file(odd(), kind)
    codes = {
        n: (t.float() / 2).round() if t.dtype == torch.int8 else t.float() / 2 for n, t in tensors.items()
    }
    halved = {n: codes[n].to(t.dtype) if n in odd() else t for n, t in tensors.items()}
    state = decoded(halved, "file", header)
    for axis in (0, 1):
        moved = {name: state[name].flip(axis).roll(1, axis) for name in state}
        written = dict(state.quantised.encoded(moved, "out"))  # pyright: ignore[reportAttributeAccessIssue]
        read = decoded(written, "out", header)
        assert all(torch.equal(read[name], moved[name]) for name in moved)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_tiny_numbers_stay(kind: str) -> None:
    state, quantised, _, header = opened(odd(), kind)
    zeros = {name: torch.zeros_like(state[name]) for name in state}
    assert all(not again(quantised, zeros, header)[name].any() for name in zeros)
    if kind not in ("mxfp8", "nvfp4"):  # loaders divide by these
        written = quantised.encoded(zeros, "out")
        assert all(bool((written[layer.parts["scale"]] > 0).all()) for layer in quantised.layers.values())
    small = {name: 1e-20 * state[name] for name in state}
    read = again(quantised, small, header)
    assert all((read[n] - w).abs().max() <= 0.51 * step(kind) * w.abs().max() for n, w in small.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["fp8", "int8_rows"])
def test_scales_keep_their_narrow_type(kind: str, dtype: torch.dtype) -> None:
    tensors, header, _ = as_file(odd(), kind)
    narrow = {n: t.to(dtype) if n.endswith("weight_scale") else t for n, t in tensors.items()}
    state = decoded(narrow, "file", header)
    new = {name: 1.7 * state[name] for name in state}
    written = dict(state.quantised.encoded(new, "out"))  # pyright: ignore[reportAttributeAccessIssue]
    assert all(written[n].dtype == t.dtype for n, t in narrow.items())
    read = decoded(written, "out", header)
    assert all((read[n] - w).abs().max() <= step(kind) * w.abs().max() for n, w in new.items())


@pytest.mark.parametrize("kind", ["mxfp8", "nvfp4"])
def test_marks_in_tensors_and_rows_that_the_bias_tells(kind: str) -> None:
    """As ComfyUI itself saves them: no header, rows filled up, and mxfp8's scales of the type e8m0."""
    weights = {"x.transformer_blocks.0.a.weight": torch.randn(19, 64)}
    tensors, _, numbers = as_file(weights, kind)
    (name,) = weights
    layer = name.removesuffix("weight")
    tensors |= {f"{layer}bias": torch.zeros(19), f"{layer}comfy_quant": mark(json.dumps({"format": kind}))}
    if kind == "mxfp8":
        tensors[f"{name}_scale"] = tensors[f"{name}_scale"].view(torch.float8_e8m0fnu)
    state = decoded(tensors, "file")
    assert torch.equal(state[name], numbers[name])
    written = state.quantised.encoded({**state, name: 2 * numbers[name]}, "out")  # pyright: ignore[reportAttributeAccessIssue]
    assert {n: (t.dtype, t.shape) for n, t in written.items()} == {
        n: (t.dtype, t.shape) for n, t in tensors.items()
    }
    assert torch.equal(decoded(dict(written), "out")[name], 2 * numbers[name])


def test_scales_of_the_type_e8m0_are_read_and_written(tmp_path: Path) -> None:
    scales = torch.tensor([0, 1, 127, 254], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    state = load_safetensors(save_safetensors(tmp_path / "x.safetensors", {"x": scales}))
    assert same(state["x"], scales)


# ----------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("kind", KINDS)
def test_scales_of_another_shape_or_type_are_refused(kind: str) -> None:
    tensors, header, _ = as_file(odd(), kind)
    name = next(name for name in tensors if name.endswith(("weight_scale", "scale_weight")))
    own = tensors[name]
    for wrong in (torch.ones(3, 5), torch.ones(7, dtype=own.dtype), torch.ones(own.shape, dtype=torch.int32)):
        with pytest.raises(CheckpointError, match=rf"scale '{name}' of file .* does not fit its weight's"):
            decoded({**tensors, name: wrong}, "file", header)
    without = {n: t for n, t in tensors.items() if n != name}
    if not kind.startswith("fp8"):  # which are plain numbers then
        with pytest.raises(CheckpointError, match=r"has no scale that is known here|way that is not known"):
            decoded(without, "file", header)


def mark(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ('{"format": "asym_w4a8_int8"}', "marked as 'asym_w4a8_int8'"),
        ('{"format": "int8_tensorwise", "convrot": true}', "marked as 'int8_tensorwise with convrot'"),
        ('{"format": "int8', "is damaged: the mark .* is none"),
        ('{"format": 8}', "is damaged"),
        ('{"format": "mxfp8", "orig_shape": [1, "x"]}', "is damaged"),
        ('{"format": "int8_blockwise", "group_size": -1}', "is damaged"),
    ],
)
def test_marks_that_are_not_known_are_refused(told: str, words: str) -> None:
    tensors, *_ = as_file(odd(), "int8")
    name = next(name for name in tensors if name.endswith("comfy_quant"))
    with pytest.raises(CheckpointError, match=words):
        decoded({**tensors, name: mark(told)}, "file")
    layers = {"layers": {name.removesuffix(".comfy_quant"): json.loads(told)}} if told.endswith("}") else told
    header = {"_quantization_metadata": json.dumps(layers) if isinstance(layers, dict) else layers}
    with pytest.raises(CheckpointError, match=words):
        decoded({n: t for n, t in tensors.items() if n != name}, "file", header)


def test_four_bits_without_a_mark_are_refused_as_their_layout_is_not_told() -> None:
    tensors, *_ = as_file(odd(), "nvfp4")
    with pytest.raises(CheckpointError, match="without a mark"):
        decoded(tensors, "file")


def test_values_that_are_none_are_not_made_codes(tmp_path: Path) -> None:
    tensors, header = plain_file("int8")
    checkpoint = open_checkpoint(save_safetensors(tmp_path / "a.safetensors", tensors, header))
    name = next(name for name in plain() if chosen(name, tuple(plain()[name].shape)))
    bad = {**dict(checkpoint.raw), name: torch.full_like(checkpoint.raw[name], torch.nan)}
    with pytest.raises(CheckpointError, match="infinite or no numbers"):
        save_checkpoint(tmp_path / "b.safetensors", checkpoint, bad)
    assert not (tmp_path / "b.safetensors").exists()


# ------------------------------------------------------------------------------------------------- whole models


def test_names_lose_their_prefix_with_all_that_belongs_to_them(tmp_path: Path) -> None:
    for kind in ("fp8", "mxfp8"):
        tensors, header = plain_file(kind, "net.")
        checkpoint = open_checkpoint(save_safetensors(tmp_path / f"{kind}.safetensors", tensors, header))
        saved = save_checkpoint(tmp_path / f"{kind}-out.safetensors", checkpoint)
        written = load_safetensors(saved.path)
        assert set(written) == {name.removeprefix("net.") for name in tensors}
        assert open_checkpoint(saved.path).quantised is not None
        read = open_checkpoint(saved.path).raw
        assert all(torch.equal(read[name], checkpoint.raw[name]) for name in read)


def test_a_folder_holds_numbers_and_the_user_is_told(tmp_path: Path) -> None:
    tensors, header = plain_file("mxfp8")
    checkpoint = open_checkpoint(save_safetensors(tmp_path / "a.safetensors", tensors, header))
    assert checkpoint.stored_as("unet", "conv_in.weight") == "float16"
    assert "mxfp8" in rebasin("inspect", tmp_path / "a.safetensors")
    saved = save_checkpoint(tmp_path / "folder", checkpoint)
    assert any("written as float16" in note for note in saved.notes)
    written = load_safetensors(tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {written.dtype_of(name) for name in written} == {torch.float16}
    assert "_quantization_metadata" not in written.metadata
    read = open_checkpoint(tmp_path / "folder").component("unet")
    wanted = checkpoint.component("unet")
    assert all(torch.equal(read[n], wanted[n].half()) for n in wanted)


def test_what_a_state_lacks_is_left_out_with_its_scales_and_marks() -> None:
    state, quantised, tensors, _ = opened(odd(), "fp8")
    gone = next(iter(state))
    kept = {name: state[name] for name in state if name != gone} | {"v_pred": torch.zeros(0)}
    written = quantised.encoded(kept, "out")
    assert isinstance(written, EncodedState) and isinstance(written, DerivedState)
    assert set(written) == {n for n in tensors if not n.startswith(gone.removesuffix("weight"))} | {"v_pred"}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("encoders"), ("text_encoder",))


def matrices(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith("weight") and len(shape) == 2 and "embedding" not in name


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_is_written_in_the_format_of_the_first_model(
    encoders: Files, tmp_path: Path, kind: str
) -> None:
    tensors, header, _ = as_file(dict(load_safetensors(encoders.a)), kind, matrices)
    a = save_safetensors(
        tmp_path / "a.safetensors", tensors, {**header, "modelspec.title": "A"}, keep_order=True
    )
    told = rebasin("merge", a, encoders.f, "-o", tmp_path / "ab.safetensors")
    written = load_safetensors(tmp_path / "ab.safetensors")
    assert {n: (written.dtype_of(n), written.shape_of(n)) for n in written} == {
        n: (t.dtype, tuple(t.shape)) for n, t in tensors.items() if not n.startswith("model_ema")
    }, told
    assert written.metadata.get("_quantization_metadata") == header.get("_quantization_metadata")
    assert {"rebasin", "modelspec.title"} <= set(written.metadata)
    raw, f, merged = (open_checkpoint(path).raw for path in (a, encoders.f, tmp_path / "ab.safetensors"))
    permutation = Permutation.load(tmp_path / "ab.permutation.safetensors")
    assert permutation.moved() == 0, "a fine-tune lies where it was"
    for name in f:
        if f[name].is_floating_point():
            mean = (raw[name].float() + f[name].float()) / 2
            assert (merged[name].float() - mean).abs().max() <= 0.51 * step(kind) * mean.abs().max() + 1e-6, (
                name
            )
    rebasin("merge", a, encoders.f, "-o", tmp_path / "plain.safetensors", "--dtype", "fp16", "--no-align")
    numbers = load_safetensors(tmp_path / "plain.safetensors")
    assert set(numbers) == set(merged) and "_quantization_metadata" not in numbers.metadata
    assert {numbers.dtype_of(name) for name in f} == {torch.float16}


@pytest.mark.parametrize("kind", ["fp8_old", "int8_rows", "nvfp4"])
def test_a_permutation_moves_a_file_in_its_format(encoders: Files, tmp_path: Path, kind: str) -> None:
    tensors, header, _ = as_file(dict(load_safetensors(encoders.a)), kind, matrices)
    a = save_safetensors(tmp_path / "a.safetensors", tensors, header, keep_order=True)
    rebasin("align", encoders.b, a, "-o", tmp_path / "aligned.safetensors")
    perm = tmp_path / "aligned.permutation.safetensors"
    rebasin("apply", perm, a, "-o", tmp_path / "applied.safetensors")
    aligned, applied = (open_checkpoint(tmp_path / f"{n}.safetensors") for n in ("aligned", "applied"))
    own = open_checkpoint(a).component("text_encoder")
    from rebasin.adapters import of_component
    from rebasin.cli.inputs import load_member

    member = of_component(load_member(perm), "text_encoder")
    assert member is not None and member.permutation.moved() > 20
    wanted = member.permutation.apply(dict(own))
    for checkpoint in (aligned, applied):
        assert isinstance(checkpoint.quantised, Quantised) and checkpoint.quantised.layers
        found = checkpoint.component("text_encoder")
        for name, weight in wanted.items():
            if kind != "nvfp4":
                assert torch.equal(found[name], weight), name
            assert (found[name] - weight).abs().max() <= 0.51 * step(kind) * weight.abs().max()


@pytest.mark.parametrize("kind", ["fp8_old", "int8_rows"])
def test_what_codes_cost_where_maps_move_weights_is_told(encoders: Files, tmp_path: Path, kind: str) -> None:
    tensors, header, _ = as_file(dict(load_safetensors(encoders.a)), kind, matrices)
    a = save_safetensors(tmp_path / "a.safetensors", tensors, header, keep_order=True)
    told = rebasin("align", encoders.b, a, "-o", tmp_path / "aligned.safetensors", "--maps")
    cost = re.search(r"What did rounding cost\? (\d\.\de-\d+)\. relative", told)
    assert cost and 1e-4 < float(cost[1]) < 0.1, told
    rebasin("verify", a, tmp_path / "aligned.safetensors")  # it says yes, or ends with 1
    again = rebasin("apply", tmp_path / "aligned.alignment.safetensors", a, "-o", tmp_path / "b.safetensors")
    assert f"What did rounding cost? {cost[1]}." in again


@pytest.mark.parametrize("kind", ["fp8_old", "fp8", "int8_rows"])
def test_a_scale_that_was_lost_is_told(kind: str) -> None:
    tensors, header, _ = as_file({f"{k}.weight": torch.randn(8, 8) for k in "ab"}, kind, matrices)
    lost = next(name for name in tensors if "scale" in name and name.startswith("a."))
    left = {name: tensor for name, tensor in tensors.items() if name != lost}
    with pytest.raises(CheckpointError, match=r"Tensor 'a.weight' of x has no scale"):
        decoded(left, "x", header)
