"""Networks, data and losses of a user's own: what runs, and what is told in a sentence."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import typer
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from test_docs import blocks
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from typer.testing import CliRunner

from rebasin.checkpoints.weights import require_weights, weights_for
from rebasin.data import own as own_data
from rebasin.errors import CheckpointError, ConfigError, DataError, RebasinError
from rebasin.integrations.signatures import own_options
from rebasin.jobs.commands import RUN
from rebasin.jobs.own import flags_first, own
from rebasin.new.__main__ import main, new
from rebasin.new.study import NETWORK, Kind, create
from rebasin.reporting.results import load_results
from rebasin.tensors import save_safetensors

torch.set_num_threads(1)

NETS = """
import torch
from torch import Tensor, nn


class Base(nn.Module):
    gain: float = 1.0

    def __init__(self, classes: int = 10):
        super().__init__()


class Net(Base):
    def __init__(self, width: int = 8, scale: float = 1, depth=(1, 2), *, bias: bool = True):
        super().__init__()
        self.one, self.two = nn.Linear(4, width, bias=bias), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(x)))


class Deaf(Base):
    pass


def needs(width, bias=True):
    return Net(width, bias=bias)


def none(width: int = 3):
    return None


def x(count: int = 40):
    made = torch.Generator().manual_seed(count)
    return torch.randn(count, 4, generator=made), torch.randint(3, (count,), generator=made)


def load(split: str, count: int = 40):
    return x(count + (split == "train"))


def both():
    return {"train": x(41), "heldout": x(40)}


def broken():
    raise ValueError("no such disk")


def loss(model, batch, smoothing: float = 0.0):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=smoothing)


def lost_loss(model, batch):
    return loss(model, batch) * float("nan")


def elsewhere(model, batch):
    return model.one(batch[0]).square().mean()


class Loss:
    def __init__(self, weight: float = 1.0):
        self.weight = weight

    def loss(self, model, batch):
        return self.weight * loss(model, batch)


def train(network, batches, seed=0, steps: int = 2):
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for batch in batches[:steps]:
        optimizer.zero_grad()
        loss(network, batch).backward()
        optimizer.step()


def returns(network, batches):
    return {name: t + 1 for name, t in network.state_dict().items()}


def wrong(network, batches):
    return 5


def still(network, batches):
    pass


def other(network, batches):
    return nn.Linear(3, 3)


def task():
    return 3


def three(cfg):
    return 3


