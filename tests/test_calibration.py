"""Calibration: the error agrees with another implementation, and with figures done by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rebasin.errors import ConfigError, DataError
from rebasin.evaluation.calibration import calibration
from rebasin.reporting.reliability import draw_reliability
from rebasin.reporting.style import save_png


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_the_error_is_that_of_torchmetrics(bins: int) -> None:
    metrics = pytest.importorskip("torchmetrics.functional.classification")
    generator = torch.Generator().manual_seed(0)
    probabilities = (3 * torch.randn(500, 7, generator=generator)).softmax(dim=1)
    # Drawn from the answers, so that some bins are too sure and some not sure enough, and it matters which is which.
    labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    expected = metrics.multiclass_calibration_error(probabilities, labels, num_classes=7, n_bins=bins)
    assert calibration(probabilities, labels, bins=bins).ece == pytest.approx(float(expected), abs=1e-6)


def test_by_hand() -> None:
    # Two samples at 0.57 of which one is right, two at 0.88 that are right.
    p = torch.tensor([[0.57, 0.43], [0.57, 0.43], [0.12, 0.88], [0.88, 0.12]], dtype=torch.float64)
    found = calibration(p, torch.tensor([0, 1, 1, 0]), bins=10)
    assert found.share[5] == found.share[8] == 0.5 and sum(found.share) == pytest.approx(1)
    assert found.accuracy[5] == 0.5 and found.accuracy[8] == 1 and found.samples == 4
    assert found.ece == pytest.approx(0.5 * 0.07 + 0.5 * 0.12)
    assert found.gaps[5] == pytest.approx(-0.07) and found.largest == pytest.approx(0.12)
    # All classes, one against the rest: 0.43 twice, right once; 0.12 twice, never right.
    every = calibration(p, torch.tensor([0, 1, 1, 0]), bins=10, of="classes")
    assert (
        every.samples == 8 and every.share[4] == 0.25 and every.accuracy[4] == 0.5 and every.accuracy[1] == 0
    )


def test_sure_and_right_is_perfect() -> None:
    p = torch.eye(3, dtype=torch.float16)
    assert calibration(p, torch.arange(3)).ece == 0
    assert calibration(p, torch.tensor([1, 2, 0])).ece == 1


@pytest.mark.usefixtures("real_pictures")
def test_a_diagram(tmp_path: Path) -> None:
    p = torch.randn(50, 4).softmax(dim=1)
    labels = torch.randint(0, 4, (50,))
    drawn = draw_reliability({"a": calibration(p, labels), "b": calibration(p, labels, bins=5)})
    path = save_png(drawn, tmp_path / "r.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


def test_what_is_no_probability_is_told() -> None:
    with pytest.raises(DataError, match="softmax"):
        calibration(torch.randn(4, 3), torch.zeros(4).long())
    with pytest.raises(DataError, match=r"\(4, 3\)"):
        calibration(torch.rand(4, 3), torch.zeros(3).long())
    with pytest.raises(DataError, match="probabilities"):
        calibration(torch.zeros(0, 3), torch.zeros(0).long())
    with pytest.raises(ConfigError, match="bins"):
        calibration(torch.eye(3), torch.arange(3), bins=0)
