"""What the terminal shows: one line of progress for each stage, then a short table and the paths."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from ..types import ProgressEvent
from .answers import Answer
from .numbers import duration, number
from .results import Results
from .table import Table

EVENTS = "REBASIN_EVENTS"
"""A variable of the environment that names a file. There a command tells other programs what it does, one JSON object
a line: {"kind": "stage", "name"}, {"kind": "progress", "step", "total", "text"}, {"kind": "done", "name", "seconds",
"text"}, {"kind": "answer", "question", "short", "tone", "text"} and {"kind": "files", "paths"}.
"""

OFTEN = 0.2
"""Seconds between two progress events there."""

SELDOM = 60.0
"""Seconds between two lines of progress where there is no bar: in a log."""

TONES = {"good": "green", "mixed": "yellow", "bad": "red", "neutral": "default"}

FILES = {
    "report.html": "read this first",
    "curve.png": "the loss from A to B",
    "reliability.png": "accuracy against confidence",
    "methods.png": "every method, naive and aligned",
    "samples.png": "images of A, B and the midpoints",
    "xyz.png": "the same for several seeds",
    "blocks.png": "the weight of B by block",
    "search.png": "the loss at each step of the search",
    "steps.png": "images of the midpoint while it searched",
    "table.md": "the table above",
    "permutation.safetensors": "the permutation found, with its spec",
    "alignment.safetensors": "the permutation and the maps found, with their spec",
    "permutations.safetensors": "the permutations found, with their spec",
    "alignments": "what brings each model to the first: 0.safetensors (no change), 1.safetensors, ...",
    "aligned.safetensors": "B brought to A",
    "merged.safetensors": "the merge",
    "fisher_a.safetensors": "how much A's loss depends on each weight (rebasin merge --fisher)",
    "fisher_b.safetensors": "the same of B, in B's own order",
    "repaired.safetensors": "the merge after REPAIR",
    "best.safetensors": "the winner, with its recipe in the header",
    "checkpoint.safetensors": "the merge as a whole checkpoint in A's layout",
    "checkpoint": "the merge as a whole checkpoint, a folder as A is one",
    "checkpoint.permutation.safetensors": "for LoRAs of B (rebasin apply)",
    "checkpoint.alignment.safetensors": "for LoRAs of B (rebasin apply)",
    "results.json": "every figure",
    "study.db": "all trials; the same command goes on with them",
    "config.yaml": "the resolved configuration",
    "wandb": "offline run (upload: wandb sync)",
}


class _Remaining(ProgressColumn):
    """The time that is left, counted down while nothing is told."""

    max_refresh = 0.5

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._told = console

    def render(self, task: Task) -> Text:
        return Text(self._told.remaining(), style="dim")


@dataclass
class _Stage:
    """The stage that runs: since when, and when it last wrote a line into a log."""

    name: str
    began: float
    line: float


class Console:
    """Shows the stages of a run; `progress` is the callback that algorithms and evaluation report to."""

    def __init__(self, console: RichConsole | None = None):
        self.console = console or RichConsole(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._stage: _Stage | None = None
        self._details = ""
        self._first: tuple[str, float, float] | None = None  # stage, step and time of its first event
        self._end: float | None = None  # of the whole job, as `expect` was told
        self.seconds: dict[str, float] = {}
        self._events = os.environ.get(EVENTS)
        self._told = 0.0

    def tell(self, kind: str, **fields: Any) -> None:
        """An event for other programs; see `EVENTS`."""
        if self._events:
            with open(self._events, "a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, **fields}) + "\n")

    def expect(self, seconds: float | None, why: str = "") -> None:
        """How long the rest of the job will take, roughly; from now on each bar counts down, too. None: nobody knows.

        Args:
            why: how that is known, for the line that is printed; without it none is.
        """
        self._end = None if seconds is None else time.perf_counter() + seconds
        if seconds is not None and why:
            self.console.print(f"About {duration(max(1.0, seconds))} in all, {why}.", markup=False)

    def remaining(self) -> str:
        """What is left of the whole job, for the bar."""
        if self._end is None:
            return ""
        left = self._end - time.perf_counter()
        return f"{duration(left)} left in all" if left > 0 else "longer than expected"

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Show `name`, a bar and the seconds while the block runs; one line remains."""
        self._details = ""
        started = time.perf_counter()
        self._stage = _Stage(name, started, started)
        self.tell("stage", name=name)
        with Progress(
            TextColumn("{task.description:<9}", markup=False),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            _Remaining(self),
            TextColumn("{task.fields[details]}", markup=False),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        ) as self._bar:
            self._bar.add_task(name, total=None, details="")
            try:
                yield
            finally:
                self._bar = self._stage = None
                self.seconds[name] = time.perf_counter() - started
        self.tell("done", name=name, seconds=self.seconds[name], text=self._details)
        self.console.print(
            f"{name:<9} [dim]{self.seconds[name]:6.1f} s[/dim]  {escape(self._details)}".rstrip()
        )

    def say(self, text: str) -> None:
        """What the current stage found; it stays on the stage's line."""
        self._details = text
        self._show(details=text)

    def _show(self, **fields: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], **fields)

    def progress(self, event: ProgressEvent) -> None:
        """Show an event: stage and step, and any of total, objective, loss, moved, bytes, left.

        Algorithms that know it tell the seconds `left`, or None; for others it follows from step and total.
        """
        parts = [f"{event['stage']} {event['step']}" + (f"/{event['total']}" if event.get("total") else "")]
        measured = {key: event.get(key) for key in ("objective", "loss", "heldout")}
        parts += [f"{key} {number(value, 6)}" for key, value in measured.items() if value is not None]
        if event.get("moved") is not None:
            parts.append(f"moved {event['moved']:,}")
        if event.get("seconds_gradient") is not None:
            projection, gradient = event["seconds_projection"], event["seconds_gradient"]
            parts.append(f"projection {projection:.2f} s, gradient {gradient:.2f} s")
        if event.get("bytes"):
            parts.append(f"statistics {event['bytes'] / 1e9:.2g} GB")
        left = event["left"] if "left" in event else self._left(event)
        if left is not None:
            parts.append(f"{duration(left)} left")
        self._show(completed=event["step"], total=event.get("total"), details=", ".join(parts))
        now = time.perf_counter()
        if self._events and now - self._told > OFTEN:
            self._told = now
            self.tell("progress", step=event["step"], total=event.get("total"), text=", ".join(parts))
        if not self.console.is_terminal and self._stage is not None and now - self._stage.line > SELDOM:
            self._stage.line = now
            elapsed = duration(now - self._stage.began)
            self.console.print(f"{self._stage.name:<9} {elapsed}: {', '.join(parts)}", markup=False)

    def _left(self, event: ProgressEvent) -> float | None:
        """The seconds that remain, if a step takes what it took so far; None where there is no telling."""
        step, total = event["step"], event.get("total")
        if self._first is None or self._first[0] != event["stage"] or step < self._first[1]:
            self._first = event["stage"], step, time.perf_counter()
        done = step - self._first[1]
        if not total or done <= 0:
            return None
        return (time.perf_counter() - self._first[2]) / done * (total - step)

    def summary(self, results: Results, folder: Path, files: Container[str]) -> None:
        """What the figures say, and where the files are: those of these names."""
        # Late: matplotlib takes a second, and commands that only show progress do without.
        from .kinds import kind_of

        self.console.print()
        for part in kind_of(results).told(results):
            if isinstance(part, Table):
                self.console.print(part.terminal())
            elif isinstance(part, Answer):
                self.tell(
                    "answer", question=part.question, short=part.short, tone=TONES[part.tone], text=part.text
                )
                question = part.question if part.question.endswith("?") else f"{part.question}:"
                short = f"[bold {TONES[part.tone]}]{escape(part.short)}.[/]"
                self.console.print(f"{escape(question)} {short} {escape(part.text)}")
            else:
                self.console.print(part, markup=False)
        shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
        self.console.print(f"\nIn {shown}:", markup=False)
        there = {n: meaning for n, meaning in FILES.items() if n in files and (folder / n).exists()}
        self.tell("files", paths=[str(folder / name) for name in there])
        width = max((24, *map(len, there)))
        for name, meaning in there.items():
            self.console.print(f"  {name:<{width}}  [dim]{meaning}[/dim]")
