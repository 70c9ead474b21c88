"""Tiny models compute faster on one thread than on two, and tests write nothing outside their own folders."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

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


@pytest.fixture(autouse=True, scope="session")
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One for all workers, who share the folder above their own: specs are derived once."""
    base = tmp_path_factory.getbasetemp()
    os.environ["REBASIN_CACHE"] = str(
        (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    )


# Two files run at a time: what takes minutes starts first, or it runs alone at the end.
LONG = ["torchvision", "reward", "cli", "cli_joint", "cli_sdxl", "reward_runs", "checkpoints_run", "search"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="a skipped test fails, unless it needs CUDA")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    return _without_skips((yield), item.config)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    return _without_skips((yield), collector.config)


def _without_skips(report: Any, config: pytest.Config) -> Any:
    """Whoever sets up everything wants to know what was left out all the same: an oracle that did not install, say."""
    if config.getoption("--no-skips") and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if "CUDA" not in reason:
            report.outcome = "failed"
            report.longrepr = f"{report.nodeid} may not be left out (--no-skips). {reason}"
    return report
