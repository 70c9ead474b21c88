"""Inputs of the classes of diffusers: by the name of the argument, and for each class what its own names mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .facts import FRAMES, PLACES, WORDS, Facts, Rule, Untold, floats, grid, ids, ones, turns, whole

ROWS, COLUMNS = 2, 3
"""Of the grid of an image that is given as a row of tokens."""
TOKENS = ROWS * COLUMNS

_TEXT_WIDTHS = [
    "joint_attention_dim",
    "text_embed_dim",
    "caption_channels",
    "text_dim",
    "cap_feat_dim",
    "context_in_dim",
    "text_in_dim",
    "cross_attention_input_dim",
    "in_text_dim",
    "llm_features_dim",
    "condition_dim",
    "cond_token_dim",
    "dit_text_dim",
    "crossattn_proj_in_channels",
    "cross_attention_dim",
    "encoder_hid_dim",
]


def _image(facts: Facts, channels: int) -> Tensor:
    _, height, width = facts.patch
    return floats(1, channels, PLACES * height, PLACES * width)


def _video(facts: Facts, channels: int, frames: int = FRAMES) -> Tensor:
    time, height, width = facts.patch
    return floats(1, channels, frames * time, PLACES * height, PLACES * width)


def _latents(facts: Facts) -> Tensor:
    channels = facts.number("in_channels", "in_visual_dim", "in_dim")
    if {"img_ids", "img_shapes", "position_ids"} & facts.arguments.keys():
        return floats(1, TOKENS, channels)
    if "3D" in facts.name or "Video" in facts.name:
        return _video(facts, channels)
    return _image(facts, channels)


def _side(facts: Facts) -> int:
    """So that two places are left along each side after all that makes an image smaller."""
    levels = facts.get("block_out_channels", "dim_mult", "ch_mult", default=())
    return 2 ** max(len(levels), 2)


def _scaled(facts: Facts, channels: int) -> Tensor:
    """What a network of convolutions sees; a video where they are of three dimensions."""
    side = _side(facts)
    if any(isinstance(module, nn.Conv3d) for module in facts.model.modules()):
        return floats(1, channels, 1 + 4 * (FRAMES - 1), side, side)
    return floats(1, channels, side, side)


def _added(facts: Facts) -> dict[str, Tensor] | None:
    """The sizes and the pooled text of SDXL's U-Net, or the picture of one with image prompts."""
    if facts.get("addition_embed_type") != "text_time":
        return None
    sizes = 6
    pooled = facts.number("projection_class_embeddings_input_dim") - sizes * facts.number(
        "addition_time_embed_dim"
    )
    return {"text_embeds": floats(1, pooled), "time_ids": torch.full((1, sizes), 8.0)}


def _control(facts: Facts) -> Tensor:
    """A picture of `ControlNetModel`, or latents as a transformer's own."""
    if "hidden_states" in facts.arguments:
        extra = facts.get("extra_conditioning_channels", default=0)
        latents = _latents(facts)
        return latents if latents.ndim == 3 else floats(1, latents.shape[1] + extra, *latents.shape[2:])
    finer = 2 ** (len(facts.get("conditioning_embedding_out_channels", default=(0,) * 4)) - 1)
    return floats(1, facts.get("conditioning_channels", default=3), *[finer * _side(facts)] * 2)


def _text(facts: Facts, *keys: str, words: int = WORDS) -> Tensor:
    return floats(1, words, facts.number(*(keys or _TEXT_WIDTHS)))


def _time(facts: Facts) -> Tensor:
    told = str(facts.arguments["timestep"].annotation) if "timestep" in facts.arguments else "LongTensor"
    return whole([7]) if "LongTensor" in told else torch.rand(1)


def _axes(facts: Facts) -> int:
    return len(facts.get("axes_dims_rope", default=(0, 0, 0)))


def _image_ids(facts: Facts) -> Tensor:
    places = grid(ROWS, COLUMNS).to(torch.get_default_dtype())
    # Frame, row, column, and what further axes there are; on the device of the coordinates.
    return functional.pad(places, (1, max(0, _axes(facts) - 3)))


