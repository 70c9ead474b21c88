"""Every transformer class of diffusers and the usual classes of transformers, by class name, as small configurations.

The inputs are made by `rebasin.checkpoints.classes.example`. Those in `PUBLISHED` are measured with the defaults of
their library, a published size for most; the others have no defaults that can be built, or take too long to trace:
for these the table's parameters are those of the small configuration.
"""

# Configs are dicts with keys of many types.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

from torch import nn

Config = dict[str, Any]

_WAN: Config = dict(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12, freq_dim=8,
    ffn_dim=20, num_layers=2, rope_max_seq_len=16,
)  # fmt: skip
_FLUX: Config = dict(
    in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=24, axes_dims_rope=(4, 4, 8),
)  # fmt: skip
_DIT: Config = dict(num_attention_heads=2, attention_head_dim=8, num_layers=2, in_channels=4, patch_size=2)
_HUNYUAN: Config = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=2, num_single_layers=2,
    num_refiner_layers=1, text_embed_dim=12, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
)  # fmt: skip
_LTX2: Config = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
    audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=8,
    audio_cross_attention_dim=16, num_layers=2, caption_channels=12,
)  # fmt: skip

DIFFUSERS: dict[str, Config] = {
    "AceStepTransformer1DModel": dict(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, in_channels=12, audio_acoustic_hidden_dim=4, sliding_window=4, encoder_hidden_size=24,
    ),
    "AuraFlowTransformer2DModel": dict(
        sample_size=8, num_mmdit_layers=2, num_single_dit_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pos_embed_max_size=16,
    ),
    "CogVideoXTransformer3DModel": dict(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=12, num_layers=2, sample_width=8, sample_height=8, sample_frames=5, max_text_seq_length=5,
    ),
    "ConsisIDTransformer3DModel": dict(
        num_attention_heads=3, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=12, num_layers=2, sample_width=8, sample_height=8, sample_frames=5, max_text_seq_length=5,
        is_train_face=True, cross_attn_interval=1, cross_attn_dim_head=8, cross_attn_num_heads=2, LFE_id_dim=12,
        LFE_vit_dim=10, LFE_depth=5, LFE_dim_head=8, LFE_num_heads=2, LFE_num_id_token=2, LFE_num_querie=3,
        LFE_output_dim=32, LFE_ff_mult=2, LFE_num_scale=5,
    ),
    "DiTTransformer2DModel": dict(**_DIT, sample_size=8, num_embeds_ada_norm=10),
    "HunyuanDiT2DModel": dict(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8, hidden_size=16,
        num_layers=4, cross_attention_dim=12, cross_attention_dim_t5=16, pooled_projection_dim=8, text_len=5,
        text_len_t5=6,
    ),
    "LatteTransformer3DModel": dict(
        **_DIT, out_channels=8, cross_attention_dim=16, attention_bias=True, sample_size=8, num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, caption_channels=12, video_length=2,
        activation_fn="gelu-approximate",
    ),
    "LuminaNextDiT2DModel": dict(
        sample_size=8, hidden_size=32, num_layers=2, num_attention_heads=4, num_kv_heads=2, multiple_of=8,
        cross_attention_dim=12,
    ),
    "MiniMaxMusic3RVQDepthDecoder": dict(
        hidden_size=16, num_layers=2, num_attention_heads=2, intermediate_size=24, audio_vocab_size=20,
        num_codebooks=4, max_position_embeddings=8,
    ),
    "PixArtTransformer2DModel": dict(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, out_channels=8, sample_size=8, caption_channels=12,
        cross_attention_dim=24, use_additional_conditions=True,
    ),
    "PriorTransformer": dict(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=12, num_embeddings=5,
        additional_embeddings=4,
    ),
    "SanaTransformer2DModel": dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12,
        sample_size=4,
    ),
    "StableAudioDiTModel": dict(
        sample_size=6, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        num_key_value_attention_heads=2, out_channels=4, cross_attention_dim=16, time_proj_dim=8,
        global_states_input_dim=12, cross_attention_input_dim=10,
    ),
    "T5FilmDecoder": dict(input_dims=6, targets_length=8, d_model=16, num_layers=2, num_heads=2, d_kv=8, d_ff=24),
    "Transformer2DModel": dict(
        num_attention_heads=2, attention_head_dim=8, in_channels=16, num_layers=2, norm_num_groups=4,
        cross_attention_dim=12,
    ),
    "DreamLiteTransformer2DModel": dict(
        num_attention_heads=2, attention_head_dim=8, in_channels=16, num_layers=2, norm_num_groups=4,
        cross_attention_dim=12,
    ),
    "AllegroTransformer3DModel": dict(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=2,
        cross_attention_dim=24, sample_height=8, sample_width=8, sample_frames=2, caption_channels=12,
    ),
    "AnyFlowTransformer3DModel": _WAN,
    "AnyFlowFARTransformer3DModel": {**_WAN, "chunk_partition": (1, 1), "attention_head_dim": 24},
    "BriaTransformer2DModel": {**_FLUX, "axes_dims_rope": [4, 4, 8]},
    "BriaFiboTransformer2DModel": {**_FLUX, "axes_dims_rope": [4, 4, 8], "text_encoder_dim": 10},
    "BriaFibo2Transformer2DModel": dict(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=12, injection_layer_ids=(1,),
        perceiver_num_layers=1, min_num_gist_tokens=4, max_num_gist_tokens=8, gist_step=2, gist_min_text_len=4,
        gist_max_text_len=16, axes_dims=(4, 6, 6), axes_lens=(64, 16, 16),
    ),
    "ChromaTransformer2DModel": dict(
        **_FLUX, approximator_num_channels=8, approximator_hidden_dim=12, approximator_layers=2
    ),
    "ChronoEditTransformer3DModel": _WAN,
    "CogView3PlusTransformer2DModel": dict(
        in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, out_channels=4, text_embed_dim=12,
        time_embed_dim=8, condition_dim=4, pos_embed_max_size=8, sample_size=8,
    ),
    "CogView4Transformer2DModel": dict(
        in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, out_channels=4, text_embed_dim=12,
        time_embed_dim=8, condition_dim=4, pos_embed_max_size=8, sample_size=8, rope_axes_dim=(16, 16),
    ),
    "CosmosTransformer3DModel": dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2, mlp_ratio=2,
        text_embed_dim=12, adaln_lora_dim=6, max_size=(4, 16, 16), concat_padding_mask=False,
    ),
    "Cosmos3OmniTransformer": dict(
        head_dim=16, hidden_size=32, intermediate_size=40, latent_channel=4, num_attention_heads=4,
        num_hidden_layers=2, num_key_value_heads=2, patch_latent_dim=16, vocab_size=40, dtype="float32",
        rope_axes_dim=(4, 2, 2),
    ),
    "EasyAnimateTransformer3DModel": dict(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2, sample_width=8,
        sample_height=8, num_layers=2, mmdit_layers=1, time_embed_dim=8, text_embed_dim=12,
    ),
    "ErnieImageTransformer2DModel": dict(
        hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=40, in_channels=8, out_channels=8,
        text_in_dim=12, rope_axes_dim=(4, 6, 6),
    ),
    "FluxTransformer2DModel": dict(**_FLUX, pooled_projection_dim=16, guidance_embeds=True),
    "Flux2Transformer2DModel": {**_FLUX, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 8},
    "Flux3Transformer2DModel": {
        **_FLUX, "axes_dims_rope": (4, 4, 4, 4), "timestep_channels": 8, "cond_in_channels": 8,
    },
    "GlmImageTransformer2DModel": dict(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, text_embed_dim=12,
        time_embed_dim=8, condition_dim=4, prior_vq_quantizer_codebook_size=12,
    ),
    "HeliosTransformer3DModel": {
        **{k: v for k, v in _WAN.items() if k != "rope_max_seq_len"}, "rope_dim": (4, 4, 4),
    },
    "HiDreamImageTransformer2DModel": dict(
        patch_size=2, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        caption_channels=(12, 10), text_emb_dim=14, num_routed_experts=0,
        axes_dims_rope=(4, 2, 2), max_resolution=(8, 8), llama_layers=(0, 1, 1, 0),
    ),
    "HunyuanVideoTransformer3DModel": _HUNYUAN,
    "HunyuanVideo15Transformer3DModel": dict(
        {k: v for k, v in _HUNYUAN.items() if k not in ("num_single_layers", "pooled_projection_dim")},
        text_embed_2_dim=8, image_embed_dim=6,
    ),
    "HunyuanVideoFramepackTransformer3DModel": dict(
        _HUNYUAN, has_image_proj=True, image_proj_dim=6, has_clean_x_embedder=True
    ),
    "HunyuanImageTransformer2DModel": dict(
        {k: v for k, v in _HUNYUAN.items() if k != "pooled_projection_dim"},
        attention_head_dim=8, rope_axes_dim=(4, 4), text_embed_2_dim=8,
    ),
    "Ideogram4Transformer2DModel": dict(
        in_channels=8, num_layers=2, attention_head_dim=16, num_attention_heads=2, intermediate_size=40,
        adaln_dim=12, llm_features_dim=20, mrope_section=(4, 2, 2),
    ),
    "JoyImageEditTransformer3DModel": dict(
        in_channels=4, hidden_size=24, num_attention_heads=2, text_dim=12, num_layers=2, rope_dim_list=[4, 4, 4]
    ),
    "JoyImageEditPlusTransformer3DModel": dict(
        in_channels=4, hidden_size=24, num_attention_heads=2, text_dim=12, num_layers=2, rope_dim_list=[4, 4, 4]
    ),
    "Kandinsky5Transformer3DModel": dict(
        in_visual_dim=4, in_text_dim=12, in_text_dim2=10, time_dim=8, out_visual_dim=4, model_dim=24, ff_dim=40,
        num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 4, 4),
    ),
    "Kandinsky6Transformer3DModel": dict(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=12, in_text_dim2=10, time_dim=8, model_dim=24, ff_dim=40,
        num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 4, 4), in_audio_dim=4, out_audio_dim=4,
        visual_cond=False,
    ),
    "Kandinsky6SRTransformer3DModel": dict(
        in_visual_dim=4, out_visual_dim=4, time_dim=8, model_dim=24, ff_dim=40, num_visual_blocks=2,
        axes_dims=(4, 4, 4),
    ),
    "Krea2Transformer2DModel": dict(
        in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=40, timestep_embed_dim=8, text_hidden_dim=16, num_text_layers=3,
        text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=24,
        num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 2, 2),
    ),
    "LongCatAudioDiTTransformer": dict(dit_dim=16, dit_depth=2, dit_heads=2, dit_text_dim=12, latent_dim=4),
    "LongCatImageTransformer2DModel": {**_FLUX, "pooled_projection_dim": 8, "axes_dims_rope": [4, 4, 8]},
    "LTXVideoTransformer3DModel": dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
        num_layers=2, caption_channels=12,
    ),
    "LTX2VideoTransformer3DModel": _LTX2,
    "Lumina2Transformer2DModel": dict(
        sample_size=8, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=8, axes_dim_rope=(8, 4, 4), axes_lens=(30, 16, 16), cap_feat_dim=12,
    ),
    "MiniMaxH3Transformer3DModel": dict(
        num_attention_heads=2, attention_head_dim=16, hidden_size=24, num_layers=2, num_refiner_layers=1,
        ffn_dim=40, in_channels=4, audio_in_channels=6, text_dim=12, freq_dim=8, time_embed_hidden_dim=12,
        time_embed_dim=10, rope_freq_dim=2,
    ),
    "MiniMaxMusic3Transformer1DModel": dict(
        in_channels=6, condition_dim=12, num_layers=2, num_attention_heads=2, attention_head_dim=8, ff_inner_dim=24,
        rotary_dim=4, fourier_embedding_dim=8,
    ),
    "MochiTransformer3DModel": dict(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, pooled_projection_dim=16, in_channels=4,
        text_embed_dim=16, time_embed_dim=8, max_sequence_length=5,
    ),
    "MotifVideoTransformer3DModel": dict(
        in_channels=5, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
        num_single_layers=2, text_embed_dim=12, rope_axes_dim=(4, 4, 4),
    ),
    "NucleusMoEImageTransformer2DModel": dict(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=4,
        num_key_value_heads=2, joint_attention_dim=12, axes_dims_rope=(4, 4, 8), num_experts=3,
        moe_intermediate_dim=20, capacity_factors=2.0, dense_moe_strategy="leave_first_block_dense",
    ),
    "OmniGenTransformer2DModel": dict(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=4, intermediate_size=40, num_layers=2,
        pad_token_id=0, vocab_size=40, max_position_embeddings=64, original_max_position_embeddings=64,
        pos_embed_max_size=8, time_step_dim=8,
        rope_scaling={"long_factor": [1.0, 1.1, 1.2, 1.3], "short_factor": [1.0, 1.1, 1.2, 1.3]},
    ),
    "OvisImageTransformer2DModel": dict(_FLUX, out_channels=8),
    "PRXTransformer2DModel": dict(
        in_channels=4, context_in_dim=12, hidden_size=24, num_heads=2, depth=2, axes_dim=[6, 6]
    ),
    "QwenImageTransformer2DModel": dict(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(4, 4, 8),
    ),
    "QwenImage21Transformer2DModel": dict(
        in_channels=8, out_channels=8, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        context_in_dim=12, axes_dims_rope=(4, 4, 8),
    ),
    "RFD4ProteinaTransformer": dict(
        nlayers=2, token_dim=16, nheads=2, dim_cond=12, pair_repr_dim=8, latent_dim=4, token_type_emb_dim=4,
        cath_emb_dim=4, t_emb_dim=6, seq_sep_dim=5, xt_pair_dist_dim=6, tri_mult_c=6,
    ),
    "SanaVideoTransformer3DModel": dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=12,
        sample_size=4, rope_max_seq_len=16,
    ),
    "SanaWMTransformer3DModel": dict(
        in_channels=4, num_layers=2, hidden_size=24, num_attention_heads=2, linear_head_dim=12, softmax_every_n=2,
        chunk_plucker_channels=6, chunk_plucker_post_attn_blocks=2, caption_channels=12, image_size=8,
        mixed_precision="fp32",
    ),
    "SanaWMLTX2RefinerTransformer3DModel": _LTX2,
    "SD3Transformer2DModel": dict(
        sample_size=8, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4,
        pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,),
    ),
    "SkyReelsV2Transformer3DModel": _WAN,
    "StableAudio3DiTModel": dict(
        io_channels=4, embed_dim=32, depth=2, num_heads=2, cond_token_dim=12, global_cond_dim=10,
        local_add_cond_dim=5, timestep_features_dim=8, ff_mult=2.0, num_memory_tokens=2,
    ),
    "TransformerTemporalModel": dict(
        num_attention_heads=2, attention_head_dim=8, in_channels=16, num_layers=2, norm_num_groups=4
    ),
    "WanTransformer3DModel": dict(_WAN, image_dim=10, added_kv_proj_dim=24),
    "WanAnimateTransformer3DModel": dict(
        _WAN, in_channels=12, latent_channels=4, image_dim=10, added_kv_proj_dim=24,
        motion_encoder_channel_sizes={"4": 6, "8": 6, "16": 6}, motion_encoder_size=16, motion_style_dim=8,
        motion_dim=4, motion_encoder_dim=8, face_encoder_hidden_dim=8, face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    ),
    "WanAnimate2Transformer3DModel": dict(
        text_len=5, in_dim=12, dim=24, ffn_dim=40, freq_dim=8, text_dim=12, out_dim=4, num_heads=2, num_layers=2
    ),
    "WanVACETransformer3DModel": dict(_WAN, vace_layers=[0, 1], vace_in_channels=6),
    "ZImageTransformer2DModel": dict(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=12,
        axes_dims=[4, 6, 6], axes_lens=[64, 16, 16],
    ),
}  # fmt: skip

