"""What people give to the commands by mistake: one sentence with the name of the file or option, exit code 2, and
nothing written; what is legal and maybe not meant gets a line.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from cli_files import rebasin
from hydra import compose, initialize_config_dir
from torch import Tensor
from torch.nn import Linear

from rebasin import trace
from rebasin.adapters import union
from rebasin.checkpoints import component_spec, load_safetensors, open_checkpoint, save_safetensors
from rebasin.checkpoints.checkpoint import require_same_prediction
from rebasin.checkpoints.random_weights import random_checkpoint
from rebasin.cli.alignment import Aligning, Alignment
from rebasin.cli.companions import scored
from rebasin.cli.session import say_alignment
from rebasin.errors import CheckpointError, ConfigError, listed
from rebasin.files import config_dir
from rebasin.jobs.configuration import explain
from rebasin.jobs.resume import Resume
from rebasin.matching import load_permutations, save_permutations, weight_matching
from rebasin.merging import METHODS, merge
from rebasin.merging.inputs import copies
from rebasin.reporting.console import Console
from rebasin.spec import Alignment as Member
from rebasin.spec import Permutation, PermutationSpec
from rebasin.tasks import load_task

TEXT = "cond_stage_model."


def state(seed: int = 0) -> dict[str, Tensor]:
    whole = random_checkpoint("sd1", 16, depth=1, vocabulary=64, seed=seed)
    return {name: whole[name].clone() for name in whole if name.startswith(TEXT)}


def planted(folder: Path, like: str = "a.safetensors") -> Permutation:
    return component_spec(open_checkpoint(folder / like), "text_encoder", prove=False).random(3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two text encoders, and what is none."""
    where = tmp_path_factory.mktemp("files")
    save_safetensors(where / "a.safetensors", state(0))
    save_safetensors(where / "b.safetensors", state(1))
    for name in ("a", "b"):
        information = {
            key: t.float().square() for key, t in state(ord(name)).items() if t.is_floating_point()
        }
        save_safetensors(where / f"fisher_{name}.safetensors", information)
    save_safetensors(where / "fewer.safetensors", dict([*state(1).items()][:-2]))
    adapter = "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_{}.weight"
    lora = {adapter.format("down"): torch.randn(2, 48), adapter.format("up"): torch.randn(192, 2)}
    save_safetensors(where / "lora.safetensors", lora)
    save_safetensors(
        where / "simo.safetensors", {"unet:0:up": torch.ones(4, 2), "unet:0:down": torch.ones(2, 4)}
    )
    torch.save([torch.ones(4, 2), torch.ones(2, 4)], where / "simo.pt")
    torch.save(
        {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 48)}}, where / "webui.pt"
    )
    save_safetensors(where / "embedding.safetensors", {"emb_params": torch.ones(2, 48)})
    save_safetensors(
        where / "control.safetensors", {"controlnet_cond_embedding.conv_in.weight": torch.ones(2, 2)}
    )
    union({"text_encoder": planted(where)}).save(where / "own.permutation.safetensors")
    (where / "bad.yaml").write_text("a: [1,\nb: }")
    (where / "latin.yaml").write_bytes(b"a: \xff")
    return where


def refused(folder: Path, *arguments: object, keeps: str = "nothing") -> str:
    """The sentence with which a command ends; it leaves nothing, or an alignment that it `keeps`."""
    before = sorted(folder.iterdir())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        told = rebasin(*arguments, expect=2)
    sentence = told.strip().splitlines()[-1]
    assert "Traceback" not in told and sentence.startswith("Error: ") and sentence.endswith(".")
    assert len(sentence) <= 300
    (folder / keeps).unlink(missing_ok=True)
    assert sorted(folder.iterdir()) == before
    return sentence


NO_MODEL = [
    ("lora.safetensors", "rebasin apply"),
    ("control.safetensors", "rebasin apply"),
    ("own.permutation.safetensors", "rebasin apply"),
    ("simo.safetensors", "adapter"),
    ("simo.pt", "cloneofsimo"),
    ("webui.pt", "textual inversion"),
    ("embedding.safetensors", "textual inversion"),
]


