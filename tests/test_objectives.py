"""Objectives: the formulas against diffusers' schedulers, the averaging, and the training flags."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import nn

from rebasin.errors import ConfigError, DataError
from rebasin.objectives import CrossEntropy, Denoising


class Denoiser(nn.Module):
    """The calling convention of a conditional UNet around one matrix; keeps what it was called with."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4) / 2)
        self.calls: list[tuple] = []

    def forward(self, sample, timesteps, encoder_hidden_states=None):
        self.calls.append((sample.detach(), timesteps, encoder_hidden_states))
        shift = (
            0
            if encoder_hidden_states is None
            else encoder_hidden_states.mean(dim=(1, 2))[:, None, None, None]
        )
        return SimpleNamespace(sample=torch.einsum("oc,nchw->nohw", self.weight, sample) + shift)


def batch(n: int = 6, seed: int = 0, flow: bool = False):
    g = torch.Generator().manual_seed(seed)
    timesteps = torch.rand(n, generator=g) * 1000 if flow else torch.randint(0, 1000, (n,), generator=g)
    return {
        "latents": torch.randn(n, 4, 5, 5, generator=g),
        "noise": torch.randn(n, 4, 5, 5, generator=g),
        "timesteps": timesteps,
        "condition": torch.randn(n, 3, 2, generator=g),
    }


@pytest.fixture(params=["linear", "squaredcos_cap_v2"])
def scheduler(request) -> DDPMScheduler:
    return DDPMScheduler(num_train_timesteps=1000, beta_schedule=request.param)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noising_and_targets_are_those_of_diffusers(scheduler, prediction):
    b = batch()
    noisy, target = Denoising(prediction, scheduler.alphas_cumprod).noisy_and_target(b)
    torch.testing.assert_close(noisy, scheduler.add_noise(b["latents"], b["noise"], b["timesteps"]))
    velocity = scheduler.get_velocity(b["latents"], b["noise"], b["timesteps"])
    torch.testing.assert_close(target, b["noise"] if prediction == "epsilon" else velocity)


def test_flow_is_that_of_diffusers():
    flow: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    flow.set_timesteps(7)
    b = batch(n=7)
    b["timesteps"] = flow.timesteps
    noisy, target = Denoising("flow").noisy_and_target(b)
    torch.testing.assert_close(noisy, flow.scale_noise(b["latents"], flow.timesteps, b["noise"]))
    # A step with the true velocity from any noise level to 0 ends at the clean latents.
    sigma = (flow.timesteps / 1000)[:, None, None, None]
    torch.testing.assert_close(noisy - sigma * target, b["latents"], atol=1e-5, rtol=1e-4)


def test_the_loss_is_the_mean_squared_error_of_the_prediction(scheduler):
    b, model = batch(), Denoiser()
    objective = Denoising("v_prediction", scheduler.alphas_cumprod)
    loss = objective.loss(model, b)
    sample, timesteps, condition = model.calls[0]
    predicted = sample / 2 + b["condition"].mean(dim=(1, 2))[:, None, None, None]
    velocity = scheduler.get_velocity(b["latents"], b["noise"], b["timesteps"])
    torch.testing.assert_close(loss, F.mse_loss(predicted, velocity))
    assert timesteps is b["timesteps"]
    assert condition is b["condition"]
    loss.backward()
    assert model.weight.grad is not None
    assert model.weight.grad.abs().sum() > 0


def test_without_condition(scheduler):
    b, model = batch(), Denoiser()
    del b["condition"]
    Denoising("epsilon", scheduler.alphas_cumprod).loss(model, b)
    assert model.calls[0][2] is None


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights(scheduler, prediction):
    objective = Denoising(prediction, scheduler.alphas_cumprod, min_snr_gamma=5.0)
    t = torch.tensor([0, 10, 300, 600, 998])
    snr = scheduler.alphas_cumprod[t] / (1 - scheduler.alphas_cumprod[t])
    weights = torch.minimum(snr, torch.tensor(5.0)) / (snr if prediction == "epsilon" else snr + 1)
    torch.testing.assert_close(objective.weights(t), weights)
    b, model = batch(), Denoiser()
    plain = torch.stack(
        [
            Denoising(prediction, scheduler.alphas_cumprod).loss(
                model, {k: v[i : i + 1] for k, v in b.items()}
            )
            for i in range(6)
        ]
    )
    torch.testing.assert_close(objective.loss(model, b), (objective.weights(b["timesteps"]) * plain).mean())


