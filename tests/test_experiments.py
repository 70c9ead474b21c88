"""Experiments: every one composes and is declared rightly, the cheapest path of each kind runs, sweeps continue, and
reports regenerate from what is stored.
"""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_files import rebasin
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict
from test_run import execute

from rebasin import report
from rebasin.errors import CheckpointError, ConfigError
from rebasin.files import config_dir
from rebasin.integrations.hydra import resolved
from rebasin.jobs import experiments
from rebasin.jobs.algorithm import load_algorithm
from rebasin.jobs.configuration import check_types
from rebasin.jobs.studies import counterexample, run_study
from rebasin.jobs.studies.plane import Plane
from rebasin.jobs.studies.port import mistakes
from rebasin.jobs.studies.temperature import fitted_temperature
from rebasin.reporting import experiments as declared
from rebasin.reporting import sweep as sweeps
from rebasin.reporting.console import Console
from rebasin.reporting.results import FORMAT, save_results
from rebasin.reporting.sweep_command import command, place
from rebasin.reporting.sweep_figures import Plot, draw_plot, lines
from rebasin.reporting.sweep_page import into_docs, leave
from rebasin.reporting.sweep_tables import table
from rebasin.run import main
from rebasin.spec import Leaf
from rebasin.spec.restrict import restrict
from rebasin.tasks import load_task

TINY = (
    "model.width=8", "model.recipe.epochs=2", "evaluate.points=3", "evaluate.splits=[heldout]", "logger=none",
    "tensors=false",
)  # fmt: skip


def first_job(name: str, size: str = "small", *more: str) -> list[str]:
    """The overrides of an experiment's first job, for `hydra.compose`; `more` are set on top."""
    expanded = experiments.expand([f"+experiment={name}", f"size={size}", *more, "--resolve"])
    return [o for o in expanded if not o.startswith("-")]


