"""What `experiments.check_gpu` runs: one function a part, on whatever device it is given.

Each makes its own models from seeds, takes sizes that a GPU is for (`tiny`: that a test has time for), returns figures,
and raises `Wrong` where a result is not what it must be. On a CPU the same functions run; there is no other way
through them.
"""

from __future__ import annotations

import copy
import io
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import rebasin
from rebasin.data.classification import Dataset, load
from rebasin.matching.activations.matching import activation_matching
from rebasin.matching.maps.learned import learned_matching
from rebasin.matching.straight_through.estimator import straight_through
from rebasin.matching.weights.estimate import where_quicker
from rebasin.matching.weights.matching import weight_matching
from rebasin.models import build
from rebasin.models.train import Recipe, guessing, train
from rebasin.objectives import CrossEntropy, Denoising
from rebasin.spec import Permutation, PermutationSpec
from rebasin.tensors.modules import OnDevice, loaded
from rebasin.types import ProgressEvent

Figures = dict[str, Any]

CPU = torch.device("cpu")

ALIKE = 5e-3
"""How far, relatively, a device in its usual precision (TF32 convolutions on CUDA) may be from the CPU."""


class Wrong(Exception):
    """A result is not what it must be; a sentence."""


@dataclass(frozen=True)
class Setting:
    """Where parts compute and how large: `data` is CIFAR-10 as `data.path` takes it, `folder` for what a run leaves."""

    device: torch.device
    tiny: bool
    folder: Path
    data: Path | None = None
    say: Callable[[str], None] = lambda text: None

    def of(self, tiny: Any, full: Any) -> Any:
        return tiny if self.tiny else full


@dataclass(frozen=True)
class Part:
    """A row of the table: a function, the seconds that it may take on an H100, and the packages that it imports.

    One that is `asked` for runs only where it is named: it is no check but an experiment that is worth a GPU.
    """

    name: str
    title: str
    run: Callable[[Setting], Figures]
    seconds: float
    needs: tuple[str, ...] = ()
    asked: bool = False


def require(right: bool, sentence: str) -> None:
    if not right:
        raise Wrong(sentence)


def alike(what: str, there: float, here: float, allowed: float = ALIKE) -> None:
    """Whether two figures of the same thing, from the device and from the CPU, agree."""
    error = abs(there - here) / max(abs(here), 1e-12)
    require(error <= allowed, f"{what} is {there:.6g} on the device, but {here:.6g} on the CPU.")


def right_share(found: Permutation, planted: Permutation) -> float:
    """The share of neurons that `found` brings back to where they were before `planted`."""
    return 1.0 - found.compose(planted).moved() / max(1, found.spec.neurons)


@contextmanager
def timed(figures: Figures, name: str, device: torch.device) -> Iterator[None]:
    """Seconds of the block, what the device has still to do included."""
    began = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    figures[f"seconds {name}"] = round(time.perf_counter() - began, 3)


# Correctness: small models, the device beside the CPU ---------------------------------------------------------


def mlp(width: int, seed: int, inputs: int = 64, depth: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    return build("mlp", width=width, depth=depth, inputs=inputs, classes=10).eval()


def labelled(n: int, size: int, shape: Sequence[int], seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """`n` batches of noise with labels."""
    random = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, *shape, generator=random), torch.randint(10, (size,), generator=random))
        for _ in range(n)
    ]


def tiny_problem(seed: int = 0) -> tuple[nn.Module, Denoising, tuple[Tensor, Tensor, Tensor]]:
    """An embedded UNet, its objective, and an example call."""
    from rebasin.models import tiny_sd  # late: diffusers may be missing

    unet: Any = tiny_sd.load_unet(tiny_sd.UNETS[0])
    problem = Denoising("epsilon", tiny_sd.load_scheduler().alphas_cumprod)
    random = torch.Generator().manual_seed(seed)
    condition = torch.randn(2, 16, unet.config.cross_attention_dim, generator=random)
    return (
        unet.eval(),
        problem,
        (torch.randn(2, 4, 8, 8, generator=random), torch.tensor([7, 500]), condition),
    )


