"""The words and pictures of a report follow from the figures, also from bad ones."""

from __future__ import annotations

import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console as RichConsole

from rebasin.evaluation import Curve
from rebasin.evaluation.samples import Samples
from rebasin.reporting.answers import answers
from rebasin.reporting.console import Console
from rebasin.reporting.kinds import draw, pictures
from rebasin.reporting.loggers import Logger, both
from rebasin.reporting.metrics import metrics
from rebasin.reporting.numbers import number
from rebasin.reporting.page import render
from rebasin.reporting.results import environment, plain
from rebasin.reporting.samples import draw_samples, draw_xyz, save_samples
from rebasin.reporting.table import Table
from rebasin.types import ProgressEvent

pytestmark = pytest.mark.usefixtures("real_pictures")


def curve(height: float | None, accuracy: bool = False) -> dict[str, Any]:
    grid = np.linspace(0, 1, 5)
    losses = list(1 + (height or 0) * 4 * grid * (1 - grid))
    extra = {"accuracy": list(0.9 - 0.5 * grid * (1 - grid))} if accuracy else {}
    data = asdict(Curve.measured(list(grid), losses, extra))
    if height is None:  # what results.json makes of a loss that is no number
        data |= {"losses": [1.0, 1.0, None, 1.0, 1.0], "barrier": None, "barrier_mean": None}
    return data


def results(before: float | None, after: float | None, **changes: Any) -> dict[str, Any]:
    coverage = {"one": 0.999, "both": 0.9}
    check = {"max_relative_error": 2e-7, "passed": True, "groups": 3, "neurons": 60, "coverage": coverage}
    base = {
        "format": 1, "name": "net-weight_matching", "model": "net", "data": "digits", "seed": 0, "lam": 0.5,
        "algorithm": "weight_matching", "endpoints": {"a": "one", "b": "two"}, "aligned_part": "net",
        "spec": {"hash": "x", "groups": 3, "cells": 3, "neurons": 60, "pins": 2, "coverage": coverage},
        "verify": {"net": check},
        "match": {
            "objective": 5.0, "moved": 50, "neurons": 60, "converged": True, "seconds": 1.0, "sweeps": 1,
            "history": [{"sweep": 1, "objective": 5.0, "groups": 3, "moved": 50, "seconds": 1.0}],
        },
        "distance": {"naive": 3.0, "aligned": 2.0},
        "curves": {"heldout": {"naive": curve(before), "aligned": curve(after)}},
        "seconds": {"spec": 1.0, "verify": 1.0, "align": 1.0, "evaluate": 1.0, "total": 4.0},
        "environment": environment(), "config": {"seed": 0}, "command": "python -m rebasin.run",
    }  # fmt: skip
    return base | changes


def unmoved(**more: Any) -> dict[str, Any]:
    return {"match": results(0, 0)["match"] | {"moved": 0, "sweeps": 1} | more}


@pytest.mark.parametrize(
    ("case", "short", "words"),
    [
        (results(1.0, 0.01), "Yes", "from 1.00 to 0.0100, 1% of naive; it is gone. 50 of 60 neurons moved."),
        (results(1.0, 0.4), "Yes", "40% of naive; a part remains."),
        (results(1.0, 0.8), "A little", "80% of naive; most of it remains."),
        (results(1.0, 1.0), "No", "100% of naive: unchanged, within 5 %."),
        (results(1.0, 1.5), "No", "150% of naive: it is higher than without aligning."),
        (results(0.01, 0.01), "Nothing to do", "There was no barrier to remove"),
        (results(0.0, 0.0, **unmoved()), "Nothing to do", "No neuron moved, and there is no barrier"),
        (results(1.0, 1.0, **unmoved()), "No", "No neuron moved although there is a barrier"),
        (
            results(1.0, 1.0, algorithm="naive"),
            "Not aligned",
            "This is the baseline: the barrier on held-out",
        ),
        (results(None, 0.1), "Unclear", "not finite"),
    ],
)
def test_whether_it_helped_is_said_as_the_figures_have_it(case, short, words):
    legal, helped, _ = answers(case)
    assert (legal.short, helped.short) == ("Yes", short)
    assert words in helped.text


