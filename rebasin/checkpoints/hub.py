"""Models by their place on the Hub, `hf://owner/name[@revision][/file]`, and results that go there.

Downloads are huggingface_hub's: they lie in its cache, and what lies there is not fetched again. Only what a model
needs is fetched: of weights that a repository has in several forms or variants, one.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from ..errors import CheckpointError, ConfigError, first_line, unknown
from ..files import cache_folder
from ..integrations.huggingface import reaching
from .folders import INDEX, weights_set

PLACE = re.compile(r"hf:/{1,2}(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/]+))?(?:/(?P<file>.+?))?/?")
"""A `Path` of such a place has one slash where the text has two."""

REPO = re.compile(r"[\w.-]+/[\w.-]+")

NEVER = (
    ".msgpack", ".h5", ".onnx", ".ot", ".tflite", ".mlmodel", ".gguf", ".png", ".jpg", ".jpeg", ".webp", ".gif", ".mp4",
)  # fmt: skip
"""Of a repository that is fetched as a folder: other frameworks' weights, and pictures."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Place:
    """A model on the Hub; `revision` None is its main branch, `file` None all of it."""

    repo: str
    revision: str | None
    file: str | None

    @classmethod
    def of(cls, path: str | Path) -> Place | None:
        """What a path says, None if it is one of this machine.

        Raises:
            CheckpointError: it begins like a place on the Hub and is none.
        """
        text = str(path).replace("\\", "/")
        if not text.startswith("hf:/"):
            return None
        found = PLACE.fullmatch(text)
        if found is None:
            raise CheckpointError(
                f"hf://{text[4:].lstrip('/')} is no place on the Hub; write hf://owner/name or hf://owner/name/file."
            )
        revision = found["revision"] and unquote(found["revision"])
        return cls(found["repo"], revision, found["file"])

    def __str__(self) -> str:
        return f"hf://{self.repo}{f'@{self.revision}' if self.revision else ''}{f'/{self.file}' if self.file else ''}"


_fetched: dict[Path, Place] = {}
"""Where this process has what from."""


def came_from(path: Path) -> Place | None:
    """The place on the Hub of a path that `local` gave."""
    return _fetched.get(path)


def local(path: str | Path, variant: str | None = None) -> Path:
    """The file or folder that a path means on this machine; what is on the Hub is fetched first.

    Args:
        path: one of this machine (~ is the home folder), or hf://owner/name[@revision][/file]. The folder of a whole
            repository has the repository's name.
        variant: of weights in several variants, fetch these.

    Raises:
        CheckpointError: there is no such model, or file, or revision, or the Hub can't be reached; says which.
    """
    place = Place.of(path)
    if place is None:
        return Path(path).expanduser()
    with told(place), reaching():
        found = _fetch(place, variant)
    _fetched[found] = place
    return found


def _fetch(place: Place, variant: str | None) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download  # late: takes a while
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        names = HfApi().list_repo_files(place.repo, revision=place.revision)
    except HfHubHTTPError:
        raise
    except (OfflineModeIsEnabled, HTTPError, OSError) as error:
        try:  # what is in the cache needs no network
            if place.file and PurePosixPath(place.file).suffix:
                return Path(
                    hf_hub_download(place.repo, place.file, revision=place.revision, local_files_only=True)
                )
            whole = snapshot_download(
                place.repo, revision=place.revision, local_files_only=True, allow_patterns=["*.json"]
            )
        except LocalEntryNotFoundError:
            raise error from None
        return _named(Path(whole), place)
    if place.file in names:
        return Path(hf_hub_download(place.repo, place.file, revision=place.revision))
    below = f"{place.file}/" if place.file else ""
    own = [name for name in names if name.startswith(below)]
    if not own:
        raise CheckpointError(
            str(unknown(f"{place} is not there", place.file or "", names, "the repository has"))
        )
    wanted = needed(own, variant, below)
    if not wanted:
        raise CheckpointError(
            f"{place} has no weights that could be read; name a file of it: hf://{place.repo}/FILE."
        )
    # `[` in a name would be a pattern; names with one are rare, and `*` would only fetch more.
    patterns = [name.replace("[", "?") for name in wanted]
    return _named(
        Path(snapshot_download(place.repo, revision=place.revision, allow_patterns=patterns)), place
    )


