"""Hydra with errors for people: one sentence with the valid choices instead of a traceback, exit code 2."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    OmegaConfBaseException,
)

from ..errors import ConfigError, RebasinError, shown, unknown
from ..files import config_dir, print_anything, unwritable
from ..integrations.signatures import CONFIG, VERSION_BASE, composed, options, whole_options
from . import option_help  # noqa: F401 - the configs' help templates name what it registers
from .experiments import GROUP as EXPERIMENT
from .experiments import expand
from .own import flags_first, is_own, own
from .paths import quoted
from .resume import UNFINISHED

FULL_ERROR = "HYDRA_FULL_ERROR"

COMMANDS = {
    CONFIG: "python -m rebasin.run",
    "search": "rebasin search",
    "compare_methods": "rebasin compare-methods",
}
"""Configuration -> the command that begins with it."""

UNNAMED = ("hydra", "path", EXPERIMENT)
"""Groups whose configs need no name."""

INTERNAL = ("name", "kind", "task", "architecture", "_target_", "object", "many")
"""Fields of configs that are not for the command line."""


QUOTED = """in quotes that the shell leaves, as in 'model.a="A, [1].safetensors"'"""

UNWRITABLE = (errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.ENOSPC, errno.ENOTDIR, errno.EROFS)

ANEW = "no file is half-written, and the same command begins this run anew; what was finished before it stays"


def launch(job: Callable[[DictConfig], Any], config: str = CONFIG, kept: str = ANEW) -> None:
    """Run `job` as a Hydra application over the package's configs, of which `config` is the one it begins with.

    Ctrl-C ends it with exit code 130 and what is `kept` of its work, in words.

    What the user got wrong ends in one sentence on stderr and exit code 2; HYDRA_FULL_ERROR=1 shows the
    traceback. Errors that are no `RebasinError` are bugs and keep theirs.
    """
    print_anything()
    full = os.environ.get(FULL_ERROR) == "1"
    started = False

    def checked(cfg: DictConfig) -> Any:
        nonlocal started
        started = True
        try:
            check_types(cfg, config)
            found = job(cfg)
        except (RebasinError, OmegaConfBaseException, HydraException) as error:
            if full:
                raise
            _leave_nothing()
            _stop(error, config)
        if cfg.get("dry_run"):
            _leave_nothing()
        return found

    application = hydra.main(config_path=str(config_dir()), config_name=config, version_base=VERSION_BASE)
    # With this variable Hydra passes exceptions on instead of printing them itself.
    os.environ[FULL_ERROR] = "1"
    try:
        sys.path[:0] = [] if {"", os.getcwd()} & set(sys.path) else [os.getcwd()]  # what is named by its path
        sys.argv[1:] = flags_first(expand(quoted(own(sys.argv[1:]))))
        application(checked)()
    except KeyboardInterrupt:
        told = "the same command with resume=true goes on where it stopped" if UNFINISHED else kept
        print(f"\nInterrupted; {told}.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        # A disk that is full, or can't be written, and the end of the memory are met anywhere.
        expected = _is_out_of_memory(error) or (isinstance(error, OSError) and error.errno in UNWRITABLE)
        if full or (started and not expected):
            raise
        _stop(error, config)  # the command line does not make a configuration
    finally:
        if not full:
            os.environ.pop(FULL_ERROR, None)


def _is_out_of_memory(error: BaseException) -> bool:
    """Python's own error, those of torch's devices, and what torch says on the CPU."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _leave_nothing() -> None:
    """Remove the folder that Hydra made for a run which was refused before any work, or for a dry one, unless it has
    anything else, or was chosen by the user.
    """
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.RUN or any(
        str(given).startswith("hydra.run.dir") for given in hydra.overrides.hydra
    ):
        return
    folder = Path(hydra.runtime.output_dir)
    own = folder / str(hydra.output_subdir)
    with contextlib.suppress(OSError):
        if list(folder.iterdir()) == [own]:
            shutil.rmtree(own)
            folder.rmdir()
            folder.parent.rmdir()  # that of its model and algorithm, if nothing else is there


