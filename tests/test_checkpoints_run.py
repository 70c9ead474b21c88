"""`python -m rebasin.run model=checkpoint`: a planted permutation through the run, measured and not, and dry."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_files import rebasin
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from rebasin.checkpoints import (
    component_spec,
    load_safetensors,
    open_checkpoint,
    save_checkpoint,
    save_safetensors,
)
from rebasin.checkpoints.random_weights import noisy, random_checkpoint
from rebasin.errors import ConfigError
from rebasin.files import config_dir
from rebasin.reporting.console import Console
from rebasin.run import run
from rebasin.tasks.agreement import Agreement, outputs_of, with_targets


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A narrow SD1 with a short text encoder, and the same model with its text encoder reordered."""
    folder = tmp_path_factory.mktemp("pair")
    state = dict(random_checkpoint("sd1", 16, depth=1, vocabulary=64, dtype=torch.float32))
    a = save_safetensors(folder / "a.safetensors", state, {"format": "pt"})
    found = open_checkpoint(a)
    planted = component_spec(found, "text_encoder").random(4)
    moved = found.restore({"text_encoder": planted.view(found.component("text_encoder"))})
    return a, save_checkpoint(folder / "b.safetensors", found, moved).path


def configuration(folder: Path, *overrides: str) -> Any:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose(
            "config",
            overrides=[
                "model=checkpoint",
                "logger=none",
                "evaluate.points=3",
                f"path.cache={folder}",
                *overrides,
            ],
        )


def test_a_planted_permutation_is_undone_and_the_merge_is_a_checkpoint(pair, tmp_path):
    a, b = pair
    cfg = configuration(tmp_path / "cache", f"model.a={a}", f"model.b={b}", "model.component=text_encoder")
    results = run(cfg, tmp_path / "out", Console())
    assert results is not None
    text = OmegaConf.to_container(OmegaConf.create(results)) if isinstance(results, dict) else results
    assert text is not None
    merged, original = load_safetensors(tmp_path / "out" / "checkpoint.safetensors"), load_safetensors(a)
    assert list(merged) == list(original)
    assert all(torch.equal(merged[name], original[name]) for name in original)
    naive = torch.tensor([float((load_safetensors(b)[n] - original[n]).abs().max()) for n in original]).max()
    assert naive > 0
    assert "rebasin_command" in merged.metadata


def test_without_measuring_nothing_is_computed_and_the_files_are_there(pair, tmp_path):
    a, b = pair
    cfg = configuration(
        tmp_path / "cache", f"model.a={a}", f"model.b={b}", "model.component=text_encoder", "model.batches=0"
    )
    assert run(cfg, tmp_path / "out", Console()) is not None
    for name in ("checkpoint.safetensors", "permutation.safetensors", "results.json", "report.html"):
        assert (tmp_path / "out" / name).is_file(), name


def test_the_information_that_a_run_leaves_is_what_the_command_takes(pair, tmp_path):
    """Of the same models in the same order both make the same merge, which is not the plain one."""
    a, b = pair
    found = open_checkpoint(b)
    other = {name: t + 0.02 * torch.randn_like(t) for name, t in found.component("text_encoder").items()}
    b = save_checkpoint(tmp_path / "c.safetensors", found, found.restore({"text_encoder": other})).path
    given = (f"model.a={a}", f"model.b={b}", "model.component=text_encoder", "model.batches=1")
    out = tmp_path / "out"
    assert run(configuration(tmp_path / "cache", *given, "merge=fisher"), out, Console()) is not None
    fisher = [word for name in "ab" for word in ("--fisher", out / f"fisher_{name}.safetensors")]
    command = ("merge", a, b, "--only", "text_encoder", "-o", tmp_path / "merged.safetensors")
    rebasin(*command, "--method", "fisher", *fisher)
    own, theirs, plain = (
        dict(open_checkpoint(path).component("text_encoder"))
        for path in (out / "checkpoint.safetensors", tmp_path / "merged.safetensors", a)
    )
    for name, tensor in theirs.items():
        torch.testing.assert_close(own[name], tensor)
    assert any(not torch.allclose(own[name], plain[name], atol=1e-3) for name in own)
    informed = load_safetensors(out / "fisher_b.safetensors")
    assert "Fisher information of B" in informed.metadata["content"] and set(informed) == set(theirs)


def test_a_dry_run_tells_the_plan_and_loads_nothing(pair, tmp_path, capsys):
    a, b = pair
    cfg = configuration(
        tmp_path / "cache", f"model.a={a}", f"model.b={b}", "model.component=text_encoder", "dry_run=true"
    )
    assert run(cfg, tmp_path / "out", Console()) is None
    told = capsys.readouterr().out
    assert "a.safetensors is Stable Diffusion 1, 0.0" in told
    assert "GB of memory" in told
    assert re.search(r"about \d+ s here for every restart", told)
    assert not (tmp_path / "out" / "checkpoint.safetensors").exists()


def test_options_that_do_not_fit_are_one_sentence(pair, tmp_path):
    a, b = pair
    with pytest.raises(ConfigError, match=r"needs model\.b"):
        run(configuration(tmp_path, f"model.a={a}"), tmp_path / "out", Console())
    both = (f"model.a={a}", f"model.b={b}")
    with pytest.raises(ConfigError, match=r"model\.dtype is 'fp64'"):
        run(configuration(tmp_path, *both, "model.dtype=fp64"), tmp_path / "out", Console())
    with pytest.raises(ConfigError, match=r"model\.joint=true needs model\.component=unet"):
        run(
            configuration(tmp_path, *both, "model.joint=true", "model.component=vae"),
            tmp_path / "out",
            Console(),
        )


def test_agreement_is_a_quarter_of_the_distance_at_both_ends():
    torch.manual_seed(0)
    a, b = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    inputs = [{"args": (torch.randn(5, 4),), "kwargs": {}}]
    batches = with_targets(inputs, outputs_of(a, inputs), outputs_of(b, inputs))
    target = batches[0]["targets"]["output"]
    with torch.no_grad():
        apart = (a(*inputs[0]["args"]) - b(*inputs[0]["args"])).square().mean() / 4 / target.square().mean()
    for model in (a, b):
        assert Agreement().evaluate(model, batches)["loss"] == pytest.approx(float(apart), rel=1e-5)


def test_noise_of_a_fine_tune_moves_nothing(tmp_path):
    import rebasin

    state = dict(random_checkpoint("sd1", 16, depth=1, vocabulary=40, dtype=torch.float32))
    a = open_checkpoint(save_safetensors(tmp_path / "a.safetensors", state))
    c = open_checkpoint(save_safetensors(tmp_path / "c.safetensors", noisy(a.raw, 0.02)))
    spec = component_spec(a, "text_encoder", prove=False)
    assert rebasin.weight_matching(spec, a.component("text_encoder"), c.component("text_encoder")).moved == 0
