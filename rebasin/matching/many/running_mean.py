"""The running mean of many models: the one thing that is held while they are matched, in memory or on disk."""

from __future__ import annotations

import os
import tempfile
from collections import UserDict
from collections.abc import Mapping, MutableMapping, Sequence
from math import fsum, prod, sqrt
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...spec import Permutation
from ...types import State, widened
from ..weights.endpoints import CHUNK, one_thread
from .models import Models


class RunningMean:
    """The mean of those models that are in it, of the tensors that the spec permutes, in float32 or wider.

    Attributes:
        tensors: name -> mean.
        inside: the models that are in it.
        spread: `sum_j w_j |pi_j(theta_j) - mean|^2` over parameters, float64; right after `gather`, and not
            kept up to date by `add` and `remove`.
    """

    def __init__(self, models: Models, scratch: str | os.PathLike[str] | None = None) -> None:
        """`scratch`: a folder; the mean is then kept in a file there, which goes with this object."""
        self.models = models
        self.tensors: MutableMapping[str, Tensor] = {} if scratch is None else TensorFile(scratch)
        self.inside: set[int] = set()
        self.spread, self._share = 0.0, 1.0

    @property
    def weight(self) -> float:
        return fsum(self.models.weights[i] for i in self.inside)

    @property
    def distance(self) -> float:
        return sqrt(self.spread / fsum(self.models.weights))

    @property
    def objective(self) -> float:
        """`sum_(i<j) w_i w_j <pi_i(theta_i), pi_j(theta_j)>`, when all are in it: by
        |sum_j w_j theta_j|^2 = W (sum_j w_j |theta_j|^2 - spread).
        """
        weights, squares = self.models.weights, self.models.squares
        total = fsum(weights) * (fsum(w * s for w, s in zip(weights, squares, strict=True)) - self.spread)
        return (total - fsum(w * w * s for w, s in zip(weights, squares, strict=True))) / 2

    def gather_first(self) -> None:
        """Check the values of all models and gather them as they come, in one reading."""
        self._clear()
        self.models.read_all(lambda i, name, tensor: self._take(i, name, tensor, measure=True))
        self.models.distance_before = self.distance

    def gather(self, permutations: Sequence[Permutation | None]) -> None:
        """Make it anew from the models, which ends the rounding of many additions and removals."""
        self._clear()
        for i, permutation in enumerate(permutations):
            if permutation is not None:
                self.add(i, permutation, measure=True)

    def add(self, i: int, permutation: Permutation, *, measure: bool = False) -> None:
        """Take model i in, in its arrangement `permutation`; with `measure` add to `spread`, too."""
        state = self.models.open(i)
        for name, key in self.models.keys.items():
            self._take(i, name, permutation.apply_to(name, state[key].detach().cpu()), measure)

    def _take(self, i: int, name: str, tensor: Tensor, measure: bool) -> None:
        """Take one tensor of model i in, which is in it with the first."""
        weight = self.models.weights[i]
        if i not in self.inside:
            self.inside.add(i)
            self._share = weight / self.weight
        if self._share == 1.0:
            self.tensors[name] = tensor.to(
                widened(tensor.dtype), copy=True, memory_format=torch.contiguous_format
            )
            return
        mean = self.tensors[name]
        square = _draw_near(mean, tensor, self._share, measure and name not in self.models.spec.buffers)
        self.spread += weight * (1 - self._share) * square
        self.tensors[name] = mean  # it may be kept in a file

    def _clear(self) -> None:
        self.tensors.clear()
        self.inside, self.spread = set(), 0.0

    def remove(self, i: int, permutation: Permutation | None) -> None:
        """Take model i out, which is in it in the arrangement `permutation`; None: it is not, do nothing."""
        if permutation is None:
            return
        state = self.models.open(i)
        self.inside.remove(i)
        rest = self.weight
        if not rest:
            self.tensors.clear()
            return
        leave(self.tensors, state, self.models.keys, permutation, self.models.weights[i] / rest)


def leave(
    tensors: MutableMapping[str, Tensor],
    state: State,
    keys: Mapping[str, str],
    permutation: Permutation,
    share: float,
) -> None:
    """Take a model, arranged by `permutation`, out of a mean, in place; `share`: its weight by that of the rest."""
    for name, key in keys.items():
        mean = tensors[name]
        tensor = permutation.apply_to(name, state[key].detach().cpu()).to(mean.dtype)
        tensors[name] = mean.lerp_(tensor, -share)


def _draw_near(mean: Tensor, tensor: Tensor, share: float, measure: bool) -> float:
    """mean += share * (tensor - mean), piece by piece, and the |tensor - mean|^2 there was, float64; 0 if not measured.

    Not (W m + w x) / (W + w): the mean of equal tensors is to be these tensors, to the bit.
    """
    far = torch.empty(min(CHUNK, mean.numel()), dtype=mean.dtype)
    wide_far, squares = torch.empty_like(far, dtype=torch.float64), []
    with one_thread():
        for m, x in zip(mean.view(-1).split(CHUNK), tensor.reshape(-1).split(CHUNK), strict=True):
            d = far[: m.numel()].copy_(x).sub_(m)
            m.add_(d, alpha=share)
            if measure:
                w = wide_far[: m.numel()].copy_(d)
                squares.append(w.dot(w))
    return fsum(torch.stack(squares).tolist()) if squares else 0.0


class TensorFile(UserDict[str, Any]):
    """Tensors in a nameless file, which the system removes when this object, or the process, ends.

    Each is read into fresh memory when it is asked for: a mapped file would count as resident memory. What is
    deleted leaves a hole until `clear`.

    Attributes:
        data: name -> where its tensor is in the file, its type and its shape.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__()
        self._end = 0
        try:
            self._file = tempfile.TemporaryFile(dir=folder, prefix="rebasin-mean-")  # noqa: SIM115 (kept open)
        except OSError as error:
            raise ConfigError(
                f"The running mean can't be kept in {os.fspath(folder)!r} ({error.strerror}): name a folder that"
                f" can be written to."
            ) from error

    def __getitem__(self, name: str) -> Tensor:
        offset, dtype, shape = self.data[name]
        tensor = torch.empty(shape, dtype=dtype)
        view = tensor.reshape(-1).view(torch.uint8).numpy().data
        self._file.seek(offset)
        if self._file.readinto(view) != len(view):  # pyright: ignore[reportAttributeAccessIssue]
            raise ConfigError(f"The file of the running mean lost tensor {name!r}: is its disk full?")
        return tensor

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        layout = tensor.dtype, tuple(tensor.shape)
        if self.data.get(name, (0, None, ()))[1:] != layout:
            self.data[name] = self._end, *layout
            self._end += prod(layout[1]) * tensor.dtype.itemsize
        self._file.seek(self.data[name][0])
        try:
            self._file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            raise ConfigError(f"The running mean can't be written ({error.strerror}).") from error

    def clear(self) -> None:
        self.data, self._end = {}, 0
        self._file.truncate(0)