def proofs(given: Setting) -> Figures:
    """Trace and verify: symmetries are proved on the device as exactly as on the CPU (no TF32)."""
    torch.manual_seed(0)
    unet, _, inputs = tiny_problem()
    models: Mapping[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
        "mlp": (mlp(32, 0), (torch.randn(2, 64),)),
        "resnet": (
            build("resnet", width=0.5, channels=3, classes=10, blocks=given.of(1, 3)).eval(),
            (torch.randn(2, 3, given.of(8, 32), given.of(8, 32)),),
        ),
        **given.of({}, {"unet": (unet, inputs)}),  # `embedded` proves it, too
    }
    figures: Figures = {}
    for name, (model, example) in models.items():
        example = tuple(t.to(given.device) for t in example)
        model = model.to(given.device)
        spec = rebasin.trace(model, *example)
        report = rebasin.verify(model, spec, *example).require()
        figures[f"largest relative error, {name}"] = report.max_relative_error
    return figures


def weights(given: Setting) -> Figures:
    """Weight matching: what was planted is found on both, and independent networks are brought equally near."""
    width = given.of(64, 3072)
    a, b = mlp(width, 0), mlp(width, 1)
    spec = rebasin.trace(a, torch.ones(1, 64))
    planted = spec.random(2)
    a, b = a.state_dict(), b.state_dict()
    figures: Figures = {"neurons": spec.neurons, "where": str(where_quicker(spec, given.device))}
    objectives: dict[str, float] = {}
    for place, device in (("device", given.device), ("CPU", CPU)):
        with timed(figures, f"planted, {place}", device):
            found = weight_matching(spec, a, planted.apply(a), device=device)
        require(
            found.permutation.compose(planted).is_identity, f"What was planted is not found on the {place}."
        )
        with timed(figures, f"independent, {place}", device):
            objectives[place] = weight_matching(spec, a, b, device=device, max_sweeps=2).objective
    alike("The objective of two independent networks", objectives["device"], objectives["CPU"], 1e-3)
    return figures


def activations(given: Setting) -> Figures:
    """Activation matching: the same statistics, and so the same objective, on both."""
    a, b = mlp(given.of(32, 512), 0), mlp(given.of(32, 512), 1)
    batches = labelled(4, given.of(64, 1024), (64,))
    spec = rebasin.trace(a, torch.ones(1, 64))
    figures: Figures = {}
    found = {}
    for place, device in (("device", given.device), ("CPU", CPU)):
        with timed(figures, place, device):
            found[place] = activation_matching(spec, a, b, batches, device=device)
    alike("The sum of correlations", found["device"].objective, found["CPU"].objective)
    apart = found["device"].permutation.invert().compose(found["CPU"].permutation).moved()
    return {**figures, "correlation": found["device"].objective / spec.neurons, "neurons that differ": apart}


def step(given: Setting) -> Figures:
    """The straight-through estimator: two steps with their projections."""
    a, b = mlp(given.of(32, 256), 0), mlp(given.of(32, 256), 1)
    batches = labelled(3, 128, (64,))
    spec = rebasin.trace(a, torch.ones(1, 64))
    figures: Figures = {}
    found = {}
    for place, device in (("device", given.device), ("CPU", CPU)):
        models = copy.deepcopy(a).to(device), copy.deepcopy(b).to(device)
        with timed(figures, place, device):
            found[place] = straight_through(
                spec, *models, CrossEntropy(), batches[:2], heldout=batches[2:], init="identity", steps=2, refine=0,
                evaluate_every=1, device=device,
            )  # fmt: skip
    there, here = found["device"], found["CPU"]
    for end, its in zip(there.endpoints, here.endpoints, strict=True):
        alike("An endpoint's loss", end, its)
    alike(
        "The loss of the start, with that of the ends", there.start_objective + 10, here.start_objective + 10
    )
    alike("The lowest loss, with that of the ends", there.objective + 10, here.objective + 10)
    return {**figures, "lowest loss": there.objective, "on the CPU": here.objective}


