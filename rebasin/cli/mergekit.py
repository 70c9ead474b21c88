"""Recipes of mergekit: the part of its YAML that means something here, as steps of ours.

What a file asks for and is not done here is one sentence with the key and the line. The merge is the plain one, as
there; entries under `rebasin:`, which mergekit passes over, are keys of our own: `rebasin: {align: true}`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, listed, shown
from .located import Located, located
from .recipe import Recipe, Step, step_of

TYPES = {
    "float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "fp32": "fp32", "fp16": "fp16", "bf16": "bf16",
}  # fmt: skip

TOP = ("name", "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
       "tokenizer", "chat_template", "rebasin")  # fmt: skip

LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|block_list)\.(\d+)\.")
"""The number of the layer that a tensor is in."""

REPO = re.compile(r"[\w.-]+/[\w.-]+(?:@[^/]+)?")
"""A model on the Hub, as mergekit names it."""

TASK = ("weight", "density", "normalize", "rescale", "lambda", "int8_mask")


@dataclass(frozen=True, eq=False)
class Source:
    """A model and its parameters, the nearest first."""

    model: str
    parameters: tuple[Mapping[str, Located], ...]
    at: Located


@dataclass(frozen=True, eq=False)
class Wanted:
    """A document of mergekit.

    Attributes:
        sources: the models, without the base if that is not among them.
        shared: the parameters of all models.
        like: of a model, the folder whose tensors' names it has.
    """

    top: Mapping[str, Located]
    at: Located
    sources: tuple[Source, ...]
    shared: tuple[Mapping[str, Located], ...]
    base: Source | None
    like: Callable[[str], Path]
    remarks: list[str]

    @property
    def method(self) -> str:
        return str(self.top["merge_method"].plain)

    def others(self) -> list[Source]:
        """The models but for the base."""
        return [one for one in self.sources if self.base is None or one.model != self.base.model]

    def need_base(self) -> Source:
        if self.base is None:
            raise self.at.wrong(f"`merge_method: {self.method}` needs a `base_model`")
        return self.base

    def levels(self, name: str, source: Source | None = None) -> list[Located]:
        """What sets a parameter of a model, or of the merge, the first that says something counts."""
        own = source.parameters if source is not None else ()
        return [level[name] for level in (*own, *self.shared) if name in level]

    def number(self, name: str, default: Any, source: Source | None = None) -> Any:
        """A parameter that is one number (or true or false) for all tensors."""
        levels = self.levels(name, source)
        if not levels:
            if default is None:
                at = source.at if source is not None else self.at
                raise at.wrong(f"`{self.method}` needs the parameter `{name}`, which is not there")
            return default
        if not isinstance(levels[0].value, bool | int | float):
            raise levels[0].wrong(
                f"`{name}` is not one number, which {self.method!r} takes here; give it one"
                + (", or merge two models" if name == "weight" and len(self.sources) > 2 else "")
            )
        return levels[0].value

    def varies(self, name: str, source: Source | None = None) -> bool:
        levels = self.levels(name, source)
        return bool(levels) and not isinstance(levels[0].value, bool | int | float)

    def same(self, name: str, default: Any) -> Any:
        """A parameter that all models have alike."""
        values = [self.number(name, default, source) for source in self.others()]
        for source, value in zip(self.others(), values, strict=True):
            if value != values[0]:
                raise self.levels(name, source)[0].wrong(
                    f"`{name}` is {value} here and {values[0]} of another model, but {self.method!r} takes one for all"
                    " models here"
                )
        return values[0]

    def flag(self, name: str, default: bool) -> bool:
        return bool(self.number(name, default))

    def blocks(self, share: Callable[[Callable[[str, Source | None], float]], float]) -> dict[str, Any]:
        """The weight of each tensor, as entries of ours; `share` has it from the parameters at a tensor."""
        from ..checkpoints.checkpoint import open_checkpoint

        model = open_checkpoint(self.like((self.base or self.sources[0]).model))
        names = [(part, name) for part in model.components for name in model.shapes(part)]
        layers = {name: int(found[1]) for _, name in names if (found := LAYER.search(name))}
        last = max(layers.values(), default=0)
        groups: dict[float, list[str]] = defaultdict(list)
        for part, name in names:
            # Outside of the layers mergekit takes the first of a gradient's numbers.
            depth = (layers[name] / last if last else 1.0) if name in layers else 0.0

            def at(parameter: str, source: Source | None, name: str = name, depth: float = depth) -> float:
                for level in self.levels(parameter, source):
                    if (value := _evaluated(level, parameter, name, depth)) is not None:
                        return value
                raise self.at.wrong(f"no `{parameter}` is for {shown(name)}; add an entry without `filter`")

            groups[share(at)].append(f"{part}.{name}")
        most = max(groups, key=lambda value: len(groups[value]))
        chosen = {
            f"re:^(?:{'|'.join(map(re.escape, own))})$": value
            for value, own in groups.items()
            if value != most
        }
        return {"default": most, **chosen}


def _evaluated(level: Located, parameter: str, name: str, depth: float) -> float | None:
    """A parameter at one tensor: a number, numbers over the depth, or the first entry whose filter fits."""
    value = level.value
    if isinstance(value, bool | int | float):
        return float(value)
    if isinstance(value, list) and value and all(isinstance(one.value, int | float) for one in value):
        place = depth * (len(value) - 1)
        low = int(place)
        high = min(low + 1, len(value) - 1)
        return (1 - place + low) * value[low].value + (place - low) * value[high].value
    entries = value if isinstance(value, list) else [level]
    for one in entries:
        own = one.mapping(f"An entry of `{parameter}`")
        if "value" not in own or set(own) - {"value", "filter"}:
            raise one.wrong(f"an entry of `{parameter}` has `value` and `filter`, and nothing else")
        pattern = own["filter"].plain if "filter" in own else None
        if pattern in (None, "*") or str(pattern) in name:
            return _evaluated(own["value"], parameter, name, depth)
    return None


def _linear(wanted: Wanted) -> dict[str, Any]:
    sources = _base_first(wanted)
    if any(wanted.varies("weight", one) for one in sources):
        if len(sources) > 2:
            one = next(one for one in sources if wanted.varies("weight", one))
            raise wanted.levels("weight", one)[0].wrong(
                f"`weight` differs from layer to layer, which is for two models here, but there are {len(sources)}"
            )
        weights = _shares(wanted, sources)
    else:
        own = [float(wanted.number("weight", None, one)) for one in sources]
        total = sum(own)
        if not wanted.flag("normalize", True) and abs(total - 1) > 1e-6:
            raise wanted.levels("normalize")[0].wrong(
                f"`normalize: false` with weights of the sum {total:g} makes the model larger or smaller, which is not"
                " done here; give weights whose sum is 1"
            )
        if min(own) < 0 or total <= 0:
            raise wanted.at.wrong(f"the weights are {own}, but shares are not negative, and not all 0")
        weights = own
    return {"method": "weighted_sum", "models": [one.model for one in sources], "weights": weights}


def _shares(wanted: Wanted, sources: Sequence[Source]) -> dict[str, Any]:
    """The second model's share of each tensor, from the weights of two."""

    def share(at: Callable[[str, Source | None], float]) -> float:
        one, other = (at("weight", source) for source in sources)
        if one + other <= 0 or min(one, other) < 0:
            raise wanted.at.wrong(
                f"the weights of a tensor are {one:g} and {other:g}, but shares are not negative"
            )
        return other / (one + other)

    return wanted.blocks(share)


