"""An attack on the symmetry engine: random networks are traced, and members of the group checked without `verify`.

    python -m experiments.attack_zoo --networks 10000 --seed 0     # a night; networks 0 ... 9999
    python -m experiments.attack_zoo --network 1234                # one network, told line by line

Every network is one number (experiments/zoo_random.py). A permuted state is loaded into a second network, built from
the same number, and its outputs are compared in float64 on inputs of two batch sizes: a change is a false symmetry.
What is no `TraceError` is a crash. A failure is made smaller by leaving out steps, and printed.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

import rebasin
from rebasin.errors import TraceError

from .zoo_random import Network, Plan, describe, draw

TOLERANCE = 1e-8
NOTHING = 1e-6
"""Outputs smaller than this are compared with it: the mean of what a norm has centred is zero up to rounding."""


@dataclass(frozen=True)
class Outcome:
    """What came of one network: `fault` is empty if all is well."""

    fault: str = ""
    refused: bool = False
    neurons: int = 0
    maps: int = 0  # continuous groups
    beyond: tuple[str, ...] = ()  # operators whose rule failed: sound, and worth a look


def examine(plan: Plan, members: int = 3) -> Outcome:
    """Trace one network and check members of its group."""
    model = Network(plan)
    x = torch.randn(plan.shape, generator=torch.Generator().manual_seed(1))
    try:
        spec = rebasin.trace(model, x)
    except TraceError as error:
        told = str(error)
        return Outcome(refused=True) if "\n" not in told else Outcome(f"more than a sentence: {told}")
    except Exception as error:
        return Outcome(f"crash: {type(error).__name__}: {error}"[:300])
    beyond = tuple(p.reason for p in spec.pins if "beyond its rule" in p.reason)
    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn((n, *plan.shape[1:]), generator=generator, dtype=torch.float64) for n in (2, 3)]
    original = double(Network(plan))
    state = {name: t.clone() for name, t in original.state_dict().items()}
    expected = [run(original, x) for x in inputs]
    if all(e is None for e in expected):
        return Outcome(neurons=spec.neurons, beyond=beyond)
    pairs = [(x, wanted) for x, wanted in zip(inputs, expected, strict=True) if wanted is not None]
    count, maps = spec.neurons, len(spec.continuous)
    for seed in range(members if count else 0):
        fault = changed(plan, spec.random(seed).apply(state), pairs)
        if fault:
            return Outcome(fault if fault.startswith("the") else f"false symmetry: {fault}", neurons=count)
    held = spec.stuck(state)
    free = [group.name for group in spec.continuous if group.name not in held]
    for seed in range(members - 1 if free else 0):
        whole = spec.random_alignment(seed).without(held)
        fault = changed(plan, whole.apply(state), pairs)
        if fault:
            alone = (whole.without(n for n in free if n != name) for name in free)
            guilty = [next(iter(one.maps)) for one in alone if changed(plan, one.apply(state), pairs)]
            return Outcome(f"false map: {fault} by {', '.join(guilty)}", neurons=count, maps=maps)
    return Outcome(neurons=count, maps=maps, beyond=beyond)


def changed(
    plan: Plan, moved: dict[str, torch.Tensor], pairs: list[tuple[torch.Tensor, list[torch.Tensor]]]
) -> str:
    """What a second network with the moved state computes differently; "" if nothing."""
    other = double(Network(plan))
    other.load_state_dict(moved)
    kept = other.state_dict()
    if not all(torch.allclose(kept[name], moved[name], 1e-9, 1e-12) for name in moved):
        return "the moved state can't be held: tensors that share memory are moved apart"
    for x, wanted in pairs:
        found = run(other, x)
        if found is None:
            return "output 0 is out of bounds now"
        for k, (a, b) in enumerate(zip(found, wanted, strict=True)):
            error = float((a - b).norm() / max(b.norm(), NOTHING))
            if not error < TOLERANCE:
                return f"output {k} changes by {error:.1e}"
    return ""


def double(model: Network) -> Network:
    """In float64, tensors that share memory still sharing it."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
    wide = {}
    for key, storage in storages.items():
        wide[key] = torch.empty(0).set_(storage, 0, (storage.nbytes() // 4,), (1,)).double()
    places = [(t, t.size(), t.stride(), t.storage_offset(), t.untyped_storage()._cdata) for t in tensors]
    for tensor, size, stride, offset, key in places:
        tensor.data = wide[key].as_strided(size, stride, offset)
    return model.eval()


def run(model: Network, x: torch.Tensor) -> list[torch.Tensor] | None:
    """The outputs, None if the network does not take this batch size or its numbers grow out of bounds."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            found = model(x)
    except Exception:
        return None
    finally:
        torch.set_default_dtype(default)
    return found if all(t.isfinite().all() and t.abs().max() < 1e6 for t in found) else None


def smaller(plan: Plan, kind: str) -> Plan:
    """The plan with as few steps as still fail in the same way."""
    shrunk = True
    while shrunk:
        shrunk = False
        for number in reversed(range(len(plan.steps))):
            candidate = plan.without(number)
            try:
                Network(candidate)
                fails = bool(candidate.steps) and examine(candidate).fault.startswith(kind)
            except Exception:
                continue
            if fails:
                plan, shrunk = candidate, True
                break
    return plan


@dataclass
class Tally:
    """What came of all networks so far."""

    networks: int = 0
    refused: int = 0
    symmetric: int = 0
    neurons: int = 0
    continuous: int = 0
    maps: int = 0
    faults: dict[int, str] = field(default_factory=dict)
    beyond: Counter[str] = field(default_factory=Counter)

    def line(self) -> str:
        return (
            f"{self.networks:,} networks: {len(self.faults)} faults, {self.symmetric:,} with symmetries"
            f" ({self.neurons:,} neurons), {self.continuous:,} with maps ({self.maps:,} groups), {self.refused} refused"
        )


def attack(numbers: range) -> Iterator[tuple[Tally, int, Plan, Outcome]]:
    """Examine networks one after the other."""
    tally = Tally()
    for number in numbers:
        plan = draw(number)
        outcome = examine(plan)
        tally.networks += 1
        tally.refused += outcome.refused
        tally.symmetric += outcome.neurons > 0
        tally.neurons += outcome.neurons
        tally.continuous += outcome.maps > 0
        tally.maps += outcome.maps
        tally.beyond.update(reason.split(" at ")[0] for reason in outcome.beyond)
        if outcome.fault:
            tally.faults[number] = outcome.fault
        yield tally, number, plan, outcome


def main(
    networks: Annotated[int, typer.Option(help="how many networks")] = 10000,
    seed: Annotated[int, typer.Option(help="number of the first network; the others follow")] = 0,
    network: Annotated[int | None, typer.Option(help="one network by its number, told line by line")] = None,
) -> None:
    """Trace random networks and look for false symmetries and crashes; exits with 1 if there is one."""
    warnings.simplefilter("ignore")
    os.environ["REBASIN_CACHE"] = "off"
    torch.set_num_threads(1)
    console = Console(highlight=False, soft_wrap=True)
    if network is not None:
        plan = draw(network)
        console.print(describe(plan))
        outcome = examine(plan)
        console.print(outcome)
        raise typer.Exit(bool(outcome.fault))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    smallest: Plan | None = None
    tally = Tally()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("attack", total=networks)
        for tally, number, plan, outcome in attack(range(seed, seed + networks)):
            if outcome.fault:
                console.print(f"network {number}: {outcome.fault}")
                least = smaller(plan, outcome.fault.split(":")[0])
                if smallest is None or len(least.steps) < len(smallest.steps):
                    smallest = least
                    console.print(describe(least))
            progress.update(task, advance=1, description=f"{len(tally.faults)} faults")
            if not console.is_terminal and tally.networks % 100 == 0:
                left = progress.tasks[0].time_remaining or 0.0
                console.print(f"{tally.line()}; {left / 60:.0f} minutes left")
    console.print(tally.line())
    for reason, count in tally.beyond.most_common(10):
        console.print(f"  a rule failed at {reason}: {count}")
    if smallest is not None:
        console.print(f"The smallest failure:\n{describe(smallest)}\n{examine(smallest).fault}")
    raise typer.Exit(bool(tally.faults))


if __name__ == "__main__":
    typer.run(main)
