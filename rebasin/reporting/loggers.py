"""Where a run's figures also go: nowhere, or to Weights & Biases (offline unless the config says else)."""

from __future__ import annotations

import os
from collections.abc import Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..types import Progress, ProgressEvent
from .kinds import kind_of, pictures
from .results import Results

MODES = ("offline", "online", "disabled")
ARTIFACTS = {
    "permutation": ("permutation.safetensors", "alignment.safetensors", "permutations.safetensors"),
    "checkpoint": ("merged.safetensors", "aligned.safetensors", "repaired.safetensors"),
    "results": ("results.json", "config.yaml"),
}
"""Kind -> the files of a run that belong to it."""


class Logger:
    """What a run tells; this one, of `logger=none`, keeps nothing, and wandb is not even imported."""

    def event(self, event: ProgressEvent) -> None:
        """A progress event of an algorithm, while it runs; algorithms of the user's own may send plain dicts."""

    def picture(self, name: str, path: Path) -> None:
        """A picture that was made while the run goes on."""

    def results(self, results: Results, folder: Path, files: Container[str]) -> None:
        """The run's results and the pictures in its folder, at the end; `files`: names of its own."""


@contextmanager
def open_logger(config: Mapping[str, Any], run: Mapping[str, Any], folder: Path) -> Iterator[Logger]:
    """The logger of the config group `logger`, closed at the end, as failed if the block raises.

    config: the group; run: the run's whole configuration; folder: the run's, where all files stay.
    """
    if config["name"] == "none":
        yield Logger()
        return
    if config["mode"] not in MODES:
        raise ConfigError(f"logger.mode is {config['mode']!r}; choose one of {', '.join(MODES)}.")
    with _inside(folder), ExitStack() as end:
        logger = WandbLogger(config, run, folder)
        end.push(logger.close)
        yield logger


def both(*listeners: Progress) -> Progress:
    """One progress callback that passes each event to all `listeners`."""

    def progress(event: ProgressEvent) -> None:
        for listener in listeners:
            listener(event)

    return progress


class WandbLogger(Logger):
    """One wandb run: progress while matching, then the curves as a table, the pictures, and `metrics`."""

    def __init__(self, config: Mapping[str, Any], run: Mapping[str, Any], folder: Path):
        import wandb

        self._kinds = [str(kind) for kind in config.get("artifacts") or ()]
        for kind in self._kinds:
            if kind not in ARTIFACTS:
                raise ConfigError(f"logger.artifacts has {kind!r}; it takes some of {', '.join(ARTIFACTS)}.")
        self._wandb = wandb
        self._followed: set[str] = set()  # pictures logged while the run went on
        self._run = wandb.init(
            project=config["project"],
            entity=config["entity"],
            group=config["group"],
            tags=[str(tag) for tag in config["tags"]] or _tags(run),
            name=f"{run['model']['name']}-{run['algo']['name']}-seed{run['seed']}",
            job_type=config.get("job_type") or job_type(run),
            mode=config["mode"],
            dir=folder,
            config=dict(run),
            settings=wandb.Settings(silent=True, console="off", save_code=False, x_disable_stats=True),
        )

    def event(self, event: ProgressEvent) -> None:
        stage = str(event.get("stage"))
        if stage.endswith(", group"):
            return  # progress within a sweep, for the terminal: it has a name of its own in every sweep
        numbers = {
            f"{stage}/{key}": value
            for key, value in event.items()
            if key not in ("stage", "total") and isinstance(value, (int, float))
        }
        if numbers:
            self._run.log(numbers)

    def picture(self, name: str, path: Path) -> None:
        self._followed.add(path.name)
        self._run.log({name: self._wandb.Image(str(path))})

    def results(self, results: Results, folder: Path, files: Container[str]) -> None:
        kind = kind_of(results)
        logged: dict[str, Any] = {
            name: self._wandb.Table(columns=list[Any](columns), data=rows)
            for name, (columns, rows) in kind.tables(results).items()
        }
        for path in (folder / name for name in pictures(results)):
            if path.is_file() and path.name not in self._followed:
                logged[path.stem] = self._wandb.Image(str(path))
        self._run.log(logged)
        self._run.summary.update(kind.summary(results))
        self._artifacts(results, folder, files)

    def _artifacts(self, results: Results, folder: Path, own: Container[str]) -> None:
        """Log the files of the kinds that `logger.artifacts` names, each kind as one artifact."""
        for kind in self._kinds:
            files = [folder / name for name in ARTIFACTS[kind] if name in own]
            if files:
                name = f"{results['data']}-{results['model']}-{results['algorithm']}-{kind}"
                about = {"seed": results["seed"], "command": results.get("command")}
                about = kind_of(results).summary(results) | about
                artifact = self._wandb.Artifact(name, type=kind, metadata=about)
                for file in files:
                    artifact.add_file(str(file))
                self._run.log_artifact(artifact)

    def close(self, error: object, *_: object) -> None:
        """As the end of a block; wandb's own would print the traceback of the `error`."""
        self._run.finish(exit_code=int(error is not None))


def job_type(run: Mapping[str, Any]) -> str:
    """ "study", "merge" (many models) or "match", from a run's configuration."""
    many = str(run["algo"]["name"]).startswith("merge_many")
    return "study" if run.get("study") else "merge" if many else "match"


def _tags(run: Mapping[str, Any]) -> list[str]:
    """What people filter by: model, data, algorithm; of an experiment its name and size."""
    experiment = (run.get("experiment") or {}).get("name")
    tags = [run["model"]["name"], run["data"]["name"], run["algo"]["name"]]
    return tags + ([experiment, f"size-{run.get('size')}"] if experiment else [])


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Keep wandb's caches in the run's folder, too, unless the user has chosen places for them."""
    home = str(folder.resolve() / "wandb" / ".home")
    names = ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR")
    chosen = [name for name in names if name not in os.environ]
    os.environ.update(dict.fromkeys(chosen, home))
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        yield
    finally:
        for name in chosen:
            os.environ.pop(name, None)
