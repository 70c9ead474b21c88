"""The estimate of a dry run: near pairs take a proof, unlike ones cost matrices."""

from __future__ import annotations

import pytest
import torch
from test_weight_matching import draw, free, noisy

from rebasin.matching.weights.estimate import about, matching_seconds, matmul_rate, near_share
from rebasin.spec import PermutationSpec

SPEC = PermutationSpec(
    (free("h", 512, ("in", 0), ("b", 0), ("out", 1)), free("small", 8, ("v", 0))),
    {"in": (512, 400), "b": (512,), "out": (300, 512), "v": (8, 3)},
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_a_near_pair_is_told_from_an_unlike_one_and_takes_less() -> None:
    a = draw(SPEC, 1)
    near, unlike = near_share(SPEC, a, noisy(a, 0.1)), near_share(SPEC, a, draw(SPEC, 2))
    assert near > 0 and unlike == 0
    assert near_share(SPEC, a, SPEC.random(3).apply(a)) == 0  # its neurons have to move
    assert matching_seconds(SPEC, 1e9, near=1.0) < matching_seconds(SPEC, 1e9) / 2
    assert near_share(SPEC, {}, {}) == 0


def test_seconds_follow_the_speed_of_the_machine() -> None:
    fast, slow = matching_seconds(SPEC, 1e12), matching_seconds(SPEC, 1e8)
    assert slow > 10 * fast > 0
    assert matmul_rate(0.01) > 1e8


@pytest.mark.parametrize("seconds, said", [(0.2, "1 s"), (61, "61 s"), (600, "10 min"), (7200, "2.0 h")])
def test_seconds_are_told_as_people_do(seconds: float, said: str) -> None:
    assert about(seconds) == said
