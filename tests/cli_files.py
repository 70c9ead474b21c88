"""Narrow checkpoints for the tests of the command line, and a way to call it in this process."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import string
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rebasin.checkpoints import component_spec, load_safetensors, open_checkpoint, save_safetensors
from rebasin.checkpoints.architectures import build
from rebasin.checkpoints.layouts import single_file
from rebasin.checkpoints.reduced_width import REDUCED_WIDTH, reduced_configs
from rebasin.cli import main

IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


def rebasin(*arguments: object, expect: int = 0, entry: Callable[[], None] = main) -> str:
    """Run the command in this process; its output, errors included."""
    text = io.StringIO()
    code = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rebasin", *map(str, arguments)])
        patch.setenv("COLUMNS", "200")
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            try:
                entry()
            except SystemExit as stop:
                code = int(stop.code or 0)
    assert code == expect, text.getvalue()
    return text.getvalue()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def content(path: Path) -> tuple[str, bytes]:
    """Header and tensors of a safetensors file, but for the seconds that its making took."""
    whole = path.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    return re.sub(r'seconds\\": [\d.e+-]+', "", whole[8:begin].decode()).rstrip(), whole[begin:]


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a file; a file that has not changed is read once."""
    return dict(_read(path, path.stat().st_mtime_ns))


@lru_cache(maxsize=4)
def _read(path: Path, changed: int) -> dict[str, Tensor]:
    return dict(load_safetensors(path))


def small_tokenizer(folder: Path, tokens: int = 64) -> Path:
    """A tokenizer's folder with so many tokens (at least 56): letters, letters that end a word, start and end."""
    from transformers import CLIPTokenizer

    letters = ["!", *string.ascii_lowercase]
    known = [*letters, *(f"{letter}</w>" for letter in letters)]
    known += [f"<{n}>" for n in range(tokens - len(known) - 2)]
    vocabulary: Any = {token: n for n, token in enumerate([*known, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=vocabulary, model_max_length=77).save_pretrained(folder)
    return folder


class Files:
    """A, its planted copy B, a fine-tune F and a LoRA of B, narrow; nothing here is ever to change.

    `parts`: the components; without the UNet everything takes a moment. `plant=False`: B is a copy as it is.
    """

    def __init__(
        self,
        folder: Path,
        parts: tuple[str, ...] = ("unet", "vae", "text_encoder"),
        plant: bool = True,
        family: str = "sd1",
    ) -> None:
        torch.manual_seed(0)
        states: dict[str, dict[str, Tensor]] = {}
        for name, config in reduced_configs(family, REDUCED_WIDTH[family], depth=1, vocabulary=64).items():
            if name in parts:
                fresh = build(name, config, "cpu")[0].state_dict()
                states[name] = {n: t + 0.05 * torch.randn_like(t) for n, t in fresh.items()}
        ids = {IDS: torch.arange(77)[None].float()} if family == "sd1" else {}
        extra = {"model_ema.decay": torch.tensor(0.5), "betas": torch.ones(4)}
        self.a, self.b, self.f = (folder / f"{name}.safetensors" for name in "abf")
        whole = dict(single_file(family, states)) | ids | extra
        save_safetensors(
            self.a, whole, {"modelspec.title": "A", "modelspec.hash_sha256": "stale"}, keep_order=True
        )
        checkpoint = open_checkpoint(self.a)
        # Deriving and proving the UNet's symmetries takes the most time by far.
        self.planted = {name: component_spec(checkpoint, name).random(5) for name in states if plant}
        moved = states | {name: p.apply(states[name]) for name, p in self.planted.items()}
        save_safetensors(self.b, dict(single_file(family, moved)) | ids)
        tuned = {
            n: {k: t + 1e-3 * torch.randn_like(t) for k, t in part.items()} for n, part in states.items()
        }
        save_safetensors(self.f, dict(single_file(family, tuned)) | ids)
        self.lora = folder / "lora.safetensors"
        block = "down_blocks_0_attentions_0" if family == "sd1" else "down_blocks_1_attentions_0"
        q = f"lora_unet_{block}_transformer_blocks_0_attn1_to_q"
        text = "te" if family == "sd1" else "te1"
        v = f"lora_{text}_text_model_encoder_layers_0_mlp_fc1"
        out, width = states["text_encoder"]["text_model.encoder.layers.0.mlp.fc1.weight"].shape
        channels = REDUCED_WIDTH[family] * (1 if family == "sd1" else 2)
        factors = {
            f"{q}.lora_down.weight": torch.randn(2, channels),
            f"{q}.lora_up.weight": torch.randn(channels, 2),
            f"{q}.alpha": torch.tensor(2.0),
            f"{v}.lora_down.weight": torch.randn(2, width),
            f"{v}.lora_up.weight": torch.randn(out, 2),
        }
        save_safetensors(self.lora, factors, {"ss_network_dim": "2"})
        self.all = [self.a, self.b, self.f, self.lora]
        self.digests = [digest(path) for path in self.all]

    def check_untouched(self) -> None:
        assert [digest(path) for path in self.all] == self.digests
