"""Recipes: what was done is done again to the bit, in one step or several, from YAML or from the file's own header."""

from __future__ import annotations

import dataclasses
import json
import shutil
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_files import Files, digest, read, rebasin

from rebasin.cli import recipe_file, stages
from rebasin.cli.recipe_file import read_recipe
from rebasin.cli.recipe_text import Done, recipe_text
from rebasin.cli.request import KEYS, UNCHANGED, Request, kinds
from rebasin.errors import ConfigError

BLOCKS = "fc1=0.4,fc2=[0,1],default=0.2"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("files"), ("text_encoder",))


@pytest.fixture(autouse=True)
def untouched(files: Files):
    yield
    files.check_untouched()


@pytest.fixture
def folder(files: Files, tmp_path: Path) -> Path:
    """A folder with links to the models, in which a recipe may name them."""
    for path in files.all:
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def written(folder: Path, text: str) -> Path:
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


def test_a_merge_is_done_again_to_the_bit_by_its_recipe_and_by_its_header(folder: Path) -> None:
    a, b, out, kept = (
        folder / name for name in ("a.safetensors", "b.safetensors", "ab.safetensors", "ab.yaml")
    )
    options = ["--weights", BLOCKS, "--dtype", "fp16", "--seed", 3, "--prune"]
    text = rebasin("merge", a, b, "-o", out, *options, "--save-recipe", kept)
    assert f"The recipe is in {kept}" in text
    told = yaml.safe_load(kept.read_text())
    assert told["models"][0] == {"file": "a.safetensors", "sha256": digest(a)}
    assert {key: told[key] for key in ("output", "weights", "dtype", "seed", "prune")} == {
        "output": "ab.safetensors", "weights": BLOCKS, "dtype": "fp16", "seed": 3, "prune": True,
    }  # fmt: skip
    wanted = digest(out)
    rebasin("merge", "--recipe", kept, "-o", folder / "again.safetensors")
    rebasin("merge", "--recipe", out, "-o", folder / "header.safetensors")
    assert digest(folder / "again.safetensors") == digest(folder / "header.safetensors") == wanted
    assert "exists; add --overwrite" in rebasin("merge", "--recipe", kept, expect=2)
    rebasin("merge", "--recipe", kept, "--overwrite", "--save-recipe", folder / "other.yaml")
    assert digest(out) == wanted and (folder / "other.yaml").read_text() == kept.read_text()
    # A folder of its own, with the models given: where a recipe is does not matter.
    (folder / "apart").mkdir()
    moved = shutil.copy(out, folder / "apart" / "x.safetensors")
    assert "there is no" in rebasin("merge", "--recipe", moved, "-o", folder / "y.safetensors", expect=2)
    rebasin("merge", a, b, "--recipe", moved, "-o", folder / "y.safetensors")
    assert digest(folder / "y.safetensors") == wanted
    sentence = rebasin("merge", b, a, "--recipe", moved, "-o", folder / "z.safetensors", expect=2)
    assert "b.safetensors is not the file that the recipe means" in " ".join(sentence.split())
    assert not (folder / "z.safetensors").exists()


STEPS = """
rebasin: 1
steps:
- {name: half, models: [a.safetensors, b.safetensors], alpha: 0.3, dtype: fp32}
- {name: moved, command: align, models: [a.safetensors, b.safetensors], output: moved.safetensors}
- models: [half, moved]
  method: add_difference
  options: {clamp: true}
  base: f.safetensors
  align: false
  output: final.safetensors
"""


