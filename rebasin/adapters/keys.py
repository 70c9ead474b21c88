"""What adapter files call their tensors: kohya's sd-scripts, diffusers (PEFT and before) and LyCORIS."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import AdapterError, shown
from ..types import brief

FACTORS = {
    r"\.lora_down\.weight|[._]lora\.down\.weight|\.lora_linear_layer\.down\.weight": "down",
    r"\.lora_up\.weight|[._]lora\.up\.weight|\.lora_linear_layer\.up\.weight": "up",
    r"\.lora_mid\.weight": "mid",
    r"\.lora_A(?:\.\w+)?\.weight": "down",
    r"\.lora_B(?:\.\w+)?\.weight": "up",
    r"\.lora_B(?:\.\w+)?\.bias|\.lora_up\.bias|[._]lora\.up\.bias": "bias",
    r"\.lora_embedding_A(?:\.\w+)?": "embedding_down",
    r"\.lora_embedding_B(?:\.\w+)?": "embedding_up",
    r"\.lora_magnitude_vector(?:\.\w+)?(?:\.weight)?": "magnitude",
    r"\.dora_scale": "dora_scale",
    r"\.alpha|\.lora_alpha|[._]lora\.alpha|\.scale": "constant",
    r"\.(hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t[12]|diff_b|diff|w_norm|b_norm|on_input)": "",
}
"""The end of a key, and the factor it means ("": the group's own text)."""

REFUSED = {
    r"oft_(?:blocks|diag|R|diff)|boft_\w+|\.oft_|\.R$": "OFT",
    r"\.(?:[ab][12]|bm)\.weight": "GLoRA",
    r"\.(?:q_layer|p_layer)\.weight|\.lambda_layer": "T-LoRA",
    r"vera_lambda_\w+": "VeRA",
}
"""Methods whose factors turn or mix neurons, so that no permutation of the factors does what is needed."""

EXTRA = re.compile(r"bundle_emb\.")
"""What trainers put into the same file: embeddings of new tokens."""

NUMBERED = re.compile(r"\w+:\d+:(?:up|down)")
"""cloneofsimo's names: the modules in the order in which his code finds them."""

_FACTOR = re.compile("(?:" + "|".join(f"(?P<_{i}>{p})" for i, p in enumerate(FACTORS)) + ")$")
_REFUSED = re.compile("(?:" + "|".join(f"(?P<_{i}>{p})" for i, p in enumerate(REFUSED)) + ")$")


@brief
@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter file holds: the modules of each kind ("LoRA", "LoHa", ...) and component, and the ranks."""

    kinds: Mapping[str, int]
    components: Mapping[str, int]
    ranks: tuple[int, ...]
    naming: str


def split_key(key: str) -> tuple[str, str] | None:
    """(module, factor) of an adapter's key, or None if the key is none.

    Raises:
        AdapterError: the key is that of a method that permutations can't act on.
    """
    if NUMBERED.fullmatch(key):
        raise AdapterError(
            f"Tensor {shown(key)} is of a LoRA in cloneofsimo's layout, whose modules have numbers, not names;"
            " convert it to kohya's or diffusers' layout first."
        )
    if found := _REFUSED.search(key):
        method = list(REFUSED.values())[int(str(found.lastgroup)[1:])]
        raise AdapterError(
            f"Tensor {shown(key)} is part of a {method} adapter, whose factors a permutation can't act on; merge the"
            " adapter into its model before aligning."
        )
    found = _FACTOR.search(key)
    if found is None:
        # IA3 keeps a plain `weight` beside `on_input`.
        return (key.removesuffix(".weight"), "ia3") if key.endswith(".weight") else None
    factor = list(FACTORS.values())[int(str(found.lastgroup)[1:])]
    return key[: found.start()], factor or found[0].removeprefix(".")


def is_adapter(names: Iterable[str]) -> bool:
    """Whether a file with tensors of these names is an adapter (LoRA, LyCORIS), not a model."""
    keys = [name for name in names if not EXTRA.match(name)]
    own = [bool(_FACTOR.search(name) or _REFUSED.search(name) or NUMBERED.fullmatch(name)) for name in keys]
    return bool(own) and 2 * sum(own) >= len(own)  # IA3 has a plain weight beside each `on_input`


def kind_of(factors: Iterable[str]) -> str:
    """What people call an adapter's module that has these factors."""
    factors = set(factors)
    doras = " with DoRA" if factors & {"magnitude", "dora_scale"} else ""
    for start, name in (("hada", "LoHa"), ("lokr", "LoKr"), ("diff", "full difference"), ("ia3", "IA3")):
        if any(factor.startswith(start) for factor in factors):
            return name + doras
    if factors & {"w_norm", "b_norm"}:
        return "norm"
    return ("LoCon" if "mid" in factors else "LoRA") + doras
