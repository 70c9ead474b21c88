"""One walk over the exported graph: every tensor gets its label, every operator its rule."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..tensors.memory import Sharing, View
from .constraints import Constraints, Gain
from .export import Exported, operator_name, source_line
from .labels import Label, combine, pin, take
from .rules import RULES, Call, Traced, apply, labels_of
from .rules.elementwise import tagged


def walk(exported: Exported, state: Mapping[str, Tensor], shared: Sharing) -> Constraints:
    """Record what the graph requires of the neurons of `state`; those that share memory are the same neurons."""
    constraints = Constraints()
    known: dict[str, Traced] = {}

    def tensor(name: str) -> Traced:
        name = shared.aliases.get(name, name)
        if name not in known:
            known[name] = _state(constraints, name, state[name])
        return known[name]

    inputs: list[Any] = []
    for node in exported.module.graph.nodes:
        if node.op != "placeholder":
            continue
        fake = node.meta.get("val")
        if node.name in exported.states and isinstance(fake, Tensor):
            inputs.append(tensor(exported.states[node.name]))
        elif isinstance(fake, Tensor):
            inputs.append(_constant(fake, exported.constants.get(node.name)))
        else:
            inputs.append(fake)
    for view in shared.views:
        constraints.reason = f"shared memory of {view.name}"
        part = _part(constraints, tensor(view.base).label, view)
        combine(constraints, [part, tensor(view.name).label])
    for name, other in shared.clashes.items():
        constraints.reason = f"shared memory of {name}"
        pin(constraints, tensor(name).label, f"overlaps with {other}")
    outputs = list(_interpret(constraints, exported.module, inputs))
    constraints.reason = "output"
    final = outputs[len(exported.writes) :]
    for name, traced in zip(exported.outputs, final, strict=True):
        pin(constraints, traced.label, f"is the model's output {name.removeprefix('output.')}")
    for target, traced in zip(exported.writes, outputs, strict=False):
        if target is None:
            pin(constraints, traced.label, "is written into a tensor that is in no state")
        else:  # the next call reads it
            combine(constraints, [tensor(target).label, traced.label])
    return constraints


def _part(constraints: Constraints, label: Label, view: View) -> Label:
    """The label of a base's part, with the dimensions of the view."""
    for d, (start, step, count) in enumerate(view.cuts):
        if count < label.shape[d]:
            label = take(constraints, label, d, start + step * np.arange(count), 0)
    kept = [d for d in view.dims if d is not None]
    label = label.drop([d for d in range(label.ndim) if d not in kept])
    label = label.permute([sorted(kept).index(k) for k in kept])
    return label.expand_rank([d for d, k in enumerate(view.dims) if k is None])


def _state(constraints: Constraints, name: str, fake: Tensor) -> Traced:
    """A parameter or buffer: each of its axes is a factor of its own."""
    shape = tuple(fake.shape)
    if not fake.is_floating_point():
        return _plain(fake)
    factors = []
    for axis, size in enumerate(shape):
        if size > 1:
            elements = constraints.axis(name, axis, size)
            factors.append(elements.reshape([size if d == axis else 1 for d in range(len(shape))]))
    gain = Gain(name) if len(factors) == len(shape) == 1 else None
    return Traced(Label(shape, tuple(factors), gain), shape, fake.dtype)


def _constant(fake: Tensor, value: Tensor | None) -> Traced:
    """An input (no value) or constant; a dimension along which a constant does not vary is uniform."""
    shape = tuple(fake.shape)
    if value is None or value.is_meta or value.numel() > 1 << 24:
        return _plain(fake)
    extent = tuple(
        1 if n > 1 and bool((value == value.narrow(d, 0, 1)).all()) else n for d, n in enumerate(shape)
    )
    return Traced(Label(extent), shape, fake.dtype, value)


def _interpret(constraints: Constraints, module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    values: dict[torch.fx.Node, Any] = {}
    feed = iter(inputs)
    last_use = _last_uses(module.graph)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(feed)
        elif node.op == "get_attr":
            target = _attribute(module, str(node.target))
            values[node] = _constant(target, target) if isinstance(target, Tensor) else target
        elif node.op == "call_function":
            args = torch.fx.map_arg(node.args, lambda n: values[n])
            kwargs = torch.fx.map_arg(node.kwargs, lambda n: values[n])
            values[node] = _call(constraints, node, list(args), dict(kwargs))
        elif node.op == "output":
            return torch.fx.map_arg(node.args[0], lambda n: values[n])
        for dead in last_use.get(node, ()):
            values.pop(dead, None)
    raise AssertionError("a graph without output")


def _last_uses(graph: torch.fx.Graph) -> dict[torch.fx.Node, list[torch.fx.Node]]:
    seen: set[torch.fx.Node] = set()
    uses: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    for node in reversed(list(graph.nodes)):
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                uses.setdefault(node, []).append(source)
    return uses


def _attribute(module: torch.nn.Module, path: str) -> Any:
    target: Any = module
    for part in path.split("."):
        target = getattr(target, part)
    return target


def _call(constraints: Constraints, node: torch.fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if node.target is operator.getitem:
        return args[0][args[1]]
    out = node.meta.get("val")
    submodule = next((i for i, a in enumerate(args) if isinstance(a, torch.fx.GraphModule)), None)
    # Autocast, set_grad_enabled: a region of code.
    if submodule is not None and "wrap_with" in str(node.target):
        return _interpret(constraints, args[submodule], args[submodule + 1 :])
    if not isinstance(
        node.target, torch._ops.OpOverload
    ):  # arithmetic on plain numbers, or a higher-order operator
        rule, arguments, name = None, [], str(node.target)
        named: dict[str, Any] = {"args": args, "kwargs": list(kwargs.values())}
    else:
        name, arguments = operator_name(node.target), node.target._schema.arguments
        named = {argument.name: kwargs.get(argument.name, argument.default_value) for argument in arguments}
        named |= {argument.name: value for argument, value in zip(arguments, args, strict=False)}
        rule = RULES.get(name) or tagged(node.target)
    constraints.reason = f"{name} at {source_line(node)}"
    if not any(isinstance(o, Tensor) for o in (out if isinstance(out, list | tuple) else [out])):
        if out is not None and not name.startswith("sym_"):  # a number that was read out of a tensor
            for traced in labels_of(list(named.values())):
                pin(constraints, traced.label, "becomes a number")
        return out
    return _traced(apply(rule, Call(constraints, name, named, out), arguments, _read(node)), out)


def _read(node: torch.fx.Node) -> set[int]:
    """Which results of an operator something reads; all of them if that can't be told."""
    results = {u: u.args[1] if u.target is operator.getitem else 1 for u in node.users}
    return {k for u, k in results.items() if isinstance(k, int) and (u.users or k < 0)}


def _traced(labels: list[Label], out: Any) -> Any:
    made = [
        Traced(label.map_factors(label.factors), tuple(o.shape), o.dtype) if isinstance(o, Tensor) else o
        for label, o in zip(labels, out if isinstance(out, list | tuple) else [out], strict=True)
    ]
    return made if isinstance(out, list | tuple) else made[0]


def _plain(fake: Tensor) -> Traced:
    """A tensor without neurons."""
    return Traced(Label(tuple(fake.shape)), tuple(fake.shape), fake.dtype)
