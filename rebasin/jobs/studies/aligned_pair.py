"""What most studies begin with: two endpoints, the spec, and B aligned to A."""

from __future__ import annotations

from omegaconf import DictConfig

from ...reporting.console import Console
from .. import stages
from ..skeleton import Session
from ..stages import AlignedPair

__all__ = ["AlignedPair", "aligned_pair"]


def aligned_pair(cfg: DictConfig, console: Console) -> AlignedPair:
    """Load, trace, verify and align as a run does (rebasin/jobs/run.py)."""
    job = Session(cfg, console)
    material = stages.load(job)
    task = material.task
    stages.verify_all(job, task, {task.aligned: material.spec})
    a, b, *_ = stages.endpoints(job, task)
    return stages.align(job, material, a, b)
