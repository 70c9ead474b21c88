"""Loading of classification data, and what is said about files that are not right."""

import gzip
import hashlib
import json
import os
import pickle
import re
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rebasin.data import captioned_digits, captioned_folder, load
from rebasin.data.cifar import LAYOUTS
from rebasin.data.classification import PARTS, fetch
from rebasin.data.idx import read_idx
from rebasin.data.parts import half, split
from rebasin.data.prompts import read_prompts
from rebasin.errors import DataError

KERAS = {"train_x": "x_train", "train_y": "y_train", "test_x": "x_test", "test_y": "y_test"}


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        part: random.integers(0, 256, (n, 28, 28), np.uint8)
        if part.endswith("x")
        else np.arange(n, dtype=np.uint8) % 10
        for part, n in {"train_x": 30, "train_y": 30, "test_x": 10, "test_y": 10}.items()
    }


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_folder(folder: Path, packed: bool, dotted: bool = False) -> dict[str, np.ndarray]:
    content = arrays()
    folder.mkdir(parents=True, exist_ok=True)
    for part, (stem, _) in PARTS.items():
        name = stem.replace("-idx", ".idx") if dotted else stem
        body = idx_bytes(content[part])
        (folder / f"{name}{'.gz' if packed else ''}").write_bytes(gzip.compress(body) if packed else body)
    return content


def test_digits():
    data = load("digits")
    assert data.train_x.shape == (1442, 1, 8, 8)
    assert data.test_x.shape == (355, 1, 8, 8)
    assert (data.train_x.dtype, data.train_y.dtype) == (torch.float32, torch.int64)
    assert (float(data.train_x.min()), float(data.train_x.max())) == (0, 1)
    assert data.classes == tuple("0123456789")
    share = torch.bincount(data.test_y) / (torch.bincount(data.test_y) + torch.bincount(data.train_y))
    assert share.min() > 0.19
    assert share.max() < 0.21
    # No image is in both parts.
    train, test = ({tuple(row.tolist()) for row in x.flatten(1)} for x in (data.train_x, data.test_x))
    assert not train & test
    assert load("digits").fingerprint == data.fingerprint


def test_batches():
    data = load("digits")
    parts = data.batches("test", size=100)
    assert [len(y) for _, y in parts] == [100, 100, 100, 55]
    assert torch.cat([x for x, _ in parts]).equal(data.test_x)
    assert sum(len(y) for _, y in data.batches("train")) == 1442


def check(data, content):
    assert data.train_x.shape == (30, 1, 28, 28)
    np.testing.assert_array_equal(
        (data.train_x[:, 0] * 255).round().numpy().astype(np.uint8), content["train_x"]
    )
    np.testing.assert_array_equal(data.test_y.numpy(), content["test_y"])
    assert data.train_x.max() <= 1


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dotted", [False, True])
def test_idx_folders(tmp_path, packed, dotted):
    content = write_folder(tmp_path, packed, dotted)
    check(load("mnist", tmp_path), content)
    check(load("mnist", next(tmp_path.iterdir())), content)  # one of the files stands for its folder


@pytest.mark.parametrize("number", [0, 1, 2])
def test_npz_files_with_any_of_the_usual_keys(tmp_path, number):
    content = arrays()
    named = {PARTS[part][1][number]: value for part, value in content.items()}
    np.savez_compressed(tmp_path / "m.npz", allow_pickle=False, **named)
    data = load("fashion_mnist", str(tmp_path / "m.npz"))
    check(data, content)
    assert data.classes[9] == "Ankle boot"
    write_folder(tmp_path / "idx", packed=True)
    assert load("fashion_mnist", tmp_path / "idx").fingerprint == data.fingerprint
    assert load("mnist", tmp_path / "idx").fingerprint != data.fingerprint


