"""`python -m tests.golden`: --write writes the files of this folder anew."""

from __future__ import annotations

import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def main(arguments: list[str]) -> None:
    from . import public, sentences

    if arguments == ["--write"]:
        write(FOLDER / "public.txt", [*public.lines(), *public.files()])
        write(FOLDER / "error_sentences.txt", [str(sentence) for sentence in sentences.sentences()])
    else:
        sys.exit(__doc__)


def write(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{path}: {len(lines)} lines")


if __name__ == "__main__":
    main(sys.argv[1:])
