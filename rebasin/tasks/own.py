"""A network of a user's own: its class, its files or its training, its data and its loss, each by its path."""

from __future__ import annotations

import hashlib
import inspect
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn
from torch.utils import _pytree as pytree

from ..checkpoints.weights import require_weights, weights_for
from ..data import classification, own
from ..errors import ConfigError, DataError, RebasinError, TraceError, first_line
from ..files import cache_folder
from ..integrations.functions import located
from ..integrations.hydra import function_of, resolved
from ..models.cache import Place, digest, on_cpu
from ..objectives import Objective, checked
from ..tensors.modules import computing, find_device, head, to_device
from ..types import Progress, State, arguments_of, supply
from .base import Part, Task, require
from .classifier import seeds_of

VERSION = 1
"""Raise it when what is kept of a training changes."""

MISSING = "???"


def load(cfg: DictConfig) -> Task:
    """Two files or two trainings of the network `model.network`, on `data`, by `objective` (configs/model/own.yaml).

    Raises:
        ConfigError: a path leads nowhere, options do not fit, or a function of the user's own fails.
        DataError: the data do not fit, or the network can't compute them.
        CheckpointError: a file is not of this network.
    """
    require(cfg, "data", "own", "labelled images")
    require(cfg, "objective", "own", "classification")
    model, device = resolved(cfg.model), find_device(cfg.device)
    network = _made(model, "network", "options")
    files = _files(model)
    averages = [told for file in files if (told := require_weights(network, file)) is not None]
    seeds = () if files else seeds_of(model["seeds"], cfg.seed)
    train = None if model["train"] is None else function_of(model, "model.train", "model=own")
    if not files and train is None:
        raise ConfigError(
            "There are no weights: give two files, model.a=A.safetensors model.b=B.safetensors, or a function that"
            " trains the network, model.train=package.module:function."
        )
    objective = _objective(cfg)
    batches, remark, name = _data(cfg)

    def start(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return _made(model, "network", "options")

    def endpoints(progress: Progress | None) -> tuple[State, ...]:
        if files:
            return tuple(weights_for(network, file) for file in files)
        assert train is not None
        options = _options(model, "train", "train_options")
        what = {"network": [model["network"], model["options"]], "train": [model["train"], options]}
        return tuple(
            _trained(
                start(seed), train, options, batches["train"], seed, device, what, cfg.path.cache, progress
            )
            for seed in seeds
        )

    network = network.eval().to(device)
    few = to_device(head(batches["heldout"][0]), device)
    args, kwargs = _example(network, objective, few)
    _try(network, objective, few)
    return Task(
        parts={cfg.model.name: Part(network, args, kwargs)},
        aligned=cfg.model.name,
        labels=tuple(Path(f).stem for f in files) if files else tuple(f"seed {seed}" for seed in seeds),
        endpoints=endpoints,
        objective=objective,
        batches=batches,
        remarks=(*averages, *([remark] if remark else [])),
        data=name,
    )


def _files(model: Mapping[str, Any]) -> tuple[str, ...]:
    """The files of the endpoints, none if they are to be trained."""
    pair = [model["a"], model["b"]]
    if model["files"] is not None:
        found = model["files"]
        if pair != [None, None]:
            raise ConfigError("model.files and model.a or model.b are given; leave one of both out.")
        if not isinstance(found, list) or len(found) < 2:
            raise ConfigError(
                f"model.files is {found}, but it takes two files or more, model.files=[a.pt,b.pt]."
            )
    elif pair == [None, None]:
        return ()
    elif None in pair:
        have, lack = ("model.b", "model.a") if model["a"] is None else ("model.a", "model.b")
        raise ConfigError(f"{have} is given, but {lack} is not; give both, or neither and model.train.")
    else:
        found = pair
    # A config of the user's own brings the options of the training that it names, and model.train=null takes away.
    configured = model["name"] != "own" and not model["train"]
    for option in ("train", "seeds", *(() if configured else ("train_options",))):
        if model[option]:
            raise ConfigError(f"model.{option} has no effect where files are given; leave it, or them, out.")
    return tuple(map(str, found))


def _options(config: Mapping[str, Any], field: str, options: str, group: str = "model") -> dict[str, Any]:
    """The options of a function of the user's own; what has no default must be set."""
    given = dict(config.get(options) or {})
    for name, value in given.items():
        if value == MISSING:
            raise ConfigError(
                f"{config[field]} has no default for {name!r}; give {group}.{options}.{name}=VALUE."
            )
    return given


def _made(config: Mapping[str, Any], field: str, options: str) -> nn.Module:
    """The network, made with its options.

    Raises:
        ConfigError: it can't be made, or is no network.
    """
    if config[field] is None:
        raise ConfigError(
            "model=own needs a network: give model.network=package.module:name, a class or a function."
        )
    function = function_of(config, f"model.{field}", "model=own")
    given = _options(config, field, options)
    told = f"model.{field}={config[field]}"
    try:
        made = function(**given)
    except Exception as error:
        raise ConfigError(
            f"{told} can't be made with {_written(given)}: {type(error).__name__}: {first_line(error)}"
        ) from error
    if not isinstance(made, nn.Module):
        raise ConfigError(
            f"{told} gives an object of type {type(made).__name__}, but a torch.nn.Module is wanted."
        )
    return made


def _written(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())[:120] or "no options"


def _objective(cfg: DictConfig) -> Objective:
    if cfg.objective.kind != "own":
        function_of(cfg.objective.object, "objective.object._target_", f"objective={cfg.objective.name}")
        return instantiate(cfg.objective.object)
    config = resolved(cfg.objective)
    if config["function"] is None:
        raise ConfigError(
            "objective=own needs a function: give objective.function=package.module:name, (model, batch) -> loss, or"
            " another objective, such as objective=cross_entropy."
        )
    found = function_of(config, "objective.function", "objective=own")
    given = _options(config, "function", "options", "objective")
    if isinstance(found, type):
        try:
            return checked(found(**given))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"objective.function={config['function']} can't be made with {_written(given)}: {first_line(error)}"
            ) from error
    return checked(partial(found, **given) if given else found)


