"""Tiny models compute faster on one thread than on two, and tests write nothing outside their own folders."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from compose_once import compose_once
from matplotlib.figure import Figure
from no_skips import pytest_addoption, pytest_make_collect_report, pytest_runtest_makereport  # noqa: F401 - hooks
from tiny_pictures import save_pixel

from rebasin.integrations import signatures  # noqa: F401 - configurations composed by Hydra itself read signatures
from rebasin.integrations.torchvision import prepare_torchvision

prepare_torchvision()  # where it is installed, diffusers and transformers do not import without it
torch.set_num_threads(1)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def real_pictures() -> None:
    """For tests that look at pictures: all is drawn, as it is for fixtures that several tests share."""


@pytest.fixture(autouse=True)
def _tiny_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made, but only those that someone looks at become pictures."""
    if "real_pictures" not in request.fixturenames:
        monkeypatch.setattr(Figure, "savefig", save_pixel)


@pytest.fixture(autouse=True, scope="session")
def _composed_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        compose_once(patch)
        yield


@pytest.fixture(autouse=True, scope="session")
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One for all workers, who share the folder above their own, and for tests that tests start in a process of
    theirs: specs are derived once."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    os.environ["REBASIN_CACHE"] = os.environ.setdefault("REBASIN_TESTS_CACHE", str(shared))


def pytest_collection_finish() -> None:
    """What is imported now stays: collecting garbage need not go through a million objects each time (a twentieth)."""
    gc.collect()
    gc.freeze()


# Two files run at a time: what takes minutes starts first, or it runs alone at the end.
LONG = ["torchvision", "reward", "cli", "cli_joint", "cli_sdxl", "reward_runs", "checkpoints_run", "search"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))
