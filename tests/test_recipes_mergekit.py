"""Recipes of mergekit: what of its YAML is done, and the sentence for what is not, with the key and the line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_files import read, rebasin
from safetensors.torch import save_file
from torch import Tensor

CONFIG = dict(
    hidden_size=16, num_hidden_layers=5, num_attention_heads=2, num_key_value_heads=2, intermediate_size=24,
    vocab_size=32, tie_word_embeddings=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three fine-tunes, Llamas of five layers, as folders `base`, `one`, `two` and `three`."""
    import transformers

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**CONFIG)
    base = transformers.LlamaForCausalLM(config)
    states = {"base": base.state_dict()}
    for seed, name in enumerate(("one", "two", "three"), 1):
        torch.manual_seed(seed)
        states[name] = {n: t + 0.1 * torch.randn_like(t) for n, t in states["base"].items()}
    for name, state in states.items():
        (folder / name).mkdir()
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder / name)
        save_file(
            {n: t.contiguous() for n, t in state.items()},
            folder / name / "model.safetensors",
            {"format": "pt"},
        )
        (folder / name / "tokenizer.json").write_text('{"of": "all"}')
    (folder / "three" / "tokenizer.json").write_text('{"of": "this one"}')
    return folder


def done(models: Path, out: Path, text: str) -> dict[str, Tensor]:
    recipe = models / f"{out.name}.yaml"
    recipe.write_text(text)
    rebasin("merge", "--recipe", recipe, "-o", out)
    return read(out / "model.safetensors")


def tensors(models: Path, *names: str) -> list[dict[str, Tensor]]:
    return [read(models / name / "model.safetensors") for name in names]


def depth(name: str) -> float:
    """How deep a tensor lies as mergekit counts it: layers from 0 to 1, and 0 for all that is in none."""
    return int(name.split(".")[2]) / 4 if ".layers." in name else 0.0


def test_shares_are_divided_by_their_sum(models: Path, tmp_path: Path) -> None:
    text = """
merge_method: linear
models:
  - {model: one, parameters: {weight: 1.0}}
  - {model: two, parameters: {weight: 0.5}}
  - {model: three, parameters: {weight: 0.5}}
dtype: float32
"""
    found, (one, two, three) = done(models, tmp_path / "m", text), tensors(models, "one", "two", "three")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, 0.5 * one[name] + 0.25 * two[name] + 0.25 * three[name])


def test_a_gradient_with_filters_goes_over_the_layers(models: Path, tmp_path: Path) -> None:
    text = """
slices:
  - sources:
      - {model: one, layer_range: [0, 5]}
      - {model: two, layer_range: [0, 5]}
merge_method: slerp
base_model: one
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.25, 1]
    - filter: mlp
      value: [1, 0]
    - value: 0.5
dtype: float16
tokenizer_source: base
"""
    found, (one, two) = done(models, tmp_path / "m", text), tensors(models, "one", "two")
    for name, tensor in found.items():
        assert tensor.dtype == torch.float16
        knots = [0, 0.5, 0.25, 1] if "self_attn" in name else [1, 0] if "mlp" in name else [0.5, 0.5]
        place = depth(name) * (len(knots) - 1)
        low = min(int(place), len(knots) - 2)
        t = knots[low] + (place - low) * (knots[low + 1] - knots[low])
        a, b = one[name].double(), two[name].double()
        angle = torch.acos((a * b).sum() / a.norm() / b.norm())
        wide = (torch.sin((1 - t) * angle) * a / a.norm() + torch.sin(t * angle) * b / b.norm()) / torch.sin(
            angle
        )
        expected = wide * ((1 - t) * a.norm() + t * b.norm())
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-3, atol=1e-4)


def test_differences_from_a_base(models: Path, tmp_path: Path) -> None:
    base, one, two = tensors(models, "base", "one", "two")
    entries = "models:\n- {model: base}\n- {model: one, parameters: {weight: 0.5}}\n"
    entries += "- {model: two, parameters: {weight: 0.25}}\n"
    arithmetic = done(
        models,
        tmp_path / "a",
        f"merge_method: task_arithmetic\nbase_model: base\nparameters: {{lambda: 2}}\n{entries}",
    )
    for name, tensor in arithmetic.items():
        expected = base[name] + (one[name] - base[name]) + 0.5 * (two[name] - base[name])
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)
    alike = "models:\n- {model: one}\n- {model: two}\nbase_model: base\n"
    more = "parameters: {weight: 0.7, density: 0.5, normalize: true, int8_mask: true}\n"
    ties = done(models, tmp_path / "t", f"merge_method: ties\n{alike}{more}")
    for name, tensor in ties.items():
        deltas = []
        for model in (one, two):
            delta = model[name] - base[name]
            kept = delta.abs().flatten().topk(round(0.5 * delta.numel())).values[-1]
            deltas.append(torch.where(delta.abs() >= kept, delta, torch.zeros(())))
        whole = torch.stack(deltas)
        agree = (whole.sign() == whole.sum(0).sign()) & (whole != 0)
        expected = base[name] + (whole * agree).sum(0) / agree.sum(0).clamp(min=1)
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)
    stock = done(models, tmp_path / "s", f"merge_method: model_stock\n{alike}")
    name = "model.layers.0.mlp.up_proj.weight"
    d = [model[name] - base[name] for model in (one, two)]
    cos = torch.nn.functional.cosine_similarity(d[0].flatten(), d[1].flatten(), dim=0).clamp(0, 1)
    torch.testing.assert_close(
        stock[name], base[name] + 2 * cos / (1 + cos) * (d[0] + d[1]) / 2, rtol=1e-4, atol=1e-6
    )


