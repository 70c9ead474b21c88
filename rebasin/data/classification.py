"""Images with class labels: scikit-learn's digits, MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100.

Images are float32, shaped (n, channels, height, width); labels are int64. Grey images are in [0, 1] without any
further normalisation, those of CIFAR have ImageNet's mean and standard deviation taken out: both as in Git Re-Basin's
code.
"""

import hashlib
import os
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..files import atomic_path
from .cifar import ADDRESS, LAYOUTS, read_cifar
from .idx import read_idx

NAMES = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100")
THINGS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
DIGITS = tuple("0123456789")
GARMENTS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
CLASSES = {
    "mnist": DIGITS,
    "fashion_mnist": GARMENTS,
    "cifar10": THINGS,
    "cifar100": tuple(map(str, range(100))),
}

# The four parts of MNIST-like data: names of the IDX files, and keys of .npz files (keras' first).
PARTS = {
    "train_x": ("train-images-idx3-ubyte", ("x_train", "train_images", "train_x")),
    "train_y": ("train-labels-idx1-ubyte", ("y_train", "train_labels", "train_y")),
    "test_x": ("t10k-images-idx3-ubyte", ("x_test", "test_images", "test_x")),
    "test_y": ("t10k-labels-idx1-ubyte", ("y_test", "test_labels", "test_y")),
}

# Public addresses and the MD5 sums that their publishers give for the .gz files.
SOURCES: dict[str, tuple[str, dict[str, str]]] = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "train_x": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train_y": "d53e105ee54ea40749a09fcbcd1e9432",
            "test_x": "9fb629c4189551a2d022fa330f9573f3",
            "test_y": "ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    "fashion_mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        {
            "train_x": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train_y": "25c81989df183df01b3e8a0aad5dffbe",
            "test_x": "bef4ecab320f06d8554ea6380940ec79",
            "test_y": "bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
}


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images (n, channels, height, width), float32; labels (n,), int64; the names of the classes."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: tuple[str, ...]

    def batches(self, split: Literal["train", "test"], size: int = 1000) -> list[tuple[Tensor, Tensor]]:
        """The split in its own order as (x, y) batches of `size` samples, the last one shorter; no copies."""
        x, y = (self.train_x, self.train_y) if split == "train" else (self.test_x, self.test_y)
        return list(zip(x.split(size), y.split(size), strict=True))

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 of the training part: the same data, however it came here, has the same fingerprint."""
        digest = hashlib.sha256(repr((tuple(self.train_x.shape), self.classes)).encode())
        for part in (self.train_x, self.train_y):
            digest.update(part.contiguous().numpy().data)
        return digest.hexdigest()


def load(name: str, path: str | Path | None = None, *, download: bool = False) -> Dataset:
    """Load a data set by name.

    Args:
        name: "digits" (1,797 8x8 images inside scikit-learn; every fifth image of each class is the test
            split, 355 in all), "mnist" or "fashion_mnist" (28x28, their own splits), "cifar10" or "cifar100"
            (32x32 in colour).
        path: for all but the digits, an .npz file with x_train, y_train, x_test, y_test (or train_images,
            train_labels, ...), or the publisher's files: a folder with the four IDX files, gzipped or not (or one
            of these files); for CIFAR the .tar.gz of its binary or python version, or its folder. Without it
            NAME.npz, or else NAME, in the folder that the environment's REBASIN_DATA names.
        download: fetch what `path` (a folder) lacks from the data set's public address and check it by its
            MD5.

    Raises:
        DataError: unknown name, missing, truncated or odd file; the sentence names the file.
    """
    if name not in NAMES:
        raise DataError(f"There is no data set '{name}': choose one of {', '.join(NAMES)}.")
    if name == "digits":
        if path is not None:
            raise DataError(
                "The digits come with scikit-learn and take no path: choose mnist or fashion_mnist for files."
            )
        return _digits()
    if path is not None and not str(path):
        raise DataError(f"The path of {name} is empty: name a file or a folder, or leave it out.")
    path = _known_place(name) if path is None else Path(path).expanduser()
    if path is None:
        files = (
            "the publisher's .tar.gz or its folder" if name in LAYOUTS else "a folder with the four IDX files"
        )
        raise DataError(
            f"{name} needs a path: pass an .npz file with x_train, y_train, x_test, y_test or {files} "
            "(download=true fills the folder)."
        )
    if download and path.suffix != ".npz":
        _download(name, path)
    if path.suffix == ".npz":
        arrays = _read_npz(path)
    else:
        arrays = read_cifar(name, path) if name in LAYOUTS else _read_folder(path)
    checked, classes = _colour if name in LAYOUTS else _checked, CLASSES[name]
    train, test = (
        checked(arrays[f"{split}_x"], arrays[f"{split}_y"], f"the {called} part of {path}", len(classes))
        for split, called in (("train", "training"), ("test", "test"))
    )
    return Dataset(name, *train, *test, classes)


def _known_place(name: str) -> Path | None:
    """Where REBASIN_DATA has the data set."""
    root = os.environ.get("REBASIN_DATA")
    places = [Path(root).expanduser() / file for file in (f"{name}.npz", name)] if root else []
    return next((place for place in places if place.exists()), None)


def _colour(x: np.ndarray, y: np.ndarray, where: str, classes: int) -> tuple[Tensor, Tensor]:
    """CIFAR's, as `_checked` has grey ones."""
    if x.ndim == 4 and x.shape[1:] == (32, 32, 3):  # keras' order
        x = x.transpose(0, 3, 1, 2)
    y = y.reshape(-1) if y.ndim == 2 and y.shape[1:] == (1,) else y
    images, labels = _checked(x, y, where, classes, (3, 32, 32))
    images -= torch.tensor(MEAN).reshape(3, 1, 1)
    images /= torch.tensor(STD).reshape(3, 1, 1)
    return images, labels


