"""Activation matching: what was planted is found wherever it can be seen, and the statistics are those of numpy."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import train_tiny_sd
from hydra import compose, initialize_config_dir
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import rebasin
from experiments.zoo import ZOO
from experiments.zoo_blocks import BLOCKS, Apply
from rebasin.data.prompts import captioned_images, read_prompts
from rebasin.data.sampled import chosen_steps, encoded_batches, sampled_batches
from rebasin.errors import CheckpointError, ConfigError, DataError, SpecMismatchError
from rebasin.files import config_dir
from rebasin.jobs.algorithm import load_algorithm
from rebasin.matching import (
    ActivationState,
    activation_and_weight,
    activation_statistics,
    activation_then_weight,
    match_statistics,
)
from rebasin.matching.activations.hook_sites import find_hook_sites, sample_rows
from rebasin.matching.activations.joint import balanced
from rebasin.matching.activations.prompts import match_pipelines, prompt_activation_matching
from rebasin.matching.weights.endpoints import Endpoints
from rebasin.models import MLP, VGG, ResNet, tiny_sd
from rebasin.objectives import CrossEntropy, Denoising
from rebasin.spec import Permutation, PermutationSpec
from rebasin.tasks import load_task
from rebasin.tensors.modules import call_model
from rebasin.tensors.moments import Moments
from rebasin.tracing.verify import _randomise


def planted(model: nn.Module, spec: PermutationSpec, seed: int = 3) -> tuple[nn.Module, Permutation]:
    """A copy of `model` whose neurons stand elsewhere, and the permutation that brings it back."""
    _randomise(model.eval(), 0, "normal")
    permutation = spec.random(seed)
    other = copy.deepcopy(model)
    other.load_state_dict(permutation.apply(model.state_dict()))
    return other, permutation.invert()


def images(count: int = 64, channels: int = 3, size: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def denoising(count: int = 48, seed: int = 0) -> list[tuple[Tensor, ...]]:
    """(latents, timesteps, text states) for the tiny UNet."""
    generator = torch.Generator().manual_seed(seed)
    x, c = torch.randn(count, 4, 8, 8, generator=generator), torch.randn(count, 6, 64, generator=generator)
    t = torch.randint(0, 1000, (count,), generator=generator)
    return list(zip(x.split(24), t.split(24), c.split(24), strict=True))


@pytest.fixture(scope="module")
def unet() -> tuple[nn.Module, PermutationSpec]:
    model = tiny_sd.new_unet(0).eval()
    return model, rebasin.trace(model, *(t[:2] for t in denoising(4)[0]))


# Planted permutations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistic", ["pearson", "inner_product", "covariance"])
@pytest.mark.parametrize(
    "model",
    [
        MLP(inputs=192, width=40),
        VGG(11, width=4, norm="batch"),
        ResNet(0.5, blocks=1),
        ResNet(0.5, "group", blocks=1),
    ],
    ids=["mlp", "vgg-bn", "resnet-ln", "resnet-gn"],
)
def test_planted_permutations_of_classifiers_are_found(model, statistic):
    model = copy.deepcopy(model)
    spec = rebasin.trace(model.eval(), images(2))
    other, answer = planted(model, spec)
    # Behind a ReLU some neurons are dead, and nothing that they do tells them apart.
    found = rebasin.activation_matching(
        spec, model, other, images(200).split(100), statistic=statistic, reads="outputs"
    )
    assert found.permutation == answer
    assert found.moved == answer.moved() == sum(found.moved_per_group.values())
    assert found.distance_after < 1e-3 < found.distance_before
    assert found.objective > found.initial_objective


@pytest.mark.parametrize(
    "name",
    ["clip_text", "gpt2", "transformer_encoder", "multihead_attention", "fused_qkv", "geglu", "depthwise",
     "conv_flatten_linear", "linear_unflatten_conv", "grouped_conv_transpose", "pixel_shuffle",
     "concat_skip_group_norm", "weight_norm", "prelu", "shared_module", "rope_gqa", "alibi_scale_per_head"],
)  # fmt: skip
def test_planted_permutations_of_building_blocks_are_found(name):
    family = "blocks" if name in BLOCKS else "transformers"
    model, args, kwargs = ZOO[family][name](False)
    spec = rebasin.trace(model.eval(), *args, **kwargs)
    other, answer = planted(model, spec)
    generator = torch.Generator().manual_seed(0)

    def fresh(t: Tensor) -> Tensor:
        if t.is_floating_point():
            return torch.randn(t.shape, generator=generator)
        return torch.randint(5, 60, t.shape, generator=generator)

    batches = [pytree.tree_map_only(Tensor, fresh, (args, kwargs)) for _ in range(20)]
    found = rebasin.activation_matching(spec, model, other, batches, reads="both")
    assert found.permutation == answer
    assert found.fallback == ()


@pytest.mark.parametrize("tokens", [None, 12])
def test_a_planted_permutation_of_a_diffusion_unet_is_found(unet, tokens):
    model, spec = copy.deepcopy(unet[0]), unet[1]
    other, answer = planted(model, spec)
    found = rebasin.activation_matching(spec, model, other, denoising(), tokens=tokens)
    assert found.permutation == answer
    assert found.objective == pytest.approx(spec.neurons, rel=1e-3)  # correlation 1, neuron by neuron
    assert set(found.places) == {group.name for group in spec}


def test_a_neuron_dimension_beside_the_channels_is_no_place_to_look_at():
    """In a mixer tokens become neurons on a tensor with channels: its positions in A and B do not correspond."""
    model, args, _ = ZOO["blocks"]["mixer"](False)
    spec = rebasin.trace(model.eval(), *args)
    other, answer = planted(model, spec)
    data = [(torch.randn(40, *args[0].shape[1:]),) for _ in range(3)]
    with pytest.raises(ConfigError, match="group 't1' never appear"):
        rebasin.activation_matching(spec, model, other, data)
    found = rebasin.activation_matching(spec, model, other, data, fallback_to_weights=True)
    assert found.permutation == answer
    assert found.fallback == ("t1",)


def test_channels_are_found_whichever_dimension_they_have():
    """A norm of somebody's own, with as many pixels on a side as channels."""
    model = ResNet(0.5, blocks=1)
    spec = rebasin.trace(model.eval(), images(2))
    hook_sites = find_hook_sites(spec, model, lambda m: m(images(2)))
    norms = {site.module: site.dim for site in hook_sites if site.module.endswith("norm")}
    assert norms and set(norms.values()) == {1}
    assert all(site.dim == -3 for site in hook_sites if site.module.endswith("conv"))


