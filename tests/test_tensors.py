"""Lazy states and files of tensors: what is known without reading, what a written file looks like, who may read it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from rebasin import Permutation, trace
from rebasin.checkpoints.joint import without_prefix
from rebasin.checkpoints.key_map import component_state, replaced, rows, same
from rebasin.checkpoints.output import cast
from rebasin.errors import CheckpointError
from rebasin.matching.result import Attempt, MatchState
from rebasin.spec import PermutationSpec
from rebasin.spec.permutation import digest
from rebasin.tensors import JoinedState, load_safetensors, save_safetensors
from rebasin.types import DerivedState, LazyState, LazyTensor, dtype_of, passed, shape_of


class Source(LazyState):
    """A lazy state that notes which tensors were made."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.made: list[str] = []

    def __getitem__(self, name: str) -> Tensor:
        self.made.append(name)
        return self.known[name]


class Foreign(Mapping[str, Tensor]):
    """A mapping of the user's own, which tells no shapes, of tensors that it makes."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.made = tensors, 0

    def __getitem__(self, name: str) -> Tensor:
        self.made += 1
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@pytest.fixture
def source() -> Source:
    return Source({"x.a": torch.arange(12.0).reshape(6, 2), "x.b": torch.ones(3, dtype=torch.float16)})


@pytest.fixture(scope="module")
def spec() -> PermutationSpec:
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    return trace(net, torch.randn(1, 3))


def test_names_shapes_and_types_of_derived_states_read_nothing(source: Source) -> None:
    keys = [
        rows("q", "x.a", (6, 2), 0, 2),
        rows("k", "x.a", (6, 2), 1, 2),
        same("b", "x.b", (3,)),
    ]
    part = component_state(source, keys)
    states = [
        part,
        DerivedState({"c": passed(source, "x.a")}),
        without_prefix(source, "x."),
        JoinedState([source, {"y": torch.zeros(1)}]),
        replaced(source, {"part": keys}, {"part": part}),
        cast(source, torch.bfloat16, "here"),
    ]
    for state in states:
        shapes = {name: shape_of(state, name) for name in state}
        types = {name: dtype_of(state, name) for name in state}
        assert len(state) == len(shapes) and all(name in state for name in shapes) and "none" not in state
        assert source.made == []
        for name, tensor in state.items():
            assert (tuple(tensor.shape), tensor.dtype) == (shapes[name], types[name]), name
        source.made.clear()
    assert torch.equal(part["k"], source["x.a"][3:]) and source.made == ["x.a", "x.a"]


def test_a_derived_state_makes_its_tensors_anew() -> None:
    state = DerivedState({"a": LazyTensor((2,), torch.float32, lambda: torch.zeros(2))})
    state["a"].add_(1)
    assert torch.equal(state["a"], torch.zeros(2))
    with pytest.raises(KeyError):
        state["b"]


def test_a_permuted_view_reads_a_tensor_when_it_is_asked_for(spec: PermutationSpec) -> None:
    state = Source({name: torch.randn(shape) for name, shape in spec.shapes.items()})
    permutation = spec.random(1)
    view = permutation.view(state)
    assert list(view) == list(state) and shape_of(view, "0.weight") == (8, 3) and not state.made
    assert torch.equal(view["0.weight"], permutation.apply_to("0.weight", state.known["0.weight"]))
    assert state.made == ["0.weight"]
    # A mapping of the user's own is read for its shapes, but not for what no one asks.
    foreign = Foreign({**state.known, "counter": torch.tensor(3)})
    view = permutation.view(foreign)
    made = foreign.made
    assert "counter" in view and len(view) == len(foreign) and foreign.made == made
    assert int(view["counter"]) == 3 and foreign.made == made + 1


def halves(file: bytes) -> tuple[dict, bytes]:
    """The header of a safetensors file, and its numbers."""
    end = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:end]), file[end:]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_saved_permutations_and_match_states_are_whole_files_of_the_umask(
    spec: PermutationSpec, tmp_path: Path, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    permutation = spec.random(3)
    state = MatchState({}, Attempt(permutation, 1.0, (), True), (0,))
    old = os.umask(umask)
    try:
        permutation.save(tmp_path / "p.safetensors", {"key": "ä"})
        state.save(tmp_path / "m.safetensors")
    finally:
        os.umask(old)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["m.safetensors", "p.safetensors"]
    assert all(file.stat().st_mode & 0o777 == 0o666 & ~umask for file in files)
    assert Permutation.load(files[1]) == permutation
    assert MatchState.load(files[0]).current.permutation == permutation
    # What the reference implementation of the format writes, which has entries of the header in any order.
    tensors = {name: tensor.clone() for name, tensor in load_safetensors(files[1]).items()}
    assert all(tensor.dtype == torch.int32 for tensor in tensors.values())
    told = json.dumps({**json.loads(spec.to_json()), "metadata": {"key": "ä"}})
    theirs = safetensors.torch.save(tensors, {"spec": told, "digest": digest(permutation.index)})
    assert halves(files[1].read_bytes()) == halves(theirs)
    # What fails in the middle leaves the old file and nothing else.
    before = files[1].read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rebasin.files.os.replace", fail)
    with pytest.raises(CheckpointError, match="can't be written: No space left"):
        spec.random(4).save(files[1])
    assert files[1].read_bytes() == before and sorted(tmp_path.iterdir()) == files


def test_shards_with_a_tensor_in_common_are_refused(tmp_path: Path) -> None:
    one = load_safetensors(save_safetensors(tmp_path / "1.safetensors", {"a": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"'a' is in .*1\.safetensors and in"):
        JoinedState([one, one])
