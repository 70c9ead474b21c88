"""Full precision for a while: no TF32, no reduced precision, no autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import product
from typing import Any, cast

import torch

_OPERATORS = ("all", "matmul", "conv", "rnn")
_REDUCTIONS = (
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """All products and convolutions in the precision of their types inside the block; then all is as it was.

    PyTorch has the settings twice, in an old and a new spelling, and refuses to read the old one where they differ:
    then the new one holds what was meant.
    """
    get, put = torch._C._get_fp32_precision_getter, cast(Any, torch._C._set_fp32_precision_setter)
    settings = {key: get(*key) for key in [("generic", "all"), *product(("cuda", "mkldnn"), _OPERATORS)]}
    matmul, cudnn = torch.backends.cuda.matmul, cast(Any, torch.backends.cudnn)
    old_matmul, old_cudnn = None, None
    with contextlib.suppress(RuntimeError):
        old_matmul = torch.get_float32_matmul_precision()
    with contextlib.suppress(RuntimeError):
        old_cudnn = cudnn.allow_tf32
    reductions = {name: getattr(matmul, name) for name in _REDUCTIONS if hasattr(matmul, name)}
    try:
        torch.set_float32_matmul_precision("highest")
        cudnn.allow_tf32 = False
        for key in settings:
            put(*key, "ieee")
        for name in reductions:
            setattr(matmul, name, False)
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if old_matmul is not None:
            torch.set_float32_matmul_precision(old_matmul)
        if old_cudnn is not None:
            cudnn.allow_tf32 = old_cudnn
        for key, value in settings.items():
            put(*key, value)
        for name, value in reductions.items():
            setattr(matmul, name, value)
