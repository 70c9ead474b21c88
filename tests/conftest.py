"""Tiny models compute faster on one thread than on two, and tests write nothing outside their own folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from rebasin.integrations.torchvision import prepare_torchvision

prepare_torchvision()  # where it is installed, diffusers and transformers do not import without it
torch.set_num_threads(1)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["REBASIN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real MNIST and Fashion-MNIST, where someone has them."""
    for folder in (os.environ.get("REBASIN_DATA"), Path(__file__).resolve().parents[2] / "shared" / "data"):
        if folder and (Path(folder) / "mnist.npz").is_file():
            return Path(folder)
    pytest.skip("no MNIST at hand: set REBASIN_DATA to a folder with mnist.npz")
