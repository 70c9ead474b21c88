"""The options of the commands: declared once, offered by several, and explained without waiting for torch."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rebasin.cli import align, app, compare, merge, pipeline, verify
from rebasin.cli.request import Request


def test_help_imports_no_torch() -> None:
    code = "import sys, rebasin.cli; print(sorted({'torch', 'numpy', 'safetensors'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_option_of_a_merge_is_a_field_of_the_request_with_its_default() -> None:
    offered = inspect.signature(merge.merge).parameters
    fields = {field.name: field.default for field in dataclasses.fields(Request)}
    ours = {"max_sweeps", "workers", "sha256", "resume", "intermediate"}
    assert set(fields) - set(offered) == ours and set(offered) - set(fields) == {"context"}
    for name, parameter in offered.items():
        if name in ("inputs", "output"):  # which a recipe may have
            assert parameter.default is None
        elif parameter.default is not inspect.Parameter.empty:
            assert parameter.default == (fields[name] or None if fields[name] == () else fields[name]), name
    # The other commands have the same options, not copies of them.
    for function, own in (
        (align.align, {"a", "b", "output"}),
        (compare.compare, {"a", "b", "json_file", "plot"}),
        (verify.verify, {"a", "b", "joint"}),
    ):
        for name, parameter in inspect.signature(function).parameters.items():
            if name not in own:
                assert parameter == offered[name], name


def test_a_command_line_arrives_as_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Request] = []
    monkeypatch.setattr(pipeline, "merge", lambda console, request: seen.append(request))
    monkeypatch.setattr(pipeline, "align", lambda console, request: seen.append(request))
    line = "merge a b c -o out.ckpt --alpha 0.3 --option k=1 --option l=2 --only vae --no-align --seed 3 --dtype fp16"
    assert CliRunner().invoke(app, line.split()).exit_code == 0
    assert CliRunner().invoke(app, ["merge", "a", "b", "-o", "m"]).exit_code == 0
    assert CliRunner().invoke(app, ["align", "a", "x/b.safetensors", "--no-check"]).exit_code == 0
    assert seen == [
        Request(
            (Path("a"), Path("b"), Path("c")), Path("out.ckpt"), alpha=0.3, options=("k=1", "l=2"),
            components=("vae",), align=False, seed=3, dtype="fp16",
        ),
        Request((Path("a"), Path("b")), Path("m")),
        Request((Path("a"), Path("x/b.safetensors")), Path("x/b_aligned.safetensors"), check=False),
    ]  # fmt: skip
    assert seen[0].kept == Path("out.permutation.safetensors")
    assert seen[1].kept == Path("m.permutation.safetensors")
