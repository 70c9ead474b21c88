"""search.png: what a matching that looks at the loss saw: the losses of each step, and what each moved."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from .numbers import number
from .results import Results
from .style import BLUE, INK, MUTED, ORANGE, figure

NAME = "search.png"
PARTS = ("start", "projection", "gradient", "scoring")
"""Where the time of such a matching goes."""

SERIES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("train", "batches of the step", {"color": ORANGE, "linewidth": 1.0}),
    (
        "heldout",
        "batches that select",
        {"color": BLUE, "marker": "o", "ls": "", "markersize": 3, "zorder": 3},
    ),
    ("objective", "the best so far", {"color": BLUE, "drawstyle": "steps-post", "linewidth": 1.8}),
)


def has_losses(results: Results) -> bool:
    """Whether the algorithm looked at the loss, so that there is something to draw."""
    return "search" in results["match"]


def draw(results: Results) -> Figure:
    """Above the losses at the midpoint minus the mean of A's and B's, below the neurons that each step moved; of maps,
    how far they are from the identity.
    """
    match = results["match"]
    search, history = match["search"], match["history"]
    with figure(6.8, 4.6) as fig:
        top, bottom = fig.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
        for key, label, look in SERIES:
            points = [(step["step"], step[key]) for step in history if step[key] is not None]
            if points:
                top.plot(*zip(*points, strict=True), label=label, **look)
        for value, name in ((search["naive"], "naive"), (search["start"], "start")):
            if value is not None:
                style = ":" if name == "naive" else "-."
                top.axhline(
                    value, color=MUTED, linestyle=style, linewidth=1.1, label=f"{name}, {number(value)}"
                )
        passes = [step["step"] for step in history if step["kind"] == "pass"]
        steps = [step["step"] for step in history]
        for ax in (top, bottom) if passes else ():
            ax.axvspan(passes[0] - 0.5, passes[-1] + 0.5, color=MUTED, alpha=0.1, linewidth=0)
        top.set(title="Loss at the midpoint, minus the mean of A's and B's", ylabel="excess loss")
        # Outside: wherever the curves go, nothing lies on them.
        fig.legend(*top.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
        if "turned" in history[0]:
            bottom.plot(steps, [step["turned"] for step in history], color=INK, drawstyle="steps-pre")
        else:
            bottom.bar(steps, [step["moved"] for step in history], width=1.0, color=INK)
        label = "maps: |M - I|" if "turned" in history[0] else "neurons moved"
        bottom.set(ylabel=label, xlabel="step (shaded: verified passes)" if passes else "step")
    return fig


def time_split(results: Results) -> str:
    """Where the time went, in a few words; "" if the algorithm did not look at the loss."""
    if not has_losses(results):
        return ""
    seconds = results["match"]["search"]["seconds"]
    return ", ".join(f"{part} {seconds[part]:.1f} s" for part in PARTS if part in seconds)
