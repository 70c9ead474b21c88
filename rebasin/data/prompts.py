"""Prompts to run diffusion pipelines on: a list that ships, a text file, or the captions of a folder of images."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import DataError

SHIPPED = Path(__file__).parent / "prompts.txt"
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_prompts(path: str | Path | None = None) -> list[str]:
    """The prompts in a text file, one a line; blank lines and lines that start with # are left out.

    Without `path`: 32 prompts of many kinds that ship with the package. `path` may also be a folder of captioned
    images, whose captions are returned.

    Raises:
        DataError: the file is missing, is no UTF-8 text, or has no prompts.
    """
    file = Path(path).expanduser() if path is not None else SHIPPED
    if file.is_dir():
        return [caption for _, caption in captioned_images(file)]
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise DataError(
            f"There is no file or folder {file}: give a text file with one prompt a line."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file} can't be read as UTF-8 text: give a text file with one prompt a line."
        ) from error
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise DataError(f"{file} has no prompts: write one a line.")
    return prompts


def captioned_images(folder: str | Path) -> list[tuple[Path, str]]:
    """The images in `folder` with their captions, by name.

    A caption is in a text file of the image's name, or all are in metadata.jsonl with "file_name" and "text" (the
    layout of the datasets library).

    Raises:
        DataError: there is no such folder or it has no images, or one has no caption.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise DataError(f"There is no folder {root}: give one with images and their captions.")
    table = root / "metadata.jsonl"
    captions: dict[str, str] = {}
    if table.is_file():
        try:
            lines = table.read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines if line.strip()]
            captions = {row["file_name"]: row["text"] for row in rows}
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise DataError(f"{table} is damaged: each line must have a 'file_name' and a 'text'.") from error
    found = []
    for image in sorted(p for p in root.iterdir() if p.suffix.lower() in IMAGES):
        text = image.with_suffix(".txt")
        if image.name not in captions and not text.is_file():
            raise DataError(f"The image {image} has no caption: write one to {text.name} beside it.")
        caption = captions.get(image.name) or text.read_text(encoding="utf-8").strip()
        found.append((image, caption))
    if not found:
        raise DataError(f"{root} has no images ({', '.join(IMAGES)}).")
    return found
