"""What a search leaves for people: results.json, pictures, report.html, and the table in the terminal."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from omegaconf import OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..checkpoints import write_text
from ..reporting.answers import number
from ..reporting.html import data_uri
from ..reporting.results import FORMAT, Results, environment, plain, save_results
from . import plots
from .candidate import Candidate
from .folder import base_name
from .study import finished, seconds_of
from .trials import SAME
from .verdict import AVERAGE, Finalist

if TYPE_CHECKING:
    import optuna

    from .setup import Setup

KIND = "search"
TEMPLATE = "search.html.j2"
PICTURES = ("history.png", "importance.png", "front.png", "slices.png", "weights.png")

FILES = {
    "report.html": "read this first",
    "best.safetensors": "the winner, with its recipe in the header",
    "results.json": "every figure",
    "study.db": "all trials; the same command goes on with them",
    "config.yaml": "the resolved configuration",
}


def collect(
    config: Mapping[str, Any],
    setup: Setup,
    study: optuna.Study,
    baseline: Mapping[str, Sequence[float]],
    ranked: Sequence[Finalist],
    judged: Sequence[Mapping[str, Any]],
    before: int,
    seconds: Mapping[str, float],
    command: str,
) -> Results:
    """Everything about a search as plain data; losses throughout, also where an aim's `sign` is -1."""
    done = sorted(finished(study), key=lambda trial: trial.number)
    by_label = {f"trial {trial.number}": trial for trial in done}
    winner = ranked[0]
    trials = [
        {
            "number": trial.number,
            # Optuna calls the last batch of a trial that was given up its value.
            "values": list(trial.values) if trial.state.name == "COMPLETE" else [],
            "parameters": dict(trial.params),
            "start": trial.user_attrs.get("start"),
            "batches": trial.user_attrs.get("batches"),
            "same_as": trial.user_attrs.get(SAME),
            "error": trial.user_attrs.get("error"),
            "seconds": trial.duration.total_seconds() if trial.duration is not None else None,
        }
        for trial in done
    ]
    return plain(
        {
            "format": FORMAT,
            "kind": KIND,
            "name": f"{config['model']['name']}-search",
            "model": config["model"]["name"],
            "data": config["data"]["name"],
            "algorithm": config["algo"]["name"],
            "seed": config["seed"],
            "labels": list(setup.inputs.labels),
            "base": base_name(config),
            "space": setup.space.in_words(),
            "parameters": sorted({name for trial in done for name in trial.params}),
            "aims": [
                {"name": aim.name, "sign": aim.sign, "batches": len(aim.search), "choosing": len(aim.choose)}
                for aim in setup.aims
            ],
            "trials": trials,
            "resumed": before,
            "spent": seconds_of(done),
            "baseline": {label: list(values) for label, values in baseline.items()},
            "finalists": [
                {
                    "label": finalist.label,
                    "words": str(finalist.candidate),
                    "search": _search_values(finalist, by_label, baseline),
                    "chosen": list(finalist.chosen),
                    "front": finalist.front,
                }
                for finalist in ranked
            ],
            "winner": {
                "label": winner.label,
                "words": str(winner.candidate),
                "candidate": winner.candidate.to_dict(),
                "parameters": dict(by_label[winner.label].params) if winner.label in by_label else {},
            },
            "judged": [dict(one) for one in judged],
            "importance": {aim.name: _importance(study, i) for i, aim in enumerate(setup.aims)},
            "seconds": {**seconds, "total": sum(seconds.values())},
            "environment": environment(),
            "config": dict(config),
            "command": command,
        }
    )


def leave(results: Results, folder: Path) -> None:
    """Write results.json, the pictures and report.html."""
    save_results(folder, results)
    draw(results, folder)


def draw(results: Results, folder: Path) -> list[Path]:
    """Write the pictures and report.html from results.json's content."""
    drawn = plots.draw(results, folder)
    page = (
        Environment(
            loader=PackageLoader("rebasin.search", "."),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
        )
        .get_template(TEMPLATE)
        .render(
            r=results,
            verdict=verdict(results),
            rows=rows(results),
            finalists=_finalist_rows(results),
            pictures={path.stem: data_uri(path) for path in drawn},
            config=OmegaConf.to_yaml(OmegaConf.create(results["config"])),
            number=number,
            given_up=sum(not trial["values"] for trial in results["trials"]),
        )
    )
    return [*drawn, write_text(folder / "report.html", page)]