_UNET: Config = dict(
    block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1, cross_attention_dim=12, attention_head_dim=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
)  # fmt: skip
_UP: Config = dict(up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
_WAN_VAE: Config = dict(
    z_dim=4, base_dim=8, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True]
)

DIFFUSERS |= {
    "UNet2DConditionModel": dict(
        _UNET, **_UP, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64, use_linear_projection=True, transformer_layers_per_block=2,
    ),
    "UNet2DModel": dict(
        sample_size=8, block_out_channels=(16, 32), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=8, attention_head_dim=8, layers_per_block=1,
    ),
    "ControlNetModel": dict(_UNET, conditioning_embedding_out_channels=(8, 16)),
    "SD3ControlNetModel": dict(
        sample_size=8, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4,
        pos_embed_max_size=8,
    ),
    "FluxControlNetModel": dict(_FLUX, pooled_projection_dim=16, num_mode=None),
    "QwenImageControlNetModel": dict(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(4, 4, 8),
    ),
    "AutoencoderKL": dict(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=8,
    ),
    "AutoencoderKLWan": _WAN_VAE,
    "AutoencoderKLQwenImage": _WAN_VAE,
    "AutoencoderTiny": {},
    "VQModel": dict(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=8, num_vq_embeddings=12,
    ),
}  # fmt: skip