def test_min_snr_at_zero_signal():
    alphas = torch.tensor([0.9, 0.0])
    assert Denoising("epsilon", alphas, min_snr_gamma=5.0).weights(torch.tensor([1])).item() == 1
    assert Denoising("v_prediction", alphas, min_snr_gamma=5.0).weights(torch.tensor([1])).item() == 0


def test_half_precision_latents_give_a_float32_loss(scheduler):
    b = {k: v.half() if v.is_floating_point() else v for k, v in batch().items()}
    model = Denoiser().half()
    objective = Denoising("epsilon", scheduler.alphas_cumprod)
    assert objective.noisy_and_target(b)[0].dtype == torch.float16
    assert objective.loss(model, b).dtype == torch.float32


def test_denoising_misuse(scheduler):
    alphas = scheduler.alphas_cumprod
    with pytest.raises(ConfigError, match="epsilon, v_prediction, flow"):
        Denoising("sample", alphas)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="alphas_cumprod"):
        Denoising("epsilon")
    with pytest.raises(ConfigError, match="min_snr_gamma"):
        Denoising("flow", min_snr_gamma=5.0)
    with pytest.raises(ConfigError, match="positive"):
        Denoising("epsilon", alphas, min_snr_gamma=0.0)
    with pytest.raises(DataError, match="0 to 999"):
        Denoising("epsilon", alphas).loss(Denoiser(), {**batch(), "timesteps": torch.full((6,), 1000)})
    with pytest.raises(DataError, match="shaped like latents"):
        Denoising("epsilon", alphas).loss(Denoiser(), {**batch(), "noise": torch.zeros(6, 4, 1, 1)})

    class Variance(Denoiser):
        def forward(self, *args, **kwargs):
            sample = super().forward(*args, **kwargs).sample
            return SimpleNamespace(sample=torch.cat([sample, sample], dim=1))

    with pytest.raises(ConfigError, match="variance"):
        Denoising("epsilon", alphas).loss(Variance(), batch())


def classifier() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def test_cross_entropy_is_weighted_by_batch_size():
    model = classifier()
    x, y = torch.randn(11, 6), torch.randint(0, 3, (11,))
    objective = CrossEntropy()
    split = list(zip(x.split(4), y.split(4), strict=True))  # 4, 4 and 3 samples
    figures = objective.evaluate(model, split)
    logits = model.eval()(x)
    assert figures["loss"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-6)
    assert figures["accuracy"] == pytest.approx((logits.argmax(1) == y).float().mean().item())


def test_cross_entropy_is_differentiable_and_takes_outputs_with_logits():
    model = classifier().eval()
    x, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    loss = CrossEntropy().loss(model, (x, y))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())

    class Wrapped(nn.Module):
        def forward(self, x):
            return SimpleNamespace(logits=model(x))

    assert CrossEntropy().loss(Wrapped(), (x, y)) == loss


@pytest.mark.parametrize("fails", [False, True])
def test_evaluation_restores_every_training_flag_and_moves_nothing(fails):
    model = classifier()
    model.train()
    model[1].eval()  # frozen on purpose
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    if fails:
        with pytest.raises(RuntimeError):
            CrossEntropy().evaluate(model, [(x[:, :2], y)])
    else:
        CrossEntropy().evaluate(model, [(x, y)])
    assert [module.training for module in model] == [True, False, True, True]
    assert model.training
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_nothing_to_evaluate(scheduler):
    with pytest.raises(DataError, match="empty"):
        CrossEntropy().evaluate(classifier(), [])
    with pytest.raises(DataError, match="empty"):
        Denoising("epsilon", scheduler.alphas_cumprod).evaluate(Denoiser(), [])


def test_denoising_evaluation_is_weighted_by_batch_size(scheduler):
    objective, model, b = Denoising("epsilon", scheduler.alphas_cumprod), Denoiser(), batch(6)
    parts = [{k: v[:4] for k, v in b.items()}, {k: v[4:] for k, v in b.items()}]
    assert objective.evaluate(model, parts)["loss"] == pytest.approx(
        objective.loss(model, b).item(), rel=1e-6
    )