@pytest.mark.parametrize(("file", "words"), NO_MODEL)
@pytest.mark.parametrize("place", ["compare", "merge", "align", "verify", "base", "vae", "dry"])
def test_what_is_no_model_is_called_by_its_name_wherever_it_is_given(folder, file, words, place):
    if (place, file) == ("verify", "own.permutation.safetensors"):
        return  # a permutation may be verified
    merged = ("merge", "a.safetensors", "b.safetensors", "-o", "out.safetensors")
    given = {
        "compare": ("compare", "a.safetensors", file),
        "verify": ("verify", file, "a.safetensors"),
        "align": ("align", "a.safetensors", file, "-o", "out.safetensors"),
        "merge": ("merge", "a.safetensors", file, "-o", "out.safetensors"),
        "dry": ("merge", file, "a.safetensors", "-o", "out.safetensors", "--dry-run"),
        "base": (*merged, "--base", file, "--method", "add_difference"),
        "vae": (*merged, "--vae", file),
    }[place]
    sentence = refused(folder, *given)
    assert file in sentence and words in sentence


MERGE = ("merge", "a.safetensors", "b.safetensors", "-o", "out.safetensors", "--no-align")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--weights", "0.5,0.3,0.2"), "3 numbers, but there are 2 models"),
        (("--weights", "GRAD_X"), "`rebasin methods` lists"),
        (("--weights", "fc7=1"), "'fc7' is no block"),
        (("--weights", "none.yaml"), "none.yaml can't be read"),
        (("--weights", "bad.yaml"), "bad.yaml are no YAML (line 2)"),
        (("--weights", "latin.yaml"), "latin.yaml are no YAML"),
        (("--alpha", "nan"), "finite"),
        (("--method", "magic"), "`rebasin methods` lists"),
        (("--method", "crossover", "--alpha", 15), "from 0 to 1, not 15"),
        (("--method", "crossover", "--weights", "mlp=-1,default=0"), "from 0 to 1, not -1"),
        (("--method", "ties_sum", "--base", "a.safetensors", "--option", "k=7"), "k is 7"),
        (("--method", "ties_sum", "--base", "a.safetensors", "--option", "k=much"), "'much'"),
        (("--method", "fisher"), "--fisher FILE once for each of the 2 models"),
        (("--method", "fisher", "--fisher", "fisher_a.safetensors"), "but got 1"),
        (("--fisher", "fisher_a.safetensors"), "--fisher is for the method 'fisher'"),
        (("--method", "greedy_soup"), "--option score=package.module:function"),
        (("--method", "greedy_soup", "--option", "score=nowhere:f"), "'nowhere:f' can't be imported"),
        (("--method", "greedy_soup", "--option", "score=math:pi"), "can't be called"),
        (("--method", "greedy_soup", "--option", "score=math:sqrt", "--alpha", 0.5), "finds the weights itself"),
        (("--permutation", "a.safetensors"), "a.safetensors holds no permutation"),
        (("--permutation", "none.safetensors", "--dry-run"), "no file none.safetensors"),
        (("--permutation", "webui.pt", "--dry-run"), "webui.pt"),
        (("--device", "gpu"), "--device is 'gpu', but torch finds no such device"),
        (("--device", "meta:x"), "--device is 'meta:x', but torch finds no such device"),
        (("--variant", "fp16"), "variant 'fp16'"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused_before_any_work(folder, arguments, words):
    assert words in refused(folder, *MERGE, *arguments)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e300])
def test_a_value_that_is_no_number_is_told_with_its_file_and_its_name_there(folder, value, tmp_path):
    shutil.copytree(folder, tmp_path / "here")
    layers = f"{TEXT}transformer.text_model.encoder.layers.0."
    out = ("-o", "out.safetensors")
    moved, fixed = f"{layers}mlp.fc1.weight", f"{layers}layer_norm1.bias"
    for name, commands in (
        (moved, (("merge", *out), ("merge", "b.safetensors", *out), ("merge", "--no-align", *out))),
        (fixed, (("compare",), ("align", *out), ("verify",))),
    ):
        damaged = {n: t.double() if t.is_floating_point() else t for n, t in state(1).items()}
        damaged[name].view(-1)[1] = value
        save_safetensors(tmp_path / "here" / "bad.safetensors", damaged)
        for command, *rest in commands:
            given = (command, "a.safetensors", "bad.safetensors", *rest)
            sentence = refused(tmp_path / "here", *given, keeps="out.permutation.safetensors")
            assert f"{name!r} of bad.safetensors" in sentence or ("--no-align" in rest and value == 1e300)
            assert not re.search("NaN|no numbers" if value == 1e300 else "as large as", sentence), sentence


