"""A search on the fine-tuned default pair within five minutes, killed and resumed once on the way.

    python -m experiments.search_digits [--minutes 5] [--kill-after 10] [--folder outputs/search_digits] [OVERRIDE ...]

Two UNets fine-tuned from one base on the digits 0 to 4 and 5 to 9 are merged for all ten digits. The search sees
training images; held-out images judge the winner against plain averaging. The process gets SIGKILL once it has
measured `--kill-after` trials, and the same command is given again. Needs the extra `search`.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

PAIR = ["model.a=low", "model.b=high", "base=seed0", "space=finetunes", "data.heldout=1000", "logger=none"]


def measured(folder: Path) -> int:
    """The trials in the study's file that were measured, while another process writes it."""
    if not (folder / "study.db").exists():
        return 0
    try:
        with sqlite3.connect(f"file:{folder / 'study.db'}?mode=ro", uri=True, timeout=5) as connection:
            query = "select count(*) from trials where state in ('COMPLETE', 'PRUNED')"
            return connection.execute(query).fetchone()[0]
    except sqlite3.OperationalError:  # the tables are being made
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="of search, both sessions together")
    parser.add_argument("--kill-after", type=int, default=10, help="trials")
    parser.add_argument("--folder", type=Path, default=Path("outputs/search_digits"))
    given, overrides = parser.parse_known_args()

    from rebasin.reporting.results import load_results

    console = Console(highlight=False, soft_wrap=True)
    shutil.rmtree(given.folder, ignore_errors=True)
    command = [
        sys.executable, "-m", "rebasin.search", *PAIR, f"search.minutes={given.minutes}",
        f"hydra.run.dir={given.folder}", *overrides,
    ]  # fmt: skip
    process = subprocess.Popen(command)
    while process.poll() is None and measured(given.folder) < given.kill_after:
        time.sleep(0.2)
    if process.poll() is not None:
        sys.exit(f"The search ended before it had {given.kill_after} trials.")
    process.send_signal(signal.SIGKILL)
    process.wait()
    console.print(f"killed after {measured(given.folder)} trials; the same command again")
    subprocess.run(command, check=True)

    results = load_results(given.folder)
    found = results["judged"][0]["differences"]["plain average"]
    assert 0 < results["resumed"] < len(results["trials"]), "it was to be killed on the way"
    assert results["spent"] <= 60 * given.minutes
    held = found["mean"] < 0 or found["low"] <= 0
    console.print(f"{'beats or matches' if held else 'DOES NOT MATCH'} plain averaging on held-out data")
    sys.exit(not held)


if __name__ == "__main__":
    main()
