"""`rebasin doctor`, completion, and what one line installs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from cli_files import rebasin

from rebasin.cli import doctor
from tests.golden.sentences import ROOT

LARGEST_WHEEL = 30e6


def test_it_tells_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "a cache"
    cache.mkdir()
    (cache / "x").write_bytes(b"12345")
    (cache / "y").symlink_to(cache / "x")
    monkeypatch.setenv("REBASIN_CACHE", str(cache))
    told = json.loads(rebasin("doctor", "--json"))
    packages = {one["name"]: one for one in told["packages"] if one["extra"] is None}
    assert packages["torch"]["installed"] == metadata.version("torch") and not packages["torch"]["fault"]
    assert {one["extra"] for one in told["packages"]} >= {"reward", "ray"}
    assert told["devices"][0]["device"] == "cpu" and told["devices"][0]["free"] > 1e8
    own = told["caches"][0]
    assert own["path"] == str(cache) and 5 <= own["bytes"] < 4096
    assert own["clear"] == f"rm -r '{cache}'"
    subprocess.run(own["clear"], shell=True, check=True)
    assert not cache.exists() and json.loads(rebasin("doctor", "--json"))["caches"][0]["clear"] is None
    said = rebasin("doctor")
    assert "Is all there? Yes." in said and str(cache) in said and "free disk" in said


def test_versions_out_of_bounds_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = metadata.version

    def others(name: str) -> str:
        if name == "scipy":
            raise metadata.PackageNotFoundError(name)
        return "2.5.1" if name == "torch" else installed(name)

    monkeypatch.setattr(doctor.metadata, "version", others)
    said = rebasin("doctor", expect=1)
    assert "Is all there? No. scipy missing, torch 2.5.1:" in said and "version is not supported" in said


def test_a_package_that_is_not_installed_has_no_list() -> None:
    assert not list(doctor.packages_of("no-such-distribution"))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_commands_without_waiting_for_torch(shell: str) -> None:
    code = "import sys; from rebasin.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    words = {"COMP_WORDS": "rebasin m", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "rebasin m"}
    environment = {**os.environ, **words, "_REBASIN_COMPLETE": f"complete_{shell}", "PYTHONPATH": str(ROOT)}
    environment["_TYPER_COMPLETE_FISH_ACTION"] = "get-args"
    # The name under which it was called decides about the variable.
    command = [sys.executable, "-c", f"import sys; sys.argv[0] = 'rebasin'\n{code}"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "merge" in found.stdout and "methods" in found.stdout and "apply" not in found.stdout, found.stderr


def test_the_wheel_is_small_and_works_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hatchling.build

    monkeypatch.chdir(ROOT)
    wheel = tmp_path / hatchling.build.build_wheel(str(tmp_path))
    assert wheel.stat().st_size < LARGEST_WHEEL
    place, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as file:
        file.extractall(place)
        names = file.namelist()
    assert not [name for name in names if name.startswith(("tests", "experiments", "docs"))]
    entries = (place / next(name for name in names if name.endswith("entry_points.txt"))).read_text()
    assert "git-rebasin = rebasin.cli:main" in entries and "\nrebasin = rebasin.cli:main" in entries
    code = (
        "import rebasin; from rebasin.cli import main; from rebasin.files import config_dir; print(rebasin.__file__,"
        " config_dir()); main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(place)}
    command = [sys.executable, "-c", code, "--version"]
    said = subprocess.run(
        command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert said.split()[:2] == [str(place / "rebasin/__init__.py"), str(place / "rebasin/configs")]
    assert said.endswith("rebasin 0.1.0\n")