# Statistics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[500], [1, 9, 200, 290], [50] * 10])
def test_streamed_moments_are_those_of_numpy_on_the_concatenated_data(sizes):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(500, 7)) @ rng.normal(size=(7, 7)) + 100 * rng.normal(size=7)
    b = a[:, ::-1] * 0.7 + rng.normal(size=(500, 7)) - 40
    moments = Moments.zeros(7)
    for part in np.split(np.arange(500), np.cumsum(sizes)[:-1]):
        moments.add(torch.from_numpy(a[part]).float(), torch.from_numpy(b[part].copy()).float())
    both = np.corrcoef(a, b, rowvar=False)[:7, 7:]
    np.testing.assert_allclose(moments.statistic("pearson"), both, atol=2e-5)
    covariance = np.cov(a, b, rowvar=False, bias=True)[:7, 7:]
    np.testing.assert_allclose(moments.statistic("covariance"), covariance, rtol=2e-5, atol=2e-4)
    np.testing.assert_allclose(moments.statistic("inner_product"), a.T @ b / 500, rtol=2e-5)
    exact = Moments.zeros(7)
    exact.add(torch.from_numpy(a), torch.from_numpy(b.copy()))
    np.testing.assert_allclose(exact.statistic("pearson"), both, atol=1e-12)


def test_whole_models_give_the_correlation_of_their_activations_too():
    a, b, x = MLP(width=12).eval(), MLP(width=12).eval(), torch.rand(90, 64)
    spec = rebasin.trace(a, x[:2])
    statistics = activation_statistics(spec, a, b, x.split(40))
    for cell, layer in zip(spec.cells, (0, 1, 2), strict=True):
        hidden = []
        for model in (a, b):
            y = x
            for linear in model.layers[: layer + 1]:
                y = linear(y).relu()
            hidden.append(y.detach().double().numpy())
        with np.errstate(invalid="ignore"):
            expected = np.nan_to_num(np.corrcoef(*hidden, rowvar=False)[:12, 12:])
        np.testing.assert_allclose(statistics.costs(cell, "pearson"), expected, atol=1e-5)
        np.testing.assert_allclose(
            statistics.costs(cell, "inner_product"), hidden[0].T @ hidden[1] / 90, atol=1e-5
        )


