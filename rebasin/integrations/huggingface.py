"""What diffusers and transformers do besides their work."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

OFFLINE, OURS = "HF_HUB_OFFLINE", "REBASIN_KEEPS_OFFLINE"


def keep_offline() -> None:
    """The libraries fetch nothing by themselves; `reaching` allows it for what the user asks for. What the user says
    by HF_HUB_OFFLINE stands.
    """
    if OFFLINE not in os.environ:
        os.environ |= {OFFLINE: "1", OURS: "1"}  # processes that are started inherit both


@contextlib.contextmanager
def reaching() -> Iterator[None]:
    """The Hub may be asked, unless the user has said that it must not."""
    from huggingface_hub import constants  # late: takes a while

    before = constants.HF_HUB_OFFLINE
    if os.environ.get(OURS):
        constants.HF_HUB_OFFLINE = False
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and advice from diffusers and transformers."""
    from transformers.utils import logging as transformers_logging  # late: it takes seconds

    bars = transformers_logging.is_progress_bar_enabled()
    loggers = [logging.getLogger("transformers"), logging.getLogger("diffusers")]
    levels = [logger.level for logger in loggers]
    transformers_logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