@pytest.fixture(scope="module")
def composed():
    """Every experiment's first job at size=small; composing is what takes the time here."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return {name: compose("config", first_job(name)) for name in experiments.names()}


def configured(*overrides: str):
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("config", list(overrides))


# What is declared -------------------------------------------------------------------------------------------


def test_every_experiment_composes_and_its_declaration_is_complete(composed):
    assert len(composed) >= 20
    for name, cfg in composed.items():
        declared = experiments.declaration(name)
        assert declared["name"] == name == cfg.experiment.name
        assert declared["title"] and declared["question"].strip().endswith("?"), name
        for figure in declared.get("figures") or ():
            Plot.declared(figure)
        assert declared.get("figures") or declared.get("table"), name
        assert {"full", "small"} <= declared.keys(), name
        for size in (size for size in experiments.SIZES if size in declared):
            assert declared[size], name
            assert {
                o.split("=")[0] for o in experiments.expand([f"+experiment={name}", f"size={size}"])
            } >= set(declared[size])
    folders = {str(cfg.experiment.name) for cfg in composed.values()}
    assert folders == set(experiments.names())


def named(config: Any, wanted: str) -> list[Any]:
    """The values of all keys of this name."""
    if isinstance(config, dict):
        own = [value for key, value in config.items() if key == wanted]
        return own + [found for value in config.values() for found in named(value, wanted)]
    return []


def test_every_recipe_composes_for_either_device():
    for name in experiments.names():
        cfg = configured(*first_job(name, "full", "device=cuda"))
        # An algorithm's own `device` is its default, which counts as not set.
        assert "device" not in load_algorithm(cfg.algo).options, name
        with open_dict(cfg):
            del cfg.path, cfg.experiment, cfg.logger, cfg.algo  # which speak of the running job
        for device in ("cuda", "cpu"):
            cfg.device = device
            assert set(named(OmegaConf.to_container(cfg, resolve=True), "device")) == {device}, name


def test_a_recipe_starts_on_the_device_that_it_is_given(tmp_path):
    recipe = first_job("width", "small", *TINY)
    assert execute(tmp_path / "cpu", *recipe, "device=cpu")[0]["environment"]["device"] == "CPU"
    if torch.cuda.is_available():
        assert execute(tmp_path / "cuda", *recipe, "device=cuda")[0]["environment"]["device"] != "CPU"
    else:
        with pytest.raises(ConfigError, match=r"device is 'cuda', but torch finds no such device"):
            execute(tmp_path / "cuda", *recipe, "device=cuda")


@pytest.mark.parametrize("name", ["norms", "diffusion", "width"])
def test_the_recipe_has_values_of_the_right_types(name):
    """The norms experiment names ways of REPAIR where the default is `true`, which was refused."""
    for size in ("small", "full"):
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            cfg = compose("config", first_job(name, size), return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        check_types(cfg)


def test_the_full_recipe_of_the_papers_networks_is_theirs():
    cfg = configured(*first_job("width_resnet20", "full", "device=null"))
    recipe = cfg.model.recipe
    assert (recipe.epochs, recipe.batch_size, recipe.optimizer, recipe.learning_rate) == (
        250,
        100,
        "sgd",
        0.1,
    )
    assert (recipe.weight_decay, recipe.warmup_epochs, recipe.schedule, recipe.augment) == (
        1e-4,
        5,
        "cosine",
        "affine",
    )
    assert (cfg.data.name, cfg.model.norm) == ("cifar10", "layer")


def test_algorithms_look_at_as_many_images_as_they_are_told():
    options = ("model=mlp", "algo=naive", "data.batch_size=100")
    task = load_task(configured(*options, "data.matching_samples=250"))
    assert sum(len(y) for _, y in task.batches["train"]) == 300 and len(task.batches["heldout"]) == 4
    with pytest.raises(
        ConfigError, match="data.matching_samples is -3, but it takes a number of training images"
    ):
        load_task(configured(*options, "data.matching_samples=-3"))


def test_a_size_that_an_experiment_does_not_have_is_refused():
    with pytest.raises(
        ConfigError, match="The experiment width has no size=short: take size=full or size=small"
    ):
        experiments.expand(["+experiment=width", "size=short"])


# The command line -------------------------------------------------------------------------------------------


def test_expand_puts_in_what_the_user_does_not_set():
    expanded = experiments.expand(["+experiment=width", "size=small", "model.width=4,5", "seed=7"])
    assert "--multirun" in expanded
    assert "evaluate.points=11" in expanded
    assert [o for o in expanded if o.startswith("model.width")] == ["model.width=4,5"]
    assert [o for o in expanded if o.startswith("seed")] == ["seed=7"]
    assert experiments.expand(["experiment=width", "size=small"])[1] == "+experiment=width"
    assert experiments.expand(["model=mlp", "data=["]) == ["model=mlp", "data=["]


def test_showing_a_configuration_takes_the_first_of_each_axis():
    shown = experiments.expand(["+experiment=width", "size=small", "--cfg", "job"])
    assert "model.width=16" in shown and "hydra.mode=RUN" in shown and "--multirun" not in shown


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["+experiment=widht"], "did you mean 'width'"),
        (["+experiment=_base"], "no experiment '_base'"),
        (["+experiment=width", "size=tiny"], "sizes full, small"),
    ],
)
def test_a_wrong_name_or_size_is_told(arguments, said):
    with pytest.raises(ConfigError, match=said):
        experiments.expand(arguments)


def test_the_fingerprint_is_that_of_what_matters(composed):
    config = resolved(composed["width"])
    same = {**config, "threads": 9, "again": True, "size": "full"}
    other = {**config, "seed": 5}
    first, again, changed = (experiments.folder_digits(OmegaConf.create(c)) for c in (config, same, other))
    assert first == again != changed


# Running ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The width experiment with two jobs of seconds, in this process; Hydra is not started."""
    from rebasin.run import run

    folder = tmp_path_factory.mktemp("swept")
    for width in (4, 8):
        cfg = configured(*first_job("width", "small", *TINY, f"model.width={width}"))
        run(cfg, folder / f"w{width}", Console(_silent()), "python -m rebasin.run ...")
    return folder


def _silent():
    from rich.console import Console as Rich

    return Rich(file=io.StringIO(), width=200)


def test_a_finished_run_is_known_again(swept):
    cfg = configured(*first_job("width", "small", *TINY, "model.width=4"))
    assert experiments.finished(resolved(cfg), swept / "w4")
    assert not experiments.finished(resolved(cfg), swept / "w8"), "another configuration"
    assert not experiments.finished(
        {**resolved(cfg), "tensors": not cfg.tensors} | {"tensors": True}, swept / "w4"
    )
    assert not experiments.finished(resolved(cfg), swept), "no results here"
    (damaged := swept.parent / "damaged").mkdir(exist_ok=True)
    (damaged / "results.json").write_text((swept / "w4" / "results.json").read_text()[:-100])
    assert not experiments.finished(resolved(cfg), damaged), "interrupted while it was written"


