"""Objectives: the formulas against diffusers' schedulers, the averaging, and the training flags."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import nn

import rebasin
from rebasin.errors import ConfigError, DataError
from rebasin.matching.straight_through.estimator import straight_through
from rebasin.objectives import CrossEntropy, Denoising, Distillation, teach
from rebasin.objectives.denoising import problems
from rebasin.objectives.sampling import sample


@dataclass
class Output:
    """As diffusers returns it."""

    sample: torch.Tensor


@dataclass
class Logits:
    """As transformers returns them."""

    logits: torch.Tensor


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
        return Output(torch.einsum("oc,nchw->nohw", self.weight, sample) + shift)


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
    with pytest.raises(ConfigError, match="must be above 0"):
        Denoising("epsilon", alphas, min_snr_gamma=0.0)
    with pytest.raises(DataError, match="0 to 999"):
        Denoising("epsilon", alphas).loss(Denoiser(), {**batch(), "timesteps": torch.full((6,), 1000)})
    with pytest.raises(DataError, match="shaped like latents"):
        Denoising("epsilon", alphas).loss(Denoiser(), {**batch(), "noise": torch.zeros(6, 4, 1, 1)})

    class Variance(Denoiser):
        def forward(self, *args, **kwargs):
            sample = super().forward(*args, **kwargs).sample
            return Output(torch.cat([sample, sample], dim=1))

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
            return Logits(model(x))

    assert CrossEntropy().loss(Wrapped(), (x, y)) == loss


@pytest.mark.parametrize("fails", [False, True])
def test_evaluation_restores_every_training_flag_and_moves_nothing(fails):
    model = classifier()
    model.train()
    model[1].eval()  # frozen on purpose
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    if fails:
        with pytest.raises(DataError):
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


# Problems of any clean tensors, and without data ------------------------------------------------------------


def test_problems_are_fixed_stratified_and_independent_of_the_batch_size(scheduler):
    objective = Denoising("epsilon", scheduler.alphas_cumprod)
    clean, condition = torch.randn(20, 1, 6, 6), torch.randn(20, 3, 2)
    whole = problems(objective, clean, condition, batch_size=20, seed=4)[0]
    assert sorted(int(t) // 50 for t in whole["timesteps"]) == list(range(20)), "one of each 50 timesteps"
    parts = problems(objective, clean, condition, batch_size=6, seed=4)
    assert [len(part["latents"]) for part in parts] == [6, 6, 6, 2]
    for name, tensor in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), tensor)
    assert not torch.equal(problems(objective, clean, seed=5)[0]["noise"], whole["noise"])
    assert "condition" not in problems(objective, clean)[0]
    flow = problems(Denoising("flow", flow_timesteps=10), clean)[0]["timesteps"]
    assert flow.is_floating_point() and 0 <= flow.min() < 0.5 and 9.5 < flow.max() < 10
    with pytest.raises(ConfigError, match="19"):
        problems(objective, clean, condition[:19])
    with pytest.raises(ConfigError, match="0 samples"):
        problems(objective, clean[:0])


class Pixels(nn.Module):
    """A denoiser that works on pixels, has hidden channels to permute, and knows the time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.time = nn.Linear(1, 8)

    def forward(self, sample, timesteps, encoder_hidden_states=None):
        hidden = self.first(sample) + self.time(timesteps.float()[:, None] / 1000)[:, :, None, None]
        return Output(self.last(F.gelu(hidden)))


