"""What the page of `rebasin ui` does, without a browser or Gradio: forms, folders, jobs. The page itself is tested in
test_ui_browser.py.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_files import Files, content, rebasin

from rebasin.cli import apply, compare, merge, pipeline
from rebasin.cli import ui as command
from rebasin.cli.inspect import describe
from rebasin.cli.merge_weights import FUNCTIONS
from rebasin.cli.request import Request
from rebasin.errors import ConfigError, RebasinError
from rebasin.merging.block_settings import preset
from rebasin.reporting.console import EVENTS
from rebasin.ui import blocks, form, shown
from rebasin.ui.desk import Links
from rebasin.ui.job_list import Job, JobList
from rebasin.ui.options import Command, Option, written
from rebasin.ui.roots import Roots

MERGE, COMPARE, APPLY = (
    command.offered(name, function)
    for name, function in (("merge", merge.merge), ("compare", compare.compare), ("apply", apply.apply))
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text encoders, a LoRA, what is damaged, and what lies outside."""
    base = tmp_path_factory.mktemp("ui")
    root = base / "models"
    root.mkdir()
    Files(root, parts=("text_encoder",), plant=False)
    (root / "broken.safetensors").write_bytes(b"no")
    (base / "secret.safetensors").write_bytes(b"x")
    (root / "link.safetensors").symlink_to(base / "secret.safetensors")
    (root / "folder").mkdir()
    (root / "folder" / "config.json").symlink_to(base / "secret.safetensors")
    return root


@pytest.fixture
def roots(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Roots:
    monkeypatch.chdir(folder)
    return Roots.of([folder])


def given(**changed: Any) -> dict[str, Any]:
    """A form as it is when the page is opened, with two models chosen."""
    fields = {
        one.name: [] if one.many else one.default
        for one in MERGE.options
        if one.name not in (*form.OWN, *form.LEFT_OUT)
    }
    own = {"a": "a.safetensors", "b": "b.safetensors", "more": [], "method": "weighted_sum", "alpha": 0.5}
    rest = {"weights": "", "way": "permutation", "steps": None, "samples": None, "size": None}
    return {**fields, **own, **rest, "output": "ab.safetensors", **changed}


def line(roots: Roots, **changed: Any) -> list[str]:
    return MERGE.line(form.values_of_merge(given(**changed), FUNCTIONS), roots)


def asked(words: list[str], patch: pytest.MonkeyPatch) -> Request:
    """What the command line asks for."""
    found: list[Request] = []
    patch.setattr(pipeline, "merge", lambda console, request: found.append(request))
    rebasin(*words)
    return found[0]


BY_FORM: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"alpha": 0.3}, {"alpha": 0.3}),
    ({"method": "add_difference", "alpha": 1.0, "base": "a.safetensors"}, {"base": Path("a.safetensors")}),
    ({"method": "ties_sum", "options": ["k=0.2"], "alpha": 0.7}, {"options": ("k=0.2",), "alpha": 0.7}),
    ({"method": "slerp", "more": []}, {}),
    ({"weights": "IN=0.2,OUT=0.7"}, {"weights": "IN=0.2,OUT=0.7", "alpha": 0.5}),
    ({"more": ["a.safetensors"], "weights": "4,2,1"}, {"weights": "4,2,1"}),
    ({"more": ["a.safetensors"], "alpha": 0.9}, {}),
    ({"way": "none"}, {"align": False}),
    ({"way": "maps"}, {"maps": True}),
    (
        {"way": "learned", "steps": 20, "size": 64, "prompts": "a.safetensors"},
        {"learned": True, "learn": ("algo.steps=20", "model.size=64"), "prompts": Path("a.safetensors")},
    ),
    ({"way": "given", "permutation": "b.safetensors"}, {"permutation": Path("b.safetensors")}),
    ({"permutation": "b.safetensors", "prompts": "a.safetensors"}, {}),
    ({"check": False, "prune": True, "fix_clip": True}, {"check": False, "prune": True, "fix_clip": True}),
    ({"dtype": "fp16", "seed": 7, "threads": 2.0}, {"dtype": "fp16", "seed": 7, "threads": 2}),
    (
        {"components": ["unet", "vae"], "start": "identity"},
        {"components": ("unet", "vae"), "start": "identity"},
    ),
    (
        {"fisher": ["a.safetensors", "b.safetensors"]},
        {"fisher": (Path("a.safetensors"), Path("b.safetensors"))},
    ),
]


