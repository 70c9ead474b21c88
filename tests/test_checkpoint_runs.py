"""Algorithms and objectives on checkpoints: a representative part of `python -m experiments.checkpoint_table`."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_files import read as read_file
from cli_files import rebasin
from torch import Tensor

from experiments import checkpoint_table as table
from rebasin.adapters.union import component_of, of_component, union
from rebasin.checkpoints import load_safetensors, open_checkpoint, save_safetensors
from rebasin.checkpoints.pipeline import assemble
from rebasin.checkpoints.provenance import read
from rebasin.checkpoints.tokenizers import cut
from rebasin.data import captioned_folder
from rebasin.errors import CheckpointError, ConfigError, DataError, RebasinError
from rebasin.jobs.algorithm import load_algorithm
from rebasin.merging import interpolate
from rebasin.models import tiny_sd
from rebasin.objectives import Denoising
from rebasin.objectives.denoising import CHANNELS, problems
from rebasin.objectives.sampling import sample
from rebasin.spec import Alignment, Permutation, PermutationSpec
from rebasin.tasks import Task, load_task
from rebasin.tasks import checkpoint as checkpoint_task
from rebasin.tasks.around import Around
from rebasin.tasks.tiny_sd import WEIGHTS
from rebasin.tensors.modules import loaded


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("twins")


@pytest.fixture(scope="module")
def twins(place: Path) -> Callable[[str], table.Twins]:
    return cache(lambda family: table.twins(family, place))


@pytest.fixture(scope="module")
def asked(place: Path, twins: Callable[[str], table.Twins]) -> Callable[..., list[str]]:
    data = table.images(place)
    return lambda family, *options: table.asked(options, twins(family), data)


# The table ------------------------------------------------------------------------------------------------------


SHARE = 1.25
"""Of B, in the whole checkpoint that is left: beyond it, to see that all components are merged by the same."""


@pytest.fixture(scope="module")
def whole(asked: Any, place: Path) -> tuple[Path, dict[str, Any]]:
    """A cell of the table that leaves its files: their folder, and results.json."""
    name, objective = "activation_matching_prompts", "distillation"
    (options,) = table.rows([name], [objective]).values()
    found = table.cell(asked("sd1", *options, "tensors=true", f"merge.weights={SHARE}"), place / "whole")
    assert found is not None
    return place / "whole", found


LORA = tuple(f"{name}.weight" for name in ("to_q", "to_out.0", "conv1", "net.2", "proj_in", "v_proj", "fc1"))
"""Modules that the LoRA has."""


def test_a_cell_of_the_table(whole):
    _, found = whole
    for kind in ("naive", "aligned"):
        assert all(np.isfinite(found["curves"]["heldout"][kind]["losses"]))
    assert found["match"]["moved"] > 100


@pytest.fixture(scope="module")
def tasks(asked: Any) -> Callable[[str], tuple[Task, Any]]:
    """Objective -> the task of three folders, and their states."""

    @cache
    def load(objective: str) -> tuple[Task, Any]:
        options = asked("folder", f"objective={objective}", *table.OBJECTIVES[objective], "model.files")
        task = load_task(table.configured(options))
        return task, task.endpoints(None)

    return load


def few(spec: PermutationSpec) -> PermutationSpec:
    """Some of its groups: to see that an algorithm runs need not take long."""
    return replace(spec, groups=spec.groups[::6])


REST = [name for name in table.ALGORITHMS if name != "activation_matching_prompts"]
IN_TURN = ("agreement", "denoising", "distillation", "reward")


@pytest.mark.parametrize("name", REST)
def test_every_algorithm(tasks, name):
    task, states = tasks(IN_TURN[REST.index(name) % len(IN_TURN)])
    algorithm = load_algorithm(table.configured([f"algo={name}", *table.ALGORITHMS[name]]).algo)
    spec = few(task.parts["unet"].spec())
    result = algorithm(task, spec, *(states if "states" in algorithm.takes else states[:2]))
    found = result.permutations[1] if "states" in algorithm.takes else result.permutation
    assert found.is_identity == (name == "naive")
    batches = task.batches["heldout"]
    before, after = (
        task.objective.evaluate(loaded(task.model, state), batches)["loss"]
        for state in (states[1], found.apply(states[1]))
    )
    assert after == pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize(
    ("family", "objective"),
    [("sdxl", "reward"), ("inpainting", "denoising")],
)
def test_what_other_families_are_told(asked, family, objective):
    """Objectives look at their models; what a run does besides is the same for all."""
    options = asked(family, f"objective={objective}", *table.OBJECTIVES[objective])
    task = load_task(table.configured(options))
    for split, batches in task.batches.items():
        assert np.isfinite(task.objective.evaluate(task.model, batches)["loss"]), split
    (batch,) = task.batches["train"][:1]
    task.objective.loss(task.model, batch).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in task.model.parameters())


def test_the_result_is_a_whole_checkpoint_and_says_how_it_was_made(whole, twins):
    folder, _ = whole
    merged, a = (load_safetensors(f) for f in (folder / "checkpoint.safetensors", twins("sd1").files[0]))
    assert list(merged) == list(a)
    told = read(merged.metadata)
    assert (
        told is not None
        and told["recipe"]["algorithm"] == "activation_matching_prompts"
        and len(told["inputs"]) == 2
    )
    permutation = Permutation.load(folder / "checkpoint.permutation.safetensors")
    assert set(component_of(permutation.spec)) == {"unet", "vae", "text_encoder"}
    kept = told["alignment"].values()
    assert sum(own["neurons"] for own in kept) == permutation.spec.neurons
    assert sum(own["moved"] for own in kept) == permutation.moved()
    for component in ("unet", "vae", "text_encoder"):
        ours, theirs = (open_checkpoint(f).component(component) for f in twins("sd1").files[:2])
        own = of_component(permutation, component)
        assert own is not None
        found, moved = (
            open_checkpoint(folder / "checkpoint.safetensors").component(component),
            own.view(theirs),
        )
        for name in list(ours)[:20]:
            torch.testing.assert_close(found[name], torch.lerp(ours[name], moved[name], SHARE))
    assert told["recipe"]["lam"] == SHARE


def test_a_lora_moved_by_the_permutation_does_to_aligned_b_what_it_does_to_b(whole, twins, tmp_path):
    """As people do it, by the command; its modules are in the UNet and in the text encoder, in kohya's names."""
    folder, b = whole[0] / "checkpoint.permutation.safetensors", twins("sd1").files[1]

    def assembled(file: Path) -> Any:
        return assemble(open_checkpoint(file), tokenizer=b.parent / "tokenizer", without=["vae"])

    pipeline = assembled(b)
    factors, places = {}, {}
    for component, prefix in (("unet", "lora_unet_"), ("text_encoder", "lora_te_")):
        for name, weight in getattr(pipeline, component).named_parameters():
            if not name.endswith(LORA):
                continue
            key = name.removesuffix(".weight").replace(".", "_")
            key = key if component == "unet" or key.startswith("text_model") else f"text_model_{key}"
            ones, places[prefix + key] = [1] * (weight.ndim - 2), (component, name)
            down = torch.randn(2, *weight.shape[1:]) / weight[0].numel() ** 0.5
            factors[f"{prefix}{key}.lora_down.weight"] = down
            factors[f"{prefix}{key}.lora_up.weight"] = torch.randn(len(weight), 2, *ones)
            factors[f"{prefix}{key}.alpha"] = torch.tensor(1.0)
    lora = save_safetensors(tmp_path / "lora.safetensors", factors)
    rebasin("apply", folder, lora, "-o", tmp_path / "moved.safetensors")
    rebasin("apply", folder, b, "-o", tmp_path / "aligned.safetensors")

    def outputs(file: Path, adapter: Path | None) -> Tensor:
        pipeline = assembled(file)
        own = {} if adapter is None else read_file(adapter)
        for key, (component, name) in places.items() if own else ():
            up, down = (own[f"{key}.lora_{part}.weight"].flatten(1) for part in ("up", "down"))
            weight = dict(getattr(pipeline, component).named_parameters())[name]
            weight.data += (up @ down).reshape(weight.shape) * own[f"{key}.alpha"] / 2
        with torch.no_grad():
            ids = pipeline.tokenizer(["a handwritten seven"], return_tensors="pt").input_ids
            noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
            return pipeline.unet(noise, 400, pipeline.text_encoder(ids)[0]).sample

    wanted = outputs(b, lora)
    torch.testing.assert_close(
        outputs(tmp_path / "aligned.safetensors", tmp_path / "moved.safetensors"), wanted, rtol=0, atol=1e-5
    )
    assert (outputs(b, None) - wanted).abs().max() > 0.01
    assert (outputs(tmp_path / "aligned.safetensors", lora) - wanted).abs().max() > 0.01