@pytest.mark.parametrize("method", ["fisher"])
def test_information_that_does_not_fit_is_refused(folder, method):
    given = ("--method", method, "--fisher", "fisher_a.safetensors", "--fisher")
    for file, words in (("fewer.safetensors", "has no tensor"), ("lora.safetensors", "adapter")):
        sentence = refused(folder, *MERGE, *given, file)
        assert file in sentence and words in sentence
    assert "no Fisher information" in refused(folder, *MERGE, *given, "b.safetensors")


@pytest.mark.parametrize(
    "file", ["simo.safetensors", "simo.pt", "webui.pt", "embedding.safetensors", "oft.safetensors"]
)
def test_what_can_not_be_moved_is_named_with_its_file(folder, file, tmp_path):
    save_safetensors(
        folder / "oft.safetensors", {"lora_te_text_model_encoder_layers_0_mlp_fc1.oft_diag": torch.ones(2)}
    )
    for arguments in (
        ("inspect", file),
        ("apply", "own.permutation.safetensors", file, "-o", "moved.safetensors"),
    ):
        assert file in refused(folder, *arguments)
    sentence = refused(folder, "apply", "own.permutation.safetensors", "lora.safetensors", "-o", "moved.ckpt")
    assert "moved.ckpt" in sentence and ".safetensors or .sft" in sentence
    sentence = refused(
        folder, "apply", "own.permutation.safetensors", "lora.safetensors", "-o", "moved.safetensorz"
    )
    assert "moved.safetensorz" in sentence and ".safetensors or .sft" in sentence


FC1 = "lora_te_text_model_encoder_layers_0_mlp_fc1"

NOTHING_TO_MOVE: dict[str, tuple[dict[str, Tensor], str]] = {
    "ia3.safetensors": ({f"{FC1}.weight": torch.ones(192)}, "no on_input"),
    "embedding.safetensors": (
        {"emb_params": torch.ones(2, 48)},
        "no permutation moves: it fits an aligned model",
    ),
    "empty.safetensors": ({}, "has no tensors, so there is nothing to move; give a model, a LoRA"),
    "other.safetensors": (
        {"layer.weight": torch.ones(2, 2)},
        "nothing that is known here; give a model, a LoRA",
    ),
    "flux.safetensors": ({"double_blocks.0.x": torch.ones(2)}, "is a part of Flux; give a model, a LoRA"),
}


@pytest.mark.parametrize("file", NOTHING_TO_MOVE)
def test_what_has_nothing_to_move_is_told_what_it_is_or_lacks(folder, file):
    tensors, words = NOTHING_TO_MOVE[file]
    save_safetensors(folder / file, tensors)
    for dry in ((), ("--dry-run",)):
        sentence = refused(folder, "apply", "own.permutation.safetensors", file, "-o", "m.safetensors", *dry)
        assert file in sentence and words in sentence and "rebasin apply" not in sentence


def test_only_the_neurons_that_a_file_has_are_counted(folder, tmp_path):
    own = planted(folder)
    mlp = torch.nn.Sequential(Linear(4, 9), torch.nn.ReLU(), Linear(9, 2))
    both = union({"text_encoder": own, "unet": trace(mlp, torch.ones(1, 4)).random(1)})
    both.save(tmp_path / "p.safetensors")
    assert both.moved() > own.moved()
    given = (tmp_path / "p.safetensors", folder / "a.safetensors", "-o", tmp_path / "out.safetensors")
    assert f" {own.moved():,} neurons" in rebasin("apply", *given)
    assert f" {own.moved():,} neurons" in rebasin("apply", *given, "--dry-run")
    given = (tmp_path / "p.safetensors", folder / "lora.safetensors", "-o", tmp_path / "lora.safetensors")
    fc1 = own.axes_of("text_model.encoder.layers.0.mlp.fc1.weight")
    moved = sum(int((index != np.arange(len(index))).sum()) for _, index in fc1)
    assert f"2 tensors follow {moved:,} neurons" in rebasin("apply", *given)


