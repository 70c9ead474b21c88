"""What `python -m rebasin.new my_study` writes: a folder with network, data, loss and config that runs as it is."""

from __future__ import annotations

import re
from enum import StrEnum
from importlib.resources import files
from pathlib import Path

from ..errors import ConfigError
from ..files import config_dir, write_text

Kind = StrEnum("Kind", ["resnet", "vit", "gpt"])

NETWORK = {Kind.resnet: "Net", Kind.vit: "Net", Kind.gpt: "net"}
"""What makes the network in the module of each kind."""

CONFIG = """\
# @package _global_
# {name}: the network, its training, data and loss in study.py. Their options are those of its signatures.
defaults:
  - /model/own@model
  - /own/network/study.{net}@model.options
  - /own/train/study.train@model.train_options
  - /own/dataset/study.load@data.options
  - /own/objective/study.loss@objective.options
  - _self_

model: {{name: {name}, network: "study:{net}", train: "study:train"}}
data: {{name: {name}, dataset: "study:load"}}
objective: {{name: {name}, function: "study:loss"}}
"""

README = """\
# {name}

`study.py` has the network, its data, its loss and its training: replace what is yours, keep the names. From here:

    python -m rebasin.run --config-dir conf model={name}                        # train two, align, merge, measure
    python -m rebasin.run --config-dir conf model={name} algo=ste               # see --help for all algorithms
    python -m rebasin.run --config-dir conf model={name} algo=learned           # maps beside permutations
    python -m rebasin.run --config-dir conf model={name} model.options.width=64 # options of its signature
    python -m rebasin.run --multirun --config-dir conf model={name} model.options.width=16,32,64
    python -m rebasin.run --config-dir conf model={name} model.train=null model.a=a.safetensors model.b=b.pt

Two networks of yours that are trained already are given as in the last line. Each run leaves a folder with report.html.
"""


def create(folder: Path, kind: Kind = Kind.resnet) -> list[Path]:
    """Write the study into `folder`, whose last part is its name; returns the files.

    Raises:
        ConfigError: the name is none that a config can have, or the folder has something in it.
    """
    name = folder.absolute().name
    if not re.fullmatch(r"[A-Za-z]\w*", name):
        raise ConfigError(
            f"{name!r} can't be the name of a study; give letters, digits and underscores, such as my_study."
        )
    if (config_dir() / "model" / f"{name}.yaml").is_file():
        raise ConfigError(
            f"model={name} is a model of this package, which would be used in the study's place; give it another name."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} has something in it; give a folder that is new.")
    source = files("rebasin.new") / f"{kind}.py.txt"
    net = NETWORK[kind]
    content = {
        "study.py": source.read_text("utf-8"),
        f"conf/model/{name}.yaml": CONFIG.format(name=name, net=net),
        "README.md": README.format(name=name),
    }
    for file, text in content.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        write_text(folder / file, text)
    return [folder / file for file in content]
