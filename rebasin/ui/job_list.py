"""The jobs of a page: commands in processes of their own, one after the other, kept while the page's server runs.

A job outlives the browser's window: whoever opens the page sees those that wait, run and ran. To cancel one is Ctrl-C
in a terminal: nothing is half-written, and the same job again goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError
from ..reporting.console import EVENTS
from .options import written

Status = Literal["waiting", "running", "done", "failed", "cancelled"]

LOG = 200_000
"""Bytes of a log's end that are shown."""

WIDTH = "110"
"""Columns of what a command prints."""


@dataclass(frozen=True)
class Stage:
    """A part of a job: its name, the seconds that it took (None: under way) and what it found."""

    name: str
    seconds: float | None = None
    text: str = ""


@dataclass(frozen=True)
class Answer:
    """One of the answers that end a command."""

    question: str
    short: str
    tone: str
    text: str


@dataclass(frozen=True)
class Job:
    """A job as it is now.

    Attributes:
        number: 1, 2, ... in the order of their clicks.
        words: the command line behind the command; `quick`: it waits for no other job.
        module: the command, as `python -m` takes it.
        status: of it; `ahead` is the number of jobs before it while it waits.
        seconds: that it has run.
        stages: those that it has begun.
        share: of the stage under way that is done, 0 to 1; None if that can't be told.
        text: what that stage tells, its time left included.
        answers, files: what it says at its end, and what it has written.
        log: what it printed, errors included.
        error: the sentence of one that failed.
    """

    number: int
    words: tuple[str, ...]
    quick: bool = False
    module: str = "rebasin"
    status: Status = "waiting"
    ahead: int = 0
    seconds: float = 0.0
    stages: tuple[Stage, ...] = ()
    share: float | None = None
    text: str = ""
    answers: tuple[Answer, ...] = ()
    files: tuple[str, ...] = ()
    log: str = ""
    error: str = ""

    @property
    def line(self) -> str:
        """The same on the command line."""
        return written(self.words, self.module)

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self.status in ("done", "failed", "cancelled")


@dataclass
class _Kept:
    job: Job
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    cancels: int = 0
    output: Path | None = None
    results: str = ""
    read: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)


