"""MergeMany with workers: one is the sequential merge to the bit, several never raise the distance, killed ones change
nothing. Here they are processes; the same on a Ray cluster of two workers needs the extra `ray`:

    python -m pytest tests/test_ray.py -m ray
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_files import rebasin
from test_merge_many import convolutional, state_of
from torch import Tensor, nn

from rebasin import trace
from rebasin.checkpoints import save_safetensors
from rebasin.checkpoints.random_weights import random_checkpoint
from rebasin.cli.alignment import FileState
from rebasin.errors import ConfigError
from rebasin.integrations import ray_cluster
from rebasin.matching.many.mean import match_to_mean
from rebasin.matching.many.result import ManyResult, ManyState
from rebasin.matching.many.rounds import Workers
from rebasin.models import build
from rebasin.spec import PermutationSpec
from rebasin.tensors import load_safetensors


def small() -> nn.Module:
    return build("mlp", inputs=12, width=12, classes=5, depth=2)


@cache
def mlp() -> PermutationSpec:
    return trace(small(), torch.zeros(2, 12))


def mlp_state(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return small().state_dict()


@cache
def two_workers() -> tuple[ManyResult, list[ManyState]]:
    """Four models, two at once, and all states that were kept."""
    kept: list[ManyState] = []
    states = [mlp_state(seed) for seed in range(4)]
    return match_to_mean(mlp(), states, workers=Here(2), checkpoint=kept.append), kept


def dying(function: Callable[[Any, Any], Any], marker: Path, common: Any, one: Any) -> Any:
    """The first call ends its process."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return function(common, one)
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Here:
    """Workers that are none: everything is pickled and done at once."""

    count: int = 1
    calls: list[int] = field(default_factory=list)

    def call(self, function: Callable[[Any, Any], Any], common: Any, each: Sequence[Any]) -> Sequence[Any]:
        self.calls.append(len(each))
        return [
            pickle.loads(pickle.dumps(function(*pickle.loads(pickle.dumps((common, one)))))) for one in each
        ]


@dataclass
class Processes:
    """Two processes of this machine; a pool of which one has ended is made anew."""

    count: int = 2
    ended: int = 0

    def call(self, function: Callable[[Any, Any], Any], common: Any, each: Sequence[Any]) -> Sequence[Any]:
        while True:
            with ProcessPoolExecutor(self.count, get_context("fork")) as pool:
                try:
                    return list(pool.map(partial(function, common), each))
                except BrokenProcessPool:
                    self.ended += 1


@dataclass(frozen=True)
class Killed:
    """Other workers, the first of which ends at its first call."""

    workers: Any
    marker: Path

    @property
    def count(self) -> int:
        return self.workers.count

    def call(self, function: Callable[[Any, Any], Any], common: Any, each: Sequence[Any]) -> Sequence[Any]:
        return self.workers.call(partial(dying, function, self.marker), common, each)


def same(a: ManyResult, b: ManyResult) -> bool:
    """To the bit."""
    whole = all(tensor.equal(b.merged[name]) for name, tensor in a.merged.items())
    distances = [one.distance for one in a.history] == [one.distance for one in b.history]
    return whole and distances and a.permutations == b.permutations and a.objective == b.objective


@pytest.mark.parametrize(("start", "init"), [("forward", "identity"), ("identity", "progressive")])
def test_one_worker_is_the_sequential_merge_to_the_bit(start: str, init: Any) -> None:
    states = [state_of(seed) for seed in range(4)]
    given: Any = {"init": init, "match": {"init": start}, "weights": [1.0, 2.0, 1.5, 1.0]}
    workers = Here(1)
    assert isinstance(workers, Workers)
    one = match_to_mean(convolutional(), states, workers=workers, **given)
    assert same(one, match_to_mean(convolutional(), states, **given)) and set(workers.calls) == {1}


@pytest.mark.parametrize("count", [2, 8])
def test_several_never_raise_the_distance_and_end_where_no_model_comes_nearer(count: int) -> None:
    states, workers = [mlp_state(seed) for seed in range(4)], Here(count)
    found = match_to_mean(mlp(), states, workers=workers)
    distances = [one.distance for one in found.history]
    assert found.converged and max(workers.calls) == min(count, 4)
    assert all(b <= a * (1 + 1e-6) for a, b in pairwise(distances)) and distances[-1] < 0.99 * distances[0]
    again = match_to_mean(mlp(), states, init=found.permutations)  # one after the other, from there
    assert again.permutations == found.permutations
    assert count > 2 or same(found, two_workers()[0])


def test_permuted_copies_are_found_at_once() -> None:
    own = mlp_state(0)
    states = [own, *(mlp().random(seed).apply(own) for seed in (1, 2, 3))]
    found = match_to_mean(mlp(), states, init="progressive", workers=Here(3))
    assert all(tensor.equal(own[name]) for name, tensor in found.merged.items())


