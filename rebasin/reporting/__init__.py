"""What a run leaves for people: pictures, a self-contained HTML page, the terminal's table, a wandb run."""

from .draw import draw, leave, save_blocks, save_tensors
from .loggers import both, open_logger
from .results import collect, load_results
from .snapshots import Snapshots

__all__ = [
    "Snapshots", "both", "collect", "draw", "leave", "load_results", "open_logger", "save_blocks", "save_tensors",
]  # fmt: skip
