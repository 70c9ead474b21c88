"""Our reading of adapters against that of the libraries that write them, where they are installed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rebasin.adapters.factors import Moves, move_factor
from rebasin.adapters.keys import split_key
from rebasin.adapters.lokr import move_lokr
from rebasin.errors import AdapterError

LAYERS = {"linear": nn.Linear(12, 8), "conv3": nn.Conv2d(12, 8, 3), "conv1": nn.Conv2d(12, 8, 1)}
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("locon.LoConModule", {}),
    ("locon.LoConModule", {"use_tucker": True}),
    ("loha.LohaModule", {}),
    ("loha.LohaModule", {"use_tucker": True}),
    ("lokr.LokrModule", {"factor": 2}),
    ("lokr.LokrModule", {"factor": 2, "use_tucker": True}),
    ("lokr.LokrModule", {"factor": 2, "decompose_both": True}),
    ("lokr.LokrModule", {"factor": 2, "full_matrix": True}),
]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", range(len(KINDS)), ids=lambda k: f"{KINDS[k][0]} {KINDS[k][1]}")
def test_moved_module_computes_the_same(kind: int, layer: str, dora: bool) -> None:
    pytest.importorskip("lycoris")
    import importlib

    path, options = KINDS[kind]
    file, _, name = path.partition(".")
    module_class = getattr(importlib.import_module(f"lycoris.modules.{file}"), name)
    locon = importlib.import_module("lycoris.modules.locon").LoConModule
    own = LAYERS[layer]
    rank = 1 if name == "LokrModule" else 2
    module = module_class("x", own, lora_dim=rank, alpha=1, weight_decompose=dora, **options)
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    state = {key: t.detach().clone() for key, t in module.custom_state_dict().items()}
    factors = {pair[1]: t for key, t in state.items() if (pair := split_key(f"x.{key}"))}
    rng = np.random.default_rng(0)
    rows, columns = rng.permutation(8), rng.permutation(12)
    moves = Moves(tuple(own.weight.shape), rows, columns)
    try:
        if name == "LokrModule":
            moved = move_lokr("x", factors, moves, unfold=True)
        else:
            moved = {f: move_factor("x", f, t, moves, factors) for f, t in factors.items()}
    except AdapterError as error:
        assert dora and "DoRA" in str(error)
        return

    aligned: Any = nn.Linear(12, 8) if layer == "linear" else nn.Conv2d(12, 8, own.kernel_size)  # type: ignore[arg-type]
    aligned.weight.data = own.weight.data[rows][:, columns]
    aligned.bias.data = own.bias.data[rows]  # pyright: ignore
    x = torch.randn(2, 12) if layer == "linear" else torch.randn(2, 12, 5, 5)
    expected = module.eval()(x)[:, rows]
    if "diff" in moved:
        aligned.weight.data += moved["diff"]
        found: Tensor = aligned(x[:, columns])
    else:
        plain = "up" in moved
        rank = moved["down"].shape[0] if plain else rank
        alpha = float(moved["constant"])
        again = (locon if plain else module_class)(
            "x",
            aligned,
            lora_dim=rank,
            alpha=alpha,
            weight_decompose=dora,
            **({"use_tucker": "mid" in moved} if plain else options),
        )
        for key, parameter in again.named_parameters():
            if factor := split_key(f"x.{key}"):
                parameter.data = moved[factor[1]]
        found = again.eval()(x[:, columns])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
