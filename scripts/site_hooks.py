"""What mkdocs is told beyond mkdocs.yml: pages that are generated, and links that lead out of the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)")
"""To a file of the repository that is no page."""

ROOMS = {
    "matching": "Matching",
    "merging": "Merging",
    "evaluation": "Evaluation",
    "tracing": "Tracing",
    "checkpoints": "Checkpoints",
    "adapters": "Adapters",
    "objectives": "Objectives",
    "models": "Networks",
    "data": "Data",
}

SAID = {
    "algo": "`algo=NAME`: how B is aligned to A.",
    "merge": "`merge=NAME`: what becomes of the aligned models.",
    "model": "`model=NAME`: what is aligned.",
    "data": "`data=NAME`: what is trained and measured on.",
    "objective": "`objective=NAME`: what good means.",
    "evaluate": "`evaluate=NAME`: what is measured beside the loss.",
    "experiment": "`+experiment=NAME`: a study as the paper has it.",
    "logger": "`logger=NAME`: who is told.",
    "space": "`space=NAME`: what `rebasin search` may try.",
    "path": "Where files are read and written.",
    "hydra": "Of Hydra itself: sweeps, clusters, the folder of a run.",
}


def python_page() -> str:
    """The public names, from their docstrings."""
    import importlib

    import rebasin

    parts = ["# Python\n\nEverything public, from its docstring. Other names may change.\n"]
    names = [name for name in rebasin.__all__ if name != "__version__"]
    parts.append("## rebasin\n")
    parts += [f"::: {located(getattr(rebasin, name))}\n" for name in names]
    seen = {located(getattr(rebasin, name)) for name in names}
    for room, title in ROOMS.items():
        module = importlib.import_module(f"rebasin.{room}")
        parts.append(f"## {title}\n\n`rebasin.{room}`\n")
        for name in module.__all__:
            place = located(getattr(module, name))
            if place and place not in seen:
                seen.add(place)
                parts.append(f"::: {place}\n")
    return "\n".join(parts)


def located(value: Any) -> str:
    """Where a class or function is defined; "" for what is neither."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    return f"{module}.{name}" if module and name and module.startswith("rebasin") else ""


def configurations_page() -> str:
    """Every configuration, as it is, with the function whose signature has the other defaults."""
    folder = ROOT / "configs"
    parts = [
        "# Configurations\n\nEvery file of `configs/`, as it is. A configuration has only what differs on purpose: all"
        " other options and their defaults stand in the signature of the function that `_target_` names, and"
        " `python -m rebasin.run algo=NAME --help` lists them.\n"
    ]
    for file in sorted(folder.glob("*.yaml")):
        parts.append(_config(file, f"`{file.name}`", 2))
    for group in sorted(p for p in folder.iterdir() if p.is_dir()):
        parts.append(f"## {group.name}\n\n{SAID.get(group.name, '')}\n")
        parts += [
            _config(file, f"`{file.relative_to(group).with_suffix('')}`", 3)
            for file in sorted(group.rglob("*.yaml"))
        ]
    return "\n".join(parts)


def _config(file: Path, title: str, level: int) -> str:
    return f"{'#' * level} {title}\n\n```yaml\n{file.read_text(encoding='utf-8').rstrip()}\n```\n"


def changes_page() -> str:
    """CHANGELOG.md, with links as from a page in docs/: what is none of its pages is then named, not linked."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    return re.sub(r"\]\((?!https?:|#)", "](../", text).replace("](../docs/", "](")


PAGES = {
    "reference/python.md": python_page,
    "reference/configurations.md": configurations_page,
    "changes.md": changes_page,
}


def on_files(files: Any, config: Any) -> Any:
    """mkdocs asks for further files."""
    from mkdocs.structure.files import File  # pyright: ignore[reportMissingImports]

    for name, make in PAGES.items():
        files.append(File.generated(config, name, content=make()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """mkdocs asks for the text of a page: files of the repository are named, not linked."""
    return LINK.sub(outward, markdown) if "/" not in page.file.src_uri else markdown


def outward(found: re.Match[str]) -> str:
    """A link to a file of the repository, as text; the README's place is taken by the start page."""
    text, target, anchor = found[1], found[2].removeprefix("../"), found[3] or ""
    if target == "README.md":
        return f"[{text}](index.md)"
    return text if target in text or anchor else f"{text} (`{target}`)"
