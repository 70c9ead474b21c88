"""What the unpatched ImageReward library gives for weights that everyone can make again: the tests' reference.

    python -m venv reference && reference/bin/pip install "torch>=2.11,<2.14" image-reward==1.5 transformers==4.55.4
    reference/bin/python -m experiments.image_reward_reference --out tests/data/image_reward.json

transformers 4.55.4 is the newest that the package imports from without help. Nothing of the package or of
transformers is changed here; only the package's `__init__` is passed by (it wants CLIP and a trainer, which take no
part), and torchvision's operators are declared where its wheel does not fit a CPU build of torch. All 447 M parameters
of the real architecture come from a hash of their name and a seed: see `weights`. The file has scores of
`score(prompt, PIL image)`, and the gradient of `score_gard` by the pixels that the model sees.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import tempfile
import types
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SEED = 7
PROMPTS = (
    "a handwritten seven",
    "a photo of a red cat, sitting on the sofa of an old house by the sea in the evening",
    "A photo of 2 dogs!",
)
SIZES = ((224, 224), (32, 32), (301, 227), (200, 331))  # width, height


def weights(name: str, shape: tuple[int, ...], seed: int = SEED) -> np.ndarray:
    """The parameter `name`, float32 values that float16 can hold; uniform, of a spread that keeps signals alive.

    From the raw bits of PCG64, which numpy promises to keep, seeded with a hash of the name.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    count = math.prod(shape)
    raw = np.random.PCG64(int.from_bytes(digest[:8], "little")).random_raw(-(-count // 4))
    uniform = raw.astype("<u8").view("<u2")[:count].astype(np.float32) / 32768 - 1  # -1 to 1
    uniform *= math.sqrt(3)  # of variance 1
    if len(shape) >= 2 and "embed" not in name and not name.endswith("token"):
        uniform /= math.sqrt(math.prod(shape[1:]))
        if any(part in name for part in ("qkv", ".query.", ".key.")):
            uniform *= 2  # attention that prefers something
    elif "orm" in name and name.endswith("weight"):
        uniform = 1 + 0.2 * uniform
    else:
        uniform *= 0.2
    return uniform.reshape(shape).astype(np.float16).astype(np.float32)


def images() -> list[Image.Image]:
    """One smooth picture with some noise for each of SIZES."""
    made = []
    for number, (width, height) in enumerate(SIZES):
        y, x = np.mgrid[0:height, 0:width]
        waves = [np.sin((x / width * (3 + c) + y / height * (number + 2)) * 2.1 + c) for c in range(3)]
        raw = np.random.PCG64(number).random_raw(height * width * 3).astype("<u8") % 41
        picture = 128 + 90 * np.stack(waves, axis=2) + raw.reshape(height, width, 3).astype(float) - 20
        made.append(Image.fromarray(picture.clip(0, 255).astype(np.uint8)))
    return made


def checksum(arrays: Iterable[np.ndarray]) -> str:
    """Of some arrays' bytes."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def unpatched(folder: Path) -> Any:
    """The library's model with `weights`, built in `folder`, where it finds its vocabulary and config."""
    import torch

    found = find_spec("ImageReward")
    if found is None or found.origin is None:
        sys.exit("image-reward is not installed in this environment.")
    try:
        import torchvision  # noqa: F401  # pyright: ignore[reportMissingImports]
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        declared = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            declared.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        unpatched.declared = declared  # type: ignore[attr-defined]  # gone when it is collected
    root = Path(found.origin).parent
    for name, path in (("ImageReward", root), ("ImageReward.models", root / "models")):
        package = types.ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package

    from rebasin.objectives.image_reward import BERT, letters  # the configuration and the vocabulary

    (folder / "bert-base-uncased").mkdir()
    (folder / "bert-base-uncased" / "vocab.txt").write_text("\n".join(letters()) + "\n")
    (folder / "med_config.json").write_text(json.dumps(BERT))
    os.chdir(folder)  # a folder "bert-base-uncased" here is what transformers takes for that name
    from ImageReward.ImageReward import ImageReward  # pyright: ignore[reportMissingImports]

    model = ImageReward(med_config="med_config.json", device="cpu").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weights(name, tuple(parameter.shape))))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    out = parser.parse_args().out.resolve()

    import torch
    import transformers

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = unpatched(Path(folder))
        pictures = images()
        scores = [[model.score(prompt, picture) for picture in pictures] for prompt in PROMPTS]
        seen = model.preprocess(pictures[0])[None].requires_grad_()
        tokens = model.blip.tokenizer(
            PROMPTS[0], padding="max_length", truncation=True, max_length=35, return_tensors="pt"
        )
        model.score_gard(tokens.input_ids, tokens.attention_mask, seen).sum().backward()
        assert seen.grad is not None
        gradient = seen.grad[0].numpy()
    first = [weights(name, tuple(p.shape)) for name, p in list(model.named_parameters())[:4]]
    content = {
        "made_by": "experiments/image_reward_reference.py",
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "image-reward": "1.5",
        },
        "seed": SEED,
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights_checksum": checksum(first),
        "images_checksum": checksum(np.asarray(picture) for picture in pictures),
        "prompts": PROMPTS,
        "tokens": [model.blip.tokenizer(prompt).input_ids for prompt in PROMPTS],
        "scores": scores,
        "gradient": {
            "norm": float(np.linalg.norm(gradient)),
            "values": [float(v) for v in gradient[:, 20::60, 20::60].ravel()],
        },
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
