"""In which order groups are updated, which ones depend on each other, and how to update independent ones at
once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Literal

import numpy as np

from ..errors import ConfigError
from ..spec import Group, PermutationSpec

Order = Literal["random", "forward", "backward"] | Callable[[int, int], Sequence[int]]
"""A name, or a function of (sweep, from 0; number of groups) that gives the group numbers in their order."""


def order_of(order: Order, groups: int, seed: int, restart: int, sweep: int) -> list[int]:
    """The order of one sweep, a function of its arguments alone, so that a run can be continued anywhere.

    "random" is a fresh uniform order every sweep, as in the paper's algorithm; "forward" is the spec's order,
    from the input to the output, "backward" its reverse.
    """
    if callable(order):
        given: Any = order(sweep, groups)
        chosen = [int(g) for g in given] if isinstance(given, Iterable) else []
        if sorted(chosen) != list(range(groups)):
            raise ConfigError(
                f"The order of sweep {sweep} must have each of the numbers 0 to {groups - 1} once."
            )
        return chosen
    if order == "random":
        return np.random.default_rng([seed, restart, sweep]).permutation(groups).tolist()
    return list(range(groups)) if order == "forward" else list(range(groups))[::-1]


def neighbours(spec: PermutationSpec) -> list[frozenset[int]]:
    """For each group the numbers of those whose costs depend on it: they meet it on another axis of a
    parameter.

    Two groups on the same axis of a tensor (the halves of a concatenation) are no neighbours: neither's
    slices are changed by the other. A group that meets itself is its own neighbour.
    """
    found: list[set[int]] = [set() for _ in spec.groups]
    number = _numbers(spec)
    for parameter, axes in spec.axes.items():
        if parameter in spec.buffers:
            continue
        on = {axis: {number[cell] for cell, _ in sites} for axis, sites in axes.items()}
        for axis, here in on.items():
            there = set().union(*(groups for other, groups in on.items() if other != axis))
            for group in here:
                found[group] |= there
    return [frozenset(groups) for groups in found]


def sharing(spec: PermutationSpec) -> list[frozenset[int]]:
    """For each group the numbers of the others that act on a tensor that it acts on: these take turns."""
    found: list[set[int]] = [set() for _ in spec.groups]
    number = _numbers(spec)
    for axes in spec.axes.values():
        on = {number[cell] for sites in axes.values() for cell, _ in sites}
        for group in on:
            found[group] |= on - {group}
    return [frozenset(groups) for groups in found]


def axes_met(group: Group) -> dict[str, set[int]]:
    """parameter -> the axes on which the group acts."""
    met: dict[str, set[int]] = {}
    for cell in group.cells:
        for site in cell.sites:
            met.setdefault(site.parameter, set()).add(site.axis)
    return met


def run_in_order(
    job: Callable[[int], None],
    order: Sequence[int],
    before: Sequence[frozenset[int]],
    workers: int,
    done: Callable[[int], None] = lambda group: None,
) -> None:
    """Call `job` for every group, as if one after the other in `order`, and `done` when it is, from this thread.

    With several workers a group starts as soon as all groups of `before[group]` that precede it in `order`
    are done. Those that it does not wait for touch none of its tensors, so the outcome is that of the
    sequence.
    """
    if workers <= 1:
        for group in order:
            job(group)
            done(group)
        return
    place = {group: k for k, group in enumerate(order)}
    waiting = {
        group: {g for g in before[group] if place.get(g, len(order)) < k} for group, k in place.items()
    }
    with ThreadPoolExecutor(workers) as pool:
        running: dict[Future[None], int] = {}
        while waiting or running:
            ready = [group for group in order if group in waiting and not waiting[group]]
            for group in ready:
                del waiting[group]
                running[pool.submit(job, group)] = group
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            try:
                for future in ended:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            for finished in (running.pop(future) for future in ended):
                done(finished)
                for rest in waiting.values():
                    rest.discard(finished)


def _numbers(spec: PermutationSpec) -> dict[str, int]:
    return {cell.name: k for k, group in enumerate(spec.groups) for cell in group.cells}
