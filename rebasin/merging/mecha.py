"""A bridge to the package sd-mecha (extra `mecha`): its methods here, and our states in its recipes.

Our own methods need none of it. `merge("mecha:NAME", ...)` calls a method of sd-mecha tensor by tensor, for models of
any architecture; what follows from that package's own rules on keys and dtypes does not apply.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from itertools import chain, repeat
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..types import State, dtype_of, shape_of
from .registry import Method

REFERENCE = "the package sd-mecha (ljleb and contributors)"


def mecha_method(name: str) -> Method:
    """A method of sd-mecha as one of ours.

    Its models become ours, in their order. Where it takes differences, it gets the models minus the base, and its
    result is added to the base; a third model, c, is the base. `alpha` is the weight, and what else has a default is
    an option.

    Raises:
        ConfigError: sd-mecha is not installed, or has no such method for single tensors of a model.
    """
    found = _resolve(name)
    names, spaces = found.get_param_names(), found.get_input_merge_spaces()
    defaults, kinds = found.get_default_args(), found.get_input_types()
    required = names.args[: len(names.args) - len(defaults.args)]
    options = dict(zip(names.args[len(required) :], defaults.args, strict=True)) | dict(defaults.kwargs)
    many = names.has_varargs()
    deltas = [
        _is(space, "delta") for space in (*spaces.args[: len(required)], *([spaces.vararg] if many else []))
    ]
    returns = found.get_signature().return_annotation.data.merge_space
    no_model = _is(returns, "param") or (_is(returns, "delta") and not any(deltas))
    if no_model or not (required or many) or len(required) > 3:
        raise ConfigError(
            f"sd-mecha's '{name}' does not merge models tensor by tensor, so it can't be used here."
        )
    third = len(required) == 3
    weight = options.pop("alpha", None)
    of = {**dict(zip(names.args, kinds.args, strict=True)), **dict(kinds.kwargs)}
    everything = [kinds.vararg] if many else []

    def run(
        models: Sequence[Tensor], name: str, base: Tensor | None, alpha: float | None = None, **given: Any
    ) -> Tensor:
        if base is not None and not third:
            wanted = chain(deltas, repeat(deltas[-1]))
            models = [m - base if delta else m for m, delta in zip(models, wanted, strict=False)]
        tensors = [*models, base] if third else list(models)
        types = [*(of[n] for n in required), *everything * len(tensors)]
        # Copies, because some methods write into what they get.
        copies = [(t.clone(), str(kind)) for t, kind in zip(tensors, types, strict=False)]
        arguments = [{name: copy} if "StateDict" in kind else copy for copy, kind in copies]
        settings = {**given, **({} if alpha is None else {"alpha": alpha})}
        keywords = {key: _value(value, of.get(key), models[0]) for key, value in settings.items()}
        if found.has_varkwargs:
            relation = SimpleNamespace()
            keywords |= {"key": name, "key_relation": relation, "cache": None, "output_reused": False}
        result = found.__wrapped__(*arguments, **keywords)
        if not isinstance(result, Tensor):  # some say 0 for nothing to add
            result = torch.full_like(models[0], float(result))
        return base + result if base is not None and _is(returns, "delta") else result

    return Method(
        name=f"mecha:{name}",
        function=run,
        description=f"sd-mecha's {name}.",
        formula="see sd-mecha",
        reference=REFERENCE,
        inputs="N" if many else len(required) - third,
        least=1 if len(required) - third == 1 or many else 2,
        needs_base=third or any(deltas),
        takes_base=third or any(deltas),
        weight=None if weight is None else "alpha",
        default_weight=weight,
        options=options,
        takes=frozenset({"models", "name", "base"} | ({"alpha"} if weight is not None else set())),
    )


def mecha_model(state: State, architecture: str) -> Any:
    """A state, an aligned one for example, as a node of a sd-mecha recipe; it is read tensor by tensor.

    Args:
        state: any mapping name -> tensor.
        architecture: a model config of sd-mecha ("sd1-ldm", "sdxl-sgm") or a new name of the form "name-layout": then
            a config is made from the state's names, shapes and dtypes, so that recipes work for any architecture.

    Raises:
        ConfigError: sd-mecha is not installed, or the name is not of that form.
    """
    package = _package()
    configs = importlib.import_module("sd_mecha.extensions.model_configs")
    if architecture not in {config.identifier for config in configs.get_all()}:
        keys = {key: configs.KeyMetadata(list(shape_of(state, key)), dtype_of(state, key)) for key in state}
        try:
            configs.register(configs.ModelConfigImpl(architecture, {"model": keys}))
        except ValueError as error:
            raise ConfigError(
                f"'{architecture}' can't name a model config of sd-mecha: it has the form name-layout, in lower case."
            ) from error
    return package.model(_AsDict(state), config=architecture)


class _AsDict(dict[str, Tensor]):
    """sd-mecha asks for a dict; this one reads its tensors from a lazy state."""

    def __init__(self, state: State):
        super().__init__({key: torch.empty(0) for key in state})
        self.state = state

    def __getitem__(self, key: str) -> Tensor:
        return self.state[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self.state[key] if key in self else default

    def values(self) -> Any:
        return (self.state[key] for key in self)

    def items(self) -> Any:
        return ((key, self.state[key]) for key in self)


def _package() -> Any:
    try:
        return importlib.import_module("sd_mecha")
    except ImportError as error:
        raise ConfigError(
            "This needs the package sd-mecha, which is not installed: pip install 'git-rebasin[mecha]'."
        ) from error


def _resolve(name: str) -> Any:
    _package()
    methods = importlib.import_module("sd_mecha.extensions.merge_methods")
    usable = {m.identifier: m for m in methods.get_all() if not m.wrapped_is_class and m.interface is None}
    if name not in usable or inspect.isclass(usable[name].__wrapped__):
        raise ConfigError(
            f"sd-mecha has no merge method '{name}' for single tensors; it has {', '.join(sorted(usable))}."
        )
    return usable[name]


def _is(space: Any, name: str) -> bool:
    spaces = space if isinstance(space, set | frozenset) else {space}
    return {getattr(s, "identifier", None) for s in spaces} == {name}


def _value(value: Any, kind: Any, like: Tensor) -> Any:
    if kind is torch.Tensor and not isinstance(value, Tensor) and value is not None:
        return torch.tensor(value, dtype=like.dtype, device=like.device)
    return value
