"""Doing what a recipe says, step by step, and writing down what was done."""

from __future__ import annotations

import glob
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ..checkpoints.provenance import sha256_of
from ..errors import ConfigError
from ..files import write_text
from . import pipeline, session
from .inputs import check_output, require_place
from .merge_weights import method_options, require_method
from .recipe import File, Recipe, Step
from .recipe_text import Done, mecha_text, recipe_text, require_mecha
from .request import KEYS, UNCHANGED, Request, flag, kinds
from .stages import require_meant

if TYPE_CHECKING:
    from ..reporting.console import Console

OF_THE_MACHINE = ("device", "threads", "ray")
"""Where the work is done, which a command may say otherwise than its recipe."""

FORMS = (".yaml", ".yml", ".mecha")


def plain(console: Console, request: Request) -> None:
    """A merge as the command line says it.

    Raises:
        RebasinError: as for `pipeline.merge`, or the recipe can't be saved.
    """
    require_saving(request.save_recipe, [request])
    read = pipeline.merge(console, request)
    save(console, request.save_recipe, [Done("merge", request, read or {})], request.dry_run)


def follow(console: Console, recipe: Recipe, given: Mapping[str, Any]) -> None:
    """All steps of a recipe; of several those that were done before an interruption stay as they are.

    Args:
        given: what stands on the command line: fields of `Request`.

    Raises:
        RebasinError: the recipe asks for what can't be done, or a step fails as the command would.
    """
    session.remark(console, recipe.remarks)
    more = _allowed(recipe, given)
    steps = [*recipe.steps[:-1], replace(recipe.steps[-1], **_replaced(recipe, more))]
    final = steps[-1]
    if (output := final.output) is None:
        raise ConfigError(
            f"{recipe.path} does not say where the result goes; give -o FILE, or write an `output`."
        )
    steps = [step.fetched() for step in steps]
    final = steps[-1]
    if len(steps) == 1:
        request = final.request({}, {**more, "output": output})
        require_saving(request.save_recipe, [request])
        read = _do(final.command, request)
        return save(console, request.save_recipe, [Done(final.command, request, read or {})], request.dry_run)
    folder = _folder(output, steps)
    made = _results(steps, folder)
    requests = _requests(steps, made, folder, more)
    require_saving(more.get("save_recipe"), requests)
    if more.get("dry_run"):
        return _plan(console, steps, requests)
    _require_files(console, steps)
    folder.mkdir(exist_ok=True)
    done = []
    for number, (step, request) in enumerate(zip(steps, requests, strict=True), 1):
        title = f" ({step.name})" if step.name else ""
        console.console.print(f"\nStep {number} of {len(steps)}{title}: {step.command}", markup=False)
        read = _do(step.command, request)
        done.append(Done(step.command, request, read or {}, step.name, _made_by(step, made)))
    save(console, more.get("save_recipe"), done, False)
    for one in (folder, *output.parent.glob(f".{glob.escape(output.name)}-*.steps")):
        shutil.rmtree(one, ignore_errors=True)


def _do(command: str, request: Request) -> Mapping[Path, str]:
    """One step, on the device and with the threads that it asks for."""
    console = session.begin(request.device, request.threads)
    return {"merge": pipeline.merge, "align": pipeline.align}[command](console, request)