_TEXT: Config = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=64
)
_GROUPED: Config = {**_TEXT, "num_key_value_heads": 2}
_IMAGE: Config = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    image_size=16,
    patch_size=8,
)
_CLIP_TEXT: Config = {**_TEXT, "eos_token_id": 1, "projection_dim": 12}
_CLIP: Config = dict(
    text_config=_CLIP_TEXT, vision_config={**_IMAGE, "projection_dim": 12}, projection_dim=12
)
_SOUND: Config = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=20,
    conv_dim=(8, 8, 8), conv_kernel=(5, 3, 2), conv_stride=(3, 2, 2), num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2, num_feat_extract_layers=3,
)  # fmt: skip
_T5: Config = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64)
_BART: Config = dict(
    d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=64, max_position_embeddings=20,
)  # fmt: skip
_WHISPER: Config = dict(
    {k: v for k, v in _BART.items() if k != "max_position_embeddings"}, num_mel_bins=8, max_source_positions=10,
    max_target_positions=12, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip
_EXPERTS: Config = dict(num_local_experts=3, num_experts_per_tok=2, experts_implementation="batched_mm")
_GPT2: Config = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=16)
_DISTIL: Config = dict(
    dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=64, max_position_embeddings=16
)
_SWIN: Config = dict(
    image_size=16, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
)
_CONVNEXT: Config = dict(image_size=32, hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 2, 1])

