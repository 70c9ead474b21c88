"""Architectures for the engine's conformance table and tests, with random weights; no downloads.

`ZOO[family][name](real)` gives (model, args, kwargs). `real=True` is the published size, to be built under
`torch.device("meta")` for coverage by shape; `real=False` is small enough to compute with.
"""

# Configs are dicts with keys of many types.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import zoo_blocks, zoo_library

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
Builder = Callable[[bool], Built]
ZOO: dict[str, dict[str, Builder]] = {"blocks": {}, "torchvision": {}, "transformers": {}, "diffusers": {}}


def entry(family: str, name: str | None = None) -> Callable[[Builder], Builder]:
    def register(build: Builder) -> Builder:
        ZOO[family][name or build.__name__] = build
        return build

    return register


for _name, _build in zoo_blocks.BLOCKS.items():
    ZOO["blocks"][_name] = lambda real, build=_build: build()


# ---------------------------------------------------------------------------------------------- torchvision

TORCHVISION = {
    "alexnet": 64,
    "vgg11": 32,
    "vgg16": 32,
    "vgg16_bn": 32,
    "resnet18": 32,
    "resnet50": 32,
    "resnext50_32x4d": 32,
    "wide_resnet50_2": 32,
    "densenet121": 32,
    "googlenet": 64,
    "inception_v3": 96,
    "squeezenet1_1": 64,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "mobilenet_v3_large": 32,
    "efficientnet_b0": 32,
    "efficientnet_v2_s": 32,
    "regnet_x_400mf": 32,
    "regnet_y_400mf": 32,
    "shufflenet_v2_x1_0": 32,
    "mnasnet1_0": 32,
    "convnext_tiny": 32,
    "vit_b_16": 224,
    "swin_t": 64,
    "swin_v2_t": 64,
    "maxvit_t": 224,
}


def import_torchvision() -> Any:
    """torchvision's wheel is linked with CUDA; on a CPU build of torch its operators' schemas must be declared."""
    import importlib
    import sys

    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import_torchvision.keep = library  # type: ignore[attr-defined]
    return importlib.import_module("torchvision")


def _torchvision(name: str, size: int) -> Builder:
    def build(real: bool) -> Built:
        models = import_torchvision().models
        extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        return models.get_model(name, weights=None, **extra), (torch.randn(1, 3, size, size),), {}

    return build


for _name, _size in TORCHVISION.items():
    ZOO["torchvision"][_name] = _torchvision(_name, _size)


# --------------------------------------------------------------------------------------------- transformers


def _ids(vocabulary: int, length: int = 7) -> torch.Tensor:
    return torch.randint(5, min(vocabulary, 60), (1, length), generator=torch.Generator().manual_seed(0))


def _hf(
    model_class: str,
    config_class: str,
    small: dict[str, Any],
    inputs: Callable[[Any], dict[str, Any]],
    **always: Any,
) -> Builder:
    def build(real: bool) -> Built:
        import transformers

        config = getattr(transformers, config_class)(**({} if real else small), **always)
        return getattr(transformers, model_class)(config), (), inputs(config)

    return build


_TEXT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=64)


def _text(config: Any) -> dict[str, Any]:
    return {"input_ids": _ids(config.vocab_size)}


def _decoder(config: Any) -> dict[str, Any]:
    return {"input_ids": _ids(config.vocab_size), "use_cache": False}


def _pixels(config: Any) -> dict[str, Any]:
    return {"pixel_values": torch.randn(1, config.num_channels, config.image_size, config.image_size)}


_HF = ZOO["transformers"]
_HF["clip_text"] = _hf("CLIPTextModel", "CLIPTextConfig", {**_TEXT, "eos_token_id": 1}, _text)
_HF["clip_vision"] = _hf(
    "CLIPVisionModel",
    "CLIPVisionConfig",
    dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
    ),
    _pixels,
)
_HF["bert"] = _hf("BertModel", "BertConfig", _TEXT, _text)
_HF["bert_mlm_tied"] = _hf("BertForMaskedLM", "BertConfig", _TEXT, _text)
_HF["roberta"] = _hf("RobertaModel", "RobertaConfig", _TEXT, _text)
_HF["gpt2"] = _hf(
    "GPT2LMHeadModel", "GPT2Config", dict(n_embd=32, n_layer=2, n_head=4, vocab_size=64), _decoder
)
_HF["llama_gqa"] = _hf("LlamaForCausalLM", "LlamaConfig", {**_TEXT, "num_key_value_heads": 2}, _decoder)
_HF["mistral"] = _hf(
    "MistralForCausalLM", "MistralConfig", {**_TEXT, "num_key_value_heads": 2, "head_dim": 8}, _decoder
)
_HF["qwen2"] = _hf("Qwen2ForCausalLM", "Qwen2Config", {**_TEXT, "num_key_value_heads": 2}, _decoder)
_HF["qwen3_qk_norm"] = _hf(
    "Qwen3ForCausalLM", "Qwen3Config", {**_TEXT, "num_key_value_heads": 2, "head_dim": 8}, _decoder
)
_HF["t5"] = _hf(
    "T5ForConditionalGeneration",
    "T5Config",
    dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64, decoder_start_token_id=0),
    lambda c: {
        "input_ids": _ids(c.vocab_size),
        "decoder_input_ids": _ids(c.vocab_size, 5),
        "use_cache": False,
    },
)
_HF["vit"] = _hf(
    "ViTModel",
    "ViTConfig",
    dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
    ),
    _pixels,
)
_HF["whisper_tiny"] = _hf(
    "WhisperModel",
    "WhisperConfig",
    dict(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        vocab_size=64,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=12,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    ),
    lambda c: {
        "input_features": torch.randn(1, c.num_mel_bins, 2 * c.max_source_positions),
        "decoder_input_ids": _ids(c.vocab_size, 5),
        "use_cache": False,
    },
)