def test_many_models_leave_a_whole_checkpoint_and_a_permutation_each(asked, twins, place):
    table.cell(asked("folder", "algo=merge_many", "tensors=true", "model.batches=0"), place / "many")
    files, merged = twins("folder").files, open_checkpoint(place / "many" / "checkpoint")
    moved = 0
    for component in merged.components:
        states: list[Any] = [open_checkpoint(file).component(component) for file in files]
        for number in range(len(files)):
            path = place / "many" / f"checkpoint.permutation_{number + 1}.safetensors"
            own = of_component(Permutation.load(path), component) if path.exists() else None
            if own is not None:
                states[number], moved = own.view(states[number]), moved + own.moved()
        found = merged.component(component)
        for name in list(found)[:20]:
            mean = sum(state[name].float() for state in states) / len(states)
            torch.testing.assert_close(found[name].float(), mean, rtol=2e-3, atol=1e-4)
    assert moved > 100
    told = read(load_safetensors(place / "many" / "checkpoint" / "unet" / WEIGHTS).metadata)
    assert told is not None and len(told["inputs"]) == len(files) == len(told["recipe"]["weights"])


def test_texts_and_unet_as_one(asked, tasks):
    """On the symmetries of the UNet alone; those of both are made in test_cli_joint.py."""
    row = "joint, activation_matching_prompts"
    cfg = table.configured(
        asked("folder", *table.OTHERS[row], "objective=distillation", *table.OBJECTIVES["distillation"])
    )
    task = load_task(cfg)
    assert {"ids"} <= set(task.batches["train"][0]["condition"])
    alone = tasks("agreement")[0].parts["unet"].spec()
    spec = few(union({"unet": alone.random(0)}).spec)
    spec = replace(spec, shapes={name: tuple(t.shape) for name, t in task.model.state_dict().items()})
    result = load_algorithm(cfg.algo)(task, spec, *task.endpoints(None))
    assert result.permutation.moved() > 10


