"""Narrow single files of today's image and video models: the names and shapes that their own code gives them.

Widths have two heads or a little more, and most are so narrow that they are their own narrow twins; blocks of each kind
are two, so that the first and the last may differ.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, out: int, into: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def under(prefix: str, *parts: Shapes) -> Shapes:
    return {f"{prefix}.{name}": shape for part in parts for name, shape in part.items()}


def joined(*parts: Shapes) -> Shapes:
    return {name: shape for part in parts for name, shape in part.items()}


def blocks(name: str, count: int, block: Callable[[int], Shapes]) -> Shapes:
    return joined(*(under(f"{name}.{i}", block(i)) for i in range(count)))


def sd3(
    width: int = 16,
    head: int = 8,
    text: int = 12,
    pooled: int = 10,
    depth: int = 2,
    dual: int = 1,
    places: int = 8,
) -> Shapes:
    """3.5, as its medium model: with norms of queries and keys, and a second attention in the first `dual` blocks."""

    def attention(name: str, last: bool = False) -> Shapes:
        norms = {"ln_q.weight": (head,), "ln_k.weight": (head,)}
        return under(
            name, linear("qkv", 3 * width, width), {} if last else linear("proj", width, width), norms
        )

    def mlp() -> Shapes:
        return under("mlp", linear("fc1", 4 * width, width), linear("fc2", width, 4 * width))

    def block(i: int) -> Shapes:
        last, twice = i == depth - 1, i < dual
        context = joined(
            attention("attn", last),
            {} if last else mlp(),
            linear("adaLN_modulation.1", (2 if last else 6) * width, width),
        )
        x = joined(
            attention("attn"),
            attention("attn2") if twice else {},
            mlp(),
            linear("adaLN_modulation.1", (9 if twice else 6) * width, width),
        )
        return under("context_block", context) | under("x_block", x)

    return joined(
        {"pos_embed": (1, places**2, width)},
        {"x_embedder.proj.weight": (width, 16, 2, 2), "x_embedder.proj.bias": (width,)},
        under("t_embedder.mlp", linear("0", width, 256), linear("2", width, width)),
        under("y_embedder.mlp", linear("0", width, pooled), linear("2", width, width)),
        linear("context_embedder", width, text),
        blocks("joint_blocks", depth, block),
        linear("final_layer.linear", 64, width),
        linear("final_layer.adaLN_modulation.1", 2 * width, width),
    )


def _double(width: int, head: int, inner: int, gate: int = 1, bias: bool = True) -> Shapes:
    """A block of Flux for pictures and texts, without its modulations."""
    norms = {"norm.query_norm.scale": (head,), "norm.key_norm.scale": (head,)}
    one = [
        (f"{kind}_attn", linear("qkv", 3 * width, width, bias) | norms | linear("proj", width, width, bias))
        for kind in ("img", "txt")
    ]
    two = [
        (f"{kind}_mlp", linear("0", gate * inner, width, bias) | linear("2", width, inner, bias))
        for kind in ("img", "txt")
    ]
    return joined(*(under(name, part) for name, part in (*one, *two)))


def _single(width: int, head: int, inner: int, gate: int = 1, bias: bool = True) -> Shapes:
    return joined(
        linear("linear1", 3 * width + gate * inner, width, bias),
        linear("linear2", width, width + inner, bias),
        {"norm.query_norm.scale": (head,), "norm.key_norm.scale": (head,)},
    )


def _embedding(name: str, width: int, into: int, bias: bool = True) -> Shapes:
    return under(name, linear("in_layer", width, into, bias), linear("out_layer", width, width, bias))


def flux1(
    width: int = 16, head: int = 8, text: int = 12, pooled: int = 10, depth: int = 2, singles: int = 2
) -> Shapes:
    """Flux.1-dev, with guidance."""

    def double(i: int) -> Shapes:
        modulations = linear("img_mod.lin", 6 * width, width) | linear("txt_mod.lin", 6 * width, width)
        return modulations | _double(width, head, 4 * width)

    return joined(
        linear("img_in", width, 64),
        _embedding("time_in", width, 256),
        _embedding("vector_in", width, pooled),
        _embedding("guidance_in", width, 256),
        linear("txt_in", width, text),
        blocks("double_blocks", depth, double),
        blocks(
            "single_blocks",
            singles,
            lambda i: _single(width, head, 4 * width) | linear("modulation.lin", 3 * width, width),
        ),
        linear("final_layer.linear", 64, width),
        linear("final_layer.adaLN_modulation.1", 2 * width, width),
    )


def chroma(
    width: int = 16,
    head: int = 8,
    text: int = 12,
    inner: int = 20,
    guides: int = 2,
    depth: int = 2,
    singles: int = 2,
) -> Shapes:
    return joined(
        linear("img_in", width, 64),
        linear("txt_in", width, text),
        under(
            "distilled_guidance_layer",
            linear("in_proj", inner, 64),
            linear("out_proj", width, inner),
            blocks(
                "layers",
                guides,
                lambda i: linear("in_layer", inner, inner) | linear("out_layer", inner, inner),
            ),
            blocks("norms", guides, lambda i: {"scale": (inner,)}),
        ),
        blocks("double_blocks", depth, lambda i: _double(width, head, 4 * width)),
        blocks("single_blocks", singles, lambda i: _single(width, head, 4 * width)),
        linear("final_layer.linear", 64, width),
    )


def flux2(
    width: int = 16, head: int = 8, text: int = 12, time: int = 32, depth: int = 2, singles: int = 2
) -> Shapes:
    inner = 3 * width
    return joined(
        linear("img_in", width, 128, False),
        _embedding("time_in", width, time, False),
        _embedding("guidance_in", width, time, False),
        linear("txt_in", width, text, False),
        linear("double_stream_modulation_img.lin", 6 * width, width, False),
        linear("double_stream_modulation_txt.lin", 6 * width, width, False),
        linear("single_stream_modulation.lin", 3 * width, width, False),
        blocks("double_blocks", depth, lambda i: _double(width, head, inner, 2, False)),
        blocks("single_blocks", singles, lambda i: _single(width, head, inner, 2, False)),
        linear("final_layer.linear", 128, width, False),
        linear("final_layer.adaLN_modulation.1", 2 * width, width, False),
    )


def _next(width: int, head: int, keys: int, inner: int, modulation: Shapes) -> Shapes:
    """A block of Lumina 2 and Z-Image."""
    norms = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
    return joined(
        linear("attention.qkv", width + 2 * keys * head, width, False),
        linear("attention.out", width, width, False),
        {"attention.q_norm.weight": (head,), "attention.k_norm.weight": (head,)},
        under("feed_forward", linear("w1", inner, width, False), linear("w2", width, inner, False)),
        linear("feed_forward.w3", inner, width, False),
        {f"{norm}.weight": (width,) for norm in norms},
        modulation,
    )


def lumina2(
    width: int = 144, head: int = 24, text: int = 12, adaptive: int = 144, inner: int = 640, depth: int = 2
) -> Shapes:
    """Three heads of queries to one of keys, as released."""
    keys = width // head // 3

    def modulated(i: int) -> Shapes:
        return _next(width, head, keys, inner, linear("adaLN_modulation.1", 4 * width, adaptive))

    return joined(
        linear("x_embedder", width, 64),
        blocks("noise_refiner", 2, modulated),
        blocks("context_refiner", 2, lambda i: _next(width, head, keys, inner, {})),
        under("t_embedder.mlp", linear("0", adaptive, 256), linear("2", adaptive, adaptive)),
        {"cap_embedder.0.weight": (text,)},
        linear("cap_embedder.1", width, text),
        blocks("layers", depth, modulated),
        {"norm_final.weight": (width,)},
        linear("final_layer.linear", 64, width),
        linear("final_layer.adaLN_modulation.1", width, adaptive),
    )


def z_image(width: int = 40, head: int = 20, text: int = 12, adaptive: int = 40, depth: int = 2) -> Shapes:
    inner, heads = int(width / 3 * 8), width // head

    def modulated(i: int) -> Shapes:
        return _next(width, head, heads, inner, linear("adaLN_modulation.0", 4 * width, adaptive))

    return joined(
        linear("x_embedder", width, 64),
        linear("final_layer.linear", 64, width),
        linear("final_layer.adaLN_modulation.1", width, adaptive),
        blocks("noise_refiner", 2, modulated),
        blocks("context_refiner", 2, lambda i: _next(width, head, heads, inner, {})),
        under("t_embedder.mlp", linear("0", 1024, 256), linear("2", adaptive, 1024)),
        {"cap_embedder.0.weight": (text,)},
        linear("cap_embedder.1", width, text),
        blocks("layers", depth, modulated),
        {"x_pad_token": (1, width), "cap_pad_token": (1, width)},
    )


def qwen_image(width: int = 16, head: int = 8, text: int = 12, depth: int = 2) -> Shapes:
    def block(i: int) -> Shapes:
        attention = [linear(n, width, width) for n in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")]
        added = [linear(f"add_{n}_proj", width, width) for n in "qkv"]
        norms = {f"norm_{n}.weight": (head,) for n in ("q", "k", "added_q", "added_k")}
        return joined(
            under("attn", *attention, *added, norms),
            *(
                joined(
                    linear(f"{kind}_mod.1", 6 * width, width),
                    linear(f"{kind}_mlp.net.0.proj", 4 * width, width),
                    linear(f"{kind}_mlp.net.2", width, 4 * width),
                )
                for kind in ("img", "txt")
            ),
        )

    return joined(
        under("time_text_embed.timestep_embedder", linear("linear_1", width, 256)),
        under("time_text_embed.timestep_embedder", linear("linear_2", width, width)),
        {"txt_norm.weight": (text,)},
        linear("img_in", width, 64),
        linear("txt_in", width, text),
        blocks("transformer_blocks", depth, block),
        linear("norm_out.linear", 2 * width, width),
        linear("proj_out", 64, width),
    )


def qwen_image21(width: int = 16, head: int = 8, text: int = 12, depth: int = 2) -> Shapes:
    """Gate and inner layer in one tensor."""
    inner = 3 * width

    def block(i: int) -> Shapes:
        attention = [linear(n, width, width, False) for n in ("to_q", "to_k", "to_v", "to_out.0")]
        return joined(
            under("attn", *attention, {"norm_q.weight": (head,), "norm_k.weight": (head,)}),
            linear("img_mlp.gate_up", 2 * inner, width, False),
            linear("img_mlp.out", width, inner, False),
        )

    return joined(
        under("time_text_embed.timestep_embedder", linear("linear_1", width, 256, False)),
        under("time_text_embed.timestep_embedder", linear("linear_2", width, width, False)),
        {"txt_in.text_norm.weight": (text,)},
        linear("txt_in.in_layer", width, text, False),
        linear("txt_in.out_layer", width, width, False),
        linear("img_in", width, 64, False),
        linear("modulation.1", 4 * width, width, False),
        blocks("transformer_blocks", depth, block),
        linear("norm_out.linear", width, width, False),
        linear("proj_out", 64, width, False),
    )


def krea2(
    width: int = 32,
    head: int = 8,
    keys: int = 2,
    inner: int = 48,
    text: int = 16,
    text_inner: int = 40,
    layers: int = 3,
    depth: int = 2,
) -> Shapes:
    """Two heads of queries to one of keys."""

    def block(own: int, few: int, inner: int) -> Shapes:
        attention = joined(
            linear("wq", own, own, False),
            linear("wk", few * head, own, False),
            linear("wv", few * head, own, False),
            linear("gate", own, own, False),
            linear("wo", own, own, False),
            {"qknorm.qnorm.scale": (head,), "qknorm.knorm.scale": (head,)},
        )
        mlp = [linear("gate", inner, own, False), linear("up", inner, own, False)]
        return joined(
            {"prenorm.scale": (own,), "postnorm.scale": (own,)},
            under("attn", attention),
            under("mlp", *mlp, linear("down", own, inner, False)),
        )

    return joined(
        linear("first", width, 64),
        under("tmlp", linear("0", width, 256), linear("2", width, width)),
        linear("tproj.1", 6 * width, width),
        {"txtmlp.0.scale": (text,)},
        linear("txtmlp.1", width, text),
        linear("txtmlp.3", width, width),
        blocks("txtfusion.layerwise_blocks", 2, lambda i: block(text, text // head, text_inner)),
        {"txtfusion.projector.weight": (1, layers)},
        blocks("txtfusion.refiner_blocks", 2, lambda i: block(text, text // head, text_inner)),
        blocks("blocks", depth, lambda i: block(width, keys, inner) | {"mod.lin": (6 * width,)}),
        {"last.norm.scale": (width,), "last.modulation.lin": (2, width)},
        linear("last.linear", 64, width),
    )


def _wan_block(width: int, inner: int, image: bool) -> Shapes:
    own = joined(*(linear(n, width, width) for n in "qkvo"))
    norms = {"norm_q.weight": (width,), "norm_k.weight": (width,)}
    added = linear("k_img", width, width) | linear("v_img", width, width) | {"norm_k_img.weight": (width,)}
    return joined(
        {"modulation": (1, 6, width)},
        under("self_attn", own, norms),
        under("cross_attn", own, norms, added if image else {}),
        {"norm3.weight": (width,), "norm3.bias": (width,)},
        under("ffn", linear("0", inner, width), linear("2", width, inner)),
    )


def wan(
    width: int = 256, text: int = 12, inner: int = 40, time: int = 32, image: int = 0, depth: int = 2
) -> Shapes:
    """Heads have 128 channels in all of them; `image`: the width of an encoded first frame, and last one."""
    seen = joined(
        under("img_emb.proj.0", {"weight": (image,), "bias": (image,)}),
        linear("img_emb.proj.1", image, image),
        linear("img_emb.proj.3", width, image),
        under("img_emb.proj.4", {"weight": (width,), "bias": (width,)}),
        {"img_emb.emb_pos": (1, 8, image)},
    )
    return joined(
        {"patch_embedding.weight": (width, 16, 1, 2, 2), "patch_embedding.bias": (width,)},
        under("text_embedding", linear("0", width, text), linear("2", width, width)),
        under("time_embedding", linear("0", width, time), linear("2", width, width)),
        linear("time_projection.1", 6 * width, width),
        blocks("blocks", depth, lambda i: _wan_block(width, inner, bool(image))),
        {"head.modulation": (1, 2, width)},
        linear("head.head", 64, width),
        seen if image else {},
    )


def wan_vace(
    width: int = 256, text: int = 12, inner: int = 40, time: int = 32, depth: int = 2, own_blocks: int = 2
) -> Shapes:
    """Blocks at equal distances have one that reads the conditions."""

    def own(i: int) -> Shapes:
        first = linear("before_proj", width, width) if i == 0 else {}
        return first | _wan_block(width, inner, False) | linear("after_proj", width, width)

    return joined(
        wan(width, text, inner, time, depth=depth),
        {"vace_patch_embedding.weight": (width, 96, 1, 2, 2), "vace_patch_embedding.bias": (width,)},
        blocks("vace_blocks", own_blocks, own),
    )


ORIGINAL: dict[str, Callable[..., Shapes]] = {
    "SD3Transformer2DModel": sd3,
    "FluxTransformer2DModel": flux1,
    "Flux2Transformer2DModel": flux2,
    "ChromaTransformer2DModel": chroma,
    "Lumina2Transformer2DModel": lumina2,
    "ZImageTransformer2DModel": z_image,
    "QwenImageTransformer2DModel": qwen_image,
    "QwenImage21Transformer2DModel": qwen_image21,
    "Krea2Transformer2DModel": krea2,
    "WanTransformer3DModel": wan,
    "WanVACETransformer3DModel": wan_vace,
}
"""Class of diffusers -> the tensors of a narrow file of its own code."""


RELEASED: dict[str, dict[str, int]] = {
    "SD3Transformer2DModel": dict(width=1536, head=64, text=4096, pooled=2048, depth=24, dual=13, places=384),
    "FluxTransformer2DModel": dict(width=3072, head=128, text=4096, pooled=768, depth=19, singles=38),
    "Flux2Transformer2DModel": dict(width=6144, head=128, text=15360, time=256, depth=8, singles=48),
    "ChromaTransformer2DModel": dict(
        width=3072, head=128, text=4096, inner=5120, guides=5, depth=19, singles=38
    ),
    "Lumina2Transformer2DModel": dict(width=2304, head=96, text=1024, adaptive=1024, inner=9216, depth=26),
    "ZImageTransformer2DModel": dict(width=3840, head=128, text=2560, adaptive=256, depth=30),
    "QwenImageTransformer2DModel": dict(width=3072, head=128, text=3584, depth=60),
    "QwenImage21Transformer2DModel": dict(width=4096, head=128, text=4096, depth=32),
    "Krea2Transformer2DModel": dict(
        width=6144, head=128, keys=12, inner=16384, text=2560, text_inner=6912, layers=12, depth=28
    ),
    "WanTransformer3DModel": dict(width=5120, text=4096, inner=13824, time=256, depth=40),
    "WanVACETransformer3DModel": dict(width=5120, text=4096, inner=13824, time=256, depth=40, own_blocks=8),
}
"""The sizes of a release of each."""


def tensors(shapes: Shapes, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights of about the size that layers have: gains around one, the rest small."""
    made = torch.Generator().manual_seed(seed)

    def one(name: str, shape: tuple[int, ...]) -> Tensor:
        random = torch.randn(shape, generator=made)
        gain = len(shape) == 1 and name.endswith(("scale", "weight"))
        return (1 + 0.1 * random if gain else random / max(1, 1, *shape[-1:]) ** 0.5).to(dtype)

    return {name: one(name, shape) for name, shape in shapes.items()}