def test_several_steps_are_those_commands_one_after_the_other(folder: Path) -> None:
    recipe = written(folder, STEPS)
    plan = rebasin("merge", "--recipe", recipe, "--dry-run")
    assert "Step 3 of 3" in plan and "Nothing was done" in plan
    assert {path.name for path in folder.iterdir()} == {
        "recipe.yaml",
        *(f"{n}.safetensors" for n in ("a", "b", "f", "lora")),
    }
    rebasin("merge", "--recipe", recipe, "--save-recipe", folder / "done.yaml")
    assert not list(folder.glob(".*"))
    apart = folder / "apart"
    apart.mkdir()
    a, b, f = (folder / f"{name}.safetensors" for name in "abf")
    rebasin("merge", a, b, "--alpha", 0.3, "--dtype", "fp32", "-o", apart / "half.safetensors")
    rebasin("align", a, b, "-o", apart / "moved.safetensors")
    last = ["--method", "add_difference", "--option", "clamp=true", "--base", f, "--no-align"]
    rebasin(
        "merge",
        apart / "half.safetensors",
        apart / "moved.safetensors",
        *last,
        "-o",
        apart / "final.safetensors",
    )
    for name in ("moved.safetensors", "final.safetensors"):
        assert digest(folder / name) == digest(apart / name), name
    # What was written down does it again, and so does the header, which knows how the missing input was made.
    told = yaml.safe_load((folder / "done.yaml").read_text())
    assert [step.get("name") for step in told["steps"]] == ["half", "moved", None]
    wanted = digest(folder / "final.safetensors")
    assert "it stays" in rebasin("merge", "--recipe", folder / "done.yaml")
    (folder / "moved.safetensors").rename(folder / "old")
    text = rebasin("merge", "--recipe", folder / "final.safetensors", "-o", folder / "again.safetensors")
    assert "Step 3 of 3" in text and digest(folder / "again.safetensors") == wanted


def test_what_an_interrupted_recipe_has_done_stays_and_other_files_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = written(folder, STEPS)
    whole = stages.write

    def stopped(console: Any, request: Request, *rest: Any, **more: Any) -> Any:
        if request.output.name == "final.safetensors":
            raise KeyboardInterrupt
        return whole(console, request, *rest, **more)

    monkeypatch.setattr(stages, "write", stopped)
    rebasin("merge", "--recipe", recipe, expect=130)
    monkeypatch.setattr(stages, "write", whole)
    text = rebasin("merge", "--recipe", recipe)
    assert text.count("it stays") == 2 and "Step 3" in text and not list(folder.glob(".*"))
    # A file that was made otherwise is not replaced unasked.
    recipe.write_text(STEPS.replace("command: align", "command: align, seed: 4"))
    assert "was not made by this step" in rebasin("merge", "--recipe", recipe, expect=2)
    rebasin("merge", "--recipe", recipe, "--overwrite")


def test_weights_of_a_file_are_in_the_header_with_its_content(folder: Path) -> None:
    weights = folder / "weights.yaml"
    weights.write_text("fc1: 0.4\nfc2: [0, 1]\ndefault: 0.2\n")
    rebasin(
        "merge",
        *(folder / f"{n}.safetensors" for n in "ab"),
        "--weights",
        weights,
        "-o",
        folder / "m.safetensors",
    )
    weights.unlink()
    rebasin("merge", "--recipe", folder / "m.safetensors", "-o", folder / "n.safetensors")
    assert digest(folder / "n.safetensors") == digest(folder / "m.safetensors")
    recipe = written(
        folder, "models: [a.safetensors, b.safetensors]\nweights: {fc1: 0.4, fc2: [0, 1], default: 0.2}\n"
    )
    rebasin("merge", "--recipe", recipe, "-o", folder / "o.safetensors")
    assert digest(folder / "o.safetensors") == digest(folder / "m.safetensors")


OTHER: dict[str, Any] = {
    "options": ("k=0.5", "vote=count", 'text="1"'), "learn": ("algo.steps=7",), "components": ("vae", "unet"),
    "start": "identity", "dtype": "fp16", "weights": "IN=0.2,OUT=[0,1]", "method": "ties_sum", "device": "cpu",
    "variant": "fp16", "ray": "auto", "alpha": 0.25, "seed": 5, "threads": 2, "max_sweeps": 7,
}  # fmt: skip


def other(name: str, path: Path) -> Any:
    """A value of a field that is not its default."""
    if Path in typing.get_args(kinds()[name]):
        return (path,) * 2 if typing.get_origin(kinds()[name]) is tuple else path
    return OTHER[name] if name in OTHER else not getattr(Request, name)


