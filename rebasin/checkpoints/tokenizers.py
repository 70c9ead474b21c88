"""The tokenizers of a checkpoint: those that are given or lie in its folder, else CLIP's, which is in `assets/`.

Single files hold none. All of Stable Diffusion's encoders read CLIP's 49,408 tokens and differ in what they fill a
prompt up with.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, shown
from ..files import PathLike, SchemaError, conform, parse
from ..integrations.huggingface import quiet
from .architectures import component_config
from .components import TEXT, TEXT_2

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

MERGES = Path(__file__).parent / "assets" / "clip_merges.txt.gz"

TOKENIZERS = {TEXT: "tokenizer", TEXT_2: "tokenizer_2"}
"""Text encoder -> the folder of its tokenizer in a pipeline's."""

START, END, ZERO = "<|startoftext|>", "<|endoftext|>", "!"
"""The first and last token of a text; OpenCLIP's encoders learned with zeros behind the last, and 0 is this token."""

LENGTH = 77
"""Tokens of a text, the first and last included."""

Merges = list[tuple[str, str]]


def byte_symbols() -> list[str]:
    """A letter for each of the 256 bytes in the order of their tokens: printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(code) for code in printable] + [chr(0x100 + n) for n in range(256 - len(printable))]


def vocabulary_of(merges: Merges) -> dict[str, int]:
    """Token -> id, in CLIP's order: bytes, bytes that end a word, what is merged, start and end."""
    symbols = byte_symbols()
    tokens = [*symbols, *(f"{s}</w>" for s in symbols), *(a + b for a, b in merges), START, END]
    return {token: number for number, token in enumerate(tokens)}


@cache
def clip_merges() -> Merges:
    """CLIP's merges, the first first."""
    with gzip.open(MERGES, "rt", encoding="utf-8") as file:
        return _pairs(file.read().splitlines())


def clip_tokenizer(padding: str = END) -> Any:
    """CLIP's tokenizer, which fills texts up with this token."""
    return _of_merges(clip_merges(), padding)


