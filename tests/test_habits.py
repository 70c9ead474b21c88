"""What people are used to: methods in plain words, presets, time left, results in one line, pages that print."""

from __future__ import annotations

import importlib
import inspect
import io
import json
import pkgutil
import re
import time
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cli_files import rebasin
from rich.console import Console as RichConsole

from rebasin.jobs.skeleton import expected
from rebasin.merging import METHODS
from rebasin.merging.block_settings import preset_names
from rebasin.merging.situations import SITUATIONS, WORDS, table
from rebasin.reporting import search_page
from rebasin.reporting.console import Console
from rebasin.reporting.results import FORMAT
from rebasin.types import LINE, _in_one_line
from tests.golden.public import ROOMS
from tests.golden.sentences import ROOT


def test_every_method_is_told_in_plain_words_and_the_docs_have_the_same_table() -> None:
    assert set(WORDS) == set(METHODS)
    assert all(len(words) < 120 and words.endswith(".") for words in WORDS.values())
    assert {name for one in SITUATIONS.values() for name in one.methods} <= set(METHODS)
    assert table() in (ROOT / "docs" / "merge_methods.md").read_text(encoding="utf-8")


def test_methods_for_what_somebody_has() -> None:
    said = rebasin("methods", "--for", "finetunes")
    assert said.index("add_difference") < said.index("ties_sum") and "--base BASE" in said
    assert "--option score=package.module:function" in rebasin("methods", "--for", "soup")
    assert "A B C -o merged.safetensors --method clip" in rebasin("methods", "--for", "overshoot")
    assert all(name in rebasin("methods", "--for", "list") for name in SITUATIONS)
    assert "did you mean 'finetunes'" in rebasin("methods", "--for", "finetune", expect=2)
    assert "give one of them" in rebasin("methods", "slerp", "--presets", expect=2)
    assert "in words   Mixes the models like paint" in rebasin("methods", "weighted_sum")


def test_presets_are_drawn() -> None:
    lines = rebasin("methods", "--presets").splitlines()
    assert all(any(line.startswith(f"{name} ") for line in lines) for name in preset_names())
    assert "█▇▇▆▅▅▄▃▃▂▁▁" in next(line for line in lines if line.startswith("GRAD_V "))


def modules() -> list[ModuleType]:
    found = []
    for room in ("matching", "merging", "evaluation", "tracing", "spec", "adapters"):
        path = importlib.import_module(f"rebasin.{room}").__path__
        for one in pkgutil.walk_packages(path, f"rebasin.{room}."):
            found.append(importlib.import_module(one.name))
    return found


@pytest.fixture(scope="module")
def classes() -> dict[str, list[type]]:
    """Name -> the dataclasses of that name."""
    found: dict[str, list[type]] = {}
    for module in modules():
        for name, one in vars(module).items():
            if isinstance(one, type) and is_dataclass(one) and one.__module__ == module.__name__:
                found.setdefault(name, []).append(one)
    return found


def test_what_a_public_function_returns_is_shown_in_one_line(classes: dict[str, list[type]]) -> None:
    returned = set()
    for room in ("", *(f".{name}" for name in ROOMS)):
        module = importlib.import_module(f"rebasin{room}")
        for name in module.__all__:
            function = getattr(module, name)
            if inspect.isfunction(function):
                returned |= set(re.findall(r"\w+", str(inspect.signature(function).return_annotation)))
    results = [
        one
        for name in returned
        for one in classes.get(name, ())
        if name.endswith(("Result", "State", "Report")) and not issubclass(one, Mapping)
    ]
    assert len(results) > 8
    assert not [one for one in results if one.__repr__ is not _in_one_line]


def test_the_line_is_short_whatever_a_result_holds(classes: dict[str, list[type]]) -> None:
    brief = [one for several in classes.values() for one in several if one.__repr__ is _in_one_line]
    assert len(brief) > 25
    values: list[Any] = [
        torch.zeros(3, 4), {"a": 1}, tuple(range(100)), "text\n" * 99, 1.23456789, None, (0.5, 1.0), object(), True,
    ]  # fmt: skip
    for kind in brief:
        result = object.__new__(kind)
        for i, one in enumerate(fields(kind)):
            object.__setattr__(result, one.name, values[i % len(values)])
        text = repr(result)
        assert "\n" not in text and len(text) <= LINE and text.startswith(f"{kind.__name__}("), text


