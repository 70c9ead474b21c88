"""Safetensors files: exact, atomic, lazy, the same bytes for the same state, errors that name the file."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file

from rebasin.checkpoints import atomic_path, load_metadata, load_safetensors, save_safetensors
from rebasin.errors import CheckpointError

STATE = {
    "half": torch.randn(5).half(),
    "brain": torch.randn(3).bfloat16(),
    "view": torch.randn(3, 4).t(),
    "scalar": torch.tensor(7),
    "empty": torch.zeros(0, 3),
    "mask": torch.tensor([True, False, True]),
    "bytes": torch.arange(3, dtype=torch.uint8),
    "double": torch.randn(2, 2, dtype=torch.float64),
}


def test_other_readers_find_every_type_bit_for_bit(tmp_path):
    path = save_safetensors(tmp_path / "x.safetensors", STATE, {"b": "é", "a": "1"})
    read = load_file(path)
    assert read.keys() == STATE.keys()
    for name, tensor in STATE.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name
    assert load_metadata(path) == {"a": "1", "b": "é"}


def test_lazy_state_is_a_mapping_that_knows_shapes_and_saves_the_same_bytes(tmp_path):
    path = save_safetensors(tmp_path / "x.safetensors", STATE, {"k": "v", "a": "b", "c": "d"})
    lazy = load_safetensors(path)
    assert set(lazy) == set(STATE)
    assert lazy.shape_of("view") == (4, 3)
    assert lazy.dtype_of("brain") == torch.bfloat16
    assert torch.equal(lazy["view"], STATE["view"])
    with pytest.raises(KeyError, match="nope"):
        lazy["nope"]
    again = save_safetensors(tmp_path / "y.safetensors", lazy, dict(reversed(lazy.metadata.items())))
    assert again.read_bytes() == path.read_bytes()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = save_safetensors(tmp_path / "x.safetensors", {"a": torch.ones(2)})
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"'c' for .*x\.safetensors has type torch.complex64"):
        save_safetensors(path, {"c": torch.ones(2, dtype=torch.complex64)})
    with pytest.raises(RuntimeError, match="interrupted"), atomic_path(path) as temporary:
        temporary.write_text("half a file")
        raise RuntimeError("interrupted")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_errors_name_the_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"There is no file .*nothing\.safetensors"):
        load_safetensors(tmp_path / "nothing.safetensors")
    damaged = save_safetensors(tmp_path / "damaged.safetensors", {"a": torch.ones(100)})
    damaged.write_bytes(damaged.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"damaged\.safetensors is no readable"):
        load_safetensors(damaged)
    with pytest.raises(CheckpointError, match=r"missing.*x\.safetensors can't be written"):
        save_safetensors(tmp_path / "missing" / "x.safetensors", {})
