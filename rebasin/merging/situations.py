"""Merge methods in plain words, and which to try when: one source of `rebasin methods` and the docs' table."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import unknown


@dataclass(frozen=True)
class Situation:
    """What somebody has, the methods to try in this order, and why."""

    have: str
    methods: tuple[str, ...]
    because: str


SITUATIONS: dict[str, Situation] = {
    "anything": Situation(
        "two models, no idea",
        ("weighted_sum",),
        "at 0.5, then other shares: nothing is simpler, and it is hard to beat: compare everything with it",
    ),
    "independent": Situation(
        "independently trained models",
        ("weighted_sum",),
        "after aligning: no method mends models whose neurons are in different orders; aligning does",
    ),
    "finetunes": Situation(
        "fine-tunes of one base, for different tasks",
        ("add_difference", "ties_sum", "dropout", "model_stock"),
        "what each learned can be told from what they share, and added",
    ),
    "forgetting": Situation(
        "a fine-tune that forgot too much", ("wise_ft",), "the line back to its own base"
    ),
    "soup": Situation(
        "many fine-tunes of one task",
        ("uniform_soup", "greedy_soup", "geometric_median"),
        "averaging helps; greedy leaves out bad ones, the median resists them",
    ),
    "training": Situation(
        "checkpoints of one training", ("ema", "polyak"), "the end of a training moves around a better point"
    ),
    "gradients": Situation(
        "training data and time for gradients",
        ("fisher",),
        "weights that matter to one model only are taken from it",
    ),
    "style": Situation(
        "A, to which B's style is to be added once",
        ("train_difference", "add_difference"),
        "plain differences add twice what A already has; add_difference with clamp does not, either",
    ),
    "overshoot": Situation(
        "a method that overshoots", ("clip",), "after it: no value beyond those of the models"
    ),
}
"""The word of --for -> the situation."""


WORDS: dict[str, str] = {
    "weighted_sum": "Mixes the models like paint: so much of each. The plain average, and the first thing to try.",
    "slerp": "Like weighted_sum, but keeps the size of the weights, which plain averaging of unlike models shrinks.",
    "geometric_sum": "A mean by multiplying instead of adding; where one model is near zero, so is the result.",
    "add_cosine_a": "Takes more of B where B's columns point elsewhere than A's, less where both agree.",
    "add_cosine_b": "As add_cosine_a, judging each column and the whole tensor together: a softer choice.",
    "wise_ft": "Goes part of the way from a model back to what it was fine-tuned from, which often forgets less.",
    "uniform_soup": "The plain mean of any number of models, all alike.",
    "greedy_soup": "Adds one model after another to the mean and keeps each only if your score gets no worse.",
    "ema": "A mean in which later checkpoints of a training count more than earlier ones.",
    "polyak": "The plain mean of the last checkpoints of a training.",
    "geometric_median": "The point with the smallest total distance to all models: one odd model can't drag it away.",
    "fisher": "Weighs each single weight by how much its model's loss depends on it; needs the Fisher files of a run.",
    "add_difference": "Adds what B learned since the base to A: the usual way to put an ability into another model.",
    "train_difference": "Adds what B learned as far as A does not have it yet, as if A had been trained on it.",
    "perpendicular_component": "Adds only the part of what B learned that has nothing to do with what A learned.",
    "multiply_quotient": "Scales A's weights by B's ratio to the base, where the two pull in opposite directions.",
    "ties_sum": "Adds the largest changes of each model and lets the sign with more weight win where they contradict.",
    "dropout": "Drops most of the changes by chance and enlarges the rest (DARE), so that several models collide less.",
    "model_stock": "Finds by the angles between the models how far to go from the base; nothing to choose.",
    "tensor_sum": "Takes some rows whole from B and the others from A; depends on the neurons' order.",
    "top_k_tensor_sum": "Puts some of A's values into the order that B's have; for experiments.",
    "crossover": "Takes the coarse part of the weights from one model, the fine part from the other.",
    "distribution_crossover": "As crossover, on the values sorted by the base's: mixes their distributions.",
    "rotate": "Turns B into A's frame by the best rotation before mixing; changes what a model computes.",
    "clip": "Keeps every value of the first model within the range of the others: tames an overshooting merge.",
}
"""What a method does, for somebody who has never seen its formula."""


def situation(name: str) -> Situation:
    """That of this word.

    Raises:
        ConfigError: there is none.
    """
    if name not in SITUATIONS:
        raise unknown(f"--for {name} is no situation", name, SITUATIONS, "there are")
    return SITUATIONS[name]


def table() -> str:
    """All of them, in Markdown."""
    rows = ["| you have | `--for` | try | because |", "|:--|:--|:--|:--|"]
    for name, one in SITUATIONS.items():
        methods = ", ".join(f"`{method}`" for method in one.methods)
        rows.append(f"| {one.have} | `{name}` | {methods} | {one.because} |")
    return "\n".join(rows) + "\n"
