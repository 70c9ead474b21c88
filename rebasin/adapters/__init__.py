"""Adapters follow their model: what was trained on B (LoRA, LyCORIS, ControlNet) works on the aligned B.

See docs/adapters.md.
"""

from .aligned import align_adapter
from .controlnet import is_controlnet, joint_controlnet, move_controlnet
from .keys import AdapterInfo, is_adapter
from .move import describe_adapter, move_adapter
from .union import component_of, extend, is_joint, of_component, part, union

__all__ = [
    "AdapterInfo",
    "align_adapter",
    "component_of",
    "describe_adapter",
    "extend",
    "is_adapter",
    "is_controlnet",
    "is_joint",
    "joint_controlnet",
    "move_adapter",
    "move_controlnet",
    "of_component",
    "part",
    "union",
]
