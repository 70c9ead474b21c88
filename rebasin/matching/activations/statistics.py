"""One pass over the data with two models side by side: the moments of their neurons, wherever these can be seen."""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from time import perf_counter
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...arguments import NonNegativeInt, Seed, typed
from ...errors import ConfigError, DataError, SpecMismatchError
from ...objectives import LossFunction, Objective, checked
from ...spec import Group, Leaf, Node, PermutationSpec
from ...tensors.memory import duplicate
from ...tensors.modules import Forward, call_model, computing, device_of, find_device, head, hooked, to_device
from ...tensors.moments import Moments, Statistic
from ...tracing.export import evaluation_mode
from ...types import Progress, brief, tell
from ..assignment.blocks import leaves
from ..resume_state import ResumeState, digest_of
from .hook_sites import HookSite, find_hook_sites, sample_rows, tensor_at

Precision = Literal["float32", "float64"]
Reads = Literal["inputs", "outputs", "both"]
Sites = Literal["all", "last"] | Sequence[str] | None
Key = tuple[str, str, int]  # module, where, dimension: one tensor, on which several cells may be

TOKENS = 16
"""Positions of each sample that every function looks at by default."""
LARGE = 2 << 30
"""Statistics that would take more bytes than this in float64 are kept in float32."""


@brief
@dataclass(frozen=True, eq=False)
class ActivationStatistics:
    """The moments of every cell's neurons at each of its hook sites; any of the statistics can be had from them.

    hook_sites and moments correspond; `seconds` is the wall time, forward passes included.
    """

    spec: PermutationSpec
    hook_sites: tuple[HookSite, ...]
    moments: tuple[Moments, ...]
    batches: int
    seconds: float

    @cached_property
    def unseen(self) -> tuple[Group, ...]:
        """The groups of whose arrangement nothing is seen, or not all: some choice has no cell with a hook site."""
        seen = {site.cell for site in self.hook_sites}
        return tuple(group for group in self.spec if _undecided(group, group.tree, seen))

    @property
    def bytes(self) -> int:
        return sum(m.bytes for m in self.moments)

    def costs(self, cell: str, statistic: Statistic) -> Tensor:
        """[size, size] float64 on the CPU: rows are A's neurons, columns B's; the mean over the cell's hook sites.

        Zeros for a cell that no site shows: others of its group decide.
        """
        seen, size = self._of(cell), self.spec.cells[cell].size
        total = torch.zeros(size, size, dtype=torch.float64)
        for moments in seen:
            total += moments.statistic(statistic).cpu()
        return total.div_(max(1, len(seen)))

    def largest(self, cell: str, statistic: Statistic) -> float:
        """What no permutation of the cell can exceed, by Cauchy and Schwarz."""
        shares = [moments.largest(statistic) for moments in self._of(cell)]
        return sum(shares) / max(1, len(shares))

    def _of(self, cell: str) -> list[Moments]:
        return [m for site, m in zip(self.hook_sites, self.moments, strict=True) if site.cell == cell]

    def places(self) -> dict[str, tuple[str, ...]]:
        """Group name -> the hook sites at which its neurons were seen."""
        found: dict[str, list[str]] = {}
        group_of = {cell.name: group.name for group in self.spec for cell in group.cells}
        for site in self.hook_sites:
            found.setdefault(group_of[site.cell], []).append(site.name)
        return {group: tuple(dict.fromkeys(names)) for group, names in found.items()}


@brief
@dataclass(frozen=True, eq=False)
class ActivationState(ResumeState):
    """Where a pass stands after some batches; given to `resume_from`, it ends as if it had not been interrupted.

    The tensors are those that the pass goes on to change: save the state before the callback that got it returns.
    """

    called: ClassVar[str] = "pass over the activations"

    batches: int
    seen: tuple[tuple[Key, int], ...]
    moments: tuple[Moments, ...]
    seconds: float = 0.0


