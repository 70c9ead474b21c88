"""The files of a run: tensors, figures, pictures, page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from torch import Tensor

from ..checkpoints import atomic_path, load_metadata, load_safetensors, save_safetensors, write_text
from ..spec import Permutation
from . import many
from .curve import save_curves
from .html import save_html
from .results import Results, save_results
from .samples import Samples, save_samples
from .search import NAME as SEARCH
from .search import has_search, save_search

if TYPE_CHECKING:
    from ..jobs.combination import Combination


def save_tensors(
    folder: Path,
    permutation: Permutation,
    aligned: Mapping[str, Tensor],
    merged: Mapping[str, Tensor],
    config: Mapping[str, Any],
) -> None:
    """Write the permutation, B aligned, and the merge; the headers say what they are."""
    about = {
        "model": config["model"]["name"],
        "algorithm": config["algo"]["name"],
        "seed": str(config["seed"]),
        "spec_hash": permutation.spec.hash,
    }
    path = folder / "permutation.safetensors"
    permutation.save(path, {**about, "content": "the permutation that brings B to A, and its spec"})
    save_safetensors(
        path, load_safetensors(path), load_metadata(path)
    )  # again, with the header in a fixed order
    save_safetensors(folder / "aligned.safetensors", aligned, {**about, "content": "B, permuted"})
    save_safetensors(
        folder / "merged.safetensors", merged, {**about, "content": f"merge by {config['merge']['method']}"}
    )


def save_blocks(combination: Combination, folder: Path) -> None:
    """Draw blocks.png, the weight of every block, if the merge has weights by block."""
    if combination.blocks is not None:
        from ..merging.block_figure import block_figure

        with atomic_path(folder / "blocks.png") as path:
            block_figure(combination.blocks).savefig(path, dpi=120)


def leave(results: Results, samples: Samples | None, config: Mapping[str, Any], folder: Path) -> None:
    """Write results.json, config.yaml, samples.png, curve.png and report.html."""
    save_results(folder, results)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(config))))
    if samples is not None:
        save_samples(samples, folder / "samples.png")
    draw(results, folder)


def draw(results: Results, folder: Path) -> list[Path]:
    """Write curve.png, search.png if there was a search, and report.html, which also shows a samples.png and a
    steps.png that are in `folder`.
    """
    if results.get("kind") == many.KIND:
        return many.draw(results, folder)
    if results.get("kind") in ("search", "methods"):
        from ..search import draw as draw_search  # above this package, and only wanted here

        return draw_search(results, folder)
    drawn = [save_curves(results, folder / "curve.png")] if results["curves"] else []
    if has_search(results):
        drawn.append(save_search(results, folder / SEARCH))
    return [*drawn, save_html(results, folder)]
