"""Any module or function of modules -> an ATen graph, without weights and without changing the model.

`torch.export` runs the model on fake tensors: meta parameters are enough, SDXL takes half a minute and no memory.
Operators for which the engine has no rule, and in-place ones, are rewritten by PyTorch's own decompositions.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import io
import logging
import os
import re
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.fx.proxy
from torch import Tensor, nn
from torch.export.graph_signature import OutputKind
from torch.utils._pytree import tree_leaves, tree_map_only

from ..arguments import typed
from ..errors import TraceError
from ..tensors.modules import eval_mode
from .values import Key, Shadows, whole_numbers

_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(None))


def named_outputs(output: Any, name: str = "output") -> dict[str, Tensor]:
    """The tensors in a model's output, by name.

    Caches of keys and values are left out: they are fed back into the model that made them, and move with it.

    Raises:
        TraceError: something is in there that may hold tensors out of sight.
    """
    parts: dict[Any, Any] = {}
    if isinstance(output, Tensor):
        return {name: output}
    if type(output) in _PLAIN or any(
        c.__name__.endswith("Cache") and c.__module__.startswith("transformers.")
        for c in type(output).__mro__
    ):
        return {}
    if isinstance(output, Mapping):
        parts = dict(output.items())
    elif hasattr(output, "_asdict"):
        parts = output._asdict()
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        parts = {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}
    elif isinstance(output, list | tuple):
        parts = dict(enumerate(output))
    elif all(hasattr(output, own) for own in ("sample", "mode", "parameters")):
        return named_outputs(
            cast(Any, output).parameters, f"{name}.parameters"
        )  # the distribution of a VAE's latents
    else:
        raise TraceError(
            f"The model's {name.replace('output.', 'output ', 1)} is of the type {type(output).__qualname__}, which"
            f" can't be looked into; return tensors, or lists, tuples, dictionaries or dataclasses of tensors."
        )
    seen = {id(value) for value in parts.values()}
    parts |= {
        k: v
        for k, v in getattr(output, "__dict__", {}).items()
        if isinstance(v, Tensor) and id(v) not in seen
    }
    found: dict[str, Tensor] = {}
    for key, value in parts.items():
        found.update(named_outputs(value, f"{name}.{key}"))
    return found


class _Names:
    """Where the forward pass notes its outputs' names: export restores a module's own attributes afterwards."""

    names: tuple[str, ...] = ()


class _Flat(nn.Module):
    """The model with its outputs as a plain tuple, whatever class it returns."""

    def __init__(
        self,
        model: nn.Module,
        record: _Names,
        held: Mapping[str, Any],
        values: Mapping[Key, Tensor] | None = None,
    ):
        super().__init__()
        self.model = model
        self._record = record
        self._held = held
        self._values = values

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        with contextlib.nullcontext() if self._values is None else Shadows(self._values, args, kwargs):
            output = self.model(*args, **kwargs, **self._held)
        outputs = named_outputs(output)
        self._record.names = tuple(outputs)
        return tuple(outputs.values())


class Composed(nn.Module):
    """Several modules under names and the function that computes with them; see `rebasin.compose`."""

    def __init__(self, function: Callable[..., Any], modules: Mapping[str, nn.Module]):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self._function = function
        self._names = tuple(modules)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*(getattr(self, name) for name in self._names), *args, **kwargs)


@typed
def compose(function: Callable[..., Any], **modules: nn.Module) -> nn.Module:
    """One module out of several, to trace what they compute together (a joint spec).

    `function(*modules, *args, **kwargs)` gets the modules in the order given; parameters are named `name.parameter`.

        joint = compose(lambda te, unet, ids, x, t: unet(x, t, te(ids)[0]), text_encoder=te, unet=unet)
        spec = rebasin.trace(joint, ids, latents, timestep)
    """
    return Composed(function, modules)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`eval_mode`, with the fast paths of attention off: they hide its operators."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with eval_mode(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@dataclasses.dataclass(frozen=True)
class Exported:
    """A graph, the names of its outputs, and which graph input is which tensor of the state."""

    module: torch.fx.GraphModule
    outputs: tuple[str, ...]
    states: Mapping[str, str]  # placeholder -> parameter or persistent buffer
    constants: Mapping[str, Tensor | None]  # placeholder -> value of a constant or non-persistent buffer
    writes: tuple[
        str | None, ...
    ]  # what the results before the outputs are written to: a tensor of the state, if any
    fixed: bool = False  # for the values of whole numbers in the example, which the model asked for

    @property
    def read(self) -> frozenset[str]:
        """The tensors of the state that something is computed from."""
        used = {node.name for node in self.module.graph.nodes if node.op == "placeholder" and node.users}
        return frozenset(name for place, name in self.states.items() if place in used)

    @property
    def unread(self) -> frozenset[str]:
        """Those from which nothing is computed with these inputs."""
        return frozenset(self.states.values()) - self.read


def export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], known: Collection[str]
) -> Exported:
    """Export `model` for these example inputs; `known` are the operators that need no decomposition.

    A model that asks for values of whole numbers or masks among them is exported for those of the example.

    Raises:
        TraceError: the model can't be exported; the message has the line and what to do.
    """
    args, kwargs, held = _without_objects(args, kwargs)
    values = whole_numbers(args, kwargs)
    if any(p.is_meta for p in model.parameters()):
        args, kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
    record, fixed = _Names(), False
    first = contextlib.suppress(Exception) if values else contextlib.nullcontext()
    with (
        warnings.catch_warnings(), _quiet(), _short_stacks(), _without_memory(), evaluation_mode(model),
        torch.no_grad(),
    ):  # fmt: skip
        warnings.simplefilter("ignore")
        try:
            program = None
            with first, _objects_as_before(model):
                flat = _Flat(model, record, copy.deepcopy(held))
                program = torch.export.export(flat, args, kwargs, strict=False)
            if program is None or (values and _has_unknown_sizes(program)):
                fixed = True
                with _objects_as_before(model):
                    flat = _Flat(model, record, copy.deepcopy(held), values)
                    program = torch.export.export(flat, args, kwargs, strict=False)
            table = _decompositions(program.graph_module, known)
            if table is not None:
                program = _decompose(program, table)
        except TraceError:
            raise
        except Exception as error:
            raise TraceError(_explain(error)) from error
    signature = program.graph_signature
    strip = len("model.")
    persistent = set(model.state_dict(keep_vars=True))
    states, constants = {}, {}
    for node, name in {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.items():
        if name[strip:] in persistent:
            states[node] = name[strip:]
        else:
            constants[node] = program.constants.get(name)
    for node, name in signature.inputs_to_lifted_tensor_constants.items():
        constants[node] = program.constants.get(name)
    written = [s.target or "" for s in signature.output_specs if s.kind != OutputKind.USER_OUTPUT]
    writes = tuple(t[strip:] if t[strip:] in persistent else None for t in written)
    return Exported(program.graph_module, record.names, states, constants, writes, fixed)


def _without_objects(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """Named arguments that torch can't look into (a cache of a library's own) apart: the model gets a copy of each."""
    held = {name: value for name, value in kwargs.items() if not all(map(_is_input, tree_leaves(value)))}
    return args, {name: value for name, value in kwargs.items() if name not in held}, held


def _is_input(leaf: Any) -> bool:
    return isinstance(leaf, (Tensor, *_PLAIN)) or callable(leaf)


@contextlib.contextmanager
def _objects_as_before(model: nn.Module) -> Iterator[None]:
    """Objects of a model that are no modules (a table that is made on the first call) keep nothing of the export."""
    held = [value for module in model.modules() for value in vars(module).values() if _is_object(value)]
    before = [(vars(value), dict(vars(value))) for value in held]
    try:
        yield
    finally:
        for own, kept in before:
            if own.keys() != kept.keys() or any(own[name] is not value for name, value in kept.items()):
                own.clear()
                own.update(kept)
        for method in {m for cls in {type(module) for module in model.modules()} for m in _methods(cls)}:
            method.cache_clear()


def _methods(cls: type) -> Iterator[Any]:
    """Those that keep what they have computed (functools.cache)."""
    found = (value for part in cls.__mro__ for value in vars(part).values())
    return (value for value in found if isinstance(value, functools._lru_cache_wrapper))


def _is_object(value: Any) -> bool:
    code = (type, types.ModuleType, types.FunctionType, types.MethodType)
    return isinstance(getattr(value, "__dict__", None), dict) and not isinstance(
        value, (nn.Module, Tensor, *code)
    )


def _has_unknown_sizes(program: torch.export.ExportedProgram) -> bool:
    """Whether a shape in the graph depends on values."""
    return any(
        isinstance(size, torch.SymInt)
        for node in program.graph.nodes
        for value in tree_leaves(node.meta.get("val"))
        if isinstance(value, Tensor)
        for size in value.shape
    )


def _decompose(program: torch.export.ExportedProgram, table: dict[Any, Any]) -> torch.export.ExportedProgram:
    """Some decompositions write in place, which export refuses: then those operators stay, and are pinned."""
    try:
        return program.run_decompositions(table)
    except AssertionError:
        return program.run_decompositions({})


def _decompositions(graph: torch.fx.GraphModule, known: Collection[str]) -> dict[Any, Any] | None:
    """The decompositions for operators without a rule; None if the graph can be walked as it is."""
    from torch._decomp import decomposition_table

    table: dict[Any, Any] = {}
    rewrite = False
    for module in graph.modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        for node in module.graph.nodes:
            if not isinstance(node.target, torch._ops.OpOverload):
                continue
            rewrite |= node.target._schema.is_mutable
            if operator_name(node.target) not in known and torch.Tag.pointwise not in node.target.tags:
                found = decomposition_table.get(node.target)
                if found is not None:
                    table[node.target] = found
    return table if rewrite or table else None


def operator_name(target: torch._ops.OpOverload) -> str:
    return target._schema.name.removeprefix("aten::")


def source_line(node: torch.fx.Node) -> str:
    """Where in the model `node` comes from: the module's path and the innermost line of the model's own code."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0].removeprefix("model").removeprefix(".") if stack else ""
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    lines = [(f, n) for f, n in lines if _is_told(f)]
    line = f"{'/'.join(lines[-1][0].split('/')[-2:])}:{lines[-1][1]}" if lines else ""
    return ", ".join(part for part in (path, line) if part) or "the model's forward"


