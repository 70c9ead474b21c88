"""Selectors of block weights: blocks, ranges, modules, kinds and patterns, and what to say where there is no such."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Sequence
from itertools import groupby

from ..errors import ConfigError
from .block_names import SD1, SDXL, Blocks
from .block_settings import preset_names

KINDS = {
    "attention": r"(^|\.)attn\d*\.|(^|\.)self_attn\.|transformer_blocks\.\d+\.attn|(^|\.)attention\.",
    "resnet": r"(^|\.)resnets\.\d|(^|\.)(in_layers|out_layers|emb_layers|skip_connection)\.",
    "norm": r"(^|[._])(norm|bn|ln|layer_norm|group_norm)\w*\.",
    "bias": r"(^|[._])bias$",
    "embedding": r"(^|[._])(time_embed|time_embedding|label_emb|add_embedding|token_embedding|position_embedding)\.",
}
"""Kinds of modules that are spelt in several ways, as patterns of names. `attn1`, `ff` and the like need none."""


def select(selector: str, names: Sequence[str], blocks: Blocks) -> list[str]:
    """The names that a selector selects, in their order.

    Raises:
        ConfigError: it selects none, or is not understood; the sentence names what is near.
    """
    parts = [selector] if selector.startswith("re:") else selector.split(":")
    tests = [_test(part.strip(), names, blocks) for part in parts]
    chosen = [name for name in names if all(test(name) for test in tests)]
    if not chosen:
        raise ConfigError(f"The block weight '{selector}' selects no tensor: its parts have none in common.")
    return chosen


def _test(part: str, names: Sequence[str], blocks: Blocks) -> Callable[[str], bool]:
    """Whether a tensor is selected by one part of a selector."""
    if part.startswith("re:"):
        try:
            pattern = re.compile(part.removeprefix("re:"))
        except re.error as error:
            raise ConfigError(f"The block weight '{part}' is no regular expression: {error}.") from error
        return _some(part, names, lambda name: pattern.search(name) is not None)
    upper = part.upper()
    found = _block_range(upper, blocks)
    if found is not None:
        return lambda name: blocks.of[name] in found
    if "*" in part:
        return _some(part, names, lambda name: fnmatch.fnmatchcase(name, part))
    dotted = f".{part}."
    if any(dotted in f".{name}." for name in names):
        return lambda name: dotted in f".{name}."
    if part.lower() in KINDS:
        kind = re.compile(KINDS[part.lower()])
        return _some(part, names, lambda name: kind.search(name) is not None)
    raise ConfigError(_unknown(part, names, blocks))


def _some(part: str, names: Sequence[str], test: Callable[[str], bool]) -> Callable[[str], bool]:
    if not any(test(name) for name in names):
        raise ConfigError(f"The block weight '{part}' selects no tensor; the first one is '{names[0]}'.")
    return test


def _block_range(part: str, blocks: Blocks) -> set[str] | None:
    """The blocks that a name, a side or a range of names means; None if it is none of these."""
    if blocks.kind == "layers":
        return None
    if part in ("IN", "OUT", "M", "MID"):
        side = "M" if part == "MID" else part
        return {block for block in blocks.order if block.rstrip("0123456789") == side}
    ends = re.fullmatch(r"(IN|M|OUT|BASE|VAE)(\d*)(?:-(IN|M|OUT|VAE)(\d+|))?", part)
    if ends is None:
        return None
    first = _numbered(ends[1], ends[2])
    last = _numbered(ends[3], ends[4]) if ends[3] else first
    for end in (first, last):
        if end not in blocks.order:
            known = "" if end not in (*SD1, *SDXL) else " (it belongs to another architecture)"
            raise ConfigError(
                f"The block '{end}' is not in this model{known}; it has {listed(blocks.order)}."
            )
    start, stop = blocks.order.index(first), blocks.order.index(last)
    if start > stop:
        raise ConfigError(f"The blocks '{part}' run backwards: write {last}-{first}.")
    return set(blocks.order[start : stop + 1])


def _numbered(side: str, number: str) -> str:
    return side if side in ("BASE", "VAE") else f"{side}{int(number or 0):02}"


def _unknown(part: str, names: Sequence[str], blocks: Blocks) -> str:
    modules = {piece for name in names for piece in name.split(".")[:-1] if not piece.isdigit()}
    shown = list(blocks.order) if blocks.kind != "layers" else []
    near = difflib.get_close_matches(part, [*shown, *modules, *KINDS, *preset_names()], n=3)
    hint = f"did you mean {' or '.join(near)}? It" if near else "it"
    return (
        f"the block weight '{part}' is no block, module or kind of this model; {hint} has the blocks"
        f" {listed(blocks.order)}, modules such as {', '.join(sorted(modules)[:6])}, and the kinds {', '.join(KINDS)}."
    )


def listed(blocks: Sequence[str]) -> str:
    """Block names with runs shortened: BASE, IN00 to IN11, M00."""

    def run(place: tuple[int, str]) -> tuple[str, int | None]:
        """The same for numbered blocks of one side that follow each other."""
        side = place[1].rstrip("0123456789")
        number = place[1][len(side) :]
        return side, int(number) - place[0] if number else None

    runs = [[block for _, block in group] for _, group in groupby(enumerate(blocks), run)]
    text = [run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return ", ".join(text if len(text) <= 12 else [*text[:6], "...", *text[-3:]])
