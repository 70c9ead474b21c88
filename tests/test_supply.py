"""A function that a name stands for gets what its signature asks for, and an option that it lacks is told so."""

from __future__ import annotations

from typing import Any

import pytest

from rebasin.errors import ConfigError, unknown
from rebasin.types import REQUIRED, Maker, arguments_of, check_options, supply


def function(spec: str, states: list[str], *more: Any, strength: int, width: int = 3, **rest: Any) -> None:
    """Takes two things of a run and two options."""


def never() -> Any:
    raise AssertionError("made, though nothing asks for it")


def test_a_function_gets_what_it_asks_for_and_nothing_else_is_made() -> None:
    offered = {"spec": "S", "states": Maker(lambda: ["A", "B"]), "seed": 0, "model": Maker(never)}
    found = supply(function, offered, {"strength": 2}, what="x")
    assert found == {"spec": "S", "states": ["A", "B"], "strength": 2}


def test_an_option_wins_over_what_is_offered() -> None:
    offered = {"spec": "S", "states": [], "width": Maker(never)}
    assert supply(function, offered, {"strength": 2, "width": 5}, what="x")["width"] == 5


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"strenth": 2}, "algo=x has no option 'strenth'; did you mean 'strength'? It has strength, width."),
        ({"strength": 2, "q": 1}, "algo=x has no option 'q'; it has strength, width."),
        ({}, "algo=x needs the option 'strength', which is not set."),
    ],
)
def test_an_option_too_many_or_too_few_is_told_with_the_nearest(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        supply(function, {"spec": "S", "states": []}, options, what="algo=x")
    assert str(caught.value) == told


def test_arguments_are_the_named_ones_with_their_defaults() -> None:
    assert arguments_of(function, ("spec", "states")) == {"strength": REQUIRED, "width": 3}
    assert check_options("x", {"strength": 1}, arguments_of(function, ("spec", "states"))) == {
        "strength": 1,
        "width": 3,
    }


def test_what_has_no_names_at_all_says_none() -> None:
    assert (
        str(unknown("There is no study 'a'", "a", [], "there are"))
        == "There is no study 'a'; there are none."
    )
