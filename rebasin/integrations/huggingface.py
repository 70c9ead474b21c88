"""What diffusers and transformers do besides their work."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


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
