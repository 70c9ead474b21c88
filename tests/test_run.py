"""The main job on a tiny MLP: what it leaves, that it repeats to the bit, what it says to mistakes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wandb
import wandb_records
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console as RichConsole

from rebasin import files as paths
from rebasin import report
from rebasin.checkpoints import load_metadata, load_safetensors
from rebasin.errors import ConfigError, VerificationError
from rebasin.files import config_dir
from rebasin.jobs import stages
from rebasin.jobs.algorithm import load_algorithm
from rebasin.jobs.configuration import check_types, explain
from rebasin.jobs.paths import quoted
from rebasin.jobs.resume import UNFINISHED, Resume, load_resume
from rebasin.jobs.skeleton import settle
from rebasin.reporting.console import Console
from rebasin.reporting.experiments import parsed
from rebasin.reporting.kinds import kind_of
from rebasin.reporting.metrics import metrics
from rebasin.reporting.results import load_results
from rebasin.run import main, run
from rebasin.spec import Alignment, Permutation
from rebasin.tasks import load_task

TINY = ["model=mlp", "model.width=16", "model.depth=2", "model.recipe.epochs=8", "evaluate.points=5"]
TENSORS = ("permutation.safetensors", "aligned.safetensors", "merged.safetensors")


def configured(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def execute(folder: Path, *overrides: str) -> tuple[dict, str]:
    """Results and console text of a run in this process."""
    folder.mkdir(parents=True, exist_ok=True)
    console = RichConsole(record=True, file=open(os.devnull, "w"), width=200)  # noqa: SIM115
    cfg = configured(*overrides, "logger=none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)  # without a logger it must not even be imported
        results = run(cfg, folder, Console(console), command="python -m rebasin.run ...")
    return results or {}, console.export_text()


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Trained networks are kept for this module only, specs for all."""
    folder = tmp_path_factory.mktemp("cache")
    specs = Path(os.environ["REBASIN_CACHE"]) / "specs"
    specs.mkdir(parents=True, exist_ok=True)
    (folder / "specs").symlink_to(specs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REBASIN_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict, str]:
    folder = tmp_path_factory.mktemp("finished")
    return folder, *execute(folder, *TINY)


def test_a_run_leaves_everything_and_tells_where(finished):
    folder, results, text = finished
    for name in (*TENSORS, "results.json", "config.yaml", "curve.png", "report.html"):
        assert (folder / name).stat().st_size > 100, name
        assert name in text
    assert load_results(folder) == results
    page = (folder / "report.html").read_text()
    for question in ("Is it legal?", "Did it help?", "What did it cost?"):
        assert question in page
        assert question in text
    assert 'src="data:image/png;base64,' in page
    assert "http" not in page.split("</style>")[1], "the page must need nothing from outside"
    assert OmegaConf.load(folder / "config.yaml") == OmegaConf.create(results["config"])


def test_the_figures_and_the_tensors_belong_together(finished):
    folder, results, _ = finished
    aligned, merged = (load_safetensors(folder / name) for name in TENSORS[1:])
    permutation = Permutation.load(folder / TENSORS[0])
    assert results["match"]["moved"] == permutation.moved() > 0
    assert results["verify"]["mlp"]["max_relative_error"] < 1e-5
    assert load_metadata(folder / TENSORS[1])["spec_hash"] == results["spec"]["hash"]

    cfg = configured(*TINY)
    task = load_task(cfg)
    state_a, state_b = task.endpoints(None)
    for name, tensor in permutation.apply(state_b).items():
        assert torch.equal(aligned[name], tensor)
        torch.testing.assert_close(merged[name], (state_a[name] + tensor) / 2)
    task.model.load_state_dict(dict(merged))
    midpoint = task.objective.evaluate(task.model, task.batches["heldout"])
    curve = results["curves"]["heldout"]["aligned"]
    assert curve["lambdas"][2] == 0.5
    assert curve["losses"][2] == pytest.approx(midpoint["loss"], rel=1e-6)
    assert curve["metrics"]["accuracy"][2] == pytest.approx(midpoint["accuracy"])
    assert curve["barrier"] < results["curves"]["heldout"]["naive"]["barrier"]


