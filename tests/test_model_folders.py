"""Folders of transformers and diffusers through the command: any class that the installed libraries have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_files import read, rebasin
from torch import Tensor, nn

from rebasin.adapters import union
from rebasin.checkpoints import component_spec, open_checkpoint, save_safetensors
from rebasin.checkpoints.classes.call import call
from rebasin.checkpoints.classes.known import Known
from rebasin.checkpoints.classes.narrow import ENOUGH, narrow, shapes_under

TEXT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 96,
}  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": 2}
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("LlamaConfig", GROUPED),
    "MixtralForCausalLM": ("MixtralConfig", {**GROUPED, "num_local_experts": 3}),
    "GPT2LMHeadModel": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96}),
    "BertForMaskedLM": ("BertConfig", TEXT),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 96},
    ),
    "ViTForImageClassification": ("ViTConfig", {**TEXT, "image_size": 16, "patch_size": 8}),
}
"""Class -> its configuration's, and entries that make it small."""


def small(name: str, seed: int = 0) -> nn.Module:
    """A model of this class with random weights, norms and biases included."""
    import transformers

    config, entries = SMALL[name]
    torch.manual_seed(seed)
    model = getattr(transformers, name)(getattr(transformers, config)(**entries)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def outputs(model: nn.Module) -> Tensor:
    from rebasin.checkpoints.classes.examples import example

    torch.manual_seed(1)
    with torch.no_grad():
        return model(**example(model)).logits


def loaded(folder: Path, name: str) -> nn.Module:
    import transformers

    return getattr(transformers, name).from_pretrained(folder).eval()


@cache
def pair(name: str, root: Path) -> tuple[Path, Path]:
    """Two models of this class as folders, in shards, with something beside the weights."""
    folders = root / name / "a", root / name / "b"
    for seed, folder in enumerate(folders):
        small(name, seed).save_pretrained(folder, max_shard_size="40KB")  # pyright: ignore[reportCallIssue]
        (folder / "tokenizer.json").write_text(json.dumps({"made": "for a test"}))
    return folders


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("folders")


@pytest.mark.parametrize("name", SMALL)
def test_an_aligned_folder_loads_and_computes_what_it_did(name: str, root: Path, tmp_path: Path) -> None:
    a, b = pair(name, root)
    text = rebasin("align", a, b, "-o", tmp_path / "aligned")
    assert "Is it legal? Yes" in text and "Did anything move? Yes" in text
    torch.testing.assert_close(
        outputs(loaded(tmp_path / "aligned", name)), outputs(small(name, 1)), rtol=1e-4, atol=1e-5
    )
    written = {f.name for f in (tmp_path / "aligned").iterdir()}
    assert written == {f.name for f in b.iterdir()} | {"README.md"}
    for file in b.glob("*.safetensors"):
        assert list(read(tmp_path / "aligned" / file.name)) == list(read(file))
    assert "Yes" in rebasin("verify", b, tmp_path / "aligned")
    # And back, by the permutation that was kept.
    rebasin(
        "apply",
        tmp_path / "aligned.permutation.safetensors",
        tmp_path / "aligned",
        "--inverse",
        "-o",
        tmp_path / "b",
    )
    for file in b.glob("*.safetensors"):
        assert all(torch.equal(read(tmp_path / "b" / file.name)[n], t) for n, t in read(file).items())


@pytest.mark.parametrize("name", SMALL)
def test_a_planted_permutation_is_undone(name: str, root: Path, tmp_path: Path) -> None:
    a, _ = pair(name, root)
    checkpoint = open_checkpoint(a)
    spec = component_spec(checkpoint, "model")
    assert spec.neurons > 0
    moved = spec.random(3).apply(checkpoint.component("model"))
    model = small(name)
    model.load_state_dict(moved, strict=False)
    model.tie_weights()  # pyright: ignore[reportCallIssue]
    model.save_pretrained(tmp_path / "b")  # pyright: ignore[reportCallIssue]
    rebasin("merge", a, tmp_path / "b", "-o", tmp_path / "merged", "--alpha", "1")
    for file in a.glob("*.safetensors"):
        for tensor, expected in read(file).items():
            torch.testing.assert_close(
                read(tmp_path / "merged" / file.name)[tensor], expected, rtol=0, atol=0
            )


def test_where_nothing_moves_a_merge_is_the_plain_mean(root: Path, tmp_path: Path) -> None:
    name = "LlamaForCausalLM"
    a, _ = pair(name, root)
    near, mean = small(name), small(name)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter, middle in zip(near.parameters(), mean.parameters(), strict=True):
            parameter += 1e-3 * torch.randn_like(parameter)
            middle.copy_((parameter + middle) / 2)
    near.save_pretrained(tmp_path / "near", max_shard_size="30KB")  # pyright: ignore[reportCallIssue]
    text = rebasin("merge", a, tmp_path / "near", "-o", tmp_path / "merged")
    assert "Did anything move? No" in text
    torch.testing.assert_close(
        outputs(loaded(tmp_path / "merged", name)), outputs(mean), rtol=1e-5, atol=1e-6
    )
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == {n for f in a.glob("*.safetensors") for n in read(f)}
    assert all(n in read(tmp_path / "merged" / file) for n, file in index["weight_map"].items())
    assert json.loads((tmp_path / "merged" / "tokenizer.json").read_text()) == {"made": "for a test"}
    # As one file, and in another type, which the configuration then says.
    rebasin("merge", a, tmp_path / "near", "-o", tmp_path / "merged.safetensors")
    assert len(read(tmp_path / "merged.safetensors")) == len(index["weight_map"])
    rebasin("merge", a, tmp_path / "near", "-o", tmp_path / "half", "--dtype", "bf16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert next(loaded(tmp_path / "half", name).parameters()).dtype in (torch.bfloat16, torch.float32)


def test_maps_of_a_language_model_are_exact(root: Path, tmp_path: Path) -> None:
    name = "LlamaForCausalLM"
    a, b = pair(name, root)
    text = rebasin("align", a, b, "-o", tmp_path / "mapped", "--maps")
    assert "groups have maps" in text
    torch.testing.assert_close(
        outputs(loaded(tmp_path / "mapped", name)), outputs(small(name, 1)), rtol=1e-3, atol=1e-4
    )
    text = rebasin("compare", a, b, "--json", tmp_path / "apart.json")
    blocks = [block["name"] for block in json.loads((tmp_path / "apart.json").read_text())["blocks"]]
    assert "model.layers.0" in blocks and "model.layers.1" in blocks and "share a basin? No" in text
    told = json.loads(rebasin("inspect", a, "--json"))
    assert told["what"] == "LlamaForCausalLM of transformers"


def _config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda c: c.update(architectures=["LlamaForNothing"]), "which transformers"),
        (lambda c: c.update(architectures=["Own"], auto_map={"AutoModel": "own.Own"}), "is not run"),
        (lambda c: c.update(num_attention_heads=2, num_key_value_heads=1, head_dim=16), "different networks"),
        (lambda c: c.update(num_attention_heads=8, head_dim=8), "has shape (32, 32), but"),
        (lambda c: c.update(hidden_act="relu"), "hidden_act"),
        (lambda c: c.update(num_hidden_layers=3), "lacks 'model.layers.2."),
        (lambda c: c.update(hidden_size="wide"), "can be built"),
        (lambda c: c.update(architectures=["LlamaModel"]), "different architectures"),
    ],
    ids=["unknown", "own code", "heads", "more heads", "activation", "a layer more", "no number", "another head"],
)  # fmt: skip
def test_another_folder_is_refused_in_a_sentence(
    harm: Callable[[dict[str, Any]], object], said: str, root: Path, tmp_path: Path
) -> None:
    import shutil

    a, b = pair("LlamaForCausalLM", root)
    shutil.copytree(b, tmp_path / "b")
    _config(tmp_path / "b", harm)
    text = rebasin("merge", a, tmp_path / "b", "-o", tmp_path / "merged", expect=2)
    assert (
        said in text.replace("\n", " ") and text.startswith("Error: ") and not (tmp_path / "merged").exists()
    )