def clip_files(padding: str = END) -> dict[str, str]:
    """CLIP's tokenizer as the files of a diffusers folder, name -> text."""
    special = {"bos_token": START, "eos_token": END, "pad_token": padding, "unk_token": END}
    config = {
        **special,
        "model_max_length": LENGTH,
        "tokenizer_class": "CLIPTokenizer",
        "do_lower_case": True,
    }
    merges = [f"{a} {b}" for a, b in clip_merges()]
    return {
        "vocab.json": json.dumps(vocabulary_of(clip_merges()), ensure_ascii=False) + "\n",
        "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }


def load_tokenizer(checkpoint: Checkpoint, component: str, told: PathLike | None = None) -> Any:
    """The tokenizer of a text encoder of a checkpoint.

    Args:
        told: a pipeline's folder with `tokenizer` (and `tokenizer_2`) in it, a tokenizer's folder, a tokenizer.json,
            or merges as CLIP's repository has them (bpe_simple_vocab_16e6.txt.gz). None: that of the checkpoint's
            folder, else CLIP's.

    Raises:
        CheckpointError: it is missing or damaged, or has another vocabulary than the text encoder.
    """
    config = component_config(checkpoint, component)
    own = checkpoint.path / TOKENIZERS[component]
    if told is not None:
        place = Path(told).expanduser()
        inside = _inside(place, component)
        tokenizer = _read(inside, component, checkpoint.family)
        if (
            component == TEXT_2 and inside.name != TOKENIZERS[TEXT_2]
        ):  # the first one's, which may fill up otherwise
            _fill_with_zeros(tokenizer)
    elif checkpoint.path.is_dir() and own.is_dir():
        place = own
        tokenizer = _read(own, component, checkpoint.family)
    else:
        place = None
        tokenizer = clip_tokenizer(padding(component, checkpoint.family))
    known, has = config.get("vocab_size"), len(tokenizer)
    # A folder's encoder may have rows to spare, as some sizes are computed faster.
    if known != has and not (place is own and isinstance(known, int) and known > has):
        which = f"CLIP's, which is taken as {checkpoint.path} has none," if place is None else f"{place}"
        raise CheckpointError(
            f"The tokenizer {which} has {has:,} tokens, but the {component} of {checkpoint.path}"
            f" {_knows(known)}; give its own one as model.tokenizer=FOLDER."
        )
    tokenizer.model_max_length = min(
        tokenizer.model_max_length, int(config.get("max_position_embeddings", LENGTH))
    )
    return tokenizer


def cut(texts: Iterable[str], tokenizers: Iterable[Any]) -> str | None:
    """A sentence about texts of which a text encoder does not see the end; None if there are none.

    Args:
        tokenizers: those of a pipeline's text encoders.
    """
    own, chosen = list(dict.fromkeys(texts)), list(tokenizers)
    with quiet():  # which tell of each
        tokens = [(made(own).input_ids, made.model_max_length) for made in chosen] if own else []
    long = sum(any(len(ids[i]) > most for ids, most in tokens) for i in range(len(own)))
    if not long:
        return None
    most = min(most for _, most in tokens)
    return (
        f"{long} of {len(own)} prompts {'is' if long == 1 else 'are'} longer than the {most} tokens that a text encoder"
        " reads, and cut there."
    )


def padding(component: str, family: str) -> str:
    """The token with which texts for this encoder are filled up."""
    return END if component == TEXT and family != "sd2" else ZERO


def _fill_with_zeros(tokenizer: Any) -> None:
    if tokenizer.convert_tokens_to_ids(ZERO) == 0:
        tokenizer.pad_token = ZERO


def _knows(known: object) -> str:
    return f"knows {known:,}" if isinstance(known, int) else "knows another number"


def _inside(place: Path, component: str) -> Path:
    """The tokenizer for this encoder in a pipeline's folder (one may serve both), or `place` itself."""
    for name in (TOKENIZERS[component], *TOKENIZERS.values()):
        if (place / name).is_dir():
            return place / name
    return place


def _read(place: Path, component: str, family: str) -> Any:
    """The tokenizer of a folder or file."""
    if not place.exists():
        raise CheckpointError(f"There is no tokenizer {place}.")
    try:
        if place.is_dir():
            return _read_folder(place)
        if place.suffix == ".json":
            from transformers import CLIPTokenizer

            pad = padding(component, family)
            return CLIPTokenizer(tokenizer_file=str(place), pad_token=pad, model_max_length=LENGTH)
        opened = gzip.open if place.suffix == ".gz" else open
        with opened(place, "rt", encoding="utf-8") as file:
            # Behind CLIP's merges its file has others, which it does not use.
            lines = file.read().splitlines()
        merges = lines[1:] if lines and "#version" in lines[0] else lines
        return _of_merges(_pairs(merges[: len(clip_merges())]), padding(component, family))
    except CheckpointError:
        raise
    except Exception as error:  # what the libraries make of files that are none
        raise CheckpointError(
            f"{place} is no tokenizer that can be read: {shown(str(error) or type(error).__name__)}."
        ) from error


def _read_folder(place: Path) -> Any:
    from transformers import AutoTokenizer, CLIPTokenizer

    files = {file.name for file in place.iterdir()}
    if not files & {"tokenizer.json", "vocab.json", "tokenizer_config.json"}:
        raise CheckpointError(f"{place} has no tokenizer: neither tokenizer.json nor vocab.json.")
    told: Mapping[str, Any] = {}
    if "tokenizer_config.json" in files:
        try:
            told = conform(Mapping[str, Any], parse((place / "tokenizer_config.json").read_bytes()))
        except SchemaError as error:
            raise CheckpointError(f"{place / 'tokenizer_config.json'} is damaged: {error}.") from error
    # The class is told by name: CLIP's, or the one of a model in another language; code in a folder is never run.
    kind: Any = CLIPTokenizer if "CLIP" in str(told.get("tokenizer_class", "CLIP")) else AutoTokenizer
    return kind.from_pretrained(str(place), local_files_only=True, trust_remote_code=False)


def _pairs(lines: list[str]) -> Merges:
    pairs = [tuple(line.split()) for line in lines if line.strip()]
    if bad := next((number for number, pair in enumerate(pairs, 1) if len(pair) != 2), None):
        raise ValueError(f"merge {bad} is no pair of tokens")
    return pairs  # pyright: ignore[reportReturnType]


def _of_merges(merges: Merges, padding: str) -> Any:
    from transformers import CLIPTokenizer  # late: transformers takes seconds to import

    vocabulary: Any = vocabulary_of(merges)
    pairs: Any = merges
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, pad_token=padding, model_max_length=LENGTH)