TRANSFORMERS: dict[str, Config] = {
    "LlamaForCausalLM": _GROUPED,
    "LlamaForSequenceClassification": {**_GROUPED, "pad_token_id": 0},
    "LlamaForTokenClassification": _GROUPED,
    "LlamaForQuestionAnswering": _GROUPED,
    "MistralForCausalLM": {**_GROUPED, "head_dim": 8},
    "MistralForSequenceClassification": {**_GROUPED, "head_dim": 8, "pad_token_id": 0},
    "MixtralForCausalLM": {**_GROUPED, **_EXPERTS},
    "Qwen2ForCausalLM": _GROUPED,
    "Qwen2ForSequenceClassification": {**_GROUPED, "pad_token_id": 0},
    "Qwen3ForCausalLM": {**_GROUPED, "head_dim": 8},
    "GemmaForCausalLM": {**_GROUPED, "head_dim": 8},
    "Gemma2ForCausalLM": {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4},
    "Gemma3ForCausalLM": {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4},
    "PhiForCausalLM": _GROUPED,
    "Phi3ForCausalLM": {**_GROUPED, "pad_token_id": 0},
    "GPT2LMHeadModel": _GPT2,
    "GPT2ForSequenceClassification": {**_GPT2, "pad_token_id": 0},
    "GPTNeoXForCausalLM": _TEXT,
    "OPTForCausalLM": dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, vocab_size=64,
        word_embed_proj_dim=32, max_position_embeddings=16,
    ),
    "FalconForCausalLM": dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, new_decoder_architecture=True,
        num_kv_heads=2,
    ),
    "BloomForCausalLM": dict(hidden_size=32, n_layer=2, n_head=4, vocab_size=64),
    "StableLmForCausalLM": _GROUPED,
    "Olmo2ForCausalLM": _GROUPED,
    "CohereForCausalLM": {**_GROUPED, "pad_token_id": 0},
    "BertModel": _TEXT,
    "BertForMaskedLM": _TEXT,
    "BertForSequenceClassification": _TEXT,
    "BertForMultipleChoice": _TEXT,
    "RobertaForMaskedLM": _TEXT,
    "RobertaForSequenceClassification": _TEXT,
    "DistilBertForMaskedLM": _DISTIL,
    "DistilBertForSequenceClassification": _DISTIL,
    "DebertaV2ForMaskedLM": {
        **_TEXT, "relative_attention": True, "pos_att_type": "p2c|c2p", "position_buckets": 4,
        "max_relative_positions": 8, "share_att_key": True, "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
    },
    "DebertaV2ForSequenceClassification": {**_TEXT, "relative_attention": True, "pos_att_type": "p2c|c2p"},
    "ElectraForMaskedLM": {**_TEXT, "embedding_size": 20},
    "ElectraForSequenceClassification": {**_TEXT, "embedding_size": 20},
    "T5ForConditionalGeneration": _T5,
    "T5EncoderModel": _T5,
    "BartForConditionalGeneration": _BART,
    "BartForSequenceClassification": {**_BART, "eos_token_id": 3},
    "WhisperForConditionalGeneration": _WHISPER,
    "WhisperForAudioClassification": _WHISPER,
    "ViTForImageClassification": _IMAGE,
    "Dinov2Model": _IMAGE,
    "Dinov2ForImageClassification": _IMAGE,
    "SwinModel": _SWIN,
    "SwinForImageClassification": _SWIN,
    "ConvNextModel": _CONVNEXT,
    "ConvNextForImageClassification": _CONVNEXT,
    "CLIPModel": _CLIP,
    "CLIPTextModel": _CLIP_TEXT,
    "CLIPTextModelWithProjection": _CLIP_TEXT,
    "CLIPVisionModel": _IMAGE,
    "CLIPVisionModelWithProjection": {**_IMAGE, "projection_dim": 12},
    "SiglipModel": dict(text_config={**_TEXT, "projection_size": 32}, vision_config=_IMAGE),
    "SiglipTextModel": {**_TEXT, "projection_size": 32},
    "SiglipVisionModel": _IMAGE,
    "Wav2Vec2Model": _SOUND,
    "Wav2Vec2ForCTC": _SOUND,
    "HubertModel": _SOUND,
    "HubertForSequenceClassification": _SOUND,
}  # fmt: skip