def test_what_configurations_differ_in_is_told(root: Path, tmp_path: Path) -> None:
    import shutil

    a, b = pair("LlamaForCausalLM", root)
    shutil.copytree(b, tmp_path / "b")
    _config(tmp_path / "b", lambda c: c.update(max_position_embeddings=7, eos_token_id=5))
    text = rebasin("merge", a, tmp_path / "b", "-o", tmp_path / "merged", "--dry-run")
    assert "max_position_embeddings 2048 and 7" in text and "eos_token_id" not in text


PUBLISHED = (
    "LlamaConfig",
    "MistralConfig",
    "Gemma2Config",
    "Qwen3Config",
    "PhiConfig",
    "GPTNeoXConfig",
    "MixtralConfig",
)


@pytest.mark.parametrize("config", PUBLISHED)
def test_a_narrow_twin_has_the_same_tensors_and_ratios(config: str) -> None:
    import transformers

    name = config.replace("Config", "ForCausalLM")
    full = getattr(transformers, config)().to_dict()
    what = Known("transformers", name, full)
    twin = narrow(what)
    wide, thin = shapes_under(what), shapes_under(twin)
    assert wide.keys() == thin.keys() and sum(s.numel() for s in thin.values()) < ENOUGH / 5
    heads, keys = full["num_attention_heads"], full.get("num_key_value_heads", full["num_attention_heads"])
    fewer = (
        twin.config["num_attention_heads"],
        twin.config.get("num_key_value_heads", twin.config["num_attention_heads"]),
    )
    assert heads / keys == fewer[0] / fewer[1] and min(fewer) > 1
    assert call(twin, "here")[0] is not None