def test_a_given_permutation_speaks_for_itself_alone(folder, tmp_path):
    """Whether B is in A's order, only an alignment knows; and for which files one was found, its header does."""
    union({"text_encoder": planted(folder).spec.identity()}).save(tmp_path / "still.safetensors")
    given = ("merge", folder / "a.safetensors", folder / "b.safetensors", "--permutation")
    told = rebasin(*given, tmp_path / "still.safetensors", "-o", tmp_path / "o.safetensors", "--no-check")
    assert "The given permutation moves nothing; whether B is in A's order was not looked at." in told
    assert "already" not in told and "was found for" not in told
    a, b, kept = (tmp_path / name for name in ("a.safetensors", "b.safetensors", "m.permutation.safetensors"))
    for path in (a, b):
        shutil.copy(folder / "a.safetensors", path)
    told = rebasin("merge", a, b, "-o", tmp_path / "m.safetensors", "--no-check")
    assert "order already" in told
    told = rebasin(*given[:-1], "-o", tmp_path / "n.safetensors", "--no-check", "--permutation", kept)
    assert (
        "m.permutation.safetensors was found for 'a.safetensors' and 'b.safetensors', but b.safetensors is not that"
        " 'b.safetensors' (by sha256)." in " ".join(told.split())
    )
    told = rebasin("merge", a, b, "-o", tmp_path / "o2.safetensors", "--no-check", "--permutation", kept)
    assert "was found for" not in told


def test_exchanged_entries_of_a_permutation_are_seen(folder, tmp_path):
    path, both = tmp_path / "p.safetensors", tmp_path / "many.safetensors"
    planted(folder).save(path)
    save_permutations(both, [planted(folder), planted(folder)])
    for file, load in ((path, Permutation.load), (both, load_permutations)):
        state = load_safetensors(file)
        tensors = {name: state[name].clone() for name in state}
        header = dict(state.metadata)
        name = next(name for name in tensors if "mlp" in name)
        tensors[name][[0, 1]] = tensors[name][[1, 0]]
        save_safetensors(file, tensors, header)
        with pytest.raises(CheckpointError, match="damaged: its indices are not those that were saved"):
            load(file)
        del header["digest"]  # as older versions wrote it
        save_safetensors(file, tensors, header)
        load(file)


def test_sentences_about_damaged_permutations_are_short_where_paths_are_long(folder, tmp_path):
    deep = tmp_path / "/".join(["a_folder_with_a_long_name"] * 8)
    deep.mkdir(parents=True)
    path = deep / "p.safetensors"
    name = "unet.up_blocks.3.attentions.1.transformer_blocks.0.attn2.to_q"
    model = torch.nn.Sequential(Linear(4, 9), torch.nn.ReLU(), Linear(9, 2))
    text = trace(model, torch.ones(1, 4)).to_json()
    cell = json.loads(text)["groups"][0]["cells"][0]
    told = json.loads(text)
    told["groups"][0]["cells"] = [
        [name, cell[1], [[f"{name}.{i}.weight", *s[1:]] for i, s in enumerate(cell[2])]]
    ]
    save_safetensors(path, {"x": torch.ones(2)}, {"spec": json.dumps(told)})
    with pytest.raises(CheckpointError, match="no such places") as found:
        Permutation.load(path)
    assert len(f"Error: {found.value}") <= 300 and "name/p.safetensors holds" in str(found.value)
    whole = f"/{'x' * 200}/m.safetensors is one."
    assert str(CheckpointError(whole)) == whole  # a sentence that is short enough stays as it is