def _data(cfg: DictConfig) -> tuple[dict[str, list[Any]], str, str]:
    """Batches by split, what was chosen unasked, and what the data are called."""
    if cfg.data.kind != "own":
        data, size = (
            classification.load(cfg.data.name, cfg.data.path, download=cfg.data.download),
            cfg.data.batch_size,
        )
        return (
            {"train": data.batches("train", size), "heldout": data.batches("test", size)},
            "",
            cfg.data.name,
        )
    config = resolved(cfg.data)
    if config["dataset"] is None:
        raise ConfigError(
            "data=own needs a data set: give data.dataset=package.module:name, or other data, such as data=mnist."
        )
    found = _dataset(config)
    size, limit = config["batch_size"], config["limit"]
    if size < 1 or (limit is not None and (not isinstance(limit, int) or limit < 1)):
        name = "batch_size" if size < 1 else "limit"
        raise ConfigError(f"data.{name} is {config[name]}, but it must be a whole number of at least 1.")
    given = _options(config, "dataset", "options", "data")
    return *own.splits(found, given, size, limit, f"data.dataset={config['dataset']}"), str(config["dataset"])


def _dataset(config: Mapping[str, Any]) -> Callable[..., Any]:
    """What `data.dataset` names: a function or class, or data themselves, which then are what it returns."""
    try:
        return function_of(config, "data.dataset", "data=own")
    except ConfigError as error:
        if "can't be called" not in str(error):
            raise
    made = located(config["dataset"])
    return lambda: made


