"""The three questions a reader has, answered from the numbers: is it legal, did it help, what did it cost.

The words are chosen by the figures alone, so a run that did not help says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from .numbers import number
from .results import Results

NEGLIGIBLE = 0.02
"""A barrier below this share of the endpoints' loss is called none."""

TURNED = 1e-6
"""A map that is no further from the identity has moved nothing."""

Tone = Literal["good", "mixed", "bad", "neutral"]

LEARNED = (
    " Learned maps can make the line low without merging what A and B know: docs/continuous.md has a control."
)
"""Said of a barrier that maps took which were learned by the loss on it: a B of noise has a low midpoint, too."""

SHARES: tuple[tuple[float, str, Tone, str], ...] = (
    (0.5, "Yes", "good", "; a part remains"),
    (0.95, "A little", "mixed", "; most of it remains"),
    (1.05, "No", "bad", ": unchanged, within 5 %"),
    (math.inf, "No", "bad", ": it is higher than without aligning"),
)
"""By the share of the barrier that is left, up to the number: what is said of it."""


@dataclass(frozen=True)
class Answer:
    """`short` is a word or two, `text` one or two sentences."""

    question: str
    short: str
    text: str
    tone: Tone


def answers(results: Results) -> tuple[Answer, Answer, Answer]:
    """Answers to the three questions, in the order of the page."""
    helped = _helped(results)
    return _legal(results), replace(helped, text=helped.text + _repaired(results)), _cost(results)


def primary(results: Results) -> tuple[str, dict, dict]:
    """The split that the answers speak of (held-out data where measured), its naive and its aligned curve."""
    curves = results["curves"]
    split = "heldout" if "heldout" in curves else next(iter(curves))
    return split, curves[split]["naive"], curves[split]["aligned"]


def _legal(results: Results) -> Answer:
    checks = results["verify"]
    worst = max(check["max_relative_error"] for check in checks.values())
    legal = all(check["passed"] for check in checks.values())
    parts = ", ".join(f"{name} {number(check['max_relative_error'], 2)}" for name, check in checks.items())
    maps = max(check.get("maps", 0) for check in checks.values())
    both = f", and random maps of {maps} continuous groups," if maps else ""
    text = (
        f"A random permutation of all {results['spec']['neurons']:,} neurons{both} changed the outputs by at most"
        f" {number(worst, 2)} relative ({parts})."
    )
    if results["curves"]:
        _, naive, aligned = primary(results)
        text += (
            f" Loss of B before and after it was {'moved' if maps else 'permuted'}:"
            f" {number(naive['losses'][-1], 6)} and {number(aligned['losses'][-1], 6)}."
        )
    return Answer("Is it legal?", "Yes" if legal else "No", text, "good" if legal else "bad")


def _helped(results: Results) -> Answer:
    question = "Did it help?"
    moved, total = results["match"]["moved"], results["match"]["neurons"]
    groups = (results["match"].get("maps") or {"groups": ()})["groups"]
    maps = sum(row["moved"] is None or row["moved"] > TURNED for row in groups)
    chosen, tried = results["match"].get("chosen"), results["match"].get("tried") or ()
    if not results["curves"]:
        text = (
            f"{moved:,} of {total:,} neurons moved{' by weight matching' * (chosen is not None)}; no loss was measured,"
            " because the task has no data: nobody has looked at what the merge computes."
        )
        return Answer(question, "Not measured", text, "neutral")
    split, naive, aligned = primary(results)
    before, after = naive["barrier"], aligned["barrier"]
    if before is None or after is None:
        return Answer(question, "Unclear", "A loss on the line is not finite: nothing to compare.", "bad")
    endpoints = (naive["losses"][0] + naive["losses"][-1]) / 2
    where = {"heldout": "held-out data", "train": "training data"}.get(split, split)
    measured = (
        f"the barrier on {where} was {number(before)} (the endpoints' mean loss is {number(endpoints)})"
    )
    if results["algorithm"] == "naive":
        return Answer(question, "Not aligned", f"This is the baseline: {measured}.", "neutral")
    if before <= NEGLIGIBLE * abs(endpoints):
        text = (
            f"There was no barrier to remove: {measured}. Moving {moved:,} of {total:,} neurons"
            f" left it at {number(after)}."
            if moved or maps
            else f"No neuron moved, and there is no barrier to remove: {measured}. Nothing to do here."
        )
        return Answer(question, "Nothing to do", text, "neutral")
    if moved == 0 and not maps:
        text = f"No neuron moved although there is a barrier: {measured}. This method saw nothing to align."
        if chosen == "naive":
            text = (
                f"No neuron was moved although there is a barrier: {measured}. None of {len(tried) - 1} alignments that"
                " were tried has a lower one on the batches that select."
            )
        return Answer(question, "No", text, "bad")
    share = after / before
    _, short, tone, rest = next(row for row in SHARES if share <= row[0])
    if after <= NEGLIGIBLE * abs(endpoints):
        short, tone, rest = "Yes", "good", "; it is gone"
    turned = f", and {maps} maps beside them" if maps else ""
    permuted = results["curves"][split].get("permuted", {}).get("barrier")
    rest += f"; the permutation alone that they start from leaves {permuted / before:.0%}" if permuted else ""
    change = (
        f"The barrier on {where} went from {number(before)} to {number(after)}, {max(share, 0):.0%} of naive"
    )
    by = f" by {chosen}, the best of {len(tried)} that were tried" if chosen else ""
    text = f"{change}{rest}. {moved:,} of {total:,} neurons moved{turned}{by}."
    text += LEARNED if maps and results["match"].get("search") and share <= 1 else ""
    return Answer(question, short, text, tone)


def _repaired(results: Results) -> str:
    """What a repair has done, or that there is one."""
    if not results["curves"]:
        return ""
    split, naive, aligned = primary(results)
    found = results["curves"][split]
    if "aligned_repaired" in found:
        after, before = (number(found[f"{kind}_repaired"]["barrier"]) for kind in ("aligned", "naive"))
        how = results["merge"]["repair"]
        same = results["algorithm"] == "naive" or found["aligned"] == found["naive"]
        return f" With repair={how} the barrier is {after}{'' if same else f', naive {before}'}."
    if naive["losses"][0] is None or naive["losses"][-1] is None:  # not finite
        return ""
    ends = abs(naive["losses"][0] + naive["losses"][-1]) / 2
    if not results.get("batch_norms") or not (aligned["barrier"] or 0) > NEGLIGIBLE * ends:
        return ""
    return (
        " The network has BatchNorm, and the statistics of a merge are those of no network: try repair=reset, which"
        " collects them anew."
    )


def _cost(results: Results) -> Answer:
    seconds, match = results["seconds"], results["match"]
    sweeps = match["sweeps"]
    steps = f" ({sweeps} {'sweep' if sweeps == 1 else 'sweeps'})" if sweeps else ""
    end = "" if match["converged"] else " It stopped before it converged."
    text = (
        f"Aligning took {seconds['align']:.1f} s{steps}, deriving and verifying the spec"
        f" {seconds['spec'] + seconds['verify']:.1f} s, evaluating {seconds['evaluate']:.1f} s.{end}"
    )
    return Answer("What did it cost?", f"{seconds['total']:.0f} s", text, "neutral")