@pytest.mark.parametrize("suffix", [".safetensorz", ".pt", ".bin", ".pth", ".zip", ".SAFETENSOR"])
@pytest.mark.parametrize("command", ["merge", "align"])
def test_endings_that_no_model_is_written_in_are_refused(folder, suffix, command):
    sentence = refused(folder, command, "a.safetensors", "b.safetensors", "-o", f"out{suffix}")
    assert f"out{suffix}" in sentence and ".safetensors" in sentence


# ------------------------------------------------------------------------------------ legal, and maybe not meant


@pytest.fixture
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for file in folder.glob("*.safetensors"):
        os.link(file, tmp_path / file.name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("way", ["itself", "hardlink", "symlink", "copy", "wider", "ckpt"])
def test_a_model_merged_with_itself_is_told(here, way):
    other = "twin.ckpt" if way == "ckpt" else "twin.safetensors"
    if way == "itself":
        other = "a.safetensors"
    elif way == "hardlink":
        os.link("a.safetensors", other)
    elif way == "symlink":
        os.symlink("a.safetensors", other)
    elif way == "copy":
        shutil.copyfile("a.safetensors", other)
    elif way == "wider":
        save_safetensors(
            here / other, {n: t.float() if t.is_floating_point() else t for n, t in state().items()}
        )
    else:
        torch.save({"state_dict": state()}, other)
    text = rebasin("merge", "a.safetensors", other, "-o", "out.safetensors", "--dry-run", "--no-align")
    assert f"a.safetensors and {other} are the same model, so merging the two changes nothing." in text
    assert "same model" not in rebasin("merge", *MERGE[1:], "--dry-run")


def test_a_base_that_is_one_of_the_models_is_told(here):
    added = ("--method", "add_difference", "--dry-run")
    assert "The base and b.safetensors are the same model" in rebasin(
        *MERGE, *added, "--base", "b.safetensors"
    )
    assert "same model" not in rebasin(*MERGE, *added, "--base", "a.safetensors"), "task arithmetic"


def test_reading_ends_at_the_first_difference():
    class Counted(dict[str, Tensor]):
        read = 0

        def __getitem__(self, name: str) -> Tensor:
            self.read += 1
            return super().__getitem__(name)

    one = Counted({str(i): torch.full((2,), float(i)) for i in range(9)})
    assert copies([one, {**one, "0": torch.zeros(2) + 1}], ["A", "B"]) == []
    assert one.read <= 9 + 2, "nine of the copy above"
    assert copies([one, dict(one), {**one, "8": torch.zeros(2)}, dict(one)], list("ABCD")) == [
        "A and B are the same model, so merging the two changes nothing.",
        "A and D are the same model, so merging the two changes nothing.",
    ]
    nan = {"w": torch.tensor([float("nan"), -0.0])}
    assert copies([nan, {"w": nan["w"].clone()}], ["A", "B"]), "to the bit"


@pytest.mark.parametrize("arguments", [("--alpha", 15), ("--alpha", -1), ("--weights", "mlp=15,default=0")])
def test_weights_beyond_the_models_are_told(here, arguments):
    told = rebasin(*MERGE, *arguments, "--dry-run")
    assert "is outside 0 to 1" in told
    assert "is outside 0 to 1" not in rebasin(*MERGE, "--alpha", 1, "--dry-run")


@pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if method.weight and not method.plan]
)
@pytest.mark.parametrize("weight", [-0.5, 1.5, 15.0])
def test_every_method_refuses_a_weight_outside_or_extrapolates_with_a_remark(name, weight):
    method = METHODS[name]
    models = [{"w": torch.randn(4, 5) + 3} for _ in range(2)]
    extra: dict[str, Any] = {"base": {"w": torch.randn(4, 5) + 3}} if method.needs_base else {}
    extra |= {"companions": [{"w": torch.rand(4, 5)}] * 2} if "companions" in method.takes else {}
    if method.bounded:
        with pytest.raises(ConfigError, match="from 0 to 1"):
            dict(merge(name, models, weights=weight, **extra))
    else:
        assert dict(merge(name, models, weights=weight, **extra))["w"].isfinite().all()
        told = method.beyond([0.5, weight])
        assert told is not None and f"{weight:g}" in told and name in told
    assert method.beyond([0, 1, 0.3]) is None


# ------------------------------------------------------------------------------------- companions on the command line


