"""Options and their defaults for Hydra, read out of a function's signature without importing it.

A config names its function in its defaults list, and says itself only what differs on purpose:

    defaults: [/function/rebasin.matching.weight_matching@_here_]    # _target_, and every option with its default
    defaults: [/options/rebasin.merging.methods.ties.ties_sum@options]    # the options alone
    defaults: [/own/network/my_package.nets.Net@options]    # of a user's own; "???": no default

Sources are parsed, not run, so that --help and --cfg need not wait for torch. A default is therefore a literal, or the
name of a constant. Dataclasses have their fields for options.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from ..errors import ConfigError
from ..files import config_dir

CONFIG = "config"
VERSION_BASE = "1.3"

FUNCTION, OPTIONS, OWN = "/function/", "/options/", "/own/"
DEFINITION = ast.FunctionDef | ast.ClassDef

NO_OPTIONS = frozenset((
    "self", "spec", "states", "state_a", "state_b", "model", "model_a", "model_b", "objective", "batches", "heldout",
    "pipeline", "captions", "forward", "keep", "seed", "progress", "checkpoint", "resume_from",
    "base", "score", "alphas_cumprod", "unconditional",
))  # fmt: skip
"""Arguments that a run supplies, or that only Python can: of matching algorithms, merge methods and objectives."""

SUPPLIED: Mapping[str, frozenset[str]] = {
    "network": frozenset(),
    "train": frozenset(("network", "model", "batches", "seed", "device", "progress")),
    "dataset": frozenset(("split", "train")),
    "objective": frozenset(("model", "batch")),
}
"""Roles of functions and classes of a user's own -> arguments that a run supplies."""


def composed(overrides: Sequence[str], config: str = CONFIG) -> DictConfig:
    """The configuration of these choices, read-only; a Hydra application that is running is left as it is."""
    own = any(
        choice.startswith("hydra.searchpath") for choice in overrides
    )  # files that change while it runs
    return (_composed.__wrapped__ if own else _composed)(tuple(overrides), config)


@cache
def _composed(overrides: tuple[str, ...], config: str) -> DictConfig:
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base=VERSION_BASE):
            found = compose(config, overrides=list(overrides))
    finally:
        GlobalHydra.instance().hydra = running
    OmegaConf.set_readonly(found, True)  # the same for all who ask
    return found


def own_options(role: str, path: str) -> dict[str, Any]:
    """Option -> default of a function or class of the user's own in one of the roles of SUPPLIED; "???" where it has
    none or one that can't be told from its source alone.

    Raises:
        ConfigError: its source can't be found.
    """
    module, node = _found(path)
    found: dict[str, Any] = {}
    parameters = list(_parameters(module, node))
    # The objective may call what it is given as it likes; a class is made first.
    given = 2 if role == "objective" and isinstance(node, ast.FunctionDef) else 0
    for name, place, default in parameters[given:]:
        if name not in SUPPLIED[role] | {"self"}:
            try:
                found[name] = "???" if default is None else _value(place, default)
            except (ValueError, LookupError):
                found[name] = "???"
    return found


def whole_options(path: str) -> list[str]:
    """The options of the function or class at `path` that its signature says are whole numbers.

    Raises:
        ConfigError: its source can't be found.
    """
    _, node = _found(path)
    if isinstance(node, ast.ClassDef):
        node = next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), node)
    if not isinstance(node, ast.FunctionDef):
        return []
    names = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [one.arg for one in names if isinstance(one.annotation, ast.Name) and one.annotation.id == "int"]


@cache
def options(path: str) -> dict[str, Any]:
    """Option -> default of the function or class at `path`, "package.module.name"; "???" where it has none.

    Raises:
        ConfigError: its source can't be found, or a default is neither a literal nor a constant.
    """
    module, node = _found(path)
    found = {}
    try:
        for name, place, default in _parameters(module, node):
            found[name] = "???" if default is None or name in NO_OPTIONS else _value(place, default)
    except (ValueError, LookupError) as error:
        raise ConfigError(
            f"A default of {path} is neither a literal nor a constant; name the function by _target_ instead, and give"
            " its options in the config."
        ) from error
    return {name: default for name, default in found.items() if name not in NO_OPTIONS}