def _stop(error: Exception, config: str) -> NoReturn:
    print(f"Error: {explain(error, sys.argv[1:], config)}", file=sys.stderr)
    # Not an Exception, so that Hydra adds nothing to the sentence.
    sys.exit(2)


def explain(error: Exception, arguments: Iterable[str] = (), config: str = CONFIG) -> str:
    """What is wrong with the command line, and what would be valid, in one sentence."""
    if isinstance(error, MissingConfigException):
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        folders = own_folders(arguments := list(arguments))
        choices = sorted({*(error.options or ()), *_names(group, [config_dir(), *folders])})
        choices = [one for one in choices if not one.startswith("_")]
        fault = f"There is no {group} {choice!r}"
        told = _faulty(fault, _naming(rf"{re.escape(choice)}\b", arguments)) if _inner(error) else fault
        return str(unknown(told, choice, choices, "choose one of"))
    if _is_out_of_memory(error):
        return (
            "The memory did not suffice; a smaller batch_size, smaller pictures (model.size) or algo.checkpointing=true"
            " take less, and dry_run=true tells how much a run on checkpoints takes."
        )
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override!r} can't be read; write GROUP=CHOICE or OPTION=VALUE, and text with brackets, commas, an"
            f" equals sign or letters of other alphabets {QUOTED}."
        )
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, RebasinError):  # that of a resolver
        cause = cause.__cause__ or cause.__context__
    message = str(cause or error)
    if cause is not None:
        named = [path for path in re.findall(r"[\w.]+\.\w+", message) if "whose source" in message]
        return _faulty(message, _naming(rf"/{re.escape(named[0])}@", arguments)) if named else message
    if isinstance(error, yaml.YAMLError):
        return _no_yaml(error)
    key = str(getattr(error, "full_key", None) or "")
    if key and isinstance(error, InterpolationKeyError):
        return str(_refers(f"{key}{_of(key, arguments)}", error))
    if key and isinstance(error, ConfigAttributeError | ConfigKeyError):
        return f"There is no {key}{_of(key, arguments)}, but it is needed; add it there."
    if isinstance(error, OSError):  # Hydra makes the folder of a run
        return str(unwritable(error.filename or "The folder of the results", error))
    if found := re.match(r"Ambiguous value for argument (.+)", message):
        return (
            f"The value of {found[1]} has a comma: write a list in brackets and text {QUOTED}, or add --multirun to try"
            " one value after another."
        )
    if message.startswith("Config group override must be"):
        return "A group takes the name of one of its choices, GROUP=CHOICE; --help lists them."
    if found := re.match(r"Could not override '([^']+)'", message):
        return _no_option(found[1].split("@")[0], arguments, config)
    if found := re.match(r"Could not append to config. An item is already at '([^']+)'", message):
        return f"The option {found[1]!r} exists already; write it without the leading +."
    return message.splitlines()[0].rstrip(".") + "." if message else f"{type(error).__name__}."


def _inner(error: MissingConfigException) -> bool:
    """Whether the config that there is not stands in the defaults of another one, not on the command line."""
    return re.match(r"In '(?!config'|search'|compare_methods')", str(error)) is not None


def _names(group: str, folders: Iterable[Path]) -> list[str]:
    return [file.stem for folder in folders for file in folder.glob(f"{group}/*.yaml")]


def _naming(pattern: str, arguments: Iterable[str]) -> Path | None:
    """The config of the user's own that has this in its defaults, of several the one that was chosen."""
    given = list(arguments)
    files = sorted(file for folder in own_folders(given) for file in folder.rglob("*.yaml"))
    chosen = {told.rpartition("=")[2] for told in given}
    for file in sorted(files, key=lambda file: file.stem not in chosen):
        with contextlib.suppress(OSError, ValueError):
            if re.search(rf"^defaults:(?:.*|(?:\n\s*-.*)*){pattern}", file.read_text("utf-8"), re.MULTILINE):
                return file
    return None


