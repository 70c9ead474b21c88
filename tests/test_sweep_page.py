"""A sweep's page says what differs between runs, and no more; runs that start together have folders of their own."""

from __future__ import annotations

import re

from hydra import compose, initialize_config_dir

import rebasin.jobs.configuration  # noqa: F401 (what resolves names in the configs)
from rebasin.files import config_dir
from rebasin.reporting.sweep import Run, Sweep
from rebasin.reporting.sweep_figures import Plot, draw_plot
from rebasin.reporting.sweep_page import page

MACHINE = {"python": "3.11", "system": "Linux", "cores": 2, "threads": 1, "versions": {"torch": "2"}}


def sweep(*options: dict[str, object]) -> Sweep:
    rows = [
        {**own, "varied": sorted(own), "run": f"r{k}", "barrier/heldout/loss": 0.5 * k}
        for k, own in enumerate(options)
    ]
    runs = tuple(Run(f"r{k}", "python -m rebasin.run", 1.0) for k in range(len(options)))
    declaration = {"name": "n", "title": "T", "question": "Why?"}
    return Sweep(declaration, "small", {}, tuple(rows), runs, MACHINE)


def test_options_that_follow_from_the_algorithm_are_not_told(tmp_path) -> None:
    found = sweep(
        {"algo.name": "weight_matching", "algo.order": "random", "model.width": 8},
        {"algo.name": "weight_matching", "algo.order": "random", "model.width": 16},
        {"algo.name": "activation_matching", "algo.statistic": "pearson", "model.width": 8},
    )
    text = page(found, tmp_path, None, tmp_path)
    assert "<td>algorithm weights, width 16</td>" in text and "order random" not in text
    # Two orders of one algorithm are a difference.
    found = sweep(
        {"algo.name": "weight_matching", "algo.order": "random"},
        {"algo.name": "weight_matching", "algo.order": "forward"},
        {"algo.name": "activation_matching"},
    )
    assert "order forward" in page(found, tmp_path, None, tmp_path)


def test_a_bar_of_nothing_is_told_and_long_labels_are_wrapped() -> None:
    found = sweep({"algo.name": "naive"}, {"algo.name": "ste"})
    label = "a long word " * 12
    plot = Plot("p", "algo.name", "barrier/heldout/loss", kind="bars", x_label=label)
    drawn = draw_plot(found, plot)
    assert drawn is not None
    (ax,) = drawn.axes
    assert [text.get_text() for text in ax.texts] == ["0"], "one of the two bars"
    assert ax.get_xlabel().count("\n") >= 1


def test_runs_of_one_second_do_not_share_a_folder() -> None:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("config", [], return_hydra_config=True)
        assert re.search(r"\d\d-\d\d-\d\d-\d{6}$", cfg.hydra.run.dir)
        assert re.search(r"\d\d-\d\d-\d\d-\d{6}$", cfg.hydra.sweep.dir)
