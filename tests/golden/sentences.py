"""The sentences of the package's errors, out of its source; `{...}` stands for what is filled in."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from rebasin import errors

ROOT = Path(__file__).resolve().parents[2]


class Sentence(NamedTuple):
    file: str
    error: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}: {self.error}: {self.text}"


@cache
def sentences() -> list[Sentence]:
    """Of every place that makes an error of the package with a text of its own, sorted.

    Functions that return an error get a part of its text: theirs are listed with (), and need not be whole sentences.
    """
    found = []
    trees = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "rebasin").rglob("*.py"))}
    kinds = _kinds(list(trees.values()))
    helpers = {
        node.name: f"{node.name}()"
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.returns is not None and _name(node.returns) in kinds
    }
    makers = {kind: kind for kind in kinds} | helpers
    for path, tree in trees.items():
        for node in ast.walk(tree):
            name = _name(node.func) if isinstance(node, ast.Call) else ""
            if isinstance(node, ast.Call) and name in makers and node.args:
                text = _text(node.args[0])
                if text.strip() not in ("", "{...}"):
                    found.append(
                        Sentence(path.relative_to(ROOT).as_posix(), makers[name], text.replace("\n", "\\n"))
                    )
    return sorted(set(found))


def faults(text: str) -> list[str]:
    """What is wrong with the style of a sentence."""
    found = []
    begins_with_a_name = re.match(
        r"""\{\.\.\.\}|['"`(<\[]|--|\S*[._/=\d]\S*|(sd-mecha|torchvision|timm|wandb|scikit-learn)\b|"""
        r"""(?!there|this|it|that|one|none|nothing)\w+ (is|has|takes|needs|can|must|names)\b""",
        text,
    )
    if not text[0].isupper() and not begins_with_a_name:
        found.append("begins with neither a capital letter nor a name")
    if not re.search(r"[.?](['\"`)]|\{\.\.\.\})?$|\{\.\.\.\}$", text):
        found.append("does not end with a period")
    if "\\n" in text:
        found.append("has more than one line")
    return found


def _kinds(trees: list[ast.Module]) -> set[str]:
    """The package's errors: those of errors.py and all classes that derive from them."""
    known = {name for name, value in vars(errors).items() if isinstance(value, type)}
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    while more := {c.name for c in classes if any(_name(base) in known for base in c.bases)} - known:
        known |= more
    return known


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _text(node: ast.expr) -> str:
    """The text of an expression, as far as it is written there."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return "{...}"