def test_every_option_is_in_the_recipe_and_in_the_header_or_changes_nothing(
    files: Files, tmp_path: Path
) -> None:
    fields = {field.name: field.default for field in dataclasses.fields(Request)}
    assert set(KEYS.values()) | set(UNCHANGED) == set(fields) and not set(KEYS.values()) & set(UNCHANGED)
    for name in set(KEYS.values()) - {"inputs"}:
        value = other(name, files.f)
        assert value != fields[name], name
        asked = Request((files.a, files.b), tmp_path / "m.safetensors", **{name: value})
        (tmp_path / "recipe.yaml").write_text(recipe_text([Done("merge", asked, {})], tmp_path))
        (step,) = read_recipe(tmp_path / "recipe.yaml").steps
        found = step.request({}, {"output": asked.output})
        there = getattr(found, name)
        paths = isinstance(value, Path) or (isinstance(value, tuple) and isinstance(value[0], Path))
        if paths:
            resolved = [Path(p).resolve() for p in (there if isinstance(there, tuple) else (there,))]
            assert set(resolved) == {files.f.resolve()}, name
        else:
            assert there == value, name
        if name not in (*stages.OWN, "inputs"):
            assert name in stages.choices(asked), name


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("models: [a.safetensors, b.safetensors]\nalfa: 1", "line 2: there is no key 'alfa'; did you mean 'alpha'?"),
        ("models: [a.safetensors]", "line 1: there are 1 `models`, but merge takes two or more"),
        ("models:\n- a.safetensors\n- c.safetensors\noutput: x.safetensors", "line 3: there is no"),
        ("models: [a.safetensors, b.safetensors]\nalpha: much", "line 2: `alpha` is 'much', but it is a number"),
        ("models: [a.safetensors, b.safetensors]\nseed: -1", "line 2: `seed` is -1, but it is from 0 to 4294967295"),
        ("models: [a.safetensors, b.safetensors]\nstart: here", "line 2: `start` is 'here', but it is one of"),
        ("models: [a.safetensors, b.safetensors]\nprune: 1", "line 2: `prune` is 1, but it is true or false"),
        ("models: [a.safetensors, b.safetensors]\nweights: true", "line 2: `weights` is True"),
        ("models:\n- a.safetensors\n- hf://owner/name\noutput: x.safetensors", "line 3: hf://owner/name is not in"),
        ("models: [a.safetensors, b.safetensors]\noptions: 3", "line 2: `options` is 3, but it is entries"),
        ("models: [a.safetensors, {file: b.safetensors, sha256: 12}]", "the sha256 of b.safetensors is 12"),
        ("models: [a.safetensors, 7]", "7 is no path"),
        ("rebasin: 2\nmodels: [a.safetensors, b.safetensors]", "line 1: `rebasin` is 2"),
        ("models: [a.safetensors, b.safetensors]\nmodels: []", "name 'models' twice"),
        ("models: [a.safetensors", "line 1: this is no YAML"),
        ("models: [a.safetensors, b.safetensors]\nx: !!python/object:os.system {}", "of entries and lists"),
        ("just words", "A recipe is 'just words', but it is entries"),
        ("", "is empty; a recipe has entries"),
        ("steps: []", "line 1: there are no steps"),
        ("steps:\n- {models: [x, f]}\n- {name: x, models: [a.safetensors, b.safetensors]}\n", "x is a later step"),
        ("steps:\n- {name: x, models: [x, a.safetensors], output: y.safetensors}\n", "x is this step itself"),
        ("steps:\n" + 2 * "- {models: [a.safetensors, b.safetensors], output: o.ckpt}\n", "an earlier step writes"),
        ("rebasin: true\nmodels: [a.safetensors, b.safetensors]", "line 1: `rebasin` is True"),
        ("models: [a.safetensors, b.safetensors]\nmethod: ties_sum\noutput: o.safetensors", "needs --base FILE"),
        ("steps:\n" + 2 * "- {models: [a.safetensors, b.safetensors]}\n", "no later step uses"),
        ("command: align\nmodels: [a.safetensors, b.safetensors]\nmethod: slerp", "line 3: there is no key 'method'"),
        ("command: sing\nmodels: [a.safetensors, b.safetensors]", "line 1: `command` is 'sing'"),
        ("models: [a.safetensors, b.safetensors]", "does not say where the result goes; give -o FILE"),
    ],
)  # fmt: skip
def test_what_a_recipe_can_not_ask_for_is_one_sentence_with_the_line(
    folder: Path, text: str, sentence: str
) -> None:
    found = rebasin("merge", "--recipe", written(folder, text), expect=2)
    assert sentence in " ".join(found.split()), found
    assert found.startswith("Error: ") and found.count("\n") == 1 and len(found) <= 302


