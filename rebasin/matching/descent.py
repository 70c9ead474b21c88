"""Block coordinate descent: the one loop behind every algorithm here that improves one thing given all others.

    repeat
        for each block in some order
            if anything that it depends on has changed since it was last looked at
                bring it to its best given all other blocks
    until no block can be improved

Blocks are groups of neurons (weight matching, algorithm 1 of Ainsworth et al., arXiv 2209.04836, activations and
weights together, the loss of the midpoint) or whole models (MergeMany, their algorithm 3). The paper's code goes on
until a sweep changes nothing; here a block is looked at again only if it is *dirty*: another one that it depends on has
changed. That is the same end in less time, and a proof of it: when none is dirty, none can be improved.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

Run = Callable[[Callable[[int], None], Sequence[int]], None]
"""Calls a function for every block of an order, as if one after the other; see `schedule.run_in_order`."""


def in_turn(visit: Callable[[int], None], order: Sequence[int]) -> None:
    """One block after the other."""
    for block in order:
        visit(block)


def coordinate_descent(
    improve: Callable[[int], bool],
    depend_on: Sequence[Collection[int]],
    begin: Callable[[int], Sequence[int]],
    dirty: set[int],
    max_sweeps: int,
    *,
    first: int = 1,
    run: Run = in_turn,
    clean: bool = False,
) -> Iterator[int]:
    """Sweep over the blocks until none is dirty or `max_sweeps` is reached; yields the number of each finished sweep.

    Args:
        improve: bring one block to its best given all others; says whether that changed it.
        depend_on: for each block those that are to be looked at again when it has changed.
        begin: called with a sweep's number (from `first` on) before it starts; gives the order of its blocks.
        dirty: the blocks to be looked at. It is kept up to date, so that it tells what a continued descent has to do;
            the caller may add to it, `improve` the block that it could not finish.
        run: goes through an order, by default one after the other.
        clean: look at blocks that are not dirty, too, as long as any is.
    """

    def visit(block: int) -> None:
        if block in dirty or (clean and dirty):
            dirty.discard(block)
            if improve(block):
                dirty.update(depend_on[block])

    for number in range(first, max_sweeps + 1):
        if not dirty:
            return
        run(visit, begin(number))
        yield number