class JobList:
    """All jobs since the server has started. Its methods may be called from any thread.

    Jobs inherit what this process does on Ctrl-C: if it ignores that, as a shell's background job does, they can't be
    cancelled by it. `serve` has a handler of its own, so its jobs have theirs.

    Args:
        at_once: so many run beside each other; the others wait, for each may want most of the memory.
        program: what to start; the module and the words of the command follow.
    """

    def __init__(self, at_once: int = 1, program: Sequence[str] = (sys.executable, "-P", "-m")) -> None:
        self._at_once, self._program = at_once, tuple(program)
        self._jobs: dict[int, _Kept] = {}
        self._lock = threading.RLock()
        self._folder = tempfile.TemporaryDirectory(prefix="rebasin-ui-", ignore_cleanup_errors=True)
        self._closed = False

    def start(
        self,
        words: Sequence[str],
        quick: bool = False,
        output: Path | None = None,
        results: str = "",
        module: str = "rebasin",
    ) -> int:
        """Begin a job, or let it wait for its turn; returns its number.

        Args:
            quick: it waits for no other.
            output: what it will write.
            results: the option of a file of figures, which is then what `results` of this object gives.
            module: another command than `rebasin`, as `python -m` takes it.

        Raises:
            ConfigError: a job that is not over writes the same.
        """
        with self._lock:
            if self._closed:
                raise ConfigError("The page is closing; start `rebasin ui` again.")
            target = None if output is None else output.resolve()
            for kept in self._jobs.values():
                if target is not None and kept.output == target and not kept.job.over:
                    raise ConfigError(
                        f"Job {kept.job.number} is to write {output}, too; choose another name, or cancel it."
                    )
            number = len(self._jobs) + 1
            folder = Path(self._folder.name) / str(number)
            folder.mkdir()
            self._jobs[number] = _Kept(
                Job(number, tuple(words), quick, module), folder, output=target, results=results
            )
            self._next()
        return number

    def cancel(self, number: int) -> None:
        """Ctrl-C; a second time, for a job that does not listen, what ends any program."""
        with self._lock:
            kept = self._jobs[number]
            if kept.job.over:
                return
            kept.cancels += 1
            if kept.process is None:
                kept.job = replace(kept.job, status="cancelled")
                return self._next()
            _signal(kept.process, signal.SIGINT if kept.cancels == 1 else None)

    def again(self, number: int) -> int:
        """The same job once more; what was found before it was cancelled is used."""
        with self._lock:
            kept = self._jobs[number]
        job = kept.job
        return self.start(job.words, job.quick, kept.output, kept.results, job.module)

    def get(self, number: int) -> Job | None:
        """A job as it is now; None if there is none of this number."""
        with self._lock:
            return None if number not in self._jobs else self._now(self._jobs[number])

    def all(self) -> list[Job]:
        """All jobs, the newest first, without their logs."""
        with self._lock:
            return [kept.job for _, kept in sorted(self._jobs.items(), reverse=True)]

    def results(self, number: int) -> dict[str, Any] | None:
        """The figures of a job that is done, if it has some; they go with the server."""
        with self._lock:
            kept = self._jobs.get(number)
        if kept is None or kept.job.status != "done" or not kept.results:
            return None
        return json.loads((kept.folder / "results.json").read_text(encoding="utf-8"))

    def close(self, seconds: float = 30.0) -> None:
        """Cancel all that run, and wait for them."""
        with self._lock:
            self._closed = True
            for number in self._jobs:
                self.cancel(number)
            left = [kept.process for kept in self._jobs.values() if kept.process is not None]
        until = time.monotonic() + seconds
        for process in left:
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                _signal(process, None)
                process.wait()
        self._folder.cleanup()

    def _next(self) -> None:
        """Start what may run; the lock is held."""
        running = sum(k.job.status == "running" and not k.job.quick for k in self._jobs.values())
        ahead = running
        for kept in self._jobs.values():
            if kept.job.status != "waiting":
                continue
            if kept.job.quick or running < self._at_once:
                running += not kept.job.quick
                self._run(kept)
            else:
                kept.job = replace(kept.job, ahead=ahead)
            ahead += not kept.job.quick

    def _run(self, kept: _Kept) -> None:
        environment = os.environ | {
            EVENTS: str(kept.folder / "events"),
            "PYTHONUNBUFFERED": "1",
            "PYTHONIOENCODING": "utf-8",
            "COLUMNS": WIDTH,
            "NO_COLOR": "1",
        }
        figures = [kept.results, str(kept.folder / "results.json")] if kept.results else []
        try:
            with (kept.folder / "log").open("wb") as log:
                kept.process = subprocess.Popen(
                    [*self._program, kept.job.module, *kept.job.words, *figures],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # Ctrl-C for the server is not for its jobs: it tells them itself
                )
        except OSError as error:
            kept.job = replace(kept.job, status="failed", error=f"It can't be started: {error}.")
            return
        kept.started = time.monotonic()
        kept.job = replace(kept.job, status="running", ahead=0)
        threading.Thread(target=self._wait, args=(kept,), daemon=True).start()

    def _wait(self, kept: _Kept) -> None:
        assert kept.process is not None
        code = kept.process.wait()
        with self._lock:
            own = self._folder.name
            job = self._now(kept)
            job = replace(job, files=tuple(path for path in job.files if not path.startswith(own)))
            job = replace(job, seconds=time.monotonic() - kept.started, share=None, text="")
            if code == 0:
                job = replace(job, status="done")
            elif kept.cancels:
                job = replace(job, status="cancelled")
            else:
                job = replace(job, status="failed", error=_sentence(job.log, code))
            kept.job = job
            self._next()

    def _now(self, kept: _Kept) -> Job:
        """Its job with what it has told since; the lock is held."""
        job = kept.job
        if job.status == "running":
            kept.job = job = replace(told(job, self._events(kept)), seconds=time.monotonic() - kept.started)
        return replace(job, log=_end(kept.folder / "log"))

    def _events(self, kept: _Kept) -> list[dict[str, Any]]:
        """What it has told, whole lines only."""
        with contextlib.suppress(OSError), (kept.folder / "events").open("rb") as file:
            file.seek(kept.read)
            whole = file.read().rpartition(b"\n")[0]
            if whole:
                kept.read += len(whole) + 1
                kept.events = [json.loads(line) for line in whole.splitlines()]
                return kept.events
        return []


def _signal(process: subprocess.Popen[bytes], sign: signal.Signals | None) -> None:
    """As a terminal does, to the program and all that it has started; None ends any program."""
    with contextlib.suppress(OSError):
        if os.name == "nt":  # which has no such signal for one program alone
            process.kill()
        elif process.poll() is None:
            os.killpg(process.pid, sign or signal.SIGKILL)


def told(job: Job, events: Sequence[dict[str, Any]]) -> Job:
    """A job after these events (see `reporting.console.Console`)."""
    apply: dict[str, Callable[[Job, dict[str, Any]], Job]] = {
        "stage": lambda job, e: replace(job, stages=(*job.stages, Stage(e["name"])), share=None, text=""),
        "progress": lambda job, e: replace(job, share=_share(e), text=e["text"]),
        "done": lambda job, e: replace(
            job, stages=(*job.stages[:-1], Stage(e["name"], e["seconds"], e["text"])), share=None, text=""
        ),
        "answer": lambda job, e: replace(
            job, answers=(*job.answers, Answer(*(e[key] for key in ("question", "short", "tone", "text"))))
        ),
        "files": lambda job, e: replace(job, files=(*job.files, *e["paths"])),
    }
    for event in events:
        job = apply.get(event["kind"], lambda job, e: job)(job, event)
    return job


def _share(event: dict[str, Any]) -> float | None:
    total = event.get("total")
    return min(1.0, event["step"] / total) if total else None


def _end(path: Path) -> str:
    """The end of a log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG))
            return file.read().decode("utf-8", errors="replace").replace("\r\n", "\n")
    except OSError:
        return ""


def _sentence(log: str, code: int) -> str:
    """Why a command failed, by what it printed last."""
    for line in reversed(log.splitlines()):
        if line.startswith("Error: "):
            return line.removeprefix("Error: ")
    last = next((line for line in reversed(log.splitlines()) if line.strip()), "")
    if code < 0:
        return f"It was ended from outside (signal {-code}), maybe for want of memory; Again goes on where it was."
    return f"It ended with exit code {code}: {last[:200]}" if last else f"It ended with exit code {code}."
