"""Rewards: sampling against diffusers' pipeline, gradients through the last steps, and ImageReward itself.

The tests of ImageReward (`pytest tests/test_reward.py -m image_reward`: a minute, 4 GB) build the real architecture,
447 M parameters, with weights that can be made again from a seed, and compare it with what the unpatched library gave
beside the transformers it was written for (experiments/image_reward_reference.py). Its packages and ours do not live in
one environment, so one test here runs those in a process of their own.
"""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aside import ROOT, environment
from torch import Tensor, nn

from experiments.image_reward_reference import PROMPTS, checksum, images, weights
from rebasin.data.prompts import read_prompts
from rebasin.errors import CheckpointError, ConfigError, DataError
from rebasin.models import tiny_sd
from rebasin.objectives import Denoising, Reward, image_reward_library
from rebasin.objectives import image_reward as ir
from rebasin.objectives.base import imported
from rebasin.objectives.reward import decoder, prompt_batches
from rebasin.objectives.sampling import sample

REFERENCE = json.loads((Path(__file__).parent / "data" / "image_reward.json").read_text())
TEXTS = ["a handwritten seven", "a handwritten two", "the digit five"]


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    """A scorer: how much ink there is, and a little for long prompts."""
    assert images.ndim == 4 and len(prompts) == len(images)
    return images.mean(dim=(1, 2, 3)) + torch.tensor([0.01 * len(prompt) for prompt in prompts])


class Darkness:
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return 1 - images.mean(dim=(1, 2, 3))


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_sd.load_pipeline()


@pytest.fixture(scope="module")
def batch(pipeline: Any) -> dict[str, Any]:
    def embed(texts: Any) -> Tensor:
        tokens = pipeline.tokenizer(list(texts), padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            return pipeline.text_encoder(tokens)[0]

    return prompt_batches(TEXTS, embed, (4, 8, 8), batch_size=3, seed=3)[0]


def reward(pipeline: Any, **options: Any) -> Reward:
    problem = Denoising("epsilon", pipeline.scheduler.alphas_cumprod)
    options = {"scorer": brightness, "steps": 4, "guidance": 1.0, **options}
    return Reward(decode=decoder(pipeline.vae), problem=problem, **options)


# Sampling and the generic reward ----------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_images_are_those_of_the_pipeline(pipeline: Any, batch: dict[str, Any], guidance: float):
    objective = reward(pipeline, guidance=guidance, steps=5)
    with torch.no_grad():
        ours = objective.images(pipeline.unet, batch)
    theirs = pipeline(
        TEXTS, latents=batch["noise"], num_inference_steps=5, guidance_scale=guidance, output_type="pt"
    ).images
    assert ours.shape == (3, 1, 32, 32) and ours.std() > 0.05
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)


def test_v_prediction_and_epsilon_are_one_trajectory(pipeline: Any, batch: dict[str, Any]):
    """A model of the velocity that is the epsilon model in disguise makes the same latents."""
    alphas = pipeline.scheduler.alphas_cumprod

    class Velocity(nn.Module):
        def forward(self, noisy: Tensor, times: Tensor, encoder_hidden_states: Tensor) -> Any:
            out = pipeline.unet(noisy, times, encoder_hidden_states=encoder_hidden_states)
            alpha = alphas[times][:, None, None, None]
            clean = (noisy - (1 - alpha).sqrt() * out.sample) / alpha.sqrt()
            out.sample = alpha.sqrt() * out.sample - (1 - alpha).sqrt() * clean
            return out

    options: dict[str, Any] = {"steps": 4}
    args = batch["noise"], batch["condition"]
    with torch.no_grad():
        epsilon = sample(pipeline.unet, Denoising("epsilon", alphas), *args, **options)
        velocity = sample(Velocity(), Denoising("v_prediction", alphas), *args, **options)
    torch.testing.assert_close(velocity, epsilon, atol=1e-3, rtol=1e-3)


def test_flow_with_the_true_velocity_ends_at_the_clean_latents():
    clean, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)

    class Straight(nn.Module):
        def forward(self, latents: Tensor, times: Tensor) -> Any:
            return type("Output", (), {"sample": noise - clean})

    for steps in (1, 7):
        found = sample(Straight(), Denoising("flow"), noise, steps=steps)
        torch.testing.assert_close(found, clean, atol=1e-5, rtol=1e-5)


