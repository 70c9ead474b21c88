"""Fused attention is matrix product, softmax, matrix product; heads come out as sets by themselves."""

from __future__ import annotations

from ..labels import Label, combine, normalise, reshape
from .linear import matrix_product
from .registry import Call, Result, rule


@rule(
    "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu"
    " _scaled_dot_product_efficient_attention _scaled_dot_product_flash_attention",
    takes="query key value attn_mask attn_bias is_causal enable_gqa",
    refuses="dropout_p q_descale k_descale v_descale",
    maps="values",
)
def attention(call: Call) -> Result:
    """q [..., H, T, d], k [..., H, S, d], v [..., H, S, e].

    The scores sum q k over d inside a head: q and k are tied there, and what is left is one element for each head.
    The output mixes v by those scores: each head's v belongs to that element, so heads move as wholes while
    q/k and v permute inside a head independently of each other.
    """
    c = call.constraints
    q, k, v = (call.tensor(name) for name in ("query", "key", "value"))
    k_label, v_label = k.label, v.label
    if call.args.get("enable_gqa") and k.shape[-3] != q.shape[-3]:  # each key head serves several query heads
        k_label, v_label = (_repeat_heads(call, t.label, t.shape, q.shape[-3]) for t in (k, v))
    order = [*range(k.ndim - 2), k.ndim - 1, k.ndim - 2]
    scores = matrix_product(c, q.label, k_label.permute(order))
    mask = call.optional("attn_mask") or call.optional("attn_bias")
    if mask is not None:
        scores = combine(c, [scores, mask.label])
    if call.args.get("is_causal"):  # a triangle of constants over queries and keys
        scores = combine(c, [scores, Label((1,) * (scores.ndim - 2) + (q.shape[-2], k.shape[-2]))])
    return matrix_product(c, normalise(c, scores, [-1]), v_label)


def _repeat_heads(call: Call, label: Label, shape: tuple[int, ...], heads: int) -> Label:
    lead, (kv, length, width) = shape[:-3], shape[-3:]
    wide = label.expand_rank([label.ndim - 2])
    repeated = (*lead, kv, heads // kv, length, width)
    return reshape(call.constraints, Label(wide.shape, wide.factors), repeated, (*lead, heads, length, width))