@pytest.mark.parametrize("whole", [True, False])
def test_fisher_information_moves_with_its_model(here, whole):
    """B is A's permuted; its information, permuted alike, weighs the same tensors. The permutation may be a file of
    the command's, of all components, or one that was made in Python, of one.
    """
    a, plan = open_checkpoint(here / "a.safetensors"), planted(here)
    information = open_checkpoint(here / "fisher_b.safetensors")
    for source, target in ((a, "moved.safetensors"), (information, "fisher_moved.safetensors")):
        moved = source.restore({"text_encoder": plan.view(source.component("text_encoder"))})
        save_safetensors(here / target, {name: moved[name] for name in moved})
    back = plan.invert()
    (union({"text_encoder": back}) if whole else back).save(here / "back.safetensors")
    fisher = ("--method", "fisher", "--no-check", "--fisher", "fisher_a.safetensors", "--fisher")
    rebasin("merge", "a.safetensors", "moved.safetensors", "-o", "one.safetensors", *fisher, "fisher_moved.safetensors",
            "--permutation", "back.safetensors")  # fmt: skip
    one = dict(open_checkpoint(here / "one.safetensors").component("text_encoder"))
    for name, tensor in dict(a.component("text_encoder")).items():
        torch.testing.assert_close(one[name], tensor, rtol=2e-3, atol=1e-5)
    rebasin(*MERGE[:-2], "two.safetensors", "--no-align", *fisher, "fisher_b.safetensors")
    states = [dict(open_checkpoint(here / f"{n}.safetensors").component("text_encoder")) for n in "ab"]
    own = [dict(open_checkpoint(here / f"fisher_{n}.safetensors").component("text_encoder")) for n in "ab"]
    expected, found = merge("fisher", states, companions=own), open_checkpoint(here / "two.safetensors")
    for name, tensor in dict(found.component("text_encoder")).items():
        torch.testing.assert_close(tensor, expected[name])


def test_a_greedy_soup_asks_the_users_own_function(here):
    (here / "my_scores.py").write_text(
        "NAME = 'cond_stage_model.transformer.text_model.final_layer_norm.weight'\n"
        "def distance(state):\n    return float((state[NAME].float() - GOAL).abs().sum())\n"
        "from rebasin.checkpoints import load_safetensors\n"
        f"GOAL = load_safetensors({str(here / 'b.safetensors')!r})[NAME]\n"
    )
    text = rebasin(*MERGE, "--method", "greedy_soup", "--option", "score=my_scores:distance")
    assert "weights 0, 1" in text
    merged, b = (dict(open_checkpoint(here / n).raw) for n in ("out.safetensors", "b.safetensors"))
    assert all(torch.equal(merged[name], b[name]) for name in b if "position_ids" not in name)
    assert "distance" in rebasin("inspect", "out.safetensors")


def test_a_score_is_asked_for_whole_models():
    """One soup of all components together, not one of each."""

    class Quiet:
        progress = None

        def stage(self, _: str) -> Any:
            import contextlib

            return contextlib.nullcontext()

        def say(self, text: str) -> None:
            self.said = text

    views = [
        {"unet": {"w": torch.tensor([float(i)])}, "vae": {"w": torch.tensor([-2.0 * i])}} for i in range(3)
    ]
    seen = []

    def score(state: Any) -> float:
        seen.append({name: state[name].item() for name in state})
        return abs(state["unet.w"].item() - 1) + abs(state["vae.w"].item() + 2)

    class Like:
        extras: dict[str, list[str]] = {}  # noqa: RUF012

        def restore(self, states: Any, keep: bool) -> Any:
            return {f"{part}.{n}": own[n] for part, own in states.items() for n in own}

    method, weights, rest = scored(
        cast(Any, Quiet()), METHODS["greedy_soup"], views, cast(Any, Like()), {"score": score, "mode": "min"}
    )
    assert weights == [0.0, 1.0, 0.0] and rest == {} and method.plan is None
    assert seen[0] == {"unet.w": 0.0, "vae.w": 0.0} and len(seen) == 5


