"""Inputs of the classes of transformers: by what a class calls its main input, and what it can't do without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .facts import WORDS, Facts, Rule, Untold, floats, ids

TOKENS = 7
"""In a text; a decoder beside an encoder has `WORDS`."""
_SOUND_FRAMES = 6
"""That the convolutions of a model of sound leave."""


def _text_config(facts: Facts) -> Facts:
    """The part of the configuration that is of text."""
    get = getattr(facts.config, "get_text_config", None)
    return facts.within(get()) if get is not None else facts


def _vision_config(facts: Facts) -> Facts:
    vision = facts.get("vision_config")
    return facts if vision is None else facts.within(vision)


def _tokens(facts: Facts) -> Tensor:
    found = ids(TOKENS, _text_config(facts).number("vocab_size"))
    end = facts.get("eos_token_id")
    if _reads_ends(facts) and isinstance(end, int):
        found[:, -1] = end
    return found[:, None] if facts.name.endswith("ForMultipleChoice") else found


def _reads_ends(facts: Facts) -> bool:
    """Whether a class reads what its decoder says of the end of the text, which then is the decoder's, too."""
    return bool(facts.get("is_encoder_decoder")) and facts.name.endswith("ForSequenceClassification")


def _decoder_tokens(facts: Facts) -> Tensor:
    return ids(WORDS, _text_config(facts).number("vocab_size", "decoder_vocab_size"))


def _pixels(facts: Facts) -> Tensor:
    vision = _vision_config(facts)
    size = vision.get("image_size", default=32)
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[-1]))
    return floats(1, vision.get("num_channels", default=3), height, width)


def _spectrogram(facts: Facts) -> Tensor:
    bins = facts.number("num_mel_bins", "input_feat_per_channel", "feature_size")
    places = facts.get("max_source_positions", default=8)
    return floats(1, bins, 2 * places)


def _samples(facts: Facts) -> Tensor:
    kernels, strides = facts.get("conv_kernel"), facts.get("conv_stride")
    if kernels is None or strides is None:
        raise Untold("no 'conv_kernel' and 'conv_stride'")
    length = _SOUND_FRAMES
    for kernel, stride in zip(reversed(list(kernels)), reversed(list(strides)), strict=True):
        length = (length - 1) * stride + kernel
    return floats(1, length)


_MAIN: dict[str, Rule] = {
    "input_ids": _tokens,
    "pixel_values": _pixels,
    "input_features": _spectrogram,
    "input_values": _samples,
}
"""By what a class calls its main input."""


def rules(facts: Facts) -> Callable[[str], Rule | None]:
    """The rule of each argument of this model's forward pass."""
    main = getattr(type(facts.model), "main_input_name", "input_ids")
    made: dict[str, Rule] = {"use_cache": lambda f: False}

    def unknown(_: Facts) -> Any:
        raise Untold(f"a main input {main!r}, of which nothing is known")

    made[main] = _MAIN.get(main, unknown)
    if facts.get("is_encoder_decoder") and not _reads_ends(facts):
        made["decoder_input_ids"] = _decoder_tokens
    if main == "input_ids" and hasattr(facts.model, "logit_scale") and facts.get("vision_config") is not None:
        made["pixel_values"] = _pixels  # an encoder of texts beside one of images
    return lambda argument: made.get(argument)
