# %% [markdown]
# # Your own checkpoints
#
# Two files of Stable Diffusion's layout, compared, aligned and merged by the command. They are narrow here (random
# weights, a few megabytes) so that this page runs anywhere; with your own files the commands are the same.

# %%
from pathlib import Path

import torch

from rebasin.checkpoints import component_spec, load_safetensors, open_checkpoint, save_safetensors
from rebasin.checkpoints.random_weights import random_checkpoint

whole = random_checkpoint("sd1", 16, depth=1, vocabulary=64, seed=0)
base = {name: whole[name].clone() for name in whole if name.startswith("cond_stage_model.")}
save_safetensors("base.safetensors", base)

generator = torch.Generator().manual_seed(1)
near = {
    name: t + 0.02 * t.float().std() * torch.randn(t.shape, generator=generator)
    if t.is_floating_point() and t.numel() > 1
    else t
    for name, t in base.items()
}
save_safetensors("finetune.safetensors", near)

# %% [markdown]
# ## Do they need aligning at all?

# %%
# !python -m rebasin compare base.safetensors finetune.safetensors

# %% [markdown]
# A fine-tune of the same base does not. Now somebody's file whose neurons are in another order: the same function,
# other places. (We make it by a random member of the model's permutation group.)

# %%
checkpoint = open_checkpoint(Path("finetune.safetensors"))
order = component_spec(checkpoint, "text_encoder").random(3)
states = {"text_encoder": order.apply(checkpoint.component("text_encoder"))}
save_safetensors("shuffled.safetensors", dict(checkpoint.restore(states)))

# %%
# !python -m rebasin compare base.safetensors shuffled.safetensors

# %% [markdown]
# ## What a merge will take, and the merge

# %%
# !python -m rebasin merge base.safetensors shuffled.safetensors -o merged.safetensors --alpha 0.3 --dry-run

# %%
# !python -m rebasin merge base.safetensors shuffled.safetensors -o merged.safetensors --alpha 0.3

# %% [markdown]
# It is what merging with the unshuffled file gives:

# %%
merged = load_safetensors("merged.safetensors")
expected = {
    name: torch.lerp(base[name].float(), near[name].float(), 0.3)
    for name in base
    if base[name].is_floating_point()
}
print("largest difference:", max((merged[n].float() - t).abs().max().item() for n, t in expected.items()))

# %% [markdown]
# ## What is this file, and how was it made?

# %%
# !python -m rebasin inspect merged.safetensors

# %% [markdown]
# Adapters of B follow with the permutation that lies beside the merge: [adapters](../adapters.md). Which merge method?
# `rebasin methods --for finetunes`, or [the page](../merge_methods.md). By prompts or images:
# [your own checkpoints](../own_checkpoints.md).