def test_the_job_leaves_a_finished_run_alone(swept, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["+experiment=counterexample", "size=small", "study.points=5", f"path.outputs={tmp_path}"]
    first, second = (rebasin(*command, entry=main) for _ in range(2))
    assert "is finished; again=true" not in first and "is finished; again=true" in second
    folder = tmp_path / "experiments" / "counterexample-small"
    assert {"report.html", "sweep.json", "sweep.csv", "table.md", "accuracy.png"} <= {
        p.name for p in folder.iterdir()
    }
    assert len(list(folder.glob("*/results.json"))) == 1


def test_a_sweep_is_a_table_of_what_varied_and_what_was_measured(swept):
    sweep = sweeps.collect(swept)
    assert sweep.varied == ["model.width"]
    assert sweep.common["model.recipe.epochs"] == 2
    assert [row["model.width"] for row in sweep.rows] == [4, 8]
    plot = Plot.declared({"name": "f", "x": "model.width", "y": "barrier/heldout/loss"})
    (line,) = lines(sweep, plot, sweep.rows)
    assert line.x == [4, 8]
    assert line.y == [row["barrier/heldout/loss"] for row in sweep.rows]
    found = list(csv.DictReader(io.StringIO(sweeps.csv_text(sweep))))
    assert [float(row["barrier/heldout/loss"]) for row in found] == line.y


def test_runs_of_a_sweep_that_was_continued_with_another_option_are_not_averaged(swept, tmp_path):
    for name, changes in {"w4": {}, "w4 longer": {"epochs": 3}, "w4 other seed": {"seed": 1}}.items():
        stored = json.loads((swept / "w4" / "results.json").read_text())
        stored["config"]["seed"] = changes.get("seed", 0)
        stored["config"]["model"]["recipe"]["epochs"] = changes.get("epochs", 2)
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(stored))
    sweep = sweeps.collect(tmp_path)
    found = table(sweep)
    assert found is not None
    assert [line[:2] for line in found.lines] == [
        ("2", "naive"),
        ("2", "weights"),
        ("3", "naive"),
        ("3", "weights"),
    ]
    figures = sweep.declaration["figures"]
    first, second = Plot.declared(figures[0]), Plot.declared(figures[len(figures) // 2])
    assert first.where == {"model.recipe.epochs": 2} and second.where == {"model.recipe.epochs": 3}
    assert second.name == f"{first.name}-2" and second.title.endswith("(model.recipe.epochs 3)")
    for plot, n in ((first, 2), (second, 1)):
        assert len(sweep.where(plot.where)) == n
    assert len(sweeps.collect(swept).declaration["figures"]) == len(figures) // 2, (
        "the figure's own x is no other option"
    )
    before = table(sweeps.collect(swept))
    assert before is not None and all("epochs" not in word for word in before.head)


@pytest.mark.usefixtures("real_pictures")
def test_a_sweep_is_drawn_again_from_its_json_alone(swept, tmp_path):
    sweep = sweeps.collect(swept)
    leave(sweep, tmp_path / "a", swept)
    again = sweeps.load(tmp_path / "a" / "sweep.json")
    assert again.rows[0].keys() == sweep.rows[0].keys()
    assert report.main([str(tmp_path / "a" / "sweep.json"), "--out", str(tmp_path / "b")]) == 0
    for name in ("table.md", "barrier.png", "accuracy.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    page = (tmp_path / "b" / "report.html").read_text()
    assert 'src="data:image/png;base64,' in page and "http" not in page.split("</style>")[1]


def test_the_page_of_results_keeps_what_people_wrote(swept, tmp_path):
    document = tmp_path / "results.md"
    document.write_text("# Results\n\nBy hand.\n")
    sweep = sweeps.collect(swept)
    into_docs(sweep, document, tmp_path / "experiments")
    document.write_text(document.read_text() + "\nMore by hand.\n")
    once = document.read_text()
    assert report.main([str(tmp_path / "experiments" / "width-small.json"), "--docs", str(document)]) == 0
    assert document.read_text().count("<!-- experiment: width-small -->") == 1
    assert [line for line in once.splitlines() if "by hand" in line.lower()] == ["By hand.", "More by hand."]
    assert document.read_text().splitlines()[-1] == "More by hand."
    assert "![" in once and (tmp_path / "experiments" / "width-small-barrier.png").is_file()
    assert str(tmp_path) not in once and "rebasin.report experiments/width-small.json" in once


@pytest.mark.parametrize(
    "recipe",
    [
        {"data": "mnist", "model.width": "16,32,64", "model.seeds": "[0,1],[2,3]", "seed": "0,1", "tensors": False},
        # What earlier versions have stored with a sweep.
        ["data=mnist", "model.width=16,32,64", "model.seeds=[0,1],[2,3]", "seed=0,1", "tensors=false"],
    ],
)  # fmt: skip
def test_the_command_of_a_sweep_says_where_it_departs_from_the_recipe(recipe):
    def of(size: str, *runs: str) -> str:
        made = tuple(sweeps.Run("r", f"python -m rebasin.run +experiment=x {run}", 1.0) for run in runs)
        return command(sweeps.Sweep({"name": "x", "full": recipe, "small": []}, size, {}, (), made, {}))

    start = "python -m rebasin.run +experiment=x"
    grid = [
        f"data=mnist model.width={w} 'model.seeds={s}' seed={k} tensors=False threads=1"
        for w in (64, 32, 16) for s in ("[2, 3]", "[0,1]") for k in (1, 0)
    ]  # fmt: skip
    assert of("full", *grid) == start, "spaces, order and options that change no figure don't matter"
    part = [run for run in grid if "seed=0" in run and "width=16" not in run]
    assert of("full", *part) == f"{start} model.width=32,64 seed=0"
    assert (
        of("full", part[0].replace("width=64", "width=7"))
        == f"{start} model.width=7 'model.seeds=[2,3]' seed=0"
    )
    assert of("small", "size=small algo=ste") == f"{start} size=small algo=ste"


@pytest.mark.parametrize(
    "recipe", [{"data": "x", "algo": "b,a", "seed": "0,1"}, ["data=x", "algo=b,a", "seed=0,1"]]
)
def test_runs_are_in_the_order_of_the_recipe(recipe):
    declared = {"small": recipe}
    runs = [f"data=x algo={a} seed={s}" for a in ("a", "c", "b") for s in (1, 0)]
    ordered = sorted(runs, key=lambda run: place(declared, "small", f"python -m rebasin.run {run}"))
    assert [run[12:] for run in ordered] == [
        "b seed=0", "b seed=1", "a seed=0", "a seed=1", "c seed=0", "c seed=1",
    ]  # fmt: skip


def test_figures_are_those_that_the_experiment_declares_today(swept, monkeypatch):
    new = {**experiments.declaration("width"), "title": "Another"}
    monkeypatch.setattr(declared, "declaration", lambda name: new)
    assert sweeps.collect(swept).declaration["title"] == "Another"
    monkeypatch.setattr(declared, "names", lambda: [])
    assert sweeps.collect(swept).declaration["title"] != "Another", "of the runs, if there is no such file"


def test_bins_without_samples_have_no_point():
    filled = sweeps._filled(
        {"share": [0.0, 1.0], "confidence": [0.0, 0.7], "accuracy": [0.0, 0.6], "ece": 0.1}
    )
    assert filled == {"share": [0.0, 1.0], "confidence": [None, 0.7], "accuracy": [None, 0.6], "ece": 0.1}


def test_there_is_nothing_to_report_on(tmp_path, capsys):
    with pytest.raises(CheckpointError, match="no finished run"):
        sweeps.collect(tmp_path)
    assert report.main([str(tmp_path)]) == 2


# Figures and tables -----------------------------------------------------------------------------------------


def sweep_of(rows: list[dict], **declared) -> sweeps.Sweep:
    rows = [{"varied": [], "run": "r", **row} for row in rows]
    return sweeps.Sweep({"name": "x", **declared}, "small", {}, tuple(rows), (), {})


def test_seeds_are_averaged_and_lists_are_lines():
    rows = [{"w": 2, "s": s, "y": y, "xs": [0, 1], "ys": [y, y + 1]} for s, y in ((0, 1.0), (1, 3.0))]
    sweep = sweep_of(rows)
    (line,) = lines(sweep, Plot("f", "w", "y"), rows)
    assert (line.y, line.low, line.high, line.count) == ([2.0], [1.0], [3.0], [2])
    (line,) = lines(sweep, Plot("f", "xs", "ys"), rows)
    assert line.y == [2.0, 3.0]
    both = lines(sweep, Plot("f", "w", {"a": "y"}, series=("s",), baseline={"b": "y"}), rows)
    assert [one.label for one in both] == ["b", "0, a", "1, a"]


@pytest.mark.parametrize("kind", ["lines", "bars", "contour"])
def test_each_kind_of_figure_is_drawn(kind):
    row = {
        "x": [0.0, 1.0],
        "y": [0.0, 1.0],
        "z": [[1.0, 2.0], [3.0, 4.0]],
        "p": {"A": [0, 0]},
        "c": "word",
        "v": 1.0,
    }
    plot = {
        "lines": Plot("f", "x", "y", series=("c",)),
        "bars": Plot("f", "c", "v", kind="bars"),
        "contour": Plot("f", "x", "y", kind="contour", z="z", points="p"),
    }[kind]
    assert draw_plot(sweep_of([row]), plot) is not None
    assert draw_plot(sweep_of([{"c": "none"}]), plot) is None


def test_a_table_has_a_line_a_group_and_says_how_many_runs():
    rows = [{"m": m, "w": w, "y": float(w + i), "n": 9.0} for m in ("a", "b") for w in (1, 2) for i in (0, 2)]
    found = table(
        sweep_of(rows, table={"rows": ["m"], "columns": "w", "values": ["y"], "baseline": {"naive": "n"}})
    )
    assert found is not None
    assert found.head == ("m", "w 1", "w 2")
    assert [line[0] for line in found.lines] == ["naive", "a", "b"]
    assert found.lines[1][1] == f"2.00 ± {math.sqrt(2):.1f} (2)"
    assert found.lines[0][1] == "9.00"


def test_an_unknown_field_of_a_figure_is_told():
    with pytest.raises(ConfigError, match="no field 'colour'"):
        Plot.declared({"name": "f", "x": "a", "y": "b", "colour": "red"})
    with pytest.raises(ConfigError, match="incomplete"):
        Plot.declared({"name": "f", "x": "a"})


# Studies ----------------------------------------------------------------------------------------------------


def test_every_permutation_of_the_counterexample_has_a_barrier(tmp_path):
    cfg = configured(*first_job("counterexample"))
    results = run_study(cfg, tmp_path, Console(_silent()))
    assert results is not None
    rows = results["rows"]
    assert len(rows) == 4
    assert all(row["accuracy of A"] == row["accuracy of B"] == 1 for row in rows)
    assert min(row["barrier of accuracy"] for row in rows) > 0.5
    assert sum(row["chosen"] for row in rows) == 1


def test_old_configurations_find_studies_where_they_were(tmp_path):
    cfg = configured(*first_job("counterexample"))
    new = run_study(cfg, tmp_path / "new", Console(_silent()))
    cfg.study._target_ = "rebasin.studies.counterexample.study"
    old = run_study(cfg, tmp_path / "old", Console(_silent()))
    assert new is not None and old is not None and old["rows"] == new["rows"]


def test_the_counterexample_answers_with_a_margin():
    x = torch.cartesian_prod(torch.tensor(counterexample.VALUES), torch.tensor(counterexample.VALUES))
    sign = torch.where((x > 0).all(dim=1), 1.0, -1.0)
    for state in (counterexample.A, counterexample.B):
        h = x
        for k in range(3):
            h = h @ state[f"layers.{k}.weight"].T + state[f"layers.{k}.bias"]
            h = h.relu() if k < 2 else h
        assert float((h[:, 0] * sign).min()) >= 0.5


@pytest.mark.usefixtures("real_pictures")
@pytest.mark.parametrize("name, more", [("contour", ["study.points=5"]), ("expansion", [])])
def test_studies_of_a_pair_run(name, more, tmp_path):
    cfg = configured(*first_job(name, "small", "model.width=8", "model.recipe.epochs=2",
                                            "evaluate.points=3", *more))  # fmt: skip
    results = run_study(cfg, tmp_path, Console(_silent()))
    assert results is not None
    sweep = sweeps.collect(tmp_path)
    for plot in (Plot.declared(figure) for figure in sweep.declaration["figures"]):
        assert draw_plot(sweep, plot) is not None
    if name == "expansion":
        for row in results["rows"]:
            # Fitted where it is measured it could not be worse; it is fitted on training data.
            assert row["midpoint/calibrated"] < row["midpoint/loss"] + 0.05
            assert row["midpoint/accuracy"] <= 1


def test_the_plane_goes_through_its_three_models():
    torch.manual_seed(0)
    a, b, c = ({"w": torch.randn(5, 4), "n": torch.tensor(3)} for _ in range(3))
    plane = Plane(a, b, c)
    assert plane.place(a) == pytest.approx((0, 0))
    assert plane.place(b) == pytest.approx((1, 0), abs=1e-9)
    for state in (a, b, c):
        torch.testing.assert_close(plane.at(*plane.place(state))["w"], state["w"])
    with pytest.raises(ConfigError, match="no plane"):
        Plane(a, b, b)


def test_the_temperature_is_the_one_that_was_put_in():
    torch.manual_seed(0)
    logits = torch.randn(4000, 5, dtype=torch.float64)
    labels = torch.distributions.Categorical(logits=logits).sample()
    for factor in (0.25, 1.0, 8.0):
        assert fitted_temperature(logits * factor, labels) == pytest.approx(factor, rel=0.1)


def test_the_ports_mistakes_name_parameters_of_the_unet():
    from rebasin.models import tiny_sd

    unet = tiny_sd.load_unet("seed0")
    shapes = {name: tuple(p.shape) for name, p in unet.named_parameters()}
    for kind, ties in mistakes(unet).items():
        assert ties, kind
        for _, on in ties:
            sizes = {shapes[name][axis] for name, axis in on}
            assert len(sizes) == 1, (kind, on)
    with pytest.raises(ConfigError, match="model=tiny_sd"):
        mistakes(torch.nn.Linear(2, 2))


def test_structures_are_parts_of_each_other():
    import rebasin
    from rebasin.models import ResNet

    model = ResNet(width=0.5, norm="group", channels=1, blocks=1).eval()
    spec = rebasin.trace(model, torch.zeros(2, 1, 8, 8))
    within, free = restrict(spec, "within"), restrict(spec, "free")
    assert restrict(spec, "full") is spec
    assert within.neurons == spec.neurons
    assert sum(g.log10_size for g in within) < sum(g.log10_size for g in spec)
    assert all(isinstance(group.tree, Leaf) for group in free) and len(free) < len(spec)
    rebasin.verify(model, within, torch.randn(2, 1, 8, 8)).require()
    with pytest.raises(ConfigError, match="within"):
        restrict(spec, "some")


def test_a_sweep_of_several_experiments_is_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_results(
            tmp_path / name,
            {"format": FORMAT, "kind": "study", "rows": [{"y": 1}], "seconds": {"total": 1.0},
             "name": name, "algorithm": "ste", "environment": {"versions": {}}, "command": "",
             "config": {"experiment": {"name": name}}},
        )  # fmt: skip
    with pytest.raises(CheckpointError, match="several experiments"):
        sweeps.collect(tmp_path)
    assert json.loads((tmp_path / "a" / "results.json").read_text())["rows"] == [{"y": 1}]


def test_an_experiment_needs_no_checkout(tmp_path):
    """The wheel has them where `config_dir` looks."""
    settings = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text()
    assert '"configs" = "rebasin/configs"' in settings
    assert (config_dir() / "experiment" / "width.yaml").is_file()


def test_a_baseline_is_counted_once_over_algorithms():
    rows = [
        {"varied": ["algo.name", "seed"], "algo.name": a, "seed": s, "w": 1, "y": 1.0, "n": 5.0 + s}
        for a in ("p", "q")
        for s in (0, 1)
    ]
    sweep = sweep_of(rows)
    naive, *_ = lines(sweep, Plot("f", "w", "y", series=("algo.name",), baseline={"naive": "n"}), sweep.rows)
    assert (naive.count, naive.y) == ([2], [5.5])


@pytest.mark.parametrize("kind", ["pair", "many", "study"])
def test_every_kind_of_run_has_tables_and_figures_for_a_tracker(kind, swept, tmp_path):
    from rebasin.reporting.kinds import kind_of
    from rebasin.reporting.loggers import job_type
    from rebasin.reporting.results import load_results
    from rebasin.run import run

    if kind == "pair":
        results = load_results(swept / "w4")
    elif kind == "study":
        results = run_study(configured(*first_job("counterexample")), tmp_path, Console(_silent()))
    else:
        results = run(configured(*first_job("merge_many", "small", *TINY)), tmp_path, Console(_silent()))
    assert results is not None
    assert job_type(results["config"]) == {"pair": "match", "many": "merge", "study": "study"}[kind]
    wanted = {"pair": "curves", "many": "models", "study": "rows"}[kind]
    columns, rows = kind_of(results).tables(results)[wanted]
    assert rows and all(len(row) == len(columns) for row in rows)
    figures = kind_of(results).summary(results)
    if kind == "many":
        assert figures["many/heldout/members/loss"] == results["rows"]["heldout"][0]["loss"]
        assert sweeps.collect(tmp_path).rows[0]["merge"] == "members"
    elif kind == "pair":
        assert figures["barrier/heldout/loss"] == results["curves"]["heldout"]["aligned"]["barrier"]
