"""The check of a GPU, on the CPU: every part runs, a part that fails or lacks a package leaves the others alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from experiments import check_gpu
from experiments.check_gpu_parts import PARTS, Figures, Part, Setting, Wrong


def found(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "check_gpu.json").read_text())


def test_all_parts_run_on_the_cpu(tmp_path: Path) -> None:
    check_gpu.main(out=tmp_path, device="cpu", tiny=True)
    told = found(tmp_path)
    assert told["tiny"] and told["machine"]["device"] == "CPU" and "torch" in told["machine"]["versions"]
    parts = {part["name"]: part for part in told["parts"]}
    assert list(parts) == [part.name for part in PARTS if not part.asked]
    assert {part["status"] for part in parts.values()} == {"ok"}, [
        part["sentence"] for part in parts.values()
    ]
    assert all(part["seconds"] > 0 and part["figures"] for part in parts.values())
    assert parts["sdxl"]["figures"]["planted and found"] == 1
    assert parts["embedded"]["figures"]["barrier, naive"] > 0
    assert len(parts["training"]["figures"]["line, aligned"]) == 3
    assert (tmp_path / "check_gpu.md").read_text().count("| ok |") == len(parts)


def test_an_experiment_is_started_where_it_is_named(tmp_path: Path) -> None:
    check_gpu.main(out=tmp_path, device="cpu", tiny=True, only=["width"])
    (part,) = found(tmp_path)["parts"]
    assert part["status"] == "ok", part["sentence"]
    assert part["figures"]["width 0.5, naive: barrier"] >= 0
    assert len(part["figures"]["width 0.5, weight_matching: losses"]) == 3


def test_a_part_that_fails_or_lacks_a_package_leaves_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: Setting) -> Figures:
        raise RuntimeError("CUDA error: an illegal memory access\nand its advice")

    def wrong(_: Setting) -> Figures:
        raise Wrong("It is wrong.")

    parts = [
        Part("broken", "Broken", broken, 1),
        Part("lacking", "Lacking", broken, 1, ("no_such_package",)),
        Part("wrong", "Wrong", wrong, 1),
        Part("right", "Right", lambda given: {"seconds": 1.5, "on": str(given.device)}, 1),
    ]
    monkeypatch.setattr(check_gpu, "PARTS", parts)
    with pytest.raises(typer.Exit):
        check_gpu.main(out=tmp_path, device="cpu")
    told = {part["name"]: part for part in found(tmp_path)["parts"]}
    assert {name: part["status"] for name, part in told.items()} == {
        "broken": "failed", "lacking": "not run", "wrong": "failed", "right": "ok",
    }  # fmt: skip
    assert told["broken"]["sentence"] == "RuntimeError: CUDA error: an illegal memory access"
    assert told["wrong"]["sentence"] == "It is wrong." and told["right"]["figures"]["on"] == "cpu"
    console = capsys.readouterr().out
    assert console.index("lacking will not be run: install no_such_package.") < console.index("1/4 Broken")
    assert "broken, lacking, wrong: not ok." in console


def test_parts_are_chosen_by_name(tmp_path: Path) -> None:
    assert [part.name for part in check_gpu.chosen(["step", "weights"])] == ["weights", "step"]
    with pytest.raises(typer.BadParameter, match=r"There is no part 'weigths': choose of verify, weights,"):
        check_gpu.chosen(["weigths"])
    with pytest.raises(typer.BadParameter, match=r"--device is 'nope', but torch finds no such device"):
        check_gpu.main(out=tmp_path, device="nope")
    with pytest.raises(typer.BadParameter, match=r"There is no .*none\.npz"):
        check_gpu.main(out=tmp_path, device="cpu", data=tmp_path / "none.npz")
