"""Files that are damaged, hostile, or of a kind that people mistake for a model: read, or refused in a sentence."""

from __future__ import annotations

import io
import json
import os
import stat
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rebasin
from experiments import mutate_readers
from rebasin.adapters import is_adapter, move_adapter
from rebasin.checkpoints import (
    load_pickled,
    load_safetensors,
    open_checkpoint,
    save_checkpoint,
    save_safetensors,
)
from rebasin.checkpoints.architectures import architecture
from rebasin.checkpoints.checkpoint import require_fitting, require_same_prediction
from rebasin.checkpoints.random_weights import random_checkpoint
from rebasin.cli.inputs import left_out, open_all
from rebasin.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    DataError,
    RebasinError,
    SpecMismatchError,
)
from rebasin.files import SchemaError, conform, parse, print_anything
from rebasin.spec import Permutation, PermutationSpec
from rebasin.tensors.modules import call_model
from rebasin.tensors.quantised import decoded

TEXT, UNET = "cond_stage_model.", "model.diffusion_model."

FAST = [name for name in mutate_readers.READERS if name not in ("report", "study")]


def model(seed: int = 0, part: str = UNET) -> dict[str, Tensor]:
    whole = random_checkpoint("sd1", 16, depth=1, vocabulary=64, seed=seed)
    return {name: whole[name].clone() for name in whole if name.startswith(part)}


@pytest.mark.parametrize("reader", FAST)
def test_damaged_files_are_read_or_refused_in_one_sentence(reader, tmp_path):
    found = [*mutate_readers.outcomes(reader, 40, 1, tmp_path)]
    assert [one.fault for one in found if one.fault] == []
    assert sum(not one.read for one in found) >= 20, "most of these files are damaged"


@pytest.mark.parametrize("reader", ["report", "study"])
def test_damaged_results_and_studies_are_read_or_refused_in_one_sentence(reader, tmp_path, monkeypatch):
    if reader == "study":
        pytest.importorskip("optuna")
    else:
        from test_reporting import results

        def make(path: Path) -> None:
            path.write_text(json.dumps(results(1.0, 0.1)))

        monkeypatch.setitem(
            mutate_readers.READERS, reader, replace(mutate_readers.READERS[reader], make=make)
        )
    assert [one.fault for one in mutate_readers.outcomes(reader, 12, 1, tmp_path) if one.fault] == []


# ---------------------------------------------------------------------------------------------- our own files


def test_a_schema_is_checked_in_full():
    assert parse('{"a": [1, 2.5]}') == {"a": [1, 2.5]}
    for text in ("", "{", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 100_000, b"\xff"):
        with pytest.raises(SchemaError):
            parse(text)
    assert conform(tuple[tuple[str, int], ...], [["a", 1]]) == (("a", 1),)
    assert conform(dict[str, float | None], {"a": None, "b": 1}) == {"a": None, "b": 1}
    bad: list[tuple[Any, Any]] = [(int, True), (int, 1.0), (int, 2**63), (float, "1"), (list[int], [1, "2"])]
    bad += [(tuple[int, int], [1]), (bool, 0), (str, None), (dict[str, int], {"a": []}), (float, 10**400)]
    for kind, value in bad:
        with pytest.raises(SchemaError):
            conform(kind, value)


def test_a_permutation_that_is_none_is_refused_before_anything_is_done_with_it(tmp_path):
    spec, *_ = mutate_readers.pair()
    path = tmp_path / "p.safetensors"
    spec.random(1).save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask(), "as every file that a user writes"
    header, tensors = load_safetensors(path).metadata, dict(load_safetensors(path))
    name = max(tensors, key=lambda name: tensors[name].numel())
    for wrong in (
        tensors[name] + 1,
        tensors[name] * 0,
        tensors[name].float(),
        tensors[name][:-1],
        tensors[name][None],
    ):
        save_safetensors(path, {**tensors, name: wrong}, header)
        with pytest.raises(CheckpointError, match="no permutation of 8 neurons"):
            Permutation.load(path)
    data = json.loads(spec.to_json())
    data["shapes"]["a.weight"] = [8, 7]
    with pytest.raises(SpecMismatchError, match="hash does not fit"):
        PermutationSpec.from_json(json.dumps(data))


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