def test_a_failed_proof_and_an_unfinished_search_are_said():
    case = results(1.0, 0.1, **unmoved(converged=False))
    case["verify"]["net"] |= {"passed": False, "max_relative_error": 0.3}
    legal, _, cost = answers(case)
    assert (legal.short, legal.tone) == ("No", "bad")
    assert "0.30" in legal.text
    assert "It stopped before it converged." in cost.text


@pytest.mark.parametrize("accuracy", [False, True])
@pytest.mark.parametrize("before", [1.0, 0.0, None])
def test_every_kind_of_result_can_be_drawn(tmp_path, before, accuracy):
    case = results(before, 0.5)
    if accuracy:
        case["curves"] = {
            split: {kind: curve(0.5, accuracy=True) for kind in ("naive", "aligned")}
            for split in ("train", "heldout")
        }
    picture, page = draw(case, tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert ("accuracy at the midpoint" in text) == accuracy
    assert "Samples" not in text
    assert all(isinstance(value, float) for value in metrics(case).values())


def test_samples_are_on_the_page_when_they_are_in_the_folder(tmp_path):
    tile = Image.new("L", (8, 8), 99)
    save_samples(Samples(["a seven", ""], {"A": [tile, tile], "B": [tile, tile]}), tmp_path / "samples.png")
    _, page = draw(results(1.0, 0.5), tmp_path)
    assert page.read_text().count("data:image/png;base64,") == 2


def test_long_prompts_names_and_large_images_leave_the_grid_as_it_is() -> None:
    prompt, name = "masterpiece, best quality, " * 20, "A: " + "my_own_mix_" * 6
    small, large = (
        draw_samples(Samples([prompt, ""], {name: [tile] * 2, "B": [tile] * 2}))
        for tile in (Image.new("L", (8, 8)), Image.new("RGB", (512, 512)))
    )
    for fig in (small, large):
        width, height = fig.get_size_inches()
        boxes = [ax.get_position() for ax in fig.axes]
        assert all(0 < box.x0 < box.x1 < 1 and 0 < box.y0 < box.y1 < 1 for box in boxes)
        assert all(box.width * width == pytest.approx(box.height * height) for box in boxes)
        renderer = fig.canvas.get_renderer()  # pyright: ignore[reportAttributeAccessIssue]
        texts = [text.get_window_extent(renderer) for text in fig.texts]
        for text in texts:
            assert 0 <= text.x0 < text.x1 <= fig.bbox.x1 and 0 <= text.y0 < text.y1 <= fig.bbox.y1
    assert large.get_size_inches()[0] > small.get_size_inches()[0]
    seeds = {
        seed: Samples(["a", "b"], {"A": [Image.new("L", (8, 8), 50 * seed + i) for i in (0, 1)]})
        for seed in (0, 1)
    }
    fig = draw_xyz(seeds)
    assert [text.get_text() for text in fig.texts] == ["seed 0", "seed 1", "a", "seed 0", "seed 1", "b", "A"]
    shown = [ax.images[0].get_array() for ax in fig.axes]
    assert [int(np.asarray(image)[0, 0, 0]) for image in shown] == [0, 50, 1, 51]


def test_a_log_gets_a_line_of_progress_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(seldom: float, terminal: bool = False) -> list[str]:
        monkeypatch.setattr("rebasin.reporting.console.SELDOM", seldom)
        file = io.StringIO()
        shown = Console(RichConsole(file=file, force_terminal=terminal, highlight=False, width=200))
        with shown.stage("endpoints"):
            for step in range(1, 4):
                shown.progress(ProgressEvent(stage="epoch of seed 0", step=step, total=3, loss=0.5))
        return file.getvalue().splitlines()

    assert told(0.0) == [
        "endpoints 0 s: epoch of seed 0 1/3, loss 0.500000",
        "endpoints 0 s: epoch of seed 0 2/3, loss 0.500000, 0 s left",
        "endpoints 0 s: epoch of seed 0 3/3, loss 0.500000, 0 s left",
        "endpoints    0.0 s",
    ]
    assert len(told(60.0)) == 1 and not [
        line for line in told(0.0, terminal=True) if line.startswith("endpoints 0 s:")
    ]


def test_what_an_earlier_run_left_in_the_folder_is_not_shown(tmp_path):
    stale = ("search.png", "samples.png", "steps.png", "blocks.png", "reliability.png", "methods.png")
    for name in stale:
        save_samples(Samples(["an old one"], {"A": [Image.new("L", (8, 8))]}), tmp_path / name)
    for case, shown in (
        (results(1.0, 0.5, pictures=[]), 1),
        (results(1.0, 0.5, pictures=["samples.png"]), 2),
        (results(1.0, 0.5), 2),  # of a version that did not tell: it may have had samples, but was no search
    ):
        _, page = draw(case, tmp_path)
        text = page.read_text()
        assert text.count("data:image/png;base64,") == shown
        assert "<h2>The search</h2>" not in text and "while it searched" not in text
        console = RichConsole(record=True, file=io.StringIO(), width=200)
        Console(console).summary(case, tmp_path, pictures(case))
        told = console.export_text()
        assert "curve.png" in told and ("samples.png" in told) == (shown == 2)
        assert not any(name in told for name in stale if name != "samples.png")


def test_a_table_is_the_same_on_the_page_in_markdown_and_in_the_terminal():
    rows = [{"name": "a", "loss": "1.0", "none": ""}, {"name": "b <i>", "loss": "12", "none": ""}]
    found = Table.of(rows, {"name": "merge", "none": "unused", "loss": "loss"}, strong="loss")
    assert found.markdown() == "| merge | loss |\n| --- | --: |\n| a | 1.0 |\n| b <i> | 12 |\n"
    console = RichConsole(file=io.StringIO(), record=True, width=6, soft_wrap=True)
    console.print(found.terminal())  # whole, however narrow the terminal
    assert [line.split() for line in console.export_text().splitlines()] == [
        ["merge", "loss"], ["a", "1.0"], ["b", "<i>", "12"],
    ]  # fmt: skip
    html = render("many", r=many(), table=found, verdict="", worst="0", passes=found, pictures={}, machine={},
                  config="")  # fmt: skip
    assert '<tr><td>b &lt;i&gt;</td><td class="n"><b>12</b></td></tr>' in html


def many() -> dict[str, Any]:
    base = results(1.0, 0.5)
    return base | {"kind": "many", "models": ["a", "b"], "match": base["match"] | {"passes": 1}}


def test_listeners_take_plain_dicts_of_algorithms_of_the_user():
    seen: list[Any] = []
    console = Console(RichConsole(file=io.StringIO(), width=200))
    progress = both(console.progress, Logger().event, seen.append)
    with console.stage("align"):
        progress({"stage": "mine", "step": 1, "total": 4, "objective": 2.5})  # type: ignore[arg-type]
        progress(ProgressEvent("ours", 2, 4, objective=2.5))
    assert [event["step"] for event in seen] == [1, 2]


def test_names_from_outside_are_escaped(tmp_path):
    _, page = draw(results(1.0, 0.5, endpoints={"a": "<script>alert(1)</script>", "b": "b"}), tmp_path)
    assert "<script>" not in page.read_text()


def test_whatever_a_job_measured_becomes_json():
    told = {np.int64(3): np.float32(0.5), (1, 2): (float("inf"), True, None), Path("x"): Path("y")}
    assert plain(told) == {"3": 0.5, "(1, 2)": [None, True, None], "x": "y"}


def test_metrics_have_stable_names():
    case = results(1.0, 0.25)
    found = metrics(case)
    assert found["barrier/heldout/loss"] == 0.25
    assert found["naive/barrier/heldout/loss"] == 1.0
    assert found["midpoint/heldout/loss"] == 1.25
    assert found["match/l2_before"] == 3.0
    assert found["verify/net"] == 2e-7


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234.5, "1234"), (12.345, "12.3"), (0.98765, "0.988"), (0.0321, "0.0321"),
     (0.00098, "0.000980"),     (1e-7, "1.00e-07"), (-0.5, "-0.500"), (None, "not finite")],
)  # fmt: skip
def test_numbers_have_three_significant_digits(value, text):
    assert number(value) == text