def _logits(builder: Builder, output: str = "logits") -> Builder:
    """One output only: without the hidden states among its outputs a model's residual stream is free."""

    def build(real: bool) -> Built:
        import rebasin

        model, _, inputs = builder(real)
        names = tuple(inputs)
        head = rebasin.compose(
            lambda m, *values: m(**dict(zip(names, values, strict=True)))[output], model=model
        )
        return head, tuple(inputs.values()), {}

    return build


def _head(name: str, model_class: str, config_class: str, like: str, output: str = "logits") -> None:
    small, inputs = _SMALL[like]
    _HF[name] = _logits(_hf(model_class, config_class, small, inputs), output)


_SMALL: dict[str, tuple[dict[str, Any], Callable[[Any], dict[str, Any]]]] = {
    "text": (_TEXT, _text),
    "clip_text": ({**_TEXT, "eos_token_id": 1, "projection_dim": 12}, _text),
    "vit": (
        dict(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=16,
            patch_size=8,
        ),
        _pixels,
    ),
}
_HF["t5_logits"] = _logits(_HF["t5"])
_head("roberta_mlm_logits", "RobertaForMaskedLM", "RobertaConfig", "text")
_head("clip_text_projection", "CLIPTextModelWithProjection", "CLIPTextConfig", "clip_text", "text_embeds")
_head("vit_classifier_logits", "ViTForImageClassification", "ViTConfig", "vit")


def _whisper(real: bool) -> Built:
    import transformers

    _, _, inputs = _HF["whisper_tiny"](real)
    base = _HF["whisper_tiny"](real)[0]
    return transformers.WhisperForConditionalGeneration(base.config), (), inputs  # type: ignore[arg-type]


_HF["whisper_tiny_logits"] = _logits(_whisper)

# ------------------------------------------------------------------------------------------------ diffusers

_SD: dict[str, Any] = dict(in_channels=4, out_channels=4, layers_per_block=2)
_CROSS_DOWN = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
_CROSS_UP = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3


def _unet(real_config: dict[str, Any], small: dict[str, Any]) -> Builder:
    def build(real: bool) -> Built:
        from diffusers import UNet2DConditionModel

        config = {**_SD, **real_config, **({} if real else small)}
        kwargs: dict[str, Any] = {}
        if config.get("addition_embed_type") == "text_time":
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            kwargs = {
                "added_cond_kwargs": {"text_embeds": torch.randn(1, pooled), "time_ids": torch.rand(1, 6) * 8}
            }
        size = 16
        inputs = (
            torch.randn(1, 4, size, size),
            torch.tensor([7]),
            torch.randn(1, 5, config["cross_attention_dim"]),
        )
        return UNet2DConditionModel(**config), inputs, kwargs

    return build


_D = ZOO["diffusers"]
_D["sd15_unet"] = _unet(
    dict(
        block_out_channels=(320, 640, 1280, 1280),
        down_block_types=_CROSS_DOWN,
        up_block_types=_CROSS_UP,
        cross_attention_dim=768,
        attention_head_dim=8,
    ),
    dict(block_out_channels=(32, 64, 128, 128), cross_attention_dim=24, norm_num_groups=16),
)
_D["sd21_unet"] = _unet(
    dict(
        block_out_channels=(320, 640, 1280, 1280),
        down_block_types=_CROSS_DOWN,
        up_block_types=_CROSS_UP,
        cross_attention_dim=1024,
        attention_head_dim=(5, 10, 20, 20),
        use_linear_projection=True,
    ),
    dict(
        block_out_channels=(32, 64, 128, 128),
        cross_attention_dim=24,
        norm_num_groups=16,
        attention_head_dim=(2, 4, 8, 8),
    ),
)
SDXL: dict[str, Any] = dict(
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=2048,
    attention_head_dim=(5, 10, 20),
    transformer_layers_per_block=(1, 2, 10),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
_D["sdxl_unet"] = _unet(
    SDXL,
    dict(
        block_out_channels=(32, 64, 128),
        cross_attention_dim=24,
        norm_num_groups=16,
        attention_head_dim=(2, 4, 8),
        transformer_layers_per_block=(1, 2, 3),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    ),
)


@entry("diffusers")
def unet2d(real: bool) -> Built:
    from diffusers import UNet2DModel

    small: dict[str, Any] = dict(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=8,
    )
    return UNet2DModel(**({} if real else small)), (torch.randn(1, 3, 32, 32), torch.tensor([7])), {}


@entry("diffusers")
def autoencoder_kl(real: bool) -> Built:
    from diffusers import AutoencoderKL

    channels = (128, 256, 512, 512) if real else (32, 64)
    model = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=2,
        norm_num_groups=32 if real else 16,
    )
    return model, (torch.randn(1, 3, 16, 16),), {}


