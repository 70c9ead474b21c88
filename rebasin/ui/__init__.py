"""The page of `rebasin ui`: what a command does, by clicks.

A click makes a command line, and a job is that command in a process of its own: the page computes nothing that the
command does not. What the commands offer comes from them (`options`), so the page and `--help` say the same.

Only `page` and `server` need gradio, and they load it when they are called.
"""

from .options import Command, Option

__all__ = ["Command", "Option"]
