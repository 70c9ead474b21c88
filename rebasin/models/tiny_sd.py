"""The embedded default: a tiny but real Stable Diffusion, trained on handwritten digits, with six UNets.

Every part is the library's own class at a small size: AutoencoderKL (1x32x32 images <-> 4x8x8 latents),
CLIPTokenizer, CLIPTextModel and UNet2DConditionModel with cross attention, GroupNorm, GEGLU and skip
concatenations, like Stable Diffusion 1.5. The UNets share text encoder, VAE and scheduler:

    seed0, seed1   trained independently: other initial weights, other order of the data, other noise
    low, high      seed0 fine-tuned on the digits 0 to 4 and on the digits 5 to 9
    wide0, wide1   trained independently, twice as wide (`new_unet(seed, 64)`) and longer, on a GPU

scripts/train_tiny_sd.py makes the first four from nothing; assets/tiny_sd/training.json says how all were made and
how good they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors import SafetensorError
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..errors import CheckpointError, ConfigError
from ..integrations.huggingface import quiet

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

ASSETS = Path(__file__).parent / "assets" / "tiny_sd"
TRAINED = ("seed0", "seed1", "low", "high")
"""Those that scripts/train_tiny_sd.py makes, at width 32."""

UNETS = (*TRAINED, "wide0", "wide1")

CONTEXT = 16  # tokens in a prompt, start and end included
HIDDEN = 64  # width of the text encoder and of the UNets' cross attention

T = TypeVar("T")


# Loading ----------------------------------------------------------------------------------------------------


def load_unet(
    name: str = "seed0", dtype: torch.dtype = torch.float32, path: str | Path | None = None
) -> UNet2DConditionModel:
    """One of the UNETS in eval mode. `path`: a folder of your own, made by scripts/train_tiny_sd.py.

    Raises CheckpointError for an unknown name or a folder that is missing or damaged.
    """
    root = Path(path) if path is not None else ASSETS
    found = sorted(folder.name.removeprefix("unet_") for folder in root.glob("unet_*"))
    known = UNETS if path is None else tuple(found)
    if name not in known:
        raise CheckpointError(
            f"There is no UNet {name!r} in {root}: choose one of {', '.join(known) or '(it has none)'}."
        )
    return _load(UNet2DConditionModel, f"unet_{name}", path, torch_dtype=dtype).eval()


def load_vae(dtype: torch.dtype = torch.float32, path: str | Path | None = None) -> AutoencoderKL:
    """The shared autoencoder in eval mode: images [n, 1, 32, 32] in -1..1 <-> latents [n, 4, 8, 8]."""
    return _load(AutoencoderKL, "vae", path, torch_dtype=dtype).eval()


def load_text_encoder(dtype: torch.dtype = torch.float32, path: str | Path | None = None) -> CLIPTextModel:
    """The shared text encoder in eval mode: token ids [n, 16] -> last hidden states [n, 16, 64]."""
    return _load(CLIPTextModel, "text_encoder", path, dtype=dtype).eval()


def load_tokenizer(path: str | Path | None = None) -> CLIPTokenizer:
    """The tokenizer: byte-level BPE, every word of the captions is one token, any other text is spelt out."""
    return _load(CLIPTokenizer, "tokenizer", path)


def load_scheduler(path: str | Path | None = None) -> DDIMScheduler:
    """The noise schedule that the UNets were trained on (epsilon prediction)."""
    return _load(DDIMScheduler, "scheduler", path)


def load_pipeline(
    unet: str | UNet2DConditionModel = "seed0",
    dtype: torch.dtype = torch.float32,
    path: str | Path | None = None,
) -> StableDiffusionPipeline:
    """A ready StableDiffusionPipeline; images come out as 32x32 grey PIL images, white ink on black paper.

    unet: one of UNETS, or a UNet of the same architecture, such as a merged one.
    path: a folder of your own in the layout of scripts/train_tiny_sd.py instead of the embedded one.
    """
    model = load_unet(unet, dtype, path) if isinstance(unet, str) else unet
    vae, text_encoder = load_vae(dtype, path), load_text_encoder(dtype, path)
    return build_pipeline(model, vae, text_encoder, load_tokenizer(path), load_scheduler(path))


def build_pipeline(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    scheduler: DDIMScheduler,
) -> StableDiffusionPipeline:
    """The pipeline of these parts, without safety checker and without a progress bar."""
    with quiet():
        # Imported here: it loads half of diffusers, and complains at length where torchvision is missing.
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,  # pyright: ignore[reportArgumentType]  (any scheduler with this interface works)
            safety_checker=None,  # pyright: ignore[reportArgumentType]
            feature_extractor=None,  # pyright: ignore[reportArgumentType]
            requires_safety_checker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _load(kind: type[T], part: str, path: str | Path | None, **options: Any) -> T:
    folder = (Path(path) if path is not None else ASSETS) / part
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}: give one that scripts/train_tiny_sd.py made.")
    try:
        with quiet():
            return kind.from_pretrained(str(folder), local_files_only=True, **options)  # pyright: ignore
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{folder} is damaged or incomplete ({reason}): restore it or train it anew."
        ) from error


# Architecture -----------------------------------------------------------------------------------------------


def new_unet(seed: int, width: int = 32) -> UNet2DConditionModel:
    """A UNet with random weights: Stable Diffusion 1.5's shape with two levels of `width` and 2 * `width` channels;
    0.80 M parameters at the embedded ones' width, 32.

    Raises:
        ConfigError: `width` does not divide into 8 groups of channels.
    """
    if width < 8 or width % 8:
        raise ConfigError(f"A tiny UNet's width is {width}, but it must be a multiple of 8, from 8 on.")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(width, 2 * width),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            mid_block_type="UNetMidBlock2DCrossAttn",
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            norm_num_groups=8,
            cross_attention_dim=HIDDEN,
            attention_head_dim=4,  # in this class the number of heads, as in Stable Diffusion 1.5
        )


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """A CLIP text model of width 64 with two layers of four heads."""
    special: Any = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    return CLIPTextConfig(
        **special,
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        projection_dim=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
    )


def new_scheduler() -> DDIMScheduler:
    """DDPM's linear schedule: unlike Stable Diffusion's, it ends in pure noise, also for latents as small as
    8x8.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        steps_offset=1,  # unused with this spacing, but the pipeline asks for it
    )
