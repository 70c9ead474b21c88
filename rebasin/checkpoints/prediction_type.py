"""What a UNet predicts, the noise or the velocity: tensors can't tell, so marks of either are looked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ..errors import CheckpointError, shown
from .folders import load_config

KINDS: dict[str, Literal["epsilon", "v_prediction"]] = {
    **dict.fromkeys(("v", "v_prediction", "v-prediction", "velocity"), "v_prediction"),
    **dict.fromkeys(("epsilon", "eps", "noise"), "epsilon"),
}
"""The words that trainers and configurations have for either."""

TOLD = {
    "modelspec.prediction_type": KINDS,
    "modelspec.predict_key": KINDS,
    "prediction_type": KINDS,
    "ss_v_parameterization": {"true": KINDS["v"]},
    "v_parameterization": {"true": KINDS["v"]},
}
"""Entries of a header, and what their values mean."""

SCHEDULER = Path("scheduler", "scheduler_config.json")
"""Where a diffusers folder has the configuration of its noise schedule."""

READ = 100_000
"""Characters of a neighbouring config that are looked at."""


@dataclass(frozen=True)
class Prediction:
    """kind: "epsilon", "v_prediction", or None where nothing in or beside the file tells; `reason` says why.

    `zero_snr`: the noisiest step that it learned is noise alone (a schedule rescaled to end there).
    """

    kind: Literal["epsilon", "v_prediction"] | None
    reason: str
    zero_snr: bool = False


def prediction(
    path: Path, family: str, names: Mapping[str, object], metadata: Mapping[str, str]
) -> Prediction:
    """What the model predicts: from marks that trainers leave, else by convention; SD2 has none.

    Stable Diffusion 2.x has the same tensors whether it predicts noise (512 pixels) or velocity (768 pixels).
    Nothing that a permutation does depends on it; the denoising loss of an evaluation does.
    """
    found = _kind(path, family, names, metadata)
    marked = "ztsnr" in names or metadata.get("ss_zero_terminal_snr", "").lower() == "true"
    return replace(found, zero_snr=marked and found.kind != "epsilon")


def _kind(path: Path, family: str, names: Mapping[str, object], metadata: Mapping[str, str]) -> Prediction:
    mark = next((name for name in names if name == "v_pred" or name.startswith("edm_vpred.")), None)
    if mark is not None:
        return Prediction("v_prediction", f"the file has the mark {mark!r}")
    for key, kinds in TOLD.items():
        kind = kinds.get(metadata.get(key, "").lower())
        if kind is not None:
            return Prediction(kind, f"its metadata say so ({key})")
    if found := _scheduler(path) or _neighbour(path):
        return found
    if family == "sd2":
        return Prediction(
            None,
            "SD2's tensors are the same for both; the 768-pixel models predict velocity, the 512-pixel ones noise",
        )
    return Prediction("epsilon", "the convention of its family")


def _scheduler(path: Path) -> Prediction | None:
    """What the scheduler's config in a diffusers folder says.

    Raises:
        CheckpointError: it is damaged.
    """
    told = (load_config(path / SCHEDULER.parent, SCHEDULER.name) or {}).get("prediction_type")
    if told is None:
        return None
    if not isinstance(told, str):
        raise CheckpointError(
            f"{path / SCHEDULER} says prediction_type {shown(told)}, but that is a word such as epsilon or"
            " v_prediction; get the folder again."
        )
    kind = KINDS.get(told)
    return Prediction(kind, "scheduler_config.json says so" if kind else f"scheduler_config.json says {told}")


def _neighbour(path: Path) -> Prediction | None:
    """The original code's config that people keep beside a file, under the same name with .yaml."""
    config = path.with_suffix(".yaml")
    if path.is_dir() or not config.is_file():
        return None
    try:
        with open(config, encoding="utf-8", errors="replace") as file:
            found = re.search(r"parameterization:\s*[\"']?(\w+)", file.read(READ))
    except OSError:
        return None
    if found is None:
        return Prediction("epsilon", f"{config.name} beside it names no parameterization")
    return Prediction("v_prediction" if found[1] == "v" else "epsilon", f"{config.name} beside it says so")