def test_requests_that_cannot_be_met(tmp_path):
    with pytest.raises(DataError, match="digits, mnist, fashion_mnist"):
        load("cifar")
    with pytest.raises(DataError, match="take no path"):
        load("digits", tmp_path)
    with pytest.raises(DataError, match=r"needs a path.*npz.*IDX"):
        load("mnist")
    with pytest.raises(DataError, match=r"nowhere\.npz"):
        load("mnist", tmp_path / "nowhere.npz")
    with pytest.raises(DataError, match="nowhere"):
        load("mnist", tmp_path / "nowhere")
    with pytest.raises(DataError, match="train-images-idx3-ubyte"):
        load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not an IDX file"),
        (b"\0\0\x08", "not an IDX file"),
        (b"PK\x03\x04 something else", "not an IDX file"),
        (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", "not an IDX file of unsigned bytes"),
        (b"\0\0\x08\x03\0\0\0\x02", "ends inside its header"),
        (b"\0\0\x08\x01\0\0\0\x05abc", "should hold 5 bytes of data but has only 3"),
        (b"\0\0\x08\x01\0\0\0\x02abc", "should hold 2 bytes of data but has more"),
        (b"\0\0\x08\x02\xff\xff\xff\xff\xff\xff\xff\xff", "too large to be true"),
        (
            gzip.compress(b"\0\0\x08\x01\0\0\0\x05abcde" * 9, mtime=0)[:-12],
            "cannot be read|has more|not an IDX",
        ),
        (gzip.compress(bytes(200), mtime=0)[:30], "cannot be read|not an IDX file"),
    ],
)
def test_odd_idx_files_are_named(tmp_path, body, words):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(body)
    with pytest.raises(DataError, match=words) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


