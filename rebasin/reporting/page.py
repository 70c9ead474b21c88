"""report.html: one file with all pictures inside. What the pages have in common is in page.html.j2 and kit.html.j2."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from omegaconf import OmegaConf

from ..files import write_text
from .numbers import number
from .results import Results, effective

NAME = "report.html"

_environment = Environment(
    loader=PackageLoader("rebasin.reporting", "."),
    autoescape=True,  # what a page is given may come from outside
    undefined=StrictUndefined,
    trim_blocks=True,
)
_kit: Any = _environment.get_template("kit.html.j2").module
_environment.globals.update(
    number=number, answers_of=_kit.answers_of, table_of=_kit.table_of, pairs=_kit.pairs
)


def render(template: str, **values: Any) -> str:
    """The page's text."""
    return _environment.get_template(f"{template}.html.j2").render(**values)


def save_page(
    template: str, results: Results, folder: Path, pictures: Iterable[str] = (), **values: Any
) -> Path:
    """Write the page about the results, called `r` there; of the files `pictures` it has those that are in `folder`,
    each under its name without the suffix.
    """
    paths = [folder / name for name in pictures]
    inside = {path.stem: data_uri(path) for path in paths if path.is_file()}
    machine = dict(results["environment"])
    machine |= machine.pop("versions")
    config = yaml(effective(results["config"], results.get("own")))
    text = render(template, r=results, pictures=inside, config=config, machine=machine, **values)
    return write_text(folder / NAME, text)


def yaml(config: Mapping[str, Any]) -> str:
    """A resolved configuration as config.yaml has it."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(config)))


def data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
