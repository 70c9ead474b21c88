"""temporary"""

from typing import Any

import torch
from torch import nn


def example(model: nn.Module) -> dict[str, Any]:
    c: Any = model.config
    m = model.main_input_name
    out: dict[str, Any] = {}
    if m == "pixel_values":
        out["pixel_values"] = torch.randn(1, c.num_channels, c.image_size, c.image_size)
    elif m == "input_features":
        out["input_features"] = torch.randn(1, c.num_mel_bins, 2 * c.max_source_positions)
    else:
        t = c.get_text_config()
        out["input_ids"] = torch.randint(5, t.vocab_size, (1, 6))
        if type(model).__name__ == "CLIPModel":
            v = c.vision_config
            out["pixel_values"] = torch.randn(1, v.num_channels, v.image_size, v.image_size)
    if c.is_encoder_decoder:
        out["decoder_input_ids"] = torch.randint(5, c.vocab_size, (1, 5))
    import inspect

    if "use_cache" in inspect.signature(model.forward).parameters:
        out["use_cache"] = False
    return out
