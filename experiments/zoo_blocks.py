"""Building blocks in isolation: one for each way in which a neuron can be used."""

# Configs are dicts with keys of many types.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
BLOCKS: dict[str, Callable[[], Built]] = {}


class Apply(nn.Module):
    """Named modules and a function of them: a whole model in two lines."""

    def __init__(
        self, function: Callable[..., Any], parameters: dict[str, Tensor] | None = None, **modules: Any
    ):
        super().__init__()
        self.function = function
        for name, value in (parameters or {}).items():
            self.register_parameter(name, nn.Parameter(value))
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def block(build: Callable[[], Built]) -> Callable[[], Built]:
    BLOCKS[build.__name__] = build
    return build


def image(channels: int = 3, size: int = 6) -> tuple[Tensor]:
    return (torch.randn(2, channels, size, size),)


def tokens(width: int = 5, length: int = 4) -> tuple[Tensor]:
    return (torch.randn(2, length, width),)


@block
def mlp() -> Built:
    return (
        nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 9), nn.GELU(), nn.Linear(9, 4)),
        (torch.randn(2, 5),),
        {},
    )


@block
def residual_mlp() -> Built:
    return (
        Apply(
            lambda m, x: m.h((y := m.e(x)) + m.b(F.relu(m.a(y)))),
            e=nn.Linear(5, 12),
            a=nn.Linear(12, 20),
            b=nn.Linear(20, 12),
            h=nn.Linear(12, 4),
        ),
        (torch.randn(2, 5),),
        {},
    )


@block
def conv1d() -> Built:
    return nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3)), (torch.randn(2, 3, 9),), {}


@block
def conv2d_gap() -> Built:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return net, image(), {}


@block
def conv3d() -> Built:
    return (
        nn.Sequential(nn.Conv3d(3, 8, 2), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 4, 2)),
        (torch.randn(2, 3, 4, 4, 4),),
        {},
    )


@block
def conv_transpose() -> Built:
    return (
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, 2), nn.ReLU(), nn.Conv2d(6, 3, 1)
        ),
        image(),
        {},
    )


@block
def conv_flatten_linear() -> Built:
    return (
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 6), nn.ReLU(), nn.Linear(6, 4)
        ),
        image(),
        {},
    )


@block
def depthwise() -> Built:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 4, 1)
    )
    return net, image(), {}


@block
def depthwise_multiplier() -> Built:
    return (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 24, 3, groups=8), nn.ReLU(), nn.Conv2d(24, 4, 1)),
        image(),
        {},
    )


@block
def grouped_conv() -> Built:
    return (
        nn.Sequential(
            nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 16, 3, groups=4), nn.ReLU(), nn.Conv2d(16, 4, 1)
        ),
        image(),
        {},
    )


@block
def grouped_conv_transpose() -> Built:
    net = nn.Sequential(
        nn.Conv2d(3, 12, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 16, 2, groups=4),
        nn.ReLU(),
        nn.Conv2d(16, 4, 1),
    )
    return net, image(), {}


@block
def pixel_shuffle() -> Built:
    net = nn.Sequential(
        nn.Conv2d(3, 16, 1),
        nn.PixelShuffle(2),
        nn.ReLU(),
        nn.Conv2d(4, 5, 1),
        nn.PixelUnshuffle(2),
        nn.Conv2d(20, 3, 1),
    )
    return net, image(), {}


@block
def channel_shuffle() -> Built:
    net = nn.Sequential(
        nn.Conv2d(3, 12, 1),
        nn.ChannelShuffle(3),
        nn.Conv2d(12, 12, 3, groups=12),
        nn.ReLU(),
        nn.Conv2d(12, 3, 1),
    )
    return net, image(), {}


@block
def batch_norm() -> Built:
    return (
        nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)),
        image(),
        {},
    )


@block
def layer_norm() -> Built:
    return nn.Sequential(nn.Linear(5, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 4)), tokens(), {}


