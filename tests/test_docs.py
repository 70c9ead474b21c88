"""What the documents show of the code is the code."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer.main

from rebasin import cli
from rebasin.matching import reference

ROOT = Path(__file__).parent.parent


def blocks(page: str) -> list[str]:
    """The Python examples of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.S)


def test_the_page_of_algorithms_shows_the_reference_as_it_is() -> None:
    source = Path(reference.__file__).read_text(encoding="utf-8")
    shown = [block for block in blocks("algorithms.md") if block.startswith("    ")]
    assert len(shown) == 2
    for block in shown:
        assert block in source


@pytest.mark.parametrize("page", ["algorithms.md", "auto.md", "repair.md"])
def test_the_example_of_a_page_runs(page: str) -> None:
    [example] = [block for block in blocks(page) if "import" in block]
    exec(compile(example, f"docs/{page}", "exec"), {})


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *sorted(p.name for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_within_the_repository_lead_somewhere(page: str) -> None:
    path = ROOT / page if (ROOT / page).is_file() else ROOT / "docs" / page
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        there = (path.parent / target).exists() or target.startswith(
            "reference/"
        )  # pages that the site generates
        assert there, f"{page} links to {target}"


@pytest.mark.parametrize("page", sorted(p.name for p in (ROOT / "docs").glob("*.md")))
def test_files_that_a_page_names_exist(page: str) -> None:
    """Paths in backquotes, from the root of the repository, of the package, or of one of its rooms."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    known = {
        str(p.relative_to(ROOT))
        for top in ("rebasin", "experiments", "tests", "scripts", "configs", "integrations")
        for p in (ROOT / top).rglob("*")
        if p.is_file()
    }
    for name in re.findall(r"`([\w./-]+\.(?:py|yaml))`", text):
        if "NAME" in name or name == "optimization_results.yaml":  # of your own; written by a sweep
            continue
        assert any(path == name or path.endswith(f"/{name}") for path in known), f"{page} names {name}"


COMMAND = re.compile(r"^    rebasin ([a-z][a-z-]*)(.*?)(?:\s+#.*)?$", re.M)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_commands_in_the_docs_have_the_options_that_they_are_given() -> None:
    app: Any = typer.main.get_command(cli.app)
    seen = 0
    for page in PAGES:
        for name, rest in COMMAND.findall(page.read_text(encoding="utf-8")):
            assert name in app.commands, f"{page.name}: there is no rebasin {name}"
            if name in ("search", "compare-methods"):  # Hydra's language
                continue
            known = {"--help"}.union(*(set(p.opts + p.secondary_opts) for p in app.commands[name].params))
            given = {word.partition("=")[0] for word in rest.split() if re.match(r"--?[a-z]", word)}
            assert given <= known, f"{page.name}: rebasin {name} has no {given - known}"
            seen += 1
    assert seen > 30


def test_choices_in_the_docs_are_configurations() -> None:
    groups = {folder.name: folder for folder in (ROOT / "configs").iterdir() if folder.is_dir()}
    seen = 0
    for page in PAGES:
        for line in re.findall(r"^    python -m rebasin\.run(.*)$", page.read_text(encoding="utf-8"), re.M):
            for group, choices in re.findall(
                r"(?<![\w.])\+?(\w+)=([a-z0-9_,]+)(?=\s|$)", line.partition(" #")[0]
            ):
                for choice in choices.split(",") if group in groups else ():
                    there = (groups[group] / f"{choice}.yaml").is_file()
                    assert there or choice in ("mine", "my_study"), (
                        f"{page.name}: there is no {group}={choice}"
                    )
                    seen += 1
    assert seen > 40


def test_the_site_has_every_page_and_each_is_there() -> None:
    """What mkdocs would say as well, where it is not installed."""
    nav = re.findall(r": ([\w/]+\.(?:md|ipynb))$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    generated = set(
        re.findall(r'^    "([\w/]+\.md)": ', (ROOT / "scripts" / "site_hooks.py").read_text(), re.M)
    )
    pages = {p.name for p in (ROOT / "docs").glob("*.md")} - {"results_appendix.md"}
    assert len(nav) == len(set(nav)) and pages <= set(nav) and len(generated) == 3
    for page in nav:
        assert page in generated or (ROOT / "docs" / page).is_file(), page


@pytest.mark.parametrize(
    "stored_as", sorted((ROOT / "docs" / "tutorials").glob("*.ipynb")), ids=lambda p: p.stem
)
def test_a_tutorial_is_stored_as_it_was_run(stored_as: Path) -> None:
    source, notebook = stored_as.with_suffix(".py"), json.loads(stored_as.read_text(encoding="utf-8"))
    cells = re.split(r"^# %%(?: \[markdown\])?\n", source.read_text(encoding="utf-8"), flags=re.M)[1:]
    assert len(cells) == len(notebook["cells"])
    for text, cell in zip(cells, notebook["cells"], strict=True):
        stored = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            text = re.sub(r"^# ?", "", text, flags=re.M)
        else:
            text = re.sub(r"^# !", "!", text, flags=re.M)
            assert cell["execution_count"] and not [o for o in cell["outputs"] if o["output_type"] == "error"]
        assert stored.strip() == text.strip(), "run python scripts/run_tutorials.py"
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", source.read_text(encoding="utf-8")):
        assert (source.parent / target).exists(), target


def test_the_results_are_those_of_the_stored_logs() -> None:
    from experiments.results_page import PAGE, written

    text = PAGE.read_text(encoding="utf-8")
    assert written(text) == text, "run python -m experiments.results_page"
    assert len(text.splitlines()) <= 250


def test_auto_is_above_naive_in_no_line_of_the_leaderboard() -> None:
    lines = (ROOT / "docs" / "results.md").read_text().split("<!-- table: leaderboard -->")[1]
    table = [line.split("|")[1:-1] for line in lines.split("<!-- /table -->")[0].splitlines() if "|" in line]
    place = [name.strip() for name in table[0]].index("auto")
    shares = [
        float(share[1]) for row in table[2:] if (share := re.match(r"\W*([\d.]+)%? \(", row[place].strip()))
    ]
    assert len(shares) >= 7 and max(shares) <= 100, shares


def test_the_readme_says_what_its_log_does() -> None:
    from experiments.readme_figures import RUNS, read, wrong

    log = read()
    assert list(log) == list(RUNS), "run python -m experiments.readme_figures"
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("*", "")
    assert not wrong(log, text)
    log["auto"] = {**log["auto"], "barrier": log["auto"]["barrier"] + 0.01}
    assert len(wrong(log, text)) == 1  # and it would be seen


def test_what_the_sites_list_of_changes_links_is_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is generated from CHANGELOG.md, which lies elsewhere."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    hooks = importlib.import_module("site_hooks")
    page = SimpleNamespace(file=SimpleNamespace(src_uri="changes.md"))
    shown = hooks.on_page_markdown(hooks.changes_page(), page, None, None)
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", shown)
    assert len(targets) > 20 and "integrations/comfyui/README.md" in shown
    for target in targets:
        assert (ROOT / "docs" / target).is_file(), target