def needed(names: Sequence[str], variant: str | None = None, below: str = "") -> list[str]:
    """Of the files of a repository those that its model needs when it is read as a folder.

    Args:
        names: with slashes.
        variant: the word in the names of the weights to take, where they have it.
        below: the folder that is read, with a slash at the end; "" is the repository itself.
    """
    pipeline = f"{below}{INDEX}" in names
    folders: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if not name.lower().endswith(NEVER) and not PurePosixPath(name).name.startswith("."):
            folders[str(PurePosixPath(name).parent)].append(name)
    top = str(PurePosixPath(below or "."))
    found: list[str] = []
    for folder, own in folders.items():
        weights = [name for name in own if name.endswith((".safetensors", *PICKLES, ".index.json"))]
        rest = [name for name in own if name not in weights]
        known = {name: weights_set(PurePosixPath(name).name) for name in weights}
        if pipeline and folder == top:  # whole checkpoints beside the same in parts
            weights = []
        elif any(known.values()):
            sets = {one for one in known.values() if one is not None}
            variants = {one[1] for one in sets}
            chosen = variant if variant in variants else "" if "" in variants else min(variants)
            formats = {one[0] for one in sets if one[1] == chosen}
            form = "safetensors" if "safetensors" in formats else min(formats)
            weights = [name for name in weights if known[name] == (form, chosen)]
        found += rest + weights
    return found


def _named(folder: Path, place: Place) -> Path:
    """The folder under the repository's name: its own is the number of a commit, which would say nothing."""
    part = folder / place.file if place.file else folder
    cache = cache_folder()
    if cache is None or place.file:
        return part
    link = cache / "hub" / folder.name[:12] / place.repo.rpartition("/")[2]
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_symlink() and not link.exists():
            link.unlink()
        if not link.exists():
            link.symlink_to(folder, target_is_directory=True)
    except OSError:  # no links on this system: it works as well without a name
        return part
    return link


@contextmanager
def told(place: Place | str) -> Iterator[None]:
    """What the Hub's client raises, as one sentence about this place, from where something is fetched; text: that of a
    repository to which something is sent.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{place} asks you to accept its terms first: do so on its page on the Hub, and log in: hf auth login."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{place} has no such revision; name a branch, a tag or a commit behind the @."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{place} is not on the Hub, or is not yours to read; check the name, or log in: hf auth login."
        ) from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{place} is no place on the Hub: {first_line(error)}") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        way = "log in with a token that may write: hf auth login" if status in (401, 403) else "try again"
        raise CheckpointError(f"{place}: the Hub answered with error {status}; {way}.") from error
    except errors.OfflineModeIsEnabled as error:
        raise CheckpointError(
            f"{place} is not in the Hub's cache, and HF_HUB_OFFLINE is set; unset it, or give a file of this machine."
        ) from error
    except (errors.HTTPError, errors.LocalEntryNotFoundError, OSError, RuntimeError) as error:
        what, instead = "fetched", ", or give a file of this machine"
        if isinstance(place, str):
            what, instead = "sent", ""
        raise CheckpointError(
            f"{place} can't be {what} ({first_line(error, 60).rstrip('.')}); check the connection to the Hub{instead}."
        ) from error


def require_repo(name: str) -> str:
    """The name of a repository that a result is to go to, looked at before the work; a token must be there.

    Raises:
        ConfigError: it is no such name, there is no token, or HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import constants, get_token

    repo = name.removeprefix("hf://").strip("/")
    if not REPO.fullmatch(repo):
        raise ConfigError(f"--push-to-hub {name}: give the name of a repository, owner/name.")
    with reaching():
        if constants.HF_HUB_OFFLINE:
            raise ConfigError(
                "--push-to-hub needs the Hub, but HF_HUB_OFFLINE is set; unset it, or leave the option out."
            )
    if not get_token():
        raise ConfigError("--push-to-hub needs your token; log in (hf auth login) or set HF_TOKEN.")
    return repo


def push(repo: str, files: Mapping[str, Path | bytes], message: str) -> str:
    """Send files to a repository in one commit, and give its address; a repository that is not there is made, private.

    Args:
        repo: owner/name.
        files: the place there -> the file here, or what it holds; a folder with all in it; what is named later wins.

    Raises:
        CheckpointError: the Hub refused, or can't be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    sources: dict[str, Path | bytes] = {}
    for name, source in files.items():
        if isinstance(source, Path) and source.is_dir():
            inner = sorted(path for path in source.rglob("*") if path.is_file())
            sources |= {
                (PurePosixPath(name) / path.relative_to(source).as_posix()).as_posix(): path for path in inner
            }
        else:
            sources[name] = source
    adds = [CommitOperationAdd(name, source) for name, source in sources.items()]
    with told(f"hf://{repo}"), reaching():
        api.create_repo(repo, private=True, exist_ok=True)
        return str(api.create_commit(repo, adds, commit_message=message).commit_url)