def _allowed(recipe: Recipe, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the command line may say beside a recipe.

    Raises:
        ConfigError: it says what the recipe has to.
    """
    for name in given:
        files = Path in get_args(kinds()[name]) and name not in UNCHANGED
        if name in KEYS.values() and not files and name not in OF_THE_MACHINE:
            raise ConfigError(
                f"{flag(name)} changes the result, and what that is stands in {recipe.path}; change it there, or leave"
                " out one of the two."
            )
        if files and len(recipe.steps) > 1:
            what = "Models" if name == "inputs" else flag(name)
            raise ConfigError(
                f"{what} can't be given beside {recipe.path}, which has several steps with their own."
            )
    return {name: value for name, value in given.items() if name != "recipe"}


def _replaced(recipe: Recipe, more: dict[str, Any]) -> dict[str, Any]:
    """The files and output of the last step, where the command line has others; these are taken out of `more`."""
    step = recipe.steps[-1]
    files = dict(step.files)
    for name in [name for name in more if name in KEYS.values() and name not in OF_THE_MACHINE]:
        value = more.pop(name)
        paths = value if isinstance(value, tuple) else (value,)
        known = files.get(name, ())
        if len(known) != len(paths):
            what = "models" if name == "inputs" else flag(name)
            raise ConfigError(
                f"{len(paths)} {what} are given, but {recipe.path} has {len(known)} to replace."
            )
        files[name] = tuple(
            File(path, own.sha256, None, flag(name)) for path, own in zip(paths, known, strict=True)
        )
    return {"files": files, "output": more.pop("output", None) or step.output}


def _folder(output: Path, steps: Sequence[Step]) -> Path:
    """Where results that only later steps use are kept until all is done: the same folder for the same recipe."""
    told = [
        [
            one.command,
            {n: [(str(f.path), f.step) for f in fs] for n, fs in one.files.items()},
            one.given,
            one.name,
        ]
        for one in steps
    ]
    key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
    return output.with_name(f".{output.name}-{key}.steps")


def _results(steps: Sequence[Step], folder: Path) -> dict[str, Path]:
    """Name of a step -> its result; a folder where its first model is one."""
    made: dict[str, Path] = {}
    for step in steps:
        if step.name is None:
            continue
        first = step.files["inputs"][-1 if step.command == "align" else 0]
        like = first.path if first.step is None else made[first.step]
        own = step.name if like.is_dir() or (first.step and not like.suffix) else f"{step.name}.safetensors"
        made[step.name] = step.output or folder / own
    return made


def _requests(
    steps: Sequence[Step], made: Mapping[str, Path], folder: Path, more: Mapping[str, Any]
) -> list[Request]:
    """What each step asks for, looked at before any work as far as it can be.

    Raises:
        ConfigError: a file is missing, an output can't be written, or a method has no such option.
    """
    from ..merging.merged import find_method  # late: torch

    found: list[Request] = []
    for step in steps:
        output = step.output or (made[step.name] if step.name else folder / "result")
        request = step.request(
            made, {**more, "output": output, "resume": True, "intermediate": step.output is None}
        )
        if step.output is not None:
            if any(step.output.absolute() == other.output.absolute() for other in found):
                raise ConfigError(
                    f"{step.where}: an earlier step writes {step.output}, too; give each its own."
                )
            check_output(output, [path for path in request.inputs if path.exists()], True, resume=True)
        if step.command == "merge":
            method = find_method(request.method)
            require_method(request, method)
            method_options(method, request.options, len(request.inputs))
        found.append(request)
    return found


def _require_files(console: Console, steps: Sequence[Step]) -> None:
    """Whether the files of all steps are those that the recipe means, before the first of them begins.

    Raises:
        ConfigError: one has another sha256.
    """
    wanted = {
        f.path: f.sha256
        for step in steps
        for own in step.files.values()
        for f in own
        if f.sha256 and not f.step
    }
    with console.stage("hash"):
        for path in wanted:
            require_meant(path, sha256_of(path, console.progress), {path: str(wanted[path])})
        console.say(f"{len(wanted)} files are those of the recipe" if wanted else "the recipe has no sha256")


def _made_by(step: Step, made: Mapping[str, Path]) -> dict[Path, str]:
    names = [file.step for own in step.files.values() for file in own if file.step is not None]
    return {made[name]: name for name in names}


def _plan(console: Console, steps: Sequence[Step], requests: Sequence[Request]) -> None:
    """The plan of each step whose models are there."""
    for number, (step, request) in enumerate(zip(steps, requests, strict=True), 1):
        say = console.console.print
        say(
            f"\nStep {number} of {len(steps)}{f' ({step.name})' if step.name else ''}: {step.command}",
            markup=False,
        )
        if all(path.exists() for path in request.inputs):
            _do(step.command, request)
        else:
            names = ", ".join(path.name for path in request.inputs)
            say(f"Of {names}, some of which earlier steps make; write {request.output}.", markup=False)


def require_saving(target: Path | None, requests: Sequence[Request]) -> None:
    """Whether the recipe can be saved, before any work.

    Raises:
        ConfigError: its place has no such ending or folder, or sd-mecha can't do what is asked for.
    """
    if target is None:
        return
    require_place(target, FORMS)
    if target.exists() and not requests[-1].overwrite:
        raise ConfigError(f"{target} exists; add --overwrite to replace it, or choose another name.")
    if target.suffix.lower() == ".mecha":
        if any(request.intermediate for request in requests):
            raise ConfigError(
                "A recipe of sd-mecha needs all its files: give each step an `output`, or save the recipe as NAME.yaml."
            )
        require_mecha(requests[-1])


def save(console: Console, target: Path | None, done: Sequence[Done], dry_run: bool) -> None:
    """Write what was done as a recipe."""
    if target is None or dry_run:
        return
    folder = target.resolve().parent
    text = mecha_text(done, folder) if target.suffix.lower() == ".mecha" else recipe_text(done, folder)
    write_text(target, text)
    console.console.print(f"The recipe is in {target}.", markup=False)
