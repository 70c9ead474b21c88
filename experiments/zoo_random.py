"""Random small networks from a grammar of operators, views, sharing, norms, heads and index operations.

A network is a number: `draw(number)` draws its steps, and `Network` carries them out. Each step is an operator of
`STEPS` on earlier values; its options come from the step's own number, so a step can be left out (`Plan.without`) and
the others stay what they are. What a step can't be applied to, it refuses by raising.
"""

# The steps are written for tensors of any rank; their options are drawn.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rng = random.Random
STEPS: dict[str, tuple[Callable[..., Tensor], int, int]] = {}
"""name -> (function of the network, a generator and values; how many values; how often it is drawn)."""

INPUTS = ((2, 5), (2, 3, 4), (2, 4, 4, 4))
LARGEST = 2048


def step(values: int = 1, often: int = 2) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        STEPS[function.__name__.rstrip("_")] = function, values, often
        return function

    return register


@dataclass(frozen=True)
class Step:
    name: str
    inputs: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Plan:
    """What a network is made of: the input's shape and the steps; the last values are its outputs."""

    shape: tuple[int, ...]
    steps: tuple[Step, ...]
    outputs: int = 1

    def without(self, number: int) -> Plan:
        """Without one step: who read its value reads its first input instead."""
        gone, first = number + 1, self.steps[number].inputs[0]
        place = [first if k == gone else k - (k > gone) for k in range(len(self.steps) + 1)]
        rest = [s for k, s in enumerate(self.steps) if k != number]
        return replace(self, steps=tuple(replace(s, inputs=tuple(place[i] for i in s.inputs)) for s in rest))