@pytest.mark.parametrize("tokens", [None, 5])
def test_how_samples_are_cut_into_batches_does_not_matter(tokens):
    a, b = (ResNet(0.5, blocks=1).eval() for _ in range(2))
    spec, x = rebasin.trace(a, images(2)), images(70)
    one, other = (
        activation_statistics(spec, a, b, x.split(size), tokens=tokens, reads="both") for size in (70, 11)
    )
    for cell in spec.cells:
        for statistic in ("pearson", "inner_product"):
            difference = (one.costs(cell, statistic) - other.costs(cell, statistic)).abs().max()
            assert difference < 1e-5 * one.costs(cell, statistic).abs().max()
    first, second = (match_statistics(s, a.state_dict(), b.state_dict()) for s in (one, other))
    assert first.permutation == second.permutation
    assert first.objective == pytest.approx(second.objective, rel=1e-6)


def test_positions_are_drawn_once_for_each_sample_and_reproducibly():
    x = torch.arange(3 * 2 * 20, dtype=torch.float32).reshape(3, 2, 4, 5)
    rows, samples = sample_rows(x, -3, 6, seed=0, first=0)
    assert samples == 3 and rows.shape == (18, 2)
    assert torch.equal(
        rows[:, 1] - rows[:, 0], torch.full((18,), 20.0)
    )  # both channels at the same positions
    assert all(len(set(part.tolist())) == 6 for part in rows[:, 0].split(6))
    later, _ = sample_rows(x[1:], -3, 6, seed=0, first=1)
    assert torch.equal(later, rows[6:])
    assert not torch.equal(sample_rows(x, -3, 6, seed=1, first=0)[0], rows)
    last, _ = sample_rows(x.movedim(1, -1), -1, 6, seed=0, first=0)
    assert torch.equal(last, rows)
    assert sample_rows(x, -3, None, 0, 0)[0].shape == (60, 2)


def test_dead_neurons_give_no_nan_and_stay_where_they_may():
    a, b = MLP(width=16).eval(), MLP(width=16).eval()
    with torch.no_grad():
        for model, dead in ((a, (3, 4)), (b, (4, 7))):
            for neuron in dead:
                model.state_dict()["layers.0.weight"][neuron] = 0
                # Constant, and never active.
                model.state_dict()["layers.0.bias"][neuron] = 0.1 if neuron == 4 else -1.0
    x = torch.rand(80, 64)
    spec = rebasin.trace(a, x[:2])
    for statistic in ("pearson", "covariance", "inner_product"):
        for reads in ("inputs", "outputs"):
            found = rebasin.activation_matching(spec, a, b, [x], statistic=statistic, reads=reads)
            assert np.isfinite(found.objective) and spec.contains(found.permutation)
    costs = activation_statistics(spec, a, b, [x]).costs(next(iter(spec.cells)), "pearson")
    assert not costs[3].any() and not costs[4].any() and not costs[:, 7].any()


def test_what_dead_neurons_leave_open_is_decided_by_the_weights():
    model, x = MLP(inputs=64, width=30), torch.rand(200, 64)
    spec = rebasin.trace(model.eval(), x[:2])
    _randomise(model, 0, "normal")
    with torch.no_grad():
        for k in range(3):
            model.state_dict()[f"layers.{k}.bias"][5 * k : 5 * k + 9] = -1000.0
    other = copy.deepcopy(model)
    permutation = spec.random(1)
    other.load_state_dict(permutation.apply(model.state_dict()))
    for statistic in ("pearson", "inner_product"):
        found = rebasin.activation_matching(spec, model, other, [x], statistic=statistic)
        assert found.permutation == permutation.invert()
        assert found.fallback == ()


def test_memory_does_not_grow_and_float32_sums_are_nearly_the_same(unet):
    model, spec = unet
    other = tiny_sd.new_unet(1).eval()
    events: list[dict[str, Any]] = []
    short = activation_statistics(spec, model, other, denoising(24), progress=events.append)
    longer = activation_statistics(spec, model, other, denoising(48), progress=events.append)
    single = activation_statistics(spec, model, other, denoising(48), precision="float32")
    assert short.bytes == longer.bytes == events[0]["bytes"] == events[-1]["bytes"] > 1.8 * single.bytes
    assert [event["step"] for event in events] == [0, 1, 0, 1, 2]
    for cell in list(spec.cells)[::7]:
        difference = (single.costs(cell, "pearson") - longer.costs(cell, "pearson")).abs().max()
        assert difference < 1e-5