def test_several_documents_in_any_order(models: Path, tmp_path: Path) -> None:
    text = """
merge_method: slerp
base_model: half
models: [{model: three}]
parameters: {t: 0.0}
rebasin: {dtype: fp32}
---
name: half
merge_method: linear
models: [{model: one}, {model: two}]
parameters: {weight: 0.5}
"""
    found, (one, two) = done(models, tmp_path / "m", text), tensors(models, "one", "two")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (one[name] + two[name]) / 2)
    assert not list(tmp_path.glob(".*"))


TWO = "models:\n- {model: one, parameters: {weight: 0.5, density: 0.5}}\n"
TWO += "- {model: two, parameters: {weight: 0.5, density: 0.5}}\n"
PAIR = TWO.replace(", density: 0.5", "")


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("merge_method: passthrough\n" + TWO, "line 1: `merge_method: 'passthrough'` of mergekit has nothing here"),
        ("merge_method: arcee_fusion\nbase_model: one\n" + TWO, "'arcee_fusion'"),
        (
            "merge_method: ties\nbase_model: base\n" + TWO + "parameters:\n  int8_mask: true\n  normalize: false\n",
            "line 8: `normalize: false` adds up",
        ),
        (
            "merge_method: ties\nbase_model: base\n" + TWO.replace("density: 0.5}}\n- ", "density: 0.7}}\n- "),
            "line 5: `density` is 0.5 here and 0.7",
        ),
        (
            "merge_method: ties\nbase_model: base\n" + TWO.replace("weight: 0.5", "weight: [0, 1]"),
            "line 4: `weight` is not one number",
        ),
        (
            "merge_method: linear\nslices:\n- sources: [{model: one, layer_range: [0, 2]}]\n"
            "- sources: [{model: two, layer_range: [1, 5]}]\n",
            "line 3: 2 `slices` stack layers",
        ),
        (
            "merge_method: linear\nslices:\n- sources:\n  - {model: one, layer_range: [0, 4]}\n",
            "line 4: `layer_range` is [0, 4]",
        ),
        ("merge_method: linear\nmodels:\n- model: someone/Llama-7B\n", "line 3: there is no 'someone/Llama-7B'"),
        ("merge_method: linear\nmodels:\n- model: one+a-lora\n", "line 3: 'one+a-lora' is a model with a LoRA"),
        ("merge_method: linear\nparameters: {normalize: false}\n" + PAIR.replace("0.5", "0.7"), "line 2: `normalize"),
        ("merge_method: linear\nparameters: {temperature: 1}\n" + PAIR, "line 2: the parameter `temperature`"),
        ("merge_method: linear\ndtype: int4\n" + PAIR, "line 2: `dtype` is 'int4'"),
        ("merge_method: linear\ntokenizer_source: union\n" + PAIR, "line 2: the tokenizer is that of 'union'"),
        ("merge_method: linear\ntokenizer_source: three\n" + PAIR, "line 2: the tokenizer is that of 'three'"),
        ("merge_method: linear\ntokenizer: {source: one, pad_to_multiple_of: 8}\n" + PAIR, "`pad_to_multiple_of` of a"),
        ("merge_method: linear\nchat_template: auto\n" + PAIR, "line 2: `chat_template` is not done here"),
        ("merge_method: linear\nmodules: {text: 1}\n" + PAIR, "line 2: `modules` of mergekit is not done here"),
        ("merge_method: slerp\nmodels: [{model: one}, {model: two}]\nparameters: {t: 1}\n", "slerp` needs a `base"),
        ("merge_method: linear\nmodels:\n- {model: one}\n- {model: two}\n", "line 3: `linear` needs the parameter"),
        ("merge_method: slerp\nbase_model: one\nmodels: [{model: two}]\nparameters: {t: [{filter: mlp, value: 1}]}\n",
         "no `t` is for"),
        ("merge_method: linear\nbase_model: base\n" + PAIR, "line 2: `base_model` is none of the `models`"),
        ("name: a\nmerge_method: linear\nmodels: [{model: b}, {model: one}]\n---\nname: b\nmerge_method: linear\n"
         "models: [{model: a}, {model: one}]\n", "the merges a, b need each other"),
    ],
)  # fmt: skip
def test_what_is_not_done_is_one_sentence_with_the_line(
    models: Path, tmp_path: Path, text: str, sentence: str
) -> None:
    recipe = models / "refused.yaml"
    recipe.write_text(text)
    found = " ".join(rebasin("merge", "--recipe", recipe, "-o", tmp_path / "out", expect=2).split())
    assert sentence in found and len(found) <= 300, found
