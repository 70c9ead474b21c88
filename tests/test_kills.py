"""Killed at any moment, a command that is given again leaves what it would have left anyway, and nothing besides."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_files import Files, read
from cli_files import rebasin as command_line
from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure
from rich.console import Console as RichConsole
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from tiny_pictures import save_pixel

from rebasin import report
from rebasin.checkpoints import load_metadata
from rebasin.errors import CheckpointError
from rebasin.files import MARK, config_dir, keep, prepare_folder
from rebasin.jobs import resume
from rebasin.jobs.commands import COMPARE_METHODS, RUN, SEARCH
from rebasin.jobs.commands import Command as Configured
from rebasin.reporting.console import Console

TINY = ["model=mlp", "model.width=8", "model.depth=2", "model.recipe.epochs=2", "logger=none"]
STE = [*TINY, "algo=ste", "algo.steps=6", "algo.refine=2", "evaluate.points=3", "resume=true"]
TRIALS = ["search.trials=9", "search.minutes=0", "search.batch=200", "search.warm=6", "search.finalists=2"]

# Forking costs no imports, but where torch has a GPU it may have threads, too.
SAFE = sys.platform == "linux" and not torch.cuda.is_available()
PROCESSES: Any = multiprocessing.get_context("fork" if SAFE else "spawn")


def merge(a: Path, b: Path, folder: Path) -> None:
    command_line("merge", a, b, "-o", folder / "merged.safetensors")


def configured(command: Configured, config: str, overrides: list[str], folder: Path) -> None:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose(config, overrides=overrides)
    with open(os.devnull, "w") as nowhere:
        command(cfg, folder, Console(RichConsole(file=nowhere)), "python -m rebasin ...")


def plainly() -> None:
    """All that a process needs: one thread, a state kept at each step, no time lost on drawing."""
    torch.set_num_threads(1)
    resume.EVERY, resume.SHARE = 0.0, math.inf
    Figure.savefig = save_pixel  # pyright: ignore[reportAttributeAccessIssue]


def child(job: Callable[[Path], None], folder: Path, caches: Path, pipe: Connection, last: int) -> None:
    """Do a job, until it is killed before its change number `last` on the disk; tell when it begins and ends."""
    plainly()
    os.environ["REBASIN_CACHE"] = str(caches)
    places, changes = (str(folder), str(caches)), 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        if event not in CHANGES or not isinstance(arguments[0], (str, Path)):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        if str(arguments[0]).startswith(places):
            changes += 1
            if changes == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    pipe.send(0)
    job(folder)
    pipe.send(changes)


CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "sqlite3.connect"}
"""What the interpreter tells of just before it does it."""


def in_a_process(
    job: Callable[[Path], None], folder: Path, caches: Path, seconds: float = math.inf, last: int = 0
) -> int:
    """Do a job in a process that is killed after so many seconds, or before a change; returns its changes, 0 if it was
    killed."""
    here, there = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=child, args=(job, folder, caches, there, last))
    process.start()
    there.close()
    try:
        here.recv()
        done = here.poll(min(seconds, 120))
        if math.isfinite(seconds):
            process.kill()
        try:
            return here.recv() if done or not math.isfinite(seconds) else 0
        except EOFError:
            return 0
    finally:
        process.kill()
        process.join()
        here.close()


def left(folder: Path) -> dict[str, Any]:
    """What is in a folder, without what tells when it was made: the tensors and their metadata, results, and names."""
    return {
        str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def content(path: Path) -> Any:
    if MARK in path.name:  # what a kill cut off, which is to go, whatever it holds
        return None
    if path.suffix == ".safetensors":
        tensors = {name: (t.dtype, t.shape, t.numpy().tobytes()) for name, t in read(path).items()}
        return timeless(dict(load_metadata(path))), tensors
    return timeless(json.loads(path.read_text())) if path.name == "results.json" else None


def timeless(value: Any) -> Any:
    """Without what time it took, also in JSON within JSON, as metadata are."""
    if isinstance(value, str) and value[:1] in ("{", "["):
        return timeless(json.loads(value))
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if not k.startswith(TIMES)}
    return [timeless(item) for item in value] if isinstance(value, list) else value


TIMES = ("seconds", "spent", "resumed", "path")


@pytest.fixture(scope="module", autouse=True)
def plain() -> Iterator[None]:
    """This process does without the same things as those that are killed."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((resume, "EVERY"), (resume, "SHARE"), (Figure, "savefig")):
            patch.setattr(owner, name, getattr(owner, name))  # as it was, at the end
        plainly()
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("files"), ("text_encoder",))


