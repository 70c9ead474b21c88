"""States of interrupted searches: what is saved is read again, and what is no such state is told in one sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from rebasin import trace
from rebasin.errors import CheckpointError, ConfigError, RebasinError
from rebasin.matching import MatchState, weight_matching
from rebasin.matching.resume_state import ResumeState, digest_of, told
from rebasin.spec import Permutation
from rebasin.tensors import load_safetensors, save_safetensors

SPEC = trace(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(2, 3))


@dataclass(frozen=True)
class Inner:
    number: int
    share: float
    choices: tuple[str, ...]
    where: Permutation | None = None


@dataclass(frozen=True, eq=False)
class Whole(ResumeState):
    called: ClassVar[str] = "rehearsal"

    present: tuple[Permutation | None, ...]
    inner: Inner
    pairs: tuple[tuple[str, int], ...]
    tensors: Mapping[str, Tensor]
    seconds: Mapping[str, float]
    loss: float = 0.0


def whole() -> Whole:
    return Whole(
        options={"seed": "1", "weights": "0.5"},
        present=(None, SPEC.random(1)),
        inner=Inner(3, 1, ("a", "b"), SPEC.random(2)),
        pairs=(("x", 1), ("y", 2)),
        tensors={"layer.0/w": torch.randn(3, 4), "step": torch.tensor(5.0)},
        seconds={"start": 0.1},
        loss=math.inf,
    )


def test_what_is_saved_is_read_again(tmp_path: Path) -> None:
    state = whole()
    state.save(tmp_path / "state")
    read = Whole.load(tmp_path / "state")
    assert (read.options, read.present, read.inner) == (state.options, state.present, state.inner)
    assert (read.pairs, read.seconds, read.loss) == (state.pairs, state.seconds, math.inf)
    assert list(read.tensors) == list(state.tensors)
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in state.tensors.items())
    read.save(tmp_path / "state")  # over the file that it reads its tensors from
    assert torch.equal(Whole.load(tmp_path / "state").tensors["step"], state.tensors["step"])


def test_another_state_and_other_options_are_refused(tmp_path: Path) -> None:
    whole().save(tmp_path / "state")
    with pytest.raises(CheckpointError, match="holds no interrupted matching"):
        MatchState.load(tmp_path / "state")
    with pytest.raises(CheckpointError, match="absent"):
        Whole.load(tmp_path / "absent")
    whole().require({"seed": "1"})
    with pytest.raises(
        ConfigError, match=r"rehearsal can't be continued: its seed differed \(1 then, 2 now\)"
    ):
        whole().require({"seed": "2"})
    with pytest.raises(ConfigError, match="its weights differed;"):
        whole().require({"weights": "0.6"})


def test_damage_is_told_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "state"
    states: list[MatchState] = []
    a, b = ({n: torch.randn(s) for n, s in SPEC.shapes.items()} for _ in range(2))
    weight_matching(SPEC, a, b, checkpoint=states.append)
    states[0].save(path)
    good = load_safetensors(path)
    tensors, header = dict(good), dict(good.metadata)
    plain = json.loads(header["state"])
    damaged = [{**header, "state": text} for text in ("", "[]", "{}", "null", "3")]
    damaged += [
        {**header, "state": json.dumps({k: v for k, v in plain.items() if k != key})} for key in plain
    ]
    damaged += [{**header, "state": json.dumps({**plain, key: "?"})} for key in plain if key != "best"]
    damaged += [{k: v for k, v in header.items() if k != key} for key in header]
    damaged += [{**header, "spec": text} for text in ("", "{}", header["spec"][:-9])]
    for made in damaged:
        save_safetensors(path, tensors, made)
        with pytest.raises(RebasinError) as raised:
            MatchState.load(path)
        assert str(raised.value).endswith(".") and "\n" not in str(raised.value)
    name = next(iter(tensors))
    for bad in (tensors[name] * 0, tensors[name][:-1], tensors[name] - 99):
        save_safetensors(path, {**tensors, name: bad}, header)
        with pytest.raises(CheckpointError, match="damaged"):
            MatchState.load(path)


def test_tensors_that_could_be_right_but_are_not_those_saved_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "state"
    whole().save(path)
    good = load_safetensors(path)
    tensors, header = dict(good), dict(good.metadata)
    place = next(name for name, tensor in tensors.items() if tensor.dtype == torch.int32)
    moved = tensors[place].flip(0)  # a permutation of the same neurons
    weights = tensors["/tensors/layer.0/w"].clone()
    weights[0, 0] += 1e-6
    extra = {**tensors, "extra": torch.zeros(1)}
    for made in ({**tensors, place: moved}, {**tensors, "/tensors/layer.0/w": weights}, extra):
        save_safetensors(path, made, header)
        with pytest.raises(CheckpointError, match="is damaged: it is no complete rehearsal"):
            Whole.load(path)
    save_safetensors(path, dict(reversed(tensors.items())), header, keep_order=True)
    assert Whole.load(path).present[1] == SPEC.random(1)


def test_words_and_digests_of_options() -> None:
    one, other = SPEC.random(1), SPEC.random(2)
    assert told("identity") == "identity" and told(None) == "None" and told(len) == "a function"
    assert told(one) == told([one]) != told(other) and told([one, None]) != told(one)
    batches = [{"x": torch.arange(4), "texts": ["a", "b"]}, (torch.zeros(2, dtype=torch.bfloat16), None)]
    same = [{"x": torch.arange(4), "texts": ["a", "b"]}, (torch.zeros(2, dtype=torch.bfloat16), None)]
    assert digest_of(batches) == digest_of(same)
    assert digest_of(batches) != digest_of([{**batches[0], "texts": ["a", "c"]}, batches[1]])  # type: ignore[dict-item]
    assert digest_of(torch.arange(4)) != digest_of(torch.arange(4).reshape(2, 2))
    assert digest_of([object()]) == digest_of([object()])