@typed
def activation_statistics(
    spec: PermutationSpec,
    model_a: nn.Module,
    model_b: nn.Module,
    batches: Iterable[Any],
    *,
    objective: Objective | LossFunction | None = None,
    forward: Forward | None = None,
    reads: Reads = "inputs",
    sites: Sites = None,
    tokens: NonNegativeInt | None = TOKENS,
    seed: Seed = 0,
    precision: Precision | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    checkpoint: Callable[[ActivationState], None] | None = None,
    resume_from: ActivationState | None = None,
) -> ActivationStatistics:
    """Run A and B on the same batches and note how their neurons go together; see `activation_matching`.

    Raises:
        SpecMismatchError: a model is not of the architecture of `spec`, or the two compute differently.
        DataError: there are no batches, or one gives NaN or infinite activations.
        ConfigError: an option, a module name, or the state to continue from, does not fit.
    """
    began = perf_counter() - (resume_from.seconds if resume_from is not None else 0.0)
    tokens = tokens or None
    for model, what in ((model_a, "A"), (model_b, "B")):
        spec.check(model.state_dict(), what)
    if device is not None:
        model_a, model_b = _moved(model_a, device), _moved(model_b, device)
    call = forward or (call_model if objective is None else checked(objective, "loss").loss)
    stream = iter(batches)
    first = list(islice(stream, 1))
    if not first:
        raise DataError("There is nothing to match activations on: the batches are empty; give at least one.")

    with computing(first[0]):
        few = to_device(head(first[0]), device_of(model_a))
        found = find_hook_sites(spec, model_a, lambda model: call(model, few))
    hook_sites = choose(spec, found, reads, sites)
    cells = [spec.cells[site.cell].size for site in hook_sites]
    dtype = torch.float64 if 8 * sum(n * n for n in cells) <= LARGE else torch.float32
    dtype = getattr(torch, precision) if precision else dtype
    here = device_of(model_a)
    options: dict[str, str] = {}
    if checkpoint is not None or resume_from is not None:  # what a continued pass must have in common with it
        models = [
            [float(p.detach().sum(dtype=torch.float64)) for p in m.parameters()] for m in (model_a, model_b)
        ]
        options = {
            "architecture": spec.hash,
            "weights": digest_of(models),
            "sites": digest_of([[*_key(site), site.cell] for site in hook_sites]),
            "tokens": str(tokens),
            "seed": str(seed),
            "precision": str(dtype).removeprefix("torch."),
        }
    done, seen = 0, {_key(site): 0 for site in hook_sites}
    if resume_from is None:
        moments = tuple(Moments.zeros(n, dtype, here) for n in cells)
    else:
        resume_from.require(options)
        done, seen = resume_from.batches, dict(resume_from.seen)
        moments = tuple(
            Moments(m.count, **{name: t.to(here, copy=True) for name, t in m.tensors().items()})
            for m in resume_from.moments
        )
    pair = _SideBySide(hook_sites, moments, seen, tokens, seed)
    total = len(batches) if hasattr(batches, "__len__") else None  # type: ignore[arg-type]

    def report() -> None:
        size = sum(m.bytes for m in moments)
        tell(progress, "activations", done, total, bytes=size, seconds=perf_counter() - began)

    report()
    with torch.no_grad(), evaluation_mode(model_a), evaluation_mode(model_b):
        for batch in islice(chain(first, stream), done, None):
            done += 1
            for side, model in enumerate((model_a, model_b)):
                with pair.watching(model, side), computing(batch):
                    call(model, to_device(batch, device_of(model)))
            pair.check(done)
            if checkpoint is not None:
                seconds = perf_counter() - began
                checkpoint(ActivationState(options, done, tuple(pair.seen[0].items()), moments, seconds))
            report()
    if moments and not any(m.count for m in moments):
        raise DataError("The batches have no samples to match activations on: their tensors are empty.")
    return ActivationStatistics(spec, hook_sites, moments, done, perf_counter() - began)


