"""ImageReward (Xu et al., 2304.05977), the real package, as a differentiable scorer of images and prompts.

Needs the extra `reward`. The package's own loader ignores weights that are missing, so that a wrong file would score
noise; this one does not.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from string import ascii_lowercase, digits, punctuation
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from ..integrations.huggingface import quiet
from ..tensors.modules import find_device
from .image_reward_library import library

WHERE = "https://huggingface.co/THUDM/ImageReward/resolve/main/ImageReward.pt"
WHERE_VOCABULARY = "https://huggingface.co/google-bert/bert-base-uncased/resolve/main/vocab.txt"
RANDOM = "random"

TOKENS = 35  # prompts are cut off there, as ImageReward was trained
SIDE = 224
MEAN, SPREAD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

BERT = {"vocab_size": 30524, "encoder_width": 768, "add_cross_attention": True}
"""BLIP's text encoder, which ImageReward's med_config.json describes, where it is not transformers' BertConfig()."""

BUFFERS = ("blip.text_encoder.embeddings.position_ids",)
"""Constants that some versions of the library save and others do not."""


class ImageReward:
    """Scores [n] of images [n, 1 or 3, height, width] in 0..1 for n prompts; higher is better.

    About 0 for an average image, 1 for one that is a standard deviation better. Differentiable with respect to
    the images, which are resized to 224 x 224 (the shorter side, then the centre) like the library does it
    with PIL images. On the device that `model` is on; scores return to that of the images.
    """

    def __init__(self, model: nn.Module) -> None:
        """`model`: from `load` or `build`; it is frozen."""
        self.model = model.eval().requires_grad_(False)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        weight = next(self.model.parameters())
        model: Any = self.model
        model.device = weight.device  # the library makes masks there
        tokens = model.blip.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(weight.device)
        seen = preprocess(images.to(weight.device)).to(weight.dtype)
        with quiet():  # of arguments that the library still gives
            scores = model.score_gard(tokens.input_ids, tokens.attention_mask, seen)
        return scores[:, 0].float().to(images.device)


