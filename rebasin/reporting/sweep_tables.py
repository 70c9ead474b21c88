"""The table of an experiment, from what its file declares.

    table:
      rows: [model.name, algo.name]        # columns whose values make a line each
      columns: model.width                 # with one value: its values are the columns
      values: [barrier/heldout/loss]       # what is shown; several without `columns`
      baseline: {naive: naive/barrier/heldout/loss}   # another line (with `columns`) or column
      where: {split: heldout}
      percent: [midpoint/heldout/accuracy]

Rows that agree are averaged, with their standard deviation and number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from .numbers import number
from .sweep import Row, Sweep
from .sweep_figures import once, words
from .table import Table


def table(sweep: Sweep) -> Table | None:
    """The experiment's table; None if it declares none or nothing was measured."""
    declared = sweep.declaration.get("table")
    if not declared:
        return None
    rows = sweep.where(declared.get("where") or {})
    keys, values = list(declared.get("rows") or ()), list(declared["values"])
    baseline: Mapping[str, str] = declared.get("baseline") or {}

    def shown(found: Sequence[Row], measured: str) -> str:
        return _shown(sweep, found, measured, measured in (declared.get("percent") or ()))

    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in _in_order(sweep, rows, keys):
        groups.setdefault(tuple(words(sweep.value(row, key)) for key in keys), []).append(row)
    head = tuple(words(key) for key in keys)
    lines: list[tuple[str, ...]] = []
    if declared.get("columns"):
        column = declared["columns"]
        across = sweep.distinct(rows, column)

        def cells(found: Sequence[Row], measured: str) -> list[str]:
            by = [[row for row in found if sweep.value(row, column) == value] for value in across]
            return [shown(own, measured) for own in by]

        for first in {own[:-1]: None for own in groups}:
            near = {own: found for own, found in groups.items() if own[:-1] == first}
            together = once(sweep, [row for found in near.values() for row in found])
            lines += [(*first, label, *cells(together, measured)) for label, measured in baseline.items()]
            lines += [(*own, *cells(found, values[0])) for own, found in near.items()]
        head += tuple(f"{words(column)} {words(value)}" for value in across)
    else:
        titles = {measured: label for label, measured in baseline.items()}
        titles |= {value: words(value) for value in values}
        titles = {c: title for c, title in titles.items() if any(sweep.value(r, c) is not None for r in rows)}
        head += tuple(titles.values())
        lines += [(*own, *(shown(found, value) for value in titles)) for own, found in groups.items()]
    return Table(head, tuple(lines), len(keys)) if lines else None


def _shown(sweep: Sweep, rows: Sequence[Row], column: str, percent: bool) -> str:
    found = [sweep.value(row, column) for row in rows]
    numbers = [float(v) for v in found if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if not numbers:
        return ", ".join(dict.fromkeys(words(v) for v in found if v is not None))
    mean = fmean(numbers)
    if max(numbers) - min(numbers) <= 1e-6 * abs(mean):  # equal, or by rounding alone
        return _number(mean, percent)
    return f"{_number(mean, percent)} ± {_number(stdev(numbers), percent, 2)} ({len(numbers)})"


def _number(value: float, percent: bool, digits: int = 3) -> str:
    if percent:
        return f"{value:.1%}"
    whole = abs(value) >= 1000 or (value == int(value) and abs(value) >= 10)
    return f"{value:,.0f}" if whole else number(value, digits)


def _in_order(sweep: Sweep, rows: Sequence[Row], keys: Sequence[str]) -> list[Row]:
    """By the columns `keys`, one after the other: numbers rise, words stay in the order in which they came."""
    found = list(rows)
    for key in reversed(keys):
        places = {value: i for i, value in enumerate(sweep.distinct(rows, key))}
        found.sort(key=lambda row: places[sweep.value(row, key)])
    return found
