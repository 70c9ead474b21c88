"""What a user asked for, as `rebasin align` and `rebasin merge` hand it on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.output import FILES
from .alignment import Options


@dataclass(frozen=True)
class Request:
    """What a user asked for; see the options of the commands."""

    inputs: tuple[Path, ...]
    output: Path
    alpha: float | None = None
    method: str = "weighted_sum"
    options: tuple[str, ...] = ()
    base: Path | None = None
    weights: str | None = None
    align: bool = True
    permutation: Path | None = None
    components: tuple[str, ...] = ()
    dtype: str | None = None
    prune: bool = False
    vae: Path | None = None
    fix_clip: bool = False
    start: str = "forward"
    seed: int = 0
    joint: bool = False
    device: str = "cpu"
    max_sweeps: int = 100
    workers: int | None = None
    check: bool = True
    overwrite: bool = False
    dry_run: bool = False

    @property
    def kept(self) -> Path:
        """Where the permutation is kept."""
        name = self.output.stem if self.output.suffix in FILES else self.output.name
        return self.output.with_name(f"{name}.permutation.safetensors")

    @property
    def alignment(self) -> Options:
        return Options(self.start, self.seed, self.joint, self.device, self.max_sweeps, self.workers)
