"""steps.png: what the midpoint makes while a search runs, one row for each look."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from PIL.Image import Image

from ..errors import ConfigError
from ..evaluation.samples import Samples
from ..merging import interpolate
from ..types import ProgressEvent, State
from .samples import save_samples

NAME = "steps.png"


class Snapshots:
    """A progress callback: every so many steps it samples from the midpoint with the best permutation so far.

    It sees the events that have a `permutation`, as those of the straight-through estimator have. The picture is
    written anew each time, so that it can be looked at while the search runs.
    """

    def __init__(
        self,
        sampler: Callable[[Mapping[str, State], int], Samples] | None,
        state_a: State,
        state_b: State,
        every: int,
        seed: int,
        folder: Path,
        show: Callable[[str, Path], None],
    ) -> None:
        """`every`: steps, 0 for none; `show(name, file)` is told about each new picture.

        Raises:
            ConfigError: `every` is negative, or the model makes no images.
        """
        if every < 0:
            raise ConfigError(f"sample_every is {every}, but it must not be negative.")
        if every > 0 and sampler is None:
            raise ConfigError(
                "sample_every needs a model that makes images; leave it out, or set model.samples."
            )
        self._sampler, self._a, self._b = sampler, state_a, state_b
        self._every, self._seed, self._folder, self._show = every, seed, folder, show
        self._rows: dict[str, list[Image]] = {}

    @property
    def pictures(self) -> list[str]:
        """The file that it has made."""
        return [NAME] if self._rows else []

    def __call__(self, event: ProgressEvent) -> None:
        permutation = event.get("permutation")
        if self._every == 0 or self._sampler is None or permutation is None or event["step"] % self._every:
            return
        label = f"step {event['step']}"
        made = self._sampler({label: interpolate(self._a, permutation.apply(self._b), 0.5)}, self._seed)
        self._rows[label] = list(made.rows[label])
        path = save_samples(Samples(made.prompts, self._rows), self._folder / NAME)
        self._show("steps", path)
