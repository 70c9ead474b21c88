"""A plain supervised training loop for the paper's classifiers."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import Count, Momentum, NonNegative, NonNegativeInt, Positive, typed
from ..errors import ConfigError
from ..types import Progress, State, tell
from .augment import AUGMENTATIONS

Optimizer = Literal["adam", "sgd"]
Schedule = Literal["constant", "cosine"]


@typed
@dataclass(frozen=True)
class Recipe:
    """How to train. The defaults suit the MLP on scikit-learn's digits (seconds at width 128 on one core).

    `weight_decay` is L2 added to the gradient of every parameter, biases and norms included, as in Git
    Re-Basin. `schedule` "cosine" falls to 0 over all steps, after `warmup_epochs` of linear rise (a fraction
    is fine). `augment` changes the images of every batch anew; "none", "affine" or "crop" (see augment.py).
    """

    epochs: NonNegativeInt = 60
    batch_size: Count = 64
    optimizer: Optimizer = "adam"
    learning_rate: Positive = 1e-3
    momentum: Momentum = 0.9
    weight_decay: NonNegative = 0.0
    schedule: Schedule = "constant"
    warmup_epochs: NonNegative = 0.0
    augment: str = "none"
    clip: NonNegative = 0.0  # of the gradient's norm; 0: it stays as it is
    graphs: bool = False  # on CUDA: forward and backward passes as CUDA graphs (see `graphed`)
    bfloat16: bool = False  # on the CPU, too: passes in bfloat16, channels last

    def __post_init__(self) -> None:
        if self.augment not in ("none", *AUGMENTATIONS):
            raise ConfigError(
                f"Unknown augmentation '{self.augment}': choose none, {', '.join(AUGMENTATIONS)}."
            )


# Short trainings for small images, seconds each on the digits; the paper's recipes for CIFAR are longer and
# use SGD.
RECIPES = {
    "mlp": Recipe(),
    "vgg": Recipe(epochs=30, learning_rate=3e-3, schedule="cosine", warmup_epochs=2),
    "resnet": Recipe(epochs=20, learning_rate=3e-3, schedule="cosine", warmup_epochs=1),
}


@dataclass(frozen=True)
class Standing:
    """Where a training stands after an epoch: with it `train` ends as if it had never stopped.

    Attributes:
        history: the mean loss of each epoch that is done.
        tensors: of the model, of the optimizer, and the states of the two random generators, by name, on the CPU.
    """

    history: tuple[float, ...]
    tensors: State


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    recipe: Recipe,
    seed: int = 0,
    progress: Progress | None = None,
    after: Callable[[int, Callable[[], Standing]], None] | None = None,
    standing: Standing | None = None,
) -> tuple[float, ...]:
    """Train `model` in place and return each epoch's mean loss.

    Images `x` (n, ...) and labels `y` (n,) are on the model's device. `seed` fixes the order of the samples;
    together with the start weights it fixes the result to the bit (on one CPU with one number of threads).
    Leaves the model in eval mode. A last batch of a single sample is left out, BatchNorm having nothing to
    average there. On CUDA, and where the recipe asks for it, it computes in bfloat16, with channels last.
    `progress` gets, after each epoch, stage, step, total, loss, seconds; `after` is called with the number of each
    epoch that is done, 0 before the first, and with what tells where the training stands then. Given as `standing`,
    the training goes on from there.

    Raises:
        ConfigError: the loss is no longer a finite number; or after five epochs or more it is that of guessing, or
            above, and did not fall through the later half, or the network knows its own training images no better
            than by always naming the most frequent class: such a network is no endpoint.
    """
    started = time.perf_counter()
    order = torch.Generator().manual_seed(seed)
    sizes = [len(part) for part in torch.arange(len(y)).split(recipe.batch_size)]
    steps_per_epoch = len(sizes) - (len(sizes) > 1 and sizes[-1] == 1)
    optimizer = _optimizer(model, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _factor(recipe, steps_per_epoch))
    change = AUGMENTATIONS.get(recipe.augment)
    # Of its own, so that the order of the samples does not depend on the augmentation.
    random = torch.Generator().manual_seed(seed + 1_000_003)
    history: list[float] = []
    cuda = x.device.type == "cuda"
    graphs, short = cuda and recipe.graphs, cuda or recipe.bfloat16
    if short and x.dim() == 4:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        x = x.contiguous(memory_format=torch.channels_last)
    model.train()
    forward = graphed(model, x[: recipe.batch_size]) if graphs and len(y) else model
    after = after or (lambda done, stand: None)
    if standing is None:
        after(0, lambda: _stand(model, optimizer, (order, random), history))
    else:
        history += standing.history
        _go_on(standing, model, optimizer, schedule, (order, random), len(history) * steps_per_epoch)
    for epoch in range(len(history) + 1, recipe.epochs + 1):
        total, seen = torch.zeros((), dtype=torch.float64, device=y.device), 0
        shuffled = torch.randperm(len(y), generator=order).to(y.device)
        for batch in shuffled.split(recipe.batch_size)[:steps_per_epoch]:
            optimizer.zero_grad(set_to_none=True)
            images = x[batch] if change is None else change(x[batch], random)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=short, cache_enabled=not graphs):
                logits = forward(images)
            loss = F.cross_entropy(logits.float(), y[batch])
            loss.backward()
            if recipe.clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(batch)
            seen += len(batch)
        history.append(float(total) / seen)
        if not math.isfinite(history[-1]):
            raise ConfigError(
                f"Training diverged in epoch {epoch} (loss {history[-1]}): lower the learning rate."
            )
        after(epoch, lambda: _stand(model, optimizer, (order, random), history))
        seconds = time.perf_counter() - started
        tell(progress, "train", epoch, recipe.epochs, loss=history[-1], seconds=seconds)
    late = history[len(history) // 2 :]
    long = len(history) >= 5 or len(history) * len(y) >= 1000 * recipe.batch_size
    if long and late[-1] > guessing(y) - 1e-3 and late[-1] > late[0] - 1e-3:
        raise ConfigError(
            f"Training stayed where guessing is: after {recipe.epochs} epochs the loss is {history[-1]:.3f}; lower the"
            " learning rate, or clip the gradient (model.recipe.clip=1)."
        )
    model.eval()
    if graphs:
        model.__dict__.pop("forward", None)
    if short:
        model.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    if long and len(y) >= 500:  # of fewer, shares say little
        right, most = _known(model, x, y)
        if right <= most:
            raise ConfigError(
                f"Training taught nothing: after {recipe.epochs} epochs the network recognises {right:.1%} of its"
                f" training images, and always naming the most frequent class is right for {most:.1%}; lower the"
                " learning rate, or clip the gradient (model.recipe.clip=1)."
            )
    return tuple(history)


def graphed(model: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    """The model's forward and backward pass on batches of this shape as CUDA graphs, each launched at once instead of
    kernel by kernel, which small networks spend most of their time on; batches of other shapes go the usual way.

    torch puts the graphs in the place of the model's `forward`, until that is removed. Trying the passes out must not
    count: running statistics are put back.

    Raises:
        ConfigError: CUDA can't capture the passes.
    """
    plain = model.forward
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with torch.autocast(images.device.type, torch.bfloat16, cache_enabled=False):
            torch.cuda.make_graphed_callables(model, (images.clone(),))  # each batch is written to this copy
    except RuntimeError as error:
        reason = next(iter(str(error).splitlines()), "").rstrip(".")
        raise ConfigError(
            f"model.recipe.graphs is true, but CUDA can't capture the network's passes ({reason[:200]}): leave it out."
        ) from error
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
    return lambda batch: model(batch) if batch.shape == images.shape else plain(batch)


def guessing(y: Tensor) -> float:
    """The cross entropy of always answering with the shares of the labels y [n]."""
    shares = torch.unique(y, return_counts=True)[1].double() / len(y)
    return float(-(shares * shares.log()).sum())


def _known(model: nn.Module, x: Tensor, y: Tensor, samples: int = 2000) -> tuple[float, float]:
    """The accuracy on the first samples, and that of always naming the most frequent of their labels."""
    x, y = x[:samples], y[:samples]
    with torch.no_grad():
        right = sum(
            float((model(some).argmax(1) == own).sum())
            for some, own in zip(x.split(500), y.split(500), strict=True)
        )
    return right / len(y), float(torch.bincount(y).max()) / len(y)


def _stand(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    generators: Sequence[torch.Generator],
    history: Sequence[float],
) -> Standing:
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{number}/{name}": value for name, value in values.items()}
    tensors |= {f"random/{k}": generator.get_state() for k, generator in enumerate(generators)}
    return Standing(
        tuple(history),
        {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()},
    )


def _go_on(
    standing: Standing,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    generators: Sequence[torch.Generator],
    steps: int,
) -> None:
    """Put everything where it stood after so many steps."""
    model.load_state_dict({name: standing.tensors[f"model/{name}"] for name in model.state_dict()})
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in standing.tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "optimizer":
            number, _, name = rest.partition("/")
            state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    for k, generator in enumerate(generators):
        generator.set_state(standing.tensors[f"random/{k}"])
    schedule.last_epoch = steps
    for group, base, factor in zip(
        optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = base * factor(steps)


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=rate, weight_decay=decay)
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=recipe.momentum, weight_decay=decay)


def _factor(recipe: Recipe, steps_per_epoch: int) -> Callable[[int], float]:
    warm = round(recipe.warmup_epochs * steps_per_epoch)
    rest = max(1, recipe.epochs * steps_per_epoch - warm)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        if recipe.schedule == "constant":
            return 1.0
        return (1 + math.cos(math.pi * min(1.0, (step - warm) / rest))) / 2

    return factor
