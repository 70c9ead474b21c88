"""Continuing after an interruption: where an algorithm's state is kept while it runs, and read again.

An algorithm takes part by its signature: it has `checkpoint`, a function that it calls with its state after each
finished sweep (batch, model), and `resume_from`, such a state. The states are frozen dataclasses with `save` and
`load`.
"""

from __future__ import annotations

import contextlib
import os
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from omegaconf import DictConfig

from ..errors import CheckpointError
from ..files import cache_folder, keep, remove_leftovers
from ..integrations.hydra import fingerprint, resolved

EVERY = 2.0
"""Seconds between two writes at most; a sweep of a small model is quicker than that, and cheaper to do again."""

SHARE = 0.05
"""Of the time that may be spent on writing; the states of searches with auxiliary weights are large."""

UNFINISHED: set[Path] = set()
"""The state files that this process has written and not finished with, for who tells of an interruption."""

IRRELEVANT = ("resume", "threads", "logger", "path", "evaluate", "dry_run", "lam", "merge", "sample_every")
"""Options that change nothing about the matching."""


@dataclass(frozen=True)
class Resume:
    """The state file of one matching.

    Attributes:
        path: the file; it is there while a matching is unfinished.
        wanted: whether to continue from it.
        asked: whether a user has asked for that, who is told if it is damaged; else the matching begins anew then.
    """

    path: Path
    wanted: bool = False
    asked: bool = True

    def arguments(self, function: Callable[..., Any]) -> dict[str, Any]:
        """`checkpoint` and `resume_from` for `function`; empty if it takes neither.

        Raises:
            CheckpointError: the state is damaged.
        """
        kind = state_type(function)
        if kind is None:
            return {}
        due = -float("inf")

        def checkpoint(state: Any) -> None:
            nonlocal due
            if (began := monotonic()) >= due:
                if keep(self.path, state.save):
                    UNFINISHED.add(self.path)
                due = monotonic() + max(EVERY, (monotonic() - began) / SHARE)

        found = None
        if self.wanted and os.path.exists(self.path):
            try:
                found = kind.load(self.path)
            except CheckpointError as error:
                if self.asked:
                    raise CheckpointError(
                        f"{str(error).rstrip('.')}; leave out resume=true to begin anew."
                    ) from error
        return {"checkpoint": checkpoint, "resume_from": found}

    def finish(self) -> None:
        """The matching is done: its state is of no more use."""
        with contextlib.suppress(OSError):  # there is none, or nothing can be written there
            remove_leftovers(self.path)  # of a run that was killed while it wrote its last state
            self.path.unlink()
        UNFINISHED.discard(self.path)


def state_type(function: Callable[..., Any]) -> Any:
    """The class of the states of `function`, from the type of its `resume_from`; None if it can't be continued."""
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError):
        return None
    if "checkpoint" not in hints:
        return None
    kinds = [kind for kind in typing.get_args(hints.get("resume_from")) if hasattr(kind, "load")]
    return kinds[0] if kinds else None


def load_resume(cfg: DictConfig) -> Resume | None:
    """Where the state of a job's matching is kept while it is unfinished, the same file for the same matching; None
    without a cache.
    """
    folder = cache_folder(cfg.path.cache)
    if folder is None:
        return None
    relevant = {key: value for key, value in resolved(cfg).items() if key not in IRRELEVANT}
    return Resume(folder / "unfinished" / f"{fingerprint(relevant, 16)}.safetensors", cfg.resume)
