"""transformers exports thousands of modules by star imports; pyright would read them all and find nothing of ours."""

from typing import Any

def __getattr__(name: str) -> Any: ...
