"""The nodes, in ComfyUI's V3 schema: what they take and give. All work is in work.py and in rebasin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.lora
import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io, ui

from rebasin.checkpoints import FORMATS
from rebasin.cli import loaded
from rebasin.merging import METHODS
from rebasin.types import DerivedState, LazyTensor

from . import work

CATEGORY = "rebasin"
ALIGNMENT = io.Custom("REBASIN_ALIGNMENT")
MADE = io.Custom("REBASIN_MADE")

METHOD = dict(
    options=list(METHODS), default="weighted_sum", tooltip="How to combine: rebasin methods explains all."
)
ALPHA = dict(
    default=0.5, min=-10.0, max=10.0, step=0.01, tooltip="Share of B, or strength of what the method adds."
)
WEIGHTS = dict(
    default="",
    optional=True,
    tooltip="Weights by block (IN=0.2,OUT=0.7, a preset such as GRAD_V); empty: the share.",
)
SEED = dict(default=0, min=0, max=2**32 - 1, tooltip="Of everything random.")


def state_of(patcher: Any) -> DerivedState:
    """The tensors of a loaded model with its patches (LoRAs), each computed when it is read."""
    patches = patcher.get_key_patches()

    def lazy(key: str) -> LazyTensor:
        (weight, convert), *own = patches[key]

        def read() -> Any:
            if not own:
                return weight.to("cpu")
            wide = convert(weight.to("cpu", torch.float32, copy=True), inplace=True)
            return comfy.lora.calculate_weight(own, wide, key).to(weight.dtype)

        return LazyTensor(tuple(weight.shape), weight.dtype, read)

    return DerivedState({key: lazy(key) for key in patches})


def parts_of(model: Any, clip: Any | None) -> dict[str, Any]:
    return work.known(work.parts_of(state_of(model), None if clip is None else state_of(clip.patcher)))


def with_parts(
    model: Any, clip: Any | None, parts: dict[str, Any], old: dict[str, Any]
) -> tuple[Any, Any | None]:
    """Clones of MODEL and CLIP that have the parts in the place of the old ones; what is the same is shared."""
    of_model, of_clip = work.names_of(work.changed(parts, old))
    model = model.clone()
    model.add_patches({name: ("set", (state[own],)) for name, (state, own) in of_model.items()})
    if clip is not None:
        clip = clip.clone()
        clip.add_patches({name: ("set", (state[own],)) for name, (state, own) in of_clip.items()})
    return model, clip


def results() -> Path:
    return Path(folder_paths.get_output_directory()) / "checkpoints"


def file_of(kind: str, name: str) -> Path:
    return Path(folder_paths.get_full_path_or_raise(kind, name))


def models() -> list[str]:
    return folder_paths.get_filename_list("checkpoints")


class Compare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RebasinCompare",
            display_name="Compare two models (Re-Basin)",
            category=CATEGORY,
            description="How far apart two models are, block by block, and whether they need aligning.",
            is_output_node=True,
            inputs=[
                io.Model.Input("model_a"),
                io.Model.Input("model_b"),
                io.Clip.Input("clip_a", optional=True),
                io.Clip.Input("clip_b", optional=True),
            ],
            outputs=[io.String.Output("report")],
        )

    @classmethod
    def execute(cls, model_a: Any, model_b: Any, clip_a: Any = None, clip_b: Any = None) -> io.NodeOutput:
        text = work.report(loaded.compare(parts_of(model_a, clip_a), parts_of(model_b, clip_b)))
        return io.NodeOutput(text, ui=ui.PreviewText(text))


class Align(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RebasinAlign",
            display_name="Align B to A (Re-Basin)",
            category=CATEGORY,
            description="B with its neurons in A's order. It makes the same images as B, and can be merged with A.",
            inputs=[
                io.Model.Input("model_a"),
                io.Model.Input("model_b"),
                io.Clip.Input("clip_a", optional=True),
                io.Clip.Input("clip_b", optional=True),
                io.Boolean.Input(
                    "maps", default=False, tooltip="By linear maps, too. Slower, and often no better."
                ),
                io.Int.Input("seed", **SEED),
            ],
            outputs=[
                io.Model.Output("aligned_b"),
                io.Clip.Output("aligned_clip_b"),
                ALIGNMENT.Output("alignment"),
                io.String.Output("report"),
            ],
        )

    @classmethod
    def execute(
        cls, model_a: Any, model_b: Any, maps: bool, seed: int, clip_a: Any = None, clip_b: Any = None
    ) -> io.NodeOutput:
        old = parts_of(model_b, clip_b)
        found = loaded.align(parts_of(model_a, clip_a), old, maps=maps, seed=seed)
        model, clip = with_parts(model_b, clip_b, found.parts, old)
        return io.NodeOutput(model, clip, found, f"{found.moved:,} of {found.neurons:,} neurons of B moved.")


class Merge(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RebasinMerge",
            display_name="Merge models (Re-Basin)",
            category=CATEGORY,
            description="Loaded models merged as they are: align B first. Give the alignment, and it is written down.",
            inputs=[
                io.Model.Input("model_a"),
                io.Model.Input("model_b"),
                io.Clip.Input("clip_a", optional=True),
                io.Clip.Input("clip_b", optional=True),
                io.Model.Input(
                    "base", optional=True, tooltip="For methods that need what both were made from."
                ),
                io.Clip.Input("clip_base", optional=True),
                ALIGNMENT.Input("alignment", optional=True),
                io.Combo.Input("method", **METHOD),
                io.Float.Input("alpha", **ALPHA),
                io.String.Input("weights", **WEIGHTS),
                io.Int.Input("seed", **SEED),
            ],
            outputs=[io.Model.Output("merged"), io.Clip.Output("merged_clip"), MADE.Output("made")],
        )

    @classmethod
    def execute(
        cls, model_a: Any, model_b: Any, method: str, alpha: float, seed: int, weights: str = "",
        clip_a: Any = None, clip_b: Any = None, base: Any = None, clip_base: Any = None, alignment: Any = None,
    ) -> io.NodeOutput:  # fmt: skip
        old = parts_of(model_a, clip_a)
        found = loaded.merge(
            [old, parts_of(model_b, clip_b)],
            method=method,
            alpha=work.alpha_of(method, alpha),
            weights=weights.strip() or None,
            base=None if base is None else parts_of(base, clip_base),
            seed=seed,
        )
        model, clip = with_parts(model_a, clip_a, found.parts, old)
        return io.NodeOutput(model, clip, work.made_of(alignment, found))


class Save(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RebasinSave",
            display_name="Save with provenance (Re-Basin)",
            category=CATEGORY,
            description="Write a checkpoint whose header says how it was made; rebasin inspect shows it.",
            is_output_node=True,
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip", optional=True),
                io.Vae.Input("vae", optional=True),
                MADE.Input("made", optional=True),
                io.String.Input("name", default="merged"),
                io.Combo.Input("dtype", options=[work.AS_A, *FORMATS], default=work.AS_A),
                io.Boolean.Input("overwrite", default=False),
            ],
            outputs=[io.String.Output("file")],
            hidden=[io.Hidden.prompt],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        name: str,
        dtype: str,
        overwrite: bool,
        clip: Any = None,
        vae: Any = None,
        made: Any = None,
    ) -> io.NodeOutput:
        path = work.output_of(results(), name)
        work.require_free(path, overwrite)
        text = None if clip is None else {**clip.get_sd(), **state_of(clip.patcher)}
        saved = model.model.state_dict_for_saving(text, None if vae is None else vae.get_sd())
        whole = work.whole_of(saved, state_of(model))
        recipe, figures = made or ({"command": "save"}, {})
        metadata = {} if cls.hidden.prompt is None else {"prompt": json.dumps(cls.hidden.prompt)}
        loaded.save(
            path, whole, recipe, figures, dtype=None if dtype == work.AS_A else dtype, metadata=metadata
        )
        return io.NodeOutput(str(path), ui=ui.PreviewText(f"Written: {path}"))


class AlignFiles(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RebasinAlignFiles",
            display_name="Align B to A, files (Re-Basin)",
            category=CATEGORY,
            description="rebasin align: B's file in A's order, and the permutation beside it. Takes less memory.",
            is_output_node=True,
            inputs=[
                io.Combo.Input("a", options=models()),
                io.Combo.Input("b", options=models()),
                io.String.Input("name", default="aligned"),
                io.Boolean.Input("maps", default=False),
                io.Int.Input("seed", **SEED),
                io.Boolean.Input("overwrite", default=False),
            ],
            outputs=[io.String.Output("file"), io.String.Output("permutation")],
        )

    @classmethod
    def execute(cls, a: str, b: str, name: str, maps: bool, seed: int, overwrite: bool) -> io.NodeOutput:
        files = work.align_files(
            file_of("checkpoints", a), file_of("checkpoints", b), work.output_of(results(), name),
            maps=maps, seed=seed, overwrite=overwrite,
        )  # fmt: skip
        return io.NodeOutput(*map(str, files), ui=ui.PreviewText("Written: " + ", ".join(map(str, files))))


class MergeFiles(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RebasinMergeFiles",
            display_name="Align and merge files (Re-Basin)",
            category=CATEGORY,
            description="rebasin merge: the same file as by the command. Takes far less memory than loaded models.",
            is_output_node=True,
            inputs=[
                io.Combo.Input("a", options=models()),
                io.Combo.Input("b", options=models()),
                io.String.Input("name", default="merged"),
                io.Combo.Input("method", **METHOD),
                io.Float.Input("alpha", **ALPHA),
                io.String.Input("weights", **WEIGHTS),
                io.Combo.Input("base", options=[work.NONE, *models()], default=work.NONE),
                io.Boolean.Input("align", default=True, tooltip="Bring B's neurons into A's order first."),
                io.Combo.Input("dtype", options=[work.AS_A, *FORMATS], default=work.AS_A),
                io.Boolean.Input("prune", default=False),
                io.Int.Input("seed", **SEED),
                io.Boolean.Input("overwrite", default=False),
            ],
            outputs=[io.String.Output("file")],
        )

    @classmethod
    def execute(
        cls, a: str, b: str, name: str, method: str, alpha: float, base: str, align: bool, dtype: str, prune: bool,
        seed: int, overwrite: bool, weights: str = "",
    ) -> io.NodeOutput:  # fmt: skip
        path = work.merge_files(
            [file_of("checkpoints", a), file_of("checkpoints", b)], work.output_of(results(), name),
            base=None if base == work.NONE else file_of("checkpoints", base), weights=weights, dtype=dtype,
            alpha=alpha, method=method, align=align, prune=prune, seed=seed, overwrite=overwrite,
        )  # fmt: skip
        return io.NodeOutput(str(path), ui=ui.PreviewText(f"Written: {path}"))


class ApplyToLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RebasinApplyToLora",
            display_name="Apply permutation to LoRA (Re-Basin)",
            category=CATEGORY,
            description="A LoRA of B that works on the aligned B, written beside the LoRA as NAME_aligned.safetensors.",
            is_output_node=True,
            inputs=[
                io.Combo.Input("lora", options=folder_paths.get_filename_list("loras")),
                ALIGNMENT.Input("alignment", optional=True),
                io.String.Input("permutation", default="", optional=True, tooltip="Or the path of its file."),
                io.Boolean.Input(
                    "unfold", default=False, tooltip="Write LoKr and LoHa that can't follow as LoRA."
                ),
                io.Boolean.Input("overwrite", default=False),
            ],
            outputs=[io.String.Output("file")],
        )

    @classmethod
    def execute(
        cls, lora: str, unfold: bool, overwrite: bool, alignment: Any = None, permutation: str = ""
    ) -> io.NodeOutput:
        file = file_of("loras", lora)
        path = work.apply_to_file(
            work.one_of(alignment, permutation), file, file.with_name(f"{file.stem}_aligned.safetensors"),
            unfold=unfold, overwrite=overwrite,
        )  # fmt: skip
        return io.NodeOutput(str(path), ui=ui.PreviewText(f"Written: {path}"))


class Nodes(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [Compare, Align, Merge, Save, AlignFiles, MergeFiles, ApplyToLora]


async def comfy_entrypoint() -> Nodes:
    return Nodes()
