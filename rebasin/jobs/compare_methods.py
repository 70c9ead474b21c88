"""`python -m rebasin.compare_methods`: merge methods and endpoints, without and with aligning, by every objective."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, shown
from ..integrations.hydra import resolved
from ..merging import Method
from ..merging.inputs import copies
from ..merging.merged import find_method
from ..merging.registry import plan_options
from ..reporting.methods import ALIGNED, KIND, NAIVE
from ..reporting.results import Results
from ..search.comparison import compare, figures, fitting
from ..search.evaluator import Evaluator, Inputs
from ..search.folder import base_name
from ..search.objectives import SearchObjective, load_objectives
from ..search.space import ALL
from ..tasks import Task, load_task
from .materials import align_all, check, load_inputs
from .refusals import brought, refuse
from .skeleton import Job, Session


@dataclass(frozen=True, eq=False)
class Prepared:
    """The models, and what they are merged with and measured by."""

    task: Task
    inputs: Inputs
    objectives: Sequence[SearchObjective]
    methods: Sequence[Method]


def _prepare(job: Session) -> Prepared:
    cfg, options = job.cfg, job.cfg.methods
    check(cfg, "methods", "batch", "unit", "samples")
    for name in ("names", "shares", "strengths"):
        if not options[name]:
            raise ConfigError(f"methods.{name} is empty; it takes at least one.")
        for value in options[name] if name != "names" else ():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ConfigError(f"methods.{name} has {shown(value)}, but it takes numbers.")
    for name in options.names if list(options.names) != [ALL] else ():
        find_method(name)
    for name, given in resolved(options.options).items():
        method = find_method(name)
        if not isinstance(given, dict):
            raise ConfigError(f"methods.options.{name} is {shown(given)}, but it takes OPTION: VALUE.")
        asked = {"score": None} if "score" in plan_options(method.plan) else {}  # what the job gives
        method.check_options({**asked, **given})
    with job.stage("load"):
        task = load_task(cfg)
        refuse(job, task)
        job.own = brought(job.cfg, task)
        job.remark(task.remarks)
        inputs = load_inputs(cfg, task, job.progress)
        objectives = load_objectives(cfg, task, options)
        gradients = hasattr(task.objective, "loss")
        methods = fitting(list(options.names), len(inputs.states), inputs.base is not None, gradients)
        job.say(f"{', '.join(inputs.labels)}; {len(methods)} methods")
    job.remark(copies(inputs.states, inputs.labels))
    return Prepared(task, inputs, objectives, methods)


def _plan(job: Session, prepared: Prepared) -> str:
    return f"Would compare {', '.join(m.name for m in prepared.methods)} in {job.folder}."


def _work(job: Session, prepared: Prepared) -> Results:
    cfg, task, inputs = job.cfg, prepared.task, prepared.inputs
    sets = {NAIVE: inputs}
    found, moved = align_all(job, task, inputs), "Nothing was aligned (algo=naive)."
    if found:
        counts = {label: alignment.moved() for label, alignment in found.items()}
        told = ", ".join(f"{label} {count:,}" for label, count in counts.items())
        neurons = next(iter(found.values())).spec.neurons
        moved = f"Neurons moved by {cfg.algo.name}, of {neurons:,}: {told}."
        if not all(alignment.is_identity for alignment in found.values()):
            sets[ALIGNED] = inputs.moved(found)
        else:
            moved += " So aligning changes nothing here, and no merge is shown twice."
    with job.stage("merge"):
        evaluator = Evaluator(task.model, inputs.states, prepared.objectives, device=cfg.device)
        more: Any = {"objective": task.objective, "seed": cfg.seed, "progress": job.progress}
        rows = compare(evaluator, sets, prepared.methods, resolved(cfg.methods), **more)
        told = figures(inputs.labels, base_name(job.config), moved, prepared.objectives, rows, cfg.seed)
    with job.stage("report"):
        return job.leave(told)


compare_methods = Job(KIND, _prepare, _plan, _work)