@entry("diffusers")
def autoencoder_tiny(real: bool) -> Built:
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(), (torch.randn(1, 3, 16, 16),), {}


@entry("diffusers")
def controlnet(real: bool) -> Built:
    from diffusers import ControlNetModel

    small: dict[str, Any] = dict(
        block_out_channels=(32, 64, 128, 128),
        cross_attention_dim=24,
        norm_num_groups=16,
        conditioning_embedding_out_channels=(8, 16),
    )
    model = ControlNetModel(**(dict(cross_attention_dim=768) if real else small))
    scale = 8 if real else 2
    return (
        model,
        (
            torch.randn(1, 4, 16, 16),
            torch.tensor([7]),
            torch.randn(1, 5, 768 if real else 24),
            torch.randn(1, 3, 16 * scale, 16 * scale),
        ),
        {},
    )


@entry("diffusers")
def sd3_transformer(real: bool) -> Built:
    from diffusers import SD3Transformer2DModel

    small: dict[str, Any] = dict(
        sample_size=8,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )
    model = SD3Transformer2DModel(**({} if real else small))
    c = model.config
    return (
        model,
        (),
        dict(
            hidden_states=torch.randn(1, c.in_channels, 8, 8),
            timestep=torch.tensor([7]),
            encoder_hidden_states=torch.randn(1, 5, c.joint_attention_dim),
            pooled_projections=torch.randn(1, c.pooled_projection_dim),
        ),
    )


@entry("diffusers")
def sd35_transformer_qk_norm(real: bool) -> Built:
    from diffusers import SD3Transformer2DModel

    small: dict[str, Any] = dict(
        sample_size=8,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )
    model = SD3Transformer2DModel(**({} if real else small), qk_norm="rms_norm", dual_attention_layers=(0,))
    c = model.config
    return (
        model,
        (),
        dict(
            hidden_states=torch.randn(1, c.in_channels, 8, 8),
            timestep=torch.tensor([7]),
            encoder_hidden_states=torch.randn(1, 5, c.joint_attention_dim),
            pooled_projections=torch.randn(1, c.pooled_projection_dim),
        ),
    )


@entry("diffusers")
def flux_transformer(real: bool) -> Built:
    from diffusers import FluxTransformer2DModel

    small: dict[str, Any] = dict(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    model = FluxTransformer2DModel(**(dict(guidance_embeds=True) if real else small))
    c = model.config
    return (
        model,
        (),
        dict(
            hidden_states=torch.randn(1, 6, c.in_channels),
            encoder_hidden_states=torch.randn(1, 5, c.joint_attention_dim),
            pooled_projections=torch.randn(1, c.pooled_projection_dim),
            timestep=torch.tensor([0.5]),
            img_ids=torch.rand(6, 3) * 4,
            txt_ids=torch.zeros(5, 3),
            guidance=torch.tensor([3.5]),
        ),
    )


@entry("diffusers")
def pixart_transformer(real: bool) -> Built:
    from diffusers import PixArtTransformer2DModel

    small: dict[str, Any] = dict(
        sample_size=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=24,
        cross_attention_dim=32,
    )
    published: dict[str, Any] = dict(caption_channels=4096, cross_attention_dim=1152, sample_size=64)
    config = {**(published if real else small), "use_additional_conditions": False}
    model = PixArtTransformer2DModel(**config)
    c = model.config
    return (
        model,
        (),
        dict(
            hidden_states=torch.randn(1, 4, 8, 8),
            timestep=torch.tensor([7]),
            encoder_hidden_states=torch.randn(1, 5, c.caption_channels),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ),
    )


@entry("diffusers")
def dit(real: bool) -> Built:
    from diffusers import DiTTransformer2DModel

    small: dict[str, Any] = dict(
        sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=4, num_embeds_ada_norm=10
    )
    model = DiTTransformer2DModel(**({} if real else small))
    return model, (torch.randn(1, 4, 8, 8),), dict(timestep=torch.tensor([7]), class_labels=torch.tensor([3]))


# ------------------------------------------------------------------ classes of both libraries, by their names

for _library, _classes in (("transformers", zoo_library.TRANSFORMERS), ("diffusers", zoo_library.DIFFUSERS)):
    for _name in _classes:
        if _name not in zoo_library.NOT_POSSIBLE:
            ZOO[_library][_name] = lambda real, of=_library, name=_name: zoo_library.build(of, name, real)
