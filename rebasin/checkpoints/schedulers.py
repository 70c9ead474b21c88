"""The noise schedule that a checkpoint was trained with, as the configuration of one of diffusers' schedulers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, ConfigError, shown
from .architectures import published
from .folders import load_config
from .prediction_type import KINDS, SCHEDULER

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

Config = dict[str, Any]

ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
"""Of a model whose noisiest step is noise alone: sampling must begin with that step."""


def own_scheduler(checkpoint: Checkpoint) -> Config | None:
    """The scheduler's config in a diffusers folder, None where there is none.

    Raises:
        CheckpointError: it is no JSON object.
    """
    return load_config(checkpoint.path / SCHEDULER.parent, SCHEDULER.name)


def released_scheduler(family: str, kind: str | None, zero_snr: bool = False) -> Config:
    """The scheduler of a family's release, with what a UNet predicts as far as that is known."""
    config = {**published(family)["scheduler"], **({} if kind is None else {"prediction_type": kind})}
    if zero_snr and kind == KINDS["v"]:
        config |= ZERO_SNR
        if config["_class_name"] == "PNDMScheduler":  # which can't begin there
            config.pop("skip_prk_steps")
            config["_class_name"] = "DDIMScheduler"
    return config


def scheduler_config(checkpoint: Checkpoint, prediction: str | None = None) -> Config:
    """The scheduler of a checkpoint: its folder's, else the released one with what this UNet predicts.

    Args:
        prediction: "epsilon" or "v_prediction", against what the checkpoint tells; None: as it tells.

    Raises:
        ConfigError: nothing tells what the UNet predicts, or `prediction` is no such word.
        CheckpointError: the folder's config is damaged, or the model has noise levels of another kind.
    """
    told = None if prediction is None else KINDS.get(prediction)
    if prediction is not None and told is None:
        raise ConfigError(f"model.prediction is {shown(prediction)}; it takes epsilon, v_prediction or null.")
    own = own_scheduler(checkpoint)
    if own is not None:
        return own if told is None else {**own, "prediction_type": told}
    found = checkpoint.prediction
    if mark := next((name for name in checkpoint.raw if name.startswith(("edm_vpred.", "edm_mean"))), None):
        raise CheckpointError(
            f"{checkpoint.path} has the mark {shown(mark)} of a model that learned with EDM's noise levels, for which"
            " no pipeline is put together here; a diffusers folder that has its scheduler will do."
        )
    kind = told or found.kind
    if kind is None:
        raise ConfigError(
            f"Nothing tells whether the UNet of {checkpoint.path} predicts noise or velocity ({found.reason}); say"
            " model.prediction=epsilon or model.prediction=v_prediction."
        )
    return released_scheduler(checkpoint.family, kind, found.zero_snr)


def new_scheduler(config: Mapping[str, Any], where: object) -> Any:
    """diffusers' scheduler of this config.

    Raises:
        CheckpointError: diffusers has no such class, or the config does not fit it.
    """
    import diffusers  # late: it takes seconds to import

    name = str(config.get("_class_name"))
    kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if kind is None or not isinstance(kind, type) or not issubclass(kind, diffusers.SchedulerMixin):
        raise CheckpointError(f"The scheduler of {where} is {shown(name)}, which diffusers does not have.")
    try:
        return kind.from_config(dict(config))  # pyright: ignore[reportAttributeAccessIssue]
    except Exception as error:  # whatever its numbers lead to
        raise CheckpointError(
            f"The scheduler's configuration of {where} describes none that can be made: {shown(str(error))}."
        ) from error
