"""Every error a user can meet. Each message is one sentence: what was wrong, where, and what to do."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable, Sequence

LONGEST = 300 - len("Error: ")
"""Characters of a sentence, as commands print it."""


class RebasinError(ValueError):
    """Base of all errors that bad input causes; anything else is a bug of ours.

    Paths lose their beginning where the sentence would be too long otherwise.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(_fitting(one) if isinstance(one, str) else one for one in args[:1]), *args[1:])


class SpecMismatchError(RebasinError):
    """A state, permutation or spec does not fit the spec it is used with."""


class TraceError(RebasinError):
    """The model could not be exported or walked."""


class VerificationError(RebasinError):
    """A permutation changed the function that it must preserve."""


class CheckpointError(RebasinError):
    """A file, or a mapping of tensors, is damaged or is not what was expected."""


class DataError(RebasinError):
    """A data set is missing, truncated or of an unknown layout."""


class ConfigError(RebasinError):
    """An option, or a combination of options, that the run cannot honour."""


class AdapterError(RebasinError):
    """An adapter (LoRA, ControlNet) that can't follow a permutation, or belongs to another model."""


def unknown(problem: str, name: str, known: Iterable[str], lead: str = "it has") -> ConfigError:
    """The error for a name that does not exist: `problem`, the nearest name, and `lead` with those that there are."""
    known = list(map(str, known))
    close = difflib.get_close_matches(str(name), known, n=1)
    lead = f"did you mean {close[0]!r}? {lead[0].upper()}{lead[1:]}" if close else lead
    return ConfigError(f"{problem}; {lead} {listed(known)}.")


def listed(names: Sequence[str], room: int = 160) -> str:
    """Names as a sentence can hold them: those that have room, and how many more there are."""
    count = next((i for i in range(len(names)) if sum(len(n) + 2 for n in names[: i + 1]) > room), len(names))
    more = len(names) - count
    if more <= 2:  # these few have room, too
        return ", ".join(names) or "none"
    return f"{', '.join(names[:count])} and {more} more"


def _fitting(sentence: str) -> str:
    """`sentence` with its longest paths cut from the left, until it has LONGEST characters or no path is long."""
    while (over := len(sentence) - LONGEST) > 0:
        path = max(re.findall(r"[^\s'\"(]*[/\\][^\s'\")]*", sentence), key=len, default="")
        if len(path) <= 40:
            return sentence
        sentence = sentence.replace(path, "..." + path[-max(37, len(path) - over - 3) :], 1)
    return sentence


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 110
_short.maxlevel, _short.maxlist, _short.maxdict, _short.maxtuple = 3, 6, 3, 6


def shown(value: object, room: int = 100) -> str:
    """A value out of a file as a sentence can hold it: as Python writes it, shortened, whatever it is.

    Args:
        room: characters that a text may have; the default is more than any name of a tensor has.
    """
    if isinstance(value, str) and len(value) > room:
        value = f"{value[:30]}...{value[-10:]}"
    text = _short.repr(value)
    if not isinstance(value, str):
        text = " ".join(text.split())  # tensors and models are several lines
    return text if isinstance(value, str) or len(text) <= 72 else f"{text[:48]}...{text[-20:]}"


def first_line(error: BaseException, room: int = 120) -> str:
    """What another library's error says, as the end of a sentence: its first line, shortened, with a full stop."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "it says no more")
    return f"{text[:room].rstrip()}..." if len(text) > room else f"{text.rstrip('.')}."
