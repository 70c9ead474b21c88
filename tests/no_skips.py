"""`--no-skips`: whoever sets up everything wants to know what was left out: an oracle that failed to install, say.

Hooks that conftest takes over; a module of its own, which imports no torch.
"""

from __future__ import annotations

from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="a skipped test fails, unless it needs CUDA")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    return _without_skips((yield), item.config)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    return _without_skips((yield), collector.config)


def _without_skips(report: Any, config: pytest.Config) -> Any:
    if config.getoption("--no-skips") and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if "CUDA" not in reason:
            report.outcome = "failed"
            report.longrepr = f"{report.nodeid} may not be left out (--no-skips). {reason}"
    return report