def _faulty(message: str, file: Path | None) -> str:
    """The sentence for a fault in the defaults of a config of the user's own."""
    return (
        message if file is None else f"{file} has a fault in its defaults: {message[0].lower()}{message[1:]}"
    )


def _no_yaml(error: yaml.YAMLError) -> str:
    """The sentence for a file that Hydra could not read."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    place = f"{mark.name}, line {mark.line + 1}," if mark is not None else "A config"
    told = getattr(error, "problem", None) or getattr(error, "context", None) or str(error).splitlines()[0]
    return f"{place} can't be read as YAML ({told}); mend the file."


def _of(key: str, arguments: Iterable[str]) -> str:
    """Of which config of the user's own an option is, " of GROUP=CHOICE (FILE)"; "" of another."""
    group, given = key.partition(".")[0], list(arguments)
    chosen = [c for g, _, c in (told.lstrip("+").partition("=") for told in given) if g == group]
    told = config_told(group, chosen[-1], own_folders(given)) if chosen else ""
    return f" of {told}" if told.endswith(")") else ""


def config_told(group: str, choice: object, folders: Iterable[Path]) -> str:
    """A config as sentences name it: GROUP=CHOICE, and the file of one that is not the package's."""
    files = [folder / group / f"{choice}.yaml" for folder in folders if exists(group, choice, folder)]
    return f"{group}={choice} ({files[0]})" if files and not exists(group, choice) else f"{group}={choice}"


NEEDED = {"algo": "_target_: package.module.function", "model": "task: package.module.function"}
"""The line without which a config of this group says nothing."""


def name_of(cfg: Any, group: str, runtime: Any) -> str:
    """The name of the chosen config of a group, which is a part of the names of folders.

    Args:
        runtime: Hydra's account of what was chosen where.

    Raises:
        ConfigError: the config is no mapping, or has none, or one that can't be in a file's name.
    """
    choice, node = runtime.choices.get(group), cast(Any, OmegaConf.select(cfg, group))
    told = config_told(group, choice, _folders(runtime))
    if node is not None and not isinstance(node, DictConfig):
        kind = "a list" if isinstance(node, ListConfig) else shown(node)
        raise ConfigError(f"{told} is {kind}, but a config is a mapping, lines of OPTION: VALUE.")
    lines = [f"name: {choice}", *([NEEDED[group]] if group in NEEDED else [])]
    missing = [line for line in lines if (node or {}).get(line.partition(":")[0]) is None]
    if missing or node is None:
        fields = " and no ".join(line.partition(":")[0] for line in missing)
        raise ConfigError(
            f"{told} has no {fields}; add the line{'s' * (len(missing) > 1)} {' and '.join(map(repr, missing))}."
        )
    name = node.name
    if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name):
        given = OmegaConf.to_container(name) if OmegaConf.is_config(name) else name
        raise ConfigError(
            f"{group}.name of {told} is {shown(given)}, but it takes text that can be a part of a folder's name, such"
            f" as {choice}."
        )
    return name


PLAIN_NAME = re.compile(r"""(?!\.)[^\x00-\x1f/\\:*?"<>|]{1,100}""")

OmegaConf.register_new_resolver(
    "name_of", lambda group, _root_: name_of(_root_, group, _root_.hydra.runtime), replace=True
)


def _folders(runtime: Any) -> list[Path]:
    """Those in which Hydra looked for configs."""
    return [Path(source.path) for source in runtime.config_sources if source.schema == "file"]