def rows(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Short:
    def loss(self, model, batch):
        return loss(model, batch)

    def evaluate(self, model, batches):
        x, y = batches
        return {"loss": 0.0}


def typed(width: int = 4):
    return Net(width)


def endless(split: str):
    while True:
        yield x(4)


DATA = x(40)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a module mine.py, from which commands are given."""
    (tmp_path / "mine.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REBASIN_OUTPUTS", str(tmp_path / "out"))
    monkeypatch.setenv("REBASIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    for name in ("mine", "study"):
        sys.modules.pop(name, None)


OWN = ("model=own", "model.network=mine:Net", "data.dataset=mine:load", "objective=mine:loss", "logger=none")
TRAIN = "model.train=mine:train"


def launched(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["rebasin.run", *arguments])
    GlobalHydra.instance().clear()
    try:
        RUN.main()
    finally:
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None


def results(place: Path) -> dict[str, Any]:
    [file] = (place / "out").rglob("results.json")
    return dict(load_results(file.parent))


def test_two_trainings_and_two_files_run(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a function and by files; the own data's name is told, options reach their functions, trainings are kept."""
    trained = ("model.options.width=6", "data.options.count=30", "model.train_options.steps=1")
    launched(monkeypatch, *OWN, TRAIN, *trained)
    found = results(place)
    assert found["data"] == "mine:load" and found["spec"]["neurons"] == 6 and found["model"] == "own"
    kept = {file: file.stat().st_mtime_ns for file in (place / "cache").glob("own-*")}
    assert len(kept) == 2
    (place / "out").rename(place / "first")
    launched(monkeypatch, *OWN, TRAIN, *trained)
    assert {file: file.stat().st_mtime_ns for file in (place / "cache").glob("own-*")} == kept
    assert results(place)["spec"] == found["spec"]
    (place / "out").rename(place / "second")
    merged = next((place / "first").rglob("merged.safetensors"))
    torch.save(
        {"state_dict": {f"module.{n}": t for n, t in _net(6).state_dict().items()}, "epoch": 3}, "b.pt"
    )
    files = (f"model.a={merged}", "model.b=b.pt", "model.options.width=6", "objective.options.smoothing=0.1")
    launched(monkeypatch, *OWN, *files, "data.batch_size=8", "data.limit=2", "evaluate.points=3")
    found = results(place)
    assert found["config"]["model"]["b"].endswith("b.pt") and found["endpoints"] == {"a": "merged", "b": "b"}


def _net(width: int) -> Any:
    import mine  # type: ignore[import-not-found] # pyright: ignore[reportMissingImports]

    torch.manual_seed(1)
    return mine.Net(width)


FAULTS = [
    ((), "There are no weights: give two files"),
    (("model.a=a.pt",), "model.a is given, but model.b is not"),
    (("model.files=[a.pt]",), "model.files is ['a.pt'], one network alone; give two to align"),
    (("model.a=a.pt", "model.b=b.pt", TRAIN), "model.train has no effect where files are given"),
    (("model.a=a.pt", "model.b=b.pt"), "a.pt"),
    ((TRAIN, "model.options.widht=3"), "did you mean 'model.options.width'?"),
    ((TRAIN, "model.options.width=abc"), "model.options.width is 'abc', but it takes a number"),
    ((TRAIN, "model.options.bias=3"), "model.options.bias is 3, but it takes true or false"),
    ((TRAIN, "model.options.width=-1"), "model.network=mine:Net can't be made with width=-1"),
    (
        (TRAIN, "model.network=mine:needs"),
        "mine:needs has no default for 'width'; give model.options.width=VALUE.",
    ),
    ((TRAIN, "model.network=mine:none"), "gives an object of type NoneType, but a torch.nn.Module is wanted"),
    (
        (TRAIN, "model.network=mine:Nett"),
        "model.network of model=own is 'mine:Nett', which can't be imported",
    ),
    ((TRAIN, "model.network=null"), "give model.network=package.module:name"),
    ((TRAIN, "model.network=mine:Deaf"), 'missing the required "forward" function'),
    ((TRAIN, "data.dataset=null"), "data=own needs a data set"),
    ((TRAIN, "data.dataset=mine:broken"), "data.dataset=mine:broken fails: ValueError: no such disk."),
    ((TRAIN, "data.dataset=mine:lost"), "module 'mine' has no attribute 'lost'"),
    ((TRAIN, "data.options.split=x"), "There is no option 'data.options.split'"),
    ((TRAIN, "data.batch_size=0"), "data.batch_size is 0"),
    ((TRAIN, "data.limit=0"), "data.limit is 0"),
    ((TRAIN, "data.options.count=2"), "There is"),
    ((TRAIN, "objective.function=null"), "objective=own needs a function"),
    ((TRAIN, "objective=mine:los"), "module 'mine' has no attribute 'los'"),
    ((TRAIN, "objective.options.smoothing=x"), "objective.options.smoothing is 'x', but it takes a number"),
    ((TRAIN, "objective=mine:elsewhere"), "The objective never calls the model"),
    ((TRAIN, "objective=denoising"), "model=own needs objective of the kind 'own' or 'classification'"),
    (("model.train=mine:wrong",), "model.train=mine:wrong returns an object of type int"),
    (("model.train=mine:still",), "left the network as it was (seed 0)"),
    (("model.train=mine:other",), "model.train=mine:other returns another network than it was given"),
    (
        ("model.a=a.pt", "model.b=b.pt", "model.seeds=[1,2]"),
        "model.seeds has no effect where files are given",
    ),
    ((TRAIN, "model.task=mine:task"), "model.task=mine:task must take the configuration"),
    ((TRAIN, "model.task=mine:three"), "returns an object of type int, not a rebasin.tasks.Task"),
    ((TRAIN, "objective=mine:rows"), "must be one real number: take the mean"),
    (
        (TRAIN, "objective=mine:Short"),
        "can't compute a batch of (2, 4) float32, (2,) int64: ValueError",
    ),
    (
        (TRAIN, "model.network=mien:Net", "model.options.width=3"),
        "model.network is 'mien:Net', which can't be",
    ),
    (
        (TRAIN, "model.network=mine:typed", "model.options.width=3.5"),
        "model.options.width is 3.5, but mine.typed takes a",
    ),
    ((TRAIN, "data.dataset=mine:endless"), "goes on after 5,000 batches; give data.limit=NUMBER"),
    (
        (TRAIN, "data.dataset=lost:load", "data.options.n=3"),
        "data.dataset is 'lost:load', which can't be imported",
    ),
    (("model.train=mine:broken",), "must take the network and the training batches, but it takes nothing"),
]


@pytest.mark.parametrize(("options", "words"), FAULTS, ids=[" ".join(o) or "none" for o, _ in FAULTS])
def test_faults_are_one_sentence(
    options: tuple[str, ...], words: str, place: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if options == (TRAIN, "data.options.count=2"):
        options = (TRAIN, "data.dataset=mine:x", "data.options.count=3")  # four are too few to hold one out
        words = "of data without splits every fifth is held out"
    with pytest.raises(SystemExit) as caught:
        launched(monkeypatch, *OWN, *options, "evaluate.points=3")
    told = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2 and words in told and told.startswith("Error: ") and told.endswith(".")
    assert len(told) <= 320


def test_flags_may_stand_anywhere() -> None:
    given = ["--config-dir", "conf", "model=own", "+a.b=1", "--multirun", "~c", "x.y=1,2"]
    assert flags_first(given) == [
        "--config-dir",
        "conf",
        "--multirun",
        "model=own",
        "+a.b=1",
        "~c",
        "x.y=1,2",
    ]


def test_averages_beside_the_weights_are_told(tmp_path: Path) -> None:
    net = nn.Linear(2, 3)
    state = {name: tensor + 1 for name, tensor in net.state_dict().items()}
    averages = {name: tensor * 0 for name, tensor in state.items()}
    kinds = (
        {"state_dict": state, "state_dict_ema": averages},
        {**state, **{f"ema.{name}": t for name, t in averages.items()}},
        {**{f"model.{n}": t for n, t in state.items()}, **{f"model_ema.{n}": t for n, t in averages.items()}},
    )
    for content in kinds:
        torch.save(content, tmp_path / "a.pt")
        told = require_weights(net, tmp_path / "a.pt")
        assert told is not None and told.startswith(
            "Not read from a.pt: averages of the weights beside them ("
        )
        assert all(torch.equal(t, state[name]) for name, t in weights_for(net, tmp_path / "a.pt").items())
    torch.save(state, tmp_path / "a.pt")
    assert require_weights(net, tmp_path / "a.pt") is None


def test_paths_become_groups_and_options(place: Path) -> None:
    assert own_options("network", "mine.Net") == {"width": 8, "scale": 1, "depth": [1, 2], "bias": True}
    assert own_options("network", "mine.needs") == {"width": "???", "bias": True}
    assert own_options("train", "mine.train") == {"steps": 2}
    assert own_options("dataset", "mine.load") == {"count": 40}
    assert own_options("objective", "mine.loss") == {"smoothing": 0.0}
    assert own_options("objective", "mine.Loss") == {"weight": 1.0}
    assert own(["objective=mine:Loss", "a=b"]) == [
        "objective=own", "objective.function=mine:Loss", "+own/objective@objective.options=mine.Loss", "a=b",
    ]  # fmt: skip
    assert own(["model=mlp", "model.network=lost.module:Net"]) == [
        "model=mlp",
        "model.network=lost.module:Net",
    ]


class _Stream(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.arange(12.0))


def _whole(train: bool) -> Any:
    return TensorDataset(torch.arange(10.0) + (not train))


X, Y = torch.arange(20.0).reshape(10, 2), torch.arange(10)
KINDS = {
    "arrays": (lambda split: (X.numpy(), Y), 3, 4),
    "a tensor": (lambda split: X, 3, 4),
    "torchvision's": (_whole, 4, 3),
    "a loader": (lambda split: DataLoader(TensorDataset(X, Y), batch_size=5), 3, 2),
    "a stream": (lambda split: _Stream(), 5, 3),
    "a generator": (lambda split: (X[i : i + 2] for i in range(0, 10, 2)), 3, 5),
    "a list": (lambda split: [(row, 1) for row in X], 4, 3),
    "a list of batches": (lambda split: [(X[:5], Y[:5]), (X[5:], Y[5:])], 4, 2),
    "both": (lambda: {"train": X, "heldout": X[:4]}, 4, 3),
    "one": (lambda: (X, Y), 4, 2),
    "batches": (lambda: iter([X] * 10), 4, 8),
}


@pytest.mark.parametrize("name", KINDS)
def test_whatever_has_batches_is_taken(name: str) -> None:
    function, size, count = KINDS[name]
    found, remark = own_data.splits(function, {}, size, None, "mine:load")
    assert set(found) == {"train", "heldout"} and len(found["train"]) == count and found["heldout"]
    assert bool(remark) == (name in ("one", "batches"))
    assert len(own_data.splits(function, {}, size, 1, "mine:load")[0]["train"]) == 1
    if name == "one":
        assert torch.equal(found["heldout"][0][1], torch.tensor([4, 9]))


@pytest.mark.parametrize("made", [None, 5, "text", {"a": X}, (X, Y[:3]), []])
def test_what_has_no_batches_is_told(made: Any) -> None:
    with pytest.raises(DataError) as caught:
        own_data.splits(lambda split: made, {}, 3, None, "mine:load")
    assert str(caught.value).endswith(".")


def test_weights_are_found_under_what_stands_before_them(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    state = net.state_dict()
    for before, kind in (("", "pt"), ("module.", "pt"), ("model._orig_mod.", "safetensors")):
        file = tmp_path / f"a.{kind}"
        named = {before + n: t for n, t in state.items()}
        averages = {f"ema.{n}": t + 1 for n, t in state.items()} if before else {}
        save_safetensors(file, {**averages, **named}) if kind == "safetensors" else torch.save(named, file)
        found = weights_for(net, file)
        assert list(found) == list(state) and all(torch.equal(found[n], t) for n, t in state.items())
    tied = nn.ModuleDict({"into": nn.Embedding(5, 3), "out": nn.Linear(3, 5, bias=False)})
    cast(Any, tied["out"]).weight = tied["into"].weight
    for name in ("into.weight", "out.weight"):  # what safetensors' own save_model leaves
        save_safetensors(tmp_path / "tied.safetensors", {f"module.{name}": tied.state_dict()[name].clone()})
        assert all(
            torch.equal(t, tied.state_dict()[n])
            for n, t in weights_for(tied, tmp_path / "tied.safetensors").items()
        )
    torch.save({**state, "more": torch.ones(1)}, tmp_path / "more.pt")
    torch.save({n: t for n, t in state.items() if n != "1.bias"}, tmp_path / "less.pt")
    torch.save({**state, "0.weight": torch.ones(4, 2)}, tmp_path / "other.pt")
    np.savez(tmp_path / "numpy.npz", **{n: t.numpy() for n, t in state.items()})
    for name, words in (
        ("more.pt", "has 1 tensors that the network has not (more)"),
        ("less.pt", "has nothing for '1.bias'"),
        ("other.pt", r"has (4, 2) for '0.weight', but the network has (3, 2)"),
        ("numpy.npz", "numpy.npz"),
        ("lost.pt", "lost.pt"),
    ):
        with pytest.raises(CheckpointError) as caught:
            weights_for(net, tmp_path / name)
        assert words in str(caught.value) and str(caught.value).endswith(".")


def test_a_new_study_runs(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    create(place / "my_study")
    monkeypatch.chdir(place / "my_study")
    monkeypatch.setattr(sys, "path", [str(place / "my_study"), *sys.path])
    small = ("model.options.width=8", "model.train_options.epochs=1", "evaluate.points=3", "logger=none")
    launched(monkeypatch, "--config-dir", "conf", "model=my_study", *small)
    found = results(place)
    assert (found["model"], found["data"]) == ("my_study", "my_study")
    with pytest.raises(SystemExit):
        launched(monkeypatch, "--config-dir", "conf", "model=my_study", "model.options.widht=8")
    assert "did you mean 'model.options.width'?" in capsys.readouterr().err
    (place / "my_study/conf/model/my_study.yaml").rename("conf/model/mlp.yaml")
    with pytest.raises(SystemExit):
        launched(monkeypatch, "--config-dir", "conf", "model=mlp", *small[2:])
    assert "mlp.yaml has the name of a config of this package" in capsys.readouterr().err


def test_a_loss_that_is_no_number_is_told_and_the_rest_is_there(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = (
        "model.options.width=6",
        "data.options.count=30",
        "model.train_options.steps=1",
        "evaluate.points=3",
    )
    launched(monkeypatch, *OWN, TRAIN, *few, "objective=mine:lost_loss", "algo=naive")
    assert "Unclear. A loss on the line is not finite" in capsys.readouterr().out
    assert list((place / "out").rglob("report.html"))


def test_new_tells_what_it_wrote_and_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    app = typer.Typer()
    app.command()(new)
    said = CliRunner().invoke(app, [str(tmp_path / "s"), "--kind", "gpt"])
    assert said.exit_code == 0 and "study.py" in said.output and "model=s" in said.output
    assert (tmp_path / "s" / "conf" / "model" / "s.yaml").is_file()
    wrong = {"s": "has something in it", "1 x": "can't be the name", "resnet20": "is a model of this package"}
    for name, words in wrong.items():
        with pytest.raises(ConfigError, match=words):
            create(tmp_path / name)
    assert callable(main)


@pytest.mark.parametrize("kind", Kind)
def test_the_page_shows_what_new_writes_and_it_computes(kind: Kind, tmp_path: Path) -> None:
    create(tmp_path / "s", kind)
    source = (tmp_path / "s" / "study.py").read_text("utf-8")
    shown = [
        b for b in blocks("own_model.md") if b.startswith(("class Net", "def net")) and b.rstrip() in source
    ]
    assert len(shown) == 1
    scope: dict[str, Any] = {"__name__": "study"}
    exec(compile(source, "study.py", "exec"), scope)
    batches, _ = own_data.splits(scope["load"], {}, 64, 2, "study:load")
    model = scope[NETWORK[kind]]()
    first = float(scope["loss"](model, batches["train"][0]))
    scope["train"](model, batches["train"], epochs=3)
    assert float(scope["loss"](model, batches["train"][0])) < first


def test_the_example_of_the_page_runs() -> None:
    page = blocks("own_model.md")
    net = next(b for b in page if "patches" not in b and b.startswith("class Net"))
    [example] = [b for b in page if "import torch, rebasin" in b]
    scope: dict[str, Any] = {}
    exec("import torch\nfrom torch import Tensor, nn\n" + net + example, scope)
    assert set(scope["merged"]) == set(scope["net_a"].state_dict())
    for part in [b for b in page if b.startswith("def load")]:
        for piece in part.split("\n\n\n"):
            assert piece.rstrip() in create_source()


def create_source() -> str:
    from importlib.resources import files

    return (files("rebasin.new") / "resnet.py.txt").read_text("utf-8")


def test_errors_of_a_users_code_are_told(place: Path) -> None:
    with pytest.raises(RebasinError, match="mine:load can't be read: ZeroDivisionError"):
        own_data.batches((1 / 0 for _ in range(3)), 2, None, "mine:load")
