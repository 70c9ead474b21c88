"""What all commands that compute have in common: threads, quiet libraries, the console, and the three answers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from ..integrations.huggingface import keep_offline
from ..tensors.writer import in_bytes as size

__all__ = [
    "answer",
    "begin",
    "called",
    "remark",
    "say_alignment",
    "say_far",
    "say_rounding",
    "say_where",
    "size",
    "table",
]

if TYPE_CHECKING:
    from ..reporting.console import Console
    from ..spec.mapped import Rounding
    from .alignment import Alignment


def begin(device: str = "cpu", threads: int = 0) -> Console:
    """Set torch up and give the console on which progress is shown.

    Raises:
        ConfigError: there is no such device.
    """
    # No advice from the libraries about image processors and schedulers, which are as they should be.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    keep_offline()
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers|transformers")
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|diffusers|transformers")
    import torch

    from ..reporting.console import Console
    from ..tensors.modules import find_device

    if threads:
        torch.set_num_threads(threads)
    find_device(device, "--device")
    return Console()


def table(titles: Sequence[str], rows: Sequence[Sequence[object]], words: int) -> Table:
    """A table of `rows`; the first `words` columns hold words, the others numbers, to the right."""
    made = Table(box=None, pad_edge=False, header_style="dim")
    for number, title in enumerate(titles):
        # In a narrow terminal names are continued on the next line: half a name says nothing.
        wraps = number < words
        made.add_column(
            title,
            justify="left" if wraps else "right",
            no_wrap=not wraps,
            overflow="fold" if wraps else "ellipsis",
        )
    for row in rows:
        made.add_row(*map(str, row))
    return made


def remark(console: Console, sentences: Sequence[str]) -> None:
    """Sentences about what is legal and maybe not meant."""
    for sentence in sentences:
        console.console.print(sentence, markup=False)


def answer(console: Console, question: str, short: str, tone: str, text: str) -> None:
    """One of the answers that end a command."""
    from rich.markup import escape

    console.tell("answer", question=question, short=short, tone=tone, text=text)
    console.console.print(f"{question} [bold {tone}]{short}.[/] {escape(text)}")


def say_alignment(
    console: Console, found: Sequence[Alignment], checks: Mapping[str, float] | None, merged: bool = False
) -> None:
    """Whether the alignments preserved what the models compute, and whether anything moved; were they merged then?"""
    moved, figures = sum(one.moved for one in found), found[0].figures.values()
    maps = found[0].turned
    many = len(found) > 1
    if many:
        text = "The symmetries are proved, so each model computes what it did."
    elif not moved and not maps:
        text = f"No neuron {'moves' if found[0].given else 'had to move'}, so B is what it was."
    elif checks is None:
        text = "The symmetries are proved (not checked on these weights: --no-check)."
    else:
        worst = max(checks.values(), default=0.0)
        what = "it was mapped" if maps else "its neurons moved"
        text = f"B's outputs before and after {what} differ by {worst:.1e} relative, which is rounding."
    answer(console, "Is it legal?", "Yes", "green", text)
    neurons = sum(f.get("neurons", 0) for f in figures) or found[0].permutation.spec.neurons
    if not moved and not maps:
        who = (
            f"{len(found) + 1} models agree" if many else f"{neurons:,} neurons of B are in A's order already"
        )
        text = f"All {who}, so {'this is the plain merge' if merged else 'nothing needs aligning'}."
        if found[0].given:
            text = "The given permutation moves nothing; whether B is in A's order was not looked at."
        return answer(console, "Did anything move?", "No", "yellow", text)
    before, after = (
        sum(f.get(key, 0.0) ** 2 for f in figures) ** 0.5
        for key in ("distance_before", "distance" if many else "distance_after")
    )
    if many:
        text = f"{moved:,} neurons; the models' distance to their mean fell from {before:.4g} to {after:.4g}."
    else:
        text = f"{moved:,} of {neurons:,} neurons ({100 * moved / max(1, neurons):.1f}%) moved"
        text += f", {maps:,} groups have maps." if maps else "."
        way = "fell" if after < before else "went"
        text += f" The distance of the weights {way} from {before:.4g} to {after:.4g}." if before else ""
    answer(console, "Did anything move?", "Yes", "green", text)


def say_far(console: Console, far: Mapping[str, tuple[float, float]] | None) -> None:
    """First of all, if aligning has made the merge worse by what can be computed here; nothing otherwise."""
    from .function import FURTHER

    worse = {name: pair for name, pair in (far or {}).items() if not pair[0] <= FURTHER * pair[1]}
    if worse:
        told = ", ".join(
            f"{name} {aligned:.2g} against {plain:.2g}" for name, (aligned, plain) in worse.items()
        )
        text = (
            "On a random input the merge's outputs are further from A's and B's than those of the plain merge are"
            f" ({told}, relative): give --no-align to get that one."
        )
        answer(console, "Did aligning help?", "No", "red", text)


def called(alignment: Alignment) -> str:
    """What to call the file of an alignment."""
    return "alignment" if alignment.mapped else "permutation"


def say_rounding(console: Console, roundings: Mapping[str, Rounding] | None) -> None:
    """What rounding to the file's types has added to what maps moved, once all is written; None: no maps."""
    if roundings is None:
        return
    from .alignment import rounding_of

    whole = rounding_of(roundings)
    if not whole.squares:
        return answer(
            console,
            "What did rounding cost?",
            "Nothing",
            "green",
            "What maps moved has the type that it was computed in.",
        )
    text = f"relative to the weights that maps moved, in {len(whole.squares):,} tensors."
    answer(console, "What did rounding cost?", f"{whole.error:.1e}", "green", text)


def say_where(console: Console, *paths: Path | str | tuple[str, Path | None]) -> None:
    """Where the results are: paths, addresses on the Hub, or what one is and its path."""
    from rich.markup import escape

    named = [path if isinstance(path, tuple) else ("", path) for path in paths]
    console.tell("files", paths=[str(path) for _, path in named if not isinstance(path, str)])
    told = (f"{what} in {path}" if what else str(path) for what, path in named)
    console.console.print(f"Where is it? {escape(', '.join(told))}")