def test_same_seed_same_bytes_other_seed_other_bytes(finished, tmp_path):
    folder, results, _ = finished
    again, _ = execute(tmp_path / "again", *TINY)
    other, _ = execute(tmp_path / "other", *TINY, "seed=1")
    for name in TENSORS:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name
        assert (tmp_path / "other" / name).read_bytes() != (folder / name).read_bytes(), name
    assert _timeless(again) == _timeless(results)
    assert other["endpoints"] == {"a": "seed 2", "b": "seed 3"}


def _timeless(value):
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key != "seconds"}
    return [_timeless(item) for item in value] if isinstance(value, (list, tuple)) else value


def test_what_was_tried_is_told_everywhere(finished):
    folder, results, text = finished
    match = results["match"]
    assert results["algorithm"] == "auto" and match["points"] == 3
    losses = {row["name"]: row["loss"] for row in match["tried"]}
    assert match["objective"] == losses[match["chosen"]] == min(losses.values()) < losses["naive"]
    for name in losses:
        assert name in text and name in (folder / "report.html").read_text()
    assert f"{match['chosen']} (chosen)" in text and f"auto ({match['chosen']})" in text


BATCHNORM = [
    "model=resnet20",
    "model.norm=batch",
    "model.width=.25",
    "model.blocks=1",
    "model.recipe.epochs=1",
]
BATCHNORM += ["data=digits", "evaluate.points=3", "algo=weight_matching"]


def test_a_pair_is_repaired_on_the_line_and_in_the_file(tmp_path):
    plain, told = execute(tmp_path / "plain", *BATCHNORM)
    assert "try repair=reset" in told and plain["batch_norms"] > 0
    for how in ("reset", "rescale", "closed_form"):
        results, text = execute(tmp_path / how, *BATCHNORM, f"repair={how}")
        kinds = results["curves"]["heldout"]
        assert list(kinds) == ["naive", "aligned", "naive_repaired", "aligned_repaired"]
        assert {k: kinds[k]["losses"] for k in ("naive", "aligned")} == {
            k: plain["curves"]["heldout"][k]["losses"] for k in ("naive", "aligned")
        }
        for kind in ("naive", "aligned"):  # the ends are A and B, as they are
            repaired = kinds[f"{kind}_repaired"]["losses"]
            assert repaired[::2] == kinds[kind]["losses"][::2] and repaired[1] != kinds[kind]["losses"][1]
        assert f"aligned, {how}" in text and f"With repair={how} the barrier is" in text
        task = load_task(configured(*BATCHNORM))
        merged, before = (load_safetensors(tmp_path / run / "merged.safetensors") for run in (how, "plain"))
        changed = {name.rpartition(".")[2] for name in merged if not torch.equal(merged[name], before[name])}
        assert changed == {
            "reset": {"running_mean", "running_var", "num_batches_tracked"},
            "closed_form": changed & {"running_var", "weight", "bias"},
        }.get(how, {"running_mean", "running_var", "num_batches_tracked", "weight", "bias"})
        task.model.load_state_dict(dict(merged))
        found = task.objective.evaluate(task.model, task.batches["heldout"])
        assert found["loss"] == pytest.approx(kinds["aligned_repaired"]["losses"][1], rel=1e-5)
        assert "aligned_repaired/barrier/heldout/loss" in metrics(results)


def test_naive_says_that_it_is_the_baseline(tmp_path):
    results, text = execute(tmp_path, *TINY, "algo=naive")
    assert results["match"]["moved"] == 0
    assert "Not aligned" in text
    state_b = load_task(configured(*TINY)).endpoints(None)[1]
    aligned = load_safetensors(tmp_path / "aligned.safetensors")
    assert all(torch.equal(aligned[name], tensor) for name, tensor in state_b.items())