def verdict(results: Results) -> tuple[str, str, str]:
    """(a word or two, a sentence or two, tone) that the figures alone choose: the winner against plain averaging."""
    told, tones = [], []
    for one in results["judged"]:
        found = one["differences"][AVERAGE]
        name = one["name"]
        if found["mean"] is None:
            told.append(f"On {name} a loss is not finite.")
            tones.append("bad")
            continue
        better = -found["mean"]
        interval = (
            f" (95 % interval of the difference {number(found['low'])} to {number(found['high'])},"
            f" {one['units']} units)"
            if found["low"] is not None
            else ""
        )
        average = abs(one["models"][AVERAGE]["mean"] or 0.0)
        share = f", {abs(better) / average:.2%}" if average else ""
        if better == 0 and found["low"] == found["high"] == 0:
            told.append(f"On held-out {name} the winner is the plain average itself.")
            tones.append("neutral")
        elif found["high"] is not None and found["high"] < 0:
            told.append(
                f"On held-out {name} the winner beats plain averaging by {number(better)}{share}{interval}."
            )
            tones.append("good")
        elif found["low"] is not None and found["low"] > 0:
            told.append(
                f"On held-out {name} the winner is worse than plain averaging by {number(-better)}{share}{interval}."
            )
            tones.append("bad")
        else:
            told.append(f"On held-out {name} winner and plain average can't be told apart{interval}.")
            tones.append("neutral")
    words = {"good": "Yes", "bad": "No", "neutral": "No difference"}
    tone = tones[0] if len(set(tones)) == 1 else "mixed"
    return words.get(tone, "In part"), " ".join(told), tone


def rows(results: Results) -> list[dict[str, str]]:
    """Held-out figures in words: a row for each aim and model."""
    found = []
    for one in results["judged"]:
        for label, model in one["models"].items():
            signed = plots.shown(one, 1.0)
            ends = [model["low"], model["high"]]
            gap = one["differences"].get(label)
            found.append(
                {
                    "aim": one["name"],
                    "model": label,
                    "value": _signed(model["mean"], signed),
                    "interval": _between(ends, signed),
                    "difference": "" if gap is None else _signed(gap["mean"], signed),
                    "between": "" if gap is None else _between([gap["low"], gap["high"]], signed),
                }
            )
    return found


def figures(results: Results) -> dict[str, float]:
    """The numbers of the verdict, for a logger."""
    found: dict[str, float] = {"trials": len(results["trials"]), "spent": results["spent"]}
    for one in results["judged"]:
        for label, model in one["models"].items():
            if model["mean"] is not None:
                found[f"{one['name']}/{label}"] = one["sign"] * model["mean"]
        gap = one["differences"][AVERAGE]
        found |= {f"{one['name']}/winner-average {k}": v for k, v in gap.items() if v is not None}
    return found


def summary(results: Results, folder: Path, console: Console) -> None:
    """The held-out table, the verdict, and where the files are."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    titles = {
        "held-out": False,
        "model": False,
        "value": True,
        "winner minus it": True,
        "95 % interval": True,
    }
    for title, right in titles.items():
        table.add_column(title, justify="right" if right else "left", no_wrap=True)
    for row in rows(results):
        table.add_row(*(row[key] for key in ("aim", "model", "value", "difference", "between")))
    console.print()
    console.print(table)
    short, text, tone = verdict(results)
    color = {"good": "green", "bad": "red", "mixed": "yellow"}.get(tone, "default")
    console.print(f"\nWinner: {escape(results['winner']['label'])}, {escape(results['winner']['words'])}")
    console.print(f"Better than plain averaging? [bold {color}]{short}.[/] {escape(text)}\n")
    console.print(f"In {escape(str(folder))}:")
    for name, meaning in FILES.items():
        if (folder / name).exists():
            console.print(f"  {name:<18}  [dim]{meaning}[/dim]")


def _search_values(
    finalist: Finalist, by_label: Mapping[str, Any], baseline: Mapping[str, Sequence[float]]
) -> list[float]:
    if finalist.label in by_label:
        return list(by_label[finalist.label].values)
    return list(baseline.get(finalist.label, ()))


def _importance(study: optuna.Study, aim: int) -> dict[str, float]:
    """How much each parameter matters among the better trials (PED-ANOVA, Watanabe et al. 2023); {} for too few."""
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it is about low values: they are losses
            found = get_param_importances(
                study, evaluator=PedAnovaImportanceEvaluator(), target=lambda trial: trial.values[aim]
            )
    except (ValueError, RuntimeError, ZeroDivisionError):
        return {}
    return {name: float(value) for name, value in found.items()}


def _finalist_rows(results: Results) -> list[dict[str, Any]]:
    found = []
    for finalist in results["finalists"]:
        told = {"label": finalist["label"], "words": finalist["words"], "front": finalist["front"]}
        for split in ("search", "chosen"):
            told[split] = [
                _signed(value, aim["sign"])
                for aim, value in zip(results["aims"], finalist[split], strict=False)
            ]
        found.append(told)
    return found


def _signed(value: float | None, sign: float) -> str:
    return number(None if value is None else sign * value, 5)


def _between(ends: Sequence[float | None], sign: float) -> str:
    if any(end is None for end in ends):
        return ""
    low, high = sorted(sign * end for end in ends if end is not None)
    return f"{number(low, 4)} to {number(high, 4)}"


def candidate_of(results: Results) -> Candidate:
    """The winner of a finished search."""
    return Candidate.from_dict(results["winner"]["candidate"])