def preprocess(images: Tensor) -> Tensor:
    """Images [n, 1 or 3, height, width] in 0..1 -> what the model sees, [n, 3, 224, 224].

    Sizes and offsets are rounded as torchvision's Resize and CenterCrop do it.
    """
    images = images.float().expand(-1, 3, -1, -1)
    height, width = images.shape[2:]
    short = min(height, width)
    size = (SIDE * height // short, SIDE * width // short)
    if size != (height, width):
        images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = round((size[0] - SIDE) / 2), round((size[1] - SIDE) / 2)
    images = images[:, :, top : top + SIDE, left : left + SIDE]
    mean, spread = (torch.tensor(v, device=images.device).reshape(3, 1, 1) for v in (MEAN, SPREAD))
    return (images - mean) / spread


@lru_cache(maxsize=1)
def image_reward(
    weights: str | Path | None,
    vocabulary: str | Path | None = None,
    *,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> ImageReward:
    """The scorer that the options of a run describe: `load`, or with weights "random" `random_model`.

    The last one is kept: objective and evaluation of a run share it.

    Raises:
        CheckpointError, ConfigError: as `load`; no weights are named.
    """
    device = find_device("cpu" if device is None else device)
    if weights is None:
        raise ConfigError(
            f"ImageReward needs its weights: download {WHERE} (1.8 GB) and give the file's path as weights"
            f" ({RANDOM!r} tries everything out with random ones)."
        )
    if str(weights) == RANDOM:
        warnings.warn(
            "ImageReward has random weights here: its scores mean nothing, they only show that everything works.",
            stacklevel=2,
        )
        return ImageReward(random_model(vocabulary, seed).to(device))
    return load(weights, vocabulary, device=device)


def load(
    weights: str | Path,
    vocabulary: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ImageReward:
    """ImageReward with the weights in a local file.

    Args:
        weights: ImageReward.pt from the authors (or its tensors as safetensors).
        vocabulary: BERT's vocab.txt (bert-base-uncased); by default Hugging Face's cache or hub.
        device, dtype: of the model; float32 on a CPU.

    Raises:
        CheckpointError: the file is missing, or is not ImageReward's: it names a tensor that is missing or of
            another shape. Tensors that ImageReward does not have are told as a warning.
        ConfigError: the extra `reward` is not installed, or there is no vocabulary.
    """
    from accelerate import init_empty_weights

    where, state = find_device(device), _read(Path(weights))
    with init_empty_weights(include_buffers=False):
        model = build(vocabulary)
    expected = {name: tensor for name, tensor in model.state_dict().items() if name not in BUFFERS}
    missing = sorted(expected.keys() - state.keys())
    if missing:
        raise CheckpointError(
            f"{weights} is not ImageReward's: it lacks the tensor {missing[0]!r}{_others(missing)}."
        )
    other = sorted(name for name, tensor in expected.items() if tensor.shape != state[name].shape)
    if other:
        raise CheckpointError(
            f"{weights} is not ImageReward's: {other[0]!r} has the shape {tuple(state[other[0]].shape)} instead of"
            f" {tuple(expected[other[0]].shape)}{_others(other)}."
        )
    unknown = sorted(state.keys() - expected.keys() - set(BUFFERS))
    if unknown:
        warnings.warn(
            f"{weights} also has the tensor {unknown[0]!r}{_others(unknown)}, which ImageReward does not use.",
            stacklevel=2,
        )
    # Not strict: it was checked above, and the buffers are made by the model itself.
    model.load_state_dict({name: state[name].to(dtype) for name in expected}, strict=False, assign=True)
    return ImageReward(model.to(where))


def build(vocabulary: str | Path | None = None) -> nn.Module:
    """The library's model with its own initial weights: 447 M parameters, 1.8 GB in float32.

    Its head starts so small that all scores are equal up to rounding; `random_model` changes that.

    Raises:
        ConfigError: the extra `reward` is not installed, or there is no vocabulary.
    """
    main, pretrain = library()
    tokenizer = _tokenizer(vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "med_config.json"
        config.write_text(json.dumps(BERT), encoding="utf-8")
        with _replaced(pretrain, "init_tokenizer", lambda: tokenizer):
            return main.ImageReward(med_config=str(config), device="cpu").eval()


def random_model(vocabulary: str | Path | None = None, seed: int = 0) -> nn.Module:
    """The real architecture with random weights, whose scores differ between images and between prompts.

    The vocabulary may then be missing: texts are spelt (see `letters`).
    """
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if vocabulary is None:
            vocabulary = Path(folder) / "vocab.txt"
            vocabulary.write_text("\n".join(letters()) + "\n", encoding="utf-8")
        model = build(vocabulary)
        for name, parameter in model.named_parameters():
            if name.startswith("mlp.") and parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


def letters() -> list[str]:
    """A vocabulary of BERT's size, with its special tokens in their places, that spells every word."""
    signs = ascii_lowercase + digits + punctuation
    special = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *signs, *(f"##{sign}" for sign in signs)]
    return [*words, *(f"[unused{i}]" for i in range(99, 99 + int(BERT["vocab_size"]) - 2 - len(words)))]


def _read(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(
            f"There is no file {path}: download {WHERE} (1.8 GB), or name the place where you have it."
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load raises whatever the damage leads to
        raise CheckpointError(f"{path} can't be read as weights: {_first_line(error)}.") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(
            f"{path} is not ImageReward's: it holds no plain mapping from names to tensors."
        )
    return state


def _tokenizer(vocabulary: str | Path | None) -> Any:
    """BERT's tokenizer with BLIP's two tokens, whose ids follow the 30,522 of the vocabulary."""
    from transformers import BertTokenizer

    try:
        if vocabulary is None:
            tokenizer = BertTokenizer.from_pretrained("bert-base-uncased")
        else:
            words = Path(vocabulary).read_text(encoding="utf-8").splitlines()
            tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"BERT's vocabulary can't be read ({_first_line(error)}): download {WHERE_VOCABULARY} and give the"
            " file's path as vocabulary."
        ) from error
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    tokenizer.enc_token_id = tokenizer.convert_tokens_to_ids("[ENC]")
    if len(tokenizer) != BERT["vocab_size"]:
        raise ConfigError(
            f"The vocabulary has {len(tokenizer) - 2:,} words instead of the {int(BERT['vocab_size']) - 2:,} of"
            " bert-base-uncased."
        )
    return tokenizer


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _others(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
