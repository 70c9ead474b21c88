"""The page itself, in Gradio: fields, and what their clicks do. What is shown and done is in the modules beside."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ..checkpoints import FORMATS
from ..errors import ConfigError, RebasinError
from ..merging import METHODS
from ..merging.block_settings import preset_names
from ..merging.registry import plan_options
from . import blocks, form, shown
from .desk import Desk, Links
from .job_list import Job, JobList
from .options import Command, Option, written
from .roots import Roots

HERE = Path(__file__).parent

CALL = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""Of what answers at once."""

TO_JOB: dict[str, Any] = {
    "fn": None,
    "js": """() => {
  const wrong = document.querySelector('#merge-said .problem, #apply-said .problem');
  if (window.innerWidth < 900 && !wrong) document.getElementById('jobs').scrollIntoView({ behavior: 'smooth' });
}""",
}
"""In a narrow window, where it stands below the form, the job that was begun comes into sight."""

NAMES = {
    "vae": "VAE",
    "fix_clip": "Fix CLIP",
    "options": "Options of the method",
    "components": "Only these components",
}


def LOOK(gradio: Any) -> dict[str, Any]:
    """How the page looks: the colours of the reports, the system's own fonts (nothing is loaded from elsewhere)."""
    theme = gradio.themes.Base(
        primary_hue=gradio.themes.colors.blue,
        neutral_hue=gradio.themes.colors.gray,
        radius_size=gradio.themes.sizes.radius_sm,
        text_size=gradio.themes.sizes.text_md,
        spacing_size=gradio.themes.sizes.spacing_sm,
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return {"theme": theme, "css": (HERE / "page.css").read_text(encoding="utf-8")}


def build(desk: Desk, roots: Roots, jobs: JobList, links: Links) -> Any:
    """The page, as Gradio's Blocks, to be launched."""
    return _Page(desk, roots, jobs, links).blocks


class _Page:
    """Fields by name, and the functions that they call."""

    def __init__(self, desk: Desk, roots: Roots, jobs: JobList, links: Links) -> None:
        self.desk, self.roots, self.jobs, self.links = desk, roots, jobs, links
        self.gr: Any = import_module("gradio")
        self.models: list[Any] = []  # fields that list models, and alignments
        self.alignments: list[Any] = []
        self.functions = tuple(desk.functions)
        gr = self.gr
        with gr.Blocks(title="Git Re-Basin", analytics_enabled=False, fill_width=True) as self.blocks:
            gr.HTML(
                "<header><h1>Git Re-Basin</h1><p>Align the neurons of two models, then merge them.</p></header>"
            )
            with gr.Row(elem_id="columns", equal_height=False):
                with gr.Column(scale=3, min_width=340), gr.Tabs():
                    with gr.Tab("Merge", id="merge"):
                        merge = self._merge_tab()
                    with gr.Tab("Adapters", id="adapters"):
                        apply = self._apply_tab()
                    with gr.Tab("Reports", id="reports"):
                        runs, report = self._reports_tab()
                with gr.Column(scale=2, min_width=340, elem_id="jobs"):
                    self._jobs_column()
            self._wire_merge(merge)
            self._wire_apply(apply)
            self._wire_reports(runs, report)
            self._wire_jobs(runs)

    # Fields

    def _field(self, one: Option) -> Any:
        """A field for an option as it is declared."""
        gr = self.gr
        told = {
            "label": NAMES.get(one.name, one.name.replace("_", " ").capitalize()),
            "info": one.help or None,
        }
        told["elem_id"] = f"option-{one.name}"
        if one.name == "dtype":
            return gr.Dropdown([("A's types", ""), *FORMATS], value="", **told)
        if one.name == "components":
            return gr.Dropdown([], multiselect=True, **told)
        if one.kind == "flag":
            return gr.Checkbox(bool(one.default), **told)
        if one.kind == "choice":
            return gr.Radio(list(one.choices), value=one.default, **told)
        if one.kind == "path":
            field = gr.Dropdown([], value=None, multiselect=one.many or None, allow_custom_value=True, **told)
            (self.alignments if one.name == "permutation" else self.models).append(field)
            return field
        if one.kind in ("number", "whole"):
            return gr.Number(one.default, precision=0 if one.kind == "whole" else None, **told)
        more = {"lines": 2, "placeholder": "one on each line"} if one.many else {}
        return gr.Textbox("" if one.default is None else str(one.default), **told, **more)

    def _file(self, label: str, info: str, **more: Any) -> Any:
        """A field for a file or folder of the folders that the page may use."""
        listed = self.alignments if more.pop("alignment", False) else self.models
        field = self.gr.Dropdown([], value=None, allow_custom_value=True, label=label, info=info, **more)
        listed.append(field)
        return field

    def _merge_tab(self) -> dict[str, Any]:
        gr, offered = self.gr, self.desk.merge
        found: dict[str, Any] = {}
        with gr.Row():
            found["a"] = self._file("Model A", "It stays as it is.", elem_id="model-a")
            found["b"] = self._file("Model B", "It is brought to A.", elem_id="model-b")
        with gr.Row(elem_classes="tools"):
            self.upload = gr.UploadButton("Upload a file", size="sm", file_count="multiple", elem_id="upload")
            self.refresh = gr.Button("Look for files again", size="sm", elem_id="refresh")
        found["more"] = gr.Dropdown(
            [], value=[], multiselect=True, allow_custom_value=True, label="More models",
            info="All are aligned to A and merged into one.", elem_id="more-models",
        )  # fmt: skip
        self.models.append(found["more"])
        self.about = gr.HTML(elem_id="about")
        with gr.Row():
            usual = offered.option("method").default
            found["method"] = gr.Dropdown(
                form.methods(self.functions),
                value=usual,
                label="Method",
                info="How to combine.",
                elem_id="method",
            )
            found["alpha"] = gr.Slider(
                0, 1, 0.5, step=0.01, label="Alpha", info="The share of B.", elem_id="alpha"
            )
        self.method_told = gr.HTML(self._method(usual))
        with gr.Accordion("Weights by block", open=False, elem_id="weights"):
            with gr.Row():
                self.preset = gr.Dropdown(
                    [("none", ""), *preset_names()], value="", label="Preset", info="Those that people know.",
                    elem_id="preset",
                )  # fmt: skip
                found["weights"] = gr.Textbox(
                    "", label="Weights", elem_id="weights-text", max_lines=4,
                    info="A preset, entries such as IN=0.2,OUT=0.7,attn1=1, or a number for each model (4,2,1).",
                )  # fmt: skip
            self.sliders = gr.HTML(
                {"names": [], "values": [], "notes": []},
                html_template=(HERE / "sliders.html").read_text(encoding="utf-8"),
                js_on_load=(HERE / "sliders.js").read_text(encoding="utf-8"),
                elem_id="sliders",
            )
        with gr.Accordion("Alignment", open=False, elem_id="alignment"):
            ways = [(told, name) for name, told in form.WAYS.items()]
            found["way"] = gr.Radio(ways, value="permutation", label="Bring B to A", elem_id="way")
            self.way_told = gr.HTML("")
            with gr.Group(visible=False) as self.given:
                found["permutation"] = self._field(offered.option("permutation"))
            with gr.Group(visible=False) as self.learning:
                with gr.Row():
                    found["steps"] = gr.Number(None, label="Steps", precision=0, min_width=100)
                    found["samples"] = gr.Number(None, label="Samples", precision=0, min_width=100)
                    found["size"] = gr.Number(
                        None, label="Size", info="of pictures", precision=0, min_width=100
                    )
                found["prompts"] = self._field(offered.option("prompts"))
            self._fields(found, offered, ("start", "joint"))
        placed = {name for names in form.GROUPS.values() for name in names}
        known = {*placed, *form.OWN, *form.LEFT_OUT}
        rest = tuple(one.name for one in offered.options if one.name not in known)
        for title in ("Method and base", "Models and components", "Output", "Machine"):
            if title == "Output":
                found["output"] = gr.Textbox(
                    "merged.safetensors", label="Write", elem_id="output",
                    info="NAME.safetensors, NAME.sft, NAME.ckpt, or the name of a new folder.",
                )  # fmt: skip
            with gr.Accordion({"Output": "How it is written"}.get(title, title), open=False):
                self._fields(found, offered, form.GROUPS[title] + (rest if title == "Machine" else ()))
        with gr.Accordion("Curve and samples", open=False, elem_id="measuring"):
            gr.HTML(shown.hint(
                "Measures the loss along the line from A to B, naive and aligned, and leaves a report: for Stable"
                " Diffusion. A full-sized model takes minutes for each point of the line on a CPU."
            ))  # fmt: skip
            goals = [(told, name) for name, told in form.OBJECTIVES.items()]
            self.objective = gr.Radio(goals, value="agreement", label="Measure", elem_id="objective")
            self.samples = gr.Number(
                0, label="Pictures", info="In each row of samples; 0: none.", precision=0, elem_id="samples"
            )
            self.measure = gr.Button("Measure", elem_id="measure")
        with gr.Row(elem_classes="buttons"):
            self.compare = gr.Button("Compare A and B", elem_id="compare")
            self.plan = gr.Button("Plan", elem_id="plan")
            self.merge = gr.Button("Merge", variant="primary", elem_id="merge")
        self.merge_said = gr.HTML(elem_id="merge-said")
        self.merge_line = gr.Textbox(
            "", label="The same on the command line", buttons=["copy"], interactive=False, lines=2,
            elem_id="merge-line", elem_classes="line",
        )  # fmt: skip
        return found

    def _fields(self, found: dict[str, Any], offered: Command, names: Sequence[str]) -> None:
        """Fields of these options, flags two in a row."""
        flags = [name for name in names if offered.option(name).kind == "flag"]
        for name in (name for name in names if name not in flags):
            found[name] = self._field(offered.option(name))
        for start in range(0, len(flags), 2):
            with self.gr.Row():
                for name in flags[start : start + 2]:
                    found[name] = self._field(offered.option(name))

    def _apply_tab(self) -> dict[str, Any]:
        gr, offered = self.gr, self.desk.apply
        gr.HTML(shown.hint(
            "A LoRA, LyCORIS, ControlNet or textual inversion that was made for B works on the aligned B, and on the"
            " merge, after it has been moved by the same permutation: the file that a merge leaves beside its result."
        ))  # fmt: skip
        found: dict[str, Any] = {
            "permutation": self._file(
                "Permutation or alignment", offered.option("permutation").help, alignment=True,
                elem_id="apply-permutation",
            ),
            "file": self._file("What follows it", offered.option("file").help, elem_id="apply-file"),
        }  # fmt: skip
        self.apply_about = gr.HTML()
        found["output"] = gr.Textbox(
            "", label="Write", placeholder="FILE_aligned.safetensors", elem_id="apply-output",
            info="Without a name it stands beside the file, as NAME_aligned.safetensors.",
        )  # fmt: skip
        known = (*found, *form.LEFT_OUT)
        with gr.Accordion("Options", open=False):
            own = self.models[:]
            self._fields(found, offered, [one.name for one in offered.options if one.name not in known])
            for field in self.models[len(own) :]:
                field.elem_id = f"apply-{field.elem_id}"
        with gr.Row(elem_classes="buttons"):
            self.apply_plan = gr.Button("Plan", elem_id="apply-plan")
            self.apply = gr.Button("Apply", variant="primary", elem_id="apply")
        self.apply_said = gr.HTML(elem_id="apply-said")
        self.apply_line = gr.Textbox(
            "", label="The same on the command line", buttons=["copy"], interactive=False, lines=2,
            elem_id="apply-line", elem_classes="line",
        )  # fmt: skip
        return found

    def _reports_tab(self) -> tuple[Any, Any]:
        gr = self.gr
        with gr.Row(elem_classes="tools"):
            runs = gr.Dropdown(
                [], value=None, label="Run", elem_id="runs", scale=4,
                info="Pages that `python -m rebasin.run` and its like have left: answers, curve, samples.",
            )  # fmt: skip
        return runs, gr.HTML(shown.hint("Choose a run."), elem_id="report")

    def _jobs_column(self) -> None:
        gr = self.gr
        self.chosen = gr.Dropdown([], value=None, label="Job", elem_id="job", info="The newest first.")
        self.job = gr.HTML(shown.job(None), elem_id="job-shown")
        with gr.Row(elem_classes="tools"):
            self.cancel = gr.Button("Cancel", variant="stop", size="sm", interactive=False, elem_id="cancel")
            self.again = gr.Button("Again", size="sm", interactive=False, elem_id="again")
        self.job_line = gr.Textbox(
            "", label="Its command line", buttons=["copy"], interactive=False, lines=2, elem_id="job-line",
            elem_classes="line",
        )  # fmt: skip
        with gr.Accordion("Log", open=False, elem_id="log"):
            self.log = gr.Textbox(
                "", show_label=False, lines=10, max_lines=24, interactive=False, buttons=["copy"], elem_id="log-text",
                elem_classes="line",
            )  # fmt: skip
        self.seen, self.ended = gr.State({}), gr.State(0)

    # What clicks do

    def _wire_merge(self, found: dict[str, Any]) -> None:
        names, fields = list(found), list(found.values())

        def values(given: Sequence[Any]) -> dict[str, Any]:
            return {name: self._value(name, value) for name, value in zip(names, given, strict=True)}

        def line(*given: Any) -> str:
            try:
                return written(self._merge_words(values(given)))
            except RebasinError:
                return ""

        def begin(plan: bool) -> Callable[..., Any]:
            def job(*given: Any) -> Any:
                words = self._merge_words(values(given))
                if plan:
                    return self.jobs.start([*words, "--dry-run"], quick=True)
                output = self.roots.inside(values(given)["output"])
                return self.jobs.start(words, output=output)

            return self._begin(job)

        def compare(*given: Any) -> Any:
            told = values(given)
            if not told["a"] or not told["b"]:
                return form.values_of_merge(told)  # says so
            wanted = {one.name: told[one.name] for one in self.desk.compare.options if one.name in found}
            wanted |= {"a": told["a"], "b": told["b"], "maps": told["way"] == "maps"}
            wanted["permutation"] = told["permutation"] if told["way"] == "given" else None
            return self.jobs.start(self.desk.compare.line(wanted, self.roots), results="--json")

        outcome = [self.merge_said, self.chosen]
        self.plan.click(begin(True), fields, outcome, **CALL).then(**TO_JOB)
        self.merge.click(begin(False), fields, outcome, **CALL).then(**TO_JOB)
        self.compare.click(self._begin(compare), fields, outcome, **CALL).then(**TO_JOB)
        self.measure.click(
            self._begin(self._measure),
            [found["a"], found["b"], self.objective, self.samples],
            outcome,
            **CALL,
        ).then(**TO_JOB)
        for field in fields:
            field.change(line, fields, self.merge_line, **CALL)
        inputs = [found[name] for name in ("a", "b", "more", "base")]
        for field in inputs:
            field.change(
                self._describe, [*inputs, found["components"]], [self.about, found["components"]], **CALL
            )
        found["method"].change(
            self._choose_method, found["method"], [self.method_told, found["alpha"]], **CALL
        )
        found["way"].change(
            self._choose_way, found["way"], [self.way_told, self.given, self.learning], **CALL
        )
        told = [found["a"], found["b"], found["weights"], found["alpha"]]
        show = {"fn": self._show_weights, "inputs": told, "outputs": [self.sliders, self.preset], **CALL}
        for field in told:
            field.change(**show)
        self.preset.input(lambda name: name or "", self.preset, found["weights"], **CALL)
        self.sliders.input(
            self._take_sliders,
            [found["a"], found["b"], found["alpha"], self.sliders],
            found["weights"],
            **CALL,
        )
        lists = [*self.models, *self.alignments]
        self.refresh.click(self._lists, None, lists, **CALL)
        self.blocks.load(self._lists, None, lists, **CALL)
        self.upload.upload(
            self._uploaded, [self.upload, found["a"], found["b"]],
            [self.merge_said, found["a"], found["b"], *lists[2:]], **CALL | {"show_progress": "full"},
        )  # fmt: skip

    def _measure(self, a: str | None, b: str | None, objective: str, samples: float) -> int:
        if not a or not b:
            raise ConfigError("Choose two models, A and B.")
        name = f"{Path(a).stem}-{Path(b).stem}-{time.strftime('%Y-%m-%d_%H-%M-%S')}"
        folder = self.roots.inside(str(self.roots.folders[0] / form.RUNS / name))
        paths = [str(self.roots.inside(path)) for path in (a, b)]
        words = form.measuring(paths[0], paths[1], objective, int(samples or 0), str(folder))
        return self.jobs.start(words, output=folder, module="rebasin.run")

    def _merge_words(self, told: dict[str, Any]) -> list[str]:
        return self.desk.merge.line(form.values_of_merge(told, self.functions), self.roots)

    def _value(self, name: str, value: Any) -> Any:
        """What a field has, as its option takes it: text of several lines is several values."""
        one = next((one for one in self.desk.merge.options if one.name == name), None)
        if one is not None and one.many and isinstance(value, str):
            return [line.strip() for line in value.splitlines() if line.strip()]
        return value

    def _wire_apply(self, found: dict[str, Any]) -> None:
        names, fields = list(found), list(found.values())

        def words(given: Sequence[Any]) -> list[str]:
            told = dict(zip(names, given, strict=True))
            return self.desk.apply.line(told, self.roots)

        def line(*given: Any) -> str:
            try:
                return written(words(given)) if given[0] and given[1] else ""
            except RebasinError:
                return ""

        def begin(plan: bool) -> Callable[..., Any]:
            def job(*given: Any) -> Any:
                if not given[0] or not given[1]:
                    raise ConfigError("Choose a permutation or alignment, and the file that is to follow it.")
                told, output = words(given), str(given[names.index("output")] or "").strip()
                if plan:
                    return self.jobs.start([*told, "--dry-run"], quick=True)
                return self.jobs.start(told, output=self.roots.inside(output) if output else None)

            return self._begin(job)

        def about(*given: Any) -> str:
            return "".join(self._told(path) for path in given if path)

        outcome = [self.apply_said, self.chosen]
        self.apply_plan.click(begin(True), fields, outcome, **CALL).then(**TO_JOB)
        self.apply.click(begin(False), fields, outcome, **CALL).then(**TO_JOB)
        for field in fields:
            field.change(line, fields, self.apply_line, **CALL)
        both = [found["permutation"], found["file"]]
        for field in both:
            field.change(about, both, self.apply_about, **CALL)

    def _wire_reports(self, runs: Any, report: Any) -> None:
        def show(page: str | None) -> str:
            if not page:
                return shown.hint("Choose a run.")
            known = {str(self.roots.brief(one)): one for one in self.roots.runs()}
            if page not in known:
                return shown.problem("This page is not there any more.")
            return shown.report(self.links.of_page(known[page]))

        runs.change(show, runs, report, **CALL)
        self.blocks.load(self._runs, None, runs, **CALL)
        runs.focus(self._runs, None, runs, **CALL)

    def _runs(self) -> Any:
        pages = [self.roots.brief(page) for page in self.roots.runs()[:200]]
        return self.gr.update(choices=[(str(page.parent), str(page)) for page in pages])

    def _wire_jobs(self, runs: Any) -> None:
        fields = [
            self.chosen,
            self.job,
            self.job_line,
            self.log,
            self.cancel,
            self.again,
            self.seen,
            self.ended,
        ]
        lists = [*self.models, *self.alignments]
        tick = {"fn": self._tick, "inputs": [self.chosen, self.seen], "outputs": fields, **CALL}
        self.gr.Timer(1.0).tick(**tick)
        self.chosen.change(**tick)
        self.blocks.load(self._tick, [self.chosen, self.seen], fields, **CALL)
        self.cancel.click(self._cancel, self.chosen, None, **CALL).then(**tick)
        self.again.click(self._begin(self._repeat), self.chosen, [self.merge_said, self.chosen], **CALL)
        self.ended.change(self._lists, None, lists, **CALL)  # a job may have written files

    def _begin(self, job: Callable[..., Any]) -> Callable[..., Any]:
        """Start a job and show it; a sentence if it can't be."""

        def begin(*given: Any) -> Any:
            try:
                number = job(*given)
            except RebasinError as error:
                return shown.problem(str(error)), self.gr.skip()
            return "", self.gr.update(choices=self._listed(), value=number)

        return begin

    def _repeat(self, number: int | None) -> int:
        if number is None:
            raise ConfigError("Choose a job.")
        return self.jobs.again(number)

    def _cancel(self, number: int | None) -> None:
        if number is not None:
            self.jobs.cancel(number)

    def _listed(self) -> list[tuple[str, int]]:
        return [(shown.title(one), one.number) for one in self.jobs.all()]

    def _tick(self, number: int | None, seen: dict[str, Any]) -> list[Any]:
        """What has changed since this window was last told."""
        gr, listed = self.gr, self._listed()
        known = [one for _, one in listed]
        number = number if number in known else (known[0] if known else None)
        one = self.jobs.get(number) if number is not None else None
        state = self._state(one) | {"list": (listed, number)}
        make: dict[str, Callable[[Any], Any]] = {
            "list": lambda told: gr.update(choices=told[0], value=told[1]),
            "cancel": lambda told: gr.update(interactive=told),
            "again": lambda told: gr.update(interactive=told),
        }
        order = ("list", "job", "line", "log", "cancel", "again")
        changed = [
            make.get(name, lambda told: told)(state[name]) if seen.get(name) != state[name] else gr.skip()
            for name in order
        ]
        ended = sum(one.status == "done" for one in self.jobs.all())
        last = gr.skip() if seen.get("ended") == ended else ended
        return [*changed, state | {"ended": ended}, last]

    def _state(self, one: Job | None) -> dict[str, Any]:
        if one is None:
            return {"job": shown.job(None), "line": "", "log": "", "cancel": False, "again": False}
        html = shown.job(one, self.links.of_job(one.number), self.jobs.results(one.number))
        return {"job": html, "line": one.line, "log": one.log, "cancel": not one.over, "again": one.over}

    def _lists(self) -> list[Any]:
        """The choices of fields that list files."""
        models, alignments = self.roots.files()
        update = self.gr.update
        return [
            *(update(choices=models) for _ in self.models),
            *(update(choices=alignments) for _ in self.alignments),
        ]

    def _told(self, path: str) -> str:
        try:
            found: Any = self.desk.describe(self.roots.inside(path))
        except RebasinError as error:
            found = str(error)
        return shown.file(path, found)

    def _describe(self, a: str, b: str, more: list[str], base: str, chosen: list[str]) -> Any:
        """What the files are, and the components that a merge may be limited to."""
        paths = [path for path in (a, b, *(more or ()), base) if path]
        parts: list[str] = []
        if a:
            try:
                found = self.desk.describe(self.roots.inside(a))
                if found["kind"] == "model":
                    parts = [part["component"] for part in found["components"]]
            except RebasinError:
                pass  # told in its card
        html = "".join(self._told(path) for path in paths)
        kept = [part for part in chosen or () if part in parts]
        return f'<div class="files-told">{html}</div>', self.gr.update(choices=parts, value=kept)

    def _uploaded(self, paths: list[str], a: str | None, b: str | None) -> Any:
        """Put uploaded files into the first folder, and choose them where nothing is chosen yet."""
        names = []
        try:
            for path in paths or ():
                names.append(str(self.roots.upload(Path(path), Path(path).name)))
            said = shown.hint(f"Uploaded: {', '.join(names)}")
        except RebasinError as error:
            said = shown.problem(str(error))
        a, b, *_ = [*([a] if a else []), *([b] if b else []), *names, None, None]
        first, second, *others = self._lists()
        return said, first | {"value": a}, second | {"value": b}, *others

    def _method(self, name: str) -> str:
        one = METHODS[name]
        options = {**one.options, **plan_options(one.plan)}
        return shown.method(one, {n: v for n, v in options.items() if n not in self.functions})

    def _choose_method(self, name: str) -> Any:
        if name not in METHODS:
            return "", self.gr.skip()
        usual, bounded = form.default_alpha(name), METHODS[name].weight != "scales"
        update = self.gr.update(
            value=0.5 if usual is None else usual, visible=usual is not None, maximum=1 if bounded else 2,
            info="The share of B." if METHODS[name].weight == "weights" else "The strength of what it adds.",
        )  # fmt: skip
        return self._method(name), update

    def _choose_way(self, way: str) -> Any:
        option = self.desk.merge.option
        told = {"maps": option("maps").help, "learned": option("learned").help}.get(way, "")
        update = self.gr.update
        return (
            shown.hint(told) if told else "",
            update(visible=way == "given"),
            update(visible=way == "learned"),
        )

    def _show_weights(self, a: str | None, b: str | None, text: str, alpha: float) -> Any:
        """The sliders of a text, and the preset that it is."""
        empty = {"names": [], "values": [], "notes": []}
        name = text.strip() if text.strip() in preset_names() else ""
        if not a:
            return empty | {"notes": ["Choose the models; then their blocks are here."]}, name
        if form.plain_numbers(text) and text.count(",") < 9:
            return empty | {"notes": ["A number for each model; blocks have entries such as IN=0.2."]}, name
        try:
            models = [self.roots.inside(path) for path in (a, b) if path]
            found = blocks.sliders(models, text, alpha)
        except RebasinError as error:
            return empty | {"notes": [str(error)]}, name
        return {"names": found.names, "values": found.values, "notes": found.notes}, name

    def _take_sliders(self, a: str | None, b: str | None, alpha: float, told: Any) -> Any:
        try:
            models = [self.roots.inside(path) for path in (a, b) if path]
            return blocks.text_of(models, [float(value) for value in told["values"]], alpha)
        except (RebasinError, KeyError, TypeError, ValueError):
            return self.gr.skip()