# ------------------------------------------------------------------------------------------- pickles of others


def repacked(path: Path, change: dict[str, bytes] | None = None, way: int = zipfile.ZIP_STORED) -> Path:
    """The same entries behind another one, with some replaced."""
    with zipfile.ZipFile(path) as old:
        entries = {entry.filename: old.read(entry) for entry in old.infolist()}
    target = path.with_name("repacked.ckpt")
    with zipfile.ZipFile(target, "w", way) as new:
        new.writestr("readme.txt", b"x" * 4096)
        for name, data in entries.items():
            new.writestr(name, (change or {}).get(name.rpartition("/")[2], data))
    return target


def test_an_archive_is_read_where_its_entries_are(tmp_path):
    path = tmp_path / "a.ckpt"
    wanted = {"a": torch.randn(5, 3), "t": torch.randn(4, 2).t()}
    torch.save(wanted, path)
    state = load_pickled(repacked(path))
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())
    for change, way, words in (
        ({"byteorder": b"big"}, zipfile.ZIP_STORED, "another byte order"),
        ({"0": b"short"}, zipfile.ZIP_STORED, "Tensor 'a' .* reaches behind the end"),
        ({}, zipfile.ZIP_DEFLATED, "is compressed"),
    ):
        with pytest.raises(CheckpointError, match=words):
            load_pickled(repacked(path, change, way))


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_that_can_not_be_read_are_named(tmp_path, zipped):
    for tensor, words in (
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.empty(3, device="meta"), "without values"),
        (torch.zeros(1).expand(1 << 20, 1 << 20), "expanded"),
    ):
        torch.save({"odd": tensor}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match=f"Tensor 'odd' .*x.pt .*{words}"):
            load_pickled(tmp_path / "x.pt")


# ----------------------------------------------------------------------------------------- weights and models


@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("codes", [torch.float8_e4m3fn, torch.int8])
def test_codes_are_read_as_the_numbers_that_they_stand_for(tmp_path, spelling, rows, codes):
    state = model()
    wanted, stored = dict(state), dict(state)
    for name in [n for n in state if n.endswith("to_q.weight")]:
        size = 127 if codes == torch.int8 else 448
        scale = state[name].float().abs().amax(dim=1 if rows else (0, 1), keepdim=rows) / size
        stored[name] = (state[name].float() / scale).clamp(-size, size).to(codes)
        stored[name.removesuffix("weight") + spelling] = scale if rows else scale.reshape(())
        wanted[name] = stored[name].float() * scale
    stored[f"{UNET}scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    path = save_safetensors(tmp_path / "codes.safetensors", stored)
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.raw) == set(wanted)
    assert all(torch.equal(checkpoint.raw[name], tensor) for name, tensor in wanted.items())
    save_checkpoint(tmp_path / "out.safetensors", checkpoint, dtype=torch.float16)
    written = load_safetensors(tmp_path / "out.safetensors")
    assert set(written) == set(wanted) and {written.dtype_of(name) for name in written} == {torch.float16}
    with pytest.raises(CheckpointError, match="stored as codes"):
        rebasin.interpolate(stored, stored, 0.5)


@pytest.mark.parametrize(
    "extra", ["x.qweight", "x.weight_zero_point", "x.SCB", "x.weight.absmax", "x.weight_scale_inv"]
)
def test_codes_of_another_kind_are_refused(extra):
    with pytest.raises(CheckpointError, match=f"file is quantised in a way .*{extra}"):
        decoded({"x.weight": torch.ones(2, 2), extra: torch.ones(2)}, "file")