# Places -----------------------------------------------------------------------------------------------------


def test_sites_of_a_residual_stream_can_be_chosen():
    a, b = (ResNet(0.5, blocks=2).eval() for _ in range(2))
    spec, x = rebasin.trace(a, images(2)), [images(40)]
    stream = next(
        group.name for group in spec if any(s.parameter == "stem.conv.weight" for s in group.cells[0].sites)
    )

    def places(**options: Any) -> tuple[str, ...]:
        return rebasin.activation_matching(spec, a, b, x, **options).places[stream]

    read = ("blocks.0.first.conv.input", "blocks.1.first.conv.input", "blocks.2.first.conv.input")
    assert places() == read  # the shortcut reads the same tensor as the first convolution of its block
    assert places(sites="last") == read[-1:]
    assert places(sites=["blocks.1.first.conv"]) == read[1:2]
    assert "stem.conv.output" in places(reads="outputs") and "stem.norm.output" in places(reads="outputs")
    assert set(read) < set(places(reads="both"))
    with pytest.raises(ConfigError, match=r"'blocks.1.first.con' .* did you mean 'blocks.1.first.conv'"):
        places(sites=["blocks.1.first.con"])
    with pytest.raises(ConfigError, match="one of all, last, a list or None as sites, not 'first'"):
        places(sites="first")


def test_what_follows_may_change_a_tensor_in_place():
    def build() -> nn.Sequential:
        net = nn.Sequential(nn.Linear(5, 12), nn.ReLU(inplace=True), nn.Linear(12, 9), nn.ReLU(inplace=True))
        return net.append(nn.Linear(9, 3)).eval()

    a, b = build(), build()
    x = torch.randn(50, 5)
    spec = rebasin.trace(a, x[:2])
    costs = activation_statistics(spec, a, b, [x], reads="outputs").costs(
        next(iter(spec.cells)), "inner_product"
    )
    expected = a[0](x).T @ b[0](x) / 50
    torch.testing.assert_close(costs, expected.detach().double(), rtol=1e-5, atol=1e-5)


# Running ----------------------------------------------------------------------------------------------------


def test_models_are_left_as_they_were(unet):
    model, spec = unet
    other = tiny_sd.new_unet(1).train()
    model.train()
    model.down_blocks.eval()
    before = [{n: t.clone() for n, t in m.state_dict().items()} for m in (model, other)]
    modes = [[m.training for m in net.modules()] for net in (model, other)]
    rebasin.activation_matching(spec, model, other, denoising(24))
    with pytest.raises(ZeroDivisionError):
        rebasin.activation_matching(spec, model, other, [1], forward=lambda m, b: b / 0)
    for net, state, mode in zip((model, other), before, modes, strict=True):
        assert all(torch.equal(t, state[n]) for n, t in net.state_dict().items())
        assert [m.training for m in net.modules()] == mode
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    model.eval()


def test_batches_reach_the_model_as_they_should(unet):
    a, b, x = MLP(width=12).eval(), MLP(width=12).eval(), torch.rand(40, 64)
    spec, y = rebasin.trace(a, x[:2]), torch.randint(0, 10, (40,))
    reference = rebasin.activation_matching(spec, a, b, [x]).permutation
    for batch in ((x, y), {"x": x}, (x,), ((x,), {})):
        assert rebasin.activation_matching(spec, a, b, [batch]).permutation == reference
    assert (
        rebasin.activation_matching(spec, a, b, iter([(x, y)]), objective=CrossEntropy()).permutation
        == reference
    )
    assert rebasin.activation_matching(spec, a, b, ["x"], forward=lambda m, _: m(x)).permutation == reference
    with pytest.raises(DataError, match="A batch is str"):
        rebasin.activation_matching(spec, a, b, ["x"])

    model, spec = unet
    other, (latents, timesteps, condition) = tiny_sd.new_unet(1).eval(), denoising(24)[0]
    objective = Denoising(alphas_cumprod=torch.linspace(0.999, 0.01, 1000))
    batch = {"latents": latents, "noise": latents.flip(0), "timesteps": timesteps, "condition": condition}
    noisy, _ = objective.noisy_and_target(batch)
    by_objective = rebasin.activation_matching(spec, model, other, [batch], objective=objective)
    assert (
        by_objective.permutation
        == rebasin.activation_matching(spec, model, other, [(noisy, timesteps, condition)]).permutation
    )