def _is_told(file: str) -> bool:
    return "/torch/" not in file and not file.endswith("tracing/export.py")


class _Innermost:
    """In the place of torch's captured stack: of all its frames the one that `source_line` tells."""

    def __init__(self, frame: types.FrameType | None):
        self._frame = frame

    @staticmethod
    def extract(**_: Any) -> _Innermost:
        return _Innermost(sys._getframe(1))

    def summary(self) -> traceback.StackSummary:
        frame = self._frame
        while frame is not None:
            code = frame.f_code
            if code.co_name == "forward" and _is_told(code.co_filename):
                told = traceback.FrameSummary(code.co_filename, frame.f_lineno, "forward", line="")
                return traceback.StackSummary.from_list([told])
            frame = frame.f_back
        return traceback.StackSummary()


@contextlib.contextmanager
def _short_stacks() -> Iterator[None]:
    """torch formats a hundred frames for each node, a sixth of the time of an export; one is wanted here."""
    place, name = torch.fx.proxy, "CapturedTraceback"
    before = getattr(place, name, None)
    if before is None:  # another release: slower, no less
        yield
        return
    setattr(place, name, _Innermost)
    try:
        yield
    finally:
        setattr(place, name, before)


@contextlib.contextmanager
def _without_memory() -> Iterator[None]:
    """Models on the meta device are exported where torch asks for a device that computes: `torch.autocast` of tensors
    that have no memory is the CPU's, and flex_attention takes them.
    """
    flex: Any = sys.modules.get("torch.nn.attention.flex_attention")
    autocast, accepts = torch.autocast.__init__, getattr(flex, "_validate_device", None)

    def init(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        autocast(self, "cpu" if device_type == "meta" else device_type, *args, **kwargs)

    def validate(query: Tensor, *others: Tensor) -> None:
        if accepts is not None and query.device.type != "meta":
            accepts(query, *others)

    torch.autocast.__init__ = init
    if accepts is not None:
        flex._validate_device = validate
    try:
        yield
    finally:
        torch.autocast.__init__ = autocast
        if accepts is not None:
            flex._validate_device = accepts


def _explain(error: Exception, limit: int = 300) -> str:
    """The innermost line of the model's own code, the first sentence of what torch says, and what to do."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [(f.filename, f.lineno, f.line) for f in frames if _is_own(f.filename)]
    if not own:
        lines = re.findall(r'File "([^"]+)", line (\d+)', str(error))
        own = [(f, n, "") for f, n in lines if _is_own(f)]
    where = ""
    if own:
        file, number, code = own[-1]
        code = f" ({_cut(code, 48)})" if code else ""
        where = f" at {'/'.join(Path(file).parts[-2:])[-48:]}:{number}{code}"
    head = f"The model can't be exported{where}: "
    if DATA_DEPENDENT.search(f"{type(error).__name__} {error}"):
        return head + (MASK if any(f.name == "_detect_is_causal_mask" for f in frames) else CHOICE)
    advice = "; if its control flow depends on data, trace a part of it, or a function of modules (rebasin.compose)."
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    sentence = re.split(r"(?<=[^.].[.!?])\s", first)[0].rstrip(".")
    return head + _cut(sentence, limit - len(head) - len(advice)) + advice


DATA_DEPENDENT = re.compile(
    r"data.?dependent|DynamicOutputShape|Cannot cast FakeTensor|unbacked", re.IGNORECASE
)
"""What torch says where a model looks at values, which are not there when it is exported."""

CHOICE = (
    "it depends on values of tensors (an if, item(), tolist()), unknown here; leave that out, trace a part of it, or a"
    " function of modules (rebasin.compose)."
)
MASK = (
    "torch looks into the mask's values for a causal one; call it with is_causal=True and a causal mask, or with"
    " is_causal=False (decoders: tgt_is_causal)."
)


def _is_own(file: str) -> bool:
    """Whether a file has code of the model itself; "<string>" is code that torch makes."""
    return not file.startswith("<") and "/torch/" not in file and "/rebasin/tracing/" not in file


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: room - 3].rstrip()}..."


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What torch logs and prints while an export fails is left out, unless TORCH_LOGS asks for it."""
    known = logging.root.manager.loggerDict
    names = (
        [] if os.environ.get("TORCH_LOGS") else [n for n in known if n == "torch" or n.startswith("torch.")]
    )
    loggers = [logger for name in names if not (logger := logging.getLogger(name)).disabled]
    for logger in loggers:
        logger.disabled = True
    try:
        with contextlib.redirect_stderr(io.StringIO()) if names else contextlib.nullcontext():
            yield
    finally:
        for logger in loggers:
            logger.disabled = False