def test_scales_that_do_not_fit_are_refused():
    state = {"x.weight": torch.ones(4, 2).to(torch.int8), "x.weight_scale": torch.ones(2, 1)}
    with pytest.raises(CheckpointError, match="does not fit its weight's"):
        decoded(state, "file")


@pytest.mark.parametrize("word", ["_orig_mod.", "module.", "module._orig_mod.", "state_dict."])
def test_wrappers_of_a_model_are_taken_off(tmp_path, word):
    state = model()
    plain = {name.removeprefix(UNET): tensor for name, tensor in state.items()}
    for before in (word, UNET + word):
        path = save_safetensors(tmp_path / "w.safetensors", {before + name: t for name, t in plain.items()})
        found = open_checkpoint(path)
        assert found.components == ("unet",)
        assert {name.removeprefix(UNET) for name in found.raw} == set(plain)


@pytest.mark.parametrize("word", ["net.", "model._orig_mod.", "pipe.model."])
def test_words_before_all_names_are_taken_off_where_a_model_is_left(tmp_path, word):
    state = model()
    path = save_safetensors(tmp_path / "w.safetensors", {word + name: t for name, t in state.items()})
    assert set(open_checkpoint(path).raw) == set(state)
    other = save_safetensors(tmp_path / "o.safetensors", {f"{word}encoder.block.0.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match="no model that is known here"):
        open_checkpoint(other)


@pytest.mark.parametrize("word", ["module.", "state_dict."])
def test_a_tensor_with_and_without_a_wrapper_is_refused(tmp_path, word):
    state = model()
    name = next(iter(state))
    for both in ({**state, word + name: state[name]}, {**state, **{word + n: t for n, t in state.items()}}):
        path = save_safetensors(tmp_path / "two.safetensors", both)
        with pytest.raises(
            CheckpointError, match=rf"two.safetensors has both '.*' and '{word}.*', so it holds"
        ):
            open_checkpoint(path)


PAGE = b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html><body>Sign in to download this model</body></html>\n" * 9
NO_TENSORS = {
    "is empty; download": b"",
    "is a web page, so": PAGE,
    "is a line of text, so": b"Invalid username or password.",
    "is a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7\nsize 4265380512\n",
}


@pytest.mark.parametrize("ending", ["safetensors", "ckpt", "pt"])
@pytest.mark.parametrize("words", NO_TENSORS)
def test_a_download_that_failed_is_told(tmp_path, words, ending):
    path = tmp_path / f"x.{ending}"
    path.write_bytes(NO_TENSORS[words])
    for read in (open_checkpoint, load_safetensors, load_pickled, Permutation.load):
        with pytest.raises(CheckpointError, match=rf"x\.{ending} {words}[^.]*(\.|\(git lfs pull\)\.)$"):
            read(path)


def test_both_models_are_compared_whole_in_the_names_of_their_files(tmp_path):
    one = save_safetensors(tmp_path / "one.safetensors", model(0))
    name = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    other = model(1)
    changes: dict[str, tuple[dict[str, Tensor], str]] = {
        "lost": ({n: t for n, t in other.items() if n != name}, f"lost.safetensors has no tensor '{name}'"),
        "wide": (
            {**other, f"{UNET}out.2.bias": torch.ones(5)},
            rf"Tensor .{UNET}out.2.bias. of .* \(5,\)",
        ),
        "whole": ({**other, name: other[name].to(torch.int8)}, f"Tensor '{name}' of .* has type int8"),
        "lcm": (
            {**other, f"{UNET}time_embed.cond_proj.weight": torch.ones(16, 256)},
            f"one.safetensors has no tensor '{UNET}time_embed.cond_proj.weight'",
        ),
        "strange": ({**other, f"{UNET}position_net.0.weight": torch.ones(2)}, r"not known here"),
    }
    for label, (state, words) in changes.items():
        path = save_safetensors(tmp_path / f"{label}.safetensors", state)
        for pair in ([one, path], [path, one]):
            with pytest.raises(CheckpointError, match=words):
                open_all(pair)


def test_a_pair_that_is_told_its_guidance_fits(tmp_path):
    paths = []
    for seed in (0, 1):
        state = model(seed) | {f"{UNET}time_embed.cond_proj.weight": torch.randn(16, 256).half()}
        paths.append(save_safetensors(tmp_path / f"{seed}.safetensors", state))
    models, components = open_all(paths)
    assert components == ("unet",)
    assert "time_embedding.cond_proj.weight" in models[0].component("unet")
    assert "time_embedding.cond_proj.weight" in architecture(models[0], "unet")[0].state_dict()


def test_what_is_left_out_is_told(tmp_path):
    extra = {"ztsnr": torch.zeros(0), "model_ema.decay": torch.ones(())}
    paths = [
        save_safetensors(tmp_path / f"{name}.safetensors", state)
        for name, state in (("a", model()), ("b", model(1) | model(1, TEXT) | extra))
    ]
    (told,) = left_out(open_all(paths)[0])
    assert all(word in told for word in ("b.safetensors", "text_encoder", "ztsnr", "model_ema.decay"))
    averages = {
        "state_dict": model(),
        "state_dict_ema": model(1),
        "optimizer": {"state": {0: {"m": torch.ones(2)}}},
    }
    torch.save(averages, tmp_path / "c.ckpt")
    (told,) = left_out(open_all([tmp_path / "c.ckpt", paths[0]])[0])
    assert told == "Not read from c.ckpt: the state 'state_dict_ema' beside the one that is merged."


@pytest.mark.parametrize(
    ("extra", "header"),
    [
        ({"v_pred": torch.zeros(0)}, {}),
        ({"edm_vpred.sigma_max": torch.ones(())}, {}),
        ({}, {"modelspec.prediction_type": "v"}),
        ({}, {"modelspec.predict_key": "v"}),
        ({}, {"ss_v_parameterization": "True"}),
    ],
)
def test_noise_and_velocity_are_not_merged_by_accident(tmp_path, extra, header):
    noise = open_checkpoint(save_safetensors(tmp_path / "a.safetensors", model()))
    velocity = open_checkpoint(save_safetensors(tmp_path / "b.safetensors", model(1) | extra, header))
    require_same_prediction([noise, noise])
    with pytest.raises(CheckpointError, match=r"predicts epsilon .* v_prediction .*--mix-predictions"):
        require_same_prediction([noise, velocity])
    require_fitting(noise, velocity, ["unet"])


def test_names_of_files_are_those_of_files(tmp_path):
    checkpoint = open_checkpoint(save_safetensors(tmp_path / "a.safetensors", model(), {"spec": "1.0"}))
    for name in ("m.SAFETENSORS", "m.sft", "m.CKPT"):
        save_checkpoint(tmp_path / name, checkpoint)
        assert open_checkpoint(tmp_path / name).family == "sd1"
    for name in ("m.pt", "m.safetensorz", "m.bin", "m.ckpt.tmp"):
        with pytest.raises(
            ConfigError,
            match=r"written as NAME\.safetensors, NAME\.sft, NAME\.ckpt, NAME\.gguf, or as a folder",
        ):
            save_checkpoint(tmp_path / name, checkpoint)
        assert not (tmp_path / name).exists()
    save_checkpoint(tmp_path / "model-v1.5", checkpoint)
    assert (tmp_path / "model-v1.5").is_dir()


def test_a_console_without_the_letters_shows_escapes(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    print_anything()
    print("アニメ \ud800", flush=True)
    assert raw.getvalue().split() == [rb"\u30a2\u30cb\u30e1", rb"\ud800"]


# ----------------------------------------------------------------------------------- states, batches, adapters


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"version": 1}, "no tensor but of type dict"),
        (torch.ones(3, 3).to_sparse(), "sparse or quantised"),
        (torch.ones(3, 3, device="meta"), "meta device"),
        (nn.LazyLinear(3).weight, "no values yet"),
    ],
)
def test_entries_that_are_no_plain_tensors_are_named(value, words):
    spec, a, b = mutate_readers.pair()
    state: dict[str, Any] = {**b.state_dict(), "a.weight": value}
    for use in (
        lambda: rebasin.interpolate(a.state_dict(), state, 0.5),
        lambda: rebasin.weight_matching(spec, a.state_dict(), state),
        lambda: rebasin.merge("weighted_sum", [a.state_dict(), state]),
    ):
        with pytest.raises(CheckpointError, match=rf"Tensor 'a\.weight' of B .*{words}"):
            use()


