"""GGUF files: read by the package gguf, merged, and written with the types and entries of the first model."""

from __future__ import annotations

import random
import sys
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from cli_files import rebasin
from torch import Tensor

from experiments.quantised_reference import write_gguf
from rebasin.checkpoints import (
    component_spec,
    load_safetensors,
    open_checkpoint,
    save_checkpoint,
    save_safetensors,
)
from rebasin.checkpoints.random_weights import noisy, random_checkpoint
from rebasin.errors import CheckpointError, ConfigError
from rebasin.tensors.gguf_files import GGUFState, GGUFTensors

torch.set_num_threads(1)

KINDS = {"F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 127, "Q5_1": 1 / 16, "Q4_0": 1 / 8}
"""What can be written, and half a step (or a step of those that have an even count), by a block's largest number."""


@cache
def unet(seed: int = 0) -> dict[str, Tensor]:
    whole = random_checkpoint("sd1", 16, depth=1, vocabulary=64)
    whole = noisy(whole, 0.1, seed) if seed else whole
    return {name: whole[name] for name in whole if name.startswith("model.diffusion_model.")}


def made(path: Path, kind: str, seed: int = 0) -> tuple[Path, dict[str, Tensor]]:
    return path, write_gguf(path, unet(seed), kind)


def kinds_of(path: Path) -> dict[str, Any]:
    reader = gguf.GGUFReader(path)
    return {str(t.name): (t.tensor_type, tuple(map(int, t.shape)), t.data.tobytes()) for t in reader.tensors}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_read_as_its_numbers_and_written_unchanged_has_every_bit_again(
    tmp_path: Path, kind: str
) -> None:
    path, numbers = made(tmp_path / "a.gguf", kind)
    checkpoint = open_checkpoint(path)
    assert checkpoint.family == "sd1" and list(checkpoint.raw) == list(numbers)
    assert [n for n in numbers if not torch.equal(checkpoint.raw[n].float(), numbers[n])] == []
    save_checkpoint(tmp_path / "b.gguf", checkpoint, metadata={"rebasin": "{}"})
    assert kinds_of(tmp_path / "b.gguf") == kinds_of(path)
    old, new = gguf.GGUFReader(path), gguf.GGUFReader(tmp_path / "b.gguf")
    own = [name for name in old.fields if not name.startswith("GGUF.")]
    assert {n: new.fields[n].contents() for n in own} == {n: old.fields[n].contents() for n in own}
    assert new.fields["rebasin"].contents() == "{}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_has_the_types_of_the_first_model(tmp_path: Path, kind: str) -> None:
    path, numbers = made(tmp_path / "a.gguf", kind)
    b = save_safetensors(tmp_path / "b.safetensors", unet(1))
    rebasin("merge", path, b, "-o", tmp_path / "ab.gguf", "--no-align")
    written, wanted = kinds_of(tmp_path / "ab.gguf"), kinds_of(path)
    assert {n: t[:2] for n, t in written.items()} == {n: t[:2] for n, t in wanted.items()}
    merged = open_checkpoint(tmp_path / "ab.gguf")
    assert "rebasin" in merged.metadata
    for name, number in numbers.items():
        mean = (number + unet(1)[f"model.diffusion_model.{name}"].float()) / 2
        assert (merged.raw[name].float() - mean).abs().max() <= 1.1 * KINDS[kind] * mean.abs().max() + 1e-6, (
            name
        )
    rebasin("merge", path, b, "-o", tmp_path / "ab.safetensors", "--no-align")
    plain = load_safetensors(tmp_path / "ab.safetensors")
    assert list(plain) == list(numbers) or set(plain) == set(numbers)
    quantised = merged.quantised
    assert isinstance(quantised, GGUFTensors) and bool(quantised.codes) == (kind not in ("F16", "BF16"))
    assert all(plain.dtype_of(name) == torch.float16 for name in quantised.codes)
    rebasin("merge", path, b, "-o", tmp_path / "wide.gguf", "--no-align", "--dtype", "fp32")
    assert {t[0].name for t in kinds_of(tmp_path / "wide.gguf").values()} == {"F32"}
    assert "general.file_type" not in gguf.GGUFReader(tmp_path / "wide.gguf").fields, "it was that of A"
    wide = open_checkpoint(tmp_path / "wide.gguf").raw
    assert {n: wide[n].shape for n in wide} == {n: t.shape for n, t in numbers.items()}


def test_an_aligned_file_stays_gguf(tmp_path: Path) -> None:
    a, numbers = made(tmp_path / "a.gguf", "Q8_0")
    checkpoint = open_checkpoint(a)
    planted = component_spec(checkpoint, "unet").random(5)
    moved = checkpoint.restore({"unet": planted.view(checkpoint.component("unet"))})
    b = save_checkpoint(tmp_path / "b.gguf", checkpoint, moved).path
    rebasin("align", a, b, "-o", tmp_path / "c.gguf", "--no-check")
    rebasin("apply", tmp_path / "c.permutation.safetensors", b, "-o", tmp_path / "d.gguf")
    assert kinds_of(tmp_path / "c.gguf") == kinds_of(tmp_path / "d.gguf")
    read, other = open_checkpoint(tmp_path / "d.gguf").raw, open_checkpoint(b).raw
    assert any((other[n].float() - t).abs().max() > 0.1 * t.abs().max() for n, t in numbers.items())
    for name, number in numbers.items():  # quantised in another order, and again
        assert (read[name].float() - number).abs().max() <= 2.2 * KINDS["Q8_0"] * number.abs().max() + 1e-4, (
            name
        )


def test_what_can_not_be_written_is_told_before_any_work(tmp_path: Path) -> None:
    path, _ = made(tmp_path / "a.gguf", "Q8_0")
    plain = save_safetensors(tmp_path / "b.safetensors", unet(1))
    k = tmp_path / "k.gguf"
    writer = gguf.GGUFWriter(k, "sd1")
    reader = gguf.GGUFReader(path)
    changed = None
    for tensor in reader.tensors:
        kind, data = tensor.tensor_type, tensor.data
        if changed is None and tensor.shape[0] % 256 == 0 and len(tensor.shape) > 1:
            changed, kind = str(tensor.name), gguf.GGMLQuantizationType.Q4_K
            import numpy as np

            data = np.zeros((int(tensor.shape[1]), int(tensor.shape[0]) // 256 * 144), np.uint8)
        writer.add_tensor(str(tensor.name), data, raw_dtype=kind)
    for name, field in reader.fields.items():
        if name.startswith("comfy."):
            writer.add_array(name, field.contents())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert not open_checkpoint(k).raw[str(changed)].any()
    for models, output, options, words in (
        (
            [k, plain],
            "o.gguf",
            [],
            f"'{changed}' of .*k.gguf has type Q4_K, which the package gguf can read but not",
        ),
        ([plain, path], "o.gguf", [], "would be a GGUF file, whose types and entries come from"),
        ([path, plain], "o.gguf", ["--dtype", "fp8"], "GGUF has none such"),
    ):
        told = rebasin("merge", *models, "-o", tmp_path / output, *options, expect=2)
        assert "hash" not in told
        import re

        assert re.search(words, told.replace("\n", " ")), told
    rebasin("merge", k, plain, "-o", tmp_path / "o.gguf", "--no-align", "--dtype", "bf16")
    rebasin("merge", k, plain, "-o", tmp_path / "o.safetensors", "--no-align")


def test_a_damaged_file_and_a_missing_package_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = made(tmp_path / "a.gguf", "Q8_0")
    whole = path.read_bytes()
    for cut in (len(whole) // 2, 40, 7):
        (tmp_path / "cut.gguf").write_bytes(whole[:cut])
        with pytest.raises(
            CheckpointError, match=r"cut.gguf is no readable GGUF file: it is cut off or damaged"
        ):
            open_checkpoint(tmp_path / "cut.gguf")
    end = whole.index(b"input_blocks.0.0.bias") + 200
    generator = random.Random(0)
    read = 0
    for _ in range(60):
        data, place = bytearray(whole), generator.randrange(end)
        data[place] ^= 1 << generator.randrange(8)
        (tmp_path / "bad.gguf").write_bytes(data)
        try:
            GGUFState(tmp_path / "bad.gguf")
            read += 1
        except CheckpointError as error:
            assert "bad.gguf" in str(error)
    assert read < 50, "names may change, but no size and no place"
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"a.gguf is a GGUF file, .* pip install 'git-rebasin\[gguf\]'"):
        open_checkpoint(path)