@pytest.mark.parametrize(("fields", "expected"), BY_FORM, ids=lambda one: ",".join(one) or "-")
def test_a_form_asks_for_what_the_command_line_asks(
    fields: dict[str, Any], expected: dict[str, Any], roots: Roots, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = asked(line(roots, **fields), monkeypatch)
    inputs = tuple(map(Path, ("a.safetensors", "b.safetensors", *fields.get("more", ()))))
    method = fields.get("method", "weighted_sum")
    assert request == Request(inputs, Path("ab.safetensors"), **{"method": method, **expected})


def test_every_option_has_a_place_on_the_page() -> None:
    placed = {name for names in form.GROUPS.values() for name in names}
    assert {*placed, *form.OWN, *form.LEFT_OUT} <= {one.name for one in MERGE.options}
    assert not placed & {*form.OWN, *form.LEFT_OUT}


def test_options_are_those_that_the_commands_declare() -> None:
    assert MERGE.option("align") == Option(
        "align", "--align", "--no-align", "Bring the neurons into A's order first.", "flag", True
    )
    kinds = {"output": "path", "alpha": "number", "seed": "whole", "start": "choice", "dtype": "text"}
    assert {name: MERGE.option(name).kind for name in kinds} == kinds
    assert MERGE.option("inputs").on == "" and MERGE.option("inputs").many
    assert [one.name for one in APPLY.options][:3] == ["permutation", "file", "output"]
    assert COMPARE.option("json_file").on == "--json"


SENTENCES: list[tuple[dict[str, Any], str]] = [
    ({"b": None}, "Choose two models"),
    ({"output": " "}, "under which name"),
    ({"way": "given"}, "Choose the alignment"),
    ({"options": ["score=os:system"]}, "would run code"),
    ({"weights": "/etc/weights.yaml"}, "YAML file is for the command line"),
    ({"alpha": "much"}, "Alpha is 'much', but it is a number"),
    ({"seed": 1.5}, "it is a whole number"),
    ({"seed": float("nan")}, "it is a whole number"),
    ({"start": "anywhere"}, "--start is 'anywhere', which it can't be"),
    *(
        ({field: path}, "leads out of")
        for field in ("a", "output", "base", "vae")
        for path in ("/etc/passwd", "../secret.safetensors", "link.safetensors", "folder")
    ),
    ({"fisher": ["../secret.safetensors"]}, "leads out of"),
    ({"more": ["~/x.safetensors"]}, "leads out of"),
    ({"a": "a\0b"}, "is no path"),
]


@pytest.mark.parametrize(("fields", "sentence"), SENTENCES)
def test_what_can_not_be_is_told_before_a_job(fields: dict[str, Any], sentence: str, roots: Roots) -> None:
    with pytest.raises(ConfigError, match=sentence) as told:
        line(roots, **fields)
    assert len(str(told.value)) <= 300 or "leads out of" in sentence  # which names the folders


def test_a_line_is_measured_by_a_run(roots: Roots) -> None:
    words = form.measuring("a.safetensors", "it's b.safetensors", "distillation", 2, "runs/x")
    from hydra.core.override_parser.overrides_parser import OverridesParser

    found = {one.key_or_group: one.value() for one in OverridesParser.create().parse_overrides(words)}
    assert found["model.b"] == "it's b.safetensors" and found["model.samples"] == 2
    assert found["hydra.run.dir"] == "runs/x" and found["objective"] == "distillation"
    assert written(words, "rebasin.run").startswith("python -m rebasin.run model=checkpoint")
    for wrong in (("a${x}", "agreement", 0), ("a", "nothing", 0), ("a", "agreement", -1)):
        with pytest.raises(ConfigError):
            form.measuring(wrong[0], "b", wrong[1], wrong[2], "c")


def test_unknown_options_are_refused(roots: Roots) -> None:
    with pytest.raises(ConfigError, match="no option 'outptu'"):
        MERGE.line({"outptu": "x"}, roots)
    odd = Command("merge", (Option("x", "--x", "", "", "number"),))
    assert odd.line({"x": 0.1 + 0.2}, roots) == ["merge", "--x", "0.3"]


def test_folders_of_the_page(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    roots = Roots.of([folder])
    assert roots.inside("new.safetensors") == folder / "new.safetensors"  # results go to the first folder
    assert roots.inside(str(folder / "a.safetensors")) == folder / "a.safetensors"
    monkeypatch.chdir(folder.parent)
    assert roots.inside("models/a.safetensors") == Path("models/a.safetensors")
    assert roots.inside("./models/../models/-odd") == Path("./models/../models/-odd")
    monkeypatch.chdir(folder)
    assert roots.inside("-odd.safetensors") == folder / "-odd.safetensors"  # no option
    models, alignments = roots.files()
    assert {"a.safetensors", "b.safetensors", "broken.safetensors", "folder"} <= set(models)
    assert alignments == []
    with pytest.raises(ConfigError, match=r"--root .*nowhere is no folder"):
        Roots.of([folder / "nowhere"])


def test_uploads_stay_in_their_folder(tmp_path: Path) -> None:
    roots = Roots.of([tmp_path])
    for number, expected in enumerate(("x.safetensors", "x-2.safetensors")):
        (source := tmp_path / f"temporary{number}").write_bytes(b"1")
        assert roots.upload(source, "../../x.safetensors") == tmp_path / "uploads" / expected
    (source := tmp_path / "temporary").write_bytes(b"1")
    for name in ("x.exe", "..", ".safetensors", "-x.safetensors"):
        with pytest.raises(ConfigError, match="is no file with weights"):
            roots.upload(source, name)


def test_sliders_are_the_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"unet.{part}.resnets.0.conv1.weight" for part in ("up_blocks.0", "mid_block")]
    names += [f"unet.down_blocks.{i}.resnets.{j}.conv1.weight" for i in range(4) for j in range(2)]
    names += [f"unet.down_blocks.{i}.downsamplers.0.conv.weight" for i in range(3)]
    names += [f"unet.up_blocks.{i}.resnets.{j}.conv1.weight" for i in range(4) for j in range(3)]
    names += ["unet.conv_in.weight", "text_encoder.x.weight"]
    names = list(dict.fromkeys(names))
    found = (tuple(names), blocks.find_blocks(names))
    monkeypatch.setattr(blocks, "_blocks", lambda models: found)
    assert found[1].kind == "sd1"
    for text in (
        "GRAD_V",
        "IN00=0.2",
        "IN03-IN07=0.25,OUT02=1",
        "BASE=0,M00=0.1",
        "",
        "GRAD_V,IN03-IN04=0.6",
    ):
        shown_as = blocks.sliders([], text, 0.5)
        assert blocks.text_of([], shown_as.values, 0.5) == text
    assert blocks.sliders([], "GRAD_V", 0.5).values == pytest.approx(preset("GRAD_V"))
    with pytest.raises(ConfigError, match="IN77"):
        blocks.sliders([], "IN77=1", 0.5)


def test_sliders_of_a_model_without_such_blocks(folder: Path) -> None:
    models = [folder / "a.safetensors", folder / "b.safetensors"]
    found = blocks.sliders(models, "", 0.4)
    assert found.names[0] == "0%" and set(found.values) == {0.4}
    text = blocks.text_of(models, [i / 11 for i in range(12)], 0.4)
    assert text.startswith("*=[0,0.0909,")
    assert blocks.sliders(models, text, 0.4).values == pytest.approx([i / 11 for i in range(12)], abs=0.03)


def wait_for(jobs: JobList, number: int, test: Callable[[Job], bool], seconds: float = 600) -> Job:
    until = time.monotonic() + seconds
    while True:
        job = jobs.get(number)
        assert job is not None
        if test(job):
            return job
        assert time.monotonic() < until, job
        time.sleep(0.05)


@pytest.fixture
def jobs() -> Any:
    made = JobList()
    yield made
    made.close()


def test_a_job_is_the_command(jobs: JobList, roots: Roots, folder: Path) -> None:
    """And a wrong one its sentence; the second waits for the first."""
    words = line(roots, alpha=0.25, output="job.safetensors")
    first = jobs.start(words, output=roots.inside("job.safetensors"))
    with pytest.raises(ConfigError, match=f"Job {first} is to write job.safetensors"):
        jobs.start(words, output=roots.inside("job.safetensors"))
    wrong = jobs.start(line(roots, b="broken.safetensors"))
    assert jobs.all()[0].status == "waiting" and jobs.all()[0].ahead == 1
    done = wait_for(jobs, first, lambda job: job.over)
    assert done.status == "done", done.log
    assert [stage.name for stage in done.stages][:3] == ["read", "hash", "spec"] and not done.error
    assert all(stage.seconds is not None for stage in done.stages)
    assert {one.question for one in done.answers} >= {"Is it legal?", "Did anything move?"}
    assert done.files == ("job.safetensors", "job.permutation.safetensors")
    rebasin(*(word.replace("job.", "by_hand.") for word in words))
    assert content(folder / "job.safetensors") == content(folder / "by_hand.safetensors")
    failed = wait_for(jobs, wrong, lambda job: job.over)
    assert failed.status == "failed" and "broken.safetensors" in failed.error
    assert "broken.safetensors" in shown.job(failed)

    links = Links(roots, jobs)
    addresses = links.of_job(first)
    assert [name for name, _ in addresses] == list(done.files)
    key = addresses[0][1].split("/")[1]
    assert links.file(key, first, 0) == Path("job.safetensors")
    assert links.file("other", first, 0) is None and links.file(key, first, 9) is None
    assert addresses[0][1] in shown.job(done, addresses)


SLEEPER = """
import os, signal, sys, time
if "deaf" in sys.argv:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
open(os.environ["REBASIN_EVENTS"], "w").write('{"kind": "stage", "name": "sleep"}\\n{"kind": "progress", "step')
print("begun", flush=True)
time.sleep(600 if "long" in sys.argv else 0)
"""


def test_cancel_is_ctrl_c_and_then_more() -> None:
    if threading.current_thread() is threading.main_thread():  # what ignores it hands that down to its jobs
        signal.signal(signal.SIGINT, signal.default_int_handler)
    jobs = JobList(program=(sys.executable, "-c", SLEEPER))
    try:
        polite, deaf, waits = (jobs.start(words) for words in (["long"], ["long", "deaf"], ["short"]))
        job = wait_for(jobs, polite, lambda job: bool(job.stages))
        assert job.stages[0].name == "sleep" and job.status == "running"
        assert jobs.all()[0].ahead == 2
        jobs.cancel(polite)
        assert wait_for(jobs, polite, lambda job: job.over).status == "cancelled"
        wait_for(jobs, deaf, lambda job: bool(job.stages))
        jobs.cancel(deaf)
        time.sleep(0.3)
        assert jobs.all()[1].status == "running"
        jobs.cancel(deaf)
        assert wait_for(jobs, deaf, lambda job: job.over).status == "cancelled"
        assert wait_for(jobs, waits, lambda job: job.over).status == "done"
        again = jobs.again(polite)
        quick = jobs.start(["short"], quick=True)
        assert wait_for(jobs, quick, lambda job: job.over).status == "done"  # before `again`, which goes on
        late = jobs.start(["short"])
        jobs.cancel(late)
        assert jobs.all()[0].status == "cancelled"
        wait_for(jobs, again, lambda job: bool(job.stages))
    finally:
        jobs.close()
    assert next(job for job in jobs.all() if job.number == again).status in ("running", "cancelled")
    with pytest.raises(ConfigError, match="closing"):
        jobs.start(["short"])


def test_what_a_command_tells_other_programs(
    tmp_path: Path, roots: Roots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(EVENTS, str(tmp_path / "events"))
    figures = tmp_path / "figures.json"
    rebasin("compare", "a.safetensors", "b.safetensors", "--json", figures)
    told = [json.loads(row) for row in (tmp_path / "events").read_text().splitlines()]
    assert [one["name"] for one in told if one["kind"] == "stage"] == ["read", "spec", "align", "measure"]
    assert {one["kind"] for one in told} >= {"stage", "done", "answer", "files"}
    html = shown.chart(json.loads(figures.read_text()))
    assert "text_encoder" in html and html.count("<tr>") > 2


def test_what_files_are(folder: Path) -> None:
    told = shown.file("a.safetensors", describe(folder / "a.safetensors"))
    assert "text_encoder" in told and "a.safetensors" in told
    with pytest.raises(RebasinError) as error:
        describe(folder / "broken.safetensors")
    assert "broken.safetensors" in shown.file("broken.safetensors", str(error.value))


def test_nothing_that_users_or_files_say_is_html() -> None:
    bad = "<script>x</script>&\"'"
    job = Job(1, ("merge", bad, bad, "--output", bad), status="failed", error=bad, log=bad, files=(bad,))
    for html in (
        shown.job(job, [(bad, "files/x")]),
        shown.file(bad, bad),
        shown.file(bad, {"bytes": 1, "what": bad, "components": [{"component": bad}], "predicts": bad}),
        shown.chart(
            {"blocks": [{"component": bad, "name": bad, "before": 1, "after": 1, "stay": 1, "neurons": 1}]}
        ),
        shown.report(bad),
    ):
        assert "<script" not in html
    assert written(["merge", "a b", "it's"]) == "rebasin merge 'a b' 'it'\"'\"'s'" or os.name == "nt"


def test_pages_of_runs(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.html").write_text(name)
    os.utime(tmp_path / "old" / "report.html", (1, 1))
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "report.html").symlink_to("/etc/hostname")
    jobs = JobList()
    try:
        links = Links(Roots.of([tmp_path]), jobs)
        pages = links.roots.runs()
        assert [page.parent.name for page in pages] == ["new", "old"]
        _, key, digest_of = links.of_page(pages[0]).split("/")
        assert links.page(key, digest_of) == pages[0]
        assert links.page("x", digest_of) is None and links.page(key, "x") is None
    finally:
        jobs.close()


def test_without_gradio_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from rebasin.ui import server

    monkeypatch.setattr(server, "find_spec", lambda name: None)
    told = rebasin("ui", expect=2)
    assert told.startswith("Error: ") and "pip install 'git-rebasin[ui]'" in told and told.count("\n") == 1