def _digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "The digits are part of scikit-learn, which is not installed: pip install scikit-learn."
        ) from error
    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 16
    y = torch.from_numpy(labels).long()
    test = torch.zeros(len(y), dtype=torch.bool)
    for number in range(10):
        test[(y == number).nonzero()[4::5]] = True
    return Dataset("digits", x[~test], y[~test], x[test], y[test], DIGITS)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {part: file[_key(file.files, part, keys, path)] for part, (_, keys) in PARTS.items()}
    except FileNotFoundError as error:
        raise DataError(f"There is no file {path}.") from error
    except DataError:
        raise
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        why = "" if "pickle" in str(error) else f" ({error})"  # numpy's advice is to load it unsafely
        raise DataError(
            f"{path} is not a readable .npz file of plain arrays{why}: fetch it again."
        ) from error


def _key(present: list[str], part: str, keys: tuple[str, ...], path: Path) -> str:
    for key in keys:
        if key in present:
            return key
    raise DataError(
        f"{path} has no array {' or '.join(keys)} for {part}: it has {', '.join(present) or 'none'}."
    )


def _read_folder(path: Path) -> dict[str, np.ndarray]:
    folder = path.parent if path.is_file() else path
    if not folder.is_dir():
        raise DataError(f"There is no file or folder {path}.")
    return {part: read_idx(_find(folder, stem)) for part, (stem, _) in PARTS.items()}


def _find(folder: Path, stem: str) -> Path:
    # Some copies are called train-images.idx3-ubyte.
    names = (f"{name}{suffix}" for name in (stem, stem.replace("-idx", ".idx")) for suffix in ("", ".gz"))
    for path in (folder / name for name in names):
        if path.is_file():
            return path
    raise DataError(
        f"{folder} has neither {stem} nor {stem}.gz: pass an .npz file or a folder with all four IDX files."
    )


def _checked(
    x: np.ndarray, y: np.ndarray, where: str, classes: int, size: tuple[int, ...] = (28, 28)
) -> tuple[Tensor, Tensor]:
    if x.shape[1:] != size or x.shape[0] == 0 or y.shape != x.shape[:1]:
        wanted = ", ".join(map(str, ("n", *size)))
        raise DataError(
            f"{where} has images {x.shape} and labels {y.shape}, but ({wanted}) and (n,) were expected."
        )
    if x.dtype != np.uint8:
        raise DataError(f"{where} has images of type {x.dtype}, but uint8 from 0 to 255 was expected.")
    if y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= classes:
        raise DataError(f"{where} has labels that are not whole numbers from 0 to {classes - 1}.")
    images = torch.from_numpy(np.ascontiguousarray(x)).reshape(len(x), -1, *size[-2:]).float() / 255
    return images, torch.from_numpy(y.astype(np.int64))


def _download(name: str, folder: Path) -> None:
    if name in LAYOUTS:
        layout = LAYOUTS[name]
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            folder.mkdir(parents=True, exist_ok=True)
            fetch(f"{ADDRESS}{layout.archive}", layout.md5, folder / layout.archive)
        return
    address, sums = SOURCES[name]
    folder.mkdir(parents=True, exist_ok=True)
    for part, md5 in sums.items():
        stem = PARTS[part][0]
        try:
            _find(folder, stem)
        except DataError:
            fetch(f"{address}{stem}.gz", md5, folder / f"{stem}.gz")


def fetch(url: str, md5: str, target: Path) -> None:
    """Fetch `url` into `target`, which appears only when its MD5 is right. Raises DataError."""
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            body = answer.read()
    except OSError as error:
        raise DataError(
            f"{url} could not be fetched ({error}): download it yourself and pass its folder."
        ) from error
    if hashlib.md5(body, usedforsecurity=False).hexdigest() != md5:
        raise DataError(f"{url} is not the expected file (its MD5 differs): download the data set yourself.")
    with atomic_path(target) as temporary:
        temporary.write_bytes(body)