def test_a_second_argument_of_whole_numbers_is_no_label_if_the_model_requires_it():
    net = Apply(lambda m, x, t: m.a(x), a=nn.Linear(3, 2))
    net.forward = lambda x, t: x + t[:, None]  # type: ignore[method-assign]
    assert torch.equal(call_model(net, (torch.zeros(4, 3), torch.arange(4)))[:, 0], torch.arange(4.0))


def test_half_precision_models_are_matched_like_their_originals():
    model = MLP(width=24)
    spec = rebasin.trace(model.eval(), torch.rand(2, 64))
    other, answer = planted(model, spec)
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = rebasin.activation_matching(spec, model.bfloat16(), other.bfloat16(), [x], reads="outputs")
    assert found.permutation == answer


def test_an_interrupted_pass_ends_like_an_uninterrupted_one(tmp_path):
    a, b = (ResNet(0.5, blocks=1).eval() for _ in range(2))
    spec, batches, path = rebasin.trace(a, images(2)), images(60).split(13), tmp_path / "state.safetensors"
    whole = rebasin.activation_matching(spec, a, b, batches, tokens=7)

    def stop(state: ActivationState) -> None:
        state.save(path)
        if state.batches == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rebasin.activation_matching(spec, a, b, batches, tokens=7, checkpoint=stop)
    state = ActivationState.load(path)
    resumed = rebasin.activation_matching(spec, a, b, batches, tokens=7, resume_from=state)
    assert resumed.permutation == whole.permutation
    assert resumed.objective == whole.objective
    assert resumed.batches == whole.batches == 5
    with pytest.raises(ConfigError, match="can't be continued: its tokens differed"):
        rebasin.activation_matching(spec, a, b, batches, tokens=8, resume_from=state)
    with pytest.raises(ConfigError, match="can't be continued: its weights differed"):
        rebasin.activation_matching(spec, a, a, batches, tokens=7, resume_from=state)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError):
        ActivationState.load(path)


def test_the_result_tells_what_was_seen_and_fits_into_json():
    a, b, x = MLP(width=12).eval(), MLP(width=12).eval(), torch.rand(40, 64)
    events: list[dict[str, Any]] = []
    found = rebasin.activation_matching(rebasin.trace(a, x[:2]), a, b, [x], progress=events.append)
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["statistic"] == "pearson" and plain["batches"] == 1
    assert all(-1 <= before <= after <= 1 for before, after in plain["scores"].values())
    assert plain["places"][found.permutation.spec.groups[0].name] == ["layers.1.input"]
    assert [sweep.objective for sweep in found.history] == [found.initial_objective, found.objective]
    assert {"stage", "step", "total", "objective", "moved", "seconds"} <= events[-1].keys()


# With weights -----------------------------------------------------------------------------------------------


def test_hybrids_end_where_neither_objective_would_end_alone():
    a, b, x = MLP(width=24).eval(), MLP(width=24).eval(), torch.rand(60, 64)
    spec = rebasin.trace(a, x[:2])
    first = rebasin.activation_matching(spec, a, b, [x])
    then = activation_then_weight(spec, a, b, [x])
    states = a.state_dict(), b.state_dict()
    expected = rebasin.weight_matching(spec, *states, init=first.permutation)
    assert then.permutation == expected.permutation
    assert then.initial_objective == rebasin.weight_matching(spec, *states).initial_objective
    assert then.history[0].moved == first.moved

    both = activation_and_weight(spec, a, b, [x], weight=0.5)
    assert both.converged
    assert all(x.objective < y.objective for x, y in zip(both.history, both.history[1:-1], strict=False))
    assert first.distance_after > both.distance_after > then.distance_after
    assert activation_and_weight(spec, a, b, [x], weight=0).permutation == first.permutation
    assert activation_and_weight(spec, a, b, [x], weight=1).permutation == expected.permutation
    with pytest.raises(ConfigError, match="weight is 1.5"):
        activation_and_weight(spec, a, b, [x], weight=1.5)


