"""What the page shows, as HTML; everything that comes from files or users is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..reporting.numbers import duration
from ..tensors.writer import in_bytes
from .job_list import Job

MARKS = {"waiting": "…", "running": "▶", "done": "✓", "failed": "✗", "cancelled": "■"}

TONES = {"green": "good", "yellow": "mixed", "red": "bad"}

STAGES = {
    "read": "looks at the files",
    "hash": "sums of the files, to know what was aligned before",
    "spec": "derives and proves what may be permuted; the next time this is known",
    "align": "matches neurons",
    "check": "computes with B before and after it was moved",
    "compare": "computes with A, B and the merge",
    "measure": "distances of the blocks",
}
"""What stages do, as long as they tell nothing themselves."""

PICTURES = {"curve.png": "The loss from A to B", "samples.png": "Images of A, B and the midpoints"}
"""Of the files of a run those that are shown, and what they show."""

BARS = 80
"""Blocks that a chart shows; a model of more layers has the rest in `rebasin compare --json`."""


def problem(sentence: str) -> str:
    """What is wrong."""
    return f'<p class="problem" role="alert">{escape(sentence)}</p>'


def hint(sentence: str) -> str:
    """What there is to know."""
    return f'<p class="hint">{escape(sentence)}</p>'


def file(path: str, told: Mapping[str, Any] | str) -> str:
    """What a file is (`rebasin inspect --json`), or the sentence that tells why that is not known."""
    name = escape(Path(path).name)
    if isinstance(told, str):
        return f'<div class="file bad"><b>{name}</b><p>{escape(told)}</p></div>'
    parts = told.get("components") or ()
    rows = [f"{escape(str(told.get('what', told.get('kind', ''))))} · {in_bytes(told['bytes'])}"]
    if parts:
        rows.append(", ".join(escape(str(next(iter(part.values())))) for part in parts))
    if told.get("predicts"):
        rows.append("predicts " + escape(str(told["predicts"]).partition(":")[0]))
    if made := told.get("made"):
        inputs = ", ".join(escape(str(one.get("name"))) for one in made.get("inputs", ()))
        rows.append(f"made by rebasin from {inputs}" if inputs else "made by rebasin")
    lines = "".join(f"<span>{row}</span>" for row in rows)
    return f'<div class="file"><b>{name}</b>{lines}</div>'


def title(job: Job) -> str:
    """A job in a few words, plain text."""
    words = list(job.words)
    if job.module != "rebasin":
        given = {name: value.strip("'") for name, _, value in (word.partition("=") for word in words)}
        files = " and ".join(Path(given.get(name, "")).name for name in ("model.a", "model.b"))
        return f"{job.number} {MARKS[job.status]} measure {files}"
    what = "plan" if "--dry-run" in words else words[0]
    output = next((words[i + 1] for i, word in enumerate(words[:-1]) if word == "--output"), "")
    names = [Path(word).name for word in words[1:] if not word.startswith("-")][:2]
    told = Path(output).name if output and what != "compare" else " and ".join(names)
    return f"{job.number} {MARKS[job.status]} {what} {told}"


def job(
    one: Job | None, links: Sequence[tuple[str, str]] = (), comparison: Mapping[str, Any] | None = None
) -> str:
    """A job: where it is, its answers, its files (name and address of each) and the chart of a comparison."""
    if one is None:
        return hint(
            "No job yet. Choose two models, then Compare, Plan or Merge; what was started is listed here."
        )
    waits = f"waits for {one.ahead} before it" if one.ahead else "waits"
    state = {"waiting": waits, "running": "runs"}.get(one.status, one.status)
    text = f"{state} · {duration(one.seconds)}" if one.seconds else state
    head = f'<div class="head"><b>{escape(title(one))}</b><span class="pill">{text}</span></div>'
    parts = [f'<div class="job {one.status}">', head]
    if one.error:
        parts.append(problem(one.error))
    if one.status == "cancelled":
        parts.append(
            hint("No input was changed and nothing is half-written; Again goes on where it stopped.")
        )
    if one.status == "running":
        parts.append(_progress(one))
    if one.answers:
        parts += ['<div class="answers">', *map(_answer, one.answers), "</div>"]
    if comparison is not None:
        parts.append(chart(comparison))
    if one.status == "done" and "--dry-run" in one.words:
        parts.append(f"<pre>{escape(one.log.strip())}</pre>")
    parts += [_picture(name, address) for name, address in links if Path(name).name in PICTURES]
    if links:
        parts += ['<ul class="files">', *(_link(name, address) for name, address in links), "</ul>"]
    if one.stages and not one.over:
        parts.append(_stages(one))
    return "".join([*parts, "</div>"])


def _link(name: str, address: str) -> str:
    if not address:
        return f"<li>{escape(name)}</li>"
    # A page opens in a window of its own; all else is saved.
    how = 'target="_blank" rel="noopener"' if address.startswith("reports/") else "download"
    return f'<li><a href="{escape(address, quote=True)}" {how}>{escape(name)}</a></li>'


def _picture(name: str, address: str) -> str:
    told = escape(PICTURES[Path(name).name])
    return f'<img class="picture" src="{escape(address, quote=True)}" alt="{told}">'


def _progress(one: Job) -> str:
    current = one.stages[-1].name if one.stages and one.stages[-1].seconds is None else ""
    text = one.text or STAGES.get(current, "")
    told = f"{current}: {text}" if text else current or ("" if one.stages else "starts")
    role = f'role="progressbar" aria-valuemin="0" aria-valuemax="100" aria-label="{escape(current or "job")}"'
    if one.share is None:
        bar = f'<div class="bar unknown" {role}><i></i></div>'
    else:
        percent = 100 * one.share
        bar = f'<div class="bar" style="--share:{percent:.1f}%" aria-valuenow="{percent:.0f}" {role}><i></i></div>'
    return f'{bar}<p class="now">{escape(told)}</p>'


def _stages(one: Job) -> str:
    rows = "".join(
        f"<li><b>{escape(stage.name)}</b><span>{stage.seconds:.1f} s</span><em>{escape(stage.text)}</em></li>"
        for stage in one.stages
        if stage.seconds is not None
    )
    return f'<ol class="stages">{rows}</ol>'


def _answer(answer: Any) -> str:
    tone = TONES.get(answer.tone, "neutral")
    return (
        f'<div class="answer {tone}"><h4>{escape(answer.question)}</h4><b>{escape(answer.short)}</b>'
        f"<p>{escape(answer.text)}</p></div>"
    )


def chart(found: Mapping[str, Any]) -> str:
    """The blocks of `rebasin compare --json`: distances before and after aligning, and the share that stays."""
    blocks = list(found.get("blocks", ()))
    ways = [("before", "as they are"), ("after", "aligned")]
    if any(block.get("mapped") is not None for block in blocks):
        ways = [ways[0], ("after", "permuted"), ("mapped", "by maps")]
    most = max((float(block[way] or 0) for block in blocks for way, _ in ways), default=0.0) or 1.0
    legend = "".join(f'<span class="{way}">{told}</span>' for way, told in ways)
    rows = []
    for block in blocks[:BARS]:
        sizes = [(way, float(block[way] or 0), told) for way, told in ways]
        bars = "".join(
            f'<i class="{way}" style="width:{100 * size / most:.1f}%" title="{told}: {size:.3g}"></i>'
            for way, size, told in sizes
        )
        stay = f"{100 * block['stay']:.0f}%" if block["neurons"] else ""
        name = escape(block["name"]).replace(".", ".<wbr>")  # where a long name may be broken
        rows.append(
            f"<tr><th>{escape(block['component'])} <small>{name}</small></th>"
            f'<td class="bars">{bars}</td><td class="n">{sizes[0][1]:.2g}</td><td class="n">{stay}</td></tr>'
        )
    more = f"{len(blocks) - BARS} more blocks are in `rebasin compare --json`." if len(blocks) > BARS else ""
    return (
        f'<div class="chart"><div class="legend">|A − B| / |A| by block: {legend}</div><div class="scroll"><table>'
        '<tr><th>block</th><th></th><th class="n">apart</th><th class="n">stay</th></tr>'
        f"{''.join(rows)}</table></div>{hint(more) if more else ''}</div>"
    )


def method(one: Any, options: Mapping[str, Any]) -> str:
    """What a merge method does and needs."""
    models = f"{one.least} models or more" if one.inputs == "N" else f"{one.inputs} models"
    base = ", and a base" if one.needs_base else ", a base if there is one" if one.takes_base else ""
    given = ", ".join(f"{name}={value}" for name, value in options.items())
    rows = [
        f"<p>{escape(one.description)}</p>",
        f"<code>{escape(one.formula)}</code>",
        f"<p>Takes {models}{base}.",
    ]
    rows.append(f" Options: <code>{escape(given)}</code></p>" if given else "</p>")
    return f'<div class="method">{"".join(rows)}</div>'


def report(address: str) -> str:
    """A run's page inside this one."""
    address = escape(address, quote=True)
    return (
        f'<p><a href="{address}" target="_blank" rel="noopener">Open it in a window of its own</a></p>'
        f'<iframe src="{address}" title="Report of a run" sandbox="allow-scripts allow-popups"></iframe>'
    )
