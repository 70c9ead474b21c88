"""The classifiers, their training, and the cache of trained ones."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from rebasin.data import Dataset, load
from rebasin.errors import ConfigError
from rebasin.evaluation import barrier
from rebasin.files import cache_folder
from rebasin.models import build, fitting_options
from rebasin.models.augment import AUGMENTATIONS
from rebasin.models.cache import Trained, trained
from rebasin.models.norms import ChannelLayerNorm
from rebasin.models.train import RECIPES, Recipe, graphed, guessing, train
from rebasin.objectives import CrossEntropy

SHORT = Recipe(epochs=2, batch_size=48)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


@pytest.fixture(scope="module")
def small() -> Dataset:
    """49 digits: with batches of 48, a single one is left over."""
    full = load("digits")
    return replace(full, train_x=full.train_x[:49], train_y=full.train_y[:49])


ALL = [
    ("mlp", {"width": 8, "depth": 1}),
    ("mlp", {"width": 8, "depth": 5}),
    *[
        ("vgg", {"width": 2, "depth": depth, "norm": norm})
        for depth in (11, 16)
        for norm in ("layer", "batch", "none")
    ],
    *[("resnet", {"width": 0.25, "norm": norm}) for norm in ("layer", "batch", "group")],
    ("resnet", {"width": 0.5, "blocks": 1}),
]


@pytest.mark.parametrize(("name", "options"), ALL)
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (28, 3)])
def test_shapes_on_small_images(name, options, size, channels):
    sizes = {"inputs": channels * size * size} if name == "mlp" else {"channels": channels}
    model = build(name, classes=7, **sizes, **options).eval()
    assert model(torch.rand(3, channels, size, size)).shape == (3, 7)


@pytest.mark.parametrize(("name", "options"), ALL)
def test_training_lowers_the_loss(name, options, small, tmp_path):
    recipe = Recipe(epochs=8, batch_size=16, learning_rate=3e-3)
    result = trained(name, small, options, recipe, cache=tmp_path)
    assert len(result.history) == 8
    assert result.history[-1] < result.history[0]


def test_parameter_counts_of_the_papers_networks():
    # Git Re-Basin's specs: 8 tensors in the MLP, 58 in VGG16, 65 in ResNet20.
    assert len(list(build("mlp", inputs=784, width=512).parameters())) == 8
    assert len(list(build("vgg", width=8).parameters())) == 58
    assert len(list(build("resnet").parameters())) == 65
    assert build("mlp", inputs=784, width=512).layers[1].weight.shape == (512, 512)  # pyright: ignore


def test_channel_layer_norm_is_taken_at_each_pixel_and_commutes_with_permutations():
    norm = ChannelLayerNorm(6)
    x = torch.randn(2, 6, 3, 4) * 3 + 1
    y = norm(x)
    torch.testing.assert_close(y.mean(1), torch.zeros(2, 3, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var(1, unbiased=False), torch.ones(2, 3, 4), atol=1e-4, rtol=0)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    torch.testing.assert_close(norm(x[:, order]), y[:, order])


def test_mistakes_in_options_name_the_valid_ones():
    with pytest.raises(ConfigError, match="mlp, vgg, resnet"):
        build("lenet")
    with pytest.raises(ConfigError, match=r"no option 'hidden'.*width"):
        build("mlp", hidden=3)
    with pytest.raises(ConfigError, match="depth 11 or 16"):
        build("vgg", depth=13)
    with pytest.raises(ConfigError, match="layer, batch, group"):
        build("resnet", norm="none")
    with pytest.raises(ConfigError, match="3 groups"):
        build("resnet", norm="group", groups=3)
    with pytest.raises(ConfigError, match="adam, sgd"):
        Recipe(optimizer="lion")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="positive"):
        build("mlp", width=0)


def test_sizes_follow_from_the_data(digits):
    assert fitting_options("mlp", digits, {"width": 4}) == {"inputs": 64, "classes": 10, "width": 4}
    assert fitting_options("vgg", digits) == {"channels": 1, "classes": 10}


def test_training_is_reproducible_and_leaves_the_global_seed_alone(small, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = trained("resnet", small, {"width": 0.25}, SHORT, seed=3, cache=tmp_path / "one")
    assert torch.rand(3).equal(expected)
    again = trained("resnet", small, {"width": 0.25}, SHORT, seed=3, cache=tmp_path / "two")
    other = trained("resnet", small, {"width": 0.25}, SHORT, seed=4, cache=tmp_path / "one")
    assert first.history == again.history
    assert all(first.state[name].equal(again.state[name]) for name in first.state)
    assert not any(result.cached for result in (first, again, other))
    assert not all(first.state[name].equal(other.state[name]) for name in first.state)
    assert first.path != other.path


def test_cosine_warmup_and_progress(small):
    events = []
    recipe = Recipe(
        epochs=3, batch_size=16, optimizer="sgd", schedule="cosine", warmup_epochs=1, weight_decay=1e-3
    )
    history = train(build("mlp", width=4), small.train_x, small.train_y, recipe, progress=events.append)
    assert [(e["stage"], e["step"], e["total"]) for e in events] == [("train", i, 3) for i in (1, 2, 3)]
    assert tuple(e["loss"] for e in events) == history


def test_divergence_is_told(small):
    recipe = Recipe(epochs=50, optimizer="sgd", learning_rate=1e6)
    with pytest.raises(ConfigError, match="lower the learning rate"):
        train(build("mlp"), small.train_x, small.train_y, recipe)


def test_a_training_that_stays_at_guessing_is_no_endpoint(small):
    """Dead from the start: no gradient passes."""
    model = build("mlp", width=4)
    for parameter in model.parameters():
        parameter.data.zero_()
    with pytest.raises(
        ConfigError, match=r"after 5 epochs the loss is 2\.\d+; lower the learning rate, or clip"
    ):
        train(model, small.train_x, small.train_y, Recipe(epochs=5, learning_rate=1e-9))
    assert guessing(torch.tensor([0, 0, 1, 1])) == pytest.approx(math.log(2))


def test_a_network_that_knows_nothing_when_it_is_used_is_no_endpoint(digits, monkeypatch):
    """The loss fell, but in evaluation mode all images look the same: BatchNorm's statistics are far off."""
    model = build("resnet", width=0.25, norm="batch", channels=1, blocks=1)
    late = digits.train_x[:500], digits.train_y[:500]
    monkeypatch.setattr(type(model), "eval", lambda self: self.load_state_dict(
        {k: v * 0 if "head" in k else v for k, v in self.state_dict().items()}
    ) and self.train(False))  # fmt: skip
    with pytest.raises(ConfigError, match=r"recognises \d+\.\d% of its training images, and always naming"):
        train(model, *late, Recipe(epochs=5, batch_size=50, learning_rate=3e-3))