PUBLISHED = frozenset(
    [
        "MiniMaxMusic3RVQDepthDecoder",
        "T5FilmDecoder",
        "PriorTransformer",
        "JoyImageEditTransformer3DModel",
        "JoyImageEditPlusTransformer3DModel",
        "SD3Transformer2DModel",
        "RFD4ProteinaTransformer",
        "GPT2ForSequenceClassification",
        "BertForSequenceClassification",
        "RobertaForSequenceClassification",
        "DistilBertForMaskedLM",
        "DistilBertForSequenceClassification",
        "ElectraForMaskedLM",
        "OPTForCausalLM",
        "Dinov2ForImageClassification",
        "SwinForImageClassification",
        "ConvNextForImageClassification",
        "CLIPModel",
        "SiglipModel",
        "Wav2Vec2ForCTC",
        "HubertForSequenceClassification",
        "BartForConditionalGeneration",
        "DebertaV2ForMaskedLM",
    ]
)
"""Classes whose defaults are traced in about a quarter of a minute."""

NOT_POSSIBLE: dict[str, str] = {
    "HiDreamImageTransformer2DModel (with experts)": "reads its router's choice out as a NumPy array, which depends on"
    " floats; the row has no experts",
    "CosmosTransformer3DModel (with a padding mask)": "resizes it with torchvision, which is optional here; the row has"
    " none",
    "HunyuanVideo15Transformer3DModel (with a picture)": "asks whether all floats of the picture are zero; the row has"
    " one without places, and its spec holds for others (tests/test_library_classes.py)",
}
"""Class, or a form of it, -> why it is not in the table."""


def build(library: str, name: str, real: bool) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A class of diffusers or transformers, and its example inputs."""
    import contextlib
    import importlib

    import torch

    from rebasin.checkpoints.classes import example

    cls = getattr(importlib.import_module(library), name)
    config = {"diffusers": DIFFUSERS, "transformers": TRANSFORMERS}[library][name]
    published = real and name in PUBLISHED
    with torch.device("cpu") if real and not published else contextlib.nullcontext():
        config = {} if published else config
        model = cls(**config) if library == "diffusers" else cls(cls.config_class(**config))
        return model, (), example(model)
