"""MergeMany: what was planted is found, the distance never rises, and one model at a time is in memory."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rebasin.matching.many.models as many_models
import rebasin.matching.many.pivot as many_pivot
import rebasin.matching.many.rounds as many_rounds
from experiments.merge_many_mnist import main
from rebasin import trace
from rebasin.checkpoints import load_safetensors, save_safetensors
from rebasin.errors import CheckpointError, ConfigError, SpecMismatchError
from rebasin.matching import weight_matching
from rebasin.matching.many.methods import merge_many
from rebasin.matching.many.models import MeanState
from rebasin.matching.many.pivot import match_to_pivot
from rebasin.matching.many.result import ManyState, load_permutations, save_permutations
from rebasin.merging import interpolate
from rebasin.models import build
from rebasin.spec import PermutationSpec

State = dict[str, Tensor]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 10, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(40, 16), nn.ReLU(), nn.Linear(16, 5),
    ).eval()  # fmt: skip


@cache
def convolutional() -> PermutationSpec:
    return trace(network(), torch.zeros(2, 2, 4, 4))


def state_of(seed: int) -> State:
    """A network with statistics, affines and counters of its own."""
    state = {name: tensor.clone() for name, tensor in network(seed).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    for name in ("1.weight", "1.bias", "1.running_mean", "1.running_var"):
        state[name] = torch.rand(12, generator=generator) + 0.5
    state["1.num_batches_tracked"] += seed
    return state


@cache
def mlp() -> PermutationSpec:
    return trace(build("mlp", inputs=12, width=32, classes=5, depth=2), torch.zeros(2, 12))


def mlp_state(seed: int) -> State:
    torch.manual_seed(seed)
    return {
        n: t.clone() for n, t in build("mlp", inputs=12, width=32, classes=5, depth=2).state_dict().items()
    }


def alike(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Counted(Mapping[str, Tensor]):
    """A state whose tensors are made when asked for; `alive` knows which of them someone still holds."""

    def __init__(self, number: int, state: State, alive: dict[int, int], most: list[int]) -> None:
        self.number, self.state, self.alive, self.most = number, state, alive, most

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.state[name].clone()
        self.alive[self.number] = self.alive.get(self.number, 0) + 1
        weakref.finalize(tensor, self._gone)
        self.most[0] = max(self.most[0], sum(count > 0 for count in self.alive.values()))
        self.most[1] = max(self.most[1], sum(self.alive.values()))
        return tensor

    def _gone(self) -> None:
        self.alive[self.number] -= 1

    def __contains__(self, name: object) -> bool:
        return name in self.state

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


@pytest.mark.parametrize("n", [2, 5, 20])
@pytest.mark.parametrize("init", ["identity", "progressive"])
@pytest.mark.parametrize("which", ["convolutional", "mlp"])
def test_permuted_copies_merge_back_to_the_bit(n: int, init, which: str) -> None:
    spec, state = (convolutional(), state_of(1)) if which == "convolutional" else (mlp(), mlp_state(1))
    copies = [spec.random(seed).apply(state) for seed in range(n)]
    result = merge_many(spec, copies, init=init)
    assert alike(result.merged, copies[0])  # brought into the first one's arrangement
    assert result.permutations[0].is_identity and result.distance == 0 and result.converged
    assert result.distance_before > 1
    for permutation, copy in zip(result.permutations, copies, strict=True):
        assert spec.contains(permutation) and alike(permutation.apply(copy), copies[0])
    free = merge_many(spec, copies, init=init, anchor=None)
    assert alike(free.merged, free.permutations[-1].apply(copies[-1]))  # some permuted copy
    last = merge_many(spec, copies, init=init, anchor=n - 1)
    assert alike(last.merged, copies[-1])


@pytest.mark.parametrize("pivot", [0, 3, "best"])
def test_permuted_copies_become_the_pivot(pivot) -> None:
    spec, state = convolutional(), state_of(1)
    copies = [spec.random(seed).apply(state) for seed in range(5)]
    result = match_to_pivot(spec, copies, pivot=pivot)
    assert result.pivot is not None and result.pivot == (0 if pivot == "best" else pivot)
    assert alike(result.merged, copies[result.pivot]) and result.distance == 0 and result.converged


def test_the_best_pivot_is_nearest_to_the_others() -> None:
    spec, base = mlp(), mlp_state(0)
    far = [{n: t + 0.05 * torch.randn_like(t) for n, t in base.items()} for _ in range(3)]
    states = [spec.random(k).apply(s) for k, s in enumerate([*far, base])]
    result = match_to_pivot(spec, states, pivot="best")
    assert result.pivot == 3
    assert result.distance <= min(match_to_pivot(spec, states, pivot=k).distance for k in range(3)) + 1e-6


def test_one_model_stays_as_it_is() -> None:
    state = state_of(3)
    for result in (merge_many(convolutional(), [state]), match_to_pivot(convolutional(), [state])):
        assert alike(result.merged, state) and result.permutations[0].is_identity
        assert result.converged and result.distance == result.distance_before == result.moved == 0
        assert result.merged["0.weight"].data_ptr() != state["0.weight"].data_ptr()
    assert alike(merge_many(convolutional(), [state], init="progressive").merged, state)


@pytest.mark.parametrize("init", ["identity", "progressive"])
@pytest.mark.parametrize("start", ["identity", "forward"])
def test_two_models_are_weight_matching(init, start) -> None:
    spec, a, b = mlp(), mlp_state(0), mlp_state(1)
    pair = weight_matching(spec, a, b, seed=4, init=start)
    result = merge_many(spec, [a, b], seed=4, init=init, match={"init": start})
    assert result.permutations[0].is_identity and result.permutations[1] == pair.permutation
    assert result.objective == pytest.approx(pair.objective, rel=1e-6)
    assert 2 * result.distance == pytest.approx(pair.distance_after, rel=1e-6)
    assert alike(result.merged, interpolate(a, pair.permutation.apply(b), 0.5))
    weighted = merge_many(spec, [a, b], weights=(3, 1), seed=4, init=init, match={"init": start})
    assert alike(weighted.merged, interpolate(a, weighted.permutations[1].apply(b), 0.25))
    assert weighted.permutations[1] == pair.permutation and weighted.weights == (0.75, 0.25)
    pivot = match_to_pivot(spec, [a, b], seed=4, match={"init": start})
    assert pivot.permutations[1] == pair.permutation and alike(pivot.merged, result.merged)


@pytest.mark.parametrize("init", ["identity", "progressive"])
@pytest.mark.parametrize("weights", [None, (1.0, 2.0, 0.5, 0.1, 4.0)])
def test_the_distance_never_rises_and_is_what_it_says(init, weights) -> None:
    spec, states = convolutional(), [state_of(k) for k in range(5)]
    result = merge_many(spec, states, init=init, weights=weights)
    distances = [one.distance for one in result.history]
    assert all(b <= a * (1 + 1e-7) for a, b in pairwise(distances))
    assert distances[0] == result.distance_before and distances[-1] == result.distance < distances[0]
    assert result.converged and result.history[-1].number == result.passes

    moved = [p.apply(s) for p, s in zip(result.permutations, states, strict=True)]
    w = torch.tensor(result.weights, dtype=torch.float64)
    squares, products = 0.0, 0.0
    raw = weights or (1.0,) * 5
    for name in spec.axes:
        stack = torch.stack([m[name].double().reshape(-1) for m in moved])
        mean = w @ stack
        torch.testing.assert_close(result.merged[name].double().reshape(-1), mean, rtol=1e-5, atol=1e-6)
        if name not in spec.buffers:
            squares += float((w @ (stack - mean).square()).sum())
            gram = stack @ stack.T
            products += sum(raw[i] * raw[j] * float(gram[i, j]) for i in range(5) for j in range(i))
    assert result.distance == pytest.approx(squares**0.5, rel=1e-6)
    assert result.objective == pytest.approx(products, rel=1e-5)
    # It is an end: each is best where it is.
    again = merge_many(spec, states, weights=weights, init=result.permutations)
    assert again.permutations == result.permutations and again.passes == 1 and again.converged


def test_statistics_move_along_and_counters_are_the_firsts() -> None:
    spec, states = convolutional(), [state_of(k) for k in range(3)]
    result = merge_many(spec, states)
    for name in ("1.running_mean", "1.running_var"):
        expected = torch.stack([p.apply(s)[name] for p, s in zip(result.permutations, states, strict=True)])
        torch.testing.assert_close(result.merged[name], expected.mean(dim=0))
    assert torch.equal(result.merged["1.num_batches_tracked"], states[0]["1.num_batches_tracked"])
    # What the spec does not permute is averaged, too.
    torch.testing.assert_close(
        result.merged["8.bias"], torch.stack([s["8.bias"] for s in states]).mean(dim=0)
    )


def test_half_precision_is_averaged_in_float32() -> None:
    spec, state = mlp(), {n: t.half() for n, t in mlp_state(0).items()}
    copies = [spec.random(seed).apply(state) for seed in range(7)]
    result = merge_many(spec, copies)
    assert alike(result.merged, copies[0])
    assert {tensor.dtype for tensor in result.merged.values()} == {torch.float16}


def test_one_model_at_a_time_is_in_memory() -> None:
    spec = convolutional()
    most: dict[int, list[int]] = {}
    for n in (3, 9):
        alive: dict[int, int] = {}
        most[n] = [0, 0]
        states = [Counted(k, state_of(k), alive, most[n]) for k in range(n)]
        merge_many(spec, states, max_passes=3)
        assert sum(alive.values()) == 0
        assert most[n][0] == 1
    assert most[9] == most[3]


def test_files_are_open_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, states = convolutional(), [state_of(k) for k in range(4)]
    paths = [save_safetensors(tmp_path / f"{k}.safetensors", state) for k, state in enumerate(states)]
    opened, most, load = [0], [0], many_models.load_safetensors

    def closed() -> None:
        opened[0] -= 1

    def counted(path):
        state = load(path)
        opened[0] += 1
        most[0] = max(most[0], opened[0])
        weakref.finalize(state, closed)
        return state

    monkeypatch.setattr(many_models, "load_safetensors", counted)
    result = merge_many(spec, paths)
    assert most[0] == 1 and opened[0] == 0
    assert alike(result.merged, merge_many(spec, states).merged)


def test_deterministic_and_nothing_is_changed() -> None:
    spec, states = convolutional(), [state_of(k) for k in range(4)]
    before = [{n: t.clone() for n, t in s.items()} for s in states]
    one, other = (merge_many(spec, states, seed=7) for _ in range(2))
    assert alike(one.merged, other.merged) and one.permutations == other.permutations
    assert [p.distance for p in one.history] == [p.distance for p in other.history]
    assert all(alike(a, b) for a, b in zip(before, states, strict=True))
    assert merge_many(spec, states, seed=8).permutations != one.permutations


@pytest.mark.parametrize("init", ["identity", "progressive"])
def test_resumed_anywhere_it_ends_the_same_to_the_bit(tmp_path: Path, init) -> None:
    spec, states = convolutional(), [state_of(k) for k in range(4)]
    saved: list[Path] = []

    def keep(state: ManyState) -> None:
        saved.append(tmp_path / f"{len(saved)}.safetensors")
        state.save(saved[-1])

    whole = merge_many(spec, states, init=init, checkpoint=keep)
    assert len(saved) > 4
    for path in (*saved[:5], *saved[5:-1:9], saved[-1]):
        result = merge_many(spec, states, init=init, resume_from=ManyState.load(path))
        assert result.permutations == whole.permutations and alike(result.merged, whole.merged)
        assert [(p.distance, p.moved) for p in result.history] == [
            (p.distance, p.moved) for p in whole.history
        ]
        assert result.converged
    with pytest.raises(ConfigError, match="seed"):
        merge_many(spec, states, init=init, seed=1, resume_from=ManyState.load(saved[0]))
    with pytest.raises(ConfigError, match="models"):
        merge_many(spec, states[::-1], init=init, resume_from=ManyState.load(saved[0]))
    saved[0].write_bytes(saved[0].read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="0.safetensors"):
        ManyState.load(saved[0])


def test_a_model_is_added_to_a_finished_merge() -> None:
    spec, state = convolutional(), state_of(1)
    copies = [spec.random(seed).apply(state) for seed in range(4)]
    done = merge_many(spec, copies[:3])
    more = merge_many(spec, copies, init=done.permutations)
    assert alike(more.merged, copies[0]) and more.permutations[:3] == done.permutations
    assert alike(merge_many(spec, copies, init=done.permutations[:1]).merged, copies[0])


def test_added_models_leave_the_others_where_they_are() -> None:
    spec, states = convolutional(), [state_of(k) for k in range(5)]
    done = merge_many(spec, states[:3])
    events: list[dict] = []
    more = merge_many(spec, states, init=done.permutations, keep=True, progress=events.append)
    assert more.permutations[:3] == done.permutations and more.converged
    assert {event["model"] for event in events} == {3, 4}
    assert more.distance < merge_many(spec, states, init=[*done.permutations, spec.identity(), spec.identity()],
                                      keep=True).distance  # fmt: skip
    with pytest.raises(ConfigError, match="keep"):
        merge_many(spec, states, keep=True)


def test_permutations_are_saved_and_read_again(tmp_path: Path) -> None:
    spec, states = convolutional(), [state_of(k) for k in range(3)]
    done = merge_many(spec, states)
    path = tmp_path / "permutations.safetensors"
    save_permutations(path, done.permutations, {"models": "three"})
    assert tuple(load_permutations(path)) == done.permutations
    assert alike(merge_many(spec, states, init=load_permutations(path), keep=True).merged, done.merged)
    spec.identity().save(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="other.safetensors"):
        load_permutations(tmp_path / "other.safetensors")
    broken = dict(load_safetensors(path))
    name = next(iter(broken))
    save_safetensors(path, {**broken, name: torch.zeros_like(broken[name])}, load_safetensors(path).metadata)
    with pytest.raises(CheckpointError, match="is no permutation of 12"):
        load_permutations(path)


def test_the_mean_on_disk_is_the_mean_in_memory(tmp_path: Path) -> None:
    spec, states = convolutional(), [state_of(k) for k in range(4)]
    with_file = merge_many(spec, states, scratch=tmp_path)
    plain = merge_many(spec, states)
    assert with_file.permutations == plain.permutations and with_file.distance == plain.distance
    assert alike(with_file.merged, plain.merged)
    assert not list(tmp_path.iterdir()), "the file has no name"
    with pytest.raises(ConfigError, match="nowhere"):
        merge_many(spec, states, scratch=tmp_path / "nowhere")


def test_the_merge_is_streamed_to_a_file(tmp_path: Path) -> None:
    spec, alive, most = convolutional(), dict[int, int](), [0, 0]
    states = [Counted(k, state_of(k), alive, most) for k in range(5)]
    result = merge_many(spec, states, max_passes=1)
    most[:] = [0, 0]
    save_safetensors(tmp_path / "merged.safetensors", result.merged)
    assert most == [1, 1], "one tensor of one model at a time"
    assert alike(dict(load_safetensors(tmp_path / "merged.safetensors")), dict(result.merged))
    assert isinstance(result.merged, MeanState)
    assert result.merged.dtype_of("0.weight") == torch.float32 and result.merged.shape_of("8.bias") == (5,)


def test_events_and_giving_up() -> None:
    spec, states = mlp(), [mlp_state(k) for k in range(4)]
    events: list[dict] = []
    result = merge_many(spec, states, max_passes=1, progress=events.append)
    assert result.passes == 1 and not result.converged
    assert [e["step"] for e in events] == [1, 2, 3, 4] and {e["total"] for e in events} == {4}
    assert {"stage", "pass", "model", "objective", "moved", "seconds"} <= events[0].keys()
    assert result.to_dict()["models"] == 4


def test_bad_models_are_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_work(*args, **kwargs):
        raise AssertionError("matching began")

    for module in (many_rounds, many_pivot):
        monkeypatch.setattr(module, "weight_matching", no_work)
    spec, good = convolutional(), [state_of(k) for k in range(3)]

    def refuse(bad, error: type[Exception], told: str) -> None:
        for function in (merge_many, match_to_pivot):
            with pytest.raises(error, match=told):
                function(spec, [*good, bad])

    refuse(
        {**state_of(3), "0.weight": torch.full((12, 2, 3, 3), torch.nan)},
        CheckpointError,
        r"0\.weight.*\[3\].*NaN",
    )
    refuse({**state_of(3), "8.bias": torch.full((5,), torch.inf)}, CheckpointError, r"8\.bias.*\[3\]")
    refuse({**state_of(3), "0.weight": torch.zeros(12, 2, 5, 5)}, SpecMismatchError, r"0\.weight.*\[3\]")
    refuse({**state_of(3), "8.bias": torch.zeros(6)}, CheckpointError, r"8\.bias.*\[3\]")
    refuse({**state_of(3), "8.bias": torch.zeros(5).int()}, CheckpointError, r"8\.bias.*\[3\]")
    refuse({**state_of(3), "extra": torch.zeros(6)}, CheckpointError, r"extra.*\[3\]")
    refuse({n: t for n, t in state_of(3).items() if n != "0.weight"}, SpecMismatchError, r"\[3\].*0\.weight")
    refuse({n: t for n, t in state_of(3).items() if n != "8.bias"}, CheckpointError, r"8\.bias.*\[3\]")
    refuse(mlp_state(0), SpecMismatchError, r"\[3\]")
    refuse(tmp_path / "absent.safetensors", CheckpointError, "absent")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    refuse(tmp_path / "cut.safetensors", CheckpointError, "cut")
    whole = [{**s, "table": torch.arange(3)} for s in good]
    with pytest.raises(CheckpointError, match=r"table.*\[2\]"):
        merge_many(spec, [*whole[:2], {**whole[2], "table": torch.zeros(3).long()}])


def test_bad_options() -> None:
    spec, states = mlp(), [mlp_state(k) for k in range(3)]
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        (dict(weights=[1, 2]), "weights"),
        (dict(weights=[1, 2, 0]), "positive"),
        (dict(weights=[1, 2, float("nan")]), "positive"),
        (dict(init="forwards"), "init"),
        (dict(order="sideways"), "order"),
        (dict(max_passes=0), "max_passes"),
        (dict(anchor=3), "anchor"),
        (dict(match={"normalize": "tensor"}), "normalize"),
        (dict(match={"init": "random"}), "forward"),
        (dict(init=[spec.identity()] * 4), "permutations"),
    )
    for options, told in cases:
        with pytest.raises(ConfigError, match=told):
            merge_many(spec, states, **options)
    with pytest.raises(SpecMismatchError, match=r"\[1\]"):
        merge_many(spec, states, init=[spec.identity(), convolutional().identity()])
    for pivot in (3, -1, "worst"):
        with pytest.raises(ConfigError, match="pivot"):
            match_to_pivot(spec, states, pivot=pivot)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="nothing"):
        merge_many(spec, [])


@pytest.mark.usefixtures("real_pictures")
def test_the_experiment_runs(tmp_path: Path) -> None:
    main(sizes="2,3", width=16, epochs=1, cache=tmp_path / "cache", out=tmp_path)
    rows = json.loads((tmp_path / "merge_many.json").read_text())["rows"]
    names = ["members", "ensemble", "naive", "naive, REPAIR", "MergeMany", "MergeMany, REPAIR"]
    assert [row["method"] for row in rows] == 2 * [*names, "pivot", "pivot, REPAIR"]
    assert all(0 <= row["test"]["ece"] <= 1 for row in rows)
    assert (tmp_path / "merge_many.md").read_text().count("| MergeMany |") == 2
    assert (tmp_path / "merge_many_reliability.png").stat().st_size > 10_000
