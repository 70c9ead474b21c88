"""The main job on several networks: what it leaves, what it says to mistakes, and that the figures belong together."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from test_run import configured, execute

from rebasin import report
from rebasin.checkpoints import load_metadata, load_safetensors
from rebasin.errors import ConfigError
from rebasin.matching import load_permutations
from rebasin.reporting.results import load_results
from rebasin.spec import Alignment
from rebasin.tasks import load_task

TINY = ["model=mlp", "model.width=12", "model.depth=2", "model.recipe.epochs=6", "model.seeds=[0,1,2]"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict, str]:
    folder = tmp_path_factory.mktemp("many")
    return folder, *execute(folder, "algo=merge_many", "evaluate.splits=[heldout,train]", *TINY)


def test_a_run_leaves_everything_and_tells_where(finished) -> None:
    folder, results, text = finished
    names = ("merged.safetensors", "repaired.safetensors", "permutations.safetensors", "results.json",
             "config.yaml", "table.md", "reliability.png", "report.html")  # fmt: skip
    for name in names:
        assert (folder / name).stat().st_size > 100, name
        assert name in text
    assert load_results(folder) == results and results["kind"] == "many"
    page = (folder / "report.html").read_text()
    assert 'src="data:image/png;base64,' in page and "merge_many, REPAIR" in page
    shown = re.sub(r"base64,[^\"]*", "", page.split("</style>")[1])
    assert not re.search(r"(src|href)=.?http", shown), "the page must need nothing from outside"
    assert OmegaConf.load(folder / "config.yaml") == OmegaConf.create(results["config"])
    assert results["models"] == ["seed 0", "seed 1", "seed 2"]


def test_the_figures_and_the_tensors_belong_together(finished) -> None:
    folder, results, _ = finished
    permutations = load_permutations(folder / "permutations.safetensors")
    assert sum(p.moved() for p in permutations) == results["match"]["moved"] > 0
    task = load_task(configured("algo=merge_many", *TINY))
    states = task.endpoints(None)
    merged = load_safetensors(folder / "merged.safetensors")
    for name in merged:
        members = [p.apply(s)[name] for p, s in zip(permutations, states, strict=True)]
        torch.testing.assert_close(merged[name], torch.stack(members).mean(dim=0))
    assert load_metadata(folder / "merged.safetensors")["spec_hash"] == results["spec"]["hash"]
    for split in ("heldout", "train"):
        rows = {row["name"]: row for row in results["rows"][split]}
        assert list(rows) == [
            "members",
            "ensemble",
            "naive",
            "merge_many",
            "naive, REPAIR",
            "merge_many, REPAIR",
        ]
        for file, name in (("merged", "merge_many"), ("repaired", "merge_many, REPAIR")):
            task.model.load_state_dict(dict(load_safetensors(folder / f"{file}.safetensors")))
            found = task.objective.evaluate(task.model, task.batches[split])
            assert rows[name]["loss"] == pytest.approx(found["loss"], rel=1e-5)
            assert rows[name]["accuracy"] == pytest.approx(found["accuracy"])
        each = []
        for state in states:
            task.model.load_state_dict(dict(state))
            each.append(task.objective.evaluate(task.model, task.batches[split])["loss"])
        assert rows["members"]["loss"] == pytest.approx(sum(each) / 3, rel=1e-5)
        barrier = rows["naive"]["loss"] - rows["members"]["loss"]
        assert rows["naive"]["barrier"] == pytest.approx(barrier, abs=1e-6)
        assert 0 <= rows["naive"]["ece"] <= 1


def test_pictures_can_be_drawn_again(finished) -> None:
    folder, _, _ = finished
    before = (folder / "table.md").read_text()
    (folder / "table.md").unlink()
    assert report.main([str(folder)]) == 0
    assert (folder / "table.md").read_text() == before


@pytest.mark.parametrize(
    "algo", ["merge_many_pivot", "merge_many_cycle_consistent", "merge_many_activations"]
)
def test_the_other_ways(tmp_path: Path, algo: str) -> None:
    _, _ = execute(tmp_path, f"algo={algo}", *TINY)
    results = load_results(tmp_path)
    assert [row["name"] for row in results["rows"]["heldout"]][3] == algo


def test_ste_and_no_repair(tmp_path: Path) -> None:
    results, _ = execute(tmp_path, "algo=merge_many_ste", "algo.steps=2", "algo.repair=false", *TINY)
    assert [row["name"] for row in results["rows"]["heldout"]] == [
        "members",
        "ensemble",
        "naive",
        "merge_many_ste",
    ]
    assert not (tmp_path / "repaired.safetensors").exists()


def test_learned_maps_bring_all_to_the_first(finished, tmp_path: Path) -> None:
    """Each with an alignment of its own; the mean of what they make is the merge, below that by permutations."""
    short = "algo.match={steps: 40}"
    results, text = execute(tmp_path, "algo=merge_many_learned", short, *TINY)
    assert results["verify"]["mlp"]["maps"] == 2 and "what brings each model to the first" in text
    found = [Alignment.load(tmp_path / "alignments" / f"{i}.safetensors") for i in range(3)]
    assert found[0].is_identity and all(len(one.maps) == 2 for one in found[1:])
    states = load_task(configured("algo=merge_many_learned", *TINY)).endpoints(None)
    merged = load_safetensors(tmp_path / "merged.safetensors")
    for name in merged:
        members = [a.apply(s)[name] for a, s in zip(found, states, strict=True)]
        torch.testing.assert_close(merged[name], torch.stack(members).mean(dim=0))
    barriers = {row["name"]: row["barrier"] for row in results["rows"]["heldout"]}
    before = {row["name"]: row["barrier"] for row in finished[1]["rows"]["heldout"]}
    assert barriers["merge_many_learned"] < 0.7 * before["merge_many"]


def test_naive_is_the_plain_mean_of_all(tmp_path: Path) -> None:
    results, _ = execute(tmp_path, "algo=naive", *TINY)
    assert [row["name"] for row in results["rows"]["heldout"]] == [
        "members",
        "ensemble",
        "naive",
        "naive, REPAIR",
    ]
    assert (tmp_path / "merged.safetensors").exists() and results["match"]["moved"] == 0


def test_batchnorm_gets_a_reset(tmp_path: Path) -> None:
    net = [
        "model=resnet20",
        "model.width=0.25",
        "model.blocks=1",
        "model.norm=batch",
        "model.recipe.epochs=1",
    ]
    results, _ = execute(tmp_path, "algo=merge_many_pivot", "model.seeds=[0,1]", *net)
    names = [row["name"] for row in results["rows"]["heldout"]]
    assert "merge_many_pivot, reset" in names and "merge_many_pivot, REPAIR" in names
    # Ways of REPAIR can be chosen.
    some = ["algo=merge_many_pivot", "algo.repair=[reset,closed_form]", "model.seeds=[0,1]"]
    results, _ = execute(tmp_path / "some", *some, *net)
    rows = {row["name"]: row["loss"] for row in results["rows"]["heldout"]}
    both = [f"{name}, {way}" for name in ("naive", "merge_many_pivot") for way in ("reset", "closed form")]
    assert list(rows)[4:] == both
    assert len({rows[name] for name in ("naive", *both[:2])}) == 3, "each is another network"


def test_mistakes_cost_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="3 networks, but algo=weight_matching aligns two"):
        execute(tmp_path, "algo=weight_matching", *TINY)
    with pytest.raises(ConfigError, match="no option 'pivot'"):
        execute(tmp_path, "algo=merge_many", "+algo.pivot=1", *TINY)
    with pytest.raises(
        ConfigError, match=r"'scale'; it takes true, false or some of reset, rescale, closed_form"
    ):
        execute(tmp_path, "algo=merge_many", "algo.repair=[scale]", *TINY)
    with pytest.raises(ConfigError, match="model.seeds"):
        execute(tmp_path, "algo=merge_many", *TINY, "model.seeds=[a,b,c]")
    results, text = execute(tmp_path, "algo=merge_many", "dry_run=true", *TINY)
    assert results == {} and "merge 3 models (seed 0, seed 1, seed 2) by merge_many" in text
