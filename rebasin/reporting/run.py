"""What a run on two models leaves: its figures in results.json, curve.png, search.png, report.html, and its table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..matching.maps.latents import turned
from ..tensors import save_safetensors
from . import loss_history
from .answers import Answer, answers
from .curve import draw_curves
from .metrics import Tables, columns
from .numbers import between, cell, number, percent
from .results import Results, described
from .style import Drawings
from .table import Table

if TYPE_CHECKING:
    from ..evaluation import Curve
    from ..evaluation.rewards import Rewards
    from ..matching import MatchResult
    from ..spec import Alignment, PermutationSpec
    from ..types import State

CURVES = {
    "split": "data", "kind": "merge", "a": "loss of A", "b": "loss of B", "midpoint": "midpoint",
    "highest": "highest", "at": "at λ", "barrier": "barrier", "share": "of naive", "barrier_mean": "against the mean",
    "accuracy": "accuracy at the midpoint",
}  # fmt: skip
TRIED = "What was tried, by its largest loss above the line between the ends, on training batches of no figure above:"
MATCHED = ("converged", "seconds", "sweeps", "restarts", "initial_objective", "moved_per_group")
SHORT = ("split", "kind", "a", "b", "midpoint", "barrier", "share", "accuracy")
"""What fits into a terminal."""


def figures(
    labels: Sequence[str],
    aligned: str,
    spec: PermutationSpec,
    checks: Mapping[str, Any],
    match: MatchResult,
    curves: Mapping[str, Mapping[str, Curve]],
    *,
    lam: float,
    rewards: Rewards | None = None,
    merge: Mapping[str, Any] | None = None,
    pictures: Sequence[str] = (),
    batch_norms: int = 0,
) -> dict[str, Any]:
    """What was measured.

    Args:
        labels: of A and B.
        aligned: the part that was aligned.
        checks: part -> what was proved of its spec.
        pictures: the files of pictures that this run made of its models: results can't draw them again.
        batch_norms: how many of the network's norms keep statistics.
    """
    return {
        "lam": lam,
        "endpoints": dict(zip(("a", "b"), labels, strict=True)),
        "aligned_part": aligned,
        "spec": described(spec),
        "verify": checks,
        "match": {
            "objective": match.objective,
            "moved": match.moved,
            "neurons": spec.neurons,
            **{name: getattr(match, name) for name in MATCHED},
            "history": [_entry(step) for step in match.history],
            **_losses(match),
            **_maps(match),
            **_tried(match),
        },
        "distance": {"naive": match.distance_before, "aligned": match.distance_after},
        "curves": curves,
        "rewards": rewards,
        "merge": merge,
        "batch_norms": batch_norms,
        "pictures": [*pictures, *(["blocks.png"] if merge is not None and merge["blocks"] else [])],
    }


def _entry(step: Any) -> dict[str, Any]:
    """A sweep of a matching, or a step of one that looks at the loss."""
    if hasattr(step, "train"):
        entry = {"step" if name == "number" else name: value for name, value in asdict(step).items()}
        return {**entry, "seconds": step.seconds}
    return {
        "sweep": step.number,
        "objective": step.objective,
        "groups": len(step.updates),
        "moved": step.moved,
        "seconds": step.seconds,
    }


def _losses(match: Any) -> dict[str, Any]:
    """What only a matching that looks at the loss has; losses are minus the mean of A's and B's."""
    if not hasattr(match, "best_step"):
        return {}
    parts = [part for part in loss_history.PARTS if hasattr(match, f"seconds_{part}")]
    search = {
        "naive": match.initial_objective,
        "start": match.start_objective,
        "best": match.objective,
        "best_step": match.best_step,
        "endpoints": match.endpoints,
        "seconds": {part: getattr(match, f"seconds_{part}") for part in parts},
    }
    return {"search": search}


def _maps(match: MatchResult) -> dict[str, Any]:
    """What only an alignment with maps has: each continuous group, and how far it was moved."""
    found = match.as_alignment
    if not found.maps:
        return {}
    moved = turned(found.groups, found.maps)
    groups = [
        {
            "group": name, "kind": group.kind, "blocks": group.count, "size": group.size,
            "dimension": group.dimension, "moved": moved[name],
        }
        for name, group in found.groups.items()
        if name in moved
    ]  # fmt: skip
    return {"maps": {"groups": groups, "left_out": dict(getattr(match, "left_out", {}))}}


def _tried(match: Any) -> dict[str, Any]:
    """What only a matching that compares several has: what each was measured by; `points` is how many lambdas of the
    line were looked at, 0 where there was no data.
    """
    rows = [asdict(row) for row in getattr(match, "tried", ())]
    if not rows:
        return {}
    chosen = getattr(match, "chosen", None)
    return {"tried": rows, **({} if chosen is None else {"chosen": chosen, "points": match.points})}


def drawings(results: Results) -> Drawings:
    found: Drawings = {"curve.png": lambda: draw_curves(results)} if results["curves"] else {}
    if loss_history.has_losses(results):
        found[loss_history.NAME] = lambda: loss_history.draw(results)
    return found


def page(results: Results) -> dict[str, Any]:
    return {
        "answers": answers(results),
        "curves": curve_table(results),
        "lines": merge_lines(results),
        "scores": score_table(results),
        "split": loss_history.time_split(results),
        "maps": _map_table(results),
        "tried": tried_table(results),
        "parts": _parts(results),
        "history": _history(results),
    }


def made_before(results: Results) -> list[str]:
    """What a run of an earlier version, which did not tell, may have made of its models: not what can't be."""
    looked = loss_history.has_losses(results) and results["config"].get("sample_every")
    by_block = (results.get("merge") or {}).get("blocks")
    return ["samples.png", *(["steps.png"] if looked else []), *(["blocks.png"] if by_block else [])]