def check_types(cfg: DictConfig, config: str = CONFIG) -> None:
    """Compare the values in `cfg` with the types of their defaults.

    A default of null accepts anything. Where a config of the user's own (--config-dir) is chosen, the defaults of the
    functions that it names count, and for its other options what stands in it.

    Raises:
        ConfigError: names the option, its value, and what it takes.
    """
    runtime = HydraConfig.get().runtime
    choices = {g: c for g, c in runtime.choices.items() if (config_dir() / g).is_dir()}
    told_of = {group: f"{group}={choice}" for group, choice in choices.items() if choice is not None}
    mine = {g: told for g, told in told_of.items() if g != "hydra" and not exists(g, choices[g])}
    ours = [told for g, told in told_of.items() if g not in ("hydra", EXPERIMENT, *mine)]
    folders = _folders(runtime)
    for group in choices:
        _require_seen(group, choices[group], folders)
    for group in mine:
        if group not in UNNAMED:
            name_of(cfg, group, runtime)
            _require_references(cfg[group], group, config_told(group, choices[group], folders))
    chosen = [told for g, told in mine.items() if g != EXPERIMENT]
    named = [str(told) for told in HydraConfig.get().overrides.task if is_own(str(told))]
    loose = {*mine, *(told.partition("@")[2].partition(".")[0] for told in named)}
    defaults = composed([*_searched(folders), *ours, *chosen, *named] if chosen else [*ours, *named], config)
    for key in defaults:
        group = str(key)
        own = _typed(defaults[key]) if group in loose and group in cfg else defaults[key]
        _compare(own, cfg[key], group, f" of {mine[group]}" if group in mine else "")
    for told in named:
        _require_whole(cfg, *told.removeprefix("+own/").replace("=", "@").split("@"))


def _require_whole(cfg: DictConfig, role: str, where: str, path: str) -> None:
    """Raise `ConfigError` where an option that a signature says is an int has a fraction."""
    for name in whole_options(path):
        value = OmegaConf.select(cfg, f"{where}.{name}")
        if isinstance(value, float):
            raise ConfigError(f"{where}.{name} is {value!r}, but {path} takes a whole number there ({role}).")


def _require_references(node: DictConfig, path: str, told: str) -> None:
    """Raise `ConfigError` where an option of the config refers to one that there is not."""
    for key in node:
        try:
            value = node.get(key)
        except InterpolationKeyError as error:
            raise _refers(f"{path}.{key} of {told}", error) from error
        if isinstance(value, DictConfig):
            _require_references(value, f"{path}.{key}", told)


def _refers(told: str, error: InterpolationKeyError) -> ConfigError:
    found = re.match(r"Interpolation key '([^']+)'", str(error))
    return ConfigError(
        f"{told} refers to {found[1] if found else 'another'!r}, but there is no such option; give a value, or name one"
        " that there is."
    )


def _typed(node: Any) -> Any:
    """A config of the user's own, with the defaults of the functions that it names in place of their options' values.

    Whole numbers become fractions where nothing of ours says that they must be whole; null is where anything goes.
    """
    if not isinstance(node, DictConfig):
        return node
    found = OmegaConf.to_container(node, resolve=False)
    assert isinstance(found, dict)
    target = str(found.get("_target_"))
    signed = dict[str, Any]()
    with contextlib.suppress(ConfigError):  # a source that can't be read, or with defaults that can't
        signed = options(target) if "_target_" in found else {}
    made = {}
    for name, value in found.items():
        value = signed.get(str(name), value)
        loose = isinstance(value, int) and not isinstance(value, bool)
        if isinstance(value, dict):
            made[name] = _typed(OmegaConf.create(value))
        elif isinstance(value, str) and ("${" in value or value == "???"):
            made[name] = None
        else:
            ours = name in signed and target.startswith("rebasin.")
            made[name] = float(value) if loose and not ours else value
    return OmegaConf.create(made)


def _compare(default: Any, value: Any, path: str, of: str = "") -> None:
    if isinstance(default, DictConfig):
        if not isinstance(value, DictConfig):
            own = f"options of its own: {', '.join(map(str, default))}" if default else "options, {} for none"
            raise ConfigError(f"{path}{of} is {value!r}, but it has {own}.")
        for key in default:
            _compare(default[key], value.get(key), f"{path}.{key}" if path else str(key), of)
    elif default is not None and not isinstance(value, FURTHER.get(path, ())):
        kind, takes = next((kind, takes) for kind, takes in KINDS if isinstance(default, kind))
        # Python's True is an int, too.
        if not isinstance(value, kind) or isinstance(value, bool) != isinstance(default, bool):
            told = "null" if value is None else repr(value)
            raise ConfigError(f"{path}{of} is {told}, but it takes {takes}.")


