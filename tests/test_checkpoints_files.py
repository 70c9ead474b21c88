"""Damaged, foreign and huge files; killed and starved writers: one sentence, inputs untouched, no half-written file."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rebasin.checkpoints import atomic_path, load_pickled, load_safetensors, save_safetensors
from rebasin.errors import CheckpointError
from rebasin.tensors import writer
from rebasin.types import is_finite

STATE = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.arange(6, dtype=torch.float16)}


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a file and leave its data alone."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    text = change(header)
    encoded = (text if isinstance(text, str) else json.dumps(header)).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + raw[8 + length :])


def _set(name: str, field: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda header: header[name].__setitem__(field, value)


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "type": (_set("b", "dtype", "F17"), r"tensor 'b' has type 'F17'"),
    "shape": (_set("b", "shape", [7]), r"tensor 'b' of shape \(7,\) and type F16 takes 14 bytes"),
    "negative": (_set("b", "shape", [-2, -3]), r"tensor 'b' has the shape \[-2, -3\]"),
    "fraction": (_set("b", "shape", [6.0]), r"tensor 'b' has the shape"),
    "offsets": (_set("b", "data_offsets", [48, 2**70]), r"tensor 'b' has the offsets"),
    "overlap": (_set("b", "data_offsets", [40, 52]), r"'a.weight' and 'b' overlap"),
    "hole": (_set("b", "data_offsets", [52, 64]), r"4 bytes before tensor 'b' that belong to no tensor"),
    "wide type": (_set("b", "dtype", "F32"), r"tensor 'b' of shape \(6,\) and type F32 takes 24 bytes"),
    "missing field": (lambda h: h["b"].pop("shape"), r"entry of tensor 'b'"),
    "lost tensor": (lambda h: h.pop("b"), r"12 bytes at its end belong to no tensor"),
    "metadata": (lambda h: h.__setitem__("__metadata__", {"a": 1}), r"metadata in its header is not text"),
    "twice": (
        lambda h: json.dumps(h)[:-1] + ', "b": ' + json.dumps(h["b"]) + "}",
        r"names 'b' twice",
    ),
    "no json": (lambda h: "{" + json.dumps(h), r"header is no JSON, so"),
    "list": (lambda h: "[]", r"header is no JSON object"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_header_is_one_sentence_about_the_file_and_the_tensor(tmp_path, damage):
    path = save_safetensors(tmp_path / "x.safetensors", STATE)
    change, message = DAMAGE[damage]
    rewrite(path, change)
    with pytest.raises(
        CheckpointError, match=r"x\.safetensors is no readable safetensors file: .*" + message
    ):
        load_safetensors(path)


def test_cut_files_and_flipped_bits_in_the_length(tmp_path):
    path = save_safetensors(tmp_path / "x.safetensors", STATE)
    raw = path.read_bytes()
    for count, message in (
        (0, "is empty"),
        (5, "has 5 bytes"),
        (30, "should have"),
        (len(raw) - 1, "cut off"),
    ):
        path.write_bytes(raw[:count])
        with pytest.raises(CheckpointError, match=message):
            load_safetensors(path)
    path.write_bytes(raw + b"x")
    with pytest.raises(CheckpointError, match="1 bytes at its end"):
        load_safetensors(path)
    for bit in range(64):  # no value of the length but the right one is taken
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError):
            load_safetensors(path)


def test_every_flipped_byte_of_a_header_is_refused_or_is_a_name(tmp_path):
    path = save_safetensors(tmp_path / "x.safetensors", STATE)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    for position in range(8, 8 + length):
        flipped = bytearray(raw)
        flipped[position] ^= 0x10
        path.write_bytes(flipped)
        try:
            state = load_safetensors(path)
        except CheckpointError:
            continue
        found = sorted((state.shape_of(name), state.dtype_of(name)) for name in state)  # pyright: ignore
        assert found == [((3, 4), torch.float32), ((6,), torch.float16)]


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = save_safetensors(tmp_path / "x.safetensors", STATE)
    state = load_safetensors(path)
    os.truncate(path, path.stat().st_size - 4)
    assert torch.equal(state["a.weight"], STATE["a.weight"])
    with pytest.raises(CheckpointError, match=r"x\.safetensors became shorter while tensor 'b'"):
        state["b"]


def test_reading_takes_memory_for_one_tensor_at_a_time(tmp_path):
    size = 2**22
    path = save_safetensors(tmp_path / "x.safetensors", {f"t{i}": torch.ones(size) for i in range(16)})
    code = f"""
        import re, torch
        from rebasin.checkpoints import load_safetensors, save_safetensors
        def peak():
            return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
        state = load_safetensors({str(path)!r})
        before = peak()
        save_safetensors({str(tmp_path / "y.safetensors")!r}, state, dtype=torch.float16)
        print(peak() - before)
    """
    grown = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    # A tensor (16 MB), its conversion and what is freed late (45 to 84 MB were seen); all sixteen would be 268 MB.
    assert int(grown.stdout) < 130_000


def test_types_are_converted_and_an_overflow_is_an_error_that_names_the_tensor(tmp_path):
    state = {"w": torch.tensor([1.5, -65504.0]), "ids": torch.arange(3)}
    for name, dtype in writer.FORMATS.items():
        path = tmp_path / f"{name}.safetensors"
        if "fp8" in name:
            with pytest.raises(CheckpointError, match=r"'w' has the value 65504, but float8_"):
                save_safetensors(path, state, dtype=dtype)
        read = load_safetensors(save_safetensors(path, {**state, "w": state["w"] / 1000}, dtype=dtype))
        assert read["w"].dtype == dtype
        assert torch.equal(read["w"].float(), (state["w"] / 1000).to(dtype).float())
        assert torch.equal(read["ids"], state["ids"])
    target = tmp_path / "x.safetensors"
    with pytest.raises(
        CheckpointError, match=r"'w' has the value 70000, but float16 ends at 65504.*bf16 or fp32"
    ):
        save_safetensors(target, {"w": torch.tensor([float("nan"), 7e4])}, dtype=torch.float16)
    with pytest.raises(CheckpointError, match=r"'w' has values that are infinite or no numbers"):
        save_safetensors(target, {"w": torch.tensor([float("nan")])}, finite=True)
    assert not target.exists()


def test_a_chosen_type_for_each_tensor_and_the_given_order(tmp_path):
    state = {"z": torch.ones(3), "a": torch.ones(2), "m": torch.ones(1)}
    path = save_safetensors(
        tmp_path / "x.safetensors",
        state,
        dtype=lambda name, own: torch.float16 if name == "a" else own,
        keep_order=True,
    )
    read = load_safetensors(path)
    assert list(read) == ["z", "a", "m"]
    assert [read.dtype_of(n) for n in read] == [torch.float32, torch.float16, torch.float32]


def test_old_pickles_are_read_lazily_in_both_formats(tmp_path):
    wanted = {"a": torch.randn(4, 5), "t": torch.arange(6).reshape(2, 3).t(), "e": torch.zeros(0, 2)}
    wanted["view"] = torch.randn(10)[3:6]
    for name, zipped in (("new", True), ("old", False)):
        path = tmp_path / f"{name}.ckpt"
        torch.save({"state_dict": wanted, "global_step": 7}, path, _use_new_zipfile_serialization=zipped)
        state = load_pickled(path)
        assert list(state) == list(wanted)
        assert state.left_out == ("global_step",)
        for key, tensor in wanted.items():
            assert state.shape_of(key) == tuple(tensor.shape)
            assert state.dtype_of(key) == tensor.dtype
            assert torch.equal(state[key], tensor), key
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(CheckpointError, match=rf"{name}\.ckpt"):
            load_pickled(path)


class Harmful:
    def __reduce__(self):
        return (os.mkdir, ("/nonexistent/owned",))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_with_what_it_wants_to_call(tmp_path, zipped):
    path = tmp_path / "x.ckpt"
    torch.save(
        {"state_dict": {"a": torch.ones(1)}, "callback": Harmful()},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(CheckpointError, match=r"x\.ckpt is refused: .* call posix\.mkdir"):
        load_pickled(path)


def test_pickles_of_something_else(tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {}, "steps": [1, 2]}, path)
    with pytest.raises(CheckpointError, match="holds no named tensors"):
        load_pickled(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match=r"x\.ckpt"):
        load_pickled(path)


class Endless(dict[str, Tensor]):
    """A state whose second tensor never comes."""

    def __getitem__(self, name: str) -> Tensor:
        if name == "b":
            time.sleep(60)
        return super().__getitem__(name)


KILLED = """
    import sys
    sys.path[:0] = [{tests!r}, {root!r}]
    from test_checkpoints_files import Endless, STATE
    from rebasin.checkpoints import save_safetensors
    class Slow(Endless):
        shape_of = lambda self, name: tuple(STATE[name].shape)
        dtype_of = lambda self, name: STATE[name].dtype
    save_safetensors({target!r}, Slow(STATE))