def test_a_model_is_no_state_and_wrappers_are_named():
    spec, a, b = mutate_readers.pair()
    with pytest.raises(CheckpointError, match=r"of type Net, .* model\.state_dict\(\)"):
        rebasin.weight_matching(spec, a, b)  # type: ignore[arg-type]
    for word in ("_orig_mod.", "module."):
        state = {word + name: tensor for name, tensor in b.state_dict().items()}
        for use in (rebasin.interpolate, lambda a, b, _: rebasin.weight_matching(spec, a, b)):
            with pytest.raises(RebasinError, match=f"'{word}'"):
                use(a.state_dict(), state, 0.5)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.out.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.table(ids))


def squared(model: nn.Module) -> float:
    with torch.no_grad():
        return float(model(torch.tensor([1, 2])).square().mean())


def test_a_tied_weight_may_be_there_under_one_of_its_names():
    a, b = Tied(), Tied()
    whole, part = a.state_dict(), {"table.weight": b.table.weight.detach()}
    for one, other in ((whole, part), (part, whole)):
        merged = rebasin.interpolate(one, other, 0.5)
        assert torch.equal(merged["table.weight"], merged["out.weight"])
        assert set(rebasin.merge("weighted_sum", [one, other])) == {"table.weight", "out.weight"}
        assert len(rebasin.barrier(a, one, other, squared, points=3).losses) == 3