def test_dry_run_shows_the_spec_and_trains_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("REBASIN_CACHE", str(tmp_path / "cache"))
    results, text = execute(tmp_path / "run", *TINY, "dry_run=true")
    assert results == {}
    assert "align B (seed 1) to A (seed 0), the mlp, by auto" in text
    assert "layers.0.weight[0]" in text
    assert list((tmp_path / "run").iterdir()) == []
    assert not list((tmp_path / "cache").rglob("mlp-*"))


@pytest.mark.usefixtures("real_pictures")
def test_the_default_job_aligns_two_stable_diffusion_unets(tmp_path):
    from rebasin.models import tiny_sd

    small = ["data.train=10", "data.heldout=20", "evaluate.points=3", "model.samples=2", "model.steps=2"]
    results, _ = execute(tmp_path, *small)
    assert results["endpoints"] == {"a": "seed0", "b": "seed1"}
    assert set(results["verify"]) == {"unet", "vae", "text_encoder"}
    assert all(check["max_relative_error"] < 1e-5 for check in results["verify"].values())
    naive, aligned = (results["curves"]["heldout"][kind]["losses"] for kind in ("naive", "aligned"))
    assert aligned[-1] == pytest.approx(naive[-1], rel=1e-4)
    assert aligned[1] != naive[1]
    stored = load_safetensors(tiny_sd.ASSETS / "unet_seed1" / "diffusion_pytorch_model.safetensors")
    for name in TENSORS[1:]:
        left = load_safetensors(tmp_path / name)
        assert {n: (left.shape_of(n), left.dtype_of(n)) for n in left} == {
            n: (stored.shape_of(n), stored.dtype_of(n)) for n in stored
        }
    assert "data:image/png;base64," in (tmp_path / "report.html").read_text().split("<h2>Samples</h2>")[1]


