"""Build wheel and sdist and try them as a stranger would; measure what each extra takes.

    python scripts/check_package.py                  # build, twine, a fresh environment, another folder
    python scripts/check_package.py --resolve        # and: do all dependencies have builds for each Python?
    python scripts/check_package.py --extras         # only: the table of docs/installation.md, written anew

Needs `pip install build twine uv`, the network, and some gigabytes in the temporary folder.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "installation.md"
BEGIN, END = "<!-- sizes -->", "<!-- end of sizes -->"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
LARGEST = 30e6
COMPILED = (
    "torch", "numba", "scipy", "numpy", "scikit-learn", "safetensors", "pillow", "matplotlib", "tokenizers", "pyyaml",
    "wandb",
)  # fmt: skip
"""What nobody wants to compile."""

WHAT = {
    "": "all commands and runs on this page and in the README",
    "mecha": "sd-mecha's merge methods and recipes beside our own",
    "reward": "ImageReward as a score of pictures",
    "search": "`rebasin search`, `python -m rebasin.search`",
    "sweep": "sweeps on several cores (joblib)",
    "sweep-optuna": "Hydra's Optuna sweeper; not together with `search` or `dev`",
    "slurm": "sweeps on a SLURM cluster",
    "ray": "`rebasin merge --ray`, sweeps on Ray; not together with `sweep`",
    "dashboard": "a Weights & Biases workspace",
    "timm": "networks of timm",
    "gguf": "reading and writing `.gguf`",
    "docs": "this site",
    "ui": "`rebasin ui`, the page in the browser",
    "dev": "tests, style, types, and the libraries that ours is compared with",
}


def call(*command: object, cwd: Path | None = None) -> str:
    """Run a command; what it printed."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def build(folder: Path) -> list[Path]:
    """Wheel and sdist, checked by twine."""
    call(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    made = sorted(folder.iterdir())
    call(sys.executable, "-m", "twine", "check", "--strict", *made)
    for file in made:
        size = file.stat().st_size
        print(f"{file.name}: {size / 1e6:.1f} MB")
        if size > LARGEST:
            sys.exit(f"{file.name} is larger than {LARGEST / 1e6:.0f} MB.")
    return made


def environment(folder: Path, source: Path) -> Path:
    """A fresh environment with the package, and its Python."""
    call(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    call(python, "-m", "pip", "install", "--quiet", "--upgrade", "pip")
    call(python, "-m", "pip", "install", "--quiet", source)
    return python


def try_out(python: Path, folder: Path) -> None:
    """The commands and a small run, in a folder that is not the repository."""
    folder.mkdir()
    for name in ("rebasin", "git-rebasin"):
        print(call(python.parent / name, "--version", cwd=folder).strip())
    call(python.parent / "rebasin", "doctor", cwd=folder)
    call(python.parent / "rebasin", "methods", "ties_sum", cwd=folder)
    quick = ["model=mlp", "model.width=16", "model.recipe.epochs=1", "logger=none", "path.cache=cache"]
    call(python, "-m", "rebasin.run", *quick, cwd=folder)
    print(f"a run in {folder}: {', '.join(sorted(p.name for p in folder.glob('outputs/*/*/*')))[:120]}")


def extras_of() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return ["", *project["optional-dependencies"]]


ACCELERATOR = ("torch", "nvidia-", "cuda-", "triton")
"""Counted apart: which builds of these come depends on the machine."""


def downloads(extra: str) -> dict[str, int]:
    """Package -> bytes of what is downloaded on Linux for the package with an extra, by uv's resolution."""
    options = ["--quiet", "--python-version", PYTHONS[0], "--format", "pylock.toml"]
    options += ["--extra", extra] if extra else []
    told = tomllib.loads(
        call(sys.executable, "-m", "uv", "pip", "compile", *options, ROOT / "pyproject.toml")
    )
    found = {}
    for one in told["packages"]:
        files = one.get("wheels") or [one["sdist"]]
        found[one["name"]] = max(file["size"] for file in files)
    return found


def sizes() -> dict[str, tuple[int, int]]:
    """Extra -> packages and bytes that it adds to the package; "" is that itself, without torch and what is its."""
    known = downloads("")
    base = {name: size for name, size in known.items() if not name.startswith(ACCELERATOR)}
    found = {"": (len(base), sum(base.values()))}
    for extra in extras_of()[1:]:
        new = {name: size for name, size in downloads(extra).items() if name not in known}
        found[extra] = (len(new), sum(new.values()))
        print(f"{extra}: {len(new)} packages, {found[extra][1] / 1e6:.0f} MB", flush=True)
    return found


def table(found: dict[str, tuple[int, int]]) -> str:
    lines = ["| extra | what it is for | packages more | download |", "|---|---|--:|--:|"]
    for extra, (packages, size) in found.items():
        name = f"`{extra}`" if extra else "none"
        told = f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB" if size >= 5e5 else "< 1 MB"
        lines.append(f"| {name} | {WHAT[extra]} | {packages} | {told} |")
    return "\n".join(lines)


def written(text: str, rows: str) -> str:
    """The page with this table."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{rows}\n{END}{rest.partition(END)[2]}"


def resolve() -> None:
    """Whether there are builds of what has to be compiled for each Python; no interpreter of it is needed for that."""
    for version in PYTHONS:
        ready = [part for name in COMPILED for part in ("--only-binary", name)]
        options = ["--python-version", version, "--no-header", "--no-annotate", *ready]
        told = call(
            sys.executable, "-m", "uv", "pip", "compile", "--quiet", *options, ROOT / "pyproject.toml"
        ).split()
        named = ", ".join(one for one in told if one.startswith(("torch==", "numba==", "scipy==")))
        print(f"Python {version}: {len(told)} packages have builds ({named})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--extras", action="store_true", help="measure the extras and write the table")
    parser.add_argument(
        "--resolve", action="store_true", help=f"look for builds for Python {', '.join(PYTHONS)}"
    )
    given = parser.parse_args()
    if given.extras:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), table(sizes())), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sdist, wheel = sorted(build(folder / "dist"), key=lambda file: file.suffix == ".whl")
        if given.resolve:
            resolve()
        python = environment(folder / "fresh", wheel)
        try_out(python, folder / "elsewhere")
        call(python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", sdist)
        print(f"from {sdist.name}: {call(python.parent / 'rebasin', '--version', cwd=folder).strip()}")


if __name__ == "__main__":
    main()
