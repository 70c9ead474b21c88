"""The embedded tiny Stable Diffusion and its captioned digits."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from train_tiny_sd import denoising_loss, new_tokenizer

from rebasin.data import captioned_digits as digits
from rebasin.errors import CheckpointError, ConfigError, DataError
from rebasin.models import tiny_sd
from rebasin.models.tiny_sd_training import Recipe, learning_rate, train

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def parts():
    return tiny_sd.load_vae(), tiny_sd.load_text_encoder(), tiny_sd.load_tokenizer(), tiny_sd.load_scheduler()


@pytest.fixture(scope="module")
def unets():
    return {name: tiny_sd.load_unet(name) for name in tiny_sd.UNETS}


@pytest.fixture(scope="module")
def batches(parts):
    return digits.denoising_batches(*parts, split="test", n=200, batch_size=100, seed=0)


@pytest.fixture(scope="module")
def losses(unets, batches):
    return {name: denoising_loss(unet, batches) for name, unet in unets.items()}


def distance(a: torch.nn.Module, b: torch.nn.Module) -> float:
    """Relative distance of all weights."""
    x, y = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (a, b))
    return float((x - y).norm() / x.norm())


def test_the_assets_are_small_fp16_safetensors():
    files = [f for f in tiny_sd.ASSETS.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 20_500_000
    assert {f.suffix for f in files} <= {".json", ".safetensors"}
    assert tiny_sd.load_unet("low", torch.float16).conv_in.weight.dtype == torch.float16
    record = json.loads((tiny_sd.ASSETS / "training.json").read_text())
    assert record["data"] and record["stages"]["seed0"]["steps"] > 0


def test_independent_unets_differ_in_weights_but_not_in_quality(unets, batches, losses):
    assert distance(unets["seed0"], unets["seed1"]) > 1.0
    assert losses["seed1"] == pytest.approx(losses["seed0"], rel=0.1)
    assert distance(unets["wide0"], unets["wide1"]) > 1.0
    assert max(losses["wide0"], losses["wide1"]) < 0.9 * min(losses["seed0"], losses["seed1"])
    assert max(losses.values()) < 0.3 * denoising_loss(tiny_sd.new_unet(0), batches)


def test_fine_tunes_stay_near_their_base_and_are_better_on_their_own_digits(parts, unets):
    for name, other, own in (("low", "high", (0, 1, 2, 3, 4)), ("high", "low", (5, 6, 7, 8, 9))):
        assert 0.01 < distance(unets["seed0"], unets[name]) < 0.3
        theirs = digits.denoising_batches(*parts, split="test", n=200, seed=1, digits=own)
        # Against each other: the base, told the digit by the caption, is already about as good.
        assert denoising_loss(unets[name], theirs) < denoising_loss(unets[other], theirs)


def test_the_condition_matters(unets, batches, losses):
    swapped = [b | {"condition": b["condition"].roll(1, 0)} for b in batches]
    assert denoising_loss(unets["seed0"], swapped) > 1.05 * losses["seed0"]


def test_batches_are_deterministic_stratified_and_complete(parts, batches):
    again = digits.denoising_batches(*parts, split="test", n=200, batch_size=100, seed=0)
    for first, second in zip(batches, again, strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)
    other = digits.denoising_batches(*parts, split="test", n=200, batch_size=100, seed=1)
    assert not torch.equal(batches[0]["noise"], other[0]["noise"])
    batch = batches[0]
    assert batch["latents"].shape == batch["noise"].shape == (100, 4, 8, 8)
    assert batch["condition"].shape == (100, tiny_sd.CONTEXT, tiny_sd.HIDDEN)
    assert all(batch[key].dtype == torch.float32 for key in ("latents", "noise", "condition"))
    timesteps = torch.cat([b["timesteps"] for b in batches]).sort().values
    assert torch.equal(timesteps // 5, torch.arange(200))
    assert batch["latents"].std() == pytest.approx(1.0, abs=0.15)


def test_images_that_are_drawn_again_have_other_noise(parts):
    once = digits.denoising_batches(*parts, n=20, batch_size=10, seed=0)
    twice = digits.denoising_batches(*parts, n=20, batch_size=10, seed=0, draws=2)
    assert len(twice) == 4 and all(torch.equal(once[1][key], twice[1][key]) for key in once[1])
    assert torch.equal(twice[0]["latents"], twice[2]["latents"])
    assert not torch.equal(twice[0]["noise"], twice[2]["noise"])
    with pytest.raises(DataError, match="drawn 0 times"):
        digits.denoising_batches(*parts, n=20, draws=0)


def test_more_images_than_there_are_is_an_error(parts):
    with pytest.raises(DataError, match="600 images of the test split were asked for, but it has 500"):
        digits.denoising_batches(*parts, n=600, digits=(0, 1, 2, 3, 4))


def test_the_embedded_digits():
    train_images, train_labels = digits.load("train")
    test_images, test_labels = digits.load("test")
    assert train_images.shape == test_images.shape == (1000, 28, 28)
    assert np.bincount(train_labels).tolist() == np.bincount(test_labels).tolist() == [100] * 10
    assert digits.ASSET.stat().st_size < 700_000
    assert not {i.tobytes() for i in train_images} & {i.tobytes() for i in test_images}


def test_the_autoencoder_reproduces_digits(parts):
    vae = parts[0]
    images, _ = digits.load("test")
    latents = digits.encode_latents(vae, images[:50])
    with torch.no_grad():
        decoded = vae.decode(latents / vae.config.scaling_factor).sample
    pixels = digits.to_pixels(images[:50])
    assert torch.nn.functional.mse_loss(decoded, pixels) < 0.05 * pixels.var()


def test_adjectives_follow_the_ink():
    images, labels = digits.load("test")

    def captions(seed: int) -> list[str]:
        numbers = digits.caption_numbers(labels, digits.inks(images), np.random.default_rng(seed))
        return [digits.CAPTIONS[i][0] for i in numbers]

    texts = captions(3)
    assert texts == captions(3) != captions(4)
    width = digits.stroke_width(images)
    thin = np.array(["thin" in text for text in texts])
    bold = np.array(["bold" in text for text in texts])
    assert thin.sum() > 100 and bold.sum() > 100
    assert width[thin].max() < digits.THIN_BELOW <= digits.BOLD_ABOVE < width[bold].min()
    assert all(digits.WORDS[label] in text for text, label in zip(texts, labels, strict=True))


def test_stroke_width_measures_bars():
    bars = np.zeros((3, 28, 28), np.uint8)
    for image, width in zip(bars, (1, 2, 4), strict=True):
        image[4:24, 10 : 10 + width] = 255
    assert digits.stroke_width(bars) == pytest.approx([0.95, 1.82, 3.33], rel=0.05)  # 2 * 20 w / (40 + 2 w)


def test_tokenizer_round_trip(parts):
    tokenizer = parts[2]
    for text, _, _ in digits.CAPTIONS:
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.split()) + 2 <= tokenizer.model_max_length == tiny_sd.CONTEXT
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
    assert tokenizer.decode(tokenizer("cat, 5").input_ids, skip_special_tokens=True).split() == [
        "cat",
        ",",
        "5",
    ]
    assert tokenizer.get_vocab() == new_tokenizer(text for text, _, _ in digits.CAPTIONS).get_vocab()


def test_the_pipeline_is_deterministic_by_seed(capfd):
    pipeline: Any = tiny_sd.load_pipeline("seed0")

    def run(seed: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        image = pipeline(
            "a handwritten seven", num_inference_steps=2, guidance_scale=3.0, generator=generator
        ).images[0]
        assert image.size == (32, 32) and image.mode == "L"
        return np.asarray(image)

    assert np.array_equal(run(0), run(0))
    assert not np.array_equal(run(0), run(1))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_the_pipeline_takes_a_unet_and_a_folder(unets):
    assert tiny_sd.load_pipeline(unets["low"]).unet is unets["low"]
    own = tiny_sd.load_pipeline("high", path=tiny_sd.ASSETS)
    assert distance(own.unet, unets["high"]) == 0


def test_unknown_names_and_damaged_folders_say_what_to_do(tmp_path):
    with pytest.raises(
        CheckpointError, match="There is no UNet 'seed7' in .*: choose one of seed0, seed1, low, high"
    ):
        tiny_sd.load_unet("seed7")
    with pytest.raises(
        CheckpointError, match="There is no folder .*: give one that scripts/train_tiny_sd.py made"
    ):
        tiny_sd.load_vae(path=tmp_path)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        tiny_sd.load_vae(path=tmp_path)


def test_own_digits(tmp_path):
    images, labels = digits.load("test")
    train, test = slice(0, 9), slice(0, 5)
    np.savez(
        tmp_path / "own.npz",
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
    )
    read, read_labels = digits.load("test", tmp_path / "own.npz")
    assert np.array_equal(read, images[:5]) and read.dtype == np.uint8
    assert np.array_equal(read_labels, labels[:5]) and read_labels.dtype == np.int64
    with pytest.raises(DataError, match="There is no split 'validation': choose one of train, test"):
        digits.load("validation")  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="no.npz"):
        digits.load("test", tmp_path / "no.npz")


def test_training_resumes_exactly(tmp_path):
    recipe = Recipe(steps=12, batch_size=4, learning_rate=0.1, seed=0, ema=0.9, checkpoint_every=5)

    def run(stop_at: int | None) -> tuple[torch.Tensor, dict]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = torch.nn.Linear(3, 1)

        def loss_at(rng, choose):
            x = torch.randn(4, 3, generator=rng)
            return (model(x) - x.sum(1, keepdim=True)).square().mean() + float(choose.random())

        def progress(event):
            if event["step"] == stop_at:
                raise KeyboardInterrupt

        record = train("toy", model, recipe, loss_at, progress, tmp_path / "toy.safetensors")
        return model.weight.detach().clone(), record

    whole, record = run(None)
    (tmp_path / "toy.safetensors").unlink()
    with pytest.raises(KeyboardInterrupt):
        run(8)
    resumed, record_again = run(None)
    assert torch.equal(whole, resumed)
    assert record["train_loss"] == record_again["train_loss"]
    assert learning_rate(recipe, 0) < 0.2 and learning_rate(recipe, 11) < 0.01


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda loss: loss * float("nan"), r"^Training diverged in step 1 of toy \(loss nan\): lower the"),
        (
            lambda loss: loss * 0 + 1,
            r"^Training of toy led nowhere: after 100 steps the loss is 1\.000, no less",
        ),
    ],
)
def test_a_training_that_led_nowhere_is_told(change, words):
    model = torch.nn.Linear(3, 1)
    recipe = Recipe(steps=100, batch_size=4, learning_rate=0.1, seed=0)
    with pytest.raises(ConfigError, match=words):
        train("toy", model, recipe, lambda rng, choose: change(model(torch.ones(4, 3)).sum()), None)
