"""What the page offers, and the addresses of the files that it gives out."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .job_list import JobList
from .options import Command
from .roots import Roots


@dataclass(frozen=True)
class Desk:
    """What the page offers, given by the command line.

    Attributes:
        merge, compare, apply: the commands.
        describe: what a file is, as `rebasin inspect --json` has it.
        functions: options of merge methods that name a function, which is code: the page takes none.
    """

    merge: Command
    compare: Command
    apply: Command
    describe: Callable[[Path], dict[str, Any]]
    functions: Sequence[str] = ()


class Links:
    """The addresses of files that the page gives out: those that jobs have written, and pages of runs.

    They begin with a secret that only the page knows, so no other page that the browser shows can ask for them.
    """

    def __init__(self, roots: Roots, jobs: JobList) -> None:
        self.roots, self.jobs = roots, jobs
        self.key = secrets.token_urlsafe(18)

    def of_job(self, number: int) -> list[tuple[str, str]]:
        """(name, address) of each file that a job has written and that is still there; a folder has no address."""
        job = self.jobs.get(number)
        found = []
        for place, path in enumerate(job.files if job else ()):
            if Path(path).is_dir():
                found.append((f"{path} (a folder)", ""))
            elif Path(path).name == "report.html":
                found.append((path, self.of_page(Path(path).resolve())))
            elif self._file(path) is not None:
                found.append((path, f"files/{self.key}/{number}/{place}"))
        return found

    def file(self, key: str, number: int, place: int) -> Path | None:
        """The file of an address; None if there is none."""
        job = self.jobs.get(number)
        if not secrets.compare_digest(key.encode(), self.key.encode()) or job is None:
            return None
        return self._file(job.files[place]) if 0 <= place < len(job.files) else None

    def _file(self, path: str) -> Path | None:
        try:
            found = self.roots.inside(path)
        except ConfigError:
            return None
        return found if found.is_file() else None

    def of_page(self, page: Path) -> str:
        """The address of a run's page."""
        return f"reports/{self.key}/{_digest(page)}"

    def page(self, key: str, digest: str) -> Path | None:
        """The page of an address; None if there is none."""
        if not secrets.compare_digest(key.encode(), self.key.encode()):
            return None
        return next((page for page in self.roots.runs() if _digest(page) == digest), None)


def _digest(page: Path) -> str:
    return hashlib.sha256(str(page).encode("utf-8", "surrogatepass")).hexdigest()[:24]