def evaluation(given: Setting) -> Figures:
    """The loss along the line from A to B, of two ResNet20 of random weights."""
    nets = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        nets.append(
            build("resnet", width=given.of(0.5, 4), channels=3, classes=10, blocks=given.of(1, 3)).eval()
        )
    batches, objective = labelled(2, given.of(16, 500), (3, 32, 32)), CrossEntropy()
    figures: Figures = {}
    losses = {}
    for place, device in (("device", given.device), ("CPU", CPU)):
        model = copy.deepcopy(nets[0]).to(device)
        states = [{k: t.to(device) for k, t in net.state_dict().items()} for net in nets]
        own = OnDevice(batches, device)
        with timed(figures, place, device):
            losses[place] = rebasin.barrier(
                model, states[0], states[1], lambda m, own=own: objective.evaluate(m, own), points=3
            ).losses
    for there, here in zip(losses["device"], losses["CPU"], strict=True):
        alike("A loss on the line", there, here)
    return {**figures, "losses": losses["device"]}


def sampling(given: Setting) -> Figures:
    """Pictures: the latents that an embedded UNet makes of the same noise."""
    from rebasin.objectives.sampling import sample

    unet, problem, (noise, _, condition) = tiny_problem()
    steps = given.of(2, 10)
    figures: Figures = {}
    made = {}
    for place, device in (("device", given.device), ("CPU", CPU)):
        model, own = (
            copy.deepcopy(unet).to(device),
            [t.to(device) for t in (noise, condition, condition[:1] * 0)],
        )
        with timed(figures, place, device), torch.no_grad():
            made[place] = sample(model, problem, *own, steps=steps, guidance=3.0).cpu()
    error = float((made["device"] - made["CPU"]).norm() / made["CPU"].norm())
    require(error < 10 * ALIKE, f"The latents of the device are {error:.2g} relative from those of the CPU.")
    return {**figures, "relative error": error}


# Full size, by shape ------------------------------------------------------------------------------------------