@block
def group_norm() -> Built:
    return (
        nn.Sequential(nn.Conv2d(3, 12, 3), nn.GroupNorm(4, 12), nn.SiLU(), nn.Conv2d(12, 4, 1)),
        image(),
        {},
    )


@block
def instance_norm() -> Built:
    return (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), nn.Conv2d(8, 4, 1)),
        image(),
        {},
    )


@block
def rms_norm() -> Built:
    return nn.Sequential(nn.Linear(5, 12), nn.RMSNorm(12), nn.SiLU(), nn.Linear(12, 4)), tokens(), {}


@block
def local_response_norm() -> Built:
    return (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.LocalResponseNorm(3), nn.ReLU(), nn.Conv2d(8, 4, 1)),
        image(),
        {},
    )


@block
def weight_norm() -> Built:
    lin = nn.utils.parametrizations.weight_norm(nn.Linear(5, 12))
    return nn.Sequential(lin, nn.ReLU(), nn.Linear(12, 4)), (torch.randn(2, 5),), {}


@block
def prelu() -> Built:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.Conv2d(8, 4, 1), nn.PReLU()), image(), {}


@block
def geglu() -> Built:
    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = m.up(x).chunk(2, -1)
        return m.down(a * F.gelu(b))

    return Apply(forward, up=nn.Linear(5, 24), down=nn.Linear(12, 4)), tokens(), {}


@block
def swiglu() -> Built:
    return (
        Apply(
            lambda m, x: m.o(F.silu(m.g(x)) * m.u(x)),
            g=nn.Linear(5, 12),
            u=nn.Linear(5, 12),
            o=nn.Linear(12, 4),
        ),
        tokens(),
        {},
    )


@block
def glu_module() -> Built:
    return nn.Sequential(nn.Linear(5, 24), nn.GLU(), nn.Linear(12, 4)), tokens(), {}


@block
def layer_scale_squeeze_excite() -> Built:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x)
        gate = torch.sigmoid(m.up(F.relu(m.down(y.mean((2, 3), keepdim=True)))))
        return m.head(y + m.gamma * (y * gate))

    return (
        Apply(
            forward,
            {"gamma": torch.full((8, 1, 1), 0.1)},
            stem=nn.Conv2d(3, 8, 3),
            down=nn.Conv2d(8, 4, 1),
            up=nn.Conv2d(4, 8, 1),
            head=nn.Conv2d(8, 3, 1),
        ),
        image(),
        {},
    )


@block
def concat_skip() -> Built:
    return (
        Apply(
            lambda m, x: m.h(torch.cat([y := F.relu(m.a(x)), F.relu(m.b(y))], 1)),
            a=nn.Conv2d(3, 6, 1),
            b=nn.Conv2d(6, 8, 1),
            h=nn.Conv2d(14, 3, 1),
        ),
        image(),
        {},
    )


@block
def concat_skip_group_norm() -> Built:
    """Widths 16 + 8 under GroupNorm(4): groups of 6 straddle the seam."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.n1(F.relu(m.a(x)))
        z = m.n2(F.relu(m.b(y)))
        return m.h(m.n3(torch.cat([z, y], 1)))

    return (
        Apply(
            forward,
            a=nn.Conv2d(3, 8, 1),
            n1=nn.GroupNorm(4, 8),
            b=nn.Conv2d(8, 16, 1),
            n2=nn.GroupNorm(4, 16),
            n3=nn.GroupNorm(4, 24),
            h=nn.Conv2d(24, 3, 1),
        ),
        image(),
        {},
    )


@block
def concat_of_halves() -> Built:
    """The halves of a layer are treated differently and put back together: they may not mix."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.h(torch.cat([F.relu(y[..., :6]), torch.tanh(y[..., 6:])], -1))

    return Apply(forward, a=nn.Linear(5, 12), h=nn.Linear(12, 4)), tokens(), {}