def meanings(path: str, seen: frozenset[str] = frozenset()) -> dict[str, str]:
    """Option -> what the docstring of the function or class at `path` says of it, on one line.

    Of options that it has no line for, or whose line is "see `another`", what those say that it names.
    """
    package, name = path.rpartition(".")[::2]
    module, node = _found(path)
    text = (ast.get_docstring(node) if isinstance(node, DEFINITION) else None) or ""
    found: dict[str, str] = {}
    for other in re.findall(r"(?:see|as for|as in|of|and|with|^) ?`(?:\w+\.)*(\w+)`", text)[::-1]:
        for place in (module, package, package.partition(".")[0]) if other not in seen | {name} else ():
            with contextlib.suppress(LookupError):
                where, definition = _look_up(place, other)
                found |= (
                    meanings(f"{where}.{other}", seen | {name}) if isinstance(definition, DEFINITION) else {}
                )
                break
    for names, told in re.findall(r"^    (\w[\w, ]*): (.*(?:\n {5,}.*)*)", text, re.MULTILINE):
        if not re.match(r"(see|as for|as in) `", told):
            found |= dict.fromkeys(names.split(", "), " ".join(told.split()))
    return found


def _found(path: str) -> tuple[str, ast.AST]:
    module, _, name = path.rpartition(".")
    try:
        return _look_up(module, name)
    except (LookupError, ImportError, ValueError) as error:
        top = module.partition(".")[0]
        try:
            known = importlib.util.find_spec(top) is not None
        except (ImportError, ValueError):
            known = False
        reason = "give package.module.function of another one"
        if not known:
            reason = (
                f"the module {top!r} is not found from here: go to its folder, or put that into PYTHONPATH"
            )
        raise ConfigError(f"There is no function {path!r} whose source can be read; {reason}.") from error


@cache
def _source(module: str) -> tuple[ast.Module, str]:
    """A module's syntax tree, and the package that its relative imports begin at; nothing is imported."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    for part in rest:
        inside = spec and spec.submodule_search_locations
        spec = PathFinder.find_spec(f"{spec.name}.{part}", inside) if spec and inside else None
    if spec is None or spec.origin is None or not spec.has_location:
        raise LookupError(module)
    package = module if spec.submodule_search_locations else module.rpartition(".")[0]
    return ast.parse(Path(spec.origin).read_text("utf-8")), package


def _look_up(module: str, name: str) -> tuple[str, ast.AST]:
    """The module that defines what `module` calls `name`, and the definition: a function, a class or a value."""
    tree, package = _source(module)
    for node in ast.walk(tree):  # what stands outermost comes first
        match node:
            case ast.FunctionDef() | ast.ClassDef() if node.name == name:
                return module, node
            case ast.Assign(targets=[ast.Name(id=target)]) | ast.AnnAssign(target=ast.Name(id=target)) if (
                target == name and node.value is not None
            ):
                return module, node.value
            case ast.ImportFrom():
                relative = "." * node.level + (node.module or "")
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return _look_up(importlib.util.resolve_name(relative, package), alias.name)
    raise LookupError(name)


def _parameters(module: str, node: ast.AST) -> Iterator[tuple[str, str, ast.expr | None]]:
    """Each parameter, the module that it stands in, and its default if it has one."""
    if isinstance(node, ast.FunctionDef):
        names = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        defaults = [*node.args.defaults, *node.args.kw_defaults]
        padded = [None] * (len(names) - len(defaults)) + defaults
        yield from ((name.arg, module, default) for name, default in zip(names, padded, strict=True))
    elif isinstance(node, ast.ClassDef):
        made = next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)
        if made is not None:
            yield from _parameters(module, made)
            return
        for base in node.bases:
            yield from _parameters(*_look_up(module, base.id)) if isinstance(base, ast.Name) else ()
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                yield field.target.id, module, field.value


def _value(module: str, node: ast.AST) -> Any:
    if isinstance(node, ast.Name):
        return _value(*_look_up(module, node.id))
    value = ast.literal_eval(node)  # pyright: ignore[reportArgumentType]
    return list(value) if isinstance(value, tuple) else value


class SignatureSource(ConfigSource):
    """What Hydra finds under /function/ and /options/; groups that no list shows."""

    @staticmethod
    def scheme() -> str:
        return "signature"

    def load_config(self, config_path: str) -> ConfigResult:
        kind, _, path = config_path.partition("/")
        if f"/{kind}/" == FUNCTION:
            found = {"_target_": path, **options(path)}
        elif f"/{kind}/" == OWN:
            found = own_options(*path.split("/", 1))
        else:
            found = {name: default for name, default in options(path).items() if default != "???"}
        return ConfigResult(self.full_path(), config_path, OmegaConf.create(found), {"package": None})

    def is_config(self, config_path: str) -> bool:
        return f"/{config_path}".startswith((FUNCTION, OPTIONS, OWN))

    def is_group(self, config_path: str) -> bool:
        return f"/{config_path}/" in (FUNCTION, OPTIONS, OWN, *(f"{OWN}{role}/" for role in SUPPLIED))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return []

    def available(self) -> bool:
        return True


class SignaturePath(SearchPathPlugin):
    """Puts the source beside the folders that Hydra looks into."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("rebasin", f"{SignatureSource.scheme()}://")


Plugins.instance().register(SignatureSource)
Plugins.instance().register(SignaturePath)