def choose(
    spec: PermutationSpec, hook_sites: Sequence[HookSite], reads: Reads, sites: Sites
) -> tuple[HookSite, ...]:
    """The hook_sites of each cell that are to be used; `reads` and `sites` as `activation_matching` has them.

    Raises:
        ConfigError: `sites` names a module that shows no neurons.
    """
    named = None if sites is None or isinstance(sites, str) else set(sites)
    modules = {site.module for site in hook_sites}
    for name in sorted((named or set()) - modules):
        close = difflib.get_close_matches(name, modules, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ConfigError(f"The module {name!r} of the sites shows no neurons that can move{hint}")
    order = {id(site): number for number, site in enumerate(hook_sites)}
    chosen: list[HookSite] = []
    for cell in spec.cells:
        own = [site for site in hook_sites if site.cell == cell]
        if named is not None:
            own = [site for site in own if site.module in named] or own
        if reads != "both":
            own = [site for site in own if (site.where == "input") == (reads == "inputs")] or own
        once = {site.content: site for site in reversed(own)}.values()
        own = sorted(once, key=lambda site: order[id(site)])
        if sites == "last" and own:
            own = [site for site in own if (site.module, site.where) == (own[-1].module, own[-1].where)]
        chosen += own
    return tuple(chosen)


class _SideBySide:
    """Takes A's activations of a batch, and then, with B's at hand, adds both to the moments."""

    def __init__(
        self,
        hook_sites: Sequence[HookSite],
        moments: Sequence[Moments],
        seen: dict[Key, int],
        tokens: int | None,
        seed: int,
    ) -> None:
        self.keys: dict[str, list[Key]] = {}
        self.members: dict[Key, list[tuple[HookSite, Moments]]] = {}
        for site, own in zip(hook_sites, moments, strict=True):
            key = _key(site)
            if key not in self.members:
                self.keys.setdefault(site.module, []).append(key)
            self.members.setdefault(key, []).append((site, own))
        self.seen = (seen, dict(seen))  # samples of A and of B, for each tensor
        self.tokens, self.seed = tokens, seed
        self.waiting: dict[Key, deque[Tensor]] = {key: deque() for key in self.members}

    def watching(self, model: nn.Module, side: int) -> AbstractContextManager[None]:
        modules = {name: model.get_submodule(name) for name in self.keys}

        def hook(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            for key in self.keys[name]:
                tensor = tensor_at(module, self.members[key][0][0].where, args, kwargs, output)
                seen = self.seen[side]
                if tensor is None:
                    continue
                rows, samples = sample_rows(tensor, key[2], self.tokens, self.seed, seen[key])
                seen[key] += samples
                if side:
                    self._meet(key, rows)
                else:  # a copy: what follows may change the tensor in place
                    shared = rows.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
                    self.waiting[key].append(rows.clone() if shared else rows)

        return hooked(modules, hook)

    def _meet(self, key: Key, y: Tensor) -> None:
        waiting = self.waiting[key]
        if not waiting or waiting[0].shape != y.shape:
            raise _different(key)
        x = waiting.popleft()
        y = y.to(x.device)
        for site, moments in self.members[key]:
            moments.add(site.columns(x), site.columns(y))

    def check(self, batch: int) -> None:
        """After both forward passes: everything was finite, and nothing is left over.

        Raises:
            DataError: the first module with NaN or infinite values, side and batch.
        """
        left = next((key for key, waiting in self.waiting.items() if waiting), None)
        if left is not None:
            raise _different(left)
        for side, name in (("A", "mean_a"), ("B", "mean_b")):
            means = [(key, getattr(own, name)) for key, group in self.members.items() for _, own in group]
            if means and not bool(torch.cat([mean for _, mean in means]).isfinite().all()):
                module, where, _ = next(key for key, mean in means if not mean.isfinite().all())
                raise DataError(
                    f"Batch {batch} gives NaN or infinite values at the {where} of {module!r} in {side}: leave the"
                    f" batch out, or run the models in float32 if they are in half precision."
                )


def _different(key: Key) -> SpecMismatchError:
    return SpecMismatchError(
        f"A and B do not compute alike: the {key[1]} of {key[0]!r} differs in shape or in number of calls, so they are"
        f" not of one architecture."
    )


def _undecided(group: Group, node: Node, seen: Collection[str]) -> bool:
    """Whether something below `node` can be arranged in several ways that no cell that was seen tells apart."""
    if isinstance(node, Leaf):
        return len(node.neurons) > 1 and group.cells[node.cell].name not in seen
    cells = {group.cells[leaf.cell].name for leaf in leaves(node)}
    if node.moves != "fixed" and len(node.children) > 1 and not cells & set(seen):
        return True
    return any(_undecided(group, child, seen) for child in node.children)


def _key(site: HookSite) -> Key:
    return site.module, site.where, site.dim


def _moved(model: nn.Module, device: torch.device | str) -> nn.Module:
    """The model itself if it is there already, else a copy that is."""
    where = find_device(device)
    return model if device_of(model) == where else duplicate(model).to(where)