@block
def interleaved_copies() -> Built:
    """x and relu(x) concatenated out of step: which copy is which may not be confused."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.h(torch.cat([y[..., :2], F.relu(y), y[..., 2:]], -1))

    return Apply(forward, a=nn.Linear(5, 6), h=nn.Linear(12, 4)), tokens(), {}


@block
def flipped_sum() -> Built:
    return (
        Apply(
            lambda m, x: m.h((y := m.a(x)) * torch.sigmoid(y.flip(-1))), a=nn.Linear(5, 8), h=nn.Linear(8, 4)
        ),
        tokens(),
        {},
    )


@block
def cut_flatten() -> Built:
    """conv, flatten, and a slice that loses the first and the last position."""
    return (
        Apply(
            lambda m, x: m.h(F.relu(m.a(x)).flatten(1)[:, 1:-1]),
            a=nn.Conv2d(3, 6, 3),
            h=nn.Linear(6 * 16 - 2, 4),
        ),
        image(),
        {},
    )


@block
def linear_unflatten_conv() -> Built:
    net = nn.Sequential(
        nn.Linear(5, 6 * 16),
        nn.ReLU(),
        nn.Unflatten(1, (6, 4, 4)),
        nn.Conv2d(6, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 3, 1),
    )
    return net, (torch.randn(2, 5),), {}


@block
def mixer() -> Built:
    """Token mixing and channel mixing: two independent kinds of neurons on one tensor."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.e(x)
        y = y + m.t2(F.gelu(m.t1(m.n(y).transpose(1, 2)))).transpose(1, 2)
        return m.h(y + m.c2(F.gelu(m.c1(y))))

    return (
        Apply(
            forward,
            e=nn.Linear(5, 8),
            n=nn.LayerNorm(8),
            t1=nn.Linear(4, 6),
            t2=nn.Linear(6, 4),
            c1=nn.Linear(8, 12),
            c2=nn.Linear(12, 8),
            h=nn.Linear(8, 3),
        ),
        tokens(),
        {},
    )


@block
def fused_qkv() -> Built:
    def forward(m: Any, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = m.qkv(x).reshape(b, t, 3, 4, 4).permute(2, 0, 3, 1, 4)
        return m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, 16))

    return Apply(forward, qkv=nn.Linear(5, 48), o=nn.Linear(16, 3)), tokens(), {}


@block
def handwritten_attention() -> Built:
    def forward(m: Any, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        y = m.e(x)
        q, k, v = (
            layer(y).view(b, t, 4, 4).permute(0, 2, 1, 3).reshape(b * 4, t, 4) for layer in (m.q, m.k, m.v)
        )
        a = torch.softmax(torch.bmm(q, k.transpose(1, 2)) / 2, -1)
        return m.h(y + m.o(torch.bmm(a, v).view(b, 4, t, 4).permute(0, 2, 1, 3).reshape(b, t, 16)))

    layers = {name: nn.Linear(16, 16) for name in "qkvo"}
    return Apply(forward, e=nn.Linear(5, 16), h=nn.Linear(16, 3), **layers), tokens(), {}


@block
def einsum_attention() -> Built:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btc,hdc->bhtd", x, w) for w in (m.wq, m.wk, m.wv))
        a = torch.einsum("bhtd,bhsd->bhts", q, k).softmax(-1)
        return torch.einsum("bhts,bhsd,hdo->bto", a, v, m.wo)

    shapes = {"wq": (3, 4, 5), "wk": (3, 4, 5), "wv": (3, 6, 5), "wo": (3, 6, 2)}
    return Apply(forward, {n: torch.randn(s) for n, s in shapes.items()}), tokens(), {}


@block
def multihead_attention() -> Built:
    return (
        Apply(
            lambda m, x: m.h(m.a(y := m.e(x), y, y)[0] + y),
            e=nn.Linear(5, 16),
            a=nn.MultiheadAttention(16, 4, batch_first=True),
            h=nn.Linear(16, 3),
        ),
        tokens(),
        {},
    )


@block
def transformer_encoder() -> Built:
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, norm_first=True)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return Apply(lambda m, x: m.h(m.t(m.e(x))), e=nn.Linear(5, 16), t=net, h=nn.Linear(16, 3)), tokens(), {}


