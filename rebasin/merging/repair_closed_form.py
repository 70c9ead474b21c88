"""REPAIR in closed form: rescale a merge's neurons by what its members' activations say, without running the merge.

Jordan et al. 2022 (see `rebasin.merging.repair`) give the approximate variant for two networks without norms. A layer
of the merge is taken to answer with the mean of its members' answers, y = sum_j w_j y_j (exact for the first layer,
whose members have the same input). Then, for each neuron, with s_j the standard deviation of y_j and r_ij the
correlation of y_i with y_j over the data,

    mean y = sum_j w_j mean y_j                 var y = sum_ij w_i w_j s_i s_j r_ij = Var(sum_j w_j y_j)

The mean is the goal already, so the layer is scaled about it by a = (sum_j w_j s_j) / sqrt(var y):  weight -> a weight,
bias -> a bias + (1 - a) mean y. All that is measured are moments of the members, in one pass over the data.

Added here, as the authors have networks without norms and two members:

- Any number of members and any weights. Instead of all correlations the variance of the mean answer is measured, which
  is the same number. (The authors take the correlations after the ReLU, from the matching; here both are of the
  layer's output.)
- A LayerNorm or GroupNorm is not linear: it undoes the loss of variance itself. Its answer is taken to be that of the
  merged norm to the mean of its members' inputs.
- BatchNorm: `running_var` becomes (c sum_j w_j sqrt(v_j))^2, with v_j the members' own running variances, and c the
  standard deviation of sum_j w_j x_j over sum_j w_j std(x_j), of its inputs x. That is the reset of statistics in
  closed form. Layers whose output goes into a BatchNorm are not scaled: it takes their scale away.

What is neglected: y = sum_j w_j y_j leaves out that averaged weights see averaged inputs, and the error grows from
layer to layer. The authors' VGG11 has 84.3 % by it and 84.9 % by REPAIR, where the merge has 66 %.
Our additions for norms are guesses of the same kind, and poor ones in ResNets: see docs/merge_many.md. Where the merge
can be run, `repair` is better.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import fsum
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..arguments import typed
from ..errors import DataError
from ..spec import PermutationSpec
from ..tensors.modules import Forward, call_model, computing, eval_mode, give_weights, hooked, to_device
from ..types import State
from .methods.linear import average
from .neuron_moments import (
    NO_SAMPLES,
    NeuronMoments,
    Repaired,
    Rescaling,
    batch_norms,
    by_neuron,
    hidden_sites,
    member_weights,
    ratio,
    replaced,
    working_copy,
)

NORMS = (nn.LayerNorm, nn.GroupNorm, _BatchNorm)


@typed
def repair_closed_form(
    spec: PermutationSpec,
    model: nn.Module,
    merged: State,
    members: Sequence[State],
    batches: Iterable[Any],
    *,
    weights: Sequence[float] | None = None,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
) -> Repaired:
    """Rescale a merge's hidden neurons by the moments of its members alone; equal members leave it as it is.

    One pass over the data for each member, where `repair` needs one more for each layer. Members are loaded one after
    the other for each batch. Nothing is changed in place.

    Args:
        spec, model, merged, members, weights, forward, device: see `repair`.
        batches: of training data; gone through once.

    Raises:
        DataError: there are no batches, or an activation is not finite.
        ConfigError: the weights do not fit, or there are no members.
    """
    began = perf_counter()
    raw = member_weights(members, weights)
    work, where = working_copy(model, merged, device)
    known, left_out = hidden_sites(spec, work)
    norms = batch_norms(work)
    watched = _Watched(work, {n: size for n, size in known.items() if n not in norms}, norms.keys())
    member, _ = working_copy(model, merged, where)
    modules = {name: member.get_submodule(name) for name in (*watched.sites, *watched.norms)}
    seen = False
    with hooked(modules, watched.see), torch.no_grad(), eval_mode(member):
        for batch in batches:
            seen = True
            for number, state in enumerate(members):
                give_weights(member, state, "a member")
                watched.begin(number, raw[number] / fsum(raw[: number + 1]))
                with computing(batch):
                    (forward or call_model)(member, to_device(batch, where))
            watched.end_batch()
    if not seen:
        raise DataError(NO_SAMPLES)
    rescaling = Rescaling(work)
    for name in watched.order:
        moments, goal = watched.mixed[name].result(name), watched.goals(name, raw)
        if name in norms:
            variance = f"{name}.running_var"
            rescaling.tensors[variance] = _variance(members, variance, raw, ratio(moments[1], goal[1]))
        elif name not in watched.absorbed:
            rescaling.apply(name, moments, goal)
    left = tuple(left_out) + tuple(n for n in known if n not in rescaling.scales and n not in norms)
    return Repaired(
        replaced(merged, rescaling.tensors), rescaling.scales, left, bool(norms), perf_counter() - began
    )


class _Watched:
    """What hooks see of the members at the modules that matter: moments of each, and of the mean of all.

    `order`: the modules as they run. `mixed`: moments of the answer that the merge is taken to give (for a BatchNorm of
    its input). `absorbed`: layers whose output goes into a BatchNorm.
    """

    def __init__(self, merged: nn.Module, sites: dict[str, int], norms: Iterable[str]) -> None:
        self.merged = dict(merged.named_modules())
        self.sites = sites
        self.norms = set(norms)
        self.order: list[str] = []
        self.own: dict[tuple[str, int], NeuronMoments] = {}
        self.mixed: dict[str, NeuronMoments] = {}
        self.absorbed: set[str] = set()
        self.member = 0
        self._share = 1.0  # of this member in the mean of those so far
        self._calls: dict[str, int] = {}
        self._mean: dict[tuple[str, int], Tensor] = {}
        self._answers: list[tuple[str, Tensor]] = []

    def begin(self, member: int, share: float) -> None:
        self.member, self._share, self._calls, self._answers = member, share, {}, []

    def see(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """A forward hook: a member's answer at the module `name`."""
        if name not in self.order:
            self.order.append(name)
        size = self.sites.get(name) or int(output.shape[1])
        inside = name in self.norms
        rows = by_neuron(module, args, output, size, args[0] if inside else None)
        self.own.setdefault((name, self.member), NeuronMoments()).add(rows)
        if inside:
            self.absorbed |= {other for other, answer in self._answers if answer is args[0]}
        else:
            self._answers.append((name, output))
        seen = args[0] if inside or isinstance(module, NORMS) else output
        call = name, self._calls.get(name, 0)
        self._calls[name] = call[1] + 1
        # A copy, because what follows may work in place. The mean of those so far moves by a share of the
        # difference, so that equal ones have themselves as mean, to the bit.
        old = self._mean.get(call)
        self._mean[call] = seen.clone() if old is None else old + (seen - old) * self._share

    def end_batch(self) -> None:
        """All members saw the batch: take in what the merge is taken to answer."""
        for (name, _), mean in self._mean.items():
            module = self.merged[name]
            answer = module(mean) if isinstance(module, NORMS) else mean
            size = self.sites.get(name) or int(mean.shape[1])
            of = mean if name in self.norms else None
            rows = by_neuron(module, (mean,), answer, size, of)
            self.mixed.setdefault(name, NeuronMoments()).add(rows)
        self._mean = {}

    def goals(self, name: str, raw: Sequence[float]) -> tuple[Tensor, Tensor]:
        """The weighted mean of the members' mean and standard deviation."""
        means, stds = zip(*(self.own[name, member].result(name) for member in range(len(raw))), strict=True)
        return average(means, raw), average(stds, raw)


def _variance(members: Sequence[State], name: str, raw: Sequence[float], ratio: Tensor) -> Tensor:
    """(ratio * sum_j w_j sqrt(v_j))^2, as a multiple of the first member's, so that equal members keep theirs."""
    variances = [state[name].to(ratio) for state in members]
    std, root = average([v.sqrt() for v in variances], raw), variances[0].sqrt()
    alive = root > 0
    return torch.where(
        alive, variances[0] * (ratio * std / torch.where(alive, root, 1.0)).square(), (ratio * std).square()
    )
