"""Which class of diffusers or transformers a model's folder is of, and how it is built from its configuration.

Only classes that the installed libraries have: code that comes with a folder is never run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError, shown
from ...integrations.huggingface import quiet

if TYPE_CHECKING:
    from torch import nn

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Known:
    """A class of "diffusers" or "transformers" by name, and the configuration that a model of it has; what people call
    it, where that is another word.
    """

    library: str
    name: str
    config: Config
    called: str = ""

    @property
    def title(self) -> str:
        """What it is, for a sentence."""
        return self.called or f"{self.name} of {self.library}"

    def with_config(self, config: Config) -> Known:
        return replace(self, config=config)


def known(config: Config, where: Path) -> Known | None:
    """The class that a configuration names; None if it names none. `where` is its file.

    Raises:
        CheckpointError: the installed library has no such class, or it is no model.
    """
    name = config.get("_class_name")
    if isinstance(name, str):
        return _of_diffusers(name, config, where)
    named = config.get("architectures")
    if isinstance(named, list) and named and isinstance(named[0], str):
        return _of_transformers(named[0], config, where)
    if isinstance(config.get("model_type"), str):
        with quiet():
            from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

        found = MODEL_MAPPING_NAMES.get(config["model_type"])
        if isinstance(found, str):
            return _of_transformers(found, config, where)
    return None


def _of_diffusers(name: str, config: Config, where: Path) -> Known:
    with quiet():
        import diffusers

    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)):
        raise _unknown(where, name, "diffusers", diffusers.__version__, config)
    return Known("diffusers", name, config)


def _of_transformers(name: str, config: Config, where: Path) -> Known:
    with quiet():
        import transformers

    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise _unknown(where, name, "transformers", transformers.__version__, config)
    return Known("transformers", name, config)


def _unknown(where: Path, name: str, library: str, version: str, config: Config) -> CheckpointError:
    own = "; the code that comes with the folder is not run" if "auto_map" in config else ""
    return CheckpointError(
        f"{where} is of the class {shown(name)}, which {library} {version} has not{own}: install a version that has it,"
        " or describe the network yourself (model=own, docs/own_model.md)."
    )


def built(what: Known, where: object) -> nn.Module:
    """A model of this class in eval mode, freshly initialised on torch's present default device.

    Raises:
        CheckpointError: nothing can be built from the configuration; `where` is its folder.
    """
    try:
        with quiet():
            if what.library == "diffusers":
                return _diffusers_model(what).eval()
            return _transformers_model(what).eval()
    except Exception as error:  # what the libraries make of a configuration that is none
        raise CheckpointError(
            f"The configuration in {where} describes no {what.title} that can be built: {_reason(error)}."
        ) from error


def _reason(error: Exception) -> str:
    """What a library says, in one line."""
    words = " ".join(str(error).split()).rstrip(".")
    told = f"{type(error).__name__}: {words}" if isinstance(error, KeyError) or not words else words
    return told if len(told) <= 240 else f"{told[:237]}..."


def _diffusers_model(what: Known) -> nn.Module:
    import diffusers

    return getattr(diffusers, what.name).from_config(dict(what.config))


def _transformers_model(what: Known) -> nn.Module:
    import transformers

    kind = getattr(transformers, what.name)
    plain = {k: v for k, v in what.config.items() if k not in ("dtype", "torch_dtype", "quantization_config")}
    return kind(kind.config_class.from_dict(decoded(plain)))


def decoded(config: Config) -> dict[str, Any]:
    """A configuration with the numbers that transformers writes as {"__float__": "Infinity"}, as JSON has no such.

    transformers reads them so as well, but only from a file.
    """

    def number(entry: dict[str, Any]) -> Any:
        return float(entry["__float__"]) if entry.get("__float__") in FLOATS and len(entry) == 1 else entry

    return json.loads(json.dumps(dict(config)), object_hook=number)


FLOATS = ("Infinity", "-Infinity", "NaN")