def test_the_gradient_flows_through_as_many_last_steps_as_wanted(pipeline: Any, batch: dict[str, Any]):
    calls: list[bool] = []

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(torch.is_grad_enabled())
            out = pipeline.unet(*args, **kwargs)
            out.sample = out.sample * self.scale
            return out

    slopes = []
    for grad_steps in (1, 2, 4):
        calls.clear()
        model = Counting()
        loss = reward(pipeline, grad_steps=grad_steps).loss(model, batch)
        (slope,) = torch.autograd.grad(loss, [model.scale])
        slopes.append(float(slope))
        assert calls == [False] * (4 - grad_steps) + [True] * grad_steps
    assert len(set(slopes)) == 3 and all(math.isfinite(s) and s != 0 for s in slopes)

    objective, step = reward(pipeline, grad_steps=4), 2e-3
    losses = []
    for sign in (-1, 1):
        model = Counting()
        model.scale.data += sign * step
        losses.append(float(objective.loss(model, batch).detach()))
    assert slopes[-1] == pytest.approx((losses[1] - losses[0]) / (2 * step), rel=0.05), "finite differences"


def test_the_loss_is_minus_the_mean_score_over_all_images(pipeline: Any, batch: dict[str, Any]):
    objective = reward(pipeline)
    with torch.no_grad():
        scores = objective.scores(pipeline.unet, batch)
        expected = objective.images(pipeline.unet, batch).mean(dim=(1, 2, 3))
    torch.testing.assert_close(scores, expected + torch.tensor([0.01 * len(text) for text in TEXTS]))
    parts = [
        {k: v if k == "unconditional" else v[i:j] for k, v in batch.items()} for i, j in ((0, 2), (2, 3))
    ]
    figures = objective.evaluate(pipeline.unet, parts)
    assert figures["reward"] == pytest.approx(float(scores.mean()), abs=1e-5) == -figures["loss"]
    assert -objective.loss(pipeline.unet, batch).item() == pytest.approx(figures["reward"], abs=1e-5)


def test_scorers_by_path_and_what_they_may_do_wrong(pipeline: Any, batch: dict[str, Any]):
    here = __name__
    assert imported("scorer", f"{here}:brightness") is brightness is imported("scorer", f"{here}.brightness")
    assert isinstance(reward(pipeline, scorer=f"{here}:Darkness").scorer, Darkness)
    for path, words in (
        (f"{here}:nothing", "can't be imported"),
        ("nothing_at_all:score", "can't be imported"),
        ("brightness", "package.module:function"),
        (f"{here}:TEXTS", "can't be called"),
    ):
        with pytest.raises(ConfigError, match=words):
            imported("scorer", path)
    wrong = reward(pipeline, scorer=lambda images, prompts: images.mean())
    with pytest.raises(ConfigError, match="one score for each"), torch.no_grad():
        wrong.scores(pipeline.unet, batch)
    with pytest.raises(ConfigError, match="grad_steps is 9"):
        reward(pipeline, grad_steps=9)
    with pytest.raises(ConfigError, match="steps is 0, but it must be at least 1"):
        reward(pipeline, steps=0)


def test_prompts_and_their_noise(tmp_path: Path):
    file = tmp_path / "prompts.txt"
    file.write_text("# not this\na cat\n\n  a dog \n")
    assert read_prompts(file) == ["a cat", "a dog"]
    file.write_text("# nothing\n")
    with pytest.raises(DataError, match="no prompts"):
        read_prompts(file)
    with pytest.raises(DataError, match="There is no file or folder"):
        read_prompts(tmp_path / "missing.txt")

    def embed(texts: Any) -> Tensor:
        return torch.tensor([float(len(text)) for text in texts])[:, None, None]

    big = prompt_batches(["a", "bc"], embed, (2, 3, 3), count=5, batch_size=2, seed=1)
    assert [b["prompts"] for b in big] == [["a", "bc"], ["a", "bc"], ["a"]]
    small = prompt_batches(["x"], embed, (2, 3, 3), count=3, batch_size=3, seed=1)
    assert torch.equal(torch.cat([b["noise"] for b in big])[:3], small[0]["noise"])
    other = prompt_batches(["x"], embed, (2, 3, 3), count=3, batch_size=3, seed=2)
    assert not torch.equal(other[0]["noise"], small[0]["noise"])
    assert big[0]["condition"].flatten().tolist() == [1, 2] and big[0][
        "unconditional"
    ].flatten().tolist() == [0]
    with pytest.raises(ConfigError, match="at least one"):
        prompt_batches([], embed, (2, 3, 3))