def _base_first(wanted: Wanted) -> list[Source]:
    """All models; the base first, whose configuration and tokenizer the result has."""
    base = wanted.base
    if base is None:
        return list(wanted.sources)
    if not any(one.model == base.model for one in wanted.sources):
        raise base.at.wrong(
            f"`base_model` is none of the `models`, and {wanted.method!r} has no use for another"
        )
    return [one for one in wanted.sources if one.model == base.model] + wanted.others()


def _slerp(wanted: Wanted) -> dict[str, Any]:
    base, others = wanted.need_base(), wanted.others()
    if len(others) != 1:
        raise wanted.at.wrong(
            f"`slerp` is of the `base_model` and one other, but there are {len(others)} others"
        )
    _slerp_remark(wanted)
    weights = (
        wanted.blocks(lambda at: at("t", None)) if wanted.varies("t") else float(wanted.number("t", None))
    )
    return {"method": "slerp", "models": [base.model, others[0].model], "weights": weights}


def _nuslerp(wanted: Wanted) -> dict[str, Any]:
    if wanted.base is not None:
        raise wanted.top["base_model"].wrong("`nuslerp` of differences from a `base_model` is not done here")
    if not wanted.flag("nuslerp_flatten", True):
        raise wanted.levels("nuslerp_flatten")[0].wrong("`nuslerp` of rows and columns is not done here")
    if len(wanted.sources) != 2:
        raise wanted.at.wrong(f"`nuslerp` is of two models, but there are {len(wanted.sources)}")
    _slerp_remark(wanted)
    return {
        "method": "slerp",
        "models": [one.model for one in wanted.sources],
        "weights": _shares(wanted, wanted.sources),
    }


