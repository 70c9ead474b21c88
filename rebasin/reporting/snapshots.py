"""steps.png: what the midpoint makes while a search runs, one row for each look."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL.Image import Image

from ..errors import ConfigError
from ..evaluation.samples import Samples
from ..merging import interpolate
from ..types import ProgressEvent, State
from .samples import save_samples

NAME = "steps.png"


@dataclass
class Snapshots:
    """A progress callback: every so many steps it samples from the midpoint with the best alignment so far.

    It sees the events that have a `permutation`, as those of the straight-through estimator have, or `best`, a function
    that makes an alignment. The picture is written anew each time, so that it can be looked at while the search runs.

    Attributes:
        every: steps, 0 for none.
        show: told about each new picture, its name and its file.

    Raises:
        ConfigError: `every` is negative, or the model makes no images.
    """

    sampler: Callable[[Mapping[str, State], int], Samples] | None
    state_a: State
    state_b: State
    every: int
    seed: int
    folder: Path
    show: Callable[[str, Path], None]
    _rows: dict[str, Sequence[Image]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError(f"sample_every is {self.every}, but it must not be negative.")
        if self.every > 0 and self.sampler is None:
            raise ConfigError(
                "sample_every needs a model that makes images; leave it out, or set model.samples."
            )

    @property
    def pictures(self) -> list[str]:
        """The file that it has made."""
        return [NAME] if self._rows else []

    def __call__(self, event: ProgressEvent) -> None:
        known = "permutation" in event or "best" in event
        if self.every == 0 or self.sampler is None or not known or event["step"] % self.every:
            return
        found = event["best"]() if "best" in event else event["permutation"]
        label = f"step {event['step']}"
        midpoint = interpolate(self.state_a, found.apply(self.state_b), 0.5)
        made = self.sampler({label: midpoint}, self.seed)
        self._rows[label] = made.rows[label]
        path = save_samples(Samples(made.prompts, self._rows), self.folder / NAME)
        self.show("steps", path)
