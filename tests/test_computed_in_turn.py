"""What a model computes is told without holding it whole, whatever its own code asks of its weights."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from rebasin.checkpoints import open_checkpoint
from rebasin.checkpoints.classes.examples import example
from rebasin.cli.function import compute
from rebasin.errors import CheckpointError

SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 32,
    "num_key_value_heads": 1,
}  # fmt: skip
LLAMA4 = {**SMALL, "intermediate_size_mlp": 24, "num_local_experts": 2, "head_dim": 8}


def computed(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    return compute(checkpoint, "model", checkpoint.component("model"))


def expected(model: Any) -> torch.Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inputs = example(model)
    with torch.no_grad():
        return model.eval()(**inputs).logits


def test_a_model_that_asks_a_weight_for_its_device(tmp_path: Path) -> None:
    model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**LLAMA4))
    model.save_pretrained(tmp_path / "m")
    torch.testing.assert_close(computed(tmp_path / "m")["output.logits"], expected(model))


@pytest.mark.parametrize("reads", [True, False])
def test_a_model_that_reads_the_weights_of_another_layer(
    reads: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = transformers.LlamaForCausalLM.forward

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = plain(self, *args, **kwargs)
        found.logits = found.logits * self.model.norm.weight.mean() if reads else found.logits.missing
        return found

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    torch.nn.init.constant_(model.model.norm.weight, 3.0)
    model.save_pretrained(tmp_path / "m")
    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", forward)
    if reads:
        torch.testing.assert_close(computed(tmp_path / "m")["output.logits"], expected(model))
    else:
        with pytest.raises(CheckpointError, match=r"can't be checked here, .*--no-check.* AttributeError"):
            computed(tmp_path / "m")