def _slerp_remark(wanted: Wanted) -> None:
    wanted.remarks.append(
        "slerp interpolates the lengths of the tensors here, which mergekit does not: where two differ in length, so do"
        " the results."
    )


def _task_arithmetic(wanted: Wanted) -> dict[str, Any]:
    base, others = wanted.need_base(), wanted.others()
    strength = float(wanted.number("lambda", 1.0))
    told = {
        "method": "add_difference",
        "models": [base.model, *(o.model for o in others)],
        "base": base.model,
    }
    if not others:
        raise wanted.at.wrong("`task_arithmetic` has no model beside its `base_model`")
    if wanted.flag("normalize", False) and any(wanted.varies("weight", one) for one in others):
        raise wanted.levels("normalize")[0].wrong(
            "`normalize: true` needs one number as `weight` of each model"
        )
    if len(others) == 1 and wanted.varies("weight", others[0]):
        return {**told, "weights": wanted.blocks(lambda at: strength * at("weight", others[0]))}
    own = [float(wanted.number("weight", None, one)) for one in others]
    total = sum(own) if wanted.flag("normalize", False) else 1.0
    return {**told, "weights": [strength * one / (total or 1.0) for one in own]}


def _ties(wanted: Wanted) -> dict[str, Any]:
    base, others = wanted.need_base(), wanted.others()
    wanted.same("weight", None)
    if not wanted.flag("normalize", True):
        raise wanted.levels("normalize")[0].wrong(
            "`normalize: false` adds up what models agree on, but `ties` is their mean here; leave it out"
        )
    _no_rescale(wanted)
    return _on_base(wanted, "ties_sum", base, others) | {
        "alpha": float(wanted.number("lambda", 1.0)),
        "options": {"k": float(wanted.same("density", 1.0))},
    }


def _no_rescale(wanted: Wanted) -> None:
    if wanted.flag("rescale", False):
        raise wanted.levels("rescale")[0].wrong(
            "`rescale: true` is not done here with this method; leave it out"
        )


def _dare(wanted: Wanted) -> dict[str, Any]:
    base, others = wanted.need_base(), wanted.others()
    weight, density = float(wanted.same("weight", None)), float(wanted.same("density", 1.0))
    count = 1.0 if wanted.flag("normalize", False) else weight * len(others)
    wanted.remarks.append("dare_linear draws its masks at random, others here than mergekit does.")
    if not 0 < density <= 1:
        raise wanted.levels("density", others[0])[0].wrong(
            f"`density` is {density:g}, but it is above 0, at most 1"
        )
    return _on_base(wanted, "dropout", base, others) | {
        "alpha": float(wanted.number("lambda", 1.0)) * count,
        "options": {"probability": 1 - density, "rescale": wanted.flag("rescale", True)},
    }


def _model_stock(wanted: Wanted) -> dict[str, Any]:
    return _on_base(wanted, "model_stock", wanted.need_base(), wanted.others()) | {
        "options": {"rows": wanted.flag("filter_wise", False)}
    }


def _on_base(wanted: Wanted, method: str, base: Source, others: Sequence[Source]) -> dict[str, Any]:
    if len(others) < 2:
        raise wanted.at.wrong(f"`{wanted.method}` takes two models or more beside its `base_model` here")
    return {"method": method, "models": [one.model for one in others], "base": base.model}


METHODS: dict[str, tuple[Callable[[Wanted], dict[str, Any]], tuple[str, ...]]] = {
    "linear": (_linear, ("weight", "normalize")),
    "slerp": (_slerp, ("t",)),
    "nuslerp": (_nuslerp, ("weight", "nuslerp_flatten", "nuslerp_row_wise")),
    "task_arithmetic": (_task_arithmetic, TASK),
    "ties": (_ties, TASK),
    "dare_linear": (_dare, TASK),
    "model_stock": (_model_stock, ("filter_wise",)),
}
"""Method of mergekit -> how it is said here, and the parameters that it may have."""


