"""The folders that a page may read and write, and nothing else of the machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, shown

MODELS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
"""Endings of files with weights."""

ALIGNMENTS = (".permutation.safetensors", ".alignment.safetensors")
"""Endings of what an alignment leaves."""

FOLDERS = ("model_index.json", "config.json")
"""What makes a folder one of diffusers or transformers."""

DEPTH, MOST = 5, 5000
"""How deep folders are searched for files, and how many entries are looked at."""

UPLOADS = "uploads"


@dataclass(frozen=True)
class Roots:
    """Folders that exist, with symbolic links resolved; the first one is where results go."""

    folders: tuple[Path, ...]

    @classmethod
    def of(cls, paths: Sequence[Path]) -> Roots:
        """The folders of `--root`; without any the current one.

        Raises:
            ConfigError: one is no folder.
        """
        found = []
        for path in paths or [Path.cwd()]:
            if not path.is_dir():
                raise ConfigError(f"--root {path} is no folder; give one that exists.")
            found.append(path.resolve())
        return cls(tuple(dict.fromkeys(found)))

    def inside(self, text: str) -> Path:
        """The path that a user wrote, from the current folder or the first root, if it is within the folders.

        It is returned as it was written (a link's own name has the ending that tells what it is), but what it and,
        of a folder, what all in it leads to must be within.

        Raises:
            ConfigError: it is not.
        """
        text = text.strip()
        try:
            path = Path(text).expanduser() if text.startswith("~") else Path(text)
            if not path.is_absolute() and not self._has(path):
                path = self.folders[0] / path
            within = self._has(path)
            if within and path.is_dir():
                within = all(self._has(link) for link in _links(path))
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{shown(text)} is no path; choose a file from the list.") from error
        if not within:
            raise ConfigError(
                f"{shown(text)} leads out of {self}, the only place that this page may use; start it with `rebasin ui"
                " --root FOLDER` for others."
            )
        return self.brief(path)

    def _has(self, path: Path) -> bool:
        resolved = path.resolve()
        return any(resolved.is_relative_to(folder) for folder in self.folders)

    def brief(self, path: Path) -> Path:
        """From the current folder if it is in there; a name that begins like an option gets its folder."""
        path = Path(os.path.normpath(path)) if ".." not in path.parts else path
        if path.is_absolute() and path.is_relative_to(Path.cwd()):
            path = path.relative_to(Path.cwd())
        return path.absolute() if str(path).startswith("-") else path

    def files(self) -> tuple[list[str], list[str]]:
        """The models (files with weights, folders of diffusers and transformers) and the alignments there are."""
        models, alignments, seen = [], [], 0
        for root in self.folders:
            for folder, folders, names in os.walk(root):
                here = Path(folder)
                deep = len(here.relative_to(root).parts)
                folders[:] = sorted(name for name in folders if not name.startswith((".", "_")))
                seen += len(names) + len(folders)
                if seen > MOST:
                    break
                if here != root and any(name in names for name in FOLDERS):
                    models.append(str(self.brief(here)))
                    folders.clear()
                    continue
                if deep >= DEPTH:
                    folders.clear()
                for name in sorted(names):
                    if name.startswith(".") or not name.lower().endswith(MODELS):
                        continue
                    own = alignments if name.lower().endswith(ALIGNMENTS) else models
                    own.append(str(self.brief(here / name)))
        return list(dict.fromkeys(models)), list(dict.fromkeys(alignments))

    def runs(self) -> list[Path]:
        """The pages that runs have left, the newest first."""
        found, seen = [], 0
        for root in self.folders:
            for folder, folders, names in os.walk(root):
                folders[:] = [name for name in folders if not name.startswith(".")]
                seen += len(names) + len(folders)
                if seen > 10 * MOST:
                    break
                page = Path(folder) / "report.html"
                if page.name in names and self._has(page):
                    found.append(page)
        return sorted(dict.fromkeys(found), key=lambda page: -page.stat().st_mtime)

    def upload(self, temporary: Path, name: str) -> Path:
        """Move an uploaded file into the first root, under `uploads`; one of the same name stays.

        Raises:
            ConfigError: its name is none of a file with weights, or it can't be written.
        """
        name = Path(name.replace("\\", "/")).name
        if not name.lower().endswith(MODELS) or name.startswith((".", "-")):
            raise ConfigError(f"{shown(name)} is no file with weights; those end in {', '.join(MODELS)}.")
        folder = self.folders[0] / UPLOADS
        try:
            folder.mkdir(exist_ok=True)
            if not self._has(folder):
                raise ConfigError(f"{folder} leads out of {self}; remove that link.")
            stem, ending = name.split(".", 1)
            target, number = folder / name, 1
            while target.exists() or target.is_symlink():
                number += 1
                target = folder / f"{stem}-{number}.{ending}"
            shutil.move(temporary, target)
        except OSError as error:
            raise ConfigError(f"{folder} can't be written: {error.strerror or error}.") from error
        return self.brief(target)

    def __str__(self) -> str:
        return ", ".join(map(str, self.folders))


def _links(folder: Path) -> Iterator[Path]:
    for here, folders, names in os.walk(folder):
        yield from (path for name in (*folders, *names) if (path := Path(here) / name).is_symlink())
