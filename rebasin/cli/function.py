"""What a component computes, without ever holding it whole: each layer's weights are read when its turn comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..errors import CheckpointError, RebasinError, first_line
from ..tensors.free_memory import free_memory
from ..types import DerivedState, LazyTensor, State, dtype_of, passed, shape_of
from .inputs import numbers

if TYPE_CHECKING:
    from ..checkpoints import Checkpoint


TOLERANCE = 1e-3
"""What rounding explains is less: relative changes of an output, in float32 and in another order of summation."""


FURTHER = 1.02
"""A merge whose outputs are so many times as far from A's and B's as the plain merge's is worse; less may be chance."""

STACKED = 20
"""How many times the rounding of a narrow file's weights its outputs may differ: five or six times in a UNet."""


def rounding_in(checkpoint: Checkpoint) -> float:
    """What rounding what maps moved has cost, relative, as the header of a file tells; 0 if it tells of none."""
    from ..checkpoints import provenance

    made = provenance.read(provenance.metadata_of(checkpoint)) or {}
    try:
        return float(made.get("rounding") or 0.0)
    except ValueError:
        return 0.0


def compare_functions(
    checkpoint: Checkpoint, component: str, other: State, seed: int = 0, of: Checkpoint | None = None
) -> float:
    """How far apart a component's outputs are with its own weights and with `other`: the relative difference of the
    worst of them, on a random input, in float32. `of` is the model whose `other` are, with its own configuration.

    Raises:
        CheckpointError: the component does not fit its architecture.
    """
    ours = compute(checkpoint, component, checkpoint.component(component), seed)
    return _distance(ours, compute(of or checkpoint, component, other, seed))


def compare_chains(checkpoint: Checkpoint, others: Mapping[str, State], seed: int = 0) -> float:
    """The same for text encoders and UNet together, from token ids to the predicted noise."""
    own = {name: checkpoint.component(name) for name in others}
    return _distance(*(_chain(checkpoint, states, seed) for states in (own, others)))


def outputs_of(checkpoint: Checkpoint, states: Mapping[str, State], seed: int = 0) -> dict[str, Tensor]:
    """What a component computes on a random input, of text encoders and UNet together what the UNet does."""
    if len(states) > 1:
        return _chain(checkpoint, states, seed)
    ((name, state),) = states.items()
    return compute(checkpoint, name, state, seed)


def how_far(outputs: Mapping[str, Tensor], ends: Sequence[Mapping[str, Tensor]]) -> float:
    """The mean over the ends (A and B) of how far outputs are from theirs, relative."""
    return sum(_distance(end, outputs) for end in ends) / len(ends)


def _chain(checkpoint: Checkpoint, states: Mapping[str, State], seed: int) -> dict[str, Tensor]:
    hidden, pooled = [], None
    for name in ("text_encoder", "text_encoder_2"):
        if name in states:
            states_of_text, *more = compute(checkpoint, name, states[name], seed).values()
            hidden.append(states_of_text)
            pooled = more[0] if more else pooled

    def texts(args: Any, kwargs: Any) -> tuple[Any, Any]:
        added = kwargs.get("added_cond_kwargs")
        if added is not None:
            kwargs = {**kwargs, "added_cond_kwargs": {**added, "text_embeds": pooled}}
        return (*args[:2], torch.cat(hidden, dim=-1)), kwargs

    return compute(checkpoint, "unet", states["unet"], seed, texts)


def compute(
    checkpoint: Checkpoint,
    component: str,
    state: State,
    seed: int = 0,
    inputs: Callable[[Any, Any], tuple[Any, Any]] | None = None,
) -> dict[str, Tensor]:
    """The outputs of a component with these weights, float32, for an input drawn from `seed`.

    `inputs` may replace what was drawn: (args, kwargs) -> (args, kwargs). A class whose layers read the weights of
    others is computed with as a whole, if memory is enough.

    Raises:
        CheckpointError: the component does not fit its architecture, or can't be computed with.
    """
    try:
        return _computed(checkpoint, component, state, seed, inputs, whole=False)
    except RebasinError:
        raise
    except Exception as error:  # of the library's own code
        needed = 4.0 * sum(prod(shape_of(state, name)) for name in state)
        free = free_memory(torch.device("cpu"))
        if free is not None and free < WHOLE * needed:
            raise _uncomputable(checkpoint, component, error) from error
    try:
        return _computed(checkpoint, component, state, seed, inputs, whole=True)
    except RebasinError:
        raise
    except Exception as error:
        raise _uncomputable(checkpoint, component, error) from error


WHOLE = 1.5
"""How much memory computing with a component as a whole takes, as a multiple of its numbers in float32."""


def _uncomputable(checkpoint: Checkpoint, component: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"What the {component} of {checkpoint.path} computes can't be checked here, so align and merge need --no-check"
        f" (what they have kept is used then): {type(error).__name__}: {first_line(error, 100)}"
    )


