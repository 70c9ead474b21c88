"""Our methods and sd-mecha's: its stored results, and the package itself."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rebasin.errors import ConfigError
from rebasin.merging import METHODS, merge

STORED: dict[str, Any] = json.loads(
    (Path(__file__).parent / "data" / "sd_mecha.json").read_text(encoding="utf-8")
)
MODELS = [torch.tensor(m, dtype=torch.float64) for m in STORED["models"]]
CASES = STORED["cases"]

installed = pytest.mark.skipif(importlib.util.find_spec("sd_mecha") is None, reason="needs sd-mecha")

SAME_NAME = {
    "weighted_sum", "slerp", "add_difference", "geometric_sum", "multiply_quotient", "add_cosine_a", "add_cosine_b",
    "crossover", "geometric_median", "rotate",
}  # fmt: skip
"""Methods that sd-mecha has under the same name, with the same weights."""

SPELLED_ALIKE = [
    number
    for number, case in enumerate(CASES)
    if case["method"] in SAME_NAME
    and "clamp" not in case["options"]
    and not (case["method"] == "rotate" and case["base"] is not None)
]


def states(*numbers: int) -> list[dict[str, Tensor]]:
    return [{"layer.weight": MODELS[n]} for n in numbers]


def ours(case: dict[str, Any], prefix: str = "") -> Tensor:
    base = None if case["base"] is None else states(case["base"])[0]
    merged = merge(prefix + case["method"], states(*case["models"]), base=base, **case["options"])
    return merged["layer.weight"]


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: f"{CASES[i]['method']}-{i}")
def test_we_agree_with_sd_mecha(number: int) -> None:
    expected = torch.tensor(CASES[number]["expected"], dtype=torch.float64)
    torch.testing.assert_close(ours(CASES[number]), expected, rtol=0, atol=1e-6)


def test_the_stored_results_cover_what_both_have() -> None:
    covered = {case["method"] for case in CASES}
    only_ours = {"distribution_crossover", "fisher", "greedy_soup", "ema", "polyak", "wise_ft"}
    assert covered | only_ours == set(METHODS)


def test_without_the_package_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "sd_mecha"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sd_mecha", None)
    with pytest.raises(ConfigError, match=r"git-rebasin\[mecha\]"):
        merge("mecha:slerp", states(0, 1))


@installed
@pytest.mark.parametrize("number", SPELLED_ALIKE, ids=lambda i: f"{CASES[i]['method']}-{i}")
def test_its_methods_called_through_the_bridge_give_the_stored_results(number: int) -> None:
    case = CASES[number]
    expected = torch.tensor(case["expected"], dtype=torch.float64)
    torch.testing.assert_close(ours(case, "mecha:"), expected, rtol=0, atol=1e-6)


@installed
def test_methods_on_differences_get_differences() -> None:
    a, b, base = states(0, 1, 2)
    theirs = merge("mecha:ties_sum", [a, b], base=base, k=1.0, vote_sgn=True)["layer.weight"]
    torch.testing.assert_close(theirs, merge("ties_sum", [a, b], base=base, k=1.0)["layer.weight"])
    low_rank = merge("mecha:truncate_rank", [a], base=base, rank=1)["layer.weight"] - base["layer.weight"]
    assert torch.linalg.matrix_rank(low_rank) == 1
    with pytest.raises(ConfigError, match="base"):
        merge("mecha:ties_sum", [a, b])
    with pytest.raises(ConfigError, match="tensor by tensor"):
        merge("mecha:subtract", [a, b])
    with pytest.raises(ConfigError, match="no merge method 'nothing'"):
        merge("mecha:nothing", [a, b])


@installed
def test_our_states_are_inputs_of_its_recipes() -> None:
    from rebasin.merging.mecha import mecha_model

    sd_mecha: Any = importlib.import_module("sd_mecha")  # its decorators hide the signatures
    a, b = (mecha_model(merge("weighted_sum", [s, s]), "ours-test") for s in states(0, 1))
    result: dict[str, Tensor] = {}
    recipe = sd_mecha.slerp(a, b, alpha=0.3)
    sd_mecha.merge(recipe, merge_dtype=torch.float64, output_dtype=torch.float64, output=result)
    expected = merge("slerp", states(0, 1), weights=0.3)["layer.weight"]
    torch.testing.assert_close(result["layer.weight"], expected, rtol=0, atol=1e-6)
