"""Recipes of sd-mecha: their text, and, where the package is installed, that it does what we did."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rebasin.checkpoints import save_safetensors
from rebasin.errors import ConfigError
from rebasin.merging import METHODS, block_weights, merge
from rebasin.merging.block_names import SD1
from rebasin.merging.recipes import RECIPES, recipe, save_recipe

installed = pytest.mark.skipif(importlib.util.find_spec("sd_mecha") is None, reason="needs the extra mecha")

LINES = (
    'version 0.1.0\nmodel "a.safetensors" model_config="sd1-ldm" merge_space="weight"\nmodel "b.safetensors" '
    + ('model_config="sd1-ldm" merge_space="weight"\n')
)
NAMES = [f"model.diffusion_model.input_blocks.{i}.w" for i in range(12)] + [
    "model.diffusion_model.middle_block.0.w"
]
NAMES += [f"model.diffusion_model.output_blocks.{i}.w" for i in range(12)] + ["cond_stage_model.w"]


def text(method: str, **given: Any) -> str:
    return recipe(method, ["a.safetensors", "b.safetensors"], architecture="sd1-ldm", **given)


def test_the_text_of_a_recipe(tmp_path: Path) -> None:
    assert text("slerp", weights=0.3) == LINES + 'merge "slerp" &0 &1 alpha=0.3'
    assert text("weighted_sum", weights=0.3).endswith('merge "weighted_sum" &0 &1 alpha=0.3')
    assert text("add_difference", base="c.st", clamp=True).splitlines()[3:] == [
        'model "c.st" model_config="sd1-ldm" merge_space="weight"',
        'merge "subtract" &1 &2',
        'merge "add_difference" &0 &3 alpha=1.0',
        'merge "clamp" &4 &0 &1',
    ]
    saved = save_recipe(tmp_path / "x.mecha", "uniform_soup", ["a b.st", 'q"u.st'])
    assert saved.read_text().splitlines()[1:3] == [
        'model "a b.st" model_config=null merge_space="weight"',
        'model "q\\"u.st" model_config=null merge_space="weight"',
    ]
    assert "# sd-mecha's ties_sum keeps one value more" in text("ties_sum", base="c.st")
    assert "#" not in text("ties_sum", base="c.st", k=1.0)


def test_block_weights_become_its_blocks() -> None:
    found = text("slerp", weights=block_weights("IN00=1, M00=0.25, default=0.5", NAMES))
    dictionary = "dict " + " ".join(f"{b}={ {'IN00': 1.0, 'M00': 0.25}.get(b, 0.5) }" for b in SD1)
    assert found.splitlines()[3:] == [
        dictionary,
        'literal &2 model_config="sd1-supermerger_blocks" merge_space=null',
        'merge "convert_sd1_blocks_to_ldm" &3',
        'merge "slerp" &0 &1 alpha=&4',
    ]
    with pytest.raises(ConfigError, match="need an architecture, one of sd1-ldm"):
        recipe("slerp", ["a", "b"], weights=block_weights("GRAD_V", NAMES))
    mixed = block_weights(
        {"default": 0.5, "re:middle.*w$": 1}, [*NAMES, "model.diffusion_model.middle_block.1.v"]
    )
    with pytest.raises(ConfigError, match="does not fit 'M00'"):
        text("slerp", weights=mixed)


def test_what_sd_mecha_can_not_do_is_told() -> None:
    assert set(METHODS) - set(RECIPES) == {"distribution_crossover", "fisher", "dropout"}
    for name in set(METHODS) - set(RECIPES):
        with pytest.raises(ConfigError, match="no recipe for it"):
            text(name, **({"base": "c.st"} if METHODS[name].needs_base else {}))
    with pytest.raises(ConfigError, match="rows=true only"):
        text("model_stock", base="c.st")
    with pytest.raises(ConfigError, match="needs a base"):
        text("ties_sum")


@installed
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_does_what_we_did(name: str, tmp_path: Path) -> None:
    import sd_mecha
    from sd_mecha.extensions import model_configs

    keys = ("one.weight", "two.bias")
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    shapes = {"one.weight": (6, 4), "two.bias": (6,)}
    states = [
        {k: torch.randn(shapes[k], generator=g).mul(64).round().div(64) for k in keys} for g in generators
    ]
    states[1] = {k: (states[0][k] + states[1][k] / 2) for k in keys}
    paths = [save_safetensors(tmp_path / f"{i}.safetensors", s) for i, s in enumerate(states)]
    if "recipe-ours" not in {c.identifier for c in model_configs.get_all()}:
        meta = {k: model_configs.KeyMetadata(list(shapes[k]), "float32") for k in keys}
        parts: Any = {"model": meta}  # what it turns into components
        model_configs.register(model_configs.ModelConfigImpl("recipe-ours", parts))

    method = METHODS[name]
    chosen = [0, 1, 2] if method.inputs == "N" and name != "model_stock" else [0, 1]
    given: dict[str, Any] = {"ties_sum": {"k": 1.0}, "model_stock": {"rows": True}}.get(name, {})
    if method.weight and name not in ("geometric_median",):
        given |= {"weights": {"weights": [2.0, 1.0, 1.0], "scales": 0.7}.get(method.weight, 0.4)}
    if name == "greedy_soup":
        ours = merge("weighted_sum", [states[0], states[2]])
        given["weights"] = [0.5, 0.0, 0.5]
        written = recipe(name, [paths[i] for i in chosen], architecture="recipe-ours", score=None, **given)
    else:
        base = {"base": states[3]} if method.needs_base else {}
        ours = merge(name, [states[i] for i in chosen], **base, **given)
        base = {"base": paths[3]} if method.needs_base else {}
        written = recipe(name, [paths[i] for i in chosen], architecture="recipe-ours", **base, **given)
    theirs: dict[str, Tensor] = {}
    # In float64, its default: in float32 its geometric median stops where the objective no longer changes.
    sd_mecha.merge(
        sd_mecha.deserialize(written), merge_dtype=torch.float64, output_dtype=torch.float32, output=theirs
    )
    for key in keys:
        torch.testing.assert_close(theirs[key], ours[key], rtol=1e-5, atol=2e-6)
