"""Arguments of wrong types: every public function, every argument of it, values of every kind; one sentence, or it
works.
"""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from test_misuse import BATCHES, SPEC, A, B, V, W, error_of
from torch import Tensor

import rebasin
from rebasin import evaluation, matching, merging, objectives, spec
from rebasin.arguments import kind_of, typed
from rebasin.errors import CheckpointError, ConfigError, RebasinError, SpecMismatchError
from rebasin.evaluation.many import compare
from rebasin.files import config_dir
from rebasin.merging.least_squares import repair_least_squares
from rebasin.merging.repair import repair, reset_statistics
from rebasin.merging.repair_closed_form import repair_closed_form
from rebasin.merging.zipit import repair_zipit
from rebasin.objectives import CrossEntropy, Denoising, Distillation, Reward
from rebasin.spec import Alignment, Permutation, PermutationSpec
from rebasin.types import LazyState, State, supply

LONGEST = 300

X = torch.randn(2, 4)
MANY = dict(spec=SPEC, states=[W, V])
PAIR = dict(spec=SPEC, model_a=A, model_b=B, batches=BATCHES)
WEIGHTS = dict(spec=SPEC, state_a=W, state_b=V)
REPAIRED = dict(spec=SPEC, model=A, merged=W, members=[W, V], batches=BATCHES)
NOISE = Denoising("flow")
SHORT = dict(objective=error_of, steps=1)
ALIGNMENT = SPEC.random_alignment(1)
MERGED = matching.match_to_mean(SPEC, [W, V])
STATES: list[matching.MatchState] = []
rebasin.weight_matching(SPEC, W, V, checkpoint=STATES.append)

CALLS: dict[Callable[..., Any], Mapping[str, Any]] = {
    rebasin.trace: dict(model=A),
    rebasin.verify: dict(model=A, spec=SPEC, x=X),
    rebasin.compose: dict(function=lambda net, x: net(x), net=A),
    rebasin.interpolate: dict(state_a=W, state_b=V, lam=0.5),
    rebasin.merge: dict(method="weighted_sum", states=[W, V]),
    rebasin.barrier: dict(model=A, state_a=W, state_b=V, evaluate=lambda model: 0.5, points=2),
    rebasin.weight_matching: WEIGHTS,
    rebasin.activation_matching: PAIR,
    matching.activation_alignment: PAIR,
    rebasin.straight_through: {**PAIR, **SHORT, "refine": 0, "init": "identity"},
    rebasin.learned_matching: {**PAIR, **SHORT, "init": "identity"},
    matching.sinkhorn_matching: {**PAIR, **SHORT, "init": "identity"},
    rebasin.merge_many: MANY,
    matching.weight_alignment: WEIGHTS,
    rebasin.auto_matching: {**PAIR, "objective": error_of},
    matching.auto_alignment: PAIR,
    matching.activation_and_weight: PAIR,
    matching.activation_then_weight: PAIR,
    matching.activation_statistics: PAIR,
    matching.match_statistics: dict(
        statistics=matching.activation_statistics(SPEC, A, B, BATCHES), state_a=W, state_b=V
    ),
    matching.match_to_mean: MANY,
    matching.match_to_pivot: MANY,
    matching.match_by_tree: MANY,
    matching.match_cycle_consistently: {**MANY, "max_steps": 2},
    matching.match_many_activations: {**MANY, "model": A, "batches": BATCHES},
    matching.match_by_maps: {**MANY, "by": "weights"},
    matching.straight_through_many: {**MANY, **SHORT, "model": A, "batches": BATCHES, "init": "identity"},
    matching.naive: WEIGHTS,
    matching.naive_mean: MANY,
    matching.exchange_losses: {**WEIGHTS, "permutation": SPEC.identity()},
    matching.cycle_error: dict(pairs={}),
    matching.load_permutations: dict(path="there is none"),
    matching.save_permutations: dict(permutations=[SPEC.identity()]),
    matching.prompt_activation_matching: dict(spec=SPEC, model_a=A, model_b=B, pipeline=None),
    merging.block_weights: dict(setting=0.5, names=list(W)),
    merging.diagonal_fisher: dict(model=A, objective=error_of, batches=BATCHES),
    compare: dict(model=A, objective=error_of, batches=BATCHES, members=[W, V], merges={"mean": W}),
    repair: REPAIRED,
    repair_closed_form: REPAIRED,
    repair_least_squares: REPAIRED,
    repair_zipit: REPAIRED,
    reset_statistics: dict(model=A, state=W, batches=BATCHES),
    objectives.teach: dict(problem=NOISE, model_a=A, model_b=B, conditions=[], shape=(4,)),
    CrossEntropy: {},
    Denoising: dict(prediction="flow"),
    Distillation: dict(prediction="flow"),
    Reward: dict(scorer=lambda images, prompts: images.mean(), decode=lambda x: x, problem=NOISE),
    Permutation: dict(spec=SPEC, index=SPEC.identity().index),
    SPEC.random: {},
    SPEC.contains: dict(permutation=SPEC.identity()),
    SPEC.summary: {},
    SPEC.identity().compose: dict(other=SPEC.random(1)),
    PermutationSpec.from_json: dict(text=SPEC.to_json()),
    SPEC.stuck: dict(state=W),
    SPEC.random_alignment: {},
    SPEC.identity().apply: dict(state=W),
    SPEC.identity().view: dict(state=W),
    SPEC.identity().save: dict(path="p.safetensors"),
    Permutation.load: dict(path="there is none"),
    Alignment.of: dict(permutation=SPEC.identity()),
    Alignment.random: dict(spec=SPEC),
    ALIGNMENT.without: dict(names=[]),
    ALIGNMENT.apply: dict(state=W),
    ALIGNMENT.view: dict(state=W),
    ALIGNMENT.compose: dict(other=ALIGNMENT),
    ALIGNMENT.is_close: dict(other=ALIGNMENT),
    ALIGNMENT.save: dict(path="p.safetensors"),
    Alignment.load: dict(path="there is none"),
    MERGED.members: dict(states=[W, V]),
    STATES[-1].save: dict(path="p.safetensors"),
    matching.MatchState.load: dict(path="there is none"),
}
"""Each function with what it needs to work."""