def told(results: Results) -> list[Table | Answer | str]:
    """What the terminal shows: the curves, the saved merge, scores, and the three answers."""
    curves, scores = curve_table(results, SHORT), score_table(results)
    tables = [curves, *merge_lines(results), *(["", scores] if scores.lines else [])]
    tried = tried_table(results)
    tables += ["", TRIED, tried] if tried.lines else []
    return [*tables, "", *answers(results)]


def curve_table(results: Results, columns: Iterable[str] = CURVES) -> Table:
    """A line for each curve."""
    rows = []
    for split, kinds in results["curves"].items():
        for kind, curve in kinds.items():
            if kind.startswith("aligned") and results["algorithm"] == "naive":
                continue
            losses = np.asarray(curve["losses"], dtype=float)
            accuracy = curve["metrics"].get("accuracy")
            row = {
                "split": split,
                "kind": called(kind, results),
                "a": number(curve["losses"][0]),
                "b": number(curve["losses"][-1]),
                "midpoint": number(float(np.interp(0.5, curve["lambdas"], losses))),
                "highest": number(float(losses.max())),
                "at": f"{curve['lambdas'][int(losses.argmax())]:.2f}",
                "barrier": number(curve["barrier"]),
                "barrier_mean": number(curve["barrier_mean"]),
            }
            before = kinds["naive"]["barrier"]
            if before and curve["barrier"] is not None:
                row["share"] = f"{curve['barrier'] / before:.0%}"
            if accuracy:
                row["accuracy"] = percent(float(np.interp(0.5, curve["lambdas"], accuracy)))
            rows.append(row)
    return Table.of(rows, {column: CURVES[column] for column in columns}, labels=2, strong="barrier")


def called(kind: str, results: Results) -> str:
    """A line's name for people: that along which models were repaired tells how."""
    how = (results.get("merge") or {}).get("repair") or "repaired"
    return kind.replace("_repaired", f", {how}")


def merge_lines(results: Results) -> list[str]:
    """The saved merge in words: its method and its own figures, a line for each split."""
    merge = results.get("merge")
    if merge is None:
        return []
    lines = []
    for split, found in merge["figures"].items():
        more = f", accuracy {percent(found['accuracy'])}" if found.get("accuracy") is not None else ""
        loss = number(found["loss"])
        how = "" if merge.get("repair") in (None, "none") else f", {merge['repair']}"
        lines.append(f"The saved merge ({merge['words']}{how}) on {split} data: loss {loss}{more}.")
    return [*lines, *merge["notes"]]


def score_table(results: Results) -> Table:
    """What a scorer thinks of each model's images, then the differences; no lines if none was asked."""
    rewards = results.get("rewards") or {"models": {}, "differences": {}}
    lines = tuple(
        (label, number(found["mean"]), between(found["low"], found["high"]))
        for kind in ("models", "differences")
        for label, found in rewards[kind].items()
    )
    seeds = results["config"]["evaluate"]["seeds"] if lines else 0
    interval = f"95 % interval ({seeds} seeds)"
    return Table(("model", "mean score", interval), lines, strong="mean score")