def test_in_bfloat16_a_network_learns_too(digits):
    model = build("resnet", width=0.5, channels=1, blocks=1)
    history = train(
        model,
        digits.train_x,
        digits.train_y,
        Recipe(epochs=3, batch_size=32, learning_rate=3e-3, bfloat16=True),
    )
    assert history[-1] < 0.7 * history[0]
    assert next(model.parameters()).dtype == torch.float32


def test_the_gradient_is_clipped(small):
    """With plain SGD no step is longer than learning rate times clip."""
    model = build("mlp", width=4)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    recipe = Recipe(
        epochs=1, batch_size=len(small.train_y), optimizer="sgd", momentum=0.0, learning_rate=0.5, clip=0.01
    )
    train(model, small.train_x, small.train_y, recipe)
    moved = [(one.detach() - two).square().sum() for one, two in zip(model.parameters(), before, strict=True)]
    assert float(sum(moved)) ** 0.5 == pytest.approx(0.5 * 0.01, rel=1e-3)


def test_the_cache_is_used(small, tmp_path):
    events = []
    first = trained("vgg", small, {"width": 2, "depth": 11, "norm": "batch"}, SHORT, cache=tmp_path)
    second = trained(
        "vgg",
        small,
        {"width": 2, "depth": 11, "norm": "batch"},
        SHORT,
        cache=tmp_path,
        progress=events.append,
    )
    assert (first.cached, second.cached, events) == (False, True, [])
    assert first.history == second.history
    assert first.seconds == second.seconds
    assert all(first.state[name].equal(second.state[name]) for name in first.state)
    assert not second.model().training
    assert second.model()(small.test_x).equal(first.model()(small.test_x))
    assert first.path is not None and [path.name for path in tmp_path.iterdir()] == [first.path.name]