def job_of(kind: str, request: pytest.FixtureRequest) -> Callable[[Path], None]:
    if kind == "merge":
        files = request.getfixturevalue("files")
        return partial(merge, files.a, files.b)
    return partial(
        configured, *{"run": (RUN, "config", STE), "search": (SEARCH, "search", [*TINY, *TRIALS])}[kind]
    )


# How often: killed at a random time, and before a random one of its changes on the disk, which are over in no time.
KILLS = {"merge": (2, 3), "run": (1, 2), "search": (1, 1)}


@pytest.mark.parametrize("kind", KILLS)
def test_a_job_that_is_killed_and_given_again_leaves_what_it_would_have_left(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, draw = job_of(kind, request), random.Random(kind)
    caches, whole = tmp_path / "caches", tmp_path / "whole"
    whole.mkdir()
    monkeypatch.setenv("REBASIN_CACHE", str(caches))
    job(whole)  # what is imported and trained now is so for all
    wanted, kept = left(whole), sorted(left(caches))
    assert not [name for name in kept if MARK in name or "unfinished" in name]

    def folders(name: str) -> tuple[Path, Path]:
        (tmp_path / name).mkdir()
        return tmp_path / name, Path(shutil.copytree(caches, tmp_path / f"{name}-caches"))

    began = time.monotonic()
    changes = in_a_process(job, *folders("counted"))
    seconds = time.monotonic() - began
    assert left(tmp_path / "counted") == wanted and changes > 20
    times, places = KILLS[kind]
    plans: list[dict[str, Any]] = [{"seconds": seconds * draw.random()} for _ in range(times)]
    plans += [{"last": draw.randint(1, changes)} for _ in range(places)]
    killed = 0
    for number, plan in enumerate(plans):
        folder, own = folders(f"killed-{number}")
        killed += not in_a_process(job, folder, own, **plan)
        monkeypatch.setenv("REBASIN_CACHE", str(own))
        if left(folder) != wanted:  # it may have been killed when all was written
            job(folder)
        found = left(folder)
        assert found.keys() == wanted.keys(), plan
        for name in wanted:
            assert found[name] == wanted[name], (plan, name)
        assert sorted(left(own)) == kept, plan
    assert killed >= places


def limited(size: int) -> Any:
    """A context in which files can't grow beyond `size` bytes, as on a full disk."""

    class Limited:
        def __enter__(self) -> None:
            self.old = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, self.old[1]))

        def __exit__(self, *_: object) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, self.old)

    return Limited()