def tried_table(results: Results) -> Table:
    """The candidates that were compared; no lines if there were none, or no data to compare them by."""
    match = results["match"]
    chosen = match.get("chosen")
    lines = [
        (
            row["name"] + (" (chosen)" if row["name"] == chosen else ""),
            "" if row["why"] else number(row["loss"]),
            "" if row["why"] else f"{row['moved']:,}",
            f"{row['seconds']:.1f}",
            row["why"] or (f"the same as {row['same_as']}" if row["same_as"] else ""),
        )
        for row in match.get("tried") or ()
        if match.get("points") != 0
    ]
    return Table(("tried", "loss above the line", "neurons moved", "seconds", ""), tuple(lines), notes=1)


def _parts(results: Results) -> Table:
    """The parts whose specs were proved."""
    head = ("part", "groups", "neurons", "parameters moved on one axis", "on both", "verify error", "legal")
    lines = tuple(
        (
            name + (" (aligned)" if name == results["aligned_part"] else ""),
            str(check["groups"]),
            f"{check['neurons']:,}",
            f"{check['coverage']['one']:.2%}",
            percent(check["coverage"]["both"]),
            number(check["max_relative_error"], 2),
            "yes" if check["passed"] else "NO",
        )
        for name, check in results["verify"].items()
    )
    return Table(head, lines, notes=1)


def _map_table(results: Results) -> Table:
    """The continuous groups, those that were moved furthest first; no lines without maps."""
    maps = results["match"].get("maps") or {"groups": [], "left_out": {}}
    rows = sorted(maps["groups"], key=lambda row: -row["moved"])
    head = ("group", "kind", "blocks", "neurons in each", "free dimensions", "moved by")
    lines = [
        (
            row["group"],
            row["kind"],
            str(row["blocks"]),
            str(row["size"]),
            f"{row['dimension']:,}",
            number(row["moved"], 2),
        )
        for row in rows
    ]
    lines += [(name, "left out", "", "", "", why) for name, why in maps["left_out"].items()]
    return Table(head, tuple(lines), notes=1)


def _history(results: Results) -> Table:
    """The matching, step by step."""
    history = results["match"]["history"]
    keys = columns(history)
    lines = tuple(tuple(cell(entry.get(key)) for key in keys) for entry in history)
    return Table(tuple(keys), lines, labels=0)


def tables(results: Results) -> Tables:
    """curves: each split, line and lambda; history: each step of the matching."""
    names = sorted({m for kinds in results["curves"].values() for c in kinds.values() for m in c["metrics"]})
    curves = [
        [split, kind, lam, curve["losses"][i], *(curve["metrics"].get(n, [None] * (i + 1))[i] for n in names)]
        for split, kinds in results["curves"].items()
        for kind, curve in kinds.items()
        for i, lam in enumerate(curve["lambdas"])
    ]
    history = results["match"]["history"]
    keys = columns(history)
    found: Tables = {"curves": (["split", "merge", "lambda", "loss", *names], curves)}
    if history:
        found["history"] = (keys, [[entry.get(key) for key in keys] for entry in history])
    return found


def save_tensors(
    folder: Path,
    alignment: Alignment,
    aligned: State,
    merged: State,
    information: Sequence[State],
    config: Mapping[str, Any],
) -> list[Path]:
    """Write the alignment, B aligned, the merge, and the Fisher `information` of A and of aligned B if the merge took
    any, B's in B's own order, as the command `rebasin merge` takes it; the headers say what they are. Squares can't be
    brought back through maps: there B's stays that of aligned B.
    """
    about = {
        "model": config["model"]["name"],
        "algorithm": config["algo"]["name"],
        "seed": str(config["seed"]),
        "spec_hash": alignment.spec.hash,
    }
    kind = "alignment" if alignment.maps else "permutation"
    written = [folder / f"{kind}.safetensors"]
    alignment.save(written[0], {**about, "content": f"the {kind} that brings B to A, and its spec"})
    merge = f"merge by {config['merge']['method']}"
    merge += "" if config["repair"] == "none" else f", then repair by {config['repair']}"
    how = "B, permuted and mapped" if alignment.maps else "B, permuted"
    states = [("aligned", aligned, how), ("merged", merged, merge)]
    back = None if alignment.maps else alignment.permutation.invert()
    for name, own, way in zip("ab", information, (None, back), strict=False):
        whose = "aligned B" if name == "b" and way is None else name.upper()
        state = own if way is None else way.view(own)
        states.append((f"fisher_{name}", state, f"the diagonal Fisher information of {whose}"))
    for name, state, content in states:
        written.append(save_safetensors(folder / f"{name}.safetensors", state, {**about, "content": content}))
    return written