def test_a_number_with_an_exponent_is_one(folder: Path) -> None:
    (step,) = read_recipe(written(folder, "models: [a.safetensors, b.safetensors]\nalpha: 1e-1")).steps
    assert step.given["alpha"] == 0.1


@pytest.mark.parametrize(
    "told",
    [
        {"options": {"score": "os:system"}},
        {"options": ["k=0.2", "score=os:system"]},  # a list means the same
        {"options": {"score=os:system": 1}},
        {"learned": True, "learn": ["model.task=os.system"]},
    ],
)
def test_a_header_calls_no_function(told: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="may call a function of your Python"):
        recipe_file.require_data(told, "the header of x")
    recipe_file.require_data(
        {"learn": ["algo.steps=7", "algo.lr=1e-3"], "options": {"k": 0.5}}, "the header of x"
    )


def test_what_changes_the_file_stands_in_the_recipe(folder: Path) -> None:
    recipe = written(folder, "models: [a.safetensors, b.safetensors]\noutput: m.safetensors\nalign: false")
    assert "--alpha changes the result" in rebasin("merge", "--recipe", recipe, "--alpha", 0.5, expect=2)
    assert "--align changes the result" in rebasin("merge", "--recipe", recipe, "--align", expect=2)
    assert "3 models are given" in rebasin(
        "merge", *[folder / "a.safetensors"] * 3, "--recipe", recipe, expect=2
    )
    assert "or a recipe: --recipe FILE" in rebasin("merge", expect=2)
    assert "must end in" in rebasin("merge", "--recipe", recipe, "--save-recipe", folder / "r.txt", expect=2)
    several = written(folder, STEPS)
    assert "several steps" in rebasin(
        "merge", folder / "a.safetensors", folder / "b.safetensors", "--recipe", several, expect=2
    )
    bare = folder / "a.safetensors"
    assert "does not tell how it was made" in rebasin("merge", "--recipe", bare, "-o", folder / "x", expect=2)
    rebasin("merge", "--recipe", written(folder, recipe_of_hash(folder)), "--threads", 1, "--device", "cpu")


def recipe_of_hash(folder: Path) -> str:
    hashed = {"file": "a.safetensors", "sha256": digest(folder / "a.safetensors").upper()}
    return json.dumps({"models": [hashed, "b.safetensors"], "output": "m.safetensors", "align": False})


def test_a_recipe_for_sd_mecha_makes_the_same_file(folder: Path) -> None:
    import sd_mecha

    b = folder / "moved.safetensors"
    rebasin("align", folder / "a.safetensors", folder / "b.safetensors", "-o", b)
    given = [folder / "a.safetensors", b, "--method", "add_difference", "--base", folder / "f.safetensors"]
    target, kept = folder / "m.safetensors", folder / "m.mecha"
    assert "sd-mecha knows no alignment" in rebasin(
        "merge", *given, "-o", target, "--save-recipe", kept, expect=2
    )
    assert not target.exists()
    rebasin("merge", *given, "--alpha", 0.4, "--no-align", "-o", target, "--save-recipe", kept)
    theirs: dict[str, torch.Tensor] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # where its paths begin
        recipe = sd_mecha.deserialize(kept.read_text())
        sd_mecha.merge(recipe, merge_dtype=torch.float64, output_dtype=torch.float32, output=theirs)
    ours = read(target)
    theirs.pop("__metadata__", None)
    assert set(theirs) <= set(ours) and len(theirs) > 20
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)