def test_a_merge_on_a_full_disk_leaves_the_old_file(files: Files, tmp_path: Path) -> None:
    merge(files.a, files.b, tmp_path)
    before = left(tmp_path)
    out = tmp_path / "merged.safetensors"
    with limited(files.a.stat().st_size // 2):
        text = command_line("merge", files.a, files.b, "-o", out, "--overwrite", "--alpha", 0.3, expect=2)
    assert "merged.safetensors can't be written: File too large." in text and "Traceback" not in text
    assert left(tmp_path) == before


# What is interrupted, at which event of which stage, what is kept then, and what is said.
CTRL_C: dict[str, tuple[Configured, list[str], str, int, str, str]] = {
    "straight_through": (RUN, STE[:-1], "straight-through", 5, "unfinished/*.safetensors", "with resume=true goes on"),
    "merge_many": (
        RUN, [*TINY, "algo=merge_many", "model.seeds=[0,1,2]", "algo.repair=false"], "merge many", 5,
        "unfinished/*.safetensors", "with resume=true goes on",
    ),
    "search": (SEARCH, [*TINY, *TRIALS], "trial", 4, "study.db", "was aligned and tried is kept, and the same command"),
    "compare_methods": (
        COMPARE_METHODS, [*TINY, "algo=weight_matching", "methods.names=[slerp]"], "weight matching", 1,
        "mlp-digits-*.safetensors",
        "begins this run anew",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CTRL_C)
def test_ctrl_c_keeps_what_was_done_and_ends_with_130(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, overrides, stage, number, kept, words = CTRL_C[kind]
    monkeypatch.setenv("REBASIN_CACHE", str(tmp_path))
    shown, events, stops = Console.progress, [], True

    def progress(self: Console, event: Any) -> None:
        shown(self, event)
        events.append(event["stage"])
        if stops and events.count(stage) == number:
            raise KeyboardInterrupt

    def given(*more: str) -> None:
        events.clear()
        told = ["rebasin", *overrides, "logger=none", f"hydra.run.dir={tmp_path / 'run'}", *more]
        monkeypatch.setattr(sys, "argv", told)
        command.main()

    monkeypatch.setattr(Console, "progress", progress)
    with pytest.raises(SystemExit) as stop:
        given()
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 130 and told.startswith("Interrupted; ") and words in told and told[-1] == "."
    assert [*tmp_path.glob(kept), *(tmp_path / "run").glob(kept)]
    assert not list(tmp_path.rglob(f"*{MARK}*")) and not (tmp_path / "run" / "results.json").exists()
    if kind in ("compare_methods", "search"):  # how a search goes on, see above
        return
    stops = False
    given(*(["resume=true"] if "resume" in words else []))
    assert (tmp_path / "run" / "results.json").is_file() and not list(tmp_path.glob("unfinished/*"))
    assert 0 < events.count(stage) <= {"straight_through": 3, "merge_many": 9}[kind]


def test_a_search_whose_disk_is_full_when_a_trial_is_kept_ends_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = partial(OperationalError, "COMMIT", {}, sqlite3.OperationalError("database or disk is full"))
    commit, commits = Session.commit, 0

    def committed(self: Session) -> None:
        nonlocal commits
        commits += 1
        if commits == 60:
            raise full()
        commit(self)

    monkeypatch.setattr(Session, "commit", committed)
    monkeypatch.setattr(sys, "argv", ["rebasin", *TINY, *TRIALS, "logger=none", f"hydra.run.dir={tmp_path}"])
    with pytest.raises(SystemExit) as stop:
        SEARCH.main()
    told = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in told and commits >= 60
    sentence = told.strip().splitlines()[-1]
    assert sentence.startswith(
        f"Error: {tmp_path / 'study.db'} can't be written (disk is full); make room there"
    )


@pytest.mark.filterwarnings("ignore:.*can't be written")
@pytest.mark.parametrize("kind", ["run", "merge"])
def test_a_whole_job_where_no_home_can_be_written(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.write_text("a file: nothing can be written below it, even by root")
    for name in ("REBASIN_CACHE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    (tmp_path / "out").mkdir()
    job_of(kind, request)(tmp_path / "out")
    assert (tmp_path / "out" / ("merged.safetensors" if kind == "merge" else "results.json")).is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "out"] and home.is_file()


@pytest.mark.filterwarnings("ignore:.*can't be written")
@pytest.mark.parametrize("size", [1_000, 200_000])
@pytest.mark.parametrize("kind", ["run", "search"])
def test_a_job_on_a_full_disk_is_told_so_and_leaves_nothing_half_written(
    kind: str, size: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    try:
        with limited(size):
            job_of(kind, request)(tmp_path)
    except CheckpointError as error:
        assert "can't be written" in str(error) and str(error).endswith(".") and len(str(error)) < 400
        assert not list(tmp_path.rglob(f"*{MARK}*"))
    else:
        assert size > 1_000
    if size == 200_000:
        job_of(kind, request)(tmp_path)
        assert (tmp_path / "results.json").is_file()


def test_interrupted_while_pages_are_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rebasin.reporting.command.drawn", interrupted)
    assert report.main([str(tmp_path)]) == 130
    assert capsys.readouterr().err.strip().startswith("Interrupted; no file is half-written")


def test_a_cache_that_can_not_be_written_is_one_warning_and_a_folder_of_results_one_sentence(
    tmp_path: Path,
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("mine")
    with pytest.warns(UserWarning, match="REBASIN_CACHE") as told:
        for name in ("a.txt", "b.txt"):
            assert not keep(in_the_way / "specs" / name, lambda path: path.write_text("text"))
    assert len(told) == 1
    with pytest.raises(CheckpointError, match="choose another folder for the results"):
        prepare_folder(in_the_way / "run")
    assert in_the_way.read_text() == "mine"
