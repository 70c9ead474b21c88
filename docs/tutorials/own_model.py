# %% [markdown]
# # Your own model
#
# A network of your own, trained twice from different seeds, aligned and merged. Nothing about it is declared: its
# symmetries are derived from what its forward pass computes, and proved before they are used.

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import rebasin

digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
y = torch.tensor(digits.target)
train, held = slice(0, 1400), slice(1400, None)


class Net(nn.Module):
    """Convolutions, GroupNorm and a residual stream: several symmetries at once."""

    def __init__(self, width=24):
        super().__init__()
        self.enter = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.GroupNorm(4, width)
        self.up = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.down = nn.Conv2d(2 * width, width, 3, padding=1)
        self.leave = nn.Linear(width, 10)

    def forward(self, image):
        h = torch.relu(self.enter(image))
        h = h + self.down(torch.relu(self.up(self.norm(h))))
        return self.leave(h.mean((2, 3)))


# %%
def trained(seed, epochs=12):
    torch.manual_seed(seed)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(1400).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    return net.eval()


net_a, net_b = trained(0), trained(1)

# %% [markdown]
# ## What may be permuted
#
# `trace` follows the computation, `verify` proves what it found: a random member of the group must change nothing.

# %%
spec = rebasin.trace(net_a, x[:2])
rebasin.verify(net_a, spec, x[:2]).require()
print(spec.summary())

# %% [markdown]
# ## Align B to A, and merge

# %%
found = rebasin.weight_matching(spec, net_a.state_dict(), net_b.state_dict())
print(found)

# %%
aligned = found.permutation.apply(net_b.state_dict())
before = net_b(x[held])
net_b.load_state_dict(aligned)
print("what aligning changed in B's outputs:", (net_b(x[held]) - before).abs().max().item())

# %% [markdown]
# Did it help? The loss along the line from A to B, on data that nobody has trained on.

# %%
net_b = trained(1)


@torch.no_grad()
def evaluate(model):
    logits = model(x[held])
    return {
        "loss": nn.functional.cross_entropy(logits, y[held]),
        "accuracy": (logits.argmax(1) == y[held]).float().mean(),
    }


naive = rebasin.barrier(net_a, net_a.state_dict(), net_b.state_dict(), evaluate, points=11)
curve = rebasin.barrier(net_a, net_a.state_dict(), aligned, evaluate, points=11)
plt.figure(figsize=(5, 3))
plt.plot(naive.lambdas, naive.losses, "o--", label="naive")
plt.plot(curve.lambdas, curve.losses, "s-", label="aligned")
plt.xlabel("share of B"), plt.ylabel("held-out loss"), plt.legend()
print(f"barrier: naive {naive.barrier:.3f}, aligned {curve.barrier:.3f}")

# %% [markdown]
# By the weights alone it need not: in small networks the permutation that is best for the weights can leave the barrier
# where it was, or higher. With data there is more: `auto_matching` tries several ways on training batches and takes the
# best, never worse than naive there.

# %%
batches = [(x[i : i + 100], y[i : i + 100]) for i in range(0, 1400, 100)]


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


best = rebasin.auto_matching(spec, net_a, net_b, loss, batches)
moved = best.permutation.apply(net_b.state_dict())
print(
    best.chosen,
    "leaves",
    round(rebasin.barrier(net_a, net_a.state_dict(), moved, evaluate, points=11).barrier, 3),
)

# %% [markdown]
# The same by the command, with a report: [Your own model](../own_model.md).