def test_a_bar_counts_down_from_the_first_second() -> None:
    text = io.StringIO()
    console = Console(RichConsole(file=text, force_terminal=True, width=120, highlight=False))
    assert console.remaining() == ""
    console.expect(200, "as the last such run took")
    assert "About 3 min in all, as the last such run took." in text.getvalue()
    assert console.remaining() == "3 min left in all"
    with console.stage("align"):  # nothing is told yet
        time.sleep(0.3)
    assert "left in all" in text.getvalue()
    console.expect(0.0)
    assert console.remaining() == "longer than expected"
    console.expect(None)
    assert console.remaining() == ""


def test_a_run_expects_what_the_last_one_took(tmp_path: Path) -> None:
    config = {"model": {"name": "mlp"}, "algo": {"name": "ste"}, "seed": 1, "logger": "none"}

    def leave(name: str, seconds: float, **options: Any) -> None:
        (tmp_path / name).mkdir()
        told = {"name": "mlp", "algorithm": "ste", "command": "", "environment": {"versions": {}}}
        results = {**told, "format": FORMAT, "config": {**config, **options}, "seconds": {"total": seconds}}
        (tmp_path / name / "results.json").write_text(json.dumps(results))

    assert expected(tmp_path / "new", config) == (None, "")
    leave("damaged", 1.0)
    (tmp_path / "damaged" / "results.json").write_text("{")
    leave("other", 7.0, algo={"name": "naive"})
    assert expected(tmp_path / "new", config) == (None, "")
    leave("seed", 30.0, seed=2)
    assert expected(tmp_path / "new", config) == (30.0, "as the last such run, with other options, took")
    leave("same", 50.0, logger="wandb")
    assert expected(tmp_path / "new", config) == (50.0, "as the last such run took")


def test_a_trial_of_the_same_merge_is_told_once() -> None:
    aim = {"name": "loss", "sign": 1}
    trial = {"error": None, "start": None, "parameters": {"share": 0.5}}
    results: Any = {
        "aims": [aim],
        "trials": [
            {**trial, "number": 0, "values": [1.0], "same_as": None},
            {**trial, "number": 1, "values": [2.0], "same_as": None},
            {**trial, "number": 2, "values": [1.0], "same_as": 0},
            {**trial, "number": 3, "values": [1.0], "same_as": 0},
        ],
    }
    assert [line[0] for line in search_page._trials(results).lines] == ["0, again 2, again 3", "1"]


def test_the_winner_has_one_line() -> None:
    gap = {"mean": -0.1, "low": -0.2, "high": -0.05}
    one = {"mean": 0.5, "low": 0.4, "high": 0.6}
    judged = {"name": "loss", "sign": 1, "models": {"winner": one, "seed 0": one, "plain average": one}}
    judged["differences"] = {"plain average": gap, "seed 0": {"mean": 0.0, "low": 0.0, "high": 0.0}}
    results: Any = {"judged": [judged], "winner": {"label": "seed 0"}}
    assert [line[1] for line in search_page._heldout(results).lines] == ["winner: seed 0", "plain average"]


def test_every_page_has_one_frame_with_one_way_to_print() -> None:
    pages = [
        p
        for p in (ROOT / "rebasin" / "reporting").glob("*.html.j2")
        if not p.name.startswith(("kit", "page"))
    ]
    assert len(pages) > 4
    for page in pages:
        assert page.read_text(encoding="utf-8").startswith('{% extends "page.html.j2" %}'), page.name
        assert "<style" not in page.read_text(encoding="utf-8")
    frame = (ROOT / "rebasin" / "reporting" / "page.html.j2").read_text(encoding="utf-8")
    assert "@media print" in frame and "details-content" in frame and "max-width: 40rem" in frame
    tables = "".join(
        p.read_text(encoding="utf-8") for p in (ROOT / "rebasin" / "reporting").glob("*.html.j2")
    )
    assert tables.count("<table>") == tables.count(
        '<div class="scroll"><table>'
    )  # none is wider than the page
