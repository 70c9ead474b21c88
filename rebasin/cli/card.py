"""The page about a result that lies beside it and that the Hub shows, and sending both there."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..checkpoints import provenance
from ..checkpoints.hub import came_from, push
from ..checkpoints.output import is_file
from ..errors import CheckpointError, ConfigError
from ..files import write_text
from .session import size

if TYPE_CHECKING:
    from ..reporting.console import Console
    from .request import Request

README = "README.md"


def card_of(output: Path) -> Path:
    """Where the page about a result lies: a folder's README.md, which the Hub shows, or NAME.md beside a file."""
    return output / README if output.is_dir() else output.with_suffix(".md")


def wants_card(request: Request) -> bool:
    """A folder has a page unless it is refused: else the page copied from A would say that the merge is A."""
    return request.output.is_dir() if request.model_card is None else request.model_card


def require_card_place(request: Request) -> None:
    """Refuse a page that would take the place of a file of the user's, before any work.

    Raises:
        ConfigError: its place has a file.
    """
    page = request.output.with_suffix(".md")  # beside a file; a new folder has none
    if request.model_card and is_file(request.output) and page.exists() and not request.overwrite:
        raise ConfigError(
            f"{page}, where the model card would go, exists; add --overwrite to replace it, or leave --model-card out."
        )


def card(output: Path, metadata: Mapping[str, str], inputs: Sequence[Path], title: str) -> str:
    """The page, in Markdown with the Hub's fields on top, from what the result's own header says.

    Args:
        output: the result.
        metadata: of its header.
        inputs: the paths of its inputs in the header's order, for their places on the Hub and A's licence.
        title: what kind of model it is.
    """
    made = provenance.read(metadata) or {}
    recipe = provenance.told(made.get("recipe", {}))
    places = [came_from(path) for path in inputs]
    rows = []
    for told, place in zip(
        made.get("inputs", []), [*places, *[None] * len(made.get("inputs", []))], strict=False
    ):
        name = f"`{place}`" if place else f"`{told['name']}`"
        rows.append(f"| {name} | `{told['sha256']}` | {size(int(told.get('size', 0)))} |")
    aligned = [
        f"| {name} | {figures.get('moved', 0):,} of {figures.get('neurons', 0):,} | {_distance(figures)} |"
        for name, figures in (made.get("alignment") or {}).items()
    ]
    options = [f"| {name} | `{_text(value)}` |" for name, value in recipe.items()]
    lines = [
        f"---\n{_fields(output, inputs, places)}\n---\n",
        f"# {output.stem if output.is_file() else output.name}\n",
        f"{title}, made by `rebasin {recipe.get('command', 'merge')}` (git-rebasin {__version__}) from:\n",
        *("| model | sha256 | size |", "|---|---|---|", *rows),
        "\nWith these options (the others are the defaults):\n",
        *("| option | value |", "|---|---|", *options),
    ]
    if aligned:
        lines += [
            "\nNeurons that were brought into the first model's order, and how far the weights are apart:\n",
            *("| component | neurons that moved | distance |", "|---|---|---|", *aligned),
        ]
    lines += [
        "\nThe same is in the header of the weights: `rebasin inspect` shows it. Nobody has said yet what this model"
        " makes and what it does not: look before you share it, and mind the licences of the models above.",
    ]
    return "\n".join(lines) + "\n"


def _fields(output: Path, inputs: Sequence[Path], places: Sequence[Any]) -> str:
    from huggingface_hub import ModelCard, ModelCardData  # late: takes a while

    licence = None
    if inputs and (inputs[0] / README).is_file():
        with contextlib.suppress(
            Exception
        ):  # a page of somebody's: whatever is wrong with it, ours needs none of it
            licence = ModelCard.load(inputs[0] / README).data.get("license")
    library = None
    if output.is_dir():
        library = "diffusers" if (output / "model_index.json").is_file() else "transformers"
    return ModelCardData(
        license=licence,
        library_name=library,
        base_model=sorted({place.repo for place in places if place}) or None,
        base_model_relation="merge" if any(places) else None,
        tags=["merge", "git-rebasin"],
    ).to_yaml()


def _distance(figures: Mapping[str, Any]) -> str:
    before, after = figures.get("distance_before"), figures.get("distance_after", figures.get("distance"))
    return "" if before is None or after is None else f"{before:.4g} before, {after:.4g} after"


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def leave(
    console: Console, request: Request, metadata: Mapping[str, str], title: str, beside: Sequence[Path]
) -> list[Path | str]:
    """Write the page if it is wanted, send what is to be sent, and say where both are.

    Args:
        metadata: the header of the result.
        beside: files that go along, such as the permutation.

    Raises:
        CheckpointError: the Hub refused, or can't be reached; the result is written all the same.
    """
    output, page = request.output, None
    base = [request.base] if request.base else []
    told: list[Path | str] = []
    if wants_card(request):
        page = card_of(output)
        write_text(page, card(output, metadata, [*request.inputs, *base], title))
        told.append(page)
    if request.push_to_hub:
        text = (
            page.read_text(encoding="utf-8")
            if page
            else card(output, metadata, [*request.inputs, *base], title)
        )
        files: dict[str, Path | bytes] = {
            "." if output.is_dir() else output.name: output,
            README: text.encode(),
        }
        files |= {path.name: path for path in beside if path.is_file()}
        with console.stage("push"):
            try:
                address = push(request.push_to_hub, files, f"{output.name}, by git-rebasin {__version__}")
            except CheckpointError as error:
                raise CheckpointError(
                    f"{output} is written, but not on the Hub: {error} To send it later: hf upload"
                    f" {request.push_to_hub} {output}"
                ) from error
            console.say(address)
        told.append(address)
    return told