def _guidance(facts: Facts) -> Tensor | None:
    return torch.full((1,), 3.5) if facts.get("guidance_embeds") else None


def _sizes(facts: Facts) -> Tensor:
    return torch.full((1, 2), 8.0)


def _two_masks(facts: Facts) -> Tensor:
    return ones(1, WORDS)


def _wan_text(facts: Facts) -> Tensor:
    """With pictures before them the texts have 512 words: Wan's code tells both apart by that number."""
    return _text(facts, words=512 if facts.get("image_dim") else WORDS)


def _wan_pictures(facts: Facts) -> Tensor | None:
    """One picture, or the first and the last, whose places have an embedding each."""
    if not facts.get("image_dim"):
        return None
    places = facts.get("pos_embed_seq_len")
    return floats(2 if places else 1, places // 2 if places else 4, facts.number("image_dim"))


_WAN_PICTURES: dict[str, Rule] = {
    "encoder_hidden_states": _wan_text,
    "encoder_hidden_states_image": _wan_pictures,
}

_GENERAL: dict[str, Rule] = {
    "hidden_states": _latents,
    "sample": lambda f: _scaled(f, f.get("in_channels", "input_channels", default=3)),
    "timestep": _time,
    "added_cond_kwargs": lambda f: _added(f),
    "controlnet_cond": lambda f: _control(f),
    "r_timestep": lambda f: torch.zeros(1),
    "encoder_hidden_states": _text,
    "encoder_attention_mask": lambda f: ones(1, WORDS),
    "encoder_hidden_states_mask": lambda f: ones(1, WORDS, dtype=torch.bool),
    "encoder_hidden_states_image": lambda f: floats(1, 4, f.number("image_dim")),
    "pooled_projections": lambda f: (
        floats(1, f.get("pooled_projection_dim", "in_text_dim2"))
        if f.get("pooled_projection_dim", "in_text_dim2")
        else None
    ),
    "img_ids": _image_ids,
    "txt_ids": lambda f: torch.zeros(WORDS, _axes(f)),
    "img_shapes": lambda f: [[(1, ROWS, COLUMNS)]],
    "guidance": _guidance,
    "original_size": _sizes,
    "target_size": _sizes,
    "crop_coords": lambda f: torch.zeros(1, 2),
    "class_labels": lambda f: whole([1]) if f.get("num_embeds_ada_norm", "num_class_embeds") else None,
}
"""By the name of an argument: what most classes mean by it. None leaves it out."""

_NOT_NEEDED = frozenset(
    ["encoder_attention_mask", "encoder_hidden_states_mask", "encoder_hidden_states_image", "class_labels"]
)
"""Arguments that are left out wherever a class has a default for them."""


def _rows(facts: Facts) -> int:
    """Tokens of an image of `PLACES` x `PLACES` patches."""
    return PLACES * PLACES


def _sample_first(facts: Facts) -> Tensor:
    """[1, frames, channels, height, width]."""
    return _video(facts, facts.number("in_channels")).transpose(1, 2).contiguous()


def _channels_last(facts: Facts) -> Tensor:
    """[1, frames, height, width, channels]."""
    channels = facts.number("in_visual_dim") * (2 if facts.get("visual_cond") else 1)
    channels += 1 if facts.get("visual_cond") else 0
    return _video(facts, channels).permute(0, 2, 3, 4, 1).contiguous()


def _additional_conditions(facts: Facts) -> dict[str, Tensor | None]:
    if getattr(facts.model, "use_additional_conditions", False):
        return {"resolution": floats(1, 2), "aspect_ratio": floats(1, 1)}
    return {"resolution": None, "aspect_ratio": None}


def _either(facts: Facts) -> Tensor:
    """Latents, or classes of them, of the three kinds of `Transformer2DModel`."""
    if facts.get("num_vector_embeds"):
        return ids(facts.number("sample_size") ** 2, facts.number("num_vector_embeds"))
    return _image(facts, facts.number("in_channels"))


def _head(facts: Facts) -> int:
    heads = facts.number("num_attention_heads", "n_heads", "num_heads")
    return facts.get("attention_head_dim") or facts.number("hidden_size", "dim") // heads


def _complex_turns(facts: Facts) -> Tensor:
    angles = torch.rand(2 * PLACES, 2 * PLACES, _head(facts) // 2)
    return torch.polar(torch.ones_like(angles), angles)


def _allegro_turns(facts: Facts) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    places = grid(FRAMES, PLACES, PLACES)
    turned = tuple(turns(n, _head(facts) // 3) for n in (FRAMES, PLACES, PLACES))
    return turned, tuple(places[:, None, k].T.contiguous() for k in range(3))


def _clips(facts: Facts, frames: int) -> Tensor:
    return _video(facts, facts.number("in_channels"), frames)


def _video_tokens(facts: Facts, channels: str = "in_channels") -> Tensor:
    return floats(1, FRAMES * ROWS * COLUMNS, facts.number(channels))


def _omni_length(facts: Facts) -> int:
    return WORDS + FRAMES * ROWS * ROWS


def _omni_latents(facts: Facts) -> list[Tensor]:
    side = ROWS * facts.number("latent_patch_size")
    return [floats(1, facts.number("latent_channel"), FRAMES, side, side)]


def _upto(start: int, stop: int) -> Tensor:
    return whole(range(start, stop))


def _packed_tags(facts: Facts) -> Tensor:
    """One tag for each of words, places of the video, and sounds."""
    return whole([0] * WORDS + [1] * TOKENS + [2] * 2)


def _many_texts(facts: Facts, count: int, width: str) -> list[Tensor]:
    return [floats(1, WORDS, facts.number(width)) for _ in range(count)]


def _layers(facts: Facts) -> int:
    return facts.number("num_layers") + facts.number("num_single_layers")


def _captions(facts: Facts, which: int) -> int:
    widths = facts.get("caption_channels")
    if not isinstance(widths, list | tuple):
        raise Untold("no list of widths as 'caption_channels'")
    return int(widths[which])


def _llama(facts: Facts) -> Tensor:
    count = max(facts.get("llama_layers", default=range(_layers(facts)))) + 1
    return floats(count, 1, WORDS, _captions(facts, 1))


def _tokens_with(facts: Facts, *parts: int) -> Tensor:
    """[0, 1, ...] positions in three axes for so many tokens."""
    return whole(range(sum(parts)))[:, None].expand(-1, 3).clone()


def _face(facts: Facts) -> Tensor:
    side = facts.number("motion_encoder_size")
    return floats(1, 3, 4 * (FRAMES - 1) + 1 - 1, side, side)


def _pixels_of(facts: Facts) -> int:
    return PLACES * facts.patch[1]


def _wide(facts: Facts, *keys: str, length: int = TOKENS) -> Tensor:
    """[1, channels, length]."""
    return floats(1, facts.number(*keys), length)


_ATOM_CONDITIONS = ["hbond", "pistack", "pication", "saltbridge", "hydrophobic", "metal-coord"]

_OWN: dict[str, dict[str, Rule]] = {
    "AceStepTransformer1DModel": {
        "hidden_states": lambda f: floats(1, TOKENS, f.number("audio_acoustic_hidden_dim")),
        "context_latents": lambda f: floats(
            1, TOKENS, f.number("in_channels") - f.number("audio_acoustic_hidden_dim")
        ),
        "timestep_r": lambda f: torch.zeros(1),
        "encoder_hidden_states": lambda f: _text(f, "encoder_hidden_size", "hidden_size"),
    },
    "AllegroTransformer3DModel": {
        "encoder_hidden_states": lambda f: floats(1, 1, WORDS, f.number("caption_channels")),
        "image_rotary_emb": _allegro_turns,
    },
    "AnyFlowFARTransformer3DModel": {
        "hidden_states": _sample_first,
        "timestep": lambda f: torch.rand(1, FRAMES),
        "r_timestep": lambda f: torch.zeros(1, FRAMES),
        "chunk_partition": lambda f: [1] * FRAMES,
    },
    "AnyFlowTransformer3DModel": {
        "hidden_states": _sample_first,
        "timestep": lambda f: torch.rand(1, FRAMES),
        "r_timestep": lambda f: torch.zeros(1, FRAMES),
    },
    "BriaFiboTransformer2DModel": {
        "text_encoder_layers": lambda f: _many_texts(f, _layers(f), "text_encoder_dim"),
    },
    "BriaFibo2Transformer2DModel": {
        "encoder_hidden_states": lambda f: floats(
            1, 1 + len(f.get("injection_layer_ids")), WORDS, f.number("cap_feat_dim")
        ),
    },
    "CogVideoXTransformer3DModel": {
        "hidden_states": _sample_first,
        "encoder_hidden_states": lambda f: _text(f, words=f.number("max_text_seq_length")),
        "ofs": lambda f: torch.full((1,), 2.0) if f.get("ofs_embed_dim") else None,
    },
    "ConsisIDTransformer3DModel": {
        "hidden_states": _sample_first,
        "encoder_hidden_states": lambda f: _text(f, words=f.number("max_text_seq_length")),
        "id_cond": lambda f: floats(1, f.number("LFE_id_dim")) if f.get("is_train_face") else None,
        "id_vit_hidden": lambda f: (
            [floats(1, 4, f.number("LFE_vit_dim")) for _ in range(f.number("LFE_num_scale"))]
            if f.get("is_train_face")
            else None
        ),
    },
    "Cosmos3OmniTransformer": {
        "input_ids": lambda f: ids(WORDS, f.number("vocab_size"))[0],
        "text_indexes": lambda f: _upto(0, WORDS),
        "position_ids": lambda f: whole(range(_omni_length(f)))[None].expand(3, -1).clone(),
        "und_len": lambda f: WORDS,
        "sequence_length": _omni_length,
        "vision_tokens": _omni_latents,
        "vision_token_shapes": lambda f: [(FRAMES, ROWS, ROWS)],
        "vision_sequence_indexes": lambda f: _upto(WORDS, _omni_length(f)),
        "vision_mse_loss_indexes": lambda f: _upto(WORDS, _omni_length(f)),
        "vision_timesteps": lambda f: torch.full((FRAMES * ROWS * ROWS,), 7.0),
        "vision_noisy_frame_indexes": lambda f: [_upto(0, FRAMES)],
    },
    "CosmosTransformer3DModel": {
        "encoder_hidden_states": lambda f: (
            _text(f, "crossattn_proj_in_channels", "text_embed_dim")
            if f.get("use_crossattn_projection")
            else _text(f, "text_embed_dim")
        ),
        "padding_mask": lambda f: (
            torch.zeros(1, 1, _pixels_of(f), _pixels_of(f)) if f.get("concat_padding_mask") else None
        ),
    },
    "DiTTransformer2DModel": {"class_labels": lambda f: whole([1])},
    "DreamLiteTransformer2DModel": {"timestep": lambda f: None},
    "ErnieImageTransformer2DModel": {
        "text_bth": lambda f: _text(f, "text_in_dim"),
        "text_lens": lambda f: whole([WORDS]),
    },
    "GlmImageTransformer2DModel": {
        "prior_token_id": lambda f: ids(_rows(f), f.number("prior_vq_quantizer_codebook_size")),
        "prior_token_drop": lambda f: whole([[False] * _rows(f)], torch.bool),
    },
    "Flux3Transformer2DModel": {
        "image_cond_hidden_states": lambda f: floats(1, TOKENS, f.number("cond_in_channels")),
        "image_cond_ids": _image_ids,
        "target_timestep": lambda f: torch.rand(1) if f.get("flow_map") else None,
    },
    "HeliosTransformer3DModel": {
        "indices_hidden_states": lambda f: _upto(0, FRAMES)[None],
        **{
            f"{prefix}latents_history_{name}": rule
            for name, frames in {"short": 2, "mid": 2, "long": 4}.items()
            for prefix, rule in {
                "": lambda f, n=frames: _clips(f, n) if f.get("has_multi_term_memory_patch") else None,
                "indices_": lambda f, n=frames: (
                    _upto(0, n)[None] if f.get("has_multi_term_memory_patch") else None
                ),
            }.items()
        },
    },
    "HiDreamImageTransformer2DModel": {
        "hidden_states": lambda f: _image(f, f.number("in_channels")),
        "timesteps": lambda f: whole([7]),
        "encoder_hidden_states_t5": lambda f: floats(1, WORDS, _captions(f, 0)),
        "encoder_hidden_states_llama3": _llama,
        "pooled_embeds": lambda f: floats(1, f.number("text_emb_dim")),
        "img_ids": lambda f: None,
    },
    "HunyuanDiT2DModel": {
        "timestep": lambda f: torch.full((1,), 7.0),
        "encoder_hidden_states": lambda f: _text(f, "cross_attention_dim", words=f.number("text_len")),
        "encoder_hidden_states_t5": lambda f: _text(
            f, "cross_attention_dim_t5", words=f.number("text_len_t5")
        ),
        "text_embedding_mask": lambda f: ones(1, f.number("text_len")),
        "text_embedding_mask_t5": lambda f: ones(1, f.number("text_len_t5")),
        "image_meta_size": lambda f: torch.full((1, 6), 8.0),
        "style": lambda f: whole([0]),
        "image_rotary_emb": lambda f: turns(_rows(f), _head(f)),
    },
    "HunyuanImageTransformer2DModel": {
        "hidden_states": lambda f: (
            _image(f, f.number("in_channels"))
            if len(f.get("patch_size")) == 2
            else _video(f, f.number("in_channels"))
        ),
        "encoder_hidden_states_2": lambda f: (
            _text(f, "text_embed_2_dim") if f.get("text_embed_2_dim") else None
        ),
        "encoder_attention_mask_2": lambda f: ones(1, WORDS) if f.get("text_embed_2_dim") else None,
        "timestep": lambda f: torch.full((1,), 7.0),
        "timestep_r": lambda f: torch.full((1,), 3.0) if f.get("use_meanflow") else None,
    },
    "HunyuanVideo15Transformer3DModel": {
        "timestep": lambda f: torch.full((1,), 7.0),
        "encoder_hidden_states_2": lambda f: _text(f, "text_embed_2_dim"),
        "encoder_attention_mask_2": lambda f: ones(1, WORDS),
        # The class asks whether the picture is all zeros, which it may be told only of one without places.
        "image_embeds": lambda f: _text(f, "image_embed_dim", words=0),
    },
    "HunyuanVideoFramepackTransformer3DModel": {
        "image_embeds": lambda f: _text(f, "image_proj_dim"),
        "indices_latents": lambda f: _upto(0, FRAMES),
        "latents_clean": lambda f: _clips(f, 1),
        "indices_latents_clean": lambda f: _upto(0, 1),
        "latents_history_2x": lambda f: _clips(f, 2),
        "indices_latents_history_2x": lambda f: _upto(0, 2),
        "latents_history_4x": lambda f: _clips(f, 4),
        "indices_latents_history_4x": lambda f: _upto(0, 4),
    },
    "Ideogram4Transformer2DModel": {
        "hidden_states": lambda f: floats(1, WORDS + TOKENS, f.number("in_channels")),
        "encoder_hidden_states": lambda f: floats(1, WORDS + TOKENS, f.number("llm_features_dim")),
        "position_ids": lambda f: _tokens_with(f, WORDS, TOKENS)[None],
        "segment_ids": lambda f: ones(1, WORDS + TOKENS),
        "indicator": lambda f: whole([[3] * WORDS + [2] * TOKENS]),  # text, then an image
    },
    "JoyImageEditTransformer3DModel": {"timestep": lambda f: whole([7])},
    "JoyImageEditPlusTransformer3DModel": {
        "hidden_states": lambda f: floats(1, TOKENS, f.number("in_channels"), *f.patch),
        "timestep": lambda f: whole([7]),
        "shape_list": lambda f: [[(1, ROWS, COLUMNS)]],
    },
    "Kandinsky5Transformer3DModel": {
        "hidden_states": _channels_last,
        "visual_rope_pos": lambda f: tuple(_upto(0, n) for n in (FRAMES, PLACES, PLACES)),
        "text_rope_pos": lambda f: _upto(0, WORDS),
    },
    "Kandinsky6Transformer3DModel": {
        "hidden_states": _channels_last,
        "audio_hidden_states": lambda f: floats(1, 4, f.number("in_audio_dim")),
    },
    "Kandinsky6SRTransformer3DModel": {
        "hidden_states": lambda f: floats(1, 1, 8, 8, 2 * f.number("in_visual_dim") + 1),
    },
    "Krea2Transformer2DModel": {
        "encoder_hidden_states": lambda f: floats(
            1, WORDS, f.number("num_text_layers"), f.number("text_hidden_dim")
        ),
        "position_ids": lambda f: _tokens_with(f, WORDS, TOKENS),
    },
    "LTXVideoTransformer3DModel": {
        "hidden_states": _video_tokens,
        "num_frames": lambda f: FRAMES,
        "height": lambda f: ROWS,
        "width": lambda f: COLUMNS,
    },
    "LTX2VideoTransformer3DModel": {
        "hidden_states": _video_tokens,
        "audio_hidden_states": lambda f: floats(1, 4, f.number("audio_in_channels")),
        "audio_encoder_hidden_states": _text,
        "num_frames": lambda f: FRAMES,
        "height": lambda f: ROWS,
        "width": lambda f: COLUMNS,
        "audio_num_frames": lambda f: 4,
    },
    "LongCatAudioDiTTransformer": {
        "hidden_states": lambda f: floats(1, TOKENS, f.number("latent_dim")),
        "encoder_attention_mask": lambda f: ones(1, WORDS, dtype=torch.bool),
        "latent_cond": lambda f: (
            floats(1, TOKENS, f.number("latent_dim")) if f.get("use_latent_condition") else None
        ),
    },
    "LuminaNextDiT2DModel": {
        "encoder_hidden_states": lambda f: _text(f, "cross_attention_dim"),
        "encoder_mask": lambda f: ones(1, WORDS),
        "cross_attention_kwargs": lambda f: {},
        "image_rotary_emb": _complex_turns,
    },
    "MiniMaxH3Transformer3DModel": {
        "hidden_states": lambda f: floats(1, TOKENS, f.number("in_channels") * f.patch[1] * f.patch[2]),
        "audio_hidden_states": lambda f: floats(1, 2, f.number("audio_in_channels")),
        "timestep": lambda f: torch.rand(1),
        "timestep_indices": lambda f: whole([0] * (WORDS + TOKENS + 2)),
        "token_tags": _packed_tags,
        "position_ids": lambda f: _tokens_with(f, WORDS, TOKENS, 2),
        "text_indices": lambda f: _upto(0, WORDS),
        "video_indices": lambda f: _upto(WORDS, WORDS + TOKENS),
        "audio_indices": lambda f: _upto(WORDS + TOKENS, WORDS + TOKENS + 2),
    },
    "MiniMaxMusic3RVQDepthDecoder": {
        "inputs_embeds": lambda f: floats(1, f.number("num_codebooks"), f.number("hidden_size")),
    },
    "MiniMaxMusic3Transformer1DModel": {
        "hidden_states": lambda f: floats(1, TOKENS, f.number("in_channels")),
        "encoder_hidden_states": lambda f: floats(1, TOKENS, f.number("condition_dim")),
    },
    "NucleusMoEImageTransformer2DModel": {"img_shapes": lambda f: [(1, ROWS, COLUMNS)]},
    "OmniGenTransformer2DModel": {
        "hidden_states": lambda f: _image(f, f.number("in_channels")),
        "timestep": lambda f: torch.rand(1),
        "input_ids": lambda f: ids(WORDS, f.number("vocab_size")),
        "input_img_latents": lambda f: [],
        "input_image_sizes": lambda f: {},
        "attention_mask": lambda f: ones(1, WORDS + 1 + _rows(f), WORDS + 1 + _rows(f)),
        "position_ids": lambda f: _upto(0, WORDS + 1 + _rows(f))[None],
    },
    "QwenImageControlNetModel": {"controlnet_cond": lambda f: floats(1, TOKENS, f.number("in_channels"))},
    "PixArtTransformer2DModel": {"added_cond_kwargs": _additional_conditions},
    "PriorTransformer": {
        "hidden_states": lambda f: floats(1, f.number("embedding_dim")),
        "timestep": lambda f: whole([7]),
        "proj_embedding": lambda f: floats(1, f.number("embedding_proj_dim", "embedding_dim")),
        "encoder_hidden_states": lambda f: (
            floats(1, f.number("num_embeddings"), f.number("embedding_dim"))
            if f.get("encoder_hid_proj_type")
            else None
        ),
    },
    "QwenImage21Transformer2DModel": {
        "hidden_states": lambda f: floats(1, 4, f.number("in_channels")),
        "img_shapes": lambda f: [[(1, 2, 2)]],
        "img_mask": lambda f: whole([[False] * WORDS + [True]], torch.bool),
    },
    "RFD4ProteinaTransformer": {
        "bb_ca": lambda f: floats(1, TOKENS, 3),
        "local_latents": lambda f: floats(1, TOKENS, f.number("latent_dim")),
        "bb_ca_time": lambda f: torch.rand(1),
        "local_latents_time": lambda f: torch.rand(1),
        "padding_mask": lambda f: ones(1, TOKENS, dtype=torch.bool),
        "token_type": lambda f: ids(TOKENS, f.number("num_token_types"), 0),
        "atom37_mask": lambda f: ones(1, TOKENS, 37, dtype=torch.bool),
        "conditioning": lambda f: {
            "is_in_context_conditioning": whole([[False] * TOKENS], torch.bool),
            "supports_local_latent": ones(1, TOKENS, dtype=torch.bool),
            **{f"condition_{name}_1_atom": ones(1, TOKENS, 37) for name in _ATOM_CONDITIONS},
            **dict.fromkeys(("charge", "element"), ones(1, TOKENS, 37)),
            "condition_secondary-structure_1_residue": ones(1, TOKENS),
            "condition_index-group_1_token": ones(1, TOKENS),
            **dict.fromkeys(("molecule_iid", "molecule_entity_id"), ones(1, TOKENS)),
            "token_bond_path_length": ones(1, TOKENS, TOKENS),
        },
    },
    "SanaWMLTX2RefinerTransformer3DModel": {
        "hidden_states": _video_tokens,
        "video_rotary_emb": lambda f: turns(
            1, FRAMES * ROWS * COLUMNS, f.number("num_attention_heads") * f.number("attention_head_dim")
        ),
    },
    "SanaWMTransformer3DModel": {
        "timestep": lambda f: torch.full((1, 1, FRAMES), 7.0),
        "encoder_hidden_states": lambda f: floats(1, 1, WORDS, f.number("caption_channels")),
        "encoder_attention_mask": lambda f: ones(1, 1, 1, WORDS),
    },
    "StableAudio3DiTModel": {
        "hidden_states": lambda f: _wide(f, "io_channels"),
        "global_hidden_states": lambda f: floats(1, f.number("global_cond_dim")),
        "local_add_cond": lambda f: _wide(f, "local_add_cond_dim"),
    },
    "StableAudioDiTModel": {
        "hidden_states": lambda f: _wide(f, "in_channels"),
        "global_hidden_states": lambda f: floats(1, 1, f.number("global_states_input_dim")),
        "rotary_embedding": lambda f: turns(TOKENS + 1, f.number("attention_head_dim") // 2),
    },
    "T5FilmDecoder": {
        "encodings_and_masks": lambda f: [(_text(f, "d_model"), torch.ones(1, WORDS))],
        "decoder_input_tokens": lambda f: floats(1, f.number("targets_length"), f.number("input_dims")),
        "decoder_noise_time": lambda f: torch.rand(1),
    },
    "Transformer2DModel": {
        "hidden_states": _either,
        "timestep": lambda f: whole([7]) if f.get("num_embeds_ada_norm") else None,
        "encoder_hidden_states": lambda f: (
            _text(f, "caption_channels", "cross_attention_dim") if f.get("cross_attention_dim") else None
        ),
        "class_labels": lambda f: whole([1]) if f.get("num_embeds_ada_norm") else None,
        "added_cond_kwargs": _additional_conditions,
    },
    "TransformerTemporalModel": {
        "hidden_states": lambda f: floats(FRAMES, f.number("in_channels"), 2, 2),
        "encoder_hidden_states": lambda f: (
            floats(4, WORDS, f.number("cross_attention_dim")) if f.get("cross_attention_dim") else None
        ),
        "timestep": lambda f: None,
        "num_frames": lambda f: FRAMES,
    },
    "WanAnimateTransformer3DModel": {
        "pose_hidden_states": lambda f: _video(f, f.number("latent_channels"), FRAMES - 1),
        "face_pixel_values": _face,
        **_WAN_PICTURES,
    },
    "WanAnimate2Transformer3DModel": {
        "hidden_states": lambda f: [_video(f, f.number("out_dim"))[0]],
        "timestep": lambda f: torch.full((1,), 7.0),
        "encoder_hidden_states": lambda f: [floats(WORDS, f.number("text_dim"))],
        "condition_latents": lambda f: [_video(f, f.number("in_dim") - f.number("out_dim"))[0]],
        "kv_cache": lambda f: _wan_cache(f),
        "kv_cache_mode": lambda f: "extract",
        "seq_len": lambda f: FRAMES * PLACES * PLACES,
        "offset_grid_sizes": lambda f: whole([[FRAMES, PLACES, PLACES]]),
        "encoder_hidden_states_image": lambda f: floats(1, 257, 1280) if f.get("use_img_emb") else None,
    },
    "WanTransformer3DModel": _WAN_PICTURES,
    "ChronoEditTransformer3DModel": _WAN_PICTURES,
    "SkyReelsV2Transformer3DModel": _WAN_PICTURES,
    "WanVACETransformer3DModel": {
        "control_hidden_states": lambda f: _video(f, f.number("vace_in_channels")),
    },
    "ZImageTransformer2DModel": {
        "x": lambda f: [floats(f.number("in_channels"), 1, 2 * PLACES, 2 * PLACES)],
        "t": lambda f: torch.rand(1),
        "cap_feats": lambda f: [floats(WORDS, f.number("cap_feat_dim"))],
    },
}
"""By class: what it means by its own arguments, or by one of the others."""


def _wan_cache(facts: Facts) -> Any:
    import diffusers.models.transformers.transformer_wan_animate_2 as module

    return module.WanAnimate2KVCache(facts.number("num_layers"))


def rules(facts: Facts) -> Callable[[str], Rule | None]:
    """The rule of each argument of this model's forward pass."""
    own: dict[str, Rule] = {}
    for cls in reversed(type(facts.model).__mro__):
        own |= _OWN.get(cls.__name__, {})

    def rule(argument: str) -> Rule | None:
        if argument in own:
            return own[argument]
        optional = facts.arguments[argument].default is not facts.arguments[argument].empty
        return None if optional and argument in _NOT_NEEDED else _GENERAL.get(argument)

    return rule
