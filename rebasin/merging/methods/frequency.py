"""Low frequencies of one model, high frequencies of the other."""

import math

import torch
from torch import Tensor

from ...arguments import Share
from ..registry import method


@method(
    "IDFT((1 - F) DFT(a) + F DFT(b)) over all axes, F = [f > 1 - alpha], f = root mean square of the axes' |frequency|"
    " in [0, 1]; with tilt F is a ramp in f that ends in the constant alpha at tilt 1",
    "sd-mecha, crossover (ljleb 2023)",
    zero="a",
    one="b",
    default=0.5,
    bounded=True,
)
def crossover(a: Tensor, b: Tensor, alpha: float, tilt: Share = 0.0) -> Tensor:
    """Take the low frequencies of each tensor from A and the high ones from B.

    Neurons have no natural order, so a frequency means little: the method is here because people use it, and it
    depends on the permutation.

    Options:
        tilt: from 0 (a hard cut) to 1 (the weighted sum).
    """
    if a.ndim == 0 or tilt == 1:
        return torch.lerp(a, b, alpha)
    share = _filter(_frequencies(a), alpha, tilt)
    mixed = torch.lerp(
        torch.fft.rfftn(a), torch.fft.rfftn(b), share.to(torch.promote_types(a.dtype, torch.complex64))
    )
    return torch.fft.irfftn(mixed, s=a.shape)


@method(
    "values in the order of c's: IDFT((1 - F) DFT(a) + F DFT(b)), F = [f >= 1 - alpha], with tilt"
    " clamp((f - 1 + alpha) / tilt + 1/2, 0, 1)",
    "meh, distribution_crossover (ljleb 2023)",
    zero="a",
    one="b",
    default=0.5,
    bounded=True,
)
def distribution_crossover(a: Tensor, b: Tensor, base: Tensor, alpha: float, tilt: Share = 0.0) -> Tensor:
    """A crossover of the values as a sequence that is sorted by the base's: coarse distribution of A, detail of B.

    alpha is the share of frequencies that come from B, the highest; 0 and 1 are A and B, whatever the tilt.

    Options:
        tilt: from 0 (a hard cut) to 1 (a ramp over all).
    """
    if a.ndim == 0:
        return torch.lerp(a, b, alpha)
    order = base.flatten().argsort(stable=True)
    dft_a, dft_b = torch.fft.rfft(a.flatten()[order]), torch.fft.rfft(b.flatten()[order])
    frequency = torch.arange(len(dft_a), device=a.device, dtype=a.dtype) / len(dft_a)
    from_top = frequency - (1 - alpha)
    share = (from_top / tilt + 0.5).clamp(0, 1) if tilt > 0 else (from_top >= 0).to(a.dtype)
    sequence = torch.fft.irfft(torch.lerp(dft_a, dft_b, share.to(dft_a.dtype)), n=a.numel())
    result = torch.empty_like(sequence)
    result[order] = sequence
    return result.reshape(a.shape)


def _frequencies(a: Tensor) -> Tensor:
    """The frequency of each coefficient of the real DFT: per axis from 0 to 1, then the root mean square."""
    square = torch.zeros((), device=a.device, dtype=a.dtype)
    for axis, size in enumerate(a.shape):
        grid = torch.fft.rfftfreq if axis == a.ndim - 1 else torch.fft.fftfreq
        frequency = grid(size, device=a.device, dtype=a.dtype).abs()
        top = frequency.max() if size > 1 else torch.ones_like(frequency)
        square = square + ((frequency / top) ** 2).reshape(-1, *[1] * (a.ndim - 1 - axis))
    return (square / a.ndim).sqrt()


def _filter(frequency: Tensor, alpha: float, tilt: float) -> Tensor:
    if tilt < 1e-10:
        return (frequency > 1 - alpha).to(frequency.dtype)
    # The ramp goes through the point (1 - alpha, alpha) and gets flatter with tilt.
    slope = 1 / math.tan(math.pi * tilt / 2)
    return (alpha + (frequency - (1 - alpha)) * slope).clamp(0, 1)