@pytest.mark.parametrize("longer", ["a", "b"])
def test_added_words_are_named_and_can_be_taken_from_a(longer: str, root: Path, tmp_path: Path) -> None:
    name = "LlamaForCausalLM"
    words = {"a": 96, "b": 96, longer: 100}
    models = {}
    for seed, which in enumerate("ab"):
        models[which] = small(name, seed)
        models[which].resize_token_embeddings(words[which])  # pyright: ignore[reportCallIssue]
        models[which].save_pretrained(tmp_path / which)  # pyright: ignore[reportCallIssue]
    a, b = tmp_path / "a", tmp_path / "b"
    text = rebasin("merge", a, b, "-o", tmp_path / "merged", expect=2)
    assert f"{words['b']} words and that of" in text.replace("\n", " ") and "--resize-vocabulary" in text
    rebasin("align", a, b, "-o", tmp_path / "aligned", "--resize-vocabulary")
    found = outputs(loaded(tmp_path / "aligned", name).eval())
    assert found.shape[-1] == words["a"]
    ids = torch.randint(0, 96, (1, 6))
    with torch.no_grad():
        told = loaded(tmp_path / "aligned", name)(input_ids=ids).logits[..., :96]
        torch.testing.assert_close(told, models["b"](input_ids=ids).logits[..., :96], rtol=1e-4, atol=1e-5)
    # B itself follows: no symmetry moves the axis of words.
    kept = tmp_path / "aligned.permutation.safetensors"
    rebasin("apply", kept, b, "-o", tmp_path / "b2")
    with torch.no_grad():
        told = loaded(tmp_path / "b2", name)(input_ids=ids).logits
        torch.testing.assert_close(told, models["b"](input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert not torch.equal(loaded(tmp_path / "b2", name).lm_head.weight, models["b"].lm_head.weight)  # pyright: ignore
    rebasin("verify", kept, b)
    text = rebasin("verify", b, tmp_path / "aligned", expect=2)
    assert "--resize-vocabulary" in text
    rebasin("verify", b, tmp_path / "aligned", "--resize-vocabulary")
    rebasin("verify", b, a, "--resize-vocabulary", expect=1)
    rebasin("merge", a, b, "-o", tmp_path / "merged", "--resize-vocabulary")
    ours = read(a / "model.safetensors")["model.embed_tokens.weight"]
    assert loaded(tmp_path / "merged", name).get_input_embeddings().weight.shape == ours.shape  # pyright: ignore
    if longer == "a":  # aligned to themselves, what only A has is A's
        merged = read(tmp_path / "merged" / "model.safetensors")["model.embed_tokens.weight"]
        assert merged.shape[0] == 100 and not torch.equal(merged[:96], ours[:96])


@pytest.mark.parametrize("option", ["--learned", "--joint"])
@pytest.mark.parametrize("command", ["merge", "align"])
def test_what_is_about_a_unet_is_refused_at_once(
    command: str, option: str, root: Path, tmp_path: Path
) -> None:
    a, b = pair("GPT2LMHeadModel", root)
    text = rebasin(command, a, b, "-o", tmp_path / "out", option, expect=2)
    assert "UNet" in text and "hash" not in text and not (tmp_path / "out").exists()


def test_an_option_about_a_text_encoder_is_refused_where_there_is_none(root: Path, tmp_path: Path) -> None:
    a, b = pair("LlamaForCausalLM", root)
    text = rebasin("merge", a, b, "-o", tmp_path / "out", "--fix-clip", expect=2)
    assert "--fix-clip repairs a text encoder" in text and "hash" not in text


def test_what_the_example_does_not_reach_is_refused(tmp_path: Path) -> None:
    """Cross attention reads another model's states, which no example of a decoder alone has."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=96, add_cross_attention=True)
    for seed in range(2):
        torch.manual_seed(seed)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "ab"[seed])
    given = (tmp_path / "a", tmp_path / "b", "-o", tmp_path / "m")
    text = rebasin("merge", *given, expect=2)
    assert "reads 8 tensors of the model" in text and "--no-align" in text and not (tmp_path / "m").exists()
    assert "This is the plain merge" in rebasin("merge", *given, "--no-align")


def test_a_permutation_is_for_its_own_architecture(root: Path, tmp_path: Path) -> None:
    import transformers

    a, b = pair("LlamaForCausalLM", root)
    kept = tmp_path / "aligned.permutation.safetensors"
    rebasin("align", a, b, "-o", tmp_path / "aligned")
    text = rebasin("merge", a, b, "-o", tmp_path / "m", "--permutation", kept)
    assert "Did anything move? Yes" in text
    for change in ({"num_hidden_layers": 3}, {"intermediate_size": 64}):
        config = transformers.LlamaConfig(**{**GROUPED, **change})
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / str(change))
        text = rebasin("apply", kept, tmp_path / str(change), "-o", tmp_path / "x", expect=2)
        assert "another architecture" in text and not (tmp_path / "x").exists()


def test_verify_computes_each_model_by_its_own_configuration(root: Path, tmp_path: Path) -> None:
    import shutil

    _, b = pair("LlamaForCausalLM", root)
    shutil.copytree(b, tmp_path / "b")
    _config(tmp_path / "b", lambda c: c.update(rope_parameters={"rope_theta": 7.0, "rope_type": "default"}))
    assert "Do they compute the same? No" in rebasin("verify", b, tmp_path / "b", expect=1)


def test_nothing_is_written_into_an_input_or_left_unsaid(root: Path, tmp_path: Path) -> None:
    import shutil

    a, b = pair("LlamaForCausalLM", root)
    assert "would be inside" in rebasin("merge", a, b, "-o", a / "sub", expect=2)
    shutil.copytree(a, tmp_path / "a")
    shutil.copytree(b, tmp_path / "b")
    for folder in ("a", "b"):
        _config(tmp_path / folder, lambda c: c.update(num_hidden_layers=1, layer_types=None))
    text = rebasin("merge", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "m", "--dry-run")
    named = "its configuration (LlamaForCausalLM of transformers)"
    assert f"Not read from a, as {named} has no place for it, so not merged: 'model.layers.1." in text
    rebasin("merge", a, b, "-o", tmp_path / "eight", "--dtype", "fp8")
    assert json.loads((tmp_path / "eight" / "config.json").read_text())["dtype"] == "float16"


def test_counts_of_norms_are_no_weights(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    for seed in range(2):
        torch.manual_seed(seed)
        ResNetForImageClassification(config).save_pretrained(tmp_path / "ab"[seed])
    text = rebasin("align", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "aligned")
    assert "Is it legal? Yes" in text and "Did anything move? Yes" in text


def test_a_configuration_that_names_no_class_is_told(root: Path, tmp_path: Path) -> None:
    a, _ = pair("LlamaForCausalLM", root)
    shutil.copytree(a, tmp_path / "a")
    config = json.loads((a / "config.json").read_text())
    named = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    (tmp_path / "a" / "config.json").write_text(json.dumps(named))
    text = rebasin("merge", tmp_path / "a", a, "-o", tmp_path / "out", expect=2)
    assert "its config.json names no class (architectures, model_type or _class_name)." in text


def test_tied_and_untied_embeddings_are_told_with_a_way(root: Path, tmp_path: Path) -> None:
    import transformers

    a, _ = pair("LlamaForCausalLM", root)
    config = transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    for one, other in ((a, tmp_path / "tied"), (tmp_path / "tied", a)):
        text = rebasin("merge", one, other, "-o", tmp_path / "out", expect=2)
        assert "tied has no tensor 'lm_head.weight'" in text and "untie the one that is tied" in text


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("order", ["of A", "of B"])
def test_a_base_is_taken_in_the_order_of_the_models(
    order: str, maps: bool, root: Path, tmp_path: Path
) -> None:
    """A + (B - base) is that of the models as they were, in whichever order B and the base lie."""
    name = "LlamaForCausalLM"
    models = {n: small(name) for n in ("a", "b", "base")}
    torch.manual_seed(3)
    with torch.no_grad():
        for n in ("a", "b"):
            for parameter in models[n].parameters():
                parameter += 3e-3 * torch.randn_like(parameter)
    for n, model in models.items():
        model.save_pretrained(tmp_path / n)  # pyright: ignore[reportCallIssue]
    spec = component_spec(open_checkpoint(tmp_path / "a"), "model")
    moved = spec.random(3)
    for n in ("b", *(["base"] if order == "of B" else [])):
        state = moved.apply(models[n].state_dict())
        small(name).save_pretrained(tmp_path / n, state_dict=state)  # pyright: ignore[reportCallIssue]
    paths = [tmp_path / n for n in ("a", "b", "base")]
    given = ["--method", "add_difference", "--alpha", "1", "--base", paths[2], *(["--maps"] if maps else [])]
    text = rebasin("merge", *paths[:2], "-o", tmp_path / "m", *given)
    assert ("moved along" in text) is (order == "of B") and "near none" not in text
    made = read(tmp_path / "m" / "model.safetensors")
    states = [models[n].state_dict() for n in ("a", "b", "base")]
    if not maps:
        for tensor, merged in made.items():
            wanted = states[0][tensor] + states[1][tensor] - states[2][tensor]
            torch.testing.assert_close(merged, wanted, rtol=0, atol=1e-5)


def test_a_base_that_is_near_no_model_is_told(root: Path, tmp_path: Path) -> None:
    a, b = pair("LlamaForCausalLM", root)
    small("LlamaForCausalLM", 7).save_pretrained(tmp_path / "base")  # pyright: ignore[reportCallIssue]
    given = ["--method", "add_difference", "--base", tmp_path / "base"]
    assert "base is near none of the models" in rebasin("merge", a, b, "-o", tmp_path / "m", *given)


def test_a_plot_or_figures_that_can_not_be_written_are_told_before_any_work(
    root: Path, tmp_path: Path
) -> None:
    a, b = pair("LlamaForCausalLM", root)
    for option, name in (("--plot", "x.foo"), ("--json", "x.txt"), ("--json", "none/x.json")):
        told = rebasin("compare", a, b, option, tmp_path / name, expect=2)
        assert "read" not in told and told.strip().endswith(".") and "Traceback" not in told, told


def test_a_copy_of_a_tied_tensor_is_told_with_a_way(tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True)
    for name in "ab":
        model = transformers.LlamaForCausalLM(config)
        model.save_pretrained(tmp_path / name)
    file = tmp_path / "a" / "model.safetensors"
    state = dict(read(file))
    save_safetensors(
        file, {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, {"format": "pt"}
    )
    text = rebasin("merge", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "out", expect=2)
    assert "has no tensor 'lm_head.weight'" in text and "save it again, without it" in text
    # Numbers of its own are no copy: saved without them it would be another model.
    save_safetensors(
        file, {**state, "lm_head.weight": state["model.embed_tokens.weight"] + 1}, {"format": "pt"}
    )
    text = rebasin("merge", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "out", expect=2)
    assert "is not tied, whatever its configuration says" in text and "without it" not in text


def test_what_a_merge_of_folders_writes_as_a_file_tells_how_it_was_made(root: Path, tmp_path: Path) -> None:
    a, b = pair("GPT2LMHeadModel", root)
    rebasin("merge", a, b, "-o", tmp_path / "one.safetensors", "--no-align")
    said = rebasin("inspect", tmp_path / "one.safetensors")
    assert "without the configuration" in said and "weighted_sum" in said and a.name in said
    said = rebasin("inspect", next(a.glob("*.safetensors")), expect=2)
    assert "a config.json lies beside it: give the folder" in said


def test_infinity_in_a_configuration_is_read_as_transformers_writes_it(tmp_path: Path) -> None:
    import transformers

    sizes = {
        "hidden_size": 16,
        "num_heads": 4,
        "head_dim": 8,
        "state_size": 4,
        "n_groups": 1,
        "vocab_size": 32,
    }
    config = transformers.Mamba2Config(**sizes, num_hidden_layers=1, chunk_size=8)
    for name in "ab":
        transformers.Mamba2ForCausalLM(config).save_pretrained(tmp_path / name)
    assert "__float__" in (tmp_path / "a" / "config.json").read_text()
    _config(tmp_path / "b", lambda c: c.update(time_step_limit=[0.0, float("inf")]))  # as older ones do
    text = rebasin("merge", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "m", "--no-align")
    assert "differ" not in text
    for name in ("m", "b"):
        built = call(open_checkpoint(tmp_path / name).classes["model"], name)[0]
        assert built.config.time_step_limit[1] == float("inf")  # pyright: ignore


def test_inputs_that_were_guessed_wrongly_are_named(tmp_path: Path) -> None:
    """Siglip2's pictures come as patches, which its signature does not tell."""
    import transformers

    part = {**TEXT, "num_hidden_layers": 1}
    config = transformers.Siglip2Config(
        text_config=part, vision_config={**part, "num_patches": 16, "patch_size": 4}
    )
    for name in "ab":
        transformers.Siglip2Model(config).save_pretrained(tmp_path / name)
    text = rebasin("align", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "c", expect=2).replace("\n", " ")
    assert "guessed for it (input_ids 1x7, pixel_values 1x3x32x32)" in text and "--no-align" in text, text
    assert "control flow" not in text
    assert "--no-check" in rebasin("verify", tmp_path / "a", tmp_path / "b", expect=2).replace("\n", " ")


@pytest.mark.parametrize("command", ["merge", "inspect", "apply"])
def test_the_folder_of_an_adapter_is_told(command: str, root: Path, tmp_path: Path) -> None:
    a, _ = pair("LlamaForCausalLM", root)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    state = {f"{layer}.lora_A.weight": torch.ones(2, 32), f"{layer}.lora_B.weight": torch.ones(32, 2)}
    save_safetensors(adapter / "adapter_model.safetensors", state)
    if command == "apply":
        spec = component_spec(open_checkpoint(a), "model", prove=False)
        union({"model": spec.random(0)}).save(tmp_path / "p.safetensors")
    given = {"merge": (a, adapter), "inspect": (adapter,), "apply": (tmp_path / "p.safetensors", adapter)}[
        command
    ]
    out = () if command == "inspect" else ("-o", tmp_path / "out")
    text = rebasin(command, *given, *out, expect=2).replace("\n", " ")
    assert "is a LoRA or another adapter of PEFT" in text and "merge_and_unload" in text
