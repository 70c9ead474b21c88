"""`--no-skips`, with which `make test` runs: what could not be tested is told, not left out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CASES = """
import pytest

def test_left_out():
    pytest.skip("no such package")

def test_needs_a_gpu():
    pytest.skip("needs CUDA")

@pytest.mark.skipif(True, reason="needs the extra")
def test_marked():
    pass

@pytest.mark.xfail
def test_known():
    assert False

def test_good():
    pass
"""


def test_only_tests_that_need_cuda_may_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "test_cases.py").write_text(CASES)
    (tmp_path / "test_module.py").write_text("import pytest\npytest.importorskip('no_such_module_at_all')\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    here = Path(__file__).parent
    places = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    environment = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))

    def last_line(*options: str) -> str:
        command = [sys.executable, "-m", "pytest", "-p", "no_skips", "-p", "no:cacheprovider", *options]
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert run.returncode in (0, 1, 2), run.stdout + run.stderr
        return run.stdout.splitlines()[-1]

    assert "1 passed, 4 skipped, 1 xfailed" in last_line()
    told = last_line("--no-skips", "--continue-on-collection-errors")
    assert "1 failed, 1 passed, 1 skipped, 1 xfailed, 2 errors" in told
