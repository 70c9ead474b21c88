"""Nodes for ComfyUI; it calls `comfy_entrypoint` when this folder lies in its custom_nodes."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
