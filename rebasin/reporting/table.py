"""A table in words: for a page (the macro `table` of kit.html.j2), as Markdown, and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """The head and the lines; all columns but the first `labels` and the last `notes` are numbers.

    The numbers of the column `strong` stand out.
    """

    head: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    labels: int = 1
    notes: int = 0
    strong: str | None = None

    @classmethod
    def of(
        cls,
        rows: Sequence[Mapping[str, str]],
        titles: Mapping[str, str],
        labels: int = 1,
        strong: str | None = None,
    ) -> Table:
        """What the rows have under the keys of `titles`, without columns in which they have nothing."""
        used = [key for key in titles if any(row.get(key) for row in rows)]
        lines = tuple(tuple(row.get(key, "") for key in used) for row in rows)
        return cls(tuple(titles[key] for key in used), lines, labels, strong=strong)

    def numeric(self, column: int) -> bool:
        return self.labels <= column < len(self.head) - self.notes

    def note(self, column: int) -> bool:
        """Whether it holds words of any length."""
        return column >= len(self.head) - self.notes

    def markdown(self) -> str:
        rules = tuple("--:" if self.numeric(i) else "---" for i in range(len(self.head)))
        return "\n".join("| " + " | ".join(row) + " |" for row in (self.head, rules, *self.lines)) + "\n"

    def terminal(self) -> RichTable:
        shown = RichTable(box=None, pad_edge=False, header_style="dim")
        for i, title in enumerate(self.head):
            shown.add_column(title, justify="right" if self.numeric(i) else "left", no_wrap=True)
        for line in self.lines:
            shown.add_row(*line)
        # Its own width, however narrow the terminal: figures are never cut, lines go on in the next there.
        cells = zip(self.head, *self.lines, strict=True)
        shown.width = sum(max(map(cell_len, column)) for column in cells) + 2 * (len(self.head) - 1)
        return shown
