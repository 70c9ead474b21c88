"""The command line of the widely used SD_rebasin_merge.py, doing what it promised: B is permuted, then merged.

    python scripts/SD_rebasin_merge.py --model_a A.safetensors --model_b B.safetensors --alpha 0.5 --output merged

The flags are the same, so that commands people have written down keep working. What differs:

  alignment     That script never permuted B: its result was the plain average, for all but a few tensors. Here B's
                neurons are brought into A's order by symmetries that are proved for the architecture, and only then
                averaged. For fine-tunes of one base nothing moves, and the result is the plain average all the same.
  --alpha       as there: the share of B, 0 to 1.
  --iterations  a limit for the sweeps of the alignment, which ends by itself as soon as nothing can be improved,
                usually after 2 or 3. It does not change how much of B is in the result.
  --usefp16     the type that is stored (the default, as there). Matching and averaging are done in float32.
  --workers     threads for torch, and groups that are matched at once.
  --output      a name without ending, as there; one with .safetensors or .ckpt is taken as it is. If the file exists
                you are asked at the beginning, not after hours; without a terminal it is an error (--overwrite).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(
        prog="SD_rebasin_merge.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    own.add_argument("--model_a", required=True, type=Path, help="the model that stays as it is")
    own.add_argument("--model_b", required=True, type=Path, help="the model that is brought to it")
    own.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: cpu)")
    own.add_argument("--output", default="merged", help="name of the output (default: merged)")
    types = own.add_mutually_exclusive_group()
    types.add_argument("--usefp16", action="store_true", help="store in fp16 (default)")
    types.add_argument("--usefp32", action="store_true", help="store in fp32")
    own.add_argument("--alpha", default=0.5, type=float, help="the share of B (default: 0.5)")
    own.add_argument("--iterations", default=10, type=int, help="at most so many sweeps (default: 10)")
    formats = own.add_mutually_exclusive_group()
    formats.add_argument("--safetensors", action="store_true", help="write .safetensors (default)")
    formats.add_argument("--ckpt", action="store_true", help="write .ckpt")
    own.add_argument("--prune", action="store_true", help="leave out EMA copies and leftovers of training")
    own.add_argument("--fixclip", action="store_true", help="write CLIP's position ids as integers")
    own.add_argument("--workers", default=0, type=int, help="threads (default: torch's choice)")
    own.add_argument("--seed", default=0, type=int, help="of the order of matching (default: 0)")
    own.add_argument("--overwrite", action="store_true", help="replace the output without asking")
    return own


def output_of(name: str, ckpt: bool) -> Path:
    """The file that `--output` means."""
    path = Path(name)
    return (
        path
        if path.suffix in (".safetensors", ".ckpt")
        else Path(f"{name}{'.ckpt' if ckpt else '.safetensors'}")
    )


def merge(arguments: argparse.Namespace) -> None:
    from rebasin.cli import pipeline, session
    from rebasin.cli.request import Request
    from rebasin.errors import ConfigError

    if not 0 <= arguments.alpha <= 1:
        raise ConfigError(f"--alpha is {arguments.alpha}, but it is the share of B: give 0 to 1.")
    if arguments.iterations < 1 or arguments.workers < 0:
        raise ConfigError("--iterations must be at least 1, and --workers at least 0.")
    output = output_of(arguments.output, arguments.ckpt)
    overwrite = arguments.overwrite
    if output.exists() and not overwrite and sys.stdin.isatty():
        overwrite = input(f"{output} exists. Replace it? (y/n) ").strip().lower() in ("y", "yes")
    pipeline.merge(
        session.begin(arguments.device, arguments.workers),
        Request(
            inputs=(arguments.model_a, arguments.model_b),
            output=output,
            alpha=arguments.alpha,
            dtype="fp32" if arguments.usefp32 else "fp16",
            prune=arguments.prune,
            fix_clip=arguments.fixclip,
            seed=arguments.seed,
            device=arguments.device,
            max_sweeps=arguments.iterations,
            workers=arguments.workers or None,
            overwrite=overwrite,
        ),
    )


def main() -> None:
    from rebasin.cli import guarded

    arguments = parser().parse_args()
    guarded(lambda: merge(arguments))


if __name__ == "__main__":
    main()