def test_resumed_between_rounds_it_ends_the_same_to_the_bit(tmp_path: Path) -> None:
    states, (whole, kept) = [mlp_state(seed) for seed in range(4)], two_workers()
    for state in kept[1 :: len(kept) // 3]:
        state.save(tmp_path / "state")
        state = ManyState.load(tmp_path / "state")
        assert same(match_to_mean(mlp(), states, workers=Here(2), resume_from=state), whole)
    with pytest.raises(ConfigError):
        match_to_mean(mlp(), states, workers=Here(3), resume_from=kept[0])


def test_a_killed_process_changes_nothing(tmp_path: Path) -> None:
    files = [save_safetensors(tmp_path / f"{seed}.safetensors", mlp_state(seed)) for seed in range(4)]
    pool = Processes()
    found = match_to_mean(mlp(), files, workers=Killed(pool, tmp_path / "killed"))
    # The same files: where their tensors lie in memory is not where others do, which may change a sum's last bit.
    assert pool.ended == 1 and same(found, match_to_mean(mlp(), files, workers=Here(2)))


def test_a_component_travels_by_the_name_of_its_file(tmp_path: Path) -> None:
    state = dict(random_checkpoint("sd1", 8, depth=1, vocabulary=50))
    file = save_safetensors(tmp_path / "model.safetensors", state)
    sent = FileState(file, None, "text_encoder")
    told = pickle.dumps(sent)
    there = pickle.loads(told)
    assert len(told) < 1000 and list(there) == list(sent)
    name = next(iter(there))
    assert there[name].equal(sent[name]) and there.shape_of(name) == sent.shape_of(name)
    joint = pickle.loads(pickle.dumps(FileState(file, None, "joint", ("text_encoder", "unet"))))
    assert {name.split(".")[0] for name in joint} == {"text_encoder", "unet"}


def test_what_ray_has_nothing_to_do_for_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*more: str) -> str:
        given = ["merge", *more, "-o", tmp_path / "o.safetensors", "--ray", "auto"]
        return " ".join(rebasin(*given, expect=2).split())

    nothing = "--ray matches several models at once; leave it out where less than two are to be matched."
    assert nothing in said("a", "b") and nothing in said("a", "b", "c", "--no-align")
    monkeypatch.setattr(ray_cluster, "find_spec", lambda name: None)
    assert "--ray needs Ray, which is not installed: pip install 'git-rebasin[ray]'." in said("a", "b", "c")


class Slow:
    """Ray, as far as a cluster's start goes, where the first ones take too long."""

    def __init__(self, late: int) -> None:
        self.late, self.addresses, self.ended = late, list[str | None](), 0

    def is_initialized(self) -> bool:
        return False

    def init(self, address: str | None, **_: Any) -> None:
        self.addresses.append(address)
        if len(self.addresses) <= self.late:
            raise Exception(
                "The current node timed out during startup. This could happen because of something."
            )

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}

    def shutdown(self) -> None:
        self.ended += 1


def test_a_cluster_that_takes_too_long_is_started_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(address: str, late: int) -> Slow:
        ray = Slow(late)
        monkeypatch.setattr(ray_cluster, "_ray", lambda: ray)
        monkeypatch.setattr(ray_cluster, "require_ray", lambda option: None)
        with contextlib.suppress(ConfigError), ray_cluster.on_ray(address, 3, 1) as workers:
            assert workers.count == 2 and late < 2
        return ray

    once = start("auto", 1)
    assert once.addresses == [None, None] and once.ended == 2
    assert start("auto", 2).addresses == [None, None]
    assert start("there:6379", 1).addresses == ["there:6379"]


# On Ray -----------------------------------------------------------------------------------------------------

SECONDS = 240
"""For a cluster of two workers to start and for a test on it; alone on two cores they take a tenth."""


@contextmanager
def limited(seconds: int = SECONDS) -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"It was not done after {seconds} seconds.")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Workers]:
    """Two workers of one core each on a cluster that starts and ends here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_worker_niceness", "0")  # else they starve beside other work
        patch.setenv("RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES", str(200_000_000))
        patch.setenv(
            "PYTHONPATH", os.pathsep.join(filter(None, sys.path))
        )  # this file is imported there, too
        with contextlib.ExitStack() as stack:
            with limited():
                workers = stack.enter_context(ray_cluster.on_ray("auto", 2, 1))
            yield workers


@pytest.mark.ray
def test_two_ray_workers_one_of_them_killed(tmp_path: Path, cluster: Workers) -> None:
    assert cluster.count == 2
    files = [save_safetensors(tmp_path / f"{seed}.safetensors", mlp_state(seed)) for seed in range(4)]
    with limited():
        found = match_to_mean(mlp(), files, workers=Killed(cluster, tmp_path / "killed"))
        with pytest.raises(ConfigError, match=r"matching of many models has no option 'nope'"):
            match_to_mean(mlp(), files, workers=cluster, match={"nope": 1})
    assert (tmp_path / "killed").exists() and same(found, match_to_mean(mlp(), files, workers=Here(2)))


@pytest.mark.ray
def test_the_command_on_ray(tmp_path: Path, cluster: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        state = dict(random_checkpoint("sd1", 16, depth=1, vocabulary=50, seed=seed))
        save_safetensors(tmp_path / f"{seed}.safetensors", state)
    monkeypatch.chdir(tmp_path)
    files = [f"{seed}.safetensors" for seed in range(3)]
    given = [*files, "--only", "text_encoder", "--threads", "1"]
    with limited():
        rebasin("merge", *given, "-o", "ray.safetensors", "--ray", "auto")
    rebasin("merge", *given, "-o", "one.safetensors")
    a, b = load_safetensors("ray.safetensors"), load_safetensors("one.safetensors")
    assert list(a) == list(b) and all(Path(f"ray.permutation-{n}.safetensors").exists() for n in (2, 3))