@block
def linear_attention() -> Built:
    """k^T v first: neurons of k and of v live on one tensor."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = F.elu(m.q(x)) + 1, F.elu(m.k(x)) + 1, m.v(x)
        return m.o(q @ (k.transpose(1, 2) @ v) / (q @ k.sum(1, keepdim=True).transpose(1, 2)))

    return (
        Apply(forward, q=nn.Linear(5, 8), k=nn.Linear(5, 8), v=nn.Linear(5, 6), o=nn.Linear(6, 3)),
        tokens(),
        {},
    )


@block
def rope_gqa() -> Built:
    def forward(m: Any, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = m.q(x).view(b, t, 4, 4).transpose(1, 2)
        k, v = (layer(x).view(b, t, 2, 4).transpose(1, 2) for layer in (m.k, m.v))
        angle = torch.arange(t)[:, None] * torch.tensor([1.0, 0.1]).repeat(2)
        turn = lambda y: y * angle.cos() + torch.cat([-y[..., 2:], y[..., :2]], -1) * angle.sin()  # noqa: E731
        k, v = turn(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return m.o(F.scaled_dot_product_attention(turn(q), k, v).transpose(1, 2).reshape(b, t, 16))

    return (
        Apply(forward, q=nn.Linear(5, 16), k=nn.Linear(5, 8), v=nn.Linear(5, 8), o=nn.Linear(16, 3)),
        tokens(),
        {},
    )


@block
def alibi_scale_per_head() -> Built:
    def forward(m: Any, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (layer(x).view(b, t, 4, 3).transpose(1, 2) for layer in (m.q, m.k, m.v))
        a = (q @ k.transpose(-1, -2) * m.scale[:, None, None] + m.bias).softmax(-1)
        return m.o((a @ v).transpose(1, 2).reshape(b, t, 12))

    layers = {name: nn.Linear(5, 12) for name in "qkv"}
    return (
        Apply(forward, {"scale": torch.rand(4), "bias": torch.randn(4, 4, 4)}, o=nn.Linear(12, 3), **layers),
        tokens(),
        {},
    )


@block
def qk_norm() -> Built:
    def forward(m: Any, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (layer(x).view(b, t, 4, 3).transpose(1, 2) for layer in (m.q, m.k, m.v))
        return m.o(F.scaled_dot_product_attention(m.nq(q), m.nk(k), v).transpose(1, 2).reshape(b, t, 12))

    layers = {name: nn.Linear(5, 12) for name in "qkv"}
    return Apply(forward, nq=nn.RMSNorm(3), nk=nn.RMSNorm(3), o=nn.Linear(12, 3), **layers), tokens(), {}


@block
def lstm() -> Built:
    return (
        Apply(
            lambda m, x: m.h(m.r(x)[0]), r=nn.LSTM(5, 7, num_layers=2, batch_first=True), h=nn.Linear(7, 3)
        ),
        tokens(),
        {},
    )


@block
def gru() -> Built:
    return (
        Apply(
            lambda m, x: m.h(m.r(x)[0]),
            r=nn.GRU(5, 7, batch_first=True, bidirectional=True),
            h=nn.Linear(14, 3),
        ),
        tokens(),
        {},
    )


@block
def embedding_tied() -> Built:
    def forward(m: Any, ids: Tensor) -> Tensor:
        return F.linear(m.b(F.relu(m.a(m.e(ids)))), m.e.weight)

    return (
        Apply(forward, e=nn.Embedding(11, 8), a=nn.Linear(8, 12), b=nn.Linear(12, 8)),
        (torch.randint(0, 11, (2, 4)),),
        {},
    )


@block
def embedding_untied() -> Built:
    return (
        nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 11)),
        (torch.randint(0, 11, (2, 4)),),
        {},
    )


@block
def shared_module() -> Built:
    return (
        Apply(
            lambda m, x: m.h(m.s(F.relu(m.s(m.e(x))))),
            e=nn.Linear(5, 8),
            s=nn.Linear(8, 8),
            h=nn.Linear(8, 3),
        ),
        tokens(),
        {},
    )


@block
def functional_parameters() -> Built:
    return (
        Apply(
            lambda m, x: F.linear(F.relu(F.linear(x, m.a, m.b)), m.c),
            {"a": torch.randn(9, 5), "b": torch.randn(9), "c": torch.randn(3, 9)},
        ),
        tokens(),
        {},
    )


@block
def two_inputs_two_outputs() -> Built:
    def forward(m: Any, x: Tensor, y: Tensor, scale: float = 1.0) -> dict[str, Any]:
        z = F.relu(m.a(x) + m.b(y) * scale)
        return {"one": m.c(z), "two": (m.d(z), z.sum())}

    layers = {"a": nn.Linear(5, 9), "b": nn.Linear(6, 9), "c": nn.Linear(9, 3), "d": nn.Linear(9, 4)}
    return Apply(forward, **layers), (torch.randn(2, 5), torch.randn(2, 6)), {"scale": 2.0}


@block
def gram_matrix() -> Built:
    """The channels of one layer on both dimensions of a tensor (style losses, XCA)."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).transpose(1, 2)
        return m.h((y @ y.transpose(1, 2)).softmax(-1) @ y).transpose(1, 2)

    return Apply(forward, a=nn.Linear(5, 8), h=nn.Linear(4, 3)), tokens(), {}


