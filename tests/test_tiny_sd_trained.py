"""Tiny Stable Diffusions trained at any width: cached, and text encoder and UNet aligned as one or apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_run import configured, execute

from rebasin import weight_matching
from rebasin.checkpoints import load_safetensors
from rebasin.errors import ConfigError
from rebasin.jobs.algorithm import load_algorithm
from rebasin.models import tiny_sd
from rebasin.models.tiny_sd_trained import PromptedUNet, Trainer
from rebasin.models.tiny_sd_training import Recipe
from rebasin.spec import Permutation, PermutationSpec
from rebasin.tasks import load_task
from rebasin.tasks.tiny_sd_trained import _spec
from rebasin.tracing import verify

SHORT = [
    "model=tiny_sd_trained", "model.width=8", "model.recipe.steps=2", "model.text_recipe.steps=2",
    "model.recipe.batch_size=4", "model.text_recipe.batch_size=4", "data.train=8", "data.heldout=8",
    "evaluate.points=3", "model.samples=1", "model.steps=2",
]  # fmt: skip
UNSEEN = [*SHORT[:-2], "model.samples=0"]
SEARCHED = ["algo=ste_reward_quick", "algo.steps=1", "algo.refine=0", "algo.init=identity", "algo.reward.train=5",
            "algo.reward.batch_size=2", "algo.reward.steps=2",
            "algo.reward.scorer=test_tiny_sd_trained:ink"]  # fmt: skip


def ink(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """A scorer: the share of ink."""
    return images.mean(dim=(1, 2, 3))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """What is trained and traced is kept for this module only."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REBASIN_CACHE", str(folder))
        yield folder


def test_a_training_is_kept_and_its_seed_and_recipe_matter(cache: Path) -> None:
    text = tiny_sd.load_text_encoder()
    short = Recipe(steps=2, batch_size=4, learning_rate=2e-3, seed=0)

    def files() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in cache.glob("tiny_sd_unet8-*")}

    trainer = Trainer(8, short, short)
    a, b = (trainer.unet(seed, text)["conv_in.weight"] for seed in (0, 1))
    assert a.shape[0] == 8 and not torch.equal(a, b) and len(files()) == 2
    before = files()
    told = []
    assert torch.equal(Trainer(8, short, short).unet(1, text, told.append)["conv_in.weight"], b)
    assert files() == before and not told
    longer = Trainer(8, replace(short, steps=3), short).unet(0, text, told.append)["conv_in.weight"]
    assert not torch.equal(longer, a) and len(files()) == 3 and not list(cache.glob("*.unfinished"))
    assert [event["step"] for event in told] == [1, 2, 3] and told[0]["stage"] == "UNet of seed 0"


@pytest.mark.usefixtures("real_pictures")
def test_with_text_encoders_of_their_own_the_joint_spec_moves_what_passes_between(tmp_path: Path) -> None:
    joint, _ = execute(tmp_path / "joint", *SHORT, "model.text=own", "model.joint=true")
    apart, _ = execute(tmp_path / "apart", *UNSEEN, "model.text=own", *SEARCHED)
    assert joint["spec"]["neurons"] - apart["spec"]["neurons"] == tiny_sd.HIDDEN
    assert joint["verify"]["unet"]["passed"] and joint["endpoints"] == {"a": "seed 0", "b": "seed 1"}
    assert joint["curves"]["heldout"]["naive"]["losses"] == apart["curves"]["heldout"]["naive"]["losses"]
    assert (tmp_path / "joint" / "samples.png").stat().st_size > 1000
    # The text encoders are merged with the UNets.
    permutation = Permutation.load(tmp_path / "joint" / "permutation.safetensors")
    a, b = load_task(configured(*SHORT, "model.text=own", "model.joint=true")).endpoints(None)
    name = "text_encoder.final_layer_norm.weight"
    middle = (a[name] + permutation.apply(b)[name]) / 2
    torch.testing.assert_close(load_safetensors(tmp_path / "joint" / "merged.safetensors")[name], middle)
    # A search by reward leaves the curves to the objective.
    assert apart["match"]["search"]["naive"] < 0 < apart["curves"]["heldout"]["naive"]["losses"][1]


def test_a_search_by_reward_needs_prompts() -> None:
    task = load_task(configured("model=mlp", "model.width=4"))
    state = task.model.state_dict()
    with pytest.raises(ConfigError, match="makes no images of prompts"):
        load_algorithm(configured(*SEARCHED).algo)(task, PermutationSpec((), {}), state, state)


def test_where_both_share_a_text_encoder_joint_changes_nothing() -> None:
    """The embedded pair: what a shared encoder could lose by moving a neuron is more than the UNets gain by it, so that
    its neurons stay, and all others go where they go without them. (In one order: a random one has other draws.)
    """
    text, a, b = tiny_sd.load_text_encoder(), tiny_sd.load_unet("seed0"), tiny_sd.load_unet("seed1")
    models = [PromptedUNet(text, unet).eval() for unet in (a, b)]
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([10]), torch.zeros(1, 16, dtype=torch.long)
    found = {}
    for joint in (True, False):
        spec = _spec(models[0], inputs, joint)
        match = weight_matching(spec, models[0].state_dict(), models[1].state_dict(), order="forward")
        found[joint] = match.permutation.apply(models[1].state_dict())
    for name, tensor in found[True].items():
        assert torch.equal(tensor, found[False][name]), name
        if name.startswith("text_encoder."):
            assert torch.equal(tensor, models[0].state_dict()[name]), name
    verify(models[0], _spec(models[0], inputs, True), *inputs).require()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("model.width=12", "multiple of 8"),
        ("model.text=none", "shared or own"),
        ("model.seeds=[0,1,2]", "two whole numbers"),
        ("model.recipe.steps=0", "at least 1"),
        ("+model.recipe.step=1", "step"),
    ],
)
def test_mistakes_cost_one_sentence(wrong: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_task(configured(*SHORT, wrong))