def test_a_pair_of_tensors_is_inputs_and_targets_for_a_model_of_one_input():
    net, x = mutate_readers.Net(), torch.randn(4, 6)
    assert torch.equal(call_model(net, (x, torch.randn(4, 3))), net(x))
    assert torch.equal(call_model(net, [x, torch.zeros(4, dtype=torch.int64)]), net(x))
    with pytest.raises(DataError, match=r"A batch of 3 does not fit Net\.forward .*forward="):
        call_model(net, (x, x, x))


def test_what_else_is_in_a_lora_goes_along():
    key = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    old = "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora."
    lora = {f"{key}.lora_down.weight": torch.randn(2, 4), f"{key}.lora_up.weight": torch.randn(8, 2)}
    lora |= {f"{old}down.weight": torch.randn(2, 4), f"{old}up.weight": torch.randn(4, 2)}
    bundled = {"bundle_emb.word.string_to_param.*": torch.randn(2, 4)}
    layer = "text_model.encoder.layers.0"
    shapes = {f"{layer}.mlp.fc1.weight": (8, 4), f"{layer}.self_attn.q_proj.weight": (4, 4)}
    identity = PermutationSpec((), shapes).identity()
    assert is_adapter([*lora, *bundled, *(f"bundle_emb.{i}" for i in range(9))])
    moved = move_adapter(identity, lora | bundled)
    assert moved.keys() == (lora | bundled).keys() and all(torch.equal(moved[n], t) for n, t in lora.items())
    assert is_adapter(["unet:0:up", "unet:0:down"])
    with pytest.raises(AdapterError, match="cloneofsimo"):
        move_adapter(identity, {"unet:0:up": torch.ones(2, 2)})
