"""torchvision on a machine without CUDA.

torchvision's wheels are linked against CUDA and do not load their operators on a CPU build of torch. Then not
only `import torchvision` fails, but, wherever it is merely installed, so do transformers' and diffusers'
image classes. Nobody here calls those operators; it is enough that torch has heard of them.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from typing import Any

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
"""Those for which torchvision 0.26 to 0.28 registers Python code while it is imported."""

_kept: list[Any] = []  # a library's definitions are gone when it is collected


def prepare_torchvision() -> None:
    """Make `import torchvision` work where it is installed; call this before transformers or diffusers are
    imported. Does nothing where it is not installed or works as it is.
    """
    if "torchvision" in sys.modules or find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")
        _kept.append(library)
        for operator in OPERATORS:
            library.define(operator)
        importlib.import_module("torchvision")