class Killed(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_killed_training_goes_on_where_it_stood(optimizer, small, tmp_path, monkeypatch):
    recipe = Recipe(
        epochs=4, batch_size=16, optimizer=optimizer, schedule="cosine", warmup_epochs=1.5, augment="affine"
    )
    monkeypatch.setattr("rebasin.models.cache.SECONDS", 0.0)

    def get(folder: str, stop: int | None = None, **options) -> Trained:
        def killing(event):
            seen.append(event["step"])
            if event["step"] == stop:
                raise Killed

        return trained(
            "resnet",
            small,
            {"width": 0.25, "norm": "batch"},
            recipe,
            3,
            tmp_path / folder,
            killing,
            **options,
        )

    seen: list[int] = []
    whole = get("whole")
    with pytest.raises(Killed):
        get("killed", 2, kept=(1,))
    seen.clear()
    again = get("killed", kept=(1,))
    assert seen == [3, 4] and again.history == whole.history
    assert all(tensor.equal(again.state[name]) for name, tensor in whole.state.items())
    assert get("killed", epoch=1).cached
    with pytest.raises(Killed):
        get("later", 3)
    early = get("later", epoch=1)  # which it went past without keeping it
    assert all(tensor.equal(early.state[name]) for name, tensor in get("killed", epoch=1).state.items())
    assert not [path for path in (tmp_path / "killed").iterdir() if "unfinished" in path.name]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied", "text", "renamed"])
def test_a_damaged_cache_file_is_noticed_and_replaced(damage, small, tmp_path):
    def get(seed: int = 0) -> Trained:
        return trained("mlp", small, {"width": 4}, SHORT, seed=seed, cache=tmp_path)

    good = get()
    assert good.path is not None
    content = bytearray(good.path.read_bytes())
    if damage == "truncated":
        content = content[:-9]
    elif damage == "flipped":
        content[-5] ^= 1
    elif damage == "renamed":
        other = get(seed=1).path
        assert other is not None
        content = bytearray(other.read_bytes())
    else:
        content = bytearray(b"" if damage == "emptied" else b"not a checkpoint")
    good.path.write_bytes(content)
    with pytest.warns(UserWarning, match=good.path.name):
        again = get()
    assert not again.cached
    assert all(good.state[name].equal(again.state[name]) for name in good.state)
    assert get().cached


def test_a_cache_that_cannot_be_written_does_not_stop_the_training(small, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="so nothing is kept there"):
        assert not trained("mlp", small, {"width": 4}, SHORT, cache=tmp_path / "file").cached


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("REBASIN_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    assert cache_folder(tmp_path / "given") == tmp_path / "given"
    monkeypatch.setenv("REBASIN_CACHE", "off")
    assert cache_folder() is None
    monkeypatch.delenv("REBASIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "rebasin"
    monkeypatch.delenv("XDG_CACHE_HOME")
    folder = cache_folder()
    assert folder is not None and folder.parts[-2:] == (".cache", "rebasin")


def test_without_a_cache_nothing_is_left(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = trained("mlp", small, {"width": 4}, SHORT, cache="off")
    assert first.path is None and not first.cached and not list(tmp_path.iterdir())


def test_the_default_mlp_learns_the_digits_and_has_a_barrier(digits, tmp_path):
    ends = [trained("mlp", digits, {"width": 32}, seed=seed, cache=tmp_path) for seed in (0, 1)]
    objective, held_out, train_part = CrossEntropy(), digits.batches("test"), digits.batches("train")
    for end in ends:
        assert objective.evaluate(end.model(), held_out)["accuracy"] > 0.93
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curve = barrier(
            ends[0].model(),
            ends[0].state,
            ends[1].state,
            lambda m: objective.evaluate(m, train_part),
            points=11,
        )
    assert curve.barrier > 1  # two independent trainings: 1.5 to 3.7 over many pairs of seeds at width 32
    assert 0 < curve.argmax < 1
    assert curve.metrics["accuracy"][0] > 0.98
    assert RECIPES["mlp"] == Recipe()
    assert isinstance(ends[0].model(), nn.Module)


def test_weights_after_an_epoch_are_those_of_a_shorter_training(tmp_path):
    data = load("digits")
    recipe = Recipe(epochs=3)
    first = trained("mlp", data, {"width": 8}, recipe, 0, tmp_path, kept=[0, 1])
    early = trained("mlp", data, {"width": 8}, recipe, 0, tmp_path, epoch=1)
    assert early.cached and len(early.history) == 1
    short = trained("mlp", data, {"width": 8}, Recipe(epochs=1), 0, tmp_path)
    assert not short.cached
    for name, tensor in short.state.items():
        torch.testing.assert_close(early.state[name], tensor, rtol=0, atol=0)
    start = trained("mlp", data, {"width": 8}, recipe, 0, tmp_path, epoch=0)
    assert start.cached and not torch.equal(start.state["layers.0.weight"], first.state["layers.0.weight"])
    with pytest.raises(ConfigError, match="0 to 3"):
        trained("mlp", data, {"width": 8}, recipe, 0, tmp_path, epoch=4)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentations_keep_shapes_and_repeat_with_their_seed(name):
    x = torch.rand(6, 3, 12, 10)
    once, again, other = (AUGMENTATIONS[name](x, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert once.shape == x.shape and torch.equal(once, again) and not torch.equal(once, other)
    assert once.min() >= 0 and once.max() <= 1 + 1e-5, "only what is in the images, and 0"


def test_crop_only_moves_and_mirrors():
    x = torch.rand(40, 1, 12, 10)
    changed = AUGMENTATIONS["crop"](x, torch.Generator().manual_seed(0))
    for image, original in zip(changed, x, strict=True):
        # What is not from the border is in the original, mirrored or not.
        values = set(image.flatten().tolist()) - {0.0}
        assert values <= set(original.flatten().tolist())


def test_networks_of_other_libraries_are_told_when_missing(monkeypatch):
    monkeypatch.setattr("rebasin.models.library.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="timm is not installed"):
        build("library", library="timm", network="resnet18")
    with pytest.raises(ConfigError, match="torchvision or timm"):
        build("library", library="keras", network="resnet18")


def test_graphs_are_captured_without_a_trace_and_serve_batches_of_one_shape(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain, x, replayed = model.forward, torch.randn(10, 5), []
    then = x.clone()

    def capture(module, given):
        """As torch.cuda.make_graphed_callables: tries the passes out, and writes later batches to what it was given."""
        module(*given)
        given[0].zero_()
        module.forward = lambda batch: (replayed.append(len(batch)), plain(batch))[1]

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    forward = graphed(model, x[:4])
    assert all(value.equal(before[name]) for name, value in model.state_dict().items()) and x.equal(then)
    assert [len(forward(part)) for part in x.split(4)] == [4, 4, 2] and replayed == [4, 4]

    def refuse(module, given):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand its advice")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refuse)
    with pytest.raises(
        ConfigError, match=r"^model\.recipe\.graphs is true, but .* is capturing\): leave it out\.$"
    ):
        graphed(model, x[:4])


@pytest.mark.parametrize(
    "device",
    [
        "cpu",  # where there are none, and the option changes nothing
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")),
    ],
)
def test_a_training_with_graphs_is_that_without(small, device):
    found = []
    for graphs in (False, True):
        torch.manual_seed(0)
        model = build("resnet", width=0.25, blocks=1, norm="batch", channels=1).to(device)
        recipe = Recipe(epochs=2, batch_size=20, clip=1.0, graphs=graphs)
        found.append(train(model, small.train_x.to(device), small.train_y.to(device), recipe))
        assert "forward" not in vars(model)
    assert found[1] == pytest.approx(found[0], rel=0 if device == "cpu" else 0.02)
