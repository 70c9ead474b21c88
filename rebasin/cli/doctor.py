"""`rebasin doctor`: what is installed, on what it computes, and where it keeps what."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

DISTRIBUTION = "git-rebasin"


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """What is installed and does it fit, which devices there are, which caches lie where, and how much disk is free.

    The exit code is 1 if something that every command needs is missing or of a version that is not supported.
    Extras (pip install 'git-rebasin[NAME]') may be missing.

    \b
        rebasin doctor
        rebasin doctor --json > doctor.json
    """
    import json

    from .. import __version__
    from ..files import PACKAGE

    packages = list(packages_of(DISTRIBUTION))
    told = {
        "rebasin": __version__,
        "folder": str(PACKAGE),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": packages,
        "devices": devices(),
        "caches": caches(),
        "disk": disks(),
    }
    wrong = [one for one in packages if one["extra"] is None and one["fault"]]
    if as_json:
        print(json.dumps(told, indent=2))
    else:
        _show(told, wrong)
    if wrong or not packages:
        raise typer.Exit(1)


def packages_of(distribution: str) -> Iterator[dict[str, Any]]:
    """Each package that a distribution needs, or one of its extras: name, extra (None: always), the versions wanted,
    the one installed or None, and what is wrong with that ("" if nothing); nothing where it is not installed itself.
    """
    from packaging.requirements import Requirement

    try:
        wanted = metadata.requires(distribution) or []
        extras = metadata.metadata(distribution).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return
    parsed = [Requirement(text) for text in wanted]
    for extra in (None, *extras):
        for one in parsed:
            if one.marker is None:
                own = extra is None
            else:
                without, with_it = (
                    one.marker.evaluate({"extra": ""}),
                    one.marker.evaluate({"extra": extra or ""}),
                )
                own = without if extra is None else with_it and not without
            if not own:
                continue
            try:
                found: str | None = metadata.version(one.name)
            except metadata.PackageNotFoundError:
                found = None
            fault = "missing" if found is None else ""
            if found is not None and not one.specifier.contains(found, prereleases=True):
                fault = "version is not supported"
            yield {
                "name": one.name,
                "extra": extra,
                "wanted": str(one.specifier),
                "installed": found,
                "fault": fault,
            }


def devices() -> list[dict[str, Any]]:
    """What --device may be here: name, what it is, and bytes of memory, None where the system does not tell."""
    try:
        import torch

        from ..tensors.free_memory import free_memory

        found = [
            {
                "device": "cpu",
                "what": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads",
                "free": free_memory(torch.device("cpu")),
            }
        ]
        for number in range(torch.cuda.device_count()):
            one = torch.device("cuda", number)
            found.append(
                {"device": str(one), "what": torch.cuda.get_device_name(one), "free": free_memory(one)}
            )
        if torch.backends.mps.is_available():
            found.append({"device": "mps", "what": "Metal", "free": None})
    except Exception as error:  # whatever is wrong with an installation is what the user wants to know
        return [
            {"device": "none", "what": f"torch does not work: {error}".splitlines()[0][:200], "free": None}
        ]
    return found


def caches() -> list[dict[str, Any]]:
    """Folders that save time and can be removed: name, what is in it, path (None: off), bytes, how to clear it."""
    from ..files import cache_folder

    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    try:
        from huggingface_hub.constants import HF_HUB_CACHE

        hub: Path | None = Path(HF_HUB_CACHE)
    except Exception:  # not installed, or broken: the table of packages says so
        hub = None
    places = [
        ("rebasin", "trained networks, specs, unfinished matchings (REBASIN_CACHE)", cache_folder()),
        ("hub", "models of hf://owner/name, other programs' too (HF_HOME)", hub),
        (
            "wandb",
            "of the logger (WANDB_CACHE_DIR)",
            Path(os.environ.get("WANDB_CACHE_DIR") or home / "wandb"),
        ),
    ]
    return [
        {
            "name": name,
            "what": what,
            "path": None if path is None else str(path),
            "bytes": 0 if path is None else size_on_disk(path),
            "clear": None if path is None or not path.exists() else _removal(path),
        }
        for name, what, path in places
    ]


def _removal(path: Path) -> str:
    """The command of this system that removes a folder."""
    if sys.platform == "win32":
        return subprocess.list2cmdline(["rmdir", "/s", "/q", str(path)])
    return shlex.join(["rm", "-r", str(path)])


def size_on_disk(folder: Path) -> int:
    """Bytes of the files below a folder, links not followed; what can't be read counts nothing."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                found = os.lstat(os.path.join(where, name))
            except OSError:
                continue
            total += found.st_size
    return total


def disks() -> list[dict[str, Any]]:
    """Where files are written: what for, path, and the bytes that are free there."""
    from ..files import cache_folder

    places = [("here", Path.cwd()), ("cache", cache_folder()), ("temporary", Path(tempfile.gettempdir()))]
    found = []
    for name, path in places:
        if path is not None:
            there = next((one for one in (path, *path.parents) if one.exists()), None)
            free = None if there is None else shutil.disk_usage(there).free
            found.append({"what": name, "path": str(path), "free": free})
    return found


def _show(told: dict[str, Any], wrong: list[dict[str, Any]]) -> None:
    from rich.console import Console

    from .session import size, table

    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"rebasin {told['rebasin']}, Python {told['python']}, {told['system']}\n{told['folder']}\n",
        markup=False,
    )
    rows = [
        (one["name"], one["extra"] or "", one["wanted"] or "any", one["installed"] or "-", one["fault"])
        for one in told["packages"]
        if one["extra"] != "dev"
    ]
    console.print(table(("package", "extra", "wanted", "installed", ""), rows, words=5))
    console.print()

    def bytes_of(value: float | None) -> str:
        return "" if value is None else size(int(value))

    rows = [(one["device"], one["what"], bytes_of(one["free"])) for one in told["devices"]]
    console.print(table(("device", "what", "free memory"), rows, words=2))
    console.print()
    console.print("caches", style="dim")  # no tables: paths are to be copied whole
    for one in told["caches"]:
        text = f"{one['name']:<9} {bytes_of(one['bytes']):>9}  {one['path'] or 'off'}: {one['what']}"
        console.print(text, markup=False)
        if one["clear"]:
            console.print(f"{'':<20} clear it by: {one['clear']}", markup=False)
    console.print("\nfree disk", style="dim")
    for one in told["disk"]:
        console.print(f"{one['what']:<9} {bytes_of(one['free']):>9}  {one['path']}", markup=False)
    console.print()
    if not told["packages"]:
        console.print(
            f"Is all there? [bold red]No.[/] {DISTRIBUTION} is not installed: pip install {DISTRIBUTION}."
        )
    elif wrong:
        names = ", ".join(f"{one['name']} {one['installed'] or 'missing'}" for one in wrong)
        console.print(f"Is all there? [bold red]No.[/] {names}: pip install --upgrade {DISTRIBUTION}.")
    else:
        console.print("Is all there? [bold green]Yes.[/] Extras that are missing are for what you don't use.")
