# %% [markdown]
# # Beyond permutations
#
# Networks have more symmetries than the order of their neurons. A residual stream behind LayerNorm can be rotated, a
# head multiplied by any invertible matrix, a ReLU's input scaled. They are derived and proved like permutations.

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import rebasin
from rebasin.matching import weight_alignment

digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)


class Block(nn.Module):
    """A residual stream of width 32 with a norm that has no gain, and two layers beside it."""

    def __init__(self, n=32):
        super().__init__()
        self.enter, self.leave = nn.Linear(64, n), nn.Linear(n, 10)
        self.norm, self.last = nn.RMSNorm(n), nn.RMSNorm(n)
        self.up, self.down = nn.Linear(n, 48), nn.Linear(48, n)

    def forward(self, h):
        h = self.enter(h)
        return self.leave(self.last(h + self.down(torch.relu(self.up(self.norm(h))))))


def trained(seed):
    torch.manual_seed(seed)
    net = Block()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(30):
        for batch in torch.randperm(1400).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    return net.eval()


a, b = trained(0), trained(1)
spec = rebasin.trace(a, x[:2])
print("proved with an error of", rebasin.verify(a, spec, x[:2]).require().max_relative_error)
for group in spec.continuous:
    print(group.name, group.kind, group.dimension)

# %% [markdown]
# ## Found back
#
# A moved by a random member of the group computes the same and looks like another network. Weight matching with maps
# finds the way back; no permutation can.

# %%
moved = spec.random_alignment(seed=3).apply(a.state_dict())
for name, one in (
    ("permutation", rebasin.weight_matching(spec, a.state_dict(), moved)),
    ("maps", weight_alignment(spec, a.state_dict(), moved)),
):
    print(f"{name:12} |A - B| {one.distance_before:.3f} -> {one.distance_after:.2g}")

# %% [markdown]
# ## Learned by the loss
#
# Of two networks that were trained apart, maps that make the loss between them small are learned.

# %%
batches = [(x[i : i + 100], y[i : i + 100]) for i in range(0, 1400, 100)]


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


learned = rebasin.learned_matching(spec, a, b, loss, batches, steps=100)
permuted = rebasin.weight_matching(spec, a.state_dict(), b.state_dict())


@torch.no_grad()
def evaluate(model):
    return loss(model, (x[1400:], y[1400:]))


plt.figure(figsize=(5.5, 3.4))
for name, state in (
    ("naive", b.state_dict()),
    ("a permutation", permuted.permutation.apply(b.state_dict())),
    ("learned maps", learned.alignment.apply(b.state_dict())),
):
    curve = rebasin.barrier(a, a.state_dict(), state, evaluate, points=11)
    plt.plot(curve.lambdas, curve.losses, ".-", label=f"{name}: {curve.barrier:.3g}")
plt.xlabel("share of B"), plt.ylabel("held-out loss"), plt.legend(title="barrier", fontsize=8)

# %% [markdown]
# A low line alone does not say that the midpoint has merged what both know: see
# [the control](../continuous.md#what-a-low-line-says-and-what-it-does-not-a-control), and [limits](../limits.md).
