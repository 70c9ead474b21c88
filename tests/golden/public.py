"""The public face: one line for every name, parameter, command, option, config field and file that is promised."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from unittest.mock import patch

from omegaconf import DictConfig

from rebasin.files import config_dir
from rebasin.integrations.signatures import composed
from rebasin.jobs.configuration import INTERNAL

ROOMS = [
    "matching", "merging", "checkpoints", "evaluation", "objectives", "models", "data", "tracing", "adapters",
    "interpolation",
]  # fmt: skip
CLASSES = ("Permutation", "PermutationSpec")
COMPAT = ("PermutationCoordinateDescent", "MergeMany")
JOBS = ("run", "search", "report", "compare_methods", "dashboard")
BEGINNINGS = ("config", "search", "compare_methods")

TINY = [
    "model=mlp", "model.width=16", "model.depth=2", "model.recipe.epochs=2", "logger=none",
]  # fmt: skip
RUNS = {
    "run": ("rebasin.run", [*TINY, "evaluate.points=3"]),
    "run of many": ("rebasin.run", [*TINY, "algo=merge_many", "model.seeds=[0,1,2]"]),
    "search": ("rebasin.search", [*TINY, "search.trials=3", "search.minutes=0", "space=model"]),
    "comparison": ("rebasin.compare_methods", [*TINY, "methods.names=[weighted_sum,slerp]"]),
}


def lines() -> list[str]:
    """All but files, for which jobs are run."""
    return [*sorted(_names()), *sorted(_parameters()), *sorted(_commands()), *sorted(_configs())]


def _names() -> Iterator[str]:
    import rebasin
    from rebasin import errors

    for name in (*rebasin.__all__, *COMPAT):
        getattr(rebasin, name)
        yield f"name rebasin.{name}"
    for name, value in vars(errors).items():
        if inspect.isclass(value) and issubclass(value, errors.RebasinError):
            yield f"name rebasin.errors.{name}"
    for room in ROOMS:
        module = importlib.import_module(f"rebasin.{room}")
        for name in module.__all__:
            getattr(module, name)
            yield f"name rebasin.{room}.{name}"


def _parameters() -> Iterator[str]:
    import rebasin

    for name in rebasin.__all__:
        value = getattr(rebasin, name)
        if inspect.isroutine(value):
            yield from _of(f"rebasin.{name}", value)
    for name in (*CLASSES, *COMPAT):
        value = getattr(rebasin, name)
        yield from _of(f"rebasin.{name}", value)
        for attribute in dir(value):
            if not attribute.startswith("_"):
                found = inspect.getattr_static(value, attribute)
                method = found.__func__ if isinstance(found, classmethod | staticmethod) else found
                yield f"attribute rebasin.{name}.{attribute}"
                if inspect.isfunction(method):
                    yield from _of(f"rebasin.{name}.{attribute}", method)


def _of(name: str, function: object) -> Iterator[str]:
    for parameter in inspect.signature(function).parameters.values():  # type: ignore[arg-type]
        if parameter.name not in ("self", "cls"):
            mark = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
            yield f"parameter {name}({mark}{parameter.name})"


def _commands() -> Iterator[str]:
    import typer

    from rebasin.cli import app

    for module in JOBS:
        assert callable(_main(f"rebasin.{module}"))
        yield f"command python -m rebasin.{module}"
    group = typer.main.get_command(app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        yield f"command rebasin {name}"
        for parameter in command.params:
            for spelling in (*parameter.opts, *parameter.secondary_opts):
                if spelling.startswith("-"):  # others are names of arguments, which nobody writes
                    yield f"command rebasin {name} {spelling}"


def _main(module: str) -> Callable[[], object]:
    """What `python -m` of a module or package does."""
    found = importlib.import_module(module)
    return (importlib.import_module(f"{module}.__main__") if hasattr(found, "__path__") else found).main


def _configs() -> Iterator[str]:
    for beginning in BEGINNINGS:
        for field in composed([], beginning):
            yield f"config {beginning}.yaml {field}"
    for section in ("search", "methods"):
        yield from _fields(f"config {section}", composed([], BEGINNINGS[1 + (section == "methods")])[section])
    groups = {
        folder.name: sorted(path.stem for path in folder.glob("[!_]*.yaml"))
        for folder in config_dir().iterdir()
        if folder.is_dir()
    }
    for group, choices in groups.items():
        for choice in choices:
            yield f"config {group}={choice}"
    del groups["experiment"], groups["hydra"]
    for row in zip_longest(*groups.values()):  # one of each group at a time: composing takes a while
        chosen = [(group, choice) for group, choice in zip(groups, row, strict=True) if choice is not None]
        cfg = composed([f"{group}={choice}" for group, choice in chosen], "search")
        for group, choice in chosen:
            yield from _fields(f"config {group}={choice} {group}", cfg[group])


def _fields(prefix: str, node: object) -> Iterator[str]:
    if isinstance(node, DictConfig):
        for key in node:
            if key not in INTERNAL and not str(key).startswith("_"):
                yield f"{prefix}.{key}"
                yield from _fields(f"{prefix}.{key}", node._get_node(key))


def files() -> list[str]:
    """What tiny jobs leave; each is run here as from the command line."""
    found = []
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(io.StringIO()):
        for name, (module, arguments) in RUNS.items():
            folder = Path(temporary) / name.replace(" ", "-")
            with (
                patch.object(sys, "argv", [module, *arguments, f"hydra.run.dir={folder}"]),
                patch.dict("os.environ", REBASIN_CACHE=str(Path(temporary) / "cache")),
            ):
                _main(module)()
            found += [
                f"file {name}: {path.relative_to(folder).as_posix()}"
                for path in folder.rglob("*")
                if path.is_file()
                and not path.name.startswith((".", "study.db-"))  # the latter are sqlite's, and go
            ]
    return sorted(found)