def test_image_reward_says_where_the_weights_are_to_be_had(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"download https://.*ImageReward\.pt"):
        ir.image_reward(None)
    with pytest.raises(CheckpointError, match=r"no file .*missing\.pt: download https://"):
        ir.image_reward(tmp_path / "missing.pt")
    if importlib.util.find_spec("ImageReward") is None:
        with pytest.raises(ConfigError, match=r"pip install 'git-rebasin\[reward\]'"):
            ir.build()


# ImageReward itself -----------------------------------------------------------------------------------------

needs_image_reward = pytest.mark.image_reward

UNUSED = "ImageReward does not use"


def test_a_package_that_image_reward_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    inside = tmp_path / "ImageReward" / "models" / "BLIP"
    inside.mkdir(parents=True)
    for folder in (inside.parents[1], inside.parents[0], inside):
        (folder / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in [name for name in sys.modules if name.split(".")[0] == "ImageReward"]:
        monkeypatch.delitem(sys.modules, name)
    (inside / "med.py").write_text("import torch_nowhere.transforms\n")
    with pytest.raises(
        ConfigError, match="^ImageReward needs the package torch_nowhere, which is not installed: pip"
    ):
        image_reward_library.library.__wrapped__()
    (inside / "med.py").write_text("from json import nothing\n")
    with pytest.raises(
        ConfigError, match="image-reward can't be imported .cannot import name 'nothing'.*: install"
    ):
        image_reward_library.library.__wrapped__()


def test_image_reward_in_a_process_that_sees_its_packages() -> None:
    there = environment("reward", "vision", needs="ImageReward")
    if there is None:
        pytest.skip("no image-reward: make .venv/.installed-dev puts it into .venv/reward")
    command = [
        sys.executable,
        "-m",
        "pytest",
        __file__,
        "-m",
        "image_reward",
        "--no-skips",
        "-p",
        "no:cacheprovider",
    ]
    run = subprocess.run(command, cwd=ROOT, env=there, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(ir.letters()) + "\n")
    return path


@pytest.fixture(scope="module")
def empty(vocabulary: Path) -> dict[str, Tensor]:
    """Every tensor of the real architecture, without values: one number stands for all of each."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = ir.build(vocabulary)
    return {name: torch.zeros(1).expand(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def scorer(empty: dict[str, Tensor], vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The real architecture with the reference's weights, loaded from a file as a user does it."""
    made = {
        name: torch.from_numpy(weights(name, tuple(tensor.shape))).half()
        for name, tensor in empty.items()
        if name not in ir.BUFFERS
    }
    file = tmp_path_factory.mktemp("image_reward") / "ImageReward.pt"
    torch.save(made, file)
    del made
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{UNUSED}")
        scorer = ir.load(file, vocabulary)
    file.unlink()
    return scorer


def tensors() -> list[Tensor]:
    return [torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255 for picture in images()]


@needs_image_reward
def test_scores_are_those_of_the_unpatched_library(scorer: ir.ImageReward):
    parameters = dict(scorer.model.named_parameters())
    assert sum(p.numel() for p in parameters.values()) == REFERENCE["parameters"]
    assert checksum(p.numpy() for p in list(parameters.values())[:4]) == REFERENCE["weights_checksum"]
    assert checksum(np.asarray(picture) for picture in images()) == REFERENCE["images_checksum"]
    tokenizer: Any = scorer.model.blip.tokenizer  # type: ignore[union-attr]
    assert [tokenizer(prompt).input_ids for prompt in PROMPTS] == REFERENCE["tokens"]
    expected = torch.tensor(REFERENCE["scores"])
    assert expected.std(dim=0).min() > 0.005 and expected.std(dim=1).min() > 0.1, "prompts and images matter"
    with torch.no_grad():
        # Made smaller and cut. Resized pictures of the library have whole numbers of 255ths and these have not, which
        # the random weights make much of.
        found = scorer(tensors()[2].expand(2, -1, -1, -1), PROMPTS[1:3])
        torch.testing.assert_close(found, expected[1:3, 2], atol=0.03, rtol=0)


@needs_image_reward
def test_images_are_prepared_as_the_library_does_it(scorer: ir.ImageReward):
    model: Any = scorer.model
    for picture, tensor in zip(images(), tensors(), strict=True):
        theirs, ours = model.preprocess(picture), ir.preprocess(tensor)[0]
        assert theirs.shape == ours.shape == (3, 224, 224)
        # PIL rounds to 255ths twice. One pixel of crop or size more or less makes differences of 0.3.
        assert (ours - theirs).abs().max() < 2.1 / 255 / min(ir.SPREAD)
        assert (ours - theirs).abs().mean() < 0.4 / 255 / min(ir.SPREAD)


@needs_image_reward
def test_the_gradient_is_that_of_the_unpatched_library(scorer: ir.ImageReward):
    picture = tensors()[0].requires_grad_()
    # 224 x 224 is not resized: equal up to the order of sums.
    scores = scorer(picture, PROMPTS[:1])
    torch.testing.assert_close(scores.detach(), torch.tensor(REFERENCE["scores"])[:1, 0], atol=2e-5, rtol=0)
    scores[0].backward()
    assert picture.grad is not None
    # By the pixels that the model sees, which are (x - mean) / spread.
    gradient = picture.grad[0] * torch.tensor(ir.SPREAD)[:, None, None]
    assert float(gradient.norm()) == pytest.approx(REFERENCE["gradient"]["norm"], rel=1e-4)
    values = gradient[:, 20::60, 20::60].flatten()
    expected = torch.tensor(REFERENCE["gradient"]["values"])
    torch.testing.assert_close(values, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-3)
    assert all(p.grad is None and not p.requires_grad for p in scorer.model.parameters())


@needs_image_reward
@pytest.mark.parametrize("change", ["missing", "shape", "unknown", "not weights", "other"])
def test_a_wrong_file_does_not_load(empty: dict[str, Tensor], vocabulary: Path, tmp_path: Path, change: str):
    state: Any = dict(empty)
    name = "mlp.layers.0.weight"
    words = ""
    if change == "missing":
        del state[name]
        words = r"lacks the tensor 'mlp\.layers\.0\.weight'\.$"
    elif change == "shape":
        state[name] = torch.zeros(2, 2)
        words = r"'mlp\.layers\.0\.weight' has the shape \(2, 2\) instead of \(1024, 768\)"
    elif change == "other":
        state = {"state_dict": torch.zeros(1), "model.weight": torch.zeros(2)}
        words = r"lacks the tensor '.*' \(and \d+ more\)"
    elif change == "not weights":
        state = {"state_dict": state}
        words = "no plain mapping from names to tensors"
    elif change == "unknown":
        state["blip.queue"] = torch.zeros(3)
    file = tmp_path / "ImageReward.pt"
    torch.save(state, file)
    if words:
        with pytest.raises(CheckpointError, match=words):
            ir.load(file, vocabulary)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = ir.load(file, vocabulary)
    told = [text for warning in caught if UNUSED in (text := str(warning.message))]
    assert len(told) == 1 and "'blip.queue'" in told[0]
    assert not any(p.is_meta for p in loaded.model.parameters())


@needs_image_reward
def test_a_damaged_file_and_a_wrong_vocabulary(empty: dict[str, Tensor], vocabulary: Path, tmp_path: Path):
    file = tmp_path / "ImageReward.pt"
    torch.save(dict(empty), file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="can't be read as weights"):
        ir.load(file, vocabulary)
    short = tmp_path / "vocab.txt"
    short.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    with pytest.raises(ConfigError, match="6 words instead of the 30,522"):
        ir.build(short)
    with pytest.raises(ConfigError, match=r"download https://.*vocab\.txt"):
        ir.build(tmp_path / "nowhere.txt")


@needs_image_reward
def test_the_library_leaves_others_as_they_were(scorer: ir.ImageReward):
    import sys

    from transformers import modeling_utils

    assert "ImageReward" not in sys.modules, "import ImageReward still means the real one"
    assert not hasattr(modeling_utils, "find_pruneable_heads_and_indices")
