"""`python -m rebasin.compare_methods`: merge methods and endpoints, without and with aligning, by every objective."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ..errors import ConfigError
from .configuration import launch, resolved

if TYPE_CHECKING:
    from ..reporting.console import Console
    from ..reporting.results import Results


def compare_methods(cfg: DictConfig, folder: Path, console: Console, command: str = "") -> Results | None:
    """Compare as `cfg` says and leave everything in `folder`; returns the content of results.json.

    None with `dry_run=true`, which shows what would be compared.

    Raises:
        RebasinError: an input is missing or does not fit; one sentence says which and what to do.
    """
    # Late: torch, diffusers and matplotlib take seconds to import, and --help and --cfg need none of them.
    from .. import reporting
    from ..search.comparison import ALIGNED, NAIVE, Trials, compare, figures, fitting
    from ..search.evaluator import Bench
    from ..search.folder import base_name
    from ..search.objectives import load_aims
    from ..search.setup import align_all, load_inputs
    from ..tasks import load_task
    from . import stages as steps

    config = resolved(cfg)
    options = cfg.methods
    _check(options)
    steps.settle(cfg)
    with reporting.open_logger(cfg.logger, config, folder) as logger:
        with console.stage("load"):
            task = load_task(cfg)
            inputs = load_inputs(cfg, task, console.progress)
            aims = load_aims(cfg, task, options)
            gradients = hasattr(task.objective, "loss")
            chosen = fitting(list(options.names), len(inputs.states), inputs.base is not None, gradients)
            console.say(f"{', '.join(inputs.labels)}; {len(chosen)} methods")
        if cfg.dry_run:
            console.console.print(
                f"Would compare {', '.join(m.name for m in chosen)} in {folder}.", markup=False
            )
            return None
        sets = {NAIVE: (inputs.states, inputs.base)}
        with console.stage("align"):
            moved = "Nothing was aligned (algo=naive)."
            if cfg.algo.name != "naive":
                part = task.parts[task.aligned]
                spec = part.spec()
                folder.mkdir(parents=True, exist_ok=True)
                found = align_all(cfg, task, spec, inputs, folder, console.progress)
                counts = {label: permutation.moved() for label, permutation in found.items()}
                told = ", ".join(f"{label} {count:,}" for label, count in counts.items())
                moved = f"Neurons moved by {cfg.algo.name}, of {spec.neurons:,}: {told}."
                if any(counts.values()):
                    aligned = inputs.moved(found)
                    sets[ALIGNED] = (aligned.states, aligned.base)
                else:
                    moved += " So aligning changes nothing here, and no merge is shown twice."
            console.say(moved)
        with console.stage("merge"):
            plain = OmegaConf.to_container(options, resolve=True)
            assert isinstance(plain, dict)
            trials = Trials(plain["shares"], plain["strengths"], plain["options"], plain["samples"])
            bench = Bench(task.model, inputs.states, device=cfg.device)
            rows = compare(
                bench, aims, sets, inputs.labels, chosen, trials,
                objective=task.objective, seed=cfg.seed, progress=console.progress,
            )  # fmt: skip
        with console.stage("report"):
            found = figures(inputs.labels, base_name(config), moved, aims, rows)
            results = reporting.collect(config, found, console.seconds, command, "methods")
            reporting.leave(results, folder)
            logger.results(results, folder)
    console.summary(results, folder)
    return results


def _check(options: DictConfig) -> None:
    for name in ("batch", "unit", "samples"):
        if options[name] < 1:
            raise ConfigError(f"methods.{name} is {options[name]}, but it must be at least 1.")
    for name in ("names", "shares", "strengths"):
        if not options[name]:
            raise ConfigError(f"methods.{name} is empty; it takes at least one.")
    if options.data not in ("train", "heldout"):
        raise ConfigError(f"methods.data is {options.data!r}; it takes train or heldout.")
    if not 0 < options.choose < 1:
        raise ConfigError(f"methods.choose is {options.choose}, but it is a share between 0 and 1.")


def job(cfg: DictConfig) -> None:
    """What Hydra calls."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
    from ..reporting.console import Console
    from ..reporting.results import command_line

    hydra = HydraConfig.get()
    command = command_line(hydra.overrides.task).replace("rebasin.run", "rebasin.compare_methods")
    compare_methods(cfg, Path(hydra.runtime.output_dir), Console(), command)


def main() -> None:
    """`python -m rebasin.compare_methods`, `rebasin compare-methods`."""
    launch(job, "compare_methods")