def test_methods_tells_presets_and_what_a_method_needs():
    assert "GRAD_V" in rebasin("methods") and "COSINE" in rebasin("methods")
    assert "--fisher FILE" in rebasin("methods", "fisher")
    assert "score=package.module:function" in rebasin("methods", "greedy_soup")


# ------------------------------------------------------------------------------------------------------------- runs


def test_a_damaged_state_that_was_asked_for_is_told_and_one_that_was_not_begins_anew(tmp_path):
    path = tmp_path / "state.safetensors"
    for damage in (b"", b"x" * 99, b"\x08\0\0\0\0\0\0\0{}      "):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match="leave out resume=true to begin anew.$") as caught:
            Resume(path, wanted=True).arguments(weight_matching)
        assert str(path) in str(caught.value) and len(str(caught.value)) <= 300 + len(str(path))
        assert Resume(path, wanted=True, asked=False).arguments(weight_matching)["resume_from"] is None


def test_where_nothing_moved_only_a_merge_is_called_one(capsys):
    spec = PermutationSpec((), {})
    found = [Alignment(Member.of(spec.identity()), {"unet": spec}, {"unet": {"neurons": 24}})]
    for merged, words in ((False, "so nothing needs aligning."), (True, "so this is the plain merge.")):
        say_alignment(Console(), found, None, merged)
        told = " ".join(capsys.readouterr().out.split())
        assert f"All 24 neurons of B are in A's order already, {words}" in told


def test_groups_of_other_commands_are_named():
    error = ValueError("Could not override 'space'. No match in the defaults list.")
    for config in ("config", "compare_methods"):
        told = explain(error, ["space=blocks"], config)
        assert told.startswith("The group 'space' has no effect here: it is for rebasin search")
    assert (config_dir() / "space" / "blocks.yaml").is_file()


def test_long_lists_are_cut():
    names = [f"name{i}" for i in range(99)]
    assert (
        listed(names).startswith("name0, name1")
        and listed(names).endswith("more")
        and len(listed(names)) < 200
    )
    assert listed(["a", "b"]) == "a, b" and listed([]) == "none"


def task_of(a: Path, b: Path, *overrides: str) -> None:
    """What a run does first with `model=checkpoint`."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose(
            "config", ["model=checkpoint", f"model.a={a}", f"model.b={b}", "dry_run=true", *overrides]
        )
    load_task(cfg)


def test_a_run_on_checkpoints_looks_at_both_before_any_work(folder, tmp_path):
    text = "model.component=text_encoder"
    task_of(folder / "a.safetensors", folder / "b.safetensors", text)
    with pytest.raises(CheckpointError, match=r"fewer.safetensors has no tensor"):
        task_of(folder / "a.safetensors", folder / "fewer.safetensors", text)
    with pytest.raises(CheckpointError, match=r"lora.safetensors is a LoRA or another adapter"):
        task_of(folder / "a.safetensors", folder / "lora.safetensors", text)
    unet = random_checkpoint("sd1", 16, depth=1, vocabulary=64)
    one = {name: unet[name].clone() for name in unet if name.startswith("model.diffusion_model.")}
    save_safetensors(tmp_path / "noise.safetensors", one)
    save_safetensors(tmp_path / "velocity.safetensors", {**one, "v_pred": torch.zeros(0)})
    pair = tmp_path / "noise.safetensors", tmp_path / "velocity.safetensors"
    with pytest.raises(CheckpointError, match=r"add model.mix_predictions=true if you know better.$"):
        task_of(*pair)
    task_of(*pair, "model.mix_predictions=true")
    with pytest.raises(CheckpointError, match=r"add --mix-predictions if you know better.$"):
        require_same_prediction([open_checkpoint(path) for path in pair])


def test_a_command_begins_anew_where_what_was_kept_is_damaged(here, monkeypatch):
    def damaged(self: Aligning, member: str, what: str) -> Path:
        path = here / f".kept.{what}.safetensors"
        path.write_bytes(b"damaged")
        return path

    monkeypatch.setattr(Aligning, "unfinished", damaged)
    assert "Did anything move? Yes" in rebasin(
        "merge", "a.safetensors", "b.safetensors", "-o", "out.safetensors"
    )