class Network(nn.Module):
    """Carries out a plan. Parameters are made on the way the first time, and used under their names from then on."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan, self.made, self.making = plan, {}, True
        self.prefix, self.count = "", 0
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.steps[0].seed if plan.steps else 0)
            self.shapes = [tuple(v.shape) for v in self._values(torch.randn(plan.shape))]
        self.making = False

    def forward(self, x: Tensor) -> list[Tensor]:
        return self._values(x)[-self.plan.outputs :]

    def _values(self, x: Tensor) -> list[Tensor]:
        values = [x]
        for number, s in enumerate(self.plan.steps):
            self.prefix, self.count = f"s{number}", 0
            made = STEPS[s.name][0](self, Rng(s.seed), *(values[i] for i in s.inputs))
            if self.making and (not made.is_floating_point() or not 0 < made.numel() <= LARGEST):
                raise ValueError("of no use")
            values.append(made)
        return values

    def parameter(self, rng: Rng, *shape: int, buffer: bool = False) -> Tensor:
        """A parameter of this step; at times one that another step has, or a view of its memory."""
        name = f"{self.prefix}_{self.count}"
        self.count += 1
        own = Rng(rng.random())  # of its own: the step draws on alike, whatever becomes of the parameter
        fate = own.random()
        if self.making:
            alike = [p for p in self.parameters() if tuple(p.shape) == shape]
            turned = [p for p in self.parameters() if tuple(p.shape) == shape[::-1] and len(shape) == 2]
            longer = [p for p in self.parameters() if p.ndim == len(shape) and p.shape[0] > shape[0]]
            longer = [p for p in longer if tuple(p.shape[1:]) == shape[1:]]
            new = torch.randn(shape) * max(math.prod(shape[1:]), 1) ** -0.5 + (0.3 if len(shape) == 1 else 0)
            if buffer:
                self.register_buffer(name, new, persistent=fate < 0.7)
            elif fate < 0.1 and alike:
                self.register_parameter(name, own.choice(alike))
            elif fate < 0.2 and alike:
                self.register_parameter(name, nn.Parameter(own.choice(alike).data))
            elif fate < 0.35 and turned:
                self.register_parameter(name, nn.Parameter(own.choice(turned).data.t()))
            elif fate < 0.4 and longer:
                self.register_parameter(name, nn.Parameter(own.choice(longer).data[-shape[0] :]))
            else:
                self.register_parameter(name, nn.Parameter(new))
        return getattr(self, name)


def draw(seed: int) -> Plan:
    """The plan of network number `seed`; every step can be carried out."""
    rng = Rng(seed)
    plan = Plan(rng.choice(INPUTS), ())
    names = list(STEPS)
    weights = [STEPS[n][2] for n in names]
    length = rng.randint(3, 9)
    layers = ["linear", "linear", "conv", "mix"]
    while len(plan.steps) < length:
        last = len(plan.steps)
        name = rng.choice(layers) if not plan.steps else rng.choices(names, weights)[0]
        if last == length - 1:
            name = rng.choice(["head", "head", "linear", "mean", "readout", name])
        recent = lambda: last if rng.random() < 0.75 else rng.randint(max(0, last - 3), last)  # noqa: E731, B023
        longer = Step(name, tuple(recent() for _ in range(STEPS[name][1])), rng.randrange(1 << 30))
        candidate = replace(plan, steps=(*plan.steps, longer))
        try:
            Network(candidate)
        except Exception:
            continue
        plan = candidate
    return replace(plan, outputs=1 if rng.random() < 0.85 else 2)


def describe(plan: Plan) -> str:
    """The network in lines: values, steps and shapes."""
    shapes = Network(plan).shapes
    lines = [f"v0 = input {shapes[0]}"]
    for k, s in enumerate(plan.steps, 1):
        lines.append(f"v{k} = {s.name}({', '.join(f'v{i}' for i in s.inputs)}) [{s.seed}] -> {shapes[k]}")
    return "\n".join([*lines, f"outputs: the last {plan.outputs}"])


def dim_of(rng: Rng, x: Tensor, first: int = 1) -> int:
    """Some dimension, that of the batch left out."""
    return rng.randrange(first, x.ndim)


def dims_of(rng: Rng, x: Tensor) -> list[int]:
    return sorted(rng.sample(range(1, x.ndim), rng.randint(1, x.ndim - 1)))


# ------------------------------------------------------------------------------------------------- layers


@step(often=14)
def linear(net: Network, rng: Rng, x: Tensor) -> Tensor:
    out = rng.choice([x.shape[-1], 4, 6, 8])
    bias = net.parameter(rng, out) if rng.random() < 0.7 else None
    return F.linear(x, net.parameter(rng, out, x.shape[-1]), bias)


@step(often=3)
def product(net: Network, rng: Rng, x: Tensor) -> Tensor:
    w = net.parameter(rng, x.shape[-1], rng.choice([x.shape[-1], 4, 6]))
    if rng.random() < 0.3:
        return torch.relu(x @ w) @ w.t()
    return x @ w if x.ndim != 2 or rng.random() < 0.5 else torch.addmm(net.parameter(rng, w.shape[1]), x, w)


@step(often=4)
def mix(net: Network, rng: Rng, x: Tensor) -> Tensor:
    """A linear map over some other dimension."""
    d = dim_of(rng, x)
    w = net.parameter(rng, rng.choice([x.shape[d], 4, 6]), x.shape[d])
    return F.linear(x.transpose(d, -1), w).transpose(d, -1)


@step(often=8)
def conv(net: Network, rng: Rng, x: Tensor) -> Tensor:
    space = x.ndim - 2
    if space not in (1, 2):
        raise ValueError
    groups = rng.choice([g for g in (1, 1, 2, 3, x.shape[1]) if x.shape[1] % g == 0])
    out = groups * rng.choice([1, 2, 3])
    kernel = [rng.choice([1, 3])] * space
    if rng.random() < 0.2:
        weight = net.parameter(rng, x.shape[1], out // groups, *kernel)
        f = F.conv_transpose1d if space == 1 else F.conv_transpose2d
        return f(x, weight, net.parameter(rng, out), padding=kernel[0] // 2, groups=groups)
    weight = net.parameter(rng, out, x.shape[1] // groups, *kernel)
    f = F.conv1d if space == 1 else F.conv2d
    return f(x, weight, net.parameter(rng, out), padding=kernel[0] // 2, groups=groups)


@step(often=2)
def bilinear(net: Network, rng: Rng, x: Tensor) -> Tensor:
    return F.bilinear(
        x, torch.tanh(x), net.parameter(rng, 4, x.shape[-1], x.shape[-1]), net.parameter(rng, 4)
    )


@step(often=5)
def attention(net: Network, rng: Rng, x: Tensor) -> Tensor:
    if x.ndim != 3:
        raise ValueError
    b, t, c = x.shape
    heads, d, e = rng.choice([1, 2, 3]), rng.choice([2, 3]), rng.choice([2, 3])
    q, k = (F.linear(x, net.parameter(rng, heads * d, c)) for _ in range(2))
    v = F.linear(x, net.parameter(rng, heads * e, c))
    q, k, v = (y.view(b, -1, heads, y.shape[-1] // heads).transpose(1, 2) for y in (q, k, v))
    if rng.random() < 0.4:  # learned keys and values
        s = rng.choice([t, 4])
        k, v = (
            net.parameter(rng, heads, s, d).expand(b, -1, -1, -1),
            net.parameter(rng, heads, s, e).expand(b, -1, -1, -1),
        )
    kind = rng.randrange(4)
    if kind == 3:
        y = torch.softmax(q @ k.transpose(-1, -2) / d**0.5, -1) @ v
    else:
        mask = net.parameter(rng, *rng.choice([(t, k.shape[2]), (heads, 1, 1)])) if kind == 2 else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=kind == 1)
    return y.transpose(1, 2).reshape(b, t, heads * e)


@step(often=2)
def tokens(net: Network, rng: Rng, x: Tensor) -> Tensor:
    """Linear attention or a Gram matrix."""
    y = x.reshape(x.shape[0], -1, x.shape[-1])
    if rng.random() < 0.5:
        return (y.transpose(1, 2) @ y).softmax(rng.choice([-1, -2]))
    return y @ (y.transpose(1, 2) @ torch.tanh(y))


@step(often=2)
def lookup(net: Network, rng: Rng, x: Tensor) -> Tensor:
    """A table of rows: looked up by the class of a value, or by numbers."""
    rows = x.shape[-1] if rng.random() < 0.6 else x.shape[-1] + 2
    table = net.parameter(rng, rows, rng.choice([4, 6]))
    index = x.argmax(-1)
    kind = rng.randrange(4)
    if kind == 0:
        return F.embedding(index, table)
    if kind == 1:
        return table.index_select(0, index.reshape(-1)).reshape(*index.shape, -1)
    if kind == 2:
        return table[index]
    return torch.cat(
        [x, F.embedding(torch.arange(3, device=x.device), table).sum(0).expand(*x.shape[:-1], -1)], -1
    )


# ------------------------------------------------------------------------------------------------- pointwise


UNARY = (
    torch.relu,
    torch.tanh,
    torch.sigmoid,
    F.gelu,
    F.silu,
    torch.sin,
    torch.abs,
    torch.square,
    F.hardtanh,
    F.elu,
)


@step(often=10)
def unary(net: Network, rng: Rng, x: Tensor) -> Tensor:
    return rng.choice(UNARY)(x)


@step(2, often=10)
def binary(net: Network, rng: Rng, x: Tensor, y: Tensor) -> Tensor:
    f = rng.choice([torch.add, torch.sub, torch.mul, torch.maximum, torch.atan2])
    return f(x, torch.tanh(y) if rng.random() < 0.5 else y)


@step(often=6)
def scale(net: Network, rng: Rng, x: Tensor) -> Tensor:
    """With a parameter or a constant over some dimensions."""
    kept = dims_of(rng, x)
    shape = [n if d in kept else 1 for d, n in enumerate(x.shape)]
    while shape and shape[0] == 1 and rng.random() < 0.7:
        shape = shape[1:]
    other = net.parameter(rng, *shape, buffer=rng.random() < 0.3)
    return rng.choice([torch.add, torch.mul, torch.minimum])(x, other)


@step(2, often=3)
def ternary(net: Network, rng: Rng, x: Tensor, y: Tensor) -> Tensor:
    kind = rng.randrange(5)
    if kind == 0:
        return torch.where(x > 0, y, torch.tanh(x))
    if kind == 1:
        return torch.lerp(x, y, net.parameter(rng, x.shape[-1]))
    if kind == 2:
        return torch.addcmul(x, y, torch.sigmoid(y), value=0.5)
    if kind == 3:
        return x.masked_fill(y > 0, 0.25)
    return torch.clamp(x, y - 1, y + 1)


@step(often=2)
def dropout(net: Network, rng: Rng, x: Tensor) -> Tensor:
    if rng.random() < 0.8:
        return F.dropout(x, 0.3, training=net.training)
    return F.prelu(x, net.parameter(rng, x.shape[1]))


@step(often=3)
def gated(net: Network, rng: Rng, x: Tensor) -> Tensor:
    d = dim_of(rng, x)
    if rng.random() < 0.4:
        return F.glu(x, d)
    a, b = x.chunk(2, d)
    return a * torch.sigmoid(b)


@step(often=2)
def inplace(net: Network, rng: Rng, x: Tensor) -> Tensor:
    y, d = x.clone(), dim_of(rng, x)
    k = rng.randrange(x.shape[d])
    kind = rng.randrange(4)
    if kind == 0:
        y.select(d, k).zero_()
    elif kind == 1:
        y.narrow(d, 0, x.shape[d] - k).mul_(0.5)
    elif kind == 2:
        y.transpose(1, -1).add_(net.parameter(rng, x.shape[1]))
    else:
        y[:, k % x.shape[1]] = torch.tanh(y[:, 0])
    return y


# ------------------------------------------------------------------------------------------------- norms


@step(often=8)
def norm(net: Network, rng: Rng, x: Tensor) -> Tensor:
    kind, c = rng.randrange(8), x.shape[1]
    if kind == 0:
        return F.layer_norm(x, x.shape[-1:], net.parameter(rng, x.shape[-1]), net.parameter(rng, x.shape[-1]))
    if kind == 1:
        groups = rng.choice([g for g in (1, 2, 3, 4, c) if c % g == 0])
        return F.group_norm(x, groups, net.parameter(rng, c), net.parameter(rng, c))
    if kind == 2:
        mean, var = net.parameter(rng, c, buffer=True), net.parameter(rng, c, buffer=True).abs() + 0.5
        return F.batch_norm(x, mean, var, net.parameter(rng, c), net.parameter(rng, c))
    if kind == 3:
        return F.rms_norm(x, x.shape[-1:], net.parameter(rng, x.shape[-1]))
    if kind == 4:
        return F.instance_norm(x, weight=net.parameter(rng, c)) if x.ndim > 2 else F.normalize(x, dim=-1)
    if kind == 5:
        return x.softmax(dim_of(rng, x))
    if kind == 6:
        return F.normalize(x, dim=dim_of(rng, x), eps=0.1)
    w = net.parameter(rng, 6, x.shape[-1])
    return F.linear(x, torch._weight_norm(w, net.parameter(rng, 6, 1), 0))


@step(often=2)
def statistics(net: Network, rng: Rng, x: Tensor) -> Tensor:
    """The further results of native norms."""
    if rng.random() < 0.5:
        y, mean, scale = torch.native_layer_norm(x, x.shape[-1:], net.parameter(rng, x.shape[-1]), None, 0.1)
        return rng.choice([y * scale, y + mean, mean + 0 * y])
    w = net.parameter(rng, x.shape[1])
    y, mean, scale = torch.native_batch_norm(x, w, None, None, None, True, 0.1, 0.1)
    return y + rng.choice([mean, scale]).reshape(-1, *[1] * (x.ndim - 2))


# ------------------------------------------------------------------------------------------------- reductions


@step(often=6)
def reduce(net: Network, rng: Rng, x: Tensor) -> Tensor:
    dims, keep = dims_of(rng, x), rng.random() < 0.6
    f = rng.choice([torch.sum, torch.mean, torch.amax, torch.logsumexp, torch.std, torch.linalg.vector_norm])
    y = f(x, dim=dims, keepdim=keep)
    return y * torch.tanh(x) if keep and rng.random() < 0.7 else y


@step(often=4)
def ordered(net: Network, rng: Rng, x: Tensor) -> Tensor:
    """Operators that know positions."""
    d, kind = dim_of(rng, x), rng.randrange(10)
    if kind == 0:
        return x.cumsum(d)
    if kind == 1:
        return x.sort(d).values
    if kind == 2:
        return x.topk(min(2, x.shape[d]), d).values
    if kind == 3:
        return torch.diff(
            x, dim=d, prepend=net.parameter(rng, *x.shape[1:]).expand_as(x) if rng.random() < 0.6 else None
        )
    if kind == 4:
        return x.cummax(d).values
    if kind == 5:
        value, index = x.max(d, keepdim=True)
        return value + 0.1 * index
    if kind == 6:
        return rng.choice([torch.tril, torch.triu])(x)
    if kind == 7:
        return x.argmax(d, keepdim=True) * 0.1 + x
    if kind == 8:
        return F.one_hot(x.argmax(-1), x.shape[-1]).to(x) * x
    return x.contiguous().median(d, keepdim=True).values * x  # of expanded tensors torch's are wrong


# ------------------------------------------------------------------------------------------------- shapes


@step(often=8)
def reshape(net: Network, rng: Rng, x: Tensor) -> Tensor:
    kind, d = rng.randrange(4), dim_of(rng, x)
    if kind == 0:
        return x.flatten(1)
    if kind == 1:
        return x.flatten(min(d, x.ndim - 2) or 1)
    n = rng.choice([n for n in (2, 3, 4) if x.shape[d] % n == 0])
    if kind == 2:
        return x.unflatten(d, (n, -1))
    return x.unflatten(d, (n, -1)).transpose(d, d + 1).flatten(d, d + 1)


@step(often=6)
def permute(net: Network, rng: Rng, x: Tensor) -> Tensor:
    order = list(range(1, x.ndim))
    rng.shuffle(order)
    return x.permute(0, *order)


@step(often=5)
def cut(net: Network, rng: Rng, x: Tensor) -> Tensor:
    d, kind = dim_of(rng, x), rng.randrange(6)
    n = x.shape[d]
    if kind == 0:
        return x.narrow(d, rng.randrange(n), 1)
    if kind == 1:
        return x.select(d, rng.randrange(n))
    if kind == 2:
        return x.narrow(d, 0, max(n // 2, 1))
    if kind == 3:
        return x.movedim(d, 0)[:: rng.choice([1, 2])].movedim(0, d)
    if kind == 4:
        return torch.stack([torch.tanh(p) if k % 2 else p for k, p in enumerate(x.unbind(d))], d)
    parts = list(x.split(max(n // rng.choice([2, 3]), 1), d))
    rng.shuffle(parts)
    return torch.cat([torch.tanh(p) if k == 0 else p for k, p in enumerate(parts)], d)


@step(2, often=5)
def join(net: Network, rng: Rng, x: Tensor, y: Tensor) -> Tensor:
    d, kind = dim_of(rng, x), rng.randrange(5)
    if kind == 0:
        return torch.stack([x, torch.tanh(y)], d)
    if kind == 1:
        size = [2 if k == d else n for k, n in enumerate(x.shape)]
        return torch.cat([x.new_zeros(size), x, x.new_full(size, 0.5)][rng.randrange(2) :], d)
    return torch.cat([x, y], d) if kind < 4 else torch.cat([y, x[:, :2], x], d)


@step(often=3)
def pad(net: Network, rng: Rng, x: Tensor) -> Tensor:
    d, kind = dim_of(rng, x), rng.randrange(4)
    amounts = [0, 0] * (x.ndim - 1 - d) + [rng.choice([0, 1, 2]), rng.choice([1, 2])]
    if kind == 3 and x.ndim == 3:
        return F.pad(x, (1, 1), mode=rng.choice(["reflect", "replicate", "circular"]))
    return F.pad(x, amounts, value=rng.choice([0.0, 0.7]))


@step(often=4)
def turn(net: Network, rng: Rng, x: Tensor) -> Tensor:
    d, kind = dim_of(rng, x), rng.randrange(6)
    if kind == 0:
        return x.flip(d)
    if kind == 1:
        return x.roll(rng.choice([1, 2]), d)
    if kind == 2:
        return x.repeat(*[2 if k == d else 1 for k in range(x.ndim)])
    if kind == 3:
        return x.repeat_interleave(2, d)
    if kind == 4:
        return x.unsqueeze(d).expand(*x.shape[:d], 2, *x.shape[d:])
    return x + torch.tanh(x.flip(d))


@step(often=3)
def diagonal(net: Network, rng: Rng, x: Tensor) -> Tensor:
    kind, c = rng.randrange(5), x.shape[-1]
    if kind == 0:
        return torch.einsum("cc,...c->...c", net.parameter(rng, c, c), x)
    if kind == 1:
        y = torch.einsum("...i,...j->...ij", x, torch.tanh(x))
        return torch.einsum("...ii->...i", y)
    if kind == 2:
        return torch.diagonal(x.unsqueeze(-1) * net.parameter(rng, c, c), 0, -2, -1)
    if kind == 3:
        return torch.diag_embed(x)
    return torch.einsum("...i,oi,i->...o", x, net.parameter(rng, 4, c), net.parameter(rng, c))


@step(often=4)
def look(net: Network, rng: Rng, x: Tensor) -> Tensor:
    """Read by index."""
    d, kind = dim_of(rng, x), rng.randrange(8)
    n = x.shape[d]
    numbers = torch.tensor([rng.randrange(n) for _ in range(rng.choice([n, 2]))], device=x.device)
    if kind == 0:
        return x.index_select(d, numbers)
    if kind == 1:
        return x.movedim(d, 0)[numbers].movedim(0, d)
    if kind == 2:
        return torch.gather(x, d, x.argsort(d))
    if kind == 3:
        return torch.gather(x, d, x.argsort(d).narrow(1, 0, max(x.shape[1] // 2, 1)))
    if kind == 4:
        return torch.take_along_dim(x, x.argmax(d, keepdim=True), d)
    if kind == 5:
        return torch.gather(x, d, (net.parameter(rng, *x.shape) > 0).long() % n)
    if kind == 6:
        return x.unfold(d, min(2, n), 1)
    return x[:, (net.parameter(rng, x.shape[1]) > 0).long()]


@step(often=3)
def write(net: Network, rng: Rng, x: Tensor) -> Tensor:
    """Written by index."""
    d, kind = dim_of(rng, x), rng.randrange(6)
    n = x.shape[d]
    numbers = torch.tensor([rng.randrange(n) for _ in range(2)], device=x.device)
    part = torch.tanh(x.index_select(d, numbers))
    if kind == 0:
        return x.index_add(d, numbers, part)
    if kind == 1:
        return x.scatter(d, x.argmax(d, keepdim=True), 0.5)
    if kind == 2:
        return torch.select_scatter(x, torch.tanh(x.select(d, 0)), d, n - 1)
    if kind == 3:
        return torch.slice_scatter(x, torch.tanh(x.narrow(d, 0, 1)), d, n - 1, n)
    if kind == 4:
        return x.index_copy(d, numbers[:1], part.narrow(d, 0, 1))
    return x.scatter_add(d, x.argsort(d), x)


@step(often=3)
def spatial(net: Network, rng: Rng, x: Tensor) -> Tensor:
    kind = rng.randrange(7)
    if kind == 0:
        return F.avg_pool1d(x, 2) if x.ndim == 3 else F.avg_pool2d(x, 2)
    if kind == 1:
        return F.max_pool1d(x, 2) if x.ndim == 3 else F.max_pool2d(x, 2)
    if kind == 2:
        return F.adaptive_avg_pool1d(x, 2) if x.ndim == 3 else F.adaptive_avg_pool2d(x, 1)
    if kind == 3:
        return F.interpolate(x, scale_factor=2, mode="nearest")
    if kind == 4:
        return F.pixel_shuffle(x, 2)
    if kind == 5:
        return F.pixel_unshuffle(x, 2)
    return F.channel_shuffle(x, 2)


@step(often=2)
def complex_(net: Network, rng: Rng, x: Tensor) -> Tensor:
    if x.shape[-1] % 2:
        return torch.fft.rfft(x, dim=-1).abs()
    y = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    angle = net.parameter(rng, y.shape[-1])
    return torch.view_as_real(y * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


@step(2, often=4)
def pair(net: Network, rng: Rng, x: Tensor, y: Tensor) -> Tensor:
    """Products of two values."""
    kind = rng.randrange(5)
    if kind == 0:
        return x @ y.transpose(-1, -2)
    if kind == 1:
        return torch.einsum("b...i,b...j->b...ij", x, y)
    if kind == 2:
        return torch.einsum("b...i,b...i->b...", x, y).unsqueeze(-1)
    if kind == 3:
        return F.cosine_similarity(x, y, dim=dim_of(rng, x), eps=0.1).unsqueeze(-1)
    return torch.baddbmm(x, y, torch.tanh(y.transpose(1, 2)) @ x)


# ------------------------------------------------------------------------------------------------- last steps


@step(often=1)
def head(net: Network, rng: Rng, x: Tensor) -> Tensor:
    y = x.flatten(1)
    return F.linear(y, net.parameter(rng, 3, y.shape[1]), net.parameter(rng, 3))


@step(often=1)
def mean(net: Network, rng: Rng, x: Tensor) -> Tensor:
    return torch.stack(
        [x.flatten(1).mean(1), x.flatten(1).square().mean(1), torch.sin(x).flatten(1).sum(1)], 1
    )


@step(often=1)
def readout(net: Network, rng: Rng, x: Tensor) -> Tensor:
    return F.linear(x, net.parameter(rng, 2, x.shape[-1])).flatten(1)
