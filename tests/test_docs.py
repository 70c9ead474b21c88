"""What the documents show of the code is the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
        assert (path.parent / target).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("page", sorted(p.name for p in (ROOT / "docs").glob("*.md")))
def test_files_that_a_page_names_exist(page: str) -> None:
    """Paths in backquotes, from the root of the repository, of the package, or of one of its rooms."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    known = {
        str(p.relative_to(ROOT))
        for top in ("rebasin", "experiments", "tests", "scripts", "configs")
        for p in (ROOT / top).rglob("*")
        if p.is_file()
    }
    for name in re.findall(r"`XX`", text):
        assert any(path == name or path.endswith(f"/{name}") for path in known), f"{page} names {name}"


def test_the_results_are_those_of_the_stored_logs() -> None:
    from experiments.results_page import PAGE, written

    text = PAGE.read_text(encoding="utf-8")
    assert written(text) == text, "run python -m experiments.results_page"
    assert len(text.splitlines()) <= 250


def test_the_readme_says_what_its_log_does() -> None:
    from experiments.readme_figures import RUNS, read, wrong

    log = read()
    assert list(log) == list(RUNS), "run python -m experiments.readme_figures"
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("*", "")
    assert not wrong(log, text)
    log["auto"] = {**log["auto"], "barrier": log["auto"]["barrier"] + 0.01}
    assert len(wrong(log, text)) == 1  # and it would be seen