def test_the_vae_and_its_pictures(asked):
    options = [*table.OTHERS["vae, activation_matching_prompts"], "model.samples=2", "model.steps=1"]
    task = load_task(table.configured(asked("folder", *options)))
    a, b = task.endpoints(None)
    assert task.sampler is not None and task.pipeline is not None and task.aligned == "vae"
    made = task.sampler({"A": a, "B": b}, 0)
    assert list(made.rows) == ["A", "B"] and all(len(images) == 2 for images in made.rows.values())


def test_the_tiny_pipeline_as_folders_is_the_tiny_pipeline(place):
    for name in ("seed0", "seed1"):
        tiny_sd.load_pipeline(name, dtype=torch.float16).save_pretrained(str(place / name))
    images = ["data=captioned_digits", "data.heldout=20", "data.train=20", "data.batch_size=10"]
    folders = [f"model.{end}={place / name}" for end, name in (("a", "seed0"), ("b", "seed1"))]
    ours, theirs = (
        load_task(table.configured([*model, "objective=denoising", "model.samples=0", *images]))
        for model in (["model=checkpoint", *folders], ["model=tiny_sd"])
    )
    for (a, b), (other_a, other_b) in [(ours.endpoints(None), theirs.endpoints(None))]:
        for lam in (0.0, 0.5, 1.0):
            found, wanted = (
                task.objective.evaluate(loaded(task.model, interpolate(*ends, lam)), task.batches[split])[
                    "loss"
                ]
                for split in ("heldout",)
                for task, ends in ((ours, (a, b)), (theirs, (other_a, other_b)))
            )
            assert found == pytest.approx(wanted, rel=1e-6)
    assert len(ours.batches["train"]) == len(theirs.batches["train"])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (["objective=denoising"], ConfigError, "captioned_folder"),
        (["objective=distillation", "model.component=vae"], ConfigError, "looks at a denoiser"),
        (["evaluate=reward", "model.component=text_encoder"], ConfigError, "looks at a denoiser"),
        (["objective=distillation", "objective.prompts=EMPTY"], DataError, "has no prompts"),
        (["objective=distillation", "model.tokenizer=null"], CheckpointError, "tokens"),
        (["objective=distillation", "model.size=50"], ConfigError, "multiples"),
        (["objective=reward"], ConfigError, "objective.scorer is not set"),
        (["evaluate=reward", "evaluate.scorer=nowhere:one"], ConfigError, "'nowhere:one' can't be imported"),
        (["evaluate=image_reward", "evaluate.weights=nowhere.pt"], CheckpointError, "nowhere.pt"),
        (["model.samples=2", "model.steps=0"], ConfigError, "model.steps is 0"),
        (["model.samples=2", "model.guidance=.nan"], ConfigError, "model.guidance"),
        (["model.samples=-1"], ConfigError, "model.samples is -1"),
        (["model.size=0"], ConfigError, "model.size is 0"),
        (["model.size=big"], ConfigError, "model.size is 'big'"),
        (["algo=activation_matching_prompts", "algo.points=0"], ConfigError, "algo.points is 0"),
        (["algo=activation_matching_prompts", "algo.steps=0"], ConfigError, "algo.steps is 0"),
        (["algo=activation_matching_prompts", "algo.batch_size=0"], ConfigError, "algo.batch_size is 0"),
        (["algo=activation_matching_prompts", "algo.count=-2"], ConfigError, "algo.count is -2"),
        (["algo=activation_matching_prompts", "algo.points=few"], ConfigError, "algo.points"),
        (["objective=distillation", "objective.steps=0"], ConfigError, "objective.steps is 0"),
        (
            ["objective=denoising", "data=captioned_folder", "data.heldout=some"],
            ConfigError,
            "data.heldout is 'some'",
        ),
        (["model.files=[A,B,C]", "algo=merge_many", "model.a=A"], ConfigError, "leave out model.a"),
        (["model.files=[A]", "model.a=null", "model.b=null"], ConfigError, "one checkpoint"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(asked, tmp_path, monkeypatch, options, error, words):
    empty = tmp_path / "empty.txt"
    empty.write_text("# nothing\n")
    given = asked("sd1", *(option.replace("EMPTY", str(empty)) for option in options))
    monkeypatch.setattr(checkpoint_task, "assemble", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(error, match=re.escape(words)) as told:
        cfg = table.configured(given)
        load_algorithm(cfg.algo, len(cfg.model.files or ()) > 2)
        load_task(cfg)
    assert isinstance(told.value, RebasinError) and str(told.value).endswith(".")


def test_prompts_that_are_cut_and_the_room_for_files_are_told_at_once(asked, twins, tmp_path, monkeypatch):
    for slow in ("plan", "require_memory"):
        monkeypatch.setattr(checkpoint_task.Members, slow, lambda *_: [])
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"a seven\n{'a handwritten seven ' * 40}\n{'the number two ' * 40}\n")
    own = ["objective=denoising", *table.OBJECTIVES["denoising"], f"model.prompts={prompts}"]
    task, a = load_task(table.configured(asked("sd1", *own, "dry_run=true"))), twins("sd1").files[0]
    # Of three prompts and the captions of three images; the tokenizer is a small one.
    told = "2 of 6 prompts are longer than the 16 tokens that a text encoder reads, and cut there."
    assert list(task.remarks) == [told]
    assert cut(["a seven"] * 9, [tiny_sd.load_tokenizer()]) is None
    merged = open_checkpoint(a).component("unet")
    assert task.room == a.stat().st_size + 2 * sum(merged[name].nbytes for name in merged)


# Images ---------------------------------------------------------------------------------------------------------


def test_a_folder_and_an_archive_of_captioned_images(place, tmp_path):
    from PIL import Image

    for number in range(4):
        Image.new("RGB", (30 + number, 20), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"picture {number}")
    train, texts = captioned_folder.load(tmp_path, "train", side=16, channels=3)
    heldout, others = captioned_folder.load(tmp_path, "heldout", side=16, channels=3)
    assert train.shape == (3, 3, 16, 16) and heldout.shape == (1, 3, 16, 16)
    assert sorted([*texts, *others]) == [f"picture {n}" for n in range(4)]
    grey, _ = captioned_folder.load(table.images(place), "train", train=1, heldout=2, side=8, channels=1)
    assert grey.shape == (1, 1, 8, 8) and grey.abs().max() <= 1
    with pytest.raises(DataError, match="4 images"):
        captioned_folder.load(tmp_path, "train", train=4, heldout=1, side=16, channels=3)
    (tmp_path / "5.txt").write_text("nothing to see")
    with pytest.raises(DataError, match="has no image"):
        captioned_folder.listed(tmp_path)
    (tmp_path / "5.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="can't be read"):
        captioned_folder.load(tmp_path, "train", train=4, heldout=1, side=16, channels=3)
    np.savez(tmp_path / "half.npz", images=np.zeros((2, 4, 4), np.uint8))
    with pytest.raises(DataError, match="'captions'"):
        captioned_folder.listed(tmp_path / "half.npz")


# Conditions -----------------------------------------------------------------------------------------------------


class Told(torch.nn.Module):
    """A denoiser that notes what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, added: Any = None
    ) -> Any:
        self.seen = sample.shape, encoder_hidden_states.shape, added["ids"].shape
        shift = (
            encoder_hidden_states.mean((1, 2)) + added["ids"].float().mean(1) + sample[:, 2:].mean((1, 2, 3))
        )
        return type("Output", (), {"sample": sample[:, :2] * self.weight + shift[:, None, None, None]})


def test_conditions_are_mappings_of_what_a_denoiser_is_told():
    problem, n = Denoising("epsilon", torch.linspace(0.99, 0.01, 10)), 5
    told = {
        "encoder_hidden_states": torch.randn(n, 3, 4),
        "added": {"ids": torch.arange(n * 2).reshape(n, 2)},
        CHANNELS: torch.ones(n, 1, 2, 2),
    }
    model = Told()
    batches = problems(problem, torch.randn(n, 2, 2, 2), told, batch_size=2)
    assert [len(batch["condition"]["added"]["ids"]) for batch in batches] == [2, 2, 1]
    whole = problem.evaluate(model, problems(problem, torch.cat([b["latents"] for b in batches]), told))
    assert problem.evaluate(model, batches)["loss"] == pytest.approx(whole["loss"])
    first = {
        name: part[:1] if isinstance(part, Tensor) else {"ids": part["ids"][:1]}
        for name, part in told.items()
    }
    made = sample(model, problem, torch.randn(n, 2, 2, 2), told, first, steps=2, guidance=2.0)
    assert made.shape == (n, 2, 2, 2) and model.seen == ((10, 3, 2, 2), (10, 3, 4), (10, 2))


def test_what_a_tiny_unet_is_told():
    around = Around(tiny_sd.load_pipeline("seed0"))
    states = around.states(["a handwritten seven"])
    assert isinstance(states, Tensor) and states.shape == (1, tiny_sd.CONTEXT, tiny_sd.HIDDEN)
    assert around.shape == (4, 8, 8) and around.channels(2) is None
    with pytest.raises(ConfigError, match="multiples of 4"):
        Around(around.pipeline, 30)


# By the command ---------------------------------------------------------------------------------------------------


def test_the_command_learns_maps_of_the_unet(twins, place: Path, monkeypatch: pytest.MonkeyPatch):
    found = twins("folder")
    a, b = found.files[:2]
    few = (
        "algo.steps=2",
        "algo.evaluate_every=1",
        "algo.init=identity",
        "objective.samples=4",
        "objective.steps=2",
    )
    given = [*few, "objective.batch_size=2", *(told for told in found.options if "prompts" not in told)]
    learn = [word for one in given for word in ("--learn", one)]
    out = place / "learned"
    prompts = ("--prompts", place / "prompts.txt")
    told = rebasin("merge", a, b, "-o", out, "--learned", *learn, *prompts, "--only", "unet")
    assert "Between A and B the loss of the unet is above that of the ends by" in told
    assert "Is it legal? Yes" in told and "groups have maps" in told
    kept = out.with_name("learned.alignment.safetensors")
    own = of_component(Alignment.load(kept), "unet")
    assert own is not None and own.maps
    one, other = (open_checkpoint(file).component("unet") for file in (a, b))
    moved, merged = own.view(dict(other)), open_checkpoint(out).component("unet")
    for name in one:
        torch.testing.assert_close(merged[name], (one[name] + moved[name]) / 2, rtol=1e-4, atol=1e-5)
    shutil.rmtree(out)
    monkeypatch.setattr("rebasin.cli.learned.learn", None)  # what was found is taken again
    again = ("--only", "unet", "--alpha", 0.3, "--no-check")
    assert "as found before" in rebasin("merge", a, b, "-o", out, "--learned", *learn, *prompts, *again)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--learn", "algo.steps=2"], "--learn has no effect without --learned; add it, or leave it out."),
        (["--learned", "--learn", "algo.step=2"], "there is no option algo.step; python -m rebasin.run"),
        (
            ["--learned", "--learn", "model.a=2"],
            "--learn model.a=2 is no option of what is learned; give algo.",
        ),
        (["--learned", "--joint"], "--learned moves the UNet within itself"),
        (["--learned", "--only", "vae"], "--learned learns maps of the UNet, which --only leaves out"),
        (["--learned", "--prompts", "nowhere.txt"], "no file or folder nowhere.txt"),
        (["--learned", "--no-align"], "--learned and --no-align contradict each other"),
    ],
)
def test_what_does_not_go_with_learning_is_told(options: list[str], words: str, tmp_path: Path):
    told = rebasin(
        "merge", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "c.safetensors", *options, expect=2
    )
    assert words in told.replace("\n", " ")
