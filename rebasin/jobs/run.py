"""The main job, `python -m rebasin.run`: load -> spec -> verify -> align -> merge -> evaluate -> report.

This file reads like the method; the steps themselves are in the modules that it calls.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from .configuration import launch, resolved

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..reporting.console import Console
    from ..reporting.results import Results
    from ..spec import PermutationSpec
    from ..tasks import Task
    from .combination import Combination


def run(cfg: DictConfig, folder: Path, console: Console, command: str = "") -> Results | None:
    """Do the job that `cfg` describes and leave everything in `folder`; returns the content of results.json.

    With `dry_run=true` it shows the plan and the spec, and returns None before any endpoint is loaded.

    Raises:
        RebasinError: an input is missing or does not fit; one sentence says which and what to do.
    """
    # Late: torch, diffusers and matplotlib take seconds to import, and --help and --cfg need none of them.
    from .. import reporting
    from ..reporting import run as report
    from ..spec.restrict import restrict
    from ..tasks import load_task
    from . import stages as steps
    from .algorithm import load_algorithm
    from .combination import load_combination
    from .many import is_many, run_many
    from .scoring import in_words, load_judge

    if is_many(cfg):
        return run_many(cfg, folder, console, command)
    config = resolved(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    steps.settle(cfg)
    with console.stage("load"):
        algorithm = load_algorithm(cfg.algo)
        task = load_task(cfg)
    with console.stage("spec"):
        specs = {name: part.spec() for name, part in task.parts.items()}
        specs[task.aligned] = spec = restrict(specs[task.aligned], cfg.structure)
        console.say(f"{task.aligned}: {spec.neurons:,} neurons in {len(spec)} groups")
    combination = load_combination(cfg, task)
    reporting.save_blocks(combination.blocks, folder)
    if cfg.dry_run:
        console.console.print(_plan(task, specs, config, folder, combination), markup=False)
        return None
    judge = load_judge(cfg, task)

    with reporting.open_logger(cfg.logger, config, folder) as logger:
        with console.stage("verify"):
            checks = steps.verify_all(task, specs)
            console.say(
                f"largest relative error {max(check['max_relative_error'] for check in checks.values()):.1e}"
            )
        with console.stage("endpoints"):
            state_a, state_b = task.endpoints(console.progress)
            console.say(f"A: {task.labels[0]}, B: {task.labels[1]}")
        with console.stage("align"):
            snapshots = reporting.Snapshots(
                task.sampler, state_a, state_b, cfg.sample_every, cfg.seed, folder, logger.picture
            )
            progress = reporting.both(console.progress, logger.event, snapshots)
            resume = steps.resume(cfg, config)
            match = algorithm(task, spec, state_a, state_b, seed=cfg.seed, progress=progress, resume=resume)
            # A state that is read from a file stays there: SDXL's would not fit in memory three times.
            kept = isinstance(state_b, dict)
            aligned = match.permutation.apply(state_b) if kept else match.permutation.view(state_b)
            console.say(f"{algorithm.name}: {match.moved:,} of {spec.neurons:,} neurons moved")
        with console.stage("merge"):
            merged = combination(
                task, [state_a, aligned], seed=cfg.seed, device=cfg.device, progress=console.progress
            )
            merged = dict(merged) if kept else merged
            console.say(combination.words)
        with console.stage("evaluate"):
            curves = steps.evaluate(cfg, task, state_a, state_b, aligned, match, console.progress)
            combined = {**combination.record(), "figures": steps.evaluate_merged(cfg, task, merged)}
            console.say(steps.barriers(curves))
        with console.stage("sample"):
            samples = steps.sample(task, state_a, state_b, aligned, cfg.seed)
        rewards = None
        if judge is not None:
            with console.stage("score"):
                rewards = judge(task, state_a, state_b, aligned, console.progress)
                console.say(in_words(rewards))
        with console.stage("report"):
            if cfg.tensors:
                reporting.save_tensors(folder, match.permutation, aligned, merged, config)
                if task.export is not None:
                    task.export(folder, merged, {"rebasin_command": command})
            found = report.figures(
                task.labels, task.aligned, spec, checks, match, curves, lam=cfg.lam, rewards=rewards, merge=combined,
                pictures=[*snapshots.pictures, *([] if samples is None else ["samples.png"])],
            )  # fmt: skip
            results = reporting.collect(config, found, console.seconds, command)
            reporting.leave(results, folder, samples)
            logger.results(results, folder)
    console.summary(results, folder)
    return results


def _plan(
    task: Task,
    specs: Mapping[str, PermutationSpec],
    config: Mapping[str, Any],
    folder: Path,
    combination: Combination,
) -> str:
    """What a run would do, and the specs: the one that is aligned in full, the others in a line."""
    from ..matching.weights.estimate import about, matching_seconds

    (a, b), spec, blocks = task.labels, specs[task.aligned], combination.blocks
    estimate = []
    if config["algo"]["name"] == "weight_matching":
        seconds = about(matching_seconds(spec))
        estimate = [f"(about {seconds} here for every restart, if A and B are near each other);"]
    by_block = [] if not blocks else ["The weight of B by block, also in blocks.png:", blocks.table(), ""]
    others = (
        f"\n{name}: {other.summary().splitlines()[0]}" for name, other in specs.items() if other is not spec
    )
    return "\n".join(
        [
            "",
            *task.plan,
            f"Would verify the specs of {', '.join(specs)};",
            f"align B ({b}) to A ({a}), the {task.aligned}, by {config['algo']['name']};",
            *estimate,
            f"merge by {combination.words};",
            f"evaluate {config['objective']['name']} at {config['evaluate']['points']} points on"
            f" {', '.join(config['evaluate']['splits'])} data;",
            f"and leave the result in {folder}.",
            "",
            *by_block,
            f"{task.aligned}: {spec.summary()}",
            *others,
        ]
    )


def job(cfg: DictConfig) -> float | None:
    """What Hydra calls, once for each run of a sweep; returns the figure that an optimising sweeper is to lower."""
    # No advice from the libraries about image processors and schedulers, which are as they should be.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
    from ..reporting.console import Console
    from ..reporting.results import command_line, load_results
    from .experiments import finished
    from .studies import run_study
    from .target import target

    hydra = HydraConfig.get()
    folder, console = Path(hydra.runtime.output_dir), Console()
    command = command_line(hydra.overrides.task)
    if not cfg.again and finished(resolved(cfg), folder):
        console.console.print(f"{folder} is finished; again=true does it again.", markup=False)
        return target(load_results(folder), cfg.target)
    work = run if cfg.study is None else run_study
    return target(work(cfg, folder, console, command), cfg.target)


def main() -> None:
    """`python -m rebasin.run`."""
    launch(job)