def translated(path: Path, documents: Sequence[Located]) -> Recipe:
    """The steps of a file of mergekit, or of mergekit-multi, which has several documents.

    Raises:
        ConfigError: it asks for what is not done here; names the key and the line.
    """
    remarks: list[str] = []
    tops = [one.mapping("A recipe of mergekit") for one in documents]
    names = [str(top["name"].plain) if "name" in top else None for top in tops]
    steps: list[Step] = []
    likes: dict[str, str] = {}

    def like(model: str) -> Path:
        while model in likes:
            model = likes[model]
        return path.parent / Path(model).expanduser()

    left = list(range(len(tops)))
    while left:  # a document may stand before one that it needs
        needs = {i: set(_models(tops[i])) & {names[j] for j in left if names[j] is not None} for i in left}
        ready = [i for i in left if not needs[i]]
        if not ready:
            at = documents[left[0]]
            raise at.wrong(f"the merges {listed([str(names[i]) for i in left])} need each other's results")
        known = [step.name for step in steps if step.name is not None]
        ready.sort(key=lambda i: names[i] is None)  # the one without a name is the last
        step = _translated(path, documents[ready[0]], known, like, remarks)
        if step.name is not None:
            likes[step.name] = _models(tops[ready[0]])[0]
        steps.append(step)
        left.remove(ready[0])
    return Recipe(path, tuple(steps), tuple(dict.fromkeys(remarks)))


def _models(top: Mapping[str, Located]) -> list[str]:
    """The models that a document names, as far as it is one; the base first."""
    base = [top["base_model"]] if "base_model" in top else []
    entries = [one for key in ("models", "slices") if key in top for one in _entries(top[key])]
    own = [one.value["model"] for one in entries if isinstance(one.value, dict) and "model" in one.value]
    return [str(one.plain) for one in chain(base, own)]


def _entries(one: Located) -> list[Located]:
    """The entries of `models`, or the sources of `slices`."""
    if not isinstance(one.value, list):
        return []
    sources = [
        own.value["sources"] for own in one.value if isinstance(own.value, dict) and "sources" in own.value
    ]
    return [entry for own in sources for entry in _entries(own)] if sources else one.value


def _translated(
    path: Path, document: Located, known: Sequence[str], like: Callable[[str], Path], remarks: list[str]
) -> Step:
    top = document.mapping("A recipe of mergekit")
    for key, one in top.items():
        if key not in TOP and one.plain is not None:
            raise one.wrong(f"`{key}` of mergekit is not done here; there are {listed(TOP)}")
    if "merge_method" not in top:
        raise document.wrong("there is no `merge_method`")
    method = top["merge_method"]
    if method.plain not in METHODS:
        raise method.wrong(
            f"`merge_method: {shown(method.plain, 40)}` of mergekit has nothing here that does the same; there are"
            f" {', '.join(METHODS)}"
        )
    function, parameters = METHODS[method.plain]

    def model(one: Located) -> str:
        return _model(one, path.parent, known)

    sources, shared = _sources(top, document, model, like)
    shared = (*shared, _parameters(top))
    for level in (*shared, *(own for one in sources for own in one.parameters)):
        for key, one in level.items():
            if key not in parameters:
                raise one.wrong(
                    f"the parameter `{key}` is not known of {method.plain!r}; there are {', '.join(parameters)}"
                )
    base = None
    if "base_model" in top and top["base_model"].plain is not None:
        name = model(top["base_model"])
        base = next((one for one in sources if one.model == name), Source(name, (), top["base_model"]))
    wanted = Wanted(top, document, sources, shared, base, like, remarks)
    told = {**(own := function(wanted)), "align": False, **_written(wanted, own["models"][0])}
    entries = {key: located(value, document.where) for key, value in told.items()}
    if "rebasin" in top:
        entries |= top["rebasin"].mapping("`rebasin`")
    if "name" in top:
        entries["name"] = top["name"]
    return step_of(Located(entries, document.where), path.parent, known)


def _parameters(entries: Mapping[str, Located]) -> Mapping[str, Located]:
    own = entries.get("parameters")
    return own.mapping("`parameters`") if own is not None and own.plain is not None else {}


def _sources(
    top: Mapping[str, Located],
    document: Located,
    model: Callable[[Located], str],
    like: Callable[[str], Path],
) -> tuple[tuple[Source, ...], tuple[Mapping[str, Located], ...]]:
    """The models with their parameters, and the parameters of their slice."""
    if ("models" in top) == ("slices" in top):
        raise document.wrong("a recipe of mergekit has `models` or `slices`, and not both")
    if "models" in top:
        entries = top["models"].sequence("`models`")
        return tuple(_source(one, ("model", "parameters"), model) for one in entries), ()
    slices = top["slices"].sequence("`slices`")
    if len(slices) != 1:
        raise top["slices"].wrong(
            f"{len(slices)} `slices` stack layers of models on each other, which is not done here; only one slice of"
            " all layers is"
        )
    own = slices[0].mapping("A slice")
    for key, one in own.items():
        if key not in ("sources", "parameters"):
            raise one.wrong(f"`{key}` of a slice is not done here")
    if "sources" not in own:
        raise slices[0].wrong("the slice has no `sources`")
    found = []
    for one in own["sources"].sequence("`sources`"):
        found.append(_source(one, ("model", "parameters", "layer_range"), model))
        if "layer_range" in one.value:
            _require_all_layers(one.value["layer_range"], like(found[-1].model))
    return tuple(found), (_parameters(own),)