def test_odd_npz_files_are_named(tmp_path):
    path = tmp_path / "m.npz"
    content = {KERAS[part]: value for part, value in arrays().items()}
    np.savez_compressed(path, allow_pickle=False, **content)
    whole = path.read_bytes()
    with np.errstate(all="ignore"):
        for body in (whole[: len(whole) // 2], b"", b"text", whole[:3000] + bytes(200) + whole[3200:]):
            path.write_bytes(body)
            with pytest.raises(DataError, match=r"m\.npz"):
                load("mnist", path)
    for change, words in (
        ({"x_train": None}, "no array x_train"),
        ({"y_train": np.zeros(29, np.uint8)}, "images .* and labels"),
        ({"x_test": np.zeros((10, 784), np.uint8)}, "expected"),
        ({"x_test": np.zeros((10, 28, 28), np.float64)}, "uint8"),
        ({"y_test": np.full(10, 10)}, "from 0 to 9"),
        ({"y_test": np.full(10, 0.5)}, "from 0 to 9"),
        ({"x_train": np.array([{"a": 1}], dtype=object)}, "plain arrays"),
    ):
        changed = {name: value for name, value in {**content, **change}.items() if value is not None}
        np.savez(path, **changed)
        with pytest.raises(DataError, match=words) as caught:
            load("mnist", path)
        assert "m.npz" in str(caught.value)


def test_fetched_files_are_checked(tmp_path):
    source = tmp_path / "source.gz"
    source.write_bytes(b"some data")
    md5 = hashlib.md5(b"some data").hexdigest()
    fetch(source.as_uri(), md5, tmp_path / "copy.gz")
    assert (tmp_path / "copy.gz").read_bytes() == b"some data"
    with pytest.raises(DataError, match="MD5 differs"):
        fetch(source.as_uri(), "0" * 32, tmp_path / "wrong.gz")
    with pytest.raises(DataError, match="could not be fetched"):
        fetch((tmp_path / "absent").as_uri(), md5, tmp_path / "wrong.gz")
    assert not (tmp_path / "wrong.gz").exists()


def test_a_complete_folder_is_not_fetched_again(tmp_path):
    content = write_folder(tmp_path, packed=False)
    check(load("mnist", tmp_path, download=True), content)


def published() -> list[tuple[str, Path, tuple[int, int], float, float, float]]:
    """Real images: the part of MNIST that the package brings, and, where REBASIN_DATA has them, the whole data sets."""
    found = [("mnist", captioned_digits.ASSET, (1000, 1000), 0.1307, 0.3081, 3e-3)]
    folders = [os.environ.get("REBASIN_DATA"), Path(__file__).parents[2] / "shared" / "data"]
    for name, mean, std in (("mnist", 0.1307, 0.3081), ("fashion_mnist", 0.2860, 0.3528)):
        files = [Path(folder) / f"{name}.npz" for folder in folders if folder]
        found += [(name, file, (60000, 10000), mean, std, 1e-4) for file in files if file.is_file()][:1]
    return found


@pytest.mark.parametrize(("name", "file", "rows", "mean", "std", "within"), published())
def test_the_real_files(name, file, rows, mean, std, within):
    data = load(name, file)
    assert data.train_x.shape == (rows[0], 1, 28, 28)
    assert data.test_x.shape == (rows[1], 1, 28, 28)
    assert float(data.train_x.mean()) == pytest.approx(mean, abs=within)
    assert float(data.train_x.std()) == pytest.approx(std, abs=within)
    assert len(torch.bincount(data.train_y)) == 10


# CIFAR ------------------------------------------------------------------------------------------------------


def cifar_parts(name: str, rows: int = 3) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """File of the binary version -> images and labels, in the publisher's sizes but with few rows."""
    random = np.random.default_rng(1)
    classes = 10 if name == "cifar10" else 100
    files = [f"{file}.bin" for part in LAYOUTS[name].files for file in part]
    return {
        file: (
            random.integers(0, 256, (rows, 3072), np.uint8),
            random.integers(0, classes, rows).astype(np.uint8),
        )
        for file in files
    }


def write_cifar(name: str, folder: Path, version: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    parts = cifar_parts(name)
    folder.mkdir(parents=True)
    for file, (x, y) in parts.items():
        if version == "binary":
            coarse = [np.zeros((len(y), 1), np.uint8)] if name == "cifar100" else []
            (folder / file).write_bytes(np.concatenate([*coarse, y[:, None], x], axis=1).tobytes())
        else:
            content = {b"data": x, LAYOUTS[name].key: y.tolist(), b"batch_label": b"a part"}
            (folder / file.removesuffix(".bin")).write_bytes(pickle.dumps(content, protocol=2))
    return parts


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("version", ["binary", "python"])
@pytest.mark.parametrize("packed", [False, True])
def test_cifar_in_the_publishers_formats(name, version, packed, tmp_path):
    parts = write_cifar(name, tmp_path / "data" / "batches", version)
    path = tmp_path / "data"
    if packed:
        path = tmp_path / "archive.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            archive.add(tmp_path / "data" / "batches", "batches")
    data = load(name, path)
    train = [parts[f"{file}.bin"] for file in LAYOUTS[name].files[0]]
    assert data.train_x.shape == (3 * len(train), 3, 32, 32)
    assert data.train_y.tolist() == np.concatenate([y for _, y in train]).tolist()
    image = torch.from_numpy(train[0][0][0].reshape(3, 32, 32)).float() / 255
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(data.train_x[0], (image - mean) / std)
    assert len(data.classes) == (10 if name == "cifar10" else 100)


def test_cifar_finds_its_place_and_tells_what_is_wrong(tmp_path, monkeypatch):
    write_cifar("cifar10", tmp_path / "cifar10", "binary")
    monkeypatch.setenv("REBASIN_DATA", str(tmp_path))
    assert load("cifar10").test_x.shape == (3, 3, 32, 32)
    with pytest.raises(DataError, match="cifar100 needs a path"):
        load("cifar100")
    (tmp_path / "cifar10" / "data_batch_3.bin").write_bytes(b"12345")
    with pytest.raises(DataError, match=r"data_batch_3.bin of .* has 5 bytes"):
        load("cifar10")
    (tmp_path / "cifar10" / "data_batch_3.bin").unlink()
    with pytest.raises(DataError, match="no data_batch_3.bin"):
        load("cifar10")


def test_a_damaged_archive_is_never_read_wrongly(tmp_path):
    write_cifar("cifar10", tmp_path / "batches", "binary")
    path = tmp_path / "archive.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(tmp_path / "batches", "batches")
    good = path.read_bytes()
    load("cifar10", path)
    names = 40  # the first bytes are gzip's own: a name and a time
    for place in range(names, len(good), (len(good) - names) // 24):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x55]) + good[place + 1 :])
        with pytest.raises(DataError, match=r"archive.tar.gz is no .tar.gz that can be read to its end"):
            load("cifar10", path)
    path.write_bytes(b"text")
    with pytest.raises(DataError, match=r"archive.tar.gz is no .tar.gz that can be read to its end \(\S"):
        load("cifar10", path)


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    folder = tmp_path / "cifar100"
    folder.mkdir()
    (folder / "train").write_bytes(pickle.dumps({b"data": Evil(), b"fine_labels": [1]}, protocol=2))
    with pytest.raises(DataError, match="no array"):
        load("cifar100", folder)
    assert not (tmp_path / "ran").exists()


def test_splits_are_disjoint_and_by_class():
    data = load("digits")
    a, b = split(data, "classes", 0.8)
    assert len(a.train_y) + len(b.train_y) == len(data.train_y)
    low = data.train_y < 5
    assert (a.train_y < 5).sum() / low.sum() == pytest.approx(0.8, abs=0.01)
    assert (b.train_y < 5).sum() / low.sum() == pytest.approx(0.2, abs=0.01)
    first, second = split(data, "halves")
    rows = [{tuple(row.tolist()) for row in part.train_x.flatten(1)} for part in (first, second)]
    assert not rows[0] & rows[1]
    assert first.test_x is data.test_x and first.fingerprint != second.fingerprint
    assert not torch.equal(half(data, 0).train_x, half(data, 1).train_x)


def _npz(path, **arrays):
    np.savez(path / "images.npz", **arrays)
    return path / "images.npz"


def _folder(path, rows=None, **texts):
    """Three images with captions beside them, or in a table of these rows."""
    for number in range(3):
        Image.fromarray(PIXELS[number]).save(path / f"{number}.png")
        if rows is None:
            (path / f"{number}.txt").write_text("a digit")
    if rows is not None:
        (path / "metadata.jsonl").write_text("\n".join(rows))
    for name, content in texts.items():
        (path / f"1.{name}").write_bytes(content)
    return path


def _row(number: int, text: Any = "a digit", name="{}.png"):
    return json.dumps({"file_name": name.format(number), "text": text})


PIXELS = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
ROWS = [_row(number) for number in range(3)]

BAD_IMAGES = {
    "captions that are one text": (lambda p: _npz(p, images=PIXELS, captions=np.array("one")), "they must be texts"),
    "captions of bytes": (lambda p: _npz(p, images=PIXELS, captions=np.array([b"a"] * 3)), "they must be texts"),
    "pickled": (lambda p: _npz(p, images=PIXELS, captions=np.array(["a", None, "b"], object)), "can't be read"),
    "no images": (lambda p: _npz(p, images=PIXELS[:0], captions=np.array([], "U1")), "has 0 images"),
    "one image": (lambda p: _npz(p, images=PIXELS[:1], captions=np.array(["a"])), "has 1 images"),
    "images without rows": (lambda p: _npz(p, images=PIXELS[:, :0], captions=np.array(["a"] * 3)), "must be uint8"),
    "an archive that is cut off": (lambda p: _cut(_npz(p, images=PIXELS)), "can't be read"),
    "an array, no archive": (lambda p: _array(p / "images.npz"), "can't be read"),
    "no image": (lambda p: _folder(p, png=b"none"), "1.png can't be read as an image"),
    "an image that is cut off": (lambda p: _cut(_folder(p) / "1.png").parent, "1.png can't be read as an image"),
    "16 bits": (lambda p: _deep(_folder(p)), "more than 8 bits"),
    "a caption that is no UTF-8": (lambda p: _folder(p, txt=b"\xe9"), "1.txt can't be read as UTF-8"),
    "a number for a caption": (lambda p: _folder(p, [*ROWS[:2], _row(2, 3)]), "line 3: 'text' is 3, not text"),
    "two captions of one": (lambda p: _folder(p, [*ROWS, _row(1, "b")]), "two captions of '1.png'"),
    "a caption of no image": (lambda p: _folder(p, [*ROWS, _row(7)]), "has a caption of '7.png', but"),
    "a table that is too deep": (lambda p: _folder(p, ["[" * 100000]), "line 1: it is no JSON"),
}  # fmt: skip


def _cut(path):
    path.write_bytes(path.read_bytes()[:-60])
    return path


def _array(path):
    with open(path, "wb") as file:
        np.save(file, PIXELS)
    return path


def _deep(path):
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(path / "1.png")
    return path


@pytest.mark.parametrize(("make", "said"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_what_is_wrong_with_images_and_captions_is_told_before_they_are_needed(make, said, tmp_path):
    with pytest.raises(DataError, match=re.escape(said)):
        captioned_folder.check(make(tmp_path))


def test_a_mark_of_the_byte_order_is_no_part_of_a_text(tmp_path):
    folder = _folder(tmp_path, [_row(n, name="./{}.png") for n in range(3)])
    (folder / "prompts.txt").write_text("\ufeff# none\na dog\n", encoding="utf-8")
    assert read_prompts(folder / "prompts.txt") == ["a dog"]
    (folder / "prompts.txt").unlink()
    captioned_folder.check(tmp_path)
