"""scripts/SD_rebasin_merge.py: the command lines that people have written down."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from cli_files import IDS, Files, read, rebasin

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "SD_rebasin_merge.py"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("parts"), ("vae", "text_encoder"))


@pytest.fixture(scope="module")
def main():
    found = importlib.util.spec_from_file_location("SD_rebasin_merge", SCRIPT)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module.main


def test_planted_permutation_is_undone(
    files: Files, tmp_path: Path, main, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [
        "--device",
        "cpu",
        "--usefp32",
        "--alpha",
        "0.5",
        "--iterations",
        "10",
        "--safetensors",
        "--workers",
        "1",
    ]
    text = rebasin("--model_a", files.a, "--model_b", files.b, "--output", "mixed", *flags, entry=main)
    assert "Did anything move? Yes" in text
    a, merged = read(files.a), read(tmp_path / "mixed.safetensors")
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, a[name], rtol=0, atol=1e-6)
    files.check_untouched()


def test_defaults_and_old_formats(
    files: Files, tmp_path: Path, main, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pair = ("--model_a", files.a, "--model_b", files.f)
    rebasin(*pair, "--prune", "--fixclip", entry=main)
    merged = read(tmp_path / "merged.safetensors")
    assert {t.dtype for n, t in merged.items() if n != IDS} == {torch.float16}
    assert merged[IDS].dtype == torch.int64 and "betas" not in merged
    rebasin(*pair, "--alpha", "0.2", "--ckpt", "--usefp32", entry=main)
    old = torch.load(tmp_path / "merged.ckpt", weights_only=True)["state_dict"]
    name = "first_stage_model.decoder.norm_out.bias"
    torch.testing.assert_close(old[name], 0.8 * read(files.a)[name] + 0.2 * read(files.f)[name])
    assert "exists" in rebasin(*pair, entry=main, expect=2)
    assert "0 to 1" in rebasin(*pair, "--alpha", "1.5", entry=main, expect=2)
    assert "never permuted" in rebasin("--help", entry=main)