class Lookup(nn.Module):
    """Reads a table of other units than its weights' (as positions, or a codebook), which is trained or not."""

    def __init__(self, kind: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.c = nn.Linear(24, 32), nn.Linear(32, 32), nn.Linear(32, 5)
        self.scale = 1.0 if kind == "plain" else 300.0
        table = torch.randn(50, 24) * self.scale
        if kind == "buffer":
            self.register_buffer("table", table)
        else:
            self.table = nn.Parameter(table, requires_grad=kind != "frozen")

    def forward(self, tokens):
        hidden = torch.relu(self.a(self.table[tokens] / self.scale))
        return self.c(torch.relu(self.b(hidden)))


@pytest.mark.parametrize("kind", ["plain", "buffer", "frozen", "huge"])
def test_one_tensor_of_large_numbers_does_not_drown_the_weights(kind):
    """B is A's planted copy with noise, and six samples are too few for activations: the weights must be heard."""
    right = {"activations": 0.0, "both": 0.0}
    for seed in range(3):
        a, b = Lookup(kind, 0).eval(), Lookup(kind, 1).eval()
        generator = torch.Generator().manual_seed(seed)
        spec = rebasin.trace(a, torch.randint(50, (4,), generator=generator))
        plan = spec.random(seed + 1)
        moved = plan.apply(a.state_dict())
        noise = {
            n: torch.randn(t.shape, generator=generator) * 0.6 * t.std()
            for n, t in moved.items()
            if n != "table"
        }
        b.load_state_dict({name: t + noise.get(name, 0) for name, t in moved.items()})
        batches = [torch.randint(50, (6,), generator=generator)]
        found = {
            "activations": rebasin.activation_matching(spec, a, b, batches).permutation,
            "both": activation_and_weight(spec, a, b, batches).permutation,
        }
        answer = plan.invert()
        for name, one in found.items():
            hits = sum(int((one.index[cell] == answer.index[cell]).sum()) for cell in one.index)
            right[name] += hits / spec.neurons / 3
        pair = Endpoints(spec, a.state_dict(), b.state_dict())
        weights, largest = balanced(pair, {"table"} if kind in ("buffer", "frozen") else ())
        if kind == "plain":
            assert weights == pair.weight and largest == pair.scale, "nothing changes where nothing is large"
        else:
            assert (
                weights.pop("table") < 0.01 and set(weights.values()) == {1.0} and largest < pair.scale / 100
            )
    assert right["activations"] < 0.6
    assert right["both"] > (right["activations"] if kind == "plain" else 0.85)


def test_planted_permutations_with_structure_are_found_by_the_sum_too(unet):
    model, spec = copy.deepcopy(unet[0]), unet[1]
    other, answer = planted(model, spec)
    assert activation_and_weight(spec, model, other, denoising(24), tokens=8).permutation == answer


def test_groups_that_no_module_shows_are_named_or_matched_by_their_weights():
    model, args, _ = ZOO["blocks"]["functional_parameters"](False)
    spec = rebasin.trace(model.eval(), *args)
    other, answer = planted(model, spec)
    with pytest.raises(ConfigError, match="group 'a' never appear at an input or output of a module"):
        rebasin.activation_matching(spec, model, other, [args])
    found = rebasin.activation_matching(spec, model, other, [args], fallback_to_weights=True)
    assert found.permutation == answer
    assert found.fallback == ("a",)


@pytest.mark.parametrize("name", ["activation_matching", "activation_then_weight", "activation_and_weight"])
def test_a_run_can_choose_it_by_name(name):
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose(
            "config", overrides=["model=mlp", "model.width=8", "model.recipe.epochs=1", f"algo={name}"]
        )
        prompts = compose("config", overrides=["algo=activation_matching_prompts"]).algo
    assert load_algorithm(prompts).function is prompt_activation_matching
    task = load_task(cfg)
    spec = rebasin.trace(task.model, *task.parts["mlp"].args)
    states = task.endpoints(None)
    found = load_algorithm(cfg.algo)(task, spec, *states)
    direct = {
        "activation_then_weight": activation_then_weight,
        "activation_and_weight": activation_and_weight,
    }
    models = [copy.deepcopy(task.model) for _ in states]
    for model, state in zip(models, states, strict=True):
        model.load_state_dict(dict(state))
    again = direct.get(name, rebasin.activation_matching)(spec, *models, task.batches["train"])
    assert found.permutation == again.permutation


# Bad input --------------------------------------------------------------------------------------------------


def test_bad_input_costs_one_sentence():
    a, b, x = MLP(width=12).eval(), MLP(width=12).eval(), torch.rand(40, 64)
    spec = rebasin.trace(a, x[:2])

    def match(*args: Any, **options: Any) -> Any:
        return rebasin.activation_matching(spec, *args, **options)

    with pytest.raises(SpecMismatchError, match=r"'layers.0.weight' of B has shape \(9, 64\)"):
        match(a, MLP(width=9), [x])
    with pytest.raises(DataError, match="the batches are empty"):
        match(a, b, [])
    bad = x.clone()
    bad[3, 5] = float("inf")
    with pytest.raises(
        DataError, match=r"Batch 2 gives NaN or infinite values at the input of 'layers.1' in A"
    ):
        match(a, b, [x, bad])
    broken = copy.deepcopy(b)
    with torch.no_grad():
        broken.state_dict()["layers.1.bias"][2] = float("nan")
    with pytest.raises(
        DataError, match=r"Batch 1 gives NaN or infinite values at the input of 'layers.2' in B"
    ):
        match(a, broken, [x])
    for options, sentence in (
        (
            {"statistic": "cosine"},
            "statistic is 'cosine'; choose one of inner_product, covariance, pearson",
        ),
        ({"reads": "weights"}, "reads is 'weights'; choose one of inputs, outputs, both"),
        ({"tokens": -1}, "tokens is -1"),
        ({"precision": "float16"}, "precision is 'float16'; choose one of float32, float64"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            match(a, b, [x], **options)


def test_models_that_compute_differently_are_told_apart():
    def build(twice: bool) -> nn.Module:
        forward = lambda m, x: m.h(F.relu(m.s(F.relu(m.s(m.e(x)))) if twice else m.s(m.e(x))))  # noqa: E731
        return Apply(forward, e=nn.Linear(5, 8), s=nn.Linear(8, 8), h=nn.Linear(8, 3)).eval()

    a, b, x = build(False), build(True), torch.randn(20, 5)
    for first, second in ((a, b), (b, a)):
        with pytest.raises(SpecMismatchError, match="A and B do not compute alike: .* of 's' differs"):
            rebasin.activation_matching(rebasin.trace(first, x[:2]), first, second, [x])


# Pipelines --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipelines(unet) -> tuple[dict[str, PermutationSpec], Any, Any, dict[str, Permutation]]:
    """A small pipeline with random weights and another with the same, its neurons rearranged in every part."""
    from transformers import CLIPTextModel

    tokenizer = train_tiny_sd.new_tokenizer(["a handwritten seven"])
    text = CLIPTextModel(tiny_sd.text_config(tokenizer))
    parts = {"unet": tiny_sd.new_unet(0), "vae": train_tiny_sd.new_vae(0), "text_encoder": text}
    examples = {
        "vae": (torch.randn(2, 1, 32, 32),),
        "text_encoder": (tokenizer(["seven"], padding="max_length", return_tensors="pt").input_ids,),
    }
    specs = {"unet": unet[1]} | {n: rebasin.trace(parts[n].eval(), *given) for n, given in examples.items()}
    others, answers = {}, {}
    for name, part in parts.items():
        others[name], answers[name] = planted(part, specs[name])
    made = []
    for chosen in (parts, others):
        made.append(
            tiny_sd.build_pipeline(
                chosen["unet"], chosen["vae"], chosen["text_encoder"], tokenizer, tiny_sd.new_scheduler()
            )
        )
    return specs, made[0], made[1], answers


def test_all_parts_of_two_pipelines_are_matched_on_the_same_prompts(pipelines):
    specs, a, b, answers = pipelines
    events: list[dict[str, Any]] = []
    prompts = ["a handwritten seven", "seven", "a seven", "handwritten"]
    found = match_pipelines(
        specs,
        a,
        b,
        prompts,
        steps=3,
        points=3,
        guidance=3.0,
        batch_size=4,
        reads="both",
        progress=events.append,
    )
    for part, answer in answers.items():
        assert found[part].permutation == answer, part
    assert {event["stage"].split(":")[0] for event in events} == set(specs)
    assert not any(m._forward_pre_hooks for m in a.unet.modules())


def test_recorded_inputs_are_those_of_the_schedule(pipelines):
    _, a, b, _ = pipelines
    options: dict[str, Any] = dict(parts=("unet", "text_encoder"), steps=3, points=[0.0, 0.5])
    batches = sampled_batches((a, b), ["seven", "a seven", "a"], guidance=3.0, batch_size=2, **options)
    times = sorted({int(args[1]) for args, _ in batches["unet"]}, reverse=True)
    assert times == [999, 666]
    assert [len(args[0]) for args, _ in batches["unet"]] == 2 * [4, 4, 2, 2]  # with and without the prompt
    assert (
        len(batches["text_encoder"]) == 4
    )  # of the first pipeline: prompts and empty prompts of two batches
    plain = sampled_batches((a,), ["seven", "a seven", "a"], guidance=1.0, batch_size=3, **options)["unet"]
    assert [len(args[0]) for args, _ in plain] == [3, 3]
    first = plain[0][0][0]  # pure noise: the same for every batch size, pipeline and guidance
    torch.testing.assert_close(first, torch.cat([batches["unet"][0][0][0][2:], batches["unet"][2][0][0][1:]]))
    assert chosen_steps(3, 25) == [0, 12, 24] and chosen_steps([1.0], 10) == [9]
    for points in (0, [], [1.2]):
        with pytest.raises(ConfigError, match="number of the schedule's points"):
            chosen_steps(points, 25)
    with pytest.raises(DataError, match="no prompts"):
        sampled_batches((a,), [])
    with pytest.raises(ConfigError, match="no part 'tokenizer'"):
        sampled_batches((a,), ["seven"], parts=["tokenizer"])


def test_prompts_and_captioned_images(pipelines, tmp_path):
    from PIL import Image

    specs, a, b, answers = pipelines
    assert len(read_prompts()) == 32
    text = tmp_path / "prompts.txt"
    text.write_text("# mine\n\n  seven \na seven\n")
    assert read_prompts(text) == ["seven", "a seven"]
    text.write_text("# nothing\n\n")
    with pytest.raises(DataError, match="has no prompts: write one a line"):
        read_prompts(text)
    with pytest.raises(DataError, match="There is no file or folder"):
        read_prompts(tmp_path / "missing.txt")

    folder = tmp_path / "images"
    folder.mkdir()
    with pytest.raises(DataError, match="has no images"):
        captioned_images(folder)
    rng = np.random.default_rng(0)
    for k in range(4):
        Image.fromarray(rng.integers(0, 255, (40, 50), dtype=np.uint8)).save(folder / f"{k}.png")
    with pytest.raises(DataError, match=r"0.png has no caption: write one to 0.txt"):
        captioned_images(folder)
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a seven"}\n')
    for k in range(1, 4):
        (folder / f"{k}.txt").write_text("seven\n")
    assert read_prompts(folder) == ["a seven", "seven", "seven", "seven"]

    batches = encoded_batches(a, captioned_images(folder), steps=10, points=3, guidance=3.0, batch_size=2)
    assert len(batches) == 2 * 3 * 2
    (latents, time), keywords = batches[-1]
    assert (
        latents.shape == (2, 4, 8, 8)
        and time.shape == ()
        and keywords["encoder_hidden_states"].shape == (2, 16, 64)
    )
    with pytest.raises(DataError, match="can't be read as an image"):
        (folder / "3.png").write_bytes(b"no image")
        encoded_batches(a, captioned_images(folder))

    def pipeline(unet: nn.Module) -> Any:
        return a if unet is a.unet else b

    options: dict[str, Any] = dict(steps=3, points=3, batch_size=4, guidance=1.0, reads="both")
    (folder / "3.png").unlink()
    for more in (
        {"captions": ["seven", "a seven"], "then_weight": True},
        {"prompts": folder, "encode_images": True},
    ):
        found = prompt_activation_matching(specs["unet"], a.unet, b.unet, pipeline, **more, **options)
        assert found.permutation == answers["unet"], more
    with pytest.raises(ConfigError, match="Prompts need a diffusion model"):
        prompt_activation_matching(specs["unet"], a.unet, b.unet, None)
    with pytest.raises(ConfigError, match="give their folder"):
        prompt_activation_matching(specs["unet"], a.unet, b.unet, pipeline, encode_images=True)
