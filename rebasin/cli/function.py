"""What a component computes, without ever holding it whole: each layer's weights are read when its turn comes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

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

    `inputs` may replace what was drawn: (args, kwargs) -> (args, kwargs).
    """
    from accelerate import cpu_offload

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
    if component in checkpoint.classes and "return_dict" in inspect.signature(module.forward).parameters:
        kwargs = {**kwargs, "return_dict": False}  # hooks can't put every class of outputs together again
    # Its parts are not called, but read.
    whole = ["MultiheadAttention"]
    cpu_offload(module, torch.device("cpu"), state_dict=wide, preload_module_classes=whole)
    with torch.no_grad():
        return named_outputs(module(*args, **kwargs))


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
