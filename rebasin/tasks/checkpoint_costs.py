"""How much memory and time a run on checkpoints takes, about: counted from shapes and options before anything is read.

A forward pass is made on the meta device, where tensors have shapes but no numbers: its operations are counted, and
the bytes that a gradient would keep of it. The rest is how often a run does that, and how many copies of the model it
has meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from ..data import captioned_folder
from ..errors import ConfigError
from ..matching.candidates import candidates
from ..matching.weights.estimate import matching_seconds, matmul_rate
from ..merging.merged import find_method
from ..spec import PermutationSpec

LIBRARIES = 1e9
"""Bytes of Python with torch, diffusers and transformers."""

CHECKPOINTED = 0.2
"""Share of the activations that are left to keep at a time with checkpointing (measured: .1 to .2)."""

EFFICIENCY = 0.6
"""How quick a network's operators are, as a share of large matrix products."""

SCORER = 4e9
"""Bytes of ImageReward with its gradient."""

TOKENS = 77


@dataclass(frozen=True)
class Pass:
    """One sample's forward pass: operations, bytes kept for a gradient, and bytes of the largest tensor."""

    flops: float
    kept: float
    largest: float


def forward_pass(model: nn.Module, args: Any, kwargs: Any, latent: int | None, dtype: torch.dtype) -> Pass:
    """Of a model that is only wanted for this: it is moved to the meta device.

    Args:
        args, kwargs: an example call of one sample.
        latent: side of the latents in its place, of UNets; None: the call as it is.
    """
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), (args, dict(kwargs)))
    if latent is not None:
        sample, time, *states = args
        args = (
            sample.new_empty(1, sample.shape[1], latent, latent),
            time,
            *(
                s.new_empty(1, TOKENS, s.shape[-1]) if isinstance(s, Tensor) and s.ndim == 3 else s
                for s in states
            ),
        )
    model, kept = model.to("meta"), dict[int, tuple[Tensor, int]]()
    own = {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:  # weights, and views of them, are there anyway
            kept[storage._cdata] = (
                tensor,
                storage.nbytes(),
            )  # with the tensor, or its number went to another one
        return tensor

    attention = _FusedAttention()
    with (
        FlopCounterMode(display=False) as counter,
        torch.enable_grad(),
        saved_tensors_hooks(keep, lambda t: t),
        attention,
    ):
        model(*args, **kwargs)
    sizes = [size * dtype.itemsize / 4 for _, size in kept.values()]  # the meta pass is one in float32
    return Pass(counter.get_total_flops() + attention.flops, sum(sizes), max(sizes, default=0.0))


class _FusedAttention(TorchFunctionMode):
    """Attention as the kernels of a real device do it, which keep no matrix of scores; that of meta does."""

    flops = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        named = {**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {})}
        q, k, v = (named[name] for name in ("query", "key", "value"))
        self.flops += 2.0 * k.shape[-2] * (q.numel() + q.numel() // q.shape[-1] * v.shape[-1])
        return _Attention.apply(q, k, v)


class _Attention(torch.autograd.Function):
    """Its shapes, and what it keeps; nobody asks for the gradient."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # pyright: ignore
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out)
        return out


@dataclass(frozen=True)
class Run:
    """What a run does with the component that it aligns.

    Attributes:
        cfg: the run's configuration.
        takes: the arguments of its algorithm, with their defaults.
        numbers: how many the component has, and `largest` its largest tensor.
        others: bytes of the text encoders, and of the rest of the pipeline; zeros without pictures.
        once: one sample's forward pass; None: nothing is computed.
        side: of the pictures in pixels.
        pictures: whether some are made.
    """

    cfg: DictConfig
    takes: Mapping[str, Any]
    spec: PermutationSpec | None
    numbers: int
    largest: int
    dtype: torch.dtype
    others: tuple[float, float]
    once: Pass | None
    side: int
    pictures: bool

    @property
    def algo(self) -> Mapping[str, Any]:
        return self.cfg.get("algo") or {}

    @property
    def searches(self) -> bool:
        """Whether it follows a gradient."""
        return {"objective", "batches", "steps"} <= set(self.takes)

    @property
    def batch(self) -> int:
        """Samples that are computed at a time."""
        groups = (self.algo.get("reward"), self.algo, self.cfg.objective, self.cfg.data)
        sizes = [int(group["batch_size"]) for group in groups if group and group.get("batch_size")]
        return sizes[0] if sizes else 1

    @property
    def heldout(self) -> int:
        """Samples of the curves, each of so many passes as `passes` says."""
        kind, objective = self.cfg.objective.kind, self.cfg.objective
        if kind == "agreement":
            return int(self.cfg.model.batches)
        if kind == "reward":
            return int(objective.heldout)
        if self.cfg.data.kind == "captioned folder":
            return self._images("heldout")
        return max(1, int(objective.get("samples", 2)) // 2)

    @property
    def train(self) -> int:
        """Samples that a search learns from."""
        chosen = self.algo.get("reward") or self.cfg.objective
        if chosen.get("train") is not None:
            return int(chosen["train"])
        if self.cfg.objective.kind == "denoising":
            return self._images("train")
        return int(chosen.get("samples") or self.cfg.model.batches)

    def _images(self, split: str) -> int:
        data = self.cfg.data
        if data.get(split) is not None:
            return int(data[split])
        count = len(captioned_folder.listed(data.path)) if data.kind == "captioned folder" else 100
        third = -(-count // 3)
        return third if split == "heldout" else count - third

    def passes(self, group: Mapping[str, Any]) -> int:
        """Forward passes for one sample of this objective, or picture."""
        if "grad_steps" not in group and group.get("kind") != "reward":
            return 1
        return int(group["steps"]) * (2 if float(group.get("guidance", 1)) != 1 else 1)

    # Memory ---------------------------------------------------------------------------------------------------------

    def memory(self) -> float:
        """Bytes at the peak."""
        model = self.numbers * self.dtype.itemsize
        files = 16.0 * self.largest  # what is read and moved at a time, and the costs of its groups
        if self.once is None:
            return LIBRARIES + 2 * self.numbers + files
        encoders, rest = self.others
        teachers = 2 if self.cfg.objective.kind == "distillation" else 1
        forward = 12 * self.once.largest * self.batch
        load = teachers * model + encoders + forward
        measure = 2 * model + forward  # the model, and its own weights to be put back
        match = max(self._matching(model), model) + forward
        if self.pictures:  # the last level of the decoder, a picture at a time
            match, measure = (
                match + 4 * 256 * 4 * self.side**2,
                measure + encoders + 4 * 256 * 4 * self.side**2,
            )
        combine = self._information(model)
        scorer = SCORER if "image_reward" in str([self.cfg.objective, self.cfg.evaluate, self.algo]) else 0.0
        return LIBRARIES + rest + scorer + files + max(load, match, measure, combine)

    def _information(self, model: float) -> float:
        """Of a merge that looks at gradients, those of every model in float32, and a sample's activations."""
        merge, takes = self.cfg.get("merge"), ()
        with suppress(ConfigError):  # a method that there is not is refused elsewhere
            takes = find_method(str(merge["method"])).takes if merge else ()
        if "companions" not in takes or self.once is None:
            return 0.0
        models = len(self.cfg.model.files or "ab")
        return 2 * model + 4.0 * (models + 2) * self.numbers + self.once.kept

    def _matching(self, model: float) -> float:
        if "model_a" not in self.takes:
            return model  # tensors are read one after another
        statistics = 0.0
        if self.spec is not None:
            squares = sum(len(cell.sites) * cell.size**2 for cell in self.spec.cells.values())
            statistics = min(8.0 * squares, max(4.0 * squares, float(1 << 31)))
        if not self.searches:
            return 2 * model + statistics
        assert self.once is not None
        algo = {**self.takes, **self.algo}
        moments = 2 if algo.get("optimizer") == "adam" else 1 if algo.get("momentum") else 0
        share = CHECKPOINTED if algo.get("checkpointing") else 1.0
        shown = (self.algo.get("reward") or self.cfg.objective).get("guidance", 1)
        doubled = (
            2 if self.passes(self.algo.get("reward") or self.cfg.objective) > 1 and float(shown) != 1 else 1
        )
        descent = (
            2 * model + 4.0 * (1 + moments) * self.numbers + share * doubled * self.once.kept * self.batch
        )
        starts = (
            statistics
            if algo.get("init")
            in ("best", "activation_matching", "activation_then_weight", "activation_and_weight")
            else 0.0
        )
        return 2 * model + max(descent, starts)

    # Time -----------------------------------------------------------------------------------------------------------

    def seconds(self, rate: float | None = None) -> float:
        """On this machine's CPU, within a factor of two or so."""
        rate = rate or matmul_rate()
        matching = 0.0 if self.spec is None else matching_seconds(self.spec, rate)
        if self.once is None:
            return matching
        passes = self.heldout * self.passes(self.cfg.objective) * self._evaluations()
        algo = {**self.takes, **self.algo}
        if "pipeline" in self.takes:
            rows = 2 if float(algo["guidance"]) > 1 else 1
            points = algo["points"] if isinstance(algo["points"], int) else len(algo["points"])
            passes += 2 * int(algo["count"] or 32) * rows * (int(algo["steps"]) + 2 * points)
        elif self.searches:
            passes += self._search(algo)
            matching *= 1 + 0.2 * int(algo["steps"]) / int(algo["project_every"])
        elif "model_a" in self.takes:
            passes += (
                2 * self.train * (len(candidates()) if "ste" in self.takes else 1)
            )  # algo=auto finds several
        pictures = int(self.cfg.model.samples) * int(self.cfg.model.seeds_shown) * 4
        passes += pictures * int(self.cfg.model.steps) * (2 if float(self.cfg.model.guidance) > 1 else 1)
        scores = self.cfg.evaluate
        if "scorer" in scores:
            passes += (
                4 * int(scores.seeds) * 10 * int(scores.steps) * (2 if float(scores.guidance) != 1 else 1)
            )
        return matching + passes * self.once.flops / (EFFICIENCY * rate)

    def _evaluations(self) -> int:
        """Models on which the held-out samples are looked at: two curves and the merge."""
        return len(self.cfg.evaluate.splits) * (2 * int(self.cfg.evaluate.points) + 1)

    def _search(self, algo: Mapping[str, Any]) -> float:
        """Passes of a straight-through estimator; a gradient counts as three."""
        reward = self.algo.get("reward") or self.cfg.objective
        each, batch = self.passes(reward), self.batch * int(algo["accumulate"])
        select = max(1.0, self.train / 5)
        steps, groups = int(algo["steps"]), len(self.spec) if self.spec is not None else 0
        gradients = steps * batch * (each + (3 if algo["checkpointing"] else 2))
        looks = each * select * (6 + steps / int(algo["evaluate_every"])) + 2 * each * self.train
        return gradients + looks + int(algo["refine"]) * batch * each * (3 + groups)