def _computed(
    checkpoint: Checkpoint,
    component: str,
    state: State,
    seed: int,
    inputs: Callable[[Any, Any], tuple[Any, Any]] | None,
    whole: bool,
) -> dict[str, Tensor]:
    from ..checkpoints import architecture
    from ..tracing.export import named_outputs

    if component in checkpoint.classes:  # whose example is drawn at random, and knows what numbers mean
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module, args, kwargs = architecture(checkpoint, component, device=None)
    else:
        module, args, kwargs = architecture(checkpoint, component)
        args, kwargs = _drawn(module, args, kwargs, seed)
        _fill_constants(module)
    if inputs is not None:
        args, kwargs = inputs(args, kwargs)
    wide: Any = DerivedState(
        {name: _computable(state, own, checkpoint) for name, own in _with_tied(module, state).items()}
    )
    with torch.no_grad():
        for name, buffer in module.named_buffers():  # which the offloading leaves as they were built
            if name in wide and not buffer.is_meta:
                buffer.copy_(wide[name])
    if whole:
        _give([(wide, place) for place in _places(module, wide)])
    else:
        _read_in_turn(module, wide)
    with torch.no_grad():
        return named_outputs(module(*args, **kwargs))


TOGETHER = ("MultiheadAttention",)
"""Classes whose parts are not called, but read."""

Place = tuple[nn.Module, str, str]
"""A layer, the name that it has for a parameter, and the model's."""


class _Absent(nn.Parameter):
    """A parameter without numbers. Models may ask it where it will be, and send their inputs there."""

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return torch.device("cpu")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        if any(
            isinstance(part, Tensor) for part in tree_leaves(found)
        ):  # torch may take its numbers for zeros
            raise RuntimeError("a weight is read where its layer does not compute")
        return found


def _places(module: nn.Module, state: State, path: str = "", parts: bool = True) -> list[Place]:
    """The parameters of a module, and of its parts, that a state has."""
    layers = module.named_modules(prefix=path) if parts else [(path, module)]
    named = ((layer, own, f"{at}.{own}".lstrip(".")) for at, layer in layers for own in layer._parameters)
    return [(layer, own, name) for layer, own, name in named if name in state]


def _give(numbers: Sequence[tuple[State, Place]]) -> None:
    for state, (layer, own, name) in numbers:
        if (before := layer._parameters[own]) is not None:
            layer._parameters[own] = nn.Parameter(state[name].to(before.dtype), requires_grad=False)


def _take(places: Sequence[Place]) -> None:
    for layer, own, _ in places:
        if (before := layer._parameters[own]) is not None:
            layer._parameters[own] = _Absent(torch.empty_like(before, device="meta"), requires_grad=False)


def _read_in_turn(module: nn.Module, state: State) -> None:
    """Let each layer have its parameters while it computes, and no longer."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    class InTurn(ModelHook):
        def __init__(self, places: Sequence[Place]) -> None:
            self.places = places
            _take(places)

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            _give([(state, place) for place in self.places])
            return args, kwargs

        def post_forward(self, module: nn.Module, output: Any) -> Any:
            _take(self.places)
            return output

    known: set[nn.Module] = set()
    for path, layer in list(module.named_modules()):
        together = type(layer).__name__ in TOGETHER
        places = _places(layer, state, path, together)
        if layer not in known and places:
            add_hook_to_module(layer, InTurn(places))
        known |= set(layer.modules()) if together else {layer}


def _drawn(module: nn.Module, args: Any, kwargs: Any, seed: int) -> tuple[Any, Any]:
    """Random numbers and tokens in the place of an example's."""
    generator = torch.Generator().manual_seed(seed)
    tokens = min((m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)), default=1000)

    def draw(example: Tensor) -> Tensor:
        if example.is_floating_point():
            return torch.randn(example.shape, generator=generator)
        return torch.randint(0, tokens, example.shape, generator=generator)

    return tree_map_only(Tensor, draw, (args, kwargs))


def _with_tied(module: nn.Module, state: State) -> dict[str, str]:
    """Name -> name in `state`, of its tensors and of those of the module that are one with them."""
    whole = module.state_dict(keep_vars=True)
    known = {id(whole[name]): name for name in whole if name in state}
    tied = {name: known[id(own)] for name, own in whole.items() if name not in state and id(own) in known}
    return {name: name for name in state} | tied


def _computable(state: State, name: str, checkpoint: Checkpoint) -> LazyTensor:
    if not dtype_of(state, name).is_floating_point:
        return passed(state, name)
    return LazyTensor(shape_of(state, name), torch.float32, lambda: numbers(state, name, checkpoint.path))


def _fill_constants(module: nn.Module) -> None:
    """Buffers that no file has: of the components of a checkpoint these are the positions of CLIP's tokens."""
    for own in module.modules():
        for name, buffer in own.named_buffers(recurse=False):
            if name == "position_ids" and buffer.is_meta:
                own._buffers[name] = torch.arange(buffer.shape[-1])[None]


def _distance(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> float:
    """The largest relative difference of an output; NaN if one has it."""
    found = []
    for name, output in expected.items():
        difference, size = (actual[name] - output).double().norm(), output.double().norm()
        found.append(difference / size if size else difference)
    return float(torch.stack(found).max())
