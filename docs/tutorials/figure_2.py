# %% [markdown]
# # Reproduce figure 2
#
# The paper's figure 2 shows the loss from A to B after no, activation and weight matching and the straight-through
# estimator. Here in small: MLPs of width 128 on scikit-learn's digits. The whole experiment, with MNIST and
# several pairs, is one command (`python -m rebasin.run +experiment=curves`) whose stored result is in
# [the results](../results.md#the-papers-figure-2).

# %%
import matplotlib.pyplot as plt
import torch

import rebasin
from rebasin.data import load
from rebasin.models.cache import trained

digits = load("digits")
a, b = (trained("mlp", digits, {"width": 128}, seed=seed) for seed in (0, 1))
net_a, net_b = a.model(), b.model()
batches = list(zip(digits.train_x.split(128), digits.train_y.split(128), strict=True))
spec = rebasin.trace(net_a, digits.train_x[:2])


def loss(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])


# %%
found = {
    "activation matching": rebasin.activation_matching(spec, net_a, net_b, batches),
    "weight matching": rebasin.weight_matching(spec, a.state, b.state),
    "straight-through": rebasin.straight_through(spec, net_a, net_b, loss, batches, steps=30),
}
for name, one in found.items():
    print(f"{name:20} {one.moved} neurons moved")


# %%
@torch.no_grad()
def evaluate(model):
    return loss(model, (digits.test_x, digits.test_y))


states = {"naive": b.state, **{name: one.permutation.apply(b.state) for name, one in found.items()}}
plt.figure(figsize=(5.5, 3.4))
for name, state in states.items():
    curve = rebasin.barrier(net_a, a.state, state, evaluate, points=11)
    plt.plot(curve.lambdas, curve.losses, ".-", label=f"{name}: {curve.barrier:.3g}")
plt.xlabel("share of B"), plt.ylabel("held-out loss"), plt.legend(title="barrier", fontsize=8)

# %% [markdown]
# What the paper says of width holds here: at width 512 the barrier of all three is zero
# ([README](../index.md), [every experiment](../results_appendix.md)).