def _require_all_layers(given: Located, folder: Path) -> None:
    from ..checkpoints.checkpoint import open_checkpoint

    whole = open_checkpoint(folder)
    names = [name for part in whole.components for name in whole.shapes(part)]
    layers = 1 + max((int(found[1]) for name in names if (found := LAYER.search(name))), default=-1)
    if given.plain != [0, layers]:
        raise given.wrong(
            f"`layer_range` is {shown(given.plain)}, but only all layers of a model are merged here: [0, {layers}]"
        )


def _source(one: Located, keys: Sequence[str], model: Callable[[Located], str]) -> Source:
    entries = one.mapping("A model")
    for key, own in entries.items():
        if key not in keys:
            raise own.wrong(f"`{key}` of a model is not done here; there are {', '.join(keys)}")
    if "model" not in entries:
        raise one.wrong("there is no `model` in this entry")
    return Source(model(entries["model"]), (_parameters(entries),), one)


def _model(one: Located, folder: Path, known: Sequence[str]) -> str:
    """The path of a model, or the name of an earlier merge."""
    text = one.plain
    if isinstance(text, dict) and set(text) <= {"model", "path"}:
        text = text.get("path") or text.get("model")
        text = text.get("path") if isinstance(text, dict) and set(text) == {"path"} else text
    if not isinstance(text, str) or not text:
        raise one.wrong(f"the model is {shown(one.plain)}, but it is the path of a folder or file here")
    if text in known or (folder / Path(text).expanduser()).exists():
        return text
    if "+" in text:
        raise one.wrong(f"{shown(text)} is a model with a LoRA, which is not merged in here; do that first")
    if not REPO.fullmatch(text.removeprefix("hf://")):
        raise one.wrong(
            f"there is no {shown(text)}; give the path of its folder (relative to this file), or OWNER/NAME on the Hub"
        )
    from ..checkpoints.hub import local  # late: torch

    try:
        return str(local(f"hf://{text.removeprefix('hf://')}").absolute())
    except CheckpointError as error:
        raise one.wrong(
            f"there is no {shown(text)} beside this file, and {str(error).rstrip('.')}"
        ) from error


TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json")
"""Files of a tokenizer."""


def _tokenizer(folder: Path) -> dict[str, bytes]:
    files = (file for pattern in TOKENIZER for file in folder.glob(pattern))
    return {file.name: file.read_bytes() for file in files if file.is_file()}


def _written(wanted: Wanted, first: str) -> dict[str, Any]:
    """The type of the result; what is asked about its tokenizer is what is done, or refused."""
    top, told = wanted.top, {}
    for key in ("dtype", "out_dtype"):
        if key in top and top[key].plain is not None:
            if top[key].plain not in TYPES:
                raise top[key].wrong(
                    f"`{key}` is {shown(top[key].plain)}, but it is {', '.join(list(TYPES)[:3])} here"
                )
            told["dtype"] = TYPES[top[key].plain]
    source = top.get("tokenizer_source")
    if "tokenizer" in top and top["tokenizer"].plain is not None:
        own = top["tokenizer"].mapping("`tokenizer`")
        for key, one in own.items():
            if key != "source" and one.plain is not None:
                raise one.wrong(
                    f"`{key}` of a tokenizer is not done here; the result has that of its first model"
                )
        source = own.get("source")
    if source is not None and source.plain is not None:
        base = wanted.base.model if wanted.base is not None else None
        meant = base if source.plain == "base" and base is not None else str(source.plain)
        known = meant == first or wanted.like(meant).is_dir()
        if not known or _tokenizer(wanted.like(meant)) != _tokenizer(wanted.like(first)):
            raise source.wrong(
                f"the tokenizer is that of {shown(meant)}, but the result has that of {shown(first)} here, which is"
                " another"
            )
    if "chat_template" in top and top["chat_template"].plain is not None:
        raise top["chat_template"].wrong(
            "`chat_template` is not done here; the result has that of its first model"
        )
    return told
