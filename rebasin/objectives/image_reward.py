"""ImageReward (Xu et al., 2304.05977), the real package, as a differentiable scorer of images and prompts.

Needs the extra `reward`. The package was written for transformers 4; what it misses in newer ones is given to
it while it is imported, and its scores are then the same to the last printed digit. Its own loader ignores
weights that are missing or that it does not know, so that a wrong file would score noise; this one does not.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from ..vision import prepare_torchvision

TOKENS = 35  # prompts are cut off there, as ImageReward was trained
SIDE = 224
MEAN, SPREAD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

BERT = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30524,
    "encoder_width": 768,
    "add_cross_attention": True,
}
"""BLIP's text encoder, which ImageReward's med_config.json describes."""

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
        scores = model.score_gard(tokens.input_ids, tokens.attention_mask, seen)
        return scores[:, 0].float().to(images.device)


def preprocess(images: Tensor) -> Tensor:
    """Images [n, 1 or 3, height, width] in 0..1 -> what the model sees, [n, 3, 224, 224]."""
    images = images.float().expand(-1, 3, -1, -1)
    height, width = images.shape[2:]
    scale = SIDE / min(height, width)
    size = (max(SIDE, round(height * scale)), max(SIDE, round(width * scale)))
    if size != (height, width):
        images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    images = images[:, :, top : top + SIDE, left : left + SIDE]
    mean, spread = (torch.tensor(v, device=images.device).reshape(3, 1, 1) for v in (MEAN, SPREAD))
    return (images - mean) / spread


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
        CheckpointError: the file is missing, or is not ImageReward's: it names a tensor that is missing, unknown
            or of another shape.
        ConfigError: the extra `reward` is not installed, or there is no vocabulary.
    """
    from accelerate import init_empty_weights

    state = _read(Path(weights))
    with init_empty_weights(include_buffers=False):
        model = build(vocabulary)
    expected = model.state_dict()
    for problem, names in (
        ("lacks the tensor", expected.keys() - state.keys()),
        ("has the unknown tensor", state.keys() - expected.keys()),
        (
            "has another shape for",
            {n for n in expected.keys() & state.keys() if expected[n].shape != state[n].shape},
        ),
    ):
        names = sorted(set(names) - set(BUFFERS))
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"{weights} is not ImageReward's: it {problem} {names[0]!r}{more}.")
    model.load_state_dict(
        {name: tensor.to(dtype) for name, tensor in state.items() if name not in BUFFERS},
        strict=False,  # it was checked above; the buffers are made by the model itself
        assign=True,
    )
    return ImageReward(model.to(device))


def build(vocabulary: str | Path | None = None) -> nn.Module:
    """The library's model with random weights: 447 M parameters, 1.8 GB in float32.

    Its head starts so small that all scores are equal up to rounding.

    Raises:
        ConfigError: the extra `reward` is not installed, or there is no vocabulary.
    """
    library, pretrain = _library()
    tokenizer = _tokenizer(vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "med_config.json"
        config.write_text(json.dumps(BERT), encoding="utf-8")
        with _replaced(pretrain, "init_tokenizer", lambda: tokenizer):
            return library.ImageReward(med_config=str(config), device="cpu").eval()


def _read(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}: give the ImageReward.pt of the authors.")
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
            f"BERT's vocabulary can't be read ({_first_line(error)}): give vocab.txt of bert-base-uncased."
        ) from error
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    tokenizer.enc_token_id = tokenizer.convert_tokens_to_ids("[ENC]")
    if len(tokenizer) != BERT["vocab_size"]:
        raise ConfigError(
            f"The vocabulary has {len(tokenizer) - 2:,} words instead of the {BERT['vocab_size'] - 2:,} of"
            " bert-base-uncased."
        )
    return tokenizer


# The library ------------------------------------------------------------------------------------------------


def _library() -> tuple[Any, Any]:
    """The library's modules with ImageReward and with BLIP_Pretrain.

    Its `__init__` files also import CLIP and a trainer, which need more packages and nobody here; so the modules
    are imported under empty packages of the same names.
    """
    found = find_spec("ImageReward")
    if found is None or not found.submodule_search_locations:
        raise ConfigError("ImageReward is not installed: pip install 'git-rebasin[reward]'.")
    prepare_torchvision()
    root = Path(next(iter(found.submodule_search_locations)))
    for name, folder in (("ImageReward", root), ("ImageReward.models", root / "models")):
        if name not in sys.modules:
            package = types.ModuleType(name)
            package.__path__ = [str(folder)]
            sys.modules[name] = package
    with _transformers_4(), warnings.catch_warnings():  # the library silences all warnings for good
        med = importlib.import_module("ImageReward.models.BLIP.med")
        pretrain = importlib.import_module("ImageReward.models.BLIP.blip_pretrain")
        library = importlib.import_module("ImageReward.ImageReward")
    base = med.BertPreTrainedModel
    if not hasattr(base, "invert_attention_mask"):
        base.invert_attention_mask = _invert_attention_mask
    if not hasattr(base, "get_head_mask"):
        base.get_head_mask = _get_head_mask
    if "all_tied_weights_keys" not in vars(base):
        base.all_tied_weights_keys = {}  # what newer versions of transformers ask for while they tie weights
    return library, pretrain


@contextmanager
def _transformers_4() -> Iterator[None]:
    """The names that the library imports from where transformers 4 had them; taken away again afterwards."""
    from transformers import modeling_utils, pytorch_utils
    from transformers.utils import logging

    given = {
        "apply_chunking_to_forward": pytorch_utils.apply_chunking_to_forward,
        "prune_linear_layer": getattr(pytorch_utils, "prune_linear_layer", _no_pruning),
        "find_pruneable_heads_and_indices": _no_pruning,
    }
    missing = [name for name in given if not hasattr(modeling_utils, name)]
    verbosity = logging.get_verbosity()
    try:
        for name in missing:
            setattr(modeling_utils, name, given[name])
        yield
    finally:
        for name in missing:
            delattr(modeling_utils, name)
        logging.set_verbosity(verbosity)


def _no_pruning(*_: Any) -> Any:
    raise NotImplementedError(
        "ImageReward's attention heads can't be pruned with this version of transformers"
    )


def _invert_attention_mask(self: nn.Module, mask: Tensor) -> Tensor:
    """1 for what may be attended to, 0 for what may not -> what is added to the attention's logits."""
    dtype = next(self.parameters()).dtype
    mask = mask[:, None, :, :] if mask.ndim == 3 else mask[:, None, None, :]
    return (1.0 - mask.to(dtype)) * torch.finfo(dtype).min


def _get_head_mask(self: nn.Module, mask: Tensor | None, layers: int, *_: Any) -> list[None]:
    if mask is not None:
        raise NotImplementedError("ImageReward's attention heads can't be masked here")
    return [None] * layers


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
