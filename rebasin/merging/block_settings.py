"""The language of block weights: text, lists, YAML and the presets people know become entries, and their selectors
(blocks, ranges, modules, kinds and patterns) names of tensors.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..errors import ConfigError, shown
from ..files import SchemaError, conform
from ..files import parse as parse_json
from .block_names import SD1, SDXL, Blocks

Value = float | tuple[float, ...]

KINDS = {
    "attention": r"(^|\.)attn\d*\.|(^|\.)self_attn\.|transformer_blocks\.\d+\.attn|(^|\.)attention\.",
    "resnet": r"(^|\.)resnets\.\d|(^|\.)(in_layers|out_layers|emb_layers|skip_connection)\.",
    "norm": r"(^|[._])(norm|bn|ln|layer_norm|group_norm)\w*\.",
    "bias": r"(^|[._])bias$",
    "embedding": r"(^|[._])(time_embed|time_embedding|label_emb|add_embedding|token_embedding|position_embedding)\.",
}
"""Kinds of modules that are spelt in several ways, as patterns of names. `attn1`, `ff` and the like need none."""


def parse(setting: Any) -> list[tuple[str, Any]]:
    """The entries of a setting, in order: (selector, number or tuple of numbers); lists and presets have their own."""
    if isinstance(setting, bool) or setting is None:
        raise ConfigError(
            f"Block weights are {setting!r}, but they are a number, a list, a preset's name or entries."
        )
    if isinstance(setting, int | float):
        return [("default", _number("default", setting))]
    if isinstance(setting, Mapping):
        # Wherever the preset stands, it is first.
        entries = sorted(setting.items(), key=lambda entry: entry[0] != "preset")
        return [(str(key), str(v) if key == "preset" else _number(key, v)) for key, v in entries]
    if isinstance(setting, str):
        return _parse_text(setting)
    if isinstance(setting, Sequence) and all(isinstance(v, str) for v in setting) and setting:
        return _parse_text(",".join(setting))
    value = _number("list", setting)
    return [("list", value if isinstance(value, tuple) else (value,))]


@functools.cache
def _presets() -> tuple[dict[str, tuple[float, ...]], dict[str, str]]:
    content = yaml.safe_load((Path(__file__).parent / "presets.yaml").read_text(encoding="utf-8"))
    presets = {name: tuple(map(float, values)) for name, values in content["presets"].items()}
    return presets, content["aliases"]


def preset_names() -> tuple[str, ...]:
    """The presets people know, without their second names."""
    return tuple(_presets()[0])


def preset(name: str) -> tuple[float, ...]:
    """The 26 weights of a preset: BASE, IN00 to IN11, M00, OUT00 to OUT11.

    Raises:
        ConfigError: there is none; names those that are near.
    """
    presets, aliases = _presets()
    key = name.strip().upper()
    key = aliases.get(key, key)
    if key not in presets:
        near = difflib.get_close_matches(key, [*presets, *aliases], n=3, cutoff=0.4) or list(presets)[:4]
        raise ConfigError(
            f"There is no preset of block weights {shown(name)}; there are {', '.join(near)} and others, which"
            " `rebasin methods` lists."
        )
    return presets[key]


def content(text: str) -> Any:
    """What a text says that is the path of a YAML file, or a mapping as JSON has it; any other as it is.

    Raises:
        ConfigError: the file can't be read, or one of the two is damaged.
    """
    text = text.strip()
    if text.startswith("{"):
        try:
            return conform(Mapping[str, Any], parse_json(text))
        except SchemaError as error:
            raise ConfigError(f"The block weights {shown(text)} are no entries: {error}.") from error
    if text.endswith((".yaml", ".yml")):
        try:
            return yaml.safe_load(Path(text).expanduser().read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"The block weights in {text} can't be read: {error.strerror or error}."
            ) from error
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            where = f" (line {mark.line + 1})" if mark else ""
            raise ConfigError(f"The block weights in {text} are no YAML{where}.") from error
    return text


def _parse_text(text: str) -> list[tuple[str, Any]]:
    text = text.strip()
    if (found := content(text)) is not text:
        return parse(found)
    parts = re.split(r",(?![^\[(]*[\])])", text if "=" in text else text.strip("[]"))
    items = [part.strip() for part in parts if part.strip()]
    if items and all(_is_number(item) for item in items):
        return [("list", tuple(map(float, items)))] if len(items) > 1 else [("default", float(items[0]))]
    entries: list[tuple[str, Any]] = []
    for position, item in enumerate(items):
        selector, equals, value = item.rpartition("=")
        if equals:
            entries.append((selector.strip(), _number(selector.strip(), value.strip())))
        elif position == 0 and _is_number(item):
            entries.append(("default", float(item)))
        elif position == 0:
            preset(item.removesuffix("@depth"))
            entries.append(("preset", item))
        else:
            raise ConfigError(f"The block weight '{item}' is no entry SELECTOR=WEIGHT, for example IN04=0.5.")
    if not entries:
        raise ConfigError("The block weights are empty: give a number, a list, a preset's name or entries.")
    return entries


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number(selector: Any, value: Any) -> Value:
    """A weight as a float, or a list of weights as a tuple."""
    if isinstance(value, str) and value.strip().startswith("["):
        value = [part for part in value.strip().strip("[]").split(",") if part.strip()]
    try:
        many = isinstance(value, list | tuple | np.ndarray)
        result: Value = tuple(float(v) for v in value) if many else float(value)
        finite = not isinstance(value, bool) and np.isfinite(result).all() and np.size(result) > 0
    except (TypeError, ValueError, OverflowError, RuntimeError):
        finite, result = False, 0.0
    if not finite:
        raise ConfigError(
            f"The block weight of {shown(str(selector))} is {shown(value)}, but it is a number or a list of numbers."
        )
    return result


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
    modules = sorted({piece for name in names for piece in name.split(".")[:-1] if not piece.isdigit()})
    own = list(blocks.order)
    near = difflib.get_close_matches(part, [*own, *modules, *KINDS, *preset_names()], n=3)
    hint = f"did you mean {' or '.join(near)}? There" if near else "there"
    if blocks.kind == "layers":  # names are long, so one will do, where none is near
        layers = f"blocks such as {own[0]}, " if own and not near else ""
    else:
        layers = f"the blocks {listed(own)}, "
    return (
        f"The block weight {shown(part)} is no block, module or kind of this model; {hint} are {layers}the modules"
        f" {', '.join(modules[:4])} and others, and the kinds {', '.join(KINDS)}."
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