ELSEWHERE = {
    matching.assign, matching.linear_assignment,  # steps of matchings, made for each group
    objectives.checked,  # takes anything, and says so (test_misuse.py)
    spec.admits, spec.displaced, spec.first_leaf, spec.indices, spec.to_array,  # of the spec's own data
}  # fmt: skip

VALUES: dict[str, Any] = {
    "None": None, "true": True, "minus one": -1, "a fraction": 1.5, "NaN": float("nan"), "complex": 2 + 1j,
    "infinity": float("inf"), "huge": 10**400, "text": "a", "a digit": "3", "bytes": b"a", "numbers": [1],
    "texts": ["a", None], "nothing": [], "a tuple": (0.5, "a"), "a mapping": {"a": 1}, "an object": object(),
    "a state": W, "a model": A, "a function": lambda *given: None, "a scalar": torch.tensor(0.5),
    "a tensor": torch.ones(2), "an array": np.ones(2), "numpy's one": np.int64(1), "numpy's half": np.float32(0.5),
    "a type": torch.int32, "a path": Path("nowhere"), "a set": {1}, "a spec": SPEC, "a permutation": SPEC.random(2),
}  # fmt: skip

CALLS_BACK = {"evaluate", "progress", "checkpoint", "order", "function", "pipeline", "decode", "scorer"}
"""A model can be called, so who gives one as a function gets the model's own complaint."""


def name_of(function: Callable[..., Any]) -> str:
    return function.__qualname__


def arguments(function: Callable[..., Any]) -> Iterator[str]:
    """The names of the arguments, and of one that `**` takes, if it has a type."""
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind == inspect.Parameter.VAR_KEYWORD:
            yield from {"modules": ["net"]}.get(name, [])
        elif parameter.kind != inspect.Parameter.VAR_POSITIONAL:
            yield name


def told_by(job: Callable[[], Any]) -> str:
    try:
        job()
    except RebasinError as error:
        text = str(error)
        assert text.endswith(".") and "\n" not in text and len(text) <= LONGEST, text
        return text
    return ""