def _example(model: nn.Module, objective: Objective, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the objective gives to the model for a batch: the example inputs by which symmetries are derived."""

    class Called(BaseException):
        """Of no kind that an objective catches."""

    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, dict(kwargs)))
        raise Called

    handle = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        with torch.no_grad(), computing(batch):
            if hasattr(objective, "loss"):
                objective.loss(model, batch)
            else:
                objective.evaluate(model, [batch])
    except Called:
        pass
    finally:
        handle.remove()
    if not found:
        raise TraceError(
            "The objective never calls the model itself, but the symmetries are those of its forward; let it call"
            " model(...)."
        )
    return found[0]


def _try(model: nn.Module, objective: Objective, batch: Any) -> None:
    """Ask the objective for what it will be asked for, on two samples.

    Raises:
        ConfigError, DataError: it fails, or gives no figures.
    """
    objective = checked(objective)
    if hasattr(objective, "loss"):
        with torch.no_grad(), computing(batch):
            objective.loss(model, batch)
    try:
        with computing(batch):
            objective.evaluate(model, [batch])
    except RebasinError:
        raise
    except Exception as error:
        raise ConfigError(
            f"The objective's evaluate(model, batches) fails on a list of one batch: {type(error).__name__}:"
            f" {first_line(error)}"
        ) from error


def _trained(
    network: nn.Module,
    train: Callable[..., Any],
    options: Mapping[str, Any],
    batches: Sequence[Any],
    seed: int,
    device: torch.device,
    what: Mapping[str, Any],
    cache: str | None,
    progress: Progress | None,
) -> State:
    """The weights that the user's function gives a network, from the cache if the same was trained before."""
    kept = digest({f"{i}.{j}": t for i, b in enumerate(batches) for j, t in enumerate(_tensors(b))})
    sources = [_source(train), _source(type(network))]
    begun = {"start": digest(on_cpu(network)), "data": kept, "sources": sources, "seed": seed}
    place = Place.of({"version": VERSION, **what, **begun}, str(device), cache_folder(cache), "own")
    if (found := place.read(network.state_dict().keys())) is not None:
        return found[0]
    began = time.perf_counter()
    told = f"model.train={what['train'][0]}"
    network = network.to(device).train()
    offered = {"seed": seed, "device": device, "progress": progress}
    names = [name for name in arguments_of(train) if name not in (*offered, *options)]
    if len(names) < 2:
        raise ConfigError(
            f"{told} must take the network and the training batches, but it takes {', '.join(names) or 'nothing'}."
        )
    given = supply(train, {**offered, names[0]: network, names[1]: batches}, options, what=told)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.default_generator.manual_seed(seed)
            made = train(**given)
    except (ConfigError, DataError):
        raise
    except Exception as error:
        raise ConfigError(f"{told} fails: {type(error).__name__}: {first_line(error)}") from error
    if made is not None and not isinstance(made, nn.Module | Mapping):
        raise ConfigError(
            f"{told} returns an object of type {type(made).__name__}; give the trained network, its state_dict, or"
            " nothing, if it was trained in place."
        )
    if isinstance(made, nn.Module):
        made = made.state_dict()
    shapes = {name: t.shape for name, t in network.state_dict().items() if isinstance(t, torch.Tensor)}
    if made is not None:
        if {n: t.shape for n, t in made.items() if isinstance(t, torch.Tensor)} != shapes:
            raise ConfigError(
                f"{told} returns another network than it was given, with other tensors; give back the one that it got."
            )
        network.load_state_dict(made)
    if digest(on_cpu(network)) == begun["start"]:
        raise ConfigError(
            f"{told} left the network as it was (seed {seed}); train it in place, or return the trained one."
        )
    state = on_cpu(network)
    place.write(state, [], time.perf_counter() - began)
    return state


def _tensors(batch: Any) -> list[torch.Tensor]:
    return [leaf.cpu() for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor)]


def _source(function: Any) -> str:
    """A hash of the file that a function or class stands in: what it does may have changed with it."""
    module = sys.modules.get(getattr(function, "__module__", ""))
    try:
        text = inspect.getsource(module) if module is not None else ""
    except (OSError, TypeError):
        text = ""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