def random_weights(shapes: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Matrices ~ N(0, 1 / fan-in), vectors N(0, 0.01), made on the device."""
    torch.manual_seed(0)
    made = {}
    for name, shape in shapes.items():
        scale = 0.1 if len(shape) < 2 else shape.numel() ** -0.5 * shape[0] ** 0.5
        made[name] = torch.randn(shape, device=device, dtype=dtype) * scale
    return made


LEVELS = ("block_out_channels", "down_block_types", "attention_head_dim", "transformer_layers_per_block")
"""What SDXL's configuration has once for each level, from the outermost on; "up_block_types" from the innermost."""


def sdxl(given: Setting) -> Figures:
    """SDXL's UNet of random weights in half precision: a near pair, and the same under a planted permutation."""
    from rebasin.checkpoints.architectures import build as build_component
    from rebasin.checkpoints.reduced_width import reduced_configs

    figures: Figures = {}
    config = reduced_configs("sdxl", given.of(20, None), depth=given.of(1, None))["unet"]
    if given.tiny:  # its first and last two levels, each block once
        config |= {name: config[name][:2] for name in LEVELS} | {"layers_per_block": 1}
        config["up_block_types"] = config["up_block_types"][-2:]
    model, args, kwargs = build_component("unet", config)
    with timed(figures, "tracing", CPU):
        spec = rebasin.trace(model, *args, **kwargs)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    a = random_weights(shapes, given.device, given.of(torch.float32, torch.float16))
    b = {
        name: (t + 0.1 * t.float().std() * torch.randn(t.shape, device=t.device, dtype=t.dtype)).to(t.dtype)
        for name, t in a.items()
    }
    figures |= {"neurons": spec.neurons, "where": str(where_quicker(spec, given.device))}
    given.say("near pair")
    with timed(figures, "near", given.device):
        near = weight_matching(spec, a, b, device=given.device)
    planted = spec.random(2)
    b = planted.apply(b)
    given.say("planted pair")
    with timed(figures, "planted", given.device):
        found = weight_matching(spec, a, b, device=given.device)
    figures |= {
        "stay in the near pair": right_share(near.permutation, spec.identity()),
        "planted and found": right_share(found.permutation, planted),
        "sweeps": found.sweeps,
    }
    for what in ("stay in the near pair", "planted and found"):
        require(
            figures[what] == 1, f"{what.capitalize()} {100 * figures[what]:.2f} % of the neurons, not all."
        )
    return figures


SHALLOW: Mapping[str, Any] = dict(
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    block_out_channels=(32,),
)
"""SD 1.5's blocks with attention, each once."""


def sd15(
    given: Setting, figures: Figures
) -> tuple[PermutationSpec, Callable[[int], nn.Module], Callable[..., Any]]:
    """SD 1.5's spec, its UNets of random weights in bfloat16, and latents and text states of any number."""
    from experiments.benchmark_ste_memory import unet

    channels, size, tokens, width = given.of(32, 320), given.of(8, 64), given.of(5, 77), given.of(32, 768)
    dtype = given.of(torch.float32, torch.bfloat16)  # which few CPUs compute with quickly
    narrower = given.of({**SHALLOW, "cross_attention_dim": width}, {})
    meta = unet(0, channels, torch.float32, "meta", **narrower)
    example = (
        torch.empty(1, 4, size, size, device="meta"),
        torch.empty(1, dtype=torch.long, device="meta"),
        torch.empty(1, tokens, width, device="meta"),
    )
    with timed(figures, "tracing", CPU):
        spec = rebasin.trace(meta, *example)
    figures["neurons"] = spec.neurons

    def model(seed: int) -> nn.Module:
        return unet(seed, channels, dtype, str(given.device), **narrower)

    def inputs(n: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(n)
        latents = torch.randn(n, 4, size, size, generator=random)
        return latents.to(dtype), torch.randn(n, tokens, width, generator=random).to(dtype)

    return spec, model, inputs


def ste(given: Setting) -> Figures:
    """The straight-through estimator at SD 1.5's size: bfloat16, checkpointing, Adam, batches of 4 at 64 x 64."""
    from rebasin.objectives.denoising import problems

    figures: Figures = {}
    spec, model, inputs = sd15(given, figures)
    steps, batch = given.of(1, 8), given.of(1, 4)
    objective = Denoising("epsilon", torch.linspace(0.9999, 0.005, 1000))
    batches = problems(objective, *inputs(2 * batch), batch_size=batch)
    events: list[ProgressEvent] = []

    def told(event: ProgressEvent) -> None:
        events.append(event)
        given.say(f"step {event['step']}")

    with timed(figures, "search", given.device):
        found = straight_through(
            spec, model(0), model(1), objective, batches[:1], heldout=batches[1:], init="identity", steps=steps,
            device=given.device, lr=1e-3, schedule="cosine", refine=0, project_every=2, projection_sweeps=1,
            evaluate_every=steps, checkpointing=True, progress=told,
        )  # fmt: skip
    require(len(found.history) == steps + 1, f"It made {len(found.history) - 1} steps of {steps}.")
    made = found.history[1:]
    projections = [one.seconds_projection for one in made if one.seconds_projection > 0] or [0.0]
    return {
        **figures,
        "seconds a gradient step": round(statistics.median(one.seconds_gradient for one in made), 3),
        "seconds a projection": round(statistics.median(projections), 3),
        "moved": found.moved,
    }


def learned(given: Setting) -> Figures:
    """Learned maps at SD 1.5's size: checkpointing, from the identity, 8 steps with batches of 4; on the CPU 2 of 1."""
    from rebasin.objectives.denoising import problems

    figures: Figures = {}
    spec, model, inputs = sd15(given, figures)
    few = given.device == CPU
    steps, batch = given.of(1, 2 if few else 8), given.of(1, 1 if few else 4)
    objective = Denoising("epsilon", torch.linspace(0.9999, 0.005, 1000))
    batches = problems(objective, *inputs(2 * batch), batch_size=batch)
    with timed(figures, "learning", given.device):
        found = learned_matching(
            spec, model(0), model(1), objective, batches[:1], heldout=batches[1:], init="identity", steps=steps,
            device=given.device, evaluate_every=steps, checkpointing=True,
            progress=lambda event: given.say(f"step {event['step']}"),
        )  # fmt: skip
    require(found.objective <= found.start_objective, "The result is worse than the start.")
    made = [one.seconds for one in found.history[1:]]
    maps = {"maps": len(found.turned), "free dimensions": sum(g.dimension for g in spec.continuous)}
    return {**figures, "seconds a step": round(statistics.median(made), 3), **maps}


def wide_activations(given: Setting) -> Figures:
    """Activation matching at SD 1.5's size, of a UNet and itself under a planted permutation."""
    figures: Figures = {}
    spec, model, inputs = sd15(given, figures)
    planted = spec.random(2)
    a = model(0)
    b = loaded(a, planted.apply(a.state_dict()))
    count = given.of(1, 4)
    latents, texts = inputs(given.of(4, 8) * count)
    times = torch.linspace(10, 990, len(latents)).long()
    batches = list(zip(latents.chunk(count), times.chunk(count), texts.chunk(count), strict=True))
    with timed(figures, "matching", given.device):
        found = activation_matching(spec, a, b, batches, device=given.device)
    right = right_share(found.permutation, planted)
    figures |= {"batches": found.batches, "planted and found": right}
    figures["GB of statistics"] = round(found.statistics_bytes / 1e9, 3)
    require(
        found.objective > found.initial_objective, "The sum of correlations is not above that of the start."
    )
    return figures


# Whole jobs ---------------------------------------------------------------------------------------------------


def job(folder: Path, options: Sequence[str]) -> Any:
    """The results of `python -m rebasin.run` with these options, in this process and without its output."""
    from hydra import compose, initialize_config_dir
    from rich.console import Console as RichConsole

    from rebasin.files import config_dir
    from rebasin.integrations import signatures  # noqa: F401 - the configurations read signatures
    from rebasin.jobs.run import run
    from rebasin.reporting.console import Console

    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("config", overrides=[*options])
    return run(cfg, folder, Console(RichConsole(file=io.StringIO())))


def embedded(given: Setting) -> Figures:
    """`python -m rebasin.run algo=ste` on the embedded pair of tiny Stable Diffusion UNets."""
    few = [
        "algo.init=identity", "algo.steps=1", "algo.projection_sweeps=1", "algo.refine=0", "data.train=10",
        "data.heldout=10", "evaluate.points=3", "model.samples=1", "model.steps=1",
    ]  # fmt: skip
    options = [
        "algo=ste",
        "logger=none",
        "tensors=false",
        f"device={given.device}",
        f"threads={torch.get_num_threads()}",
    ]
    options += given.of(few, ["algo.steps=40", "algo.refine=2"])
    figures: Figures = {}
    with timed(figures, "run", given.device):
        results = job(given.folder / "embedded", options)
    curves = results["curves"]["heldout"]
    stages = {f"seconds {name}": round(seconds, 2) for name, seconds in results["seconds"].items()}
    return {**figures, **{f"barrier, {name}": curve["barrier"] for name, curve in curves.items()}, **stages}


def synthetic(n: int) -> Dataset:
    """Ten kinds of coloured patterns in noise, of CIFAR's shape: what a network learns in an epoch or two."""
    random = torch.Generator().manual_seed(0)
    patterns = nn.functional.interpolate(torch.randn(10, 3, 4, 4, generator=random), size=32, mode="bilinear")

    def part(count: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(10, (count,), generator=random)
        return patterns[y] + torch.randn(count, 3, 32, 32, generator=random), y

    return Dataset("synthetic", *part(n), *part(max(100, n // 5)), tuple("0123456789"))


def training(given: Setting) -> Figures:
    """Two short trainings of a ResNet20 on images of CIFAR's shape, aligned by their weights, and the line between."""
    data = synthetic(given.of(100, 10_000)) if given.data is None else load("cifar10", given.data)
    if given.tiny:
        data = replace(data, train_x=data.train_x[:100], train_y=data.train_y[:100])
        data = replace(data, test_x=data.test_x[:20], test_y=data.test_y[:20])
    recipe = Recipe(
        epochs=given.of(3, 8), batch_size=given.of(20, 250), learning_rate=3e-3, schedule="cosine", warmup_epochs=1,
        clip=1.0,
    )  # fmt: skip
    x, y = data.train_x.to(given.device), data.train_y.to(given.device)
    figures: Figures = {"data": data.name}
    nets = []
    for number, seed in enumerate((0, 1), 1):
        torch.manual_seed(seed)
        net = build("resnet", width=given.of(0.5, 4), channels=3, classes=10, blocks=given.of(1, 3)).to(
            given.device
        )

        def told(event: ProgressEvent, number: int = number) -> None:
            given.say(f"training {number}, epoch {event['step']}, loss {event['loss']:.3f}")

        with timed(
            figures, f"training {number}", given.device
        ):  # the second from CUDA graphs, where there is CUDA
            history = train(net, x, y, replace(recipe, graphs=number == 2), seed, told)
        figures[f"losses of epochs {number}"] = [round(loss, 4) for loss in history]
        require(
            history[-1] < min(history[0], guessing(y)),
            f"Training {number} did not learn: its loss is {history[-1]:.3f}.",
        )
        nets.append(net)
    objective, batches = CrossEntropy(), OnDevice(data.batches("test", 500), given.device)
    spec = rebasin.trace(nets[0], x[:2])
    a, b = (net.state_dict() for net in nets)
    found = weight_matching(spec, a, b, device=given.device)
    for name, other in (("naive", b), ("aligned", found.permutation.apply(b))):
        curve = rebasin.barrier(
            nets[0], a, other, lambda m: objective.evaluate(m, batches), points=given.of(3, 11)
        )
        figures[f"line, {name}"] = [round(loss, 4) for loss in curve.losses]
        figures["accuracy of A"] = curve.metrics["accuracy"][0]
    return figures


def width(given: Setting) -> Figures:
    """`+experiment=width_resnet20 size=short` at the paper's widths, a run each: the barrier, naive and aligned.

    The trainings are kept in the cache, so that the same command goes on after a kill.
    """
    from rebasin.reporting.experiments import declaration, recipe

    path = given.data
    if path is None:
        path = given.folder / "cifar10.npz"
        data, arrays = synthetic(given.of(100, 10_000)), {}
        for split, x, y in (("train", data.train_x, data.train_y), ("test", data.test_x, data.test_y)):
            pixels = (128 + 40 * x).clamp(0, 255).byte().movedim(1, -1)
            arrays |= {f"x_{split}": pixels.numpy(), f"y_{split}": y.numpy()}
        np.savez(path, allow_pickle=False, **arrays)
    declared = [o for o in recipe(declaration("width_resnet20"), "short") if not o.startswith("model.width=")]
    epochs = given.of(1, 20)
    own = [
        "+experiment=width_resnet20", *declared, "size=short", f"data.path={path}", f"model.recipe.epochs={epochs}",
        f"device={given.device}", f"threads={torch.get_num_threads()}",
        *given.of(["model.blocks=1", "evaluate.points=3"], ["evaluate.points=11", "data.batch_size=1000"]),
    ]  # fmt: skip
    figures: Figures = {"epochs": epochs}
    for number in given.of((0.5,), (1, 2, 4, 8, 16, 32)):
        for algo in ("activation_matching", "weight_matching")[given.of(1, 0) :]:
            given.say(f"width {number}, {algo}")
            with timed(figures, f"width {number}, {algo}", given.device):
                found = job(
                    given.folder / f"{number}-{algo}", [*own, f"model.width={number}", f"algo={algo}"]
                )
            curves = found["curves"]["heldout"]
            for name in ("naive", "aligned") if algo == "weight_matching" else ("aligned",):
                told = name if name == "naive" else algo
                figures[f"width {number}, {told}: losses"] = [round(x, 4) for x in curves[name]["losses"]]
                figures[f"width {number}, {told}: barrier"] = curves[name]["barrier"]
        figures[f"width {number}: accuracy of A"] = curves["aligned"]["metrics"]["accuracy"][0]
    return figures


DIFFUSERS = ("diffusers", "transformers", "accelerate")

PARTS: Sequence[Part] = (
    Part("verify", "Trace and verify", proofs, 10, DIFFUSERS),
    Part("weights", "Weight matching", weights, 30),
    Part("activations", "Activation matching", activations, 5),
    Part("step", "STE steps", step, 5),
    Part("evaluation", "The line from A to B", evaluation, 10),
    Part("sampling", "Sampling", sampling, 5, DIFFUSERS),
    Part("sdxl", "SDXL's UNet, near and planted", sdxl, 90, DIFFUSERS),
    Part("ste", "STE at SD 1.5's size", ste, 50, DIFFUSERS),
    Part("learned", "Learned maps at SD 1.5's size", learned, 60, DIFFUSERS),
    Part("wide", "Activation matching at SD 1.5's size", wide_activations, 45, DIFFUSERS),
    Part(
        "embedded",
        "`algo=ste`, the embedded pair",
        embedded,
        90,
        (*DIFFUSERS, "hydra", "sklearn", "matplotlib"),
    ),
    Part("training", "Training, two ResNet20", training, 60),
    Part(
        "width",
        "ResNet20 on CIFAR-10, barrier against width",
        width,
        3600,
        ("hydra", "sklearn", "matplotlib"),
        asked=True,
    ),
)