def pixel_pair(objective: Denoising) -> tuple[Pixels, Pixels, list]:
    """Two denoisers of real digits on pixels, trained for a moment from different seeds, and problems."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = torch.tensor(digits.images[:240], dtype=torch.float32)[:, None] / 8 - 1
    batches = problems(objective, images, batch_size=60)
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = Pixels()
        optimizer = torch.optim.Adam(model.parameters(), 2e-2)
        for step in range(60):
            optimizer.zero_grad()
            objective.loss(model, batches[step % 4]).backward()
            optimizer.step()
        models.append(model)
    return models[0], models[1], batches


@pytest.mark.parametrize(
    ("prediction", "gamma"), [("epsilon", None), ("epsilon", 5.0), ("v_prediction", 5.0), ("flow", None)]
)
def test_a_search_by_each_prediction_on_pixels_and_without_data(prediction: Any, gamma: float | None):
    """The straight-through estimator goes with all of them; what it finds without data is good on data, too."""
    alphas = None if prediction == "flow" else DDPMScheduler(num_train_timesteps=1000).alphas_cumprod
    objective = Denoising(prediction, alphas, min_snr_gamma=gamma)
    a, b, batches = pixel_pair(objective)
    example = batches[0]["latents"][:2], batches[0]["timesteps"][:2]
    spec = rebasin.trace(a, *example)
    options: dict[str, Any] = {
        "init": "identity",
        "steps": 15,
        "lr": 2e-2,
        "schedule": "cosine",
        "refine": 3,
        "evaluate_every": 1,
    }
    with_data = straight_through(spec, a, b, objective, batches, **options)
    assert with_data.objective < 0.7 * with_data.initial_objective, "there is a barrier, and it shrinks"
    assert spec.contains(with_data.permutation)

    free = Distillation(prediction, alphas, min_snr_gamma=gamma)
    made = teach(free, a, b, [60, 60, 60], (1, 8, 8), steps=8)
    without = straight_through(spec, a, b, free, made, heldout=made[2:], **options)
    assert without.objective < without.initial_objective

    def excess(permutation) -> float:
        model = Pixels()
        losses = []
        for state in (a.state_dict(), b.state_dict(), None):
            aligned = permutation.apply(b.state_dict())
            model.load_state_dict(state or rebasin.interpolate(a.state_dict(), aligned, 0.5))
            losses.append(objective.evaluate(model, batches)["loss"])
        return losses[2] - (losses[0] + losses[1]) / 2

    assert excess(without.permutation) < 0.7 * excess(spec.identity()), "judged on real images"


def test_what_teachers_make(scheduler):
    """The first half of the latents is A's, the rest B's; the target is their mean; all is fixed by the seed."""
    objective = Distillation("epsilon", scheduler.alphas_cumprod)
    torch.manual_seed(0)
    a, b = Pixels(), Pixels()
    (made,) = teach(objective, a, b, [5], (1, 4, 4), steps=3, seed=1)
    (again,) = teach(objective, a, b, [5], (1, 4, 4), steps=3, seed=1)
    assert all(torch.equal(made[name], again[name]) for name in ("latents", "noise", "timesteps", "target"))
    start = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    for model, part in ((a, slice(0, 2)), (b, slice(2, 5))):
        with torch.no_grad():
            torch.testing.assert_close(made["latents"][part], sample(model, objective, start[part], steps=3))
    noisy, target = objective.noisy_and_target(made)
    with torch.no_grad():
        outputs = [model(noisy, made["timesteps"]).sample for model in (a, b)]
    torch.testing.assert_close(target, (outputs[0] + outputs[1]) / 2)
    # A's loss is a quarter of the distance between the two, and so is B's.
    distance = F.mse_loss(outputs[0], outputs[1]).item()
    for model in (a, b):
        assert objective.evaluate(model, [made])["loss"] == pytest.approx(distance / 4, rel=1e-5)
    # Without a target of its own a batch is a denoising problem.
    plain = {name: value for name, value in made.items() if name != "target"}
    loss = Denoising("epsilon", scheduler.alphas_cumprod).evaluate(a, [plain])
    assert objective.evaluate(a, [plain]) == loss


def test_labels_that_are_no_class_numbers_are_told() -> None:
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    for labels in (torch.rand(2), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int32)):
        with pytest.raises(DataError, match="CrossEntropy takes class numbers"):
            CrossEntropy().loss(model, (x, labels))
    assert CrossEntropy().loss(model, (x, torch.tensor([0, 2]))) > 0