@pytest.mark.usefixtures("real_pictures")
def test_report_draws_again_from_results_alone(finished, tmp_path, capsys):
    folder, _, _ = finished
    (tmp_path / "results.json").write_text((folder / "results.json").read_text())
    assert report.main([str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_text() == (folder / "report.html").read_text()
    assert (tmp_path / "curve.png").read_bytes() == (folder / "curve.png").read_bytes()
    capsys.readouterr()
    assert report.main([str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.startswith("Error: There is no ")
    (tmp_path / "results.json").write_text('{"format": 99}')
    assert report.main([str(tmp_path)]) == 2


def test_a_model_brings_its_data_and_objective_unless_told_otherwise():
    choices = lambda *o: tuple(configured(*o)[group].name for group in ("model", "data", "objective"))  # noqa: E731
    assert choices() == ("tiny_sd", "captioned_digits", "denoising")
    assert choices("model=mlp") == ("mlp", "digits", "cross_entropy")
    assert choices("data=mnist", "model=resnet20") == ("resnet20", "mnist", "cross_entropy")
    for overrides in (["model=mlp", "data=captioned_digits"], ["model=mlp", "objective=denoising"]):
        with pytest.raises(ConfigError, match="leave .* out to get the one that goes with the model"):
            load_task(configured(*overrides))


def test_illegal_permutations_do_not_get_into_the_report():
    cfg = configured(*TINY)
    task = load_task(cfg)
    state_a, state_b = task.endpoints(None)
    scrambled = dict(state_b) | {"layers.1.weight": state_b["layers.1.weight"].flip(0)}
    match = load_algorithm(cfg.algo)(task, _spec(task), state_a, state_b)
    with pytest.raises(VerificationError, match="loss of B on heldout"):
        stages.curves(
            cfg,
            stages.AlignedPair(task, match.permutation.spec, state_a, state_b, scrambled, match),
            lambda event: None,
        )


def _spec(task):
    from rebasin.tracing import trace

    return trace(task.model, *task.parts[task.aligned].args)


@pytest.mark.parametrize(
    "options",
    [
        ["algo=weight_matching", "algo.init=identity"],
        ["algo=activation_matching", "data.batch_size=200"],
        ["algo=learned", "algo.steps=4", "algo.evaluate_every=2", "algo.init=weight_matching"],
        ["algo=auto"],
    ],
)
def test_an_interrupted_alignment_goes_on_where_it_stopped(options, tmp_path, monkeypatch):
    options = [*TINY, *options, f"path.cache={tmp_path / 'cache'}"]
    own = ("candidates",) if "algo=auto" in options else ("weight matching", "activations", "learned maps")
    first = "alignment.safetensors" if "algo=learned" in options else TENSORS[0]
    execute(tmp_path / "whole", *options)

    def interrupted(event):
        if event["stage"] in own and event["step"] == 2:
            raise KeyboardInterrupt

    cfg = configured(*options)
    task = load_task(cfg)
    state_a, state_b = task.endpoints(None)
    kept = load_resume(cfg)
    assert kept is not None
    with pytest.raises(KeyboardInterrupt):
        load_algorithm(cfg.algo)(task, _spec(task), state_a, state_b, progress=interrupted, resume=kept)
    assert kept.path.exists()
    seen: list[int] = []

    def note(self, event):
        if event["stage"] in own:
            seen.append(event["step"])

    monkeypatch.setattr(Console, "progress", note)
    execute(tmp_path / "resumed", *options, "resume=true")
    assert seen[0] == (
        2 if {"algo=weight_matching", "algo=auto"} & set(options) else 1
    )  # the next sweep; the batches or steps done so far
    assert not kept.path.exists()
    for name in (first, *TENSORS[1:]):
        whole, resumed = (load_safetensors(tmp_path / run / name) for run in ("whole", "resumed"))
        assert all(torch.equal(whole[tensor], resumed[tensor]) for tensor in whole)
    assert Alignment.load(tmp_path / "whole" / first).moved() > 0


@pytest.mark.parametrize("options", [["algo=learned", "algo.steps=30"], ["algo.maps=true"]])
def test_maps_in_a_run(options, finished, tmp_path):
    results, text = execute(tmp_path, *TINY, *options)
    moved = results["match"]["maps"]["groups"]
    assert [row["kind"] for row in moved] == ["positive scales"] * 2 and all(
        row["moved"] > 0 for row in moved
    )
    assert results["verify"]["mlp"]["maps"] == 2 and results["verify"]["mlp"]["max_relative_error"] < 1e-9
    text = " ".join(text.split())
    assert "and 2 maps beside them" in text and "alignment.safetensors" in text
    assert ("without merging what A and B know" in text) == ("algo=learned" in options)
    assert "positive scales" in (tmp_path / "report.html").read_text()
    found, (a, b) = (
        Alignment.load(tmp_path / "alignment.safetensors"),
        load_task(configured(*TINY)).endpoints(None),
    )
    aligned, merged = (load_safetensors(tmp_path / name) for name in TENSORS[1:])
    for name, tensor in found.apply(b).items():
        assert torch.equal(aligned[name], tensor)
        torch.testing.assert_close(merged[name], (a[name] + tensor) / 2)
    assert not (tmp_path / TENSORS[0]).exists()
    if "algo=learned" in options:
        barriers = [run["curves"]["heldout"]["aligned"]["barrier"] for run in (results, finished[1])]
        assert barriers[0] < 0.7 * barriers[1]


def test_maps_that_can_not_be_found_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="nothing to learn"):
        execute(tmp_path, *TINY, "algo=learned", "algo.kinds=[scales]")
    with pytest.raises(ConfigError, match=r"algo.restarts=3 has no effect with maps"):
        load_algorithm(configured("algo=weight_matching", "algo.maps=true", "algo.restarts=3").algo)
    with pytest.raises(ConfigError, match=r"algo=merge_many finds no maps"):
        load_algorithm(configured("algo=merge_many", "+algo.maps=true").algo, several=True)


def test_what_cannot_be_continued_keeps_nothing(tmp_path):
    assert Resume(tmp_path / "state.safetensors", wanted=True).arguments(own_algorithm) == {}


def test_where_no_state_can_be_kept_the_matching_goes_on(tmp_path):
    (tmp_path / "file").write_text("")  # a folder that can't be made, whoever asks
    cfg = configured(*TINY)
    task = load_task(cfg)
    state_a, state_b = task.endpoints(None)
    kept = Resume(tmp_path / "file" / "unfinished" / "state.safetensors")
    found = load_algorithm(cfg.algo)(task, _spec(task), state_a, state_b, resume=kept)
    assert found.permutation.moved() > 0
    assert kept.path not in UNFINISHED


def test_a_run_into_the_folder_of_another_algorithms_run(finished, tmp_path):
    _, expected, _ = finished
    execute(tmp_path, *TINY, "algo=ste_quick", "algo.steps=4")
    assert load_results(tmp_path)["algorithm"] == "ste_quick"
    execute(tmp_path, *TINY)
    assert load_results(tmp_path)["algorithm"] == "auto"
    assert _timeless(load_results(tmp_path)["curves"]) == _timeless(expected["curves"])
    assert Permutation.load(tmp_path / TENSORS[0]).moved() == expected["match"]["moved"]


def own_algorithm(spec, batches, model_b, *, strength: int, seed: int = 0) -> Any:
    GIVEN[:] = spec, batches, model_b, strength, seed
    return spec.identity()


GIVEN: list[Any] = []


def test_an_algorithm_is_one_function_and_one_config():
    algo = OmegaConf.create({"name": "own", "_target_": f"{__name__}.own_algorithm", "strength": 3})
    task = load_task(configured(*TINY))
    spec = _spec(task)
    state_a, state_b = task.endpoints(None)
    found = load_algorithm(algo)(task, spec, state_a, state_b, seed=5)
    got = GIVEN
    assert found.moved == 0 and got[0] is spec
    assert got[1] is task.batches["train"]
    assert torch.equal(got[2].state_dict()["layers.0.weight"], state_b["layers.0.weight"])
    assert got[3:] == [3, 5]
    with pytest.raises(ConfigError, match="algo=own has no option 'strenth'; did you mean 'strength'"):
        load_algorithm(OmegaConf.create({**algo, "strenth": 3}))
    with pytest.raises(ConfigError, match="needs the option 'strength'"):
        load_algorithm(OmegaConf.create({"name": "own", "_target_": f"{__name__}.own_algorithm"}))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.width=wide", "model.width is 'wide', but it takes a whole number."),
        ("seed=null", "seed is null, but it takes a whole number."),
        ("seed=true", "seed is True, but it takes a whole number."),
        ("evaluate.splits=heldout", "evaluate.splits is 'heldout', but it takes a list, for example [a,b]."),
        ("model.recipe=fast", "model.recipe is 'fast', but it has options of its own: epochs, batch_size"),
        ("lam=1", None),
        ("model.seeds=[3,4]", None),
    ],
)
def test_values_are_checked_against_the_type_of_their_default(override, sentence):
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("config", overrides=["model=mlp", override], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    if sentence is None:
        check_types(cfg)
    else:
        with pytest.raises(ConfigError) as error:
            check_types(cfg)
        assert str(error.value).startswith(sentence)


MINE = {
    "algo/fast.yaml": "defaults: [ste, _self_]\nname: fast\nsteps: many\n",
    "algo/good.yaml": "defaults: [ste, _self_]\nname: good\nlr: 1\nanchor: 3\n",
    "algo/other.yaml": "name: other\n_target_: own_functions.align\ntimes: 3\nhow: [a]\nfree: ???\nlam: ${lam}\n",
    "objective/loud.yaml": "defaults: [denoising, _self_]\nname: loud\nobject: {min_snr_gamma: 5, prediction: 7}\n",
    "model/narrow.yaml": "defaults: [mlp, _self_]\nname: narrow\nwidth: 16\nown: {rate: 1}\n",
}


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["algo=fast"], "algo.steps of algo=fast is 'many', but it takes a whole number."),
        (["algo=good", "algo.lr=0.5", "objective=loud", "objective.object.prediction=v"], None),
        (["algo=good", "objective=loud"], "objective.object.prediction of objective=loud is 7, but it takes text."),
        (["algo=other"], "algo.how of algo=other is ['a'], but it takes text."),
        (["algo=other", "algo.how=x", "algo.times=2.5", "algo.free=4", "model=narrow", "model.own.rate=0.5"], None),
        (["algo=other", "algo.how=x", "algo.times=no"], "algo.times of algo=other is 'no', but it takes a number."),
        (["model=narrow", "model.own.rate=x"], "model.own.rate of model=narrow is 'x', but it takes a number."),
    ],
)  # fmt: skip
def test_configs_of_ones_own_are_checked_by_the_functions_that_they_name(
    overrides, sentence, tmp_path, monkeypatch
):
    for name, text in MINE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "own_functions.py").write_text("def align(spec, *, times=2, how='x', free, lam=0.5): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        given = [f"hydra.searchpath=['{tmp_path}']", *overrides]
        cfg = compose("config", overrides=given, return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    try:
        check_types(cfg)
        told = None
    except ConfigError as error:
        told = str(error)
    assert (told or "").startswith(sentence or "") and bool(told) == bool(sentence), told


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["evaluate.splits=[test]"],
            "evaluate.splits is ['test']; it takes some of train, heldout, each once.",
        ),
        (["evaluate.points=1"], "evaluate.points is 1"),
        (["seed=-1"], "seed is -1"),
        (["threads=-1"], "threads is -1"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_loaded(overrides, sentence):
    with pytest.raises(ConfigError) as error:
        settle(configured(*overrides))
    assert str(error.value).startswith(sentence)


def test_files_that_there_is_no_room_for_are_told_before_the_work(tmp_path, monkeypatch):
    stages.require_space(tmp_path / "new" / "folder", 0)
    monkeypatch.setattr(stages.shutil, "disk_usage", lambda _: SimpleNamespace(free=2_000_000))
    with pytest.raises(
        ConfigError, match=r"new take about 3\.0 GB, but the disk has 2\.0 MB free; make room"
    ):
        stages.require_space(tmp_path / "new", 3e9)


def test_paths_that_there_are_need_no_quotes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["a [1].pt", "a,b", "a=b", "quo'te", "zwölf", "(1)", 'dq"q', "{x}", "\\'", "[x", "end)\\"]
    for name in (*names, "7", "plain.pt", "ste"):
        (tmp_path / name).touch()
    told = [
        f"{start}={place}{name}"
        for name in names
        for start in ("model.a", "+model.b")
        for place in ("", f"{tmp_path}/")
    ]
    for given, made in zip(told, quoted(told), strict=True):
        override = parsed(made)
        assert override is not None and override.value() == given.partition("=")[2], (given, made)
    for plain in (
        "seed=7",
        "algo=ste",
        "model.a=plain.pt",
        "model.a=nowhere,",
        "--multirun",
        "model.width=1,2",
        "a=~b/c",
    ):
        assert quoted([plain]) == [plain]
    assert quoted(["a=" + "b" * 5000]) == ["a=" + "b" * 5000]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["model.widht=3", "model=mlp"],
            "There is no option 'model.widht'; did you mean 'model.width'? The options",
        ),
        (["alog=naive"], "There is no option 'alog'; did you mean 'algo'? The options there are seed, lam"),
        (["seed.x=1"], "'seed' has no options of its own."),
        (["+seed=1"], "The option 'seed' exists already; write it without the leading +."),
        (
            ["model=vgg"],
            "There is no model 'vgg'; did you mean 'vgg16'? Choose one of checkpoint, mlp, own, resnet18,",
        ),
        (["seed=["], "'seed=[' can't be read; write GROUP=CHOICE or OPTION=VALUE"),
        (
            ["model.a=a,b"],
            "The value of 'model.a=a,b' has a comma: write a list in brackets and text in quotes that",
        ),
        (["model=null"], "A group takes the name of one of its choices"),
    ],
)
def test_mistakes_on_the_command_line_are_explained(overrides, sentence):
    with pytest.raises(Exception) as error:
        configured(*overrides)
    assert explain(error.value, overrides).startswith(sentence)


