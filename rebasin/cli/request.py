"""What a user asks for. Every option of `rebasin merge` is declared here, once; other commands have some of them.

Nothing here imports torch: `rebasin merge --help` must not wait for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from ..errors import ConfigError
from ..files import LARGEST_SEED, MOST_THREADS

A = Annotated[Path, typer.Argument(metavar="A", help="The model that stays as it is.")]
B = Annotated[Path, typer.Argument(metavar="B", help="The model that is brought to A.")]


@dataclass(frozen=True)
class Request:
    """What a user asked for: the options of `rebasin merge`, in the order of its help, and what no command offers."""

    inputs: Annotated[
        tuple[Path, ...],
        typer.Argument(metavar="A B [C ...]", help="Two or more models; all are aligned to A."),
    ]
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="What to write: NAME.safetensors, NAME.sft, NAME.ckpt, or the name of a new diffusers folder.",
        ),
    ]
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Do what this recipe says: YAML of ours or of mergekit, or a file that was merged or aligned, whose"
            " header is one. Models and -o that are given take the place of its own.",
        ),
    ] = None
    save_recipe: Annotated[
        Path | None,
        typer.Option(
            "--save-recipe",
            metavar="FILE",
            help="Write what was done as a recipe: NAME.yaml, or NAME.mecha for sd-mecha.",
        ),
    ] = None
    alpha: Annotated[
        float | None,
        typer.Option(help="Share of B, or strength of what the method adds. Default: 0.5, or the method's."),
    ] = None
    method: Annotated[str, typer.Option(help="How to combine; `rebasin methods` lists all.")] = "weighted_sum"
    options: Annotated[
        tuple[str, ...],
        typer.Option(
            "--option",
            metavar="NAME=VALUE",
            help="An option of the method, e.g. k=0.2 or score=my_scores:quality; may be repeated.",
        ),
    ] = ()
    base: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The model that all were made from, for methods that need it."),
    ] = None
    fisher: Annotated[
        tuple[Path, ...],
        typer.Option(
            "--fisher",
            metavar="FILE",
            help="For --method fisher: the Fisher information of each model, once for each, in their order.",
        ),
    ] = ()
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="W",
            help="A number for each model (0.5,0.3,0.2), or weights by block (IN=0.2,OUT=0.7,attn1=1), a preset"
            " (GRAD_V) or a YAML file; --alpha is the default for other blocks.",
        ),
    ] = None
    align: Annotated[
        bool, typer.Option("--align/--no-align", help="Bring the neurons into A's order first.")
    ] = True
    permutation: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Use this alignment, which `rebasin align` or an earlier merge has left, instead of finding one.",
        ),
    ] = None
    maps: Annotated[
        bool,
        typer.Option(
            "--maps",
            help="Align by linear maps, too: rotations of streams, matrices in heads, scales. Finds what is closest by"
            " the weights, which between models that were trained apart often merges no better than a permutation;"
            " learned maps do (python -m rebasin.run algo=learned). Takes several times the memory and time.",
        ),
    ] = False
    learned: Annotated[
        bool,
        typer.Option(
            "--learned",
            help="Learn maps of the UNet by gradient: what lies between A and B is to predict what both predict, on"
            " latents that they sample from prompts. For models that were trained apart; fine-tunes of one base need no"
            " such thing. Other components are aligned by their weights. Best on a GPU.",
        ),
    ] = False
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="With --learned: prompts, one on each line. Default: 32 that ship."
        ),
    ] = None
    learn: Annotated[
        tuple[str, ...],
        typer.Option(
            "--learn",
            metavar="NAME=VALUE",
            help="With --learned: an option of python -m rebasin.run algo=learned objective=distillation"
            " model=checkpoint, e.g. algo.steps=100, objective.samples=64 or model.size=256; may be repeated.",
        ),
    ] = ()
    joint: Annotated[
        bool,
        typer.Option(
            "--joint",
            help="Also reorder what the text encoder gives to the UNet. More freedom, but textual inversions and other"
            " text encoders no longer fit.",
        ),
    ] = False
    components: Annotated[
        tuple[str, ...],
        typer.Option(
            "--only",
            metavar="PART",
            help="Only this component (unet, vae, text_encoder, ...); may be repeated.",
        ),
    ] = ()
    variant: Annotated[
        str | None,
        typer.Option(
            metavar="WORD",
            help="Of diffusers folders with several, the word in the names of their weights: fp16, non_ema, ...",
        ),
    ] = None
    resize_vocabulary: Annotated[
        bool,
        typer.Option(
            "--resize-vocabulary",
            help="Language models with added words: take what only A has from A, and leave out what only others have;"
            " verify looks at what both have.",
        ),
    ] = False
    mix_predictions: Annotated[
        bool,
        typer.Option(
            "--mix-predictions", help="Merge although one model predicts the noise and another the velocity."
        ),
    ] = False
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Store as fp32, fp16, bf16 or fp8 (the UNet's matrices in 8 bits, the rest in fp16). Default: A's"
            " types.",
        ),
    ] = None
    prune: Annotated[
        bool, typer.Option("--prune", help="Leave out what no loader needs: EMA copies, training leftovers.")
    ] = False
    vae: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Put this model's VAE into the result.")
    ] = None
    fix_clip: Annotated[
        bool, typer.Option("--fix-clip", help="Write CLIP's position ids anew, as the integers 0 to 76.")
    ] = False
    start: Annotated[
        Literal["forward", "identity"],
        typer.Option(help="Where matching starts: a first guess from input to output, or B as it is."),
    ] = "forward"
    seed: Annotated[int, typer.Option(help="Of everything random.", min=0, max=LARGEST_SEED)] = 0
    device: Annotated[
        str,
        typer.Option(
            help="Where matrices are multiplied: cpu, cuda, cuda:1, mps; auto: cuda, if there is one."
        ),
    ] = "auto"
    threads: Annotated[
        int,
        typer.Option(help="CPU threads; 0 leaves it to torch.", min=0, max=MOST_THREADS, show_default=False),
    ] = 0
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Of three models or more: match several at once, on the Ray cluster of this address; auto: the one"
            " that runs, or the cores of this machine. --threads are those of each.",
        ),
    ] = None
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="Compute with B before and after moving its neurons, and compare the outputs.",
        ),
    ] = True
    model_card: Annotated[
        bool | None,
        typer.Option(
            "--model-card/--no-model-card",
            help="Write a page about the merge, for the Hub: README.md in a folder (the default there), NAME.md beside"
            " a file.",
            show_default=False,
        ),
    ] = None
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            help="Send the result and its page to this repository on the Hub, which is made, private, if it is not"
            " there.",
        ),
    ] = None
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace the output if it exists and is a file; a folder is never replaced."
        ),
    ] = False
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only print the plan: sizes, memory and an estimate of the time."),
    ] = False
    max_sweeps: int = 100
    workers: int | None = None
    sha256: Mapping[Path, str] = field(default_factory=dict)
    """Of a recipe: what files must have."""
    resume: bool = False
    """Of a recipe with several steps: an output that was made from the same files in the same way stays as it is."""
    intermediate: bool = False
    """Of such a recipe: the output is ours, and may be replaced whatever it is."""

    @property
    def by_maps(self) -> bool:
        """Whether what is found may have maps."""
        return self.maps or self.learned

    @property
    def kept(self) -> Path:
        """Where the permutation or alignment is kept."""
        from ..checkpoints.output import FILES  # late: torch

        name = self.output.stem if self.output.suffix.lower() in FILES else self.output.name
        return self.output.with_name(f"{name}.{'alignment' if self.by_maps else 'permutation'}.safetensors")


UNCHANGED = {
    "output": "where the file goes",
    "recipe": "the recipe itself",
    "save_recipe": "where a recipe goes",
    "check": "it refuses or tells, and changes nothing",
    "overwrite": "whether an older file may go",
    "dry_run": "nothing is written",
    "model_card": "a page beside the file",
    "push_to_hub": "where the file is sent, too",
    "workers": "how many groups are matched at once, with one result",
    "sha256": "what a recipe has files checked for",
    "resume": "whether what was made before is looked for",
    "intermediate": "whether the file is one of our own",
}
"""The fields of `Request` that do not change the file, and why; all others stand in a recipe."""

KEYS = {
    "models" if field.name == "inputs" else field.name: field.name
    for field in fields(Request)
    if field.name not in UNCHANGED
}
"""Key of a recipe -> field of `Request`."""


@cache
def kinds() -> dict[str, Any]:
    """Field of `Request` -> its type, without what the command says about it."""
    return get_type_hints(Request)


@cache
def _offered() -> dict[str, inspect.Parameter]:
    """The fields of `Request` that are options, as the parameters of a function; several values are a list there."""
    found = {}
    for name, hint in get_type_hints(Request, include_extras=True).items():
        if get_origin(hint) is not Annotated:
            continue
        kind, option = get_args(hint)
        default = getattr(Request, name, inspect.Parameter.empty)
        if get_origin(kind) is tuple:
            kind = list[get_args(kind)[0]]
            if default == ():
                kind, default = kind | None, None
        found[name] = inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
        )
    return found


OUTPUTS = ("output", "json_file", "plot")
"""Paths that are written."""


def fetched(given: dict[str, Any]) -> dict[str, Any]:
    """The options of a command with files of this machine in place of those on the Hub.

    Raises:
        CheckpointError: see `checkpoints.hub.local`.
        ConfigError: an output is to be on the Hub.
    """

    def here(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(here(name, one) for one in value)
        if not isinstance(value, Path) or not str(value).startswith("hf:"):
            return value
        if name in OUTPUTS:
            raise ConfigError(
                "What is written lies on this machine; to send it to the Hub, too, give --push-to-hub."
            )
        from ..checkpoints.hub import local  # late: torch

        return local(value, given.get("variant"))

    return {name: here(name, value) for name, value in given.items()}


def bounds(name: str) -> tuple[float | None, float | None]:
    """The least and the largest value that the option of a field takes; None without."""
    option = get_args(_offered()[name].annotation)[1] if name in _offered() else None
    return getattr(option, "min", None), getattr(option, "max", None)


def flag(name: str) -> str:
    """How the option of a field is given: `--only` for components."""
    option = get_args(_offered()[name].annotation)[1]
    given = (str(one) for one in (option.default, *(option.param_decls or ())))
    own = next((one for one in given if one.startswith("--")), f"--{name.replace('_', '-')}")
    return own.partition("/")[0]


def command(names: str = "", free: str = "") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command its options, in the order of `names`: its own parameters that are annotated as such, and
    fields of `Request`, which it gets as keywords. Without names these are all fields that are options; those of
    `free` may be left out. A parameter that is the context comes first.
    """
    offered = _offered()
    for name in free.split():
        kind, option = get_args(offered[name].annotation)
        offered = offered | {
            name: offered[name].replace(default=None, annotation=Annotated[kind | None, option])
        }

    def declare(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True).parameters
        own = {name: one for name, one in signature.items() if get_origin(one.annotation) is Annotated}
        context = [one for one in signature.values() if one.annotation is typer.Context]
        parameters = [*context, *(own.get(name, offered.get(name)) for name in names.split() or offered)]

        def called(**given: Any) -> None:
            for name in (
                "inputs",
                "options",
                "components",
                "fisher",
                "learn",
            ):  # an option that was not given is None
                if name in given:
                    given[name] = tuple(given[name] or ())
            function(**fetched(given))

        called.__name__, called.__doc__ = function.__name__, function.__doc__
        called.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters if one is not None]
        )
        return called

    return declare
