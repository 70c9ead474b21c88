"""Snapshots: the public face keeps what it has, and a change of an error's wording is seen."""

from __future__ import annotations

import difflib
import importlib.util
import re
from functools import reduce

import pytest

import rebasin
from tests.golden import public, sentences
from tests.golden.__main__ import FOLDER

ROOT = sentences.ROOT
ANEW = "if that is meant, write it anew: python -m tests.golden --write"


def stored(name: str) -> list[str]:
    return (FOLDER / name).read_text(encoding="utf-8").splitlines()


def require_same(found: list[str], expected: list[str]) -> None:
    gone, new = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    told = [f"gone: {line}" for line in gone] + [f"new:  {line}" for line in new]
    assert not told, "\n".join([*told, f"The public face changed; {ANEW}"])


def test_the_public_face_is_what_it_was() -> None:
    require_same(public.lines(), [line for line in stored("public.txt") if not line.startswith("file ")])


def test_names_in_the_docs_exist() -> None:
    """`rebasin.room.name`, wherever a page says it, can be imported."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    named = {
        name: page.name for page in pages for name in re.findall(r"\brebasin(?:\.\w+)+", page.read_text())
    }
    assert len(named) > 10
    missing = [f"{page}: {name}" for name, page in sorted(named.items()) if not exists(name)]
    assert not missing, "\n".join(missing)


def exists(name: str) -> bool:
    """Whether this is a module, or an attribute of one, or of a class in one."""
    parts = name.split(".")
    module, rest = rebasin, parts[1:]
    while rest and importlib.util.find_spec(f"{module.__name__}.{rest[0]}") is not None:
        module, rest = importlib.import_module(f"{module.__name__}.{rest[0]}"), rest[1:]
        if not hasattr(module, "__path__"):
            break
    try:
        reduce(getattr, rest, module)
    except AttributeError:
        return False
    return True


def test_jobs_leave_the_files_that_they_left() -> None:
    """Each job is run as from the command line."""
    require_same(public.files(), [line for line in stored("public.txt") if line.startswith("file ")])


def test_sentences_of_errors_are_those_that_were_read() -> None:
    found, expected = [str(s) for s in sentences.sentences()], stored("error_sentences.txt")
    changes = [line for line in difflib.ndiff(expected, found) if line[:2] in ("- ", "+ ")]
    assert not changes, "\n".join([*changes, f"Sentences changed; {ANEW}"])


def test_sentences_of_errors_are_sentences() -> None:
    whole = [s for s in sentences.sentences() if not s.error.endswith("()")]
    wrong = {str(s): faults for s in whole if (faults := sentences.faults(s.text))}
    assert not wrong, "\n".join(f"{text}\n    {', '.join(faults)}" for text, faults in wrong.items())


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("nothing fits.", "begins"),
        ("Nothing fits", "period"),
        ("Nothing fits.\\nAt all.", "line"),
        ("Nothing fits.", ""),
        ("algo.steps is 0, but it is at least 1.", ""),
        ("{...} has no tensor '{...}'.", ""),
        ("'{...}' is no model.", ""),
        ("Choose another of {...}", ""),
    ],
)
def test_what_a_sentence_is(text: str, fault: str) -> None:
    found = sentences.faults(text)
    assert (len(found) == 1 and fault in found[0]) if fault else not found
