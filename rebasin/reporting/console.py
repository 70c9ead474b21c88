"""What the terminal shows: one line of progress for each stage, then a short table and the paths."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from .answers import answers, number
from .html import curve_rows, merge_lines, reward_rows
from .results import Results

if TYPE_CHECKING:
    from ..jobs.combination import Combination
    from ..spec import PermutationSpec
    from ..tasks import Task

TONES = {"good": "green", "mixed": "yellow", "bad": "red", "neutral": "default"}

FILES = {
    "report.html": "read this first",
    "curve.png": "the loss from A to B",
    "samples.png": "images of A, B and the midpoints",
    "blocks.png": "the weight of B by block",
    "search.png": "the loss at each step of the search",
    "steps.png": "images of the midpoint while it searched",
    "permutation.safetensors": "the permutation found, with its spec",
    "aligned.safetensors": "B brought to A",
    "merged.safetensors": "the merge",
    "checkpoint.safetensors": "A with this component merged, a whole checkpoint",
    "results.json": "every figure",
    "config.yaml": "the resolved configuration",
    "wandb": "offline run (upload: wandb sync)",
}


def _duration(seconds: float) -> str:
    """Seconds as people read them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Console:
    """Shows the stages of a run; `progress` is the callback that algorithms and evaluation report to."""

    def __init__(self, console: RichConsole | None = None):
        self.console = console or RichConsole(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._details = ""
        self._first: tuple[str, float, float] | None = None  # stage, step and time of its first event
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Show `name`, a bar and the seconds while the block runs; one line remains."""
        self._details = ""
        started = time.perf_counter()
        with Progress(
            TextColumn("{task.description:<9}", markup=False),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[details]}", markup=False),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        ) as self._bar:
            self._task = self._bar.add_task(name, total=None, details="")
            try:
                yield
            finally:
                self._bar = None
                self.seconds[name] = time.perf_counter() - started
        self.console.print(
            f"{name:<9} [dim]{self.seconds[name]:6.1f} s[/dim]  {escape(self._details)}".rstrip()
        )

    def say(self, text: str) -> None:
        """What the current stage found; it stays on the stage's line."""
        self._details = text
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, details=text)

    def progress(self, event: Mapping[str, Any]) -> None:
        """Show an event: stage and step, and any of total, objective, loss, moved, bytes, left.

        Algorithms that know it tell the seconds `left`, or None; for others it follows from step and total.
        """
        parts = [f"{event['stage']} {event['step']}" + (f"/{event['total']}" if event.get("total") else "")]
        parts += [
            f"{key} {number(event[key], 6)}"
            for key in ("objective", "loss", "heldout")
            if event.get(key) is not None
        ]
        if event.get("moved") is not None:
            parts.append(f"moved {event['moved']:,}")
        if event.get("seconds_gradient") is not None:
            split = (event["seconds_projection"], event["seconds_gradient"])
            parts.append(f"projection {split[0]:.2f} s, gradient {split[1]:.2f} s")
        if event.get("bytes"):
            parts.append(f"statistics {event['bytes'] / 1e9:.2g} GB")
        left = event["left"] if "left" in event else self._left(event)
        if left is not None:
            parts.append(f"{_duration(left)} left")
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task, completed=event["step"], total=event.get("total"), details=", ".join(parts)
            )

    def _left(self, event: Mapping[str, Any]) -> float | None:
        """The seconds that remain, if a step takes what it took so far; None where there is no telling."""
        step, total = event["step"], event.get("total")
        if self._first is None or self._first[0] != event["stage"] or step < self._first[1]:
            self._first = event["stage"], step, time.perf_counter()
        done = step - self._first[1]
        if not total or done <= 0:
            return None
        return (time.perf_counter() - self._first[2]) / done * (total - step)

    def plan(
        self,
        task: Task,
        specs: Mapping[str, PermutationSpec],
        config: Mapping[str, Any],
        folder: Path,
        combination: Combination,
    ) -> None:
        """What a run would do, and the specs: the one that is aligned in full, the others in a line."""
        a, b = task.labels
        lines = [
            "",
            *task.plan,
            f"Would verify the specs of {', '.join(specs)};",
            f"align B ({b}) to A ({a}), the {task.aligned}, by {config['algo']['name']};",
            *_estimate(config, specs[task.aligned]),
            f"merge by {combination.words};",
            f"evaluate {config['objective']['name']} at {config['evaluate']['points']} points on"
            f" {', '.join(config['evaluate']['splits'])} data;",
            f"and leave the result in {folder}.",
            "",
            *(
                ["The weight of B by block, also in blocks.png:", combination.blocks.table(), ""]
                if combination.blocks
                else []
            ),
            f"{task.aligned}: {specs[task.aligned].summary()}",
        ]
        lines += [
            f"\n{name}: {spec.summary().splitlines()[0]}"
            for name, spec in specs.items()
            if name != task.aligned
        ]
        self.console.print("\n".join(lines), markup=False)

    def _scores(self, results: Results) -> None:
        """The table of what a scorer thinks of the images, if one was asked."""
        rows = reward_rows(results)
        if not rows:
            return
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column(results["config"]["evaluate"]["name"], no_wrap=True)
        for title in ("mean score", "95 % interval"):
            table.add_column(title, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(row["label"], row["mean"], row["interval"])
        self.console.print()
        self.console.print(table)

    def summary(self, results: Results, folder: Path) -> None:
        """The three answers, the table of curves, and where the files are."""
        self.console.print()
        rows = curve_rows(results)
        accuracy = any(row["accuracy"] for row in rows)
        columns = {"split": "data", "kind": "merge", "a": "loss A", "b": "loss B"}
        columns |= {"midpoint": "midpoint", "barrier": "barrier"}
        columns |= {"accuracy": "accuracy at midpoint"} if accuracy else {}
        table = Table(box=None, pad_edge=False, header_style="dim")
        for key, title in columns.items():
            table.add_column(title, justify="left" if key in ("split", "kind") else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(row[key] for key in columns))
        self.console.print(table)
        for line in merge_lines(results):
            self.console.print(line, markup=False)
        self._scores(results)
        self.console.print()
        for answer in answers(results):
            color = TONES[answer.tone]
            self.console.print(f"{answer.question} [bold {color}]{answer.short}.[/] {escape(answer.text)}")
        self.console.print()
        shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
        self.console.print(f"In {escape(str(shown))}:")
        for name, meaning in FILES.items():
            if (folder / name).exists():
                self.console.print(f"  {name:<24}  [dim]{meaning}[/dim]")


def _estimate(config: Mapping[str, Any], spec: PermutationSpec) -> list[str]:
    """What aligning will take, if there is a model of it."""
    if config["algo"]["name"] != "weight_matching":
        return []
    from ..matching.weights.estimate import about, matching_seconds

    return [
        f"(about {about(matching_seconds(spec))} here for every restart, if A and B are near each other);"
    ]