@block
def max_over_channels() -> Built:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.h(torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1)) * y.sum(1, keepdim=True)

    return Apply(forward, a=nn.Conv2d(3, 8, 3), h=nn.Conv2d(2, 3, 1)), image(), {}


@block
def position_embedding() -> Built:
    return (
        Apply(
            lambda m, x: m.h(F.gelu(torch.cat([m.c.expand(x.shape[0], -1, -1), m.e(x)], 1) + m.p)[:, 0]),
            {"c": torch.randn(1, 1, 8), "p": torch.randn(1, 5, 8)},
            e=nn.Linear(5, 8),
            h=nn.Linear(8, 3),
        ),
        tokens(),
        {},
    )


@block
def unknown_operator() -> Built:
    """An FFT over the channels knows their order."""
    return (
        Apply(lambda m, x: m.h(torch.fft.rfft(m.a(x)).abs()), a=nn.Linear(5, 8), h=nn.Linear(5, 3)),
        tokens(),
        {},
    )


@block
def cut_position_table() -> Built:
    """A table longer than the example: the rows that it never reaches may not move."""
    return (
        Apply(
            lambda m, x: m.h(F.gelu(m.e(x) + m.p[: x.shape[1]])),
            {"p": torch.randn(9, 8)},
            e=nn.Linear(5, 8),
            h=nn.Linear(8, 3),
        ),
        tokens(),
        {},
    )


@block
def complex_rope() -> Built:
    def forward(m: Any, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (layer(x).view(b, t, 4, 4).transpose(1, 2) for layer in (m.q, m.k, m.v))
        angle = torch.polar(torch.ones(t, 2), torch.arange(t)[:, None] * torch.tensor([1.0, 0.1]))
        q, k = (
            torch.view_as_real(torch.view_as_complex(y.reshape(b, 4, t, 2, 2)) * angle).flatten(3)
            for y in (q, k)
        )
        return m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, 16))

    layers = {name: nn.Linear(5, 16) for name in "qkv"}
    return Apply(forward, o=nn.Linear(16, 3), **layers), tokens(), {}