@pytest.mark.parametrize("function", CALLS, ids=name_of)
def test_wrong_types_work_or_are_told(
    function: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = dict(CALLS[function])
    if function is matching.save_permutations:
        given["path"] = "p.safetensors"
    if function is rebasin.trace:
        return  # what it takes is the model's
    if given.get("path") != "there is none" and function is not matching.prompt_activation_matching:
        assert not told_by(lambda: function(**given))
    failed = []
    for name in arguments(function):
        for kind, value in VALUES.items():
            if (name, kind) == ("pipeline", "a function") or (name in CALLS_BACK and kind == "a model"):
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    told_by(partial(function, **{**given, name: value}))
                except Exception as error:
                    failed.append(f"{name}={kind}: {type(error).__name__}: {str(error)[:150]}")
    assert not failed, "\n" + "\n".join(failed)


def public() -> dict[str, Callable[..., Any]]:
    found = {}
    for room in (rebasin, matching, merging, objectives, spec, evaluation):
        for name in room.__all__:
            function = getattr(room, name)
            if inspect.isfunction(function) and function not in ELSEWHERE:
                found[name] = function
    named = re.compile(r"(?:/function/|/options/|_target_: )(rebasin(?:\.\w+)+)")
    for path in [*(config_dir() / "algo").glob("*.yaml"), *(config_dir() / "objective").glob("*.yaml")]:
        for target in named.findall(path.read_text()):
            module, _, name = target.rpartition(".")
            if name != "image_reward":  # a scorer, of a package that need not be there
                found[name] = getattr(importlib.import_module(module), name)
    return found


PUBLIC = public()


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_function_is_tried_and_all_of_its_annotations_are_understood(name: str) -> None:
    function = PUBLIC[name]
    assert function in CALLS
    if function is not rebasin.trace:
        assert hasattr(function.__init__ if isinstance(function, type) else function, "__wrapped__")
    hints = get_type_hints(function)
    for argument, parameter in inspect.signature(function).parameters.items():
        assert argument in hints and kind_of(hints[argument]), parameter


api: Any = rebasin  # mistakes that a type checker would find, too


@pytest.mark.parametrize(
    ("job", "error", "told"),
    [
        (lambda: api.weight_matching(SPEC, W, V, seed="a"), ConfigError,
         "weight_matching takes a whole number as seed, not 'a'."),
        (lambda: api.weight_matching(SPEC, W, V, seed=-1), ConfigError, "seed is -1, but it must be at least 0."),
        (lambda: api.weight_matching(SPEC, W, V, seed=np.uint64(2**64 - 1)), ConfigError,
         "weight_matching takes a whole number as seed, not a number so large."),
        (lambda: api.weight_matching(SPEC, W, V, workers=0), ConfigError,
         "workers is 0, but it must be at least 1."),
        (lambda: api.weight_matching(SPEC, W, V, max_sweeps=True), ConfigError,
         "weight_matching takes a whole number as max_sweeps, not True."),
        (lambda: api.weight_matching(SPEC, W, V, init=3), ConfigError,
         "weight_matching takes one of identity, forward, random or a Permutation as init, not 3."),
        (lambda: api.weight_matching(SPEC, W, B), CheckpointError,
         "state_b is of type Net, but a state is wanted: model.state_dict()."),
        (lambda: api.weight_matching(A, W, V), SpecMismatchError,
         "weight_matching takes a PermutationSpec as spec, not an object of type Net."),
        (lambda: api.merge("weighted_sum", [W, B]), CheckpointError,
         "states[1] is of type Net, but a state is wanted: model.state_dict()."),
        (lambda: api.merge("weighted_sum", [W, V], weights=[0.5, "a"]), ConfigError,
         "merge takes a number as weights[1], not 'a'."),
        (lambda: api.interpolate(W, V, "0.5"), ConfigError, "interpolate takes a number as lam, not '0.5'."),
        (lambda: api.interpolate(W, V, 10**400), ConfigError,
         "interpolate takes a number as lam, not a number so large."),
        (lambda: api.barrier(A, W, V, 3), ConfigError, "barrier takes a function as evaluate, not 3."),
        (lambda: api.barrier(W, W, V, len), ConfigError,
         "barrier takes a model (torch.nn.Module) as model, not an object of type OrderedDict."),
        (lambda: api.verify(A, None, X), SpecMismatchError,
         "verify takes a PermutationSpec as spec, not None."),
        (lambda: api.compose(len, net=W), ConfigError,
         "compose takes a model (torch.nn.Module) as net, not an object of type OrderedDict."),
        (lambda: api.objectives.Denoising("flow", flow_timesteps="many"), ConfigError,
         "Denoising takes a whole number as flow_timesteps, not 'many'."),
    ],
)  # fmt: skip
def test_the_sentence_names_function_and_argument(job: Callable[[], Any], error: type, told: str) -> None:
    with pytest.raises(error) as caught:
        job()
    assert str(caught.value) == told


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    whole = api.weight_matching(SPEC, W, V, seed=3, max_sweeps=2)
    same = api.weight_matching(SPEC, W, V, seed=np.int64(3), max_sweeps=np.int32(2))
    assert same.permutation == whole.permutation
    half, scalar = (api.interpolate(W, V, lam)["a.weight"] for lam in (0.5, torch.tensor(0.5)))
    assert torch.equal(half, scalar)
    given: Any = np.array([0.25, 0.75])
    assert api.merge_many(SPEC, [W, V], weights=given).weights == (0.25, 0.75)


class Unread(LazyState):
    """A state none of whose tensors may be read."""

    def __getitem__(self, name: str) -> Tensor:
        raise AssertionError(f"{name} is read")


def test_no_lazy_entry_is_read_and_the_signature_stays() -> None:
    @typed
    def function(state: State, table: Mapping[str, int], states: Sequence[State], count: int = 1) -> int:
        """Counts."""
        return count

    lazy = Unread(W)
    assert function(lazy, lazy, [lazy, lazy], count=2) == 2  # pyright: ignore[reportArgumentType]
    assert function.__doc__ == "Counts." and list(inspect.signature(function).parameters)[-1] == "count"
    offered = {"state": lazy, "table": {}, "states": []}
    assert function(**supply(function, offered, {"count": 3}, what="x")) == 3
    with pytest.raises(TypeError, match="unexpected keyword argument 'sount'"):
        function(lazy, {}, [], sount=1)  # pyright: ignore[reportCallIssue]


CELLS = {cell.name: cell.size for cell in SPEC.cells.values()}
GOOD = {name: np.arange(size)[::-1] for name, size in CELLS.items()}
CELL, SIZE = next(iter(CELLS.items()))


@pytest.mark.parametrize(
    "index",
    [
        *({**GOOD, CELL: bad} for bad in (
            np.arange(SIZE + 1), np.arange(SIZE) - 1, np.zeros(SIZE, int), np.arange(SIZE) * 1.0, np.ones(SIZE, bool),
            np.arange(SIZE)[None], np.arange(SIZE) + 2**40, np.arange(SIZE, dtype=np.uint64) + 2**63, None, 3, "abc",
            [[0], [1, 2]], list("abc"), [True] * SIZE, np.array(list(range(SIZE)), object), torch.arange(SIZE) * 1.0,
        )),
        {**GOOD, "more": np.arange(2)}, {**GOOD, 3: np.arange(2)}, {}, None, [*GOOD.items()],
    ],
)  # fmt: skip
def test_what_is_no_permutation_is_told(index: Any) -> None:
    with pytest.raises(SpecMismatchError) as caught:
        Permutation(SPEC, index)
    told = str(caught.value)
    assert told.endswith(".") and "\n" not in told and len(told) <= LONGEST


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.int8, np.uint64, np.int64])
def test_whole_numbers_of_any_type_are_an_index(kind: Any) -> None:
    index = {name: kind(array.tolist()) for name, array in GOOD.items()}
    made = Permutation(SPEC, index)
    assert made == Permutation(SPEC, GOOD) and SPEC.contains(made)
    assert {p.dtype for p in made.index.values()} == {np.dtype(np.int64)}
    assert torch.equal(made.apply(V)["a.bias"], V["a.bias"].flip(0))
