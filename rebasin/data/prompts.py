"""Prompts to run diffusion pipelines on: a list that ships, a text file, or the captions of a folder of images."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TypedDict

from ..errors import DataError, shown
from ..files import SchemaError, conform, parse

SHIPPED = Path(__file__).parent / "prompts.txt"
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Row(TypedDict):
    """A line of metadata.jsonl, as far as it is read."""

    file_name: str
    text: str


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
    if not file.exists():
        raise DataError(f"There is no file or folder {file}: give a text file with one prompt a line.")
    lines = _text(file, "give a text file with one prompt a line").splitlines()
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise DataError(f"{file} has no prompts: write one a line.")
    return prompts


def captioned_images(folder: str | Path) -> list[tuple[Path, str]]:
    """The images in `folder` with their captions, by name.

    A caption is in a text file of the image's name, or all are in metadata.jsonl with "file_name" and "text" (the
    layout of the datasets library).

    Raises:
        DataError: there is no such folder or it has no images, one has no caption, or a row of the table no image.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise DataError(f"There is no folder {root}: give one with images and their captions.")
    table = root / "metadata.jsonl"
    captions = _captions(table) if table.is_file() else {}
    images = sorted(p for p in root.iterdir() if p.suffix.lower() in IMAGES and p.is_file())
    if missing := sorted(captions.keys() - {image.name for image in images}):
        raise DataError(
            f"{table} has a caption of {shown(missing[0])}, but {root} itself has no such image ({', '.join(IMAGES)}):"
            " put it there, or take the line out."
        )
    found = []
    for image in images:
        text = image.with_suffix(".txt")
        if image.name in captions:
            found.append((image, captions[image.name]))
        elif text.is_file():
            found.append((image, _text(text, "write the caption anew").strip()))
        else:
            raise DataError(f"The image {image} has no caption: write one to {text.name} beside it.")
    if not found:
        raise DataError(f"{root} has no images ({', '.join(IMAGES)}).")
    return found


def _captions(table: Path) -> dict[str, str]:
    """File name -> caption, of a metadata.jsonl."""
    captions: dict[str, str] = {}
    for number, line in enumerate(_text(table, "write one object a line").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = conform(Row, parse(line))
        except SchemaError as error:
            raise DataError(
                f"{table} is damaged in line {number}: {error}; each line must have a 'file_name' and a 'text'."
            ) from error
        name = PurePosixPath(row["file_name"]).as_posix()  # without ./
        if name in captions:
            raise DataError(f"{table} has two captions of {shown(name)}: take one of the lines out.")
        captions[name] = row["text"]
    return captions


def _text(file: Path, advice: str) -> str:
    """Of a file that exists; a mark of the byte order, as some editors write it, is no part of it."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} can't be read as UTF-8 text: {advice}.") from error
