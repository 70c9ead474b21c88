"""Single files of today's image and video models: the transformer alone, or with everything else beside it.

What a file is is told by its tensors. How they lie in the class of diffusers is what diffusers' own converter does with
them (see `tagged`), so the way back is exact, too; the configuration is read off the shapes, and a wrong one is found
out when the module's shapes are compared with the file's.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, replace
from math import isqrt, prod
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ...errors import CheckpointError, shown
from ...integrations.huggingface import quiet
from ...types import State, shape_of
from ..key_map import KeyMapping, Shape, same
from .folder import TRANSFORMER
from .known import Known
from .names import require_all, under, without_numbers
from .tagged import key_mappings

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "model.", "net.", "")
"""What stands before its names, the likeliest first."""

Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Family:
    """A class of diffusers, and what its files have.

    Attributes:
        probes: tensors by which it is known, in the file's names; the families before it in FAMILIES have others.
        own: the same in diffusers' names, of files that its own folders are made of.
        config: the entries of its configuration that are not the class's own defaults, from shapes in diffusers' names.
        counts_on: a tensor of the file and the rows that diffusers' converter takes it to have, where it has numbers
            for them; narrower ones are stretched to that while it is run.
        unread: names of tensors that files have and that the model does not use.
    """

    kind: str
    title: str
    probes: tuple[str, ...]
    own: tuple[str, ...]
    config: Callable[[Shapes], dict[str, Any]]
    counts_on: tuple[str, int] | None = None
    unread: tuple[str, ...] = ()


def _blocks(shapes: Shapes, name: str) -> int:
    """How many blocks of this name there are."""
    found = (re.match(rf"{re.escape(name)}\.(\d+)\.", one) for one in shapes)
    return 1 + max((int(f[1]) for f in found if f), default=-1)


def _axes(published: tuple[int, ...], head: int) -> list[int]:
    """The share of each axis in a head's rotations, as published or in a narrower head; they turn pairs."""
    shares = [2 * max(1, n * head // (2 * sum(published))) for n in published]
    return [*shares[:-1], head - sum(shares[:-1])]


def _sd3(shapes: Shapes) -> dict[str, Any]:
    layers, patches = _blocks(shapes, "transformer_blocks"), shapes["pos_embed.proj.weight"]
    pixels, norm = prod(patches[2:]), shapes.get("transformer_blocks.0.attn.norm_q.weight")
    heads = patches[0] // norm[0] if norm else layers  # as its definition has it
    return {
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": patches[0] // heads,
        "in_channels": patches[1],
        "out_channels": shapes["proj_out.weight"][0] // pixels,
        "patch_size": patches[2],
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "caption_projection_dim": shapes["context_embedder.weight"][0],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "pos_embed_max_size": isqrt(shapes["pos_embed.pos_embed"][1]),
        "dual_attention_layers": [
            i for i in range(layers) if f"transformer_blocks.{i}.attn2.to_q.weight" in shapes
        ],
        "qk_norm": "rms_norm" if norm else None,
    }


def _heads(shapes: Shapes, width: int, norm: str) -> dict[str, Any]:
    head = shapes[norm][0]
    return {"attention_head_dim": head, "num_attention_heads": width // head}


def _flux(shapes: Shapes) -> dict[str, Any]:
    width, channels = shapes["x_embedder.weight"]
    found = {
        **_heads(shapes, width, "transformer_blocks.0.attn.norm_q.weight"),
        "num_layers": _blocks(shapes, "transformer_blocks"),
        "num_single_layers": _blocks(shapes, "single_transformer_blocks"),
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0],
        "joint_attention_dim": shapes["context_embedder.weight"][1],
    }
    return found | {"axes_dims_rope": _axes((16, 56, 56), found["attention_head_dim"])}


def _flux1(shapes: Shapes) -> dict[str, Any]:
    return {
        **_flux(shapes),
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
    }


def _chroma(shapes: Shapes) -> dict[str, Any]:
    inner = shapes["distilled_guidance_layer.in_proj.weight"]
    return {
        **_flux(shapes),
        "approximator_num_channels": inner[1],
        "approximator_hidden_dim": inner[0],
        "approximator_layers": _blocks(shapes, "distilled_guidance_layer.layers"),
    }


def _flux2(shapes: Shapes) -> dict[str, Any]:
    found = _flux(shapes)
    width, head = shapes["x_embedder.weight"][0], found["attention_head_dim"]
    return {
        **found,
        "axes_dims_rope": _axes((32, 32, 32, 32), head),
        "mlp_ratio": shapes["transformer_blocks.0.ff.linear_in.weight"][0] / 2 / width,
        "timestep_guidance_channels": shapes["time_guidance_embed.timestep_embedder.linear_1.weight"][1],
        "guidance_embeds": "time_guidance_embed.guidance_embedder.linear_1.weight" in shapes,
    }


def _lumina2(shapes: Shapes) -> dict[str, Any]:
    width, patch = shapes["x_embedder.weight"]
    head, inner = shapes["layers.0.attn.norm_q.weight"][0], shapes["layers.0.feed_forward.linear_1.weight"][0]
    return {
        "hidden_size": width,
        "in_channels": patch // 4,
        "num_layers": _blocks(shapes, "layers"),
        "num_refiner_layers": _blocks(shapes, "noise_refiner"),
        "num_attention_heads": width // head,
        "num_kv_heads": shapes["layers.0.attn.to_k.weight"][0] // head,
        "multiple_of": 256 if inner % 256 == 0 and 4 * width <= inner < 4 * width + 256 else inner,
        "axes_dim_rope": _axes((32, 32, 32), head),
        "cap_feat_dim": shapes["time_caption_embed.caption_embedder.1.weight"][1],
    }


def _z_image(shapes: Shapes) -> dict[str, Any]:
    width, patch = shapes["all_x_embedder.2-1.weight"]
    head = shapes["layers.0.attention.norm_q.weight"][0]
    siglip = shapes.get("siglip_embedder.1.weight")
    return {
        "dim": width,
        "in_channels": patch // 4,
        "n_layers": _blocks(shapes, "layers"),
        "n_refiner_layers": _blocks(shapes, "noise_refiner"),
        "n_heads": width // head,
        "n_kv_heads": shapes["layers.0.attention.to_k.weight"][0] // head,
        "cap_feat_dim": shapes["cap_embedder.1.weight"][1],
        "axes_dims": _axes((32, 48, 48), head),
        **({"siglip_feat_dim": siglip[1]} if siglip else {}),
    }


def _qwen_image(shapes: Shapes) -> dict[str, Any]:
    width, channels = shapes["img_in.weight"]
    found = _heads(shapes, width, "transformer_blocks.0.attn.norm_q.weight")
    return {
        **found,
        "num_layers": _blocks(shapes, "transformer_blocks"),
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // 4,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "axes_dims_rope": _axes((16, 56, 56), found["attention_head_dim"]),
        "use_additional_t_cond": "time_text_embed.addition_t_embedding.weight" in shapes,
        "zero_cond_t": "__index_timestep_zero__" in shapes,
    }


def _qwen_image21(shapes: Shapes) -> dict[str, Any]:
    width, channels = shapes["img_in.weight"]
    head = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    inner = shapes["transformer_blocks.0.img_mlp.gate_layer.weight"][0]
    return {
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "num_layers": _blocks(shapes, "transformer_blocks"),
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0],
        "context_in_dim": shapes["txt_in.text_norm.weight"][0],
        "mlp_ratio": inner // width,
        "axes_dims_rope": _axes((16, 56, 56), head),
    }


def _krea2(shapes: Shapes) -> dict[str, Any]:
    width, channels = shapes["img_in.weight"]
    block, text = "transformer_blocks.0.", "text_fusion.layerwise_blocks.0."
    head, words = shapes[f"{block}attn.norm_q.weight"][0], shapes[f"{text}attn.norm_q.weight"][0]
    return {
        "in_channels": channels,
        "num_layers": _blocks(shapes, "transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "num_key_value_heads": shapes[f"{block}attn.to_k.weight"][0] // head,
        "intermediate_size": shapes[f"{block}ff.gate.weight"][0],
        "timestep_embed_dim": shapes["time_embed.linear_1.weight"][1],
        "text_hidden_dim": shapes["txt_in.norm.weight"][0],
        "num_text_layers": shapes["text_fusion.projector.weight"][1],
        "text_num_attention_heads": shapes[f"{text}attn.to_q.weight"][0] // words,
        "text_num_key_value_heads": shapes[f"{text}attn.to_k.weight"][0] // words,
        "text_intermediate_size": shapes[f"{text}ff.gate.weight"][0],
        "num_layerwise_text_blocks": _blocks(shapes, "text_fusion.layerwise_blocks"),
        "num_refiner_text_blocks": _blocks(shapes, "text_fusion.refiner_blocks"),
        "axes_dims_rope": _axes((32, 48, 48), head),
    }


WAN_HEAD = 128
"""Channels of a head of every Wan; its norms go across heads and tell nothing."""


def _wan(shapes: Shapes) -> dict[str, Any]:
    width, channels, *patch = shapes["patch_embedding.weight"]
    image = shapes.get("condition_embedder.image_embedder.ff.net.0.proj.weight")
    places = shapes.get("condition_embedder.image_embedder.pos_embed")
    added = shapes.get("blocks.0.attn2.add_k_proj.weight")
    if width % WAN_HEAD:
        raise ValueError(f"its width is {width}, and no multiple of {WAN_HEAD}")
    return {
        "patch_size": patch,
        "num_attention_heads": width // WAN_HEAD,
        "attention_head_dim": WAN_HEAD,
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // prod(patch),
        "text_dim": shapes["condition_embedder.text_embedder.linear_1.weight"][1],
        "freq_dim": shapes["condition_embedder.time_embedder.linear_1.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
        "num_layers": _blocks(shapes, "blocks"),
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
        "image_dim": image[1] if image else None,
        "added_kv_proj_dim": added[1] if added else None,
        "pos_embed_seq_len": places[1] if places else None,
    }


def _wan_vace(shapes: Shapes) -> dict[str, Any]:
    found, own = _wan(shapes), _blocks(shapes, "vace_blocks")
    return {
        **found,
        "vace_layers": list(range(0, found["num_layers"], found["num_layers"] // own)),
        "vace_in_channels": shapes["vace_patch_embedding.weight"][1],
    }


FAMILIES = (
    Family(
        "SD3Transformer2DModel", "Stable Diffusion 3",
        ("joint_blocks.0.x_block.attn.qkv.weight", "final_layer.linear.weight"),
        ("pos_embed.pos_embed", "transformer_blocks.0.attn.add_q_proj.weight", "context_embedder.weight"), _sd3,
    ),
    Family(
        "ChromaTransformer2DModel", "Chroma",
        ("distilled_guidance_layer.in_proj.weight", "double_blocks.0.img_attn.qkv.weight", "img_in.weight"),
        ("distilled_guidance_layer.in_proj.weight", "single_transformer_blocks.0.proj_mlp.weight"), _chroma,
        ("img_in.weight", 3072),
    ),
    Family(
        "Flux2Transformer2DModel", "Flux.2",
        ("single_stream_modulation.lin.weight", "double_blocks.0.img_attn.qkv.weight"),
        ("single_stream_modulation.linear.weight", "transformer_blocks.0.attn.add_q_proj.weight"), _flux2,
    ),
    Family(
        "FluxTransformer2DModel", "Flux.1",
        ("double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight", "txt_in.weight"),
        ("single_transformer_blocks.0.proj_mlp.weight", "time_text_embed.text_embedder.linear_1.weight"), _flux1,
        ("img_in.weight", 3072),
    ),
    Family(
        "ZImageTransformer2DModel", "Z-Image",
        ("layers.0.adaLN_modulation.0.weight", "cap_embedder.1.weight", "x_embedder.weight"),
        ("layers.0.adaLN_modulation.0.weight", "cap_embedder.1.weight", "all_x_embedder.2-1.weight"), _z_image,
        unread=("norm_final.weight",),
    ),
    Family(
        "Lumina2Transformer2DModel", "Lumina 2",
        ("layers.0.adaLN_modulation.1.weight", "cap_embedder.1.weight", "x_embedder.weight"),
        ("layers.0.norm1.linear.weight", "time_caption_embed.caption_embedder.1.weight"), _lumina2,
        ("x_embedder.weight", 2304), unread=("norm_final.weight",),
    ),
    Family(
        "QwenImage21Transformer2DModel", "Qwen-Image 2.1",
        ("txt_in.text_norm.weight", "img_in.weight", "transformer_blocks.0.img_mlp.gate_up.weight"),
        ("txt_in.text_norm.weight", "img_in.weight", "transformer_blocks.0.img_mlp.gate_layer.weight"),
        _qwen_image21,
    ),
    Family(
        "QwenImageTransformer2DModel", "Qwen-Image", (),
        ("transformer_blocks.0.img_mod.1.weight", "txt_in.weight", "img_in.weight"), _qwen_image,
        unread=("__index_timestep_zero__",),
    ),
    Family(
        "Krea2Transformer2DModel", "Krea 2",
        ("txtfusion.projector.weight", "first.weight"), ("text_fusion.projector.weight", "img_in.weight"), _krea2,
    ),
    Family(
        "WanVACETransformer3DModel", "Wan VACE",
        ("vace_blocks.0.after_proj.weight", "head.modulation", "patch_embedding.weight"),
        ("vace_blocks.0.proj_out.weight", "blocks.0.attn1.to_q.weight", "vace_patch_embedding.weight"), _wan_vace,
    ),
    Family(
        "WanTransformer3DModel", "Wan",
        ("blocks.0.self_attn.q.weight", "head.modulation", "patch_embedding.weight"),
        ("blocks.0.attn1.to_q.weight", "condition_embedder.time_proj.weight", "patch_embedding.weight"), _wan,
    ),
)  # fmt: skip
"""What files are told apart as; the first whose probes are all there is it."""

BESIDE = {
    "text encoders": r"text_encoders?(_\d+)?\.|cond_stage_model\.|conditioner\.",
    "a VAE": r"vae\.|first_stage_model\.",
    "a vision encoder": r"clip_vision\.|image_encoder\.|visual_encoder\.",
    "averaged weights": r"model_ema\.",
}
"""What all-in-one files have beside the transformer, by the beginning of its names."""


@dataclass(frozen=True)
class Single:
    """The transformer of a file: its family, its class, what stands before its names, how its tensors lie there, and
    whether in the layout of its own code ("ldm") or in diffusers' names.
    """

    family: Family
    known: Known
    prefix: str
    keys: list[KeyMapping]
    layout: str


def single(raw: State, where: object) -> Single | None:
    """The transformer in a file of today's families; None if there is none.

    Raises:
        CheckpointError: it is of a family, but not as diffusers knows it, or there are two.
    """
    found = list(_probed(raw))
    if not found:
        return None
    family, prefix, known_by, convert = found[0]
    if other := next((f for f, _, names, _ in found if not names & known_by), None):
        raise CheckpointError(
            f"{where} mixes two models, {family.title} and {other.title}; save the one that is meant alone."
        )
    return _understood(family, prefix, raw, where, convert)


def _probed(names: Container[str]) -> Iterator[tuple[Family, str, set[str], bool]]:
    """Families of which a file with these names has all probes: with what stands before its names, the probes, and
    whether they are those of its own code.
    """
    for prefix in PREFIXES:
        for family in FAMILIES:
            for probes in (family.probes, family.own):
                if probes and all(prefix + probe in names for probe in probes):
                    yield family, prefix, {prefix + probe for probe in probes}, probes is family.probes


def probed(names: Container[str]) -> bool:
    """Whether a file with these names has the transformer of a family."""
    return next(_probed(names), None) is not None


def beside(name: str) -> str | None:
    """What an all-in-one file has under this name beside the transformer; None if that is unknown."""
    return next((what for what, pattern in BESIDE.items() if re.match(pattern, name)), None)


def _understood(family: Family, prefix: str, raw: State, where: object, convert: bool) -> Single:
    names = [n for n in raw if n.startswith(prefix) and (prefix or beside(n) is None)]
    shapes = {n.removeprefix(prefix): shape_of(raw, n) for n in names}
    try:
        keys = _keys(family, shapes) if convert else [same(n, n, s) for n, s in shapes.items()]
        config = family.config({key.name: key.shape for key in keys})
        known = Known("diffusers", family.kind, _whole(family.kind, config), family.title)
        model = without_numbers(known, where)
        wanted = {name for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    except KeyError as error:  # what a converter or a configuration asks for
        raise _unlike(family, where, f"{shown(prefix + str(error.args[0]))} is missing") from error
    except (ValueError, IndexError, RuntimeError, StopIteration, ZeroDivisionError) as error:
        raise _unlike(family, where, shown(str(error))[1:-1]) from error
    keys = [key for key in keys if key.name in wanted]
    if missing := sorted(wanted - {key.name for key in keys}):
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise _unlike(family, where, f"{missing[0]}{more} would be missing")
    read = {piece.source for key in keys for piece in key.pieces}
    if strange := [name for name in shapes if name not in read and name not in family.unread]:
        raise _unlike(family, where, f"its {shown(prefix + strange[0])} is unknown")
    layout = "ldm" if convert else "diffusers"
    own = [under(prefix, key) for key in keys]
    require_all(model, known, raw, own, TRANSFORMER, where)
    return Single(family, known, prefix, own, layout)


def _whole(kind: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the class's defaults, as a folder has it."""
    with quiet():
        import diffusers

    known = inspect.signature(getattr(diffusers, kind).__init__).parameters
    config = {name: one.default for name, one in known.items() if one.default is not one.empty}
    same_out = config.get("out_channels", 0) is None and found.get("out_channels") == found["in_channels"]
    config |= {n: value for n, value in found.items() if not (same_out and n == "out_channels")}
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
    return {"_class_name": kind, **lists}


def _unlike(family: Family, where: object, why: str) -> CheckpointError:
    return CheckpointError(
        f"{where} has the tensors of {family.title}, but not as diffusers knows them ({why}): it is incomplete, or of a"
        " variant that is not known here."
    )


FEW = 2
"""Places of a row that are looked at: converters move rows, whose inner sizes are then those of the file again."""


def _keys(family: Family, shapes: Shapes) -> list[KeyMapping]:
    """How diffusers' converter makes its tensors of those of a file."""
    with quiet():
        from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    convert = SINGLE_FILE_LOADABLE_CLASSES[family.kind]["checkpoint_mapping_fn"]
    times = 1
    if family.counts_on is not None:
        name, rows = family.counts_on
        times, rest = divmod(rows, shapes[name][0])
        if rest:
            raise ValueError(f"{name} has {shapes[name][0]} rows and not {rows}")

    def converted(tensors: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        tall = {name: _taller(tensor, times) for name, tensor in tensors.items()}
        return {
            ALSO.get(str(name), str(name)): _shorter(str(name), tensor, times)
            for name, tensor in _converting(convert, tall, shapes).items()
        }

    thin = {name: (*shape[:1], *(min(n, FEW) for n in shape[1:])) for name, shape in shapes.items()}
    return [_full(key, shapes, thin) for key in key_mappings(converted, thin)]


def _converting(
    convert: Callable[..., Mapping[str, torch.Tensor]], tensors: dict[str, torch.Tensor], shapes: Shapes
) -> Mapping[str, torch.Tensor]:
    """What a converter makes of these tensors.

    Raises:
        ValueError: it fails with one of them; named, with the shape that the file has.
    """
    own = {
        id(tensor): (name, tensor) for name, tensor in tensors.items()
    }  # held: the converter takes them out

    class Naming(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            try:
                return func(*args, **(kwargs or {}))
            except (RuntimeError, IndexError) as error:
                name = next((own[id(one)][0] for one in tree_leaves((args, kwargs)) if id(one) in own), None)
                if name is None:
                    raise
                raise ValueError(f"its {shown(name)} has the shape {tuple(shapes[name])}") from error

    with Naming():
        return convert(checkpoint=tensors)


ALSO = {"img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed"}
"""Names that a converter forgets (of Wan's model for first and last frames)."""


def _full(key: KeyMapping, shapes: Shapes, thin: Shapes) -> KeyMapping:
    """A mapping of thin tensors, of those that the file has.

    Raises:
        ValueError: it is no arrangement of rows of one length.
    """
    inner = {shapes[piece.source][1:] for piece in key.pieces}
    if key.transposed or len(inner) > 1:
        raise ValueError(f"{key.name} is no arrangement of rows")
    (own,) = inner
    if not own:  # numbers, which may get any shape
        return key
    if key.shape[1:] != thin[key.source][1:]:
        raise ValueError(f"{key.name} is no arrangement of rows")
    return replace(key, shape=(key.shape[0], *own))


def _taller(tensor: torch.Tensor, times: int) -> torch.Tensor:
    """Each row several times."""
    return tensor if times == 1 or not tensor.dim() else tensor.repeat_interleave(times, 0)


def _shorter(name: str, tensor: torch.Tensor, times: int) -> torch.Tensor:
    """The inverse of `_taller`.

    Raises:
        ValueError: the rows that one became were torn apart: their number is not what the converter takes for granted.
    """
    if times == 1 or not tensor.dim():
        return tensor
    if len(tensor) % times or not torch.equal(tensor, tensor[::times].repeat_interleave(times, 0)):
        raise ValueError(f"{name} has another number of rows")
    return tensor[::times]