KINDS: tuple[tuple[Any, str], ...] = (
    (bool, "true or false"),
    (int, "a whole number"),
    ((float, int), "a number"),
    (str, "text"),
    (ListConfig, "a list, for example [a,b]"),
)

FURTHER = {"algo.repair": ListConfig, "algo.points": ListConfig, "algo.pivot": str, "algo.anchor": type(None)}
FURTHER |= dict.fromkeys(("model.train", "model.a", "model.b", "model.files"), type(None))
"""Options that take something else as well as what their default is; who uses them looks into it. Of a network of the
user's own files may stand in the place of a training, and the other way round.
"""


def _no_option(name: str, arguments: Iterable[str], config: str) -> str:
    """The sentence for an option that does not exist: the nearest one, and those that do."""
    groups = composed([], config)
    cfg = _chosen(list(arguments), config, groups)
    if name not in groups and (config_dir() / name).is_dir():
        commands = [command for other, command in COMMANDS.items() if name in composed([], other)]
        return f"The group {name!r} has no effect here: it is for {' and '.join(commands)}; leave it out."
    parent, _, _ = name.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    if node is None:
        return _no_option(parent, arguments, config)
    if not isinstance(node, DictConfig):
        return f"{parent!r} has no options of its own."
    prefix = f"{parent}." if parent else ""
    known = [prefix + str(k) for k in node if k not in INTERNAL]
    if isinstance(node.get("object"), DictConfig):
        known += [f"{prefix}object.{k}" for k in node.object if k not in INTERNAL]
    return str(unknown(f"There is no option {name!r}", name, known, "the options there are"))


def _chosen(arguments: list[str], config: str, groups: DictConfig) -> DictConfig:
    """The configuration with the arguments that choose a config of a group, one of the user's own included."""
    folders = own_folders(arguments)
    search = [told for told in arguments if told.startswith("hydra.searchpath=")] or _searched(folders)
    ours, own = list[str](), list[str]()
    for argument in arguments:
        group, _, choice = argument.lstrip("+").partition("=")
        if (group in groups and exists(group, choice)) or is_own(argument):
            ours.append(argument)
        elif group in groups and any(exists(group, choice, folder) for folder in folders):
            own.append(argument)
    try:
        return composed([*search, *ours, *own], config)
    except (HydraException, OmegaConfBaseException):  # the user's config is at fault, too
        return composed(ours, config)


def _searched(folders: Sequence[Path]) -> list[str]:
    """The argument with which Hydra looks into these folders, too."""
    quoted = (str(folder).replace("\\", "\\\\").replace("'", "\\'") for folder in folders)
    return ["hydra.searchpath=[" + ",".join(f"'{folder}'" for folder in quoted) + "]"] if folders else []


def own_folders(arguments: Sequence[str]) -> list[Path]:
    """The folders of configs that the command line adds to the package's."""
    found = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, value = argument.partition("=")
        if flag in ("--config-dir", "-cd"):
            found.append(value if equals else following)
        elif flag == "hydra.searchpath":
            found += re.findall(r"[^\[\],'\"]+", value)
    return [Path(folder.removeprefix("file://")).absolute() for folder in found]


def _require_seen(group: str, choice: object, folders: Sequence[Path]) -> None:
    """Raise `ConfigError` if a chosen config of the package hides one of the user's own that says something else."""
    name = Path(group) / f"{choice}.yaml"
    if not exists(group, choice):
        return
    for folder in folders:
        own = folder / name
        if own.is_file() and own.read_bytes() != (config_dir() / name).read_bytes():
            raise ConfigError(
                f"{own} has the name of a config of this package, which would be used in its place; give it another"
                " name."
            )


def exists(group: object, choice: object, folder: Path | None = None) -> bool:
    """Whether the package, or another folder, has this config."""
    return ((folder or config_dir()) / str(group) / f"{choice}.yaml").is_file()