"""


def test_a_killed_writer_leaves_the_old_file_and_the_next_run_cleans_up(tmp_path):
    target = save_safetensors(tmp_path / "x.safetensors", {"old": torch.ones(2)})
    before = target.read_bytes()
    tests = Path(__file__).parent
    code = textwrap.dedent(KILLED).format(tests=str(tests), root=str(tests.parent), target=str(target))
    writing = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 60
        while len(os.listdir(tmp_path)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(os.listdir(tmp_path)) == 2
        with atomic_path(target):  # a live writer's file stays
            assert len(os.listdir(tmp_path)) == 3
    finally:
        writing.send_signal(signal.SIGKILL)
        writing.wait()
    left = [name for name in os.listdir(tmp_path) if name != "x.safetensors"]
    assert len(left) == 1 and ".partial" in left[0]
    save_safetensors(target, STATE)
    assert os.listdir(tmp_path) == ["x.safetensors"]
    assert target.read_bytes() != before


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    target = tmp_path / "x.safetensors"
    state = {f"t{i}": torch.ones(100_000) for i in range(4)}
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, old[1]))  # the third tensor meets it
    try:
        with pytest.raises(CheckpointError, match=r"x\.safetensors can't be written: File too large"):
            save_safetensors(target, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**6}))
    with pytest.raises(
        CheckpointError, match=r"needs 1\.6 MB and 67\.1 MB to spare, but its disk has 1\.0 MB free"
    ):
        save_safetensors(target, state)
    assert os.listdir(tmp_path) == []


def test_a_state_that_fails_midway_leaves_nothing(tmp_path):
    class Broken(dict[str, Tensor]):
        read = 0

        def __getitem__(self, name: str) -> Tensor:
            self.read += 1
            if self.read > 3:  # twice for the shapes
                raise RuntimeError("the cable was pulled")
            return super().__getitem__(name)

    with pytest.raises(RuntimeError, match="cable"):
        save_safetensors(tmp_path / "x.safetensors", Broken(STATE))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]
)
def test_one_value_that_is_no_number_is_found_anywhere(dtype):
    for size in (1, 7, 64, 1000):
        for position in {0, size // 2, size - 1}:
            for value in (float("nan"), float("inf"), -float("inf")):
                tensor = torch.ones(size).to(dtype)
                assert is_finite(tensor)
                tensor[position] = value
                assert not is_finite(tensor)
    assert is_finite(torch.ones(0).to(dtype))
