"""Reading the setting of block weights: text, lists, YAML and the presets people know become entries."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..errors import ConfigError

Value = float | tuple[float, ...]


def parse(setting: Any) -> list[tuple[str, Any]]:
    """The entries of a setting, in order: (selector, number or tuple of numbers); lists and presets have their own."""
    if isinstance(setting, bool) or setting is None:
        raise ConfigError(
            f"Block weights are {setting!r}, but they are a number, a list, a preset's name or entries."
        )
    if isinstance(setting, int | float):
        return [("default", float(setting))]
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
            f"There is no preset of block weights '{name}'; there are {', '.join(near)} and others."
        )
    return presets[key]


def _parse_text(text: str) -> list[tuple[str, Any]]:
    text = text.strip()
    if text.endswith((".yaml", ".yml")):
        try:
            return parse(yaml.safe_load(Path(text).expanduser().read_text(encoding="utf-8")))
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"The block weights in {text} can't be read: {error}.") from error
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
        if isinstance(value, bool) or value is None:
            raise TypeError
        many = isinstance(value, list | tuple | np.ndarray)
        result: Value = tuple(float(v) for v in value) if many else float(value)
        finite = np.isfinite(result).all() and np.size(result) > 0
    except (TypeError, ValueError):
        finite, result = False, 0.0
    if not finite:
        raise ConfigError(
            f"The block weight of '{selector}' is {value!r}, but it is a number or a list of numbers."
        )
    return result