def shell(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **env}
    root = str(paths.PACKAGE.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "rebasin.run", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["algo=foo"], "Error: There is no algo 'foo'; choose one of activation_and_weight, "),
        (
            ["seeed=1"],
            "Error: There is no option 'seeed'; did you mean 'seed'? The options there are seed, lam,",
        ),
    ],
)
def test_a_mistake_costs_one_sentence_and_exit_code_2(arguments, sentence, tmp_path):
    done = shell(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(sentence)
    assert done.stderr.count("\n") == 1


def test_hydra_full_error_still_shows_the_traceback(tmp_path):
    done = shell("algo=foo", cwd=tmp_path, HYDRA_FULL_ERROR="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_help_and_cfg_work_from_any_folder(tmp_path):
    text = shell("--help", cwd=tmp_path).stdout
    models = "model: checkpoint, mlp, own, resnet18, resnet20, resnet50, tiny_sd, tiny_sd_trained, vgg16"
    for part in ("algo: activation_and_weight, activation_matching, ", models, "EXAMPLES"):
        assert part in text
    printed = shell("--cfg", "job", "model=mlp", cwd=tmp_path).stdout
    assert OmegaConf.select(OmegaConf.create(printed), "data.name") == "digits"
    assert list(tmp_path.iterdir()) == []


def test_the_command_sweeps_and_keeps_an_offline_wandb_run_in_each_folder(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    kept = ["logger=none,wandb", "++logger.artifacts=[permutation,results]", "++logger.group=mine"]
    monkeypatch.setattr(sys, "argv", ["rebasin.run", "--multirun", *TINY, *kept])
    wandb.teardown()  # what it read about this user
    main()
    wandb.teardown()
    plain, logged = (p.parent for p in sorted(tmp_path.glob("outputs/sweeps/*/*/results.json")))
    assert _timeless(load_results(plain)["curves"]) == _timeless(load_results(logged)["curves"])
    assert not (plain / "wandb").exists()
    assert "model.width=16" in load_results(logged)["command"]
    (log,) = logged.glob("wandb/offline-run-*/run-*.wandb")
    found, results = wandb_records.logged(log), load_results(logged)
    assert (found.group, found.job_type, found.tags) == (
        "mine",
        "match",
        ("mlp", "digits", "auto"),
    )
    assert found.config["model"]["width"] == 16 and found.config["algo"]["name"] == "auto"
    measured = kind_of(results).summary(results)
    assert {name: found.summary[name] for name in measured} == pytest.approx(measured), (
        "all that is documented"
    )
    assert found.summary["curves.nrows"] == 10 and found.summary["curve._type"] == "image-file"
    assert "candidates/objective" in found.history
    named = {name: files for name, files in found.artifacts.items() if name.startswith("digits-mlp-auto")}
    assert named == {
        "digits-mlp-auto-permutation": ["permutation.safetensors"],
        "digits-mlp-auto-results": ["config.yaml", "results.json"],
    }
    assert list(logged.glob("wandb/offline-run-*/files/media/images/curve*.png"))
    assert not [path for path in home.rglob("*wandb*") if path.is_file()]


def test_configs_are_found_in_a_checkout_and_in_a_wheel(tmp_path, monkeypatch):
    assert config_dir() in (paths.PACKAGE.parent / "configs", paths.PACKAGE / "configs")
    for package, configs in (("wheel", "wheel/configs"), ("checkout/rebasin", "checkout/configs")):
        (tmp_path / package).mkdir(parents=True)
        monkeypatch.setattr(paths, "PACKAGE", tmp_path / package)
        with pytest.raises(ConfigError, match="install git-rebasin again"):
            config_dir()
        (tmp_path / configs).mkdir()
        (tmp_path / configs / "config.yaml").touch()
        assert config_dir() == tmp_path / configs
