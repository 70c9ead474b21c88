"""Configurations of reduced width: the same blocks under the same names, with fewer channels, heads and words.

What an entry of a configuration measures is told by its name: heads are counted, some sizes are those of a head, the
others grow with the whole width. All are divided alike, so their ratios stay: four queries to a key, an inner layer
four times as wide.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product
from math import ceil, gcd, prod
from typing import Any

import torch

from ...errors import CheckpointError
from .examples import example
from .known import Config, Known, built

COUNTS = re.compile(r"(^|_)(n|num|attention|kv|key_value)_heads?(_kv)?$|^n_head(_kv)?$|^num_(kv_)?heads$")
"""Entries that count heads."""

PER_HEAD = re.compile(
    r"(^|_)head_(dim|size)$|^d_kv$|^kv_channels$|^(rotary|rope)_dim$|^axes_dims?(_rope)?$"
    r"|^rope_(axes_dim|dim_list|freq_dim)$|^mrope_section$"
)
"""Sizes of one head."""

WIDTHS = re.compile(
    r"(hidden|intermediate|proj|projection|embedding|inner|pooler\w*|mlp)_sizes?$|(^|_)dims?$|^n_(embd|inner)$"
    r"|^d_(model|ff)$|_(channels|rank|features)$|^width$|^q_dim$|^ffn_hidden_size$"
)
"""Sizes that grow with the width."""

KEPT = re.compile(r"^(in|out|num|latent|audio|image)_channels$|^num_mel|patch|^freq_dim$|^time_freq|^rope_")
"""Sizes that inputs have, or that are no widths."""

EXPERTS = re.compile(r"^(num|n)_(local_|routed_)?experts$")
"""Counts of experts."""

GROUPS = re.compile(r"(^|_)(norm_)?(num_)?groups$")
"""Counts of groups that norms divide widths into."""

LEVELS = re.compile(r"^(\w+_)?block_out_channels$")
"""The widths that norms divide, of a network of several levels."""

ALONE = (64, 32, 16, 8, 4, 2)
"""What widths are divided by where heads stay as they are."""

VOCABULARY = re.compile(r"^vocab_size$|^n_vocab$")

FEW_WORDS = 96

TOKEN = re.compile(r"token_ids?$|_tokens?_id$|^(bos|eos|pad)_|_suppress_tokens$|_token_index$")

LABELS = ("id2label", "label2id")

LEAST, SMALL = 8, 16
"""Channels that a head keeps at least, and sizes that are small already."""

ENOUGH = 150_000_000
"""Parameters of a model that is computed with as it is."""


def narrow(what: Known) -> Known:
    """The narrowest configuration that was found under which the class has the same tensors, by name and number of
    axes, and can be called.

    Raises:
        CheckpointError: none was found, and the model is too large to be computed with in float64 as it is.
    """
    full = shapes_under(what)
    for config in candidates(what.config):
        small = what.with_config(config)
        try:
            found = shapes_under(small)
            alike = found.keys() == full.keys() and all(len(found[n]) == len(full[n]) for n in full)
            if alike and sum(map(prod, found.values())) <= ENOUGH and _runs(small):
                return small
        except Exception:  # whatever the class makes of sizes that do not fit each other
            continue
    if sum(map(prod, full.values())) <= ENOUGH:
        return what
    raise CheckpointError(
        f"No narrow twin of {what.title} could be made, on which its symmetries would be proved; describe the network"
        " yourself (model=own, docs/own_model.md)."
    )


def in_double(what: Known) -> Known:
    """A model with experts, which multiplies them in the type of its weights: the products of its library are in single
    precision. Other models as they are.
    """
    if what.library != "transformers" or not any(
        EXPERTS.search(key) for part in _parts(what.config) for key in part
    ):
        return what
    return what.with_config({**what.config, "experts_implementation": "batched_mm"})


def shapes_under(what: Known) -> dict[str, torch.Size]:
    """Name -> shape of the tensors of a class under its configuration; no memory is taken for them."""
    with torch.device("meta"):
        model = built(what, what.name)
    return {name: t.shape for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}


def _runs(what: Known) -> bool:
    with torch.random.fork_rng(), torch.no_grad():
        model = built(what, what.name)
        model(**example(model))
    return True


def candidates(config: Config) -> Iterator[Config]:
    """Configurations with fewer channels and heads, the narrowest first; at last those with the same heads."""
    counts = {n for n in _numbers(config, COUNTS) if n > 1}
    heads = _numbers(config, PER_HEAD) or {
        w // n
        for part in _parts(config)
        for w in _numbers(part, WIDTHS)
        for n in _own(part, COUNTS)
        if w % n == 0
    }
    common, sizes = gcd(*counts) if counts else 1, gcd(*heads) if heads else 0
    fewer = [g for g in range(common, 0, -1) if common % g == 0 and all(n // g > 1 for n in counts)] or [1]
    thinner = [f for f in range(sizes, 0, -1) if sizes % f == 0 and _stands(heads, f)]
    for f, g in product(thinner[:4], fewer[:3]):
        yield _divided(config, f, g, f * g)
    for by in ALONE:
        yield _divided(config, 1, 1, by)


def _stands(heads: set[int], by: int) -> bool:
    """Whether sizes of heads can be divided so: rotations turn pairs, and a head is to keep some channels."""
    return all(n // by % 2 == 0 for n in heads) and max(heads) // by >= LEAST


def _divided(config: Config, thinner: int, fewer: int, narrower: int) -> Config:
    """A configuration with the sizes of heads, their counts and widths divided by these."""

    def changed(key: str, value: Any, change: Callable[[int], int]) -> Any:
        if isinstance(value, list | tuple):
            return [changed(key, one, change) for one in value]
        return change(value) if isinstance(value, int) and not isinstance(value, bool) else value

    made: dict[str, Any] = {}
    words = min([FEW_WORDS, *(n for n in _numbers(config, VOCABULARY))])
    for key, value in config.items():
        if isinstance(value, Mapping) and key not in LABELS:
            made[key] = _divided(value, thinner, fewer, narrower)
        elif VOCABULARY.search(key):
            made[key] = changed(key, value, lambda n: min(n, FEW_WORDS))
        elif TOKEN.search(key):
            made[key] = changed(key, value, lambda n: min(n, words - 1))
        elif COUNTS.search(key):
            made[key] = changed(key, value, lambda n: max(1, n // fewer))
        elif PER_HEAD.search(key):
            made[key] = changed(key, value, lambda n: n // thinner)
        elif WIDTHS.search(key) and not KEPT.search(key):
            made[key] = changed(key, value, lambda n: n if n < SMALL else 2 * ceil(n / (2 * narrower)))
        else:
            made[key] = value
    for key in made:
        if GROUPS.search(key):
            levels = _own(made, LEVELS) or _own(made, WIDTHS)
            made[key] = changed(key, made[key], partial(_dividing, levels))
    return made


def _dividing(widths: set[int], groups: int) -> int:
    """As many groups as all widths can be divided into, of two channels at least; with one all is another network."""
    return next(
        (
            n
            for n in range(groups, 0, -1)
            if groups % n == 0 and all(w % n == 0 and w // n > 1 for w in widths)
        ),
        1,
    )


def _parts(config: Config) -> Iterator[Config]:
    """A configuration and those in it."""
    yield config
    for key, value in config.items():
        if isinstance(value, Mapping) and key not in LABELS:
            yield from _parts(value)


def _own(config: Config, key: re.Pattern[str]) -> set[int]:
    """The numbers of a configuration's own entries of this kind."""
    found: set[int] = set()
    for name, value in config.items():
        if key.search(name) and not (key is WIDTHS and KEPT.search(name)):
            values = value if isinstance(value, list | tuple) else [value]
            found |= {n for n in values if isinstance(n, int) and not isinstance(n, bool) and n > 0}
    return found


def _numbers(config: Config, key: re.Pattern[str]) -> set[int]:
    """The same of all configurations in it."""
    return set[int]().union(*(_own(part, key) for part in _parts(config)))
